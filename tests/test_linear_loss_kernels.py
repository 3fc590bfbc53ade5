"""linear_cross_entropy and linear_kd, the fused path: error budgets against float64, all gradients, chunks, 16-bit gradients in place."""
import math

import pytest
import torch

from kernels import linear_loss
from kernels.kd_loss import kd_loss_ref
from kernels.linear_loss import _linear_loss, _padded, linear_cross_entropy, linear_cross_entropy_ref, linear_kd, linear_kd_ref

EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")      # -inf - -inf in masked lanes, reported by numpy


def inputs(R, V, d=8, dtype=torch.float32, device="cpu", bias=True):
    """[x, weight, bias], which require gradients; the teacher's three, of another width; labels, with row 1 ignored."""
    g = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(R, w, generator=g), 3 * torch.randn(V, w, generator=g) / w**0.5,
                         torch.randn(V, generator=g) if bias else None] for w in (d, d + 3))
    y = torch.randint(V, (R,), generator=g)
    y[1:2] = -100
    student = [None if p is None else p.to(device, dtype).requires_grad_() for p in student]
    return student, [None if p is None else p.to(device, dtype) for p in teacher], y.to(device)


def double(parts):
    return [None if p is None else p.detach().double().requires_grad_(p.requires_grad) for p in parts]


def loss_and_gradients(function, student, teacher, y, **options):
    """For an upstream gradient that is not 1."""
    loss = function(*student, *teacher, y, **options)
    return loss, *torch.autograd.grad(loss * 0.37, [p for p in student if p is not None and p.requires_grad])


def assert_close(results, expected):
    """Close up to the order of summation, which differs between layouts and GEMMs."""
    for x, z in zip(results, expected):
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-6)


def assert_within_budget(student, teacher, y, **options):
    """Checks err(ours) <= 2 err(reference in that precision) + a few roundings."""
    fused, plain = (linear_kd, linear_kd_ref) if teacher else (linear_cross_entropy, linear_cross_entropy_ref)
    exact = loss_and_gradients(plain, double(student), double(teacher), y, **options)
    ours, ref = (loss_and_gradients(f, student, teacher, y, **options) for f in (fused, plain))
    dtype = student[0].dtype
    terms = exact[0].abs().item() + options.get("alpha", 0.0) * options.get("T", 1.0) ** 2 * math.log(len(student[1])) + 1
    unit = max(8 * EPS, torch.finfo(dtype).eps * (0 if dtype == torch.float32 else 0.5))
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    for i, (x, r, z) in enumerate(zip(ours, ref, exact)):
        assert i == 0 or (x.dtype == r.dtype and x.shape == r.shape)
        error, budget = (x - z).abs().max().item(), 2 * (r - z).abs().max().item()
        assert error <= budget + (4 * EPS * terms if i == 0 else unit * z.abs().max().item()), f"{i}: {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("V", [2, 3, 128, 300, 1003])
@pytest.mark.parametrize("alpha, T, kd, hard, bias, reduction", [
    (0.0, 1.0, False, True, True, "mean"), (0.0, 1.0, False, True, False, "sum"), (0.7, 5.0, True, True, True, "mean"),
    (0.7, 1.0, True, True, False, "mean"), (0.6, 2.0, True, False, True, "mean"), (1.0, 0.5, True, True, True, "sum")])
def test_forward_and_gradients(device, V, alpha, T, kd, hard, bias, reduction):
    student, teacher, y = inputs(5, V, device=device, bias=bias)
    options = dict(alpha=alpha, T=T) if kd else {}
    assert_within_budget(student, teacher if kd else [], y if hard else None, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V, kd", [(50, True), (1003, False), (9001, True), (9001, False)])
def test_gradients_written_over_the_logits_and_rows_of_several_tiles(device, dtype, V, kd):
    student, teacher, y = inputs(4, V, 16, dtype, device)
    assert_within_budget(student, teacher if kd else [], y, **(dict(alpha=0.7, T=2.0) if kd else {}))


def test_16_bit_logits_are_not_rounded_on_the_way(device):
    student, teacher, y = inputs(6, 300, 16, torch.bfloat16, device)
    loss = linear_kd(*student, *teacher, y, alpha=0.7, T=3.0)
    exact = linear_kd_ref(*double(student), *double(teacher), y, alpha=0.7, T=3.0)
    assert abs(loss - exact) <= 4 * EPS * 9 * math.log(300)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows of 384 columns, two logit buffers."""
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 3 * 2 * 384 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("R", [3, 8])
def test_several_chunks(device, small_chunks, monkeypatch, dtype, bias, R):
    student, teacher, y = inputs(R, 300, 8, dtype, device, bias)
    rows, launch = [], linear_loss.launch
    monkeypatch.setattr(linear_loss, "launch", lambda kernel, n, *a, **k: (rows.append(n), launch(kernel, n, *a, **k)))
    assert_within_budget(student, teacher, y, alpha=0.7, T=2.0)
    assert rows == {3: [3], 8: [3, 3, 2]}[R]
    rows.clear()
    assert_within_budget(student, [], y)
    assert rows == {3: [3], 8: [4, 4]}[R]       # six would fit: all chunks have equal size


@pytest.mark.parametrize("megabytes, R, width, buffers, rows", [
    (256, 6400, 50304, 2, 640), (256, 4096, 50304, 1, 1024), (512, 4096, 50304, 2, 1024), (512, 200, 50304, 2, 256), (1, 9, 250112, 2, 1),
    (100, 104, 250112, 1, 104)])
def test_chunks_fill_the_memory_they_are_given_in_multiples_of_128_rows(monkeypatch, megabytes, R, width, buffers, rows):
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", megabytes * 2**20)
    assert linear_loss._chunk_rows(R, width, buffers) == rows


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_the_gradients_that_are_needed(device, small_chunks, wanted):
    student, teacher, y = inputs(5, 300, device=device)
    full = dict(zip(range(3), loss_and_gradients(linear_kd, student, teacher, y, alpha=0.5, T=2.0)[1:]))
    partial = [p.detach().requires_grad_(bool(want)) for p, want in zip(student, wanted)]
    _, *gradients = loss_and_gradients(linear_kd, partial, teacher, y, alpha=0.5, T=2.0)
    assert len(gradients) == sum(wanted) and all(map(torch.equal, gradients, (full[i] for i in range(3) if wanted[i])))


def test_without_gradients_the_same_loss(device):
    student, teacher, y = inputs(4, 300, device=device)
    loss = linear_kd(*student, *teacher, y, alpha=0.5, T=2.0)
    with torch.no_grad():
        torch.testing.assert_close(linear_kd(*student, *teacher, y, alpha=0.5, T=2.0), loss)     # another compilation: differs by an ulp
    detached = linear_kd(*(p.detach() for p in student), *(p.requires_grad_() for p in teacher), y, alpha=0.5, T=2.0)
    torch.testing.assert_close(detached, loss)
    assert not detached.requires_grad
    loss.backward()
    assert all(p.grad is None for p in teacher) and all(p.grad is not None for p in student)


@pytest.mark.parametrize("R", [0, 3])
def test_where_no_row_counts_there_is_zero_and_no_nan(device, R):
    student, teacher, y = inputs(R, 300, device=device)
    y.fill_(-100)
    for reduction in ("mean", "sum"):
        for results in (loss_and_gradients(linear_cross_entropy, student, [], y, reduction=reduction),
                        loss_and_gradients(linear_kd, student, teacher, y, alpha=0.5, T=2.0, reduction=reduction)):
            assert all(torch.equal(x, torch.zeros_like(x)) for x in results) and results[2].shape == student[1].shape
        if R == 0:      # without labels, all of no rows count
            assert linear_kd(*student, *teacher, alpha=0.5, T=2.0, reduction=reduction) == 0


def test_other_ignore_indices_and_labels_that_are_no_class(device):
    student, _, y = inputs(4, 20, device=device)
    y[:] = torch.tensor([7, 7, 3, 19])
    loss = linear_cross_entropy(*student, y, ignore_index=7)
    assert_close([loss], [linear_cross_entropy(student[0][2:], *student[1:], y[2:])])
    for wrong in (20, -1, 2**32 + 5):      # there are 128 columns
        y[2] = wrong
        assert linear_cross_entropy(*student, y, ignore_index=7).isnan()


def test_columns_past_the_vocabulary_take_no_part(device):
    """All logits are far below 0, the logit of a padded column."""
    student, teacher, y = inputs(3, 130, device=device)
    with torch.no_grad():
        student[2] -= 200
        teacher[2] -= 300
    assert_within_budget(student, teacher, y, alpha=0.5, T=2.0)
    assert_within_budget([student[0], student[1] + 0, None], [], y)


def test_the_weight_is_copied_only_where_that_is_needed(device):
    weight = torch.randn(256, 8, device=device)
    assert _padded(weight, 256, torch.float32) is weight and _padded(None, 256, torch.float32) is None
    for x, rows, dtype in ((weight[:200], 256, torch.float32), (weight, 256, torch.float16), (weight.T.contiguous().T, 256, torch.float32)):
        out = _padded(x, rows, dtype)
        assert out.is_contiguous() and out.shape == (256, 8) and torch.equal(out[:len(x)], x.to(dtype)) and not out[len(x):].any()


def test_minus_infinity_in_the_bias_masks_a_class(device):
    student, teacher, y = inputs(4, 300, device=device)
    with torch.no_grad():
        student[2][5], teacher[2][5], teacher[2][200:] = -math.inf, -math.inf, -math.inf
    y[0] = 250
    assert_within_budget(student, teacher, y, alpha=0.5, T=2.0)


def test_views_and_weights_of_other_dtypes(device):
    student, teacher, y = inputs(5, 300, device=device)
    expected = loss_and_gradients(linear_kd, student, teacher, y, alpha=0.5, T=2.0)
    loose = [p.detach().T.contiguous().T.requires_grad_() for p in student[:2]]
    loose.append(torch.stack([student[2].detach()] * 2, 1)[:, 0].requires_grad_())
    wide = torch.stack([teacher[0], teacher[0]], 1)[:, 0]
    assert not any(p.is_contiguous() for p in (*loose, wide))
    assert_close(loss_and_gradients(linear_kd, loose, [wide, teacher[1].T.contiguous().T, teacher[2]], torch.stack([y, y], 1)[:, 0],
                                    alpha=0.5, T=2.0), expected)
    half = student[0].detach().half().requires_grad_(), *student[1:]       # x decides; each gradient has the dtype of its input
    results = loss_and_gradients(linear_cross_entropy, half, [], y)
    assert [x.dtype for x in results] == [torch.float32, torch.float16, torch.float32, torch.float32]
    assert not any(torch.equal(x, x.half().float()) for x in results[2:])      # nor is it rounded on the way
    rounded = [p.detach().half().float().requires_grad_() for p in student[:2]] + student[2:]
    for x, z in zip(results, loss_and_gradients(linear_cross_entropy_ref, rounded, [], y)):
        torch.testing.assert_close(x.float(), z, rtol=2e-3, atol=2e-4)
    plain = loss_and_gradients(linear_cross_entropy_ref, half, [], y)       # the reference casts, too
    assert [x.dtype for x in plain] == [x.dtype for x in results] and torch.isclose(plain[0], results[0], rtol=1e-2)
    linear_kd_ref(*half, *(p.detach() for p in half), y, alpha=0.5, T=2.0).backward()


@pytest.mark.parametrize("T, noise", [(1.0, 0.003), (2.0, 0.03), (20.0, 0.3)])
def test_a_student_near_its_teacher_keeps_its_small_fp16_gradients(device, T, noise):
    """In the norm, against the reference with a loss scale of 1024: differences of probabilities are below fp16's normal numbers."""
    student, _, _ = inputs(16, 5000, dtype=torch.float16, device=device)
    g = torch.Generator().manual_seed(1)
    teacher = [p.detach() + noise * torch.randn(p.shape, generator=g).to(p) for p in student]

    def gradients(function, student, teacher):
        loss = function(*student, *teacher, alpha=1.0, T=T, reduction="sum")
        return [x.double() / 1024 for x in torch.autograd.grad(1024 * loss, student)]

    truth = gradients(linear_kd_ref, double(student), double(teacher))
    for ours, plain, z in zip(*(gradients(f, student, teacher) for f in (linear_kd, linear_kd_ref)), truth):
        assert (ours - z).norm() <= 2 * (plain - z).norm() + 1e-3 * z.norm()


def test_fp16_gradients_that_are_large_or_add_up_do_not_overflow(device):
    """G reaches alpha T, 20, which leaves fp16 after 11 doublings. Its sums over rows leave it sooner."""
    student, _, _ = inputs(8, 3, dtype=torch.float16, device=device)
    with torch.no_grad():
        student[1].mul_(64)
    teacher = [student[0].detach(), *(-p.detach() for p in student[1:])]
    assert_within_budget(student, teacher, None, alpha=1.0, T=20.0, reduction="sum")
    x, bias = torch.zeros(8, 8, dtype=torch.float16, device=device), torch.zeros(3, device=device, requires_grad=True)
    loss = linear_cross_entropy(x, student[1].detach(), bias, torch.zeros(8, dtype=torch.int64, device=device), reduction="sum")
    expected = torch.tensor([-16.0, 8.0, 8.0], device=device) / 3       # 8 rows of 1 / 3 in each class
    torch.testing.assert_close(torch.autograd.grad(loss, bias)[0], expected, rtol=2e-3, atol=0)


def test_a_bias_in_fp32_is_added_in_fp32(device):
    """All other logits are 0. In 16 bits, 1 + 2^-12 would be 1."""
    x, weight = torch.zeros(2, 8, dtype=torch.bfloat16, device=device), torch.zeros(3, 8, device=device)
    bias, other = torch.tensor([[1 + 2**-12, -2.0, 0.0], [3 + 2**-11, 0.0, 1.0]], device=device)
    y = torch.tensor([0, 1], device=device)
    s, t = (b.double().expand(2, 3) for b in (bias, other))
    exact = kd_loss_ref(s, t, y, alpha=0.5, T=2.0).mean()
    assert abs(linear_kd(x, weight, bias, x, weight, other, y, alpha=0.5, T=2.0) - exact) <= 1e-6


def test_a_second_derivative_is_refused(device):
    student, _, y = inputs(5, 300, device=device)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(linear_cross_entropy(*student, y), student, create_graph=True)


def test_a_loss_scale_saves_small_fp16_gradients(device):
    """1 / (rows that count) and the scale combine before dX is rounded. dX alone is below fp16's smallest number; scaled, it is not."""
    student, _, y = inputs(5, 300, dtype=torch.float16, device=device)
    x = student[0]
    gradient, = torch.autograd.grad(linear_cross_entropy(*student, y) / 2**20 * 2**20, x)
    tiny, = torch.autograd.grad(linear_cross_entropy(*student, y) / 2**20, x)
    again, = torch.autograd.grad(linear_cross_entropy(*student, y) * torch.tensor(2.0**-20, device=device) * 2**20, x)
    assert torch.equal(gradient, again) and gradient.abs().max() > 0.01 and tiny.abs().max() < 1e-6


def test_autocast(device):
    student, teacher, y = inputs(5, 300, 16, device=device)
    cast = [student[0].detach().bfloat16().requires_grad_(), *student[1:]], [teacher[0].bfloat16(), *teacher[1:]]
    for function, options, kd in ((linear_cross_entropy, {}, False), (linear_kd, dict(alpha=0.5, T=2.0), True)):
        expected = loss_and_gradients(function, cast[0], cast[1] if kd else [], y, **options)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results = loss_and_gradients(function, student, teacher if kd else [], y, **options)
        assert results[1].dtype == torch.float32        # the dtype of x, not of autocast's copy
        assert all(torch.equal(x, z.to(x.dtype)) for x, z in zip(results, expected))


def test_finite_differences(device):
    student, teacher, y = inputs(3, 5, 4, device=device)
    _, *gradients = loss_and_gradients(linear_kd, student, teacher, y, alpha=0.6, T=2.0)
    torch.autograd.gradcheck(lambda *s: linear_kd(*s, *double(teacher), y, alpha=0.6, T=2.0), double(student))     # float64: the reference
    for i, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(i)).to(device)
        up, down = (linear_kd(*(p + e * step if j == i else p for j, p in enumerate(student)), *teacher, y, alpha=0.6, T=2.0)
                    for e in (1e-2, -1e-2))
        torch.testing.assert_close((gradient * step).sum() / 0.37, (up - down) / 2e-2, rtol=2e-3, atol=1e-3)


def test_both_paths_agree_and_the_cpu_takes_the_reference(device, monkeypatch):
    student, teacher, y = inputs(4, 50, device=device)
    ours, plain = (f(*student, *teacher, y, alpha=0.5, T=2.0) for f in (linear_kd, linear_kd_ref))
    torch.testing.assert_close(ours, plain)
    assert linear_kd(*double(student), *double(teacher), y, alpha=0.5, T=2.0).dtype == torch.float64
    assert torch.equal(*(f(*student, *double(teacher), y, alpha=0.5, T=2.0) for f in (linear_kd, linear_kd_ref)))
    with monkeypatch.context() as patch:        # and gives the teacher no gradient
        patch.setenv("RT_KERNELS", "ref")
        taught = [p.detach().requires_grad_() for p in teacher]
        linear_kd(*student, *taught, y, alpha=0.5, T=2.0).backward()
        assert all(p.grad is None for p in taught)
    monkeypatch.delenv("RT_KERNELS")
    assert torch.equal(linear_kd(*student, *teacher, y, alpha=0.5, T=2.0), plain if device.type == "cpu" else ours)
    if device.type == "cpu":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear_cross_entropy(*student, y), linear_cross_entropy_ref(*student, y))
            assert torch.equal(linear_cross_entropy(*student, y), linear_cross_entropy_ref(*(p.bfloat16() for p in student), y))


def test_the_op_is_registered_in_full(device):
    student, teacher, y = inputs(3, 20, device=device)
    for args, needs in (((*student, *teacher, y), (True, True, True)), ((*student, None, None, None, y), (True, True, True)),
                        ((student[0].detach(), student[1], None, *teacher[:2], None, None), (False, True, False))):
        torch.library.opcheck(_linear_loss.op, (*args, 0.5, 2.0, -100, *needs))


@pytest.mark.parametrize("amp", [False, True])
def test_one_graph_under_torch_compile(device, amp):
    student, teacher, y = inputs(3, 20, device=device)
    compiled = torch.compile(lambda *a: linear_kd(*a, alpha=0.5, T=2.0), fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
        results = loss_and_gradients(compiled, student, teacher, y), loss_and_gradients(linear_kd, student, teacher, y, alpha=0.5, T=2.0)
    assert all(map(torch.equal, *results))


def test_shapes_that_do_not_fit_are_said(device):
    (x, w, b), teacher, y = inputs(3, 20, device=device)
    for wrong in ((x[:, :3], w, b, y), (x, w, b[:3], y), (x[0], w, b, y)):
        with pytest.raises(ValueError, match="do not fit"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(x, w, b, y[:2])
    with pytest.raises(ValueError, match="needs labels"):
        linear_cross_entropy(x, w, b, None)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, w, b, y, reduction="none")
    with pytest.raises(ValueError, match="equally many"):
        linear_kd(x, w, b, teacher[0], teacher[1][:9], None, y, alpha=0.5, T=2.0)
    with pytest.raises(ValueError, match="do not fit"):
        linear_kd(x, w, b, *teacher[:2], teacher[2][:9], y, alpha=0.5, T=2.0)
    with pytest.raises(ValueError, match="positive"):
        linear_kd(x, w, b, *teacher, y, alpha=0.5, T=0.0)


def test_a_teacher_without_weight_is_not_looked_at(device):
    student, teacher, y = inputs(4, 50, device=device)
    for function in (linear_kd, linear_kd_ref):
        assert function(*student, *(p * math.nan for p in teacher), y, alpha=0.0, T=2.0).isfinite()


def test_a_teacher_of_a_wider_dtype_is_not_rounded(device):
    student, _, y = inputs(5, 300, dtype=torch.float16, device=device)
    teacher = inputs(5, 300, device=device)[1]
    exact = linear_kd_ref(*double(student), *double(teacher), y, alpha=1.0, T=2.0)
    assert abs(linear_kd(*student, *teacher, y, alpha=1.0, T=2.0) - exact) <= 5e-5      # 3e-4 if it is


def test_without_gradients_none_is_computed(device, monkeypatch):
    student, _, y = inputs(4, 300, device=device)
    asked = []
    monkeypatch.setattr(linear_loss, "_linear_loss", lambda *a: asked.append(a[-3:]) or _linear_loss(*a))
    linear_cross_entropy(*student, y)
    with torch.no_grad():
        linear_cross_entropy(*student, y)
    assert asked == [(True,) * 3, (False,) * 3]
