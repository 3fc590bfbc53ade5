"""The claims script: its plan, resuming, its report on known rows, and a small run of every part."""
import json
import lzma
import multiprocessing
import shutil

import pytest
from conftest import ROOT, command, here, write_task

from experiments import common
from experiments.claims import plan
from experiments.claims.__main__ import left
from experiments.claims.plan import SCALES, SEEDS, Run, phases, searched
from experiments.claims.report import write
from experiments.claims.rows import GrowingRows, Rows, per_seed, verdict
from rt.errors import InputError
from rt.formats.files import read_rows

BASES = ("M0", "M1", "M2", "M3", "M4", "IND")
STREAM = ("wiki", "bio", "rev", "cs", "ns")


def test_every_run_has_what_it_needs_before_it():
    """Every delta that a phase reads is made in an earlier phase, at every scale."""
    for scale in SCALES.values():
        made: set = set()
        for phase, runs in enumerate(phases(scale)):
            assert len({json.dumps(r.facts) for r in runs}) == len(runs), phase
            now = {(r.base, r.task, r.kind, r.seed) for r in runs if r.what == "tune" or (r.what == "scratch" and r.shots is None)}
            for r in runs:
                needed = [(r.old_base, t, r.kind, r.seed) for t in {r.task, *(r.source or r.task or "").split(",")} if r.old_base]
                needed += [(r.base, r.task, r.kind, r.seed)] if r.what in ("walk", "heads", "distance") else []
                assert all(n in made | now for n in needed), (phase, r)
            made |= now


def test_no_transfer_between_tasks_that_share_sentences():
    runs = [r for phase in phases(SCALES["base"]) for r in phase]
    assert not any({r.task, r.source} == {"sst2", "rotten_tomatoes"} for r in runs)


def test_the_first_seed_searches_and_the_others_follow(tmp_path):
    rows = GrowingRows(tmp_path, "mini")
    first, other = (Run("few", "init", "sick", "full", "M1", seed, 32, "M0", "sick", "same") for seed in SEEDS[:2])
    assert searched(other) == first and rows.rates(first) == SCALES["mini"].rates and rows.rates(other) == ()
    rows.add(first, [{"lr": 1e-4, "chosen": False}, {"lr": 1e-3, "chosen": True}], {"seconds": 1.0})
    assert rows.rates(other) == (1e-3,)
    again = GrowingRows(tmp_path, "mini")      # read back from the file
    assert again.done(first) and not again.done(other) and again.seconds(other) == 1.0


def test_a_run_cut_off_is_done_again_and_rows_of_other_sizes_are_refused(tmp_path):
    first, second = (Run("few", what, "sick", "full", "M1", SEEDS[0], 32, "M0", "sick", "same") for what in ("init", "distill"))
    rows = GrowingRows(tmp_path, "mini")
    for run in (first, second):
        rows.add(run, [{"lr": 1e-4, "chosen": False}, {"lr": 1e-3, "chosen": True}], {"seconds": 1.0})
    path = tmp_path / "mini-few.jsonl"
    path.write_text(path.read_text()[:-20])     # killed while the last row was written
    again = GrowingRows(tmp_path, "mini")
    assert again.done(first) and not again.done(second) and len(read_rows(path)) == 2
    again.add(second, [{"lr": 1e-3, "chosen": True}], {"seconds": 1.0})
    assert [row["lr"] for row in read_rows(path)] == [1e-4, 1e-3, 1e-3]
    path.write_text(path.read_text().replace(rows.sizes, "00000000"))
    with pytest.raises(InputError, match="holds runs of other sizes"):
        GrowingRows(tmp_path, "mini")


def test_intervals_and_verdicts():
    assert [verdict([0.0, 0.001, -0.001], margin) for margin in (0.0, 0.01)] == ["not shown", "shown"]
    assert [verdict(v) for v in ([1.0, 1.1, 1.2], [-1.0, -1.1, -1.2], [1.0, -1.0, 0.1], [1.0])] == [
        "shown", "opposite", "not shown", "not measured with enough seeds"]
    a = {("x", 1): 3.0, ("y", 1): 5.0, ("x", 2): 1.0, ("y", 2): 1.0, ("z", 1): 9.0}
    b = {("x", 1): 1.0, ("y", 1): 1.0, ("x", 2): 1.0, ("y", 2): 2.0, ("z", 1): 0.0}
    assert per_seed(a, b) == [3.0, -0.5] and per_seed(a, b).tasks == 2        # z has no second seed and does not count


def test_the_report_says_what_the_rows_say(tmp_path):
    pytest.importorskip("matplotlib")
    rows = GrowingRows(tmp_path, "mini")
    facts = {"seconds": 1.0, "device": "d", "commit": "c", "torch": "t", "threads": 1}
    for seed in SEEDS:
        for what, accuracy in (("scratch", 0.3), ("distill", 0.2), ("init+distill", 0.6)):
            run = Run("few", what, "sick", "full", "M1", seed, 32, "M0", "sick", "same")
            test = {"accuracy": accuracy + seed / 1000, "macro_f1": accuracy / 2}
            rows.add(run, [{"lr": 1.0, "chosen": False}, {"lr": 2.0, "chosen": True, "test": test}], facts)
    write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "accuracy, full: distill above scratch: -0.100 ± 0.000 (3 seeds, 1 tasks): **opposite**" in text
    assert "macro-F1, full: init+distill above scratch: 0.150 ± 0.000 (3 seeds, 1 tasks): **shown**" in text
    both = "accuracy, full: distill above scratch -0.100 ± 0.000; macro-F1, full: distill above scratch -0.050 ± 0.000"
    assert f"| {both} | opposite |" in text
    assert "C7: project" in text and "Not run yet." in text
    assert Rows(tmp_path, "mini").tests(what="scratch") == {("sick", s): pytest.approx(0.3 + s / 1000) for s in SEEDS}


def test_the_committed_report_is_what_the_committed_rows_say(tmp_path, monkeypatch):
    """Byte for byte. Today's plan continues from these rows: only chains, adapters and LoRA are left."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)      # figures are not compared, and take seconds
    committed, copy = ROOT / "results" / "claims", tmp_path / "claims"
    shutil.copytree(committed, copy, ignore=shutil.ignore_patterns("*.png", "*.svg", "README.md"))
    write(copy)
    assert (copy / "README.md").read_bytes() == (committed / "README.md").read_bytes()
    todo = [run for phase in left(GrowingRows(copy, "mini"), ()) for run in phase]
    assert todo and all(run.part == "chain" or run.kind in ("adapter", "lora") for run in todo)


@pytest.fixture(scope="module")
def data(graphs, tmp_path_factory):
    """Tiny corpora and tasks under the names in the plan."""
    home = tmp_path_factory.mktemp("claims")
    texts = [json.loads(line)["text"].replace("\n", " ")[:400] for line in (graphs / "corpus" / "train.jsonl").open()]
    (home / "corpora").mkdir()
    for i, name in enumerate(STREAM):
        with lzma.open(home / "corpora" / f"{name}.txt.xz", "wt") as file:
            file.write("\n".join(texts[i::len(STREAM)]))
    for i, name in enumerate(("chemprot", "rotten_tomatoes", "agnews", "sick", "acl_arc", "imdb", "mnli")):
        labels = ("a", "b") if name in ("imdb", "rotten_tomatoes") else ("a", "b", "c")
        part = [{"text": t[:80], "label": labels[j % len(labels)]} for j, t in enumerate(texts[600 + 30 * i:630 + 30 * i])]
        write_task(home / "tasks" / name, {"train": part[:18], "dev": part[18:24], "test": part[24:]})
    return home


@pytest.mark.long
def test_every_part_runs_and_is_not_run_again(data, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plan, "SEEDS", SEEDS[:1])
    monkeypatch.setattr("experiments.claims.runs.POINTS", 4)
    monkeypatch.setattr(common, "get_context", lambda how: multiprocessing.get_context("fork"))     # saves importing torch
    arguments = ("-m", "experiments.claims", "--preset", "tiny", "--device", "cpu", "--jobs", "1", "--results", data / "results")
    work = (*arguments, "--data", data, "--home", data / "home")
    assert "train" in here(*work, "--plan")
    assert "runs are left" in here(*work, "--budget", "0.001", "--only", "bases")
    here(*work)
    files = {path.name: len(read_rows(path)) for path in (data / "results").glob("*.jsonl")}
    assert set(files) == {f"tiny-{part}.jsonl" for part in ("bases", "tuned", "few", "full", "compatibility", "connectivity",
                                                          "similarity", "distance", "transfer", "project", "chain")}
    assert "all runs are done" in here(*work) and "nothing is left" in here(*work, "--plan")
    assert {path.name: len(read_rows(path)) for path in (data / "results").glob("*.jsonl")} == files
    for row in (row for path in (data / "results").glob("*.jsonl") for row in read_rows(path)):
        assert row["run"]["part"] and row["seconds"] >= 0 and row["commit"] and "/tmp" not in json.dumps(row["run"])
        if row.get("chosen") is False:
            assert not row.get("test")          # the search never uses test
    here(*arguments, "--report")
    text = (data / "results" / "README.md").read_text()
    assert "Not run yet" not in text and text.count("### C") == 7 and (data / "results" / "tiny-connectivity.png").exists()


@pytest.mark.marathon
def test_a_lineage_that_fails_ends_the_call_at_once(data, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "corpora").mkdir()
    for name in STREAM:
        (tmp_path / "corpora" / f"{name}.txt.xz").write_bytes(lzma.compress(b"one line\n"))
    error = command("-m", "experiments.claims", "--preset", "tiny", "--device", "cpu", "--jobs", "2", "--data", tmp_path,
                    "--home", tmp_path, "--results", tmp_path / "r", "--only", "bases", code=2)
    assert "2 of 2 runs failed" in error and error.count("\n") == 1


def test_missing_data_is_one_sentence(tmp_path):
    assert "not a folder with corpora/ and tasks/" in here("-m", "experiments.claims", "--data", tmp_path, code=2)
    assert "no rows there" in here("-m", "experiments.claims", "--report", "--results", tmp_path, code=2)
    assert "--only" in here("-m", "experiments.claims", "--plan", "--only", "tunde", code=2)
