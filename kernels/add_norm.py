"""Residual, dropout and layer norm in one kernel: y = LN(x + dropout(h)).

    z = x + keep h / (1 - p)        y = (z - mean) rstd weight + bias       rstd = 1 / sqrt(var + eps)      over the d columns of a row

The sum and its statistics are fp32 (in the reference, the wider dtype of x and h). y has the dtype of h, so under autocast the
residual stream is as narrow as the matrix products that read it. `weight` and `bias` may hold K rows, for K runs side by side.

Backward, with z' = (z - mean) rstd and g = weight dy; means are over a row, sums over the rows that share a weight:

    dz = rstd (g - mean(g) - z' mean(g z'))     dx = dz     dh = keep dz / (1 - p)      dweight = sum dy z'     dbias = sum dy

Each program sums dweight and dbias over its own rows in fp32, and torch adds up these sums. There are no atomics and the order is fixed.

A row is up to four tiles: 768 columns are three of 256, while a tile of 1,024 would leave a quarter of the lanes idle. For d up
to 1,024 a tile has at most 256 columns, which one warp holds in 16 bits, so a sum over a row stays within a warp. A sum over rows crosses
warps once, after the loop.

Gradients that are not requested are neither computed nor stored. If nothing is dropped, dh is dx.

z is saved in the wider dtype of x and h. Bytes per element if x and h are 16 bits wide: forward 8 (x, h, y, z), backward 8 (dy, z, dx,
dh; 6 if nothing is dropped). Reading x and h again instead moves as many bytes (6 and 10; 6 and 8) but keeps 4 bytes per element alive,
not 2, unless a matrix product keeps x (under a frozen base none does). With an fp32 x it is 24 bytes (z saved) against 22. Without
gradients z is not written.

Limits: d up to 4096; wider rows and float64 take the reference. x, h, weight and bias may each be fp32, fp16 or bf16. Not differentiable
twice.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs
from kernels.common import dense_rows, launch, left_to_compiler, op, row_class, tl, triton, uses_triton
from kernels.dropout import block_of_run, check_dropout, dropout_ref, keep_tile, threshold_of

PROGRAMS = 132      # programs of 8 warps (of one: 8 times as many) that share the rows of a backward: one wave on an H100's 132 SMs
RUNTIME = ["run", "N", "blocks", "seed_run", "threshold", "rows"]      # not recompiled if they are 1 or a multiple of 16


# ---------------------------------------------------------------- reference

def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of (N, d) with weight and bias (d,) or (K, d), on CUDA in the widest of their dtypes, on a CPU in the dtype of z.
    RuntimeError if K does not divide N."""
    d, wide = z.shape[-1], torch.promote_types(torch.promote_types(z.dtype, weight.dtype), bias.dtype)
    # torch has no layer norm of mixed dtypes, except for a z that is narrower than both parameters on a CPU
    z, weight, bias = z.to(wide) if z.is_cuda else z, weight.to(wide), bias.to(wide)
    if weight.ndim == bias.ndim == 1:
        return F.layer_norm(z, (d,), weight, bias, eps)
    K = max(_runs(weight, bias))
    runs = zip(z.unflatten(0, (K, -1)), *(x.expand(K, d).unbind() for x in (weight, bias)))
    return torch.cat([F.layer_norm(own, (d,), w, b, eps) for own, w, b in runs])     # a broadcast product is slower, and fp32


def _runs(*tensors: Tensor) -> list[int]:
    """The number of runs that each tensor holds weights for; 1 if all runs share them."""
    return [len(x) if x.ndim == 2 else 1 for x in tensors]


def add_norm_ref(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None) -> Tensor:
    dropped = h if seed is None or p == 0.0 else dropout_ref(h, p, seed)
    return layer_norm(x + dropped, weight, bias, eps).to(h.dtype)


# ---------------------------------------------------------------- kernels

@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["seed_ptr"])
def _norm_forward(x_ptr, h_ptr, w_ptr, b_ptr, seed_ptr, y_ptr, z_ptr, stats_ptr,     # (N, d) x 2, (K, d) x 2, (K,), (N, d) x 2, (2, N)
                  run, N, d, blocks, seed_run, x_stride, h_stride, out_stride, w_run, b_run, eps, threshold, keep_scale,
                  BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_N whole rows of one run, in BLOCKS tiles. w_run and b_run are the strides between the weights of two runs; 0 if all share
    them."""
    k, start, n = block_of_run(tl.program_id(0), run, blocks, BLOCK_N)
    rows, total, squares, tiles = start + n, tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32), ()
    for j in tl.static_range(BLOCKS):
        cols = j * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (n < run)[:, None] & (cols < d)[None, :]
        h = tl.load(h_ptr + rows[:, None] * h_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            h *= keep_tile(seed_ptr, start, n, cols, seed_run, threshold, keep_scale)
        z = h + tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if z_ptr is not None:
            tl.store(z_ptr + rows[:, None] * out_stride + cols[None, :], z.to(z_ptr.dtype.element_ty), mask=inside)
        total += tl.sum(z, 1)
        tiles += (z,)
    mean = total / d
    for j in tl.static_range(BLOCKS):
        z = tl.where((j * BLOCK_D + tl.arange(0, BLOCK_D) < d)[None, :], tiles[j] - mean[:, None], 0.0)
        squares += tl.sum(z * z, 1)
    rstd = tl.rsqrt(squares / d + eps)
    if z_ptr is not None:
        tl.store(stats_ptr + rows, mean, mask=n < run)
        tl.store(stats_ptr + N.to(tl.int64) + rows, rstd, mask=n < run)
    for j in tl.static_range(BLOCKS):
        cols = j * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (n < run)[:, None] & (cols < d)[None, :]
        w = tl.load(w_ptr + k.to(tl.int64) * w_run + cols, mask=cols < d, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + k.to(tl.int64) * b_run + cols, mask=cols < d, other=0.0).to(tl.float32)
        y = (tiles[j] - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
        tl.store(y_ptr + rows[:, None] * out_stride + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["seed_ptr"])
def _norm_backward(dy_ptr, z_ptr, stats_ptr, w_ptr, seed_ptr, dx_ptr, dh_ptr, dw_ptr, db_ptr,      # d weight and d bias: (programs, d)
                   run, N, d, blocks, rows, seed_run, dy_stride, out_stride, w_run, threshold, keep_scale,
                   BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """`rows` rows of one run, BLOCK_N at a time, in BLOCKS tiles. A gradient is not computed if its pointer is None."""
    k, start, n = block_of_run(tl.program_id(0), run, blocks, BLOCK_N)
    first, w, dw, db = tl.program_id(0) % blocks * rows, (), (), ()
    for j in tl.static_range(BLOCKS):
        cols = j * BLOCK_D + tl.arange(0, BLOCK_D)
        w += (tl.load(w_ptr + k.to(tl.int64) * w_run + cols, mask=cols < d, other=0.0).to(tl.float32),)
        dw += (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        db += (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    for i in tl.range(first, tl.minimum(first + rows, run), BLOCK_N, num_stages=2):
        n = i + tl.arange(0, BLOCK_N)
        row = start + n
        mean = tl.load(stats_ptr + row, mask=n < run, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + N.to(tl.int64) + row, mask=n < run, other=0.0)[:, None]
        dws, dbs, gs, zs = (), (), (), ()
        mean_g, mean_gz = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for j in tl.static_range(BLOCKS):
            cols = j * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = (n < run)[:, None] & (cols < d)[None, :]
            dy = tl.load(dy_ptr + row[:, None] * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            z = tl.load(z_ptr + row[:, None] * out_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            z = (z - mean) * rstd       # also past the last column, but dy is 0 there
            g = dy * w[j][None, :]
            dws += (dw[j] + dy * z,)
            dbs += (db[j] + dy,)
            gs += (g,)
            zs += (z,)
            mean_g += tl.sum(g, 1) / d
            mean_gz += tl.sum(g * z, 1) / d
        dw, db = dws, dbs
        for j in tl.static_range(BLOCKS):
            cols = j * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = (n < run)[:, None] & (cols < d)[None, :]
            dz = (gs[j] - mean_g[:, None] - zs[j] * mean_gz[:, None]) * rstd
            place = row[:, None] * out_stride + cols[None, :]
            if dx_ptr is not None:
                tl.store(dx_ptr + place, dz.to(dx_ptr.dtype.element_ty), mask=inside)
            if dh_ptr is not None:
                if seed_ptr is not None:
                    dz *= keep_tile(seed_ptr, start, n, cols, seed_run, threshold, keep_scale)
                tl.store(dh_ptr + place, dz.to(dh_ptr.dtype.element_ty), mask=inside)
    for j in tl.static_range(BLOCKS):
        cols = j * BLOCK_D + tl.arange(0, BLOCK_D)
        place = tl.program_id(0).to(tl.int64) * out_stride + cols
        if dw_ptr is not None:
            tl.store(dw_ptr + place, tl.sum(dw[j], 0), mask=cols < d)
        if db_ptr is not None:
            tl.store(db_ptr + place, tl.sum(db[j], 0), mask=cols < d)


# ---------------------------------------------------------------- ops

def tiling(d: int, BLOCK_N: int, BLOCK_D: int) -> dict[str, int]:
    """At most four tiles, side by side, that hold d columns: BLOCK_N rows and BLOCK_D columns each, or 2, 4 or 8 times as high and as many
    times narrower if that leaves fewer lanes idle."""
    d = int(d)      # torch.compile may give a symbol
    shift = min((i for i in range(4) if d <= 4 * BLOCK_D >> i), key=lambda i: -d % (BLOCK_D >> i))
    return {"BLOCK_N": BLOCK_N << shift, "BLOCKS": -(-d // (BLOCK_D >> shift)), "BLOCK_D": BLOCK_D >> shift}


@op
def _add_norm(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, eps: float, p: float,
              save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, d); with `save`, also z (N, d) and its mean and rstd (2, N), otherwise empty tensors."""
    (N, d), (w_runs, b_runs), seeds = x.shape, _runs(weight, bias), 1 if seed is None else len(seed)
    K = max(w_runs, b_runs, seeds)
    x, h, w, b, seed = dense_rows(x, h, weight.contiguous(), bias.contiguous(), seed)
    y = torch.empty(N, d, dtype=h.dtype, device=h.device)
    z = torch.empty((N, d) if save else (0,), dtype=torch.promote_types(x.dtype, h.dtype), device=h.device)
    stats = torch.empty((2, N) if save else (0,), dtype=torch.float32, device=h.device)
    *tile, warps = configs.pick("add_norm_forward", row_class(d), h.dtype, h.device)
    tiles = tiling(d, *tile)
    blocks = -(-N // K // tiles["BLOCK_N"])
    launch(_norm_forward, K * blocks, x, h, w, b, seed, y, z if save else None, stats, N // K, N, d, blocks, N // seeds, x.stride(0),
           h.stride(0), d, d if w_runs > 1 else 0, d if b_runs > 1 else 0, eps, threshold_of(p), 1 / (1 - p), **tiles, num_warps=warps)
    return y, z, stats


@op
def _add_norm_backward(dy: Tensor, z: Tensor, stats: Tensor, weight: Tensor, seed: Tensor | None, p: float, b_runs: int,
                       wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (N, d) in the dtype of z, dh (N, d) in the dtype of dy, dweight in the shape of weight, dbias (b_runs, d). `wanted` says which
    of the four are computed; the others are empty."""
    (N, d), (w_runs,), seeds = dy.shape, _runs(weight), 1 if seed is None else len(seed)
    K = max(w_runs, b_runs, seeds)
    dy, w, seed = dense_rows(dy, weight.contiguous(), seed)
    *tile, warps = configs.pick("add_norm_backward", row_class(d), dy.dtype, dy.device)
    tiles = tiling(d, *tile)
    rows = max(-(-N // (PROGRAMS * 8 // warps * tiles["BLOCK_N"])), 1) * tiles["BLOCK_N"]
    blocks = -(-N // K // rows)
    shapes = (N, z.dtype), (N, dy.dtype), (K * blocks, torch.float32), (K * blocks, torch.float32)
    dx, dh, dw, db = (torch.empty((n, d) if want else (0,), dtype=dtype, device=dy.device) for (n, dtype), want in zip(shapes, wanted))
    launch(_norm_backward, K * blocks, dy, z, stats, w, seed, *(g if want else None for g, want in zip((dx, dh, dw, db), wanted)),
           N // K, N, d, blocks, rows, N // seeds, dy.stride(0), d, d if w_runs > 1 else 0, threshold_of(p), 1 / (1 - p), **tiles,
           num_warps=warps)
    dw, db = (g.view(n, K * blocks // n, d).sum(1) if want else g for g, n, want in zip((dw, db), (w_runs, b_runs), wanted[2:]))
    return dx, dh, dw.view(weight.shape).to(weight.dtype) if wanted[2] else dw, db


def _save(ctx, inputs, output):
    x, h, weight, bias, seed, _, ctx.p, save = inputs
    ctx.like = x.dtype, bias.dtype, bias.shape
    if save:
        ctx.save_for_backward(*output[1:], weight, seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dz, dstats):
    if dy is None:
        return (None,) * 8
    z, stats, weight, seed = ctx.saved_tensors
    x_dtype, b_dtype, b_shape = ctx.like
    x, h, w, b = ctx.needs_input_grad[:4]
    same = seed is None and z.dtype == dy.dtype     # then dh is dx
    dx, dh, dw, db = _add_norm_backward(dy, z, stats, weight, seed, ctx.p, b_shape.numel() // dy.shape[1],
                                        [x or (h and same), h and not same, w, b])
    return (dx.to(x_dtype) if x else None, (dx if same else dh) if h else None, dw if w else None,
            db.view(b_shape).to(b_dtype) if b else None, None, None, None, None)


_add_norm.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------- public

def add_norm(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """LN(x + dropout(h)).

    x, h           (N, d); x may have a wider dtype than h
    weight, bias   (d,), or (K, d): row n is normalised with their row n // (N / K)
    p, seed        probability and int64 seeds (K,) of the dropout, as in kernels.dropout; seed None: nothing is dropped
    Returns        (N, d) in the dtype of h. Raises ValueError if shapes do not fit.
    """
    if x.ndim != 2 or x.shape != h.shape or any(t.ndim > 2 or t.shape[-1] != x.shape[1] for t in (weight, bias)):
        raise ValueError(f"x and h must be (N, d) and alike, weight and bias (d,) or (K, d), not "
                         f"{[tuple(t.shape) for t in (x, h, weight, bias)]}")
    p, seed = (0.0, None) if seed is None or p == 0.0 else (p, seed)
    if seed is not None:
        check_dropout(len(x), p, seed)
    several = {n for n in (*_runs(weight, bias), 1 if seed is None else len(seed)) if n > 1}
    if len(several) > 1 or any(len(x) % n for n in several):
        raise ValueError(f"weight, bias and seed of {sorted(several)} runs for {len(x)} rows: all must be of as many, or one for all, and "
                         "each run has equally many rows")
    if x.shape[1] > 4096 or not (uses_triton(x) and uses_triton(h)) or left_to_compiler():
        return add_norm_ref(x, h, weight, bias, eps, p, seed)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h, weight, bias))
    return _add_norm(x, h, weight, bias, seed, eps, p, save)[0]
