"""Whole tuning steps of the kinds that recycling uses, in the same process and in turns.

    python -m bench.recycle --json out.jsonl                    every case that fits into --budget seconds
    python -m bench.recycle --json out.jsonl --resume           continue where that stopped
    python -m bench.recycle --json out.jsonl --sizes small --only distill
    python -m bench.recycle --table out.jsonl                   print the tables of a file again, as Markdown

Sequences have uneven lengths, up to 128 tokens. Cases:
    distill     the cost of the cached teacher: a step on task + KD + patience (alpha .7, beta 1, T 5) against a step on the task alone,
                full and adapter, 16 and 128 sequences. Aim: at most 1.05. The teacher's own run, once per task, is not part of a step
    frozen      the kinds of delta that leave the base frozen, against full tuning: time, and the memory that must be kept
    peft        LoRA (r 8, query and value) against PEFT's on RobertaForSequenceClassification with the same sequences, padded.
                PEFT's library has no bottleneck adapter, so ours has no counterpart

Fields of a row: bench/steps.py. On a GPU "+graphs" replays forward and backward as a CUDA graph.
"""
import sys
from dataclasses import dataclass
from functools import partial
from typing import Callable, Literal

import torch

from bench.roberta import LABELS, classifier_loss, our_classifier, peer, peer_state, stand_in_base
from bench.runner import RunFlags
from bench.steps import Impl, Platform, Problem, Step, StepFlags, agreement, main, sizes_of
from bench.train import labelled_batch, peers, uneven
from rt.data import Encoded
from rt.deltas import attach
from rt.kinds import KINDS, DeltaConfig
from rt.losses import DistillConfig, Loss, run_teacher
from rt.model import Batch, Classifier
from rt.runs.config import run


@dataclass
class Config:
    only: tuple[Literal["distill", "frozen", "peft"], ...] = ()  # kinds of cases; default: all
    run: RunFlags = RunFlags()
    steps: StepFlags = StepFlags()


Config.__doc__ = __doc__


def batch_of(case: dict, platform: Platform) -> Batch:
    return labelled_batch(platform.encoder_config(case), uneven(case)).to(platform.device)


def problem(case: dict, platform: Platform, batch: Batch, builds: dict[str, tuple[Callable[[], Classifier], Loss]],
            against: str) -> Problem:
    """A step of each model on its loss, in the product's own precision; on a GPU also as a CUDA graph."""
    def step(build: Callable[[], Classifier], loss: Loss, graph: bool) -> Step:
        model = build()
        return Step(model, lambda: loss(model, batch), platform.precision, graph)

    impls = {name + " +graphs" * graph: Impl(partial(step, *parts, graph), platform.precision)
             for graph in ((False, True) if platform.cuda else (False,)) for name, parts in builds.items()}
    return Problem(impls, case["tokens"], against, {"padded_tokens": case["sequences"] * case["S"]})


def distill(case: dict, platform: Platform) -> Problem:
    config, delta, batch = platform.encoder_config(case), DeltaConfig(case["delta"]), batch_of(case, platform)
    base, old_base = (stand_in_base(config, seed).to(platform.device) for seed in (0, 1))
    ids = [ids.tolist() for ids in batch.ids.split(batch.cu_seqlens.diff().tolist())]
    teacher = run_teacher(attach(old_base, delta, LABELS, seed=1), Encoded(ids, batch.labels.cpu(), truncated=0), platform.device,
                          platform.precision)
    student = partial(attach, base, delta, LABELS, seed=0)
    taught = Loss(teacher=teacher, config=DistillConfig())
    return problem(case, platform, batch, {"plain": (student, Loss()), "distill": (student, taught)}, "plain")


def frozen(case: dict, platform: Platform) -> Problem:
    base = stand_in_base(platform.encoder_config(case), seed=0).to(platform.device)
    builds = {kind: (partial(attach, base, DeltaConfig(kind), LABELS, seed=0), Loss()) for kind in KINDS}
    return problem(case, platform, batch_of(case, platform), builds, "full")


def peft(case: dict, platform: Platform) -> Problem:
    config, name, delta = platform.encoder_config(case), "RobertaForSequenceClassification", DeltaConfig("lora")
    batch = batch_of(case, platform)
    state = peer_state(name, config)
    mine = partial(our_classifier, config, state, delta, platform.device)

    def theirs(attention: str) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model  # a peer
        settings = LoraConfig(task_type="SEQ_CLS", r=delta.r, lora_alpha=delta.lora_alpha, target_modules=list(delta.target_modules),
                              lora_dropout=0.0)
        return get_peft_model(peer(name, config, attention, state), settings)

    found = problem(case, platform, batch, {"ours": (mine, Loss())}, "ours")
    found.impls |= peers(platform, "peft", theirs, lambda model: {"": classifier_loss(model, batch, config.pad_id)},
                         dropout=config.dropout)
    try:
        reference = theirs("sdpa").to(platform.device).eval()
    except ImportError:
        return found
    with torch.no_grad():
        found.facts |= agreement(Loss()(mine().eval(), batch).item(), classifier_loss(reference, batch, config.pad_id)().item())
    return found


PROBLEMS = {"distill": distill, "frozen": frozen, "peft": peft}      # a new kind of case is a new function of (case, platform)


def cases(c: Config, cuda: bool) -> list[dict]:
    """Most important first."""
    S, counts = (16, (4, 8)) if c.run.quick else (128, (16, 128))
    kinds = [{"case": "distill", "delta": "full"}, {"case": "distill", "delta": "adapter"}, {"case": "frozen"}, {"case": "peft"}]
    kinds = [kind for kind in kinds if not c.only or kind["case"] in c.only]
    return [{"bench": "recycle", "case": kind["case"], "size": size, **kind, "sequences": B, "tokens": B * S // 2, "S": S, "dropout": p}
            for size in sizes_of(c, cuda) for p in c.steps.dropouts[:1] for B in counts for kind in kinds]


if __name__ == "__main__":
    run(lambda: main(Config, "bench.recycle", PROBLEMS, cases, sys.argv[1:]))
