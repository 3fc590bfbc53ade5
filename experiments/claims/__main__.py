"""The claims C1 to C7 of the paper on real text: every run behind results/claims, resumable, one row a run.

    python -m experiments.claims --data DIR                       # mini preset; about two hours on 2 cores
    python -m experiments.claims --data DIR --plan                # what is still to do, and about how long it takes
    python -m experiments.claims --data DIR --preset small --device cuda --budget 540     # in pieces: each call goes on
    python -m experiments.claims --report                         # results/claims/README.md and its figures, from the rows alone

DIR holds corpora/ (wiki, bio, rev, cs, ns .txt.xz, one document a line) and tasks/ (chemprot, imdb, ...: folders with train,
dev and test). M0 is trained on wiki, M1 to M4 on bio, rev, cs, ns in turn; IND, the independent base, from another seed on all
of them. The learning rate of every arm is chosen on dev out of the same few, with the first seed; test is scored once, with
the chosen one. A finished run is known by its facts (`run` in its rows) and not done again.
"""
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch

from bench.machine import commit, device_name
from experiments.claims import report, runs
from experiments.claims.plan import PHASES, SCALES, Run, searched
from rt.errors import InputError
from rt.formats.files import read_rows
from rt.runs.config import parse, require_positive, run
from rt.runs.log import progress, table
from rt.speed.device import pick_device, pick_precision


@dataclass
class Config:
    """python -m experiments.claims --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/ and tasks/
    preset: str = "mini"  # mini, small, base (tiny: to try the script out)
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # auto: bf16 where the device does it fast, else fp32
    jobs: int | None = None  # runs side by side; default: one a core on a CPU (each on one thread), one on a GPU
    budget: float | None = None  # seconds; nothing new begins after them. Default: until all is done
    only: tuple[str, ...] = ()  # parts (bases, tuned, few, ...) to do; default: all
    home: str = "runs/claims"  # bases and deltas
    results: str = "results/claims"  # rows, and the report
    plan: bool = False  # say what is to be done, and do nothing
    report: bool = False  # write the report from the rows


class Rows:
    """PRESET-PART.jsonl in the results folder: read once, appended to as runs end. A run that was cut off while it was written is
    taken out; rows of other sizes than `sizes` are refused (InputError), as they would be mixed with new ones."""

    def __init__(self, folder: Path, preset: str):
        self.folder, self.preset, self.scale, self.sizes = folder, preset, SCALES[preset], runs.sizes(SCALES[preset])
        self.rows: list[dict] = []
        for path in sorted(folder.glob(f"{preset}-*.jsonl")):
            rows = read_rows(path)
            counts = Counter(json.dumps(row["run"]) for row in rows)
            whole = [row for row in rows if counts[json.dumps(row["run"])] == row["rows"]]
            other = next((row["sizes"] for row in whole if row["sizes"] != self.sizes), None)
            if other:
                raise InputError(f"{path}: holds runs of other sizes ({other}, now {self.sizes}); move it away or give another --results")
            if path.read_bytes()[-1:] != b"\n" or len(whole) < len(rows):
                path.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
            self.rows += whole

    def done(self, run: Run) -> bool:
        return any(row["run"] == run.facts for row in self.rows)

    def add(self, run: Run, rows: list[dict], facts: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        full = [{"run": run.facts, "rows": len(rows), "sizes": self.sizes, **facts, **row} for row in rows]
        with (self.folder / f"{self.preset}-{run.part}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in full))
        self.rows += full

    def rate(self, run: Run) -> tuple[float, ...]:
        """The learning rates to run at: all where `run` is the search, else the one that dev chose there."""
        search = searched(run)
        if run == search:
            return () if run.kind is None else self.scale.rates if run.kind == "full" else self.scale.module_rates
        chosen = [row["lr"] for row in self.rows if row["run"] == search.facts and row.get("chosen")]
        return tuple(chosen[:1])

    def seconds(self, run: Run) -> float | None:
        """What a run of this sort took on average, where one has been done."""
        alike = {json.dumps(row["run"]): row["seconds"] for row in self.rows
                 if (row["run"]["part"], row["run"]["what"]) == (run.part, run.what)}
        return mean(alike.values()) if alike else None


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.preset not in SCALES:
        raise InputError(f"--preset {c.preset}: not one of {', '.join(SCALES)}")
    require_positive(c, "jobs", "budget")
    if c.report:
        print(report.write(Path(c.results)))
        return
    if not c.data or not (Path(c.data) / "corpora").is_dir() or not (Path(c.data) / "tasks").is_dir():
        raise InputError(f"--data {c.data}: not a folder with corpora/ and tasks/; see python -m experiments.claims --help")
    device = pick_device(c.device)
    lab = runs.Lab(Path(c.data), Path(c.home) / c.preset, Path(c.home) / "cache", c.preset,
                   SCALES[c.preset], device, pick_precision(c.precision, device))
    rows = Rows(Path(c.results), c.preset)
    if c.plan:
        print(plan_table(lab, rows, c.only))
    else:
        work(c, lab, rows)


def wanted(lab: runs.Lab, rows: Rows, only: tuple[str, ...]) -> list[list[Run]]:
    """The runs that are not done, a list a phase, those that search a learning rate before those that wait for it."""
    phases = []
    for phase in PHASES:
        todo = [r for r in dict.fromkeys(phase(lab.scale)) if not rows.done(r) and (not only or r.part in only)]
        first = [r for r in todo if r == searched(r)]
        phases += [first, [r for r in todo if r not in first]]
    return phases


def plan_table(lab: runs.Lab, rows: Rows, only: tuple[str, ...]) -> str:
    counts: dict[tuple[str, str], list[float | None]] = {}
    for r in (r for phase in wanted(lab, rows, only) for r in phase):
        counts.setdefault((r.part, r.what), []).append(rows.seconds(r))
    lines = [[f"{part}: {what}", len(each), "?" if None in each else f"{sum(each) / 60:.0f} min"]
             for (part, what), each in counts.items()]
    return table(lines, ["part: what", "runs to do", "one after another, by those done"]) if lines else "nothing is left to do"


def work(c: Config, lab: runs.Lab, rows: Rows) -> None:
    """Do what is not done, phase by phase, until the budget is used up."""
    jobs = c.jobs or (torch.get_num_threads() if lab.device.type == "cpu" else 1)
    end = time.monotonic() + c.budget if c.budget else None
    facts = {"preset": c.preset, "device": device_name(lab.device), "precision": str(lab.precision).removeprefix("torch."),
             "threads": max(1, torch.get_num_threads() // jobs), "jobs": jobs, "commit": commit(), "torch": torch.__version__}
    phases = wanted(lab, rows, c.only)
    with progress(sum(map(len, phases)), "claims", unit="run") as bar, \
            ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (facts["threads"],)) as pool:
        for phase in phases:
            ready = [r for r in phase if rows.rate(r) or r.kind is None or r.what in ("apply", "walk", "heads", "distance")]
            failed = []
            for done in as_completed([pool.submit(runs.attempt, lab, r, rows.rate(r), end) for r in ready]):
                try:
                    r, found, seconds = done.result()
                except InputError as error:     # the others of the phase go on, and their rows are kept
                    failed.append(error)
                    continue
                if found:
                    rows.add(r, found, {"seconds": round(seconds, 1), **facts})
                bar.set_postfix_str(" ".join(str(v) for v in r.facts.values())[:60])
                bar.update()
            if failed:
                raise InputError(f"{len(failed)} of {len(ready)} runs failed, the first: {failed[0]}")
    left = sum(map(len, wanted(lab, rows, c.only)))
    print(f"{left} runs are left; the same command goes on" if left else "all runs are done: python -m experiments.claims --report")


if __name__ == "__main__":
    run(main)
