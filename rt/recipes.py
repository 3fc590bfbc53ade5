"""Recipes of continual pre-training: what is minimised beside masked-LM, and what is done between steps and to the weights. docs/recipes.md
lists all with their sources; schedules are in rt/optim.py, masks in rt/data.py, settings and a stage's start in rt/runs/upgrade.py.

    preserve    MLM + w * how far the new base has moved from the old one, M_i, on the same masked rows; M_i is frozen, without dropout
                  hidden       mean over embedding output and layers of mean((h_new - h_old)^2) / var(h_old), all tokens;
                               the variance is taken once, over a sample of the new text
                  last         the same of the last layer alone
                  predictions  KL(M_i's distribution || the new one's) of the predicted rows, T = 1
                  attention    KL(M_i's attention map || the new one's), mean over layers, heads and query tokens

A delta of M_i was learned to read M_i's states. If the states stay where they were, the delta still works on the upgrade.
"""
import copy
import math
from typing import Callable, Literal

import torch
from torch import Tensor

from kernels import linear_kd, states_mse
from rt.data import Rows
from rt.losses import attention_divergence
from rt.model import Activations, Batch, MaskedLM
from rt.pretrain import mlm_loss

PreserveBy = Literal["hidden", "last", "predictions", "attention"]
SMOOTHING = 0.1     # of shares by need: towards equal ones, so that none dies out


class Preserve:
    """The loss of an upgrade that stays near `old`, of which it keeps a copy; `weight` is w. Costs a forward pass of `old` a batch. The
    variances are those of `sample`, so that the loss of a batch is the mean of its parts', however many ranks and microbatches share it."""
    @torch.no_grad()
    def __init__(self, old: MaskedLM, weight: float, by: PreserveBy, sample: Batch):
        self.old, self.weight, self.by = copy.deepcopy(old).eval().requires_grad_(False), weight, by
        self.layers = tuple(range(len(old.encoder.layers))) if by == "attention" else ()        # whose attention maps are compared
        self.first = -1 if by == "last" else 0
        self.old.encoder(sample, activations := Activations(hidden=[]))
        variances = torch.stack([h.float().var(correction=0) for h in activations.hidden[self.first:]])
        self.weights = weight / len(variances) / variances      # (L,), of the squared errors

    def __call__(self, model: MaskedLM, batch: Batch) -> Tensor:
        """Scalar: MLM + w * distance."""
        if self.by == "predictions":
            return self.predictions(model, batch)
        new, old = (Activations(self.layers, hidden=[]) for _ in range(2))
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


class Recipe:
    """The `loss` of a batch, and what is done after a step. With `align`, Reptile (Nichol et al., 2018): every so many steps theta <-
    theta_before + eps (theta - theta_before). With a `reference`, shares by need: every so many steps `losses` of the last sources of
    `mixture` are measured, and shares of those above the reference's grow, from a period later on, because batches are made ahead."""
    def __init__(self, model: MaskedLM | None = None, align: int = 0, eps: float = 1.0, mixture: "Mixture | None" = None, every: int = 0,
                 eta: float = 0.0, losses: Callable[[], list[float]] | None = None, reference: list[float] = [],
                 loss: Callable[[MaskedLM, Batch], Tensor] = mlm_loss):
        self.align, self.eps, self.mixture, self.every, self.eta, self.losses, self.reference, self.loss = \
            align, eps, mixture, every, eta, losses, reference, loss
        self.weights = [*model.parameters()] if align and model else []
        self.before = [p.detach().clone() for p in self.weights]
        if reference:
            mixture.append(mixture.history[0])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """`step` steps of the stage are done."""
        if self.align and step % self.align == 0:
            for p, before in zip(self.weights, self.before):
                p.copy_(before.lerp_(p, self.eps))
        if self.reference and step % self.every == 0:
            excess = [loss - wanted for loss, wanted in zip(self.losses(), self.reference)]
            replayed, own = self.mixture.history[-1][:-len(excess)], self.mixture.history[-1][-len(excess):]
            shares = reweighted([part / sum(own) for part in own], excess, self.eta)
            self.mixture.append(replayed + [round(share * sum(own)) for share in shares])

    def state(self) -> dict:
        """What a resumable checkpoint holds of it; empty if that is nothing."""
        return ({"before": self.before} if self.before else {}) | ({"history": self.mixture.history} if self.reference else {})

    def load_state(self, state: dict) -> None:
        for mine, saved in zip(self.before, state.get("before", [])):
            mine.copy_(saved)
        for parts in state.get("history", [])[2:]:
            self.mixture.append(parts)


def reweighted(shares: list[float], excess: list[float], eta: float) -> list[float]:
    """Shares times exp(eta * excess loss), where there is an excess; smoothed. As in DoReMi (Xie et al., 2023)."""
    grown = [share * math.exp(eta * max(0.0, loss)) for share, loss in zip(shares, excess)]
    return [(1 - SMOOTHING) * share / sum(grown) + SMOOTHING / len(grown) for share in grown]


# --- mixtures ---------------------------------------------------------------------------------------------------------

def mix(rows: Rows, others: list[Rows], shares: list[float], every: int = 0) -> None:
    """From now on `rows.batch` is of a Mixture of others and these, in that order of the shares, which may change every `every` rows."""
    rows.mixture = Mixture([*others, rows], shares, every)
    rows.mean_length = min(source.mean_length for source in rows.mixture.sources)       # static shapes have room for all
    rows.length_deviation = max(source.length_deviation for source in rows.mixture.sources)


class Mixture:
    """Which row of which source is row `number` of a mixture: a function of the number and of the shares, so that it has no state. Sources
    take turns; of any first n rows each has its share to within as many rows as there are sources, and exactly if shares of n are whole.
    A period is `every` rows (0: endless), and the shares of period i are `history[i]`."""

    def __init__(self, sources: list[Rows], shares: list[float], every: int = 0):
        self.sources, self.every = sources, every
        self.history: list[list[int]] = []
        self.before = [[0] * len(sources)]      # rows of each source before each period
        self.append([round(share * 10**6) for share in shares])

    def append(self, parts: list[int]) -> None:
        """The shares of the next period, in millionths."""
        self.before += [[b + c for b, c in zip(self.before[-1], counts(self.every, self.history[-1]))]] if self.history else []
        self.history.append(parts)

    def locate(self, number: int) -> tuple[Rows, int]:
        period, n = divmod(number, self.every) if self.every else (0, number)
        before, after = (counts(k, self.history[period]) for k in (n, n + 1))
        i = next(i for i in range(len(self.sources)) if after[i] > before[i])
        return self.sources[i], self.before[period][i] + before[i]


def counts(n: int, shares: list[int]) -> list[int]:
    """How many of n rows each source has; one more row is one more of one source."""
    found, left, rest = [], n, sum(shares)
    for share in shares:
        found.append(left * share // max(1, rest))
        left, rest = left - found[-1], rest - share
    return found
