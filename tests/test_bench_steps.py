"""bench.train and bench.recycle: quick full runs, and their rows checked by hand."""
import contextlib
import io
import json
import math
import time
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import command

from bench import recycle, runner, steps, tables, train
from bench.roberta import masked_lm_losses, padded_inputs, peer
from bench.tables import read
from rt.errors import InputError
from rt.model import EncoderConfig

pytest.importorskip("transformers")
QUICK = ("--quick", "--device", "cpu")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, tuple[list[dict], str]]:
    """{script: (rows, printed text)}"""
    folder = tmp_path_factory.mktemp("steps")
    printed = {"train": io.StringIO(), "recycle": io.StringIO()}
    for script, said in zip((train, recycle), printed.values()):
        name = script.__name__
        with contextlib.redirect_stdout(said):
            steps.main(script.Config, name, script.PROBLEMS, script.cases, [*QUICK, "--dropouts", "0.1", "--json", str(folder / name[6:])])
    return {name: ([json.loads(line) for line in (folder / name).read_text().splitlines()], said.getvalue())
            for name, said in printed.items()}


@pytest.fixture(params=["train", "recycle"])
def rows(outputs, request) -> list[dict]:
    return outputs[request.param][0]


def timed(rows: list[dict], **where) -> dict[str, dict]:
    return {r["impl"]: r for r in rows if "bench" in r and "ms" in r and where.items() <= r.items()}


# ---------------------------------------------------------------- rows

def test_a_run_says_where_it_was_and_loses_no_implementation(rows):
    assert rows[0]["kernel"] == "environment" and rows[0]["transformers"] and "--quick" in rows[0]["argv"]
    limits = [r for r in rows if r.get("kernel") == "limits"]
    products = [r for r in limits if r["impl"] != "copy"]
    assert products and all(math.isclose(r["tflops"], 2 * int(r["impl"].split()[1])**3 / r["fastest"] / 1e9) for r in products)
    assert len(limits) == len(products) + 1 and all(r["fastest"] <= r["ms"] for r in limits)
    assert not [r for r in rows if "failed" in r and not r["impl"].startswith("peft")]
    for r in rows[1:]:
        if "bench" in r:
            built = set() if "failed" in r else {"padded_tokens"}      # peft may not be installed
            assert {"case", "size", "dropout", "impl", "dtype", "device", "threads", "torch", "commit", *built} <= r.keys()


def test_ratios_are_quotients_of_ms(rows):
    cases = {json.dumps(tables.case_of(r)) for r in rows if "bench" in r}
    assert len(cases) == (2 if rows[0]["script"] == "bench.train" else 8)
    for r in (r for r in rows if "bench" in r and "ms" in r):
        other = next(o for o in rows if o.get("impl") == r["against"] and tables.case_of(o) == tables.case_of(r))
        assert r["ratio"] == r["ms"] / other["ms"] and r["ratio_p20"] <= r["ratio_p80"]
        assert r["p20"] <= r["ms"] <= r["p80"] and r["n"] == 3
        assert math.isclose(r["tokens_per_s"], 1e3 * r["tokens"] / r["ms"]) and r["tokens"] <= r["padded_tokens"]
        assert r["saved_mb"] > 0 and r["grads_mb"] > 0 and math.isclose(r["state_mb"], 2 * r["grads_mb"], rel_tol=0.01)


def test_peers_compute_the_same_and_are_not_one_another(outputs):
    rows = outputs["train"][0]
    dense, ragged = timed(rows, case="dense"), timed(rows, case="ragged")
    assert {"ours", "ours one sequence a row", "hf", "hf predicted rows", "hf eager"} <= dense.keys() and {"ours", "hf"} <= ragged.keys()
    for r in (*dense.values(), *ragged.values()):
        assert abs(r["loss"] - r["loss_peer"]) < 1e-4 * r["loss"]
    # scores of all tokens against scores of 30 %; with padding against without; half of the batch is padding
    assert dense["hf"]["saved_mb"] > 1.5 * dense["hf predicted rows"]["saved_mb"]
    assert ragged["hf"]["saved_mb"] > 1.3 * ragged["ours"]["saved_mb"]
    assert ragged["ours"]["padded_tokens"] == 2 * ragged["ours"]["tokens"]


def test_flops_and_mfu_by_hand(outputs):
    rows = outputs["train"][0]
    plain = timed(rows, case="dense")["hf predicted rows"]          # tiny: d 64, 2 layers, ffn 128; 8 sequences of 32; 77 predicted
    forward = 2 * (2 * 256 * (4 * 64 * 64 + 2 * 64 * 128) + 4 * 64 * 8 * 32**2) + 2 * 77 * (64 * 64 + 64 * 8192)
    assert plain["predicted"] == 77 and math.isclose(plain["tflop"], 3 * forward / 1e12)
    rate = max(r["tflops"] for r in rows if r.get("kernel") == "limits" and r["impl"].endswith(plain["dtype"]))
    assert math.isclose(plain["mfu"], plain["tflop"] / rate / (plain["ms"] / 1e3))


def test_frozen_kinds_keep_less(outputs):
    found = timed(outputs["recycle"][0], case="frozen", sequences=8)
    assert found.keys() == {"full", "adapter", "lora", "bitfit", "prefix"}
    assert all(r["grads_mb"] < 0.1 * found["full"]["grads_mb"] for kind, r in found.items() if kind != "full")
    assert timed(outputs["recycle"][0], case="distill", delta="adapter", sequences=4).keys() == {"plain", "distill"}


def test_peft_has_our_loss(outputs):
    if find_spec("peft") is None:
        pytest.skip("no PEFT")
    found = timed(outputs["recycle"][0], case="peft", sequences=4)
    assert {"ours", "peft", "peft eager"} <= found.keys() and abs(found["ours"]["loss"] - found["ours"]["loss_peer"]) < 1e-4
    assert found["ours"]["grads_mb"] == pytest.approx(found["peft"]["grads_mb"], rel=0.01)      # both train the same number of weights


# ---------------------------------------------------------------- tables and flags

def test_the_table_of_a_file_is_what_was_printed(outputs, tmp_path, capsys):
    for name, (rows, printed) in outputs.items():
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"half a ro')
        steps.main(train.Config, f"bench.{name}", {}, None, ["--table", str(tmp_path / name)])
        assert capsys.readouterr().out == printed
        assert printed.index("ms / ms of") < printed.index("figures")
        assert all(len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1 for block in printed.split("\n\n"))


@pytest.mark.parametrize("flags, told", [
    (("--sizes", "huge"), "huge: not one of"), (("--only", "sparse"), "sparse: not one of dense"), (("--resume",), "--json"),
    (("--dropouts", "1"), "below 1"), (("--table", "no such file"), "no such file"), (("--budget", "0"), "above zero")])
def test_bad_flags_are_told(flags, told):
    with pytest.raises(InputError, match=told):
        steps.main(train.Config, "bench.train", train.PROBLEMS, train.cases, [*QUICK, *flags])


def test_a_usage_error_ends_with_2():
    assert "not one of" in command("-m", "bench.recycle", "--only", "grid", code=2)


def test_what_failed_once_and_then_ran_has_run():
    case = {"bench": "train", "case": "dense", "size": "tiny"}
    ran, failed = case | {"impl": "ours", "ms": 1.0}, case | {"impl": "ours", "failed": "no"}
    assert tables.latest([failed, ran]) == tables.latest([ran, failed]) == [ran]


# ---------------------------------------------------------------- a run, in this process

def step(name: str = "", seconds: float = 0.0):
    """A problem's implementation that does nothing, or fails."""
    if name == "broken":
        raise RuntimeError("cannot be built")
    return lambda: time.sleep(seconds)


def made_up(names: tuple[str, ...]):
    def problem(case: dict, where: steps.Platform) -> steps.Problem:
        if case["size"] == "wrong":
            steps.agreement(1.0, 1.001)
        return steps.Problem({n: steps.Impl(partial(step, n, 1e-3), torch.float32, 1e9) for n in names}, case["tokens"])
    return {"dense": problem}


def cases_of(*sizes: str) -> list[dict]:
    return [{"bench": "train", "case": "dense", "size": size, "tokens": 8} for size in sizes]


def bench(tmp_path, names=("ours", "broken", "hf"), **flags) -> steps.Bench:
    run = runner.RunFlags(json=str(tmp_path / "rows.jsonl"), device="cpu", quick=True, **flags)
    return steps.start(train.Config(run=run), "bench.train", ["--resume"] if run.resume else [], made_up(names))


def measured(here: steps.Bench, todo: list[dict]) -> list[dict]:
    """The rows of a run over these cases."""
    here.run.measure_all(todo, here.measure)
    return here.run.rows


def test_what_fails_is_a_row_and_the_rest_is_timed(tmp_path):
    measured(bench(tmp_path), cases_of("tiny", "wrong"))
    rows = [r for r in read(tmp_path / "rows.jsonl") if "bench" in r]
    assert {r["impl"]: "ms" in r for r in rows if r["size"] == "tiny"} == {"ours": True, "broken": False, "hf": True}
    assert "cannot be built" in next(r["failed"] for r in rows if r["impl"] == "broken")
    assert [r.get("failed", "")[:40] for r in rows if r["size"] == "wrong"] == ["ValueError: of the same weights our loss"]
    assert "failed: dense tiny tokens 8, broken: RuntimeError" in tables.tables(rows)


def test_compiled_ones_come_last_and_alone_so_that_a_run_that_is_cut_off_keeps_the_rest(tmp_path, monkeypatch):
    names, turns = ("ours", "ours +compile", "hf", "hf +compile"), []
    monkeypatch.setattr(steps, "in_turns", lambda given, *arguments: turns.append([*given]) or {name: [2.0] for name in given})
    here = bench(tmp_path, names)
    monkeypatch.setattr(here.run, "late", lambda seconds=0.0: len(turns) == 2)
    measured(here, cases_of("tiny"))
    assert turns == [["ours", "hf"], ["ours", "ours +compile"]] and here.run.left == ["dense tiny tokens 8: hf +compile"]
    rows = measured(bench(tmp_path, names, resume=True), cases_of("tiny"))
    assert turns[2:] == [["ours", "hf +compile"]] and sorted(r["impl"] for r in rows if "ms" in r and "bench" in r) == sorted(names)


def test_without_the_one_that_is_held_against_there_is_no_ratio(tmp_path):
    rows = measured(bench(tmp_path, names=("hf",)), cases_of("tiny"))
    assert "ratio" not in timed(rows)["hf"] and "hf" in tables.tables(rows)


def test_resuming_repeats_no_case(tmp_path):
    measured(bench(tmp_path), cases_of("tiny"))
    measured(bench(tmp_path, resume=True), cases_of("tiny", "mini"))
    rows = [(r["size"], r["impl"]) for r in read(tmp_path / "rows.jsonl") if "bench" in r]
    assert sorted(rows) == sorted((size, impl) for size in ("tiny", "mini") for impl in ("ours", "broken", "hf"))


def test_a_case_that_would_end_too_late_is_left(tmp_path, capsys):
    here = bench(tmp_path, budget=52.0)
    here.run.longest = 5.0
    here.run.measure_all(cases_of("tiny", "mini", "small"), lambda case: setattr(here.run, "deadline", here.run.deadline - 50))
    assert "no time was left for dense mini tokens 8; dense small tokens 8" in capsys.readouterr().err


def test_what_broke_the_context_is_left_out_by_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (_ for _ in ()).throw(RuntimeError("illegal memory access")))
    monkeypatch.setattr(runner, "environment", lambda *arguments, **more: {"kernel": "environment", "argv": []})
    monkeypatch.setattr(runner.subprocess, "call", lambda arguments: 0)
    here = bench(tmp_path)
    monkeypatch.setattr(here.run, "limits", lambda: {torch.float32: 1.0})
    here.run.cuda = True
    here.built = lambda case, impls: here.run.failed(case | {"impl": "hf"}, RuntimeError("illegal memory access"))
    with pytest.raises(SystemExit) as end:
        here.run.measure_all(cases_of("tiny", "mini"), here.measure)
    assert end.value.code == 0
    assert timed(measured(bench(tmp_path, resume=True), cases_of("tiny"))).keys() == {"ours"}


def test_what_failed_is_not_built_again_for_the_others(tmp_path):
    names = ("broken", "hf", "hf +compile")
    here = bench(tmp_path, names)
    here.problems = {"dense": lambda case, where: steps.Problem(made_up(names)["dense"](case, where).impls, case["tokens"], "broken")}
    rows = [r for r in measured(here, cases_of("tiny")) if "bench" in r]
    assert [(r["impl"], "ms" in r) for r in rows] == [("broken", False), ("hf", True), ("hf +compile", True)]


def test_implementations_take_turns_and_short_steps_are_timed_in_rows(monkeypatch):
    log = []
    monkeypatch.setattr(steps, "sample", lambda step, cuda, calls=1: log.append((step, calls)) or 20.0)
    times = steps.in_turns({name: name for name in "abc"}, cuda=True, quick=False, seconds=0.0)
    assert all(len(own) == 5 for own in times.values())
    rounds = [log[i:i + 3] for i in range(3, len(log), 3)]
    assert len(rounds) == 5 and all({s for s, _ in r} == set("abc") and {calls for _, calls in r} == {3} for r in rounds)
    assert len({tuple(s for s, _ in r) for r in rounds}) > 1


def test_the_machine_is_as_fast_as_its_best_sample_of_any_size(tmp_path, monkeypatch):
    samples = iter([9.0, *[4.0] * 19, 2.0, 9.0, *[64.0] * 19, 32.0, 9.0, *[1.0] * 20])     # warm-up and samples of 128, of 256, of a copy
    monkeypatch.setattr(runner, "sample", lambda step, cuda, calls=1: next(samples))
    here = bench(tmp_path).run
    here.dtypes = (torch.float32,)
    assert here.limits() == {torch.float32: pytest.approx(2 * 128**3 / 2e-3)}
    assert [(r["fastest"], r["ms"]) for r in here.rows] == [(2.0, 4.0), (32.0, 64.0), (1.0, 1.0)]


def test_ratios_of_rounds():
    found = steps.statistics_of({"ours": [1.0, 2.0, 4.0], "hf": [3.0, 4.0, 4.0]}, "ours")
    assert found["hf"]["ratio"] == 2.0 and (found["hf"]["ratio_p20"], found["hf"]["ratio_p80"]) == (1.0, 3.0)
    assert (found["hf"]["p20"], found["hf"]["p80"]) == (3.0, 4.0) and found["ours"]["ratio"] == 1.0


# ---------------------------------------------------------------- steps, batches

def test_a_step_trains_and_memory_is_every_storage_once():
    model, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    here = steps.Step(model, lambda: (y := model(x)).square().sum() + y.sin().sum(), torch.float32)
    before = model.weight.clone()
    here()
    assert not torch.equal(model.weight, before) and model.weight.grad is None
    kept = here.memory()        # x and y, y twice; the weight is in memory anyway
    assert {k: v * 2**20 for k, v in kept.items()} == {"saved_mb": 4 * (5 * 4 + 5 * 3), "grads_mb": 4 * 15, "state_mb": 4 * (2 * 15 + 2)}


def test_compilation_that_fails_is_told(monkeypatch, tmp_path):
    def no(*arguments, **more):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", no)
    c = train.Config(("ragged",), runner.RunFlags(device="cpu", quick=True), steps.StepFlags(compile=True, dropouts=(0.0,)))
    rows = measured(steps.start(c, "bench.train", [], train.PROBLEMS), train.cases(c, cuda=False))
    failed = {r["impl"] for r in rows if "no compiler" in r.get("failed", "")}
    assert failed == {"ours +compile", "hf +compile"} and {"ours", "hf"} <= timed(rows).keys()


@pytest.mark.parametrize("tokens, S", [(1024, 128), (2048, 128), (64, 16), (16384, 512), (4096, 512)])
def test_uneven_lengths_are_half_padding(tokens, S):
    lengths = train.uneven({"tokens": tokens, "S": S})
    assert sum(lengths) == tokens and min(lengths) >= 2 and max(lengths) == S and lengths == sorted(lengths)
    assert abs(1 - tokens / (len(lengths) * S) - 0.5) < 0.02


def test_packed_rows_hold_several_documents_and_as_many_predictions():
    config = EncoderConfig(100)
    packed, one = train.packed_batch(config, 2048, 64), train.masked_batch(config, [64] * 32)
    assert len(packed.ids) == len(one.ids) == 2048 and abs(len(packed.labels) - len(one.labels)) <= 2
    assert packed.max_seqlen <= 64 and len(packed.cu_seqlens) > 1.3 * len(one.cu_seqlens)
    assert (one.ids[one.cu_seqlens[:-1].long()] == 0).all() and not torch.isin(one.labels, torch.arange(5)).any()


def test_a_padded_peer_sees_the_same_tokens_and_both_of_its_losses_are_one():
    config = EncoderConfig(60, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8, max_len=16)
    batch = train.masked_batch(config, [4, 9, 16])
    inputs = padded_inputs(batch, config.pad_id)
    assert inputs["input_ids"].shape == (3, 16) and inputs["attention_mask"].sum(1).tolist() == [4, 9, 16]
    assert torch.equal(inputs["input_ids"][inputs["attention_mask"].bool()], batch.ids)
    assert "attention_mask" not in padded_inputs(train.masked_batch(config, [16, 16]), config.pad_id)
    full, predicted = masked_lm_losses(peer("RobertaForMaskedLM", config).eval(), batch, config.pad_id).values()
    assert full().item() == pytest.approx(predicted().item(), abs=1e-6)


def test_on_a_gpu_base_comes_first_with_every_implementation():
    todo = train.cases(train.Config(), cuda=True)
    assert todo[0] == {"bench": "train", "case": "dense", "size": "base", "tokens": 16384, "S": 512, "dropout": 0.1}
    assert len({json.dumps(case) for case in todo}) == len(todo) and {case["case"] for case in todo} == set(train.PROBLEMS)
    assert all(case["tokens"] % (8 * case["S"]) == 0 for case in todo if case["case"] == "dense")
    platform = SimpleNamespace(cuda=True, compile=True, fast=True, precision=torch.bfloat16, dtypes=(torch.bfloat16, torch.float32))
    assert list(train.ours(platform, None, 0.0)) == ["ours", "ours +compile", "ours +graphs", "ours +compile +graphs"]
    hf = train.transformers_peers(platform, EncoderConfig(9), None, "RobertaForMaskedLM", None, 0.0)
    assert {"hf +compile", "hf predicted rows +compile", "hf +graphs", "hf predicted rows +compile +graphs", "hf fp32"} <= hf.keys()
    assert "hf eager" not in hf and "hf fp32 +graphs" not in hf
    platform.cuda = platform.compile = False
    hf = train.transformers_peers(platform, EncoderConfig(9, dropout=0.1), None, "RobertaForMaskedLM", None, 0.0)
    assert {*hf} == {f"hf{rows}{attention}{dtype}" for rows in ("", " predicted rows") for attention in ("", " eager")
                     for dtype in ("", " fp32")}
    assert [case["sequences"] for case in recycle.cases(recycle.Config(), cuda=True)].count(128) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["train", "recycle"])
def test_on_a_gpu_nothing_of_ours_fails(name, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    command("-m", f"bench.{name}", "--quick", "--dropouts", "0.1", "--json", tmp_path / "rows")
    rows = [r for r in read(tmp_path / "rows") if "bench" in r]
    assert rows and not [r for r in rows if "failed" in r and r["impl"].startswith(("ours", "plain", "distill", "full", "case"))]
    assert all(("peak_mb" in r) == ("+graphs" not in r["impl"]) for r in rows if "ms" in r)
