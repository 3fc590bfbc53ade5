"""rt: recyclable tuning. Model, deltas, losses and recycling, one idea per file."""
import os
import signal
import sys
from pathlib import Path

__version__ = "0.1.0"

# Waiting OpenMP threads release their core after about 30 microseconds instead of milliseconds. Otherwise steps take several times as long,
# or do not end, as soon as other programs use the CPU (docs/scaling.md). OpenMP reads the variable when torch is loaded, so it is set here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# While one of our own commands imports, which takes seconds, Ctrl-C just ends it: numpy and torch may swallow a KeyboardInterrupt.
if sys.argv[0] == "-m" or sys.argv[0].endswith(".py") and Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
