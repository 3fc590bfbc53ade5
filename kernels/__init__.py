"""Fused operations, each with its plain PyTorch reference beside it. Needs torch (and triton) only; knows nothing of rt.

    from kernels import attention, kd_loss, hidden_mse, linear_cross_entropy
"""
from kernels.attention import attention
from kernels.attention_kd import attention_kd
from kernels.kd_loss import hidden_mse, kd_loss
from kernels.linear_loss import linear_cross_entropy

__all__ = ["attention", "attention_kd", "hidden_mse", "kd_loss", "linear_cross_entropy"]
