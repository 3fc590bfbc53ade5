"""RoBERTa on unpadded batches: post-LN encoder, tied masked-LM head, classification head.

A batch has no padding: B sequences are packed into N rows, (N, d), and only embeddings, attention and heads use the sequence boundaries.
The model is exactly RoBERTa (Liu et al., 2019): learned positions start at pad_id + 1, pad tokens are not counted and all sit at pad_id,
GELU is exact, LN follows each residual. With model_type "bert" it is BERT (Devlin et al., 2019): positions start at 0 and a pair's second
text has its own token type. rt/kinds.py puts deltas into the slots `Linear.lora`, `Block.adapter_attention`, `.adapter_ffn`, `.prefix`.
"""
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import add_norm, attention_qkv, dropout, layer_norm, site_seeds


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder. `max_len` is the longest sequence in tokens, including <s> and </s>."""
    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    ffn_size: int = 1024
    max_len: int = 512
    pad_id: int = 1
    dropout: float = 0.1  # of embeddings and residuals
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    model_type: str = "roberta"  # Hugging Face's name: roberta, xlm-roberta, camembert (one function) or bert
    sep_id: int | None = None  # bert: where this id first occurs, the first text of a pair ends; None: all tokens have the first type

    @property
    def is_bert(self) -> bool:
        return self.model_type == "bert"

    @property
    def first_position(self) -> int:
        """The row of the position table for the first token of a sequence."""
        return 0 if self.is_bert else self.pad_id + 1


PRESETS = {
    "tiny": dict(hidden_size=64, num_layers=2, num_heads=2, ffn_size=128, max_len=128),
    "mini": dict(hidden_size=256, num_layers=4, num_heads=4, ffn_size=1024, max_len=512),
    "small": dict(hidden_size=512, num_layers=6, num_heads=8, ffn_size=2048, max_len=512),
    "base": dict(hidden_size=768, num_layers=12, num_heads=12, ffn_size=3072, max_len=512),
    "large": dict(hidden_size=1024, num_layers=24, num_heads=16, ffn_size=4096, max_len=512),
}


@dataclass
class Batch:
    """B packed sequences with N tokens in total. Sequence i begins at row `cu_seqlens[i]`; the last entry is N."""
    ids: Tensor                     # (N,) int64
    cu_seqlens: Tensor              # (B+1,) int32
    max_seqlen: int                 # length of the longest sequence, kept on the host: reading it never waits for the device
    labels: Tensor | None = None    # (B,) of a task: classes or floats; of a masked LM: (P,) true tokens, for rts (N,) 1, 0, -100
    index: Tensor | None = None     # (B,) indices of the examples, for the teacher cache
    predict: Tensor | None = None   # (P,) rows that the masked LM predicts; None: all N (rts)
    seeds: Tensor | None = None     # (K,) int64 dropout seeds of K runs side by side with N / K rows each; None: one is drawn
    rows: Tensor | None = None      # (B,) rows of the <s> tokens of all sequences that are not padding; None: none is padding

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, copied asynchronously."""
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)})

    @property
    def first(self) -> Tensor:
        """(B,) rows of the <s> tokens."""
        return self.cu_seqlens[:-1] if self.rows is None else self.rows


@dataclass
class Activations:
    """Values that distillation and `preserve` compare, collected while an encoder runs."""
    attention: tuple[int, ...] = ()                                     # layers whose queries and keys are collected
    rows: list[Tensor] = field(default_factory=list)                    # <s> rows of the embedding output and of all layers but the last
    qk: list[tuple[Tensor, Tensor]] = field(default_factory=list)       # (N, H, D) each
    hidden: list[Tensor] | None = None      # if a list is given, used instead of `rows`: (N, d) each, of the embedding and of every layer

    @property
    def states(self) -> Tensor:
        """`rows` as one tensor (B, num_layers, d)."""
        return torch.stack(self.rows, dim=1)

    def collect(self, x: Tensor, first: Tensor) -> Tensor:
        """Store the wanted rows of a layer's input (N, d), or all of it. Returns the tensor to use in place of `x`."""
        if self.hidden is not None:
            self.hidden.append(x)
        else:
            x, rows = SelectRows.apply(x, first)
            self.rows.append(rows)
        return x


def seeds_of(batch: Batch) -> Tensor:
    """(K,) dropout seeds of the batch, or one seed from torch's default generator if the batch has none."""
    return torch.randint(2**63 - 1, (1,), device=batch.ids.device) if batch.seeds is None else batch.seeds


def spelled(ids: Tensor) -> Tensor:
    """Token ids (N,) with every ~id as id again. rt.data writes ~id for a separator that is part of a text and separates nothing."""
    return ids.maximum(~ids)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: (N, in) -> (N, out). K runs side by side have N / K rows each, and weight (K, out, in), bias (K, out), or both."""
    if weight.ndim == 2 and (bias is None or bias.ndim == 1):
        return F.linear(x, weight, bias)
    if weight.ndim == 2:
        y = F.linear(x, weight).view(len(bias), -1, len(weight))
        return (y + bias[:, None].to(y.dtype)).flatten(0, 1)        # under autocast, y is bf16
    x = x.view(len(weight), -1, x.shape[-1])
    y = x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
    return y.view(-1, weight.shape[1])


class SelectRows(torch.autograd.Function):
    """x -> (x, x[rows]). The backward adds the gradient of x[rows] into the gradient of x. Plain indexing would need a second (N, d)."""
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), x[rows]

    @staticmethod
    def backward(ctx, dx: Tensor, drows: Tensor) -> tuple[Tensor, None]:
        return dx.index_add(0, *ctx.saved_tensors, drows), None


class Linear(nn.Linear):
    """nn.Linear, (N, in) -> (N, out), with a slot for a low-rank update. Here and below, weights may have a leading K (see `linear`)."""
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        return y if self.lora is None else self.lora(x, y)


class LayerNorm(nn.LayerNorm):
    """LN(x), or with a residual branch h: LN(x + dropout(h))."""
    def forward(self, x: Tensor, h: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        if h is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return add_norm(x, h, self.weight, self.bias, self.eps, p, seed)


class Embeddings(nn.Module):
    """Word + position, LN, dropout. The position table includes BERT's first token type; `second_type` is the second minus the first."""
    def __init__(self, config: EncoderConfig):
        super().__init__()
        d = config.hidden_size
        # not nn.Embedding(n, d): on the meta device, its normal_ imports torch._dynamo, which takes 2 seconds
        self.word, self.position = (nn.Embedding.from_pretrained(nn.init.trunc_normal_(torch.empty(n, d)), freeze=False)
                                    for n in (config.vocab_size, config.max_len + config.first_position))
        self.second_type = nn.Parameter(torch.zeros(d)) if config.is_bert else None
        self.norm = LayerNorm(d, eps=config.layer_norm_eps)
        self.dropout = config.dropout
        self.pad_id, self.sep_id = config.pad_id, config.vocab_size if config.sep_id is None else config.sep_id     # no token's id

    def forward(self, ids: Tensor, cu_seqlens: Tensor, seed: Tensor | None = None) -> Tensor:
        """(N,) and (B + 1,) -> (N, d)"""
        rows = torch.arange(len(ids), device=ids.device, dtype=cu_seqlens.dtype)
        first = cu_seqlens[torch.searchsorted(cu_seqlens, rows, right=True) - 1]    # (N,) first row of the row's sequence
        is_bert = self.second_type is not None
        counted = ids == self.sep_id if is_bert else ids != self.pad_id
        before = counted.cumsum(0) - counted.long()
        before = before - before[first]       # (N,) counted tokens before a row in its sequence
        # RoBERTa numbers the tokens that are not pads. BERT numbers all, and what follows a separator is a pair's second text
        x = self.word(spelled(ids)) + self.position(rows - first if is_bert else (before + 1) * counted + self.pad_id)
        x = x + (before > 0)[:, None] * self.second_type if is_bert else x
        return dropout(self.norm(x), self.dropout, seed)


class Block(nn.Module):
    """Attention and feed-forward, each followed by residual and LN (post-LN)."""
    def __init__(self, config: EncoderConfig):
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_heads
        self.qkv = Linear(d, 3 * d)
        self.attention_output = Linear(d, d)
        self.attention_norm = LayerNorm(d, eps=eps)
        self.intermediate = Linear(d, config.ffn_size)
        self.output = Linear(config.ffn_size, d)
        self.output_norm = LayerNorm(d, eps=eps)
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        self.adapter_attention = self.adapter_ffn = self.prefix = None     # slots: rt/kinds.py

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, seeds: Tensor | None = None, qk: list | None = None) -> Tensor:
        """(N, d) -> (N, d). `seeds` (3, K): dropout on attention map, attention output, FFN output; None: none. Appends (q, k) to `qk`."""
        N, d = x.shape
        seed_map, seed_attention, seed_output = (None,) * 3 if seeds is None else seeds
        qkv = self.qkv(x).view(N, 3, self.num_heads, d // self.num_heads)
        if qk is not None:
            qk.append((qkv[:, 0], qkv[:, 1]))
        h = attention_qkv(qkv, cu_seqlens, max_seqlen, dropout_p=0.0 if seeds is None else self.attention_dropout, seed=seed_map,
                          prefix_kv=None if self.prefix is None else self.prefix())
        h = self.attention_output(h.reshape(N, d))
        x = self.residual(self.attention_norm, self.adapter_attention, x, h, seed_attention)
        h = self.output(F.gelu(self.intermediate(x)))
        return self.residual(self.output_norm, self.adapter_ffn, x, h, seed_output)

    def residual(self, norm: LayerNorm, adapter: nn.Module | None, x: Tensor, h: Tensor, seed: Tensor | None) -> Tensor:
        """LN(x + adapter(dropout(h)))"""
        if adapter is None:
            return norm(x, h, self.dropout, seed)
        return norm(x, adapter(dropout(h, self.dropout, seed)))


class Encoder(nn.Module):
    """Token ids to contextual vectors."""
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, batch: Batch, activations: Activations | None = None) -> Tensor:
        """(N, d); fills `activations` if given. In training, `batch.seeds` determine the dropout masks."""
        seeds = site_seeds(seeds_of(batch), range(3 * len(self.layers) + 1)) if self.training else None
        x = self.embeddings(batch.ids, batch.cu_seqlens, None if seeds is None else seeds[-1])
        for i, layer in enumerate(self.layers):
            if activations is not None:
                x = activations.collect(x, batch.first)
            qk = [] if activations is not None and i in activations.attention else None     # one per layer: torch.compile sees equal layers
            x = layer(x, batch.cu_seqlens, batch.max_seqlen, None if seeds is None else seeds[3 * i:3 * i + 3], qk)
            if qk:
                activations.qk += qk
        if activations is not None and activations.hidden is not None:
            activations.hidden.append(x)
        return x


class MLMHead(nn.Module):
    """dense + GELU + LN, then logits over the vocabulary from the tied word embeddings and a bias."""
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def features(self, h: Tensor) -> Tensor:
        """(P, d) -> (P, d): the input of the tied output matrix."""
        return self.norm(F.gelu(self.dense(h)))


class MaskedLM(nn.Module):
    """A base with its pre-training head."""
    def __init__(self, encoder: Encoder, head: MLMHead):
        super().__init__()
        self.encoder, self.head = encoder, head

    def features(self, batch: Batch, activations: Activations | None = None) -> Tensor:
        """(P, d) for the rows in `batch.predict`, or (N, d) if that is None; fills `activations` if given."""
        h = self.encoder(batch, activations)
        return self.head.features(h if batch.predict is None else h.index_select(0, batch.predict))

    def forward(self, batch: Batch) -> Tensor:
        """(P, V) logits. Training does not call this: linear_cross_entropy never stores the logits."""
        return F.linear(self.features(batch), self.encoder.embeddings.word.weight, self.head.bias)


class ClassificationHead(nn.Module):
    """RoBERTa's head on the <s> row: dropout, dense, tanh, dropout, out."""
    def __init__(self, hidden_size: int, num_labels: int, dropout: float = 0.1):
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)
        self.out = Linear(hidden_size, num_labels)
        self.dropout = dropout

    def forward(self, h: Tensor, seeds: Tensor | None = None) -> Tensor:
        """(B, d) -> (B, C). `seeds` (2, K) are for the two dropouts; None: no dropout."""
        before, after = (None, None) if seeds is None else seeds
        h = dropout(torch.tanh(self.dense(dropout(h, self.dropout, before))), self.dropout, after)
        with torch.autocast(h.device.type, enabled=False):      # in bf16, outputs that are close would become equal
            return self.out(h.to(self.dense.weight.dtype))


def prototypes(f: Tensor, targets: Tensor, C: int, shrinkage: bool) -> tuple[Tensor, Tensor]:
    """A nearest-class-mean head: out.weight (C, d) = s mu_c, out.bias (C,) = -s |mu_c|^2 / 2, for features (n, d) and classes (n,) with
    means mu_c and covariance S within classes. Every class needs an example. s = tr(S) / tr(S^2), or with `shrinkage` the inverse of S
    shrunk towards a sphere (OAS: Chen et al., 2010). The mean over labels is subtracted, as bf16 rounds large logits."""
    hot = F.one_hot(targets, C).to(f)
    mu = hot.T @ f / hot.sum(0)[:, None]
    n, d, residual = max(1, len(f) - C), f.shape[1], f - mu[targets]
    S = residual.T @ residual / n
    trace, square = S.trace(), S.square().sum()
    P = torch.eye(d).to(f) * (trace / square if trace > 0 else 1.0)
    if shrinkage and trace > 0:
        rho = ((1 - 2 / d) * square + trace ** 2) / ((n + 1 - 2 / d) * (square - trace ** 2 / d))
        P = torch.linalg.inv(S.lerp(torch.eye(d).to(f) * trace / d, rho.clamp(0, 1)))
    W = mu @ P
    b = -(W * mu).sum(1) / 2
    return W - W.mean(0), b - b.mean()


class Classifier(nn.Module):
    """An encoder (with a delta's modules in its slots) and the task head."""
    def __init__(self, encoder: Encoder, head: ClassificationHead):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.register_parameter("patience_map", None)   # (num_layers, d_old, d): maps hidden states to the teacher's width; in no delta

    def forward(self, batch: Batch, activations: Activations | None = None) -> Tensor:
        """(B, C) logits; fills `activations` if given. In training, `batch.seeds` determine the dropout masks."""
        batch = replace(batch, seeds=seeds_of(batch)) if self.training else batch
        h = self.encoder(batch, activations).index_select(0, batch.first)
        if activations is not None and self.patience_map is not None:
            activations.rows = [linear(x, W) for x, W in zip(activations.rows, self.patience_map.unbind(-3), strict=True)]
        return self.head(h, site_seeds(batch.seeds, range(-2, 0)) if self.training else None)     # the encoder's sites count from 0


def init_weights(module: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """Initialise in place: normal weights with standard deviation `std`, zero biases, unit LN. For freshly built modules only."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            m.weight.data.normal_(0.0, std, generator=generator)
        if isinstance(m, nn.Linear):
            m.bias.data.zero_()


def new_masked_lm(config: EncoderConfig, seed: int) -> MaskedLM:
    """A freshly initialised base."""
    model = MaskedLM(Encoder(config), MLMHead(config))
    # RoBERTa's 0.02 at width 768, scaled. With 0.02, narrow post-LN encoders predict only word frequencies for a long time
    init_weights(model, torch.Generator().manual_seed(seed), std=0.02 * (768 / config.hidden_size) ** 0.5)
    model.encoder.embeddings.word.weight.data[config.pad_id] = 0.0      # as in RoBERTa
    return model
