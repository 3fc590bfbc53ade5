"""Whole tuning steps of the kinds that recycling takes, in the same process and in turns.

    python -m bench.recycle --json out.jsonl                    every case that fits into --budget seconds
    python -m bench.recycle --json out.jsonl --resume           go on where that stopped
    python -m bench.recycle --json out.jsonl --sizes small --only distill
    python -m bench.recycle --table out.jsonl                   the tables of a file again, as Markdown

Sequences are of uneven length, up to 128 tokens. Cases:
    distill     what the cached teacher costs: a step on task + KD + patience (alpha .7, beta 1, T 5) against one on the task alone,
                full and adapter, 16 and 128 sequences. Aim: at most 1.05. The teacher's own run, once a task, is not part of a step
    frozen      the kinds of delta that leave the base frozen against full tuning: time, and what must be kept in memory
    peft        LoRA (r 8, query and value) against PEFT's on RobertaForSequenceClassification with the same sequences, padded.
                PEFT has no bottleneck adapter in its library, so ours has no counterpart there

Fields of a row: bench/steps.py. On a GPU "+graphs" replays forward and backward as a CUDA graph.
"""
import sys
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from bench.roberta import (
    LABELS,
    classifier_loss,
    our_classifier,
    peer,
    peer_state,
    stand_in_base,
)
from bench.steps import Config, Impl, Problem, Step, Where, agreement, main, sizes_of
from bench.train import labelled_batch, uneven
from rt.data import Encoded
from rt.deltas import attach
from rt.kinds import KINDS, DeltaConfig
from rt.losses import Loss, run_teacher
from rt.model import Batch
from rt.runs.config import run

ALPHA, BETA, T = 0.7, 1.0, 5.0      # recycle.py's


def sequences_of(case: dict, where: Where) -> tuple[Batch, Encoded]:
    """The batch of a case on the device, and the same as a task's training examples."""
    batch = labelled_batch(where.encoder_config(case), uneven(case)).to(where.device)
    ids = [ids.tolist() for ids in batch.ids.split(batch.cu_seqlens.diff().tolist())]
    return batch, Encoded(ids, batch.labels.cpu(), truncated=0)


def with_graphs(where: Where, impls: dict[str, Callable[[bool], Step]]) -> dict[str, Impl]:
    """Each as it is and, on a GPU, as a CUDA graph; all in the product's own precision."""
    out = {name: Impl(partial(build, False), where.precision) for name, build in impls.items()}
    if where.cuda:
        out |= {f"{name} +graphs": Impl(partial(build, True), where.precision) for name, build in impls.items()}
    return out


def problem(case: dict, impls: dict[str, Impl], against: str, **facts) -> Problem:
    return Problem(impls, against, case["tokens"], {"padded_tokens": case["sequences"] * case["S"], **facts})


# ---------------------------------------------------------------- cases

def distill(case: dict, where: Where) -> Problem:
    config = where.encoder_config(case)
    batch, examples = sequences_of(case, where)
    base, delta = stand_in_base(config, seed=0).to(where.device), DeltaConfig(case["delta"])
    teacher = attach(stand_in_base(config, seed=1).to(where.device), delta, LABELS, seed=1)
    cache = run_teacher(teacher, examples, where.device, where.precision)
    del teacher

    def build(loss: Loss, graph: bool) -> Step:
        model = attach(base, delta, LABELS, seed=0)
        return Step(model, lambda: loss(model, batch), where.precision, graph)

    taught = Loss(teacher=cache, alpha=ALPHA, beta=BETA, T=T)
    return problem(case, with_graphs(where, {"plain": partial(build, Loss()), "distill": partial(build, taught)}), "plain")


def frozen(case: dict, where: Where) -> Problem:
    batch, _ = sequences_of(case, where)
    base = stand_in_base(where.encoder_config(case), seed=0).to(where.device)

    def build(kind: str, graph: bool) -> Step:
        model, loss = attach(base, DeltaConfig(kind), LABELS, seed=0), Loss()
        return Step(model, lambda: loss(model, batch), where.precision, graph)

    return problem(case, with_graphs(where, {kind: partial(build, kind) for kind in KINDS}), "full")


def peft(case: dict, where: Where) -> Problem:
    config, name = where.encoder_config(case), "RobertaForSequenceClassification"
    batch, _ = sequences_of(case, where)
    state, delta = peer_state(name, config), DeltaConfig("lora")

    def theirs() -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model  # a peer
        settings = LoraConfig(task_type="SEQ_CLS", r=delta.r, lora_alpha=delta.lora_alpha, target_modules=list(delta.target_modules),
                              lora_dropout=0.0)
        return get_peft_model(peer(name, config, "sdpa", state), settings).to(where.device)

    def our_step(graph: bool) -> Step:
        model, loss = our_classifier(config, state, delta, where.device), Loss()
        return Step(model, lambda: loss(model, batch), where.precision, graph)

    def peer_step(dtype: torch.dtype, compile: bool = False) -> Step:
        model = theirs()
        loss: Callable[[], Tensor] = classifier_loss(model, batch, config.pad_id)
        return Step(model, torch.compile(loss, dynamic=False) if compile else loss, dtype)

    impls = with_graphs(where, {"ours": our_step})
    for dtype in where.dtypes:
        label = " fp32" if dtype == torch.float32 != where.precision else ""
        impls["peft" + label] = Impl(partial(peer_step, dtype), dtype)
    if where.compile:
        impls["peft +compile"] = Impl(partial(peer_step, where.precision, True), where.precision)
    return problem(case, impls, "ours", **same_loss(our_step, theirs, batch, config.pad_id))


def same_loss(our_step: Callable[[bool], Step], theirs: Callable[[], torch.nn.Module], batch: Batch, pad_id: int) -> dict[str, float]:
    """Both losses, of fresh deltas on the same weights, in fp32 without dropout; nothing where PEFT is missing."""
    try:
        peer_loss = classifier_loss(theirs().eval(), batch, pad_id)
    except ImportError:
        return {}
    with torch.no_grad():
        return agreement(Loss()(our_step(False).model.eval(), batch).item(), peer_loss().item())


PROBLEMS = {"distill": distill, "frozen": frozen, "peft": peft}      # a function of (case, where) more is a kind of case more


def cases(c: Config, cuda: bool) -> list[dict]:
    """The most important first."""
    S, counts = (16, (4, 8)) if c.quick else (128, (16, 128))
    wanted = [(kind, delta, B) for B in counts for kind, delta in (("distill", "full"), ("distill", "adapter"), ("frozen", None),
                                                                   ("peft", None))]
    return [{"bench": "recycle", "case": kind, "size": size, **({"delta": delta} if delta else {}), "sequences": B, "tokens": B * S // 2,
             "S": S, "dropout": p}
            for size in sizes_of(c, cuda) for p in c.dropouts[:1] for kind, delta, B in wanted if kind in (c.only or PROBLEMS)]


if __name__ == "__main__":
    run(lambda: main("bench.recycle", __doc__, PROBLEMS, cases, sys.argv[1:]))
