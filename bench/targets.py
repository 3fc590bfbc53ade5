"""The targets of the kernels: how many times better than a peer a kernel should be, in every case of a target."""
import math
from fnmatch import fnmatch
from typing import NamedTuple

S512, BIG_KD = {"S": (512,), "D": (64,), "ragged": (False,), "dropout": (0.0,)}, {"N": (4096, 16384)}
DROPOUT, RAGGED, CLASS_HEAD = S512 | {"dropout": (0.1,)}, S512 | {"ragged": (True,)}, {"C": (3, 20, 1000)}
LEVELS = ("floor", "aim", "stretch")


class Target(NamedTuple):
    """A comparison on some cases with the best of some peers ("copy": the machine's copy rate; "dropout 0": ours without dropout)."""
    what: str
    kernel: str
    cases: dict[str, tuple]
    peer: str                                   # a pattern of names; the best of them counts
    levels: tuple[float | None, ...]            # floor, aim, stretch; None: no such level
    which: str = "both"                         # pass
    field: str = "ms"
    ours: str = "ours"


TARGETS = [Target(*fields) for fields in (
    ("attention forward / best SDPA", "attention", S512, "sdpa*", (0.9, 1.0, 1.1), "forward"),
    ("attention backward / best SDPA", "attention", S512, "sdpa*", (0.7, 0.85, 1.0), "backward"),
    ("attention both / flash", "attention", S512, "sdpa flash", (1.0, 1.2, 1.33)),
    ("attention both / cuDNN", "attention", S512, "sdpa cudnn", (0.78, 0.9, 1.0)),
    ("attention both, dropout / best SDPA", "attention", DROPOUT, "sdpa*", (0.8, 1.0, 1.25)),
    ("without dropout / with it", "attention", DROPOUT, "dropout 0", (None, 0.83, None)),
    ("ragged both / padded SDPA with mask", "attention", RAGGED, "sdpa*", (2.0, 3.0, 4.0)),
    ("ragged both / flash varlen", "attention", RAGGED, "flash varlen", (0.9, 1.0, 1.15)),
    ("linear_kd / eager fp32", "linear_kd", BIG_KD, "eager", (2.0, 3.0, 3.5)),
    ("linear_kd memory / eager fp32", "linear_kd", BIG_KD, "eager", (4.0, 8.0, 16.0), "both", "peak_mb"),
    ("linear_kd / torch.compile", "linear_kd", BIG_KD, "compile", (1.2, 1.5, 2.0)),
    ("linear_kd / Liger JSD", "linear_kd", BIG_KD, "liger jsd*", (2.0, 4.0, 8.0)),
    ("linear_kd / Liger chunked", "linear_kd", BIG_KD, "liger chunked", (1.0, 1.3, 1.6)),
    ("linear_kd, share of 4-GEMM bound", "linear_kd", BIG_KD, "gemm bound", (0.45, 0.65, 0.75)),
    ("kd_loss, share of copy bandwidth", "kd_loss", {"C": (50265, 50304)}, "copy", (0.65, 0.8, 0.9), "both", "gbps"),
    ("class-head kd_loss / eager", "kd_loss", CLASS_HEAD, "eager", (3.0, 6.0, None)),
    ("class-head kd_loss in a CUDA graph / eager", "kd_loss", CLASS_HEAD, "eager", (None, None, 10.0), "both", "ms", "ours graph"),
    ("class-head kd_loss / torch.compile", "kd_loss", CLASS_HEAD, "compile", (1.0, 1.5, None)),
    ("linear_kd gradient error, eager fp32", "linear_kd", {}, "eager fp32 gemm KL only", (0.99, None, None), "check backward", "error_l2",
     "ours KL only"),
    ("linear_kd gradient error, Liger", "linear_kd", {}, "liger jsd*", (None, 2.0, None), "check backward", "error_l2", "ours KL only"),
)]


def measured(rows: list[dict], target: Target) -> list[float]:
    """How many times better than the best peer ours is, for every case of the target that has both."""
    found, field = [], target.field
    rows = [r for r in rows if r.get(field) is not None]
    for ours in (r for r in rows if r.get("impl") == target.ours and r["kernel"] == target.kernel and r.get("pass") == target.which):
        if any(ours[k] not in values for k, values in target.cases.items()):
            continue
        if target.peer == "copy":
            found += [ours[field] / r[field] for r in rows if r.get("impl") == "copy"][-1:]
            continue
        case, peer = dict(list(ours.items())[:list(ours).index("impl")]), target.peer
        if peer == "dropout 0":
            case, peer = case | {"dropout": 0.0}, "ours"
        peers = [r[field] for r in rows if fnmatch(r["impl"], peer) and r.get("pass") == target.which and case.items() <= r.items()]
        found += [min(peers) / ours[field]] if peers else []
    return found


def reached(value: float, levels: tuple[float | None, ...]) -> str:
    """The highest level reached: missed, floor, aim or stretch."""
    return next((name for name, bar in reversed([*zip(LEVELS, levels)]) if bar is not None and value >= bar), "missed")


def targets(rows: list[dict]) -> list[str]:
    """A line per target: the worst and the best case, the levels, and the level that the worst case reaches."""
    cuda = any(r.get("gpu") for r in rows)
    out = [f"{'target (times better; worst and best case)':43} {'worst':>7} {'best':>7} {'floor':>6} {'aim':>6} {'stretch':>7}"]
    for target in TARGETS:
        found = measured(rows, target) if cuda else []
        worst = min(found, key=lambda x: -math.inf if math.isnan(x) else x, default=math.nan)
        shown = f"{worst:7.2f} {max(found):7.2f}" if found else f"{'-':>7} {'-':>7}"
        mark = reached(worst, target.levels) if found else "not measured" if cuda else "needs a GPU"
        out.append(f"{target.what:43} {shown} " + " ".join(f"{'-' if bar is None else bar:>6}" for bar in target.levels) + f"  {mark}")
    return out
