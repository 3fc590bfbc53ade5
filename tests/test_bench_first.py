"""bench.first in Triton's interpreter: each part runs once, an interrupted call resumes, and the table states the results."""
import importlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import first, follow
from rt.runs.config import parse


@pytest.fixture
def interpreted(monkeypatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here; TRITON_INTERPRET=1 interprets them")
    monkeypatch.setenv("RT_KERNELS", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "first.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_rehearsal(interpreted, tmp_path, capsys):
    first.main(["--out", str(tmp_path)])
    rows, printed = rows_of(tmp_path), capsys.readouterr().out
    assert {r["unit"].split()[0] for r in rows[1:]} == {"check", "time", "parts", "tile", "step:"}
    assert not [r for r in rows if "failed" in r and "hf" not in r["unit"]] and all(r["right"] for r in rows if "right" in r)
    assert "checks are right" in printed and "WRONG" not in printed and "step step: ours" in printed      # hf only if it is installed
    assert "best other sdpa math" in printed

    # cut off in the middle of the fourth row: what is whole is kept, and nothing runs twice, except what failed in an earlier call
    lines = (tmp_path / "first.jsonl").read_text().splitlines()
    (tmp_path / "first.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    wrong = json.dumps(rows[4] | {"right": False})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "first.jsonl").write_text("\n".join([wrong, *(line for line in lines[5:] if "failed" not in line)]) + "\n")
    first.main(["--out", str(tmp_path), "--have", str(tmp_path / "old" / "first.jsonl")])
    again = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [r["unit"] for r in again[3:] if "unit" in r and "hf" not in r["unit"]] == [rows[3]["unit"], rows[4]["unit"]]
    assert again[:3] == rows[:3]


def test_nothing_is_begun_when_the_time_is_over(interpreted, tmp_path):
    first.main(["--out", str(tmp_path), "--seconds", "0"])
    assert [r.get("unit") for r in rows_of(tmp_path)] == [None]


def test_a_broken_context_hands_over_to_a_new_process(tmp_path, monkeypatch):
    """The new process has all rows in the file, and the same deadline."""
    def broken() -> None:
        raise RuntimeError("illegal memory access")

    there = first.First(torch.device("cpu"))
    there.cuda, started = True, []
    there.units = lambda: iter([("check a", lambda: 1 / 0), ("check b", dict)])
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(first, "environment", lambda *arguments: {})
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments) or exit())
    with pytest.raises(SystemExit):
        first.run(there, tmp_path / "first.jsonl", [], 4e9, ["--out", "x"])
    assert rows_of(tmp_path)[1]["failed"].startswith("ZeroDivisionError") and started[0][1:] == ["-m", "bench.first", "--out", "x",
                                                                                              "--until", "4000000000.0"]


def test_a_unit_that_hangs_is_left_to_a_new_process_which_does_the_rest(tmp_path, monkeypatch):
    there, started = first.First(torch.device("cpu")), threading.Event()
    there.units = lambda: iter([("check a", lambda: started.wait(20) and {}), ("check b", dict)])
    monkeypatch.setattr(first, "UNIT_SECONDS", 0.1)
    monkeypatch.setattr(first, "environment", lambda *arguments: {})
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.set())
    first.run(there, tmp_path / "first.jsonl", [], 4e9, [])
    assert started.is_set() and (tmp_path / "begun").read_text() == "check a\ncheck b\n"
    rows = rows_of(tmp_path)
    assert rows[1] == {"unit": "check a", "failed": "longer than 0.1 s", "hopeless": True} and rows[-1]["unit"] == "check b"


def test_a_unit_that_was_cut_off_is_tried_again_and_one_that_ends_the_process_twice_is_not(tmp_path):
    (tmp_path / "begun").write_text("check a\n")
    assert first.known(tmp_path / "first.jsonl") == []
    (tmp_path / "begun").write_text("check a\ncheck a\n")
    assert first.known(tmp_path / "first.jsonl") == [{"unit": "check a", "failed": "it ended the process twice", "hopeless": True}]


def test_other_commands_follow_in_the_time_that_is_left(tmp_path, monkeypatch):
    """Those with a budget continue their own rows; the others are not repeated once they succeeded."""
    out, home, ran = tmp_path / "out", tmp_path / "home", []
    out.mkdir()

    def command(arguments, stdout, timeout, **_):
        ran.append(arguments[1:])
        stdout.write("said")
        if "bench.kernels" in arguments:
            raise subprocess.TimeoutExpired(arguments, timeout)
        if "--out" in arguments:
            Path(arguments[arguments.index("--out") + 1], "M1").mkdir(parents=True)
        return SimpleNamespace(returncode=int("bench.recycle" in arguments))

    monkeypatch.setattr(follow.subprocess, "run", command)
    rows: list[dict] = []
    follow.follow(out, home, "DATA", None, rows, time.time() + follow.LEAST - 1)
    assert not rows and not ran
    follow.follow(out, home, "DATA", None, rows, time.time() + 100)
    assert rows == rows_of(out) and {r["command"]: r["code"] for r in rows} == {
        "train": 0, "kernels": None, "recycle": 1, "demo": 0, "old-delta": 0, "cell": 0, "claims": 0}
    assert ran[0][:6] == ["-m", "bench.train", "--json", str(out / "train.jsonl"), "--resume", "--sizes"] and ran[0][-2] == "--budget"
    assert 95 <= int(ran[0][-1]) <= 100 and "--budget" not in ran[3] and (out / "train.log").read_text() == "said"
    assert "train: code 0 after 0 s" in first.table(rows)
    (tmp_path / "old").mkdir()
    for name in ("first", "kernels"):
        (tmp_path / "old" / f"{name}.jsonl").write_text("old rows")
    follow.follow(out, home, None, tmp_path / "old" / "first.jsonl", rows, time.time() + 100)
    assert (out / "kernels.jsonl").read_text() == "old rows" and rows == rows_of(out)
    assert [r["command"] for r in rows[7:]] == ["train", "kernels", "recycle"]
    for script, arguments in ((a[0] if a[0] != "-m" else a[1], a) for a in ran):      # the flags exist
        config = importlib.import_module(script.removesuffix(".py") if script != "experiments.claims" else script + ".__main__").Config
        given = arguments[1 if arguments[0] != "-m" else 2:]
        parse(config, [{"DATA": str(tmp_path)}.get(a, a) for a in given])


def test_the_table_names_what_is_wrong_and_the_best_of_a_sweep():
    rows = [{"unit": "check a: ours", "right": False, "error": 2.0}, {"unit": "check b: ours", "right": True},
            {"unit": "time case: ours", "forward": 2.0, "forward_tflops": 300.0}, {"unit": "time case: sdpa flash", "forward": 3.0},
            {"unit": "tile k dropout 0.1: (1, 2)", "backward": 5.0}, {"unit": "tile k dropout 0.1: (3, 4)", "backward": 4.0},
            {"unit": "time case: sdpa cudnn", "failed": "no"}]
    assert first.table(rows).splitlines() == [
        "1 of 2 checks are right", "WRONG check a: ours: {'right': False, 'error': 2.0}",
        "time case forward: ours 2.000 ms, 300 tflops; best other sdpa flash 3.000 ms = 1.50",
        "tile k dropout 0.1 backward: (1, 2) 5.000 ms; best other (3, 4) 4.000 ms = 0.80", "failed time case: sdpa cudnn: no"]
