"""What training minimises: the task's loss, and distillation from a frozen teacher (METHOD: losses).

    task      CE(s, y); of a regression the squared error
    KD        T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch; of a regression the squared error to t
    patience  mean squared error between the <s> rows of teacher and student: embedding output, all layers but the last
    attention KL(teacher's attention map || student's), mean over layers, heads and query tokens of the batch
    total     (1 - alpha) task + alpha KD + beta patience + gamma attention

`public_code` reproduces the numbers of thunlp/RecyclableTuning: KD averaged over the C classes as well, that is divided
by C, and patience times 0.5.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_kd, hidden_mse, kd_loss
from rt.device import autocast
from rt.model import Batch, Classifier, Trace
from rt.tasks import Encoded


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
        with autocast(device, precision):
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

    def __post_init__(self):
        if self.teacher is not None and None in (self.alpha, self.beta, self.T):
            raise ValueError("a loss with a teacher needs alpha, beta and T")
        if self.gamma and self.maps_of is None:
            raise ValueError("gamma needs the teacher itself, as maps_of")

    def __call__(self, model: Classifier, batch: Batch) -> Tensor:
        """Scalar; runs the student on `batch`."""
        if self.teacher is None:
            return task_loss(model(batch), batch.labels, self.is_regression).mean()
        trace = Trace(attention=self.layers(model))
        logits = model(batch, trace)
        t = self.teacher.logits[batch.index]
        if self.is_regression:
            rows = ((1 - self.alpha) * task_loss(logits, batch.labels, True)
                    + self.alpha * task_loss(logits, t.squeeze(-1), True))
        elif self.public_code:
            rows = ((1 - self.alpha) * task_loss(logits, batch.labels, False)
                    + self.alpha * kd_loss(logits, t, alpha=1.0, T=self.T) / logits.shape[-1])
        else:
            rows = kd_loss(logits, t, batch.labels, alpha=self.alpha, T=self.T)
        if self.beta:
            half = 0.5 if self.public_code else 1.0
            rows = rows + self.beta * half * hidden_mse(trace.states, self.teacher.states, batch.index)
        return rows.mean() + self.gamma * self.attention(trace, batch) if self.gamma else rows.mean()

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
