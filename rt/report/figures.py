"""The figures and tables of the studies, one function a figure or table: rows, as analyze.py and experiments/claims write
them, to PATH.png and PATH.svg, or to a table's numbers.
(rt/plot.py draws any run with what is below: sheets, curves, intervals.)

Colours are Okabe and Ito's, which the colour-blind tell apart; line styles and markers say the same again for print in black and
white. A band is the 95% t-interval of the mean over seeds. matplotlib comes with the `plot` extra and is imported only to draw.
"""
import math
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Iterable, Iterator

from rt.analysis import barrier
from rt.errors import InputError

BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"


COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", BLACK)


MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))


STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "savefig.dpi": 150, "svg.hashsalt": "rt"}


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # Student's t, two-sided, for 2, 3, ... 10 values


SCORES = {"accuracy": "test accuracy", "pearson": "test Pearson's r"}


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def interval(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean, and half the width of its 95% t-interval; 0 for a single value, of which nothing is known. NaN where a value is missing or
    no number (a run that diverged is not left out), or where there is none."""
    values = list(values)
    if not values or not all(map(finite, values)):
        return math.nan, 0.0
    if len(values) < 2:
        return values[0], 0.0
    return mean(values), (T95[len(values) - 2] if len(values) <= 10 else 2.1) * stdev(values) / math.sqrt(len(values))


def compatibility(rows: list[dict], path: Path) -> None:
    """Study 1  A panel a task: Delta_0 on M_1(t) and on M_1, M_2, ..., with M_0 + Delta_0, what is tuned on the base
    itself, and chance. Rows: task, kind, seed, base, stage, t (None: the stage is complete), line (apply, own, tuned, chance) and
    a score, accuracy or pearson."""
    panels = group(rows, "task", "kind")
    place, steps = places(rows), {row["base"]: row["t"] for row in rows if row["t"] is not None}
    columns = min(3, len(panels))
    with sheet(path, -(-len(panels) // columns), columns, width=3.6, height=3.0) as (fig, axes):
        for ax in axes.flat[len(panels):]:
            ax.axis("off")
        for ax, panel in zip(axes.flat, panels.values()):
            score = score_of(panel)
            for line, label, colour, dash, marker in (("apply", "old delta, no training", BLUE, "-", "o"),
                                                      ("tuned", "tuned on that base", VERMILION, "--", "s")):
                found = [row for row in panel if row["line"] == line]
                if found:
                    curve(ax, found, lambda row: place[row["base"]], score, label, colour, dash, marker)
            for line, label, colour, dash in (("own", "old base + old delta", GREEN, "-."),
                                              ("chance", "chance: commonest label", BLACK, ":")):
                found = [row.get(score) for row in panel if row["line"] == line]
                if found:
                    ax.axhline(interval(found)[0], color=colour, linestyle=dash, linewidth=1.3, label=label)
            ax.set_xticks([place[base] for base in place if base not in steps], [base for base in place if base not in steps])
            ax.set_xticks([place[base] for base in steps], steps.values(), minor=True, rotation=90, fontsize=6)
            ax.set(title=title(panel, panels), xlabel="base" + (" (small: step t on the way to it)" if steps else ""), ylabel=SCORES[score])
        shared_legend(fig, axes.flat)


def places(rows: list[dict]) -> dict[str, float]:
    """Where bases lie on the axis: M_i at i, its snapshots evenly before it, as train.py keeps them."""
    stages: dict[int, dict[str, float]] = {}
    for row in rows:
        stages.setdefault(row["stage"], {})[row["base"]] = math.inf if row["t"] is None else row["t"]
    place = {}
    for stage, at in stages.items():
        whole = len(at) + (math.inf not in at.values())     # a complete base that was not asked for keeps its place
        place |= {base: stage - 1 + (i + 1) / whole for i, base in enumerate(sorted(at, key=at.get))}
    return place


def connectivity(rows: list[dict], path: Path) -> None:
    """Study 2  A column a task: test loss above, score below, along the path of each pair, with the height of its
    barrier. Rows: task, kind, seed, pair, path (linear, curve), mu, loss and a score, accuracy or pearson."""
    panels = group(rows, "task", "kind")
    styles = {pair: i % len(COLOURS) for i, pair in enumerate(dict.fromkeys(row["pair"] for row in rows))}
    with sheet(path, 2, len(panels), width=3.6, height=2.5) as (fig, axes):
        for column, panel in zip(axes.T, panels.values()):
            score = score_of(panel)
            for (pair, kind), line in group(panel, "pair", "path").items():
                height, half = interval(barrier(walk) for walk in walks(line) if (walk[0]["mu"], walk[-1]["mu"]) == (0, 1))
                label = f"{pair}{', curve' if kind == 'curve' else ''}: barrier {height:.3f}" + (f" ± {half:.3f}" if half else "")
                i = styles[pair]
                for ax, key in zip(column, ("loss", score)):
                    curve(ax, line, lambda row: row["mu"], key, label, COLOURS[i], ":" if kind == "curve" else DASHES[i], MARKERS[i])
            column[0].set(title=title(panel, panels), ylabel="test loss (nats)")
            column[1].set(xlabel="mu, from the first model to the second", ylabel=SCORES[score])
            for ax, key in zip(column, ("loss", score)):
                set_limits(ax, [row.get(key) for row in panel])
            column[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), fontsize=8)


def walks(rows: list[dict]) -> list[list[dict]]:
    """The rows of one pair and path, a list a seed in order of mu; a loss that is missing is NaN."""
    return [sorted(({**row, "loss": math.nan if row.get("loss") is None else row["loss"]} for row in walk), key=lambda row: row["mu"])
            for walk in group(rows, "seed").values()]


def attention_heatmaps(rows: list[dict], path: Path) -> None:
    """Study 3  A line of maps a head, a column a model, on one sentence. Rows: task, base, layer, head, tokens (n words)
    and map (n x n, query by key)."""
    lines, bases = group(rows, "task", "layer", "head"), list(dict.fromkeys(row["base"] for row in rows))
    n = max(len(row["tokens"]) for row in rows)
    with sheet(path, len(lines), len(bases), width=max(2.0, 0.15 * n), height=max(2.0, 0.15 * n), matrices=True) as (fig, axes):
        for y, ((task, layer, head), line) in enumerate(lines.items()):
            top = highest(row["map"] for row in line)
            for x, base in enumerate(bases):
                ax, row = axes[y][x], next((row for row in line if row["base"] == base), None)
                if row is None:
                    ax.axis("off")
                    continue
                image = ax.imshow(row["map"], cmap="cividis", vmin=0, vmax=top)
                shown = range(len(row["tokens"]))
                ax.set_xticks(shown, row["tokens"] if y == len(lines) - 1 else [], rotation=90, fontsize=7, parse_math=False)
                ax.set_yticks(shown, row["tokens"] if x == 0 else [], fontsize=7, parse_math=False)
                ax.set(title=f"{base}, layer {layer}, head {head}", xlabel="key" if y == len(lines) - 1 else "")
            axes[y][0].set_ylabel(f"{task}: query")
            fig.colorbar(image, ax=list(axes[y]), shrink=0.8, label="attention")


def head_similarity(rows: list[dict], path: Path) -> None:
    """Study 3  A column a task and pair: divergence of every head to every head above, CKA of the layers below; means
    over seeds. Rows: task, pair, heads (of a layer), divergence (heads x heads), share_own_best, cka (layers + 1 squared)."""
    panels = group(rows, "task", "pair")
    with sheet(path, 2, len(panels), width=3.0, height=2.9, matrices=True) as (fig, axes):
        images, most = {}, highest(row["divergence"] for row in rows)     # of ln 2 at most
        for column, ((task, pair), panel) in zip(axes.T, panels.items()):
            a, _, b = pair.partition("-")
            share, half = interval(row.get("share_own_best") for row in panel)
            own = f"own head best: {share:.2f}" + (f" ± {half:.2f}" if half else "")
            for ax, key, top, scheme in zip(column, ("divergence", "cka"), (most, 1.0), ("cividis_r", "cividis")):
                images[key] = ax.imshow(averaged([row[key] for row in panel]), cmap=scheme, vmin=0, vmax=top)
            H = panel[0]["heads"]
            starts = range(0, len(panel[0]["divergence"]), H)
            for set_ticks in (column[0].set_xticks, column[0].set_yticks):
                set_ticks([s - 0.5 for s in starts], [str(s // H) for s in starts])
            for set_ticks in (column[1].set_xticks, column[1].set_yticks):
                set_ticks(range(len(panel[0]["cka"])), ["emb", *(str(i) for i in range(len(panel[0]["cka"]) - 1))])
            column[0].set(title=f"{task}, {pair}\n{own}", xlabel=f"head of {b}, by layer", ylabel=f"head of {a}, by layer")
            column[1].set(xlabel=f"layer of {b}", ylabel=f"layer of {a}")
        fig.colorbar(images["divergence"], ax=list(axes[0]), shrink=0.8, label="JS divergence (nats)")
        fig.colorbar(images["cka"], ax=list(axes[1]), shrink=0.8, label="CKA of hidden states")


def highest(matrices: Iterable[list[list[float]]]) -> float:
    return max((v for matrix in matrices for line in matrix for v in line if finite(v)), default=1.0)


def averaged(matrices: list[list[list[float]]]) -> list[list[float]]:
    return [[mean(values) for values in zip(*lines)] for lines in zip(*matrices)]


def distance(rows: list[dict], path: Path) -> None:
    """Study 4  Columns for bases and for each task's deltas; L2 per weight above, cosine below, by layer. Rows: task
    (None for bases), seed, pair, of, part, l2_per_weight and cosine."""
    panels = group(rows, "of", "task")
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    with sheet(path, 2, len(panels), width=3.6, height=2.5) as (fig, axes):
        for column, ((of, task), panel) in zip(axes.T, panels.items()):
            parts = list(dict.fromkeys(row["part"] for row in panel))
            for (pair, whole), line in group([row | {"whole": row["part"] == "all"} for row in panel], "pair", "whole").items():
                i = pairs.index(pair) % len(COLOURS)        # the whole is no point of the curve over layers
                for ax, key in zip(column, ("l2_per_weight", "cosine")):
                    curve(ax, line, lambda row: parts.index(row["part"]), key, pair, COLOURS[i], DASHES[i], MARKERS[i])
            column[0].set(title=of + (f", {task}" if task else ""), ylabel="L2 per weight", ylim=(0, None))
            column[1].set(ylabel="cosine")
            for ax in column:
                ax.set_xticks(range(len(parts)), [part.replace("layers.", "layer ") for part in parts], rotation=45, ha="right")
        shared_legend(fig, axes[0])


# the figures of each study of analyze.py by file name, which is also `what` its rows say, if they say
OF_STUDY: dict[str, dict[str, Callable[[list[dict], Path], None]]] = {
    "compatibility": {"compatibility": compatibility}, "connectivity": {"connectivity": connectivity},
    "similarity": {"attention": attention_heatmaps, "heads": head_similarity}, "distance": {"distance": distance}}


def of_study(study: str, rows: list[dict], folder: Path) -> list[str]:
    """Draw all figures of a study in `folder`; their names. InputError without matplotlib."""
    for name, figure in OF_STUDY[study].items():
        figure([row for row in rows if row.get("what", name) == name], folder / name)
    return list(OF_STUDY[study])


# --- a table's numbers: a dict a line, of names, and of lists with a value a seed

def compatibility_numbers(rows: list[dict]) -> list[dict]:
    """Scores of Delta_0 by base, of what is tuned there, and by chance."""
    numbers = []
    for (task,), part in group(rows, "task").items():
        score = score_of(part)
        lines = {line: found for (line,), found in group(part, "line").items()}
        for (base,), found in group(lines["apply"], "base").items():
            tuned = [row[score] for row in lines.get("tuned", []) + lines["own"] if row["base"] == base]
            numbers.append({"task": task, "base": base, "apply": [row[score] for row in found], "tuned on that base": tuned or "-",
                            "chance": [row[score] for row in lines["chance"]], "metric": score})
    return numbers


def connectivity_numbers(rows: list[dict]) -> list[dict]:
    """Barriers and scores of each path."""
    numbers = []
    for (task, pair, path), found in group(rows, "task", "pair", "path").items():
        each, score = walks(found), score_of(found)
        numbers.append({
            "task": task, "pair": pair, "path": path, "barrier": [barrier(walk) for walk in each],
            "loss at 0": [walk[0]["loss"] for walk in each], "loss at 1": [walk[-1]["loss"] for walk in each],
            "metric": score, "at 0": [walk[0][score] for walk in each], "at 1": [walk[-1][score] for walk in each],
            "lowest": [min(row[score] for row in walk) for walk in each]})
    return numbers


def similarity_numbers(rows: list[dict]) -> list[dict]:
    """How alike the heads and layers of a pair are."""
    return [{"task": task, "pair": pair, **{k: [row[k] for row in found] for k in ("share_own_best", "own", "best_other", "cka_own")}}
            for (task, pair), found in group([row for row in rows if row["what"] == "heads"], "task", "pair").items()]


def distance_numbers(rows: list[dict]) -> list[dict]:
    """Between pairs of bases and of deltas, all parts together."""
    return [{"of": of, "task": task or "-", "pair": pair, **{k: [row[k] for row in found] for k in ("l2", "l2_per_weight", "cosine")},
             "weights": found[0]["weights"]}
            for (of, task, pair), found in group([row for row in rows if row["part"] == "all"], "of", "task", "pair").items()]


# --- rows

def group(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Rows by their values of `keys`, in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    return groups


def score_of(rows: list[dict]) -> str:
    return next((score for score in SCORES if score in rows[0]), "accuracy")


def title(panel: list[dict], panels: dict) -> str:
    """The task; its kind of delta too where there are several."""
    several = len({kind for _, kind in panels}) > 1
    return f"{panel[0]['task']}, {panel[0]['kind']}" if several else panel[0]["task"]


def curve(ax: Any, rows: list[dict], x: Callable[[dict], float], key: str, label: str, colour: str, dash: Any, marker: str) -> None:
    """Mean of `key` over x(row), with its band."""
    at: dict[float, list[float]] = {}
    for row in rows:
        at.setdefault(x(row), []).append(row.get(key))
    xs = sorted(at)
    middle, half = zip(*(interval(at[v]) for v in xs))
    ax.plot(xs, middle, color=colour, linestyle=dash, marker=marker, markersize=4, markevery=max(1, len(xs) // 6), linewidth=1.5,
            label=label)
    if any(half):
        ax.fill_between(xs, [m - h for m, h in zip(middle, half)], [m + h for m, h in zip(middle, half)], color=colour, alpha=0.1,
                        linewidth=0)


def set_limits(ax: Any, values: list) -> None:
    """The vertical axis by what was measured: bands of two or three seeds reach far beyond."""
    values = [v for v in values if finite(v)] or [0.0]
    margin = 0.1 * (max(values) - min(values)) + 1e-3
    ax.set_ylim(min(values) - margin, max(values) + margin)


@contextmanager
def sheet(path: Path, lines: int, columns: int, width: float, height: float, matrices: bool = False) -> Iterator[tuple]:
    """(figure, array of axes) of `lines` x `columns` panels of so many inches, written to PATH.png and PATH.svg when the block
    ends. No window, and nothing of pyplot's global state; equal rows give equal files. InputError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed: pip install -e '.[plot]'") from None
    path = Path(path)
    with matplotlib.rc_context(STYLE | {"axes.grid": not matrices}):
        fig = Figure(figsize=(max(4.0, width * columns + 0.6), height * lines + 0.8), layout="constrained")
        yield fig, fig.subplots(lines, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            fig.savefig(path.with_name(f"{path.name}.{ending}"), metadata=metadata)


def shared_legend(fig: Any, axes: Iterable) -> None:
    """One legend below all panels: every label once."""
    axes = list(axes)
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=2 if len(axes) == 1 else 4)
