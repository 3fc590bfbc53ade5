"""What a measured problem consists of: implementations of one job, inputs rounded alike for all of them, and ways to run them."""
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")


class Impl(NamedTuple):
    function: Callable[..., Tensor]             # of the leaves
    leaves: tuple[Tensor, ...]                  # what is differentiated; none: `function` is all there is to time
    upstream: Tensor | None = None              # gradient of its output; None where that is a scalar
    context: Callable = nullcontext             # entered around every call
    canonical: Callable = lambda x: x           # its output, or a gradient, laid out as the truth is
    truth: str = "default"
    passes: tuple[str, ...] = PASSES            # what to time; none: its error is of interest, its time is not


@dataclass
class Problem:
    impls: dict[str, Callable[[], Impl]]
    truths: dict[str, Callable[[], Impl]]
    unit: str                                   # "tflops" or "gbps"
    work: dict[str, float]                      # a pass -> FLOPs of the algorithm, or bytes that must move
    launch_bound: bool = False                  # so small that calls are timed in a row, not one by one behind a flushed cache


@contextmanager
def reference() -> Iterator[None]:
    """Inside, our functions are their references in plain PyTorch."""
    before = os.environ.get("RT_KERNELS")
    os.environ["RT_KERNELS"] = "ref"
    try:
        yield
    finally:
        os.environ.pop("RT_KERNELS") if before is None else os.environ.update(RT_KERNELS=before)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch.use_deterministic_algorithms without its debugging aid, which writes NaN into every fresh tensor first."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def compiled(function: Callable) -> Callable:
    """Static shapes. Backward alone is timed on one graph again and again, which buffers given away after a backward would forbid."""
    import torch._functorch.config as config
    config.donated_buffer = False
    torch._dynamo.reset()       # a case more must not count as a recompilation of the last one
    return torch.compile(function, dynamic=False)


def graphed(impl: Impl) -> Impl:
    """Forward and backward as one replay of a CUDA graph."""
    def step() -> None:
        torch.autograd.grad(impl.function(*impl.leaves), impl.leaves, impl.upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Impl(lambda: graph.replay(), (), passes=("both",))


class Draws:
    """Random numbers from one seed; the same ones, as float64, if `exact`."""
    def __init__(self, device: torch.device, dtype: torch.dtype, exact: bool):
        self.dtype, self.exact = dtype, exact
        self.of = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Inputs, rounded to the dtype that is measured."""
        return self.widen(torch.randn(shape, **self.of).mul_(scale).to(self.dtype))

    def near(self, x: Tensor) -> Tensor:
        """Another of the kind of x, not far from it."""
        return self.widen((x.float() + 0.1 * x.float().std() * torch.randn(x.shape, **self.of)).to(self.dtype))

    def upstream(self, *shape: int) -> Tensor:
        """The gradient of fp32 losses: positive, not uniform."""
        return self.widen(torch.rand(shape, **self.of))

    def below(self, n: int, count: int) -> Tensor:
        return torch.randint(n, (count,), **self.of)

    def widen(self, x: Tensor) -> Tensor:
        return x.double() if self.exact else x


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def wide(x: Tensor) -> Tensor:
    """In at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
