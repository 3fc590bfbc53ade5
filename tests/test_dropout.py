"""dropout of rows: the kernel's mask equals the reference's, and K runs side by side drop what each run alone drops."""
import math

import pytest
import torch
from conftest import far_apart

from kernels import dropout, site_seeds
from kernels.dropout import _dropout, dropout_ref, threshold_of, words_ref

SEEDS = torch.tensor([7, -(2**62) + 12345, 2**40 + 5, 0])
SHAPES = [(7, 5, 1), (40, 300, 4), (33, 768, 3), (70, 20, 2), (2, 1100, 2)]      # rows, width, runs: blocks are never full


def compared(device, dtype, N, d, K, p=0.3):
    """Output and gradient of kernel and reference, on every second row of a wider tensor, for a non-uniform upstream gradient."""
    g = torch.Generator().manual_seed(0)
    x, up = (torch.randn(N, 2, d, generator=g).to(device, dtype)[:, i] for i in range(2))
    x, seed, out = x.requires_grad_(), SEEDS[:K].to(device), []
    for function in (dropout, dropout_ref):
        y = function(x, p, seed)
        out.append([y, *torch.autograd.grad(y, x, up)])
    return x, out


@pytest.mark.parametrize("N, d, K", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_and_reference_drop_the_same(device, dtype, N, d, K):
    x, (ours, theirs) = compared(device, dtype, N, d, K)
    for a, b in zip(ours, theirs):
        assert torch.equal(a == 0, b == 0) and a.dtype == dtype
        torch.testing.assert_close(a, b)
    kept = ours[0] != 0
    for y in (ours[0], theirs[0]):
        torch.testing.assert_close(y[kept], (x[kept].double() / 0.7).to(dtype), rtol=2e-7, atol=0)     # one rounding
    N_k = N // K
    alone = [dropout(x[k * N_k:(k + 1) * N_k], 0.3, SEEDS[k:k + 1].to(device)) for k in range(K)]
    assert torch.equal(torch.cat(alone), ours[0])


def test_columns_that_are_not_contiguous_and_uneven_seeds(device):
    x = torch.randn(20, 9, device=device).T
    seed = site_seeds(SEEDS.to(device), range(3)).T[1]     # every fourth number
    assert not x.is_contiguous() and not seed.is_contiguous()
    assert torch.equal(dropout(x, 0.5, seed), dropout_ref(x, 0.5, seed))
    with pytest.raises(ValueError, match="multiple of K rows"):
        dropout(x, 0.5, SEEDS[:2].to(device))
    with pytest.raises(ValueError, match=r"\(K,\) int64 need"):
        dropout(x, 0.5, SEEDS[0].to(device))
    with pytest.raises(ValueError, match=r"\(K,\) int64 need"):
        dropout(x, 0.5, SEEDS[:0].to(device))
    with pytest.raises(ValueError, match="torch.int32"):
        dropout(x, 0.5, SEEDS[:1].int().to(device))
    with pytest.raises(ValueError, match=r"rows \(N, d\), not \(9, 4, 5\)"):
        dropout(x.reshape(9, 4, 5), 0.5, SEEDS[:1].to(device))
    for p in (-1.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            dropout(x, p, SEEDS[:1].to(device))


def test_nothing_is_dropped_without_a_seed_or_probability(device):
    x = torch.randn(3, 4, device=device)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, SEEDS.to(device)) is x
    assert dropout(x[:0], 0.5, SEEDS.to(device)).shape == (0, 4)


def test_words_differ_between_streams_and_follow_both_halves_of_a_seed():
    """Of 2^15 random words some would be equal; a stream is a bijection of its place, and the streams share no place. a is odd."""
    a, b, c = (words_ref(SEEDS[:1], stream, 1, 2**14)[0] for stream in range(3))
    assert (a % 2 == 1).all() and torch.cat([b, c]).unique().numel() == 2**15
    assert torch.cat([a & ~1, b & ~1, c & ~1]).unique().numel() > 3 * 2**14 - 8
    for other in (SEEDS[:1] + 1, SEEDS[:1] + 2**32, SEEDS[:1] - 2**63):
        assert (words_ref(other, 1, 1, 2**14)[0] == b).sum() <= 1
    sites = site_seeds(torch.arange(100), range(-2, 40))        # no two runs meet at different places
    assert torch.equal(site_seeds(torch.arange(100), range(-2, 40, 2)), sites[::2])
    assert sites.shape == (42, 100) and sites.unique().numel() == 4200
    assert [threshold_of(p) for p in (0.0, 0.5, 1 - 2**-40)] == [-2**31, 0, 2**31 - 1]      # all fit into an int32


def test_rows_further_than_2_to_the_31_elements_apart(device):
    x, seed = torch.randn(3, 40, device=device, dtype=torch.float16), SEEDS[:3].to(device)
    assert torch.equal(dropout(far_apart(x, 2**30), 0.3, seed), dropout(x, 0.3, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_share_it_should_and_the_mean(dtype):
    p, x = 0.1, torch.ones(1024, 512, dtype=dtype)
    y = dropout_ref(x, p, SEEDS[:1]).double()
    keep = (y != 0).double()
    sd = math.sqrt(p * (1 - p) / x.numel())
    assert abs(keep.mean() - 0.9) < 4 * sd
    assert abs(y[y != 0].mean() * 0.9 - 1) < torch.finfo(dtype).eps / 4 + 1e-6      # not what 1 / 0.9 is in bf16, .17 % less
    other = (dropout_ref(x, p, SEEDS[1:2]) != 0).double()
    assert abs(((keep - 0.9) * (other - 0.9)).mean()) < 4 * p * (1 - p) / math.sqrt(x.numel())


def test_the_op_is_registered_as_torch_wants_it(device):
    torch.library.opcheck(_dropout.op, (torch.randn(6, 5, device=device, requires_grad=True), 0.3, SEEDS[:2].to(device)))


@pytest.mark.parametrize("fuse", ["kernel", "compiler"])
def test_one_graph_under_torch_compile(device, monkeypatch, fuse):
    monkeypatch.setenv("RT_FUSE", fuse)
    x, graphs = torch.randn(6, 5, device=device, requires_grad=True), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: 2 * dropout(x, 0.3, SEEDS[:2].to(device)), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), 2 * dropout(x, 0.3, SEEDS[:2].to(device)))
    ours = [node for node in graphs[0].graph.nodes if "recyclable" in str(node.target)]
    assert len(ours) == (1 if fuse == "kernel" else 0)      # the compiler gets the op to fuse only if asked
    asked = []
    monkeypatch.setitem(dropout.__globals__, "_dropout", lambda *a: asked.append(a) or _dropout(*a))
    dropout(x, 0.3, SEEDS[:2].to(device))
    assert asked        # without torch.compile it is the kernel


def test_what_rt_fuse_may_be(device, monkeypatch):
    monkeypatch.setenv("RT_FUSE", "perhaps")
    with pytest.raises(ValueError, match="kernel, compiler"):
        dropout(torch.ones(2, 2, device=device), 0.5, SEEDS[:1].to(device))
