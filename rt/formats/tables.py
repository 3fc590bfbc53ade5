"""Reads files row by row: text lines, JSONL, JSON, csv and tsv (plain, .gz or .xz), and parquet. Holds one line or row at a time,
except a .json list (whole), parquet (1,000 rows) and the first part of a piped table."""
import csv
import gzip
import itertools
import lzma
import re
import sys
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Collection, Iterable, Iterator

from rt.errors import InputError
from rt.formats.files import note
from rt.formats.parquet import read_parquet
from rt.formats.untrusted import JSON_BYTES, LFS_POINTER, LINE_BYTES, parse_json

STDIN = Path("standard input")      # this object, not a file of this name, stands for standard input; errors show this name
TABLES = ("jsonl", "csv", "tsv", "json", "parquet")
FORMATS = ("txt", *TABLES)
DELIMITERS = {"csv": ",;\t", "tsv": "\t,;"}     # the first one that the header contains counts
UNQUOTED = dict(quoting=csv.QUOTE_NONE)
FIELD = re.compile(r'(?:^|\t)("[^"]*(?:""[^"]*)*"|[^"\t]*)')     # between tabs: enclosed, with quotes inside doubled, or without quotes
AHEAD = 2**20       # characters read ahead from a pipe, because a pipe cannot be read twice
BARE_CR = "a carriage return inside a row that no quotes enclose: lines must end with a line feed, convert the file first"
HEADER = "if the first line is data, the header (the names of the columns) is missing"


def format_of(path: Path) -> str:
    """The ending of a file's name without .gz and .xz: one of FORMATS, or something else."""
    return path.name.lower().removesuffix(".gz").removesuffix(".xz").rpartition(".")[2]


def read_table(path: Path, format: str, wanted: Collection[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Yields ("PATH, line N", columns) per row of a file or of STDIN. `format` is one of FORMATS. A line of txt becomes the column `text`.
    `wanted` limits which columns of parquet are read. InputError names the file and line that is not a row."""
    if format != "parquet":
        return (_read_csv if format in DELIMITERS else _read_rows)(path, format)
    if path is STDIN:
        raise InputError(f"{path}: parquet cannot be read from there; name a file")
    return read_parquet(path, wanted)


def _read_rows(path: Path, format: str) -> Iterator[tuple[str, dict]]:
    """Yields the rows of txt, jsonl, and json with one object per line, as the datasets library writes it. If json is one list, as pandas
    writes it, the places are "PATH, row N"."""
    lines = ((at, line) for at, line in _read_lines(path, JSON_BYTES if format == "json" else LINE_BYTES) if line.strip())
    first = [*itertools.islice(lines, 1)]
    lines = itertools.chain(first, lines)
    if format == "json" and first and first[0][1].lstrip().startswith("["):
        rows = ((f"{path}, row {i}", row) for i, row in enumerate(parse_json(_whole(path, lines), path), 1))
    else:
        rows = ((at, {"text": line} if format == "txt" else parse_json(line, at)) for at, line in lines)
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
        yield place, row


def _whole(path: Path, lines: Iterable[tuple[str, str]]) -> str:
    """All lines as one string. InputError if it is longer than JSON_BYTES."""
    text, size = [], 0
    for _, line in lines:
        text.append(line)
        size += len(line)
        if size > JSON_BYTES:
            raise InputError(f"{path}: is a list longer than {JSON_BYTES >> 20} MB; write it as JSONL, an object a line")
    return "\n".join(text)


def _read_lines(path: Path, most: int = LINE_BYTES) -> Iterator[tuple[str, str]]:
    """("PATH, line N", line). InputError if a line is too long, is not UTF-8, or holds a NUL, as UTF-16 and binary files do."""
    opener, number, place = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open), 0, ""
    if path is STDIN and sys.stdin is None:
        raise InputError(f"{path}: is closed; pipe the texts in, or name a file")
    try:
        with nullcontext(sys.stdin.buffer) if path is STDIN else opener(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
                place = f"{path}, line {number}"
                if len(line) > most:
                    raise InputError(f"{place}: is longer than {most >> 20} MB; a document or an example is a line")
                if number == 1 and line.startswith(LFS_POINTER):
                    raise InputError(f"{path}: is a Git LFS pointer, not the file: git lfs pull fetches it")
                if b"\0" in line:
                    raise InputError(f"{place}: holds a NUL byte, which no text in UTF-8 does; convert the file first")
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not valid UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read" + f" after line {number}" * (number > 0) + f" ({why})") from None


def _read_csv(path: Path, format: str) -> Iterator[tuple[str, dict]]:
    """Yields a table's rows as dicts by the names in its first line, which also shows the delimiter. GLUE's CoLA has no line of names."""
    csv.field_size_limit(LINE_BYTES)    # a text may be longer than the default of 131,072 characters
    source = _read_lines(path)
    first = next((at for at in source if at[1].strip()), ("", ""))
    delimiter = next((c for c in DELIMITERS[format] if c in first[1]), DELIMITERS[format][0])
    rows = _split(path, itertools.chain([first], source), delimiter, delimiter + " " in first[1])
    place, header = next((at for at in rows if at[1] not in ([], ["sep=", ""])), ("", []))    # "sep=" tells Excel what separates columns
    if delimiter == "\t" and len(header) == 4 and header[1] in ("0", "1") and not re.search(r"\w", header[2]):
        rows, header = itertools.chain([(place, header)], rows), ["source", "label", "mark", "sentence"]
        note(f"{path}: has no header, and its columns are taken for {', '.join(header)}, those of GLUE's CoLA")
    if len({*(names := [name for name in header if name])}) < len(names):      # spreadsheets add columns without a name
        raise InputError(f"{place}: two columns are called {Counter(names).most_common(1)[0][0]!r}; {HEADER}")
    for place, row in rows:
        if row and len(row) != len(header):
            raise InputError(f"{place}: {len(row)} columns, but the header has {len(header)}")
        if row:
            yield place, dict(zip(header, row))


def _split(path: Path, source: Iterator[tuple[str, str]], delimiter: str, spaced: bool) -> Iterator[tuple[str, list[str]]]:
    """Yields ("PATH, line N", fields) per row. At the first quote between tabs, _is_quoted decides whether quotes enclose fields. It sees
    all of a file, or the next AHEAD characters of STDIN and other pipes."""
    place, begun, held, columns, style, quote = "", "", 0, 0, dict(strict=True, skipinitialspace=spaced), []

    def lines(source: Iterable[tuple[str, str]]) -> Iterator[str]:
        nonlocal place, begun, held     # held: characters of the current row so far, because a quoted text may have any number of lines
        for place, line in source:
            begun, held = begun if held else place, held + len(line)
            if held > LINE_BYTES:
                raise InputError(f"{place}: a row up to here is longer than {LINE_BYTES >> 20} MB; is there a quote that is never closed?")
            if style == UNQUOTED and re.search(r'(?:^|\t)"', line):
                note(f"{path}: quotes around fields are read as characters of the text, as in GLUE's files")
            yield line + "\n"

    def rows(source: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
        nonlocal columns, held
        try:
            for row in csv.reader(lines(source), delimiter=delimiter, **style):
                columns, held = columns or len(row), 0
                yield place, row
        except csv.Error as error:
            is_open = f"; is a quote never closed in the row that begins in {begun.rpartition(', ')[2]}?" * (begun != place)
            raise InputError(f"{place}: not a readable table ({BARE_CR if 'new-line' in str(error) else error}){is_open}") from None

    if delimiter == "\t":
        style = UNQUOTED
        yield from rows(itertools.takewhile(lambda at: '"' not in at[1] or quote.append(at), source))   # the line with the quote is kept
        source, scanned = itertools.chain(quote, source), None
        if quote and (path is STDIN or not path.is_file()):
            scanned = [*_ahead(source)]
            source = itertools.chain(scanned, source)
        if quote and _is_quoted((line for _, line in scanned or _read_lines(path)), columns if scanned else 0):
            style = dict(strict=True)
            note(f"{path}: quotes around fields are read as quoting, as pandas and spreadsheets write it")
    yield from rows(source)


def _ahead(source: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The lines with the next AHEAD characters, up to a line after which no quote is open."""
    size = quotes = 0
    for place, line in source:
        yield place, line
        size, quotes = size + len(line), quotes + line.count('"')
        if size > (LINE_BYTES if quotes % 2 else AHEAD):
            return


def _is_quoted(lines: Iterable[str], columns: int) -> bool:
    """Whether fields between tabs are quoted as in a csv; in GLUE's files a quote is a character. They are if every quote encloses a field
    or is doubled inside one, if all rows have as many columns as the first (`columns`, 0: among the lines), and if a program left a sign:
    doubled quotes, tabs or line ends inside fields, an enclosed header, or (Excel) commas in all enclosed fields and in no other."""
    raw, shows, idle, is_header, commas = [], False, False, columns == 0, Counter()      # commas: in fields with and without quotes

    def kept() -> Iterator[str]:
        for line in lines:
            raw.append(line)
            yield line + "\n"

    try:
        for row in csv.reader(kept(), delimiter="\t"):
            record, columns = "\n".join(raw), columns or len(row)
            fields = FIELD.findall(record)
            if row and len(row) != columns or "\t".join(fields) != record:
                return False
            enclosed = [field for field in fields if field.startswith('"')]
            shows |= any(line.count("\t") != columns - 1 for line in raw if row) or any('""' in field[1:-1] for field in enclosed)
            shows |= is_header and 0 < len(row) == len(enclosed)
            idle |= any("," not in field or "\n" in field for field in enclosed)
            commas.update(field.startswith('"') for field in fields if "," in field)
            is_header &= not row
            raw.clear()
    except csv.Error:
        return False
    return shows or not idle and not commas[False] and commas[True] > 1
