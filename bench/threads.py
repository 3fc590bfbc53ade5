"""How threads share the cores of a CPU: a tuning step (mini, adapter, 16 ragged sequences) alone, and next to the same command.

    python -m bench.threads --json out.jsonl

Each row: the way, the number of commands at once, and the median step of each in ms; None if its steps did not end within --seconds.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from rt.limits import Positive, PositiveInt
from rt.runs.config import parse, run

# set before torch is loaded; rt/__init__.py leaves values alone that are already set
WAYS = {"as here": {}, "libgomp's default": {"GOMP_SPINCOUNT": "300000"}, "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
        "passive": {"GOMP_SPINCOUNT": "0"}, "one thread": {"OMP_NUM_THREADS": "1"}}
TOKENS, LONGEST = 1024, 128


@dataclass
class Config:
    """python -m bench.threads --json FILE"""
    json: str | None = None  # append a row for every measurement
    steps: PositiveInt = 24  # that are timed, after 4 others
    seconds: Positive = 60.0  # for a command, its start included
    child: bool = False  # measure in this process and print its median


def median_step(steps: int) -> float:
    """The median step in milliseconds."""
    import torch

    from bench.roberta import LABELS, stand_in_base
    from bench.train import labelled_batch, uneven
    from rt.deltas import attach
    from rt.kinds import DeltaConfig
    from rt.losses import Loss, trained_weights
    from rt.model import PRESETS, EncoderConfig
    from rt.speed.device import pick_precision
    from rt.tune import Fit, TuneSettings, plain_gradient

    config, device = EncoderConfig(4096, **PRESETS["mini"]), torch.device("cpu")
    model = attach(stand_in_base(config, seed=0), DeltaConfig("adapter"), LABELS, seed=0)
    fit = Fit(trained_weights(model), TuneSettings(steps + 4, 16, 1e-3, steps, 0))
    gradient = plain_gradient(model, Loss(), device, pick_precision("auto", device))
    batch, times = labelled_batch(config, uneven({"tokens": TOKENS, "S": LONGEST})), []
    for step in range(steps + 4):
        begun = time.perf_counter()
        fit.update(step, gradient(batch))
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[4:])


def measure(c: Config, way: str, count: int) -> list[float | None]:
    """The median step of each of `count` commands run at once."""
    command = [sys.executable, "-m", "bench.threads", "--child", "--steps", str(c.steps)]
    running = [subprocess.Popen(command, env=os.environ | WAYS[way], stdout=subprocess.PIPE, text=True) for _ in range(count)]
    end, found = time.monotonic() + c.seconds, []
    for process in running:
        try:
            found.append(round(float(process.communicate(timeout=max(0.1, end - time.monotonic()))[0]), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found.append(None)
    return found


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.child:
        return print(median_step(c.steps))
    import torch

    from bench.machine import device_name, environment
    rows = [environment(False, sys.argv, (), device=device_name(torch.device("cpu")), load=os.getloadavg())]
    for way in WAYS:
        for count in (1, 2):
            rows.append({"way": way, "commands": count, "ms": measure(c, way, count), "steps": c.steps})
            print(*rows[-1].values(), flush=True)
    if c.json:
        with open(c.json, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    run(main)
