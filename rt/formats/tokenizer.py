"""Tokenizers through `tokenizers`: byte-level BPE trained on a corpus, or whatever a tokenizer.json holds (BPE, WordPiece, Unigram).

`Tokenizer` adds the ids of <s>, </s>, <pad> and <mask> ([CLS], [SEP], [PAD], [MASK]), how the texts of a pair are separated, a fingerprint
of the content, and a hash of the vocabulary alone: if that is equal, ids mean the same words.
"""
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rt.errors import InputError
from rt.formats.files import read_json, write_whole
from rt.formats.untrusted import JSON_BYTES

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
OF_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class NoTokenizer(InputError):
    """A folder holds no tokenizer that can be read."""


class Tokenizer:
    """Text to ids without special tokens, and back. InputError if a special token is missing."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer"):
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.source = backend, source
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1     # ids may have gaps
        if self.vocab_size > 2 * backend.get_vocab_size() + 1000:
            raise InputError(f"{source}: its ids go up to {self.vocab_size - 1}, for {backend.get_vocab_size()} tokens")
        is_bert = "[CLS]" in backend.encode("a").tokens     # a user may have added <s> to BERT's tokens

        def id_of(role: str, *names: str) -> int:
            known = [i for name in (reversed(names) if is_bert else names) if (i := backend.token_to_id(name)) is not None]
            if not known:
                raise InputError(f"{source}: has no {role} token (looked for {' and '.join(names)})")
            return known[0]

        self.bos_id, self.eos_id = id_of("bos", "<s>", "[CLS]"), id_of("eos", "</s>", "[SEP]")
        self.pad_id, self.mask_id = id_of("pad", "<pad>", "[PAD]"), id_of("mask", "<mask>", "[MASK]")
        added = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids = sorted((added | {backend.token_to_id(name) for name in SPECIALS + OF_BERT}) - {None})
        framing = backend.num_special_tokens_to_add(True) or (3 if backend.id_to_token(self.bos_id) == "[CLS]" else 4)
        self.separators = 1 if framing == 3 else 2      # between the texts of a pair: BERT's one, RoBERTa's two
        text = backend.to_str()
        if isinstance(backend.model, models.Unigram):       # scores differ in the last digit when they are written and read again
            facts = json.loads(text)
            facts["model"]["vocab"] = [[token, f"{score:.6g}"] for token, score in facts["model"]["vocab"]]
            text = json.dumps(facts)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def vocabulary(self) -> str:
        """Hash of which token each id stands for: 16 hex digits."""
        return hashlib.sha256(json.dumps(sorted(self.backend.get_vocab().items())).encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:      # tokenizers raises bare Exception, as for an unknown word if there is no token for those
            raise InputError(f"{self.source}: the tokenizer cannot encode a text ({error})") from None

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode([max(i, ~i) for i in ids], skip_special_tokens=False)    # ~i: see rt/data.py: encode

    def framed(self) -> tokenizers.Tokenizer:
        """The backend with the special tokens around a text or a pair that rt/data.py puts there; BERT's second text has type 1."""
        framed = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.backend.num_special_tokens_to_add(True) == 0:
            first, last = self.backend.id_to_token(self.bos_id), self.backend.id_to_token(self.eos_id)
            second = ["$B:1", f"{last}:1"] if self.separators == 1 else [last, "$B", last]
            framed.post_processor = processors.TemplateProcessing(
                single=[first, "$A", last], pair=[first, "$A", last, *second], special_tokens=[(first, self.bos_id), (last, self.eos_id)])
        return framed

    def save(self, folder: Path) -> None:
        write_whole(Path(folder) / "tokenizer.json", self.backend.to_str(pretty=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens; the special tokens are ids 0 to 4 as in RoBERTa (but <mask>)."""
    backend = _byte_level(models.BPE())
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=_special(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(backend)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _special(names: Iterable[str]) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, lstrip=name == "<mask>") for name in names]


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, or a folder with one, or with RoBERTa's `vocab.json` and `merges.txt`, or BERT's `vocab.txt`.
    As in transformers, a tokenizer_config.json beside them decides on case, accents and the first space. InputError if none can be read."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    for read in (file, path / "vocab.json", path / "merges.txt", path / "vocab.txt"):
        if read.is_file() and read.stat().st_size > JSON_BYTES:
            raise InputError(f"{read}: is longer than {JSON_BYTES >> 20} MB, too long for a tokenizer")
    try:
        settings = path / "tokenizer_config.json"
        facts = read_json(settings) if settings.is_file() else {}
        if file.is_file():
            backend = _as_configured(tokenizers.Tokenizer.from_file(str(file)), facts)
        else:
            file, backend = _from_vocabulary(path, facts)
        tokenizer = Tokenizer(backend, str(file))     # bounds the ids: to_str() takes memory for the largest
        tokenizers.Tokenizer.from_str(backend.to_str())     # can a base read it again? merges may need tokens that the vocabulary lacks
        return tokenizer
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # tokenizers raises bare Exception for what it cannot read, or panics, which is no Exception
        raise InputError(f"{file if file.is_file() else path}: not a tokenizer file ({error})") from None


def _from_vocabulary(folder: Path, facts: dict) -> tuple[Path, tokenizers.Tokenizer]:
    """(the file of its vocabulary, the tokenizer) of a folder without a tokenizer.json."""
    vocab, merges, words = folder / "vocab.json", folder / "merges.txt", folder / "vocab.txt"
    of_bert = str(facts.get("tokenizer_class", "BertTokenizer")).startswith("BertTokenizer") and "word_tokenizer_type" not in facts
    if vocab.is_file() and merges.is_file():
        file, backend, special = vocab, _byte_level(models.BPE.from_file(str(vocab), str(merges))), SPECIALS
    elif words.is_file() and of_bert:       # word_tokenizer_type: Japanese ones, which need other libraries
        file, backend = words, tokenizers.Tokenizer(models.WordPiece.from_file(str(words), unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        special = [name for name in OF_BERT if backend.token_to_id(name) is not None]
    else:
        raise NoTokenizer(f"{folder}: no tokenizer there; expected tokenizer.json, or vocab.json with merges.txt, or BERT's vocab.txt "
                          "(transformers' AutoTokenizer.from_pretrained and save_pretrained make a tokenizer.json of others)")
    backend.add_special_tokens(_special(special))
    backend = _as_configured(backend, facts)
    more = folder / "added_tokens.json"
    added = {i: AddedToken(token) for token, i in (read_json(more) if more.is_file() else {}).items()}
    added |= {int(i): AddedToken(**{k: v for k, v in token.items() if k != "__type"})
              for i, token in facts.get("added_tokens_decoder", {}).items()}
    for i, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise InputError(f"{folder}: the added token {token.content!r} should be {i} and becomes {backend.token_to_id(token.content)}")
    return file, backend


def _as_configured(backend: tokenizers.Tokenizer, facts: dict) -> tokenizers.Tokenizer:
    """With the settings of a tokenizer_config.json, if its class is one that obeys them."""
    if str(facts.get("tokenizer_class")).startswith(("PreTrainedTokenizer", "TokenizersBackend")):
        return backend
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        for theirs, name in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
                             ("tokenize_chinese_chars", "handle_chinese_chars")):
            if theirs in facts:
                setattr(normalizer, name, facts[theirs])
        backend.normalizer = normalizer
    if isinstance(splitter, pre_tokenizers.ByteLevel) and "add_prefix_space" in facts:
        splitter.add_prefix_space = facts["add_prefix_space"]
        backend.pre_tokenizer = splitter
    return backend
