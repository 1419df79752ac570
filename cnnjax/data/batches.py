"""(seed, step) -> batch: no iterator, no state, so that any step can be the next.

The order of an epoch is a function of the run's key and the epoch's number. A data set that fits
lives on the device as a whole and a batch is gathered there, inside the compiled step; a larger one
is read from the memory-mapped cache, a few batches ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.devices import AXIS, divided, replicated
from cnnjax.objectives import Batch

_AHEAD = 2  # batches prepared while one is computed


class Resident(NamedTuple):
    """A data set on the device."""

    images: jax.Array
    """uint8 [n, height, width]."""
    labels: jax.Array
    """int32 [n]."""
    viral: jax.Array | None = None
    """int32 [n], see `cnnjax.objectives.Batch`."""


def epoch_rows(key: jax.Array, epoch: int, rows: np.ndarray, batch: int) -> np.ndarray:
    """Returns which image stands where in each step of an epoch.

    Args:
        key: the run's key for the order of images.
        epoch: its number.
        rows: int [n], the images to train on, by their place in the data set.
        batch: images per step.

    Returns:
        int32 [steps, batch], each image once; -1 fills up the last step.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(rows))
    return in_batches(rows[np.asarray(order)].astype(np.int32), batch)


def in_batches(rows: np.ndarray, batch: int) -> np.ndarray:
    """Cuts int32 [n] into int32 [ceil(n / batch), batch], filled up with -1."""
    steps = -(-len(rows) // batch)
    return np.pad(rows, (0, steps * batch - len(rows)), constant_values=-1).reshape(steps, batch)


def load(data: Resident | None, feed: Batch | jax.Array) -> Batch:
    """Returns the batch that a step computes on; pure, to be called inside jit.

    Args:
        data: the data set on the device, or None where it is streamed.
        feed: what `Feeder.feed` gave: rows of `data`, or the batch itself.
    """
    if isinstance(feed, Batch):
        return feed
    assert data is not None
    at = jnp.maximum(feed, 0)
    images, labels, viral = jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), data)
    return Batch(images, labels, feed >= 0, viral)


class Feeder:
    """Brings the images of a data set to the devices of a mesh, each batch divided among them.

    Args:
        images: uint8 [n, height, width]; may be memory-mapped.
        labels: int32 [n].
        mesh: the devices.
        resident_mib: up to this size, in MiB, the data set is put on each device whole; below 0
            never.
        viral: int32 [n], see `cnnjax.objectives.Batch`; None to leave it out.

    Attributes:
        mesh: the devices.
        side: of an image, in pixels.
        data: the data set on the devices, or None where it is streamed.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mesh: Mesh,
        resident_mib: int,
        viral: np.ndarray | None = None,
    ) -> None:
        self.mesh, self.side = mesh, images.shape[1]
        self._set = images, labels, viral
        self._by_row = divided(mesh)
        self.data: Resident | None = None
        if images.nbytes <= resident_mib * 2**20:
            whole = np.asarray(images), labels, viral
            self.data = Resident(*jax.device_put(whole, replicated(mesh)))

    def feed(self, rows: np.ndarray) -> Iterator[Batch | jax.Array]:
        """Yields what `load` turns into the batch of each step.

        Args:
            rows: int32 [steps, batch]: which image stands where; -1 fills up.
        """
        rows = self._even(rows)
        if self.data is not None:
            yield from jax.device_put(list(rows), self._by_row)
            return
        if len(rows) == 1:  # nothing to read ahead; each new thread may cost a heap of its own
            yield self._read(rows[0])
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Future[Batch]] = deque()
            for step in rows:
                waiting.append(pool.submit(self._read, step))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def feed_together(self, rows: np.ndarray, together: int) -> Iterator[jax.Array]:
        """Yields the feeds of many steps as one array, where the data set is on the devices.

        Args:
            rows: int32 [steps, batch], as for `feed`; steps is a multiple of together.
            together: feeds in an array.

        Yields:
            int32 [together, batch].
        """
        rows = self._even(rows)
        groups = rows.reshape(-1, together, rows.shape[1])
        yield from jax.device_put(list(groups), NamedSharding(self.mesh, PartitionSpec(None, AXIS)))

    def _even(self, rows: np.ndarray) -> np.ndarray:
        """Fills rows up with -1 until the devices have equally many."""
        short = -rows.shape[1] % self.mesh.size
        return np.pad(rows, ((0, 0), (0, short)), constant_values=-1)

    def _read(self, rows: np.ndarray) -> Batch:
        at = np.maximum(rows, 0)
        images, labels, viral = jax.tree.map(lambda x: x[at], self._set)
        return Batch(*jax.device_put((images, labels, rows >= 0, viral), self._by_row))
