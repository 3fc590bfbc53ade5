"""Draws a finished or unfinished run from its rows alone: curves as text, then PNG and SVG if matplotlib is installed.

    python -m rt.report.plot RUN [RUN ...] [--out DIR]         the figures of each into RUN/figures

    train.py                loss (and learning rate, over all stages) and forgetting (held-out loss, stages x domains)
    train.py --mode tune    tuning: loss and score on dev
    recycle.py              convergence: dev over steps, one line per mode, at its best settings on dev
    analyze.py              the figures of its study (rt/report/figures.py)
"""
import math
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Callable

from rt.errors import InputError
from rt.formats.atomic import UNFINISHED, digest_of
from rt.formats.files import FIGURES, read_json, read_rows
from rt.formats.untrusted import is_number, shaped
from rt.report.drawing import REFERENCE, Panel, as_text, draw_all, draw_panels, look, saved_figure, sparklines, thinned
from rt.report.figures import NUMBERS, figures_of, numbers_table
from rt.runs.config import parse, run
from rt.runs.log import scores_text, table
from rt.runs.summary import Points, by_x, chosen, forgetting_table, group, source_of, spread

DRAWN = 400     # maximum points of a loss curve; a longer curve is drawn as means of neighbours


@dataclass
class Config:
    """python -m rt.report.plot RUN [RUN ...] [--out DIR]"""
    runs: tuple[str, ...] = ()  # folders that train.py, recycle.py or analyze.py wrote, or are writing
    out: str | None = None  # folder for the figures; with several runs, one folder per run in it; default RUN/figures


@dataclass(frozen=True)
class Report:
    """What a run is, its numbers as text, and its figures: by name, the function that draws each to a path."""
    what: str
    text: str
    figures: dict[str, Callable[[Path], None]]


def report(folder: Path) -> Report:
    """The report of a run. Raises InputError if `folder` is not a run, or if its rows are not as our scripts write them."""
    rows = [row for name in ("metrics.jsonl", "rows.jsonl") for row in read_rows(folder / name)]
    summary = read_json(folder / "summary.json", {})
    with shaped(folder, "its rows do not hold what they should"):
        first = rows[0] if rows else {}
        if (study := first.get("study")) in NUMBERS:
            numbers = [*NUMBERS[study](rows)]
            return Report("a study", numbers_table(numbers), figures_of(study, rows) if numbers else {})
        if "stages" in summary or "stage" in first:
            return pretraining(rows, summary)
        if "run" not in first and any(scored(rows)[1]):
            return tuning(rows, summary)
        if results := results_of(folder, summary):
            return recycling(results)
    raise InputError(f"{folder}: no run with rows to draw; expected a folder that train.py, recycle.py or analyze.py wrote, with "
                     "metrics.jsonl, rows.jsonl or summary.json")


def points_of(rows: list[dict], y: str) -> Points:
    """(step, y) of the rows in which both values are finite numbers."""
    return [(row["step"], row[y]) for row in rows if is_number(row.get("step")) and is_number(row.get(y))]


# --- pre-training: a stream of bases ----------------------------------------------------------------------------------

def pretraining(rows: list[dict], summary: dict) -> Report:
    """The report of a stream. A stage here is a dict: name, domain, title, rows and heldout (None before it is scored)."""
    rows = rows + [{"stage": stage.get("name")} | {k: stage.get(k) for k in ("domain", "heldout")} for stage in summary.get("stages", [])]
    stages = [{"name": name, "rows": found} | {k: next(filter(None, (row.get(k) for row in found)), None) for k in ("domain", "heldout")}
              for (name,), found in group(rows, "stage").items()]
    scored = [stage for stage in stages if stage["heldout"]]
    # unfinished runs of older versions recorded no domain: the held-out domains are in the order of the stream
    guessed = [*scored[0]["heldout"]] if scored and not any(stage["domain"] for stage in stages) else []
    for stage, guess in zip(stages, guessed + ["?"] * len(stages)):
        stage["domain"] = str(stage["domain"] or guess)
        stage["title"] = f"{stage['name']} ({stage['domain']})"
    panels, figures = loss_panels(stages), {}
    if any(points_of(rows, "loss")):
        figures["loss"] = lambda path: draw_panels(path, panels, columns=1, width=6.4, height=2.2)
    if scored:
        figures["forgetting"] = lambda path: draw_forgetting(scored, path)
    return Report("pre-training", as_text(panels) + ("\n" + forgetting_table(scored) if scored else ""), figures)


def loss_panels(stages: list[dict]) -> list[Panel]:
    """Loss and learning rate over the steps of all stages, one line per stage."""
    size, start = max(1, -(-sum(len(points_of(stage["rows"], "loss")) for stage in stages) // DRAWN)), 0
    losses, rates, looks = {}, {}, {}
    for i, stage in enumerate(stages):
        for lines, key in ((losses, "loss"), (rates, "lr")):
            lines[stage["title"]] = thinned([(start + step, y) for step, y in points_of(stage["rows"], key)], size)
        looks[stage["title"]] = look(i) | {"linestyle": "-", "marker": ""}
        start += max((step for step, _ in points_of(stage["rows"], "step")), default=0)
    return [Panel("", "", "training loss" + (f", mean of {size} steps" if size > 1 else ""), losses, looks),
            Panel("", "optimizer steps", "learning rate", rates, looks, limits="zero")]


def draw_forgetting(stages: list[dict], path: Path) -> None:
    """Held-out loss of every domain (columns) after every stage (rows). The domains that the stage was trained on are bold."""
    domains = list(stages[0]["heldout"])
    values = [[(stage["heldout"].get(domain) or {}).get("loss", math.nan) for domain in domains] for stage in stages]
    with saved_figure(path, 1, 1, width=max(3.4, 0.9 * len(domains) + 1.4), height=0.5 * len(stages) + 1) as ((ax,),):
        image = ax.imshow(values, cmap="cividis_r", aspect="auto")
        for (y, stage), (x, domain) in product(enumerate(stages), enumerate(domains)):
            value = values[y][x] if is_number(values[y][x]) else math.nan
            color = "white" if image.norm(value) > 0.46 else "black"        # cividis_r is dark above this value
            ax.text(x, y, f"{value:.3f}".replace("nan", "-"), ha="center", va="center", color=color,
                    fontweight="bold" if domain in (stage["domain"], *stage["domain"].split("+")) else "normal")
        ax.grid(False)
        ax.set_xticks(range(len(domains)), domains)
        ax.set_yticks(range(len(stages)), [stage["title"] for stage in stages])
        ax.set(xlabel="held-out text of", ylabel="after", title="bold: the stage's own domain")
        ax.figure.colorbar(image, ax=ax, label="held-out loss (nats)")


# --- tuning: a delta --------------------------------------------------------------------------------------------------

def scored(rows: list[dict]) -> tuple[str, list[dict]]:
    """(metric, a row {'step', 'loss', 'score'} per evaluation on dev)."""
    rows = [row for row in rows if isinstance(row.get("dev"), dict) and row["dev"]]
    metric = next(iter(rows[0]["dev"])) if rows else "score"
    return metric, [{"step": row.get("step"), "loss": row.get("loss"), "score": row["dev"].get(metric)} for row in rows]


def tuning(rows: list[dict], summary: dict) -> Report:
    metric, rows = scored(rows)
    losses, scores = points_of(rows, "loss"), points_of(rows, "score")
    kept = "kept: {1:.3f}, step {0:g}".format(*max(scores, key=lambda point: point[1])) if scores else ""     # the first of equals
    panels = [Panel("", "optimizer steps", "loss since the last evaluation", {"": losses}),
              Panel(kept, "optimizer steps", f"dev {metric}", {"": scores})]
    test = scores_text(summary.get("test") or {})
    return Report("tuning", as_text(panels) + (f"\ntest {test}" if test else ""), {"tuning": lambda path: draw_panels(path, panels)})


# --- recycling: modes over seeds --------------------------------------------------------------------------------------

def results_of(folder: Path, summary: dict) -> list[dict]:
    """A row per run that did not diverge: of the runs that have finished, and of those that only summary.json still knows."""
    finished = {path.parent.name: read_json(path) for path in sorted(folder.glob("deltas/*/summary.json"))
                if path.parent.suffix not in UNFINISHED}
    rows = [finished.pop(row.get("run"), row) for row in summary.get("rows", [])]      # the first of equals is the best, as in recycle.py
    return [completed(row) for row in [*rows, *finished.values()] if row.get("curve") and row.get("mode") and not row.get("diverged")]


def completed(row: dict) -> dict:
    """The row with all fields read here: finite points of its curve, the best of them (or None) as its dev score, its base, and a hash of
    the content of base and task (in a chain: of the task)."""
    settings, metric = row.get("settings") or {}, next(iter(row.get("dev") or {}), "score")
    curve = [(step, score) for step, score in row.get("curve") or [] if is_number(step) and is_number(score)]
    content = (row.get("origin") or [])[3 if "route" in row else 1::2]
    source = source_of(row)[:1 if row.get("route") == "chain" else None]     # of a chain, without the bases between: one line has all bases
    return {"base": settings.get("base"), "lr": None} | row | {
        "delta": settings.get("delta", row.get("delta")),       # as asked for: apply of an old delta of another kind stays beside scratch
        "content": digest_of(content)[:6] if content else "", "source": digest_of(source)[:6],
        "settings": settings, "curve": curve, "metric": metric, "dev": {metric: max((y for _, y in curve), default=None)},
        "chosen_by_base": None if "route" in row else settings.get("base")}     # all bases of a chain share one setting


def best_by_panel(results: list[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """{(task, delta, shots, base, content): {mode and route: the rows of their best setting on dev}}. If old deltas, texts or a
    teacher's answers changed between runs, the rows of each have their own line."""
    def setting(row: dict) -> list:     # the same for all bases of a chain
        return [row["lr"], {k: v for k, v in row["settings"].items() if k not in ("base", "chain")}]

    panels: dict[tuple, dict] = {}
    keys = ("mode", "route", "task", "delta", "shots", "chosen_by_base", "content", "source")
    for (mode, route, *_, source), rows in group(results, *keys).items():
        for panel, found in group(chosen(rows, mode, setting), "task", "delta", "shots", "base", "content").items():
            name, lines = f"{mode} {route}" if route else mode, panels.setdefault(panel, {})
            lines[f"{name}, sources {source}" if name in lines else name] = found
    return panels


def recycling(results: list[dict]) -> Report:
    """A panel per task, kind of delta, number of examples and base. If base or task changed between runs, their content is named."""
    tables, panels, found = [], [], best_by_panel(results)
    several = Counter(place[:4] for place in found)
    for (task, delta, shots, base, content), lines in found.items():
        few = "examples" if next(iter(lines.values()))[0]["metric"] == "pearson" else "a label"
        words = (task, delta, shots and f"{shots} {few}", base and f"on {Path(base).name}",
                 f"content {content}" if several[task, delta, shots, base] > 1 else "")
        title = ", ".join(str(word) for word in words if word) or "runs"
        text, panel = convergence(title, lines)
        tables.append(f"{title}\n{text}")
        panels.append(panel)
    return Report("recycling", "\n".join(tables), {"convergence": lambda path: draw_panels(path, panels, width=4.2, height=3.2)})


def convergence(title: str, lines: dict[str, list[dict]]) -> tuple[str, Panel]:
    """A table with a row and a panel with a line per mode. Modes without training and scratch's best are levels in the panel."""
    if len({rows[0].get("steps") for rows in lines.values()} - {0, None}) > 1:      # the runs of several commands are not of one budget
        lines = {f"{name}, {rows[0]['steps']} steps" if rows[0].get("steps") else name: rows for name, rows in lines.items()}
    metric = next(iter(lines.values()))[0]["metric"]
    curves = {name: [point for row in rows for point in row["curve"]] for name, rows in lines.items()}
    means = [[(step, mean(ys)) for step, ys in by_x(curve).items()] for curve in curves.values()]
    blocks = sparklines(means, one_scale=True)
    cells = [[name, line, spread(rows, "dev"), spread(rows) if all(row.get("test") for row in rows) else "-", len(rows)]
             for (name, rows), line in zip(lines.items(), blocks)]
    levels = {"scratch's best": [(0, row["dev"][row["metric"]]) for row in rows] for rows in lines.values() if rows[0]["mode"] == "scratch"}
    return (table(cells, ["mode", "dev over steps".ljust(len(blocks[0])), f"best dev {metric}", "test", "seeds"]),
            Panel(title, "optimizer steps", f"dev {metric}", curves | levels, {"scratch's best": REFERENCE}, limits="measured"))


def main(argv: list[str]) -> None:
    c = parse(Config, argv, words="runs")
    if not c.runs:
        raise InputError("which run? python -m rt.report.plot RUN [RUN ...], folders that train.py, recycle.py or analyze.py wrote")
    places = {name: Path(c.out or Path(name) / FIGURES) / (Path(name).resolve().name if c.out and len(c.runs) > 1 else "")
              for name in c.runs}
    if len({*places.values()}) < len(places):
        raise InputError(f"--out {c.out}: two of the runs have the same name; leave it out, or draw them one by one")
    reports = [report(Path(name)) for name in places]       # all of them, before any figure is drawn
    for (name, out), found in zip(places.items(), reports):
        print(f"{Path(name)}: {found.what}\n{found.text}")
        try:
            drawn = draw_all(found.figures, out, Path(name))
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror}): give another --out") from None
        print(drawn)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
