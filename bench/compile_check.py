"""Compile every kernel with every row of the table of tiles, for the dtypes of the calls below, and inspect the code. It needs no GPU.

    python -m bench.compile_check                  sm_80, sm_90 and sm_100
    python -m bench.compile_check --arch 90 --kernel attention --json rows.json

A row: registers per thread, spilled bytes, shared memory per block, matrix instructions (HMMA; HGMMA on Hopper; UTCHMMA on Blackwell), and
instructions per element of a tile in the longest loop. The exit code is 1 if a program does not compile, spills, needs more shared memory
than the chip has, or has a matrix product without matrix instructions or (TF32 on sm_90) of 8 columns.

The public functions are called on small tensors, with the choices that change the code: sizes, dtypes, dropout, terms of a loss, gradients.
Their launches are recorded, not run.
Triton's own launcher says which program each launch needs (`jit_cache_hook`). Its `preload` compiles that program in another process.
"""
import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from kernels import add_norm, attention_kd, attention_qkv, configs, dropout, hidden_mse, kd_loss, states_mse
from kernels.common import recording, triton
from kernels.linear_loss import linear_cross_entropy, linear_kd
from rt.runs.log import table

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}    # bytes per block; 80 also stands for sm_86, 89 and 120
NARROW = re.compile(r"\bHGMMA\.64x8x8\b")      # TF32, 8 columns: wrong results and bad addresses on an H100 (triton-lang/triton#10629)
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = ("kernel", "types", "arch", "registers", "spilled", "shared", "matrix", "instructions_per_element", "config")


# ---------------------------------------------------------------- calls that reach every configuration

def zeros(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=grad)


def attention_calls(dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    for D, longest, p in itertools.product((32, 64, 128), (64, 512), (0.0, 0.1)):
        attention_qkv(zeros(4, 3, 16, D, dtype=dtype), cu_seqlens, longest, dropout_p=p).sum().backward()


def attention_kd_calls(dtype: torch.dtype) -> None:
    equal = [(D, D, longest, dtype) for D in (32, 64, 128) for longest in (64, 512)]
    other = [(64, 64, 512, torch.float32), (64, 128, 512, torch.bfloat16), (128, 32, 512, torch.bfloat16)]
    for D_s, D_t, longest, dtype_t in equal + other:
        q_s, k_s = zeros(2, 4, 16, D_s, dtype=dtype).unbind()
        q_t, k_t = zeros(2, 4, 16, D_t, dtype=dtype_t, grad=False).unbind()
        attention_kd(q_s, k_s, q_t, k_t, torch.tensor([0, 4], dtype=torch.int32), longest).sum().backward()


LABELS = torch.zeros(4, dtype=torch.int64)
# temperature, labels and alpha: both terms, both with one softmax, distillation alone, without and with labels that may be ignored
TERMS = [(5.0, LABELS, 0.5), (1.0, LABELS, 0.5), (5.0, None, 0.5), (5.0, LABELS, 1.0)]


def kd_loss_calls(dtype: torch.dtype) -> None:
    teachers = [dtype, torch.bfloat16 if dtype == torch.float32 else torch.float32]
    for C, dtype_t in itertools.product((20, 200, 1000, 5000, 5008), teachers):     # rows of 5,000 are not aligned
        student, teacher = zeros(4, C, dtype=dtype), zeros(4, C, dtype=dtype_t, grad=False)
        for T, labels, alpha in TERMS:
            kd_loss(student, teacher, labels, alpha=alpha, T=T).sum().backward()
        kd_loss(student, None, LABELS, alpha=0.0, T=1.0).sum().backward()
    for width, rows, dtype_t in itertools.product((32, 256, 768, 9216), (None, LABELS), teachers):
        hidden_mse(zeros(4, 1, width, dtype=dtype), zeros(4, 1, width, dtype=dtype_t, grad=False), rows).sum().backward()
    for L, dtype_t, first in itertools.product((5, 13), teachers, teachers):        # under autocast, an embedding's output is fp32
        students, taught = ([zeros(4, 16, dtype=kind if i else first) for i in range(L)] for kind in (dtype, dtype_t))
        states_mse(students, taught, zeros(L, grad=False)).backward()


def linear_loss_calls(dtype: torch.dtype) -> None:
    for V, with_bias, train in itertools.product((200, 1000, 5000), (False, True), (False, True)):
        x, w, bias = zeros(4, 16, dtype=dtype, grad=train), zeros(V, 16, grad=False), zeros(V, grad=False) if with_bias else None
        linear_cross_entropy(x, w, bias, LABELS)
        for T, labels, alpha in TERMS:
            linear_kd(x, w, bias, x, w, bias, labels, alpha=alpha, T=T)


def norm_calls(dtype: torch.dtype) -> None:
    for d in (32, 768):
        dropout(zeros(16, d, dtype=dtype), 0.1, LABELS).sum().backward()
    # the gradients that are needed: all; of a frozen base's norm (of x and h, of h alone); none: evaluation, a teacher
    gradients = ((1, 1, 1), (1, 1, 0), (0, 1, 0), (0, 0, 0))
    for d, p, wide, needs in itertools.product((32, 256, 768, 1024, 4096), (0.0, 0.1), (False, True), gradients):
        x, h, w, b = (zeros(*shape, dtype=kind, grad=bool(need)) for shape, kind, need in zip(
            ((16, d), (16, d), (d,), (d,)), (torch.float32 if wide else dtype, dtype, torch.float32, torch.float32), (*needs, needs[2])))
        y = add_norm(x, h, w, b, 1e-5, p, LABELS)
        if y.requires_grad:
            y.sum().backward()
    add_norm(*(zeros(*shape, dtype=dtype) for shape in ((16, 768), (16, 768), (768,), (768,))), 1e-5, 0.1, LABELS).sum().backward()


CALLS = {"attention": attention_calls, "attention_kd": attention_kd_calls, "kd_loss": kd_loss_calls, "linear_loss": linear_loss_calls,
         "norm": norm_calls}


# ---------------------------------------------------------------- programs

class Program(NamedTuple):
    """One program that a launch needs."""
    module: str
    kernel: str
    constants: dict[str, Any]
    types: tuple[str, ...]      # of the pointers
    data: str                   # Triton's description of the program, for `preload`


def aim_at(arch: int) -> None:
    """Make Triton compile for a chip that need not be present."""
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: arch,
                                                     get_current_stream=lambda device: 0))


def launches(arch: int, which: list[str], dtypes: list[str] = tuple(DTYPES)) -> list[Program]:
    """The programs that can be launched on `arch`, each once."""
    found: dict[tuple, Program] = {}

    def note(key: Any, fn: Any, compile: dict, **rest: Any) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[path[0]]: value for path, value in compile["constants"].items()}
        constants |= {option: compile[option] for option in ("num_warps", "num_stages")}
        flat = [t for types in compile["signature"].values() for t in (types if isinstance(types, tuple) else (types,))]
        types = dict.fromkeys(t for t in flat if t.startswith("*"))
        found[fn.name, str(key)] = Program(fn.module, fn.jit_function.__name__, constants, tuple(types), compile["specialization_data"])
        return True     # compile nothing now

    os.environ["RT_KERNELS"], configs._arch = "triton", arch
    with recording() as recorded:
        for name, dtype in itertools.product(which, dtypes):
            CALLS[name](DTYPES[dtype])
    aim_at(arch)
    triton.knobs.runtime.jit_cache_hook = note
    try:
        for kernel, args, meta in recorded:
            kernel.warmup(*(a.dtype if isinstance(a, Tensor) else a for a in args), grid=(1,), **meta)
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return list(found.values())


def one_in(n: int, programs: list[Program]) -> list[Program]:
    """The first program of each kernel, and every n-th after it."""
    by_kernel: dict[tuple, list[Program]] = {}
    for program in programs:
        by_kernel.setdefault((program.module, program.kernel), []).append(program)
    return [program for alike in by_kernel.values() for program in alike[::n]]


def compile_one(arch: int, program: Program) -> dict:
    """Compile one program for `arch` and read its machine code."""
    shown = " ".join(f"{k}={v}" for k, v in program.constants.items() if k.isupper() or k.startswith("num"))
    row = {"kernel": program.kernel, "arch": arch, "types": ",".join(program.types), "config": shown}
    aim_at(arch)
    try:
        done = getattr(import_module(program.module), program.kernel).preload(program.data)
    except Exception as error:      # whatever the compiler raises is this row's result
        return row | {"error": " ".join(str(error.__cause__ or error).split())[-200:]}
    tile = math.prod(v for k, v in program.constants.items() if k.startswith("BLOCK"))
    return row | machine_code(done.asm["cubin"], program.constants["num_warps"] * 32 / tile) | {
        "shared": done.metadata.shared, "has_dot": "tt.dot" in done.asm["ttir"]}


def machine_code(cubin: bytes, threads_per_element: float) -> dict:
    """Registers, spilled bytes, matrix instructions, and instructions per element in the longest loop (without a loop, in all code)."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("--dump-resource-usage", "--dump-sass"))
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]
    loops = [(int(back, 16), at) for at, what in code for back in re.findall(r"BRA[^`]*? 0x([0-9a-f]+)", what) if int(back, 16) < at]
    first, last = max(loops, key=lambda ends: ends[1] - ends[0], default=(0, code[-1][0]))
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"],
            "matrix": sum(bool(MATRIX.search(what)) for _, what in code), "narrow": any(NARROW.search(what) for _, what in code),
            "instructions_per_element": sum(first <= at <= last for at, _ in code) * threads_per_element}


def fault(row: dict) -> str:
    """The fault of a row, or ""."""
    if "error" in row:
        return row["error"]
    if row["spilled"]:
        return f"spills {row['spilled']} bytes"
    if row["shared"] > SHARED_MEMORY[row["arch"]]:
        return f"needs more than {SHARED_MEMORY[row['arch']]} bytes of shared memory"
    if row["narrow"]:
        return "a TF32 product of 8 columns, which sm_90 gets wrong"
    return "a matrix product without matrix instructions" if row["has_dot"] and not row["matrix"] else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=configs.ARCHS, default=configs.ARCHS)
    parser.add_argument("--kernel", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in N configurations of each kernel; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="file for the rows")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 replaces the compiler that is to be checked: unset it", file=sys.stderr)
        return 2
    work = [(arch, program) for arch in asked.arch for program in one_in(asked.every, launches(arch, asked.kernel, asked.dtype))]
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(compile_one, *zip(*work)), total=len(work), disable=None, desc="compiling"))
    cells = [[f"{row.get(c, '-'):.1f}" if isinstance(row.get(c), float) else row.get(c, "-") for c in COLUMNS] for row in rows]
    print(table([[*line, fault(row)] for line, row in zip(cells, rows)], [*COLUMNS, "fault"]))
    if asked.json:
        Path(asked.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = sum(map(bool, map(fault, rows)))
    print(f"{len(rows)} compiled, {bad} with a fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
