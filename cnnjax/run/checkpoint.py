"""Saves and restores training states with Orbax: the latest epoch, and the best by validation.

With several processes, each writes only the data on its own devices, and the main process writes
the rest. Any number of processes with any number of devices can restore the state.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from cnnjax.errors import InputError, first_line
from cnnjax.machine import processes
from cnnjax.machine.files import write_atomically
from cnnjax.networks import AUXILIARY
from cnnjax.steps import TrainState

Kind = Literal["latest", "best", "within"]
"""After the last epoch, after the best epoch, and after some steps of an unfinished epoch."""
KINDS: tuple[Kind, ...] = ("latest", "best")

_BESIDE, _CHECKSUMS = "beside.json", "checksums.json"  # in the folder of a checkpoint

# Errors of a full or failing disk; Orbax reports them in the text of a ValueError.
_DISK = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS


class Checkpoints:
    """Saves and restores checkpoints under `folder`, one of each kind.

    A checkpoint is written atomically. It is removed atomically, after its successor is on disk.
    The SHA-256 checksums of its files are stored with them and verified before use. Of `latest` the
    previous checkpoint is kept too: if the newest is damaged, or had not reached the disk before a
    power failure, a run resumes from the previous one.

    Several processes must call the same methods in the same order, except for one that reads
    `alone` (`cnnjax.machine.processes`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._together = processes.are_several()
        self._managers: dict[Kind, ocp.CheckpointManager] = {}
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._whole: dict[tuple[Kind, int], bool] = {}

    def save(
        self, kinds: Sequence[Kind], epoch: int, state: TrainState, beside: Any = None
    ) -> None:
        """Starts to write the state after `epoch` epochs, as one kind after the other.

        Errors are raised by the next call of any method except `close`. An interrupt (Ctrl-C) does
        not stop the writing; `close` waits for it.

        Args:
            kinds: the kinds to write.
            epoch: number of the epoch or, for `within`, of the step; a checkpoint of the same
                number is replaced.
            state: arrays on the devices or the host; it is copied before this returns. With several
                processes, JAX arrays, which are written before this returns, since their devices
                could not communicate in the same order during a step.
            beside: JSON value to store with the state.
        """
        self.wait()
        if self._together:
            self._write_each(kinds, epoch, state, beside)
            return
        # On a CPU, fetched arrays share the buffers that the next step donates, hence the copy.
        # Orbax writes NumPy arrays in half the time of JAX arrays.
        copy = jax.tree.map(np.array, jax.device_get(state))
        self._writing = self._writer.submit(self._write_each, kinds, epoch, copy, beside)

    def wait(self) -> None:
        """Waits until pending checkpoints are written; raises their errors."""
        if self._writing is not None:
            self._writing.result()

    def _write_each(
        self, kinds: Sequence[Kind], epoch: int, state: TrainState, beside: Any
    ) -> None:
        for kind in kinds:
            self._write(kind, epoch, state, beside)

    def _write(self, kind: Kind, epoch: int, state: TrainState, beside: Any = None) -> None:
        manager = self._manager(kind)
        before = sorted(manager.all_steps())
        for step in before:
            if step >= epoch:  # Orbax saves no step before the latest one
                self._remove(kind, step)
        try:
            manager.save(epoch, args=ocp.args.StandardSave(state))
        except ValueError as error:
            failed = next((k for k in _DISK if os.strerror(k) in str(error)), None)
            if failed is None:
                raise
            raise OSError(failed, os.strerror(failed), str(self.folder)) from None
        processes.on_main(lambda: _seal(self.folder / kind / str(epoch), beside))
        self._whole[kind, epoch] = True
        older = [step for step in before if step < epoch]
        for step in older[:-1] if kind == "latest" else older:
            self._remove(kind, step)

    def epoch(self, kind: Kind) -> int | None:
        """Returns the number of epochs of the newest undamaged checkpoint; None if there is none.

        A damaged checkpoint is reported on standard error.
        """
        self.wait()
        if not processes.on_main((self.folder / kind).exists):  # do not create it
            return None
        steps = sorted(self._manager(kind).all_steps(), reverse=True)
        return processes.on_main(lambda: next((s for s in steps if self._is_whole(kind, s)), None))

    def _is_whole(self, kind: Kind, epoch: int) -> bool:
        """Verifies a checkpoint's checksums, once."""
        if (kind, epoch) not in self._whole:
            home = self.folder / kind / str(epoch)
            try:
                kept = json.loads((home / _CHECKSUMS).read_text("utf-8"))
                whole = kept == _checksums(home)
            except (OSError, ValueError):
                whole = False
            if not whole:
                print(f"{home} is damaged and is not used", file=sys.stderr)
            self._whole[kind, epoch] = whole
        return self._whole[kind, epoch]

    def restore(self, kind: Kind, template: TrainState) -> TrainState:
        """Returns the saved state, on the devices of the template.

        Args:
            kind: the kind of checkpoint.
            template: a state of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            InputError: there is no such checkpoint, or it does not fit the template.
        """
        state: TrainState = self._read(kind, lambda manager, epoch: template)
        return state

    def _read(
        self, kind: Kind, template_of: Callable[[ocp.CheckpointManager, int], TrainState]
    ) -> Any:
        epoch = self.epoch(kind)
        if epoch is None:
            state = "undamaged " if any((self.folder / kind).glob("*/")) else ""
            raise InputError(
                f"{self.folder / kind} holds no {state}checkpoint; has the run been trained?"
            )
        manager = self._manager(kind)
        try:
            template = template_of(manager, epoch)
            return manager.restore(epoch, args=ocp.args.StandardRestore(template))
        except (ValueError, KeyError, OSError) as error:
            where = manager.directory / str(epoch)
            raise InputError(f"{where} cannot be read ({first_line(error)})") from None

    def beside(self, kind: Kind) -> Any:
        """Returns the JSON value that was stored with the newest undamaged state."""
        return json.loads((self.folder / kind / str(self.epoch(kind)) / _BESIDE).read_text("utf-8"))

    def variables(self, kind: Kind) -> dict[str, Any]:
        """Returns the Flax variables for evaluation of a saved state, as NumPy arrays.

        They are the moving average of the parameters, if there is one, without the auxiliary head.

        Raises:
            InputError: there is no such checkpoint, or it cannot be read.
        """
        saved = self._read(kind, _on_host)
        params = saved.get("ema") or saved["params"]
        evaluated = {name: value for name, value in params.items() if name != AUXILIARY}
        return {"params": evaluated, "batch_stats": saved.get("batch_stats") or {}}

    def drop(self, kind: Kind) -> None:
        """Removes the checkpoints of a kind."""
        self.wait()
        processes.on_main(lambda: shutil.rmtree(self.folder / kind, ignore_errors=True))

    def close(self) -> None:
        """Waits for pending checkpoints, and releases Orbax's resources."""
        again = None
        while self._writing is not None and not self._writing.done():
            try:
                wait([self._writing])
            except KeyboardInterrupt as error:  # wait for the pending write first
                again = error
        self._writer.shutdown()
        for manager in self._managers.values():
            manager.close()
        if again is not None:
            raise again

    def _manager(self, kind: Kind) -> ocp.CheckpointManager:
        if kind not in self._managers:
            # Orbax's own background saving would not preserve the order of the kinds.
            options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
            if jax.process_count() > 1 and not self._together:
                this = jax.process_index()
                options.create = False
                options.multiprocessing_options = ocp.options.MultiprocessingOptions(
                    primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"{this}"
                )
            handler = ocp.StandardCheckpointHandler(
                multiprocessing_options=options.multiprocessing_options
            )
            folder = (self.folder / kind).absolute()
            if processes.is_main():
                self._sweep(kind)  # remains of killed processes
            self._managers[kind] = ocp.CheckpointManager(
                folder, options=options, item_handlers=handler
            )
        return self._managers[kind]

    def _sweep(self, kind: Kind) -> None:
        for going in self.folder.glob(f"{kind}.*.old"):
            shutil.rmtree(going, ignore_errors=True)

    def _remove(self, kind: Kind, epoch: int) -> None:
        """Renames a checkpoint first, so that it disappears at once, and then deletes its files."""
        self._whole.pop((kind, epoch), None)
        processes.on_main(lambda: self._remove_files(kind, epoch))
        self._manager(kind).reload()

    def _remove_files(self, kind: Kind, epoch: int) -> None:
        self._sweep(kind)
        going = self.folder / f"{kind}.{time.time_ns()}.old"  # another old one may still be in use
        (self.folder / kind / str(epoch)).replace(going)
        _sync_one(self.folder / kind)
        _sync_one(self.folder)
        self._sweep(kind)


def _seal(home: Path, beside: Any) -> None:
    """Adds the JSON value and the checksums to the files of a checkpoint."""
    with write_atomically(home / _BESIDE) as file:
        json.dump(beside, file)
    checksums = _checksums(home)
    with write_atomically(home / _CHECKSUMS) as file:
        json.dump(checksums, file)
    _sync(home)


def _on_host(manager: ocp.CheckpointManager, epoch: int) -> Any:
    """Returns a template of NumPy arrays, for a state saved from any devices."""
    shapes = manager.item_metadata(epoch).tree
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of a checkpoint, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _CHECKSUMS
    }


def _sync(folder: Path) -> None:
    """Waits until everything in a folder is on disk."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on disk, if the system supports it."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system does not support fsync
            raise
    finally:
        os.close(descriptor)


def template_of(state: TrainState, placement: Any) -> TrainState:
    """Returns shapes, dtypes and shardings of a state, for `Checkpoints.restore`.

    Args:
        state: a state of arrays, or of their shapes.
        placement: one sharding for all arrays, or a state of shardings.
    """
    template: TrainState = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        jax.tree.broadcast(placement, state),
    )
    return template
