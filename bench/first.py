"""The first minutes on a GPU, in one call: are the kernels right, how fast are they next to their peers, which tiles are best.

    PYTHONPATH=. python -m bench.first --out DIR                           needs torch, triton, numpy, safetensors, tqdm (hf: transformers)
    PYTHONPATH=. python -m bench.first --out DIR --have OLD/first.jsonl    continues that call: what has a row in OLD is not repeated

The first call's units take about 80 seconds on an H100. In the time that is left, by a second call if need be, come whole steps
(bench.train), all cases of the kernels (bench.kernels), steps of deltas (bench.recycle), a sweep of deltas (bench.cell) on the demo's
bases and, with --data, the claims. Their rows go to DIR too, what they print to DIR/NAME.log, bases and deltas to --home.

What matters most comes first. A row goes to DIR/first.jsonl as soon as it is known, so the call may be cut off at any moment. A short
table comes last. A kernel that breaks the CUDA context, hangs, or ends the process costs only its own row: a new process, or the same
command again, does the rest. What failed or was wrong in OLD is tried again. Without a GPU, small shapes go through Triton's interpreter
(TRITON_INTERPRET=1), to see that the script runs.
"""
import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator
from unittest.mock import patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # before the first product: it is then the same at every call

import torch
from torch import Tensor

from bench import cases
from bench.follow import follow
from bench.machine import environment
from bench.measure import distance, evaluate, passes, peak, sample, spread, timed, worst
from bench.peers import PROBLEMS
from bench.problem import reference
from bench.steps import Step
from bench.tables import label
from kernels import configs, linear_loss
from rt.formats.files import cut_half_row, read_rows

TILES = {"attention_forward": ((128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
                               (128, 64, 4, 3)),
         "attention_backward_keys": ((64, 128, 8, 3), (64, 64, 4, 3), (64, 128, 8, 4), (128, 64, 4, 2), (128, 128, 8, 2)),
         "attention_backward_queries": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 4), (128, 64, 4, 3))}
UNIT_SECONDS = 150      # a unit that takes longer hangs
Units = Iterator[tuple[str, Callable[[], dict]]]


class First:
    """All units of work, by name; each returns the fields of a row."""

    def __init__(self, device: torch.device):
        self.device, self.cuda, self.dtype = device, device.type == "cuda", torch.bfloat16
        self.arch = configs.architecture(device)
        self.B, self.S = (32, 512) if self.cuda else (1, 16)       # of a whole step

    def few(self, *items: Any) -> tuple:
        """All items on a GPU, two in a rehearsal."""
        return items if self.cuda else items[:2]

    def attention(self, S: int, **more: Any) -> dict:
        return cases.attention(16384, S, **more) if self.cuda else cases.attention(32, 16, **more, D=32) | {"H": 1}

    def units(self) -> Units:
        yield from self.checks()
        for S in self.few(512, 128, 2048):
            yield from self.against_peers(S)
        yield "parts attention", partial(self.parts, self.attention_step)
        for name in self.few("ours", "hf", "hf predicted rows", "ours graphs"):
            yield f"step: {name}", partial(self.step, name)
        yield "parts step", partial(self.parts, partial(self.masked_lm_step, "ours"))
        yield from self.tiles()
        yield from self.losses()
        yield from self.norms()

    # ---------------------------------------------------------------- correctness

    def checks(self) -> Units:
        yield "check every kernel", self.every
        small = [cases.attention(1024, 256, ragged=True, dropout=p, D=D) | {"H": 2} for D in (64, 128, 32) for p in (0.0, 0.1)]
        small += [cases.attention(512, 64, ragged=True, dropout=0.1) | {"H": 2}, cases.kd(64, 50265), cases.kd(64, 1000), cases.kd(64, 20),
                  *(cases.attention(8 * S, S, ragged=True, kernel="attention_kd") | {"H": 2} for S in (64, 256)),
                  cases.linear("linear_kd", 256, 5003), cases.linear("linear_cross_entropy", 256, 5003),
                  {"kernel": "hidden_mse", "B": 8, "L": 3, "d": 768}, cases.norm("add_norm", 256, 0.1), cases.norm("dropout", 256, 0.1)]
        for case in small if self.cuda else [cases.attention(32, 16, True, 0.1, D=32) | {"H": 1}, cases.kd(4, 33)]:
            yield f"check {label(case)}: ours", partial(self.check, case)

    def every(self) -> dict:
        """All kernels of tests/every_kernel.py against their references, and against themselves, bit for bit."""
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        inputs, step = (getattr(importlib.import_module("every_kernel"), name) for name in ("inputs", "step"))
        i = inputs(self.device.type, self.dtype)
        ours, again = step(i), step(i) if self.cuda else None
        with reference():
            off = worst((a - b).norm().item() / b.norm().item() for a, b in zip(ours, step(i)))
        same = not self.cuda or all(map(torch.equal, ours, again))
        return {"error_l2": off, "same": same, "right": off <= 5 * torch.finfo(self.dtype).eps and same}

    def check(self, case: dict) -> dict:
        """The largest errors of ours and of the reference (same precision), over output and gradients. Right if ours is at most four times
        as large, and the reference is near the truth, so that the truth is one."""
        given, exact = (PROBLEMS[case["kernel"]](case, self.device, self.dtype, exact) for exact in (False, True))
        truth, found = evaluate(exact.truths["default"]()), {}
        for which in ("ours", "reference"):
            errors = zip(evaluate(given.impls[which]()), truth, strict=True)
            found[which] = [distance(*pair)[0] for pair in errors]
        right = all(a <= 4 * b + 1e-5 and b < 0.1 for a, b in zip(found["ours"], found["reference"]))
        return {"error": worst(found["ours"]), "reference": worst(found["reference"]), "right": right}

    # ---------------------------------------------------------------- speed

    def times(self, case: dict, name: str = "ours", which: tuple[str, ...] = ("forward", "backward")) -> dict:
        """Milliseconds and rate of each pass."""
        problem, found = PROBLEMS[case["kernel"]](case, self.device, self.dtype), {}
        impl = problem.impls[name]()
        with warnings.catch_warnings(), impl.context():
            warnings.simplefilter("ignore")     # about the backends that sdpa_kernel was told not to use
            for each, step in passes(impl._replace(passes=tuple(w for w in which if w in impl.passes) or impl.passes)):
                row = timed(step, self.cuda, True, problem.launch_bound)
                rate = problem.work[each] / row["ms"] / {"tflops": 1e9, "gbps": 1e6}[problem.unit]
                found |= {each: row["ms"], f"{each}_{problem.unit}": rate, f"{each}_mb": row["peak_mb"]}
        return found

    def against_peers(self, S: int) -> Units:
        for p in self.few(0.0, 0.1):
            case = self.attention(S, dropout=p)
            names = ("ours", "sdpa cudnn", "sdpa flash", "sdpa efficient") if self.cuda else ("ours", "sdpa math")
            for name in names:
                yield f"time {label(case)}: {name}", partial(self.times, case, name)

    def parts(self, build: Callable[[], Callable]) -> dict:
        """Microseconds of each kernel in one call of the step that `build` makes, by the profiler."""
        step = build()
        step()
        with torch.profiler.profile() as profile:
            step()
        events = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        return {e.key[:60]: e.self_device_time_total for e in sorted(events, key=lambda e: -e.self_device_time_total)}

    def attention_step(self) -> Callable:
        impl = PROBLEMS["attention"](self.attention(512), self.device, self.dtype).impls["ours"]()
        return next(passes(impl._replace(passes=("both",))))[1]

    def tiles(self) -> Units:
        for kernel, rows in TILES.items():
            for p in self.few(0.0, 0.1):
                case = self.attention(512, dropout=p)
                place = kernel + "_dropout" * (p > 0 and kernel + "_dropout" in configs.TABLE)
                key = self.arch, case["D"] if case["S"] > 64 else -case["D"], 16
                for row in dict.fromkeys([configs.TABLE[place][key], *rows] if self.cuda else [configs.TABLE[place][key]]):
                    yield (f"tile {kernel} dropout {p}: {row}", partial(self.with_row, place, key, row, case, (
                        "forward" if "forward" in kernel else "backward",)))

    def with_row(self, table: str, key: tuple, row: tuple, case: dict, which: tuple[str, ...]) -> dict:
        """Times with another row of a tile table, and the largest error against the table's own row."""
        shipped = evaluate(PROBLEMS[case["kernel"]](case, self.device, self.dtype).impls["ours"]())
        with patch.dict(configs.TABLE[table], {key: row}):
            found = evaluate(PROBLEMS[case["kernel"]](case, self.device, self.dtype).impls["ours"]())
            off = worst(distance(*pair)[0] for pair in zip(found, shipped, strict=True))
            del found, shipped
            wrong = {} if off < 0.02 else {"failed": f"differs from the shipped tile by {off:.3f}"}
            return self.times(case, which=which) | {"off": off} | wrong

    def losses(self) -> Units:
        kd = cases.linear("linear_kd", 4096) if self.cuda else cases.linear("linear_kd", 4, 200, 16)
        for name in ("ours", "eager", "gemm bound"):
            yield f"time {label(kd)}: {name}", partial(self.times, kd, name, ("both",))
        row_class = 4096 if self.cuda else 256
        for row in self.few(configs.TABLE["linear_loss"][self.arch, row_class, 32], (2048, 8, 2), (4096, 8, 4), (2048, 8, 1)):
            for bits in self.few(28, 29, 30):
                yield f"tile linear_loss chunk 2^{bits}: {row}", partial(
                    self.with_constant, linear_loss, "CHUNK_BYTES", 2**bits, "linear_loss", (self.arch, row_class, 32), row, kd, ("both",))
        logits = cases.kd(4096, 50265) if self.cuda else cases.kd(4, 33)
        for case in (logits, logits | {"C": 50304}) if self.cuda else (logits,):
            for name in ("ours", "eager"):
                yield f"time {label(case)}: {name}", partial(self.times, case, name)

    def with_constant(self, module: Any, name: str, value: int, *table_row: Any) -> dict:
        """`with_row`, also with another value of a constant of the kernel's module."""
        with patch.object(module, name, value):
            return self.with_row(*table_row)

    def norms(self) -> Units:
        case = cases.norm("add_norm", 16384, 0.1) if self.cuda else cases.norm("add_norm", 8, 0.1, 32)
        key = self.arch, 1024 if self.cuda else 32, 16
        for name in ("ours", "eager"):
            yield f"time {label(case)}: {name}", partial(self.times, case, name)
        module = sys.modules["kernels.add_norm"]
        for row in self.few(*dict.fromkeys([configs.TABLE["add_norm_backward"][key], (1, 256, 1), (2, 256, 2), (4, 256, 4), (4, 256, 8)])):
            for programs in self.few(module.PROGRAMS, 66, 264, 396):
                yield f"tile add_norm_backward programs {programs}: {row}", partial(
                    self.with_constant, module, "PROGRAMS", programs, "add_norm_backward", key, row, case, ("backward",))

    def step(self, name: str) -> dict:
        """Milliseconds of `masked_lm_step`."""
        step, turns = self.masked_lm_step(name), 5 if self.cuda else 1
        for _ in range(turns):
            step()
        ms = spread([sample(step, self.cuda, turns) for _ in range(turns)])[0]
        return {"step": ms, "tokens_per_s": self.B * self.S / ms * 1e3, "peak_mb": peak(step, 0) if self.cuda else None}

    def masked_lm_step(self, name: str) -> Step:
        """A masked-LM step of the base preset, 32 sequences of 512 tokens with 15 % predicted: ours, also with forward and backward as a
        CUDA graph; Hugging Face's as shipped, and with scores of predicted rows only."""
        from rt.model import PRESETS, Batch, EncoderConfig, new_masked_lm
        from rt.pretrain import mlm_loss
        config = EncoderConfig(50265, **PRESETS["base"]) if self.cuda else EncoderConfig(90, **PRESETS["tiny"])
        B, S = self.B, self.S
        ids = torch.randint(5, config.vocab_size, (B * S,), generator=torch.Generator().manual_seed(0))
        rows = torch.arange(0, B * S, 7)
        batch = Batch(ids, torch.arange(B + 1, dtype=torch.int32) * S, S, labels=ids[rows], predict=rows).to(self.device)
        if name.startswith("ours"):
            model = new_masked_lm(config, 0).to(self.device).train()
            loss: Callable[[], Tensor] = partial(mlm_loss, model, batch)
        else:
            from bench.roberta import masked_lm_losses, peer
            model = peer("RobertaForMaskedLM", config).to(self.device).train()
            loss = masked_lm_losses(model, batch, config.pad_id)[name.removeprefix("hf")]
        return Step(model, loss, self.dtype, graph="graphs" in name)


# ---------------------------------------------------------------- the call

def known(path: Path) -> list[dict]:
    """The rows of an earlier call. The file `begun` lists units as they began. A unit that began once and has no row was cut
    off; one that began twice ends the process."""
    rows, begun = read_rows(path), path.with_name("begun")
    done = {row.get("unit") for row in rows}
    names = begun.read_text().splitlines() if begun.exists() else []
    return rows + [{"unit": name, "failed": "it ended the process twice", "hopeless": True}
                   for name in dict.fromkeys(names) if names.count(name) > 1 and name not in done]


def run(first: First, path: Path, rows: list[dict], end: float, argv: list[str]) -> None:
    """Do the units that have no row yet, until the time is over; append to the rows and to the file."""
    begun = path.with_name("begun")

    def again() -> None:
        """A new process does the rest."""
        os.execv(sys.executable, [sys.executable, "-m", "bench.first", *argv, "--until", str(end)])

    cut_half_row(path)
    with path.open("a", encoding="utf-8") as file:
        def add(row: dict) -> None:
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)

        done = {row.get("unit") for row in rows}
        add(environment(first.cuda, argv, ("triton", "numpy", "transformers")))
        for name, unit in first.units():
            if name in done:
                continue
            done.add(name)
            if time.time() > end:
                return
            with begun.open("a") as names:
                names.write(name + "\n")

            def hung(name: str = name) -> None:     # in a thread, which is the only one that does not hang
                add({"unit": name, "failed": f"longer than {UNIT_SECONDS} s", "hopeless": True})
                again()

            watch = threading.Timer(UNIT_SECONDS, hung)
            watch.daemon = True
            watch.start()
            start = time.perf_counter()
            try:
                row = unit()
            except Exception as error:      # whatever it is, it is this row's result
                row = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            watch.cancel()
            add({"unit": name} | row | {"seconds": round(time.perf_counter() - start, 2)})
            if first.cuda:
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:        # the context is gone: this process can measure nothing more
                    file.close()
                    again()


def shown(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("unit", "seconds")}


def table(rows: list[dict]) -> str:
    """Wrong results, failures, how many times faster ours is than the best peer, and the best tile of each sweep."""
    checks, out = [r for r in rows if "right" in r], []
    out += [f"{sum(r['right'] for r in checks)} of {len(checks)} checks are right"]
    out += [f"WRONG {r['unit']}: {shown(r)}" for r in checks if not r["right"]]
    groups: dict[str, list[tuple[str, dict]]] = {}
    for r in rows:
        kind, _, which = r.get("unit", "").rpartition(": " if ": " in r.get("unit", "") else " ")
        if kind.startswith(("time", "tile", "step")) and "failed" not in r:
            groups.setdefault(kind, []).append((which, r))
    for kind, members in groups.items():
        for each in ("forward", "backward", "both", "step"):
            ms = {which: r[each] for which, r in members if each in r}
            ours = {k: v for k, v in ms.items() if k.startswith("ours")} or dict(list(ms.items())[:1])     # tiles: the first is shipped
            others = {k: v for k, v in ms.items() if k not in ours}
            if ours:
                own, best = next(iter(ours)), min(others, key=others.get, default=None)
                rates = {k.rpartition("_")[2]: v for k, v in members[0][1].items() if k in (f"{each}_tflops", f"{each}_gbps")}
                rate = "".join(f", {v:.0f} {unit}" for unit, v in rates.items())
                beside = f"; best other {best} {others[best]:.3f} ms = {others[best] / ours[own]:.2f}" if best else ""
                out.append(f"{kind} {each}: {own} {ours[own]:.3f} ms{rate}{beside}")
    out += [f"{r['unit']}: {dict(list(shown(r).items())[:8])}" for r in rows if r.get("unit", "")[:5] == "parts"]
    out += [f"{r['command']}: code {r['code']} after {r['seconds']:.0f} s" for r in rows if "command" in r]
    return "\n".join(out + [f"failed {r['unit']}: {r['failed']}" for r in rows if "failed" in r])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of first.jsonl")
    parser.add_argument("--have", type=Path, help="rows of an earlier call; those of --out are known anyway")
    parser.add_argument("--seconds", type=float, default=420, help="nothing is begun later")
    parser.add_argument("--home", type=Path, default=Path("runs/first"), help="folder of the bases and deltas that later commands need")
    parser.add_argument("--data", help="folder with corpora/ and tasks/, for the claims")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    end = asked.until or time.time() + asked.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["RT_KERNELS"] = "triton"
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "first.jsonl"
    old = [row for row in (known(asked.have) if asked.have else ())
           if "hopeless" in row or not ("failed" in row or row.get("right") is False)]
    first, rows = First(device), old + known(path)
    if first.cuda and not path.exists():    # the shipped programs, by all cores and into Triton's cache, while the first checks run
        subprocess.Popen([sys.executable, "-m", "bench.compile_check", "--arch", str(first.arch), "--dtype", "bf16"],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run(first, path, rows, end, argv)
    if first.cuda:
        follow(asked.out, asked.home, asked.data, asked.have, rows, end)
    print(table(rows))


if __name__ == "__main__":
    main()
