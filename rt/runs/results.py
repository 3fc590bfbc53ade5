"""What recycle.py writes to --out: one folder per run under deltas/, which appears whole, and the rows of all runs in summary.json.

    deltas/RUN/delta.safetensors, delta.json    unless --no_save_deltas
    deltas/RUN/metrics.jsonl                    the run's evaluations
    deltas/RUN/summary.json                     the run's row

Equal runs of different calls have equal names: the name contains a hash of all flags that the run depends on. Flags name bases, deltas and
tasks by path, so their content is compared as well: the row's `origin` holds hashes of it.
"""
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Sequence

import torch

from rt.data import Task, TaskData
from rt.deltas import Base, Delta, check_fits
from rt.errors import InputError
from rt.formats.atomic import differing, digest_of
from rt.formats.delta_files import delta_folder, nbytes, open_delta, write_delta
from rt.formats.files import FIGURES, check_overwritable, read_json, write_json
from rt.formats.untrusted import shaped
from rt.recycling import CARRIES, FROM_OLD, NEEDS_TEACHER, TRAINED, Recycling
from rt.runs.config import changed, flags_of, record
from rt.runs.log import Log, facts_of
from rt.runs.summary import add_steps_to_scratch, best_of, by_settings, group, routes, source_of
from rt.tune import TuneResult, score

# flags that do not change what a run computes, or that have their own place in its row
NOT_SETTINGS = {"mode", "seeds", "lr", "out", "cache", "device", "resume", "save_deltas", "sweep", "side_by_side", "graphs",
                "deterministic", "tensorboard", "workers", "threads"}
# part of a Config -> the modes that read it
USED_BY = {"distill": (*NEEDS_TEACHER, "project"), "project": ("project",), "teaching": NEEDS_TEACHER, "carry": CARRIES, "merge": FROM_OLD}
# the first version's flags, which are in the name of every run; the default of any other flag is not, so earlier runs keep their names
FIRST = {"old_base", "old_delta", "base", "task", "delta", "bottleneck", "r", "lora_alpha", "target_modules", "prefix_len", "shots",
         "alpha", "beta", "T", "att_layers", "public_code", "steps", "batch_size", "warmup", "weight_decay", "eval_every", "seq_len",
         "source_task", "source_delta", "rank", "granularity", "residual", "project_steps", "shrinkage", "precision"}


# --- equal names for equal runs ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """One row of the results. `c` is recycle.py's Config; in a chain, the Config for one base (see `at`)."""
    c: Any
    mode: str
    seed: int
    lr: float | None
    route: str | None = None    # chain or direct; None outside chains and for scratch

    @cached_property
    def settings(self) -> dict:
        """The flags that the run depends on, except seed and learning rate. A direct run in a chain equals a run without --chain."""
        c = self.c if self.route == "chain" else replace(self.c, chain=())
        off = {flag.name for flag in flags_of(type(c))} - FIRST - changed(c).keys()
        off |= {name for name, of in (("att_layers", "gamma"), ("shrinkage", "head")) if of in off}
        off |= {"carry"} if self.mode == "transport" else {"carry_text"} if "carry" in off else set()      # transport carries anyway
        return {k: v for k, v in record(c).items() if k not in NOT_SETTINGS | unread(type(c), self.mode) | off}

    @cached_property
    def name(self) -> str:
        return f"{self.mode}-s{self.seed}-{digest_of([self.settings, self.lr])[:10]}"

    def at(self, base: str, route: str | None) -> "Run":
        """This run on one base of --chain. The chain in its config ends at that base."""
        until = self.c.chain.index(base) + 1
        return replace(self, c=replace(self.c, base=base, chain=self.c.chain[:until]), route=route)

    def links(self) -> list["Run"]:
        """A list of this run alone, or, in a chain, of one run per base and route."""
        return [self.at(base, route) for base in self.c.chain for route in routes(self.mode)] if self.c.chain else [self]


def unread(config: type, mode: str) -> set[str]:
    """The flags of nested settings that `mode` does not read."""
    return {flag.name for flag in flags_of(config) if mode not in USED_BY.get(flag.path[0], (mode,))}


def origin_of(r: Recycling, sources: Iterable[tuple[Delta, TaskData | None]] = (), texts: Sequence[list[int]] = (),
              content: str = "") -> list[str]:
    """Content hashes of what flags name by path: old base, new base, old delta (with tokenizers, other deltas, texts, and the teacher's
    content), task."""
    digest = hashlib.sha256(content.encode())
    for base in (r.old_base, r.base):
        digest.update(base.tokenizer.fingerprint.encode() if base else b"")
    for delta, data in (*([(r.old_delta, None)] if r.old_delta else []), *sources):
        digest.update(str((delta.labels, delta.config.used)).encode())
        for part in (delta.diffs, delta.modules, delta.head):
            for name, tensor in sorted(part.items()):
                digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(data.hash.encode() if data else b"")
    digest.update(str(texts).encode() if texts else b"")
    return [r.old_base.fingerprint if r.old_base else "", r.base.fingerprint, digest.hexdigest()[:16], r.data.hash]


def base_origins(runs: list[Run], r: Recycling, bases: dict[str, Base], sources: Iterable[tuple[Delta, None]], content: str) -> dict:
    """{name of a run: its `origin_of`}. In a chain recycled from base to base, the bases before the run's own count as well. The
    `content` of files counts for modes with a teacher, which alone read them."""
    def others(run: Run) -> str:
        before = run.c.chain[:-1] if run.route == "chain" else ()
        return (content if run.mode in NEEDS_TEACHER else "") + "".join(bases[b].fingerprint for b in before)

    places = {run.name: (run.c.base, others(run)) for run in runs}
    found = {(base, more): origin_of(replace(r, base=bases[base]), sources, (), more) for base, more in {*places.values()}}
    return {name: found[place] for name, place in places.items()}


# --- a run -------------------------------------------------------------------------------------------------------------

def save_run(out: Path, run: Run, task: Task, result: TuneResult, delta: Delta, curve: list[dict], origin: list[str], more: dict) -> None:
    """Write OUT/deltas/RUN. `more` is added to the run's row."""
    c = run.c
    row = {"run": run.name, "mode": run.mode, "delta": delta.config.kind, "task": task.name, "shots": c.shots, "seed": run.seed,
           "lr": run.lr, "steps": c.steps if run.mode in TRAINED else 0, "best_step": result.best_step, "dev": result.dev,
           "test": result.test, "steps_to_scratch_best": None, "seconds": round(result.seconds, 1), "curve": result.curve,
           "settings": run.settings, "threads": torch.get_num_threads(),    # their number changes last bits
           **{name: count for name in ("skipped", "diverged") if (count := getattr(result, name))}, "origin": origin, **more}
    with delta_folder(out / "deltas" / run.name, nbytes(delta)) as new:
        if c.save_deltas:
            facts = {k: row[k] for k in ("shots", "seed", "mode", "lr", "precision", "dev", "test", "origin") if row[k] != {}}
            facts |= facts_of(task) | {"config": record(c), "argv": sys.argv}
            write_delta(new, replace(delta, info=facts | delta.info))
        log = Log(new, tensorboard=c.tensorboard)
        for line in curve:
            log.row(**line)
        write_json(new / "summary.json", row)


def finished_row(out: Path, run: Run, origin: list[str], precision: str | None = None) -> dict | None:
    """The row of a run that an earlier call finished with the same settings, origin and precision (older rows do not name it), or None."""
    folder = out / "deltas" / run.name
    try:
        row = read_json(folder / "summary.json")
        check_rows([row], folder / "summary.json")
        is_damaged = run.c.save_deltas and differing(folder, "delta.json", read_json(folder / "delta.json"))
    except (InputError, OSError):
        return None
    same = (row.get("origin"), row["lr"], row["settings"], row.get("precision", precision)) == (origin, run.lr, run.settings, precision)
    return row if same and not is_damaged else None


# --- all runs ----------------------------------------------------------------------------------------------------------

def begin(c: Any, out: Path, runs: list[Run], origin: dict[str, list[str]], is_tested: bool = True,
          precision: str | None = None) -> set[str]:
    """The names of the runs that --resume or --sweep finds finished, with a score on test if the task `is_tested`. The folders of all other
    runs are removed first, so a killed call leaves only rows of whole runs, all of one origin."""
    check_overwritable(out, {"metrics.jsonl", "summary.json", "deltas", FIGURES})       # an earlier version wrote metrics.jsonl
    summary_rows(out / "summary.json")      # InputError if it cannot be read, before anything is removed
    finished = set()
    for run in runs:
        row = finished_row(out, run, origin[run.name], precision) if c.resume or c.sweep is not None else None
        if row and (row["test"] or not is_tested or c.sweep is not None):
            finished.add(run.name)
        else:
            shutil.rmtree(out / "deltas" / run.name, ignore_errors=True)
    write_summary(c, out, runs)
    return finished


def write_summary(c: Any, out: Path, runs: list[Run]) -> list[dict]:
    """Write summary.json: the rows of other calls, then the rows of the finished runs in `runs`. Returns the rows of `runs`."""
    paths = {run.name: out / "deltas" / run.name / "summary.json" for run in runs}
    place = {run.name: {"base": run.c.base, "route": run.route} if c.chain else {} for run in runs}
    unknown = {"steps_to_scratch_best": None} if c.sweep is not None else {}     # an earlier sweep may have had another scratch
    own = [read_json(path) | place[name] | unknown for name, path in paths.items() if path.exists()]
    rows = [row for row in summary_rows(out / "summary.json") if row["run"] not in paths] + own
    for some in [own] if c.sweep is not None else comparable(rows, unread(type(c), "scratch")):
        add_steps_to_scratch(some)
    write_json(out / "summary.json", {"rows": rows, "config": record(c), "argv": sys.argv})
    return own


def comparable(rows: list[dict], more: set[str]) -> list[list[dict]]:
    """Group the rows that share a scratch baseline. Scratch does not read the old base and delta, --chain or the flags in `more`."""
    more = more | {"chain", "old_base", "old_delta"}
    return [*group(rows, lambda row: row.get("origin", [])[1::2],       # new base and task
                   lambda row: {k: v for k, v in row["settings"].items() if k not in more}).values()]


def summary_rows(path: Path) -> list[dict]:
    """The rows of recycle.py's summary.json; an empty list if there is no file. InputError if the file is something else."""
    rows = read_json(path, {"rows": []}).get("rows")
    check_rows(rows, path)
    return rows


def check_rows(rows: list[dict], path: Path) -> None:
    """InputError if a value in these rows that is read later is missing or of the wrong type."""
    with shaped(path, "its rows are not those of runs of recycle.py: give another --out, or move the file away"):
        for row in rows:
            if Path(row["run"]).name != row["run"] or row["run"] == ".." or not isinstance(row.get("origin", []), list):
                raise ValueError(row["run"])
            row["mode"].upper(), row["settings"].keys(), [0 + n for n in (row["seconds"], row["seed"], row["lr"] or 0, score(row["dev"]))]
            [0 + (value or 0) for value in row["test"].values()], [0 + step + (value or 0) for step, value in row["curve"]]


# --- old deltas --------------------------------------------------------------------------------------------------------

def best_delta(folder: str | Path, base: str) -> Path:
    """`folder`, or the best delta in it if recycle.py wrote it: the best seed of the mode and settings that `best_of` takes; each seed may
    draw its own dev set. Runs that diverged do not count. In a chain, deltas for the base with fingerprint `base` count."""
    folder = Path(folder)
    if (folder / "delta.json").exists() or not (folder / "deltas").is_dir():
        return folder
    if "rows" not in read_json(folder / "summary.json", {}):
        raise InputError(f"{folder}: is not a folder of recycle.py, of which the best delta is taken; give one of {folder / 'deltas'}")
    rows = [row for row in summary_rows(folder / "summary.json")
            if (folder / "deltas" / row["run"] / "delta.json").exists() and not row.get("diverged")]
    with shaped(folder / "summary.json", "its rows do not hold what they should"):
        fitting = [row for row in rows if read_json(folder / "deltas" / row["run"] / "delta.json")["info"]["base"] == base]
        runs = best_of(group(fitting or rows, "mode", by_settings, source_of).values())
        best = max(runs, key=lambda row: score(row["dev"]), default=None)
        tasks = sorted({(row["task"], *row.get("origin", [])[3:]) for row in fitting or rows if "task" in row})     # with its content
    if len(tasks) > 1:
        what = "several tasks" if len(names := dict.fromkeys(name for name, *_ in tasks)) > 1 else "a task whose files have changed"
        raise InputError(f"{folder}: has runs on {what} ({', '.join(names)}), so none is the best; name one of {folder / 'deltas'}")
    if best is None:
        raise InputError(f"{folder / 'summary.json'}: has no row of a run whose delta is still in {folder / 'deltas'}")
    return folder / "deltas" / best["run"]


def open_best(folder: str, base: Base) -> Delta:
    """The delta in `folder` (or of a hub id). In a folder of recycle.py, it is the best delta for `base`, and stderr gets its name."""
    best = best_delta(folder, base.fingerprint)
    if best != Path(folder):
        print(f"best on dev of {folder}: {best.name}", file=sys.stderr)
        folder = str(best)
    return open_delta(folder, base)     # as it was typed: ./OWNER/NAME is a folder, OWNER/NAME a hub id


def old_names(text: str | None) -> list[str]:
    """The names in --old_delta A,B,C. An existing folder is one name, even if its name contains commas."""
    is_list = text and not os.path.exists(text)     # Path.exists raises an error for a long list
    return [*map(str.strip, text.split(","))] if is_list else [text or ""]


def open_old(text: str, base: Base, labels: tuple[str, ...]) -> tuple[list[Delta], Delta]:
    """(the deltas of --old_delta, the teacher). The teacher is the first with the task's labels, or else the first."""
    olds = [open_best(name, base).ordered(labels) for name in old_names(text)]
    for name, delta in zip(old_names(text), olds):
        try:
            check_fits(base, delta, stale_ok=False)
        except InputError as error:
            raise InputError(f"--old_delta {name}: does not fit --old_base: {error}") from None
    return olds, next((delta for delta in olds if delta.labels == labels), olds[0])
