"""Shared by the kernel files: the import of Triton if it is installed, the choice between kernel and reference, and the launch.

    RT_KERNELS unset or auto: CUDA tensors use the Triton kernels, all others the plain PyTorch references
    RT_KERNELS=ref       references everywhere
    RT_KERNELS=triton    Triton everywhere; CPU tensors then need TRITON_INTERPRET=1 (Triton's interpreter)

    RT_FUSE unset or kernel: `dropout` and `add_norm` stay our kernels under torch.compile
    RT_FUSE=compiler     torch.compile sees their references and fuses them with their neighbours; no effect without torch.compile
"""
import os
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:     # Triton does not exist for macOS and Windows: the kernels stay unused, the references work

    class _Missing:
        def __getattr__(self, name: str) -> Callable:
            return lambda f=None, **options: f or (lambda f: f)

    triton = tl = _Missing()
    HAS_TRITON = False

LOG2E = 1.4426950408889634
FLOATS = (torch.float32, torch.float16, torch.bfloat16)     # dtypes the kernels accept; all compute in fp32
_launched: list | None = None                               # see `recording`


def uses_triton(x: Tensor) -> bool:
    """Whether a call on `x` takes the Triton path (module docstring). float64 takes the reference."""
    mode = os.environ.get("RT_KERNELS", "auto")
    if mode == "auto":
        return HAS_TRITON and x.is_cuda and x.dtype in FLOATS
    if mode not in ("ref", "triton"):
        raise ValueError(f"RT_KERNELS={mode}: not one of auto, ref, triton")
    if mode == "triton" and not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" or _launched is not None):
        raise ValueError(f"RT_KERNELS=triton on a {x.device.type} tensor needs TRITON_INTERPRET=1")
    return mode == "triton" and x.dtype in FLOATS


def left_to_compiler() -> bool:
    """Whether torch.compile is running and should fuse the operations that RT_FUSE covers (module docstring)."""
    mode = os.environ.get("RT_FUSE", "kernel")
    if mode not in ("kernel", "compiler"):
        raise ValueError(f"RT_FUSE={mode}: not one of kernel, compiler")
    return mode == "compiler" and torch.compiler.is_compiling()


def row_class(C: int) -> int:
    """The row-length class in the configuration table: the smallest class that holds a row, or else the largest class."""
    return next((size for size in (32, 256, 1024) if C <= size), 4096)


def dense_rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor with a contiguous last dimension, copied if necessary."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """ValueError unless `cu_seqlens` is one-dimensional and int32. Its values are not checked, because reading them would wait for the
    device: if they end before N, the kernels leave the remaining rows uninitialised."""
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (B+1,) int32, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")


LIBRARY = torch.library.Library("recyclable", "FRAGMENT")


class op:
    """Decorator that registers a function as torch operator recyclable::NAME; NAME is the function's name without its leading underscore.
    It does what torch.library.custom_op does, without the checks at every call: add_norm, forward and backward, then takes 190 us of host
    time instead of 250 (measured at commit 9cc036c), and a short step is bound by host time. Outputs must not alias inputs. torch.compile
    learns the shapes of the outputs from the function itself, which it runs on fake tensors: `launch` does nothing then."""

    def __init__(self, function: Callable, fake: Callable | None = None):
        name = function.__name__.lstrip("_")
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.op = self.eager = getattr(torch.ops.recyclable, name).default
        torch.library.register_fake(self.op, fake or function, lib=LIBRARY)

    def __call__(self, *inputs: Any) -> Any:
        return (self.op if torch.compiler.is_compiling() else self.eager)(*inputs)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Like custom_op's. Differentiating a gradient again raises RuntimeError."""
        torch.library.register_autograd(self.op, backward, setup_context=setup_context, lib=LIBRARY)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                with torch._C._AutoDispatchBelowAutograd():
                    output = self.op(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *up):
                if torch.is_grad_enabled():     # create_graph: our gradients build no graph of their own
                    raise RuntimeError(f"{self.op} is not differentiable twice; RT_KERNELS=ref is")
                return backward(ctx, *up)

        self.eager = Function.apply


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run `programs` copies of `kernel` on the device of its first tensor, which need not be the current device."""
    if _launched is not None:
        _launched.append((kernel, args, meta))
        return
    first = next(a for a in args if isinstance(a, Tensor))
    if first.is_meta or isinstance(first, FakeTensor):      # only the shapes of the outputs are wanted
        return
    elsewhere = first.is_cuda and first.device.index != torch.cuda.current_device()
    with torch.cuda.device(first.device) if elsewhere else nullcontext():
        if programs:
            kernel[(programs,)](*args, **meta)


@contextmanager
def recording() -> Iterator[list]:
    """Inside this context, `launch` runs nothing and records (kernel, args, meta). compile_check uses it to see what the code launches."""
    global _launched
    _launched = []
    try:
        yield _launched
    finally:
        _launched = None
