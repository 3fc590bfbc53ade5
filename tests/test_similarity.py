"""Attention maps, their divergences, CKA and distances: a model with itself, heads in another order, numbers by hand."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_base

from kernels import attention
from rt.data import sequences_batch
from rt.deltas import attach
from rt.kinds import DeltaConfig
from rt.losses import weights_of
from rt.model import Classifier
from rt.report import analysis as similarity
from rt.report import studies

CPU = torch.device("cpu")
TEXTS = [[0, 17, 45, 200, 33, 2], [0, 9, 2], [0, 51, 52, 53, 54, 55, 56, 57, 300, 2]]


def classifier(tokenizer, seed: int = 0, kind: str = "full") -> Classifier:
    return attach(random_base(tokenizer, seed, std=0.3), DeltaConfig(kind), 3, seed).eval()


def heads_exchanged(model: Classifier) -> Classifier:
    """The same function with the two heads of every layer exchanged."""
    other = copy.deepcopy(model)
    for block in other.encoder.layers:
        D = block.qkv.in_features // block.num_heads
        order = torch.arange(block.qkv.in_features).view(block.num_heads, D).flip(0).flatten()
        thirds = torch.cat([order + i * len(order) for i in range(3)])
        block.qkv.weight.data, block.qkv.bias.data = block.qkv.weight.data[thirds], block.qkv.bias.data[thirds]
        block.attention_output.weight.data = block.attention_output.weight.data[:, order]
    return other


def test_maps_are_the_weights_that_attention_uses(tokenizer):
    model = classifier(tokenizer)
    batch, block = sequences_batch(TEXTS[:1]), model.encoder.layers[0]
    x = model.encoder.embeddings(batch.ids, batch.cu_seqlens)
    q, k, v = block.qkv(x).view(len(x), 3, block.num_heads, -1).unbind(1)
    maps = similarity.attention_maps(model, TEXTS[0], CPU)
    assert maps.shape == (2, 2, 6, 6) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 6))
    torch.testing.assert_close(torch.einsum("hij,jhd->ihd", maps[0], v), attention(q, k, v, batch.cu_seqlens, batch.max_seqlen))


def test_a_sequence_has_the_same_states_alone_and_among_others(tokenizer):
    model = classifier(tokenizer)
    together, alone = (similarity.run_layers(model, texts, CPU)[0] for texts in (TEXTS, TEXTS[2:]))
    torch.testing.assert_close(together[:, -len(TEXTS[2]):], alone)
    torch.testing.assert_close(alone[-1], model.encoder(sequences_batch(TEXTS[2:])))


def test_keys_of_a_prefix_are_left_out_of_the_maps(tokenizer):
    maps = similarity.attention_maps(classifier(tokenizer, kind="prefix"), TEXTS[0], CPU)      # its gate is closed
    torch.testing.assert_close(maps, similarity.attention_maps(classifier(tokenizer), TEXTS[0], CPU))


def test_a_model_with_itself_is_perfect(tokenizer):
    model = classifier(tokenizer)
    matrix = similarity.head_divergence(model, model, TEXTS, CPU)
    assert matrix.shape == (4, 4) and 0 <= matrix.min() and matrix.max() <= math.log(2)
    torch.testing.assert_close(matrix, matrix.T)
    facts = similarity.match_summary(matrix)
    assert facts["share_own_best"] == 1.0 and facts["own"] == pytest.approx(0, abs=1e-6) and facts["best_other"] > 0.01
    alike = similarity.cka(model, model, TEXTS, CPU)
    torch.testing.assert_close(alike.diagonal(), torch.ones(3))
    assert all(row["l2"] == 0 and row["cosine"] == pytest.approx(1) for row in similarity.distances(weights_of(model), weights_of(model)))


def test_heads_in_another_order_are_found_where_they_are(tokenizer):
    a = classifier(tokenizer)
    b = heads_exchanged(a)
    batch = sequences_batch(TEXTS)
    torch.testing.assert_close(a(batch), b(batch), atol=1e-4, rtol=1e-4)
    own, matrix = (similarity.head_divergence(a, m, TEXTS, CPU) for m in (a, b))
    torch.testing.assert_close(matrix, own[:, [1, 0, 3, 2]], atol=1e-5, rtol=1e-3)
    facts = similarity.match_summary(matrix)
    assert facts["share_own_best"] == 0.0 and facts["best"] == pytest.approx(0, abs=1e-5) and facts["best_other"] == facts["best"]
    torch.testing.assert_close(similarity.cka(a, b, TEXTS, CPU).diagonal(), torch.ones(3))


def test_a_model_of_another_start_is_less_alike(tokenizer):
    a, b = classifier(tokenizer, 0), classifier(tokenizer, 1)
    near = copy.deepcopy(a)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    facts = {name: similarity.match_summary(similarity.head_divergence(a, m, TEXTS, CPU)) for name, m in (("near", near), ("far", b))}
    assert facts["near"]["own"] < 0.3 * facts["far"]["own"] and facts["near"]["share_own_best"] == 1.0
    assert similarity.cka(a, near, TEXTS, CPU)[2, 2] > similarity.cka(a, b, TEXTS, CPU)[2, 2]


def test_divergence_by_hand(monkeypatch):
    """Maps of two heads: every row on the first key, or uniform; for one sequence of 2 and one of 4 tokens."""
    def maps(model, sequence, device):
        n = len(sequence)
        first = torch.zeros(n, n).index_fill(1, torch.tensor(0), 1.0)
        last = torch.zeros(n, n).index_fill(1, torch.tensor(n - 1), 1.0)
        return torch.stack([first, torch.full((n, n), 1 / n) if model == "a" else last])[None]
    monkeypatch.setattr(similarity, "attention_maps", maps)
    matrix = similarity.head_divergence("a", "b", [[0, 2], [0, 1, 1, 2]], CPU)

    def against_even(n: int) -> float:      # one-hot against 1/n
        one, rest = (1 + 1 / n) / 2, 1 / (2 * n)
        return -one * math.log(one) - (n - 1) * rest * math.log(rest) - math.log(n) / 2

    even = (2 * against_even(2) + 4 * against_even(4)) / 6      # a mean over query tokens, not over sequences
    torch.testing.assert_close(matrix, torch.tensor([[0.0, math.log(2)], [even, even]]))


def test_the_summary_of_a_matrix():
    matrix = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.4, 0.5], [0.3, 0.3, 0.3]])
    assert similarity.match_summary(matrix) == pytest.approx(
        {"own": 0.8 / 3, "best_other": 0.6 / 3, "best": 0.5 / 3, "share_own_best": 1 / 3})      # a tie is not a match
    assert all(map(math.isnan, similarity.match_summary(matrix * math.nan).values()))       # of lost weights nothing is known


def test_cka_against_its_definition(tokenizer):
    a, b = classifier(tokenizer, 0), classifier(tokenizer, 1)
    got = similarity.cka(a, b, TEXTS, CPU)
    assert got.shape == (3, 3)
    X, Y = (similarity.run_layers(m, TEXTS, CPU)[0].double() for m in (a, b))
    H = torch.eye(X.shape[1], dtype=torch.float64) - 1 / X.shape[1]

    def hsic(x, y):
        return torch.trace(x @ x.T @ H @ y @ y.T @ H)

    want = torch.stack([torch.stack([hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt() for y in Y]) for x in X])
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)


def test_distances_by_hand():
    a = {"encoder.embeddings.word.weight": torch.tensor([[1.0, 0.0]]), "encoder.layers.0.output.bias": torch.tensor([0.0, 2.0]),
         "encoder.layers.10.output.bias": torch.tensor([1.0]), "encoder.layers.2.output.bias": torch.tensor([1.0]),
         "head.out.bias": torch.tensor([3.0, 4.0]), "only.in.a": torch.ones(5)}
    b = {"encoder.embeddings.word.weight": torch.tensor([[0.0, 1.0]]), "encoder.layers.0.output.bias": torch.tensor([3.0, 6.0]),
         "encoder.layers.10.output.bias": torch.tensor([-1.0]), "encoder.layers.2.output.bias": torch.tensor([1.0]),
         "head.out.bias": torch.tensor([0.0, 0.0])}
    rows = {row["part"]: row for row in similarity.distances(a, b)}
    assert list(rows) == ["embeddings", "layers.0", "layers.2", "layers.10", "head", "all"]
    assert rows["embeddings"] == pytest.approx({"part": "embeddings", "l2": 2 ** 0.5, "l2_per_weight": 1.0, "cosine": 0.0, "weights": 2})
    assert rows["layers.0"]["l2"] == pytest.approx(5) and rows["layers.0"]["cosine"] == pytest.approx(12 / (2 * 45 ** 0.5))
    assert rows["layers.10"]["cosine"] == pytest.approx(-1) and rows["layers.2"]["l2"] == 0
    assert rows["head"]["l2"] == pytest.approx(5) and rows["head"]["cosine"] == 0.0       # no direction, no cosine
    assert rows["all"]["weights"] == 8 and rows["all"]["l2"] == pytest.approx((2 + 25 + 4 + 25) ** 0.5)


@pytest.mark.parametrize("name, part", [("encoder.layers.3.qkv.weight", "layers.3"), ("layers.11.prefix.k", "layers.11"),
                                        ("embeddings.norm.bias", "embeddings"), ("head.dense.weight", "head")])
def test_the_part_of_a_name(name, part):
    assert similarity.part_of(name) == part


def test_by_default_heads_of_the_first_middle_and_last_layer_are_drawn():
    base = SimpleNamespace(encoder=SimpleNamespace(config=SimpleNamespace(num_layers=6, num_heads=4)))
    assert studies.chosen_heads(SimpleNamespace(heads=()), base) == [(0, 0), (3, 0), (5, 0)]
