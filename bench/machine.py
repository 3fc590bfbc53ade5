"""The machine of a measurement: hardware, versions, commit."""
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def output_of(*command: str) -> str:
    """The output of a command; "" if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def clocks() -> dict:
    """Driver, clocks in MHz, power in W and temperature of the first GPU; empty without one."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    lines = output_of("nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits").splitlines()
    return dict(zip(fields, map(str.strip, lines[0].split(",")))) if lines else {}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit, with + if files differ from it; "" outside a checkout."""
    head, dirty = output_of("git", "rev-parse", "--short", "HEAD"), output_of("git", "status", "--porcelain", "-uno")
    return head and head + ("+" if dirty else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: *(.*\S)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"CPU, {names[0] if names else 'unknown'}, {len(names)} threads"


def environment(cuda: bool, argv: list[str], packages: tuple[str, ...], **more) -> dict:
    """The first row of a run."""
    gpu = {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()} if cuda else {"gpu": None}
    return {"kernel": "environment", **gpu, "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "cuda": torch.version.cuda, **{p: version(p) for p in packages}, **more, "commit": commit(),
            **{name: os.environ.get(name) for name in ("RT_KERNELS", "RT_CONFIGS")},
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), **clocks(),
            "argv": [Path(each).name if each.startswith("/") else each for each in argv]}      # without this machine's folders
