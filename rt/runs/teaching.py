"""What a teacher needs besides the labelled sample: answers in a file, texts as ids of the old base's tokenizer, texts without labels."""
import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Literal

import numpy as np

from rt.data import Example, Task, check_dev, encode, encode_task, few_shot
from rt.deltas import Base
from rt.errors import InputError
from rt.formats.predictions import Predictions
from rt.limits import PositiveInt, PositiveShare, SeqLen, ShareBelowOne
from rt.losses import DistillConfig, TeacherCache
from rt.recycling import NEEDS_TEACHER, Recycling
from rt.runs.log import facts_of, note_pairs, note_truncated

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
    t, d, taught, whose = c.teaching, c.distill, {*modes} & {*NEEDS_TEACHER}, f"for modes with a teacher ({', '.join(NEEDS_TEACHER)})"
    return ((d.gamma and not taught, f"--gamma {d.gamma}: a weight, {whose}"),
            (d.itp and not taught, f"--itp {d.itp}: a number of points, {whose}"),
            (d.project_patience and not taught, f"--project_patience: is {whose}"),
            (c.sweep is None and d.project_patience and not d.beta, "--project_patience changes patience, and --beta 0 leaves that out"),
            (c.sweep is None and d.att_layers != DistillConfig.att_layers and not d.gamma, "--att_layers is for --gamma"),
            (t.pseudo_labels == "hard" and "project" not in modes and replace(d, beta=1.0) != DistillConfig(),
             "--pseudo_labels hard uses the task loss alone: leave alpha, T and the other settings of distillation out"),
            (t.teacher and not c.old_delta and {*modes} - {*WITHOUT_OLD},
             f"--teacher {t.teacher}: has answers and no delta; modes other than {' and '.join(WITHOUT_OLD)} need --old_delta and its "
             "--old_base too"),
            (t.teacher and c.old_base and not c.old_delta, "--old_base has no effect with a --teacher, unless --old_delta is given"),
            (t.teacher and c.chain, "--teacher has no --chain: from the second base on, the recycled delta would teach"),
            (t.teacher and t.old_seq_len, "--old_seq_len is for an old base that reads the texts; with --teacher none does"),
            (t.old_seq_len and d.runs_teacher, "--gamma and --itp give the teacher the student's token ids: leave "
             "--old_seq_len out"),
            (t.label_smoothing and not t.teacher, "--label_smoothing is for the hard labels of a --teacher"),
            (t.unlabelled == "rest" and not c.shots, "--unlabelled rest needs --shots: rest is what --shots leaves over"),
            (not t.unlabelled and (t.unlabelled_texts or t.pseudo_labels == "hard" or t.unlabelled_share != TeacherConfig.unlabelled_share),
             "--unlabelled_share, --unlabelled_texts and --pseudo_labels hard are for the texts of --unlabelled: name some"))


@dataclass
class Samples:
    """The examples that the runs of a seed train on, with what a teacher needs besides. `c` is recycle.py's Config."""
    c: Any
    task: Task
    has_teacher: bool = False       # whether a mode has one
    predictions: Predictions | None = None
    texts: list[Example] = field(default_factory=list)      # from --unlabelled, unless that is rest

    def labelled(self, seed: int) -> Task:
        """The task; with --shots, with the few examples that a seed draws."""
        return few_shot(self.task, self.c.shots, seed) if self.c.shots else self.task

    def unlabelled(self, seed: int) -> list[Example]:
        """The texts without labels. InputError if there are none although --unlabelled asks for some."""
        t, texts = self.c.teaching, self.texts
        if t.unlabelled == "rest":
            drawn = {*map(id, self.labelled(seed).parts["train"])}
            texts = [replace(e, label=None) for e in self.task.parts["train"] if id(e) not in drawn]
        if t.unlabelled and not texts:
            raise InputError(f"--unlabelled {t.unlabelled}: has no text; --shots {self.c.shots} may have taken all")
        if t.unlabelled_texts:
            texts = [texts[i] for i in np.random.default_rng([seed, 4]).permutation(len(texts))[:t.unlabelled_texts]]
        return texts

    def taught(self, seed: int) -> list[Example]:
        """All examples that a teacher teaches, in the order of its cache: the labelled ones, then the texts without labels."""
        return self.labelled(seed).parts["train"] + self.unlabelled(seed)

    def of(self, r: Recycling, seed: int) -> Recycling:
        """`r` with the examples of a seed, and with the teacher's answers or input for them."""
        c, t, old = self.c, self.c.teaching, r.old_base
        if c.shots:
            data = encode_task(self.labelled(seed), r.base.tokenizer, c.seq_len)
            r = replace(r, data=replace(data, test=r.data.test))
        if not self.has_teacher:
            return r
        if texts := self.unlabelled(seed):
            r = replace(r, unlabelled=encode(texts, self.task.labels, r.base.tokenizer, c.seq_len), hard=t.pseudo_labels == "hard")
        if self.predictions:
            return replace(r, teacher=TeacherCache(self.predictions.logits(self.taught(seed)).to(r.device), None))
        if old.tokenizer.fingerprint == r.base.tokenizer.fingerprint and t.old_seq_len in (None, c.seq_len):
            return r        # with one vocabulary, a teacher may still read case, accents or spaces in another way
        return replace(r, old_train=encode(self.taught(seed), self.task.labels, old.tokenizer, t.old_seq_len or c.seq_len))

    @property
    def content(self) -> str:
        """Hash of the content of the files that flags name."""
        answers = [self.predictions.path.read_bytes()] if self.predictions else []
        read = answers + [json.dumps([e.text, e.text_pair]).encode() for e in self.texts]
        return hashlib.sha256(b"\n".join(read)).hexdigest() if read else ""


def open_samples(c: Any, modes: list[str], task: Task, open_texts: Callable[[str], list[Example]], old: Base | None,
                 seeds: list[int]) -> Samples:
    """`open_texts` reads --unlabelled, and only if a mode has a teacher. InputError if the teacher cannot take all texts."""
    t, seeds = c.teaching, [*dict.fromkeys(seeds)] if c.shots else [0]
    for seed in seeds:
        check_dev(Samples(c, task).labelled(seed))
    if not {*modes} & {*NEEDS_TEACHER}:
        return Samples(c, task)
    predictions = Predictions(Path(t.teacher), task.labels, t.label_smoothing) if t.teacher else None
    samples = Samples(c, task, True, predictions, [] if t.unlabelled in (None, "rest") else
                      [*note_pairs(facts_of(task), open_texts(t.unlabelled))])
    if predictions:
        for seed in seeds:
            predictions.logits(samples.taught(seed))
    elif (length := t.old_seq_len or c.seq_len) > (most := old.encoder.config.max_len):
        raise InputError(f"--old_seq_len {length}: the old base, which teaches, has positions for {most} tokens")
    return samples


def note_cut(c: Any, first: Recycling) -> None:
    """Print on stderr how many of the texts that only a teacher reads were cut in the sample of the `first` run."""
    for part, length, flag in ((first.unlabelled, c.seq_len, "--seq_len"), (first.old_train, c.teaching.old_seq_len, "--old_seq_len")):
        if part:
            note_truncated(part.truncated, len(part), length or c.seq_len, sys.stderr, flag)
