"""Whole training steps, ours against Hugging Face transformers', in the same process and in turns.

    python -m bench.train --json out.jsonl                      every case that fits into --budget seconds
    python -m bench.train --json out.jsonl --resume             continue where that stopped
    python -m bench.train --json out.jsonl --sizes base --only ragged --dropouts 0.1
    python -m bench.train --table out.jsonl                     print the tables of a file again, as Markdown

Cases. Rows have 128 tokens on a CPU and 512 on a GPU.
    dense           masked-LM pre-training. Ours: documents packed into full rows by rt.data.Rows, attention inside documents. The peer has
                    no packing and gets as many tokens in full rows of one sequence; "ours one sequence a row" gets these rows too
    ragged          full tuning of a classifier on sequences of uneven length. Ours has no padding. The peer is padded to the longest
                    sequence, with an attention mask; half of its tokens are padding
    ragged mlm      (GPU) the same lengths under the masked-LM loss

Implementations. `ours` is the product's model, loss and optimizer in its own precision (bf16 under autocast if the device has it);
fp32 peers are named so. "+compile": torch.compile of each block, or of the peer's whole forward. "+graphs": forward and backward replayed
as a CUDA graph, the peer's as well as ours. "hf" has SDPA attention, fused AdamW and the same clipping. "predicted rows" applies the
masked-LM head to those rows only; the library does not offer this, but anybody can write it. "eager" is the library's other attention,
which is faster on a CPU if weights are dropped. Fields of a row: bench/steps.py.
"""
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Callable, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers import ragged_lengths
from bench.roberta import LABELS, StandIn, classifier_loss, masked_lm_losses, our_classifier, our_masked_lm, peer, peer_state
from bench.runner import RunFlags
from bench.steps import Impl, Platform, Problem, Step, StepFlags, agreement, main, sizes_of
from rt.data import Corpus, Masker, Rows, sequences_batch
from rt.kinds import DeltaConfig
from rt.losses import Loss
from rt.model import Batch, EncoderConfig
from rt.pretrain import mlm_loss
from rt.runs.config import run
from rt.speed.graphs import compiled
from rt.speed.throughput import step_flops

MASK_RATE = 0.3     # train.py's


@dataclass
class Config:
    only: tuple[Literal["dense", "ragged", "ragged mlm"], ...] = ()  # kinds of cases; default: all
    run: RunFlags = RunFlags()
    steps: StepFlags = StepFlags()


Config.__doc__ = __doc__


# ---------------------------------------------------------------- batches

def words(config: EncoderConfig, count: int) -> np.ndarray:
    """Regular tokens; the n-th commonest has a probability proportional to 1/n."""
    tokens = np.arange(5, config.vocab_size)
    weights = 1 / np.arange(1, len(tokens) + 1)
    return np.random.default_rng(0).choice(tokens, count, p=weights / weights.sum())


def packed_batch(config: EncoderConfig, tokens: int, S: int) -> Batch:
    """Full rows of documents as rt.data.Rows cuts, orders and masks them; their lengths are log-normal with a median of 0.4 S."""
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
    """Sequences of these lengths, each with a label and a number."""
    sequences = [[StandIn.bos_id, *s[2:].tolist(), StandIn.eos_id]
                 for s in np.split(words(config, sum(lengths)), np.cumsum(lengths)[:-1])]
    labels = torch.randint(LABELS, (len(lengths),), generator=torch.Generator().manual_seed(3))
    return sequences_batch(sequences, labels=labels, index=torch.arange(len(lengths)))


def uneven(case: dict) -> list[int]:
    """Sorted lengths, as in tasks and corpora; half of (B, S) would be padding."""
    return sorted(ragged_lengths(case["tokens"], case["S"]))


# ---------------------------------------------------------------- implementations

def ours(platform: Platform, build: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], flops: float) -> dict[str, Impl]:
    """The product's step. `build` makes a model on the device and the function that computes its loss."""
    def step(precision: torch.dtype, compile: bool, graph: bool) -> Step:
        model, loss = build()
        blocks = compiled(model.encoder.layers, platform.device) if compile else nullcontext()
        blocks.__enter__()      # left when the step is dropped
        step = Step(model, loss, precision, graph)
        step.blocks = blocks
        return step

    out = {}
    for graph in (False, True) if platform.cuda else (False,):
        for compile in (False, True) if platform.compile else (False,):
            name = "ours" + " +compile" * compile + " +graphs" * graph
            out[name] = Impl(partial(step, platform.precision, compile, graph), platform.precision, flops)
    if platform.fast and not platform.cuda:
        out["ours fp32"] = Impl(partial(step, torch.float32, False, False), torch.float32, flops)
    return out


def peers(platform: Platform, name: str, build: Callable[[str], nn.Module], losses: Callable[[nn.Module], dict[str, Callable[[], Tensor]]],
          flops: float | None = None, suffixes: tuple[str, ...] = ("",), dropout: float = 0.0) -> dict[str, Impl]:
    """A library's step, in each dtype worth having. `build` makes a model with an attention ("sdpa", "eager"). `losses` returns the model's
    loss functions by suffix of the name. On a CPU with `dropout`, also the library's own attention, which may then be faster."""
    def step(suffix: str, dtype: torch.dtype, attention: str = "sdpa", compile: bool = False, graph: bool = False) -> Step:
        model = build(attention).to(platform.device)
        loss = losses(model)[suffix]
        return Step(model, torch.compile(loss, dynamic=False) if compile else loss, dtype, graph)

    out: dict[str, Impl] = {}
    for dtype in platform.dtypes:
        own = dtype == platform.precision
        for graph in (False, True) if own and platform.cuda else (False,):
            for compile in (False, True) if own and platform.compile else (False,):
                out |= {f"{name}{suffix}" + " +compile" * compile + " +graphs" * graph + " fp32" * (not own): Impl(
                    partial(step, suffix, dtype, compile=compile, graph=graph), dtype, flops) for suffix in suffixes}
        out |= {f"{name}{suffix} eager" + " fp32" * (not own): Impl(partial(step, suffix, dtype, "eager"), dtype, flops)
                for suffix in suffixes if dropout and not platform.cuda}
    return out


def transformers_peers(platform: Platform, config: EncoderConfig, state: dict[str, Tensor] | None, name: str,
                       losses: Callable[[nn.Module], dict], flops: float) -> dict[str, Impl]:
    """RobertaForMaskedLM or RobertaForSequenceClassification with the weights of `state`."""
    suffixes = ("", " predicted rows") if name == "RobertaForMaskedLM" else ("",)
    return peers(platform, "hf", lambda attention: peer(name, config, attention, state), losses, flops, suffixes, config.dropout)


# ---------------------------------------------------------------- cases

def masked_lm(case: dict, platform: Platform) -> Problem:
    """The masked-LM step: ours on packed documents in the dense case, all others on one sequence per row."""
    config, name = platform.encoder_config(case), "RobertaForMaskedLM"
    dense = case["case"] == "dense"
    lengths = [case["S"]] * (case["tokens"] // case["S"]) if dense else uneven(case)
    same = masked_batch(config, lengths).to(platform.device)
    batches = {"ours": packed_batch(config, case["tokens"], case["S"]), "ours one sequence a row": same} if dense else {"ours": same}
    state = peer_state(name, config)

    def build(batch: Batch) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = our_masked_lm(config, state).to(platform.device)
        return model, lambda: mlm_loss(model, batch)

    def flops(batch: Batch) -> float:
        return step_flops(config, batch.cu_seqlens.diff().tolist(), predicted=len(batch.labels))

    def losses(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
        return masked_lm_losses(model, same, config.pad_id)

    impls: dict[str, Impl] = {}
    for called, batch in batches.items():
        found = ours(platform, partial(build, batch.to(platform.device)), flops(batch))
        impls |= found if called == "ours" else {called: found["ours"]}
    impls |= transformers_peers(platform, config, state, name, losses, flops(same))
    facts = {"padded_tokens": len(lengths) * max(lengths), "sequences": len(batches["ours"].cu_seqlens) - 1,
             "predicted": len(batches["ours"].labels), "vocab": config.vocab_size}
    if state is not None:
        with torch.no_grad():
            mine = mlm_loss(our_masked_lm(config, state).to(platform.device).eval(), same).item()
            full, predicted = (f().item() for f in losses(peer(name, config, "sdpa", state).to(platform.device).eval()).values())
        agreement(predicted, full)
        facts |= agreement(mine, full)
    return Problem(impls, case["tokens"], facts=facts)


def ragged(case: dict, platform: Platform) -> Problem:
    """Full tuning of a classifier on sequences of uneven length."""
    config, name, lengths = platform.encoder_config(case), "RobertaForSequenceClassification", uneven(case)
    batch = labelled_batch(config, lengths).to(platform.device)
    state, flops, full = peer_state(name, config), step_flops(config, lengths), DeltaConfig("full")

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        model, loss = our_classifier(config, state, full, platform.device), Loss()
        return model, lambda: loss(model, batch)

    impls = ours(platform, build, flops) | transformers_peers(platform, config, state, name,
                                                           lambda model: {"": classifier_loss(model, batch, config.pad_id)}, flops)
    facts = {"padded_tokens": len(lengths) * max(lengths), "sequences": len(lengths), "vocab": config.vocab_size}
    if state is not None:
        with torch.no_grad():
            mine = Loss()(our_classifier(config, state, full, platform.device).eval(), batch).item()
            theirs = peer(name, config, "sdpa", state).to(platform.device).eval()
            facts |= agreement(mine, classifier_loss(theirs, batch, config.pad_id)().item())
    return Problem(impls, case["tokens"], facts=facts)


PROBLEMS = {"dense": masked_lm, "ragged": ragged, "ragged mlm": masked_lm}


def cases(c: Config, cuda: bool) -> list[dict]:
    """Most important first: large batches and every dropout of the first size, then of the next."""
    quick = c.run.quick
    S = 32 if quick else 512 if cuda else 128
    tokens = {"dense": (256,) if quick else (16384, 32768) if cuda else (1024,),
              "ragged": (128,) if quick else (16384, 4096) if cuda else (1024, 2048),
              "ragged mlm": (16384,) if cuda and not quick else ()}
    return [{"bench": "train", "case": kind, "size": size, "tokens": tokens[kind][n], "S": S, "dropout": p}
            for n in range(2) for size in sizes_of(c, cuda) for kind in c.only or PROBLEMS if n < len(tokens[kind])
            for p in c.steps.dropouts]


if __name__ == "__main__":
    run(lambda: main(Config, "bench.train", PROBLEMS, cases, sys.argv[1:]))
