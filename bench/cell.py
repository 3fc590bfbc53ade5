"""A cell of a results table: a grid of recycling runs by one sweep, against the same runs one after another.

    python -m bench.cell --json out.jsonl --task TASK --old_base M0 --old_delta DELTA --base M1

Commands of the product are run and timed. "alone" is recycle.py without --sweep on `sample` runs of the grid, drawn by seed 0: its rows'
own seconds, from the teacher's run to the score on test, without the start of Python or the reading of bases. Then the whole sweep by the
clock, all of that counted in:

    one at a time       --side_by_side 1: what is saved by scoring test for the best runs only and equal starts once
    side by side        as many at once as fit
    ranks               side by side, the runs shared by `ranks` processes of torchrun, on a CPU of one thread each

ratio = seconds of all runs alone (mean of the sample times their number) / seconds of the sweep.
"""
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from bench.machine import commit, device_name
from rt.errors import InputError
from rt.runs.config import parse, run
from rt.runs.log import table
from rt.runs.sweep import swept
from rt.speed.device import pick_device

RECYCLE = str(Path(__file__).parent.parent / "recycle.py")


@dataclass
class Config:
    """The flags of `python -m bench.cell`."""
    json: str = "cell.jsonl"  # append a row for each way
    task: str = "math"  # as in recycle.py, and so on
    old_base: str = "runs/demo/M0"
    old_delta: str | None = None
    base: str = "runs/demo/M1"
    mode: str = "init+distill"
    delta: str = "adapter"
    shots: int = 32  # examples a label
    steps: int = 50
    lr: float = 1e-3
    sweep: str = "seed=20,30,40 alpha=.7,.9 beta=0,1,5,10,50,100 T=5,10,20"  # 108 runs
    sample: int = 6  # runs done alone
    ranks: int = 2  # processes of the shared sweep
    device: str = "auto"
    ways: tuple[str, ...] = ("one at a time", "side by side", "ranks")  # of sweeping


def main() -> None:
    c = parse(Config, sys.argv[1:])
    grid = swept(c.sweep)
    if "seed" not in grid:
        raise InputError(f"--sweep {c.sweep}: give the seeds, seed=0,1,2")
    total, home = 1, Path(tempfile.mkdtemp(prefix="cell"))
    for values in grid.values():
        total *= len(values)
    common = ["--mode", c.mode, "--delta", c.delta, "--task", c.task, "--old_base", c.old_base, "--base", c.base, "--shots", str(c.shots),
              "--steps", str(c.steps), "--lr", str(c.lr), "--device", c.device]
    common += ["--old_delta", c.old_delta] if c.old_delta else []
    asked = {k: v for k, v in vars(c).items() if k != "json"}
    about = {"config": asked, "device": device_name(pick_device(c.device)), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "commit": commit()}
    rows: list[dict] = []

    def enter(way: str, runs: int, seconds: float, **more) -> None:
        rows.append({"bench": "cell", "way": way, "runs": runs, "seconds": seconds, "per_run": seconds / runs, **more})
        with open(c.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1] | about) + "\n")

    try:
        each = alone(c, grid, common, home)
        enter("alone", len(each), sum(each), each=each)
        for way in c.ways:
            took = swept_whole(way, c, common, home)
            enter(way, total, took, ratio=mean(each) * total / took)
    finally:
        shutil.rmtree(home)
    lines = [[r["way"], r["runs"], f"{r['seconds']:.1f}", f"{r['per_run']:.2f}", f"{r.get('ratio', 1):.2f}"] for r in rows]
    print(table(lines, ["way", "runs", "seconds", "a run", "ratio to alone"]))


def alone(c: Config, grid: dict[str, list[str]], common: list[str], home: Path) -> list[float]:
    """Seconds of each of `sample` runs, one after another."""
    draw, seconds = random.Random(0), []
    for i in range(c.sample):
        point = {name: draw.choice(values) for name, values in grid.items()}
        flags = [text for name, value in point.items() for text in ("--seeds" if name == "seed" else f"--{name}", value)]
        command(RECYCLE, *common, *flags, "--out", str(home / f"alone{i}"))
        rows = json.loads((home / f"alone{i}" / "summary.json").read_text())["rows"]
        seconds += [row["seconds"] for row in rows]
    return seconds


def swept_whole(way: str, c: Config, common: list[str], home: Path) -> float:
    """Seconds of the whole sweep."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={c.ranks}"]
    script = [*torchrun, RECYCLE] if way == "ranks" else [RECYCLE]
    limit = ["--side_by_side", "1"] if way == "one at a time" else []
    started = time.perf_counter()
    command(*script, *common, "--sweep", c.sweep, *limit, "--out", str(home / way.replace(" ", "-")))
    return time.perf_counter() - started


def command(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"python {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    run(main)
