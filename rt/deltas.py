"""Deltas: what tuning on a task learned, apart from the base it was learned on.

    full      every encoder weight; the delta is tuned - base
    adapter   bottleneck modules after attention and after the FFN (Houlsby et al., 2019); LN trained with them
    lora      low-rank updates of the projections named by target_modules (Hu et al., 2022)
    bitfit    the biases (Ben Zaken et al., 2022)
    prefix    learned keys and values in every layer (Li & Liang, 2021), behind a gate that starts closed

The task head belongs to the delta. Freshly attached, every kind leaves the base's function as it was.
A delta has three parts: `diffs` (tuned - base for weights that the base has), `modules` (weights it has not), `head`.

Deltas are algebra: `2 * d`, `d1 + d2`, `d1 - d2`, `apply(base, d, scale=0.5)`, `merge(base, d)`. Sums and multiples are
those of what the deltas do, not of their factors: LoRA factors and adapter bottlenecks are laid side by side.
Nothing here changes a base in place: `attach` copies what is trained and shares what is frozen.
"""
import copy
import hashlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from rt.errors import InputError, StaleDelta
from rt.formats.tokenizer import Tokenizer
from rt.formats.untrusted import is_whole
from rt.kinds import USED, DeltaConfig, _is_trained, _plug_in
from rt.model import ClassificationHead, Classifier, Encoder, EncoderConfig, MLMHead, init_weights


@dataclass
class Base:
    """An encoder with what belongs to it. Nothing changes a base in place: rt/deltas.py copies what it trains."""
    encoder: Encoder
    head: MLMHead | None
    tokenizer: Tokenizer
    meta: dict
    fingerprint: str
    pooler: dict[str, Tensor] | None = None     # of a BERT checkpoint: dense.weight and dense.bias, where a fresh task head begins

    def to(self, device: torch.device) -> "Base":
        self.encoder.to(device)
        return self

    def require_length(self, seq_len: int) -> None:
        """InputError unless the base has positions for sequences of `seq_len` tokens."""
        if seq_len > self.encoder.config.max_len:
            raise InputError(f"--seq_len {seq_len}: the base has positions for {self.encoder.config.max_len} tokens")


def fingerprint(module: nn.Module) -> str:
    """Hash of names, shapes and values: 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_strict(module: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict where missing, unexpected or misshapen tensors are one sentence."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"{source}: the tensors do not fit the model: {first}") from None


def check_sizes(base: Base, theirs: EncoderConfig, what: str) -> None:
    """InputError unless `theirs`, the encoder of `what`, has the tensors of the base's and the same function of them."""
    mine = base.encoder.config
    for name in ("is_bert", *(f.name for f in fields(mine) if "dropout" not in f.name and f.name != "model_type")):
        if getattr(mine, name) != getattr(theirs, name):
            raise InputError(f"{what} an encoder of other sizes: {name} {getattr(theirs, name)}, the base has {getattr(mine, name)}")


def check_head(head: dict[str, Tensor], d: int, source: Path | str) -> None:
    """InputError unless these are the tensors of a ClassificationHead of width `d`."""
    n = len(head["out.bias"]) if "out.bias" in head and head["out.bias"].dim() else 0
    right = {"dense.weight": (d, d), "dense.bias": (d,), "out.weight": (n, d), "out.bias": (n,)}
    wrong = next((k for k in {**right, **head} if k not in head or tuple(head[k].shape) != right.get(k) or
                  not head[k].is_floating_point()), None) if n else "out.bias"
    if wrong:
        raise InputError(f"{source}: {wrong} is not that of a head for sequence classification of width {d}")


PARTS = ("diffs", "modules", "head")


def new_head(base: Base, num_outputs: int, seed: int) -> ClassificationHead:
    """A freshly initialised task head on the device of the base; its dense layer is the base's pooler, where there is one."""
    config = base.encoder.config
    head = ClassificationHead(config.hidden_size, num_outputs, config.dropout)
    init_weights(head, torch.Generator().manual_seed(seed))
    if base.pooler is not None:
        head.load_state_dict({**head.state_dict(), **base.pooler})
    return head.to(base.encoder.embeddings.word.weight.device)


def attach(base: Base, config: DeltaConfig, num_outputs: int, seed: int) -> Classifier:
    """`base` with a fresh delta and head, ready to be tuned: what the kind trains requires a gradient and is a copy, the
    rest is frozen and shared with the base. Its logits before tuning are those of base + head, whatever the kind."""
    trained = {id(p) for name, p in base.encoder.named_parameters() if _is_trained(config.kind, name)}
    shared = {id(p): p for p in base.encoder.parameters() if id(p) not in trained}
    encoder = copy.deepcopy(base.encoder, memo=dict(shared))
    for module in encoder.modules():
        for name, p in module.named_parameters(recurse=False):
            # a parameter of its own, where shared over the base's memory: requires_grad must not reach the base
            setattr(module, name, nn.Parameter(p.data, requires_grad=id(p) not in shared))
    generator = torch.Generator().manual_seed(seed)
    for module in _plug_in(encoder, config):
        module.reset(generator)
    return Classifier(encoder, new_head(base, num_outputs, seed)).to(base.encoder.embeddings.word.weight.device)


@dataclass
class Delta:
    """What tuning learned. `info`: task, labels, fingerprint and sizes of the base, tokenizer, scores."""
    config: DeltaConfig
    diffs: dict[str, Tensor]
    modules: dict[str, Tensor]
    head: dict[str, Tensor]
    info: dict = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.info["labels"])

    @property
    def seq_len(self) -> int | None:
        """The longest text that it was learned on, where that is known."""
        config = self.info.get("config")
        return config.get("seq_len") if isinstance(config, dict) and is_whole(config.get("seq_len"), 8) else None

    @property
    def num_outputs(self) -> int:
        return len(self.head["out.bias"])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for part in PARTS for x in getattr(self, part).values())

    def ordered(self, labels: tuple[str, ...]) -> "Delta":
        """The same delta with its outputs in the order of `labels`, where these are its own in another order; else itself."""
        if labels == self.labels or sorted(labels) != sorted(self.labels):
            return self
        rows = [self.labels.index(label) for label in labels]
        head = self.head | {name: self.head[name][rows] for name in ("out.weight", "out.bias")}
        return replace(self, head=head, info=self.info | {"labels": list(labels)})

    def __mul__(self, a: float) -> "Delta":
        """a * d: the change to the base's function is `a` times as large (of a module: its last, linear part); so is the
        head, which makes `0.5 * d + 0.5 * d` equal `d`. To scale the change alone: apply(base, d, scale=a)."""
        last = (".up.weight", ".up.bias", ".gate")
        return replace(self, diffs={k: a * v for k, v in self.diffs.items()},
                       modules={k: a * v if k.endswith(last) or ".lora.B." in k else v for k, v in self.modules.items()},
                       head={k: a * v for k, v in self.head.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "Delta":
        return -1.0 * self

    def __sub__(self, other: "Delta") -> "Delta":
        return self + -1.0 * other

    def __add__(self, other: "Delta") -> "Delta":
        """Raises InputError unless both are of one kind, base and set of labels (prefix has no sum: its softmax is not
        linear in the keys)."""
        for what, mine, theirs in (("kinds", self.config.kind, other.config.kind),
                                   ("bases", self.info.get("base"), other.info.get("base")),
                                   ("labels", self.info.get("labels"), other.info.get("labels")),
                                   ("tensors", [*self.diffs, *self.modules], [*other.diffs, *other.modules])):
            if mine != theirs:
                raise InputError(f"deltas of different {what} cannot be added: {str(mine)[:80]} and {str(theirs)[:80]}")
        if self.config.kind == "prefix":
            raise InputError("prefix deltas have no sum: their softmax is not linear in the keys")
        a, b = _unit_scaling(self), _unit_scaling(other)
        sizes = {k: getattr(a.config, k) + getattr(b.config, k) for k in USED.get(a.config.kind, ()) if k != "target_modules"}
        return replace(a, config=replace(a.config, **sizes),
                       diffs={k: v + b.diffs[k] for k, v in a.diffs.items()},
                       modules={k: _side_by_side(k, v, b.modules[k]) for k, v in a.modules.items()},
                       head={k: v + b.head[k] for k, v in a.head.items()})


def _side_by_side(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Two bottlenecks as one: inputs stacked, outputs beside each other, output biases added."""
    if name.endswith(".up.bias"):
        return a + b
    return torch.cat([a, b], dim=1 if name.endswith(".up.weight") or ".lora.B." in name else 0)


def _unit_scaling(delta: Delta) -> Delta:
    """The same LoRA with lora_alpha = r, its scaling moved into B; other kinds as they are."""
    if delta.config.kind != "lora":
        return delta
    s = delta.config.lora_alpha / delta.config.r
    return replace(delta, config=replace(delta.config, lora_alpha=float(delta.config.r)),
                   modules={k: s * v if ".lora.B." in k else v for k, v in delta.modules.items()})


def extract(model: Classifier, base: Base, config: DeltaConfig, info: dict) -> Delta:
    """The delta that makes `model` out of `base`; tensors are copies on the CPU."""
    own = dict(base.encoder.named_parameters())
    diffs, modules = {}, {}
    for name, p in model.encoder.named_parameters():
        if name not in own:
            modules[name] = p.detach().cpu().clone()
        elif p.requires_grad:
            diffs[name] = (p.detach() - own[name].detach()).cpu()
    head = {k: v.detach().cpu().clone() for k, v in model.head.state_dict().items()}
    return Delta(config, diffs, modules, head, {**info, **origin(base)})


def origin(base: Base) -> dict:
    """What a delta says of the base it was learned on."""
    return {"base": base.fingerprint, "tokenizer": base.tokenizer.fingerprint, "vocabulary": base.tokenizer.vocabulary,
            "encoder": asdict(base.encoder.config)}


def check_fits(base: Base, delta: Delta, stale_ok: bool) -> None:
    """InputError where `delta` cannot be put on `base` at all; StaleDelta where it was learned on another base of the same
    sizes and tokenizer, unless `stale_ok`, which is what recycling asks for."""
    try:
        theirs = EncoderConfig(**delta.info["encoder"])
    except TypeError:
        raise InputError("the delta does not hold the sizes of the encoder that it was learned on") from None
    check_sizes(base, theirs, "the delta was learned on")
    if delta.info["tokenizer"] != base.tokenizer.fingerprint and delta.info.get("vocabulary") != base.tokenizer.vocabulary:
        raise InputError(f"the delta was learned with another tokenizer ({delta.info['tokenizer']}, the base has "
                         f"{base.tokenizer.fingerprint}, of another vocabulary): its ids mean other words")
    if delta.info["base"] != base.fingerprint and not stale_ok:
        raise StaleDelta(f"the delta was learned on base {delta.info['base']}, this is {base.fingerprint}: "
                         "recycle it with recycle.py, or give the base it belongs to")


def check_tensors(base: Base, delta: Delta) -> None:
    """InputError where the delta's tensors are not those of its kind and settings on `base`; no memory is taken for what it claims."""
    check_head(delta.head, base.encoder.config.hidden_size, "the delta's head")
    kind, own = delta.config.kind, dict(base.encoder.named_parameters())
    try:
        with torch.device("meta"):
            encoder = Encoder(base.encoder.config)
            _plug_in(encoder, delta.config)
    except (RuntimeError, OverflowError) as error:
        raise InputError(f"the delta's settings are too large: {str(error).splitlines()[0]}") from None
    expected = {k: p.shape for k, p in encoder.named_parameters() if k not in own or _is_trained(kind, k)}
    found = {k: v for part, ours in ((delta.diffs, True), (delta.modules, False)) for k, v in part.items() if (k in own) is ours}
    for name in sorted({*expected, *delta.diffs, *delta.modules}):
        if name not in expected or name not in found or found[name].shape != expected[name] or not found[name].is_floating_point():
            raise InputError(f"the delta's tensors do not fit its kind {kind}: {name} is "
                             f"{tuple(found[name].shape) if name in found else 'missing'}, not {tuple(expected.get(name, ()))}")
    if len(delta.diffs) + len(delta.modules) > len(expected):
        raise InputError(f"the delta's tensors do not fit its kind {kind}: a weight of the base is among the modules, or the reverse")


def apply(base: Base, delta: Delta, scale: float = 1.0, stale_ok: bool = False) -> Classifier:
    """`base` changed by `scale` times `delta`, with the delta's head as it is: the mode apply. Trainable as `attach`'s."""
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
    load_strict(model.head, delta.head, "the delta's head")
    return model


def merge(base: Base, delta: Delta, scale: float = 1.0, stale_ok: bool = False) -> dict[str, Tensor]:
    """The weights of a plain encoder that computes what base + delta does, float32. full, lora and bitfit only: adapters
    and prefixes add computation that no weight of the base can hold (InputError)."""
    if delta.config.kind in ("adapter", "prefix"):
        raise InputError(f"a delta of kind {delta.config.kind} cannot be merged into the base's weights")
    model = apply(base, delta, scale, stale_ok)
    merged = {k: v.detach().clone() for k, v in model.encoder.state_dict().items() if ".lora." not in k}
    for i, block in enumerate(model.encoder.layers):
        for name, module in block.named_children():
            if getattr(module, "lora", None) is not None:
                merged[f"layers.{i}.{name}.weight"] += module.lora.weight(module).detach()
    return merged
