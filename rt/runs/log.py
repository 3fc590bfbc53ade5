"""metrics.jsonl of a run, its progress bar, and tables."""
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, TextIO

import torch
from tqdm import tqdm

from rt.data import Task
from rt.formats.files import read_rows, write_all, write_errors, write_whole
from rt.formats.untrusted import is_number
from rt.model import Batch, EncoderConfig
from rt.speed.throughput import Throughput
from rt.tune import score

SHOWN = 10      # labels of a task that are named; of more only how many


class Log:
    """metrics.jsonl (or `name`) of a run's folder, a line a row. `keep` says which old rows stay on resuming; without it none do. Of
    several ranks one `writes`. Raises InputError if the file cannot be written."""

    def __init__(self, folder: Path, keep: Callable[[dict], bool] | None = None, writes: bool = True, name: str = "metrics.jsonl"):
        self.file, self.path = None, Path(folder) / name
        if not writes:
            return
        kept = [row for row in read_rows(self.path) if keep(row)] if keep else []
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self.file = self.path.open("ab", buffering=0)       # a row is one write: a killed process leaves all of it or none

    def row(self, **values: Any) -> None:
        if self.file:
            line = (json.dumps(values) + "\n").encode()
            with write_errors(self.path, len(line)):
                write_all(self.file, line)

    def sync(self) -> None:
        """Flush to the disk itself, before a checkpoint that the rows must not fall behind."""
        if self.file:
            os.fsync(self.file.fileno())


def progress(total: int, what: str, start: int = 0, unit: str = "step") -> tqdm:
    """A bar with the time left on the first rank's terminal, and nothing elsewhere; it leaves no line behind."""
    disable = True if os.environ.get("RANK", "0") != "0" else None      # None: unless on a terminal
    return tqdm(total=total, initial=start, desc=what, unit=unit, disable=disable, leave=False, dynamic_ncols=True)


class StepBar:
    """The bar of a supervised loop, for rt.tune.tune's `on_step` and `on_eval`: the loss, the best score on dev, tokens per second, the
    time left. On a `frozen` base a step has less arithmetic."""

    def __init__(self, steps: int, what: str, config: EncoderConfig, device: torch.device, precision: torch.dtype, frozen: bool = False,
                 runs: int = 1):
        self.throughput = Throughput(config, device, precision, frozen)
        self.bar, self.runs, self.batches = progress(steps, what), runs, 0
        self.skipped, self.best, self.stepped = 0, -math.inf, time.perf_counter()

    def __enter__(self) -> "StepBar":
        self.throughput.restart()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def on_step(self, batch: Batch) -> None:
        self.throughput.count(batch)
        self.batches += 1
        self.bar.update(self.batches // self.runs - self.bar.n)
        self.stepped = time.perf_counter()

    def on_eval(self, row: dict) -> None:
        if row["step"] == 0:
            return self.throughput.restart()
        self.throughput.since += time.perf_counter() - self.stepped     # evaluation is no training
        self.stepped = time.perf_counter()
        self.skipped += row.get("skipped", 0)
        self.best = max(self.best, score(row["dev"]))
        self.bar.set_postfix_str(f"{loss_text(row['loss'], self.skipped)}, best dev {score_text(self.best)}, {self.throughput}")


def loss_text(loss: float | None, skipped: int) -> str:
    """A bar's words: the loss, and how many steps were skipped."""
    return ("no loss" if loss is None else f"loss {loss:.3f}") + (f", {skipped} steps skipped" if skipped else "")


def table(rows: list[list], header: list[str]) -> str:
    """Aligned plain text: first column left, the rest right."""
    cells = [header, *([str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def score_text(value: float | None) -> str:
    """A score; one that is None or not finite is undefined, as a correlation with a constant is."""
    return f"{value:.3f}" if is_number(value) else "undefined"


def scores_text(values: dict[str, float | None]) -> str:
    """Scores in a line of text."""
    return ", ".join(f"{k} {score_text(v)}" for k, v in values.items())


def tested_text(scores: dict[str, float | None]) -> str:
    """The scores on test; none if it has no labels."""
    return f"test {scores_text(scores)}" if scores else "no labelled test part, so dev is what is reported"


def task_text(task: Task) -> str:
    """A line: the labels of train with their counts, or the range of its targets, and the sizes of all parts."""
    labels, sizes = [e.label for e in task.parts["train"]], ", ".join(f"{part} {len(found)}" for part, found in task.parts.items())
    if task.is_regression:
        return f"{task.name}: a regression: {len({*labels})} different targets from {min(labels):g} to {max(labels):g} ({sizes})"
    counts, more = Counter(labels), len(task.labels) - SHOWN
    shown = ", ".join(f"{label} {counts[label]}" for label in task.labels[:SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{task.name}: {len(task.labels)} labels: {shown} ({sizes})"


def note_truncated(truncated: int, count: int, seq_len: int, file: TextIO | None = None) -> None:
    """Print how many texts were cut, if some were."""
    if truncated:
        print(f"{truncated} of {count} texts are longer than --seq_len {seq_len} and were cut", file=file)


def note_changed_task(info: dict, task: Task) -> None:
    """Print to stderr if a delta (with this `info`) was learned on a task of other content than `task`."""
    if info.get("task_hash", task.hash) != task.hash:
        print(f"note: the delta was learned on task {info.get('task')} of content {info['task_hash']}; {task.name} is of content "
              f"{task.hash}: it has other texts or labels", file=sys.stderr)
