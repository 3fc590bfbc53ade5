"""Old deltas across sizes, tokenizers, black boxes and coordinates: PLAN.md's runs by recycle.py, and their report.

    python -m experiments.minilm --data DIR         # M0, once
    python -m experiments.transfer --data DIR       # about three hours on 2 cores; continues where it was stopped
    python -m experiments.transfer --report         # results/transfer/README.md, from the rows alone
"""
import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import torch

from bench.machine import commit, device_name
from experiments.common import check_places, run_script
from experiments.recipes import runs as recipes
from experiments.transfer import report
from experiments.twin import permuted_twin
from rt.formats.checkpoint import save_base
from rt.formats.files import read_json, read_rows
from rt.formats.hub import open_base
from rt.limits import Positive
from rt.model import MaskedLM
from rt.report.rows import group
from rt.runs.config import parse, run
from rt.runs.log import progress

TASKS, KINDS = ("rotten_tomatoes", "agnews"), ("full", "adapter")
MINI_TUNED = {"full": 5e-4, "adapter": 3e-3}        # rates of the old deltas of mini
RATES = {"minilm": {"full": "5e-5,2e-4", "adapter": "1e-3,3e-3"}, "mini": {"full": "2e-4,5e-4", "adapter": "1e-3,3e-3"}}
FEW = "--seeds 0,1,2,3,4 --steps 100 --eval_every 25 --seq_len 64 --device cpu --no_save_deltas".split()


@dataclass
class Config:
    """python -m experiments.transfer --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/ and tasks/
    base: str = "runs/minilm/pretrained/M0"  # M0
    only: tuple[str, ...] = ()  # parts: A, B, C, D; default: all
    where: tuple[str, ...] = ()  # facts of the cells to do, such as base=ind,kind=full; default: all
    budget: Positive | None = None  # seconds; nothing new begins after them
    home: str = "runs/transfer"  # bases, deltas and runs
    recipes: str = "runs/recipes"  # tasks and deltas of M0, shared with experiments.recipes
    cache: str = "runs/cache"  # tokenized corpora
    results: str = "results/transfer"  # rows, and the report
    report: bool = False  # write the report from the rows


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.report:
        print(report.write(Path(c.results)))
        return
    check_places("transfer", c.data, c.base)
    rows, end = Path(c.results) / "rows.jsonl", time.monotonic() + (c.budget or float("inf"))
    rows.parent.mkdir(parents=True, exist_ok=True)
    done = {json.dumps(row["cell"]) for row in read_rows(rows)} if rows.exists() else set()
    Path(c.home).mkdir(parents=True, exist_ok=True)
    wanted = dict(fact.partition("=")[::2] for fact in c.where)
    todo = [(cell, arguments) for cell, arguments in cells(c) if json.dumps(cell) not in done and (not c.only or cell["part"] in c.only)
            and wanted.items() <= {name: str(value) for name, value in cell.items()}.items()]
    if "D" in c.only and not todo:
        print("part D waits for part C's init on the upgrade, whose rate it takes, or is done")
    prepare(c, {cell[of] for cell, _ in todo for of in ("part", "base")})
    with progress(len(todo), "transfer", unit="cell") as bar:
        for cell, arguments in todo:
            if time.monotonic() > end:
                break
            out = Path(c.home, "runs", "-".join(str(v) for v in cell.values()))
            command = script(c, "recycle.py", *arguments, "--out", out, *(["--resume"] if out.exists() else []))
            facts = {"cell": cell, "device": device_name(torch.device("cpu")), "commit": commit(), "command": command}
            found = [facts | {k: row[k] for k in ("mode", "seed", "lr", "dev", "test", "best_step", "carried") if k in row}
                     for row in read_json(out / "summary.json")["rows"]]
            with rows.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))
            bar.update()


def script(c: Config, *command: object) -> str:
    """Run a script of the checkout and return the command as it can be typed."""
    return run_script({"DIR": c.data, "HOME": c.home, "M0": c.base, "RECIPES": c.recipes, "CACHE": c.cache}, *command)


def prepare(c: Config, needed: set[str]) -> None:
    """Make the bases, tasks and old deltas for these parts and new bases; what exists stays. M0's are those of experiments.recipes."""
    home, corpora, shared = Path(c.home), Path(c.data, "corpora"), recipes.Config(c.data, c.base, home=c.recipes)
    recipes.draw_tasks(shared)
    common = ("--batch_tokens", 1024, "--seq_len", 128, "--snapshots", 0, "--device", "cpu", "--cache", Path(c.cache))
    mini = ("--preset", "mini", "--stream", corpora / "wiki.txt.xz", "--steps", 1500, "--lr", 1e-3)
    for name, flags in (("mini", (*mini, "--vocab_size", 8192)), ("ind", (*mini, "--tokenizer", home / "mini", "--seed", 1)),
                        ("upgrade", ("--init", Path(c.base), "--stream", corpora / "bio.txt.xz", "--steps", 200, "--lr", 5e-4))):
        if name in needed | ({"mini"} if "ind" in needed else set()) and not (home / name / "summary.json").exists():
            script(c, "train.py", *flags, *common, "--out", home / name, *(["--resume"] if (home / name).exists() else []))
    if "twin" in needed and not (home / "twin").exists():
        twin = permuted_twin(open_base(c.base), 1)
        save_base(home / "twin", MaskedLM(twin.encoder, twin.head), twin.tokenizer, {"name": "twin"})
    for task, kind in product(TASKS, KINDS):
        if not delta(c, "minilm", task, kind).exists():
            recipes.tune_delta(shared, task, kind, 0)
        if "ind" in needed and not delta(c, "mini", task, kind).exists():
            script(c, "train.py", "--mode", "tune", "--base", home / "mini" / "M0", "--task", recipes.task_folder(shared, task), "--delta",
                   kind, "--lr", MINI_TUNED[kind], "--seq_len", 64, *recipes.TUNE, "--out", delta(c, "mini", task, kind))
        if "B" in needed and not (answers := predictions(c, task, kind)).exists():
            script(c, "-m", "rt.runs.predict", "--base", Path(c.base), "--delta_dir", delta(c, "minilm", task, kind), "--input",
                   recipes.task_folder(shared, task) / "train.jsonl", "--device", "cpu", "--out", answers)


def delta(c: Config, base: str, task: str, kind: str) -> Path:
    return Path(c.home, "deltas", f"mini-{task}-{kind}") if base == "mini" else Path(c.recipes, "deltas", f"{task}-{kind}-s0")


def predictions(c: Config, task: str, kind: str) -> Path:
    return Path(c.home, f"{task}-{kind}.jsonl")


def rate_of_init(c: Config, task: str, kind: str) -> float | None:
    """The best rate of part C's `init` on the upgrade by mean dev; None if it was not run yet."""
    path, cell = Path(c.results) / "rows.jsonl", {"what": "tuned", "task": task, "kind": kind, "base": "upgrade"}
    rows = [row for row in (read_rows(path) if path.exists() else []) if row["mode"] == "init" and cell.items() <= row["cell"].items()]
    rates = group(rows, "lr")
    return max(rates, key=lambda lr: mean(row["dev"]["accuracy"] for row in rates[lr]), default=(None,))[0]


def cells(c: Config) -> list[tuple[dict, list]]:
    """(facts, flags of recycle.py) of every cell of the plan."""
    home, m0, tasks, found = Path(c.home), Path(c.base), Path(c.recipes, "tasks"), []
    bases = {"mini": home / "mini" / "M0", "upgrade": home / "upgrade" / "M1", "twin": home / "twin", "ind": home / "ind" / "M0"}
    for task, kind in product(TASKS, KINDS):
        other = TASKS[1 - TASKS.index(task)]

        def add(part: str, what: str, modes: str, size: str, new: str, *flags: object, shots: int = 32, source: str = task) -> None:
            """Add a cell: `size` is the old base's size, `source` the old delta's task."""
            old = m0 if size == "minilm" else bases["mini"]
            trained = RATES["mini" if new in ("mini", "ind") else "minilm"][kind]
            old_flags = [] if "--teacher" in flags else ["--old_base", old, "--old_delta", delta(c, size, source, kind)]
            lr = [] if {*modes.split(",")} <= {"apply", "transport", "gradmask"} else ["--lr", trained]
            found.append(({"part": part, "what": what, "task": task, "kind": kind, "base": new, "shots": shots}, [
                "--mode", modes, *old_flags, "--base", bases[new], "--task", tasks / task, "--delta", kind, "--shots", shots, *FEW,
                *lr, *flags]))

        taught = ("--beta", 0)
        add("A", "plain", "scratch,distill", "minilm", "mini", *taught)
        for labels in ("soft", "hard"):
            add("A", f"texts, {labels}", "distill", "minilm", "mini", *taught, "--unlabelled", "rest", "--unlabelled_texts", 2000,
                "--pseudo_labels", labels)
        add("B", "black box", "distill", "minilm", "mini", *taught, "--teacher", predictions(c, task, kind), "--seeds", "0,1")
        for size, new in (("minilm", "twin"), ("mini", "ind"), ("minilm", "upgrade")):
            add("C", "apply", "apply,gradmask" if kind == "full" else "apply", size, new)
            add("C", "transport", "transport", size, new)
            if new != "twin":
                add("C", "tuned", "scratch,init", size, new)
                add("C", "project", "project", size, new, "--source_task", tasks / other, "--source_delta",
                    delta(c, size, other, kind), "--project_steps", 100, "--seeds", "0,1", "--lr", {"full": 1e-4, "adapter": 1e-3}[kind])
        for shots, head in product((8, 32), ("fresh", "prototype")) if (lr := rate_of_init(c, task, kind)) else ():
            add("D", head, "init" if head == "fresh" else "apply,init", "minilm", "upgrade", "--head", head, "--lr", lr, shots=shots,
                source=other)
    return sorted(found, key=lambda one: ("ACDB".index(one[0]["part"]), one[0]["base"] == "upgrade"))


if __name__ == "__main__":
    run(main)
