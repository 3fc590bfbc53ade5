"""Devices: which device to use, in which precision, and its peak speed."""
import ctypes
import os
import re
import sys
from pathlib import Path

import torch

from rt.errors import InputError

# Peak of dense bfloat16 products with float32 accumulation, in 1e12 FLOP/s, by a word in the device's name (the first match counts).
# From NVIDIA's data sheets (half of figures with sparsity); for GeForce and RTX from the whitepapers on GA102 and AD102.
PEAKS = (("GB200", 2500), ("B200", 2250), ("GH200", 989.5), ("H200 NVL", 835.5), ("H200", 989.5), ("H100 PCIe", 756.5), ("H100 NVL", 835.5),
         ("H100", 989.5), ("A100", 312), ("A40", 149.7), ("A30", 165), ("A10", 125), ("L40S", 362), ("L40", 181), ("L4", 121),
         ("RTX 6000 Ada", 364.2), ("RTX A6000", 154.8), ("RTX 4090", 165.2), ("RTX 3090 Ti", 80), ("RTX 3090", 71))
OTHER = r"\b(MIG|Laptop|Max-Q|4090 D)\b"       # part of a chip, or a slower chip with the same name


def pick_device(name: str) -> torch.device:
    """The device with this name; `auto` is the first CUDA device if there is one, else the CPU. A CUDA device becomes the current device,
    because CUDA graphs are captured on the current one's streams. Raises InputError if PyTorch cannot use the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise InputError(f"--device {name}: not a device that is supported; use auto, cpu or cuda")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise InputError(f"--device {name}: not a device that PyTorch {torch.__version__} can use here ({reason}); "
                         "use auto, cpu or cuda") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation. By default it returns every block above 32 MB to the system. The next step then
    waits for new, zeroed pages (docs/scaling.md). No effect under another C library, or if environment variables configure malloc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # of malloc.h
        mallopt(M_TRIM_THRESHOLD, -1)       # never shrink the heap
        mallopt(M_MMAP_MAX, 0)              # large blocks come from the heap, too


def make_deterministic(wanted: bool) -> None:
    """If `wanted`, the same command gives the same bits on a GPU too (with the same GPU model and PyTorch version), at some cost. PyTorch
    then raises an error at an operation that has no deterministic form."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # a debugging aid that fills all new memory


def bf16_is_fast(device: torch.device) -> bool:
    """Whether `device` has matrix units for bfloat16 (Ampere and later; AMX or AVX512-bf16 on a CPU). On others float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = Path("/proc/cpuinfo")       # of Linux
    return flags.exists() and bool(re.search("avx512_bf16|amx_bf16", flags.read_text(errors="replace")))


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations for `auto`, `bf16` or `fp32`; weights are always float32."""
    auto = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def precision_name(precision: torch.dtype) -> str:
    """The name that `pick_precision` takes for a dtype of activations, for records: `auto` does not tell what was used."""
    return "bf16" if precision == torch.bfloat16 else "fp32"


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """The maker's peak FLOP/s for dense matrix products in `precision`; None except for bfloat16 on the chips in PEAKS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if precision != torch.bfloat16 or re.search(OTHER, name):
        return None
    return next((1e12 * peak for word, peak in PEAKS if re.search(rf"\b{word}\b", name)), None)
