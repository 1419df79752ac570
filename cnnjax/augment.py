"""Random changes to training images, inside the compiled step: (key, images) -> images.

Each image draws from its own key, folded with its number in the batch, so neither the number of
devices nor of the rows that fill up the batch changes what it draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnnjax.config import AugmentConfig

Augment = Callable[..., Any]
"""(key, images) -> images, or (key, images, maps) -> (images, maps)."""
Views = Callable[[jax.Array, jax.Array], jax.Array]


class _Draws(NamedTuple):
    """What decides how an image is changed: numbers drawn evenly from [0, 1).

    All are drawn whatever the config uses, in one go: another change more or less leaves the others
    as they are, and a program with one generator is compiled sooner than with one for each.
    """

    shear: jax.Array
    zoom_rows: jax.Array
    zoom_columns: jax.Array
    rotate: jax.Array
    shift_rows: jax.Array
    shift_columns: jax.Array
    flip: jax.Array
    black: jax.Array
    crop_area: jax.Array
    crop_aspect: jax.Array
    crop_row: jax.Array
    crop_column: jax.Array
    sharpness: jax.Array
    gamma: jax.Array
    contrast: jax.Array
    brightness: jax.Array
    noise: jax.Array
    erase: jax.Array
    erase_area: jax.Array
    erase_aspect: jax.Array
    erase_row: jax.Array
    erase_column: jax.Array


def make_augment(config: AugmentConfig) -> Augment:
    """Returns the pure function (key, images) -> images that the config describes.

    Images are float32 [batch, height, width, 1] in [0, 1], before and after. What the config has at
    zero is left out of the compiled program. Given maps of that shape as a third argument, the
    function returns (images, maps): maps are moved as the images are, are zero beyond the edge, and
    are not changed otherwise.
    """
    moves = (config.shear, config.zoom, config.rotate, config.shift, config.flip, config.crop < 1)

    def augment_one(
        key: jax.Array, image: jax.Array, maps: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        count = len(_Draws._fields)
        draws = _Draws(*jax.random.uniform(key, (count,)))
        if any(moves):
            matrix = _random_affine(draws, config, (image.shape[0], image.shape[1]))
            moved = affine(image[..., 0], matrix)
            if config.black:
                fill = (draws.black < config.black) & _outside(matrix, moved.shape)
                moved = jnp.where(fill, 0, moved)
            image = moved[..., None]
            if maps is not None:
                outside = _outside(matrix, moved.shape)
                maps = jnp.where(outside, 0, affine(maps[..., 0], matrix))[..., None]
        if config.sharpness:
            image = _sharpened(image, _within(draws.sharpness, config.sharpness))
        if config.gamma:
            # A power as XLA vectorises it on a CPU; black stays black, exp(-inf).
            image = jnp.exp(jnp.log(image) * jnp.exp(_within(draws.gamma, config.gamma)))
        if config.contrast or config.brightness:
            mean = image.mean()
            image = mean + (image - mean) * (1 + _within(draws.contrast, config.contrast))
            image = jnp.clip(image + _within(draws.brightness, config.brightness), 0, 1)
        if config.noise:
            pixels = jax.random.fold_in(key, count)  # the numbers before are those of the draws
            grain = jax.random.normal(pixels, image.shape, image.dtype)
            image = jnp.clip(image + draws.noise * config.noise * grain, 0, 1)
        if config.erase:
            image = _randomly_erased(image, draws, config.erase)
        return image, maps

    def augment(key: jax.Array, images: jax.Array, maps: jax.Array | None = None) -> Any:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(images.shape[0]))
        images, moved = jax.vmap(augment_one)(keys, images, maps)
        return images if maps is None else (images, moved)

    return augment


def make_views(config: AugmentConfig, count: int) -> Views:
    """Returns the pure function (key, images) -> views, for test-time augmentation.

    Images are float32 [batch, height, width, 1], views [batch, count, height, width, 1]: each image
    under `count` draws of the augmentation, which are the same for all images. A single view is the
    image as it is.
    """
    augment = make_augment(config)

    def views(key: jax.Array, images: jax.Array) -> jax.Array:
        def of_one(image: jax.Array) -> jax.Array:
            return augment(key, jnp.broadcast_to(image, (count, *image.shape)))

        return jax.vmap(of_one)(images)

    return unchanged if count == 1 else views


def unchanged(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the images [batch, ...] as the one view [batch, 1, ...] of each."""
    del key
    return images[:, None]


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Resamples an image under an affine map, bilinearly; beyond the edge the edge goes on.

    The same as `scipy.ndimage.affine_transform(image, matrix, order=1, mode="nearest")`, and thus
    as the warp of Keras's `ImageDataGenerator`.

    Args:
        image: float [height, width].
        matrix: [2, 3]; maps an output pixel (row, column, 1) to the input place it is read from.

    Returns:
        float [height, width].
    """
    height, width = image.shape
    row, column = _places(matrix, image.shape)
    row = jnp.clip(row, 0, height - 1)
    column = jnp.clip(column, 0, width - 1)
    return jax.lax.platform_dependent(
        image, row, column, tpu=resample_by_products, default=resample_by_reads
    )


def resample_by_reads(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Interpolates an image bilinearly at places within it, reading the pixels around each.

    Args:
        image: float [height, width].
        row: [rows, columns] of places, in [0, height - 1].
        column: the same, in [0, width - 1].

    Returns:
        float [rows, columns].
    """
    height, width = image.shape
    top = jnp.floor(row).astype(jnp.int32)
    left = jnp.floor(column).astype(jnp.int32)
    down = row - top.astype(image.dtype)
    right = column - left.astype(image.dtype)
    below = jnp.minimum(top + 1, height - 1)
    # One read of a complex number brings a pixel and its right neighbour.
    pairs = jax.lax.complex(image, jnp.pad(image[:, 1:], ((0, 0), (0, 1)), mode="edge")).reshape(-1)
    upper = _read(pairs, top * width + left)
    lower = _read(pairs, below * width + left)
    upper = _mix(upper.real, upper.imag, right)
    lower = _mix(lower.real, lower.imag, right)
    return _mix(upper, lower, down)


def resample_by_products(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """The same as `resample_by_reads`, as a matrix product, for a TPU: it reads pixels one by one.

    Each place has a weight for every pixel, nearly always zero; XLA makes them up on the way and
    writes none down. Of a step of `experiments/pneumonia.py` on a TPU v5e it counts 0.44 GB of
    memory traffic, with reads 7.5 (compiled, not run: `benchmarks/ahead.py`).
    """
    across = _tent(column[..., None], image.shape[1])
    down = _tent(row[..., None], image.shape[0])
    lines = jnp.einsum("rcj,ij->rci", across, image, precision=jax.lax.Precision.HIGHEST)
    return (lines * down).sum(-1)


def _tent(at: jax.Array, length: int) -> jax.Array:
    """Returns the bilinear weight of each of `length` pixels at a place: 1 there, 0 from 1 away."""
    return jnp.maximum(0, 1 - jnp.abs(at - jnp.arange(length, dtype=at.dtype)))


def _places(matrix: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns row and column, [height, width] each, that every pixel is read from."""
    rows, columns = jnp.meshgrid(*(jnp.arange(n, dtype=matrix.dtype) for n in shape), indexing="ij")
    row = matrix[0, 0] * rows + matrix[0, 1] * columns + matrix[0, 2]
    return row, matrix[1, 0] * rows + matrix[1, 1] * columns + matrix[1, 2]


def _outside(matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns bool [height, width], where `affine` reads from beyond the image's edge."""
    row, column = _places(matrix, shape)
    within = (row > -0.5) & (row < shape[0] - 0.5) & (column > -0.5) & (column < shape[1] - 0.5)
    return ~within


def keras_affine(
    shear: jax.Array, zoom: jax.Array, rotate: jax.Array, shift: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Returns the matrix that Keras's `apply_affine_transform` resamples with, about the centre.

    It is rotation @ shift @ shear @ zoom in homogeneous (row, column) coordinates.

    Args:
        shear: angle, in radians.
        zoom: [2], input over output size for height and width; above 1 the image shrinks.
        rotate: angle, in radians.
        shift: [2], rows and columns, in pixels.
        size: (height, width) of the image.

    Returns:
        float32 [2, 3], for `affine`.
    """
    turn = jnp.array([[jnp.cos(rotate), -jnp.sin(rotate)], [jnp.sin(rotate), jnp.cos(rotate)]])
    slant = jnp.array([[1.0, -jnp.sin(shear)], [0.0, jnp.cos(shear)]])
    linear = _matmul(_matmul(turn, slant), jnp.diag(zoom))
    centre = (jnp.array(size, jnp.float32) - 1) / 2
    offset = _matmul(turn, shift) + centre - _matmul(linear, centre)
    return jnp.concatenate([linear, offset[:, None]], axis=1)


def _random_affine(draws: _Draws, config: AugmentConfig, size: tuple[int, int]) -> jax.Array:
    """Returns a random shear, zoom, rotation, shift, flip and crop, as one matrix for `affine`."""
    extent = jnp.array(size, jnp.float32)
    zoom = jnp.stack([draws.zoom_rows, draws.zoom_columns])
    shift = jnp.stack([draws.shift_rows, draws.shift_columns])
    matrix = keras_affine(
        jnp.deg2rad(_within(draws.shear, config.shear)),
        1 + _within(zoom, config.zoom),
        jnp.deg2rad(_within(draws.rotate, config.rotate)),
        _within(shift, config.shift) * extent,
        size,
    )
    if config.flip:
        # Keras warps, then mirrors: output column c shows what stood at width - 1 - c.
        mirror = jnp.array([[1.0, 0.0, 0.0], [0.0, -1.0, size[1] - 1.0], [0.0, 0.0, 1.0]])
        matrix = jnp.where(draws.flip < 0.5, _matmul(matrix, mirror), matrix)
    if config.crop < 1:
        sides = _sides(config.crop + (1 - config.crop) * draws.crop_area, draws.crop_aspect, 4 / 3)
        # Pixels are squares whose edges, not centres, the window's edges meet.
        corner = jnp.stack([draws.crop_row, draws.crop_column]) * (1 - sides) * extent
        window = jnp.concatenate([jnp.diag(sides), (corner + (sides - 1) / 2)[:, None]], axis=1)
        matrix = _matmul(matrix, jnp.concatenate([window, jnp.array([[0.0, 0.0, 1.0]])]))
    return matrix


def _sides(area: jax.Array, draw: jax.Array, extreme: float) -> jax.Array:
    """Returns height and width, [2], of a part of an image, with a random aspect ratio.

    Args:
        area: of the part, where the image's is 1.
        draw: what decides the ratio, in [0, 1).
        extreme: the greatest ratio of the sides; the image's sides bound it too.
    """
    stretch = jnp.exp(_within(draw, math.log(extreme) / 2))
    return jnp.minimum(jnp.sqrt(area) * jnp.stack([stretch, 1 / stretch]), 1)


def _sharpened(image: jax.Array, amount: jax.Array) -> jax.Array:
    """Adds, or takes away, a part of what a binomial blur of five pixels takes away."""
    blurred = _blurred(_blurred(image, 0), 1)
    return jnp.clip(image + (image - blurred) * amount, 0, 1)


def _blurred(image: jax.Array, axis: int) -> jax.Array:
    """Blurs along an axis with the weights 1 4 6 4 1; beyond the edge the edge goes on."""
    ends = [(2, 2) if i == axis else (0, 0) for i in range(image.ndim)]
    wide = jnp.pad(image, ends, mode="edge")
    length = image.shape[axis]
    shifted = [jax.lax.slice_in_dim(wide, k, k + length, axis=axis) for k in range(5)]
    a, b, c, d, e = shifted
    return (a + e + 4 * (b + d) + 6 * c) / 16


def _randomly_erased(image: jax.Array, draws: _Draws, largest: float) -> jax.Array:
    """Fills a rectangle of an aspect ratio in [1/3, 3] with the image's mean, or does nothing."""
    sides = _sides(largest * draws.erase_area, draws.erase_aspect, 3)
    start = jnp.stack([draws.erase_row, draws.erase_column]) * (1 - sides)
    inside = draws.erase < 0.5
    for axis in (0, 1):
        n = image.shape[axis]
        at = (jnp.arange(n, dtype=image.dtype) + 0.5) / n
        within = (at >= start[axis]) & (at < start[axis] + sides[axis])
        inside = inside & jnp.expand_dims(within, (1 - axis, 2))
    return jnp.where(inside, image.mean(), image)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    # An accelerator's default rounds to 11 bits or 8: coordinates would be off by parts of a pixel.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _within(draw: jax.Array, bound: float) -> jax.Array:
    """Brings numbers of [0, 1) to [-bound, bound)."""
    return (2 * draw - 1) * bound


def _mix(a: jax.Array, b: jax.Array, part: jax.Array) -> jax.Array:
    return a + (b - a) * part


def _read(pixels: jax.Array, at: jax.Array) -> jax.Array:
    # The caller has clipped the places; saying so spares a comparison a pixel.
    return pixels.at[at].get(mode="promise_in_bounds")
