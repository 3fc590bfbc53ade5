"""What recycle.py's modes with a teacher read beside the labelled sample: the same texts as ids of the old base's own tokenizer."""
from dataclasses import dataclass, replace
from typing import Any

from rt.data import Task, encode
from rt.errors import InputError
from rt.limits import SeqLen
from rt.recycling import NEEDS_TEACHER, Recycling


@dataclass(frozen=True)
class TeacherConfig:
    """How a teacher reads."""
    old_seq_len: SeqLen | None = None  # longest text in tokens as the teacher, --old_base, reads it; default: --seq_len


@dataclass
class Teaching:
    """`config` with what it names, for a task and a base of recycle.py's Config `c`."""
    config: TeacherConfig
    seq_len: int

    @property
    def old_seq_len(self) -> int:
        return self.config.old_seq_len or self.seq_len

    def fill(self, r: Recycling, sample: Task) -> Recycling:
        """`r`, whose data.train is that of `sample`, with the texts as the teacher reads them, if it does not read the student's ids."""
        old = r.old_base
        if old.tokenizer.vocabulary == r.base.tokenizer.vocabulary and self.old_seq_len == self.seq_len:
            return r
        return replace(r, old_train=encode(sample.parts["train"], sample.labels, old.tokenizer, self.old_seq_len))


def open_teaching(c: Any, modes: list[str], r: Recycling) -> Teaching | None:
    """None if no mode has a teacher. InputError if the old base has no positions for so many tokens."""
    if not {*modes} & {*NEEDS_TEACHER}:
        return None
    teaching = Teaching(c.teaching, c.seq_len)
    if teaching.old_seq_len > (most := r.old_base.encoder.config.max_len):
        raise InputError(f"--old_seq_len {teaching.old_seq_len}: the old base, which teaches, has positions for {most} tokens")
    return teaching
