"""attention_qkv: the packed projection with one gradient, and the empty sequences that pad cu_seqlens to a fixed length."""
import pytest
import torch
from conftest import far_apart
from test_attention import everything, formula, inputs, prefix_of

from kernels import attention, attention_kd, attention_qkv
from kernels.attention import _attention, _attention_backward, attention_ref


@pytest.mark.parametrize("D, dtype, dropout_p", [
    (32, torch.float16, 0.3), (32, torch.bfloat16, 0.3), (64, torch.float32, 0.0), (48, torch.float16, 0.0)])
def test_the_packed_projection_is_the_three_views_with_one_gradient(device, D, dtype, dropout_p):
    qkv, cu = inputs(dtype, (70, 0, 3), H=2, D=D)
    wide = torch.zeros(73, 3, 3, D, dtype=dtype, device=device)     # heads of a wider tensor
    wide[:, :, :2] = qkv.detach()
    whole, part, cu = qkv.detach().to(device).requires_grad_(), wide[:, :, :2].detach().requires_grad_(), cu.to(device)

    expected = everything(attention, whole, cu, dropout_p=dropout_p, seed=3)
    for x in (whole, part):
        out = attention_qkv(x, cu, 70, dropout_p=dropout_p, seed=3)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        grad, = torch.autograd.grad((out * weight).sum(), x)
        assert grad.shape == x.shape
        for a, b in zip((out, grad), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.3])
def test_a_scale_that_is_not_positive_is_computed_too(device, scale):
    """The kernels fold the scale into the exponent, which needs a positive scale."""
    qkv, cu = inputs(torch.float32, (7, 3), H=2)
    x, cu = qkv.detach().to(device), cu.to(device)
    exact = attention_ref(*x.double().unbind(1), cu, 7, scale=scale)
    for out in (attention_qkv(x, cu, 7, scale=scale), attention(*x.unbind(1), cu, 7, scale=scale)):
        torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-3)


def test_the_packed_projection_with_a_prefix_and_bad_shapes(device):
    qkv, cu = inputs(torch.float32, (7, 3), H=2)
    x, cu, prefix = qkv.detach().to(device), cu.to(device), tuple(prefix_of(5, 2, 32, device, torch.float32))
    assert torch.equal(attention_qkv(x, cu, 7, prefix_kv=prefix, scale=0.3), attention(*x.unbind(1), cu, 7, prefix_kv=prefix, scale=0.3))
    for bad in (x[:, 0], x[:, :2]):
        with pytest.raises(ValueError, match=r"\(N, 3, H, D\)"):
            attention_qkv(bad, cu, 7)
    for cu_bad, p, what in ((cu.long(), 0.0, "int32"), (cu, 1.0, "below 1")):
        with pytest.raises(ValueError, match=what):
            attention_qkv(x, cu_bad, 7, dropout_p=p)


@pytest.mark.parametrize("path", ["triton", "ref"])
def test_every_run_has_its_own_prefix_and_a_prefix_has_the_scale(device, path, monkeypatch):
    monkeypatch.setenv("RT_KERNELS", path)
    qkv, cu = inputs(torch.float32, (2, 1, 3), H=2)
    prefixes = [prefix_of(4, 2, 32, "cpu", torch.float32), [x.flip(0) for x in prefix_of(4, 2, 32, "cpu", torch.float32)]]
    stacked = tuple(torch.stack(x).detach().to(device) for x in zip(*prefixes))
    out = attention_qkv(qkv.detach().to(device), cu.to(device), 3, scale=0.3, prefix_kv=stacked).cpu().double()
    for rows, bounds, prefix in zip((slice(0, 3), slice(3, 6)), (cu[:3], cu[2:] - 3), prefixes):
        expected = formula(*qkv.detach().double()[rows].unbind(1), bounds, 0.3, [x.detach().double() for x in prefix])
        torch.testing.assert_close(out[rows], expected, atol=1e-5, rtol=1e-5)


def test_sequences_and_heads_further_than_2_to_the_31_elements_apart(device):
    qkv, cu = inputs(torch.float16, (1, 1, 1, 2), H=3)
    qkv, cu = qkv.detach().to(device), cu.to(device)
    expected = attention_qkv(qkv, cu, 2)
    assert torch.equal(attention_qkv(far_apart(qkv, 2**30 - 64), cu, 2), expected)      # sequence 3 starts at 3 * 2^30
    far = far_apart(qkv.permute(2, 0, 1, 3), 2**30).permute(1, 2, 0, 3)                 # (H, N, 3, D) in memory
    assert torch.equal(attention_qkv(far, cu, 2), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_ops_are_registered_as_torch_wants_them(device, dropout_p):
    qkv, cu = inputs(torch.float32, (5, 0, 7), H=2)
    arguments = qkv.detach().to(device).requires_grad_(), cu.to(device), torch.tensor([4], device=device), 7, 0.2, dropout_p
    torch.library.opcheck(_attention.op, arguments)
    out, lse, words = (x.detach() for x in _attention(*arguments))
    torch.library.opcheck(_attention_backward.op, (torch.randn_like(out), arguments[0].detach(), out, lse, words, cu.to(device), 7, 0.2,
                                                    dropout_p))


# ---------------------------------------------------------------- cu_seqlens filled to a fixed length

def filled(cu, count):
    """cu_seqlens with `count` additional empty sequences."""
    return torch.cat([cu, cu[-1:].expand(count)])


@pytest.mark.parametrize("path", ["triton", "ref"])
def test_empty_sequences_at_the_end_change_nothing(device, path, monkeypatch):
    monkeypatch.setenv("RT_KERNELS", path)
    dtype = torch.float32 if path == "ref" else torch.float16
    qkv, cu = inputs(dtype, (3, 3, 70), H=1)        # sorted by length, for the reference
    qkv, cu = qkv.detach().to(device).requires_grad_(), cu.to(device)
    for function, x in ((attention, qkv.unbind(1)), (attention_qkv, (qkv,))):
        found = []
        for bounds in (cu, filled(cu, 60)):
            out = function(*x, bounds, 70, dropout_p=0.2, seed=3)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
            found.append([out, *torch.autograd.grad((out * weight).sum(), qkv)])
        for a, b in zip(*found):
            assert torch.equal(a, b)


def test_the_reference_puts_nothing_in_order_for_them(monkeypatch):
    qkv, cu = inputs(torch.float32, (3, 3, 7), H=1)
    monkeypatch.setitem(attention.__globals__, "_by_length", None)
    for grouped in (filled(cu, 4), torch.tensor([0, 7, 10, 13], dtype=torch.int32)):
        attention(*qkv.unbind(1), grouped, 7)
    with pytest.raises(TypeError):
        attention(*qkv.unbind(1), torch.tensor([0, 3, 10, 13], dtype=torch.int32), 7)


@pytest.mark.parametrize("path", ["triton", "ref"])
def test_empty_sequences_in_the_distillation_of_maps(device, path, monkeypatch):
    monkeypatch.setenv("RT_KERNELS", path)
    qkv, cu = inputs(torch.float32, (3, 20), H=1)
    x, cu, found = qkv.detach().to(device).requires_grad_(), cu.to(device), []
    for bounds in (cu, filled(cu, 40)):
        rows = attention_kd(x[:, 0], x[:, 1], x[:, 1].detach(), x[:, 2].detach(), bounds, 20)
        found.append([rows, *torch.autograd.grad((rows * torch.arange(23.0, device=device)[:, None]).sum(), x)])
    for a, b in zip(*found):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["triton", "ref"])
def test_nothing_but_empty_sequences(device, path, monkeypatch):
    monkeypatch.setenv("RT_KERNELS", path)
    qkv = torch.zeros(0, 3, 1, 32, device=device, requires_grad=True)
    cu = torch.zeros(5, dtype=torch.int32, device=device)
    out = attention_qkv(qkv, cu, 8, dropout_p=0.1, seed=1)
    assert out.shape == (0, 1, 32) and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    q, k, _ = qkv.unbind(1)
    rows = attention_kd(q, k, q.detach(), k.detach(), cu, 8)
    assert rows.shape == (0, 1) and torch.autograd.grad(rows.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("places, D", [((2, 0, 1, 3), 32), ((0, 2, 3, 1), 48)])
def test_gradients_of_layouts_that_are_not_a_projections(device, places, D):
    """In memory (H, N, 3, D), and (N, H, D, 3), of which F.pad makes a tensor whose last dimension is not contiguous."""
    qkv, cu = inputs(torch.float32, (5, 33), H=2, D=D)
    back = [places.index(i) for i in range(4)]
    x, cu = qkv.detach().to(device).permute(places).contiguous().permute(back).requires_grad_(), cu.to(device)
    up, found = torch.randn(38, 2, D, generator=torch.Generator().manual_seed(5)).to(device), []
    assert not x.is_contiguous()
    for out in (attention_qkv(x, cu, 33), attention_ref(*x.unbind(1), cu, 33)):
        found.append([out, *torch.autograd.grad(out, x, up)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_seeds_in_any_strides_and_where_the_sum_with_the_head_wraps(device):
    qkv, cu = inputs(torch.float32, (3, 3, 3), H=2)
    qkv, cu, seed = qkv.detach().to(device), cu.to(device), torch.tensor([5, 2**32 - 1, -1], device=device)
    ours, spread = attention_qkv(qkv, cu, 3, dropout_p=0.4, seed=seed), torch.stack([seed, -seed], 1)[:, 0]
    assert torch.equal(attention_qkv(qkv, cu, 3, dropout_p=0.4, seed=spread), ours)
    torch.testing.assert_close(ours, attention_ref(*qkv.unbind(1), cu, 3, dropout_p=0.4, seed=seed), atol=1e-3, rtol=1e-3)
