"""What changes the old delta before a run starts from it: merging by dev score (--merge); a map learned on other tasks
(--mode project) or found from text (--mode transport, --carry)."""
import itertools
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch

from rt.data import Example, Task, TaskData, encode
from rt.deltas import Base, Delta
from rt.errors import InputError
from rt.formats.corpora import read_documents
from rt.formats.hub import open_base
from rt.formats.tables import FORMATS, format_of
from rt.formats.tasks import texts_of
from rt.kinds import DeltaConfig
from rt.limits import PositiveInt
from rt.recycling import CARRIES, TRAINED, Recycling, carried_modes, start
from rt.runs.results import old_names
from rt.runs.teaching import WITHOUT_OLD
from rt.transport import Granularity, learn_projection
from rt.tune import evaluate, score

Projects = list[tuple[Delta, TaskData]]     # deltas of the old base and their tasks, for --mode project
CARRY_TEXTS = 512       # texts on which the activations of two bases are compared


@dataclass(frozen=True)
class ProjectConfig:
    """The tasks and deltas that a map of deltas is learned on, and the shape of the map."""
    source_task: tuple[str, ...] = ()  # project: the tasks that the map is learned on, with all their examples
    source_delta: tuple[str, ...] = ()  # project: the deltas of these tasks for --old_base; default: tuned, as for --old_delta
    rank: PositiveInt = 16  # project: rank of W1 W2 in w' = w W1 W2 + b
    granularity: Granularity = "auto"  # project: flat (w: the whole delta), tensor (w: a tensor's rows); auto: tensor for full, else flat
    residual: bool = False  # project: w' = w + w W1 W2 + b
    project_steps: PositiveInt = 200  # project: optimizer steps for the map


@dataclass(frozen=True)
class CarryConfig:
    """A map, found from text, that carries the old delta to the new base."""
    carry: bool = False  # init, init+distill, gradmask: start from the delta that transport gives
    carry_text: str | None = None  # transport: file of texts without labels (.txt, .jsonl, .parquet); default: the task's training texts


def refusals(c: Any, modes: list[str]) -> Iterable[tuple[Any, str]]:
    """(whether it is wrong, error message) for each combination of flags in recycle.py's Config `c` that may make no sense."""
    tasks, deltas, several = c.project.source_task, c.project.source_delta, len(old_names(c.old_delta)) > 1
    carried, alone = {*modes} & {*carried_modes(c.carry.carry)}, WITHOUT_OLD if c.teaching.teacher else ("scratch",)
    return ((c.old_delta and "" in old_names(c.old_delta), f"--old_delta {c.old_delta}: one of the names is empty"),
            (c.delta.kind == "same" and (not c.old_delta or tasks and not deltas),
             "--delta same takes the kind of --old_delta: give --old_delta (with --source_task also --source_delta), or name a kind"),
            ("project" not in modes and (tasks or deltas), "--source_task and --source_delta are for --mode project"),
            ("project" in modes and (not tasks or len(deltas) not in (0, len(tasks))),
             f"--mode project needs --source_task, and either no --source_delta or one per task: {len(tasks)} tasks, {len(deltas)} deltas"),
            (c.carry.carry and not {*modes} & {*CARRIES}, f"--carry is for modes that start from a delta: {', '.join(CARRIES)}"),
            (c.carry.carry_text and not carried, "--carry_text is for --mode transport and --carry"),
            (bool(carried or "project" in modes) + bool(c.chain) + several > 1,
             "--mode project, --mode transport or --carry, --chain, and several deltas in --old_delta: one of them at a time"),
            (c.merge != type(c).merge and not several, f"--merge {c.merge} is for several deltas in --old_delta"),
            (c.shrinkage and c.head == "fresh", "--shrinkage is for --head prototype"),
            (not c.old_base and (c.old_delta or {*modes} - {*alone}),
             "--old_base is missing: only scratch, and distill from the answers of a --teacher, do without it"))


def merge_on_dev(r: Recycling, deltas: list[Delta], how: str) -> tuple[Delta, dict]:
    """(merged delta, facts for the run's record). Merges the subset whose `apply` is best on dev, or all deltas if the head is
    fresh and none of them has the task's labels."""
    choices, found = sorted([*itertools.product((0.0, 1.0), repeat=len(deltas))][1:], key=sum, reverse=True), []
    if r.head == "fresh" and r.data.labels not in [delta.labels for delta in deltas]:
        choices = choices[:1]
    for choice in choices:
        merged = combine(deltas, weights := [w / sum(choice) for w in choice], how, r.data.labels)
        dev = evaluate(start(replace(r, merged=merged), "apply"), r.data.dev, r.device, r.precision) if len(choices) > 1 else {"": None}
        found.append((score(dev), merged, {"merged": {"how": how, "weights": weights, "tried": len(choices)}}))
    return max(found, key=lambda one: one[0])[1:]


def new_kind(c: Any, modes: list[str], old: Delta | None) -> DeltaConfig:
    """The kind and sizes of the deltas that the runs make: if nothing is trained, those of `old`. InputError if --delta asks for others."""
    trained = {*modes} & {*TRAINED}
    if trained and c.delta.kind != "same":
        return c.delta
    kept = DeltaConfig(**old.config.used)
    if c.delta.kind not in ("same", kept.kind) and "delta" in c.typed:
        raise InputError(f"--delta {c.delta.kind} has no effect with --mode {','.join(modes)}, which keeps the old delta ({kept.kind})")
    return kept


def combine(deltas: Sequence[Delta], weights: Sequence[float], how: str, labels: tuple[str, ...]) -> Delta:
    """Merge deltas of one kind and base. "mean" is the sum of w d. "ties" (Yadav et al., 2023) keeps the largest fifth of each delta and
    takes, per entry, the mean of the values with the sum's sign. The head is the mean of the heads with `labels`, or else the first head.
    InputError for deltas that cannot be added; with ties also for modules, because their entries do not correspond."""
    own = [(w, d) for w, d in zip(weights, deltas) if d.labels == labels] or [(1.0, deltas[0])]
    scale = sum(w for w, _ in own)
    head = {k: sum((w / scale if scale else 1 / len(own)) * d.head[k] for w, d in own) for k in own[0][1].head}
    bodies = [replace(d, head={}, info=d.info | {"labels": []}) for d in deltas]
    total = reduce(add, (w * body for w, body in zip(weights, bodies)))
    if how == "ties":
        if total.modules:
            raise InputError(f"--merge ties compares weights of the base entry by entry, not modules of {total.config.kind}: use mean")
        flat, w = torch.stack([torch.cat([v.flatten() for v in body.diffs.values()]) for body in bodies]), torch.tensor(weights)[:, None]
        flat = flat * (flat.abs() > flat.abs().kthvalue(max(1, round(0.8 * flat.shape[1])), keepdim=True).values)
        agree = w * (flat * (w * flat).sum(0) > 0)
        merged = ((agree * flat).sum(0) / agree.sum(0).clamp_min(1e-12)).split([v.numel() for v in total.diffs.values()])
        total = replace(total, diffs={k: v.view_as(total.diffs[k]) for k, v in zip(total.diffs, merged)})
    return replace(total, head=head, info=own[0][1].info)


def open_bases(c: Any, task: Task, device: torch.device) -> dict[str, Base]:
    """--base, or the bases of --chain, by name. InputError if one gives other ids for the task's texts, which are encoded once."""
    bases = {name: open_base(name).to(device) for name in c.chain or (c.base,)}
    first, texts = next(iter(bases)), texts_of(task)
    for name, base in bases.items():
        if not base.tokenizer.reads_as(bases[first].tokenizer, texts):
            raise InputError(f"--chain: the tokenizer of {name} gives other ids for the texts of {task.name} than that of {first}, and all "
                             "bases of a chain must read them alike: recycle to each with --base")
    return bases


def carry_texts(path: str | None, task: Task, base: Base, seq_len: int) -> list[list[int]]:
    """The token ids of the first CARRY_TEXTS texts of --carry_text, or else of the task's training texts."""
    if path and (Path(path).is_dir() or not Path(path).exists()):
        raise InputError(f"--carry_text {path}: is not a file; give a file of texts (.txt, .jsonl or .parquet)")
    if path and format_of(Path(path)) not in FORMATS:       # it would be read as JSON
        raise InputError(f"--carry_text {path}: does not end in .txt, .jsonl or .parquet, so it is not known how to read it; rename it")
    own = (f"{e.text} {e.text_pair or ''}" for e in task.parts["train"])
    if not (texts := [*itertools.islice(read_documents(Path(path)) if path else own, CARRY_TEXTS)]):
        raise InputError(f"--carry_text {path}: holds no text to compare two bases on")
    return encode([Example(text, None, None, "") for text in texts], (), base.tokenizer, seq_len).sequences


def learn_map(r: Recycling, p: ProjectConfig, projects: Projects, on_eval: Callable[[dict], None]) -> dict:
    """Learn the map of --mode project. Returns fields for the run's row. A map that diverged is the best one before that."""
    equal = {delta.num_outputs for delta, _ in projects} == {r.old_delta.num_outputs}    # if so, heads are projected too
    r.projection = learn_projection(
        r.old_base, r.base, projects, replace(r.settings, steps=p.project_steps), r.distill, r=p.rank,
        granularity=p.granularity, residual=p.residual, device=r.device, precision=r.precision, with_head=equal, on_step=r.on_step,
        on_eval=on_eval)
    about = {name: getattr(r.projection, name) for name in ("r", "granularity", "residual", "with_head", "best_step", "dev")}
    about |= {"sources": [data.name for _, data in projects], "numbers": sum(p.numel() for p in r.projection.parameters())}
    return {"projection": about, **({"diverged": r.projection.diverged} if r.projection.diverged else {})}
