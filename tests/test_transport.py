"""Deltas in another order: exact where the answer is known, one sentence where there is none."""
import copy
import itertools
from dataclasses import replace

import pytest
import torch

from experiments.twin import permuted_twin
from rt.data import Example, encode
from rt.deltas import Base, apply, attach, extract
from rt.errors import InputError, StaleDelta
from rt.formats.checkpoint import fingerprint
from rt.kinds import KINDS, TARGETS, DeltaConfig
from rt.model import Encoder, MaskedLM
from rt.transport import activations, agreement, assignment, transport

TEXTS = [" ".join(f"{chr(97 + (i * j + k) % 26)}{(7 * i + j * k) % 97}" for k in range(12)) for i in range(12) for j in range(1, 5)]


def tuned(base, kind, labels=3):
    """A delta as of tuning: every trained weight moved at random."""
    config = DeltaConfig(kind, r=4, bottleneck=8, prefix_len=4, target_modules=tuple(TARGETS))
    model, generator = attach(base, config, labels, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return extract(model, base, config, {"task": "t", "labels": [str(i) for i in range(labels)]})


def carried(old, new, delta):
    sequences = encode([Example(text, None, None, "") for text in TEXTS], (), old.tokenizer, 64).sequences
    delta, about = transport(old, new, delta, sequences)
    return delta, about["carried"]


def logits(base, delta, batch):
    with torch.no_grad():
        return apply(base, delta, stale_ok=True).eval()(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_twin_is_undone_and_identical_bases_change_nothing(base, batch, kind):
    delta, twin = tuned(base, kind), permuted_twin(base, 3)
    right, lost = logits(base, delta, batch), (logits(twin, delta, batch) - logits(base, delta, batch)).abs().max()
    assert lost > 0.3       # as it stands it is worth nothing there
    for new in (base, twin):
        delta_new, about = carried(base, new, delta)
        apply(new, delta_new)       # not stale
        assert (logits(new, delta_new, batch) - right).abs().max() < 1e-5
        assert delta_new.config == delta.config and delta_new.labels == delta.labels
        assert about["texts"] == 48 and about["cosine"] == 1
    same, _ = carried(base, base, delta)
    assert all(torch.equal(v, delta.tensors()[k]) for k, v in same.tensors().items())


@pytest.mark.parametrize("which, dim", [(0, 2), (1, 2), (slice(2), 1), (slice(2, 3), 1)])
def test_orders_are_found_from_queries_keys_and_values(base, batch, which, dim):
    """Known answers if a head's queries (or keys) are all alike, or if all heads' queries and keys (or values) are alike."""
    with torch.no_grad():
        for qkv in (layer.qkv for layer in base.encoder.layers):
            for p in (qkv.weight.view(3, 2, 32, 64), qkv.bias.view(3, 2, 32, 1)):       # three, heads, dimensions of a head
                p[which] = p.narrow(dim, 0, 1).expand_as(p)[which].clone()
    base = replace(base, fingerprint=fingerprint(base.encoder))
    delta, twin = tuned(base, "full"), permuted_twin(base, 3)
    assert (logits(twin, carried(base, twin, delta)[0], batch) - logits(base, delta, batch)).abs().max() < 1e-5


def test_there_is_no_order_among_states_that_are_not_finite(base):
    lost = copy.deepcopy(base)
    lost.encoder.layers[1].output.bias.data[3] = float("nan")
    with pytest.raises(InputError, match="no order can be found: hidden states of the old or the new base are not finite"):
        carried(base, lost, tuned(base, "full"))


def test_agreement_is_the_cosine_over_all_texts(base, other_base):
    sequences, kept = [[0, *range(5 + i, 25 + 2 * i), 2] for i in range(40)], ({}, {})
    with torch.no_grad():
        found = agreement(base.encoder, other_base.encoder, sequences)
        for parts, one in zip(kept, (base, other_base)):
            for part, x in activations(one.encoder, sequences):
                parts.setdefault(part, []).append(x)
    for part, score in found.items():
        X, Y = (torch.nn.functional.normalize(torch.cat(parts[part], 1), dim=1) for parts in kept)
        torch.testing.assert_close(score, Y.mT @ X, atol=1e-5, rtol=1e-4)


def test_a_bases_second_type_is_carried(base, batch):
    encoder = Encoder(replace(base.encoder.config, model_type="bert", sep_id=2)).eval()
    encoder.embeddings.second_type.data.normal_()
    bert = Base(encoder, None, base.tokenizer, {}, fingerprint(encoder))
    delta, twin = tuned(bert, "full"), permuted_twin(bert, 3)
    new, _ = carried(bert, twin, delta)
    torch.testing.assert_close(logits(twin, new, batch), logits(bert, delta, batch), atol=1e-5, rtol=1e-5)


def test_bases_that_have_nothing_to_do_with_each_other_are_known_by_their_cosine(base, other_base):
    assert carried(base, other_base, tuned(base, "bitfit"))[1]["cosine"] < 0.9


def test_a_delta_of_another_old_base_is_refused(base, other_base):
    with pytest.raises(StaleDelta):
        carried(other_base, permuted_twin(base, 3), tuned(base, "bitfit"))


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


def test_what_cannot_be_carried_is_one_sentence(base, other_base):
    delta = tuned(base, "adapter")
    small = Encoder(replace(base.encoder.config, ffn_size=32)).eval()
    with pytest.raises(InputError, match="other sizes: ffn_size"):
        carried(base, Base(small, None, base.tokenizer, {}, fingerprint(small)), delta)
    delta.modules["layers.0.adapter_ffn.shift"] = torch.zeros(64)
    with pytest.raises(InputError, match="tensor modules.layers.0.adapter_ffn.shift cannot be carried"):
        carried(base, other_base, delta)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_assignment_is_the_best_of_all(n):
    for seed in range(10):
        score = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
        columns = assignment(score)
        assert sorted(columns.tolist()) == [*range(n)]
        best = max(sum(score[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
        assert score[torch.arange(n), columns].sum().item() == pytest.approx(best, abs=1e-5)
    assert sorted(assignment(torch.zeros(n, n)).tolist()) == [*range(n)]


def test_the_cosine_is_of_matched_dimensions(base, other_base):
    sequences = [[0, *range(5 + i, 25 + i), 2] for i in range(20)]
    score = agreement(base.encoder, other_base.encoder, sequences)["hidden"][0].detach()
    _, about = transport(base, other_base, tuned(base, "bitfit"), sequences)
    assert about["carried"]["cosine"] == pytest.approx(score[torch.arange(64), assignment(score)].mean().item(), abs=6e-4)


def test_a_dimension_that_is_always_zero_hides_no_order(base, batch):
    with torch.no_grad():
        base.encoder.layers[0].intermediate.weight[3], base.encoder.layers[0].intermediate.bias[3] = 0.0, 0.0
    base = replace(base, fingerprint=fingerprint(base.encoder))
    delta, twin = tuned(base, "bitfit"), permuted_twin(base, 3)
    assert carried(base, twin, delta)[1]["cosine"] == 1
