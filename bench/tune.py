"""Search better rows of kernels/configs.py for the GPU at hand (`python -m bench.kernels --tune`)."""
import itertools
import json
import os
import time
from pathlib import Path
from typing import Iterator

import torch

from bench import cases
from bench.measure import distance, evaluate, passes, timed, worst
from bench.peers import PROBLEMS
from bench.problem import Impl
from bench.runner import RunFlags
from kernels import configs

CANDIDATES = {      # by the length of a row: two tile sizes, warps, stages; columns, warps, and columns of a part
    4: list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))), 2: list(itertools.product((1024, 2048, 4096, 8192), (4, 8, 16))),
    3: list(itertools.product((1024, 2048, 4096), (4, 8), (1, 2, 4)))}


def searches(cuda: bool) -> Iterator[tuple[str, int, dict, str]]:
    """(kernel of configs.TABLE, size of its row, and the case and pass that measure it)."""
    for D, S in ((64, 512), (128, 512), (64, 64), (32, 512)):
        for kernel in (name for name in configs.TABLE if name.startswith("attention")):
            case = cases.attention(16384, S, D=D, dropout=0.1 * ("dropout" in kernel),
                                   kernel="attention_kd" if "kd" in kernel else "attention")
            which = "forward" if "forward" in kernel else "backward"
            yield kernel, D if S > 64 else -D, case if cuda else case | {"tokens": 2 * S, "H": 1}, which
        if D == 64:
            case = cases.kd(4096, 50265) if cuda else cases.kd(8, 5000)
            yield "kd_loss_forward", 4096, case, "forward"
            yield "kd_loss_backward", 4096, case, "backward"
            yield "linear_loss", 4096, cases.linear("linear_kd", *((4096,) if cuda else (8, 5000, 16))), "both"


def fastest(impl: Impl, which: str, table: dict, key: tuple, name: str, cuda: bool, quick: bool, end: float) -> tuple[int, ...] | None:
    """The best candidate for one row of the table, which is restored. A candidate that fails or computes something else does not count."""
    shipped, best, truth = table[key], None, None
    try:
        for row in dict.fromkeys([shipped, *CANDIDATES[len(shipped)]]):
            if time.monotonic() > end:
                break
            table[key] = row
            try:
                found = evaluate(impl)
                truth = truth or found
                off = worst(distance(*pair)[1] for pair in zip(found, truth))
                if not off < 0.01:
                    raise ValueError(f"differs by {off:.1e}")
                with impl.context():
                    ms = timed(next(passes(impl._replace(passes=(which,))))[1], cuda, quick)["ms"]
                print(f"{name} {row}: {ms:.4f} ms", flush=True)
                best = min(best or (ms, row), (ms, row))
            except Exception as error:
                print(f"{name} {row}: {' '.join(str(error).split())[:110]}", flush=True)
                if row == shipped:      # without a result to compare with, no candidate is safe
                    return None
    finally:
        table[key] = shipped
    return best and best[1]


def tune(c: RunFlags, only: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> None:
    """Write {kernel: {"ARCH SIZE BITS": row}} after every search, so a stop loses only one search."""
    os.environ.pop("RT_CONFIGS", None)      # it would overrule the candidates
    path, cuda, end = Path(c.json), device.type == "cuda", time.monotonic() + c.budget
    out = json.loads(path.read_text()) if c.resume and path.exists() else {}
    for kernel, size, case, which in searches(cuda):
        bits = 32 if kernel == "linear_loss" else 8 * dtype.itemsize      # its logits are always fp32
        key, table = (configs.architecture(device), size, bits), configs.TABLE.get(kernel, {})
        place = " ".join(map(str, key))
        wanted = case["kernel"] in only and key in table and place not in out.get(kernel, {})
        if not wanted or time.monotonic() > end:
            continue
        impl = PROBLEMS[case["kernel"]](case, device, dtype).impls["ours"]()
        best = fastest(impl, which, table, key, f"{kernel} {key}", cuda, c.quick, end)
        if best:
            print(f"{kernel} {key}: {best}, shipped is {table[key]}", flush=True)
            out.setdefault(kernel, {})[place] = best
            path.write_text(json.dumps(out, indent=1) + "\n")
