"""AdamW with decay by dimension, also shared out among ranks; steps that are skipped because they are not finite; the one learning-rate
schedule: linear warm-up, linear decay to zero."""
from contextlib import AbstractContextManager, contextmanager
from typing import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from rt.errors import InputError


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Matrix products in `precision`, reductions and weights in float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def memory_for(what: str, lower: str) -> Iterator[None]:
    """InputError where memory runs out inside: `what` did not fit, and what to `lower`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{what} did not fit into memory: lower {lower}") from None


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def derive_seed(*keys: int) -> int:
    """A 63-bit seed that is a function of `keys` (run seed, stage, step, rank ...): restarting needs no generator state."""
    high, low = np.random.SeedSequence(keys).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


MOST_SKIPPED = 10   # in a row: an unlucky batch or an overflow passes in one or two steps, weights that are lost never do


def adamw(parameters: Iterable[Parameter], lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.98),
          zero: bool = False) -> torch.optim.Optimizer:
    """Matrices decay; biases, LN weights and gates do not (nanoGPT's rule). Only parameters that require a gradient.

    `zero`: each rank keeps the state of its share of the parameters, updates those, and gets the others from their ranks (ZeRO stage
    1, Rajbhandari et al., 2020); needs a process group.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    groups, settings = [g for g in groups if g["params"]], dict(lr=lr, betas=betas, eps=1e-6, fused=True)
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # not in every build of PyTorch

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def gather(optimizer: torch.optim.Optimizer) -> None:
    """Before `state_dict` on rank 0, on all ranks: fetch what is shared out. What is saved then is a plain AdamW's state."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """A plain AdamW's state into `optimizer`, of which a rank of a shared one takes its share; rates and the like stay the optimizer's.
    InputError where it is not that of the same parameters."""
    check_state(optimizer, state)
    moments = {i: {k: x.clone() for k, x in s.items()} for i, s in state["state"].items()}      # no longer of a file
    if hasattr(optimizer, "consolidate_state_dict"):
        # not by the shared optimizer's own load_state_dict: it puts `step` on the CPU, where a fused step on CUDA cannot read it
        number = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        mine = [number[p] for group in optimizer.optim.param_groups for p in group["params"]]
        optimizer = optimizer.optim
        moments = {i: moments[n] for i, n in enumerate(mine)}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def check_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """InputError unless `state` has moments of the shapes of all the optimizer's parameters, or of none."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    found = state.get("state") if isinstance(state, dict) else None
    if not isinstance(found, dict) or found.keys() != {*range(len(shapes))} or not all(
            isinstance(s, dict) and s.keys() == {"step", "exp_avg", "exp_avg_sq"} and all(isinstance(x, Tensor) for x in s.values())
            and s["step"].numel() == 1 and s["exp_avg"].shape == s["exp_avg_sq"].shape == shapes[i] for i, s in found.items()):
        raise InputError("the optimizer's state (optim.pt) is not that of this model: it is damaged, or of another run")


def schedule(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of step 0 ... steps-1: up to `peak` over `warmup` steps, then straight down to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def not_finite(loss: Tensor, norm: Tensor) -> Tensor:
    """1.0 where a step is to be skipped, else 0.0, of losses and gradient norms of one shape; on their device, which nobody waits for."""
    return (~(loss.isfinite() & norm.isfinite())).float()


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """optimizer.step(), which where `skip` (a scalar on the device) is 1 changes nothing: no weight, no moment, no count of steps. Of a
    fused AdamW; what a gradient scaler gives it (torch.amp.GradScaler.step)."""
    own = getattr(optimizer, "optim", optimizer)    # of a shared one this rank's
    own.found_inf = skip
    optimizer.step()


class Watch:
    """The losses of a loop, of one run () or of K (K,), and which of its steps were skipped: summed up on the device until `look`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.losses, self.skipped, self.row, self.longest = (torch.zeros(shape, device=device) for _ in range(4))
        self.steps = 0

    def count(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Of one step; where it is to be skipped, as `not_finite`."""
        skip = not_finite(loss, norm)
        self.losses += torch.where(skip > 0, 0.0, loss)
        self.skipped += skip
        self.row = (self.row + 1) * skip
        self.longest = torch.maximum(self.longest, self.row)
        self.steps += 1
        return skip

    def look(self) -> list[tuple[float | None, int, bool]]:
        """Since the last look, of each run: (mean loss of the steps that were taken, None where there are none; how many were skipped;
        whether more than MOST_SKIPPED in a row were)."""
        values = torch.stack([self.losses, self.skipped, self.longest]).view(3, -1).T.tolist()
        found = [(loss / (self.steps - skipped) if skipped < self.steps else None, int(skipped), longest > MOST_SKIPPED)
                 for loss, skipped, longest in values]
        self.losses, self.skipped, self.longest = (torch.zeros_like(x) for x in (self.losses, self.skipped, self.longest))
        self.steps = 0
        return found

    def keep(self, runs: list[int]) -> None:
        """Go on with these of the K."""
        self.losses, self.skipped, self.row, self.longest = (x[runs] for x in (self.losses, self.skipped, self.row, self.longest))
