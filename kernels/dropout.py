"""The dropout mask as a function of seed, row and column, the same in reference and kernels. It covers attention weights (seed, head,
query token, key token) and elements of (N, d) (seed, row, column).

Row i has hashed words a_i (odd) and b_i, and column j has c_j. An element is dropped if the int32 a_i c_j + b_i is below a threshold: one
multiply-add, one comparison and one select per element, compared with about 58 instructions for Philox. Along a row and along a
column the values are as independent as the words (multiply-shift hashing, Dietzfelbinger et al., 1997). 32 bits decide, so p is
exact to 2^-32. Attention computes the words once, in `dropout_words`. The kernels for (N, d) hash their own rows and columns, and save
only the seed for the backward. The column words of (N, d) come from seed 0, for every run.

The arithmetic of kept elements is fp32. Limits: N below 2^30 rows or tokens per run.
"""
import os

import torch
from torch import Tensor

from kernels import configs
from kernels.common import dense_rows, launch, left_to_compiler, op, row_class, tl, triton, uses_triton


def mix(x: Tensor) -> Tensor:
    """A bijection on 32 bits; every output bit depends on all input bits. For int64 tensors that hold values below 2^32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def words_ref(seed: Tensor, stream: int, heads: int, tokens: int) -> Tensor:
    """(H, N) int32 random words; `stream` 0, 1, 2 gives a, b, c of the module docstring. With K seeds, each is for its own N / K tokens,
    counted from 0 again, so K runs side by side draw what each would draw alone."""
    h = torch.arange(heads, device=seed.device)[:, None, None]
    n = torch.arange(tokens // len(seed), device=seed.device)
    low, high = (seed & 0xFFFFFFFF)[:, None], (seed >> 32 & 0xFFFFFFFF)[:, None]
    words = mix(mix(3 * n + stream) + mix(mix(low + h & 0xFFFFFFFF) ^ high) & 0xFFFFFFFF)      # (H, K, N / K)
    return (words | 1 if stream == 0 else words).to(torch.int32).view(heads, tokens)


def threshold_of(p: float) -> int:
    """An element is dropped if its int32 a c + b is below this threshold, as a share p of all int32 is."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def site_seeds(seed: Tensor, sites: range) -> Tensor:
    """(len(sites), K): a separate seed for each place where a model uses dropout and each of K seeds."""
    golden = -0x61C8864680B583EB     # 2^64 / golden ratio as int64; the product wraps around
    return seed + golden * torch.arange(sites.start, sites.stop, sites.step, device=seed.device)[:, None]


def check_dropout(N: int, p: float, seed: Tensor) -> None:
    """ValueError unless `p` is a probability below 1, `seed` is (K,) int64, and K divides the N rows."""
    if not 0 <= p < 1:
        raise ValueError(f"the probability of dropout must be at least 0 and below 1, not {p}")
    if seed.dtype != torch.int64 or seed.ndim != 1 or not len(seed) or N % len(seed):
        raise ValueError(f"dropout of {N} rows by seeds {tuple(seed.shape)} {seed.dtype}: K seeds (K,) int64 need a multiple of K rows")


def dropout_ref(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`dropout` of x (N, d) in plain PyTorch, with the same mask."""
    N, d = x.shape
    a, b = (words_ref(seed, stream, 1, N).view(N, 1) for stream in range(2))
    c = words_ref(torch.zeros_like(seed[:1]), 2, 1, d)
    keep = torch.addcmul(b, a, c) >= threshold_of(p)
    return (x * keep.to(x.dtype)).mul_(1 / (1 - p))     # not keep / (1 - p): in bf16 that is off by 0.2 % for every element


# ---------------------------------------------------------------- kernels

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")       # the interpreter cannot run PTX


@triton.jit
def mix_kernel(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def key_of(seed, h):
    """A hash of seed (int64) and head (uint32, or 0) that makes their words differ from those of other seeds and heads."""
    return mix_kernel(mix_kernel(seed.to(tl.uint32) + h) ^ (seed >> 32).to(tl.uint32))


@triton.jit
def hashed(n, stream, key):
    """`words_ref` of the rows n of a run."""
    words = mix_kernel(mix_kernel(3 * n.to(tl.uint32) + stream) + key)
    return (words | (stream == 0)).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["N", "H", "run", "blocks"], do_not_specialize_on_alignment=["seed_ptr"])
def dropout_words(seed_ptr, words_ptr, N, H, run, blocks, BLOCK: tl.constexpr):     # (K,) int64, (H, N, 4) int32
    """`words_ref` side by side for BLOCK tokens of one head: a, b, c and one unused word. N / K = `run` tokens share a seed."""
    h, n = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    key, stream = key_of(tl.load(seed_ptr + n // run, mask=n < N, other=0), h.to(tl.uint32)), tl.arange(0, 4)[None, :]
    words = hashed((n % run)[:, None], stream.to(tl.uint32), key[:, None])
    tl.store(words_ptr + (h * N.to(tl.int64) + n)[:, None] * 4 + stream, words, mask=n[:, None] < N)


@triton.jit
def kept(decides, threshold, x, y):
    """x and y where `decides` is at least `threshold`, else 0. In PTX: from Triton's `where`, LLVM packs the comparisons into bits and
    unpacks them, 5 to 9 instructions per element instead of 3."""
    if INTERPRETED:
        return tl.where(decides < threshold, 0.0, x), tl.where(decides < threshold, 0.0, y)
    else:
        return tl.inline_asm_elementwise("""{
            .reg .pred dropped;
            setp.lt.s32 dropped, $2, $3;
            selp.f32 $0, 0f00000000, $4, dropped;
            selp.f32 $1, 0f00000000, $5, dropped;
        }""", "=&f,=f,r,r,f,f", [decides, threshold, x, y], (tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def bits(ptr, n, length, j: tl.constexpr, W: tl.constexpr):
    """(len(n),) the j-th of W 32-bit numbers stored side by side per token, for tokens n of one sequence and head; 0 past the end."""
    return tl.load(ptr + n * W + j, mask=n < length, other=0)


@triton.jit
def bits_tile(ptr, n, length, W: tl.constexpr):
    """(len(n), W) all W numbers in one load. In a loop, use this and not `bits`: Triton 3.6 loads a short vector in the layout of the
    matrix product that uses it, which is 16 loads per thread."""
    return tl.load(ptr + n[:, None] * W + tl.arange(0, W)[None, :], mask=n[:, None] < length, other=0)


@triton.jit
def column(tile, j: tl.constexpr):
    """(len(n),) column j of `bits_tile`."""
    return tl.sum(tl.where(tl.arange(0, tile.shape[1])[None, :] == j, tile, 0), 1)


@triton.jit
def block_of_run(pid, run, blocks, BLOCK_N: tl.constexpr):
    """The run of block `pid`, the first row of the run, and the block's rows counted from there. A run has `run` rows in `blocks` blocks
    of BLOCK_N rows; no block spans two runs."""
    k = pid // blocks
    return k, k.to(tl.int64) * run, pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def keep_tile(seed_ptr, start, n, cols, seed_run, threshold, keep_scale):
    """(len(n), len(cols)) keep_scale if an element is kept, else 0, in the rows start + n. Each seed covers seed_run
    rows; all rows of the tile must be rows of one seed."""
    key, n = key_of(tl.load(seed_ptr + start // seed_run), 0), (start % seed_run).to(tl.int32) + n
    decides = hashed(n, 0, key)[:, None] * hashed(cols, 2, 0)[None, :] + hashed(n, 1, key)[:, None]
    return tl.where(decides < threshold, 0.0, keep_scale)


@triton.jit(do_not_specialize=["run", "blocks", "tiles", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _dropout_rows(x_ptr, seed_ptr, out_ptr, run, d, blocks, tiles, x_stride, out_stride, threshold, keep_scale,     # (N, d), (K,), (N, d)
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_N rows of one run, BLOCK_D columns. The backward is the same operation on the gradient."""
    _, start, n = block_of_run(tl.program_id(0) // tiles, run, blocks, BLOCK_N)
    cols = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n < run)[:, None] & (cols < d)[None, :]
    rows = (start + n)[:, None]
    x = tl.load(x_ptr + rows * x_stride + cols[None, :], mask=inside).to(tl.float32)
    x *= keep_tile(seed_ptr, start, n, cols, run, threshold, keep_scale)
    tl.store(out_ptr + rows * out_stride + cols[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- op

@op
def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    d, run = x.shape[1], len(x) // len(seed)
    x, out = *dense_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BLOCK_N, BLOCK_D, warps = configs.pick("dropout", row_class(d), x.dtype, x.device)
    blocks, tiles = -(-run // BLOCK_N), -(-d // BLOCK_D)
    launch(_dropout_rows, len(seed) * blocks * tiles, x, *dense_rows(seed), out, run, d, blocks, tiles, x.stride(0), d, threshold_of(p),
           1 / (1 - p), BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=warps)
    return out


def _save(ctx, inputs, output):
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


_dropout.register_autograd(lambda ctx, up: (_dropout(up, ctx.p, *ctx.saved_tensors), None, None), setup_context=_save)


# ---------------------------------------------------------------- public

def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout of rows (N, d): an element is kept with probability 1 - p and divided by 1 - p, otherwise it is zero. The mask is a
    function of the seed, the row and the column.

    seed       (K,) int64 on the device of x: K runs side by side, each with its own N / K rows; None: nothing is dropped
    Returns    (N, d). Raises ValueError if x is not (N, d), p is not in [0, 1), or K does not divide N.
    """
    if seed is None or p == 0.0:
        return x
    if x.ndim != 2:
        raise ValueError(f"dropout is of rows (N, d), not {tuple(x.shape)}")
    check_dropout(len(x), p, seed)
    return _dropout(x, p, seed) if uses_triton(x) and not left_to_compiler() else dropout_ref(x, p, seed)
