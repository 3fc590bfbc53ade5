"""Recycling without training on the task: a low-rank map from old deltas to new ones, learned on other tasks.

    w' = w W1 W2 + b        w (rows, m): trained weights of a delta;  W1 (m, r), W2 (r, m);  b as large as w
    w' = w + w W1 W2 + b    `residual`

The first form keeps of an unseen delta what passes through r numbers a row; the residual form keeps the delta and adds to it.

Two granularities. `flat`: all n weights are one row, m = n, as in the paper's public code: (2r + 1) n numbers. `tensor`: every tensor is a
matrix, m its last dimension, with its own W1 and W2 (r at most m): n + 2 r x the sum of last dimensions. Training takes 16 bytes a number:
for all 125 M weights of RoBERTa-base at r = 16, 66 GB flat and 2 GB by tensors; for its adapters, 1 GB flat.

At the start W2 = 0, W1 is random and so large that w W1 is about 1, and b is the mean of the sources' w, or 0 if residual: training starts
from `apply` of the mean source, or of the delta itself.
"""
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rt.data import TaskData
from rt.deltas import Base, Delta, apply, attach, check_fits
from rt.errors import InputError
from rt.losses import DistillConfig, Loss, Reweighted, Weights, run_teacher
from rt.tune import Hook, TuneSettings, evaluate, ignore, minimise, plain_gradient, train_step

Granularity = Literal["auto", "flat", "tensor"]     # auto: the public code's, flat, if that is small: for all kinds but full


class Projection(nn.Module):
    """The map, at its start: b and the scale of W1 come from `sources`, whose kind and sizes every projected delta must have. Without
    `with_head` the map leaves heads out, and tasks may have other numbers of labels."""
    def __init__(self, sources: list[Delta], r: int, granularity: Granularity, residual: bool, with_head: bool, seed: int):
        super().__init__()
        if granularity not in get_args(Granularity):
            raise InputError(f"granularity {granularity!r}: not one of {', '.join(get_args(Granularity))}")
        if granularity == "auto":
            granularity = "tensor" if sources[0].config.kind == "full" else "flat"
        self.r, self.granularity, self.residual, self.with_head = r, granularity, residual, with_head
        self.used = sources[0].config.used
        self.shapes = {k: v.shape for k, v in sources[0].tensors(with_head).items()}
        self.W1, self.W2, self.b = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()   # one each a matrix
        generator = torch.Generator().manual_seed(seed)
        for same in zip(*(self.rows(delta) for delta in sources)):
            x = torch.stack(same)       # (sources, rows, m)
            m, size = x.shape[-1], x.norm(dim=-1).square().mean().sqrt()     # of a row
            W1 = torch.randn(m, min(r, m), generator=generator).to(x)
            self.W1.append(nn.Parameter(W1 / size if size > 0 else W1))
            self.W2.append(nn.Parameter(x.new_zeros(min(r, m), m)))
            # a vector, which AdamW does not decay: most of a delta is here
            self.b.append(nn.Parameter(x.new_zeros(x[0].numel()) if residual else x.mean(0).flatten()))
        self.best_step, self.dev = 0, {}

    def rows(self, delta: Delta) -> list[Tensor]:
        """The delta as matrices (rows, m): one, or one a tensor. Raises InputError if its kind or sizes differ."""
        tensors = delta.tensors(self.with_head)
        if delta.config.used != self.used or {k: v.shape for k, v in tensors.items()} != self.shapes:
            raise InputError(f"a delta of task {delta.info.get('task')} does not fit the projection: use deltas of one kind, base and size")
        if self.granularity == "flat":
            return [torch.cat([v.flatten() for v in tensors.values()])[None]]
        return [v.reshape(-1, v.shape[-1]) for v in tensors.values()]

    def forward(self, delta: Delta) -> dict[str, Tensor]:
        """w' by the names of `Delta.tensors`, in fp32, for a delta on the map's device."""
        mapped = []
        with torch.autocast(self.b[0].device.type, enabled=False):
            for x, W1, W2, b in zip(self.rows(delta), self.W1, self.W2, self.b, strict=True):
                y = x @ W1 @ W2 + b.view_as(x)
                mapped.append(x + y if self.residual else y)
        if self.granularity == "flat":
            mapped = mapped[0].flatten().split([shape.numel() for shape in self.shapes.values()])
        return {k: y.view(shape) for (k, shape), y in zip(self.shapes.items(), mapped, strict=True)}


@torch.no_grad()
def project(projection: Projection, delta: Delta) -> Delta:
    """The delta mapped to the new base, on the CPU. It still names the old base as its own: apply(base, delta, stale_ok=True)."""
    mapped = projection(delta.map(lambda _, v: v.to(projection.b[0].device)))
    return delta.map(lambda name, v: mapped.get(name, v).cpu())


def student_weights(own: Weights, delta: Delta, projection: Projection) -> Weights:
    """New base (`own`, the encoder's weights) + projected delta as weights of a Classifier; a head that is not projected is the delta's."""
    weights = {f"head.{k}": v for k, v in delta.head.items()}
    for name, tensor in projection(delta).items():
        part, _, k = name.partition(".")
        weights[name if part == "head" else f"encoder.{k}"] = own[k] + tensor if part == "diffs" else tensor
    return weights


def check_sources(old_base: Base, base: Base, sources: list[tuple[Delta, TaskData]], target: Delta | None = None) -> None:
    """Raises InputError if a projection cannot be learned from these deltas of the old base, or not be used on `target`."""
    for delta, data in sources:
        check_fits(old_base, delta, stale_ok=False)
        check_fits(base, delta, stale_ok=True)      # equal sizes, and equal ids for teacher and student
        if delta.labels != data.labels:
            raise InputError(f"the source delta of task {delta.info.get('task')} has other labels than the source task {data.name}")
    first, *others = [delta.config.used for delta in [*(delta for delta, _ in sources), *([target] if target else [])]]
    for other in others:
        if other != first:
            raise InputError(f"a projection needs all deltas of one kind and size, not {first} and {other}")


def learn_projection(old_base: Base, base: Base, sources: list[tuple[Delta, TaskData]], settings: TuneSettings, distill: DistillConfig, *,
                     r: int, granularity: Granularity, residual: bool, device: torch.device, precision: torch.dtype,
                     with_head: bool = False, on_step: Hook = ignore, on_eval: Hook = ignore) -> Projection:
    """A map from deltas of `old_base` to deltas of `base`, trained on source tasks in turn: step i on source i mod S. The loss is
    distillation's without attention maps and interpolation: teacher = old base + the source's delta, student = new base + its projection.
    `with_head` asks for as many labels in every source, and later in the target. Returned as it was best on dev: the mean over the sources,
    which comes first in the dev of `on_eval`. Raises InputError if deltas and bases do not fit together, Diverged as rt.tune.Fit does."""
    check_sources(old_base, base, sources)
    deltas, datas, s = [delta.map(lambda _, v: v.to(device)) for delta, _ in sources], [data for _, data in sources], settings
    projection = Projection(deltas, r, granularity, residual, with_head, s.seed)
    # one skeleton for all: every weight it trains is replaced, the head too, whatever its number of labels
    model, own = attach(base, deltas[0].config, 1, s.seed), {k: p.detach() for k, p in base.encoder.named_parameters()}
    students = [Reweighted(model, partial(student_weights, own, delta, projection)) for delta in deltas]
    losses = [Loss(not data.labels, run_teacher(apply(old_base, delta), data.train, device, precision), replace(distill, gamma=0.0, itp=0))
              for delta, data in zip(deltas, datas)]
    gradients = [plain_gradient(student, loss, device, precision) for student, loss in zip(students, losses)]

    def gradient(step: int) -> Tensor:
        turn, i = divmod(step, len(sources))
        return train_step(gradients[i], datas[i].train, s, on_step, turn, " on projected weights", ", `seq_len` or `rank`")

    def dev_scores() -> dict[str, float]:
        each = {data.name: next(iter(evaluate(student, data.dev, device, precision).values())) for student, data in zip(students, datas)}
        return {"mean": None if None in each.values() else sum(each.values()) / len(each), **each}

    result = minimise(dict(projection.named_parameters()), gradient, s, dev_scores, on_eval)
    projection.best_step, projection.dev = result.best_step, result.dev
    return projection
