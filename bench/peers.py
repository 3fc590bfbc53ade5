"""The inputs of each kernel, our implementation and its peers, each with inputs in its best layout.

A `Problem` is built from a case, a dict such as {"kernel": "attention", "S": 512, ...}. Liger is optional. With `exact`, the same rounded
inputs come in float64, and `truths` compute the right results.
"""
from contextlib import nullcontext
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure import captured
from bench.problem import Draws, Impl, Problem, against_eager, compiled, leaf, on, reference, wide, work
from kernels import add_norm, dropout, linear_loss
from kernels.attention import attention_qkv
from kernels.attention_kd import attention_kd
from kernels.hidden_mse import hidden_mse
from kernels.kd_loss import kd_loss

ALPHA, T = 0.5, 2.0
SMALL = 2**23       # below this many elements, launching takes as long as computing


# ---------------------------------------------------------------- attention

def ragged_lengths(tokens: int, longest: int) -> list[int]:
    """Log-normal lengths of at least 2 that sum to `tokens`. One is `longest`; half of a batch padded to that length would be padding."""
    B = round(2 * tokens / longest)
    z = torch.randn(B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def lengths(sigma: float) -> list[int]:
        return (longest * ((z - z.max()) * sigma).exp()).round().clamp(2).int().tolist()

    low, high = 0.0, 20.0           # a wider spread makes shorter sequences
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) > tokens else (low, middle)
    out, i = lengths(high), 0
    while sum(out) != tokens:       # single tokens make up for rounding
        step = 1 if sum(out) < tokens else -1
        if 2 <= out[i % B] + step < longest:
            out[i % B] += step
        i += 1
    return out


class Layout:
    """Sequences end to end, (N, ...), and as a padded batch, (B, S, ...), with conversions between the two."""
    def __init__(self, case: dict, device: torch.device):
        self.S, self.ragged = case["S"], case["ragged"]
        self.lengths = ragged_lengths(case["tokens"], self.S) if self.ragged else [self.S] * (case["tokens"] // self.S)
        lengths = torch.tensor(self.lengths)
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        self.document = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)    # (N,)
        self.valid = (torch.arange(self.S) < lengths[:, None]).to(device)                   # (B, S)

    def pad(self, x: Tensor, fill: Callable = torch.randn_like) -> Tensor:
        """(N, H, ...) to (B, H, S, ...), a view of (B, S, H, ...) as a model's projections give it."""
        out = fill(x.new_empty(*self.valid.shape, *x.shape[1:]))
        out[self.valid] = x
        return out.transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[self.valid]


def attention_flops(case: dict, lengths: list[int]) -> dict[str, float]:
    """Two products forward, five backward (S is recomputed), 2 S^2 D each, by the true lengths."""
    forward = 4.0 * case["H"] * case["D"] * sum(n * n for n in lengths)
    return work(forward, 2.5 * forward)


def attention_problem(case: dict, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Problem:
    layout, draws, p, S = Layout(case, device), Draws(device, dtype, exact), case["dropout"], case["S"]
    q, k, v, upstream = (draws.normal(case["tokens"], case["H"], case["D"]) for _ in range(4))
    seed, cu = torch.zeros(1, dtype=torch.int64, device=device), layout.cu_seqlens

    def ours(context: Callable = nullcontext) -> Impl:
        return Impl(lambda qkv: attention_qkv(qkv, cu, S, dropout_p=p, seed=seed), (leaf(torch.stack([q, k, v], 1)),), upstream, context,
                    lambda x: x if x.ndim == 3 else x.unbind(1))

    def sdpa(*backends: str, wide_mask: bool = False) -> Impl:
        mask = layout.valid[:, None, None, :] if layout.ragged else None
        mask = mask.expand(-1, 1, S, -1).contiguous() if wide_mask else mask
        return Impl(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p),
                    tuple(leaf(layout.pad(x)) for x in (q, k, v)), layout.pad(upstream, torch.zeros_like),
                    lambda: sdpa_kernel([getattr(SDPBackend, b) for b in backends]), layout.unpad)

    def flex() -> Impl:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        function = compiled(flex_attention)
        if not layout.ragged:
            return sdpa("MATH")._replace(function=lambda q, k, v: function(q, k, v), context=nullcontext)
        N, document = len(q), layout.document
        mask = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, N, N, device=device)
        packed = [x.transpose(0, 1)[None] for x in (q, k, v, upstream)]
        return Impl(lambda q, k, v: function(q, k, v, block_mask=mask), tuple(map(leaf, packed[:3])), packed[3],
                    canonical=lambda x: x[0].transpose(0, 1))

    def varlen() -> Impl:
        from torch.nn.attention.varlen import varlen_attn
        return Impl(lambda q, k, v: varlen_attn(q, k, v, cu, cu, S, S), tuple(map(leaf, (q, k, v))), upstream)

    names = {"flash": "FLASH_ATTENTION", "math": "MATH"}
    if device.type == "cuda":
        names |= {"cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    impls = {"ours": ours}
    impls |= {f"sdpa {name}": lambda backend=backend: sdpa(backend) for name, backend in names.items()}
    if layout.ragged:       # the mask that Hugging Face passes; torch then chooses
        impls["sdpa wide mask"] = lambda: sdpa(*names.values(), wide_mask=True)
    if not p:
        impls["flash varlen"] = varlen
        if S in (256, 512, 1024):       # only the lengths of encoders: flex takes longest to compile
            impls["flex"] = flex
    impls["reference"] = lambda: ours(reference)
    return Problem(impls, {"default": ours if p else lambda: sdpa("MATH")}, "tflops", attention_flops(case, layout.lengths))


def attention_kd_problem(case: dict, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Problem:
    layout, draws = Layout(case, device), Draws(device, dtype, exact)
    q_s, k_s, q_t, k_t = (draws.normal(case["tokens"], case["H"], case["D"]) for _ in range(4))
    upstream = draws.upstream(case["tokens"], case["H"])

    ours = on((q_s, k_s), lambda q, k: attention_kd(q, k, q_t, k_t, layout.cu_seqlens, case["S"]), upstream)

    def dense() -> Impl:
        qs, ks, qt, kt = (layout.pad(x) for x in (q_s, k_s, q_t, k_t))

        def maps(qs: Tensor, ks: Tensor) -> Tensor:
            scores = [wide(q @ k.mT) * q.shape[-1] ** -0.5 for q, k in ((qs, ks), (qt, kt))]
            if layout.ragged:       # not -inf: kl_div would turn it into NaN
                scores = [x.masked_fill(~layout.valid[:, None, None], -1e30) for x in scores]
            log_s, log_t = (F.log_softmax(x, -1) for x in scores)
            return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)

        return Impl(maps, (leaf(qs), leaf(ks)), layout.pad(upstream, torch.zeros_like), canonical=layout.unpad)

    flops = attention_flops(case, layout.lengths)["forward"]        # the same: two maps; backward: both again, dQ and dK
    return Problem(against_eager(ours, dense), {"default": dense}, "tflops", work(flops, 2 * flops))


# ---------------------------------------------------------------- losses

def eager_kd(s: Tensor, t: Tensor, labels: Tensor | None, alpha: float = ALPHA) -> Tensor:
    """The formula in plain PyTorch: raw logits (R, C) of student and teacher -> (R,)."""
    s, t = wide(s), wide(t)
    rows = alpha * T**2 * F.kl_div(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), reduction="none", log_target=True).sum(-1)
    return rows if labels is None else rows + (1 - alpha) * F.cross_entropy(s, labels, reduction="none")


def mean_kl(s: Tensor, t: Tensor) -> Tensor:
    """Liger's loss: the KL term alone, without alpha T^2, averaged."""
    return eager_kd(s, t, None, alpha=1 / T**2).mean()


def kd_problem(case: dict, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Problem:
    R, C, draws = case["R"], case["C"], Draws(device, dtype, exact)
    s, t = draws.normal(R, C, scale=2.0), draws.normal(R, C, scale=2.0)
    labels, upstream = draws.below(C, R), draws.upstream(R) / R

    ours = on((s,), lambda s: kd_loss(s, t, labels, alpha=ALPHA, T=T), upstream)
    eager = on((s,), lambda s: eager_kd(s, t, labels), upstream)

    def liger() -> Impl:
        from liger_kernel.transformers.functional import liger_kl_div
        return Impl(lambda s: liger_kl_div(F.log_softmax(wide(s) / T, -1), F.log_softmax(wide(t) / T, -1), reduction="batchmean",
                                           log_target=True), (leaf(s),), truth="mean KL")

    def graphed(build: Callable[[], Impl]) -> Impl:
        """Forward and backward as one replay of a CUDA graph."""
        impl = build()
        graph = captured(lambda: torch.autograd.grad(impl.function(*impl.leaves), impl.leaves, impl.upstream))
        return Impl(lambda: graph.replay(), (), passes=("both",))

    more = {"liger kl_div KL only": liger}
    if R * C < SMALL and s.is_cuda:
        more |= {"ours graph": lambda: graphed(ours), "eager graph": lambda: graphed(eager)}
    once = R * C * s.element_size()     # the student's logits
    return Problem(against_eager(ours, eager, **more), {"default": eager, "mean KL": on((s,), lambda s: mean_kl(s, t))},
                   "gbps", work(once * 2, once * 3), R * C < SMALL)


def hidden_problem(case: dict, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Problem:
    B, L, d = case["B"], case["L"], case["d"]
    draws = Draws(device, dtype, exact)
    s, t, rows, upstream = draws.normal(B, L, d), draws.normal(4 * B, L, d), draws.below(4 * B, B), draws.upstream(B)
    once = s.numel() * s.element_size()
    ours = on((s,), lambda s: hidden_mse(s, t, rows), upstream)
    eager = on((s,), lambda s: (wide(s) - wide(t[rows])).square().mean((1, 2)), upstream)
    return Problem(against_eager(ours, eager), {"default": eager}, "gbps", work(2 * once, 3 * once), B * L * d < SMALL)


def linear_problem(case: dict, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Problem:
    """linear_kd and linear_cross_entropy: a head of V words on N rows of width d, mean over rows. The teacher is close to the student,
    and "KL only" leaves out the label term. Rounded logits then show in the gradient; a label's 1 would hide them."""
    N, V, d, kd = case["N"], case["V"], case["d"], case["kernel"] == "linear_kd"
    draws = Draws(device, dtype, exact)
    x, w, b = draws.normal(N, d), draws.normal(V, d, scale=0.05), draws.normal(V, scale=0.1)
    x_t, w_t, b_t = draws.near(x), draws.near(w), draws.near(b)
    labels = draws.below(V, N)

    whole = partial(on, (x, w, b), passes=("both",))        # ours computes gradients in the forward: only "both" is comparable
    kl_only = partial(on, (x, w), truth="mean KL", passes=())

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if kd:
            return linear_loss.linear_kd(x, w, b, x_t, w_t, b_t, labels, alpha=ALPHA, T=T)
        return linear_loss.linear_cross_entropy(x, w, b, labels)

    def eager(x: Tensor, w: Tensor, b: Tensor, raise_to: Callable = lambda x: x) -> Tensor:
        s = F.linear(raise_to(x), raise_to(w), raise_to(b))
        if not kd:
            return F.cross_entropy(wide(s), labels)
        with torch.no_grad():
            t = F.linear(raise_to(x_t), raise_to(w_t), raise_to(b_t))
        return eager_kd(s, t, labels).mean()

    def gemms() -> Impl:
        """The matrix products alone, with the vocabulary rounded up to the size at which they are fastest."""
        x_, x_t_, w_, w_t_ = (y.detach() for y in (x, x_t, F.pad(w, (0, 0, 0, -V % 128)), F.pad(w_t, (0, 0, 0, -V % 128))))
        grad = draws.normal(N, len(w_))
        return Impl(lambda: (x_ @ w_.T, x_t_ @ w_t_.T if kd else None, grad @ w_, grad.T @ x_), (), passes=("both",))

    def linear_mean_kl(x: Tensor, w: Tensor) -> Tensor:
        return mean_kl(F.linear(x, w), F.linear(x_t, w_t))

    more = {"gemm bound": gemms, "eager fp32 gemm": on((x, w, b), partial(eager, raise_to=wide), passes=())}
    if kd:
        more |= {"ours KL only": kl_only(lambda x, w: linear_loss.linear_kd(x, w, None, x_t, w_t, None, alpha=1 / T**2, T=T)),
                 "eager KL only": kl_only(linear_mean_kl),
                 "eager fp32 gemm KL only": kl_only(lambda x, w: mean_kl(F.linear(wide(x), wide(w)), F.linear(wide(x_t), wide(w_t))))}
    more |= liger(kd, x_t, w_t, b_t, labels, whole, kl_only)
    return Problem(against_eager(whole(ours), whole(eager), **more), {"default": whole(eager), "mean KL": kl_only(linear_mean_kl)},
                   "tflops", {"both": (4 if kd else 3) * 2.0 * N * V * d})


def liger(kd: bool, x_t: Tensor, w_t: Tensor, b_t: Tensor, labels: Tensor, whole: Callable, kl_only: Callable) -> dict[str, Callable]:
    """Liger's fused linear losses. The first of distillation takes neither bias nor labels, so it does less; the second does everything."""
    def jsd() -> Impl:
        from liger_kernel.transformers.functional import liger_fused_linear_jsd
        return kl_only(lambda x, w: liger_fused_linear_jsd(x, w, x_t, w_t, jsd_beta=0.0, temperature=T), passes=("both",))()

    def chunked() -> Impl:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        torch._dynamo.reset()
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA * T**2, beta=0.0, temperature=T)
        return whole(lambda x, w, b: loss(x, w, x_t, w_t, labels, b, b_t))()

    def fused() -> Impl:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        return whole(lambda x, w, b: liger_fused_linear_cross_entropy(x, w, labels, b))()

    return {"liger jsd KL only": jsd, "liger chunked": chunked} if kd else {"liger fused": fused}


# ---------------------------------------------------------------- norm and dropout

def norm_problem(case: dict, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Problem:
    """add_norm. Ours has fp32 weights; the others have weights as wide as the rest, because torch has no mixed layer norm on a GPU.
    Liger fuses a residual with RMS norm only, so it is no peer here."""
    N, d, p, draws = case["N"], case["d"], case["dropout"], Draws(device, dtype, exact)
    (x, h, upstream), (weight, bias) = (draws.normal(N, d) for _ in range(3)), (draws.normal(d) for _ in range(2))
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    ours = on((x, h, wide(weight), wide(bias)), lambda x, h, w, b: add_norm(x, h, w, b, 1e-5, p, seed), upstream)
    eager = on((x, h, weight, bias), lambda x, h, w, b: F.layer_norm(x + F.dropout(h, p), (d,), w, b, 1e-5), upstream)
    once = N * d * x.element_size()     # x, h and y; dy, one saved tensor, dx, and dh if it differs from dx
    return Problem(against_eager(ours, eager), {"default": ours if p else eager}, "gbps", work(3 * once, (4 if p else 3) * once),
                   N * d < SMALL)


def dropout_problem(case: dict, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Problem:
    """dropout of rows: ours hashes in the kernel, the others draw Philox numbers."""
    N, d, p, draws = case["N"], case["d"], case["dropout"], Draws(device, dtype, exact)
    x, upstream, seed = draws.normal(N, d), draws.normal(N, d), torch.zeros(1, dtype=torch.int64, device=device)
    once = N * d * x.element_size()
    ours = on((x,), lambda x: dropout(x, p, seed), upstream)
    eager = on((x,), lambda x: F.dropout(x, p), upstream)
    return Problem(against_eager(ours, eager), {"default": ours}, "gbps", work(2 * once, 2 * once), N * d < SMALL)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "attention": attention_problem, "attention_kd": attention_kd_problem, "kd_loss": kd_problem, "hidden_mse": hidden_problem,
    "linear_kd": linear_problem, "linear_cross_entropy": linear_problem, "add_norm": norm_problem, "dropout": dropout_problem}
