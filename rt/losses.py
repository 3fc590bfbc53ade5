"""A model as a function of weights that are not its own: points of a path, interpolation distillation, projected deltas.

What training minimises: the task's loss, and distillation from a frozen teacher (README, The method: the formulas).

    task      CE(s, y); of a regression the squared error
    KD        T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch; of a regression the squared error to t
    patience  mean squared error between the <s> rows of teacher and student: embedding output, all layers but the last
    attention KL(teacher's attention map || student's), mean over layers, heads and query tokens of the batch
    total     (1 - alpha) task + alpha KD + beta patience + gamma attention

Interpolation distillation: KD and patience are the mean over the student itself, mu = 1, and `itp` points of the straight line
theta(mu) = (1 - mu) teacher + mu student through all their weights, mu ~ U(0, 1) drawn anew at every step. The gradient of a
point reaches the student alone, times mu. Each point costs a step's time and holds one copy of all weights until the backward pass.

`public_code` reproduces the numbers of thunlp/RecyclableTuning: KD averaged over the C classes as well, that is divided
by C, and patience times 0.5.
"""
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from kernels import attention_kd, hidden_mse, kd_loss
from rt.data import Encoded
from rt.model import Batch, Classifier, Trace
from rt.optim import autocast, memory_for

Weights = dict[str, Tensor]     # by parameter name, as in Classifier.named_parameters


def weights_of(model: Classifier) -> Weights:
    """All weights, trained and frozen, encoder and head; without their gradients' history."""
    return {k: p.detach() for k, p in model.named_parameters()}


def lerp(a: Weights, b: Weights, mu: float) -> Weights:
    """(1 - mu) a + mu b, weight by weight; gradients flow to both."""
    return {k: a[k].lerp(b[k], mu) for k in b}


class Reweighted(nn.Module):
    """`model` with `weights()` in place of its own weights, made anew at each call. Nothing of `model` is changed, and
    gradients reach whatever `weights` is made of. Trained and evaluated like the model itself (rt/tune.py)."""

    def __init__(self, model: Classifier, weights: Callable[[], Weights]):
        super().__init__()
        self.model, self.weights = model, weights

    @property
    def encoder(self) -> nn.Module:
        return self.model.encoder

    def forward(self, batch: Batch, trace: Trace | None = None) -> Tensor:
        """(B, C) logits; the encoder fills `trace`, where there is one."""
        return functional_call(self.model, self.weights(), (batch, trace))


@dataclass
class TeacherCache:
    """What a frozen teacher without dropout says of every training example: run once, read by `batch.index`."""
    logits: Tensor  # (n, C) fp32
    states: Tensor  # (n, num_layers, d) fp32, the <s> rows that patience compares


@torch.no_grad()
def run_teacher(teacher: Classifier, data: Encoded, device: torch.device, precision: torch.dtype,
                batch_size: int = 64) -> TeacherCache:
    """The cache for all of `data`, on `device`."""
    teacher.eval()
    logits, states, index = [], [], []
    for i in range(0, len(data), batch_size):
        batch = data.batch(list(range(i, min(i + batch_size, len(data))))).to(device)
        what = f"the teacher's states for {len(data)} texts, with {batch_size} of up to {batch.max_seqlen} tokens at once,"
        with memory_for(what, "--seq_len or --shots"), autocast(device, precision):
            logits.append(teacher(batch, trace := Trace()).float())
        states.append(trace.states.float())
        index.append(batch.index)
    place = torch.cat(index).argsort()      # a batch comes in its own order
    return TeacherCache(torch.cat(logits)[place], torch.cat(states)[place])


def task_loss(logits: Tensor, labels: Tensor, is_regression: bool) -> Tensor:
    """(B,): CE of (B, C) logits and (B,) classes, or the squared error of (B, 1) and (B,) floats."""
    if is_regression:
        return (logits.float().squeeze(-1) - labels).square()
    return F.cross_entropy(logits.float(), labels, reduction="none")


@dataclass
class Loss:
    """The loss of one batch. Without a teacher it is the task's alone."""
    is_regression: bool = False
    teacher: TeacherCache | None = None
    alpha: float | None = None      # with a teacher, alpha, beta and T must be given: the scripts own their defaults
    beta: float | None = None
    T: float | None = None
    public_code: bool = False
    gamma: float = 0.0
    maps_of: Classifier | None = None       # the teacher itself, for gamma: its queries and keys are too large to cache
    att_layers: str = "last"                # whose maps are compared: last or all
    itp: int = 0                            # points between teacher and student
    teacher_weights: Weights | None = None  # weights_of(teacher), for itp: of the student's names and sizes

    def __post_init__(self):
        if self.teacher is not None and None in (self.alpha, self.beta, self.T):
            raise ValueError("a loss with a teacher needs alpha, beta and T")
        if self.gamma and self.maps_of is None:
            raise ValueError("gamma needs the teacher itself, as maps_of")
        if self.itp and (self.teacher is None or self.teacher_weights is None):
            raise ValueError("itp needs a teacher and its weights, as teacher_weights")

    def __call__(self, model: Classifier, batch: Batch) -> Tensor:
        """Scalar; runs the student on `batch`."""
        if self.teacher is None:
            return task_loss(model(batch), batch.labels, self.is_regression).mean()
        points = torch.rand(self.itp).tolist()      # on the CPU, whose generator tune() seeds by (seed, step)
        trace = Trace(attention=self.layers(model))
        logits = model(batch, trace)
        if points:
            parts = [self.rows(logits, trace, batch.index), *(self.at(mu, model, batch) for mu in points)]
            rows = (1 - self.alpha) * task_loss(logits, batch.labels, self.is_regression) + torch.stack(parts).mean(0)
        else:
            rows = self.rows(logits, trace, batch.index, batch.labels)
        return rows.mean() + self.gamma * self.attention(trace, batch) if self.gamma else rows.mean()

    def rows(self, logits: Tensor, trace: Trace, index: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B,): alpha KD + beta patience, and with `labels` (1 - alpha) task too."""
        t = self.teacher.logits[index]
        if self.is_regression or self.public_code:
            rows = self.alpha * self.kd(logits, t, self.T)
            if labels is not None:
                rows = (1 - self.alpha) * task_loss(logits, labels, self.is_regression) + rows
        else:
            rows = kd_loss(logits, t, labels, alpha=self.alpha, T=self.T)
        return rows + self.beta * self.patience(trace, index) if self.beta else rows

    def kd(self, logits: Tensor, t: Tensor, T: float) -> Tensor:
        """(B,), for logits and teacher's logits (B, C)."""
        if self.is_regression:
            return task_loss(logits, t.squeeze(-1), True)
        return kd_loss(logits, t, alpha=1.0, T=T) / (logits.shape[-1] if self.public_code else 1)

    def patience(self, trace: Trace, index: Tensor) -> Tensor:
        """(B,)"""
        return hidden_mse(trace.states, self.teacher.states, index) * (0.5 if self.public_code else 1.0)

    def at(self, mu: float, model: Classifier, batch: Batch) -> Tensor:
        """(B,): alpha KD + beta patience of the model at `mu` between teacher and `model`, frozen weights and head included."""
        weights = lerp(self.teacher_weights, dict(model.named_parameters()), mu)
        logits = functional_call(model, weights, (batch, trace := Trace()))
        return self.rows(logits, trace, batch.index)

    def layers(self, model: Classifier) -> tuple[int, ...]:
        """Which layers' attention maps are compared, for student or teacher."""
        count = len(model.encoder.layers)
        return () if not self.gamma else (count - 1,) if self.att_layers == "last" else tuple(range(count))

    def attention(self, trace: Trace, batch: Batch) -> Tensor:
        """Scalar; runs the teacher on `batch`."""
        with torch.no_grad():
            self.maps_of.encoder(batch, teacher := Trace(attention=self.layers(self.maps_of)))
        return torch.stack([attention_kd(*s, *t, batch.cu_seqlens, batch.max_seqlen).mean()
                            for s, t in zip(trace.qk, teacher.qk, strict=True)]).mean()
