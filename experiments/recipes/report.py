"""results/recipes/README.md and its figure, from the rows alone. PLAN.md defines block, gain, points lost, advantage and test."""
import itertools
import math
import os
from pathlib import Path
from statistics import mean

import numpy as np

from experiments.common import LEARNED, ROOT, holm, markdown, sign_flip
from experiments.recipes.plan import AFTERWARDS, DELTA_SEEDS, PEAK, SEEN, STEPS, TARGETS, TO_M0, known, plain_rates, upgrades
from rt.errors import InputError
from rt.formats.files import read_rows
from rt.report.figures import pareto
from rt.runs.summary import group, with_interval

Block = tuple[str, int]     # target, seed
Point = tuple[float, float]     # gain, points lost


def bases(rows: list[dict]) -> dict[int, dict]:
    """The rows of M0 with its own deltas, by the seed of the deltas."""
    return {row["seed"]: row for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == "M0"}


def points(rows: list[dict]) -> dict[tuple[str, float], dict[Block, Point]]:
    """(gain, points lost) of every upgrade on one domain, by (arm, rate) and then by block; plain upgrades come first."""
    own = bases(rows)
    done = [row for row in rows if row["arm"] != "M0" and "," not in row["target"]]
    fall = {id(row): own[row["seed"] % DELTA_SEEDS]["heldout"][row["target"]] - row["heldout"][row["target"]] for row in done}
    found: dict = {}
    for (target,), some in group(done, "target").items():
        plain = group([row for row in some if row["arm"] == "plain"], "lr")
        best = max((mean(fall[id(row)] for row in line) for line in plain.values()), default=math.nan)
        for row in some:
            found.setdefault((row["arm"], row["lr"]), {})[target, row["seed"]] = fall[id(row)] / best, lost(own, row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != "plain", item[0])))


def of_arm(rows: list[dict], arm: str, lr: float) -> list[dict]:
    """The rows of an arm at a rate, without chains."""
    return [row for row in rows if (row["arm"], row.get("lr")) == (arm, lr) and "," not in row["target"]]


def learned(own: dict) -> list[str]:
    return [name for name, (dev, commonest) in own["dev"].items() if dev > commonest + LEARNED]


def lost(own: dict[int, dict], row: dict, only: str = "") -> float:
    """Points of accuracy lost by an upgrade, averaged over the deltas that learned and have `only` in their name (task/kind)."""
    before = own[row["seed"] % DELTA_SEEDS]
    return 100 * mean(before["apply"][name] - row["apply"][name] for name in learned(before) if only in name)


def mean_lost(own: dict[int, dict], rows: list[dict], only: str) -> str:
    """The mean of `lost` over rows; "" if no such delta learned."""
    values = [lost(own, row, only) for row in rows if any(only in name for name in learned(own[row["seed"] % DELTA_SEEDS]))]
    return f"{mean(values):.1f}" if values else ""


def frontier(plain: list[Point], gain: float) -> float:
    """Points that plain upgrades, ordered by rate, lose at this gain. No gain costs nothing."""
    if gain <= 0:
        return 0.0
    line = [(0.0, 0.0), *plain]
    crossed = [a[1] + (b[1] - a[1]) * (gain - a[0]) / (b[0] - a[0]) for a, b in itertools.pairwise(line)
               if a[0] != b[0] and min(a[0], b[0]) <= gain <= max(a[0], b[0])]
    return min(crossed) if crossed else max(line)[1]


def advantages(found: dict, model: str = "minilm", ends_at_best: bool = False) -> dict[tuple[str, float], dict[Block, float]]:
    """The advantage of every arm with a switch, per block that has all plain rates: with fewer, the frontier would lie too high. If the
    frontier `ends_at_best`, the rate of the highest mean gain, then a faster rate that gains a hair more in one block does not count."""
    plain = [found.get(("plain", lr), {}) for lr in plain_rates(model)]
    if ends_at_best and all(plain):
        plain = plain[:1 + max(range(len(plain)), key=lambda i: mean(gain for gain, _ in plain[i].values()))]
    return {key: {block: frontier([of[block] for of in plain], gain) - points for block, (gain, points) in of.items()
                  if all(block in other for other in plain)} for key, of in found.items() if key[0] != "plain"}


HEAD = ("arm", "peak rate", "blocks", "gain, %", "points lost", "full", "adapter", "wiki loss", "advantage, points", "p / Holm", "seconds",
        "less lost than plain at this rate", "advantage over plain up to its best rate")


def lines_of(rows: list[dict], own: dict[int, dict], found: dict, model: str = "minilm") -> list[list[str]]:
    """The table: a line per arm and rate."""
    ahead = {key: of for key, of in advantages(found, model).items() if of}
    p = {key: sign_flip([value for block, value in of.items() if key[0] not in AFTERWARDS or model != "minilm" or block not in SEEN])
         for key, of in ahead.items()}
    planned = {(one.arm, one.lr): 1.0 for one in upgrades(("bio",), model=model) if one.arm != "plain"}      # those without rows count, too
    adjusted, shorter, lines = holm(planned | p), advantages(found, model, ends_at_best=True), []
    for key, of in found.items():
        some, (gains, losses) = of_arm(rows, *key), zip(*of.values())
        plain = found.get(("plain", key[1]), {}) if key[0] != "plain" else {}
        less = [plain[block][1] - points for block, (_, points) in of.items() if block in plain]
        test = [with_interval(ahead[key].values()), f"{p[key]:.3f} / {adjusted[key]:.3f}"] if key in ahead else ["", ""]
        lines.append([key[0], f"{key[1]:g}", len(of), with_interval(100 * g for g in gains), with_interval(losses),
                      *(mean_lost(own, some, kind) for kind in ("/full", "/adapter")),
                      f"{mean(row['heldout']['wiki'] for row in some):.3f}", *test, f"{mean(row['stage_seconds'] for row in some):.0f}",
                      with_interval(less) if less else "", with_interval(shorter[key].values()) if key in ahead else ""])
    return lines


def lines_by_task(rows: list[dict], own: dict[int, dict], found: dict) -> list[list[str]]:
    """A header, and the mean points lost on each task by an arm and rate."""
    tasks = [*dict.fromkeys(name.partition("/")[0] for row in own.values() for name in learned(row))]
    lines = [["arm", "peak rate", *tasks]]
    for arm, lr in found:
        lines.append([arm, f"{lr:g}", *(mean_lost(own, of_arm(rows, arm, lr), f"{task}/") for task in tasks)])
    return lines


def lines_by_target(found: dict, model: str) -> list[list]:
    """Gain, points lost and advantage of an arm and rate on each target."""
    ahead, lines = advantages(found, model), []
    for key, of in found.items():
        for target in sorted({target for target, _ in of}):
            gains, losses = zip(*(point for block, point in of.items() if block[0] == target))
            better = [value for block, value in ahead.get(key, {}).items() if block[0] == target]
            lines.append([target, key[0], f"{key[1]:g}", len(gains), with_interval(100 * g for g in gains), with_interval(losses),
                          with_interval(better) if better else ""])
    return sorted(lines, key=lambda line: line[0])


def fall(own: dict[int, dict], row: dict, domain: str) -> float:
    """How far the held-out loss on a domain lies below M0's."""
    return own[row["seed"] % DELTA_SEEDS]["heldout"][domain] - row["heldout"][domain]


def chains_of(rows: list[dict], own: dict[int, dict]) -> dict[tuple[str, float], dict[int, tuple[float, list[dict]]]]:
    """(gain, links) of several upgrades in a row, by (arm, rate), then by seed. PLAN.md, "Chains that stay near M0", defines the gain."""
    found = {key: {links[0]["seed"]: links for links in group(some, "seed").values()} for key, some in
             group([row for row in rows if "," in row.get("target", "")], "arm", "lr").items()}
    gains = {key: {seed: mean(fall(own, row, row["domain"]) for row in links) for seed, links in of.items()} for key, of in found.items()}
    best = max((mean(of.values()) for (arm, _), of in gains.items() if arm == "plain"), default=math.nan)
    return {key: {seed: (gains[key][seed] / best, links) for seed, links in of.items()} for key, of in found.items()}


def lines_of_chains(chains: dict, own: dict[int, dict]) -> tuple[list[str], list[list]]:
    """A header and a line per arm and rate of `chains_of`. PLAN.md defines the columns."""
    lines = []
    for (arm, lr), of in chains.items():
        gains, some = zip(*of.values())
        ends = [links[-1] for links in some]
        lines.append([arm, f"{lr:g}", len(some), with_interval(100 * gain for gain in gains),
                      *(with_interval(lost(own, row) for row in stage) for stage in zip(*some)),
                      with_interval(mean(fall(own, row, domain) for domain in row["target"].split(",")) for row in ends),
                      f"{mean(row['heldout']['wiki'] for row in ends):.3f}"])
    losses = (f"lost on M{i + 1}" for i in range(len(lines[0]) - 6))
    return ["chain", "peak rate", "seeds", "gain, %", *losses, "kept, nats", "wiki loss"], lines


def less_lost(chains: dict, own: dict[int, dict]) -> list[list]:
    """How many points a chain near M0 loses less on its last base, paired by seed: less than the same arm near the base before, the plan's
    primary quantity, and less than plain at equal gain. A line per rival."""
    ends, lines = {key: {seed: (gain, lost(own, links[-1])) for seed, (gain, links) in of.items()} for key, of in chains.items()}, []
    plain = [of for (arm, _), of in sorted(ends.items()) if arm == "plain"]
    for arm, lr in (key for key in ends if key[0] in TO_M0):
        of, before = ends[arm, lr], arm.removesuffix(" to M0")
        other = ends.get((before, lr), {})
        frontiers = {seed: [one[seed] for one in plain] for seed in of if plain and all(seed in one for one in plain)}
        for rival, less in ((before, [other[seed][1] - loss for seed, (_, loss) in of.items() if seed in other]),
                            ("plain at equal gain", [frontier(points, of[seed][0]) - of[seed][1] for seed, points in frontiers.items()])):
            if less:
                lines.append([f"{arm}, {lr:g}", rival, len(less), with_interval(less)])
    return lines


LAST_COLUMNS = ("The last two columns are not in the plan. The first compares at equal rate and ignores the gain. In the second, the "
                "frontier ends at the plain rate with the highest mean gain. Between two rates the frontier is a straight line, and a real "
                "plain rate there would lose less. So an arm that only equals such a rate seems ahead. ")


def on_one_domain(rows: list[dict], own: dict[int, dict], found: dict, model: str, folder: Path) -> list[str]:
    """The report's tables and figure on upgrades on one domain; draws pareto.png/.svg. The first is the main table."""
    most, by_task = max(map(len, found.values())), lines_by_task(rows, own, found)
    rates = {lr: np.format_float_scientific(lr, trim="-", exp_digits=1) for _, lr in found}      # 5e-4 for 0.0005
    names = {(arm, lr): f"{arm.replace(' (afterwards)', '*')}, {rates[lr]}{f' ({len(of)})' * (len(of) < most)}"
             for (arm, lr), of in found.items() if len(of) >= most / 2}
    pareto({name: [(100 * (1 - gain), points) for gain, points in found[key].values()] for key, name in names.items()},
           folder / "pareto", "gain given up on the new domain (% of the best plain upgrade's)",
           tuple(names[key] for key in sorted(names) if key[0] == "plain"))
    return [markdown(HEAD, lines_of(rows, own, found, model)), markdown(("target", *HEAD[:5], HEAD[8]), lines_by_target(found, model)),
            "Points lost by task:", markdown(by_task[0], by_task[1:]),
            "![points lost against gain](pareto.png)",
            f"The line joins plain upgrades, over all their blocks. In brackets: the number of blocks if it is below {most} (then "
            "often of one target only). Arms with fewer than half of the blocks are left out. *: added after rows had been seen."]


def write(folder: Path) -> str:
    """Write README.md, and pareto.png/.svg if there are upgrades on one domain; returns the first table. InputError if there are no
    rows. The rows' file is named after M0."""
    model = next((model for model in PEAK if (folder / f"{model}.jsonl").exists()), "minilm")
    rows = read_rows(folder / f"{model}.jsonl")
    own = bases(rows)
    found, chains = (points(rows), chains_of(rows, own)) if own else ({}, {})
    if not found and not chains:
        raise InputError(f"{folder}: no rows of upgrades there; run python -m experiments.recipes --data DIR first")
    facts, first = {key: ", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit")}, next(iter(own.values()))
    scores = "; ".join(" ".join([name, *(f"{row['apply'][name]:.3f}" for row in own.values())]) for name in first["apply"])
    left_out = [f"{name} (seed {row['seed']})" for row in own.values() for name in row["apply"] if name not in learned(row)]
    plan, commands = (os.path.relpath(ROOT / name, folder) for name in ("experiments/recipes/PLAN.md", "results/README.md"))
    tables = [*(on_one_domain(rows, own, found, model, folder) if found else []),
              *(["Chains, over the domains of the plan in its order:", markdown(*lines_of_chains(chains, own))] if chains else [])]
    if less := less_lost(chains, own):
        tables += ["Points lost less on the last base:", markdown(("chain", "than", "seeds", "points"), less)]
    text = ["# Which upgrades keep old deltas alive",
            f"Written by `python -m experiments.recipes --report` from `{model}.jsonl`; [the plan]({plan}) says "
            f"what each column is, [all results]({commands}) by which commands the rows were made"
            "; seconds are of jobs that shared the machine with others. Means with 95 % t-intervals over blocks; p is one-sided. Blocks "
            f"whose seeds are equal modulo {DELTA_SEEDS} share their deltas, and all share M0 and the test texts: intervals and p speak of "
            f"other upgrades, not of other deltas or tasks. {LAST_COLUMNS if found else ''}Machine: {facts['device']}; commits "
            f"{facts['commit']}{' (+: with edited files)' * ('+' in facts['commit'])}.",
            *tables, f"Test accuracy of the deltas on M0, by seed: {scores}.",
            "Left out, as dev on M0 is not 5 points above the commonest label: " + (", ".join(left_out) or "none") + ".",
            "Held-out loss of M0: " + ", ".join(f"{domain} {loss:.3f}" for domain, loss in first["heldout"].items()) + "."]
    arms, targets = ({row.get(name) for row in rows} for name in ("arm", "target"))
    planned = TARGETS if targets & {*TARGETS} else ("chains",) if arms & {*TO_M0} else ()
    if planned and all(row.get("steps", STEPS) == STEPS for row in rows):
        text += ["## Planned and not run", missing(rows, planned, model)]
    (folder / "README.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return tables[0] if found else tables[1]


def missing(rows: list[dict], targets: tuple[str, ...], model: str) -> str:
    """A line per arm, rate and target of the plan that lacks seeds."""
    left = group([run for one in upgrades(targets, model=model) if not known(rows, run := one._asdict())], "arm", "lr", "target")
    return "\n".join(f"- {arm} at {lr:g} on {target}: seeds {', '.join(str(run['seed']) for run in runs)}"
                     for (arm, lr, target), runs in left.items()) or "Nothing."
