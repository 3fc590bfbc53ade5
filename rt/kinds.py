"""The kinds of delta: the modules each one adds to an encoder, the base weights it trains, and how two deltas of a kind are added.

    full      all encoder weights; the delta is tuned - base
    adapter   bottleneck modules after attention and after the FFN (Houlsby et al., 2019); the LNs are trained too
    lora      low-rank updates of the projections in target_modules (Hu et al., 2022)
    bitfit    the biases (Ben Zaken et al., 2022)
    prefix    learned keys and values in every layer (Li & Liang, 2021). They are read by a softmax of their own and added through a gate
              that starts closed (LLaMA-Adapter: Zhang et al., 2023)

To add a kind, write a module class with a `reset` that makes it the identity, add a row to KINDS, and put its settings in DeltaConfig.
"""
import math
from dataclasses import dataclass, field, replace
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt.errors import InputError
from rt.limits import PositiveInt
from rt.model import Block, Linear, init_weights, linear


@dataclass(frozen=True)
class DeltaConfig:
    """The kind of a delta and its settings. Settings of other kinds are ignored."""
    kind: str = "adapter"  # full, adapter, lora, bitfit or prefix
    bottleneck: PositiveInt = 24  # adapter
    r: PositiveInt = 8  # lora
    lora_alpha: float = 16.0  # lora
    target_modules: tuple[str, ...] = ("query", "value")  # lora
    prefix_len: PositiveInt = 16  # prefix

    def check(self) -> "DeltaConfig":
        """Returns this config. Raises InputError if no delta can have these settings."""
        for what, names, table in (("delta", [self.kind], KINDS), ("target module", self.target_modules, TARGETS)):
            if wrong := [name for name in names if not isinstance(name, str) or name not in table]:
                raise InputError(f"{what} {wrong[0]!r}: not one of {', '.join(table)}")
        for name in ("bottleneck", "r", "prefix_len"):
            if type(value := getattr(self, name)) is not int or not 0 < value < 2**31:
                raise InputError(f"{name} {value!r} of a delta: must be a whole number from 1 to 2147483647")
        if type(self.lora_alpha) not in (int, float) or not math.isfinite(self.lora_alpha) or self.lora_alpha == 0:
            raise InputError(f"lora_alpha {self.lora_alpha!r} of a delta: must be a finite number other than zero")
        if self.kind == "lora" and not self.target_modules:
            raise InputError(f"a lora delta without target_modules changes nothing: name some of {', '.join(TARGETS)}")
        return self

    @property
    def used(self) -> dict:
        """The kind and the settings it uses. Deltas of one base with equal `used` have tensors of the same names and shapes."""
        return {name: getattr(self, name) for name in ("kind", *(KINDS[self.kind].settings if self.kind in KINDS else ()))}

    @property
    def idle(self) -> list[str]:
        """The settings that differ from the defaults although the kind does not use them."""
        return [name for name, value in vars(self).items() if name not in self.used and value != getattr(DeltaConfig, name)]


# The role of a module's tensor in the algebra of rt/deltas.py. INPUT: a * d leaves it unchanged, d1 + d2 concatenates along dimension 0.
# OUTPUT: a * d scales it, d1 + d2 concatenates along dimension 1. ADDED: a * d scales it, d1 + d2 adds.
INPUT, OUTPUT, ADDED = "input", "output", "added"


@dataclass(frozen=True)
class Kind:
    """A row of KINDS. A module has `reset(generator)`. In a `lora` slot its forward maps a Linear's (input, output) to the new output; if
    it is mergeable, `weight(linear)` is the update of the Linear's weight."""
    modules: Callable[[Block, DeltaConfig], dict[str, nn.Module]] = lambda block, config: {}    # {slot: module}, not yet reset
    trains: Callable[[str], bool] = lambda name: False      # whether the base's weight of this name is trained
    settings: tuple[str, ...] = ()                          # the fields of DeltaConfig that this kind uses
    roles: dict[str, str] = field(default_factory=dict)     # substring of a tensor's name -> INPUT, OUTPUT or ADDED
    scaling: Callable[[DeltaConfig], float] = lambda config: 1.0            # the factor that a module multiplies its OUTPUT by
    joined: Callable[[DeltaConfig, DeltaConfig], DeltaConfig] | None = lambda a, b: a   # a sum's config, of scaling 1; None: no sums
    stacks: bool = False                                    # whether its modules take weights with a leading K (rt.model.linear)
    is_mergeable: bool = False                              # whether base + delta is a plain encoder: base + diffs + each `weight`


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


# PEFT's target_modules in a Block: the Linear and, for the fused qkv, which third of its output rows
TARGETS = {"query": ("qkv", 0), "key": ("qkv", 1), "value": ("qkv", 2), "attention.output.dense": ("attention_output", None),
           "intermediate.dense": ("intermediate", None), "output.dense": ("output", None)}


class LoRA(nn.Module):
    """Adds scaling * B A x to y on the output rows of each target of one Linear. B starts at zero."""
    def __init__(self, module: nn.Linear, targets: dict[str, int | None], r: int, lora_alpha: float):
        super().__init__()
        rows = module.out_features // (1 if None in targets.values() else 3)
        self.first_row = {target.replace(".", "_"): (third or 0) * rows for target, third in targets.items()}   # a name in A has no dot
        self.A = nn.ParameterDict({name: torch.empty(r, module.in_features) for name in self.first_row})
        self.B = nn.ParameterDict({name: torch.empty(rows, r) for name in self.first_row})
        self.scaling = lora_alpha / r

    def reset(self, generator: torch.Generator) -> None:
        for name, a in self.A.items():
            bound = 1 / math.sqrt(a.shape[1])       # kaiming_uniform_(a=sqrt(5)), as in loralib and PEFT
            nn.init.uniform_(a, -bound, bound, generator=generator)
            nn.init.zeros_(self.B[name])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name, first in self.first_row.items():
            update = linear(linear(x, self.A[name]), self.B[name]) * self.scaling
            y = y + (update if update.shape == y.shape else F.pad(update, (first, y.shape[-1] - first - update.shape[-1])))
        return y

    def weight(self, module: nn.Linear) -> Tensor:
        """The update as a matrix in the shape of the Linear's weight."""
        full = torch.zeros_like(module.weight)
        for name, first in self.first_row.items():
            full[first:first + len(self.B[name])] += self.scaling * self.B[name] @ self.A[name]
        return full


def loras(block: Block, c: DeltaConfig) -> dict[str, nn.Module]:
    """One LoRA per Linear, covering all targets in it."""
    targets: dict[str, dict[str, int | None]] = {}
    for target in c.target_modules:
        name, third = TARGETS[target]
        targets.setdefault(name, {})[target] = third
    return {f"{name}.lora": LoRA(getattr(block, name), own, c.r, c.lora_alpha) for name, own in targets.items()}


class Prefix(nn.Module):
    """Learned keys and values at `prefix_len` positions for one layer, and one gate per head that starts at zero."""
    def __init__(self, prefix_len: int, num_heads: int, head_size: int):
        super().__init__()
        self.k = nn.Parameter(torch.empty(prefix_len, num_heads, head_size))
        self.v = nn.Parameter(torch.empty(prefix_len, num_heads, head_size))
        self.gate = nn.Parameter(torch.empty(num_heads))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.k, generator=generator)  # unit scale, as keys and values have in a trained layer:
        nn.init.normal_(self.v, generator=generator)  # the gate's first gradient is proportional to v
        nn.init.zeros_(self.gate)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k, self.v, self.gate


KINDS = {
    "full": Kind(trains=lambda name: True, is_mergeable=True),
    "adapter": Kind(lambda b, c: {slot: Adapter(b.qkv.in_features, c.bottleneck) for slot in ("adapter_attention", "adapter_ffn")},
                    trains=lambda name: "norm." in name, settings=("bottleneck",), stacks=True,
                    roles={".down.": INPUT, ".up.weight": OUTPUT, ".up.bias": ADDED},
                    joined=lambda a, b: replace(a, bottleneck=a.bottleneck + b.bottleneck)),
    "lora": Kind(loras, settings=("r", "lora_alpha", "target_modules"), roles={".lora.A.": INPUT, ".lora.B.": OUTPUT},
                 scaling=lambda c: c.lora_alpha / c.r, joined=lambda a, b: replace(a, r=a.r + b.r, lora_alpha=float(a.r + b.r)),
                 stacks=True, is_mergeable=True),
    "bitfit": Kind(trains=lambda name: name.endswith(".bias"), stacks=True, is_mergeable=True),
    "prefix": Kind(lambda b, c: {"prefix": Prefix(c.prefix_len, b.num_heads, b.qkv.in_features // b.num_heads)}, settings=("prefix_len",),
                   roles={".prefix.k": INPUT, ".prefix.v": INPUT, ".prefix.gate": ADDED}, stacks=True,
                   joined=None),     # no sum: one softmax over both prefixes is not the sum of a softmax over each
}
