"""Scripts have train.py make a base or delta that is missing, in a process of its own. `c` is the script's config, whose device, precision,
cache and determinism train.py gets too."""
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterable

from rt.errors import InputError
from rt.speed.dist import environment_alone

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def build(c: Any, what: str, **flags: object) -> None:
    """Run train.py with `flags`; InputError if it fails."""
    print(f"building {what}", flush=True)
    flags |= {name: getattr(c, name) for name in ("device", "precision", "cache", "deterministic")}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    if subprocess.run([sys.executable, str(TRAIN), *arguments], env=environment_alone()).returncode:
        raise InputError(f"could not build {what}: python train.py {' '.join(arguments)} failed")


def build_lineage(c: Any, demo: Path, bases: Iterable[str]) -> None:
    """Make the demo lineage in the folder `demo` if one of `bases` lies there and is missing."""
    if any(not Path(base).exists() and Path(base).parent == demo for base in bases):
        build(c, "the demo lineage M0, M1, M2 (about 3 minutes on 2 cores)", out=demo, resume=(demo / "config.json").exists())
