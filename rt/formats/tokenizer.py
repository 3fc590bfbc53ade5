"""Tokenizers from the library `tokenizers`: byte-level BPE trained on a corpus, or the BPE, WordPiece or Unigram of a tokenizer.json, with
the settings and added tokens of the files next to it, as transformers 5 reads them.

`Tokenizer` adds the ids of <s>, </s>, <pad> and <mask> ([CLS], [SEP], [PAD], [MASK]), the separators between the texts of a pair, a
fingerprint of the content, and a hash of the vocabulary alone. If two vocabularies have equal hashes, ids mean the same words.
"""
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rt.errors import InputError
from rt.formats.files import note, read_json, write_whole
from rt.formats.untrusted import JSON_BYTES, shaped

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OF_ROBERTA = dict(zip(ROLES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")))
OF_BERT = dict(zip(ROLES, (None, None, "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")))
# model_type, or another name of the class -> transformers' class
CLASS_OF = {"roberta": "RobertaTokenizer", "bert": "BertTokenizer", "xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer",
            "BartTokenizer": "RobertaTokenizer", "LongformerTokenizer": "RobertaTokenizer", "LEDTokenizer": "RobertaTokenizer",
            **dict.fromkeys(("ElectraTokenizer", "MobileBertTokenizer", "LayoutLMTokenizer", "SqueezeBertTokenizer",
                             "DistilBertTokenizer"), "BertTokenizer")}
PROBE = "The Été's  N°12\t½ e\u0301 中文,\n naïve\u200b ﬁn"        # different tokenizers give different ids for this text


class NoTokenizer(InputError):
    """A folder holds no tokenizer that can be read."""


class Tokenizer:
    """Converts text to ids without special tokens, and back. InputError if a special token is missing."""
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
        self.special_ids = sorted((added | {backend.token_to_id(name) for name in (*SPECIALS, *OF_BERT.values()) if name}) - {None})
        framing = backend.num_special_tokens_to_add(True) or (3 if backend.id_to_token(self.bos_id) == "[CLS]" else 4)
        self.separators = 1 if framing == 3 else 2      # between the texts of a pair: one in BERT, two in RoBERTa
        text = backend.to_str()
        if isinstance(backend.model, models.Unigram):       # writing and reading scores changes their last digit
            facts = json.loads(text)
            facts["model"]["vocab"] = [[token, f"{score:.6g}"] for token, score in facts["model"]["vocab"]]
            text = json.dumps(facts)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def vocabulary(self) -> str:
        """Hash of the tokens and their ids: 16 hex digits."""
        return hashlib.sha256(json.dumps(sorted(self.backend.get_vocab().items())).encode()).hexdigest()[:16]

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each id, "" for a gap. A space in front means that the token begins a word."""
        tokens = [self.backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        if isinstance(self.backend.model, (models.WordPiece, models.WordLevel)):
            return [token[2:] if token.startswith("##") else f" {token}" for token in tokens]
        bytes_of = decoders.ByteLevel() if isinstance(self.backend.model, models.BPE) else decoders.Fuse()
        return [bytes_of.decode([token]).replace("\u2581", " ") for token in tokens]      # SentencePiece's sign for a space

    def encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:      # tokenizers raises a bare Exception, for example for an unknown word without an unknown token
            raise InputError(f"{self.source}: the tokenizer cannot encode a text ({error})") from None

    def reads_as(self, other: "Tokenizer", texts: list[str]) -> bool:
        """Whether both give the same ids for `texts`. With one vocabulary they may still differ in case, accents or spaces."""
        return self.fingerprint == other.fingerprint or self.encode(texts) == other.encode(texts)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode([max(i, ~i) for i in ids], skip_special_tokens=False)    # ~i: see rt/data.py: encode

    def framed(self) -> tokenizers.Tokenizer:
        """The backend, with the special tokens that rt/data.py puts around a text or a pair. BERT's second text has type 1."""
        framed = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.backend.num_special_tokens_to_add(True) == 0:
            framed.post_processor = _frame(self.backend, self.bos_id, self.eos_id, self.separators, int(self.separators == 1))
        return framed

    def save(self, folder: Path) -> None:
        write_whole(Path(folder) / "tokenizer.json", self.backend.to_str(pretty=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with at most `vocab_size` tokens. The special tokens have ids 0 to 4, as in RoBERTa (except <mask>)."""
    backend = pipeline(models.BPE())
    special = [AddedToken(name, special=True, normalized=False, lstrip=name == "<mask>") for name in SPECIALS]
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(backend)


def pipeline(model: models.Model) -> tokenizers.Tokenizer:
    """`model` with the normalizer, pre-tokenizer and decoder that its type usually has: RoBERTa's, BERT's or XLM-R's."""
    backend = tokenizers.Tokenizer(model)
    if isinstance(model, models.BPE):
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif isinstance(model, models.WordPiece):
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    else:       # Unigram
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return backend


def _frame(backend: tokenizers.Tokenizer, bos: int, eos: int, separators: int, second_type: int) -> processors.TemplateProcessing:
    """The post-processor that puts two special tokens around a text or a pair. `second_type`: the token type of a pair's second text."""
    first, last = backend.id_to_token(bos), backend.id_to_token(eos)
    pair = [first, "$A", last, *[last] * (separators - 1), f"$B:{second_type}", f"{last}:{second_type}"]
    return processors.TemplateProcessing(single=[first, "$A", last], pair=pair, special_tokens=[(first, bos), (last, eos)])


# --- other libraries' files -------------------------------------------------------------------------------------------

# transformers' classes that read only the model in a tokenizer.json and build the rest -> (type of the model, special tokens)
CLASSES = {"RobertaTokenizer": (models.BPE, OF_ROBERTA), "BertTokenizer": (models.WordPiece, OF_BERT),
           "XLMRobertaTokenizer": (models.Unigram, OF_ROBERTA), "CamembertTokenizer": (models.Unigram, OF_ROBERTA)}
AS_THE_FILE = ("PreTrainedTokenizer", "TokenizersBackend")      # classes that read all of a tokenizer.json


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json`, or from a folder with one, with RoBERTa's `vocab.json` and `merges.txt`, or with BERT's
    `vocab.txt`. As in transformers, the files next to these set case, accents, the first space and added tokens. InputError if no file can
    be read, or if transformers 5 would read it differently: with other ids of tokens, or with other special tokens around a text."""
    file = path / "tokenizer.json" if path.is_dir() else path
    for read in (file, path / "vocab.json", path / "merges.txt", path / "vocab.txt"):
        if read.is_file() and read.stat().st_size > JSON_BYTES:
            raise InputError(f"{read}: is longer than {JSON_BYTES >> 20} MB, too long for a tokenizer")
    try:
        facts, model = (read_json(path / name, {}) for name in ("tokenizer_config.json", "config.json"))
        if facts.get("split_special_tokens"):
            raise InputError(f"{path / 'tokenizer_config.json'}: split_special_tokens is not supported")
        name = str(facts.get("tokenizer_class") or model.get("tokenizer_class") or model.get("model_type") or "").removesuffix("Fast")
        if name == "DistilBertTokenizer":       # BERT's tokenizer without token types
            facts = {"model_input_names": ["input_ids", "attention_mask"], **facts}
        name = CLASS_OF.get(name, name)
        if not file.is_file():
            file, backend, name = _from_vocabulary(path, name, facts)
        elif name in ("", *CLASSES, *AS_THE_FILE):
            backend = tokenizers.Tokenizer.from_file(str(file))
        else:
            raise InputError(f"{file}: tokenizer_class {name} is not supported, only {', '.join(CLASSES)}, and {AS_THE_FILE[0]}Fast, with "
                             "which the file is read as it is")
        backend = _as_configured(backend, name, facts)
        if name in CLASSES:
            _check_class(backend, name, facts, file)
        with shaped(path, "its files of added tokens do not hold what they should"):
            backend, roles = _with_added(backend, name, facts, path)
        tokenizer = Tokenizer(backend, str(file))     # limits the ids: to_str() takes memory for the largest
        types = _checked_types(tokenizer, name, roles)
        if types and name and "token_type_ids" not in facts.get("model_input_names", ["token_type_ids"] * (name == "BertTokenizer")):
            if name in AS_THE_FILE and "model_input_names" not in facts:
                note(f"{path}: the second text of a pair has no token type of its own, as in transformers 5: tokenizer_config.json has no "
                     "model_input_names; transformers 4 gives it one")
            backend.post_processor = _frame(backend, tokenizer.bos_id, tokenizer.eos_id, tokenizer.separators, second_type=0)
            tokenizer = Tokenizer(backend, str(file))
        return tokenizer
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # on a file that it cannot read, tokenizers raises a bare Exception or panics; a panic is no Exception
        raise InputError(f"{file if file.is_file() else path}: not a tokenizer file ({error})") from None


def _from_vocabulary(folder: Path, name: str, facts: dict) -> tuple[Path, tokenizers.Tokenizer, str]:
    """(vocabulary file, tokenizer, name of its class) of a folder without a tokenizer.json."""
    vocab, merges, words = folder / "vocab.json", folder / "merges.txt", folder / "vocab.txt"
    if vocab.is_file() and merges.is_file() and name in ("", "RobertaTokenizer"):
        return vocab, pipeline(models.BPE.from_file(str(vocab), str(merges))), "RobertaTokenizer"
    if words.is_file() and name in ("", "BertTokenizer") and "word_tokenizer_type" not in facts:     # Japanese: needs other libraries
        unknown = _added(facts.get("unk_token") or "[UNK]").content
        return words, pipeline(models.WordPiece.from_file(str(words), unk_token=unknown)), "BertTokenizer"
    raise NoTokenizer(f"{folder}: no tokenizer there; expected tokenizer.json, or vocab.json with merges.txt, or BERT's vocab.txt "
                      "(transformers' AutoTokenizer.from_pretrained and save_pretrained make a tokenizer.json of others)")


def _as_configured(backend: tokenizers.Tokenizer, name: str, facts: dict) -> tokenizers.Tokenizer:
    """`backend` with the settings of a tokenizer_config.json, or the class's defaults for missing ones, if the class obeys settings."""
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    if isinstance(normalizer, normalizers.BertNormalizer) and name not in AS_THE_FILE:
        for theirs, ours, default in (("do_lower_case", "lowercase", True), ("strip_accents", "strip_accents", None),
                                      ("tokenize_chinese_chars", "handle_chinese_chars", True)):
            if theirs in facts or name == "BertTokenizer":
                setattr(normalizer, ours, facts.get(theirs, default))
        backend.normalizer = normalizer
    has_setting = "add_prefix_space" in facts and name not in AS_THE_FILE or name == "RobertaTokenizer"
    if isinstance(splitter, pre_tokenizers.ByteLevel) and has_setting:
        splitter.add_prefix_space = facts.get("add_prefix_space", False)
        backend.pre_tokenizer = splitter
    return backend


def _check_class(backend: tokenizers.Tokenizer, name: str, facts: dict, file: Path) -> None:
    """InputError if the tokenizer that transformers' class builds around the file's model splits text into other words than the file's."""
    of_class, model, unknown = CLASSES[name][0], backend.model, facts.get("unk_token") or "[UNK]"
    is_unigram = of_class is models.Unigram
    same = isinstance(model, of_class) and (not is_unigram or facts.get("add_prefix_space", True))
    if same and of_class is models.WordPiece:
        same = (model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word) == (_added(unknown).content, "##", 100)
    elif same and of_class is models.BPE:
        same = not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
    if same:
        theirs, parts = _as_configured(pipeline(model), name, facts), backend.normalizer
        for part in parts if isinstance(parts, normalizers.Sequence) else [parts]:
            if is_unigram and isinstance(part, normalizers.Precompiled):       # the character map
                theirs.normalizer = part
        same = _words(theirs) == _words(backend)
    if not same:
        raise InputError(f"{file}: transformers' {name} makes another model, normalizer or pre_tokenizer than this file's; with "
                         "\"tokenizer_class\": \"PreTrainedTokenizerFast\" in tokenizer_config.json it is read as it is")


def _words(backend: tokenizers.Tokenizer) -> list[str]:
    """PROBE, normalized and split into words."""
    text = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]


def _with_added(backend: tokenizers.Tokenizer, name: str, facts: dict, folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """(tokenizer with the added tokens of all files, its special tokens by role). InputError if the files give one token two ids."""
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    own = [(token["id"], _added(token)) for token in read_json(file, {}).get("added_tokens", [])]
    known, legacy = facts.get("added_tokens_decoder"), read_json(folder / "special_tokens_map.json", {})
    legacy = legacy if known is None else {}
    extra = facts.get("extra_special_tokens") or []
    named = {**facts, **legacy, **(extra if isinstance(extra, dict) else {})}
    named = {role: token for role, token in named.items()
             if role in ROLES or isinstance(token, (str, dict)) and (role.endswith("_token") or role in extra)}
    extra = [*(isinstance(extra, list) and extra or facts.get("additional_special_tokens") or []),
             *(legacy.get("extra_special_tokens") or [])]
    special = {_added(token).content for token in (*named.values(), *extra) if token}
    plain = [(i, AddedToken(token, special=token in special, normalized=token not in special))
             for token, i in read_json(folder / "added_tokens.json", {}).items()]
    listed = dict([*plain, *own] if known is None else [(int(i), _added(token)) for i, token in known.items()])
    tokens = [token for _, token in own if name not in CLASSES] + [listed[i] for i in sorted(listed)]
    roles = {**dict.fromkeys(ROLES), **(CLASSES[name][1] if name in CLASSES else {}), **named}
    new = {(_added(token).content, type(token)): _added(token, special=True)       # of a role's name and another's dict, the later counts
           for token in (*roles.values(), *(extra or legacy.get("additional_special_tokens") or [])) if token}
    there = {token.content for token in tokens}
    full = tokenizers.Tokenizer(backend.model)      # without added tokens
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        if getattr(backend, part) is not None:
            setattr(full, part, getattr(backend, part))
    full.add_tokens(tokens + [token for (content, _), token in new.items() if content not in there])
    for i, token in (*own, *plain, *listed.items()):
        if full.token_to_id(token.content) != i:
            raise InputError(f"{folder}: its tokenizer's files disagree: the added token {token.content!r} is {i} in one of them, and all "
                             f"make it {full.token_to_id(token.content)} in transformers 5; save the tokenizer of the training again")
    return full, {role: _added(token).content for role, token in roles.items() if token}


def _added(token: str | dict, **flags: bool) -> AddedToken:
    """An added token from its form in the files: its name, or a dict with its name and flags."""
    facts = {k: v for k, v in token.items() if k not in ("__type", "id")} if isinstance(token, dict) else {"content": token}
    return AddedToken(**{**flags, **facts})


def _checked_types(tokenizer: Tokenizer, name: str, roles: dict[str, str]) -> bool:
    """Whether the second text of a pair has its own token type. InputError unless the file and transformers' class put the special tokens
    of rt/data.py around texts, and have the mask token that `tokenizer` found."""
    framed, (a, b) = tokenizer.framed(), tokenizer.encode(["a", "b"])     # `framed` fails if a base could not read the tokenizer again
    bos, eos, id_of, bert = tokenizer.bos_id, tokenizer.eos_id, tokenizer.backend.token_to_id, name == "BertTokenizer"
    if name in AS_THE_FILE and tokenizer.backend.num_special_tokens_to_add(True) == 0:
        framed = tokenizer.backend
    frames = [framed.encode("a"), framed.encode("a", "b")]
    has_types = frames[1].type_ids[-1] > 0
    if name in CLASSES:
        ends = ("bos_token", "eos_token") if CLASSES[name][0] is models.Unigram else ("cls_token", "sep_token")
        framed.post_processor = _frame(tokenizer.backend, *(id_of(roles.get(end)) for end in ends), 2 - bert, int(bert))
        frames.append(framed.encode("a", "b"))
    expected = [bos, *a, eos, *[eos] * (tokenizer.separators - 1), *b, eos]
    types = [0] * (len(a) + 2) + [1] * (len(expected) - len(a) - 2)
    for frame in frames:
        typed = not has_types or frame.type_ids == types[:len(frame)]
        if frame.ids not in ([bos, *a, eos], expected) or bert and not has_types or not typed:
            raise InputError(f"{tokenizer.source}: transformers turns the texts a and b into {' '.join(frame.tokens)}, with token types "
                             f"{frame.type_ids}; supported are <s> a </s> </s> b </s>, or [CLS] a [SEP] b [SEP] of two types")
    if roles.get("mask_token") and id_of(roles["mask_token"]) != tokenizer.mask_id:
        raise InputError(f"{tokenizer.source}: its mask_token is {roles['mask_token']!r}; supported are <mask> and [MASK]")
    return has_types
