"""Recipes of continual pre-training: what is done between the steps of a stage and to its weights. docs/recipes.md lists all of them with
their sources; schedules are in rt/optim.py, how rows are mixed and masked in rt/data.py, the settings in rt/runs/upgrade.py.
"""
import math
from dataclasses import replace
from typing import Callable, Iterable

import torch
from torch import Tensor

from rt.data import Mixture
from rt.errors import InputError
from rt.model import Encoder, MaskedLM, MLMHead

SMOOTHING = 0.1     # of shares by need: towards equal ones, so that none dies out


class Recipe:
    """What is done after a step. With `align`, Reptile (Nichol et al., 2018): every so many steps theta <- theta_before + eps (theta -
    theta_before). With a `reference`, shares by need: every so many steps `losses` of the last sources of `mixture` are measured, and
    shares of those above the reference's grow, from a period later on, because batches are made ahead."""
    def __init__(self, model: MaskedLM | None = None, align: int = 0, eps: float = 1.0, mixture: Mixture | None = None, every: int = 0,
                 eta: float = 0.0, losses: Callable[[], list[float]] | None = None, reference: list[float] = []):
        self.align, self.eps, self.mixture, self.every, self.eta, self.losses, self.reference = \
            align, eps, mixture, every, eta, losses, reference
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


@torch.no_grad()
def average_into(model: MaskedLM, states: Iterable[dict[str, Tensor]]) -> None:
    """The weights of `model` become the mean of themselves and `states`."""
    mean = model.state_dict()
    for n, state in enumerate(states, 2):
        for name, value in mean.items():
            value.lerp_(state[name].to(value), 1 / n)


def lengthen(model: MaskedLM, max_len: int) -> MaskedLM:
    """The same function with positions for `max_len` tokens: the old ones over and over, after RoBERTa's rows before the first."""
    config, name = model.encoder.config, "encoder.embeddings.position.weight"
    if max_len < config.max_len:
        raise InputError(f"`max_len` {max_len}: the base has positions for {config.max_len} tokens, and none are taken away")
    first, table = model.state_dict()[name].split([config.first_position, config.max_len])
    longer = MaskedLM(Encoder(config := replace(config, max_len=max_len)), MLMHead(config))
    tiled = table.repeat(-(-max_len // len(table)), 1)[:max_len]
    longer.load_state_dict(model.state_dict() | {name: torch.cat([first, tiled])})
    return longer
