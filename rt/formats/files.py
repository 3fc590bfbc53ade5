"""What a run leaves: metrics.jsonl (a row a step or an evaluation), summary.json, and a progress bar while it works."""
import errno
import io
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from rt.errors import InputError
from rt.formats.untrusted import JSON_BYTES, parse_json, read_bytes

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
    """InputError where writing `path` fails for want of room: how many bytes it `needs` (None: more than are in the folder `part`,
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
        raise InputError(f"{path}: no room to write it: it needs {wants} bytes in {path.parent}, where {free:,} are free for this user or "
                         "fewer by quota; what was there before is as it was") from None


@contextmanager
def making(path: Path) -> Iterator[None]:
    """InputError where what is done inside to make `path` fails: the disk is full or read only, the place another's, or a file."""
    try:
        yield
    except OSError as error:
        raise unmade(path, error) from None


def unmade(path: Path, error: OSError) -> InputError:
    """What there is to say of it."""
    why = "a file is in its way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
    where = f": {error.filename}" if error.filename and str(error.filename) != str(path) else ""
    return InputError(f"{path}: cannot be made ({why}{where}); make room for it, or give another place")


def write_all(file: io.RawIOBase, content: bytes) -> None:
    """To an unbuffered file, whose `write` takes less without an error where a disk fills up."""
    if file.write(content) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed, so that a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """As `write_json`, of any text. InputError where the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    with with_room(path, len(text.encode())):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """A JSON object from a file of ours; InputError says which file is not one."""
    try:
        text = read_bytes(path, JSON_BYTES).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file. A half-written last line (a killed run) is left out; InputError names any
    other that is no row."""
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


def strangers(folder: Path, known: set[str]) -> set[str]:
    """What lies in `folder` beside `known` names and what writing those leaves when it is killed. InputError where it is no folder, or
    none that can be read."""
    try:
        names = {f.name for f in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise InputError(f"{folder} cannot be used as a folder ({error.strerror}): give another --out") from None
    return names - known - {f"{name}.tmp" for name in known} - {LOCK}


def claim(folder: Path, known: set[str]) -> None:
    """InputError where `folder` holds anything but `known` names: what is about to be written would destroy or mix with it."""
    strange = strangers(folder, known)
    if folder.resolve() == Path.cwd():
        raise InputError(f"{folder} is the folder you are in: give another --out")
    if strange:
        raise InputError(f"{folder} holds other things ({', '.join(sorted(strange)[:3])}): give another --out")
