"""The claims C1 to C7 of the paper on real text: every run behind results/claims, resumable, one row per run.

    python -m experiments.claims --data DIR                       # mini preset; about two hours on 2 cores
    python -m experiments.claims --data DIR --plan                # what is still to do, and about how long it takes
    python -m experiments.claims --data DIR --preset small --device cuda --budget 540     # in pieces: each call continues
    python -m experiments.claims --report                         # results/claims/README.md and its figures, from the rows alone
    python -m experiments.claims --verify                         # is the report what the rows say? Has it the numbers of the docs?

DIR holds corpora/ (wiki, bio, rev, cs, ns .txt.xz, one document per line) and tasks/ (chemprot, imdb, ...: folders with train,
dev and test). M0 is trained on wiki, and M1 to M4 on bio, rev, cs, ns in turn. IND, the independent base, is trained from another
seed on all five. The learning rate of every arm is chosen on dev from the same few rates, with the first seed; test is scored once,
with the chosen rate. A finished run is recognised by its facts (`run` in its rows) and not repeated.
"""
import itertools
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from bench.machine import commit, device_name
from experiments.claims import report, runs
from experiments.claims.plan import SCALES, Run, phases, searched
from experiments.claims.rows import GrowingRows
from experiments.common import ROOT, check_places, finished, processes
from rt.errors import InputError
from rt.limits import Positive, PositiveInt
from rt.runs.config import parse, run
from rt.runs.log import progress, table
from rt.speed.device import pick_device, pick_precision

PARTS = tuple(dict.fromkeys(r.part for phase in phases(SCALES["mini"]) for r in phase))
RATELESS = ("apply", "walk", "heads", "distance")       # nothing is trained, or the rate is fixed


@dataclass
class Config:
    """python -m experiments.claims --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/ and tasks/
    preset: Literal[tuple(SCALES)] = "mini"  # tiny (to try the script out), mini, small or base
    device: str = "auto"  # auto, cpu or cuda
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 if the device is fast at it, else fp32
    jobs: PositiveInt | None = None  # runs side by side; default: one a core on a CPU (each on one thread), one on a GPU
    budget: Positive | None = None  # seconds; nothing new begins after them. Default: until all is done
    only: tuple[Literal[PARTS], ...] = ()  # parts (bases, tuned, few, ...) to do; default: all
    home: str = "runs/claims"  # bases and deltas
    results: str = "results/claims"  # rows, and the report
    plan: bool = False  # say what is to be done, and do nothing
    report: bool = False  # write the report from the rows
    verify: bool = False  # compare the report with the rows, and look up the numbers of README.md and docs/claims.md in it


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.verify:
        print(verify(Path(c.results), ROOT))
        return
    if c.report:
        print(report.write(Path(c.results)))
        return
    check_places("claims", c.data)
    rows = GrowingRows(Path(c.results), c.preset)
    if c.plan:
        print(plan_table(rows, c.only))
    else:
        work(c, rows)


def verify(folder: Path, root: Path) -> str:
    """Write the report again from the rows, elsewhere, and compare. InputError names the first line that differs, or a number that occurs
    nowhere in the report: of docs/claims.md, or of the paragraph of README.md on these results. Which number means what is not checked."""
    with TemporaryDirectory() as place:
        shutil.copytree(folder, copy := Path(place) / "claims", ignore=shutil.ignore_patterns("*.png", "*.svg", "README.md"))
        report.write(copy)
        old, new = ((at / "README.md").read_text(encoding="utf-8").split("\n") for at in (folder, copy))
    for number, (there, here) in enumerate(itertools.zip_longest(old, new), 1):
        if there != here:
            raise InputError(f"{folder / 'README.md'}: line {number}: {there!r} is there, and the rows say {here!r}")
    front, page = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/claims.md"))
    paragraph, = re.findall(r"^- The paper's claims.*?(?=^- |\Z)", front, re.M | re.S)
    known = re.sub(r"\b0\.", ".", "\n".join(new))
    for name, text in (("README.md", paragraph), ("docs/claims.md", page)):
        if strange := [n for n in re.findall(r"\d*\.\d+", text) if n.lstrip("0") not in known]:
            raise InputError(f"{root / name}: {', '.join(strange)} is not in {folder / 'README.md'}")
    return f"{folder / 'README.md'} is what the rows say, and has every number of docs/claims.md and of README.md's paragraph on it"


def left(rows: GrowingRows, only: tuple[str, ...]) -> list[list[Run]]:
    """The runs that are not done, as lists by phase. Runs that search a learning rate come before runs that wait for it."""
    out = []
    for phase in phases(rows.scale):
        todo = [r for r in dict.fromkeys(phase) if not rows.done(r) and (not only or r.part in only)]
        out += [[r for r in todo if r == searched(r)], [r for r in todo if r != searched(r)]]
    return out


def plan_table(rows: GrowingRows, only: tuple[str, ...]) -> str:
    """How many runs of each sort are left, and how long they take one after another, estimated from finished runs."""
    sorts: dict[tuple[str, str], list[float | None]] = {}
    for r in (r for phase in left(rows, only) for r in phase):
        sorts.setdefault((r.part, r.what), []).append(rows.seconds(r))
    lines = [[f"{part}: {what}", len(seconds), "?" if None in seconds else f"{sum(seconds) / 60:.0f} min"]
             for (part, what), seconds in sorts.items()]
    return table(lines, ["part: what", "runs to do", "one after another, by those done"]) if lines else "nothing is left to do"


def work(c: Config, rows: GrowingRows) -> None:
    """Do the runs that are left, phase by phase, until the budget is used up."""
    device = pick_device(c.device)
    study = runs.Study(Path(c.data), Path(c.home) / c.preset, Path(c.home) / "cache", c.preset, rows.scale, device,
                       pick_precision(c.precision, device))
    jobs = c.jobs or (torch.get_num_threads() if device.type == "cpu" else 1)
    end = time.monotonic() + c.budget if c.budget else None
    facts = {"preset": c.preset, "device": device_name(device), "precision": str(study.precision).removeprefix("torch."),
             "threads": max(1, torch.get_num_threads() // jobs), "jobs": jobs, "commit": commit(), "torch": torch.__version__}
    todo = left(rows, c.only)
    with progress(sum(map(len, todo)), "claims", unit="run") as bar, processes(jobs, facts["threads"]) as pool:
        for phase in todo:
            ready = [r for r in phase if rows.rates(r) or r.kind is None or r.what in RATELESS]
            for r, found, seconds in finished(pool, runs.attempt, [(study, r, rows.rates(r), end) for r in ready]):
                if found:
                    rows.add(r, found, {"seconds": round(seconds, 1), **facts})
                bar.set_postfix_str(" ".join(str(v) for v in r.facts.values())[:60])
                bar.update()
    count = sum(map(len, left(rows, c.only)))
    print(f"{count} runs are left; the same command goes on" if count else "all runs are done: python -m experiments.claims --report")


if __name__ == "__main__":
    run(main)
