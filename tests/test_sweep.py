"""--sweep: the runs that a grid of settings gives."""
from dataclasses import dataclass

import pytest

from rt.errors import InputError
from rt.limits import Share
from rt.runs.config import parse
from rt.runs.summary import by_settings, chosen
from rt.runs.sweep import dealt, expand, swept


@dataclass
class Config:
    seeds: tuple[int, ...] = (0,)
    lr: tuple[float, ...] = ()
    alpha: Share = 0.7
    T: float = 5.0
    steps: int = 50


@dataclass
class FakeRun:
    mode: str
    settings: dict


def test_every_combination_in_the_order_written():
    configs = expand(Config(), "seed=20,30,40 alpha=.7,.9 T=5,10,20 lr=1e-3")
    assert len(configs) == 18 and configs[0] == Config((20,), (1e-3,), 0.7, 5.0) and configs[-1] == Config((40,), (1e-3,), 0.9, 20.0)
    assert [c.T for c in configs[:4]] == [5, 10, 20, 5] and isinstance(configs[0].seeds[0], int)
    assert expand(Config(), "") == [Config()]


@pytest.mark.parametrize("spec, message", [
    ("alfa=1", "did you mean alpha"), ("bottleneck=3", "cannot be swept; what can: seed, lr"), ("alpha", "no values"),
    ("alpha=", "no values"), ("T=1 T=2", "T is there twice"), ("T=warm", "--sweep T warm: not a number"),
    ("seed=1.5", "not a whole number"), ("=3", "cannot be swept"),
    ("lr=1e-3;seed=1", "separate settings by spaces"), ("alpha=2", "^--sweep alpha 2.0: must lie between 0 and 1")])
def test_bad_grids_are_one_sentence(spec, message):
    with pytest.raises(InputError, match=message):
        expand(Config(), spec)


def test_runs_of_equal_shape_go_together():
    runs = [FakeRun(mode, {"alpha": a, "T": 5, "steps": s}) for mode in ("init", "distill") for a in (1, 2) for s in (10, 20)]
    assert [[(r.mode, r.settings["steps"]) for r in group] for group in dealt(runs, 0, 1)] == [
        [("init", 10)] * 2, [("init", 20)] * 2, [("distill", 10)] * 2, [("distill", 20)] * 2]


def test_small_groups_are_dealt_to_all_ranks():
    runs = [FakeRun(mode, {"steps": steps, "alpha": a}) for mode in "ab" for steps in (1, 2) for a in range(4)]
    shares = [dealt(runs, rank, 8) for rank in range(8)]
    assert [sum(map(len, share)) for share in shares] == [2] * 8 and sum(map(len, sum(shares, []))) == len(runs)
    assert [[len(part) for part in dealt(runs, 0, 1, workers)] for workers in (1, 2)] == [[4] * 4, [2] * 8]


def test_the_best_settings_are_best_on_average_over_seeds():
    rows = [{"mode": "distill", "lr": 1.0, "seed": s, "settings": {"alpha": a}, "dev": {"accuracy": dev}}
            for a, s, dev in ((0.7, 0, .9), (0.7, 1, .1), (0.9, 0, .6), (0.9, 1, .6))]
    assert [row["settings"]["alpha"] for row in chosen(rows, "distill", by_settings)] == [0.9, 0.9]
    rows += [{**rows[1], "settings": {"alpha": 0.5}, "seed": s, "dev": {"accuracy": .8}, "diverged": 5} for s in (0, 1, 2)]
    assert [row["settings"]["alpha"] for row in chosen(rows, "distill", by_settings)] == [0.9, 0.9]
    assert swept("T=1,2 seed=3") == {"T": ["1", "2"], "seed": ["3"]}


def test_a_grid_that_leaves_out_a_value_of_its_flag_is_refused():
    with pytest.raises(InputError, match="leaves out --seeds 1"):
        expand(Config(seeds=(0, 1)), "seed=0")
    with pytest.raises(InputError, match="leaves out --alpha 0.5"):
        expand(Config(alpha=0.5), "alpha=.7,.9 T=5")
    assert [c.alpha for c in expand(Config(alpha=0.9), "alpha=.7,.9")] == [0.7, 0.9]
    with pytest.raises(InputError, match="leaves out --alpha 0.7"):     # typed, though it is the default
        expand(parse(Config, ["--alpha", ".7"]), "alpha=.5,.9")
    assert len(expand(parse(Config, ["--T", "5"]), "alpha=.5,.9 T=1,5")) == 4


@pytest.mark.parametrize("name", ["gamma", "itp", "unlabelled_share", "steps", "batch_size", "warmup", "weight_decay", "early_stop"])
def test_runs_that_differ_in_more_than_alpha_beta_and_T_do_not_go_together(name):
    assert len(dealt([FakeRun("distill", {name: value}) for value in (1, 2)], 0, 1)) == 2
