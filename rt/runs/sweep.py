"""A grid of settings, written as text: "seed=20,30,40 alpha=.7,.9 T=5,10,20" is 18 runs."""
import difflib
import itertools

from rt.errors import InputError
from rt.losses import DistillConfig
from rt.runs.config import C, changed, convert, flags_of, record, replace_flags
from rt.runs.summary import group

# settings that a grid can vary; runs of one group, done side by side, differ only in SIDE_BY_SIDE, seed and learning rate
SWEPT = ("seed", "lr", *(flag.name for flag in flags_of(DistillConfig) if type(flag.default) in (int, float)), "unlabelled_share",
         "steps", "batch_size", "warmup", "weight_decay", "early_stop")
SIDE_BY_SIDE = ("alpha", "beta", "T")
LISTS = {"seed": "seeds", "lr": "lr"}           # setting -> its flag, which takes several values


def swept(spec: str) -> dict[str, list[str]]:
    """{name: values as text} of a grid. InputError unless `spec` is name=value,value ... with names in SWEPT."""
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
        if "=" in text:
            raise InputError(f"--sweep {part}: separate settings by spaces: name=value,value name=value")
        grid[name] = values
    return grid


def expand(config: C, spec: str) -> list[C]:
    """One copy of `config` per combination of the grid's values, in the order in which the values are written."""
    kinds = {flag.name: flag.kind for flag in flags_of(type(config))}
    choices = [[(LISTS.get(name, name), convert(f"sweep {name}", text, kinds[LISTS.get(name, name)])) for text in texts]
               for name, texts in swept(spec).items()]
    typed = getattr(config, "typed", changed(config))       # also a flag whose value is the default
    given = {name: value for name, value in record(config).items() if name in typed}
    for choice in choices:
        flag = choice[0][0]
        if lost := {*several(given.get(flag, ()))} - {v for _, value in choice for v in several(value)}:
            raise InputError(f"--sweep {spec}: leaves out --{flag} {min(lost)}")
    return [replace_flags(config, **dict(combination)) for combination in itertools.product(*choices)]


def several(value: object) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def dealt(runs: list, rank: int, world: int, workers: int = 1) -> list[list]:
    """The runs (with `mode` and `settings`) that one of `world` ranks does. The runs of a list may be done side by side, and the lists by
    different `workers` of the rank."""
    alike = group(runs, lambda run: [run.mode, {k: v for k, v in run.settings.items() if k not in SIDE_BY_SIDE}]).values()
    parts = world * workers
    return [part for some in alike for k in range(parts) if (part := some[k::parts])][rank::world]
