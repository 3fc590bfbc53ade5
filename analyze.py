"""What is true of an outdated delta? The paper's studies (README, The method: 1 to 4), as rows, a table and figures.

    python analyze.py --study connectivity                      # on the demo lineage; builds what is missing
    python analyze.py --study compatibility --bases runs/mine/M0,runs/mine/M1,runs/mine/M2 --tasks my_task --seeds 0,1,2
    python analyze.py --study similarity --independent runs/ind/M0 --heads 0.1,3.2 --sentence "Return the complete graph."
    python analyze.py --study recipes --old_base runs/demo/M0 --bases runs/plain/M1,runs/preserved/M1 --domains python,math
    python analyze.py --study mixture --old_base runs/demo/M0 --bases runs/replay0/M1,runs/replay20/M1 --domains python,math

Studies: compatibility (the first base's delta on all later ones), connectivity (the path between two tuned models), similarity (attention
heads and hidden states), distance (of weights); beyond the paper, of upgrades of one base: recipes (what each is worth to old deltas, and
costs on the new domain), mixture (a power law of held-out losses over replay and steps). Deltas are looked for beside their bases, as
deltas/BASE-TASK-KIND-sSEED. If one of a task is missing, all are tuned alike by train.py, as deltas/BASE-TASK-KIND-nSTEPS-sSEED. An
independent base shares sizes and tokenizer with the others and nothing else: train.py --tokenizer runs/demo/tokenizer.json --seed 1
--stream python --out runs/ind.

--out gets rows.jsonl, summary.json, and figures made from these rows as .png and .svg (pip install -e '.[plot]').
"""
import rt  # noqa: F401  isort: skip  says how threads wait, before torch starts them

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Annotated, Callable, Iterable, Iterator, Literal

import torch

from data.sources import corpus_path, open_task
from rt.data import Encoded, Example, Rows, Task, TaskData, encode, encode_task, few_shot
from rt.deltas import Base, Delta, apply, check_fits
from rt.errors import Diverged, InputError
from rt.formats.atomic import locked
from rt.formats.corpora import build_corpus
from rt.formats.delta_files import seq_len_of
from rt.formats.files import FIGURES, check_overwritable, read_json, read_rows, write_json
from rt.formats.hub import open_base, open_delta, place_of_delta
from rt.kinds import KINDS
from rt.limits import Limit, Positive, PositiveInt, Seeds, SeqLen
from rt.losses import DistillConfig, Weights, weights_of
from rt.model import Classifier, MaskedLM
from rt.pretrain import evaluate_mlm
from rt.recycling import Recycling, recycle
from rt.report import analysis
from rt.report.drawing import draw_all
from rt.report.figures import NUMBERS, figures_of, numbers_table
from rt.runs.build import build, build_lineage
from rt.runs.config import parse, record, run
from rt.runs.log import Log, progress
from rt.speed.device import make_deterministic, pick_device, pick_precision
from rt.tune import TuneSettings, chance, evaluate

PathPoints = Annotated[int, Limit(lambda n: n >= 2, "`{name}` {value}: a path has two points at least")]


@dataclass
class Config:
    """python analyze.py --study compatibility|connectivity|similarity|distance|recipes|mixture [--flag value ...]"""
    study: Literal["compatibility", "connectivity", "similarity", "distance", "recipes", "mixture"] = "connectivity"  # one of these six
    bases: tuple[str, ...] = ("runs/demo/M0", "runs/demo/M1", "runs/demo/M2")  # M_0, M_1, ... in order
    old_base: str | None = None  # recipes, mixture: the base that --bases are upgrades of; default: the first of them
    domains: tuple[str, ...] = ()  # recipes, mixture: text whose held-out loss is taken; the last is what the upgrades learned
    independent: str | None = None  # M_IND: same sizes and tokenizer, another random start
    tasks: tuple[str, ...] = ("math",)  # embedded domains, folders with train, dev and test, or hub:OWNER/NAME
    delta: Literal[tuple(KINDS)] = "full"  # full, adapter, lora, bitfit or prefix
    deltas: tuple[str, ...] = ()  # folders, one a base in order, the independent one last (one task, one seed); default: found or tuned
    seeds: Seeds = (0,)  # of the deltas
    neighbours: bool = False  # pair each base with the next one instead of with the first
    points: PathPoints = 26  # connectivity: on a path, ends included
    curve: bool = False  # connectivity: train a curved path as well
    curve_steps: PositiveInt = 100  # optimizer steps of its control point
    curve_lr: Positive = 1e-3  # their peak learning rate
    batch_size: PositiveInt = 16  # sequences of such a step
    heads: tuple[str, ...] = ()  # similarity: LAYER.HEAD of the maps drawn, from 0; default: head 0 of first, middle and last layer
    sentence: str | None = None  # similarity: whose maps are drawn; default: the test text nearest to 16 tokens
    max_examples: PositiveInt = 64  # similarity: test texts compared
    tune_steps: PositiveInt = 100  # optimizer steps of a delta that is missing, all else as in train.py; recipes: of init and scratch
    shots: PositiveInt | None = 32  # recipes: examples a label for init and scratch; none: all
    lr: Positive = 5e-4  # recipes: peak learning rate of init and scratch
    seq_len: SeqLen = 64  # longest text in tokens, longer ones are cut
    out: str | None = None  # folder to write; default runs/analyze/STUDY
    cache: str = "runs/cache"  # the embedded data
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # bf16, fp32, or auto: bf16 where the device does it fast
    deterministic: bool = False  # the same bits from the same command on a GPU too; on a CPU they are so anyway


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.old_base:
        c.bases = (c.old_base, *c.bases)
    if (count := len(c.bases) + bool(c.independent)) < 2:
        raise InputError(f"--bases {','.join(c.bases)}: a study needs two bases at least")
    if (c.study in ABOUT_UPGRADES) != bool(c.domains) or c.old_base and c.study not in ABOUT_UPGRADES:
        raise InputError(f"--study {c.study}: --domains, text whose held-out loss is taken, and --old_base are for the studies "
                         f"{' and '.join(ABOUT_UPGRADES)}, which need --domains")
    if c.study in ABOUT_UPGRADES:
        count = 1       # the old base's delta is all that is needed
    if c.deltas and (len(c.deltas) != count or len(c.tasks) * len(c.seeds) > 1):
        raise InputError(f"--deltas {','.join(c.deltas)}: give one folder a base, for one task and one seed")
    if c.independent and c.study in ("compatibility", *ABOUT_UPGRADES):
        raise InputError(f"--independent: {c.study} follows one lineage; leave it out")
    if c.deterministic:
        make_deterministic()
    record(c)       # so that a value that cannot be recorded is refused now rather than at the end
    out = Path(c.out or f"runs/analyze/{c.study}")
    drawn = {f"{name}.{ending}" for name in figures_of(c.study, []) for ending in ("png", "svg")}
    check_overwritable(out, {"rows.jsonl", "summary.json", FIGURES, *drawn})
    with locked(out):
        run_study(c, out)


def run_study(c: Config, out: Path) -> None:
    """Write rows as they come, then the numbers and figures made from them."""
    context = open_study(c)
    rows = ROWS[c.study](context)
    first = next(rows)      # raises here, before anything is written, if a flag of this study is wrong
    log = Log(out, name="rows.jsonl")
    for row in chain([first], rows):
        log.row(**row)
    rows = read_rows(log.path)
    numbers = NUMBERS[c.study](rows)
    summary = {"study": c.study, "numbers": numbers, "deltas": context.origins, "config": record(c), "argv": sys.argv}
    write_json(out / "summary.json", summary)
    print(numbers_table(numbers))
    print(f"rows in {log.path}, {draw_all(figures_of(c.study, rows), out, log.path)}")


# --- bases and deltas -------------------------------------------------------------------------------------------------

@dataclass
class StudyContext:
    """What a study works on. Bases go by the names of their folders, the independent one by IND."""
    c: Config
    folders: dict[str, str]
    bases: dict[str, Base]
    tasks: dict[str, Task]
    data: dict[str, TaskData]
    where: dict     # device and precision
    deltas: dict[tuple[str, str, int], Delta] = field(default_factory=dict)     # by base, task and seed
    origins: list[dict] = field(default_factory=list)       # of the deltas, for the summary

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The first base (or the one before) with each later one; the independent one always with the first."""
        names = [name for name in self.bases if name != "IND"]
        found = list(pairwise(names)) if self.c.neighbours else [(names[0], name) for name in names[1:]]
        return found + [(names[0], "IND")] * ("IND" in self.bases)

    def cells(self) -> Iterator[tuple[str, int, dict]]:
        """(task, seed, the facts of them that stand in each of their rows)."""
        for task, seed in product(self.data, self.c.seeds):
            part = {} if self.data[task].test else {"scored_on": "dev"}
            yield task, seed, {"study": self.c.study, "task": task, "kind": self.c.delta, "seed": seed, **part}

    def scored(self, task: str) -> Encoded:
        """The test part of a task, or dev if that has no labels."""
        return self.data[task].test or self.data[task].dev

    def tuned(self, base: str, task: str, seed: int) -> Classifier:
        return apply(self.bases[base], self.deltas[base, task, seed]).eval()


def open_study(c: Config) -> StudyContext:
    """The bases, tasks and deltas of the flags; deltas that are missing are tuned. InputError if they do not fit together."""
    device = pick_device(c.device)
    several = len({Path(b).name for b in c.bases}) < len(c.bases)       # runs/plain/M1 and runs/preserved/M1
    folders = {"/".join(Path(b).parts[-1 - several:]): b for b in c.bases} | ({"IND": c.independent} if c.independent else {})
    tasks = [open_task(name, c.cache) for name in (() if c.study == "mixture" else c.tasks)]
    if len(folders) < len(c.bases) + bool(c.independent) or len({task.name for task in tasks}) < len(tasks):
        raise InputError(f"--bases {','.join(c.bases)}, --tasks {','.join(c.tasks)}: two have the same name; rename one of the folders")
    build_lineage(c, Path(Config.bases[0]).parent, c.bases)
    bases, shapes = {name: open_base(folder).to(device) for name, folder in folders.items()}, []
    for name, base in bases.items():
        base.require_length(c.seq_len)
        sizes = {k: v for k, v in asdict(base.encoder.config).items() if "dropout" not in k}
        shapes.append(sizes | {"vocabulary": base.tokenizer.vocabulary})
        if shapes[-1] != shapes[0]:
            raise InputError(f"{folders[name]}: other sizes or another tokenizer than {c.bases[0]}; models are compared weight by weight, "
                             "on the same tokens")
    data = {task.name: encode_task(task, next(iter(bases.values())).tokenizer, c.seq_len) for task in tasks}
    context = StudyContext(c, folders, bases, {task.name: task for task in tasks}, data,
                           {"device": device, "precision": pick_precision(c.precision, device)})
    with_delta = dict([*folders.items()][:1] if c.study in ABOUT_UPGRADES else folders)
    for entry, task in zip(c.tasks, tasks):
        for (name, seed), folder in delta_folders(c, with_delta, entry, task.name).items():
            delta = context.deltas[name, task.name, seed] = open_checked(folder, bases[name], task, c.delta)
            context.origins.append({"base": name, "task": task.name, "seed": seed, "folder": str(folder),
                                    **{fact: delta.info.get(fact) for fact in ("step", "dev", "test")}})
    note_unequal(c, context.deltas.values())
    return context


def delta_folders(c: Config, folders: dict[str, str], entry: str, task: str) -> dict[tuple[str, int], Path]:
    """The folder of each base's delta for each seed. If one is missing, all are tuned for the same number of steps."""
    if c.deltas:
        return {(name, c.seeds[0]): Path(folder) for name, folder in zip(folders, c.deltas)}
    for steps in ("", f"-n{c.tune_steps}"):
        found = {(name, seed): place_of_delta(folders[name], task, c.delta, steps, seed) for name in folders for seed in c.seeds}
        missing = {key: folder for key, folder in found.items() if not (folder / "delta.json").exists()}
        if not missing:
            break
    build(c, *((f"the delta {folder}", dict(mode="tune", out=folder, base=folders[name], task=entry, seed=seed, delta=c.delta,
                                            tune_steps=c.tune_steps, seq_len=c.seq_len)) for (name, seed), folder in missing.items()))
    return found


def open_checked(folder: Path, base: Base, task: Task, kind: str) -> Delta:
    """The delta in `folder`. InputError unless it is of this kind, task and base."""
    delta = open_delta(str(folder), base).ordered(task.labels)
    if delta.config.kind != kind:
        raise InputError(f"{folder}: is a delta of kind {delta.config.kind}, and what is asked for is --delta {kind}")
    if delta.labels != task.labels:
        raise InputError(f"{folder}: tells apart {', '.join(delta.labels[:6])}, the task {task.name} {', '.join(task.labels[:6])}")
    try:
        check_fits(base, delta, stale_ok=False)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    return delta


def note_unequal(c: Config, deltas: Iterable[Delta]) -> None:
    """Print to stderr if deltas that were found were not learned alike, or not on texts as long as they are compared on."""
    lengths = sorted({length for delta in deltas if (length := seq_len_of(delta))} - {c.seq_len})
    steps = {config.get("tune_steps") for delta in deltas if isinstance(config := delta.info.get("config"), dict)}
    if lengths:
        print(f"note: deltas learned on texts of up to {' and '.join(map(str, lengths))} tokens are compared at --seq_len {c.seq_len}",
              file=sys.stderr)
    if len(steps) > 1:
        print(f"note: the deltas were tuned for unequal numbers of steps ({', '.join(sorted(map(str, steps)))})", file=sys.stderr)


# --- the rows of each study (their numbers and figures: rt/report/figures.py) -----------------------------------------

def compatibility(context: StudyContext) -> Iterator[dict]:
    """Delta_0 on every later base and on the snapshots on the way there; what is tuned on each base itself; chance."""
    first, *later = context.bases
    with progress(len(context.data) * len(context.c.seeds) * len(later), "compatibility", unit="base") as bar:
        for task, seed, facts in context.cells():
            old, data = context.deltas[first, task, seed], context.scored(task)

            def line(kind: str, base: str, stage: int, t: int | None, model: Classifier) -> dict:
                return facts | {"base": base, "stage": stage, "t": t, "line": kind, **evaluate(model, data, **context.where)}

            own = line("own", first, 0, None, apply(context.bases[first], old))
            guess = facts | {"base": first, "stage": 0, "t": None, "line": "chance", **chance(context.data[task])}
            yield from (own, own | {"line": "apply"}, guess)
            for stage, name in enumerate(later, 1):
                for t, folder in snapshots(Path(context.folders[name])):
                    base = open_base(str(folder)).to(context.where["device"])
                    yield line("apply", folder.name, stage, t, apply(base, old, stale_ok=True))
                yield line("apply", name, stage, None, apply(context.bases[name], old, stale_ok=True))
                yield line("tuned", name, stage, None, context.tuned(name, task, seed))
                bar.update()


def snapshots(base: Path) -> list[tuple[int, Path]]:
    """(t, folder) of the checkpoints M_i(t) beside M_i."""
    folders = [meta.parent for meta in base.parent.glob(f"{base.name}-t*/meta.json")]
    return sorted((int(t), folder) for folder in folders if (t := folder.name.removeprefix(f"{base.name}-t")).isdecimal())


def connectivity(context: StudyContext) -> Iterator[dict]:
    """Loss and metrics on test along the path between two tuned models."""
    c = context.c
    points = [i / (c.points - 1) for i in range(c.points)]
    with progress(len(context.data) * len(c.seeds) * len(context.pairs) * (1 + c.curve) * c.points, "paths", unit="point") as bar:
        for (task, seed, facts), pair in product(context.cells(), context.pairs):
            a, b = (context.tuned(base, task, seed) for base in pair)
            ends = weights_of(a), weights_of(b)
            paths = {"linear": analysis.linear(*ends)}
            if c.curve:
                paths["curve"] = analysis.bezier(ends[0], control_point(context, b, ends, task, seed), ends[1])
            for (name, path), mu in product(paths.items(), points):
                row, = analysis.walk(b, path, [mu], context.scored(task), **context.where)
                yield facts | {"pair": "-".join(pair), "path": name, **row}
                bar.update()


def control_point(context: StudyContext, model: Classifier, ends: tuple[Weights, Weights], task: str, seed: int) -> Weights:
    """The trained control point of the curve between two models' weights."""
    c = context.c
    settings = TuneSettings(c.curve_steps, c.batch_size, c.curve_lr, c.curve_steps, seed)
    try:
        with progress(c.curve_steps, "curve") as bar:
            return analysis.train_control(model, *ends, context.data[task], settings, **context.where,
                                          on_step=lambda batch: bar.update())
    except Diverged as error:
        raise Diverged(str(error).replace("`lr`", "`curve_lr`")) from None


def similarity(context: StudyContext) -> Iterator[dict]:
    """Heads against heads and layers against layers over test texts; the maps of a few heads on one text, of the first seed."""
    c, device, first = context.c, context.where["device"], next(iter(context.bases.values()))
    heads = chosen_heads(c, first)
    texts = {task: min(context.scored(task).sequences, key=lambda ids: abs(len(ids) - 16)) for task in context.data}
    if c.sentence is not None:
        given = encode([Example(c.sentence, None, None, "--sentence")], (), first.tokenizer, c.seq_len)
        texts = dict.fromkeys(texts, given.sequences[0])
    with progress(len(context.data) * len(c.seeds) * len(context.pairs), "similarity", unit="pair") as bar:
        for task, seed, facts in context.cells():
            models = {name: context.tuned(name, task, seed) for name in context.bases}
            # as they may stand on an axis: no space around a token, line breaks written out
            tokens = [json.dumps(first.tokenizer.decode([i]).strip(" "), ensure_ascii=False)[1:-1] for i in texts[task]]
            for name, model in models.items() if seed == c.seeds[0] else ():
                maps = analysis.attention_maps(model, texts[task], device)
                for layer, head in heads:
                    yield facts | {"what": "attention", "base": name, "layer": layer, "head": head, "tokens": tokens,
                                   "map": rounded(maps[layer, head])}
            sequences = context.scored(task).sequences[:c.max_examples]
            for pair in context.pairs:
                a, b = (models[name] for name in pair)
                matrix, alike = analysis.head_divergence(a, b, sequences, device), analysis.cka(a, b, sequences, device)
                yield facts | {"what": "heads", "pair": "-".join(pair), "heads": first.encoder.config.num_heads,
                               "sequences": len(sequences), **analysis.match_summary(matrix), "own_of_head": rounded(matrix.diagonal()),
                               "best_of_head": rounded(matrix.amin(1)), "match_of_head": matrix.argmin(1).tolist(),
                               "divergence": rounded(matrix), "cka_own": alike.diagonal().mean().item(), "cka": rounded(alike)}
                bar.update()


def chosen_heads(c: Config, base: Base) -> list[tuple[int, int]]:
    L, H = base.encoder.config.num_layers, base.encoder.config.num_heads
    known = {f"{layer}.{head}": (layer, head) for layer, head in product(range(L), range(H))}
    for name in c.heads:
        if name not in known:
            raise InputError(f"--heads {name}: not a LAYER.HEAD of this model, 0.0 to {L - 1}.{H - 1}")
    return [known[name] for name in c.heads or dict.fromkeys((f"{layer}.0" for layer in (0, L // 2, L - 1)))]


def rounded(values: torch.Tensor) -> list:
    return values.double().round(decimals=5).tolist()


def distance(context: StudyContext) -> Iterator[dict]:
    """Between the encoders of two bases, and between their deltas, by part and in all. The head is left out: it is kept as it is, not as a
    change, and equal seeds start it equal, which would pass for likeness. (So are a delta's modules, in the kinds that have them.)"""
    weights = [({"study": context.c.study, "task": None, "kind": None, "seed": None, "of": "bases"},
                {name: dict(base.encoder.named_parameters()) for name, base in context.bases.items()})]
    for task, seed, facts in context.cells():
        deltas = {name: context.deltas[name, task, seed] for name in context.bases}
        weights.append((facts | {"of": "deltas"}, {name: delta.diffs | delta.modules for name, delta in deltas.items()}))
    for (facts, of), (a, b) in product(weights, context.pairs):
        for row in analysis.distances(of[a], of[b]):
            yield facts | {"pair": f"{a}-{b}", **row}


# --- upgrades of one base, beyond the paper ---------------------------------------------------------------------------

def heldout_losses(context: StudyContext, folder: str) -> dict[str, float]:
    """Masked-LM loss of the base in `folder` on the held-out text of each domain."""
    base = open_base(folder).to(context.where["device"])
    if base.head is None:
        raise InputError(f"{folder}: has no masked-LM head, so no held-out loss")
    losses = {}
    for entry in context.c.domains:
        corpus = build_corpus(name := Path(entry).name.split(".")[0], corpus_path(entry, context.c.cache), base.tokenizer, context.c.cache)
        rows = Rows(corpus["heldout"], base.tokenizer, seq_len=128, mask_rate=0.15, seed=0, sequences=1)
        losses[name] = evaluate_mlm(MaskedLM(base.encoder, base.head), rows, tokens=16384, **context.where)["loss"]
    return losses


def recipes(context: StudyContext) -> Iterator[dict]:
    """Of the old base and of each upgrade: held-out losses and the distance from the old base; then, by task and seed, what the old delta
    scores as it is, how many of its attention heads are where they were, and what init and scratch reach with few labels."""
    c, first, where = context.c, next(iter(context.bases)), context.where
    old = dict(context.bases[first].encoder.named_parameters())
    with progress(len(context.bases) * (1 + len(context.data) * len(c.seeds)), "recipes", unit="row") as bar:
        for name, base in context.bases.items():
            whole = analysis.distances(old, dict(base.encoder.named_parameters()))[-1]
            yield {"study": c.study, "what": "base", "base": name, "heldout": heldout_losses(context, context.folders[name]),
                   "l2": whole["l2"], "cosine": whole["cosine"]}
            bar.update()
        for (task, seed, facts), name in product(context.cells(), context.bases):
            delta, base = context.deltas[first, task, seed], context.bases[name]
            there = apply(base, delta, stale_ok=True).eval()
            matrix = analysis.head_divergence(context.tuned(first, task, seed), there, context.scored(task).sequences[:c.max_examples],
                                              where["device"])
            trained = {} if name == first else {mode: few_shot_score(context, mode, name, task, seed) for mode in ("scratch", "init")}
            yield facts | {"what": "delta", "base": name, **evaluate(there, context.scored(task), **where),
                           "heads_kept": analysis.match_summary(matrix)["share_own_best"], **trained}
            bar.update()


def few_shot_score(context: StudyContext, mode: str, name: str, task: str, seed: int) -> float | None:
    """The test score (dev's without test) of `mode` on an upgrade."""
    c, first, whole = context.c, next(iter(context.bases)), context.tasks[task]
    data = encode_task(few_shot(whole, c.shots, seed) if c.shots else whole, context.bases[first].tokenizer, c.seq_len)
    delta = context.deltas[first, task, seed]
    settings = TuneSettings(c.tune_steps, c.batch_size, c.lr, max(1, c.tune_steps // 5), seed)
    r = Recycling(context.bases[first], delta, context.bases[name], data, delta.config, settings, DistillConfig(), **context.where)
    result = recycle(r, mode)[1]
    return next(iter((result.test or result.dev).values()))


def mixture(context: StudyContext) -> Iterator[dict]:
    """Held-out losses of the old base, and of every upgrade and its snapshots, with the share of replay and the steps."""
    first, *later = context.folders.values()
    yield {"study": context.c.study, "base": first, "replay": None, "steps": 0, "heldout": heldout_losses(context, first)}
    places = [Path(place) for folder in later for place in (*(each for _, each in snapshots(Path(folder))), folder)]
    with progress(len(places), "mixture", unit="base") as bar:
        for place in places:
            meta = read_json(place / "meta.json")
            yield {"study": context.c.study, "base": str(place), "replay": meta.get("recipe", {}).get("replay", 0.0), "steps": meta["step"],
                   "heldout": heldout_losses(context, str(place))}
            bar.update()


ABOUT_UPGRADES = ("recipes", "mixture")
ROWS: dict[str, Callable[[StudyContext], Iterator[dict]]] = {
    study.__name__: study for study in (compatibility, connectivity, similarity, distance, recipes, mixture)}


if __name__ == "__main__":
    run(main)
