"""Old deltas across sizes, tokenizers, black boxes and coordinates: PLAN.md's runs by recycle.py, and their report.

    python -m experiments.minilm --data DIR         # M0, once
    python -m experiments.transfer --data DIR       # about three hours on 2 cores; continues where it was stopped
    python -m experiments.transfer --report         # results/transfer/README.md, from the rows alone

Ridge and orthogonal maps went after part C. Their cells, heads carried alone and part E need the code that had them, beside this checkout:

    git worktree add --detach ../with-maps 5072baf
    python -m experiments.transfer --data DIR --at ../with-maps     # half an hour more
"""
import json
import shutil
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from bench.machine import commit, device_name
from experiments.common import ROOT, cells_to_do, check_places, do_cells, script
from experiments.recipes import runs as recipes
from experiments.recipes.plan import PLACE, TUNE
from experiments.transfer import report
from experiments.twin import save_twin
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.files import read_json, read_rows
from rt.formats.tasks import load_task
from rt.limits import Positive
from rt.runs.config import parse, run
from rt.runs.summary import chosen

TASKS, KINDS, MAPS = ("rotten_tomatoes", "agnews"), ("full", "adapter"), ("ridge", "orthogonal", "permutation")
WITH_MAPS = "5072baf"       # the last commit that had all three
LORA_TUNED = 2e-3           # rate of MiniLM's old LoRA
MINI_TUNED = {"full": 5e-4, "adapter": 3e-3}        # rates of the old deltas of mini
RATES = {"minilm": {"full": "5e-5,2e-4", "adapter": "1e-3,3e-3"},
         "mini": {"full": "2e-4,5e-4", "adapter": "1e-3,3e-3", "lora": "1e-3,3e-3"}}
FEW = "--seeds 0,1,2,3,4 --steps 100 --eval_every 25 --seq_len 64 --device cpu --no_save_deltas".split()


@dataclass
class Config:
    """python -m experiments.transfer --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/ and tasks/
    base: str = "runs/minilm/pretrained/M0"  # M0
    at: str | None = None  # checkout of commit 5072baf, for ridge and orthogonal maps, heads carried alone and part E
    only: tuple[Literal["A", "B", "C", "D", "E", "F"], ...] = ()  # parts: A, B, C, D, E, F; default: all
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
        print(report.write(Path(c.results), [cell for cell, _ in cells(c)]))
        return
    check_places("transfer", c.data, c.base, *([c.at] if c.at else []))
    rows = Path(c.results) / "rows.jsonl"
    Path(c.home).mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells_to_do(rows, [cell for cell, _ in cells(c)], c.where) if not c.only or cell["part"] in c.only]
    if {"D", "F"} & {*c.only} and not todo:
        print("parts D and F wait for part C's init on the upgrade, whose rate they take, or are done")
    prepare(c, {cell[of] for cell in todo for of in ("part", "base")})
    do_cells(rows, todo, c.budget, lambda cell: run_cell(c, cell))


def arguments_of(c: Config, cell: dict) -> list:
    return next(arguments for one, arguments in cells(c) if one == cell)


def run_cell(c: Config, cell: dict) -> list[dict]:
    """Run recycle.py for a cell; a row per run."""
    if cell["what"].startswith("head, "):
        carry_head(c, cell)
    out, arguments = Path(c.home, "runs", "-".join(str(v) for v in cell.values())), arguments_of(c, cell)
    root, made_at = (c.at, WITH_MAPS) if "--carry" in arguments else (ROOT, commit())
    command = script(c, "recycle.py", *arguments, out=out, root=root)
    facts = {"device": device_name(torch.device("cpu")), "commit": made_at, "command": command}
    return [facts | {k: row[k] for k in ("mode", "seed", "lr", "dev", "test", "best_step", "carried") if k in row}
            for row in read_json(out / "summary.json")["rows"]]


def prepare(c: Config, needed: set[str]) -> None:
    """Make the bases, tasks and old deltas for these parts and new bases; what exists stays. M0's are those of experiments.recipes."""
    home, corpora, shared = Path(c.home), Path(c.data, "corpora"), recipes.Config(c.data, c.base, home=c.recipes)
    recipes.draw_tasks(shared)
    common = ("--batch_tokens", 1024, "--seq_len", 128, "--snapshots", 0, "--device", "cpu", "--cache", Path(c.cache))
    mini = ("--preset", "mini", "--stream", corpora / "wiki.txt.xz", "--steps", 1500, "--lr", 1e-3)
    for name, flags in (("mini", (*mini, "--vocab_size", 8192)), ("ind", (*mini, "--tokenizer", home / "mini", "--seed", 1)),
                        ("upgrade", ("--init", Path(c.base), "--stream", corpora / "bio.txt.xz", "--steps", 200, "--lr", 5e-4))):
        if name in needed | ({"mini"} if "ind" in needed else set()) and not (home / name / "summary.json").exists():
            script(c, "train.py", *flags, *common, out=home / name)
    if "twin" in needed and not (home / "twin").exists():
        save_twin(c.base, home / "twin")
    for task, kind in product(TASKS, KINDS):
        if not delta(c, "minilm", task, kind).exists():
            recipes.tune_delta(shared, task, kind, 0)
        if "ind" in needed and not delta(c, "mini", task, kind).exists():
            tune(c, "mini", task, kind, MINI_TUNED[kind])
        if "B" in needed and not (answers := predictions(c, task, kind)).exists():
            script(c, "-m", "rt.runs.predict", "--base", Path(c.base), "--delta_dir", delta(c, "minilm", task, kind), "--input",
                   recipes.task_folder(shared, task) / "train.jsonl", "--device", "cpu", "--out", answers)
    for task in TASKS:
        if "E" in needed and not delta(c, "minilm", task, "lora").exists():
            tune(c, "minilm", task, "lora", LORA_TUNED)
        if needed & {"D", "F"} and not (named := Path(c.recipes, "tasks", f"{task}-names")).exists():  # each label's name is its only text
            shutil.copytree(Path(c.recipes, "tasks", task), named)
            (named / "train.jsonl").write_text("".join(
                json.dumps({"text": label, "label": label}) + "\n" for label in load_task(named).labels), encoding="utf-8")


def tune(c: Config, base: str, task: str, kind: str, lr: float) -> None:
    """Make an old delta of `base`."""
    script(c, "train.py", "--mode", "tune", "--base", Path(c.base) if base == "minilm" else Path(c.home, "mini", "M0"), "--task",
           Path(c.recipes, "tasks", task), "--delta", kind, "--lr", lr, "--seq_len", 64, *TUNE, *PLACE["cpu"],
           "--out", delta(c, base, task, kind))


def carry_head(c: Config, cell: dict) -> None:
    """Make the old delta of a cell with a head that a map carried and a body as it was."""
    task, kind, base, carry = cell["task"], cell["kind"], cell["base"], cell["what"].removeprefix("head, ")
    out, old = Path(c.home, "carried", f"{base}-{carry}-{task}-{kind}"), delta(c, "mini" if base == "ind" else "minilm", task, kind)
    if not (out / "summary.json").exists():
        script(c, "recycle.py", *arguments_of(c, cell | {"what": carry}), "--save_deltas", "--out", out, root=c.at)
    [row] = read_json(out / "summary.json")["rows"]
    save_delta(head_alone(c, cell), replace(load_delta(old), head=load_delta(out / "deltas" / row["run"]).head))


def head_alone(c: Config, cell: dict) -> Path:
    return Path(c.home, "heads", "-".join(cell[name] for name in ("base", "what", "task", "kind")).replace(", ", "-"))


def delta(c: Config, base: str, task: str, kind: str) -> Path:
    own = base == "mini" or kind == "lora"
    return Path(c.home, "deltas", f"{base}-{task}-{kind}") if own else Path(c.recipes, "deltas", f"{task}-{kind}-s0")


def predictions(c: Config, task: str, kind: str) -> Path:
    return Path(c.home, f"{task}-{kind}.jsonl")


def rate_of_init(c: Config, task: str, kind: str) -> float | None:
    """The best rate of part C's `init` on the upgrade by mean dev; None if it was not run yet."""
    cell = {"what": "tuned", "task": task, "kind": kind, "base": "upgrade"}
    best = chosen([row for row in read_rows(Path(c.results) / "rows.jsonl") if cell.items() <= row["cell"].items()], "init")
    return best[0]["lr"] if best else None


def cells(c: Config) -> list[tuple[dict, list]]:
    """(facts, flags of recycle.py) of every cell of the plan."""
    home, m0, tasks, found = Path(c.home), Path(c.base), Path(c.recipes, "tasks"), []
    bases = {"mini": home / "mini" / "M0", "upgrade": home / "upgrade" / "M1", "twin": home / "twin", "ind": home / "ind" / "M0"}
    for task, kind in product(TASKS, (*KINDS, "lora")):
        other = TASKS[1 - TASKS.index(task)]

        def add(part: str, what: str, modes: str, size: str, new: str, *flags: object, shots: int = 32, source: str = task,
                folder: Path = tasks / task) -> None:
            """Add a cell: `size` is the old base's size, `source` the old delta's task, `folder` holds the new task."""
            old = m0 if size == "minilm" else bases["mini"]
            trained = RATES["mini" if new in ("mini", "ind") else "minilm"][kind]
            cell = {"part": part, "what": what, "task": task, "kind": kind, "base": new, "shots": shots}
            old_delta = head_alone(c, cell) if what.startswith("head, ") else delta(c, size, source, kind)
            old_flags = [] if "--teacher" in flags else ["--old_base", old, "--old_delta", old_delta]
            lr = [] if {*modes.split(",")} <= {"apply", "transport", "gradmask"} else ["--lr", trained]
            found.append((cell, [
                "--mode", modes, *old_flags, "--base", bases[new], "--task", folder, "--delta", kind, "--shots", shots or "none", *FEW,
                *lr, *flags]))

        taught = ("--beta", 0)
        if kind != "full" and c.at:
            add("E", "ridge", "transport,init", "minilm", "mini", "--carry", "ridge")
        if kind == "lora":
            add("E", "plain", "scratch,distill", "minilm", "mini", *taught)
            continue
        add("A", "plain", "scratch,distill", "minilm", "mini", *taught)
        for labels in ("soft", "hard"):
            add("A", f"texts, {labels}", "distill", "minilm", "mini", *taught, "--unlabelled", "rest", "--unlabelled_texts", 2000,
                "--pseudo_labels", labels)
        add("B", "black box", "distill", "minilm", "mini", *taught, "--teacher", predictions(c, task, kind), "--seeds", "0,1")
        for size, new in (("minilm", "twin"), ("mini", "ind"), ("minilm", "upgrade")):
            add("C", "apply", "apply,gradmask" if kind == "full" else "apply", size, new)
            add("C", "transport", "transport", size, new)
            for carry in MAPS if c.at else ():
                add("C", carry, "transport", size, new, "--carry", carry, "--seeds", 0)
                add("C", f"head, {carry}", "apply", size, new, "--seeds", 0)
            add("C", "tuned", "scratch,init", size, new)
            add("C", "project", "project", size, new, "--source_task", tasks / other, "--source_delta",
                delta(c, size, other, kind), "--project_steps", 100, "--seeds", "0,1", "--lr", {"full": 1e-4, "adapter": 1e-3}[kind])
        for part in ("D", "F"):
            for shots, head in product((8, 32), ("fresh", "prototype")) if (lr := rate_of_init(c, task, kind)) or c.report else ():
                add(part, head, "init" if head == "fresh" else "apply,init", "minilm", "upgrade", "--head", head, "--lr", lr, shots=shots,
                    source=other)
            add(part, "prototype", "apply", "minilm", "upgrade", "--head", "prototype", "--seeds", 0, shots=0, source=other,
                folder=tasks / f"{task}-names")
    return sorted(found, key=lambda one: ("ACDBEF".index(one[0]["part"]), one[0]["base"] == "upgrade"))


if __name__ == "__main__":
    run(main)
