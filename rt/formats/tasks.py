"""Labelled tasks: a folder with train, dev and test as .jsonl, .json, .csv, .tsv or .parquet (rt/formats/splits.py: under which names).

A row has one text or a pair, and a label: a string or an integer is a class, a float makes the task a regression. GLUE's
column names are understood beside `text`, `text_pair` and `label`.
"""
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Iterator

from rt.data import Example, Task
from rt.errors import InputError
from rt.formats.splits import split_files
from rt.formats.tables import FORMATS, STDIN, format_of, read_table
from rt.formats.untrusted import check_label

COLUMNS = {
    "text": ("text", "sentence1", "premise", "question", "question1", "sentence"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "gold_label", "score", "relatedness_score"),
}
UNTYPED = re.compile(r"\.[ct]sv(\.gz|\.xz)?, line \d+$", re.I)     # the end of the source of an example whose label has no type
MOST_LABELS = 5000              # of so many, squared, a confusion matrix is held


def load_task(path: Path) -> Task:
    """Read a task folder. InputError names the file and line that does not fit."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: a task is a folder with train, dev and test files (.jsonl, .csv, .tsv or .parquet)")
    parts = {part: [e for file in files for e in read_examples(file, labelled=True)] for part, files in split_files(path).items()}
    everything = [e for examples in parts.values() for e in examples]
    if _is_regression(everything):
        labels, parts = (), {part: [_with_float(e) for e in examples] for part, examples in parts.items()}
    else:
        _check_one_type(everything)
        parts = {part: [replace(e, label=str(e.label)) for e in examples] for part, examples in parts.items()}
        labels = _classes(path, parts)
    place = path.absolute()
    return Task(place.parent.name if place.name == "task" else place.name, labels, parts)


def _classes(path: Path, parts: dict[str, list[Example]]) -> tuple[str, ...]:
    """The labels of the training examples, ordered as numbers or as names. InputError if another part has others or they are of no use."""
    sources = {e.label: e.source for e in parts["train"]}
    if len(sources) > MOST_LABELS:
        raise InputError(f"{path}: the training examples have {len(sources)} labels, and up to {MOST_LABELS} are supported: is the label "
                         "column the right one? (numbers with a point make a regression)")
    for label, source in sources.items():
        check_label(label, source)
    labels = tuple(sorted(sources, key=lambda x: (0, int(x), x) if re.fullmatch(r"-?\d{1,18}", x) else (1, 0, x)))
    for e in (e for examples in parts.values() for e in examples):
        if e.label not in sources:
            raise InputError(f"{e.source}: label {e.label!r} does not occur in the training examples "
                             f"({', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''})")
    if len(labels) < 2:
        raise InputError(f"{path}: all training examples have the label {labels[0]!r}; a task needs two or more")
    return labels


def _is_regression(examples: list[Example]) -> bool:
    """Whether a label is a float. A csv or tsv has no types: there, whether all labels are numbers and some of them not whole."""
    if any(isinstance(e.label, float) for e in examples):
        return True
    try:
        values = [float(e.label) for e in examples if isinstance(e.label, str) and UNTYPED.search(e.source)]
    except ValueError:
        return False
    return not all(map(float.is_integer, values))


def _check_one_type(examples: list[Example]) -> None:
    """Raises InputError if some labels are strings and some numbers: whether "1" and 1 are one class, nobody can know."""
    typed = {type(e.label): e for e in reversed(examples) if not UNTYPED.search(e.source)}   # the first of each
    name, number = typed.get(str), typed.get(int)
    if name and number:
        raise InputError(f"{name.source}: label {name.label!r} is a string, but the one of {number.source} is a number ({number.label}): "
                         "write all of them as one or the other")


def _with_float(e: Example) -> Example:
    try:
        value = float(e.label)      # a whole number too
    except (ValueError, OverflowError):
        raise InputError(f"{e.source}: label {e.label!r} is not a number as other labels of this task are") from None
    if not math.isfinite(value):
        raise InputError(f"{e.source}: label {value} is not a finite number")
    return replace(e, label=value)


def read_examples(path: Path, labelled: bool, format: str | None = None) -> Iterator[Example]:
    """The examples of a file or of STDIN, one after the other as they are read. `format` is one of FORMATS, txt for unlabelled ones; by
    default the file's ending says it, and STDIN is txt. InputError, also if there is no example."""
    if path is not STDIN and (not path.exists() or path.is_dir()):
        raise InputError(f"{path}: there is no such file")
    if format is None:
        format = "txt" if path is STDIN else format_of(path)
        if format not in FORMATS:
            raise InputError(f"{path}: ends in none of .{', .'.join(FORMATS)}; say with --input_format which it is")
    if format not in FORMATS:
        raise InputError(f"--input_format {format}: not one of {', '.join(FORMATS)}")
    return _examples(path, labelled, format)


def _examples(path: Path, labelled: bool, format: str) -> Iterator[Example]:
    place = None
    for place, row in read_table(path, format):
        yield _example(place, row, labelled)
    if place is None:
        raise InputError(f"{path}: has no examples")


def _example(source: str, row: dict, labelled: bool) -> Example:
    """The example in a row, whose columns may have any of the known names. Raises InputError if one is missing, or of another type."""
    column = {kind: next((name for name in names if name in row), None) for kind, names in COLUMNS.items()}
    if column["text"] == "question" and column["text_pair"] is None and "sentence" in row:      # GLUE's QNLI
        column["text_pair"] = "sentence"
    for kind in ("text", "label") if labelled else ("text",):
        if column[kind] is None:
            raise InputError(f"{source}: no {kind} column (known names: {', '.join(COLUMNS[kind])}; found: {', '.join(map(str, row))})")
    text, pair, label = (row[column[kind]] if column[kind] else None for kind in ("text", "text_pair", "label"))
    texts = {"text": text} | ({} if pair is None else {"text_pair": pair})      # null: no second text
    for kind, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{source}: {column[kind]} is empty or not a string")
    if not labelled:
        return Example(text, pair, None, source)
    if isinstance(label, bool) or not isinstance(label, (str, int, float)) or label == "":
        raise InputError(f"{source}: label {label!r} is not a string, an integer or a float")
    return Example(text, pair, label, source)
