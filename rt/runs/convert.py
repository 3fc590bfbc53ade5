"""Converts models to and from the formats of transformers and PEFT.

    python -m rt.runs.convert import --tuned my-roberta-finetune --base FacebookAI/roberta-base --out runs/mine/delta
    python -m rt.runs.convert export --base runs/demo/M1 --delta_dir runs/demo/deltas/M1-math-full-s0 --to hf --out exported

import makes a delta from a model that was tuned elsewhere. export writes a base, or base + delta, that these libraries load, with a
README.md for the hub.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rt.deltas import check_fits
from rt.errors import InputError
from rt.formats.adapters import export_peft
from rt.formats.atomic import locked
from rt.formats.card import TAG, card
from rt.formats.delta_files import open_delta, save_delta
from rt.formats.files import read_json
from rt.formats.hf import CARD, export_hf
from rt.formats.hub import open_base
from rt.formats.tasks import name_of
from rt.formats.untrusted import shaped
from rt.runs.config import parse, record, run
from rt.runs.results import open_best
from rt.speed.dist import launched


@dataclass
class Import:
    """python -m rt.runs.convert import --tuned MODEL --base BASE --out FOLDER [--labels no,yes] [--task NAME]"""
    tuned: str  # a ...ForSequenceClassification model, a LoRA adapter of PEFT or a delta of ours, tuned from --base; folder or hub id
    base: str  # the base: checkpoint, Hugging Face folder or hub id
    out: str  # folder to write the delta to
    labels: tuple[str, ...] = ()  # class names in the order of the model's outputs; default: the model's own
    task: str | None = None  # the task that the model was tuned on: name or folder


@dataclass
class Export:
    """python -m rt.runs.convert export --base BASE --out FOLDER [--delta_dir DELTA] [--to hf|peft]"""
    base: str  # the base: checkpoint, Hugging Face folder or hub id
    out: str  # folder to write
    delta_dir: str | None = None  # the delta; for a folder of recycle.py, its best delta by dev score (mean over seeds)
    to: Literal["hf", "peft"] = "hf"  # hf: Hugging Face's format, with the delta merged; peft: a LoRA adapter


def check_out(out: Path, sources: tuple[str | None, ...], is_own: bool) -> None:
    """InputError if `out` holds anything but the result of an earlier call: it may be a model of which there is no other copy."""
    if out.resolve() in [Path(source).resolve() for source in sources if source]:
        raise InputError(f"--out {out}: is what is to be converted; give another")
    if (out.is_file() or out.is_dir() and any(out.iterdir())) and not is_own:
        raise InputError(f"--out {out}: is there already, and was not written by this command; give another, or remove it")


def import_delta(c: Import) -> None:
    out = Path(c.out)
    with locked(out):
        with shaped(out / "delta.json", "its \"info\" is not that of a delta"):
            was = read_json(out / "delta.json", {}).get("info") or {}
            check_out(out, (c.tuned, c.base), "source" in was or "import" in (was.get("argv") or [])[1:2])
        task = c.task and (name_of(Path(c.task)) if Path(c.task).is_dir() else Path(c.task).name.split(".")[0])
        delta = open_delta(c.tuned, base := open_base(c.base), c.labels, task)
        check_fits(base, delta, stale_ok=False)     # a delta of ours may be of another base
        save_delta(out, replace(delta, info={"config": record(c)} | delta.info | {"argv": sys.argv}))
    what = f"{len(delta.labels)} labels ({', '.join(delta.labels[:6])})" if delta.labels else "a regression"
    print(f"{c.tuned}: a {delta.config.kind} delta of {c.base}, {what}; in {c.out}")


def export_model(c: Export) -> None:
    if c.to == "peft" and not c.delta_dir:
        raise InputError("--to peft needs --delta_dir: an adapter is a delta")
    out = Path(c.out)
    with locked(out):
        check_out(out, (c.delta_dir, c.base), (out / CARD).is_file() and TAG.encode() in (out / CARD).read_bytes())
        base = open_base(c.base)
        delta = open_best(c.delta_dir, base) if c.delta_dir else None
        with shaped(c.delta_dir or c.base, "its records lack what a model card needs"):
            text = card(c.out, c.base, base, delta, c.to == "peft")
        if c.to == "hf":
            print(f"{export_hf(out, base, delta, card=text)} and AutoTokenizer load {c.out}")
        else:
            print(f"PeftModel loads {c.out} on {export_peft(out, base, c.base, delta, text)}")


def main() -> None:
    if launched() > 1:
        raise InputError("rt.runs.convert is for one process: leave torchrun out")
    match sys.argv[1:] or [""]:
        case "import", *argv:
            import_delta(parse(Import, argv))
        case "export", *argv:
            export_model(parse(Export, argv))
        case ("-h" | "--help"), *_:
            print(__doc__.strip())
        case way, *_:
            raise InputError(f"python -m rt.runs.convert import|export, not '{way}'; import --help and export --help say what each needs")


if __name__ == "__main__":
    run(main)
