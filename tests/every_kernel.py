"""python tests/every_kernel.py DEVICE runs every kernel once, forward and backward, on small ragged inputs and prints "done"."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from kernels import (
    add_norm,
    attention,
    attention_kd,
    attention_qkv,
    dropout,
    hidden_mse,
    kd_loss,
    linear_cross_entropy,
    linear_kd,
    states_mse,
)


def inputs(device: str, dtype: torch.dtype = torch.float16) -> dict:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype).requires_grad_()

    shapes = {"qkv": (76, 3, 2, 32), "teacher_qk": (76, 2, 2, 64), "prefix_k": (7, 2, 32), "prefix_v": (7, 2, 32), "gate": (2,),
              "student": (13, 37), "teacher": (13, 37), "states": (3, 2, 40), "cache": (9, 2, 40), "x": (13, 24), "y": (13, 24),
              "w": (37, 24), "b": (37,), "residual": (76, 64), "norm_weight": (2, 64), "norm_bias": (64,)}
    return {name: randn(*shape) for name, shape in shapes.items()} | {
        "cu": torch.tensor([0, 5, 5, 75, 76], dtype=torch.int32, device=device), "labels": torch.randint(37, (13,), generator=g).to(device),
        "rows": torch.tensor([8, 0, 3], device=device), "seed": torch.tensor([5], device=device),
        "seeds": torch.tensor([5, 6], device=device)}


def step(i: dict) -> list[torch.Tensor]:
    """The gradients of all inputs."""
    q, k, v = i["qkv"].unbind(1)
    loss = attention(q, k, v, i["cu"], 70, dropout_p=0.1, seed=i["seed"], prefix_kv=(i["prefix_k"], i["prefix_v"], i["gate"])).sum()
    h = attention_qkv(i["qkv"], i["cu"], 70, dropout_p=0.1, seed=i["seeds"]).flatten(1)
    h = add_norm(i["residual"], h, i["norm_weight"], i["norm_bias"], 1e-5, 0.1, i["seeds"])
    loss = loss + (dropout(h, 0.1, i["seeds"]) * i["residual"].detach()).sum()
    loss = loss + attention_kd(q, k, *i["teacher_qk"].unbind(1), i["cu"], 70).sum()
    for teacher in (i["teacher"], None):
        loss = loss + kd_loss(i["student"], teacher, i["labels"], alpha=0.5, T=2.0).mean()
    loss = loss + hidden_mse(i["states"], i["cache"], i["rows"]).mean()
    loss = loss + states_mse([i["x"], i["x"] * 2], [i["y"], i["y"]], i["w"][:2, 0].float())
    linear = i["x"], i["w"], i["b"]
    loss = loss + linear_cross_entropy(*linear, i["labels"]) + linear_kd(*linear, i["x"], i["w"], i["b"], i["labels"], alpha=0.5, T=2.0)
    names = ("qkv", "prefix_k", "prefix_v", "gate", "student", "states", "x", "w", "b", "residual", "norm_weight", "norm_bias")
    return torch.autograd.grad(loss, [i[name] for name in names])


if __name__ == "__main__":
    assert all(torch.isfinite(g).all() for g in step(inputs(sys.argv[1])))
    print("done")
