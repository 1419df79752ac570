"""Decodes many images: in threads, and many small files also in worker processes.

Decoding a small JPEG takes a tenth of a millisecond, in which a thread takes the interpreter's lock
several times. If the system suspends a thread that holds it, all others wait; processes do not. A
worker imports neither JAX nor the caller's script. It ends when its pipe is closed, however this
process ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from cnnjax.data.decode import DecodeError, MissingDecoder, decode
from cnnjax.data.sources import Source, Tree, Zip
from cnnjax.machine.host import cpu_cores

# Images that a thread or worker decodes before it returns them: decoding a small image takes about
# as long as waking another thread. Each gets many turns, so that all finish at about the same time.
_TURN, _TURNS = 32, 32
# A worker starts in 0.15 s. It is worth that if it decodes this many files of at most this mean
# size in bytes; threads decode large images as fast.
_SHARE, _SMALL = 2000, 2**16
_SAMPLE = 64  # files whose size is looked up


class Undecodable(NamedTuple):
    """Why an image could not be decoded."""

    reason: str
    passing: bool
    """Whether a later attempt may succeed."""


Outcome = np.ndarray | Undecodable


def decode_all(source: Source, names: Sequence[str], size: int) -> Generator[Outcome, None, None]:
    """Yields each image as uint8 [size, size], or why it cannot be decoded, in order."""
    cores = cpu_cores()
    turn = max(1, min(_TURN, len(names) // (cores * _TURNS)))
    own = threading.local()
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(worker)
            for _ in range(min(cores - 1, _worthwhile(source, names)))
            if (worker := _started(source, size)) is not None
        ]

        def begin() -> None:
            with contextlib.suppress(IndexError):  # the other threads decode themselves
                own.worker = workers.pop()

        def decode_some(start: int) -> list[Outcome]:
            some = list(names[start : start + turn])
            worker: _Worker | None = getattr(own, "worker", None)
            if worker is not None:
                if (answer := worker.ask(some)) is not None:
                    return answer
                del own.worker
            return [_decoded(source, name, size) for name in some]

        pool = ThreadPoolExecutor(cores, initializer=begin)
        try:
            for outcomes in pool.map(decode_some, range(0, len(names), turn)):
                yield from outcomes
        finally:
            pool.shutdown(cancel_futures=True)


def _decoded(source: Source, name: str, size: int) -> Outcome:
    try:
        return decode(source.read(name), size)
    except DecodeError as error:
        return Undecodable(str(error), isinstance(error, MissingDecoder))
    except OSError as error:
        # An error of the system, not of the content. (The signature of a link is its target's.)
        passing = error.errno is not None and not isinstance(error, FileNotFoundError)
        return Undecodable(f"cannot be read: {error.strerror or error}", passing)


def _worthwhile(source: Source, names: Sequence[str]) -> int:
    """Returns the number of workers that have enough to do, beside this process."""
    if not isinstance(source, Tree | Zip) or len(names) < 2 * _SHARE:
        return 0
    sample = names[:: len(names) // _SAMPLE]
    mean = sum(source.signature(name)[0] for name in sample) / len(sample)
    return len(names) // _SHARE - 1 if mean <= _SMALL else 0


class _Worker:
    """A process that decodes images by name; see `serve`."""

    def __init__(self, source: Source, size: int) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C interrupts this process, which closes the pipe
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._task: tuple[Source, int] | None = source, size  # not sent yet

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._answers.close()

    def _end(self) -> int:
        """Closes the pipe and returns the exit status."""
        with contextlib.suppress(OSError):
            self._requests.close()
        return self._process.wait()

    def ask(self, names: list[str]) -> list[Outcome] | None:
        """Returns the outcomes for these names; None, after a message, if the worker has ended."""
        try:
            for request in (self._task, names):
                if request is not None:
                    pickle.dump(request, self._requests)
            self._task = None
            self._requests.flush()
            answer: list[Outcome] = pickle.load(self._answers)
        except (OSError, EOFError, pickle.UnpicklingError):
            message = "a process that decoded images ended with status"
            more = "(-9: perhaps memory ran out); its images are decoded without it"
            print(message, self._end(), more, file=sys.stderr)
            return None
        return answer


def _started(source: Source, size: int) -> _Worker | None:
    """Returns a worker; None if the system does not start one."""
    try:
        return _Worker(source, size)
    except OSError:
        return None


def serve() -> None:
    """Decodes, in a worker, what its `_Worker` asks for, until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    requests = sys.stdin.buffer
    try:
        source, size = pickle.load(requests)
        while True:
            names = pickle.load(requests)
            pickle.dump([_decoded(source, name, size) for name in names], answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without flushing into the closed pipe
