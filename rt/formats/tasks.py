"""Labelled tasks: a folder with train, dev and test as .jsonl, .csv or .tsv; few-shot samples; encoded batches.

A row has one text or a pair, and a label: a string or an integer is a class, a float makes the task a regression. GLUE's
column names are understood beside `text`, `text_pair` and `label`.
"""
import csv
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Iterator

from rt.data import PARTS, Example, Task
from rt.errors import InputError
from rt.formats.corpora import STDIN, read_jsonl, read_lines
from rt.formats.untrusted import LINE_BYTES, check_label

FORMATS = ("txt", "jsonl", "csv", "tsv")


COLUMNS = {
    "text": ("text", "sentence1", "premise", "question", "question1", "sentence"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "gold_label", "score", "relatedness_score"),
}


MOST_LABELS = 5000     # a confusion matrix of as many squared is kept


PAIRED_SENTENCE = "sentence"  # the second text where the first is a `question` (GLUE's QNLI)


def load_task(path: Path) -> Task:
    """Read a task folder. Raises InputError naming file and line for what does not fit."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: a task is a folder with train, dev and test files (.jsonl, .csv or .tsv)")
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
            raise InputError(f"{path}: the training examples have {len(found)} labels, and up to {MOST_LABELS} are supported: is the label "
                             "column the right one? (numbers with a point make a regression)")
        for label, source in found.items():
            check_label(label, source)
        labels = tuple(sorted(found, key=lambda x: (0, int(x), x) if re.fullmatch(r"-?\d{1,18}", x) else (1, 0, x)))
        for e in everything:
            if e.label not in found:
                raise InputError(f"{e.source}: label {e.label!r} does not occur in the training examples "
                                 f"({', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''})")
        if len(labels) < 2:
            raise InputError(f"{path}: all training examples have the label {labels[0]!r}; a task needs two or more")
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
    """InputError where some labels are strings and some numbers: of "1" and 1 nobody knows whether they are one class."""
    typed = [e for e in examples if ".jsonl, line" in e.source]
    name, number = (next((e for e in typed if isinstance(e.label, kind)), None) for kind in (str, int))
    if name and number:
        raise InputError(f"{name.source}: label {name.label!r} is a string, but the one of {number.source} is a number ({number.label}): "
                         "write all of them as one or the other")


def _with_float(e: Example) -> Example:
    """Floats and whole numbers are numbers together."""
    try:
        value = float(e.label)
    except (ValueError, OverflowError):
        raise InputError(f"{e.source}: label {e.label!r} is not a number as other labels of this task are") from None
    if not math.isfinite(value):
        raise InputError(f"{e.source}: label {value} is not a finite number")
    return replace(e, label=value)


def _part_file(folder: Path, part: str) -> Path:
    for ending in (".jsonl", ".csv", ".tsv"):
        if (folder / (part + ending)).is_file():
            return folder / (part + ending)
    raise InputError(f"{folder}: has no {part}.jsonl, {part}.csv or {part}.tsv")


def read_examples(path: Path, labelled: bool, format: str | None = None) -> Iterator[Example]:
    """The examples of a file (plain, .gz or .xz) or of STDIN, one after the other as they are read. `format` is txt (a text a line, for
    unlabelled ones), jsonl, csv or tsv; None: what the file's ending says, of STDIN txt. Raises InputError, also for no example at all."""
    if path is not STDIN and (not path.exists() or path.is_dir()):
        raise InputError(f"{path}: there is no such file")
    if format is None:
        format = "txt" if path is STDIN else path.name.removesuffix(".gz").removesuffix(".xz").rpartition(".")[2]
        if format not in FORMATS:
            raise InputError(f"{path}: ends in none of .{', .'.join(FORMATS)}; say with --input_format which it is")
    if format not in FORMATS:
        raise InputError(f"--input_format {format}: not one of {', '.join(FORMATS)}")
    return _examples(path, labelled, format)


def _examples(path: Path, labelled: bool, format: str) -> Iterator[Example]:
    row = None
    for number, row in _read_table(path, format):
        yield _example(path, number, row, labelled)
    if row is None:
        raise InputError(f"{path}: has no examples")


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
                    raise InputError(f"{path}, line {number}: a row that ends here or later is longer than {LINE_BYTES >> 20} MB; is there "
                                     "a quote that is never closed?")
                yield line + "\n"

        reader = csv.reader(lines(), **style)
        try:
            header, held = next(reader, []), 0
            if len({*header}) < len(header):
                raise InputError(f"{path}, line 1: two columns are called {Counter(header).most_common(1)[0][0]!r}")
            for row in reader:
                held = 0
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(f"{path}, line {reader.line_num}: {len(row)} columns where the header has {len(header)}")
                yield reader.line_num, dict(zip(header, row))
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not a readable table ({error})") from None


def _example(path: Path, number: int, row: dict, labelled: bool) -> Example:
    source = f"{path}, line {number}"
    found = {kind: next((n for n in names if n in row), None) for kind, names in COLUMNS.items()}
    if found["text"] == "question" and found["text_pair"] is None and PAIRED_SENTENCE in row:
        found["text_pair"] = PAIRED_SENTENCE
    for kind in ("text", "label") if labelled else ("text",):
        if found[kind] is None:
            raise InputError(f"{source}: no {kind} column (known names: {', '.join(COLUMNS[kind])}; "
                             f"found: {', '.join(map(str, row))})")
    for kind in ("text", "text_pair"):
        text = row.get(found[kind], "")
        if kind == "text_pair" and text is None:     # JSON's null: this one has none
            continue
        if found[kind] and (not isinstance(text, str) or not text.strip()):
            raise InputError(f"{source}: {found[kind]} is empty or not a string")
    label = row[found["label"]] if labelled else None
    if isinstance(label, bool) or not isinstance(label, (str, int, float, type(None))) or labelled and label in (None, ""):
        raise InputError(f"{source}: label {label!r} is not a string, an integer or a float")
    return Example(row[found["text"]], row[found["text_pair"]] if found["text_pair"] else None, label, source)
