"""Distillation of attention maps (the objective of MiniLM, Wang et al., 2020) without storing the maps. Per query row i and head:

    KL_i = sum_j P^t_ij (log P^t_ij - log P^s_ij)      P^s = softmax_j(scale_s q^s_i . k^s_j), P^t likewise, j in the sequence of i

Forward: an online softmax of student and teacher together, in base 2. With the running maxima m, s' = s - m^s and t' = t - m^t, the
sums l^s = sum exp2(s'), l^t = sum exp2(t') and gap = sum exp2(t') (t' - s') give

    KL = ln 2 (gap / l^t + log2(l^s / l^t))

All subtracted numbers are small. Shifting a row of scores changes no map and costs no digits, and equal maps give 0 up to
rounding. New maxima shift s' and t' by one constant each per row, so gap grows by l^t times the difference of the two constants.

Backward: dKL_i / dS^s_ij = P^s_ij - P^t_ij, both computed from the saved log2-sum-exp2. With the upstream gradient g_i

    dQ_i = scale_s g_i sum_j (P^s - P^t)_ij K_j        dK_j = scale_s sum_i g_i (P^s - P^t)_ij Q_i

Each gradient is one launch of the same kernel, with rows and columns swapped. That is six matrix products per tile in total and no
atomics, so the order of summation is fixed. Memory is linear in tokens.

Limits: head dimensions up to 128 (32, 64 and 128 natively, others padded); fp32 (three TF32 products), fp16 and bf16. Student and teacher
may differ in dimension and dtype. Sums are fp32. In fp16, scale the loss: small gradients would become 0. Within a sequence, tokens times
the token stride stay below 2^31. float64 takes the reference. Not differentiable twice.
"""
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs
from kernels.attention import _strides, size_class, widened
from kernels.attention_kernels import RUNTIME, _locate, _product, _tile, programs
from kernels.common import LOG2E, check_cu_seqlens, launch, op, tl, triton, uses_triton
from kernels.dropout import bits, bits_tile, column

# ---------------------------------------------------------------- reference

def attention_kd_ref(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
                     scale_s: float | None = None, scale_t: float | None = None) -> Tensor:
    """`attention_kd` with the maps, one run of adjacent sequences of equal length at a time; fp32 arithmetic, float64 if an input is."""
    H, scale_s, scale_t = q_s.shape[1], _scale(scale_s, q_s), _scale(scale_t, q_t)
    dtype = torch.promote_types(torch.promote_types(q_s.dtype, q_t.dtype), torch.float32)
    runs = [(length, len(list(group))) for length, group in itertools.groupby(n for n in cu_seqlens.diff().tolist() if n)] or [(0, 1)]
    parts = [S * B for S, B in runs]
    out = []
    for (S, B), *qk in zip(runs, *(x.to(dtype).split(parts) for x in (q_s, k_s, q_t, k_t))):
        qs, ks, qt, kt = (x.reshape(B, S, H, x.shape[-1]).transpose(1, 2) for x in qk)                      # (B, H, S, D)
        log_s, log_t = (scale_s * qs @ ks.mT).log_softmax(-1), (scale_t * qt @ kt.mT).log_softmax(-1)       # (B, H, S, S)
        out.append(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).transpose(1, 2).reshape(B * S, H))
    return torch.cat(out)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


# ---------------------------------------------------------------- forward

@triton.jit
def _scores(x, x_ptr, y_ptr, x_stride, y_stride, xs, ys, length, D: tl.constexpr):
    """x y^T for rows `xs` of x, already loaded, and rows `ys` of y."""
    y = _tile(y_ptr, y_stride, ys, length, D)
    return _product(x, x_ptr, x_stride, xs, length, y, y_ptr, y_stride, ys, length, D)


@triton.jit
def _online_kl(gap, m_s, l_s, m_t, l_t, s, t, scale_s, scale_t, inside, TAIL: tl.constexpr):
    """Add one block of products, with positive scales: rescale the sums so far to the new maxima, then add the block's sums."""
    if TAIL:    # not -inf, because t - s would be NaN: exp2 of -1e30 is 0 too, and subtracting a maximum leaves -1e30 unchanged
        s, t = tl.where(inside, s, -1e30), tl.where(inside, t, -1e30)
    max_s, max_t = tl.maximum(m_s, tl.max(s, 1) * scale_s), tl.maximum(m_t, tl.max(t, 1) * scale_t)
    s, t = s * scale_s - max_s[:, None], t * scale_t - max_t[:, None]
    p = tl.exp2(t)
    shrink = tl.exp2(m_t - max_t)
    gap = (gap + l_t * ((m_t - max_t) - (m_s - max_s))) * shrink + tl.sum(p * (t - s), 1)
    l_t = l_t * shrink + tl.sum(p, 1)
    l_s = l_s * tl.exp2(m_s - max_s) + tl.sum(tl.exp2(s), 1)
    return gap, max_s, l_s, max_t, l_t


@triton.jit(do_not_specialize=RUNTIME)
def _kd_forward(q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr,     # (N, H, D_S) x 2, (N, H, D_T) x 2
                kl_ptr, lse_ptr, cu_ptr,                # (N, H), (H, 2, N), (B+1,)
                q_s_stride, q_s_head, k_s_stride, k_s_head, q_t_stride, q_t_head, k_t_stride, k_t_head, N, H, B, blocks,
                scale_s, scale_t, D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """KL and both log2-sum-exp2 of BLOCK_Q queries. Both scales include the factor log2(e)."""
    block, h, start, length = _locate(cu_ptr, blocks, B, H, BLOCK_Q)
    if block * BLOCK_Q >= length:
        return
    q_s_ptr += start * q_s_stride + h * q_s_head
    q_t_ptr += start * q_t_stride + h * q_t_head
    k_s_ptr += start * k_s_stride + h * k_s_head
    k_t_ptr += start * k_t_stride + h * k_t_head
    rows, cols = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_s, q_t = _tile(q_s_ptr, q_s_stride, rows, length, D_S), _tile(q_t_ptr, q_t_stride, rows, length, D_T)
    zero = tl.zeros((BLOCK_Q,), tl.float32)
    gap, m_s, l_s, m_t, l_t = zero, zero - 1e30, zero, zero - 1e30, zero        # finite maxima make l_t * (m_t - ..) start at 0
    full = length // BLOCK_K * BLOCK_K
    for n in range(0, full, BLOCK_K):       # only the last block needs a mask
        s = _scores(q_s, q_s_ptr, k_s_ptr, q_s_stride, k_s_stride, rows, n + cols, length, D_S)
        t = _scores(q_t, q_t_ptr, k_t_ptr, q_t_stride, k_t_stride, rows, n + cols, length, D_T)
        gap, m_s, l_s, m_t, l_t = _online_kl(gap, m_s, l_s, m_t, l_t, s, t, scale_s, scale_t, None, False)
    if full < length:
        s = _scores(q_s, q_s_ptr, k_s_ptr, q_s_stride, k_s_stride, rows, full + cols, length, D_S)
        t = _scores(q_t, q_t_ptr, k_t_ptr, q_t_stride, k_t_stride, rows, full + cols, length, D_T)
        gap, m_s, l_s, m_t, l_t = _online_kl(gap, m_s, l_s, m_t, l_t, s, t, scale_s, scale_t, full + cols[None, :] < length, True)
    inside = rows < length
    tl.store(kl_ptr + (start + rows) * H + h, 0.6931471805599453 * (gap / l_t + tl.log2(l_s / l_t)), mask=inside)
    lse_ptr += 2 * h * N + start + rows     # the student's; the teacher's is N further on
    tl.store(lse_ptr, m_s + tl.log2(l_s), mask=inside)
    tl.store(lse_ptr + N, m_t + tl.log2(l_t), mask=inside)


# ---------------------------------------------------------------- backward

@triton.jit(do_not_specialize=RUNTIME)
def _kd_backward(x_s_ptr, y_s_ptr, x_t_ptr, y_t_ptr,        # (N, H, D_S) x 2, (N, H, D_T) x 2
                 rows_ptr, dx_ptr, cu_ptr,                  # (H, N, 4), (N, H, D_S), (B+1,)
                 x_s_stride, x_s_head, y_s_stride, y_s_head, x_t_stride, x_t_head, y_t_stride, y_t_head, N, H, B, blocks,
                 scale, scale_s, scale_t, D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
                 X_IS_Q: tl.constexpr):
    """The gradient of BLOCK_X rows of x, summed over all rows of y. X_IS_Q: x holds the queries and y the keys; otherwise the reverse.
    `scale` is the student's; scale_s and scale_t include the factor log2(e)."""
    block, h, start, length = _locate(cu_ptr, blocks, B, H, BLOCK_X)
    if block * BLOCK_X >= length:
        return
    x_s_ptr += start * x_s_stride + h * x_s_head
    x_t_ptr += start * x_t_stride + h * x_t_head
    y_s_ptr += start * y_s_stride + h * y_s_head
    y_t_ptr += start * y_t_stride + h * y_t_head
    rows_ptr += (h * N + start) * 4
    xs = block * BLOCK_X + tl.arange(0, BLOCK_X)
    x_s, x_t = _tile(x_s_ptr, x_s_stride, xs, length, D_S), _tile(x_t_ptr, x_t_stride, xs, length, D_T)
    if X_IS_Q:
        lse_s, lse_t = bits(rows_ptr, xs, length, 0, 4)[:, None], bits(rows_ptr, xs, length, 1, 4)[:, None]
    dx = tl.zeros((BLOCK_X, D_S), tl.float32)
    for n in range(0, length, BLOCK_Y):
        ys = n + tl.arange(0, BLOCK_Y)
        if not X_IS_Q:
            row = bits_tile(rows_ptr, ys, length, 4)        # for queries past the end lse = g = 0: P is finite, and g removes it
            lse_s, lse_t, g = column(row, 0), column(row, 1), column(row, 2)
            lse_s, lse_t = lse_s[None, :], lse_t[None, :]
        p_s = tl.exp2(_scores(x_s, x_s_ptr, y_s_ptr, x_s_stride, y_s_stride, xs, ys, length, D_S) * scale_s - lse_s)
        p_t = tl.exp2(_scores(x_t, x_t_ptr, y_t_ptr, x_t_stride, y_t_stride, xs, ys, length, D_T) * scale_t - lse_t)
        if X_IS_Q:      # g is applied at the end, where no 16-bit type rounds it; keys past the end have P = exp2(-lse), possibly inf
            ds = tl.where(ys[None, :] < length, p_s - p_t, 0.0)
        else:
            ds = (p_s - p_t) * g[None, :]
        y_s = _tile(y_s_ptr, y_s_stride, ys, length, D_S)
        dx = tl.dot(ds.to(y_s.dtype), y_s, dx, input_precision="tf32x3")
    if X_IS_Q:
        dx = dx * bits(rows_ptr, xs, length, 2, 4)[:, None]
    place = (start * H + h) * D_S + xs[:, None] * (H * D_S) + tl.arange(0, D_S)[None, :]
    tl.store(dx_ptr + place, (dx * scale).to(dx_ptr.dtype.element_ty), mask=xs[:, None] < length)


# ---------------------------------------------------------------- ops

def _pick(kernel: str, q_s: Tensor, q_t: Tensor, max_seqlen: int) -> tuple[int, ...]:
    """The table row for the larger of student and teacher."""
    dtype = max(q_s.dtype, q_t.dtype, key=lambda d: d.itemsize)
    return configs.pick(kernel, size_class(max(q_s.shape[-1], q_t.shape[-1]), max_seqlen), dtype, q_s.device)


@op
def _attention_kd(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale_s: float,
                  scale_t: float) -> tuple[Tensor, Tensor]:
    """KL (N, H) and the log2-sum-exp2 of the scaled scores (H, 2, N) of student and teacher."""
    N, H, D_S = q_s.shape
    kl, lse = torch.empty(N, H, device=q_s.device), torch.empty(H, 2, N, device=q_s.device)
    BLOCK_Q, BLOCK_K, warps, stages = _pick("attention_kd_forward", q_s, q_t, max_seqlen)
    B = len(cu_seqlens) - 1
    count, blocks = programs(N, B, max_seqlen, BLOCK_Q)
    launch(_kd_forward, count * H, q_s, k_s, q_t, k_t, kl, lse, cu_seqlens, *_strides(q_s, k_s, q_t, k_t), N, H, B, blocks,
           scale_s * LOG2E, scale_t * LOG2E, D_S=D_S, D_T=q_t.shape[-1], BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, num_warps=warps,
           num_stages=stages)
    return kl, lse


@op
def _attention_kd_backward(g: Tensor, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, lse: Tensor, cu_seqlens: Tensor,
                           max_seqlen: int, scale_s: float, scale_t: float) -> tuple[Tensor, Tensor]:
    """dq_s and dk_s from the gradient g (N, H) of the KL."""
    N, H, D_S = q_s.shape
    rows = torch.stack([*lse.unbind(1), g.T, g.T], -1)      # side by side per query, see bits_tile
    grads = tuple(torch.empty(N, H, D_S, dtype=x.dtype, device=x.device) for x in (q_s, k_s))
    BLOCK_X, BLOCK_Y, warps, stages = _pick("attention_kd_backward", q_s, q_t, max_seqlen)
    B = len(cu_seqlens) - 1
    count, blocks = programs(N, B, max_seqlen, BLOCK_X)
    for dx, xy, x_is_q in zip(grads, ((q_s, k_s, q_t, k_t), (k_s, q_s, k_t, q_t)), (True, False)):
        launch(_kd_backward, count * H, *xy, rows, dx, cu_seqlens, *_strides(*xy), N, H, B, blocks, scale_s,
               scale_s * LOG2E, scale_t * LOG2E, D_S=D_S, D_T=q_t.shape[-1], BLOCK_X=BLOCK_X, BLOCK_Y=BLOCK_Y, X_IS_Q=x_is_q,
               num_warps=warps, num_stages=stages)
    return grads


def _save(ctx, inputs, output):
    q_s, k_s, q_t, k_t, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(q_s, k_s, q_t, k_t, output[1], cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g, dlse):
    grads = (None, None) if g is None else _attention_kd_backward(g, *ctx.saved_tensors, *ctx.rest)
    return *grads, *(None,) * 6


_attention_kd.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------- public

def attention_kd(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
                 scale_s: float | None = None, scale_t: float | None = None) -> Tensor:
    """KL(teacher's attention map || student's attention map) per query row and head. Nothing waits for the device.

    q_s, k_s          (N, H, D_s), the student's, any strides with a contiguous last dimension, as in `attention`
    q_t, k_t          (N, H, D_t), the teacher's; they get no gradient
    cu_seqlens        (B+1,) int32: the start of each sequence, then N; empty sequences are allowed
    max_seqlen        length of the longest sequence, or more
    scale_s, scale_t  scales of the scores; None is D ** -0.5. A scale that is not positive takes the reference
    Returns           (N, H) fp32, in nats; float64 if the student's or the teacher's are. Raises ValueError if shapes or dtypes do not fit.
    """
    if q_s.ndim != 3 or k_s.shape != q_s.shape or k_t.shape != q_t.shape or q_s.shape[:2] != q_t.shape[:-1]:
        raise ValueError("q_s and k_s must be (N, H, D_s) and alike, q_t and k_t (N, H, D_t) with the same N and H, not "
                         f"{[tuple(x.shape) for x in (q_s, k_s, q_t, k_t)]}")
    if q_s.dtype != k_s.dtype or q_t.dtype != k_t.dtype:
        raise ValueError(f"q_s and k_s must be of one dtype, and so must q_t and k_t, not {[x.dtype for x in (q_s, k_s, q_t, k_t)]}")
    check_cu_seqlens(cu_seqlens)
    q_t, k_t, scale_s, scale_t = q_t.detach(), k_t.detach(), _scale(scale_s, q_s), _scale(scale_t, q_t)
    if not (uses_triton(q_s) and uses_triton(q_t)) or min(scale_s, scale_t) <= 0:
        return attention_kd_ref(q_s, k_s, q_t, k_t, cu_seqlens, max_seqlen, scale_s=scale_s, scale_t=scale_t)
    return _attention_kd(*widened(q_s, k_s), *widened(q_t, k_t), cu_seqlens.contiguous(), max_seqlen, scale_s, scale_t)[0]
