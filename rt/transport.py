"""Recycling without training on the task: a low-rank map from old deltas to new ones, learned on other tasks.

    w' = w W1 W2 + b        w (rows, m): trained weights of a delta;  W1 (m, r), W2 (r, m);  b as large as w
    w' = w + w W1 W2 + b    `residual`

Two granularities. `flat`: all weights end to end are one row of m = n, as in the paper's public code: (2r + 1) n numbers. `tensor`: every
tensor is a matrix, m its last dimension, with W1 and W2 of its own (r at most m): n + 2 r x the sum of last dimensions. No n x n matrix
exists in either. Training takes 16 bytes a number (weight, gradient, AdamW's moments): of all 125 M weights of RoBERTa-base at r = 16, 66
GB flat and 2 GB by tensors; of its adapters, 1 GB flat.

The start is W2 = 0 with W1 random, so large that w W1 is about 1, and b the mean of the sources' w; residual: b = 0. So training starts
from `apply` of the mean source, or of the delta itself. What the first form keeps of an unseen delta is what passes through r numbers
(of each row); the residual form keeps the delta and adds to it.
"""
from dataclasses import replace
from functools import partial
from typing import Callable

import torch
import torch.nn as nn
from torch import Tensor

from rt.deltas import PARTS, Base, Delta, apply, attach, check_fits
from rt.errors import Diverged, InputError
from rt.losses import Loss, Reweighted, Weights, run_teacher
from rt.optim import MOST_SKIPPED, Watch, adamw, autocast, derive_seed, memory_for, schedule, set_lr, step_unless
from rt.runs.log import loss_text, progress
from rt.tune import TaskData, TuneSettings, evaluate, score, training_batch

GRANULARITIES = ("auto", "flat", "tensor")


def tensors_of(delta: Delta, with_head: bool) -> dict[str, Tensor]:
    """What is projected, by part and name as in delta.safetensors."""
    return {f"{part}.{k}": v for part in PARTS if with_head or part != "head" for k, v in getattr(delta, part).items()}


class Projection(nn.Module):
    """The map, at its start. `sources`: the deltas that b and the scale of W1 are made of; all deltas that are projected must have
    their kind and sizes. Without `with_head` heads are no part of the map: tasks may have other numbers of labels. `granularity` auto
    is the public code's, flat, where that is small: tensor for full tuning, flat for all other kinds."""

    def __init__(self, sources: list[Delta], r: int, granularity: str, residual: bool, with_head: bool, seed: int):
        super().__init__()
        if granularity not in GRANULARITIES:
            raise InputError(f"granularity {granularity!r}: not one of {', '.join(GRANULARITIES)}")
        if granularity == "auto":
            granularity = "tensor" if sources[0].config.kind == "full" else "flat"
        self.r, self.granularity, self.residual, self.with_head = r, granularity, residual, with_head
        self.used = sources[0].config.used
        self.shapes = {k: v.shape for k, v in tensors_of(sources[0], with_head).items()}
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
        """The delta as matrices (rows, m): one, or one a tensor. InputError where its kind or sizes are others."""
        tensors = tensors_of(delta, self.with_head)
        if delta.config.used != self.used or {k: v.shape for k, v in tensors.items()} != self.shapes:
            raise InputError(f"the projection is one of {self.used} with {len(self.shapes)} tensors; the delta of task "
                             f"{delta.info.get('task')} is {delta.config.used}, or of other sizes: use deltas of one kind, base and size")
        if self.granularity == "flat":
            return [torch.cat([v.flatten() for v in tensors.values()])[None]]
        return [v.reshape(-1, v.shape[-1]) for v in tensors.values()]

    def forward(self, delta: Delta) -> dict[str, Tensor]:
        """w' by the names of `tensors_of`, in fp32, differentiable in W1, W2 and b. The delta must be on the map's device."""
        mapped = []
        with torch.autocast(self.b[0].device.type, enabled=False):
            for x, W1, W2, b in zip(self.rows(delta), self.W1, self.W2, self.b, strict=True):
                y = x @ W1 @ W2 + b.view_as(x)
                mapped.append(x + y if self.residual else y)
        if self.granularity == "flat":
            mapped = mapped[0].flatten().split([shape.numel() for shape in self.shapes.values()])
        return {k: y.view(shape) for (k, shape), y in zip(self.shapes.items(), mapped, strict=True)}

    def about(self) -> dict:
        """What a row of results says of the map."""
        return {"r": self.r, "granularity": self.granularity, "residual": self.residual, "with_head": self.with_head,
                "numbers": sum(p.numel() for p in self.parameters()), "best_step": self.best_step, "dev": self.dev}


@torch.no_grad()
def project(projection: Projection, delta: Delta) -> Delta:
    """The delta mapped to the new base; its tensors are on the CPU. It still names the old base as its own, so it is put on the new
    one by apply(base, delta, stale_ok=True)."""
    mapped = projection(_to(delta, projection.b[0].device))
    parts = {part: dict(getattr(delta, part)) for part in PARTS}
    for name, tensor in mapped.items():
        part, _, k = name.partition(".")
        parts[part][k] = tensor.cpu()
    return replace(delta, **parts)


def _to(delta: Delta, device: torch.device) -> Delta:
    return replace(delta, **{part: {k: v.to(device) for k, v in getattr(delta, part).items()} for part in PARTS})


def student_weights(own: Weights, delta: Delta, projection: Projection) -> Weights:
    """New base (`own`, the encoder's weights) + projected delta as weights of a Classifier; the delta's own head where heads are no
    part of the map."""
    weights = {f"head.{k}": v for k, v in delta.head.items()}
    for name, tensor in projection(delta).items():
        part, _, k = name.partition(".")
        weights[name if part == "head" else f"encoder.{k}"] = own[k] + tensor if part == "diffs" else tensor
    return weights


def check_sources(old_base: Base, base: Base, sources: list[tuple[Delta, TaskData]], target: Delta | None = None) -> None:
    """InputError where a projection cannot be learned from these deltas of the old base, or not be used on `target`."""
    for delta, data in sources:
        check_fits(old_base, delta, stale_ok=False)
        check_fits(base, delta, stale_ok=True)      # equal sizes, and equal ids for teacher and student
        if delta.labels != data.labels:
            raise InputError(f"the source delta of task {delta.info.get('task')} has other labels than the source task {data.name}")
    for delta in [delta for delta, _ in sources[1:]] + ([target] if target else []):
        if delta.config.used != sources[0][0].config.used:
            raise InputError(f"a projection needs all deltas of one kind and size, not {sources[0][0].config.used} and {delta.config.used}")


def learn_projection(old_base: Base, base: Base, sources: list[tuple[Delta, TaskData]], settings: TuneSettings, *, r: int,
                     granularity: str, residual: bool, alpha: float, beta: float, T: float, public_code: bool, device: torch.device,
                     precision: torch.dtype, on_eval: Callable[[dict], None] = lambda row: None, with_head: bool = False) -> Projection:
    """A map from deltas of `old_base` to deltas of `base`, trained on source tasks in turn: step i on source i mod S. The loss is
    distillation's total without attention (rt/distill.py): teacher = old base + the source's delta, student = new base + its projection.

    `with_head` asks for as many labels in every source, and later in the target. Returned as it was best on dev, mean over the
    sources; `on_eval` gets {'step', 'loss', 'dev'}, dev with that mean first, then each source. Batches and dropout are functions
    of (seed, step). Raises InputError where deltas and bases do not fit together or the loss stays without a finite value.
    """
    check_sources(old_base, base, sources)
    deltas, datas = [_to(delta, device) for delta, _ in sources], [data for _, data in sources]
    projection = Projection(deltas, r, granularity, residual, with_head, settings.seed)
    # one skeleton for all: every weight it trains is replaced, the head too, whatever its number of labels
    model, own = attach(base, deltas[0].config, 1, settings.seed), {k: p.detach() for k, p in base.encoder.named_parameters()}
    students = [Reweighted(model, partial(student_weights, own, delta, projection)) for delta in deltas]
    losses = [Loss(not data.labels, run_teacher(apply(old_base, delta), data.train, device, precision), alpha, beta, T, public_code)
              for delta, data in zip(deltas, datas)]

    def score_dev(step: int, mean_loss: float | None) -> None:
        each = {data.name: score(evaluate(student, data.dev, device, precision)) for student, data in zip(students, datas)}
        dev = {"mean": sum(each.values()) / len(each), **each}
        on_eval({"step": step, "loss": mean_loss, "dev": dev})
        if not projection.dev or score(dev) > score(projection.dev):
            projection.best_step, projection.dev = step, dev
            best.update({k: p.detach().clone() for k, p in projection.named_parameters()})

    def loss_of(step: int) -> Tensor:
        turn, i = divmod(step, len(sources))
        batch = training_batch(datas[i].train, settings, turn).to(device)
        with autocast(device, precision):
            return losses[i](students[i].train(), batch)

    best: dict[str, Tensor] = {}
    _minimise(projection, loss_of, score_dev, settings)
    projection.load_state_dict(best)
    return projection


def _minimise(projection: Projection, loss_of: Callable[[int], Tensor], score_dev: Callable[[int, float | None], None],
              s: TuneSettings) -> None:
    """rt.tune.tune's optimizer, schedule and clipping, for a loss that is a function of the step."""
    optimizer = adamw(projection.parameters(), s.lr, s.weight_decay, betas=(0.9, 0.999))
    watch = Watch((), next(projection.parameters()).device)
    score_dev(0, None)
    with progress(s.steps, "projection") as bar:
        for step in range(s.steps):
            torch.manual_seed(derive_seed(s.seed, step))
            set_lr(optimizer, schedule(step, s.steps, max(1, round(s.warmup * s.steps)), s.lr))
            with memory_for(f"a batch of {s.batch_size} texts on projected weights", f"--batch_size ({s.batch_size}), --seq_len or --rank"):
                value = loss_of(step)
                value.backward()
            norm = torch.nn.utils.clip_grad_norm_(projection.parameters(), s.clip)
            step_unless(optimizer, watch.count(value.detach(), norm))
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
                (mean_loss, skipped, diverged), = watch.look()
                if diverged:
                    raise Diverged(f"more than {MOST_SKIPPED} of the projection's steps in a row before step {step + 2} had no finite loss "
                                   f"and gradient: lower --lr ({s.lr})")
                score_dev(step + 1, mean_loss)
                bar.set_postfix_str(loss_text(mean_loss, skipped))
            bar.update()
