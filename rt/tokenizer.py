"""Byte-level BPE through `tokenizers`: trained on a corpus, or loaded.

`Tokenizer` adds what the rest needs to know: which ids are <s>, </s>, <pad> and <mask>, and a fingerprint of the content,
so that a base and a corpus made with different tokenizers are told apart.
"""
import hashlib
from pathlib import Path
from typing import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from rt.config import UsageError

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROLES = {"bos": ("<s>", "[CLS]"), "pad": ("<pad>", "[PAD]"), "eos": ("</s>", "[SEP]"), "mask": ("<mask>", "[MASK]")}


class Tokenizer:
    """Text to ids without special tokens, and back. Raises UsageError where a special token is missing."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer"):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        ids = {}
        for role, names in ROLES.items():
            ids[role] = next((backend.token_to_id(n) for n in names if backend.token_to_id(n) is not None), None)
            if ids[role] is None:
                raise UsageError(f"{source}: has no {role} token (looked for {' and '.join(names)})")
        self.bos_id, self.pad_id, self.eos_id, self.mask_id = ids["bos"], ids["pad"], ids["eos"], ids["mask"]
        specials = {backend.token_to_id(n) for n in SPECIALS + [n for names in ROLES.values() for n in names] + ["[UNK]"]}
        self.special_ids = sorted(specials - {None})
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        self.backend.save(str(Path(folder) / "tokenizer.json"))


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _special_tokens() -> list[AddedToken]:
    return [AddedToken(s, special=True, normalized=False, lstrip=s == "<mask>") for s in SPECIALS]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens; the special tokens are ids 0 to 4 as in RoBERTa (but <mask>)."""
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=_special_tokens(),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(path: Path) -> Tokenizer:
    """From a `tokenizer.json`, or a folder with one, or with RoBERTa's `vocab.json` and `merges.txt`."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    try:
        if file.is_file():
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), str(file))
        if vocab.is_file() and merges.is_file():
            backend = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
            backend.add_special_tokens(_special_tokens())
            return Tokenizer(backend, str(vocab))
    except UsageError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for anything it cannot read
        raise UsageError(f"{file if file.is_file() else vocab}: not a tokenizer file ({error})") from None
    raise UsageError(f"{path}: no tokenizer there; expected tokenizer.json, or vocab.json with merges.txt")
