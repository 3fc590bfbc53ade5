"""The rows of analyze.py's studies. rt/report/analysis.py computes the values; rt/report/figures.py turns rows into numbers and figures."""
import glob
import json
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

from rt.data import Encoded, Example, Task, TaskData, encode, encode_task, few_shot
from rt.deltas import Base, Delta, apply
from rt.errors import Diverged, InputError
from rt.formats.corpora import build_corpus
from rt.formats.files import note, read_json
from rt.formats.hub import open_base
from rt.losses import DistillConfig, Weights, weights_of
from rt.model import Classifier, MaskedLM
from rt.pretrain import evaluate_mlm
from rt.recycling import Recycling, recycle
from rt.report import analysis
from rt.runs.build import default_rate
from rt.runs.log import progress
from rt.runs.upgrade import scored_rows
from rt.tune import TuneSettings, evaluate

HELDOUT_LENGTH, HELDOUT_TOKENS = 128, 16384     # tokens of the longest sequence, and tokens scored per domain


@dataclass
class StudyContext:
    """The inputs of a study. A base is named by its folder, the independent base is named IND."""
    c: Any      # the Config of analyze.py
    folders: dict[str, str]
    bases: dict[str, Base]
    tasks: dict[str, Task]
    data: dict[str, TaskData]
    where: dict     # device and precision
    corpora: dict[str, Path]    # the domains of --domains, by name
    deltas: dict[tuple[str, str, int], Delta] = field(default_factory=dict)     # by base, task and seed
    origins: list[dict] = field(default_factory=list)       # of the deltas, for the summary

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each later base paired with the first base (or the base before it); the independent base always with the first."""
        names = list(self.folders)[:-1] if self.c.independent else list(self.folders)
        found = list(pairwise(names)) if self.c.neighbours else [(names[0], name) for name in names[1:]]
        return found + [(names[0], "IND")] * bool(self.c.independent)

    def cells(self) -> Iterator[tuple[str, int, dict]]:
        """(task, seed, the fields that all rows of this task and seed share)."""
        for task, seed in product(self.data, self.c.seeds):
            part = {} if self.data[task].test else {"scored_on": "dev"}
            yield task, seed, {"study": self.c.study, "task": task, "kind": self.c.delta, "seed": seed, **part}

    def scored(self, task: str) -> Encoded:
        """The test part of a task, or dev if test has no labels."""
        return self.data[task].test or self.data[task].dev

    def tuned(self, base: str, task: str, seed: int) -> Classifier:
        return apply(self.bases[base], self.deltas[base, task, seed]).eval()


def compatibility(context: StudyContext) -> Iterator[dict]:
    """Scores of Delta_0 on every later base and its snapshots, of the delta tuned on each base itself, and of chance."""
    first, *later = context.bases
    given = {Path(folder).resolve() for folder in context.folders.values()}     # a snapshot may be one of --bases
    with progress(len(context.data) * len(context.c.seeds) * len(later), "compatibility", unit="base") as bar:
        for task, seed, facts in context.cells():
            old, data = context.deltas[first, task, seed], context.scored(task)

            def line(kind: str, base: str, stage: int, t: int | None, model: Classifier) -> dict:
                return facts | {"base": base, "stage": stage, "t": t, "line": kind, **evaluate(model, data, **context.where)}

            own = line("own", first, 0, None, apply(context.bases[first], old))
            guess = facts | {"base": first, "stage": 0, "t": None, "line": "chance", **analysis.chance(context.data[task])}
            yield from (own, own | {"line": "apply"}, guess)
            for stage, name in enumerate(later, 1):
                for t, folder in snapshots(Path(context.folders[name])):
                    if folder.resolve() in given:
                        continue
                    base = open_base(str(folder)).to(context.where["device"])
                    yield line("apply", f"{name}-t{t:05}", stage, t, apply(base, old, stale_ok=True))
                yield line("apply", name, stage, None, apply(context.bases[name], old, stale_ok=True))
                yield line("tuned", name, stage, None, context.tuned(name, task, seed))
                bar.update()


def snapshots(base: Path) -> list[tuple[int, Path]]:
    """(t, folder) of the checkpoints M_i(t) in the same folder as M_i."""
    folders = [meta.parent for meta in base.parent.glob(f"{glob.escape(base.name)}-t*/meta.json")]
    return sorted((int(t), folder) for folder in folders if (t := folder.name.removeprefix(f"{base.name}-t")).isdecimal())


def connectivity(context: StudyContext) -> Iterator[dict]:
    """Loss and metrics on test along the paths between two tuned models."""
    c = context.c
    points = [i / (c.points - 1) for i in range(c.points)]
    with progress(len(context.data) * len(c.seeds) * len(context.pairs) * (1 + c.curve) * c.points, "paths", unit="point") as bar:
        for (task, seed, facts), pair in product(context.cells(), context.pairs):
            a, b = (context.tuned(base, task, seed) for base in pair)
            ends = weights_of(a), weights_of(b)
            paths = {"linear": analysis.linear(*ends)}
            if c.curve:
                paths["curve"] = analysis.bezier(ends[0], control_point(context, b, ends, task, seed), ends[1])
            for name, path in paths.items():
                for row in analysis.walk(b, path, points, context.scored(task), **context.where):
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
    """All heads compared with all heads and layers with layers, on test texts; maps of a few heads on one text, for the first seed."""
    c, device, first = context.c, context.where["device"], next(iter(context.bases.values()))
    heads = chosen_heads(c, first)
    texts = {task: min(context.scored(task).sequences, key=lambda ids: abs(len(ids) - 16)) for task in context.data}
    if c.sentence is not None:
        given = encode([Example(c.sentence, None, None, "--sentence")], (), first.tokenizer, c.seq_len)
        texts = dict.fromkeys(texts, given.sequences[0])
    with progress(len(context.data) * len(c.seeds) * len(context.pairs), "similarity", unit="pair") as bar:
        for task, seed, facts in context.cells():
            models = {name: context.tuned(name, task, seed) for name in context.bases}
            # as labels of an axis: no space around a token, line breaks escaped
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
                yield facts | {"what": "heads", "pair": "-".join(pair), "bases": pair, "heads": first.encoder.config.num_heads,
                               "sequences": len(sequences), **analysis.match_summary(matrix), "own_of_head": rounded(matrix.diagonal()),
                               "best_of_head": rounded(matrix.amin(1)), "match_of_head": matrix.argmin(1).tolist(),
                               "divergence": rounded(matrix), "cka_own": alike.diagonal().mean().item(), "cka": rounded(alike)}
                bar.update()


def chosen_heads(c: Any, base: Base) -> list[tuple[int, int]]:
    L, H = base.encoder.config.num_layers, base.encoder.config.num_heads
    known = {f"{layer}.{head}": (layer, head) for layer, head in product(range(L), range(H))}
    for name in c.heads:
        if name not in known:
            raise InputError(f"--heads {name}: not a LAYER.HEAD of this model, 0.0 to {L - 1}.{H - 1}")
    return [known[name] for name in c.heads or dict.fromkeys((f"{layer}.0" for layer in (0, L // 2, L - 1)))]


def rounded(values: torch.Tensor) -> list:
    return values.double().round(decimals=5).tolist()


def distance(context: StudyContext) -> Iterator[dict]:
    """The distance between the encoders of two bases, and between their deltas, by part and in total. The head is left out: a delta holds
    the whole head, not a change, and equal seeds start heads equally, which would look like similarity. Modules, whole too, are counted."""
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
    base, losses = open_base(folder), {}
    if base.head is None:
        raise InputError(f"{folder}: has no masked-LM head, so no held-out loss")
    model = MaskedLM(base.encoder, base.head).to(context.where["device"])
    for name, path in context.corpora.items():
        corpus = build_corpus(name, path, base.tokenizer, context.c.cache)["heldout"]
        rows = scored_rows(corpus, base.tokenizer, min(HELDOUT_LENGTH, base.encoder.config.max_len))
        losses[name] = evaluate_mlm(model, rows, tokens=HELDOUT_TOKENS, **context.where)["loss"]
    return losses


def note_learned(context: StudyContext, domains: dict[str, str | None]) -> None:
    """Note on stderr if an upgrade learned a domain of another name than the last of --domains. `domains`: {base: domain it learned}."""
    last = [*context.corpora][-1]
    if other := [name for name, domain in domains.items() if domain and last not in (domain, *domain.split("+"))]:
        note(f"{other[0]} learned {domains[other[0]]}, and the study takes {last}, the last of --domains, for the new domain")


def recipes(context: StudyContext) -> Iterator[dict]:
    """For the old base and each upgrade: held-out losses and the distance from the old base. Then, by task and seed: the score of the old
    delta as it is, the share of attention heads that match themselves best, and the scores of init and scratch with few labels."""
    c, first, where = context.c, next(iter(context.bases)), context.where
    old, tokenizer = dict(context.bases[first].encoder.named_parameters()), context.bases[first].tokenizer
    samples = {(task, seed): encode_task(few_shot(whole, c.shots, seed) if c.shots else whole, tokenizer, c.seq_len)
               for task, whole in context.tasks.items() for seed in c.seeds}        # all, so one that fails ends it at once
    note_learned(context, {name: base.meta.get("domain") for name, base in context.bases.items() if name != first})
    with progress(len(context.bases) * (1 + len(context.data) * len(c.seeds)), "recipes", unit="row") as bar:
        for name, base in context.bases.items():
            whole = analysis.distances(old, dict(base.encoder.named_parameters()))[-1]
            yield {"study": c.study, "of": "base", "base": name, "heldout": heldout_losses(context, context.folders[name]),
                   "l2": whole["l2"], "cosine": whole["cosine"]}
            bar.update()
        for (task, seed, facts), name in product(context.cells(), context.bases):
            delta, base = context.deltas[first, task, seed], context.bases[name]
            there = apply(base, delta, stale_ok=True).eval()
            matrix = analysis.head_divergence(context.tuned(first, task, seed), there, context.scored(task).sequences[:c.max_examples],
                                              where["device"])
            trained = {} if name == first else {mode: few_shot_score(context, mode, name, task, seed, samples[task, seed])
                                                   for mode in ("scratch", "init")}
            yield facts | {"of": "delta", "base": name, **evaluate(there, context.scored(task), **where),
                           "heads_kept": analysis.match_summary(matrix)["share_own_best"], **trained}
            bar.update()


def few_shot_score(context: StudyContext, mode: str, name: str, task: str, seed: int, data: TaskData) -> float | None:
    """The test score of `mode` on an upgrade; if there is no test, the score on the whole dev, as for `apply`."""
    c, first = context.c, next(iter(context.bases))
    delta = context.deltas[first, task, seed]
    settings = TuneSettings(c.tune_steps, c.batch_size, c.lr or default_rate(c.delta), max(1, c.tune_steps // 5), seed)
    r = Recycling(context.bases[first], delta, context.bases[name], data, delta.config, settings, DistillConfig(), **context.where)
    model, result = recycle(r, mode)
    return next(iter((result.test or evaluate(model, context.scored(task), **context.where)).values()))


def mixture(context: StudyContext) -> Iterator[dict]:
    """Held-out losses of the old base and of every upgrade and its snapshots, with share of replay and number of steps."""
    first, *later = context.folders.values()
    places = [Path(place) for folder in later for place in (*(each for _, each in snapshots(Path(folder))), folder)]
    if len(places) < 3:
        raise InputError(f"--bases {','.join(later)}: are {len(places)} with their snapshots, and a law is fitted to three or more")
    metas = {str(place): read_json(place / "meta.json", {}) for place in places}
    if foreign := [place for place, meta in metas.items() if "step" not in meta]:
        raise InputError(f"--bases: {foreign[0]} has no meta.json with its steps and replay, as train.py writes it: leave it out")
    if mixed := [folder for folder in later if metas[str(Path(folder))].get("recipe", {}).get("mix")]:
        raise InputError(f"--bases: {mixed[0]} was trained with --mix, and the share of old text is read from --replay alone: leave it out")
    old = next(iter(context.bases.values()))
    parents = {old.fingerprint}
    if "trunk" in old.meta:     # an infinite schedule goes on from there
        parents.add(read_json(Path(first).parent / old.meta["trunk"] / "meta.json", {}).get("fingerprint"))
    if other := [place for place, meta in metas.items() if meta.get("parent", old.fingerprint) not in parents]:
        raise InputError(f"--bases: {other[0]} does not continue {first}, so its steps are not all that there were; leave it out")
    shares = {place: meta.get("recipe", {}).get("replay", 0.0) for place, meta in metas.items()}
    if len({*shares.values()}) < 2:
        raise InputError(f"--bases {','.join(later)}: all have one share of replay, and a law over shares needs two or more")
    note_learned(context, {place: meta.get("domain") for place, meta in metas.items()})
    if len({json.dumps(meta.get("recipe", {}) | {"replay": None}, sort_keys=True) for meta in metas.values()}) > 1:
        note("the upgrades differ in more than replay and steps, which is all that the law knows of (python -m rt.report.inspect FOLDER)")
    yield {"study": context.c.study, "base": first, "replay": None, "steps": 0, "heldout": heldout_losses(context, first)}
    with progress(len(places), "mixture", unit="base") as bar:
        for place, share in shares.items():
            yield {"study": context.c.study, "base": place, "replay": share, "steps": metas[place]["step"],
                   "heldout": heldout_losses(context, place)}
            bar.update()


ABOUT_UPGRADES = ("recipes", "mixture")
ROWS: dict[str, Callable[[StudyContext], Iterator[dict]]] = {
    study.__name__: study for study in (compatibility, connectivity, similarity, distance, recipes, mixture)}
