"""The parts of every report: panels of lines, drawn as a figure or as text, and heatmaps.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Lines also differ by style and marker, for print in black
and white. A band is the 95% t-interval of the mean over seeds. matplotlib comes with the `plot` extra and is imported only to draw.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Callable, Iterator, Literal

from rt.errors import InputError
from rt.formats.untrusted import is_number, shaped
from rt.runs.log import table
from rt.runs.summary import Points, by_x, interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES, MARKERS = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))), "osD^vPX"
REFERENCE = {"color": "black", "linestyle": ":", "marker": ""}      # the look of the line that other lines are compared to
RC = {"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
      "lines.markersize": 4, "image.cmap": "cividis", "legend.frameon": False, "savefig.dpi": 150, "svg.hashsalt": "rt"}
BLOCKS, PRINTED = "▁▂▃▄▅▆▇█", 40     # the blocks of a sparkline, and its maximum length


@dataclass(frozen=True)
class Panel:
    """Lines over one x axis. Several y values at one x are seeds. A line whose only x is 0 is drawn as a horizontal level."""
    title: str
    xlabel: str
    ylabel: str
    lines: dict[str, Points]
    looks: dict[str, dict] = field(default_factory=dict)    # matplotlib properties, for lines that do not take the next default look
    ticks: dict[float, str] = field(default_factory=dict)
    limits: Literal["measured", "bands", "zero"] = "bands"    # of y: the measured values (cuts bands), all of the bands, or from zero up
    own_legend: bool = False    # below the panel instead of below the figure


# --- as text ----------------------------------------------------------------------------------------------------------

def thinned(points: Points, size: int) -> Points:
    """Means of `size` neighbours each, the last perhaps of fewer."""
    return [tuple(map(mean, zip(*points[i:i + size]))) for i in range(0, len(points), size)]


def sparklines(curves: list[Points], one_scale: bool = False) -> list[str]:
    """A line of blocks per curve, scaled from the lowest to the highest value of the curve or, with `one_scale`, of all curves."""
    values = [[y for _, y in thinned(points, max(1, -(-len(points) // PRINTED)))] for points in curves]
    lines = []
    for ys in values:
        scale = sum(values, []) if one_scale else ys
        low, span = min(scale, default=0), max(scale, default=0) - min(scale, default=0)
        lines.append("".join(BLOCKS[round((len(BLOCKS) - 1) * (y - low) / span) if span else 0] for y in ys))
    return [line.ljust(max(map(len, lines))) for line in lines]


def as_text(panels: list[Panel]) -> str:
    """A row per line: its name, sparkline, first, last, lowest and highest value."""
    lines = {f"{panel.ylabel} {label}".rstrip(): points for panel in panels for label, points in panel.lines.items() if points}
    rows = []
    for (name, points), blocks in zip(lines.items(), sparklines([*lines.values()])):
        ys = [y for _, y in points]
        rows.append([name, blocks, *(f"{y:.4g}" for y in (ys[0], ys[-1], min(ys), max(ys)))])
    return table(rows, ["", "", "first", "last", "lowest", "highest"]) if rows else "no numbers yet"


# --- as figures -------------------------------------------------------------------------------------------------------

def look(i: int) -> dict[str, Any]:
    """Colour, line style and marker of line `i`. After seven lines the colours repeat with other line styles."""
    other = (i + i // 7) % 7
    return {"color": COLOURS[i % 7], "linestyle": DASHES[other], "marker": MARKERS[other]}


def draw_panels(path: Path, panels: list[Panel], columns: int = 3, width: float = 3.8, height: float = 3.0) -> None:
    """Draw panels in rows of `columns`. A label looks the same in all panels."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines if label not in panel.looks))
    columns = min(columns, len(panels))
    with saved_figure(path, -(-len(panels) // columns), columns, width, height) as axes:
        for ax, panel in zip(axes.flat, panels):
            for label, points in panel.lines.items():
                if points:
                    draw_line(ax, points, label, **panel.looks.get(label) or look(labels.index(label)))
            draw_axes(ax, panel)
        for ax in axes.flat[len(panels):]:
            ax.axis("off")
        handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
        if handles and not any(panel.own_legend for panel in panels):
            ax.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 if len(panels) == 1 else 4)


def draw_line(ax: Any, points: Points, label: str, **look: Any) -> None:
    """Draw the mean of all y values at each x, with its band."""
    xs, ys = zip(*by_x(points).items())
    middle, half = zip(*map(interval, ys))
    if not any(xs):
        ax.axhline(middle[0], label=label, linewidth=1.2, **look | {"marker": ""})
        return
    ax.plot(xs, middle, markevery=max(1, len(xs) // 6), label=label, **look)
    if any(half):
        lower, upper = ([m + sign * h for m, h in zip(middle, half)] for sign in (-1, 1))
        ax.fill_between(xs, lower, upper, color=look["color"], alpha=0.1, linewidth=0)


def draw_axes(ax: Any, panel: Panel) -> None:
    ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.limits == "zero":
        ax.set_ylim(0, None)
    if panel.limits == "measured":
        measured = [y for points in panel.lines.values() for _, y in points if is_number(y)] or [0.0]
        margin = 0.1 * (max(measured) - min(measured)) + 1e-3
        ax.set_ylim(min(measured) - margin, max(measured) + margin)
    if panel.ticks:
        ax.set_xticks([*panel.ticks], panel.ticks.values(), rotation=90 * any(x % 1 for x in panel.ticks))    # snapshots are close together
    elif all(float(x).is_integer() for points in panel.lines.values() for x, _ in points):
        ax.xaxis.get_major_locator().set_params(integer=True)
    if panel.own_legend:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), fontsize=8)


def draw_heatmaps(axes: Any, matrices: list[Any], label: str, top: float = 0.0, cmap: str | None = None) -> None:
    """Draw a row of matrices on one scale from 0 to `top` (default: their highest value), with one colour bar."""
    top = top or max((v for matrix in matrices for line in matrix for v in line if is_number(v)), default=1.0)
    for ax, matrix in zip(axes, matrices):
        image = ax.imshow(matrix, cmap=cmap, vmin=0, vmax=top)
        ax.grid(False)
    axes[0].figure.colorbar(image, ax=list(axes), shrink=0.8, label=label)


def draw_all(figures: dict[str, Callable[[Path], None]], out: Path, source: Path) -> str:
    """Draw each figure to its name in `out`. Returns where they are, or why there are none: no matplotlib, or bad rows in `source`."""
    try:
        with shaped(source, "its rows do not hold what they should"):
            for name, draw in figures.items():
                draw(out / name)
    except InputError as error:
        return f"no figures: {error}"
    return "figures " + (", ".join(str(out / f"{name}.png") for name in figures) or "come with more rows")


@contextmanager
def saved_figure(path: Path, lines: int, columns: int, width: float, height: float) -> Iterator[Any]:
    """The axes (an array) of `lines` x `columns` panels, each `width` x `height` inches, saved as PATH.png and PATH.svg when the block
    ends. Equal rows give equal files. Raises InputError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed: pip install -e '.[plot]'") from None
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(max(4.0, width * columns + 0.6), height * lines + 0.8), layout="constrained")
        yield fig.subplots(lines, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            fig.savefig(path.with_name(f"{path.name}.{ending}"), metadata=metadata)
