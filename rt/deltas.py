"""Deltas: the result of tuning on a task, stored apart from the base it was learned on.

A delta has three parts: `diffs` (tuned - base, for weights that the base has), `modules` (weights that the base lacks) and the task `head`.
The kinds are in rt/kinds.py. A freshly attached delta of any kind leaves the base's function unchanged.

Deltas form an algebra: `2 * d`, `d1 - d2`, `sum([d1, d2]) / 2`, `apply(base, d, scale=0.5)`, `merge(base, d)`. Sums and multiples act on
diffs and on what modules add, not on factors: a sum concatenates LoRA factors and adapter bottlenecks. No function changes a base in place.
"""
import copy
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from rt.data import Tokenizer
from rt.errors import InputError, StaleDelta
from rt.kinds import ADDED, INPUT, KINDS, OUTPUT, DeltaConfig
from rt.model import ClassificationHead, Classifier, Encoder, EncoderConfig, MLMHead, init_weights

PARTS = ("diffs", "modules", "head")
OF_TRAINING = ("mode", "dev", "test", "step", "seed", "lr", "shots", "argv")     # entries of `info` about one training; sums drop them


@dataclass
class Base:
    """An encoder with its head, tokenizer and metadata. No weight is changed in place; `to` moves them."""
    encoder: Encoder
    head: MLMHead | None
    tokenizer: Tokenizer
    meta: dict
    fingerprint: str    # of the encoder; a delta stores its base's fingerprint
    pooler: dict[str, Tensor] | None = None     # dense.weight and dense.bias of a BERT checkpoint: a fresh task head starts from them

    def to(self, device: torch.device) -> "Base":
        nn.ModuleList(filter(None, (self.encoder, self.head))).to(device)
        return self

    def require_length(self, seq_len: int) -> None:
        """Raises InputError unless the base has positions for sequences of `seq_len` tokens."""
        if seq_len > self.encoder.config.max_len:
            raise InputError(f"`seq_len` {seq_len}: the base has positions for {self.encoder.config.max_len} tokens")


def new_head(base: Base, num_outputs: int, seed: int) -> ClassificationHead:
    """A freshly initialised task head on the base's device. Its dense layer is the base's pooler if the base has one."""
    config = base.encoder.config
    head = ClassificationHead(config.hidden_size, num_outputs, config.dropout)
    init_weights(head, torch.Generator().manual_seed(seed))
    head.load_state_dict({**head.state_dict(), **(base.pooler or {})})
    return head.to(base.encoder.embeddings.word.weight)


def plug_in(encoder: Encoder, config: DeltaConfig) -> list[nn.Module]:
    """Fill the slots of `encoder` with the modules of a kind. Returns the modules, not yet initialised."""
    new: list[nn.Module] = []
    for block in encoder.layers:
        for slot, module in KINDS[config.kind].modules(block, config).items():
            owner, _, name = slot.rpartition(".")
            setattr(block.get_submodule(owner), name, module)
            new.append(module)
    return new


def attach(base: Base, config: DeltaConfig, num_outputs: int, seed: int) -> Classifier:
    """`base` with a fresh delta, which changes no output yet, and a fresh head. Trained weights are copies, the others the base's own."""
    trains = KINDS[config.check().kind].trains
    # new Parameters, also over shared memory: setting requires_grad must not affect the base
    memo = {id(p): nn.Parameter(p.data.clone()) if trains(name) else nn.Parameter(p.data, requires_grad=False)
            for name, p in base.encoder.named_parameters()}
    encoder = copy.deepcopy(base.encoder, memo)
    generator = torch.Generator().manual_seed(seed)
    for module in plug_in(encoder, config):
        module.reset(generator)
    return Classifier(encoder, new_head(base, num_outputs, seed)).to(base.encoder.embeddings.word.weight)


@dataclass(eq=False)
class Delta:
    """The result of tuning. `info` holds the task, labels, fingerprint and sizes of the base, tokenizer and scores."""
    config: DeltaConfig
    diffs: dict[str, Tensor]
    modules: dict[str, Tensor]
    head: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for part in PARTS:      # one order, however a delta was made or read: sums and projections pair tensors by position
            setattr(self, part, dict(sorted(getattr(self, part).items())))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the head's outputs; empty for a regression."""
        return tuple(self.info["labels"])

    @property
    def num_outputs(self) -> int:
        return len(self.head["out.bias"])

    def ordered(self, labels: tuple[str, ...]) -> "Delta":
        """The delta with its outputs in the order of `labels`. Returns itself unless `labels` reorders its own labels."""
        if labels == self.labels or sorted(labels) != sorted(self.labels):
            return self
        rows = [self.labels.index(label) for label in labels]
        head = self.head | {name: self.head[name][rows] for name in ("out.weight", "out.bias")}
        return replace(self, head=head, info=self.info | {"labels": list(labels)})

    def tensors(self, with_head: bool = True) -> dict[str, Tensor]:
        """All tensors, named by part and name as in delta.safetensors: 'diffs.embeddings.word.weight'."""
        return {f"{part}.{k}": v for part in PARTS if with_head or part != "head" for k, v in getattr(self, part).items()}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Delta":
        """The delta with every tensor replaced by change(name, tensor), named as in `tensors`. The records of its training are left out."""
        info = {k: v for k, v in self.info.items() if k not in OF_TRAINING}
        return replace(self, info=info, **{part: {k: change(f"{part}.{k}", v) for k, v in getattr(self, part).items()} for part in PARTS})

    def role(self, name: str) -> str:
        """INPUT, OUTPUT or ADDED: how a tensor takes part in sums and multiples (rt/kinds.py)."""
        roles = [role for part, role in KINDS[self.config.kind].roles.items() if part in name] if name.startswith("modules.") else [ADDED]
        if len(roles) != 1:
            raise InputError(f"the kind {self.config.kind} does not say how its tensor {name.removeprefix('modules.')} is added and scaled")
        return roles[0]

    def __mul__(self, a: float) -> "Delta":
        """a * d scales the diffs and what each module adds: it scales the module's last, linear part. The head is scaled too, so that
        0.5 * d + 0.5 * d is d. apply(base, d, scale=a) scales the change alone."""
        return self.map(lambda name, v: v if self.role(name) == INPUT else a * v)

    __rmul__ = __mul__

    def __truediv__(self, a: float) -> "Delta":
        return (1 / a) * self

    def __neg__(self) -> "Delta":
        return -1.0 * self

    def __sub__(self, other: "Delta") -> "Delta":
        return self + -1.0 * other

    def __add__(self, other: "Delta") -> "Delta":
        """The sum. Raises InputError unless both deltas have the same kind, base and labels, and the kind has sums."""
        theirs, kind = other.tensors(), KINDS[self.config.kind]
        for what, a, b in (("kinds", self.config.kind, other.config.kind), ("bases", self.info.get("base"), other.info.get("base")),
                           ("labels", self.info.get("labels"), other.info.get("labels")), ("tensors", [*self.tensors()], [*theirs])):
            if a != b:
                raise InputError(f"deltas of different {what} cannot be added: {str(a)[:80]} and {str(b)[:80]}")
        if kind.joined is None:
            raise InputError(f"{self.config.kind} deltas have no sum: no single delta of this kind computes what two add together")

        def add(name: str, v: Tensor) -> Tensor:
            if (role := self.role(name)) == INPUT:
                return torch.cat([v, theirs[name]])
            if role == OUTPUT:
                return torch.cat([kind.scaling(self.config) * v, kind.scaling(other.config) * theirs[name]], dim=1)
            return v + theirs[name]

        return replace(self.map(add), config=kind.joined(self.config, other.config))

    def __radd__(self, other: int) -> "Delta":
        return self if other == 0 else NotImplemented       # sum() begins with 0


def extract(model: Classifier, base: Base, config: DeltaConfig, info: dict) -> Delta:
    """The delta that turns `base` into `model`. Its tensors are copies on the CPU."""
    own, weights = (dict(encoder.named_parameters()) for encoder in (base.encoder, model.encoder))
    diffs = {k: (p.detach() - own[k].detach()).cpu() for k, p in weights.items() if k in own and p.requires_grad}
    modules = {k: p.detach().cpu().clone() for k, p in weights.items() if k not in own}
    head = {k: v.detach().cpu().clone() for k, v in model.head.state_dict().items()}
    return Delta(config, diffs, modules, head, {**info, **origin(base)})


def origin(base: Base) -> dict:
    """The entries of `info` that identify the base a delta was learned on."""
    return {"base": base.fingerprint, "tokenizer": base.tokenizer.fingerprint, "vocabulary": base.tokenizer.vocabulary,
            "encoder": asdict(base.encoder.config)}


def apply(base: Base, delta: Delta, scale: float = 1.0, stale_ok: bool = False) -> Classifier:
    """`base` changed by `scale` times `delta`, with the delta's head unscaled. It can be trained like the result of `attach`."""
    check_fits(base, delta, stale_ok)
    check_tensors(base, delta)
    model = attach(base, delta.config, delta.num_outputs, seed=0)
    change = delta if scale == 1.0 else scale * delta
    weights = dict(model.encoder.named_parameters())
    with torch.no_grad():
        for name, value in change.diffs.items():
            weights[name] += value.to(weights[name].device)
        for name, value in change.modules.items():
            weights[name].copy_(value)
    model.head.load_state_dict(delta.head)
    return model


def merge(base: Base, delta: Delta, scale: float = 1.0, stale_ok: bool = False) -> dict[str, Tensor]:
    """State dict (float32) of a plain encoder that computes the same as base + delta. Raises InputError for adapter and prefix."""
    if not KINDS[delta.config.kind].is_mergeable:
        raise InputError(f"a delta of kind {delta.config.kind} cannot be merged into the base's weights")
    model = apply(base, delta, scale, stale_ok)
    merged = {k: v.detach().clone() for k, v in model.encoder.state_dict().items() if ".lora." not in k}
    for name, module in model.encoder.named_modules():
        if getattr(module, "lora", None) is not None:
            merged[f"{name}.weight"] += module.lora.weight(module).detach()
    return merged


def check_fits(base: Base, delta: Delta, stale_ok: bool) -> None:
    """Raises InputError if `delta` does not fit `base`. Raises StaleDelta if it fits but was learned on another base, unless `stale_ok`."""
    try:
        theirs = EncoderConfig(**delta.info["encoder"])
    except (KeyError, TypeError):
        raise InputError("the delta does not hold the sizes of the encoder that it was learned on") from None
    check_sizes(base, theirs, "the delta was learned on")
    if delta.info.get("tokenizer") != base.tokenizer.fingerprint and delta.info.get("vocabulary") != base.tokenizer.vocabulary:
        raise InputError("the delta was learned with another tokenizer, of another vocabulary than the base's: its ids mean other words")
    if delta.info.get("base") != base.fingerprint and not stale_ok:
        raise StaleDelta(f"the delta was learned on base {delta.info.get('base')}, this is {base.fingerprint}: "
                         "recycle it with recycle.py, or give the base it belongs to")


def check_sizes(base: Base, theirs: EncoderConfig, what: str) -> None:
    """Raises InputError (`what` ...) unless an encoder of sizes `theirs` has the base's tensors and computes the same function."""
    mine = base.encoder.config
    for name in ("is_bert", *(f.name for f in fields(mine) if "dropout" not in f.name and f.name != "model_type")):
        if getattr(mine, name) != getattr(theirs, name):
            raise InputError(f"{what} an encoder of other sizes: {name} {getattr(theirs, name)}, the base has {getattr(mine, name)}")


def check_tensors(base: Base, delta: Delta) -> None:
    """Raises InputError unless the delta's tensors match its kind and settings on `base`. Allocates no tensor."""
    check_head(delta.head, base.encoder.config.hidden_size, "the delta's head")
    kind, own = delta.config.check().kind, dict(base.encoder.named_parameters())
    try:
        with torch.device("meta"):
            plug_in(encoder := Encoder(base.encoder.config), delta.config)
    except (RuntimeError, OverflowError) as error:
        raise InputError(f"the delta's settings are too large: {str(error).splitlines()[0]}") from None
    shapes, what = {k: p.shape for k, p in encoder.named_parameters()}, f"the delta's tensors do not fit its kind {kind}"
    check_state(delta.diffs, {k: shape for k, shape in shapes.items() if k in own and KINDS[kind].trains(k)}, what)
    check_state(delta.modules, {k: shape for k, shape in shapes.items() if k not in own}, what)


def check_head(head: dict[str, Tensor], d: int, source: str) -> None:
    """Raises InputError unless `head` has the tensors of a ClassificationHead of width `d`."""
    n = max(1, head["out.bias"].numel()) if "out.bias" in head else 1
    check_state(head, {"dense.weight": (d, d), "dense.bias": (d,), "out.weight": (n, d), "out.bias": (n,)},
                f"{source}: not a head for sequence classification of width {d}")


def check_state(found: dict[str, Tensor], expected: dict[str, Sequence[int]], what: str) -> None:
    """Raises InputError, starting with `what`, unless the tensors have the expected names and shapes and are floating-point."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            raise InputError(f"{what}: {name} " + ("is missing" if name in expected else "does not belong there"))
        shape, right = tuple(found[name].shape), tuple(expected[name])
        if shape != right or not found[name].is_floating_point():
            raise InputError(f"{what}: {name} is {found[name].dtype} {shape}, not {right}")
