"""Paths between models: their points against formulas, barriers against known ones, a curve that goes around a barrier."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_base

from rt.data import Encoded, TaskData
from rt.deltas import attach
from rt.errors import InputError
from rt.kinds import DeltaConfig
from rt.losses import weights_of
from rt.model import Classifier
from rt.report import analysis as paths
from rt.tune import TuneSettings, evaluate, predict

CPU = dict(device=torch.device("cpu"), precision=torch.float32)
POINTS = [i / 10 for i in range(11)]


def classifier(tokenizer, seed: int = 0, kind: str = "full", outputs: int = 3) -> Classifier:
    """A random model with confident predictions."""
    model = attach(random_base(tokenizer, seed, std=0.2), DeltaConfig(kind), outputs, seed)
    with torch.no_grad():
        for p in (model.head.dense.weight, model.head.out.weight):
            p.mul_(10)
    return model.eval()


def permuted(model: Classifier) -> Classifier:
    """The same function with the hidden units of every feed-forward layer in another order."""
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for block in other.encoder.layers:
        order = torch.randperm(block.intermediate.out_features, generator=g)
        for p, dim in ((block.intermediate.weight, 0), (block.intermediate.bias, 0), (block.output.weight, 1)):
            p.data = p.data.index_select(dim, order)
    return other


def said_by(model: Classifier, n: int = 48, seed: int = 0) -> Encoded:
    """Random texts labelled by the model itself, so it makes no errors on them."""
    g = torch.Generator().manual_seed(seed)
    texts = [[0, *torch.randint(5, 500, (3 + i % 9,), generator=g).tolist(), 2] for i in range(n)]
    return Encoded(texts, predict(model, texts, **CPU).argmax(-1), 0)


def losses(model: Classifier, path, data: Encoded) -> list[dict]:
    return [*paths.walk(model, path, POINTS, data, **CPU)]


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_points_of_the_paths_are_those_of_their_formulas(mu):
    a, b, c = ({"w": torch.randn(3, generator=torch.Generator().manual_seed(s)), "same": torch.ones(2)} for s in range(3))
    torch.testing.assert_close(paths.linear(a, b)(mu)["w"], (1 - mu) * a["w"] + mu * b["w"])
    curve = paths.bezier(a, {"w": c["w"]}, b)(mu)
    torch.testing.assert_close(curve["w"], (1 - mu) ** 2 * a["w"] + 2 * mu * (1 - mu) * c["w"] + mu ** 2 * b["w"])
    assert torch.equal(curve["same"], a["same"])
    middle = {"w": (a["w"] + b["w"]) / 2}       # a curve with its control point in the middle is the line
    torch.testing.assert_close(paths.bezier(a, middle, b)(mu)["w"], paths.linear(a, b)(mu)["w"])


@pytest.mark.parametrize("losses, height", [
    ([1.0, 3.0, 2.0], 1.5), ([1.0, 1.4, 2.0], 0.0), ([2.0, 0.5, 1.0], 0.0), ([0.5, 0.5, 0.5], 0.0)])
def test_a_barrier_is_measured_from_the_line_between_the_ends(losses, height):
    assert paths.barrier([{"mu": mu, "loss": v} for mu, v in zip((0, 0.5, 1), losses)]) == pytest.approx(height)


def test_a_barrier_off_the_middle():
    assert paths.barrier([{"mu": m, "loss": v} for m, v in ((0, 1.0), (0.25, 3.0), (0.75, 3.0), (1, 5.0))]) == pytest.approx(1.0)


def test_the_ends_of_a_walk_are_the_models_themselves(tokenizer):
    a, b = classifier(tokenizer, 0), classifier(tokenizer, 1)
    data, before = said_by(a), {k: p.clone() for k, p in b.named_parameters()}
    rows = losses(b, paths.linear(weights_of(a), weights_of(b)), data)
    assert [row["mu"] for row in rows] == POINTS
    for row, model in ((rows[0], a), (rows[-1], b)):
        assert {k: row[k] for k in row if k not in ("mu", "loss")} == pytest.approx(evaluate(model, data, **CPU))
        assert row["loss"] == pytest.approx(F.cross_entropy(predict(model, data.sequences, **CPU), data.targets).item(), rel=1e-4)
    assert rows[0]["accuracy"] == 1.0 > rows[-1]["accuracy"]
    assert all(torch.equal(p, before[k]) for k, p in b.named_parameters())


def test_a_path_between_identical_models_is_flat(tokenizer):
    a = classifier(tokenizer)
    rows = losses(a, paths.linear(weights_of(a), weights_of(copy.deepcopy(a))), said_by(a))
    assert paths.barrier(rows) == pytest.approx(0, abs=1e-5) and {row["accuracy"] for row in rows} == {1.0}


def test_a_regression_has_a_path_too(tokenizer):
    a, b = classifier(tokenizer, 0, outputs=1), classifier(tokenizer, 1, outputs=1)
    texts = said_by(a).sequences
    rows = losses(b, paths.linear(weights_of(a), weights_of(b)), Encoded(texts, predict(a, texts, **CPU).squeeze(-1), 0))
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-6) and rows[0]["pearson"] == pytest.approx(1) and rows[-1]["loss"] > 0.01


def test_a_permuted_copy_has_the_same_function_and_a_barrier_that_a_trained_curve_lowers(tokenizer):
    a = classifier(tokenizer)
    b, data = permuted(a), said_by(a)
    ends = weights_of(a), weights_of(b)
    straight = losses(b, paths.linear(*ends), data)
    assert straight[0]["accuracy"] == straight[-1]["accuracy"] == 1.0 > min(row["accuracy"] for row in straight) + 0.1
    assert straight[0]["loss"] == pytest.approx(straight[-1]["loss"], abs=1e-4) and paths.barrier(straight) > 0.1
    task = TaskData("said", ("a", "b", "c"), data, data, data)
    control = paths.train_control(b, *ends, task, TuneSettings(60, 16, 3e-3, 60, seed=0), **CPU)
    assert set(control) == {f"encoder.layers.{i}.{part}" for i in range(2)
                            for part in ("intermediate.weight", "intermediate.bias", "output.weight")}
    curved = losses(b, paths.bezier(ends[0], control, ends[1]), data)
    assert curved[0]["accuracy"] == curved[-1]["accuracy"] == 1.0
    assert paths.barrier(curved) < 0.5 * paths.barrier(straight)


def test_the_control_point_is_a_function_of_the_seed_and_begins_in_the_middle(tokenizer):
    a = classifier(tokenizer, kind="lora")
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.head.out.weight += 1.0
    ends, data = (weights_of(a), weights_of(b)), said_by(a)
    task = TaskData("said", ("a", "b", "c"), data, data, data)
    one, two, other = (paths.train_control(b, *ends, task, TuneSettings(3, 8, 1e-3, 3, seed), **CPU) for seed in (0, 0, 1))
    assert one.keys() == {"head.out.weight"} and not one["head.out.weight"].requires_grad
    assert torch.equal(one["head.out.weight"], two["head.out.weight"]) and not torch.equal(one["head.out.weight"], other["head.out.weight"])
    begun = paths.train_control(b, *ends, task, TuneSettings(0, 8, 1e-3, 3, 0), **CPU)
    torch.testing.assert_close(begun["head.out.weight"], a.head.out.weight + 0.5)


def test_a_barrier_of_nan_is_nan_not_none():
    assert math.isnan(paths.barrier([{"mu": 0.0, "loss": 1.0}, {"mu": 0.5, "loss": math.nan}, {"mu": 1.0, "loss": 1.0}]))


def test_equal_ends_need_no_control_and_a_diverged_curve_is_an_error(tokenizer):
    model, other = classifier(tokenizer), classifier(tokenizer, seed=1)
    said = said_by(model)
    task, a = TaskData("t", ("a", "b", "c"), said, said, said), weights_of(model)
    assert paths.train_control(model, a, a, task, TuneSettings(2, 8, 1e-3, 1, seed=0), **CPU) == {}
    with pytest.raises(InputError, match="steps in a row before step 17 had no finite loss and gradient: lower `lr`"):
        paths.train_control(model, a, weights_of(other), task, TuneSettings(16, 8, 1e30, 16, seed=0), **CPU)
