"""The map of deltas: its formula at both granularities, what it learns, what it refuses."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import random_base

from rt.data import Encoded, TaskData
from rt.deltas import Base, apply, attach, extract
from rt.errors import InputError, StaleDelta
from rt.formats.checkpoint import fingerprint
from rt.kinds import KINDS, DeltaConfig
from rt.losses import DistillConfig, Loss, run_teacher
from rt.model import new_masked_lm
from rt.runs.upgrade import set_dropout
from rt.transport import Projection, check_sources, learn_projection, project, student_weights
from rt.tune import TuneSettings, evaluate, predict, score

CPU = dict(device=torch.device("cpu"), precision=torch.float32)
LOSS = dict(distill=DistillConfig(1.0, 1.0, 2.0), **CPU)


def tuned(base, kind, task, labels=3, seed=0, size=0.1):
    """A delta as after tuning: every trained weight moved at random."""
    model, generator = attach(base, DeltaConfig(kind), labels, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return extract(model, base, DeltaConfig(kind), {"task": task, "labels": [f"{task}{i}" for i in range(labels)]})


def task_of(delta, base, first, n=24):
    """Texts labelled by base + delta, so the right answers are known. The head is set to use all labels."""
    sequences = [[0, *(5 + (first + 7 * i + 11 * j) % 400 for j in range(6)), 2] for i in range(n)]
    logits = predict(apply(base, delta), sequences, **CPU)
    size = 3 / logits.std(0)
    delta.head.update({"out.weight": delta.head["out.weight"] * size[:, None],
                       "out.bias": (delta.head["out.bias"] - logits.mean(0)) * size})
    truth = predict(apply(base, delta), sequences, **CPU).argmax(-1)
    part = Encoded(sequences, truth, 0)
    return TaskData(delta.info["task"], delta.labels, part, part, None)


def same(a, b, close=torch.equal):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_with_no_product_b_alone_is_returned_and_residual_is_apply(base, kind):
    delta, other = tuned(base, kind, "a"), tuned(base, kind, "b", seed=1)
    for granularity in ("flat", "tensor"):
        b_is_w = Projection([delta], 2, granularity, residual=False, with_head=True, seed=0)
        assert same(project(b_is_w, delta), delta) and same(project(b_is_w, other), delta)
        residual = Projection([delta], 2, granularity, residual=True, with_head=True, seed=0)
        assert same(project(residual, other), other)
        mean = project(Projection([delta, other], 2, granularity, False, True, seed=0), delta)
        name = next(iter(delta.head))
        torch.testing.assert_close(mean.head[name], (delta.head[name] + other.head[name]) / 2)
    mapped = project(residual, other)
    assert mapped.info == other.info and mapped.config == other.config
    with pytest.raises(StaleDelta):
        apply(random_base(base.tokenizer, 1), mapped)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_the_map_is_the_formula_with_the_n_by_n_matrix(base, residual, with_head):
    delta, generator = tuned(base, "prefix", "a"), torch.Generator().manual_seed(0)
    for granularity in ("flat", "tensor"):
        projection = Projection([delta], 3, granularity, residual, with_head, seed=0)
        with torch.no_grad():
            for p in projection.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        mapped, tensors = project(projection, delta).tensors(), delta.tensors(with_head)
        if granularity == "flat":
            w, W1, W2, b = torch.cat([v.flatten() for v in tensors.values()]), projection.W1[0], projection.W2[0], projection.b[0]
            assert W1.shape == (len(w), 3) and W2.shape == (3, len(w)) and sum(p.numel() for p in projection.parameters()) == 7 * len(w)
            expected = torch.stack([(w * (W1 @ W2[:, j])).sum() for j in range(40)]) + b[:40] + (w[:40] if residual else 0)
            torch.testing.assert_close(torch.cat([mapped[k].flatten() for k in tensors])[:40], expected, rtol=1e-4, atol=1e-5)
        else:
            for (k, v), W1, W2, b in zip(tensors.items(), projection.W1, projection.W2, projection.b, strict=True):
                matrix = W1 @ W2
                assert matrix.shape == (v.shape[-1],) * 2 and W1.shape[1] == min(3, v.shape[-1])
                expected = torch.einsum("...i,ij->...j", v, matrix) + b.view(v.shape) + (v if residual else 0)
                torch.testing.assert_close(mapped[k], expected, rtol=1e-4, atol=1e-5)
        if not with_head:
            assert all(torch.equal(mapped[f"head.{k}"], v) for k, v in delta.head.items())


def test_auto_is_by_tensors_for_full_and_flat_for_others(base):
    for kind, expected in (("full", "tensor"), ("bitfit", "flat")):
        assert Projection([tuned(base, kind, "a")], 2, "auto", False, False, seed=0).granularity == expected
    with pytest.raises(InputError, match="granularity 'rows': not one of auto, flat, tensor"):
        Projection([tuned(base, "lora", "a")], 2, "rows", False, False, seed=0)


def test_a_map_starts_at_the_sources_scale_from_its_seed(base):
    source = tuned(base, "bitfit", "a")
    W1, again, other = (Projection([source], 64, "flat", False, False, seed).W1[0] for seed in (0, 0, 1))
    assert torch.equal(W1, again) and not torch.equal(W1, other)
    w = torch.cat([v.flatten() for v in source.diffs.values()])
    assert (w @ W1).square().mean().item() == pytest.approx(1.0, rel=0.9)      # the mean of 64 squares, five standard errors


def test_sources_take_turns_and_each_reads_all_its_examples(base, other_base):
    deltas, read = [tuned(base, "bitfit", "ab"[i], seed=i) for i in (0, 1)], []
    learn_projection(base, other_base, [(delta, task_of(delta, base, 0)) for delta in deltas], TuneSettings(4, 12, 1e-3, 4, 0), r=2,
                     granularity="auto", residual=False, on_step=lambda batch: read.append(batch.index.tolist()), **LOSS)
    assert all(sorted(read[i] + read[i + 2]) == [*range(24)] for i in (0, 1))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_student_is_the_new_base_with_the_projected_delta_and_gradients_reach_the_map(base, other_base, batch, kind):
    delta = tuned(base, kind, "a")
    projection = Projection([delta], 2, "auto", False, True, seed=0)
    with torch.no_grad():
        for p in projection.W2:
            p.copy_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    weights = student_weights({k: p.detach() for k, p in other_base.encoder.named_parameters()}, delta, projection)
    expected = dict(apply(other_base, project(projection, delta), stale_ok=True).named_parameters())
    for k, v in weights.items():
        torch.testing.assert_close(v, expected[k])
    sum(v.square().sum() for v in weights.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projection.parameters())


def shifted(base, size):
    """A base whose biases differ from those of `base` by known vectors. A delta of biases can compensate for this exactly."""
    model, generator = new_masked_lm(base.encoder.config, 0), torch.Generator().manual_seed(7)
    model.encoder.load_state_dict(base.encoder.state_dict())
    with torch.no_grad():
        for name, p in model.encoder.named_parameters():
            if name.endswith(".bias"):
                p.sub_(size * torch.randn(p.shape, generator=generator))
    return Base(model.encoder.eval(), None, base.tokenizer, {}, fingerprint(model.encoder))


def without_dropout(base):
    """Known answers: without dropout, the loss of a step is the loss itself."""
    set_dropout(base.encoder, 0.0)
    base.encoder.config = replace(base.encoder.config, dropout=0.0, attention_dropout=0.0)      # for the heads
    return base


def kl(teacher, student):
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean().item()


def test_the_shift_as_b_makes_up_for_the_upgrade_whatever_the_delta(base):
    """The closed form w' = w + (old biases - new biases), residual with W2 = 0, turns new base + delta into old base + delta."""
    new, delta, own = shifted(base, 0.3), tuned(base, "bitfit", "a", labels=5), dict(base.encoder.named_parameters())
    projection = Projection([delta], 4, "flat", residual=True, with_head=False, seed=0)
    with torch.no_grad():
        projection.b[0].copy_(torch.cat([(own[k] - new.encoder.get_parameter(k)).flatten() for k in delta.diffs]))
    sequences = task_of(delta, base, 0).train.sequences
    teacher, before, after = (predict(model, sequences, **CPU) for model in (
        apply(base, delta), apply(new, delta, stale_ok=True), apply(new, project(projection, delta), stale_ok=True)))
    torch.testing.assert_close(after, teacher, rtol=1e-4, atol=1e-4)
    assert kl(teacher, before) > 0.1


def alike(base, task, labels, seed, own):
    """A delta of weights shared by all tasks (drawn from `seed`), plus a tenth as much of its own."""
    common, mine = tuned(base, "bitfit", task, labels, seed), tuned(base, "bitfit", task, labels, own, size=0.01)
    return replace(mine, diffs={k: v + common.diffs[k] for k, v in mine.diffs.items()})


def test_a_map_learned_on_two_tasks_makes_up_for_the_upgrade_on_a_third(base):
    """All tasks need the same correction w' = w + shift, so a map learned on some tasks works on another: the sources' 64 labels use all of
    a hidden state. On twelve other seeds, .001 to .08 of the divergence from the teacher on the third task was left (logarithm -4.3,
    standard deviation 1.2), and .41 +- .17 more answers were right. A mean of five is more than four standard errors clear."""
    falls, gains = [], []
    for seed in range(5):
        base = without_dropout(random_base(base.tokenizer, seed))
        new = shifted(base, 0.1)
        deltas = [alike(base, *task, seed, 100 * (seed + 1) + i) for i, task in enumerate((("a", 64), ("b", 64), ("c", 4)))]
        datas, rows = [task_of(delta, base, 40 * i, n=96) for i, delta in enumerate(deltas)], []
        projection = learn_projection(base, new, list(zip(deltas[:2], datas[:2])), TuneSettings(160, 24, 5e-3, 40, seed=seed),
                                      DistillConfig(1.0, 10.0, 2.0), r=4, granularity="flat", residual=True, on_eval=rows.append, **CPU)
        assert [row["step"] for row in rows] == [0, 40, 80, 120, 160] and rows[-1]["loss"] < 0.2 * rows[1]["loss"]
        assert set(rows[0]["dev"]) == {"mean", "a", "b"}
        best = max(rows, key=lambda row: score(row["dev"]))
        assert (projection.best_step, projection.dev) == (best["step"], best["dev"])
        assert projection.dev["mean"] > rows[0]["dev"]["mean"] + 0.3
        unseen, data = deltas[2], datas[2]
        teacher = predict(apply(base, unseen), data.train.sequences, **CPU)
        before, after = (predict(apply(new, delta, stale_ok=True), data.train.sequences, **CPU)
                         for delta in (unseen, project(projection, unseen)))
        falls.append(math.log(kl(teacher, after) / kl(teacher, before)))
        right = [(logits.argmax(-1) == data.dev.targets).float().mean().item() for logits in (before, after)]
        gains.append(right[1] - right[0])
        for b in (base, new):
            assert fingerprint(b.encoder) == b.fingerprint
    assert sum(falls) / 5 < math.log(0.25) and sum(gains) / 5 > 0.1, (falls, gains)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_first_loss_is_that_of_apply_and_runs_repeat(base, other_base, kind):
    delta = tuned(base, kind, "a")
    data, student = task_of(delta, base, 0), apply(other_base, delta, stale_ok=True)
    said = predict(student, data.dev.sequences, **CPU).argmax(-1)
    data, starts, rows = replace(data, dev=replace(data.dev, targets=(said + 1) % 3)), [], []      # none is right on dev
    for _ in range(2):
        projection = learn_projection(base, other_base, [(delta, data)], TuneSettings(1, 24, 1e-3, 1, seed=3), r=2, granularity="auto",
                                      residual=False, with_head=True, on_eval=rows.append, **LOSS)
        starts.append(project(projection, delta))
    assert same(*starts) and rows[:2] == rows[2:]
    assert rows[0]["dev"]["a"] == 0 < score(evaluate(student, data.train, **CPU))
    for model in (base, other_base):
        assert fingerprint(model.encoder) == model.fingerprint
    learn_projection(without_dropout(base), without_dropout(other_base), [(delta, data)], TuneSettings(1, 24, 1e-3, 1, seed=3), r=2,
                     granularity="auto", residual=False, with_head=True, on_eval=rows.append, **LOSS)
    cache = run_teacher(apply(base, delta), data.train, **CPU)
    plain = Loss(teacher=cache, config=DistillConfig(1.0, 1.0, 2.0))(student.eval(), data.train.batch(list(range(24)))).item()
    assert rows[-1]["loss"] == pytest.approx(plain, rel=1e-5) and rows[1]["loss"] != pytest.approx(plain, rel=1e-5)


def test_what_does_not_fit_is_one_sentence(base, other_base, tokenizer):
    delta, settings = tuned(base, "lora", "a"), TuneSettings(1, 8, 1e-3, 1, seed=0)
    data = task_of(delta, base, 0)
    rest = dict(r=2, granularity="auto", residual=False, **LOSS)
    with pytest.raises(InputError, match="deltas of one kind and size"):
        learn_projection(base, other_base, [(delta, data), (tuned(base, "bitfit", "b"), replace(data, labels=("b0", "b1", "b2")))],
                         settings, **rest)
    with pytest.raises(InputError, match="other labels than the source task"):
        learn_projection(base, other_base, [(delta, replace(data, labels=("x", "y", "z")))], settings, **rest)
    with pytest.raises(StaleDelta):
        learn_projection(other_base, base, [(delta, data)], settings, **rest)
    with pytest.raises(InputError, match="use deltas of one kind, base and size"):
        project(Projection([delta], 2, "auto", False, False, seed=0), tuned(base, "bitfit", "b"))
    with pytest.raises(InputError, match="use deltas of one kind, base and size"):      # heads of other sizes, if heads are mapped
        project(Projection([delta], 2, "auto", False, True, seed=0), tuned(base, "lora", "b", labels=5))
    with pytest.raises(InputError, match="more than 10 steps in a row before step 13 .*: lower `lr`"):
        rest["distill"] = DistillConfig(1.0, float("nan"), 2.0)
        learn_projection(base, other_base, [(delta, data)], replace(settings, steps=20, eval_every=4), **rest)


def test_the_mean_of_a_score_that_is_undefined_is_undefined(base, other_base, monkeypatch):
    found, rows = iter([None, 0.5, 0.5, 0.5, 0.5, None]), []
    sources = [(delta, task_of(delta, base, 0)) for delta in (tuned(base, "bitfit", "a", seed=i) for i in (0, 1))]     # of one name
    monkeypatch.setattr("rt.transport.evaluate", lambda *_: {"pearson": next(found)})
    projection = learn_projection(base, other_base, sources, TuneSettings(2, 8, 1e-3, 1, 0), r=2, granularity="auto", residual=False,
                                  on_eval=rows.append, **LOSS)
    assert [row["dev"]["mean"] for row in rows] == [None, 0.5, None] and projection.best_step == 1


def test_a_map_is_learned_without_attention_maps_and_interpolation(base, other_base):
    delta = tuned(base, "bitfit", "a")
    sources, losses = [(delta, task_of(delta, base, 0))], []
    for more in ({}, {"gamma": 3.0, "itp": 2}):
        rows: list[dict] = []
        learn_projection(base, other_base, sources, TuneSettings(2, 8, 1e-3, 2, 0), DistillConfig(1.0, 1.0, 2.0, **more), r=2,
                         granularity="flat", residual=True, on_eval=rows.append, **CPU)
        losses.append(rows)
    assert losses[0] == losses[1]


def test_the_target_of_a_map_has_the_sources_kind(base, other_base):
    delta = tuned(base, "lora", "a")
    data = task_of(delta, base, 0)
    check_sources(base, other_base, [(delta, data)], tuned(base, "lora", "b"))
    with pytest.raises(InputError, match="deltas of one kind and size"):
        check_sources(base, other_base, [(delta, data)], tuned(base, "bitfit", "b"))


def test_sources_that_are_zero_have_a_finite_map(base):
    zero = 0.0 * tuned(base, "bitfit", "a")
    mapped = project(Projection([zero], 2, "tensor", residual=True, with_head=True, seed=0), tuned(base, "bitfit", "b", seed=1))
    assert all(v.isfinite().all() for v in mapped.tensors().values())


def test_the_score_of_a_map_is_the_mean_over_its_sources(base, other_base, monkeypatch):
    found, rows = iter([0.2, 0.6, 0.5, 0.1]), []
    sources = [(delta, task_of(delta, base, 0)) for delta in (tuned(base, "bitfit", "ab"[i], seed=i) for i in (0, 1))]
    monkeypatch.setattr("rt.transport.evaluate", lambda *_: {"accuracy": next(found)})
    learn_projection(base, other_base, sources, TuneSettings(1, 8, 1e-3, 1, 0), r=2, granularity="flat", residual=True,
                     on_eval=rows.append, **LOSS)
    assert [row["dev"]["mean"] for row in rows] == pytest.approx([0.4, 0.3])


def test_a_map_to_a_base_of_other_sizes_is_refused(base):
    model = new_masked_lm(replace(base.encoder.config, ffn_size=32), 0)
    other, delta = Base(model.encoder.eval(), None, base.tokenizer, {}, fingerprint(model.encoder)), tuned(base, "bitfit", "a")
    with pytest.raises(InputError, match="other sizes: ffn_size"):
        check_sources(base, other, [(delta, task_of(delta, base, 0))])
