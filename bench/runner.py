"""A benchmark run: cases one after another, a row for every measurement, in a file that a later run can go on with.

A case is a dict that says what is computed; it is the beginning of its rows, up to `impl`, the implementation. What could not run says why
in `failed`. An implementation that breaks the CUDA context is noted, and a new process does the rest.
"""
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Callable, NoReturn, TypeVar

import torch

from bench.machine import commit, device_name, environment, version
from bench.measure import sample
from bench.tables import label, read, tables
from rt.errors import InputError
from rt.runs.config import parse, require_positive

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
C = TypeVar("C")        # the flags of a benchmark


class Broken(BaseException):
    """The CUDA context is gone, and with it everything this process could still measure. Not an Exception: no failing case catches it."""


def options(cls: type[C], doc: str, kinds: dict[str, Any], argv: list[str]) -> C | None:
    """The flags of a benchmark, or None if --table has printed what there was to print. `kinds`: the choices of --only. A `cls` has the
    flags json, only, budget, resume, quick and table."""
    cls.__doc__ = doc       # the beginning of --help
    c = parse(cls, argv)
    require_positive(c, "budget")
    wrong = next((kind for kind in c.only if kind not in kinds), None)
    if wrong:
        raise InputError(f"--only {wrong}: not one of {', '.join(kinds)}")
    if c.resume and not c.json:
        raise InputError("--resume needs the rows of --json FILE")
    if not c.table:
        return c
    if not Path(c.table).is_file():
        raise InputError(f"{c.table}: there is no such file; --table prints what --json FILE wrote")
    print(tables(read(c.table)))
    return None


class Run:
    """Where a run takes place, what it has measured so far, and until when it may begin more."""

    def __init__(self, c: Any, script: str, argv: list[str], device: torch.device, dtypes: tuple[torch.dtype, ...]):
        self.script, self.argv, self.quick, self.device, self.dtypes = script, argv, c.quick, device, dtypes
        self.cuda = device.type == "cuda"
        self.deadline, self.longest = time.monotonic() + c.budget, 0.0
        self.rows: list[dict] = read(c.json) if c.resume and Path(c.json).exists() else []
        self.rates: dict[torch.dtype, float] = {}
        self.left: list[str] = []
        if c.json:
            Path(c.json).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(c.json, "a", encoding="utf-8") if c.json else None
        self.facts = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "transformers": version("transformers"), "commit": commit()}

    def late(self, seconds: float = 0.0) -> bool:
        """Whether the time would be over after so many seconds."""
        return time.monotonic() + seconds > self.deadline

    def of(self, fields: dict) -> list[dict]:
        """The rows with these fields."""
        return [row for row in self.rows if fields.items() <= row.items()]

    def add(self, row: dict) -> None:
        """Append a row; the facts of the run are added to rows of cases."""
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
        """FLOP/s of matrix products in each dtype, the fastest sample of several sizes: neither an unlucky size nor other work on the
        machine may make an implementation look better than it is. A row also says how fast a large copy is."""
        sizes = (128, 256) if self.quick else (4096, 8192) if self.cuda else (512, 1024, 2048)
        rates: dict[torch.dtype, float] = {}
        for dtype in self.dtypes:
            for n in sizes:
                a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
                found = self.limit(f"matmul {n} {DTYPES[dtype]}", lambda: a @ b, "tflops", 2 * n**3 / 1e9)
                rates[dtype] = max(rates.get(dtype, 0.0), found * 1e12)
        x = torch.randint(2**31, (2**28 if self.cuda else 2**20,), dtype=torch.int32, device=self.device)
        y = torch.empty_like(x)
        self.limit("copy", lambda: y.copy_(x), "gbps", 2 * x.nbytes / 1e6)
        return rates

    def limit(self, name: str, step: Callable, unit: str, work: float) -> float:
        """Time `step`, add a row, return `work` a millisecond of the fastest sample."""
        calls = 5 if self.cuda else 1
        sample(step, self.cuda, 3)
        times = [sample(step, self.cuda, calls) for _ in range(20)]
        self.add({"kernel": "limits", "impl": name, "ms": median(times), "fastest": min(times), unit: work / min(times)})
        return work / min(times)

    def measure_all(self, todo: list[dict], measure: Callable[[dict], None]) -> None:
        """Call `measure` with every case for which there is time, then print the tables."""
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
            if self.file and not self.late(20):
                self.hand_over()
        print(tables(self.rows))
        if self.left:
            print("no time was left for " + "; ".join(self.left) + ": --resume goes on", file=sys.stderr)

    def release(self) -> None:
        """Free what a case has left."""
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()       # another case must not count as a recompilation of the last one
        if self.cuda:
            torch.cuda.empty_cache()

    def hand_over(self) -> NoReturn:
        """Let a new process measure the rest."""
        self.file.close()
        budget = str(self.deadline - time.monotonic())
        sys.exit(subprocess.call([sys.executable, "-m", self.script, *self.argv, "--resume", "--budget", budget]))
