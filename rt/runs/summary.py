"""Many rows, grouped and summarised over seeds, and tables of them. A row is a dict: a run of recycle.py (mode, seed, lr, settings, dev,
test, curve), a row of a study, or a stage of pre-training."""
import json
import math
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Iterable, TypeVar

from rt.formats.untrusted import is_number
from rt.runs.log import table
from rt.tune import score

T = TypeVar("T")
Points = list[tuple[float, float]]
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # Student's t, two-sided 95%, for 2, 3, ... 10 values


def group(rows: Iterable[T], *keys: str | Callable[[T], Any]) -> dict[tuple, list[T]]:
    """Rows grouped by their values of `keys`, in order of appearance. A key is the name of a field, or a function of a row: its values,
    which may be lists and dicts, become JSON."""
    groups: dict[tuple, list[T]] = {}
    for row in rows:
        values = tuple(json.dumps(key(row), sort_keys=True) if callable(key) else row.get(key) for key in keys)
        groups.setdefault(values, []).append(row)
    return groups


def by_x(points: Points) -> dict[float, list[float]]:
    """All y values per x, from the lowest x to the highest."""
    return {x: [y for _, y in found] for x, found in groupby(sorted(points, key=itemgetter(0)), key=itemgetter(0))}


def interval(values: Iterable[float | None]) -> tuple[float, float]:
    """The mean and half the width of its 95% t-interval (0 for a single value). The mean is NaN if there is no value, or if a value is
    missing or not finite: a run that diverged is not left out."""
    values = list(values)
    if not values or not all(map(is_number, values)):
        return math.nan, 0.0
    if len(values) == 1:
        return values[0], 0.0
    df = len(values) - 1
    t = T95[df - 1] if df <= len(T95) else 1.96 + 2.37 / df + 2.8 / df**2       # right to .005
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def with_interval(values: Iterable[float | None]) -> str:
    """'0.123 ± 0.045', or the mean alone if there is a single value; 'undefined' for NaN."""
    middle, half = interval(values)
    if math.isnan(middle):
        return "undefined"
    digits = 5 if 0 < max(abs(middle), half) < 0.01 else 3
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


# --- runs of recycle.py -----------------------------------------------------------------------------------------------

def by_settings(row: dict) -> tuple[float | None, dict]:
    return row["lr"], row["settings"]


def chosen(rows: list[dict], mode: str, by: str | Callable[[dict], Any] = "lr") -> list[dict]:
    """The rows of a mode, one per seed, at the learning rate (or key `by`) with the best mean dev score. Only learning rates with the most
    seeds count: a mean over fewer seeds is a mean over other examples. Runs that diverged do not count."""
    return best_of(group((row for row in rows if row["mode"] == mode and not row.get("diverged")), by).values())


def best_of(groups: Iterable[list[dict]]) -> list[dict]:
    """The group of rows with the most seeds and, of these, the best mean dev score; recycling wins a tie."""
    return max(groups, key=lambda rows: (len(rows), mean(score(row["dev"]) for row in rows), rows[0]["mode"] != "scratch"), default=[])


def source_of(row: dict) -> list[str]:
    """Content hashes of what a run recycled: old base, and old delta (along a chain: with the bases between). Empty for scratch."""
    return [] if row["mode"] == "scratch" else (row.get("origin") or [])[0::2]


def add_steps_to_scratch(rows: list[dict]) -> None:
    """Add to each row the first step at which its dev score reaches scratch's best for the same seed, or None if it never does."""
    best = {row["seed"]: score(row["dev"]) for row in chosen(rows, "scratch", by_settings)}
    for row in rows:
        if row["seed"] in best:
            reached = (step for step, dev in row["curve"] if dev is not None and dev >= best[row["seed"]])
            row["steps_to_scratch_best"] = next(reached, None) if is_number(best[row["seed"]]) else None


def spread(rows: list[dict], part: str = "test") -> str:
    """Mean and standard deviation ("-" of one seed) of the score on a part, or "undefined" if one of the scores is undefined."""
    values = [score(row[part]) for row in rows]
    return f"{mean(values):.3f} ± {f'{stdev(values):.3f}' if len(values) > 1 else '-'}" if all(map(is_number, values)) else "undefined"


def steps_of(rows: list[dict]) -> str:
    """Steps to scratch's best dev score, one number per seed."""
    return " ".join("-" if row.get("steps_to_scratch_best") is None else str(row["steps_to_scratch_best"]) for row in rows)


def reported(groups: list[list[dict]]) -> tuple[str, str]:
    """(the part whose scores are reported: test, or dev if test has no labels; the metric that runs are compared by)"""
    return "test" if all(row["test"] for group in groups for row in group) else "dev", next(iter(groups[0][0]["dev"]))


def report(rows: list[dict], modes: list[str]) -> str:
    """A table with one line per mode, at its best learning rate."""
    groups = [chosen(rows, mode) for mode in modes]
    part, metric = reported(groups)
    lines = [[mode, group[0]["lr"] or "-", spread(group, part), steps_of(group), f"{mean(row['seconds'] for row in group):.1f}"]
             for mode, group in zip(modes, groups)]
    return table(lines, ["mode", "lr", f"{part} {metric}", "steps to scratch's best dev, by seed", "seconds"])


def report_sweep(rows: list[dict], modes: list[str], settings: list[str]) -> str:
    """A table with one line per mode, at its best combination of `settings` and learning rate. It has test scores if all rows have them."""
    groups, lines = [chosen(rows, mode, by_settings) for mode in modes], []
    part, metric = reported(groups)
    parts = [*dict.fromkeys(("dev", part))]
    for mode, group in zip(modes, groups):
        read = {name for row in rows if row["mode"] == mode for name in row["settings"]}       # a default of some flags is left out
        own = group[0]["settings"]
        values = [f"{name} {own[name]:g}" if name in own else f"{name} default" for name in settings if name in read]
        lines.append([mode, " ".join(values) or "-", group[0]["lr"] or "-", sum(row["mode"] == mode for row in rows),
                      *(spread(group, part) for part in parts), steps_of(group)])
    scores = [f"{part} {metric}" for part in parts]
    return table(lines, ["mode", "best by dev", "lr", "runs", *scores, "steps to scratch's best dev, by seed"])


def routes(mode: str) -> tuple[str | None, ...]:
    """The routes by which a mode gets from base to base in a chain."""
    return (None,) if mode == "scratch" else ("chain", "direct")


def report_chain(rows: list[dict], modes: list[str], bases: tuple[str, ...]) -> str:
    """Test (or dev) scores: one line per mode and route, one column per base, at the learning rate that is best on dev over all bases. "-":
    all runs diverged."""
    groups = [chosen([row for row in rows if row["route"] == route], mode) for mode in modes for route in routes(mode)]
    part, metric = reported(groups := [group for group in groups if group])
    lines = [[group[0]["mode"], group[0]["route"] or "-", group[0]["lr"] or "-",
              *(spread(there, part) if (there := [row for row in group if row["base"] == base]) else "-" for base in bases)]
             for group in groups]
    return f"{part} {metric}\n" + table(lines, ["mode", "route", "lr", *(Path(base).name for base in bases)])


def forgetting_table(stages: list[dict]) -> str:
    """Held-out masked-LM loss (accuracy) of each domain after each stage of pre-training. A stage is a dict with name, domain, heldout."""
    def cell(scores: dict | None) -> str:
        return f"{scores['loss']:.3f} ({scores['accuracy']:.3f})" if scores else "-"

    domains = list(stages[0]["heldout"])
    rows = [[f"{s['name']} ({s['domain']})", *(cell(s["heldout"].get(d)) for d in domains)] for s in stages]
    return "held-out masked-LM loss (accuracy)\n" + table(rows, ["after", *domains])
