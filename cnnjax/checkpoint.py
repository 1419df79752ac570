"""The states of a run on disk, through Orbax: the latest epoch, and the best by validation."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from cnnjax.errors import InputError
from cnnjax.steps import TrainState

Kind = Literal["latest", "best"]
KINDS: tuple[Kind, ...] = ("latest", "best")


class Checkpoints:
    """Saves and restores under `folder`, one checkpoint of each kind.

    A checkpoint appears whole or not at all, and goes likewise, when the disk has the one after it.
    If both are there, the newer may not have reached the disk before a power cut: the older counts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._managers: dict[Kind, ocp.CheckpointManager] = {}

    def save(self, kind: Kind, epoch: int, state: TrainState) -> None:
        """Writes the state after `epoch` epochs; one of the same epoch is replaced.

        An interrupt, Ctrl-C, waits until it is written.
        """
        manager = self._manager(kind)
        before = list(manager.all_steps())
        if before == [epoch]:
            # From a run that ended between this save and the next: same config, same state.
            return
        with _uninterrupted():
            if epoch in before:
                self._remove(kind, epoch)
            manager.save(epoch, args=ocp.args.StandardSave(state))
            _sync(self.folder / kind / str(epoch))
            for step in before:
                if step != epoch:
                    self._remove(kind, step)

    def epoch(self, kind: Kind) -> int | None:
        """Returns the number of epochs after which the checkpoint was written; None without one."""
        if not (self.folder / kind).exists():  # nor is it made
            return None
        return min(self._manager(kind).all_steps(), default=None)

    def restore(self, kind: Kind, template: TrainState) -> TrainState:
        """Returns the saved state, on the devices that the template names.

        Args:
            kind: which of the two.
            template: a state of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            InputError: there is no such checkpoint, or it does not fit the template.
        """
        epoch = self.epoch(kind)
        if epoch is None:
            raise InputError(f"{self.folder / kind} holds no checkpoint; has the run been trained?")
        manager = self._manager(kind)
        try:
            state: TrainState = manager.restore(epoch, args=ocp.args.StandardRestore(template))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{manager.directory / str(epoch)} cannot be read ({reason})"
            ) from None
        return state

    def close(self) -> None:
        """Releases what Orbax holds."""
        for manager in self._managers.values():
            manager.close()

    def _manager(self, kind: Kind) -> ocp.CheckpointManager:
        if kind not in self._managers:
            # Saving in the background would read buffers that the next step has been given to
            # reuse; these states take milliseconds to write.
            options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
            folder = (self.folder / kind).absolute()
            self._sweep(kind)  # after a process that was killed
            self._managers[kind] = ocp.CheckpointManager(folder, options=options)
        return self._managers[kind]

    def _sweep(self, kind: Kind) -> None:
        for going in self.folder.glob(f"{kind}.*.old"):
            shutil.rmtree(going, ignore_errors=True)

    def _remove(self, kind: Kind, epoch: int) -> None:
        """Takes a checkpoint away at once, and then its files; Orbax deletes one by one."""
        self._sweep(kind)
        going = self.folder / f"{kind}.{time.time_ns()}.old"  # another's may be in use and stay
        (self.folder / kind / str(epoch)).replace(going)
        _sync_one(self.folder / kind)
        _sync_one(self.folder)
        self._sweep(kind)
        self._manager(kind).reload()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds an interrupt back until the block ends: in its middle, Orbax's threads would fail."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears of one
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        # None stands for a handler that is not Python's, where Python is a part of something else.
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _sync(folder: Path) -> None:
    """Waits until the disk has all that a folder holds."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    """Waits until the disk has a file, or a folder's names, where the system lets a reader wait."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def template_of(state: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
    """Returns shapes, dtypes and placement of a state, for `Checkpoints.restore`."""
    template: TrainState = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    return template
