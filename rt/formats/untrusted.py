"""What comes from outside is bounded before it is believed: JSON, and the header of a safetensors file, from which the sizes of its tensors
are known before anything is allocated. Nothing here imports torch, so that rt/inspect.py answers at once."""
import json
import math
import re
import unicodedata
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from rt.errors import InputError


def is_utf8(text: str) -> bool:
    """Whether a text, such as a file's name, has no bytes in it that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


JSON_BYTES = 100 * 2**20        # of a JSON file of ours or of a tokenizer: rows of some 50,000 runs


LINE_BYTES = 16 * 2**20         # of a line of text: a document of some 3 million tokens


HEADER_BYTES = 16 * 2**20       # of a safetensors file's header: some 100,000 tensors


# what reading JSON of another shape than it should have raises, where the shape is not checked field by field
MISSHAPEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, StopIteration)


BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
        "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}


@contextmanager
def shaped(source: Path | str, what: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """InputError, which says `what`, for what reading JSON of another shape raises inside, and for errors of the kinds `also`."""
    try:
        yield
    except InputError:
        raise
    except (*MISSHAPEN, *also) as error:
        raise InputError(f"{source}: {what} ({type(error).__name__}: {error})") from None


def parse_json(text: str, source: Path | str) -> Any:
    """A JSON value; InputError, which begins with `source`, for what is none, names a thing twice or holds half a character."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{source}: not valid JSON that can be read: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise InputError(f"{source}: holds half of a surrogate pair, which is not a character") from None
    except ValueError as error:     # also a whole number of thousands of digits
        raise InputError(f"{source}: not valid JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    """The pairs of a JSON object, of which readers would keep the first or the last where a name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is there twice in one object")
    return found


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file; InputError where it cannot be read, or is longer than `most` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:      # ValueError: a NUL in its name
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > most:
        raise InputError(f"{path}: is longer than {most >> 20} MB, too long for what it should be")
    return content


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a finite number from `least` to `most`; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most and abs(value) < math.inf


def is_whole(value: Any, least: int, most: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and is_number(value, least, most)


def check_label(label: str, source: Path | str) -> None:
    """InputError for a label that tables and file names would not survive: control characters, line ends, halves of characters."""
    if not label.strip() or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in label):
        raise InputError(f"{source}: label {label[:40]!r} is blank or holds control characters or line ends, which no table can show")


def header(path: Path) -> dict[str, dict]:
    """{tensor: {'dtype', 'shape'}} of a safetensors file, from its first bytes. InputError where they are no header, or where the tensors
    that it tells of are not, one after the other, exactly what follows: then none can be larger than the file."""
    def bad(why: str) -> InputError:
        return InputError(f"{path}: not a readable safetensors file ({why})")

    try:
        with path.open("rb") as file:
            size, first = path.stat().st_size, file.read(8)
            if first == b"version ":    # what a clone without Git LFS has in a file's place
                raise bad("it is a Git LFS pointer: git lfs pull fetches the file")
            length = int.from_bytes(first, "little")
            if not 2 <= length <= min(size - 8, HEADER_BYTES):
                raise bad(f"a header of {length} bytes in a file of {size}; a header has up to {HEADER_BYTES >> 20} MB")
            text = file.read(length).decode()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        raise bad(error.strerror) from None
    except UnicodeDecodeError:
        raise bad("its header is not UTF-8") from None
    tensors = parse_json(text, f"{path}: not a readable safetensors file, its header")
    if not isinstance(tensors, dict):
        raise bad("its header is no object")
    tensors.pop("__metadata__", None)
    places = []
    for name, t in tensors.items():
        shape, place = (t.get("shape"), t.get("data_offsets")) if isinstance(t, dict) else (None, None)
        if not isinstance(shape, list) or len(shape) > 16 or not isinstance(place, list) or len(place) != 2 or \
                not all(is_whole(n, 0, 2**63 - 1) for n in (*shape, *place)) or not isinstance(t.get("dtype"), str):
            raise bad(f"tensor {name} has no dtype, shape and data_offsets")
        if t["dtype"] not in BITS or (place[1] - place[0]) * 8 != math.prod(shape) * BITS[t["dtype"]]:
            raise bad(f"tensor {name} is not of {t['dtype']} {shape} in {place[1] - place[0]} bytes")
        places.append(place)
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise bad("its tensors overlap, or leave a gap")
        end = last
    if 8 + length + end != size:
        raise bad("its size is not what its header says")
    return {name: {"dtype": t["dtype"], "shape": t["shape"]} for name, t in tensors.items()}
