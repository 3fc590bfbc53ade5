"""What recycle.py is asked to do: its modes, its runs and their settings, and the refusal of flags that make no sense together."""
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rt.data import Task
from rt.deltas import Base, Delta
from rt.errors import InputError
from rt.formats.hub import NAMING
from rt.recycling import FROM_OLD, MODES, NEEDS_TEACHER, TRAINED, Recycling, check
from rt.runs import starts, teaching
from rt.runs.build import default_rate
from rt.runs.config import changed
from rt.runs.results import Run, unread
from rt.runs.starts import Projects
from rt.runs.sweep import expand
from rt.runs.teaching import WITHOUT_OLD
from rt.transport import check_sources
from rt.tune import TuneSettings

# For full deltas, the rate per mode that is best on dev, of 1e-4, 2e-4, 5e-4, 1e-3 and 2e-3 (results/demo/lr_search; project: as init).
FULL_LR = {"scratch": 5e-4, "init": 1e-4, "distill": 1e-3, "init+distill": 1e-4, "project": 1e-4}


def checked_modes(c: Any) -> list[str]:
    """The modes that the flags ask for. Sets --old_base for the demo. Raises InputError if flags make no sense together."""
    demo = Path(type(c).base).absolute().parent
    is_demo = {Path(name).absolute().parent for name in c.chain or (c.base,)} == {demo}
    if is_demo and not c.old_base and (c.old_delta or not c.teaching.teacher):
        c.old_base = str(Path(type(c).base).with_name("M0"))
    asked = {"project": bool(c.project.source_task), "transport": c.carry.carry, "gradmask": False}      # whether `all` includes them
    asked |= dict.fromkeys(c.mode, True)
    modes = [mode for mode in MODES if asked.get(mode, c.old_base or mode in WITHOUT_OLD)] if "all" in c.mode else [*c.mode]
    if c.delta.kind != "same":
        c.delta.check()
    line = [str(Path(name or "")) for name in (c.old_base, *c.chain)]
    idle = {name: f"mode {','.join(modes)}" for name in changed(c) if all(name in unread(type(c), mode) for mode in modes)}
    idle |= dict.fromkeys(c.delta.idle, f"delta {c.delta.kind}")
    for is_wrong, sentence in (
            *teaching.refusals(c, modes), *starts.refusals(c, modes),
            (c.sweep is not None and (c.chain or "project" in modes or not c.save_deltas),
             "--sweep has no --chain and no --mode project, and keeps the deltas, from which it goes on when interrupted"),
            (c.graphs and c.distill.runs_teacher,
             "--graphs repeats a step as it was captured: not with --itp, whose points are drawn anew, nor with --gamma, which would count "
             "the tokens that fill a batch up"),
            (c.side_by_side and c.sweep is None, "--side_by_side is for the runs of a --sweep"),
            (c.chain and (c.base != type(c).base or len({*line}) < len(line)),
             f"--chain {','.join(c.chain)}: give the bases after --old_base {c.old_base} in order, each once, and leave out --base"),
            *((True, f"--{name} has no effect with --{what}") for name, what in idle.items())):
        if is_wrong:
            raise InputError(sentence)
    return modes


def check_all(c: Any, r: Recycling, plan: list[Run], bases: dict[str, Base], projects: Projects) -> None:
    """Raises InputError, before anything is written, if a run cannot be done; `r` holds the inputs of the first run."""
    for base in bases.values():
        base.require_length(c.seq_len)
        for one in plan:
            check(replace(r, base=base, **settings_of(one)), one.mode)
    if c.head == "prototype" and {one.mode for one in plan} <= {*FROM_OLD, "project"} and (r.merged or r.old_delta).labels == r.data.labels:
        raise InputError("--head prototype has no effect: the old delta has the task's labels, and these modes keep its head")
    if projects:
        check_sources(r.old_base, r.base, projects, r.old_delta)


def announce(c: Any, task: Task, old: Delta | None) -> None:
    """Print what is about to be done."""
    fewest = len(task.parts["train"]) if task.is_regression else min(Counter(e.label for e in task.parts["train"]).values())
    few = (f"{'up to ' * (fewest < c.shots)}{c.shots} examples{' a label' * (not task.is_regression)}" if c.shots
           else f"{len(task.parts['train'])} examples")
    what = "regression" if task.is_regression else f"{len(task.labels)} labels"
    sources = filter(None, (c.old_base and f"{c.old_base} + {c.old_delta}", c.teaching.teacher))
    line = filter(None, (" and ".join(sources), *(c.chain or (c.base,))))
    print(f"{task.name} ({what}, {few}), {c.delta.kind}: {' -> '.join(line)}")
    if old and old.labels != task.labels:
        print(f"the old delta was learned on {old.info.get('task')}, with other labels: init keeps the delta and starts a {c.head} head"
              + (f" (if its {', '.join(old.labels[:4])} are those of the task: {NAMING})" if len(old.labels) == len(task.labels) else ""))


def possible(c: Any, modes: list[str], task: Task, old: Delta | None) -> list[str]:
    """`modes`; for --mode all, without those that an old delta with other labels rules out."""
    if "all" not in c.mode or old is None or old.labels == task.labels:
        return modes
    taught = NEEDS_TEACHER if c.teaching.teacher else ()
    allowed = {"scratch", "init", *["apply", "transport"] * (c.head == "prototype"), *taught, *c.mode}
    return [mode for mode in modes if mode in allowed]


def planned(c: Any, modes: list[str]) -> list[Run]:
    """A run for every seed, mode and learning rate of every combination of --sweep."""
    points = expand(c, c.sweep or "")       # without a sweep, `c` alone
    for point in points:
        checked_modes(point)
    runs = [Run(point, mode, seed, lr) for point in points for seed in point.seeds for mode in modes for lr in learning_rates(point, mode)]
    return [*{one.name: one for one in runs}.values()]      # several points of a sweep can be one run: scratch does not read alpha


def learning_rates(c: Any, mode: str) -> tuple[float | None, ...]:
    """The learning rates to try; None for a mode that does not train."""
    if mode not in (*TRAINED, "project"):
        return (None,)
    return c.lr or (FULL_LR.get(mode, 5e-4) if c.delta.kind == "full" else default_rate(c.delta.kind),)


def default_out(c: Any, task: Task) -> str:
    """runs/recycle/BASE-TASK-DELTA, with --shots also -kSHOTS. For a chain, BASE names all bases."""
    first, *rest = c.chain or (c.base,)
    lineage = "-".join([*Path(first).parts[-2:], *(Path(name).name for name in rest)])
    return f"runs/recycle/{lineage}-{task.name}-{c.delta.kind}" + (f"-k{c.shots}" if c.shots else "") + ("-sweep" if c.sweep else "")


def settings_of(one: Run) -> dict:
    """The fields of a Recycling that differ between runs."""
    c = one.c
    return {"settings": TuneSettings(c.steps, c.batch_size, one.lr or 0.0, c.eval_every, one.seed, c.weight_decay, c.warmup,
                                     early_stop=c.early_stop, keep_diverged=True),
            "distill": c.distill, "share": c.teaching.unlabelled_share}
