"""Files row by row: lines of text, JSONL, JSON, csv and tsv, plain, .gz or .xz, and parquet. Of what has lines, one is held at a time."""
import csv
import gzip
import lzma
import sys
import zlib
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Collection, Iterable, Iterator

from rt.errors import InputError
from rt.formats.parquet import read_parquet
from rt.formats.untrusted import JSON_BYTES, LINE_BYTES, parse_json

STDIN = Path("standard input")      # this object, not a file of that name, stands for it; errors name it so
TABLES = ("jsonl", "csv", "tsv", "json", "parquet")
FORMATS = ("txt", *TABLES)


def format_of(path: Path) -> str:
    """What the ending of a file's name says, .gz and .xz left aside: one of FORMATS, or anything else."""
    return path.name.lower().removesuffix(".gz").removesuffix(".xz").rpartition(".")[2]


def read_table(path: Path, format: str, wanted: Collection[str] | None = None) -> Iterator[tuple[str, dict]]:
    """("PATH, line N", columns) of every row of a file or of STDIN; `format` is one of FORMATS, a line of txt is a column `text`, and of
    parquet only the columns `wanted` are read, if that is given. InputError names the file and line that is not a row."""
    if format == "parquet":
        if path is STDIN:
            raise InputError(f"{path}: parquet cannot be read from there; name a file")
        yield from read_parquet(path, wanted)
        return
    if format in ("csv", "tsv"):    # the tsv files of the field (GLUE) do not quote: a lone " is a character there
        yield from _read_csv(path, dict(delimiter="\t", quoting=csv.QUOTE_NONE) if format == "tsv" else dict(strict=True))
        return
    for place, row in _read_rows(path, format):
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
        yield place, row


def _read_rows(path: Path, format: str) -> Iterator[tuple[str, Any]]:
    """("PATH, line N", value) of a txt, a jsonl, or a json as the datasets library writes it, an object a line. ("PATH, row N", value) of a
    json that is one list, as pandas writes it."""
    lines = ((place, line) for place, line in _read_lines(path, JSON_BYTES if format == "json" else LINE_BYTES) if line.strip())
    if format == "json" and (first := next(lines, None)):
        lines = chain([first], lines)
        if first[1].lstrip().startswith("["):
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(parse_json(_whole(path, lines), path), 1))
            return
    for place, line in lines:
        yield place, {"text": line} if format == "txt" else parse_json(line, place)


def _whole(path: Path, lines: Iterable[tuple[str, str]]) -> str:
    """All lines in one text. InputError if it is longer than JSON_BYTES."""
    text, size = [], 0
    for _, line in lines:
        text.append(line)
        size += len(line)
        if size > JSON_BYTES:
            raise InputError(f"{path}: is a list longer than {JSON_BYTES >> 20} MB; write it as JSONL, an object a line")
    return "\n".join(text)


def _read_lines(path: Path, most: int = LINE_BYTES) -> Iterator[tuple[str, str]]:
    """("PATH, line N", line). InputError if one is too long, is not UTF-8 or holds a NUL, as UTF-16 and files that are no text do."""
    opener, number, place = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open), 0, ""
    if path is STDIN and sys.stdin is None:
        raise InputError(f"{path}: is closed; pipe the texts in, or name a file")
    try:
        with nullcontext(sys.stdin.buffer) if path is STDIN else opener(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
                place = f"{path}, line {number}"
                if len(line) > most:
                    raise InputError(f"{place}: is longer than {most >> 20} MB; a document or an example is a line")
                if b"\0" in line:
                    raise InputError(f"{place}: holds a NUL byte, which no text in UTF-8 does; convert the file first")
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not valid UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read after line {number} ({error})") from None


def _read_csv(path: Path, style: dict) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(LINE_BYTES)    # a text may be longer than the 131,072 characters that are the default
    held = 0        # characters of the row that is being read: a quoted text may have any number of lines

    def lines() -> Iterator[str]:
        nonlocal held
        for place, line in _read_lines(path):
            held += len(line)
            if held > LINE_BYTES:
                raise InputError(f"{place}: a row that ends here or later is longer than {LINE_BYTES >> 20} MB; is there a quote that is "
                                 "never closed?")
            yield line + "\n"

    reader = csv.reader(lines(), **style)
    try:
        header = next(reader, [])
        if len({*header}) < len(header):
            raise InputError(f"{path}, line 1: two columns are called {Counter(header).most_common(1)[0][0]!r}")
        held = 0
        for row in reader:
            held, place = 0, f"{path}, line {reader.line_num}"
            if row and len(row) != len(header):
                raise InputError(f"{place}: {len(row)} columns where the header has {len(header)}")
            if row:
                yield place, dict(zip(header, row))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a readable table ({error})") from None
