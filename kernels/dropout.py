"""Which attention weights are dropped: a function of (seed, head, query token, key token), the same in reference and kernels.

Row i of a head has hashed words a_i (odd) and b_i, key j has c_j, all made once, by `dropout_words`. A weight is dropped where the int32
a_i c_j + b_i is below a threshold: one multiply-add, one comparison, one select and one product an element, where Philox takes about 58
instructions. Along a row and along a column the values are as independent as the words are (multiply-shift hashing, Dietzfelbinger et
al., 1997); 32 bits decide, so p is exact to 2^-32.
"""
import torch
from torch import Tensor

from kernels.common import tl, triton


def mix(x: Tensor) -> Tensor:
    """A bijection on 32 bits whose output bits each depend on all input bits; int64 tensors that hold values below 2^32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def words_ref(seed: Tensor, stream: int, heads: int, tokens: int) -> Tensor:
    """(H, N) int32 random words; `stream` 0, 1, 2 are a, b, c of the module docstring. Of K seeds, each is for its own N / K tokens,
    which are counted from 0 again: what K runs would draw, each by itself."""
    h = torch.arange(heads, device=seed.device)[:, None, None]
    n = torch.arange(tokens // len(seed), device=seed.device)
    low, high = (seed & 0xFFFFFFFF)[:, None], (seed >> 32 & 0xFFFFFFFF)[:, None]
    words = mix(mix(3 * n + stream) + mix(mix(low + h & 0xFFFFFFFF) ^ high) & 0xFFFFFFFF)      # (H, K, N / K)
    return (words | 1 if stream == 0 else words).to(torch.int32).view(heads, tokens)


def threshold_of(p: float) -> int:
    """A weight is dropped where the int32 a c + b is below this: a share p of all."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def site_seeds(seed: Tensor, sites: range) -> Tensor:
    """(len(sites), K): for each place where a model drops something, and each of K seeds, a seed of its own."""
    golden = -0x61C8864680B583EB     # 2^64 / golden ratio as int64; the product wraps around
    return seed + golden * torch.arange(sites.start, sites.stop, device=seed.device)[:, None]


def dropout_ref(x: Tensor, p: float, seed: Tensor) -> Tensor:
    N, d = x.shape
    a, b = (words_ref(seed, stream, 1, N).view(N, 1) for stream in range(2))
    c = words_ref(torch.zeros_like(seed[:1]), 2, 1, d)
    keep = torch.addcmul(b, a, c) >= threshold_of(p)
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout of rows (N, d): an element is kept with probability 1 - p and divided by it, or zero. Which ones is a function of
    the seed, the row and the column.

    seed       (K,) int64 on the device of x: K runs side by side, each with its own N / K rows; None: nothing is dropped
    Returns    (N, d). Raises ValueError where K does not divide N.
    """
    if seed is None or p == 0.0:
        return x
    if len(x) % len(seed):
        raise ValueError(f"dropout of {len(x)} rows by {len(seed)} seeds: each must have equally many")
    return dropout_ref(x, p, seed)


@triton.jit
def mix_kernel(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["N", "H", "blocks"])
def dropout_words(seed_ptr, words_ptr, N, H, blocks, BLOCK: tl.constexpr):     # (1,) int64, (3, H, N) int32
    """`words_ref`, all three streams of one head for BLOCK tokens."""
    h, n = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    key = mix_kernel(mix_kernel(seed.to(tl.uint32) + h.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    for stream in tl.static_range(3):
        words = mix_kernel(mix_kernel(3 * n.to(tl.uint32) + stream) + key)
        if stream == 0:
            words = words | 1
        tl.store(words_ptr + (stream * H + h) * N.to(tl.int64) + n, words.to(tl.int32, bitcast=True), mask=n < N)


@triton.jit
def keep_factor(a, b, c, threshold):
    """1 where a weight is kept, else 0. As a factor: selecting by the comparison itself is moved behind the cast to 16 bits by the
    compiler, and costs 7 to 9 instructions an element instead of 5."""
    return tl.where(a * c + b < threshold, 0.0, 1.0)


@triton.jit
def word(words_ptr, stream: tl.constexpr, n, length, N, H):
    """Words of the tokens `n` of one sequence and head, whose a begin at words_ptr."""
    return tl.load(words_ptr + stream * H * N.to(tl.int64) + n, mask=n < length, other=0)
