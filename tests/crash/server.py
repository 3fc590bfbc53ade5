"""Runs the scripts' commands, each in a process of its own that is forked off this one: a kill costs no seconds of importing torch.

A line of JSON in ({"argv": ["train.py", ...], "slow": SECONDS, "log": PATH}), two lines out: the process's number, and when it has ended
its exit code (negative: the signal that killed it).
"""
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Callable

import recycle  # noqa: F401
import train  # noqa: F401
from rt.formats import atomic
from rt.runs.config import run


def serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            command(asked)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def slow_down(seconds: float) -> None:
    """Pause at each step of rt.formats.atomic.atomic_folder, so that kills fall between two of them."""
    def pausing(call: Callable, everywhere: bool = False) -> Callable:
        def paused(path: Path, *more, **named):
            result = call(path, *more, **named)
            if everywhere or path.suffix == ".part":
                time.sleep(seconds)
            return result
        return paused

    Path.mkdir, Path.rename, atomic.sync = pausing(Path.mkdir), pausing(Path.rename, everywhere=True), pausing(atomic.sync)


def command(asked: dict) -> None:
    """Never returns: ends as the script does."""
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    if asked["slow"]:
        slow_down(asked["slow"])
    sys.argv = asked["argv"]
    code = 0
    try:
        run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


serve()
