"""Residual, dropout and layer norm in one: y = LN(x + dropout(h)).

    z = x + keep h / (1 - p)        y = (z - mean) / sqrt(var + eps) * weight + bias        over the d columns of a row

The sum and its statistics are fp32 (in the reference: of the wider dtype of x and h); y has the dtype of h, so that under autocast the
residual stream is as narrow as the matrix products that read it. `weight` and `bias` may hold K rows, for K runs side by side.
"""
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import dropout_ref


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of (N, d) by weight and bias (d,) or (K, d)."""
    d = z.shape[-1]
    if weight.ndim == bias.ndim == 1:
        return F.layer_norm(z, (d,), weight, bias, eps)
    K = len(weight) if weight.ndim == 2 else len(bias)
    weight, bias = (x.unsqueeze(-2) for x in (weight, bias))
    return (F.layer_norm(z, (d,), eps=eps).view(K, -1, d) * weight + bias).view(z.shape)


def add_norm_ref(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None) -> Tensor:
    dropped = h if seed is None or p == 0.0 else dropout_ref(h, p, seed)
    return layer_norm(x + dropped, weight, bias, eps).to(h.dtype)


def add_norm(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """LN(x + dropout(h)).

    x, h           (N, d); x may be wider than h in dtype
    weight, bias   (d,), or (K, d): row n is normalised by row n // (N / K) of them
    p, seed        of the dropout, as in kernels.dropout; seed None: nothing is dropped
    Returns        (N, d) in the dtype of h. Raises ValueError where shapes do not fit.
    """
    own = [t.shape[-1] == x.shape[-1] and (t.ndim == 1 or len(x) % len(t) == 0) for t in (weight, bias)]
    if x.ndim != 2 or x.shape != h.shape or not all(own):
        raise ValueError(f"x and h must be (N, d) and alike, weight and bias (d,) or (K, d) with K a divisor of N, not "
                         f"{[tuple(t.shape) for t in (x, h, weight, bias)]}")
    return add_norm_ref(x, h, weight, bias, eps, p, seed)
