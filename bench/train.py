"""Whole training steps, ours against Hugging Face transformers', in the same process and in turns.

    python -m bench.train --json out.jsonl                      every case that fits into --budget seconds
    python -m bench.train --json out.jsonl --resume             go on where that stopped
    python -m bench.train --json out.jsonl --sizes base --only ragged --dropouts 0.1
    python -m bench.train --table out.jsonl                     the tables of a file again, as Markdown

Cases. On a CPU rows are of 128 tokens, on a GPU of 512.
    dense           masked-LM pre-training. Ours: documents packed into full rows by rt.data.Rows, attention inside documents. The peer,
                    which has no such thing, gets as many tokens as full rows of one sequence; "ours one sequence a row" gets the same
    ragged          full tuning of a classifier on sequences of uneven length. Ours without padding, the peer padded to the longest,
                    which makes half of its tokens padding, with an attention mask
    ragged mlm      (GPU) the same lengths under the masked-LM loss

Implementations. `ours` is the product's model, loss and optimizer in its own precision (bf16 under autocast where the device has it);
fp32 peers are named so. "+compile": torch.compile of each block, of the peer's whole forward. "+graphs": forward and backward replayed
as a CUDA graph. "hf" has SDPA attention, fused AdamW and the same clipping; "predicted rows" applies the masked-LM head to those only,
which the library does not offer but anybody can write; "eager" is the library's other attention, on a CPU faster where weights are
dropped. Fields of a row: bench/steps.py.
"""
import sys
from functools import partial
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers import ragged_lengths
from bench.roberta import (
    LABELS,
    StandIn,
    classifier_loss,
    masked_lm_losses,
    our_classifier,
    our_masked_lm,
    peer,
    peer_state,
)
from bench.steps import Config, Impl, Problem, Step, Where, agreement, main, sizes_of
from rt.data import Corpus, Masker, Rows, sequences_batch
from rt.kinds import DeltaConfig
from rt.losses import Loss
from rt.model import Batch, EncoderConfig
from rt.pretrain import mlm_loss
from rt.runs.config import run
from rt.speed.graphs import compile_blocks
from rt.speed.throughput import step_flops

MASK_RATE = 0.3     # train.py's


# ---------------------------------------------------------------- batches

def words(config: EncoderConfig, count: int) -> np.ndarray:
    """Regular tokens, the n-th commonest with probability proportional to 1/n."""
    tokens = np.arange(5, config.vocab_size)
    weights = 1 / np.arange(1, len(tokens) + 1)
    return np.random.default_rng(0).choice(tokens, count, p=weights / weights.sum())


def packed_batch(config: EncoderConfig, tokens: int, S: int) -> Batch:
    """Full rows of documents, log-normal in length with a median of 0.4 S, as rt.data.Rows cuts, orders and masks them."""
    lengths = np.random.default_rng(1).lognormal(np.log(0.4 * S), 0.8, size=40 * tokens // S).astype(int).clip(4)
    corpus = Corpus("random", "train", words(config, lengths.sum()), np.cumsum([0, *lengths]))
    return Rows(corpus, StandIn(config.vocab_size), seq_len=S, mask_rate=MASK_RATE, seed=0).batch(0, tokens)


def masked_batch(config: EncoderConfig, lengths: list[int]) -> Batch:
    """Sequences of these lengths, masked."""
    ids = words(config, sum(lengths))
    starts = np.cumsum([0, *lengths])
    ids[starts[:-1]], ids[starts[1:] - 1] = StandIn.bos_id, StandIn.eos_id
    masked, rows, true = Masker(StandIn(config.vocab_size), round(MASK_RATE * len(ids)))(ids, np.random.default_rng(2))
    return sequences_batch([s.tolist() for s in np.split(masked, starts[1:-1])], labels=torch.from_numpy(true),
                           predict=torch.from_numpy(rows))


def labelled_batch(config: EncoderConfig, lengths: list[int]) -> Batch:
    """Sequences of these lengths with a label and a number each."""
    sequences = [[StandIn.bos_id, *s[2:].tolist(), StandIn.eos_id]
                 for s in np.split(words(config, sum(lengths)), np.cumsum(lengths)[:-1])]
    labels = torch.randint(LABELS, (len(lengths),), generator=torch.Generator().manual_seed(3))
    return sequences_batch(sequences, labels=labels, index=torch.arange(len(lengths)))


def uneven(case: dict) -> list[int]:
    """Lengths in order, as rt.tasks.Encoded and rt.data.Rows have them; half of (B, S) would be padding. None is below 2."""
    lengths = [max(2, n) for n in ragged_lengths(case["tokens"], case["S"])]
    lengths[lengths.index(max(n for n in lengths if n < case["S"]))] -= sum(lengths) - case["tokens"]
    return sorted(lengths)


# ---------------------------------------------------------------- implementations

def ours(where: Where, build: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], flops: float) -> dict[str, Impl]:
    """The product's step by `build`, which makes a model on the device and the function that runs it to its loss."""
    def step(precision: torch.dtype, compile: bool = False, graph: bool = False) -> Step:
        model, loss = build()
        if compile:
            compile_blocks(model.encoder.layers, where.device)
        return Step(model, loss, precision, graph)

    out = {"ours": Impl(lambda: step(where.precision), where.precision, flops)}
    if where.compile:
        out["ours +compile"] = Impl(lambda: step(where.precision, compile=True), where.precision, flops)
    if where.cuda:
        out["ours +graphs"] = Impl(lambda: step(where.precision, graph=True), where.precision, flops)
        out["ours +compile +graphs"] = Impl(lambda: step(where.precision, compile=True, graph=True), where.precision, flops)
    elif where.fast:
        out["ours fp32"] = Impl(lambda: step(torch.float32), torch.float32, flops)
    return out


def peers(where: Where, config: EncoderConfig, state: dict[str, Tensor] | None, name: str, losses: Callable[[nn.Module], dict],
          flops: float) -> dict[str, Impl]:
    """transformers' step: with each of `losses` (of a model on the device: {suffix: function}), attention and dtype worth having."""
    def step(suffix: str, dtype: torch.dtype, attention: str = "sdpa", compile: bool = False) -> Step:
        model = peer(name, config, attention, state).to(where.device)
        loss = losses(model)[suffix]
        return Step(model, torch.compile(loss, dynamic=False) if compile else loss, dtype)

    suffixes = ("", " predicted rows") if name == "RobertaForMaskedLM" else ("",)
    out: dict[str, Impl] = {}

    def offer(label: str, dtype: torch.dtype, *more) -> None:
        for suffix in suffixes:
            out[f"hf{suffix}{label}"] = Impl(partial(step, suffix, dtype, *more), dtype, flops)

    for dtype in where.dtypes:
        label = " fp32" if dtype == torch.float32 != where.precision else ""
        offer(label, dtype)
        if not where.cuda and config.dropout and dtype == where.precision:
            out["hf eager" + label] = Impl(partial(step, "", dtype, "eager"), dtype, flops)
        if where.compile and dtype == where.precision:
            offer(label + " +compile", dtype, "sdpa", True)
    return out


def masked_lm(where: Where, config: EncoderConfig, batches: dict[str, Batch], same: Batch) -> tuple[dict[str, Impl], dict]:
    """Implementations of the masked-LM step: ours on each of `batches` (name: batch), the peer on `same`; and the losses of both on it."""
    state = peer_state("RobertaForMaskedLM", config)
    same = same.to(where.device)
    impls: dict[str, Impl] = {}

    def build(batch: Batch):
        model = our_masked_lm(config, state).to(where.device)
        return model, lambda: mlm_loss(model, batch)

    def flops(batch: Batch) -> float:
        return step_flops(config, batch.cu_seqlens.diff().tolist(), predicted=len(batch.labels))

    for name, batch in batches.items():
        batch = batch.to(where.device)
        found = ours(where, partial(build, batch), flops(batch))
        impls |= found if name == "ours" else {name: found["ours"]}
    impls |= peers(where, config, state, "RobertaForMaskedLM", lambda model: masked_lm_losses(model, same, config.pad_id), flops(same))
    if state is None:
        return impls, {}
    with torch.no_grad():
        mine = mlm_loss(our_masked_lm(config, state).to(where.device).eval(), same).item()
        theirs = [f().item() for f in masked_lm_losses(peer("RobertaForMaskedLM", config, "sdpa", state).to(where.device).eval(), same,
                                                       config.pad_id).values()]
    agreement(theirs[1], theirs[0])
    return impls, agreement(mine, theirs[0])


# ---------------------------------------------------------------- cases

def dense(case: dict, where: Where) -> Problem:
    config = where.encoder_config(case)
    one = masked_batch(config, [case["S"]] * (case["tokens"] // case["S"]))
    packed = packed_batch(config, case["tokens"], case["S"])
    impls, facts = masked_lm(where, config, {"ours": packed, "ours one sequence a row": one}, one)
    return Problem(impls, "ours", case["tokens"], facts | {"padded_tokens": case["tokens"], "sequences": len(packed.cu_seqlens) - 1,
                                                           "predicted": len(packed.labels), "vocab": config.vocab_size})


def ragged_mlm(case: dict, where: Where) -> Problem:
    config, lengths = where.encoder_config(case), uneven(case)
    batch = masked_batch(config, lengths)
    impls, facts = masked_lm(where, config, {"ours": batch}, batch)
    return Problem(impls, "ours", case["tokens"], facts | {"padded_tokens": len(lengths) * max(lengths), "sequences": len(lengths),
                                                           "predicted": len(batch.labels), "vocab": config.vocab_size})


def ragged(case: dict, where: Where) -> Problem:
    config, lengths = where.encoder_config(case), uneven(case)
    batch = labelled_batch(config, lengths).to(where.device)
    state = peer_state("RobertaForSequenceClassification", config)
    flops = step_flops(config, lengths)

    def build():
        model, loss = our_classifier(config, state, DeltaConfig("full"), where.device), Loss()
        return model, lambda: loss(model, batch)

    impls = ours(where, build, flops) | peers(where, config, state, "RobertaForSequenceClassification",
                                              lambda model: {"": classifier_loss(model, batch, config.pad_id)}, flops)
    facts = {"padded_tokens": len(lengths) * max(lengths), "sequences": len(lengths), "vocab": config.vocab_size}
    if state is not None:
        with torch.no_grad():
            mine = Loss()(our_classifier(config, state, DeltaConfig("full"), where.device).eval(), batch).item()
            theirs = peer("RobertaForSequenceClassification", config, "sdpa", state).to(where.device).eval()
            facts |= agreement(mine, classifier_loss(theirs, batch, config.pad_id)().item())
    return Problem(impls, "ours", case["tokens"], facts)


PROBLEMS = {"dense": dense, "ragged": ragged, "ragged mlm": ragged_mlm}


def cases(c: Config, cuda: bool) -> list[dict]:
    """The most important first: large batches and every dropout of the first size, then of the next."""
    S = 32 if c.quick else 512 if cuda else 128
    tokens = {"dense": (256,) if c.quick else (16384, 32768) if cuda else (1024,),
              "ragged": (128,) if c.quick else (16384, 4096) if cuda else (1024, 2048),
              "ragged mlm": (16384,) if cuda and not c.quick else ()}
    kinds = c.only or tuple(PROBLEMS)
    found = [{"bench": "train", "case": kind, "size": size, "tokens": tokens[kind][n], "S": S, "dropout": p}
             for n in range(2) for size in sizes_of(c, cuda) for kind in kinds for p in c.dropouts if n < len(tokens[kind])]
    return found


if __name__ == "__main__":
    run(lambda: main("bench.train", __doc__, PROBLEMS, cases, sys.argv[1:]))
