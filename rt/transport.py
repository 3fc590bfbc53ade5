"""Recycling without training on the task: maps that carry a delta from one base to another.

From text alone (`transport`): the new base may hold the same dimensions in another order, which activations on the same texts reveal.

From labelled tasks (`learn_projection`): a low-rank map from old deltas to new ones, learned on other tasks.

    w' = w W1 W2 + b        w (rows, m): trained weights of a delta;  W1 (m, r), W2 (r, m);  b has the size of w
    w' = w + w W1 W2 + b    `residual`

The first form keeps only what passes through r numbers per row of an unseen delta. The residual form keeps the delta and adds to it.

There are two granularities. `flat`: all n weights are one row, m = n, as in the paper's public code: (2r + 1) n numbers. `tensor`: each
tensor is a matrix, m its last dimension, with its own W1 and W2 (r at most m): n + 2 r x the sum of last dimensions. Training takes 16
bytes per number. All 125 M weights of RoBERTa-base at r = 16 take 66 GB flat and 2 GB by tensor. The adapters take .5 GB flat.

At the start, W2 = 0, W1 is random and scaled so that w W1 is about 1, and b is the mean of the sources' w, or 0 if residual. So training
starts from `apply` of the mean source, or of the delta itself.
"""
import re
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rt.data import TaskData, sequences_batch
from rt.deltas import Base, Delta, apply, attach, check_fits, origin
from rt.errors import InputError
from rt.losses import RUN_TEACHER, DistillConfig, Loss, Reweighted, Weights, run_teacher
from rt.model import Encoder, LayerNorm
from rt.tune import Hook, TuneSettings, evaluate, ignore, minimise, plain_gradient, train_step

Granularity = Literal["auto", "flat", "tensor"]     # auto: flat, as in the public code, if that is small (all kinds but full), else tensor


class Projection(nn.Module):
    """The map, initialised. b and the scale of W1 come from `sources`. Every projected delta must have their kind and sizes. Without
    `with_head`, heads are left as they are, and tasks may have different numbers of labels."""
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
        for same in zip(*(self.matrices(delta) for delta in sources)):
            x = torch.stack(same)       # (sources, rows, m)
            m, size = x.shape[-1], x.norm(dim=-1).square().mean().sqrt()     # size: root mean square norm of a row
            W1 = torch.randn(m, min(r, m), generator=generator).to(x)
            self.W1.append(nn.Parameter(W1 / size if size > 0 else W1))
            self.W2.append(nn.Parameter(x.new_zeros(min(r, m), m)))
            # a vector, so AdamW does not decay it: most of a delta is in b
            self.b.append(nn.Parameter(x.new_zeros(x[0].numel()) if residual else x.mean(0).flatten()))

    def matrices(self, delta: Delta) -> list[Tensor]:
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
            for x, W1, W2, b in zip(self.matrices(delta), self.W1, self.W2, self.b, strict=True):
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
    if other := next((other for other in others if other != first), None):
        raise InputError(f"a projection needs all deltas of one kind and size, not {first} and {other}")


def learn_projection(old_base: Base, base: Base, sources: list[tuple[Delta, TaskData]], settings: TuneSettings, distill: DistillConfig, *,
                     r: int, granularity: Granularity, residual: bool, device: torch.device, precision: torch.dtype,
                     with_head: bool = False, on_step: Hook = ignore, on_eval: Hook = ignore) -> Projection:
    """A map from deltas of `old_base` to deltas of `base`, trained on the source tasks in turn: step i uses source i mod S. The loss is
    distillation without attention maps and interpolation: teacher = old base + the source's delta, student = new base + its projection.
    `with_head` requires one number of labels in all sources, and later in the target. Returns the best map by the mean dev score of the
    sources, the first entry of dev in `on_eval`. Raises InputError if deltas and bases do not fit together, Diverged like `minimise`."""
    check_sources(old_base, base, sources)
    deltas, datas, s = [delta.map(lambda _, v: v.to(device)) for delta, _ in sources], [data for _, data in sources], settings
    projection = Projection(deltas, r, granularity, residual, with_head, s.seed)
    # one skeleton for all sources: every weight it trains is replaced, and the head too, whatever its number of labels
    model, own = attach(base, deltas[0].config, 1, s.seed), {k: p.detach() for k, p in base.encoder.named_parameters()}
    students = [Reweighted(model, partial(student_weights, own, delta, projection)) for delta in deltas]
    distill = replace(distill, itp=0, **dict.fromkeys(RUN_TEACHER, 0.0))
    losses = [Loss(not data.labels, run_teacher(apply(old_base, delta), data.train, device, precision), distill)
              for delta, data in zip(deltas, datas)]
    gradients = [plain_gradient(student, loss, device, precision) for student, loss in zip(students, losses)]

    def gradient(step: int) -> Tensor:
        turn, i = divmod(step, len(sources))
        return train_step(gradients[i], datas[i].train, s, on_step, turn, place=" on projected weights", lower=", `seq_len` or `rank`")

    def dev_scores() -> dict[str, float]:
        each = [next(iter(evaluate(student, data.dev, device, precision).values())) for student, data in zip(students, datas)]
        return {"mean": None if None in each else sum(each) / len(each), **{data.name: value for data, value in zip(datas, each)}}

    result = minimise(dict(projection.named_parameters()), gradient, s, dev_scores, on_eval)
    projection.best_step, projection.dev, projection.diverged = result.best_step, result.dev, result.diverged
    return projection


# --- orders from text -------------------------------------------------------------------------------------------------

READS = {"qkv": "hidden", "attention_output": "value", "intermediate": "hidden", "output": "units"}     # inputs of a layer's matrices
WRITES = {"qkv": "qkv", "attention_output": "hidden", "intermediate": "units", "output": "hidden"}      # their outputs


@torch.no_grad()
def transport(old_base: Base, base: Base, delta: Delta, sequences: list[list[int]]) -> tuple[Delta, dict]:
    """`delta` in the order of `base`'s hidden dimensions, heads and FFN units, and facts for the record. In this order the activations
    of both bases on `sequences` (ids) agree best (Git Re-Basin: Ainsworth et al., 2023). The fact `cosine` is the mean cosine of the
    matched hidden dimensions: 1 for `old_base` in another order. InputError as in check_fits, find_orders and parts_of."""
    check_fits(old_base, delta, stale_ok=False)
    check_fits(base, delta, stale_ok=True)
    orders, cosine = find_orders(old_base.encoder, base.encoder, sequences)

    def moved(name: str, v: Tensor) -> Tensor:
        rows, layer = v.flatten(1) if v.ndim == 3 else v, re.search(r"layers\.\d+", name)     # of a prefix: (P, H, D)
        for dim, part in enumerate(parts_of(name)):
            if part:
                rows = rows.index_select(dim, orders[part if part == "hidden" else f"{layer[0]}.{part}"])
        return rows.view(v.shape)

    carried = delta.map(moved)
    carried.info |= origin(base)
    return carried, {"carried": {"texts": len(sequences), "tokens": sum(map(len, sequences)), "cosine": round(cosine, 3)}}


def parts_of(name: str) -> tuple[str, ...]:
    """For each dimension of a delta's tensor, the part of the base that it runs over: "hidden", or "units", "qkv", "query", "key", "value"
    or "heads" of its layer; "" if it is the delta's own, such as a rank. Raises InputError if the tensor is unknown."""
    match name.split("."):
        case [*_, "word" | "position" | "down", "weight"] | ["head", "dense", "weight"]:
            return "", "hidden"
        case [*_, "up", "weight"]:
            return "hidden", ""
        case [*_, module, "lora", "A", _] if module in READS:
            return "", READS[module]
        case [*_, module, "lora", "B", target] if module in WRITES:
            return target if module == "qkv" else WRITES[module], ""
        case [*_, "prefix", "k" | "v" as target]:
            return "", {"k": "key", "v": "value"}[target]
        case [*_, "prefix", "gate"]:
            return ("heads",)
        case [*_, module, "weight"] if module in READS:
            return WRITES[module], READS[module]
        case [*_, module, "bias"] if module in WRITES:
            return (WRITES[module],)
        case [*_, "second_type"] | [*_, "up", "bias"] | [*_, "norm" | "attention_norm" | "output_norm", "weight" | "bias"]:
            return ("hidden",)
        case ["head", *_] | [*_, "down", "bias"]:
            return ("",)
    raise InputError(f"the delta's tensor {name} cannot be carried to another base: what its dimensions run over is not known")


def find_orders(old: Encoder, new: Encoder, sequences: list[list[int]]) -> tuple[dict[str, Tensor], float]:
    """{part: (n,) the old dimension that matches each new one} and the mean cosine of matched hidden dimensions. Heads are matched first,
    by the best partner of each of their dimensions, then the dimensions within. Queries and keys share an order. InputError without one."""
    cosines, H, d = agreement(old, new, sequences), old.config.num_heads, old.config.hidden_size
    if not all(score.isfinite().all() for score in cosines.values()):
        raise InputError("no order can be found: hidden states of the old or the new base are not finite")
    orders = {part: assignment(score[0]) for part, score in cosines.items() if not part.endswith("qkv")}
    for layer in (part.removesuffix(".qkv") for part in cosines if part.endswith("qkv")):
        q, k, v = cosines[f"{layer}.qkv"].unflatten(2, (H, -1)).unflatten(1, (H, -1))      # (H, D, H, D) each
        heads = assignment(((q + k).amax(3) + v.amax(3)).sum(1))
        qk, v = (torch.cat([j * (d // H) + assignment(score[i, :, j]) for i, j in enumerate(heads.tolist())]) for score in (q + k, v))
        orders |= {f"{layer}.{part}": order for part, order in (("heads", heads), ("query", qk), ("key", qk), ("value", v),
                                                                ("qkv", torch.cat([qk, d + qk, 2 * d + v])))}
    return orders, cosines["hidden"][0].cpu()[torch.arange(d), orders["hidden"]].mean().item()


def agreement(old: Encoder, new: Encoder, sequences: list[list[int]]) -> dict[str, Tensor]:
    """{part: (c, n, n)}: the cosine of each new dimension with each old one over all tokens; c = 3 for queries, keys and values, else 1."""
    sums: dict[str, list[Tensor]] = {}
    for some in (sequences[i:i + 32] for i in range(0, len(sequences), 32)):
        for (part, Y), (_, X) in zip(activations(new, some), activations(old, some), strict=True):
            products = Y.mT @ X, Y.square().sum(1), X.square().sum(1)
            sums[part] = [a + b for a, b in zip(sums.get(part, [0.0] * 3), products)]
    return {part: YX / (YY[:, :, None] * XX[:, None]).sqrt().clamp_min(1e-30) for part, (YX, YY, XX) in sums.items()}


def activations(encoder: Encoder, sequences: list[list[int]]) -> list[tuple[str, Tensor]]:
    """(part, (c, N, n) fp32) for each layer norm's output, each projection to queries, keys and values, and all FFN units after GELU."""
    kept: list[tuple[str, Tensor]] = []

    def keep(part: str, c: int, _: nn.Module, inputs: tuple, output: Tensor) -> None:
        kept.append((part, (inputs[0] if part.endswith("units") else output).float().unflatten(1, (c, -1)).movedim(1, 0)))

    hooks = [m.register_forward_hook(partial(keep, "hidden", 1)) for m in encoder.modules() if isinstance(m, LayerNorm)]
    for i, layer in enumerate(encoder.layers):
        hooks += [layer.qkv.register_forward_hook(partial(keep, f"layers.{i}.qkv", 3)),
                  layer.output.register_forward_hook(partial(keep, f"layers.{i}.units", 1))]
    encoder.eval()(sequences_batch(sequences).to(encoder.embeddings.word.weight.device))
    for hook in hooks:
        hook.remove()
    return kept


def assignment(score: Tensor) -> Tensor:
    """(n,) int64: the column of each row in the one-to-one assignment of greatest total score (n, n), by shortest augmenting paths (Jonker
    & Volgenant, 1987): O(n^3), a second for n = 1536."""
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
        while j >= 0:       # every row on the path takes the column after it
            i = row_of[j] = before[j]
            column_of[i], j = j, column_of[i]
    return torch.from_numpy(column_of)
