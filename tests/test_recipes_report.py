"""The report of experiments/recipes: its statistics in closed form, and its output for made-up rows."""
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT, here

from experiments.common import cells_to_do, holm, run_here, sign_flip, steps_to_best
from experiments.recipes import report
from experiments.recipes.plan import AFTERWARDS, CHAIN, SWITCHES, TASKS, plain_rates, upgrades
from experiments.transfer import __main__ as transfer
from rt.errors import InputError


@pytest.mark.parametrize("gain, lost", [(-0.1, 0.0), (0.0, 0.0), (0.25, 1.0), (0.5, 2.0), (0.75, 3.0), (0.95, 3.8), (1.0, 4.0), (1.2, 4.0)])
def test_the_frontier_of_plain_upgrades_is_the_lowest_line(gain, lost):
    plain = [(0.5, 2.0), (1.0, 4.0), (0.8, 9.0)]        # the third rate gains less and loses more: it is never on the frontier
    assert report.frontier(plain, gain) == pytest.approx(lost)


def test_tests_are_exact():
    assert sign_flip([1, 2, 3, 4, 5]) == 1 / 32 and sign_flip([-1, -2]) == 1.0 and sign_flip([1, -1]) == 0.75
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    scratch = [(0, 0.1), (5, 0.5), (10, 0.5)]       # as good as it gets at step 5
    assert steps_to_best(scratch, [(0, 0.2), (5, 0.4), (10, 0.5), (15, 0.6)]) == (10, 5)
    assert steps_to_best(scratch, [(0, 0.2), (5, 0.4)]) == (10, 5) and steps_to_best(scratch[:1], [(0, 0.1), (5, 0.4)]) == (0, 1)


def made_rows() -> list[dict]:
    """M0's scores and losses differ by the seed of the deltas, and blocks by what they gain. Full deltas lose thrice what adapters lose."""
    common = {"device": "CPU", "commit": "abc", "stage_seconds": 1.0}
    dev = {"a/full": [0.8, 0.5], "b/adapter": [0.7, 0.5], "c/full": [0.54, 0.5]}

    def apply(seed: int, lost: float = 0.0) -> dict:
        return {"apply": {"a/full": 0.8 - 0.1 * (seed % 3) - 1.5 * lost, "b/adapter": 0.7 - 0.5 * lost, "c/full": 0.5 - 9 * lost}}

    rows = [common | {"arm": "M0", "seed": s, "heldout": {"wiki": 5.0, "bio": 6.0 + s, "cs": 9.0}, "dev": dev} | apply(s) for s in range(3)]
    for target, seed in [*(("bio", seed) for seed in range(5)), ("cs", 1)]:
        for arm, lr, fall, lost in (("plain", 1e-3, 1.0, 0.06), ("plain", 5e-4, 0.5, 0.05), ("hidden 3", 5e-4, 0.98, 0.01),
                                    ("plain", 2.5e-4, 0.2, 0.02), ("plain", 1.25e-4, 0.1, 0.01)):
            heldout = {"wiki": 5.5, target: 6.0 + seed % 3 - fall * (0.8 + 0.1 * seed) if target == "bio" else 9.0 - 2 * fall}
            rows.append(common | {"arm": arm, "lr": lr, "target": target, "seed": seed, "heldout": heldout} | apply(seed, lost))
    return rows + [common | {"arm": arm, "lr": lr, "target": "bio,cs", "seed": 4, "stage": stage, "domain": domain, "heldout": heldout}
                   | apply(4, stage / 100 * (1 + (arm == "hidden 10")))
                   for arm, lr, more in (("plain", 5e-4, 0.0), ("plain", 1e-3, -0.5), ("hidden 10 to M0", 5e-4, 0.25),
                                         ("hidden 10", 5e-4, 0.1))
                   for stage, domain, heldout in ((1, "bio", {"wiki": 9.0, "bio": 6.5 - more, "cs": 8.9}),
                                                  (2, "cs", {"wiki": 9.5, "bio": 6.75, "cs": 8.5 - more}))]


def test_the_report_counts_gain_points_and_advantage(tmp_path):
    found = report.points(made_rows())
    assert found["plain", 5e-4]["bio", 4] == pytest.approx((0.6, 5.0))      # c did not learn on dev, so it is left out of all arms
    (key, ahead), = report.advantages(found).items()
    assert key == ("hidden 3", 5e-4) and [*ahead.values()] == pytest.approx([5 + 1 * 0.48 / 0.5 - 1] * 6)
    for lr in plain_rates("minilm"):        # with a rate less, the plain upgrades' line would be too high
        assert report.advantages({at: of for at, of in found.items() if at != ("plain", lr)}) == {key: {}}
    with pytest.raises(InputError, match="no rows of upgrades"):
        report.write(tmp_path)
    two = {("hidden 20 (afterwards)", 5e-4): dict.fromkeys([("bio", 0), ("bio", 3), ("cs", 0), ("cs", 1)], (1.0, 1.0))}
    plain = {("plain", lr): dict.fromkeys([("bio", 0), ("bio", 3), ("cs", 0), ("cs", 1)], (1.0, 2.0)) for lr in plain_rates("minilm")}
    assert report.lines_of([{"arm": arm, "lr": lr, "target": "cs", "seed": 0, "heldout": {"wiki": 5}, "apply": made_rows()[0]["apply"],
                             "stage_seconds": 1} for arm, lr in plain | two], report.bases(made_rows()),
                           plain | two)[-1][9] == "0.250 / 1.000"       # without the blocks that suggested the arm
    (tmp_path / "minilm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_rows()))
    table = report.write(tmp_path)
    cells = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[3:] for line in table.splitlines()}
    # blocks, gain, points lost, full, adapter, wiki, and of an arm with a switch advantage, p
    for arm, expected in (("plain", [6, 50, 5, 7.5, 2.5, 5.5]), ("hidden 3", [6, 98, 1, 1.5, 0.5, 5.5, 4.96, 0.016])):
        assert [float(cell.split()[0]) for cell in cells[arm, "0.0005"][:len(expected)]] == pytest.approx(expected), arm
    assert float(cells["hidden 3", "0.0005"][9].split()[0]) == pytest.approx(4) and not cells["plain", "0.0005"][9].strip()
    assert "0.016 / 0.359" in table       # 23 arms and rates are planned
    text = (tmp_path / "README.md").read_text()
    assert "| bio | hidden 3 | 0.0005 | 5 | 98.000 ±" in text and "| cs | hidden 3 | 0.0005 | 1 | 98.000 | 1.000 | 4.960 |" in text
    # M0 of these deltas has 7 on bio, 9 on cs: each link of plain gains .5, of the arm .75, and the last base keeps (.25 + .5) / 2
    assert "| chain | peak rate | seeds | gain, % | lost on M1 | lost on M2 | kept, nats | wiki loss |" in text
    assert "| plain | 0.0005 | 1 | 100.000 | 1.000 | 2.000 | 0.375 | 9.500 |" in text
    assert "| plain | 0.001 | 1 | 0.000 |" in text and "| hidden 10 to M0 | 0.0005 | 1 | 150.000 | 1.000 | 2.000 | 0.500 |" in text
    assert "| hidden 10 to M0, 0.0005 | hidden 10 | 1 | 2.000 |" in text and "than | seeds | points |" in text
    assert "| hidden 10 to M0, 0.0005 | plain at equal gain | 1 | 0.000 |" in text      # at the largest gain of plain
    assert "c/full (seed 2)" in text and "- plain at 0.0005 on cs: seeds 0, 2, 3, 4" in text
    assert "if it is below 6" in text
    assert "hidden 3 at 0.0005 on bio:" not in text and (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize("flags, row", [
    (("--steps", "2000"), {"arm": "plain", "device": "CPU, x"}), (("--steps", "2000"), {"arm": "plain", "device": "CPU, x", "steps": 200}),
    ((), {"arm": "plain", "device": "CPU, x", "steps": 2000}), ((), {"arm": "M0", "device": "NVIDIA H100"})])
def test_rows_of_another_device_or_length_are_not_mixed(flags, row, tmp_path):
    for place in ("data/corpora", "data/tasks", "M0", *(f"home/tasks/{task}" for task in TASKS)):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "minilm.jsonl").write_text(json.dumps(row) + "\n")
    assert "must not be mixed; give another --results" in here("-m", "experiments.recipes", "--data", tmp_path / "data", "--base",
                                                              tmp_path / "M0", "--home", tmp_path / "home", "--results", tmp_path, *flags,
                                                              code=2)


@pytest.mark.parametrize("place", [".", "h100", "h100-rev", "h100-long", "mini", "mini-rev", "chains"])
def test_a_committed_report_is_what_its_rows_say(place, tmp_path, monkeypatch):
    folder = ROOT / "results" / "recipes" / place
    for rows in folder.glob("*.jsonl"):
        shutil.copy(rows, tmp_path)
    monkeypatch.setattr(report, "pareto", lambda *_: None)
    report.write(tmp_path)
    made, committed = (re.sub(r"\((?:\.\.|/)[^)]*/(\w+\.md)\)", r"(\1)", (at / "README.md").read_text()) for at in (tmp_path, folder))
    assert made == committed        # but for the places of links


def test_the_committed_report_on_transfer_is_what_its_rows_say(tmp_path):
    for name in ("transfer/rows.jsonl", "recipes/minilm.jsonl"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / "results" / name, tmp_path / name)
    here("-m", "experiments.transfer", "--report", "--results", tmp_path / "transfer")
    assert (tmp_path / "transfer/README.md").read_text() == (ROOT / "results/transfer/README.md").read_text()


def test_a_script_runs_here_as_it_would_as_a_command(tmp_path, monkeypatch):
    seen, before = [], sys.argv
    monkeypatch.setattr("train.main", lambda: print(seen.append(sys.argv)))
    assert run_here({"HOME": tmp_path}, "train.py", "--out", tmp_path / "x", "--lr", 1e-3) == "train.py --out HOME/x --lr 0.001"
    assert seen == [["train.py", "--out", str(tmp_path / "x"), "--lr", "0.001"]] and sys.argv is before
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"train.py --mode tune --base HOME/x failed: --mode tune needs --task"):
        run_here({"HOME": tmp_path}, "train.py", "--mode", "tune", "--base", tmp_path / "x")


def test_the_plan_has_every_arm_once_and_begins_with_what_decides():
    runs = upgrades(("bio",), (0, 1))
    assert len({*runs}) == len(runs) == 2 * (4 + 2 * len(SWITCHES) + len(AFTERWARDS))
    assert [one.arm for one in runs[:5]] == ["plain"] * 4 + ["hidden 3"]
    assert {one.target for one in upgrades(("chain",))} == {CHAIN}
    assert [(one.arm, one.lr) for one in upgrades(("chains",), (0,))] == [
        ("hidden 10", 5e-4), ("hidden 10 to M0", 5e-4), ("plain", 2.5e-4), ("plain", 1.25e-4), ("plain", 5e-4)]
    assert [one.lr for one in runs[:4]] == [1.25e-4, 2.5e-4, 5e-4, 1e-3]
    assert [one.lr for one in upgrades(("bio",), (0,), "mini")[:4]] == [2.5e-4, 5e-4, 1e-3, 2e-3]


def test_a_report_on_chains_alone_has_their_table(tmp_path):
    rows = [row for row in made_rows() if row["arm"] == "M0" or "," in row["target"]]
    (tmp_path / "minilm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.write(tmp_path).startswith("| chain | peak rate |")
    text = (tmp_path / "README.md").read_text()
    assert "pareto" not in text and "not in the plan" not in text and not (tmp_path / "pareto.png").exists()
    assert "- plain at 0.000125 on bio,rev,cs,ns: seeds 0, 1, 2, 3, 4\n" in text


def test_the_figure_has_the_gain_given_up_and_the_points_lost(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "pareto", lambda *arguments: drawn.extend(arguments))
    (tmp_path / "minilm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_rows()))
    report.write(tmp_path)
    assert [sum(column) / 6 for column in zip(*drawn[0]["hidden 3, 5e-4"])] == pytest.approx([2, 1])


def test_no_adapter_that_learned_leaves_a_cell_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "pareto", lambda *_: None)
    rows = made_rows()
    for row in rows[:3]:
        row["dev"]["b/adapter"] = [0.52, 0.5]
    (tmp_path / "minilm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write(tmp_path)
    cells = next(line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| hidden 3 ")).split(" | ")
    assert cells[5:7] == ["1.5", ""]


def test_part_d_is_planned_before_part_c_has_its_rate(tmp_path):
    parts = [cell["part"] for cell, _ in transfer.cells(transfer.Config(results=str(tmp_path), report=True))]
    assert parts.count("D") == parts.count("F") == 2 * 2 * (2 * 2 + 1)        # tasks, kinds; examples, heads; and no example
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({
        "cell": {"what": "tuned", "task": "agnews", "kind": "full", "base": "upgrade"}, "mode": "init", "lr": lr, "dev": {"accuracy": dev}})
        + "\n" for lr, dev in ((1.0, 0.5), (2.0, 0.7), (3.0, 0.6))))
    assert transfer.rate_of_init(transfer.Config(results=str(tmp_path)), "agnews", "full") == 2.0


def test_finished_cells_are_not_done_again(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"cell": {"base": "a"}}\n')
    assert cells_to_do(tmp_path / "r.jsonl", [{"base": "a"}, {"base": "b"}], ()) == [{"base": "b"}]


def test_a_cell_whose_rows_were_cut_short_is_done_again(tmp_path):
    """A whole cell before it stays."""
    a, b, rows = {"base": "a"}, {"base": "b"}, tmp_path / "r.jsonl"
    whole = "".join(json.dumps({"cell": cell, "seed": seed}) + "\n" for cell in (a, b) for seed in (0, 1))
    for text, todo, kept in ((whole[:-3], [b], 2), (whole[:-40], [b], 2), (whole, [], 4), (whole[:3], [a, b], 0)):
        rows.write_text(text)
        assert cells_to_do(rows, [a, b], ()) == todo and rows.read_text() == "".join(whole.splitlines(keepends=True)[:kept])
    rows.write_text(whole + '{"cell": {"base": "c"}, "s')
    assert cells_to_do(rows, [a, b], ()) == [] and rows.read_text() == whole
