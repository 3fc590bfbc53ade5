"""A model as a function of weights that are not its own: points of a path, interpolation distillation, projected deltas."""
from typing import Callable

import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from rt.model import Batch, Classifier, Trace

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
