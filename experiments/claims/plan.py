"""What is run for the claims, in which order, and what decides it: sizes a preset, then phases of runs.

A phase is a function from the rows so far to the runs it wants; a learning rate chosen by an earlier row is known to the
phases after it. Phases that many others need, and those that speak to the most claims, come first.
"""
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Callable, Iterator

SEEDS = (20, 30, 40)        # as in the paper's configuration files
DOMAINS = ("wiki", "bio", "rev", "cs", "ns")
UPGRADES = ("M1", "M2", "M3", "M4")
TASKS = ("chemprot", "rotten_tomatoes", "agnews", "sick", "imdb", "mnli", "acl_arc")
TRANSFERS = (   # task, source of the old delta, how near it is; never between rotten_tomatoes and sst2, which share sentences
    ("imdb", "rotten_tomatoes", "similar"), ("rotten_tomatoes", "imdb", "similar"), ("sick", "mnli", "similar"),
    ("mnli", "sick", "similar"), ("imdb", "agnews", "different"), ("rotten_tomatoes", "agnews", "different"),
    ("sick", "agnews", "different"), ("mnli", "agnews", "different"))
PROJECTIONS = (("imdb", "rotten_tomatoes"), ("rotten_tomatoes", "imdb"), ("sick", "mnli"))     # task, source tasks with commas


@dataclass(frozen=True)
class Scale:
    """How large everything is for one preset."""
    vocab_size: int
    steps: tuple[int, int]      # of M0, and of each upgrade; IND gets as many as all stages together
    lr: float                   # of pre-training
    batch_tokens: int
    seq_len: int                # of pre-training
    snapshots: int              # M_i(t) kept a stage
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
                  # without what mnli takes part in, which M0 does not learn at this size
                  tuple(t for t in TRANSFERS if t[0] in ("imdb", "rotten_tomatoes")), PROJECTIONS[:2]),
    "small": Scale(16384, (20000, 5000), 5e-4, 16384, 128, 4, 600, 150, 300, 100, 128, 1000, 5000, 1000),
    "base": Scale(32768, (30000, 6000), 4e-4, 32768, 128, 4, 1000, 200, 500, 200, 128, 1000, 5000, 1000),
}


@dataclass(frozen=True)
class Run:
    """One thing to do once. `part` is the file its rows go to; what has no meaning for it stays None."""
    part: str
    what: str                       # train, tune, a mode of recycle.py, apply, walk, heads, distance
    task: str | None = None
    kind: str | None = None         # of the delta
    base: str | None = None         # M0 ... M4, M1-t00250, IND
    seed: int | None = None
    shots: int | None = None
    old_base: str | None = None     # where the old delta is from; of a walk or comparison, the other end
    source: str | None = None       # the old delta's task
    near: str | None = None         # same, similar or different: the source to the task
    variant: str | None = None      # gamma, itp: beyond the paper's terms; longer: twice the steps; curve: path; residual: projection

    @cached_property
    def facts(self) -> dict:
        """What has a meaning for it, as rows hold it."""
        return {k: v for k, v in asdict(self).items() if v is not None}


Phase = Callable[[Scale], Iterator[Run]]


def bases(s: Scale) -> Iterator[Run]:
    yield Run("bases", "train", base="M0-M4")
    yield Run("bases", "train", base="IND")


def old_deltas(s: Scale) -> Iterator[Run]:
    """Delta_0, full tuning on every task."""
    for seed in SEEDS:
        for task in s.tasks:
            yield Run("tuned", "tune", task, "full", "M0", seed)


def few_shot(s: Scale) -> Iterator[Run]:
    """C5 and C6: 32 examples a label on M1."""
    for seed in SEEDS:
        for task in s.few_tasks:
            yield Run("few", "apply", task, "full", "M1", seed, None, "M0", task, "same")
            for mode in ("scratch", "init", "distill", "init+distill"):
                yield Run("few", mode, task, "full", "M1", seed, 32, "M0", task, "same")


def full_data(s: Scale) -> Iterator[Run]:
    """C4: drawn from all examples, on M1; scratch also for as many steps as Delta_0 and init have together."""
    for seed in SEEDS:
        for task in s.full_tasks:
            for mode in ("scratch", "init", "init+distill"):
                yield Run("full", mode, task, "full", "M1", seed, None, "M0", task, "same")
            yield Run("full", "scratch", task, "full", "M1", seed, None, "M0", task, "same", "longer")


def compatibility(s: Scale) -> Iterator[Run]:
    """C1: Delta_0 on every snapshot of the first upgrade, and on every upgrade."""
    for task in s.tasks:
        for base in ("M0", *(f"M1-t{t:05d}" for t in snapshot_steps(s)), *UPGRADES):
            for seed in SEEDS:
                yield Run("compatibility", "apply", task, "full", base, seed, None, "M0", task)


def ends(s: Scale) -> Iterator[Run]:
    """Deltas tuned on the other bases, at the rate chosen on M0: the ends of the paths, the upper line of compatibility."""
    for seed in SEEDS:
        for base in ("M1", "IND", *UPGRADES[1:]):
            for task in s.path_tasks:
                yield Run("tuned", "tune", task, "full", base, seed)


def walks(s: Scale) -> Iterator[Run]:
    """C2: linear paths from M0 + Delta_0 to each upgrade's and to IND's own; the curve to M1 and IND."""
    for seed in SEEDS:
        for task in s.path_tasks:
            for base in ("M1", "IND", "M2", "M3", "M4"):
                yield Run("connectivity", "walk", task, "full", base, seed, old_base="M0")
            for base in ("M1", "IND"):
                yield Run("connectivity", "walk", task, "full", base, seed, old_base="M0", variant="curve")


def similarity(s: Scale) -> Iterator[Run]:
    """C3, and the distances."""
    for what in ("heads", "distance"):
        for task in s.path_tasks:
            for seed in SEEDS:
                for base in ("M1", "M2", "M3", "M4", "IND"):
                    yield Run(what if what == "distance" else "similarity", what, task, "full", base, seed, old_base="M0")


def beyond(s: Scale) -> Iterator[Run]:
    """Attention-map and interpolation distillation beside the paper's terms, few-shot."""
    for seed in SEEDS:
        for task in s.beyond_tasks:
            for variant in ("gamma", "itp"):
                yield Run("few", "init+distill", task, "full", "M1", seed, 32, "M0", task, "same", variant)
                yield Run("few", "distill", task, "full", "M1", seed, 32, "M0", task, "same", variant)


def transfers(s: Scale) -> Iterator[Run]:
    """C4's order: init from the same, a similar and a different task, on M1."""
    for seed in SEEDS:
        for task in dict.fromkeys(task for task, _, _ in s.transfers):
            for mode in ("scratch", "init"):
                yield Run("transfer", mode, task, "full", "M1", seed, 32, "M0", task, "same")
        for task, source, near in s.transfers:
            yield Run("transfer", "init", task, "full", "M1", seed, 32, "M0", source, near)


def projections(s: Scale) -> Iterator[Run]:
    """C7: learned on one task, used on another, against apply."""
    for seed in SEEDS:
        for task, sources in s.projections:
            yield Run("project", "apply", task, "full", "M1", seed, None, "M0", task)
            for variant in (None, "residual"):
                yield Run("project", "project", task, "full", "M1", seed, None, "M0", sources, None, variant)


def chains(s: Scale) -> Iterator[Run]:
    """M0 to M4, recycling the recycled delta or Delta_0 each time, few-shot."""
    for seed in SEEDS:
        for task in s.path_tasks:
            yield Run("chain", "init+distill", task, "full", "M4", seed, 32, "M0", task, "same")


def modules(s: Scale) -> Iterator[Run]:
    """Adapter and LoRA: Delta_0, and the modes with few labels."""
    for seed in SEEDS:
        for kind in ("adapter", "lora"):
            for task in s.module_tasks:
                yield Run("tuned", "tune", task, kind, "M0", seed)
        for kind in ("adapter", "lora"):
            for task in s.module_tasks:
                yield Run("few", "apply", task, kind, "M1", seed, None, "M0", task, "same")
                for mode in ("scratch", "init", "distill", "init+distill"):
                    yield Run("few", mode, task, kind, "M1", seed, 32, "M0", task, "same")


PHASES: tuple[Phase, ...] = (bases, old_deltas, few_shot, compatibility, ends, walks, similarity, full_data, transfers,
                             projections, beyond, chains, modules)


def snapshot_steps(s: Scale) -> list[int]:
    """The steps t of M_1(t), as train.py --snapshots keeps them."""
    return [round(s.steps[1] * (k + 1) / (s.snapshots + 1)) for k in range(s.snapshots)]


def searched(run: Run) -> Run:
    """The run whose learning-rate search decides for `run`: the same with the first seed; for a path's end Delta_0's, for a
    longer run the shorter one's."""
    return replace(run, seed=SEEDS[0], base="M0" if run.what == "tune" else run.base,
                   variant=None if run.variant == "longer" else run.variant)
