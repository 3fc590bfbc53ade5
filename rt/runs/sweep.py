"""A grid of settings, as text: "seed=20,30,40 alpha=.7,.9 T=5,10,20" is 18 runs."""
import difflib
import itertools
import json
import typing
from dataclasses import replace
from typing import Any

from rt.errors import InputError
from rt.runs.config import convert

# what a run may differ in; those of SIDE_BY_SIDE even within one group (rt/grid.py)
SWEPT = ("seed", "lr", "alpha", "beta", "T", "gamma", "itp", "steps", "batch_size", "warmup", "weight_decay", "early_stop")


SIDE_BY_SIDE = ("alpha", "beta", "T")     # and seed and rate, which are not among a run's settings


LISTS = {"seed": "seeds", "lr": "lr"}           # fields of a config that hold several


def swept(spec: str) -> dict[str, list[str]]:
    """{name: its values as text} of a grid. InputError for what is not name=value,value,... of SWEPT."""
    grid: dict[str, list[str]] = {}
    for part in spec.split():
        name, _, text = part.partition("=")
        values = [v for v in text.split(",") if v]
        if name not in SWEPT:
            near = difflib.get_close_matches(name, SWEPT, n=1, cutoff=0.5)
            raise InputError(f"--sweep {part}: {name or 'this'} cannot be swept; "
                             + (f"did you mean {near[0]}?" if near else f"what can: {', '.join(SWEPT)}"))
        if not values or name in grid:
            raise InputError(f"--sweep {part}: " + (f"{name} is there twice" if name in grid else "no values; write name=value,value"))
        grid[name] = values
    return grid


def expand(config: Any, spec: str) -> list:
    """`config` once for every combination of the grid's values, in the order in which they are written."""
    kinds = typing.get_type_hints(type(config))
    choices = []
    for name, texts in swept(spec).items():
        field = LISTS.get(name, name)
        choices.append([(field, convert(f"sweep {name}", text, kinds[field])) for text in texts])
    return [replace(config, **dict(combination)) for combination in itertools.product(*choices)]


def groups(runs: list) -> list[list]:
    """Runs (with `mode` and `settings`) that may go side by side, together."""
    together: dict[str, list] = {}
    for run in runs:
        rest = {k: v for k, v in run.settings.items() if k not in SIDE_BY_SIDE}
        together.setdefault(json.dumps([run.mode, rest], sort_keys=True), []).append(run)
    return list(together.values())
