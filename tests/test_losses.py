"""Every loss against a written-out formula, at T != 1 and with student != teacher, including gradients."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import random_base

from kernels import hidden_mse, kd_loss, linear_cross_entropy
from kernels.linear_loss import linear_kd
from rt.data import Encoded, pad_to_multiple
from rt.deltas import attach
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, TeacherCache, run_teacher, task_loss
from rt.model import Activations, new_masked_lm


def logits(rows=6, C=5, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(rows, C, generator=g, dtype=torch.float64)).requires_grad_()
    return student, scale * torch.randn(rows, C, generator=g, dtype=torch.float64), torch.randint(C, (rows,), generator=g)


def softmax(row):
    e = [math.exp(x - max(row)) for x in row]
    return [x / sum(e) for x in e]


def kl(t, s, T):
    p, q = softmax([x / T for x in t]), softmax([x / T for x in s])
    return sum(a * math.log(a / b) for a, b in zip(p, q))


@pytest.mark.parametrize("alpha, T", [(0.7, 5.0), (0.0, 2.0), (1.0, 0.5), (0.9, 20.0)])
def test_kd_loss_is_the_formula_and_so_is_its_gradient(alpha, T):
    student, teacher, labels = logits()
    rows = kd_loss(student, teacher, labels, alpha=alpha, T=T)
    for i, row in enumerate(rows.tolist()):
        ce = -math.log(softmax(student[i].tolist())[labels[i]])
        expected = (1 - alpha) * ce + alpha * T**2 * kl(teacher[i].tolist(), student[i].tolist(), T)
        assert row == pytest.approx(expected, rel=1e-9)
    weight = torch.linspace(-1, 2, len(rows), dtype=torch.float64)      # a non-uniform upstream gradient
    grad, = torch.autograd.grad((rows * weight).sum(), student)
    # d/ds = (1 - alpha) (softmax(s) - onehot) + alpha T (softmax(s/T) - softmax(t/T))
    onehot = torch.nn.functional.one_hot(labels, 5)
    by_hand = ((1 - alpha) * (student.softmax(-1) - onehot)
               + alpha * T * ((student / T).softmax(-1) - (teacher / T).softmax(-1))) * weight[:, None]
    torch.testing.assert_close(grad, by_hand)


def test_kd_loss_alone_ignored_rows_and_no_gradient_to_the_teacher():
    student, teacher, labels = logits()
    teacher.requires_grad_()
    alone = kd_loss(student, teacher, alpha=0.6, T=3.0)
    assert alone[2].item() == pytest.approx(0.6 * 9 * kl(teacher[2].tolist(), student[2].tolist(), 3.0))
    labels[1] = -100
    rows = kd_loss(student, teacher, labels, alpha=0.6, T=3.0)
    assert rows[1] == 0
    rows.sum().backward()
    assert student.grad[1].abs().max() == 0 and student.grad[0].abs().max() > 0
    assert teacher.grad is None
    with pytest.raises(ValueError, match="positive"):
        kd_loss(student, teacher, alpha=0.5, T=0.0)
    with pytest.raises(ValueError, match="alike"):
        kd_loss(student, teacher[:, :4], alpha=0.5, T=1.0)


def test_kd_of_equal_logits_is_zero_and_small_where_probabilities_underflow():
    student, _, _ = logits(scale=300.0)
    assert kd_loss(student, student, alpha=1.0, T=1.0).abs().max() < 1e-9
    assert torch.isfinite(kd_loss(student, -student, alpha=1.0, T=1.0)).all()


def test_hidden_mse_is_the_mean_over_layers_and_width():
    a, b = torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 2, 4)
    rows = hidden_mse(a, b)
    assert rows[1].item() == pytest.approx(sum((x - y) ** 2 for x, y in zip(a[1].flatten().tolist(), b[1].flatten().tolist())) / 8,
                                           rel=1e-5)
    rows.sum().backward()
    torch.testing.assert_close(a.grad, 2 * (a.detach() - b) / 8)
    with pytest.raises(ValueError, match="equal size"):
        hidden_mse(a, b[:, :1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_losses_are_the_formula(reduction):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((4, 6), (9, 6), (9,)))
    teacher = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 5), (9, 5), (9,))]
    labels = torch.tensor([0, 8, -100, 3])
    rows = 3 if reduction == "mean" else 1
    s, t = x @ w.T + b, teacher[0] @ teacher[1].T + teacher[2]
    counting = [(s[i].tolist(), t[i].tolist(), y) for i, y in enumerate(labels.tolist()) if y != -100]
    ce = [-math.log(softmax(scores)[y]) for scores, _, y in counting]
    loss = linear_cross_entropy(x, w, b, labels, reduction=reduction)
    assert loss.item() == pytest.approx(sum(ce) / rows, rel=1e-9)
    p = (s.softmax(-1) - torch.nn.functional.one_hot(labels.clamp(0), 9)) / rows
    p[2] = 0
    for got, expected in zip(torch.autograd.grad(loss, (x, w, b)), (p @ w, p.T @ x, p.sum(0))):
        torch.testing.assert_close(got, expected)
    expected = sum(0.4 * c + 0.6 * 9 * kl(b, a, 3.0) for c, (a, b, _) in zip(ce, counting)) / rows
    assert linear_kd(x, w, b, *teacher, labels, alpha=0.6, T=3.0, reduction=reduction).item() == pytest.approx(expected, rel=1e-9)


@pytest.fixture
def distilling(tokenizer, batch):
    """A student in double precision, a teacher's cache, and the student's logits and states on `batch`."""
    student = attach(random_base(tokenizer), DeltaConfig("full"), 3, seed=1).double().eval()
    g = torch.Generator().manual_seed(5)
    cache = TeacherCache(torch.randn(9, 3, generator=g).double(), torch.randn(9, 2, 64, generator=g).double())
    batch.index = torch.tensor([3, 0, 8, 1, 4])
    s = student(batch, activations := Activations())
    return student, cache, s.tolist(), activations.states.detach()


@pytest.mark.parametrize("public_code", [False, True])
def test_total_loss_is_the_sum_of_method(distilling, batch, public_code):
    student, cache, s, states = distilling
    alpha, beta, T = 0.7, 10.0, 5.0
    config = DistillConfig(alpha, beta, T, public_code=public_code)
    loss = Loss(teacher=cache, config=config)(student, batch)
    expected = 0.0
    for i, n in enumerate(batch.index.tolist()):
        task = -math.log(softmax(s[i])[batch.labels[i]])
        kd = T**2 * kl(cache.logits[n].tolist(), s[i], T) / (3 if public_code else 1)
        patience = (states[i].float() - cache.states[n].float()).square().mean().item() * (0.5 if public_code else 1)
        expected += ((1 - alpha) * task + alpha * kd + beta * patience) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    student.encoder(batch, whole := Activations(hidden=[]))     # patience's gradient, too, by plain indexing
    rows = torch.stack([h[batch.first] for h in whole.hidden[:-1]], 1)
    plain = Loss(teacher=cache, config=replace(config, beta=0.0))(student, batch)
    plain = plain + beta * (rows - cache.states[batch.index]).square().mean() * (0.5 if public_code else 1)
    weights = [student.encoder.embeddings.word.weight, student.encoder.layers[0].qkv.weight]
    for got, by_hand in zip(*(torch.autograd.grad(total, weights, retain_graph=True) for total in (loss, plain))):
        torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-6)


def test_padding_a_batch_changes_no_loss_and_no_gradient(distilling, batch, tokenizer):
    student, cache, _, _ = distilling
    n = int(batch.cu_seqlens[4])
    batch = replace(batch, ids=batch.ids[:n], cu_seqlens=batch.cu_seqlens[:5], labels=batch.labels[:4], index=batch.index[:4])
    teacher = attach(random_base(tokenizer, seed=3), DeltaConfig("adapter"), 3, seed=2).double().eval()
    loss = Loss(False, cache, DistillConfig(alpha=0.7, beta=10.0, gamma=2.0, T=5.0), teacher_model=teacher)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    both = batch, pad_to_multiple(batch, cpu, torch.bfloat16)
    assert len(both[1].ids) == 64 > n and both[1].cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), *range(n + 1, 65)]
    values, gradients = [], []
    for one in both:
        student.zero_grad()
        values.append(loss(student, one))
        values[-1].backward()
        gradients.append({k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    assert pad_to_multiple(both[1], cpu, torch.bfloat16) is both[1]
    assert all(pad_to_multiple(batch, device, dtype) is batch for device, dtype in ((cpu, torch.float32), (cuda, torch.bfloat16)))


@pytest.mark.parametrize("att_layers", ["last", "all"])
def test_gamma_adds_the_divergence_of_attention_maps(distilling, batch, att_layers, tokenizer):
    student, cache, _, _ = distilling
    old = random_base(tokenizer, seed=3)
    if att_layers == "last":        # then the teacher may be deeper
        old = replace(old, encoder=new_masked_lm(replace(old.encoder.config, num_layers=3), 3).encoder)
    teacher = attach(old, DeltaConfig("adapter"), 3, seed=2).double().eval()
    plain = DistillConfig(alpha=0.7, beta=0.0, T=5.0)
    loss = Loss(False, cache, replace(plain, gamma=2.0, att_layers=att_layers), teacher_model=teacher)(student, batch)
    traces = []
    for model in (student, teacher):
        model(batch, activations := Activations(attention=(0, 1) if att_layers == "all" else (len(model.encoder.layers) - 1,)))
        traces.append(activations.qk)
    rows = []
    for (q_s, k_s), (q_t, k_t) in zip(*traces):
        for a, b in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:]):
            for i in range(a, b):
                for h in range(q_s.shape[1]):
                    s, t = ((q[i, h] @ k[a:b, h].T / math.sqrt(q.shape[-1])).tolist() for q, k in ((q_s, k_s), (q_t, k_t)))
                    rows.append(kl(t, s, 1.0))
    assert loss.item() == pytest.approx(Loss(False, cache, plain)(student, batch).item() + 2.0 * sum(rows) / len(rows), rel=1e-6)
    with_points = []        # at the student alone, also beside points of interpolation
    for gamma in (0.0, 2.0):
        torch.manual_seed(0)
        config = replace(plain, gamma=gamma, att_layers=att_layers, itp=1)
        with_points.append(Loss(False, cache, config, teacher)(student, batch).item())
    assert with_points[1] - with_points[0] == pytest.approx(2.0 * sum(rows) / len(rows), rel=1e-5)
    loss.backward()
    assert student.encoder.layers[1].qkv.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())


def test_regression_distils_by_squared_errors(tokenizer, batch):
    student = attach(random_base(tokenizer), DeltaConfig("full"), 1, seed=1).eval()
    batch.labels = torch.tensor([0.5, 1.0, -2.0, 0.0, 3.0])
    cache = TeacherCache(torch.randn(5, 1), torch.zeros(5, 2, 64))
    with torch.no_grad():
        s = student(batch).squeeze(-1)
        plain = Loss(is_regression=True)(student, batch)
        mixed = Loss(is_regression=True, teacher=cache, config=DistillConfig(0.25, 0.0, 3.0))(student, batch)
    torch.testing.assert_close(plain, ((s - batch.labels) ** 2).mean())
    torch.testing.assert_close(mixed, (0.75 * (s - batch.labels) ** 2 + 0.25 * (s - cache.logits[:, 0]) ** 2).mean())


def test_the_cache_is_the_teacher_without_dropout_example_by_example(tokenizer):
    teacher = attach(random_base(tokenizer), DeltaConfig("adapter"), 3, seed=2).train()
    data = Encoded([[0, 8, 7, 6, 2], [0, 9, 2], [0, 2]], torch.tensor([0, 1, 2]), 0)
    cache = run_teacher(teacher, data, torch.device("cpu"), torch.float32, batch_size=2)
    with torch.no_grad():
        for i in range(3):
            s = teacher.eval()(data.batch([i]), activations := Activations())
            torch.testing.assert_close(cache.logits[i], s[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cache.states[i], activations.states[0], atol=1e-5, rtol=1e-5)


def test_task_loss():
    s = torch.tensor([[2.0, -1.0], [0.5, 0.5]])
    torch.testing.assert_close(task_loss(s, torch.tensor([1, 0]), False),
                               torch.tensor([3 + math.log1p(math.exp(-3)), math.log(2)]))


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("regression", [False, True])
def test_itp_is_the_mean_over_points_by_two_plain_forwards(tokenizer, batch, kind, regression):
    outputs, alpha, beta, T = 1 if regression else 3, 0.7, 10.0, 2.0
    student, teacher = (attach(random_base(tokenizer, i), DeltaConfig(kind), outputs, seed=i).double().eval() for i in (0, 3))
    cache = TeacherCache(torch.randn(5, outputs).double(), torch.randn(5, 2, 64).double())
    if regression:
        batch.labels = torch.tensor([0.5, 1.0, -2.0, 0.0, 3.0])
    loss = Loss(regression, cache, DistillConfig(alpha, beta, T, itp=2), teacher_model=teacher)
    torch.manual_seed(9)
    points = torch.rand(2).tolist()
    torch.manual_seed(9)
    value = loss(student, batch)
    value.backward()
    assert all(p.grad is None for p in teacher.parameters()) and not any(w.requires_grad for w in loss.teacher_weights.values())

    expected, grads = 0.0, {k: torch.zeros_like(p) for k, p in student.named_parameters()}
    theirs = dict(teacher.named_parameters())
    for mu in (1.0, *points):
        model = copy.deepcopy(student).requires_grad_(True)     # a plain model with weights set by hand
        model.zero_grad()
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.copy_((1 - mu) * theirs[k] + mu * p)
        s = model(batch, activations := Activations())
        kd = ((s - cache.logits).square().mean() if regression else
              T**2 * (cache.logits / T).softmax(-1).mul((cache.logits / T).log_softmax(-1) - (s / T).log_softmax(-1)).sum() / 5)
        term = (alpha * kd + beta * (activations.states - cache.states).square().mean()) / 3
        if mu == 1.0:
            term = term + (1 - alpha) * task_loss(s.double(), batch.labels, regression).mean()
        term.backward()
        expected += term.item()
        for k, p in model.named_parameters():
            grads[k] += mu * (0 if p.grad is None else p.grad)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    for k, p in student.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[k], rtol=1e-4, atol=1e-6)
        else:
            assert p.grad is None, k


def test_itp_repeats_with_the_generator_and_none_draws_nothing(distilling, batch, tokenizer):
    student, cache, _, _ = distilling
    with pytest.raises(ValueError, match="itp need a teacher, and the teacher itself"):
        Loss(teacher=cache, config=DistillConfig(0.7, 0.0, 5.0, itp=1))
    plain = DistillConfig(alpha=0.7, beta=0.0, T=5.0)
    teacher = attach(random_base(tokenizer, 3), DeltaConfig("full"), 3, seed=2).double()
    itp = Loss(False, cache, replace(plain, itp=1), teacher_model=teacher)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(itp(student, batch).item())
    assert values[0] == values[1] != values[2]
    before = torch.get_rng_state()
    Loss(False, cache, plain)(student, batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_without_what_it_needs_is_refused():
    cache = TeacherCache(torch.zeros(5, 3), torch.zeros(5, 2, 64))
    with pytest.raises(ValueError, match="needs its DistillConfig"):
        Loss(teacher=cache)
    with pytest.raises(ValueError, match="gamma and itp need a teacher"):
        Loss(teacher=cache, config=DistillConfig(gamma=1.0))
