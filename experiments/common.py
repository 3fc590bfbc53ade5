"""Shared by the experiments: the check that their data exist, and scripts of the checkout run as commands that can be typed."""
import subprocess
import sys
from pathlib import Path

from rt.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def check_places(experiment: str, data: str | None, *others: str) -> None:
    """InputError unless `data` holds corpora/ and tasks/, and the other folders exist."""
    if not data or not (Path(data) / "corpora").is_dir() or not (Path(data) / "tasks").is_dir():
        raise InputError(f"--data {data}: not a folder with corpora/ and tasks/; see python -m experiments.{experiment} --help")
    for needed in others:
        if not Path(needed).is_dir():
            raise InputError(f"{needed}: is not there; see python -m experiments.{experiment} --help")


def run_script(places: dict[str, str | Path], *command: object, root: str | Path = ROOT) -> str:
    """Run a script of the checkout `root` and return its command, with each of `places` shown by name. Paths are made absolute. InputError
    if it fails."""
    command = [str(part.absolute()) if isinstance(part, Path) else str(part) for part in command]
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    text = " ".join(command)
    for name, place in places.items():
        text = text.replace(str(Path(place).absolute()), name)
    if done.returncode:
        raise InputError(f"{text} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return text
