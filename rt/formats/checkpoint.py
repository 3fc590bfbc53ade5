"""Bases on disk. A checkpoint is a folder that appears whole (rt/formats/atomic.py):

    model.safetensors   encoder.* and head.* tensors, float32
    tokenizer.json      the tokenizer that the base was trained with
    meta.json           sizes, step, scores, fingerprint, parent's fingerprint (the lineage), config, argv, versions,
                        and the sha256 of the other files and of itself, checked on loading
    optim.pt            optimizer state, only if training can continue from here; loaded weights-only

The fingerprint is a hash of the encoder's content. A delta carries the fingerprint of its base.
"""
import hashlib
import platform
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable

import safetensors.torch
import torch
from torch import Tensor, nn

from rt import __version__
from rt.deltas import Base, check_state
from rt.errors import InputError
from rt.formats.atomic import atomic_folder, check_seal, found, seal
from rt.formats.files import read_json
from rt.formats.tokenizer import Tokenizer, load_tokenizer
from rt.formats.untrusted import header, is_number, is_whole, reading, shaped
from rt.model import Encoder, EncoderConfig, MaskedLM, MLMHead

# rules for the facts in a meta.json; each fact may be missing
META = {"number": lambda v: is_whole(v, -1), "step": lambda v: is_whole(v, 0),
        **dict.fromkeys(("name", "trunk"), lambda v: isinstance(v, str)),
        **dict.fromkeys(("stage", "recipe"), lambda v: isinstance(v, dict)),
        **dict.fromkeys(("domains", "contents"), lambda v: isinstance(v, dict) and all(isinstance(text, str) for text in v.values()))}
# rules for the settings of an encoder; each relies on the rules above it
ENCODER = {**dict.fromkeys(("hidden_size", "num_layers", "ffn_size", "max_len", "vocab_size"), lambda v, c: is_whole(v, 1)),
           "num_heads": lambda v, c: is_whole(v, 1) and c.hidden_size % v == 0,
           "pad_id": lambda v, c: is_whole(v, 0, c.vocab_size - 1),
           "sep_id": lambda v, c: v is None or is_whole(v, 0, c.vocab_size - 1),
           **dict.fromkeys(("dropout", "attention_dropout"), lambda v, c: is_number(v, 0, 0.99)),
           "layer_norm_eps": lambda v, c: is_number(v, 1e-20, 0.1), "model_type": lambda v, c: isinstance(v, str)}


def fingerprint(module: nn.Module) -> str:
    """Hash of the names, shapes and values of all weights: 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def versions() -> dict:
    return {"rt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def check_encoder(config: EncoderConfig, source: Path | str, names: dict[str, str] = {}) -> EncoderConfig:
    """Returns `config`. InputError names the first setting that no encoder can have. `names` maps our names to the file's, if different."""
    for name, holds in ENCODER.items():
        value = getattr(config, name)
        if not holds(value, config):
            raise InputError(f"{source}: {names.get(name, name)} {value!r} is not possible for an encoder"
                             + (f" with hidden_size {config.hidden_size!r}" if name == "num_heads" else ""))
    return config


# --- our checkpoints --------------------------------------------------------------------------------------------------

def save_base(folder: Path, model: MaskedLM, tokenizer: Tokenizer, meta: dict, optimizer: torch.optim.Optimizer | None = None,
              recipe: dict = {}) -> str:
    """Write a checkpoint, with `meta` in meta.json and the state of the `recipe` in optim.pt. Returns the fingerprint."""
    mark = fingerprint(model.encoder)
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    state = optimizer.state_dict() if optimizer is not None else {"state": {}}
    state |= {"recipe": recipe} if recipe else {}
    moments = [*recipe.get("before", ()), *(x for values in state["state"].values() for x in values.values() if isinstance(x, Tensor))]
    with atomic_folder(folder, needs=sum(x.nbytes for x in (*weights.values(), *moments))) as new:
        safetensors.torch.save_file(weights, new / "model.safetensors")
        tokenizer.save(new)
        if optimizer is not None:
            with (new / "optim.pt").open("wb") as file:     # a Python file: its error says if the disk is full
                torch.save(state, file)
        seal(new, "meta.json", {"format": "rt-base-1", "encoder": asdict(model.encoder.config), "fingerprint": mark,
                                "tokenizer": tokenizer.fingerprint, "versions": versions(), **meta}, sorted(f.name for f in new.iterdir()))
    return mark


def load_base(folder: Path) -> Base:
    """Load a checkpoint folder of ours and check it against the hashes in its meta.json (in older checkpoints, against the fingerprint)."""
    folder = found(Path(folder))
    facts, file = folder / "meta.json", folder / "model.safetensors"
    meta = read_json(facts)
    config = check_meta(meta, facts)
    state = read_tensors(file)
    if config.num_layers > len(state):      # building a layer takes time even without memory
        raise InputError(f"{file}: the tensors do not fit the model: {len(state)} tensors, {config.num_layers} layers")
    model = build(lambda c: MaskedLM(Encoder(c), MLMHead(c)), config, state, file)
    tokenizer = load_tokenizer(folder)
    check_seal(folder, "meta.json", meta, ("model.safetensors", "tokenizer.json"))
    mark = meta.get("fingerprint") if "sha256" in meta else fingerprint(model.encoder)      # checked weights have the noted fingerprint
    for what, seen, noted in (("other weights", mark, meta.get("fingerprint")),
                              ("another tokenizer", tokenizer.fingerprint, meta.get("tokenizer"))):
        if seen != noted:
            raise InputError(f"{folder}: meta.json was written for {what} ({noted}, not {seen})")
    return Base(model.encoder, model.head, tokenizer, meta, mark)


def check_meta(meta: dict, source: Path) -> EncoderConfig:
    """The encoder's sizes in a meta.json. InputError if the file does not belong to a base."""
    if meta.get("format") != "rt-base-1":
        raise InputError(f"{source}: not a base checkpoint of ours (format {meta.get('format')!r}, expected 'rt-base-1')")
    for name, holds in META.items():
        if name in meta and not holds(meta[name]):
            raise InputError(f"{source}: its {name} is {meta[name]!r}, which no base has")
    with shaped(source, "its \"encoder\" does not hold the sizes of an encoder"):
        return check_encoder(EncoderConfig(**meta["encoder"]), source)


def build(make: Callable[[EncoderConfig], nn.Module], config: EncoderConfig, state: dict[str, Tensor], source: Path | str) -> nn.Module:
    """make(config) with the tensors of `state`. InputError if they do not fit, before memory is allocated for the sizes in `config`."""
    what = f"{source}: the tensors do not fit the model"
    try:
        with torch.device("meta"):
            expected = make(config).state_dict()
    except (RuntimeError, OverflowError) as error:
        raise InputError(f"{what}: {str(error).partition(chr(10))[0]}") from None
    check_state(state, {name: tensor.shape for name, tensor in expected.items()}, what)
    module = make(config)
    module.load_state_dict(state)
    return module


# --- files of tensors, ours and others' -------------------------------------------------------------------------------

def read_weights(folder: Path, stems: tuple[str, str] = ("model.safetensors", "pytorch_model.bin")) -> dict[str, Tensor]:
    """The tensors of the first of two files that is there, whole or in shards with an index. InputError names what is wrong."""
    for stem in stems:
        if (folder / stem).is_file():
            return read_file(folder / stem)
        if (folder / f"{stem}.index.json").is_file():
            return _read_shards(folder / f"{stem}.index.json")
    raise InputError(f"{folder}: has neither {stems[0]} nor {stems[1]}, nor an index of either's shards")


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{index}: has no \"weight_map\" of tensor names to files")
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):     # nothing outside the folder
            raise InputError(f"{index}: {shard!r} is not the name of a shard beside it")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index.parent / shard}: the shard is missing")
        new = read_file(index.parent / shard)
        if twice := sorted(weights.keys() & new.keys()):
            raise InputError(f"{index.parent / shard}: {twice[0]} is in another shard, too")
        weights |= new
    if missing := sorted(places.keys() - weights.keys()):
        raise InputError(f"{index}: the shards do not hold {missing[0]}")
    return weights


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: safetensors, or, with any other ending, a weights-only PyTorch file."""
    if file.suffix == ".safetensors":
        return read_tensors(file)
    tensors = read_torch(file)
    if isinstance(tensors, dict) and "state_dict" in tensors:       # Lightning's
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise InputError(f"{file}: holds something other than named tensors")
    return {k: v.clone() for k, v in tensors.items()}      # copied: the tensors were mapped from the file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. None is larger than the file. InputError says which file is damaged."""
    header(path)
    with reading(path, "readable safetensors file"):
        return safetensors.torch.load_file(path)


def read_torch(path: Path) -> Any:
    """Tensors, numbers, strings, lists and dicts that torch.save wrote. InputError for anything else and for parts larger than the file."""
    with reading(path, "weights-only PyTorch file"):
        with path.open("rb") as file:
            is_zip, size = file.read(2) == b"PK", path.stat().st_size
        if is_zip:      # torch.save compresses nothing; mapped, because a tensor may claim more memory than the file has
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
                raise ValueError("its parts are packed, or larger than the file")
        value = torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
        check_plain(value, 4 * size)    # tied weights count twice
        return value


def check_plain(value: Any, most: int) -> None:
    """ValueError unless `value` consists of dicts, lists, numbers, strings and dense tensors within their storage, `most` bytes in all."""
    todo, seen = [value], set()
    while todo:
        part = todo.pop()
        if id(part) in seen:    # a file of a few bytes can refer to one list a billion times
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple)):
            todo += part
        elif isinstance(part, Tensor):
            size = part.numel() * part.element_size()
            most -= size
            if part.layout != torch.strided or part.device.type != "cpu" or size > part.untyped_storage().nbytes() or most < 0:
                raise ValueError("a tensor is not dense, or larger than what the file holds of it")
        elif not isinstance(part, (str, int, float, type(None))):
            raise ValueError(f"holds a {type(part).__name__}")
