"""Where models come from: a folder of ours, a folder in Hugging Face's format, or a hub id; and the files in them.

Nothing here runs code that a file brings: safetensors, or PyTorch files loaded weights-only. The network is asked only where a hub id
was given that is not in the local cache.
"""
import re
from pathlib import Path

import torch
from torch import Tensor

from rt.checkpoint import Base, load_base, read_json, read_tensors
from rt.config import UsageError
from rt.deltas import Delta, load_delta

HUB_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "adapter_config.json", "labels.json",
             "adapter_model.safetensors", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def open_base(name: str) -> Base:
    """A base from a checkpoint folder of ours, a Hugging Face folder, or a hub id such as FacebookAI/roberta-base."""
    from rt.hf import load_hf  # which reads its files by this module
    path = find(name)
    if (path / "meta.json").is_file():
        return load_base(path)
    if (path / "config.json").is_file():
        return load_hf(path)
    raise UsageError(f"{name}: no base there; expected a folder with meta.json (ours) or config.json (Hugging Face), or a "
                     "hub id such as FacebookAI/roberta-base")


def open_delta(name: str, base: Base, labels: tuple[str, ...] = (), task: str | None = None) -> Delta:
    """A delta of ours, or what a model tuned from `base` elsewhere is as one: a ...ForSequenceClassification checkpoint or a PEFT LoRA
    adapter, folder or hub id. `labels` name the classes of those in the order of their outputs, `task` what they were tuned on."""
    from rt.hf import import_tuned
    from rt.peft import import_lora
    path = find(name)
    if (path / "delta.json").is_file():
        return load_delta(path)
    if (path / "adapter_config.json").is_file():
        return import_lora(path, base, labels, task)
    if (path / "config.json").is_file():
        return import_tuned(path, base, labels, task)
    raise UsageError(f"{name}: nothing tuned there; expected a folder with delta.json (ours), config.json (a tuned Hugging Face model) or "
                     "adapter_config.json (PEFT), or a hub id")


def find(name: str) -> Path:
    """The folder called `name`, or that of a hub id in the local cache, downloaded where it is not there yet."""
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return path
    from huggingface_hub import snapshot_download  # comes with tokenizers; slow to import, so only here
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model*.bin", "pytorch_model.bin.index.json"]))
        return folder
    except Exception as error:  # network, authorisation, not found: the library has a class for each
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name}: neither a folder here nor to be had from the hub ({reason})") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors or pytorch_model.bin, in one file or in shards with an index. UsageError names what is wrong."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return read_file(folder / stem)
        if (folder / f"{stem}.index.json").is_file():
            return _read_shards(folder / f"{stem}.index.json")
    raise UsageError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of either's shards")


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors or, by any other ending, weights-only PyTorch file."""
    if file.suffix == ".safetensors":
        return read_tensors(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that asks for code is refused here as well
        raise UsageError(f"{file}: not a weights-only PyTorch file ({str(error).splitlines()[0]})") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UsageError(f"{index}: has no \"weight_map\" of tensor names to files")
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):     # nothing outside the folder
            raise UsageError(f"{index}: {shard!r} is not the name of a shard beside it")
        if not (index.parent / shard).is_file():
            raise UsageError(f"{index.parent / shard}: the shard is missing")
        weights |= read_file(index.parent / shard)
    missing = sorted(places.keys() - weights.keys())
    if missing:
        raise UsageError(f"{index}: the shards do not hold {missing[0]}")
    return weights
