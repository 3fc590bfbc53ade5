"""Imports the adapters of two other libraries, AdapterHub's `adapters` and OpenDelta, as the delta kinds adapter and lora.

Their bottlenecks compute the same as ours if the activation is the exact GELU and each layer has two: after the last matrices of attention
and FFN, before residual and layer norm. These are double_seq_bn (Houlsby et al., 2019) in AdapterHub and `adapter` in OpenDelta. Their LoRA
is the usual one. AdapterHub stores the head in its own file, OpenDelta among the tensors.
"""
import re
from pathlib import Path

from rt.deltas import Base, Delta
from rt.errors import InputError
from rt.formats import hf
from rt.formats.checkpoint import read_file, read_weights
from rt.formats.files import read_json
from rt.formats.peft import checked, head_of, layers_of, one_of, sorted_out
from rt.formats.untrusted import is_number, is_whole, shaped
from rt.kinds import DeltaConfig

# The supported values of settings, by library and method; the first is the default.
ONLY = {("AdapterHub", "adapter"): {
            "original_ln_before": (False,), "original_ln_after": (True,), "residual_before_ln": (True,), "ln_before": (False,),
            "ln_after": (False,), "is_parallel": (False,), "mh_adapter": (True,), "output_adapter": (True,), "leave_out": ([],),
            "non_linearity": ("gelu",), "scaling": (1.0,), "use_gating": (False,), "phm_layer": (False,), "inv_adapter": (None,)},
        ("AdapterHub", "lora"): {"composition_mode": ("add",), "use_gating": (False,), "use_dora": (False,), "vera_d": (None,)},
        ("OpenDelta", "adapter"): {"non_linearity": ("gelu_orig",)}, ("OpenDelta", "lora"): {}}
# settings that do not change what a loaded adapter computes, or that its tensors show; no other setting may be on
FREE = (r"architecture|reduction_factor|init_weights\w*|adapter_residual_before_ln|inv_adapter_reduction_factor|cross_adapter|dropout|"
        r"stochastic_depth|\w*phm\w*|hypercomplex_nonlinearity|attn_matrices|\w+_lora|r|alpha|leave_out|dtype|vera_b|delta_type|lora_\w+|"
        r"bottleneck_dim|\w+_modules|common_structure|\w+_version|backbone_\w+|backend")
HEAD = {"head_type": ("classification",), "layers": (2,), "activation_function": ("tanh",), "use_pooler": (False,), "bias": (True,)}
# their tensor names -> PEFT's, or ours within a layer
RENAMED = ((r"\.(?:loras\.[^.]+|lora)\.lora_([AB])$", r".lora_\1.weight"),
           (r"(attention\.)?output\.(?:adapters\.[^.]+\.adapter|dense\.adapter\.modulelist)[._](down|up)(?:\.0|_proj)?\.",
            lambda m: f"adapter_{'attention' if m[1] else 'ffn'}.{m[2]}."))


def import_adapter(folder: Path, base: Base, labels: tuple[str, ...], task: str | None) -> Delta:
    """Import a classifier's adapter on `base` as a delta. Its labels: `labels`, its own, or numbers. InputError names what does not fit."""
    hub = (folder / "adapter_config.json").is_file()
    library, path = ("AdapterHub", folder / "adapter_config.json") if hub else ("OpenDelta", folder / "config.json")
    facts = settings(path, library)
    hf.check_vocabulary(folder, base)
    classes, named = hf.CLASSIFIERS[hf.family(base.encoder.config)], {}
    weights = read_file(one_of(folder, f"{library}:", "adapter.safetensors", "pytorch_adapter.bin")) if hub else read_weights(folder)
    if hub:
        head = read_json(folder / "head_config.json", {})
        weights |= read_file(one_of(folder, f"{library} without its head:", "model_head.safetensors", "pytorch_model_head.bin"))
        with shaped(folder / "head_config.json", "is not the configuration of a head"):
            hf.check_only(head.get("config") or {}, HEAD, folder / "head_config.json")
            named = {str(int(i)): label for label, i in ((head.get("config") or head).get("label2id") or {}).items()}
    tensors, whose = {}, f"{folder}: an adapter of {library}"
    for name, tensor in weights.items():
        name = re.sub(r"^heads\.[^.]+\.([14])\.", lambda m: classes["dense" if m[1] == "1" else "out"] + ".", hf.plain_name(name))
        for theirs, ours in RENAMED:
            name = re.sub(theirs, ours, name)
        tensors[name] = tensor.float()
    modules = {name.replace("encoder.layer.", "layers."): t for name, t in tensors.items() if ".adapter_" in name}
    factors, saved = sorted_out({name: t for name, t in tensors.items() if ".adapter_" not in name}, whose)
    head = head_of(base, {}, saved, 1.0, whose)
    if facts["method"] == "lora":
        modules, targets = layers_of(base, factors, facts["r"], whose)
        config = DeltaConfig("lora", r=facts["r"], lora_alpha=float(facts["alpha"]), target_modules=targets)
    else:
        down = next((t.numel() for name, t in modules.items() if name.endswith("down.bias")), 1)
        config = DeltaConfig("adapter", bottleneck=down)
    return checked(config, modules, head, base, folder, labels, task, {"id2label": named})


def settings(path: Path, library: str) -> dict:
    """The adapter's settings, with `method`. InputError names the first one that is not supported."""
    outer, whose = read_json(path), f"{path}: an adapter of {library}"
    facts = outer.get("config") if library == "AdapterHub" else outer
    method = isinstance(facts, dict) and str(facts.get("delta_type") or facts.get("architecture") or "adapter")
    if (library, method) not in ONLY:
        raise InputError(f"{whose}, method {method or facts!r}: not supported, only bottleneck adapters (double_seq_bn) and LoRA")
    if library == "AdapterHub" and "version" not in outer:      # names in AdapterHub's first version
        facts["non_linearity"] = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(str(facts.get("non_linearity")), facts.get("non_linearity"))
    if method == "adapter":
        facts.setdefault("non_linearity", "gelu_new")       # both libraries' default
    hf.check_only(facts, ONLY[library, method], whose, FREE)
    r, alpha = (facts.get(name, facts.get(f"lora_{name}")) for name in ("r", "alpha"))
    if method == "lora" and not (is_whole(r, 1) and is_number(alpha, -1e9, 1e9)):
        raise InputError(f"{whose}: has no r and alpha that are numbers")
    return {"method": method, "r": r, "alpha": alpha}
