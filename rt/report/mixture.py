"""Held-out loss as a power law of mixture and time. It says how much replay an upgrade needs.

    L(r, t) = E + A (r + eps)^-g t^b        t: steps; r: share of the rows that come from all earlier domains
                                            together, and for the domain that is learned the rest

A simple form of the laws of D-CPT (Que et al., 2024) and of critical mixture ratios (Gu et al., 2024) for one model size: b < 0 if a
domain is learned, b > 0 if it is forgotten.
"""
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.linspace(0, 2, 21), np.linspace(-1.5, 1.5, 31), (0.003, 0.01, 0.03, 0.1, 0.3)      # g, b, eps: all combinations are tried
Runs = list[tuple[float, float, float]]     # share r, steps t, loss


@dataclass(frozen=True)
class Law:
    """A fitted law; called with r and t it returns the loss."""
    E: float
    A: float
    g: float
    b: float
    eps: float

    def __call__(self, r: float, t: float) -> float:
        return self.E + self.A * (r + self.eps) ** -self.g * t ** self.b


def fit(runs: Runs) -> Law:
    """Least-squares fit with A >= 0: E and A in closed form for every g, b and eps of a grid. Needs at least three runs."""
    r, t, loss = np.array(runs, dtype=float).T
    g, b, eps = (values.reshape(-1, 1) for values in np.meshgrid(*EXPONENTS, indexing="ij"))
    x = (r + eps) ** -g * t ** b        # (combinations, runs)
    x = x / (size := x.max(1, keepdims=True))       # after many steps, all are small
    dx = x - x.mean(1, keepdims=True)
    A = (dx @ (loss - loss.mean())).clip(0) / (dx ** 2).sum(1).clip(1e-12)
    E = loss.mean() - A * x.mean(1)
    best = ((E[:, None] + A[:, None] * x - loss) ** 2).sum(1).argmin()
    return Law(*(float(values.flat[best]) for values in (E, A / size[:, 0], g, b, eps)))


def left_out(runs: Runs, bases: list[str]) -> float | None:
    """The mean absolute error of the law at each run, fitted on the runs of the other `bases`: snapshots of one base lie too near to each
    other. None if a fit would have fewer than three runs."""
    others = {base: [run for run, its in zip(runs, bases) if its != base] for base in bases}
    if min(map(len, others.values())) < 3:
        return None
    return float(np.mean([abs(fit(others[base])(r, t) - loss) for base, (r, t, loss) in zip(bases, runs)]))


def critical(law: Law, t: float, before: float) -> float | None:
    """The smallest share of old text that keeps the old domain's loss after `t` steps at `before` or lower; None: no share is enough."""
    return next((share for share in np.linspace(0, 1, 101).tolist() if law(share, t) <= before), None)
