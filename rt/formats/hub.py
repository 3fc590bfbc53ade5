"""Finds models and data sets: folders in our format or Hugging Face's, or hub ids (with HF_HUB_OFFLINE=1, only in the local cache).

A hub id is OWNER/NAME. Both consist of letters, digits, _, - and . (not first). Nothing here may be called OWNER/NAME or OWNER, and OWNER
may not be runs, the home of our own runs. Anything else is a path: runs/M9, ./OWNER/NAME, a/b/c. A data set is hub:OWNER/NAME[/CONFIG].
"""
import glob
import re
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath
from typing import Callable

from rt.deltas import Base
from rt.errors import InputError
from rt.formats.atomic import found
from rt.formats.checkpoint import load_base
from rt.formats.files import read_json
from rt.formats.hf import load_hf
from rt.formats.splits import TABLE, home_of, read_name, visible

HUB_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
             "special_tokens_map.json", "adapter_config.json", "labels.json", "adapter_model.safetensors", "model.safetensors",
             "model-*.safetensors", "model.safetensors.index.json"]
# downloaded if there are no safetensors
BIN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin"]
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
HUB_NAME = "a hub id OWNER/NAME (such as FacebookAI/roberta-base)"
SECONDS = 10    # timeout of the hub's first answer
CONVERTED = "refs/convert/parquet"      # the branch where the hub itself stores data sets as CONFIG/SPLIT/0000.parquet
NAMING = "python -m rt.runs.convert import --tuned ... --base ... --labels names,in,the,order,of,its,outputs"


def open_base(name: str) -> Base:
    """A base from a checkpoint folder of ours, a Hugging Face folder, or a hub id such as FacebookAI/roberta-base."""
    path = find(name)
    if (path / "meta.json").is_file():
        return load_base(path)
    if (path / "config.json").is_file():
        bases = sorted(each.name for each in path.glob("M*") if re.fullmatch("M[0-9]+", each.name))
        if bases or "stream" in read_json(path / "config.json"):
            raise InputError(f"{name}: is a run, not a base; give one of its bases: {', '.join(bases) or 'none is finished yet'}")
        return load_hf(path)
    raise InputError(f"{name}: no base there; expected {HUB_NAME}, or a folder with meta.json (ours) or config.json (Hugging Face)")


def is_hub_id(name: str) -> bool:
    """Whether `name` is a hub id (see above), so the network may be asked for it."""
    path = Path(name)
    return bool(re.fullmatch(HUB_ID, name)) and not (path.exists() or path.parent.exists() or path.parts[0] == "runs")


def find(name: str) -> Path:
    """The folder called `name`. For a hub id, its folder in the local cache, downloaded if it is not there yet."""
    if not is_hub_id(name := str(name)):
        return found(Path(name))
    from huggingface_hub import HfApi, snapshot_download  # comes with tokenizers; slow to import, so only here

    failure = _failure(HfApi().model_info, name)
    try:
        for patterns in (HUB_FILES, HUB_FILES + BIN_FILES):
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=failure is not None))
            if any(folder.glob("*.safetensors")):
                break
        return folder
    except Exception as error:
        raise _not_to_be_had(name, failure or error) from None


def _failure(ask: Callable, name: str) -> Exception | None:
    """Why the hub cannot be asked about `name`, or None. A download itself would wait minutes for a connection."""
    try:
        ask(name, timeout=SECONDS)
    except Exception as error:  # network, offline, authorisation, not found: the library has a class for each
        return error
    return None


def _not_to_be_had(name: str, why: Exception) -> InputError:
    reason = (str(why) or type(why).__name__).splitlines()[0].replace("`", "")      # rt.runs.config shows `name` as --name
    return InputError(f"{name}: not a folder here, and not available from the hub ({reason})")


def find_dataset(name: str) -> tuple[Path, str]:
    """(folder, words for the user) of hub:OWNER/NAME[/CONFIG] in the local cache, downloaded if it is not there yet. The repository's
    parquet files come first, then the hub's own conversion to parquet, then other tables. CONFIG is the name of their folder. A CONFIG
    without a train split is a corpus. InputError also if there are several configs and none is named."""
    parsed = re.fullmatch(rf"hub:({HUB_ID})(?:/([\w-].*))?", name)
    if parsed is None:
        raise InputError(f"{name}: a data set of the hub is hub:OWNER/NAME or hub:OWNER/NAME/CONFIG")
    from huggingface_hub import HfApi, snapshot_download

    repo, config = parsed.groups()
    ask, download = HfApi().dataset_info, partial(snapshot_download, repo, repo_type="dataset")
    failure, tables = _failure(ask, repo), {}
    for revision in (None, CONVERTED):
        with suppress(Exception):       # the hub has converted nothing, or, offline, the cache has none of it
            if failure:
                folder = Path(download(revision=revision, local_files_only=True, allow_patterns=[]))
                files = [f.relative_to(folder) for f in folder.rglob("*") if not f.is_dir()]
            else:
                files = [PurePath(f.rfilename) for f in ask(repo, revision=revision, timeout=SECONDS).siblings]
            tables[revision] = [f for f in visible(files) if TABLE.fullmatch(f.name.lower())]
    if failure and not tables:
        raise _not_to_be_had(name, failure)
    revision, home, files = _choose(name, config, tables.get(None, []), tables.get(CONVERTED, []))
    try:
        patterns = [glob.escape(str(f)) for f in files]
        folder = Path(download(revision=revision, local_files_only=failure is not None, allow_patterns=patterns))
    except Exception as error:
        raise _not_to_be_had(name, error) from None
    return folder / home, f"{home} of commit {folder.name}"


def _choose(name: str, config: str | None, ours: list[PurePath], theirs: list[PurePath]) -> tuple[str | None, PurePath, list[PurePath]]:
    """(revision, folder, files) of a `config`, from a repository's tables (`ours`) and the hub's conversions of them (`theirs`)."""
    parquet = [f for f in ours if f.suffix == ".parquet"]
    for revision, files in ((None, parquet), (CONVERTED, theirs), (None, ours)):
        for top in (PurePath(config), PurePath("data", config)) if config else (PurePath("."),):
            below = [f.relative_to(top) for f in files if f.is_relative_to(top)]
            home = home_of(below, name)
            if home is not None:
                return revision, top / home, [top / f for f in below if home in (f.parent, getattr(read_name(f), "home", None))]
    folders = sorted({f.parent for f in parquet or ours})
    home = PurePath(config) if config else folders[0] if len(folders) == 1 else None
    if home not in folders:
        raise InputError(f"{name}: has no train split and is not a folder of tables; folders of tables: "
                         f"{', '.join(map(str, folders)) or 'none'}")
    return None, home, [f for f in parquet or ours if f.parent == home]
