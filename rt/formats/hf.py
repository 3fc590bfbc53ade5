"""Imports and exports Hugging Face's format: RoBERTa, XLM-R, CamemBERT and BERT as a Base, a tuned classifier as a full delta, and back.

Names map one to one, with three exceptions. Query, key and value are one matrix here. The first token type is added to the position
table, and BERT's second type is stored as its difference from the first. BERT calls the head's first layer pooler and trains it with the
next-sentence loss, so a fresh head on such a base starts from the pooler.
"""
import re
from dataclasses import replace
from pathlib import Path
from typing import Iterable

import safetensors.torch
import torch
from torch import Tensor

from rt.deltas import Base, Delta, check_head, check_sizes, check_state, merge, origin
from rt.errors import InputError
from rt.formats.atomic import atomic_folder
from rt.formats.checkpoint import build, check_encoder, fingerprint, read_weights
from rt.formats.files import note, read_json, write_json, write_whole
from rt.formats.tokenizer import PROBE, NoTokenizer, Tokenizer, load_tokenizer
from rt.formats.untrusted import check_label, is_whole
from rt.kinds import DeltaConfig
from rt.model import Encoder, EncoderConfig, MLMHead

Names = Iterable[tuple[str, tuple[str, ...]]]       # (our tensor, their tensors that it joins)
CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "bert": "Bert"}
# the settings of a config.json (ours -> theirs), and the defaults of optional ones
SETTINGS = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
            "ffn_size": "intermediate_size", "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
            "layer_norm_eps": "layer_norm_eps"}
DEFAULTS = {"dropout": 0.1, "attention_dropout": 0.1, "layer_norm_eps": 1e-12}
ONLY = {"hidden_act": ("gelu", "gelu_python"), "position_embedding_type": ("absolute",), "is_decoder": (False,),
        "add_cross_attention": (False,)}        # the supported values; the first is the default
# the tensors: ours -> theirs
EMBEDDINGS = {"word.weight": "word_embeddings.weight", "position.weight": "position_embeddings.weight", "norm.weight": "LayerNorm.weight",
              "norm.bias": "LayerNorm.bias", "types": "token_type_embeddings.weight"}
LAYER = {"qkv": ("attention.self.query", "attention.self.key", "attention.self.value"), "attention_output": ("attention.output.dense",),
         "attention_norm": ("attention.output.LayerNorm",), "intermediate": ("intermediate.dense",), "output": ("output.dense",),
         "output_norm": ("output.LayerNorm",)}
# the modules of a head: ours -> theirs, by family
HEADS = {"roberta": {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
         "bert": {"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm",
                  "bias": "cls.predictions.bias"}}
CLASSIFIERS = {"roberta": {"dense": "classifier.dense", "out": "classifier.out_proj"},
               "bert": {"dense": "pooler.dense", "out": "classifier"}}
POOLERS = {"roberta": {}, "bert": {"dense": "pooler.dense"}}
# tied tensors: a file may store each under the decoder's name, or under the name that it is tied to
TIED = {"lm_head.decoder.weight": "embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias",
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight", "cls.predictions.decoder.bias": "cls.predictions.bias"}
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}    # of DDP, torch.compile, FSDP
CARD = "README.md"
WRITTEN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", CARD}


# --- names ------------------------------------------------------------------------------------------------------------

def family(config: EncoderConfig) -> str:
    """The model that the tensors are named after: roberta or bert."""
    return "bert" if config.is_bert else "roberta"


def encoder_names(config: EncoderConfig) -> Names:
    """Yields the names of an encoder's tensors, one by one: of a billion layers, the first that is missing ends the reading. Only Hugging
    Face's encoder has `embeddings.types`."""
    for ours, theirs in EMBEDDINGS.items():
        yield f"embeddings.{ours}", (f"embeddings.{theirs}",)
    for i in range(config.num_layers):
        for ours, theirs in LAYER.items():
            for kind in ("weight", "bias"):
                yield f"layers.{i}.{ours}.{kind}", tuple(f"encoder.layer.{i}.{name}.{kind}" for name in theirs)


def head_names(config: EncoderConfig, modules: dict[str, dict[str, str]]) -> Names:
    """The names of a head's tensors. `modules` is HEADS, CLASSIFIERS or POOLERS, where the entry `bias` is itself a tensor."""
    for ours, theirs in modules[family(config)].items():
        for kind in ("",) if ours == "bias" else (".weight", ".bias"):
            yield ours + kind, (theirs + kind,)


def plain_name(name: str) -> str:
    """A tensor's name without wrappers and without the model's name in front. BERT's old names in layer norms become today's names."""
    name = re.sub(r"^((base_model|model|roberta|bert)\.)+", "", ".".join(part for part in name.split(".") if part not in WRAPPERS))
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def plain(weights: dict[str, Tensor], source: Path | str = "the weights") -> dict[str, Tensor]:
    """float32 tensors by plain name. A tensor in TIED gets the name that it is tied to, and also keeps its own name if the two differ."""
    w, full = {}, {}
    for name, tensor in weights.items():
        if full.setdefault(plain_name(name), name) != name:
            raise InputError(f"{source}: {full[plain_name(name)]} and {name} would be the same tensor")
        w[plain_name(name)] = tensor.float() if tensor.is_floating_point() else tensor
    for other, name in TIED.items():
        if other in w and torch.equal(w.setdefault(name, w[other]), w[other]):
            del w[other]
    return w


def our_state(weights: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Their tensors under our `names`, taken out of `weights`. KeyError if a tensor is missing."""
    parts = {ours: [weights.pop(name) for name in theirs] for ours, theirs in names}
    return {ours: torch.cat(tensors) if tensors[1:] else tensors[0] for ours, tensors in parts.items()}


def hf_state(state: dict[str, Tensor], config: EncoderConfig, names: Names) -> dict[str, Tensor]:
    """The inverse of `our_state`, with the model's name in front."""
    parts = {name: part for ours, theirs in names for name, part in zip(theirs, state[ours].chunk(len(theirs)))}
    model = f"{family(config)}."
    return {model * name.startswith(("encoder.", "embeddings.", "pooler.")) + name: part for name, part in parts.items()}


# --- import -----------------------------------------------------------------------------------------------------------

def encoder_config(facts: dict, source: Path | str) -> EncoderConfig:
    """Hugging Face's config.json as an EncoderConfig, without sep_id: the tokenizer knows it. InputError names what is not supported."""
    kind, facts = facts.get("model_type"), {k: v for k, v in facts.items() if v is not None}     # null: the default
    if not isinstance(kind, str) or kind not in CLASSES:
        raise InputError(f"{source}: model_type {kind!r} is not supported, only {', '.join(CLASSES)}")
    check_only(facts, ONLY, source)
    pad_id, positions = facts.get("pad_token_id", 0 if kind == "bert" else 1), facts.get("max_position_embeddings")
    if not is_whole(pad_id, 0) or not is_whole(positions, pad_id + 2):
        raise InputError(f"{source}: pad_token_id {pad_id!r} is not a token, or leaves no positions out of "
                         f"max_position_embeddings {positions!r}")
    return check_encoder(EncoderConfig(
        **{ours: facts.get(theirs, DEFAULTS.get(ours)) for ours, theirs in SETTINGS.items()},
        max_len=positions - (0 if kind == "bert" else pad_id + 1), pad_id=pad_id, model_type=kind), source, SETTINGS)


def check_only(facts: dict, only: dict[str, tuple], source: Path | str, free: str | None = None) -> None:
    """InputError if a setting has a value that `only` does not allow (the default comes first). With `free`, a pattern of names, all
    settings that neither `only` nor `free` names must be off."""
    for name, allowed in only.items():
        if facts.get(name, allowed[0]) not in allowed:
            raise InputError(f"{source}: {name} {facts[name]!r} is not supported, only {allowed[0]!r}")
    for name, value in facts.items() if free else ():
        if name not in only and not re.fullmatch(free, name) and value not in (None, False, {}, []):
            raise InputError(f"{source}: {name} {value!r} is not supported")


def encoder_state(weights: dict[str, Tensor], config: EncoderConfig, source: Path | str = "the weights") -> dict[str, Tensor]:
    """State dict of our Encoder from Hugging Face's tensors. InputError names a tensor that is missing, unsupported or of another shape."""
    w = plain(weights, source)
    try:
        state = our_state(w, encoder_names(config))
        types, positions = state.pop("embeddings.types"), state["embeddings.position.weight"]
        if types.shape[1:] != positions.shape[1:]:       # otherwise their sum could be larger than either
            raise RuntimeError(f"token types are {tuple(types.shape)}, positions {tuple(positions.shape)}")
        state["embeddings.position.weight"] = positions + types[0]
        if config.is_bert:
            state["embeddings.second_type"] = types[1] - types[0] if len(types) > 1 else torch.zeros_like(types[0])
    except KeyError as error:
        inside = next((name for name in weights if plain_name(name).endswith(f".{error.args[0]}")), None)
        raise InputError(f"{source}: the checkpoint has no tensor {error.args[0]}" + (
            f", only {inside}: a model inside another; save the state dict of the inner one" if inside else "")) from None
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{source}: the tensors do not fit the model: {str(error).partition(chr(10))[0]}") from None
    for name in w:
        if name.startswith(("encoder.", "embeddings.")) and not name.endswith(("position_ids", "token_type_ids")):
            raise InputError(f"{source}: the encoder has a tensor that is not supported, {name}")
    return state


def head_state(weights: dict[str, Tensor], config: EncoderConfig, modules: dict[str, dict[str, str]], what: str = "",
               needs: Iterable[str] = ()) -> dict[str, Tensor] | None:
    """State dict of our MLMHead (by HEADS), ClassificationHead (by CLASSIFIERS) or pooler (by POOLERS). None if the checkpoint lacks some
    of its tensors, or if `needs` names more that are missing. If it has some of them, a note says what `what` lacks."""
    weights, names = plain(weights), [*head_names(config, modules)]
    lost = [*(theirs for _, (theirs,) in names if theirs not in weights), *needs]
    if what and lost and any(theirs in weights for _, (theirs,) in names):
        note(f"{what} is left out: it lacks {', '.join(lost)}")
    return None if lost else our_state(weights, names) or None


def load_hf(folder: Path) -> Base:
    """Load a checkpoint folder (config.json, weights, tokenizer files) as a Base."""
    facts = read_json(folder / "config.json")
    config = encoder_config(facts, folder / "config.json")
    found, tokenizer = read_weights(folder), load_tokenizer(folder)
    weights = plain(found, folder)
    note_ids(facts, config, tokenizer, folder)
    if tokenizer.framed().encode("a", "b").type_ids[-1]:     # not in RoBERTa's framing: both texts of a pair have the same type there
        if not config.is_bert and facts.get("type_vocab_size", 2) != 1:
            raise InputError(f"{folder}: its tokenizer gives the second text of a pair a token type of its own, which is supported "
                             f"for bert only, not for {config.model_type}")
        config = replace(config, sep_id=tokenizer.eos_id if config.is_bert else None)
    encoder = build(Encoder, config, encoder_state(weights, config, folder), folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    decoder, d = HEADS[family(config)]["bias"].replace(".bias", ".decoder."), config.hidden_size
    untied = {decoder + "weight", decoder + "bias"} if facts.get("tie_word_embeddings") is False else set()
    head = head_state(weights, config, HEADS, f"{folder}: its masked-LM head", sorted(untied - {*map(plain_name, found)}))
    pooler = head_state(weights, config, POOLERS, f"{folder}: its pooler")
    if head is not None:
        if own := sorted(TIED.keys() & weights.keys()):
            raise InputError(f"{folder}: the masked-LM head has scoring weights of its own, {own[0]}; only those tied to the word "
                             "embeddings and the head's bias are supported")
        head = build(MLMHead, config, head, folder)
    if pooler is not None:
        check_state(pooler, {"dense.weight": (d, d), "dense.bias": (d,)}, f"{folder}: the tensors do not fit the model: the pooler")
    mark = fingerprint(encoder)
    return Base(encoder, head, tokenizer, {"name": folder.name, "fingerprint": mark}, mark, pooler)


def note_ids(facts: dict, config: EncoderConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Note the ids on which config.json and the tokenizer disagree."""
    ids = {"pad_token_id": tokenizer.pad_id, "mask_token_id": tokenizer.mask_id, "bos_token_id": tokenizer.bos_id,
           "cls_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "sep_token_id": tokenizer.eos_id}
    said = {"pad_token_id": config.pad_id, **{name: facts[name] for name in ids if facts.get(name) is not None}}
    if wrong := [f"{name} {said[name]} and {i}" for name, i in ids.items() if said.get(name, i) != i]:
        note(f"{folder}: config.json and the tokenizer disagree: {', '.join(wrong)}; RoBERTa's positions go by the first, "
             "the tokens around a text and the mask by the second, as in transformers")
    if config.vocab_size > tokenizer.vocab_size:
        note(f"{folder}: the model has {config.vocab_size} words, the tokenizer {tokenizer.vocab_size}")


def import_tuned(folder: Path, base: Base, labels: tuple[str, ...], task: str) -> Delta:
    """Import a ...ForSequenceClassification checkpoint, tuned from `base`, as a full delta. InputError if it does not fit the base."""
    facts = read_json(folder / "config.json")
    config = replace(encoder_config(facts, folder / "config.json"), sep_id=base.encoder.config.sep_id)
    check_vocabulary(folder, base)
    check_sizes(base, config, f"{folder}: holds")
    if other := re.search(r"\w+For(?:TokenClassification|MultipleChoice)\b", str(facts.get("architectures"))):     # with equal tensors
        raise InputError(f"{folder}: is a {other[0]}, not a model for sequence classification")
    weights = plain(read_weights(folder), folder)
    encoder = build(Encoder, config, encoder_state(weights, config, folder), folder)
    names = [*head_names(config, CLASSIFIERS)]
    if lost := [theirs for _, (theirs,) in names if theirs not in weights]:
        raise InputError(f"{folder}: has no head for sequence classification, or only part of one: it lacks {', '.join(lost)}")
    head = our_state(weights, names)
    check_head(head, config.hidden_size, str(folder))
    labels = class_names(facts, len(head["out.bias"]), labels, folder)
    theirs = dict(base.encoder.named_parameters())
    diffs = {name: p.detach() - theirs[name].detach().cpu() for name, p in encoder.named_parameters()}
    info = {"task": task, "labels": list(labels), "source": str(folder), **origin(base)}
    return Delta(DeltaConfig("full"), diffs, {}, head, info)


def check_vocabulary(folder: Path, base: Base) -> None:
    """InputError if a tuned model's own tokenizer has another vocabulary than the base's, or gives other ids for a text."""
    try:
        tokenizer = load_tokenizer(folder)
    except NoTokenizer:
        return
    if tokenizer.vocabulary != base.tokenizer.vocabulary:
        raise InputError(f"{folder}: its tokenizer has another vocabulary than the base's; give the base that it was tuned from")
    if tokenizer.framed().encode(PROBE, PROBE).ids != base.tokenizer.framed().encode(PROBE, PROBE).ids:
        raise InputError(f"{folder}: its tokenizer has the base's vocabulary but gives other ids for a text (case, accents, first space, "
                         "special tokens around it); give a copy of the base with this tokenizer")


def numbered(labels: Iterable[str]) -> dict[str, str]:
    """Labels by their number, as in config.json."""
    return {str(i): str(label) for i, label in enumerate(labels)}


def class_names(facts: dict, outputs: int, given: tuple[str, ...], source: Path) -> tuple[str, ...]:
    """The labels of a classifier: `given`, or else config.json's, with numbers in place of placeholders. A regression has none."""
    problem, placeholders = facts.get("problem_type"), tuple(f"LABEL_{i}" for i in range(outputs))
    if problem not in (None, "regression", "single_label_classification"):
        raise InputError(f"{source}: problem_type {problem!r} is not supported: one label a text, or a regression")
    if problem == "regression" or outputs == 1:
        if outputs > 1 or given:
            raise InputError(f"{source}: a regression has one output and no labels, not {outputs} and {len(given)}")
        return ()
    named = facts.get("id2label") or {}
    if not isinstance(named, dict):
        raise InputError(f"{source}: id2label is not an object of names by numbers")
    own = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(len(named) or outputs))
    if given and given != own and {*given} == {*own}:
        note(f"{source}: names its outputs {', '.join(own[:6])}, in this order, and not {', '.join(given[:6])} as given")
    names = given or own
    if len(names) != outputs or len({*names}) < outputs:
        raise InputError(f"{source}: {len({*names})} different labels ({', '.join(names[:6])}) for a head of {outputs} outputs")
    for name in names:
        check_label(name, source)
    return names if names != placeholders else tuple(map(str, range(outputs)))


# --- export -----------------------------------------------------------------------------------------------------------

def hf_config(config: EncoderConfig, tokenizer: Tokenizer, task: str, labels: tuple[str, ...] | None = None) -> dict:
    """config.json of a model for `task` (MaskedLM, SequenceClassification, or ""). Empty `labels` mean a regression."""
    names = labels or ("LABEL_0",)
    heads = {} if labels is None else {
        "id2label": numbered(names), "label2id": {label: i for i, label in enumerate(names)},
        "problem_type": "single_label_classification" if labels else "regression"}
    return {"architectures": [CLASSES[config.model_type] + (f"For{task}" if task else "Model")], "model_type": config.model_type,
            **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
            "max_position_embeddings": config.max_len + config.first_position, "type_vocab_size": 2 if config.is_bert else 1,
            "hidden_act": "gelu", "pad_token_id": config.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
            "tie_word_embeddings": True, "torch_dtype": "float32", **heads}


def export_hf(folder: Path, base: Base, delta: Delta | None = None, labels: tuple[str, ...] | None = None, card: str | None = None) -> str:
    """Write a base, or base + delta merged, for transformers. Returns the Auto class that loads it. `labels` are the labels that a base
    will be tuned on, `card` is the text of README.md. InputError if the delta cannot be merged (adapter, prefix) or is of another base."""
    config = base.encoder.config
    if delta is not None:
        encoder, task, labels, head, modules = merge(base, delta), "SequenceClassification", delta.labels, delta.head, CLASSIFIERS
    elif base.head:
        encoder, task, head, modules = base.encoder.state_dict(), "MaskedLM", base.head.state_dict(), HEADS
    else:
        encoder, task, head, modules = base.encoder.state_dict(), "", base.pooler or {}, POOLERS
    types = torch.zeros(2 if config.is_bert else 1, config.hidden_size)
    if config.is_bert:
        types[1] = encoder["embeddings.second_type"]
    names = [*encoder_names(config), *(head_names(config, modules) if head else ())]
    weights = hf_state(encoder | head | {"embeddings.types": types}, config, names)
    with atomic_folder(folder, WRITTEN) as new:
        write_tensors(new / "model.safetensors", weights)
        write_json(new / "config.json", hf_config(config, base.tokenizer, task, labels))
        export_tokenizer(new, base.tokenizer, config)
        if card:
            write_whole(new / CARD, card)
    loads = f"AutoModelFor{task}" if task else "AutoModel"
    if not task:
        note(f"{folder} has no masked-LM head: the base has none, or not all of one")
    for what, stays in (("masked-LM head", base.head and delta), ("pooler", base.pooler and modules is HEADS)):
        if stays:
            note(f"{folder} is without the base's {what}: {loads} has no place for it")
    return loads


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write float32 tensors, each with its own memory, in the form that transformers and PEFT read."""
    own = {k: v.float().cpu().contiguous().clone() for k, v in tensors.items()}
    safetensors.torch.save_file(own, path, metadata={"format": "pt"})


def export_tokenizer(folder: Path, tokenizer: Tokenizer, config: EncoderConfig) -> None:
    """Write tokenizer.json, which frames a text as we do, and tokenizer_config.json, which makes AutoTokenizer read that file as it is."""
    tokenizer.framed().save(str(folder / "tokenizer.json"))
    token = tokenizer.backend.id_to_token
    first, last = token(tokenizer.bos_id), token(tokenizer.eos_id)
    unknown = next((t for t in ("<unk>", "[UNK]") if tokenizer.backend.token_to_id(t) is not None), last)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_len,
        "add_prefix_space": getattr(tokenizer.backend.pre_tokenizer, "add_prefix_space", False),     # transformers 4 sets it
        "cls_token": first, "sep_token": last, "bos_token": first, "eos_token": last,
        "pad_token": token(tokenizer.pad_id), "mask_token": token(tokenizer.mask_id), "unk_token": unknown,
        "model_input_names": ["input_ids", *(["token_type_ids"] if config.is_bert else []), "attention_mask"]})
