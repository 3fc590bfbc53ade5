"""The masked-LM loop and its evaluation; train.py keeps the policy (stages, snapshots, resuming)."""
import math
from dataclasses import dataclass
from typing import Iterator

import torch

from kernels import linear_cross_entropy
from rt.config import UsageError
from rt.data import Rows
from rt.device import autocast, derive_seed
from rt.model import Batch, MaskedLM
from rt.optim import schedule, set_lr


@dataclass
class PretrainSettings:
    """One stage of masked-LM training. `steps` are optimizer steps of `batch_tokens` tokens."""
    steps: int
    batch_tokens: int
    lr: float
    warmup: int
    seed: int
    accumulation: int = 1
    clip: float = 1.0


def mlm_loss(model: MaskedLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the predicted rows; the scores over the vocabulary belong to linear_cross_entropy."""
    return linear_cross_entropy(model.features(batch), model.encoder.embeddings.word.weight, model.head.bias, batch.labels)


def pretrain(model: MaskedLM, rows: Rows, optimizer: torch.optim.Optimizer, settings: PretrainSettings, *,
             device: torch.device, precision: torch.dtype, start: int = 0) -> Iterator[dict]:
    """Train from step `start` on, yielding {'step', 'loss', 'lr', 'grad_norm'} after each optimizer step.

    Dropout is seeded by (seed, step) as the data are, so a loop that is left and entered again repeats nothing and skips
    nothing. Raises UsageError on a loss that is not finite.
    """
    s = settings
    model.train()
    for step in range(start, s.steps):
        torch.manual_seed(derive_seed(s.seed, step))
        lr = schedule(step, s.steps, s.warmup, s.lr)
        set_lr(optimizer, lr)
        total = torch.zeros((), device=device)
        for part in range(s.accumulation):
            batch = rows.batch(step, s.batch_tokens, part=part, parts=s.accumulation).to(device)
            with autocast(device, precision):
                loss = mlm_loss(model, batch) / s.accumulation
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = total.item()
        if not math.isfinite(loss):
            raise UsageError(f"the loss at step {step + 1} is {loss}: lower --lr ({s.lr}) or raise --warmup ({s.warmup})")
        yield {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm.item()}


@torch.no_grad()
def evaluate_mlm(model: MaskedLM, rows: Rows, *, tokens: int, device: torch.device, precision: torch.dtype) -> dict:
    """Loss and accuracy on up to `tokens` tokens of `rows`, masked the same way at every call."""
    model.eval()
    wanted = max(1, min(tokens // rows.row_tokens, rows.per_epoch))
    loss = right = count = 0.0
    for first in range(0, wanted, 8):
        batch = rows.masked(range(first, min(first + 8, wanted))).to(device)
        with autocast(device, precision):
            scores = model(batch).float()
        loss += torch.nn.functional.cross_entropy(scores, batch.labels, reduction="sum").item()
        right += (scores.argmax(-1) == batch.labels).sum().item()
        count += len(batch.labels)
    model.train()
    return {"loss": loss / count, "accuracy": right / count, "predictions": int(count)}
