"""The studies, run as a user types them (some without their own process), and the figures made from their rows."""
import json
import math
import os
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from conftest import command, here, random_base, write_task

import analyze
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.checkpoint import load_base, save_base
from rt.formats.delta_files import save_delta
from rt.formats.files import FIGURES, read_json, read_rows, write_json
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.report import figures, studies
from rt.report import mixture as mixtures
from rt.runs.build import making
from rt.runs.summary import group, interval

pytestmark = pytest.mark.usefixtures("forked_builds")
FLAGS = ("--seq_len", "32", "--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def home(tokenizer, graphs, tmp_path_factory) -> Path:
    """M0; M1 and M2, each a small step from the base before, with a snapshot of M1; IND from another start; a task; for each base a delta
    of seed 0 and none of seed 1."""
    home = tmp_path_factory.mktemp("studies")
    rows = [json.loads(line) for line in (graphs / "task" / "train.jsonl").open()]
    two = [{"text": r["text"][:80], "label": r["label"]} for r in rows if r["label"] in ("generators", "classes")]
    write_task(home / "two_way", {"train": two[:24], "dev": two[24:34], "test": two[34:50]})
    base, g = random_base(tokenizer), torch.Generator().manual_seed(0)
    for folder in ("M0", "M1-t00005", "M1", "M2"):
        if folder != "M0":
            with torch.no_grad():
                for p in base.encoder.parameters():
                    p.add_(0.02 * torch.randn(p.shape, generator=g))
        keep(home / "run" / folder, base)
    keep(home / "ind" / "M0", random_base(tokenizer, 7))
    return home


def keep(folder: Path, base) -> None:
    """Saves a base, and next to it a delta that changes every weight a little."""
    base.fingerprint = save_base(folder, MaskedLM(base.encoder, base.head), base.tokenizer, {"name": folder.name})
    if "-t" not in folder.name:
        model, g = attach(base, DeltaConfig("full"), 2, seed=0), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=g))
        save_delta(folder.parent / "deltas" / f"{folder.name}-two_way-full-s0",
                   extract(model, base, DeltaConfig("full"), {"task": "two_way", "labels": ["classes", "generators"]}))


def of(home: Path, *bases: str, tasks: bool = True) -> tuple:
    """The flags that say what to compare."""
    return ("--bases", ",".join(str(home / "run" / b) for b in bases), *(("--tasks", home / "two_way") if tasks else ()), *FLAGS)


def study(home: Path, name: str, *more, bases: tuple[str, ...] = ("M0", "M1", "M2"), how=here) -> tuple[str, list[dict], dict]:
    """Runs a study. Returns (printed text, rows, summary)."""
    out = home / "out" / name
    said = how("analyze.py", "--study", name, *of(home, *bases, tasks=name != "mixture"), "--out", out, *more)
    rows, summary = read_rows(out / "rows.jsonl"), json.loads((out / "summary.json").read_text())
    assert rows and all(row["study"] == name for row in rows) and "building" not in said
    return said, rows, summary


def test_compatibility_follows_the_lineage(home):
    said, rows, summary = study(home, "compatibility")
    at = {(row["line"], row["base"]): row for row in rows}
    assert [base for line, base in at if line == "apply"] == ["M0", "M1-t00005", "M1", "M2"]
    assert [(row["stage"], row["t"]) for row in rows if row["line"] == "apply"] == [(0, None), (1, 5), (1, None), (2, None)]
    assert {base for line, base in at if line == "tuned"} == {"M1", "M2"}
    assert at["own", "M0"]["accuracy"] == at["apply", "M0"]["accuracy"]
    labels = {part: [json.loads(line)["label"] for line in (home / "two_way" / f"{part}.jsonl").open()] for part in ("train", "test")}
    commonest = max(set(labels["train"]), key=labels["train"].count)
    assert at["chance", "M0"]["accuracy"] == labels["test"].count(commonest) / len(labels["test"]) and at["chance", "M0"]["uniform"] == 0.5
    assert [line.split()[1] for line in said.splitlines()[1:-1]] == ["M0", "M1-t00005", "M1", "M2"]
    assert summary["numbers"][3]["apply"] == [at["apply", "M2"]["accuracy"]]


def test_connectivity_walks_to_every_later_base_and_to_the_independent_one(home):
    said, rows, summary = study(home, "connectivity", "--independent", home / "ind" / "M0", "--points", "5", "--curve",
                                "--curve_steps", "3", how=command)
    paths = group(rows, "pair", "path")
    assert list(paths) == [(pair, path) for pair in ("M0-M1", "M0-M2", "M0-IND") for path in ("linear", "curve")]
    assert all([row["mu"] for row in path] == [0, 0.25, 0.5, 0.75, 1] for path in paths.values())
    starts = [path[0]["loss"] for path in paths.values()]
    assert starts == pytest.approx([starts[0]] * 6, rel=1e-4)       # all start at M0 + its delta
    for pair in ("M0-M1", "M0-IND"):
        assert paths[pair, "linear"][-1]["loss"] == pytest.approx(paths[pair, "curve"][-1]["loss"], rel=1e-4)
    line = paths["M0-IND", "linear"]
    assert paths["M0-IND", "curve"][2]["loss"] != line[2]["loss"]
    height = max(row["loss"] - (1 - row["mu"]) * line[0]["loss"] - row["mu"] * line[-1]["loss"] for row in line)
    assert summary["numbers"][4]["barrier"] == [pytest.approx(max(height, 0))] and f"{max(height, 0):.3f}"[:4] in said
    assert {Path(d["folder"]).name for d in summary["deltas"]} == {f"M{i}-two_way-full-s0" for i in range(3)}


def test_neighbours_are_paired_with_the_next(home):
    _, rows, _ = study(home, "distance", "--neighbours", "--independent", home / "ind" / "M0")
    total = {(row["of"], row["pair"]): row for row in rows if row["part"] == "all"}
    assert list(dict.fromkeys(pair for _, pair in total)) == ["M0-M1", "M1-M2", "M0-IND"]
    assert total["bases", "M0-M1"]["l2_per_weight"] == pytest.approx(0.02 * math.sqrt(2), rel=0.02)       # two small steps
    assert total["bases", "M1-M2"]["l2_per_weight"] == pytest.approx(0.02, rel=0.02)
    assert total["bases", "M0-IND"]["cosine"] < 0.9 < total["bases", "M0-M1"]["cosine"]
    assert total["deltas", "M0-M1"]["cosine"] == pytest.approx(1, abs=1e-4)                               # the same change
    assert {row["part"] for row in rows if row["of"] == "deltas"} == {"embeddings", "layers.0", "layers.1", "all"}


def test_a_base_may_be_called_like_the_independent_one():
    context = SimpleNamespace(c=SimpleNamespace(neighbours=False, independent=None), folders={"IND": "a/IND", "M1": "a/M1"})
    assert studies.StudyContext.pairs.fget(context) == [("IND", "M1")]


@pytest.mark.parametrize("name", ["connectivity", "distance"])
def test_deltas_of_other_settings_are_not_compared_weight_by_weight(name, home):
    """alpha scales what LoRA's weights add, so a point of one path would have the other's scale."""
    folders = []
    for i, alpha in enumerate((16, 32)):
        base, config, facts = load_base(home / "run" / f"M{i}"), DeltaConfig("lora", lora_alpha=alpha), {"task": "two_way"}
        folders.append(home / "scaled" / f"M{i}")
        save_delta(folders[-1], extract(attach(base, config, 2, seed=0), base, config, facts | {"labels": ["classes", "generators"]}))
    error = here("analyze.py", "--study", name, *of(home, "M0", "M1"), "--delta", "lora", "--deltas", ",".join(map(str, folders)),
                 "--out", home / "out" / "scaled", code=2)
    assert "the deltas of M0 and M1 for two_way have other settings" in error and error.count("\n") == 1


def test_similarity_of_heads_and_one_sentence(home):
    said, rows, _ = study(home, "similarity", "--heads", "0.1,1.0", "--sentence", "Returns the complete graph.", "--max_examples", "4",
                          "--independent", home / "ind" / "M0", bases=("M0", "M1"))
    maps = [row for row in rows if row["what"] == "attention"]
    assert [(row["base"], row["layer"], row["head"]) for row in maps] == [(b, *h) for b in ("M0", "M1", "IND") for h in ((0, 1), (1, 0))]
    assert maps[0]["tokens"][0] == "<s>" and maps[0]["tokens"][-1] == "</s>" and "graph" in "".join(maps[0]["tokens"])
    assert all(sum(line) == pytest.approx(1, abs=1e-3) for line in maps[0]["map"])
    near, far = (next(row for row in rows if row.get("pair") == pair) for pair in ("M0-M1", "M0-IND"))
    assert near["share_own_best"] == 1.0 and near["own"] < far["own"] and near["cka_own"] > far["cka_own"] and near["sequences"] == 4
    assert near["match_of_head"] == [0, 1, 2, 3] and near["own_of_head"] == [near["divergence"][i][i] for i in range(4)]
    assert "share own best" in said
    if "no figure" not in said:
        out = home / "out" / "similarity"
        assert {f.name for f in out.iterdir()} == {"rows.jsonl", "summary.json", *(f"{n}.{e}" for n in ("attention", "heads")
                                                                                   for e in ("png", "svg"))}


def test_a_study_that_is_interrupted_leaves_the_finished_one(home, monkeypatch):
    arguments = ("analyze.py", "--study", "distance", *of(home, "M0", "M1"), "--out", home / "out" / "again")
    here(*arguments)
    before = (home / "out" / "again" / "rows.jsonl").read_text()

    def broken(context):
        yield {"study": "distance"}
        raise InputError("enough")

    with monkeypatch.context() as patch:
        patch.setitem(studies.ROWS, "distance", broken)
        here(*arguments, code=2)
    assert (home / "out" / "again" / "rows.jsonl").read_text() == before
    here(*arguments)
    assert (home / "out" / "again" / "rows.jsonl").read_text() == before and not (home / "out" / "again" / "rows.jsonl.part").exists()


def test_a_class_task_and_a_regression_in_one_study(home):
    parts = {part: [json.loads(line) for line in (home / "two_way" / f"{part}.jsonl").open()] for part in ("train", "dev", "test")}
    write_task(home / "length", {part: [r | {"label": r["text"].count("e") / 8} for r in rows] for part, rows in parts.items()})
    for name in ("M0", "M1"):
        base = load_base(home / "run" / name)
        save_delta(home / "run" / "deltas" / f"{name}-length-full-s0",
                   extract(attach(base, DeltaConfig("full"), 1, seed=0), base, DeltaConfig("full"), {"task": "length", "labels": []}))
    for name, more in (("compatibility", ()), ("connectivity", ("--points", "2"))):
        here("analyze.py", "--study", name, *of(home, "M0", "M1"), "--tasks", f"{home / 'two_way'},{home / 'length'}", *more,
             "--out", home / "out" / f"both-{name}")
        numbers = json.loads((home / "out" / f"both-{name}" / "summary.json").read_text())["numbers"]
        assert [n["metric"] for n in numbers if n["task"] == "length"][0] == "pearson" and numbers[0]["metric"] == "accuracy"


def test_missing_deltas_are_tuned_once_and_all_alike(home, capsys):
    """Seed 1 has no deltas, so the deltas of seed 0, with another number of steps, are not mixed in."""
    arguments = ("analyze.py", "--study", "distance", *of(home, "M0", "M1"), "--seeds", "1", "--tune_steps", "2",
                 "--out", home / "out" / "n2")
    names = [f"M{i}-two_way-full-n2-s1" for i in (0, 1)]
    said = here(*arguments)
    assert all(f"building the delta {home / 'run' / 'deltas' / name}" in said for name in names)
    (home / "out" / "n2" / FIGURES).mkdir()     # as rt.plot leaves it
    assert "building" not in here(*arguments)
    summary = json.loads((home / "out" / "n2" / "summary.json").read_text())
    assert [Path(d["folder"]).name for d in summary["deltas"]] == names
    here(*arguments[:-2], "--seq_len", "16", "--out", home / "out" / "short")
    said = capsys.readouterr().err
    assert "note: deltas learned on texts of up to 32 tokens are compared at --seq_len 16" in said and "unequal" not in said
    facts = read_json(home / "run" / "deltas" / names[0] / "delta.json")
    facts["info"]["config"]["tune_steps"] = 5
    write_json(home / "run" / "deltas" / names[0] / "delta.json", {k: v for k, v in facts.items() if k != "sha256"})
    here(*arguments[:-2], "--out", home / "out" / "unequal")
    assert "note: the deltas were tuned with unequal --tune_steps (2, 5)" in capsys.readouterr().err
    facts["info"]["config"] |= {"tune_steps": 2, "lr": 1e-7}
    write_json(home / "run" / "deltas" / names[0] / "delta.json", {k: v for k, v in facts.items() if k != "sha256"})
    here(*arguments[:-2], "--out", home / "out" / "unequal")
    assert "note: the deltas were tuned with unequal --lr (0.0005, 1e-07)" in capsys.readouterr().err


def test_deltas_of_another_task_or_length_are_not_put_beside_new_ones(home, capsys):
    shutil.copytree(home / "two_way", home / "changing")

    def distance(*bases: str, more: tuple = (), code: int = 0) -> str:
        return here("analyze.py", "--study", "distance", *of(home, *bases), "--tasks", home / "changing", "--tune_steps", "1", "--out",
                    home / "out" / "changing", *more, code=code)

    distance("M0", "M1")
    first = home / "run" / "deltas" / "M0-changing-full-n1-s0"
    said = distance("M0", "M1", "M2", more=("--seq_len", "16"), code=2)
    assert f"{first}: was tuned with another --seq_len: 32, not 16; move it away, so that all are tuned anew" in said
    train = home / "changing" / "train.jsonl"
    train.write_text("".join([*train.open()][1:]))
    assert f"{first}: was tuned with another --task" in distance("M0", "M1", "M2", code=2)
    capsys.readouterr()
    distance("M0", "M1")        # nothing is missing
    assert "it has other texts or labels" in capsys.readouterr().err


def test_a_delta_that_another_command_makes_is_waited_for(tmp_path, capsys):
    folder = tmp_path / "deltas" / "d"

    def make() -> None:
        with making(tmp_path / "deltas" / "c", folder):
            pass

    with ThreadPoolExecutor(1) as pool:
        with locked(folder):        # train.py, whose command was killed
            second, said = pool.submit(make), ""
            while "waiting" not in said:
                assert not second.done()
                time.sleep(0.01)
                said += capsys.readouterr().err
        second.result()


@pytest.mark.parametrize("arguments, words", [
    (("--study", "taste"), "--study taste: not one of compatibility"),
    (("--points", "1"), "--points 1"), (("--bases", "M0"), "two bases at least"),
    (("--delta", "bogus"), "--delta bogus: not one of"), (("--seeds", "-1"), "must be whole numbers"),
    (("--heads", "9.0", "--study", "similarity"), "--heads 9.0: not a LAYER.HEAD of this model, 0.0 to 1.1"),
    (("--bases", "M0,M0"), "two have the same name"), (("--deltas", "one"), "one folder a base"),
    (("--deltas", "D1,D0"), "the delta was learned on base"),
    (("--deltas", "D0,D1", "--delta", "lora"), "is a delta of kind full"), (("--out", "HOME"), "holds other things"),
    (("--study", "compatibility", "--independent", "IND"), "follows one lineage"),
    (("--study", "distance", "--points", "5"), "--points has no effect with --study distance"),
    (("--lr", "1e-5"), "--lr has no effect with --study connectivity"),
    (("--curve_steps", "7"), "--curve_steps has no effect without --curve"),
    (("--study", "mixture", "--domains", "x"), "--tasks has no effect with --study mixture")])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, home):
    bases = home / "run"
    names = {"M0": bases / "M0", "M0,M0": f"{bases / 'M0'},{bases / 'M0'}", "IND": home / "ind" / "M0", "HOME": home,
             **{name: ",".join(str(bases / "deltas" / f"M{i}-two_way-full-s0") for i in name if i in "01") for name in ("D1,D0", "D0,D1")}}
    given = {"--bases": f"{bases / 'M0'},{bases / 'M1'}", "--tasks": home / "two_way", "--out": home / "nothing"}
    given |= {k: names.get(v, v) for k, v in zip(arguments[::2], arguments[1::2])}
    error = here("analyze.py", *FLAGS, *(x for pair in given.items() for x in pair), code=2)
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (home / "nothing").exists()


# --- figures ----------------------------------------------------------------------------------------------------------

def test_an_interval_is_that_of_students_t():
    assert interval([0.5]) == (0.5, 0.0)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
    for n, t in ((10, 2.262), (11, 2.228), (12, 2.201), (30, 2.045), (1000, 1.962)):      # from tables
        assert interval(range(n))[1] == pytest.approx(t * stdev(range(n)) / math.sqrt(n), abs=0.005 * stdev(range(n)) / math.sqrt(n))


def test_snapshots_lie_evenly_on_the_way_to_their_base():
    found = [("M0", 0, None), ("M1-t00100", 1, 100), ("M1", 1, None), ("M1-t00050", 1, 50), ("M2-t00010", 2, 10)]
    at = figures.places([{"base": b, "stage": s, "t": t} for b, s, t in found])
    assert at == pytest.approx({"M0": 0, "M1-t00050": 1 / 3, "M1-t00100": 2 / 3, "M1": 1, "M2-t00010": 1.5})


def walk_rows(task: str, seed: int, height: float) -> list[dict]:
    return [{"task": task, "kind": "full", "seed": seed, "pair": "M0-M1", "path": "linear", "mu": mu, "loss": 0.5 + height * (mu == 0.5),
             "accuracy": 0.8} for mu in (0, 0.5, 1)]


def test_figures_say_what_the_rows_say(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row for task in ("sick", "imdb") for seed, height in ((0, 0.1), (1, 0.3)) for row in walk_rows(task, seed, height)]
    figures.connectivity(rows, tmp_path / "sub" / "paths")
    picture = (tmp_path / "sub" / "paths.svg").read_text()
    half = interval([0.1, 0.3])[1]
    assert picture.count(f"M0-M1: barrier 0.200 ± {half:.3f}") == 2 and "sick" in picture and "test loss (nats)" in picture
    first = (tmp_path / "sub" / "paths.png").read_bytes()
    assert first[:4] == b"\x89PNG"
    figures.connectivity(rows, tmp_path / "again")
    assert (tmp_path / "again.png").read_bytes() == first and (tmp_path / "again.svg").read_text() == picture


def test_a_walk_that_was_cut_off_has_no_other_end():
    line, = figures.connectivity_numbers(walk_rows("t", 0, 0.1) + walk_rows("t", 1, 0.3)[:2])
    assert line["loss at 0"] == [0.5, 0.5] and line["loss at 1"] == [0.5, None] and line["at 1"] == line["lowest"] == [0.8, None]


def test_upgrades_are_compared_on_what_all_were_scored_on():
    rows = [{"of": "base", "base": base, "heldout": {"new": 4.0}, "l2": 1.0} for base in ("M0", "A", "B")]
    rows += [{"of": "delta", "base": base, "task": task, "seed": 0, "accuracy": high - (base != "M0") * 0.02, "init": 0.5, "scratch": 0.5,
              "heads_kept": 1.0} for task, high, bases in (("easy", 0.9, "M0 A B"), ("hard", 0.5, "M0 A")) for base in bases.split()]
    rows[-1]["accuracy"] = 0.2      # the study was cut off before B's row of this task
    assert [line["points lost"] for line in figures.recipes_numbers(rows)] == pytest.approx([2, 2])


def test_a_regression_is_drawn_by_its_correlation(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"task": "scores", "kind": "lora", "seed": s, "base": b, "stage": i, "t": None, "line": "apply", "pearson": 0.5 - 0.1 * i}
            for s in (0, 1) for i, b in enumerate(("M0", "M1"))]
    figures.compatibility(rows, tmp_path / "c")
    assert "Pearson" in (tmp_path / "c.svg").read_text() and "chance" not in (tmp_path / "c.svg").read_text()


def test_tokens_are_no_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    tokens = ["$x", "_{", "y$", "$\\bogus$"]
    rows = [{"task": "t", "base": "M0", "layer": 0, "head": 1, "tokens": tokens, "map": [[0.25] * 4] * 4}]
    figures.attention(rows, tmp_path / "a")
    assert "M0, layer 0, head 1" in (tmp_path / "a.svg").read_text()


def test_without_matplotlib_the_rows_stay_and_a_sentence_says_so(home, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="matplotlib is not installed: pip install"):
        figures.connectivity(walk_rows("t", 0, 0.1), tmp_path / "p")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "distance.png").touch()     # of an earlier study: a figure of other rows
    said = here("analyze.py", "--study", "distance", *of(home, "M0", "M1"), "--out", tmp_path / "out")
    assert "M0-M1" in said and "no figures: matplotlib is not installed" in said
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"rows.jsonl", "summary.json"}


def test_a_second_process_leaves_the_rows_of_the_first_alone(home, tmp_path):
    with locked(tmp_path / "out"):
        said = here("analyze.py", "--study", "distance", *of(home, "M0", "M1"), "--out", tmp_path / "out", code=2)
    assert f"is being written to by process {os.getpid()}" in said and not (tmp_path / "out").exists()


def test_rows_that_cannot_be_written_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "open_study", lambda c: None)
    monkeypatch.setitem(analyze.ROWS, "connectivity", lambda context: iter([{"a": "x" * 50}] * 2))
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(InputError, match="rows.jsonl: cannot be made .Is a directory"):
        analyze.run_study(analyze.Config(), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80, hard))
    try:
        with pytest.raises(InputError, match="rows.jsonl: no room to write it: it needs 60 bytes"):
            analyze.run_study(analyze.Config(), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- upgrades of one base ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def domains(home, graphs) -> tuple:
    """The flags that name two domains, `corpus` and `new`."""
    lines = [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]
    (home / "new.txt").write_text("\n".join(lines[:300]))
    return "--domains", f"{graphs / 'corpus'},{home}/new.txt", "--cache", home / "cache"


def test_recipes_are_worth_what_they_keep_and_learn(home, domains):
    said, rows, summary = study(home, "recipes", *domains, "--old_base", home / "run" / "M0", "--shots", "4", "--tune_steps", "2",
                                bases=("M0", "M1", "M2"))       # M0 is among them, as by default
    m0, m1, m2 = (row for row in rows if row["of"] == "base")
    assert set(m0["heldout"]) == {"corpus", "new"} and m0["l2"] == 0 and m1["l2"] < m2["l2"] and m0["cosine"] == pytest.approx(1)
    score = {row["base"]: row for row in rows if row["of"] == "delta"}
    assert score["M0"]["heads_kept"] == 1 and "init" not in score["M0"] and {"init", "scratch"} <= score["M1"].keys()
    compatible = {row["base"]: row["accuracy"] for row in study(home, "compatibility")[1] if row["line"] == "apply"}
    assert {name: row["accuracy"] for name, row in score.items()} == {name: compatible[name] for name in score}
    one, two = summary["numbers"]
    assert one["points lost"] == pytest.approx(100 * (compatible["M0"] - compatible["M1"]))
    assert one["init above scratch"] == pytest.approx(100 * (score["M1"]["init"] - score["M1"]["scratch"]))
    assert min(one["given up"], two["given up"]) == 0 and one["loss, new"] == m1["heldout"]["new"]
    assert (home / "out" / "recipes" / "recipes.png").exists() and "points lost" in said
    assert [len([*figures.recipes_numbers(rows[:n])]) for n in range(1, len(rows))] == [0, 0, 0, 0, 1]      # of an unfinished study


def test_a_sample_that_cannot_be_drawn_ends_recipes_before_the_first_row(home, domains):
    for name in ("two_way", "lengths"):
        write_task(home / "samples" / name, {part: [json.loads(line) | ({"label": i / 8} if name == "lengths" else {})
                                                    for i, line in enumerate((home / "two_way" / f"{part}.jsonl").open())]
                                             for part in ("train", "dev", "test")})
    said = here("analyze.py", "--study", "recipes", *of(home, "M1"), *domains, "--old_base", home / "run" / "M0", "--shots", "1",
                "--tasks", f"{home}/samples/two_way,{home}/samples/lengths", "--tune_steps", "1", "--out", home / "out" / "samples", code=2)
    assert "lengths: dev's targets are all equal" in said and not (home / "out" / "samples").exists()


def test_without_a_test_all_scores_of_a_recipe_are_of_the_whole_dev(home, domains, monkeypatch):
    write_task(home / "no_test", {part: [json.loads(line) for line in (home / "two_way" / f"{part}.jsonl").open()]
                                  for part in ("train", "dev")})
    for name in ("M0", "M1"):
        base, config = load_base(home / "run" / name), DeltaConfig("full")
        save_delta(home / "run" / "deltas" / f"{name}-no_test-full-s0",
                   extract(attach(base, config, 2, seed=0), base, config, {"task": "no_test", "labels": ["classes", "generators"]}))
    scored, evaluate = [], studies.evaluate
    monkeypatch.setattr(studies, "evaluate", lambda model, data, *a, **k: scored.append(len(data)) or evaluate(model, data, *a, **k))
    here("analyze.py", "--study", "recipes", *of(home, "M1"), *domains, "--tasks", home / "no_test", "--old_base", home / "run" / "M0",
         "--shots", "2", "--tune_steps", "1", "--out", home / "out" / "no_test")
    assert scored == [10] * 4       # apply to M0 and to M1; scratch and init on M1, which chose their step on 4


def test_the_head_is_scored_where_the_encoder_is(home, graphs, monkeypatch):
    places, meta = [], torch.device("meta")
    monkeypatch.setattr(studies, "evaluate_mlm", lambda model, *_, **more: (places.append({p.device for p in model.parameters()}),
                                                                            {"loss": 1.0})[1])
    context = SimpleNamespace(corpora={"corpus": graphs / "corpus"}, c=SimpleNamespace(cache=home / "cache"), where={"device": meta})
    assert studies.heldout_losses(context, str(home / "run" / "M0")) == {"corpus": 1.0} and places == [{meta}]


def test_a_snapshot_that_is_named_is_counted_once(home):
    here("analyze.py", "--study", "compatibility", *of(home, "M0", "M1-t00005", "M1"), "--tune_steps", "1", "--out", home / "out" / "named")
    numbers = read_json(home / "out" / "named" / "summary.json")["numbers"]
    assert [(line["base"], len(line["apply"])) for line in numbers] == [("M0", 1), ("M1-t00005", 1), ("M1", 1)]


def test_a_mixture_of_infinite_schedules_continues_from_one_trunk(home, domains, capsys):
    def put(name: str, base: str, **facts) -> str:
        base = load_base(home / "run" / base)
        return save_base(home / "infinite" / name, MaskedLM(base.encoder, base.head), base.tokenizer, {"name": name} | facts)

    trunk = put("M0-t00007", "M0", step=7)
    put("M0", "M1-t00005", step=10, trunk="M0-t00007")
    for name, replay, parent in (("A", 0.0, trunk), ("B", 0.1, trunk), ("C", 0.2, trunk), ("D", 0.3, "that of A's trunk")):
        put(name, "M1", step=6, domain="corpus", recipe={"replay": replay} | ({"preserve": 3.0} if name == "B" else {}), parent=parent)
    put("E", "M2", recipe={"replay": 0.3})      # as save_base writes it without facts
    arguments = ("analyze.py", "--study", "mixture", "--old_base", home / "infinite" / "M0", *FLAGS, *domains, "--out", home / "inf")
    places = {name: str(home / "infinite" / name) for name in "ABCDE"}
    here(*arguments, "--bases", ",".join(places[name] for name in "ABC"))
    said = capsys.readouterr().err
    assert f"{places['A']} learned corpus, and the study takes new, the last of --domains, for the new domain" in said
    assert "the upgrades differ in more than replay and steps" in said
    for name, words in (("D", f"{places['D']} does not continue"), ("E", f"{places['E']} has no meta.json with its steps")):
        assert words in here(*arguments, "--bases", ",".join(places[each] for each in "AB" + name), code=2)


def test_a_mixture_is_read_from_what_bases_record(home, domains):
    for name, step, recipe in (("M0", 0, {}), ("M1-t00002", 2, {}), ("M1-t00005", 5, {}), ("M1", 10, {}), ("M2", 10, {"replay": 0.2}),
                               ("M3", 10, {"mix": ["corpus:0.5", "new:0.5"]}), ("M4", 10, {})):
        base = load_base(home / "run" / {"M1-t00002": "M0", "M3": "M2", "M4": "M2"}.get(name, name))
        facts = {"name": name, "step": step, "recipe": recipe} | ({"parent": "that of M2"} if name == "M4" else {})
        save_base(home / "replayed" / name, MaskedLM(base.encoder, base.head), base.tokenizer, facts)
    _, rows, summary = study(home, "mixture", *domains, "--bases", ",".join(str(home / "replayed" / name) for name in ("M0", "M1", "M2")))
    assert [(row["replay"], row["steps"]) for row in rows] == [(None, 0), (0.0, 2), (0.0, 5), (0.0, 10), (0.2, 10)]
    assert [line["domain"] for line in summary["numbers"]] == ["corpus", "new"] and (home / "out" / "mixture" / "mixture.png").exists()
    for names, words in (("M2", "a law is fitted to three or more"), ("M1", "all have one share of replay, and a law over"),
                         ("M1 M2 M4", "M4 does not continue"),
                         ("M1 M3", "M3 was trained with --mix, and the share of old text is read from --replay alone: leave it out")):
        said = here("analyze.py", "--study", "mixture", "--old_base", home / "replayed" / "M0", *domains, "--out", home / "out" / "few",
                    "--bases", ",".join(str(home / "replayed" / name) for name in names.split()), code=2)
        assert words in said and not (home / "out" / "few" / "rows.jsonl").exists()


@pytest.mark.parametrize("law", [mixtures.Law(4.0, 0.02, 0.5, 0.6, 0.03), mixtures.Law(3.0, 9.0, 0.2, -0.4, 0.1)])
def test_the_law_of_a_mixture_is_found_again(law):
    runs = [(r, t, law(r, t)) for r in (0.0, 0.05, 0.2, 0.5) for t in (50, 100, 200, 400)]
    found = mixtures.fit(runs)
    assert all(found(r, t) == pytest.approx(loss, abs=1e-6) for r, t, loss in runs)
    assert mixtures.left_out(runs, [str(r) for r, *_ in runs]) < 1e-6
    assert found(0.35, 300) == pytest.approx(law(0.35, 300), abs=1e-4)


def test_a_law_of_very_long_upgrades_is_found_too():
    law = mixtures.Law(3.0, 250000.0**1.5, 0.2, -1.5, 0.1)
    runs = [(r, t, law(r, t)) for r in (0.0, 0.05, 0.2, 0.5) for t in (250000, 500000, 1000000)]
    assert all(mixtures.fit(runs)(r, t) == pytest.approx(loss, abs=1e-6) for r, t, loss in runs)


def test_snapshots_of_the_base_that_is_left_out_do_not_help():
    runs = [(0.2, t, loss) for loss in (4.0, 5.0) for t in (100, 200, 400)]
    assert mixtures.left_out(runs, [*"aaabbb"]) == pytest.approx(1) and mixtures.left_out(runs, [*"aaaabb"]) is None


def test_a_law_never_says_that_a_domain_is_forgotten_if_it_is_learned():
    law = mixtures.fit([(1.0, 50, 5.6), (1.0, 100, 5.4), (1.0, 200, 5.0), (1.0, 400, 4.1)])       # ever faster
    assert law.A > 0 and law.b < 0 and mixtures.fit([(1.0, 50, 4.0), (1.0, 100, 4.0), (1.0, 200, 4.0)]).A == 0


def test_a_bases_name_is_no_pattern(tmp_path):
    (tmp_path / "M[1]-t00005").mkdir()
    (tmp_path / "M[1]-t00005" / "meta.json").touch()
    assert studies.snapshots(tmp_path / "M[1]") == [(5, tmp_path / "M[1]-t00005")]


def test_the_critical_share_is_the_first_that_forgets_nothing():
    law = mixtures.Law(5.0, 1.0, 1.0, 0.0, 0.1)         # 5 + 1 / (r + .1)
    assert mixtures.critical(law, 100, 7.0) == pytest.approx(0.4) and mixtures.critical(law, 100, 5.5) is None
    rows = [{"base": f"r{r}/M1", "replay": r, "steps": 100, "heldout": {"old": law(r, 100), "new": 4.0}} for r in (0.0, 0.1, 0.2, 0.5)]
    for before, said in ((7.0, 0.4), (5.5, "none is enough")):
        old, new = figures.mixture_numbers([{"replay": None, "steps": 0, "heldout": {"old": before, "new": 5.0}}, *rows])
        assert old["critical replay"] == pytest.approx(said, abs=0.05) and new["critical replay"] == ""
    few, = figures.mixture_numbers([{"heldout": {"old": 7.0}}, *rows[:3]])
    assert old["error, left out"] < 0.05 and few["error, left out"] == ""


@pytest.mark.parametrize("flags, words", [
    (("--study", "recipes", "--bases", "a,b"), "need --domains"), (("--study", "distance", "--domains", "python"), "need --domains"),
    (("--study", "connectivity", "--old_base", "a", "--bases", "b,c"), "need --domains"),
    (("--study", "mixture", "--bases", "a,b", "--domains", "bio/x.txt,cs/x.txt"), "two domains have the same name; rename one"),
    (("--study", "recipes", "--bases", "a,b", "--domains", "python", "--independent", "c"), "leave it out")])
def test_flags_of_the_studies_of_upgrades(flags, words):
    assert words in here("analyze.py", *flags, code=2)


def test_heatmaps_have_the_first_model_and_the_query_on_the_left(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(figures, "draw_heatmaps", lambda axes, matrices, *_, **__: seen.extend(zip(axes, matrices)))
    figures.heads([{"task": "t", "pair": "M0-M1", "heads": 1, "divergence": [[x]], "cka": [[1.0, x], [0.0, 1.0]]}
                             for x in (0.2, 0.4)], tmp_path / "h")
    for (ax, matrix), what, mean in zip(seen, ("head", "layer"), ([[0.3]], [[1.0, 0.3], [0.0, 1.0]])):
        assert ax.get_ylabel().startswith(f"{what} of M0") and ax.get_xlabel().startswith(f"{what} of M1")
        assert matrix.tolist() == [pytest.approx(line) for line in mean]      # over seeds
    figures.attention([{"task": "t", "base": "M0", "layer": 0, "head": 0, "tokens": ["a"], "map": [[1.0]]}], tmp_path / "a")
    assert (seen[-1][0].get_ylabel(), seen[-1][0].get_xlabel()) == ("t: query", "key")


def test_the_numbers_of_compatibility_and_of_a_walk():
    facts = [("apply", "M0", 0.7), ("apply", "M1", 0.5), ("own", "M0", 0.8), ("tuned", "M1", 0.9), ("chance", "M0", 0.1)]
    lines = figures.compatibility_numbers([{"task": "t", "line": line, "base": base, "accuracy": x} for line, base, x in facts])
    assert [(line["base"], line["apply"], line["tuned on that base"], line["chance"]) for line in lines] == [
        ("M0", [0.7], [0.8], [0.1]), ("M1", [0.5], [0.9], [0.1])]
    line, = figures.connectivity_numbers([row | {"accuracy": 0.9 - 0.1 * row["mu"]} for row in walk_rows("t", 0, 0.1)])
    assert line["barrier"] == pytest.approx([0.1]) and (line["at 0"], line["at 1"], line["lowest"]) == ([0.9], [0.8], [0.8])


def test_all_weights_together_are_no_point_on_the_curve_over_layers(tmp_path, monkeypatch):
    drawn, parts = [], ("embeddings", "layers.0", "all")
    monkeypatch.setattr(figures, "draw_panels", lambda path, panels, columns: drawn.extend(panels))
    rows = [{"of": "bases", "pair": "M0-M1", "part": part, "weights": 8, "l2": 1.0, "l2_per_weight": 0.5, "cosine": 0.1} for part in parts]
    figures.distance(rows, tmp_path / "d")
    places = [x for x, y in drawn[0].lines["M0-M1"] if math.isnan(y)]
    assert places == [1.5] and drawn[0].ticks == {0: "emb", 1: "0", 2: "all"}
    assert [line["l2"] for line in figures.distance_numbers(rows)] == [[1.0]]


def test_what_is_given_up_is_measured_from_the_upgrade_that_learned_most():
    rows = [{"of": "base", "base": base, "heldout": {"old": 3.0, "new": loss}, "l2": 1.0} for base, loss in (("M0", 5), ("A", 4), ("B", 2))]
    rows += [{"of": "delta", "base": base, "task": "t", "seed": 0, "accuracy": x, "init": 0.6, "scratch": 0.5, "heads_kept": 1.0}
             for base, x in (("M0", 0.9), ("A", 0.8), ("B", 0.5))]
    lines = [*figures.recipes_numbers(rows)]
    assert [line["given up"] for line in lines] == [2, 0] and [line["points lost"] for line in lines] == pytest.approx([10, 40])
    assert [line["init above scratch"] for line in lines] == pytest.approx([10, 10])


def test_the_law_of_the_new_domain_is_over_the_share_that_is_new():
    law = mixtures.Law(5.0, 1.0, 1.0, 0.0, 0.1)
    rows = [{"base": f"r{r}/M1", "replay": r, "steps": 100, "heldout": {"old": 4.0, "new": law(1 - r, 100)}} for r in (0.0, 0.2, 0.5, 0.8)]
    _, new = figures.mixture_numbers([{"replay": None, "steps": 0, "heldout": {"old": 7.0, "new": 9.0}}, *rows])
    found = mixtures.Law(*(new[name] for name in ("E", "A", "g", "b", "eps")))
    assert [found(1 - r, 100) for r in (0.0, 0.8)] == pytest.approx([law(1.0, 100), law(0.2, 100)], abs=1e-4)


def test_the_critical_share_is_that_of_the_longest_upgrade():
    law = mixtures.Law(4.0, 0.02, 0.5, 0.6, 0.03)      # forgets more with every step
    rows = [{"base": f"r{r}/M1", "replay": r, "steps": t, "heldout": {"old": law(r, t), "new": 4.0}}
            for r in (0.0, 0.1, 0.2, 0.5) for t in (50, 400)]
    old, _ = figures.mixture_numbers([{"replay": None, "steps": 0, "heldout": {"old": law(0.2, 400), "new": 5.0}}, *rows])
    assert old["steps"] == 400 and old["critical replay"] == pytest.approx(0.2, abs=0.011)


def test_the_figure_of_recipes_has_the_loss_given_up_on_its_x_axis(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(figures, "pareto", lambda points, *_: seen.update(points))
    rows = [{"of": "base", "base": base, "heldout": {"old": 3.0, "new": loss}, "l2": 1.0} for base, loss in (("M0", 5), ("A", 4), ("B", 2))]
    rows += [{"of": "delta", "base": base, "task": "t", "seed": 0, "accuracy": x, "init": 0.6, "scratch": 0.5, "heads_kept": 1.0}
             for base, x in (("M0", 0.9), ("A", 0.8), ("B", 0.5))]
    figures.recipes(rows, tmp_path / "r")
    assert seen == {"A": [pytest.approx((2, 10))], "B": [pytest.approx((0, 40))]}


def test_a_study_trains_as_its_flags_say(base, monkeypatch):
    seen = []
    monkeypatch.setattr(studies.analysis, "train_control", lambda model, a, b, data, settings, **_: seen.append(settings))
    monkeypatch.setattr(studies, "recycle", lambda r, mode: seen.append(r.settings) or (None, SimpleNamespace(test={"accuracy": 0.5})))
    c = SimpleNamespace(curve_steps=7, batch_size=5, curve_lr=0.5, tune_steps=7, lr=0.5, delta="full")
    studies.control_point(SimpleNamespace(c=c, data={"t": None}, where={}), None, ({}, {}), "t", 3)
    context = SimpleNamespace(c=c, bases={"M0": base, "M1": base}, deltas={("M0", "t", 3): SimpleNamespace(config=DeltaConfig("full"))},
                              where={"device": torch.device("cpu"), "precision": torch.float32})
    assert studies.few_shot_score(context, "init", "M1", "t", 3, None) == 0.5
    assert [(s.steps, s.batch_size, s.lr, s.seed) for s in seen] == [(7, 5, 0.5, 3)] * 2


def test_modules_count_in_the_distance_of_deltas(base):
    config = DeltaConfig("adapter")
    delta = extract(attach(base, config, 2, 0), base, config, {"labels": ["a", "b"]})
    context = SimpleNamespace(c=SimpleNamespace(study="distance"), bases=dict.fromkeys(("M0", "M1"), base), pairs=[("M0", "M1")],
                              cells=lambda: [("t", 0, {})], deltas={(name, "t", 0): delta for name in ("M0", "M1")})
    whole = [row for row in studies.distance(context) if row["part"] == "all"][-1]
    assert whole["of"] == "deltas" and whole["weights"] == sum(v.numel() for v in delta.tensors(with_head=False).values())


def test_bases_of_equal_names_are_told_apart_by_their_folders(home):
    for name in ("M1", "deltas"):
        shutil.copytree(home / "run" / name, home / "other" / name)
    out = home / "out" / "equal names"
    here("analyze.py", "--study", "distance", "--bases", f"{home}/run/M0,{home}/run/M1,{home}/other/M1", "--tasks", home / "two_way",
         "--out", out, *FLAGS)
    assert {row["pair"] for row in read_rows(out / "rows.jsonl")} == {"run/M0-run/M1", "run/M0-other/M1"}
