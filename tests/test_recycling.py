"""The modes: where each starts, what it minimises, what it refuses."""
from dataclasses import replace

import pytest
import torch
from conftest import random_base

from rt.data import Encoded, TaskData
from rt.deltas import apply, attach, extract
from rt.errors import InputError, StaleDelta
from rt.formats.checkpoint import fingerprint
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, TeacherCache, attention, weights_of
from rt.model import Activations, EncoderConfig, new_masked_lm
from rt.recycling import MODES, TRAINED, Recycling, chain, check, new_delta, recycle, start, start_fresh, teacher_model, teacher_of
from rt.speed.multi_run import recycle_together
from rt.transport import Projection
from rt.tune import TuneSettings, evaluate, predict

CPU = dict(device=torch.device("cpu"), precision=torch.float32)


@pytest.fixture
def recycling(tokenizer):
    old, new = random_base(tokenizer, 0), random_base(tokenizer, 1)
    model = attach(old, DeltaConfig("adapter"), 3, seed=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    delta = extract(model, old, DeltaConfig("adapter"), {"task": "t", "labels": ["a", "b", "c"]})
    parts = [Encoded([[0, 9 + i, 30 + i % 7, 2] for i in range(n)], torch.arange(n) % 3, 0) for n in (24, 12, 12)]
    return Recycling(old, delta, new, TaskData("t", ("a", "b", "c"), *parts), DeltaConfig("adapter"),
                     TuneSettings(6, 8, 1e-3, 3, seed=0), DistillConfig(), **CPU)


def test_every_mode_returns_a_model_and_scores_and_leaves_the_bases_alone(recycling):
    recycling.projection = Projection([recycling.old_delta], 2, "auto", False, True, seed=0)
    for mode in MODES.keys() - {"transport", "gradmask"}:        # tests/test_starts.py
        model, result = recycle(recycling, mode)
        assert evaluate(model, recycling.data.test, **CPU) == result.test, mode
        assert result.curve[0][0] == 0 and result.curve[-1][0] == (6 if mode in TRAINED else 0)
    for base in (recycling.old_base, recycling.base):
        assert fingerprint(base.encoder) == base.fingerprint


def test_apply_is_new_base_plus_old_delta(recycling):
    model, _ = recycle(recycling, "apply")
    own = dict(recycling.base.encoder.named_parameters())
    for name, p in model.encoder.named_parameters():
        expected = own[name] + recycling.old_delta.diffs.get(name, 0) if name in own else recycling.old_delta.modules[name]
        torch.testing.assert_close(p, expected)
    assert torch.equal(model.head.out.weight, recycling.old_delta.head["out.weight"])


def test_init_starts_at_apply_and_scratch_at_the_plain_base(recycling, batch):
    with torch.no_grad():
        a, b = start(recycling, "apply").eval(), apply(recycling.base, recycling.old_delta, stale_ok=True).eval()
        assert torch.equal(a(batch), b(batch))
        assert torch.equal(start_fresh(recycling).eval().encoder(batch), recycling.base.encoder(batch))


def test_the_teacher_is_the_old_base_with_the_old_delta_and_runs_once(recycling):
    cache = teacher_of(recycling)
    expected = predict(apply(recycling.old_base, recycling.old_delta), recycling.data.train.sequences, **CPU)
    torch.testing.assert_close(cache.logits, expected, atol=1e-5, rtol=1e-5)
    assert teacher_of(recycling) is cache and teacher_of(replace(recycling, merged=2.0 * recycling.old_delta)) is cache
    other = replace(recycling, old_delta=2.0 * recycling.old_delta)
    assert not torch.allclose(teacher_of(other).logits, cache.logits) and recycling.teacher is cache      # never another teacher's outputs
    few = replace(recycling, data=replace(recycling.data, train=recycling.data.dev))
    assert len(teacher_of(few).logits) == len(recycling.data.dev)
    loss = MODES["distill"].loss(replace(recycling, merged=2.0 * recycling.old_delta, distill=DistillConfig(gamma=1.0, itp=1)))
    for name, weight in weights_of(apply(recycling.old_base, recycling.old_delta)).items():
        assert torch.equal(loss.teacher_model.get_parameter(name), weight)
    assert not any(module.training for module in loss.teacher_model.modules())      # without dropout


def test_distillation_alone_moves_the_student_to_the_teacher(recycling):
    """The teacher is made confident and predicts each label equally often. For five seeds, at most a quarter of the distance was left."""
    recycling.distill = DistillConfig(alpha=1.0, beta=0.0, T=2.0)
    recycling.settings = TuneSettings(100, 8, 1e-2, 100, seed=0)
    train, head = recycling.data.train, recycling.old_delta.head
    said = predict(teacher_model(recycling), train.sequences, **CPU)
    size = 3 / said.std(0)
    head.update({"out.weight": head["out.weight"] * size[:, None], "out.bias": (head["out.bias"] - said.mean(0)) * size})
    teacher = teacher_of(recycling).logits.softmax(-1)
    train.targets = (teacher.argmax(-1) + 1) % 3        # all labels are wrong, but with alpha = 1 they do not count
    recycling.data.dev = Encoded(train.sequences, teacher.argmax(-1), 0)       # the best on dev is the closest to the teacher

    def distance(model):
        return (predict(model, train.sequences, **CPU).softmax(-1) - teacher).abs().mean().item()

    before = distance(start_fresh(recycling))
    model, result = recycle(recycling, "distill")
    assert distance(model) < 0.5 * before
    assert result.best_step == 100 and result.curve[-1][1] > result.curve[0][1]


@pytest.mark.parametrize("att_layers", ["last", "all"])
def test_gamma_brings_the_students_attention_maps_to_the_teachers(recycling, att_layers):
    distill = DistillConfig(alpha=0.0, beta=0.0, T=1.0, att_layers=att_layers)
    recycling.config = DeltaConfig("full")
    batch = recycling.data.train.batch(list(range(12)))

    def divergence(gamma):
        student = start_fresh(recycling)
        loss = Loss(False, teacher_of(recycling), replace(distill, gamma=1.0), teacher_model=teacher_model(recycling))
        for step in range(20):
            student.zero_grad()
            replace(loss, config=replace(distill, gamma=gamma))(student, batch).backward()
            with torch.no_grad():
                for p in student.parameters():
                    p -= 0 if p.grad is None else 0.05 * p.grad
        student(batch, activations := Activations(attention=loss.layers(student)))
        return attention(loss, None, activations, batch).item()

    assert divergence(20.0) < 0.7 * divergence(0.0)
    recycling.distill = replace(distill, gamma=1.0)
    recycle(recycling, "distill")       # and through the mode itself
    recycling.base.encoder.config = EncoderConfig(600, num_layers=3, num_heads=2)
    if att_layers == "all":
        with pytest.raises(InputError, match="`att_layers` all: and layers"):
            recycle(recycling, "distill")


def test_other_labels_get_a_fresh_head_in_init_and_are_refused_elsewhere(recycling):
    for labels in (["b", "a", "c"], ["x", "y", "z"]):       # in another order they are other labels, too
        recycling.old_delta.info["labels"] = labels
        model = start(recycling, "apply")
        assert not torch.equal(model.head.out.weight, recycling.old_delta.head["out.weight"])
        name = next(iter(recycling.old_delta.modules))
        assert torch.equal(dict(model.encoder.named_parameters())[name], recycling.old_delta.modules[name])
    for mode in ("apply", "distill", "init+distill"):
        with pytest.raises(InputError, match="labels"):
            recycle(recycling, mode)


@pytest.mark.parametrize("change, message", [
    ({"mode": "inits"}, "`mode` inits: not one of scratch, apply"), ({"head": "prototypes"}, "`head` prototypes: not one of fresh, "),
    ({"distill": DistillConfig(att_layers="first")}, "`att_layers` first: not one of last, all")])
def test_a_word_that_means_nothing_is_refused(recycling, change, message):
    with pytest.raises(InputError, match=message):
        recycle(replace(recycling, **{k: v for k, v in change.items() if k != "mode"}), change.get("mode", "distill"))


def test_labels_in_another_order_are_the_same_labels(recycling):
    other = replace(recycling, data=replace(recycling.data, labels=("c", "a", "b")))
    for mode in ("apply", "init", "distill"):
        head = start(other, "apply").head if mode != "distill" else teacher_model(other).head
        assert torch.equal(head.out.weight, recycling.old_delta.head["out.weight"][[2, 0, 1]]) and check(other, mode) is None
        assert torch.equal(head.dense.weight, recycling.old_delta.head["dense.weight"])
    stranger = replace(recycling.old_delta, info=recycling.old_delta.info | {"labels": ["x", "y", "z"]})
    with pytest.raises(InputError, match="needs a teacher with the task's labels; the old delta's are x, y, z"):
        check(replace(recycling, old_delta=stranger, merged=recycling.old_delta), "distill")


def test_what_cannot_run_is_refused_before_it_runs(recycling):
    long = Encoded([[0, *[9] * 200, 2]] * 4, torch.arange(4) % 3, 0)
    with pytest.raises(InputError, match="`seq_len` 202: the base has positions for 128 tokens"):
        check(replace(recycling, data=replace(recycling.data, dev=long)), "scratch")
    with pytest.raises(InputError, match="`seq_len` 202"):
        check(replace(recycling, old_train=long), "distill")
    with pytest.raises(InputError, match="apply needs an old delta and its base"):
        check(replace(recycling, old_base=None), "apply")
    check(replace(recycling, old_base=None), "scratch")
    few = Encoded(recycling.data.train.sequences, torch.zeros(24, dtype=torch.long), 0)
    _, result = recycle(replace(recycling, data=replace(recycling.data, train=few), head="prototype"), "scratch")
    assert result.dev["accuracy"] is None       # a mean of no examples is NaN, and no guess at the first class


def test_runs_of_one_seed_start_from_their_own_examples(recycling):
    r = replace(recycling, head="prototype", config=DeltaConfig("bitfit"))
    other = replace(r, data=replace(r.data, train=Encoded([[0, 50 + i, 2] for i in range(24)], torch.arange(24) % 3, 0)))
    for one, (_, model, _) in zip((r, other), recycle_together([r, other], "scratch")):
        torch.testing.assert_close(model(one.data.dev.batch([0, 1])), recycle(one, "scratch")[0](one.data.dev.batch([0, 1])),
                                   atol=1e-4, rtol=1e-3)


def test_init_refuses_another_kind_and_distill_does_not(recycling):
    recycling.config = DeltaConfig("lora")
    with pytest.raises(InputError, match="init continues the old delta .*adapter"):
        recycle(recycling, "init")
    for mode, config in (("distill", recycling.config), ("apply", recycling.old_delta.config)):
        assert new_delta(recycling, mode, recycle(recycling, mode)[0]).config == config


def test_the_old_delta_must_be_of_the_old_base(recycling, tokenizer):
    recycling.old_base = random_base(tokenizer, 5)
    for mode in MODES:
        with pytest.raises(StaleDelta):
            recycle(recycling, mode)


def test_a_teacher_with_another_tokenizer_is_refused(recycling):
    class Other:
        fingerprint = vocabulary = "another"
    recycling.old_base.tokenizer = Other
    recycling.old_delta.info["tokenizer"] = "another"
    with pytest.raises(InputError, match="one vocabulary"):
        recycle(recycling, "distill")


def test_settings_of_other_kinds_do_not_stop_init(recycling):
    recycling.config = DeltaConfig("adapter", r=99, prefix_len=3)
    recycle(recycling, "init")


def test_itp_runs_through_both_modes_and_needs_equal_deltas_and_bases(recycling):
    for mode in ("distill", "init+distill"):
        losses = []
        for itp in (0, 2, 2):
            rows = []
            recycle(replace(recycling, distill=DistillConfig(itp=itp), on_eval=rows.append), mode)
            losses.append([row["loss"] for row in rows])
        assert losses[1] == losses[2] and losses[0][1:] != losses[1][1:]
    recycle(replace(recycling, distill=DistillConfig(itp=2), config=DeltaConfig("lora")), "scratch")       # scratch has no teacher
    with pytest.raises(InputError, match="`itp` draws a line .* weight by weight"):
        recycle(replace(recycling, distill=DistillConfig(itp=2), config=DeltaConfig("lora")), "distill")
    recycling.base.encoder.config = replace(recycling.base.encoder.config, ffn_size=7)
    with pytest.raises(InputError, match="other sizes"):
        recycle(replace(recycling, distill=DistillConfig(itp=2)), "distill")


def test_apply_without_a_test_part_is_scored_on_dev_alone(recycling):
    recycling.data.test = None
    _, result = recycle(recycling, "apply")
    assert result.dev and result.test == {}


def test_project_is_apply_of_the_projected_delta(recycling):
    with pytest.raises(ValueError, match="learn_projection"):
        recycle(recycling, "project")
    recycling.projection = Projection([recycling.old_delta], 2, "flat", True, True, seed=0)
    with torch.no_grad():
        recycling.projection.b[0].fill_(0.05)
    model, result = recycle(recycling, "project")
    assert evaluate(model, recycling.data.test, **CPU) == result.test
    name = next(iter(recycling.old_delta.modules))
    torch.testing.assert_close(dict(model.encoder.named_parameters())[name], recycling.old_delta.modules[name] + 0.05)


@pytest.fixture
def bases(tokenizer):
    return {f"M{seed}": random_base(tokenizer, seed) for seed in (1, 2, 3)}


def test_a_chain_of_apply_is_one_apply(recycling, bases):
    recycling.old_delta = replace(recycling.old_delta, **{
        part: {k: torch.zeros_like(v) for k, v in getattr(recycling.old_delta, part).items()} for part in ("diffs", "modules")})
    for delta, close in ((recycling.old_delta, torch.equal), (None, torch.allclose)):
        steps = {(s.base, s.route): s for s in chain(recycling, "apply", bases)}
        assert list(steps) == [("M1", "direct"), ("M1", "chain"), ("M2", "direct"), ("M2", "chain"), ("M3", "direct"), ("M3", "chain")]
        for name, base in bases.items():
            model = apply(base, recycling.old_delta, stale_ok=True)
            for route in ("direct", "chain"):
                other = apply(base, steps[name, route].delta)       # the delta belongs to this base: not stale
                assert all(close(a, b) for a, b in zip(weights_of(model).values(), weights_of(other).values()))
                assert steps[name, route].result.test == evaluate(model, recycling.data.test, **CPU)
        recycling.old_delta.diffs = {k: torch.full_like(v, 0.01) for k, v in recycling.old_delta.diffs.items()}


@pytest.mark.parametrize("mode", ["init", "init+distill"])
def test_a_chain_recycles_the_recycled_delta_and_direct_the_first(recycling, bases, mode):
    """No label is the one that `apply` on M1 predicts, so anything learned there is better and kept: from then on the routes differ."""
    rows, train = [], recycling.data.train
    train.targets = (predict(apply(bases["M1"], recycling.old_delta, stale_ok=True), train.sequences, **CPU).argmax(-1) + 1) % 3
    recycling.on_eval, recycling.settings.lr, recycling.data.dev = rows.append, 1e-2, train
    recycling.distill = DistillConfig(alpha=0.1, beta=0.0, T=1.0)   # labels count more than a teacher that contradicts them
    steps = {(s.base, s.route): s for s in chain(recycling, mode, bases)}
    old = {"chain": (recycling.old_base, recycling.old_delta), "direct": (recycling.old_base, recycling.old_delta)}
    for name, base in bases.items():
        for route in ("chain", "direct"):
            r = replace(recycling, old_base=old[route][0], old_delta=old[route][1], base=base, teacher=None, on_eval=lambda row: None)
            model, result = recycle(r, mode)
            step, delta = steps[name, route], new_delta(r, mode, model)
            assert (step.result.dev, step.result.test, step.result.curve) == (result.dev, result.test, result.curve)
            assert all(torch.equal(step.delta.modules[k], v) for k, v in delta.modules.items())
            assert [row["step"] for row in rows if (row["base"], row["route"]) == (name, route)] == [0, 3, 6]
            if route == "chain":
                old["chain"] = base, delta
    assert steps["M1", "chain"].result.best_step > 0
    assert any(not torch.equal(v, steps["M3", "direct"].delta.modules[k]) for k, v in steps["M3", "chain"].delta.modules.items())


def test_scratch_in_a_chain_is_one_run_a_base(recycling, bases):
    assert [(s.base, s.route) for s in chain(recycling, "scratch", bases)] == [("M1", None), ("M2", None), ("M3", None)]
    class Other:
        fingerprint = vocabulary = "another"
    bases["M2"].tokenizer = Other
    with pytest.raises(InputError, match="one vocabulary"):
        next(chain(recycling, "scratch", bases))


@pytest.mark.parametrize("mode", ["apply", "init", "distill", "init+distill"])
def test_bases_of_other_sizes_are_refused_before_anything_is_trained(recycling, mode):
    config = replace(recycling.base.encoder.config, num_layers=3)
    wider = replace(recycling.base, encoder=new_masked_lm(config, 0).encoder)
    with pytest.raises(InputError, match="`beta` compares hidden states" if mode == "distill" else "num_layers"):
        check(replace(recycling, base=wider), mode)
    if mode == "distill":
        check(replace(recycling, base=wider, distill=DistillConfig(beta=0.0)), mode)
    check(replace(recycling, base=wider), "scratch")


def test_a_chain_trains_nothing_if_one_of_its_bases_does_not_fit(recycling, bases):
    config, seen = replace(recycling.base.encoder.config, num_layers=3), []
    bases["M3"] = replace(bases["M3"], encoder=new_masked_lm(config, 0).encoder)
    recycling.on_eval = seen.append
    with pytest.raises(InputError, match="num_layers"):
        list(chain(recycling, "init", bases))
    assert not seen


@pytest.mark.parametrize("name", ["merged", "carried", "projection"])
def test_a_chain_has_one_old_delta_as_it_is(recycling, bases, name):
    value = recycling.old_delta if name != "projection" else Projection([recycling.old_delta], 2, "auto", False, True, seed=0)
    with pytest.raises(InputError, match="a chain has one old delta, as it is"):
        next(chain(replace(recycling, **{name: value}), "project" if name == "projection" else "apply", bases))


@pytest.mark.parametrize("part", ["train", "dev", "test", "unlabelled"])
def test_a_text_that_is_too_long_is_refused_in_every_part(recycling, part):
    long = Encoded([[0, *[9] * 200, 2]] * 4, torch.arange(4) % 3, 0)
    r = replace(recycling, unlabelled=long) if part == "unlabelled" else replace(recycling, data=replace(recycling.data, **{part: long}))
    with pytest.raises(InputError, match="`seq_len` 202: the base has positions for 128 tokens"):
        check(r, "scratch")


def test_attention_maps_of_other_numbers_of_heads_are_not_compared(recycling):
    config = replace(recycling.base.encoder.config, num_heads=4)
    other = replace(recycling.base, encoder=new_masked_lm(config, 0).encoder)
    with pytest.raises(InputError, match="the same number of heads"):
        check(replace(recycling, base=other, distill=DistillConfig(gamma=1.0)), "distill")
    check(replace(recycling, base=other), "distill")


def test_hidden_states_of_another_width_are_not_compared(recycling):
    wider = replace(recycling.base, encoder=new_masked_lm(replace(recycling.base.encoder.config, hidden_size=96), 0).encoder)
    with pytest.raises(InputError, match="`beta` compares hidden states"):
        check(replace(recycling, base=wider), "distill")
    check(replace(recycling, base=wider, distill=DistillConfig(beta=0.0)), "distill")


def test_the_bias_of_a_label_moves_with_it(recycling):
    other = replace(recycling, data=replace(recycling.data, labels=("c", "a", "b")))
    assert torch.equal(start(other, "apply").head.out.bias, recycling.old_delta.head["out.bias"][[2, 0, 1]])


def test_a_teacher_is_run_again_for_other_texts(recycling):
    texts = [Encoded([[0, 40 + i + k, 2] for i in range(8)], torch.full((8,), -100), 0) for k in (0, 9)]
    first = replace(recycling, unlabelled=texts[0])
    cache = teacher_of(first)
    assert teacher_of(replace(first)) is cache and not torch.equal(teacher_of(replace(first, unlabelled=texts[1])).logits, cache.logits)


def test_texts_that_are_too_long_for_the_teacher_alone_are_refused(recycling):
    longer = replace(recycling.base, encoder=new_masked_lm(replace(recycling.base.encoder.config, max_len=256), 0).encoder)
    long = Encoded([[0, *[9] * 200, 2]] * 4, torch.full((4,), -100), 0)
    with pytest.raises(InputError, match="`seq_len` 202: the base has positions for 128 tokens"):
        check(replace(recycling, base=longer, unlabelled=long), "distill")


def test_what_goes_on_from_a_run_that_diverged_counts_as_diverged(recycling, bases, monkeypatch):
    def some(r, mode, ends=iter((5, 0, 0, 0, 0))):
        model, result = recycle(r, mode)
        result.diverged = next(ends)
        return model, result

    monkeypatch.setattr("rt.recycling.recycle", some)
    found = {(s.base, s.route): s.result.diverged for s in chain(recycling, "apply", bases)}
    assert found == {(name, route): 5 if route == "chain" or name == "M1" else 0 for name in bases for route in ("direct", "chain")}


def test_terms_that_a_teacher_cannot_serve_are_refused(recycling):
    with pytest.raises(InputError, match="only the student has the maps of `project_patience`"):
        check(replace(recycling, distill=DistillConfig(itp=2, project_patience=True)), "distill")
    answers = replace(recycling, teacher=TeacherCache(torch.zeros(24, 3), None))
    for more in ({"gamma": 1.0}, {"itp": 1}, {"project_patience": True}):
        with pytest.raises(InputError, match="known by its answers"):
            check(replace(answers, distill=DistillConfig(beta=0.0, **more)), "distill")
