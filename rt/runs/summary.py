"""Tables over many rows. A row is a dict: a run of recycle.py (mode, seed, lr, settings, dev, test, curve) or a stage of pre-training."""
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Iterable, TypeVar

from rt.formats.untrusted import is_number
from rt.runs.log import table
from rt.tune import score

T = TypeVar("T")


def group_by(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Lists of the items with equal keys, in order of appearance. A key may be any JSON value."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(json.dumps(key(item), sort_keys=True), []).append(item)
    return list(groups.values())


def by_settings(row: dict) -> tuple[float | None, dict]:
    return row["lr"], row["settings"]


def chosen(rows: list[dict], mode: str, by: Callable[[dict], Any] = lambda row: row["lr"]) -> list[dict]:
    """The rows of a mode, one per seed, at the learning rate (or key `by`) with the best mean dev score. Only learning rates with the most
    seeds count: a mean over fewer seeds is a mean over other examples."""
    groups = group_by((row for row in rows if row["mode"] == mode), by)
    return max(groups, key=lambda group: (len(group), mean(score(row["dev"]) for row in group)), default=[])


def add_steps_to_scratch(rows: list[dict]) -> None:
    """Add to each row the first step at which its dev score reaches scratch's best for the same seed, or None if it never does."""
    best = {row["seed"]: score(row["dev"]) for row in chosen(rows, "scratch", by_settings)}
    for row in rows:
        if row["seed"] in best:
            reached = (step for step, dev in row["curve"] if dev is not None and dev >= best[row["seed"]])
            row["steps_to_scratch_best"] = next(reached, None) if is_number(best[row["seed"]]) else None


def spread(rows: list[dict], part: str = "test") -> str:
    """Mean and standard deviation of the score on a part, or "undefined" if one of the scores is undefined."""
    values = [score(row[part]) for row in rows]
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}" if all(map(is_number, values)) else "undefined"


def steps_of(rows: list[dict]) -> str:
    """Steps to scratch's best dev score, one number per seed."""
    return " ".join("-" if row.get("steps_to_scratch_best") is None else str(row["steps_to_scratch_best"]) for row in rows)


def part_of(groups: list[list[dict]]) -> str:
    """The part that is reported: test, or dev if test has no labels."""
    return "test" if all(row["test"] for group in groups for row in group) else "dev"


def metric_of(groups: list[list[dict]]) -> str:
    return next(iter(groups[0][0]["dev"]))


def report(rows: list[dict], modes: list[str]) -> str:
    """A table with one line per mode, at its best learning rate."""
    groups = [chosen(rows, mode) for mode in modes]
    part = part_of(groups)
    lines = [[mode, group[0]["lr"] or "-", spread(group, part), steps_of(group), f"{mean(row['seconds'] for row in group):.1f}"]
             for mode, group in zip(modes, groups)]
    return table(lines, ["mode", "lr", f"{part} {metric_of(groups)}", "steps to scratch's best dev, by seed", "seconds"])


def report_sweep(rows: list[dict], modes: list[str], settings: list[str]) -> str:
    """A table with one line per mode, at its best combination of `settings` and learning rate. It has test scores if all rows have them."""
    groups, lines = [chosen(rows, mode, by_settings) for mode in modes], []
    parts = [*dict.fromkeys(("dev", part_of(groups)))]
    for mode, group in zip(modes, groups):
        values = [f"{name} {group[0]['settings'][name]:g}" for name in settings if name in group[0]["settings"]]
        lines.append([mode, " ".join(values) or "-", group[0]["lr"] or "-", sum(row["mode"] == mode for row in rows),
                      *(spread(group, part) for part in parts), steps_of(group)])
    scores = [f"{part} {metric_of(groups)}" for part in parts]
    return table(lines, ["mode", "best by dev", "lr", "runs", *scores, "steps to scratch's best dev, by seed"])


def routes(mode: str) -> tuple[str | None, ...]:
    """The routes by which a mode gets from base to base in a chain."""
    return (None,) if mode == "scratch" else ("chain", "direct")


def report_chain(rows: list[dict], modes: list[str], bases: tuple[str, ...]) -> str:
    """Test (or dev) scores: one line per mode and route, one column per base, at the learning rate that is best on dev over all bases."""
    groups = [chosen([row for row in rows if row["route"] == route], mode) for mode in modes for route in routes(mode)]
    part = part_of(groups)
    lines = [[group[0]["mode"], group[0]["route"] or "-", group[0]["lr"] or "-",
              *(spread([row for row in group if row["base"] == base], part) for base in bases)] for group in groups]
    return f"{part} {metric_of(groups)}\n" + table(lines, ["mode", "route", "lr", *(Path(base).name for base in bases)])


def forgetting_table(stages: list[dict]) -> str:
    """Held-out masked-LM loss (accuracy) of each domain after each stage of pre-training. A stage is a dict with name, domain, heldout."""
    def cell(scores: dict | None) -> str:
        return f"{scores['loss']:.3f} ({scores['accuracy']:.3f})" if scores else "-"

    domains = list(stages[0]["heldout"])
    rows = [[f"{s['name']} ({s['domain']})", *(cell(s["heldout"].get(d)) for d in domains)] for s in stages]
    return "held-out masked-LM loss (accuracy)\n" + table(rows, ["after", *domains])
