"""Deltas on disk: a folder with delta.safetensors (tensors named PART.NAME) and delta.json (config, origin, hashes)."""
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Iterator

import safetensors.torch
import torch

from rt.deltas import PARTS, Base, Delta
from rt.errors import InputError
from rt.formats.adapters import import_adapter
from rt.formats.atomic import atomic_folder, check_seal, found, seal
from rt.formats.checkpoint import read_tensors, versions
from rt.formats.files import EVENTS, FIGURES, other_library, read_json
from rt.formats.hf import class_names, import_tuned, numbered
from rt.formats.hub import HUB_NAME, find
from rt.formats.untrusted import check_label, is_whole, shaped
from rt.kinds import DeltaConfig

OF_THE_RUN = ("metrics.jsonl", "summary.json", EVENTS)      # left by the run that learned the delta
FILES = {"delta.safetensors", "delta.json", *OF_THE_RUN, FIGURES}


def open_delta(name: str, base: Base, labels: tuple[str, ...] = (), task: str | None = None) -> Delta:
    """Open a delta of ours, or import a model that was tuned from `base` elsewhere: a ...ForSequenceClassification checkpoint or an adapter
    of PEFT (LoRA); folder or hub id. `labels` names its classes in the order of its outputs, `task` its task."""
    path, called = find(name), task or Path(os.path.abspath(name)).name     # . has no name, and the hub's cache has names of commits
    if (path / "delta.json").is_file():
        delta = load_delta(path)
        names = {"labels": [*class_names({"id2label": numbered(delta.labels)}, delta.num_outputs, labels, path)]} if labels else {}
        return replace(delta, info=delta.info | names | ({"task": task} if task else {}))
    if (path / "adapter_config.json").is_file() or other_library(path):
        return import_adapter(path, base, labels, called)
    if (path / "config.json").is_file():
        return import_tuned(path, base, labels, called)
    raise InputError(f"{name}: nothing tuned there; expected a folder with delta.json (ours), config.json (a tuned Hugging Face model) or "
                     f"adapter_config.json (PEFT), or {HUB_NAME}")


def place_of_delta(base: str, task: str, kind: str, more: str = "", seed: int = 0) -> Path:
    """The default place of a delta: next to its base, or under runs if the base is a hub id."""
    base = base if Path(base).name.strip(".") else os.path.abspath(base)      # . and .. have no name of their own
    home = Path(base).parent if Path(base).exists() else Path("runs")
    return home / "deltas" / f"{Path(base).name}-{task}-{kind}{more}-s{seed}"


@contextmanager
def delta_folder(folder: Path, needs: int, kept: tuple[str, ...] = (FIGURES,)) -> Iterator[Path]:
    """`atomic_folder` for a delta of about `needs` bytes. Old files in `kept` stay. InputError if `folder` holds anything but a delta."""
    with atomic_folder(folder, FILES, needs) as new:
        yield new
        for old in (Path(folder) / name for name in kept):
            if old.exists():
                (shutil.copytree if old.is_dir() else shutil.copy2)(old, new / old.name)


def seq_len_of(delta: Delta) -> int | None:
    """The longest text, in tokens, that a delta was learned on, or None if unknown."""
    config = delta.info.get("config")
    length = config.get("seq_len") if isinstance(config, dict) else None
    return length if is_whole(length, 8) else None


def nbytes(delta: Delta) -> int:
    return sum(x.nbytes for x in delta.tensors().values())


def save_delta(folder: Path, delta: Delta) -> None:
    """Write a delta in place of an older one. The figures and the files of its run stay. InputError if `folder` holds anything else."""
    with delta_folder(folder, nbytes(delta), (FIGURES, *OF_THE_RUN)) as new:
        write_delta(new, delta)


def write_delta(folder: Path, delta: Delta) -> None:
    """Write delta.safetensors, and delta.json with its hash, into a folder that is being made."""
    safetensors.torch.save_file({name: v.contiguous() for name, v in delta.tensors().items()}, folder / "delta.safetensors")
    facts = {"format": "rt-delta-1", **asdict(delta.config), "info": delta.info, "versions": versions()}
    seal(folder, "delta.json", facts, ["delta.safetensors"])


def load_delta(folder: Path) -> Delta:
    """Load the delta in a folder. InputError names a file that is missing, damaged or not a delta's."""
    folder = found(Path(folder))
    source, weights = folder / "delta.json", folder / "delta.safetensors"
    facts = read_json(source)
    if facts.get("format") != "rt-delta-1":
        raise InputError(f"{source}: not a delta (format {facts.get('format')!r}, expected 'rt-delta-1')")
    info = facts.get("info")
    if not isinstance(info, dict) or not {"labels", "base", "tokenizer", "encoder"} <= info.keys() or not isinstance(info["labels"], list):
        raise InputError(f"{source}: does not say what base and labels the delta belongs to")
    with shaped(source, "its settings are not those of a delta"):
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in DeltaConfig.__dataclass_fields__}
        config = DeltaConfig(**settings).check()
    parts: dict[str, dict] = {part: {} for part in PARTS}
    for name, tensor in read_tensors(weights).items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise InputError(f"{weights}: unexpected tensor {name}")
        parts[part][rest] = tensor
    check_seal(folder, "delta.json", facts)
    labels, outputs = info["labels"], parts["head"].get("out.bias", torch.empty(0)).numel()
    if not all(isinstance(label, str) for label in labels) or len({*labels}) != len(labels) or outputs != (len(labels) or 1):
        raise InputError(f"{source}: its labels ({str(labels)[:80]}) are not those of a head of {outputs} outputs")
    for label in labels:
        check_label(label, source)
    return Delta(config, **parts, info=info)
