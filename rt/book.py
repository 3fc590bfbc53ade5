"""What recycle.py leaves: a row a run in summary.json, curves in metrics.jsonl, deltas. A run is told from others by all it depends on."""
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from rt.config import UsageError, record
from rt.deltas import Delta, save_delta
from rt.log import FIGURES, Log, claim, read_json, write_json, write_whole
from rt.outside import MISSHAPEN
from rt.recycling import NEEDS_TEACHER, TRAINED, Recycling
from rt.summary import add_steps_to_scratch, by_settings
from rt.tasks import Task
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
        return f"{self.mode}-s{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"

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
    none of two bases. `done`, with --resume, are the keys of those that need not be. `origins`: `origin_of` for each new base, by its
    name."""

    def __init__(self, c: Any, argv: list[str], out: Path, task: Task, plan: list[Run], origins: dict[str, list[str]]):
        self.facts, self.c, self.out, self.task, self.origins = {"config": record(c), "argv": argv}, c, out, task, origins
        self.plan = {run.name for run in plan}
        claim(out, {"metrics.jsonl", "summary.json", "deltas", FIGURES})
        before = read_json(out / "summary.json")["rows"] if (out / "summary.json").exists() else []
        whole = {row["run"]: row.get("origin") for row in before if c.resume and (not c.save_deltas or has_delta(out, row))}
        missing = {run.key for run in plan if not is_same(whole.get(run.name), origins[run.c.base])}
        self.done = {run.key for run in plan} - missing
        again = {run.name for run in plan if run.key in missing}
        self.rows = [row for row in before if row["run"] not in again]
        if len(self.rows) < len(before):    # first, so that a row never is without its curve
            write_json(out / "summary.json", {"rows": self.rows, **self.facts})
        kept = {row["run"] for row in self.rows}        # a curve without a row is of a run that was killed
        self.log = Log(out, keep=lambda row: row["run"] in kept)

    def curve(self, run: Run, row: dict) -> None:
        """Write what a run says at an evaluation."""
        self.log.row(run=run.name, mode=run.mode, seed=run.seed, lr=run.lr, **row)

    def enter(self, run: Run, result: TuneResult, delta: Delta, about: dict) -> None:
        """Write a finished run: its delta, and its row in the summary, to which `about` is added."""
        c, row = run.c, row_of(run, self.task, result) | {"origin": self.origins[run.c.base]}
        if c.save_deltas:
            keep_delta(self.out, row, self.task, delta, self.facts)
        self.log.sync()
        self.rows.append({**row, **about})
        add_steps_to_scratch(self.belonging(c))
        write_json(self.out / "summary.json", {"rows": self.rows, **self.facts})

    def belonging(self, c: Any) -> list[dict]:
        """The rows with the settings of `c`, of this call or an earlier one, as long as old base, old delta and new base were the same."""
        origin = self.origins[c.base]
        return [row for row in self.rows if is_same(row.get("origin", origin), origin) and belongs(row, c)]


def keep_delta(out: Path, row: dict, task: Task, delta: Delta, about: dict) -> None:
    """OUT/deltas/RUN, with the row's facts and `about` in it."""
    facts = {k: row[k] for k in ("task", "shots", "seed", "mode", "lr", "dev", "test") if row[k] != {}}
    info = {**facts, "labels": list(task.labels), "task_hash": task.hash, **about, **delta.info}
    save_delta(out / "deltas" / row["run"], replace(delta, info=info))


def has_delta(out: Path, row: dict) -> bool:
    return Path(row["run"]).name == row["run"] != ".." and (out / "deltas" / row["run"] / "delta.json").exists()


def best_delta(folder: str | Path, base: str) -> Path:
    """`folder`, or where it is what recycle.py left, in it the best delta: of the mode and settings that are best on dev in the mean over
    seeds, each of which may have drawn another dev set, the best seed. Of a chain's, those for the base of fingerprint `base`; of equal
    ones one that recycles."""
    folder = Path(folder)
    if (folder / "delta.json").exists() or not (folder / "deltas").is_dir():
        return folder
    try:
        rows = [row for row in read_json(folder / "summary.json").get("rows", []) if has_delta(folder, row)]
        fitting = [row for row in rows if read_json(folder / "deltas" / row["run"] / "delta.json")["info"]["base"] == base]
        groups: dict = {}
        for row in fitting or rows:
            groups.setdefault((row["mode"], row.get("route"), *by_settings(row)), []).append(row)
        group = max(groups.values(), key=lambda g: (mean(score(row["dev"]) for row in g), g[0]["mode"] != "scratch"), default=[])
        best = max(group, key=lambda row: score(row["dev"]), default=None)
    except UsageError:
        raise
    except MISSHAPEN as error:
        raise UsageError(f"{folder / 'summary.json'}: its rows do not hold what they should ({type(error).__name__}: {error})") from None
    if best is None:
        raise UsageError(f"{folder / 'summary.json'}: has no row of a run whose delta is still in {folder / 'deltas'}")
    return folder / "deltas" / best["run"]


def origin_of(r: Recycling) -> list[str]:
    """What a run's settings name by path only: old base, new base, old delta and task, by content."""
    digest = hashlib.sha256()
    for part in (r.old_delta.diffs, r.old_delta.modules, r.old_delta.head):
        for name, tensor in sorted(part.items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return [r.old_base.fingerprint, r.base.fingerprint, digest.hexdigest()[:16], r.data.hash]


def is_complete(out: Path, run: str, origin: list[str]) -> bool:
    """Whether a sweep has left this run, of the same bases and old delta."""
    path = out / "deltas" / run / "summary.json"
    return path.exists() and is_same(read_json(path).get("origin"), origin)


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
