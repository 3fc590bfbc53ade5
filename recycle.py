"""Recycle an outdated delta: learned on an old base, wanted on the new one that came out of continual pre-training.

    python recycle.py --mode all                    # every mode on the demo lineage; builds what is missing
    python recycle.py --mode init+distill --old_base runs/demo/M0 --old_delta runs/demo/deltas/M0-math-full-s0 \\
                      --base runs/demo/M1 --task math --shots 16 --seeds 0,1,2

Modes: scratch (the baseline), apply, init, distill, init+distill; several with commas, or all. Every run leaves its curve in
metrics.jsonl and a row in summary.json under --out, and its delta under --out/deltas.
"""
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from data.sources import task_path
from rt.checkpoint import read_json
from rt.config import UsageError, parse, record, require_positive, require_seeds, run
from rt.deltas import Delta, DeltaConfig, extract, load_delta, save_delta
from rt.device import pick_device, pick_precision
from rt.hub import open_base
from rt.log import Log, claim, table, write_json
from rt.recycling import MODES, NEEDS_TEACHER, TRAINED, Recycling, check, recycle
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
    alpha: float = 0.7  # share of distillation: (1 - alpha) task + alpha KD + beta patience + gamma attention
    beta: float = 1.0  # weight of patience
    T: float = 5.0  # distillation temperature
    gamma: float = 0.0  # weight of the divergence between attention maps; the teacher then runs at every step
    att_layers: str = "last"  # whose maps: last or all
    public_code: bool = False  # KD divided by the number of labels, patience halved, as in the paper's code
    steps: int = 50  # optimizer steps
    batch_size: int = 16  # sequences a step
    lr: tuple[float, ...] = ()  # peak learning rate; of several, each mode keeps the best on dev; default: LR in this file
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01  # on matrices only
    eval_every: int = 10  # steps between scores on dev
    seq_len: int = 64  # longest text in tokens, longer ones are cut
    bottleneck: int = 24  # adapter
    r: int = 8  # lora
    lora_alpha: float = 16.0  # lora
    target_modules: tuple[str, ...] = ("query", "value")  # lora
    prefix_len: int = 16  # prefix
    out: str | None = None  # folder to write; default runs/recycle/BASE-TASK-DELTA[-kSHOTS]
    save_deltas: bool = True  # keep the delta of every run: MODE-sSEED-HASH under OUT/deltas
    cache: str = "runs/cache"  # the embedded data
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # auto: bf16 where the device does it fast, else fp32


# Of 1e-4, 2e-4, 5e-4, 1e-3, 2e-3 the best on dev for each mode, full delta (results/demo/lr_search); other kinds: one for all.
LR = {"full": {"scratch": 5e-4, "init": 1e-4, "distill": 1e-3, "init+distill": 1e-4},
      "adapter": 5e-3, "lora": 5e-3, "bitfit": 5e-3, "prefix": 1e-2}


def learning_rates(c: Config, mode: str) -> tuple[float | None, ...]:
    if mode not in TRAINED:
        return (None,)
    default = LR[c.delta]
    return c.lr or (default[mode] if isinstance(default, dict) else default,)


def main() -> None:
    c = parse(Config, sys.argv[1:])
    modes = list(MODES) if c.mode == "all" else c.mode.split(",")
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"--mode {mode}: not one of {', '.join(MODES)}, all")
    require_positive(c, "steps", "batch_size", "eval_every", "seq_len", "shots", "T", "lr", "bottleneck", "r", "prefix_len")
    require_seeds(*c.seeds)
    if not 0 <= c.alpha <= 1 or min(c.beta, c.gamma) < 0:
        raise UsageError(f"--alpha {c.alpha} must lie between 0 and 1, --beta {c.beta} and --gamma {c.gamma} must not be negative")
    if c.att_layers not in ("last", "all"):
        raise UsageError(f"--att_layers {c.att_layers}: not one of last, all")
    config, device = delta_config(c), pick_device(c.device)
    where = {"device": device, "precision": pick_precision(c.precision, device)}
    task = load_task(task_path(c.task, c.cache))
    build_missing(c, task)
    old_base, old_delta, base = open_base(c.old_base).to(device), load_delta(c.old_delta), open_base(c.base).to(device)
    base.require_length(c.seq_len)
    modes = possible(c, modes, task, old_delta)
    lineage = "-".join(Path(c.base).parts[-2:])
    out = Path(c.out or f"runs/recycle/{lineage}-{task.name}-{c.delta}" + (f"-k{c.shots}" if c.shots else ""))
    plan = [(seed, mode, lr) for seed in c.seeds for mode in modes for lr in learning_rates(c, mode)]
    data = encode_task(task, base.tokenizer, c.seq_len)
    r = Recycling(old_base, old_delta, base, data, config, tune_settings(c, 0, 0.0), c.alpha, c.beta, c.T, c.public_code, gamma=c.gamma,
                  att_layers=c.att_layers, **where)
    for mode in modes:
        check(r, mode)
    book = Book(c, out, task, plan)
    for seed in c.seeds:
        if c.shots:     # another sample, other examples to run the teacher on
            r.data, r.teacher = encode_task(few_shot(task, c.shots, seed), base.tokenizer, c.seq_len), None
        for _, mode, lr in (entry for entry in plan if entry[0] == seed):
            r.settings, r.on_eval = tune_settings(c, seed, lr or 0.0), book.curve(mode, seed, lr)
            model, result = recycle(r, mode)
            book.enter(mode, seed, lr, result, extract(model, base, old_delta.config if mode == "apply" else config,
                                                       book.about(mode, seed, lr, result)))
    print(report(book.rows, modes, c))
    print(f"rows in {out / 'summary.json'}, curves in {out / 'metrics.jsonl'}")


def possible(c: Config, modes: list[str], task: Task, old: Delta) -> list[str]:
    """Say what is about to be done; with another task's delta, `all` is what that can do."""
    few = f"{c.shots} examples a label" if c.shots else f"{len(task.parts['train'])} examples"
    what = "regression" if task.is_regression else f"{len(task.labels)} labels"
    print(f"{task.name} ({what}, {few}), {c.delta}: {c.old_base} + {c.old_delta} -> {c.base}")
    if old.labels == task.labels:
        return modes
    print(f"the old delta was learned on {old.info['task']}, with other labels: init keeps the delta and starts a fresh head")
    return ["scratch", "init"] if c.mode == "all" else modes


class Book:
    """metrics.jsonl, summary.json and deltas/ of the output folder. What other calls have left there stays, unless the same
    run (mode, seed, learning rate and settings) is done again."""

    def __init__(self, c: Config, out: Path, task: Task, plan: list[tuple]):
        self.c, self.out, self.task = c, out, task
        claim(out, {"metrics.jsonl", "summary.json", "deltas"})
        again = {run_name(c, *entry) for entry in plan}
        self.log = Log(out, keep=lambda row: row["run"] not in again)
        before = read_json(out / "summary.json")["rows"] if (out / "summary.json").exists() else []
        self.rows = [row for row in before if row["run"] not in again]

    def curve(self, mode: str, seed: int, lr: float | None):
        """What a run calls at every evaluation."""
        return lambda row: self.log.row(run=run_name(self.c, seed, mode, lr), mode=mode, seed=seed, lr=lr, **row)

    def about(self, mode: str, seed: int, lr: float | None, result: TuneResult) -> dict:
        """What the delta's file says of how it came to be."""
        return {"task": self.task.name, "labels": list(self.task.labels), "shots": self.c.shots, "seed": seed, "mode": mode,
                "lr": lr, "dev": result.dev, "test": result.test, "config": record(self.c), "argv": sys.argv}

    def enter(self, mode: str, seed: int, lr: float | None, result: TuneResult, delta: Delta) -> None:
        """Write a finished run: its delta, and its row in the summary."""
        name = run_name(self.c, seed, mode, lr)
        if self.c.save_deltas:
            save_delta(self.out / "deltas" / name, delta)
        self.rows.append({
            "run": name, "mode": mode, "delta": self.c.delta, "task": self.task.name, "shots": self.c.shots, "seed": seed,
            "lr": lr, "steps": self.c.steps if mode in TRAINED else 0, "best_step": result.best_step, "dev": result.dev,
            "test": result.test, "steps_to_scratch_best": None, "seconds": round(result.seconds, 1), "curve": result.curve,
            "settings": settings_of(self.c, mode)})
        add_steps_to_scratch([row for row in self.rows if row["settings"] == settings_of(self.c, row["mode"])])
        write_json(self.out / "summary.json", {"rows": self.rows, "config": record(self.c), "argv": sys.argv})


def settings_of(c: Config, mode: str) -> dict:
    """The flags that a run of `mode` depends on, beside its seed and learning rate."""
    free = {"mode", "seeds", "lr", "out", "cache", "device", "save_deltas"}
    if mode not in NEEDS_TEACHER:
        free |= {"alpha", "beta", "T", "public_code", "gamma", "att_layers"}
    if not c.gamma:
        free |= {"gamma", "att_layers"}
    return {k: v for k, v in record(c).items() if k not in free}


def run_name(c: Config, seed: int, mode: str, lr: float | None) -> str:
    """Equal for equal runs: mode, seed, and a hash of all that they depend on."""
    content = json.dumps([settings_of(c, mode), lr], sort_keys=True)
    return f"{mode}-s{seed}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"


def build_missing(c: Config, task: Task) -> None:
    """Make the demo lineage and the old delta with train.py where they are not there yet."""
    demo, same = Path(Config.base).parent, ("--device", c.device, "--precision", c.precision, "--cache", c.cache)
    if any(not path.exists() and path.parent == demo for path in (Path(c.base), Path(c.old_base))):
        unfinished = ["--resume"] if (demo / "config.json").exists() else []
        train("the demo lineage M0, M1, M2 (about 4 minutes on 2 cores)", "--out", str(demo), *same, *unfinished)
    if c.old_delta is None:
        home = Path(c.old_base).parent if Path(c.old_base).exists() else Path("runs")       # a hub id has no place beside it
        c.old_delta = str(home / "deltas" / f"{Path(c.old_base).name}-{task.name}-{c.delta}-s0")
    if not (Path(c.old_delta) / "delta.json").exists():
        sizes = ("bottleneck", "r", "lora_alpha", "prefix_len", "seq_len", "delta", "old_base", "task")
        flags = [text for name in sizes for text in ("--" + name.replace("old_", ""), str(getattr(c, name)))]
        train(f"the old delta {c.old_delta} (under a minute for mini on 2 cores)", "--mode", "tune", "--out", c.old_delta, *flags,
              "--target_modules", ",".join(c.target_modules), *same)


def train(what: str, *arguments: str) -> None:
    print(f"building {what}", flush=True)
    script = str(Path(__file__).with_name("train.py"))
    if subprocess.run([sys.executable, script, *arguments]).returncode:
        raise UsageError(f"could not build {what}: python train.py {' '.join(arguments)} failed")


def delta_config(c: Config) -> DeltaConfig:
    return DeltaConfig(c.delta, c.bottleneck, c.r, c.lora_alpha, c.target_modules, c.prefix_len)


def tune_settings(c: Config, seed: int, lr: float) -> TuneSettings:
    return TuneSettings(c.steps, c.batch_size, lr, c.eval_every, seed, c.weight_decay, c.warmup)


def chosen(rows: list[dict], mode: str) -> list[dict]:
    """The rows of a mode, one a seed, at the learning rate whose dev score is best on average."""
    by_lr: dict = {}
    for row in rows:
        if row["mode"] == mode:
            by_lr.setdefault(row["lr"], []).append(row)
    return max(by_lr.values(), key=lambda group: mean(score(row["dev"]) for row in group), default=[])


def add_steps_to_scratch(rows: list[dict]) -> None:
    """First step at which a run's dev score is that of scratch's best of the same seed, or above; None if never."""
    best = {row["seed"]: score(row["dev"]) for row in chosen(rows, "scratch")}
    for row in rows:
        if row["seed"] in best:
            row["steps_to_scratch_best"] = next((step for step, dev in row["curve"] if dev >= best[row["seed"]]), None)


def report(rows: list[dict], modes: list[str], c: Config) -> str:
    """One line a mode: test over this call's seeds, steps to scratch's best dev, seconds."""
    rows = [row for row in rows if row["settings"] == settings_of(c, row["mode"]) and row["seed"] in c.seeds]
    lines = []
    for mode in modes:
        group = chosen([row for row in rows if row["lr"] in learning_rates(c, mode)], mode)
        tests = [score(row["test"]) for row in group]
        steps = ["-" if row["steps_to_scratch_best"] is None else row["steps_to_scratch_best"] for row in group]
        lines.append([mode, group[0]["lr"] or "-", f"{mean(tests):.3f} ± {stdev(tests) if len(tests) > 1 else 0:.3f}",
                      " ".join(map(str, steps)), f"{mean(row['seconds'] for row in group):.1f}"])
    return table(lines, ["mode", "lr", f"test {next(iter(group[0]['test']))}", "steps to scratch's best dev, by seed", "seconds"])


if __name__ == "__main__":
    run(main)
