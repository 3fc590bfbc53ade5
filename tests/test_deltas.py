"""Every kind of delta: identity when attached, round trip through a folder, algebra, merging, and an unchanged base."""
import json
from dataclasses import replace

import pytest
import torch

from rt.deltas import apply, attach, extract, merge
from rt.errors import InputError, StaleDelta
from rt.formats.checkpoint import fingerprint
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.files import FIGURES
from rt.kinds import KINDS, DeltaConfig
from rt.losses import weights_of
from rt.model import ClassificationHead, Classifier, Encoder
from rt.report.inspect import inspect

LABELS = ["a", "b", "c"]
CONFIGS = {kind: DeltaConfig(kind, bottleneck=6, r=3, prefix_len=5,
                             target_modules=("query", "value", "intermediate.dense")) for kind in KINDS}


def trained(base, kind, batch, seed=0, steps=3):
    """A model trained for a few large steps, and its delta."""
    model = attach(base, CONFIGS[kind], 3, seed).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        torch.nn.functional.cross_entropy(model(batch), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), extract(model, base, CONFIGS[kind], {"task": "t", "labels": LABELS})


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_freshly_attached_is_the_identity(kind, base, batch):
    model = attach(base, CONFIGS[kind], 3, seed=0).eval()
    with torch.no_grad():
        assert torch.equal(model.encoder(batch), base.encoder(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_a_function_of_the_seed(kind, base):
    a, again, other = (weights_of(attach(base, CONFIGS[kind], 3, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(v, again[k]) for k, v in a.items())
    sizes = {"head.": 0.02, ".down.": 0.02, ".lora.A.": 1 / (3 * 64) ** 0.5, ".prefix.k": 1.0, ".prefix.v": 1.0}
    drawn = [(k, v, size) for k, v in a.items() for part, size in sizes.items() if part in k and v.ndim > 1]
    for k, v, size in drawn:
        assert not torch.equal(v, other[k]) and v.std().item() == pytest.approx(size, rel=0.3), k
    assert len(drawn) == 2 + {"adapter": 4, "lora": 6, "prefix": 4}.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_model_but_never_the_base(kind, base, batch):
    before = fingerprint(base.encoder)
    model, delta = trained(base, kind, batch)
    assert fingerprint(base.encoder) == before == base.fingerprint
    assert not any(p.grad is not None for p in base.encoder.parameters())
    with torch.no_grad():
        assert (model.encoder(batch) - base.encoder(batch)).abs().max() > 1e-2
    apply(base, delta)
    2.0 * delta
    assert fingerprint(base.encoder) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained(kind, base):
    names = {n for n, p in attach(base, CONFIGS[kind], 3, seed=0).encoder.named_parameters() if p.requires_grad}
    own = {n for n, _ in base.encoder.named_parameters()}
    expected = {"full": own, "bitfit": {n for n in own if n.endswith(".bias")}, "lora": set(), "prefix": set(),
                "adapter": {n for n in own if "norm" in n}}[kind]
    assert names & own == expected
    added = {"adapter": "adapter_", "lora": ".lora.", "prefix": ".prefix."}.get(kind)
    assert (names - own == set()) if added is None else (names - own and all(added in n for n in names - own))


@pytest.mark.parametrize("kind", KINDS)
def test_extract_save_load_apply_gives_the_tuned_logits(kind, base, batch, tmp_path):
    model, delta = trained(base, kind, batch)
    save_delta(tmp_path / "delta", delta)
    again = load_delta(tmp_path / "delta")
    assert again.config == CONFIGS[kind] and again.labels == tuple(LABELS)
    torch.testing.assert_close(logits(apply(base, again), batch), logits(model, batch), atol=1e-5, rtol=1e-4)


def test_a_delta_that_takes_anothers_place_leaves_its_figures(base, batch, tmp_path):
    delta = trained(base, "lora", batch)[1]
    save_delta(tmp_path / "d", delta)
    (tmp_path / "d" / FIGURES).mkdir()
    (tmp_path / "d" / FIGURES / "tuning.png").write_bytes(b"drawn")
    save_delta(tmp_path / "d", delta)
    assert (tmp_path / "d" / FIGURES / "tuning.png").read_bytes() == b"drawn"


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "prefix"])
def test_algebra(kind, base, batch):
    _, d1 = trained(base, kind, batch, seed=0)
    _, d2 = trained(base, kind, batch, seed=1)

    def same(a, b):
        torch.testing.assert_close(logits(apply(base, a), batch), logits(apply(base, b), batch), atol=2e-4, rtol=1e-4)

    same(1.0 * d1, d1)
    same(d1 + d2, d2 + d1)
    same(2.0 * (d1 + d2), 2.0 * d1 + 2.0 * d2)
    same(0.5 * d1 + 0.5 * d1, d1)
    same(d1 + d2 - d2, d1)
    same(-(-d1), d1)
    same(sum([d1, d2]) / 2, 0.5 * d1 + 0.5 * d2)
    other_order = replace(d2, **{part: dict(reversed(getattr(d2, part).items())) for part in ("diffs", "modules", "head")})
    assert [*other_order.tensors()] == [*d2.tensors()]      # so sums and projections fit, however a delta was read
    zero = apply(base, d1 - d1)
    with torch.no_grad():
        torch.testing.assert_close(zero.encoder(batch), base.encoder(batch), atol=2e-4, rtol=1e-4)
    assert (logits(apply(base, d1 + d2), batch) - logits(apply(base, d1), batch)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_scale_moves_the_encoder_and_keeps_the_head(kind, base, batch):
    _, delta = trained(base, kind, batch)
    none = apply(base, delta, scale=0.0)
    with torch.no_grad():
        torch.testing.assert_close(none.encoder(batch), base.encoder(batch))
    assert torch.equal(none.head.out.weight, delta.head["out.weight"])
    half, whole = apply(base, delta, scale=0.5), apply(base, delta)
    assert (logits(half, batch) - logits(whole, batch)).abs().max() > 1e-3


def test_lora_sum_adds_products_and_not_factors(base, batch):
    _, d1 = trained(base, "lora", batch, seed=0)
    _, d2 = trained(base, "lora", batch, seed=1)
    plain = base.encoder.state_dict()
    change = {k: (merge(base, d1)[k] - plain[k]) + (merge(base, d2)[k] - plain[k]) for k in plain}
    summed = merge(base, d1 + d2)
    for k in plain:
        torch.testing.assert_close(summed[k] - plain[k], change[k], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora", "bitfit"])
def test_merged_equals_unmerged(kind, base, batch):
    _, delta = trained(base, kind, batch)
    encoder, head = Encoder(base.encoder.config), ClassificationHead(64, 3)
    head.load_state_dict(delta.head)
    for scale in (1.0, 0.5):
        encoder.load_state_dict(merge(base, delta, scale))
        torch.testing.assert_close(logits(Classifier(encoder, head), batch), logits(apply(base, delta, scale), batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["adapter", "prefix"])
def test_modules_cannot_be_merged(kind, base, batch):
    with pytest.raises(InputError, match="cannot be merged"):
        merge(base, trained(base, kind, batch)[1])


def test_sums_need_equal_kind_base_and_labels(base, other_base, batch):
    _, lora = trained(base, "lora", batch)
    _, full = trained(base, "full", batch)
    _, elsewhere = trained(other_base, "lora", batch)
    _, prefix = trained(base, "prefix", batch)
    for a, b, word in ((lora, full, "kinds"), (lora, elsewhere, "bases"), (prefix, prefix, "no sum")):
        with pytest.raises(InputError, match=word):
            a + b


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_refused_unless_asked_for(kind, base, other_base, batch):
    _, delta = trained(base, kind, batch)
    with pytest.raises(StaleDelta, match="learned on base"):
        apply(other_base, delta)
    if kind in ("full", "lora", "bitfit"):
        with pytest.raises(StaleDelta):
            merge(other_base, delta)
    assert logits(apply(other_base, delta, stale_ok=True), batch).shape == (5, 3)


def test_another_tokenizer_or_size_is_refused_even_in_recycling(base, batch):
    _, delta = trained(base, "lora", batch)
    info = delta.info
    encoder = info["encoder"]
    for change, words in (({"tokenizer": "0" * 16, "vocabulary": "0" * 16}, "another tokenizer"),
                          ({"encoder": {**encoder, "num_layers": 9}}, "num_layers 9"),
                          ({"encoder": {"depth": 9}}, "does not hold the sizes"), ({"encoder": None}, "does not hold the sizes"),
                          ({"encoder": {**encoder, "model_type": "bert"}}, "is_bert True")):
        delta.info = info | change
        with pytest.raises(InputError, match=words):
            apply(base, delta, stale_ok=True)
    delta.info = {}
    with pytest.raises(InputError, match="does not hold the sizes"):
        apply(base, delta, stale_ok=True)
    delta.info = info | {"tokenizer": "0" * 16}     # saved in another format, as by transformers: the ids mean the same words
    apply(base, delta, stale_ok=True)
    del info["vocabulary"], encoder["model_type"], encoder["sep_id"]    # a delta from before these were recorded
    delta.info = info
    apply(base, delta)


def test_damaged_folders_are_named(base, batch, tmp_path):
    save_delta(tmp_path / "d", trained(base, "lora", batch)[1])
    with pytest.raises(InputError, match="delta.json: there is no such file"):
        load_delta(tmp_path / "nowhere")
    facts = json.loads((tmp_path / "d" / "delta.json").read_text())
    (tmp_path / "d" / "delta.json").write_text(json.dumps({**facts, "kind": "magic"}))
    with pytest.raises(InputError, match="magic"):
        load_delta(tmp_path / "d")
    (tmp_path / "d" / "delta.json").write_text(json.dumps(facts))
    file = tmp_path / "d" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="delta.safetensors: not a readable safetensors file"):
        load_delta(tmp_path / "d")


@pytest.mark.parametrize("kind, lowest", [("adapter", "embeddings.norm"), ("bitfit", "embeddings.norm"), ("lora", "layers.0.qkv"),
                                          ("prefix", "layers.0.prefix")])
def test_a_frozen_base_has_no_gradient_of_a_weight_nor_below_the_lowest_trained_module(base, batch, kind, lowest):
    model = attach(base, DeltaConfig(kind), 3, seed=0)
    asked = {}
    for i, layer in enumerate(model.encoder.layers):
        layer.register_forward_pre_hook(lambda module, inputs, i=i: asked.update({i: inputs[0].requires_grad}))
    model(batch).sum().backward()
    assert asked == {0: lowest == "embeddings.norm", 1: True}
    trained = [name for name, p in model.encoder.named_parameters() if p.grad is not None]
    assert any(name.startswith(lowest) for name in trained)
    assert all(p.requires_grad == (p.grad is not None) for p in model.encoder.parameters())
    assert not any(name.endswith(("word.weight", "position.weight")) for name in trained)


def test_what_algebra_makes_was_not_trained(base, tmp_path):
    delta = extract(attach(base, DeltaConfig("bitfit"), 2, 0), base, DeltaConfig("bitfit"), {"labels": ["a", "b"]})
    trained = {"mode": "init", "dev": {"accuracy": 0.9}, "test": {}, "step": 5, "seed": 0, "lr": 1e-3, "shots": 4, "argv": ["recycle.py"]}
    delta.info |= trained | {"task": "t"}
    made = 0.5 * delta + 0.5 * delta
    assert not trained.keys() & made.info.keys() and made.info["task"] == "t" and delta.info["step"] == 5
    save_delta(tmp_path / "made", made)
    assert inspect(tmp_path / "made")["learned"] == "not recorded (a sum of deltas, for example)"


def test_deltas_of_other_labels_or_tensors_have_no_sum(base, batch):
    _, lora = trained(base, "lora", batch)
    config = replace(CONFIGS["lora"], target_modules=("query",))
    fewer = extract(attach(base, config, 3, 0), base, config, {"task": "t", "labels": LABELS})
    for other, word in ((replace(lora, info=lora.info | {"labels": ["c", "b", "a"]}), "labels"), (fewer, "tensors")):
        with pytest.raises(InputError, match=f"deltas of different {word}"):
            lora + other
