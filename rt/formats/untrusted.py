"""Checks input from others before it is used: JSON, numbers, labels, and the headers of safetensors files. No torch here."""
import json
import math
import re
import unicodedata
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from safetensors import safe_open

from rt.errors import InputError

JSON_BYTES = 100 * 2**20        # the longest JSON file: a summary of some 50,000 runs, or a tokenizer
LINE_BYTES = 16 * 2**20         # the longest line of text: a document of some 3 million tokens
LFS_POINTER = b"version https://git-lfs"        # the first bytes of the file that a clone without Git LFS has in place of the real one
# the errors that code raises on JSON of an unexpected shape
MISSHAPEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, StopIteration)


@contextmanager
def shaped(source: Path | str, what: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn errors that code raises on JSON of an unexpected shape, and errors of the types in `also`, into an InputError with `what`."""
    try:
        yield
    except InputError:
        raise
    except (*MISSHAPEN, *also) as error:
        raise InputError(f"{source}: {what} ({type(error).__name__}: {error})") from None


def is_utf8(text: str) -> bool:
    """Whether a text, such as the name of a file, can be written as UTF-8."""
    return not re.search("[\ud800-\udfff]", text)


def parse_json(text: str | bytes, source: Path | str) -> Any:
    """Parse a JSON value. InputError, with `source` in front, if it is invalid, has a key twice, or holds half a surrogate pair."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique)
        is_text = not re.search(r"\\u[dD][89a-fA-F]", text) or is_utf8(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError) as error:       # ValueError: also for a whole number with thousands of digits
        why = "it is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        raise InputError(f"{source}: not valid JSON ({why})") from None
    if not is_text:
        raise InputError(f"{source}: holds half of a surrogate pair, which is not a character")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object. ValueError if a key occurs twice: readers differ in which value they keep."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is there twice in one object")
    return value


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether `value` is a finite number from `least` to `most`. true and false are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most and abs(value) < math.inf


def is_whole(value: Any, least: int, most: int = 2**31 - 1) -> bool:
    """Whether `value` is a whole number from `least` to `most`."""
    return isinstance(value, int) and is_number(value, least, most)


def check_label(label: str, source: Path | str) -> None:
    """InputError for a label that no table or file name can show."""
    if not label.strip() or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in label):
        raise InputError(f"{source}: label {label[:40]!r} is blank or holds control characters or line ends, which no table can show")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn the errors of a library that reads `path` into an InputError that says that the file is not a `kind`, and why."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except Exception as error:      # each library has its own class; torch and safetensors also raise bare ones
        why = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        if path.is_file() and path.open("rb").read(40).startswith(LFS_POINTER):
            why = "it is a Git LFS pointer: git lfs pull fetches the file"
        raise InputError(f"{path}: not a {kind} ({why})") from None


def header(path: Path) -> dict[str, dict]:
    """{tensor: {"dtype", "shape", ...}} of a safetensors file, without reading a tensor. InputError if header and content do not match, or
    if two tensors have the same name: safe_open takes the last."""
    with reading(path, "readable safetensors file"), safe_open(str(path), "np"), path.open("rb") as raw:
        facts = parse_json(raw.read(int.from_bytes(raw.read(8), "little")), f"{path}: not a readable safetensors file, its header")
    return {name: tensor for name, tensor in facts.items() if name != "__metadata__"}
