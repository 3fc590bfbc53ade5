"""Bidirectional attention over unpadded sequences.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        over the tokens j of the sequence that token i is in

`attention` is the one public function; `attention_ref` is the plain PyTorch it must agree with: the CPU path, the oracle of
the tests and the baseline of the benchmark.
"""
import itertools

import torch
from torch import Tensor


def random_keep(shape: torch.Size, p: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Boolean mask, each element kept with probability 1 - p (to 1/65536), from 16 random bits an element."""
    n = shape.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:n].view(shape) >= round(p * 65536) - 32768


def attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0,
                  seed: Tensor | int | None = None, scale: float | None = None,
                  prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """`attention`, one run of neighbours of equal length after another: on a CPU this beats padding, whose masks and dead
    rows cost more. (Callers who sort a batch by length get long runs.)"""
    N, H, D = q.shape
    scale = D ** -0.5 if scale is None else scale
    generator = None if seed is None else torch.Generator(q.device).manual_seed(int(seed))
    runs = [(length, len(list(group))) for length, group in itertools.groupby(cu_seqlens.diff().tolist())]
    out = []
    # split, not slices: its backward is one concatenation instead of a zero-filled (N, H, D) for every run
    for (S, B), *qkv in zip(runs, *(x.split([S * B for S, B in runs]) for x in (q * scale, k, v))):
        q_r, k_r, v_r = (x.reshape(B, S, H, D).transpose(1, 2) for x in qkv)              # (B, H, S, D)
        p = _softmax(q_r @ k_r.mT)                                                        # (B, H, S, S)
        if dropout_p:
            p = p * random_keep(p.shape, dropout_p, generator, p.device).to(p.dtype).mul_(1 / (1 - dropout_p))
        out.append((p @ v_r).transpose(1, 2).reshape(B * S, H, D))
    out = torch.cat(out)
    if prefix_kv is not None:
        k_p, v_p, gate = prefix_kv
        s = torch.einsum("nhd,phd->nhp", q * scale, k_p.to(q.dtype))
        out = out + gate.to(q.dtype)[:, None] * torch.einsum("nhp,phd->nhd", _softmax(s), v_p.to(q.dtype))
    return out


def _softmax(s: Tensor) -> Tensor:
    """Over the last dimension with at least fp32 arithmetic, result in the dtype of `s`."""
    return s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float = 0.0,
              seed: Tensor | int | None = None, scale: float | None = None,
              prefix_kv: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Attention in which each of B sequences sees itself only.

    q, k, v      (N, H, D), any strides: the tokens of all sequences end to end
    cu_seqlens   (B+1,) int32, where each sequence begins, then N; empty sequences are allowed
    max_seqlen   length of the longest
    dropout_p    probability with which an attention weight is dropped; kept ones are scaled by 1 / (1 - p)
    seed         of the dropout mask; None draws from torch's default generator
    scale        of the scores; None is D ** -0.5
    prefix_kv    learned keys (P, H, D), values (P, H, D) and gate (H,): adds gate_h * softmax(scale q k_p^T) v_p, so a zero
                 gate is no prefix at all (Zhang et al., 2023, LLaMA-Adapter, without their tanh)
    Returns      (N, H, D). Raises ValueError where shapes do not fit.
    """
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must be (N, H, D) and alike, not {[tuple(x.shape) for x in (q, k, v)]}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (B+1,) int32, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    return attention_ref(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed, scale=scale, prefix_kv=prefix_kv)
