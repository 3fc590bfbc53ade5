"""Time and check every kernel against its peers, all in the same run.

    python -m bench.kernels --json out.jsonl                       everything that fits into --budget seconds, the most important first
    python -m bench.kernels --json out.jsonl --resume              go on where that stopped
    python -m bench.kernels --json out.jsonl --which kd linear --peers eager liger
    python -m bench.kernels --table out.jsonl                      the tables of a file again
    python -m bench.kernels --tune --json configs.json             better rows of kernels/configs.py for this GPU, for RT_CONFIGS;
                                                                   --which and --resume work here too

On a machine without a GPU: our references against torch's own operations on small shapes, in seconds, so that this script is tested.

A row of the file is one (case, implementation, pass): median ms, 20th and 80th percentile, number of samples, TFLOP/s by the algorithm's
FLOPs or GB/s by the bytes that must move, peak memory of one call above what was there before, ratio = the implementation's ms / ours.
Rows whose pass begins with "check" hold errors against float64 on a small case, forward or over all gradients: `error` is the largest
absolute one over the truth's largest, `error_l2` that of the norms; timed rows repeat them. What could not run says why in `failed`.

Times are of CUDA events, each call behind a flushed L2, after 10 warm-ups; launch-bound cases are timed 20 calls in a row instead.
"forward" keeps what a backward needs, "backward" is autograd.grad alone, "both" the two in sequence. Peers get padded or packed inputs
ready made, in the layout of a model's projections. An implementation that breaks the CUDA context is noted; a new process does the rest.
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Iterator

import torch

from bench.machine import clocks, environment
from bench.measure import Clock, distance, evaluate, steps, worst
from bench.peers import PROBLEMS
from bench.problem import Impl
from bench.tables import case_of, label, print_tables, read
from kernels import configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---------------------------------------------------------------- cases, the most important first

def attention(tokens: int, S: int, ragged: bool = False, dropout: float = 0.0, D: int = 64, kernel: str = "attention") -> dict:
    return {"kernel": kernel, "tokens": tokens, "S": S, "H": 768 // D, "D": D, "ragged": ragged, "dropout": dropout}


def kd(R: int, C: int, k: int = 0) -> dict:
    return {"kernel": "kd_loss", "R": R, "C": C, "k": k}


def linear(kernel: str, N: int, V: int = 50265, d: int = 768) -> dict:
    return {"kernel": kernel, "N": N, "V": V, "d": d}


def norm(kernel: str, N: int, dropout: float, d: int = 768) -> dict:
    return {"kernel": kernel, "dropout": dropout, "N": N, "d": d}


GPU_CASES = [
    *(attention(n, 512, ragged, p) for p in (0.0, 0.1) for ragged in (False, True) for n in (16384, 32768)),
    linear("linear_kd", 4096), linear("linear_kd", 16384), kd(4096, 50265), kd(64, 20), kd(4096, 1000), kd(16384, 50304), kd(16, 3),
    attention(16384, 512, kernel="attention_kd"), attention(16384, 512, True, kernel="attention_kd"),
    linear("linear_cross_entropy", 2458), kd(4096, 50265, 64),
    {"kernel": "hidden_mse", "B": 64, "L": 13, "d": 768},
    norm("add_norm", 16384, 0.1), norm("add_norm", 16384, 0.0), norm("dropout", 16384, 0.1),
    attention(16384, 512, D=128), linear("linear_kd", 2458), linear("linear_cross_entropy", 16384), linear("linear_cross_entropy", 4096),
    *(attention(n, S, ragged, p) for p in (0.0, 0.1) for n in (16384, 32768) for S in (1024, 256, 128, 4096) for ragged in (False, True)),
    attention(16384, 2048, D=128),
]
CPU_CASES = [
    *(attention(256, 64, ragged, p) | {"H": 2} for p in (0.0, 0.1) for ragged in (False, True)),
    linear("linear_kd", 96, 211, 32), linear("linear_cross_entropy", 96, 211, 32), kd(64, 1001), kd(16, 3), kd(64, 1001, 8),
    attention(256, 64, kernel="attention_kd") | {"H": 2}, {"kernel": "hidden_mse", "B": 8, "L": 3, "d": 48},
    norm("add_norm", 96, 0.1, 48), norm("add_norm", 96, 0.0, 48), norm("dropout", 96, 0.1, 48),
]
GROUPS = {"attention": ("attention",), "attention_kd": ("attention_kd",), "kd": ("kd_loss", "hidden_mse"),
          "linear": ("linear_kd", "linear_cross_entropy"), "norm": ("add_norm", "dropout")}
SLOW_ON_CPU = ("compile", "flex", "liger", "graph", "flash varlen")     # minutes of compilation, or nothing but an error


def cases(cuda: bool, which: list[str], quick: bool) -> list[dict]:
    """The cases of some groups in order; on a GPU, `quick` takes two of each kernel."""
    kernels = [kernel for group in which for kernel in GROUPS[group]]
    chosen = [case for case in (GPU_CASES if cuda else CPU_CASES) if case["kernel"] in kernels]
    if cuda and quick:
        chosen = [case for i, case in enumerate(chosen) if sum(c["kernel"] == case["kernel"] for c in chosen[:i]) < 2]
    return chosen


def small(case: dict) -> dict:
    """What is checked against float64 in its place."""
    if "tokens" in case:
        return case | ({"tokens": 1024, "S": 256, "H": 2} if case["tokens"] > 1024 else {})
    return case | {k: min(case[k], most) for k, most in (("R", 64), ("N", 256)) if k in case}


# ---------------------------------------------------------------- measuring

class Broken(Exception):
    """The CUDA context is gone, and with it everything this process could still measure."""


class Run:
    """Where a run takes place, what it has measured so far, and until when it may start more."""
    def __init__(self, asked: argparse.Namespace):
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = DTYPES[asked.dtype or ("bf16" if self.cuda else "fp32")]
        self.clock, self.peers = Clock(self.cuda, asked.quick), asked.peers
        self.deadline = time.monotonic() + asked.budget
        self.rows = read(asked.json) if asked.resume and not asked.tune and Path(asked.json).exists() else []
        if asked.json:
            Path(asked.json).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(asked.json, "a") if asked.json and not asked.tune else None
        self.left: list[str] = []

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def wants(self, impl: str) -> bool:
        if self.peers is not None:
            return impl.startswith("ours") or any(word in impl for word in self.peers)
        return self.cuda or not any(word in impl for word in SLOW_ON_CPU)

    def find(self, case: dict, impl: str, which: str | None = None) -> dict | None:
        """The last row of that case and implementation, of that pass if given and of no check otherwise."""
        return next((r for r in reversed(self.rows) if r.get("impl") == impl and case_of(r) == case and
                     (r["pass"] == which if which else not r["pass"].startswith("check"))), None)

    def add(self, row: dict) -> None:
        if "ms" in row and row["kernel"] != "limits":
            ours = row if row["impl"] == "ours" else self.find(case_of(row), "ours", row["pass"]) or {}
            row["ratio"] = row["ms"] / ours["ms"] if "ms" in ours else None
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def failed(self, row: dict, error: Exception) -> None:
        """Note it; raise `Broken` where nothing can follow."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.add(row | {"failed": text[:300]})
        if self.cuda:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                raise Broken(text[:300]) from None


def bench(run: Run, case: dict) -> None:
    """All implementations of one case."""
    problem = PROBLEMS[case["kernel"]](case, run.device, run.dtype)
    for name, build in problem.impls.items():
        if not run.wants(name) or run.find(case, name):
            continue
        if run.late() and name != "ours":
            run.left.append(f"{label(case)}: {name}")
            continue
        row, which = case | {"impl": name}, "build"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")     # of the backends that sdpa_kernel was told not to take
                impl = build()
                with impl.context():
                    for which, step in steps(impl):
                        timed = run.clock(step, problem.launch_bound)
                        if which in problem.work:
                            timed[problem.unit] = problem.work[which] / timed["ms"] / {"tflops": 1e9, "gbps": 1e6}[problem.unit]
                        run.add(row | {"pass": which} | timed | known_error(run, case, name, which))
                        del step
        except Exception as error:      # whatever it is, it is this row's result
            run.failed(row | {"pass": which}, error)
        impl = None


def check(run: Run, case: dict) -> None:
    """Errors against float64, on a small case, of every implementation."""
    case, truths = small(case), {}
    given, exact = (PROBLEMS[case["kernel"]](case, run.device, run.dtype, exact) for exact in (False, True))
    for name, build in given.impls.items():
        again = name == "compile" and any(r.get("impl") == name and r["kernel"] == case["kernel"] and "error" in r for r in run.rows)
        if again or not run.wants(name) or any(run.find(case, name, which) for which in ("check forward", "check backward")) or run.late():
            continue        # compiled: once a kernel, it takes long and computes the same
        try:
            if name.endswith(("graph", "bound")) or (case.get("dropout") and not name.startswith(("ours", "reference"))):
                continue    # others drop other weights
            impl = build()
            if impl.truth not in truths:
                truths[impl.truth] = evaluate(exact.truths[impl.truth]())
            errors = [distance(*pair) for pair in zip(evaluate(impl), truths[impl.truth], strict=True)]
            for which, (most, norm) in (("check forward", errors[0]), ("check backward", map(worst, zip(*errors[1:])))):
                run.add(case | {"impl": name, "pass": which, "error": most, "error_l2": norm})
        except Exception as error:
            run.failed(case | {"impl": name, "pass": "check backward"}, error)


def known_error(run: Run, case: dict, impl: str, which: str) -> dict:
    found = [run.find(small(case), impl, "check " + part) for part in ("forward", "backward") if which in (part, "both")]
    found = [row for row in found if row and "error" in row]
    return {key: worst(row[key] for row in found) for key in ("error", "error_l2") if found}


# ---------------------------------------------------------------- the machine

def limits(run: Run) -> None:
    """What this machine reaches in a large matrix product and in a large copy, on random numbers."""
    n, size = (8192, 2**30) if run.cuda else (256, 2**22)
    a, b = (torch.randn(n, n, device=run.device).to(run.dtype) for _ in range(2))
    row = {"kernel": "limits", "pass": "both"}
    timed = run.clock(lambda: a @ b)
    run.add(row | {"impl": f"matmul {n}"} | timed | {"tflops": 2 * n**3 / timed["ms"] / 1e9} | clocks())
    x = torch.randint(2**31, (size // 4,), dtype=torch.int32, device=run.device)
    y = torch.empty_like(x)
    timed = run.clock(lambda: y.copy_(x))
    run.add(row | {"impl": "copy"} | timed | {"gbps": 2 * size / timed["ms"] / 1e6})


# ---------------------------------------------------------------- tuning

def searches(cuda: bool) -> Iterator[tuple[str, int, dict, str, str]]:
    """(kernel of configs.TABLE, size of its row, and the case, implementation and pass that show it)."""
    for D, S in ((64, 512), (128, 512), (64, 64), (32, 512)):
        for kernel, impl, which in (("attention_forward", "ours", "forward"), ("attention_backward_keys", "ours", "backward"),
                                    ("attention_backward_queries", "ours deterministic", "backward"),
                                    ("attention_kd_forward", "ours", "forward"), ("attention_kd_backward", "ours", "backward")):
            case = attention(16384, S, D=D, kernel="attention_kd" if "kd" in kernel else "attention")
            yield kernel, D if S > 64 else -D, case if cuda else case | {"tokens": 2 * S, "H": 1}, impl, which
        if D == 64:
            case = kd(4096, 50265) if cuda else kd(8, 5000)
            yield "kd_loss_forward", 4096, case, "ours", "forward"
            yield "kd_loss_backward", 4096, case, "ours", "backward"
            yield "linear_loss", 4096, linear("linear_kd", 4096) if cuda else linear("linear_kd", 8, 5000, 16), "ours", "both"


CANDIDATES = {      # by the number of numbers in a row: two tile sizes, warps, stages; columns, warps
    4: list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))), 2: list(itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)))}


def fastest(run: Run, impl: Impl, which: str, table: dict, key: tuple, name: str) -> tuple[int, ...] | None:
    """The best candidate for one row of the table, which is put back. One that fails, or computes something else, is none."""
    shipped, best, truth = table[key], None, None
    try:
        for row in dict.fromkeys([shipped, *CANDIDATES[len(shipped)]]):
            if run.late():
                break
            table[key] = row
            try:
                found = evaluate(impl)
                truth = truth or found
                off = worst(distance(*pair)[1] for pair in zip(found, truth))
                if not off < 0.01:
                    raise ValueError(f"differs by {off:.1e}")
                with impl.context():
                    ms = run.clock(next(steps(impl._replace(passes=(which,))))[1])["ms"]
                print(f"{name} {row}: {ms:.4f} ms", flush=True)
                best = min(best or (ms, row), (ms, row))
            except Exception as error:
                print(f"{name} {row}: {' '.join(str(error).split())[:110]}", flush=True)
                if row == shipped:      # with nothing to compare with, nothing is safe
                    return None
    finally:
        table[key] = shipped
    return best and best[1]


def tune(run: Run, path: str, groups: list[str], resume: bool = False) -> None:
    """Write {kernel: {"ARCH SIZE BITS": row}} after every search, so that a stop leaves what was found."""
    os.environ.pop("RT_CONFIGS", None)      # it would overrule the candidates
    out = json.loads(Path(path).read_text()) if resume and Path(path).exists() else {}
    for kernel, size, case, name, which in searches(run.cuda):
        bits = 32 if kernel == "linear_loss" else 8 * run.dtype.itemsize      # its logits are fp32 always
        key = (configs.architecture(run.device), size, bits)
        table = configs.TABLE.get(kernel, {})
        place = " ".join(map(str, key))
        wanted = any(case["kernel"] in GROUPS[group] for group in groups) and place not in out.get(kernel, {})
        if not wanted or key not in table or run.late():
            continue
        impl = PROBLEMS[case["kernel"]](case, run.device, run.dtype).impls[name]()
        best = fastest(run, impl, which, table, key, f"{kernel} {key}")
        if best:
            print(f"{kernel} {key}: {best}, shipped is {table[key]}", flush=True)
            out.setdefault(kernel, {})[place] = best
            Path(path).write_text(json.dumps(out, indent=1) + "\n")


# ---------------------------------------------------------------- main

def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="append a row for every measurement; with --tune, where the configurations go")
    parser.add_argument("--which", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--peers", nargs="*", metavar="WORD", help="only peers whose name has one of these words")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="after these nothing new is started (540)")
    parser.add_argument("--quick", action="store_true", help="few samples; on a GPU only two cases of each kernel")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json, and measure what is not there")
    parser.add_argument("--table", metavar="FILE", help="measure nothing, print the tables of a file")
    parser.add_argument("--tune", action="store_true", help="search better rows of kernels/configs.py")
    asked = parser.parse_args(argv)
    if (asked.resume or asked.tune) and not asked.json:
        parser.error("--resume and --tune need --json FILE")
    return asked


def measure(run: Run, todo: list[dict], argv: list[str]) -> int:
    """All cases for which there is time, then the tables; the exit code."""
    run.add(environment(run.cuda, argv, ("triton", "liger-kernel"), dtype=str(run.dtype)))
    try:
        limits(run)
        for i, case in enumerate(todo):
            if run.late():
                run.left += map(label, todo[i:])
                break
            start = time.monotonic()
            try:
                check(run, case)
                bench(run, case)
            except Broken:
                raise
            except Exception as error:      # its inputs, say, do not fit
                run.failed(case | {"impl": "inputs", "pass": "build"}, error)
            print(f"{label(case)}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    except Broken as error:
        left = run.deadline - time.monotonic()
        print(f"the CUDA context broke: {error}", file=sys.stderr, flush=True)
        if run.file and left > 20:
            return subprocess.call([sys.executable, "-m", "bench.kernels", *argv, "--resume", "--budget", str(left)])
    if run.cuda:
        run.add({"kernel": "environment after"} | clocks())
    print_tables(run.rows)
    if run.left:
        print("no time was left for " + "; ".join(run.left))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    asked = parse(argv)
    if asked.table:
        print_tables(read(asked.table))
        return 0
    run = Run(asked)
    if asked.tune:
        tune(run, asked.json, asked.which, asked.resume)
        return 0
    return measure(run, cases(run.cuda, asked.which, asked.quick), argv)


if __name__ == "__main__":
    sys.exit(main())
