"""Compile every kernel in every configuration the code can launch, without a GPU, and look at the machine code.

    python -m bench.compile_check                  sm_80, sm_90 and sm_100
    python -m bench.compile_check --arch 90 --kernel attention --json rows.json

A row: registers a thread, spilled bytes, shared memory a block, matrix instructions (HMMA; HGMMA on Hopper; UTCHMMA on Blackwell), and
instructions an element of a tile in the longest loop. Exit code 1 on a spill, on more shared memory than the chip has, or where a
kernel with a matrix product has no matrix instruction. What is compiled is what the public functions launch: they are called on small
tensors with every choice that changes the code, and their launches are recorded, not run.
"""
import argparse
import concurrent.futures
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kernels import (
    add_norm,
    attention,
    attention_kd,
    attention_qkv,
    configs,
    dropout,
    hidden_mse,
    kd_loss,
    linear_cross_entropy,
    linear_kd,
    top_k,
)
from kernels.common import recording, triton

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}    # bytes a block; 80 stands for sm_86, 89 and 120 too
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int32: "i32",
         torch.int64: "i64", torch.bool: "i1"}


def attention_calls(dtype: torch.dtype) -> None:
    for D, longest, dropout_p, deterministic in itertools.product((32, 64, 128), (64, 512), (0.0, 0.1), (False, True)):
        q, k, v = torch.zeros(3, 4, 16, D, dtype=dtype, requires_grad=True).unbind()
        prefix = tuple(torch.zeros(s, requires_grad=True) for s in ((64, 16, D), (64, 16, D), (16,))) if not dropout_p else None
        torch.use_deterministic_algorithms(deterministic)
        attention(q, k, v, torch.tensor([0, 4], dtype=torch.int32), longest, dropout_p=dropout_p, prefix_kv=prefix).sum().backward()
        qkv = torch.zeros(4, 3, 16, D, dtype=dtype, requires_grad=True)
        attention_qkv(qkv, torch.tensor([0, 4], dtype=torch.int32), longest, dropout_p=dropout_p).sum().backward()
    torch.use_deterministic_algorithms(False)


def attention_kd_calls(dtype: torch.dtype) -> None:
    equal = [(D, D, longest, dtype) for D in (32, 64, 128) for longest in (64, 512)]
    for D_s, D_t, longest, dtype_t in [*equal, (64, 128, 512, torch.bfloat16), (128, 32, 512, torch.bfloat16)]:
        q_s, k_s = torch.zeros(2, 4, 16, D_s, dtype=dtype, requires_grad=True).unbind()
        q_t, k_t = torch.zeros(2, 4, 16, D_t, dtype=dtype_t).unbind()
        attention_kd(q_s, k_s, q_t, k_t, torch.tensor([0, 4], dtype=torch.int32), longest).sum().backward()


LABELS = torch.zeros(4, dtype=torch.int64)
TERMS = [(5.0, LABELS), (1.0, LABELS), (5.0, None)]     # both terms, both with one softmax, distillation alone


def kd_loss_calls(dtype: torch.dtype) -> None:
    for C, dtype_t in itertools.product((20, 200, 1000, 5000, 5008), {dtype, torch.float32}):    # rows of 5,000 are not aligned
        student, teacher = torch.zeros(4, C, dtype=dtype, requires_grad=True), torch.zeros(4, C, dtype=dtype_t)
        for (T, labels), k in itertools.product(TERMS, (0, 16) if C < 5000 else (0, 64, 4096)):
            kd_loss(student, top_k(teacher, k, T) if k else teacher, labels, alpha=0.5, T=T).sum().backward()
        kd_loss(student, None, LABELS, alpha=0.0, T=1.0).sum().backward()
    for width, rows, dtype_t in itertools.product((256, 768, 9216), (None, LABELS), {dtype, torch.float32}):
        student, teacher = torch.zeros(4, 1, width, dtype=dtype, requires_grad=True), torch.zeros(4, 1, width, dtype=dtype_t)
        hidden_mse(student, teacher, rows).sum().backward()


def linear_loss_calls(dtype: torch.dtype) -> None:
    for V, with_bias, train in itertools.product((200, 1000, 5000), (False, True), (False, True)):
        x, w = torch.zeros(4, 16, dtype=dtype, requires_grad=train), torch.zeros(V, 16)
        bias = torch.zeros(V) if with_bias else None
        linear_cross_entropy(x, w, bias, LABELS)
        for T, labels in TERMS:
            linear_kd(x, w, bias, x, w, bias, labels, alpha=0.5, T=T)


def norm_calls(dtype: torch.dtype) -> None:
    for d in (32, 768):
        dropout(torch.zeros(16, d, dtype=dtype, requires_grad=True), 0.1, LABELS).sum().backward()
    for d, p, wide in ((32, 0.1, False), (256, 0.1, False), (768, 0.0, False), (768, 0.1, False), (768, 0.1, True), (4096, 0.1, False)):
        x = torch.zeros(16, d, dtype=torch.float32 if wide else dtype, requires_grad=True)
        h = torch.zeros(16, d, dtype=dtype, requires_grad=True)
        weight, bias = (torch.zeros(d, requires_grad=True) for _ in range(2))
        add_norm(x, h, weight, bias, 1e-5, p, LABELS).sum().backward()


CALLS = {"attention": attention_calls, "attention_kd": attention_kd_calls, "kd_loss": kd_loss_calls, "linear_loss": linear_loss_calls,
         "norm": norm_calls}


def launches(arch: int, which: list[str], dtypes: list[str] = ("bf16", "fp16", "fp32")) -> list[tuple]:
    """What can be launched on `arch`, each once: (module, kernel, signature, constexprs, attributes, options)."""
    found = {}
    os.environ["RT_KERNELS"], configs._arch = "triton", arch
    with recording() as recorded:
        for name in which:
            for dtype in (dtype for dtype, short in TYPES.items() if short in dtypes):
                CALLS[name](dtype)
    for kernel, args, meta in recorded:
        spec = describe(kernel, args, meta)
        found[repr(spec)] = spec
    return list(found.values())


def one_in(n: int, specs: list[tuple]) -> list[tuple]:
    """The first launch of each kernel, and each n-th after it."""
    by_kernel = {}
    for spec in specs:
        by_kernel.setdefault(spec[:2], []).append(spec)
    return [spec for alike in by_kernel.values() for spec in alike[::n]]


def describe(kernel: Any, args: tuple, meta: dict) -> tuple:
    """A launch as Triton's compiler wants it: as its own launcher does, the integer 1 and None become constants, and pointers and
    integers that 16 divides are known to be so."""
    options = {k: v for k, v in meta.items() if k not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in meta.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        specialized = type(value) is int and not kernel.params[i].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif kernel.params[i].is_constexpr or value is None or (specialized and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        aligned = isinstance(value, torch.Tensor) and not kernel.params[i].do_not_specialize_on_alignment
        if aligned or (specialized and signature[name] != "constexpr" and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, options


def compile_one(arch: int, spec: tuple) -> dict:
    """Compile one launch for `arch` and read its machine code."""
    module, name, signature, constants, attributes, options = spec
    kernel = getattr(importlib.import_module(module), name)
    row = {"kernel": name, "arch": arch, "types": ",".join(dict.fromkeys(t for t in signature.values() if t.startswith("*")))}
    row["config"] = " ".join(f"{k}={v}" for k, v in {**constants, **options}.items() if k.isupper() or k.startswith("num"))
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    try:
        done = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:      # whatever the compiler raises is this row's result
        return row | {"error": " ".join(str(error.__cause__ or error).split())[-200:]}
    return row | machine_code(done, options.get("num_warps", 4) * 32, tile(constants)) | {
        "shared": done.metadata.shared, "has_dot": "tt.dot" in done.asm["ttir"]}


def tile(constants: dict) -> int:
    return math.prod(v for k, v in constants.items() if k.startswith("BLOCK"))


def machine_code(done: Any, threads: int, elements: int) -> dict:
    """Registers, spilled bytes, matrix instructions, and instructions an element in the longest loop (of all, without one)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(done.asm["cubin"])
        usage, text = (subprocess.run([TOOLS / tool, *flags, path], capture_output=True, text=True, check=True).stdout
                       for tool, *flags in (("cuobjdump", "--dump-resource-usage"), ("cuobjdump", "--dump-sass")))
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]
    loops = [(int(back, 16), at) for at, what in code for back in re.findall(r"BRA[^`]*? 0x([0-9a-f]+)", what) if int(back, 16) < at]
    first, last = max(loops, key=lambda ends: ends[1] - ends[0], default=(0, code[-1][0]))
    body = sum(first <= at <= last for at, _ in code)
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"],
            "matrix": sum(bool(MATRIX.search(what)) for _, what in code), "instructions_per_element": body * threads / elements}


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def fault(row: dict) -> str:
    """What is wrong with a row, or nothing."""
    if "error" in row:
        return row["error"]
    if row["spilled"]:
        return f"spills {row['spilled']} bytes"
    if row["shared"] > SHARED_MEMORY[row["arch"]]:
        return f"needs more than {SHARED_MEMORY[row['arch']]} bytes of shared memory"
    return "a matrix product without matrix instructions" if row["has_dot"] and not row["matrix"] else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=configs.ARCHS, default=configs.ARCHS)
    parser.add_argument("--kernel", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16", "fp32"), default=("bf16", "fp16", "fp32"))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in N configurations of each kernel; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="file for the rows")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 replaces the compiler that is to be checked: unset it", file=sys.stderr)
        return 2
    work = [(arch, spec) for arch in asked.arch for spec in one_in(asked.every, launches(arch, asked.kernel, asked.dtype))]
    with concurrent.futures.ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(compile_one, *zip(*work)), total=len(work), disable=None, desc="compiling"))
    print(f"{'kernel':24} {'types':18} {'sm':>3} {'reg':>4} {'spill':>5} {'shared':>7} {'matrix':>6} {'instr/elt':>9}  config")
    for row in rows:
        if "error" not in row:
            print(f"{row['kernel']:24} {row['types']:18} {row['arch']:3} {row['registers']:4} {row['spilled']:5} {row['shared']:7} "
                  f"{row['matrix']:6} {row['instructions_per_element']:9.1f}  {row['config']}  {fault(row)}")
        else:
            print(f"{row['kernel']:24} {row['types']:18} {row['arch']:3} {row['error']}  {row['config']}")
    if asked.json:
        Path(asked.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = sum(bool(fault(row)) for row in rows)
    print(f"{len(rows)} compiled, {bad} with a fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
