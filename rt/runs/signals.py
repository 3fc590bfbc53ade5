"""SIGTERM and Ctrl-C: raised at once as an exception, or remembered until the loop asks."""
import signal
import sys
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal has asked the process to end. rt.runs.config.run prints the sentence and exits with `code`."""
    def __init__(self, number: int, sentence: str = "what was finished is kept"):
        super().__init__(f"{'interrupted' if number == signal.SIGINT else 'terminated'}: {sentence}")
        self.code = 128 + number


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """In the block, `handler` gets the signals, except those that the parent process ignores (nohup). Only the main thread can have one."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def delayed() -> Iterator[None]:
    """In the block, signals wait until its end. A fork needs this: an exception raised in one of its hooks, such as that of logging, is
    printed and lost, and one raised just after the fork leaves a process that its parent does not know."""
    came: list[int] = []
    with handled(lambda number, frame: came.append(number)):
        yield
    for number in came:
        signal.raise_signal(number)


@contextmanager
def interruptible(*sentence: str) -> Iterator[None]:
    """In the block, a signal raises Interrupted. So does any error after a signal: compiled code that a signal stops may report an error of
    its own, such as a file that cannot be read. Python prints and drops an exception raised in a destructor or in a callback of a weak
    reference, of which torch.compile has many; such a signal comes again a moment later."""
    came: list[Interrupted] = []
    again: list[threading.Timer] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        came.append(Interrupted(number, *sentence))
        raise came[-1]

    def on_lost(lost: Any) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            return print_lost(lost)
        again.append(threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, lost.exc_value.code - 128)))
        again[-1].start()

    print_lost, sys.unraisablehook = sys.unraisablehook, on_lost
    with handled(on_signal):
        try:
            yield
        except Exception:
            if came:
                raise came[-1] from None
            raise
        finally:
            sys.unraisablehook = print_lost
            for timer in again:
                timer.cancel()
