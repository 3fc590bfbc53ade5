"""attention_kd against softmaxes written out in float64: forward, gradients, ragged sequences, equal maps, both paths."""
import pytest
import torch
from conftest import far_apart

from kernels import attention_kd
from kernels.attention_kd import _attention_kd, _attention_kd_backward, attention_kd_ref

LONG, SHORT = (5, 0, 1, 70, 130), (64, 0, 3, 1, 33)     # more and less than one tile, never a multiple of it


def inputs(lengths, D_s, D_t=None, dtype=torch.float32, device="cpu", H=2, seed=0):
    """q_s and k_s, which require gradients, q_t, k_t, cu_seqlens, max_seqlen. Queries are large, so the maps are far from uniform."""
    g = torch.Generator().manual_seed(seed)
    q_s, k_s, q_t, k_t = (size * torch.randn(sum(lengths), H, D, generator=g)
                          for size, D in ((2, D_s), (1, D_s), (2, D_t or D_s), (1, D_t or D_s)))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    student = [x.to(device, dtype).requires_grad_() for x in (q_s, k_s)]
    return *student, q_t.to(device, dtype), k_t.to(device, dtype), cu.to(device), max(lengths)


def truth(q_s, k_s, q_t, k_t, cu, longest, scale_s=None, scale_t=None):
    """The definition, one sequence at a time, in float64."""
    def maps(q, k, scale):
        s = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
        return torch.softmax(s, -1)
    out = []
    for a, b in zip(cu.tolist(), cu.tolist()[1:]):
        p_s, p_t = maps(q_s[a:b], k_s[a:b], scale_s), maps(q_t[a:b], k_t[a:b], scale_t)
        out.append((p_t * (p_t / p_s).log()).sum(-1).T)
    return torch.cat(out)


def gradients(function, args, upstream, **scales):
    out = function(*args, **scales)
    return out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), args[:2])


def assert_within_budget(args, **scales):
    """Checks err(ours) <= 2 err(reference in that precision) + one rounding, for non-uniform upstream gradients."""
    rounding = max(2e-6, torch.finfo(args[0].dtype).eps / 2)        # 2e-6: three TF32 products and the hardware's exp2
    upstream = torch.randn(args[0].shape[:2], generator=torch.Generator().manual_seed(1)).to(args[0].device)
    exact = gradients(truth, [x.detach().double().requires_grad_() for x in args[:2]] + list(args[2:]), upstream, **scales)
    ours, ref = (gradients(f, args, upstream, **scales) for f in (attention_kd, attention_kd_ref))
    assert ours[0].dtype == torch.float32 and ours[0].shape == args[0].shape[:2]
    for name, x, y, z, unit in zip(("kl", "dq", "dk"), ours, ref, exact, (2e-6, rounding, rounding)):
        error, budget = (x - z).abs().max().item(), 2 * (y - z).abs().max().item() + unit * z.abs().max().item()
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"     # NaN fails here too


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("lengths, D_s, D_t", [(LONG, 32, 32), (LONG, 32, 64), (SHORT, 64, 32), (SHORT, 128, 64)])
def test_forward_and_gradients(device, dtype, lengths, D_s, D_t):
    assert_within_budget(inputs(lengths, D_s, D_t, dtype, device))


def test_scales_and_head_dimensions_between_those_of_the_kernels(device, dtype):
    assert_within_budget(inputs(SHORT, 48, 20, dtype, device), scale_t=0.3)
    for scales in (dict(scale_s=-0.1), dict(scale_t=-0.1), dict(scale_s=0.0), dict(scale_t=0.0)):
        assert_within_budget(inputs((9, 40), 48, 20, dtype, device), **scales)


def test_teacher_of_another_dtype(device):
    q_s, k_s, q_t, k_t, *rest = inputs(LONG, 32, 64, device=device)
    assert_within_budget((q_s, k_s, q_t.half(), k_t.half(), *rest))
    wide = q_s, k_s, q_t.double(), k_t.double(), *rest         # in float64, by the reference
    out = attention_kd(*wide)
    assert out.dtype == torch.float64 and torch.equal(out, attention_kd(*(x.double() for x in wide[:4]), *rest))


def test_the_gradient_of_queries_is_not_rounded_before_the_upstream_gradient(device):
    """A power of two changes no digit but those below fp16's smallest number, 2^-24."""
    q_s, k_s, *rest = inputs((70,), 32, dtype=torch.float16, device=device)
    args = (q_s.detach() / 64).requires_grad_(), (k_s.detach() * 64).requires_grad_(), *rest
    whole, small = (gradients(attention_kd, args, torch.full((70, 2), up, device=device))[1].double() for up in (1.0, 2**-18))
    assert (2**18 * small - whole).abs().max() <= 2**-7 < whole.abs().max() / 64


def test_strides_that_are_not_those_of_a_projection(device):
    *args, cu, longest = inputs((5, 33), 32, device=device)
    loose = [x.detach().mT.contiguous().mT for x in args]
    assert loose[0].stride(-1) != 1
    bounds = torch.stack([cu, cu.flip(0)], 1)[:, 0]
    assert torch.equal(attention_kd(*loose, bounds, longest), attention_kd(*args, cu, longest))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_rows_past_the_end_of_a_sequence_do_no_harm_where_all_scores_are_very_negative(device, dtype):
    q_s, k_s, *rest = inputs((5, 70), 32, dtype=dtype, device=device)
    with torch.no_grad():       # base-2 log-sum-exps of -200 to -400: exp2(0 - lse) of a padded row overflows
        args = (q_s + 6).requires_grad_(), (k_s - 6).requires_grad_(), *rest
    upstream = torch.ones(75, 2, device=device)
    for ours, ref in zip(gradients(attention_kd, args, upstream), gradients(attention_kd_ref, args, upstream)):
        torch.testing.assert_close(ours, ref, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("fused", [1, 2])
def test_views_of_a_fused_projection_are_read_in_place(device, fused):
    *_, cu, longest = inputs(SHORT, 32, device=device)
    student, teacher = torch.randn(2, sum(SHORT), 3, 3, 32, device=device)      # (N, 3, H, D) or (N, H, 3, D)
    student.requires_grad_()
    args = *student.unbind(fused)[:2], *teacher.unbind(fused)[:2], cu, longest
    assert not args[0].is_contiguous()
    out = attention_kd(*args)
    assert torch.equal(out, attention_kd(*(x.contiguous() for x in args[:4]), cu, longest))
    grad, = torch.autograd.grad(out.mean(), student)        # also an expanded upstream gradient
    expected, = torch.autograd.grad(attention_kd_ref(*args).mean(), student)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert not grad.select(fused, 2).any()


def test_equal_maps_have_no_divergence_and_no_gradient(device, dtype):
    q, k, _, _, *rest = inputs((1, 70, 20), 32, dtype=dtype, device=device)
    out, *grads = gradients(attention_kd, (q, k, q, k, *rest), torch.ones(91, 2, device=device))
    assert out.abs().max() <= 1e-6 and out[0].eq(0).all()
    assert max(g.abs().max() for g in grads) <= 1e-6


def test_shifting_a_row_of_scores_costs_no_digits(device):
    q, k, _, _, *rest = inputs((70, 20), 32, device=device)
    out = attention_kd(q, k + 8, q, k, *rest)      # changes row i by 8 * sum(q_i) / sqrt(32), up to about 50
    assert out.abs().max() <= 1e-6


def test_no_gradient_reaches_the_teacher(device):
    q_s, k_s, q_t, k_t, *rest = inputs((3, 8), 32, device=device)
    q_t.requires_grad_(), k_t.requires_grad_()
    attention_kd(q_s, k_s, q_t, k_t, *rest).sum().backward()
    assert q_s.grad is not None and k_s.grad is not None and q_t.grad is None and k_t.grad is None
    assert not attention_kd(q_s.detach(), k_s.detach(), q_t, k_t, *rest).requires_grad


def test_finite_differences(device):
    args = inputs((1, 3, 6), 4, 3, device=device, H=1)
    upstream = torch.linspace(-1, 2, 10, device=device)[:, None]
    _, *grads = gradients(attention_kd, args, upstream)
    double = [x.detach().double().requires_grad_() for x in args[:2]] + [x.double() for x in args[2:4]] + list(args[4:])
    torch.autograd.gradcheck(lambda q, k: attention_kd(q, k, *double[2:]), double[:2])     # float64: the reference
    for i, grad in enumerate(grads):
        step = torch.randn(grad.shape, generator=torch.Generator().manual_seed(i)).to(device)
        up, down = ((attention_kd(*(x + e * step if j == i else x for j, x in enumerate(args[:4])), *args[4:]) * upstream).sum()
                    for e in (1e-2, -1e-2))
        torch.testing.assert_close((grad * step).sum(), (up - down) / 2e-2, rtol=2e-3, atol=2e-3)


def test_both_paths_agree_and_the_cpu_takes_the_reference(device, monkeypatch):
    args = inputs(SHORT, 32, device=device)
    ours, double = attention_kd(*args), [x.double() for x in args[:4]]
    torch.testing.assert_close(ours, attention_kd_ref(*args))
    assert torch.equal(attention_kd(*double, *args[4:]), attention_kd_ref(*double, *args[4:]))
    monkeypatch.delenv("RT_KERNELS")
    assert torch.equal(attention_kd(*args), attention_kd_ref(*args) if device.type == "cpu" else ours)


def test_ops_are_registered_in_full(device):
    args = inputs((5, 0, 33), 32, 64, device=device)
    torch.library.opcheck(_attention_kd.op, (*args, 0.2, 0.1))
    kl, lse = _attention_kd(*args, 0.2, 0.1)
    torch.library.opcheck(_attention_kd_backward.op, (kl.detach(), *(x.detach() for x in args[:4]), lse.detach(), *args[4:], 0.2, 0.1))


def test_one_graph_under_torch_compile(device):
    args = inputs((5, 0, 33), 32, 48, device=device)
    upstream = torch.randn(38, 2, device=device)
    compiled = torch.compile(attention_kd, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, args, upstream), gradients(attention_kd, args, upstream)):
        assert torch.equal(ours, eager)


def test_heads_further_than_2_to_the_31_elements_apart(device):
    q, k, q_t, k_t, *rest = inputs((5, 33), 32, dtype=torch.float16, device=device, H=3)
    far = far_apart(k.transpose(0, 1), 2**30).transpose(0, 1)
    assert torch.equal(attention_kd(q, k, q_t, k_t, *rest), attention_kd(q, far, q_t, k_t, *rest))


def test_shapes_that_do_not_fit_are_said(device):
    q_s, k_s, q_t, k_t, cu, longest = inputs((3, 8), 32, 64, device=device)
    for wrong in ((q_s, k_s[:3], q_t, k_t), (q_s, k_s, q_t, k_t[..., :32]), (q_s, k_s, q_t[:, :1], k_t[:, :1]), (q_s[0], k_s[0], q_t, k_t)):
        with pytest.raises(ValueError, match=r"\(N, H, D_s\)"):
            attention_kd(*wrong, cu, longest)
    with pytest.raises(ValueError, match="int32"):
        attention_kd(q_s, k_s, q_t, k_t, cu.long(), longest)
    for wrong in ((q_s, k_s, q_t, k_t.half()), (q_s, k_s.half(), q_t, k_t)):
        with pytest.raises(ValueError, match="one dtype"):
            attention_kd(*wrong, cu, longest)
    with pytest.raises(ValueError, match="up to 128"):
        attention_kd(*inputs((3, 8), 160, device=device))


def test_each_of_the_four_tensors_has_strides_of_its_own(device):
    *args, cu, longest = inputs((5, 70), 32, device=device, H=3)
    wide = [torch.stack([x.detach()] * n, 1)[:, 0] for n, x in enumerate(args, 1)]
    far = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in args]       # (H, N, D) in memory
    upstream = torch.linspace(-1, 2, 75, device=device)[:, None]
    for loose in ([wide[0], far[1], far[2], wide[3]], [far[0], wide[1], wide[2], far[3]]):
        loose = [x.requires_grad_() for x in loose[:2]] + loose[2:]
        for ours, plain in zip(*(gradients(attention_kd, (*x, cu, longest), upstream) for x in (loose, args))):
            torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)
