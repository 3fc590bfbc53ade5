"""Opens the deltas of --old_delta, merges several deltas by their dev score (--merge), and reads the texts of --carry."""
import itertools
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Sequence

import torch

from rt.data import Example, Task, encode
from rt.deltas import Base, Delta
from rt.errors import InputError
from rt.formats.corpora import read_documents
from rt.recycling import Recycling, start_from_old
from rt.runs.results import open_best
from rt.tune import evaluate, score

CARRY_TEXTS = 512       # texts on which the activations of two bases are compared


def old_names(text: str | None) -> list[str]:
    """The names in --old_delta A,B,C. An existing folder is one name, even if its name contains commas."""
    return text.split(",") if text and not Path(text).exists() else [text or ""]


def open_old(text: str, base: Base, labels: tuple[str, ...], how: str) -> tuple[list[Delta], Delta, Delta | None]:
    """(old deltas, teacher, merged delta or None for a single one). The teacher is the first with the task's labels, or else the first."""
    olds = [open_best(name, base).ordered(labels) for name in old_names(text)]
    merged = combine(olds, [1 / len(olds)] * len(olds), how, labels) if len(olds) > 1 else None
    return olds, next((delta for delta in olds if delta.labels == labels), olds[0]), merged


def merge_on_dev(r: Recycling, deltas: list[Delta], how: str) -> tuple[Delta, dict]:
    """(merged delta, facts for the run's record). Merges the subset whose `apply` is best on dev, or all deltas if the head is fresh."""
    choices, found = sorted([*itertools.product((0.0, 1.0), repeat=len(deltas))][1:], key=sum, reverse=True), []
    if r.head == "fresh" and r.data.labels not in [delta.labels for delta in deltas]:
        choices = choices[:1]
    for choice in choices:
        merged = combine(deltas, weights := [w / sum(choice) for w in choice], how, r.data.labels)
        dev = evaluate(start_from_old(replace(r, merged=merged)), r.data.dev, r.device, r.precision) if len(choices) > 1 else {"": None}
        found.append((score(dev), merged, {"merged": {"how": how, "weights": weights, "tried": len(choices)}}))
    return max(found, key=lambda one: one[0])[1:]


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


def carry_texts(path: str | None, task: Task, base: Base, seq_len: int) -> list[list[int]]:
    """The token ids of the first CARRY_TEXTS texts of --carry_text, or else of the task's training texts."""
    own = (f"{e.text} {e.text_pair or ''}" for e in task.parts["train"])
    if not (texts := [*itertools.islice(read_documents(Path(path)) if path else own, CARRY_TEXTS)]):
        raise InputError(f"--carry_text {path}: holds no text to compare two bases on")
    return encode([Example(text, None, None, "") for text in texts], (), base.tokenizer, seq_len).sequences
