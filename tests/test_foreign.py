"""Special cases in other people's folders: each reads as in the installed transformers, or is refused in one sentence."""
import json
import random
import shutil

import pytest
import test_hf
import tokenizers
import torch
from conftest import here
from safetensors.torch import load_file, save_file
from test_hf import FAMILIES, LABELS, close, logits_of, our_logits, our_sequences, said_by_both, saved, sentencepiece, theirs
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from rt.data import Example, encode, sequences_batch
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.delta_files import open_delta
from rt.formats.files import note, write_json
from rt.formats.hf import export_hf, load_hf
from rt.formats.hub import open_base
from rt.formats.tokenizer import Tokenizer, load_tokenizer, pipeline
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.report.inspect import inspect
from rt.speed.multi_run import side_by_side

transformers = pytest.importorskip("transformers")
tokenizer_of = test_hf.tokenizer_of


@pytest.fixture(autouse=True)
def every_note():
    note.cache_clear()      # it says each thing only once


def edit(file, **change) -> None:
    """Change settings of a JSON file; None removes one."""
    facts = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({k: v for k, v in (facts | change).items() if v is not None}))


# --- pad tokens in a text ---------------------------------------------------------------------------------------------

PADDED = [("a <pad> graph", None), ("<pad> <pad> of nodes", "and <pad>"), ("no such token", None), ("<pad>", "<pad>"), ("x" * 9, "a <pad>")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pad_token_in_a_text_is_not_counted_but_by_bert(family, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of[family]
    texts = [tuple(t and t.replace("<pad>", "[PAD]" if family == "bert" else "<pad>") for t in pair) for pair in PADDED]
    ids = encode([Example(*pair, None, "") for pair in texts], (), tokenizer, 64).sequences
    assert sum(sequence.count(tokenizer.pad_id) for sequence in ids) == 7
    folder = saved(theirs(family, "SequenceClassification", tokenizer, num_labels=3), Tokenizer(tokenizer.framed()), tmp_path)
    close(*said_by_both(folder, texts))


def test_pads_are_counted_a_sequence_also_in_static_shapes_and_side_by_side(base):
    embeddings, pad = base.encoder.embeddings.eval(), base.encoder.config.pad_id
    sequences = [[pad, 5, pad, pad, 6], [0, pad, 7, 2], [0, 8, 2], [pad]]
    alone = torch.cat([embeddings(torch.tensor(s), torch.tensor([0, len(s)])) for s in sequences])
    batch = sequences_batch(sequences)
    ends = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:].expand(60)])     # empty sequences at the end, as in static_batch
    assert torch.equal(embeddings(batch.ids, batch.cu_seqlens), alone) and torch.equal(embeddings(batch.ids, ends), alone)
    expected = [[pad, pad + 1, pad, pad, pad + 2], [pad + 1, pad, pad + 2, pad + 3], [pad + 1, pad + 2, pad + 3], [pad]]
    words = embeddings.word(batch.ids) + embeddings.position(torch.tensor(sum(expected, [])))
    assert torch.equal(embeddings.norm(words), alone)
    assert torch.equal(torch.compile(embeddings, backend="eager", fullgraph=True)(batch.ids, ends), alone)
    for part in (batch, sequences_batch([[0, 9, pad, 4, 5, 6, 7, 8, 9, 3, 3, 3, 3, 3, 2]])):
        part.labels = torch.zeros(len(part.cu_seqlens) - 1)
        part.index = torch.arange(len(part.labels))
    both, _ = side_by_side([part, batch], bucket=32)
    assert torch.equal(embeddings(both.ids, both.cu_seqlens)[32:32 + len(alone)], alone)


# --- ids that disagree ------------------------------------------------------------------------------------------------

def test_ids_of_config_and_tokenizer_that_disagree_are_noted_and_positions_go_by_the_config(tokenizer_of, tmp_path, capsys, monkeypatch):
    tokenizer = tokenizer_of["roberta"]
    model = theirs("roberta", "SequenceClassification", tokenizer, num_labels=3, bos_token_id=7)
    folder = saved(model, tokenizer, tmp_path / "a")
    comma = tokenizer.encode([","])[0][0]
    edit(folder / "config.json", pad_token_id=comma, max_position_embeddings=66)
    texts = [("a graph, of nodes", None), ("edges , , x", "nodes, and")]
    close(*said_by_both(folder, texts))
    said = capsys.readouterr().err
    assert f"disagree: pad_token_id {comma} and 1, bos_token_id 7 and 0; RoBERTa's positions go by the first" in said
    assert said.count("note:") == 1         # of two possible readings
    monkeypatch.setenv("RANK", "1")
    note.cache_clear()
    load_hf(folder)
    saved(theirs("roberta", "MaskedLM", tokenizer), tokenizer, tmp_path / "b")
    monkeypatch.setenv("RANK", "0")
    load_hf(tmp_path / "b")
    assert "note:" not in capsys.readouterr().err


def test_a_table_larger_than_the_tokenizer_is_noted(tokenizer_of, tmp_path, capsys):
    for more, said in ((0, False), (64 - tokenizer_of["bert"].vocab_size % 64, True), (2000, True)):
        larger = Tokenizer(tokenizer_of["bert"].framed())
        larger.vocab_size += more
        folder = saved(theirs("bert", "SequenceClassification", larger, num_labels=3), tokenizer_of["bert"], tmp_path / str(more))
        close(*said_by_both(folder, [("a graph", "of nodes")]))
        words = f"the model has {larger.vocab_size} words, the tokenizer {tokenizer_of['bert'].vocab_size}\n"
        assert (words in capsys.readouterr().err) is said


# --- tokenizers -------------------------------------------------------------------------------------------------------

SAID = ["a <e1> graph<e2>, <e3>", "<E1> xe1x <e4>", "the  <mask>  [MASK] of <e1>", "<img> word1 aword1b", "Été <e2>"]


def agrees(folder) -> bool:
    """Whether a folder's tokenizer gives the ids of SAID that transformers gives. False if the folder is refused."""
    try:
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        assert "disagree" in str(error)
        return False
    framed = transformers.AutoTokenizer.from_pretrained(folder)
    for text in SAID:
        assert [tokenizer.bos_id, *tokenizer.encode([text])[0], tokenizer.eos_id] == framed(text)["input_ids"], text
    return True


def flags_of(token: AddedToken) -> dict:
    return {name: getattr(token, name) for name in ("content", "lstrip", "rstrip", "single_word", "normalized", "special")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("of_class", ["its own", "PreTrainedTokenizerFast"])
def test_added_tokens_beside_tokenizer_json_are_transformers(family, of_class, tokenizer_of, tmp_path):
    """In each of the files, with all flags. If files disagree about an id, the folder is refused."""
    tokenizer, rng, read = Tokenizer(tokenizer_of[family].framed()), random.Random(family + of_class), 0
    own = [flags_of(token) | {"id": i} for i, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())]
    class_of = {"roberta": "Roberta", "bert": "Bert", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}[family] + "TokenizerFast"
    for case in range(24):
        folder, first = tmp_path / str(case), tokenizer.vocab_size
        folder.mkdir()
        tokenizer.save(folder)
        edit(folder / "config.json", model_type=family)
        edit(folder / "tokenizer_config.json", tokenizer_class=class_of if of_class == "its own" else of_class)
        names = rng.sample(["<e1>", "<e2>", "<e3>", "<e4>", "word1"], rng.randint(1, 4))
        tokens = [{"content": name, **{flag: rng.random() < 0.4 for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}}
                  for name in names]
        wrong = case % 6 == 5
        match case % 4:
            case 0:
                listed = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in own}
                edit(folder / "tokenizer_config.json", added_tokens_decoder=listed | {
                    str(first + i + wrong): token for i, token in enumerate(tokens)})
            case 1:
                edit(folder / "added_tokens.json", **{name: first + i + wrong for i, name in enumerate(names)})
                edit(folder / "special_tokens_map.json", additional_special_tokens=names[:1], mask_token=own[-1]["content"])
            case 2:
                edit(folder / "tokenizer_config.json", extra_special_tokens=names, image_token="<img>")
                edit(folder / "added_tokens.json", **{name: first + wrong + i + 1 for i, name in enumerate(names)} if wrong else {})
            case 3:
                facts = json.loads((folder / "tokenizer.json").read_text())
                facts["added_tokens"] += [token | {"id": first + i + wrong} for i, token in enumerate(tokens)]
                (folder / "tokenizer.json").write_text(json.dumps(facts))
                edit(folder / "tokenizer_config.json", additional_special_tokens=[{"__type": "AddedToken", **tokens[0]}])
        assert agrees(folder) is not wrong, (case, tokens)
        read += not wrong
    assert read == 20


def test_files_of_which_transformers_makes_other_ids_are_refused(tokenizer_of, tmp_path):
    """<mask> is not in the model's vocabulary and not in added_tokens_decoder: transformers 5 numbers the others first, 4 does not."""
    texts = [f"a graph number {i}" for i in range(50)]
    backend = sentencepiece(texts).backend
    bare = tokenizers.Tokenizer(backend.model)
    bare.pre_tokenizer, bare.post_processor = backend.pre_tokenizer, backend.post_processor
    bare.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<new-mask>"])
    bare.save(str(tmp_path / "tokenizer.json"))
    mask = bare.token_to_id("<new-mask>")
    edit(tmp_path / "config.json", model_type="xlm-roberta")
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(mask + 1): {"content": "<e1>"}}, mask_token="<new-mask>")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<e1>") == mask
    with pytest.raises(InputError, match=f"'<new-mask>' is {mask} in one of them, and all make it {mask + 1} in transformers 5"):
        load_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=None, tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(InputError, match="its mask_token is '<new-mask>'; supported are <mask> and"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("shape", [None, "<mask>", {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False,
                                                    "single_word": False}])
def test_special_tokens_may_be_names_dicts_or_null(shape, tokenizer_of, tmp_path):
    tokenizer_of["roberta"].save(tmp_path)
    edit(tmp_path / "config.json", model_type="roberta")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": shape, "bos_token": "<s>"}))
    assert agrees(tmp_path)


PARTS = {"a first space": ("roberta", lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), None),
         "case": ("bert", lambda b: setattr(b, "normalizer", normalizers.BertNormalizer(lowercase=False, strip_accents=False)), None),
         "a normalizer": ("roberta", lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "RobertaTokenizer makes another model"),
         "another one": ("bert", lambda b: setattr(b, "normalizer", normalizers.NFC()), "BertTokenizer makes another model"),
         "XLM-R's case": ("xlm-roberta", lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "XLMRobertaTokenizer makes another"),
         "XLM-R's words": ("camembert", lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="first")),
                           "CamembertTokenizer makes another model"),
         "a splitter": ("roberta", lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Sequence(
             [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])), "RobertaTokenizer makes another model")}


@pytest.mark.parametrize("what", PARTS)
def test_what_a_class_of_transformers_leaves_out_of_tokenizer_json_is_named_or_left_out(what, tokenizer_of, tmp_path):
    family, change, words = PARTS[what]
    backend = tokenizer_of[family].framed()
    change(backend)
    backend.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "config.json", model_type=family)
    if words:
        with pytest.raises(InputError, match=words):
            load_tokenizer(tmp_path)
    else:
        assert agrees(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert agrees(tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"tokenizer_class": "GPT2TokenizerFast"}, "tokenizer_class GPT2Tokenizer is not supported, only RobertaTokenizer, BertTokenizer,"),
    ({"tokenizer_class": "BertTokenizer"}, "transformers' BertTokenizer makes another model"),
    ({"split_special_tokens": True}, "split_special_tokens is not supported"),
    ({"added_tokens_decoder": {"x": "<e1>"}}, "its files of added tokens do not hold what they should")])
def test_settings_with_which_transformers_would_make_other_ids_are_named(change, words, tokenizer_of, tmp_path):
    tokenizer_of["roberta"].save(tmp_path)
    edit(tmp_path / "config.json", model_type="roberta")
    edit(tmp_path / "tokenizer_config.json", **change)
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", **(dict.fromkeys(change) | {"tokenizer_class": "BartTokenizer"}))      # RoBERTa's
    assert agrees(tmp_path)


def test_a_frame_that_is_none_of_ours_is_named(tokenizer_of, tmp_path):
    backend = tokenizer_of["roberta"].framed()
    edit(tmp_path / "config.json", model_type="roberta")
    for single, pair in (("$A </s>", "$A </s> $B </s>"), ("<s> $A", "<s> $A $B"), ("<s> $A", "<s> $A </s> </s> $B </s>")):
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)])
        backend.save(str(tmp_path / "tokenizer.json"))
        for of_class in ("PreTrainedTokenizerFast", "RobertaTokenizer"):
            edit(tmp_path / "tokenizer_config.json", tokenizer_class=of_class)
            with pytest.raises(InputError, match="transformers turns the texts a and b into"):
                load_tokenizer(tmp_path)
    tokenizer_of["roberta"].save(tmp_path)      # without a frame
    assert agrees(tmp_path)
    for change in ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "RobertaTokenizer", "cls_token": "<unk>"}):
        edit(tmp_path / "tokenizer_config.json", **change)
        with pytest.raises(InputError, match="the texts a and b into"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("names", [None, ["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]])
@pytest.mark.parametrize("of_class", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_token_types_are_those_that_the_tokenizer_is_configured_to_give(of_class, names, tokenizer_of, tmp_path, capsys):
    folder = saved(theirs("bert", "SequenceClassification", tokenizer_of["bert"], num_labels=3), tokenizer_of["bert"], tmp_path)
    edit(folder / "tokenizer_config.json", tokenizer_class=of_class, model_input_names=names)
    close(*said_by_both(folder, [("a graph", "of nodes"), ("edges", None)]))
    assert ("has no token type of its own" in capsys.readouterr().err) is ((of_class, names) == ("PreTrainedTokenizerFast", None))


def test_truncation_and_padding_of_a_file_are_not_ours_to_do(tokenizer_of, tmp_path):
    backend = tokenizer_of["roberta"].framed()
    backend.enable_truncation(4)
    backend.enable_padding(length=16, pad_id=1, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "config.json", model_type="roberta")
    assert len(load_tokenizer(tmp_path).encode(["a directed graph is an ordered pair"])[0]) > 4


# --- names of tensors -------------------------------------------------------------------------------------------------

HEAD = {"roberta": ("lm_head.bias", "lm_head.decoder", "roberta"), "bert": ("cls.predictions.bias", "cls.predictions.decoder", "bert")}


@pytest.mark.parametrize("family", HEAD)
@pytest.mark.parametrize("kept", ["bias", "decoder.bias", "both", "decoder.weight", "word embeddings"])
def test_a_tied_tensor_is_there_under_either_name(family, kept, tokenizer_of, tmp_path):
    tokenizer, (bias, decoder, model_name) = tokenizer_of[family], HEAD[family]
    model = theirs(family, "MaskedLM", tokenizer)
    folder, words = saved(model, tokenizer, tmp_path), f"{model_name}.embeddings.word_embeddings.weight"
    weights = load_file(folder / "model.safetensors")
    weights.pop(f"{decoder}.bias", None)
    if kept in ("decoder.bias", "both"):
        weights[f"{decoder}.bias"] = (weights[bias] if kept == "both" else weights.pop(bias)).clone()
    if kept.endswith("weight") or kept == "both":
        weights[f"{decoder}.weight"] = (weights[words] if kept == "both" else weights.pop(words)).clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    close(logits_of(again, tokenizer), logits_of(model, tokenizer))
    base, mask = load_hf(folder), test_hf.inputs(tokenizer)["attention_mask"].bool()
    with torch.no_grad():
        close(MaskedLM(base.encoder, base.head).eval()(sequences_batch(our_sequences(tokenizer))), logits_of(model, tokenizer)[mask])


@pytest.mark.parametrize("family", HEAD)
def test_a_head_with_weights_of_its_own_is_refused_and_one_that_lacks_some_is_left_out_and_named(family, tokenizer_of, tmp_path, capsys):
    tokenizer, (bias, decoder, _) = tokenizer_of[family], HEAD[family]
    folder = saved(theirs(family, "PreTraining" if family == "bert" else "MaskedLM", tokenizer), tokenizer, tmp_path / "in")
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if decoder not in k}
    for name, value in ((f"{decoder}.bias", weights[bias] + 1), (f"{decoder}.weight", torch.zeros(tokenizer.vocab_size, 48))):
        save_file(weights | {name: value}, folder / "model.safetensors")
        with pytest.raises(InputError, match=f"scoring weights of its own, {name}; only those tied"):
            load_hf(folder)
    save_file(weights, folder / "model.safetensors")
    edit(folder / "config.json", tie_word_embeddings=False)
    assert load_hf(folder).head is None
    assert f"its masked-LM head is left out: it lacks {decoder}.bias, {decoder}.weight\n" in capsys.readouterr().err
    edit(folder / "config.json", tie_word_embeddings=None)
    base = load_hf(folder)
    assert base.head is not None and not capsys.readouterr().err
    export_hf(tmp_path / "out", base)
    said = "out is without the base's pooler: AutoModelForMaskedLM has no place for it" if family == "bert" else ""
    assert said in capsys.readouterr().err or not said
    lost = [name for name in weights if "norm.bias" in name.lower() and ("lm_head" in name or "cls." in name)]
    save_file({k: v for k, v in weights.items() if k not in (*lost, "bert.pooler.dense.bias")}, folder / "model.safetensors")
    base = load_hf(folder)
    said = capsys.readouterr().err
    assert base.head is None and base.pooler is None and f"its masked-LM head is left out: it lacks {lost[0]}\n" in said
    assert ("its pooler is left out: it lacks pooler.dense.bias" in said) is (family == "bert")
    assert here("-m", "rt.runs.convert", "export", "--base", folder, "--out", tmp_path / "again").startswith("AutoModel and")
    assert "again has no masked-LM head: the base has none, or not all of one" in capsys.readouterr().err


def test_a_pooler_goes_out_if_there_is_no_masked_lm_head(tokenizer_of, tmp_path):
    model = theirs("bert", "SequenceClassification", tokenizer_of["bert"])
    base = load_hf(saved(model, tokenizer_of["bert"], tmp_path / "in"))
    assert export_hf(tmp_path / "out", base) == "AutoModel"
    again, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(again.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_a_classifier_that_lacks_a_tensor_or_is_for_tokens_is_named(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["bert"]
    folder = saved(theirs("bert", "SequenceClassification", tokenizer, num_labels=3), tokenizer, tmp_path / "a")
    base, weights = load_hf(folder), load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "classifier.bias"}, folder / "model.safetensors")
    with pytest.raises(InputError, match="or only part of one: it lacks classifier.bias$"):
        open_delta(str(folder), base)
    save_file(weights, folder / "model.safetensors")
    for kind in ("TokenClassification", "MultipleChoice"):
        edit(folder / "config.json", architectures=[f"BertFor{kind}"])
        with pytest.raises(InputError, match=f"is a BertFor{kind}, not a model for sequence classification"):
            open_delta(str(folder), base)
    edit(folder / "config.json", architectures=None, id2label={"0": "a"})
    with pytest.raises(InputError, match=r"1 different labels \(a\) for a head of 3 outputs"):
        open_delta(str(folder), base)
    answers = saved(theirs("bert", "QuestionAnswering", tokenizer), tokenizer, tmp_path / "b")
    assert load_hf(answers).head is None        # the purpose of the head does not matter to a base


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod.module."])
@pytest.mark.parametrize("place", ["in front", "in each layer", "lightning"])
def test_names_of_wrappers_are_left_out(wrap, place, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of["roberta"]
    model = theirs("roberta", "SequenceClassification", tokenizer, num_labels=3)
    folder = saved(model, tokenizer, tmp_path)
    weights = load_file(folder / "model.safetensors")
    if place == "in each layer":
        wrap = wrap.replace("model.", "module.")
        weights = {k.replace("encoder.layer.", f"{wrap}encoder.layer.{wrap}").replace(".self.", f".self.{wrap}"): v
                   for k, v in weights.items()}
    else:
        weights = {wrap + k: v for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors")
    if place == "lightning":
        (folder / "model.safetensors").unlink()
        torch.save({"state_dict": weights, "epoch": 3, "hyper_parameters": {"lr": 1e-3}}, folder / "pytorch_model.bin")
    base = open_base(str(folder))
    close(our_logits(base, open_delta(str(folder), base, LABELS)), logits_of(model, tokenizer))


def test_two_names_of_one_tensor_and_a_model_inside_another_are_named(tokenizer_of, tmp_path):
    folder = saved(theirs("roberta", "MaskedLM", tokenizer_of["roberta"]), tokenizer_of["roberta"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"module.roberta.embeddings.LayerNorm.bias": torch.zeros(48)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="roberta.embeddings.LayerNorm.bias would be the same tensor"):
        load_hf(folder)
    save_file({f"student.{k}": v for k, v in weights.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match="only student.roberta.embeddings.word_embeddings.weight: a model inside another"):
        load_hf(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read_as_float32(dtype, tokenizer_of, tmp_path):
    model = theirs("roberta", "SequenceClassification", tokenizer_of["roberta"], num_labels=3).to(dtype)
    folder = saved(model, tokenizer_of["roberta"], tmp_path)
    base = open_base(str(folder))
    close(our_logits(base, open_delta(str(folder), base)), logits_of(model.float(), tokenizer_of["roberta"]))


def test_a_tensor_in_two_shards_is_named(tokenizer_of, tmp_path):
    folder = saved(theirs("roberta", "MaskedLM", tokenizer_of["roberta"]), tokenizer_of["roberta"], tmp_path, max_shard_size="60KB")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value + 1}, second)
    with pytest.raises(InputError, match=f"{name} is in another shard, too"):
        load_hf(folder)


# --- adapters of other libraries --------------------------------------------------------------------------------------

@pytest.mark.parametrize("library, file, settings", [
    ("AdapterHub", "adapter_config.json", {"version": "adapters.1.3.0", "config": {"architecture": "lora", "r": 3}}),
    ("OpenDelta", "config.json", {"delta_type": "lora", "lora_r": 3})])
def test_adapters_of_other_libraries_are_named(library, file, settings, base, tmp_path):
    (tmp_path / file).write_text(json.dumps(settings))
    assert inspect(tmp_path)["is"] == f"an adapter of {library}"
    with pytest.raises(InputError, match=f"an adapter of {library}; only LoRA adapters of PEFT are supported"):
        open_delta(str(tmp_path), base)


def test_our_exports_first_space_stays_in_transformers(base, tmp_path):
    """Also as a setting, which transformers 4 uses instead of the value in tokenizer.json."""
    base.tokenizer = test_hf.prefixed(base.tokenizer)
    export_hf(tmp_path, base)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] is True and agrees(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert load_hf(tmp_path / "copy").tokenizer.fingerprint == load_hf(tmp_path).tokenizer.fingerprint


def test_sister_classes_of_berts_and_settings_of_a_model_that_the_class_would_not_keep(tokenizer_of, tmp_path):
    """AutoTokenizer turns a MobileBertTokenizer into a BertTokenizer. A DistilBertTokenizer is a BertTokenizer without token types."""
    from transformers import AutoTokenizer
    folder = saved(theirs("bert", "SequenceClassification", tokenizer_of["bert"], num_labels=3), tokenizer_of["bert"], tmp_path / "bert")
    for name in ("MobileBertTokenizer", "DistilBertTokenizerFast"):
        edit(folder / "tokenizer_config.json", tokenizer_class=name)
        ours = load_tokenizer(folder).framed().encode("a graph", "of nodes")
        found = AutoTokenizer.from_pretrained(folder)("a graph", "of nodes")
        assert found["input_ids"] == ours.ids and found.get("token_type_ids", [0] * len(ours.ids)) == ours.type_ids
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    load_tokenizer(folder)
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts["model"]["max_input_chars_per_word"] = 20
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="BertTokenizer makes another model"):
        load_tokenizer(folder)


def test_a_template_whose_first_text_has_the_second_type_is_refused(tokenizer_of, tmp_path):
    folder = saved(theirs("bert", "SequenceClassification", tokenizer_of["bert"], num_labels=3), tokenizer_of["bert"], tmp_path / "bert")
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", model_input_names=["input_ids", "token_type_ids"])
    load_tokenizer(folder)
    facts = json.loads((folder / "tokenizer.json").read_text())
    for part in facts["post_processor"]["pair"]:
        for piece in part.values():
            piece["type_id"] = 1
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="with token types"):
        load_tokenizer(folder)


def test_a_head_or_pooler_that_is_left_behind_is_said(base, tmp_path, capsys):
    model = attach(base, DeltaConfig("full"), 2, seed=0)
    export_hf(tmp_path / "out", base, extract(model, base, DeltaConfig("full"), {"labels": ["a", "b"]}))
    said = capsys.readouterr().err
    assert "out is without the base's masked-LM head: AutoModelForSequenceClassification has no place" in said
    assert "the base's pooler" not in said


def test_every_file_of_a_vocabulary_is_bounded(tmp_path):
    for name in ("vocab.json", "merges.txt", "vocab.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(101 * 2**20)
        with pytest.raises(InputError, match=f"{name}: is longer than 100 MB, too long for a tokenizer"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_config_json_may_name_the_tokenizers_class(tokenizer, tmp_path):
    backend = tokenizer.framed()
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"model_type": "roberta", "tokenizer_class": "PreTrainedTokenizerFast"})
    assert load_tokenizer(tmp_path).encode(["A"]) == load_tokenizer(tmp_path).encode(["a"])


def test_a_vocabulary_of_another_class_is_not_read_as_robertas_or_berts(tokenizer, tmp_path):
    for name in ("GPT2Tokenizer", "RoFormerTokenizer"):
        (tmp_path / name).mkdir()
    tokenizer.backend.model.save(str(tmp_path / "GPT2Tokenizer"))
    (tmp_path / "RoFormerTokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    for folder in tmp_path.iterdir():
        load_tokenizer(folder)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": folder.name})
        with pytest.raises(InputError, match="no tokenizer there"):
            load_tokenizer(folder)


def test_settings_of_a_tokenizers_model_that_its_class_would_drop_are_refused(tokenizer_of, tmp_path):
    for family, change, of in (("roberta", {"end_of_word_suffix": "</w>"}, "Roberta"), ("bert", {"unk_token": "[MASK]"}, "Bert")):
        (folder := tmp_path / family).mkdir()
        tokenizer_of[family].save(folder)
        write_json(folder / "config.json", {"model_type": family})
        load_tokenizer(folder)
        facts = json.loads((folder / "tokenizer.json").read_text())
        write_json(folder / "tokenizer.json", facts | {"model": facts["model"] | change})
        with pytest.raises(InputError, match=f"{of}Tokenizer makes another model"):
            load_tokenizer(folder)


def test_a_unigram_without_its_first_space_is_refused(tmp_path):
    backend = pipeline(models.Unigram([(t, 0.0) for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] + [("\u2581a", -1.0), ("b", -2.0),
                                                                                                    ("a", -2.0), ("\u2581", -3.0)], 3))
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    Tokenizer(backend).save(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "xlm-roberta"})
    load_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"add_prefix_space": False})
    with pytest.raises(InputError, match="XLMRobertaTokenizer makes another model"):
        load_tokenizer(tmp_path)
