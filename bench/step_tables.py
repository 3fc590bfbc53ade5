"""The rows of bench.train and bench.recycle as Markdown: ratios first, then what they are ratios of, then where it was."""

FACTS = ("size", "delta", "sequences", "tokens", "dropout")      # of a case, in a line of a table


def title(case: dict) -> str:
    """A case in words: numbers with their names."""
    return " ".join(f"{k} {v}" if isinstance(v, (int, float)) else str(v) for k, v in case.items() if k != "bench")


def markdown(rows: list[list], header: list[str]) -> list[str]:
    """First column left, the rest right."""
    cells = [header, [":--"] + ["--:"] * (len(header) - 1)] + [[str(c) for c in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def latest(rows: list[dict]) -> list[dict]:
    """One row an implementation of a case, the last one written; what failed once and then ran counts as having run."""
    found: dict[tuple, dict] = {}
    for row in rows:
        if "bench" in row:
            key = (*case_key(row), row["impl"])
            if "ms" in row or "ms" not in found.get(key, {}):
                found[key] = row
    return list(found.values())


def case_key(row: dict) -> tuple:
    """What tells its case from others: all that stands before the implementation."""
    return tuple(list(row.items())[:list(row).index("impl")])


def facts_of(row: dict) -> str:
    case = dict(case_key(row))
    named = {"sequences": "{} sequences", "tokens": "{} tokens", "dropout": "dropout {}"}
    return ", ".join(named.get(k, "{}").format(case[k]) for k in FACTS if k in case)


def number(x: float | None, digits: int = 3) -> str:
    """`digits` significant ones, without an exponent."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 10**(digits - 1) else f"{x:.{digits}g}"


def ratios(rows: list[dict]) -> list[str]:
    """A line a case, a column an implementation: its ms / those of the one it is held against."""
    names = list(dict.fromkeys(r["impl"] for r in rows if r["impl"] != r["against"]))
    lines = []
    for key in dict.fromkeys(map(case_key, rows)):
        here = {r["impl"]: r for r in rows if case_key(r) == key}
        line = [facts_of(next(iter(here.values())))]
        lines.append(line + [f"{here[n]['ratio']:.2f}" if "ratio" in here.get(n, {}) else "" for n in names])
    return markdown(lines, [f"ms / ms of {rows[0]['against']}", *names])


def figures(rows: list[dict]) -> list[str]:
    """A line an implementation of a case."""
    memory = [k for k in ("peak_mb", "saved_mb", "grads_mb", "state_mb") if any(k in r for r in rows)]
    lines = []
    for r in rows:
        spread = f"{r['ratio_p20']:.2f} to {r['ratio_p80']:.2f}" if "ratio" in r and r["impl"] != r["against"] else ""
        lines.append([facts_of(r), r["impl"], r["dtype"], number(r["ms"]), f"{number(r['p20'])} to {number(r['p80'])}", spread,
                      number(r["tokens_per_s"]), f"{100 * r['mfu']:.0f}" if "mfu" in r else "", *(number(r.get(k)) for k in memory)])
    return markdown(lines, ["case", "implementation", "dtype", "ms", "p20 to p80", "ratio p20 to p80", "tokens/s", "MFU %",
                            *(k.replace("_mb", " MiB") for k in memory)])


def tables(rows: list[dict]) -> str:
    """All of a file's tables."""
    last = latest(rows)
    timed, failed = ([r for r in last if k in r] for k in ("ms", "failed"))
    kinds = list(dict.fromkeys(r["case"] for r in timed))
    out = []
    for kind in kinds:
        out += [f"**{kind}**", "", *ratios([r for r in timed if r["case"] == kind]), ""]
    for kind in kinds:
        out += [f"**{kind}, figures**", "", *figures([r for r in timed if r["case"] == kind]), ""]
    limits = [f"{r['impl']}: {r['tflops']:.3g} TFLOP/s" for r in rows if r.get("kernel") == "limits"]
    machines = dict.fromkeys(f"{r['device']}; {r['threads']} threads; torch {r['torch']}; transformers {r['transformers']}; commit "
                             f"{r['commit']}" for r in timed)
    out += [*machines, *limits, *(f"failed: {facts_of(r)}, {r['impl']}: {r['failed']}" for r in failed)]
    return "\n".join(out)
