"""The claims on MiniLM: the report's statistics on made-up rows, --verify, and a small run of every part."""
import json
import lzma
import shutil
import sys

import pytest
from conftest import ROOT, here, random_base
from test_claims import data  # noqa: F401  (a fixture)

from experiments.claims import minilm, minilm_report, report
from experiments.claims.__main__ import verify
from experiments.recipes import runs as recipes
from experiments.recipes.plan import KINDS, TASKS
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.checkpoint import save_base
from rt.formats.files import read_json, read_rows
from rt.kinds import DeltaConfig
from rt.model import MaskedLM


def made_rows() -> list[dict]:
    """Two lineages; M1 keeps three quarters of the gain, M4 a quarter; imdb/adapter has not learned on dev."""
    facts, rows = {"device": "d", "precision": "p", "commit": "c"}, []
    names = [f"{task}/{kind}" for task in TASKS for kind in ("full", "adapter")]
    for L in (0, 1):
        for base, accuracy in (("M0", 0.9), ("M1-t00050", 0.85), ("M1", 0.8), ("M4", 0.6)):
            rows.append({"cell": {"part": "lineage", "lineage": L}, "base": base, "apply": dict.fromkeys(names, accuracy), "l2": 1.0,
                         "heldout": {"wiki": 5.0, "bio": 4.0}} | facts)
        rows[-4]["dev"] = {name: [0.9, 0.5] for name in names} | {"imdb/adapter": [0.54, 0.5]}
        for task, mode, lr, dev, test in (("imdb", "scratch", 2e-5, 0.6, 0.5), ("imdb", "scratch", 2e-4, 0.5, 0.9),
                                          ("imdb", "distill", 2e-5, 0.7, 0.7), ("agnews", "scratch", 2e-5, 0.6, 0.5),
                                          ("agnews", "distill", 2e-5, 0.6, 0.6)):
            cell = {"part": "few", "lineage": L, "task": task, "kind": "full", "mode": mode}
            rows.append({"cell": cell, "mode": mode, "seed": L, "lr": lr, "dev": {"accuracy": dev}, "test": {"accuracy": test},
                         "best_step": 100, "curve": [[0, 0.1], [100, dev]]} | facts)
    return rows


def test_primary_quantities_of_made_up_rows(tmp_path):
    rows = made_rows()
    found = minilm_report.primary(minilm_report.Rows(rows))
    kept, _ = found["C1: share of Delta_0's gain that apply keeps on M1, above a half"]
    assert len(kept) == 10 and [*kept.values()] == pytest.approx([0.25] * 10)
    distill, margin = found["C5: 32 a label, distill above scratch"]     # the rate is chosen on dev: .5, not the .9 of the better test
    assert distill == {("imdb", 0): pytest.approx(0.2), ("imdb", 1): pytest.approx(0.2), ("agnews", 0): pytest.approx(0.1),
                       ("agnews", 1): pytest.approx(0.1)} and margin == 0
    lines = {line[0]: line[1:] for line in minilm_report.verdicts(found)}
    *line, over_all, word = lines["C5: 32 a label, distill above scratch"]
    assert line == ["+0.150 [+0.100, +0.200]", 4, "0.062", "0.062"] and word == "too few cells"
    assert over_all == "0.688"      # 11 / 16: three of 14 lines have a smaller p, and the lines without rows count as 1
    assert lines["C1: apply, M1 above M4"] == ["+0.200 [+0.200, +0.200]", 10, "0.001", "0.004", "0.014", "shown"]
    assert lines["C7: project above apply"][0] == "not run"
    (tmp_path / "minilm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, by_claim = minilm_report.section(tmp_path)
    assert "](minilm-compatibility.png)" in text and (tmp_path / "minilm-compatibility.png").exists()
    drawn = {(row["task"], row["seed"], row["base"], row["line"]): row["accuracy"] for row in
             minilm_report.rows_of_figure(minilm_report.Rows(rows))}
    assert len(drawn) == 5 * 2 * (4 + 2) and drawn["imdb", 1, "M1-t00050", "apply"] == 0.85 and drawn["imdb", 0, "M0", "chance"] == 0.5
    assert by_claim["C5"] == ("32 a label, distill above scratch +0.150 [+0.100, +0.200]", "too few cells")
    assert by_claim["C1"][1] == "shown" and by_claim["C7"] == minilm_report.NOT_RUN
    assert "scratch: 2 lowest, 0 highest of 2 rates; 4 of 4 runs" in text
    assert "few of lineage 0 (36)" in text and "few of lineage 2 (40)" in text and "| 1 | M1-t00050 | 0.850 |" in text
    assert "keeps on M1: 0.750; by task: acl_arc 0.750, agnews 0.750, chemprot 0.750, imdb 0.750, rotten_tomatoes 0.750." in text
    # 5, 10 and 30 points lost after 1, 1 and 4 upgrades; a line through the other lineage errs by 2.5, 2.5 and 0 points
    assert "| number of upgrades | +0.98 [+0.98, +0.98] | 2.04 | 22.59 |" in text and "| distance (L2) |  | 10.80 | 22.59 |" in text


def test_what_predicts_the_points_lost_on_other_orders_of_the_domains():
    """The points lost are twice the rise of the loss on wiki, in every order; heads and distance stay as they are."""
    rows = made_rows()
    for first, rises in (("bio", (1.0, 2.0)), ("rev", (3.0, 1.0))):
        for base, rise in zip(("M0", "M1", "M2"), (0.0, *rises)):
            rows.append({"cell": {"part": "domains", "first": first}, "base": base, "apply": {"agnews/full": 0.9 - 0.02 * rise},
                         "heldout": {"wiki": 5.0 + rise}, "l2": 1.0, "heads_kept": 1.0})
    text = minilm_report.by_first_domain(minilm_report.Rows(rows))
    assert "loses on 4 bases" in text and "bases of the other orders" in text
    # bio: 2 and 4 points, rev: 6 and 2. Squared errors of the mean: 4, 0 and 9, 1 by order; bio 4, rev 4 and 16, cs 4 by domain
    assert "| nothing, their mean |  | 1.87 | 2.65 |  |" in text
    assert "| rise of the loss on wiki | +1.00 [+1.00, +1.00] | 0.00 | 2.24 | [+1.41, +2.24] |" in text     # all rises but rev's are 1
    assert "| heads that no longer match themselves |  |" in text


def test_what_predicts_the_points_lost_on_several_mini_bases(tmp_path):
    """The points lost are twice the rise of the loss on wiki, for one M0 with 10 points more: a line through the other M0 misses them."""
    rows = []
    for M0, first, more in ((1, "bio", 0), (1, "rev", 0), (2, "bio", 10), (2, "rev", 10)):
        for base, rise in (("M0", 0.0), ("M1", 1.0), ("M2", 2.0)):
            lost = 2 * rise + more * (base != "M0")
            rows.append({"cell": {"part": "domains", "first": first, "M0": M0}, "base": base, "heldout": {"wiki": 5.0 + rise}, "l2": 1.0,
                         "apply": {"agnews/full": 0.9 - 0.01 * lost, "imdb/full": 0.5}, "heads_kept": 1.0, "commit": "c"})
            if base == "M0":
                rows[-1]["dev"] = {"agnews/full": [0.9, 0.3], "imdb/full": [0.5, 0.5]}      # imdb has not learned
    (tmp_path / "mini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = minilm_report.on_mini(tmp_path)
    assert "2 bases M0 of the mini preset" in text and "loses on 8 bases" in text and "the other lineages, of the other M0s, or" in text
    line, = (line for line in text.splitlines() if line.startswith("| rise of the loss on wiki"))
    assert line.split("|")[2].split() == ["+1.00", "[+1.00,", "+1.00]"] and line.split("|")[4].strip() == "10.00"
    assert float(line.split("|")[3]) == pytest.approx(20 / 3, abs=.01)      # of three other lineages, two have the other M0


def test_what_lies_in_one_task_alone_is_not_shown():
    cells = {(task, L): value for task, value in (("x", 1.0), ("y", 0.1), ("z", -0.1)) for L in range(4)}
    (_, _, _, p, *_, word), = minilm_report.verdicts({"line": (cells, 0)})
    assert float(p) < 0.05 and word == "not shown"


def test_a_mini_m0_does_not_get_the_bases_and_deltas_of_minilm(tmp_path):
    for name in ("corpora", "tasks", "M0"):
        (tmp_path / name).mkdir()
    said = here("-m", "experiments.claims.minilm", "--model", "mini", "--data", tmp_path, "--base", tmp_path / "M0", "--home", "x", code=2)
    assert "give it a --home and a --recipes of its own" in said


def test_modes_with_a_teacher_wait_for_the_pilot(tmp_path):
    with pytest.raises(InputError, match="run --only pilot first"):
        minilm.distilling(str(tmp_path))


def test_deltas_of_other_bases_are_tuned_at_the_rate_of_delta_0(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(minilm, "script", lambda c, *command: commands.append(command))
    for kind in KINDS:
        minilm.tuned(minilm.Config("data", home=str(tmp_path)), "M0", "imdb", kind, 0)
    assert [command[command.index("--lr") + 1] for command in commands] == [1e-4, 1e-3]


def test_a_bootstrap_over_tasks_and_lineages_is_wider_than_either():
    cells = {(task, L): a + b for task, a in (("x", 0.0), ("y", 1.0)) for L, b in ((0, 0.0), (1, 0.5))}
    assert minilm_report.crossed(cells) == pytest.approx((0.0, 1.5))
    assert minilm_report.crossed({key: 2.0 for key in cells}) == pytest.approx((2.0, 2.0))


def test_verify_finds_a_digit_that_the_rows_do_not_say(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)      # figures are not compared, and take seconds
    shutil.copytree(ROOT / "results" / "claims", copy := tmp_path / "claims")
    assert "is what the rows say" in here("-m", "experiments.claims", "--verify", "--results", copy)
    text = (copy / "README.md").read_text()
    monkeypatch.setattr(report, "write", lambda folder: (folder / "README.md").write_text(text))     # as just seen, but at once
    (tmp_path / "docs").mkdir()
    for front, page in ((".98765", ""), ("", ".98765")):
        (tmp_path / "README.md").write_text(f"- The paper's claims: a gain of {front}.\n- Other: .4321\n")
        (tmp_path / "docs" / "claims.md").write_text(page)
        with pytest.raises(InputError, match=r"\.98765 is not in"):
            verify(copy, tmp_path)
    at = text.index("0.4")
    (copy / "README.md").write_text(text[:at] + "0.5" + text[at + 3:])
    with pytest.raises(InputError, match="line .* the rows say"):
        verify(copy, ROOT)


@pytest.mark.marathon
def test_every_part_runs_and_is_not_run_again(data, graphs, tokenizer, tmp_path, monkeypatch):      # noqa: F811
    texts = [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]
    shutil.copytree(data / "tasks", tmp_path / "data" / "tasks")
    (tmp_path / "data" / "corpora").mkdir()
    for name in ("wiki", *minilm.DOMAINS):      # held-out parts of at least 128 tokens
        with lzma.open(tmp_path / "data" / "corpora" / f"{name}.txt.xz", "wt") as file:
            file.write("\n".join(texts[:400]))
    base = random_base(tokenizer)
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), tokenizer, {"name": "M0", "number": 0, "config": {"seed": 1}})
    for task in TASKS:
        monkeypatch.setitem(TASKS, task, 24)
    short = "--steps 2 --eval_every 1 --device cpu --no_save_deltas".split()
    every = ["--shots", "none", "--eval_every", "1", *short[4:]]
    tune = "--tune_steps 2 --batch_size 4 --eval_every 1".split()
    for module, name, value in ((minilm, "FEW", ["--shots", "2", *short]), (minilm, "ALL", every),
                                (minilm, "UPGRADE", "--steps 2 --batch_tokens 128 --seq_len 16 --snapshots 1 --device cpu".split()),
                                (recipes.plan, "TUNE", tune)):
        monkeypatch.setattr(module, name, value)
    rows = tmp_path / "results" / "minilm.jsonl"

    def main(only: str, *where: str, model: str = "minilm") -> int:
        places = {"base": "M0", **{name: name for name in ("data", "home", "recipes", "cache", "results")}}
        monkeypatch.setattr(sys, "argv", ["minilm", "--only", only, "--model", model, *(["--where", ",".join(where)] if where else []),
                                          "--lineages", "0", *(x for k, v in places.items() for x in (f"--{k}", str(tmp_path / v)))])
        minilm.main()
        return len(read_rows(rows))

    counts = [main("lineage"), main("parts", "base=M1"), main("pilot"), main("few", "task=imdb", "kind=adapter", "mode=distill"),
              main("order", "task=imdb", "kind=adapter"), main("project", "task=imdb"), main("paths", "task=agnews"),
              main("domains", "first=rev"), main("full", "task=chemprot", "kind=full")]
    assert counts == sorted(set(counts)) and main("lineage") == counts[-1]
    main("domains", "first=rev", model="mini")
    mini = read_rows(tmp_path / "results" / "mini.jsonl")
    assert [row["base"][:2] for row in mini] == ["M0", *(f"M{i}" for i in (1, 1, 2, 2, 3, 3, 4, 4))]
    assert {row["cell"]["M0"] for row in mini} == {1} and mini[0]["dev"].keys() == mini[0]["apply"].keys()
    assert json.loads((tmp_path / "home" / "lineage1-rev" / "summary.json").read_text())["config"]["seed"] == 1
    assert not any("test" in row for row in read_rows(rows) if row["cell"]["part"] == "pilot")
    order, full = ([row for row in read_rows(rows) if row["cell"]["part"] == part] for part in ("order", "full"))
    dev = read_rows(rows)[0]["dev"]     # of M0's own deltas
    assert {row["cell"]["near"]: row["old_dev"] for row in order} == {
        "same": dev["imdb/adapter"], "similar": dev["rotten_tomatoes/adapter"], "different": dev["agnews/adapter"]}
    assert {row["M0"] for row in order + full} == {read_json(tmp_path / "M0" / "meta.json")["fingerprint"]}
    assert "C7: project above the source's own delta" in minilm_report.section(rows.parent)[0]


def test_an_old_delta_that_did_not_learn_is_left_out_by_its_own_dev_score():
    """The row's own score counts, not that of another M0's delta of the same name."""
    rows = made_rows()
    for near, test in (("same", 0.8), ("similar", 0.6)):
        for task, old_dev in (("imdb", [0.54, 0.5]), ("rotten_tomatoes", [0.9, 0.5])):
            cell = {"part": "order", "lineage": 0, "task": task, "kind": "full", "near": near}
            rows.append({"cell": cell, "mode": "init", "seed": 0, "lr": 1e-3, "dev": {"accuracy": 0.6}, "test": {"accuracy": test},
                         "old_dev": old_dev})
    values, _ = minilm_report.primary(minilm_report.Rows(rows))["C4: init from the same task above a similar one"]
    assert values == {("rotten_tomatoes", 0): pytest.approx(0.2)}


def test_the_pilot_chooses_what_is_best_on_dev(tmp_path):
    rows = [{"cell": {"part": "pilot"}, "settings": {"alpha": alpha, "beta": 0, "T": 5}, "dev": {"accuracy": dev}}
            for alpha, dev in ((0.7, 0.2), (0.9, 0.6), (0.7, 0.7))]
    (tmp_path / "minilm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert minilm.distilling(str(tmp_path)) == ("--alpha", 0.9, "--beta", 0, "--T", 5)


def test_parts_of_a_delta_are_what_their_names_say(base, monkeypatch):
    config, seen = DeltaConfig("full"), []
    delta = extract(attach(base, config, 2, 0), base, config, {"labels": ["a", "b"]}).map(lambda name, v: v + 1)
    monkeypatch.setattr(minilm, "apply", lambda base, kept, scale, stale_ok: seen.append(kept))
    minilm.partial_apply(base, delta, 1.0, "norm")
    assert seen[0].diffs and all(bool(v.any()) == ("norm" in name) for name, v in seen[0].diffs.items())
