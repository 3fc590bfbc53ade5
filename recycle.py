"""Recycle an outdated delta: learned on an old base, wanted on the new one that came out of continual pre-training.

    python recycle.py --mode all                    # every mode on the demo lineage; builds what is missing
    python recycle.py --mode init+distill --old_base runs/demo/M0 --old_delta runs/demo/deltas/M0-math-full-s0 \\
                      --base runs/demo/M1 --task math --shots 16 --seeds 0,1,2
    python recycle.py --mode apply,project --source_task dl                         # a map of deltas, learned on another task
    python recycle.py --mode scratch,init+distill --chain runs/demo/M1,runs/demo/M2     # upgrade after upgrade
    python recycle.py --mode all --delta adapter --sweep "seed=0,1,2 alpha=.7,.9 beta=0,1,10 T=5,10"    # the best of each mode by dev

Modes: scratch (the baseline), apply, init, distill, init+distill, project; several with commas, or all. Every run leaves its curve in
metrics.jsonl and a row in summary.json under --out, and its delta under --out/deltas (of a sweep: all three in a folder there).
"""
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

from data.sources import task_path
from rt.data import Task, few_shot
from rt.deltas import Base, Delta, apply
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.delta_files import load_delta
from rt.formats.files import FIGURES, check_overwritable, read_json, write_json
from rt.formats.hub import NAMING, open_base, open_delta, place_of_delta
from rt.formats.tasks import load_task
from rt.kinds import DeltaConfig
from rt.recycling import MODES, NEEDS_TEACHER, Recycling, can_go_together, chain, check, new_delta, recycle, recycle_together, teacher_of
from rt.runs.build import build, build_lineage
from rt.runs.config import parse, record, require_not_negative, require_positive, require_seeds, require_seq_len, require_share, run
from rt.runs.log import progress
from rt.runs.results import Book, Run, best_delta, is_complete, keep_run, origin_of, summary_rows
from rt.runs.summary import add_steps_to_scratch, by_settings, chosen, report, report_chain, report_sweep, routes
from rt.runs.sweep import expand, groups, swept
from rt.speed.device import make_deterministic, pick_precision
from rt.speed.dist import Ranks, join
from rt.speed.graphs import check_graphs
from rt.transport import GRANULARITIES, check_sources, learn_projection
from rt.tune import TaskData, TuneResult, TuneSettings, encode_task, evaluate, say_changed, say_truncated


@dataclass
class Config:
    """python recycle.py --mode scratch|apply|init|distill|init+distill|project|all [--flag value ...]"""
    mode: str = "all"  # one mode, several with commas, or all (project only with --source_task)
    old_base: str = "runs/demo/M0"  # M_i: the base the old delta was learned on
    old_delta: str | None = None  # the outdated delta, ours, Hugging Face's or PEFT's: folder or hub id; default: tuned if missing
    base: str = "runs/demo/M1"  # M_{i+1}: the upgraded base
    chain: tuple[str, ...] = ()  # instead of --base: the bases after --old_base, in order; deltas recycled again against Delta_0 each time
    task: str = "math"  # embedded domain, or a folder with train, dev and test
    delta: str = "full"  # full, adapter, lora, bitfit or prefix; same: kind and sizes of --old_delta
    shots: int | None = 16  # examples a label for train and for dev; none: all
    seeds: tuple[int, ...] = (0, 1, 2)  # of the few-shot sample, fresh weights, data order and dropout
    alpha: float = 0.7  # share of distillation: (1 - alpha) task + alpha KD + beta patience + gamma attention
    beta: float = 1.0  # weight of patience
    T: float = 5.0  # distillation temperature
    gamma: float = 0.0  # weight of the divergence between attention maps; the teacher then runs at every step
    att_layers: str = "last"  # whose maps: last or all
    itp: int = 0  # interpolation distillation: KD and patience also at so many random points between teacher and student
    public_code: bool = False  # KD divided by the number of labels, patience halved, as in the paper's code
    steps: int = 50  # optimizer steps
    batch_size: int = 16  # sequences a step
    lr: tuple[float, ...] = ()  # peak learning rate; of several, each mode keeps the best on dev; default: that of the demo's mini bases
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01  # on matrices only
    eval_every: int = 10  # steps between scores on dev
    seq_len: int = 64  # longest text in tokens, longer ones are cut
    bottleneck: int = 24  # adapter
    r: int = 8  # lora
    lora_alpha: float = 16.0  # lora
    target_modules: tuple[str, ...] = ("query", "value")  # lora
    prefix_len: int = 16  # prefix
    source_task: tuple[str, ...] = ()  # project: the tasks that the map is learned on, all their examples
    source_delta: tuple[str, ...] = ()  # project: their deltas for --old_base; default: as of --old_delta
    rank: int = 16  # project: of W1 W2 in w' = w W1 W2 + b
    granularity: str = "auto"  # project: flat (w is the whole delta), tensor (w a tensor's rows); auto: tensor for full, else flat
    residual: bool = False  # project: w' = w + w W1 W2 + b
    project_steps: int = 200  # project: optimizer steps of the map
    early_stop: int = 0  # end after so many scores on dev without a better one; 0: never
    sweep: str | None = None  # grid of settings, "seed=0,1,2 lr=1e-3,5e-3 alpha=.7,.9": every combination, frozen-base deltas side by side
    side_by_side: int = 0  # of a sweep: so many runs at once; 0: as many as fit into memory
    out: str | None = None  # folder to write; default runs/recycle/BASE-TASK-DELTA[-kSHOTS][-sweep]
    resume: bool = False  # keep the runs that an earlier call has finished, and do the others; a --sweep does so anyway
    save_deltas: bool = True  # keep the delta of every run: MODE-sSEED-HASH under OUT/deltas
    cache: str = "runs/cache"  # the embedded data
    graphs: bool = False  # CUDA: forward and backward as one CUDA graph; small batches wait for launches otherwise
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # bf16, fp32, or auto: bf16 where the device does it fast
    deterministic: bool = False  # the same bits from the same command on a GPU too; on a CPU they are so anyway


# Of 1e-4, 2e-4, 5e-4, 1e-3, 2e-3 the best on dev for each mode, full delta (results/demo/lr_search; project: as init); other kinds: one
# for all.
LR = {"full": {"scratch": 5e-4, "init": 1e-4, "distill": 1e-3, "init+distill": 1e-4, "project": 1e-4},
      "adapter": 5e-3, "lora": 5e-3, "bitfit": 5e-3, "prefix": 1e-2}


def learning_rates(c: Config, mode: str) -> tuple[float | None, ...]:
    """At which a mode is run; of one that does not train None."""
    if mode == "apply":
        return (None,)
    default = LR[c.delta]
    return c.lr or (default[mode] if isinstance(default, dict) else default,)


def main() -> None:
    c = parse(Config, sys.argv[1:])
    modes = checked_modes(c)
    if c.deterministic:
        make_deterministic()
    ranks = join(c.device)
    ranks.agree({f"--{k}": v for k, v in record(c).items()})
    check_graphs(c.graphs, replace(ranks, world=1))     # of a sweep's ranks each captures its own
    if ranks.world > 1 and not c.sweep:
        raise InputError("several processes share the runs of a --sweep; without one, start this script without torchrun")
    task, *source_tasks = ranks.main_first(lambda: [load_task(task_path(name, c.cache)) for name in (c.task, *c.source_task)])
    ranks.agree({f"task {each.name}": each.hash for each in (task, *source_tasks)})
    c.old_delta, c.source_delta = ranks.from_main(lambda: build_missing(c, task, source_tasks))
    old_base = open_base(c.old_base).to(ranks.device)
    old_delta = open_delta(str(best_delta(c.old_delta, old_base.fingerprint)), old_base).ordered(task.labels)
    c = like(c, old_delta) if c.delta == "same" else c
    bases = {name: open_base(name).to(ranks.device) for name in c.chain or (c.base,)}
    base = next(iter(bases.values()))
    modes = possible(c, modes, task, old_delta)
    if ranks.is_main:
        say_changed(old_delta.info, task)
    out = Path(c.out or default_out(c, task))
    sources = [(open_delta(folder, old_base).ordered(t.labels), encode_task(t, base.tokenizer, c.seq_len))
               for folder, t in zip(c.source_delta, source_tasks)]
    r = Recycling(old_base, old_delta, base, encode_task(task, base.tokenizer, c.seq_len), delta_config(c), tune_settings(c, 0, 0.0),
                  c.alpha, c.beta, c.T, c.public_code, ranks.device, pick_precision(c.precision, ranks.device), gamma=c.gamma,
                  att_layers=c.att_layers, itp=c.itp)
    if ranks.is_main:
        say_truncated(*r.data.truncated(), c.seq_len, sys.stderr)
    for each in bases.values():
        each.require_length(c.seq_len)
        for mode in modes:
            check(replace(r, base=each), mode)
    if sources:
        check_sources(old_base, base, sources, old_delta)
    with locked(out, ranks.from_main):
        if c.sweep is not None:
            sweep(c, r, task, modes, out, ranks)
        else:
            one_after_another(c, r, task, modes, bases, sources, out)
    ranks.leave()


def like(c: Config, old: Delta) -> Config:
    """With the kind and sizes of the old delta as the flags for them."""
    used = old.config.used
    return replace(c, delta=used.pop("kind"), **used)


def one_after_another(c: Config, r: Recycling, task: Task, modes: list[str], bases: dict[str, Base],
                      sources: list[tuple[Delta, TaskData]], out: Path) -> None:
    origins = {name: origin_of(replace(r, base=base)) for name, base in bases.items()}
    projected = origin_of(r, sources)
    book = Book(c, sys.argv, out, task, planned(c, modes), lambda run: projected if run.mode == "project" else origins[run.c.base])
    for seed in c.seeds:
        r = sample(c, r, task, seed)
        for one in (Run(c, mode, seed, lr) for mode in modes for lr in learning_rates(c, mode)):
            r.settings = tune_settings(c, seed, one.lr or 0.0)
            if one.key in book.done:
                continue
            if c.chain:
                run_chain(r, bases, one, book)
            else:
                run_one(r, sources, one, book)
    print(report_chain(book.planned(), modes, c.chain) if c.chain else report(book.planned(), modes))
    print(f"rows in {out / 'summary.json'}, curves in {out / 'metrics.jsonl'}")


def sample(c: Config, r: Recycling, task: Task, seed: int) -> Recycling:
    """With --shots, on the few examples that `seed` draws; the teacher has not seen them yet."""
    return replace(r, data=encode_task(few_shot(task, c.shots, seed), r.base.tokenizer, c.seq_len), teacher=None) if c.shots else r


def checked_modes(c: Config) -> list[str]:
    """The modes asked for; InputError for settings that make no sense, alone or together."""
    modes = [mode for mode in MODES if mode != "project" or c.source_task] if c.mode == "all" else c.mode.split(",")
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"--mode {mode}: not one of {', '.join(MODES)}, all")
    require_positive(c, "steps", "batch_size", "eval_every", "seq_len", "shots", "T", "lr", "bottleneck", "r", "prefix_len", "rank",
                     "project_steps")
    require_seeds(*c.seeds)
    require_seq_len(c.seq_len)
    require_share(c, "alpha", "warmup")
    require_not_negative(c, "beta", "gamma", "weight_decay", "side_by_side", "early_stop")
    for name, value, allowed in (("att_layers", c.att_layers, ("last", "all")), ("granularity", c.granularity, GRANULARITIES)):
        if value not in allowed:
            raise InputError(f"--{name} {value}: not one of {', '.join(allowed)}")
    if c.itp < 0 or (c.itp or c.gamma) and not {*modes} & {*NEEDS_TEACHER}:
        what = f"--gamma {c.gamma}: a weight" if c.gamma else f"--itp {c.itp}: a number of points from 0 on"
        raise InputError(f"{what}, for modes with a teacher ({', '.join(NEEDS_TEACHER)})")
    if c.delta != "same":
        delta_config(c)
    elif not c.old_delta or c.source_task and not c.source_delta:
        raise InputError("--delta same is as the --old_delta that is given, with the --source_delta where there is a --source_task")
    check_projection_flags(c, modes)
    if c.sweep is not None and (c.chain or "project" in modes or not c.save_deltas):
        raise InputError("--sweep has no --chain and no --mode project, and keeps the deltas, from which it goes on when interrupted")
    if c.graphs and (c.itp or c.gamma):
        raise InputError("--graphs repeats a step as it was captured: not with --itp, whose points are drawn anew, nor with --gamma, which "
                         "would count the tokens that fill a batch up")
    line = [str(Path(name)) for name in (c.old_base, *c.chain)]
    if c.chain and (c.base != Config.base or len({*line}) < len(line)):
        raise InputError(f"--chain {','.join(c.chain)}: the bases after --old_base {c.old_base} in order, each once, in place of --base")
    return modes


def check_projection_flags(c: Config, modes: list[str]) -> None:
    """InputError where --mode project and the flags that are for it do not fit together."""
    if "project" not in modes:
        if c.source_task or c.source_delta:
            raise InputError("--source_task and --source_delta are for --mode project")
        return
    if not c.source_task or c.source_delta and len(c.source_delta) != len(c.source_task):
        raise InputError(f"--mode project needs --source_task, and of --source_delta as many or none: {len(c.source_task)} tasks, "
                         f"{len(c.source_delta)} deltas")
    if c.task in c.source_task:
        raise InputError(f"--source_task {c.task}: is the --task itself, and a projection is for a task that it was not learned on")
    if c.chain:
        raise InputError("--chain has no --mode project: a projection is learned for two bases")


def possible(c: Config, modes: list[str], task: Task, old: Delta) -> list[str]:
    """Say what is about to be done; with another task's delta, `all` is what that can do."""
    few = f"{c.shots} examples a label" if c.shots else f"{len(task.parts['train'])} examples"
    what = "regression" if task.is_regression else f"{len(task.labels)} labels"
    print(f"{task.name} ({what}, {few}), {c.delta}: {c.old_base} + {c.old_delta} -> {' -> '.join(c.chain or (c.base,))}")
    if old.labels == task.labels:
        return modes
    print(f"the old delta was learned on {old.info['task']}, with other labels: init keeps the delta and starts a fresh head"
          + (f" (if its {', '.join(old.labels[:4])} are those of the task: {NAMING})" if len(old.labels) == len(task.labels) else ""))
    return ["scratch", "init"] if c.mode == "all" else modes


def default_out(c: Config, task: Task) -> str:
    """runs/recycle/BASE-TASK-DELTA, with shots -kSHOTS; of a chain all its bases."""
    first, *rest = c.chain or (c.base,)
    lineage = "-".join([*Path(first).parts[-2:], *(Path(name).name for name in rest)])
    return f"runs/recycle/{lineage}-{task.name}-{c.delta}" + (f"-k{c.shots}" if c.shots else "") + ("-sweep" if c.sweep else "")


def planned(c: Config, modes: list[str]) -> list[Run]:
    """Every row that this call will write."""
    runs = [Run(c, mode, seed, lr) for seed in c.seeds for mode in modes for lr in learning_rates(c, mode)]
    return [run.at(base, route) for run in runs for base in c.chain for route in routes(run.mode)] if c.chain else runs


def run_one(r: Recycling, sources: list[tuple[Delta, TaskData]], run: Run, book: "Book") -> None:
    """One run, and before --mode project the learning of its map; their rows are in `book` then."""
    started, about = time.perf_counter(), {}
    if run.mode == "project":
        c, names = run.c, [data.name for _, data in sources]
        equal = {delta.num_outputs for delta, _ in sources} == {r.old_delta.num_outputs}    # only then can heads be projected
        r.projection = learn_projection(
            r.old_base, r.base, sources, replace(r.settings, steps=c.project_steps), r=c.rank, granularity=c.granularity,
            residual=c.residual, alpha=c.alpha, beta=c.beta, T=c.T, public_code=c.public_code, device=r.device, precision=r.precision,
            on_eval=lambda row: book.curve(run, {"part": "projection", **row}), with_head=equal)
        about = {"projection": {"sources": names, **r.projection.about()}}
    r.on_eval = lambda row: book.curve(run, row)
    model, result = recycle(r, run.mode)
    if about:
        result.seconds = time.perf_counter() - started
    book.enter(run, result, new_delta(r, run.mode, model), about)


def run_chain(r: Recycling, bases: dict[str, Base], run: Run, book: "Book") -> None:
    """One mode along all bases of --chain, by all its routes."""
    r.on_eval = lambda row: book.curve(run.at(row["base"], row["route"]), row)
    for link in chain(r, run.mode, bases):
        book.enter(run.at(link.base, link.route), link.result, link.delta, {"base": link.base, "route": link.route})


def sweep(c: Config, r: Recycling, task: Task, modes: list[str], out: Path, ranks: Ranks) -> None:
    """Every combination of --sweep. A finished run is a folder under OUT/deltas, with its curve and its row: it is not done again when
    the same command is given again. Ranks share the runs of a group; rank 0 then scores the best of each mode on test."""
    runs = {one.name: one for each in expand(c, c.sweep) for one in planned(each, checked_modes(each) and modes)}
    for one in runs.values():
        check(replace(r, gamma=one.c.gamma, itp=one.c.itp), one.mode)
    origin = origin_of(r)
    ranks.from_main(lambda: check_overwritable(out, {"summary.json", "deltas", FIGURES}))
    done = ranks.from_main(lambda: {name for name, one in runs.items() if is_complete(out, one, origin)})     # what all ranks go by
    samples: dict[int, Recycling] = {}
    mine = [group[ranks.rank::ranks.world] for group in groups([one for name, one in runs.items() if name not in done])]
    with progress(sum(map(len, mine)), "sweep", unit="run") as bar:
        for group in mine:
            for seed in {one.seed for one in group}:
                samples[seed] = samples.get(seed) or sample(c, r, task, seed)
                if group[0].mode in NEEDS_TEACHER:
                    teacher_of(samples[seed])       # once for all runs on this sample
            for one, result, delta, curve in swept_runs(samples, group, c.side_by_side):
                keep_run(out, sys.argv, one, task, result, delta, curve, origin)
                bar.update()
    ranks.wait()
    ranks.from_main(lambda: finish_sweep(c, r, modes, list(runs), out))


def swept_runs(samples: dict[int, Recycling], group: list[Run], limit: int) -> Iterator[tuple[Run, TuneResult, Delta, list[dict]]]:
    """The runs of one group as they are done, without a score on test: side by side where they can be."""
    rs, curves = [], []
    for one in group:
        c = one.c
        curves.append([])
        rs.append(replace(samples[one.seed], settings=tune_settings(c, one.seed, one.lr or 0.0), alpha=c.alpha, beta=c.beta, T=c.T,
                          gamma=c.gamma, itp=c.itp, on_eval=curves[-1].append))
    if group and can_go_together(rs[0], group[0].mode):
        at = {id(r): i for i, r in enumerate(rs)}
        for r, model, result in recycle_together(rs, group[0].mode, limit):
            yield group[at[id(r)]], result, new_delta(r, group[0].mode, model), curves[at[id(r)]]
        return
    for one, r, curve in zip(group, rs, curves):
        model, result = recycle(replace(r, data=replace(r.data, test=None)), one.mode)
        yield one, result, new_delta(r, one.mode, model), curve


def finish_sweep(c: Config, r: Recycling, modes: list[str], names: list[str], out: Path) -> None:
    """Score the best runs by dev of each mode on test, write summary.json and print the table."""
    rows = [read_json(out / "deltas" / name / "summary.json") for name in names]
    settings = [name for name in swept(c.sweep) if name not in ("seed", "lr")]
    for row in (row for mode in modes for row in chosen(rows, mode, by_settings) if not row["test"]):
        row["test"] = evaluate(apply(r.base, load_delta(out / "deltas" / row["run"])), r.data.test, r.device, r.precision)
        write_json(out / "deltas" / row["run"] / "summary.json", row)
    add_steps_to_scratch(rows, by_settings)
    said = report_sweep(rows, modes, settings)
    rows = [row for row in summary_rows(out / "summary.json") if row["run"] not in names] + rows      # those of other sweeps stay
    write_json(out / "summary.json", {"rows": rows, "config": record(c), "argv": sys.argv})
    print(said)
    print(f"rows in {out / 'summary.json'}, curves and deltas in {out / 'deltas'}")


def build_missing(c: Config, task: Task, source_tasks: list[Task]) -> tuple[str, tuple[str, ...]]:
    """Make the demo lineage with train.py where it is missing, and those deltas that no flag names; the folders of all deltas."""
    build_lineage(c, Path(Config.base).parent, (*(c.chain or (c.base,)), c.old_base))
    return c.old_delta or tuned(c, c.task, task), c.source_delta or tuple(tuned(c, *source) for source in zip(c.source_task, source_tasks))


def tuned(c: Config, name: str, task: Task) -> str:
    """Where the delta of the old base for a task is, beside the base; made by train.py where it is not."""
    folder = place_of_delta(c.old_base, task.name, c.delta)
    if not (folder / "delta.json").exists():
        sizes = {size: getattr(c, size) for size in ("delta", "seq_len", "bottleneck", "r", "lora_alpha", "prefix_len")}
        build(c, f"the old delta {folder} (under a minute for mini on 2 cores)", mode="tune", base=c.old_base, task=name, out=folder,
              target_modules=",".join(c.target_modules), **sizes)
    return str(folder)


def delta_config(c: Config) -> DeltaConfig:
    return DeltaConfig(c.delta, c.bottleneck, c.r, c.lora_alpha, c.target_modules, c.prefix_len)


def tune_settings(c: Config, seed: int, lr: float) -> TuneSettings:
    return TuneSettings(c.steps, c.batch_size, lr, c.eval_every, seed, c.weight_decay, c.warmup, graphs=c.graphs,
                        early_stop=c.early_stop)


if __name__ == "__main__":
    run(main)
