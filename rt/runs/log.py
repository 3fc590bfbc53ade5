"""metrics.jsonl of a run, its progress bar, and tables."""
import json
import os
from pathlib import Path
from typing import Any, Callable

from tqdm import tqdm

from rt.formats.files import read_rows, write_all, write_errors, write_whole


class Log:
    """metrics.jsonl (or `name`) of one run folder, a line a row, flushed as written. `keep` says which old rows stay on resuming: without
    it none. With several ranks one `writes`. InputError where it cannot be written."""

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
        """To the disk itself: before a checkpoint that the rows must not fall behind."""
        if self.file:
            os.fsync(self.file.fileno())


def progress(total: int, what: str, start: int = 0, unit: str = "step") -> tqdm:
    """A bar with the time left on a terminal, nothing elsewhere (`disable=None`), nor on ranks but the first; it leaves no line behind."""
    other = os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, initial=start, desc=what, unit=unit, disable=True if other else None, leave=False, dynamic_ncols=True)


def loss_text(loss: float | None, skipped: int) -> str:
    """Of a loop, for its bar: the loss, and how many steps were skipped."""
    return ("no loss" if loss is None else f"loss {loss:.3f}") + (f", {skipped} steps skipped" if skipped else "")


def table(rows: list[list], header: list[str]) -> str:
    """Aligned plain text: first column left, the rest right."""
    cells = [header] + [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
             for row in cells]
    return "\n".join(line.rstrip() for line in lines)
