"""Runs side by side equal the runs alone."""
import gc
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_base

import rt.model
import rt.optim
import rt.speed.graphs
from rt.data import Encoded, TaskData
from rt.deltas import attach
from rt.errors import InputError
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, Reweighted, TeacherCache, trained_weights
from rt.optim import memory_for
from rt.speed import multi_run as grid
from rt.speed.graphs import CudaGraphs
from rt.speed.multi_run import PAD_SEQUENCES, SideBySide, SideRun, StackedAdamW, side_by_side
from rt.tune import Fit, TuneSettings, plain_gradient, predict, tune

CPU = dict(device=torch.device("cpu"), precision=torch.float32)
FROZEN = ("adapter", "lora", "bitfit", "prefix")


def task(n: int, seed: int) -> TaskData:
    """Ragged examples. Their number is not a multiple of the batch, so the last batch of an epoch is smaller."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for count in (n, n - 3, 5):
        sequences = [[0, *torch.randint(5, 500, (int(m),), generator=g).tolist(), 2] for m in torch.randint(1, 40, (count,), generator=g)]
        parts.append(Encoded(sequences, torch.randint(3, (count,), generator=g), 0))
    return TaskData("t", ("a", "b", "c"), *parts)


def four_runs(tokenizer, kind: str, taught: bool = True) -> list[SideRun]:
    """All that may differ differs: start, examples, their number, seed, learning rate, warm-up, alpha, beta, T, teacher."""
    base = random_base(tokenizer)
    config = DeltaConfig(kind, target_modules=("query", "value", "intermediate.dense"))
    datas = [task(21, 0), task(18, 1)]
    g = torch.Generator().manual_seed(5)
    teachers = [TeacherCache(torch.randn(len(d.train), 3, generator=g), torch.randn(len(d.train), 2, 64, generator=g)) for d in datas]
    runs = []
    for k, (alpha, beta, T, lr, warmup) in enumerate(((.7, 1.0, 5.0, 3e-3, .1), (.9, 0.0, 2.0, 5e-3, .3), (.2, 7.0, 5.0, 1e-3, .1),
                                                      (.0, 2.0, 1.0, 2e-3, .5))):
        loss = Loss(teacher=teachers[k % 2], config=DistillConfig(alpha, beta, T)) if taught else Loss()
        model = attach(base, config, 3, seed=k // 2)
        runs.append(SideRun(model, datas[k % 2], TuneSettings(9, 4, lr, 2, seed=10 + k, weight_decay=0.1, warmup=warmup), loss))
    return runs


def alone(run: SideRun) -> tuple[list[dict], SideRun]:
    """The curve of one run by rt.tune.tune, and its result."""
    rows: list[dict] = []
    model = stack_of_one(run.model)
    result = tune(model, replace(run.data, test=None), run.loss, run.settings, **CPU, on_eval=rows.append)
    return rows, replace(run, result=result, best={k: p.detach() for k, p in trained_weights(model).items()})


def stacked(runs: list[SideRun]) -> Reweighted:
    return SideBySide(runs, graphs=False, **CPU).stacked


def stack_of_one(model):
    return grid.reweighted(model, {k: p.detach().clone() for k, p in trained_weights(model).items()})


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("kind", FROZEN)
def test_four_runs_side_by_side_are_four_runs_alone(tokenizer, kind, taught):
    """Losses of every evaluation agree to 1e-5, the rounding of 9 steps in fp32. The weights that were best on dev agree to 1e-4."""
    runs = four_runs(tokenizer, kind, taught)
    before = [{k: p.detach().clone() for k, p in trained_weights(run.model).items()} for run in runs]
    grid.tune(runs, **CPU)
    for run, start in zip(runs, before):
        own = run.rows
        assert all(torch.equal(p, start[k]) for k, p in trained_weights(run.model).items()), "a start was changed"
        expected, single = alone(run)
        assert [row["step"] for row in own] == [0, 2, 4, 6, 8, 9] and own[0]["loss"] is None
        for ours, theirs in zip(own[1:], expected[1:], strict=True):
            assert abs(ours["loss"] - theirs["loss"]) < 1e-5 * max(1, abs(theirs["loss"]))
            assert ours["dev"] == theirs["dev"]
        assert run.result.best_step == single.result.best_step and run.result.curve == single.result.curve
        for name, weight in single.best.items():
            torch.testing.assert_close(run.best[name], weight, atol=1e-4, rtol=1e-4)
    assert len({run.rows[-1]["loss"] for run in runs}) == 4


@pytest.mark.parametrize("kind", FROZEN)
def test_runs_side_by_side_compute_in_the_precision_of_one(tokenizer, kind, monkeypatch):
    runs, seen, attention = four_runs(tokenizer, kind), set(), rt.model.attention_qkv
    monkeypatch.setattr(rt.model, "attention_qkv", lambda qkv, *given, **more: seen.add(qkv.dtype) or attention(qkv, *given, **more))
    for run in runs:
        run.settings = replace(run.settings, steps=2)
    grid.tune(runs, **CPU | {"precision": torch.bfloat16})
    assert seen == {torch.bfloat16}


def test_a_run_that_stops_early_leaves_the_others_to_themselves(tokenizer):
    runs = four_runs(tokenizer, "adapter")
    for k, run in enumerate(runs):
        run.settings = replace(run.settings, steps=16, early_stop=2 if k % 2 else 0)
    runs[1].settings = replace(runs[1].settings, lr=1e-9)       # nothing gets better
    singles = [alone(run)[1] for run in runs]
    grid.tune(runs, **CPU)
    assert len(runs[1].result.curve) == 3 and len(runs[0].result.curve) == 9
    for run, single in zip(runs, singles):
        assert run.result.curve == single.result.curve


def test_regressions_and_the_public_codes_averaging(tokenizer):
    runs = four_runs(tokenizer, "bitfit")
    for run in runs:
        parts = [replace(part, targets=part.targets.float()) for part in (run.data.train, run.data.dev)]
        run.data = TaskData("t", (), *parts, None)
        cache = replace(run.loss.teacher, logits=run.loss.teacher.logits[:, :1])
        run.loss = replace(run.loss, is_regression=True, config=replace(run.loss.config, public_code=True), teacher=cache)
        run.model = attach(random_base(tokenizer), DeltaConfig("bitfit"), 1, seed=0)
    grid.tune(runs, **CPU)
    for run in runs:
        for ours, theirs in zip(run.rows[1:], alone(run)[0][1:], strict=True):
            assert abs(ours["loss"] - theirs["loss"]) < 1e-4 * max(1, abs(theirs["loss"]))


def test_predictions_side_by_side_are_in_each_runs_order(tokenizer, monkeypatch):
    monkeypatch.setattr(grid, "EVAL_TOKENS", 300)       # several passes; the runs end at different passes
    runs = four_runs(tokenizer, "lora")
    parts = [run.data.dev for run in runs]
    for run, part, logits in zip(runs, parts, grid.predict(stacked(runs), parts, **CPU)):
        torch.testing.assert_close(logits, predict(run.model, part.sequences, **CPU), atol=2e-5, rtol=1e-4)


def test_ranges_are_filled_up_and_shares_sum_to_one():
    data = task(21, 0).train
    batches = [data.batch([0, 1, 2]), data.batch([3]), data.batch([4, 5])]
    batch, shares = side_by_side(batches, bucket=130)
    assert len(batch.ids) == 390 and batch.cu_seqlens[-1] == 390 and batch.max_seqlen == 64
    assert len(batch.cu_seqlens) == 3 * (3 + PAD_SEQUENCES) + 1 and batch.cu_seqlens.diff().min() == 0
    assert shares.shape == (3, 3) and torch.equal(shares.sum(1), torch.ones(3)) and shares[1].tolist() == [1, 0, 0]
    for k, own in enumerate(batches):
        assert torch.equal(batch.ids[k * 130:k * 130 + len(own.ids)], own.ids)
        assert torch.equal(batch.rows[3 * k:3 * k + len(own.index)], own.first + 130 * k)
        assert torch.equal(batch.labels[3 * k:3 * k + len(own.index)], own.labels)


def test_a_run_whose_loss_is_not_finite_leaves_the_others_to_themselves(tokenizer, monkeypatch):
    monkeypatch.setattr(rt.optim, "MOST_SKIPPED", 2)
    runs = four_runs(tokenizer, "adapter")
    runs[2].settings = replace(runs[2].settings, lr=1e30)
    singles = [alone(run)[1] for k, run in enumerate(runs) if k != 2]
    grid.tune(runs, **CPU)
    assert runs[2].result.diverged and runs[2].result.dev and runs[2].result.best_step < runs[2].result.diverged
    assert runs[2].result.skipped > 2 and not runs[0].result.skipped
    assert all(row["loss"] is None or row["loss"] < 1e30 for row in runs[2].rows)
    for run, single in zip((runs[0], runs[1], runs[3]), singles):
        assert run.result.curve == single.result.curve and not run.result.diverged


def test_groups_are_halved_until_they_fit(tokenizer, monkeypatch):
    runs, sizes, real = four_runs(tokenizer, "adapter"), [], grid.tune

    def small_memory(runs, **more):
        sizes.append(len(runs))
        runs[0].rows.append("of a try that failed")
        if len(runs) > 1:
            raise torch.OutOfMemoryError("no room")
        real(runs, **more)

    monkeypatch.setattr(grid, "tune", small_memory)
    done = list(grid.tune_in_groups(runs, 0, **CPU))
    assert sizes == [4, 2, 1, 1, 1, 1] and done == runs and all(len(run.rows) == 6 for run in runs)
    monkeypatch.setattr(grid, "tune", lambda runs, **more: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(InputError, match="not even one run fits"):
        list(grid.tune_in_groups(runs, 0, **CPU))


def test_a_group_is_freed_with_its_last_reference(tokenizer):
    """A collector that comes later would leave the memory of a captured graph to a group that has ended."""
    gc.disable()
    try:
        together = SideBySide(four_runs(tokenizer, "lora"), graphs=False, **CPU)
        together.gradient(0)
        gone = weakref.ref(together), weakref.ref(together.optimizer)
        del together
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_memory_runs_out_in_several_words(error):
    with pytest.raises(InputError, match="a batch did not fit into memory: lower `batch_size`"), memory_for("a batch", "`batch_size`"):
        raise error


def test_interpolation_is_not_done_side_by_side(tokenizer):
    runs = four_runs(tokenizer, "adapter")
    runs[1].loss = replace(runs[1].loss, config=replace(runs[1].loss.config, itp=1), teacher_model=runs[1].model)
    with pytest.raises(ValueError, match="itp"):
        grid.tune(runs, **CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FROZEN)
def test_graphs_of_a_step_are_the_step(tokenizer, device, kind):
    """Four runs side by side, and each run alone, replayed as CUDA graphs: losses equal those without graphs, to 1e-4 in fp32."""
    if device.type == "cpu":
        pytest.skip("CUDA graphs")
    where = dict(device=device, precision=torch.float32)
    curves = []
    for graphs in (False, True):
        runs = four_runs(tokenizer, kind)
        for run in runs:
            run.model.to(device)
            cache = TeacherCache(run.loss.teacher.logits.to(device), run.loss.teacher.states.to(device))
            run.loss = replace(run.loss, teacher=cache)
        grid.tune(runs, **where, graphs=graphs)
        rows: list[dict] = []
        tune(runs[0].model, replace(runs[0].data, test=None), runs[0].loss, runs[0].settings, **where, on_eval=rows.append,
             make_gradient=grid.graphed_gradient if graphs else plain_gradient)
        curves.append([[row["loss"] for row in own[1:]] for own in (*(run.rows for run in runs), rows)])
    for plain, replayed in zip(*curves):
        assert plain == pytest.approx(replayed, rel=1e-4)


def test_graphs_of_all_shapes_share_the_gradients_of_the_first(tokenizer, monkeypatch):
    """With a capture that computes at once and a replay that does nothing: every graph leaves the gradients in the same memory."""
    class Graph:
        pool = replay = lambda self: None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(rt.speed.graphs, "warm_up", lambda *_: None)
    run, gradients = four_runs(tokenizer, "adapter")[0], []
    parameters = [*trained_weights(run.model).values(), torch.nn.Parameter(torch.ones(2))]      # the last one gets no gradient
    plain = plain_gradient(run.model, run.loss, **CPU)
    graphed = CudaGraphs(plain, parameters, CPU["device"])
    for indices in ([0, 1], [2, 3, 4]):
        for p in parameters:
            p.grad = None
        batch = replace(run.data.train.batch(indices), seeds=torch.tensor([1]))
        plain(batch)
        expected = [p.grad for p in parameters[:-1]]
        for p in parameters:
            p.grad = None       # as warm_up leaves them
        graphed(batch)
        assert all(map(torch.equal, expected, (p.grad for p in parameters[:-1]))) and parameters[-1].grad is None
        gradients.append([p.grad for p in parameters[:-1]])
    assert len(graphed.captured) == 2 and all(a is b for a, b in zip(*gradients))


def test_the_stacked_optimizer_is_each_runs_own():
    """Five steps of three runs at their own rates, one of which skips a step that is not finite; then one run leaves."""
    g = torch.Generator().manual_seed(0)

    def random() -> dict:
        return {name: 3 * torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in (("vector", (4,)), ("matrix", (6, 5)))}

    weights = [random() for _ in range(3)]
    together, rates = StackedAdamW(weights, 0.1), (1e-2, 3e-2, 1e-1)
    fits = [Fit({k: v.clone().requires_grad_() for k, v in w.items()}, TuneSettings(5, 2, lr, 5, 0, 0.1)) for w, lr in zip(weights, rates)]
    for step in range(5):
        grads = [random() for _ in fits]
        if step == 2:
            grads[1]["vector"][0] = float("inf")
        together.w.grad = torch.stack([grid.flatten(own) for own in grads])
        losses = torch.ones(len(fits))
        together.step(losses, torch.tensor([fit.s.lr_at(step) for fit in fits]), 1.0)
        for fit, own, loss in zip(fits, grads, losses):
            for k, p in fit.trained.items():
                p.grad = own[k].clone()
            fit.update(step, loss)
        for fit, w in zip(fits, together.w):
            for k, v in grid.unflatten(w, weights[0]).items():
                torch.testing.assert_close(v, fit.trained[k], atol=1e-6, rtol=1e-6)
        if step == 3:
            assert together.tracker.read() == [(1.0, 0, False), (1.0, 1, False), (1.0, 0, False)]
            together.keep([1, 2])
            fits = fits[1:]


def test_full_deltas_and_modes_without_training_do_not_go_together():
    def r(kind, **more):
        return SimpleNamespace(config=DeltaConfig(kind), distill=DistillConfig(**more))
    assert [grid.can_go_together(r(kind), "init") for kind in ("lora", "full")] == [True, False]
    assert [grid.can_go_together(r("lora", itp=1), mode) for mode in ("init", "distill", "apply")] == [True, False, False]


def test_runs_side_by_side_share_the_seconds(tokenizer):
    runs, started = four_runs(tokenizer, "bitfit"), time.perf_counter()
    grid.tune(runs, **CPU)
    assert 0 < sum(run.result.seconds for run in runs) <= time.perf_counter() - started


def test_what_fills_a_range_up_is_no_longer_than_the_longest_sequence():
    data = Encoded([[0, 5, 2]] * 16, torch.zeros(16, dtype=torch.long), 0)
    batch, _ = side_by_side([data.batch([*range(16)]), data.batch([0])])
    assert len(batch.ids) == 96 and batch.cu_seqlens.diff().max() <= batch.max_seqlen == 3


def test_a_part_of_another_shape_adds_to_the_same_gradients_without_a_graph(tokenizer, monkeypatch):
    class Graph:
        pool = replay = lambda self: None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(rt.speed.graphs, "warm_up", lambda *_: None)
    run = four_runs(tokenizer, "adapter")[0]
    parameters, plain = [*trained_weights(run.model).values()], plain_gradient(run.model, run.loss, **CPU)
    batches = [replace(run.data.train.batch(indices), seeds=torch.tensor([1])) for indices in ([0, 1], [2, 3, 4])]
    for batch in batches:
        plain(batch)
    expected = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    graphed = CudaGraphs(plain, parameters, CPU["device"])
    for part, batch in enumerate(batches):
        graphed(batch, part=part)
    assert len(graphed.captured) == 1 and all(map(torch.equal, expected, (p.grad for p in parameters)))


@pytest.mark.parametrize("count, limit, sizes", [(7, 4, [4, 3]), (9, 8, [5, 4])])
def test_groups_are_of_equal_size(count, limit, sizes, monkeypatch):
    found = []
    monkeypatch.setattr(grid, "tune", lambda runs, **more: found.append(len(runs)))
    list(grid.tune_in_groups([*range(count)], limit, **CPU))
    assert found == sizes


@pytest.mark.parametrize("pages, free", [(1000, 2_457_600), (10**9, grid.CPU_BYTES)])
def test_a_group_gets_a_share_of_the_free_memory(pages, free, monkeypatch):
    known = {"SC_AVPHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(grid, "os", SimpleNamespace(sysconf_names=known, sysconf=known.get))
    assert grid.free_bytes(CPU["device"]) == free


def test_the_memory_of_a_run_is_its_moments_and_what_its_batch_keeps(tokenizer):
    run = four_runs(tokenizer, "bitfit")[0]
    small, large = (grid.step_bytes(replace(run, settings=replace(run.settings, batch_size=size)), **CPU) for size in (1, 8))
    assert 20 * sum(p.numel() for p in trained_weights(run.model).values()) < small < large


def test_a_run_shares_the_frozen_weights(tokenizer):
    run = four_runs(tokenizer, "lora")[0]
    for (name, p), q in zip(run.model.named_parameters(), stack_of_one(run.model).parameters(), strict=True):
        assert (p is q) == (not p.requires_grad), name


def test_gradients_are_clipped_at_the_norm_that_the_settings_say(tokenizer):
    fit = Fit({"w": torch.nn.Parameter(torch.ones(4))}, TuneSettings(1, 1, 1e-3, 1, 0, clip=0.5))
    fit.trained["w"].grad = torch.full((4,), 3.0)
    fit.update(0, torch.ones(()))
    assert fit.optimizer.state[fit.trained["w"]]["exp_avg"].norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)
    runs = four_runs(tokenizer, "lora")
    for run in runs:
        run.settings = replace(run.settings, clip=1e-3)
    together = SideBySide(runs, graphs=False, **CPU)
    together.update(0, together.gradient(0))
    assert together.optimizer.m.norm(dim=1).tolist() == pytest.approx([0.1 * 1e-3] * 4, rel=1e-2)
