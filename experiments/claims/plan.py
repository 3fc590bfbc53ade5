"""The plan of the claims: the sizes of each preset, then the runs in phases.

Later phases know the learning rates that earlier rows have chosen. Phases that many others need, and phases that bear on the most
claims, come first.
"""
import itertools
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

SEEDS = (20, 30, 40)        # as in the paper's configuration files
DOMAINS = ("wiki", "bio", "rev", "cs", "ns")
UPGRADES = ("M1", "M2", "M3", "M4")
TASKS = ("chemprot", "rotten_tomatoes", "agnews", "sick", "imdb", "mnli", "acl_arc")
TRANSFERS = (   # task, source of the old delta, how near the source is; never between rotten_tomatoes and sst2, which share sentences
    ("imdb", "rotten_tomatoes", "similar"), ("rotten_tomatoes", "imdb", "similar"), ("sick", "mnli", "similar"),
    ("mnli", "sick", "similar"), ("imdb", "agnews", "different"), ("rotten_tomatoes", "agnews", "different"),
    ("sick", "agnews", "different"), ("mnli", "agnews", "different"))
PROJECTIONS = (("imdb", "rotten_tomatoes"), ("rotten_tomatoes", "imdb"), ("sick", "mnli"))     # task, source tasks separated by commas


@dataclass(frozen=True)
class Scale:
    """How large everything is for one preset."""
    vocab_size: int
    steps: tuple[int, int]      # of M0, and of each upgrade; IND gets as many as all stages together
    lr: float                   # of pre-training
    batch_tokens: int
    seq_len: int                # of pre-training
    snapshots: int              # M_i(t) kept per stage
    tune_steps: int             # full data
    few_steps: int              # few-shot
    project_steps: int          # a projection, on its source tasks
    eval_every: int
    max_len: int                # of a task's texts, in tokens
    max_dev: int                # examples scored; the same draw for every run
    max_test: int
    max_path: int               # of those, at each point of a path
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)           # learning rates of the search, full delta
    module_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)    # adapter and lora
    tasks: tuple[str, ...] = TASKS                  # with a Delta_0
    full_tasks: tuple[str, ...] = TASKS             # full-data recycling
    few_tasks: tuple[str, ...] = TASKS              # 32-shot recycling
    path_tasks: tuple[str, ...] = TASKS             # paths, chains, similarity
    module_tasks: tuple[str, ...] = TASKS           # adapter and lora
    beyond_tasks: tuple[str, ...] = TASKS[:3]       # attention maps and interpolation
    transfers: tuple[tuple[str, str, str], ...] = TRANSFERS
    projections: tuple[tuple[str, str], ...] = PROJECTIONS


SCALES = {
    "tiny": Scale(400, (4, 3), 1e-3, 256, 32, 1, 4, 3, 2, 2, 24, 16, 24, 12, (1e-4, 1e-3), (1e-3, 1e-2),
                  ("rotten_tomatoes", "agnews", "imdb"), ("imdb",), ("imdb",), ("imdb",), ("imdb",), ("imdb",),
                  tuple(t for t in TRANSFERS if t[0] == "imdb"), PROJECTIONS[:1]),
    "mini": Scale(8192, (5000, 1000), 5e-4, 1024, 128, 3, 200, 60, 100, 50, 64, 300, 1000, 300, (2e-4, 5e-4), (2e-3, 5e-3),
                  TASKS[:6], TASKS[:3], TASKS[:4], TASKS[:2], TASKS[:1], TASKS[:1],
                  # without mnli, which M0 does not learn at this size
                  tuple(t for t in TRANSFERS if t[0] in ("imdb", "rotten_tomatoes")), PROJECTIONS[:2]),
    "small": Scale(16384, (20000, 5000), 5e-4, 16384, 128, 4, 600, 150, 300, 100, 128, 1000, 5000, 1000),
    "base": Scale(32768, (30000, 6000), 4e-4, 32768, 128, 4, 1000, 200, 500, 200, 128, 1000, 5000, 1000),
}


@dataclass(frozen=True)
class Run:
    """One run, done once. `part` is the file its rows go to; fields that do not apply stay None."""
    part: str
    what: str                       # train, tune, a mode of recycle.py, apply, walk, heads, distance
    task: str | None = None
    kind: str | None = None         # of the delta
    base: str | None = None         # M0 ... M4, M1-t00250, IND
    seed: int | None = None
    shots: int | None = None
    old_base: str | None = None     # the old delta's base; in a walk or comparison, the other end
    source: str | None = None       # the old delta's task
    near: str | None = None         # how near the source is to the task: same, similar or different
    variant: str | None = None      # gamma, itp: beyond the paper's terms; longer: twice the steps; curve: path; residual: projection

    @cached_property
    def facts(self) -> dict:
        """The fields that apply to this run, as stored in rows."""
        return {k: v for k, v in asdict(self).items() if v is not None}


OWN = "the task itself"     # a source that is the run's own task


def each(**choices: Any) -> list[Run]:
    """A run for every combination of the choices. A tuple lists choices; anything else is the same in all runs."""
    lists = [value if isinstance(value, tuple) else (value,) for value in choices.values()]
    runs = [Run(**dict(zip(choices, point))) for point in itertools.product(*lists)]
    return [replace(run, source=run.task) if run.source == OWN else run for run in runs]


def phases(s: Scale) -> list[list[Run]]:
    """All runs of a preset, in the order they are done."""
    bases = each(part="bases", what="train", base=("M0-M4", "IND"))
    # Delta_0: full tuning on every task
    old_deltas = each(part="tuned", what="tune", kind="full", base="M0", seed=SEEDS, task=s.tasks)
    # C4: batches from all examples, on M1; scratch also with as many steps as Delta_0 and init have together
    full = few("full") | {"part": "full", "task": s.full_tasks}
    full_data = each(**full, what=("scratch", "init", "init+distill")) + each(**full, what="scratch", variant="longer")
    # C1: Delta_0 on every snapshot of the first upgrade, and on every upgrade
    kept = (round(s.steps[1] * (k + 1) / (s.snapshots + 1)) for k in range(s.snapshots))      # as train.py --snapshots does
    snapshots = tuple(f"M1-t{t:05d}" for t in kept)
    compatibility = each(part="compatibility", what="apply", kind="full", task=s.tasks, base=("M0", *snapshots, *UPGRADES), seed=SEEDS,
                         old_base="M0", source=OWN)
    # deltas tuned on the other bases at the rate chosen on M0: the ends of the paths and the upper line of compatibility
    ends = each(part="tuned", what="tune", kind="full", seed=SEEDS, base=("M1", "IND", *UPGRADES[1:]), task=s.path_tasks)
    # C2: linear paths from M0 + Delta_0 to each upgrade's and to IND's own; the curve to M1 and IND
    pair = {"kind": "full", "seed": SEEDS, "task": s.path_tasks, "old_base": "M0"}
    walks = each(part="connectivity", what="walk", **pair, base=("M1", "IND", *UPGRADES[1:])) \
        + each(part="connectivity", what="walk", **pair, base=("M1", "IND"), variant="curve")
    # C3, and the distances
    similarity = each(part="similarity", what="heads", **pair, base=(*UPGRADES, "IND")) \
        + each(part="distance", what="distance", **pair, base=(*UPGRADES, "IND"))
    # attention-map and interpolation distillation, in addition to the paper's terms
    beyond = each(**few("full"), task=s.beyond_tasks, what=("init+distill", "distill"), shots=32, variant=("gamma", "itp"))
    # C4's order: init from the same, a similar and a different task, on M1
    transfer = {"part": "transfer", "kind": "full", "base": "M1", "seed": SEEDS, "shots": 32, "old_base": "M0"}
    targets = tuple(dict.fromkeys(task for task, _, _ in s.transfers))
    transfers = each(**transfer, what=("scratch", "init"), task=targets, source=OWN, near="same")
    transfers += [run for task, source, near in s.transfers for run in each(**transfer, what="init", task=task, source=source, near=near)]
    # C7: learned on one task, used on another, against apply
    projected = {"part": "project", "kind": "full", "base": "M1", "seed": SEEDS, "old_base": "M0"}
    projections = [run for task, sources in s.projections for run in each(**projected, what="apply", task=task, source=task)
                   + each(**projected, what="project", task=task, source=sources, variant=(None, "residual"))]
    # M0 to M4, recycling the recycled delta or Delta_0 each time, few-shot
    chains = each(part="chain", what="init+distill", kind="full", base="M4", seed=SEEDS, task=s.path_tasks, shots=32, old_base="M0",
                  source=OWN, near="same")
    # adapter and LoRA: Delta_0, and the modes with few labels
    kinds = ("adapter", "lora")
    modules = each(part="tuned", what="tune", base="M0", kind=kinds, seed=SEEDS, task=s.module_tasks) + few_shot(s.module_tasks, kinds)
    return [bases, old_deltas, few_shot(s.few_tasks), compatibility, ends, walks, similarity, full_data, transfers, projections, beyond,
            chains, modules]


def few(kind: str | tuple[str, ...]) -> dict[str, Any]:
    """The fields shared by all runs with few labels on M1."""
    return {"part": "few", "kind": kind, "base": "M1", "seed": SEEDS, "old_base": "M0", "source": OWN, "near": "same"}


def few_shot(tasks: tuple[str, ...], kind: str | tuple[str, ...] = "full") -> list[Run]:
    """C5 and C6: 32 examples per label on M1 for each mode, and the old delta unchanged."""
    return each(**few(kind), task=tasks, what="apply") \
        + each(**few(kind), task=tasks, what=("scratch", "init", "distill", "init+distill"), shots=32)


def searched(run: Run) -> Run:
    """The run whose learning-rate search decides for `run`: the same run with the first seed. The ends of paths use the search of Delta_0,
    a longer run uses the search of the shorter one."""
    return replace(run, seed=SEEDS[0], base="M0" if run.what == "tune" else run.base,
                   variant=None if run.variant == "longer" else run.variant)
