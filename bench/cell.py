"""A cell of a results table: a grid of recycling runs as one sweep, against the same runs one after another.

    python -m bench.cell --json out.jsonl --task TASK --old_base M0 --old_delta DELTA --base M1

The product's commands are run and timed. "alone" is recycle.py without --sweep on `sample` runs of the grid, drawn with seed 0. It counts
the seconds in the rows, from the teacher's run to the score on test, without the start of Python or the reading of bases. The whole sweep
is then timed by the clock, including all of that:

    one at a time       one process on all cores, --side_by_side 1: saves by scoring only the best runs on test and by sharing equal starts
    side by side        one process on all cores, as many runs at once as fit
    workers             side by side, as the command is typed: on a CPU, a process with one thread per core
    ranks               side by side, with the runs shared by `ranks` processes of torchrun (on a CPU, one thread each)

ratio = seconds of all runs alone (mean of the sample times their number) / seconds of the sweep.
"""
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch

from bench.machine import commit, device_name
from rt.errors import InputError
from rt.runs.config import parse, run
from rt.runs.log import table
from rt.runs.sweep import swept
from rt.runs.workers import cores
from rt.speed.device import pick_device

RECYCLE = str(Path(__file__).parent.parent / "recycle.py")
PASSED_ON = ("mode", "delta", "task", "old_base", "old_delta", "base", "shots", "steps", "lr", "device")     # flags of recycle.py


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
    ranks: int = 2  # processes of torchrun
    device: str = "auto"
    ways: tuple[Literal["one at a time", "side by side", "workers", "ranks"], ...] = ("one at a time", "side by side", "workers", "ranks")


def main() -> None:
    c = parse(Config, sys.argv[1:])
    grid = swept(c.sweep)
    if "seed" not in grid:
        raise InputError(f"--sweep {c.sweep}: give the seeds, seed=0,1,2")
    if c.mode == "all" or "," in c.mode:
        raise InputError(f"--mode {c.mode}: give one mode; what is timed is the grid of its runs")
    common = [text for name in PASSED_ON if getattr(c, name) is not None for text in (f"--{name}", str(getattr(c, name)))]
    total, rows = math.prod(map(len, grid.values())), []
    facts = {"config": {k: v for k, v in asdict(c).items() if k != "json"}, "device": device_name(pick_device(c.device)),
             "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    with tempfile.TemporaryDirectory(prefix="cell") as home, open(c.json, "a", encoding="utf-8") as file:
        for way in ("alone", *c.ways):
            if way == "alone":
                times = alone(c, grid, common, Path(home))
                row = {"bench": "cell", "way": way, "runs": len(times), "seconds": sum(times), "per_run": mean(times), "each": times}
            else:
                seconds = sweep(way, c, common, Path(home))
                row = {"bench": "cell", "way": way, "runs": total, "seconds": seconds, "per_run": seconds / total,
                       "ratio": mean(times) * total / seconds}
            rows.append(row)
            file.write(json.dumps(row | facts) + "\n")
            file.flush()
    print(table([[r["way"], r["runs"], f"{r['seconds']:.1f}", f"{r['per_run']:.2f}", f"{r.get('ratio', 1):.2f}"] for r in rows],
                ["way", "runs", "seconds", "a run", "ratio to alone"]))


def alone(c: Config, grid: dict[str, list[str]], common: list[str], home: Path) -> list[float]:
    """Seconds of each of the `sample` runs, one after another."""
    draw, seconds = random.Random(0), []
    for i in range(c.sample):
        point = {name: draw.choice(values) for name, values in grid.items()}
        flags = [text for name, value in point.items() for text in ("--seeds" if name == "seed" else f"--{name}", value)]
        command(RECYCLE, *common, *flags, "--out", str(home / f"alone{i}"))
        seconds += [row["seconds"] for row in json.loads((home / f"alone{i}" / "summary.json").read_text())["rows"]]
    return seconds


def sweep(way: str, c: Config, common: list[str], home: Path) -> float:
    """Seconds of the whole sweep."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={c.ranks}"] if way == "ranks" else []
    whole = ["--workers", "1", "--threads", str(cores())]
    limit = {"one at a time": [*whole, "--side_by_side", "1"], "side by side": whole}.get(way, [])
    started = time.perf_counter()
    command(*torchrun, RECYCLE, *common, "--sweep", c.sweep, *limit, "--out", str(home / way.replace(" ", "-")))
    return time.perf_counter() - started


def command(*arguments: str) -> None:
    """Run Python with these arguments. InputError if it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"python {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    run(main)
