"""What recycle.py leaves: a row a run in summary.json, curves in metrics.jsonl, deltas. A run is told from others by all it depends on."""
import hashlib
import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from types import NoneType
from typing import Any, Callable, Iterable

import torch

from rt.data import Task, TaskData
from rt.deltas import Base, Delta
from rt.errors import InputError
from rt.formats.atomic import differing
from rt.formats.delta_files import save_delta
from rt.formats.files import FIGURES, claim, read_json, read_rows, write_json, write_whole
from rt.formats.hub import open_delta
from rt.formats.untrusted import shaped
from rt.recycling import NEEDS_TEACHER, TRAINED, Recycling
from rt.runs.config import record
from rt.runs.log import Log
from rt.runs.summary import add_steps_to_scratch, by_settings
from rt.tune import TuneResult, score


@dataclass(frozen=True)
class Run:
    """What makes a row of the summary. `c` is recycle.py's Config; in a chain, that of one base: see `at`."""
    c: Any
    mode: str
    seed: int
    lr: float | None
    route: str | None = None    # chain or direct; None outside chains, and of scratch

    @property
    def settings(self) -> dict:
        """A direct run's are those of a call with this --base and no --chain: so it is the same run."""
        return settings_of(self.c if self.route == "chain" else replace(self.c, chain=()), self.mode)

    @property
    def name(self) -> str:
        """Equal for equal runs: mode, seed, and a hash of the flags that they depend on; for what these name by path see `origin_of`."""
        content = json.dumps([self.settings, self.lr], sort_keys=True)
        return f"{self.mode}-s{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    @property
    def key(self) -> tuple[str, int, float | None]:
        """Tells the runs of one call apart; in a chain equal for all of its bases and routes, which are done together."""
        return self.mode, self.seed, self.lr

    def at(self, base: str, route: str | None) -> "Run":
        """This run on one base of --chain: its config ends there."""
        until = self.c.chain.index(base) + 1
        return replace(self, c=replace(self.c, base=base, chain=self.c.chain[:until]), route=route)


def settings_of(c: Any, mode: str) -> dict:
    """The flags that a run of `mode` depends on, beside its seed and learning rate."""
    free = {"mode", "seeds", "lr", "out", "cache", "device", "resume", "save_deltas", "sweep", "side_by_side", "graphs", "deterministic"}
    if not c.early_stop:
        free |= {"early_stop"}      # so that rows from before there was one are of equal runs
    if mode not in (*NEEDS_TEACHER, "project"):
        free |= {"alpha", "beta", "T", "public_code"}
    if mode not in NEEDS_TEACHER or not c.gamma:
        free |= {"gamma", "att_layers"}
    if mode not in NEEDS_TEACHER or not c.itp:
        free |= {"itp"}
    if mode != "project":
        free |= {"source_task", "source_delta", "rank", "granularity", "residual", "project_steps"}
    if not c.chain:
        free |= {"chain"}
    return {k: v for k, v in record(c).items() if k not in free}


def belongs(row: dict, c: Any) -> bool:
    """Whether a row, of this call or an earlier one, has the settings of `c`; in a chain, of any of its routes at this base."""
    return any(row["settings"] == Run(c, row["mode"], 0, None, route).settings for route in ("direct", *(["chain"] if c.chain else [])))


def row_of(run: Run, task: Task, result: TuneResult) -> dict:
    """A run as a row of the summary."""
    c = run.c
    return {"run": run.name, "mode": run.mode, "delta": c.delta, "task": task.name, "shots": c.shots, "seed": run.seed, "lr": run.lr,
            "steps": c.steps if run.mode in TRAINED else 0, "best_step": result.best_step, "dev": result.dev, "test": result.test,
            "steps_to_scratch_best": None, "seconds": round(result.seconds, 1), "curve": result.curve, "settings": run.settings,
            **{name: count for name in ("skipped", "diverged") if (count := getattr(result, name))}}


class Book:
    """metrics.jsonl, summary.json and deltas/ of the output folder. What other calls have left there stays, unless the same
    run (mode, seed, learning rate and settings) is done again: then it goes first, so that a killed call leaves rows of whole runs, and
    none of two bases. `done`, with --resume, are the keys of those that need not be: their row, curve and delta are there, and of the
    same `origin`, a function of the run."""

    def __init__(self, c: Any, argv: list[str], out: Path, task: Task, plan: list[Run], origin: Callable[[Run], list[str]]):
        self.facts, self.c, self.out, self.task, self.plan, self.origin = {"config": record(c), "argv": argv}, c, out, task, plan, origin
        self.place = {run.name: i for i, run in enumerate(plan)}
        claim(out, {"metrics.jsonl", "summary.json", "deltas", FIGURES})
        before = summary_rows(out / "summary.json")
        missing = {run.key for run in plan}
        if c.resume:
            rows = {row["run"]: row for row in before}
            curves = Counter(str(row.get("run")) for row in read_rows(out / "metrics.jsonl") if "part" not in row)
            missing = {run.key for run in plan if not self.is_whole(run, rows.get(run.name), curves[run.name])}
        self.done = {run.key for run in plan} - missing
        again = {run.name for run in plan if run.key in missing}
        self.rows = [row for row in before if row["run"] not in again]
        if len(self.rows) < len(before):    # first, so that a row never is without its curve
            write_json(out / "summary.json", {"rows": self.rows, **self.facts})
        for name in again if not c.save_deltas else ():
            shutil.rmtree(out / "deltas" / name, ignore_errors=True)        # of what the run was before
        kept = {row["run"] for row in self.rows}        # a curve without a row is of a run that was killed
        self.log = Log(out, keep=lambda row: isinstance(row.get("run"), str) and row["run"] in kept)

    def is_whole(self, run: Run, row: dict | None, evaluations: int) -> bool:
        """Whether an earlier call has finished this run; `evaluations` is the number of rows of its curve."""
        return row is not None and is_of(row, run, self.origin(run)) and bool(row["test"]) and evaluations == len(row["curve"]) and (
            not self.c.save_deltas or has_whole_delta(self.out, run.name, self.origin(run)))

    def curve(self, run: Run, row: dict) -> None:
        """Write what a run says at an evaluation."""
        self.log.row(run=run.name, mode=run.mode, seed=run.seed, lr=run.lr, **row)

    def enter(self, run: Run, result: TuneResult, delta: Delta, about: dict) -> None:
        """Write a finished run: its delta, and its row in the summary, to which `about` is added."""
        c, row = run.c, row_of(run, self.task, result) | {"origin": self.origin(run)}
        if c.save_deltas:
            keep_delta(self.out, row, self.task, delta, self.facts)
        self.log.sync()
        self.rows.append({**row, **about})
        self.rows.sort(key=lambda row: self.place.get(row["run"], -1))      # as if none had been there before
        add_steps_to_scratch(self.belonging(c))
        write_json(self.out / "summary.json", {"rows": self.rows, **self.facts})

    def belonging(self, c: Any) -> list[dict]:
        """The rows with the settings of `c`, of this call or an earlier one, as long as old base, old delta and new base were the same."""
        def is_one(row: dict) -> bool:
            origin = self.origin(Run(c, row["mode"], row["seed"], row["lr"]))
            return is_same(row.get("origin", origin), origin) and belongs(row, c)

        return [row for row in self.rows if is_one(row)]

    def planned(self) -> list[dict]:
        """The rows of this call, done now or found, in its order; of a chain with base and route."""
        rows = {row["run"]: row for row in self.rows}
        return [rows[run.name] | ({"base": run.c.base, "route": run.route} if self.c.chain else {}) for run in self.plan]


def summary_rows(path: Path) -> list[dict]:
    """The rows of a summary.json of recycle.py; none where there is no file. InputError where it holds others."""
    rows = read_json(path).get("rows") if path.exists() else []
    if not isinstance(rows, list) or not all(map(is_row, rows)):
        raise InputError(f"{path}: its rows are not those of runs of recycle.py: give another --out, or move the file away")
    return rows


def is_row(row: object) -> bool:
    """Whether all that is read of a row later is there."""
    number = (int, float)
    kinds = {"run": str, "mode": str, "seed": int, "lr": (*number, NoneType), "dev": dict, "test": dict, "seconds": number,
             "settings": dict, "curve": list}
    return isinstance(row, dict) and all(name in row and isinstance(row[name], kind) for name, kind in kinds.items()) and (
        Path(row["run"]).name == row["run"] != ".." and len(row["dev"]) > 0
        and all(isinstance(value, number) for value in (*row["dev"].values(), *row["test"].values()))
        and all(isinstance(point, list) and len(point) == 2 and all(isinstance(x, number) for x in point) for point in row["curve"]))


def is_of(row: dict, run: Run, origin: list[str]) -> bool:
    """Whether a row is of this run, and of the same bases, old delta and task."""
    return is_same(row.get("origin"), origin) and row["lr"] == run.lr and row["settings"] == json.loads(json.dumps(run.settings))


def keep_delta(out: Path, row: dict, task: Task, delta: Delta, about: dict) -> None:
    """OUT/deltas/RUN, with the row's facts and `about` in it."""
    facts = {k: row[k] for k in ("task", "shots", "seed", "mode", "lr", "dev", "test", "origin") if row[k] != {}}
    info = {**facts, "labels": list(task.labels), "task_hash": task.hash, **about, **delta.info}
    save_delta(out / "deltas" / row["run"], replace(delta, info=info))


def has_whole_delta(out: Path, run: str, origin: list[str]) -> bool:
    """Whether OUT/deltas/RUN is as it was written, and of this origin."""
    folder = out / "deltas" / run
    try:
        facts = read_json(folder / "delta.json")
        return isinstance(facts.get("info"), dict) and facts["info"].get("origin") == origin and not differing(folder, "delta.json", facts)
    except (InputError, OSError):
        return False


def best_delta(folder: str | Path, base: str) -> Path:
    """`folder`, or where it is what recycle.py left, in it the best delta: of the mode and settings that are best on dev in the mean over
    seeds, each of which may have drawn another dev set, the best seed. Of a chain's, those for the base of fingerprint `base`; of equal
    ones one that recycles."""
    folder = Path(folder)
    if (folder / "delta.json").exists() or not (folder / "deltas").is_dir():
        return folder
    with shaped(folder / "summary.json", "its rows do not hold what they should"):
        rows = [row for row in summary_rows(folder / "summary.json") if (folder / "deltas" / row["run"] / "delta.json").exists()]
        fitting = [row for row in rows if read_json(folder / "deltas" / row["run"] / "delta.json")["info"]["base"] == base]
        groups: dict = {}
        for row in fitting or rows:
            groups.setdefault((row["mode"], row.get("route"), *by_settings(row)), []).append(row)
        group = max(groups.values(), key=lambda g: (mean(score(row["dev"]) for row in g), g[0]["mode"] != "scratch"), default=[])
        best = max(group, key=lambda row: score(row["dev"]), default=None)
    if best is None:
        raise InputError(f"{folder / 'summary.json'}: has no row of a run whose delta is still in {folder / 'deltas'}")
    return folder / "deltas" / best["run"]


def origin_of(r: Recycling, sources: Iterable[tuple[Delta, TaskData]] = ()) -> list[str]:
    """What a run's settings name by path only: old base, new base, old delta (and source deltas and tasks) and task, by content."""
    digest = hashlib.sha256()
    for delta, data in ((r.old_delta, None), *sources):
        for part in (delta.diffs, delta.modules, delta.head):
            for name, tensor in sorted(part.items()):
                digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(data.hash.encode() if data else b"")
    return [r.old_base.fingerprint, r.base.fingerprint, digest.hexdigest()[:16], r.data.hash]


def is_complete(out: Path, run: Run, origin: list[str]) -> bool:
    """Whether a sweep has left this run, of the same bases and old delta, whole."""
    path = out / "deltas" / run.name / "summary.json"
    if not path.exists():
        return False
    row = read_json(path)
    return is_row(row) and is_of(row, run, origin) and has_whole_delta(out, run.name, origin)


def is_same(found: object, origin: list[str]) -> bool:
    """Whether a row's origin is this one; rows from before that of the task was noted have one less."""
    return isinstance(found, list) and len(found) >= len(origin) - 1 and found == origin[:len(found)]


def keep_run(out: Path, argv: list[str], run: Run, task: Task, result: TuneResult, delta: Delta, curve: list[dict],
             origin: list[str]) -> None:
    """A folder for one run of a sweep; summary.json, the sign that it is complete, comes last."""
    row = row_of(run, task, result) | {"origin": origin}
    home = out / "deltas" / run.name
    (home / "summary.json").unlink(missing_ok=True)
    keep_delta(out, row, task, delta, {"config": record(run.c), "argv": argv})
    write_whole(home / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in curve))
    write_json(home / "summary.json", row)


def open_best(folder: str, base: Base) -> Delta:
    """A delta, or of a folder of recycle.py's runs the best one for `base`, which is said on stderr."""
    best = best_delta(folder, base.fingerprint)
    if best != Path(folder):
        print(f"best on dev of {folder}: {best.name}", file=sys.stderr)
    return open_delta(str(best), base)
