"""Corpora: text on disk, tokenized once into memory-mapped bins."""
import hashlib
from itertools import islice
from pathlib import Path, PurePath
from typing import Iterator

import numpy as np
from tqdm import tqdm

from rt.data import Corpus
from rt.errors import InputError
from rt.formats.atomic import atomic_folder, digest_of, locked
from rt.formats.files import note, read_json, write_json
from rt.formats.splits import SPLIT, home_of, listed, read_name
from rt.formats.tables import FORMATS, format_of, read_table
from rt.formats.tokenizer import Tokenizer
from rt.formats.untrusted import is_utf8, shaped

TEXT_ENDINGS = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".json.gz", ".json.xz", ".parquet")
HELDOUT_SHARE = 50      # one document in this many is held out of a corpus that has no heldout file
PARTS = ("train", "heldout")
CHUNK = 1000            # documents tokenized at a time


def read_documents(*paths: Path) -> Iterator[str]:
    """The documents of files: each line, or the `text` of each JSON object or parquet row. Blank documents are left out."""
    for place, row in (found for path in paths for found in read_table(path, format_of(path), ("text",))):
        if not isinstance(row.get("text"), str):
            raise InputError(f"{place}: has no \"text\" string (found: {', '.join(map(str, row))})")
        if row["text"].strip():
            yield row["text"]


def corpus_files(path: Path) -> dict[str, list[Path]]:
    """{'train': files, 'heldout': files, 'unread': files}. In a folder, heldout.* is held out, or else a validation split with a name as on
    the hub. Left unread are a test split with such a name, .json beside texts of other endings, and other tables. All other files are for
    training. 'heldout' may be empty."""
    if not path.exists():
        raise InputError(f"{path}: there is no such corpus, file or folder")
    every = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.name[0] != "." and f.is_file())
    files, home = [f for f in every if _is_text(f)] or [f for f in every if f.suffix.lower() == ".json"], path
    below = listed(path)
    if not files:       # they are in data, or in the folder of the only config
        home = path / (place := home_of(below, str(path)) or PurePath("."))
        files = [path / f for f in below if f.parent == place and _is_text(f) or (name := read_name(f)) and name.home == place]
    if not files:
        raise InputError(f"{path}: no text there; a corpus is {', '.join(TEXT_ENDINGS)} files, one document a line or row")
    parts: dict[str, list[Path]] = {"train": [], "dev": [], "test": [], "heldout": []}
    for f in files:
        is_heldout = f != path and f.name.lower().split(".")[0].split("-")[0] == "heldout"
        parts["heldout" if is_heldout else _split(f, home)].append(f)
    tables = [f for f in every if {*f.name.lower().split(".")[1:]} & {*FORMATS}]      # also .jsonl.zst
    tables += [path / f for f in below if f.parent.name and _is_text(f) and home == path]
    spare = (parts["dev"] if parts["heldout"] else []) + [f for f in tables if f not in files]
    return {"train": parts["train"], "heldout": parts["heldout"] or parts["dev"], "unread": spare + parts["test"]}


def _is_text(file: PurePath) -> bool:
    return file.name.lower().endswith(TEXT_ENDINGS)


def _split(file: Path, home: Path) -> str:
    """dev or test if the file is named as on the hub (parquet, a shard, in the folder of a split, or in the hub's cache), else train."""
    name = read_name(file.relative_to(home))        # None for a corpus that is one file
    from_hub = file.suffix.lower() == ".parquet" or file.parent != home or any(part.startswith("datasets--") for part in home.parts)
    return name.split if name and (from_hub or name.number is not None) else "train"


def training_files(path: Path) -> list[Path]:
    """A file itself. In a folder, the train split of its task, or else the corpus files to train on; other files are named on stderr."""
    if path.is_file() and format_of(path) in FORMATS:
        return [path]
    files = listed(path)
    home = home_of(files, str(path))
    train = [path / f for f in files if (named := read_name(f)) and (named.home, named.split) == (home, "train")]
    if not train:
        train, *others = corpus_files(path).values()
        if left := sum(others, []):
            note(f"{path}: left unread: {', '.join(f.name for f in left)}")
    return train


def split_documents(path: Path) -> Iterator[tuple[str, str]]:
    """('train' or 'heldout', document) per document. Without a heldout file, the document's hash decides, so equal ones stay together."""
    files = corpus_files(path)
    if files["heldout"]:
        yield from ((part, text) for part in PARTS for text in read_documents(*files[part]))
        return
    smallest = _smallest_draw(path, files["train"])
    for text in read_documents(*files["train"]):
        yield "heldout" if (_draw(text) % HELDOUT_SHARE == 0 if smallest is None else _draw(text) == smallest) else "train", text


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _smallest_draw(path: Path, files: list[Path]) -> int | None:
    """The smallest draw of a corpus so small that holding out one document in HELDOUT_SHARE would leave one side empty. The documents with
    this draw are held out instead. None for other corpora. InputError if all documents have the same draw."""
    draws, count = set(), 0
    for count, text in enumerate(read_documents(*files), 1):
        draws.add(_draw(text))
        if len({draw % HELDOUT_SHARE == 0 for draw in draws}) == 2:
            return None
    if len(draws) < 2:
        same = ", all of them equal" if count > 1 else ""
        raise InputError(f"{path}: the number of documents (lines or rows) is {count}{same}: none can be held out; give more, or a folder "
                         "with a heldout.* file")
    return min(draws)


def stamps(path: Path) -> list[list]:
    """[part, path, bytes, time of the last change] of each file of a corpus. Caches of the corpus have these in their keys."""
    files = corpus_files(path)
    return [[part, str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for part in PARTS for f in files[part]]


def build_corpus(name: str, path: Path, tokenizer: Tokenizer, cache: Path) -> dict[str, Corpus]:
    """{'train', 'heldout'} as memory-mapped bins under `cache`, made on the first call and whenever the text or tokenizer has changed."""
    if not is_utf8(f"{name} {path}"):
        raise InputError(f"{path}: its name is not UTF-8, and could not be read again where it is recorded; rename it")
    folder = Path(cache) / f"{name}-{digest_of([tokenizer.fingerprint, stamps(path)])[:12]}"
    if not (folder / "meta.json").exists():
        with locked(folder, wait=True):     # several commands may need one corpus at once
            if not (folder / "meta.json").exists():
                _tokenize(path, tokenizer, folder, name)
    meta = read_json(folder / "meta.json")
    with shaped(folder, f"these tokens of corpus {name} are damaged; remove the folder, and they are made again", also=(OSError, EOFError)):
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
    documents, files = split_documents(path), corpus_files(path)
    if files["unread"]:
        note(f"corpus {name}: left unread: {', '.join(f.name for f in files['unread'])}")
    names = {f.name: map(SPLIT.fullmatch, f.name.lower().split(".")) for f in files["train"]}      # valid.txt, wiki.valid.txt
    if others := [name for name, parts in names.items() if any(part and part[1] != "train" for part in parts)]:
        note(f"corpus {name}: {', '.join(others)} are trained on, too: only heldout.* would be held out")
    with atomic_folder(folder) as new:
        with (new / "train.bin").open("wb") as train, (new / "heldout.bin").open("wb") as heldout, \
                tqdm(desc=f"tokenizing {name}", unit="doc", disable=None, leave=False) as bar:
            bins = {"train": train, "heldout": heldout}
            while chunk := list(islice(documents, CHUNK)):
                for (part, _), ids in zip(chunk, tokenizer.encode([text for _, text in chunk])):
                    if ids:
                        bins[part].write(np.asarray(ids, dtype=dtype).tobytes())
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
