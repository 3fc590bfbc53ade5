"""Our JSON and JSONL files, written whole or not at all, and checks of folders before anything is written to them. No torch here."""
import errno
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Iterator

from rt.errors import InputError
from rt.formats.untrusted import JSON_BYTES, parse_json

# in a run's folder
FIGURES = "figures"         # rt/report/plot.py draws into it; no command refuses or removes it
EVENTS = "tensorboard"      # rt/runs/log.py: the rows for TensorBoard, with --tensorboard
LOCK = ".lock"              # rt/formats/atomic.py: the lock, if it cannot be next to the folder


@cache      # prints each text once
def note(text: str) -> None:
    """Tell the user, on rank 0's standard error, that something is read differently from what they may expect."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or an error that led to it, says that a disk or quota is full. Libraries in Rust say so only in words."""
    return error is not None and (getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                                  or re.search(r"No space left|quota exceeded|File too large", str(error)) is not None
                                  or is_full(error.__cause__ or error.__context__))


@contextmanager
def write_errors(path: Path, needs: int | None = None, part: Path | None = None) -> Iterator[None]:
    """Turn the errors of writing `path` into an InputError: no room (for `needs` bytes), a read-only disk, a file in the way. If other code
    writes into the folder `part` in the block, only lack of room becomes an InputError, and `part` is then removed."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            wants = f"{needs:,}" if needs else f"more than {sum(f.stat().st_size for f in part.rglob('*')) if part else 0:,}"
            if part:
                shutil.rmtree(part, ignore_errors=True)
            free = next(shutil.disk_usage(folder).free for folder in path.absolute().parents if folder.exists())
            raise InputError(f"{path}: no room to write it: it needs {wants} bytes in {path.parent}, where {free:,} are free for this user "
                             "or fewer by quota; what was there before is as it was") from None
        if part or not isinstance(error, OSError):
            raise
        why = "a file is in its way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        place = f": {error.filename}" if error.filename and str(error.filename) != str(path) else ""
        raise InputError(f"{path}: cannot be made ({why}{place}); make room for it, or give another place") from None


def write_whole(path: Path, text: str) -> None:
    """Write a text next to `path`, then rename it: a reader sees the old file or the new one, never half. Makes the folder if needed."""
    temporary = path.with_name(path.name + ".tmp")
    with write_errors(path, len(text.encode())):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, missing: dict | None = None) -> dict:
    """The JSON object in a file, or `missing` if there is no file. InputError if `missing` is then None, or the file exceeds JSON_BYTES."""
    if missing is not None and not path.exists():
        return missing
    try:
        with path.open("rb") as file:
            content = file.read(JSON_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:      # ValueError: a NUL in its name
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > JSON_BYTES:
        raise InputError(f"{path}: is longer than {JSON_BYTES >> 20} MB, too long for what it should be")
    value = parse_json(content, path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, if it exists. InputError for a line that is not a JSON object, except the last: a kill may cut it short."""
    lines, rows = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, path)
        except InputError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise InputError(f"{path}, line {number}: is not a row, a JSON object: mend it or take it out")
    return rows


def cut_half_row(path: Path) -> None:
    """Remove a last line that a kill cut short: the row appended to it would be lost."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def unknown_names(folder: Path, known: set[str]) -> list[str]:
    """Names in `folder` that are neither `known` nor left by a killed process of ours. InputError if the folder cannot be read."""
    try:
        names = {f.name for f in folder.iterdir()}
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be used as a folder ({error.strerror}): give another --out") from None
    return sorted(names - known - {f"{name}.tmp" for name in known} - {LOCK})


def check_overwritable(folder: Path, known: set[str]) -> None:
    """InputError if `folder` is the working directory, or holds other names than `known`."""
    if folder.resolve() == Path.cwd():
        raise InputError(f"{folder} is the folder you are in: give another --out")
    if unknown := unknown_names(folder, known):
        raise InputError(f"{folder} holds other things ({', '.join(unknown[:3])}): give another --out")


def other_library(folder: Path) -> str | None:
    """The library whose adapter a folder holds, if it is not PEFT's."""
    if "config" in read_json(folder / "adapter_config.json", {}):
        return "AdapterHub"
    return "OpenDelta" if "delta_type" in read_json(folder / "config.json", {}) else None
