"""Finds the lungs in radiographs and crops the images to the lungs.

A classifier of whole images also learns their framing: how much of the body they show, and where.
Framing differs between collections more than anything else. A crop to the lungs removes this
difference. The lung finder is the network `cnnjax.networks.LungFinder`; `experiments/lungs.py`
trains it, and its weights are part of the package.

The functions that take a `jax.Array` are pure, so an exported program can include them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from cnnjax.crop import crop
from cnnjax.errors import InputError
from cnnjax.machine import devices
from cnnjax.machine.host import cpu_cores
from cnnjax.networks import LungFinder
from cnnjax.networks.variables import unflatten

PyTree = Any

FILM = 224
"""Side length in pixels to which images are decoded before the crop."""

SIDE = 96
"""Side length in pixels of the lung finder's input."""

MARGIN = 0.1
"""Margin on each side of the lungs, as a fraction of the box's side; it ends at the image edge."""

SHIPPED = Path(__file__).parent / "released" / "lungs.npz"
"""File of the finder's weights."""

_EDGE = 0.02  # fraction of a row or column that is lung at the edge of the box
_SMALLEST, _SURE, _VAGUE = 0.06, 0.8, 0.5  # see `lungs_found`
_LEAST_WIDTH, _LEAST_HEIGHT = 0.35, 0.25
_FEW = 8  # up to this number of images, a program with a smaller batch is used


class Framed(NamedTuple):
    """Images cropped to the lungs."""

    images: Any
    """uint8 [n, size, size]."""
    boxes: Any
    """float32 [n, 4]: left, top, right and bottom of the crop, as fractions of the image's sides.
    The box is the whole image if no lungs were found."""
    found: Any
    """bool [n], whether lungs were found."""


def as_framed(images: np.ndarray) -> Framed:
    """Returns images uint8 [n, size, size] unchanged, as a `Framed` with whole boxes, all found."""
    whole = np.tile(np.array([0, 0, 1, 1], np.float32), (len(images), 1))
    return Framed(images, whole, np.ones(len(images), bool))


def frame(variables: PyTree, films: jax.Array, size: int) -> Framed:
    """Finds the lungs and crops the images to them; a pure function, for jit and for export.

    `Framer` crops on the host instead. The two differ by one gray level in a few of 100,000 pixels.

    Args:
        variables: variables of the `LungFinder`.
        films: images, uint8 [n, height, width].
        size: side length of the cropped images, in pixels.
    """
    boxes, found = crop_boxes(variables, films)
    images = resample(films.astype(jnp.float32), boxes, size)
    return Framed(jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8), boxes, found)


def crop_boxes(variables: PyTree, films: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `boxes` and `found` of `Framed`; a pure function, for jit.

    Args:
        variables: variables of the `LungFinder`.
        films: images, uint8 [n, height, width].
    """
    probabilities = lung_maps(variables, films)
    found = lungs_found(probabilities)
    boxes = with_margin(lung_boxes(probabilities), MARGIN)
    whole = jnp.array([0.0, 0.0, 1.0, 1.0], jnp.float32)
    return jnp.where(found[:, None], boxes, whole), found


def lung_maps(variables: PyTree, films: jax.Array) -> jax.Array:
    """Returns a map of the probability of lung, float32 [n, SIDE / 2, SIDE / 2], for each image.

    Args:
        variables: variables of the `LungFinder`.
        films: images, uint8 [n, height, width].
    """
    whole = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0], jnp.float32), (films.shape[0], 4))
    small = jnp.round(resample(films.astype(jnp.float32), whole, SIDE)) / 255
    logits = finder_of(variables).apply(variables, small[..., None], train=False)
    return jax.nn.sigmoid(logits)


def finder_of(variables: PyTree) -> LungFinder:
    """Returns the `LungFinder` that has these variables."""
    return LungFinder(width=variables["params"]["head"]["kernel"].shape[0])


def lung_boxes(probabilities: jax.Array) -> jax.Array:
    """Returns the box around the lungs, float32 [n, 4]: left, top, right, bottom in [0, 1].

    The box reaches from the first to the last row and column in which at least 2 % are lung; the
    position of each side is interpolated between rows or columns of the map.

    Args:
        probabilities: probability of lung, [n, rows, columns].
    """
    lung = jax.nn.sigmoid(12 * (probabilities - 0.5))  # nearly 0 or 1, and smooth between
    left, right = _ends(lung.mean(1))
    top, bottom = _ends(lung.mean(2))
    return jnp.stack([left, top, right, bottom], axis=1)


def _ends(share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where each profile of [n, length] first and last passes `_EDGE`, in [0, 1]."""
    length = share.shape[1]
    # Edge padding: a lung that reaches the edge of the image ends there.
    padded = jnp.pad(share, ((0, 0), (1, 1)), mode="edge")
    first = jnp.argmax(padded >= _EDGE, axis=1)
    last = length + 1 - jnp.argmax(padded[:, ::-1] >= _EDGE, axis=1)

    def at(i: jax.Array) -> jax.Array:
        value: jax.Array = jnp.take_along_axis(padded, i[:, None], axis=1)[:, 0]
        return value

    def passed(inner: jax.Array, outer: jax.Array) -> jax.Array:
        rise = jnp.maximum(at(inner) - at(outer), 1e-6)
        return (at(inner) - _EDGE) / rise

    outer = jnp.maximum(first - 1, 0)
    low = first.astype(share.dtype) - 0.5 - passed(first, outer)
    outer = jnp.minimum(last + 1, length + 1)
    high = last.astype(share.dtype) - 0.5 + passed(last, outer)
    low = jnp.where(first == 0, 0, low) / length
    high = jnp.where(last == length + 1, length, high) / length
    return jnp.clip(low, 0, 1), jnp.clip(high, 0, 1)


def lungs_found(probabilities: jax.Array) -> jax.Array:
    """Returns bool [n], whether the maps show the lungs of a frontal chest radiograph.

    The criteria are: enough pixels are lung, their mean probability is high, few pixels have an
    intermediate probability, and the box is at least as wide and high as lungs are.

    Args:
        probabilities: probability of lung, [n, rows, columns].
    """
    lung = probabilities > 0.5
    area = lung.mean((1, 2))
    sure = jnp.where(lung, probabilities, 0).mean((1, 2)) / jnp.maximum(area, 1e-6)
    maybe = (probabilities > 0.15).mean((1, 2))
    vague = ((probabilities > 0.15) & (probabilities < 0.85)).mean((1, 2))
    left, top, right, bottom = lung_boxes(probabilities).T
    return (
        (area >= _SMALLEST)
        & (sure >= _SURE)
        & (vague <= _VAGUE * maybe)
        & (right - left >= _LEAST_WIDTH)
        & (bottom - top >= _LEAST_HEIGHT)
    )


def with_margin(boxes: jax.Array, margin: float) -> jax.Array:
    """Widens boxes [n, 4] in each direction by `margin` times their sides, limited to [0, 1]."""
    low, high = boxes[:, :2], boxes[:, 2:]
    by = margin * (high - low)
    return jnp.clip(jnp.concatenate([low - by, high + by], axis=1), 0, 1)


def resample(films: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """Resizes a box of each image to a square, like Pillow with `Resampling.HAMMING` and a box.

    Args:
        films: images, float32 [n, height, width].
        boxes: float32 [n, 4], left, top, right and bottom, as fractions of the image's sides.
        size: side length of the squares, in pixels.

    Returns:
        float32 [n, size, size].
    """
    height, width = films.shape[1:]
    rows = _weights(boxes[:, 1] * height, boxes[:, 3] * height, height, size)
    columns = _weights(boxes[:, 0] * width, boxes[:, 2] * width, width, size)
    full = jax.lax.Precision.HIGHEST
    squeezed = jnp.einsum("nrh,nhw->nrw", rows, films, precision=full)
    return jnp.einsum("nrw,ncw->nrc", squeezed, columns, precision=full)


def _weights(low: jax.Array, high: jax.Array, length: int, size: int) -> jax.Array:
    """Returns float32 [n, size, length], the weight of each pixel in each resampled pixel."""
    scale = (high - low) / size
    support = jnp.maximum(scale, 1)[:, None, None]
    centre = low[:, None] + (jnp.arange(size, dtype=low.dtype) + 0.5) * scale[:, None]
    at = jnp.arange(length, dtype=low.dtype) + 0.5
    x = (at - centre[..., None]) / support
    weights = jnp.where(jnp.abs(x) < 1, jnp.sinc(x) * (0.54 + 0.46 * jnp.cos(jnp.pi * x)), 0)
    return weights / weights.sum(-1, keepdims=True)


def put_back(maps: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Returns maps of cropped images at their position in the whole images, zero elsewhere.

    Args:
        maps: float32 [n, height, width].
        boxes: float32 [n, 4], the box of each crop; see `Framed`.
        size: side length of the whole images, in pixels.

    Returns:
        float32 [n, size, size].
    """
    whole = np.zeros((len(maps), size, size), np.float32)
    for i, (values, box) in enumerate(zip(maps, boxes, strict=True)):
        left, top, right, bottom = np.rint(np.asarray(box) * size).astype(int)
        inner = Image.fromarray(values).resize((right - left, bottom - top))
        whole[i, top:bottom, left:right] = np.asarray(inner)
    return whole


def read(path: Path = SHIPPED) -> PyTree:
    """Returns the lung finder's Flax variables, float32, from an .npz file.

    Args:
        path: a file written by `experiments/lungs.py`; by default the one in the package.

    Raises:
        InputError: the file is missing or damaged.
    """
    return _read(path)[0]


@functools.cache
def _read(path: Path) -> tuple[PyTree, str]:
    try:
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            tree = jax.tree.map(lambda x: x.astype(np.float32), unflatten(file))
        finder_of(tree)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        mend = "reinstall cnnjax" if path == SHIPPED else "train one with experiments/lungs.py"
        raise InputError(f"{path} holds no valid lung finder ({error}); {mend}") from None
    return tree, hashlib.sha256(data).hexdigest()


def version() -> str:
    """Returns a text that identifies the weights and settings of `frame`, as a key for caches."""
    return f"{_read(SHIPPED)[1][:16]} {FILM} {SIDE} {MARGIN} {_EDGE}"


class Framer:
    """Crops many images to the lungs with the package's lung finder, in batches.

    Args:
        size: side length of the cropped images, in pixels.
        mesh: the devices; each batch is sharded over them.
    """

    def __init__(self, size: int, mesh: Mesh) -> None:
        self.size, self._mesh = size, mesh
        self._variables = jax.device_put(read(), devices.replicated(mesh))

    def __call__(self, films: np.ndarray) -> Framed:
        """Returns the cropped images, as NumPy arrays.

        Args:
            films: images, uint8 [n, height, width]; may be memory-mapped.
        """
        return Framed(*map(np.concatenate, zip(*self.by_batch(films), strict=True)))

    def by_batch(
        self, films: np.ndarray, boxed: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Iterator[Framed]:
        """Yields the cropped images of one batch after another; each image is read once.

        Args:
            films: images, uint8 [n, height, width]; any object that is sliced like an array.
            boxed: `boxes` and `found` of `Framed`, if they are known.
        """
        size = self.size
        with ThreadPoolExecutor(cpu_cores()) as pool:
            program = None if boxed else _boxing(self._mesh)
            for rows, some, outputs in self._by_batch(program, films):
                boxes, found = [x[rows] for x in boxed] if boxed else outputs
                crops = list(pool.map(crop, some, boxes, [size] * len(some)))
                yield Framed(np.array(crops, np.uint8).reshape(-1, size, size), boxes, found)

    def maps(self, films: np.ndarray) -> np.ndarray:
        """Returns the probability of lung at each pixel, float32 [n, height, width].

        Args:
            films: images, uint8 [n, height, width].
        """
        each = self._by_batch(_mapping(self._mesh), films)
        found = np.concatenate([maps for _, _, (maps,) in each])
        side, smooth = films.shape[1:][::-1], Image.Resampling.BILINEAR
        large = [np.asarray(Image.fromarray(x).resize(side, smooth)) for x in found]
        return np.array(large, np.float32).reshape(films.shape)

    def _by_batch(
        self, program: Any, films: np.ndarray
    ) -> Iterator[tuple[slice, np.ndarray, list[np.ndarray]]]:
        """Yields the rows of each batch, their images, and the outputs of the program, if any."""
        # A smaller program has a shorter latency for a few images.
        most = _FEW if len(films) <= _FEW else devices.traits(self._mesh).framed
        most = -(-most // self._mesh.size) * self._mesh.size
        for start in range(0, max(1, len(films)), most):
            rows = slice(start, start + most)
            some = np.asarray(films[rows])
            outputs = []
            if program is not None:
                filled = np.pad(some, ((0, most - len(some)), (0, 0), (0, 0)))
                with devices.full_float32(self._mesh):
                    batch = jax.device_put(filled, devices.divided(self._mesh))
                    outputs = jax.device_get(program(self._variables, batch))
            yield rows, some, [x[: len(some)] for x in outputs]


@functools.lru_cache(maxsize=8)
def _boxing(mesh: Mesh) -> Any:
    return jax.jit(crop_boxes, out_shardings=devices.divided(mesh))


@functools.lru_cache(maxsize=8)
def _mapping(mesh: Mesh) -> Any:
    def maps(variables: PyTree, films: jax.Array) -> tuple[jax.Array]:
        return (lung_maps(variables, films),)

    return jax.jit(maps, out_shardings=devices.divided(mesh))
