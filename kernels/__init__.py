"""Fused operations, each with its plain PyTorch reference beside it. Needs torch (and triton) only; knows nothing of rt.

    from kernels import attention, attention_kd, hidden_mse, kd_loss, linear_cross_entropy, linear_kd, top_k
"""
from kernels.attention import attention
from kernels.attention_kd import attention_kd
from kernels.hidden_mse import hidden_mse
from kernels.kd_loss import TopK, kd_loss, top_k
from kernels.linear_loss import linear_cross_entropy, linear_kd

__all__ = ["TopK", "attention", "attention_kd", "hidden_mse", "kd_loss", "linear_cross_entropy", "linear_kd", "top_k"]
