"""Answers to texts: read, encoded, put into batches by length, answered in the order of the input and written, a chunk at a time, so that
memory does not grow with the input.
"""
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Iterable, Iterator

import torch
from torch import Tensor

from rt.data import Example, encode
from rt.errors import InputError
from rt.formats.corpora import STDIN
from rt.formats.tokenizer import Tokenizer
from rt.formats.untrusted import parse_json
from rt.model import Classifier
from rt.runs.log import progress
from rt.tune import predict

CHUNK = 1024    # texts that are held at once, and sorted by length


def chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """The examples in lists of `size`. Where reading fails, those before the bad line come first, then the InputError."""
    chunk: list[Example] = []
    try:
        for example in examples:
            chunk.append(example)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except InputError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def answer(example: Example, logits: Tensor, labels: tuple[str, ...]) -> dict:
    """What is said of one text, given its (C,) logits: label and probabilities or, without `labels`, the value of a regression."""
    said = {"text": example.text} | ({"text_pair": example.text_pair} if example.text_pair else {})
    if not labels:
        return said | {"value": logits.item()}
    return said | {"label": labels[int(logits.argmax())],
                   "probabilities": dict(zip(labels, [round(p, 6) for p in logits.softmax(-1).tolist()]))}


def answers(model: Classifier, examples: Iterable[Example], labels: tuple[str, ...], tokenizer: Tokenizer, max_len: int,
            device: torch.device, precision: torch.dtype) -> Iterator[tuple[list[dict], int]]:
    """A chunk at a time: its answers, in order, and how many of its texts were cut to `max_len` tokens."""
    for chunk in chunks(examples, CHUNK):
        encoded = encode(chunk, (), tokenizer, max_len)
        logits = predict(model, encoded.sequences, device, precision)
        yield [answer(example, row, labels) for example, row in zip(chunk, logits)], encoded.truncated


def check_out(out: Path, source: Path) -> None:
    """InputError where answers written to `out` would destroy the input, or a file that does not begin as answers do; or where it has no
    folder."""
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if not out.is_file():
        return
    if source is not STDIN and out.samefile(source):
        raise InputError(f"--out {out}: is the --input")
    with out.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(1_000_000)
    try:
        row = parse_json(line or '{"value": 0}', out)       # an empty file may be written to
    except InputError:
        row = None
    if not isinstance(row, dict) or not {"probabilities", "value"} & row.keys():
        raise InputError(f"--out {out}: holds something else than answers of --mode predict; give another, or remove the file")


def count_lines(source: Path) -> int:
    """How many texts a plain file holds at most; 0, not known, where counting would use the input up or unpack it."""
    if source is STDIN or not source.is_file() or source.suffix in (".gz", ".xz"):
        return 0
    with source.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def write_answers(answered: Iterable[tuple[list[dict], int]], out: Path | None, source: Path) -> tuple[int, int]:
    """JSONL to `out` (opened when there is something to write) or standard output, flushed chunk by chunk; returns how many texts were
    answered and how many cut. Ends early, without an error, when the reader of standard output has left, as `head` does."""
    file, count, truncated = None, 0, 0
    lines = count_lines(source) if sys.stderr.isatty() else 0       # for the bar alone
    try:
        with progress(lines, "predict", unit="text") as bar, contextlib.ExitStack() as stack:
            for said, cut in answered:
                file = file or (stack.enter_context(out.open("w", encoding="utf-8")) if out else sys.stdout)
                only_ascii = (file.encoding or "utf-8").lower() != "utf-8"
                bar.clear()
                file.writelines(json.dumps(row, ensure_ascii=only_ascii) + "\n" for row in said)
                file.flush()
                bar.update(len(said))
                count, truncated = count + len(said), truncated + cut
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # what is left in its buffer is written at exit
    except OSError as error:
        place = f"--out {out}" if out else "standard output"
        raise InputError(f"{place}: cannot be written after {count} texts ({error.strerror})") from None
    return count, truncated
