"""Makes the batch of a step from (seed, step); there is no iterator state, so any step can be next.

The order of the images is a function of the run's key and the step number. A data set that fits on
the device stays there, and the compiled step gathers each batch. A larger data set is read from the
memory-mapped cache, a few batches ahead; one that is too large for the cache is decoded by worker
processes (`cnnjax.data.onthefly`). The three ways give the same batches to the bit. With several
processes, each process holds a part of the data set, or reads its part of each batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.data.onthefly import Films, Workers
from cnnjax.machine.devices import AXIS, divided, place, replicated
from cnnjax.objectives import Batch

_AHEAD = 2  # number of batches that are prepared ahead


class Resident(NamedTuple):
    """A data set in device memory."""

    images: jax.Array
    """uint8 [n, height, width]. With several processes, sharded over all devices, and padded to a
    multiple of their number."""
    labels: jax.Array
    """int32 [n]."""
    auxiliary: jax.Array | None = None
    """int32 [n]; see `cnnjax.objectives.Batch`."""
    weights: jax.Array | None = None
    """float32 [n]; see `cnnjax.objectives.Batch`."""


def step_rows(key: jax.Array, steps: range, rows: np.ndarray, batch: int) -> np.ndarray:
    """Returns the rows of the images in the batches of some steps.

    Training reads an endless stream: one permutation of the images after another. Step s takes
    `batch` images of the stream, from position s * batch. Every batch is therefore full, and the
    number of times that two images have been seen differs by at most one.

    Args:
        key: the run's key for the order of the images.
        steps: step numbers; the first step of the run is 0.
        rows: int [n], the rows in the data set of the images to train on.
        batch: images per step.

    Returns:
        int32 [len(steps), batch].
    """
    first, last = steps.start * batch // len(rows), (steps.stop * batch - 1) // len(rows)
    orders = [
        np.asarray(jax.random.permutation(jax.random.fold_in(key, k), len(rows)))
        for k in range(first, last + 1)
    ]
    start = steps.start * batch - first * len(rows)
    stream = np.concatenate([np.zeros(0, np.int32), *orders])[start:][: len(steps) * batch]
    return rows[stream].astype(np.int32).reshape(len(steps), batch)


def in_batches(rows: np.ndarray, batch: int) -> np.ndarray:
    """Splits int32 [n] into int32 [ceil(n / batch), batch]; the last batch is filled with -1."""
    steps = -(-len(rows) // batch)
    return np.pad(rows, (0, steps * batch - len(rows)), constant_values=-1).reshape(steps, batch)


def load(data: Resident | None, feed: Batch | jax.Array, mesh: Mesh | None = None) -> Batch:
    """Returns the batch of a step; a pure function, for use inside jit.

    Args:
        data: the data set on the device, or None if it is streamed.
        feed: an item of `Feeder.feed`: rows of `data`, or the batch itself.
        mesh: the devices that the feed is on; needed only with several processes.
    """
    if isinstance(feed, Batch):
        return feed
    assert data is not None
    at = jnp.maximum(feed, 0)
    images, *others = data

    def rows(x: jax.Array) -> jax.Array:
        return x.at[at].get(mode="promise_in_bounds")

    if mesh is not None and mesh.is_multi_process:
        return Batch(_gathered(images, at, mesh), *jax.tree.map(rows, others))
    return Batch(*jax.tree.map(rows, (images, *others)))


def _gathered(images: jax.Array, at: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns rows of a data set that is sharded over the devices; the result is sharded likewise.

    Each device takes the rows that it holds, with zeros for the others; the sum over the devices is
    the batch. Without this function, the compiler might copy the whole data set to every device.

    Args:
        images: uint8 [n, height, width], sharded.
        at: int32 [batch], replicated.
        mesh: the devices.
    """

    def part(held: jax.Array, at: jax.Array) -> jax.Array:
        local = at - jax.lax.axis_index(AXIS) * len(held)
        mine = (local >= 0) & (local < len(held))
        rows = held.at[jnp.where(mine, local, 0)].get(mode="promise_in_bounds")
        rows = jnp.where(mine[:, None, None], rows, 0)
        return jax.lax.psum_scatter(rows, AXIS, tiled=True)

    divided = PartitionSpec(AXIS)
    return jax.shard_map(part, mesh=mesh, in_specs=(divided, PartitionSpec()), out_specs=divided)(
        images, at
    )


class Feeder:
    """Feeds the images of a data set to the devices of a mesh, each batch sharded over them.

    Args:
        images: uint8 [n, height, width]; may be memory-mapped, or decoded when they are read.
        labels: int32 [n].
        mesh: the devices.
        resident_mib: largest size, in MiB per device, of a data set that is kept in device memory;
            below 0, data sets are always streamed.
        auxiliary: int32 [n], see `cnnjax.objectives.Batch`; None if there are none.
        weights: float32 [n], see `cnnjax.objectives.Batch`; None if there are none.
        workers: number of processes that decode images which are neither resident nor cached; with
            0, threads of this process do. They run until `close`.

    Attributes:
        mesh: the devices.
        side: side of an image, in pixels.
        data: the data set on the devices, or None if it is streamed.
    """

    def __init__(
        self,
        images: np.ndarray | Films,
        labels: np.ndarray,
        mesh: Mesh,
        resident_mib: int,
        auxiliary: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        workers: int = 0,
    ) -> None:
        self.mesh, self.side = mesh, images.shape[1]
        self._images, self._others = images, (labels, auxiliary, weights)
        self._by_row = divided(mesh)
        self._workers: Workers | None = None
        self.data: Resident | None = None
        if resident_bytes(images, mesh) <= resident_mib * 2**20:
            if mesh.is_multi_process:
                held = _divided(images, mesh)
            else:
                held = jax.device_put(np.asarray(images), replicated(mesh))
            self.data = Resident(held, *place(self._others, replicated(mesh)))
        elif isinstance(images, Films) and workers:
            self._workers = Workers(images, workers)

    def close(self) -> None:
        """Ends the worker processes, if there are any; the feeder stays usable."""
        if self._workers is not None:
            self._workers.close()

    def feed(self, rows: np.ndarray) -> Iterator[Batch | jax.Array]:
        """Yields one item for each step, from which `load` makes the batch.

        Args:
            rows: int32 [steps, batch], the row of each image of each batch; -1 stands for padding
                in a batch of an evaluation.
        """
        rows = self._even(rows)
        if self.data is not None:
            yield from place(list(rows), self._at)
            return
        mine = rows[:, self._mine(rows.shape[1])]
        if self._workers is not None:
            parts = self._workers.batches(mine)
        else:
            parts = (self._images[np.maximum(some, 0)] for some in mine)
        pairs = zip(rows, parts, strict=True)
        if len(rows) == 1 and self._workers is None:
            # Nothing to read ahead; a thread may allocate its own heap.
            yield self._placed(*next(pairs))
            return
        done = False
        pool = ThreadPoolExecutor(1)
        try:
            waiting: deque[Future[Batch]] = deque()
            for _ in rows:
                waiting.append(pool.submit(lambda: self._placed(*next(pairs))))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            done = True
        finally:
            pool.shutdown(cancel_futures=True)
            if not done:
                self.close()  # what the workers have prepared is not for the next feed

    def feed_together(self, rows: np.ndarray, together: int) -> Iterator[jax.Array]:
        """Yields the feeds of several steps as one array, for a data set on the devices.

        Args:
            rows: int32 [steps, batch], as for `feed`; steps is a multiple of together.
            together: number of feeds in an array.

        Yields:
            int32 [together, batch].
        """
        rows = self._even(rows)
        groups = rows.reshape(-1, together, rows.shape[1])
        yield from place(
            list(groups), NamedSharding(self.mesh, PartitionSpec(None, *self._at.spec))
        )

    @property
    def _at(self) -> NamedSharding:
        """Sharding of rows of a resident data set; replicated if the data set is sharded."""
        return replicated(self.mesh) if self.mesh.is_multi_process else self._by_row

    def _even(self, rows: np.ndarray) -> np.ndarray:
        """Pads rows with -1 to a multiple of the number of devices."""
        short = -rows.shape[1] % self.mesh.size
        return np.pad(rows, ((0, 0), (0, short)), constant_values=-1)

    def _mine(self, batch: int) -> np.ndarray:
        """Returns the places in a batch of the images for the devices of this process."""
        slices = self._by_row.addressable_devices_indices_map((batch,)).values()
        return np.sort(np.concatenate([np.arange(batch)[part] for part in slices]))

    def _placed(self, rows: np.ndarray, images: np.ndarray) -> Batch:
        """Puts a batch on the devices.

        Args:
            rows: int32 [batch], the rows of its images.
            images: uint8 [part, height, width], the images for the devices of this process.
        """
        at = np.maximum(rows, 0)
        others = [None if x is None else x[at] for x in self._others]
        if not self.mesh.is_multi_process:
            return Batch(*jax.device_put((images, *others), self._by_row))
        shape = len(rows), *images.shape[1:]
        whole = jax.make_array_from_process_local_data(self._by_row, images, shape)
        return Batch(whole, *place(others, self._by_row))


def resident_bytes(images: np.ndarray | Films, mesh: Mesh) -> int:
    """Returns the number of bytes that the images take on each device."""
    return -(-images.nbytes // mesh.size) if mesh.is_multi_process else images.nbytes


def _divided(images: np.ndarray | Films, mesh: Mesh) -> jax.Array:
    """Shards uint8 [n, height, width] over the devices; each process reads only its own part."""
    each = -(-len(images) // mesh.size)

    def part(at: Any) -> np.ndarray:
        some = np.asarray(images[at[0]])
        return np.pad(some, ((0, each - len(some)), (0, 0), (0, 0)))

    shape = (each * mesh.size, *images.shape[1:])
    return jax.make_array_from_callback(shape, divided(mesh), part)
