"""kd_loss, hidden_mse and states_mse, the kernels: error budgets against float64, all gradients, top-k teachers, one launch per pass."""
import math

import pytest
import torch

from kernels import hidden_mse, kd_loss, states_mse
from kernels.hidden_mse import _hidden_mse, _hidden_mse_backward, _states_mse, _states_mse_backward, hidden_mse_ref, states_mse_ref
from kernels.kd_loss import TopK, _kd_loss, _kd_loss_backward, kd_loss_ref, top_k

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
    if isinstance(x, TopK):
        return TopK(x.ids, x.logits.double(), x.tail.double())
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
@pytest.mark.parametrize("C, k", [(17, 0), (1003, 0), (1003, 7), (5001, 0)])
def test_16_bit_logits_are_not_rounded_on_the_way(device, dtype, C, k):
    s, t, y = logits(4, C, dtype, device)
    assert_within_budget(s, top_k(t, k, 2.0) if k else t, y, 0.7, 2.0)
    loss = kd_loss(s, t, y, alpha=0.7, T=2.0)       # from the same 16-bit logits fp32 arithmetic gives the same loss
    torch.testing.assert_close(loss, kd_loss_ref(s.float(), t.float(), y, alpha=0.7, T=2.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_student_and_teacher_of_different_dtypes(device, dtypes):
    s, t, y = logits(4, 300, device=device)
    assert_within_budget(s.detach().to(dtypes[0]).requires_grad_(), t.to(dtypes[1]), y, 0.5, 2.0)


@pytest.mark.parametrize("C, ks", [(2, (1, 2)), (3, (2, 3)), (17, (1, 7, 17)), (300, (5, 300)), (1003, (1, 7, 40)), (9001, (7, 300))])
@pytest.mark.parametrize("alpha, T, hard", [(0.7, 5.0, True), (0.7, 1.0, True), (1.0, 2.0, False)])
def test_top_k(device, C, ks, alpha, T, hard):
    s, t, y = logits(4, C, device=device)
    for k in ks:
        assert_within_budget(s, top_k(t, k, T), y if hard else None, alpha, T)


@pytest.mark.parametrize("C", (30, 2050, 5000))
def test_top_k_in_any_order_with_ids_of_32_bits_and_at_the_ends_of_tiles(device, C):
    s, t, y = logits(3, C, device=device)
    ids = torch.tensor([[C - 1, *(i for i in (0, 15, 1023, 1024, 2047, 2048) if i < C - 1)]] * 3, device=device)
    short = TopK(ids, t.gather(1, ids), torch.tensor([1.0, 9.0, -3.0], device=device))
    assert_within_budget(s, short, y, 0.7, 2.0)
    for x, z in zip(rows_and_gradient(kd_loss, s, TopK(ids.flip(1).int(), short.logits.flip(1), short.tail), y, alpha=0.7, T=2.0),
                    rows_and_gradient(kd_loss, s, short, y, alpha=0.7, T=2.0)):
        assert torch.equal(x, z)


def test_top_k_is_the_kl_over_k_plus_1_outcomes(device):
    s, t, _ = logits(3, 9, device=device)
    rows = kd_loss(s, top_k(t, 4, 2.5), alpha=0.8, T=2.5)
    for i in range(3):
        ids = t[i].topk(4).indices.tolist()
        p, q = ((x[i].double() / 2.5).softmax(-1) for x in (t, s.detach()))
        pairs = [(p[j], q[j]) for j in ids] + [(1 - p[ids].sum(), 1 - q[ids].sum())]
        assert rows[i].item() == pytest.approx(0.8 * 2.5**2 * sum((a * (a / b).log()).item() for a, b in pairs), rel=1e-5)


@pytest.mark.parametrize("tail, T", [(1e-6, 1.0), (1e-6, 4.0), (1e-30, 1.0)])
def test_a_small_bucket_loses_no_digits(device, tail, T):
    """Checks every number, not just the largest: here 1 - (sum of the top) would be off by 6%, or completely."""
    s, t, _ = logits(3, 1003, device=device)
    short = top_k(t, 5, T)
    with torch.no_grad():       # the student puts all but `tail` on the teacher's top 5
        rest = (s.double() / T).scatter(1, short.ids, -math.inf).logsumexp(1, keepdim=True)
        top = (s.double() / T).gather(1, short.ids)
        raised = T * (top + rest - top.logsumexp(1, keepdim=True) - math.log(tail))
        s.scatter_(1, short.ids, raised.float())
    exact = rows_and_gradient(kd_loss_ref, double(s).requires_grad_(), double(short), alpha=1.0, T=T)
    for x, z in zip(rows_and_gradient(kd_loss, s, short, alpha=1.0, T=T), exact):
        torch.testing.assert_close(x.double(), z, rtol=3e-5, atol=0)       # logits up to 80: exponents are accurate to 80 EPS


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
    assert_within_budget(s, top_k(t, 4, 2.0), y, 0.6, 2.0)
    with torch.no_grad():
        s[4, 9] = -math.inf                                 # the teacher has some mass here
    assert kd_loss(s, t, alpha=1.0, T=2.0)[4] == math.inf
    y[4] = 9
    assert kd_loss(s, None, y, alpha=0.5, T=1.0)[4] == math.inf


def test_a_bucket_that_is_empty_in_the_teacher_the_student_or_both(device):
    s, t, y = logits(4, 40, device=device)
    ids = t.topk(5).indices
    with torch.no_grad():
        for row, x in ((0, t), (1, s), (1, t)):
            x[row] = torch.full((40,), -math.inf, device=device).scatter(0, ids[row], x[row, ids[row]])
    y[:2] = ids[:2, 0]
    short = top_k(t, 5, 2.0)
    assert_within_budget(s, short, y, 0.6, 2.0)
    rows = kd_loss(s, short._replace(tail=torch.zeros(4, device=device)), alpha=1.0, T=2.0)
    assert rows[1] == math.inf and rows[[0, 2, 3]].isfinite().all()


def test_equal_logits_have_no_divergence_and_shifted_ones_nearly_none(device):
    s, _, _ = logits(4, 5001, device=device)
    rows, gradient = rows_and_gradient(kd_loss, s, s.detach(), alpha=1.0, T=3.0)
    assert rows.abs().max() <= 9 * EPS and gradient.abs().max() <= EPS
    whole = (64 * s.detach()).round() / 64          # sums with 1024 are exact
    for short in (whole, top_k(whole, 9, 3.0)):
        rows, gradient = rows_and_gradient(kd_loss, (whole + 1024).requires_grad_(), short, alpha=1.0, T=3.0)
        assert rows.abs().max() <= (9 if short is whole else 9 * 1024) * EPS        # a bucket's logit is rounded when it is made
        if short is whole:
            assert gradient.abs().max() <= EPS
        else:       # the bucket's logit is off by at most one rounding of 1024 when made and one when read; d p is p times that
            p = ((whole.double() + 1024) / 3).softmax(-1)
            assert (gradient.abs() <= 2 * 1024 * EPS * upstream(4, device).abs()[:, None] * p).all()


def test_ignored_rows(device):
    s, t, y = logits(4, 50, device=device)
    y[1] = 30
    for ignored in (-100, -1, 7):
        y[0] = ignored
        rows, gradient = rows_and_gradient(lambda *a: kd_loss(*a, alpha=0.5, T=2.0, ignore_index=ignored), s, t, y)
        assert rows[0] == 0 and rows[1] > 0 and not gradient[0].any() and gradient[1].all()
    y[0] = 50       # neither a class nor ignored
    assert kd_loss(s, None, y, alpha=0.5, T=2.0).isnan().tolist() == [True, False, False, False]


def test_a_term_that_vanishes_is_not_looked_at(device):
    s, t, y = logits(4, 50, device=device)
    rows, gradient = rows_and_gradient(kd_loss, s, t * math.nan, y, alpha=0.0, T=2.0)
    assert torch.isfinite(rows).all() and torch.isfinite(gradient).all()
    assert torch.equal(rows, kd_loss(s, None, y, alpha=0.0, T=7.0))
    assert_within_budget(s, top_k(t, 3, 2.0), y, 0.0, 2.0)
    only = kd_loss(s, t, y, alpha=1.0, T=2.0)
    assert torch.equal(only[2:], kd_loss(s, t, alpha=1.0, T=2.0)[2:]) and only[1] == 0


def test_views_are_read_in_place_and_copied_where_that_cannot_be(device):
    s, t, y = logits(6, 300, device=device)
    wide = torch.zeros(6, 2, 305, device=device)
    wide[:, 0, 3:303], wide[:, 1, 3:303] = s.detach(), t
    y2 = torch.stack([y, -y], 1)[:, 0]
    short = top_k(t, 9, 2.0)
    loose = TopK(short.ids.T.contiguous().T, short.logits.T.contiguous().T, torch.stack([short.tail] * 2, 1)[:, 0])
    expected, expected_top = (rows_and_gradient(kd_loss, s, x, y, alpha=0.7, T=2.0) for x in (t, short))
    for view in (wide[:, 0, 3:303], s.detach().T.contiguous().T):
        leaf = view.detach().requires_grad_()
        assert not leaf.is_contiguous() and not y2.is_contiguous()
        for teacher, z in ((wide[:, 1, 3:303], expected), (t.T.contiguous().T, expected), (loose, expected_top)):
            assert_close(rows_and_gradient(kd_loss, leaf, teacher, y2, alpha=0.7, T=2.0), z)
    one = t[:1].expand(6, -1)
    assert_close([kd_loss(s, one, y, alpha=0.7, T=2.0)], [kd_loss(s, one.contiguous(), y, alpha=0.7, T=2.0)])
    mean, = torch.autograd.grad(kd_loss(s, t, y, alpha=0.7, T=2.0).mean(), s)       # an expanded upstream gradient
    torch.testing.assert_close(mean, torch.autograd.grad(kd_loss_ref(s, t, y, alpha=0.7, T=2.0).mean(), s)[0])


def test_no_gradient_reaches_the_teacher(device):
    s, t, y = logits(3, 20, device=device)
    t.requires_grad_()
    for teacher in (t, top_k(t, 3, 2.0)):
        kd_loss(s, teacher, y, alpha=0.5, T=2.0).sum().backward()
        assert s.grad is not None and t.grad is None
        assert not kd_loss(s.detach(), teacher, y, alpha=0.5, T=2.0).requires_grad


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
    assert launched == ["_forward", "_backward"]


def test_no_rows(device):
    s, t, y = logits(0, 20, device=device)
    rows = kd_loss(s, t, y, alpha=0.5, T=2.0)
    gradient, = torch.autograd.grad(rows.sum(), s)
    assert rows.shape == (0,) and gradient.shape == (0, 20)


def test_finite_differences(device):
    s, t, y = logits(3, 6, device=device, scale=1.0)
    for teacher in (t, top_k(t, 2, 2.0)):
        exact = double(s).requires_grad_()
        torch.autograd.gradcheck(lambda x: kd_loss(x, double(teacher), y, alpha=0.7, T=2.0), exact)        # float64 uses the reference
        _, gradient = rows_and_gradient(kd_loss, s, teacher, y, alpha=0.7, T=2.0)
        for i in range(6):
            step = torch.zeros(3, 6, device=device)
            step[:, i] = 1e-2
            up, down = ((kd_loss(s + e, teacher, y, alpha=0.7, T=2.0) * upstream(3, device)) for e in (step, -step))
            torch.testing.assert_close(gradient[:, i], (up - down) / 2e-2, rtol=2e-3, atol=2e-4)


def test_both_paths_agree_and_the_cpu_takes_the_reference(device, monkeypatch):
    s, t, y = logits(4, 50, device=device)
    ours = kd_loss(s, t, y, alpha=0.5, T=2.0)
    torch.testing.assert_close(ours, kd_loss_ref(s, t, y, alpha=0.5, T=2.0))
    assert kd_loss(s.double(), t, y, alpha=0.5, T=2.0).dtype == torch.float64
    monkeypatch.delenv("RT_KERNELS")
    assert torch.equal(kd_loss(s, t, y, alpha=0.5, T=2.0), kd_loss_ref(s, t, y, alpha=0.5, T=2.0) if device.type == "cpu" else ours)


@pytest.mark.parametrize("k", [0, 4])
def test_kd_ops_are_registered_in_full(device, k):
    s, t, y = logits(3, 20, device=device)
    short = top_k(t, 4, 2.0)
    ids = short.ids.sort(-1).values if k else None
    teacher = (t.gather(1, ids), ids, short.tail) if k else (t, None, None)
    torch.library.opcheck(_kd_loss.op, (s, *teacher, y, 0.5, 2.0, -100))
    torch.library.opcheck(_kd_loss.op, (s, *teacher, None, 0.5, 2.0, -100))
    loss, stats = _kd_loss(s.detach(), *teacher, y, 0.5, 2.0, -100)
    torch.library.opcheck(_kd_loss_backward.op, (torch.ones_like(loss), s.detach(), *teacher[:2], y, stats, 0.5, 2.0, -100))


def test_one_graph_under_torch_compile(device):
    s, t, y = logits(3, 20, device=device)
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    for args in ((t, y), (top_k(t, 4, 2.0), y), (t,), (None, y)):
        results = [rows_and_gradient(f, s, *args, alpha=0.5, T=2.0) for f in (compiled, kd_loss)]
        assert all(map(torch.equal, *results))
    compiled = torch.compile(hidden_mse, fullgraph=True, backend="aot_eager")
    a, b, rows = states(3, 5, 2, 7, device=device)
    assert all(map(torch.equal, *(rows_and_gradient(f, a, b, rows) for f in (compiled, hidden_mse))))


def test_rows_further_than_2_to_the_31_elements_apart(device):
    if device.type == "cpu":
        pytest.skip("a tensor of 4 GB, for a GPU")
    s, t, y = logits(3, 300, torch.float16, device)
    far = torch.zeros(2**31 + 300, dtype=torch.float16, device=device).as_strided((3, 300), (2**30, 1)).copy_(t)
    expected = rows_and_gradient(kd_loss, s, t, y, alpha=0.5, T=2.0)
    assert_close(rows_and_gradient(kd_loss, s, far, y, alpha=0.5, T=2.0), expected)
    far.copy_(s.detach())
    rows = kd_loss(far, t, y, alpha=0.5, T=2.0)
    assert_close([rows], expected)


def test_shapes_that_do_not_fit_are_said(device):
    s, t, y = logits(3, 20, device=device)
    short = top_k(t, 4, 2.0)
    for wrong in (t[:2], t[0], short._replace(logits=t[:, :2]), short._replace(tail=t[:2, 0]), TopK(*(x[:2] for x in short))):
        with pytest.raises(ValueError, match="alike"):
            kd_loss(s, wrong, y, alpha=0.5, T=2.0)
    with pytest.raises(ValueError, match=r"labels \(R,\)"):
        kd_loss(s, t, y[:2], alpha=0.5, T=2.0)
    with pytest.raises(ValueError, match="teacher or labels"):
        kd_loss(s, None, alpha=0.5, T=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("C, k", [(50265, 0), (250_000, 0), (50265, 4096)])
def test_the_longest_rows(device, C, k):
    s, t, y = logits(5, C, device=device)
    assert_within_budget(s, top_k(t, k, 2.0) if k else t, y, 0.7, 2.0)


def test_a_teachers_top_k_has_a_limit(device):
    s, t, _ = logits(2, 5000, device=device)
    with pytest.raises(ValueError, match="up to 4096"):
        kd_loss(s, top_k(t, 4097, 1.0), alpha=1.0, T=1.0)


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
    assert_close(rows_and_gradient(hidden_mse, loose, cache, torch.stack([rows, rows], 1)[:, 0]), expected)
    assert launched == ["_mse_forward", "_mse_backward"] and cache.grad is None
    assert hidden_mse(s[:0], t, rows[:0]).shape == (0,)
    with pytest.raises(ValueError, match="equal size"):
        hidden_mse(s, t)


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
    for wrong in ((s[:2], t, weights), (s, [x[:4] for x in t], weights), (s, t, weights[:2]), ([], [], weights[:0])):
        with pytest.raises(ValueError, match="of one shape"):
            states_mse(*wrong)


def test_states_mse_ops_are_registered_in_full(device):
    s, t, weights = layers(2, 3, 7, device=device)
    torch.library.opcheck(_states_mse, (s, t, weights))
    torch.library.opcheck(_states_mse_backward.op, (torch.ones((), device=device), weights, [x.detach() for x in s], t))
