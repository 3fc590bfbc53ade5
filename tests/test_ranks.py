"""Ranks (gloo) that die, raise, or start with other flags or files: all end soon, with an exit code other than 0 and the cause in one
sentence. The run can continue from what was saved."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, forked, here

from rt.data import Rows
from rt.errors import InputError
from rt.model import Batch
from rt.runs.resume import checkpoints

SOON = 60       # seconds; a fraction of one if nothing else runs
FLAGS = ("--preset", "tiny", "--vocab_size", "500", "--seq_len", "32", "--batch_tokens", "512", "--eval_tokens", "512", "--device", "cpu",
         "--precision", "fp32", "--dropout", "0.1", "--snapshots", "0")

# train.py, in which rank WHO has other flags, or dies or raises at its ninth batch
SCRIPT = """
import os, signal, sys
import train
from rt import data
from rt.errors import InputError
from rt.runs.config import run

other = os.environ["OTHER"].split() if os.environ["RANK"] == os.environ["WHO"] else []
if other and other[0] == "--":
    sys.argv += other[1:]
elif other:
    whole, steps = data.Rows.masked, []
    def masked(self, numbers):
        steps.append(numbers)
        if len(steps) == 9:     # of which three are made ahead
            if other[0] == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"InputError": InputError, "RuntimeError": RuntimeError}[other[0]]("this batch is bad")
        return whole(self, numbers)
    data.Rows.masked = masked
run(train.main)
"""


@pytest.fixture(scope="module")
def home(graphs, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("ranks")
    lines = [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]
    (home / "one.txt").write_text("\n".join(lines[:300]))
    (home / "two.txt").write_text("\n".join(lines[300:600]))
    (home / "script.py").write_text(SCRIPT)
    return home


def ended(home: Path, out: Path, other: str, who: int = 1, ranks: int = 2, *more) -> list[str]:
    """The errors that ranks print under torchrun if one rank differs. All ranks end within SOON of the first error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", home / "script.py", *FLAGS, "--stream",
         home / "one.txt", "--cache", home / "cache", "--out", out, "--steps", "12", "--save_every", "2", *more], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OTHER": other, "WHO": str(who)})
    started = time.monotonic()
    try:
        _, said = process.communicate(timeout=SOON + 60)        # time to import torch, `ranks` times on few cores
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode != 0 and time.monotonic() - started < SOON + 60
    assert f"{ROOT}/rt" not in said.replace("(" + str(ROOT), "("), said      # none of our tracebacks
    return [line for line in said.splitlines() if line.startswith("error: ")] + [said]


def test_a_killed_rank_ends_all_and_the_run_is_gone_on_with(home, tmp_path):
    *errors, said = ended(home, tmp_path / "out", "KILL")
    assert "Signal 9 (SIGKILL)" in said and all("rank 0: another rank has ended" in error for error in errors)
    assert checkpoints(tmp_path / "out")
    again = ("train.py", *FLAGS, "--stream", home / "one.txt", "--cache", home / "cache", "--steps", "12", "--save_every", "2")
    here(*again, "--accumulation", "2", "--out", tmp_path / "out", "--resume")
    here(*again, "--accumulation", "2", "--out", tmp_path / "whole")
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("out", "whole")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert rows[0][-2]["loss"] == pytest.approx(rows[1][-2]["loss"], rel=1e-4)      # two ranks sum in another order


def raise_at_the_ninth_batch(rank: int) -> None:
    batches, masked = itertools.count(1), Rows.masked

    def bad(self: Rows, numbers: list[int]) -> Batch:
        if next(batches) == 9:
            raise InputError("this batch is bad")
        return masked(self, numbers)

    if rank == 1:
        Rows.masked = bad


@pytest.mark.parametrize("change, words", [
    (raise_at_the_ninth_batch, "error: this batch is bad"),
    (lambda rank: sys.argv.extend(["--lr", "0.5"] * rank), "--lr is 0.5 on rank 1 and None on rank 0")])
def test_a_rank_that_raises_or_has_other_flags_ends_all_in_a_sentence(change, words, home, tmp_path):
    errors = forked("train.py", *FLAGS, "--stream", home / "one.txt", "--cache", home / "cache", "--out", tmp_path / "out", "--steps", "12",
                    code=2, change=change).splitlines()
    assert any(words in error for error in errors), errors
    assert all(words in error or "another rank has ended" in error for error in errors), errors


@pytest.mark.marathon
@pytest.mark.parametrize("ranks, who, other, words", [
    (4, 3, "RuntimeError", "error: rank 3: RuntimeError: this batch is bad"), (4, 0, "InputError", "error: this batch is bad"),
    (3, 0, "KILL", "Signal 9 (SIGKILL)"), (3, 2, "-- --no_such_flag", "there is no flag --no_such_flag"),
    (2, 0, "RuntimeError", "rank 0: RuntimeError"),
    (4, 2, "-- --stream TWO", "--stream is"), (2, 1, "-- --mode tune", "--mode tune is for one process"), (4, 1, "KILL", "Signal 9")])
def test_ranks_the_long_version(ranks, who, other, words, home, tmp_path):
    more = ("--batch_tokens", str(256 * ranks))
    *errors, said = ended(home, tmp_path / "out", other.replace("TWO", str(home / "two.txt")), who, ranks, *more)
    assert words in said, said

