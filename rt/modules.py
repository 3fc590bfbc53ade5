"""What a delta puts into an encoder that the base has not. Freshly reset, each leaves the encoder's function as it was."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from rt.model import Linear, init_weights, linear


class Adapter(nn.Module):
    """x + up(gelu(down(x))). `up` starts at zero, so a new adapter is the identity."""

    def __init__(self, hidden_size: int, bottleneck: int):
        super().__init__()
        self.down = Linear(hidden_size, bottleneck)
        self.up = Linear(bottleneck, hidden_size)

    def reset(self, generator: torch.Generator) -> None:
        init_weights(self, generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class LoRA(nn.Module):
    """y + scaling * B A x on the output rows of each target of one Linear. B starts at zero."""

    def __init__(self, linear: nn.Linear, targets: dict[str, int | None], r: int, lora_alpha: float):
        super().__init__()
        rows = linear.out_features // (3 if None not in targets.values() else 1)
        self.first_row = {_key(name): (third or 0) * rows for name, third in targets.items()}
        self.A = nn.ParameterDict({_key(name): torch.empty(r, linear.in_features) for name in targets})
        self.B = nn.ParameterDict({_key(name): torch.empty(rows, r) for name in targets})
        self.scaling = lora_alpha / r

    def reset(self, generator: torch.Generator) -> None:
        for name, a in self.A.items():
            bound = 1 / math.sqrt(a.shape[1])       # kaiming_uniform_(a=sqrt(5)), as loralib and PEFT
            nn.init.uniform_(a, -bound, bound, generator=generator)
            nn.init.zeros_(self.B[name])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name, first in self.first_row.items():
            update = linear(linear(x, self.A[name]), self.B[name]) * self.scaling
            y = y + (update if update.shape == y.shape else F.pad(update, (first, y.shape[-1] - first - update.shape[-1])))
        return y

    def weight(self, linear: nn.Linear) -> Tensor:
        """The update as a matrix of the Linear's shape."""
        full = torch.zeros_like(linear.weight)
        for name, first in self.first_row.items():
            full[first:first + len(self.B[name])] += self.scaling * self.B[name] @ self.A[name]
        return full


def _key(target: str) -> str:
    return target.replace(".", "_")  # module names cannot hold a dot


class Prefix(nn.Module):
    """Keys and values of `prefix_len` learned positions for one layer, and a gate a head that starts at zero."""

    def __init__(self, prefix_len: int, num_heads: int, head_size: int):
        super().__init__()
        self.k = nn.Parameter(torch.empty(prefix_len, num_heads, head_size))
        self.v = nn.Parameter(torch.empty(prefix_len, num_heads, head_size))
        self.gate = nn.Parameter(torch.empty(num_heads))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.k, generator=generator)  # unit scale, about that of a trained layer's keys and values:
        nn.init.normal_(self.v, generator=generator)  # the gate's first gradient is proportional to v
        nn.init.zeros_(self.gate)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k, self.v, self.gate
