"""Selects the documents of a corpus that are most like a task's training texts, into a folder in the cache. A linear classifier on hashed
words, task texts against corpus, ranks them in closed form (naive Bayes); BETR (2025) and Predictive Data Selection (2025) learn one.
"""
import json
import math
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Iterable

from rt.data import Task
from rt.formats.atomic import atomic_folder, digest_of, locked
from rt.formats.corpora import split_documents, stamps

BUCKETS = 2**18     # the number of hash buckets for words
PRIOR = 10          # words of weight 0 added to each document, so that short documents are not extreme by chance


def hashed(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) % BUCKETS for word in re.findall(r"\w+", text.lower())]


def word_weights(wanted: Iterable[str], documents: Iterable[str]) -> dict[int, float]:
    """log p(word | wanted) - log p(word | documents) per bucket, with one added to each count."""
    ours, theirs = (Counter(word for text in texts for word in hashed(text)) for texts in (wanted, documents))
    every = ours.keys() | theirs.keys()
    offset = math.log(theirs.total() + len(every)) - math.log(ours.total() + len(every))
    return {word: math.log((ours[word] + 1) / (theirs[word] + 1)) + offset for word in every}


def select(corpus: Path, task: Task, keep: float, cache: Path) -> Path:
    """The share `keep` of a corpus's training documents that is most like the task's training texts, and all held-out documents."""
    folder = made_of(Path(cache) / "selected", task, keep, stamps(corpus))
    if not folder.exists():
        weights = word_weights([f"{e.text} {e.text_pair or ''}" for e in task.parts["train"]],
                               (text for part, text in split_documents(corpus) if part == "train"))
        documents = ((part, hashed(text)) for part, text in split_documents(corpus))
        scores = [sum(weights[w] for w in words) / (len(words) + PRIOR) if part == "train" else math.inf for part, words in documents]
        heldout = scores.count(math.inf)
        best = {*sorted(range(len(scores)), key=lambda i: -scores[i])[:heldout + max(1, round(keep * (len(scores) - heldout)))]}
        write(folder, (document for i, document in enumerate(split_documents(corpus)) if i in best))
    return folder


def made_of(home: Path, task: Task, *what: object) -> Path:
    """The folder in `home` for data made from a task and `what`."""
    return home / f"{task.name}-{digest_of([task.hash, *what])[:12]}"


def write(folder: Path, documents: Iterable[tuple[str, str]]) -> None:
    with locked(folder, wait=True):     # several commands may need one selection at once
        if folder.exists():
            return
        with atomic_folder(folder) as new, (new / "train.jsonl").open("w") as train, (new / "heldout.jsonl").open("w") as heldout:
            for part, text in documents:
                (train if part == "train" else heldout).write(json.dumps({"text": text}) + "\n")
