"""Which upgrades keep old deltas alive? PLAN.md says what is compared, and how; resumable, a row an upgraded base.

    python -m experiments.minilm --data DIR                  # M0, once
    python -m experiments.recipes --data DIR                 # in the plan's order, until all is done
    python -m experiments.recipes --data DIR --seeds 0,1 --targets bio --budget 3000        # a part of it
    python -m experiments.recipes --report                   # results/recipes/README.md and its figure, from the rows alone

DIR holds corpora/ and tasks/ as for experiments.claims. Bases are removed when they are scored, unless --keep.
"""
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from bench.machine import commit, device_name
from experiments.recipes import report
from experiments.recipes.plan import (
    DELTA_SEEDS,
    HELDOUT_TOKENS,
    KINDS,
    MAX_TEST,
    SEEDS,
    SWITCHES,
    TARGETS,
    TASKS,
    TUNE,
    UPGRADE,
    Upgrade,
    known,
    upgrades,
)
from rt import analysis
from rt.data import Rows, TaskData, encode_task
from rt.deltas import Base, apply
from rt.errors import InputError
from rt.formats.corpora import build_corpus
from rt.formats.delta_files import load_delta
from rt.formats.files import read_json, read_rows
from rt.formats.hub import open_base
from rt.formats.tasks import load_task
from rt.limits import Positive, PositiveInt, Seeds
from rt.model import MaskedLM
from rt.pretrain import evaluate_mlm
from rt.runs.config import parse, run
from rt.runs.log import progress
from rt.speed.device import pick_precision
from rt.tune import evaluate

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
@dataclass
class Config:
    """python -m experiments.recipes --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/ and tasks/
    base: str = "runs/minilm/pretrained/M0"  # M0
    seeds: Seeds = SEEDS  # of the upgrades
    targets: tuple[str, ...] = TARGETS  # bio, cs, chain
    arms: tuple[str, ...] = ()  # plain, hidden 3, ...; default: all
    jobs: PositiveInt = 2  # runs side by side, one thread each
    budget: Positive | None = None  # seconds; nothing new begins after them
    home: str = "runs/recipes"  # deltas and bases
    cache: str = "runs/cache"  # tokenized corpora
    results: str = "results/recipes"  # rows, and the report
    keep: bool = False  # keep the upgraded bases
    report: bool = False  # write the report from the rows


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.report:
        print(report.write(Path(c.results)))
        return
    for needed in (Path(c.data or "") / "corpora", Path(c.data or "") / "tasks", Path(c.base)):
        if not c.data or not needed.is_dir():
            raise InputError(f"{needed}: is not there; see python -m experiments.recipes --help")
    rows = Path(c.results) / "minilm.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    done = read_rows(rows) if rows.exists() else []
    deltas = [(task, kind, seed) for seed in sorted({s % DELTA_SEEDS for s in c.seeds}) for task in TASKS for kind in KINDS]
    todo = [("delta", key) for key in deltas if not (delta_folder(c, *key) / "delta.json").exists()]
    todo += [("base", seed) for seed in sorted({s % DELTA_SEEDS for s in c.seeds}) if not known(done, {"arm": "M0", "seed": seed})]
    todo += [("upgrade", one) for one in upgrades(c.targets, c.seeds) if (not c.arms or one.arm in c.arms) and not known(done, one.facts)]
    facts = {"device": device_name(CPU), "precision": str(pick_precision("auto", CPU)).removeprefix("torch."), "commit": commit(),
             "torch": torch.__version__}
    end, count = time.monotonic() + c.budget if c.budget else None, 0
    with progress(len(todo), "recipes", unit="run") as bar, ProcessPoolExecutor(
            c.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for what in ("delta", "base", "upgrade"):       # each needs those before it
            for future in as_completed([pool.submit(attempt, c, *job, end) for job in todo if job[0] == what]):
                found = future.result()
                with rows.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row | facts) + "\n" for row in found or ()))
                count += found is not None
                bar.update(found is not None)
    print(f"{len(todo) - count} of {len(todo)} runs are left" + ("; the same command goes on" if len(todo) > count else ""))


def attempt(c: Config, what: str, job: object, end: float | None) -> list[dict] | None:
    """In a worker: a job's rows; None if `end`, of time.monotonic, has passed."""
    if end and time.monotonic() > end:
        return None
    if what == "delta":
        return tune_delta(c, *job)
    return score_base(c, job) if what == "base" else upgrade(c, job)


def delta_folder(c: Config, task: str, kind: str, seed: int) -> Path:
    return Path(c.home) / "deltas" / f"{task}-{kind}-s{seed}"


def train(*arguments: object) -> str:
    """train.py in a process of its own; the command as it can be typed."""
    command = ["train.py", *map(str, arguments)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return " ".join(command)


def tune_delta(c: Config, task: str, kind: str, seed: int) -> list[dict]:
    train("--mode", "tune", "--base", Path(c.base).absolute(), "--task", Path(c.data, "tasks", task).absolute(), "--delta", kind, "--lr",
          KINDS[kind], "--seq_len", TASKS[task], "--seed", seed, *TUNE, "--out", delta_folder(c, task, kind, seed).absolute())
    return []


def score_base(c: Config, seed: int) -> list[dict]:
    """M0 with its own deltas: what nothing was lost of."""
    return [{"arm": "M0", "seed": seed, **scores(c, Path(c.base), seed, ("wiki", "bio", "rev", "cs", "ns")), "dev": {
        f"{task}/{kind}": [load_delta(delta_folder(c, task, kind, seed)).info["dev"]["accuracy"], majority(c, task)]
        for task in TASKS for kind in KINDS}}]


def majority(c: Config, task: str) -> float:
    """The share of the commonest label on dev."""
    targets = data_of(c.data, c.base, task, TASKS[task]).dev.targets
    return (targets.bincount().max() / len(targets)).item()


def upgrade(c: Config, one: Upgrade) -> list[dict]:
    """A row for each base that train.py makes."""
    domains, places = one.target.split(","), {name: Path(at).absolute() for name, at in (("DIR", c.data), ("HOME", c.home), ("M0", c.base),
                                                                                         ("CACHE", c.cache))}
    out = places["HOME"] / "bases" / f"{one.arm}-{one.lr}-{one.target}-s{one.seed}".replace(" ", "").replace("%", "")
    shutil.rmtree(out, ignore_errors=True)      # an upgrade is short: what was cut off begins anew
    stream = ",".join(str(places["DIR"] / "corpora" / f"{domain}.txt.xz") for domain in domains)
    command = train("--init", places["M0"], "--stream", stream, "--lr", one.lr, "--seed", one.seed, *UPGRADE,
                    *SWITCHES.get(one.arm, "").split(), "--cache", places["CACHE"], "--out", out)
    for name, place in places.items():
        command = command.replace(str(place), name)
    rows, old = [], dict(open_base(c.base).encoder.named_parameters())
    for i, domain in enumerate(domains, 1):
        folder = out / f"M{i}"
        rows.append(one.facts | {"stage": i, "domain": domain, **scores(c, folder, one.seed % DELTA_SEEDS, ("wiki", *domains)),
                                 "distance": analysis.distances(old, dict(open_base(str(folder)).encoder.named_parameters()))[-1],
                                 "stage_seconds": read_json(folder / "meta.json")["stage"]["seconds"], "command": command})
    if not c.keep:
        shutil.rmtree(out)
    return rows


@lru_cache(maxsize=8)
def data_of(data: str, base: str, task: str, seq_len: int) -> TaskData:
    """The task with its draw of test texts; all bases have one tokenizer."""
    whole = load_task(Path(data, "tasks", task))
    test = [whole.parts["test"][i] for i in np.random.default_rng(0).permutation(len(whole.parts["test"]))[:MAX_TEST]]
    return encode_task(replace(whole, parts=whole.parts | {"test": test}), open_base(base).tokenizer, seq_len)


def scores(c: Config, folder: Path, delta_seed: int, domains: tuple[str, ...]) -> dict:
    """Held-out losses by domain, and the accuracy of every old delta as it is."""
    base, where = open_base(str(folder)), {"device": CPU, "precision": pick_precision("auto", CPU)}
    heldout = {d: evaluate_mlm(MaskedLM(base.encoder, base.head), heldout_rows(c, base, d), tokens=HELDOUT_TOKENS, **where)["loss"]
               for d in domains}
    accuracy = {}
    for task, kind in ((task, kind) for task in TASKS for kind in KINDS):
        data = data_of(c.data, c.base, task, TASKS[task])
        delta = load_delta(delta_folder(c, task, kind, delta_seed)).ordered(data.labels)
        accuracy[f"{task}/{kind}"] = evaluate(apply(base, delta, stale_ok=True), data.test, **where)["accuracy"]
    return {"heldout": heldout, "apply": accuracy}


def heldout_rows(c: Config, base: Base, domain: str) -> Rows:
    corpus = build_corpus(domain, Path(c.data, "corpora", f"{domain}.txt.xz"), base.tokenizer, Path(c.cache))["heldout"]
    return Rows(corpus, base.tokenizer, seq_len=128, mask_rate=0.15, seed=0, sequences=1)


if __name__ == "__main__":
    run(main)
