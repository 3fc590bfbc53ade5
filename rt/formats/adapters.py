"""Imports the adapters of PEFT, AdapterHub's `adapters` and OpenDelta as the delta kinds lora and adapter. Exports lora to PEFT.

All compute LoRA (Hu et al., 2022) as we do: W + scaling * B A. Our kind has one pair of factors per target and layer, with the same targets
in every layer. scaling is alpha / r, or alpha / sqrt(r) in PEFT's rank-stabilised form (rsLoRA).

The bottlenecks of AdapterHub and OpenDelta compute the same as ours if the activation is the exact GELU and each layer has two: after the
last matrices of attention and FFN, before residual and layer norm. These are double_seq_bn (Houlsby et al., 2019) in AdapterHub and
`adapter` in OpenDelta.

PEFT (modules_to_save) and OpenDelta store the head among the tensors, AdapterHub in its own file. It becomes the delta's head. If PEFT's
target `dense` also matches a layer of the head, the head's weights get that update.
"""
import math
import re
from pathlib import Path
from typing import Iterable

import torch
from torch import Tensor

from rt.deltas import Base, Delta, apply, check_fits, check_head, origin
from rt.errors import InputError
from rt.formats import hf
from rt.formats.atomic import atomic_folder
from rt.formats.checkpoint import read_file, read_weights
from rt.formats.files import read_json, write_json, write_whole
from rt.formats.untrusted import is_number, is_whole, shaped
from rt.kinds import KINDS, TARGETS, DeltaConfig

PATHS = {target: target if third is None else f"attention.self.{target}" for target, (_, third) in TARGETS.items()}     # within a layer
# The supported values of settings, by library and method; the first is the default.
ONLY = {("PEFT", "lora"): {"peft_type": ("LORA",), "task_type": ("SEQ_CLS", None), "bias": ("none",),
                           "init_lora_weights": (True, False, "gaussian")},
        ("AdapterHub", "adapter"): {
            "original_ln_before": (False,), "original_ln_after": (True,), "residual_before_ln": (True,), "ln_before": (False,),
            "ln_after": (False,), "is_parallel": (False,), "mh_adapter": (True,), "output_adapter": (True,), "leave_out": ([],),
            "non_linearity": ("gelu",), "scaling": (1.0,), "use_gating": (False,), "phm_layer": (False,), "inv_adapter": (None,)},
        ("AdapterHub", "lora"): {"composition_mode": ("add",), "use_gating": (False,), "use_dora": (False,), "vera_d": (None,)},
        ("OpenDelta", "adapter"): {"non_linearity": ("gelu_orig",)}, ("OpenDelta", "lora"): {}}
# settings that do not change what a loaded adapter computes, or that its tensors show; no other setting may be on
FREE = {"PEFT": r"auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|r|lora_alpha|lora_dropout|use_rslora|"
                r"target_modules|exclude_modules|modules_to_save|layers_to_transform|layers_pattern|megatron_core|runtime_config|"
                r"qalora_group_size",
        **dict.fromkeys(("AdapterHub", "OpenDelta"),
                        r"architecture|reduction_factor|init_weights\w*|adapter_residual_before_ln|inv_adapter_reduction_factor|"
                        r"cross_adapter|dropout|stochastic_depth|\w*phm\w*|hypercomplex_nonlinearity|attn_matrices|\w+_lora|r|alpha|"
                        r"leave_out|dtype|vera_b|delta_type|lora_\w+|bottleneck_dim|\w+_modules|common_structure|\w+_version|"
                        r"backbone_\w+|backend")}
HEAD = {"head_type": ("classification",), "layers": (2,), "activation_function": ("tanh",), "use_pooler": (False,), "bias": (True,)}
# their tensor names -> PEFT's, or ours within a layer
RENAMED = ((r"\.(?:loras\.[^.]+|lora)\.lora_([AB])$", r".lora_\1.weight"),
           (r"(attention\.)?output\.(?:adapters\.[^.]+\.adapter|dense\.adapter\.modulelist)[._](down|up)(?:\.0|_proj)?\.",
            lambda m: f"adapter_{'attention' if m[1] else 'ffn'}.{m[2]}."))
WRITTEN = {"adapter_config.json", "adapter_model.safetensors", "labels.json", "base", hf.CARD}


def factor_names(layers: int, targets: Iterable[str]) -> dict[str, str]:
    """{Hugging Face's name: ours in Delta.modules} of the factors A (r, in) and B (out, r) of each target in each layer."""
    return {f"encoder.layer.{i}.{PATHS[target]}.lora_{which}.weight":
            f"layers.{i}.{TARGETS[target][0]}.lora.{which}.{target.replace('.', '_')}"
            for i in range(layers) for target in targets for which in "AB"}


def import_adapter(folder: Path, base: Base, labels: tuple[str, ...], task: str | None) -> Delta:
    """Import a classifier's adapter on `base` as a delta. Its labels: `labels`, its own, or numbers. InputError names what does not fit."""
    library, method, r, alpha = settings(folder)
    hf.check_vocabulary(folder, base)
    whose, classes = f"{folder}: an adapter of {library}", hf.CLASSIFIERS[hf.family(base.encoder.config)]
    weights, own, named = contents(folder, library)
    tensors = {}
    for name, tensor in weights.items():
        name = re.sub(r"^heads\.[^.]+\.([14])\.", lambda m: classes["dense" if m[1] == "1" else "out"] + ".", hf.plain_name(name))
        for theirs, ours in RENAMED:
            name = re.sub(theirs, ours, name)
        tensors[name] = tensor.float()
    inner = [name for name in tensors if method == "adapter" and ".adapter_" in name]
    modules = {name.replace("encoder.layer.", "layers."): tensors.pop(name) for name in inner}
    factors, saved = sorted_out(tensors, whose)
    head = head_of(base, factors, saved, alpha / r, whose)
    if method == "lora":
        modules, targets = layers_of(base, factors, r, whose)
        config = DeltaConfig("lora", r=r, lora_alpha=float(alpha), target_modules=targets)
    else:
        config = DeltaConfig("adapter", bottleneck=next((t.numel() for name, t in modules.items() if name.endswith("down.bias")), 1))
    names = hf.class_names({"id2label": named}, len(head["out.bias"]), labels or own, folder)
    diffs = {name: torch.zeros(p.shape) for name, p in base.encoder.named_parameters() if KINDS[config.kind].trains(name)}
    delta = Delta(config, diffs, modules, head, {"task": task or folder.name, "labels": list(names), "source": str(folder), **origin(base)})
    apply(base, delta)      # checks that all shapes fit
    return delta


def settings(folder: Path) -> tuple[str, str, int, float]:
    """(library, method, r, alpha) of an adapter; r and alpha are 1 for bottlenecks. InputError names the first setting that is not
    supported."""
    path = next(path for path in (folder / "adapter_config.json", folder / "config.json") if path.is_file())
    outer = read_json(path)
    library = "OpenDelta" if path.name == "config.json" else "AdapterHub" if "config" in outer else "PEFT"
    whose, facts = f"{path}: an adapter of {library}", outer["config"] if library == "AdapterHub" else outer
    method = isinstance(facts, dict) and str(facts.get("delta_type") or facts.get("architecture")
                                             or ("lora" if "peft_type" in facts else "adapter"))
    if (library, method) not in ONLY:
        raise InputError(f"{whose}, method {method or facts!r}: not supported, only bottleneck adapters (double_seq_bn) and LoRA")
    if library == "AdapterHub" and "version" not in outer:      # names in AdapterHub's first version
        facts["non_linearity"] = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(str(facts.get("non_linearity")), facts.get("non_linearity"))
    if method == "adapter":
        facts.setdefault("non_linearity", "gelu_new")       # both libraries' default
    hf.check_only(facts, ONLY[library, method], whose, FREE[library])
    if method == "adapter":
        return library, method, 1, 1.0
    r, alpha = (facts.get(name, facts.get(f"lora_{name}")) for name in ("r", "alpha"))
    if not (is_whole(r, 1) and is_number(alpha, -1e9, 1e9)):
        raise InputError(f"{whose}: has no r and alpha that are numbers")
    return library, method, r, alpha * math.sqrt(r) if facts.get("use_rslora") else alpha


def contents(folder: Path, library: str) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, str]]:
    """(tensors, labels in a file of our export_peft, labels by number as AdapterHub writes them) of an adapter."""
    if library == "OpenDelta":
        return read_weights(folder), (), {}
    if library == "PEFT":
        own = read_json(folder / "labels.json", {}).get("labels", [])
        if not isinstance(own, list):
            raise InputError(f"{folder / 'labels.json'}: \"labels\" is no list")
        return read_file(one_of(folder, "PEFT:", "adapter_model.safetensors", "adapter_model.bin")), tuple(map(str, own)), {}
    weights = read_file(one_of(folder, "AdapterHub:", "adapter.safetensors", "pytorch_adapter.bin"))
    head, place = read_json(folder / "head_config.json", {}), folder / "head_config.json"
    weights |= read_file(one_of(folder, "AdapterHub without its head:", "model_head.safetensors", "pytorch_model_head.bin"))
    with shaped(place, "is not the configuration of a head"):
        hf.check_only(head.get("config") or {}, HEAD, place)
        named = {str(int(i)): label for label, i in ((head.get("config") or head).get("label2id") or {}).items()}
    return weights, (), named


def one_of(folder: Path, whose: str, *names: str) -> Path:
    """The first of these files that exists. InputError if none does."""
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder}: an adapter of {whose} there is neither {' nor '.join(names)}")
    return file


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
            raise InputError(f"{source}: lora_A and lora_B of {module} are no matrices")
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
                raise InputError(f"{source}: lora_A and lora_B of {theirs} do not make a matrix of its size")
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
            raise InputError(f"{source}: {name} has rank {len(factor)}, where r is {r}; ranks that differ are not supported")
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
    weights = hf.hf_state(delta.modules | delta.head, config, [*names, *hf.head_names(config, hf.CLASSIFIERS)])
    with atomic_folder(folder, WRITTEN) as new:
        hf.write_tensors(new / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in weights.items()})
        write_json(new / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(Path(folder) / "base") if ours else name,
            "r": c.r, "lora_alpha": c.lora_alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets, "inference_mode": True,
            "modules_to_save": sorted({theirs.split(".")[0] for theirs in hf.CLASSIFIERS[hf.family(config)].values()})})
        write_json(new / "labels.json", {"labels": list(delta.labels)})
        if card:
            write_whole(new / hf.CARD, card)
        if ours:
            hf.export_hf(new / "base", base, labels=delta.labels)
    return Path(folder) / "base" if ours else name
