"""Where models come from: a folder of ours or of Hugging Face's format, or a hub id; with HF_HUB_OFFLINE=1 only what the hub has cached.

A hub id is OWNER/NAME, both made of letters, digits, _, - and . (not at the beginning), if nothing here is called OWNER/NAME or OWNER, and
OWNER is not runs, the home of our own runs. Anything else is a path: runs/M9, ./OWNER/NAME, a/b/c.
"""
import re
from pathlib import Path

from rt.deltas import Base, Delta
from rt.errors import InputError
from rt.formats.adapters import import_adapter
from rt.formats.atomic import found
from rt.formats.checkpoint import load_base
from rt.formats.delta_files import load_delta
from rt.formats.files import read_json
from rt.formats.hf import import_tuned, load_hf
from rt.formats.peft import import_lora

HUB_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
             "special_tokens_map.json", "adapter_config.json", "labels.json", "head_config.json", "adapter.safetensors",
             "model_head.safetensors", "adapter_model.safetensors", "model.safetensors", "model-*.safetensors",
             "model.safetensors.index.json"]
# asked for if there are no safetensors
BIN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "pytorch_adapter.bin"]
SECONDS = 10    # that the hub has for its first answer
NAMING = "python -m rt.runs.convert import --tuned ... --base ... --labels names,in,the,order,of,its,outputs"


def open_base(name: str) -> Base:
    """A base from a checkpoint folder of ours, a Hugging Face folder, or a hub id such as FacebookAI/roberta-base."""
    path = find(name)
    for file, load in (("meta.json", load_base), ("config.json", load_hf)):
        if (path / file).is_file():
            return load(path)
    raise InputError(f"{name}: no base there; expected a folder with meta.json (ours) or config.json (Hugging Face), or a "
                     "hub id such as FacebookAI/roberta-base")


def open_delta(name: str, base: Base, labels: tuple[str, ...] = (), task: str | None = None) -> Delta:
    """A delta of ours, or a model that was tuned from `base` elsewhere as a delta: a ...ForSequenceClassification checkpoint, a PEFT LoRA
    adapter or an adapter of AdapterHub or OpenDelta, folder or hub id. `labels` name its classes in the order of its outputs, `task` what
    it was tuned on."""
    path = find(name)
    if (path / "delta.json").is_file():
        return load_delta(path)
    for file, load, foreign in (("adapter_config.json", import_lora, "config"), ("config.json", import_tuned, "delta_type")):
        if (path / file).is_file():
            return (import_adapter if foreign in read_json(path / file) else load)(path, base, labels, task)
    raise InputError(f"{name}: nothing tuned there; expected a folder with delta.json (ours), config.json (a tuned Hugging Face model) or "
                     "adapter_config.json (PEFT), or a hub id")


def place_of_delta(base: str, task: str, kind: str, more: str = "", seed: int = 0) -> Path:
    """Where a delta is written and looked for unless a flag says: beside its base, or for a hub id under runs."""
    home = Path(base).parent if Path(base).exists() else Path("runs")
    return home / "deltas" / f"{Path(base).name}-{task}-{kind}{more}-s{seed}"


def is_hub_id(name: str) -> bool:
    """Whether the network may be asked for `name`; see above."""
    path = Path(name)
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not (
        path.exists() or path.parent.exists() or path.parts[0] == "runs")


def find(name: str) -> Path:
    """The folder called `name`, or that of a hub id in the local cache, downloaded if it is not there yet."""
    if not is_hub_id(name):
        return found(Path(name))
    from huggingface_hub import HfApi, snapshot_download  # comes with tokenizers; slow to import, so only here

    first = None
    try:
        HfApi().model_info(name, timeout=SECONDS)       # whether there is a connection: a download itself would wait for one for minutes
    except Exception as error:  # network, offline, authorisation, not found: the library has a class for each
        first = error
    try:
        for patterns in (HUB_FILES, HUB_FILES + BIN_FILES):
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=first is not None))
            if any(folder.glob("*.safetensors")):
                break
        return folder
    except Exception as error:
        why = str(first or error) or type(first or error).__name__
        raise InputError(f"{name}: neither a folder here nor to be had from the hub ({why.splitlines()[0]})") from None
