"""A base with the same function but no shared coordinates: heads, dimensions within heads, FFN units and hidden dimensions are in another
order. An old delta is worth nothing on this base until the order is found again."""
import copy
from pathlib import Path

import torch
from torch import Tensor

from rt.deltas import Base
from rt.formats.checkpoint import fingerprint, save_base
from rt.formats.hub import open_base
from rt.model import MaskedLM


def permuted_twin(base: Base, seed: int) -> Base:
    """A copy of `base` (RoBERTa or BERT) that computes the same function. Its masked-LM head, its pooler and any task head that reads <s>
    in the new order get the same values as before."""
    g, c = torch.Generator().manual_seed(seed), base.encoder.config
    encoder, head = copy.deepcopy((base.encoder, base.head))
    D, hidden = c.hidden_size // c.num_heads, torch.randperm(c.hidden_size, generator=g)

    def order(p: Tensor, *orders: Tensor | None) -> None:
        """Put the dimensions of `p` in these orders; None leaves a dimension as it is."""
        for dim, index in enumerate(orders):
            if index is not None:
                p.data = p.data.index_select(dim, index.to(p.device)).contiguous()

    for norm in [encoder.embeddings.norm] + [n for layer in encoder.layers for n in (layer.attention_norm, layer.output_norm)]:
        order(norm.weight, hidden)
        order(norm.bias, hidden)
    order(encoder.embeddings.word.weight, None, hidden)
    order(encoder.embeddings.position.weight, None, hidden)
    if encoder.embeddings.second_type is not None:
        order(encoder.embeddings.second_type, hidden)
    for layer in encoder.layers:
        heads, units = torch.randperm(c.num_heads, generator=g), torch.randperm(c.ffn_size, generator=g)
        qk, v = ([torch.randperm(D, generator=g) for _ in heads] for _ in range(2))
        qk, v = (torch.cat([h * D + inner for h, inner in zip(heads.tolist(), inners)]) for inners in (qk, v))
        for linear, rows, columns in ((layer.qkv, torch.cat([qk, c.hidden_size + qk, 2 * c.hidden_size + v]), hidden),
                                      (layer.attention_output, hidden, v), (layer.intermediate, units, hidden),
                                      (layer.output, hidden, units)):
            order(linear.weight, rows, columns)
            order(linear.bias, rows)
    if head is not None:
        order(head.dense.weight, hidden, hidden)
        for p in (head.dense.bias, head.norm.weight, head.norm.bias):
            order(p, hidden)
    pooler = base.pooler and {**base.pooler, "dense.weight": base.pooler["dense.weight"][:, hidden]}
    return Base(encoder, head, base.tokenizer, {**base.meta, "name": f"{base.meta.get('name')}-twin{seed}"}, fingerprint(encoder), pooler)


def save_twin(base: str | Path, out: Path) -> None:
    """Write the twin of seed 1 of the base in folder `base`."""
    twin = permuted_twin(open_base(base), 1)
    save_base(out, MaskedLM(twin.encoder, twin.head), twin.tokenizer, {"name": "twin"})
