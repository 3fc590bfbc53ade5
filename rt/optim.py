"""AdamW with decay by dimension, learning-rate schedules, skipping of non-finite steps, precision, and seeds."""
import math
import re
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import unwrap
from typing import Callable, Iterable, Iterator, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from rt.errors import InputError
from rt.limits import PositiveShare, Share

TUNING_BETAS, EPS = (0.9, 0.999), 1e-6     # of AdamW
MOST_SKIPPED = 10   # in a row: a bad batch or an overflow passes in one or two steps; lost weights never recover


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its methods' decorators: they are for torch.compile, and importing torch._dynamo takes as long as torch."""
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
    add_param_group, zero_grad = unwrap(torch.optim.AdamW.add_param_group), unwrap(torch.optim.AdamW.zero_grad)
    state_dict, load_state_dict = unwrap(torch.optim.AdamW.state_dict), unwrap(torch.optim.AdamW.load_state_dict)


def adamw(parameters: Iterable[Parameter], lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.98),
          make: Callable[..., torch.optim.Optimizer] = AdamW) -> torch.optim.Optimizer:
    """Fused AdamW (or `make`'s optimizer) for parameters that require a gradient. Matrices decay; biases, LN weights and gates do not."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return make([g for g in groups if g["params"]], lr=lr, betas=betas, eps=EPS, fused=True)


def linear_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of step 0 ... steps-1: linear up to `peak` over `warmup` steps, then linear down to zero at `steps`."""
    return peak * (step + 1) / warmup if step < warmup else peak * (steps - step) / max(1, steps - warmup)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate of a pre-training stage. `infinite` is one schedule over a whole lineage (Beyond Cosine Decay, 2025). Only the
    first stage warms up. At the end of each stage, the rate is annealed to zero for the published base. The next stage continues from
    the weights before annealing. Cooldown and annealing are linear."""
    schedule: Literal["linear", "cosine", "wsd", "infinite"] = "linear"  # linear or cosine decay, warm-up-stable-decay, or infinite
    cooldown: Share = 0.2  # share of the steps spent falling; wsd: to zero; infinite: from the peak to the constant rate
    hold: PositiveShare = 0.3  # infinite: the constant rate, held from stage to stage, as a share of the peak
    anneal: Share = 0.1  # infinite: share of the steps in which the published base is annealed; the next stage starts before it
    rewarm: bool = False  # infinite: warm up and cool down again in the first stage, although its base is not new

    def annealing(self, steps: int) -> int:
        """The number of steps at the end of a stage that only the published base takes."""
        return round(self.anneal * steps) if self.schedule == "infinite" else 0

    def rate(self, step: int, steps: int, warmup: int, peak: float, held: bool = False) -> float:
        """Learning rate of step 0 ... steps-1. `held` marks a later stage of an infinite schedule."""
        cooldown, annealing = round(self.cooldown * steps), self.annealing(steps)
        if self.schedule == "infinite" and (held or step >= warmup):
            fallen = 1.0 if held else min(1.0, (step - warmup) / max(1, cooldown))
            return peak * (1 - (1 - self.hold) * fallen) * min(1.0, (steps - step) / max(1, annealing))
        if self.schedule == "linear" or step < warmup:
            return linear_rate(step, steps, warmup, peak)
        if self.schedule == "cosine":
            return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
        if self.schedule == "wsd":
            return peak * min(1.0, (steps - step) / max(1, cooldown))
        raise ValueError(f"`schedule` {self.schedule}: is no schedule")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def not_finite(loss: Tensor, norm: Tensor) -> Tensor:
    """1.0 if a step must be skipped, else 0.0. `loss` and `norm` have one shape; the result is on their device."""
    return (~(loss.isfinite() & norm.isfinite())).float()


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """optimizer.step(), but without effect if the device scalar `skip` is 1. Fused AdamW reads it on the device: the host never waits."""
    getattr(optimizer, "optim", optimizer).found_inf = skip     # ZeRO: this rank's optimizer
    optimizer.step()


class SkipTracker:
    """Losses and skipped steps of a loop, or of K loops side by side, summed on the device until `read`."""
    def __init__(self, device: torch.device, *K: int):
        self.sums = torch.zeros(3, *K, device=device)       # loss, skipped, longest streak of skipped steps
        self.streak, self.steps = torch.zeros(K, device=device), 0

    def count(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Count one step. Returns `not_finite`: whether to skip it."""
        skip = not_finite(loss, norm)
        self.streak = (self.streak + 1) * skip
        total, skipped, longest = self.sums
        self.sums = torch.stack([total + torch.where(skip > 0, 0.0, loss), skipped + skip, torch.maximum(longest, self.streak)])
        self.steps += 1
        return skip

    def read(self) -> list[tuple[float | None, int, bool]]:
        """For each loop, since the last read: mean loss of steps taken (or None), number skipped, whether over MOST_SKIPPED in a row."""
        sums, steps = self.sums.view(3, -1).T.tolist(), self.steps
        self.steps, self.sums = 0, torch.zeros_like(self.sums)
        return [(loss / (steps - skipped) if skipped < steps else None, int(skipped), longest > MOST_SKIPPED)
                for loss, skipped, longest in sums]


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Matrix products in `precision`, reductions and weights in float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def memory_for(what: str, lower: str) -> Iterator[None]:
    """Raises InputError if memory runs out inside. The message says that `what` did not fit and which settings to `lower`."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise InputError(f"{what} did not fit into memory: lower {lower}") from None
        raise


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, also in code that allocates by itself: graphs, NCCL, Triton, cuBLAS, PyTorch on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search("can't allocate memory|out of memory|ALLOC_FAILED", str(error)))


def derive_seed(*keys: int) -> int:
    """A 63-bit seed computed from `keys` (run seed, stage, step ...), so that resuming needs no state. Trailing zeros do not count."""
    high, low = np.random.SeedSequence(keys).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1
