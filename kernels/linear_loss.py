"""A linear layer and its loss in one call. The logits of a large vocabulary are never stored in full, only some rows at a time.

    logits s = x W^T + b        rows (1 - alpha) CE(s, y) + alpha T^2 KL(softmax(t / T) || softmax(s / T)) as in kd_loss.py
    teacher  t = x_t W_t^T + b_t        loss = sum of the rows, or mean over the rows that are not ignored

A chunk of rows takes a GEMM per model (fp32 out), one kernel that reads the logits twice and overwrites them with G = d rows / ds, and the
GEMMs dX = G W and dW += G^T X (fp32 sums over the chunks). So the gradients of the plain sum of rows exist when the forward is done. The
backward multiplies them by (upstream gradient) / (number of rows that count); both factors stay on the device. In fp16 the small G of a
student near its teacher would underflow. So if x is fp16, G is multiplied by a power of two, and dX stays in fp32 until the backward.

A chunk has up to CHUNK_BYTES of logits, in a multiple of 128 rows if possible. Small chunks would be slow: a chunk reads and writes the V d
numbers of dW, and a row does only 2 V d operations on them. W is cast to the dtype of x and copied to a multiple of 128 rows: with an odd V
(50,265) no vector load and no tensor-core tile is aligned with the rows of logits. The loss kernel takes the logits past V as -inf.

16-bit G is written over the fp32 logits it comes from: numbers [c, c + n) of a row into the bytes of the logits [c/2, (c + n)/2). By then
those logits have been read, in earlier tiles or, for the first tile, in the same one. A barrier between a tile's loads and its stores
makes that true for all threads of the program, and no other program touches the row. Read as 16-bit numbers, the row is a GEMM operand
with twice the row stride.

Limits: as for kd_loss; G is rounded to the dtype of x; GEMMs follow PyTorch's settings (TF32 for fp32). Not differentiable twice.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs
from kernels.common import LOG2E, dense_rows, launch, op, row_class, tl, triton, uses_triton
from kernels.kd_loss import add, flags, kd_loss_ref, load_fp32, parts, read_label, row_loss, tile, tile_grad

CHUNK_BYTES = 2**30     # of a chunk's fp32 logits, student's and teacher's together; tests lower it


# ---------------------------------------------------------------- references

def linear_cross_entropy_ref(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int = -100,
                             reduction: str = "mean") -> Tensor:
    """`linear_cross_entropy` in plain PyTorch: logits stored in the dtype of `x`, loss in at least fp32."""
    rows = kd_loss_ref(_linear_ref(x, weight, bias), None, labels, alpha=0.0, T=1.0, ignore_index=ignore_index)
    return _reduce(rows.sum(), len(x), labels, ignore_index, reduction)


def linear_kd_ref(x: Tensor, weight: Tensor, bias: Tensor | None, x_teacher: Tensor, weight_teacher: Tensor, bias_teacher: Tensor | None,
                  labels: Tensor | None = None, *, alpha: float, T: float, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """`linear_kd` in plain PyTorch: logits stored in the dtype of `x`, loss in at least fp32."""
    with torch.no_grad():
        teacher = _linear_ref(x_teacher, weight_teacher, bias_teacher)
    rows = kd_loss_ref(_linear_ref(x, weight, bias), teacher, labels, alpha=alpha, T=T, ignore_index=ignore_index)
    return _reduce(rows.sum(), len(x), labels, ignore_index, reduction)


def _linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _reduce(total: Tensor, R: int, labels: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """The sum of the rows, or that sum divided by the number of rows that count; 0, not NaN, if no row counts."""
    if reduction == "sum":
        return total
    return total / (max(R, 1) if labels is None else (labels != ignore_index).sum().clamp(min=1))


# ---------------------------------------------------------------- kernel

@triton.jit
def _logits(row_ptr, bias_ptr, cols, V, width):
    """Some logits of a row, -inf from V on. Loads are masked by `width`, a multiple of any vector length, not by V."""
    s = load_fp32(row_ptr, cols, cols < width)
    if bias_ptr is not None:
        s += load_fp32(bias_ptr, cols, cols < width)
    return tl.where(cols < V, s, -float("inf"))


@triton.jit
def _row(s_ptr, t_ptr, bias_ptr, bias_t_ptr, labels_ptr, loss_ptr, grad_ptr,   # (n, width) x 2, (width,) x 2 in fp32; (n,) x 2; (n, width)
         V, width, grad_stride, ignore_index, alpha, T, rate, unit, CE: tl.constexpr, KD: tl.constexpr, UNIT_T: tl.constexpr,
         GRAD: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr):
    """The loss of one row of logits, and its gradient times `unit`, which overwrites the logits."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * width
    if KD:
        t_ptr += row * width
    m_s, d_1, d_s, m_t, d_t, gaps = parts(BLOCK // W)
    for start in range(0, width, BLOCK):
        cols = tile(start, W, BLOCK // W)
        s, t = _logits(s_ptr, bias_ptr, cols, V, width), None
        if KD:
            t = _logits(t_ptr, bias_t_ptr, cols, V, width)
        m_s, d_1, d_s, m_t, d_t, gaps = add(s, 1.0, 1.0, t, 1.0, None, m_s, d_1, d_s, m_t, d_t, gaps, rate, CE, KD, UNIT_T)
    M_s, D_1, D_s, M_t, D_t, gap = add(m_s, d_1, d_s, m_t, d_t, gaps, -1e30, 0.0, 0.0, -1e30, 0.0, 0.0, rate, CE, KD, UNIT_T)
    y, counts = read_label(labels_ptr, row, ignore_index)
    s_y = tl.load(s_ptr + y, mask=(y >= 0) & (y < V), other=float("nan"))       # a label that is no class: a loss of NaN
    if bias_ptr is not None:
        s_y += tl.load(bias_ptr + y, mask=(y >= 0) & (y < V), other=0.0)
    tl.store(loss_ptr + row, tl.where(counts, row_loss(s_y, M_s, D_1, D_s, D_t, gap, alpha, T, CE, KD), 0.0))
    if GRAD:
        g_ce, g_kd = tl.where(counts, unit * (1 - alpha), 0.0), tl.where(counts, unit * alpha * T, 0.0)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            s, t = _logits(s_ptr, bias_ptr, cols, V, width), None
            if KD:
                t = _logits(t_ptr, bias_t_ptr, cols, V, width)
            grad = tile_grad(s, t, cols == y, M_s, D_1, D_s, M_t, D_t, rate, g_ce, g_kd, CE, KD, UNIT_T)     # 0 from V on
            tl.debug_barrier()      # this store overwrites logits that other threads may still have to load
            tl.store(grad_ptr + row * grad_stride + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)


# ---------------------------------------------------------------- op

def _padded(x: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    """x in `dtype` with zeros appended up to `rows`; x itself if nothing has to change."""
    if x is None or (len(x) == rows and x.dtype == dtype and x.is_contiguous()):
        return x
    out = torch.empty(rows, *x.shape[1:], dtype=dtype, device=x.device)
    out[:len(x)].copy_(x)
    out[len(x):].zero_()
    return out


def _chunk_rows(R: int, width: int, buffers: int) -> int:
    """The rows of a chunk: R rows are split into about equal chunks of at most CHUNK_BYTES, with `buffers` fp32 numbers per row and column;
    in multiples of 128 if so many fit."""
    rows = CHUNK_BYTES // (4 * width * buffers)
    most, unit = (rows - rows % 128, 128) if rows > 128 else (max(rows, 1), 1)
    alike = -(-R // max(1, -(-R // most)))
    return max(1, -(-alike // unit) * unit)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta total + a b, with fp32 sums; with beta = 0 the old total is not read."""
    if not a.is_cuda or a.dtype == torch.float32:
        total.addmm_(a.float(), b.float(), beta=beta)
    elif torch.__version__ >= "2.10":       # before, addmm refused a `total` whose dtype is not a's
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        torch.add(torch.mm(a, b, out_dtype=torch.float32), total if beta else 0, out=total)


def _dtype_of_dx(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _shapes(x, weight, bias, x_t, weight_t, bias_t, labels, alpha, T, ignore_index, need_x, need_w, need_b):
    (R, d), V = x.shape, len(weight)
    return (x.new_empty((), dtype=torch.float32), x.new_empty(R if need_x else 0, d, dtype=_dtype_of_dx(x)),
            x.new_empty(V if need_w else 0, d, dtype=torch.float32), x.new_empty(V if need_b else 0, dtype=torch.float32))


@partial(op, fake=_shapes)     # not itself: torch.compile would specialise on the number of rows in its loop over chunks
def _linear_loss(x: Tensor, weight: Tensor, bias: Tensor | None, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None,
                 labels: Tensor | None, alpha: float, T: float, ignore_index: int, need_x: bool, need_w: bool,
                 need_b: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the rows' losses and its gradients by x, weight and bias, the last two in fp32; a gradient is empty if not needed."""
    (R, d), V = x.shape, len(weight)
    width = -(-V // 128) * 128
    x, w, b = x.contiguous(), _padded(weight, width, x.dtype), _padded(bias, width, torch.float32)
    w_t, b_t = None if x_t is None else _padded(weight_t, width, x_t.dtype), _padded(bias_t, width, torch.float32)
    labels, loss = *dense_rows(labels), torch.empty(R, device=x.device)
    dx = torch.empty(R if need_x else 0, d, dtype=_dtype_of_dx(x), device=x.device)
    dw = (torch.empty if R else torch.zeros)(width if need_w else 0, d, device=x.device)
    db = torch.zeros(width if need_b else 0, device=x.device)
    BLOCK, warps, W = configs.pick("linear_loss", row_class(width), torch.float32, x.device)
    unit = 2.0 ** math.floor(15 - math.log2(max(1.0, 1 - alpha + alpha * T))) if x.dtype == torch.float16 else 1.0     # |G| < 2^15
    chunk = _chunk_rows(R, width, 1 if x_t is None else 2)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, R, chunk):
            part = slice(start, start + chunk)
            s, t = _matmul(x[part], w.T), None if x_t is None else _matmul(x_t[part], w_t.T)      # (n, width) fp32
            g = s.view(x.dtype)[:, :width]
            launch(_row, len(s), s, t, b, b_t, None if labels is None else labels[part], loss[part], g, V, width, g.stride(0),
                   ignore_index, alpha, T, LOG2E / T, unit, **flags(t, labels, alpha, T), GRAD=need_x or need_w or need_b,
                   BLOCK=BLOCK, W=W, num_warps=warps)
            if need_x and unit == 1:
                torch.mm(g, w, out=dx[part])
            elif need_x:
                torch.div(_matmul(g, w), unit, out=dx[part])
            if need_w:
                _add_matmul(dw, g.T, x[part], int(start > 0))
            if need_b:
                db += g.sum(0, dtype=torch.float32)
            del s, t, g         # otherwise the next chunk's would be allocated on top
    if unit != 1:
        dw, db = dw / unit, db / unit
    return loss.sum(), dx, dw[:V], db[:V]


def _save(ctx, inputs, output):
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype, inputs[2].dtype if inputs[-1] else None
    ctx.needs = inputs[-3:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)        # otherwise the outputs above get gradients of zeros, as large as the weight


def _differentiate(ctx, up, *_):
    if up is None:
        return (None,) * 13
    up = up.reshape(1)      # CUDA rounds a factor without dimensions to the dtype of g, which scales the whole gradient by up to .2 %
    grads = [torch.mul(g, up, out=torch.empty_like(g, dtype=dtype)) if need else None      # scaled and cast in one pass
             for g, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)]
    return *grads, *(None,) * 10


_linear_loss.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------- public

def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int = -100,
                         reduction: str = "mean") -> Tensor:
    """Cross-entropy of `x @ weight.T + bias`.

    x            (R, d); cast to autocast's dtype under autocast. `weight` is cast to the dtype of x
    weight       (V, d)
    bias         (V,) or None
    labels       (R,) int64 classes; `ignore_index` rows give 0. Another label outside [0, V) gives NaN (the reference raises)
    reduction    "mean" over the rows that are not ignored (0 if none), or "sum"
    Returns      a scalar, fp32; float64 for float64 x. Raises ValueError if shapes do not fit.
    """
    if labels is None:
        raise ValueError("cross-entropy needs labels")
    _check(x, weight, bias, labels, reduction)
    if not uses_triton(x):
        return linear_cross_entropy_ref(x, weight, bias, labels, ignore_index=ignore_index, reduction=reduction)
    return _fused(x, weight, bias, None, None, None, labels, 0.0, 1.0, ignore_index, reduction)


def linear_kd(x: Tensor, weight: Tensor, bias: Tensor | None, x_teacher: Tensor, weight_teacher: Tensor, bias_teacher: Tensor | None,
              labels: Tensor | None = None, *, alpha: float, T: float, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """`kd_loss` of the logits `x @ weight.T + bias` against a teacher's logits.

    x, weight, bias                            as in `linear_cross_entropy`
    x_teacher, weight_teacher, bias_teacher    (R, d_t), (V, d_t), (V,) or None; they get no gradient
    labels                                     (R,) int64 classes, or None for the KL term alone (times alpha); `ignore_index` rows give 0
    alpha, T                                   share of the KL term, from 0 to 1; temperature of its softmaxes
    reduction                                  "mean" over the rows that are not ignored (0 if none), or "sum"
    Returns a scalar, fp32; float64 for float64 x. Raises ValueError if shapes do not fit or T is not positive.
    """
    _check(x, weight, bias, labels, reduction)
    _check(x_teacher, weight_teacher, bias_teacher, labels, reduction)
    if len(x) != len(x_teacher) or len(weight) != len(weight_teacher):
        raise ValueError(f"student and teacher must have equally many rows and classes, not {tuple(x.shape)} {tuple(weight.shape)} and "
                         f"{tuple(x_teacher.shape)} {tuple(weight_teacher.shape)}")
    if T <= 0:
        raise ValueError(f"the temperature T must be positive, not {T}")
    if not (uses_triton(x) and uses_triton(x_teacher)):
        return linear_kd_ref(x, weight, bias, x_teacher, weight_teacher, bias_teacher, labels, alpha=alpha, T=T,
                             ignore_index=ignore_index, reduction=reduction)
    teacher = [None if v is None or not alpha else v.detach() for v in (x_teacher, weight_teacher, bias_teacher)]
    return _fused(x, weight, bias, *teacher, labels, float(alpha), float(T), ignore_index, reduction)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, reduction: str) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"x (R, d), weight (V, d) and bias (V,) do not fit: {tuple(x.shape)}, {tuple(weight.shape)}"
                         + ("" if bias is None else f", {tuple(bias.shape)}"))
    if labels is not None and labels.shape != x.shape[:1]:
        raise ValueError(f"labels must be (R,) as x (R, d), not {tuple(labels.shape)} and {tuple(x.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, not {reduction!r}")


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None,
           labels: Tensor | None, alpha: float, T: float, ignore_index: int, reduction: str) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, x_t = x.to(dtype), None if x_t is None else x_t.to(dtype)
    needs = [torch.is_grad_enabled() and v is not None and v.requires_grad for v in (x, weight, bias)]
    total = _linear_loss(x, weight, bias, x_t, weight_t, bias_t, labels, alpha, T, ignore_index, *needs)[0]
    return _reduce(total, len(x), labels, ignore_index, reduction)
