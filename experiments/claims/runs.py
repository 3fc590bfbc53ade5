"""Do one Run of the plan and return its rows. Several runs need the bases and tuned deltas, so these are kept under `home`."""
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from experiments.claims.plan import DOMAINS, UPGRADES, Run, Scale
from experiments.common import ROOT
from rt import transport
from rt.data import Encoded, Task, TaskData, encode_task, few_shot
from rt.deltas import Base, Delta, apply, attach, extract
from rt.errors import InputError
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.files import read_json
from rt.formats.hub import open_base
from rt.formats.tasks import load_task
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, weights_of
from rt.model import Classifier
from rt.recycling import Recycling, chain, recycle
from rt.report import analysis
from rt.speed.device import precision_name
from rt.tune import TuneResult, TuneSettings, evaluate, score, tune

ALPHA, BETA, T = 0.7, 1.0, 5.0      # in every arm with a teacher
GAMMA, ITP = 1.0, 2                 # in the arms with more terms
POINTS = 26                         # on a path, as in the paper
CONTROL_LR = 3e-4                   # of a curve's control point
TOKENIZER_SECONDS = 3600            # how long IND waits for the lineage's tokenizer


@dataclass
class Study:
    """The places of bases, deltas and tasks, and how runs are computed."""
    data: Path
    home: Path
    cache: Path
    preset: str
    scale: Scale
    device: torch.device
    precision: torch.dtype

    @property
    def compute(self) -> dict:
        """The arguments `device` and `precision`."""
        return {"device": self.device, "precision": self.precision}

    def base(self, name: str) -> Base:
        return _base(self.home / ("independent/M0" if name == "IND" else f"bases/{name}"), self.device)

    def delta_folder(self, base: str, task: str, kind: str, seed: int) -> Path:
        return self.home / "deltas" / f"{base}-{task}-{kind}-s{seed}"

    def delta(self, run: Run, base: str, task: str | None = None) -> Delta:
        return load_delta(self.delta_folder(base, task or run.task, run.kind, run.seed))

    def task(self, run: Run, base: Base, name: str | None = None) -> TaskData:
        """The encoded task, or its few-shot sample if the run is few-shot. Dev and test are the same draw of examples in every run."""
        task = _task(self.data / "tasks" / (name or run.task), self.scale.max_dev, self.scale.max_test)
        if run.shots:
            task = few_shot(task, run.shots, run.seed)
        return encode_task(task, base.tokenizer, self.scale.max_len)

    def settings(self, run: Run, lr: float) -> TuneSettings:
        s = self.scale
        steps = s.project_steps if run.what == "project" else s.few_steps if run.shots else s.tune_steps
        steps *= 2 if run.variant == "longer" else 1
        return TuneSettings(steps, 16, lr, min(s.eval_every, steps // 3) or 1, run.seed)


def sizes(scale: Scale) -> str:
    """A hash of all numbers that a run depends on besides its facts. The choice of tasks is not among them."""
    numbers = [v for v in asdict(scale).values() if not isinstance(v, tuple) or not isinstance(v[0], (str, tuple))]
    return hashlib.sha256(json.dumps([numbers, ALPHA, BETA, T, GAMMA, ITP, POINTS, CONTROL_LR]).encode()).hexdigest()[:8]


@lru_cache(maxsize=8)
def _base(folder: Path, device: torch.device) -> Base:
    return open_base(str(folder)).to(device)


@lru_cache(maxsize=8)
def _task(folder: Path, max_dev: int, max_test: int) -> Task:
    task, most = load_task(folder), {"dev": max_dev, "test": max_test}
    drawn = {part: [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:most[part]]]
             for part, examples in task.parts.items() if part in most}
    return replace(task, parts=task.parts | drawn)


def attempt(study: Study, run: Run, rates: tuple[float, ...], end: float | None) -> tuple[Run, list[dict], float]:
    """In a worker: the run, its rows (none if `end`, by time.monotonic, has passed) and its seconds. A run is trained at each of `rates`.
    If there are several rates, dev chooses one, and only the chosen model is scored on test."""
    started = time.monotonic()
    if end and started > end:
        return run, [], 0.0
    try:
        if run.what == "train":
            rows = pretrain(study, run, end and end - started)
        elif run.what in ("walk", "heads", "distance"):
            rows = {"walk": walk, "heads": heads, "distance": distance}[run.what](study, run)
        elif run.part == "chain":
            rows = chained(study, run, rates)
        else:
            rows = {"tune": tuned, "project": projected, "apply": applied}.get(run.what, recycled)(study, run, rates)
    except InputError as error:
        raise InputError(f"{run.facts}: {error}") from None
    return run, rows, time.monotonic() - started


def pretrain(study: Study, run: Run, seconds: float | None) -> list[dict]:
    """Run train.py in its own process: the lineage M0 to M4, or IND with the lineage's tokenizer. After `seconds` it ends without rows,
    and the next call continues from its last checkpoint."""
    s, corpora = study.scale, study.data / "corpora"
    lineage, independent, failed = study.home / "bases", study.home / "independent", study.home / "bases.failed"
    flags = {"preset": study.preset, "lr": s.lr, "batch_tokens": s.batch_tokens, "seq_len": s.seq_len, "save_every": 500,
             "cache": study.cache, "device": study.device.type, "precision": precision_name(study.precision)}
    if run.base == "IND":
        out, steps = independent, s.steps[0] + len(UPGRADES) * s.steps[1]
        flags |= {"stream": corpora, "tokenizer": lineage / "tokenizer.json", "steps": steps, "snapshots": 0, "seed": 1}
        wait_for(lineage / "tokenizer.json", failed, seconds or TOKENIZER_SECONDS)
    else:
        out = lineage
        failed.unlink(missing_ok=True)
        flags |= {"stream": ",".join(str(corpora / f"{d}.txt.xz") for d in DOMAINS), "vocab_size": s.vocab_size,
                  "steps": f"{s.steps[0]},{s.steps[1]}", "snapshots": s.snapshots, "seed": 0}
    command = [sys.executable, str(ROOT / "train.py"), *(str(x) for k, v in (flags | {"out": out}).items() for x in (f"--{k}", v))]
    command += ["--resume"] if (out / "config.json").exists() and not (out / "summary.json").exists() else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return []
    if done.returncode:
        study.home.mkdir(parents=True, exist_ok=True)
        failed.touch()      # so nobody waits for its tokenizer
        raise InputError(f"train.py ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    shown = " ".join(["train.py", *command[2:]]).replace(str(study.data), "DIR")
    return [{**stage, "command": shown} for stage in read_json(out / "summary.json")["stages"]]


def wait_for(path: Path, failed: Path, seconds: float) -> None:
    """Wait until `path` exists. InputError as soon as `failed` exists, or after `seconds`."""
    end = time.monotonic() + seconds
    while not path.exists():
        if failed.exists() or time.monotonic() > end:
            raise InputError(f"{path}: is needed and did not appear; the run that writes it failed or takes longer than {seconds:.0f} s")
        time.sleep(0.2)


def best_of(study: Study, data: TaskData, rates: tuple[float, ...],
            train: Callable[[float, TaskData], tuple[Classifier, TuneResult]]) -> tuple[Classifier, list[dict]]:
    """Train at each rate with `train(lr, data without test)`. Returns the best model on dev and a row per rate. Only the best model is
    scored on test."""
    trained = [train(lr, replace(data, test=None)) for lr in rates]
    rows = [{"lr": lr, "chosen": False, **scores(result)} for lr, (_, result) in zip(rates, trained)]
    best = max(range(len(rates)), key=lambda i: score(rows[i]["dev"]))
    model = trained[best][0]
    rows[best].update(chosen=True, test=evaluate(model, data.test, **study.compute))
    return model, rows


def scores(result: TuneResult) -> dict:
    return {"dev": result.dev, "best_step": result.best_step, "curve": result.curve, "train_seconds": round(result.seconds, 2)}


def tuned(study: Study, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """A fresh delta for a base, tuned on all examples and saved."""
    base, config = study.base(run.base), DeltaConfig(run.kind)
    data = study.task(run, base)

    def train(lr: float, blind: TaskData) -> tuple[Classifier, TuneResult]:
        model = attach(base, config, data.num_outputs, run.seed)
        return model, tune(model, blind, Loss(), study.settings(run, lr), **study.compute)

    model, rows = best_of(study, data, rates, train)
    about = {"task": run.task, "labels": list(data.labels), "seed": run.seed}
    save_delta(study.delta_folder(run.base, run.task, run.kind, run.seed), extract(model, base, config, about))
    return rows


def recycling(study: Study, run: Run) -> Recycling:
    """The old delta, its own base, the new base and the task, as in recycle.py. The caller sets the learning rate."""
    beyond = {"gamma": {"gamma": GAMMA, "att_layers": "all"}, "itp": {"itp": ITP}}.get(run.variant, {})
    base = study.base(run.base)
    return Recycling(study.base(run.old_base), study.delta(run, run.old_base, run.source), base, study.task(run, base),
                     DeltaConfig(run.kind), study.settings(run, 0.0), DistillConfig(ALPHA, BETA, T, **beyond), **study.compute)


def applied(study: Study, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """The old delta, unchanged, on the new base."""
    r = recycling(study, run)
    _, result = recycle(r, "apply")
    known = analysis.chance(r.data)
    return [{"lr": None, "chosen": True, **scores(result), "test": result.test, "chance": known["accuracy"], "uniform": known["uniform"]}]


def recycled(study: Study, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """A mode of recycle.py that trains."""
    r = recycling(study, run)

    def train(lr: float, blind: TaskData) -> tuple[Classifier, TuneResult]:
        r.settings, r.data = study.settings(run, lr), blind
        return recycle(r, run.what)

    return best_of(study, r.data, rates, train)[1]


def pair(study: Study, run: Run) -> tuple[Classifier, Classifier]:
    """The old base with its delta, and the other base with its own delta."""
    return tuple(apply(study.base(b), study.delta(run, b)).eval() for b in (run.old_base, run.base))


def walk(study: Study, run: Run) -> list[dict]:
    """A path between two tuned models: a row per point, each with the path's barrier."""
    a, b = pair(study, run)
    data = study.task(run, study.base(run.base))
    ends = weights_of(a), weights_of(b)
    path = analysis.linear(*ends)
    if run.variant == "curve":
        settings = replace(study.settings(run, CONTROL_LR), steps=study.scale.project_steps)
        path = analysis.bezier(ends[0], analysis.train_control(b, *ends, data, settings, **study.compute), ends[1])
    few = Encoded(data.test.sequences[:study.scale.max_path], data.test.targets[:study.scale.max_path], 0)
    rows = [*analysis.walk(b, path, np.linspace(0, 1, POINTS).tolist(), few, **study.compute)]
    return [{**row, "barrier": analysis.barrier(rows), "path": run.variant or "linear"} for row in rows]


def heads(study: Study, run: Run) -> list[dict]:
    """How similar the attention maps and the hidden states of two tuned models are."""
    a, b = pair(study, run)
    sequences = study.task(run, study.base(run.base)).test.sequences[:64]
    matrix = analysis.head_divergence(a, b, sequences, study.device)
    return [{**analysis.match_summary(matrix), "divergence": rounded(matrix), "sequences": len(sequences),
             "cka": rounded(analysis.cka(a, b, sequences, study.device))}]


def rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in matrix.tolist()]


def distance(study: Study, run: Run) -> list[dict]:
    """Distances between the bases, and between the deltas (over all weights that have a delta)."""
    bases = [dict(study.base(b).encoder.named_parameters()) for b in (run.old_base, run.base)]
    deltas = [study.delta(run, b).diffs for b in (run.old_base, run.base)]
    with torch.no_grad():
        return [{"of": of, **row} for of, ends in (("bases", bases), ("deltas", deltas)) for row in analysis.distances(*ends)]


def projected(study: Study, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """A projection learned on the source tasks and chosen on their dev. It then maps this task's delta, without training."""
    base, old_base = study.base(run.base), study.base(run.old_base)
    sources = [(study.delta(run, run.old_base, name), study.task(run, base, name)) for name in run.source.split(",")]
    target = study.delta(run, run.old_base)
    with_head = len({target.num_outputs, *(d.num_outputs for d, _ in sources)}) == 1
    blind = [(delta, replace(task, test=None)) for delta, task in sources]
    learned = [transport.learn_projection(old_base, base, blind, study.settings(run, lr), DistillConfig(ALPHA, BETA, T), r=16,
                                          granularity="auto", residual=run.variant == "residual", with_head=with_head, **study.compute)
               for lr in rates]
    best = max(range(len(rates)), key=lambda i: score(learned[i].dev))
    data, projection = study.task(run, base), learned[best]

    def scored(delta: Delta) -> dict:
        return evaluate(apply(base, transport.project(projection, delta), stale_ok=True), data.test, **study.compute)

    rows = [{"lr": lr, "chosen": i == best, "source_dev": score(learned[i].dev)} for i, lr in enumerate(rates)]
    # the score of the mapped delta of zeros shows how much of the score is the task's own
    rows[best] |= {"test": scored(target), "test_of_zeros": scored(0.0 * target if projection.with_head else replace(
        0.0 * target, head=target.head))}
    return rows


def chained(study: Study, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """M0 to M4, starting each time from the recycled delta (chain) or from Delta_0 (direct): a row per base, route and rate."""
    r, bases = recycling(study, run), {name: study.base(name) for name in UPGRADES}
    data = r.data

    def go(lr: float, data: TaskData) -> list[dict]:
        r.settings, r.data = study.settings(run, lr), data
        return [{"lr": lr, "at": step.base, "route": step.route, **scores(step.result), "test": step.result.test}
                for step in chain(r, run.what, bases)]

    if len(rates) == 1:
        return [{**row, "chosen": True} for row in go(rates[0], data)]
    blind = {lr: go(lr, replace(data, test=None)) for lr in rates}
    best = max(rates, key=lambda lr: np.mean([score(row["dev"]) for row in blind[lr]]))
    return [{**row, "chosen": False} for rows in blind.values() for row in rows] + chained(study, run, (best,))
