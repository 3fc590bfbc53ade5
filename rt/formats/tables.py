"""Text files row by row: lines of text, JSONL, csv and tsv; plain, .gz or .xz. One row is held at a time."""
import csv
import gzip
import lzma
import sys
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Iterator

from rt.errors import InputError
from rt.formats.untrusted import LINE_BYTES, parse_json

STDIN = Path("standard input")      # this object, not a file of that name, stands for it; errors name it so
TABLES = ("jsonl", "csv", "tsv")
FORMATS = ("txt", *TABLES)


def read_table(path: Path, format: str) -> Iterator[tuple[str, dict]]:
    """("PATH, line N", columns) of every row of a file or of STDIN; `format` is one of FORMATS, and a line of txt is a column `text`.
    InputError names the file and line that is not a row."""
    if format in ("csv", "tsv"):    # the tsv files of the field (GLUE) do not quote: a lone " is a character there
        yield from _read_csv(path, dict(delimiter="\t", quoting=csv.QUOTE_NONE) if format == "tsv" else dict(strict=True))
        return
    for place, line in _read_lines(path):
        if line.strip():
            row = {"text": line} if format == "txt" else parse_json(line, place)
            if not isinstance(row, dict):
                raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
            yield place, row


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("PATH, line N", line). InputError if one is too long, is not UTF-8 or holds a NUL, as UTF-16 and files that are no text do."""
    opener, number, place = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open), 0, ""
    if path is STDIN and sys.stdin is None:
        raise InputError(f"{path}: is closed; pipe the texts in, or name a file")
    try:
        with nullcontext(sys.stdin.buffer) if path is STDIN else opener(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
                place = f"{path}, line {number}"
                if len(line) > LINE_BYTES:
                    raise InputError(f"{place}: is longer than {LINE_BYTES >> 20} MB; a document or an example is a line")
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
