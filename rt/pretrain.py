"""Masked-language-model pre-training: the objective, the microbatches of a step, and evaluation. The loop is in train.py."""
from dataclasses import dataclass
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_cross_entropy
from rt.data import Rows
from rt.model import Activations, Batch, MaskedLM, spelled
from rt.optim import ScheduleConfig, autocast, derive_seed


@dataclass
class PretrainSettings:
    """One stage of masked-LM training. `steps` are optimizer steps of `batch_tokens` tokens, over all ranks and microbatches."""
    steps: int
    batch_tokens: int
    lr: float
    warmup_steps: int
    seed: int
    accumulation: int = 1   # microbatches per step and rank
    clip: float = 1.0
    rates: ScheduleConfig = ScheduleConfig()
    held: bool = False      # whether this is a later stage of an infinite schedule, whose rate is held

    def lr_at(self, step: int) -> float:
        return self.rates.rate(step, self.steps, self.warmup_steps, self.lr, self.held)


def mlm_loss(model: MaskedLM, batch: Batch, activations: Activations | None = None) -> Tensor:
    """Mean cross-entropy over the predicted tokens. linear_cross_entropy never stores the logits over the vocabulary."""
    if batch.predict is None:
        return replaced_token_loss(model, batch, activations)
    return linear_cross_entropy(model.features(batch, activations), model.encoder.embeddings.word.weight, model.head.bias, batch.labels)


def replaced_token_loss(model: MaskedLM, batch: Batch, activations: Activations | None = None) -> Tensor:
    """Cross-entropy of original (1) against replaced (0), summed over all tokens but special ones (-100) and divided by the number of all
    tokens, so that microbatches add up. The logit is the masked-LM head's score of the token (Electric, Clark et al., 2020, learns one)."""
    ids = spelled(batch.ids)
    logits = (model.features(batch, activations).float() * model.encoder.embeddings.word(ids)).sum(-1) + model.head.bias[ids]
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels.clamp(min=0).float(), reduction="none")
    return (losses * (batch.labels >= 0)).sum() / len(ids)


def microbatches(rows: Rows, s: PretrainSettings, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
    """A rank's batches from step `start` on, `accumulation` per step, with dropout seeds: functions of (seed, step, microbatch)."""
    for step in range(start, s.steps):
        for part in range(rank * s.accumulation, (rank + 1) * s.accumulation):
            batch = rows.batch(step, s.batch_tokens, part, world * s.accumulation)
            batch.seeds = torch.tensor([derive_seed(s.seed, step, part)])
            yield batch


@torch.no_grad()
def evaluate_mlm(model: MaskedLM, rows: Rows, *, tokens: int, device: torch.device, precision: torch.dtype) -> dict:
    """Loss and accuracy on up to `tokens` tokens of `rows`, with the same masks at every call."""
    was_training = model.training
    model.eval()
    wanted = max(1, min(tokens // rows.row_tokens, rows.per_epoch))
    loss = right = count = 0.0
    for first in range(0, wanted, 8):
        batch = rows.masked(range(first, min(first + 8, wanted))).to(device)
        with autocast(device, precision):
            logits = model(batch).float()
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += (logits.argmax(-1) == batch.labels).sum().item()
        count += len(batch.labels)
    model.train(was_training)
    return {"loss": loss / count, "accuracy": right / count, "predictions": int(count)}
