"""kd_loss, hidden_mse and states_mse, the kernels: error budgets against float64, all gradients, one launch per pass."""
import math

import pytest
import torch
from conftest import far_apart

from kernels import hidden_mse, kd_loss, states_mse
from kernels.common import launch
from kernels.hidden_mse import _hidden_mse, _hidden_mse_backward, _states_mse, _states_mse_backward, hidden_mse_ref, states_mse_ref
from kernels.kd_loss import _kd_loss, _kd_loss_backward, kd_loss_ref

EPS = torch.finfo(torch.float32).eps
TILES = (2, 3, 17, 300, 1003, 9001)         # classes: one of each tile size, never a multiple of it; the last takes several tiles
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")      # -inf - -inf in masked lanes, reported by numpy


def logits(R, C, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    """A student that requires gradients, a teacher, and labels; row 1 is ignored."""
    g = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(R, C, generator=g) for _ in range(2))
    y = torch.randint(C, (R,), generator=g)
    y[1:2] = -100
    return s.to(device, dtype).requires_grad_(), t.to(device, dtype), y.to(device)


def upstream(R, device):
    return torch.linspace(-1, 2.5, R, device=device)


def assert_close(results, expected):
    """Close up to the order of summation, which differs between layouts."""
    for x, z in zip(results, expected):
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-5)


def double(x):
    return None if x is None else x.detach().double()


def rows_and_gradient(function, s, *rest, **options):
    rows = function(s, *rest, **options)
    return rows, *torch.autograd.grad((rows * upstream(len(rows), rows.device)).sum(), s)


def assert_within_budget(s, t, y, alpha, T):
    """Checks err(ours) <= 2 err(reference in that precision) + a few roundings of the summed values."""
    options = dict(alpha=alpha, T=T)
    exact = rows_and_gradient(kd_loss_ref, double(s).requires_grad_(), double(t), y, **options)
    ours, ref = (rows_and_gradient(f, s, t, y, **options) for f in (kd_loss, kd_loss_ref))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == s.dtype and ours[1].shape == s.shape
    terms = exact[0].abs().max() + alpha * T**2 * math.log(s.shape[1]) + 1
    unit = 4 * EPS * exact[1].abs().max() + torch.finfo(s.dtype).eps / 2 * exact[1].abs()     # per element of the gradient
    for name, x, r, z, atol in zip(("loss", "gradient"), ours, ref, exact, (4 * EPS * terms, unit)):
        excess = (x - z).abs() - 2 * (r - z).abs().max() - atol
        assert (excess <= 0).all(), f"{name}: off by {(x - z).abs().max():.2e}, the reference by {(r - z).abs().max():.2e}"


@pytest.mark.parametrize("C", TILES)
@pytest.mark.parametrize("alpha, T, teacher, hard", [
    (0.7, 5.0, True, True), (0.7, 1.0, True, True), (0.6, 2.0, True, False), (0.2, 2.0, False, True), (1.0, 0.5, True, True),
    (0.0, 3.0, True, True), (1.5, 1.0, True, False)])
def test_forward_and_gradient(device, C, alpha, T, teacher, hard):
    s, t, y = logits(5, C, device=device)
    assert_within_budget(s, t if teacher else None, y if hard else None, alpha, T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [17, 1003, 5001])
def test_16_bit_logits_are_not_rounded_on_the_way(device, dtype, C):
    s, t, y = logits(4, C, dtype, device)
    assert_within_budget(s, t, y, 0.7, 2.0)
    loss = kd_loss(s, t, y, alpha=0.7, T=2.0)       # from the same 16-bit logits fp32 arithmetic gives the same loss
    torch.testing.assert_close(loss, kd_loss_ref(s.float(), t.float(), y, alpha=0.7, T=2.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_student_and_teacher_of_different_dtypes(device, dtypes):
    s, t, y = logits(4, 300, device=device)
    assert_within_budget(s.detach().to(dtypes[0]).requires_grad_(), t.to(dtypes[1]), y, 0.5, 2.0)


def test_minus_infinity(device):
    s, t, y = logits(5, 1500, device=device)
    with torch.no_grad():
        s[0, 3], t[0, 3] = -math.inf, -math.inf             # masked in both
        t[1:3, 7:1200] = -math.inf                          # only in the teacher, more than a tile
        s[2, 100:1100], t[2, 100:1100] = -math.inf, -1e30   # almost as good as masked
        s[3, :1100], t[3, :1100] = -math.inf, -math.inf     # the whole first tile is masked
    y[:4] = torch.tensor([5, -100, 1300, 1400])
    assert_within_budget(s, t, y, 0.6, 2.0)
    assert torch.isfinite(kd_loss(s, t, y, alpha=0.6, T=2.0)).all()
    assert_within_budget(s, t, None, 1.0, 1.0)
    with torch.no_grad():
        s[4, 9] = -math.inf                                 # the teacher has some mass here
    assert kd_loss(s, t, alpha=1.0, T=2.0)[4] == math.inf
    y[4] = 9
    assert kd_loss(s, None, y, alpha=0.5, T=1.0)[4] == math.inf


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_teacher_that_is_lost_costs_nothing_finite(device):
    """A row without a distribution must not look like a perfect student's: the loss is printed, and step_unless looks at it."""
    s, t, _ = logits(3, 40, device=device)
    t[1, 2], t[2] = math.nan, -math.inf
    for function in (kd_loss, kd_loss_ref):
        assert function(s, t, alpha=1.0, T=2.0).isfinite().tolist() == [True, False, False]


def test_equal_logits_have_no_divergence_and_shifted_ones_nearly_none(device):
    s, _, _ = logits(4, 5001, device=device)
    rows, gradient = rows_and_gradient(kd_loss, s, s.detach(), alpha=1.0, T=3.0)
    assert rows.abs().max() <= 9 * EPS and gradient.abs().max() <= EPS
    whole = (64 * s.detach()).round() / 64          # sums with 1024 are exact
    rows, gradient = rows_and_gradient(kd_loss, (whole + 1024).requires_grad_(), whole, alpha=1.0, T=3.0)
    assert rows.abs().max() <= 9 * EPS and gradient.abs().max() <= EPS


def test_ignored_rows(device):
    s, t, y = logits(4, 50, device=device)
    y[1] = 30
    for ignored in (-100, -1, 7):
        y[0] = ignored
        rows, gradient = rows_and_gradient(lambda *a: kd_loss(*a, alpha=0.5, T=2.0, ignore_index=ignored), s, t, y)
        assert rows[0] == 0 and rows[1] > 0 and not gradient[0].any() and gradient[1].all()
    for wrong in (50, -1, 2**32 + 5, 5 - 2**32):      # neither a class nor ignored
        y[2] = wrong
        assert kd_loss(s, None, y, alpha=0.5, T=2.0, ignore_index=7).isnan().tolist() == [False, False, True, False]


def test_a_term_that_vanishes_is_not_looked_at(device):
    s, t, y = logits(4, 50, device=device)
    rows, gradient = rows_and_gradient(kd_loss, s, t * math.nan, y, alpha=0.0, T=2.0)
    assert torch.isfinite(rows).all() and torch.isfinite(gradient).all()
    assert torch.equal(rows, kd_loss(s, None, y, alpha=0.0, T=7.0))
    only = kd_loss(s, t, y, alpha=1.0, T=2.0)
    assert torch.equal(only[2:], kd_loss(s, t, alpha=1.0, T=2.0)[2:]) and only[1] == 0
    assert kd_loss_ref(s, t * math.nan, y, alpha=0.0, T=2.0).isfinite().all()
    with torch.no_grad():
        s[2, y[2]], t[2, y[2]] = -math.inf, -math.inf       # its cross-entropy is infinite
    for function in (kd_loss, kd_loss_ref):
        assert function(s, t, y, alpha=1.0, T=2.0).isfinite().all()


def test_views_are_read_in_place_and_copied_where_that_cannot_be(device):
    s, t, y = logits(6, 300, device=device)
    wide = torch.zeros(6, 2, 305, device=device)
    wide[:, 0, 3:303], wide[:, 1, 3:303] = s.detach(), t
    y2 = torch.stack([y, -y], 1)[:, 0]
    expected = rows_and_gradient(kd_loss, s, t, y, alpha=0.7, T=2.0)
    for view in (wide[:, 0, 3:303], s.detach().T.contiguous().T):
        leaf = view.detach().requires_grad_()
        assert not leaf.is_contiguous() and not y2.is_contiguous()
        for teacher in (wide[:, 1, 3:303], t.T.contiguous().T):
            assert_close(rows_and_gradient(kd_loss, leaf, teacher, y2, alpha=0.7, T=2.0), expected)
    one = t[:1].expand(6, -1)
    assert_close([kd_loss(s, one, y, alpha=0.7, T=2.0)], [kd_loss(s, one.contiguous(), y, alpha=0.7, T=2.0)])
    for up in (torch.ones(1, device=device).expand(6), torch.arange(12.0, device=device)[::2]):     # an upstream gradient, also expanded
        gradient, plain = (torch.autograd.grad(f(s, t, y, alpha=0.7, T=2.0), s, up)[0] for f in (kd_loss, kd_loss_ref))
        torch.testing.assert_close(gradient, plain)


def test_no_gradient_reaches_the_teacher(device):
    s, t, y = logits(3, 20, device=device)
    t.requires_grad_()
    kd_loss(s, t, y, alpha=0.5, T=2.0).sum().backward()
    assert s.grad is not None and t.grad is None
    assert not kd_loss(s.detach(), t, y, alpha=0.5, T=2.0).requires_grad


def counted(monkeypatch, function):
    """The names of the kernels that `function` launches from now on."""
    launched, launch = [], function.__globals__["launch"]
    def noted(kernel, *args, **meta):
        launched.append(kernel.fn.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setitem(function.__globals__, "launch", noted)
    return launched


@pytest.mark.parametrize("C", [2, 20])
def test_a_class_head_is_one_launch_each_way(device, monkeypatch, C):
    s, t, y = logits(16, C, device=device)
    launched = counted(monkeypatch, kd_loss)
    rows_and_gradient(kd_loss, s, t, y, alpha=0.7, T=5.0)
    assert launched == ["_loss_forward", "_loss_backward"]


def test_no_rows(device):
    s, t, y = logits(0, 20, device=device)
    rows = kd_loss(s, t, y, alpha=0.5, T=2.0)
    gradient, = torch.autograd.grad(rows.sum(), s)
    assert rows.shape == (0,) and gradient.shape == (0, 20)
    launch(None, 0, s)      # CUDA refuses a grid of no programs


def test_finite_differences(device):
    s, t, y = logits(3, 6, device=device, scale=1.0)
    exact = double(s).requires_grad_()
    torch.autograd.gradcheck(lambda x: kd_loss(x, double(t), y, alpha=0.7, T=2.0), exact)        # float64 uses the reference
    _, gradient = rows_and_gradient(kd_loss, s, t, y, alpha=0.7, T=2.0)
    for i in range(6):
        step = torch.zeros(3, 6, device=device)
        step[:, i] = 1e-2
        up, down = ((kd_loss(s + e, t, y, alpha=0.7, T=2.0) * upstream(3, device)) for e in (step, -step))
        torch.testing.assert_close(gradient[:, i], (up - down) / 2e-2, rtol=2e-3, atol=2e-4)


def test_both_paths_agree_and_the_cpu_takes_the_reference(device, monkeypatch):
    s, t, y = logits(4, 50, device=device)
    ours = kd_loss(s, t, y, alpha=0.5, T=2.0)
    torch.testing.assert_close(ours, kd_loss_ref(s, t, y, alpha=0.5, T=2.0))
    assert kd_loss(s.double(), t, y, alpha=0.5, T=2.0).dtype == torch.float64
    monkeypatch.delenv("RT_KERNELS")
    assert torch.equal(kd_loss(s, t, y, alpha=0.5, T=2.0), kd_loss_ref(s, t, y, alpha=0.5, T=2.0) if device.type == "cpu" else ours)


def test_kd_ops_are_registered_in_full(device):
    s, t, y = logits(3, 20, device=device)
    torch.library.opcheck(_kd_loss.op, (s, t, y, 0.5, 2.0, -100))
    torch.library.opcheck(_kd_loss.op, (s, t, None, 0.5, 2.0, -100))
    loss, stats = _kd_loss(s.detach(), t, y, 0.5, 2.0, -100)
    torch.library.opcheck(_kd_loss_backward.op, (torch.ones_like(loss), s.detach(), t, y, stats, 0.5, 2.0, -100))


def test_one_graph_under_torch_compile(device):
    s, t, y = logits(3, 20, device=device)
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    for args in ((t, y), (t,), (None, y)):
        results = [rows_and_gradient(f, s, *args, alpha=0.5, T=2.0) for f in (compiled, kd_loss)]
        assert all(map(torch.equal, *results))
    compiled = torch.compile(hidden_mse, fullgraph=True, backend="aot_eager")
    a, b, rows = states(3, 5, 2, 7, device=device)
    assert all(map(torch.equal, *(rows_and_gradient(f, a, b, rows) for f in (compiled, hidden_mse))))


def test_rows_further_than_2_to_the_31_elements_apart(device):
    s, t, y = logits(3, 300, torch.float16, device)
    expected = rows_and_gradient(kd_loss, s, t, y, alpha=0.5, T=2.0)
    assert_close(rows_and_gradient(kd_loss, s, far_apart(t, 2**30), y, alpha=0.5, T=2.0), expected)
    assert_close(rows_and_gradient(kd_loss, far_apart(s, 2**30).requires_grad_(), t, y, alpha=0.5, T=2.0), expected)
    s, t, rows = states(3, 3, 2, 40, torch.float16, device)
    expected = rows_and_gradient(hidden_mse, s, t, rows)
    assert_close(rows_and_gradient(hidden_mse, far_apart(s, 2**30).requires_grad_(), far_apart(t, 2**30), rows.int()), expected)


def test_shapes_that_do_not_fit_are_said(device):
    s, t, y = logits(3, 20, device=device)
    for wrong in (t[:2], t[0]):
        with pytest.raises(ValueError, match="alike"):
            kd_loss(s, wrong, y, alpha=0.5, T=2.0)
    with pytest.raises(ValueError, match=r"labels \(R,\)"):
        kd_loss(s, t, y[:2], alpha=0.5, T=2.0)
    with pytest.raises(ValueError, match="teacher or labels"):
        kd_loss(s, None, alpha=0.5, T=2.0)
    with pytest.raises(ValueError, match="positive"):
        kd_loss(s, t, y, alpha=0.5, T=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_references_compute_in_fp32_and_give_the_teacher_no_gradient(monkeypatch, dtype):
    """Equal to the last bit to the same 16-bit numbers in fp32. On a CPU they are what runs."""
    monkeypatch.setenv("RT_KERNELS", "ref")
    (s, t, y), (a, b, rows), (students, teachers, weights) = logits(4, 50, dtype), states(3, 5, 2, 40, dtype), layers(3, 5, 40, dtype)
    for function, student, teacher in ((lambda *x: kd_loss(*x, y, alpha=0.5, T=2.0), s, t), (lambda *x: hidden_mse(*x, rows), a, b),
                                       (lambda *x: states_mse([x[0]], [x[1]], weights[2:]), students[0], teachers[0])):
        weights.requires_grad_()
        loss = function(student, teacher.requires_grad_())
        assert loss.dtype == torch.float32 and torch.equal(loss, function(student.float(), teacher.float()))
        loss.sum().backward()
        assert student.grad is not None and teacher.grad is None and weights.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("C", [50265, 250_000])
def test_the_longest_rows(device, C):
    s, t, y = logits(5, C, device=device)
    assert_within_budget(s, t, y, 0.7, 2.0)


# ---------------------------------------------------------------- hidden_mse

def states(B, n, L, d, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(B, L, d, generator=g), torch.randn(n, L, d, generator=g)
    rows = torch.randint(n, (B,), generator=g)
    rows[-1] = rows[0]
    return s.to(device, dtype).requires_grad_(), t.to(device, dtype), rows.to(device)


@pytest.mark.parametrize("B, n, L, d", [(1, 1, 1, 1), (3, 5, 2, 7), (2, 4, 3, 129), (4, 4, 6, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hidden_mse_forward_and_gradient(device, B, n, L, d, dtype):
    s, t, rows = states(B, n, L, d, dtype, device)
    for teacher, index in ((t, rows), (t.float(), rows.int()), (t[rows], None)):
        exact = rows_and_gradient(hidden_mse_ref, double(s).requires_grad_(), double(teacher), index)
        ours, ref = (rows_and_gradient(f, s, teacher, index) for f in (hidden_mse, hidden_mse_ref))
        assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
        for x, r, z, unit in zip(ours, ref, exact, (EPS, torch.finfo(dtype).eps / 2)):
            assert ((x - z).abs() <= 2 * (r - z).abs().max() + 2 * EPS * z.abs().max() + unit * z.abs()).all()


def test_hidden_mse_of_views_with_few_launches_and_no_gradient_to_the_teacher(device, monkeypatch):
    s, t, rows = states(3, 5, 2, 40, device=device)
    expected = rows_and_gradient(hidden_mse, s, t, rows)
    loose = s.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()        # (L, B, d) in memory
    cache = torch.stack([t, t], 1)[:, 0].requires_grad_()
    for view in (s.detach().repeat_interleave(2, -1)[..., ::2], s.detach()[..., :1].expand(s.shape)):     # last stride not 1
        mine, plain = (rows_and_gradient(f, view.requires_grad_(), t, rows) for f in (hidden_mse, hidden_mse_ref))
        assert_close(mine, plain)
    launched = counted(monkeypatch, hidden_mse)
    assert_close(rows_and_gradient(hidden_mse, loose, cache, torch.stack([rows, -rows], 1)[:, 0]), expected)
    assert launched == ["_mse_forward", "_mse_backward"] and cache.grad is None
    for up in (torch.ones(1, device=device).expand(3), torch.arange(6.0, device=device)[::2]):
        gradient, plain = (torch.autograd.grad(f(s, t, rows), s, up)[0] for f in (hidden_mse, hidden_mse_ref))
        torch.testing.assert_close(gradient, plain)
    assert hidden_mse(s[:0], t, rows[:0]).shape == (0,)
    for wrong in ((s, t), (s[0], s[0]), (s, t, rows[:2]), (s, t[:, :1], rows), (s, t[..., :39], rows)):
        with pytest.raises(ValueError, match="equal size"):
            hidden_mse(*wrong)


def test_hidden_mse_ops_are_registered_in_full(device):
    s, t, rows = states(3, 5, 2, 7, device=device)
    torch.library.opcheck(_hidden_mse.op, (s, t, rows))
    torch.library.opcheck(_hidden_mse.op, (s, t[:3], None))
    torch.library.opcheck(_hidden_mse_backward.op, (torch.ones(3, device=device), s.detach(), t, rows))


# ---------------------------------------------------------------- states_mse

def layers(L, N, d, dtype=torch.float32, device="cpu"):
    """Student states that require gradients, a teacher's states, and weights. One weight is 0."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(L, N, d, generator=g).to(device, dtype) for _ in range(2))
    return [x.requires_grad_() for x in s.unbind()], [*t.unbind()], (torch.arange(L, device=device) / 2)


def loss_and_gradients(function, s, t, weights):
    loss = function(s, t, weights)
    return loss, *torch.autograd.grad(-2.5 * loss, s)


@pytest.mark.parametrize("L, N, d", [(2, 1, 1), (2, 3, 7), (5, 40, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_mse_forward_and_gradients(device, L, N, d, dtype):
    s, t, weights = layers(L, N, d, dtype, device)
    for teacher in (t, [x.float() for x in t]):
        exact = loss_and_gradients(states_mse_ref, [double(x).requires_grad_() for x in s], [double(x) for x in teacher], weights.double())
        ours, ref = (loss_and_gradients(f, s, teacher, weights) for f in (states_mse, states_mse_ref))
        assert ours[0].dtype == torch.float32 and all(x.dtype == dtype for x in ours[1:])
        for x, r, z, unit in zip(ours, ref, exact, (EPS, *[torch.finfo(dtype).eps / 2] * L)):
            assert ((x - z).abs() <= 2 * (r - z).abs().max() + 8 * EPS * z.abs().max() + unit * z.abs()).all()


def test_states_mse_takes_any_strides_launches_once_and_gives_the_teacher_no_gradient(device, monkeypatch):
    s, t, weights = layers(3, 5, 40, device=device)
    expected = loss_and_gradients(states_mse, s, t, weights)
    loose, taught = [x.detach().T.contiguous().T.requires_grad_() for x in s], [x.requires_grad_() for x in t]
    launched = counted(monkeypatch, states_mse)
    assert_close(loss_and_gradients(states_mse, loose, taught, torch.stack([weights, -weights], 1)[:, 0]), expected)
    assert launched == ["_states_forward", "_states_backward"] and all(x.grad is None for x in taught)
    for wrong in ((s[:2], t, weights), (s, [x[:4] for x in t], weights), (s, [x.T for x in t], weights), (s, t, weights[:2]),
                  ([], [], weights[:0])):
        with pytest.raises(ValueError, match="of one shape"):
            states_mse(*wrong)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(states_mse(s, t, weights), s, create_graph=True)


def test_states_mse_ops_are_registered_in_full(device):
    s, t, weights = layers(2, 3, 7, device=device)
    torch.library.opcheck(_states_mse, (s, t, weights))
    torch.library.opcheck(_states_mse_backward.op, (torch.ones((), device=device), weights, [x.detach() for x in s], t))
