"""results/claims/README.md and its figures, from the rows alone: the numbers and one sentence per claim.

The same claims on two bases: MiniLM, which was really pre-trained (mean [95 % bootstrap interval]), and a base of the mini preset (mean ±
95 % t-interval over seeds), which is weak and was studied first, without a plan of its tests. "shown": the number is above zero (for "at
least as good": above -.01), on MiniLM by its interval and its p after Holm, on mini by its interval alone, without a correction for the
number of tests; "opposite": it is below; "not shown": neither.
"""
import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import correlation, mean

from experiments.claims import minilm_report
from experiments.claims.minilm_report import NOT_RUN, less
from experiments.claims.plan import SCALES, SEEDS, UPGRADES, phases
from experiments.claims.rows import Key, Rows, by_task, conclusion, key, over_tasks, per_seed, shown, verdict
from experiments.common import markdown, steps_to_best
from rt.errors import InputError
from rt.report import figures

AS_GOOD = 0.01      # how far below zero an interval may reach if the claim is "at least as good"
GAIN = 0.03         # accuracy above chance from which a delta counts as learned
KINDS = ("full", "adapter", "lora")
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
INTERVALS = """An interval is a 95% t-interval over seeds of tuning: of the few-shot sample, fresh weights, data order and dropout. There
is one lineage of bases and one independent base, so no interval covers the variation between pre-training runs. A difference is paired:
within one seed (equal fresh heads and data order) it is taken task by task and averaged over the tasks, and the interval is over the
seeds. "shown" means that the interval is above zero (for "at least as good": above -.01), "opposite" that it is below, "not shown"
neither. 32 examples a label are what the new base gets; the old delta saw the whole training set. IND had as many steps as all stages
together, on all domains, under one schedule."""
CROSSED = """The numbers that decide the claims, here by the test of MiniLM's section, which was chosen long after these rows; no other
table uses it for mini. A cell is a task with a seed; the bootstrap is crossed over tasks and seeds; p is exact sign-flip over cells; Holm's
is over all these lines."""


class Section:
    """The text of one claim, and the differences that decide it, with their cells and margins."""

    def __init__(self):
        self.text, self.deciding, self.cells = "", [], {}

    def add(self, text: str) -> None:
        self.text += text

    def difference(self, name: str, a: dict[Key, float], b: dict[Key, float] | None = None, decides: bool = False,
                   margin: float = 0.0) -> None:
        """Add a line on a - b (without b, on a); `decides` makes it one of the parts of the claim."""
        b = dict.fromkeys(a, 0.0) if b is None else b
        values = per_seed(a, b)
        if decides:
            self.deciding.append((name, values, verdict(values, margin)))
            self.cells[name] = less(a, b), margin
        if values:
            self.add(f"- {name}: {shown(values)} ({len(values)} seeds, {values.tasks} tasks): **{verdict(values, margin)}**\n")


# ---------------------------------------------------------------- sections

def table_of_tasks(arms: dict[str, dict[Key, float]]) -> str:
    tasks = list(dict.fromkeys(t for scores in arms.values() for t, _ in scores))
    return markdown(["task", *arms], [[t, *(shown(by_task(scores, t)) for scores in arms.values())] for t in tasks]) + "\n"


def c1(r: Rows, folder: Path, out: Section) -> None:
    """Compatibility."""
    bases = sorted({row["run"]["base"] for row in r.select(part="compatibility")}, key=lambda b: (b[:2], "-t" not in b, b))
    at = defaultdict(dict, {base: r.tests(part="compatibility", base=base) for base in bases})
    if not at:
        return
    chance = chances(r)
    learned = [t for t in r.tasks(part="compatibility") if mean(by_task(at["M0"], t)) - mean(by_task(chance, t)) > GAIN]
    kept = {(t, s): (at["M1"][t, s] - chance[t, s]) / mean(at["M0"][t, z] - chance[t, z] for z in SEEDS if (t, z) in chance)
            for t, s in at["M1"] if t in learned}
    figures.compatibility(compatibility_rows(r), folder / f"{r.preset}-compatibility")
    out.add(table_of_tasks({"chance": chance, **at}) + f"\n![Delta_0 on later bases]({r.preset}-compatibility.png)\n\n")
    out.add(f"Learned on M0 (test more than {GAIN} above the commonest label): {', '.join(learned)}; only these count below.\n\n")
    at, chance = ({base: only(values, learned) for base, values in at.items()}), only(chance, learned)
    out.difference("apply on M1 above chance", at.get("M1", {}), chance)
    out.difference("apply on M4 above chance", at.get("M4", {}), chance)
    out.difference("share of Delta_0's gain over chance kept on M1, above a half (far above chance)",
                   kept, dict.fromkeys(kept, 0.5), True)
    ends = [at.get(base, {}) for base in ("M0", "M1")]
    gains = [[sum(end[key] - chance[key] for key in ends[0].keys() & ends[1].keys() if key[1] == s) for s in SEEDS] for end in ends]
    out.add(f"- the same of all tasks' points together (looked for afterwards): {shown([m1 / m0 for m0, m1 in zip(*gains) if m0])}\n")
    for snapshot in [b for b in at if "-t" in b][:1]:
        out.difference(f"lost from {snapshot} to M1 (falls with t)", at[snapshot], at.get("M1", {}), True)
    out.difference("lost from M1 to M4 (falls with the number of domains)", at.get("M1", {}), at.get("M4", {}), True)
    forgetting(r, at, out)


def chances(r: Rows) -> dict[Key, float]:
    """The accuracy of always predicting the commonest training label."""
    return r.numbers("chance", part="compatibility", base="M0")


def only(scores: dict[Key, float], tasks: list[str]) -> dict[Key, float]:
    return {k: v for k, v in scores.items() if k[0] in tasks}


def learned_ends(r: Rows, base: str) -> set[Key]:
    """Cells with deltas above chance on both M0 and `base`, because a path to a model that has learned nothing says nothing."""
    chance = chances(r)
    ends = [r.tests(part="tuned", base=b, kind="full") for b in ("M0", base)]
    return {k for k in ends[0].keys() & ends[1].keys() if k in chance and min(end[k] for end in ends) - chance[k] > GAIN}


def forgetting(r: Rows, at: dict[str, dict[Key, float]], out: Section) -> None:
    """Does the score of apply follow how much of M0's own domain a base has forgotten?"""
    loss = {row["name"]: row["heldout"]["wiki"]["loss"] for row in r.select(part="bases", base="M0-M4")}
    both = [b for b in at if b in loss and at[b]]
    if len(both) < 3:
        return
    score = {b: mean(at[b].values()) for b in both}
    out.add("\nApply against what each base has kept of M0's domain (held-out masked-LM loss on wiki), accuracy averaged over tasks and "
            "seeds:\n\n" + markdown(["", *both], [["apply", *(f"{score[b]:.3f}" for b in both)],
                                                   ["loss on wiki", *(f"{loss[b]:.3f}" for b in both)]]) + "\n")
    if min(len({*score.values()}), len({loss[b] for b in both})) > 1:
        out.add(f"\nTheir correlation is {correlation([score[b] for b in both], [loss[b] for b in both]):.2f} "
                f"({len(both)} bases of one lineage; looked for after the fact).\n")


def compatibility_rows(r: Rows) -> list[dict]:
    """The rows that figures.compatibility draws."""
    def drawn(line: str, row: dict, **more) -> dict:
        stage, _, t = row["run"]["base"].partition("-t")
        return {"study": "compatibility", **{k: row["run"][k] for k in ("task", "kind", "seed", "base")}, "stage": int(stage[1:]),
                "t": int(t) if t else None, "line": line, "accuracy": row["test"]["accuracy"], **more}

    applied = r.select(part="compatibility")
    rows = [drawn("apply", row) for row in applied]
    for row in (row for row in applied if row["run"]["base"] == "M0"):
        rows += [drawn("own", row), drawn("chance", row) | {"accuracy": row["chance"], "uniform": row["uniform"]}]
    return rows + [drawn("tuned", row) for base in UPGRADES for row in r.select(part="tuned", base=base, kind="full")
                   if row["chosen"] and row["test"]]


def c2(r: Rows, folder: Path, out: Section) -> None:
    """Linear mode connectivity."""
    found = r.select(part="connectivity")
    if not found:
        return
    barriers: dict[tuple[str, str], dict[Key, float]] = {}
    for row in found:
        barriers.setdefault((row["path"], row["run"]["base"]), {})[key(row)] = row["barrier"]
    drawn = [{"study": "connectivity", "task": row["run"]["task"], "kind": "full", "seed": row["run"]["seed"],
              "pair": f"M0-{row['run']['base']}", **{k: row[k] for k in ("path", "mu", "loss", "accuracy")}} for row in found]
    figures.connectivity(drawn, folder / f"{r.preset}-connectivity")
    arms = {f"M0-{base}" + ("" if path == "linear" else ", curve"): values for (path, base), values in barriers.items()}
    good = {base: learned_ends(r, base) for _, base in barriers}
    linear = {base: {k: v for k, v in values.items() if k in good[base]} for (path, base), values in barriers.items() if path == "linear"}
    out.add(f"Barrier of the test loss (nats), here and in the figure of all seeds:\n\n{table_of_tasks(arms)}\n"
            f"![paths]({r.preset}-connectivity.png)\n\n")
    out.add("Both ends have learned their task in " + ", ".join(
        f"{len(good[b] & barriers['linear', b].keys())} of {len(barriers['linear', b])} paths to {b}" for b in linear)
        + "; only these count below, and a task only with all its seeds.\n\n")
    out.difference("barrier to IND above that to M1 (deep and no deep, as one comparison)",
                   linear.get("IND", {}), linear.get("M1", {}), True)
    out.difference("barrier to M4 above that to M1", linear.get("M4", {}), linear.get("M1", {}))


def c3(r: Rows, folder: Path, out: Section) -> None:
    """Functional similarity."""
    share, own, other = ({base: r.numbers(name, part="similarity", base=base) for base in (*UPGRADES, "IND")}
                         for name in ("share_own_best", "own", "best_other"))
    if not share["M1"]:
        return
    lines = [[f"M0-{b}", *(shown(over_tasks(x[b])) for x in (share, own, other))] for b in share if share[b]]
    out.add(markdown(["pair", "share of heads whose best match is themselves", "divergence to the same head (nats)",
                      "to the best other head"], lines) + "\n\n")
    task = r.tasks(part="similarity")[0]
    drawn = [{"task": task, "pair": f"M0-{base}", "heads": len(row["divergence"]) // (len(row["cka"]) - 1),
              **{k: row[k] for k in ("divergence", "cka", "share_own_best")}}
             for base in ("M1", "M4", "IND") for row in r.select(part="similarity", task=task, base=base)]
    figures.heads(drawn, folder / f"{r.preset}-heads")
    out.add(f"![heads against heads, layers against layers]({r.preset}-heads.png)\n\n")
    out.difference("share, M1 above IND", share["M1"], share["IND"], True)
    out.difference("divergence to the same head, IND above M1", own["IND"], own["M1"], True)
    out.add(distance_table(r))


def distance_table(r: Rows) -> str:
    lines = []
    for base, of in itertools.product((*UPGRADES, "IND"), ("bases", "deltas")):
        found = [row for row in r.select(part="distance", base=base) if row["of"] == of and row["part"] == "all"]
        if found:
            numbers = ({key(row): row[k] for row in found} for k in ("l2_per_weight", "cosine"))
            lines.append([f"M0-{base}", of, *(shown(over_tasks(n)[:None if of == "deltas" else 1], 4) for n in numbers)])
    return "\nDistances over all encoder weights:\n\n" + markdown(["pair", "of", "L2 per weight", "cosine"], lines) + "\n" if lines else ""


def c4(r: Rows, folder: Path, out: Section) -> None:
    """Init: how soon, how high, and from which task."""
    full = {what: r.tests(part="full", what=what, variant=None) for what in ("scratch", "init", "init+distill")}
    full["scratch, twice the steps"] = r.tests(part="full", what="scratch", variant="longer")
    if not full["init"]:
        return
    saved, lines = {}, []
    for task in r.tasks(part="full", what="init"):
        steps = {seed: steps_of(r, task, seed) for seed in SEEDS}
        saved |= {(task, seed): 1 - s[0] / s[1] for seed, s in steps.items() if s}
        lines.append([task, *("-" if s is None else f"{s[0]} of {s[1]}" for s in steps.values())])
    out.add("Batches drawn from all training examples, test accuracy on M1:\n\n" + table_of_tasks(full) + "\n")
    out.difference("init at least as high as scratch", full["init"], full["scratch"], True, AS_GOOD)
    out.difference("init above scratch for twice the steps (as many as Delta_0 and init had together)",
                   full["init"], full["scratch, twice the steps"])
    out.add("\nFirst step at which init is as good on dev as scratch ever gets, of the step where scratch got there (never: counted as one "
            "evaluation after the end):\n\n" + markdown(["task", *(f"seed {s}" for s in SEEDS)], lines) + "\n\n")
    out.difference("share of scratch's steps saved", saved, decides=True)
    order = {f"init, {near}": r.tests(part="transfer", what="init", near=near) for near in ("same", "similar", "different")}
    order["scratch"] = r.tests(part="transfer", what="scratch")
    if order["scratch"]:
        runs = [row["run"] for row in r.select(part="transfer") if row["run"]["near"] != "same"]
        pairs = ", ".join(dict.fromkeys(f"{run['task']}: {run['source']} {run['near']}" for run in runs))
        out.add("\n32 examples a label; init from the old delta of the same task, of a similar or a different one "
                f"({pairs}):\n\n{table_of_tasks(order)}\n")
    for a, b in itertools.pairwise(order):
        out.difference(f"{a} above {b}", order[a], order[b], True)


def steps_of(r: Rows, task: str, seed: int) -> tuple[int, int] | None:
    curves = {what: row["curve"] for what in ("scratch", "init")
              for row in r.select(part="full", what=what, task=task, seed=seed, variant=None) if row["chosen"]}
    return steps_to_best(curves["scratch"], curves["init"]) if len(curves) == 2 else None


def few(r: Rows, kind: str, metric: str = "accuracy") -> dict[str, dict[Key, float]]:
    return {what: r.tests(metric, part="few", what=what, kind=kind, variant=None)
            for what in ("scratch", "apply", "init", "distill", "init+distill")}


def c5(r: Rows, folder: Path, out: Section) -> None:
    """Few labels. The few-shot sample is balanced even if the task is not, so a teacher that knows how often a label occurs gains
    accuracy by that alone. So macro-F1 decides too."""
    chance = chances(r)
    for kind, (metric, name) in itertools.product(KINDS, METRICS.items()):
        arms = few(r, kind, metric)
        if arms["distill"]:
            beside = {"commonest label": {k: v for k, v in chance.items() if k in arms["scratch"]}} if metric == "accuracy" else {}
            out.add(f"32 examples a label, {kind} delta, test {name} on M1:\n\n" + table_of_tasks(beside | arms) + "\n")
            for arm in ("distill", "apply", "init", "init+distill"):
                out.difference(f"{name}, {kind}: {arm} above scratch", arms[arm], arms["scratch"], (kind, arm) == ("full", "distill"))
            out.add("\n")


def c6(r: Rows, folder: Path, out: Section) -> None:
    """Both together, and the terms beyond the paper."""
    for kind, arm, (metric, name) in itertools.product(KINDS, ("distill", "init"), METRICS.items()):
        arms = few(r, kind, metric)
        out.difference(f"{name}, {kind}, 32 a label: init+distill at least as good as {arm}",
                       arms["init+distill"], arms[arm], kind == "full", AS_GOOD)
    full = {what: r.tests(part="full", what=what, variant=None) for what in ("init", "init+distill")}
    out.difference("all examples: init+distill at least as good as init", full["init+distill"], full["init"], False, AS_GOOD)
    for variant, term in (("gamma", "attention-map distillation (gamma 1, all layers)"), ("itp", "interpolation distillation (K = 2)")):
        for what, (metric, name) in itertools.product(("distill", "init+distill"), METRICS.items()):
            beyond = r.tests(metric, part="few", what=what, variant=variant)
            out.difference(f"{name}: {what} with {term} above {what}", beyond, few(r, "full", metric)[what])
    chain_table(r, out)


def chain_table(r: Rows, out: Section) -> None:
    lines, ends = [], {}
    modes = dict.fromkeys(row["run"]["what"] for row in r.select(part="chain"))
    for what, route in itertools.product(modes, ("chain", "direct")):
        found = [row for row in r.select(part="chain", what=what) if row["route"] == route and row["chosen"]]
        at = {b: {key(row): row["test"]["accuracy"] for row in found if row["at"] == b} for b in UPGRADES}
        ends[what, route] = at["M4"]
        lines.append([what, route, *(shown(over_tasks(at[b])) for b in UPGRADES)])
    if lines:
        out.add("\nChains, 32 examples a label, test accuracy averaged over " + ", ".join(r.tasks(part="chain")) + ":\n\n"
                + markdown(["mode", "route", *UPGRADES], lines) + "\n\n")
    for what in modes:
        out.difference(f"{what}: chain above direct on M4", ends[what, "chain"], ends[what, "direct"])


def c7(r: Rows, folder: Path, out: Section) -> None:
    """Projection. "Of zeros" is the map of a delta of zeros. In the public code's form this is b, which was learned on the source alone."""
    arms = {"apply": r.tests(part="project", what="apply")}
    for variant, name in ((None, "project"), ("residual", "project, residual")):
        for scored, of in (("test", ""), ("test_of_zeros", ", of zeros")):
            arms[name + of] = r.tests(scored=scored, part="project", what="project", variant=variant)
    if arms["project"]:
        sources = dict.fromkeys((row["run"]["task"], row["run"]["source"]) for row in r.select(part="project", what="project"))
        out.add("Learned on " + ", ".join(f"{s} for {t}" for t, s in sources) + "; test accuracy on M1:\n\n" + table_of_tasks(arms) + "\n")
    out.difference("project above apply", arms["project"], arms["apply"], True)
    out.difference("project above the map of zeros (uses the task's own delta)", arms["project"], arms["project, of zeros"], True)
    out.difference("project, residual, above apply", arms["project, residual"], arms["apply"])


CLAIMS = {
    "C1": ("apply is far above chance and falls with t and with the number of domains passed", c1),
    "C2": ("no deep valley on the linear path between continual neighbours; a deep one against IND", c2),
    "C3": ("attention maps of equal heads stay alike across upgrades, not against IND", c3),
    "C4": ("init reaches scratch's final score in a fraction of the steps and ends at least as high; same > similar > different", c4),
    "C5": ("distill beats scratch where labels are few", c5),
    "C6": ("init+distill is at least as good as either", c6),
    "C7": ("project, learned on one task, beats apply on another", c7)}


def write(folder: Path) -> str:
    """Write README.md and the figures, and return the summary. Remarks on a claim, written by hand in remarks/PRESET-CLAIM.md, go below
    its numbers. InputError if there are no rows."""
    presets = list(dict.fromkeys(path.name.split("-")[0] for path in sorted(folder.glob("*-*.jsonl"))))
    if not presets:
        raise InputError(f"{folder}: no rows there; run python -m experiments.claims --data DIR first")
    really, found = minilm_report.section(folder)
    columns, text = {"MiniLM": found} if found else {}, []
    for preset in presets:
        r, columns[preset], cells, at = Rows(folder, preset), {}, {}, len(text)
        for name, (claim, section) in CLAIMS.items():
            section(r, folder, out := Section())
            remark = folder / "remarks" / f"{preset}-{name}.md"
            remarks = "\n" + remark.read_text(encoding="utf-8") if remark.exists() else ""
            text.append(f"### {name}: {claim}\n\n{out.text or 'Not run yet.' + chr(10)}{remarks}")
            decided = "; ".join(f"{what} {shown(values)}" for what, values, _ in out.deciding if values)
            words = [word for _, _, word in out.deciding]
            cells |= {f"{name}: {what}": found for what, found in out.cells.items()}
            columns[preset][name] = (decided, conclusion(words, all(values for _, values, _ in out.deciding))) if decided else NOT_RUN
        lines = [(*line[:5], line[-1]) for line in minilm_report.verdicts(cells)]
        table = markdown(["", "mean [95 %]", "cells", "p", "Holm", "here"], lines)
        text.insert(at, f"{of_preset(r)}\n{CROSSED}\n\n{table}\n")
    summary = markdown(["claim", *(heading for base in columns for heading in (base, "here"))],
                       [[f"{name}: {claim}", *(part for of in columns.values() for part in of.get(name, NOT_RUN))]
                        for name, (claim, _) in CLAIMS.items()]) + "\n"
    head = f"# The claims of the paper, as they come out here\n\n{__doc__.split(chr(10) * 2)[1]}\n{summary}\n{changes_of_plan()}"
    (folder / "README.md").write_text("\n".join([head, *([really] if really else []), *text]), encoding="utf-8")
    return summary


def of_preset(r: Rows) -> str:
    """What the rows of a preset have in common, and the runs of its plan that have no rows."""
    facts = {k: sorted({str(row[k]) for row in r.rows if k in row}) for k in ("device", "precision", "threads", "torch", "commit")}
    bases = ", ".join(f"{row['name']} {row['heldout'][row['domain']]['loss']:.2f} ({row['domain']})" for row in
                      r.select(part="bases", base="M0-M4"))
    done = [row["run"] for row in r.rows]
    left = Counter((run.part, run.what, run.kind) for phase in phases(SCALES[r.preset]) for run in dict.fromkeys(phase)
                   if run.facts not in done)
    missing = ", ".join(f"{' '.join(filter(None, run))} ({count})" for run, count in left.items())
    return (f"## Preset {r.preset}\n\n`python -m experiments.claims --data DIR --preset {r.preset}`; {len(r.rows)} rows in "
            f"`{r.preset}-*.jsonl`; " + "; ".join(f"{k} {', '.join(v)}" for k, v in facts.items()) + " (+: with edited files). "
            f"Held-out masked-LM loss of the bases on their own domains: {bases}.\n\n{INTERVALS}\n\n"
            f"Planned and not run (number of runs): {missing or 'nothing'}.\n")


def changes_of_plan() -> str:
    """The later additions to the plan of MiniLM's rows."""
    plan = Path(__file__).with_name("PLAN.md").read_text(encoding="utf-8")
    return ("What changed after MiniLM's plan was written stands in [PLAN.md](../../experiments/claims/PLAN.md), under these headings: "
            + "; ".join(re.findall(r"^## (.*)", plan, re.M)) + ".\n")
