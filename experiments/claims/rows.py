"""The rows of the claims, results/claims/PRESET-PART.jsonl, and their statistics. The report reads them; finished runs append to them."""
import json
from collections import Counter
from pathlib import Path
from statistics import mean

from experiments.claims.plan import SCALES, Run, searched
from experiments.claims.runs import sizes
from rt.errors import InputError
from rt.formats.files import read_rows
from rt.runs.summary import interval

Key = tuple[str, int]                               # task, seed


def key(row: dict) -> Key:
    return row["run"]["task"], row["run"]["seed"]


class Rows:
    """The rows of one preset, looked up by the facts of their runs."""

    def __init__(self, folder: Path, preset: str):
        self.folder, self.preset = folder, preset
        self.rows = [row for path in sorted(folder.glob(f"{preset}-*.jsonl")) for row in self.read(path)]

    def read(self, path: Path) -> list[dict]:
        return read_rows(path)

    def select(self, **facts) -> list[dict]:
        """Rows whose run has these facts; None means that the fact is absent."""
        return [row for row in self.rows if all(row["run"].get(k) == v for k, v in facts.items())]

    def numbers(self, name: str, **facts) -> dict[Key, float]:
        """A number from the rows by (task, seed)."""
        return {key(row): row[name] for row in self.select(**facts)}

    def tests(self, metric: str = "accuracy", scored: str = "test", **facts) -> dict[Key, float]:
        """Test score of the chosen rows by (task, seed)."""
        return {key(row): row[scored][metric] for row in self.select(**facts) if row.get("chosen") and row.get(scored)}

    def tasks(self, **facts) -> list[str]:
        return list(dict.fromkeys(row["run"]["task"] for row in self.select(**facts)))


class GrowingRows(Rows):
    """Rows that new runs are appended to. A run that was cut off while it was written is removed from its file. Rows whose sizes are not
    those of the preset are refused (InputError), because they would be mixed with new ones."""

    def __init__(self, folder: Path, preset: str):
        self.scale, self.sizes = SCALES[preset], sizes(SCALES[preset])
        super().__init__(folder, preset)

    def read(self, path: Path) -> list[dict]:
        rows = read_rows(path)
        counts = Counter(json.dumps(row["run"]) for row in rows)
        whole = [row for row in rows if counts[json.dumps(row["run"])] == row["rows"]]
        other = next((row["sizes"] for row in whole if row["sizes"] != self.sizes), None)
        if other:
            raise InputError(f"{path}: holds runs of other sizes ({other}, now {self.sizes}); move it away or give another --results")
        if path.read_bytes()[-1:] != b"\n" or len(whole) < len(rows):
            path.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
        return whole

    def done(self, run: Run) -> bool:
        return any(row["run"] == run.facts for row in self.rows)

    def add(self, run: Run, rows: list[dict], facts: dict) -> None:
        """Append the rows of a run, each with the run's facts and the machine's `facts`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        full = [{"run": run.facts, "rows": len(rows), "sizes": self.sizes, **facts, **row} for row in rows]
        with (self.folder / f"{self.preset}-{run.part}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in full))
        self.rows += full

    def rates(self, run: Run) -> tuple[float, ...]:
        """The learning rates to run at: all if `run` is the search, else the rate that dev chose in the search (none before it)."""
        search = searched(run)
        if run == search:
            return () if run.kind is None else self.scale.rates if run.kind == "full" else self.scale.module_rates
        chosen = [row["lr"] for row in self.rows if row["run"] == search.facts and row.get("chosen")]
        return tuple(chosen[:1])

    def seconds(self, run: Run) -> float | None:
        """The mean seconds of finished runs of the same `part` and `what`, if there are any."""
        alike = {json.dumps(row["run"]): row["seconds"] for row in self.select(part=run.part, what=run.what)}
        return mean(alike.values()) if alike else None


# ---------------------------------------------------------------- statistics

def shown(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    m, half = interval(values)
    return f"{m:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def verdict(values: list[float], margin: float = 0.0) -> str:
    if len(values) < 2:
        return "not measured with enough seeds"
    m, half = interval(values)
    return "shown" if m - half > -margin else "opposite" if m + half < -margin else "not shown"


def conclusion(words: list[str], whole: bool = True) -> str:
    """One phrase from the verdicts on the parts of a claim: shown if all parts are shown. `whole`: all parts have rows."""
    parts = f"{words.count('shown')} of {len(words)} parts shown" + f", {words.count('opposite')} opposite" * ("opposite" in words)
    if not whole:
        return f"incomplete ({parts})"
    return words[0] if len(set(words)) == 1 else parts


class PerSeed(list):
    """A value per seed, each the mean over `tasks` tasks."""

    def __init__(self, values: list[float], tasks: int):
        super().__init__(values)
        self.tasks = tasks


def per_seed(a: dict[Key, float], b: dict[Key, float]) -> PerSeed:
    """a - b per seed, averaged over the tasks that all seeds have."""
    both = a.keys() & b.keys()
    seeds = sorted({seed for _, seed in both})
    tasks = [t for t in sorted({t for t, _ in both}) if all((t, s) in both for s in seeds)]
    return PerSeed([mean(a[t, s] - b[t, s] for t in tasks) for s in seeds] if tasks else [], len(tasks))


def over_tasks(scores: dict[Key, float]) -> PerSeed:
    """The mean over the tasks that all seeds have, one value per seed."""
    return per_seed(scores, dict.fromkeys(scores, 0.0))


def by_task(scores: dict[Key, float], task: str) -> list[float]:
    return [v for (t, _), v in sorted(scores.items()) if t == task]
