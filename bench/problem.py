"""A measured problem: implementations of one job, with the same rounded inputs for all of them."""
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Callable, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor


class Impl(NamedTuple):
    """One implementation, ready to be called."""
    function: Callable[..., Tensor]             # called with the leaves
    leaves: tuple[Tensor, ...]                  # differentiated; if there are none, only `function` is timed
    upstream: Tensor | None = None              # gradient of the output; None if the output is a scalar
    context: Callable = nullcontext             # entered around every call
    canonical: Callable = lambda x: x           # puts the output, or a gradient, into the truth's layout, or into several tensors
    truth: str = "default"
    passes: tuple[str, ...] = ("forward", "backward", "both")       # timed; if there are none, only the error is measured


@dataclass
class Problem:
    """Implementations of one case by name. They are built one by one, because a peer may be missing or not fit in memory."""
    impls: dict[str, Callable[[], Impl]]
    truths: dict[str, Callable[[], Impl]]
    unit: str                                   # "tflops" or "gbps"
    work: dict[str, float]                      # pass -> FLOPs of the algorithm, or bytes that must move
    launch_bound: bool = False                  # too small to be timed one call at a time


def work(forward: float, backward: float) -> dict[str, float]:
    """`Problem.work` of the two passes and their sum."""
    return {"forward": forward, "backward": backward, "both": forward + backward}


def reference() -> patch.dict:
    """Inside this context, our functions run as their plain PyTorch references."""
    return patch.dict(os.environ, RT_KERNELS="ref")


def compiled(function: Callable) -> Callable:
    """torch.compile for static shapes. The backward alone is timed on one graph again and again; donated buffers forbid that."""
    import torch._functorch.config as config
    config.donated_buffer = False
    torch._dynamo.reset()       # another case must not count as a recompilation of the last one
    return torch.compile(function, dynamic=False)


def against_eager(ours: Callable[[], Impl], eager: Callable[[], Impl], **more: Callable[[], Impl]) -> dict[str, Callable[[], Impl]]:
    """Ours and its reference, the plain PyTorch version (eager and compiled), and `more` peers."""
    def compiled_eager() -> Impl:
        impl = eager()
        return impl._replace(function=compiled(impl.function))

    return {"ours": ours, "eager": eager, "compile": compiled_eager, **more, "reference": lambda: ours()._replace(context=reference)}


class Draws:
    """Random numbers from one seed, rounded to `dtype`; the same numbers as float64 if `exact`."""
    def __init__(self, device: torch.device, dtype: torch.dtype, exact: bool):
        self.dtype, self.exact = dtype, exact
        self.options = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Inputs, rounded to the dtype that is measured."""
        return self.widen(torch.randn(shape, **self.options).mul_(scale).to(self.dtype))

    def near(self, x: Tensor) -> Tensor:
        """A tensor like x and close to it."""
        return self.widen((x.float() + 0.1 * x.float().std() * torch.randn(x.shape, **self.options)).to(self.dtype))

    def upstream(self, *shape: int) -> Tensor:
        """The gradient of fp32 losses: positive, not uniform."""
        return self.widen(torch.rand(shape, **self.options))

    def below(self, n: int, count: int) -> Tensor:
        """`count` whole numbers below n."""
        return torch.randint(n, (count,), **self.options)

    def widen(self, x: Tensor) -> Tensor:
        """x, as float64 if `exact`."""
        return x.double() if self.exact else x


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def on(leaves: tuple[Tensor, ...], function: Callable[..., Tensor], upstream: Tensor | None = None, **more) -> Callable[[], Impl]:
    """Builds an implementation, with leaves of its own each time; `more` are fields of Impl."""
    return lambda: Impl(function, tuple(map(leaf, leaves)), upstream, **more)


def wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
