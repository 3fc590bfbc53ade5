"""What a delta puts into an encoder that the base has not. Freshly reset, each leaves the encoder's function as it was."""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from rt.errors import InputError
from rt.formats.untrusted import is_number, is_whole
from rt.model import Encoder, Linear, init_weights, linear


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


KINDS = ("full", "adapter", "lora", "bitfit", "prefix")


USED = {"adapter": ("bottleneck",), "lora": ("r", "lora_alpha", "target_modules"), "prefix": ("prefix_len",)}


# what PEFT's target_modules mean here: the Linear of a Block, and for the fused qkv which third of its output rows
TARGETS = {"query": ("qkv", 0), "key": ("qkv", 1), "value": ("qkv", 2), "attention.output.dense": ("attention_output", None),
           "intermediate.dense": ("intermediate", None), "output.dense": ("output", None)}


@dataclass(frozen=True)
class DeltaConfig:
    """A kind of delta and its settings; settings of other kinds are ignored."""
    kind: str = "adapter"
    bottleneck: int = 24
    r: int = 8
    lora_alpha: float = 16.0
    target_modules: tuple[str, ...] = ("query", "value")
    prefix_len: int = 16

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"delta {self.kind!r}: not one of {', '.join(KINDS)}")
        for name in ("bottleneck", "r", "prefix_len"):
            if not is_whole(getattr(self, name), 1):
                raise InputError(f"{name} {getattr(self, name)!r} of a delta: must be a whole number above zero")
        if not is_number(self.lora_alpha):
            raise InputError(f"lora_alpha {self.lora_alpha!r} of a delta: must be a number")
        for name in self.target_modules:
            if not isinstance(name, str) or name not in TARGETS:
                raise InputError(f"target module {name!r}: not one of {', '.join(TARGETS)}")

    @property
    def used(self) -> dict:
        """The kind and the settings that it uses: two deltas with equal ones have equal tensors."""
        return {k: getattr(self, k) for k in ("kind", *USED.get(self.kind, ()))}


def _is_trained(kind: str, name: str) -> bool:
    """Whether the base's own weight `name` is trained by this kind."""
    return {"full": True, "bitfit": name.endswith(".bias"), "adapter": "norm." in name}.get(kind, False)


def _plug_in(encoder: Encoder, config: DeltaConfig) -> list[nn.Module]:
    """Fill the slots of `encoder` and return what was put there, not yet initialised."""
    d, heads = encoder.config.hidden_size, encoder.config.num_heads
    new: list[nn.Module] = []
    for block in encoder.layers:
        if config.kind == "adapter":
            block.adapter_attention, block.adapter_ffn = Adapter(d, config.bottleneck), Adapter(d, config.bottleneck)
            new += [block.adapter_attention, block.adapter_ffn]
        elif config.kind == "prefix":
            block.prefix = Prefix(config.prefix_len, heads, d // heads)
            new.append(block.prefix)
        elif config.kind == "lora":
            for linear_name in dict.fromkeys(TARGETS[t][0] for t in config.target_modules):
                targets = {t: TARGETS[t][1] for t in config.target_modules if TARGETS[t][0] == linear_name}
                linear = getattr(block, linear_name)
                linear.lora = LoRA(linear, targets, config.r, config.lora_alpha)
                new.append(linear.lora)
    return new
