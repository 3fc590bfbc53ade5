"""Checkpoints of other libraries, in and out: the same logits here and in the installed transformers and PEFT, for four families."""
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import here, write_task
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from rt.data import Example, Rows, encode, sequences_batch
from rt.deltas import apply, attach, extract
from rt.errors import InputError, StaleDelta
from rt.formats.adapters import export_peft
from rt.formats.atomic import locked
from rt.formats.checkpoint import load_base, save_base
from rt.formats.corpora import build_corpus, read_documents
from rt.formats.delta_files import load_delta, open_delta, save_delta
from rt.formats.hf import export_hf, load_hf
from rt.formats.hub import open_base
from rt.formats.tokenizer import Tokenizer
from rt.kinds import DeltaConfig
from rt.model import EncoderConfig, MaskedLM, new_masked_lm
from rt.pretrain import mlm_loss
from rt.runs.results import best_delta
from rt.runs.resume import sample_of
from rt.tune import predict

transformers = pytest.importorskip("transformers")
FAMILIES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "bert": "Bert"}
TEXTS = [("Returns the complete graph.", None), ("A directed graph is an ordered pair of sets", "nodes and edges, without loops"),
         ("x", "y"), ("The shortest path between two nodes of a weighted graph, by Dijkstra's algorithm and a heap.", None)]
LABELS = ("entailment", "neutral", "contradiction")


def wordpiece(texts) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return Tokenizer(backend)


def sentencepiece(texts) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def tokenizer_of(graphs, tokenizer):
    texts = list(read_documents(graphs / "corpus" / "heldout.jsonl"))
    unigram = sentencepiece(texts)
    return {"roberta": tokenizer, "xlm-roberta": unigram, "camembert": unigram, "bert": wordpiece(texts)}


def theirs(family: str, task: str, tokenizer: Tokenizer, seed: int = 0, std: float = 0.2, **more):
    """A random transformers model in evaluation mode in which every weight matters."""
    settings = dict(vocab_size=tokenizer.vocab_size, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80,
                    max_position_embeddings=64 if family == "bert" else 66, type_vocab_size=2 if family == "bert" else 1,
                    pad_token_id=tokenizer.pad_id, layer_norm_eps=1e-12 if family == "bert" else 1e-5, **more)
    torch.manual_seed(seed)
    config = getattr(transformers, FAMILIES[family] + "Config")(**settings)
    model = getattr(transformers, f"{FAMILIES[family]}For{task}")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std)
    return model


def saved(model, tokenizer: Tokenizer, folder, **options):
    model.save_pretrained(folder, **options)
    tokenizer.save(folder)
    return folder


def inputs(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """TEXTS for transformers: padded, with token types from the tokenizer's own template."""
    backend = tokenizer.framed()
    encoded = [backend.encode(a) if b is None else backend.encode(a, b) for a, b in TEXTS]
    longest = max(len(e.ids) for e in encoded)
    rows = {"input_ids": [e.ids + [tokenizer.pad_id] * (longest - len(e.ids)) for e in encoded],
            "attention_mask": [[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in encoded],
            "token_type_ids": [e.type_ids + [0] * (longest - len(e.ids)) for e in encoded]}
    if tokenizer.separators == 2:
        del rows["token_type_ids"]      # as RoBERTa's tokenizers do: all 0
    return {k: torch.tensor(v) for k, v in rows.items()}


def our_sequences(tokenizer: Tokenizer) -> list[list[int]]:
    return encode([Example(a, b, None, "") for a, b in TEXTS], (), tokenizer, 64).sequences


def logits_of(model, tokenizer: Tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(tokenizer)).logits


def our_logits(base, delta) -> torch.Tensor:
    return predict(apply(base, delta), our_sequences(base.tokenizer), torch.device("cpu"), torch.float32)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert b.std() > 0.05
    assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def trained(base, config: DeltaConfig, labels=LABELS, seed: int = 1):
    """A delta with random content."""
    model = attach(base, config, len(labels) or 1, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return extract(model, base, config, {"task": "t", "labels": list(labels)})


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lm_in_and_out(family, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of[family]
    model = theirs(family, "MaskedLM", tokenizer)
    base = open_base(str(saved(model, tokenizer, tmp_path / "in")))
    mask = inputs(tokenizer)["attention_mask"].bool()
    sequences = our_sequences(tokenizer)
    assert sequences == [row[m].tolist() for row, m in zip(inputs(tokenizer)["input_ids"], mask)]
    expected = logits_of(model, tokenizer)[mask]
    with torch.no_grad():
        close(MaskedLM(base.encoder, base.head).eval()(sequences_batch(sequences)), expected)
    # our format on disk, opened again, exported, and loaded by transformers
    save_base(tmp_path / "ours", MaskedLM(base.encoder, base.head), tokenizer, {})
    assert export_hf(tmp_path / "out", load_base(tmp_path / "ours")) == "AutoModelForMaskedLM"
    again, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(again) is type(model)
    close(logits_of(again.eval(), tokenizer)[mask], expected)
    assert load_hf(tmp_path / "out").fingerprint == base.fingerprint or family == "bert"    # BERT's folded types: equal up to rounding
    theirs_of = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for (a, b), ids in zip(TEXTS, sequences):
        encoded = theirs_of(a, b) if b else theirs_of(a)
        assert encoded["input_ids"] == ids and ("token_type_ids" in encoded) == (family == "bert")
    assert theirs_of.mask_token_id == tokenizer.mask_id and theirs_of.model_max_length == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_classifier_becomes_a_full_delta_and_goes_back(family, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of[family]
    base = open_base(str(saved(theirs(family, "MaskedLM", tokenizer), tokenizer, tmp_path / "base")))
    model = theirs(family, "SequenceClassification", tokenizer, seed=1, id2label=dict(enumerate(LABELS)),
                   label2id={name: i for i, name in enumerate(LABELS)})
    delta = open_delta(str(saved(model, tokenizer, tmp_path / "tuned")), base, task="nli")
    assert delta.config.kind == "full" and delta.labels == LABELS and delta.info["task"] == "nli"
    expected = logits_of(model, tokenizer)
    save_delta(tmp_path / "delta", delta)
    delta = load_delta(tmp_path / "delta")
    close(our_logits(base, delta), expected)
    assert export_hf(tmp_path / "out", base, delta) == "AutoModelForSequenceClassification"
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(again) is type(model)
    close(logits_of(again.eval(), tokenizer), expected)
    assert again.config.id2label == dict(enumerate(LABELS)) and again.config.label2id["neutral"] == 1


def test_the_order_of_labels_is_the_tasks_or_the_models_as_asked(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["roberta"]
    base = open_base(str(saved(theirs("roberta", "MaskedLM", tokenizer), tokenizer, tmp_path / "base")))
    delta = trained(base, DeltaConfig("lora"))
    turned = delta.ordered(("neutral", "contradiction", "entailment"))
    assert torch.equal(our_logits(base, turned), our_logits(base, delta)[:, [1, 2, 0]]) and turned.labels[0] == "neutral"
    assert delta.ordered(LABELS) is delta and delta.ordered(("yes", "no")) is delta


@pytest.mark.parametrize("kind", ["lora", "bitfit", "full"])
def test_deltas_learned_here_are_merged_for_transformers(kind, base, tmp_path):
    delta = trained(base, DeltaConfig(kind, target_modules=("query", "value", "attention.output.dense")))
    export_hf(tmp_path / "out", base, delta)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    close(logits_of(again, base.tokenizer), our_logits(base, delta))


def test_a_regression_goes_both_ways(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["bert"]
    base = open_base(str(saved(theirs("bert", "MaskedLM", tokenizer), tokenizer, tmp_path / "base")))
    model = theirs("bert", "SequenceClassification", tokenizer, num_labels=1)
    delta = open_delta(str(saved(model, tokenizer, tmp_path / "tuned")), base)
    assert delta.labels == ()
    with pytest.raises(InputError, match="a regression has one output and no labels, not 1 and 1"):
        open_delta(str(tmp_path / "tuned"), base, ("a",))
    export_hf(tmp_path / "out", base, delta)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    close(logits_of(again, tokenizer), logits_of(model, tokenizer))
    assert again.config.num_labels == 1 and again.config.problem_type == "regression"


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("kind", ["shards", "bin", "bin shards"])
def test_shards_and_weights_only_files_give_the_same_base(family, kind, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of[family]
    model = theirs(family, "MaskedLM", tokenizer)
    whole = load_hf(saved(model, tokenizer, tmp_path / "whole"))
    folder = saved(model, tokenizer, tmp_path / "parts", max_shard_size="60KB") if kind == "shards" else tmp_path / "parts"
    if kind != "shards":
        folder.mkdir()
        (folder / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
        tokenizer.save(folder)
        # BERT's old names, as in google-bert/bert-base-uncased
        state = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") if family == "bert" else k: v
                 for k, v in model.state_dict().items()}
        halves = [dict(list(state.items())[i::2]) for i in range(2)] if kind == "bin shards" else [state]
        for i, half in enumerate(halves):
            torch.save(half, folder / (f"pytorch_model-{i}.bin" if kind == "bin shards" else "pytorch_model.bin"))
        if kind == "bin shards":
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
                {"weight_map": {k: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for k in half}}))
    assert not (folder / "model.safetensors").exists()
    assert load_hf(folder).fingerprint == whole.fingerprint and load_hf(folder).head is not None


def test_a_fresh_head_on_bert_begins_with_the_pooler(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["bert"]
    model = theirs("bert", "PreTraining", tokenizer)
    base = open_base(str(saved(model, tokenizer, tmp_path / "base")))
    head = attach(base, DeltaConfig("full"), 3, seed=0).head
    assert torch.equal(head.dense.weight, model.bert.pooler.dense.weight) and torch.equal(head.dense.bias, model.bert.pooler.dense.bias)


PEFT_SETTINGS = {"default": dict(target_modules=["query", "value"]), "all": dict(target_modules=["query", "key", "value", "dense"]),
                 "rslora": dict(target_modules=["key", "intermediate.dense"], use_rslora=True), "regex": dict(target_modules=r".*\.query")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("settings", PEFT_SETTINGS)
def test_peft_lora_in_and_out(family, settings, tokenizer_of, tmp_path):
    peft = pytest.importorskip("peft")
    tokenizer = tokenizer_of[family]
    folder = saved(theirs(family, "PreTraining" if family == "bert" else "MaskedLM", tokenizer), tokenizer, tmp_path / "base")

    def on_base():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)

    torch.manual_seed(2)
    model = peft.get_peft_model(on_base(), peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, lora_dropout=0.1,
                                                           **PEFT_SETTINGS[settings])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model, tokenizer)
    base = open_base(str(folder))
    delta = open_delta(str(tmp_path / "adapter"), base, LABELS)
    assert delta.config.kind == "lora" and delta.config.r == 4
    close(our_logits(base, delta), expected)
    assert export_peft(tmp_path / "out", base, str(folder), delta) == str(folder)
    again = peft.PeftModel.from_pretrained(on_base(), tmp_path / "out").eval()
    close(logits_of(again, tokenizer), expected)
    assert open_delta(str(tmp_path / "out"), base).labels == LABELS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [("query", "value"), ("output.dense",), ("value", "output.dense", "attention.output.dense")])
def test_a_lora_learned_here_goes_to_peft_with_its_base(base, targets, tmp_path):
    peft = pytest.importorskip("peft")
    save_base(tmp_path / "ours", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    delta = trained(base, DeltaConfig("lora", r=3, lora_alpha=5.0, target_modules=targets))
    assert export_peft(tmp_path / "out", base, str(tmp_path / "ours"), delta) == tmp_path / "out" / "base"
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    close(logits_of(model, base.tokenizer), our_logits(base, delta))
    assert model.config.id2label == dict(enumerate(LABELS))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "base")(*TEXTS[2])["input_ids"] == our_sequences(base.tokenizer)[2]
    assert open_delta(str(tmp_path / "out"), open_base(str(tmp_path / "out" / "base"))).info["base"] == base.fingerprint
    other = replace(base, fingerprint="that of an upgrade")
    with pytest.raises(InputError, match=f"exported for the base with fingerprint {base.fingerprint}, and this base has that of an up"):
        open_delta(str(tmp_path / "out"), other)


def test_what_is_not_supported_is_named(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["roberta"]
    model = theirs("roberta", "MaskedLM", tokenizer)
    folder = saved(model, tokenizer, tmp_path / "base")
    facts = json.loads((folder / "config.json").read_text())
    for change, words in (({"model_type": "electra"}, "'electra' is not supported, only roberta, xlm-roberta, camembert, bert"),
                          ({"hidden_act": "relu"}, "hidden_act 'relu'"), ({"position_embedding_type": "relative_key"}, "relative_key"),
                          ({"is_decoder": True}, "is_decoder True"), ({"vocab_size": None}, "vocab_size"),
                          ({"max_position_embeddings": 2}, "leaves no positions out of"),
                          ({"num_hidden_layers": 1}, "encoder.layer.1")):
        (folder / "config.json").write_text(json.dumps(facts | change))
        with pytest.raises(InputError, match=words):
            load_hf(folder)
    (folder / "config.json").write_text(json.dumps(facts))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.decoder.weight": torch.zeros(tokenizer.vocab_size, 48)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="scoring weights of its own"):
        load_hf(folder)
    save_file(weights | {"roberta.encoder.layer.0.attention.self.scale": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="has a tensor that is not supported, encoder.layer.0.attention.self.scale"):
        load_hf(folder)
    save_file(weights | {"roberta.embeddings.token_type_embeddings.weight": torch.ones(1, 1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="token types are \\(1, 1\\)"):       # their sum with the positions would have a fitting shape
        load_hf(folder)
    del weights["roberta.encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="no tensor encoder.layer.1.output.dense.bias"):
        load_hf(folder)
    larger = Tokenizer(tokenizer.framed())
    larger.backend.add_tokens(["NewWord"])
    folder = saved(model, larger, tmp_path / "larger")
    with pytest.raises(InputError, match=f"the tokenizer has {tokenizer.vocab_size + 1} tokens, the model only {tokenizer.vocab_size}$"):
        load_hf(folder)


def test_a_berts_pooler_of_another_shape_is_named(tokenizer_of, tmp_path):
    folder = saved(theirs("bert", "PreTraining", tokenizer_of["bert"]), tokenizer_of["bert"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"bert.pooler.dense.weight": torch.zeros(3, 48)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="do not fit the model: the pooler"):
        load_hf(folder)


def test_a_bert_with_one_token_type_has_no_second(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["bert"]
    folder, name = saved(theirs("bert", "MaskedLM", tokenizer), tokenizer, tmp_path), "bert.embeddings.token_type_embeddings.weight"
    weights = load_file(folder / "model.safetensors")
    assert load_hf(folder).encoder.state_dict()["embeddings.second_type"].any()
    save_file(weights | {name: weights[name][:1].clone()}, folder / "model.safetensors")
    assert not load_hf(folder).encoder.state_dict()["embeddings.second_type"].any()


def test_a_tuned_model_that_does_not_fit_its_base_is_named(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["roberta"]
    base = open_base(str(saved(theirs("roberta", "MaskedLM", tokenizer), tokenizer, tmp_path / "base")))
    folder = saved(theirs("roberta", "SequenceClassification", tokenizer, num_labels=2), tokenizer, tmp_path / "tuned")
    assert open_delta(str(folder), base).labels == ("0", "1") and open_delta(str(folder), base, ("no", "yes")).labels == ("no", "yes")
    for labels in (("no",), ("no", "no"), ("a", "b", "c")):
        with pytest.raises(InputError, match="for a head of 2 outputs"):
            open_delta(str(folder), base, labels)
    with pytest.raises(InputError, match="no head for sequence classification"):
        open_delta(str(tmp_path / "base"), base)
    tokenizer_of["xlm-roberta"].save(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match="another vocabulary than the base's"):
        open_delta(str(folder), base)
    (folder / "tokenizer.json").unlink()
    assert open_delta(str(folder), base).labels == ("0", "1")
    facts = json.loads((folder / "config.json").read_text())
    for change, words in (({"problem_type": "multi_label_classification"}, "multi_label_classification"),
                          ({"id2label": ["a", "b"]}, "id2label is not an object"),
                          ({"problem_type": "regression"}, "a regression has one output and no labels, not 2 and 0"),
                          ({"id2label": {"0": "a", "1": "b\nc"}}, "is blank or holds"),
                          ({"num_attention_heads": 4}, "num_heads 4, the base has 3")):
        (folder / "config.json").write_text(json.dumps(facts | change))
        with pytest.raises(InputError, match=words):
            open_delta(str(folder), base)
    with pytest.raises(InputError, match="nothing tuned there.*, or a hub id OWNER/NAME"):
        open_delta(str(tmp_path), base)


def lora_folder(folder, base, change: dict | None = None, drop: str = "", add: dict | None = None):
    """An exported adapter, damaged."""
    export_peft(folder, base, "a/base", trained(base, DeltaConfig("lora", r=2)))
    facts = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(facts | (change or {})))
    weights = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if not drop or drop not in k}
    save_file(weights | (add or {}), folder / "adapter_model.safetensors")
    return str(folder)


def test_an_adapter_without_a_task_type_is_a_classifiers_where_it_holds_one(base, tmp_path):
    assert open_delta(lora_folder(tmp_path / "a", base, {"task_type": None}), base).labels == LABELS


@pytest.mark.parametrize("change, drop, add, words", [
    ({"use_dora": True}, "", None, "use_dora True is not supported"), ({"r": 3}, "", None, "has rank 2"),
    ({"bias": "all"}, "", None, "bias 'all' is not supported, only 'none'"),
    ({"peft_type": "IA3"}, "", None, "'IA3' is not supported, only 'LORA'"), ({"task_type": "TOKEN_CLS"}, "", None, "TOKEN_CLS"),
    ({"rank_pattern": {"query": 4}}, "", None, "rank_pattern"), ({"init_lora_weights": "pissa"}, "", None, "pissa"),
    ({"a_new_setting": 3}, "", None, "a_new_setting 3"), ({"r": 0}, "", None, "its r or lora_alpha is not a number"),
    ({}, "layer.1.attention.self.query.", None, "only some of the 2 layers"),
    ({}, "layer.0.attention.self.query.lora_A", None, "only one of lora_A"),
    ({}, "", {f"base_model.model.classifier.dense.lora_{x}.weight": torch.zeros(2) for x in "AB"}, "classifier.dense are not matrices"),
    ({}, "classifier", None, "holds no classifier.dense"), ({}, "lora_", None, "no factors at all"),
    ({}, "", {"base_model.model.roberta.embeddings.word_embeddings.weight": torch.zeros(2, 2)}, "word_embeddings.weight is not supported"),
    ({}, "", {f"base_model.model.roberta.encoder.layer.9.output.dense.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}, "layer.9")])
def test_an_adapter_that_cannot_be_used_is_named(change, drop, add, words, base, tmp_path):
    with pytest.raises(InputError, match=words):
        open_delta(lora_folder(tmp_path / "a", base, change, drop, add), base)


def test_two_exports_do_not_write_one_folder(base, tmp_path):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    with locked(tmp_path / "out"):
        for way in (("export",), ("import", "--tuned", tmp_path / "M0")):
            said = here("-m", "rt.runs.convert", *way, "--base", tmp_path / "M0", "--out", tmp_path / "out", code=2)
            assert "is being written to by process" in said and not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_named(base, other_base, tmp_path):
    with pytest.raises(InputError, match="adapter cannot be merged"):
        export_hf(tmp_path / "out", base, trained(base, DeltaConfig("adapter")))
    with pytest.raises(InputError, match="for a delta of kind lora, this is full; --to hf merges it"):
        export_peft(tmp_path / "out", base, "x", trained(base, DeltaConfig("full")))
    for export in (lambda d: export_hf(tmp_path / "out", other_base, d), lambda d: export_peft(tmp_path / "out", other_base, "x", d)):
        with pytest.raises(StaleDelta):
            export(trained(base, DeltaConfig("lora")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all I have")
    with pytest.raises(InputError, match="holds other things"):
        export_hf(tmp_path / "full", base)
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "thesis.tex").read_text() == "all I have"


@pytest.mark.parametrize("place", ["../model-1.safetensors", "/etc/passwd", "shard.pkl", 7])
def test_an_index_that_leads_out_of_the_folder_is_refused(place, tokenizer_of, tmp_path):
    folder = saved(theirs("roberta", "MaskedLM", tokenizer_of["roberta"]), tokenizer_of["roberta"], tmp_path / "base")
    (folder / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"roberta.embeddings.LayerNorm.bias": place}}))
    with pytest.raises(InputError, match="shard beside it|weight_map"):
        load_hf(folder)


def test_shards_that_are_missing_or_incomplete_are_named(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["roberta"]
    folder = saved(theirs("roberta", "MaskedLM", tokenizer), tokenizer, tmp_path / "base", max_shard_size="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    weights = load_file(shard)
    save_file(dict(list(weights.items())[1:]), shard)
    with pytest.raises(InputError, match="the shards do not hold"):
        load_hf(folder)
    shard.unlink()
    with pytest.raises(InputError, match="the shard is missing"):
        load_hf(folder)


def test_an_adapters_pickle_runs_nothing(base, tmp_path):
    folder = tmp_path / "a"
    lora_folder(folder, base)
    (folder / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'exploded')!r}, 'w')",)

    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"w": Bomb()}))
    with pytest.raises(InputError, match="not a weights-only PyTorch file"):
        open_delta(str(folder), base)
    assert not (tmp_path / "exploded").exists()


def test_a_fine_tune_is_recycled_on_a_continued_model_and_leaves_as_one(tokenizer_of, graphs, tmp_path):
    """The command lines: RoBERTa, a fine-tune of it, a continued RoBERTa, and back. From BERT, only the import."""
    tokenizer = tokenizer_of["roberta"]
    old = theirs("roberta", "MaskedLM", tokenizer, std=0.02)
    saved(old, tokenizer, tmp_path / "old")
    with torch.no_grad():
        for p in old.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    saved(old, tokenizer, tmp_path / "new")
    names = {"id2label": {0: "walks", 1: "classes"}, "label2id": {"walks": 0, "classes": 1}}    # not in alphabetical order
    saved(theirs("roberta", "SequenceClassification", tokenizer, std=0.1, **names), tokenizer, tmp_path / "tuned")
    rows = [{"text": f"text number {i}", "label": ("walks", "classes")[i % 2]} for i in range(12)]
    task = write_task(tmp_path / "task", {"train": rows, "dev": rows[:4], "test": rows})
    flags = ("--seq_len", 16, "--device", "cpu", "--precision", "fp32")
    out = here("recycle.py", "--mode", "apply,init", "--old_base", tmp_path / "old", "--old_delta", tmp_path / "tuned", "--base",
                  tmp_path / "new", "--task", task, "--delta", "same", "--steps", 2, "--eval_every", 1, "--shots", 4, "--seeds", 0,
                  "--lr", "1e-4", "--out", tmp_path / "recycled", *flags)
    assert "init" in out and "apply" in out
    exported = here("-m", "rt.runs.convert", "export", "--base", tmp_path / "new", "--delta_dir", tmp_path / "recycled", "--out",
                       tmp_path / "back")
    assert exported.startswith("AutoModelForSequenceClassification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").eval()
    assert model.config.id2label == {0: "classes", 1: "walks"}
    best = max(json.loads((tmp_path / "recycled" / "summary.json").read_text())["rows"], key=lambda row: row["dev"]["accuracy"])
    base = open_base(str(tmp_path / "new"))
    close(logits_of(model, tokenizer), our_logits(base, load_delta(tmp_path / "recycled" / "deltas" / best["run"])))
    # the same fine-tune as a delta on disk, used directly or imported, gives the same answers
    scores = ("train.py", "--mode", "eval", "--base", tmp_path / "old", "--task", task, *flags, "--delta_dir")
    said = here(*scores, tmp_path / "tuned")
    assert "2 labels (walks, classes)" in here("-m", "rt.runs.convert", "import", "--base", tmp_path / "old", "--tuned", tmp_path / "tuned",
                                               "--task", "my_task", "--out", tmp_path / "delta")
    assert json.loads((tmp_path / "delta" / "delta.json").read_text())["info"]["task"] == "my_task"
    assert said == here(*scores, tmp_path / "delta")


def test_bert_is_continued_and_its_tuned_classifier_recycled(tokenizer_of, graphs, tmp_path):
    """From a checkpoint without a masked-LM head, which gets a fresh head, by all modes."""
    tokenizer = tokenizer_of["bert"]
    saved(theirs("bert", "SequenceClassification", tokenizer, std=0.02, id2label={0: "a", 1: "b"}), tokenizer, tmp_path / "old")
    out = here("train.py", "--init", tmp_path / "old", "--stream", graphs / "corpus", "--steps", 2, "--snapshots", 0, "--seq_len", 32,
                  "--batch_tokens", 256, "--eval_tokens", 512, "--out", tmp_path / "run", "--cache", tmp_path / "cache", "--device", "cpu")
    assert "has no complete masked-LM head; it gets a fresh one" in out and "[CLS]" in out and "[MASK]" in out
    base = load_base(tmp_path / "run" / "M1")
    old = open_base(str(tmp_path / "old"))
    assert base.encoder.config == old.encoder.config and base.meta["parent"] == old.fingerprint
    rows = [{"text": f"text {i}", "text_pair": "another", "label": "ab"[i % 2]} for i in range(12)]
    task = write_task(tmp_path / "task", {"train": rows, "dev": rows[:4], "test": rows})
    out = here("recycle.py", "--mode", "all", "--old_base", tmp_path / "old", "--old_delta", tmp_path / "old", "--base",
                  tmp_path / "run" / "M1", "--task", task, "--delta", "same", "--steps", 2, "--eval_every", 1, "--shots", 4, "--seeds", 0,
                  "--seq_len", 16, "--out", tmp_path / "recycled", "--device", "cpu")
    assert [line.split()[0] for line in out.splitlines() if "±" in line] == ["scratch", "apply", "init", "distill", "init+distill"]


def said_by_both(folder, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a tuned checkpoint, used as its own base, from raw text: ours, and those of AutoTokenizer and AutoModel."""
    base = open_base(str(folder))
    sequences = encode([Example(a, b, None, "") for a, b in texts], (), base.tokenizer, 64).sequences
    ours = predict(apply(base, open_delta(str(folder), base)), sequences, torch.device("cpu"), torch.float32)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    framed = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return ours, torch.cat([model(**framed(a, b, return_tensors="pt")).logits for a, b in texts])


def test_a_separator_that_a_text_spells_begins_no_second_text(tokenizer_of, tmp_path):
    model = theirs("bert", "SequenceClassification", tokenizer_of["bert"], num_labels=3)
    texts = [("a title [SEP] and what follows it", None), ("a graph [SEP] a [SEP]", "the second [SEP] text"), ("no separator", None)]
    close(*said_by_both(saved(model, tokenizer_of["bert"], tmp_path), texts))
    ids = encode([Example(*texts[0], None, "")], (), tokenizer_of["bert"], 64).sequences[0]
    assert tokenizer_of["bert"].decode(ids).split().count("[SEP]") == 2


def test_a_separator_in_a_corpus_or_read_by_a_roberta_separates_nothing_either(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["bert"]
    (tmp_path / "c.txt").write_text("".join(f"a title [SEP] and what follows it {i}\n" for i in range(99)))
    rows = Rows(build_corpus("c", tmp_path / "c.txt", tokenizer, tmp_path)["train"], tokenizer, seq_len=32, mask_rate=0.1, seed=0)
    for objective in ("mlm", "rts"):
        rows.masker.objective = objective
        batch = rows.masked(range(2))
        ends, marked = batch.cu_seqlens[1:].long() - 1, batch.ids < 0
        assert marked.any() and (~batch.ids[marked] == tokenizer.eos_id).all() and not marked[ends].any()
        assert ((batch.ids == tokenizer.eos_id).nonzero()[:, None] == ends).any(-1).all()        # all others end a sequence
        model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, 16, 1, 1, 16, pad_id=tokenizer.pad_id), 0).eval()
        plain = replace(batch, ids=batch.ids.maximum(~batch.ids))
        assert torch.equal(model.encoder(batch), model.encoder(plain)) and mlm_loss(model, batch) == mlm_loss(model, plain)
    assert "masked: '" in sample_of(rows, tokenizer)


def test_what_frames_a_text_is_the_template_not_what_is_in_the_vocabulary_too(tokenizer_of, tmp_path):
    tokenizer = wordpiece(["a graph of nodes and edges"])
    tokenizer.backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(tokenizer.backend)
    close(*said_by_both(saved(theirs("bert", "SequenceClassification", tokenizer, num_labels=3), tokenizer, tmp_path), TEXTS))


def test_a_bert_whose_tokenizer_gives_both_texts_one_type(tokenizer_of, tmp_path):
    tokenizer = Tokenizer(tokenizer_of["roberta"].framed())
    folder = saved(theirs("bert", "SequenceClassification", tokenizer, num_labels=3), tokenizer, tmp_path)
    roles = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}))
    close(*said_by_both(folder, TEXTS))


def test_a_roberta_with_token_types_that_its_tokenizer_uses_is_refused(tokenizer_of, tmp_path):
    folder = saved(theirs("roberta", "MaskedLM", tokenizer_of["bert"]), tokenizer_of["bert"], tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}))
    load_hf(folder)     # with one type, no other can be given
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"type_vocab_size": 2}))
    with pytest.raises(InputError, match="a token type of its own, which is supported for bert only, not for roberta"):
        load_hf(folder)


def prefixed(tokenizer: Tokenizer) -> Tokenizer:
    """RoBERTa's tokenizer with add_prefix_space."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return Tokenizer(backend)


def test_a_tuned_model_or_adapter_whose_tokenizer_makes_other_ids_is_refused(tokenizer_of, base, tmp_path):
    for family, changed in (("roberta", prefixed(tokenizer_of["roberta"])), ("bert", Tokenizer(tokenizer_of["bert"].framed()))):
        if family == "bert":
            changed.backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        plain = open_base(str(saved(theirs(family, "MaskedLM", changed), tokenizer_of[family], tmp_path / f"{family}-base")))
        folder = saved(theirs(family, "SequenceClassification", changed), changed, tmp_path / f"{family}-tuned")
        (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true, "do_lower_case": false}')
        with pytest.raises(InputError, match="gives other ids for a text"):
            open_delta(str(folder), plain)
    folder = lora_folder(tmp_path / "lora", base)
    base.tokenizer.save(folder)
    assert open_delta(folder, base).labels == LABELS
    prefixed(base.tokenizer).save(folder)
    with pytest.raises(InputError, match="gives other ids for a text"):
        open_delta(folder, base)


@pytest.mark.parametrize("family, said", [("roberta", {"add_prefix_space": True}), ("bert", {"do_lower_case": False}),
                                          ("bert", {"strip_accents": False, "tokenize_chinese_chars": False})])
@pytest.mark.parametrize("layout", ["tokenizer.json", "vocabulary"])
def test_what_tokenizer_config_says_holds_and_a_vocabulary_alone_will_do(family, said, layout, tokenizer_of, tmp_path):
    tokenizer, words = tokenizer_of[family], tokenizer_of[family].vocab_size
    larger = tokenizer.framed()
    larger.add_tokens(["<br>", "NewWord"])
    model = theirs(family, "SequenceClassification", Tokenizer(larger), num_labels=3)
    folder = saved(model, Tokenizer(tokenizer.framed()), tmp_path)
    more = {} if layout == "tokenizer.json" else {"<br>": words, "NewWord": words + 1}
    if layout == "vocabulary":
        facts = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "added_tokens.json").write_text(json.dumps(more))
        if family == "bert":
            (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in facts["vocab"]))
        else:
            (folder / "vocab.json").write_text(json.dumps(facts["vocab"]))
            (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in facts["merges"]))
    class_of = {"roberta": "RobertaTokenizer", "bert": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_of[family], **said}))
    texts = [(f"A {' '.join(more)} Graph", "Nodes"), ("the Café of É. Galois 中文", None), ("graph", None)]
    close(*said_by_both(folder, texts))
    backend = load_hf(folder).tokenizer.backend
    assert {token: backend.token_to_id(token) for token in more} == more
    japanese = layout == "vocabulary" and family == "bert"
    (folder / "tokenizer_config.json").write_text('{"word_tokenizer_type": "mecab"}' if japanese else "[")
    with pytest.raises(InputError, match="no tokenizer there" if japanese else "tokenizer_config.json: not valid JSON"):
        load_hf(folder)


def test_settings_that_config_json_leaves_out_or_null_are_transformers_defaults(tokenizer_of, tmp_path):
    for family in FAMILIES:
        folder = saved(theirs(family, "MaskedLM", tokenizer_of[family]), tokenizer_of[family], tmp_path / family)
        facts = json.loads((folder / "config.json").read_text())
        optional = ("layer_norm_eps", "pad_token_id", "hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_act", "is_decoder")
        plain = getattr(transformers, FAMILIES[family] + "Config")()
        for change in ({}, dict.fromkeys(optional)):
            (folder / "config.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in optional} | change))
            config = load_hf(folder).encoder.config
            assert (config.layer_norm_eps, config.pad_id, config.dropout, config.attention_dropout) == (
                plain.layer_norm_eps, plain.pad_token_id, plain.hidden_dropout_prob, plain.attention_probs_dropout_prob)
        (folder / "config.json").write_text(json.dumps(facts | {"layer_norm_eps": "1e-5"}))
        with pytest.raises(InputError, match="layer_norm_eps '1e-5' is not possible for an encoder"):
            load_hf(folder)


@pytest.mark.parametrize("content, words", [({"model": {}, "epoch": 3}, "something other than named tensors"), (b"", "EOFError"),
                                            ([1], "something other than named tensors"),
                                            (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer")])
def test_a_bin_file_that_is_no_checkpoint_is_named(content, words, tokenizer_of, tmp_path):
    folder = saved(theirs("roberta", "MaskedLM", tokenizer_of["roberta"]), tokenizer_of["roberta"], tmp_path)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(InputError, match=words):
        load_hf(folder)
    if words == "Git LFS pointer":
        file.rename(folder / "model.safetensors")
        with pytest.raises(InputError, match=words):
            load_hf(folder)


def test_a_bert_delta_survives_another_token_type(tokenizer_of, tmp_path):
    """The change that a full delta makes to the second token type counts, but only on pairs."""
    base = open_base(str(saved(theirs("bert", "MaskedLM", tokenizer_of["bert"]), tokenizer_of["bert"], tmp_path / "base")))
    delta = trained(base, DeltaConfig("full"))
    without = replace(delta, diffs=delta.diffs | {"embeddings.second_type": torch.zeros(48)})
    paired = torch.tensor([pair is not None for _, pair in TEXTS])
    differs = (our_logits(base, delta) != our_logits(base, without)).any(1)
    assert torch.equal(differs, paired)


def test_of_recycled_runs_the_best_is_taken_and_of_equal_ones_one_that_recycles(base, other_base, tmp_path):
    rows = []
    runs = (("scratch", base, 0.8), ("init", base, 0.8), ("distill", base, 0.9), ("init", other_base, 0.9), ("distill", base, 0.6),
            ("scratch", base, 0.8), ("init", base, 0.8), ("init", base, 0.95), ("transport", base, 0.99), ("transport", base, 0.99))
    for i, (mode, learned_on, accuracy) in enumerate(runs):     # distill: one lucky seed of two; init-7: a rate with one seed, a lucky one
        save_delta(tmp_path / "deltas" / f"{mode}-{i}", trained(learned_on, DeltaConfig("bitfit")))
        rows.append({"run": f"{mode}-{i}", "mode": mode, "seed": i, "lr": 1e-2 if i == 7 else 1e-3, "settings": {}, "test": {},
                     "dev": {"accuracy": accuracy}, "curve": [], "seconds": 1.0, **({"diverged": 9} if mode == "transport" else {})})
    (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
    assert best_delta(tmp_path, base.fingerprint).name == "init-1" and best_delta(tmp_path, other_base.fingerprint).name == "init-3"
    assert best_delta("an/id", base.fingerprint) == Path("an/id")
    (tmp_path / "summary.json").write_text(json.dumps({"stages": []}))      # of train.py, whose deltas are in the same place
    with pytest.raises(InputError, match="is not a folder of recycle.py, of which the best delta is taken; give one of .*deltas"):
        best_delta(tmp_path, base.fingerprint)


def test_what_another_command_made_is_not_replaced_by_a_conversion(base, tmp_path):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    export_hf(tmp_path / "tuned", base, trained(base, DeltaConfig("full")))
    save_delta(tmp_path / "learned", trained(base, DeltaConfig("lora")))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("My model")
    for way in (("import", "--tuned", tmp_path / "tuned", "--out", tmp_path / "learned"), ("export", "--out", tmp_path / "model")):
        said = here("-m", "rt.runs.convert", *way, "--base", tmp_path / "M0", code=2)
        assert "is there already, and was not written by this command" in said
    (tmp_path / "learned" / "delta.json").write_text('{"info": 5}')
    assert 'its "info" is not that of a delta' in here("-m", "rt.runs.convert", "import", "--tuned", tmp_path / "tuned", "--out",
                                                       tmp_path / "learned", "--base", tmp_path / "M0", code=2)


def test_an_imported_delta_says_which_task_and_command_it_comes_from(base, tmp_path):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    export_hf(tmp_path / "tuned", base, trained(base, DeltaConfig("full")))
    here("-m", "rt.runs.convert", "import", "--base", tmp_path / "M0", "--tuned", tmp_path / "tuned", "--out", tmp_path / "d", "--task",
         "data/sick.jsonl")
    info = load_delta(tmp_path / "d").info
    assert info["task"] == "sick" and "--tuned" in info["argv"] and info["config"]["base"] == str(tmp_path / "M0")


def test_labels_that_are_given_come_before_those_beside_an_adapter(base, tmp_path):
    own = open_delta(path := lora_folder(tmp_path / "a", base), base).labels
    assert open_delta(path, base, own[::-1]).labels == own[::-1] != own


def test_biases_that_peft_cannot_load_can_be_merged(base, tmp_path):
    with pytest.raises(InputError, match="for a delta of kind lora, this is bitfit; --to hf merges it"):
        export_peft(tmp_path / "out", base, "x", trained(base, DeltaConfig("bitfit")))
    assert export_hf(tmp_path / "out", base, trained(base, DeltaConfig("bitfit"))) == "AutoModelForSequenceClassification"


def test_an_empty_folder_is_written_to_and_a_task_folder_keeps_the_dots_of_its_name(base, tmp_path):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    export_hf(tmp_path / "tuned", base, trained(base, DeltaConfig("full")))
    (tmp_path / "out").mkdir()
    (tmp_path / "sick.v2").mkdir()
    here("-m", "rt.runs.convert", "import", "--base", tmp_path / "M0", "--tuned", tmp_path / "tuned", "--out", tmp_path / "out", "--task",
         tmp_path / "sick.v2")
    assert load_delta(tmp_path / "out").info["task"] == "sick.v2"


def test_a_task_that_is_written_as_a_dot_has_the_name_that_it_has_elsewhere(base, tmp_path, monkeypatch):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    export_hf(tmp_path / "tuned", base, trained(base, DeltaConfig("full")))
    for name in ("sick", "rev/task"):
        (tmp_path / name).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        here("-m", "rt.runs.convert", "import", "--base", tmp_path / "M0", "--tuned", tmp_path / "tuned", "--out", tmp_path / "out",
             "--task", ".")
        assert load_delta(tmp_path / "out").info["task"] == name.split("/")[0]
    monkeypatch.chdir(tmp_path / "tuned")
    assert open_delta(".", base).info["task"] == "tuned"


def test_a_delta_of_ours_gets_other_names_for_its_labels(base, other_base, tmp_path, capsys):
    """As recycle.py advises if a task has the same labels under other names."""
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    own = replace(old := trained(base, DeltaConfig("lora")), info=old.info | {"config": {"seq_len": 40}, "dev": {"accuracy": 0.5}})
    save_delta(tmp_path / "learned", own)
    command = ("-m", "rt.runs.convert", "import", "--base", tmp_path / "M0", "--tuned", tmp_path / "learned", "--out", tmp_path / "named")
    names = [f"class {i}" for i in range(len(LABELS))]
    for _ in range(2):      # the second time it replaces its own
        here(*command, "--labels", ",".join(names), "--task", "other")
    assert "note" not in capsys.readouterr().err
    here(*command, "--labels", ",".join(LABELS[::-1]))
    assert f"names its outputs {', '.join(LABELS)}, in this order, and not {', '.join(LABELS[::-1])} as given" in capsys.readouterr().err
    here(*command, "--labels", ",".join(names), "--task", "other")
    delta = load_delta(tmp_path / "named")
    assert delta.labels == (*names,) and delta.info["task"] == "other" and delta.info["config"] == {"seq_len": 40}
    assert torch.equal(delta.head["out.bias"], own.head["out.bias"]) and delta.info["dev"] == {"accuracy": 0.5}
    assert "different labels (a, b) for a head of" in here(*command, "--labels", "a,b", code=2)
    save_base(tmp_path / "M1", MaskedLM(other_base.encoder, other_base.head), other_base.tokenizer, {})
    assert "the delta was learned on base" in here(*command, "--base", tmp_path / "M1", code=2)
