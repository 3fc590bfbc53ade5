"""What recycle.py's modes with a teacher read beside the labelled sample: a teacher's answers in a file, or the texts as ids of the old
base's own tokenizer."""
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterable

from rt.data import Example, Task, encode, few_shot
from rt.errors import InputError
from rt.formats.predictions import Predictions
from rt.limits import SeqLen, ShareBelowOne
from rt.losses import TeacherCache
from rt.recycling import NEEDS_TEACHER, Recycling

WITHOUT_OLD = ("scratch", "distill")    # modes that need neither old base nor old delta if a file teaches


@dataclass(frozen=True)
class TeacherConfig:
    """Who teaches if --old_base + --old_delta do not, and how they read."""
    teacher: str | None = None  # a file of predictions teaches (python -m rt.runs.predict writes such): no old base is needed for distill
    label_smoothing: ShareBelowOne = 0.0  # of the hard labels in --teacher
    old_seq_len: SeqLen | None = None  # longest text in tokens as the teacher, --old_base, reads it; default: --seq_len


def refusals(c: Any, modes: list[str]) -> Iterable[tuple[Any, str]]:
    """(whether it is so, sentence) of what makes no sense together in recycle.py's Config `c`."""
    t, taught = c.teaching, {*modes} & {*NEEDS_TEACHER}
    return ((t.teacher and not taught, f"--teacher {t.teacher}: is for modes with a teacher ({', '.join(NEEDS_TEACHER)})"),
            (t.teacher and not c.old_delta and {*modes} - {*WITHOUT_OLD},
             f"--teacher {t.teacher}: has answers and no delta; modes other than {' and '.join(WITHOUT_OLD)} need --old_delta and its "
             "--old_base too"),
            (t.teacher and c.chain, "--teacher has no --chain: from the second base on, the recycled delta would teach"),
            (t.teacher and t.old_seq_len, "--old_seq_len is for an old base that reads the texts; with --teacher none does"),
            (t.label_smoothing and not t.teacher, "--label_smoothing is for the hard labels of a --teacher"))


@dataclass
class Teaching:
    """`config` with what it names, for a `task` of which `shots` examples a label are drawn, or all."""
    config: TeacherConfig
    seq_len: int
    task: Task
    shots: int | None
    predictions: Predictions | None

    @property
    def old_seq_len(self) -> int:
        return self.config.old_seq_len or self.seq_len

    def sample(self, seed: int) -> Task:
        """The task with the labelled examples of a seed."""
        return few_shot(self.task, self.shots, seed) if self.shots else self.task

    def examples(self, seed: int) -> list[Example]:
        """What is taught, in the order of the cache."""
        return self.sample(seed).parts["train"]

    def fill(self, r: Recycling, seed: int) -> Recycling:
        """`r`, whose data.train are the labelled examples of this seed, with what its teacher says or reads."""
        old = r.old_base
        if self.predictions:
            return replace(r, teacher=TeacherCache(self.predictions.logits(self.examples(seed)).to(r.device), None))
        if old.tokenizer.vocabulary == r.base.tokenizer.vocabulary and self.old_seq_len == self.seq_len:
            return r
        return replace(r, old_train=encode(self.examples(seed), self.task.labels, old.tokenizer, self.old_seq_len))

    @property
    def content(self) -> str:
        """Hash of what flags name by path."""
        return hashlib.sha256(self.predictions.path.read_bytes()).hexdigest() if self.predictions else ""


def open_teaching(c: Any, modes: list[str], task: Task, r: Recycling, seeds: Iterable[int]) -> Teaching | None:
    """None if no mode has a teacher. InputError if the teacher cannot read the texts, or does not answer for all of them."""
    if not {*modes} & {*NEEDS_TEACHER}:
        return None
    t = c.teaching
    predictions = Predictions(Path(t.teacher), task.labels, t.label_smoothing) if t.teacher else None
    teaching = Teaching(t, c.seq_len, task, c.shots, predictions)
    if predictions:
        for seed in dict.fromkeys(seeds):
            predictions.logits(teaching.examples(seed))
    elif teaching.old_seq_len > (most := r.old_base.encoder.config.max_len):
        raise InputError(f"--old_seq_len {teaching.old_seq_len}: the old base, which teaches, has positions for {most} tokens")
    return teaching
