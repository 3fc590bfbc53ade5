"""results/transfer/README.md, from the rows alone. PLAN.md says what is compared."""
from pathlib import Path

from experiments.common import markdown, sign_flip
from rt.errors import InputError
from rt.formats.files import read_rows
from rt.runs.summary import chosen as at_best_rate
from rt.runs.summary import group, interval, with_interval

Scores = dict[tuple[str, str, int], float]      # by task, kind and seed


def chosen(rows: list[dict], part: str, what: str, mode: str, base: str, shots: int = 32) -> Scores:
    """Test accuracy of a mode, at the rate with the best mean dev over seeds, per task and kind. In part C, `apply` and `transport` do
    not read the sample, so they have one value instead of one per seed."""
    facts, found = {"part": part, "what": what, "base": base, "shots": shots}, {}
    some = [row | row["cell"] for row in rows if facts.items() <= row["cell"].items()]
    for key, line in group(some, "task", "kind").items():
        best = at_best_rate(line, mode)[:1 if part == "C" and mode in ("apply", "transport") else None]
        found |= {(*key, row["seed"]): row["test"]["accuracy"] for row in best}
    return found


def difference(a: Scores, b: Scores) -> str:
    """a - b in points, over the cells that are in both, with p of the sign-flip test."""
    each = [{"kind": key[1], "column": ", ".join(key[:2]), "points": 100 * (a[key] - b[key])} for key in sorted(a.keys() & b.keys())]
    if not each:
        return "not run"
    values = [row["points"] for row in each]
    middle, half = interval(values)
    parts = [(name, *interval(row["points"] for row in some)) for by in ("kind", "column") for (name,), some in group(each, by).items()]
    columns = [f"{name} {of:+.1f}" + f" ± {about:.1f}" * (about > 0) for name, of, about in parts]
    return f"{middle:+.1f} ± {half:.1f} points over {len(values)} cells (one-sided p {sign_flip(values):.4f})" + (
        f"; {', '.join(columns)}" if len(columns) < len(values) else "")


def by_cell(name: str, scores: Scores, columns: list[tuple[str, str]]) -> list[str]:
    each = [[v for key, v in scores.items() if key[:2] == column] for column in columns]
    return [name, *(with_interval(values) if values else "-" for values in each)]


def write(folder: Path, planned: list[dict]) -> str:
    """Write README.md; returns its tables. `planned` are the cells of the plan. InputError if there are no rows."""
    if not (rows := read_rows(folder / "rows.jsonl")):
        raise InputError(f"{folder}: no rows there; run python -m experiments.transfer --data DIR first")
    text = []

    def table(title: str, lines: dict[str, Scores], *sentences: str, needs: str | None = None) -> None:
        """Add a section: a table and `sentences` below it, or that it was not run if the line `needs` is empty."""
        if needs and not lines[needs]:
            text.append(f"## {title}\n\nNot run yet.")
            return
        columns = sorted({key[:2] for scores in lines.values() for key in scores})
        head = ["", *(f"{task}, {kind}" for task, kind in columns)]
        text.append(f"## {title}\n\n{markdown(head, [by_cell(name, scores, columns) for name, scores in lines.items()])}\n\n"
                    + "\n".join(f"- {sentence}" for sentence in sentences))

    a = {name: chosen(rows, "A", what, mode, "mini") for name, what, mode in (
        ("scratch", "plain", "scratch"), ("distill", "plain", "distill"), ("distill, 2,000 texts", "texts, soft", "distill"),
        ("hard pseudo-labels, 2,000 texts", "texts, hard", "distill"))}
    table("A. Another size and tokenizer: MiniLM teaches mini, 32 per label", a,
          f"distill above scratch: {difference(a['distill'], a['scratch'])}",
          f"with texts above without: {difference(a['distill, 2,000 texts'], a['distill'])}",
          f"soft above hard: {difference(a['distill, 2,000 texts'], a['hard pseudo-labels, 2,000 texts'])}", needs="scratch")
    box, white = ({(row["cell"]["task"], row["cell"]["kind"], row["seed"], row["lr"]): row["test"]["accuracy"] for row in rows
                   if (row["cell"]["what"], row["mode"]) == (what, "distill")} for what in ("black box", "plain"))
    pairs = [abs(box[key] - white[key]) for key in box.keys() & white.keys()]
    text.append("## B. A file of predictions as the teacher\n\n" + (
        f"Largest difference of a test accuracy from part A's, over {len(pairs)} runs: {max(pairs):.4f}." if pairs else "Not run yet."))
    first = [row for row in read_rows(folder.parent / "recipes" / "minilm.jsonl") if (row["arm"], row["seed"]) == ("M0", 0)]
    own = {(*name.split("/"), 0): score for row in first for name, score in row["apply"].items()
           if name.split("/")[0] in {row["cell"]["task"] for row in rows}}
    for base, what in (("twin", "A permuted twin of M0"), ("ind", "An independent base (mini)"), ("upgrade", "An ordinary upgrade")):
        lines = {} if base == "ind" else {"the old delta on M0": own}
        lines["apply"] = chosen(rows, "C", "apply", "apply", base)
        for carry in ("ridge", "orthogonal", "permutation"):
            lines |= {f"transport, {carry}": chosen(rows, "C", carry, "transport", base),
                      f"head alone, {carry}": chosen(rows, "C", f"head, {carry}", "apply", base)}
        lines |= {"transport": chosen(rows, "C", "transport", "transport", base)}
        for what_, mode in (("apply", "gradmask"), ("project", "project"), ("tuned", "init"), ("tuned", "scratch")):
            lines[mode] = chosen(rows, "C", what_, mode, base)
        lines = {name: scores for name, scores in lines.items() if scores or name == "apply"}
        table(f"C. {what}", lines, *(f"{name} above apply: {difference(scores, lines['apply'])}" for name, scores in lines.items()
                                     if name.startswith(("transport", "head alone"))), needs="apply")
    for part, note in (("D", "; prototypes not centred, see F"), ("F", "; part D again, prototypes centred")):
        for shots in (8, 32):
            lines = {f"{mode}, {head}": chosen(rows, part, head, mode, "upgrade", shots)
                     for mode, head in (("apply", "prototype"), ("init", "fresh"), ("init", "prototype"))}
            table(f"{part}. A task with other labels, {shots} per label, on the upgrade{note}", lines,
                  f"init, prototype above fresh: {difference(lines['init, prototype'], lines['init, fresh'])}", needs="init, fresh")
        table(f"{part}. A task with other labels, its labels' names as the only texts, on the upgrade{note}",
              {"apply, prototype": chosen(rows, part, "prototype", "apply", "upgrade", 0)}, needs="apply, prototype")
    e = {f"{mode}, ridge": chosen(rows, "E", "ridge", mode, "mini") for mode in ("transport", "init")}
    for mode in ("scratch", "distill"):
        e[mode] = {key: a[mode][key] for key in a[mode].keys() & e["init, ridge"].keys()} | chosen(rows, "E", "plain", mode, "mini")
    table("E. Another size and tokenizer by a ridge map", e,
          f"init, ridge above scratch: {difference(e['init, ridge'], e['scratch'])}")
    left = ", ".join(" ".join(map(str, cell.values())) for cell in planned if cell not in [row["cell"] for row in rows])
    text.append(f"## Planned and not run\n\n{left or 'Nothing'}.")
    facts = {key: ", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit")}
    (folder / "README.md").write_text(
        "# Old deltas across sizes, tokenizers, black boxes and coordinates\n\nWritten by `python -m experiments.transfer --report` from "
        "`rows.jsonl`; [the plan](../../experiments/transfer/PLAN.md). Test accuracy after 100 steps of 16, mean ± 95 % t-interval over "
        "five seeds (`project`: two; what does not depend on a seed has one value). Intervals and p over cells (task, kind, and seed where "
        "one is drawn) take cells for independent. But there are two tasks, one old delta for each kind of each, and one base of each sort "
        "(part F has its own M0): other tasks, deltas and bases may differ by more. "
        f"Machine: {facts['device']}; commits {facts['commit']}.\n\n" + "\n\n".join(text) + "\n", encoding="utf-8")
    return "\n\n".join(text)
