"""Mean squared error between the student's and the teacher's hidden states, all layers in one launch.

    hidden_mse     loss_b = mean over layers l and dimensions i of (s_bli - t_rli)^2        r = rows[b], the example's row in a cache
    states_mse     loss = sum over layers l of weights_l * mean((s_l - t_l)^2), over all tokens and dimensions

Limits: fp32, fp16 and bf16, with fp32 arithmetic; float64 takes the reference. Not differentiable twice.
"""
import torch
from torch import Tensor

from kernels import configs
from kernels.common import dense_rows, launch, op, row_class, tl, triton, uses_triton


def hidden_mse_ref(student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> Tensor:
    """`hidden_mse` in plain PyTorch."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    teacher = teacher.detach() if rows is None else teacher.detach()[rows]
    return (student.to(dtype) - teacher.to(dtype)).square().mean(dim=(1, 2))


@triton.jit
def _mse_forward(s_ptr, t_ptr, rows_ptr, loss_ptr, width, s_stride, t_stride, BLOCK: tl.constexpr):    # (B, L d), (n, L d), (B,), (B,)
    """One example; all its layers form one row."""
    b = tl.program_id(0).to(tl.int64)
    t_row = b if rows_ptr is None else tl.load(rows_ptr + b).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s = tl.load(s_ptr + b * s_stride + cols, mask=cols < width, other=0.0).to(tl.float32)
        d = s - tl.load(t_ptr + t_row * t_stride + cols, mask=cols < width, other=0.0).to(tl.float32)
        total += d * d
    tl.store(loss_ptr + b, tl.sum(total, 0) / width)


@triton.jit
def _mse_backward(s_ptr, t_ptr, rows_ptr, up_ptr, grad_ptr, width, tiles, s_stride, t_stride, up_stride, BLOCK: tl.constexpr):
    """One tile of one example's gradient (B, L d)."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t_row = b if rows_ptr is None else tl.load(rows_ptr + b).to(tl.int64)
    cols = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(s_ptr + b * s_stride + cols, mask=cols < width).to(tl.float32)
    d = s - tl.load(t_ptr + t_row * t_stride + cols, mask=cols < width).to(tl.float32)
    grad = d * (tl.load(up_ptr + b * up_stride) * 2 / width)
    tl.store(grad_ptr + b * width + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)


@op
def _hidden_mse(student: Tensor, teacher: Tensor, rows: Tensor | None) -> Tensor:
    s, t = dense_rows(student.flatten(1), teacher.flatten(1))
    loss = torch.empty(len(s), dtype=torch.float32, device=s.device)
    BLOCK, warps = configs.pick("hidden_mse", row_class(s.shape[1]), s.dtype, s.device)
    launch(_mse_forward, len(s), s, t, *dense_rows(rows), loss, s.shape[1], s.stride(0), t.stride(0), BLOCK=BLOCK, num_warps=warps)
    return loss


@op
def _hidden_mse_backward(up: Tensor, student: Tensor, teacher: Tensor, rows: Tensor | None) -> Tensor:
    s, t = dense_rows(student.flatten(1), teacher.flatten(1))
    grad = torch.empty(student.shape, dtype=s.dtype, device=s.device)
    BLOCK, warps = configs.pick("hidden_mse", row_class(s.shape[1]), s.dtype, s.device)
    tiles = -(-s.shape[1] // BLOCK)
    launch(_mse_backward, len(s) * tiles, s, t, *dense_rows(rows), up, grad, s.shape[1], tiles, s.stride(0), t.stride(0), up.stride(0),
           BLOCK=BLOCK, num_warps=warps)
    return grad


_hidden_mse.register_autograd(lambda ctx, up: (_hidden_mse_backward(up, *ctx.saved_tensors), None, None),
                              setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def hidden_mse(student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean squared error between hidden rows, per example, over all layers and the width: the patience term of Sun et
    al. (2019) without its normalisation of the rows.

    student    (B, L, d)
    teacher    (n, L, d), a cache; example b is compared with its row `rows[b]`. It gets no gradient
    rows       (B,) int64 or int32, each from 0 to n - 1; None: example b is compared with row b
    Returns    (B,) fp32; float64 if the student's states are. Raises ValueError if sizes differ.
    """
    if student.ndim != 3 or student.shape[1:] != teacher.shape[1:] or len(student) != len(teacher if rows is None else rows):
        raise ValueError(f"student (B, L, d) and teacher, or its rows, must be of equal size, not {tuple(student.shape)} and "
                         f"{tuple(teacher.shape)}")
    if not uses_triton(student):
        return hidden_mse_ref(student, teacher, rows)
    return _hidden_mse(student, teacher.detach(), rows)


# ---------------------------------------------------------------- all rows of a batch

def states_mse_ref(students: list[Tensor], teachers: list[Tensor], weights: Tensor) -> Tensor:
    """`states_mse` in plain PyTorch."""
    dtype = torch.promote_types(students[0].dtype, torch.float32)
    each = [(s.to(dtype) - t.detach().to(dtype)).square().mean() for s, t in zip(students, teachers, strict=True)]
    return (torch.stack(each) * weights.detach()).sum()


@triton.jit
def _states_forward(sums_ptr, s_ptrs, t_ptrs, size, BLOCK: tl.constexpr):       # (tiles, L), L x (size,), L x (size,)
    """One tile of every layer."""
    tile = tl.program_id(0).to(tl.int64)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(s_ptrs)):
        s = tl.load(s_ptrs[i] + cols, mask=cols < size, other=0.0).to(tl.float32)
        d = s - tl.load(t_ptrs[i] + cols, mask=cols < size, other=0.0).to(tl.float32)
        tl.store(sums_ptr + tile * len(s_ptrs) + i, tl.sum(d * d, 0))


@triton.jit
def _states_backward(up_ptr, weights_ptr, s_ptrs, t_ptrs, grad_ptrs, size, BLOCK: tl.constexpr):     # (), (L,), 3 times L x (size,)
    """One tile of every layer's gradient."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    up = tl.load(up_ptr) * 2 / size
    for i in tl.static_range(len(s_ptrs)):
        s = tl.load(s_ptrs[i] + cols, mask=cols < size).to(tl.float32)
        d = s - tl.load(t_ptrs[i] + cols, mask=cols < size).to(tl.float32)
        tl.store(grad_ptrs[i] + cols, (d * (tl.load(weights_ptr + i) * up)).to(grad_ptrs[i].dtype.element_ty), mask=cols < size)


# not kernels.common.op: autograd.Function, which it uses, sees no tensors inside lists
@torch.library.custom_op("recyclable::states_mse", mutates_args=())
def _states_mse(students: list[Tensor], teachers: list[Tensor], weights: Tensor) -> Tensor:
    size = students[0].numel()
    BLOCK, warps = configs.pick("states_mse", 4096, torch.float32, weights.device)
    sums = torch.empty(-(-size // BLOCK), len(students), dtype=torch.float32, device=weights.device)
    launch(_states_forward, len(sums), sums, _contiguous(students), _contiguous(teachers), size, BLOCK=BLOCK, num_warps=warps)
    return (sums.sum(0) / size * weights).sum()


_states_mse.register_fake(lambda students, teachers, weights: weights.new_empty(()))


@op
def _states_mse_backward(up: Tensor, weights: Tensor, students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    grads, size = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in students], students[0].numel()
    BLOCK, warps = configs.pick("states_mse", 4096, torch.float32, up.device)
    launch(_states_backward, -(-size // BLOCK), up, weights.contiguous(), _contiguous(students), _contiguous(teachers), tuple(grads), size,
           BLOCK=BLOCK, num_warps=warps)
    return grads


def _contiguous(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _differentiate(ctx, up):
    if torch.is_grad_enabled():     # as kernels.common.op does
        raise RuntimeError("recyclable.states_mse is not differentiable twice; RT_KERNELS=ref is")
    weights, *states = ctx.saved_tensors
    L = len(weights)
    return _states_mse_backward(up, weights, states[:L], states[L:]), [None] * L, None


_states_mse.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
    inputs[2], *inputs[0], *inputs[1]))


def states_mse(students: list[Tensor], teachers: list[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum over layers of the mean squared error over all rows, in one launch. Keeps no copy of a state.

    students   L tensors (N, d) of one shape, for example the outputs of an encoder's embedding and of every layer
    teachers   L tensors of the same shape; they get no gradient
    weights    (L,) fp32; they get no gradient
    Returns    a scalar, fp32; float64 if the student's states are. Raises ValueError if sizes differ.
    """
    if len({x.shape for x in (*students, *teachers)}) != 1 or not len(students) == len(teachers) == len(weights):
        raise ValueError(f"states of one shape are compared, layer by layer, with a weight each, not {[tuple(x.shape) for x in students]}, "
                         f"{[tuple(x.shape) for x in teachers]} and {len(weights)} weights")
    if not all(uses_triton(x) for x in (*students, *teachers)):
        return states_mse_ref(students, teachers, weights)
    return _states_mse(students, [t.detach() for t in teachers], weights.detach())
