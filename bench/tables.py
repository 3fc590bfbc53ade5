"""The rows that bench.kernels writes, read: what a case is called, a line a case, and the targets with what was reached."""
import math
import textwrap
from pathlib import Path

from rt.formats.files import read_rows

CASE_FIELDS = ("kernel", "tokens", "S", "H", "D", "ragged", "dropout", "R", "C", "k", "B", "L", "N", "V", "d")


def case_of(row: dict) -> dict:
    return {k: row[k] for k in CASE_FIELDS if k in row}


def read(path: str) -> list[dict]:
    """The last run in a file; one that was resumed is one run."""
    rows = read_rows(Path(path))
    starts = [i for i, row in enumerate(rows) if row.get("kernel") == "environment" and "--resume" not in row["argv"]]
    return rows[starts[-1] if starts else 0:]


def label(case: dict) -> str:
    if "tokens" in case:
        kind = ("ragged" if case["ragged"] else "dense") + (f" p{case['dropout']}" if case["dropout"] else "")
        return f"{'att' if case['kernel'] == 'attention' else 'att_kd'} {case['tokens']} S{case['S']} D{case['D']} {kind}"
    return " ".join([{"linear_cross_entropy": "linear_ce"}.get(case["kernel"], case["kernel"]),
                     *(f"{k}{v}" for k, v in case.items() if k != "kernel" and v)])


def is_peer(name: str) -> bool:
    return not name.startswith(("ours", "reference", "gemm", "inputs")) and not name.endswith("graph")


def compact(rows: list[dict], most: int = 60) -> list[str]:
    """A line a case: for each pass our ms, our rate, and the best peer's ms / ours with its name. Where lines must go, winners go."""
    out = [f"{'case':31}" + "".join(f"|{p + ' ms':>11} rate ratio {'peer':9}" for p in ("forward", "backward", "both"))]
    lines, losing = [], set()
    timed = [r for r in rows if "ms" in r and r["kernel"] != "limits"]
    for key in dict.fromkeys(tuple(case_of(r).items()) for r in rows if r.get("impl") == "ours" and not r["pass"].startswith("check")):
        text = f"{label(dict(key)):31}"
        for which in ("forward", "backward", "both"):
            here = [r for r in timed if tuple(case_of(r).items()) == key and r["pass"] == which]
            ours = next((r for r in reversed(here) if r["impl"] == "ours"), None)
            if ours is None:
                text += f"|{'failed':>11} {'':20}"
                continue
            best = min((r for r in here if is_peer(r["impl"])), key=lambda r: r["ms"], default=None)
            rate = ours.get("tflops", ours.get("gbps"))
            ratio, name = (f"{best['ms'] / ours['ms']:.2f}", best["impl"].removeprefix("sdpa ")[:9]) if best else ("-", "")
            text += f"|{ours['ms']:11.4f}{'' if rate is None else format(rate, '.0f'):>5} {ratio:>5} {name:9}"
            if best and best["ms"] < ours["ms"]:
                losing.add(len(lines))
        lines.append(text)
    room = most - 2
    kept = sorted(sorted(range(len(lines)), key=lambda i: (i not in losing, i))[:room])
    out += [lines[i].rstrip() for i in kept]
    return out + ([f"... and {len(lines) - len(kept)} more in the file"] if len(kept) < len(lines) else [])


def errors(rows: list[dict]) -> list[str]:
    """Of each checked case the gradient's relative error against float64, of every implementation."""
    found = {}
    for row in rows:
        if row.get("pass") == "check backward" and "error_l2" in row:
            found.setdefault(label(case_of(row)), {})[row["impl"]] = row["error_l2"]
    return [line for name, by in found.items() for line in textwrap.wrap(
        f"{name}: " + ", ".join(f"{impl.removeprefix('sdpa ')} {e:.1e}" for impl, e in by.items()), 139, subsequent_indent="    ")]


S512, BIG_KD = {"S": 512, "D": 64, "ragged": False, "dropout": 0.0}, {"N": (4096, 16384)}
RAGGED, CLASS_HEAD = S512 | {"ragged": True}, {"C": (3, 20, 1000)}
TARGETS = [     # what, kernel, cases, pass, field, against what, floor, aim, stretch; None: no such level
    ("attention forward / best SDPA", "attention", S512, "forward", "ms", "sdpa", 0.9, 1.0, 1.1),
    ("attention backward / best SDPA", "attention", S512, "backward", "ms", "sdpa", 0.7, 0.85, 1.0),
    ("attention both / flash", "attention", S512, "both", "ms", "sdpa flash", 1.0, 1.2, 1.33),
    ("attention both / cuDNN", "attention", S512, "both", "ms", "sdpa cudnn", 0.78, 0.9, 1.0),
    ("attention both, dropout / best SDPA", "attention", S512 | {"dropout": 0.1}, "both", "ms", "sdpa", 0.8, 1.0, 1.25),
    ("  without dropout / with it", "attention", S512 | {"dropout": 0.1}, "both", "ms", "dropout 0", None, 0.83, None),
    ("ragged both / padded SDPA with mask", "attention", RAGGED, "both", "ms", "sdpa", 2.0, 3.0, 4.0),
    ("ragged both / flash varlen", "attention", RAGGED, "both", "ms", "flash varlen", 0.9, 1.0, 1.15),
    ("linear_kd / eager fp32", "linear_kd", BIG_KD, "both", "ms", "eager", 2.0, 3.0, 3.5),
    ("  its memory", "linear_kd", BIG_KD, "both", "peak_mb", "eager", 4.0, 8.0, 16.0),
    ("linear_kd / torch.compile", "linear_kd", BIG_KD, "both", "ms", "compile", 1.2, 1.5, 2.0),
    ("linear_kd / Liger JSD", "linear_kd", BIG_KD, "both", "ms", "liger jsd", 2.0, 4.0, 8.0),
    ("linear_kd / Liger chunked", "linear_kd", BIG_KD, "both", "ms", "liger chunked", 1.0, 1.3, 1.6),
    ("linear_kd, share of 4-GEMM bound", "linear_kd", BIG_KD, "both", "ms", "gemm bound", 0.45, 0.65, 0.75),
    ("kd_loss, share of copy bandwidth", "kd_loss", {"C": (50265, 50304), "k": 0}, "both", "gbps", "copy", 0.65, 0.8, 0.9),
    ("class-head kd_loss / eager", "kd_loss", CLASS_HEAD, "both", "ms", "eager", 3.0, 6.0, None),
    ("  ours in a CUDA graph / eager", "kd_loss", CLASS_HEAD, "both", "ms", "eager to graph", None, None, 10.0),
    ("class-head kd_loss / torch.compile", "kd_loss", CLASS_HEAD, "both", "ms", "compile", 1.0, 1.5, None),
    ("linear_kd gradient error, eager fp32", "linear_kd", {}, "check backward", "error_l2", "eager fp32 gemm KL only", 0.99, None, None),
    ("linear_kd gradient error, Liger", "linear_kd", {}, "check backward", "error_l2", "liger jsd", None, 2.0, None),
]


def matches(row: dict, kernel: str, where: dict, which: str) -> bool:
    return row["kernel"] == kernel and row.get("pass") == which and all(
        row.get(k) in v if isinstance(v, tuple) else row.get(k) == v for k, v in where.items())


def measured(rows: list[dict], kernel: str, where: dict, which: str, field: str, against: str) -> list[float]:
    """Of every case that fits, how many times better than what it is held against."""
    out = []
    ours_name = {"eager to graph": "ours graph"}.get(against, "ours KL only" if field == "error_l2" else "ours")
    for ours in (r for r in rows if r.get("impl") == ours_name and r.get(field) and matches(r, kernel, where, which)):
        case = case_of(ours)
        if against == "copy":
            out += [ours[field] / r[field] for r in rows if r.get("impl") == "copy"][-1:]
            continue
        if against == "dropout 0":
            peers = [r for r in rows if r.get("impl") == "ours" and case_of(r) == case | {"dropout": 0.0}]
        elif against.startswith("eager"):
            peers = [r for r in rows if r.get("impl") == against.removesuffix(" to graph") and case_of(r) == case]
        else:
            peers = [r for r in rows if r.get("impl", "").startswith(against) and case_of(r) == case]
        values = [r[field] for r in peers if r["pass"] == which and r.get(field) is not None]
        out += [min(values) / ours[field]] if values else []
    return out


def mark(value: float, levels: dict[str, float | None]) -> str:
    """The highest level reached: missed, floor, aim or stretch."""
    return next((name for name, bar in reversed(levels.items()) if bar is not None and value >= bar), "missed")


def targets(rows: list[dict]) -> list[str]:
    """A line a target: the worst and the best case, the bars, and what the worst reaches."""
    cuda = any(r.get("gpu") for r in rows)
    out = [f"{'target (times better; worst and best case)':43} {'worst':>7} {'best':>7} {'floor':>6} {'aim':>6} {'stretch':>7}"]
    for what, kernel, where, which, field, against, *bars in TARGETS:
        found = measured(rows, kernel, where, which, field, against) if cuda else []
        worst = min(found, key=lambda x: -math.inf if math.isnan(x) else x, default=math.nan)
        shown = f"{worst:7.2f} {max(found):7.2f}" if found else f"{'-':>7} {'-':>7}"
        reached = mark(worst, dict(zip(("floor", "aim", "stretch"), bars))) if found else "not measured" if cuda else "needs a GPU"
        out.append(f"{what:43} {shown} " + " ".join(f"{'-' if bar is None else bar:>6}" for bar in bars) + f"  {reached}")
    return out


def print_tables(rows: list[dict]) -> None:
    machine = next((r for r in rows if r["kernel"] == "environment"), {})
    limits = [f"{r['impl']} {r.get('tflops', r.get('gbps')):.4g} {'TFLOP/s' if 'tflops' in r else 'GB/s'}"
              for r in rows if r["kernel"] == "limits"]
    about = [str(machine[k]) for k in ("gpu", "torch", "triton", "driver_version", "commit", "date") if machine.get(k)]
    failures = f"{sum('failed' in r for r in rows)} rows say in `failed` why they could not run"
    print("\n".join(["gradients against float64, relative error", *errors(rows), "", *compact(rows), "", *targets(rows), "",
                     " | ".join(about + limits), failures]))
