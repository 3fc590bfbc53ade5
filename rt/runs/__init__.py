import signal
import sys
from pathlib import Path

# While one of our own commands imports, which takes seconds, Ctrl-C just ends it: numpy and torch may swallow a KeyboardInterrupt.
if sys.argv[0] == "-m" or sys.argv[0].endswith(".py") and Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[2]:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
