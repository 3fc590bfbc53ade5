"""What a run leaves: metrics.jsonl (a row a step or an evaluation), summary.json, and a progress bar while it works."""
import errno
import io
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from tqdm import tqdm

from rt.config import UsageError
from rt.outside import JSON_BYTES, parse_json, read_bytes

FIGURES = "figures"     # in a run's folder what rt/plot.py drew of it: in nobody's way, and left where it is
LOCK = ".lock"          # rt/folders.py: in a run's folder, where it cannot be beside it


def sync(path: Path) -> None:
    """To the disk itself: a file's content, or what names a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(error: BaseException | None) -> bool:
    """Whether what went wrong, or what led to it, is a full disk or quota; Rust's errors say so in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if re.search(r"No space left|quota exceeded|File too large", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def with_room(path: Path, needs: int | None, part: Path | None = None) -> Iterator[None]:
    """UsageError where writing `path` fails for want of room: how many bytes it `needs` (None: more than are in the folder `part`,
    which goes) and how many are free."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        wants = f"{needs:,}" if needs else f"more than {sum(f.stat().st_size for f in part.rglob('*')) if part else 0:,}"
        if part:
            shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(path.parent).free
        raise UsageError(f"{path}: no room to write it: it needs {wants} bytes in {path.parent}, where {free:,} are free for this user or "
                         "fewer by quota; what was there before is as it was") from None


@contextmanager
def making(path: Path) -> Iterator[None]:
    """UsageError where what is done inside to make `path` fails: the disk is full or read only, the place another's, or a file."""
    try:
        yield
    except OSError as error:
        raise unmade(path, error) from None


def unmade(path: Path, error: OSError) -> UsageError:
    """What there is to say of it."""
    why = "a file is in its way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
    where = f": {error.filename}" if error.filename and str(error.filename) != str(path) else ""
    return UsageError(f"{path}: cannot be made ({why}{where}); make room for it, or give another place")


def write_all(file: io.RawIOBase, content: bytes) -> None:
    """To an unbuffered file, whose `write` takes less without an error where a disk fills up."""
    if file.write(content) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed, so that a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """As `write_json`, of any text. UsageError where the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    with with_room(path, len(text.encode())):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
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
    """The rows of a JSONL file; none where there is no file. A half-written last line (a killed run) is left out; UsageError names any
    other that is no row."""
    lines, rows = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, path)
        except UsageError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{path}, line {number}: is not a row, a JSON object: mend it or take it out")
    return rows


def strangers(folder: Path, known: set[str]) -> set[str]:
    """What lies in `folder` beside `known` names and what writing those leaves when it is killed. UsageError where it is no folder, or
    none that can be read."""
    try:
        names = {f.name for f in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UsageError(f"{folder} cannot be used as a folder ({error.strerror}): give another --out") from None
    return names - known - {f"{name}.tmp" for name in known} - {LOCK}


def claim(folder: Path, known: set[str]) -> None:
    """UsageError where `folder` holds anything but `known` names: what is about to be written would destroy or mix with it."""
    strange = strangers(folder, known)
    if folder.resolve() == Path.cwd():
        raise UsageError(f"{folder} is the folder you are in: give another --out")
    if strange:
        raise UsageError(f"{folder} holds other things ({', '.join(sorted(strange)[:3])}): give another --out")


class Log:
    """metrics.jsonl (or `name`) of one run folder, a line a row, flushed as written. `keep` says which old rows stay on resuming: without
    it none. With several ranks one `writes`. UsageError where it cannot be written."""

    def __init__(self, folder: Path, keep: Callable[[dict], bool] | None = None, writes: bool = True, name: str = "metrics.jsonl"):
        self.file, self.path = None, Path(folder) / name
        if not writes:
            return
        kept = [row for row in read_rows(self.path) if keep(row)] if keep else []
        with making(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self.file = self.path.open("ab", buffering=0)       # a row is one write: a killed process leaves all of it or none

    def row(self, **values: Any) -> None:
        if self.file:
            line = (json.dumps(values) + "\n").encode()
            with with_room(self.path, len(line)):
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
