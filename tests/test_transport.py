"""Maps from text: exact if the answer is known, one sentence if there is none."""
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import random_base

from data.docstrings import DOMAINS
from experiments.twin import permuted_twin
from rt.deltas import Base, apply, attach, extract
from rt.errors import InputError
from rt.formats.checkpoint import fingerprint
from rt.formats.corpora import pairs_of
from rt.formats.tokenizer import train_tokenizer
from rt.kinds import KINDS, TARGETS, DeltaConfig
from rt.model import Encoder, MaskedLM
from rt.transport import assignment, maps, match_layers, moved, moved_head, transport

TEXTS = [" ".join(f"{chr(97 + (i * j + k) % 26)}{(7 * i + j * k) % 97}" for k in range(12)) for i in range(12) for j in range(1, 5)]


def tuned(base, kind, labels=3):
    """A delta as after tuning: every trained weight moved at random."""
    config = DeltaConfig(kind, r=4, bottleneck=8, prefix_len=4, target_modules=tuple(TARGETS))
    model, generator = attach(base, config, labels, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return extract(model, base, config, {"task": "t", "labels": [str(i) for i in range(labels)]})


def carried(old, new, delta, how):
    delta, about = transport(old, new, delta, pairs_of(TEXTS, old.tokenizer, new.tokenizer, 64), how)
    return delta, about["carried"]


def logits(base, delta, batch):
    with torch.no_grad():
        return apply(base, delta, stale_ok=True).eval()(batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["ridge", "orthogonal", "permutation"])
def test_a_permuted_twin_is_undone_and_identical_bases_change_nothing(base, batch, kind, how):
    """Ridge is only as exact as its lambda allows: directions that hardly occur in the text are shrunk."""
    delta, twin = tuned(base, kind), permuted_twin(base, 3)
    right, lost = logits(base, delta, batch), (logits(twin, delta, batch) - logits(base, delta, batch)).abs().max()
    assert lost > 0.3       # without a map it is worth nothing there
    for new in (base, twin):
        delta_new, about = carried(base, new, delta, how)
        apply(new, delta_new)       # not stale
        assert (logits(new, delta_new, batch) - right).abs().max() < (0.2 * lost if how == "ridge" else 1e-5)
        assert delta_new.config == delta.config and delta_new.labels == delta.labels
        assert about == {"map": how, "texts": 48, "rows": about["rows"], "layers": [(0, 0), (1, 1)], "left_out": []}


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_a_twin_computes_the_same(base, batch, model_type):
    if model_type == "bert":
        encoder = Encoder(replace(base.encoder.config, model_type="bert", sep_id=2)).eval()
        encoder.embeddings.second_type.data.normal_()
        pooler = {"dense.weight": torch.randn(64, 64), "dense.bias": torch.randn(64)}
        base = Base(encoder, None, base.tokenizer, {}, fingerprint(encoder), pooler)
    twin = permuted_twin(base, 3)
    assert twin.fingerprint != base.fingerprint
    with torch.no_grad():
        first, second = (one.encoder(batch)[batch.first] for one in (base, twin))
        assert not torch.allclose(first, second, atol=0.1)
        torch.testing.assert_close(first.sort(1).values, second.sort(1).values, atol=1e-5, rtol=1e-5)
        if model_type == "bert":
            torch.testing.assert_close(second @ twin.pooler["dense.weight"].T, first @ base.pooler["dense.weight"].T, atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(*(MaskedLM(one.encoder, one.head)(batch) for one in (base, twin)), atol=1e-4, rtol=1e-4)


def found_for(X, Y, how):
    M = [torch.stack([x.T @ y] * 2)[:, None] for x, y in ((X, Y), (X, X), (Y, Y))]
    return maps({"layers.0.attention_output.in": M, "layers.0.attention_output.out": M}, how, 1)


@pytest.mark.parametrize("how", ["ridge", "orthogonal"])
def test_a_rotated_linear_layer(how):
    """y = x W^T in rotated coordinates on both sides: D' = R^T D R. What a head reads through A is unchanged."""
    g = torch.Generator().manual_seed(0)
    X, D, W = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (50, 6, 6))
    R = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    found = found_for(X, X @ R, how)
    D_new = moved("layers.0.attention_output.weight", D, found)
    torch.testing.assert_close(X @ R @ D_new.T, X @ D.T @ R, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moved("layers.0.attention_output.bias", D[0], found), D[0] @ R, atol=1e-6, rtol=1e-6)
    head = {"dense.weight": W, "dense.bias": W[0], "out.weight": W[:2], "out.bias": W[0, :2]}
    new = moved_head(head, head, found("layers.0.attention_output.out", True)[0])
    torch.testing.assert_close(X @ R @ new["dense.weight"].T, X @ W.T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("wide, narrow", [(9, 6), (6, 9)])
def test_widths_changed_by_zero_padding(wide, narrow):
    """New rows are the old ones followed by zeros, or without the last dimensions, which were zero."""
    g, n = torch.Generator().manual_seed(0), min(wide, narrow)
    X, D = torch.randn(50, narrow, generator=g, dtype=torch.float64), torch.randn(narrow, narrow, generator=g, dtype=torch.float64)
    X[:, n:], D[n:], D[:, n:] = 0.0, 0.0, 0.0
    Y, expected = torch.zeros(50, wide, dtype=torch.float64), torch.zeros(wide, wide, dtype=torch.float64)
    Y[:, :n], expected[:n, :n] = X[:, :n], D[:n, :n]
    found = found_for(X, Y, "ridge")
    torch.testing.assert_close(moved("layers.0.attention_output.weight", D, found), expected, atol=1e-6, rtol=1e-6)
    shapes = {"dense.weight": (-1, -1), "dense.bias": (-1,), "out.weight": (2, -1), "out.bias": (2,)}       # -1: the width
    fresh, head = ({name: torch.ones([d if size < 0 else size for size in shape]).double() for name, shape in shapes.items()}
                   for d in (wide, narrow))
    head["out.weight"][:, n:] = 0.0         # features with zero output weight
    new, A = moved_head(fresh, head, found("layers.0.attention_output.out", True)[0]), (X, Y)
    answers = [torch.tanh(z @ h["dense.weight"].T + h["dense.bias"]) @ h["out.weight"].T + h["out.bias"] for z, h in zip(A, (head, new))]
    torch.testing.assert_close(*answers, atol=1e-6, rtol=1e-6)


def doubled(base):
    """A base with twice the width, heads and FFN units, but the same function: everything is there twice, and each reader halves it."""
    c = base.encoder.config
    encoder = Encoder(replace(c, hidden_size=2 * c.hidden_size, num_heads=2 * c.num_heads, ffn_size=2 * c.ffn_size)).eval()
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            own = base.encoder.get_parameter(name)
            parts = own.chunk(3) if "qkv" in name else [own]
            twice = torch.cat([torch.cat([part, part]) if "embeddings" not in name or own.ndim == 1 else part for part in parts])
            p.copy_(twice if own.ndim == 1 else torch.cat([twice, twice], 1) if "embeddings" in name else torch.cat([twice, twice], 1) / 2)
    return Base(encoder, None, base.tokenizer, {}, fingerprint(encoder))


def test_a_wider_base_with_the_same_function_does_what_the_old_one_did(base, batch):
    delta, wide = tuned(base, "adapter"), doubled(base)
    with torch.no_grad():
        torch.testing.assert_close(wide.encoder(batch), base.encoder(batch).repeat(1, 2), atol=1e-4, rtol=1e-4)
    delta.diffs = {name: torch.zeros_like(v) for name, v in delta.diffs.items()}        # layer norms are not carried
    new, about = carried(base, wide, delta, "ridge")
    assert about["left_out"] == ["layer norms"]
    torch.testing.assert_close(logits(wide, new, batch), logits(base, delta, batch), atol=0.01, rtol=0.01)
    for how, name in (("orthogonal", "hidden_size"), ("permutation", "hidden_size")):
        with pytest.raises(InputError, match=f"`carry` {how} is for bases of equal {name}, not 64 and 128: use ridge"):
            carried(base, wide, delta, how)
    with pytest.raises(InputError, match="other sizes: hidden_size 64, the base has 128"):
        carried(base, wide, tuned(base, "bitfit"), "ridge")


def test_layers_are_matched_in_order_and_one_to_one(base):
    """Each base has layers of the other. The layers between them are unrelated."""
    deep = Encoder(replace(base.encoder.config, num_layers=4)).eval()
    deep.load_state_dict(random_base(base.tokenizer, 5).encoder.state_dict(), strict=False)
    deep.embeddings.load_state_dict(base.encoder.embeddings.state_dict())
    for i in (0, 1):
        deep.layers[i].load_state_dict(base.encoder.layers[i].state_dict())
    pairs = pairs_of(TEXTS, base.tokenizer, base.tokenizer, 64)
    assert match_layers(base.encoder, deep, pairs) == {0: 0, 1: 1} == match_layers(deep, base.encoder, pairs)
    other, delta = Base(deep, None, base.tokenizer, {}, fingerprint(deep)), tuned(base, "lora")
    new, about = carried(base, other, delta, "permutation")
    assert about["layers"] == [(0, 0), (1, 1)]
    for name, v in new.modules.items():
        if name.startswith(("layers.0", "layers.1")):
            torch.testing.assert_close(v, delta.modules[name])
        else:       # a fresh module changes nothing, but can learn
            assert (v == 0).all() == (".B." in name)


def test_other_tokenizers_are_compared_at_words_first_pieces(base):
    texts = [f"{name} reading of {word} in {name}{word}" for name in DOMAINS for word in ("modules", "documentation", "parameters")]
    small = train_tokenizer(texts, 300)
    other = random_base(small, 2)
    for a, rows_a, b, rows_b in pairs_of(texts, base.tokenizer, small, 24):
        assert a[0] == base.tokenizer.bos_id and b[-1] == small.eos_id and rows_a[0] == rows_b[0] == 0 and len(rows_a) == len(rows_b) > 1
        for i, j, i_next, j_next in zip(rows_a[1:], rows_b[1:], rows_a[2:], rows_b[2:]):
            assert base.tokenizer.decode(a[i:i_next]) == small.decode(b[j:j_next])
    delta = tuned(base, "adapter")
    new, about = carried(base, other, delta, "ridge")
    apply(other, new)
    assert about["rows"] < sum(len(pair[0]) for pair in pairs_of(TEXTS, base.tokenizer, small, 64))
    with pytest.raises(InputError, match="another tokenizer|vocab_size"):
        carried(base, other, tuned(base, "full"), "ridge")


def test_what_cannot_be_carried_is_one_sentence(base, other_base):
    delta = tuned(base, "adapter")
    with pytest.raises(InputError, match="`carry`: 1 texts are too few"):
        transport(base, other_base, delta, pairs_of(TEXTS[:1], base.tokenizer, base.tokenizer, 64), "ridge")
    delta.modules["layers.0.adapter_ffn.shift"] = torch.zeros(64)
    with pytest.raises(InputError, match="tensor layers.0.adapter_ffn.shift cannot be carried"):
        carried(base, other_base, delta, "ridge")


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_assignment_is_the_best_of_all(n):
    for seed in range(10):
        score = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
        columns = assignment(score)
        assert sorted(columns) == [*range(n)]
        best = max(sum(score[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
        assert score[torch.arange(n), torch.tensor(columns)].sum().item() == pytest.approx(best, abs=1e-5)
    assert sorted(assignment(torch.zeros(n, n))) == [*range(n)]
