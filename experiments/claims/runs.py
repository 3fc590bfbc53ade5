"""Does one Run of the plan and returns its rows. What several runs need (bases, tuned deltas) lies under `home`."""
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
from rt import analysis, transport
from rt.data import Encoded, Task, few_shot
from rt.deltas import Base, Delta, apply, attach, extract
from rt.errors import InputError
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.files import read_json
from rt.formats.hub import open_base
from rt.formats.tasks import load_task
from rt.kinds import DeltaConfig
from rt.losses import Loss, weights_of
from rt.model import Classifier
from rt.recycling import Recycling, chain, recycle
from rt.tune import TaskData, TuneResult, TuneSettings, chance, encode_task, evaluate, score, tune

ALPHA, BETA, T = 0.7, 1.0, 5.0      # of every arm with a teacher
GAMMA, ITP = 1.0, 2                 # of the arms beyond them
POINTS = 26                         # of a path, as in the paper
CONTROL_LR = 3e-4                   # of a curve's control point
TOKENIZER_SECONDS = 3600            # how long IND waits for the lineage's tokenizer
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Lab:
    """Where things are and how they are computed."""
    data: Path
    home: Path
    cache: Path
    preset: str
    scale: Scale
    device: torch.device
    precision: torch.dtype

    @property
    def where(self) -> dict:
        return {"device": self.device, "precision": self.precision}

    def base(self, name: str) -> Base:
        return _base(self.home / ("independent/M0" if name == "IND" else f"bases/{name}"), self.device)

    def delta_folder(self, base: str, task: str, kind: str, seed: int) -> Path:
        return self.home / "deltas" / f"{base}-{task}-{kind}-s{seed}"

    def delta(self, run: Run, base: str, task: str | None = None) -> Delta:
        return load_delta(self.delta_folder(base, task or run.task, run.kind, run.seed))

    def task(self, run: Run, base: Base, name: str | None = None) -> TaskData:
        """Encoded; few-shot where the run is; dev and test are the same draw of at most so many examples for every run."""
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
    """A mark of all numbers that a run depends on beside its facts; which tasks are run is not one of them."""
    numbers = [v for v in asdict(scale).values() if not isinstance(v, tuple) or not isinstance(v[0], (str, tuple))]
    return hashlib.sha256(json.dumps([numbers, ALPHA, BETA, T, GAMMA, ITP, POINTS, CONTROL_LR]).encode()).hexdigest()[:8]


@lru_cache(maxsize=8)
def _base(folder: Path, device: torch.device) -> Base:
    return open_base(str(folder)).to(device)


@lru_cache(maxsize=8)
def _task(folder: Path, max_dev: int, max_test: int) -> Task:
    task = load_task(folder)
    return replace(task, parts={part: examples if part == "train" else _draw(examples, {"dev": max_dev, "test": max_test}[part])
                                for part, examples in task.parts.items()})


def _draw(examples: list, most: int) -> list:
    return [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:most]]


def attempt(lab: Lab, run: Run, rates: tuple[float, ...], end: float | None) -> tuple[Run, list[dict], float]:
    """In a worker: the run, its rows (none where `end`, of time.monotonic, has passed) and its seconds."""
    started = time.monotonic()
    if end and started > end:
        return run, [], 0.0
    try:
        rows = do(lab, run, rates, end and end - started)
    except InputError as error:
        raise InputError(f"{run.facts}: {error}") from None
    return run, rows, time.monotonic() - started


def do(lab: Lab, run: Run, rates: tuple[float, ...], seconds: float | None = None) -> list[dict]:
    """The rows of `run`, trained at each of `rates`; where there are several, dev chooses, and only the chosen is scored on
    test. `seconds` bounds pre-training, which goes on from its last checkpoint in the next call; no rows then."""
    if run.what == "train":
        return pretrain(lab, run, seconds)
    if run.part == "chain":
        return chained(lab, run, rates)
    if run.what in ("walk", "heads", "distance"):
        return {"walk": walk, "heads": heads, "distance": distance}[run.what](lab, run)
    return {"tune": tuned, "project": projected}.get(run.what, recycled)(lab, run, rates)


def pretrain(lab: Lab, run: Run, seconds: float | None) -> list[dict]:
    """train.py in a process of its own: the lineage M0 to M4, or IND with the lineage's tokenizer."""
    s, corpora = lab.scale, lab.data / "corpora"
    lineage, independent, failed = lab.home / "bases", lab.home / "independent", lab.home / "bases.failed"
    flags = {"preset": lab.preset, "lr": s.lr, "batch_tokens": s.batch_tokens, "seq_len": s.seq_len, "save_every": 500, "cache": lab.cache,
             "device": lab.device.type, "precision": "bf16" if lab.precision == torch.bfloat16 else "fp32"}
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
        lab.home.mkdir(parents=True, exist_ok=True)
        failed.touch()      # nobody need wait for its tokenizer
        raise InputError(f"train.py ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    said = " ".join(["train.py", *command[2:]]).replace(str(lab.data), "DIR")
    return [{**stage, "command": said} for stage in read_json(out / "summary.json")["stages"]]


def wait_for(path: Path, failed: Path, seconds: float) -> None:
    """Until `path` is there; InputError once `failed` is, or after `seconds`."""
    end = time.monotonic() + seconds
    while not path.exists():
        if failed.exists() or time.monotonic() > end:
            raise InputError(f"{path}: is needed and did not appear; the run that writes it failed or takes longer than {seconds:.0f} s")
        time.sleep(0.2)


def best_of(lab: Lab, data: TaskData, rates: tuple[float, ...],
            train: Callable[[float, TaskData], tuple[Classifier, TuneResult]]) -> tuple[Classifier, list[dict]]:
    """`train(lr, data without test)` -> (model, TuneResult) at each rate; (the best model on dev, a row a rate). Test is
    scored with that model alone."""
    blind, rows, best = replace(data, test=None), [], None
    for lr in rates:
        model, result = train(lr, blind)
        rows.append({"lr": lr, "chosen": False, **scores(result)})
        if best is None or score(result.dev) > score(best[1].dev):
            best = model, result, rows[-1]
    model, _, row = best
    row.update(chosen=True, test=evaluate(model, data.test, **lab.where))
    return model, rows


def scores(result: TuneResult) -> dict:
    return {"dev": result.dev, "best_step": result.best_step, "curve": result.curve, "train_seconds": round(result.seconds, 2)}


def tuned(lab: Lab, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """A delta of its own for a base, on all examples; kept."""
    base, config = lab.base(run.base), DeltaConfig(run.kind)
    data = lab.task(run, base)

    def train(lr: float, blind: TaskData) -> tuple[Classifier, TuneResult]:
        model = attach(base, config, data.num_outputs, run.seed)
        return model, tune(model, blind, Loss(), lab.settings(run, lr), **lab.where, what=f"{run.base} {run.task}")

    model, rows = best_of(lab, data, rates, train)
    about = {"task": run.task, "labels": list(data.labels), "seed": run.seed}
    save_delta(lab.delta_folder(run.base, run.task, run.kind, run.seed), extract(model, base, config, about))
    return rows


def recycling(lab: Lab, run: Run, data: TaskData, old_delta: Delta, old_base: str, base: str) -> Recycling:
    beyond = {"gamma": {"gamma": GAMMA, "att_layers": "all"}, "itp": {"itp": ITP}}.get(run.variant, {})
    return Recycling(lab.base(old_base), old_delta, lab.base(base), data, DeltaConfig(run.kind), lab.settings(run, 0.0),
                     ALPHA, BETA, T, False, **lab.where, **beyond)


def recycled(lab: Lab, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """A mode of recycle.py."""
    base = lab.base(run.base)
    data = lab.task(run, base)
    old = lab.delta(run, run.old_base, run.source)
    r = recycling(lab, run, data, old, run.old_base, run.base)
    if run.what == "apply":
        _, result = recycle(r, "apply")
        known = chance(data)
        return [{"lr": None, "chosen": True, **scores(result), "test": result.test, "chance": known["accuracy"],
                 "uniform": known["uniform"]}]

    def train(lr: float, blind: TaskData) -> tuple[Classifier, TuneResult]:
        r.settings, r.data = lab.settings(run, lr), blind
        return recycle(r, run.what)

    return best_of(lab, data, rates, train)[1]


def pair(lab: Lab, run: Run) -> tuple[Classifier, Classifier]:
    """Old base + its delta, and the other base + its own."""
    return tuple(apply(lab.base(b), lab.delta(run, b)).eval() for b in (run.old_base, run.base))


def walk(lab: Lab, run: Run) -> list[dict]:
    """A path between two tuned models: a row a point, and the barrier on each."""
    a, b = pair(lab, run)
    data = lab.task(run, lab.base(run.base))
    ends = weights_of(a), weights_of(b)
    path = analysis.linear(*ends)
    if run.variant == "curve":
        settings = replace(lab.settings(run, CONTROL_LR), steps=lab.scale.project_steps)
        path = analysis.bezier(ends[0], analysis.train_control(b, *ends, data, settings, **lab.where), ends[1])
    few = Encoded(data.test.sequences[:lab.scale.max_path], data.test.targets[:lab.scale.max_path], 0)
    rows = analysis.walk(b, path, np.linspace(0, 1, POINTS).tolist(), few, **lab.where)
    return [{**row, "barrier": analysis.barrier(rows), "path": run.variant or "linear"} for row in rows]


def heads(lab: Lab, run: Run) -> list[dict]:
    """How alike the attention maps of two tuned models are, and their hidden states."""
    a, b = pair(lab, run)
    sequences = lab.task(run, lab.base(run.base)).test.sequences[:64]
    matrix = analysis.head_divergence(a, b, sequences, lab.device)
    return [{**analysis.match_summary(matrix), "divergence": rounded(matrix), "sequences": len(sequences),
             "cka": rounded(analysis.cka(a, b, sequences, lab.device))}]


def rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in matrix.tolist()]


def distance(lab: Lab, run: Run) -> list[dict]:
    """Between the bases, between the tuned models, and between the deltas (of all weights that have one)."""
    bases = [dict(lab.base(b).encoder.named_parameters()) for b in (run.old_base, run.base)]
    deltas = [lab.delta(run, b).diffs for b in (run.old_base, run.base)]
    with torch.no_grad():
        return [{"of": of, **row} for of, ends in (("bases", bases), ("deltas", deltas)) for row in analysis.distances(*ends)]


def projected(lab: Lab, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """A projection learned on the source tasks, chosen on their dev; then this task's delta through it, nothing trained."""
    base, old_base = lab.base(run.base), lab.base(run.old_base)
    sources = [(lab.delta(run, run.old_base, name), lab.task(run, base, name)) for name in run.source.split(",")]
    learned, target = [], lab.delta(run, run.old_base)
    for lr in rates:
        curve: list[dict] = []
        learned.append((transport.learn_projection(
            old_base, base, [(d, replace(t, test=None)) for d, t in sources], lab.settings(run, lr), r=16, granularity="auto",
            residual=run.variant == "residual", alpha=ALPHA, beta=BETA, T=T, public_code=False, **lab.where, on_eval=curve.append,
            with_head=len({target.num_outputs, *(d.num_outputs for d, _ in sources)}) == 1), max(score(row["dev"]) for row in curve)))
    best = max(range(len(rates)), key=lambda i: learned[i][1])
    data, projection = lab.task(run, base), learned[best][0]

    def scored(delta: Delta) -> dict:
        return evaluate(apply(base, transport.project(projection, delta), stale_ok=True), data.test, **lab.where)

    rows = [{"lr": lr, "chosen": i == best, "source_dev": learned[i][1]} for i, lr in enumerate(rates)]
    # what the map says of a delta of zeros shows how much of the score is the task's own
    rows[best] |= {"test": scored(target), "test_of_zeros": scored(0.0 * target if projection.with_head else replace(
        0.0 * target, head=target.head))}
    return rows


def chained(lab: Lab, run: Run, rates: tuple[float, ...]) -> list[dict]:
    """M0 to M4, from the recycled delta each time (chain) or from Delta_0 (direct): a row a base, route and rate."""
    data = lab.task(run, lab.base("M0"))
    bases = {name: lab.base(name) for name in UPGRADES}

    def go(lr: float, data: TaskData) -> list[dict]:
        r = recycling(lab, run, data, lab.delta(run, "M0"), "M0", "M1")
        r.settings = lab.settings(run, lr)
        return [{"lr": lr, "at": step.base, "route": step.route, **scores(step.result), "test": step.result.test}
                for step in chain(r, run.what, bases)]

    if len(rates) == 1:
        return [{**row, "chosen": True} for row in go(rates[0], data)]
    blind = {lr: go(lr, replace(data, test=None)) for lr in rates}
    best = max(rates, key=lambda lr: np.mean([score(row["dev"]) for row in blind[lr]]))
    return [{**row, "chosen": False} for rows in blind.values() for row in rows] + chained(lab, run, (best,))
