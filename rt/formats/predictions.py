"""A teacher's predictions in a file: one JSON object per text, in any order, written by rt.runs.predict or any other program.

    {"text": ..., "text_pair": ..., "probabilities": {"no": 0.2, "yes": 0.8}}
    {"text": ..., "no": 0.2, "yes": 0.8}
    {"text": ..., "label": "yes"}           a hard label
    {"text": ..., "value": 0.3}             a regression
    {"hash": "9f86d081884c7d65", ...}       the text's `text_hash` in place of the text
"""
import hashlib
import math
from pathlib import Path
from typing import Iterable

import torch
from torch import Tensor

from rt.data import Example
from rt.errors import InputError
from rt.formats.tables import format_of, read_table
from rt.formats.untrusted import is_number

FLOOR = 1e-38       # smaller probabilities count as this


def text_hash(text: str, text_pair: str | None = None) -> str:
    """The first 16 hex digits of the SHA-256 of a text in UTF-8. A line feed joins the two texts of a pair."""
    return hashlib.sha256((f"{text}\n{text_pair}" if text_pair else text).encode()).hexdigest()[:16]


class Predictions:
    """The answers in the file `path` for a task with these `labels` (none: a regression). A hard label gets probability 1 - `smoothing`,
    and each of the C labels gets smoothing / C on top. InputError names a line that does not fit."""
    def __init__(self, path: Path, labels: tuple[str, ...], smoothing: float = 0.0):
        if not path.is_file() or format_of(path) not in ("jsonl", "json"):
            raise InputError(f"--teacher {path}: is not a .jsonl file such as python -m rt.runs.predict writes")
        self.path, self.labels, self.smoothing, self.has_hard = path, labels, smoothing, False
        self.found: dict[str, tuple[list[float], str]] = {}     # hash of the text -> (answer, its line)
        for place, row in read_table(path, format_of(path)):
            answer = self.answer(place, row)
            first, other = self.found.setdefault(self.key(place, row), (answer, place))
            if not all(math.isclose(a, b, rel_tol=0.01, abs_tol=0.01) for a, b in zip(answer, first)):
                raise InputError(f"{place}: answers the text of {other} differently")
        if smoothing and not self.has_hard:
            raise InputError(f"--label_smoothing is for hard labels, and {path} has none")

    def key(self, place: str, row: dict) -> str:
        text, pair, key = row.get("text"), row.get("text_pair"), row.get("hash")
        if isinstance(text, str) and isinstance(pair, (str, type(None))):
            return text_hash(text, pair)
        if text is None and isinstance(key, str):
            return key
        raise InputError(f"{place}: has neither a text nor a hash of one, so its answer belongs to no text")

    def answer(self, place: str, row: dict) -> list[float]:
        """Probabilities in the order of the labels, or the value of a regression."""
        labels, wanted = self.labels, ", ".join(self.labels[:8])
        if not labels:
            if not is_number(row.get("value"), -3e38, 3e38):
                raise InputError(f"{place}: its \"value\" is not a number, and the task is a regression")
            return [row["value"]]
        answer = row if row.get("probabilities") is None else row["probabilities"]
        if not isinstance(answer, dict) or answer is not row and {*answer} != {*labels}:
            given = ", ".join(answer) if isinstance(answer, dict) else str(answer)
            raise InputError(f"{place}: has probabilities of {given[:200]}, and the task's labels are {wanted}")
        if not {*labels} <= {*answer}:
            label = str(row.get("label")).lower() if isinstance(row.get("label"), bool) else str(row.get("label"))
            if label not in labels:
                raise InputError(f"{place}: has neither probabilities of {wanted} nor one of them as its label")
            self.has_hard = True
            return [(label == each) * (1 - self.smoothing) + self.smoothing / len(labels) for each in labels]
        values = [answer[label] for label in labels]
        if not all(is_number(p, 0, 1.01) for p in values) or abs(sum(values) - 1) > 0.02:
            raise InputError(f"{place}: {str(values)[:200]} are not probabilities of {wanted}: numbers from 0 to 1 with the sum 1")
        return values

    def logits(self, examples: Iterable[Example]) -> Tensor:
        """(n, C) fp32 log-probabilities, or (n, 1) values. InputError if the file lacks one of these texts."""
        keys = [(text_hash(e.text, e.text_pair), e) for e in examples]
        if missing := [e for key, e in keys if key not in self.found]:
            raise InputError(f"{self.path}: has no answer for {len(missing)} of {len(keys)} texts that are taught; the first is "
                             f"{missing[0].source}: {missing[0].text[:60]!r}" + "".join(f", {e.source}" for e in missing[1:8]))
        answers = torch.tensor([self.found[key][0] for key, _ in keys], dtype=torch.float64)
        return (answers.clamp_min(FLOOR).log() if self.labels else answers).float()
