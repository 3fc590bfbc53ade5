"""Fused operations, each with a plain PyTorch reference in the same file. Needs only torch (and triton); does not use rt. All kernels are
tested in Triton's interpreter and on an H100, and compiled for sm_80, 90 and 100.

    from kernels import attention_qkv, kd_loss, linear_cross_entropy        # __all__ below names the others
"""
from kernels.add_norm import add_norm, layer_norm
from kernels.attention import attention, attention_qkv
from kernels.attention_kd import attention_kd
from kernels.dropout import dropout, site_seeds
from kernels.hidden_mse import hidden_mse, states_mse
from kernels.kd_loss import kd_loss
from kernels.linear_loss import linear_cross_entropy, linear_kd

__all__ = ["add_norm", "attention", "attention_kd", "attention_qkv", "dropout", "hidden_mse", "kd_loss", "layer_norm",
           "linear_cross_entropy", "linear_kd", "site_seeds", "states_mse"]
