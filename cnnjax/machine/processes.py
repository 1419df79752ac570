"""The processes of a run: how they find each other, and which of them this is.

JAX's runtime does the work: `jax.distributed` joins the processes to one program over one mesh of
all their devices. Each process runs the same Python; process 0, the *main* one, alone writes logs,
tables and reports. Everything here is trivial for a process that computes alone.

A process that fails says why and ends. The others then end too, within a minute, as JAX's runtime
misses it; the same command, on any number of processes, goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.config import DistributedConfig
from cnnjax.errors import ElsewhereError, InputError, first_line

_T = TypeVar("_T")

_HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as dead
_CONNECT = 120  # seconds that processes wait for each other at the start
_TOGETHER = 3  # seconds within which processes that fail for one reason all do

_LOST = (
    "another process of this run has ended or cannot be reached; its own message says why. Give the"
    " same command again to go on from the last checkpoint"
)


def join(config: DistributedConfig) -> None:
    """Joins the processes of a cluster, if there are any; to be called before JAX is first used.

    Args:
        config: by hand where it names a coordinator, and else as JAX detects it
            (https://docs.jax.dev/en/latest/multi_process.html).

    Raises:
        InputError: the other processes cannot be reached.
    """
    if config.mode == "off" or jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    where = f"--distributed.coordinator {config.coordinator}" if config.coordinator else "a cluster"
    alone = (
        f"{where}: this process cannot join the others; start all of them, with the same address"
        " of process 0, or compute alone with --distributed off"
    )
    if config.coordinator:
        given = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
            "cluster_detection_method": "deactivate",
        }
    before = _say_at_abort(alone, 2)
    try:
        with warnings.catch_warnings():
            # A pod of Kubernetes is no cluster yet; JAX warns in each.
            warnings.simplefilter("ignore")
            jax.distributed.initialize(
                **given,
                heartbeat_timeout_seconds=_HEARTBEAT,
                initialization_timeout=_CONNECT,
            )
    except Exception as error:
        _on_abort(before)
        if not given and (isinstance(error, ValueError) or _is_in_use(error) or _is_lone_pod()):
            return
        raise InputError(f"{alone} ({first_line(error)})") from None
    _say_at_abort(_LOST, 1)


def _is_in_use(error: Exception) -> bool:
    """Tells whether JAX has been used already, as in a notebook, which computes alone."""
    return "must be called before" in str(error)


def _is_lone_pod() -> bool:
    """Tells whether this is a pod of Kubernetes that no indexed job has started."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []  # which the C library calls, so they must stay


def _say_at_abort(sentence: str, status: int) -> int | None:
    """Ends this process with a sentence where JAX's runtime aborts it, as it does without others.

    It does so from a thread of its own, after its own report; Python's handlers of signals never
    hear of that, so this one is the C library's.

    Returns:
        The handler before, for `_on_abort`.
    """

    def end(number: int) -> None:
        os.write(2, f"error: {sentence}\n".encode())
        os._exit(status)

    _handlers.append(_Handler(end))
    return _on_abort(ctypes.cast(_handlers[-1], ctypes.c_void_p).value)


def _on_abort(handler: int | None) -> int | None:
    """Sets the C library's handler of SIGABRT, and returns the one before; None is the default."""
    if os.name != "posix":
        return None
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before: int | None = set_handler(signal.SIGABRT, handler)
    return before


_alone = False  # see `alone`


def are_several() -> bool:
    """Tells whether this is one of several processes, which here do the same."""
    return not _alone and jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Tells whether this process writes logs, tables and reports."""
    return not are_several() or jax.process_index() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Lets this process go through the block without the others, as if there were none.

    In the block it is to use its own devices alone (`cnnjax.machine.devices.local_mesh`).
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def no_bars() -> bool | None:
    """Returns the `disable` of tqdm: the main process alone shows bars, on a terminal."""
    return None if is_main() else True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets the main process alone print to standard output within the block."""
    if is_main():
        yield
    else:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield


def on_main(work: Callable[[], _T]) -> _T:
    """Calls a function on the main process alone, and returns its answer on all.

    Args:
        work: returns what JSON can hold.

    Raises:
        InputError: the function did; on the other processes as `ElsewhereError`.
    """
    if not are_several():
        return work()
    error, told = None, ""
    if is_main():
        try:
            told = json.dumps({"answer": work()})
        except InputError as raised:
            error, told = raised, json.dumps({"error": str(raised)})
    told = gather(told)[0]
    if error is not None:
        raise error
    found = json.loads(told)
    if "error" in found:
        raise ElsewhereError(found["error"])
    answer: _T = found["answer"]
    return answer


def gather(mine: _T) -> list[_T]:
    """Returns a value of each process, in their order, on all of them; it waits for all.

    Args:
        mine: what JSON can hold.
    """
    if not are_several():
        return [mine]
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    # To a power of two: each length is a program of its own.
    padded = np.pad(data, (0, (1 << int(max(lengths) - 1).bit_length()) - len(data)))
    each = multihost_utils.process_allgather(padded)
    return [json.loads(x[:n].tobytes()) for x, n in zip(each, lengths, strict=True)]


def concatenated(mine: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes as one, in their order, on all of them.

    Args:
        mine: [n, ...], alike on all processes but for n.
    """
    if not are_several():
        return mine
    lengths = gather(len(mine))
    short = [(0, max(lengths) - len(mine))] + [(0, 0)] * (mine.ndim - 1)
    each = multihost_utils.process_allgather(np.pad(mine, short))
    return np.concatenate([x[:n] for x, n in zip(each, lengths, strict=True)])


def share(n: int) -> range:
    """Returns the part of n items, one after the other, that is this process's work."""
    if not are_several():
        return range(n)
    index, count = jax.process_index(), jax.process_count()
    return range(n * index // count, n * (index + 1) // count)


def see(folder: Path) -> bool:
    """Tells whether all processes see one and the same folder, which the main one can write to."""
    if not are_several():
        return True
    name = f".seen-{secrets.token_hex(8)}" if is_main() else ""
    if name:
        with contextlib.suppress(OSError):
            (folder / name).touch()
    name = gather(name)[0]
    # To list the folder has a network file system look anew.
    with contextlib.suppress(OSError):
        list(folder.iterdir())
    seen = all(gather((folder / name).exists()))
    if is_main():
        (folder / name).unlink(missing_ok=True)
    return seen


def rounds(items: Sequence[_T], nothing: _T) -> list[tuple[int, _T]]:
    """Returns this process's items, dealt out in turn, with their numbers: equally many for each.

    Args:
        items: of all processes.
        nothing: fills up the last round.
    """
    count, index = (jax.process_count(), jax.process_index()) if are_several() else (1, 0)
    filled = [*items, *[nothing] * (-len(items) % count)]
    return list(enumerate(filled))[index::count]


class Agreement:
    """Whether any process wants something, asked at each step without waiting for the step.

    Processes that save or stop must do so after one and the same step, and a signal or a clock
    speaks to each at another moment.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._waiting: jax.Array | None = None
        self._any = jax.jit(lambda x: x.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wanted: bool) -> bool:
        """Returns whether a process wanted it a call before; alone, `wanted` at once.

        Once it has returned true, it forgets what was wanted meanwhile.
        """
        if not self._mesh.is_multi_process:
            return wanted
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        each = jax.make_array_from_callback(
            (self._mesh.size,), sharding, lambda at: np.full(1, wanted)
        )
        before, self._waiting = self._waiting, self._any(each)
        agreed = before is not None and bool(before)
        if agreed:
            self._waiting = None
        return agreed


def failed(status: int) -> int:
    """Returns the exit status of a process that has failed and said why.

    Where the others have not failed too, within a few seconds, the process ends here: at its usual
    end JAX would wait for them, and they for it.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        try:
            from orbax.checkpoint import multihost

            everyone = set(range(jax.process_count()))
            multihost.sync_global_processes("failed", timeout=_TOGETHER, processes=everyone)
        except Exception:
            os._exit(status)
    return status
