"""Distillation losses from raw logits.

    row = (1 - alpha) * CE(s, y) + alpha * T^2 * KL(softmax(t / T) || softmax(s / T))

T^2 keeps the gradient's size when T grows (Hinton et al., 2015); rows are returned one by one, so the mean over the batch,
the definition of KL's "batchmean", is the caller's `.mean()`.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss_ref(student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, alpha: float, T: float,
                ignore_index: int = -100) -> Tensor:
    """`kd_loss` in plain PyTorch, at least fp32 arithmetic."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    log_s, log_t = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    rows = alpha * T**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    if labels is not None:
        ce = F.cross_entropy(student, labels, ignore_index=ignore_index, reduction="none")
        rows = torch.where(labels == ignore_index, 0.0, rows + (1 - alpha) * ce)
    return rows


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, alpha: float, T: float,
            ignore_index: int = -100) -> Tensor:
    """Cross-entropy and temperature-scaled KL to a teacher, per row.

    student, teacher   (R, C) raw logits; no gradient reaches the teacher
    labels             (R,) classes, or None for the KL term alone (still times alpha); `ignore_index` rows give 0
    Returns            (R,). Raises ValueError where shapes do not fit or T is not positive.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"student and teacher must be (R, C) and alike, not {tuple(student.shape)}, {tuple(teacher.shape)}")
    if T <= 0:
        raise ValueError(f"the temperature T must be positive, not {T}")
    return kd_loss_ref(student, teacher.detach(), labels, alpha=alpha, T=T, ignore_index=ignore_index)


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between hidden rows, per example: (B, L, d), (B, L, d) -> (B,) in fp32 (METHOD: patience)."""
    if student.shape != teacher.shape:
        raise ValueError(f"patience needs teacher and student of equal size, not {tuple(teacher.shape)} and "
                         f"{tuple(student.shape)} (examples, layers, width)")
    return (student.float() - teacher.detach().float()).square().mean(dim=(1, 2))
