"""RoBERTa checkpoints in Hugging Face's format: a local folder or a hub id becomes a Base.

Names map one to one, except that query, key and value are one matrix here and the single token type is added to the
position table.
"""
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from rt.checkpoint import Base, fingerprint, load_base, load_strict, read_json, read_tensors
from rt.config import UsageError
from rt.model import Encoder, EncoderConfig, MLMHead
from rt.tokenizer import load_tokenizer

LAYER_NAMES = {"attention.output.dense": "attention_output", "attention.output.LayerNorm": "attention_norm",
               "intermediate.dense": "intermediate", "output.dense": "output", "output.LayerNorm": "output_norm"}
HUB_FILES = ["config.json", "tokenizer.json", "vocab.json", "merges.txt"]


def open_base(name: str) -> Base:
    """A base from a checkpoint folder of ours, a Hugging Face folder, or a hub id such as FacebookAI/roberta-base."""
    path = Path(name)
    if (path / "meta.json").is_file():
        return load_base(path)
    if (path / "config.json").is_file():
        return load_hf(path)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return load_hf(_download(name))
    raise UsageError(f"{name}: no base there; expected a folder with meta.json (ours) or config.json (Hugging Face), or a "
                     "hub id such as FacebookAI/roberta-base")


def _download(name: str) -> Path:
    """The files of a hub id, from the local cache where they are. Only called when a hub id was asked for."""
    from huggingface_hub import snapshot_download  # comes with tokenizers; slow to import, so only here
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "model.safetensors"]))
        if not (folder / "model.safetensors").exists():
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model.bin"]))
        return folder
    except Exception as error:  # network, authorisation, not found: the library has a class for each
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name}: neither a folder here nor to be had from the hub ({reason})") from None


def hf_encoder_config(facts: dict, source: Path | str) -> EncoderConfig:
    """Hugging Face's config.json of a RoBERTa as ours. UsageError names what is not supported."""
    if facts.get("model_type") != "roberta":
        raise UsageError(f"{source}: model_type {facts.get('model_type')!r} is not supported, only 'roberta'")
    if facts.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{source}: hidden_act {facts['hidden_act']!r} is not supported, only 'gelu'")
    try:
        pad_id = facts.get("pad_token_id", 1)
        return EncoderConfig(
            vocab_size=facts["vocab_size"], hidden_size=facts["hidden_size"], num_layers=facts["num_hidden_layers"],
            num_heads=facts["num_attention_heads"], ffn_size=facts["intermediate_size"],
            max_len=facts["max_position_embeddings"] - pad_id - 1, pad_id=pad_id,
            dropout=facts.get("hidden_dropout_prob", 0.1),
            attention_dropout=facts.get("attention_probs_dropout_prob", 0.1),
            layer_norm_eps=facts.get("layer_norm_eps", 1e-5))
    except KeyError as error:
        raise UsageError(f"{source}: has no {error.args[0]}") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return read_tensors(folder / "model.safetensors")
    file = folder / "pytorch_model.bin"
    if not file.is_file():
        raise UsageError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that asks for code is refused here as well
        raise UsageError(f"{file}: not a weights-only PyTorch file ({str(error).splitlines()[0]})") from None


def encoder_state(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Hugging Face names (with or without `roberta.` before them) -> state dict of our Encoder. KeyError: one is missing."""
    w = {k.removeprefix("roberta."): v.float() for k, v in weights.items()}
    e = "embeddings."
    state = {e + "word.weight": w[e + "word_embeddings.weight"],
             e + "position.weight": w[e + "position_embeddings.weight"] + w[e + "token_type_embeddings.weight"][0],
             e + "norm.weight": w[e + "LayerNorm.weight"], e + "norm.bias": w[e + "LayerNorm.bias"]}
    for i in range(num_layers):
        theirs, ours = f"encoder.layer.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            thirds = [w[f"{theirs}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{ours}qkv.{kind}"] = torch.cat(thirds)
            for their_name, our_name in LAYER_NAMES.items():
                state[f"{ours}{our_name}.{kind}"] = w[f"{theirs}{their_name}.{kind}"]
    return state


def mlm_head_state(weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """State dict of our MLMHead, or None where the checkpoint has no masked-LM head."""
    names = {"dense.weight": "dense.weight", "dense.bias": "dense.bias", "layer_norm.weight": "norm.weight",
             "layer_norm.bias": "norm.bias", "bias": "bias"}
    if not all(f"lm_head.{k}" in weights for k in names):
        return None
    return {ours: weights[f"lm_head.{theirs}"].float() for theirs, ours in names.items()}


def classification_head_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of our ClassificationHead from RobertaForSequenceClassification's `classifier.*`."""
    return {k.replace("out_proj", "out"): weights[f"classifier.{k}"].float()
            for k in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")}


def load_hf(folder: Path) -> Base:
    """A RoBERTa checkpoint folder (config.json, model.safetensors or pytorch_model.bin, tokenizer files) as a Base."""
    folder = Path(folder)
    config = hf_encoder_config(read_json(folder / "config.json"), folder / "config.json")
    weights = _read_weights(folder)
    encoder = Encoder(config)
    try:
        load_strict(encoder, encoder_state(weights, config.num_layers), folder)
    except KeyError as error:
        raise UsageError(f"{folder}: the checkpoint has no tensor {error.args[0]}") from None
    head, head_state = None, mlm_head_state(weights)
    if head_state is not None:
        head = MLMHead(config)
        load_strict(head, head_state, folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    mark = fingerprint(encoder)
    return Base(encoder, head, tokenizer, {"name": os.path.basename(folder), "fingerprint": mark}, mark)
