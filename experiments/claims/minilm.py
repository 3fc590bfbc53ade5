"""The claims on a base that was really pre-trained: PLAN.md's runs, by the product's scripts. Resumable.

    python -m experiments.minilm --data DIR                             # M0, once
    python -m experiments.claims.minilm --data DIR                      # some 20 hours on 2 cores, in any number of pieces
    python -m experiments.claims.minilm --data DIR --only lineage,parts --lineages 0 --budget 3000
    python -m experiments.claims --report                               # results/claims/README.md, from the rows alone
"""
import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Iterator, Literal

import torch

from experiments.common import cells_to_do, check_places, do_cells, made_on, script
from experiments.recipes import runs as recipes
from experiments.recipes.plan import KINDS, TASKS
from experiments.twin import save_twin
from rt.data import encode_task, few_shot
from rt.deltas import INPUT, Base, Delta, apply
from rt.errors import InputError
from rt.formats.delta_files import load_delta
from rt.formats.files import read_json, read_rows
from rt.formats.hub import open_base
from rt.formats.tasks import load_task
from rt.limits import Positive, Seeds
from rt.losses import DistillConfig
from rt.model import MaskedLM
from rt.recycling import Recycling, recycle
from rt.report import analysis
from rt.runs.config import changed, parse, run
from rt.runs.summary import group
from rt.speed.device import pick_precision
from rt.tune import TuneSettings, evaluate

DOMAINS, LINEAGES, CPU = ("bio", "rev", "cs", "ns"), (0, 1, 2, 3), torch.device("cpu")
UPGRADE = "--steps 200 --batch_tokens 1024 --seq_len 128 --lr 5e-4 --snapshots 3 --device cpu --threads 1".split()
RATES = {"full": ("2e-5", "5e-5", "2e-4"), "adapter": ("3e-4", "1e-3", "3e-3")}
FEW_SEEDS, PILOT = {0: "0,3,6", 1: "1,4,7", 2: "2,5", 3: "8,9"}, (100, 101)     # few-shot seeds by lineage
FEW = "--shots 32 --steps 100 --eval_every 25 --device cpu --no_save_deltas".split()
ALL = "--shots none --eval_every 25 --device cpu --no_save_deltas".split()
PILOT_TASK, FULL_TASKS, TASKS_OF_PATHS = "rotten_tomatoes", ("chemprot", "rotten_tomatoes"), ("rotten_tomatoes", "agnews", "chemprot")
SENTIMENT, OTHER = {"imdb": "rotten_tomatoes", "rotten_tomatoes": "imdb"}, "agnews"     # the similar task of each; the different one
SCALES = (0.0, 0.25, 0.5, 0.75, 1.25, 1.5)
PATHS = {"old_base", "old_delta", "base", "task", "source_task", "source_delta"}    # settings of recycle.py's rows
HEAD_TEXTS = 50     # texts on which bare bases' attention heads are compared
PARTS = ("lineage", "parts", "pilot", "few", "order", "project", "paths", "full", "domains")


@dataclass
class Config:
    """python -m experiments.claims.minilm --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/ and tasks/
    base: str = "runs/minilm/pretrained/M0"  # M0
    model: Literal["minilm", "mini"] = "minilm"  # mini: M0 is of the mini preset, and the part domains is done with the seed of M0
    only: tuple[Literal[PARTS], ...] = ()  # parts: lineage, parts, pilot, few, order, project, paths, full, domains; default: all
    lineages: Seeds = LINEAGES  # those to do
    where: tuple[str, ...] = ()  # facts of the cells to do, such as task=agnews,kind=full; default: all
    budget: Positive | None = None  # seconds; nothing new begins after them
    home: str = "runs/claims/minilm"  # bases, deltas and runs
    recipes: str = "runs/recipes"  # tasks and deltas of M0, shared with experiments.recipes
    cache: str = "runs/cache"  # tokenized corpora
    results: str = "results/claims"  # minilm.jsonl, mini.jsonl


def main() -> None:
    c = parse(Config, sys.argv[1:])
    check_places("claims.minilm", c.data, c.base)
    if c.model != "minilm" and not {"home", "recipes"} <= changed(c).keys():
        raise InputError(f"--model {c.model}: give it a --home and a --recipes of its own; those by default are for MiniLM")
    path = Path(c.results) / f"{c.model}.jsonl"
    facts = made_on(CPU)
    recipes.draw_tasks(shared(c))
    every = cells() if c.model == "minilm" else orders(M0=read_json(Path(c.base) / "meta.json")["config"]["seed"])
    todo = [cell for cell in cells_to_do(path, [*every], c.where)
            if cell.get("lineage", c.lineages[0]) in c.lineages and (not c.only or cell["part"] in c.only)]
    do_cells(path, todo, c.budget, lambda cell: [facts | row for row in DO[cell["part"]](c, cell)])


def cells() -> Iterator[dict]:
    """The facts of every cell of the plan, in its order."""
    yield {"part": "pilot"}
    yield from orders()
    for lineage in LINEAGES:
        def each(part: str, **choices) -> Iterator[dict]:
            yield from ({"part": part, "lineage": lineage} | dict(zip(choices, values)) for values in product(*choices.values()))

        yield from each("lineage")
        if lineage < 3:     # the fourth lineage serves C1 and the quantities that have only two tasks
            yield from each("parts", base=("M1", "M4"))
            yield from each("few", task=(PILOT_TASK, *(task for task in TASKS if task != PILOT_TASK)), kind=KINDS,
                            mode=("scratch", "init", "distill", "init+distill"))
            yield from each("paths", task=TASKS_OF_PATHS)
        yield from each("order", task=SENTIMENT, kind=KINDS, near=("same", "similar", "different"))
        yield from each("project", task=SENTIMENT)
        yield from each("full", task=FULL_TASKS, kind=KINDS)


def orders(**facts: int) -> Iterator[dict]:
    """The cells of the part `domains`, each with `facts`."""
    return ({"part": "domains", "first": first} | facts for first in DOMAINS)


# --- places -----------------------------------------------------------------------------------------------------------

def shared(c: Config) -> recipes.Config:
    return recipes.Config(c.data, c.base, c.model, home=c.recipes, cache=c.cache)


def task_folder(c: Config, task: str) -> Path:
    return recipes.task_folder(shared(c), task)


def delta_0(c: Config, task: str, kind: str, lineage: int) -> Path:
    """Delta_0, tuned if it is missing."""
    if not (folder := recipes.delta_folder(shared(c), task, kind, lineage)).exists():
        recipes.tune_delta(shared(c), task, kind, lineage)
    return folder.absolute()


def order_from(first: str) -> tuple[str, ...]:
    """The domains in cyclic order, from `first` on."""
    return DOMAINS[(i := DOMAINS.index(first)):] + DOMAINS[:i]


def base_folder(c: Config, name: str, lineage: int, first: str = DOMAINS[0]) -> Path:
    """M0, TWIN, or a base of a lineage that begins with the domain `first`; made if it is missing."""
    if name == "M0":
        return Path(c.base).absolute()
    if name == "TWIN":
        if not (out := Path(c.home, "TWIN").absolute()).exists():
            save_twin(c.base, out)
        return out
    out = Path(c.home, f"lineage{lineage}" + f"-{first}" * (first != DOMAINS[0])).absolute()
    if not (out / "summary.json").exists():
        script(c, "train.py", "--init", Path(c.base), "--stream", ",".join(str(Path(c.data, "corpora", f"{d}.txt.xz").absolute())
                                                                        for d in order_from(first)),
               "--seed", lineage, *UPGRADE, "--cache", Path(c.cache), out=out)
    return out / name


def tuned(c: Config, base: str, task: str, kind: str, lineage: int) -> Path:
    """A delta of a base other than M0, tuned like Delta_0 if it is missing."""
    out = Path(c.home, "deltas", f"{base}-{task}-{kind}-l{lineage}").absolute()
    if not out.exists():
        script(c, "train.py", *recipes.tuning(shared(c), base_folder(c, base, lineage), task, kind, lineage, out))
    return out


# --- one cell ---------------------------------------------------------------------------------------------------------

def recycled(c: Config, cell: dict, mode: str, *flags: object, source: str | None = None) -> list[dict]:
    """Run recycle.py on M1 of the cell's lineage, from Delta_0 of the cell's task or of `source`, at the rates of the cell's kind; a row
    per run, with M0's fingerprint and the dev score of Delta_0. `flags` overrule."""
    lineage, task, kind = cell.get("lineage", 0), cell.get("task", PILOT_TASK), cell.get("kind", "adapter")
    out = Path(c.home, "runs", "-".join(map(str, cell.values()))).absolute()
    command = script(c, "recycle.py", "--mode", mode, "--old_base", Path(c.base), "--old_delta", delta_0(c, source or task, kind, lineage),
                     "--base", base_folder(c, "M1", lineage), "--task", task_folder(c, task), "--delta", kind, "--lr",
                     ",".join(RATES[kind]), "--seq_len", TASKS[task], "--cache", Path(c.cache), *flags, out=out)
    kept = ("mode", "seed", "lr", "dev", "test", "best_step", "steps_to_scratch_best", "settings", "projection", "curve")
    rows = read_json(out / "summary.json")["rows"]
    for row in rows:        # the command names these, without the machine's folders
        row["settings"] = {k: v for k, v in row["settings"].items() if k not in PATHS}
    old = {"M0": read_json(Path(c.base) / "meta.json")["fingerprint"],
           "old_dev": recipes.dev_score(shared(c), source or task, kind, lineage)}
    return [{k: row[k] for k in kept if row.get(k) is not None} | old | {"command": command} for row in rows]


def lineage(c: Config, cell: dict) -> list[dict]:
    """Every base with its snapshots: held-out losses, `apply` of all Delta_0, distance from M0. M0's row also has dev scores."""
    L = cell["lineage"]
    rows = [row for _, row in measured(c, L, upgrades(c, L), KINDS)]
    return [{"base": "M0", "l2": 0.0, **recipes.score_base(shared(c), L)[0]}, *rows]


def upgrades(c: Config, lineage: int, first: str = DOMAINS[0]) -> list[Path]:
    """The bases of a lineage and their snapshots."""
    return sorted(meta.parent for meta in base_folder(c, "M1", lineage, first).parent.glob("M*/meta.json"))


def measured(c: Config, seed: int, folders: list[Path], kinds: tuple[str, ...]) -> Iterator[tuple[Base, dict]]:
    """Each base with its held-out losses, the scores of `apply`, and its distance from M0."""
    for task, kind in product(TASKS, kinds):
        delta_0(c, task, kind, seed)
    M0 = dict(open_base(c.base).encoder.named_parameters())
    for folder in folders:
        base = open_base(str(folder))
        yield base, {"base": folder.name, **recipes.scores(shared(c), folder, seed, ("wiki", *DOMAINS), kinds),
                     "l2": analysis.distances(M0, dict(base.encoder.named_parameters()))[-1]["l2"]}


def domains(c: Config, cell: dict) -> list[dict]:
    """Every base of a lineage that passes the domains from `first` on: held-out losses, `apply` of the full Delta_0, distance from M0, and
    the share of heads that match M0's same head best. Bases are compared without a delta. M0's row also has the deltas' dev scores."""
    M0, rows, seed = open_base(c.base), [], cell.get("M0", 0)
    texts = recipes.data_of(task_folder(c, PILOT_TASK), c.base, TASKS[PILOT_TASK]).test.sequences[:HEAD_TEXTS]
    for base, row in measured(c, seed, [Path(c.base), *upgrades(c, seed, cell["first"])], ("full",)):
        heads = analysis.head_divergence(*(MaskedLM(one.encoder, one.head) for one in (M0, base)), texts, CPU)
        rows.append(row | {"heads_kept": analysis.match_summary(heads)["share_own_best"]})
    rows[0]["dev"] = recipes.dev_scores(shared(c), seed, ("full",))
    return rows


def parts(c: Config, cell: dict) -> list[dict]:
    """`apply` of Delta_0 scaled, and of parts of Delta_0."""
    base, rows = open_base(str(base_folder(c, cell["base"], cell["lineage"]))), []
    compute = {"device": CPU, "precision": pick_precision("auto", CPU)}
    for task, kind in product(TASKS, KINDS):
        data = recipes.data_of(task_folder(c, task), c.base, TASKS[task])
        delta = load_delta(delta_0(c, task, kind, cell["lineage"])).ordered(data.labels)
        models = {f"scale {a:g}": partial_apply(base, delta, a) for a in SCALES}
        layers = base.encoder.config.num_layers
        models |= {"head": partial_apply(base, delta, 0.0), "norms": partial_apply(base, delta, 1.0, "norm")}
        models |= {f"last {k}": partial_apply(base, delta, 1.0, *(f".layers.{i}." for i in range(layers - k, layers))) for k in (1, 2, 4)}
        scored = {name: evaluate(model, data.test, **compute)["accuracy"] for name, model in models.items()}
        few = encode_task(few_shot(load_task(task_folder(c, task)), 32, cell["lineage"]), base.tokenizer, TASKS[task])
        unnamed = replace(delta, info=delta.info | {"labels": [f"old {label}" for label in delta.labels]})     # so its head is replaced
        r = Recycling(open_base(c.base), unnamed, base, replace(few, test=data.test), delta.config, TuneSettings(0, 16, 0.0, 1, 0),
                      DistillConfig(), **compute, head="prototype")
        rows.append({"task": task, "kind": kind, "accuracy": scored | {"body, prototypes": recycle(r, "apply")[1].test["accuracy"]}})
    return rows


def partial_apply(base: Base, delta: Delta, scale: float, *parts: str):
    """`apply` of `scale` times the tensors whose names hold one of `parts` (all without parts); the others change nothing."""
    kept = delta if not parts else delta.map(lambda name, v: v if name.startswith("head.") or delta.role(name) == INPUT
                                             or any(part in name for part in parts) else 0.0 * v)
    return apply(base, kept, scale, stale_ok=True)


def pilot(c: Config, cell: dict) -> list[dict]:
    """alpha, beta and T of the modes with a teacher, on dev; test is scored by the sweep and not kept."""
    grid = f"seed={','.join(map(str, PILOT))} alpha=.7,.9 beta=0,10 T=5,10"
    flags = ("--shots", 32, "--steps", 100, "--eval_every", 25, "--device", "cpu", "--sweep", grid)
    return [{"kind": kind} | {k: v for k, v in row.items() if k != "test"} for kind in KINDS
            for row in recycled(c, cell | {"kind": kind}, "distill,init+distill", "--lr", RATES[kind][1], *flags)]


@cache
def distilling(results: str) -> tuple[object, ...]:
    """The flags of distillation that the pilot chose: best by mean dev over modes, kinds and seeds."""
    found = group([{**row, **{k: row["settings"][k] for k in ("alpha", "beta", "T")}} for row in read_rows(Path(results) / "minilm.jsonl")
                   if row["cell"]["part"] == "pilot"], "alpha", "beta", "T")
    if not found:
        raise InputError("modes with a teacher take alpha, beta and T from the pilot: run --only pilot first")
    best = max(found, key=lambda key: mean(row["dev"]["accuracy"] for row in found[key]))
    return tuple(x for pair in zip(("--alpha", "--beta", "--T"), best) for x in pair)


def few(c: Config, cell: dict) -> list[dict]:
    taught = distilling(c.results) if "distill" in cell["mode"] else ()
    return recycled(c, cell, cell["mode"], *FEW, "--seeds", FEW_SEEDS[cell["lineage"]], *taught)


def order(c: Config, cell: dict) -> list[dict]:
    """`init` from the body of the same, a similar or a different task. recycle.py gives fresh heads where labels differ. The labels of the
    old delta are renamed, so that they always do."""
    source = {"same": cell["task"], "similar": SENTIMENT[cell["task"]], "different": OTHER}[cell["near"]]
    task = Path(c.home, "tasks", f"{cell['task']}-renamed").absolute()
    if not task.exists():
        task.mkdir(parents=True)
        for file in task_folder(c, cell["task"]).glob("*.jsonl"):
            rows = [row | {"label": f"new {row['label']}"} for row in read_rows(file)]
            (task / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return recycled(c, cell, "init", *FEW, "--seeds", FEW_SEEDS[cell["lineage"]], "--task", task, source=source)


def project(c: Config, cell: dict) -> list[dict]:
    """The flat map of adapters, and the control: the source's own delta, tuned on M1, put on the target."""
    L, target, source = cell["lineage"], cell["task"], SENTIMENT[cell["task"]]
    rows = recycled(c, cell, "project", "--source_task", task_folder(c, source), "--source_delta", delta_0(c, source, "adapter", L),
                    "--granularity", "flat", "--project_steps", 300, "--seeds", L, *ALL)
    own = load_delta(tuned(c, "M1", source, "adapter", L))
    data = recipes.data_of(task_folder(c, target), c.base, TASKS[target])
    model = apply(open_base(str(base_folder(c, "M1", L))), own)     # both tasks sort their labels from negative to positive
    return [*rows, {"mode": "source's own", "seed": L, "test": evaluate(model, data.test, CPU, pick_precision("auto", CPU))}]


def paths(c: Config, cell: dict) -> list[dict]:
    """Barriers and similarity of heads between tuned models on M0, M1, M4 and TWIN."""
    L, task, rows = cell["lineage"], cell["task"], []
    deltas = [delta_0(c, task, "full", L), *(tuned(c, base, task, "full", L) for base in ("M1", "M4", "TWIN"))]
    for study in ("connectivity", "similarity"):
        out = Path(c.home, "studies", f"{study}-{task}-l{L}").absolute()
        bases = ",".join(str(base_folder(c, base, L)) for base in ("M0", "M1", "M4"))
        command = script(c, "analyze.py", "--study", study, "--bases", bases, "--independent", base_folder(c, "TWIN", L), "--tasks",
                         task_folder(c, task), "--deltas", ",".join(map(str, deltas)), "--seeds", L, "--seq_len", TASKS[task], "--device",
                         "cpu", *(("--points", 11) if study == "connectivity" else ()), "--out", out)
        rows += [{"study": study, "command": command} | row for row in read_json(out / "summary.json")["numbers"]]
    return rows


def full(c: Config, cell: dict) -> list[dict]:
    """All labels: scratch and init for 300 steps, scratch for 600."""
    flags = (*ALL, "--seeds", cell["lineage"])
    longer = recycled(c, cell | {"steps": 600}, "scratch", "--steps", 600, *flags)
    return recycled(c, cell, "scratch,init", "--steps", 300, *flags) + [row | {"mode": "scratch, 600 steps"} for row in longer]


DO = {part.__name__: part for part in (lineage, parts, pilot, few, order, project, paths, full, domains)}

if __name__ == "__main__":
    run(main)
