"""The results of recycle.py: equal names for equal runs, rows of other calls or another origin, the best delta."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_base

import recycle
from rt.data import Encoded, TaskData
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.delta_files import save_delta
from rt.formats.files import write_json
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig
from rt.recycling import Recycling
from rt.runs.config import parse
from rt.runs.results import (
    Run,
    base_origins,
    begin,
    best_delta,
    comparable,
    finished_row,
    open_best,
    open_old,
    origin_of,
    summary_rows,
    unread,
    write_summary,
)
from rt.runs.summary import add_steps_to_scratch, report, report_chain, report_sweep
from rt.tune import TuneSettings


@pytest.fixture
def recycling(tokenizer):
    old, new = random_base(tokenizer, 0), random_base(tokenizer, 1)
    delta = extract(attach(old, DeltaConfig("adapter"), 3, seed=4), old, DeltaConfig("adapter"), {"task": "t", "labels": ["a", "b", "c"]})
    parts = [Encoded([[0, 9 + i, 2] for i in range(n)], torch.arange(n) % 3, 0) for n in (12, 6, 6)]
    return Recycling(old, delta, new, TaskData("t", ("a", "b", "c"), *parts), DeltaConfig("adapter"), TuneSettings(6, 8, 1e-3, 3, seed=0),
                     DistillConfig(), torch.device("cpu"), torch.float32)


def test_origins_are_equal_for_equal_content(recycling):
    origin, old = origin_of(recycling), recycling.old_delta
    others = [replace(recycling, old_delta=2 * old), replace(recycling, base=recycling.old_base),
              replace(recycling, base=replace(recycling.base, tokenizer=SimpleNamespace(fingerprint="another"))),
              replace(recycling, old_delta=replace(old, info=old.info | {"labels": ["c", "b", "a"]})),
              replace(recycling, old_delta=replace(old, config=DeltaConfig("lora", lora_alpha=4.0)))]
    assert origin == origin_of(replace(recycling)) and all(origin_of(other) != origin for other in others)
    assert len({tuple(origin_of(recycling, sources)) for sources in ((), [(old, recycling.data)], [(2 * old, recycling.data)],
                                                                     [(old, replace(recycling.data, hash="other"))])}) == 4


def run(mode: str, *flags, lr: float | None = 1e-3, seed: int = 0) -> Run:
    return Run(parse(recycle.Config, [*map(str, flags)]), mode, seed, lr)


def test_equal_runs_have_equal_names_whatever_the_call_is():
    plain = run("init")
    assert plain.name == "init-s0-" + plain.name[-10:] and run("init", seed=1).name == plain.name.replace("s0", "s1")
    free = ("--alpha", 0.5, "--gamma", 3, "--rank", 4, "--out", "x", "--seeds", "7", "--device", "cpu", "--resume", "--no_save_deltas")
    assert run("init", *free).name == plain.name
    for flags in (("--delta", "lora"), ("--r", 4), ("--task", "dl"), ("--shots", "none"), ("--steps", 7), ("--early_stop", 2),
                  ("--base", "b"), ("--precision", "fp32")):
        assert run("init", *flags).name != plain.name
    assert run("init", lr=2e-3).name != plain.name
    assert len({run("distill", *f).name for f in ((), ("--alpha", 0.5), ("--beta", 2), ("--T", 3), ("--gamma", 1), ("--itp", 1))}) == 6
    assert run("distill", "--att_layers", "all").name == run("distill").name        # without attention maps the layers do not matter
    assert run("distill", "--gamma", 1, "--att_layers", "all").name != run("distill", "--gamma", 1).name
    assert run("project", "--rank", 4).name != run("project").name and run("distill", "--rank", 4).name == run("distill").name
    chain = run("init", "--chain", "a,b")
    assert chain.at("b", "direct").name == run("init", "--base", "b").name != chain.at("b", "chain").name


def test_a_row_of_a_chain_depends_on_every_base_before_it(recycling):
    """A retrained M1 changes what the chain makes of M2, not what is recycled to M2 directly."""
    M1, M2, c = recycling.old_base, recycling.base, run("init", "--chain", "M1,M2")
    rows = {(base, route): c.at(base, route) for base in ("M1", "M2") for route in ("chain", "direct")}
    before, after = (base_origins([*rows.values()], recycling, {"M1": first, "M2": M2}, (), "") for first in (M1, M2))
    changed = {key for key, row in rows.items() if before[row.name] != after[row.name]}
    assert changed == {("M1", "chain"), ("M1", "direct"), ("M2", "chain")}
    assert before[rows["M2", "direct"].name] == origin_of(replace(recycling, base=M2))


def test_a_row_is_taken_for_that_of_a_run_if_all_of_it_is_there(recycling, tmp_path):
    origin, one = origin_of(recycling), run("init", "--old_delta", "d")
    row = {"run": one.name, "mode": "init", "seed": 0, "lr": 1e-3, "settings": one.settings, "dev": {"accuracy": 0.5}, "test": {},
           "curve": [], "seconds": 1.0, "origin": origin}
    home = tmp_path / "deltas" / one.name
    save_delta(home, recycling.old_delta)
    assert finished_row(tmp_path, one, origin) is None       # no row
    write_json(home / "summary.json", row)
    assert finished_row(tmp_path, one, origin) == json.loads(json.dumps(row))
    assert finished_row(tmp_path, one, origin, "fp32") is not None       # an older row, which does not name its precision
    for precision, is_taken in (("fp32", True), ("bf16", False)):
        write_json(home / "summary.json", row | {"precision": precision})
        assert (finished_row(tmp_path, one, origin, "fp32") is not None) == is_taken
    write_json(home / "summary.json", row)
    assert finished_row(tmp_path, one, origin_of(replace(recycling, base=recycling.old_base))) is None
    for other in ({"lr": 2e-3}, {"settings": one.settings | {"steps": 1}}, {"curve": None}, {"dev": {}}):     # two of one name, or damaged
        write_json(home / "summary.json", row | other)
        assert finished_row(tmp_path, one, origin) is None
    write_json(home / "summary.json", row)
    (home / "delta.safetensors").write_bytes((home / "delta.safetensors").read_bytes()[:-1])
    assert finished_row(tmp_path, one, origin) is None
    assert finished_row(tmp_path, replace(one, c=replace(one.c, save_deltas=False)), origin) is not None


def test_finished_runs_of_a_task_without_labels_in_test_are_not_done_again(recycling, tmp_path):
    origin, one = origin_of(recycling), run("init", "--resume", "--no_save_deltas")
    row = {"run": one.name, "mode": "init", "seed": 0, "lr": 1e-3, "settings": one.settings, "dev": {"pearson": None}, "test": {},
           "curve": [[0, None], [3, None]], "seconds": 1.0, "origin": origin}
    for is_tested, test, finished in ((True, {}, set()), (False, {}, {one.name}), (True, {"pearson": None}, {one.name})):
        write_json(tmp_path / "deltas" / one.name / "summary.json", row | {"test": test})
        assert begin(one.c, tmp_path, [one], {one.name: origin}, is_tested) == finished


def test_an_undefined_score_is_no_number_in_tables_and_no_setting_is_chosen_for_it():
    def row(mode: str, dev: float | None, seed: int = 0, lr: float = 1e-3) -> dict:
        return {"mode": mode, "seed": seed, "lr": lr, "settings": {}, "dev": {"pearson": dev}, "test": {}, "curve": [[0, None], [5, dev]],
                "seconds": 1.0}

    rows = [row("scratch", 0.1), row("scratch", 0.3, 1), row("init", None, lr=1e-2), row("init", 0.9, 1, lr=1e-2),
            row("init", 0.2), row("init", 0.2, 1), row("distill", None), row("distill", 0.5, 1)]
    add_steps_to_scratch(rows)
    said = [line.split() for line in report(rows, ["scratch", "init", "distill"]).splitlines()]
    assert said[0][:4] == ["mode", "lr", "dev", "pearson"] and said[1][2:7] == ["0.200", "±", "0.141", "5", "5"]
    assert said[2][1:7] == ["0.001", "0.200", "±", "0.000", "5", "-"] and said[3][1:5] == ["0.001", "undefined", "-", "5"]
    assert " 0.200 ± -  " in report([row("init", 0.2)], ["init"])      # one seed has no spread
    assert "dev pearson" in report_sweep(rows, ["init"], []) and "test" not in report_sweep(rows, ["init"], [])
    rows = [row("scratch", None), row("init", 0.2)]
    add_steps_to_scratch(rows)      # no best score to reach
    assert [row["steps_to_scratch_best"] for row in rows] == [None, None]


def test_a_sweep_without_scratch_forgets_the_scratch_of_an_earlier_one(recycling, tmp_path):
    origin, one = origin_of(recycling), run("init", "--sweep", "seed=0", "--no_save_deltas")
    write_json(tmp_path / "deltas" / one.name / "summary.json", {
        "run": one.name, "mode": "init", "seed": 0, "lr": 1e-3, "settings": one.settings, "dev": {"accuracy": 0.5}, "test": {}, "curve": [],
        "seconds": 1.0, "origin": origin, "steps_to_scratch_best": 10})
    assert write_summary(one.c, tmp_path, [one])[0]["steps_to_scratch_best"] is None


def test_scratch_is_the_baseline_of_rows_of_its_own_bases_task_and_settings():
    def row(mode: str, origin: list[str], *flags) -> dict:
        return {"mode": mode, "origin": origin, "settings": run(mode, *flags).settings}

    same = [row("scratch", ["0", "1", "d", "t"]), row("distill", ["0", "1", "e", "t"], "--alpha", 0.5), row("init", ["0", "1", "d", "t"]),
            row("init", ["9", "1", "e", "t"], "--old_base", "other", "--old_delta", "keep2"),
            row("init", ["0", "1", "f", "t"], "--old_delta", "a,b", "--merge", "ties")]
    others = [row("init", ["0", "2", "d", "t"]), row("init", ["0", "1", "d", "u"]), row("init", ["0", "1", "d", "t"], "--steps", 9)]
    assert comparable([*same, *others], unread(recycle.Config, "scratch")) == [same, *([other] for other in others)]


@pytest.mark.parametrize("rows", [[{"run": "x"}], {"a": 1}, "abc", 5, [5], [None]])
def test_rows_of_something_else_are_one_sentence(rows, tmp_path):
    write_json(tmp_path / "summary.json", {"rows": rows})
    with pytest.raises(InputError, match="its rows are not those of runs of recycle.py"):
        summary_rows(tmp_path / "summary.json")


def test_rows_that_an_earlier_version_wrote_are_read(recycling, tmp_path):
    """All curves in one metrics.jsonl, and deltas next to it without their own rows."""
    rows = [{"run": f"{mode}-s0-0123456789", "mode": mode, "delta": "adapter", "task": "t", "shots": 4, "seed": 0, "lr": lr, "steps": 4,
             "best_step": 4, "dev": {"accuracy": dev, "macro_f1": dev}, "test": {"accuracy": 0.5}, "steps_to_scratch_best": None,
             "seconds": 0.2, "curve": [[0, 0.1], [4, dev]], "settings": {"old_base": "M0", "base": "M1", "steps": 4}}
            for mode, lr, dev in (("scratch", 1e-3, 0.2), ("apply", None, 0.9), ("init", 1e-3, 0.3))]
    write_json(tmp_path / "summary.json", {"rows": rows, "config": {}, "argv": []})
    for row in rows[:2]:
        save_delta(tmp_path / "deltas" / row["run"], recycling.old_delta)
    assert summary_rows(tmp_path / "summary.json") == rows
    assert best_delta(tmp_path, recycling.old_base.fingerprint).name == rows[1]["run"]
    write_json(tmp_path / "summary.json", {"rows": [rows[0] | {"task": "u"}, *rows[1:]], "config": {}, "argv": []})
    with pytest.raises(InputError, match=r"has runs on several tasks \(t, u\), so none is the best; name one of"):
        best_delta(tmp_path, recycling.old_base.fingerprint)
    of = [row | {"origin": ["0", "1", "d", task]} for row, task in zip(rows, "aab")]       # only rows whose deltas are there count
    write_json(tmp_path / "summary.json", {"rows": of, "config": {}, "argv": []})
    assert best_delta(tmp_path, recycling.old_base.fingerprint).name == rows[1]["run"]
    of[1]["origin"] = ["0", "1", "d", "b"]
    write_json(tmp_path / "summary.json", {"rows": of, "config": {}, "argv": []})
    with pytest.raises(InputError, match=r"has runs on a task whose files have changed \(t\), so none is the best"):
        best_delta(tmp_path, recycling.old_base.fingerprint)


def test_a_folder_with_a_dot_in_front_is_no_hub_id(recycling):
    with pytest.raises(InputError, match="^./OWNER/NAME: nothing tuned there"):
        open_best("./OWNER/NAME", recycling.base)


@pytest.mark.parametrize("place", [{}, {"base": "M1", "route": "direct"}, {"base": "M1", "route": "chain"}])
def test_runs_of_another_old_delta_are_not_averaged(recycling, tmp_path, place):
    rows = [{"run": f"init-s{i}-{delta}", "mode": "init", "task": "t", "seed": i, "lr": 1e-3, "dev": {"accuracy": dev}, "test": {},
             "seconds": 0.2, "curve": [], "settings": {}, "origin": ["M0", "M1", delta, "t"], **place}
            for i, delta, dev in ((0, "was", 0.9), (1, "was", 0.1), (2, "is", 0.6), (3, "is", 0.7))]
    for row in rows:
        save_delta(tmp_path / "deltas" / row["run"], recycling.old_delta)
    write_json(tmp_path / "summary.json", {"rows": rows})
    assert best_delta(tmp_path, recycling.old_base.fingerprint).name == "init-s3-is"


def test_the_best_delta_of_a_folder_is_the_best_seed_on_the_right_base_and_whole(recycling, tmp_path):
    elsewhere = replace(recycling.old_delta, info=recycling.old_delta.info | {"base": "another"})
    rows = [{"run": f"init-s{i}-0123456789", "mode": "init", "task": "t", "seed": i, "lr": lr, "dev": {"accuracy": dev}, "test": {},
             "seconds": 0.2, "curve": [], "settings": {}, **more}
            for i, (lr, dev, more) in enumerate(((1e-3, .2, {}), (1e-3, .4, {}), (2e-3, .8, {"diverged": 5}), (2e-3, .9, {"diverged": 5})))]
    rows += [rows[0] | {"run": f"init-s{i}-abcdefghij", "seed": i, "lr": 5e-3, "dev": {"accuracy": .95}} for i in (0, 1, 2)]
    for row in rows:
        save_delta(tmp_path / "deltas" / row["run"], elsewhere if row["lr"] == 5e-3 else recycling.old_delta)
    write_json(tmp_path / "summary.json", {"rows": rows})
    assert best_delta(tmp_path, recycling.old_base.fingerprint).name == rows[1]["run"]


def test_a_setting_that_is_not_read_is_in_no_name():
    assert run("init", "--shrinkage").name == run("init").name != run("init", "--head", "prototype").name
    assert run("init", "--head", "prototype", "--shrinkage").name != run("init", "--head", "prototype").name
    assert run("transport", "--carry").name == run("transport").name != run("transport", "--carry_text", "x").name
    assert run("init", "--carry_text", "x").name == run("init").name


def test_the_teacher_is_the_first_delta_with_the_tasks_labels(recycling, tmp_path):
    other = replace(recycling.old_delta, info=recycling.old_delta.info | {"labels": ["x", "y", "z"]})
    for name, delta in (("a", other), ("b", recycling.old_delta), ("c", recycling.old_delta)):
        save_delta(tmp_path / name, delta)
    olds, teacher = open_old(",".join(str(tmp_path / name) for name in "abc"), recycling.old_base, ("a", "b", "c"))
    assert teacher is olds[1]
    assert open_old(",".join(str(tmp_path / name) for name in "ab"), recycling.old_base, ("u", "v"))[1].labels == ("x", "y", "z")


def test_a_chains_table_has_a_column_of_each_bases_own_scores():
    rows = [{"mode": "init", "route": "direct", "base": base, "seed": s, "lr": 1e-3, "dev": {"accuracy": .5}, "test": {"accuracy": score}}
            for base, score in (("M1", .3), ("M2", .7)) for s in (0, 1)]
    rows += [row | {"route": "chain"} for row in rows]
    said = report_chain(rows, ["init"], ("M1", "M2"))
    assert "0.300 ± 0.000" in said and "0.700 ± 0.000" in said
    for row in rows:
        if row["route"] == "chain" and row["base"] == "M2":
            row["diverged"] = 5
    assert [line.split()[-3:] for line in report_chain(rows, ["init"], ("M1", "M2")).splitlines()[2:]] == [
        ["±", "0.000", "-"], ["0.700", "±", "0.000"]]
    assert len(report_chain([row for row in rows if row["route"] == "direct"], ["init"], ("M1", "M2")).splitlines()) == 3


def test_a_sweeps_table_counts_all_runs_of_a_mode():
    rows = [{"mode": "init", "seed": s, "lr": lr, "settings": {}, "dev": {"accuracy": 0.5}, "test": {}, "curve": [], "seconds": 1.0}
            for lr in (1e-3, 2e-3) for s in (0, 1)]
    line = report_sweep(rows, ["init"], []).splitlines()[1].split()
    assert line[line.index("0.001") + 1] == "4"


def test_the_best_delta_is_named_and_one_that_is_gone_is_said(recycling, tmp_path, capsys):
    row = {"run": "init-s0", "mode": "init", "task": "t", "seed": 0, "lr": 1e-3, "dev": {"accuracy": 0.5}, "test": {}, "seconds": 1.0,
           "curve": [], "settings": {}}
    (tmp_path / "deltas").mkdir()
    write_json(tmp_path / "summary.json", {"rows": [row]})
    with pytest.raises(InputError, match="has no row of a run whose delta is still in"):
        best_delta(tmp_path, recycling.old_base.fingerprint)
    save_delta(tmp_path / "deltas" / "init-s0", recycling.old_delta)
    open_best(str(tmp_path), recycling.old_base)
    assert capsys.readouterr().err == f"best on dev of {tmp_path}: init-s0\n"
