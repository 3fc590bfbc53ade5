"""Bases on disk. A checkpoint is a folder that appears whole (rt/folders.py):

    model.safetensors   encoder.* and head.* tensors, float32
    tokenizer.json      the tokenizer it was trained with
    meta.json           sizes, step, scores, fingerprint, parent's fingerprint (the lineage), config, argv, versions,
                        and the sha256 of the files beside it and of itself, checked on loading
    optim.pt            optimizer state, only where training can go on from here; loaded weights-only

The fingerprint is a hash of the encoder's content: a delta carries that of the base it was learned on.
"""
import hashlib
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rt import __version__
from rt.config import UsageError
from rt.folders import atomic_folder, check_seal, found, seal
from rt.log import read_json
from rt.model import Encoder, EncoderConfig, MaskedLM, MLMHead
from rt.tokenizer import Tokenizer, load_tokenizer


class StaleDelta(UsageError):
    """A delta met a base that it was not learned on, outside recycling."""


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
        """UsageError unless the base has positions for sequences of `seq_len` tokens."""
        if seq_len > self.encoder.config.max_len:
            raise UsageError(f"--seq_len {seq_len}: the base has positions for {self.encoder.config.max_len} tokens")


def fingerprint(module: nn.Module) -> str:
    """Hash of names, shapes and values: 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def versions() -> dict:
    return {"rt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def save_base(folder: Path, model: MaskedLM, tokenizer: Tokenizer, meta: dict,
              optimizer: torch.optim.Optimizer | None = None, keep: bool = False) -> str:
    """Write a checkpoint; returns the fingerprint. `meta` is added to what is always recorded; `keep` leaves the one before as
    FOLDER.old. UsageError where the disk is full: the one before then stays."""
    mark = fingerprint(model.encoder)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    state = optimizer.state_dict() if optimizer is not None else None
    moments = [x for each in state["state"].values() for x in each.values() if isinstance(x, Tensor)] if state else []
    with atomic_folder(folder, needs=sum(x.nbytes for x in (*weights.values(), *moments)), keep=keep) as new:
        safetensors.torch.save_file(weights, new / "model.safetensors")
        tokenizer.save(new)
        files = ["model.safetensors", "tokenizer.json"]
        if state is not None:
            with (new / "optim.pt").open("wb") as file:     # Python's, whose error says that the disk is full
                torch.save(state, file)
            files.append("optim.pt")
        seal(new, "meta.json", {"format": "rt-base-1", "encoder": asdict(model.encoder.config), "fingerprint": mark,
                                "tokenizer": tokenizer.fingerprint, "versions": versions(), **meta}, files)
    return mark


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UsageError says which file is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except Exception as error:  # SafetensorError, OSError: a damaged file
        raise UsageError(f"{path}: not a readable safetensors file ({_reason(path, error)})") from None


def _reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read; a Git LFS pointer is what a clone without LFS has in its place."""
    with file.open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer: git lfs pull fetches the file"
    return str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors or pytorch_model.bin, in one file or in shards with an index. UsageError names what is wrong."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return read_file(folder / stem)
        if (folder / f"{stem}.index.json").is_file():
            return _read_shards(folder / f"{stem}.index.json")
    raise UsageError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of either's shards")


def read_state(file: Path) -> Any:
    """What a PyTorch file holds, loaded weights-only: a pickle that asks for code is refused (UsageError)."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many classes: damaged, or refused
        raise UsageError(f"{file}: not a weights-only PyTorch file ({_reason(file, error)})") from None


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors or, by any other ending, weights-only PyTorch file."""
    if file.suffix == ".safetensors":
        return read_tensors(file)
    weights = read_state(file)
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UsageError(f"{file}: holds something else than tensors by name")
    return weights


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


def load_strict(module: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict where missing, unexpected or misshapen tensors are one sentence."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UsageError(f"{source}: the tensors do not fit the model: {first}") from None


def load_base(folder: Path) -> Base:
    """A checkpoint folder of ours, checked against the hashes in its meta.json; where that is of before there were any, against the
    fingerprint. rt.hub.open_base also takes Hugging Face folders and ids."""
    folder = found(Path(folder))
    meta = read_json(folder / "meta.json")
    if meta.get("format") != "rt-base-1":
        raise UsageError(f"{folder / 'meta.json'}: not a base checkpoint of ours (format {meta.get('format')!r}, expected "
                         "'rt-base-1')")
    try:
        config = EncoderConfig(**meta["encoder"])
    except (KeyError, TypeError):
        raise UsageError(f"{folder / 'meta.json'}: its \"encoder\" does not hold the sizes of one") from None
    with ThreadPoolExecutor(1) as pool:     # the file is hashed while its tensors are read
        checked = pool.submit(check_seal, folder, "meta.json", meta, ("model.safetensors", "tokenizer.json"))
        model = MaskedLM(Encoder(config), MLMHead(config))
        load_strict(model, read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
        tokenizer = load_tokenizer(folder)
        checked.result()
    mark = meta.get("fingerprint") if "sha256" in meta else fingerprint(model.encoder)      # the weights are those it was made of
    for what, seen, noted in (("weights", mark, "fingerprint"), ("tokenizer", tokenizer.fingerprint, "tokenizer")):
        if seen != meta.get(noted):
            raise UsageError(f"{folder}: the {what} are not those that meta.json was written for ({seen}, not {meta.get(noted)})")
    return Base(model.encoder, model.head, tokenizer, meta, mark)
