"""Masked language modelling: which tokens are predicted and what stands in their place (Devlin et al., 2019: 80/10/10).

Corpora: text on disk -> memory-mapped token bins -> rows of a fixed number of tokens -> masked-LM batches.

Which tokens row i of step t holds, and which of them are masked, is a function of (seed, t, i): no iterator has a state,
so resuming needs none and another number of ranks reads the same data.
"""
import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rt.errors import InputError
from rt.formats.tokenizer import Tokenizer
from rt.model import Batch


class Masker:
    """Predicts exactly `count` tokens a row, so that shapes never change; special tokens are never chosen."""

    def __init__(self, tokenizer: Tokenizer, count: int):
        self.count, self.mask_id = count, tokenizer.mask_id
        self.is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.is_special[tokenizer.special_ids] = True
        self.regular = np.flatnonzero(~self.is_special)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids (R,) -> masked ids (R,), chosen rows (count,) in order, their true tokens (count,)."""
        candidates = np.flatnonzero(~self.is_special[ids])
        if len(candidates) < self.count:
            raise InputError(f"a row of {len(ids)} tokens has {len(candidates)} that can be predicted, {self.count} are to "
                             "be: its documents are too short for this --mask_rate")
        rows = np.sort(rng.choice(candidates, self.count, replace=False))
        draw = rng.random(self.count)
        random_tokens = rng.choice(self.regular, self.count)
        masked = ids.copy()
        masked[rows] = np.where(draw < 0.8, self.mask_id, np.where(draw < 0.9, random_tokens, ids[rows]))
        return masked, rows, ids[rows]


PARTS = ("train", "dev", "test")


@dataclass(frozen=True)
class Example:
    text: str
    text_pair: str | None
    label: str | int | float | None     # a whole number only before it is a class of a Task, None only in texts to predict
    source: str                 # file and line, for error messages


@dataclass(frozen=True)
class Task:
    """`labels` are the class names in order, or empty for a regression."""
    name: str
    labels: tuple[str, ...]
    parts: dict[str, list[Example]]

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @cached_property
    def hash(self) -> str:
        """Of all texts and labels, in order: 16 hex digits. A delta carries that of the task it was learned on."""
        digest = hashlib.sha256()
        for part, examples in self.parts.items():
            for e in examples:
                digest.update(json.dumps([part, e.text, e.text_pair, e.label]).encode())
        return digest.hexdigest()[:16]


def few_shot(task: Task, shots: int, seed: int) -> Task:
    """`shots` examples a label for train and for dev (of a regression: `shots` in all), drawn by `seed`; test stays whole.
    A label with fewer keeps what it has."""
    rng = np.random.default_rng([seed, shots])
    parts = dict(task.parts)
    for part in ("train", "dev"):
        by_label: dict = {}
        for e in task.parts[part]:
            by_label.setdefault(None if task.is_regression else e.label, []).append(e)
        parts[part] = [group[i] for _, group in sorted(by_label.items(), key=lambda kv: str(kv[0]))
                       for i in rng.permutation(len(group))[:shots]]
    return replace(task, parts=parts)


@dataclass
class Encoded:
    """Examples as token ids, <s> and </s> included; `targets` are (n,) classes or floats."""
    sequences: list[list[int]]
    targets: torch.Tensor
    truncated: int

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, indices: list[int]) -> Batch:
        """The examples at `indices`, put in order of length (which attention_ref likes); `index` says which is which."""
        indices = sorted(indices, key=lambda i: len(self.sequences[i]))
        index = torch.tensor(indices, dtype=torch.int64)
        return sequences_batch([self.sequences[i] for i in indices], labels=self.targets[index], index=index)


def encode(examples: list[Example], labels: tuple[str, ...], tokenizer: Tokenizer, max_len: int) -> Encoded:
    """<s> text </s>, or <s> text </s></s> pair </s> (BERT's: [CLS] text [SEP] pair [SEP]); what is longer than `max_len` is cut, of a
    pair the longer text first. Where a text itself spells [SEP], that is written ~id: it parts no texts. `labels` are the class names in
    order; empty means float targets."""
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
    if labels:
        targets = torch.tensor([place.get(e.label, -100) for e in examples])
    else:
        targets = torch.tensor([math.nan if e.label is None else float(e.label) for e in examples])
    return Encoded(sequences, targets, truncated)


def _fit(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of a pair of lengths (a, b) stay when there is room for `room`: the longer gives first."""
    if a + b <= room:
        return a, b
    short = min(a, b, room // 2)
    return (room - short, short) if a > b else (short, room - short)


def training_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of training step `step`: epochs are permutations by (seed, epoch), cut into batches; a function of its
    arguments, so nothing has to be remembered. The last batch of an epoch may be smaller."""
    per_epoch = -(-n // batch_size)
    epoch, i = divmod(step, per_epoch)
    return np.random.default_rng([seed, 2, epoch]).permutation(n)[i * batch_size:(i + 1) * batch_size].tolist()


ROW_SEQUENCES = 8      # a row holds this many sequences of the longest length, or more that are shorter


@dataclass
class Corpus:
    """Token ids of documents laid end to end; document i is tokens[offsets[i]:offsets[i+1]]."""
    name: str
    part: str               # train or heldout
    tokens: np.ndarray
    offsets: np.ndarray
    content: str = ""       # hash of the tokens of both parts; "" of what was tokenized before there was one


class Rows:
    """Rows of exactly `row_tokens` tokens out of a corpus, and masked-LM batches of them.

    Documents are cut into sequences <s> ... </s> of at most `seq_len` tokens, permuted anew each epoch and laid end to end;
    row r is tokens [r * row_tokens, (r+1) * row_tokens) of that line. So a row is always full: a sequence across its end
    is cut there, and the remainder begins with its own <s>. Rows are permuted as well, which parts neighbours.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, *, seq_len: int, mask_rate: float, seed: int,
                 sequences: int = ROW_SEQUENCES):
        self.corpus, self.seed, self.seq_len = corpus, seed, seq_len
        self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id
        self.row_tokens = sequences * seq_len
        self.masker = Masker(tokenizer, round(mask_rate * self.row_tokens))
        lengths = np.diff(corpus.offsets)
        pieces = -(-lengths // (seq_len - 2))                                            # sequences of each document
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)    # which one of its document
        self.starts = np.repeat(corpus.offsets[:-1], pieces) + nth * (seq_len - 2)
        self.lengths = np.minimum(np.repeat(lengths, pieces) - nth * (seq_len - 2), seq_len - 2) + 2
        self.per_epoch = int(self.lengths.sum()) // self.row_tokens
        if self.per_epoch == 0:
            raise InputError(f"corpus {corpus.name}: the {self.lengths.sum()} tokens of its {corpus.part} part do not fill "
                             f"one row of {self.row_tokens}; it needs more text, or a smaller --seq_len")
        self.epoch = -1

    def _enter_epoch(self, epoch: int) -> None:
        """Permutations of one epoch: a function of (seed, epoch), kept until another epoch is asked for."""
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.order = rng.permutation(len(self.lengths))
            self.ends = np.cumsum(self.lengths[self.order])
            self.row_order = rng.permutation(self.per_epoch)
            self.epoch = epoch

    def row(self, number: int) -> tuple[np.ndarray, list[int]]:
        """Row `number` of the endless stream: ids (row_tokens,) and the lengths of its sequences."""
        epoch, r = divmod(number, self.per_epoch)
        self._enter_epoch(epoch)
        begin = int(self.row_order[r]) * self.row_tokens
        pieces: list[list[int]] = []
        i = int(np.searchsorted(self.ends, begin, side="right"))
        while sum(map(len, pieces)) < self.row_tokens:
            piece, end = self.order[i], int(self.ends[i])
            first = end - int(self.lengths[piece])
            tokens = self.corpus.tokens[self.starts[piece]:self.starts[piece] + self.lengths[piece] - 2]
            framed = [self.bos, *tokens.tolist(), self.eos][max(0, begin - first):begin + self.row_tokens - first]
            framed[0] = self.bos
            pieces.append(framed)
            i += 1
        pieces.sort(key=len)    # neighbours of equal length are cheaper in attention_ref
        return np.concatenate(pieces).astype(np.int64), list(map(len, pieces))

    def batch(self, step: int, batch_tokens: int, rank: int = 0, world: int = 1, part: int = 0, parts: int = 1) -> Batch:
        """The masked batch of optimizer step `step`: a rank's share of its rows, `part` of `parts` of that when gradients
        are accumulated."""
        count, share = batch_tokens // self.row_tokens, batch_tokens // self.row_tokens // (world * parts)
        first = step * count + (rank * parts + part) * share
        return self.masked(range(first, first + share))

    def masked(self, numbers: range) -> Batch:
        """The rows `numbers`, masked, as one batch."""
        ids, labels, predict, lengths = [], [], [], [0]
        for n, number in enumerate(numbers):
            row, row_lengths = self.row(number)
            masked, chosen, true = self.masker(row, np.random.default_rng([self.seed, 1, number]))
            ids.append(masked)
            labels.append(true)
            predict.append(chosen + n * self.row_tokens)
            lengths += row_lengths
        tensors = [torch.from_numpy(np.concatenate(x)) for x in (ids, labels, predict)]
        return Batch(tensors[0], torch.tensor(np.cumsum(lengths), dtype=torch.int32), max(lengths),
                     labels=tensors[1], predict=tensors[2])

    def static(self, batch: Batch) -> Batch:
        """The same batch in shapes that a compiled or captured step can rely on: cu_seqlens ends in repeated N, which are sequences of
        no token and change nothing; max_seqlen is seq_len.

        There is room for the mean number of sequences and six standard deviations more (renewal theory), which about one batch in a
        billion exceeds; it gets more, in steps of 64. A bound that none can exceed would be that of the shortest documents alone, and
        every sequence, empty or not, costs the attention launched blocks.
        """
        rows, n = len(batch.ids) // self.row_tokens, len(batch.ids)
        mean, deviation = n / self.lengths.mean(), self.lengths.std() * (n / self.lengths.mean() ** 3) ** 0.5
        most = max(mean + 6 * deviation + 2 * rows, len(batch.cu_seqlens) - 1)      # a row's ends cut sequences in two
        room = -(-int(most) // 64) * 64 + 1
        padded = torch.full((room,), n, dtype=torch.int32)
        padded[:len(batch.cu_seqlens)] = batch.cu_seqlens
        return replace(batch, cu_seqlens=padded, max_seqlen=self.seq_len)

    def packing(self) -> dict:
        """Of one epoch: the number of rows, the share of their tokens that documents fill (all of them: rows are cut out of one line),
        and the share of sequences that are cut at a row's end for it."""
        self._enter_epoch(max(self.epoch, 0))
        ends = np.arange(1, self.per_epoch + 1) * self.row_tokens
        cut = len(ends) - np.isin(ends, self.ends).sum()
        return {"rows": self.per_epoch, "fill": min(1.0, float(self.ends[-1] / ends[-1])), "cut": round(float(cut / len(self.lengths)), 4)}

    def check_batch(self, batch_tokens: int, shares: int) -> None:
        """InputError unless `batch_tokens` is a whole number of rows for each of `shares` (ranks x accumulation)."""
        unit = self.row_tokens * shares
        if batch_tokens % unit or batch_tokens <= 0:
            raise InputError(f"--batch_tokens {batch_tokens}: must be a multiple of {unit} "
                             f"({ROW_SEQUENCES} sequences of --seq_len {self.seq_len}, times {shares} ranks x --accumulation)")


def sequences_batch(sequences: list[list[int]], **fields: Tensor) -> Batch:
    """Sequences of ids (specials included) as one unpadded batch; `fields` are Batch's labels and index."""
    lengths = [len(s) for s in sequences]
    ids = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
    return Batch(ids, torch.tensor(np.cumsum([0] + lengths), dtype=torch.int32), max(lengths), **fields)


PAD_SEQUENCES = 8       # that fill one range up, or some more short ones: attention grows with the square


def side_by_side(batches: list[Batch], bucket: int = 0, B: int = 0) -> tuple[Batch, Tensor]:
    """The batches of K runs as one, each in a range of its own, all ranges as long as the longest: what is missing is filled with
    sequences that nothing reads. Also (K, B) the share of each example in the mean of its run: 1 / its batch's size, and 0 for the
    rows that make batches of unequal size equal, or fill them up to B sequences.

    With `bucket`, shapes are few, as a CUDA graph needs: ranges of a multiple of so many tokens, all the sequences that there may be
    (the last ones empty), and a bound on their length that is a multiple of 64.
    """
    N, B, longest = max(len(b.ids) for b in batches), max(B, *(len(b.index) for b in batches)), max(b.max_seqlen for b in batches)
    N = -(-N // bucket) * bucket if bucket else N
    ids, lengths, rows, labels, index, shares = [], [], [], [], [], torch.zeros(len(batches), B)
    for k, batch in enumerate(batches):
        short, n = N - len(batch.ids), len(batch.index)
        size = min(longest, max(16, -(-short // PAD_SEQUENCES)))       # never longer than the model may take
        ids += [batch.ids, batch.ids[:1].expand(short)]
        lengths += batch.cu_seqlens.diff().tolist() + [min(size, short - i) for i in range(0, short, size)]
        for parts, values in ((rows, batch.first + k * N), (labels, batch.labels), (index, batch.index)):
            parts += [values, values[:1].expand(B - n)]
        shares[k, :n] = 1 / n
    if bucket:
        lengths += [0] * (len(batches) * (B + PAD_SEQUENCES) - len(lengths))
        longest = -(-longest // 64) * 64
    seeds = None if batches[0].seeds is None else torch.cat([batch.seeds for batch in batches])
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return Batch(torch.cat(ids), cu_seqlens, longest, labels=torch.cat(labels), index=torch.cat(index), seeds=seeds,
                 rows=torch.cat(rows)), shares
