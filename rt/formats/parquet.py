"""Reads parquet files row by row, with the class names that the datasets library writes into them."""
import re
from pathlib import Path
from typing import Any, Collection, Iterator

from rt.errors import InputError
from rt.formats.untrusted import LINE_BYTES, parse_json, reading, shaped

ROWS = 1000     # rows decoded at a time
VALUES = r"(large_)?string(_view)?|u?int\d+|halffloat|float|double|bool|null"      # pyarrow's names of the types that are read
READ = re.compile(rf"{VALUES}|dictionary<values=({VALUES}),.*")


def read_parquet(path: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Yields ("PATH, row N", columns) per row. If a column is not `wanted` (None: all are), or holds neither text nor numbers, its value is
    its type. If the datasets library has stored class names, a number becomes its class's name, and -1 becomes None."""
    try:
        from pyarrow.parquet import ParquetFile  # optional, and slow to import
    except ImportError:
        raise InputError(f"{path}: parquet is read by pyarrow, which is not installed: pip install -e '.[parquet]'") from None
    number = 0
    with reading(path, "readable parquet file"), ParquetFile(path) as file:
        schema, names = file.schema_arrow, _classes((file.schema_arrow.metadata or {}).get(b"huggingface"), path)
        if len({*schema.names}) < len(schema.names):
            raise InputError(f"{path}: two of its columns have the same name ({', '.join(schema.names)})")
        unread = {field.name: field.type for field in schema}
        read = [name for name, kind in unread.items() if (wanted is None or name in wanted) and READ.fullmatch(str(kind))]
        for batch in file.iter_batches(ROWS, columns=read, use_threads=False):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, rows {number + 1} to {number + len(batch)}: not valid UTF-8 ({error.reason})") from None
            for number, row in enumerate(rows, number + 1):
                place = f"{path}, row {number}"
                yield place, unread | {name: _value(row[name], names.get(name), f"{place}: {name}") for name in read}
        if number != file.metadata.num_rows:
            raise InputError(f"{path}: holds {number} rows, but says that it has {file.metadata.num_rows}; fetch or write it again")


def _value(value: Any, names: list[str] | None, place: str) -> Any:
    """A value, or the name of its class. InputError if there is no such class, or if the text is too long."""
    if isinstance(value, str) and len(value) > LINE_BYTES:
        raise InputError(f"{place} is longer than {LINE_BYTES >> 20} MB; a document or an example is a row")
    if names is None or not isinstance(value, int):
        return value
    if not -1 <= value < len(names):
        raise InputError(f"{place} is {value}, but the file names {len(names)} classes, from 0 on")
    return None if value == -1 else names[value]


def _classes(noted: bytes | None, path: Path) -> dict[str, list[str]]:
    """{column: class names} as the datasets library stores them in a file. InputError if this record is damaged."""
    with shaped(path, "the datasets library's record of its columns is damaged"):
        features = (parse_json(noted or b"{}", path).get("info") or {}).get("features") or {}
        names = {column: feature["names"] for column, feature in features.items()
                 if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")}
        for each in names.values():
            if not all(isinstance(name, str) for name in each) or len({*each}) < len(each):
                raise ValueError(f"no names of classes: {each}")
        return names
