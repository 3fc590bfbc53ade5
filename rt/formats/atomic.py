"""Folders that appear whole or not at all. Their content can be checked, and only one process at a time writes to them. No torch here.

    NAME.part       the folder while it is written; nobody reads it
    NAME            the folder that is read
    NAME.replaced   the previous NAME, while NAME.part takes its place (not NAME.old: people call their backups that)
    NAME.lock       names the process that writes to NAME, its host, and the time when it began

A process may be killed between any two steps. Then NAME is the old folder or the new one, or NAME is missing and `found` reads
NAME.replaced.
"""
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from filelock import FileLock, Timeout

from rt.errors import InputError
from rt.formats.files import LOCK, check_overwritable, note, sync, unknown_names, write_errors
from rt.formats.untrusted import MISSHAPEN, is_whole

UNFINISHED = (".part", ".replaced")     # suffixes of folders that are not listed


# --- whole or not at all ----------------------------------------------------------------------------------------------

def named(folder: Path) -> Path:
    """`folder`, resolved if it is a symbolic link, . or .."""
    return folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder


def beside(folder: Path, ending: str) -> Path:
    return named(folder).with_name(f"{named(folder).name}.{ending}")


@contextmanager
def atomic_folder(folder: Path, known: set[str] | None = None, needs: int | None = None) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` when the block ends without an error. InputError if `folder`, NAME.part or
    NAME.replaced holds other names than `known` (None: any), or if the disk has no room for `needs` bytes. `folder` is then unchanged."""
    folder = named(folder)
    part, old = beside(folder, "part"), beside(folder, "replaced")
    if known is not None:
        check_overwritable(folder, known)
        for other in (part, old):
            names = unknown_names(other, known | {f"{name}.part" for name in known})
            if names := [name for name in names if not name.startswith(".tmp")]:    # a killed safetensors leaves these
                raise InputError(f"{other} holds other things ({', '.join(names[:3])}) and would be lost: move it, or give another --out")
    with write_errors(folder, needs):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    with write_errors(folder, needs, part):
        yield part
        for path in (part, *part.rglob("*")):
            sync(path)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def found(folder: Path) -> Path:
    """The path to read: `folder`, or NAME.replaced, with a line on stderr, if `folder` is missing because it is being replaced."""
    old = beside(folder, "replaced")
    if not folder.exists() and old.exists():
        print(f"{folder} is being replaced, or was when a process was killed: {old} is used", file=sys.stderr)
        return old
    return folder


# --- content ----------------------------------------------------------------------------------------------------------

def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def digest_of(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, name: str, facts: dict, files: Iterable[str]) -> None:
    """Write `facts` to the JSON file `name`, with the hashes of `files` and of the facts. It is the last file written to `folder`."""
    facts = json.loads(json.dumps({**facts, "sha256": {file: sha256(folder / file) for file in files}}))
    facts["sha256"][name] = digest_of(facts)
    (folder / name).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def differing(folder: Path, name: str, facts: dict, files: Iterable[str] | None = None) -> list[str]:
    """The files that have changed since `seal`, out of `files` (default: all with a hash) and `name`, the file that `facts` come from. An
    empty list if there are no hashes. InputError if the hashes are not those of files in `folder` and of the facts."""
    if "sha256" not in facts:       # written by a version without hashes
        return []
    hashes = facts["sha256"]
    if not isinstance(hashes, dict) or name not in hashes or any(Path(f).name != f or len(f.encode()) > 255 for f in hashes):
        raise InputError(f"{folder / name}: its \"sha256\" does not hold the hashes of the files beside it")
    content = {file: noted for file, noted in hashes.items() if file != name}
    wrong = [file for file, noted in content.items() if (files is None or file in files)
             and not ((folder / file).is_file() and sha256(folder / file) == noted)]
    return wrong + [name] * (digest_of({**facts, "sha256": content}) != hashes[name])


def check_seal(folder: Path, name: str, facts: dict, files: Iterable[str] | None = None) -> None:
    """InputError if one of `files`, or `name`, has changed since it was written. The error names the first such file."""
    for file in differing(folder, name, facts, files):
        what = "its content is not what was written" if (folder / file).is_file() else "the file is gone"
        raise InputError(f"{folder / file} is damaged: {what} (by the sha256 in {name})")


# --- one process at a time --------------------------------------------------------------------------------------------

@contextmanager
def locked(folder: Path, from_main: Callable[[Callable[[], Any]], Any] = lambda call: call(), wait: bool = False) -> Iterator[None]:
    """In the block, only this process writes to `folder`. With several ranks (`from_main`: rt.speed.dist.Ranks.from_main), rank 0 takes the
    lock. InputError names the process and host that hold it; with `wait`, a process of this host is waited for instead. The operating
    system frees the lock when the process dies. A lock file of another host counts as long as it exists: a shared disk passes locks on only
    if it has a lock server (NFS: version 4, or lockd)."""
    with ExitStack() as stack:
        from_main(lambda: _lock(Path(folder).resolve(), stack, wait))
        yield


def _lock(folder: Path, stack: ExitStack, wait: bool) -> None:
    """Take the lock. Its file is next to `folder`, or inside it if the parent folder is not writable, as with a mounted volume."""
    with write_errors(folder):
        if not folder.name or folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} cannot be used as a folder ({'Not a directory' if folder.name else 'the root'}): give another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = beside(folder, "lock") if os.access(folder.parent, os.W_OK) or not folder.exists() else folder / LOCK
        holder, here = holder_of(path, folder), socket.gethostname()
        if holder and holder["host"] != here:
            raise being_written(folder, holder, f"if it has gone, remove {path}")
        lock = FileLock(path, timeout=1)    # s: after a kill, the workers need time to end, too (rt/runs/workers.py)
        try:
            lock.acquire()
        except Timeout:
            if not wait:
                raise being_written(folder, holder_of(path, folder), "give another --out") from None
            note(f"{folder} is being written to by another process; waiting for its end")
            lock.acquire(timeout=-1)
        stack.callback(lock.release)
        stack.callback(path.unlink, missing_ok=True)    # before the release: a process that waits for the lock sees that the file is gone
        path.write_text(json.dumps({"pid": os.getpid(), "host": here, "since": time.strftime("%F %T")}), encoding="utf-8")


def holder_of(path: Path, folder: Path) -> dict | None:
    """{"pid", "host", "since"} of the process that wrote a lock, or None if there is none. InputError if the file is not a lock."""
    try:
        text = path.read_text(encoding="utf-8")
        holder = json.loads(text) if text else None     # empty: its process was killed, or is about to write
        if holder is not None and not (is_whole(holder["pid"], 1) and isinstance(holder["host"], str) and holder["since"]):
            raise ValueError
        return holder
    except FileNotFoundError:
        return None
    except (*MISSHAPEN, OSError):
        raise InputError(f"{path} is in the way: it is not a lock, and the lock of {folder} belongs there. Move it away, or give "
                         "another --out") from None


def being_written(folder: Path, holder: dict | None, advice: str) -> InputError:
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another process"
    return InputError(f"{folder} is being written to by {who}: end it first, or {advice}")
