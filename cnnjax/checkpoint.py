"""The states of a run on disk, through Orbax: the latest epoch, and the best by validation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import jax
import orbax.checkpoint as ocp

from cnnjax.errors import InputError
from cnnjax.steps import TrainState

Kind = Literal["latest", "best"]
KINDS: tuple[Kind, ...] = ("latest", "best")


class Checkpoints:
    """Saves and restores under `folder`, one checkpoint of each kind.

    A checkpoint appears whole or not at all, and the one before goes only when the disk has it. If
    both are there, the newer may not have reached the disk before a power cut: the older counts.
    """

    def __init__(self, folder: Path) -> None:
        # Saving in the background would read buffers that the next step has been given to reuse;
        # these states take milliseconds to write.
        self.folder = folder
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        self._managers = {
            kind: ocp.CheckpointManager((folder / kind).absolute(), options=options)
            for kind in KINDS
        }

    def save(self, kind: Kind, epoch: int, state: TrainState) -> None:
        """Writes the state after `epoch` epochs; one of the same epoch is replaced."""
        manager = self._managers[kind]
        before = list(manager.all_steps())
        if before == [epoch]:
            # From a run that ended between this save and the next: same config, same state.
            return
        if epoch in before:
            manager.delete(epoch)
        manager.save(epoch, args=ocp.args.StandardSave(state))
        _sync(self.folder / kind / str(epoch))
        for step in before:
            if step != epoch:
                manager.delete(step)

    def epoch(self, kind: Kind) -> int | None:
        """Returns the number of epochs after which the checkpoint was written; None without one."""
        return min(self._managers[kind].all_steps(), default=None)

    def restore(self, kind: Kind, template: TrainState) -> TrainState:
        """Returns the saved state, on the devices that the template names.

        Args:
            kind: which of the two.
            template: a state of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            InputError: there is no such checkpoint, or it does not fit the template.
        """
        manager = self._managers[kind]
        epoch = self.epoch(kind)
        if epoch is None:
            raise InputError(f"{manager.directory} holds no checkpoint; has the run been trained?")
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


def _sync(folder: Path) -> None:
    """Waits until the disk has all that a folder holds, where the system lets a reader wait."""
    if os.name != "posix":
        return
    for path in (*folder.rglob("*"), folder, folder.parent):
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
