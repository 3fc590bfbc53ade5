"""Commands killed at random moments, also while they write, and given again: they end with the weights, rows and summary of one that
nobody disturbed, bit for bit. SIGTERM and Ctrl-C; a full disk; the same command twice.

    pytest tests/crash                  # KILLS["ci"] kills
    pytest -m marathon tests/crash      # KILLS["marathon"]
"""
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT

from rt.formats.files import read_rows

KILLS = {"ci": {"pretrain": 5, "tune": 2, "recycle": 2, "recycle, resumed": 2, "sweep": 2},
         "marathon": {"pretrain": 100, "tune": 30, "recycle": 20, "recycle, resumed": 20, "sweep": 30}}
IN_A_ROW = 3        # kills until a command may end
SLOW = (0, 0.03)        # seconds of pause at each step of writing a folder, in turn: with it a third or more of the time is spent writing
TIMES = {"seconds", "argv", "config"}     # what may differ; the config names the folder
CPU = ("--device", "cpu", "--precision", "fp32")
PRETRAIN = ("train.py", "--preset", "tiny", "--vocab_size", "400", "--seq_len", "32", "--batch_tokens", "256", "--eval_tokens", "512", *CPU,
            "--steps", "9,7", "--save_every", "3", "--snapshots", "1", "--dropout", "0.1")
TUNE = ("train.py", "--mode", "tune", "--delta", "lora", "--tune_steps", "12", "--eval_every", "3", "--batch_size", "4", "--seq_len", "24",
        *CPU)
RECYCLE = ("recycle.py", "--delta", "lora", "--steps", "6", "--eval_every", "3", "--batch_size", "4", "--seq_len", "24", "--shots", "4",
           "--lr", "5e-3", *CPU)


class Commands:
    """Gives commands to tests/crash/server.py."""

    def __init__(self, home: Path):
        self.home, self.server = home, subprocess.Popen(
            [sys.executable, Path(__file__).with_name("server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

    def __call__(self, *argv, send: int = 0, after: float = 60.0, slow: float = 0, until: Path | None = None) -> tuple[int, str]:
        """(exit code, what was printed) of a command that gets the signal `send` after so many seconds, or when the file `until` is there,
        unless it has ended before. Without one it must end by itself within `after` seconds."""
        log = self.home / "log"
        asked = {"argv": list(map(str, argv)), "slow": slow, "log": str(log)}
        self.server.stdin.write((json.dumps(asked) + "\n").encode())
        pid, end = int(self.server.stdout.readline()), time.monotonic() + after
        assert pid > 1, "not a process of ours to kill"
        while until is not None and not until.exists() and time.monotonic() < end:
            time.sleep(0.002)
        left = max(0.0, end - time.monotonic()) if until is None else 0.0
        if not select.select([self.server.stdout], [], [], left)[0]:
            with suppress(ProcessLookupError):      # it has ended in between
                os.kill(pid, send or signal.SIGKILL)
        code = int(self.server.stdout.readline())
        assert send or code != -signal.SIGKILL, f"not done in {after} s: {log.read_text()}"
        return code, log.read_text()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(10)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def home(graphs, commands, tmp_path_factory) -> dict:
    """Two corpora, a task, two undisturbed runs of each command, how long the second took, and the commands without --out."""
    home = tmp_path_factory.mktemp("crash")
    lines = [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]
    for name, part in (("one", lines[:200]), ("two", lines[200:400])):
        (home / f"{name}.txt").write_text("\n".join(part))
    (home / "task").mkdir()
    for part, count in (("train", 24), ("dev", 12), ("test", 12)):
        rows = [json.loads(line) for line in (graphs / "task" / f"{part}.jsonl").open()]
        two = [{"text": r["text"][:100], "label": r["label"]} for r in rows if r["label"] in ("generators", "classes")]
        (home / "task" / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in two[:count]))
    data = ("--cache", home / "cache")
    bases = ("--old_base", home / "pretrain" / "M0", "--base", home / "pretrain" / "M1", "--old_delta", home / "tune")
    given = {"pretrain": (*PRETRAIN, "--stream", f"{home}/one.txt,{home}/two.txt", *data),
             "tune": (*TUNE, "--base", home / "pretrain" / "M0", "--task", home / "task", *data),
             "recycle": (*RECYCLE, *bases, "--task", home / "task", "--mode", "scratch,apply,init+distill", "--seeds", "0,1", *data),
             # one run at a time: what is left of a group is trained in a smaller one, which rounds differently
             "sweep": (*RECYCLE, *bases, "--task", home / "task", "--mode", "apply,init+distill", "--sweep", "seed=0,1 alpha=.5,.9",
                       "--side_by_side", "1", *data)}
    given["recycle, resumed"] = (*given["recycle"], "--workers", "2")
    seconds = {}
    for name, argv in given.items():
        for out in (name, f"{name} twice"):
            begun = time.monotonic()
            code, said = commands(*argv, "--out", home / out)
            seconds[name] = time.monotonic() - begun        # of the second, which need not tokenize
            assert code == 0, said
    return {"home": home, "given": given, "seconds": seconds}


def timeless(value):
    """Without what differs from call to call."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def left(folder: Path) -> dict:
    """All that a command has left, by name: tensors as bytes, rows and facts without times; the hashes of facts that hold times not."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = read_rows(path)
            assert len(found[name]) == path.read_bytes().count(b"\n"), f"half a row in {path}"
        elif path.name in ("meta.json", "delta.json", "summary.json"):
            facts = timeless(json.loads(path.read_text()))
            facts.get("sha256", {}).pop(path.name, None)
            facts.get("info", {}).pop("config", None)
            found[name] = facts
        else:
            found[name] = path.read_bytes()
    return found


def same(a: Path, b: Path) -> None:
    one, other = left(a), left(b)
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    for name in one:
        assert one[name] == other[name], name
    strange = [p.name for p in b.parent.iterdir() if p.name.startswith(b.name + ".")]
    assert not strange, strange


def reached(out: Path) -> tuple:
    """The furthest stage and step of a whole checkpoint."""
    places = (*out.glob("*/meta.json"), *out.glob("resume/*/meta.json"))
    facts = [json.loads(path.read_text()) for path in places if path.parent.suffix != ".part"]
    return max(((meta["name"], meta["step"]) for meta in facts), default=())


def newest(out: Path) -> dict:
    """The facts of the newest resumable checkpoint."""
    return json.loads(max((out / "resume").glob("*/meta.json")).read_text())


def killed_and_given_again(name: str, kills: int, seed: int, home: dict, commands: Commands) -> tuple[int, int]:
    """Kill the command `kills` times in all, over as many runs as it takes, and compare each run's end; returns in how many runs, and how
    many of the kills hit a folder that was being written or renamed."""
    draw, argv, runs, done, writing = random.Random(f"{name} {seed}"), home["given"][name], 0, 0, 0
    while done < kills:
        out, slow = home["home"] / "again" / f"{name}-{seed}-{runs}", SLOW[runs % 2]
        again = ()
        far = reached(out)
        span = home["seconds"][name] * (1 if slow == 0 else 2)
        for _ in range(min(IN_A_ROW, kills - done)):
            code, said = commands(*argv, "--out", out, *again, send=signal.SIGKILL, after=draw.uniform(0, span), slow=slow)
            assert code in (0, -signal.SIGKILL), said
            if code == 0:
                break
            done += 1
            assert reached(out) >= far, "less is left than there was before the kill"
            far = reached(out)
            writing += any(p.suffix == ".part" for p in (*out.parent.glob(f"{out.name}.*"), *out.rglob("*.*")))
            again = ("--resume",) if name in ("pretrain", "recycle, resumed") else ()
        code, said = commands(*argv, "--out", out, *again)
        assert code == 0, said
        same(home["home"] / name, out)
        runs += 1
    return runs, writing


@pytest.mark.parametrize("name", KILLS["ci"])
def test_a_killed_command_given_again_ends_as_if_nothing_had_happened(name, home, commands):
    killed_and_given_again(name, KILLS["ci"][name], 0, home, commands)


@pytest.mark.marathon
@pytest.mark.parametrize("name", KILLS["marathon"])
def test_so_it_does_after_many_kills(name, home, commands):
    begun = time.monotonic()
    runs, writing = killed_and_given_again(name, KILLS["marathon"][name], 1, home, commands)
    print(f"\n{name}: {KILLS['marathon'][name]} kills in {runs} runs, {writing} of them while a folder was written; "
          f"{time.monotonic() - begun:.0f} s")


def test_the_same_command_twice_and_another_seed(home, commands, tmp_path):
    for name in home["given"]:
        same(home["home"] / name, home["home"] / f"{name} twice")
    same(home["home"] / "recycle", home["home"] / "recycle, resumed")       # one process, and two
    for name in ("pretrain", "recycle"):        # on a CPU the flag changes nothing, and nothing there lacks such a way
        code, said = commands(*home["given"][name], "--out", tmp_path / name, "--deterministic")
        assert code == 0, said
        same(home["home"] / name, tmp_path / name)
    for name, file in (("pretrain", "M0/model.safetensors"), ("tune", "delta.safetensors")):
        assert commands(*home["given"][name], "--out", tmp_path / "other" / name, "--seed", "7")[0] == 0
        assert (home["home"] / name / file).read_bytes() != (tmp_path / "other" / name / file).read_bytes()


@pytest.mark.parametrize("number, code, word", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_signal_leaves_a_resumable_checkpoint(number, code, word, home, commands, tmp_path):
    argv = (*home["given"]["pretrain"], "--out", tmp_path / "run", "--save_every", "1000")
    # which is followed by a pause, or on a busy machine all steps may be done before the signal is sent
    ended, said = commands(*argv, send=number, until=tmp_path / "run" / "M0-t00004", slow=0.3)
    assert ended == code and said.splitlines()[-1].startswith(f"{word}: stopped in M0 after step "), said
    assert "Traceback" not in said and said.splitlines()[-1].endswith("the same command with --resume goes on")
    step = int(said.split("after step ")[1].split()[0])
    rows, last = read_rows(tmp_path / "run" / "metrics.jsonl"), newest(tmp_path / "run")
    assert last["step"] == step == len(rows)
    assert commands(*argv, "--resume")[0] == 0
    same(home["home"] / "pretrain", tmp_path / "run")


@pytest.mark.parametrize("name", ["tune", "recycle", "recycle, resumed", "sweep"])
def test_a_signal_ends_the_others_with_a_sentence(name, home, commands, tmp_path):
    out = tmp_path / name
    begun = {"tune": out.with_name("tune.part"), "sweep": out / "deltas"}.get(name, out / "summary.json")
    code, said = commands(*home["given"][name], "--out", out, send=signal.SIGTERM, until=begun, slow=0.1)
    how = {"tune": "", "sweep": "; the same command goes on"}.get(name, "; the same command with --resume goes on")
    assert code == 143 and said.splitlines()[-1] == "terminated: what was finished is kept" + how and "Traceback" not in said, said
    assert commands(*home["given"][name], "--out", out)[0] == 0
    same(home["home"] / name, out)


def test_a_second_process_on_the_run_is_refused(home, commands, tmp_path):
    """A process that stands still in its writing; the second one, a command as typed, is told of it."""
    argv = (*home["given"]["pretrain"], "--out", tmp_path / "run")
    asked = {"argv": list(map(str, argv)), "slow": 60, "log": str(tmp_path / "log")}
    commands.server.stdin.write((json.dumps(asked) + "\n").encode())
    pid = int(commands.server.stdout.readline())
    try:
        while not list((tmp_path / "run" / "resume").glob("*.part")):
            time.sleep(0.01)
        second = subprocess.run([sys.executable, *map(str, argv), "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    finally:
        os.kill(pid, signal.SIGKILL)
        commands.server.stdout.readline()
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"is being written to by process {pid} on {os.uname().nodename}" in second.stderr
    assert commands(*argv, "--resume")[0] == 0
    same(home["home"] / "pretrain", tmp_path / "run")
