"""What a recipe of train.py costs: milliseconds per step and peak memory of each switch against plain, as whole commands in turns.

    python -m bench.recipes --init M0 --stream new.txt --json out.jsonl

Each row: the switch, the round, milliseconds per step (the seconds of the training loop, without start and evaluation, over its steps) and
the peak memory of the whole command in MB. For --replay the base must have been trained on another domain before. If a command fails, its
error replaces both numbers; if plain fails, all would, and the benchmark ends.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.machine import commit
from rt.errors import InputError
from rt.formats.files import read_json
from rt.limits import PositiveInt
from rt.runs.config import parse, run
from rt.runs.log import table

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = {"plain": "", "schedule infinite": "--schedule infinite", "replay .2": "--replay .2", "align 10": "--align 10",
            "objective rts": "--objective rts", "objective slm": "--objective slm", "mask word": "--mask word",
            "preserve 10": "--preserve 10", "preserve_by last": "--preserve 10 --preserve_by last",
            "preserve_by predictions": "--preserve 1 --preserve_by predictions",
            "preserve_by attention": "--preserve 1 --preserve_by attention"}


@dataclass
class Config:
    """python -m bench.recipes --init M0 --stream TEXT --json FILE"""
    init: str | None = None  # the base that is continued
    stream: str | None = None  # the new text
    json: str | None = None  # append a row for every command
    steps: PositiveInt = 40  # of a command
    rounds: PositiveInt = 3  # of all switches in turn
    cache: str = "runs/cache"  # tokenized corpora


def measure(c: Config, name: str, out: Path) -> dict:
    """Run and measure one command."""
    command = [sys.executable, str(ROOT / "train.py"), "--init", c.init, "--stream", c.stream, "--steps", str(c.steps), "--snapshots", "0",
               "--eval_tokens", "512", "--cache", c.cache, "--out", str(out), *SWITCHES[name].split()]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        if name == "plain":
            raise InputError(f"plain failed: {error.strip()[-2000:].removeprefix('error: ')}")
        return {"failed": error.strip()[-200:]}
    stage, = read_json(out / "summary.json")["stages"]
    return {"ms": round(1000 * stage["seconds"] / c.steps, 1), "mb": round(usage.ru_maxrss / 1024)}


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if not (c.init and c.stream and c.json):
        raise InputError("--init, --stream and --json are needed: see --help")
    rows = []
    with tempfile.TemporaryDirectory() as folder, open(c.json, "a", encoding="utf-8") as file:
        for turn in range(c.rounds):
            for name in SWITCHES:
                rows.append({"switch": name, "flags": SWITCHES[name], "round": turn, **measure(c, name, Path(folder, f"{name}-{turn}")),
                             "steps": c.steps, "commit": commit()})
                print(json.dumps(rows[-1]), file=file, flush=True)
    median = {name: [statistics.median(row[of] for row in rows if row["switch"] == name and of in row) for of in ("ms", "mb")]
              for name in SWITCHES if any("ms" in row for row in rows if row["switch"] == name)}
    print(table([[name, f"{ms:.1f}", f"{ms / median['plain'][0]:.2f}", f"{mb:.0f}"] for name, (ms, mb) in median.items()],
                ["switch", "ms a step", "of plain", "peak MB"]))


if __name__ == "__main__":
    run(main)
