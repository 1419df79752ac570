"""The processes of a run: how they join each other, and which of them this one is.

`jax.distributed` joins the processes to one program over one mesh of all their devices. Each
process runs the same Python code; only process 0, the *main* process, writes logs, tables and
reports. With a single process, every function here is trivial.

A process that fails reports why and ends. The others end within a minute, when JAX's runtime no
longer receives its heartbeat. The same command, on any number of processes, resumes from the last
checkpoint.
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

_HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead
_CONNECT = 120  # seconds to wait for the other processes at the start
_TOGETHER = 3  # seconds within which all processes fail if the reason is the same

_LOST = (
    "another process of this run has ended or cannot be reached; its own message says why. Give the"
    " same command again to resume from the last checkpoint"
)


def join(config: DistributedConfig) -> None:
    """Joins the processes of a cluster, if there are any; call it before JAX is first used.

    Args:
        config: if it names a coordinator, its settings are used; otherwise JAX detects the cluster
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
        " of process 0, or run a single process with --distributed off"
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
            # A single pod of Kubernetes is not a cluster, but JAX warns in each.
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
    """Returns whether JAX is already in use, as in a notebook; such a process runs alone."""
    return "must be called before" in str(error)


def _is_lone_pod() -> bool:
    """Returns whether this is a Kubernetes pod that no indexed job has started."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []  # keeps references, since the C library calls them


def _say_at_abort(sentence: str, status: int) -> int | None:
    """Ends this process with a message when JAX's runtime aborts it after losing the others.

    The runtime aborts from its own thread, after its own report. Python's signal handlers do not
    run then, so this is a handler of the C library.

    Args:
        sentence: the message.
        status: the exit status.

    Returns:
        The previous handler, for `_on_abort`.
    """

    def end(number: int) -> None:
        os.write(2, f"error: {sentence}\n".encode())
        os._exit(status)

    _handlers.append(_Handler(end))
    return _on_abort(ctypes.cast(_handlers[-1], ctypes.c_void_p).value)


def _on_abort(handler: int | None) -> int | None:
    """Sets the C library's SIGABRT handler, and returns the previous one; None is the default."""
    if os.name != "posix":
        return None
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before: int | None = set_handler(signal.SIGABRT, handler)
    return before


_alone = False  # see `alone`


def are_several() -> bool:
    """Returns whether this is one of several processes that run the same code together."""
    return not _alone and jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Returns whether this process writes logs, tables and reports."""
    return not are_several() or jax.process_index() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Lets this process run the block without the others, as if it were the only one.

    The block must use only this process's devices (`cnnjax.machine.devices.local_mesh`).
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def no_bars() -> bool | None:
    """Returns the `disable` argument of tqdm: only the main process shows bars, on a terminal."""
    return None if is_main() else True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets only the main process print to standard output within the block."""
    if is_main():
        yield
    else:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield


def on_main(work: Callable[[], _T]) -> _T:
    """Calls a function on the main process only, and returns its result on all processes.

    Args:
        work: a function that returns a JSON value.

    Raises:
        InputError: raised by the function; on the other processes as `ElsewhereError`.
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
    """Returns the values of all processes, in their order, on each process; waits for all.

    Args:
        mine: a JSON value.
    """
    if not are_several():
        return [mine]
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    # Pad to a power of two, since each length compiles a program.
    padded = np.pad(data, (0, (1 << int(max(lengths) - 1).bit_length()) - len(data)))
    each = multihost_utils.process_allgather(padded)
    return [json.loads(x[:n].tobytes()) for x, n in zip(each, lengths, strict=True)]


def concatenated(mine: np.ndarray) -> np.ndarray:
    """Returns the concatenated arrays of all processes, in their order, on each process.

    Args:
        mine: [n, ...]; only n may differ between processes.
    """
    if not are_several():
        return mine
    lengths = gather(len(mine))
    short = [(0, max(lengths) - len(mine))] + [(0, 0)] * (mine.ndim - 1)
    each = multihost_utils.process_allgather(np.pad(mine, short))
    return np.concatenate([x[:n] for x, n in zip(each, lengths, strict=True)])


def share(n: int) -> range:
    """Returns this process's contiguous part of n items."""
    if not are_several():
        return range(n)
    index, count = jax.process_index(), jax.process_count()
    return range(n * index // count, n * (index + 1) // count)


def see(folder: Path) -> bool:
    """Returns whether all processes see the same folder, and the main process can write to it."""
    if not are_several():
        return True
    name = f".seen-{secrets.token_hex(8)}" if is_main() else ""
    if name:
        with contextlib.suppress(OSError):
            (folder / name).touch()
    name = gather(name)[0]
    # Listing the folder makes a network file system refresh it.
    with contextlib.suppress(OSError):
        list(folder.iterdir())
    seen = all(gather((folder / name).exists()))
    if is_main():
        (folder / name).unlink(missing_ok=True)
    return seen


def rounds(items: Sequence[_T], nothing: _T) -> list[tuple[int, _T]]:
    """Returns this process's items with their numbers, dealt in turn, equally many per process.

    Args:
        items: the items of all processes.
        nothing: padding for the last round.
    """
    count, index = (jax.process_count(), jax.process_index()) if are_several() else (1, 0)
    filled = [*items, *[nothing] * (-len(items) % count)]
    return list(enumerate(filled))[index::count]


class Agreement:
    """Whether any process requests something; asked at each step without waiting for the step.

    Processes must save or stop after the same step, but a signal or a timer reaches each at a
    different moment.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._waiting: jax.Array | None = None
        self._any = jax.jit(lambda x: x.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wanted: bool) -> bool:
        """Returns whether any process requested it at the previous call; for one process, `wanted`.

        After it returns true, requests made at the same call are discarded.
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
    """Returns the exit status of a process that has failed and printed the reason.

    If the others do not fail too within a few seconds, the process ends here: a normal exit of JAX
    would wait for the others, and they would wait for it.
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
