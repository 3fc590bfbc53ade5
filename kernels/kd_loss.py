"""Distillation losses from raw logits, with one pass over the logits forward and one backward.

    row = (1 - alpha) * CE(s, y) + alpha * T^2 * KL(softmax(t / T) || softmax(s / T))

T^2 keeps the gradient's size when T grows (Hinton et al., 2015). One loss per row is returned; the
caller's `.mean()` is what torch.nn.KLDivLoss calls "batchmean".

Forward: one program per row, an online softmax of student and teacher together. With the running maxima M_s and M_t, s' = s - M_s and
t' = t - M_t, the sums D_1 = sum e^s', D_s = sum e^(s'/T), D_t = sum e^(t'/T) and gap = sum e^(t'/T) (t' - s') give

    CE = -s'_y + ln D_1        KL = gap / (T D_t) + ln(D_s / D_t)

All subtracted numbers are small: shifting a row of logits costs no digits, and equal logits give 0 up to rounding. Backward, from the
saved maxima and sums: d row / ds = (1 - alpha) (e^s' / D_1 - onehot) + alpha T (e^(s'/T) / D_s - e^(t'/T) / D_t).

Limits: fp32, fp16 and bf16 logits with fp32 arithmetic; float64 takes the reference. Not differentiable twice.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs
from kernels.common import LOG2E, dense_rows, launch, op, row_class, tl, triton, uses_triton

# ---------------------------------------------------------------- reference

def kd_loss_ref(student: Tensor, teacher: Tensor | None, labels: Tensor | None = None, *, alpha: float, T: float,
                ignore_index: int = -100) -> Tensor:
    """`kd_loss` in plain PyTorch, with at least fp32 arithmetic."""
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    rows = student.new_zeros(len(student))
    if teacher is not None and alpha:
        log_s, log_t = F.log_softmax(student / T, -1), F.log_softmax(teacher.detach().to(student.dtype) / T, -1)
        p = log_t.exp()
        rows = alpha * T**2 * torch.where(p == 0, 0.0, p * (log_t - log_s)).sum(-1)
    if labels is not None:
        if alpha != 1:
            rows = rows + (1 - alpha) * F.cross_entropy(student, labels, ignore_index=ignore_index, reduction="none")
        rows = torch.where(labels == ignore_index, 0.0, rows)
    return rows


# ---------------------------------------------------------------- the steps of a row; linear_loss.py uses them too

@triton.jit
def add(s, n_1, n_s, t, n_t, gaps, M_s, D_1, D_s, M_t, D_t, gap, rate, CE: tl.constexpr, KD: tl.constexpr, UNIT_T: tl.constexpr):
    """Add to the statistics of a row (module docstring), or of many parts of it, along the first axis. Either s and t are logits (-inf past
    the end): then n_1 = n_s = n_t = 1, and gaps is None. Or they are the maxima of parts, and n_1, n_s, n_t and gaps are the parts' sums.
    If t is None there is no teacher. Maxima start at -1e30, because differences of -inf would be NaN. `rate` is log2(e) / T, because the
    hardware has exp2.

    New maxima scale the sums by e^(old - new). They also shift t' - s' of every column by one number; D_t times it is added to `gap`."""
    new = tl.maximum(M_s, tl.max(s, 0))
    s, step_s, M_s = s - new, M_s - new, new
    if KD:
        D_s = D_s * tl.exp2(step_s * rate) + tl.sum(n_s * tl.exp2(s * rate), 0)
    if CE:
        D_1 = D_s if UNIT_T else D_1 * tl.exp2(step_s * 1.4426950408889634) + tl.sum(n_1 * tl.exp2(s * 1.4426950408889634), 0)
    if t is not None:
        new = tl.maximum(M_t, tl.max(t, 0))
        t, step_t, M_t = t - new, M_t - new, new
        e, shrink = tl.exp2(t * rate), tl.exp2(step_t * rate)
        gap = tl.where(shrink > 0, shrink * (gap + D_t * (step_t - step_s)), 0.0)
        more = t - s if gaps is None else gaps + n_t * (t - s)
        gap += tl.sum(tl.where(e > 0, e * more, 0.0), 0)     # where the teacher's probability is 0, a student's -inf adds nothing
        D_t = D_t * shrink + tl.sum(n_t * e, 0)
    return M_s, D_1, D_s, M_t, D_t, gap


@triton.jit
def parts(L: tl.constexpr):
    """Empty statistics for L parts of a row. A loop adds (W, L) logits at a time, W to each part, without communication between threads.
    After the loop, `add` merges the parts into the row's statistics."""
    zero = tl.zeros((L,), tl.float32)
    return zero - 1e30, zero, zero, zero - 1e30, zero, zero


@triton.jit
def tile(start, W: tl.constexpr, L: tl.constexpr):
    """(W, L) columns from `start` on."""
    return start + tl.arange(0, W)[:, None] * L + tl.arange(0, L)[None, :]


@triton.jit
def row_loss(s_y, M_s, D_1, D_s, D_t, gap, alpha, T, CE: tl.constexpr, KD: tl.constexpr):
    loss = 0.0
    if CE:
        loss += (1 - alpha) * (M_s - s_y + tl.log(D_1))
    if KD:
        loss += alpha * T * (gap / D_t + T * tl.log(D_s / D_t))
    return loss


@triton.jit
def tile_grad(s, t, at_label, M_s, D_1, D_s, M_t, D_t, rate, g_ce, g_kd, CE: tl.constexpr, KD: tl.constexpr, UNIT_T: tl.constexpr):
    """The gradient of a tile of s; g_ce and g_kd are the upstream gradient times (1 - alpha) and times alpha T."""
    s = s - M_s
    grad = tl.zeros(s.shape, tl.float32)
    if KD:
        e = tl.exp2(s * rate)
        grad += (g_kd / D_s) * e - (g_kd / D_t) * tl.exp2((t - M_t) * rate)
    if CE:
        e_1 = e if UNIT_T else tl.exp2(s * 1.4426950408889634)
        grad += (g_ce / D_1) * e_1 - tl.where(at_label, g_ce, 0.0)
    return grad


@triton.jit
def read_label(labels_ptr, row, ignore_index):
    """The row's label (-1 without labels, or if the label does not fit into 32 bits), and whether the row counts."""
    y, counts = row * 0 - 1, row >= 0
    if labels_ptr is not None:
        y = tl.load(labels_ptr + row)
        counts = y != ignore_index
    narrow = y.to(tl.int32)
    return tl.where(narrow == y, narrow, -1), counts


@triton.jit
def load_fp32(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=-float("inf")).to(tl.float32)


# ---------------------------------------------------------------- kd_loss

@triton.jit
def _loss_forward(s_ptr, t_ptr, labels_ptr, loss_ptr, stats_ptr,      # (R, C), (R, C), (R,), (R,), (R, 5)
                  C, s_stride, t_stride, ignore_index, alpha, T, rate, CE: tl.constexpr, KD: tl.constexpr, UNIT_T: tl.constexpr,
                  BLOCK: tl.constexpr, W: tl.constexpr):
    """Loss and statistics of one row."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * s_stride
    m_s, d_1, d_s, m_t, d_t, gaps = parts(BLOCK // W)
    if KD:
        t_ptr += row * t_stride
    for start in range(0, C, BLOCK):
        cols = tile(start, W, BLOCK // W)
        s, t = load_fp32(s_ptr, cols, cols < C), None
        if KD:
            t = load_fp32(t_ptr, cols, cols < C)
        m_s, d_1, d_s, m_t, d_t, gaps = add(s, 1.0, 1.0, t, 1.0, None, m_s, d_1, d_s, m_t, d_t, gaps, rate, CE, KD, UNIT_T)
    M_s, D_1, D_s, M_t, D_t, gap = add(m_s, d_1, d_s, m_t, d_t, gaps, -1e30, 0.0, 0.0, -1e30, 0.0, 0.0, rate, CE, KD, UNIT_T)
    y, counts = read_label(labels_ptr, row, ignore_index)
    s_y = tl.load(s_ptr + y, mask=(y >= 0) & (y < C), other=float("nan")).to(tl.float32)    # a label that is no class gives a loss of NaN
    tl.store(loss_ptr + row, tl.where(counts, row_loss(s_y, M_s, D_1, D_s, D_t, gap, alpha, T, CE, KD), 0.0))
    stats_ptr += row * 5
    tl.store(stats_ptr, M_s)
    tl.store(stats_ptr + 1, D_1)
    tl.store(stats_ptr + 2, D_s)
    tl.store(stats_ptr + 3, M_t)
    tl.store(stats_ptr + 4, D_t)


@triton.jit
def _loss_backward(s_ptr, t_ptr, labels_ptr, stats_ptr, up_ptr, grad_ptr,      # (R, C), (R, C), (R,), (R, 5), (R,), (R, C)
                   C, tiles, s_stride, t_stride, up_stride, ignore_index, alpha, T, rate, CE: tl.constexpr, KD: tl.constexpr,
                   UNIT_T: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of one tile of one row."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK
    s_ptr += row * s_stride
    grad_ptr += row * C
    stats_ptr += row * 5
    M_s, D_1, D_s = tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2)
    M_t, D_t = tl.load(stats_ptr + 3), tl.load(stats_ptr + 4)
    y, counts = read_label(labels_ptr, row, ignore_index)
    up = tl.where(counts, tl.load(up_ptr + row * up_stride), 0.0)
    cols = start + tl.arange(0, BLOCK)
    s, t = load_fp32(s_ptr, cols, cols < C), None
    if KD:
        t = load_fp32(t_ptr + row * t_stride, cols, cols < C)
    grad = tile_grad(s, t, cols == y, M_s, D_1, D_s, M_t, D_t, rate, up * (1 - alpha), up * alpha * T, CE, KD, UNIT_T)
    tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < C)


def flags(teacher: Tensor | None, labels: Tensor | None, alpha: float, T: float) -> dict[str, bool]:
    """Which terms of the loss are computed; UNIT_T: both terms, with one softmax of the student for both."""
    CE, KD = labels is not None and alpha != 1, teacher is not None
    return {"CE": CE, "KD": KD, "UNIT_T": CE and KD and T == 1}


@op
def _kd_loss(student: Tensor, teacher: Tensor | None, labels: Tensor | None, alpha: float, T: float,
             ignore_index: int) -> tuple[Tensor, Tensor]:
    """Loss (R,) and, for the backward, statistics (R, 5)."""
    R, C = student.shape
    student, teacher, labels = dense_rows(student, teacher, labels)
    loss, stats = (torch.empty(s, dtype=torch.float32, device=student.device) for s in ((R,), (R, 5)))
    BLOCK, warps, W = configs.pick("kd_loss_forward", row_class(C), student.dtype, student.device)
    launch(_loss_forward, R, student, teacher, labels, loss, stats, C, student.stride(0), 0 if teacher is None else teacher.stride(0),
           ignore_index, alpha, T, LOG2E / T, **flags(teacher, labels, alpha, T), BLOCK=BLOCK, W=W, num_warps=warps)
    return loss, stats


@op
def _kd_loss_backward(up: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor | None, stats: Tensor,
                      alpha: float, T: float, ignore_index: int) -> Tensor:
    """The gradient of student (R, C), given the gradient of the loss (R,)."""
    R, C = student.shape
    student, teacher, labels = dense_rows(student, teacher, labels)
    grad = torch.empty(R, C, dtype=student.dtype, device=student.device)
    BLOCK, warps = configs.pick("kd_loss_backward", row_class(C), student.dtype, student.device)
    tiles = -(-C // BLOCK)
    launch(_loss_backward, R * tiles, student, teacher, labels, stats, up, grad, C, tiles, student.stride(0),
           0 if teacher is None else teacher.stride(0), up.stride(0), ignore_index, alpha, T, LOG2E / T,
           **flags(teacher, labels, alpha, T), BLOCK=BLOCK, num_warps=warps)
    return grad


def _save(ctx, inputs, output):
    student, teacher, labels, *ctx.rest = inputs
    ctx.save_for_backward(student, teacher, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, up, _):
    return None if up is None else _kd_loss_backward(up, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


_kd_loss.register_autograd(_differentiate, setup_context=_save)


def kd_loss(student: Tensor, teacher: Tensor | None, labels: Tensor | None = None, *, alpha: float, T: float,
            ignore_index: int = -100) -> Tensor:
    """Cross-entropy and temperature-scaled KL to a teacher, per row.

    student    (R, C) raw logits
    teacher    (R, C) raw logits, or None, for (1 - alpha) CE alone. It gets no gradient
    labels     (R,) int64 classes, or None for the KL term alone (still times alpha); `ignore_index` rows give 0. Another label outside
               [0, C) gives a loss of NaN (the reference raises)
    alpha, T   share of the KL term, from 0 to 1; temperature of its softmaxes
    Returns    (R,) fp32; float64 if the student's logits are float64. Raises ValueError if shapes do not fit or T is not positive.
    """
    fits = teacher is None or teacher.shape == student.shape
    if student.ndim != 2 or not fits or (labels is not None and labels.shape != student.shape[:1]):
        raise ValueError("student and teacher must be (R, C) and alike, labels (R,), not "
                         f"{[None if x is None else tuple(x.shape) for x in (student, teacher, labels)]}")
    if T <= 0:
        raise ValueError(f"the temperature T must be positive, not {T}")
    if teacher is None and labels is None:
        raise ValueError("a loss needs a teacher or labels")
    if not uses_triton(student):
        return kd_loss_ref(student, teacher, labels, alpha=alpha, T=T, ignore_index=ignore_index)
    teacher = teacher.detach() if teacher is not None and alpha else None
    return _kd_loss(student, teacher, labels, float(alpha), float(T), ignore_index)[0]
