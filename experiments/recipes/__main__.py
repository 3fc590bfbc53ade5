"""Which upgrades keep old deltas alive? PLAN.md says what is compared and how. Resumable; one row per upgraded base.

    python -m experiments.minilm --data DIR                  # M0, once
    python -m experiments.recipes --data DIR                 # in the plan's order, until all is done
    python -m experiments.recipes --data DIR --seeds 0,1 --targets bio --budget 3000        # a part of it
    python -m experiments.recipes --data DIR --device cuda --jobs 14 --results results/recipes/h100     # leave memory for 14 runs at once
    python -m experiments.recipes --report                   # results/recipes/README.md and its figure, from the rows alone

DIR holds corpora/ and tasks/ as for experiments.claims. Bases are removed after scoring, unless --keep is set.
"""
import json
import sys
import time
from pathlib import Path

import torch

from experiments.common import check_places, finished, made_on, processes
from experiments.recipes import report
from experiments.recipes.plan import DELTA_SEEDS, KINDS, STEPS, TASKS, known, upgrades
from experiments.recipes.runs import Config, attempt, delta_folder, draw_tasks, score_base, tune_delta, upgrade
from rt.errors import InputError
from rt.formats.files import cut_half_row, read_rows
from rt.runs.config import parse, run
from rt.runs.log import progress


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if c.report:
        print(report.write(Path(c.results)))
        return
    check_places("recipes", c.data, c.base)
    rows = Path(c.results) / f"{c.model}.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    draw_tasks(c)
    done = read_rows(rows)
    cut_half_row(rows)
    if any(row["device"].startswith("CPU") != (c.device == "cpu") or row["arm"] != "M0" and row.get("steps", STEPS) != c.steps
           for row in done):
        raise InputError(f"{rows}: its rows are of another --device or of other --steps, and must not be mixed; give another --results")
    seeds = sorted({s % DELTA_SEEDS for s in c.seeds})
    deltas = [(task, kind, seed) for seed in seeds for task in TASKS for kind in KINDS]
    stages = ([(tune_delta, *key) for key in deltas if not (delta_folder(c, *key) / "delta.json").exists()],    # needed by those below
              [(score_base, seed) for seed in seeds if not known(done, {"arm": "M0", "seed": seed})],
              [(upgrade, one) for one in upgrades(c.targets, c.seeds, c.model) if (not c.arms or one.arm in c.arms)
               and (not c.rates or one.lr in c.rates) and not known(done, one._asdict())])
    facts, end, count = made_on(torch.device(c.device)), time.monotonic() + c.budget if c.budget else None, 0
    total = sum(map(len, stages))
    with progress(total, "recipes", unit="run") as bar, processes(c.jobs, 1) as pool:
        for stage in stages:
            for found in finished(pool, attempt, [(c, end, *job) for job in stage]):
                with rows.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row | facts) + "\n" for row in found or ()))
                count += found is not None
                bar.update(found is not None)
    print(f"{total - count} of {total} runs are left" + ("; the same command goes on" if total > count else ""))


if __name__ == "__main__":
    run(main)
