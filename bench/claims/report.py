"""results/claims/README.md and its figures, from the rows alone: for each claim the numbers and one sentence.

An interval is a 95% t-interval over seeds. A difference is paired: within one seed it is taken task by task and averaged over
the tasks, and the interval is over the seeds' means. "shown" is an interval above zero, "opposite" one below, else "not shown".
"""
import itertools
import math
from pathlib import Path
from statistics import correlation, mean

from bench.claims.plan import PROJECTIONS, SEEDS, UPGRADES
from rt import plot
from rt.config import UsageError
from rt.log import read_rows
from rt.plot import interval

Key = tuple[str, int]                               # task, seed


def shown(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    m, half = interval(values)
    return f"{m:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


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


def over_tasks(scores: dict[Key, float]) -> list[float]:
    """The mean over the tasks that all seeds have, a value a seed."""
    return per_seed(scores, dict.fromkeys(scores, 0.0))


def by_task(scores: dict[Key, float], task: str) -> list[float]:
    return [v for (t, _), v in sorted(scores.items()) if t == task]


class Section:
    """The text of one claim, and the differences that decide it."""

    def __init__(self):
        self.text, self.deciding = "", []

    def add(self, text: str) -> None:
        self.text += text

    def difference(self, name: str, values: list[float], decides: bool = False) -> None:
        """A line; `decides` makes it one of those that the claim is made of."""
        if decides:
            self.deciding.append((name, values))
        self.add(f"- {name}: {shown(values)}: **{verdict(values)}**\n" if values else "")

    def conclusion(self) -> str:
        """One word for the claim: every part shown, a part opposite, or neither."""
        words = [verdict(values) for _, values in self.deciding]
        if all(w == "shown" for w in words):
            return "shown"
        if "opposite" in words:
            return "opposite" if len(words) == 1 else f"opposite in part ({words.count('opposite')} of {len(words)} differences)"
        return f"not shown ({words.count('shown')} of {len(words)} differences shown)" if len(words) > 1 else "not shown"


def table_of_tasks(arms: dict[str, dict[Key, float]]) -> str:
    tasks = list(dict.fromkeys(t for scores in arms.values() for t, _ in scores))
    return markdown(["task", *arms], [[t, *(shown(by_task(scores, t)) for scores in arms.values())] for t in tasks])


def c1(r: Results, folder: Path, out: Section) -> None:
    """Compatibility."""
    bases = sorted({row["run"]["base"] for row in r.select(part="compatibility")}, key=lambda b: (b[:2], "-t" not in b, b))
    at = {base: r.tests(part="compatibility", base=base) for base in bases}
    if not at:
        return
    chance = {key(row): row["chance"] for row in r.select(part="compatibility", base="M0")}
    plot.compatibility(compatibility_rows(r), folder / f"{r.preset}-compatibility")
    out.add(table_of_tasks({"chance": chance, **at}) + f"\n![Delta_0 on later bases]({r.preset}-compatibility.png)\n\n")
    out.difference("apply on M1 above chance", per_seed(at["M1"], chance), True)
    out.difference("apply on M4 above chance", per_seed(at["M4"], chance))
    for snapshot in [b for b in at if "-t" in b][:1]:
        out.difference(f"lost from {snapshot} to M1 (falls with t)", per_seed(at[snapshot], at["M1"]), True)
    out.difference("lost from M1 to M4 (falls with the number of domains)", per_seed(at["M1"], at["M4"]), True)
    forgetting(r, at, out)


def forgetting(r: Results, at: dict[str, dict[Key, float]], out: Section) -> None:
    """Does apply follow how much of M0's own domain a base has forgotten?"""
    loss = {row["name"]: row["heldout"]["wiki"]["loss"] for row in r.select(part="bases", base="M0-M4")}
    both = [b for b in at if b in loss]
    if len(both) < 3:
        return
    score = {b: mean(at[b].values()) for b in both}
    out.add("\nApply against what each base has kept of M0's domain (held-out masked-LM loss on wiki), accuracy averaged over tasks and "
            "seeds:\n\n" + markdown(["", *both], [["apply", *(f"{score[b]:.3f}" for b in both)],
                                                   ["loss on wiki", *(f"{loss[b]:.3f}" for b in both)]])
            + f"\nTheir correlation is {correlation([score[b] for b in both], [loss[b] for b in both]):.2f} "
              f"({len(both)} bases of one lineage).\n")


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


def c2(r: Results, folder: Path, out: Section) -> None:
    """Linear mode connectivity."""
    found = r.select(part="connectivity")
    if not found:
        return
    barriers: dict[tuple[str, str], dict[Key, float]] = {}
    for row in found:
        barriers.setdefault((row["path"], row["run"]["base"]), {})[key(row)] = row["barrier"]
    drawn = [{"study": "connectivity", "task": row["run"]["task"], "kind": "full", "seed": row["run"]["seed"],
              "pair": f"M0-{row['run']['base']}", **{k: row[k] for k in ("path", "mu", "loss", "accuracy")}} for row in found]
    plot.connectivity(drawn, folder / f"{r.preset}-connectivity")
    arms = {f"M0-{base}" + ("" if path == "linear" else ", curve"): values for (path, base), values in barriers.items()}
    linear = {base: values for (path, base), values in barriers.items() if path == "linear"}
    out.add(f"Barrier of the test loss (nats):\n\n{table_of_tasks(arms)}\n![paths]({r.preset}-connectivity.png)\n\n")
    out.difference("barrier to IND above that to M1", per_seed(linear.get("IND", {}), linear.get("M1", {})), True)
    out.difference("barrier to M4 above that to M1", per_seed(linear.get("M4", {}), linear.get("M1", {})))


def c3(r: Results, folder: Path, out: Section) -> None:
    """Functional similarity."""
    def numbers(name: str) -> dict[str, dict[Key, float]]:
        return {base: {key(row): row[name] for row in r.select(part="similarity", base=base)} for base in (*UPGRADES, "IND")}

    share, own, other = numbers("share_own_best"), numbers("own"), numbers("best_other")
    if not share["M1"]:
        return
    lines = [[f"M0-{b}", *(shown(over_tasks(x[b])) for x in (share, own, other))] for b in share if share[b]]
    out.add(markdown(["pair", "share of heads whose best match is themselves", "divergence to the same head (nats)",
                      "to the best other head"], lines) + "\n")
    plot.head_similarity(heads_rows(r, r.tasks(part="similarity")[0], ("M1", "M4", "IND")), folder / f"{r.preset}-heads")
    out.add(f"![heads against heads, layers against layers]({r.preset}-heads.png)\n\n")
    out.difference("share, M1 above IND", per_seed(share["M1"], share["IND"]), True)
    out.difference("divergence to the same head, IND above M1", per_seed(own["IND"], own["M1"]), True)
    out.add(distance_table(r))


def heads_rows(r: Results, task: str, bases: tuple[str, ...]) -> list[dict]:
    """As rt.plot.head_similarity reads them."""
    return [{"task": task, "pair": f"M0-{base}", "heads": len(row["divergence"]) // (len(row["cka"]) - 1),
             **{k: row[k] for k in ("divergence", "cka", "share_own_best")}}
            for base in bases for row in r.select(part="similarity", task=task, base=base)]


def distance_table(r: Results) -> str:
    lines = []
    for base, of in itertools.product((*UPGRADES, "IND"), ("bases", "deltas")):
        found = [row for row in r.select(part="distance", base=base) if row["of"] == of and row["part"] == "all"]
        if found:
            numbers = ({key(row): row[k] for row in found} for k in ("l2_per_weight", "cosine"))
            lines.append([f"M0-{base}", of, *(shown(over_tasks(n), 4) for n in numbers)])
    return "\nDistances over all encoder weights:\n\n" + markdown(["pair", "of", "L2 per weight", "cosine"], lines) if lines else ""


def c4(r: Results, folder: Path, out: Section) -> None:
    """Init: how soon, how high, and from which task."""
    full = {what: r.tests(part="full", what=what) for what in ("scratch", "init", "init+distill")}
    if not full["init"]:
        return
    saved, lines = {}, []
    for task in r.tasks(part="full", what="init"):
        steps = {seed: steps_to_best(r, task, seed) for seed in SEEDS}
        saved |= {(task, seed): 1 - min(1.0, s[0] / s[1]) for seed, s in steps.items() if s}
        lines.append([task, *("-" if s is None else f"{s[0]:.0f} of {s[1]}" for s in steps.values())])
    out.add("All training examples, test accuracy on M1:\n\n" + table_of_tasks(full) + "\n")
    out.difference("init above scratch", per_seed(full["init"], full["scratch"]), True)
    out.add("\nFirst step at which init is as good on dev as scratch ever gets, of the steps that scratch took to get there "
            "(inf: never):\n\n" + markdown(["task", *(f"seed {s}" for s in SEEDS)], lines) + "\n")
    out.difference("share of scratch's steps saved", over_tasks(saved), True)
    order = {f"init, {near}": r.tests(part="transfer", what="init", near=near) for near in ("same", "similar", "different")}
    order["scratch"] = r.tests(part="transfer", what="scratch")
    if order["scratch"]:
        runs = [row["run"] for row in r.select(part="transfer") if row["run"]["near"] != "same"]
        pairs = ", ".join(dict.fromkeys(f"{run['task']}: {run['source']} {run['near']}" for run in runs))
        out.add("\n32 examples a label; init from the old delta of the same task, of a similar or a different one "
                f"({pairs}):\n\n{table_of_tasks(order)}\n")
    for a, b in zip(order, list(order)[1:]):
        out.difference(f"{a} above {b}", per_seed(order[a], order[b]), True)


def steps_to_best(r: Results, task: str, seed: int) -> tuple[float, int] | None:
    """(first evaluated step at which init's dev score is scratch's best or above, step of scratch's best)."""
    curves = {what: row["curve"] for what in ("scratch", "init") for row in r.select(part="full", what=what, task=task, seed=seed)
              if row["chosen"]}
    if len(curves) < 2:
        return None
    at, best = max(curves["scratch"], key=lambda point: point[1])
    return next((step for step, dev in curves["init"] if dev >= best), math.inf), max(at, 1)


def few(r: Results, kind: str) -> dict[str, dict[Key, float]]:
    return {what: r.tests(part="few", what=what, kind=kind, variant=None)
            for what in ("scratch", "apply", "init", "distill", "init+distill")}


def c5(r: Results, folder: Path, out: Section) -> None:
    """Few labels."""
    for kind in ("full", "adapter", "lora"):
        arms = few(r, kind)
        if arms["distill"]:
            out.add(f"32 examples a label, {kind} delta, test accuracy on M1:\n\n" + table_of_tasks(arms) + "\n")
            for arm in ("distill", "apply", "init", "init+distill"):
                out.difference(f"{kind}: {arm} above scratch", per_seed(arms[arm], arms["scratch"]), (kind, arm) == ("full", "distill"))
            out.add("\n")


def c6(r: Results, folder: Path, out: Section) -> None:
    """Both together, and what is beyond the paper."""
    for kind in ("full", "adapter", "lora"):
        arms = few(r, kind)
        for arm in ("distill", "init") if arms["init+distill"] else ():
            out.difference(f"{kind}, 32 a label: init+distill above {arm}", per_seed(arms["init+distill"], arms[arm]), kind == "full")
    full = {what: r.tests(part="full", what=what) for what in ("init", "init+distill")}
    out.difference("all examples: init+distill above init", per_seed(full["init+distill"], full["init"]))
    for variant, name in (("gamma", "attention-map distillation (gamma 1, all layers)"), ("itp", "interpolation distillation (K = 2)")):
        for what in ("distill", "init+distill"):
            beyond = r.tests(part="few", what=what, variant=variant)
            out.difference(f"{what} with {name} above {what}", per_seed(beyond, few(r, "full")[what]))
    chain_table(r, out)


def chain_table(r: Results, out: Section) -> None:
    lines, ends = [], {}
    modes = dict.fromkeys(row["run"]["what"] for row in r.select(part="chain"))
    for what, route in itertools.product(modes, ("chain", "direct")):
        found = [row for row in r.select(part="chain", what=what) if row["route"] == route and row["chosen"]]
        at = {b: {key(row): row["test"]["accuracy"] for row in found if row["at"] == b} for b in UPGRADES}
        ends[what, route] = at["M4"]
        lines.append([what, route, *(shown(over_tasks(at[b])) for b in UPGRADES)])
    if lines:
        out.add("\nChains, 32 examples a label, test accuracy averaged over " + ", ".join(r.tasks(part="chain")) + ":\n\n"
                + markdown(["mode", "route", *UPGRADES], lines) + "\n")
    for what in modes:
        out.difference(f"{what}: chain above direct on M4", per_seed(ends[what, "chain"], ends[what, "direct"]))


def c7(r: Results, folder: Path, out: Section) -> None:
    """Projection."""
    arms = {"apply": r.tests(part="project", what="apply"), "project": r.tests(part="project", what="project", variant=None),
            "project, residual": r.tests(part="project", what="project", variant="residual")}
    if arms["project"]:
        out.add("Learned on " + ", ".join(f"{' and '.join(s)} for {t}" for t, s in PROJECTIONS) + "; test accuracy on M1:\n\n"
                + table_of_tasks(arms) + "\n")
    out.difference("project above apply", per_seed(arms["project"], arms["apply"]), True)
    out.difference("project, residual, above apply", per_seed(arms["project, residual"], arms["apply"]))


CLAIMS = {
    "C1": ("apply is far above chance and falls with t and with the number of domains passed", c1),
    "C2": ("no deep valley on the linear path between continual neighbours; a deep one against IND", c2),
    "C3": ("attention maps of equal heads stay alike across upgrades, not against IND", c3),
    "C4": ("init reaches scratch's final score in a fraction of the steps and ends at least as high; same > similar > different", c4),
    "C5": ("distill beats scratch where labels are few", c5),
    "C6": ("init+distill is at least as good as either", c6),
    "C7": ("project, learned on one task, beats apply on another", c7)}


def write(folder: Path) -> str:
    """Write README.md and the figures; returns the summary. UsageError where there are no rows. What people have to say of a claim
    stands in remarks/PRESET-CLAIM.md and is put below its numbers."""
    presets = list(dict.fromkeys(path.name.split("-")[0] for path in sorted(folder.glob("*-*.jsonl"))))
    if not presets:
        raise UsageError(f"{folder}: no rows there; run python -m bench.claims --data DIR first")
    text, lines = [], []
    for preset in presets:
        r = Results(folder, preset)
        facts = {k: sorted({str(row[k]) for row in r.rows}) for k in ("device", "threads", "torch", "commit")}
        text.append(f"## Preset {preset}\n\n`python -m bench.claims --data DIR --preset {preset}`; {len(r.rows)} rows in "
                    f"`{preset}-*.jsonl`; " + "; ".join(f"{k} {', '.join(v)}" for k, v in facts.items()) + ".\n")
        for name, (claim, section) in CLAIMS.items():
            section(r, folder, out := Section())
            remark = folder / "remarks" / f"{preset}-{name}.md"
            said = "\n" + remark.read_text(encoding="utf-8") if remark.exists() else ""
            text.append(f"### {name}: {claim}\n\n{out.text or 'Not run yet.' + chr(10)}{said}")
            decided = "; ".join(f"{what} {shown(values)}" for what, values in out.deciding if values)
            lines.append([preset, f"{name}: {claim}", decided or "not run yet", out.conclusion() if decided else "-"])
    summary = markdown(["preset", "claim", "what decides it (mean ± 95% interval over seeds)", "here"], lines)
    head = f"# The claims of the paper, as they come out here\n\n{__doc__.split(chr(10) * 2)[1]}\n\n{summary}"
    (folder / "README.md").write_text("\n".join([head, *text]), encoding="utf-8")
    return summary
