"""add_norm: the reference against plain PyTorch, the kernels against the reference, unwanted gradients, K runs side by side."""
import pytest
import torch
import torch.nn.functional as F
from conftest import far_apart

from kernels import add_norm, dropout
from kernels.add_norm import _add_norm, _add_norm_backward, add_norm_ref, layer_norm, tiling

EPS, SEEDS = 1e-5, torch.tensor([7, -(2**62) + 12345, 2**40 + 5])


def inputs(N, d, dtype=torch.float64, wide=None, w_runs=0, b_runs=0, device="cpu"):
    """x in `wide`, h in `dtype`, each every second row of a wider tensor; weight and bias are fp32, (d,) or (K, d)."""
    g = torch.Generator().manual_seed(0)
    x, h = (torch.randn(N, 2, d, generator=g).to(device, t)[:, 1].detach() for t in (wide or dtype, dtype))
    weight, bias = (torch.randn(*((K,) if K else ()), d, generator=g).to(device) for K in (w_runs, b_runs))
    return [t.requires_grad_() for t in (x + 3, h, 1 + 0.3 * weight.detach(), bias)]


def everything(function, tensors, p=0.0, seed=None):
    """Output and all gradients, for a non-uniform upstream gradient whose rows are not contiguous."""
    y = function(*tensors, EPS, p, seed)
    up = torch.randn(len(y), 2, y.shape[1], generator=torch.Generator().manual_seed(5)).to(y)[:, 1]
    return [y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], up)]


def assert_within_twice_the_references_error(tensors, p=0.0, seed=None):
    """err(kernel) <= 2 err(reference in the same precision) + 2e-6 against the reference in float64, output and gradients."""
    ours, theirs = (everything(f, tensors, p, seed) for f in (add_norm, add_norm_ref))
    truth = everything(add_norm_ref, [t.detach().double().requires_grad_() for t in tensors], p, seed)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        err, budget = (a.double() - t).abs().max(), 2 * (b.double() - t).abs().max() + 2e-6 * t.abs().max()
        assert err <= budget, f"error {err:.2e}, budget {budget:.2e}"


def test_the_reference_is_plain_pytorch():
    x, h, weight, bias = (t.double() for t in inputs(6, 5))
    torch.testing.assert_close(add_norm(x, h, weight, bias, EPS), F.layer_norm(x + h, (5,), weight, bias, EPS))
    assert torch.equal(add_norm(x, h, weight, bias, EPS, 1.0, None), add_norm(x, h, weight, bias, EPS))      # without seeds p has no effect
    expected = F.layer_norm(x + dropout(h, 0.5, SEEDS[:1]), (5,), weight, bias, EPS)
    torch.testing.assert_close(add_norm(x, h, weight, bias, EPS, 0.5, SEEDS[:1]), expected)
    halves = [t.half() for t in (weight, bias)]
    for narrow in (halves, [weight, halves[1]]):
        assert torch.equal(add_norm_ref(x, h, *narrow, EPS, 0.0, None), add_norm_ref(x, h, *(t.float() for t in narrow), EPS, 0.0, None))
    x, h, weight, bias = inputs(6, 5, torch.float16, torch.float32)
    assert torch.equal(add_norm_ref(x, h, weight, bias, EPS, 0.0, None), add_norm_ref(x, h.float(), weight, bias, EPS, 0.0, None).half())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("N, d", [(5, 20), (37, 200), (30, 768), (3, 2500)])     # the last row of blocks is never full
@pytest.mark.parametrize("dtype, wide", [(torch.float32, None), (torch.float16, None), (torch.float16, torch.float32),
                                         (torch.float32, torch.float16), (torch.bfloat16, None)])
def test_kernels_are_the_reference_with_every_gradient(device, dtype, wide, N, d, p):
    assert_within_twice_the_references_error(inputs(N, d, dtype, wide, device=device), p, SEEDS[:1].to(device))


@pytest.mark.parametrize("w_runs, b_runs, seeds", [(3, 3, 3), (0, 3, 1), (3, 0, 0), (0, 0, 3), (1, 3, 3)])
def test_runs_side_by_side(device, w_runs, b_runs, seeds):
    N, d, p = 3 * 37, 100, 0.3 if seeds else 0.0
    tensors = inputs(N, d, torch.float32, w_runs=w_runs, b_runs=b_runs, device=device)
    seed = SEEDS[:seeds].to(device) if seeds else None
    assert_within_twice_the_references_error(tensors, p, seed)
    y, x, h, weight, bias = add_norm(*tensors, EPS, p, seed), *tensors
    for k in range(3 if seeds != 1 else 0):     # one seed for all runs means one long run of rows
        rows = slice(37 * k, 37 * (k + 1))
        own = (t[min(k, len(t) - 1)] if t.ndim == 2 else t for t in (weight, bias))
        assert torch.equal(y[rows], add_norm(x[rows], h[rows], *own, EPS, p, None if seed is None else seed[k:k + 1]))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_more_rows_than_one_turn_of_a_program(device, p, monkeypatch):
    monkeypatch.setitem(add_norm.__globals__, "PROGRAMS", 1)
    assert_within_twice_the_references_error(inputs(90, 200, torch.float32, device=device), p, SEEDS[:1].to(device))
    assert_within_twice_the_references_error(inputs(90, 40, torch.float32, b_runs=3, device=device), p, SEEDS[:3].to(device))
    assert_within_twice_the_references_error(inputs(30, 384, torch.float32, w_runs=3, device=device), p, SEEDS[:1].to(device))


def test_tiles_leave_no_lane_idle_if_narrower_ones_can_help():
    """Rows, tiles and columns of a tile."""
    found = [tuple(tiling(d, 4, 256).values()) for d in (40, 384, 512, 768, 1000, 1024)]
    assert found == [(16, 1, 64), (8, 3, 128), (4, 2, 256), (4, 3, 256), (4, 4, 256), (4, 4, 256)]
    assert tiling(1536, 2, 1024) == {"BLOCK_N": 4, "BLOCKS": 3, "BLOCK_D": 512}


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_each_gradient_alone_and_none_that_is_not_wanted(device, wanted, p, monkeypatch):
    tensors, asked = inputs(10, 24, torch.float16, device=device), []
    function = add_norm.__globals__["_add_norm_backward"]
    monkeypatch.setitem(add_norm.__globals__, "_add_norm_backward", lambda *a: asked.append(a[-1]) or function(*a))
    full = everything(add_norm, tensors, p, SEEDS[:1].to(device))
    some = everything(add_norm, [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)], p, SEEDS[:1].to(device))
    for got, i in zip(some[1:], wanted, strict=True):
        assert torch.equal(got, full[1 + i])
    assert asked[0] == [True, p > 0, True, True]        # without dropout, dh equals dx: one store
    assert asked[1] == [0 in wanted or (1 in wanted and not p), 1 in wanted and p > 0, 2 in wanted, 3 in wanted]


def test_without_gradients_nothing_is_kept(device, monkeypatch):
    kept = []
    monkeypatch.setitem(add_norm.__globals__, "_add_norm", lambda *a: kept.append(_add_norm(*a)) or kept[-1])
    x, h, weight, bias = inputs(4, 8, torch.float32, device=device)
    with torch.no_grad():
        y = add_norm(x, h, weight, bias, EPS)
    assert not y.requires_grad and [t.numel() for t in kept[0][1:]] == [0, 0]
    torch.testing.assert_close(y, add_norm_ref(x, h, weight, bias, EPS, 0.0, None))


def test_no_rows(device):
    x, h, weight, bias = inputs(4, 8, torch.float32, device=device)
    for p in (0.0, 0.3):
        y, *grads = everything(add_norm, [x[:0], h[:0], weight, bias], p, SEEDS[:1].to(device))
        assert y.shape == (0, 8) and [tuple(g.shape) for g in grads] == [(0, 8), (0, 8), (8,), (8,)] and not grads[2].any()


def test_rows_far_from_zero_and_constant_rows(device):
    x, h, weight, bias = inputs(6, 768, torch.float32, device=device)
    assert_within_twice_the_references_error([(t + 1000).detach().requires_grad_() for t in (x, h)] + [weight, bias])
    constant = torch.full_like(x, 2.0)
    torch.testing.assert_close(add_norm(constant, constant, weight, bias, EPS), bias.expand(6, 768))


def test_strides_that_are_not_rows(device):
    x, h, weight, bias = inputs(9, 40, torch.float32, device=device)
    expected = everything(add_norm_ref, [x, h, weight, bias])
    flipped = [t.detach().T.contiguous().T.requires_grad_() for t in (x, h)]      # columns are contiguous
    for a, b in zip(everything(add_norm, [*flipped, weight, bias]), expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    one = torch.autograd.grad(add_norm(x, h, weight, bias, EPS).sum(), [x, bias])       # an upstream gradient with stride 0
    torch.testing.assert_close(one, torch.autograd.grad(add_norm_ref(x, h, weight, bias, EPS, 0.0, None).sum(), [x, bias]))


def test_weights_and_seeds_of_runs_in_any_strides(device):
    tensors, seed = inputs(6, 24, torch.float32, w_runs=3, b_runs=3, device=device), SEEDS.to(device)
    loose = tensors[:2] + [torch.stack([t, -t], 1)[:, 0].detach().requires_grad_() for t in tensors[2:]]
    seeds = torch.stack([seed, -seed], 1)[:, 0]
    assert not any(t.is_contiguous() for t in (*loose[2:], seeds))
    for a, b in zip(everything(add_norm, loose, 0.3, seeds), everything(add_norm, tensors, 0.3, seed), strict=True):
        assert torch.equal(a, b)


def test_rows_further_than_2_to_the_31_elements_apart(device):
    x, h, weight, bias = inputs(3, 40, torch.float16, device=device)
    expected = add_norm(x, h, weight, bias, EPS)
    assert torch.equal(add_norm(far_apart(x, 2**30), far_apart(h, 2**30), weight, bias, EPS), expected)


def test_gradients_are_equal_bit_for_bit(device):
    tensors = inputs(70, 200, torch.float16, device=device)
    for a, b in zip(everything(add_norm, tensors, 0.2, SEEDS[:1].to(device)), everything(add_norm, tensors, 0.2, SEEDS[:1].to(device))):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused(device):
    tensors = inputs(4, 8, torch.float32, device=device)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(add_norm(*tensors, EPS).sum(), tensors, create_graph=True)


def test_wider_rows_and_float64_take_the_reference(device):
    for d, dtype in ((5000, torch.float32), (8, torch.float64)):
        tensors = [t.to(dtype) for t in inputs(2, d, dtype, device=device)]
        assert torch.equal(add_norm(*tensors, EPS), add_norm_ref(*tensors, EPS, 0.0, None))
    x, *others = inputs(2, 8, torch.float64, torch.float32, device=device)
    others = [t.double() for t in others]
    assert torch.equal(add_norm(x, *others, EPS), add_norm_ref(x, *others, EPS, 0.0, None))


def test_shapes_that_do_not_fit_are_said():
    x, h, weight, bias = inputs(6, 8, torch.float32)
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        add_norm(x, h[:3], weight, bias, EPS)
    for wrong in (weight[:4], weight[None, None]):
        with pytest.raises(ValueError, match=r"\(d,\) or \(K, d\)"):
            add_norm(x, h, wrong, bias, EPS)
    with pytest.raises(ValueError, match="equally many rows"):
        add_norm(x, h, weight, bias.repeat(4, 1), EPS)
    with pytest.raises(ValueError, match="one for all"):
        add_norm(x, h, weight.repeat(2, 1), bias.repeat(3, 1), EPS)
    with pytest.raises(ValueError, match="multiple of K rows"):
        add_norm(x, h, weight, bias, EPS, 0.5, torch.arange(4))
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        add_norm(x, h, weight, bias, EPS, 1.0, torch.arange(3))
    with pytest.raises(RuntimeError, match="unflatten"):
        layer_norm(x, weight.repeat(4, 1), bias, EPS)


@pytest.mark.parametrize("p, runs", [(0.0, 0), (0.3, 2)])
def test_ops_are_registered_as_torch_wants_them(device, p, runs):
    tensors = inputs(6, 8, torch.float32, b_runs=runs, device=device)
    seed = SEEDS[:runs].to(device) if p else None
    torch.library.opcheck(_add_norm.op, (*tensors, seed, EPS, p, True))
    y, z, stats = (t.detach() for t in _add_norm(*tensors, seed, EPS, p, True))
    for wanted in ([True] * 4, [False, p > 0, False, True]):
        torch.library.opcheck(_add_norm_backward.op, (torch.randn_like(y), z, stats, tensors[2].detach(), seed, p, max(runs, 1), wanted))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_graph_under_torch_compile(device, p):
    tensors, seed = inputs(6, 8, torch.float16, device=device), SEEDS[:1].to(device)
    compiled = torch.compile(lambda *a: 2 * add_norm(*a), fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for a, b in zip(everything(compiled, tensors, p, seed), everything(lambda *a: 2 * add_norm(*a), tensors, p, seed)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fuse", ["kernel", "compiler"])
def test_the_compiler_gets_it_to_fuse_only_if_asked(device, monkeypatch, fuse):
    monkeypatch.setenv("RT_FUSE", fuse)
    tensors, graphs = inputs(6, 8, torch.float32, device=device), []
    compiled = torch.compile(lambda *a: add_norm(*a, EPS), fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    torch.testing.assert_close(compiled(*tensors), add_norm(*tensors, EPS))
    assert sum("recyclable" in str(node.target) for node in graphs[0].graph.nodes) == (fuse == "kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_more_than_2_to_31_elements(device):
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    d = 1024
    x = torch.randn(2**31 // d + 8, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(d, device=device), torch.zeros(d, device=device)
    y = add_norm(x, x, weight, bias, EPS)
    up = torch.zeros_like(y)
    up[-8:] = torch.randn(8, d, device=device)
    grad, = torch.autograd.grad(y, x, up)
    last = x.detach()[-8:].requires_grad_()
    expected = add_norm_ref(last, last, weight, bias, EPS, 0.0, None)
    torch.testing.assert_close(y[-8:], expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(grad[-8:], torch.autograd.grad(expected, last, up[-8:])[0], atol=2e-2, rtol=2e-2)


def test_eps_is_the_one_given(device):
    x, h, weight, bias = inputs(5, 20, torch.float32, device=device)
    torch.testing.assert_close(add_norm(x, h, weight, bias, 0.5), add_norm_ref(x, h, weight, bias, 0.5, 0.0, None))
