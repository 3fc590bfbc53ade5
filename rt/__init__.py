"""rt: recyclable tuning. Model, deltas, losses and recycling, one idea per file."""
import os

__version__ = "0.1.0"

# Waiting OpenMP threads release their core after about 30 microseconds instead of milliseconds. Otherwise a step takes several times as
# long as soon as other programs use the CPU (docs/scaling.md). OpenMP reads the variable when torch is loaded, so it is set here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
