"""Signals that ask the process to end: held until the state is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from cnnjax.machine import processes

_ASKING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Ended(KeyboardInterrupt):
    """A signal ended the work, in order; `number` is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Held:
    """What `held` yields."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The number of a signal that has come; None before."""

    def end(self) -> None:
        """Raises Ended if a signal has come, to this process or to another one of the run.

        All processes are to call it after the same step.
        """
        self.asked = max(processes.gather(self.asked or 0)) or None
        if self.asked is not None:
            raise Ended(self.asked)


@contextlib.contextmanager
def held() -> Iterator[Held]:
    """Holds SIGINT, SIGTERM and SIGHUP within the block, which is to ask for them.

    A second signal is not held: it raises Ended where it comes. Signals that the process ignores
    stay ignored. Outside of the main thread, which alone gets signals, nothing is changed.
    """
    found = Held()

    def hold(number: int, frame: FrameType | None) -> None:
        if found.asked is not None:
            raise Ended(number)
        found.asked = number

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _ASKING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, hold)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
