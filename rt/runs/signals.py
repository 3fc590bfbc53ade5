"""SIGTERM and Ctrl-C: raised at once as an exception, or noted and obeyed where it suits."""
import signal
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal that asked for the end; rt.config.run prints the sentence and ends with `code`."""

    def __init__(self, number: int, sentence: str = "what was finished is kept"):
        super().__init__(f"{'interrupted' if number == signal.SIGINT else 'terminated'}: {sentence}")
        self.code = 128 + number


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside, `handler` gets the signals, but those that whoever started the process wants ignored (nohup). In other threads than the
    main one, which can have no handlers, nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


class Stop:
    """with Stop() as stop: the first signal is noted in `stop.number` (0: none), a second one raises."""
    number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Interrupted(number)
        self.number = number

    def __enter__(self) -> "Stop":
        self.handling = handled(self.note)
        self.handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.handling.__exit__(*error)
