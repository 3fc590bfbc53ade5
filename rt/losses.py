"""Losses: the task loss, and distillation from a frozen teacher.

    task      CE(s, y); for a regression the squared error
    KD        T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch; for a regression the squared error to t
    patience  mean squared error between the <s> rows of teacher and student: embedding output, all layers but the last
    attention KL(teacher's attention map || student's), mean over layers, heads and query tokens of the batch
    total     (1 - alpha) task + alpha KD + beta patience + gamma attention

Interpolation distillation averages KD and patience over the student (mu = 1) and `itp` points theta(mu) = (1 - mu) teacher + mu student on
the line between all their weights, with mu ~ U(0, 1) drawn at every step. The gradient of a point reaches only the student, scaled by mu. A
point costs the time of a step and a copy of all weights. To add a term, write a function like `patience`, add its row to TERMS, and add its
weight to DistillConfig.
"""
from dataclasses import dataclass
from typing import Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kernels import attention_kd, hidden_mse, kd_loss
from rt.data import Encoded, pad_to_multiple
from rt.limits import NonNegative, NonNegativeInt, Positive, Share
from rt.model import Activations, Batch, Classifier
from rt.optim import autocast, memory_for

Weights = dict[str, Tensor]     # by parameter name, as in Classifier.named_parameters


@dataclass(frozen=True)
class DistillConfig:
    """Weights and settings of distillation."""
    alpha: Share = 0.7  # share of distillation: (1 - alpha) task + alpha KD + beta patience + gamma attention
    beta: NonNegative = 1.0  # weight of patience
    T: Positive = 5.0  # distillation temperature
    gamma: NonNegative = 0.0  # weight of the divergence between attention maps; the teacher then runs at every step
    att_layers: Literal["last", "all"] = "last"  # layers whose maps are compared: last or all
    itp: NonNegativeInt = 0  # interpolation distillation: KD and patience also at this many random points between teacher and student
    project_patience: bool = False  # patience through one learned linear map per layer, for a teacher of another width or depth
    public_code: bool = False  # KD divided by the number of labels, patience halved, as in the paper's code

    @property
    def runs_teacher(self) -> bool:
        """Whether the loss needs the teacher itself, on the student's token ids, and not only its cached outputs."""
        return bool(self.itp) or any(getattr(self, name, 0) for name in RUN_TEACHER)


def task_loss(logits: Tensor, labels: Tensor, is_regression: bool) -> Tensor:
    """(B,): CE of (B, C) logits and (B,) classes, or squared error of (B, 1) and (B,) floats; 0 for rows without a label (-100, NaN)."""
    if is_regression:
        logits = logits.float().squeeze(-1)
        return (logits - torch.where(labels.isnan(), logits.detach(), labels)).square()
    return F.cross_entropy(logits.float(), labels, reduction="none")


@dataclass
class TeacherCache:
    """Outputs of a frozen teacher without dropout on every training example. Computed once, looked up by `batch.index`."""
    logits: Tensor  # (n, C) fp32
    states: Tensor | None  # (n, num_layers, d) fp32, the <s> rows that patience compares; None for a black box
    sources: tuple = ()  # the base, the delta and the examples that these outputs come from; (): always valid


@torch.no_grad()
def run_teacher(teacher: Classifier, data: Encoded, device: torch.device, precision: torch.dtype, batch_size: int = 64) -> TeacherCache:
    """The teacher's outputs on all of `data`, on `device`."""
    teacher.eval()
    for i in range(0, len(data), batch_size):
        batch = pad_to_multiple(data.batch(list(range(i, min(i + batch_size, len(data))))), device, precision).to(device)
        what = f"the teacher's states for {len(data)} texts, with {batch_size} of up to {batch.max_seqlen} tokens at once,"
        with memory_for(what, "`seq_len`, `shots` or `unlabelled_texts`"), autocast(device, precision):
            found = teacher(batch, activations := Activations()).float(), activations.states.float()
            if i == 0:
                logits, states = (x.new_empty(len(data), *x.shape[1:]) for x in found)
        logits[batch.index], states[batch.index] = found
    return TeacherCache(logits, states)


@dataclass
class Loss:
    """The loss of one batch. Without a teacher it is the task loss alone."""
    is_regression: bool = False
    teacher: TeacherCache | None = None
    config: DistillConfig | None = None         # required with a teacher: no setting is chosen here
    teacher_model: Classifier | None = None     # the teacher itself: for gamma, as its maps are too large to cache; for itp, its weights
    has_unlabelled: bool = False                # whether some rows have no label, and so no task term

    def __post_init__(self):
        c = self.config
        if self.teacher is not None and c is None:
            raise ValueError("a loss with a teacher needs its DistillConfig")
        if c and c.runs_teacher and (self.teacher is None or self.teacher_model is None):
            raise ValueError("gamma and itp need a teacher, and the teacher itself as teacher_model")
        self.teacher_weights = weights_of(self.teacher_model) if c and c.itp else {}

    def __call__(self, model: Classifier, batch: Batch) -> Tensor:
        """Scalar; runs the student on `batch`."""
        if self.teacher is None:
            return task_loss(model(batch), batch.labels, self.is_regression).mean()
        c, activations = self.config, Activations(attention=self.layers(model))
        points = torch.rand(c.itp).tolist()     # on the CPU: the loop seeds its generator by (seed, step)
        logits = model(batch, activations)
        if points:
            parts = [self.per_example(logits, activations, batch), *(self.at(mu, model, batch) for mu in points)]
            losses = (1 - c.alpha) * task_loss(logits, batch.labels, self.is_regression) + torch.stack(parts).mean(0)
        else:
            losses = self.per_example(logits, activations, batch, batch.labels)
        total = losses.mean()
        for name, term in TERMS.items():
            if name not in AT_POINTS and (weight := getattr(c, name)):
                total = total + weight * term(self, logits, activations, batch).mean()
        return total

    def per_example(self, logits: Tensor, activations: Activations, batch: Batch, labels: Tensor | None = None) -> Tensor:
        """(B,): alpha KD + beta patience, plus (1 - alpha) task if `labels` are given."""
        c, t = self.config, self.teacher.logits[batch.index]
        if self.is_regression or c.public_code or self.has_unlabelled:      # kd_loss covers none of these
            task = 0.0 if labels is None else (1 - c.alpha) * task_loss(logits, labels, self.is_regression)
            losses = task + c.alpha * self.kd(logits, t, c.T)
        else:
            losses = kd_loss(logits, t, labels, alpha=c.alpha, T=c.T)
        for name in AT_POINTS:
            if weight := getattr(c, name):
                losses = losses + weight * TERMS[name](self, logits, activations, batch)
        return losses

    def kd(self, logits: Tensor, t: Tensor, T: float) -> Tensor:
        """(B,): KD of the student's and the teacher's logits (B, C)."""
        if self.is_regression:
            return task_loss(logits, t.squeeze(-1), True)
        return kd_loss(logits, t, alpha=1.0, T=T) / (logits.shape[-1] if self.config.public_code else 1)

    def at(self, mu: float, model: Classifier, batch: Batch) -> Tensor:
        """(B,): alpha KD + beta patience at point `mu` between teacher and `model`. Frozen weights and the head are interpolated too."""
        weights = lerp(self.teacher_weights, dict(model.named_parameters()), mu)
        logits = functional_call(model, weights, (batch, activations := Activations()))
        return self.per_example(logits, activations, batch)

    def layers(self, model: Classifier) -> tuple[int, ...]:
        """The layers of student or teacher whose attention maps are compared."""
        layers = tuple(range(len(model.encoder.layers))) if self.config.gamma else ()
        return layers if self.config.att_layers == "all" else layers[-1:]


def patience(loss: Loss, logits: Tensor, activations: Activations, batch: Batch) -> Tensor:
    """(B,). Student layer i is compared with the teacher's layer i L_old // L."""
    states, teacher, index = activations.states, loss.teacher.states, batch.index
    if (L := states.shape[1]) != (L_old := teacher.shape[1]):
        teacher, index = torch.stack([teacher[index, i * L_old // L] for i in range(L)], dim=1), None
    return hidden_mse(states, teacher, index) * (0.5 if loss.config.public_code else 1.0)


def attention(loss: Loss, logits: Tensor, activations: Activations, batch: Batch) -> Tensor:
    """Scalar; runs the teacher on `batch`."""
    with torch.no_grad():
        loss.teacher_model.encoder(batch, teacher := Activations(attention=loss.layers(loss.teacher_model)))
    return attention_divergence(activations, teacher, batch)


def attention_divergence(student: Activations, teacher: Activations, batch: Batch) -> Tensor:
    """Scalar: KL(teacher's map || student's), mean over collected layers, heads and query tokens, but not the padding."""
    n = len(batch.ids) if batch.rows is None else int(batch.cu_seqlens[len(batch.rows)])     # tokens before the padding
    return torch.stack([attention_kd(*s, *t, batch.cu_seqlens, batch.max_seqlen)[:n].mean()
                        for s, t in zip(student.qk, teacher.qk, strict=True)]).mean()


# {field of DistillConfig that weights the term: the term}; a term returns (B,), or a scalar, the batch's mean
TERMS: dict[str, Callable[[Loss, Tensor, Activations, Batch], Tensor]] = {"beta": patience, "gamma": attention}
AT_POINTS = ("beta",)       # also applied at the points of interpolation; the other terms apply to the student alone
RUN_TEACHER = ("gamma",)    # compare what is too large for the teacher's cache; the teacher runs at every step


def weights_of(model: Classifier) -> Weights:
    """All weights, trained and frozen, encoder and head, detached."""
    return {k: p.detach() for k, p in model.named_parameters()}


def trained_weights(model: nn.Module) -> Weights:
    """The parameters that require a gradient."""
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def lerp(a: Weights, b: Weights, mu: float) -> Weights:
    """(1 - mu) a + mu b, weight by weight; gradients flow to both."""
    return {k: a[k].lerp(b[k], mu) for k in b}


class Reweighted(nn.Module):
    """Runs `model` with `weights()` in place of its own weights. `model` is not changed. Gradients flow through `weights()`."""
    def __init__(self, model: Classifier, weights: Callable[[], Weights]):
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, batch: Batch, activations: Activations | None = None) -> Tensor:
        """(B, C) logits; fills `activations` if given."""
        return functional_call(self.model, self.weights(), (batch, activations))
