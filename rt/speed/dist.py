"""Several processes under torchrun, one per device (NCCL on CUDA, gloo on a CPU), and the work that rank 0 does for all.

Without torchrun there is one rank, and torch.distributed is not touched. Only rank 0 writes and prints. All ranks read the same files. On
several nodes, `out` and `cache` must be on a file system that every node sees.
"""
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Callable, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rt.errors import InputError
from rt.speed.device import pick_device

TIMEOUT = timedelta(minutes=10)     # for the collectives of a step: if a rank is lost, the others end after this time at the latest
PATIENT = timedelta(hours=12)       # for work that rank 0 does alone: tokenizing, evaluating
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process as one of `world`. `waiting` is the gloo group with the PATIENT timeout; objects are sent through it."""
    device: torch.device
    rank: int = 0
    world: int = 1
    waiting: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.waiting)

    def from_main(self, make: Callable[[], T]) -> T:
        """The result of make() on rank 0, sent pickled to the others, which wait for it. All ranks raise an InputError of rank 0."""
        if self.world == 1:
            return make()
        box = [None, None]
        try:
            box[0] = make() if self.is_main else None
        except InputError as error:
            box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.waiting)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def main_first(self, make: Callable[[], T]) -> T:
        """The result of make(), run on rank 0 first, then on the other ranks, which find the files that rank 0 wrote."""
        made = []
        self.from_main(lambda: made.append(make()))
        return made[0] if self.is_main else make()

    def assert_same(self, what: dict) -> None:
        """Raises InputError on all ranks, about the first difference, unless `what` (plain values by name) is the same on all ranks."""
        if self.world == 1:
            return
        found: list = [None] * self.world
        dist.all_gather_object(found, what, group=self.waiting)
        for name, first in found[0].items():
            for rank, other in enumerate(own.get(name) for own in found):
                if other != first:
                    raise InputError(f"{name} is {other} on rank {rank} and {first} on rank 0: start all with the same flags and files")

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world
        return x

    def any(self, mine: bool) -> bool:
        """Whether `mine` is true on any rank. Waits for all ranks, not for the device."""
        if self.world == 1:
            return mine
        box = torch.tensor(int(mine))
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.waiting)
        return bool(box)

    def leave(self) -> None:
        """End all ranks together. gloo aborts a process that ends while another process still reads from it. So each rank notes in the
        store, which does not use gloo, that it has passed the last barrier."""
        if self.world > 1:
            self.wait()
            with suppress(RuntimeError):        # the store may end with the first rank that leaves
                store = dist.distributed_c10d._get_default_store()
                store.set(f"left by {self.rank}", "1")
                store.wait([f"left by {rank}" for rank in range(self.world)])
            dist.destroy_process_group()


def launched() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def join(device: str) -> Ranks:
    """This process as one of torchrun's ranks, or as the only rank; `device`: see pick_device. Raises InputError if GPUs are too few."""
    if launched() == 1:
        return Ranks(pick_device(device))
    if torch.cuda.is_available() and device != "cpu":
        if (local := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            raise InputError(f"no GPU for rank {local} of this machine, which has {torch.cuda.device_count()}: lower --nproc_per_node")
        torch.cuda.set_device(local)    # before anything is put on "cuda": otherwise every rank would use memory of the first GPU
        device = "cuda"
    where = pick_device(device)
    if "MASTER_ADDR" not in os.environ:
        raise InputError("RANK and WORLD_SIZE are set, but MASTER_ADDR is not: start several processes with torchrun")
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=TIMEOUT)
    ranks = Ranks(where, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENT))
    if not ranks.is_main:
        sys.stdout = open(os.devnull, "w")
    return ranks


# --- the optimizer's state, sharded (ZeRO) or not ---------------------------------------------------------------------

def zero(groups: list[dict], **settings: Any) -> torch.optim.Optimizer:
    """AdamW with a sharded state: each rank keeps and updates its share of the parameters (ZeRO stage 1, Rajbhandari et al., 2020)."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not in every build of PyTorch
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)


def gather(optimizer: torch.optim.Optimizer) -> None:
    """Gather a sharded state on rank 0, where `state_dict` is then that of a plain AdamW. Call it on all ranks."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the moments of a plain AdamW's state, each rank its share if sharded. Raises InputError unless they fit the parameters."""
    shapes = [p.shape for p in parameters(optimizer)]
    found = state.get("state") if isinstance(state, dict) else None
    if not isinstance(found, dict) or found.keys() != {*range(len(shapes))} or not all(
            isinstance(s, dict) and s.keys() == {"step", "exp_avg", "exp_avg_sq"} and all(isinstance(x, Tensor) for x in s.values())
            and s["step"].numel() == 1 and s["exp_avg"].shape == s["exp_avg_sq"].shape == shapes[i] for i, s in found.items()):
        raise InputError("the optimizer's state (optim.pt) is not that of this model: it is damaged, or of another run")
    moments = {i: {k: x.clone() for k, x in s.items()} for i, s in found.items()}      # no longer mapped from a file
    if hasattr(optimizer, "consolidate_state_dict"):
        # the sharded optimizer's own load_state_dict would put `step` on the CPU, where a fused step on CUDA cannot read it
        number = {p: i for i, p in enumerate(parameters(optimizer))}
        optimizer = optimizer.optim
        moments = {i: moments[number[p]] for i, p in enumerate(parameters(optimizer))}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
