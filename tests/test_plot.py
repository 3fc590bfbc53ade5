"""Any run folder, drawn and summarised from its rows: finished, unfinished, with non-finite numbers; without matplotlib; without a run."""
import json
import math
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from rt.errors import InputError
from rt.formats.files import FIGURES, check_overwritable
from rt.report.drawing import BLOCKS, Panel, as_text, sparklines, thinned
from rt.report.plot import best_by_panel, completed, convergence, loss_panels, main, report, results_of
from rt.runs.config import run
from rt.runs.resume import has_work

DEMO = ROOT / "results" / "demo"


def write(folder: Path, metrics: list[dict] = (), summary: dict | None = None, name: str = "metrics.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if metrics:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def pretraining(folder: Path, steps: int = 6, stages: int = 2, finished: bool = True) -> Path:
    """The folder that train.py leaves, unfinished in the last stage."""
    rows, done, domains = [], [], ["bio", "rev", "news"]
    for i in range(stages):
        rows += [{"stage": f"M{i}", "step": t + 1, "loss": 6 - i - 0.01 * t, "lr": 1e-3, "grad_norm": 1.0} for t in range(steps)]
        if finished or i < stages - 1:
            heldout = {d: {"loss": 5.5 + abs(i - j) / 8, "accuracy": 0.1, "predictions": 80} for j, d in enumerate(domains)}
            rows.append({"stage": f"M{i}", "step": steps, "heldout": heldout})
            done.append({"name": f"M{i}", "domain": domains[i], "steps": steps, "heldout": heldout})
    return write(folder, rows, {"stages": done} if finished else None)


def tuning(folder: Path) -> Path:
    rows = [{"step": 5 * t, "loss": 2.0 - 0.1 * t if t else None, "dev": {"accuracy": a, "macro_f1": 0.1}}
            for t, a in enumerate((0.1, 0.4, 0.7, 0.7, 0.6))]
    return write(folder, rows, {"task": "t", "test": {"accuracy": 0.65, "macro_f1": 0.2}, "delta": "lora"})


def recycled(mode: str, seed: int, curve: list[float], lr: float | None = 1e-3, base: str = "runs/M1", **more) -> dict:
    steps = [[10 * i, y] for i, y in enumerate(curve)]
    best = max(curve)
    return {"run": f"{mode}-s{seed}-{lr}-{base}", "mode": mode, "delta": "full", "task": "sick", "shots": 16, "seed": seed, "lr": lr,
            "dev": {"accuracy": best}, "test": {"accuracy": best - 0.1}, "curve": steps, "settings": {"base": base, "steps": 20}, **more}


def recycling(folder: Path) -> Path:
    rows = [recycled("scratch", s, [0.1, 0.2 + 0.2 * s, 0.2]) for s in (0, 1)]
    rows += [recycled("scratch", s, [0.1, 0.2, 0.2], lr=9.0) for s in (0, 1)]
    rows += [recycled("apply", s, [0.5], lr=None) for s in (0, 1)] + [recycled("init", s, [0.5, 0.6, 0.8]) for s in (0, 1)]
    return write(folder, summary={"rows": rows})


def study(folder: Path) -> Path:
    rows = [{"study": "connectivity", "task": "sick", "kind": "full", "seed": seed, "pair": "M0-M1", "path": "linear", "mu": mu,
             "loss": 0.5 + (0.2 + 0.1 * seed) * (mu == 0.5), "accuracy": 0.8} for seed in (0, 1) for mu in (0, 0.5, 1)]
    return write(folder, rows, {"study": "connectivity"}, "rows.jsonl")


ALL = {"pretraining": (pretraining, ["loss", "forgetting"]), "tuning": (tuning, ["tuning"]), "recycling": (recycling, ["convergence"]),
       "study": (study, ["connectivity"])}


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_of_run_is_drawn_beside_its_rows(kind, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    make, names = ALL[kind]
    folder = make(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    main([str(folder)])
    said = capsys.readouterr().out
    assert said.endswith("figures " + ", ".join(f"{folder / FIGURES / name}.png" for name in names) + "\n")
    assert {f.name for f in (folder / FIGURES).iterdir()} == {f"{name}.{end}" for name in names for end in ("png", "svg")}
    assert all((folder / FIGURES / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in names)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != FIGURES} == before
    assert any(block in said for block in BLOCKS) or kind == "study" and "0.250 ± 0.635" in said     # its numbers: a barrier


def picture(folder: Path, name: str) -> str:
    main([str(folder), "--out", str(folder / "out")])
    return (folder / "out" / f"{name}.svg").read_text()


def test_forgetting_has_its_values_in_the_cells_and_in_the_terminal(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = pretraining(tmp_path / "run")
    drawn, said = picture(folder, "forgetting"), capsys.readouterr().out
    assert all(f"<!-- {text} -->" in drawn for text in ("5.500", "5.625", "5.750", "M0 (bio)", "M1 (rev)", "news"))
    lines = said.splitlines()
    table = lines[lines.index("held-out masked-LM loss (accuracy)") + 1:-1]
    assert [line.split() for line in table] == [text.split() for text in (
        "after bio rev news", "M0 (bio) 5.500 (0.100) 5.625 (0.100) 5.750 (0.100)", "M1 (rev) 5.625 (0.100) 5.500 (0.100) 5.625 (0.100)")]


@pytest.mark.parametrize("finished", [True, False])
def test_the_domain_of_a_stage_is_the_one_that_was_recorded(finished, tmp_path, capsys):
    """With --replay the held-out domains begin with the earlier ones, and with --mix one stage learns several."""
    pytest.importorskip("matplotlib")
    losses = {domain: {"loss": 1.5 + i, "accuracy": 0.1} for i, domain in enumerate(("bio", "news", "mid", "new"))}
    facts = {"M2": {"domain": "news"}, "M3": {"domain": "mid+new"}, "M4": {"domain": "x"}}
    if finished:
        rows, summary = [], {"stages": [{"name": name, "heldout": losses} | of for name, of in facts.items()]}
    else:
        rows, summary = [{"stage": name, "step": 3, "heldout": losses} | of for name, of in facts.items()][:2], None
    steps = [{"stage": name, "step": 2, "loss": 5.0, "lr": 0.1} | ({} if finished else of) for name, of in facts.items()]
    drawn = picture(write(tmp_path / "run", steps + rows, summary), "forgetting")
    said = capsys.readouterr().out
    assert all(f"loss {title} " in said for title in ("M2 (news)", "M3 (mid+new)", "M4 (x)"))
    assert re.findall(r"<!-- ([^>]+) -->(?:(?!<!--).)*-Bold-", drawn, re.DOTALL) == ["2.500", "3.500", "4.500"]


def test_an_unfinished_stream_has_the_stages_so_far(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = pretraining(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "M1", "st')       # killed while writing
    drawn = picture(folder, "loss")
    assert "<!-- M0 (bio) -->" in drawn and "<!-- M1 (rev) -->" in drawn and "mean of" not in drawn
    assert "M1 (rev)" not in (folder / "out" / "forgetting.svg").read_text()
    assert "loss M1 (rev)" in capsys.readouterr().out
    first = pretraining(tmp_path / "first", stages=1, finished=False)
    main([str(first)])
    assert {f.stem for f in (first / FIGURES).iterdir()} == {"loss"} and "held-out" not in capsys.readouterr().out


def test_a_long_run_is_drawn_as_means(tmp_path):
    pytest.importorskip("matplotlib")
    assert "mean of 5 steps" in picture(pretraining(tmp_path / "run", steps=900), "loss")
    assert thinned([(x, 2.0 * x) for x in range(10)], 3) == [(1, 2), (4, 8), (7, 14), (9, 18)]


def test_convergence_takes_the_setting_that_is_best_on_dev(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    drawn, said = picture(recycling(tmp_path / "run"), "convergence"), capsys.readouterr().out
    assert all(f"<!-- {text} -->" in drawn for text in ("scratch", "scratch's best", "apply", "init", "sick, full, 16 a label, on M1"))
    lines = {line.split()[0]: line.split() for line in said.splitlines() if "±" in line}
    # dev .2 and .4 at lr 1e-3, .2 and .2 at the other; blocks on one scale, .1 to .8, of the means .1, .3, .2
    assert lines["scratch"][1:] == ["▁▃▂", "0.300", "±", "0.141", "0.200", "±", "0.141", "2"]
    assert lines["init"][1] == "▅▆█" and lines["apply"][1] == "▅"


def test_runs_of_several_budgets_say_so():
    lines = {"scratch": [recycled("scratch", 0, [0.1, 0.2]) | {"steps": 40}], "init": [recycled("init", 0, [0.3, 0.2]) | {"steps": 5}]}
    lines = {name: [completed(row) for row in rows] for name, rows in lines.items()}
    assert {"scratch, 40 steps", "init, 5 steps"} < {*convergence("t", lines)[1].lines}
    lines["init"][0]["steps"] = 40
    assert {"scratch", "init"} < {*convergence("t", lines)[1].lines}


def test_a_chain_has_a_panel_a_base_and_a_line_a_route(tmp_path, capsys):
    rows = [recycled("init", s, [0.1, y], lr, base) | {"base": base, "route": route}
            for s in (0, 1) for base in ("M1", "M2") for route in ("direct", "chain")
            for lr, y in ((1e-3, 0.5 if base == "M1" else 0.2), (2e-3, 0.4))]
    for row in rows:
        if row["route"] == "chain":     # as in rt.runs.results.Run: a chain's settings end at their base
            row["settings"]["chain"] = ["M1"] if row["base"] == "M1" else ["M1", "M2"]
    panels = best_by_panel(results_of(tmp_path, {"rows": rows}))
    assert [panel[-2] for panel in panels] == ["M1", "M2"]
    assert all(list(lines) == ["init direct", "init chain"] for lines in panels.values())
    assert {row["lr"] for lines in panels.values() for found in lines.values() for row in found} == {2e-3}     # best over both bases


def test_rows_of_a_task_that_has_changed_have_a_panel_of_their_own(tmp_path, capsys):
    rows = [recycled("init", s, [0.1, y]) | {"origin": ["M0", "M1", "d", task]} for s, y, task in ((0, 0.8, "was"), (1, 0.8, "was"),
                                                                                                 (0, 0.3, "is"))]
    main([str(write(tmp_path, summary={"rows": rows}))])
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sick, ")]
    assert len({*titles}) == 2 and all("on M1, content " in title for title in titles)
    panels = best_by_panel(results_of(tmp_path, {"rows": rows}))
    assert [[row["seed"] for row in lines["init"]] for lines in panels.values()] == [[0, 1], [0]]


def test_rows_of_another_old_delta_have_a_line_of_their_own(tmp_path):
    rows = [recycled(mode, s, [0.1, y]) | {"origin": ["M0", "M1", delta, "task"]}
            for s, y, delta in ((0, 0.8, "was"), (1, 0.8, "was"), (0, 0.3, "is")) for mode in ("init", "scratch")]
    (lines,) = best_by_panel(results_of(tmp_path, {"rows": rows})).values()
    other = next(name for name in lines if name.startswith("init, sources "))
    assert {name: [row["seed"] for row in found] for name, found in lines.items()} == {"init": [0, 1], other: [0], "scratch": [0, 1, 0]}
    for row in rows:
        row |= {"base": "M1", "route": "direct" if row["mode"] == "init" else None}
    (lines,) = best_by_panel(results_of(tmp_path, {"rows": rows})).values()
    assert sorted([row["seed"] for row in found] for found in lines.values()) == [[0], [0, 1], [0, 1, 0]]


def test_an_interrupted_sweep_is_drawn_from_what_is_there(tmp_path, capsys):
    swept = tmp_path / "sweep"
    for s in (0, 1):
        write(swept / "deltas" / f"init-s{s}", summary=recycled("init", s, [0.1, 0.3]) | {"test": {}})
    write(swept / "deltas" / "init-s2.part", summary=recycled("init", 2, [0.9, 0.9]))      # still being written
    main([str(swept)])
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines() if "±" in line] == [["init", "▁█", "0.300", "±", "0.000", "-", "2"]]
    (swept / "summary.json").write_text(json.dumps({"rows": [recycled("init", 0, [0.1, 0.3]) | {"run": "init-s0", "test": {}}]}))
    main([str(swept)])      # as a second call found it that was interrupted, too
    assert capsys.readouterr().out == said


def test_of_equal_settings_the_first_that_ran_is_drawn(tmp_path):
    """As in recycle.py. The names of the folders have another order."""
    rows = [recycled("init", 0, [0.1, 0.3], lr) for lr in (2e-3, 1e-3)]
    for row in rows:
        write(tmp_path / "deltas" / row["run"].replace("/", "-"), summary=row | {"test": {}})
    summary = {"rows": [row | {"run": row["run"].replace("/", "-")} for row in rows]}
    (lines,) = best_by_panel(results_of(tmp_path, summary)).values()
    assert [row["lr"] for row in lines["init"]] == [2e-3]


def test_the_shots_of_a_regression_are_examples(tmp_path, capsys):
    main([str(write(tmp_path, summary={"rows": [recycled("init", 0, [0.1, 0.3]) | {"dev": {"pearson": 0.3}}]}))])
    assert "sick, full, 16 examples, on M1" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "gone"])
def test_a_number_that_is_none_is_passed_over(kind, bad, tmp_path, capsys):
    """Every number in every second row is replaced by a bad value or removed."""
    pytest.importorskip("matplotlib")
    make, names = ALL[kind]
    folder = make(tmp_path / "run")
    for name in ("metrics.jsonl", "rows.jsonl", "summary.json"):
        if (folder / name).exists():
            whole = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            rows = whole[0].get("rows", whole[0].get("stages", [])) if name == "summary.json" else whole
            for row in rows[1::2]:
                spoil(row, bad)
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in whole))
    main([str(folder)])
    assert {f.stem for f in (folder / FIGURES).iterdir()} == {*names} and "figures" in capsys.readouterr().out


def test_undefined_scores_are_called_so(tmp_path, capsys):
    assert sparklines([[], []], one_scale=True) == ["", ""]
    rows = [recycled("init", s, [0.1, 0.2]) | {"curve": [[0, None], [10, None if s else 0.2]], "dev": {"pearson": None},
                                               "test": {"pearson": None}} for s in (0, 1)]
    rows += [row | {"mode": "apply", "curve": [[0, None]]} for row in rows]
    print(report(write(tmp_path / "recycled", summary={"rows": rows})).text)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[-3:]) for line in lines[-2:]] == [(mode, ["undefined", "undefined", "2"]) for mode in ("init", "apply")]
    tuned = write(tmp_path / "tuned", [{"step": i, "loss": 1.0, "dev": {"pearson": None}} for i in range(3)], {"test": {"pearson": None}})
    assert report(tuned).text.endswith("\ntest pearson undefined")
    main([str(tmp_path / "recycled"), str(tmp_path / "tuned")])
    same = {"study": "compatibility", "task": "sts", "kind": "full", "seed": 0, "stage": 0, "t": None, "base": "M0", "scored_on": "dev"}
    study = write(tmp_path / "study", [same | {"line": line, "pearson": None} for line in ("own", "apply", "chance")], name="rows.jsonl")
    capsys.readouterr()
    print(report(study).text)
    assert capsys.readouterr().out.split()[-5:] == ["undefined"] * 3 + ["dev", "pearson"]


def spoil(row: dict, bad) -> None:
    for key in ("loss", "lr", "accuracy", "curve", "dev", "test", "heldout"):
        if key in row:
            if bad == "gone":
                del row[key]
            elif isinstance(row[key], dict):
                row[key] = {k: {"loss": bad, "accuracy": 0.1} if key == "heldout" and bad else bad for k in row[key]}
            elif key == "curve":
                row[key] = [[step, bad] for step, _ in row[key]]
            else:
                row[key] = bad


def test_a_study_without_numbers_yet(tmp_path, capsys):
    main([str(write(tmp_path, [{"study": "mixture", "replay": None, "steps": 0, "heldout": {"old": 5.0}}], name="rows.jsonl"))])
    assert capsys.readouterr().out.endswith("no numbers yet\nfigures come with more rows\n")


def test_a_study_that_was_killed_has_the_numbers_so_far(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = study(tmp_path / "run")
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    for count, height in ((1, "undefined"), (3, "0.200"), (5, "0.200"), (6, "0.250 ± 0.635")):      # of 2 walks of 3 points
        (folder / "rows.jsonl").write_text("".join(rows[:count]))
        assert f"<!-- M0-M1: barrier {height} -->" in picture(folder, "connectivity") and f"  {height}  " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["compatibility", "similarity", "distance"])
def test_studies_with_numbers_that_are_none(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    nan, same = math.nan, {"study": name, "task": "sick", "kind": "full"}
    rows = {"compatibility": [same | {"seed": s, "base": f"M{i}", "stage": i, "t": None, "line": line, "accuracy": nan if i else 0.5}
                              for s in (0, 1) for i in (0, 1) for line in ("apply", "own", "chance")],
            "similarity": [same | {"what": "heads", "seed": s, "pair": "M0-M1", "heads": 1, "share_own_best": nan, "divergence": [[nan]],
                                   "cka": [[nan, 1.0], [0.0, nan]]} for s in (0, 1)]
            + [same | {"what": "attention", "seed": 0, "base": "M0", "layer": 0, "head": 0, "tokens": ["a"], "map": [[nan]]}],
            "distance": [same | {"seed": s, "of": "deltas", "pair": "M0-M1", "part": part, "l2_per_weight": nan if s else 1, "cosine": None}
                         for s in (0, 1) for part in ("layers.0", "all")]}[name]
    main([str(write(tmp_path / "run", rows, name="rows.jsonl"))])
    assert "figures " in capsys.readouterr().out


def test_the_demos_own_rows(tmp_path, capsys):
    """The rows that the scripts really left (results/demo): the numbers are those in the README."""
    (tmp_path / "recycle").mkdir()
    (tmp_path / "recycle" / "summary.json").write_text((DEMO / "recycle" / "summary.json").read_text())
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "summary.json").write_text((DEMO / "pretrain" / "summary.json").read_text())
    for name in ("recycle", "pretrain"):
        print(report(tmp_path / name).text)
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if "±" in line}
    stages = json.loads((DEMO / "pretrain" / "summary.json").read_text())["stages"]
    readme = re.findall(r"(?m)^([\w+]+) +[\d.-]+  (\d\.\d{3} ± \d\.\d{3}) ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [(mode, scores in rows[mode]) for mode, scores in readme] == [(mode, True) for mode in rows] and len(rows) == 5
    assert f"{stages[1]['heldout']['math']['loss']:.3f}" in said


def test_without_matplotlib_the_terminal_is_enough(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for kind, (make, _) in ALL.items():
        run(lambda: main([str(make(tmp_path / kind))]))
        said = capsys.readouterr().out
        assert any(block in said for block in BLOCKS) or kind == "study"
        assert said.splitlines()[-1] == "no figures: matplotlib is not installed: pip install -e '.[plot]'"
        assert not (tmp_path / kind / FIGURES).exists()


def test_sparklines():
    up, flat = [(0, 1.0), (1, 2.0), (2, 3.0)], [(0, 2.0), (1, 2.0)]
    assert sparklines([up, flat]) == ["▁▅█", "▁▁ "] and sparklines([up, flat], one_scale=True) == ["▁▅█", "▅▅ "]
    assert len(sparklines([[(x, x) for x in range(1000)]])[0]) == 40 and sparklines([]) == []


@pytest.mark.parametrize("arguments, words", [
    ([], "which run?"), (["nowhere"], "nowhere: no run with rows"), (["empty"], "no run with rows"), (["other"], "no run with rows"),
    (["good", "empty"], "no run with rows"), (["broken"], "not valid JSON"),
    (["good", "a/good", "--out", "out"], "two of the runs have the same name"),
    (["good", "--out", "file/under"], "cannot be written"), (["good", "--frames", "3"], "there is no flag --frames")])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tuning(Path("good")), tuning(Path("a/good")), Path("empty").mkdir(), Path("file").write_text("")
    write(Path("other"), [{"epoch": 1, "loss": 2.0}, {"epoch": 2}])
    write(Path("broken"))
    Path("broken/summary.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        run(lambda: main(arguments))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not any(Path(".").rglob(FIGURES))


def test_several_runs_each_get_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    main([str(tuning(Path("one"))), str(recycling(Path("two")) / "."), "--out", "pictures"])
    assert {str(f.relative_to("pictures")) for f in Path("pictures").rglob("*.svg")} == {"one/tuning.svg", "two/convergence.svg"}


def test_equal_rows_give_equal_files(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = (picture(recycling(tmp_path / name), "convergence") for name in "ab")
    assert a == b


def test_figures_are_in_nobodys_way(tmp_path):
    """tests/test_cli.py and test_analyze.py draw figures and then continue in the same folders."""
    (tmp_path / FIGURES).mkdir()
    check_overwritable(tmp_path, {FIGURES})
    assert has_work(tmp_path, {}, resume=False, defaults={})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="figures, thesis.tex"):
        check_overwritable(tmp_path, set())      # without a run, as in exporting, they belong to somebody
    with pytest.raises(InputError, match="contains files that are not part of a stream of bases"):
        has_work(tmp_path, {}, resume=False, defaults={})


def test_the_steps_of_a_stage_follow_those_of_the_stage_before():
    stages = [{"title": name, "rows": [{"step": t, "loss": 5.0, "lr": 0.1} for t in (1, 2, 3)]} for name in ("M0", "M1")]
    for panel in loss_panels(stages):
        assert [[x for x, _ in line] for line in panel.lines.values()] == [[1, 2, 3], [4, 5, 6]]


def test_a_line_as_text_has_first_last_lowest_and_highest():
    said = as_text([Panel("", "", "loss", {"M0": [(0, 3.0), (1, 1.0), (2, 4.0), (3, 2.0)]})]).splitlines()
    assert said[-1].split()[-4:] == ["3", "2", "1", "4"]
