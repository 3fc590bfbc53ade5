"""Paths between two tuned models in the space of weights, base and delta interpolated together (README, The method: study 2).

    linear    theta(mu) = (1 - mu) a + mu b
    curve     theta(mu) = (1 - mu)^2 a + 2 mu (1 - mu) control + mu^2 b, a quadratic Bezier whose control point is trained to keep
              the task's loss low along it (Garipov et al., 2018; the paper's public code)

The barrier of a path is the greatest height of its loss above the straight line between the losses of its ends.
"""
import math
from typing import Callable, Sequence

import torch

from rt.config import UsageError
from rt.device import autocast, derive_seed, memory_for
from rt.distill import task_loss
from rt.functional import Reweighted, Weights, lerp
from rt.log import progress
from rt.model import Classifier
from rt.optim import adamw, schedule, set_lr
from rt.tasks import Encoded
from rt.tune import TaskData, TuneSettings, metrics, predict, training_batch

Path = Callable[[float], Weights]


def linear(a: Weights, b: Weights) -> Path:
    return lambda mu: lerp(a, b, mu)


def bezier(a: Weights, control: Weights, b: Weights) -> Path:
    """Weights that `control` lacks are equal at both ends and stay so."""
    def at(mu: float) -> Weights:
        return {k: (1 - mu) ** 2 * a[k] + 2 * mu * (1 - mu) * control[k] + mu ** 2 * b[k] if k in control else b[k] for k in b}
    return at


def walk(model: Classifier, path: Path, points: Sequence[float], data: Encoded, device: torch.device,
         precision: torch.dtype) -> list[dict]:
    """A row {'mu', 'loss', metrics...} a point: `model` with the path's weights on `data`. The loss is the task's, mean, in
    nats. `model` lends its shape only and is not changed."""
    rows = []
    with progress(len(points), "path", unit="point") as bar:
        for mu in points:
            weights = path(mu)
            logits = predict(Reweighted(model, lambda: weights), data.sequences, device, precision)
            loss = task_loss(logits, data.targets, data.targets.is_floating_point()).mean().item()
            rows.append({"mu": mu, "loss": loss, **metrics(logits, data.targets)})
            bar.update()
    return rows


def barrier(rows: list[dict]) -> float:
    """Of the rows of a walk: max over mu of the loss above the straight line between the ends' losses, in nats; 0 or more."""
    first, last = rows[0], rows[-1]
    share = [(row["mu"] - first["mu"]) / (last["mu"] - first["mu"]) for row in rows]
    heights = [row["loss"] - (1 - s) * first["loss"] - s * last["loss"] for row, s in zip(rows, share)]
    return math.nan if any(map(math.isnan, heights)) else max(0.0, *heights)    # max() passes over a NaN: no barrier where nothing is known


def train_control(model: Classifier, a: Weights, b: Weights, data: TaskData, settings: TuneSettings, device: torch.device,
                  precision: torch.dtype) -> Weights:
    """The control point of the curve from `a` to `b`: begun at the middle, trained on the task's loss at one mu ~ U(0, 1) a step.
    Holds the weights that differ between the ends, the others need none."""
    s = settings
    middle = {k: v for k, v in lerp(a, b, 0.5).items() if not torch.equal(a[k], b[k])}
    if not middle:
        return {}       # equal ends: nothing to go round
    control = {k: v.clone().requires_grad_() for k, v in middle.items()}
    optimizer = adamw(control.values(), s.lr, s.weight_decay, betas=(0.9, 0.999))
    path = bezier(a, control, b)
    student = Reweighted(model, lambda: path(mu)).train()
    with progress(s.steps, "curve") as bar:
        for step in range(s.steps):
            torch.manual_seed(derive_seed(s.seed, step))
            mu = torch.rand(()).item()
            set_lr(optimizer, schedule(step, s.steps, max(1, round(s.warmup * s.steps)), s.lr))
            batch = training_batch(data.train, s, step).to(device)
            with memory_for(f"a batch of {s.batch_size} texts on the curve", f"--batch_size ({s.batch_size}) or --seq_len"):
                with autocast(device, precision):
                    loss = task_loss(student(batch), batch.labels, not data.labels).mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(control.values(), s.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not math.isfinite(loss.item()):
                raise UsageError(f"the curve's loss is {loss.item()} after step {step + 1}: lower its learning rate ({s.lr})")
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
    return {k: v.detach() for k, v in control.items()}
