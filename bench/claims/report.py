"""results/claims/README.md and its figures, from the rows alone: for each claim the numbers and one sentence.

An interval is a 95% t-interval over seeds. A difference is paired: within one seed it is taken task by task and averaged over
the tasks, and the interval is over the seeds' means. "shown" is an interval above zero, "opposite" one below, else "not shown".
"""
import math
from pathlib import Path
from statistics import mean, stdev

from bench.claims.plan import SEEDS, TRANSFERS, UPGRADES
from rt import plot
from rt.config import UsageError
from rt.log import read_rows

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}     # Student's t, two-sided, by number of values
Key = tuple[str, int]                               # task, seed


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (infinite for one value)."""
    half = T95.get(len(values), 2.0) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean(values), half


def shown(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    m, half = interval(values)
    return f"{m:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def verdict(values: list[float]) -> str:
    if len(values) < 2:
        return "not measured with enough seeds"
    m, half = interval(values)
    return "shown" if m - half > 0 else "opposite" if m + half < 0 else "not shown"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *rows)) + "\n"


def key(row: dict) -> Key:
    return row["run"]["task"], row["run"]["seed"]


class Results:
    """The rows of one preset, looked up by their facts."""

    def __init__(self, folder: Path, preset: str):
        self.preset = preset
        self.rows = [row for path in sorted(folder.glob(f"{preset}-*.jsonl")) for row in read_rows(path)]

    def select(self, **facts) -> list[dict]:
        """Rows whose run has these facts; None is the absence of one."""
        return [row for row in self.rows if all(row["run"].get(k) == v for k, v in facts.items())]

    def tests(self, metric: str = "accuracy", **facts) -> dict[Key, float]:
        """Test score of the chosen rows by (task, seed)."""
        return {key(row): row["test"][metric] for row in self.select(**facts)
                if row.get("chosen") and row.get("test")}

    def tasks(self, **facts) -> list[str]:
        return list(dict.fromkeys(row["run"]["task"] for row in self.select(**facts)))


def per_seed(a: dict[Key, float], b: dict[Key, float]) -> list[float]:
    """a - b averaged over the tasks that all seeds have, a value a seed."""
    both = a.keys() & b.keys()
    seeds = sorted({seed for _, seed in both})
    tasks = [t for t in sorted({t for t, _ in both}) if all((t, s) in both for s in seeds)]
    return [mean(a[t, s] - b[t, s] for t in tasks) for s in seeds] if tasks else []


def by_task(scores: dict[Key, float], task: str) -> list[float]:
    return [v for (t, _), v in sorted(scores.items()) if t == task]


def difference(name: str, values: list[float]) -> str:
    return f"- {name}: {shown(values)}: **{verdict(values)}**\n"


def table_of_tasks(arms: dict[str, dict[Key, float]]) -> str:
    tasks = list(dict.fromkeys(t for scores in arms.values() for t, _ in scores))
    return markdown(["task", *arms], [[t, *(shown(by_task(scores, t)) for scores in arms.values())] for t in tasks])


def c1(r: Results, folder: Path) -> str:
    """Compatibility."""
    at = {base: r.tests(part="compatibility", base=base) for base in
          dict.fromkeys(row["run"]["base"] for row in r.select(part="compatibility"))}
    if not at:
        return ""
    chance = {key(row): row["chance"] for row in r.select(part="compatibility", base="M0")}
    snapshots = [b for b in at if "-t" in b]
    plot.compatibility(compatibility_rows(r), folder / f"{r.preset}-compatibility")
    return "".join((
        table_of_tasks({"chance": chance, **at}),
        f"\n![Delta_0 on later bases]({r.preset}-compatibility.png)\n\n",
        difference("apply on M1 above chance", per_seed(at["M1"], chance)),
        difference("apply on M4 above chance", per_seed(at["M4"], chance)),
        difference("loss from M1 to M4 (falls with the number of domains)", per_seed(at["M1"], at["M4"])),
        difference(f"loss from {snapshots[0]} to M1 (falls with t)", per_seed(at[snapshots[0]], at["M1"])) if snapshots else ""))


def compatibility_rows(r: Results) -> list[dict]:
    """As rt.plot.compatibility reads them."""
    rows = []
    for row in r.select(part="compatibility"):
        f, base = row["run"], row["run"]["base"]
        stage, _, t = base.partition("-t")
        same = {"study": "compatibility", "task": f["task"], "kind": f["kind"], "seed": f["seed"], "base": base,
                "stage": int(stage[1:]), "t": int(t) if t else None}
        rows.append(same | {"line": "apply", "accuracy": row["test"]["accuracy"]})
        if base == "M0":
            rows += [same | {"line": "own", "accuracy": row["test"]["accuracy"]},
                     same | {"line": "chance", "accuracy": row["chance"], "uniform": row["uniform"]}]
    for base in UPGRADES:
        rows += [{"study": "compatibility", "task": t, "kind": "full", "seed": s, "base": base, "stage": int(base[1:]), "t": None,
                  "line": "tuned", "accuracy": a} for (t, s), a in r.tests(part="tuned", base=base, kind="full").items()]
    return rows


def c2(r: Results, folder: Path) -> str:
    """Linear mode connectivity."""
    found = r.select(part="connectivity")
    if not found:
        return ""
    barriers = {}
    for row in found:
        barriers.setdefault((row["path"], row["run"]["base"]), {})[key(row)] = row["barrier"]
    drawn = [{"study": "connectivity", "task": row["run"]["task"], "kind": "full", "seed": row["run"]["seed"],
              "pair": f"M0-{row['run']['base']}", **{k: row[k] for k in ("path", "mu", "loss", "accuracy")}} for row in found]
    plot.connectivity(drawn, folder / f"{r.preset}-connectivity")
    arms = {f"M0-{base}" + ("" if path == "linear" else ", curve"): values for (path, base), values in barriers.items()}
    linear = {base: values for (path, base), values in barriers.items() if path == "linear"}
    return "".join((
        "Barrier of the test loss (nats):\n\n", table_of_tasks(arms), f"\n![paths]({r.preset}-connectivity.png)\n\n",
        difference("barrier to IND above that to M1", per_seed(linear.get("IND", {}), linear.get("M1", {}))),
        difference("barrier to M4 above that to M1", per_seed(linear.get("M4", {}), linear.get("M1", {})))))


def c3(r: Results, folder: Path) -> str:
    """Functional similarity."""
    def numbers(name: str) -> dict[str, dict[Key, float]]:
        return {base: {key(row): row[name] for row in r.select(part="similarity", base=base)} for base in (*UPGRADES, "IND")}

    share, own, other = numbers("share_own_best"), numbers("own"), numbers("best_other")
    if not share["M1"]:
        return ""
    lines = [[f"M0-{b}", *(shown(list(x[b].values())) for x in (share, own, other))] for b in share if share[b]]
    return "".join((
        markdown(["pair", "share of heads whose best match is themselves", "divergence to the same head (nats)",
                  "to the best other head"], lines), "\n",
        difference("share, M1 above IND", per_seed(share["M1"], share["IND"])),
        difference("divergence to the same head, IND above M1", per_seed(own["IND"], own["M1"])),
        distance_table(r)))


def distance_table(r: Results) -> str:
    lines = []
    for base in (*UPGRADES, "IND"):
        for of in ("bases", "deltas"):
            found = [row for row in r.select(part="distance", base=base) if row["of"] == of and row["part"] == "all"]
            if found:
                lines.append([f"M0-{base}", of, *(shown([row[k] for row in found], 4) for k in ("l2_per_weight", "cosine"))])
    return "\nDistances over all encoder weights:\n\n" + markdown(["pair", "of", "L2 per weight", "cosine"], lines) if lines else ""


def c4(r: Results, folder: Path) -> str:
    """Init: how soon, how high, and from which task."""
    full = {what: r.tests(part="full", what=what) for what in ("scratch", "init", "init+distill")}
    if not full["init"]:
        return ""
    lines = []
    for task in r.tasks(part="full", what="init"):
        reached = [steps_to_best(r, task, seed) for seed in SEEDS]
        lines.append([task, " ".join("-" if s is None else str(s) for s in reached)])
    order = {near: r.tests(part="transfer", what="init", near=near) for near in ("same", "similar", "different")}
    order["scratch"] = r.tests(part="transfer", what="scratch")
    text = "".join((
        "All training examples, test accuracy on M1:\n\n", table_of_tasks(full), "\n",
        difference("init above scratch", per_seed(full["init"], full["scratch"])),
        "\nFirst step at which init is as good on dev as scratch gets in all its steps (one figure a seed; -: never):\n\n",
        markdown(["task", "step"], lines)))
    if order["same"]:
        text += "\n32 examples a label; the old delta's task (" + ", ".join(f"{t}: {s} {n}" for t, s, n in TRANSFERS) + "):\n\n"
        text += table_of_tasks({f"init, {k}" if k != "scratch" else k: v for k, v in order.items()}) + "\n"
        for a, b in (("same", "similar"), ("similar", "different"), ("different", "scratch")):
            text += difference(f"{a} above {b}", per_seed(order[a], order[b]))
    return text


def steps_to_best(r: Results, task: str, seed: int) -> int | None:
    """The first evaluated step at which init's dev score is scratch's best or above."""
    curves = {what: row["curve"] for what in ("scratch", "init") for row in r.select(part="full", what=what, task=task, seed=seed)
              if row["chosen"]}
    if len(curves) < 2:
        return None
    best = max(dev for _, dev in curves["scratch"])
    return next((step for step, dev in curves["init"] if dev >= best), None)


def few(r: Results, kind: str) -> dict[str, dict[Key, float]]:
    return {what: r.tests(part="few", what=what, kind=kind, variant=None)
            for what in ("scratch", "apply", "init", "distill", "init+distill")}


def c5(r: Results, folder: Path) -> str:
    """Few labels."""
    text = ""
    for kind in ("full", "adapter", "lora"):
        arms = few(r, kind)
        if arms["distill"]:
            text += f"32 examples a label, {kind} delta, test accuracy on M1:\n\n" + table_of_tasks(arms) + "\n"
            for arm in ("distill", "apply", "init", "init+distill"):
                text += difference(f"{kind}: {arm} above scratch", per_seed(arms[arm], arms["scratch"]))
            text += "\n"
    return text


def c6(r: Results, folder: Path) -> str:
    """Both together, and what is beyond the paper."""
    text = ""
    for kind in ("full", "adapter", "lora"):
        arms = few(r, kind)
        if arms["init+distill"]:
            text += difference(f"{kind}, 32 a label: init+distill above distill", per_seed(arms["init+distill"], arms["distill"]))
            text += difference(f"{kind}, 32 a label: init+distill above init", per_seed(arms["init+distill"], arms["init"]))
    if r.tests(part="full", what="init+distill"):
        text += difference("full data: init+distill above init",
                           per_seed(r.tests(part="full", what="init+distill"), r.tests(part="full", what="init")))
    for variant, name in (("gamma", "attention-map distillation (gamma 1, all layers)"), ("itp", "interpolation distillation (K = 2)")):
        for what in ("distill", "init+distill"):
            beyond = r.tests(part="few", what=what, variant=variant)
            if beyond:
                text += difference(f"{what} with {name} above {what}", per_seed(beyond, few(r, "full")[what]))
    return text + chain_table(r)


def chain_table(r: Results) -> str:
    lines, text = [], ""
    for what in dict.fromkeys(row["run"]["what"] for row in r.select(part="chain")):
        ends = {}
        for route in ("chain", "direct"):
            found = [row for row in r.select(part="chain", what=what) if row["route"] == route and row["chosen"]]
            at = {b: {key(row): row["test"]["accuracy"] for row in found if row["at"] == b} for b in UPGRADES}
            ends[route] = at["M4"]
            if found:
                lines.append([what, route, *(shown(per_seed(at[b], dict.fromkeys(at[b], 0.0))) for b in UPGRADES)])
        text += difference(f"{what}: chain above direct on M4", per_seed(ends["chain"], ends["direct"])) if ends["chain"] else ""
    header = "\nChains, 32 examples a label, test accuracy averaged over " + ", ".join(r.tasks(part="chain")) + ":\n\n"
    return header + markdown(["mode", "route", *UPGRADES], lines) + "\n" + text if lines else ""


def c7(r: Results, folder: Path) -> str:
    """Projection."""
    arms = {"apply": r.tests(part="project", what="apply"), "project": r.tests(part="project", what="project", variant=None),
            "project, residual": r.tests(part="project", what="project", variant="residual")}
    if not arms["project"]:
        return ""
    return table_of_tasks(arms) + "\n" + "".join(
        difference(f"{arm} above apply", per_seed(arms[arm], arms["apply"])) for arm in list(arms)[1:])


CLAIMS = {
    "C1": ("apply is far above chance and falls with t and with the number of domains passed", c1),
    "C2": ("no deep valley on the linear path between continual neighbours; a deep one against IND", c2),
    "C3": ("attention maps of equal heads stay alike across upgrades, not against IND", c3),
    "C4": ("init reaches scratch's final score in a fraction of the steps and ends at least as high; same > similar > different", c4),
    "C5": ("distill beats scratch where labels are few", c5),
    "C6": ("init+distill is at least as good as either", c6),
    "C7": ("project, learned on one task, beats apply on another", c7)}


def write(folder: Path) -> str:
    """Write README.md and the figures; returns what was written where. UsageError where there are no rows."""
    presets = list(dict.fromkeys(path.name.split("-")[0] for path in sorted(folder.glob("*-*.jsonl"))))
    if not presets:
        raise UsageError(f"{folder}: no rows there; run python -m bench.claims --data DIR first")
    text = ["# The claims of the paper, as they come out here\n", __doc__.split("\n\n")[1] + "\n"]
    remarks = folder / "remarks"
    for preset in presets:
        r = Results(folder, preset)
        facts = {k: sorted({str(row[k]) for row in r.rows}) for k in ("device", "commit", "torch", "threads")}
        text.append(f"## Preset {preset}\n\n`python -m bench.claims --data DIR --preset {preset}`; "
                    + "; ".join(f"{k} {', '.join(v)}" for k, v in facts.items()) + f"; {len(r.rows)} rows in `{preset}-*.jsonl`.\n")
        for name, (claim, section) in CLAIMS.items():
            body = section(r, folder)
            remark = remarks / f"{preset}-{name}.md"
            said = "\n" + remark.read_text(encoding="utf-8") if remark.exists() else ""
            text.append(f"### {name}: {claim}\n\n{body or 'Not run yet.' + chr(10)}{said}")
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")
    return f"{folder / 'README.md'}: {', '.join(presets)}"
