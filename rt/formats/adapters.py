"""Imports the LoRA adapters of PEFT as deltas of kind lora, and exports them.

Both compute W + scaling * B A (Hu et al., 2022). Our kind has one pair of factors per target and layer, with the same targets in every
layer. scaling is alpha / r, or alpha / sqrt(r) in PEFT's rank-stabilised form (rsLoRA). The adapter's classifier (modules_to_save) becomes
the delta's head. If PEFT's target `dense` also matches a layer of the head, the head's weights get that update.
"""
import math
from pathlib import Path
from typing import Iterable

from torch import Tensor

from rt.deltas import Base, Delta, check_fits, check_head, check_tensors, origin
from rt.errors import InputError
from rt.formats import hf
from rt.formats.atomic import atomic_folder
from rt.formats.checkpoint import read_weights
from rt.formats.files import other_library, read_json, write_json, write_whole
from rt.formats.untrusted import is_number, is_whole
from rt.kinds import TARGETS, DeltaConfig

PATHS = {target: target if third is None else f"attention.self.{target}" for target, (_, third) in TARGETS.items()}     # within a layer
# the supported values of settings; the first is the default
ONLY = {"peft_type": ("LORA",), "task_type": ("SEQ_CLS", None), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
# settings that do not change what a loaded adapter computes, or that its tensors show; no other setting may be on
FREE = (r"auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|r|lora_alpha|lora_dropout|use_rslora|target_modules|"
        r"exclude_modules|modules_to_save|layers_to_transform|layers_pattern|megatron_core|runtime_config|qalora_group_size")
WRITTEN = {"adapter_config.json", "adapter_model.safetensors", "labels.json", "base", hf.CARD}


def factor_names(layers: int, targets: Iterable[str]) -> dict[str, str]:
    """{Hugging Face's name: ours in Delta.modules} of the factors A (r, in) and B (out, r) of each target in each layer."""
    return {f"encoder.layer.{i}.{PATHS[target]}.lora_{which}.weight":
            f"layers.{i}.{TARGETS[target][0]}.lora.{which}.{target.replace('.', '_')}"
            for i in range(layers) for target in targets for which in "AB"}


def import_adapter(folder: Path, base: Base, labels: tuple[str, ...], task: str) -> Delta:
    """Import a classifier's adapter on `base` as a delta. Its labels: `labels`, its own, or numbers. InputError names what does not fit."""
    if library := other_library(folder):
        raise InputError(f"{folder}: an adapter of {library}; only LoRA adapters of PEFT are supported")
    facts, whose = read_json(folder / "adapter_config.json"), f"{folder}: an adapter of PEFT"
    ours = read_json(folder / "labels.json", {})        # written by export_peft
    own, noted = ours.get("labels", []), ours.get("base", base.fingerprint)
    hf.check_only(facts, ONLY, f"{folder / 'adapter_config.json'}: an adapter of PEFT", FREE)
    r, alpha = facts.get("r"), facts.get("lora_alpha")
    if not (is_whole(r, 1) and is_number(alpha, -1e9, 1e9)):
        raise InputError(f"{whose}: its r or lora_alpha is not a number in range")
    if not isinstance(own, list):
        raise InputError(f"{folder / 'labels.json'}: \"labels\" is not a list")
    hf.check_vocabulary(folder, base)
    if noted != base.fingerprint:
        raise InputError(f"{whose}: was exported for the base with fingerprint {noted}, and this base has {base.fingerprint}; name that "
                         "base, recycle.py carries the delta from it to another")
    factors, saved = sorted_out(read_weights(folder, ("adapter_model.safetensors", "adapter_model.bin")), whose)
    alpha *= math.sqrt(r) if facts.get("use_rslora") else 1
    head = head_of(base, factors, saved, alpha / r, whose)
    modules, targets = layers_of(base, factors, r, whose)
    names = hf.class_names({"id2label": hf.numbered(own)}, len(head["out.bias"]), labels, folder)
    config = DeltaConfig("lora", r=r, lora_alpha=float(alpha), target_modules=targets)
    delta = Delta(config, {}, modules, head, {"task": task, "labels": list(names), "source": str(folder), **origin(base)})
    check_tensors(base, delta)
    return delta


def sorted_out(weights: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(factors, head tensors), under Hugging Face's names without the model's own name in front."""
    factors, saved = {}, {}
    for full, tensor in weights.items():
        name = hf.plain_name(full).replace(".modules_to_save", "").replace(".default", "").replace(".base_layer", "")
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            factors[name] = tensor.float()
        elif name.startswith(("classifier.", "pooler.")) and ".lora_" not in name:
            saved[name] = tensor.float()
        else:
            raise InputError(f"{source}: tensor {full} is not supported: only LoRA factors of linear layers, and the classifier")
    for name, factor in factors.items():
        module = name.rpartition(".lora_")[0]
        if not {f"{module}.lora_A.weight", f"{module}.lora_B.weight"} <= factors.keys():
            raise InputError(f"{source}: {module} has only one of lora_A and lora_B")
        if factor.dim() != 2:
            raise InputError(f"{source}: lora_A and lora_B of {module} are not matrices")
    return factors, saved


def head_of(base: Base, factors: dict[str, Tensor], saved: dict[str, Tensor], scaling: float, source: str) -> dict[str, Tensor]:
    """The adapter's head, with the base's pooler if the adapter saved none. Updates of the head's layers move from `factors` into it."""
    head = dict(base.pooler or {})
    for ours, theirs in hf.CLASSIFIERS[hf.family(base.encoder.config)].items():
        weight, bias = f"{ours}.weight", f"{ours}.bias"
        head |= {f"{ours}.{kind}": saved[f"{theirs}.{kind}"] for kind in ("weight", "bias") if f"{theirs}.{kind}" in saved}
        if not {weight, bias} <= head.keys():
            raise InputError(f"{source}: holds no {theirs}; an adapter without the whole head (modules_to_save) cannot be used")
        a, b = (factors.pop(f"{theirs}.lora_{which}.weight", None) for which in "AB")
        if a is not None:
            if head[weight].shape != (len(b), a.shape[1]) or len(a) != b.shape[1]:
                raise InputError(f"{source}: lora_B times lora_A does not have the shape of {theirs}")
            head[weight] = head[weight] + scaling * b @ a
    check_head(head, base.encoder.config.hidden_size, source)
    return head


def layers_of(base: Base, factors: dict[str, Tensor], r: int, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(modules, target_modules) of a lora delta. InputError unless each layer has factors of rank `r` for the same targets."""
    layers = base.encoder.config.num_layers
    names = factor_names(layers, TARGETS)
    strange = next((name for name in factors if name not in names), None)
    if strange or not factors:
        raise InputError(f"{source}: has {strange or 'no factors at all'}; targets in {layers} layers can be {', '.join(PATHS.values())}")
    targets = tuple(target for target in TARGETS if factor_names(layers, [target]).keys() & factors.keys())
    if len(factors) < len(factor_names(layers, targets)):
        raise InputError(f"{source}: only some of the {layers} layers have factors for {', '.join(targets)}; all layers must have them")
    for name, factor in factors.items():
        if ".lora_A." in name and len(factor) != r:
            raise InputError(f"{source}: {name} has rank {len(factor)}, but r is {r}; ranks that differ are not supported")
    return {names[name]: factor for name, factor in factors.items()}, targets


def export_peft(folder: Path, base: Base, name: str, delta: Delta, card: str | None = None) -> Path | str:
    """Write a lora delta of `base`, called `name`, for PeftModel. Returns the base to load it on: `name`, or, for a base of ours, the
    subfolder `base` in Hugging Face's format. `card` is the text of README.md. InputError for a delta of another kind or base."""
    if delta.config.kind != "lora":
        raise InputError(f"--to peft is for a delta of kind lora, this is {delta.config.kind}" +
                         ("; --to hf merges it" if delta.config.kind in ("full", "bitfit") else ""))
    check_fits(base, delta, stale_ok=False)
    c, config, ours = delta.config, base.encoder.config, (Path(name) / "meta.json").is_file()
    targets = list(c.target_modules)
    if "output.dense" in targets and "attention.output.dense" not in targets:   # PEFT matches the ends of names: give whole names
        targets = r".*\.layer\.\d+\.(" + "|".join(PATHS[t].replace(".", r"\.") for t in targets) + ")"
    names = [(ours, (theirs,)) for theirs, ours in factor_names(config.num_layers, c.target_modules).items()]
    place = folder / "base" if ours else name
    weights = hf.hf_state(delta.modules | delta.head, config, [*names, *hf.head_names(config, hf.CLASSIFIERS)])
    with atomic_folder(folder, WRITTEN) as new:
        hf.write_tensors(new / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in weights.items()})
        write_json(new / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(place),
            "r": c.r, "lora_alpha": c.lora_alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets, "inference_mode": True,
            "modules_to_save": sorted({theirs.split(".")[0] for theirs in hf.CLASSIFIERS[hf.family(config)].values()})})
        write_json(new / "labels.json", {"labels": list(delta.labels), "base": base.fingerprint})
        if card:
            write_whole(new / hf.CARD, card)
        if ours:
            hf.export_hf(new / "base", base, labels=delta.labels)
    return place
