"""Shares the cores of a CPU among whole runs. The runs take place in processes forked from this one, so bases are in memory once.

Two processes with one thread each do about twice the work of one. For a small model, a second thread adds a third (docs/scaling.md). The
number of threads per run changes a run's last bits. The number of simultaneous runs does not.
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
from rt.runs.signals import delayed

T, R = TypeVar("T"), TypeVar("R")
THREADS = torch.get_num_threads()       # torch's default: by affinity and OMP_NUM_THREADS
CGROUP = Path("/sys/fs/cgroup/cpu.max")     # "QUOTA PERIOD" in microseconds, or "max PERIOD"


def cores() -> int:
    """How many cores this process may use, by its affinity, OMP_NUM_THREADS and its cgroup's quota. torch does not look at the quota."""
    quota, _, period = (CGROUP.read_text() if CGROUP.is_file() else "max").partition(" ")
    return max(1, min(THREADS, int(quota) // int(period))) if quota.isdecimal() else THREADS


def use_threads(asked: int) -> None:
    """Compute with this many threads; 0 means one per core."""
    torch.set_num_threads(asked or cores())


def share_cores(runs: int, threads: int, workers: int) -> int:
    """Set the number of threads per run, and return how many processes share the `runs`. An argument of 0 is derived only from the numbers
    of runs and cores, because a number of threads that depends on the load would change last bits. Only Linux forks safely."""
    threads = threads or max(1, cores() // runs)
    torch.set_num_threads(threads)
    return workers or (max(1, min(runs, cores() // threads)) if sys.platform == "linux" else 1)


def spread(work: Callable[[T], Iterator[R]], items: Sequence[T], workers: int) -> Iterator[R]:
    """Yields what work(item) yields for all items, as it comes: from this process, item by item, or pickled from several `workers`.
    An error in a worker is raised here and ends the others. Whatever ends this generator, such as a signal, ends the workers, too."""
    workers = min(workers, len(items))
    if workers < 2:
        for item in items:
            yield from work(item)
        return
    context, todo, busy = multiprocessing.get_context("fork"), iter(range(len(items))), {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, items, theirs), daemon=True)
            with delayed():
                process.start()
                busy[ours] = process
            theirs.close()      # otherwise the death of the worker would not close the pipe
        while busy:
            for pipe in wait(list(busy)):
                yield from _received(pipe, busy, todo)
    finally:
        for process in busy.values():
            process.kill()      # safe: what it writes appears whole or not at all
            process.join()


def _received(pipe: Connection, busy: dict[Connection, multiprocessing.Process], todo: Iterator[int]) -> Iterator:
    """Handle a worker's message: a value, an error, or None for both if the worker wants the next item."""
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
    """A worker's loop: ask for the number of the next item until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent gets the signal and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # when the parent has ended, however that was, this process ends
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"      # threads do not survive a fork
    tqdm.set_lock(threading.RLock())                    # a thread may have held the lock at the fork
    try:
        while pipe.send((None, None)) or (item := pipe.recv()) is not None:
            for value in work(items[item]):
                pipe.send((value, None))
    except Exception as error:
        if not isinstance(error, InputError):       # other errors may not be picklable
            traceback.print_exc()
            error = RuntimeError(f"in a worker process: {error!r}")
        pipe.send((None, error))
