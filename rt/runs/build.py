"""Runs train.py to make missing bases and deltas. Device, precision, cache and determinism come from the calling script's config."""
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Iterable, Iterator

import torch

from rt.data import Task
from rt.errors import InputError
from rt.formats.atomic import beside, locked
from rt.formats.delta_files import place_of_delta
from rt.formats.files import read_json
from rt.formats.hub import is_hub_id, open_base
from rt.formats.untrusted import shaped
from rt.runs.workers import cores

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def default_rate(kind: str) -> float:
    """The default peak learning rate for tuning a delta of this kind, for the mini preset."""
    return {"full": 5e-4, "prefix": 1e-2}.get(kind, 5e-3)


def build(c: Any, *jobs: tuple[str, dict], of: int = 1) -> None:
    """Run train.py for each of `jobs`, pairs (what it makes, flags). On a CPU, one job per core runs at once. InputError if a job fails.
    `of`: how many results the command needs, missing or not. Threads per job, and so a job's last bits, must not depend on what exists."""
    at_once = 1 if c.device != "cpu" and torch.cuda.is_available() else min(max(of, len(jobs)), cores())
    alone = {k: v for k, v in os.environ.items() if k != "RANK"}        # not one of torchrun's ranks
    if at_once > 1:
        alone |= {"OMP_NUM_THREADS": str(cores() // at_once), "TQDM_DISABLE": "1"}      # progress bars would overwrite each other
    for some in (jobs[i:i + at_once] for i in range(0, len(jobs), at_once)):
        running: list[tuple[subprocess.Popen, str, list[str]]] = []
        try:
            for what, flags in some:
                print(f"building {what}", flush=True)
                flags |= {name: getattr(c, name) for name in ("device", "precision", "cache", "deterministic")}
                arguments = [f"--{name}={value}" for name, value in flags.items()]
                running.append((subprocess.Popen([sys.executable, str(TRAIN), *arguments], env=alone), what, arguments))
            for process, what, arguments in running:
                if process.wait():
                    raise InputError(f"could not build {what}: python train.py {' '.join(arguments)} failed")
        finally:
            for process, *_ in running:
                process.kill()
                process.wait()


@contextmanager
def making(*folders: Path) -> Iterator[None]:
    """In the block, no other command makes one of `folders`. Waits for one that does, and for a train.py whose command was killed."""
    with ExitStack() as stack:
        for folder in sorted(folders):      # two commands with one order never wait for each other
            stack.enter_context(locked(beside(folder, "making"), wait=True))
            with locked(folder, wait=True):
                pass
        yield


def build_lineage(c: Any, demo: Path, bases: Iterable[str]) -> None:
    """Make the demo lineage in the folder `demo` if one of `bases` belongs there and is missing."""
    if any(not Path(base).exists() and Path(base).parent == demo for base in bases):
        build(c, ("the demo lineage M0, M1, M2 (about 3 minutes on 2 cores)", dict(out=demo, resume=(demo / "config.json").exists())))


def build_missing(c: Any, task: Task, source_tasks: list[Task]) -> tuple[str | None, tuple[str, ...]]:
    """The deltas of recycle.py's Config `c`: (old delta, source deltas). train.py makes the demo lineage and the deltas that no flag names,
    if they are missing."""
    for name, source in zip(c.project.source_task, source_tasks):
        if source.hash == task.hash:
            raise InputError(f"--source_task {name}: is the --task itself, and a projection is for a task that it was not learned on")
    build_lineage(c, Path(type(c).base).parent, (*(c.chain or (c.base,)), *filter(None, [c.old_base])))
    for base in c.chain or (c.base,):
        if not (Path(base).exists() or is_hub_id(base)):
            open_base(base)     # raises: a typo is reported before anything is tuned
    sources = c.project.source_delta or tuple(tuned(c, *source) for source in zip(c.project.source_task, source_tasks))
    return c.old_delta or (tuned(c, c.task, task) if c.old_base else None), sources


def tuned(c: Any, name: str, task: Task) -> str:
    """The folder of the old base's delta for a task, beside that base. train.py makes the delta if it is missing."""
    folder = place_of_delta(c.old_base, task.name, c.delta.kind)
    asked = c.delta.used | {"seq_len": c.teaching.old_seq_len or c.seq_len, "task": task.hash}
    is_there = partial(is_tuned, folder, asked, "to use it as it is, name it with --old_delta; for a new one, move it away")
    if is_there():
        return str(folder)
    with making(folder):
        if not is_there():
            sizes = {size: value for size, value in vars(c.delta).items() if size not in ("kind", "target_modules")}
            flags = dict(mode="tune", base=c.old_base, task=name, out=folder, delta=c.delta.kind, seq_len=asked["seq_len"],
                         target_modules=",".join(c.delta.target_modules), **sizes)
            build(c, (f"the old delta {folder} (under a minute for mini on 2 cores)", flags))
    return str(folder)


def is_tuned(folder: Path, asked: dict[str, Any], otherwise: str) -> bool:
    """Whether a delta is in `folder`. InputError if it was tuned with other flags than `asked` (task: the hash of its content). The message
    ends with what to do `otherwise`. Flags that it does not record are not compared, but a delta without a --mode was imported."""
    if not (file := folder / "delta.json").exists():
        return False
    with shaped(file, "its \"info\" does not hold what a tuned delta has"):
        info = read_json(file).get("info", {})
        was = {"mode": "import"} | (info.get("config") or {}) | {"task": info.get("task_hash", asked.get("task"))}
        for name, value in asked.items():
            value = list(value) if isinstance(value, tuple) else value
            if was.get(name, value) != value:
                raise InputError(f"{folder}: was tuned with another --{name}: {was[name]}, not {value}; {otherwise}")
    return True
