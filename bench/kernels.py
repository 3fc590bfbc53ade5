"""Time and check every kernel against its peers, all in the same run.

    python -m bench.kernels --json out.jsonl                       all that fits into --budget seconds, most important first
    python -m bench.kernels --json out.jsonl --resume              continue where that stopped
    python -m bench.kernels --json out.jsonl --only kd_loss,linear_kd --peers eager,liger
    python -m bench.kernels --table out.jsonl                      print the tables of a file again
    python -m bench.kernels --tune --json configs.json             search better rows of kernels/configs.py for this GPU, for RT_CONFIGS;
                                                                   --only and --resume work here too

Without a GPU, our references run against torch's own operations on small shapes. This takes seconds and tests the script.

A row of the file is one (case, implementation, pass): median ms, 20th and 80th percentile, number of samples, TFLOP/s by the algorithm's
FLOPs or GB/s by the bytes that must move, peak memory of one call above the memory in use before, ratio = the implementation's ms / ours.
Rows whose pass begins with "check" hold errors against float64 on a small case, forward or over all gradients. `error` is the largest
absolute error over the truth's largest value, `error_l2` the error's norm over the truth's norm. `failed` says why something did not run.

Times are device times only, by CUDA events behind a flushed L2, or over 20 calls in a row if launching takes longer than computing.
"forward" keeps what a backward needs, "backward" is autograd.grad alone, "both" runs the two in sequence. Peers get their padded or packed
inputs ready-made, in the layout of a model's projections.
"""
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from bench import tune
from bench.cases import cases, small
from bench.measure import distance, evaluate, passes, timed, worst
from bench.peers import PROBLEMS
from bench.runner import DTYPES, Run, RunFlags, options
from bench.tables import label
from rt.errors import InputError
from rt.runs.config import run as run_script
from rt.speed.device import pick_device


@dataclass
class Config:
    only: tuple[Literal[tuple(PROBLEMS)], ...] = ()  # kernels; default: all
    peers: tuple[str, ...] = ()  # only peers whose name has one of these words; default: all
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 on a GPU, fp32 elsewhere
    run: RunFlags = RunFlags()
    tune: bool = False  # search better rows of kernels/configs.py, which go to --json


Config.__doc__ = __doc__
SLOW_ON_CPU = ("compile", "flex", "liger", "graph", "flash varlen")     # minutes of compilation, or only an error


@dataclass
class Bench:
    """Measures one case after another."""
    run: Run
    dtype: torch.dtype
    peers: tuple[str, ...] = ()

    def wants(self, name: str) -> bool:
        if self.peers:
            return name.startswith("ours") or any(word in name for word in self.peers)
        return self.run.cuda or not any(word in name for word in SLOW_ON_CPU)

    def done(self, case: dict, name: str, check: bool) -> bool:
        """Whether the last pass has a row, or one failed. The first passes alone are what a kill leaves."""
        rows = [r for r in self.run.of(case | {"impl": name}) if r["pass"].startswith("check") == check]
        return any("failed" in r or r["pass"] in ("check backward", "both") for r in rows)

    def measure(self, case: dict) -> None:
        """Errors and times of all implementations of one case."""
        self.check(small(case))
        problem = PROBLEMS[case["kernel"]](case, self.run.device, self.dtype)
        for name, build in problem.impls.items():
            if not self.wants(name) or self.done(case, name, check=False):
                continue
            if self.run.late() and name != "ours":
                self.run.left.append(f"{label(case)}: {name}")
                continue
            row, which = case | {"impl": name, "dtype": DTYPES[self.dtype]}, "build"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")     # about the backends that sdpa_kernel was told not to use
                    impl = build()
                    with impl.context():
                        for which, step in passes(impl):
                            found = timed(step, self.run.cuda, self.run.quick, problem.launch_bound)
                            self.run.add(row | {"pass": which} | found | self.derived(case, name, which, found["ms"], problem))
                            del step
            except Exception as error:      # whatever it is, it is this row's result
                self.run.failed(row | {"pass": which}, error)
            impl = None

    def derived(self, case: dict, name: str, which: str, ms: float, problem) -> dict:
        """The fields of a row that follow from its time."""
        scale = {"tflops": 1e9, "gbps": 1e6}[problem.unit]
        rate = {problem.unit: problem.work[which] / ms / scale} if which in problem.work else {}
        known = [r["ms"] for r in self.run.of(case | {"impl": "ours", "pass": which}) if "ms" in r]
        ours = ms if name == "ours" else known[-1] if known else None
        return rate | {"against": "ours"} | ({"ratio": ms / ours} if ours else {})

    def check(self, case: dict) -> None:
        """Errors against float64 of every implementation."""
        given, exact = (PROBLEMS[case["kernel"]](case, self.run.device, self.dtype, exact) for exact in (False, True))
        truths = {}
        for name, build in given.impls.items():
            once = name == "compile" and any("error" in r for r in self.run.of({"impl": name, "kernel": case["kernel"]}))
            others_drop = case.get("dropout") and not name.startswith(("ours", "reference"))        # they drop other weights
            if once or others_drop or name.endswith(("graph", "bound")) or not self.wants(name) or self.done(case, name, check=True) \
                    or self.run.late():
                continue        # compiled: once per kernel, because it takes long and computes the same
            row = case | {"impl": name, "dtype": DTYPES[self.dtype]}
            try:
                impl = build()
                if impl.truth not in truths:
                    truths[impl.truth] = evaluate(exact.truths[impl.truth]())
                errors = [distance(*pair) for pair in zip(evaluate(impl), truths[impl.truth], strict=True)]
                for which, (most, norm) in (("check forward", errors[0]), ("check backward", map(worst, zip(*errors[1:])))):
                    self.run.add(row | {"pass": which, "error": most, "error_l2": norm})
            except Exception as error:
                self.run.failed(row | {"pass": "check backward"}, error)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    c = options(Config, argv)
    if c is None:
        return
    if c.tune and not c.run.json:
        raise InputError("--tune needs --json FILE, where the configurations go")
    device = pick_device(c.run.device)
    name = c.dtype if c.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    dtype = next(dtype for dtype, short in DTYPES.items() if short == name)
    if c.tune:
        tune.tune(c.run, c.only or tuple(PROBLEMS), device, dtype)
        return
    run = Run(c.run, "bench.kernels", argv, (dtype,))
    run.measure_all(cases(run.cuda, c.only, c.run.quick), Bench(run, dtype, c.peers).measure)


if __name__ == "__main__":
    run_script(main)
