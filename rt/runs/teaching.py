"""What a teacher needs besides the labelled sample: answers in a file, texts as ids of the old base's tokenizer, texts without labels."""
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Literal

import numpy as np

from rt.data import Example, Task, encode, few_shot
from rt.errors import InputError
from rt.formats.predictions import Predictions
from rt.limits import PositiveInt, PositiveShare, SeqLen, ShareBelowOne
from rt.losses import TeacherCache
from rt.recycling import NEEDS_TEACHER, Recycling
from rt.runs.log import note_truncated

WITHOUT_OLD = ("scratch", "distill")    # modes that need neither old base nor old delta if a file teaches


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher if it is not --old_base + --old_delta, how the teacher reads texts, and texts without labels."""
    teacher: str | None = None  # file of predictions that teaches (python -m rt.runs.predict writes one); distill then needs no old base
    label_smoothing: ShareBelowOne = 0.0  # smoothing of the hard labels in --teacher
    old_seq_len: SeqLen | None = None  # longest text in tokens that the teacher, --old_base, reads; default: --seq_len
    unlabelled: str | None = None  # texts that the teacher labels: a file or folder of texts, a task, or rest (what --shots leaves over)
    unlabelled_share: PositiveShare = 0.5  # share of --unlabelled in the rows of a batch
    unlabelled_texts: PositiveInt | None = None  # at most so many of --unlabelled, drawn by the seed (without --shots: one draw); none: all
    pseudo_labels: Literal["soft", "hard"] = "soft"  # hard: --unlabelled gets the teacher's likeliest labels; only the task loss is used


def refusals(c: Any, modes: list[str]) -> Iterable[tuple[Any, str]]:
    """(whether it is wrong, error message) for each combination of flags in recycle.py's Config `c` that may make no sense."""
    t, taught = c.teaching, {*modes} & {*NEEDS_TEACHER}
    return ((t.teacher and not taught, f"--teacher {t.teacher}: is for modes with a teacher ({', '.join(NEEDS_TEACHER)})"),
            (t.teacher and not c.old_delta and {*modes} - {*WITHOUT_OLD},
             f"--teacher {t.teacher}: has answers and no delta; modes other than {' and '.join(WITHOUT_OLD)} need --old_delta and its "
             "--old_base too"),
            (t.teacher and c.chain, "--teacher has no --chain: from the second base on, the recycled delta would teach"),
            (t.teacher and t.old_seq_len, "--old_seq_len is for an old base that reads the texts; with --teacher none does"),
            (t.old_seq_len and not taught, f"--old_seq_len {t.old_seq_len}: is for modes with a teacher ({', '.join(NEEDS_TEACHER)})"),
            (t.old_seq_len and (c.distill.gamma or c.distill.itp), "--gamma and --itp give the teacher the student's token ids: leave "
             "--old_seq_len out"),
            (c.distill.project_patience and not taught, f"--project_patience: is for modes with a teacher ({', '.join(NEEDS_TEACHER)})"),
            (t.label_smoothing and not t.teacher, "--label_smoothing is for the hard labels of a --teacher"),
            (t.unlabelled and not taught, f"--unlabelled {t.unlabelled}: is for modes with a teacher ({', '.join(NEEDS_TEACHER)})"),
            (t.unlabelled == "rest" and not c.shots, "--unlabelled rest needs --shots: rest is what --shots leaves over"),
            (not t.unlabelled and (t.unlabelled_texts or t.pseudo_labels == "hard" or t.unlabelled_share != TeacherConfig.unlabelled_share),
             "--unlabelled_share, --unlabelled_texts and --pseudo_labels hard are for the texts of --unlabelled: name some"))


@dataclass
class Teaching:
    """`config` and the files that it names, for a `task` with `shots` examples per label (None: all)."""
    config: TeacherConfig
    seq_len: int
    task: Task
    shots: int | None
    predictions: Predictions | None
    texts: list[Example]        # from --unlabelled, unless that is rest

    @property
    def old_seq_len(self) -> int:
        return self.config.old_seq_len or self.seq_len

    def sample(self, seed: int) -> Task:
        """The task with the labelled examples of a seed."""
        return few_shot(self.task, self.shots, seed) if self.shots else self.task

    def unlabelled(self, seed: int) -> list[Example]:
        """The texts without labels. InputError if there are none although --unlabelled asks for some."""
        t, texts = self.config, self.texts
        if t.unlabelled == "rest":
            drawn = {*map(id, self.sample(seed).parts["train"])}
            texts = [replace(e, label=None) for e in self.task.parts["train"] if id(e) not in drawn]
        if t.unlabelled and not texts:
            raise InputError(f"--unlabelled {t.unlabelled}: has no text; --shots {self.shots} may have taken all")
        if t.unlabelled_texts:
            texts = [texts[i] for i in np.random.default_rng([seed, 4]).permutation(len(texts))[:t.unlabelled_texts]]
        return texts

    def examples(self, seed: int, texts: list[Example]) -> list[Example]:
        """All examples that are taught, in the order of the teacher's cache. `texts` are the ones without labels."""
        return self.sample(seed).parts["train"] + texts

    def fill(self, r: Recycling, seed: int) -> Recycling:
        """`r` with the teacher's answers or input added. `r.data.train` holds the labelled examples of this seed."""
        old, labels, texts = r.old_base, self.task.labels, self.unlabelled(seed)
        if texts:
            r = replace(r, unlabelled=encode(texts, labels, r.base.tokenizer, self.seq_len), hard=self.config.pseudo_labels == "hard")
        if self.predictions:
            return replace(r, teacher=TeacherCache(self.predictions.logits(self.examples(seed, texts)).to(r.device), None))
        if old.tokenizer.vocabulary == r.base.tokenizer.vocabulary and self.old_seq_len == self.seq_len:
            return r
        return replace(r, old_train=encode(self.examples(seed, texts), labels, old.tokenizer, self.old_seq_len))

    @property
    def content(self) -> str:
        """Hash of the content of the files that flags name."""
        answers = [self.predictions.path.read_bytes()] if self.predictions else []
        read = answers + [json.dumps([e.text, e.text_pair]).encode() for e in self.texts]
        return hashlib.sha256(b"\n".join(read)).hexdigest() if read else ""


def open_teaching(c: Any, modes: list[str], task: Task, open_texts: Callable[[str], list[Example]], r: Recycling,
                  seeds: list[int]) -> Teaching | None:
    """The Teaching, or None if no mode has a teacher. `open_texts` reads --unlabelled. InputError if the teacher cannot take all texts."""
    if not {*modes} & {*NEEDS_TEACHER}:
        return None
    t = c.teaching
    predictions = Predictions(Path(t.teacher), task.labels, t.label_smoothing) if t.teacher else None
    texts = [] if t.unlabelled in (None, "rest") else open_texts(t.unlabelled)
    teaching = Teaching(t, c.seq_len, task, c.shots, predictions, texts)
    if predictions:
        for seed in dict.fromkeys(seeds) if c.shots else (0,):
            predictions.logits(teaching.examples(seed, teaching.unlabelled(seed)))
    elif teaching.old_seq_len > (most := r.old_base.encoder.config.max_len):
        raise InputError(f"--old_seq_len {teaching.old_seq_len}: the old base, which teaches, has positions for {most} tokens")
    return teaching


def note_cut(c: Any, first: Recycling) -> None:
    """Print on stderr how many of the texts that only a teacher reads were cut in the sample of the `first` run."""
    for part, length, flag in ((first.unlabelled, c.seq_len, "--seq_len"), (first.old_train, c.teaching.old_seq_len, "--old_seq_len")):
        if part:
            note_truncated(part.truncated, len(part), length or c.seq_len, sys.stderr, flag)
