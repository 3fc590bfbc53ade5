"""What a run leaves: metrics.jsonl (a row a step or an evaluation), summary.json, and a progress bar while it works."""
import json
import os
from pathlib import Path
from typing import Any, Callable

from tqdm import tqdm

from rt.config import UsageError
from rt.outside import JSON_BYTES, parse_json, read_bytes

FIGURES = "figures"     # in a run's folder what rt/plot.py drew of it: in nobody's way, and left where it is

def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed, so that a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """A JSON object from a file of ours; UsageError says which file is not one."""
    try:
        text = read_bytes(path, JSON_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return value


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file. A half-written last line (a killed run) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            row = parse_json(line, path)
        except UsageError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def claim(folder: Path, known: set[str]) -> None:
    """UsageError where `folder` holds anything but `known` names: what is about to be written would destroy or mix with it."""
    strange = {f.name for f in folder.iterdir()} - known if folder.is_dir() else set()
    if folder.resolve() == Path.cwd():
        raise UsageError(f"{folder} is the folder you are in: give another --out")
    if strange:
        raise UsageError(f"{folder} holds other things ({', '.join(sorted(strange)[:3])}): give another --out")


class Log:
    """metrics.jsonl of one run folder, a line a row, flushed as written. `keep` says which old rows stay on resuming; with several
    ranks one `writes`."""

    def __init__(self, folder: Path, keep: Callable[[dict], bool] = lambda row: False, writes: bool = True):
        self.file = None
        if not writes:
            return
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(row) + "\n" for row in read_rows(self.path) if keep(row)]
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self.file = self.path.open("a", encoding="utf-8")

    def row(self, **values: Any) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()


def progress(total: int, what: str, start: int = 0, unit: str = "step") -> tqdm:
    """A bar with the time left on a terminal, nothing elsewhere (`disable=None`), nor on ranks but the first; it leaves no line behind."""
    other = os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, initial=start, desc=what, unit=unit, disable=True if other else None, leave=False, dynamic_ncols=True)


def table(rows: list[list], header: list[str]) -> str:
    """Aligned plain text: first column left, the rest right."""
    cells = [header] + [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
             for row in cells]
    return "\n".join(line.rstrip() for line in lines)
