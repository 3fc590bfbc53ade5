"""Bidirectional attention over unpadded sequences.

    out_i = sum_j keep_ij / (1 - p) softmax_j(scale q_i . k_j) v_j        over the tokens j of the sequence that token i is in

Forward: one program per block of queries of one sequence and head, with an online softmax over blocks of keys in base 2 (Dao et al.,
2022; Milakov & Gimelshein, 2018). It saves log2-sum-exp2 per row. Backward: P is recomputed from that. With delta_i = out_i . dout_i

    dV = (keep P / (1-p))^T dout    dP = keep (dout V^T) / (1-p)    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

dQ is computed in one of two ways. `_backward_keys` loops over the queries for one block of keys and adds its share of dQ in fp32 with
atomics: five matrix products per tile. Under torch.use_deterministic_algorithms, `_backward_queries` computes dQ in a second launch that
recomputes S and dP: seven products. For 32 x 512 tokens, H 12, D 64, this is 64 GFLOP and 0.3 GB of L2 and memory traffic against 90
GFLOP. The atomics win if matrix products run below 0.7 PFLOP/s.

keep is a function of the seed, the head and the two tokens (kernels/dropout.py). It is recomputed whenever it is needed.

Limits: D up to 128 (32, 64 and 128 natively, others padded); fp16, bf16, and fp32 by three TF32 products (slower, and with the split
backward only); fp32 sums; within a sequence, tokens times the token stride stay below 2^31. float64 takes the reference. Not
differentiable twice. Tested in Triton's interpreter; compiled for sm_80, 90, 100.
"""
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs
from kernels.attention_kernels import _backward_keys, _backward_queries, _backward_rows, _forward, programs
from kernels.common import LOG2E, check_cu_seqlens, dense_rows, launch, op, uses_triton
from kernels.dropout import check_seed, dropout_words, threshold_of, words_ref

WIDTHS = (32, 64, 128)   # head dimensions of the kernels
PREFIX_ROWS = 512       # queries that share a partial sum of a prefix's gradients


# ---------------------------------------------------------------- reference

def attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0,
                  seed: Tensor | int | None = None, scale: float | None = None,
                  prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """`attention`, one group of sequences of equal length at a time. On a CPU this beats padding, whose masks and dead rows cost more. If
    the sequences are not sorted by length, they are sorted first and the result is put back in order."""
    N, H, D = q.shape
    scale = D ** -0.5 if scale is None else scale
    lengths = [n for n in cu_seqlens.diff().tolist() if n] or [0]      # empty sequences at the end must not make a sorted batch unsorted
    inputs = [q * scale, k, v]
    seed = _seed(seed, q.device) if dropout_p else None     # drawn once: all three streams share one seed
    words = [words_ref(seed, stream, H, N) for stream in range(3)] if dropout_p else []
    order = None if lengths == sorted(lengths) else _by_length(cu_seqlens)
    if order is not None:
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(N, device=order.device))
        lengths, inputs, words = sorted(lengths), [_Permute.apply(x, order, back) for x in inputs], [w[:, order] for w in words]
    runs = [(S, len(list(group))) for S, group in itertools.groupby(lengths)]
    parts = [S * B for S, B in runs]
    out = []
    # split, not slices: its backward is one concatenation instead of a zero-filled (N, H, D) per run
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
        result = _Permute.apply(result, back, order)
    return result if prefix_kv is None else result + _prefix(q * scale, *prefix_kv)


class _Permute(torch.autograd.Function):
    """x[order]. Its gradient is read by the inverse permutation instead of added row by row."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Permute.apply(dy, back, order), None, None


def _by_length(cu_seqlens: Tensor) -> Tensor:
    """(N,) token indices, sequence by sequence, the shortest sequence first."""
    lengths = cu_seqlens.diff()
    order = lengths.argsort(stable=True)
    ends = lengths[order].cumsum(0)
    first = cu_seqlens[order].to(ends.dtype) - (ends - lengths[order])
    return torch.arange(int(cu_seqlens[-1]), device=ends.device) + first.repeat_interleave(lengths[order])


def _prefix(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """(N, H, D): what a learned prefix adds for scaled queries (N, H, D). With K prefixes, k and v are (K, P, H, D) and gate is (K, H),
    and each prefix is for its own N / K tokens."""
    k, v, gate = (x.to(q.dtype) if x.ndim > n else x[None].to(q.dtype) for x, n in ((k, 3), (v, 3), (gate, 1)))
    s = torch.einsum("knhd,kphd->knhp", q.view(len(k), -1, *q.shape[1:]), k)
    return (gate[:, None, :, None] * torch.einsum("knhp,kphd->knhd", s.softmax(-1), v)).reshape(q.shape)


def _seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """(1,) or (K,) int64 on the device. If none is given it is drawn there, so a captured CUDA graph draws a new seed at every replay."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).reshape(-1).contiguous()
    return torch.full((1,), seed, device=device, dtype=torch.int64)


# ---------------------------------------------------------------- ops

Outputs = tuple[Tensor, Tensor, Tensor]


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, scale: float,
                    dropout_p: float, shared: bool) -> Outputs:
    N, H, D = q.shape
    out, lse = torch.empty(N, H, D, dtype=q.dtype, device=q.device), torch.empty(H, N, device=q.device)
    dropped = "_dropout" if dropout_p else ""
    words = torch.empty((H, N, 4) if dropout_p else (0,), dtype=torch.int32, device=q.device)
    if dropout_p:
        launch(dropout_words, -(-N // 256) * H, seed, words, N, H, N // len(seed), -(-N // 256), BLOCK=256)
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_forward" + dropped, size_class(D, max_seqlen), q.dtype, q.device)
    B = len(cu_seqlens) - 1
    count, blocks = programs(N, B, max_seqlen, BLOCK_Q)
    launch(_forward, count * H, q, k, v, out, lse, cu_seqlens, words, *_strides(q, k, v), N, H, B, blocks, len(k), scale * LOG2E,
           threshold_of(dropout_p), 1 / (1 - dropout_p), D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0,
           SHARED=shared, num_warps=warps, num_stages=stages)
    return out, lse, words


def _launch_backward(dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                     words: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, shared: bool) -> None:
    """Fill dq, dk, dv: heads of D contiguous numbers side by side, any stride between tokens, but the same stride for dk and dv."""
    (N, H, D), B, P, dropped = q.shape, len(cu_seqlens) - 1, len(k), "_dropout" if dropout_p else ""
    dout, rows = dout.contiguous(), torch.empty(H, N, 4 if dropout_p else 2, dtype=torch.int32, device=q.device)
    BLOCK = 8192 // (D * q.element_size())      # 8 KB per tile
    blocks = -(-N // BLOCK)
    launch(_backward_rows, blocks * H, out, dout, lse, words, rows, N, H, blocks, D=D, DROPOUT=dropout_p > 0, BLOCK=BLOCK)
    atomic = q.dtype != torch.float32 and not torch.are_deterministic_algorithms_enabled()
    sums = torch.zeros(N, H, D, dtype=torch.float32, device=q.device) if atomic else dq
    longest = P if shared else max_seqlen
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_backward_keys", size_class(D, longest), q.dtype, q.device)
    count, blocks = programs(B * P if shared else N, B, longest, BLOCK_K)
    scales = scale, scale * LOG2E, threshold_of(dropout_p), 1 / (1 - dropout_p)
    launch(_backward_keys, count * H, q, k, v, dout, rows, sums, dk, dv, cu_seqlens, words, *_strides(q, k, v), dk.stride(0),
           N, H, B, blocks, P, *scales, D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0, SHARED=shared, ATOMIC=atomic,
           num_warps=warps, num_stages=stages)
    if atomic:
        dq.copy_(sums)
        return
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_backward_queries" + dropped, size_class(D, max_seqlen), q.dtype, q.device)
    count, blocks = programs(N, B, max_seqlen, BLOCK_Q)
    launch(_backward_queries, count * H, q, k, v, dout, rows, dq, cu_seqlens, words, *_strides(q, k, v), dq.stride(0), N, H, B, blocks, P,
           *scales, D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0, SHARED=shared, num_warps=warps,
           num_stages=stages)


@op
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, scale: float,
               dropout_p: float, shared: bool) -> Outputs:
    """out (N, H, D), log2-sum-exp2 of the scaled scores (H, N), and the dropout words (H, N, 4) int32, empty without dropout.
    With `shared`, k and v are (P, H, D) and all queries see them."""
    return _launch_forward(q, k, v, cu_seqlens, seed, max_seqlen, scale, dropout_p, shared)


@op
def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, words: Tensor,
                        cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, shared: bool) -> Outputs:
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    (N, H, D), B, P = q.shape, len(cu_seqlens) - 1, len(k)
    dq = torch.empty(N, H, D, device=q.device, dtype=q.dtype)
    dk, dv = (torch.empty(B * P if shared else N, H, D, device=q.device, dtype=torch.float32 if shared else k.dtype) for _ in range(2))
    _launch_backward(dq, dk, dv, dout, q, k, v, out, lse, words, cu_seqlens, max_seqlen, scale, dropout_p, shared)
    if shared:
        dk, dv = (x.view(B, P, H, D).sum(0).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, _, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, dwords):
    if dout is None:
        return (None,) * 9
    return *_attention_backward(dout, *ctx.saved_tensors, *ctx.rest), *(None,) * 6


_attention.register_autograd(_differentiate, setup_context=_save)


@op
def _attention_qkv(qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, scale: float, dropout_p: float) -> Outputs:
    """`_attention` of the three rows of qkv (N, 3, H, D)."""
    return _launch_forward(*dense_rows(qkv)[0].unbind(1), cu_seqlens, seed, max_seqlen, scale, dropout_p, False)


@op
def _attention_qkv_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, words: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                            scale: float, dropout_p: float) -> Tensor:
    """dqkv (N, 3, H, D)."""
    dqkv = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    _launch_backward(*dqkv.unbind(1), dout, *dense_rows(qkv)[0].unbind(1), out, lse, words, cu_seqlens, max_seqlen, scale, dropout_p, False)
    return dqkv


def _save_qkv(ctx, inputs, output):
    qkv, cu_seqlens, _, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate_qkv(ctx, dout, dlse, dwords):
    dqkv = None if dout is None else _attention_qkv_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return dqkv, *(None,) * 5


_attention_qkv.register_autograd(_differentiate_qkv, setup_context=_save_qkv)


def size_class(D: int, longest: int) -> int:
    """The `size` of a row of configs.TABLE: the head dimension, negative if every sequence fits one small block."""
    return D if longest > 64 else -D


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:2])


# ---------------------------------------------------------------- public

def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0,
              seed: Tensor | int | None = None, scale: float | None = None,
              prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Attention within each of B sequences. Nothing waits for the device.

    q, k, v      (N, H, D), any strides with a contiguous last dimension: the tokens of all sequences end to end
    cu_seqlens   (B+1,) int32: the start of each sequence, then N; empty sequences are allowed
    max_seqlen   length of the longest sequence, or more
    dropout_p    probability that an attention weight is dropped; kept weights are scaled by 1 / (1 - p)
    seed         seed of the dropout mask, an int or an int64 tensor (1,); None draws from torch's default generator. (K,): for K runs
                 side by side, each with its own N / K tokens
    scale        scale of the scores; None is D ** -0.5. A scale that is not positive takes the reference
    prefix_kv    learned keys (P, H, D), values (P, H, D) and gate (H,): adds gate_h * softmax(scale q k_p^T) v_p, so a zero
                 gate means no prefix (Zhang et al., 2023, LLaMA-Adapter, without their tanh); or K prefixes, with a leading K
    Returns      (N, H, D). Raises ValueError if shapes do not fit.
    """
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must be (N, H, D) and alike, not {[tuple(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {[x.dtype for x in (q, k, v)]}")
    _check(len(q), cu_seqlens, dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not uses_triton(q) or scale <= 0:
        return attention_ref(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed, scale=scale, prefix_kv=prefix_kv)
    cu_seqlens, seed = cu_seqlens.contiguous(), _seed(seed, q.device) if dropout_p else None
    out = _widened_attention(q, k, v, cu_seqlens, seed, max_seqlen, scale, dropout_p, False)
    if prefix_kv is not None and prefix_kv[0].ndim == 4:
        return out + _prefix(q * scale, *prefix_kv)
    if prefix_kv is not None:
        k_p, v_p, gate = (x.to(q.dtype) for x in prefix_kv)
        runs = torch.arange(0, len(q) + PREFIX_ROWS, PREFIX_ROWS, device=q.device, dtype=torch.int32).clamp_(max=len(q))
        out = out + gate[:, None] * _widened_attention(q, k_p, v_p, runs, None, PREFIX_ROWS, scale, 0.0, True)
    return out


def attention_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0, seed: Tensor | int | None = None,
                  scale: float | None = None, prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """`attention` of the packed projection qkv (N, 3, H, D); q, k and v are its rows 0, 1 and 2. The kernels write one gradient of that
    shape. Autograd would copy three gradients into it, and does so with a prefix or head dimensions other than 32, 64 and 128."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (N, 3, H, D), not {tuple(qkv.shape)}")
    N, _, _, D = qkv.shape
    if prefix_kv is not None or D not in WIDTHS or not uses_triton(qkv) or scale is not None and scale <= 0:
        return attention(*qkv.unbind(1), cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed, scale=scale, prefix_kv=prefix_kv)
    _check(N, cu_seqlens, dropout_p, seed)
    cu_seqlens, seed = cu_seqlens.contiguous(), _seed(seed, qkv.device) if dropout_p else None
    return _attention_qkv(qkv, cu_seqlens, seed, max_seqlen, D ** -0.5 if scale is None else scale, dropout_p)[0]


def _check(N: int, cu_seqlens: Tensor, dropout_p: float, seed: Tensor | int | None) -> None:
    check_cu_seqlens(cu_seqlens)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, not {dropout_p}")
    if dropout_p and isinstance(seed, Tensor):
        check_seed(N, seed.reshape(-1))


def _widened_attention(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
    return _attention(*widened(q, k, v), *rest)[0][..., :q.shape[-1]]


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors with heads padded with zeros to the kernels' next head dimension, and a contiguous last dimension."""
    D = tensors[0].shape[-1]
    wide = next((size for size in WIDTHS if size >= D), None)
    if wide is None:
        raise ValueError(f"heads of {D} dimensions: the kernels go up to 128; RT_KERNELS=ref takes any")
    return [F.pad(x, (0, wide - D)) if D < wide else x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
