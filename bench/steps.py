"""Whole training steps side by side, for bench.train and bench.recycle.

A case is a dict of what is computed; the script's PROBLEMS[case["case"]] turns it into a `Problem`. All implementations that can be built
are timed in turns, a round at a time, each round in another order, so noise hits all of them equally. Those that torch.compile takes
minutes for come afterwards, one by one, in turns with the one that they are compared with. A row is an implementation of a case:

    ms, p20, p80, n         median and percentiles over the rounds, and the number of rounds
    against, ratio          the implementation compared with, and ms / its ms in the same turns; ratio_p20 and ratio_p80 are of single
                            rounds' ratios
    tokens, padded_tokens   per step: real tokens, and tokens computed by an implementation that pads; tokens_per_s counts the real ones
    tflop, mfu              of the algorithm on real tokens (matrix products forward and backward, nothing twice, scores of predicted
                            rows only), and the share of the best rate at which this run multiplied matrices of that dtype
    peak_mb                 CUDA: from before the model was built to the peak during a step: weights, gradients, optimizer, activations;
                            not of steps in a CUDA graph, whose pool it would miss
    saved_mb, grads_mb, state_mb    kept for the backward pass (weights not counted), gradients, the optimizer's state
    loss, loss_peer         for the same weights in fp32 without dropout; the case is not timed if they differ by more than 1e-4

`failed` says why an implementation could not run. Batches are on the device beforehand; reading data, seeding and logging are not timed.
"""
import math
import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.measure import MiB, captured, peak, sample, spread
from bench.runner import DTYPES, Run, options
from bench.tables import label
from rt.limits import Positive, ShareBelowOne
from rt.model import PRESETS, EncoderConfig
from rt.optim import adamw, autocast
from rt.speed.device import bf16_is_fast, pick_device


@dataclass(frozen=True)
class StepFlags:
    """The flags that bench.train and bench.recycle share."""
    sizes: tuple[Literal[tuple(PRESETS)], ...] = ()  # presets; default: small and mini; on a GPU base before them
    dropouts: tuple[ShareBelowOne, ...] = (0.1, 0.0)  # of embeddings, residuals, attention and head, in ours and in the peers
    case_seconds: Positive = 20.0  # timing a case ends after so many seconds and 5 rounds, or after 25 rounds
    compile: bool = False  # torch.compile, a minute or more each; on a GPU always, but with --quick


@dataclass(frozen=True)
class Platform:
    """The device and how steps are computed on it."""
    device: torch.device
    fast: bool      # whether the device multiplies bfloat16 faster than float32
    compile: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> torch.dtype:
        """The precision that the product uses here (--precision auto)."""
        return self.dtypes[0]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16, torch.float32) if self.fast else (torch.float32,)

    def encoder_config(self, case: dict) -> EncoderConfig:
        vocab = 8192 if case["size"] in ("tiny", "mini") else 50265
        return EncoderConfig(vocab, dropout=case["dropout"], attention_dropout=case["dropout"], **PRESETS[case["size"]])


class Impl(NamedTuple):
    """One implementation. `build` makes the model and everything else it needs, and returns the step to time."""
    build: Callable[[], Callable[[], object]]
    dtype: torch.dtype
    flops: float | None = None                  # of the algorithm, per step


@dataclass
class Problem:
    """The implementations of one case."""
    impls: dict[str, Impl]
    tokens: int                                 # real tokens per step
    against: str = "ours"                       # the implementation that all are compared with
    facts: dict = field(default_factory=dict)   # for every row


# ---------------------------------------------------------------- a step

class Step:
    """One training step of `model`, as in the product: forward and loss in `precision`, backward, clipping, AdamW. With `graph`,
    forward and backward are one replay of a CUDA graph."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], precision: torch.dtype, graph: bool = False):
        self.model, self.loss, self.precision = model.train(), loss, precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = adamw(self.parameters, lr=1e-6, weight_decay=0.01)      # a rate at which hundreds of steps change little
        # gradients are dropped before the capture: the graph then allocates its own, and each replay overwrites them
        self.graph = captured(self.backward, partial(self.optimizer.zero_grad, set_to_none=True)) if graph else None

    def backward(self) -> None:
        with autocast(self.device, self.precision):
            value = self.loss()
        value.backward()

    def __call__(self) -> None:
        self.backward() if self.graph is None else self.graph.replay()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.graph is None:
            self.optimizer.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, float]:
        """MiB kept for the backward pass (each storage once, weights not counted), of gradients, and of the optimizer's state."""
        weights = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(self.device, self.precision):
            value = self.loss()
        value.backward()
        grads = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)
        state = sum(t.nbytes for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        saved = sum(size for pointer, size in kept.items() if pointer not in weights)
        return {"saved_mb": saved / MiB, "grads_mb": grads / MiB, "state_mb": state / MiB}


def agreement(ours: float, peer: float) -> dict[str, float]:
    """The losses as fields of a row. ValueError if two implementations do not compute the same."""
    if not abs(ours - peer) <= 1e-4 * max(1.0, abs(peer)):
        raise ValueError(f"of the same weights our loss is {ours}, the peer's {peer}")
    return {"loss": ours, "loss_peer": peer}


# ---------------------------------------------------------------- timing

def in_turns(steps: dict[str, Callable], cuda: bool, quick: bool, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every implementation, one per round; the order within a round is random but repeatable.
    On a GPU a sample is several steps in a row (about 50 ms), so the next step is launched while one computes, as in training."""
    names, order = list(steps), random.Random(0)
    calls = {name: max(1, min(20, math.ceil(50 / sample(step, cuda, 2)))) if cuda else 1 for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    least, most = (3, 3) if quick else (5, 25)
    start = time.monotonic()
    for n in range(most):
        if n >= least and time.monotonic() - start > seconds:
            break
        order.shuffle(names)
        for name in names:
            times[name].append(sample(steps[name], cuda, calls[name]))
    return times


def statistics_of(times: dict[str, list[float]], against: str) -> dict[str, dict]:
    """The timing fields of each implementation's row."""
    out = {}
    for name, own in times.items():
        ms, low, high = spread(own)
        out[name] = {"ms": ms, "p20": low, "p80": high, "n": len(own), "against": against}
        if against in times:
            _, low, high = spread([a / b for a, b in zip(own, times[against], strict=True)])
            out[name] |= {"ratio": ms / spread(times[against])[0], "ratio_p20": low, "ratio_p80": high}
    return out


@dataclass
class Bench:
    """Measures one case after another."""
    run: Run
    platform: Platform
    problems: dict[str, Callable[[dict, Platform], Problem]]
    seconds: float      # for timing a case

    def built(self, case: dict, impls: dict[str, Impl]) -> tuple[dict[str, Callable], dict[str, dict]]:
        """The steps that could be built (each has run twice), and the memory that each takes."""
        steps, memory = {}, {}
        for name, impl in impls.items():
            try:
                before = torch.cuda.memory_allocated() if self.platform.cuda else 0
                step = impl.build()
                step()                      # compiles, allocates
                memory[name] = step.memory() if isinstance(step, Step) and step.graph is None else {}
                memory[name] |= {"peak_mb": peak(step, before)} if self.platform.cuda and "+graphs" not in name else {}
                steps[name] = step
            except Exception as error:      # whatever it is, it is this row's result
                step = None
                self.run.failed(case | {"impl": name, "dtype": DTYPES[impl.dtype]}, error)
        return steps, memory

    def measure(self, case: dict) -> None:
        """All implementations of one case that have no row yet. A run that is cut off keeps the rows of those before."""
        problem = self.problems[case["case"]](case, self.platform)
        known = {r["impl"] for r in self.run.of(case)}
        todo = [name for name in problem.impls if name not in known]
        slow = [name for name in todo if "+compile" in name]
        if fast := [name for name in todo if name not in slow]:
            self.measure_together(case, problem, fast)
        for name in slow:
            self.run.release()
            if self.run.late():
                self.run.left.append(f"{label(case)}: {name}")
            else:
                self.measure_together(case, problem, [name])

    def measure_together(self, case: dict, problem: Problem, names: list[str]) -> None:
        """A row for each of `names`, timed in turns with the implementation that all are compared with."""
        before = torch.get_float32_matmul_precision()
        if self.platform.cuda:
            torch.set_float32_matmul_precision("high")      # fp32 peers at their best: TF32; the losses were compared without it
        failed = any("failed" in r for r in self.run.of(case | {"impl": problem.against}))      # it may have broken the CUDA context
        beside = [problem.against] if problem.against in problem.impls and not failed else []
        try:
            steps, memory = self.built(case, {name: problem.impls[name] for name in dict.fromkeys(beside + names)})
            times = in_turns(steps, self.platform.cuda, self.run.quick, self.seconds)
        finally:
            torch.set_float32_matmul_precision(before)
        for name, timed in statistics_of(times, problem.against).items():
            if name not in names:
                continue
            _, dtype, flops = problem.impls[name]
            seconds = timed["ms"] / 1e3
            work = {"tflop": flops / 1e12, "mfu": flops / seconds / self.run.rates[dtype]} if flops else {}
            self.run.add(case | {"impl": name, "dtype": DTYPES[dtype]} | timed | {"tokens_per_s": problem.tokens / seconds} | work |
                         memory[name] | problem.facts)


def start(c: Any, script: str, argv: list[str], problems: dict[str, Callable]) -> Bench:
    """The run that the flags describe: `c` has RunFlags (`run`) and StepFlags (`steps`)."""
    device = pick_device(c.run.device)
    platform = Platform(device, bf16_is_fast(device), c.steps.compile or device.type == "cuda" and not c.run.quick)
    return Bench(Run(c.run, script, argv, platform.dtypes), platform, problems, c.steps.case_seconds)


def sizes_of(c: Any, cuda: bool) -> tuple[str, ...]:
    return c.steps.sizes or (("tiny",) if c.run.quick else ("base", "small", "mini") if cuda else ("small", "mini"))


def main(cls: type, script: str, problems: dict[str, Callable[[dict, Platform], Problem]], cases: Callable[[Any, bool], list[dict]],
         argv: list[str]) -> None:
    """The command line of a benchmark: `python -m SCRIPT` with the flags of `cls`. `cases` takes (flags, whether there is a GPU)."""
    c = options(cls, argv)
    if c is not None:
        bench = start(c, script, argv, problems)
        bench.run.measure_all(cases(c, bench.platform.cuda), bench.measure)
