"""rt: recyclable tuning. Model, deltas, losses and recycling, one idea a file."""
import os

__version__ = "0.1.0"

# Threads that wait for each other give their cores away after some 30 microseconds instead of milliseconds. Else steps take several times
# as long, or do not end, as soon as other programs compute (docs/scaling.md). It is read when torch is loaded, hence here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
