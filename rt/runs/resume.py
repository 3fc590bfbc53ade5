"""The files that pre-training writes to its folder, and how it resumes after an interruption.

    config.json     the settings that the run began with, and content hashes of its corpora, tokenizer and --init
    M0, M1, ...     bases; M1-t00250: the snapshot of M1 after 250 steps
    resume/         while the run is unfinished, its two newest checkpoints with the optimizer's state, such as resume/M1-t00300
    metrics.jsonl   one row per step, and one row of held-out scores per base
    summary.json    the forgetting matrix, once the run is complete

Every folder is written once, under another name, and renamed when complete. A run resumes from the newest checkpoint with correct hashes.
"""
import math
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from rt.data import Rows, Tokenizer
from rt.deltas import Base
from rt.errors import Diverged, InputError
from rt.formats.atomic import check_seal
from rt.formats.checkpoint import load_base, read_torch, save_base
from rt.formats.files import FIGURES, note, read_json, read_rows, unknown_names, write_json
from rt.formats.untrusted import is_number, is_whole, shaped
from rt.model import MaskedLM, spelled
from rt.optim import MOST_SKIPPED
from rt.pretrain import PretrainSettings
from rt.recipes import Recipe
from rt.runs.log import Log, loss_text, progress
from rt.runs.signals import Interrupted, handled
from rt.runs.summary import forgetting_table
from rt.runs.upgrade import average_into
from rt.speed.dist import Ranks, gather, load_state
from rt.speed.throughput import Throughput

RESUMABLE = ("model.safetensors", "tokenizer.json", "optim.pt")
KEPT = 2        # resumable checkpoints that stay: if the newest is damaged, there is another


# --- the folder -------------------------------------------------------------------------------------------------------

def has_work(out: Path, settings: dict, resume: bool, defaults: dict) -> bool:
    """False if the run in `out` is complete. InputError if a run with these `settings` would overwrite files or continue another run. A
    setting that did not exist when the run was begun had its value in `defaults`."""
    if not (out / "config.json").exists():
        if unknown_names(out, {FIGURES, "config.json"}):
            raise InputError(f"{out} contains files that are not part of a stream of bases: give another --out")
        return True
    begun = read_json(out / "config.json")
    for k in settings:
        if settings[k] != (was := begun.get(k, defaults.get(k))):
            raise InputError(f"{out} was begun with --{k} {was}, not {settings[k]}: give another --out, or remove the folder")
    if (out / "summary.json").exists():
        remove_checkpoints(out)     # a killed process may have left them
        return False
    if not resume:
        raise InputError(f"{out} holds an unfinished run: add --resume to go on, or remove the folder")
    return True


def check_content(out: Path, content: dict) -> None:
    """InputError if a file that the run in `out` began with has changed. `content` is {what: hash}."""
    begun = read_json(out / "config.json", {}).get("content", {})
    for what, mark in content.items():
        if isinstance(begun, dict) and mark and begun.get(what) not in (None, "", mark):
            raise InputError(f"{out}: {what} has changed since the run was begun (its content was {begun[what]}, and is {mark}): "
                             "restore it, or give another --out")


def stage_and_step(checkpoint: Path) -> tuple[int, int]:
    """(1, 300) of a resumable checkpoint with the name M1-t00300."""
    number, step = checkpoint.name[1:].split("-t")
    return int(number), int(step)


def checkpoints(out: Path) -> list[Path]:
    """The resumable checkpoints in `out`, newest first."""
    found = (path for path in (out / "resume").glob("*") if re.fullmatch("M[0-9]{1,9}-t[0-9]{5,9}", path.name))
    return sorted(found, key=stage_and_step, reverse=True)


def remove_checkpoints(out: Path) -> None:
    """Remove the resumable checkpoints in `out`, whole or half written. What else is beside them stays, such as deltas tuned on one."""
    for path in (out / "resume").glob("*"):
        if re.fullmatch(r"M[0-9]{1,9}-t[0-9]{5,9}(\.part|\.replaced)?", path.name):
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):     # something else is there, or nothing was
        (out / "resume").rmdir()


def newest_checkpoints(out: Path) -> dict[str, Path]:
    """The newest intact resumable checkpoint of each unfinished stage, by the stage's name. A newer one that is damaged is named on stderr.
    InputError if all of a stage are damaged."""
    found, damaged = {}, {}
    for path in checkpoints(out):
        name = f"M{stage_and_step(path)[0]}"
        if name in found or (out / name / "meta.json").exists():
            continue
        try:
            facts = read_json(path / "meta.json")
            check_seal(path, "meta.json", facts)
            if not (is_whole(facts.get("step"), 1) and {*RESUMABLE} <= {*facts.get("sha256", ())}):
                raise InputError(f"{path / 'meta.json'} is damaged: it does not hold step and hashes of a resumable checkpoint")
        except InputError as error:
            damaged.setdefault(name, error)
        else:
            found[name] = path
            if name in damaged:
                print(f"{damaged[name]}; the checkpoint before it, {path}, is used", file=sys.stderr)
    for name in damaged.keys() - found.keys():
        raise InputError(f"{damaged[name]}; there is none before it to resume from: remove {out / 'resume'} to begin its stage again")
    return found


def where_to_begin_again(out: Path) -> str:
    """A phrase that names the checkpoint from which diverged training can begin again."""
    newest = next(iter(checkpoints(out)), None)
    if newest is None:
        return f"no checkpoint of it had been written in {out}"
    number, step = stage_and_step(newest)
    return f"{newest} is of step {step} of M{number}; --init {newest} with another --out begins there"


def is_done_again(row: dict, out: Path, newest: dict[str, int]) -> bool:
    """Whether a row of metrics.jsonl comes after the checkpoint that its stage resumes from (`newest`: their steps, by stage)."""
    stage, step = row.get("stage"), row.get("step")
    if not isinstance(stage, str) or not re.fullmatch(r"M[0-9]{1,9}", stage) or not is_number(step):
        raise InputError(f"{out / 'metrics.jsonl'}: has a row that belongs to no step of a stage: {str(row)[:80]}")
    if (out / stage / "meta.json").exists():
        return False
    return step > newest.get(stage, 0) or "heldout" in row


def check_parent(base: Base, folder: Path, parent: str) -> None:
    """InputError if the base or checkpoint was not trained from the base with fingerprint `parent`."""
    if base.meta.get("parent", parent) != parent:
        raise InputError(f"{folder} was trained from another base than the present one: move it away to redo the stage")


def table_of(out: Path) -> str:
    """The forgetting matrix of a complete run."""
    with shaped(out / "summary.json", "does not hold the stages of a stream"):
        return forgetting_table(read_json(out / "summary.json")["stages"])


# --- a run ------------------------------------------------------------------------------------------------------------

class PretrainRun(ExitStack):
    """One pre-training command: what it reads and writes in `out`, which the caller has locked, and when it stops. `c` is train.py's
    Config; a resumed run has the same `settings`. All ranks call every method; rank 0 writes."""
    def __init__(self, c: Any, out: Path, ranks: Ranks, settings: dict):
        super().__init__()
        self.c, self.out, self.ranks, self.settings = c, out, ranks, settings
        self.newest = ranks.from_main(lambda: newest_checkpoints(out) if c.resume else {})
        self.log_every = c.log_every or (10 if ranks.device.type == "cuda" else 1)
        self.allowance = c.stop_after or sys.maxsize      # how many more steps to take
        self.stages: list[dict] = []
        self.signal = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal ends training after the current step. The second ends it at once."""
        if self.signal:
            raise Interrupted(number)
        self.signal = number

    def begin(self, content: dict, tokenizer: Tokenizer) -> None:
        """Compare the content with that of an interrupted run, record settings and content, and open the log."""
        self.ranks.from_main(lambda: check_content(self.out, content))
        self.tokenizer, steps = tokenizer, {name: stage_and_step(path)[1] for name, path in self.newest.items()}
        if self.ranks.is_main:
            if self.c.resume and not (self.out / "config.json").exists():
                note(f"--resume: {self.out} holds no run yet; one begins there")
            write_json(self.out / "config.json", self.settings | {"content": content})
            tokenizer.save(self.out)
        rows = read_rows(self.out / "metrics.jsonl") if self.ranks.is_main else []
        kept = [row for row in rows if not is_done_again(row, self.out, steps)]
        self.log = Log(self.out, kept, self.ranks.is_main, tensorboard=self.c.tensorboard)
        counts = Counter(row["stage"] for row in kept)
        for name, step in steps.items():
            if counts[name] < step:
                note(f"{self.log.path}: lacks {step - counts[name]} rows of {name} from before {self.newest[name]}; they are lost")
        self.enter_context(handled(self.on_signal))     # not before: until here no loop asks for the signal

    def finished(self, name: str, parent: str) -> Base | None:
        """The base of a stage that is finished, or None. InputError if `parent` is not what it was trained from."""
        if not (self.out / name / "meta.json").exists():
            return None
        base = load_base(self.out / name)
        check_parent(base, self.out / name, parent)
        if not isinstance(base.meta.get("stage", {}).get("heldout"), dict):
            raise InputError(f"{self.out / name} is not the final base of a stage: move it away to redo the stage")
        self.stages.append(base.meta["stage"])
        return base

    def start_stage(self, about: dict, s: PretrainSettings, rows: Rows, model: MaskedLM, optimizer: torch.optim.Optimizer,
                    precision: torch.dtype, recipe: Recipe = Recipe(), moments: Path | None = None) -> int:
        """Returns the first step of a stage: 0, or, if it was interrupted, the step of its newest checkpoint, which is loaded. `about` goes
        into meta.json, with name, domain, number and parent. `moments` is the folder with the optimizer's state to start from."""
        self.about, self.s, self.rows, self.model, self.optimizer, self.recipe = about, s, rows, model, optimizer, recipe
        self.throughput = Throughput(model.encoder.config, self.ranks.device, precision, world=self.ranks.world)
        self.waiting: list[tuple[int, float, Tensor]] = []      # steps with loss and norm still on the device
        self.first = self.step = self.skipped = self.in_a_row = 0
        self.started = time.perf_counter()
        if folder := self.newest.get(about["name"]):
            base = load_base(folder)
            check_parent(base, folder.parent, about["parent"])
            model.load_state_dict(MaskedLM(base.encoder, base.head).state_dict())
            load_state(optimizer, state := read_torch(folder / "optim.pt"))
            recipe.load_state(state.get("recipe", {}))
            self.first = self.step = base.meta["step"]
            self.skipped = base.meta.get("skipped", 0)
            self.started -= base.meta.get("seconds", 0.0)
        elif moments:
            load_state(optimizer, read_torch(moments / "optim.pt"))
        self.kept = {round(s.steps * (k + 1) / (self.c.snapshots + 1)) for k in range(self.c.snapshots)}
        self.trunk = s.steps - s.rates.annealing(s.steps) if s.rates.schedule == "infinite" else None
        self.bar = self.enter_context(progress(s.steps, f"{about['name']} {about['domain']}", self.first))
        return self.first

    def after_step(self, step: int, lr: float, loss: Tensor, norm: Tensor) -> bool:
        """Record a step, write the checkpoints due after it, and return whether the run stops before the stage's end. Waits for the device
        only every `log_every` steps and before a checkpoint. Raises Diverged after more than MOST_SKIPPED skipped steps in a row."""
        self.waiting.append((step, lr, torch.stack([loss, norm])))
        self.allowance -= 1
        is_last, is_look = step == self.s.steps, step % self.log_every == 0
        agrees = self.ranks.world == 1 or is_look       # ranks agree on a signal only at steps where they wait for each other anyway
        stops = not is_last and (self.allowance == 0 or agrees and self.ranks.any(bool(self.signal)))
        is_trunk = step == self.trunk
        is_snapshot, is_checkpoint = step in self.kept or is_trunk, not is_last and (stops or step % self.c.save_every == 0)
        if is_look or is_last or is_snapshot or is_checkpoint:
            self.write_rows()
        if is_snapshot or is_checkpoint:
            name = f"{self.about['name']}-t{step:05d}"
            with self.throughput.pause():
                if is_trunk or is_checkpoint:
                    gather(self.optimizer)
                if is_snapshot:
                    self.save(self.out / name, self.optimizer if is_trunk else None)
                if is_checkpoint and (stops or not self.in_a_row):      # otherwise the previous one is better
                    self.save(self.out / "resume" / name, self.optimizer, seconds=time.perf_counter() - self.started)
        return stops

    def write_rows(self) -> None:
        """Log the waiting steps. One copy brings their numbers to the host. A number that is not finite becomes None: a skipped step."""
        for (step, lr, _), pair in zip(self.waiting, torch.stack([pair for *_, pair in self.waiting]).tolist()):
            loss, norm = (x if math.isfinite(x) else None for x in pair)
            skipped = {"skipped": True} if None in (loss, norm) else {}
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if self.in_a_row > MOST_SKIPPED:
                raise Diverged(f"the loss at step {step - MOST_SKIPPED} or its gradient is not finite, nor are those of the "
                               f"{MOST_SKIPPED} steps after it: lower --lr ({self.s.lr}) or raise --warmup "
                               f"(now {self.s.warmup_steps} steps); {where_to_begin_again(self.out)}")
            self.step, self.skipped = step, self.skipped + len(skipped)
            self.log.row(stage=self.about["name"], domain=self.about["domain"], step=step, loss=loss, lr=lr, grad_norm=norm, **skipped)
            self.bar.set_postfix_str(f"{loss_text(loss, self.skipped)}, {self.throughput}", refresh=False)
            self.bar.update()
            if step == self.first + 1:
                self.throughput.restart()      # by the first look at the loss, compilation and capture are over
        self.waiting.clear()

    def save(self, folder: Path, optimizer: torch.optim.Optimizer | None = None, **more: Any) -> None:
        """Rank 0 writes the model, with `more` in meta.json. With an optimizer, only KEPT checkpoints of this stage and earlier stages
        stay."""
        if not self.ranks.is_main:
            return
        self.log.sync()
        meta = {**self.about, "config": self.settings, "argv": sys.argv, "step": self.step, **self.skips(), **more}
        save_base(folder, self.model, self.tokenizer, meta, optimizer, self.recipe.state())
        own = [path for path in checkpoints(self.out) if stage_and_step(path)[0] <= self.about["number"]]
        for old in own[KEPT:] if optimizer else ():
            shutil.rmtree(old)

    def skips(self) -> dict:
        return {"skipped": self.skipped} if self.skipped else {}

    def finish_stage(self, evaluate: Callable[[], dict]) -> None:
        """Score and write the mean of the stage's last --average snapshots, counting its end."""
        if (average := self.c.recipe.average) > 1:
            self.ranks.wait()       # until rank 0 has written its snapshots
            steps = sorted(self.kept & {*range(1, self.s.steps)})[1 - average:]
            snapshots = (load_base(self.out / f"{self.about['name']}-t{step:05d}") for step in steps)
            average_into(self.model, (MaskedLM(base.encoder, base.head).state_dict() for base in snapshots))
        mixed, seconds, name = self.rows.mixture, round(time.perf_counter() - self.started, 1), self.about["name"]
        self.bar.close()
        scores = self.ranks.from_main(evaluate)
        if not all(math.isfinite(s["loss"]) for s in scores.values()):
            raise Diverged(f"the held-out loss of {name} is not finite: lower --lr ({self.s.lr}); {where_to_begin_again(self.out)}")
        stage = {"name": name, "domain": self.about["domain"], "steps": self.s.steps, "seconds": seconds, "heldout": scores,
                 "packing": packing(self.rows), "ranks": self.ranks.world, "threads": torch.get_num_threads(), **self.skips(),
                 **({"shares": {r.corpus.name: n / 10**6 for r, n in zip(mixed.sources, mixed.history[-1])}} if mixed else {})}
        self.log.row(stage=name, domain=self.about["domain"], step=self.s.steps, heldout=scores)
        trunk = {"trunk": f"{name}-t{self.trunk:05d}"} if self.trunk else {}
        self.ranks.from_main(lambda: self.save(self.out / name, stage=stage, **trunk))

    def stops_between_stages(self) -> bool:
        return self.allowance == 0 or self.ranks.any(bool(self.signal))

    def suspended(self, where: str) -> Interrupted | None:
        """Print where training stopped and how to continue. If a signal stopped it, return the exception that says so instead."""
        sentence = f"stopped {where}; the same command with --resume goes on"
        if self.signal:
            return Interrupted(self.signal, sentence)
        print(sentence)
        return None

    def complete(self) -> None:
        """Write summary.json, remove the resumable checkpoints, and print the forgetting matrix."""
        if self.ranks.is_main:
            write_json(self.out / "summary.json", {"stages": self.stages, "config": self.settings, "argv": sys.argv})
            remove_checkpoints(self.out)
        print(forgetting_table(self.stages))


def sample_of(rows: Rows, tokenizer: Tokenizer) -> str:
    """A text with the longest sequence of the first training row, plain and as the model sees it, and with packing statistics."""
    masked, (ids, lengths) = spelled(rows.batch(0, rows.row_tokens).ids), rows.row(0)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    span, p = slice(sum(lengths[:longest]), sum(lengths[:longest + 1])), packing(rows)
    return (f"sample: {tokenizer.decode(ids[span])!r}\nmasked: {tokenizer.decode(masked[span].tolist())!r}\n"
            f"{p['rows']} rows of {rows.row_tokens} tokens an epoch; {p['cut']:.1%} of sequences cut at a row's end")


def packing(rows: Rows) -> dict:
    """Packing statistics of an epoch: number of rows, and share of sequences cut at a row's end."""
    rows.enter_epoch(max(rows.epoch, 0))
    ends = np.arange(1, rows.per_epoch + 1) * rows.row_tokens
    cut = len(ends) - np.isin(ends, rows.ends).sum()
    return {"rows": rows.per_epoch, "cut": round(float(cut / len(rows.lengths)), 4)}
