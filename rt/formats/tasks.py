"""Labelled tasks: a folder with train, dev and test as .jsonl, .json, .csv, .tsv or .parquet. Their names: rt/formats/splits.py.

A row has one text or a pair of texts, and a label. A string, an integer, true or false is a class; a float makes the task a regression.
Columns may have the usual names instead of `text`, `text_pair` and `label`. Rows without a gold label are left out, and so is a test part
that has only such rows. Notes on stderr say what was left out and which guesses were made.
"""
import functools
import os
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Iterator

from rt.data import Example, Task
from rt.errors import InputError
from rt.formats.files import note
from rt.formats.splits import split_files
from rt.formats.tables import DELIMITERS, FORMATS, HEADER, STDIN, format_of, read_table
from rt.formats.untrusted import check_label

# Column names in lower case. The first name that a row has counts, so BoolQ is (question, passage). Two of OTHER_LABELS are an error.
TEXTS = ("text", "sentence1", "premise", "question", "question1", "sentence", "#1 string", "sentence_a", "text1", "text_a", "query",
         "claim", "content", "review", "tweet", "utterance", "utt", "message", "comment", "passage", "context", "document", "abstract")
PAIRS = ("text_pair", "sentence2", "hypothesis", "question2", "#2 string", "sentence_b", "text2", "text_b", "passage", "context",
         "paragraph", "document", "evidence", "answer", "response")
PLAIN = 8       # this many of PAIRS, from the first on, are always texts
LABELS = ("label", "gold_label")
OTHER_LABELS = ("score", "relatedness_score", "entailment_label", "entailment_judgment", "labels", "class", "target", "category", "intent",
                "stars", "rating", "sentiment", "emotion", "is_duplicate", "quality", "stance", "polarity")
# Labels that mean "none": what pandas reads as missing, and words for it. NAMES can be classes, too: they mean "none" only if a part has no
# other labels and train lacks them. _marks decides about -, ?, -1 and -100.
MISSING = {"", "nan", "-nan", "null", "n/a", "#n/a", "#n/a n/a", "#na", "<na>", "-1.#ind", "-1.#qnan", "1.#ind", "1.#qnan",
           "hidden", "unlabeled", "unlabelled"}
NAMES = {"na", "none", "unknown"}
ONE_WORD = {"word", "target", "aspect", "term", "span1_text", "span2_text"}     # what a row asks about: WiC, stance, aspects, WSC
RARE = 0.02                     # share of the training examples; SNLI's dev has 1.6 % without a gold label
MOST_SEEN = 1000                # rows per file that are searched for unread text columns
UNTYPED = re.compile(r"\.[ct]sv(\.gz|\.xz)?, line \d+$", re.I)     # how an example's `source` ends if its label has no type
MOST_LABELS = 5000              # a confusion matrix has this many rows and columns


def load_task(path: Path) -> Task:
    """Read a task folder. InputError names the file and line that does not fit."""
    if not path.is_dir():
        raise InputError(f"{path}: a task is a folder with train, dev and test files (.jsonl, .json, .csv, .tsv or .parquet)")
    columns: dict[str, str] = {}        # shared by all files: the name of the label column, and by file the columns of one without
    parts = _with_gold(path, {part: [e for file in files for e in read_examples(file, labelled=True, columns=columns)]
                              for part, files in split_files(path).items() if files}, columns)
    if len({any(e.text_pair for e in examples) for examples in parts.values()}) > 1:
        note(f"{path}: only some of {', '.join(parts)} have pairs of texts")
    everything = [e for examples in parts.values() for e in examples]
    if _is_regression(parts["train"], everything):
        labels, parts = (), {part: [_with_float(e) for e in examples] for part, examples in parts.items()}
    else:
        _check_one_type(everything)
        parts = {part: [replace(e, label=str(int(e.label) if isinstance(e.label, float) else e.label)) for e in examples]
                 for part, examples in parts.items()}
        labels = _classes(path, parts)
    _note_doubts(path, parts)
    return Task(name_of(path), labels, parts)


def name_of(path: Path) -> str:
    """The name of the task in a folder, which may be written . or be called task."""
    place = Path(os.path.abspath(path))     # not resolved: a link keeps its name
    return place.parent.name if place.name == "task" else place.name


def _plain(label: str | int | float | None) -> str:
    """A label in the form used for comparison. If some labels are missing, pandas writes 1.0 for 1."""
    return "" if label is None else str(label).lower().removesuffix(".0")


def _with_gold(path: Path, parts: dict[str, list[Example]], columns: dict[str, str]) -> dict[str, list[Example]]:
    """The examples that have a gold label. A test part without gold labels is dropped. InputError if train or dev has none."""
    kept, train = {}, Counter(_plain(e.label) for e in parts["train"])
    marks = MISSING | _marks(train, any(isinstance(e.label, float) for e in parts["train"]))
    hidden = MISSING | NAMES - train.keys() | {"-1", "-100"} - ({*train} if len(train) == 1 else set())
    for part, examples in parts.items():
        found = {_plain(e.label) for e in examples}
        none = marks | (found if found <= hidden else set())
        kept[part] = [e for e in examples if _plain(e.label) not in none]
        if not kept[part] and part != "test":
            file = examples[0].source.rpartition(", ")[0]
            found = f"; found: {columns[file]}" if file in columns else ""
            raise InputError(f"{file}: no example has a gold label (in a column {', '.join(LABELS + OTHER_LABELS)}{found})"
                             + "; if they are hidden, take rows of train as dev" * (part == "dev"))
        if gone := len(examples) - len(kept[part]):
            said = ", ".join(sorted({str(e.label) for e in examples if _plain(e.label) in none} - {"", "None"}))
            note(f"{path}: {gone} of {len(examples)} {part} examples have no gold label{said and f' ({said})'} and are left out")
    return {part: examples for part, examples in kept.items() if examples}


def _marks(train: Counter[str], has_floats: bool) -> set[str]:
    """Those of -, ?, -1 and -100 that mean "no gold label", given the labels of train. Next to +, - is a class. Next to 0, 1, ... n - 1,
    -100 means none (torch ignores it), and so does -1 (SNLI). Next to 0 and 1 only, -1 may be a third class (sentiment), unless RARE."""
    names = train.keys() - MISSING - {"-", "?", "-1", "-100"}
    marks = {"-", "?"} if all(re.search(r"\w", name) for name in names) else set()
    if _are_counted(names) and not has_floats:
        marks |= {"-100"} | ({"-1"} if len(names) > 2 or train["-1"] < RARE * train.total() else set())
    return marks


def _are_counted(labels: set[str]) -> bool:
    return len(labels) > 1 and labels == {str(i) for i in range(len(labels))}


def _note_doubts(path: Path, parts: dict[str, list[Example]]) -> None:
    """Note what may be wrong with the labels: a regression on whole numbers, a single negative number (-1, -9, -999), a single label."""
    train, is_regression = Counter(_plain(e.label) for e in parts["train"]), isinstance(parts["train"][0].label, float)
    if is_regression and all(re.fullmatch(r"-?\d+", label) for label in train):
        note(f"{path}: all train labels are whole numbers with a decimal point, which makes this a regression; write classes without it")
    if not is_regression and all(re.fullmatch(r"-?\d+\.\d+", e.label) for e in parts["train"]):
        note(f"{path}: {parts['train'][0].label} and the other labels are classes; a regression needs .jsonl with numbers, not strings")
    if len(minus := [x for x in train if re.match(r"-\d", x)]) == 1 and (is_regression or _are_counted(train.keys() - minus)):
        note(f"{path}: {minus[0]}, the label of {train[minus[0]]} of {len(parts['train'])} train examples, is taken for a "
             f"{'number' if is_regression else 'class'} like the others; if it means that there is no label, take these examples out")
    for part, examples in parts.items():
        if len({e.label for e in examples}) == 1 and len(examples) >= 10:
            note(f"{path}: all {len(examples)} {part} examples have the label {examples[0].label}: are their true labels hidden?")


def _classes(path: Path, parts: dict[str, list[Example]]) -> tuple[str, ...]:
    """The labels of the training examples, ordered as numbers or as names. InputError if they are unusable or another part has others."""
    sources = {e.label: e.source for e in parts["train"]}
    if len(sources) > MOST_LABELS:
        raise InputError(f"{path}: the training examples have {len(sources)} labels, and up to {MOST_LABELS} are supported: is the label "
                         "column the right one? (numbers with a point make a regression)")
    alike: dict[str, str] = {}
    for label, source in sources.items():
        check_label(label, source)
        if (other := alike.setdefault(re.sub(r"^(-?\d+)\.0$", r"\1", unicodedata.normalize("NFKC", label).strip()), label)) != label:
            raise InputError(f"{source}: label {label!r} differs from the label {other!r} by spaces, Unicode form or .0 alone")
    if all(re.fullmatch(r"-?\d+(,\d+)?", label) for label in sources) and (comma := next((x for x in sources if "," in x), None)):
        raise InputError(f"{sources[comma]}: label {comma!r} is neither a number ({comma.replace(',', '.')} would be one) nor one class")
    labels = tuple(sorted(sources, key=lambda x: (0, int(x), x) if re.fullmatch(r"-?\d{1,18}", x) else (1, 0, x)))
    for e in (e for examples in parts.values() for e in examples):
        if e.label not in sources:
            raise InputError(f"{e.source}: label {e.label!r} does not occur in the training examples "
                             f"({', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''})")
    if len(labels) < 2:
        raise InputError(f"{path}: all training examples have the label {labels[0]!r}; a task needs two or more")
    return labels


def _is_regression(train: list[Example], everything: list[Example]) -> bool:
    """Whether a label of train is a float, or a float of another part is not whole: pandas writes 1.0 for 1 if some labels are missing. In
    a csv or tsv, which has no types: whether all labels are numbers and some are not whole. InputError if most of its labels have a point,
    and some are no numbers."""
    floats = [e.label for e in everything if isinstance(e.label, float)]
    if any(isinstance(e.label, float) for e in train) or not all(map(float.is_integer, floats)):
        return True
    untyped = [e for e in everything if isinstance(e.label, str) and UNTYPED.search(e.source)]
    numbers = [e for e in untyped if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", e.label, re.I)]
    if len(numbers) < len(untyped):
        if 2 * sum("." in e.label for e in numbers) > len(untyped):
            wrong = next(e for e in untyped if e not in numbers)
            raise InputError(f"{wrong.source}: label {wrong.label!r} is not a number as most labels of this task are")
        return False
    return not all(float(e.label).is_integer() for e in numbers)


def _check_one_type(examples: list[Example]) -> None:
    """InputError if some labels are strings and some are numbers: it is unclear whether "1" and 1 are one class."""
    typed = {isinstance(e.label, str): e for e in reversed(examples) if not UNTYPED.search(e.source)}    # the first example of either type
    name, number = typed.get(True), typed.get(False)
    if name and number:
        raise InputError(f"{name.source}: label {name.label!r} is a string, but the label of {number.source} is a number: "
                         "write all labels alike")


def _with_float(e: Example) -> Example:
    try:
        value = float(e.label)      # whole numbers, too
    except (ValueError, OverflowError):
        raise InputError(f"{e.source}: label {e.label!r} is not a number as other labels of this task are") from None
    if not abs(value) < 3e38:       # also NaN; targets are float32
        raise InputError(f"{e.source}: label {value} is not a finite number")
    return replace(e, label=value)


def read_examples(path: Path, labelled: bool, format: str | None = None, columns: dict[str, str] | None = None) -> Iterator[Example]:
    """Yields the examples of a file or of STDIN as they are read. In `labelled` files, a missing label is None. `format` is one of FORMATS
    (txt only without labels). The default is the file's ending, and txt for STDIN. InputError also if there are no examples."""
    if path is not STDIN and (not path.exists() or path.is_dir()):       # a pipe is no file
        raise InputError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'there is no such file'}")
    if format is None:
        format = "txt" if path is STDIN else format_of(path)
        if format not in FORMATS:
            raise InputError(f"{path}: ends in none of .{', .'.join(FORMATS)}; say with --input_format which it is")
    return _examples(path, labelled, format, {} if columns is None else columns)


def _examples(path: Path, labelled: bool, format: str, columns: dict[str, str]) -> Iterator[Example]:
    number, unread = 0, Counter()
    for number, (place, row) in enumerate(read_table(path, format), 1):
        text, pair, *_ = read = _columns(tuple(row))
        if number == 1 and pair and _plain(pair.strip()) not in PAIRS[:PLAIN]:
            note(f"{path.parent if labelled else path}: {text} and {pair} are read as a pair of texts")
        if number == 1 and labelled and read[2] and _plain(read[2].strip()) != columns.get("label", _plain(read[2].strip())):
            note(f"{path}: {read[2]} is not read, because the files before it have their label in {columns['label']}")
        if number <= MOST_SEEN:
            unread.update(name for name in row if name not in read and _is_text(name, row[name]))
        yield _example(place, row, read, labelled, columns)
    if not number:
        raise InputError(f"{path}: has no examples" + f"; {HEADER}" * (format in DELIMITERS))
    if more := [repr(name) for name, count in unread.items() if 2 * count > min(number, MOST_SEEN)]:
        note(f"{path.parent if labelled else path}: columns that hold text but are not read: {', '.join(more)}")


def _is_text(name: str, value: object) -> bool:
    """Whether an unread column seems to hold texts of two words or more, and not parse trees or label names. One word is enough in a column
    of ONE_WORD, and a string in an object."""
    if isinstance(value, dict):
        return any(isinstance(part, str) for part in value.values())
    pattern = r"[^\W\d_]" if name.lower() in ONE_WORD else r"[^\W\d_]\W?\s+[^\W\d_]"
    return isinstance(value, str) and bool(re.search(pattern, value)) and not value.startswith("(") and "label" not in name.lower()


@functools.lru_cache
def _columns(names: tuple[str, ...]) -> tuple[str | None, ...]:
    """The columns of the text, the second text and the label, and another column that may be the label. None for a missing one."""
    known = {name.strip().lower(): name for name in reversed(names)} | {name: name for name in names}
    text = next((known[name] for name in TEXTS if name in known), None)
    pairs = PAIRS[:PLAIN] if text == "text" else PAIRS + ("sentence",) * (text in ("question", "query"))      # GLUE's QNLI
    pair = next((known[name] for name in pairs if name in known and known[name] != text), None)
    labels = [known[name] for name in LABELS if name in known][:1] or [known[name] for name in OTHER_LABELS if name in known]
    return text, pair, *[*labels, None, None][:2]


def _example(source: str, row: dict, read: tuple[str | None, ...], labelled: bool, columns: dict[str, str]) -> Example:
    """The example in a row. `read` is from `_columns`. `columns` keeps the name of the label column from the first row on. InputError if a
    text or label is missing or of another type. The texts of a `labelled` example without a label are not checked."""
    text, pair, label, other = read
    if text is None:
        found = ", ".join(str(name)[:40] for name in row) + f"; {HEADER}" * bool(re.search(r"\.[ct]sv|^standard input", source))
        raise InputError(f"{source}: no text column (known names: {', '.join(TEXTS)}; found: {found})")
    if labelled and other:
        raise InputError(f"{source}: the label may be {label} or {other}: give the right one the name label")
    value = row[label] if label else row["answer"] if isinstance(row.get("answer"), bool) else None     # `answer` in BoolQ's own files
    if label is None:
        columns.setdefault(source.rpartition(", ")[0], ", ".join(str(name)[:40] for name in row))
    if label and columns.setdefault("label", _plain(label.strip())) != _plain(label.strip()):   # if that is hidden, another is no label
        value = None
    if labelled and value in (None, ""):
        return Example("", None, None, source)
    if pair and (row[pair] is None or row[pair] == "" or _plain(pair.strip()) not in PAIRS[:PLAIN] and not isinstance(row[pair], str)):
        pair = None     # null, which is an empty cell in a csv; an answer may also be a number
    for name in filter(None, (text, pair)):
        if not isinstance(row[name], str) or not row[name].strip():
            raise InputError(f"{source}: {name} is empty or not a string")
    texts = row[text], row[pair] if pair else None
    if not labelled:
        return Example(*texts, None, source)
    if not isinstance(value, (str, int, float)):
        several = ", and several labels a text are not supported" * type(value).__name__.endswith(("list", "ListType"))     # parquet's
        raise InputError(f"{source}: label {value!r} is not a string, an integer or a float{several}")
    return Example(*texts, str(value).lower() if isinstance(value, bool) else value, source)


def texts_of(task: Task) -> list[str]:
    """All texts of a task."""
    return [text for examples in task.parts.values() for e in examples for text in (e.text, e.text_pair) if text]
