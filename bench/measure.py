"""How long a call takes, how much memory it needs, and how far its result is from the truth."""
import math
import time
import warnings
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from bench.problem import Impl
from rt.speed.graphs import warm_up

MiB = 2**20


def sample(step: Callable, cuda: bool, calls: int = 1) -> float:
    """Milliseconds per call, over `calls` calls in a row, by the host's clock."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    return tuple(np.quantile(values, (0.5, 0.2, 0.8), method="nearest").tolist())


def timed(step: Callable, cuda: bool, quick: bool, launch_bound: bool = False) -> dict:
    """The timing fields of a row for `step`. On a GPU they come from CUDA events behind a flushed L2, or from 20 calls in a row, including
    the host's work, if launching takes longer than computing. On a CPU they come from the host's clock."""
    sample(step, cuda)      # compiles, allocates
    if cuda:
        calls = 20 if launch_bound else 1
        most = 200 if quick else 2000       # milliseconds of samples
        times = event_times(step, calls, int(min(max(most / calls / sample(step, cuda, calls), 5), 20 if quick else 50)))
    else:
        times = [sample(step, cuda) for _ in range(3 if quick else 7)]
    ms, low, high = spread(times)
    before = torch.cuda.memory_allocated() if cuda else 0
    return {"ms": ms, "p20": low, "p80": high, "n": len(times), "peak_mb": peak(step, before) if cuda else None}


def event_times(step: Callable, calls: int, samples: int) -> list[float]:
    """Milliseconds of device time per call. The device spins before the first event until the host has launched the sample; otherwise the
    host's work would be timed. It does not spin if the host's share of several `calls` is wanted."""
    begin = time.perf_counter()
    step()
    spin = int(2e6 * (1 + 1e3 * (time.perf_counter() - begin)))      # cycles: about a millisecond, and what launching takes
    flushed, pairs = torch.empty(2**28, dtype=torch.int8, device="cuda"), []
    for _ in range(samples):
        flushed.zero_()
        if calls == 1:
            torch.cuda._sleep(spin)
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        for _ in range(calls):
            step()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in pairs]


def peak(step: Callable, before: int) -> float:
    """The most GPU memory allocated while `step` runs, in MiB above `before` bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MiB


def captured(step: Callable, clear: Callable = lambda: None) -> torch.cuda.CUDAGraph:
    """`step` as a CUDA graph; `clear` drops the gradients of the runs before the capture."""
    warm_up(step, clear, torch.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def passes(impl: Impl) -> Iterator[tuple[str, Callable]]:
    """(pass, the call to time): "forward" keeps what a backward needs, "backward" is autograd.grad alone, "both" runs the two."""
    def forward() -> Tensor:
        return impl.function(*impl.leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), impl.leaves, impl.upstream)

    for which in impl.passes:
        if which == "backward":
            out = forward()
            yield which, lambda: torch.autograd.grad(out, impl.leaves, impl.upstream, retain_graph=True)
            del out
        else:
            yield which, forward if which == "forward" or not impl.leaves else both


def evaluate(impl: Impl) -> list[Tensor]:
    """Output and gradients in float64, in the truth's layout."""
    stale = [torch.full_like(x, math.nan) for x in (*impl.leaves, *impl.leaves, impl.upstream) if x is not None]
    del stale       # the allocator hands out this memory next, so an output element that is never written is NaN, not the last right answer
    with warnings.catch_warnings(), impl.context():
        warnings.simplefilter("ignore")
        out = impl.function(*impl.leaves)
        grads = torch.autograd.grad(out, impl.leaves, impl.upstream)
    found = [out.detach() if out.ndim == 0 else impl.canonical(out.detach())]
    found += grads if impl.upstream is None else map(impl.canonical, grads)
    return [part.double() for x in found for part in (x if isinstance(x, tuple) else [x])]


def distance(given: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest absolute difference over the truth's largest value; the norm of the difference over the truth's norm."""
    if given.shape != truth.shape:
        raise ValueError(f"{tuple(given.shape)} instead of {tuple(truth.shape)}")
    difference = given - truth
    return (difference.abs().max() / truth.abs().max()).item(), (difference.norm() / truth.norm()).item()


def worst(values: Iterable[float]) -> float:
    """The largest value, or NaN if any value is NaN; `max` may overlook a NaN."""
    return max(values, key=lambda e: math.inf if math.isnan(e) else e)
