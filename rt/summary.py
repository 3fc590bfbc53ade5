"""What the rows of a summary say together: recycle.py's are dicts with mode, seed, lr, settings, dev, test and curve, one a run."""
import json
from statistics import mean, stdev
from typing import Callable

from rt.log import table
from rt.tune import score


def by_rate(row: dict) -> float | None:
    return row["lr"]


def by_settings(row: dict) -> tuple[float | None, str]:
    return row["lr"], json.dumps(row["settings"], sort_keys=True)


def chosen(rows: list[dict], mode: str, by: Callable[[dict], object] = by_rate) -> list[dict]:
    """The rows of a mode, one a seed, at the learning rate (or whatever `by` tells apart) whose dev score is best on average."""
    groups: dict = {}
    for row in rows:
        if row["mode"] == mode:
            groups.setdefault(by(row), []).append(row)
    return max(groups.values(), key=lambda group: mean(score(row["dev"]) for row in group), default=[])


def add_steps_to_scratch(rows: list[dict], by: Callable[[dict], object] = by_rate) -> None:
    """First step at which a run's dev score is that of scratch's best of the same seed, or above; None if never."""
    best = {row["seed"]: score(row["dev"]) for row in chosen(rows, "scratch", by)}
    for row in rows:
        if row["seed"] in best:
            row["steps_to_scratch_best"] = next((step for step, dev in row["curve"] if dev >= best[row["seed"]]), None)


def spread(rows: list[dict], part: str = "test") -> str:
    """Mean and standard deviation of the score on test, or dev."""
    values = [score(row[part]) for row in rows]
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def steps_of(rows: list[dict]) -> str:
    """Steps to scratch's best dev, one figure a seed."""
    return " ".join("-" if row["steps_to_scratch_best"] is None else str(row["steps_to_scratch_best"]) for row in rows)


def forgetting_table(stages: list[dict]) -> str:
    """Held-out masked-LM loss (accuracy) of every domain after every stage of pre-training: dicts with name, domain and heldout."""
    def cell(scores: dict | None) -> str:
        return f"{scores['loss']:.3f} ({scores['accuracy']:.3f})" if scores else "-"

    domains = list(stages[0]["heldout"])
    rows = [[f"{s['name']} ({s['domain']})", *(cell(s["heldout"].get(d)) for d in domains)] for s in stages]
    return "held-out masked-LM loss (accuracy)\n" + table(rows, ["after", *domains])
