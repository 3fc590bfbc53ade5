"""attention against a formula written token by token in float64: forward, gradients, ragged and empty sequences."""
import math

import pytest
import torch

from kernels import attention

LENGTHS = (5, 0, 1, 17, 32)


def inputs(dtype=torch.float64, lengths=LENGTHS, H=3, D=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    qkv = torch.randn(N, 3, H, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return qkv, cu


def formula(q, k, v, cu, scale, prefix=None):
    """One row after another, in the dtype given."""
    out = torch.zeros_like(q)
    for a, b in zip(cu.tolist(), cu.tolist()[1:]):
        for i in range(a, b):
            for h in range(q.shape[1]):
                p = torch.softmax(torch.stack([scale * (q[i, h] @ k[j, h]) for j in range(a, b)]), 0)
                row = sum(p[j - a] * v[j, h] for j in range(a, b))
                if prefix is not None:
                    k_p, v_p, gate = prefix
                    p = torch.softmax(scale * (k_p[:, h] @ q[i, h]), 0)
                    row = row + gate[h] * (p @ v_p[:, h])
                out = out.index_put((torch.tensor(i), torch.tensor(h)), row)
    return out


@pytest.mark.parametrize("scale", [None, 0.5])
def test_forward_and_gradients_in_float64(scale):
    qkv, cu = inputs(lengths=(3, 0, 1, 6), H=2, D=4)
    weight = torch.randn(10, 2, 4, dtype=torch.float64)     # an upstream gradient that is not uniform
    ours = attention(*qkv.unbind(1), cu, 6, scale=scale)
    grad, = torch.autograd.grad((ours * weight).sum(), qkv)
    expected = formula(*qkv.unbind(1), cu, scale or 4 ** -0.5)
    expected_grad, = torch.autograd.grad((expected * weight).sum(), qkv)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_within_twice_the_error_of_one_rounding(dtype):
    qkv, cu = inputs(dtype)
    truth = attention(*qkv.detach().double().unbind(1), cu, 32)
    ours = attention(*qkv.unbind(1), cu, 32)
    assert ours.dtype == dtype
    error = (ours.double() - truth).abs().max().item()
    assert error <= 2 * torch.finfo(dtype).eps * truth.abs().max().item() * math.sqrt(32)


def test_prefix_is_nothing_behind_a_closed_gate_and_the_formula_behind_an_open_one():
    qkv, cu = inputs(lengths=(3, 0, 4), H=2, D=4)
    g = torch.Generator().manual_seed(3)
    k_p, v_p = (torch.randn(5, 2, 4, generator=g, dtype=torch.float64) for _ in range(2))
    plain = attention(*qkv.unbind(1), cu, 4)
    closed = attention(*qkv.unbind(1), cu, 4, prefix_kv=(k_p, v_p, torch.zeros(2, dtype=torch.float64)))
    assert torch.equal(plain, closed)
    gate = torch.tensor([0.3, -2.0], dtype=torch.float64)
    opened = attention(*qkv.unbind(1), cu, 4, prefix_kv=(k_p, v_p, gate))
    torch.testing.assert_close(opened, formula(*qkv.unbind(1), cu, 0.5, (k_p, v_p, gate)))


def test_dropout_drops_weights_by_seed_and_keeps_the_mean():
    N, p = 64, 0.25
    q = torch.zeros(N, 1, 32)                      # uniform weights 1/N
    v = torch.eye(N)[:, None, :32].contiguous()    # out[i, j] is the weight that row i gives token j
    cu = torch.tensor([0, N], dtype=torch.int32)
    out = attention(q, q, v, cu, N, dropout_p=p, seed=7)[:, 0]
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / N / (1 - p)))
    assert abs(kept.float().mean().item() - (1 - p)) < 0.04
    assert torch.equal(out, attention(q, q, v, cu, N, dropout_p=p, seed=7)[:, 0])
    assert not torch.equal(out, attention(q, q, v, cu, N, dropout_p=p, seed=8)[:, 0])


def test_views_of_a_fused_projection_are_read_in_place():
    qkv, cu = inputs(torch.float32)
    q, k, v = qkv.unbind(1)
    assert not q.is_contiguous()
    torch.testing.assert_close(attention(q, k, v, cu, 32), attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, 32))


def test_shapes_that_do_not_fit_are_said():
    q = torch.zeros(4, 2, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(N, H, D\)"):
        attention(q, q[:3], q, cu, 4)
    with pytest.raises(ValueError, match="int32"):
        attention(q, q, q, cu.long(), 4)
