"""Rows of a run or a study: grouped, and summarised over seeds."""
import math
from itertools import groupby
from operator import itemgetter
from statistics import mean, stdev
from typing import Iterable

from rt.formats.untrusted import is_number

Points = list[tuple[float, float]]
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # Student's t, two-sided 95%, for 2, 3, ... 10 values


def group(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Rows grouped by their values of `keys`, in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
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
    return mean(values), (T95[len(values) - 2] if len(values) <= 10 else 2.1) * stdev(values) / math.sqrt(len(values))


def with_interval(values: Iterable[float | None]) -> str:
    """'0.123 ± 0.045', or the mean alone if there is a single value; 'undefined' for NaN."""
    middle, half = interval(values)
    if math.isnan(middle):
        return "undefined"
    digits = 5 if 0 < abs(middle) < 0.01 else 3
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")
