"""How an implementation is timed, and how far it is from the truth."""
import math
import statistics
import time
import warnings
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bench.problem import Impl


class Clock:
    """Times calls: with events behind a flushed cache on a GPU, with the host's clock elsewhere."""
    def __init__(self, cuda: bool, quick: bool):
        self.cuda, self.quick = cuda, quick
        self.cache = torch.empty(2**28, dtype=torch.int8, device="cuda") if cuda else None      # several times the L2

    def plan(self, ms: float) -> tuple[int, int]:
        """(warm-ups, samples) for calls of that length."""
        if not self.cuda:
            return (0, 3) if self.quick else (1, 7)
        return (3, 10) if self.quick else (10 if ms <= 100 else 3, 100 if ms < 1 else 50 if ms <= 20 else 20)

    def sample(self, step: Callable, count: int, calls: int = 1) -> list[float]:
        """Milliseconds a call, `count` times."""
        if not self.cuda:
            out = []
            for _ in range(count):
                start = time.perf_counter()
                step()
                out.append(1e3 * (time.perf_counter() - start))
            return out
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize()
        for start, end in events:
            if calls == 1:
                self.cache.zero_()
            start.record()
            for _ in range(calls):
                step()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / calls for start, end in events]

    def __call__(self, step: Callable, launch_bound: bool = False) -> dict:
        calls = 20 if launch_bound and self.cuda else 1
        self.sample(step, 1, calls)                                         # compiles, allocates
        warm, n = self.plan(min(self.sample(step, 2, calls)))
        self.sample(step, warm, calls)
        times = sorted(self.sample(step, n, calls))
        low, high = (times[round(q * (n - 1))] for q in (0.2, 0.8))
        return {"ms": statistics.median(times), "p20": low, "p80": high, "n": n, "peak_mb": self.peak(step)}

    def peak(self, step: Callable) -> float | None:
        """MiB that one call takes beyond what was allocated before."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def steps(impl: Impl) -> Iterator[tuple[str, Callable]]:
    """(pass, what to time)."""
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
    """Output and gradients in the truth's layout."""
    stale = [torch.full_like(x, math.nan) for x in (*impl.leaves, *impl.leaves, impl.upstream) if x is not None]
    del stale       # memory that is handed out next, so that what is never written does not look like the last right answer
    with warnings.catch_warnings(), impl.context():
        warnings.simplefilter("ignore")
        out = impl.function(*impl.leaves)
        grads = torch.autograd.grad(out, impl.leaves, impl.upstream)
    return [out.detach().double() if out.ndim == 0 else impl.canonical(out.detach()).double(),
            *((impl.canonical(g) if impl.upstream is not None else g).double() for g in grads)]


def distance(given: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest absolute difference over the truth's largest; the difference's norm over the truth's."""
    if given.shape != truth.shape:
        raise ValueError(f"{tuple(given.shape)} where {tuple(truth.shape)} was expected")
    difference = given - truth
    return (difference.abs().max() / truth.abs().max()).item(), (difference.norm() / truth.norm()).item()


def worst(values: Iterable[float]) -> float:
    """The largest, or NaN if there is one, which `max` may overlook."""
    return max(values, key=lambda e: math.inf if math.isnan(e) else e)
