"""Labels texts with a base + delta. Writes one JSON object per text, in the order of the input.

    python -m rt.runs.predict --base runs/demo/M0 --delta_dir runs/demo/deltas/M0-math-full-s0 --input texts.txt    # or -: standard input

Texts are read, batched by length and answered one chunk at a time, so memory does not grow with the input.
"""
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Literal

import torch

from rt.data import Example, encode
from rt.deltas import Base, Delta, apply
from rt.errors import InputError
from rt.formats.atomic import beside, locked, named
from rt.formats.delta_files import seq_len_of
from rt.formats.hub import open_base
from rt.formats.tables import FORMATS, STDIN, format_of
from rt.formats.tasks import read_examples
from rt.formats.tokenizer import Tokenizer
from rt.formats.untrusted import parse_json
from rt.limits import SeqLen
from rt.model import Classifier
from rt.runs.config import parse, run
from rt.runs.log import note_pairs, note_truncated, progress
from rt.runs.results import open_best
from rt.runs.workers import use_threads
from rt.speed.device import make_deterministic, pick_device, pick_precision
from rt.speed.dist import launched
from rt.tune import predict

CHUNK = 1024    # texts held in memory at once and sorted by length
SEQ_LEN = 128   # default for a delta that was tuned elsewhere


@dataclass
class Config:
    """python -m rt.runs.predict --base BASE --delta_dir DELTA --input TEXTS [--flag value ...]"""
    base: str  # the base: checkpoint, Hugging Face folder or hub id
    delta_dir: str  # the delta: folder or hub id; for a folder of recycle.py, its best delta by dev score (mean over seeds)
    input: str  # texts: .txt, .jsonl, .json, .csv or .tsv, also as .gz or .xz, or .parquet; -: standard input
    input_format: Literal[FORMATS] | None = None  # default: by the file's ending; txt for standard input
    out: str | None = None  # file to write, over earlier answers when all are there (OUT.part until then); default: standard output
    seq_len: SeqLen | None = None  # longest text in tokens; default: the delta's own
    device: str = "auto"  # auto, cpu or cuda
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16, fp32, or auto: bf16 if the device is fast at it
    deterministic: bool = False  # the same command gives the same bits on a GPU too; on a CPU it always does


def main() -> None:
    if launched() > 1:
        raise InputError("rt.runs.predict is for one process: leave torchrun out")
    c = parse(Config, sys.argv[1:])
    make_deterministic(c.deterministic)
    use_threads(0)
    source, out = STDIN if c.input == "-" else Path(c.input), Path(c.out) if c.out else None
    examples = read_examples(source, labelled=False, format=c.input_format)
    if out:
        check_out(out, source)
    is_file = out and (out.is_file() or not out.exists())       # not a pipe, nor /dev/null
    with locked(beside(out, "answers")) if is_file else contextlib.nullcontext():       # two commands may name one file
        part = out
        if out and out.is_file():       # earlier answers stay until all new ones are there
            check_out(part := beside(out, "part"), source)
        base, delta, model, seq_len, where = open_tuned(c)
        examples = note_pairs(delta.info, examples)
        count, truncated = write_answers(answers(model, examples, delta.labels, base.tokenizer, seq_len, **where), part, source)
        if part != out:
            part.replace(named(out))
    note_truncated(truncated, count, seq_len, sys.stderr)


def open_tuned(c: Any, labels: tuple[str, ...] = ()) -> tuple[Base, Delta, Classifier, int, dict]:
    """(base, delta, base + delta, longest text in tokens, {device, precision}) for a config with base, delta_dir, seq_len, device and
    precision. If the delta has the same `labels`, its outputs follow their order. StaleDelta if it was learned on another base."""
    device = pick_device(c.device)
    base = open_base(c.base).to(device)
    delta = open_best(c.delta_dir, base).ordered(labels)
    seq_len = c.seq_len or seq_len_of(delta) or min(SEQ_LEN, base.encoder.config.max_len)
    base.require_length(seq_len)
    return base, delta, apply(base, delta), seq_len, {"device": device, "precision": pick_precision(c.precision, device)}


def answers(model: Classifier, examples: Iterable[Example], labels: tuple[str, ...], tokenizer: Tokenizer, max_len: int,
            device: torch.device, precision: torch.dtype) -> Iterator[tuple[list[dict], int]]:
    """Yields, per chunk, the answers in order and the number of texts cut to `max_len` tokens. An answer is the text with its label and
    probabilities, or, without `labels`, with the value of the regression."""
    for chunk in chunks(examples):
        encoded, rows = encode(chunk, (), tokenizer, max_len), []
        for example, logits in zip(chunk, predict(model, encoded.sequences, device, precision)):
            pair = {"text_pair": example.text_pair} if example.text_pair else {}
            # nine significant digits, however small the number: recycle.py's teacher recovers the fp32 logits from them
            probabilities = dict(zip(labels, [float(f"{p:.9g}") for p in logits.double().softmax(-1).tolist()]))
            said = {"label": labels[int(logits.argmax())], "probabilities": probabilities} if labels else {"value": logits.item()}
            rows.append({"text": example.text, **pair, **said})
        yield rows, encoded.truncated


def chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Lists of CHUNK examples. If reading fails, the examples before the bad line come first, then the InputError."""
    chunk = []
    try:
        for example in examples:
            chunk.append(example)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    except InputError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def check_out(out: Path, source: Path) -> None:
    """InputError if `out` is the input, if its folder does not exist, or if it is a file that does not begin with an answer."""
    if format_of(out) in {*FORMATS} - {"jsonl", "json", "txt"} or out.suffix in (".gz", ".xz"):
        raise InputError(f"--out {out}: answers are written as JSONL; give a name such as {out.name.split('.')[0]}.jsonl")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if not out.is_file():
        return
    if source is not STDIN and out.samefile(source):
        raise InputError(f"--out {out}: is the --input")
    with out.open(encoding="utf-8", errors="replace") as file:
        line, row = file.readline(1_000_000), None
    with contextlib.suppress(InputError):
        row = parse_json(line, out)
    answer = {"text", "value"}, {"text", "label", "probabilities"}
    if line and not (isinstance(row, dict) and row.keys() - {"text_pair"} in answer):      # an empty file may be overwritten
        raise InputError(f"--out {out}: holds something other than answers; give another, or remove the file")


def write_answers(answered: Iterable[tuple[list[dict], int]], out: Path | None, source: Path) -> tuple[int, int]:
    """Write JSONL to `out` (opened at the first answers) or to standard output. Returns how many texts were answered and how many cut."""
    file, count, truncated, total = None, 0, 0, 0
    has_lines = source is not STDIN and source.is_file() and source.suffix not in (".gz", ".xz", ".parquet")
    if has_lines and sys.stderr.isatty():       # only for the progress bar
        with source.open("rb") as texts:
            total = sum(block.count(b"\n") for block in iter(lambda: texts.read(1 << 20), b""))
    try:
        with progress(total, "predict", unit="text") as bar, contextlib.ExitStack() as stack:
            for rows, cut in answered:
                file = file or (stack.enter_context(out.open("w", encoding="utf-8")) if out else sys.stdout)
                only_ascii = (file.encoding or "utf-8").lower() != "utf-8"
                bar.clear()
                file.writelines(json.dumps(row, ensure_ascii=only_ascii) + "\n" for row in rows)
                file.flush()
                bar.update(len(rows))
                count, truncated = count + len(rows), truncated + cut
    except BrokenPipeError:     # the reader has left
        raise
    except OSError as error:
        place = f"--out {out}" if out else "standard output"
        raise InputError(f"{place}: cannot be written after {count} texts ({error.strerror})") from None
    return count, truncated


if __name__ == "__main__":
    run(main)
