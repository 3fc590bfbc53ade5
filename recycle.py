"""Recycle an outdated delta: learned on an old base, wanted on the new one that came out of continual pre-training.

    python recycle.py --mode all                    # every mode on the demo lineage; builds what is missing
    python recycle.py --mode init+distill --old_base runs/demo/M0 --old_delta runs/demo/deltas/M0-math-full-s0 \\
                      --base runs/demo/M1 --task math --shots 16 --seeds 0,1,2

Modes: scratch (the baseline), apply, init, distill, init+distill; several with commas, or all. Every run leaves its curve in
metrics.jsonl and a row in summary.json under --out, and its delta under --out/deltas.
"""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from data.sources import task_path
from rt.config import UsageError, parse, record, require_positive, run
from rt.deltas import Delta, DeltaConfig, extract, load_delta, save_delta
from rt.device import pick_device, pick_precision
from rt.hub import open_base
from rt.log import Log, table, write_json
from rt.recycling import MODES, TRAINED, Recycling
from rt.tasks import Task, few_shot, load_task
from rt.tune import TuneResult, TuneSettings, encode_task, score


@dataclass
class Config:
    """python recycle.py --mode scratch|apply|init|distill|init+distill|all [--flag value ...]"""
    mode: str = "all"  # one mode, several with commas, or all
    old_base: str = "runs/demo/M0"  # M_i: the base the old delta was learned on
    old_delta: str | None = None  # the outdated delta; default: the one of --task beside the old base, tuned if missing
    base: str = "runs/demo/M1"  # M_{i+1}: the upgraded base
    task: str = "math"  # embedded domain, or a folder with train, dev and test
    delta: str = "full"  # full, adapter, lora, bitfit or prefix
    shots: int | None = 16  # examples a label for train and for dev; none: all
    seeds: tuple[int, ...] = (0, 1, 2)  # of the few-shot sample, fresh weights, data order and dropout
    alpha: float = 0.7  # share of distillation: (1 - alpha) task + alpha KD + beta patience
    beta: float = 1.0  # weight of patience
    T: float = 5.0  # distillation temperature
    public_code: bool = False  # KD divided by the number of labels, patience halved, as in the paper's code
    steps: int = 50  # optimizer steps
    batch_size: int = 16  # sequences a step
    lr: tuple[float, ...] = ()  # peak learning rate; of several, each mode keeps the best on dev; default: LR below
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01  # on matrices only
    eval_every: int = 10  # steps between scores on dev
    seq_len: int = 64  # longest text in tokens, longer ones are cut
    bottleneck: int = 24  # adapter
    r: int = 8  # lora
    lora_alpha: float = 16.0  # lora
    target_modules: tuple[str, ...] = ("query", "value")  # lora
    prefix_len: int = 16  # prefix
    out: str | None = None  # folder to write; default runs/recycle/NEW-TASK-DELTA[-kSHOTS]
    cache: str = "runs/cache"  # the embedded data
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # auto: bf16 where the device does it fast, else fp32


# Best on dev of 2e-4, 5e-4, 1e-3 for each mode, full delta (results/demo/lr_search); of the other kinds one rate for all.
LR = {"full": {"scratch": 1e-3, "init": 2e-4, "distill": 1e-3, "init+distill": 5e-4},
      "adapter": 5e-3, "lora": 5e-3, "bitfit": 5e-3, "prefix": 1e-2}


def learning_rates(c: Config, mode: str) -> tuple[float | None, ...]:
    if mode not in TRAINED:
        return (None,)
    default = LR[c.delta]
    return c.lr or ((default[mode] if isinstance(default, dict) else default),)


def main() -> None:
    c = parse(Config, sys.argv[1:])
    modes = list(MODES) if c.mode == "all" else c.mode.split(",")
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"--mode {mode}: not one of {', '.join(MODES)}, all")
    require_positive(c, "steps", "batch_size", "eval_every", "seq_len", "shots", "T", "lr", "bottleneck", "r", "prefix_len")
    if not 0 <= c.alpha <= 1 or c.beta < 0:
        raise UsageError(f"--alpha {c.alpha} must lie between 0 and 1, --beta {c.beta} must not be negative")
    build_missing(c)
    device = pick_device(c.device)
    task = load_task(task_path(c.task, c.cache))
    old_base, old_delta, base = open_base(c.old_base).to(device), load_delta(c.old_delta), open_base(c.base).to(device)
    out = Path(c.out or f"runs/recycle/{Path(c.base).name}-{task.name}-{c.delta}" + (f"-k{c.shots}" if c.shots else ""))
    say_what(c, task, old_delta)
    log, rows, teachers = Log(out), [], {}
    for seed in c.seeds:
        data = encode_task(few_shot(task, c.shots, seed) if c.shots else task, base.tokenizer, c.seq_len)
        if c.shots:
            teachers = {}   # another sample, other examples to run the teacher on
        for mode in modes:
            for lr in learning_rates(c, mode):
                r = Recycling(old_base, old_delta, base, data, delta_config(c), tune_settings(c, seed, lr or 0.0),
                              c.alpha, c.beta, c.T, c.public_code, device, pick_precision(c.precision, device),
                              lambda row: log.row(mode=mode, seed=seed, lr=lr, **row), teachers)
                model, result = MODES[mode](r)
                about = {"task": task.name, "labels": list(task.labels), "shots": c.shots, "seed": seed, "mode": mode,
                         "dev": result.dev, "test": result.test, "config": record(c), "argv": sys.argv}
                kind = old_delta.config if mode == "apply" else r.config
                suffix = f"-lr{lr:g}" if len(c.lr) > 1 and lr else ""
                save_delta(out / "deltas" / f"{mode}-s{seed}{suffix}", extract(model, base, kind, about))
                rows.append(summary_row(c, task, mode, seed, lr, result))
                add_steps_to_scratch(rows, seed)
                write_json(out / "summary.json", {"rows": [{k: v for k, v in row.items() if k != "curve"} for row in rows],
                                                  "config": record(c), "argv": sys.argv})
    print(report(rows, modes, score_name=next(iter(rows[0]["test"]))))
    print(f"rows in {out / 'summary.json'}, curves in {out / 'metrics.jsonl'}")


def build_missing(c: Config) -> None:
    """Make the demo lineage and the old delta with train.py where they are not there yet."""
    demo = Path(Config.base).parent
    if any(not path.exists() and path.parent == demo for path in (Path(c.base), Path(c.old_base))):
        unfinished = ["--resume"] if (demo / "config.json").exists() else []
        train("the demo lineage M0, M1, M2 (about 4 minutes on 2 cores)", "--out", str(demo), *unfinished)
    if c.old_delta is None:
        task = c.task if not Path(c.task).exists() else Path(c.task).name
        c.old_delta = str(Path(c.old_base).parent / "deltas" / f"{Path(c.old_base).name}-{task}-{c.delta}-s0")
    if not (Path(c.old_delta) / "delta.json").exists():
        train(f"the old delta {c.old_delta} (about a minute)", "--mode", "tune", "--base", c.old_base, "--task", c.task,
              "--delta", c.delta, "--out", c.old_delta, "--seq_len", str(c.seq_len), "--device", c.device)


def train(what: str, *arguments: str) -> None:
    print(f"building {what}", flush=True)
    script = str(Path(__file__).with_name("train.py"))
    if subprocess.run([sys.executable, script, *arguments]).returncode:
        raise UsageError(f"could not build {what}: python train.py {' '.join(arguments)} failed")


def say_what(c: Config, task: Task, old: Delta) -> None:
    few = f"{c.shots} examples a label" if c.shots else f"{len(task.parts['train'])} examples"
    print(f"{task.name} ({few}, {max(1, len(task.labels))} outputs), {c.delta}: {c.old_base} + {c.old_delta} -> {c.base}")
    if old.labels != task.labels:
        print(f"the old delta was learned on {old.info['task']}, with other labels: init keeps the delta and starts a "
              "fresh head")


def delta_config(c: Config) -> DeltaConfig:
    return DeltaConfig(c.delta, c.bottleneck, c.r, c.lora_alpha, c.target_modules, c.prefix_len)


def tune_settings(c: Config, seed: int, lr: float) -> TuneSettings:
    return TuneSettings(c.steps, c.batch_size, lr, c.eval_every, seed, c.weight_decay, c.warmup)


def summary_row(c: Config, task: Task, mode: str, seed: int, lr: float | None, result: TuneResult) -> dict:
    return {"mode": mode, "delta": c.delta, "task": task.name, "shots": c.shots, "seed": seed, "lr": lr,
            "steps": c.steps if mode in TRAINED else 0, "best_step": result.best_step, "dev": result.dev,
            "test": result.test, "steps_to_scratch_best": None, "seconds": round(result.seconds, 1), "curve": result.curve}


def add_steps_to_scratch(rows: list[dict], seed: int) -> None:
    """First step at which a run's dev score is that of scratch's best of the same seed, or above; None if never."""
    best = max((score(row["dev"]) for row in rows if row["mode"] == "scratch" and row["seed"] == seed), default=None)
    for row in rows:
        if row["seed"] == seed and best is not None:
            row["steps_to_scratch_best"] = next((step for step, dev in row["curve"] if dev >= best), None)


def report(rows: list[dict], modes: list[str], score_name: str) -> str:
    """One line a mode: test over seeds at the learning rate that is best on dev, steps to scratch's best dev, seconds."""
    lines = []
    for mode in modes:
        by_lr: dict = {}
        for row in rows:
            if row["mode"] == mode:
                by_lr.setdefault(row["lr"], []).append(row)
        lr, chosen = max(by_lr.items(), key=lambda item: mean(score(row["dev"]) for row in item[1]))
        tests = [score(row["test"]) for row in chosen]
        reached = [row["steps_to_scratch_best"] for row in chosen]
        lines.append([mode, lr if lr else "-", f"{mean(tests):.3f} ± {stdev(tests) if len(tests) > 1 else 0:.3f}",
                      " ".join("-" if step is None else str(step) for step in reached),
                      f"{mean(row['seconds'] for row in chosen):.1f}"])
    return table(lines, ["mode", "lr", f"test {score_name}", "steps to scratch's best dev, by seed", "seconds"])


if __name__ == "__main__":
    run(main)
