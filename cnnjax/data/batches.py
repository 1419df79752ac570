"""(seed, step) -> batch: no iterator, no state, so that any step can be the next.

The order of the images is a function of the run's key and the number of the step. A data set that
fits lives on the device as a whole and a batch is gathered there, inside the compiled step; a
larger one is read from the memory-mapped cache, a few batches ahead. Of several processes, each
holds a part of the data set, or reads its part of each batch.
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

from cnnjax.machine.devices import AXIS, divided, place, replicated
from cnnjax.objectives import Batch

_AHEAD = 2  # batches prepared while one is computed


class Resident(NamedTuple):
    """A data set on the device."""

    images: jax.Array
    """uint8 [n, height, width]; on several processes divided among all devices, and filled up to a
    multiple of their number."""
    labels: jax.Array
    """int32 [n]."""
    auxiliary: jax.Array | None = None
    """int32 [n], see `cnnjax.objectives.Batch`."""
    weights: jax.Array | None = None
    """float32 [n], likewise."""


def step_rows(key: jax.Array, steps: range, rows: np.ndarray, batch: int) -> np.ndarray:
    """Returns which image stands where in each of some steps.

    Training reads one endless stream: a permutation of the images, then another, and so on. Step s
    takes the images from s * batch on, so every batch is full, and no image is seen twice more
    often than another.

    Args:
        key: the run's key for the order of images.
        steps: their numbers, counted from the run's first step, 0.
        rows: int [n], the images to train on, by their place in the data set.
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
    """Cuts int32 [n] into int32 [ceil(n / batch), batch], filled up with -1."""
    steps = -(-len(rows) // batch)
    return np.pad(rows, (0, steps * batch - len(rows)), constant_values=-1).reshape(steps, batch)


def load(data: Resident | None, feed: Batch | jax.Array, mesh: Mesh | None = None) -> Batch:
    """Returns the batch that a step computes on; pure, to be called inside jit.

    Args:
        data: the data set on the device, or None where it is streamed.
        feed: what `Feeder.feed` gave: rows of `data`, or the batch itself.
        mesh: the devices that it was fed to; may be left out where they are one process's.
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
    """Returns rows of a data set that is divided among the devices, divided likewise.

    Each device picks those that it holds, with zeros for the others; their sum is the batch. Left
    to itself, the compiler might bring the whole data set to every device instead.

    Args:
        images: uint8 [n, height, width], divided.
        at: int32 [batch], on all devices.
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
    """Brings the images of a data set to the devices of a mesh, each batch divided among them.

    Args:
        images: uint8 [n, height, width]; may be memory-mapped.
        labels: int32 [n].
        mesh: the devices.
        resident_mib: up to this size, in MiB, the data set is put on each device whole, or, of
            several processes, its part; below 0 never.
        auxiliary: int32 [n], see `cnnjax.objectives.Batch`; None to leave it out.
        weights: float32 [n], likewise.

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
        auxiliary: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.mesh, self.side = mesh, images.shape[1]
        self._set = images, labels, auxiliary, weights
        self._by_row = divided(mesh)
        self.data: Resident | None = None
        if resident_bytes(images, mesh) <= resident_mib * 2**20:
            if mesh.is_multi_process:
                held = _divided(images, mesh)
            else:
                held = jax.device_put(np.asarray(images), replicated(mesh))
            self.data = Resident(held, *place((labels, auxiliary, weights), replicated(mesh)))

    def feed(self, rows: np.ndarray) -> Iterator[Batch | jax.Array]:
        """Yields what `load` turns into the batch of each step.

        Args:
            rows: int32 [steps, batch]: which image stands where; -1 for any, to fill up the batch
                of an evaluation.
        """
        rows = self._even(rows)
        if self.data is not None:
            yield from place(list(rows), self._at)
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
        yield from place(
            list(groups), NamedSharding(self.mesh, PartitionSpec(None, *self._at.spec))
        )

    @property
    def _at(self) -> NamedSharding:
        """Where rows of a resident data set go: to all devices, where each holds a part of it."""
        return replicated(self.mesh) if self.mesh.is_multi_process else self._by_row

    def _even(self, rows: np.ndarray) -> np.ndarray:
        """Fills rows up with -1 until the devices have equally many."""
        short = -rows.shape[1] % self.mesh.size
        return np.pad(rows, ((0, 0), (0, short)), constant_values=-1)

    def _read(self, rows: np.ndarray) -> Batch:
        at = np.maximum(rows, 0)
        if not self.mesh.is_multi_process:
            return Batch(*jax.device_put(jax.tree.map(lambda x: x[at], self._set), self._by_row))

        def part(whole: np.ndarray) -> jax.Array:
            """Reads those rows that this process's devices get."""

            def rows(i: Any) -> np.ndarray:
                return whole[at[i[0]]]

            return jax.make_array_from_callback((len(at), *whole.shape[1:]), self._by_row, rows)

        return Batch(*jax.tree.map(part, self._set))


def resident_bytes(images: np.ndarray, mesh: Mesh) -> int:
    """Returns the bytes that images take on each device."""
    return -(-images.nbytes // mesh.size) if mesh.is_multi_process else images.nbytes


def _divided(images: np.ndarray, mesh: Mesh) -> jax.Array:
    """Divides uint8 [n, height, width] among the devices; a process reads its own part."""
    each = -(-len(images) // mesh.size)

    def part(at: Any) -> np.ndarray:
        some = np.asarray(images[at[0]])
        return np.pad(some, ((0, each - len(some)), (0, 0), (0, 0)))

    shape = (each * mesh.size, *images.shape[1:])
    return jax.make_array_from_callback(shape, divided(mesh), part)
