"""Recycle an outdated delta. It was learned on an old base and is now needed on the base upgraded by continual pre-training.

    python recycle.py --mode all                    # every mode on the demo lineage; builds what is missing
    python recycle.py --mode init+distill --old_base runs/demo/M0 --old_delta runs/demo/deltas/M0-math-full-s0 \\
                      --base runs/demo/M1 --task math --shots 16 --seeds 0,1,2
    python recycle.py --mode apply,project --source_task dl                         # a map of deltas, learned on another task
    python recycle.py --mode scratch,init+distill --chain runs/demo/M1,runs/demo/M2     # upgrade after upgrade
    python recycle.py --mode all --delta adapter --sweep "seed=0,1,2 alpha=.7,.9 beta=0,1,10 T=5,10"    # the best run of each mode by dev

The modes are described in rt/recycling.py; give several with commas, or all. `run_alone` below does one run. Every run leaves its delta,
curve and row in a folder under --out/deltas (rt/runs/results.py); --out/summary.json has the rows of all runs.
"""
import rt.runs  # noqa: F401  isort: skip  before torch: how threads wait, and Ctrl-C while it is imported

import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, Literal

from data.sources import open_task, open_texts
from rt.data import encode_task
from rt.deltas import Base, Delta, apply
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.delta_files import load_delta, open_delta, save_delta
from rt.formats.files import write_json
from rt.formats.hub import open_base
from rt.kinds import DeltaConfig
from rt.limits import NonNegative, NonNegativeInt, Positive, PositiveInt, Seeds, SeqLen, Share
from rt.losses import DistillConfig
from rt.recycling import FROM_OLD, MODES, NEEDS_TEACHER, TRAINED, Recycling, carried_modes, chain, new_delta, recycle, teacher_of
from rt.runs import starts
from rt.runs.build import build_missing
from rt.runs.config import parse, record, run
from rt.runs.log import StepBar, load_tensorboard, note_changed_task, note_truncated, progress, score_text
from rt.runs.plan import announce, check_all, checked_modes, default_out, planned, possible, settings_of
from rt.runs.results import Run, base_origins, begin, open_old, origin_of, save_run, write_summary
from rt.runs.signals import interruptible
from rt.runs.starts import CarryConfig, ProjectConfig, Projects, carry_texts, combine, learn_map, merge_on_dev, open_bases
from rt.runs.summary import by_settings, chosen, report, report_chain, report_sweep
from rt.runs.sweep import LISTS, dealt, swept
from rt.runs.teaching import Samples, TeacherConfig, note_cut, open_samples
from rt.runs.workers import share_cores, spread, use_threads
from rt.speed.device import make_deterministic, pick_precision, precision_name
from rt.speed.dist import Ranks, join
from rt.speed.graphs import check_graphs
from rt.speed.multi_run import can_go_together, graphed_gradient, recycle_together
from rt.transport import transport
from rt.tune import TuneResult, divergence, evaluate, plain_gradient, score


@dataclass
class Config:
    """python recycle.py --mode scratch|apply|init|distill|init+distill|project|transport|gradmask|all [--flag value ...]"""
    mode: tuple[Literal[(*MODES, "all")], ...] = ("all",)  # comma-separated; all: with project if --source_task, transport if --carry
    old_base: str | None = None  # M_i: the base the old delta was learned on; default: runs/demo/M0 if --base is a base of the demo
    old_delta: str | None = None  # the outdated delta (ours, Hugging Face's or PEFT's): folder or hub id; default: tuned; A,B: merged
    base: str = "runs/demo/M1"  # M_{i+1}: the upgraded base
    chain: tuple[str, ...] = ()  # instead of --base: the bases after --old_base, in order; compares recycling again with recycling Delta_0
    task: str = "math"  # embedded domain, a folder with train, dev and test, or hub:OWNER/NAME
    delta: DeltaConfig = DeltaConfig("full")  # full, adapter, lora, bitfit or prefix; same: kind and sizes of --old_delta
    shots: PositiveInt | None = 16  # examples per label (regression: in all) for train and for dev; none: all
    seeds: Seeds = (0, 1, 2)  # seeds of the few-shot sample, fresh weights, data order and dropout
    distill: DistillConfig = DistillConfig()
    teaching: TeacherConfig = TeacherConfig()
    steps: PositiveInt = 50  # optimizer steps
    batch_size: PositiveInt = 16  # sequences per step
    lr: tuple[Positive, ...] = ()  # peak learning rate; if several, each mode keeps the best on dev; default: the demo's, for mini bases
    warmup: Share = 0.06  # share of the steps over which the learning rate rises
    weight_decay: NonNegative = 0.01  # weight decay, on matrices only
    eval_every: PositiveInt = 10  # steps between scores on dev
    seq_len: SeqLen = 64  # longest text in tokens; longer texts are cut
    project: ProjectConfig = ProjectConfig()
    carry: CarryConfig = CarryConfig()
    head: Literal["fresh", "prototype"] = "fresh"  # for labels that the old delta lacks (scratch, distill: for all); prototype: class means
    shrinkage: bool = False  # --head prototype: use the Mahalanobis distance with a shrunk covariance
    merge: Literal["mean", "ties"] = "mean"  # how to merge several old deltas; takes the subset that is best on dev
    early_stop: NonNegativeInt = 0  # stop after this many dev scores without a better one; 0: never
    sweep: str | None = None  # grid of settings, "seed=0,1,2 lr=1e-3,5e-3 alpha=.7,.9": all combinations, frozen-base deltas side by side
    side_by_side: NonNegativeInt = 0  # sweep: runs trained at once; 0: as many as fit into memory
    workers: NonNegativeInt = 0  # processes that share the runs on a CPU; 0: one per core
    threads: NonNegativeInt = 0  # threads per run on a CPU; 0: one, or more if there are more cores than runs
    out: str | None = None  # folder to write; default runs/recycle/BASE-TASK-DELTA[-kSHOTS][-sweep]
    resume: bool = False  # keep the runs that an earlier call finished and do the others; a --sweep always does so
    save_deltas: bool = True  # keep the delta of every run, as MODE-sSEED-HASH under OUT/deltas
    tensorboard: bool = False  # also write the curve of each run for TensorBoard, to tensorboard/ in its folder
    cache: str = "runs/cache"  # folder for the embedded data
    graphs: bool = False  # CUDA: run forward and backward as one CUDA graph; otherwise small batches wait for launches
    device: str = "auto"  # auto, cpu or cuda
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16, fp32, or auto: bf16 if the device is fast at it
    deterministic: bool = False  # the same command gives the same bits on a GPU too; on a CPU it always does


Done = tuple[Run, TuneResult, Delta, list[dict], dict]      # the list: the run's evaluations; the dict: more fields for its row


@dataclass
class Sources:
    """The inputs that all runs share."""
    samples: Samples
    bases: dict[str, Base]      # --base, or the bases of --chain
    olds: list[Delta]           # of --old_delta A,B,C
    projects: Projects
    texts: list[list[int]]      # token ids, for transport


def main() -> None:
    c = parse(Config, sys.argv[1:])
    modes = checked_modes(c)
    make_deterministic(c.deterministic)
    if c.tensorboard:
        load_tensorboard()      # before anything is trained
    ranks = join(c.device)
    if ranks.world == 1 and ranks.device.type == "cpu":
        use_threads(1)      # until the runs are shared out: a forked process would wait forever for threads that were not forked
    ranks.assert_same({f"--{k}": v for k, v in record(c).items()})
    check_graphs(c.graphs, replace(ranks, world=1))     # in a sweep each rank captures its own graphs
    if ranks.world > 1 and not c.sweep:
        raise InputError("torchrun shares out the runs of a --sweep; without --sweep, start this script without torchrun")
    task, *source_tasks = ranks.main_first(lambda: [open_task(name, c.cache) for name in (c.task, *c.project.source_task)])
    ranks.assert_same({f"task {one.name}": one.hash for one in (task, *source_tasks)})
    c.old_delta, source_deltas = ranks.from_main(lambda: build_missing(c, task, source_tasks))
    c.project = replace(c.project, source_delta=source_deltas)
    old_base = open_base(c.old_base).to(ranks.device) if c.old_base else None
    olds, old_delta = open_old(c.old_delta, old_base, task.labels) if c.old_base else ([], None)
    merged = combine(olds, [1 / len(olds)] * len(olds), c.merge, task.labels) if len(olds) > 1 else None
    c.delta = starts.new_kind(c, modes, merged or old_delta)
    modes = c.mode = possible(c, modes, task, old_delta)     # without all: `planned` refuses flags that none of them reads
    announce(c, task, old_delta)
    bases = open_bases(c, task, ranks.device)
    base = next(iter(bases.values()))
    projects = [(open_delta(folder, old_base).ordered(t.labels), encode_task(t, base.tokenizer, c.seq_len))
                for folder, t in zip(source_deltas, source_tasks)]
    plan, out = planned(c, modes), Path(c.out or default_out(c, task))
    r = Recycling(old_base, old_delta, base, encode_task(task, base.tokenizer, c.seq_len), c.delta, device=ranks.device,
                  precision=pick_precision(c.precision, ranks.device), make_gradient=graphed_gradient if c.graphs else plain_gradient,
                  merged=merged, carry=c.carry.carry, head=c.head, shrinkage=c.shrinkage, **settings_of(plan[0]))
    samples = open_samples(c, modes, task, lambda place: ranks.main_first(lambda: open_texts(place, c.cache)), old_base,
                           [one.seed for one in plan])
    first = samples.of(r, plan[0].seed if c.shots else 0)       # the first run's inputs; without --shots, those of all runs
    if ranks.is_main:
        note_changed_task(old_delta.info if old_delta else {}, task)
        note_truncated(*r.data.truncated(), c.seq_len, sys.stderr)
        note_cut(c, first)
    check_all(c, first, plan, bases, projects)
    texts = carry_texts(c.carry.carry_text, task, base, c.seq_len) if {*modes} & {*carried_modes(c.carry.carry)} else []
    goes_on = f"what was finished is kept; the same command {'with --resume ' * (c.sweep is None)}goes on"
    with locked(out, ranks.from_main), interruptible(goes_on):
        do_runs(c, r if c.shots else first, plan, Sources(samples, bases, olds, projects, texts), out, ranks)
    ranks.leave()


# --- one run -----------------------------------------------------------------------------------------------------------

def run_alone(r: Recycling, one: Run, sources: Sources) -> Iterator[Done]:
    """One run by itself; in a chain, one mode along all bases, by all routes."""
    c, curve, more, started = one.c, [], {}, time.perf_counter()
    loops = len(one.links()) - bool(c.chain and one.mode != "scratch")       # in a chain, both routes to the first base are one run
    steps = c.project.project_steps if one.mode == "project" else c.steps * loops * (one.mode in TRAINED)
    with StepBar(steps, one.mode, r.base.encoder.config, r.device, r.precision, c.delta.kind != "full", curve.append) as bar:
        vars(r).update(settings_of(one), on_step=bar.on_step, on_eval=bar.on_eval)     # r itself: its teacher's outputs serve later runs
        if c.chain:
            for link in chain(r, one.mode, sources.bases):
                place = {"base": link.base, "route": link.route}
                yield one.at(**place), link.result, link.delta, [row for row in curve if place.items() <= row.items()], place
            return
        if one.mode == "project":
            more = learn_map(r, c.project, sources.projects, lambda row: bar.on_eval({"part": "projection"} | row))
        model, result = recycle(r, one.mode)
        result.seconds = time.perf_counter() - started
        yield one, result, new_delta(r, one.mode, model), curve, more


def run_group(inputs: dict[int, Recycling], group: list[Run], sources: Sources) -> Iterator[Done]:
    """Do runs of one mode and equal shape (`inputs` by seed); yields each when it is done. A sweep trains them together if possible."""
    first = group[0]
    if first.c.sweep is None or not can_go_together(replace(inputs[first.seed], distill=first.c.distill), first.mode):
        for one in group:
            yield from run_alone(inputs[one.seed], one, sources)
        return
    for seed in {one.seed for one in group} if first.mode in NEEDS_TEACHER else ():
        teacher_of(inputs[seed])        # once for all runs on this sample
    curves = [[] for _ in group]
    rs = [replace(inputs[one.seed], on_eval=curve.append, **settings_of(one)) for one, curve in zip(group, curves)]
    found = recycle_together(rs, first.mode, first.c.side_by_side, first.c.graphs)
    for one, curve, (r, model, result) in zip(group, curves, found):
        yield one, result, new_delta(r, one.mode, model), curve, {}


# --- all runs ----------------------------------------------------------------------------------------------------------

def do_runs(c: Config, r: Recycling, plan: list[Run], sources: Sources, out: Path, ranks: Ranks) -> None:
    """Do every run that is not finished yet, then print the table. In a --sweep, the ranks share the runs of a group, and rank 0 scores the
    best run of each mode on test."""
    runs, carried = [each for one in plan for each in one.links()], carried_modes(c.carry.carry)
    others, content = [(delta, None) for delta in sources.olds if delta is not r.old_delta], sources.samples.content
    origins = base_origins(runs, r, sources.bases, others, content)
    special = {"project": origin_of(r, [*others, *sources.projects]),
               **{mode: origin_of(r, others, sources.texts, content * (mode in NEEDS_TEACHER)) for mode in carried}}
    origin = {each.name: special.get(each.mode, origins[each.name]) for each in runs}
    precision = precision_name(r.precision)     # what auto is here
    finished = ranks.from_main(lambda: begin(c, out, runs, origin, r.data.test is not None, precision))
    todo = [one for one in plan if not finished.issuperset(each.name for each in one.links())]
    workers = share_cores(len(plan), c.threads, c.workers) if ranks.world == 1 and ranks.device.type == "cpu" else 1
    mine = [[one] for one in todo] if c.sweep is None else dealt(todo, ranks.rank, ranks.world, workers)
    shared, inputs = r if c.sweep is None else replace(r, data=replace(r.data, test=None)), {}     # a sweep scores test at its end

    def done(group: list[Run]) -> Iterator[str]:
        """Do and save runs; yields the progress bar's text for each run."""
        if shared.carried is None and {one.mode for one in todo} & {*carried}:     # here: a process that has used threads cannot be forked
            shared.carried, shared.about = transport(r.old_base, r.base, r.old_delta, sources.texts)
        for seed in {one.seed for one in group} - inputs.keys():
            inputs[seed] = sources.samples.of(shared, seed) if c.shots else shared
            if len(sources.olds) > 1:
                inputs[seed].merged, inputs[seed].about = merge_on_dev(inputs[seed], sources.olds, c.merge)
        for one, result, delta, curve, more in run_group(inputs, group, sources):
            if one.mode in (FROM_OLD if r.merged else carried):
                more |= inputs[one.seed].about
            save_run(out, one, sources.samples.task, result, delta, curve, origin[one.name], {**more, "precision": precision})
            yield f"{one.mode}: dev {score_text(score(result.dev))}"

    total = sum(len(one.links()) for part in mine for one in part)
    with progress(total, "recycle", unit="run") as bar, closing(spread(done, mine, workers)) as words:
        for word in words:
            if c.sweep is None:
                write_summary(c, out, runs)
            bar.set_postfix_str(word, refresh=False)
            bar.update()
    ranks.wait()
    ranks.from_main(lambda: finish(c, r, runs, out))


def finish(c: Config, r: Recycling, runs: list[Run], out: Path) -> None:
    """In a sweep, score the best runs of each mode on test. Write summary.json, print the table. InputError if all runs of one diverged."""
    rows = write_summary(c, out, runs)
    modes = [mode for mode in dict.fromkeys(one.mode for one in runs) if chosen(rows, mode)]
    if c.sweep is None and modes:
        print(report_chain(rows, modes, c.chain) if c.chain else report(rows, modes))
    elif modes:
        for row in (row for mode in modes for row in chosen(rows, mode, by_settings) if not row["test"] and r.data.test):
            delta = load_delta(folder := out / "deltas" / row["run"])
            row["test"] = evaluate(apply(r.base, delta), r.data.test, r.device, r.precision)
            save_delta(folder, replace(delta, info=delta.info | {"test": row["test"]}))
            write_json(folder / "summary.json", row)
        print(report_sweep(write_summary(c, out, runs), modes, [name for name in swept(c.sweep) if name not in LISTS]))
    print(f"rows in {out / 'summary.json'}, curves and deltas in {out / 'deltas'}")
    diverged = [row for row in rows if row.get("diverged")]
    if counts := Counter(f"{row['mode']} at --lr {row['lr']:g}" for row in diverged):
        print("diverged, and left out: " + ", ".join(f"{what} ({n} of its runs)" for what, n in counts.items()))
    if lost := [row for row in diverged if row["mode"] not in modes]:
        raise divergence(lost[0]["diverged"], lost[0]["lr"])


if __name__ == "__main__":
    run(main)
