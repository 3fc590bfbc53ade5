"""Do one run of the plan and return its rows. Bases and deltas are kept under `home`."""
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch

from experiments.common import run_here
from experiments.recipes import plan
from rt.data import TaskData, encode_task
from rt.deltas import apply
from rt.formats.corpora import build_corpus
from rt.formats.delta_files import load_delta
from rt.formats.files import read_json
from rt.formats.hub import open_base
from rt.formats.tasks import load_task
from rt.limits import Positive, PositiveInt, Seeds
from rt.model import MaskedLM
from rt.pretrain import evaluate_mlm
from rt.report import analysis
from rt.runs.upgrade import scored_rows
from rt.speed.device import pick_precision
from rt.tune import evaluate


@dataclass
class Config:
    """python -m experiments.recipes --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/ and tasks/
    base: str = "runs/minilm/pretrained/M0"  # M0
    model: Literal[tuple(plan.PEAK)] = "minilm"  # which M0 that is: the learning rates
    seeds: Seeds = plan.SEEDS  # of the upgrades
    targets: tuple[str, ...] = plan.TARGETS  # names of corpora (bio, cs, rev), chain, or chains
    arms: tuple[str, ...] = ()  # plain, hidden 3, ...; default: all
    rates: tuple[float, ...] = ()  # peak rates; default: all
    steps: PositiveInt = plan.STEPS  # of an upgrade
    device: Literal["cpu", "cuda"] = "cpu"  # of all runs and scores
    jobs: PositiveInt = 2  # runs side by side; on a CPU, one thread each
    budget: Positive | None = None  # seconds; nothing new begins after them
    home: str = "runs/recipes"  # deltas and bases
    cache: str = "runs/cache"  # tokenized corpora
    results: str = "results/recipes"  # rows, and the report
    keep: bool = False  # keep the upgraded bases
    report: bool = False  # write the report from the rows


def attempt(c: Config, end: float | None, do: Callable[..., list[dict]], *job: object) -> list[dict] | None:
    """In a worker: a job's rows; None if `end` (by time.monotonic) has passed."""
    return None if end and time.monotonic() > end else do(c, *job)


def delta_folder(c: Config, task: str, kind: str, seed: int) -> Path:
    return Path(c.home) / "deltas" / f"{task}-{kind}-s{seed}"


def train(c: Config, *arguments: object) -> str:
    """Run train.py in this process and return the command as it can be typed."""
    return run_here({"DIR": c.data, "HOME": c.home, "M0": c.base, "CACHE": c.cache}, "train.py", *arguments)


def tuning(c: Config, base: Path, task: str, kind: str, seed: int, out: Path) -> list[object]:
    """The flags of train.py that tune a delta of `base`."""
    return ["--mode", "tune", "--base", base, "--task", task_folder(c, task), "--delta", kind, "--lr", plan.TUNE_LR[c.model][kind],
            "--seq_len", plan.TASKS[task], "--seed", seed, *plan.TUNE, *plan.PLACE[c.device], "--out", out]


def tune_delta(c: Config, task: str, kind: str, seed: int) -> list[dict]:
    train(c, *tuning(c, Path(c.base), task, kind, seed, delta_folder(c, task, kind, seed)))
    return []


def score_base(c: Config, seed: int) -> list[dict]:
    """M0 with its own deltas: the scores before any loss."""
    return [{"arm": "M0", "seed": seed, **scores(c, Path(c.base), seed, ("wiki", "bio", "rev", "cs", "ns")), "dev": dev_scores(c, seed)}]


def dev_scores(c: Config, seed: int, kinds: tuple[str, ...] = plan.KINDS) -> dict[str, list[float]]:
    """dev_score by "task/kind"."""
    return {f"{task}/{kind}": dev_score(c, task, kind, seed) for task, kind in product(plan.TASKS, kinds)}


def dev_score(c: Config, task: str, kind: str, seed: int) -> list[float]:
    """[dev accuracy of M0's own delta, share of the commonest label on dev]."""
    targets = data_of(task_folder(c, task), c.base, plan.TASKS[task]).dev.targets
    accuracy = load_delta(delta_folder(c, task, kind, seed)).info["dev"]["accuracy"]
    return [accuracy, (targets.bincount().max() / len(targets)).item()]


def upgrade(c: Config, one: plan.Upgrade) -> list[dict]:
    """Run an upgrade; a row per base that train.py makes."""
    domains, corpora = one.target.split(","), Path(c.data, "corpora").absolute()
    out = Path(c.home) / "bases" / f"{one.arm}-{one.lr}-{one.target}-s{one.seed}".replace(" ", "").replace("%", "")
    shutil.rmtree(out, ignore_errors=True)      # an upgrade is short: after an interruption it starts over
    stream = ",".join(str(corpora / f"{domain}.txt.xz") for domain in domains)
    switches = (plan.SWITCHES | plan.AFTERWARDS | plan.TO_M0).get(one.arm, "").split()
    switches = [Path(c.base) if word == "M0" else word for word in switches]
    command = train(c, "--init", Path(c.base), "--stream", stream, "--lr", one.lr, "--seed", one.seed, "--steps", c.steps, *plan.UPGRADE,
                    *plan.PLACE[c.device], *switches, "--cache", Path(c.cache), "--out", out)
    rows, old = [], dict(open_base(c.base).encoder.named_parameters())
    for i, domain in enumerate(domains, 1):
        folder = out / f"M{i}"
        rows.append(one._asdict() | {"steps": c.steps, "stage": i, "domain": domain,
                                 **scores(c, folder, one.seed % plan.DELTA_SEEDS, ("wiki", *domains)),
                                 "distance": analysis.distances(old, dict(open_base(str(folder)).encoder.named_parameters()))[-1],
                                 "stage_seconds": read_json(folder / "meta.json")["stage"]["seconds"], "command": command})
    if not c.keep:
        shutil.rmtree(out)
    return rows


def task_folder(c: Config, task: str) -> Path:
    return Path(c.home).absolute() / "tasks" / task


def draw_tasks(c: Config) -> None:
    """Copy the tasks, with one draw of dev and test texts for all runs. Existing folders stay."""
    for task in plan.TASKS:
        if not (folder := task_folder(c, task)).exists():
            shutil.copytree(Path(c.data, "tasks", task), folder)
            for part, most in plan.DRAWN.items():
                lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")    # a text may hold U+0085
                drawn = sorted(np.random.default_rng(0).permutation(len(lines))[:most])
                (folder / f"{part}.jsonl").write_text("".join(f"{lines[i]}\n" for i in drawn), encoding="utf-8")


@lru_cache(maxsize=8)
def data_of(folder: Path, base: str, seq_len: int) -> TaskData:
    """The task in `folder`, encoded; all bases have the same tokenizer."""
    return encode_task(load_task(folder), open_base(base).tokenizer, seq_len)


def scores(c: Config, folder: Path, delta_seed: int, domains: tuple[str, ...], kinds: tuple[str, ...] = plan.KINDS) -> dict:
    """Held-out losses by domain, and the accuracy of every old delta, applied unchanged."""
    device = torch.device(c.device)
    base, where = open_base(str(folder)).to(device), {"device": device, "precision": pick_precision("auto", device)}
    heldout, accuracy = {}, {}
    for domain in domains:
        corpus = build_corpus(domain, Path(c.data, "corpora", f"{domain}.txt.xz"), base.tokenizer, Path(c.cache))["heldout"]
        rows = scored_rows(corpus, base.tokenizer, 128)
        heldout[domain] = evaluate_mlm(MaskedLM(base.encoder, base.head).to(device), rows, tokens=plan.HELDOUT_TOKENS, **where)["loss"]
    for task, kind in ((task, kind) for task in plan.TASKS for kind in kinds):
        data = data_of(task_folder(c, task), c.base, plan.TASKS[task])
        delta = load_delta(delta_folder(c, task, kind, delta_seed)).ordered(data.labels)
        accuracy[f"{task}/{kind}"] = evaluate(apply(base, delta, stale_ok=True), data.test, **where)["accuracy"]
    return {"heldout": heldout, "apply": accuracy}
