"""The folder of a stream of bases: whether a run may begin there or go on, and what is said of it.

    config.json     the settings it was begun with, and hashes of the content of its corpora, tokenizer and --init
    M0, M1, ...     bases; M1-t00250: the snapshot of M1 after 250 steps
    last, last.old  the resumable checkpoint and the one before, while the run is unfinished; last.damaged: one that could not be used
    metrics.jsonl   a row a step, and a row of held-out scores a base
    summary.json    the forgetting matrix, when all is done
"""
import itertools
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from rt.data import Rows
from rt.errors import InputError
from rt.formats.atomic import check_seal, settle
from rt.formats.files import FIGURES, read_json, strangers
from rt.formats.tokenizer import Tokenizer
from rt.formats.untrusted import is_number, is_whole, shaped
from rt.runs.summary import forgetting_table

RESUMABLE = ("model.safetensors", "tokenizer.json", "optim.pt")


def has_work(out: Path, settings: dict, resume: bool) -> bool:
    """Whether a run with these settings is to begin in `out`, or to go on: False where it is complete. InputError where it would
    overwrite something, or go on with other settings."""
    if not (out / "config.json").exists():
        if strangers(out, {FIGURES, "config.json"}):
            raise InputError(f"{out} holds other things than a stream of bases: give another --out")
        return True
    begun = read_json(out / "config.json")
    other = next((k for k in settings if k in begun and settings[k] != begun[k]), None)     # flags that it did not have changed nothing
    if other:
        raise InputError(f"{out} was begun with --{other} {begun[other]}, not {settings[other]}: "
                         "give another --out, or remove the folder")
    complete = (out / "summary.json").exists()
    if not complete and not resume:
        raise InputError(f"{out} holds an unfinished run: add --resume to go on, or remove the folder")
    if complete:
        forget_last(out)    # where the process was killed before it could
    else:
        mend(out)
    return not complete


def mend(out: Path) -> None:
    """What a killed process left half renamed is put right. OUT/last is then the newest resumable checkpoint that is as it was written;
    one that is not is kept as last.damaged, and said on stderr. InputError where there are only such."""
    for path in sorted(out.glob("*.new")) + sorted(out.glob("*.old")):
        settle(path.with_suffix(""))
    last = out / "last"
    while last.exists():
        try:
            check_last(last)
            return
        except InputError as error:
            if not (out / "last.old").exists():
                raise InputError(f"{error}; there is none before it to resume from: move {last} away to begin its stage again") from None
            aside = next(path for n in itertools.count(1) if not (path := out / f"last.damaged{n if n > 1 else ''}").exists())
            last.rename(aside)
            print(f"{error}; it is kept as {aside}, and the checkpoint before it is used", file=sys.stderr)
            settle(last)


def check_last(last: Path) -> None:
    """InputError unless `last` is a resumable checkpoint as it was written; one without hashes could be anything's."""
    facts = read_json(last / "meta.json")
    check_seal(last, "meta.json", facts)
    if not isinstance(facts.get("name"), str) or not is_whole(facts.get("step"), 1) or not {*RESUMABLE} <= facts.get("sha256", {}).keys():
        raise InputError(f"{last / 'meta.json'} is damaged: it does not hold name, step and hashes of a resumable checkpoint")


def forget_last(out: Path) -> None:
    """Remove the resumable checkpoints of a complete run."""
    for name in ("last", "last.old", "last.new", "last.part"):
        shutil.rmtree(out / name, ignore_errors=True)


def check_content(out: Path, content: dict) -> None:
    """InputError where what a run in `out` was begun with has other content by now: `content` is {what: hash}."""
    begun = read_json(out / "config.json").get("content", {}) if (out / "config.json").exists() else {}
    for what, mark in content.items():
        if isinstance(begun, dict) and mark and begun.get(what) not in (None, "", mark):
            raise InputError(f"{out}: {what} has changed since the run was begun (its content was {begun[what]}, and is {mark}): "
                             "restore it, or give another --out")


def is_done_again(row: dict, out: Path) -> bool:
    """Whether a row of metrics.jsonl lies past the point that training resumes at, so that there will be another of its step."""
    stage, step = row.get("stage"), row.get("step")
    if not isinstance(stage, str) or not re.fullmatch(r"M[0-9]{1,9}", stage) or not is_number(step):
        raise InputError(f"{out / 'metrics.jsonl'}: has a row that is of no step of a stage: {str(row)[:80]}")
    if (out / stage / "meta.json").exists():
        return False
    last = read_json(out / "last" / "meta.json") if (out / "last").exists() else {}
    return stage != last.get("name") or not is_number(last.get("step")) or step > last["step"] or "heldout" in row


def stage_of(meta: dict, folder: Path) -> dict:
    """What summary.json says of a stage that is done. InputError where its base does not hold it, as a resumable checkpoint does not."""
    stage = meta.get("stage")
    if not isinstance(stage, dict) or not isinstance(stage.get("heldout"), dict):
        raise InputError(f"{folder} is no base that a stage has ended with: move it away, and its stage is done again")
    return stage


def table_of(out: Path) -> str:
    """The forgetting matrix of a complete run."""
    with shaped(out / "summary.json", "does not hold the stages of a stream"):
        return forgetting_table(read_json(out / "summary.json")["stages"])


def sample_of(rows: Rows, tokenizer: Tokenizer) -> str:
    """The longest sequence of the first row that will be trained on, as it is and as the model sees it; and how rows are packed."""
    batch, (ids, lengths) = rows.batch(0, rows.row_tokens), rows.row(0)
    longest = int(np.argmax(lengths))
    span, p = slice(sum(lengths[:longest]), sum(lengths[:longest + 1])), rows.packing()
    return (f"sample: {tokenizer.decode(ids[span])!r}\nmasked: {tokenizer.decode(batch.ids[span].tolist())!r}\n"
            f"{p['rows']} rows of {rows.row_tokens} tokens an epoch, {p['fill']:.0%} full; {p['cut']:.1%} of sequences cut at a row's end")
