"""The commands that bench.first runs in the time that its own units leave."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

LEAST = 30      # seconds: with less time left, no command is begun


def commands(out: Path, home: Path, data: str | None) -> Iterator[tuple[str, bool, list[str]]]:
    """What follows the units: a name, whether the command takes --budget, and its arguments."""
    for name in ("train --sizes base --dropouts 0.1", "kernels", "recycle"):
        script, *flags = name.split()
        yield script, True, ["-m", f"bench.{script}", "--json", str(out / f"{script}.jsonl"), "--resume", *flags]
    bases, old = home / "demo", home / "old-delta"
    if not (bases / "M1").exists():
        yield "demo", False, ["train.py", "--out", str(bases), *(["--resume"] if bases.exists() else [])]
    if not old.exists():
        yield "old-delta", False, ["train.py", "--mode", "tune", "--base", str(bases / "M0"), "--delta", "adapter", "--out", str(old)]
    yield "cell", False, ["-m", "bench.cell", "--json", str(out / "cell.jsonl"), "--old_base", str(bases / "M0"), "--base",
                          str(bases / "M1"), "--old_delta", str(old)]
    if data:
        yield "claims", True, ["-m", "experiments.claims", "--data", data, "--home", str(home / "claims"), "--results", str(out)]


def follow(out: Path, home: Path, data: str | None, have: Path | None, rows: list[dict], end: float) -> None:
    """Run the commands in order until the time is over, from the rows beside `have` on. One that takes no budget is not repeated after it
    succeeded."""
    for file in have.parent.glob("*.jsonl") if have else ():
        if file.name != have.name and not (out / file.name).exists():
            shutil.copy(file, out)
    done = {row["command"] for row in rows if row.get("code") == 0}
    for name, budget, arguments in commands(out, home, data):
        left = end - time.time()
        if left < LEAST:
            return
        if name in done and not budget:
            continue
        start, file = time.perf_counter(), out / f"{name}.log"
        with file.open("a") as log:
            try:
                code = subprocess.run([sys.executable, *arguments, *(["--budget", f"{left:.0f}"] if budget else [])], stdout=log,
                                      stderr=log, timeout=left + LEAST).returncode
            except subprocess.TimeoutExpired:
                code = None
        rows.append({"command": name, "code": code, "seconds": round(time.perf_counter() - start, 2)})
        with (out / "first.jsonl").open("a") as rows_file:
            print(json.dumps(rows[-1]), file=rows_file)
