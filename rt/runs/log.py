"""A run's metrics.jsonl and TensorBoard events, its progress bar, and tables."""
import errno
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Iterable, Iterator, TextIO

import torch
from tqdm import tqdm

from rt.data import Example, Task
from rt.errors import InputError
from rt.formats.files import EVENTS, note, write_errors, write_whole
from rt.formats.untrusted import is_number
from rt.model import Batch, EncoderConfig
from rt.speed.throughput import Throughput
from rt.tune import Hook, ignore, score

SHOWN = 10      # a task's labels that are listed by name; the others are only counted


class Log:
    """Writes metrics.jsonl (or `name`) in a run's folder, one row per line, after the rows `kept` on resuming. Only one rank `writes`. With
    `tensorboard`, Events also gets every row. InputError if the file cannot be written."""
    def __init__(self, folder: Path, kept: list[dict] = [], writes: bool = True, name: str = "metrics.jsonl", tensorboard: bool = False):
        self.file, self.events, self.path = None, None, Path(folder) / name
        if not writes:
            return
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        with write_errors(self.path):
            self.file = self.path.open("ab", buffering=0)       # one write per row: a killed process leaves all of a row or none
            self.events = Events(self.path.parent / EVENTS, kept) if tensorboard else None

    def row(self, **values: Any) -> None:
        if self.file:
            line = (json.dumps(values) + "\n").encode()
            with write_errors(self.path, len(line)):
                if self.file.write(line) < len(line):       # a disk that fills up takes only a part, and gives no error
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if self.events:
                    self.events.row(values)

    def sync(self) -> None:
        """Flush to the disk itself. Called before a checkpoint is written: the rows on disk must not be older than the checkpoint."""
        for file in filter(None, (self.file, self.events and self.events.file)):
            os.fsync(file.fileno())


class Events:
    """Writes the numbers in rows as TensorBoard scalars. Steps count over all stages. A new file voids rows after `kept` in older files."""
    def __init__(self, folder: Path, kept: list[dict]):
        self.event, record = load_tensorboard()
        self.stage, self.before, self.step = None, 0, 0
        for row in kept:
            self.enter(row)
        folder.mkdir(exist_ok=True)
        number = max((int(f.suffix[1:]) for f in folder.glob("events.out.tfevents.*") if f.suffix[1:].isdecimal()), default=-1) + 1
        self.file = (folder / f"events.out.tfevents.{number:05d}").open("xb")     # TensorBoard reads the files in the order of their names
        self.record = record(self.file)
        self.write(file_version="brain.Event:2")
        self.write(step=self.step + 1, session_log={"status": "START"})

    def enter(self, row: dict) -> int:
        """The step of a row, counted over all stages."""
        if row.get("stage") != self.stage:
            self.stage, self.before = row.get("stage"), self.step
        self.step = self.before + row["step"]
        return self.step

    def row(self, row: dict) -> None:
        tags = scalars(row, f"{row['part']}/" if "part" in row else "")
        self.write(step=self.enter(row), summary={"value": [{"tag": tag, "simple_value": number} for tag, number in tags]})

    def write(self, **fields: Any) -> None:
        self.record.write(self.event(wall_time=time.time(), **fields).SerializeToString())
        self.file.flush()


def scalars(row: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(tag, number) for every number in a row except the step. The tag of {"dev": {"accuracy": 0.5}} is dev/accuracy."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif is_number(value) and name != "step":
            yield prefix + name, value


def load_tensorboard() -> tuple[Any, Any]:
    """TensorBoard's classes for an event and an event file. InputError if TensorBoard is not installed."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        raise InputError("--tensorboard: TensorBoard is not installed: pip install -e '.[tensorboard]'") from None
    return Event, RecordWriter


def progress(total: int, what: str, start: int = 0, unit: str = "step") -> tqdm:
    """A progress bar with the time left, on rank 0's terminal only. It disappears when it closes."""
    is_other = os.environ.get("RANK", "0") != "0" or multiprocessing.parent_process() or "TQDM_DISABLE" in os.environ
    disable = True if is_other else None    # None: disable it unless on a terminal
    return tqdm(total=total, initial=start, desc=what, unit=unit, disable=disable, leave=False, dynamic_ncols=True)


class StepBar(AbstractContextManager):
    """The progress bar of a supervised loop: `on_step` and `on_eval` for rt.tune.tune. `record` also gets every row. A step on a `frozen`
    base needs less arithmetic. The speed includes evaluations: on a GPU they first wait for the steps launched before them."""
    def __init__(self, steps: int, what: str, config: EncoderConfig, device: torch.device, precision: torch.dtype, frozen: bool,
                 record: Hook = ignore):
        self.throughput, self.bar = Throughput(config, device, precision, frozen), progress(steps, what)
        self.record, self.skipped, self.best = record, 0, -math.inf

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def on_step(self, batch: Batch) -> None:
        self.throughput.count(batch)
        self.bar.update()

    def on_eval(self, row: dict) -> None:
        self.record(row)
        if row["step"] == 0:
            return self.throughput.restart()
        self.skipped += row.get("skipped", 0)
        self.best = max(self.best, score(row["dev"]))
        self.bar.set_postfix_str(f"{loss_text(row['loss'], self.skipped)}, best dev {score_text(self.best)}, {self.throughput}")


def loss_text(loss: float | None, skipped: int) -> str:
    return ("no loss" if loss is None else f"loss {loss:.3f}") + (f", {skipped} steps skipped" if skipped else "")


def table(rows: list[list], header: list[str]) -> str:
    """An aligned table in plain text. The first column is aligned left, the others right."""
    cells = [header, *([str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def score_text(value: float | None) -> str:
    """A score, or "undefined" if the score is None or not finite, such as a correlation with a constant."""
    return f"{value:.3f}" if is_number(value) else "undefined"


def scores_text(values: dict[str, float | None]) -> str:
    return ", ".join(f"{k} {score_text(v)}" for k, v in values.items())


def tested_text(scores: dict[str, float | None]) -> str:
    """The scores on test, or a remark that test has no labels."""
    return f"test {scores_text(scores)}" if scores else "no labelled test part, so dev is reported"


def task_text(task: Task) -> str:
    """One line: the training labels with their counts, or the range of the training targets, and the sizes of all parts."""
    labels, sizes = [e.label for e in task.parts["train"]], ", ".join(f"{part} {len(found)}" for part, found in task.parts.items())
    if task.is_regression:
        return f"{task.name}: a regression: {len({*labels})} different targets from {min(labels):g} to {max(labels):g} ({sizes})"
    counts, more = Counter(labels), len(task.labels) - SHOWN
    shown = ", ".join(f"{label} {counts[label]}" for label in task.labels[:SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{task.name}: {len(task.labels)} labels: {shown} ({sizes})"


def note_truncated(truncated: int, count: int, seq_len: int, file: TextIO | None = None, flag: str = "--seq_len") -> None:
    """Print how many texts were cut, if any."""
    if truncated:
        print(f"{truncated} of {count} texts are longer than {flag} {seq_len} and were cut", file=file)


def facts_of(task: Task) -> dict:
    """The entries of a delta's `info` that describe its task. `pairs`: whether the texts are pairs; None if some are and some are not."""
    kinds = {example.text_pair is not None for example in task.parts["train"]}
    return {"task": task.name, "task_hash": task.hash, "labels": list(task.labels), "pairs": kinds.pop() if len(kinds) == 1 else None}


def note_pairs(info: dict, examples: Iterable[Example]) -> Iterator[Example]:
    """Yields the examples. Prints a note on stderr at the first that is a pair although the task has single texts, or the reverse."""
    pairs = info.get("pairs")
    for example in examples:
        if pairs is not None and (example.text_pair is not None) != pairs:
            known, given = ("pairs of texts", "a single text") if pairs else ("single texts", "a pair of texts")
            note(f"the task has {known}, and {example.source} is {given}")
            pairs = None
        yield example


def note_changed_task(info: dict, task: Task) -> None:
    """Print a note on stderr if the delta with this `info` was learned on a task whose content differs from that of `task`."""
    if info.get("task_hash", task.hash) != task.hash:
        note(f"the delta was learned on task {info.get('task')} of content {info['task_hash']}; {task.name} is of content {task.hash}: "
             "it has other texts or labels")
