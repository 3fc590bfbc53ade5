"""Studies of outdated deltas: the paper's (README, The method) and two more, as rows, a table and figures.

    python analyze.py --study connectivity                      # on the demo lineage; builds what is missing
    python analyze.py --study compatibility --bases runs/mine/M0,runs/mine/M1,runs/mine/M2 --tasks my_task --seeds 0,1,2
    python analyze.py --study similarity --independent runs/ind/M0 --heads 0.1,3.2 --sentence "Return the complete graph."
    python analyze.py --study recipes --old_base runs/demo/M0 --bases runs/plain/M1,runs/preserved/M1 --domains python,math
    python analyze.py --study mixture --old_base runs/demo/M0 --bases runs/replay0/M1,runs/replay20/M1 --domains python,math

Studies: compatibility (the first base's delta on all later bases), connectivity (the path between two tuned models), similarity (of
attention heads and hidden states), distance (of weights). Two studies beyond the paper compare upgrades of one base: recipes (the benefit
to old deltas, the cost on the new domain), mixture (a power law of held-out losses over replay and steps). Deltas are looked for beside
their bases, as deltas/BASE-TASK-KIND-sSEED. If a delta of a task is missing, train.py tunes all deltas of that task, with equal settings,
as deltas/BASE-TASK-KIND-nSTEPS-sSEED. An independent base shares only sizes and tokenizer with the others:
train.py --tokenizer runs/demo/tokenizer.json --seed 1 --stream python --out runs/ind.

--out gets rows.jsonl, summary.json, and figures made from these rows as .png and .svg (pip install -e '.[plot]').
"""
import rt.runs  # noqa: F401  isort: skip  before torch: how threads wait, and Ctrl-C while it is imported

import sys
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Iterable, Literal

from data.sources import corpus_path, domain_names, open_task
from rt.data import Task, encode_task
from rt.deltas import Base, Delta, check_fits
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.delta_files import open_delta, place_of_delta, seq_len_of
from rt.formats.files import FIGURES, check_overwritable, note, read_rows, write_errors, write_json
from rt.formats.hub import open_base
from rt.formats.tasks import texts_of
from rt.kinds import KINDS
from rt.limits import Limit, Positive, PositiveInt, Seeds, SeqLen
from rt.report.drawing import draw_all
from rt.report.figures import NUMBERS, figures_of, numbers_table
from rt.report.studies import ABOUT_UPGRADES, ROWS, StudyContext
from rt.runs.build import build, build_lineage, is_tuned, making
from rt.runs.config import changed, parse, record, run
from rt.runs.log import Log, note_changed_task
from rt.runs.workers import use_threads
from rt.speed.device import make_deterministic, pick_device, pick_precision

PathPoints = Annotated[int, Limit(lambda n: n >= 2, "`{name}` {value}: a path has two points at least")]


@dataclass
class Config:
    """python analyze.py --study compatibility|connectivity|similarity|distance|recipes|mixture [--flag value ...]"""
    study: Literal[tuple(ROWS)] = "connectivity"  # one of these six
    bases: tuple[str, ...] = ("runs/demo/M0", "runs/demo/M1", "runs/demo/M2")  # M_0, M_1, ... in order
    old_base: str | None = None  # recipes, mixture: the base that was upgraded to --bases; default: the first of --bases
    domains: tuple[str, ...] = ()  # recipes, mixture: domains to take held-out loss on; the last is the one the upgrades learned
    independent: str | None = None  # M_IND: same sizes and tokenizer, another random start
    tasks: tuple[str, ...] = ("math",)  # embedded domains, folders with train, dev and test, or hub:OWNER/NAME
    delta: Literal[tuple(KINDS)] = "full"  # full, adapter, lora, bitfit or prefix
    deltas: tuple[str, ...] = ()  # one folder per base, the independent base last (recipes: the old base's alone); default: found or tuned
    seeds: Seeds = (0,)  # seeds of the deltas
    neighbours: bool = False  # pair each base with the next base, not with the first
    points: PathPoints = 26  # connectivity: points per path, ends included
    curve: bool = False  # connectivity: train a curved path as well
    curve_steps: PositiveInt = 100  # optimizer steps for the curve's control point
    curve_lr: Positive = 1e-3  # peak learning rate for the control point
    batch_size: PositiveInt = 16  # sequences per optimizer step
    heads: tuple[str, ...] = ()  # similarity: maps to draw, LAYER.HEAD from 0; default: head 0 of the first, middle and last layer
    sentence: str | None = None  # similarity: the text whose maps are drawn; default: the test text closest to 16 tokens
    max_examples: PositiveInt = 64  # similarity, recipes: at most this many test texts, on which heads are compared
    tune_steps: PositiveInt = 100  # optimizer steps to tune a missing delta, all else as in train.py; recipes: steps of init and scratch
    shots: PositiveInt | None = 32  # recipes: examples per label for init and scratch; none: all
    lr: Positive | None = None  # recipes: peak learning rate of init and scratch; default as in train.py
    seq_len: SeqLen = 64  # longest text in tokens; longer texts are cut
    out: str | None = None  # folder to write; default runs/analyze/STUDY
    cache: str = "runs/cache"  # folder for the embedded data
    device: str = "auto"  # auto, cpu or cuda
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16, fp32, or auto: bf16 if the device is fast at it
    deterministic: bool = False  # the same command gives the same bits on a GPU too; on a CPU it always does


OF_CURVE = ("curve_steps", "curve_lr", "batch_size")     # read by connectivity only with --curve
PAIRED, TUNED = ("connectivity", "similarity", "distance"), [study for study in ROWS if study != "mixture"]
# flag -> the studies that read it; all studies read the others
READ_BY = {"neighbours": PAIRED, **dict.fromkeys(("points", "curve", "curve_steps", "curve_lr"), ("connectivity",)),
           "batch_size": ("connectivity", "recipes"), **dict.fromkeys(("heads", "sentence"), ("similarity",)),
           "max_examples": ("similarity", "recipes"), **dict.fromkeys(("shots", "lr"), ("recipes",)),
           **dict.fromkeys(("tasks", "delta", "deltas", "seeds", "tune_steps"), TUNED)}


def main() -> None:
    c = parse(Config, sys.argv[1:])
    c.seeds = (*dict.fromkeys(c.seeds),)
    if c.old_base:
        c.bases = (c.old_base, *(base for base in c.bases if Path(base) != Path(c.old_base)))
    if (count := len(c.bases) + bool(c.independent)) < 2:
        raise InputError(f"--bases {','.join(c.bases)}: a study needs two bases at least")
    if (c.study in ABOUT_UPGRADES) != bool(c.domains) or c.old_base and c.study not in ABOUT_UPGRADES:
        raise InputError(f"--study {c.study}: --domains, text whose held-out loss is taken, and --old_base are for the studies "
                         f"{' and '.join(ABOUT_UPGRADES)}, which need --domains")
    for name in changed(c):
        if c.study not in READ_BY.get(name, (c.study,)):
            raise InputError(f"--{name} has no effect with --study {c.study}")
        if name in OF_CURVE and c.study == "connectivity" and not c.curve:
            raise InputError(f"--{name} has no effect without --curve")
    domain_names("domains", c.domains)      # refused before anything is built
    needed = 1 if c.study in ABOUT_UPGRADES else count      # of an upgrade, only the old base's delta
    if c.deltas and (len(c.deltas) != needed or len(c.tasks) * len(c.seeds) > 1):
        raise InputError(f"--deltas {','.join(c.deltas)}: give one folder a base ({needed} here), for one task and one seed")
    if c.independent and c.study in ("compatibility", *ABOUT_UPGRADES):
        raise InputError(f"--independent: {c.study} follows one lineage; leave it out")
    make_deterministic(c.deterministic)
    use_threads(0)
    out = Path(c.out or f"runs/analyze/{c.study}")
    check_overwritable(out, {"rows.jsonl", "rows.jsonl.part", "summary.json", FIGURES, *drawn_by(c.study)})
    with locked(out):
        run_study(c, out)


def drawn_by(study: str) -> set[str]:
    """The names of the figures' files."""
    return {f"{name}.{ending}" for name in figures_of(study, []) for ending in ("png", "svg")}


def run_study(c: Config, out: Path) -> None:
    """Write rows as they are computed, then the numbers and figures made from them."""
    context = open_study(c)
    rows = ROWS[c.study](context)
    first = next(rows)      # raises here, before anything is written, if a flag of this study is wrong
    place = out / "rows.jsonl"
    log = Log(out, name=place.name + ".part" * place.is_file())      # a finished study stays until its successor is finished
    for row in chain([first], rows):
        log.row(**row)
    for name in ("summary.json", *drawn_by(c.study)):       # of the rows before: without matplotlib, or after a kill, they would stay
        (out / name).unlink(missing_ok=True)
    log.path.replace(place)
    rows = read_rows(place)
    numbers = [*NUMBERS[c.study](rows)]
    summary = {"study": c.study, "numbers": numbers, "deltas": context.origins, "config": record(c), "argv": sys.argv}
    write_json(out / "summary.json", summary)
    print(numbers_table(numbers))
    with write_errors(out):
        drawn = draw_all(figures_of(c.study, rows), out, place)
    print(f"rows in {place}, {drawn}")


# --- bases and deltas -------------------------------------------------------------------------------------------------

def open_study(c: Config) -> StudyContext:
    """Open the bases, tasks and deltas that the flags name; tune missing deltas. Raises InputError if they do not fit together."""
    device = pick_device(c.device)
    several = len({Path(b).name for b in c.bases}) < len(c.bases)       # as in runs/plain/M1 and runs/preserved/M1
    folders = {"/".join(Path(b).parts[-1 - several:]): b for b in c.bases} | ({"IND": c.independent} if c.independent else {})
    tasks = [open_task(name, c.cache) for name in (() if c.study == "mixture" else c.tasks)]
    if len(folders) < len(c.bases) + bool(c.independent) or len({task.name for task in tasks}) < len(tasks):
        raise InputError(f"--bases {','.join(c.bases)}, --tasks {','.join(c.tasks)}: two have the same name; rename one of the folders")
    build_lineage(c, Path(Config.bases[0]).parent, c.bases)
    bases, shapes = {name: open_base(folder).to(device) for name, folder in folders.items()}, []
    first, texts = bases[next(iter(bases))].tokenizer, [text for task in tasks for text in texts_of(task)]
    for name, base in bases.items():
        base.require_length(c.seq_len)
        sizes = {k: v for k, v in asdict(base.encoder.config).items() if "dropout" not in k}
        shapes.append(sizes | {"vocabulary": base.tokenizer.vocabulary})
        if shapes[-1] != shapes[0] or not base.tokenizer.reads_as(first, texts):
            raise InputError(f"{folders[name]}: other sizes or another tokenizer than {c.bases[0]}; models are compared weight by weight, "
                             "on the same tokens")
    data = {task.name: encode_task(task, first, c.seq_len) for task in tasks}
    context = StudyContext(c, folders, bases, {task.name: task for task in tasks}, data,
                           {"device": device, "precision": pick_precision(c.precision, device)},
                           {name: corpus_path(entry, c.cache) for name, entry in zip(domain_names("domains", c.domains), c.domains)})
    with_delta = dict([*folders.items()][:1] if c.study in ABOUT_UPGRADES else folders)
    for entry, task in zip(c.tasks, tasks):
        for (name, seed), folder in delta_folders(c, with_delta, entry, task).items():
            delta = context.deltas[name, task.name, seed] = open_checked(folder, bases[name], task, c.delta)
            context.origins.append({"base": name, "task": task.name, "seed": seed, "folder": str(folder),
                                    **{fact: delta.info.get(fact) for fact in ("step", "dev", "test")}})
    if c.study in ("connectivity", "distance"):
        check_alike(context.deltas)
    note_unequal(c, context.deltas.values())
    return context


def delta_folders(c: Config, folders: dict[str, str], entry: str, task: Task) -> dict[tuple[str, int], Path]:
    """The folder of the delta per base and seed. If a delta is missing, all are tuned with equal settings. InputError if one is there that
    was tuned with others."""
    if c.deltas:
        return {(name, c.seeds[0]): Path(folder) for name, folder in zip(folders, c.deltas)}
    for suffix in ("", f"-n{c.tune_steps}"):
        found = {(name, seed): place_of_delta(folders[name], task.name, c.delta, suffix, seed) for name in folders for seed in c.seeds}
        missing = {key: folder for key, folder in found.items() if not (folder / "delta.json").exists()}
        if not missing:
            return found
    asked, otherwise = {"task": task.hash, "seq_len": c.seq_len}, "move it away, so that all are tuned anew"
    with making(*missing.values()):
        missing = {key: folder for key, folder in found.items() if not is_tuned(folder, asked, otherwise)}
        build(c, *((f"the delta {folder}", dict(mode="tune", out=folder, base=folders[name], task=entry, seed=seed, delta=c.delta,
                                                tune_steps=c.tune_steps, seq_len=c.seq_len))
                   for (name, seed), folder in missing.items()), of=len(found))
    return found


def open_checked(folder: Path, base: Base, task: Task, kind: str) -> Delta:
    """The delta in `folder`. Raises InputError if it is of another kind, task or base."""
    delta = open_delta(str(folder), base).ordered(task.labels)
    if delta.config.kind != kind:
        raise InputError(f"{folder}: is a delta of kind {delta.config.kind}, but --delta is {kind}")
    if delta.labels != task.labels:
        raise InputError(f"{folder}: predicts {', '.join(delta.labels[:6]) or 'a number'}, but the labels of {task.name} are "
                         f"{', '.join(task.labels[:6]) or 'numbers'}")
    note_changed_task(delta.info, task)
    try:
        check_fits(base, delta, stale_ok=False)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    return delta


def check_alike(deltas: dict[tuple[str, str, int], Delta]) -> None:
    """InputError if two deltas that are compared weight by weight have other settings, such as LoRA's rank or alpha."""
    first = {}
    for (name, task, seed), delta in deltas.items():
        other, used = first.setdefault((task, seed), (name, delta.config.used))
        if used != delta.config.used:
            raise InputError(f"the deltas of {other} and {name} for {task} have other settings, {used} and {delta.config.used}, and are "
                             "compared weight by weight: tune them with the same flags")


def note_unequal(c: Config, deltas: Iterable[Delta]) -> None:
    """Print a note to stderr if the deltas were tuned with unequal settings, or on texts of another length than --seq_len."""
    lengths = sorted({length for delta in deltas if (length := seq_len_of(delta))} - {c.seq_len})
    configs = [config for delta in deltas if isinstance(config := delta.info.get("config"), dict)]
    if lengths:
        note(f"deltas learned on texts of up to {' and '.join(map(str, lengths))} tokens are compared at --seq_len {c.seq_len}")
    for name in ("tune_steps", "lr", "batch_size", "warmup", "weight_decay"):
        if len(values := sorted({str(config.get(name)) for config in configs})) > 1:
            note(f"the deltas were tuned with unequal --{name} ({', '.join(values)})")


if __name__ == "__main__":
    run(main)
