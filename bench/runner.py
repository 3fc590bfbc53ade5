"""A benchmark run: cases one after another, a row per measurement, in a file that a later run can continue.

A case is a dict of what is computed. Its rows begin with the case, then comes `impl`, the implementation. `failed` says why one could not
run. If an implementation breaks the CUDA context, this is recorded and a new process does the rest.
"""
import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Callable, TypeVar

import torch

from bench.machine import clocks, commit, device_name, environment, version
from bench.measure import sample
from bench.tables import label, read, tables
from rt.errors import InputError
from rt.formats.files import cut_half_row
from rt.limits import Positive
from rt.runs.config import parse
from rt.speed.device import pick_device

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
C = TypeVar("C")        # the flags of a benchmark


class Broken(BaseException):
    """The CUDA context is gone, so this process can measure nothing more. Not an Exception, so no failing case catches it."""


@dataclass(frozen=True)
class RunFlags:
    """The flags of every benchmark."""
    json: str | None = None  # append a row for every measurement
    resume: bool = False  # keep the rows of --json, and measure what is not there
    budget: Positive = 480.0  # seconds; nothing is begun that would not end before
    quick: bool = False  # few and small cases, few samples: to see that it runs
    device: str = "auto"  # auto, cpu or cuda
    table: str | None = None  # measure nothing, print the tables of this file


def options(cls: type[C], argv: list[str]) -> C | None:
    """The flags of a benchmark, with RunFlags in `run`; None if --table has printed the tables."""
    c = parse(cls, argv)
    if c.run.resume and not c.run.json:
        raise InputError("--resume needs the rows of --json FILE")
    if not c.run.table:
        return c
    if not Path(c.run.table).is_file():
        raise InputError(f"{c.run.table}: there is no such file; --table prints what --json FILE wrote")
    print(tables(read(c.run.table)))
    return None


class Run:
    """The state of a run: its device, the rows so far, and the deadline for beginning more."""

    def __init__(self, c: RunFlags, script: str, argv: list[str], dtypes: tuple[torch.dtype, ...]):
        device = pick_device(c.device)
        self.script, self.argv, self.quick, self.device, self.dtypes = script, argv, c.quick, device, dtypes
        self.cuda = device.type == "cuda"
        self.deadline, self.longest = time.monotonic() + c.budget, 0.0
        self.rows: list[dict] = read(c.json) if c.resume and Path(c.json).exists() else []
        self.rates: dict[torch.dtype, float] = {}
        self.left: list[str] = []
        if c.json:
            Path(c.json).parent.mkdir(parents=True, exist_ok=True)
            cut_half_row(Path(c.json))
        self.file = open(c.json, "a", encoding="utf-8") if c.json else None
        self.facts = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "transformers": version("transformers"), "commit": commit()}

    def late(self, seconds: float = 0.0) -> bool:
        """Whether the time would be over after this many seconds."""
        return time.monotonic() + seconds > self.deadline

    def of(self, fields: dict) -> list[dict]:
        """The rows with these fields."""
        return [row for row in self.rows if fields.items() <= row.items()]

    def add(self, row: dict) -> None:
        """Append a row; rows of cases also get the facts of the run."""
        self.rows.append(row if "kernel" in row and "pass" not in row else row | self.facts)
        if self.file:
            self.file.write(json.dumps(self.rows[-1]) + "\n")
            self.file.flush()

    def failed(self, row: dict, error: Exception) -> None:
        """Append a row that says why nothing was measured. Raises Broken if nothing can follow."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.add(row | {"failed": text})
        if self.cuda:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                raise Broken(text) from None

    def limits(self) -> dict[torch.dtype, float]:
        """FLOP/s of matrix products in each dtype: the fastest sample of several sizes, so neither an unlucky size nor other work on the
        machine makes an implementation look better than it is. Another row gives the speed of a large copy."""
        sizes = (128, 256) if self.quick else (4096, 8192) if self.cuda else (512, 1024, 2048)
        rates: dict[torch.dtype, float] = {}
        before = torch.get_float32_matmul_precision()
        if self.cuda:
            torch.set_float32_matmul_precision("high")      # fp32 is TF32 then, as in whole steps of the peers
        for dtype in self.dtypes:
            for n in sizes:
                a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
                found = self.limit(f"matmul {n} {DTYPES[dtype]}", lambda: a @ b, "tflops", 2 * n**3 / 1e9)
                rates[dtype] = max(rates.get(dtype, 0.0), found * 1e12)
        torch.set_float32_matmul_precision(before)
        x = torch.randint(2**31, (2**28 if self.cuda else 2**20,), dtype=torch.int32, device=self.device)
        y = torch.empty_like(x)
        self.limit("copy", lambda: y.copy_(x), "gbps", 2 * x.nbytes / 1e6)
        return rates

    def limit(self, name: str, step: Callable, unit: str, work: float) -> float:
        """Time `step`, add a row, return `work` per millisecond of the fastest sample."""
        calls = 5 if self.cuda else 1
        sample(step, self.cuda, 3)
        times = [sample(step, self.cuda, calls) for _ in range(20)]
        self.add({"kernel": "limits", "impl": name, "ms": median(times), "fastest": min(times), unit: work / min(times)} | clocks())
        return work / min(times)

    def measure_all(self, todo: list[dict], measure: Callable[[dict], None]) -> None:
        """Call `measure` with every case that there is time for, then print the tables."""
        self.add(environment(self.cuda, self.argv, ("transformers", "peft", "triton", "liger-kernel"), script=self.script))
        try:
            self.rates = self.limits()
            for case in todo:
                if self.late(self.longest):
                    self.left.append(label(case))
                    continue
                start = time.monotonic()
                try:
                    measure(case)
                except Exception as error:      # its inputs do not fit, or the losses differ
                    self.failed(case | {"impl": "case", "pass": "build"}, error)
                self.release()
                self.longest = max(self.longest, time.monotonic() - start)
                print(f"{label(case)}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        except Broken as error:
            print(f"the CUDA context broke: {error}", file=sys.stderr, flush=True)
            if self.file and not self.late(20):     # a new process measures the rest
                self.file.close()
                budget = str(self.deadline - time.monotonic())
                sys.exit(subprocess.call([sys.executable, "-m", self.script, *self.argv, "--resume", "--budget", budget]))
        if self.cuda:
            self.add({"kernel": "environment after"} | clocks())
        print(tables(self.rows))
        if self.left:
            print("no time was left for " + "; ".join(self.left) + ": --resume goes on", file=sys.stderr)

    def release(self) -> None:
        """Free the memory of the last case."""
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()       # another case must not count as a recompilation of the last one
        if self.cuda:
            torch.cuda.empty_cache()
