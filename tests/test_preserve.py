"""Upgrades that stay near the previous base: the distances, known at the start and in closed form, and the effect of training with them."""
import copy
from pathlib import Path

import pytest
import torch
from conftest import here, random_base

from bench import recipes
from rt.data import Rows
from rt.formats.checkpoint import save_base
from rt.formats.corpora import build_corpus
from rt.formats.files import read_json, read_rows
from rt.losses import attention_divergence
from rt.model import Activations, MaskedLM
from rt.optim import adamw
from rt.pretrain import PretrainSettings, microbatches, mlm_loss
from rt.recipes import Preserve
from rt.runs.upgrade import set_dropout
from rt.speed.dist import Ranks
from rt.speed.graphs import make_gradient

WAYS = ("hidden", "last", "predictions", "attention")


@pytest.fixture
def model(base):
    model = MaskedLM(copy.deepcopy(base.encoder), copy.deepcopy(base.head)).train()
    set_dropout(model, 0.0)
    return model


@pytest.fixture
def moved(model):
    """The same base after a step in a random direction."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p, generator in zip(other.parameters(), map(torch.Generator().manual_seed, range(10**6))):
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def masked(graphs, tokenizer, tmp_path_factory):
    corpus = build_corpus("graphs", graphs / "corpus", tokenizer, tmp_path_factory.mktemp("bins"))["train"]
    return Rows(corpus, tokenizer, seq_len=32, mask_rate=0.3, seed=0)


def states(model, batch):
    model.encoder(batch, activations := Activations(tuple(range(len(model.encoder.layers))), hidden=[]))
    return activations


@pytest.mark.parametrize("by", WAYS)
def test_a_base_that_has_not_moved_pays_nothing(model, masked, by):
    batch, old = masked.batch(0, 512), copy.deepcopy(model)
    set_dropout(old, 0.5)       # the old base runs without it
    torch.testing.assert_close(Preserve(old, 7.0, by, batch)(model, batch), mlm_loss(model, batch))


@pytest.mark.parametrize("by", WAYS)
def test_the_distance_is_what_it_is_said_to_be(model, moved, masked, by):
    batch, w = masked.batch(0, 512), 3.0
    new, old = states(moved, batch), states(model, batch)
    assert len(new.hidden) == len(model.encoder.layers) + 1 and not new.rows
    each = [(a - b).square().mean() / b.var(correction=0) for a, b in zip(new.hidden, old.hidden)]
    p, q = (m(batch).log_softmax(-1) for m in (model, moved))
    expected = {"hidden": torch.stack(each).mean(), "last": each[-1], "predictions": (p.exp() * (p - q)).sum(-1).mean(),
                "attention": attention_divergence(new, old, batch)}[by]
    assert expected > 1e-3
    torch.testing.assert_close(Preserve(model, w, by, batch)(moved, batch), mlm_loss(moved, batch) + w * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", WAYS)
def test_gradients_reach_the_new_base_alone_and_the_old_one_stays_as_it_was(model, moved, masked, by):
    batch = masked.batch(0, 512)
    preserve, before = Preserve(model, 3.0, by, batch), copy.deepcopy(model.state_dict())
    preserve(moved, batch).backward()
    with torch.no_grad():
        moved.head.bias.add_(1.0), model.head.bias.add_(1.0)
    assert all(p.grad is None and not p.requires_grad for p in preserve.old.parameters())
    assert all(p.equal(before[k]) for k, p in preserve.old.state_dict().items())       # a copy: nothing outside can change it
    assert all(p.grad is not None for p in moved.encoder.parameters())


@pytest.mark.parametrize("by", WAYS)
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(model, moved, masked, by):
    preserve, halves = Preserve(model, 3.0, by, masked.batch(9, 1024)), [masked.batch(0, 1024, part=i, parts=2) for i in (0, 1)]
    torch.testing.assert_close(preserve(moved, masked.batch(0, 1024)), sum(preserve(moved, half) for half in halves) / 2, rtol=1e-5, atol=0)


def test_a_large_weight_returns_the_old_states_and_a_small_one_learns(model, masked):
    batch, drift, loss = masked.batch(10**4, 512), {}, {}
    for w in (None, 1e-6, 1e3):
        new = copy.deepcopy(model)
        s = PretrainSettings(25, 512, 2e-3, 3, seed=0)
        optimizer, preserve = adamw(new.parameters(), 2e-3, 0.0), Preserve(model, w, "hidden", batch) if w else mlm_loss
        gradient = make_gradient(new, s, Ranks(torch.device("cpu")), torch.float32, loss=preserve)
        for part in microbatches(masked, s):
            new.zero_grad()
            gradient(part, 0)
            optimizer.step()
        with torch.no_grad():
            pairs = zip(states(new, batch).hidden, states(model, batch).hidden)
            drift[w], loss[w] = sum(((a - b).square().mean() / b.var()).item() for a, b in pairs), mlm_loss(new, batch).item()
    assert drift[1e3] < drift[None] / 20 and loss[None] < mlm_loss(model, batch).item() - 0.3
    assert drift[1e-6] == pytest.approx(drift[None], rel=0.2) and loss[1e-6] == pytest.approx(loss[None], abs=0.1)


def test_every_layer_is_called_alike_so_that_compiled_layers_share_a_graph(model, masked):
    seen = []
    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[-1]))
    assert len(states(model, masked.masked(range(2))).qk) == len(seen) and len({id(qk) for qk in seen}) == len(seen)


def test_the_command_preserves_from_the_second_base_on(graphs, tmp_path):
    flags = ("train.py", "--preset", "tiny", "--vocab_size", "500", "--seq_len", "32", "--batch_tokens", "256", "--eval_tokens", "512",
             "--device", "cpu", "--stream", f"{graphs / 'corpus'},{graphs / 'corpus'}/train.jsonl", "--steps", "3", "--snapshots", "0",
             "--cache", tmp_path / "cache")

    def bases(name: str, *more: str) -> list[str]:
        here(*flags, "--out", tmp_path / name, *more)
        return [read_json(Path(tmp_path, name, m, "meta.json"))["fingerprint"] for m in ("M0", "M1")]

    plain, none, some = bases("plain"), bases("none", "--preserve", "0"), bases("some", "--preserve", "9")
    assert plain == none and plain[0] == some[0] and plain[1] != some[1]
    assert read_json(tmp_path / "some" / "M1" / "meta.json")["recipe"] == {"preserve": 9.0}
    words = here(*flags, "--out", tmp_path / "no", "--preserve", "1", "--preserve_by", "predictions", "--objective", "rts", code=2)
    assert "compares distributions" in words
    assert "has no effect without" in here(*flags, "--out", tmp_path / "no", "--preserve_by", "last", code=2)


def test_what_a_switch_costs_is_measured_in_turns(graphs, tokenizer, tmp_path, monkeypatch):
    base = random_base(tokenizer)
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), tokenizer, {"name": "M0"})
    some = {"plain": "", "wrong": "--replay .2", "mix": recipes.SWITCHES["mix"]}     # M0 knows no earlier domain
    monkeypatch.setattr(recipes, "SWITCHES", some)
    said = here("-m", "bench.recipes", "--init", tmp_path / "M0", "--stream", graphs / "corpus", "--json", tmp_path / "rows.jsonl",
                "--other", graphs / "task" / "train.jsonl", "--steps", "2", "--rounds", "1", "--cache", tmp_path / "cache")
    plain, wrong, mix = read_rows(tmp_path / "rows.jsonl")
    assert plain["ms"] > 0 and plain["mb"] > 0 and plain["seconds"] > 0 and mix["ms"] > 0
    assert "no record (in its meta.json) of domains" in wrong["failed"] and "plain" in said


def test_a_plain_command_that_fails_ends_the_measurement(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("raise SystemExit('error: M9: no base there')")
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    said = here("-m", "bench.recipes", "--init", "M9", "--stream", "new.txt", "--json", tmp_path / "rows.jsonl", code=2)
    assert "error: plain failed: M9: no base there" in said and not read_rows(tmp_path / "rows.jsonl")
