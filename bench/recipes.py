"""What a recipe of train.py costs: milliseconds per step and peak memory of each switch against plain, as whole commands in turns.

    python -m bench.recipes --init M0 --stream new.txt --other other.txt --task TASK --json out.jsonl

Each row: the switch, the round, milliseconds per step (the seconds of the training loop, without start and evaluation, over its steps), the
seconds of the whole command (--select and --average work outside the loop) and its peak memory in MB. For --replay the base must have been
trained on another domain before. If a command fails, its error replaces the numbers; if plain fails, all would, and the benchmark ends.
On a GPU (--device cuda) commands run in this process, with --graphs, and the memory is the GPU's. The loop's seconds are rounded to .1, so
give more --steps there.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench.machine import commit, device_name
from data.sources import domain_names
from experiments.common import ROOT, run_here
from rt.errors import InputError
from rt.formats.files import read_json
from rt.limits import PositiveInt
from rt.runs.config import parse, run
from rt.runs.log import table

SWITCHES = {"plain": "", "schedule infinite": "--schedule infinite", "replay .2": "--replay .2", "align 10": "--align 10",
            "mix": "--stream {both} --mix {shares}", "mix need": "--stream {both} --mix need --mix_every 10",
            "select": "--select {task} --keep .3", "objective rts": "--objective rts", "objective slm": "--objective slm",
            "mask word": "--mask word", "mask entity": "--mask entity", "average 4": "--average 4 --snapshots 9",
            "max_len 1024": "--max_len 1024", "preserve 10": "--preserve 10", "preserve_by last": "--preserve 10 --preserve_by last",
            "preserve_by predictions": "--preserve 1 --preserve_by predictions",
            "preserve_by attention": "--preserve 1 --preserve_by attention"}


@dataclass
class Config:
    """python -m bench.recipes --init M0 --stream TEXT --other TEXT --task TASK --json FILE"""
    init: str | None = None  # the base that is continued
    stream: str | None = None  # the new text
    other: str = "python"  # mix: another text
    task: str = "math"  # select: a task
    json: str | None = None  # append a row for every command
    device: Literal["cpu", "cuda"] = "cpu"
    steps: PositiveInt = 40  # of a command
    batch_tokens: PositiveInt = 1024  # per step
    rounds: PositiveInt = 3  # of all switches in turn
    cache: str = "runs/cache"  # tokenized corpora


def measure(c: Config, name: str, out: Path) -> dict:
    """Run and measure one command."""
    both = c.stream, c.other
    shares = ",".join(f"{domain}:.5" for domain in domain_names("stream", both))
    flags = [flag.format(both=",".join(both), shares=shares, task=c.task) for flag in SWITCHES[name].split()]
    command = ["train.py", "--init", c.init, "--stream", c.stream, "--steps", str(c.steps), "--batch_tokens", str(c.batch_tokens),
               "--snapshots", "0", "--eval_tokens", "512", "--cache", c.cache, "--out", str(out), "--device", c.device, *flags]
    start = time.perf_counter()
    error, mb = (on_gpu if c.device == "cuda" else as_process)(command)
    if error:
        if name == "plain":
            raise InputError(f"plain failed: {error[-2000:].removeprefix('error: ')}")
        return {"failed": error[-200:]}
    stage, = read_json(out / "summary.json")["stages"]
    return {"ms": round(1000 * stage["seconds"] / c.steps, 1), "mb": round(mb), "seconds": round(time.perf_counter() - start, 1)}


def as_process(command: list[str]) -> tuple[str, float]:
    """(error or "", MB of memory) of a command."""
    child = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             text=True)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    return (error.strip() or f"status {status}") if status else "", usage.ru_maxrss / 1024


def on_gpu(command: list[str]) -> tuple[str, float]:
    """(error or "", MB of the GPU's memory) of a command, run in this process."""
    before = torch.cuda.memory_allocated()      # an earlier command leaves 65 MB
    torch.cuda.reset_peak_memory_stats()
    try:
        run_here({}, *command, "--graphs")
    except InputError as error:
        return str(error), 0.0
    return "", (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if not (c.init and c.stream and c.json):
        raise InputError("--init, --stream and --json are needed: see --help")
    rows = []
    with tempfile.TemporaryDirectory() as folder, open(c.json, "a", encoding="utf-8") as file:
        for turn in range(c.rounds):
            for name in SWITCHES:
                rows.append({"switch": name, "flags": SWITCHES[name], "round": turn, **measure(c, name, Path(folder, f"{name}-{turn}")),
                             "steps": c.steps, "batch_tokens": c.batch_tokens, "device": device_name(torch.device(c.device)),
                             "commit": commit()})
                print(json.dumps(rows[-1]), file=file, flush=True)
    median = {name: [statistics.median(row[of] for row in rows if row["switch"] == name and of in row) for of in ("ms", "mb", "seconds")]
              for name in SWITCHES if any("ms" in row for row in rows if row["switch"] == name)}
    print(table([[name, f"{ms:.1f}", f"{ms / median['plain'][0]:.2f}", f"{mb:.0f}", f"{seconds:.1f}"] for name, (ms, mb, seconds) in
                 median.items()], ["switch", "ms a step", "of plain", "peak MB", "seconds in all"]))


if __name__ == "__main__":
    run(main)
