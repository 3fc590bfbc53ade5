"""Recipes for continual pre-training: losses added to masked-LM, and what happens between steps and to the weights. docs/recipes.md lists
all recipes with their sources. Schedules are in rt/optim.py, masks in rt/data.py, settings and a stage's start in rt/runs/upgrade.py.

    preserve    MLM + w * distance of the new base from the old base M_i on the same masked rows; M_i is frozen, without dropout
                  hidden       mean((h_new - h_old)^2) / var(h_old) over all tokens, mean over embedding output and layers;
                               the variance is computed once, on a sample of the new text
                  last         the same for the last layer alone
                  predictions  KL(M_i's distribution || the new base's) on the predicted tokens, T = 1
                  attention    KL(M_i's attention map || the new base's), mean over layers, heads and query tokens

A delta of M_i was learned on the hidden states of M_i. If these states do not move, the delta still works on the upgrade.
"""
import copy
import math
from dataclasses import InitVar, dataclass
from typing import Callable, Literal, Sequence

import torch
from torch import Tensor

from kernels import linear_kd, states_mse
from rt.data import Rows
from rt.losses import attention_divergence
from rt.model import Activations, Batch, MaskedLM
from rt.pretrain import mlm_loss

PreserveBy = Literal["hidden", "last", "predictions", "attention"]
SMOOTHING = 0.1     # pulls shares by need towards equal shares, so no share dies out


class Preserve:
    """The loss of an upgrade that stays near `old`; `weight` is w. Keeps a copy of `old` and runs it forward once per batch. The variances
    come from `sample` and not from the batch, so the losses of its microbatches average to the same loss however it is split."""
    @torch.no_grad()
    def __init__(self, old: MaskedLM, weight: float, by: PreserveBy, sample: Batch):
        self.old, self.weight, self.by = copy.deepcopy(old).eval().requires_grad_(False), weight, by
        self.layers = tuple(range(len(old.encoder.layers))) if by == "attention" else ()        # layers whose attention maps are compared
        self.first = -1 if by == "last" else 0      # of the states to compare
        self.old.encoder(sample, activations := Activations(hidden=[]))
        variances = torch.stack([h.float().var(correction=0) for h in activations.hidden[self.first:]])
        self.layer_weights = weight / len(variances) / variances      # (L,) weights of the squared errors

    def __call__(self, model: MaskedLM, batch: Batch) -> Tensor:
        """Scalar: MLM + w * distance."""
        if self.by == "predictions":        # CE + w KL as (1 + w) ((1 - alpha) CE + alpha KL): one pass over the vocabulary
            with torch.no_grad():
                teacher = self.old.features(batch), self.old.encoder.embeddings.word.weight, self.old.head.bias
            student = model.features(batch), model.encoder.embeddings.word.weight, model.head.bias
            return (1 + self.weight) * linear_kd(*student, *teacher, batch.labels, alpha=self.weight / (1 + self.weight), T=1.0)
        new, old = (Activations(self.layers, hidden=[]) for _ in range(2))
        loss = mlm_loss(model, batch, new)
        with torch.no_grad():
            self.old.encoder(batch, old)
        if self.by == "attention":
            return loss + self.weight * attention_divergence(new, old, batch)
        return loss + states_mse(new.hidden[self.first:], old.hidden[self.first:], self.layer_weights)


@dataclass(eq=False)
class Recipe:
    """The loss of a batch, and what happens after a step."""
    model: InitVar[MaskedLM | None] = None
    align: int = 0      # Reptile (Nichol et al., 2018): every `align` steps, theta <- theta_before + eps (theta - theta_before)
    eps: float = 1.0
    mixture: "Mixture | None" = None
    every: int = 0      # new shares of `mixture` are computed every so many steps and hold one period later, as batches are made ahead
    eta: float = 0.0
    losses: Callable[[], list[float]] | None = None     # measures the losses of the last sources of `mixture`
    reference: Sequence[float] = ()     # their target losses; a source above its target gets a larger share; (): shares stay
    loss: Callable[[MaskedLM, Batch], Tensor] = mlm_loss

    def __post_init__(self, model: MaskedLM | None):
        self.weights = [*model.parameters()] if self.align else []
        self.before = [p.detach().clone() for p in self.weights]
        if self.reference:
            self.mixture.append(self.mixture.history[0])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Call this after `step` steps of the stage."""
        if self.align and step % self.align == 0:
            for p, before in zip(self.weights, self.before):
                p.copy_(before.lerp_(p, self.eps))
        if self.reference and step % self.every == 0:
            excess = [loss - wanted for loss, wanted in zip(self.losses(), self.reference)]
            replayed, own = self.mixture.history[-1][:-len(excess)], self.mixture.history[-1][-len(excess):]
            shares = mixed_shares([part / sum(own) for part in own], excess, self.eta)
            self.mixture.append(replayed + [round(share * sum(own)) for share in shares])

    def state(self) -> dict:
        """The recipe's entries in a resumable checkpoint; empty if there are none."""
        return ({"before": self.before} if self.before else {}) | ({"history": self.mixture.history} if self.reference else {})

    def load_state(self, state: dict) -> None:
        for mine, saved in zip(self.before, state.get("before", [])):
            mine.copy_(saved)
        for parts in state.get("history", [])[2:]:
            self.mixture.append(parts)


def mixed_shares(shares: list[float], excess: list[float], eta: float) -> list[float]:
    """Shares times exp(eta * excess loss) if the excess is positive; then smoothed. As in DoReMi (Xie et al., 2023)."""
    grown = [share * math.exp(eta * (max(0.0, above) - max(0.0, *excess))) for share, above in zip(shares, excess)]     # no overflow
    return [(1 - SMOOTHING) * share / sum(grown) + SMOOTHING / len(grown) for share in grown]


# --- mixtures ---------------------------------------------------------------------------------------------------------

def mix(rows: Rows, others: list[Rows], shares: list[float], every: int = 0) -> None:
    """Makes `rows.batch` draw from a Mixture of `others` and `rows`, with `shares` in that order, which may change every `every` rows."""
    rows.mixture = Mixture([*others, rows], shares, every)
    rows.mean_length = min(source.mean_length for source in rows.mixture.sources)       # static shapes then have room for all sources
    rows.length_deviation = max(source.length_deviation for source in rows.mixture.sources)


class Mixture:
    """Maps row `number` of a mixture to a row of a source. The map is a function of the number and the shares, so there is no state.
    Sources take turns. While shares stay the same, the count of each source among the first n rows differs from its share of n by less
    than the number of sources, and by 0 if all shares of n are whole. A period has `every` rows (0: endless), and shares `history[i]`."""

    def __init__(self, sources: list[Rows], shares: list[float], every: int = 0):
        self.sources, self.every = sources, every
        self.history, self.before = [], [[0] * len(sources)]    # before: rows of each source before each period, and before the next one
        self.append([round(share * 10**6) for share in shares])

    def append(self, parts: list[int]) -> None:
        """Set the shares of the next period, in millionths."""
        first, end = (counts(n * self.every, parts) for n in (len(self.history), len(self.history) + 1))     # so small shares add up
        self.history.append(parts)
        self.before.append([b + e - f for b, e, f in zip(self.before[-1], end, first)])

    def locate(self, number: int) -> tuple[Rows, int]:
        period = number // self.every if self.every else 0
        first, before, after = (counts(n, self.history[period]) for n in (period * self.every, number, number + 1))
        i = next(i for i in range(len(self.sources)) if after[i] > before[i])
        return self.sources[i], self.before[period][i] + before[i] - first[i]


def counts(n: int, shares: list[int]) -> list[int]:
    """How many of n rows each source gets. One more row adds one row to exactly one source."""
    found, left, rest = [], n, sum(shares)
    for share in shares:
        found.append(left * share // max(1, rest))
        left, rest = left - found[-1], rest - share
    return found
