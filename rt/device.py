"""Where to compute, in which precision, and seeds that are a function of what is computed."""
import platform
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from rt.config import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--device {name}: not a device that PyTorch {torch.__version__} can use here ({reason}); "
                         "use auto, cpu or cuda") from None


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the matrix units of `device` take bfloat16: Ampere and later; AMX or AVX512-bf16 on a CPU. Without them
    bfloat16 works but is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and platform.system() == "Linux":
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `bf16` or `fp32` as the dtype of activations; weights are float32 always."""
    if name not in ("auto", "bf16", "fp32"):
        raise UsageError(f"--precision {name}: not one of auto, bf16, fp32")
    if name == "auto":
        name = "bf16" if bf16_is_fast(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Matrix products in `precision`, reductions and weights in float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def derive_seed(*keys: int) -> int:
    """A 63-bit seed that is a function of `keys` (run seed, stage, step, rank ...): restarting needs no generator state."""
    high, low = np.random.SeedSequence(keys).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1
