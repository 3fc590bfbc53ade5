"""Finds the files of a task or a corpus by the names that the Hugging Face hub, GLUE and SuperGLUE use: train.jsonl, Validation.csv,
dev_matched.tsv, data/train-00000-of-00003.parquet, CONFIG/validation/0000.parquet. Names that begin with . or _ are not data."""
import re
from pathlib import Path, PurePath
from typing import Iterable, NamedTuple

from rt.errors import InputError
from rt.formats.files import note
from rt.formats.tables import TABLES

SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
SPLIT = re.compile(rf"({'|'.join(SPLITS)})((?:_(?:mis)?matched)?)(?:-(\d+)-of-(\d+)(?:-[0-9a-f]{{16}})?)?")     # some shards have a hash
TABLE = re.compile(rf"(.+)\.(parquet|(?:{'|'.join(t for t in TABLES if t != 'parquet')})(?:\.gz|\.xz)?)")
ARROW = "; .arrow files (save_to_disk) are not read: write each split with to_parquet"


class Named(NamedTuple):
    """What a file's name says."""
    file: PurePath
    home: PurePath          # the folder of its config
    split: str              # train, dev or test
    series: tuple           # equal for all shards of one table
    number: int | None      # the shard's number
    is_other: bool          # named _mismatched: the matched files are dev and test


def read_name(file: PurePath) -> Named | None:
    """What a file's name, relative to the folder of all data, says. None if it does not name a split."""
    table = TABLE.fullmatch(file.name.lower())
    if table is None:
        return None
    own, folder = SPLIT.fullmatch(table[1]), SPLIT.fullmatch(file.parent.name.lower().removesuffix(".parquet"))     # Spark's folder
    inside = folder and not folder[3] and (own[1] == folder[1] if own else table[2] != "json")      # CONFIG/validation/0000.parquet
    name = folder if inside else own        # the datasets library leaves a train/state.json, which is not a table
    if name is None:
        return None
    number, of = (own[3], own[4]) if own else (table[1] if table[1].isdecimal() and table[2] == "parquet" else None, None)
    series = (file.parent, file.name[:own.end(2)] if own else "", table[2], of and int(of))
    return Named(file, file.parent.parent if inside else file.parent, SPLITS[name[1]], series, number and int(number),
                 name[2] == "_mismatched")


def listed(folder: Path) -> list[PurePath]:
    """The files in a folder, down to FOLDER/CONFIG/SPLIT/FILE, as paths relative to it. Broken links are included."""
    every = (f for pattern in ("*", "*/*", "*/*/*") for f in folder.glob(pattern))
    return visible(f.relative_to(folder) for f in every if f.is_file() or not f.exists())


def visible(files: Iterable[PurePath]) -> list[PurePath]:
    """The files, sorted, without those that tools leave behind: their name, or the name of a folder above, begins with . or _."""
    return sorted(f for f in files if not any(part[0] in "._" for part in f.parts))


def home_of(files: Iterable[PurePath], where: str) -> PurePath | None:
    """The folder that holds a train split: the top folder, or else the only one, or None. InputError if there are several below the top."""
    homes = sorted({name.home for f in files if (name := read_name(f)) and name.split == "train"})
    if len(homes) > 1 and homes[0].parts:
        raise InputError(f"{where}: has {len(homes)} configs; give {where}/CONFIG with one of {', '.join(map(str, homes))}")
    return homes[0] if homes else None


def split_files(folder: Path) -> dict[str, list[Path]]:
    """{'train', 'dev', 'test': files} of a task, shards in order. test may be empty. InputError if a split is missing or ambiguous."""
    files = listed(folder)
    home = home_of(files, str(folder)) or PurePath(".")
    names = [name for f in files if (name := read_name(f)) and name.home == home]
    parts = {part: _one_table(folder, part, [n for n in names if n.split == part and not n.is_other]) for part in ("train", "dev", "test")}
    for part, also in (("train", ""), ("dev", " (or val, valid, validation)")):
        if not parts[part]:
            raise InputError(f"{folder}: has no {part}.jsonl, .json, .csv, .tsv or .parquet{also}, nor shards of one; "
                             f"found: {', '.join(map(str, files[:8])) or 'nothing'}{ARROW * any(f.suffix == '.arrow' for f in files)}")
    if others := [str(n.file) for n in names if n.is_other]:
        note(f"{folder}: left unread: {', '.join(others)} (dev and test are the matched ones)")
    return {part: [folder / f for f in files] for part, files in parts.items()}


def _one_table(folder: Path, part: str, names: list[Named]) -> list[PurePath]:
    """The files of one split in order. InputError if they are not all the shards of one table."""
    first = {n.series: str(n.file) for n in reversed(names)}
    if len(first) > 1:
        raise InputError(f"{folder}: {' and '.join(sorted(first.values()))} could all be the {part} split; leave one of them there")
    names.sort(key=lambda n: (n.number or 0, n.file))
    numbers = [n.number for n in names if n.number is not None]
    of = numbers and (names[0].series[-1] or numbers[-1] + 1)
    if numbers and (len(numbers) != of or len({*numbers}) < of):
        raise InputError(f"{folder}: the {part} split has {len(numbers)} of {of} shards ({', '.join(str(n.file) for n in names[:4])}"
                         f"{', ...' if len(names) > 4 else ''}): some are missing, or there twice")
    return [n.file for n in names]
