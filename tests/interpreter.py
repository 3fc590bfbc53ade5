"""Triton's interpreter stores bfloat16 numbers as 16 bits, multiplies these bits in tl.dot, and truncates when it converts to bfloat16.
With the first two patches (the same for triton 3.6 and 3.7) it computes what a GPU does: in fp32, rounded to nearest. The others save most
of its time."""
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def compute_in_bf16() -> None:
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def to_nearest(x: np.ndarray, given: tl.dtype, wanted: tl.dtype, mode: object) -> np.ndarray:
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(x, given, wanted, mode)
        bits = np.asarray(x).view(np.uint32)
        return np.where(np.isnan(x), 0x7FC0, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._convert_float = to_nearest
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


def save_time() -> None:
    """Patches the language at every launch instead of at every call of a function in a kernel, and looks for no overflow of integers: what
    it finds is thrown away unless `debug` is set."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, everywhere = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch(everywhere)
    interpreter.InterpretedFunction.__call__ = lambda self, *arguments, **named: self.rewrite()(*arguments, **named)
    numpy_type = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda t: np.dtype(np.uint64) if t.scalar.is_ptr() else numpy_type(t.scalar)
    remember_types()


def remember_types() -> None:
    """What an operation computes anew for the type and the shape of each result is computed once for equal ones."""
    init, fields = tl.block_type.__init__, {}

    def shapes(shape: object) -> tuple[tl.constexpr, tl.tuple]:
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(s) for s in shape])

    def init_block(self: tl.block_type, element_ty: tl.dtype, shape: object) -> None:
        key = element_ty.name, getattr(element_ty, "const", None), *[getattr(s, "value", s) for s in shape]
        if key not in fields:
            init(self, element_ty, shape)
            fields[key] = self.__dict__ | {"of_tensor": shapes(self.shape)}
        self.__dict__.update(fields[key])

    def init_tensor(self: tl.tensor, handle: object, type: tl.dtype, scalar: tuple = shapes(())) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.__dict__.get("of_tensor", scalar)

    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor
