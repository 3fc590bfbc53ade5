"""Bidirectional attention over unpadded sequences.

    out_i = sum_j keep_ij / (1 - p) softmax_j(scale q_i . k_j) v_j        over the tokens j of the sequence that token i is in

Forward: one program for a block of queries of one sequence and head, online softmax over blocks of keys in base 2 (Dao et al.,
2022; Milakov & Gimelshein, 2018), saving log2-sum-exp2 a row. Backward: P is recomputed from it, and with delta_i = out_i . dout_i

    dV = (keep P / (1-p))^T dout    dP = keep (dout V^T) / (1-p)    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

Two ways to dQ. `_backward_keys` goes through the queries of one block of keys and adds its share of dQ in fp32 with atomics: five
matrix products a tile. Under torch.use_deterministic_algorithms `_backward_queries` makes dQ in a second launch, which recomputes S and
dP: seven. Counted for 32 x 512 tokens, H 12, D 64: 64 GFLOP and 0.3 GB of L2 and memory traffic against 90 GFLOP; the atomics win
wherever matrix products run below 0.7 PFLOP/s.

keep is a function of the seed, the head and the two tokens (kernels/dropout.py), made anew wherever it is needed.

Limits: D up to 128 (32, 64 and 128 as they are, others padded); fp16 and bf16, and fp32 by three TF32 products (slower, and the split
backward only); fp32 sums; within a sequence, tokens times the stride of a token stay below 2^31. float64 takes the reference. Not
differentiable twice. Tested in Triton's interpreter; compiled for sm_80, 90, 100.
"""
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs
from kernels.common import LOG2E, check_cu_seqlens, launch, tl, triton, uses_triton
from kernels.dropout import check_seed, dropout_words, keep_factor, threshold_of, word, words_ref

PREFIX_ROWS = 512       # queries that share a partial sum of a prefix's gradients
RUNTIME = ["N", "H", "blocks", "prefix_len", "threshold"]      # not compiled anew where they are 1 or a multiple of 16


# ---------------------------------------------------------------- reference

def attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0,
                  seed: Tensor | int | None = None, scale: float | None = None,
                  prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """`attention`, all sequences of one length after another: on a CPU this beats padding, whose masks and dead rows cost more. A batch
    whose sequences are not in order of length is put in order and back."""
    N, H, D = q.shape
    scale = D ** -0.5 if scale is None else scale
    lengths = cu_seqlens.diff().tolist()
    inputs = [q * scale, k, v]
    seed = _seed(seed, q.device) if dropout_p else None     # drawn once: all three streams are of one seed
    words = [words_ref(seed, stream, H, N) for stream in range(3)] if dropout_p else []
    order = None if lengths == sorted(lengths) else _by_length(cu_seqlens)
    if order is not None:
        lengths, inputs, words = sorted(lengths), [x[order] for x in inputs], [w[:, order] for w in words]
    runs = [(S, len(list(group))) for S, group in itertools.groupby(lengths)]
    parts = [S * B for S, B in runs]
    out = []
    # split, not slices: its backward is one concatenation instead of a zero-filled (N, H, D) for every run
    for (S, B), abc, *qkv in zip(runs, zip(*(w.split(parts, 1) for w in words)) if words else runs, *(x.split(parts) for x in inputs)):
        q_r, k_r, v_r = (x.reshape(B, S, H, D).transpose(1, 2) for x in qkv)              # (B, H, S, D)
        p = (q_r @ k_r.mT).softmax(-1)                                                    # (B, H, S, S)
        if dropout_p:
            a, b, c = (w.reshape(H, B, S).transpose(0, 1) for w in abc)                   # (B, H, S)
            keep = torch.addcmul(b[..., None], a[..., None], c[..., None, :]) >= threshold_of(dropout_p)
            p = p * keep.to(p.dtype)
        o = p @ v_r
        out.append((o * (1 / (1 - dropout_p)) if dropout_p else o).transpose(1, 2).reshape(B * S, H, D))
    result = torch.cat(out)
    if order is not None:
        result = torch.empty_like(result).index_copy(0, order, result)
    return result if prefix_kv is None else result + _prefix(q * scale, *prefix_kv)


def _by_length(cu_seqlens: Tensor) -> Tensor:
    """(N,) the tokens, sequence by sequence, the shortest sequence first."""
    lengths = cu_seqlens.diff()
    order = lengths.argsort(stable=True)
    ends = lengths[order].cumsum(0)
    first = cu_seqlens[order].to(ends.dtype) - (ends - lengths[order])
    return torch.arange(int(cu_seqlens[-1]), device=ends.device) + first.repeat_interleave(lengths[order])


def _prefix(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """(N, H, D): what a learned prefix adds for scaled queries (N, H, D); of K prefixes, k and v (K, P, H, D) and gate (K, H), each for
    its own N / K tokens."""
    k, v, gate = (x.to(q.dtype) if x.ndim > n else x[None].to(q.dtype) for x, n in ((k, 3), (v, 3), (gate, 1)))
    s = torch.einsum("knhd,kphd->knhp", q.view(len(k), -1, *q.shape[1:]), k)
    return (gate[:, None, :, None] * torch.einsum("knhp,kphd->knhd", s.softmax(-1), v)).reshape(q.shape)


def _seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """(1,) or (K,) int64 on the device; drawn there where none is given, so that a captured CUDA graph draws anew at every replay."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).reshape(-1).contiguous()
    return torch.full((1,), seed, device=device, dtype=torch.int64)


# ---------------------------------------------------------------- forward

@triton.jit
def _locate(cu_ptr, blocks, H):
    """Which block, head and sequence a program works on, the sequence's first token and its length."""
    pid = tl.program_id(0)
    b = pid // (blocks * H)
    start = tl.load(cu_ptr + b).to(tl.int64)
    return pid % blocks, (pid // blocks % H).to(tl.int64), b, start, (tl.load(cu_ptr + b + 1) - start).to(tl.int32)


@triton.jit
def _tile(ptr, stride, rows, length, D: tl.constexpr):
    """(len(rows), D) from row-major memory, zeros past `length`."""
    return tl.load(ptr + rows[:, None] * stride + tl.arange(0, D)[None, :], mask=rows[:, None] < length, other=0.0)


@triton.jit
def _product(x, x_ptr, x_stride, xs, x_length, y, y_ptr, y_stride, ys, y_length, D: tl.constexpr):
    """x y^T of two tiles. Of fp32 rows the parts that TF32 splits them into do not fit in registers: those are loaded anew, 32 dimensions
    at a time, and the tiles that came are dropped by the compiler where nothing else uses them."""
    if x.dtype == tl.float32:
        s = tl.zeros((xs.shape[0], ys.shape[0]), tl.float32)
        for d in range(0, D, 32):
            x_part, y_part = _tile(x_ptr + d, x_stride, xs, x_length, 32), _tile(y_ptr + d, y_stride, ys, y_length, 32)
            s = tl.dot(x_part, tl.trans(y_part), s, input_precision="tf32x3")
    else:
        s = tl.dot(x, tl.trans(y))
    return s


@triton.jit
def _online_softmax(acc, m, total, q, q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, rows, length, cols, keys, qk_scale, a, b,
                    words_ptr, N, H, threshold, D: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr):
    """One block of keys: rescale what was summed so far to the new maximum m, add exp2(s - m) to total, exp2(s - m) v to acc."""
    k = _tile(k_ptr, k_stride, cols, keys, D)
    s = _product(q, q_ptr, q_stride, rows, length, k, k_ptr, k_stride, cols, keys, D) * qk_scale
    if TAIL:
        s = tl.where(cols[None, :] < keys, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    total = total * shrink + tl.sum(p, 1)       # the softmax is normalised before weights are dropped
    if DROPOUT:
        c = word(words_ptr, 2, cols, keys, N, H)
        p *= keep_factor(a[:, None], b[:, None], c[None, :], threshold)
    v = _tile(v_ptr, v_stride, cols, keys, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return acc, m_new, total


@triton.jit(do_not_specialize=RUNTIME)
def _forward(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_ptr, words_ptr,    # (N, H, D) x 4, (H, N), (B+1,), (3, H, N)
             q_stride, q_head, k_stride, k_head, v_stride, v_head,        # elements from one token, or head, to the next
             N, H, blocks, prefix_len, qk_scale, threshold, keep_scale,
             D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr, SHARED: tl.constexpr):
    """One block of BLOCK_Q queries. SHARED: all sequences see the same prefix_len keys instead of their own."""
    block, h, _, start, length = _locate(cu_ptr, blocks, H)
    if block * BLOCK_Q >= length:
        return
    keys, key_start = (prefix_len, start * 0) if SHARED else (length, start)
    q_ptr += start * q_stride + h * q_head
    k_ptr += key_start * k_stride + h * k_head
    v_ptr += key_start * v_stride + h * v_head
    rows, cols = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q = _tile(q_ptr, q_stride, rows, length, D)
    a, b = rows, rows
    if DROPOUT:
        words_ptr += h * N + start
        a, b = word(words_ptr, 0, rows, length, N, H), word(words_ptr, 1, rows, length, N, H)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    full = keys // BLOCK_K * BLOCK_K
    for n in range(0, full, BLOCK_K):       # only the last block needs a mask
        acc, m, total = _online_softmax(acc, m, total, q, q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, rows, length, n + cols,
                                        keys, qk_scale, a, b, words_ptr, N, H, threshold, D, DROPOUT, False)
    if full < keys:
        acc, m, total = _online_softmax(acc, m, total, q, q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, rows, length, full + cols,
                                        keys, qk_scale, a, b, words_ptr, N, H, threshold, D, DROPOUT, True)
    inside = rows < length
    tl.store(lse_ptr + h * N + start + rows, m + tl.log2(total), mask=inside)
    out_ptr += (start * H + h) * D
    tl.store(out_ptr + rows[:, None] * (H * D) + tl.arange(0, D)[None, :],
             (acc * (keep_scale / total)[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])


# ---------------------------------------------------------------- backward

@triton.jit(do_not_specialize=RUNTIME)
def _backward_delta(out_ptr, dout_ptr, delta_ptr, N, H, blocks, D: tl.constexpr, BLOCK: tl.constexpr):   # (N, H, D) x 2, (H, N)
    """delta_i = out_i . dout_i = sum_j P_ij dP_ij, what the softmax's gradient takes off dP."""
    block, h = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out = _tile(out_ptr + h * D, H * D, rows, N, D).to(tl.float32)
    dout = _tile(dout_ptr + h * D, H * D, rows, N, D).to(tl.float32)
    tl.store(delta_ptr + h * N + rows, tl.sum(out * dout, 1), mask=rows < N)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_keys(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, cu_ptr, words_ptr,
                   q_stride, q_head, k_stride, k_head, v_stride, v_head, N, H, blocks, prefix_len, scale, qk_scale, threshold, keep_scale,
                   D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr, SHARED: tl.constexpr,
                   ATOMIC: tl.constexpr):
    """dK and dV of BLOCK_K keys, tiles laid keys x queries so that neither P nor dS is transposed for them. With ATOMIC also the
    keys' share of dQ (fp32). SHARED: the partial sums of one run of queries; the caller adds the runs up."""
    block, h, sequence, start, length = _locate(cu_ptr, blocks, H)
    keys, key_start, out_start = (prefix_len, start * 0, sequence.to(tl.int64) * prefix_len) if SHARED else (length, start, start)
    if block * BLOCK_K >= keys:
        return
    cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ptr += key_start * k_stride + h * k_head
    v_ptr += key_start * v_stride + h * v_head
    k, v = _tile(k_ptr, k_stride, cols, keys, D), _tile(v_ptr, v_stride, cols, keys, D)
    q_ptr += start * q_stride + h * q_head
    dout_ptr += (start * H + h) * D
    dq_ptr += (start * H + h) * D
    lse_ptr += h * N + start
    delta_ptr += h * N + start
    if DROPOUT:
        words_ptr += h * N + start
        c = word(words_ptr, 2, cols, keys, N, H)
    dk, dv = tl.zeros((BLOCK_K, D), tl.float32), tl.zeros((BLOCK_K, D), tl.float32)
    for n in range(0, length, BLOCK_Q):
        rows = n + tl.arange(0, BLOCK_Q)
        q = _tile(q_ptr, q_stride, rows, length, D)
        dout = _tile(dout_ptr, H * D, rows, length, D)
        lse = tl.load(lse_ptr + rows, mask=rows < length, other=float("inf"))       # p = 0 in rows past the end
        delta = tl.load(delta_ptr + rows, mask=rows < length, other=0.0)
        s = _product(k, k_ptr, k_stride, cols, keys, q, q_ptr, q_stride, rows, length, D)      # (keys, queries)
        p = tl.exp2(s * qk_scale - lse[None, :])
        if ATOMIC:      # keys past the end: their rows of dK and dV are not stored, but dQ is a sum over them
            p = tl.where(cols[:, None] < keys, p, 0.0)
        dp = _product(v, v_ptr, v_stride, cols, keys, dout, dout_ptr, H * D, rows, length, D)
        kept = p
        if DROPOUT:
            a, b = word(words_ptr, 0, rows, length, N, H), word(words_ptr, 1, rows, length, N, H)
            keep = keep_factor(a[None, :], b[None, :], c[:, None], threshold)
            kept, dp = p * keep, dp * keep * keep_scale
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision="tf32x3")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="tf32x3")
        if ATOMIC:
            tl.atomic_add(dq_ptr + rows[:, None] * (H * D) + tl.arange(0, D)[None, :],
                          tl.dot(tl.trans(ds), k, input_precision="tf32x3") * scale, mask=rows[:, None] < length, sem="relaxed")
    place = (out_start * H + h) * D + cols[:, None] * (H * D) + tl.arange(0, D)[None, :]
    inside = cols[:, None] < keys
    tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + place, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_queries(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_ptr, words_ptr,
                      q_stride, q_head, k_stride, k_head, v_stride, v_head, N, H, blocks, prefix_len, scale, qk_scale, threshold,
                      keep_scale, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
                      SHARED: tl.constexpr):
    """dQ of BLOCK_Q queries, in one order of summation: the deterministic way."""
    block, h, _, start, length = _locate(cu_ptr, blocks, H)
    if block * BLOCK_Q >= length:
        return
    keys, key_start = (prefix_len, start * 0) if SHARED else (length, start)
    k_ptr += key_start * k_stride + h * k_head
    v_ptr += key_start * v_stride + h * v_head
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < length
    q_ptr += start * q_stride + h * q_head
    dout_ptr += (start * H + h) * D
    q, dout = _tile(q_ptr, q_stride, rows, length, D), _tile(dout_ptr, H * D, rows, length, D)
    lse = tl.load(lse_ptr + h * N + start + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + h * N + start + rows, mask=inside, other=0.0)
    if DROPOUT:
        words_ptr += h * N + start
        a, b = word(words_ptr, 0, rows, length, N, H), word(words_ptr, 1, rows, length, N, H)
    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    for n in range(0, keys, BLOCK_K):
        cols = n + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, k_stride, cols, keys, D)
        s = _product(q, q_ptr, q_stride, rows, length, k, k_ptr, k_stride, cols, keys, D) * qk_scale
        p = tl.where(cols[None, :] < keys, tl.exp2(s - lse[:, None]), 0.0)
        v = _tile(v_ptr, v_stride, cols, keys, D)
        dp = _product(dout, dout_ptr, H * D, rows, length, v, v_ptr, v_stride, cols, keys, D)
        if DROPOUT:
            c = word(words_ptr, 2, cols, keys, N, H)
            dp *= keep_factor(a[:, None], b[:, None], c[None, :], threshold) * keep_scale
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision="tf32x3")
    place = (start * H + h) * D + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + place, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


# ---------------------------------------------------------------- ops

@torch.library.custom_op("recyclable::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, scale: float,
               dropout_p: float, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out (N, H, D), log2-sum-exp2 of the scaled scores (H, N), and the dropout's words (3, H, N) int32, none without dropout.
    With `shared`, k and v are (P, H, D), seen by all queries."""
    N, H, D = q.shape
    out, lse = torch.empty(N, H, D, dtype=q.dtype, device=q.device), torch.empty(H, N, device=q.device)
    words = torch.empty((3, H, N) if dropout_p else (0,), dtype=torch.int32, device=q.device)
    if dropout_p:
        launch(dropout_words, triton.cdiv(N, 256) * H, seed, words, N, H, N // len(seed), triton.cdiv(N, 256), BLOCK=256)
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_forward", size_class(D, max_seqlen), q.dtype, q.device)
    blocks = triton.cdiv(max_seqlen, BLOCK_Q)
    launch(_forward, blocks * H * (len(cu_seqlens) - 1), q, k, v, out, lse, cu_seqlens, words, *_strides(q, k, v), N, H, blocks, len(k),
           scale * LOG2E, threshold_of(dropout_p), 1 / (1 - dropout_p), D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0,
           SHARED=shared, num_warps=warps, num_stages=stages)
    return out, lse, words


@_attention.register_fake
def _(q, k, v, cu_seqlens, seed, max_seqlen, scale, dropout_p, shared):
    N, H, _ = q.shape
    return (q.new_empty(q.shape), q.new_empty(H, N, dtype=torch.float32),
            q.new_empty((3, H, N) if dropout_p else (0,), dtype=torch.int32))


@torch.library.custom_op("recyclable::attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, words: Tensor,
                        cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    N, H, D = q.shape
    B, P = len(cu_seqlens) - 1, len(k)
    dout, delta = dout.contiguous(), torch.empty(H, N, device=q.device)
    launch(_backward_delta, triton.cdiv(N, 64) * H, out, dout, delta, N, H, triton.cdiv(N, 64), D=D, BLOCK=64)
    atomic = q.dtype != torch.float32 and not torch.are_deterministic_algorithms_enabled()
    dq = (torch.zeros if atomic else torch.empty)(N, H, D, device=q.device, dtype=torch.float32 if atomic else q.dtype)
    dk, dv = (torch.empty(B * P if shared else N, H, D, device=q.device, dtype=torch.float32 if shared else k.dtype) for _ in range(2))
    longest = P if shared else max_seqlen
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_backward_keys", size_class(D, longest), q.dtype, q.device)
    blocks = triton.cdiv(longest, BLOCK_K)
    scales = scale, scale * LOG2E, threshold_of(dropout_p), 1 / (1 - dropout_p)
    launch(_backward_keys, blocks * H * B, q, k, v, dout, lse, delta, dq, dk, dv, cu_seqlens, words, *_strides(q, k, v), N, H, blocks, P,
           *scales, D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0, SHARED=shared, ATOMIC=atomic, num_warps=warps,
           num_stages=stages)
    if not atomic:
        BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_backward_queries", size_class(D, max_seqlen), q.dtype, q.device)
        blocks = triton.cdiv(max_seqlen, BLOCK_Q)
        launch(_backward_queries, blocks * H * B, q, k, v, dout, lse, delta, dq, cu_seqlens, words, *_strides(q, k, v), N, H, blocks, P,
               *scales, D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0, SHARED=shared, num_warps=warps, num_stages=stages)
    if shared:
        dk, dv = (x.view(B, P, H, D).sum(0).to(k.dtype) for x in (dk, dv))
    return dq.to(q.dtype), dk, dv


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, words, cu_seqlens, max_seqlen, scale, dropout_p, shared):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, _, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, dwords):
    if dout is None:
        return (None,) * 9
    return *_attention_backward(dout, *ctx.saved_tensors, *ctx.rest), *(None,) * 6


_attention.register_autograd(_differentiate, setup_context=_save)


def size_class(D: int, longest: int) -> int:
    """The `size` of a row of configs.TABLE: the head dimension; negative where all rows fit one small block."""
    return D if longest > 64 else -D


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:2])


# ---------------------------------------------------------------- public

def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0,
              seed: Tensor | int | None = None, scale: float | None = None,
              prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Attention in which each of B sequences sees itself only. Nothing waits for the device.

    q, k, v      (N, H, D), any strides with a contiguous last dimension: the tokens of all sequences end to end
    cu_seqlens   (B+1,) int32, where each sequence begins, then N; empty sequences are allowed
    max_seqlen   length of the longest, or more
    dropout_p    probability with which an attention weight is dropped; kept ones are scaled by 1 / (1 - p)
    seed         of the dropout mask, an int or an int64 tensor (1,); None draws from torch's default generator. (K,): of K runs side by
                 side, each with its own N / K tokens
    scale        of the scores; None is D ** -0.5
    prefix_kv    learned keys (P, H, D), values (P, H, D) and gate (H,): adds gate_h * softmax(scale q k_p^T) v_p, so a zero
                 gate is no prefix at all (Zhang et al., 2023, LLaMA-Adapter, without their tanh); or K of them, with a leading K
    Returns      (N, H, D). Raises ValueError where shapes do not fit.
    """
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must be (N, H, D) and alike, not {[tuple(x.shape) for x in (q, k, v)]}")
    check_cu_seqlens(cu_seqlens)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, not {dropout_p}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {[x.dtype for x in (q, k, v)]}")
    if dropout_p and isinstance(seed, Tensor):
        check_seed(len(q), seed.reshape(-1))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not uses_triton(q):
        return attention_ref(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed, scale=scale, prefix_kv=prefix_kv)
    cu_seqlens, seed = cu_seqlens.contiguous(), _seed(seed, q.device) if dropout_p else None
    out = _padded_attention(q, k, v, cu_seqlens, seed, max_seqlen, scale, dropout_p, False)
    if prefix_kv is not None and prefix_kv[0].ndim == 4:
        return out + _prefix(q * scale, *prefix_kv)
    if prefix_kv is not None:
        k_p, v_p, gate = (x.to(q.dtype) for x in prefix_kv)
        runs = torch.arange(0, len(q) + PREFIX_ROWS, PREFIX_ROWS, device=q.device, dtype=torch.int32).clamp_(max=len(q))
        out = out + gate[:, None] * _padded_attention(q, k_p, v_p, runs, None, PREFIX_ROWS, scale, 0.0, True)
    return out


def attention_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **arguments) -> Tensor:
    """`attention` of the packed projection (N, 3, H, D), with the same keyword arguments: q, k and v are its rows 0, 1, 2."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (N, 3, H, D), not {tuple(qkv.shape)}")
    return attention(*qkv.unbind(1), cu_seqlens, max_seqlen, **arguments)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
    return _attention(*padded(q, k, v), *rest)[0][..., :q.shape[-1]]


def padded(*tensors: Tensor) -> list[Tensor]:
    """Head dimensions between the kernels' own filled up with zeros, the last dimension contiguous."""
    D = tensors[0].shape[-1]
    wide = next((size for size in (32, 64, 128) if size >= D), None)
    if wide is None:
        raise ValueError(f"heads of {D} dimensions: the kernels go up to 128; RT_KERNELS=ref takes any")
    return [F.pad(x, (0, wide - D)) if D < wide else x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
