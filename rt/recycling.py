"""Ways to reuse an outdated delta on a new base, one short function a mode, all with the same arguments and return.

    scratch        fresh delta and head on the new base, tuned: the baseline
    apply          the old delta on the new base as it stands; nothing is trained
    init           tuning starts from the old delta
    distill        fresh delta, taught by old base + old delta
    init+distill   both
"""
from dataclasses import dataclass, field, replace
from typing import Callable

import torch

from rt.checkpoint import Base
from rt.config import UsageError
from rt.deltas import Delta, DeltaConfig, apply, attach, new_head
from rt.distill import Loss, TeacherCache, run_teacher
from rt.model import Classifier
from rt.tune import TaskData, TuneResult, TuneSettings, evaluate, tune


@dataclass
class Recycling:
    """What every mode works on: Delta_i learned on M_i (`old_base`), wanted on M_{i+1} (`base`)."""
    old_base: Base
    old_delta: Delta
    base: Base
    data: TaskData
    config: DeltaConfig                 # kind of the delta to be learned
    settings: TuneSettings
    alpha: float
    beta: float
    T: float
    public_code: bool
    device: torch.device
    precision: torch.dtype
    on_eval: Callable[[dict], None] = lambda row: None
    teachers: dict[str, TeacherCache] = field(default_factory=dict)     # one entry: the cache, once it was needed

    @property
    def same_labels(self) -> bool:
        return self.old_delta.labels == self.data.labels


def start_fresh(r: Recycling) -> Classifier:
    return attach(r.base, r.config, r.data.num_outputs, r.settings.seed)


def start_from_old(r: Recycling) -> Classifier:
    """The old delta on the new base; a fresh head where the task has other labels."""
    if r.old_delta.config != r.config:
        raise UsageError(f"init continues the old delta, which is {r.old_delta.config.kind} with other settings than the "
                         f"{r.config.kind} asked for: use the same --delta and sizes, or --mode distill")
    model = apply(r.base, r.old_delta, stale_ok=True)
    if not r.same_labels:
        model.head = new_head(r.base, r.data.num_outputs, r.settings.seed)
    return model


def teacher_of(r: Recycling) -> TeacherCache:
    """old base + old delta on every training example, run once."""
    if not r.same_labels:
        raise UsageError(f"distillation needs a teacher with the labels of the task; the old delta's are "
                         f"{', '.join(r.old_delta.labels[:6]) or 'those of a regression'}: use --mode init")
    if "cache" not in r.teachers:
        teacher = apply(r.old_base, r.old_delta)
        r.teachers["cache"] = run_teacher(teacher, r.data.train, r.device, r.precision)
    return r.teachers["cache"]


def _train(r: Recycling, model: Classifier, loss: Loss, what: str) -> tuple[Classifier, TuneResult]:
    return model, tune(model, r.data, loss, r.settings, device=r.device, precision=r.precision, on_eval=r.on_eval, what=what)


def _task_loss(r: Recycling) -> Loss:
    return Loss(is_regression=not r.data.labels)


def _distillation_loss(r: Recycling) -> Loss:
    return replace(_task_loss(r), teacher=teacher_of(r), alpha=r.alpha, beta=r.beta, T=r.T, public_code=r.public_code)


def scratch(r: Recycling) -> tuple[Classifier, TuneResult]:
    return _train(r, start_fresh(r), _task_loss(r), "scratch")


def apply_only(r: Recycling) -> tuple[Classifier, TuneResult]:
    if not r.same_labels:
        raise UsageError("apply uses the old delta's head, which has other labels than this task: use --mode init")
    model = apply(r.base, r.old_delta, stale_ok=True)
    dev = evaluate(model, r.data.dev, r.device, r.precision)
    r.on_eval({"step": 0, "loss": None, "dev": dev})
    return model, TuneResult(0, dev, evaluate(model, r.data.test, r.device, r.precision), [(0, next(iter(dev.values())))])


def init(r: Recycling) -> tuple[Classifier, TuneResult]:
    return _train(r, start_from_old(r), _task_loss(r), "init")


def distill(r: Recycling) -> tuple[Classifier, TuneResult]:
    return _train(r, start_fresh(r), _distillation_loss(r), "distill")


def init_distill(r: Recycling) -> tuple[Classifier, TuneResult]:
    return _train(r, start_from_old(r), _distillation_loss(r), "init+distill")


MODES: dict[str, Callable[[Recycling], tuple[Classifier, TuneResult]]] = {
    "scratch": scratch, "apply": apply_only, "init": init, "distill": distill, "init+distill": init_distill}
TRAINED = ("scratch", "init", "distill", "init+distill")
NEEDS_TEACHER = ("distill", "init+distill")
