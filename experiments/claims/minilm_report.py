"""The part of results/claims/README.md about MiniLM, from minilm.jsonl alone. PLAN.md defines quantities, cells, intervals and tests."""
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Callable, Iterable

import numpy as np

from experiments.claims.minilm import DOMAINS, RATES, SENTIMENT, cells, order_from
from experiments.claims.rows import conclusion
from experiments.common import LEARNED, holm, markdown, sign_flip, steps_to_best
from experiments.recipes.plan import KINDS
from rt.formats.files import read_rows
from rt.report import figures
from rt.runs.summary import group

Cells = dict[tuple[str, int], float]                # by task and lineage
Scores = dict[tuple[str, str, int, int], float]     # by task, kind, lineage and seed
MARGIN = 0.01       # of "at least as good"
DRAWS = 10_000
NOT_RUN = ("not run yet", "-")
PAIRED = {"barrier (nats)": ("connectivity", "barrier"), "heads that match themselves": ("similarity", "share_own_best")}   # study, number


def crossed(values: Cells) -> tuple[float, float]:
    """The 95 % interval of the mean by a crossed bootstrap: tasks and lineages are drawn independently, with replacement."""
    tasks, lineages = (sorted({key[i] for key in values}) for i in (0, 1))
    table = np.array([[values.get((task, L), np.nan) for L in lineages] for task in tasks])
    g = np.random.Generator(np.random.PCG64(0))
    rows, columns = (g.integers(n, size=(DRAWS, n)) for n in table.shape)
    drawn = table[rows[:, :, None], columns[:, None, :]]
    with np.errstate(invalid="ignore"):     # a draw of missing cells alone has no mean
        means = np.nansum(drawn, axis=(1, 2)) / np.isfinite(drawn).sum(axis=(1, 2))
    return tuple(np.percentile(means[np.isfinite(means)], (2.5, 97.5)).round(9))    # so that no digit depends on a CPU's last bit


def averaged(scores: dict[tuple, float]) -> Cells:
    """Means over kinds and seeds, by task and lineage. Keys begin with task, kind and lineage."""
    found = defaultdict(list)
    for (task, _, L, *_), value in scores.items():
        found[task, L].append(value)
    return {key: mean(values) for key, values in found.items()}


def less(a: dict, b: dict) -> dict:
    return {key: a[key] - b[key] for key in a.keys() & b.keys()}


class Rows:
    """The rows, looked up by part; and which Delta_0 learned, by dev alone."""
    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.M0 = {row["cell"].get("lineage", row["cell"].get("M0")): row     # of mini rows, by the seed of M0
                   for row in self.part("lineage") or self.part("domains") if row["base"] == "M0"}

    def part(self, part: str, **facts) -> list[dict]:
        return [row for row in self.rows if row["cell"]["part"] == part and facts.items() <= (row | row["cell"]).items()]

    def learned(self, name: str, L: int, scores: list[float] | None = None) -> bool:
        """`scores`: on dev, of this Delta_0 and of the commonest label, if the row has them."""
        dev, commonest = scores or (self.M0[L]["dev"][name] if L in self.M0 else (0, 0))     # without M0, nothing is reported yet
        return dev > commonest + LEARNED

    def applied(self, base: str) -> dict[tuple[str, str, int], float]:
        """Test accuracy of `apply` by task, kind and lineage, without the deltas that did not learn."""
        return {(*name.split("/"), row["cell"]["lineage"]): value for row in self.part("lineage", base=base)
                for name, value in row["apply"].items() if self.learned(name, row["cell"]["lineage"])}

    def best(self, part: str, mode: str, rate_by: Callable[[dict], float] = lambda row: row["dev"]["accuracy"], **facts) -> list[dict]:
        """The rows of a mode at the rate that is best on dev in the mean over its runs, task by task and kind by kind."""
        rows = [{"kind": "adapter"} | row["cell"] | row for row in self.part(part, mode=mode, **facts)]      # project has adapters alone
        rows = [row for row in rows if self.learned(f"{row['task']}/{row['kind']}", row["lineage"], row.get("old_dev"))]
        return [row for some in group(rows, "task", "kind").values()
                for row in max(group(some, "lr").values(), key=lambda line: mean(map(rate_by, line)))]

    def tests(self, part: str, mode: str, **more) -> Scores:
        return {(row["task"], row["kind"], row["lineage"], row["seed"]): row["test"]["accuracy"]
                for row in self.best(part, mode, **more)}


def kept(r: Rows) -> dict[tuple, float]:
    """The share of Delta_0's gain over the share of dev's commonest label that `apply` keeps on M1. Without a gain there is no share."""
    chance = {(*name.split("/"), L): share for L, row in r.M0.items() for name, (_, share) in row["dev"].items()}
    own, there = r.applied("M0"), r.applied("M1")
    return {key: (there[key] - chance[key]) / (own[key] - chance[key]) for key in there if own[key] > chance[key]}


def of_pair(r: Rows, study: str, number: str, pair: str) -> Cells:
    return {(row["cell"]["task"], row["cell"]["lineage"]): mean(np.ravel(row[number])) for row in r.part("paths", study=study, pair=pair)}


def saved(r: Rows) -> dict[tuple, float]:
    """The share of scratch's steps that init saves."""
    curves = {mode: {(row["task"], row["kind"], row["lineage"]): row["curve"] for row in r.best("full", mode)}
              for mode in ("scratch", "init")}
    steps = {key: steps_to_best(curves["scratch"][key], curves["init"][key]) for key in curves["scratch"].keys() & curves["init"].keys()}
    return {key: 1 - reached / best for key, (reached, best) in steps.items()}


def projected(r: Rows) -> dict[str, Cells]:
    """C7's arms. The rate of the map is the one that is best on the source's dev."""
    mapped = r.best("project", "project", lambda row: row["projection"]["dev"]["mean"])
    own = r.part("project", mode="source's own")
    return {"apply": {(t, L): v for (t, kind, L), v in r.applied("M1").items() if kind == "adapter" and t in SENTIMENT},
            **{name: {(row["cell"]["task"], row["cell"]["lineage"]): row["test"]["accuracy"] for row in rows}
               for name, rows in (("project", mapped), ("source's own", own))}}


def primary(r: Rows) -> dict[str, tuple[Cells, float]]:
    """(cells, margin) of every primary quantity of the plan, in its order."""
    at = {base: averaged(r.applied(base)) for base in ("M1-t00050", "M1", "M4")}
    few = {mode: averaged(r.tests("few", mode)) for mode in ("scratch", "init", "distill", "init+distill")}
    near = {name: averaged(r.tests("order", "init", near=name)) for name in ("same", "similar", "different")}
    full, c7 = {mode: averaged(r.tests("full", mode)) for mode in ("scratch", "init")}, projected(r)
    barrier, share = ({base: of_pair(r, *number, f"M0-{base}") for base in ("M1", "IND")} for number in PAIRED.values())
    return {
        "C1: share of Delta_0's gain that apply keeps on M1, above a half": ({k: v - 0.5 for k, v in averaged(kept(r)).items()}, 0),
        "C1: apply, first snapshot of M1 above M1": (less(at["M1-t00050"], at["M1"]), 0),
        "C1: apply, M1 above M4": (less(at["M1"], at["M4"]), 0),
        "C2: barrier M0 - TWIN above M0 - M1 (nats)": (less(barrier["IND"], barrier["M1"]), 0),
        "C3: share of heads that match themselves, M1 above TWIN": (less(share["M1"], share["IND"]), 0),
        "C4: all labels, init at least as good as scratch": (less(full["init"], full["scratch"]), MARGIN),
        "C4: share of scratch's steps saved": (averaged(saved(r)), 0),
        "C4: init from the same task above a similar one": (less(near["same"], near["similar"]), 0),
        "C4: init from a similar task above a different one": (less(near["similar"], near["different"]), 0),
        "C5: 32 a label, distill above scratch": (less(few["distill"], few["scratch"]), 0),
        "C6: 32 a label, init+distill at least as good as init": (less(few["init+distill"], few["init"]), MARGIN),
        "C6: 32 a label, init+distill at least as good as distill": (less(few["init+distill"], few["distill"]), MARGIN),
        "C7: project above apply": (less(c7["project"], c7["apply"]), 0),
        "C7: project above the source's own delta": (less(c7["project"], c7["source's own"]), 0)}


def verdicts(found: dict[str, tuple[Cells, float]]) -> list[list[str]]:
    """A line per primary quantity: mean, interval, cells, p, Holm's p over the lines with rows, which decides, and over all lines (p = 1
    without rows), verdict. There are too few cells if none of them could be shown."""
    p = {name: sign_flip([v + margin for v in values.values()]) for name, (values, margin) in found.items() if values}
    adjusted, strict, lines = holm(p), holm(dict.fromkeys(found, 1.0) | p), []
    least = holm({name: 0.5 ** len(values) for name, (values, _) in found.items() if values})
    for name, (values, margin) in found.items():
        if not values:
            lines.append([name, "not run", *[""] * 5])
            continue
        low, high = crossed(values)
        word = ("opposite" if high < -margin else "too few cells" if least[name] >= 0.05 else
                "shown" if adjusted[name] < 0.05 and low > -margin else "not shown")
        shown = f"{round(mean(values.values()), 9):+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([name, shown, len(values), f"{p[name]:.3f}", f"{adjusted[name]:.3f}", f"{strict[name]:.3f}", word])
    return lines


def shown(values: Iterable[float]) -> str:
    return f"{mean(values):.3f}" if (values := list(values)) else "-"


def section(folder: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """The text, and by claim what decides it and the conclusion. ("", {}) without rows."""
    if not (rows := read_rows(folder / "minilm.jsonl")):
        return "", {}
    r, facts = Rows(rows), {key: ", ".join(sorted({row[key] for row in rows})) for key in ("device", "precision", "commit")}
    others = group([row for row in rows if "M0" in row], "M0")
    second = "".join(f"The rows of {', '.join(dict.fromkeys(row['cell']['part'] for row in some))} are of another M0, {M0}. "
                     for (M0,), some in others.items())
    lines = verdicts(primary(r))
    text = ["## MiniLM, a base that was really pre-trained",
            "`python -m experiments.claims.minilm --data DIR`; rows in `minilm.jsonl`; [the plan](../../experiments/claims/PLAN.md) was "
            "committed before them; C1 of lineage 0 was known from an earlier M0 (`02aece2/minilm.jsonl`, in no line here). "
            f"{facts['device']}; {facts['precision']}; commits {facts['commit']}. {second}Intervals: crossed bootstrap over tasks "
            "and lineages (with one lineage, over tasks alone). p: exact sign-flip over cells; then Holm's over the lines that have rows, "
            "by which the plan decides; the column after it counts all lines, those without rows as p = 1.",
            markdown(["primary quantity", "mean [95 %]", "cells", "p", "Holm", "Holm, all lines", "here"], lines)]
    tables = (by_base(r), predicted(("lineage", "domain"), bases_of(r, "lineage")), by_first_domain(r), on_mini(folder), by_mode(r),
              by_part(r), by_pair(r))
    text += [table for table in tables if table]
    if drawn := rows_of_figure(r):
        figures.compatibility(drawn, folder / "minilm-compatibility")
        text.insert(3, "Full deltas on every base: means over lineages with 95 % t-intervals; chance is the commonest label of dev.\n\n"
                    "![Delta_0 on later bases](minilm-compatibility.png)")
    text += ["Planned and not run (number of cells): " + (missing(rows) or "nothing") + "."]
    return "\n\n".join(text) + "\n", by_claim(lines)


def by_claim(lines: list[list[str]]) -> dict[str, tuple[str, str]]:
    """What decides each claim, and its conclusion, from the lines of `verdicts`."""
    found = defaultdict(list)
    for name, value, *_, word in lines:
        claim, _, quantity = name.partition(": ")
        found[claim].append((quantity, value, word))
    return {claim: ("; ".join(f"{quantity} {value}" for quantity, value, word in parts if word),
                    conclusion([word or "not run" for *_, word in parts], all(word for *_, word in parts)))
            if any(word for *_, word in parts) else NOT_RUN for claim, parts in found.items()}


def rows_of_figure(r: Rows) -> list[dict]:
    """The rows that figures.compatibility draws: full deltas on every base of every lineage."""
    drawn = []
    for row in r.part("lineage"):
        L, (stage, _, t) = row["cell"]["lineage"], row["base"].partition("-t")
        for task in (name.removesuffix("/full") for name in row["apply"] if name.endswith("/full")):
            facts = {"task": task, "seed": L, "base": row["base"], "stage": int(stage[1:]), "t": int(t) if t else None}
            drawn.append(facts | {"line": "apply", "accuracy": row["apply"][f"{task}/full"]})
            if row["base"] == "M0":
                drawn += [facts | {"line": "own", "accuracy": row["apply"][f"{task}/full"]},
                          facts | {"line": "chance", "accuracy": row["dev"][f"{task}/full"][1]}]
    return drawn


def by_base(r: Rows) -> str:
    """C1 and question (b): every base of every lineage."""
    lines = []
    for row in sorted(r.part("lineage"), key=lambda row: (row["cell"]["lineage"], row["base"][:2], "-t" not in row["base"], row["base"])):
        L, base = row["cell"]["lineage"], row["base"]
        scores = [[v for (_, k, lineage), v in r.applied(base).items() if (k, lineage) == (kind, L)] for kind in KINDS]
        lines.append([L, base, *map(shown, scores), *(f"{loss:.3f}" for loss in row["heldout"].values()), f"{row['l2']:.2f}"])
    if not lines:
        return ""
    share = averaged(kept(r))
    return "`apply` of Delta_0 (test accuracy, mean over tasks), held-out losses and distance from M0:\n\n" + markdown(
        ["lineage", "base", *KINDS, *(f"loss {domain}" for domain in r.M0[L]["heldout"]), "L2"], lines) + (
        f"\n\nShare of Delta_0's gain that `apply` keeps on M1: {shown(share.values())}; by task: "
        + ", ".join(f"{task} {shown(v for (of, _), v in share.items() if of == task)}" for task in sorted({of for of, _ in share})) + ".")


def by_first_domain(r: Rows) -> str:
    """Question (b) on lineages of seed 0 that pass the domains in four orders; full deltas."""
    table = predicted(("order", "domain"), bases_of(r, "domains"))
    return table and f"Four orders of the domains, seed 0, full deltas alone. {table}"


def on_mini(folder: Path) -> str:
    """The same on M0s of the mini preset."""
    r = Rows(read_rows(folder / "mini.jsonl"))
    table = predicted(("lineage", "M0", "domain"), bases_of(r, "domains"))
    return table and (f"The same on {len(r.M0)} bases M0 of the mini preset (`--model mini`, `mini.jsonl`), four orders each, full deltas "
                      f"alone; commits {', '.join(sorted({row['commit'] for row in r.rows}))}. {table}")


def bases_of(r: Rows, part: str) -> list[dict]:
    """The upgrades of the part `lineage` or `domains`, with the points that `apply` loses and what might predict them."""
    bases = []
    for row in r.part(part):
        cell, (M0,) = row["cell"], r.part(**row["cell"], base="M0")
        first, seed = cell.get("first", DOMAINS[0]), cell.get("lineage", cell.get("M0", 0))
        lost = [M0["apply"][name] - value for name, value in row["apply"].items() if r.learned(name, seed)]
        if lost and row["base"] != "M0":
            predictors = {"nothing, their mean": 0.0, "rise of the loss on wiki": row["heldout"]["wiki"] - M0["heldout"]["wiki"],
                          "distance (L2)": row["l2"], "number of upgrades": float(row["base"][1])}
            if part == "domains":
                predictors["heads that no longer match themselves"] = 1 - row["heads_kept"]
            bases.append({"order": first, "M0": seed, "lineage": (first, seed), "domain": order_from(first)[int(row["base"][1]) - 1],
                          "lost": 100 * mean(lost), "from": predictors})
    return bases


def predicted(left_out: tuple[str, ...], bases: list[dict]) -> str:
    """The table of question (b): the points lost on `bases`, predicted with one value of a key in `left_out` left out. The bootstrap draws
    values of the first key."""
    if min(len({row[key] for row in bases}) for key in left_out) < 2:
        return ""
    by, (nothing, *names), lines = left_out[0], bases[0]["from"], []
    for name in (nothing, *names):
        found = [correlation(name, some) for some in group(bases, by).values()]
        errors = {key: squared_errors(name, bases, key) for key in left_out}
        low, high = gain(squared_errors(nothing, bases, by), errors[by])
        lines.append([name, f"{mean(found):+.2f} [{min(found):+.2f}, {max(found):+.2f}]" if any(found) else "",
                      *(f"{mean(sum(some.values(), [])) ** 0.5:.2f}" for some in errors.values()),
                      f"[{low:+.2f}, {high:+.2f}]" if name != nothing else ""])
    others = ", ".join(f"of the other {key}s" for key in left_out[:-1])
    lost = mean(row["lost"] for row in bases)
    return (f"Points of accuracy that `apply` loses on {len(bases)} bases ({lost:.1f} on average). A line through the bases {others}, or "
            "of the other domains, predicts those that were left out (root mean squared error in points; no test):\n\n" + markdown(
                ["from", f"correlation, mean [lowest, highest] over {by}s", *(f"{key} left out" for key in left_out),
                 f"error of the mean minus the line's, {by} left out, 95 % over {by}s"], lines))


def correlation(name: str, bases: list[dict]) -> float:
    """Of `name` and the points lost; 0 if one of them does not vary."""
    x, y = np.array([(row["from"][name], row["lost"]) for row in bases]).T
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def squared_errors(name: str, bases: list[dict], key: str) -> dict[tuple, list[float]]:
    """By `key`, the squared errors of the points lost, predicted from `name` by a least-squares line through the bases of other `key`."""
    squares = {}
    for at, some in group(bases, key).items():
        x, y = np.array([(row["from"][name], row["lost"]) for row in bases if row not in some]).T
        (slope,), *_ = np.linalg.lstsq((x - x.mean())[:, None], y - y.mean(), rcond=None)     # 0 if x does not vary
        squares[at] = [float((y.mean() + slope * (row["from"][name] - x.mean()) - row["lost"]) ** 2) for row in some]
    return squares


def gain(of_mean: dict[tuple, list[float]], errors: dict[tuple, list[float]]) -> tuple[float, float]:
    """The 95 % interval of the mean's error minus the line's, by a bootstrap that draws whole lineages or orders (clusters)."""
    drawn = np.random.Generator(np.random.PCG64(0)).integers(len(errors), size=(DRAWS, len(errors)))
    rms = [np.array([mean(some) for some in squares.values()])[drawn].mean(1) ** 0.5 for squares in (of_mean, errors)]
    return tuple(np.percentile(rms[0] - rms[1], (2.5, 97.5)).round(9))


def by_mode(r: Rows) -> str:
    """Few labels, task by task."""
    modes = {mode: r.tests("few", mode) for mode in ("scratch", "init", "distill", "init+distill")}
    cells_there = {key[:3] for scores in modes.values() for key in scores}
    modes["apply"] = {key: v for key, v in r.applied("M1").items() if key in cells_there}
    columns = sorted({key[:2] for key in cells_there})
    lines = [[mode, *(shown(v for key, v in scores.items() if key[:2] == column) for column in columns)] for mode, scores in modes.items()]
    table = markdown(["", *(", ".join(column) for column in columns)], lines)
    return f"32 examples a label on M1, test accuracy:\n\n{table}\n\n{at_an_end(r)}" if columns else ""


def at_an_end(r: Rows) -> str:
    """How often the chosen rate is the lowest or highest of its grid, and the last step the best: the mode might gain from more."""
    found = []
    for mode in ("scratch", "init", "distill", "init+distill"):
        best = r.best("few", mode)
        rates = [(float(key[1]), [float(lr) for lr in RATES[key[0]]]) for key in group(best, "kind", "lr", "task")]
        low, high = (sum(lr == grid[end] for lr, grid in rates) for end in (0, -1))
        last = sum(row["best_step"] == row["curve"][-1][0] for row in best)
        found.append(f"{mode}: {low} lowest, {high} highest of {len(rates)} rates; {last} of {len(best)} runs")
    return "The rate that dev chose is an end of its grid, and the step that dev chose the last, in: " + "; ".join(found) + "."


def by_part(r: Rows) -> str:
    """Question (a): scales and parts of an outdated delta."""
    lines, means = [], {}
    for (base, kind), some in group([row | row["cell"] for row in r.part("parts")], "base", "kind").items():
        some = [row for row in some if r.learned(f"{row['task']}/{kind}", row["lineage"])]
        if not some:
            continue
        whole = [v for (task, k, L), v in r.applied(base).items() if k == kind and L in {row["lineage"] for row in some}]
        means = {name: mean(row["accuracy"][name] for row in some) for name in some[0]["accuracy"]}
        lines.append([base, kind, f"{mean(whole):.3f}", *(f"{v:.3f}" for v in means.values())])
    return "Parts of an outdated delta, `apply`, test accuracy, mean over tasks (prototypes in bf16, before 502775c centred them):\n\n" + \
        markdown(["base", "kind", "all of it", *means], lines) if lines else ""


def by_pair(r: Rows) -> str:
    lines = [[f"M0-{name}", *(shown(of_pair(r, *number, f"M0-{base}").values()) for number in PAIRED.values())]
             for base, name in (("M1", "M1"), ("M4", "M4"), ("IND", "TWIN"))]
    return "Between tuned models, full deltas:\n\n" + markdown(["pair", *PAIRED], lines) if r.part("paths") else ""


def missing(rows: list[dict]) -> str:
    """The cells without rows, counted by part and lineage."""
    done = [row["cell"] for row in rows]
    left = group([cell for cell in cells() if cell not in done], "part", "lineage")
    return ", ".join(f"{part}{'' if L is None else f' of lineage {L}'} ({len(some)})" for (part, L), some in left.items())
