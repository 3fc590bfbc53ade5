"""The Triton kernels of kernels/attention.py. That file says what they compute and when each is launched."""
from kernels.common import tl, triton
from kernels.dropout import bits, bits_tile, column, kept

RUNTIME = ["N", "H", "B", "blocks", "threshold"]      # not recompiled if they are 1 or a multiple of 16


# ---------------------------------------------------------------- scheduling

def programs(N: int, B: int, longest: int, BLOCK: int) -> tuple[int, int]:
    """The number of programs per head for blocks of BLOCK tokens (B sequences, N tokens in total, at most `longest` in one), and the
    number per sequence. The second is 0 if that would be more programs than N // BLOCK + B. Then sequence b gets the programs from
    cu_seqlens[b] // BLOCK + b on: never too few, and at most one too many."""
    blocks, packed = -(-longest // BLOCK), N // BLOCK + B
    return (B * blocks, blocks) if B * blocks <= packed else (packed, 0)


@triton.jit
def _locate(cu_ptr, blocks, B, H, BLOCK: tl.constexpr):
    """The block and head a program works on (see `programs`), the first token of its sequence, and the sequence's length."""
    i, h = tl.program_id(0) // H, tl.program_id(0) % H
    if blocks > 0:
        b, block = i // blocks, i % blocks
    else:
        b = i * 0 - 1
        for first in range(0, B, 256):
            n = first + tl.arange(0, 256)
            b += tl.sum(((n < B) & (tl.load(cu_ptr + n, mask=n < B, other=0) // BLOCK + n <= i)).to(tl.int32))
        block = i - tl.load(cu_ptr + b) // BLOCK - b
    start = tl.load(cu_ptr + b).to(tl.int64)
    return block, h.to(tl.int64), start, (tl.load(cu_ptr + b + 1) - start).to(tl.int32)


@triton.jit
def _tile(ptr, stride, rows, length, D: tl.constexpr):
    """(len(rows), D) from row-major memory, zeros past `length`."""
    return tl.load(ptr + rows[:, None] * stride + tl.arange(0, D)[None, :], mask=rows[:, None] < length, other=0.0)


@triton.jit
def _product(x, x_ptr, x_stride, xs, x_length, y, y_ptr, y_stride, ys, y_length, D: tl.constexpr):
    """x y^T of two tiles. An fp32 product by three TF32 products keeps two parts of every number, too many for the registers at D 128.
    So fp32 tiles are loaded again, 32 dimensions at a time; the compiler drops the tiles passed in if nothing else uses them."""
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
                    words_ptr, threshold, D: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr):
    """One block of keys: rescale the sums so far to the new maximum m, add exp2(s - m) to total and exp2(s - m) v to acc."""
    k = _tile(k_ptr, k_stride, cols, keys, D)
    s = _product(q, q_ptr, q_stride, rows, length, k, k_ptr, k_stride, cols, keys, D)
    if TAIL:
        s = tl.where(cols[None, :] < keys, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)      # qk_scale is positive
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(s * qk_scale - m_new[:, None])
    total = total * shrink + tl.sum(p, 1)       # the softmax is normalised before weights are dropped
    if DROPOUT:
        c = column(bits_tile(words_ptr, cols, keys, 4), 2)
        p = kept(a[:, None] * c[None, :] + b[:, None], threshold, p, p)[0]
    v = _tile(v_ptr, v_stride, cols, keys, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return acc, m_new, total


@triton.jit(do_not_specialize=RUNTIME)
def _forward(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_ptr, words_ptr,    # (N, H, D) x 4, (H, N), (B+1,), (H, N, 4)
             q_stride, q_head, k_stride, k_head, v_stride, v_head,        # strides between tokens and heads, in elements
             N, H, B, blocks, qk_scale, threshold, keep_scale,
             D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr):
    """One block of BLOCK_Q queries."""
    block, h, start, length = _locate(cu_ptr, blocks, B, H, BLOCK_Q)
    if block * BLOCK_Q >= length:
        return
    q_ptr += start * q_stride + h * q_head
    k_ptr += start * k_stride + h * k_head
    v_ptr += start * v_stride + h * v_head
    rows, cols = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q = _tile(q_ptr, q_stride, rows, length, D)
    a, b = rows, rows       # placeholders: without dropout nothing reads them
    if DROPOUT:
        words_ptr += (h * N + start) * 4
        a, b = bits(words_ptr, rows, length, 0, 4), bits(words_ptr, rows, length, 1, 4)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    full = length // BLOCK_K * BLOCK_K
    for n in range(0, full, BLOCK_K):       # only the last block needs a mask
        acc, m, total = _online_softmax(acc, m, total, q, q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, rows, length, n + cols,
                                        length, qk_scale, a, b, words_ptr, threshold, D, DROPOUT, False)
    if full < length:
        acc, m, total = _online_softmax(acc, m, total, q, q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, rows, length, full + cols,
                                        length, qk_scale, a, b, words_ptr, threshold, D, DROPOUT, True)
    inside = rows < length
    tl.store(lse_ptr + h * N + start + rows, m + tl.log2(total), mask=inside)
    out_ptr += (start * H + h) * D
    tl.store(out_ptr + rows[:, None] * (H * D) + tl.arange(0, D)[None, :],
             (acc * (keep_scale / total)[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])


# ---------------------------------------------------------------- backward

@triton.jit(do_not_specialize=RUNTIME)
def _backward_keys(q_ptr, k_ptr, v_ptr, dout_ptr, rows_ptr, dk_ptr, dv_ptr, cu_ptr, words_ptr,
                   q_stride, q_head, k_stride, k_head, v_stride, v_head, dk_stride, N, H, B, blocks, scale, qk_scale,
                   threshold, keep_scale, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr):
    """dK and dV of BLOCK_K keys, stored with stride dk_stride between tokens. Tiles are keys x queries, so neither P nor dS is
    transposed."""
    block, h, start, length = _locate(cu_ptr, blocks, B, H, BLOCK_K)
    if block * BLOCK_K >= length:
        return
    cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ptr += start * k_stride + h * k_head
    v_ptr += start * v_stride + h * v_head
    k, v = _tile(k_ptr, k_stride, cols, length, D), _tile(v_ptr, v_stride, cols, length, D)
    q_ptr += start * q_stride + h * q_head
    dout_ptr += (start * H + h) * D
    W: tl.constexpr = 4 if DROPOUT else 2
    rows_ptr += (h * N + start) * W
    if DROPOUT:
        c = bits(words_ptr + (h * N + start) * 4, cols, length, 2, 4)
    dk, dv = tl.zeros((BLOCK_K, D), tl.float32), tl.zeros((BLOCK_K, D), tl.float32)
    for n in range(0, length, BLOCK_Q):
        rows = n + tl.arange(0, BLOCK_Q)
        q = _tile(q_ptr, q_stride, rows, length, D)
        dout = _tile(dout_ptr, H * D, rows, length, D)
        row = bits_tile(rows_ptr, rows, length, W)      # past the end s = lse = dout = delta = 0, so p = 1 and dS = 0 add nothing
        lse, delta = column(row, 0).to(tl.float32, bitcast=True), column(row, 1).to(tl.float32, bitcast=True)
        s = _product(k, k_ptr, k_stride, cols, length, q, q_ptr, q_stride, rows, length, D)      # (keys, queries)
        p = tl.exp2(s * qk_scale - lse[None, :])
        dp = _product(v, v_ptr, v_stride, cols, length, dout, dout_ptr, H * D, rows, length, D)
        p_kept = p
        if DROPOUT:
            # a and b as one int64 until they are broadcast: as two vectors, Triton would convert two whole tiles to the products' layout
            ab = (column(row, 2).to(tl.int64) << 32 | column(row, 3).to(tl.uint32, bitcast=True).to(tl.int64))[None, :]
            ab = tl.broadcast_to(ab, (BLOCK_K, BLOCK_Q))
            p_kept, dp = kept((ab >> 32).to(tl.int32) * c[:, None] + ab.to(tl.int32), threshold, p, dp)
            dp *= keep_scale
        dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision="tf32x3")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="tf32x3")
    place = start * dk_stride + h * D + cols[:, None] * dk_stride + tl.arange(0, D)[None, :]
    inside = cols[:, None] < length
    tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + place, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_queries(q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, rows_ptr, dq_ptr, cu_ptr, words_ptr,
                      q_stride, q_head, k_stride, k_head, v_stride, v_head, dq_stride, N, H, B, blocks, scale, qk_scale,
                      threshold, keep_scale, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr):
    """dQ of BLOCK_Q queries. It also stores in rows_ptr, (H, N, 4) with dropout or (H, N, 2) without, what `_backward_keys` reads of each
    query: the bits of lse and of delta_i = out_i . dout_i = sum_j P_ij dP_ij, which the softmax's gradient subtracts from dP, and the
    words a and b."""
    block, h, start, length = _locate(cu_ptr, blocks, B, H, BLOCK_Q)
    if block * BLOCK_Q >= length:
        return
    k_ptr += start * k_stride + h * k_head
    v_ptr += start * v_stride + h * v_head
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < length
    q_ptr += start * q_stride + h * q_head
    dout_ptr += (start * H + h) * D
    q, dout = _tile(q_ptr, q_stride, rows, length, D), _tile(dout_ptr, H * D, rows, length, D)
    out = _tile(out_ptr + (start * H + h) * D, H * D, rows, length, D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse = tl.load(lse_ptr + h * N + start + rows, mask=inside, other=0.0)
    W: tl.constexpr = 4 if DROPOUT else 2
    j = tl.arange(0, W)[None, :]
    row = tl.where(j == 0, lse.to(tl.int32, bitcast=True)[:, None], delta.to(tl.int32, bitcast=True)[:, None])
    if DROPOUT:
        words_ptr += (h * N + start) * 4
        a, b = bits(words_ptr, rows, length, 0, 4), bits(words_ptr, rows, length, 1, 4)
        row = tl.where(j < 2, row, tl.where(j == 2, a[:, None], b[:, None]))
    tl.store(rows_ptr + (h * N + start + rows)[:, None] * W + j, row, mask=inside[:, None])
    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    for n in range(0, length, BLOCK_K):
        cols = n + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, k_stride, cols, length, D)
        s = _product(q, q_ptr, q_stride, rows, length, k, k_ptr, k_stride, cols, length, D) * qk_scale
        p = tl.where(cols[None, :] < length, tl.exp2(s - lse[:, None]), 0.0)
        v = _tile(v_ptr, v_stride, cols, length, D)
        dp = _product(dout, dout_ptr, H * D, rows, length, v, v_ptr, v_stride, cols, length, D)
        if DROPOUT:
            c = column(bits_tile(words_ptr, cols, length, 4), 2)
            dp = kept(a[:, None] * c[None, :] + b[:, None], threshold, dp, dp)[0] * keep_scale
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision="tf32x3")
    place = start * dq_stride + h * D + rows[:, None] * dq_stride + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + place, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])
