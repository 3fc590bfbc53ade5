"""The masked-LM loop: it learns, accumulation changes nothing, evaluation is repeatable, a non-finite loss ends it. Batches made ahead,
rows fetched late, compiled and captured steps equal the plain ones."""
import copy
import functools
import itertools
import shutil
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import pretrained

import rt.model
import rt.speed.graphs
from rt.data import Rows
from rt.errors import InputError
from rt.formats.corpora import build_corpus
from rt.model import PRESETS, EncoderConfig, new_masked_lm
from rt.optim import adamw, linear_rate
from rt.pretrain import PretrainSettings, evaluate_mlm, microbatches
from rt.runs.upgrade import set_dropout
from rt.speed.dist import Ranks
from rt.speed.graphs import check_graphs, compiled, prefetch, staged, static_batch
from rt.tune import TuneSettings

CPU = {"device": torch.device("cpu"), "precision": torch.float32}


@pytest.fixture(scope="module")
def rows(graphs, tokenizer, tmp_path_factory):
    corpus = build_corpus("graphs", graphs / "corpus", tokenizer, tmp_path_factory.mktemp("bins"))
    return {part: Rows(corpus[part], tokenizer, seq_len=32, mask_rate=0.3, seed=0) for part in corpus}


def trained(rows, tokenizer, steps, lr=2e-3, dropout=0.0, where=CPU, accumulation=1, clip=1.0, **how):
    model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0).to(where["device"])
    set_dropout(model, dropout)
    s = PretrainSettings(steps, 512, lr, 3, seed=0, accumulation=accumulation, clip=clip)
    optimizer = adamw(model.parameters(), 0.0, 0.01)
    with tempfile.TemporaryDirectory() as folder:
        return model, pretrained(Path(folder) / "run", model, rows["train"], optimizer, s, tokenizer, **where, **how)


def test_it_learns_on_held_out_text(rows, tokenizer):
    untrained = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    before = evaluate_mlm(untrained, rows["heldout"], tokens=10 * 256, **CPU)
    assert untrained.training and evaluate_mlm(untrained.eval(), rows["heldout"], tokens=10 * 256, **CPU) == before
    assert not untrained.training       # as it was; but it is scored without dropout, and rows count alike in passes of any size
    batch = rows["heldout"].masked(range(10))
    with torch.no_grad():
        logits = untrained.eval()(batch)
    right = (logits.argmax(-1) == batch.labels).sum().item()
    n, loss = len(batch.labels), F.cross_entropy(logits, batch.labels).item()
    assert before == pytest.approx({"loss": loss, "accuracy": right / n, "predictions": n}, rel=1e-5)
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
    with pytest.raises(InputError, match="lower --lr"):
        trained(rows, tokenizer, 30, lr=1e18, clip=1e30)


def test_items_come_from_another_thread_in_order_and_no_further_ahead_than_asked():
    made = []
    def items():
        for i in range(20):
            made.append(threading.current_thread())
            yield i
    got = prefetch(items())
    assert [next(got), next(got)] == [0, 1]
    time.sleep(0.2)
    assert len(made) == 2 + 3 and threading.main_thread() not in made
    assert list(got) == list(range(2, 20)) and not made[0].is_alive()


def test_an_error_of_the_other_thread_is_raised_here_and_leaving_ends_it():
    def items():
        yield from range(3)
        raise InputError("line 4: bad")
    got = prefetch(items())
    assert list(itertools.islice(got, 3)) == [0, 1, 2]
    with pytest.raises(InputError, match="line 4"):
        next(got)
    endless = prefetch(threading.current_thread() for _ in itertools.count())
    thread = next(endless)
    assert thread.is_alive() and thread is not threading.main_thread()
    endless.close()
    assert not thread.is_alive()


def test_shares_and_their_seeds_are_functions_of_seed_step_and_share(rows):
    def made(start, seed=0, rank=0, world=1):
        return list(microbatches(rows["train"], PretrainSettings(6, 1024, 0.0, 1, seed, accumulation=4 // world), rank, world, start))
    whole, late, two = made(0), made(4), [made(0, rank=rank, world=2) for rank in (0, 1)]
    assert len(whole) == 24 and len({b.seeds.item() for b in whole}) == 24
    assert all(a.seeds.equal(b.seeds) and a.ids.equal(b.ids) for a, b in zip(whole[16:], late))
    split = [b for step in range(6) for rank in (0, 1) for b in two[rank][2 * step:2 * step + 2]]
    assert all(a.seeds.equal(b.seeds) and a.ids.equal(b.ids) for a, b in zip(whole, split))
    assert not {b.seeds.item() for b in made(0, seed=1)} & {b.seeds.item() for b in whole}


def test_rows_fetched_late_are_the_same_and_the_model_is_exact_at_a_checkpoint(rows, tokenizer, tmp_path):
    straight, a = trained(rows, tokenizer, 9, dropout=0.1)
    late, b = trained(rows, tokenizer, 9, dropout=0.1, log_every=4)
    assert a == b and all(x.equal(y) for x, y in zip(straight.state_dict().values(), late.state_dict().values()))
    model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    set_dropout(model, 0.1)
    optimizer, s = adamw(model.parameters(), 0.0, 0.01), PretrainSettings(9, 512, 2e-3, 3, 0)
    b = pretrained(tmp_path / "run", model, rows["train"], optimizer, s, tokenizer, log_every=4, stop_after=6)      # stopped after step 6
    assert a[:6] == b
    b = pretrained(tmp_path / "run", model, rows["train"], optimizer, s, tokenizer, log_every=4)                    # and continued
    assert a == b and all(x.equal(y) for x, y in zip(straight.state_dict().values(), model.state_dict().values()))


def test_the_step_without_a_finite_loss_is_named_when_seen_late(rows, tokenizer):
    seen = []
    for log_every in (1, 7):
        with pytest.raises(InputError, match="lower --lr") as error:
            trained(rows, tokenizer, 30, lr=1e18, clip=1e30, log_every=log_every)
        seen.append(str(error.value))
    assert seen[0].partition("; no checkpoint")[0] == seen[1].partition("; no checkpoint")[0]


def test_compiled_blocks_take_the_same_steps(rows, tokenizer):
    """fp32, within 1e-5 of the loss over 20 steps. Names in the state dict are unchanged."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    (plain, a), (compiled, b) = (trained(rows, tokenizer, 20, compile=compile) for compile in (False, True))
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
    assert plain.state_dict().keys() == compiled.state_dict().keys() and "forward" not in vars(compiled.encoder.layers[0])


def test_a_block_is_one_graph_with_our_ops_inside(device, base, batch, monkeypatch):
    """As on a GPU, fullgraph, here with interpreted kernels and without C++: two blocks, one compilation, the plain path's gradients."""
    if device.type == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    encoder, batch = base.encoder.to(device), batch.to(device)
    batch.cu_seqlens = torch.nn.functional.pad(batch.cu_seqlens, (0, 3), value=len(batch.ids))
    weights = list(encoder.layers.parameters())
    plain = torch.autograd.grad(encoder(batch).square().mean(), weights)
    torch._dynamo.utils.counters.clear()
    with compiled(encoder.layers, device):
        ours = torch.autograd.grad(encoder(batch).square().mean(), weights)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_graphs_need_one_gpu():
    with pytest.raises(InputError, match="--device cuda"):
        check_graphs(True, Ranks(torch.device("cpu")))
    with pytest.raises(InputError, match="for one GPU"):
        check_graphs(True, Ranks(torch.device("cuda", 0), 1, 2))
    check_graphs(False, Ranks(torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("how", [dict(compile=True), dict(graphs=True), dict(compile=True, graphs=True),
                                 dict(graphs=True, accumulation=2)], ids=str)
def test_compiled_and_captured_steps_are_the_plain_ones(rows, tokenizer, how, precision, tolerance):
    """200 steps. Every loss is within the (relative) tolerance, the first ten within a tenth of it. Accumulation is the same in both."""
    where = {"device": torch.device("cuda", 0), "precision": precision}
    parts = how.get("accumulation", 1)
    (_, a), (_, b) = (trained(rows, tokenizer, 200, dropout=0.1, where=where, log_every=10, **h)
                      for h in (dict(accumulation=parts), how))
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=tolerance / 10 if x["step"] <= 10 else tolerance), x["step"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_step_draws_new_dropout_masks(rows, tokenizer):
    where = {"device": torch.device("cuda", 0), "precision": torch.float32}
    (_, a), (_, b), (_, c) = (trained(rows, tokenizer, 20, where=where, dropout=p, graphs=graphs, lr=1e-9)
                              for p, graphs in ((0.3, False), (0.3, True), (0.0, True)))
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    assert len({y["loss"] - z["loss"] for y, z in zip(b, c)}) == 20


def test_the_schedule_rises_and_falls():
    rates = [linear_rate(t, 10, 4, 1.0) for t in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[-1] == pytest.approx(1 / 6)
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    assert [TuneSettings(10, 8, 1.0, 5, seed=0, warmup=0.4).lr_at(t) for t in range(10)] == rates


def test_only_matrices_decay(tokenizer):
    model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    decayed, plain = adamw(model.parameters(), 1e-3, 0.1).param_groups
    assert decayed["betas"] == (0.9, 0.98) and decayed["eps"] == 1e-6       # RoBERTa's
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(p.dim() == 1 for p in plain["params"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [True], indirect=True)
def test_a_gpu_gives_the_same_bits_twice_where_asked(rows, tokenizer, precision, deterministic):
    where = {"device": torch.device("cuda", 0), "precision": precision}
    (one, a), (two, b) = (trained(rows, tokenizer, 20, where=where, dropout=0.1) for _ in range(2))
    assert a == b and all(x.equal(y) for x, y in zip(one.state_dict().values(), two.state_dict().values()))


def test_held_out_rows_are_scored_once_however_many_tokens_are_asked_for(rows, tokenizer):
    model, held = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0), copy.copy(rows["heldout"])
    held.per_epoch = 3      # a small corpus
    whole = held.per_epoch * held.row_tokens
    assert evaluate_mlm(model, held, tokens=whole, **CPU) == evaluate_mlm(model, held, tokens=2 * whole, **CPU)


def test_batches_are_static_where_blocks_are_compiled(rows):
    corpus, s = rows["train"], PretrainSettings(2, 512, 0.0, 1, 0)
    for static in (False, True):
        for ours, plain in zip(staged(microbatches(corpus, s), corpus, CPU["device"], static), microbatches(corpus, s), strict=True):
            wanted = static_batch(corpus, plain) if static else plain
            assert ours.max_seqlen == wanted.max_seqlen and ours.cu_seqlens.equal(wanted.cu_seqlens) and ours.ids.equal(plain.ids)


def test_attention_is_put_back_after_compiled_blocks():
    attention = rt.model.attention_qkv
    with compiled([torch.nn.Linear(2, 2)], CPU["device"]):
        assert rt.model.attention_qkv is not attention
    assert rt.model.attention_qkv is attention


def test_attention_is_put_back_if_blocks_cannot_be_compiled(monkeypatch):
    attention, block = rt.model.attention_qkv, torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "compile", lambda *args, **flags: 1 / 0)
    with pytest.raises(ZeroDivisionError), compiled([block], CPU["device"]):
        pass
    assert rt.model.attention_qkv is attention and "forward" not in vars(block)


def test_graphs_need_the_kernels(monkeypatch):
    for run in (True, False):
        monkeypatch.setattr(rt.speed.graphs, "kernels_run", lambda device: run)
        with nullcontext() if run else pytest.raises(InputError, match="the references would run"):
            check_graphs(True, Ranks(torch.device("cuda", 0)))
