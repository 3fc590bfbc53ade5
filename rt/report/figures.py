"""The studies' figures and numbers, from the rows that analyze.py and experiments/claims write. Figures are PATH.png and PATH.svg, numbers
are lines of a table. A score is accuracy, or pearson for a regression."""
import math
import re
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

from rt.formats.untrusted import is_number
from rt.report.analysis import barrier
from rt.report.drawing import REFERENCE, Panel, draw_heatmaps, draw_panels, look, saved_figure
from rt.report.mixture import Law, critical, fit, left_out
from rt.runs.log import score_text, table
from rt.runs.summary import Points, group, with_interval

SCORES = {"accuracy": "accuracy", "pearson": "Pearson's r"}
COMPATIBILITY = {"apply": "old delta, no training", "tuned": "tuned on that base", "own": "old base + old delta",
                 "chance": "chance: commonest label"}


def by_task(rows: list[dict]) -> Iterator[tuple[str, str, str, list[dict]]]:
    """(task, reported part, name of its score, rows with it as `score`) per task. The part is test, or dev if test has no labels."""
    for (task,), found in group(rows, "task").items():
        score = next((name for name in SCORES if name in found[0]), "accuracy")
        yield task, found[0].get("scored_on", "test"), score, [row | {"score": row.get(score)} for row in found]


def collected(rows: list[dict], names: tuple[str, ...], values: tuple[str, ...]) -> list[dict]:
    """Lines of a table: `names` unchanged, and a list over seeds for each of `values`."""
    return [dict(zip(names, key)) | {value: [row.get(value) for row in found] for value in values}
            for key, found in group(rows, *names).items()]


# --- study 1: compatibility -------------------------------------------------------------------------------------------

def compatibility(rows: list[dict], path: Path) -> None:
    """A panel per task: Delta_0 on M_1(t) and on M_1, M_2, ..., with M_0 + Delta_0, deltas tuned on each base itself, and chance.
    Rows: task, seed, base, stage, t (None: the stage is complete), line (a key of COMPATIBILITY) and a score."""
    place, panels = places(rows), []
    ticks = {place[row["base"]]: row["base"] if row["t"] is None else f"t {row['t']}" for row in rows}
    for task, part, score, found in by_task(rows):
        points = {label: [(place[row["base"]], row["score"]) for row in found if row["line"] == line]
                  for line, label in COMPATIBILITY.items()}
        panels.append(Panel(task, "base", f"{part} {SCORES[score]}", points, {COMPATIBILITY["chance"]: REFERENCE}, ticks))
    draw_panels(path, panels)


def places(rows: list[dict]) -> dict[str, float]:
    """The position of each base on the axis: M_i at i, its snapshots evenly spaced before it, as train.py keeps them."""
    place = {}
    for (stage,), found in group(rows, "stage").items():
        steps = {row["base"]: math.inf if row["t"] is None else row["t"] for row in found}
        parts = len(steps) + (math.inf not in steps.values())       # a complete base that is not in the rows keeps its place
        place |= {base: stage - 1 + (i + 1) / parts for i, base in enumerate(sorted(steps, key=steps.get))}
    return place


def compatibility_numbers(rows: list[dict]) -> Iterator[dict]:
    """The score of Delta_0 on each base, of the delta tuned there, and of chance."""
    for task, part, score, found in by_task(rows):
        at = {key: [row["score"] for row in line] for key, line in group(found, "line", "base").items()}
        chance = [row["score"] for row in found if row["line"] == "chance"]
        for base in [base for line, base in at if line == "apply"]:
            tuned = at.get(("tuned", base)) or at.get(("own", base), "-")
            yield {"task": task, "base": base, "apply": at["apply", base], "tuned on that base": tuned, "chance": chance,
                   "metric": score if part == "test" else f"{part} {score}"}


# --- study 2: connectivity --------------------------------------------------------------------------------------------

def connectivity(rows: list[dict], path: Path) -> None:
    """A column per task: loss above and score below, along the path of each pair, with the height of its barrier. Rows: task, seed,
    pair, path (linear, curve), mu, loss and a score."""
    above, below, pairs = [], [], list(dict.fromkeys(row["pair"] for row in rows))
    for task, part, score, found in by_task(rows):
        paths, looks = {}, {}
        for (pair, kind), line in group(found, "pair", "path").items():
            label = f"{pair}{', curve' if kind == 'curve' else ''}: barrier {with_interval(barriers(walks(line)))}"
            paths[label], looks[label] = line, look(pairs.index(pair)) | ({"linestyle": ":"} if kind == "curve" else {})
        for column, key, name in ((above, "loss", f"{part} loss (nats)"), (below, "score", f"{part} {SCORES[score]}")):
            points = {label: [(row["mu"], row.get(key)) for row in line] for label, line in paths.items()}
            column.append(Panel(task, "mu, from the first model to the second", name, points, looks, limits="measured",
                                own_legend=column is below))
    draw_panels(path, above + below, columns=len(above))


def walks(rows: list[dict]) -> list[list[dict]]:
    """The rows of one pair and path as one list per seed, in the order of mu. A missing loss is NaN."""
    rows = sorted((row | {"loss": math.nan if row.get("loss") is None else row["loss"]} for row in rows), key=lambda row: row["mu"])
    return list(group(rows, "seed").values())


def barriers(walks: list[list[dict]]) -> list[float]:
    """The barriers of the walks that reached the other end. A killed study may hold a walk that did not."""
    return [barrier(walk) for walk in walks if (walk[0]["mu"], walk[-1]["mu"]) == (0, 1)]


def connectivity_numbers(rows: list[dict]) -> Iterator[dict]:
    """The barrier of each path, the loss and score at its ends, and its lowest score."""
    for task, part, score, found in by_task(rows):
        for (pair, path), line in group(found, "pair", "path").items():
            seeds = walks(line)
            ends = {f"{name}at {end}": [walk[-end][key] if walk[-end]["mu"] == end else None for walk in seeds]     # walk[-0]: the first
                    for name, key in (("loss ", "loss"), ("", "score")) for end in (0, 1)}
            lowest = [min(filter(is_number, (row["score"] for row in walk)), default=None) if walk[-1]["mu"] == 1 else None
                      for walk in seeds]
            yield {"task": task, "pair": pair, "path": path, "barrier": barriers(seeds), **ends, "lowest": lowest,
                   "metric": score if part == "test" else f"{part} {score}"}


# --- study 3: similarity ----------------------------------------------------------------------------------------------

def attention(rows: list[dict], path: Path) -> None:
    """Attention maps on one sentence, a line per head and a column per model. Rows: task, base, layer, head, tokens (n words) and map
    (n x n, query by key)."""
    heads, bases = group(rows, "task", "layer", "head"), list(dict.fromkeys(row["base"] for row in rows))
    side = max(2.0, 0.15 * max(len(row["tokens"]) for row in rows))
    with saved_figure(path, len(heads), len(bases), width=side, height=side) as axes:
        for line, ((task, layer, head), found) in zip(axes, heads.items()):
            words, maps = found[0]["tokens"], {row["base"]: row["map"] for row in found}
            missing = [[math.nan] * len(words)] * len(words)
            draw_heatmaps(line, [maps.get(base, missing) for base in bases], "attention")
            for ax, base in zip(line, bases):
                ax.set_xticks(range(len(words)), words, rotation=90, fontsize=7, parse_math=False)
                ax.set_yticks(range(len(words)), words, fontsize=7, parse_math=False)
                ax.set(title=f"{base}, layer {layer}, head {head}", xlabel="key", ylabel=f"{task}: query")
                ax.label_outer()


def heads(rows: list[dict], path: Path) -> None:
    """A column per task and pair: above, the divergence of every head from every head; below, the CKA of the layers; means over seeds.
    Rows: task, pair, heads (per layer), divergence (heads x heads), share_own_best, cka (layers + 1 squared)."""
    panels = group(rows, "task", "pair")
    with saved_figure(path, 2, len(panels), width=3.0, height=2.9) as axes:
        divergence, cka = ([np.mean([row[key] for row in panel], axis=0) for panel in panels.values()] for key in ("divergence", "cka"))
        draw_heatmaps(axes[0], divergence, "JS divergence (nats)", cmap="cividis_r")
        draw_heatmaps(axes[1], cka, "CKA of hidden states", 1.0)
        for (above, below), ((task, pair), panel) in zip(axes.T, panels.items()):
            (a, b), heads, layers = panel[0].get("bases", pair.split("-", 1)), panel[0]["heads"], range(len(panel[0]["cka"]) - 1)
            starts, states = [heads * layer - 0.5 for layer in layers], ["emb", *layers]
            above.set(title=f"{task}, {pair}\nown head best: {with_interval(row.get('share_own_best') for row in panel)}",
                      xlabel=f"head of {b}, by layer", xticks=starts, xticklabels=layers,
                      ylabel=f"head of {a}, by layer", yticks=starts, yticklabels=layers)
            below.set(xlabel=f"layer of {b}", xticks=range(len(states)), xticklabels=states,
                      ylabel=f"layer of {a}", yticks=range(len(states)), yticklabels=states)


def similarity_numbers(rows: list[dict]) -> list[dict]:
    return collected([row for row in rows if row["what"] == "heads"], ("task", "pair"), ("share_own_best", "own", "best_other", "cka_own"))


# --- study 4: distance ------------------------------------------------------------------------------------------------

def distance(rows: list[dict], path: Path) -> None:
    """A column for the bases and one for the deltas of each task: L2 per weight above, cosine below, by layer. Rows: task (None for
    bases), seed, pair, of, part, l2_per_weight and cosine."""
    panels = []
    for key, name, limits in (("l2_per_weight", "L2 per weight", "zero"), ("cosine", "cosine", "bands")):
        for (of, task), panel in group(rows, "of", "task").items():
            place = {part: i for i, part in enumerate(dict.fromkeys(row["part"] for row in panel))}
            gap = [(place["all"] - 0.5, math.nan)] if "all" in place else []     # `all` is not a point on the curve over layers
            points = {pair: [(place[row["part"]], row.get(key)) for row in line] + gap for (pair,), line in group(panel, "pair").items()}
            ticks = {i: part.replace("embeddings", "emb").replace("layers.", "") for part, i in place.items()}
            panels.append(Panel(of + (f", {task}" if task else ""), "layer", name, points, ticks=ticks, limits=limits))
    draw_panels(path, panels, columns=len(panels) // 2)


def distance_numbers(rows: list[dict]) -> list[dict]:
    """The distance between pairs of bases and of deltas, all parts together."""
    whole = [row | {"task": row.get("task") or "-"} for row in rows if row["part"] == "all"]
    return collected(whole, ("of", "task", "pair", "weights"), ("l2", "l2_per_weight", "cosine"))


# --- recipes of upgrades ------------------------------------------------------------------------------------------------

def pareto(points: dict[str, Points], path: Path, xlabel: str, line: tuple[str, ...] = ()) -> None:
    """One marker per label, at the mean of its points; those of `line` are joined. Low and left is better on both axes."""
    with saved_figure(path, 1, 1, width=6.0, height=4.2) as axes:
        ax = axes[0, 0]
        means = dict(sorted(((label, np.mean(of, axis=0)) for label, of in points.items()), key=lambda item: item[1][1]))
        for i, (x, y) in enumerate(means.values()):
            ax.plot([x], [y], **look(i) | {"linestyle": "", "markersize": 5})
        if line:
            ax.plot(*zip(*map(means.get, line)), color="gray", linewidth=0.8, zorder=0)
        ax.set(xlabel=xlabel, ylabel="points lost by old deltas, as they are")
        ax.figure.draw_without_rendering()      # places are known only now
        placed: list[tuple[float, float]] = []
        for label, mean in means.items():       # from below; a label that would cover another goes above it
            left, place = ax.transData.transform(mean) * 72 / ax.figure.dpi
            above = place
            while any(abs(left - other) < 4 * len(label) and abs(above - height) < 7 for other, height in placed):
                above += 1
            placed.append((left, above))
            ax.annotate(label, mean, textcoords="offset points", xytext=(5, above - place - 2), fontsize=6, parse_math=False,
                        arrowprops={"arrowstyle": "-", "linewidth": 0.3} if above > place + 7 else None)


def recipes(rows: list[dict], path: Path) -> None:
    """Points that old deltas lose against held-out loss given up on the new domain, one marker per upgrade. Rows: rt/report/studies.py."""
    points = {line["base"]: [(line["given up"], line["points lost"])] for line in recipes_numbers(rows)}
    pareto(points, path, "held-out loss given up on the new domain (nats)")


def recipes_numbers(rows: list[dict]) -> Iterator[dict]:
    """A line per upgrade with rows of deltas: the points that `apply` loses and `init` gains over `scratch`, the share of heads kept (means
    over tasks and seeds), held-out losses, the new domain's loss above the best upgrade's, and the distance from the old base."""
    bases = {row["base"]: row for row in rows if row["of"] == "base"}
    (first, old), *later = bases.items()
    new = [*old["heldout"]][-1]
    deltas = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows if row["of"] == "delta"]     # None: undefined
    deltas = [row | {"score": next(row[s] for s in SCORES if s in row)} for row in deltas]
    cells = {name: {(row["task"], row["seed"]): row for row in found} for (name,), found in group(deltas, "base").items()}
    own = cells.pop(first, {})
    common = set.intersection(*map(set, cells.values())) if cells else set()     # all, unless the study is unfinished
    for name, found in cells.items():
        base, there = bases[name], {cell: row for cell, row in found.items() if cell in common}
        yield {"base": name, "points lost": float(np.mean([100 * (own[cell]["score"] - row["score"]) for cell, row in there.items()])),
               "init above scratch": float(np.mean([100 * (row["init"] - row["scratch"]) for row in there.values()])),
               **{f"loss, {domain}": loss for domain, loss in base["heldout"].items()},
               "given up": base["heldout"][new] - min(row["heldout"][new] for _, row in later), "l2": base["l2"],
               "heads kept": float(np.mean([row["heads_kept"] for row in there.values()]))}


def mixture_numbers(rows: list[dict]) -> Iterator[dict]:
    """The fitted law per domain, its mean error at left-out bases, and the least replay that forgets nothing. No lines for fewer than
    three runs, which a law needs. The error is empty if leaving out one base leaves fewer than three runs."""
    old, *runs = rows
    if len(runs) < 3:
        return
    last, bases = [*old["heldout"]][-1], [re.sub(r"-t\d+$", "", row["base"]) for row in runs]
    for domain, before in old["heldout"].items():
        points = [(1 - row["replay"] if domain == last else row["replay"], row["steps"], row["heldout"][domain]) for row in runs]
        law, steps = fit(points), max(row["steps"] for row in runs)
        least = "" if domain == last else critical(law, steps, before)
        yield {"domain": domain, "before": before, **asdict(law),
               "error, left out": "" if (error := left_out(points, bases)) is None else error, "steps": steps,
               "critical replay": "none is enough" if least is None else least}


def mixture(rows: list[dict], path: Path) -> None:
    """A panel per domain: loss over steps, one line per share of replay; dotted: the fitted law."""
    old, *runs = rows
    last, panels = [*old["heldout"]][-1], []
    for line in mixture_numbers(rows):
        domain, lines, looks = line["domain"], {}, {}
        law = Law(*(line[field.name] for field in fields(Law)))
        for (replay,), some in group(runs, "replay").items():
            share, steps = 1 - replay if domain == last else replay, sorted({row["steps"] for row in some})
            lines[f"replay {replay:g}"] = [(row["steps"], row["heldout"][domain]) for row in some]
            lines[f"law, {replay:g}"] = [(t, law(share, t)) for t in steps]
            looks[f"law, {replay:g}"] = look(len(lines) // 2 - 1) | {"linestyle": ":", "marker": ""}
        panels.append(Panel(domain, "steps", "held-out loss (nats)", lines, looks, limits="measured"))
    draw_panels(path, panels)


# --- by the name of a study -------------------------------------------------------------------------------------------

# lines of a table: names, and lists with one value per seed
NUMBERS: dict[str, Callable[[list[dict]], Iterable[dict]]] = {
    "compatibility": compatibility_numbers, "connectivity": connectivity_numbers, "similarity": similarity_numbers,
    "distance": distance_numbers, "recipes": recipes_numbers, "mixture": mixture_numbers}
# a function has the name of its file; rows with `what` go to the figure of that name only
FIGURES: dict[str, tuple[Callable[[list[dict], Path], None], ...]] = {
    "compatibility": (compatibility,), "connectivity": (connectivity,), "similarity": (attention, heads), "distance": (distance,),
    "recipes": (recipes,), "mixture": (mixture,)}


def numbers_table(numbers: list[dict]) -> str:
    """The table of `numbers`. A list over seeds is shown as mean ± 95% interval."""
    cells = [[with_interval(v) if isinstance(v, list) else score_text(v) if isinstance(v, float) else v
              for v in line.values()] for line in numbers]
    return table(cells, [name.replace("_", " ") for name in numbers[0]]) if numbers else "no numbers yet"


def figures_of(study: str, rows: list[dict]) -> dict[str, Callable[[Path], None]]:
    """{name: a function that draws the figure to a path}."""
    return {(name := draw.__name__): partial(draw, [row for row in rows if row.get("what", name) == name]) for draw in FIGURES[study]}
