"""The masked-LM loop: it learns, accumulation changes nothing, evaluation repeats itself, a loss that is no number ends it."""
import pytest
import torch

from rt.config import UsageError
from rt.data import Rows, build_corpus
from rt.model import PRESETS, EncoderConfig, new_masked_lm, set_dropout
from rt.optim import adamw, schedule
from rt.pretrain import PretrainSettings, evaluate_mlm, pretrain

CPU = {"device": torch.device("cpu"), "precision": torch.float32}


@pytest.fixture(scope="module")
def rows(graphs, tokenizer, tmp_path_factory):
    corpus = build_corpus("graphs", graphs / "corpus", tokenizer, tmp_path_factory.mktemp("bins"))
    return {part: Rows(corpus[part], tokenizer, seq_len=32, mask_rate=0.3, seed=0) for part in corpus}


def trained(rows, tokenizer, steps, lr=2e-3, **changes):
    model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    set_dropout(model, 0.0)
    settings = PretrainSettings(**{**dict(steps=steps, batch_tokens=512, lr=lr, warmup=3, seed=0), **changes})
    log = list(pretrain(model, rows["train"], adamw(model.parameters(), 0.0, 0.01), settings, **CPU))
    return model, log


def test_it_learns_on_held_out_text(rows, tokenizer):
    untrained = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    before = evaluate_mlm(untrained, rows["heldout"], tokens=4096, **CPU)
    model, log = trained(rows, tokenizer, 40)
    after = evaluate_mlm(model, rows["heldout"], tokens=4096, **CPU)
    assert before["loss"] == pytest.approx(6.4, abs=0.3)        # ln 600
    assert after["loss"] < before["loss"] - 0.7 and after["accuracy"] > before["accuracy"]
    assert after == evaluate_mlm(model, rows["heldout"], tokens=4096, **CPU)
    assert [row["step"] for row in log] == list(range(1, 41))


def test_accumulation_is_the_same_step_in_parts(rows, tokenizer):
    whole, a = trained(rows, tokenizer, 5)
    parts, b = trained(rows, tokenizer, 5, accumulation=2)
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    # Adam divides by the gradient's size, so rounding shows in weights whose gradient is almost zero: compare the loss
    losses = [evaluate_mlm(m, rows["heldout"], tokens=2048, **CPU)["loss"] for m in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_with_advice(rows, tokenizer):
    with pytest.raises(UsageError, match="lower --lr"):
        trained(rows, tokenizer, 30, lr=1e18, clip=1e30)


def test_the_schedule_rises_and_falls():
    rates = [schedule(t, 10, 4, 1.0) for t in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[-1] == pytest.approx(1 / 6)
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))


def test_only_matrices_decay(tokenizer):
    model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    decayed, plain = adamw(model.parameters(), 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(p.dim() == 1 for p in plain["params"])
