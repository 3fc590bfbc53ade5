"""Shared by the experiments: the check that their data exist, the loop over their cells, scripts of the checkout run as commands that can
be typed, and the tests and tables of their reports."""
import gc
import importlib
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, TypeVar
from unittest.mock import patch

import numpy as np
import torch

from bench.machine import commit, device_name
from rt.errors import InputError
from rt.formats.files import read_rows
from rt.runs.log import progress
from rt.speed.device import pick_precision

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")
LEARNED = 0.05      # dev accuracy of a delta on M0 above the share of the commonest label


def check_places(experiment: str, data: str | None, *others: str) -> None:
    """InputError unless `data` holds corpora/ and tasks/, and the other folders exist."""
    if not data or not (Path(data) / "corpora").is_dir() or not (Path(data) / "tasks").is_dir():
        raise InputError(f"--data {data}: not a folder with corpora/ and tasks/; see python -m experiments.{experiment} --help")
    for needed in others:
        if not Path(needed).is_dir():
            raise InputError(f"{needed}: is not there; see python -m experiments.{experiment} --help")


def made_on(device: torch.device) -> dict[str, str]:
    """The fields of a row that say where it was made."""
    return {"device": device_name(device), "precision": str(pick_precision("auto", device)).removeprefix("torch."), "commit": commit(),
            "torch": torch.__version__}


def script(c: Any, *command: object, out: Path | None = None, root: str | Path = ROOT) -> str:
    """Run a script of the checkout `root` and return its command, with the folders of the config `c` shown by name. Paths are made
    absolute. A run into the folder `out` goes on if it was begun. InputError if it fails."""
    if out:
        command = *command, "--out", out, *(["--resume"] if out.exists() else [])
    command, text = typed({"DIR": c.data, "HOME": c.home, "M0": c.base, "RECIPES": c.recipes, "CACHE": c.cache}, command)
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{text} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return text


def run_here(places: dict[str, str | Path], *command: object) -> str:
    """Like `script`, but in this process, which saves the seconds of a start."""
    (file, *arguments), text = typed(places, command)
    threads = torch.get_num_threads()
    with patch.object(sys, "argv", [file, *arguments]), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            importlib.import_module(file.removesuffix(".py")).main()
        except Exception as error:      # whatever it is, as if the script had ended with it
            raise InputError(f"{text} failed: {error}") from None
        finally:
            torch.set_num_threads(threads)      # the script may have its own --threads
            gc.collect()
            torch.cuda.empty_cache()
    return text


def typed(places: dict[str, str | Path], command: tuple) -> tuple[list[str], str]:
    """A command with absolute paths, and as it can be typed, with each of `places` shown by name."""
    command = [str(part.absolute()) if isinstance(part, Path) else str(part) for part in command]
    text = " ".join(command)
    for name, place in places.items():
        text = text.replace(str(Path(place).absolute()), name)
    return command, text


@contextmanager
def processes(jobs: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """`jobs` processes of so many threads. Whatever ends this, such as a signal, cancels the runs that have not begun."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def finished(pool: ProcessPoolExecutor, do: Callable[..., T], jobs: list[tuple]) -> Iterator[T]:
    """What `do` returns for the arguments in each of `jobs`, as soon as it is known. If runs fail, the others continue, so their rows are
    kept; then InputError."""
    failed = []
    for future in as_completed([pool.submit(do, *job) for job in jobs]):
        try:
            found = future.result()
        except InputError as error:
            failed.append(error)
        else:
            yield found
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} runs failed, the first: {failed[0]}")


def cut_half_cell(path: Path) -> None:
    """Remove half a row that a kill or a full disk left at the end of `path`, and the rows of the same cell before it, which would count as
    the whole cell."""
    *rows, half = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    while half and rows and (cell := json.dumps({"cell": json.loads(rows[-1])["cell"]})[:-1].encode())[:len(half)] == half[:len(cell)]:
        rows.pop()
    if half:
        os.truncate(path, sum(len(row) + 1 for row in rows))


def cells_to_do(path: Path, cells: list[dict], where: tuple[str, ...]) -> list[dict]:
    """The cells that have no rows in `path` yet and whose facts are those of `where`, such as ("base=ind", "kind=full")."""
    cut_half_cell(path)
    wanted, done = dict(fact.partition("=")[::2] for fact in where), [row["cell"] for row in read_rows(path)]
    return [cell for cell in cells if cell not in done and wanted.items() <= {k: str(v) for k, v in cell.items()}.items()]


def do_cells(path: Path, cells: list[dict], budget: float | None, do: Callable[[dict], list[dict]]) -> None:
    """Append the rows that `do` returns for each cell to `path`. Nothing new begins after `budget` seconds."""
    end = time.monotonic() + (budget or float("inf"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress(len(cells), path.parent.name, unit="cell") as bar:
        for cell in cells:
            if time.monotonic() > end:
                break
            bar.set_postfix_str(" ".join(map(str, cell.values())))
            rows = do(cell)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"cell": cell} | row) + "\n" for row in rows))
            bar.update()


def sign_flip(values: list[float]) -> float:
    """One-sided exact p of a mean above zero: the share of sign patterns whose sum is at least as large. At most 24 values."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return float((sums >= sum(values) - 1e-9).mean())


def holm(p: dict) -> dict:
    """Holm's adjusted p, by key."""
    adjusted, highest = {}, 0.0
    for i, (key, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        adjusted[key] = highest = min(1.0, max(highest, (len(p) - i) * value))
    return adjusted


def steps_to_best(scratch: list[tuple[int, float]], init: list[tuple[int, float]]) -> tuple[int, int]:
    """From two curves of (step, dev score): the first step at which init is as good as scratch ever gets (never: one evaluation after the
    end), and the step at which scratch got there."""
    at, best = max(scratch, key=lambda point: point[1])
    never = 2 * init[-1][0] - init[-2][0]
    return next((step for step, dev in init if dev >= best), never), max(at, 1)


def markdown(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    header = list(header)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *rows))
