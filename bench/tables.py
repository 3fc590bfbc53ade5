"""Benchmark rows as Markdown: first the ratios, then the figures behind them, then where they were measured."""
from pathlib import Path
from typing import Any, Callable

from bench.targets import targets
from rt.formats.files import read_rows
from rt.runs.summary import group


def read(path: str) -> list[dict]:
    """The last run in a file; a resumed run counts as one run."""
    rows = read_rows(Path(path))
    starts = [i for i, row in enumerate(rows) if row.get("kernel") == "environment" and "--resume" not in row["argv"]]
    return rows[starts[-1] if starts else 0:]


def case_of(row: dict) -> dict:
    """The case of a row: everything before the implementation."""
    return dict(list(row.items())[:list(row).index("impl")])


def label(case: dict) -> str:
    """A case in words: text as it is, numbers after their names; zero, None and False are left out."""
    named = {k: k if v is True else v if isinstance(v, str) else f"{k} {v}" for k, v in case.items() if v and k != "bench"}
    return " ".join(named.values())


def line_of(row: dict) -> str:
    """The beginning of a row's line: its case without the kind (the table's title), and its pass."""
    return label({k: v for k, v in case_of(row).items() if k not in ("case", "kernel")} | {"pass": row.get("pass")})


def kind_of(row: dict) -> str:
    return row.get("case") or row["kernel"]


def latest(rows: list[dict]) -> list[dict]:
    """One row per implementation of a case (and pass): the last one written. A failure does not hide an earlier success."""
    found: dict[tuple, dict] = {}
    for row in rows:
        if "impl" in row and row.get("kernel") != "limits":
            key = (kind_of(row), line_of(row), row["impl"])
            if "failed" not in row or "failed" in found.get(key, row):
                found[key] = row
    return list(found.values())


def number(x: float) -> str:
    """x with three significant digits, without an exponent."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def markdown(rows: list[list], header: list[str]) -> list[str]:
    """The lines of a table; the first column is left-aligned, the others right-aligned."""
    cells = [header, [":--"] + ["--:"] * (len(header) - 1)] + [[str(c) for c in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def pivot(rows: list[dict], corner: str, text: Callable[[dict], str]) -> list[str]:
    """A line per case (and pass), a column per implementation, and `text` of the row in each cell."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(line_of(row), {})[row["impl"]] = text(row)
    names = list(dict.fromkeys(row["impl"] for row in rows))
    return markdown([[line, *(by.get(name, "") for name in names)] for line, by in lines.items()], [corner, *names])


def ratio(row: dict) -> str:
    """The time of the implementation that others are compared with; for the others, their ratio to it."""
    return f"{number(row['ms'])} ms" if row["impl"] == row["against"] else f"{row['ratio']:.2f}" if "ratio" in row else "-"


FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {     # columns; those without any value are left out
    "dtype": ("dtype", str), "ms": ("ms", number), "p20": ("p20", number), "p80": ("p80", number),
    "ratio p20": ("ratio_p20", "{:.2f}".format), "ratio p80": ("ratio_p80", "{:.2f}".format), "tokens/s": ("tokens_per_s", number),
    "MFU %": ("mfu", lambda x: f"{100 * x:.0f}"), "TFLOP/s": ("tflops", number), "GB/s": ("gbps", number),
    "peak MiB": ("peak_mb", number), "saved MiB": ("saved_mb", number), "grads MiB": ("grads_mb", number),
    "state MiB": ("state_mb", number)}


def figures(rows: list[dict]) -> list[str]:
    """A line per implementation of a case."""
    shown = {name: column for name, column in FIGURES.items() if any(row.get(column[0]) is not None for row in rows)}
    return markdown([[line_of(row), row["impl"], *("" if row.get(key) is None else text(row[key]) for key, text in shown.values())]
                     for row in rows], ["case", "implementation", *shown])


def tables(rows: list[dict]) -> str:
    """All tables of a run."""
    last = latest(rows)
    timed, failed, checks = [r for r in last if "ms" in r], [r for r in last if "failed" in r], [r for r in last if "error_l2" in r]
    kinds = {kind: [r for r in timed if kind_of(r) == kind] for kind in dict.fromkeys(map(kind_of, timed))}
    out = []
    for kind, those in kinds.items():
        out += [f"**{kind}**", "", *pivot(those, f"ms / ms of {those[0]['against']}", ratio), ""]
    for kind in dict.fromkeys(map(kind_of, checks)):
        out += [f"**{kind}, relative error against float64**", "",
                *pivot([r for r in checks if kind_of(r) == kind], "norm of the error / norm", lambda r: f"{r['error_l2']:.1e}"), ""]
    for kind, those in kinds.items():
        out += [f"**{kind}, figures**", "", *figures([r for r in those if "kernel" not in r or r["impl"] == "ours"]), ""]
    if any("kernel" in r for r in timed):
        out += [*targets(rows), ""]
    out += dict.fromkeys(f"{r['device']}; {r['threads']} threads; torch {r['torch']}; transformers {r['transformers']}; "
                         f"commit {r['commit']}" for r in timed)
    out += [f"{r['impl']}: {number(r.get('tflops', r.get('gbps')))} {'TFLOP/s' if 'tflops' in r else 'GB/s'}"
            for r in rows if r.get("kernel") == "limits"]
    return "\n".join(out + [f"failed: {kind_of(some[0])} {line_of(some[0])}{f' and {len(some) - 1} more' * (len(some) > 1)}, {impl}: {why}"
                            for (impl, why), some in group(failed, "impl", "failed").items()])
