"""What is true of an outdated delta? The paper's studies (README, The method: 1 to 4), as rows, a table and figures.

    python analyze.py --study connectivity                      # on the demo lineage; builds what is missing
    python analyze.py --study compatibility --bases runs/mine/M0,runs/mine/M1,runs/mine/M2 --tasks my_task --seeds 0,1,2
    python analyze.py --study similarity --independent runs/ind/M0 --heads 0.1,3.2 --sentence "Return the complete graph."

Studies: compatibility (the first base's delta on all later ones), connectivity (the path between two tuned models), similarity
(attention heads and hidden states), distance (of weights). A delta of every base, task and seed is looked for beside its base, as
deltas/BASE-TASK-KIND-sSEED. Where one of a task is missing, deltas for all are tuned alike by train.py, as
deltas/BASE-TASK-KIND-nSTEPS-sSEED. An independent base shares sizes and tokenizer with the others and nothing else:
train.py --tokenizer runs/demo/tokenizer.json --seed 1 --stream python --out runs/ind.

--out gets rows.jsonl, summary.json, and figures made from these rows as .png and .svg (pip install -e '.[plot]').
"""
import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Callable, Iterator

import torch

from data.sources import task_path
from rt import analysis
from rt.data import Example, Task, encode
from rt.deltas import Base, Delta, apply, check_fits
from rt.errors import InputError, StaleDelta
from rt.formats.atomic import locked
from rt.formats.files import FIGURES, check_overwritable, read_rows, write_json
from rt.formats.hub import open_base, open_delta, place_of_delta
from rt.formats.tasks import load_task
from rt.kinds import KINDS
from rt.losses import weights_of
from rt.model import Classifier
from rt.report import figures
from rt.runs.build import build, build_lineage
from rt.runs.config import parse, record, require_positive, require_seeds, require_seq_len, run
from rt.runs.log import Log, progress, table
from rt.speed.device import make_deterministic, pick_device, pick_precision
from rt.tune import TaskData, TuneSettings, chance, encode_task, evaluate


@dataclass
class Config:
    """python analyze.py --study compatibility|connectivity|similarity|distance [--flag value ...]"""
    study: str = "connectivity"  # compatibility, connectivity, similarity or distance
    bases: tuple[str, ...] = ("runs/demo/M0", "runs/demo/M1", "runs/demo/M2")  # M_0, M_1, ... in order
    independent: str | None = None  # M_IND: same sizes and tokenizer, another random start
    tasks: tuple[str, ...] = ("math",)  # embedded domains, or folders with train, dev and test
    delta: str = "full"  # full, adapter, lora, bitfit or prefix
    deltas: tuple[str, ...] = ()  # folders, one a base in order, the independent one last (one task, one seed); default: found or tuned
    seeds: tuple[int, ...] = (0,)  # of the deltas
    neighbours: bool = False  # pair each base with the next one instead of with the first
    points: int = 26  # connectivity: on a path, ends included
    curve: bool = False  # connectivity: train a curved path as well
    curve_steps: int = 100  # optimizer steps of its control point
    curve_lr: float = 1e-3  # their peak learning rate
    batch_size: int = 16  # sequences of such a step
    heads: tuple[str, ...] = ()  # similarity: LAYER.HEAD of the maps drawn, from 0; default: head 0 of first, middle and last layer
    sentence: str | None = None  # similarity: whose maps are drawn; default: the test text of nearest to 16 tokens
    max_examples: int = 64  # similarity: test texts compared
    tune_steps: int = 100  # optimizer steps of a delta that is missing; all else as in train.py
    seq_len: int = 64  # longest text in tokens, longer ones are cut
    out: str | None = None  # folder to write; default runs/analyze/STUDY
    cache: str = "runs/cache"  # the embedded data
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # bf16, fp32, or auto: bf16 where the device does it fast
    deterministic: bool = False  # the same bits from the same command on a GPU too; on a CPU they are so anyway


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.study not in STUDIES:
        raise InputError(f"--study {c.study}: not one of {', '.join(STUDIES)}")
    if c.delta not in KINDS:
        raise InputError(f"--delta {c.delta}: not one of {', '.join(KINDS)}")
    require_positive(c, "bases", "tasks", "points", "curve_steps", "curve_lr", "max_examples", "tune_steps", "batch_size", "seq_len")
    require_seeds(*c.seeds)
    require_seq_len(c.seq_len)
    if c.points < 2 or len(c.bases) + bool(c.independent) < 2:
        raise InputError(f"--points {c.points} and --bases {','.join(c.bases)}: a study needs two points and two bases at least")
    if c.deltas and (len(c.deltas) != len(c.bases) + bool(c.independent) or len(c.tasks) * len(c.seeds) > 1):
        raise InputError(f"--deltas {','.join(c.deltas)}: give one folder a base, for one task and one seed")
    if c.study == "compatibility" and c.independent:
        raise InputError("--independent: compatibility follows one lineage; leave it out")
    if c.deterministic:
        make_deterministic()
    record(c)       # now rather than at the end: what cannot be recorded
    study, out = STUDIES[c.study], Path(c.out or f"runs/analyze/{c.study}")
    drawn = {f"{name}.{ending}" for name in figures.OF_STUDY[c.study] for ending in ("png", "svg")}
    check_overwritable(out, {"rows.jsonl", "summary.json", FIGURES, *drawn})
    with locked(out):
        conduct(c, study, out)


def conduct(c: Config, study: "Study", out: Path) -> None:
    """Rows as they come, then the numbers and figures made from them."""
    lab = open_lab(c)
    rows = study.rows(lab)
    first = next(rows)      # what is wrong with the flags of this study shows here, before anything is written
    log = Log(out, name="rows.jsonl")
    for row in chain([first], rows):      # as they come: a study that is killed leaves what it has
        log.row(**row)
    numbers = study.numbers(read_rows(log.path))
    write_json(out / "summary.json", {"study": c.study, "numbers": numbers, "deltas": lab.about, "config": record(c), "argv": sys.argv})
    print(table([[shown(v) for v in row.values()] for row in numbers], [k.replace("_", " ") for k in numbers[0]]))
    print(f"rows in {out / 'rows.jsonl'}, {draw(c.study, out)}")


def shown(value: object) -> str:
    """A cell: a name, or mean ± 95% interval of the values of all seeds."""
    if not isinstance(value, list):
        return str(value)
    mean, half = figures.interval(value)
    digits = 5 if 0 < abs(mean) < 0.01 else 3
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def draw(study: str, out: Path) -> str:
    """The figures, from the rows on disk; returns what there is to say of them."""
    try:
        names = figures.of_study(study, read_rows(out / "rows.jsonl"), out)
    except InputError as error:
        return f"no figure: {error}"
    return "figures " + ", ".join(str(out / f"{name}.png") for name in names)


# --- bases and deltas -------------------------------------------------------------------------------------------------

@dataclass
class Lab:
    """What a study works on. `folders`: where a base is, by name; the independent one is called IND."""
    c: Config
    folders: dict[str, str]
    bases: dict[str, Base]
    data: dict[str, TaskData]
    deltas: dict[tuple[str, str, int], Delta]
    about: list[dict]
    where: dict = field(default_factory=dict)

    @property
    def first(self) -> str:
        return next(iter(self.bases))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The first base (or the one before) with each later one; the independent one always with the first."""
        names = [name for name in self.bases if name != "IND"]
        found = list(pairwise(names)) if self.c.neighbours else [(names[0], name) for name in names[1:]]
        return found + [(names[0], "IND")] * ("IND" in self.bases)

    def cells(self) -> Iterator[tuple[str, int, dict]]:
        """(task, seed, what a row says of them)."""
        for task in self.data:
            for seed in self.c.seeds:
                yield task, seed, {"study": self.c.study, "task": task, "kind": self.c.delta, "seed": seed}

    def tuned(self, base: str, task: str, seed: int) -> Classifier:
        return apply(self.bases[base], self.deltas[base, task, seed]).eval()


def open_lab(c: Config) -> Lab:
    """Bases, tasks and deltas of the flags, those deltas tuned that are missing. InputError where they do not fit together."""
    device = pick_device(c.device)
    where = {"device": device, "precision": pick_precision(c.precision, device)}
    folders = {Path(b).name: b for b in c.bases} | ({"IND": c.independent} if c.independent else {})
    tasks = [load_task(task_path(name, c.cache)) for name in c.tasks]
    if len(folders) < len(c.bases) + bool(c.independent) or len({task.name for task in tasks}) < len(tasks):
        raise InputError(f"--bases {','.join(c.bases)}, --tasks {','.join(c.tasks)}: two have the same name; rename one of the folders")
    build_lineage(c, Path(Config.bases[0]).parent, c.bases)
    bases = {name: open_base(folder).to(device) for name, folder in folders.items()}
    first = next(iter(bases))
    for name, base in bases.items():
        base.require_length(c.seq_len)
        if sizes(base) != sizes(bases[first]):
            raise InputError(f"{folders[name]}: other sizes or another tokenizer than {folders[first]}; models are compared weight by "
                             "weight, on the same tokens")
    data = {task.name: encode_task(task, bases[first].tokenizer, c.seq_len) for task in tasks}
    lab = Lab(c, folders, bases, data, {}, [], where)
    for entry, task in zip(c.tasks, tasks):
        for key, folder in delta_folders(c, folders, entry, task).items():
            lab.deltas[key] = checked_delta(folder, bases[key[0]], task, c.delta)
            facts = lab.deltas[key].info
            lab.about.append({"base": key[0], "task": key[1], "seed": key[2], "folder": str(folder), "step": facts.get("step"),
                              "dev": facts.get("dev"), "test": facts.get("test")})
    say_unequal(c, list(lab.deltas.values()))
    return lab


def say_unequal(c: Config, deltas: list[Delta]) -> None:
    """On stderr, where the deltas that were found were not learned alike, or not on texts as long as they are compared on."""
    lengths = {delta.seq_len for delta in deltas if delta.seq_len} | {c.seq_len}
    steps = {config.get("tune_steps") for delta in deltas if isinstance(config := delta.info.get("config"), dict)}
    if len(lengths) > 1:
        theirs = " and ".join(str(n) for n in sorted(lengths - {c.seq_len}))
        print(f"note: deltas learned on texts of up to {theirs} tokens are compared at --seq_len {c.seq_len}", file=sys.stderr)
    if len(steps) > 1:
        print(f"note: the deltas were tuned for unequal numbers of steps ({', '.join(sorted(map(str, steps)))})", file=sys.stderr)


def sizes(base: Base) -> dict:
    """What two bases must have in common to be compared."""
    return {k: v for k, v in asdict(base.encoder.config).items() if "dropout" not in k} | {"vocabulary": base.tokenizer.vocabulary}


def checked_delta(folder: Path, base: Base, task: Task, kind: str) -> Delta:
    """InputError unless the delta in `folder` is of this kind, task and base."""
    delta = open_delta(str(folder), base).ordered(task.labels)
    if delta.config.kind != kind:
        raise InputError(f"{folder}: is a delta of kind {delta.config.kind}, and what is asked for is --delta {kind}")
    if delta.labels != task.labels:
        raise InputError(f"{folder}: tells apart {', '.join(delta.labels[:6])}, the task {task.name} {', '.join(task.labels[:6])}")
    try:
        check_fits(base, delta, stale_ok=False)
    except StaleDelta as error:
        raise InputError(f"{folder}: {error}") from None
    return delta


def delta_folders(c: Config, folders: dict[str, str], entry: str, task: Task) -> dict[tuple[str, str, int], Path]:
    """Where the delta of each (base, task, seed) is; tuned where it is not. All or none: one comparison, one number of steps."""
    if c.deltas:
        return {(name, task.name, c.seeds[0]): Path(folder) for name, folder in zip(folders, c.deltas)}

    def place(name: str, seed: int, steps: str) -> Path:
        return place_of_delta(folders[name], task.name, c.delta, steps, seed)

    keys = [(name, seed) for name in folders for seed in c.seeds]
    if all((place(*key, "") / "delta.json").exists() for key in keys):
        return {(name, task.name, seed): place(name, seed, "") for name, seed in keys}
    found = {}
    for name, seed in keys:
        found[name, task.name, seed] = folder = place(name, seed, f"-n{c.tune_steps}")
        if not (folder / "delta.json").exists():
            build(c, f"the delta {folder}", mode="tune", out=folder, base=folders[name], task=entry, seed=seed, delta=c.delta,
                  tune_steps=c.tune_steps, seq_len=c.seq_len)
    return found


# --- the studies: their rows (the numbers and figures made of these: rt/figures.py) -----------------------------------

def compatibility(lab: Lab) -> Iterator[dict]:
    """Delta_0 on every later base and on the snapshots on the way there; chance; what is tuned on each base itself."""
    later = list(lab.bases)[1:]
    with progress(len(lab.data) * len(lab.c.seeds) * len(later), "compatibility", unit="base") as bar:
        for task, seed, same in lab.cells():
            old, data = lab.deltas[lab.first, task, seed], lab.data[task]

            def line(kind: str, base: str, stage: int, t: int | None, model: Classifier) -> dict:
                return same | {"base": base, "stage": stage, "t": t, "line": kind, **evaluate(model, data.test, **lab.where)}

            own = line("own", lab.first, 0, None, apply(lab.bases[lab.first], old))
            yield from (own, own | {"line": "apply"}, same | {"base": lab.first, "stage": 0, "t": None, "line": "chance", **chance(data)})
            for stage, name in enumerate(later, 1):
                for t, folder in snapshots(Path(lab.folders[name])):
                    base = open_base(str(folder)).to(lab.where["device"])
                    yield line("apply", folder.name, stage, t, apply(base, old, stale_ok=True))
                yield line("apply", name, stage, None, apply(lab.bases[name], old, stale_ok=True))
                yield line("tuned", name, stage, None, lab.tuned(name, task, seed))
                bar.update()


def snapshots(base: Path) -> list[tuple[int, Path]]:
    """(t, folder) of the checkpoints M_i(t) beside M_i."""
    found = [(f.name.removeprefix(f"{base.name}-t"), f) for f in base.parent.glob(f"{base.name}-t*") if (f / "meta.json").exists()]
    return sorted((int(t), f) for t, f in found if t.isdecimal())


def connectivity(lab: Lab) -> Iterator[dict]:
    """Loss and metrics on test along the path between two tuned models."""
    c = lab.c
    points = [i / (c.points - 1) for i in range(c.points)]
    for task, seed, same in lab.cells():
        data, settings = lab.data[task], TuneSettings(c.curve_steps, c.batch_size, c.curve_lr, c.curve_steps, seed)
        for pair in lab.pairs:
            a, b = (lab.tuned(base, task, seed) for base in pair)
            ends = weights_of(a), weights_of(b)
            ways = {"linear": analysis.linear(*ends)}
            if c.curve:
                ways["curve"] = analysis.bezier(ends[0], analysis.train_control(b, *ends, data, settings, **lab.where), ends[1])
            for name, way in ways.items():
                for row in analysis.walk(b, way, points, data.test, **lab.where):
                    yield same | {"pair": "-".join(pair), "path": name, **row}


def similarity_rows(lab: Lab) -> Iterator[dict]:
    """Heads against heads and layers against layers over test texts; the maps of a few heads on one text, of the first seed."""
    c, device = lab.c, lab.where["device"]
    heads, drawn = chosen_heads(c, lab.bases[lab.first]), {task: sentence(lab, task) for task in lab.data}
    with progress(len(lab.data) * len(c.seeds) * len(lab.pairs), "similarity", unit="pair") as bar:
        for task, seed, same in lab.cells():
            models = {name: lab.tuned(name, task, seed) for name in lab.bases}
            if seed == c.seeds[0]:
                for name, model in models.items():
                    maps = analysis.attention_maps(model, drawn[task], device)
                    for layer, head in heads:
                        yield same | {"what": "attention", "base": name, "layer": layer, "head": head,
                                      "tokens": words(lab, drawn[task]), "map": rounded(maps[layer, head])}
            sequences = lab.data[task].test.sequences[:c.max_examples]
            for pair in lab.pairs:
                a, b = (models[name] for name in pair)
                matrix = analysis.head_divergence(a, b, sequences, device)
                alike = analysis.cka(a, b, sequences, device)
                yield same | {"what": "heads", "pair": "-".join(pair), "heads": lab.bases[lab.first].encoder.config.num_heads,
                              "sequences": len(sequences), **analysis.match_summary(matrix), "own_of_head": rounded(matrix.diagonal()),
                              "best_of_head": rounded(matrix.amin(1)), "match_of_head": matrix.argmin(1).tolist(),
                              "divergence": rounded(matrix), "cka_own": alike.diagonal().mean().item(), "cka": rounded(alike)}
                bar.update()


def chosen_heads(c: Config, base: Base) -> list[tuple[int, int]]:
    L, H = base.encoder.config.num_layers, base.encoder.config.num_heads
    known = {f"{layer}.{head}": (layer, head) for layer in range(L) for head in range(H)}
    for name in c.heads:
        if name not in known:
            raise InputError(f"--heads {name}: not a LAYER.HEAD of this model, 0.0 to {L - 1}.{H - 1}")
    return [known[name] for name in c.heads or dict.fromkeys((f"{layer}.0" for layer in (0, L // 2, L - 1)))]


def sentence(lab: Lab, task: str) -> list[int]:
    if lab.c.sentence is not None:
        return encode([Example(lab.c.sentence, None, None, "--sentence")], (), lab.bases[lab.first].tokenizer, lab.c.seq_len).sequences[0]
    return min(lab.data[task].test.sequences, key=lambda ids: abs(len(ids) - 16))


def words(lab: Lab, ids: list[int]) -> list[str]:
    """Each token as it may stand on an axis: no space around it, line breaks written out."""
    return [json.dumps(lab.bases[lab.first].tokenizer.decode([i]).strip(" "), ensure_ascii=False)[1:-1] for i in ids]


def rounded(values: torch.Tensor) -> list:
    return [round(v, 5) if isinstance(v, float) else [round(x, 5) for x in v] for v in values.tolist()]


def distance(lab: Lab) -> Iterator[dict]:
    """Between the encoders of two bases, and between their deltas, by part and in all. Without the head: it is kept as it is, not
    as a change, and equal seeds start it equal, which would pass for likeness. (So are a delta's modules, in the kinds that have them.)"""
    def pair_rows(same: dict, of: str, weights: dict[str, dict]) -> Iterator[dict]:
        for a, b in lab.pairs:
            yield from (same | {"pair": f"{a}-{b}", "of": of, **row} for row in analysis.distances(weights[a], weights[b]))

    none = {"study": lab.c.study, "task": None, "kind": None, "seed": None}
    yield from pair_rows(none, "bases", {name: dict(base.encoder.named_parameters()) for name, base in lab.bases.items()})
    for task, seed, same in lab.cells():
        own = {name: lab.deltas[name, task, seed] for name in lab.bases}
        yield from pair_rows(same, "deltas", {name: delta.diffs | delta.modules for name, delta in own.items()})


@dataclass(frozen=True)
class Study:
    rows: Callable[[Lab], Iterator[dict]]
    numbers: Callable[[list[dict]], list[dict]]     # a dict a line of the table: names, and lists with a value a seed


STUDIES = {"compatibility": Study(compatibility, figures.compatibility_numbers),
           "connectivity": Study(connectivity, figures.connectivity_numbers),
           "similarity": Study(similarity_rows, figures.similarity_numbers), "distance": Study(distance, figures.distance_numbers)}


if __name__ == "__main__":
    run(main)
