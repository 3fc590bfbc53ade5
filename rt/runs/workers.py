"""Shares the cores of a CPU among whole runs, in processes forked from this one, so that bases are in memory once.

Two processes of one thread do about twice the work of one; a second thread adds a third for a small model (docs/scaling.md). The number of
threads of a run changes its last bits; the number of simultaneous runs does not.
"""
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Callable, Iterator, Sequence, TypeVar

import torch
from tqdm import tqdm

from rt.errors import InputError

T, R = TypeVar("T"), TypeVar("R")
THREADS = torch.get_num_threads()       # torch's default: by affinity and OMP_NUM_THREADS
CGROUP = Path("/sys/fs/cgroup/cpu.max")     # "QUOTA PERIOD" in microseconds, or "max PERIOD"


def cores() -> int:
    """How many cores this process may use: by its affinity, OMP_NUM_THREADS and its cgroup's quota, which torch does not look at."""
    quota, _, period = (CGROUP.read_text() if CGROUP.is_file() else "max").partition(" ")
    return max(1, min(THREADS, int(quota) // int(period))) if quota.isdecimal() else THREADS


def use_threads(asked: int) -> None:
    """Compute with this many threads; 0: one for each core."""
    torch.set_num_threads(asked or cores())


def share_cores(runs: int, threads: int, workers: int) -> int:
    """Set the threads of each of so many runs, and return how many processes share the runs. An argument of 0 is derived from the numbers
    of runs and cores only, since a load-dependent number of threads would change last bits. Only Linux forks safely."""
    threads = threads or max(1, cores() // runs)
    torch.set_num_threads(threads)
    return workers or (max(1, min(runs, cores() // threads)) if sys.platform == "linux" else 1)


def spread(work: Callable[[T], Iterator[R]], items: Sequence[T], workers: int) -> Iterator[R]:
    """What work(item) yields for all items, as it comes: by this process, item after item, or by several `workers`, which pickle it. An
    error in a worker is raised here and ends the others; so does whatever ends this generator, such as a signal."""
    workers = min(workers, len(items))
    if workers < 2:
        for item in items:
            yield from work(item)
        return
    context, todo, busy = multiprocessing.get_context("fork"), iter(range(len(items))), {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            busy[ours] = context.Process(target=_serve, args=(work, items, theirs), daemon=True)
            busy[ours].start()
            theirs.close()      # or the death of the worker would not close the pipe
        while busy:
            for pipe in wait(list(busy)):
                yield from _received(pipe, busy, todo)
    finally:
        for process in busy.values():
            process.kill()      # whatever it writes appears whole or not at all
            process.join()


def _received(pipe: Connection, busy: dict[Connection, multiprocessing.Process], todo: Iterator[int]) -> Iterator:
    """A worker's message: a value, an error, or None for both if it wants the next item."""
    try:
        value, error = pipe.recv()
        if value is None and error is None:
            pipe.send(item := next(todo, None))
            if item is None:
                busy.pop(pipe).join()
    except (EOFError, OSError):
        busy[pipe].join()
        raise InputError(f"a worker was killed (exit code {busy[pipe].exitcode}), perhaps for lack of memory: lower `workers`") from None
    if error is not None:
        raise error
    if value is not None:
        yield value


def _serve(work: Callable[[T], Iterator[R]], items: Sequence[T], pipe: Connection) -> None:
    """A worker's loop: it asks for the number of an item until there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent gets the signal and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"      # threads do not survive a fork
    tqdm.set_lock(threading.RLock())                    # one of them may have held the lock
    try:
        while pipe.send((None, None)) or (item := pipe.recv()) is not None:
            for value in work(items[item]):
                pipe.send((value, None))
    except Exception as error:
        if not isinstance(error, InputError):       # another may not be picklable
            traceback.print_exc()
            error = RuntimeError(f"in a worker process: {error!r}")
        pipe.send((None, error))


def _follow() -> None:
    """End with the process that this one was forked from, however that ended."""
    multiprocessing.parent_process().join()
    os._exit(1)
