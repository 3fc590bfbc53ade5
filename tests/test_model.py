"""The encoder computes RoBERTa's function, and a sequence does not see its neighbours."""
import copy
from dataclasses import replace

import pytest
import torch
from conftest import random_base

import rt.model
from kernels import dropout
from rt.data import Encoded, sequences_batch
from rt.deltas import attach
from rt.formats.hf import CLASSIFIERS, head_state, load_hf
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, run_teacher
from rt.model import PRESETS, Activations, ClassificationHead, Classifier, Encoder, EncoderConfig, MaskedLM, new_masked_lm
from rt.pretrain import mlm_loss


def padded(sequences, pad_id):
    """(ids (B, S), attention mask (B, S)) for transformers."""
    length = max(map(len, sequences))
    ids = torch.tensor([s + [pad_id] * (length - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])
    return ids, mask


def test_a_linear_layer_of_runs_side_by_side_is_each_runs_own():
    x, w, b = torch.randn(8, 3), torch.randn(2, 4, 3), torch.randn(2, 4)
    for weight, bias in ((w, b), (w, b[0]), (w[0], b), (w, None)):
        parts = [(weight if weight.ndim == 2 else weight[i], bias if bias is None or bias.ndim == 1 else bias[i]) for i in range(2)]
        expected = torch.cat([torch.nn.functional.linear(rows, *part) for rows, part in zip(x.chunk(2), parts)])
        torch.testing.assert_close(rt.model.linear(x, weight, bias).flatten(0, -2), expected)


@pytest.fixture(scope="module")
def hf_models(tokenizer, tmp_path_factory):
    """Random RobertaForMaskedLM and RobertaForSequenceClassification models of transformers, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RobertaConfig(vocab_size=tokenizer.vocab_size, hidden_size=96, num_hidden_layers=3,
                                        num_attention_heads=3, intermediate_size=200, max_position_embeddings=66,
                                        type_vocab_size=1, layer_norm_eps=1e-5, num_labels=4)
    models = {}
    for name, cls in (("mlm", transformers.RobertaForMaskedLM), ("classify", transformers.RobertaForSequenceClassification)):
        model = cls(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))   # biases and LN too: a weight at its initial value tests nothing
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save(folder)
        models[name] = model, folder
    return models


def ragged(tokenizer):
    g = torch.Generator().manual_seed(1)
    return [[tokenizer.bos_id, *torch.randint(5, 500, (n,), generator=g).tolist(), tokenizer.eos_id]
            for n in (12, 62, 0, 33, 1)]


def test_masked_lm_logits_equal_transformers(hf_models, tokenizer):
    theirs, folder = hf_models["mlm"]
    base = load_hf(folder)
    sequences = ragged(tokenizer)
    ids, mask = padded(sequences, tokenizer.pad_id)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        ours = MaskedLM(base.encoder, base.head).eval()(sequences_batch(sequences))
    assert expected.std() > 0.5
    assert (ours - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_classification_logits_equal_transformers(hf_models, tokenizer):
    theirs, folder = hf_models["classify"]
    base = load_hf(folder)
    assert base.head is None    # the checkpoint has no masked-LM head
    head = ClassificationHead(96, 4)
    head.load_state_dict(head_state(theirs.state_dict(), base.encoder.config, CLASSIFIERS))
    sequences = ragged(tokenizer)
    ids, mask = padded(sequences, tokenizer.pad_id)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits
        ours = Classifier(base.encoder, head).eval()(sequences_batch(sequences))
    assert expected.std() > 0.05
    assert (ours - expected).abs().max() < 1e-5


def test_weights_only_bin_gives_the_same_base(hf_models, tmp_path, tokenizer):
    theirs, folder = hf_models["mlm"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    tokenizer.save(tmp_path)
    assert load_hf(tmp_path).fingerprint == load_hf(folder).fingerprint


def test_a_bert_without_separator_has_one_token_type():
    """Whatever ids a text holds, also ~0 = -1, the mark of a separator of id 0 that is part of a text."""
    embeddings = Encoder(EncoderConfig(9, model_type="bert", sep_id=None, **PRESETS["tiny"])).embeddings.eval()
    embeddings.second_type.data.fill_(9.0)
    given = torch.tensor([[3, 0, 5, 6], [3, -1, 5, 6]]), torch.tensor([0, 4], dtype=torch.int32)
    assert torch.equal(*(embeddings(ids, given[1]) for ids in given[0]))


def test_a_sequence_does_not_depend_on_its_neighbours(base, batch):
    bounds = batch.cu_seqlens.tolist()
    with torch.no_grad():
        together = base.encoder(batch)
        for a, b in zip(bounds, bounds[1:]):
            alone = base.encoder(sequences_batch([batch.ids[a:b].tolist()]))
            torch.testing.assert_close(together[a:b], alone, atol=1e-5, rtol=1e-5)


def test_states_are_the_first_rows_of_every_layer_but_the_last(base, batch):
    with torch.no_grad():
        h = base.encoder(batch, activations := Activations(attention=(1,)))
        embedded = base.encoder.embeddings(batch.ids, batch.cu_seqlens)
        after_first = base.encoder.layers[0](embedded, batch.cu_seqlens, batch.max_seqlen)
    first = batch.cu_seqlens[:-1]
    states = activations.states
    assert states.shape == (5, base.encoder.config.num_layers, h.shape[1])
    assert torch.equal(states[:, 0], embedded[first]) and torch.equal(states[:, 1], after_first[first])
    (q, k), = activations.qk      # only of the second layer
    assert torch.equal(torch.cat([q, k], 1).flatten(1), base.encoder.layers[1].qkv(after_first)[:, :2 * h.shape[1]])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_and_the_mean_of_every_row_and_column(p):
    x = torch.ones(1000, 600, requires_grad=True)
    y = dropout(x, p, torch.tensor([3]))
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.002
    for dim, n in ((0, 1000), (1, 600)):        # within 5 standard deviations; few of 1,600 means should exceed that
        assert ((kept.float().mean(dim) - (1 - p)).abs() < 5 * (p * (1 - p) / n) ** 0.5).all()
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    assert dropout(x, p, None) is x and not torch.equal(y, dropout(x, p, torch.tensor([4])))


def test_dropout_of_runs_side_by_side_is_that_of_each_alone():
    x = torch.randn(6, 40)
    seeds = torch.tensor([7, 2**62 + 1, 9])
    alone = [dropout(x[2 * i:2 * i + 2], 0.3, seeds[i:i + 1]) for i in range(3)]
    assert torch.equal(dropout(x, 0.3, seeds), torch.cat(alone))
    with pytest.raises(ValueError, match=r"6 rows by seeds \(4,\)"):
        dropout(x, 0.3, torch.tensor([1, 2, 3, 4]))


def test_dropout_is_active_in_training_only(tokenizer, batch):
    model = attach(random_base(tokenizer), DeltaConfig("full"), 3, seed=0)
    model.eval()
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_every_dropout_of_a_pass_has_a_mask_of_its_own(kind, tokenizer, batch, monkeypatch):
    model, seen = attach(random_base(tokenizer), DeltaConfig(kind), 3, seed=0).train(), []
    for name in ("dropout", "add_norm", "attention_qkv"):
        def noted(*args, real=getattr(rt.model, name), **named):
            seen.append((named["dropout_p"], named["seed"]) if named else args[-2:])
            return real(*args, **named)
        monkeypatch.setattr(rt.model, name, noted)
    model(batch)
    seen = [(p, seed.item()) for p, seed in seen if seed is not None]       # LN without dropout has none
    assert len({seed for _, seed in seen}) == len(seen) == 1 + 3 * 2 + 2 and {p for p, _ in seen} == {0.1}     # embeddings, layers, head


def test_an_adapter_follows_the_dropout(base, batch):
    block, seed, (x, h) = base.encoder.layers[0], torch.tensor([3]), torch.randn(2, 9, 64)
    ours = block.residual(block.output_norm, lambda h: h + 1, x, h, seed)
    assert torch.equal(ours, block.output_norm(x, dropout(h, 0.1, seed) + 1))


def test_a_new_base_is_as_wide_as_its_width_asks(tokenizer):
    model = new_masked_lm(EncoderConfig(600, hidden_size=192, pad_id=tokenizer.pad_id), seed=0)
    words = model.encoder.embeddings.word.weight
    assert not words[tokenizer.pad_id].any()
    assert words.std().item() == pytest.approx(0.04, rel=0.03) == model.head.dense.weight.std().item()


def test_training_is_the_same_through_the_kernels(device, base, batch, tokenizer, monkeypatch):
    """Masked LM, and a prefix delta under all terms of distillation: loss and gradients by kernels and by references."""
    teacher = attach(random_base(tokenizer, seed=3), DeltaConfig("adapter"), 3, seed=2).to(device).eval()
    cache = run_teacher(teacher, Encoded([[0, 5 + i, 2] for i in range(5)], torch.arange(5) % 3, 0), device, torch.float32)
    student = attach(base, DeltaConfig("prefix"), 3, seed=1).to(device).eval()
    torch.nn.init.constant_(student.encoder.layers[0].prefix.gate, 0.5)
    loss = Loss(teacher=cache, config=DistillConfig(0.7, 2.0, 3.0, gamma=1.5, att_layers="all"), teacher_model=teacher)
    masked = MaskedLM(copy.deepcopy(base.encoder), base.head).to(device).train()
    batch = batch.to(device)
    predicting = replace(batch, predict=torch.tensor([1, 4, 9, 20], device=device), labels=torch.tensor([7, 8, 9, 7], device=device))
    results = []
    for mode in ("triton", "ref"):
        monkeypatch.setenv("RT_KERNELS", mode)
        torch.manual_seed(1)        # dropout
        total = loss(student, batch) + mlm_loss(masked, predicting)
        parameters = [p for model in (student, masked) for p in model.parameters() if p.requires_grad]
        results.append([total, *torch.autograd.grad(total, parameters)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
