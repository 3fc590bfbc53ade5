"""Recycling without training on the task: maps that carry a delta from one base to another.

From text alone, in closed form (`transport`): X and Y are the two bases' rows at the input or output of a linear map, on the same text.

    A = argmin ||Y A - X||     B = argmin ||X B - Y||     D' = B_out^T D A_in^T   for a change D of W in y = x W^T

From labelled tasks (`learn_projection`): a low-rank map from old deltas to new ones, learned on other tasks.

    w' = w W1 W2 + b        w (rows, m): trained weights of a delta;  W1 (m, r), W2 (r, m);  b has the size of w
    w' = w + w W1 W2 + b    `residual`

The first form keeps only what passes through r numbers per row of an unseen delta. The residual form keeps the delta and adds to it.

There are two granularities. `flat`: all n weights are one row, m = n, as in the paper's public code: (2r + 1) n numbers. `tensor`: each
tensor is a matrix, m its last dimension, with its own W1 and W2 (r at most m): n + 2 r x the sum of last dimensions. Training takes 16
bytes per number. All 125 M weights of RoBERTa-base at r = 16 take 66 GB flat and 2 GB by tensor. The adapters take 1 GB flat.

At the start, W2 = 0, W1 is random and scaled so that w W1 is about 1, and b is the mean of the sources' w, or 0 if residual. So training
starts from `apply` of the mean source, or of the delta itself.
"""
import itertools
import re
from dataclasses import replace
from functools import cache, partial
from typing import Callable, Iterable, Literal, Sequence, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rt.data import TaskData, sequences_batch
from rt.deltas import Base, Delta, apply, attach, check_fits, extract
from rt.errors import InputError
from rt.losses import DistillConfig, Loss, Reweighted, Weights, run_teacher
from rt.model import Encoder
from rt.tune import Hook, TuneSettings, evaluate, ignore, minimise, plain_gradient, train_step

Granularity = Literal["auto", "flat", "tensor"]     # auto: flat, as in the public code, if that is small (all kinds but full), else tensor


class Projection(nn.Module):
    """The map, initialised. b and the scale of W1 come from `sources`. Every projected delta must have their kind and sizes. Without
    `with_head`, the map leaves out heads, and tasks may have different numbers of labels."""
    def __init__(self, sources: list[Delta], r: int, granularity: Granularity, residual: bool, with_head: bool, seed: int):
        super().__init__()
        if granularity not in get_args(Granularity):
            raise InputError(f"granularity {granularity!r}: not one of {', '.join(get_args(Granularity))}")
        if granularity == "auto":
            granularity = "tensor" if sources[0].config.kind == "full" else "flat"
        self.r, self.granularity, self.residual, self.with_head = r, granularity, residual, with_head
        self.used = sources[0].config.used
        self.shapes = {k: v.shape for k, v in sources[0].tensors(with_head).items()}
        self.W1, self.W2, self.b = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()   # one of each per matrix
        generator = torch.Generator().manual_seed(seed)
        for same in zip(*(self.rows(delta) for delta in sources)):
            x = torch.stack(same)       # (sources, rows, m)
            m, size = x.shape[-1], x.norm(dim=-1).square().mean().sqrt()     # size: root mean square norm of a row
            W1 = torch.randn(m, min(r, m), generator=generator).to(x)
            self.W1.append(nn.Parameter(W1 / size if size > 0 else W1))
            self.W2.append(nn.Parameter(x.new_zeros(min(r, m), m)))
            # a vector, so AdamW does not decay it: most of a delta is in b
            self.b.append(nn.Parameter(x.new_zeros(x[0].numel()) if residual else x.mean(0).flatten()))
        self.best_step, self.dev = 0, {}

    def rows(self, delta: Delta) -> list[Tensor]:
        """The delta as matrices (rows, m): one in all, or one per tensor. Raises InputError if its kind or sizes differ."""
        tensors = delta.tensors(self.with_head)
        if delta.config.used != self.used or {k: v.shape for k, v in tensors.items()} != self.shapes:
            raise InputError(f"a delta of task {delta.info.get('task')} does not fit the projection: use deltas of one kind, base and size")
        if self.granularity == "flat":
            return [torch.cat([v.flatten() for v in tensors.values()])[None]]
        return [v.reshape(-1, v.shape[-1]) for v in tensors.values()]

    def forward(self, delta: Delta) -> dict[str, Tensor]:
        """w' by the names of `Delta.tensors`, in fp32. The delta must be on the map's device."""
        mapped = []
        with torch.autocast(self.b[0].device.type, enabled=False):
            for x, W1, W2, b in zip(self.rows(delta), self.W1, self.W2, self.b, strict=True):
                y = x @ W1 @ W2 + b.view_as(x)
                mapped.append(x + y if self.residual else y)
        if self.granularity == "flat":
            mapped = mapped[0].flatten().split([shape.numel() for shape in self.shapes.values()])
        return {k: y.view(shape) for (k, shape), y in zip(self.shapes.items(), mapped, strict=True)}


@torch.no_grad()
def project(projection: Projection, delta: Delta) -> Delta:
    """The delta mapped to the new base, on the CPU. Its info still names the old base, so use apply(base, delta, stale_ok=True)."""
    mapped = projection(delta.map(lambda _, v: v.to(projection.b[0].device)))
    return delta.map(lambda name, v: mapped.get(name, v).cpu())


def student_weights(own: Weights, delta: Delta, projection: Projection) -> Weights:
    """Weights of a Classifier: new base (`own`, the encoder's weights) + projected delta. An unprojected head is the delta's own."""
    weights = {f"head.{k}": v for k, v in delta.head.items()}
    for name, tensor in projection(delta).items():
        part, _, k = name.partition(".")
        weights[name if part == "head" else f"encoder.{k}"] = own[k] + tensor if part == "diffs" else tensor
    return weights


def check_sources(old_base: Base, base: Base, sources: list[tuple[Delta, TaskData]], target: Delta | None = None) -> None:
    """Raises InputError if a projection cannot be learned from these deltas of the old base, or cannot be used on `target`."""
    for delta, data in sources:
        check_fits(old_base, delta, stale_ok=False)
        check_fits(base, delta, stale_ok=True)      # equal sizes, and equal ids for teacher and student
        if delta.labels != data.labels:
            raise InputError(f"the source delta of task {delta.info.get('task')} has other labels than the source task {data.name}")
    first, *others = [delta.config.used for delta in [*(delta for delta, _ in sources), *([target] if target else [])]]
    for other in others:
        if other != first:
            raise InputError(f"a projection needs all deltas of one kind and size, not {first} and {other}")


def learn_projection(old_base: Base, base: Base, sources: list[tuple[Delta, TaskData]], settings: TuneSettings, distill: DistillConfig, *,
                     r: int, granularity: Granularity, residual: bool, device: torch.device, precision: torch.dtype,
                     with_head: bool = False, on_step: Hook = ignore, on_eval: Hook = ignore) -> Projection:
    """A map from deltas of `old_base` to deltas of `base`, trained on the source tasks in turn: step i uses source i mod S. The loss is
    distillation without attention maps and interpolation: teacher = old base + the source's delta, student = new base + its projection.
    `with_head` requires one number of labels in all sources, and later in the target. Returns the best map by the mean dev score of the
    sources, the first entry of dev in `on_eval`. Raises InputError if deltas and bases do not fit together, Diverged like rt.tune.Fit."""
    check_sources(old_base, base, sources)
    deltas, datas, s = [delta.map(lambda _, v: v.to(device)) for delta, _ in sources], [data for _, data in sources], settings
    projection = Projection(deltas, r, granularity, residual, with_head, s.seed)
    # one skeleton for all sources: every weight it trains is replaced, and the head too, whatever its number of labels
    model, own = attach(base, deltas[0].config, 1, s.seed), {k: p.detach() for k, p in base.encoder.named_parameters()}
    students = [Reweighted(model, partial(student_weights, own, delta, projection)) for delta in deltas]
    losses = [Loss(not data.labels, run_teacher(apply(old_base, delta), data.train, device, precision), replace(distill, gamma=0.0, itp=0))
              for delta, data in zip(deltas, datas)]
    gradients = [plain_gradient(student, loss, device, precision) for student, loss in zip(students, losses)]

    def gradient(step: int) -> Tensor:
        turn, i = divmod(step, len(sources))
        return train_step(gradients[i], datas[i].train, s, on_step, turn, " on projected weights", ", `seq_len` or `rank`")

    def dev_scores() -> dict[str, float]:
        each = {data.name: next(iter(evaluate(student, data.dev, device, precision).values())) for student, data in zip(students, datas)}
        return {"mean": None if None in each.values() else sum(each.values()) / len(each), **each}

    result = minimise(dict(projection.named_parameters()), gradient, s, dev_scores, on_eval)
    projection.best_step, projection.dev = result.best_step, result.dev
    return projection


# --- maps from text ---------------------------------------------------------------------------------------------------

Carry = Literal["none", "ridge", "orthogonal", "permutation"]
RIDGE = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)   # lambda, in units of the mean eigenvalue
HELD_OUT = 5            # one text in HELD_OUT is held out: lambda is chosen on its rows
# Patterns of tensor names: the places a tensor reads from and writes to, as MODULE.in or MODULE.out of the plain encoder
PLACES = ((r"embeddings\.(word\.weight|position\.weight|second_type)", None, "embeddings.norm.in"),
          (r"(.*norm)\.weight", r"\1.out", r"\1.out"), (r"(.*)\.prefix\.(k|v|gate)", None, r"\1.qkv.out"),
          (r"(.*)\.lora\.A\.\w+", r"\1.in", None), (r"(.*)\.adapter\.down\.weight", r"\1.out", None),
          (r".*\.adapter\.down\.bias", None, None), (r"(.*)\.(lora\.B\.\w+|adapter\.up\.(weight|bias))", None, r"\1.out"),
          (r"(.*\.(qkv|attention_output|intermediate|output))\.weight", r"\1.in", r"\1.out"),
          (r"(.*(qkv|attention_output|intermediate|output|norm))\.bias", None, r"\1.out"))
THIRDS = {"query": 0, "key": 1, "value": 2, "k": 1, "v": 2, "gate": 2}      # third of qkv's rows, by the end of a tensor's name
OF_HEADS = ("qkv.out", "attention_output.in")
Pair = tuple[list[int], list[int], list[int], list[int]]    # a text's ids and compared rows for the old base, then for the new base


@torch.no_grad()
def transport(old_base: Base, base: Base, delta: Delta, pairs: list[Pair], how: Carry) -> tuple[Delta, dict]:
    """`delta` carried to `base`, and facts about the map for the run's record. The map comes from both bases' hidden states on `pairs`.
    Layers without a partner get a fresh module, which changes nothing. InputError as in check_carry, and for too few texts."""
    check_carry(old_base, base, delta, how)
    if len(pairs) < 2:
        raise InputError(f"`carry`: {len(pairs)} texts are too few to compare two bases on")
    old, new, device = old_base.encoder, base.encoder, base.encoder.embeddings.word.weight.device
    layers, same_width = match_layers(old, new, pairs[:64]), old.config.hidden_size == new.config.hidden_size
    carried = extract(attach(base, delta.config, delta.num_outputs, 0), base, delta.config, delta.info)

    def old_name(name: str) -> str | None:      # the old base's name of a tensor or place; None for a layer without a partner
        number = re.search(r"(?<=layers\.)\d+", name)
        return name if number is None else f"layers.{layers[int(number[0])]}{name[number.end():]}" if int(number[0]) in layers else None

    names = [(part, name) for part in (carried.diffs, carried.modules) for name in part
             if old_name(name) and ("norm." not in name or same_width)]
    sites = {site: (old_name(site), site) for _, name in names for site in places(name) if site}
    sites["head"] = tuple(f"layers.{len(encoder.layers) - 1}.output_norm.out" for encoder in (old, new))
    found = maps(moments(old, new, pairs, sites, how), how, new.config.num_heads)
    for part, name in names:
        part[name] = moved(name, (delta.diffs | delta.modules)[old_name(name)].to(device), found).float().cpu()
    carried.head.update(moved_head(carried.head, delta.head, found("head", True)[0].float().cpu()))
    return carried, {"carried": {"map": how, "texts": len(pairs), "rows": sum(len(pair[1]) for pair in pairs),
                                 "layers": [*layers.items()], "left_out": [] if same_width else ["layer norms"]}}


def check_carry(old_base: Base, base: Base, delta: Delta, how: Carry) -> None:
    """Raises InputError if `delta` cannot be carried from `old_base` to `base` by a map of this kind."""
    for name in (*delta.diffs, *delta.modules):
        places(name)
    if delta.config.kind not in ("lora", "adapter"):
        check_fits(base, delta, stale_ok=True)      # same sizes and vocabulary
    for name in ("hidden_size", "ffn_size", "num_heads")[:{"ridge": 0, "orthogonal": 2, "permutation": 3}[how]]:
        if (a := getattr(old_base.encoder.config, name)) != (b := getattr(base.encoder.config, name)):
            raise InputError(f"`carry` {how} is for bases of equal {name}, not {a} and {b}: use ridge")


def places(name: str) -> tuple[str | None, str | None]:
    """The places a tensor of a delta reads from and writes to. FFN units are compared after GELU, because before it they span only d
    dimensions. Raises InputError for an unknown tensor."""
    plain = name.replace("adapter_attention", "attention_output.adapter").replace("adapter_ffn", "output.adapter")
    for pattern, *ends in PLACES:
        if match := re.fullmatch(pattern, plain):
            return tuple(end and match.expand(end).replace("intermediate.out", "output.in") for end in ends)
    raise InputError(f"the delta's tensor {name} cannot be carried to another base: where it reads and writes is not known")


def moved(name: str, D: Tensor, found: Callable[[str, bool], Tensor]) -> Tensor:
    """A delta's tensor for the new base. With x_old = x_new A and y_new = y_old B, a change D of W in y = x W^T becomes D' = B^T D A^T."""
    (reads, writes), last, D = places(name), name.rpartition(".")[2], D.double()
    A, B = reads and found(reads, True)[0], writes and found(writes, False)
    B = B if B is None else B[THIRDS[last]] if last in THIRDS else torch.block_diag(*B)
    if name.endswith("norm.weight"):
        return (B.T * A) @ D        # the diagonal of B^T diag(D) A^T
    if last == "gate":              # a mean of the old gates, weighted by how much of each old head enters the new head
        share = B.unflatten(1, (len(D), -1)).unflatten(0, (len(D), -1)).square().sum((1, 3))
        return D @ (share / share.sum(0))
    if last in ("k", "v") or name.startswith("embeddings.") and D.ndim == 2:
        return (D.flatten(1) @ B).view(D.shape)     # rows of vectors
    D = D if A is None else D @ A.T
    return D if B is None else B.T @ D


def moved_head(fresh: dict[str, Tensor], head: dict[str, Tensor], A: Tensor) -> dict[str, Tensor]:
    """The head, reading <s> through A (d_new, d_old). On a wider base it also has features of the fresh head, with zero output weights. On
    a narrower base it keeps the features with the largest output weights."""
    keep = head["out.weight"].norm(dim=0).topk(min(A.shape)).indices.sort().values
    dense, bias, out = fresh["dense.weight"].clone(), fresh["dense.bias"].clone(), torch.zeros_like(fresh["out.weight"])
    dense[:len(keep)], bias[:len(keep)] = head["dense.weight"][keep] @ A.T, head["dense.bias"][keep]
    out[:, :len(keep)] = head["out.weight"][:, keep]
    return {"dense.weight": dense, "dense.bias": bias, "out.weight": out, "out.bias": head["out.bias"].clone()}


def activations(encoder: Encoder, sequences: Sequence[list[int]], rows: Sequence[list[int]], sites: Iterable[str]) -> dict[str, Tensor]:
    """(n, width) at each of `sites` (PLACES of the encoder), in fp64: the given rows of every sequence, concatenated."""
    batch, kept = sequences_batch([*sequences]).to(encoder.embeddings.word.weight.device), {}
    index = torch.tensor([first + row for first, own in zip(batch.cu_seqlens.tolist(), rows) for row in own], device=batch.ids.device)

    def keep(site: str, _: nn.Module, inputs: tuple, output: Tensor) -> None:
        kept[site] = (inputs[0] if site.endswith(".in") else output)[index].double()

    hooks = [encoder.get_submodule(site.rpartition(".")[0]).register_forward_hook(partial(keep, site)) for site in sites]
    encoder.eval()(batch)
    for hook in hooks:
        hook.remove()
    return kept


def match_layers(old: Encoder, new: Encoder, pairs: list[Pair]) -> dict[int, int]:
    """{new layer: old layer}, in order and one to one, for as many layers as the shallower encoder has. The choice maximises the summed
    linear CKA (Kornblith et al., 2019) of paired layers' outputs. At equal depth each layer is its own partner."""
    a, b, outputs = len(old.layers), len(new.layers), []
    for encoder, ids, rows in zip((old, new), *[iter(zip(*pairs))] * 2):
        found = activations(encoder, ids, rows, [f"layers.{n}.output_norm.out" for n in range(len(encoder.layers))]).values()
        outputs.append([x / (x.T @ x).norm().sqrt() for x in (x - x.mean(0) for x in found)])
    cka = [[(x.T @ y).square().sum().item() for y in outputs[1]] for x in outputs[0]]
    some = itertools.combinations(range(max(a, b)), min(a, b))
    choices = ([*zip(range(b), chosen)] if a > b else [*zip(chosen, range(a))] for chosen in some)
    return dict(max(choices, key=lambda choice: sum(cka[i][j] for j, i in choice)))


def moments(old: Encoder, new: Encoder, pairs: list[Pair], sites: dict[str, tuple[str, str]], how: Carry) -> dict[str, list[Tensor]]:
    """[X^T Y, X^T X, Y^T Y] of old and new rows at each of `sites` {name: (old, new)}: (2, c, ., .) in fp64, for fitted and held-out texts.
    c is 3 at qkv, else 1. The last two are diagonals if that is enough. For the head, <s> rows weigh as much as all rows."""
    total: list[dict[str, list[Tensor]]] = [{}, {}]
    for part, some in enumerate(([pair for i, pair in enumerate(pairs) if i % HELD_OUT], pairs[::HELD_OUT])):
        for a, rows_a, b, rows_b in (zip(*some[i:i + 32]) for i in range(0, len(some), 32)):
            found = [activations(encoder, ids, rows, {site[i] for site in sites.values()})
                     for i, (encoder, ids, rows) in enumerate(((old, a, rows_a), (new, b, rows_b)))]
            for site, ends in sites.items():
                X, Y = (V[end].unflatten(1, (3 if site.endswith("qkv.out") else 1, -1)).movedim(1, 0) for V, end in zip(found, ends))
                if site == "head":
                    first = np.cumsum([0, *map(len, rows_a)])[:-1]
                    X, Y = (torch.cat([V, V[:, first] * (V.shape[1] / len(a)) ** 0.5], 1) for V in (X, Y))
                is_whole = how == "ridge" or site.endswith(OF_HEADS)
                products = [X.mT @ Y, *(V.mT @ V if is_whole else V.square().sum(1) for V in (X, Y))]
                total[part][site] = [before + more for before, more in zip(total[part].get(site, [0.0] * 3), products)]
    return {site: [torch.stack(both) for both in zip(total[0][site], total[1][site])] for site in sites}


def maps(moments: dict[str, list[Tensor]], how: Carry, heads: int) -> Callable[[str, bool], Tensor]:
    """find(site, back): B (c, a, b), old rows to new, minimises ||X B - Y||; if `back`, A (c, b, a) minimises ||Y A - X||, among all
    matrices (ridge) or rotations (orthogonal; Schonemann, 1966). `how` permutation maximises cosines (Ainsworth et al., 2023)."""
    @cache
    def find(site: str, back: bool) -> Tensor:
        XY, XX, YY = moments[site]
        if how == "ridge":
            return ridge(YY, XY.mT) if back else ridge(XX, XY)
        if back:
            return find(site, False).mT
        if how == "orthogonal" and not site.endswith(".output.in"):     # through GELU, units can be permuted but not rotated
            U, _, V = torch.linalg.svd(XY.sum(0))
            return U @ V
        return permutation(XY.sum(0), XX.sum(0), YY.sum(0), heads if site.endswith(OF_HEADS) else 1)

    return find


def ridge(G: Tensor, C: Tensor) -> Tensor:
    """argmin ||Y A - X||^2 + lambda ||A||^2 for G = Y^T Y and C = Y^T X. lambda is chosen on held-out rows; A uses all."""
    unit = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(G.shape[-1]).to(G)
    fits = [torch.linalg.solve(G[0] + r * unit[0], C[0]) for r in RIDGE]
    errors = [(A * (G[1] @ A - 2 * C[1])).sum().item() for A in fits]
    return torch.linalg.solve((G + RIDGE[errors.index(min(errors))] * unit).sum(0), C.sum(0))


def permutation(XY: Tensor, XX: Tensor, YY: Tensor, heads: int) -> Tensor:
    """(c, n, n), matched on two levels: heads by linear CKA, then the dimensions within heads. Queries and keys have one order."""
    def scaled(M: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
        x, y = ((V if V.ndim == 2 else V.diagonal(dim1=1, dim2=2)).sqrt().clamp_min(1e-30) for V in (of_x, of_y))
        return M / x[:, :, None] / y[:, None]

    D, B, score, pairs = XY.shape[-1] // heads, torch.zeros_like(XY), scaled(XY, XX, YY), np.array([0])
    if heads > 1:
        cka = scaled(*(M.unflatten(2, (heads, -1)).unflatten(1, (heads, -1)).square().sum((2, 4)) for M in (XY, XX, YY)))   # (c, H, H)
        pairs = assignment(cka.sum(0))
    score[:2] = score[:2].sum(0)        # queries plus keys; without the three parts of qkv this changes nothing
    for c, (i, j) in itertools.product(range(len(XY)), enumerate(pairs)):
        block = np.s_[c, i * D:(i + 1) * D, j * D:(j + 1) * D]
        B[block] = torch.eye(D).to(B)[assignment(score[block])]
    return B


def assignment(score: Tensor) -> np.ndarray:
    """(n,): the column of each row in the one-to-one assignment of greatest total score (n, n), by shortest augmenting paths (Jonker &
    Volgenant, 1987): O(n^3), a second for n = 1536."""
    cost = (score.max() - score).cpu().numpy()
    n, v = len(cost), cost.min(0)
    u, row_of, column_of = (cost - v).min(1), np.full(n, -1), np.full(n, -1)      # cost >= u + v, with equality for matched pairs
    for start in range(n):
        i, length, distance, before, done = start, 0.0, np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        while True:         # Dijkstra's algorithm, to the nearest free column
            through = length + cost[i] - u[i] - v
            nearer = ~done & (through < distance)
            distance[nearer], before[nearer] = through[nearer], i
            j = int(np.where(done, np.inf, distance).argmin())
            length = distance[j]
            if row_of[j] < 0:
                break
            done[j], i = True, row_of[j]
        u[start] += length
        u[row_of[done]] += length - distance[done]
        v[done] -= length - distance[done]
        while j >= 0:       # every row on the path takes the next column
            i = row_of[j] = before[j]
            column_of[i], j = j, column_of[i]
    return column_of
