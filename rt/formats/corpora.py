"""Corpora: text on disk, tokenized once into memory-mapped bins."""
import hashlib
import json
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Iterator

import numpy as np
from tqdm import tqdm

from rt.data import Corpus
from rt.errors import InputError
from rt.formats.atomic import atomic_folder, locked
from rt.formats.files import read_json, write_json
from rt.formats.tables import read_table
from rt.formats.tokenizer import Tokenizer
from rt.formats.untrusted import is_utf8, shaped

TEXT_ENDINGS = (".txt", ".txt.gz", ".txt.xz", ".jsonl")
HELDOUT_SHARE = 50      # one document in so many is held out of a corpus that has no heldout file
PARTS = ("train", "heldout")
CHUNK = 1000            # documents that are tokenized at a time


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one text file: a line each, or the `text` of a JSON object each. Blank ones are left out."""
    for place, row in read_table(path, "jsonl" if path.suffix == ".jsonl" else "txt"):
        if not isinstance(row.get("text"), str):
            raise InputError(f"{place}: has no \"text\" string")
        if row["text"].strip():
            yield row["text"]


def corpus_files(path: Path) -> dict[str, list[Path]]:
    """{'train': files, 'heldout': files}. `heldout.*` in a folder is held out; without it 'heldout' is empty."""
    if not path.exists():
        raise InputError(f"{path}: there is no such corpus, file or folder")
    files = [f for f in ([path] if path.is_file() else sorted(path.iterdir())) if f.name.endswith(TEXT_ENDINGS)]
    if not files:
        raise InputError(f"{path}: no text there; a corpus is {', '.join(TEXT_ENDINGS)} files, one document a line")
    heldout = [f for f in files if f.name.split(".")[0] == "heldout"]
    return {"train": [f for f in files if f not in heldout], "heldout": heldout}


def split_documents(path: Path) -> Iterator[tuple[str, str]]:
    """('train' or 'heldout', document) for every document. Without a heldout file its content decides: equal ones fall on one side."""
    files = corpus_files(path)
    for part in PARTS:
        for text in (text for file in files[part] for text in read_documents(file)):
            if not files["heldout"]:
                draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
                part = "heldout" if draw % HELDOUT_SHARE == 0 else "train"
            yield part, text


def build_corpus(name: str, path: Path, tokenizer: Tokenizer, cache: Path) -> dict[str, Corpus]:
    """{'train', 'heldout'} as memory-mapped bins under `cache`, made on the first call and when the text or the tokenizer has changed."""
    path = Path(path)
    if not is_utf8(f"{name} {path}"):
        raise InputError(f"{path}: its name is not UTF-8, and could not be read again where it is recorded; rename it")
    sources = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for fs in corpus_files(path).values() for f in fs]
    key = hashlib.sha256(json.dumps([tokenizer.fingerprint, sources]).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{name}-{key}"
    if not (folder / "meta.json").exists():
        _tokenize(path, tokenizer, folder, name)
    meta = read_json(folder / "meta.json")
    with shaped(folder, f"these tokens of corpus {name} are damaged; remove the folder, and they are made anew", also=(OSError, EOFError)):
        dtype, content = {"uint16": np.uint16, "uint32": np.uint32}[meta["dtype"]], str(meta.get("content", ""))
        corpora = {part: Corpus(name, part, np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r"),
                                np.load(folder / f"{part}.offsets.npy"), content) for part in PARTS}
        for c in corpora.values():
            if len(c.tokens) != c.offsets[-1] or (np.diff(c.offsets) <= 0).any():
                raise ValueError("the bins do not hold what the offsets say")
        return corpora


def _tokenize(path: Path, tokenizer: Tokenizer, folder: Path, name: str) -> None:
    """Write the bins: tokens as uint16 if the vocabulary allows it, offsets as int64."""
    dtype, digest = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32, hashlib.sha256()
    lengths: dict[str, list[int]] = {part: [] for part in PARTS}
    documents = split_documents(path)
    with locked(folder), atomic_folder(folder) as new:
        with ExitStack() as stack:
            files = {part: stack.enter_context((new / f"{part}.bin").open("wb")) for part in PARTS}
            bar = stack.enter_context(tqdm(desc=f"tokenizing {name}", unit="doc", disable=None, leave=False))
            while chunk := list(islice(documents, CHUNK)):
                for (part, _), ids in zip(chunk, tokenizer.encode([text for _, text in chunk])):
                    if ids:
                        files[part].write(np.asarray(ids, dtype=dtype).tobytes())
                        digest.update(np.asarray([part == "heldout", *ids], dtype=dtype).tobytes())
                        lengths[part].append(len(ids))
                bar.update(len(chunk))
        for part in PARTS:
            if not lengths[part]:
                raise InputError(f"{path}: no {part} documents in this corpus; it is empty or far too small")
            np.save(new / f"{part}.offsets.npy", np.cumsum([0] + lengths[part]))
        counts = {part: {"documents": len(ls), "tokens": sum(ls)} for part, ls in lengths.items()}
        write_json(new / "meta.json", {"source": str(path), "tokenizer": tokenizer.fingerprint, "dtype": np.dtype(dtype).name,
                                       "content": digest.hexdigest()[:16], **counts})
