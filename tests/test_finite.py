"""Non-finite numbers: a step without a finite loss or gradient changes nothing and is counted. Too many in a row end the run with advice.
An error names what does not fit into memory."""
import copy
import json

import pytest
import torch
from conftest import here, pretrained

import rt.pretrain
import rt.report.analysis
from rt.data import Encoded, Rows, TaskData
from rt.deltas import attach, extract
from rt.errors import Diverged, InputError
from rt.formats.checkpoint import load_base
from rt.formats.corpora import build_corpus
from rt.formats.files import read_json, read_rows
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, run_teacher, weights_of
from rt.model import PRESETS, EncoderConfig, new_masked_lm
from rt.optim import MOST_SKIPPED, SkipTracker, adamw, step_unless
from rt.pretrain import PretrainSettings
from rt.recycling import Recycling, recycle
from rt.runs.resume import checkpoints
from rt.transport import learn_projection
from rt.tune import TuneSettings, predict, tune

CPU = {"device": torch.device("cpu"), "precision": torch.float32}


@pytest.fixture(scope="module")
def rows(graphs, tokenizer, tmp_path_factory):
    corpus = build_corpus("graphs", graphs / "corpus", tokenizer, tmp_path_factory.mktemp("bins"))
    return Rows(corpus["train"], tokenizer, seq_len=32, mask_rate=0.3, seed=0)


def poisoned(model: torch.nn.Module, steps: set[int], where: str) -> None:
    """From now on, the training passes in `steps` (counted from 1) have a loss, or only a gradient, that is not finite."""
    weight = model.encoder.embeddings.norm.weight
    weight.passes = 0

    def forward(module, arguments, output):
        if module.training:
            weight.passes += 1
        return output * float("nan") if module.training and weight.passes in steps and where == "loss" else output

    model.encoder.embeddings.register_forward_hook(forward)
    weight.register_hook(lambda grad: grad * float("inf") if weight.passes in steps and where == "gradient" else grad)


def start(tokenizer):
    model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    return model, adamw(model.parameters(), 0.0, 0.01)


def equal(a: dict, b: dict) -> bool:
    return all(x.equal(y) for x, y in zip(a.values(), b.values()))


def test_a_step_is_skipped_whole_or_taken_whole():
    def fresh():
        torch.manual_seed(0)
        weights = [torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)]
        for w in weights:
            w.grad = torch.randn_like(w)
        return weights, adamw(weights, 0.1, 0.5)

    (plain, one), (ours, other) = fresh(), fresh()
    for step in range(3):
        one.step()
        step_unless(other, torch.tensor(0.0))
        before = [w.detach().clone() for w in ours], copy.deepcopy(other.state_dict()["state"])
        kept = [w.grad.clone() for w in ours]
        for w in ours:
            w.grad = w.grad * float("nan")
        step_unless(other, torch.tensor(1.0))
        for w, grad in zip(ours, kept):
            w.grad = grad
        assert all(a.equal(b) for a, b in zip(before[0], ours))
        after = other.state_dict()["state"]
        assert all(after[i][k].equal(v) for i, state in before[1].items() for k, v in state.items())
    assert all(a.equal(b) for a, b in zip(plain, ours)) and one.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_bad_step_of_pretraining_is_left_out(rows, tokenizer, where, log_every, tmp_path):
    s = PretrainSettings(8, 512, 2e-3, 3, 0)
    model, optimizer = start(tokenizer)
    poisoned(model, {5}, where)
    found = pretrained(tmp_path / "one", model, rows, optimizer, s, tokenizer, log_every=log_every)
    assert [row["step"] for row in found] == list(range(1, 9)) and [row["step"] for row in found if "skipped" in row] == [5]
    assert found[4]["grad_norm"] is None and (found[4]["loss"] is None) == (where == "loss")
    json.dumps(found, allow_nan=False)
    other, optimizer = start(tokenizer)     # as if step 5 did not exist
    pretrained(tmp_path / "other", other, rows, optimizer, s, tokenizer, log_every=log_every, stop_after=4)
    rest = pretrained(tmp_path / "other", other, rows, optimizer, s, tokenizer, log_every=log_every, first=5)
    assert rest[4:] == found[5:] and equal(model.state_dict(), other.state_dict())


def test_too_many_in_a_row_end_it_and_fewer_do_not(rows, tokenizer, tmp_path):
    s = PretrainSettings(MOST_SKIPPED + 4, 512, 2e-3, 3, 0)
    for last, ends in ((MOST_SKIPPED + 1, False), (MOST_SKIPPED + 2, True)):
        model, optimizer = start(tokenizer)
        poisoned(model, set(range(2, last + 1)), "loss")
        if ends:
            with pytest.raises(Diverged, match=f"the loss at step 2 or its gradient is not finite, nor .* the {MOST_SKIPPED} steps"):
                pretrained(tmp_path / "a", model, rows, optimizer, s, tokenizer, log_every=5)
        else:
            found = pretrained(tmp_path / "b", model, rows, optimizer, s, tokenizer, log_every=5)
            assert sum("skipped" in row for row in found) == MOST_SKIPPED
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_that_diverges_says_where_to_begin_again(graphs, tmp_path):
    lines = [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]
    (tmp_path / "one.txt").write_text("\n".join(lines[:300]))
    flags = ("train.py", "--preset", "tiny", "--vocab_size", "500", "--seq_len", "32", "--batch_tokens", "256", "--device", "cpu",
             "--steps", "40", "--lr", "1e18", "--warmup", "0.5", "--stream", tmp_path / "one.txt", "--cache",
             tmp_path / "cache", "--snapshots", "0")
    error = here(*flags, "--out", tmp_path / "run", "--save_every", "1", code=2)
    last = checkpoints(tmp_path / "run")[0]
    step = json.loads((last / "meta.json").read_text())["step"]
    assert f"{last} is of step {step} of M0; --init" in error and error.count("\n") == 1
    load_base(last)
    seen = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in seen if "skipped" in row] == list(range(step + 1, step + 1 + MOST_SKIPPED))
    assert "no checkpoint of it had been written" in here(*flags, "--out", tmp_path / "other", code=2)
    assert not list(tmp_path.glob("*.lock"))
    few = here(*flags, "--out", tmp_path / "few", "--steps", "5", "--warmup", "0", code=2)       # fewer steps than may be skipped in a row
    assert "the held-out loss of M0 is not finite: lower --lr" in few and not (tmp_path / "few" / "M0").exists()


def task() -> TaskData:
    g = torch.Generator().manual_seed(0)
    sequences = [[0, *torch.randint(5, 500, (int(n),), generator=g).tolist(), 2] for n in torch.randint(1, 20, (12,), generator=g)]
    part = Encoded(sequences, torch.randint(3, (12,), generator=g), 0)
    return TaskData("t", ("a", "b", "c"), part, part, part)


def test_bad_steps_of_tuning_are_counted_and_too_many_end_it(base):
    s, seen = TuneSettings(15, 4, 1e-3, 5, seed=0), []
    model = attach(base, DeltaConfig("full"), 3, seed=0)
    poisoned(model, {2, 7, 8}, "gradient")
    result = tune(model, task(), Loss(False), s, **CPU, on_eval=seen.append)
    assert result.skipped == 3 and [row.get("skipped") for row in seen] == [None, 1, 2, None]
    assert all(row["loss"] is None or row["loss"] < 10 for row in seen)
    for many in ({*range(1, MOST_SKIPPED + 1)}, {*range(3, MOST_SKIPPED + 4)}):
        model = attach(base, DeltaConfig("full"), 3, seed=0)
        poisoned(model, many, "loss")
        if len(many) > MOST_SKIPPED:
            with pytest.raises(Diverged, match="more than 10 steps in a row before step 16 had no finite loss and gradient: lower `lr`"):
                tune(model, task(), Loss(False), s, **CPU)
        else:
            assert tune(model, task(), Loss(False), s, **CPU).skipped == MOST_SKIPPED


def test_a_row_of_bad_steps_is_seen_across_looks():
    tracker, bad, good = SkipTracker(torch.device("cpu")), torch.tensor(float("nan")), torch.tensor(2.0)
    for value in (good, *[bad] * 6):
        tracker.count(value, good)
    assert tracker.read() == [(2.0, 6, False)]
    for value in [bad] * 5:
        tracker.count(good, value)
    assert tracker.read() == [(None, 5, True)]
    tracker.count(good, good)
    assert tracker.read() == [(2.0, 0, False)]


def test_what_does_not_fit_into_memory_is_named(rows, tokenizer, base, monkeypatch, tmp_path):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

    data, model = task(), attach(base, DeltaConfig("lora"), 3, seed=0)
    with pytest.raises(InputError, match=r"4 sequences of up to [0-9]+ tokens did not fit into memory: lower `batch_size` \(4\) or"):
        tune(model, data, full, TuneSettings(3, 4, 1e-3, 5, seed=0), **CPU)
    model.forward = full
    with pytest.raises(InputError, match="12 texts of up to [0-9]+ tokens did not fit into memory: lower `seq_len`"):
        predict(model, data.train.sequences, **CPU)
    monkeypatch.setattr(rt.pretrain, "linear_cross_entropy", full)
    model, optimizer = start(tokenizer)
    with pytest.raises(InputError, match=r"a share of 512 tokens did not fit into memory: lower `batch_tokens` \(1024\), or raise `accum"):
        pretrained(tmp_path, model, rows, optimizer, PretrainSettings(2, 1024, 1e-3, 1, 0, accumulation=2), tokenizer)


def test_nor_does_a_teacher_a_projection_or_a_curve_end_with_a_traceback(base, other_base, monkeypatch):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    data, s, config = task(), TuneSettings(3, 4, 1e-3, 5, seed=0), DeltaConfig("lora")
    teacher = attach(base, config, 3, seed=0)
    delta = extract(teacher, base, config, {"task": "t", "labels": list(data.labels)})
    with monkeypatch.context() as patch, pytest.raises(InputError, match="for 12 texts, .* did not fit into memory: lower .*`shots` or"):
        patch.setattr(teacher, "forward", full)
        run_teacher(teacher, data.train, **CPU)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"lower `batch_size` \(4\), `seq_len` or `rank`"):
        patch.setattr(Loss, "__call__", full)
        learn_projection(base, other_base, [(delta, data)], s, DistillConfig(), r=2, granularity="flat", residual=False, **CPU)
    whole = extract(attach(base, DeltaConfig("full"), 3, seed=0), base, DeltaConfig("full"), delta.info)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"gradient of 4 sequences did not fit .*`batch_size` \(4\)"):
        patch.setattr(Loss, "__call__", full)
        recycle(Recycling(base, whole, other_base, data, whole.config, s, DistillConfig(), **CPU), "gradmask")
    ends = [weights_of(attach(each, config, 3, seed=0)) for each in (base, other_base)]
    with monkeypatch.context() as patch, pytest.raises(InputError, match="tokens on the curve did not fit into memory: lower `batch"):
        patch.setattr(Loss, "__call__", full)
        rt.report.analysis.train_control(teacher, *ends, data, s, **CPU)


def test_the_loss_of_a_skipped_step_is_not_in_the_mean():
    tracker, good = SkipTracker(torch.device("cpu")), torch.tensor(2.0)
    for loss, norm in ((2.0, 1.0), (9.0, float("nan")), (float("inf"), 1.0), (4.0, 1.0)):
        tracker.count(good * 0 + loss, good * norm)
    assert tracker.read() == [(3.0, 2, False)]


def test_skipped_steps_are_counted_across_an_interruption(rows, tokenizer, tmp_path):
    s, (model, optimizer) = PretrainSettings(8, 512, 2e-3, 3, 0), start(tokenizer)
    poisoned(model, {2, 5}, "loss")
    for _ in range(2):
        pretrained(tmp_path / "run", model, rows, optimizer, s, tokenizer, stop_after=3)
    newest = read_json(checkpoints(tmp_path / "run")[0] / "meta.json")
    assert newest["step"] == 6 and newest["skipped"] == 2


def test_bad_steps_that_are_not_in_a_row_do_not_end_it(rows, tokenizer, tmp_path):
    model, optimizer = start(tokenizer)
    bad = {*range(1, 2 * MOST_SKIPPED + 4, 2)}
    poisoned(model, bad, "loss")
    found = pretrained(tmp_path / "run", model, rows, optimizer, PretrainSettings(max(bad) + 1, 512, 2e-3, 3, 0), tokenizer)
    assert {row["step"] for row in found if "skipped" in row} == bad and len(bad) > MOST_SKIPPED
