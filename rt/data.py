"""Text as token ids: labelled tasks and few-shot samples, masked rows of a corpus, and batches of examples or rows.

The data and masks of a step are a function of (seed, step). No iterator has a state, so resuming needs none and any number of ranks reads
the same data. rt/formats reads the files.
"""
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rt.errors import InputError
from rt.model import Batch

Objective = Literal["mlm", "rts", "slm"]
MaskUnit = Literal["token", "word", "entity"]
ROW_SEQUENCES = 8      # a row of a corpus has room for this many sequences of maximum length


class Tokenizer(Protocol):
    """The tokenizer interface that the core needs. rt/formats/tokenizer.py implements it."""
    vocab_size: int
    bos_id: int
    eos_id: int
    mask_id: int
    special_ids: list[int]
    separators: int     # number of separators between the texts of a pair: 2 for RoBERTa, 1 for BERT
    fingerprint: str    # hash of everything the tokenizer does
    vocabulary: str     # hash of the token that each id stands for
    pieces: list[str]   # text of each id; a word-initial piece starts with a space

    def encode(self, texts: list[str]) -> list[list[int]]: ...


# --- tasks ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    text: str
    text_pair: str | None
    label: str | int | float | None     # int only while files are read (a Task has str or float); None: to be predicted, or no gold label
    source: str                 # file and line, for error messages


@dataclass(frozen=True)
class Task:
    """A labelled task. `labels` are the class names in order, or empty for a regression."""
    name: str
    labels: tuple[str, ...]
    parts: dict[str, list[Example]]

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @cached_property
    def hash(self) -> str:
        """Hash of all texts and labels in order, 16 hex digits. A delta stores the hash of its task."""
        lines = [json.dumps([part, e.text, e.text_pair, e.label]) for part, examples in self.parts.items() for e in examples]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def few_shot(task: Task, shots: int, seed: int) -> Task:
    """Draws at most `shots` examples per label (in total for a regression) for train and for dev, by `seed`. test stays whole."""
    rng, parts = np.random.default_rng([seed, shots]), dict(task.parts)
    for part in ("train", "dev"):
        groups: dict[str, list[Example]] = {}
        for e in task.parts[part]:
            groups.setdefault("" if task.is_regression else str(e.label), []).append(e)
        parts[part] = [groups[label][i] for label in sorted(groups) for i in rng.permutation(len(groups[label]))[:shots]]
    return replace(task, parts=parts)


@dataclass
class Encoded:
    """Examples as token ids, <s> and </s> included; `targets` are (n,) int64 classes (-100: none) or float32 numbers (NaN: none)."""
    sequences: list[list[int]]
    targets: Tensor
    truncated: int      # number of sequences that were cut
    unlabelled: int = 0     # number of examples without a label, which come last
    share: float = 0.0      # share of a training batch that the unlabelled examples fill

    def __len__(self) -> int:
        return len(self.sequences)

    def beside(self, other: "Encoded", share: float) -> "Encoded":
        """These examples, followed by the unlabelled examples `other`."""
        return Encoded(self.sequences + other.sequences, torch.cat([self.targets, other.targets]), self.truncated + other.truncated,
                       len(other), share)

    def indices(self, batch_size: int, step: int, seed: int) -> list[int]:
        """The examples of step `step`. If some are unlabelled, every batch is full, and round(share * batch_size) of its rows are."""
        if not self.unlabelled:
            return training_indices(len(self), batch_size, step, seed)
        n, extra = len(self) - self.unlabelled, round(self.share * batch_size)
        own, others = endless_indices(n, batch_size - extra, step, [seed, 2]), endless_indices(self.unlabelled, extra, step, [seed, 3])
        return own + [n + i for i in others]

    def batch(self, indices: list[int]) -> Batch:
        """The examples at `indices`, sorted by length (cheaper in attention_ref). The batch's `index` holds their indices."""
        indices = sorted(indices, key=lambda i: len(self.sequences[i]))
        index = torch.tensor(indices, dtype=torch.int64)
        return sequences_batch([self.sequences[i] for i in indices], labels=self.targets[index], index=index)


def encode(examples: list[Example], labels: tuple[str, ...], tokenizer: Tokenizer, max_len: int) -> Encoded:
    """<s> text </s>, or <s> text </s></s> pair </s> (BERT: [CLS] text [SEP] pair [SEP]), cut to `max_len`, the longer text of a pair first.
    A [SEP] inside BERT's first text becomes ~id, which separates nothing. Without `labels` (class names) targets are floats."""
    texts = tokenizer.encode([e.text for e in examples])
    pairs = tokenizer.encode([e.text_pair or "" for e in examples])
    bos, eos, between = tokenizer.bos_id, tokenizer.eos_id, [tokenizer.eos_id] * (tokenizer.separators - 1)
    sequences, truncated = [], 0
    for example, a, b in zip(examples, texts, pairs):
        paired = example.text_pair is not None
        room = max_len - 2 - (tokenizer.separators if paired else 0)
        truncated += len(a) + len(b) > room
        keep_a, keep_b = _fit(len(a), len(b), room)
        if not between and eos in a:
            a = [~i if i == eos else i for i in a]
        sequences.append([bos, *a[:keep_a], eos, *([*between, *b[:keep_b], eos] if paired else [])])
    place = {label: i for i, label in enumerate(labels)}
    if wrong := next((e for e in examples if labels and e.label is not None and e.label not in place), None):
        raise InputError(f"{wrong.source}: label {wrong.label!r} is none of the task's: {', '.join(labels[:8])}")
    targets = [place.get(e.label, -100) if labels else float("nan" if e.label is None else e.label) for e in examples]
    return Encoded(sequences, torch.tensor(targets), truncated)


def _fit(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens to keep of two texts of lengths (a, b) if `room` tokens fit. The longer text is cut first."""
    short = min(a, b, room // 2)
    return (a, b) if a + b <= room else (room - short, short) if a > b else (short, room - short)


@dataclass
class TaskData:
    """An encoded task. `labels` is empty for a regression. `test` is None if it has no labels or must stay unseen, as in a search."""
    name: str
    labels: tuple[str, ...]
    train: Encoded
    dev: Encoded
    test: Encoded | None = None
    hash: str = ""      # Task.hash

    @property
    def num_outputs(self) -> int:
        return max(1, len(self.labels))

    def truncated(self) -> tuple[int, int]:
        """(number of texts that were cut, number of texts)"""
        parts = [part for part in (self.train, self.dev, self.test) if part]
        return sum(part.truncated for part in parts), sum(map(len, parts))


def check_dev(task: Task) -> None:
    """InputError if dev's targets leave a regression's score undefined."""
    if task.is_regression and len({e.label for e in task.parts["dev"]}) == 1:
        raise InputError(f"{task.name}: dev's targets are all equal: no correlation with them is defined; give others, or more `shots`")


def encode_task(task: Task, tokenizer: Tokenizer, max_len: int) -> TaskData:
    """All parts of a task as ids, with texts cut to `max_len` tokens. InputError from `check_dev`."""
    check_dev(task)
    parts = {part: encode(examples, task.labels, tokenizer, max_len) for part, examples in task.parts.items()}
    return TaskData(task.name, task.labels, **parts, hash=task.hash)


def training_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of step `step` out of n. An epoch is a permutation by (seed, epoch), cut into batches. The last batch may be smaller."""
    epoch, i = divmod(step, -(-n // batch_size))
    return np.random.default_rng([seed, 2, epoch]).permutation(n)[i * batch_size:(i + 1) * batch_size].tolist()


def endless_indices(n: int, count: int, step: int, seed: list[int]) -> list[int]:
    """The `count` items of step `step` from an endless sequence of permutations of n, one per (seed, epoch)."""
    first, end = step * count, (step + 1) * count
    epochs = range(first // n, -(-end // n))
    order = [i for epoch in epochs for i in np.random.default_rng([*seed, epoch]).permutation(n).tolist()]
    return order[first - epochs.start * n:end - epochs.start * n]


def sequences_batch(sequences: list[list[int]], **fields: Tensor) -> Batch:
    """Packs sequences of ids (special tokens included) into one batch. `fields` are Batch's labels and index."""
    lengths = [len(s) for s in sequences]
    ids = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
    return Batch(ids, torch.tensor(np.cumsum([0] + lengths), dtype=torch.int32), max(lengths), **fields)


def pad_to_multiple(batch: Batch, device: torch.device, precision: torch.dtype) -> Batch:
    """The same batch. For bf16 on a CPU, it is padded to a multiple of 64 tokens by sequences of one token that `rows` leaves out: oneDNN
    compiles a step's products anew for every new number of tokens (docs/scaling.md). A batch that has `rows` stays as it is."""
    short, ends = -len(batch.ids) % 64, batch.cu_seqlens
    if device.type != "cpu" or precision != torch.bfloat16 or not short or batch.rows is not None:
        return batch
    added = ends[-1] + torch.arange(1, short + 1, dtype=ends.dtype)
    return replace(batch, ids=torch.cat([batch.ids, batch.ids[:1].expand(short)]), cu_seqlens=torch.cat([ends, added]), rows=batch.first)


# --- masked language modelling ----------------------------------------------------------------------------------------

class Masker:
    """Chooses `count` tokens of a row, never special ones. Each becomes <mask> (.8) or random (.1), or stays (Devlin et al., 2019). For
    slm and rts, all become another random token (Di Liello et al., 2022). `unit` word chooses whole words and cuts the last one to fit.
    `unit` entity first chooses numbers, and capitalised words that do not begin a sentence; adjacent ones together. A piece that
    holds part of a character (U+FFFD) counts as letters there."""
    def __init__(self, tokenizer: Tokenizer, count: int, objective: Objective = "mlm", unit: MaskUnit = "token"):
        self.count, self.mask_id, self.objective, self.unit = count, tokenizer.mask_id, objective, unit
        self.is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.is_special[tokenizer.special_ids] = True
        self.regular = np.flatnonzero(~self.is_special)
        if unit != "token":
            looks = [(not p[:1].isalnum(), not p[-1:].isalnum(), p.strip().rstrip("\"'”’)]")[-1:] in tuple(".!?:"), p.strip()[:1].isdigit(),
                      p.strip()[:1].isupper()) for p in (piece.replace("\ufffd", "a") for piece in tokenizer.pieces)]
            self.opens, self.closes, self.ends_sentence, self.is_number, self.is_capital = np.array(looks).T     # by id
            for table in (self.opens, self.closes, self.ends_sentence):
                table |= self.is_special
            if unit == "entity" and not self.is_capital[self.regular].any():
                raise InputError("`mask` entity: the tokenizer has no capital letters to tell names by; give word or token")

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids (R,) -> masked ids (R,), chosen rows (count,) in order, their true tokens (count,)."""
        candidates = np.flatnonzero(~self.is_special[ids])
        if len(candidates) < self.count:
            raise InputError(f"a row of {len(ids)} tokens has {len(candidates)} to predict, and `mask_rate` asks for {self.count}")
        if self.unit == "token":
            rows = np.sort(rng.choice(candidates, self.count, replace=False))
        else:
            rows = np.sort(candidates[np.argsort(self.order(ids, rng)[candidates], kind="stable")[:self.count]])
        masked = ids.copy()
        if self.objective == "mlm":
            draw, random_tokens = rng.random(self.count), rng.choice(self.regular, self.count)
            masked[rows] = np.where(draw < 0.8, self.mask_id, np.where(draw < 0.9, random_tokens, ids[rows]))
        else:
            draw = rng.integers(0, len(self.regular) - 1, self.count)
            masked[rows] = self.regular[draw + (draw >= np.searchsorted(self.regular, ids[rows]))]      # never the token itself
        return masked, rows, ids[rows]

    def order(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(R,) sort keys, equal within a word or an entity. The tokens with the smallest keys are chosen."""
        begins = self.opens[ids] | np.roll(self.closes[ids], 1)
        word, first = begins.cumsum() - 1, np.flatnonzero(begins)      # a row begins with a special token
        if self.unit == "word":
            return rng.random(word[-1] + 1)[word]
        named = self.is_number[ids[first]] | self.is_capital[ids[first]] & ~self.ends_sentence[ids[first - 1]]
        span = np.cumsum(~(named & np.roll(named, 1)))      # entity of each word
        return (rng.random(span[-1] + 1)[span] + ~named)[word]


@dataclass
class Corpus:
    """Token ids of concatenated documents. Document i is tokens[offsets[i]:offsets[i+1]]."""
    name: str
    part: str               # train or heldout
    tokens: np.ndarray
    offsets: np.ndarray
    content: str = ""       # hash of the tokens of both parts; "" in a cache that predates the hash


class Rows:
    """Rows of exactly `row_tokens` tokens from a corpus, and masked-LM batches of rows. Documents are cut into sequences <s> ... </s> of at
    most `seq_len` tokens. Each epoch permutes and concatenates the sequences. Row r is tokens [r * row_tokens, (r+1) * row_tokens) of the
    result, so every row is full: a sequence across a row's end is cut in two, and the first token after the cut becomes <s>. The order of
    rows is permuted too."""
    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, *, seq_len: int, mask_rate: float, seed: int, sequences: int = ROW_SEQUENCES,
                 objective: Objective = "mlm", unit: MaskUnit = "token"):
        self.corpus, self.seed, self.seq_len = corpus, seed, seq_len
        self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id
        self.row_tokens = sequences * seq_len
        if (count := round(mask_rate * self.row_tokens)) < 1:
            raise InputError(f"`mask_rate` {mask_rate}: predicts none of the {self.row_tokens} tokens of a row")
        self.masker = Masker(tokenizer, count, objective, unit)
        lengths = np.diff(corpus.offsets)
        pieces = -(-lengths // (seq_len - 2))                                            # sequences per document
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)    # number of the sequence within its document
        self.starts = np.repeat(corpus.offsets[:-1], pieces) + nth * (seq_len - 2)
        self.lengths = np.minimum(np.repeat(lengths, pieces) - nth * (seq_len - 2), seq_len - 2) + 2
        self.mean_length, self.length_deviation = self.lengths.mean(), self.lengths.std()
        self.per_epoch = int(self.lengths.sum()) // self.row_tokens
        if self.per_epoch == 0:
            raise InputError(f"corpus {corpus.name}: the {self.lengths.sum()} tokens of its {corpus.part} part do not fill "
                             f"one row of {self.row_tokens}; it needs more text, or a smaller `seq_len`")
        self.epoch, self.mixture = -1, None     # mixture: the Mixture that includes these rows

    def enter_epoch(self, epoch: int) -> None:
        """Draws the permutations of one epoch from (seed, epoch). They are kept until another epoch is entered."""
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.order = rng.permutation(len(self.lengths))
            self.ends = np.cumsum(self.lengths[self.order])
            self.row_order = rng.permutation(self.per_epoch)
            self.epoch = epoch

    def row(self, number: int) -> tuple[np.ndarray, list[int]]:
        """Row `number` of the endless stream: ids (row_tokens,) and the lengths of the row's sequences."""
        epoch, r = divmod(number, self.per_epoch)
        self.enter_epoch(epoch)
        begin = int(self.row_order[r]) * self.row_tokens
        end, pieces = begin + self.row_tokens, []
        for i in range(np.searchsorted(self.ends, begin, side="right"), np.searchsorted(self.ends, end) + 1):
            piece = self.order[i]
            first = int(self.ends[i] - self.lengths[piece])
            tokens = self.corpus.tokens[self.starts[piece]:self.starts[piece] + self.lengths[piece] - 2]
            framed = [self.bos, *tokens.tolist(), self.eos][max(0, begin - first):end - first]
            framed[0] = self.bos
            pieces.append(framed)
        pieces.sort(key=len)    # neighbours of equal length are cheaper in attention_ref
        return np.concatenate(pieces).astype(np.int64), list(map(len, pieces))

    def batch(self, step: int, batch_tokens: int, part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` of the rows of optimizer step `step`, masked: one microbatch of one rank."""
        count = batch_tokens // self.row_tokens
        first = step * count + part * (count // parts)
        return self.masked(range(first, first + count // parts))

    def masked(self, numbers: range) -> Batch:
        """The rows `numbers` as one masked batch. For rts: `predict` is None, and labels (N,) are 1 original, 0 replaced, -100 special."""
        ids, labels, predict, lengths, rts = [], [], [], [0], self.masker.objective == "rts"
        for n, number in enumerate(numbers):
            rows, number = self.mixture.locate(number) if self.mixture else (self, number)
            row, row_lengths = rows.row(number)
            masked, chosen, true = rows.masker(row, np.random.default_rng([rows.seed, 1, number]))
            labels.append(np.where(rows.masker.is_special[row], -100, masked == row) if rts else true)
            inner = masked == rows.eos
            inner[np.cumsum(row_lengths) - 1] = False
            ids.append(np.where(inner, ~masked, masked))      # as in `encode`: a separator that a text spells separates nothing
            predict.append(chosen + n * self.row_tokens)
            lengths += row_lengths
        ids, labels, predict = (torch.from_numpy(np.concatenate(arrays)) for arrays in (ids, labels, predict))
        return Batch(ids, torch.tensor(np.cumsum(lengths), dtype=torch.int32), max(lengths), labels=labels,
                     predict=None if rts else predict)

    def check_batch(self, batch_tokens: int, shares: int) -> None:
        """Raises InputError unless `batch_tokens` is a whole number of rows per share. `shares` is ranks x accumulation."""
        unit = self.row_tokens * shares
        if batch_tokens % unit or batch_tokens <= 0:
            rows = f"{ROW_SEQUENCES} sequences of `seq_len` {self.seq_len}, times {shares} ranks x `accumulation`"
            raise InputError(f"`batch_tokens` {batch_tokens}: must be a multiple of {unit} ({rows})")
