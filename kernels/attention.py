"""Bidirectional attention over unpadded sequences.

    out_i = sum_j keep_ij / (1 - p) softmax_j(scale q_i . k_j) v_j        over the tokens j of the sequence that token i is in

Forward: one program per block of queries of one sequence and head, with an online softmax over blocks of keys in base 2 (Dao et al.,
2022; Milakov & Gimelshein, 2018). It saves log2-sum-exp2 per row. Backward: P is recomputed from that. With delta_i = out_i . dout_i

    dV = (keep P / (1-p))^T dout    dP = keep (dout V^T) / (1-p)    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

The backward takes two launches: `_backward_queries` computes dQ and delta, `_backward_keys` dK and dV. Both compute S and dP, which makes
seven matrix products per tile. A single launch needs five if each block of keys adds its share of dQ in fp32 with atomics. On an H100 it
was slower in all six cases (.338 against .271 ms for 32 x 512 tokens, H 12, D 64: results/gpu), and the order of its sums varied.

keep is a function of the seed, the head and the two tokens (kernels/dropout.py). It is recomputed whenever it is needed.

Limits: D up to 128 (32, 64 and 128 natively, others padded); fp16, bf16, and fp32 by three TF32 products (slower); fp32 sums; within a
sequence, tokens times the token stride stay below 2^31. float64 takes the reference. Not differentiable twice.
"""
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs
from kernels.attention_kernels import _backward_keys, _backward_queries, _forward, programs
from kernels.common import LOG2E, check_cu_seqlens, dense_rows, launch, op, uses_triton
from kernels.dropout import check_dropout, dropout_words, threshold_of, words_ref

WIDTHS = (32, 64, 128)   # head dimensions of the kernels


# ---------------------------------------------------------------- reference

def attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0,
                  seed: Tensor | int | None = None, scale: float | None = None,
                  prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """`attention` in plain PyTorch, one group of sequences of equal length at a time. On a CPU this is faster than padding, which computes
    masks and unused rows. Unless sequences of equal length are neighbours, they are sorted first, and the result is put back in order."""
    N, H, D = q.shape
    scale = D ** -0.5 if scale is None else scale
    lengths = [n for n in cu_seqlens.diff().tolist() if n] or [0]
    inputs = [q * scale, k, v]
    seed = _seed(seed, q.device) if dropout_p else None     # drawn once: all three streams share one seed
    words = [words_ref(seed, stream, H, N) for stream in range(3)] if dropout_p else []
    order = None if len([*itertools.groupby(lengths)]) == len({*lengths}) else _by_length(cu_seqlens)
    if order is not None:
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(N, device=order.device))
        lengths, inputs, words = sorted(lengths), [_Permute.apply(x, order, back) for x in inputs], [w[:, order] for w in words]
    groups = [(S, len(list(same))) for S, same in itertools.groupby(lengths)]     # B sequences of length S each
    parts, out = [S * B for S, B in groups], []
    # split, not slices: its backward is one concatenation instead of a zero-filled (N, H, D) per group
    abcs = zip(*(w.split(parts, 1) for w in words)) if words else itertools.repeat(None)
    for (S, B), abc, *qkv in zip(groups, abcs, *(x.split(parts) for x in inputs)):
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
    return lengths.repeat_interleave(lengths).argsort(stable=True)      # tokens by the length of their sequence


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
        return seed.to(device).reshape(-1).contiguous()
    return torch.full((1,), seed, device=device, dtype=torch.int64)


# ---------------------------------------------------------------- ops

@op
def _attention(qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, scale: float,
               dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """out (N, H, D), log2-sum-exp2 of the scaled scores (H, N), and the dropout words (H, N, 4) int32, empty without dropout."""
    q, k, v = dense_rows(qkv)[0].unbind(1)
    N, H, D = q.shape
    out, lse = torch.empty(N, H, D, dtype=q.dtype, device=q.device), torch.empty(H, N, device=q.device)
    variant = "_dropout" if dropout_p else ""
    words = torch.empty((H, N, 4) if dropout_p else (0,), dtype=torch.int32, device=q.device)
    if dropout_p:
        launch(dropout_words, -(-N // 256) * H, seed, words, N, H, N // len(seed), -(-N // 256), BLOCK=256)
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_forward" + variant, size_class(D, max_seqlen), q.dtype, q.device)
    B = len(cu_seqlens) - 1
    count, blocks = programs(N, B, max_seqlen, BLOCK_Q)
    launch(_forward, count * H, q, k, v, out, lse, cu_seqlens, words, *_strides(q, k, v), N, H, B, blocks, scale * LOG2E,
           threshold_of(dropout_p), 1 / (1 - dropout_p), D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0,
           num_warps=warps, num_stages=stages)
    return out, lse, words


@op
def _attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, words: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                        scale: float, dropout_p: float) -> Tensor:
    """dqkv (N, 3, H, D)."""
    dqkv = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    (q, k, v), (dq, dk, dv) = dense_rows(qkv)[0].unbind(1), dqkv.unbind(1)
    (N, H, D), B, variant = q.shape, len(cu_seqlens) - 1, "_dropout" if dropout_p else ""
    dout, rows = dout.contiguous(), torch.empty(H, N, 4 if dropout_p else 2, dtype=torch.int32, device=q.device)     # for _backward_keys
    scales = scale, scale * LOG2E, threshold_of(dropout_p), 1 / (1 - dropout_p)
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_backward_queries" + variant, size_class(D, max_seqlen), q.dtype, q.device)
    count, blocks = programs(N, B, max_seqlen, BLOCK_Q)
    launch(_backward_queries, count * H, q, k, v, out, dout, lse, rows, dq, cu_seqlens, words, *_strides(q, k, v), dq.stride(0), N, H, B,
           blocks, *scales, D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0, num_warps=warps, num_stages=stages)
    BLOCK_Q, BLOCK_K, warps, stages = configs.pick("attention_backward_keys" + variant, size_class(D, max_seqlen), q.dtype, q.device)
    count, blocks = programs(N, B, max_seqlen, BLOCK_K)
    launch(_backward_keys, count * H, q, k, v, dout, rows, dk, dv, cu_seqlens, words, *_strides(q, k, v), dk.stride(0), N, H, B, blocks,
           *scales, D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, DROPOUT=dropout_p > 0, num_warps=warps, num_stages=stages)
    return dqkv


def _save(ctx, inputs, output):
    qkv, cu_seqlens, _, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, dwords):
    dqkv = None if dout is None else _attention_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return dqkv, *(None,) * 5


_attention.register_autograd(_differentiate, setup_context=_save)


def size_class(D: int, longest: int) -> int:
    """The `size` of a row of configs.TABLE: the head dimension, negative if every sequence fits one small block."""
    return D if longest > 64 else -D


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:2])


# ---------------------------------------------------------------- public

def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    """`attention_qkv` of separate q, k and v, (N, H, D) each, which are copied side by side."""
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must be (N, H, D) and alike, not {[tuple(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {[x.dtype for x in (q, k, v)]}")
    return attention_qkv(torch.stack([q, k, v], 1), *args, **options)


def attention_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0, seed: Tensor | int | None = None,
                  scale: float | None = None, prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Attention within each of B sequences. Nothing waits for the device, unless the seed is a tensor on the CPU.

    qkv          (N, 3, H, D): queries, keys and values of the tokens of all sequences end to end
    cu_seqlens   (B+1,) int32: the start of each sequence, then N; empty sequences are allowed
    max_seqlen   length of the longest sequence, or more
    dropout_p    probability that an attention weight is dropped; kept weights are scaled by 1 / (1 - p)
    seed         seed of the dropout mask: an int, or int64 (1,), or (K,) for K runs side by side, each with its own N / K tokens; None
                 draws one on the device. A captured CUDA graph repeats an int
    scale        scale of the scores; None is D ** -0.5. A scale that is not positive takes the reference
    prefix_kv    learned keys (P, H, D), values (P, H, D) and gate (H,): adds gate_h * softmax(scale q k_p^T) v_p, so a zero
                 gate means no prefix (Zhang et al., 2023, LLaMA-Adapter, without their tanh); or K prefixes, with a leading K
    Returns      (N, H, D). Raises ValueError if qkv, cu_seqlens, dropout_p or seed do not fit, or if D > 128 for the kernels, and
                 RuntimeError if prefix_kv does not fit.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (N, 3, H, D), not {tuple(qkv.shape)}")
    N, _, _, D = qkv.shape
    check_cu_seqlens(cu_seqlens)
    seed = _seed(seed, qkv.device) if dropout_p else None
    if seed is not None:
        check_dropout(N, dropout_p, seed)
    scale = D ** -0.5 if scale is None else scale
    if not uses_triton(qkv) or scale <= 0:
        return attention_ref(*qkv.unbind(1), cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed, scale=scale, prefix_kv=prefix_kv)
    out = _attention(*widened(qkv), cu_seqlens.contiguous(), seed, max_seqlen, scale, dropout_p)[0][..., :D]
    return out if prefix_kv is None else out + _prefix(qkv.unbind(1)[0] * scale, *prefix_kv)


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors with heads padded with zeros to the kernels' next head dimension, and a contiguous last dimension."""
    D = tensors[0].shape[-1]
    wide = next((size for size in WIDTHS if size >= D), None)
    if wide is None:
        raise ValueError(f"heads of {D} dimensions: the kernels go up to 128; RT_KERNELS=ref takes any")
    return dense_rows(*(F.pad(x, (0, wide - D)) if D < wide else x for x in tensors))
