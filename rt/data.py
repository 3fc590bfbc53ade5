"""Corpora: text on disk -> memory-mapped token bins -> rows of a fixed number of tokens -> masked-LM batches.

Which tokens row i of step t holds, and which of them are masked, is a function of (seed, t, i): no iterator has a state,
so resuming needs none and another number of ranks reads the same data.
"""
import gzip
import hashlib
import json
import lzma
import sys
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from rt.config import UsageError, is_utf8
from rt.folders import atomic_folder, locked
from rt.log import progress, read_json
from rt.mlm import Masker
from rt.model import Batch
from rt.outside import LINE_BYTES, MISSHAPEN, parse_json
from rt.tokenizer import Tokenizer

STDIN = Path("standard input")      # stands for it (this object does, not a file of that name), and names it in errors
TEXT_ENDINGS = (".txt", ".txt.gz", ".txt.xz", ".jsonl")
HELDOUT_SHARE = 50     # of a corpus without a heldout file, one document in this many is held out
ROW_SEQUENCES = 8      # a row holds this many sequences of the longest length, or more that are shorter


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of a plain, .gz or .xz text file, or of STDIN, of which one line is held at a time. UsageError names the file and
    the line that is not UTF-8, holds a NUL (as UTF-16 and what is no text do) or is longer than LINE_BYTES."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    if path is STDIN and sys.stdin is None:
        raise UsageError(f"{path}: is closed; pipe the texts in, or name a file")
    try:
        with nullcontext(sys.stdin.buffer) if path is STDIN else opener(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
                if len(line) > LINE_BYTES:
                    raise UsageError(f"{path}, line {number}: is longer than {LINE_BYTES >> 20} MB; a document or an example is a line")
                if b"\0" in line:
                    raise UsageError(f"{path}, line {number}: holds a NUL byte, which no text in UTF-8 does; convert the file first")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, line {number}: not valid UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read after line {number} ({error})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a JSONL file; UsageError names the file and line that is not a JSON object."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one text file: a line each, or the `text` of a JSON object each. Blank ones are left out."""
    if path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            if not isinstance(row.get("text"), str):
                raise UsageError(f"{path}, line {number}: has no \"text\" string")
            if row["text"].strip():
                yield row["text"]
    else:
        yield from (line for _, line in read_lines(path) if line.strip())


def corpus_files(path: Path) -> dict[str, list[Path]]:
    """{'train': files, 'heldout': files}. `heldout.*` in a folder is held out; without it 'heldout' is empty."""
    if not path.exists():
        raise UsageError(f"{path}: there is no such corpus, file or folder")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.name.endswith(TEXT_ENDINGS))
    files = [f for f in files if f.name.endswith(TEXT_ENDINGS)]
    if not files:
        raise UsageError(f"{path}: no text there; a corpus is {', '.join(TEXT_ENDINGS)} files, one document a line")
    heldout = [f for f in files if f.name.split(".")[0] == "heldout"]
    return {"train": [f for f in files if f not in heldout], "heldout": heldout}


def split_documents(path: Path) -> Iterator[tuple[str, str]]:
    """('train' or 'heldout', document) for every document of a corpus. Without a heldout file the content decides, so
    equal documents fall on the same side."""
    files = corpus_files(path)
    for part, members in files.items():
        for file in members:
            for text in read_documents(file):
                if files["heldout"]:
                    yield part, text
                else:
                    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
                    yield "heldout" if draw % HELDOUT_SHARE == 0 else "train", text


@dataclass
class Corpus:
    """Token ids of documents laid end to end; document i is tokens[offsets[i]:offsets[i+1]]."""
    name: str
    part: str               # train or heldout
    tokens: np.ndarray
    offsets: np.ndarray
    content: str = ""       # hash of the tokens of both parts; "" of what was tokenized before there was one


def build_corpus(name: str, path: Path, tokenizer: Tokenizer, cache: Path) -> dict[str, Corpus]:
    """{'train', 'heldout'} as memory-mapped bins under `cache`, tokenized on the first call and when the text or the
    tokenizer has changed. `meta.json` there has the tokenizer's fingerprint and the counts."""
    path = Path(path)
    if not is_utf8(f"{name} {path}"):
        raise UsageError(f"{path}: its name is not UTF-8, and could not be read again where it is recorded; rename it")
    sources = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for fs in corpus_files(path).values() for f in fs]
    key = hashlib.sha256(json.dumps([tokenizer.fingerprint, sources]).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{name}-{key}"
    if not (folder / "meta.json").exists():
        _tokenize(path, tokenizer, folder, name)
    meta = read_json(folder / "meta.json")
    try:
        dtype, content = {"uint16": np.uint16, "uint32": np.uint32}[meta["dtype"]], str(meta.get("content", ""))
        found = {part: Corpus(name, part, np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r"),
                              np.load(folder / f"{part}.offsets.npy"), content) for part in ("train", "heldout")}
        whole = all(len(c.tokens) == c.offsets[-1] and (np.diff(c.offsets) > 0).all() for c in found.values())
    except (*MISSHAPEN, OSError):
        whole = False
    if not whole:
        raise UsageError(f"{folder}: these tokens of corpus {name} are damaged; remove the folder, and they are made anew")
    return found


def _tokenize(path: Path, tokenizer: Tokenizer, folder: Path, name: str, chunk: int = 1000) -> None:
    """Write the bins: tokens as uint16 where the vocabulary allows, offsets as int64."""
    dtype, digest = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32, hashlib.sha256()
    lengths: dict[str, list[int]] = {"train": [], "heldout": []}
    with locked(folder), atomic_folder(folder) as new, progress(0, f"tokenizing {name}", unit="doc") as bar:
        files = {part: (new / f"{part}.bin").open("wb") for part in lengths}
        waiting: list[tuple[str, str]] = []

        def flush():
            for (part, _), ids in zip(waiting, tokenizer.encode([text for _, text in waiting])):
                if ids:
                    files[part].write(np.asarray(ids, dtype=dtype).tobytes())
                    digest.update(np.asarray([part == "heldout", *ids], dtype=dtype).tobytes())
                    lengths[part].append(len(ids))
            bar.update(len(waiting))
            waiting.clear()

        for pair in split_documents(path):
            waiting.append(pair)
            if len(waiting) == chunk:
                flush()
        flush()
        for part, file in files.items():
            file.close()
            if not lengths[part]:
                raise UsageError(f"{path}: no {part} documents in this corpus; it is empty or far too small")
            np.save(new / f"{part}.offsets.npy", np.cumsum([0] + lengths[part]))
        counts = {part: {"documents": len(ls), "tokens": sum(ls)} for part, ls in lengths.items()}
        facts = {"source": str(path), "tokenizer": tokenizer.fingerprint, "dtype": np.dtype(dtype).name,
                 "content": digest.hexdigest()[:16], **counts}
        (new / "meta.json").write_text(json.dumps(facts, indent=1) + "\n")


class Rows:
    """Rows of exactly `row_tokens` tokens out of a corpus, and masked-LM batches of them.

    Documents are cut into sequences <s> ... </s> of at most `seq_len` tokens, permuted anew each epoch and laid end to end;
    row r is tokens [r * row_tokens, (r+1) * row_tokens) of that line. So a row is always full: a sequence across its end
    is cut there, and the remainder begins with its own <s>. Rows are permuted as well, which parts neighbours.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, *, seq_len: int, mask_rate: float, seed: int,
                 sequences: int = ROW_SEQUENCES):
        self.corpus, self.seed, self.seq_len = corpus, seed, seq_len
        self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id
        self.row_tokens = sequences * seq_len
        self.masker = Masker(tokenizer, round(mask_rate * self.row_tokens))
        lengths = np.diff(corpus.offsets)
        pieces = -(-lengths // (seq_len - 2))                                            # sequences of each document
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)    # which one of its document
        self.starts = np.repeat(corpus.offsets[:-1], pieces) + nth * (seq_len - 2)
        self.lengths = np.minimum(np.repeat(lengths, pieces) - nth * (seq_len - 2), seq_len - 2) + 2
        self.per_epoch = int(self.lengths.sum()) // self.row_tokens
        if self.per_epoch == 0:
            raise UsageError(f"corpus {corpus.name}: the {self.lengths.sum()} tokens of its {corpus.part} part do not fill "
                             f"one row of {self.row_tokens}; it needs more text, or a smaller --seq_len")
        self.epoch = -1

    def _enter_epoch(self, epoch: int) -> None:
        """Permutations of one epoch: a function of (seed, epoch), kept until another epoch is asked for."""
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.order = rng.permutation(len(self.lengths))
            self.ends = np.cumsum(self.lengths[self.order])
            self.row_order = rng.permutation(self.per_epoch)
            self.epoch = epoch

    def row(self, number: int) -> tuple[np.ndarray, list[int]]:
        """Row `number` of the endless stream: ids (row_tokens,) and the lengths of its sequences."""
        epoch, r = divmod(number, self.per_epoch)
        self._enter_epoch(epoch)
        begin = int(self.row_order[r]) * self.row_tokens
        pieces: list[list[int]] = []
        i = int(np.searchsorted(self.ends, begin, side="right"))
        while sum(map(len, pieces)) < self.row_tokens:
            piece, end = self.order[i], int(self.ends[i])
            first = end - int(self.lengths[piece])
            tokens = self.corpus.tokens[self.starts[piece]:self.starts[piece] + self.lengths[piece] - 2]
            framed = [self.bos, *tokens.tolist(), self.eos][max(0, begin - first):begin + self.row_tokens - first]
            framed[0] = self.bos
            pieces.append(framed)
            i += 1
        pieces.sort(key=len)    # neighbours of equal length are cheaper in attention_ref
        return np.concatenate(pieces).astype(np.int64), list(map(len, pieces))

    def batch(self, step: int, batch_tokens: int, rank: int = 0, world: int = 1, part: int = 0, parts: int = 1) -> Batch:
        """The masked batch of optimizer step `step`: a rank's share of its rows, `part` of `parts` of that when gradients
        are accumulated."""
        count, share = batch_tokens // self.row_tokens, batch_tokens // self.row_tokens // (world * parts)
        first = step * count + (rank * parts + part) * share
        return self.masked(range(first, first + share))

    def masked(self, numbers: range) -> Batch:
        """The rows `numbers`, masked, as one batch."""
        ids, labels, predict, lengths = [], [], [], [0]
        for n, number in enumerate(numbers):
            row, row_lengths = self.row(number)
            masked, chosen, true = self.masker(row, np.random.default_rng([self.seed, 1, number]))
            ids.append(masked)
            labels.append(true)
            predict.append(chosen + n * self.row_tokens)
            lengths += row_lengths
        tensors = [torch.from_numpy(np.concatenate(x)) for x in (ids, labels, predict)]
        return Batch(tensors[0], torch.tensor(np.cumsum(lengths), dtype=torch.int32), max(lengths),
                     labels=tensors[1], predict=tensors[2])

    def static(self, batch: Batch) -> Batch:
        """The same batch in shapes that a compiled or captured step can rely on: cu_seqlens ends in repeated N, which are sequences of
        no token and change nothing; max_seqlen is seq_len.

        There is room for the mean number of sequences and six standard deviations more (renewal theory), which about one batch in a
        billion exceeds; it gets more, in steps of 64. A bound that none can exceed would be that of the shortest documents alone, and
        every sequence, empty or not, costs the attention launched blocks.
        """
        rows, n = len(batch.ids) // self.row_tokens, len(batch.ids)
        mean, deviation = n / self.lengths.mean(), self.lengths.std() * (n / self.lengths.mean() ** 3) ** 0.5
        most = max(mean + 6 * deviation + 2 * rows, len(batch.cu_seqlens) - 1)      # a row's ends cut sequences in two
        room = -(-int(most) // 64) * 64 + 1
        padded = torch.full((room,), n, dtype=torch.int32)
        padded[:len(batch.cu_seqlens)] = batch.cu_seqlens
        return replace(batch, cu_seqlens=padded, max_seqlen=self.seq_len)

    def packing(self) -> dict:
        """Of one epoch: the number of rows, the share of their tokens that documents fill (all of them: rows are cut out of one line),
        and the share of sequences that are cut at a row's end for it."""
        self._enter_epoch(max(self.epoch, 0))
        ends = np.arange(1, self.per_epoch + 1) * self.row_tokens
        cut = len(ends) - np.isin(ends, self.ends).sum()
        return {"rows": self.per_epoch, "fill": min(1.0, float(self.ends[-1] / ends[-1])), "cut": round(float(cut / len(self.lengths)), 4)}

    def check_batch(self, batch_tokens: int, shares: int) -> None:
        """UsageError unless `batch_tokens` is a whole number of rows for each of `shares` (ranks x accumulation)."""
        unit = self.row_tokens * shares
        if batch_tokens % unit or batch_tokens <= 0:
            raise UsageError(f"--batch_tokens {batch_tokens}: must be a multiple of {unit} "
                             f"({ROW_SEQUENCES} sequences of --seq_len {self.seq_len}, times {shares} ranks x --accumulation)")


def sequences_batch(sequences: list[list[int]], **fields: Tensor) -> Batch:
    """Sequences of ids (specials included) as one unpadded batch; `fields` are Batch's labels and index."""
    lengths = [len(s) for s in sequences]
    ids = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
    return Batch(ids, torch.tensor(np.cumsum([0] + lengths), dtype=torch.int32), max(lengths), **fields)


PAD_SEQUENCES = 8       # that fill one range up, or some more short ones: attention grows with the square


def side_by_side(batches: list[Batch], bucket: int = 0, B: int = 0) -> tuple[Batch, Tensor]:
    """The batches of K runs as one, each in a range of its own, all ranges as long as the longest: what is missing is filled with
    sequences that nothing reads. Also (K, B) the share of each example in the mean of its run: 1 / its batch's size, and 0 for the
    rows that make batches of unequal size equal, or fill them up to B sequences.

    With `bucket`, shapes are few, as a CUDA graph needs: ranges of a multiple of so many tokens, all the sequences that there may be
    (the last ones empty), and a bound on their length that is a multiple of 64.
    """
    N, B, longest = max(len(b.ids) for b in batches), max(B, *(len(b.index) for b in batches)), max(b.max_seqlen for b in batches)
    N = -(-N // bucket) * bucket if bucket else N
    ids, lengths, rows, labels, index, shares = [], [], [], [], [], torch.zeros(len(batches), B)
    for k, batch in enumerate(batches):
        short, n = N - len(batch.ids), len(batch.index)
        size = min(longest, max(16, -(-short // PAD_SEQUENCES)))       # never longer than the model may take
        ids += [batch.ids, batch.ids[:1].expand(short)]
        lengths += batch.cu_seqlens.diff().tolist() + [min(size, short - i) for i in range(0, short, size)]
        for parts, values in ((rows, batch.first + k * N), (labels, batch.labels), (index, batch.index)):
            parts += [values, values[:1].expand(B - n)]
        shares[k, :n] = 1 / n
    if bucket:
        lengths += [0] * (len(batches) * (B + PAD_SEQUENCES) - len(lengths))
        longest = -(-longest // 64) * 64
    seeds = None if batches[0].seeds is None else torch.cat([batch.seeds for batch in batches])
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return Batch(torch.cat(ids), cu_seqlens, longest, labels=torch.cat(labels), index=torch.cat(index), seeds=seeds,
                 rows=torch.cat(rows)), shares
