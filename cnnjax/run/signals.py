"""Holds signals that ask the process to end, until the state is saved."""

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
    """A signal ended the work in an orderly way; `number` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Held:
    """The signals that `held` has received."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The number of the signal that was received; None if none was."""

    def end(self) -> None:
        """Raises Ended if this process, or another one of the run, has received a signal.

        All processes must call it after the same step.
        """
        self.asked = max(processes.gather(self.asked or 0)) or None
        if self.asked is not None:
            raise Ended(self.asked)


@contextlib.contextmanager
def held() -> Iterator[Held]:
    """Holds SIGINT, SIGTERM and SIGHUP within the block, which must check for them.

    A second signal is not held: it raises Ended immediately. Signals that the process ignores stay
    ignored. Outside the main thread, which alone receives signals, nothing changes.
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
