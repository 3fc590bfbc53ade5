"""AdamW with decay by dimension, and the one learning-rate schedule: linear warm-up, linear decay to zero."""
from typing import Iterable

import torch
from torch.nn import Parameter


def adamw(parameters: Iterable[Parameter], lr: float, weight_decay: float, betas=(0.9, 0.98)) -> torch.optim.AdamW:
    """Matrices decay; biases, LN weights and gates do not (nanoGPT's rule). Only parameters that require a gradient."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-6, fused=True)


def schedule(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of step 0 ... steps-1: up to `peak` over `warmup` steps, then straight down to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
