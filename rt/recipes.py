"""Recipes of continual pre-training: switches of an upgrade that can be combined, and what they do between the steps of a stage.

docs/recipes.md has a row for each, with its source. Schedules are in rt/optim.py, how rows are mixed and masked in rt/data.py.
"""
import math
from dataclasses import dataclass, fields
from typing import Annotated, Callable, Iterable

import torch
from torch import Tensor

from rt.data import Mixture
from rt.errors import InputError
from rt.limits import Limit, NonNegative, NonNegativeInt, PositiveInt, Share, ShareBelowOne
from rt.model import MaskedLM
from rt.optim import ScheduleConfig

SMOOTHING = 0.1     # of shares by need: towards equal ones, so that none dies out


@dataclass(frozen=True)
class RecipeConfig:
    """The switches that change what a stage of pre-training does; the defaults change nothing."""
    # recipes of an upgrade (docs/recipes.md)
    schedule: ScheduleConfig = ScheduleConfig()
    replay: ShareBelowOne = 0.0  # share of the rows that come from earlier domains of the lineage, in equal parts
    mix: tuple[str, ...] = ()  # one stage on all domains of the stream: in fixed shares, wiki:0.3,bio:0.7, or by need
    mix_every: Annotated[int, Limit(lambda v: v >= 5, "`{name}` {value}: must be 5 or more: batches are made ahead")] = 50  # need: steps
    mix_eta: NonNegative = 1.0  # need: shares are multiplied by exp(eta * the loss above the reference's)
    mix_reference: str | None = None  # need: the base whose losses are to be reached; default: the one that the stage starts from
    align: NonNegativeInt = 0  # Reptile: after every so many steps the weights go back part of the way they have come
    align_eps: Share = 0.3  # Reptile: the part of the way that is kept; 1 is plain training
    average: PositiveInt = 1  # the published base is the mean of the stage's last so many snapshots, its end counted

    def check(self, domains: list[str], warmup: float, steps: int, snapshots: int) -> None:
        """Raises InputError for settings that make no sense together, or with the stage's."""
        s = self.schedule
        details = {"cooldown": (s.schedule in ("wsd", "infinite"), "`schedule` wsd or infinite"), "align_eps": (self.align, "`align`"),
                   **dict.fromkeys(("hold", "anneal", "rewarm"), (s.schedule == "infinite", "`schedule` infinite")),
                   **dict.fromkeys(("mix_every", "mix_eta", "mix_reference"), (self.by_need, "`mix` need"))}
        for part in (self, s):
            for field in fields(part):
                is_used, of = details.get(field.name, (True, ""))
                if not is_used and getattr(part, field.name) != field.default:
                    raise InputError(f"`{field.name}` says nothing without {of}")
        if s.schedule == "infinite" and warmup + s.cooldown + s.anneal > 1:
            raise InputError(f"`warmup` {warmup}, `cooldown` {s.cooldown} and `anneal` {s.anneal} are more than the whole stage")
        if s.annealing(steps) >= steps:
            raise InputError(f"`anneal` {s.anneal}: nothing is left of {steps} steps to go on from")
        if self.average > min(snapshots, steps - 1) + 1:
            raise InputError(f"`average` {self.average} takes {self.average - 1} snapshots and the end of a stage: raise `snapshots` "
                             f"({snapshots})" + f" and `steps` ({steps})" * (snapshots >= steps))
        if self.mix and len(domains) < 2:
            raise InputError(f"`mix` {','.join(self.mix)}: there is one domain, {domains[0]}; name all of them in `stream`")
        if self.mix and not self.by_need and not (self.shares.keys() == set(domains) and abs(sum(self.shares.values()) - 1) < 1e-6):
            raise InputError(f"`mix` {','.join(self.mix)}: must be need, or shares of {', '.join(domains)} that add up to 1, as in "
                             + ",".join(f"{name}:{1 / len(domains):.3g}" for name in domains))

    @property
    def by_need(self) -> bool:
        return self.mix == ("need",)

    @property
    def shares(self) -> dict[str, float]:
        """The fixed shares of `mix`; of what cannot be read as one NaN."""
        pairs = [entry.rpartition(":") for entry in self.mix]
        return {name: float(share) if share.replace(".", "", 1).isdigit() and float(share) else math.nan for name, _, share in pairs}

    def start_shares(self, domains: list[str], earlier: int) -> list[float]:
        """Shares of `earlier` domains, then of the stage's own."""
        replay = self.replay if earlier else 0.0
        own = [1 / len(domains) if self.by_need or not self.mix else self.shares[name] for name in domains]
        return [replay / earlier for _ in range(earlier)] + [(1 - replay) * share for share in own]


class Recipe:
    """What a recipe does after a step of a stage, and keeps between them: Reptile's weights, and the shares by need. `losses` measures the
    stage's own domains (the last of the mixture's sources) for `mix` need, `reference` is what it is to reach."""
    def __init__(self, config: RecipeConfig = RecipeConfig(), model: MaskedLM | None = None, mixture: Mixture | None = None,
                 losses: Callable[[], list[float]] | None = None, reference: list[float] = []):
        self.config, self.mixture, self.losses, self.reference = config, mixture, losses, reference
        self.weights = [*model.parameters()] if config.align and model else []
        self.before = [p.detach().clone() for p in self.weights]
        if self.reference:      # shares that are measured after one period hold from the end of the next: batches are made ahead
            self.mixture.append([share / Mixture.PARTS for share in self.mixture.history[0]])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """`step` steps of the stage are done."""
        c = self.config
        if c.align and step % c.align == 0:     # Reptile (Nichol et al., 2018): theta <- theta_before + eps (theta - theta_before)
            for p, before in zip(self.weights, self.before):
                p.copy_(before.lerp_(p, c.align_eps))
        if self.reference and step % c.mix_every == 0:
            excess = [loss - wanted for loss, wanted in zip(self.losses(), self.reference)]
            shares = [share / Mixture.PARTS for share in self.mixture.history[-1]]
            earlier, now = shares[:-len(excess)], shares[-len(excess):]
            self.mixture.append(earlier + [share * sum(now) for share in reweighted([x / sum(now) for x in now], excess, c.mix_eta)])

    def state(self) -> dict:
        """What a resumable checkpoint holds of it; empty if that is nothing."""
        return ({"before": self.before} if self.before else {}) | ({"history": self.mixture.history} if self.reference else {})

    def load_state(self, state: dict) -> None:
        for mine, saved in zip(self.before, state.get("before", [])):
            mine.copy_(saved)
        for parts in state.get("history", [])[2:]:
            self.mixture.append([share / Mixture.PARTS for share in parts])


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
