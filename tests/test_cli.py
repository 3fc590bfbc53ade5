"""The command line, as a user types it: tiny preset, few steps, every mode; resuming; errors with exit code 2. Each kind of call runs once
as a real command. The rest use `here`, which is faster."""
import io
import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import command, forked, here
from safetensors.torch import load_file

from rt.errors import InputError
from rt.formats.files import FIGURES, read_json, read_rows
from rt.report import plot
from rt.runs import log
from rt.speed.device import pick_device, pick_precision

pytestmark = pytest.mark.usefixtures("forked_builds")
SMALL = ("--preset", "tiny", "--vocab_size", "500", "--seq_len", "32", "--batch_tokens", "256", "--eval_tokens", "512",
         "--device", "cpu")


def drawn(folder) -> set[str]:
    """Draws the figures of a run as it is now, in its folder. Later tests are not affected."""
    plot.main([str(folder)])
    return {f.stem for f in (folder / FIGURES).iterdir()}


@pytest.fixture(scope="module")
def lineage(graphs, tmp_path_factory):
    """M0 and M1, 4 steps each on two corpora of our own text, and their folder."""
    home = tmp_path_factory.mktemp("cli")
    lines = [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]
    (home / "one.txt").write_text("\n".join(lines[:300]))
    (home / "two.txt").write_text("\n".join(lines[300:600]))
    out = command("train.py", *SMALL, "--stream", f"{home}/one.txt,{home}/two.txt", "--steps", "4", "--snapshots", "1",
                  "--out", home / "run", "--cache", home / "cache")
    return home, out


def test_pretraining_leaves_a_lineage(lineage):
    home, out = lineage
    run = home / "run"
    assert "sample: '<s>" in out and "masked: '" in out and "<mask>" in out
    assert out.splitlines()[-3].split()[:3] == ["after", "one", "two"] and out.splitlines()[-1].startswith("M1 (two)")
    metas = [json.loads((run / name / "meta.json").read_text()) for name in ("M0", "M1")]
    assert metas[0]["parent"] is None and metas[1]["parent"] == metas[0]["fingerprint"] != metas[1]["fingerprint"]
    assert metas[1]["step"] == 4 and metas[1]["argv"] and metas[1]["config"]["stream"] and metas[1]["versions"]["torch"]
    rows = read_rows(run / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in rows if "loss" in r] == [(m, s) for m in ("M0", "M1") for s in (1, 2, 3, 4)]
    assert [r["domain"] for r in rows] == ["one"] * 5 + ["two"] * 5
    matrix = json.loads((run / "summary.json").read_text())["stages"]
    assert [set(s["heldout"]) for s in matrix] == [{"one", "two"}] * 2
    assert 0 < matrix[1]["heldout"]["one"]["loss"] < 10 and 0 <= matrix[1]["heldout"]["two"]["accuracy"] <= 1
    assert (run / "M0-t00002" / "model.safetensors").exists() and not (run / "resume").exists()


def test_a_finished_run_is_left_alone_and_another_setting_refused(lineage):
    home, _ = lineage
    arguments = ("train.py", *SMALL, "--stream", f"{home}/one.txt,{home}/two.txt", "--snapshots", "1", "--out", home / "run",
                 "--cache", home / "cache")
    assert drawn(home / "run") == {"loss", "forgetting"}
    assert "is complete" in here(*arguments, "--steps", "4")
    assert "was begun with --steps [4], not [5]" in here(*arguments, "--steps", "5", code=2)


def test_init_continues_a_base(lineage):
    home, _ = lineage
    here("train.py", *SMALL, "--init", home / "run" / "M1", "--stream", home / "one.txt", "--steps", "2", "--snapshots", "0",
         "--out", home / "more", "--cache", home / "cache")
    meta = json.loads((home / "more" / "M2" / "meta.json").read_text())
    assert meta["parent"] == json.loads((home / "run" / "M1" / "meta.json").read_text())["fingerprint"]
    again = (home / "more" / "M2", "--stream", home / "two.txt", "--steps", "2", "--snapshots", "0", "--number", "0")
    here("train.py", *SMALL, "--init", *again, "--out", home / "zero", "--cache", home / "cache")      # once prepared, a foreign base is M0
    zero = json.loads((home / "zero" / "M0" / "meta.json").read_text())
    assert zero["number"] == 0 and zero["parent"] == meta["fingerprint"]


def test_twenty_steps_are_ten_and_resume_and_ten(lineage):
    home, _ = lineage
    arguments = ("train.py", *SMALL, "--stream", f"{home}/one.txt,{home}/two.txt", "--steps", "14,6", "--cache", home / "cache",
                 "--snapshots", "0", "--dropout", "0.1", "--accumulation", "1", "--precision", "fp32", "--preserve", "3")
    here(*arguments, "--out", home / "straight")
    out = here(*arguments, "--out", home / "broken", "--stop_after", "10", "--log_every", "4")
    assert "stopped in M0 after step 10 of 14" in out and drawn(home / "broken") == {"loss"}
    seconds = read_json(home / "broken" / "resume" / "M0-t00010" / "meta.json")["seconds"]
    assert "unfinished run: add --resume" in here(*arguments, "--out", home / "broken", code=2)
    assert "stopped after M0" in here(*arguments, "--out", home / "broken", "--resume", "--stop_after", "4")
    here(*arguments, "--out", home / "broken", "--resume", "--stop_after", "3", "--log_every", "2")      # stops again, inside M1
    here(*arguments, "--out", home / "broken", "--resume")
    for name in ("M0", "M1"):
        a, b = (load_file(home / run / name / "model.safetensors") for run in ("straight", "broken"))
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert read_rows(home / "straight" / "metrics.jsonl") == read_rows(home / "broken" / "metrics.jsonl")
    assert read_json(home / "broken" / "M0" / "meta.json")["stage"]["seconds"] >= round(seconds, 1)


def test_the_checkpoint_that_a_run_went_on_from_may_be_gone_by_the_next_stage(lineage):
    home, _ = lineage
    arguments = ("train.py", *SMALL, "--stream", f"{home}/one.txt,{home}/two.txt", "--steps", "5,1", "--cache", home / "cache",
                 "--snapshots", "0", "--save_every", "1", "--out", home / "pruned")
    here(*arguments, "--stop_after", "1")
    assert "M1 (two)" in here(*arguments, "--resume")


@pytest.fixture(scope="module")
def task(graphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "two_way"
    folder.mkdir()
    for part, count in (("train", 24), ("dev", 10), ("test", 10)):
        rows = [json.loads(line) for line in (graphs / "task" / f"{part}.jsonl").open()]
        two = [{"text": r["text"][:150], "label": r["label"]} for r in rows if r["label"] in ("generators", "classes")]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in two[:count]))
    return folder


def curve(out, row: dict) -> list[dict]:
    """The evaluations of a recycled run."""
    return read_rows(out / "deltas" / row["run"] / "metrics.jsonl")


TUNE = ("--seq_len", "32", "--device", "cpu", "--eval_every", "2", "--batch_size", "8")


def tuned(home, task, delta, tmp_path):
    """An old delta of two steps. recycle.py itself would tune one for longer."""
    here("train.py", "--mode", "tune", "--base", home / "run" / "M0", "--task", task, "--delta", delta, "--tune_steps", "2", *TUNE, "--out",
         tmp_path / "d")
    return tmp_path / "d"


def test_a_command_imports_only_what_it_uses(lineage, task, tmp_path):
    argv = ["train.py", "--mode", "tune", "--base", f"{lineage[0]}/run/M0", "--task", str(task), "--tune_steps", "2", *TUNE, "--out",
            str(tmp_path / "d")]
    code = f"import sys, analyze, recycle, rt.runs.predict, train; sys.argv = {argv}; train.main(); print(*sys.modules)"
    loaded = set(command("-c", code).splitlines()[-1].split())
    assert "torch" in loaded and not {"matplotlib", "pyarrow", "sympy", "torch._dynamo", "transformers"} & loaded


@pytest.mark.parametrize("delta", ["full", "adapter", "lora", "bitfit", "prefix"])
def test_tune_eval_and_predict(lineage, task, delta, tmp_path):
    home, _ = lineage
    call = command if delta == "full" else here
    base = ("--base", home / "run" / "M0")
    out = here("train.py", "--mode", "tune", *base, "--task", task, "--delta", delta, "--tune_steps", "4", *TUNE,
               "--shots", "6", "--out", tmp_path / "d")
    assert {f.name for f in (tmp_path / "d").iterdir()} == {"delta.safetensors", "delta.json", "metrics.jsonl", "summary.json"}
    facts = json.loads((tmp_path / "d" / "delta.json").read_text())
    assert facts["info"]["labels"] == ["classes", "generators"] and facts["kind"] == delta
    assert facts["info"]["config"]["lr"] == {"full": 5e-4, "prefix": 1e-2}.get(delta, 5e-3)      # the rate that was used, not null
    assert facts["info"]["precision"] == ("bf16" if pick_precision("auto", torch.device("cpu")) == torch.bfloat16 else "fp32")
    assert [r["step"] for r in read_rows(tmp_path / "d" / "metrics.jsonl")] == [0, 2, 4]
    assert drawn(tmp_path / "d") == {"tuning"}
    tested = out.split("test accuracy ")[1].split(",")[0]
    scored = call("train.py", "--mode", "eval", *base, "--task", task, "--delta_dir", tmp_path / "d", *TUNE[:4])
    assert f"test accuracy {tested}" in scored
    (tmp_path / "texts.txt").write_text("Returns the complete graph.\n\nBase class for directed graphs.\n")
    answers = [json.loads(line) for line in call("-m", "rt.runs.predict", *base, "--delta_dir", tmp_path / "d",
                                                 "--input", tmp_path / "texts.txt", *TUNE[:4]).splitlines()]
    assert [a["text"] for a in answers] == ["Returns the complete graph.", "Base class for directed graphs."]
    for a in answers:
        assert sum(a["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert a["label"] == max(a["probabilities"], key=a["probabilities"].get)


def test_a_folder_may_be_called_by_a_dot(lineage, task, tmp_path, monkeypatch):
    home, _ = lineage
    tune = ("train.py", "--mode", "tune", "--base", home / "run" / "M0", "--task", task, "--tune_steps", "1", *TUNE, "--out")
    here(*tune, tmp_path / "d")
    monkeypatch.chdir(tmp_path / "d")
    assert "is the folder you are in: give another --out" in here(*tune, ".", code=2)
    scored = here("train.py", "--mode", "eval", "--base", home / "run" / "M0", "--task", task, "--delta_dir", ".", *TUNE[:4])
    monkeypatch.chdir(home / "run" / "M0")
    assert here("train.py", "--mode", "eval", "--base", ".", "--task", task, "--delta_dir", tmp_path / "d", *TUNE[:4]) == scored


def test_rows_of_a_base_that_was_made_anew_are_told_from_its_own(lineage, task, tmp_path):
    """Equal flags, but other weights at the same place: the old scratch result is no longer a reference."""
    home, _ = lineage
    shutil.copytree(home / "run" / "M0", tmp_path / "M0")
    shutil.copytree(home / "run" / "M1", tmp_path / "M1")
    again = ("recycle.py", "--old_base", tmp_path / "M0", "--old_delta", tuned(home, task, "bitfit", tmp_path), "--base",
             tmp_path / "M1", "--task", task, "--delta", "bitfit", "--steps", "2", "--shots", "4", "--seeds", "0",
             "--out", tmp_path / "out", *TUNE, "--mode")
    here(*again, "scratch,init")
    shutil.rmtree(tmp_path / "M1")
    shutil.copytree(home / "run" / "M0", tmp_path / "M1")
    here(*again, "init")
    after = {row["mode"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]}
    assert after["init"]["origin"] != after["scratch"]["origin"] and after["init"]["steps_to_scratch_best"] is None


def test_texts_are_scored_at_the_length_that_the_delta_was_learned_on(lineage, task, tmp_path):
    home, _ = lineage
    base = ("--base", home / "run" / "M0")
    out = here("train.py", "--mode", "tune", *base, "--task", task, "--tune_steps", "2", "--eval_every", "1", "--seq_len", "16", "--out",
               tmp_path / "d")
    scores = ("train.py", "--mode", "eval", *base, "--task", task, "--delta_dir", tmp_path / "d")
    tested = out.split("; test ")[1].split(";")[0]
    assert here(*scores).split("test ")[1].strip() == tested
    (tmp_path / "texts.txt").write_text("word " * 40)
    answers = [here("-m", "rt.runs.predict", *base, "--delta_dir", tmp_path / "d", "--input", tmp_path / "texts.txt", *more)
               for more in ((), ("--seq_len", "16"), ("--seq_len", "100"))]
    assert answers[0] == answers[1] != answers[2]


def test_another_base_is_refused_with_one_sentence(lineage, task, tmp_path):
    home, _ = lineage
    tuned(home, task, "lora", tmp_path)
    error = here("train.py", "--mode", "eval", "--base", home / "run" / "M1", "--task", task, "--delta_dir", tmp_path / "d",
                 code=2)
    assert error.startswith("error: the delta was learned on base") and error.count("\n") == 1
    m1 = home / "run" / "M1"
    error = here("recycle.py", "--old_base", m1, "--old_delta", tmp_path / "d", "--base", m1, "--task", task, "--delta", "lora", "--out",
                 tmp_path / "out", *TUNE, code=2)
    assert f"error: --old_delta {tmp_path / 'd'}: does not fit --old_base: the delta was learned on base" in error


def test_recycle_all_modes_builds_the_old_delta_and_prints_the_table(lineage, task):
    home, _ = lineage
    arguments = ("recycle.py", "--old_base", home / "run" / "M0", "--base", home / "run" / "M1", "--task", task, "--shots", "6",
                 "--seeds", "0,1", "--steps", "4", "--delta", "adapter", "--lr", "1e-3,2e-3", "--out", home / "recycled", *TUNE)
    shutil.rmtree(home / "run" / "deltas", ignore_errors=True)     # the delta of another test
    out = command(*arguments, "--mode", "all")
    assert "building the old delta" in out
    table = {line.split()[0]: line for line in out.splitlines() if line[:1].isalpha() and "±" in line}
    assert set(table) == {"scratch", "apply", "init", "distill", "init+distill"}
    summary = json.loads((home / "recycled" / "summary.json").read_text())["rows"]
    assert len(summary) == 2 * (4 * 2 + 1)
    assert {"mode", "delta", "task", "shots", "seed", "steps", "dev", "test", "steps_to_scratch_best", "seconds"} <= set(summary[0])
    for row in summary:
        if row["mode"] == "scratch" and row["steps_to_scratch_best"] is not None:
            assert row["steps_to_scratch_best"] <= row["best_step"]
    one, = (row for row in summary if (row["mode"], row["seed"], row["lr"]) == ("init", 1, 1e-3))
    assert [r["step"] for r in curve(home / "recycled", one)] == [0, 2, 4]
    assert drawn(home / "recycled" / "deltas" / one["run"]) == {"tuning"}
    assert all((home / "recycled" / "deltas" / row["run"] / "delta.safetensors").exists() for row in summary)
    # --resume redoes only what is missing and leaves the rest as it was
    path, gone = home / "recycled" / "summary.json", next(row for row in summary if row["mode"] == "distill" and row["seed"] == 1)
    path.write_text(json.dumps({"rows": [row for row in summary if row["mode"] != "init"]}))       # their folders still hold them
    (home / "recycled" / "deltas" / gone["run"] / "summary.json").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (home / "recycled" / "deltas").glob("*/delta.safetensors")}
    resumed = [line[:50] for line in here(*arguments, "--mode", "all", "--resume").splitlines() if "±" in line]
    assert resumed == [line[:50] for line in out.splitlines() if "±" in line]
    assert {p.parent.name for p in stamps if p.stat().st_mtime_ns != stamps[p]} == {gone["run"]}
    summary = json.loads(path.read_text())["rows"]
    # another call adds its rows, replaces only what it redoes, and uses scratch's rows
    more = here(*arguments, "--mode", "init,distill", "--alpha", "0.9", "--gamma", "2", "--att_layers", "all")
    assert "building" not in more and len([line for line in more.splitlines() if "±" in line]) == 2
    after = json.loads((home / "recycled" / "summary.json").read_text())["rows"]
    assert len(after) == len(summary) + 4 and {r["run"] for r in summary} < {r["run"] for r in after}
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in after]
    assert all({k: v for k, v in row.items() if k != "seconds"} in timeless for row in summary)
    assert all(len(curve(home / "recycled", row)) == len(row["curve"]) for row in after)


def resumed(arguments, out) -> tuple[list[str], set[str]]:
    """Resumes a call. Returns the lines of its table and the runs that it did. Every row and curve exists once."""
    deltas = {p: p.stat().st_mtime_ns for p in (out / "deltas").glob("*/delta.json")}
    lines = [line for line in here(*arguments, "--resume").splitlines() if "±" in line]
    rows = read_json(out / "summary.json")["rows"]
    assert all(len(curve(out, row)) == len(row["curve"]) for row in rows)
    assert len({row["run"] for row in rows}) == len(rows) and {row["run"] for row in rows} == {p.name for p in (out / "deltas").iterdir()}
    return lines, {p.parent.name for p in (out / "deltas").glob("*/delta.json") if p.stat().st_mtime_ns != deltas.get(p)}


def test_resuming_keeps_what_is_whole_and_of_the_same_and_nothing_else(lineage, task, tmp_path):
    home, _ = lineage
    out, old = tmp_path / "out", tuned(home, task, "bitfit", tmp_path)
    shutil.copytree(home / "run" / "M1", tmp_path / "M1")
    call = ("recycle.py", "--old_base", home / "run" / "M0", "--old_delta", old, "--task", task, "--delta", "bitfit", "--steps", "2",
            "--shots", "4", "--out", out, *TUNE)
    some = (*call, "--base", tmp_path / "M1", "--mode", "scratch,init", "--seeds", "0,1", "--lr", "1e-2")
    table = [line for line in here(*some).splitlines() if "±" in line]
    names = [row["run"] for row in read_json(out / "summary.json")["rows"]]
    assert resumed(some, out) == (table, set())
    (out / "deltas" / names[0] / "delta.safetensors").unlink()
    (out / "deltas" / names[1] / "delta.json").write_text("")
    (out / "deltas" / names[2] / "summary.json").write_text((out / "deltas" / names[2] / "summary.json").read_text()[:-9])
    table_again, done = resumed(some, out)
    assert done == set(names[:3]) and [row["run"] for row in read_json(out / "summary.json")["rows"]] == names
    assert [line[:60] for line in table_again] == [line[:60] for line in table]
    # another base at the same place; a delta that does not belong to the row next to it
    shutil.rmtree(tmp_path / "M1")
    shutil.copytree(home / "run" / "M0", tmp_path / "M1")
    here(*some, "--no_save_deltas")
    assert not [*out.glob("deltas/*/delta.*")] and resumed(some, out)[1] == set(names)
    # damaged rows of other calls are named, and nothing is lost
    damaged = "x" + (out / "summary.json").read_text()
    (out / "summary.json").write_text(damaged)
    assert "summary.json: not valid JSON" in here(*some, code=2)
    assert (out / "summary.json").read_text() == damaged and len([*out.glob("deltas/*/delta.json")]) == len(names)


def test_a_resumed_call_is_told_from_others_in_its_folder(lineage, task, tmp_path):
    """Rows of other seeds and rates, chains and sweeps are not shown and not taken for the call's own."""
    home, _ = lineage
    m1 = home / "run" / "M1"
    call = ("recycle.py", "--old_base", home / "run" / "M0", "--old_delta", tuned(home, task, "bitfit", tmp_path), "--task", task,
            "--delta", "bitfit", "--steps", "4", "--shots", "4", *TUNE, "--mode", "scratch,init")
    alone = (*call, "--base", m1, "--seeds", "0,1,2", "--lr", "5e-2", "--out")
    whole = [line[:70] for line in here(*alone, tmp_path / "alone").splitlines() if "±" in line]
    here(*call, "--base", m1, "--seeds", "1", "--lr", "2e-3,5e-2", "--out", tmp_path / "mixed")
    lines, done = resumed((*alone, tmp_path / "mixed"), tmp_path / "mixed")
    assert [line[:70] for line in lines] == whole and len(done) == 4
    chain = (*call, "--chain", m1, "--seeds", "0,1,2", "--lr", "5e-2", "--out", tmp_path / "mixed")
    lines, done = resumed(chain, tmp_path / "mixed")        # only init by the other route is missing
    assert len(lines) == 3 and all("init" in name for name in done)
    here(*call, "--base", m1, "--sweep", "seed=0,1,2 lr=5e-2,2e-3", "--out", tmp_path / "sweep")
    lines, done = resumed((*alone, tmp_path / "sweep"), tmp_path / "sweep")
    assert [line[:70] for line in lines] == whole and not done        # the best runs of a sweep are scored on test, so they are whole
    (tmp_path / "mixed" / "summary.json").write_text('{"rows": [{"run": "x"}]}')
    assert "its rows are not those of runs" in here(*chain, code=2)


SWEEP = ("--mode", "all", "--shots", "6", "--steps", "4", "--delta", "adapter", "--precision", "fp32",
         "--sweep", "seed=0,1 alpha=.5,.9 T=2,5 lr=1e-3,2e-3")


def test_a_sweep_prints_the_best_of_every_mode_and_goes_on_where_it_was_interrupted(lineage, task, tmp_path):
    home, _ = lineage
    arguments = ("--old_base", home / "run" / "M0", "--base", home / "run" / "M1", "--task", task, *TUNE, *SWEEP, "--out",
                 tmp_path / "sweep")
    out = here("recycle.py", *arguments)
    home = tmp_path / "sweep"
    lines = {line.split()[0]: line.split() for line in out.splitlines() if "±" in line}
    # scratch and init ignore alpha and T: 2 seeds x 2 rates; distillation 2 x 2 x 2 x 2; apply once per seed
    rows = json.loads((home / "summary.json").read_text())["rows"]
    assert Counter(row["mode"] for row in rows) == {"scratch": 4, "init": 4, "apply": 2, "distill": 16, "init+distill": 16}
    assert lines["distill"][1] == "alpha" and lines["distill"][3] == "T" and lines["scratch"][1] == "-"
    by_mode = {mode: [row for row in rows if row["mode"] == mode and row["test"]] for mode in lines}
    for row in sum(by_mode.values(), []):
        assert read_json(home / "deltas" / row["run"] / "delta.json")["info"]["test"] == row["test"]
    assert all(len(best) == 2 and len({json.dumps([r["lr"], r["settings"]]) for r in best}) == 1 for best in by_mode.values())
    # a run of the sweep equals the run alone
    first = next(row for row in rows if row["mode"] == "init+distill" and row["seed"] == 1 and row["test"])
    same = [text for name in ("alpha", "T") for text in ("--" + name, str(first["settings"][name]))]
    here("recycle.py", *arguments[:8], *TUNE, *SWEEP[2:10], "--mode", "init+distill", "--seeds", "1", "--lr", str(first["lr"]), *same,
         "--out", tmp_path / "alone")
    single, = json.loads((tmp_path / "alone" / "summary.json").read_text())["rows"]
    assert single["run"] == first["run"] and single["curve"] == first["curve"] and single["test"] == first["test"]
    losses = [[row["loss"] for row in curve(out, first)][1:] for out in (tmp_path / "alone", home)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # two of its runs are lost, one completely: only those two are done again
    (home / "deltas" / first["run"] / "summary.json").unlink()
    gone = next(row for row in rows if row["mode"] == "scratch")
    shutil.rmtree(home / "deltas" / gone["run"])
    stamps = {path: path.stat().st_mtime_ns for path in (home / "deltas").glob("*/delta.safetensors")}
    assert drawn(home) == {"convergence"} and drawn(home / "deltas" / by_mode["init"][0]["run"]) == {"tuning"}
    assert here("recycle.py", *arguments).splitlines()[1:] == out.splitlines()[-len(lines) - 2:]
    assert sum(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items()) == 1


def test_a_rate_at_which_runs_diverge_ends_no_grid(lineage, task, tmp_path):
    home, _ = lineage
    arguments = ("--old_base", home / "run" / "M0", "--old_delta", tuned(home, task, "full", tmp_path), "--base", home / "run" / "M1",
                 "--task", task, *TUNE, "--delta", "full", "--shots", "6", "--steps", "16", "--precision", "fp32")
    for runs, flags in ((2, ("--seeds", "0,1", "--sweep", "lr=1e-3,1e15,5e-4")), (1, ("--seeds", "0", "--lr", "1e15,5e-4"))):
        out = tmp_path / str(runs)
        for _ in range(2):      # the second time, everything is there
            said = here("recycle.py", *arguments, "--mode", "scratch", *flags, "--out", out, *(["--resume"] if runs == 1 else []))
            assert f"diverged, and left out: scratch at --lr 1e+15 ({runs} of its runs)" in said and "scratch  1e+15" not in said
        rows = read_json(out / "summary.json")["rows"]
        assert all((row["lr"] == 1e15) == ("diverged" in row) for row in rows) and drawn(out) == {"convergence"}
    bases, chained = f"{home / 'run' / 'M1-t00002'},{home / 'run' / 'M1'}", arguments[:4] + arguments[6:]
    for _ in range(2):
        said = here("recycle.py", *chained, "--chain", bases, "--mode", "init", "--seeds", "0", "--lr", "1e15,5e-4",
                    "--out", tmp_path / "chain", "--resume")
        assert "diverged, and left out: init at --lr 1e+15 (4 of its runs)" in said and said.count("  0.0005  ") == 2
    shutil.copytree(task, other := tmp_path / "other")
    (other / "train.jsonl").write_text("".join((task / "train.jsonl").read_text().splitlines(True)[:20]))
    said = here("recycle.py", *arguments, "--mode", "apply,project", "--source_task", other, "--source_delta", tmp_path / "d",
                "--project_steps", "16", "--seeds", "0", "--lr", "1e15,5e-4", "--out", tmp_path / "project")
    assert "diverged, and left out: project at --lr 1e+15 (1 of its runs)" in said and "\nproject  0.0005  " in said
    for flags in (("--lr", "1e15"), ("--lr", "1e15", "--delta", "lora", "--sweep", "seed=0")):
        said = here("recycle.py", *arguments, "--mode", "apply,scratch", "--seeds", "0", *flags, "--out", tmp_path / flags[-1], code=2)
        assert "error: more than 10 steps in a row before step 1" in said and "lower --lr (1" in said


def test_a_sweep_is_shared_by_ranks(lineage, task, tmp_path):
    home, _ = lineage
    arguments = ("--old_base", home / "run" / "M0", "--old_delta", tuned(home, task, "lora", tmp_path), "--base", home / "run" / "M1",
                 "--task", task, *TUNE, "--delta", "lora", "--shots", "6", "--steps", "2",
                 "--mode", "init,apply", "--sweep", "seed=0,1,2", "--device", "cpu")
    out = [forked("recycle.py", *arguments, "--out", tmp_path / "two"), here("recycle.py", *arguments, "--out", tmp_path / "one")]
    two, one = (json.loads((tmp_path / name / "summary.json").read_text())["rows"] for name in ("two", "one"))
    assert [(r["run"], r["curve"], r["test"]) for r in two] == [(r["run"], r["curve"], r["test"]) for r in one] and len(two) == 6
    assert [line for line in out[0].splitlines() if "±" in line] == [line for line in out[1].splitlines() if "±" in line]


def test_init_from_a_task_with_other_labels_says_so(lineage, task, tmp_path):
    home, _ = lineage
    other = tmp_path / "renamed"
    other.mkdir()
    for part in ("train", "dev", "test"):
        text = (task / f"{part}.jsonl").read_text()
        (other / f"{part}.jsonl").write_text(text.replace('"classes"', '"k"').replace('"generators"', '"g"'))
    arguments = ("recycle.py", "--old_base", home / "run" / "M0", "--base", home / "run" / "M1", "--task", other, "--seeds", "0",
                 "--old_delta", tuned(home, task, "lora", tmp_path), "--delta", "lora", "--steps", "2", "--out", tmp_path / "out", *TUNE)
    out = here(*arguments, "--mode", "all")
    assert "keeps the delta and starts a fresh head" in out
    assert [line.split()[0] for line in out.splitlines() if "±" in line] == ["scratch", "init"]
    out = here(*arguments, "--mode", "all", "--head", "prototype")
    assert [line.split()[0] for line in out.splitlines() if "±" in line] == ["scratch", "apply", "init"]
    assert "labels" in here(*arguments, "--mode", "distill", code=2)


def test_regression_tasks_run_through_every_mode(lineage, tmp_path):
    home, _ = lineage
    folder = tmp_path / "scores"
    folder.mkdir()
    for part, n in (("train", 16), ("dev", 8), ("test", 8)):
        (folder / f"{part}.csv").write_text("text,label\n" + "".join(f"{'graph ' * (i % 5 + 1)},{i % 5 + 0.5}\n" for i in range(n)))
    old = tuned(home, folder, "lora", tmp_path)
    out = here("recycle.py", "--old_base", home / "run" / "M0", "--old_delta", old, "--base", home / "run" / "M1", "--task", folder,
               "--delta", "lora", "--seeds", "0", "--steps", "4", "--shots", "none", "--out", tmp_path / "out", *TUNE)
    assert "test pearson" in out
    row = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"][0]
    assert set(row["test"]) == {"pearson", "spearman"}


def test_itp_is_a_run_of_its_own_beside_the_plain_one(lineage, task, tmp_path):
    home, _ = lineage
    arguments = ("recycle.py", "--old_base", home / "run" / "M0", "--base", home / "run" / "M1", "--task", task, "--shots", "6",
                 "--seeds", "0", "--steps", "4", "--delta", "adapter", "--out", tmp_path / "out", *TUNE)
    here(*arguments, "--mode", "scratch,distill")
    assert drawn(tmp_path / "out") == {"convergence"}
    here(*arguments, "--mode", "scratch,distill", "--itp", "2")
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [(row["mode"], row["settings"].get("itp")) for row in rows] == [("distill", None), ("scratch", None), ("distill", 2)]
    losses = [[r["loss"] for r in curve(tmp_path / "out", row)] for row in rows]
    assert losses[0] != losses[2]


def test_a_row_names_the_kind_of_the_delta_that_it_used(lineage, task, tmp_path):
    home, _ = lineage
    arguments = ("recycle.py", "--old_base", home / "run" / "M0", "--old_delta", tuned(home, task, "lora", tmp_path), "--base",
                 home / "run" / "M1", "--task", task, "--seeds", "0", "--steps", "2", *TUNE)
    said = here(*arguments, "--mode", "apply", "--out", tmp_path / "one")
    one, = read_json(tmp_path / "one" / "summary.json")["rows"]
    assert "), lora: " in said and one["delta"] == one["settings"]["delta"] == "lora"
    error = here(*arguments, "--mode", "apply", "--delta", "adapter", "--bottleneck", "4", "--out", tmp_path / "one", code=2)
    assert "--delta adapter has no effect with --mode apply, which keeps the old delta (lora)" in error
    here(*arguments, "--mode", "apply", "--delta", "lora", "--out", tmp_path / "one")
    assert read_json(tmp_path / "one" / "summary.json")["rows"][0]["run"] == one["run"]
    here(*arguments, "--mode", "scratch,apply", "--out", tmp_path / "two")
    assert [row["delta"] for row in read_json(tmp_path / "two" / "summary.json")["rows"]] == ["full", "lora"]
    assert plot.report(tmp_path / "two").text.count("two_way, ") == 1       # one panel


def test_project_maps_the_delta_by_other_tasks(lineage, task, graphs, tmp_path):
    home, _ = lineage
    other = tmp_path / "three_way"
    other.mkdir()
    for part, count in (("train", 18), ("dev", 9), ("test", 9)):
        rows = [json.loads(line) for line in (graphs / "task" / f"{part}.jsonl").open()]
        labels = sorted({r["label"] for r in rows} - {"generators", "classes"})[:3]
        (other / f"{part}.jsonl").write_text("".join(json.dumps({"text": r["text"][:150], "label": label}) + "\n" for label in labels
                                                     for r in [r for r in rows if r["label"] == label][:count // 3]))
    arguments = ("recycle.py", "--old_base", home / "run" / "M0", "--old_delta", tuned(home, task, "adapter", tmp_path), "--base",
                 home / "run" / "M1", "--task", task, "--seeds", "0,1", "--delta", "adapter", "--out", tmp_path / "out", "--project_steps",
                 "4", "--rank", "3", *TUNE)
    out = here(*arguments, "--mode", "apply,project", "--source_task", other)
    assert "building the old delta" in out and "three_way-adapter-s0" in out
    assert [line.split()[0] for line in out.splitlines() if "±" in line] == ["apply", "project"]
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [(row["mode"], "projection" in row) for row in rows] == [("apply", False), ("project", True)] * 2
    about, settings = rows[1]["projection"], rows[1]["settings"]
    assert about["sources"] == ["three_way"] and about["r"] == 3 and about["granularity"] == "flat" and not about["residual"]
    assert not about["with_head"] and set(about["dev"]) == {"mean", "three_way"} and settings["source_task"] == [str(other)]
    parts = [(r["step"], r.get("part")) for r in curve(tmp_path / "out", rows[1])]
    assert parts == [(0, "projection"), (2, "projection"), (4, "projection"), (0, None)]
    scored = here("train.py", "--mode", "eval", "--base", home / "run" / "M1", "--task", task, *TUNE[:4],
                  "--delta_dir", tmp_path / "out" / "deltas" / rows[1]["run"])       # the mapped delta is a delta of the new base
    assert f"test accuracy {rows[1]['test']['accuracy']:.3f}" in scored


class Bar(log.tqdm):
    """A progress bar that counts although it is not on a terminal, and remembers how it ended."""
    ended = []

    def __init__(self, total: int, desc: str, **_):
        super().__init__(total=total, desc=desc, file=io.StringIO())

    def close(self):
        self.ended.append((self.desc, self.n, self.total))
        super().close()


def test_chain_reports_both_routes_over_all_bases(lineage, task, tmp_path, monkeypatch):
    home, _ = lineage
    here("train.py", *SMALL, "--init", home / "run" / "M1", "--stream", home / "one.txt", "--steps", "3", "--snapshots", "0",
         "--out", tmp_path / "more", "--cache", home / "cache")
    m1, m2 = home / "run" / "M1", tmp_path / "more" / "M2"
    arguments = ("recycle.py", "--old_base", home / "run" / "M0", "--task", task, "--shots", "6", "--seeds", "0,1", "--steps", "4",
                 "--delta", "adapter", "--lr", "1e-2", "--out", tmp_path / "out", "--mode", "scratch,apply,init+distill", *TUNE)
    monkeypatch.setattr(log, "tqdm", Bar)
    out = here(*arguments, "--chain", f"{m1},{m2}", "--workers", "1")
    assert {*Bar.ended} == {("recycle", 20, 20), ("scratch", 8, 8), ("apply", 0, 0), ("init+distill", 12, 12)}
    monkeypatch.undo()
    lines = [line.split() for line in out.splitlines() if "±" in line]
    assert [line[:2] for line in lines] == [["scratch", "-"], ["apply", "chain"], ["apply", "direct"], ["init+distill", "chain"],
                                            ["init+distill", "direct"]]
    assert all(line.count("±") == 2 for line in lines) and ["mode", "route", "lr", "M1", "M2"] in map(str.split, out.splitlines())
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert len(rows) == len({row["run"] for row in rows}) == 2 * 2 * (1 + 2 + 2)
    by = {(row["mode"], row["route"], row["base"], row["seed"]): row for row in rows}
    for mode in ("apply", "init+distill"):      # up to M1 both routes are the same run
        assert by[mode, "chain", str(m1), 0]["test"] == by[mode, "direct", str(m1), 0]["test"]
    for seed in (0, 1):
        scratch = by["scratch", None, str(m2), seed]["dev"]["accuracy"]
        for row in rows:
            if (row["base"], row["seed"]) == (str(m2), seed):
                assert row["steps_to_scratch_best"] == next((step for step, dev in row["curve"] if dev >= scratch), None)
    for (_, route, base, _), row in by.items():
        assert {(r["base"], r["route"]) for r in curve(tmp_path / "out", row)} == {(base, route)}
    info = json.loads((tmp_path / "out" / "deltas" / by["init+distill", "chain", str(m2), 0]["run"] / "delta.json").read_text())["info"]
    assert info["base"] == json.loads((m2 / "meta.json").read_text())["fingerprint"]
    for base in (m1, m2):       # each base gets its own best delta from the folder
        assert "accuracy" in here("train.py", "--mode", "eval", "--base", base, "--delta_dir", tmp_path / "out", "--task", task, *TUNE[:4])
    # a direct run equals that of a call with --base alone, which replaces it
    here(*arguments[:-len(TUNE) - 1], "init+distill", *TUNE, "--base", m2)
    after = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert {row["run"] for row in after} == {row["run"] for row in rows}
    direct = next(row for row in after if row["run"] == by["init+distill", "direct", str(m2), 1]["run"])
    assert "route" not in direct and direct["test"] == by["init+distill", "direct", str(m2), 1]["test"]


@pytest.mark.parametrize("arguments, words", [
    (("train.py", "--mode", "tune", "--base", "nowhere", "--task", "math"), "nowhere: no base there; expected a hub id OWNER/NAME"),
    (("train.py", "--mode", "tune", "--base", "RUN", "--task", "math"), "is a run, not a base; give one of its bases: M0, M1"),
    (("train.py", "--init", "M0", "--preset", "base", "--stream", "TEXT", "--out", "OUT"), "--preset base: is for a new base, and"),
    (("train.py", "--mode", "tune", "--task", "math"), "--mode tune needs --base"),
    (("train.py", "--mode", "dance"), "--mode dance: not one of"),
    (("train.py", "--preset", "huge", "--stream", "TEXT", "--out", "OUT"), "--preset huge: not one of"),
    (("train.py", "--stream", "nowhere.txt", "--out", "OUT"), "there is no such corpus"),
    (("train.py", "--device", "abacus", "--out", "OUT"), "not a device that is supported; use auto, cpu or cuda"),
    (("train.py", "--stream", "TEXT,TEXT", "--out", "OUT"), "two domains have the same name"),
    (("train.py", "--batch_tokens", "1000", "--stream", "TEXT", "--out", "OUT"), "must be a multiple of 1024"),
    (("train.py", "--batch_size", "0"), "--batch_size 0: must be above zero"),
    (("train.py", "--stream", "TEXT", "--out", "TASK"), "contains files that are not part of a stream of bases"),
    (("train.py", "--seed", "-1"), "seeds [-1]: must be whole numbers from 0"),
    (("train.py", "--stream", ","), "--stream: the list is empty"),
    (("train.py", "--stream", "TEXT", "--out", "OUT", "--graphs", "--device", "cpu"), "--graphs captures CUDA graphs"),
    (("recycle.py", "--precision", "fp16"), "--precision fp16: not one of auto, bf16, fp32"),
    (("train.py", "--dropout", "1"), "--dropout 1.0: must be at least 0 and below 1"),
    (("train.py", "--mode", "tune", "--base", "M0", "--task", "TASK", "--seq_len", "999"), "--seq_len 999: the base has positions"),
    (("train.py", "--mode", "tune", "--base", "M0", "--task", "TASK", "--out", "M0"), "M0 holds other things"),
    (("train.py", "--mode", "tune", "--base", "M0", "--task", "BROKEN"), "dev.jsonl, line 2: not valid JSON"),
    (("train.py", "--mode", "tune", "--base", "M0", "--task", "UNSEEN"), "line 1: label 'new' does not occur in the training"),
    (("recycle.py", "--seeds", ","), "seeds []: must be whole numbers"),
    (("recycle.py", "--delta", "bogus"), "delta 'bogus': not one of"),
    (("recycle.py", "--task", "TASK", "--old_base", "M0", "--base", "M0", "--old_delta", "nowhere", "--out", "M0",
      "--tune", "1"), "there is no flag --tune"),
    (("recycle.py", "--T", "0"), "--T 0.0: must be above zero"),
    (("recycle.py", "--gamma", "-1"), "--gamma -1.0: must not be negative"),
    (("recycle.py", "--att_layers", "first"), "--att_layers first: not one of last, all"),
    (("recycle.py", "--mode", "scratch,project", "--source_task", "dl", "--gamma", "1"), "--gamma 1.0: a weight, for modes with a teacher"),
    (("train.py", "--mode", "tune", "--steps", "4"), "--steps has no effect with --mode tune: did you mean --tune_steps?"),
    (("train.py", "--mode", "tune", "--lr", "1e-3", "--preserve", "3"), "--preserve has no effect with --mode tune"),
    (("train.py", "--mode", "eval", "--stream", "python"), "--stream has no effect with --mode eval"),
    (("train.py", "--mode", "eval", "--out", "nowhere", "--graphs"), "--out has no effect with --mode eval"),
    (("train.py", "--mode", "eval", "--r", "3"), "--r has no effect with --mode eval"),
    (("train.py", "--mode", "tune", "--delta_dir", "keep"), "--delta_dir has no effect with --mode tune"),
    (("train.py", "--shots", "3"), "--shots has no effect with --mode pretrain"),
    (("train.py", "--tune_steps", "4"), "did you mean --steps?"),
    (("recycle.py", "--mode", "burn"), "--mode burn: not one of"),
    (("recycle.py", "--itp", "-1"), "--itp -1: must not be negative"),
    (("recycle.py", "--mode", "scratch,apply", "--itp", "2"), "for modes with a teacher (distill, init+distill)"),
    (("recycle.py", "--mode", "project"), "--mode project needs --source_task"),
    (("recycle.py", "--mode", "project", "--source_task", "dl", "--source_delta", "a,b"), "or one per task: 1 tasks, 2 deltas"),
    (("recycle.py", "--mode", "init", "--source_task", "dl"), "--source_task and --source_delta are for --mode project"),
    (("recycle.py", "--mode", "project", "--task", "graphs", "--source_task", "graphs"), "--source_task graphs: is the --task itself"),
    (("recycle.py", "--mode", "project", "--source_task", "dl", "--granularity", "rows"), "--granularity rows: not one of auto, flat"),
    (("recycle.py", "--rank", "0"), "--rank 0: must be above zero"), (("recycle.py", "--seq_len", "3"), "--seq_len 3: must be 8 or more"),
    (("recycle.py", "--warmup", "3"), "--warmup 3.0: must lie between 0 and 1"),
    (("train.py", "--stop_after", "-5"), "--stop_after -5: must be above zero"),
    (("train.py", "--weight_decay", "-1"), "--weight_decay -1.0: must not be negative"),
    (("recycle.py", "--old_base", "M0", "--base", "M0", "--task", "TASK", "--old_delta", "runs/my/typo"), "typo: nothing tuned there"),
    (("recycle.py", "--chain", "M0,M0", "--old_base", "RUN"), "in order, each once, and leave out --base"),
    (("recycle.py", "--chain", "M0", "--base", "M0", "--old_base", "RUN"), "in order, each once, and leave out --base"),
    (("recycle.py", "--mode", "project", "--source_task", "dl", "--chain", "M0"), "several deltas in --old_delta: one of them at a time")])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, lineage, task, tmp_path):
    home, _ = lineage
    for name, line in (("BROKEN", '{"text": \n'), ("UNSEEN", '{"text": "x", "label": "new"}\n')):
        shutil.copytree(task, tmp_path / name)
        good = (task / "dev.jsonl").read_text().splitlines()[0] + "\n"
        (tmp_path / name / "dev.jsonl").write_text(good + line if name == "BROKEN" else line)
    names = {"TEXT": home / "one.txt", "OUT": tmp_path / "out", "M0": home / "run" / "M0", "TASK": task, "RUN": home / "run",
             "BROKEN": tmp_path / "BROKEN", "UNSEEN": tmp_path / "UNSEEN", "TEXT,TEXT": f"{home}/one.txt,{home}/one.txt",
             "M0,M0": f"{home}/run/M0,{home}/run/M0"}
    filled = [names.get(a, a) for a in arguments]
    error = here(*filled, "--cache", home / "cache", code=2)
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "privateuseone", "gpu", "", "cuda:99", "cuda:-1", "cuda:" + "9" * 30])
def test_a_device_that_is_not_there_is_one_short_sentence(name):
    with pytest.raises(InputError) as error:
        pick_device(name)
    said = str(error.value)
    assert said.startswith(f"--device {name}: not a device that ") and said.endswith("; use auto, cpu or cuda") and len(said) < 240
