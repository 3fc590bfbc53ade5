"""A linear layer and its loss in one call, so that the logits of a large vocabulary need not be kept.

Here the plain reference, which does keep them.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_ref(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
                             ignore_index: int = -100) -> Tensor:
    """`linear_cross_entropy` in plain PyTorch: logits in the dtype of `x`, loss in at least fp32."""
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels,
                           ignore_index=ignore_index, reduction="none")


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
                         ignore_index: int = -100) -> Tensor:
    """Cross-entropy of `x @ weight.T + bias`: x (R, d), weight (V, d), bias (V,), labels (R,) -> (R,) fp32."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x (R, d) and weight (V, d) do not fit: {tuple(x.shape)}, {tuple(weight.shape)}")
    return linear_cross_entropy_ref(x, weight, bias, labels, ignore_index)
