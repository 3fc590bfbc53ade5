"""bench.kernels: a full run on the CPU, and the GPU-only parts on stand-ins."""
import json
import math
import os

import pytest
import torch
from conftest import command, here

from bench import cases, kernels, measure, peers, problem, runner, tables, targets, tune
from kernels import configs


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    """Use the CPU even if there is a GPU, which would have other cases."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> tuple[list[dict], str]:
    path = tmp_path_factory.mktemp("bench") / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        printed = command("-m", "bench.kernels", "--quick", "--json", path)
    return [json.loads(line) for line in path.read_text().splitlines()], printed


def test_a_run_has_ours_and_a_peer_for_every_kernel_and_says_where_it_ran(output):
    rows, _ = output
    assert rows[0]["kernel"] == "environment" and rows[0]["torch"] == torch.__version__ and rows[0]["argv"][0] == "--quick"
    assert {r["impl"].split()[0] for r in rows if r["kernel"] == "limits"} == {"matmul", "copy"}
    for kernel in peers.PROBLEMS:
        timed = {r["impl"] for r in rows if r["kernel"] == kernel and "ms" in r}
        assert "ours" in timed and any(name.startswith(("eager", "sdpa")) for name in timed), kernel


def test_ratios_are_quotients_of_ms_and_rates_follow_from_the_work(output):
    rows = [r for r in output[0] if "ms" in r and r["kernel"] != "limits"]
    ours = {(json.dumps(tables.case_of(r)), r["pass"]): r["ms"] for r in rows if r["impl"] == "ours"}
    for r in rows:
        assert r["p20"] <= r["ms"] <= r["p80"] and r["n"] >= 3
        assert r["ratio"] == r["ms"] / ours[json.dumps(tables.case_of(r)), r["pass"]]
    dense = next(r for r in rows if r["kernel"] == "attention" and not r["ragged"] and r["pass"] == "both")
    assert math.isclose(dense["tflops"], 3.5 * 4 * 64**2 * 2 * 64 * 4 / (dense["ms"] * 1e-3) / 1e12)


def test_every_error_is_small_and_every_failure_explained(output):
    rows = output[0]
    checks = [r for r in rows if r.get("pass", "").startswith("check")]
    assert {r["kernel"] for r in checks} == set(peers.PROBLEMS) and not any("ms" in r for r in checks)
    # KL alone is deliberately a small difference of large numbers
    assert all(r["error_l2"] < (1e-3 if "KL only" in r["impl"] else 1e-5) and r["error"] < 1e-3 for r in rows if "error" in r)
    assert not [r for r in rows if "failed" in r and r["impl"] in ("ours", "eager", "reference", "sdpa math")]


def test_tables_have_every_case_and_ratios_first(output):
    rows, printed = output
    assert all(tables.line_of(r) in printed for r in rows if r.get("impl") == "ours")
    assert printed.count("needs a GPU") == len(targets.TARGETS) and "linear_kd / eager fp32" in printed
    assert printed.index("ms / ms of ours") < printed.index("relative error against float64") < printed.index("figures")


def test_bad_flags_are_told():
    assert "attentoin: not one of attention, " in here("-m", "bench.kernels", "--only", "attentoin", code=2)
    assert "--tune needs --json" in here("-m", "bench.kernels", "--tune", code=2)
    assert "--resume needs" in here("-m", "bench.kernels", "--resume", code=2)
    assert "fp8: not one of" in here("-m", "bench.kernels", "--dtype", "fp8", code=2)


# ---------------------------------------------------------------- inputs and formulas

@pytest.mark.parametrize("tokens, longest", [(16384, 128), (16384, 4096), (32768, 512), (256, 64)])
def test_ragged_lengths_would_be_half_padding(tokens, longest):
    lengths = peers.ragged_lengths(tokens, longest)
    assert sum(lengths) == tokens and max(lengths) == longest and min(lengths) >= 2
    assert abs(1 - tokens / (len(lengths) * longest) - 0.5) < 0.02
    assert lengths == peers.ragged_lengths(tokens, longest) and len(set(lengths)) > len(lengths) / 8


def test_flops_of_attention_by_hand():
    flops = peers.attention_flops({"H": 3, "D": 4}, [5, 2])
    assert flops == {"forward": 4 * 29 * 12, "backward": 10 * 29 * 12, "both": 14 * 29 * 12}    # 4 S^2 H D each; 2.5 times that
    assert peers.attention_flops({"H": 12, "D": 64}, [512] * 32)["forward"] == pytest.approx(25.8e9, rel=2e-3)


def test_padding_there_and_back():
    layout = peers.Layout({"tokens": 256, "S": 64, "ragged": True}, torch.device("cpu"))
    x = torch.randn(256, 3, 4)
    assert layout.pad(x).shape == (8, 3, 64, 4) and torch.equal(layout.unpad(layout.pad(x)), x)
    assert torch.equal(layout.cu_seqlens.diff().long(), torch.bincount(layout.document))


def test_float64_inputs_are_the_rounded_ones():
    a, b = (problem.Draws(torch.device("cpu"), torch.bfloat16, exact) for exact in (False, True))
    for name, *arguments in (("normal", 5, 7), ("upstream", 6), ("below", 9, 20), ("near", torch.arange(8.0))):
        assert torch.equal(getattr(a, name)(*arguments).double(), getattr(b, name)(*arguments).double())


def test_errors_see_what_is_wrong():
    truth = torch.tensor([1.0, -4.0])
    assert measure.distance(truth, truth) == (0, 0)
    assert measure.distance(torch.tensor([1.0, -3.0]), truth) == (0.25, pytest.approx(1 / 17**0.5))
    assert all(math.isnan(e) for e in measure.distance(torch.tensor([1.0, math.nan]), truth))
    assert measure.worst([1.0, 3.0, 2.0]) == 3 and math.isnan(measure.worst([1.0, math.nan, 2.0]))
    with pytest.raises(ValueError):
        measure.distance(truth.sum(), truth)


# ---------------------------------------------------------------- cases, targets, tables

def test_the_most_important_cases_come_first_and_all_are_told_apart():
    gpu = cases.cases(True, (), quick=False)
    assert all(c["kernel"] == "attention" and c["S"] == 512 for c in gpu[:8]) and not gpu[0]["ragged"] and not gpu[0]["dropout"]
    assert len({json.dumps(c) for c in gpu}) == len(gpu) == len({tables.label(c) for c in gpu}) <= 60
    grid = {(c["tokens"], c["S"], c["ragged"], c["dropout"]) for c in gpu if c["kernel"] == "attention" and c["D"] == 64}
    assert len(grid) == 2 * 5 * 2 * 2
    quick = cases.cases(True, ("linear_kd", "linear_cross_entropy"), quick=True)
    assert [c["kernel"] for c in quick].count("linear_kd") == [c["kernel"] for c in quick].count("linear_cross_entropy") == 2
    assert all(tables.case_of(c | {"impl": "ours", "ms": 1.0}) == c for c in map(cases.small, gpu))


@pytest.mark.parametrize("value, reached", [(0.89, "missed"), (0.9, "floor"), (1.05, "aim"), (7, "stretch"), (math.nan, "missed")])
def test_levels(value, reached):
    assert targets.reached(value, (0.9, 1.0, 1.1)) == reached


def test_levels_if_one_is_missing():
    assert targets.reached(3.0, (None, 2.0, None)) == "aim" and targets.reached(1.0, (None, 2.0, None)) == "missed"


def row(case: dict, impl: str, ms: float, which: str = "both", **more) -> dict:
    return case | {"impl": impl, "pass": which, "ms": ms} | more


def test_targets_take_the_worst_case_and_the_best_peer():
    one, two = (cases.attention(n, 512) for n in (16384, 32768))
    drop, class_head = cases.attention(16384, 512, dropout=0.1), cases.kd(64, 20)
    big, ce = cases.kd(4096, 50265), cases.linear("linear_kd", 256)
    rows = [{"kernel": "environment", "gpu": "GPU"}, {"kernel": "limits", "impl": "copy", "pass": "both", "gbps": 4000.0},
            *(row(one, name, ms, peak_mb=8.0) for name, ms in (("ours", 2.0), ("sdpa flash", 4.0), ("sdpa cudnn", 3.0))),
            *(row(two, name, ms) for name, ms in (("ours", 4.0), ("sdpa flash", 4.4), ("reference", 0.1), ("flash varlen", 1.0))),
            row(drop, "ours", 2.5), row(big, "ours", 1.0, gbps=3000.0),
            *(row(class_head, name, ms) for name, ms in (("ours", 2.0), ("eager", 8.0), ("ours graph", 0.5), ("eager graph", 1.0))),
            *(ce | {"impl": name, "pass": "check backward", "error_l2": e} for name, e in (
                ("ours KL only", 1e-3), ("eager fp32 gemm KL only", 1e-3), ("ours", 1)))]
    lines = {line[:43].strip(): line[43:].split() for line in targets.targets(rows)}
    assert lines["attention both / flash"] == ["1.10", "2.00", "1.0", "1.2", "1.33", "floor"]
    assert lines["attention both / cuDNN"][:2] == ["1.50", "1.50"] and lines["attention both / cuDNN"][-1] == "stretch"
    assert lines["without dropout / with it"] == ["0.80", "0.80", "-", "0.83", "-", "missed"]
    assert lines["kd_loss, share of copy bandwidth"][0] == "0.75" and lines["kd_loss, share of copy bandwidth"][-1] == "floor"
    assert lines["class-head kd_loss / eager"][0] == "4.00" and lines["class-head kd_loss in a CUDA graph / eager"][-1] == "stretch"
    assert lines["linear_kd gradient error, eager fp32"][-1] == "floor"
    assert lines["ragged both / flash varlen"][-2:] == ["not", "measured"]


def test_a_ratio_stands_beside_the_case_that_it_is_of():
    todo = [cases.kd(64, C) for C in (2, 3)]
    rows = [r | {"against": "ours", "ratio": r["ms"]} for i, case in enumerate(todo)
            for r in (row(case, "ours", 1.0, gbps=5.0), row(case, "eager", 0.5 + i))]
    assert tables.pivot(rows, "kd", tables.ratio)[2:] == ["| R 64 C 2 both | 1 ms | 0.50 |", "| R 64 C 3 both | 1 ms | 1.50 |"]


# ---------------------------------------------------------------- a run, and what a GPU would come to

def bench(path=None, cuda: bool = False, **more) -> kernels.Bench:
    flags = runner.RunFlags(json=path and str(path), quick=True, device="cpu", **{"budget": 60.0} | more)
    run = runner.Run(flags, "bench.kernels", ["--resume"] if flags.resume else [], (torch.float32,))
    run.cuda, run.limits = cuda, lambda: {torch.float32: 1.0}
    return kernels.Bench(run, torch.float32, ("eager",))


@pytest.fixture
def stand_in(monkeypatch) -> None:
    """Enough of torch.cuda to make a run work; tensors stay on the CPU."""
    for name, value in {"synchronize": lambda: None, "reset_peak_memory_stats": lambda: None, "empty_cache": lambda: None,
                        "memory_allocated": lambda: 2**20, "max_memory_allocated": lambda: 3 * 2**20,
                        "get_device_name": lambda *device: "stand-in", "get_device_capability": lambda *device: (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(runner, "environment", lambda *arguments, **more: {"kernel": "environment", "gpu": "stand-in", "argv": []})
    monkeypatch.setattr(runner, "clocks", lambda: {"clocks.sm": "1980"})


@pytest.mark.parametrize("calls", [1, 20])
def test_the_device_waits_for_the_host_before_the_first_event(monkeypatch, calls):
    done = []

    class Event:
        def __init__(self, enable_timing: bool):
            self.record = lambda: done.append("event")

        def elapsed_time(self, end) -> float:
            return 40.0

    for name, value in {"Event": Event, "_sleep": lambda cycles: done.append("spin"), "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *size, device, dtype: torch.zeros(1))
    assert measure.event_times(lambda: done.append("step"), calls, 2) == [40.0 / calls] * 2
    assert done[1:] == [*["spin"] * (calls == 1), "event", *["step"] * calls, "event"] * 2


def test_measuring_with_events_and_memory(stand_in, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(measure, "event_times", lambda step, *more: calls.append((step(), *more)) or [2.0, 1.0, 3.0])
    there = bench(cuda=True)
    there.run.measure_all([cases.kd(16, 3)], there.measure)
    timed = [r for r in there.run.rows if "ms" in r]
    assert {r["impl"] for r in timed} == {"ours", "eager"} and there.run.rows[-1]["clocks.sm"] == "1980"
    assert all((r["ms"], r["p20"], r["p80"], r["n"], r["peak_mb"], r["ratio"]) == (2.0, 1.0, 3.0, 3, 2, 1) for r in timed)
    assert all(many == 20 and 5 <= samples <= 20 for _, many, samples in calls)
    assert all(r["error"] < 1e-5 for r in there.run.rows if "error" in r) and "not measured" in capsys.readouterr().out


def test_a_failing_peer_loses_nothing_else(monkeypatch, tmp_path):
    build = peers.PROBLEMS["kd_loss"]

    def with_faults(*arguments, **more):
        found = build(*arguments, **more)
        found.impls = {"eager missing": lambda: (_ for _ in ()).throw(ImportError("no such library")),
                       "eager wrong": lambda: problem.Impl(lambda s: s.sum() * torch.nan, found.impls["ours"]().leaves)} | found.impls
        return found
    monkeypatch.setitem(peers.PROBLEMS, "kd_loss", with_faults)
    bench(tmp_path / "rows.jsonl").measure(cases.kd(16, 3))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {r["impl"] for r in rows if "no such library" in r.get("failed", "")} == {"eager missing"}
    assert {r["impl"] for r in rows if "ms" in r} == {"ours", "eager", "eager wrong"}
    assert any("failed" in r for r in rows if r["impl"] == "eager wrong" and r["pass"].startswith("check"))     # the wrong shape


def test_a_broken_context_hands_over_to_a_new_process(stand_in, monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("illegal memory access")

    def measure_one(case: dict) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", broken)
        there.run.failed(case | {"impl": "ours", "pass": "both"}, RuntimeError("x"))
    calls = []
    monkeypatch.setattr(runner.subprocess, "call", lambda arguments: calls.append(arguments) or 0)
    there = bench(tmp_path / "rows.jsonl", cuda=True)
    there.run.argv = ["--json", "rows.jsonl"]
    with pytest.raises(SystemExit) as end:
        there.run.measure_all([cases.kd(16, 3)] * 2, measure_one)
    assert end.value.code == 0
    assert len(calls) == 1 and calls[0][1:-1] == ["-m", "bench.kernels", "--json", "rows.jsonl", "--resume", "--budget"]
    assert tables.read(tmp_path / "rows.jsonl")[-1]["failed"] == "RuntimeError: x"


def test_a_budget_that_is_spent_leaves_the_rest_for_resume(tmp_path, capsys, monkeypatch):
    path, todo = tmp_path / "rows.jsonl", [cases.kd(16, 3), cases.kd(8, 5)]
    first = bench(path)
    ticks = iter([False] * 4 + [True] * 99)         # enough for the check and for our implementation
    monkeypatch.setattr(first.run, "late", lambda seconds=0.0: next(ticks))
    first.run.measure_all(todo, first.measure)
    assert "no time was left for kd_loss R 16 C 3: eager; kd_loss R 8 C 5" in capsys.readouterr().err
    second = bench(path, resume=True)
    second.run.measure_all(todo, second.measure)
    rows = tables.read(path)
    assert len([r for r in rows if r.get("impl") == "ours" and r.get("R") == 16 and "ms" in r]) == 3
    assert {(r["R"], r["impl"]) for r in rows if "ms" in r and "R" in r} == {(R, i) for R in (16, 8) for i in ("ours", "eager")}


def test_reference_puts_back_what_it_found(monkeypatch):
    monkeypatch.setenv("RT_KERNELS", "triton")
    with problem.reference():
        assert os.environ["RT_KERNELS"] == "ref"
    assert os.environ["RT_KERNELS"] == "triton"


def test_tuning_writes_what_rt_configs_reads(monkeypatch, tmp_path, capsys):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here; TRITON_INTERPRET=1 interprets them")
    monkeypatch.setenv("RT_KERNELS", "triton")
    monkeypatch.setitem(tune.CANDIDATES, 4, [(0, 32, 4, 1), (32, 32, 4, 1)])       # the first one is impossible
    monkeypatch.setattr(tune, "searches", lambda cuda: [("attention_forward", -32, cases.attention(64, 32, D=32) | {"H": 1}, "forward"),
                                                        ("no such kernel", 32, cases.kd(8, 5), "both")])
    shipped = dict(configs.TABLE["attention_forward"])
    path = tmp_path / "configs.json"
    tune.tune(runner.RunFlags(json=str(path), quick=True), tuple(peers.PROBLEMS), torch.device("cpu"), torch.float32)
    assert "(0, 32, 4, 1): " in capsys.readouterr().out and configs.TABLE["attention_forward"] == shipped
    found = json.loads(path.read_text())
    assert list(found) == ["attention_forward"] and list(found["attention_forward"]) == ["80 -32 32"]
    monkeypatch.setenv("RT_CONFIGS", str(path))
    best = configs.pick("attention_forward", -32, torch.float32, torch.device("cpu"))
    assert list(best) == found["attention_forward"]["80 -32 32"] and best in ((32, 32, 4, 1), shipped[80, -32, 32])


def test_searches_name_rows_that_exist():
    for cuda, arch in ((True, 90), (False, 80)):
        for kernel, size, case, which in tune.searches(cuda):
            assert len(configs.TABLE[kernel][arch, size, 16]) in tune.CANDIDATES and case["kernel"] in peers.PROBLEMS


def test_what_a_kill_cut_off_is_measured_again(tmp_path):
    path, todo = tmp_path / "rows.jsonl", [cases.kd(16, 3)]
    first = bench(path)
    first.run.measure_all(todo, first.measure)
    lines = path.read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"pass": "forward"' in line)
    path.write_text("".join(lines[:cut + 1]))
    second = bench(path, resume=True)
    second.run.measure_all(todo, second.measure)
    times = {(r["impl"], r["pass"]): r.get("ratio") for r in tables.latest(tables.read(path)) if "ms" in r}
    assert len(times) == 6 and None not in times.values()
