"""Two processes (gloo) equal one process with the same global batch: losses, resuming with another number of ranks, the sharded optimizer
state. What one rank does for all; an error ends all."""
import copy
import json
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import command, forked, here

from rt.errors import InputError
from rt.formats.files import read_rows
from rt.optim import adamw, step_unless
from rt.speed.device import pick_device
from rt.speed.dist import Ranks, gather, join, load_state, zero

FLAGS = ("--preset", "tiny", "--vocab_size", "500", "--seq_len", "32", "--batch_tokens", "512", "--eval_tokens", "512", "--device", "cpu",
         "--precision", "fp32", "--dropout", "0.1", "--snapshots", "1", "--steps", "20")
TOLERANCE = 1e-5    # relative, of a loss: gradients are summed in another order


def losses(folder) -> list[float]:
    rows = [r for r in read_rows(folder / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 21))
    return [r["loss"] for r in rows]


@pytest.fixture(scope="module")
def home(graphs, tmp_path_factory):
    """A corpus, and the run of one process as reference: two microbatches per step, because two ranks have one each."""
    home = tmp_path_factory.mktemp("dist")
    lines = [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]
    (home / "one.txt").write_text("\n".join(lines[:300]))
    here("train.py", *FLAGS, *corpus(home), "--accumulation", "2", "--out", home / "alone")
    return home


def corpus(home) -> tuple:
    return "--stream", home / "one.txt", "--cache", home / "cache"


def test_two_ranks_are_one_with_the_same_batch(home):
    out = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *FLAGS, "--stream", home / "one.txt",
                  "--cache", home / "its_own_cache", "--out", home / "two")
    assert losses(home / "two") == pytest.approx(losses(home / "alone"), rel=TOLERANCE)
    assert out.count("sample:") == out.count("M0 (one)") == 1       # only one rank prints
    assert {f.name for f in (home / "two").iterdir()} == {f.name for f in (home / "alone").iterdir()}
    summaries = [json.loads((home / name / "summary.json").read_text())["stages"][0] for name in ("alone", "two")]
    assert [s["ranks"] for s in summaries] == [1, 2]
    assert summaries[0]["heldout"]["one"]["loss"] == pytest.approx(summaries[1]["heldout"]["one"]["loss"], rel=TOLERANCE)


def test_two_ranks_are_one_with_a_recipe(home):
    """Replay, Reptile and hidden states that stay near the previous base's."""
    lines = (home / "one.txt").read_text().splitlines()
    (home / "other.txt").write_text("\n".join(line[::-1] for line in lines[:200]))
    flags = (*FLAGS[4:], "--init", home / "alone" / "M0", "--stream", home / "other.txt", "--cache", home / "cache",
             "--replay", "0.25", "--align", "4", "--preserve", "3")
    here("train.py", *flags, "--accumulation", "2", "--out", home / "recipe")
    forked("train.py", *flags, "--out", home / "recipe_of_two")
    assert losses(home / "recipe_of_two") == pytest.approx(losses(home / "recipe"), rel=TOLERANCE)
    plain = [flag for flag in flags if flag not in ("--replay", "0.25", "--align", "4", "--preserve", "3")]
    here("train.py", *plain, "--accumulation", "2", "--out", home / "plain")
    assert losses(home / "plain") != pytest.approx(losses(home / "recipe"), rel=100 * TOLERANCE)


def test_shared_state_changes_nothing_and_one_process_goes_on_from_it(home):
    begun = forked("train.py", *FLAGS, *corpus(home), "--zero", "--out", home / "zero", "--stop_after", "10")
    assert begun.count("stopped in M0 after step 10 of 20") == 1
    here("train.py", *FLAGS, *corpus(home), "--accumulation", "2", "--out", home / "zero", "--resume")
    assert losses(home / "zero") == pytest.approx(losses(home / "alone"), rel=TOLERANCE)


@pytest.mark.parametrize("flags, words", [(("--batch_tokens", "256"), "multiple of 512"), (("--lr", "1e18"), "the loss at step")])
def test_what_is_wrong_ends_all_ranks(home, flags, words, tmp_path):
    error = forked("train.py", *FLAGS, *corpus(home), "--out", tmp_path / "out", *flags, code=2)
    assert error.startswith("error: ") and words in error and "Traceback" not in error


def test_what_is_for_one_process_and_what_is_not(monkeypatch, tmp_path):
    assert "--zero shares" in here("train.py", "--zero", "--out", tmp_path / "out", code=2)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "--mode tune is for one process" in here("train.py", "--mode", "tune", code=2)


def test_shares_of_a_state_fit_together_and_rank_0_goes_first_and_its_errors_are_everyones(tmp_path):
    order, late = tmp_path / "order", tmp_path / "late"
    order.touch()

    def train(optimizer, weights, steps):
        for step in steps:
            for i, w in enumerate(weights):
                w.grad = torch.full_like(w, i + step) + w.detach()
            optimizer.step()

    def fresh(is_shared):
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (3,), (2, 2), (5,))]
        return weights, adamw(weights, 0.1, 0.01, make=zero if is_shared else torch.optim.AdamW)

    def bad():
        raise InputError("only rank 0 saw it")

    def work():
        ranks = join("cpu")
        assert ranks.from_main(lambda: ranks.rank) == 0 and ranks.mean(torch.tensor([float(ranks.rank)])).item() == 0.5
        ranks.main_first(lambda: order.write_text(order.read_text() + str(ranks.rank)))
        if ranks.rank == 1:                     # rank 0 does not read what rank 1 has not written
            time.sleep(1)
            late.touch()
        ranks.wait()
        assert late.exists()

        weights, optimizer = fresh(False)
        train(optimizer, weights, range(6))
        half, shared = fresh(True)
        train(shared, half, range(3))
        assert 0 < len(shared.optim.state) < 4
        gather(shared)
        state = ranks.from_main(shared.state_dict)
        for is_shared in (True, False):            # shared out again, and by one alone
            again, optimizer = fresh(is_shared)
            for new, old in zip(again, half):
                new.data.copy_(old.data)
            load_state(optimizer, copy.deepcopy(state))     # or its tensors would be trained
            train(optimizer, again, range(3, 6))
            for a, b in zip(weights, again):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

        ranks.assert_same({"--lr": 0.1, "corpus a": "1"})
        with pytest.raises(InputError, match="^corpus a is 2 on rank 1 and 1 on rank 0: start all with the same flags and files$"):
            ranks.assert_same({"--lr": 0.1, "corpus a": "12"[ranks.rank]})
        ranks.from_main(bad)

    error = forked("worker", code=2, main=work)
    assert error == 2 * "error: only rank 0 saw it\n" and order.read_text() == "01"


def test_a_cuda_device_becomes_the_current_one(monkeypatch):
    """Graphs are captured on the current device's streams, whatever device the work uses."""
    current, second = [], torch.device("cuda:1")
    monkeypatch.setattr("rt.speed.device.torch", SimpleNamespace(empty=lambda n, device: SimpleNamespace(device=torch.device(device)),
                                                                 cuda=SimpleNamespace(set_device=current.append)))
    assert pick_device("cuda:1") == second and current == [second] and pick_device("cpu").type == "cpu" and current == [second]


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    ranks = join("cpu")
    assert ranks == Ranks(torch.device("cpu")) and ranks.is_main and not torch.distributed.is_initialized()
    assert ranks.from_main(lambda: 5) == ranks.main_first(lambda: 5) == 5
    ranks.leave()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="with torchrun"):
        join("cpu")


def test_commands_for_one_process_say_so(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("predict", "convert"):
        assert f"rt.runs.{name} is for one process: leave torchrun out" in here("-m", f"rt.runs.{name}", code=2)


def test_a_loaded_state_is_a_copy():
    def optimizer():
        w = torch.nn.Parameter(torch.ones(2, 3))
        w.grad = torch.ones_like(w)
        found = adamw([w], 1e-3, 0.0)
        found.step()
        return found

    mine, state = optimizer(), optimizer().state_dict()
    kept = state["state"][0]["exp_avg"].clone()
    load_state(mine, state)
    mine.step()
    assert state["state"][0]["exp_avg"].equal(kept)


def test_any_rank_counts_and_a_shared_optimizer_skips():
    def work():
        ranks = join("cpu")
        assert ranks.any(ranks.rank == 1) and not ranks.any(False)
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (3,))]
        shared = adamw(weights, 0.1, 0.01, make=zero)
        for skip in (0.0, 1.0):
            before = [w.detach().clone() for w in weights]
            for w in weights:
                w.grad = torch.full_like(w, float("nan") if skip else 1.0)
            step_unless(shared, torch.tensor(skip))
            assert all(map(torch.equal, before, weights)) == bool(skip)
        ranks.leave()

    forked("worker", main=work)


def test_more_ranks_than_gpus(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="no GPU for rank 1 of this machine, which has 1: lower --nproc_per_node"):
        join("auto")
