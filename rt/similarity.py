"""How alike two tuned models are inside (README, The method: studies 3 and 4): attention maps head by head, hidden states, weights.

Heads are numbered layer by layer: head h of layer l is l * H + h. A prefix's keys are left out of the maps: they have no
counterpart in the sentence.
"""
import math

import torch
from torch import Tensor

from rt.data import sequences_batch
from rt.functional import Weights
from rt.model import Classifier


@torch.no_grad()
def run_layers(model: Classifier, sequences: list[list[int]], device: torch.device) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """(hidden states (L+1, N, d) of embedding output and every layer, queries and keys (N, H, D) of each layer, cu_seqlens)."""
    batch, encoder = sequences_batch(sequences).to(device), model.eval().encoder
    x, states, qk = encoder.embeddings(batch.ids, batch.cu_seqlens), [], []
    states.append(x)
    for layer in encoder.layers:
        x = layer(x, batch.cu_seqlens, batch.max_seqlen, qk=qk)
        states.append(x)
    return torch.stack(states).float(), qk, batch.cu_seqlens


def attention_maps(model: Classifier, sequence: list[int], device: torch.device) -> Tensor:
    """(L, H, n, n) fp32: row i is what token i attends to, without dropout."""
    _, qk, _ = run_layers(model, [sequence], device)
    return torch.stack([torch.einsum("ihd,jhd->hij", q.float(), k.float()).div(math.sqrt(q.shape[-1])).softmax(-1) for q, k in qk])


def head_divergence(a: Classifier, b: Classifier, sequences: list[list[int]], device: torch.device) -> Tensor:
    """(heads of a, heads of b): Jensen-Shannon divergence between their attention maps in nats, 0 to ln 2, mean over all query
    tokens of `sequences`. Memory: a few maps of all heads of one sequence."""
    total, rows = 0.0, 0
    for sequence in sequences:
        P, Q = (attention_maps(model, sequence, device).flatten(0, 1) for model in (a, b))     # (L H, n, n)
        own, other = entropy(P), entropy(Q)                                                    # (L H, n)
        pairs = [entropy((p + Q) / 2) - (h + other) / 2 for p, h in zip(P, own)]
        total = total + torch.stack(pairs).sum(-1).double()
        rows += len(sequence)
    return (total / rows).clamp_min(0).float().cpu()


def entropy(p: Tensor) -> Tensor:
    """Of the last dimension, in nats."""
    return torch.special.entr(p).sum(-1)


def match_summary(matrix: Tensor) -> dict:
    """Of a matrix of head_divergence: 'own', mean divergence to the same head; 'best_other', to the best match among all others;
    'best', to the best of all; 'share_own_best', share of heads whose best match is themselves."""
    own, others = matrix.diagonal(), matrix.clone().fill_diagonal_(math.inf).amin(1)
    return {"own": own.mean().item(), "best_other": others.mean().item(), "best": matrix.amin(1).mean().item(),
            "share_own_best": (own < others).double().mean().item()}


def cka(a: Classifier, b: Classifier, sequences: list[list[int]], device: torch.device) -> Tensor:
    """(L_a + 1, L_b + 1) linear centred kernel alignment of the hidden states of all tokens (Kornblith et al., 2019), 0 to 1:
    embedding output and every layer of `a` against those of `b`."""
    X, Y = (states - states.mean(1, keepdim=True) for states, _, _ in (run_layers(m, sequences, device) for m in (a, b)))

    def product(x: Tensor, y: Tensor) -> Tensor:
        return (x.T @ y).square().sum()

    own_x, own_y = ([product(z, z).sqrt() for z in Z] for Z in (X, Y))
    return torch.stack([torch.stack([product(x, y) / (nx * ny) for y, ny in zip(Y, own_y)]) for x, nx in zip(X, own_x)]).cpu()


def distances(a: Weights, b: Weights) -> list[dict]:
    """A row for embeddings, each layer, the rest (head) and all: 'l2' of b - a, 'l2_per_weight' (root mean square), 'cosine' of a
    and b, and how many weights. Only what both have takes part."""
    parts: dict[str, list[str]] = {}
    for name in sorted(a.keys() & b.keys()):
        parts.setdefault(part_of(name), []).append(name)
    rows = []
    parts = {part: parts[part] for part in sorted(parts, key=lambda part: (part != "embeddings", part == "head", len(part), part))}
    for part, names in (parts | {"all": sum(parts.values(), [])}).items():
        x, y = (torch.cat([w[k].detach().double().flatten().cpu() for k in names]) for w in (a, b))
        norm = x.norm() * y.norm()
        rows.append({"part": part, "l2": (y - x).norm().item(), "l2_per_weight": ((y - x).norm() / math.sqrt(len(x))).item(),
                     "cosine": (x @ y / norm).item() if norm else 0.0, "weights": len(x)})
    return rows


def part_of(name: str) -> str:
    """'embeddings', 'layers.3' or 'head', from a parameter's name."""
    words = name.removeprefix("encoder.").split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]
