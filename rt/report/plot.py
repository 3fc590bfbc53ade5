"""Draws what a run left, or has left so far, from its rows alone: curves as text, then PNG and SVG where matplotlib is.

    python -m rt.report.plot RUN [RUN ...]         the figures of each into RUN/figures
    python -m rt.report.plot runs/demo --out DIR

A RUN is a folder that a script wrote:

    train.py                loss (and learning rate, over all stages) and forgetting (held-out loss, stages x domains)
    train.py --mode tune    tuning: loss and score on dev
    recycle.py              convergence: dev over steps, a line a mode at the settings that are best on dev
    analyze.py              the figures of its study (rt/figures.py)
"""
import json
import math
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Callable

from rt.errors import InputError
from rt.formats.files import FIGURES, read_json, read_rows
from rt.formats.untrusted import shaped
from rt.report import figures
from rt.report.figures import BLACK, BLUE, COLOURS, DASHES, MARKERS, VERMILION, curve, finite, group, set_limits, shared_legend, sheet
from rt.runs.config import parse, run
from rt.runs.log import table
from rt.runs.summary import chosen, forgetting_table, spread

BLOCKS = "▁▂▃▄▅▆▇█"


DRAWN, PRINTED = 400, 40    # points of a curve: longer ones are drawn as means of neighbours


@dataclass
class Config:
    """python -m rt.report.plot RUN [RUN ...] [--out DIR]"""
    runs: tuple[str, ...] = ()  # folders that train.py, recycle.py or analyze.py wrote, or are writing
    out: str | None = None  # folder for the figures, of several runs each in a folder of its name; default RUN/figures


@dataclass
class Folder:
    """A folder, the rows of its metrics.jsonl (of a study: rows.jsonl) and its summary; what is not there yet is empty."""
    folder: Path
    rows: list[dict]
    summary: dict


@dataclass(frozen=True)
class Kind:
    """A kind of run: what it is told by, what is said of it, and what draws it, returning the figures' names."""
    what: str
    is_one: Callable[[Folder], bool]
    text: Callable[[Folder], str]
    draw: Callable[[Folder, Path], list[str]]


def readable(folder: Path) -> AbstractContextManager:
    """InputError for what rows raise that are not of the shape that a script of ours writes."""
    return shaped(folder, "its rows do not hold what they should")


def open_run(folder: Path) -> tuple[Kind, Folder]:
    """InputError where a folder is no run."""
    rows = [row for name in ("metrics.jsonl", "rows.jsonl") for row in read_rows(folder / name) if isinstance(row, dict)]
    found = Folder(folder, rows, read_json(folder / "summary.json") if (folder / "summary.json").exists() else {})
    with readable(folder):
        for kind in KINDS:
            if kind.is_one(found):
                return kind, found
    raise InputError(f"{folder}: no run with rows to draw; expected a folder that train.py, recycle.py or analyze.py wrote, with "
                     "metrics.jsonl, rows.jsonl or summary.json")


# --- curves as text ---------------------------------------------------------------------------------------------------

def points(rows: list[dict], y: str, x: str = "step") -> list[tuple[float, float]]:
    """(x, y) of the rows that have both as numbers."""
    return [(row[x], row[y]) for row in rows if finite(row.get(x)) and finite(row.get(y))]


def thinned(pairs: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many neighbours."""
    size = max(1, -(-len(pairs) // most))
    return [tuple(map(mean, zip(*pairs[i:i + size]))) for i in range(0, len(pairs), size)]


def sparklines(curves: list[list[tuple[float, float]]], one_scale: bool = False) -> list[str]:
    """A line a curve: blocks from its lowest to its highest value, or from the lowest to the highest of all of them."""
    values = [[y for _, y in thinned(pairs, PRINTED)] for pairs in curves]
    lines = []
    for own in values:
        scale = [y for each in values for y in each] if one_scale else own
        low, span = min(scale), max(scale) - min(scale)
        lines.append("".join(BLOCKS[round((len(BLOCKS) - 1) * (y - low) / span) if span else 0] for y in own))
    return [line.ljust(max(map(len, lines))) for line in lines]


def printed(curves: dict[str, list[tuple[float, float]]]) -> str:
    """A line a curve: name, sparkline, first and last value, lowest and highest."""
    curves = {name: pairs for name, pairs in curves.items() if pairs}
    values = [[y for _, y in pairs] for pairs in curves.values()]
    rows = [[name, line, *(f"{v:.4g}" for v in (own[0], own[-1], min(own), max(own)))]
            for name, line, own in zip(curves, sparklines([*curves.values()]), values)]
    return table(rows, ["", "", "first", "last", "lowest", "highest"]) if rows else "no numbers yet"


# --- pre-training: a stream of bases ----------------------------------------------------------------------------------

def stages_of(r: Folder) -> list[dict]:
    """name, domain, rows and heldout (None where it is not scored yet) of every stage, in order."""
    known = {stage.get("name"): stage for stage in r.summary.get("stages", [])}
    rows = {name: found for (name,), found in group(r.rows, "stage").items()}
    heldout = {name: next((row["heldout"] for row in rows.get(name, []) if row.get("heldout")), known.get(name, {}).get("heldout"))
               for name in dict.fromkeys([*known, *rows])}
    domains = next((list(scores) for scores in heldout.values() if scores), [])      # the stream's, in its order
    return [{"name": name, "domain": domains[i] if i < len(domains) else "?", "rows": rows.get(name, []), "heldout": scores}
            for i, (name, scores) in enumerate(heldout.items())]


def pretraining_text(r: Folder) -> str:
    stages = stages_of(r)
    curves = {f"{key} {s['name']} ({s['domain']})": points(s["rows"], key) for key in ("loss", "lr") for s in stages}
    scored = [s for s in stages if s["heldout"]]
    return printed(curves) + ("\n" + forgetting_table(scored) if scored else "")


def draw_pretraining(r: Folder, out: Path) -> list[str]:
    stages, names = stages_of(r), []
    scored = [s for s in stages if s["heldout"]]
    if any(points(s["rows"], "loss") for s in stages):
        draw_loss(stages, out / "loss")
        names.append("loss")
    if scored:
        draw_forgetting(scored, out / "forgetting")
        names.append("forgetting")
    return names


def draw_loss(stages: list[dict], path: Path) -> None:
    """Loss above, learning rate below, over the steps of all stages."""
    total = sum(len(s["rows"]) for s in stages)
    with sheet(path, 2, 1, width=6.4, height=2.2) as (fig, ((above,), (below,))):
        start, size = 0, -(-total // DRAWN)
        for stage in stages:
            for ax, key in ((above, "loss"), (below, "lr")):
                pairs = [(start + x, y) for x, y in thinned(points(stage["rows"], key), max(1, len(stage["rows"]) // size))]
                ax.plot(*zip(*pairs) if pairs else ((), ()), color=BLUE, linewidth=1.2)
                ax.axvline(start, color=BLACK, linestyle=":", linewidth=0.8)
            above.annotate(f" {stage['name']} ({stage['domain']})", (start, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
            start += max((x for x, _ in points(stage["rows"], "step")), default=0)
        above.set(ylabel="training loss (nats)" + (f"\nmean of {size} steps" if size > 1 else ""))
        below.set(xlabel="optimizer steps", ylabel="learning rate", ylim=(0, None))


def draw_forgetting(stages: list[dict], path: Path) -> None:
    """Held-out loss of every domain (columns) after every stage (rows); in bold the domain that the stage was trained on."""
    domains = list(stages[0]["heldout"])
    values = [[(stage["heldout"].get(domain) or {}).get("loss", math.nan) for domain in domains] for stage in stages]
    with sheet(path, 1, 1, width=max(3.4, 0.9 * len(domains) + 1.4), height=0.5 * len(stages) + 1, matrices=True) as (fig, ((ax,),)):
        image = ax.imshow(values, cmap="cividis_r", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                dark = finite(value) and sum(image.cmap(image.norm(value))[:3]) < 1.5
                ax.text(x, y, f"{value:.3f}" if finite(value) else "-", ha="center", va="center", color="white" if dark else "black",
                        fontweight="bold" if stages[y]["domain"] == domains[x] else "normal")
        ax.set_xticks(range(len(domains)), domains)
        ax.set_yticks(range(len(stages)), [f"{s['name']} ({s['domain']})" for s in stages])
        ax.set(xlabel="held-out text of", ylabel="after", title="bold: the stage's own domain")
        fig.colorbar(image, ax=ax, label="held-out loss (nats)")


# --- tuning: a delta --------------------------------------------------------------------------------------------------

def dev_rows(rows: list[dict]) -> tuple[str, list[dict]]:
    """(metric, {'step', 'loss', 'score'} of every evaluation)."""
    scored = [row for row in rows if isinstance(row.get("dev"), dict) and row["dev"]]
    metric = next(iter(scored[0]["dev"]), "score") if scored else "score"
    return metric, [{"step": row.get("step"), "loss": row.get("loss"), "score": row["dev"].get(metric)} for row in scored]


def tuning_text(r: Folder) -> str:
    metric, rows = dev_rows(r.rows)
    test = ", ".join(f"{k} {v:.3f}" for k, v in (r.summary.get("test") or {}).items() if finite(v))
    return printed({"loss": points(rows, "loss"), f"dev {metric}": points(rows, "score")}) + (f"\ntest {test}" if test else "")


def draw_tuning(r: Folder, out: Path) -> list[str]:
    metric, rows = dev_rows(r.rows)
    losses, scores = points(rows, "loss"), points(rows, "score")
    with sheet(out / "tuning", 1, 2, width=3.4, height=2.6) as (fig, (axes,)):
        for ax, pairs, label, colour, marker in ((axes[0], losses, "training loss since the last evaluation", VERMILION, "s"),
                                                 (axes[1], scores, f"dev {metric}", BLUE, "o")):
            ax.plot(*zip(*pairs) if pairs else ((), ()), color=colour, marker=marker, markersize=3, linewidth=1.5)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set(xlabel="optimizer steps", ylabel=label)
        if scores:      # the first of the best, which is kept
            step, best = max(scores, key=lambda pair: pair[1])
            axes[1].plot(step, best, color=BLACK, marker="*", markersize=11, linestyle="", label=f"kept: {best:.3f}, step {step:g}")
            axes[1].legend(fontsize=8)
    return ["tuning"]


# --- recycling: modes over seeds --------------------------------------------------------------------------------------

def recycled(r: Folder) -> list[dict]:
    """A row a run, of summary.json; of an interrupted sweep those of its finished runs; else of the curves so far."""
    rows = r.summary.get("rows") or [read_json(path) for path in sorted(r.folder.glob("deltas/*/summary.json"))]
    if not any("curve" in row for row in rows):
        rows = []
        for (_, mode), found in group([row for row in r.rows if "part" not in row], "run", "mode").items():
            metric, scored = dev_rows(found)
            rows.append({**found[0], "mode": mode, "dev": {metric: 0}, "curve": points(scored, "score")})
    return [whole for whole in map(completed, rows) if whole["curve"] and whole["mode"]]


def completed(row: dict) -> dict:
    """The row with all that is read of it here; its curve without what is no number, its dev score the best of that."""
    settings = row.get("settings") or {}
    curve = [(step, value) for step, value in row.get("curve") or [] if finite(step) and finite(value)]
    metric = next(iter(row.get("dev") or {}), "score")
    facts = {"base": settings.get("base"), **dict.fromkeys(("mode", "route", "seed", "lr", "task", "delta", "shots")),
             "alone": None if "route" in row else settings.get("base")}
    return facts | row | {"settings": settings, "curve": curve, "metric": metric, "dev": {metric: max((y for _, y in curve), default=0)}}


def setting(row: dict) -> tuple:
    """What a line is chosen by: for each base, in a chain for all its bases together."""
    return row["lr"], json.dumps({k: v for k, v in row["settings"].items() if k not in ("base", "chain")}, sort_keys=True)


def panels_of(r: Folder) -> dict[tuple, dict[tuple, list[dict]]]:
    """{(task, delta, shots, base): {(mode, route): the rows of its best setting on dev}}."""
    panels: dict[tuple, dict] = {}
    for (mode, route, *_), rows in group(recycled(r), "mode", "route", "task", "delta", "shots", "alone").items():
        for panel, found in group(chosen(rows, mode, setting), "task", "delta", "shots", "base").items():
            panels.setdefault(panel, {})[mode, route] = found
    return panels


def named(panel: tuple) -> str:
    task, delta, shots, base = panel
    return ", ".join(str(part) for part in (task, delta, shots and f"{shots} a label", base and f"on {Path(base).name}") if part) or "runs"


def recycling_text(r: Folder) -> str:
    said = []
    for panel, lines in panels_of(r).items():
        rows, curves = [], {}
        for line, found in lines.items():
            at = group([{"step": step, "score": y} for row in found for step, y in row["curve"]], "step")
            curves[line] = sorted((step, mean(row["score"] for row in here)) for (step,), here in at.items())
        for (line, found), drawn in zip(lines.items(), sparklines([*curves.values()], one_scale=True)):
            tested = all(finite(next(iter((row.get("test") or {}).values()), None)) for row in found)
            rows.append([" ".join(filter(None, line)), drawn, spread(found, "dev"), spread(found) if tested else "-",
                         len(found)])
        metric = next(iter(lines.values()))[0]["metric"]
        said.append(f"{named(panel)}\n" + table(rows, ["mode", "dev over steps".ljust(len(drawn)), f"best dev {metric}", "test", "seeds"]))
    return "\n".join(said)


def draw_convergence(r: Folder, out: Path) -> list[str]:
    """A panel a task and base, a line a mode: dev's mean over seeds and its 95% t-interval. Modes without training are levels, and so is
    the best of scratch, averaged over seeds."""
    panels = panels_of(r)
    styles = {line: i for i, line in enumerate(dict.fromkeys(line for lines in panels.values() for line in lines))}
    columns = min(3, len(panels))
    with sheet(out / "convergence", -(-len(panels) // columns), columns, width=4.2, height=3.2) as (fig, axes):
        for ax in axes.flat[len(panels):]:
            ax.axis("off")
        for ax, (panel, lines) in zip(axes.flat, panels.items()):
            for line, found in lines.items():
                i, label = styles[line], " ".join(filter(None, line))
                colour, dash, marker = COLOURS[i % 7], DASHES[(i + i // 7) % 7], MARKERS[(i + i // 7) % 7]
                rows = [{"step": step, "score": y} for row in found for step, y in row["curve"]]
                if any(row["step"] for row in rows):
                    curve(ax, rows, lambda row: row["step"], "score", label, colour, dash, marker)
                else:
                    ax.axhline(mean(row["score"] for row in rows), color=colour, linestyle=dash, linewidth=1.2, label=label)
                if line[0] == "scratch":
                    ax.axhline(mean(row["dev"][row["metric"]] for row in found), color=BLACK, linestyle=":", linewidth=1.2,
                               label="scratch's best")
            set_limits(ax, [y for found in lines.values() for row in found for _, y in row["curve"]])
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set(title=named(panel), xlabel="optimizer steps", ylabel=f"dev {next(iter(lines.values()))[0]['metric']}")
        shared_legend(fig, axes.flat)
    return ["convergence"]


# --- studies ----------------------------------------------------------------------------------------------------------

# of each study: what a line is made of, where along it a row lies, and what is read there (None: the score)
LINES = {"compatibility": (("task", "line"), "base", None), "connectivity": (("task", "pair", "path"), "mu", "loss"),
         "distance": (("of", "task", "pair"), "part", "l2_per_weight"), "similarity": (("task", "pair"), "what", "share_own_best")}


def study_text(r: Folder) -> str:
    keys, along, y = LINES[r.rows[0]["study"]]
    rows, curves = [row for row in r.rows if row.get("what") != "attention"], {}
    for names, found in group(rows, *keys).items():
        values = [[row.get(y or figures.score_of(found)) for row in here] for here in group(found, along).values()]
        curves[" ".join(map(str, filter(None, names)))] = [(i, mean(v)) for i, v in enumerate(values) if all(map(finite, v))]
    return f"{y or 'score'} along {along}, mean over seeds\n{printed(curves)}"


KINDS = (
    Kind("a study", lambda r: bool(r.rows) and r.rows[0].get("study") in figures.OF_STUDY, study_text,
         lambda r, out: figures.of_study(r.rows[0]["study"], r.rows, out)),
    Kind("pre-training", lambda r: "stages" in r.summary or bool(r.rows) and "stage" in r.rows[0], pretraining_text, draw_pretraining),
    Kind("tuning", lambda r: bool(r.rows) and "run" not in r.rows[0] and bool(dev_rows(r.rows)[1]), tuning_text, draw_tuning),
    Kind("recycling", lambda r: bool(recycled(r)), recycling_text, draw_convergence))


def main(argv: list[str]) -> None:
    c = parse(Config, argv, words="runs")
    if not c.runs:
        raise InputError("which run? python -m rt.report.plot RUN [RUN ...], folders that train.py, recycle.py or analyze.py wrote")
    places = {name: Path(c.out or Path(name) / FIGURES) / (Path(name).resolve().name if c.out and len(c.runs) > 1 else "")
              for name in c.runs}
    if len({*places.values()}) < len(places):
        raise InputError(f"--out {c.out}: two of the runs have the same name; leave it out, or draw them one by one")
    for (kind, r), out in zip([open_run(Path(name)) for name in places], places.values()):
        with readable(r.folder):
            print(f"{r.folder}: {kind.what}\n{kind.text(r)}")
        try:
            with readable(r.folder):
                names = kind.draw(r, out)
        except InputError as error:     # no matplotlib, or numbers that cannot be drawn
            print(f"no figures: {error}")
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror}): give another --out") from None
        else:
            print("figures " + ", ".join(str(out / f"{name}.png") for name in names))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # the blocks of a curve, where an encoding has none
    run(lambda: main(sys.argv[1:]))
