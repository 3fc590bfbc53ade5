"""Whole training steps side by side: what bench.train and bench.recycle share.

A case is a dict of what is computed, the first fields of its rows; a script's PROBLEMS[case["case"]] makes a `Problem` of it, whose
implementations are built one by one. All that could be built are then timed in turns, a round at a time, each round in another order,
so that noise hits all alike. A row is one implementation of a case:

    ms, p20, p80, n         median and percentiles over the rounds, and how many there were
    against, ratio          what it is compared with, and its ms / that one's ms; ratio_p20 and ratio_p80 are of single rounds' ratios
    tokens, padded_tokens   a step, real and as computed by an implementation that pads; tokens_per_s counts the real ones
    tflop, mfu              of the algorithm on real tokens (matrix products forward and backward, nothing twice, scores of predicted
                            rows only), and the share of the rate at which this run multiplied matrices of that dtype at best
    peak_mb                 CUDA: from before the model was built to the most during a step: weights, gradients, optimizer, activations
    saved_mb, grads_mb, state_mb    kept for the backward pass (weights not counted), gradients, the optimizer's state
    loss, loss_peer         of the same weights in fp32 without dropout; the case is not timed where they differ by more than 1e-4

What could not run says why in `failed`. Batches are on the device beforehand; reading data, seeding and logging are not timed.
"""
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from bench.machine import commit, device_name, environment, version
from bench.measure import Clock
from bench.step_tables import tables, title
from bench.tables import read
from rt.errors import InputError
from rt.model import PRESETS, EncoderConfig
from rt.optim import adamw, autocast
from rt.runs.config import parse, require_positive
from rt.speed.device import bf16_is_fast, pick_device

MiB = 2**20
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass
class Config:
    """The flags of `python -m bench.train` and `python -m bench.recycle`."""
    json: str | None = None  # append a row for every implementation of every case
    sizes: tuple[str, ...] = ()  # presets; default: small and mini; on a GPU base before them
    only: tuple[str, ...] = ()  # kinds of cases; default: all
    dropouts: tuple[float, ...] = (0.1, 0.0)  # of embeddings, residuals, attention and head, in ours and in the peers
    device: str = "auto"  # auto, cpu or cuda
    vocab: int | None = None  # words; default: 8192 for tiny and mini, 50265 for the others
    budget: float = 480.0  # seconds; no case is begun that would not end before
    case_seconds: float = 20.0  # timing a case ends after so many seconds and 5 rounds, or after 25 rounds
    compile: bool = False  # torch.compile on a CPU too, a minute or more each; on a GPU always
    resume: bool = False  # keep the rows of --json, and measure the cases that are not there
    quick: bool = False  # the tiny preset, a few tokens, three rounds: to see that it runs
    table: str | None = None  # measure nothing, print the tables of this file


@dataclass(frozen=True)
class Where:
    """Where and how a step is computed."""
    device: torch.device
    fast: bool      # whether the device multiplies bfloat16 faster than float32
    compile: bool
    vocab: int | None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> torch.dtype:
        """What the product computes in here (--precision auto)."""
        return torch.bfloat16 if self.fast else torch.float32

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16, torch.float32) if self.fast else (torch.float32,)

    def encoder_config(self, case: dict) -> EncoderConfig:
        vocab = self.vocab or (8192 if case["size"] in ("tiny", "mini") else 50265)
        return EncoderConfig(vocab, dropout=case["dropout"], attention_dropout=case["dropout"], **PRESETS[case["size"]])


class Impl(NamedTuple):
    build: Callable[[], Callable[[], object]]   # makes the model and all else that is needed; what it returns is timed
    dtype: torch.dtype
    flops: float | None = None                  # of the algorithm a step


@dataclass
class Problem:
    impls: dict[str, Impl]
    against: str                        # the implementation that all are divided by
    tokens: int                         # real ones a step
    facts: dict = field(default_factory=dict)       # for every row


class Broken(Exception):
    """The CUDA context is gone, and with it everything this process could still measure."""


# ---------------------------------------------------------------- a step

class Step:
    """One training step of `model`, as rt.pretrain and rt.tune take it: forward and loss in `precision`, backward, clipping, AdamW.
    With `graph`, forward and backward are one replay of a CUDA graph."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], precision: torch.dtype, graph: bool = False):
        self.model, self.loss, self.precision = model.train(), loss, precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = adamw(self.parameters, lr=1e-6, weight_decay=0.01)      # a rate at which hundreds of steps change little
        self.graph = self.captured() if graph else None

    def backward(self) -> None:
        with autocast(self.device, self.precision):
            value = self.loss()
        value.backward()

    def captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.backward()
                self.optimizer.zero_grad(set_to_none=True)      # so that the graph allocates gradients, which each replay overwrites
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.backward()
        return graph

    def __call__(self) -> None:
        self.backward() if self.graph is None else self.graph.replay()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.graph is None:
            self.optimizer.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, float]:
        """MiB kept for the backward pass (every storage once, weights not counted), of gradients, of the optimizer's state."""
        weights = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            with autocast(self.device, self.precision):
                value = self.loss()
        value.backward()
        grads = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)
        state = sum(t.nbytes for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        return {"saved_mb": sum(kept.values()) / MiB, "grads_mb": grads / MiB, "state_mb": state / MiB}


def agreement(ours: float, peer: float) -> dict[str, float]:
    """For the rows; ValueError where two implementations do not compute the same."""
    if not abs(ours - peer) <= 1e-4 * max(1.0, abs(peer)):
        raise ValueError(f"of the same weights our loss is {ours}, the peer's {peer}")
    return {"loss": ours, "loss_peer": peer}


# ---------------------------------------------------------------- timing

def in_turns(clock: Clock, steps: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every implementation, one a round; the order within a round is random but repeatable.
    On a GPU a sample is several steps in a row (about 50 ms of them), so that the next is launched while one computes, as in training."""
    names, order = list(steps), random.Random(0)
    calls = {name: max(1, min(20, math.ceil(50 / min(clock.sample(step, 2))))) if clock.cuda else 1 for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    least, most = (3, 3) if clock.quick else (5, 25)
    start = time.monotonic()
    for n in range(most):
        if n >= least and time.monotonic() - start > seconds:
            break
        order.shuffle(names)
        for name in names:
            times[name] += clock.sample(steps[name], 1, calls[name])
    return times


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), *(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))


def statistics_of(times: dict[str, list[float]], against: str) -> dict[str, dict]:
    """For every implementation what a row says of its time."""
    out = {}
    for name, own in times.items():
        ms, low, high = percentiles(own)
        out[name] = {"ms": ms, "p20": low, "p80": high, "n": len(own), "against": against}
        if against in times:
            _, low, high = percentiles([a / b for a, b in zip(own, times[against], strict=True)])
            out[name] |= {"ratio": ms / statistics.median(times[against]), "ratio_p20": low, "ratio_p80": high}
    return out


class Bench:
    """A run: where it takes place, the rows so far, and until when it may begin more."""

    def __init__(self, c: Config, script: str, problems: dict[str, Callable[[dict, Where], Problem]], argv: list[str]):
        self.c, self.script, self.problems, self.argv = c, script, problems, argv
        device = pick_device(c.device)
        self.where = Where(device, bf16_is_fast(device), c.compile or device.type == "cuda", c.vocab)
        self.clock = Clock(device.type == "cuda", c.quick)
        self.started, self.longest = time.monotonic(), 0.0
        self.rows = read(c.json) if c.resume and c.json and Path(c.json).exists() else []
        if c.json:
            Path(c.json).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(c.json, "a", encoding="utf-8") if c.json else None
        self.about = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "transformers": version("transformers"), "commit": commit()}

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def failed(self, row: dict, error: Exception) -> None:
        """Note it; raise `Broken` where nothing can follow."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.add(row | self.about | {"failed": text})
        if self.where.cuda:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                raise Broken(text) from None

    def late(self) -> bool:
        """Whether a case as long as the longest so far would end too late."""
        return time.monotonic() + self.longest - self.started > self.c.budget

    def of(self, case: dict) -> list[dict]:
        return [r for r in self.rows if case.items() <= r.items()]

    def limits(self) -> dict[torch.dtype, float]:
        """FLOP/s of matrix products in each dtype: the fastest sample of several sizes, so that neither a size that suits the library
        badly nor other work on the machine makes a step look better than it is."""
        sizes, rates = (128, 256) if self.c.quick else (4096, 8192) if self.where.cuda else (512, 1024, 2048), {}
        for dtype in self.where.dtypes:
            for n in sizes:
                a, b = (torch.randn(n, n, device=self.where.device).to(dtype) for _ in range(2))
                self.clock.sample(lambda: a @ b, 3)
                times = self.clock.sample(lambda: a @ b, 20)
                tflops = 2 * n**3 / min(times) / 1e9
                self.add({"kernel": "limits", "impl": f"matmul {n} {DTYPES[dtype]}", "ms": statistics.median(times), "fastest": min(times),
                          "tflops": tflops})
                rates[dtype] = max(rates.get(dtype, 0.0), tflops * 1e12)
        return rates

    def built(self, case: dict, impls: dict[str, Impl]) -> tuple[dict[str, Callable], dict[str, dict]]:
        """Those that could be, run twice, and the memory that each takes."""
        steps, memory = {}, {}
        known = {r["impl"] for r in self.of(case) if "failed" in r}
        for name, impl in impls.items():
            if name in known:
                continue
            try:
                before = torch.cuda.memory_allocated() if self.where.cuda else 0
                step = impl.build()
                step()                      # compiles, allocates
                memory[name] = step.memory() if isinstance(step, Step) and step.graph is None else {}
                if self.where.cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                step()
                if self.where.cuda:
                    torch.cuda.synchronize()
                    memory[name]["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / MiB
                steps[name] = step
            except Exception as error:      # whatever it is, it is this row's result
                step = None
                self.failed(case | {"impl": name, "dtype": DTYPES[impl.dtype]}, error)
        return steps, memory

    def measure(self, case: dict, rates: dict[torch.dtype, float]) -> None:
        """All implementations of one case."""
        problem = self.problems[case["case"]](case, self.where)
        before = torch.get_float32_matmul_precision()
        if self.where.cuda:
            torch.set_float32_matmul_precision("high")      # fp32 peers at their best: TF32; the losses were compared without it
        try:
            steps, memory = self.built(case, problem.impls)
            times = in_turns(self.clock, steps, self.c.case_seconds)
        finally:
            torch.set_float32_matmul_precision(before)
        for name, timed in statistics_of(times, problem.against).items():
            _, dtype, flops = problem.impls[name]
            seconds = timed["ms"] / 1e3
            work = {"tflop": flops / 1e12, "mfu": flops / seconds / rates[dtype]} if flops else {}
            self.add(case | {"impl": name, "dtype": DTYPES[dtype]} | timed | {"tokens_per_s": problem.tokens / seconds} | work |
                     memory[name] | problem.facts | self.about)

    def attempt(self, case: dict, rates: dict[torch.dtype, float]) -> None:
        try:
            self.measure(case, rates)
        except Broken:
            raise
        except Exception as error:      # its inputs do not fit, or the losses differ
            self.failed(case | {"impl": "case"}, error)
        gc.collect()
        if self.where.cuda:
            torch.cuda.empty_cache()
        if self.where.compile:
            torch._dynamo.reset()       # a case more must not count as a recompilation of the last one

    def run(self, cases: list[dict]) -> None:
        """Every case for which there is time and no row yet."""
        self.add(environment(self.where.cuda, self.argv, ("transformers", "peft", "triton"), script=self.script))
        left = []
        try:
            rates = self.limits()
            for case in cases:
                if any("ms" in r for r in self.of(case)):
                    continue
                if self.late():
                    left.append(title(case))
                    continue
                start = time.monotonic()
                self.attempt(case, rates)
                self.longest = max(self.longest, time.monotonic() - start)
                print(f"{title(case)}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        except Broken as error:
            print(f"the CUDA context broke: {error}", file=sys.stderr, flush=True)
            time_left = self.c.budget - (time.monotonic() - self.started)
            if self.file and time_left > 20:
                self.file.close()
                sys.exit(subprocess.call([sys.executable, "-m", self.script, *self.argv, "--resume", "--budget", str(time_left)]))
        if left:
            print("no time was left for " + "; ".join(left) + ": --resume goes on", file=sys.stderr)


def sizes_of(c: Config, cuda: bool) -> tuple[str, ...]:
    sizes = c.sizes or (("tiny",) if c.quick else ("base", "small", "mini") if cuda else ("small", "mini"))
    for size in sizes:
        if size not in PRESETS:
            raise InputError(f"--sizes {size}: not one of {', '.join(PRESETS)}")
    return sizes


def main(script: str, doc: str, problems: dict[str, Callable[[dict, Where], Problem]], cases: Callable[[Config, bool], list[dict]],
         argv: list[str]) -> None:
    """A benchmark's command line: `python -m SCRIPT` with the flags of Config. `cases` of (flags, whether there is a GPU)."""
    Config.__doc__ = doc        # what --help begins with
    c = parse(Config, argv)
    require_positive(c, "vocab", "budget")
    for kind in c.only:
        if kind not in problems:
            raise InputError(f"--only {kind}: not one of {', '.join(problems)}")
    if any(not 0 <= p < 1 for p in c.dropouts):
        raise InputError(f"--dropouts {','.join(map(str, c.dropouts))}: each must be at least 0 and below 1")
    if c.resume and not c.json:
        raise InputError("--resume needs the rows of --json FILE")
    if c.table:
        if not Path(c.table).is_file():
            raise InputError(f"{c.table}: there is no such file; --table prints what --json FILE wrote")
        print(tables(read(c.table)))
        return
    bench = Bench(c, script, problems, argv)
    bench.run(cases(c, bench.where.cuda))
    print(tables(bench.rows))
