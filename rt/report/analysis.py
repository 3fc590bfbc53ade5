"""Paths between tuned models, and the similarity of two tuned models' heads, hidden states and weights.

    linear    theta(mu) = (1 - mu) a + mu b, base and delta interpolated together
    bezier    theta(mu) = (1 - mu)^2 a + 2 mu (1 - mu) control + mu^2 b, a quadratic curve; its control point is trained to keep the task's
              loss low along the curve (Garipov et al., 2018; the paper's public code)
    barrier   the maximum height of a path's loss above the straight line between the losses at its ends

Attention heads are compared by the Jensen-Shannon divergence of their maps (without a prefix's keys), hidden states by CKA, weights by
distance. Head h of layer l has the number l * H + h.
"""
import math
from functools import partial
from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.special import entr

from rt.data import Encoded, TaskData, sequences_batch
from rt.losses import Loss, Reweighted, Weights, lerp, task_loss
from rt.model import Activations, Classifier
from rt.tune import Hook, TuneSettings, ignore, metrics, minimise, plain_gradient, predict, train_step

Path = Callable[[float], Weights]


def linear(a: Weights, b: Weights) -> Path:
    return lambda mu: lerp(a, b, mu)


def bezier(a: Weights, control: Weights, b: Weights) -> Path:
    """Weights that `control` lacks are equal at both ends, and stay constant."""
    return lambda mu: {k: (1 - mu) ** 2 * a[k] + 2 * mu * (1 - mu) * control[k] + mu ** 2 * b[k] if k in control else b[k] for k in b}


def walk(model: Classifier, path: Path, points: Iterable[float], data: Encoded, device: torch.device,
         precision: torch.dtype) -> Iterator[dict]:
    """One row {'mu', 'loss', metrics...} per point, for `model` with the path's weights there on `data`; loss in nats."""
    for mu in points:
        weights = path(mu)
        logits = predict(Reweighted(model, lambda: weights), data.sequences, device, precision)
        loss = task_loss(logits, data.targets, data.targets.is_floating_point()).mean().item()
        yield {"mu": mu, "loss": loss, **metrics(logits, data.targets)}


def barrier(rows: Sequence[dict]) -> float:
    """The barrier of a walk's rows, in nats: 0 or more; NaN if a loss is not a number."""
    mu, loss = torch.tensor([(row["mu"], row["loss"]) for row in rows], dtype=torch.float64).T
    share = (mu - mu[0]) / (mu[-1] - mu[0])
    return (loss - (1 - share) * loss[0] - share * loss[-1]).clamp_min(0.0).max().item()    # NaN stays NaN


def train_control(model: Classifier, a: Weights, b: Weights, data: TaskData, settings: TuneSettings, device: torch.device,
                  precision: torch.dtype, on_step: Hook = ignore) -> Weights:
    """The control point of the curve from `a` to `b`. It starts in the middle, trained on the task's loss at one mu ~ U(0, 1) per step.
    It holds only the weights that differ between the ends. Raises Diverged as rt.tune.minimise does."""
    control = {k: v.clone().requires_grad_() for k, v in lerp(a, b, 0.5).items() if not torch.equal(a[k], b[k])}
    if not control:
        return {}       # equal ends: there is no path to train
    path = bezier(a, control, b)
    student = Reweighted(model, lambda: path(torch.rand(()).item()))       # mu: the loop seeds it by (seed, step)
    gradient = plain_gradient(student, Loss(not data.labels), device, precision)
    minimise(control, partial(train_step, gradient, data.train, settings, on_step, place=" on the curve"), settings, lambda: None)
    return {k: v.detach() for k, v in control.items()}


@torch.no_grad()
def run_layers(model: Classifier, sequences: list[list[int]], device: torch.device) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(hidden states (L+1, N, d): embedding output and every layer; queries and keys (N, H, D) per layer)."""
    batch, kept = sequences_batch(sequences).to(device), Activations(tuple(range(len(model.encoder.layers))), hidden=[])
    model.eval().encoder(batch, kept)
    return torch.stack(kept.hidden).float(), kept.qk


def attention_maps(model: Classifier, sequence: list[int], device: torch.device) -> Tensor:
    """(L, H, n, n) fp32, without dropout. Row i is the attention distribution of token i."""
    _, qk = run_layers(model, [sequence], device)
    return torch.stack([torch.einsum("ihd,jhd->hij", q.float(), k.float()).div(math.sqrt(q.shape[-1])).softmax(-1) for q, k in qk])


def head_divergence(a: Classifier, b: Classifier, sequences: list[list[int]], device: torch.device) -> Tensor:
    """(heads of a, heads of b): Jensen-Shannon divergence between their attention maps, in nats, 0 to ln 2; the mean over all query tokens
    of `sequences`. Memory: a few times the maps of all heads on one sequence."""
    total, rows = 0.0, 0
    for sequence in sequences:
        P, Q = (attention_maps(model, sequence, device).flatten(0, 1) for model in (a, b))     # (L H, n, n)
        own, other = entr(P).sum(-1), entr(Q).sum(-1)                                          # (L H, n)
        pairs = [entr((p + Q) / 2).sum(-1) - (h + other) / 2 for p, h in zip(P, own)]
        total = total + torch.stack(pairs).sum(-1).double()
        rows += len(sequence)
    return (total / rows).clamp_min(0).float().cpu()


def match_summary(matrix: Tensor) -> dict:
    """Summary of a head_divergence matrix: mean divergence to the same head ('own'), to the best match among other heads ('best_other') and
    among all heads ('best'), and the share of heads that match themselves best ('share_own_best')."""
    own, others = matrix.diagonal(), matrix.clone().fill_diagonal_(math.inf).amin(1)
    return {"own": own.mean().item(), "best_other": others.mean().item(), "best": matrix.amin(1).mean().item(),
            "share_own_best": (own < others).double().where(~(own + others).isnan(), math.nan).mean().item()}


def cka(a: Classifier, b: Classifier, sequences: list[list[int]], device: torch.device) -> Tensor:
    """(L_a + 1, L_b + 1): linear CKA of hidden states over all tokens, for embedding output and layers, 0 to 1 (Kornblith et al., 2019)."""
    X, Y = (states - states.mean(1, keepdim=True) for states, _ in (run_layers(m, sequences, device) for m in (a, b)))
    own_x, own_y = ([torch.norm(z.T @ z) for z in Z] for Z in (X, Y))
    return torch.stack([torch.stack([torch.norm(x.T @ y) ** 2 / (nx * ny) for y, ny in zip(Y, own_y)]) for x, nx in zip(X, own_x)]).cpu()


def distances(a: Weights, b: Weights) -> list[dict]:
    """A row each for embeddings, layers, head and all weights that both have: 'l2' of b - a, 'l2_per_weight' (RMS), 'cosine', 'weights'."""
    rows, parts = [], {"all": [name for name in a if name in b]}
    for name in parts["all"]:
        parts.setdefault(part_of(name), []).append(name)
    for part in sorted(parts, key=lambda part: (part == "all", part != "embeddings", part == "head", len(part), part)):
        x, y = (torch.cat([w[k].detach().double().flatten().cpu() for k in parts[part]]) for w in (a, b))
        l2, norms = (y - x).norm().item(), (x.norm() * y.norm()).item()
        rows.append({"part": part, "l2": l2, "l2_per_weight": l2 / math.sqrt(len(x)), "cosine": (x @ y).item() / norms if norms else 0.0,
                     "weights": len(x)})
    return rows


def part_of(name: str) -> str:
    """'embeddings', 'layers.3' or 'head', from a parameter's name."""
    words = name.removeprefix("encoder.").split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def chance(data: TaskData) -> dict[str, float]:
    """Baselines that read no text: always the commonest training label, scored on test (else dev); guessing ('uniform'); regression: 0."""
    if not data.labels:
        return {"pearson": 0.0, "spearman": 0.0}
    commonest = data.train.targets.bincount().argmax()
    return {"accuracy": ((data.test or data.dev).targets == commonest).float().mean().item(), "uniform": 1 / len(data.labels)}
