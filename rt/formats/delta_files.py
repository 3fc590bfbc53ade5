"""Deltas on disk."""
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

import safetensors.torch
import torch

from rt.deltas import PARTS, Delta
from rt.errors import InputError
from rt.formats.atomic import atomic_folder, check_seal, claim_whole, found, seal
from rt.formats.checkpoint import read_tensors, versions
from rt.formats.files import FIGURES, read_json
from rt.formats.untrusted import check_label
from rt.kinds import DeltaConfig

FILES = {"delta.safetensors", "delta.json", "metrics.jsonl", "summary.json", FIGURES}    # the last three are of the run that learned it


@contextmanager
def delta_folder(folder: Path, needs: int) -> Iterator[Path]:
    """A folder to write a delta of about `needs` bytes into, which takes the place of `folder` when it is whole; of that, which may hold
    nothing else than a delta (InputError), the figures stay."""
    claim_whole(folder, FILES)
    with atomic_folder(folder, needs) as new:
        yield new
        if (folder / FIGURES).is_dir():
            shutil.copytree(folder / FIGURES, new / FIGURES)


def save_delta(folder: Path, delta: Delta) -> None:
    """delta.safetensors and delta.json in a folder that appears whole. What another holds of the run that learned it stays. InputError
    where it holds anything else."""
    folder = Path(folder)
    with delta_folder(folder, delta.nbytes) as new:
        write_delta(new, delta)
        for name in ("metrics.jsonl", "summary.json"):
            if (folder / name).exists():
                shutil.copy2(folder / name, new)


def write_delta(folder: Path, delta: Delta) -> None:
    """delta.safetensors and, with its hash, delta.json into a folder that is being made."""
    tensors = {f"{part}.{k}": v.contiguous() for part in PARTS for k, v in getattr(delta, part).items()}
    safetensors.torch.save_file(tensors, folder / "delta.safetensors")
    seal(folder, "delta.json", {"format": "rt-delta-1", **asdict(delta.config), "info": delta.info, "versions": versions()},
         ["delta.safetensors"])


def load_delta(folder: Path) -> Delta:
    """What `save_delta` wrote. Raises InputError naming the file that is missing or is not what it should be."""
    folder = found(Path(folder))
    facts = read_json(folder / "delta.json")
    if facts.get("format") != "rt-delta-1":
        raise InputError(f"{folder / 'delta.json'}: not a delta (format {facts.get('format')!r}, expected 'rt-delta-1')")
    info = facts.get("info")
    if not isinstance(info, dict) or not {"labels", "base", "tokenizer", "encoder"} <= info.keys() or not isinstance(info["labels"], list):
        raise InputError(f"{folder / 'delta.json'}: does not say what base and labels the delta belongs to")
    if not isinstance(facts.get("target_modules", []), list):
        raise InputError(f"{folder / 'delta.json'}: target_modules is no list")
    config = DeltaConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()
                            if k in DeltaConfig.__dataclass_fields__})
    parts: dict[str, dict] = {part: {} for part in PARTS}
    for name, tensor in read_tensors(folder / "delta.safetensors").items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise InputError(f"{folder / 'delta.safetensors'}: unexpected tensor {name}")
        parts[part][rest] = tensor
    check_seal(folder, "delta.json", facts)
    labels, outputs = info["labels"], parts["head"].get("out.bias", torch.empty(0)).numel()
    if any(not isinstance(label, str) for label in labels) or len({*labels}) != (outputs if labels else 0) or not labels and outputs != 1:
        raise InputError(f"{folder / 'delta.json'}: its labels ({str(labels)[:80]}) are not those of a head of {outputs} outputs")
    for label in labels:
        check_label(label, folder / "delta.json")
    return Delta(config, **parts, info=info)
