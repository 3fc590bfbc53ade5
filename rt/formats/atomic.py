"""Folders that appear whole or not at all, whose content can be checked, and that one process at a time writes to. No torch here.

    NAME.part   being written; of no use to anybody
    NAME.new    complete, about to take its place
    NAME        what is read
    NAME.old    the one before: while NAME.new takes its place, or as long as it is to be kept
    NAME.lock   beside a folder that is being written to: by which process, on which host

A process may be killed between any two of these steps: `settle` finishes them, `found` reads what is there.
"""
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterable, Iterator

from rt.errors import InputError
from rt.formats.files import LOCK, claim, making, strangers, sync, unmade, with_room, write_all
from rt.formats.untrusted import is_whole

PIECE = 1 << 22     # bytes of a file that are hashed at a time


def slow() -> None:
    """A pause of RT_SLOW_WRITES seconds: tests kill the process in it."""
    time.sleep(float(os.environ.get("RT_SLOW_WRITES", 0)))


# --- whole or not at all ----------------------------------------------------------------------------------------------

def named(folder: Path, ending: str) -> Path:
    return folder.with_name(f"{folder.name}.{ending}")


def claim_whole(folder: Path, known: set[str]) -> None:
    """As `claim`, of `folder` and of those beside it that `atomic_folder` would replace: they may be somebody else's."""
    claim(folder, known)
    for ending in ("part", "new", "old"):
        beside = named(folder, ending)
        strange = {name for name in strangers(beside, known | {f"{name}.{left}" for name in known for left in ("part", "new", "old")})
                   if not name.startswith(".tmp")}      # what safetensors leaves where it is killed
        if strange:
            raise InputError(f"{beside} holds other things ({', '.join(sorted(strange)[:3])}) and would be lost when {folder} is written: "
                             "move it away, or give another --out")


@contextmanager
def atomic_folder(folder: Path, needs: int | None = None, keep: bool = False) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` when the block ends without an error; `keep` leaves the one before as
    NAME.old. InputError where the disk is full, with the bytes that it `needs`; `folder` is then as it was."""
    folder = Path(folder)
    with making(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        settle(folder)
    part = named(folder, "part")
    shutil.rmtree(part, ignore_errors=True)
    with with_room(folder, needs, part):
        with making(folder):
            part.mkdir()
        slow()
        yield part
        slow()
        for path in (part, *part.rglob("*")):
            sync(path)
    part.rename(named(folder, "new"))
    slow()
    settle(folder)
    if not keep:
        shutil.rmtree(named(folder, "old"), ignore_errors=True)
    sync(folder.parent)


def settle(folder: Path) -> None:
    """Put in its place what a process that was killed had completed, or put back what it had moved out of the way."""
    new, old = named(folder, "new"), named(folder, "old")
    if new.exists():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            slow()
            folder.rename(old)
            slow()
        new.rename(folder)
        slow()
    elif old.exists() and not folder.exists():
        old.rename(folder)


def found(folder: Path) -> Path:
    """`folder`, or where a process was killed while it was replaced, what is there of it, which is said on stderr."""
    if not folder.exists():
        for left in (named(folder, "new"), named(folder, "old")):
            if left.exists():
                print(f"{folder} was being replaced by a process that was killed: {left} is used", file=sys.stderr)
                return left
    return folder


# --- what is in them --------------------------------------------------------------------------------------------------

def sha256(path: Path) -> str:
    """Of a file's whole content, read in pieces."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def digest_of(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, name: str, facts: dict, files: Iterable[str]) -> None:
    """Write `facts` to the JSON file `name`, last of all, with the hashes of `files` in `folder` and of the facts themselves."""
    with ThreadPoolExecutor() as pool:      # hashing leaves the interpreter to others
        hashes = dict(zip(files, pool.map(sha256, [folder / file for file in files])))
    facts = json.loads(json.dumps({**facts, "sha256": hashes}))
    facts["sha256"][name] = digest_of(facts)
    (folder / name).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def differing(folder: Path, name: str, facts: dict, files: Iterable[str] | None = None) -> list[str]:
    """Which of `files` (of all that were there) and `name`, which holds `facts`, are not what `seal` saw: none without hashes. InputError
    where there are hashes, but not of files in `folder` and of the facts."""
    hashes = facts.get("sha256", {})
    if not isinstance(hashes, dict) or "sha256" in facts and name not in hashes or any(
            Path(file).name != file or len(file.encode()) > 255 for file in hashes):
        raise InputError(f"{folder / name}: its sha256 are not the hashes of the files beside it")
    wanted = {file: hashes[file] for file in hashes if file != name and (files is None or file in files)}
    wrong = [file for file, noted in wanted.items() if not (folder / file).is_file() or sha256(folder / file) != noted]
    if hashes:
        own = {**facts, "sha256": {file: noted for file, noted in hashes.items() if file != name}}
        wrong += [name] * (digest_of(own) != hashes.get(name))
    return wrong


def check_seal(folder: Path, name: str, facts: dict, files: Iterable[str] | None = None) -> None:
    """InputError names the first of `files` that is not as it was written."""
    for file in differing(folder, name, facts, files):
        what = "its content is not what was written" if (folder / file).is_file() else "the file is gone"
        raise InputError(f"{folder / file} is damaged: {what} (by the sha256 in {name})")


# --- one process at a time --------------------------------------------------------------------------------------------

def started(pid: int) -> int | None:
    """When process `pid` of this host began, in the kernel's ticks: 0 where there is no /proc, None where there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return None if state in "ZX" else int(rest[18])


@contextmanager
def locked(folder: Path, from_main: Callable[[Callable[[], None]], None] = lambda make: make()) -> Iterator[None]:
    """Inside, this process alone writes to `folder`; of several ranks the first (rt.dist.Ranks.from_main). InputError names the process
    and host that do so already. A lock that a process of this host left when it was killed is taken over."""
    mine: list[Path] = []
    from_main(lambda: mine.append(take(folder)))
    try:
        yield
    finally:
        for path in mine:
            path.unlink(missing_ok=True)


def take(folder: Path) -> Path:
    """The lock of `folder`, written now."""
    folder = Path(folder).resolve()
    with making(folder):
        if not folder.name or folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} cannot be used as a folder ({'Not a directory' if folder.name else 'the root'}): give another")
        folder.parent.mkdir(parents=True, exist_ok=True)
    beside = os.access(folder.parent, os.W_OK) or not folder.exists()   # else, of a volume that is mounted there, inside
    path = named(folder, "lock") if beside else folder / LOCK
    me = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started(os.getpid()), "since": time.strftime("%F %T")})
    while True:
        try:
            return write_new(path, me.encode())
        except FileExistsError:
            refuse_or_remove(folder, path)
        except OSError as error:
            raise unmade(path, error) from None


def write_new(path: Path, content: bytes) -> Path:
    """A file that was not there, nor is where its content does not fit."""
    with path.open("xb", buffering=0) as file:
        try:
            write_all(file, content)
        except OSError:
            path.unlink()
            raise
    return path


def refuse_or_remove(folder: Path, path: Path) -> None:
    """InputError where the process that wrote the lock `path` is at work, or may be; else the lock is gone."""
    try:
        text = path.read_text(encoding="utf-8")
        if not text:
            time.sleep(0.5)     # the other is about to write it, or was killed before it could
            text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, ValueError):       # a folder, or no text
        text = "no lock"
    holder, pid, host, since = {}, 0, socket.gethostname(), ""
    try:
        if text:
            holder = json.loads(text)
            pid, host, since = holder["pid"], holder["host"], holder["since"]
            if not is_whole(pid, 1):
                raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(f"{path} is where the lock of {folder} would be, and is none: move it away, or give another --out") from None
    if host != socket.gethostname():
        raise InputError(f"{folder} is being written to by process {pid} on {host} since {since}: end it first, or if it has gone, "
                         f"remove {path}")
    if holder and started(pid) == holder.get("started"):
        raise InputError(f"{folder} is being written to by process {pid} on {host} since {since}: end it first, or give another --out")
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.rename(aside)
        if aside.read_text(encoding="utf-8") != text:   # another was faster in taking over, and this is its lock
            aside.rename(path)
        else:
            aside.unlink()
    except FileNotFoundError:
        return
