"""The numbers of PLAN.md, and its runs in the order of the plan."""
from typing import NamedTuple

STEPS = 200
UPGRADE = "--batch_tokens 1024 --seq_len 128 --snapshots 0".split()
TUNE = "--tune_steps 300 --batch_size 16 --eval_every 150".split()
PLACE = {"cpu": "--device cpu --threads 1".split(), "cuda": "--device cuda --graphs".split()}
TASKS = {"chemprot": 128, "rotten_tomatoes": 64, "agnews": 64, "acl_arc": 64, "imdb": 128}      # tokens per text
KINDS = ("full", "adapter")
# peak learning rates by M0: of its own pre-training, and of its deltas
PEAK = {"minilm": 5e-4, "mini": 1e-3}
TUNE_LR = {"minilm": {"full": 1e-4, "adapter": 1e-3}, "mini": {"full": 5e-4, "adapter": 5e-3}}
DELTA_SEEDS, HELDOUT_TOKENS = 3, 16384
DRAWN = {"dev": 400, "test": 500}           # texts per task, one draw
PLAIN = (0.25, 0.5, 1, 2)       # of PEAK
RATES = (1, 2)
SWITCHES = {"hidden 3": "--preserve 3", "hidden 10": "--preserve 10", "hidden 30": "--preserve 30",
            "last 10": "--preserve 10 --preserve_by last", "predictions 1": "--preserve 1 --preserve_by predictions",
            "hidden 1": "--preserve 1", "replay 5 %": "--replay .05", "replay 20 %": "--replay .2", "infinite": "--schedule infinite",
            "Reptile": "--align 10 --align_eps .5", "hidden 3 + replay 5 %": "--preserve 3 --replay .05"}
AFTERWARDS = {"hidden 20 (afterwards)": "--preserve 20"}      # added when rows had been seen: PLAN.md, at its end
SEEN = (("bio", 0), ("bio", 3))     # the blocks that suggested it, which its test leaves out
FIRST = ("hidden 3", "hidden 10", "hidden 30", "last 10", "predictions 1")      # first in the plan's order
SEEDS, TARGETS = (0, 1, 2, 3, 4), ("bio", "cs", "chain")
CHAIN = "bio,rev,cs,ns"
CHAIN_ARM = {"minilm": "hidden 10", "mini": "hidden 30"}     # beside plain: see PLAN.md
TO_M0 = {"hidden 10 to M0": "--preserve 10 --preserve_to M0"}     # of the target "chains" alone, which came later
CHAINS = (("hidden 10", 1), ("hidden 10 to M0", 1), ("plain", 0.5), ("plain", 0.25), ("plain", 1))      # its arms and peaks


class Upgrade(NamedTuple):
    """One run of train.py on M0."""
    arm: str        # "plain" or a key of SWITCHES
    lr: float
    target: str     # a domain, or several separated by commas: a chain of upgrades
    seed: int


def upgrades(targets: tuple[str, ...] = TARGETS, seeds: tuple[int, ...] = SEEDS, model: str = "minilm") -> list[Upgrade]:
    """The upgrades of the M0 called `model` with these targets and seeds, in the plan's order."""
    rates = [peak * PEAK[model] for peak in RATES]
    first = [("plain", lr) for lr in plain_rates(model)] + [(arm, lr) for arm in FIRST for lr in rates
                                                            if arm != "hidden 30" or lr == rates[-1]]
    others = [(arm, lr) for arm in SWITCHES for lr in rates if (arm, lr) not in first]
    found = []
    for target in targets:
        chains = {"chain": [(arm, rates[0]) for arm in ("plain", CHAIN_ARM[model])],
                  "chains": [(arm, peak * PEAK[model]) for arm, peak in CHAINS]}
        for some in (chains[target],) if target in chains else (first, others):
            found += [Upgrade(arm, lr, CHAIN if target in chains else target, seed) for seed in seeds for arm, lr in some]
        found += [Upgrade(arm, rates[0], target, seed) for seed in seeds for arm in AFTERWARDS if target not in chains]
    return found


def plain_rates(model: str) -> list[float]:
    return [peak * PEAK[model] for peak in PLAIN]


def known(rows: list[dict], facts: dict) -> bool:
    """Whether one of the rows has these facts."""
    return any(facts.items() <= row.items() for row in rows)
