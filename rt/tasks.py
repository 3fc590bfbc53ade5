"""Labelled tasks: a folder with train, dev and test as .jsonl, .csv or .tsv; few-shot samples; encoded batches.

A row has one text or a pair, and a label: a string or an integer is a class, a float makes the task a regression. GLUE's
column names are understood beside `text`, `text_pair` and `label`.
"""
import csv
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from rt.config import UsageError
from rt.data import STDIN, read_jsonl, read_lines, sequences_batch
from rt.model import Batch
from rt.outside import LINE_BYTES, check_label
from rt.tokenizer import Tokenizer

PARTS = ("train", "dev", "test")
FORMATS = ("txt", "jsonl", "csv", "tsv")
COLUMNS = {
    "text": ("text", "sentence1", "premise", "question", "question1", "sentence"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "gold_label", "score", "relatedness_score"),
}
MOST_LABELS = 5000     # a confusion matrix of as many squared is kept
PAIRED_SENTENCE = "sentence"  # the second text where the first is a `question` (GLUE's QNLI)


@dataclass(frozen=True)
class Example:
    text: str
    text_pair: str | None
    label: str | int | float | None     # a whole number only before it is a class of a Task, None only in texts to predict
    source: str                 # file and line, for error messages


@dataclass(frozen=True)
class Task:
    """`labels` are the class names in order, or empty for a regression."""
    name: str
    labels: tuple[str, ...]
    parts: dict[str, list[Example]]

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @cached_property
    def hash(self) -> str:
        """Of all texts and labels, in order: 16 hex digits. A delta carries that of the task it was learned on."""
        digest = hashlib.sha256()
        for part, examples in self.parts.items():
            for e in examples:
                digest.update(json.dumps([part, e.text, e.text_pair, e.label]).encode())
        return digest.hexdigest()[:16]


def load_task(path: Path) -> Task:
    """Read a task folder. Raises UsageError naming file and line for what does not fit."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path}: a task is a folder with train, dev and test files (.jsonl, .csv or .tsv)")
    parts = {part: list(read_examples(_part_file(path, part), labelled=True)) for part in PARTS}
    everything = [e for examples in parts.values() for e in examples]
    if _is_regression(everything):
        labels, parts = (), {part: [_with_float(e) for e in examples] for part, examples in parts.items()}
    else:
        _check_one_type(everything)
        parts = {part: [replace(e, label=str(e.label)) for e in examples] for part, examples in parts.items()}
        everything = [e for examples in parts.values() for e in examples]
        found = {e.label: e.source for e in parts["train"]}
        if len(found) > MOST_LABELS:
            raise UsageError(f"{path}: the training examples have {len(found)} labels, and up to {MOST_LABELS} are supported: is the label "
                             "column the right one? (numbers with a point make a regression)")
        for label, source in found.items():
            check_label(label, source)
        labels = tuple(sorted(found, key=lambda x: (0, int(x), x) if re.fullmatch(r"-?\d{1,18}", x) else (1, 0, x)))
        for e in everything:
            if e.label not in found:
                raise UsageError(f"{e.source}: label {e.label!r} does not occur in the training examples "
                                 f"({', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''})")
        if len(labels) < 2:
            raise UsageError(f"{path}: all training examples have the label {labels[0]!r}; a task needs two or more")
    place = path.absolute()
    return Task(place.parent.name if place.name == "task" else place.name, labels, parts)


def _is_regression(examples: list[Example]) -> bool:
    """Whether a label is a float. A csv or tsv has no types: there, labels that are all numbers, not all of them whole."""
    if any(isinstance(e.label, float) for e in examples):
        return True
    try:
        values = [float(e.label) for e in examples if isinstance(e.label, str) and ".jsonl, line" not in e.source]
    except ValueError:
        return False
    return not all(map(float.is_integer, values))


def _check_one_type(examples: list[Example]) -> None:
    """UsageError where some labels are strings and some numbers: of "1" and 1 nobody knows whether they are one class."""
    typed = [e for e in examples if ".jsonl, line" in e.source]
    name, number = (next((e for e in typed if isinstance(e.label, kind)), None) for kind in (str, int))
    if name and number:
        raise UsageError(f"{name.source}: label {name.label!r} is a string, but the one of {number.source} is a number ({number.label}): "
                         "write all of them as one or the other")


def _with_float(e: Example) -> Example:
    """Floats and whole numbers are numbers together."""
    try:
        value = float(e.label)
    except (ValueError, OverflowError):
        raise UsageError(f"{e.source}: label {e.label!r} is not a number as other labels of this task are") from None
    if not math.isfinite(value):
        raise UsageError(f"{e.source}: label {value} is not a finite number")
    return replace(e, label=value)


def _part_file(folder: Path, part: str) -> Path:
    for ending in (".jsonl", ".csv", ".tsv"):
        if (folder / (part + ending)).is_file():
            return folder / (part + ending)
    raise UsageError(f"{folder}: has no {part}.jsonl, {part}.csv or {part}.tsv")


def read_examples(path: Path, labelled: bool, format: str | None = None) -> Iterator[Example]:
    """The examples of a file (plain, .gz or .xz) or of STDIN, one after the other as they are read. `format` is txt (a text a line, for
    unlabelled ones), jsonl, csv or tsv; None: what the file's ending says, of STDIN txt. Raises UsageError, also for no example at all."""
    if path is not STDIN and (not path.exists() or path.is_dir()):
        raise UsageError(f"{path}: there is no such file")
    if format is None:
        format = "txt" if path is STDIN else path.name.removesuffix(".gz").removesuffix(".xz").rpartition(".")[2]
        if format not in FORMATS:
            raise UsageError(f"{path}: ends in none of .{', .'.join(FORMATS)}; say with --input_format which it is")
    if format not in FORMATS:
        raise UsageError(f"--input_format {format}: not one of {', '.join(FORMATS)}")
    return _examples(path, labelled, format)


def _examples(path: Path, labelled: bool, format: str) -> Iterator[Example]:
    row = None
    for number, row in _read_table(path, format):
        yield _example(path, number, row, labelled)
    if row is None:
        raise UsageError(f"{path}: has no examples")


def _read_table(path: Path, format: str) -> Iterator[tuple[int, dict]]:
    """(line number, columns) for each row of a file."""
    if format == "txt":
        yield from ((number, {"text": line}) for number, line in read_lines(path) if line.strip())
    elif format == "jsonl":
        yield from read_jsonl(path)
    else:
        # tsv files of the field (GLUE) do not quote: a lone " is a character there
        style = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if format == "tsv" else dict(strict=True)
        csv.field_size_limit(LINE_BYTES)    # a text may be longer than the 131,072 characters that are the default
        held = 0        # characters of the row that is being read: a quoted text may have any number of lines

        def lines() -> Iterator[str]:
            nonlocal held
            for number, line in read_lines(path):
                held += len(line)
                if held > LINE_BYTES:
                    raise UsageError(f"{path}, line {number}: a row that ends here or later is longer than {LINE_BYTES >> 20} MB; is there "
                                     "a quote that is never closed?")
                yield line + "\n"

        reader = csv.reader(lines(), **style)
        try:
            header, held = next(reader, []), 0
            if len({*header}) < len(header):
                raise UsageError(f"{path}, line 1: two columns are called {Counter(header).most_common(1)[0][0]!r}")
            for row in reader:
                held = 0
                if not row:
                    continue
                if len(row) != len(header):
                    raise UsageError(f"{path}, line {reader.line_num}: {len(row)} columns where the header has {len(header)}")
                yield reader.line_num, dict(zip(header, row))
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.line_num}: not a readable table ({error})") from None


def _example(path: Path, number: int, row: dict, labelled: bool) -> Example:
    source = f"{path}, line {number}"
    found = {kind: next((n for n in names if n in row), None) for kind, names in COLUMNS.items()}
    if found["text"] == "question" and found["text_pair"] is None and PAIRED_SENTENCE in row:
        found["text_pair"] = PAIRED_SENTENCE
    for kind in ("text", "label") if labelled else ("text",):
        if found[kind] is None:
            raise UsageError(f"{source}: no {kind} column (known names: {', '.join(COLUMNS[kind])}; "
                             f"found: {', '.join(map(str, row))})")
    for kind in ("text", "text_pair"):
        text = row.get(found[kind], "")
        if kind == "text_pair" and text is None:     # JSON's null: this one has none
            continue
        if found[kind] and (not isinstance(text, str) or not text.strip()):
            raise UsageError(f"{source}: {found[kind]} is empty or not a string")
    label = row[found["label"]] if labelled else None
    if isinstance(label, bool) or not isinstance(label, (str, int, float, type(None))) or labelled and label in (None, ""):
        raise UsageError(f"{source}: label {label!r} is not a string, an integer or a float")
    return Example(row[found["text"]], row[found["text_pair"]] if found["text_pair"] else None, label, source)


def few_shot(task: Task, shots: int, seed: int) -> Task:
    """`shots` examples a label for train and for dev (of a regression: `shots` in all), drawn by `seed`; test stays whole.
    A label with fewer keeps what it has."""
    rng = np.random.default_rng([seed, shots])
    parts = dict(task.parts)
    for part in ("train", "dev"):
        by_label: dict = {}
        for e in task.parts[part]:
            by_label.setdefault(None if task.is_regression else e.label, []).append(e)
        parts[part] = [group[i] for _, group in sorted(by_label.items(), key=lambda kv: str(kv[0]))
                       for i in rng.permutation(len(group))[:shots]]
    return replace(task, parts=parts)


@dataclass
class Encoded:
    """Examples as token ids, <s> and </s> included; `targets` are (n,) classes or floats."""
    sequences: list[list[int]]
    targets: torch.Tensor
    truncated: int

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, indices: list[int]) -> Batch:
        """The examples at `indices`, put in order of length (which attention_ref likes); `index` says which is which."""
        indices = sorted(indices, key=lambda i: len(self.sequences[i]))
        index = torch.tensor(indices, dtype=torch.int64)
        return sequences_batch([self.sequences[i] for i in indices], labels=self.targets[index], index=index)


def encode(examples: list[Example], labels: tuple[str, ...], tokenizer: Tokenizer, max_len: int) -> Encoded:
    """<s> text </s>, or <s> text </s></s> pair </s> (BERT's: [CLS] text [SEP] pair [SEP]); what is longer than `max_len` is cut, of a
    pair the longer text first. Where a text itself spells [SEP], that is written ~id: it parts no texts. `labels` are the class names in
    order; empty means float targets."""
    texts = tokenizer.encode([e.text for e in examples])
    pairs = tokenizer.encode([e.text_pair or "" for e in examples])
    bos, eos, between = tokenizer.bos_id, tokenizer.eos_id, [tokenizer.eos_id] * (tokenizer.separators - 1)
    sequences, truncated = [], 0
    for example, a, b in zip(examples, texts, pairs):
        paired = example.text_pair is not None
        room = max_len - 2 - (tokenizer.separators if paired else 0)
        truncated += len(a) + len(b) > room
        keep_a, keep_b = _fit(len(a), len(b), room)
        if not between and eos in a:
            a = [~i if i == eos else i for i in a]
        sequences.append([bos, *a[:keep_a], eos, *([*between, *b[:keep_b], eos] if paired else [])])
    place = {label: i for i, label in enumerate(labels)}
    if labels:
        targets = torch.tensor([place.get(e.label, -100) for e in examples])
    else:
        targets = torch.tensor([math.nan if e.label is None else float(e.label) for e in examples])
    return Encoded(sequences, targets, truncated)


def _fit(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of a pair of lengths (a, b) stay when there is room for `room`: the longer gives first."""
    if a + b <= room:
        return a, b
    short = min(a, b, room // 2)
    return (room - short, short) if a > b else (short, room - short)


def training_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of training step `step`: epochs are permutations by (seed, epoch), cut into batches; a function of its
    arguments, so nothing has to be remembered. The last batch of an epoch may be smaller."""
    per_epoch = -(-n // batch_size)
    epoch, i = divmod(step, per_epoch)
    return np.random.default_rng([seed, 2, epoch]).permutation(n)[i * batch_size:(i + 1) * batch_size].tolist()
