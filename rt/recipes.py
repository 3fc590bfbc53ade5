"""Recipes of continual pre-training: what an upgrade minimises and sees beside plain masked-LM on new text.

    preserve    MLM + w * how far the new base has moved from the old one, M_i, on the same masked rows; M_i is frozen, without dropout
                  hidden       mean over embedding output and layers of mean((h_new - h_old)^2) / var(h_old), all tokens;
                               the variance is taken once, over a sample of the new text
                  last         the same of the last layer alone
                  predictions  KL(M_i's distribution || the new one's) of the predicted rows, T = 1
                  attention    KL(M_i's attention map || the new one's), mean over layers, heads and query tokens

A delta of M_i was learned to read M_i's states. If the states stay where they were, the delta still works on the upgrade: `preserve` keeps
old deltas alive as feature distillation keeps old tasks alive in continual learning.
"""
import copy
from typing import Literal

import torch
from torch import Tensor

from kernels import linear_kd, states_mse
from rt.losses import attention_divergence
from rt.model import Activations, Batch, MaskedLM
from rt.pretrain import mlm_loss

PreserveBy = Literal["hidden", "last", "predictions", "attention"]


class Preserve:
    """The loss of an upgrade that stays near `old`, of which it keeps a copy; `weight` is w. Costs a forward pass of `old` a batch. The
    variances are those of `sample`, so that the loss of a batch is the mean of its parts', however many ranks and microbatches share it."""
    @torch.no_grad()
    def __init__(self, old: MaskedLM, weight: float, by: PreserveBy, sample: Batch):
        self.old, self.weight, self.by = copy.deepcopy(old).eval().requires_grad_(False), weight, by
        self.old.encoder(sample, activations := Activations(hidden=[]))
        self.first = -1 if by == "last" else 0
        variances = torch.stack([h.float().var(correction=0) for h in activations.hidden[self.first:]])
        self.weights = weight / len(variances) / variances      # (L,), of the squared errors

    def __call__(self, model: MaskedLM, batch: Batch) -> Tensor:
        """Scalar: MLM + w * distance."""
        if self.by == "predictions":
            return self.predictions(model, batch)
        layers = range(len(model.encoder.layers)) if self.by == "attention" else ()
        new, old = (Activations(tuple(layers), hidden=[]) for _ in range(2))
        loss = mlm_loss(model, batch, new)
        with torch.no_grad():
            self.old.encoder(batch, old)
        if self.by == "attention":
            return loss + self.weight * attention_divergence(new, old, batch)
        return loss + states_mse(new.hidden[self.first:], old.hidden[self.first:], self.weights)

    def predictions(self, model: MaskedLM, batch: Batch) -> Tensor:
        """CE + w KL as (1 + w) ((1 - alpha) CE + alpha KL): one pass over the vocabulary."""
        with torch.no_grad():
            features = self.old.features(batch)
        weights = [w for m in (model, self.old) for w in (m.encoder.embeddings.word.weight, m.head.bias)]
        return (1 + self.weight) * linear_kd(model.features(batch), *weights[:2], features, *weights[2:], batch.labels,
                                             alpha=self.weight / (1 + self.weight), T=1.0)
