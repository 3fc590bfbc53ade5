"""attention: the reference against a formula written token by token in float64, and the kernels against the reference."""
import json
import math

import pytest
import torch

from kernels import attention, attention_qkv, configs
from kernels.attention import attention_ref, programs

LENGTHS = (5, 0, 1, 17, 32)


def inputs(dtype=torch.float64, lengths=LENGTHS, H=3, D=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    qkv = torch.randn(N, 3, H, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return qkv, cu


def formula(q, k, v, cu, scale, prefix=None):
    """The formula, one row at a time, in the given dtype."""
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
    weight = torch.randn(10, 2, 4, dtype=torch.float64)     # a non-uniform upstream gradient
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


def test_views_of_a_fused_projection_are_read_in_place():
    qkv, cu = inputs(torch.float32)
    q, k, v = qkv.unbind(1)
    assert not q.is_contiguous()
    torch.testing.assert_close(attention(q, k, v, cu, 32), attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, 32))


def test_shapes_that_do_not_fit_are_said():
    q = torch.zeros(4, 2, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for wrong in ((q, q[:3], q), (q, q, q[:, :1]), (q[0], q[0], q[0])):
        with pytest.raises(ValueError, match=r"\(N, H, D\)"):
            attention(*wrong, cu, 4)
    for bounds in (cu.long(), cu[None]):
        with pytest.raises(ValueError, match="int32"):
            attention(q, q, q, bounds, 4)
    for wrong in ((q, q.half(), q), (q, q, q.half())):
        with pytest.raises(ValueError, match="one dtype"):
            attention(*wrong, cu, 4)
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match="below 1"):
            attention(q, q, q, cu, 4, dropout_p=p)


# ---------------------------------------------------------------- the kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def prefix_of(P, H, D, device, dtype):
    g = torch.Generator().manual_seed(9)
    return [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in ((P, H, D), (P, H, D), (H,))]


def everything(function, qkv, cu, prefix=None, **arguments):
    """Output and all gradients, for a non-uniform upstream gradient."""
    out = function(*qkv.unbind(1), cu, int(cu.diff().max()), prefix_kv=prefix and tuple(prefix), **arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [qkv, *(prefix or [])])]


def assert_within_twice_the_references_error(qkv, cu, prefix=None, atol=2e-6, **arguments):
    """err(kernel) <= 2 err(reference in the same precision) + atol against the reference in float64, output and gradients."""
    def double(x):
        return x.detach().double().requires_grad_()

    ours = everything(attention, qkv, cu, prefix, **arguments)
    theirs = everything(attention_ref, qkv, cu, prefix, **arguments)
    truth = everything(attention_ref, double(qkv), cu, prefix and [double(x) for x in prefix], **arguments)
    for a, b, t in zip(ours, theirs, truth):
        assert a.dtype == b.dtype
        err, budget = (a.double() - t).abs().max(), 2 * (b.double() - t).abs().max() + atol * t.abs().max()
        assert err <= budget, f"error {err:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_the_reference_with_every_gradient(device, dtype, dropout_p):
    qkv, cu = inputs(dtype, (5, 0, 1, 70, 130), H=2)
    assert_within_twice_the_references_error(qkv.detach().to(device).requires_grad_(), cu.to(device), dropout_p=dropout_p, seed=2**40 + 5)


@pytest.mark.parametrize("D, dtype", [(64, torch.bfloat16), (128, torch.bfloat16), (48, torch.float16), (128, torch.float32)])
def test_kernels_of_other_head_sizes_and_short_sequences(device, D, dtype):
    qkv, cu = inputs(dtype, (64, 0, 3), H=2, D=D)
    assert_within_twice_the_references_error(qkv.detach().to(device).requires_grad_(), cu.to(device), scale=0.2)


def test_one_long_sequence_among_more_than_a_program_looks_at_at_once(device):
    lengths = [*[0] * 130, *[1] * 130, 140, 2]
    assert programs(sum(lengths), len(lengths), 140, 64)[1] == 0
    qkv, cu = inputs(torch.float32, lengths, H=1)
    qkv, cu = qkv.detach().to(device), cu.to(device)
    torch.testing.assert_close(attention(*qkv.unbind(1), cu, 140), attention_ref(*qkv.unbind(1), cu, 140), atol=1e-5, rtol=1e-5)


def test_every_block_of_a_sequence_has_a_program_and_at_most_one_too_many():
    g = torch.Generator().manual_seed(0)
    for BLOCK in (16, 64):
        lengths = torch.randint(0, 200, (50,), generator=g) * (torch.rand(50, generator=g) < 0.5)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        first = starts // BLOCK + torch.arange(51)
        needed = -(-lengths // BLOCK)
        assert ((first.diff() >= needed) & (first.diff() <= needed + 1)).all()
        assert programs(int(starts[-1]), 50, 1000, BLOCK) == (first[-1], 0) and first[-1] < needed.sum() + 51
    assert programs(32 * 512, 32, 512, 128) == (128, 4) and programs(32 * 60, 32, 60, 64) == (32, 1)


@pytest.mark.parametrize("P, lengths, dtype", [(20, (500, 30), torch.bfloat16), (70, (90, 0, 1), torch.float16),
                                               (20, (40, 1), torch.float32)])
def test_prefix_beside_the_kernels(device, P, lengths, dtype):
    qkv, cu = inputs(dtype, lengths, H=4)
    assert_within_twice_the_references_error(qkv.detach().to(device).requires_grad_(), cu.to(device),
                                             prefix_of(P, 4, 32, device, torch.float32),
                                             atol=max(2e-6, torch.finfo(dtype).eps / 2))    # the gate's gradient: one number per head


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("lengths, D, dropout_p", [((8192, 1, 777), 64, 0.0), ((8192, 100), 128, 0.1), ((512,) * 16, 64, 0.1)])
def test_long_sequences_in_bf16(device, lengths, D, dropout_p):
    qkv, cu = inputs(torch.bfloat16, lengths, H=2, D=D)
    assert_within_twice_the_references_error(qkv.detach().to(device).requires_grad_(), cu.to(device), dropout_p=dropout_p, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_more_than_2_to_31_elements(device):
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB of GPU memory")
    S, H, D = 128, 12, 64
    B = 2**31 // (S * H * D) + 2        # q, k, v, the output and each gradient have this size: 4.3 GB
    qkv = torch.randn(B * S, 3, H, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    cu = torch.arange(B + 1, device=device, dtype=torch.int32) * S
    out = attention_qkv(qkv, cu, S)
    grad, = torch.autograd.grad(out[-S:].square().sum(), qkv)
    last = qkv.detach()[-S:].clone().requires_grad_()
    expected = attention_ref(*last.unbind(1), cu[:2], S)
    expected_grad, = torch.autograd.grad(expected.square().sum(), last)
    torch.testing.assert_close(out[-S:], expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(grad[-S:], expected_grad, atol=5e-2, rtol=5e-2)


def test_scores_far_below_zero_do_not_overflow(device):
    q = torch.full((70, 1, 32), 8.0, device=device, requires_grad=True)
    cu = torch.tensor([0, 70], dtype=torch.int32, device=device)
    out = attention(q, -q, q, cu, 70)       # log2-sum-exp2 = -518: exp2 of its negative is infinite in fp32
    torch.testing.assert_close(out, q)
    assert torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all()


def test_any_strides_with_a_contiguous_last_dimension_and_a_longer_max_seqlen(device):
    x = torch.randn(3, 2, 40, 32, device=device)
    cu = torch.tensor([0, 7, 40, 40, 40], dtype=torch.int32, device=device)     # padded to a fixed length by repeating N
    views = [y.transpose(0, 1) for y in x]                                      # (N, H, D) with heads far apart in memory
    expected = attention_ref(*views, cu, 33)
    torch.testing.assert_close(attention(*views, cu, 512), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(*views, torch.stack([cu, cu.flip(0)], 1)[:, 0], 512), expected, atol=1e-5, rtol=1e-5)


def test_finite_differences(device):
    qkv, cu = inputs(torch.float32, (3, 2), H=1)
    qkv, cu = qkv.detach().to(device).requires_grad_(), cu.to(device)

    def loss(x):
        return attention(*x.unbind(1), cu, 3, dropout_p=0.2, seed=3).square().sum()

    grad, = torch.autograd.grad(loss(qkv), qkv)
    for place in [(0, 0, 0, 1), (2, 1, 0, 5), (4, 2, 0, 31)]:
        step = torch.zeros_like(qkv)
        step[place] = 1e-2
        with torch.no_grad():
            assert ((loss(qkv + step) - loss(qkv - step)) / 2e-2).item() == pytest.approx(grad[place].item(), rel=1e-2, abs=1e-3)


def weights(device, N, p, seed, H=1):
    """(H, N, N) attention weights of one sequence with uniform scores, read out with identity matrices as values, 32 columns per call."""
    q, cu = torch.zeros(N, H, 32, device=device), torch.tensor([0, N], dtype=torch.int32, device=device)
    eye = torch.eye(N, device=device)
    out = [attention(q, q, eye[:, None, j:j + 32].expand(N, H, 32), cu, N, dropout_p=p, seed=seed) for j in range(0, N, 32)]
    return torch.cat(out, -1).transpose(0, 1)


def test_dropout_masks_of_kernel_and_reference_are_equal(device, monkeypatch):
    seed = torch.tensor([-(2**62) + 12345])
    ours = weights(device, 96, 0.25, seed.to(device), H=2)
    monkeypatch.setenv("RT_KERNELS", "ref")
    theirs = weights(torch.device("cpu"), 96, 0.25, seed, H=2)
    assert torch.equal(ours.cpu() != 0, theirs != 0)
    torch.testing.assert_close(ours.cpu(), theirs)


def test_dropout_of_more_tokens_than_one_program_hashes(device):
    """`dropout_words` takes 256 tokens of a head at a time; here the last takes one."""
    qkv, cu = inputs(torch.float32, (257,), H=2)
    arguments = *qkv.detach().to(device).unbind(1), cu.to(device), 257
    ours, theirs = (f(*arguments, dropout_p=0.5, seed=5) for f in (attention, attention_ref))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_runs_side_by_side_drop_what_each_would_alone(device, monkeypatch):
    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(3 * 37, 3, 2, 32, generator=g).to(device).requires_grad_()      # 37 tokens per run: no block ends where a run ends
    cu = torch.tensor([37 * k + at for k in range(3) for at in (0, 5, 5)] + [111, 111], dtype=torch.int32, device=device)
    seeds = torch.tensor([5, -(2**62), 5], device=device)
    both = everything(attention, qkv, cu, dropout_p=0.4, seed=seeds)
    for k in range(3):
        one = qkv.detach()[37 * k:37 * (k + 1)].requires_grad_()
        alone = everything(attention, one, cu[3 * k:3 * k + 4] - 37 * k, dropout_p=0.4, seed=seeds[k:k + 1])
        torch.testing.assert_close(both[0][37 * k:37 * (k + 1)], alone[0])
    monkeypatch.setenv("RT_KERNELS", "ref")
    for a, b in zip(both, everything(attention, qkv, cu, dropout_p=0.4, seed=seeds)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="multiple of K rows"):
        attention(*qkv.unbind(1), cu, 37, dropout_p=0.4, seed=seeds[:2])


def test_dropout_keeps_the_share_it_should_without_patterns():
    N, p, cpu = 256, 0.25, torch.device("cpu")
    w = weights(cpu, N, p, 7, H=2)
    keep = w != 0
    torch.testing.assert_close(w[keep], torch.full_like(w[keep], 1 / N / (1 - p)))
    x = keep.float() - (1 - p)
    sd = math.sqrt(p * (1 - p))
    assert abs(x.mean()) < 4 * sd / math.sqrt(x.numel())
    for axis in (1, 2):         # sums over rows and columns vary exactly as sums of independent draws
        assert (x.sum(axis).std() / sd / math.sqrt(N)).item() == pytest.approx(1, abs=0.15)
    for a, b in [(x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1]), (x[0], x[1]), (x[0], x[0].T),
                 (x[:, :128], x[:, 128:]), (x[..., :128], x[..., 128:])]:
        assert abs((a * b).mean()) < 4 * sd**2 / math.sqrt(a.numel())
    square = x[:, ::2, ::2] * x[:, 1::2, ::2] * x[:, ::2, 1::2] * x[:, 1::2, 1::2]      # four random words decide four elements
    assert abs(square.mean()) < 4 * sd**4 / math.sqrt(square.numel())
    assert torch.equal(w, weights(cpu, N, p, 7, H=2))
    other = weights(cpu, N, p, 8, H=2) != 0
    assert abs((x * (other.float() - (1 - p))).mean()) < 4 * sd**2 / math.sqrt(x.numel())


def test_dropout_without_a_seed_follows_torchs_generator(device):
    qkv, cu = inputs(torch.float32, (20,), H=1)
    arguments = *qkv.detach().to(device).unbind(1), cu.to(device), 20
    torch.manual_seed(3)
    first, second = attention(*arguments, dropout_p=0.5), attention(*arguments, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, attention(*arguments, dropout_p=0.5)) and not torch.equal(first, second)


def test_one_graph_under_torch_compile(device):
    qkv, cu = inputs(torch.float16, (20, 3), H=1)
    qkv, cu, prefix = qkv.detach().to(device).requires_grad_(), cu.to(device), prefix_of(5, 1, 32, device, torch.float32)

    def f(x, cu):
        return (2 * attention(*x.unbind(1), cu, 20, dropout_p=0.1, seed=3, prefix_kv=tuple(prefix))).sum()

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(qkv, cu), f(qkv, cu))
    (ours, expected), eps = (torch.autograd.grad(g(qkv, cu), qkv)[0] for g in (compiled, f)), torch.finfo(qkv.dtype).eps
    # fused, the sum of the two gradients of q is rounded once; eagerly each of them is rounded before, relative to its own size
    torch.testing.assert_close(ours, expected, atol=eps * expected.abs().max().item(), rtol=eps)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_captured_graph_reads_new_inputs_and_draws_new_masks(device):
    qkv, cu = inputs(torch.bfloat16, (100, 28), H=2)
    x, cu = qkv.detach().to(device), cu.to(device)
    for p in (0.0, 0.5):        # compile before the capture
        attention(*x.unbind(1), cu, 100, dropout_p=p)
    plain, graph = torch.empty_like(x[:, 0]), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain = attention(*x.unbind(1), cu, 100)
        dropped = attention(*x.unbind(1), cu, 100, dropout_p=0.5)
    graph.replay()
    first = dropped.clone()
    graph.replay()
    assert not torch.equal(first, dropped)
    x.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(plain, attention(*x.unbind(1), cu, 100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_equal_bit_for_bit_at_every_call(device, dtype):
    qkv, cu = inputs(dtype, (130, 70), H=1)
    qkv, cu = qkv.detach().to(device).requires_grad_(), cu.to(device)
    for a, b in zip(everything(attention, qkv, cu), everything(attention, qkv, cu)):
        assert torch.equal(a, b)


def test_what_the_kernels_cannot_do(device, monkeypatch):
    one = torch.randn(1, 1, 32, device=device)
    alone = attention(one, one, one, torch.tensor([0, 1], dtype=torch.int32, device=device), 1)     # one token is possible
    torch.testing.assert_close(alone, one)      # three TF32 products on a GPU: not all bits of an fp32 number
    q, cu = torch.zeros(4, 1, 160, device=device, dtype=torch.float16), torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="up to 128"):
        attention(q, q, q, cu, 4)
    double = torch.randn(4, 1, 160, device=device, dtype=torch.float64)     # the reference supports it
    assert torch.equal(attention(double, double, double, cu, 4), attention_ref(double, double, double, cu, 4))
    monkeypatch.setenv("RT_KERNELS", "fast")
    with pytest.raises(ValueError, match="auto, ref, triton"):
        attention(q, q, q, cu, 4)
    monkeypatch.setenv("RT_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        attention(q.cpu(), q.cpu(), q.cpu(), cu.cpu(), 4)


def test_rows_of_the_table_can_be_replaced_by_a_file(device, monkeypatch, tmp_path):
    qkv, cu = inputs(torch.float16, (100,), H=1)
    arguments = *qkv.detach().to(device).unbind(1), cu.to(device), 100
    usual, arch = attention(*arguments), configs.architecture(device)
    (tmp_path / "tuned.json").write_text(json.dumps({"attention_forward": {f"{arch} 32 16": [16, 32, 4, 1]}}))
    monkeypatch.setenv("RT_CONFIGS", str(tmp_path / "tuned.json"))
    assert configs.pick("attention_forward", 32, torch.float16, device) == (16, 32, 4, 1)
    for name, size, dtype in (("attention_forward", 32, torch.float32), ("attention_forward", -32, torch.float16),
                              ("attention_backward_keys", 32, torch.float16)):      # and no other row
        assert configs.pick(name, size, dtype, device) == configs.TABLE[name][arch, size, 8 * dtype.itemsize]
    torch.testing.assert_close(attention(*arguments), usual, atol=1e-3, rtol=1e-2)


def test_every_architecture_has_a_row_for_every_size_and_dtype(monkeypatch):
    for name, rows in configs.TABLE.items():
        sizes = {size for _, size, _ in rows}
        assert set(rows) == {(arch, size, bits) for arch in configs.ARCHS for size in sizes for bits in (16, 32)}, name
    for capability, arch in (((7, 5), 80), ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert configs.architecture(torch.device("cuda")) == arch
