"""Ways to reuse an outdated delta on a new base (many runs at once: rt/speed/multi_run.py). A mode has a start and a loss:

    scratch        a fresh delta and head are tuned on the new base: the baseline
    apply          the old delta is put on the new base unchanged; nothing is trained
    init           tuning starts from the old delta
    distill        a fresh delta is distilled from old base + old delta
    init+distill   init and distill together
    project        the old delta goes through a map learned on other tasks (rt/transport.py); nothing is trained on this task
    transport      the old delta is put in the order of the new base's dimensions, found from text; nothing is trained
    gradmask       a full delta keeps the entries whose sign opposes the task's gradient on the new base; nothing is trained
"""
import time
from dataclasses import dataclass, field, replace
from typing import Callable, Iterator

import torch
from torch import nn

from rt.data import Encoded, TaskData
from rt.deltas import Base, Delta, apply, attach, check_fits, extract, new_head
from rt.errors import InputError
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, TeacherCache, run_teacher
from rt.model import Classifier, Linear, prototypes
from rt.optim import autocast, memory_for
from rt.transport import Projection, parts_of, project
from rt.tune import Hook, TuneResult, TuneSettings, ignore, plain_gradient, predict, tune


@dataclass
class Recycling:
    """The input of every mode: Delta_i was learned on M_i (`old_base`) and is wanted on M_{i+1} (`base`)."""
    old_base: Base | None               # None, like old_delta, for scratch alone, or if a black box teaches: then `teacher` is given
    old_delta: Delta | None
    base: Base
    data: TaskData
    config: DeltaConfig                 # kind of the delta to learn
    settings: TuneSettings
    distill: DistillConfig
    device: torch.device
    precision: torch.dtype
    on_step: Hook = ignore
    on_eval: Hook = ignore
    make_gradient: Callable = plain_gradient
    teacher: TeacherCache | None = None     # the teacher's outputs on data.train, filled when a mode first needs them
    old_train: Encoded | None = None        # data.train for a teacher with another tokenizer; None: the teacher reads the student's ids
    projection: Projection | None = None    # for project, learned beforehand
    carry: bool = False                     # whether init, init+distill and gradmask start from `carried`, as transport does
    carried: Delta | None = None            # the old delta in the order of the new base's dimensions (rt.transport.transport)
    merged: Delta | None = None             # several old deltas merged into one: starts use it instead of old_delta
    about: dict = field(default_factory=dict)       # facts about `carried` or `merged` for the run's record
    head: str = "fresh"                     # head for a task with other labels: fresh or prototype
    shrinkage: bool = False                 # whether prototypes use shrinkage
    unlabelled: Encoded | None = None       # texts for the modes with a teacher; `teacher` and `old_train` have them after data.train
    share: float = 0.5                      # share of each batch that the unlabelled texts fill
    hard: bool = False                      # unlabelled texts get the teacher's most likely labels, and the loss is the task loss alone

    @property
    def has_black_box(self) -> bool:
        """Whether only the teacher's answers are known."""
        return self.teacher is not None and self.teacher.states is None


def recycle(r: Recycling, mode: str) -> tuple[Classifier, TuneResult]:
    """The model for the new base and its scores. `seconds` includes evaluations, and the teacher's run if this call needs it first."""
    check(r, mode)
    started = time.perf_counter()
    model, loss = start(r, mode), MODES[mode].loss
    settings = r.settings if loss else replace(r.settings, steps=0)     # nothing is trained; dev and test are scored
    result = tune(model, training_data(r, mode), (loss or plain_loss)(r), settings, device=r.device, precision=r.precision,
                  on_step=r.on_step, on_eval=r.on_eval, make_gradient=r.make_gradient)
    result.seconds = time.perf_counter() - started
    return model, result


def start(r: Recycling, mode: str) -> Classifier:
    """The model that `mode` starts from. Its old delta is the carried one, else the merged one, else `old_delta`. With `project_patience`,
    maps take its hidden states to the teacher's width (FitNets: Romero et al., 2015). They are trained, but are no part of the delta."""
    is_carried = mode in carried_modes(r.carry)
    if is_carried and r.carried is None:
        raise ValueError("no delta was carried: rt.transport.transport does so")
    old = r.carried if is_carried else r.merged or r.old_delta
    model = MODES[mode].start(r, old and old.ordered(r.data.labels))
    if mode in NEEDS_TEACHER and r.distill.project_patience and not r.hard:
        d_old, d = r.old_base.encoder.config.hidden_size, r.base.encoder.config.hidden_size
        maps = torch.randn(r.base.encoder.config.num_layers, d_old, d, generator=torch.Generator().manual_seed(r.settings.seed)) / d**0.5
        model.patience_map = nn.Parameter(maps.to(model.head.out.weight.device))
    return model


def start_fresh(r: Recycling, _: Delta | None = None) -> Classifier:
    """A fresh delta and head on the new base."""
    model = attach(r.base, r.config, r.data.num_outputs, r.settings.seed)
    return prototype_head(r, model, ()) if r.head == "prototype" else model


def start_from(r: Recycling, delta: Delta) -> Classifier:
    """`delta` on the new base. If the task has other labels, the head is fresh or made of prototypes."""
    model = apply(r.base, delta, stale_ok=True)
    if delta.labels == r.data.labels:
        return model
    if r.head == "prototype":
        return prototype_head(r, model, delta.labels)
    model.head = new_head(r.base, r.data.num_outputs, r.settings.seed)
    return model


def start_masked(r: Recycling, delta: Delta) -> Classifier:
    """Like init, with d * 1[d g < 0] for each entry d of `delta`. g is the task loss's gradient at new base + old head, without dropout."""
    loss = plain_loss(r)
    model = apply(r.base, delta, scale=0.0, stale_ok=True).eval()
    size = min(64, r.settings.batch_size)
    for i in range(0, len(r.data.train), size):
        batch = r.data.train.batch([*range(i, min(i + size, len(r.data.train)))]).to(r.device)
        with memory_for(f"the gradient of {size} sequences", f"`batch_size` ({r.settings.batch_size}) or `seq_len`"):
            with autocast(r.device, r.precision):
                total = loss(model, batch) * len(batch.index)
            total.backward()
    masked = {k: v * (v * model.encoder.get_parameter(k).grad.cpu() < 0) for k, v in delta.diffs.items()}
    return start_from(r, replace(delta, diffs=masked))


def prototype_head(r: Recycling, model: Classifier, labels: tuple[str, ...]) -> Classifier:
    """`model` with a head for the task. `labels` names the outputs of its present head. Labels that the task shares keep their rows. The
    others get prototypes of the training examples' features, brought to the scale of the kept rows by one factor and one shift."""
    old, model.head.out = model.head.out, nn.Identity()
    f = predict(model, r.data.train.sequences, r.device, r.precision).double()
    W, b = prototypes(f, r.data.train.targets, r.data.num_outputs, r.shrinkage)
    if stay := [(i, labels.index(label)) for i, label in enumerate(r.data.labels) if label in labels]:
        here, there = map(list, zip(*stay))
        W_old, b_old = old.weight.detach().double().cpu()[there], old.bias.detach().double().cpu()[there]
        z, t = (logits - logits.mean(1, keepdim=True) for logits in (f @ W[here].T + b[here], f @ W_old.T + b_old))
        factor = (z * t).sum() / z.square().sum()
        factor = factor if factor > 0 else 1.0      # one kept label does not determine it
        W, b = factor * W + (W_old - factor * W[here]).mean(0), factor * b + (b_old - factor * b[here]).mean()
        W[here], b[here] = W_old, b_old
    model.head.out = Linear(W.shape[1], len(W)).to(old.weight.device)
    model.head.out.load_state_dict({"weight": W, "bias": b})
    return model


def start_projected(r: Recycling, delta: Delta) -> Classifier:
    """The old delta, mapped by the projection learned beforehand."""
    if r.projection is None:
        raise ValueError("project needs a projection: rt.transport.learn_projection")
    return start_from(r, project(r.projection, delta))


def teacher_model(r: Recycling) -> Classifier:
    """old base + old delta, without dropout."""
    return apply(r.old_base, r.old_delta.ordered(r.data.labels)).eval()


def teacher_of(r: Recycling) -> TeacherCache:
    """The teacher's outputs on every training example. They are computed once, and again for another teacher or other examples."""
    sources = r.old_base, r.old_delta, r.old_train or r.data.train, r.unlabelled
    if r.teacher is None or any(was is not now for was, now in zip(r.teacher.sources, sources)):
        r.teacher = replace(run_teacher(teacher_model(r), r.old_train or taught(r), r.device, r.precision), sources=sources)
    return r.teacher


def taught(r: Recycling) -> Encoded:
    """The examples that a teacher teaches: the training examples, then the unlabelled texts."""
    return r.data.train if r.unlabelled is None else r.data.train.beside(r.unlabelled, r.share)


def training_data(r: Recycling, mode: str) -> TaskData:
    """The task data that `mode` trains on. With a teacher it includes the unlabelled texts."""
    if mode not in NEEDS_TEACHER or r.unlabelled is None:
        return r.data
    train, n = taught(r), len(r.data.train)
    if r.hard:
        logits = teacher_of(r).logits[n:].cpu()
        train.targets[n:] = logits.argmax(-1) if r.data.labels else logits.squeeze(-1)
    return replace(r.data, train=train)


def plain_loss(r: Recycling) -> Loss:
    """The task loss alone."""
    return Loss(is_regression=not r.data.labels)


def distillation_loss(r: Recycling) -> Loss:
    """The total loss with old base + old delta, or a black box, as the teacher. With `hard` pseudo-labels, the task loss alone."""
    if r.hard:
        return plain_loss(r)
    model = teacher_model(r) if r.distill.runs_teacher else None
    return Loss(not r.data.labels, teacher_of(r), r.distill, model, has_unlabelled=r.unlabelled is not None)


@dataclass(frozen=True)
class Mode:
    """The start and the loss of a mode. Without a loss, nothing is trained."""
    start: Callable[[Recycling, Delta | None], Classifier]      # gets the old delta: as it is, merged or carried
    loss: Callable[[Recycling], Loss] | None


MODES = {
    "scratch": Mode(start_fresh, plain_loss),
    "apply": Mode(start_from, None),
    "init": Mode(start_from, plain_loss),
    "distill": Mode(start_fresh, distillation_loss),
    "init+distill": Mode(start_from, distillation_loss),
    "project": Mode(start_projected, None),
    "transport": Mode(start_from, None),
    "gradmask": Mode(start_masked, None)}
CARRIES = ("init", "init+distill", "transport", "gradmask")     # the modes that can start from the carried delta
FROM_OLD = ("apply", *CARRIES)                                  # the modes that start from the old delta, whole or in part
TRAINED = tuple(name for name, mode in MODES.items() if mode.loss)
NEEDS_TEACHER = tuple(name for name, mode in MODES.items() if mode.loss is distillation_loss)


def carried_modes(carry: bool) -> tuple[str, ...]:
    """The modes that start from the carried delta."""
    return CARRIES if carry else ("transport",)


def new_delta(r: Recycling, mode: str, model: Classifier) -> Delta:
    """The model that `recycle` returned, as a delta of the new base."""
    return extract(model, r.base, r.config if mode in TRAINED else (r.merged or r.old_delta).config,
                   {"task": r.data.name, "labels": list(r.data.labels)})


@dataclass
class Link:
    """A delta for one base of a chain, and the route that led to it."""
    base: str
    route: str | None
    delta: Delta
    result: TuneResult


def chain(r: Recycling, mode: str, bases: dict[str, Base]) -> Iterator[Link]:
    """Runs `mode` on M_1, M_2, ... (`bases`, by name), from r.old_base = M_0 and r.old_delta = Delta_0, by two routes:

        chain   Delta_{i+1} = recycle(M_i, Delta_i, M_{i+1}), the recycled delta recycled again
        direct  Delta_{i+1} = recycle(M_0, Delta_0, M_{i+1})

    Both routes to M_1 are one run. scratch recycles nothing and has no route (None). r.base is not read. r.on_eval also gets base and
    route. Raises InputError before anything is trained."""
    if len({base.tokenizer.vocabulary for base in bases.values()}) > 1:
        raise InputError("the bases of a chain must have one vocabulary: the task is encoded once")
    if r.merged or r.carried or r.projection:
        raise InputError("a chain has one old delta, as it is: no merged or carried delta and no projection")
    for base in bases.values():
        check(replace(r, base=base), mode)
    last, diverged = r, 0
    for i, (name, base) in enumerate(bases.items()):
        if mode == "scratch":
            runs = [((None,), r)]
        elif i == 0:
            runs = [(("direct", "chain"), r)]
        else:
            runs = [(("direct",), r), (("chain",), last)]
        for routes, source in runs:
            def on_eval(row: dict, name=name, routes=routes) -> None:
                for route in routes:
                    r.on_eval({"base": name, "route": route, **row})

            here = replace(source, base=base, on_eval=on_eval)
            model, result = recycle(here, mode)
            delta = new_delta(here, mode, model)
            if "direct" in routes:
                r.teacher = here.teacher    # the same for every base
            if "chain" in routes:
                result.diverged = diverged = diverged or result.diverged     # what starts from a run that diverged counts as diverged
                last = replace(r, old_base=base, old_delta=delta, teacher=None, old_train=None)
            yield from (Link(name, route, delta, result) for route in routes)


def check(r: Recycling, mode: str) -> None:
    """Raises InputError if `mode` does not work with this old delta or between these two bases."""
    old, c, starts_from_old = r.merged or r.old_delta, r.distill, mode in FROM_OLD
    for name, v, known in (("mode", mode, MODES), ("head", r.head, ("fresh", "prototype")), ("att_layers", c.att_layers, ("last", "all"))):
        if v not in known:
            raise InputError(f"`{name}` {v}: not one of {', '.join(known)}")
    answers_only = mode in NEEDS_TEACHER and r.has_black_box     # then the old delta may have other labels
    if (old is None or r.old_base is None) and mode != "scratch" and (starts_from_old or not answers_only):
        raise InputError(f"{mode} needs an old delta and its base")
    if old is not None and r.old_base is not None:
        check_fits(r.old_base, old, stale_ok=False)     # all modes assume that the delta was learned on the old base
    if r.head == "prototype" and not r.data.labels:
        raise InputError("`head` prototype has a mean for each label: a regression has none")
    if mode == "gradmask" and old.config.kind != "full":
        raise InputError(f"gradmask keeps entries of weights that the base has: it needs a full delta, not {old.config.kind}")
    may_differ = answers_only or mode in ("scratch", "init") or r.head == "prototype" and mode in ("apply", "transport")
    if not may_differ and sorted(old.labels) != sorted(r.data.labels):
        raise InputError(f"{mode} needs an old delta with the task's labels; this one's are "
                         f"{', '.join(old.labels[:6]) or 'those of a regression'}: use `mode` init, "
                         "or for apply and transport `head` prototype")
    if starts_from_old and mode in TRAINED and old.config.used != r.config.used:
        raise InputError(f"{mode} continues the old delta ({old.config.used}): use the same `delta` and sizes, or `mode` distill")
    r.base.require_length(max(len(ids) for part in (r.data.train, r.data.dev, r.data.test, r.unlabelled) if part for ids in part.sequences))
    if starts_from_old:
        try:
            check_fits(r.base, old, stale_ok=True)
            if mode in carried_modes(r.carry):
                for name in old.tensors():
                    parts_of(name)      # raises if the tensor cannot be carried to another base
        except InputError as error:
            raise InputError(f"{mode} puts the old delta on the new base, and {error}; `mode` distill needs equal labels (and "
                             "`beta` 0 if sizes differ)") from None
    if mode in NEEDS_TEACHER:
        check_teacher(r, mode)


def check_teacher(r: Recycling, mode: str) -> None:
    """Raises InputError if the teacher cannot give an output that a term of the loss compares."""
    c, old, B = DistillConfig(beta=0.0) if r.hard else r.distill, r.old_delta, r.settings.batch_size
    if r.unlabelled is not None and not 0 < (extra := round(r.share * B)) < B:
        raise InputError(f"`unlabelled_share` {r.share} of `batch_size` {B} is {extra} rows; a batch needs labelled and unlabelled ones")
    if r.has_black_box:
        if c.beta or c.runs_teacher or c.project_patience:
            raise InputError("a teacher that is known by its answers has no hidden states, attention maps and weights: use `beta` 0, and "
                             "none of `gamma`, `itp` and `project_patience`")
        return
    r.old_base.require_length(max(map(len, (r.old_train or taught(r)).sequences)))
    if sorted(old.labels) != sorted(r.data.labels):
        raise InputError(f"{mode} needs a teacher with the task's labels; the old delta's are {', '.join(old.labels[:6])}")
    was, now = r.old_base.encoder.config, r.base.encoder.config
    if r.old_base.tokenizer.vocabulary != r.base.tokenizer.vocabulary:
        if r.old_train is None:
            raise InputError(f"{mode} needs old and new base to have one vocabulary, or the texts as the teacher's tokenizer reads them")
        if c.runs_teacher:
            raise InputError("`gamma` and `itp` need one vocabulary, because teacher and student read the same ids: leave both 0; "
                             "`alpha` and `beta` work with two vocabularies")
    if c.beta and not c.project_patience and (was.num_layers, was.hidden_size) != (now.num_layers, now.hidden_size):
        raise InputError("`beta` compares hidden states: both bases must have the same number of layers and hidden size; use "
                         "`beta` 0, or `project_patience`")
    if c.itp and c.project_patience:
        raise InputError("`itp` interpolates all weights, and only the student has the maps of `project_patience`: use one of them")
    if c.gamma and (was.num_heads != now.num_heads or c.att_layers == "all" and was.num_layers != now.num_layers):
        raise InputError("`gamma` compares attention maps: both bases must have the same number of heads (`att_layers` all: and layers)")
    if c.itp:
        check_fits(r.base, old, stale_ok=True)
        if old.config.used != r.config.used:
            raise InputError(f"`itp` draws a line to the teacher, weight by weight: use `delta` and sizes {old.config.used}, or no `itp`")
