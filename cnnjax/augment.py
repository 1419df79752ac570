"""Random augmentation of images inside the compiled step: (key, images) -> images.

Each image has its own random key: the key of the step, folded with the image's index in the batch.
The draws therefore do not depend on the number of devices or on padding rows in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnnjax.config import AugmentConfig

Augment = Callable[..., Any]
"""(key, images) -> images, or (key, images, maps) -> (images, maps); see `make_augment`."""
Views = Callable[[jax.Array, jax.Array], jax.Array]
"""(key, images [batch, ...]) -> views [batch, count, ...]."""


class _Draws(NamedTuple):
    """The random numbers that determine how an image is changed, uniform in [0, 1).

    All of them are drawn in one call, whatever the config uses. Enabling one change therefore does
    not affect the draws of the others, and one random generator compiles faster than several.
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

    Input and output images are float32 [batch, height, width, 1] in [0, 1]. Changes that the config
    disables are left out of the compiled program. The function accepts maps (such as lung masks) of
    the same shape as a third argument, and then returns (images, maps). The maps get only the
    geometric changes of the images, with zero padding.
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
            # A power in a form that XLA vectorizes on a CPU; black stays black, as exp(-inf) = 0.
            image = jnp.exp(jnp.log(image) * jnp.exp(_within(draws.gamma, config.gamma)))
        if config.contrast or config.brightness:
            mean = image.mean()
            image = mean + (image - mean) * (1 + _within(draws.contrast, config.contrast))
            image = jnp.clip(image + _within(draws.brightness, config.brightness), 0, 1)
        if config.noise:
            pixels = jax.random.fold_in(key, count)  # smaller numbers are used by the draws
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

    Images are float32 [batch, height, width, 1], views [batch, count, height, width, 1]. The views
    of an image are `count` random augmentations of it, with the same draws for all images. A single
    view is the unchanged image.

    Args:
        config: the augmentation.
        count: number of views of each image.
    """
    augment = make_augment(config)

    def views(key: jax.Array, images: jax.Array) -> jax.Array:
        def of_one(image: jax.Array) -> jax.Array:
            return augment(key, jnp.broadcast_to(image, (count, *image.shape)))

        return jax.vmap(of_one)(images)

    return unchanged if count == 1 else views


def unchanged(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the images [batch, ...] as views [batch, 1, ...], one unchanged view per image."""
    del key
    return images[:, None]


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Applies an affine map to an image, with bilinear interpolation and edge padding.

    Equivalent to `scipy.ndimage.affine_transform(image, matrix, order=1, mode="nearest")`, and
    therefore to the warp of Keras's `ImageDataGenerator`.

    Args:
        image: float [height, width].
        matrix: [2, 3]; maps an output pixel (row, column, 1) to its position in the input image.

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
    """Interpolates an image bilinearly at given positions, by reading the neighbouring pixels.

    Args:
        image: float [height, width].
        row: [rows, columns], row of each position, in [0, height - 1].
        column: [rows, columns], column of each position, in [0, width - 1].

    Returns:
        float [rows, columns].
    """
    height, width = image.shape
    top = jnp.floor(row).astype(jnp.int32)
    left = jnp.floor(column).astype(jnp.int32)
    down = row - top.astype(image.dtype)
    right = column - left.astype(image.dtype)
    below = jnp.minimum(top + 1, height - 1)
    # One read of a complex number returns a pixel and its right neighbour.
    pairs = jax.lax.complex(image, jnp.pad(image[:, 1:], ((0, 0), (0, 1)), mode="edge")).reshape(-1)
    upper = _read(pairs, top * width + left)
    lower = _read(pairs, below * width + left)
    upper = _mix(upper.real, upper.imag, right)
    lower = _mix(lower.real, lower.imag, right)
    return _mix(upper, lower, down)


def resample_by_products(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """The same as `resample_by_reads`, as a matrix product: for TPUs, which gather pixels slowly.

    Each position has a weight for every pixel, nearly always zero. XLA computes the weights inside
    the product and does not store them. A step of `experiments/pneumonia.py` on a TPU v5e has 0.44
    GB of memory traffic, and 7.5 GB with reads (compiled, not run: `benchmarks/ahead.py`).
    """
    across = _tent(column[..., None], image.shape[1])
    down = _tent(row[..., None], image.shape[0])
    lines = jnp.einsum("rcj,ij->rci", across, image, precision=jax.lax.Precision.HIGHEST)
    return (lines * down).sum(-1)


def _tent(at: jax.Array, length: int) -> jax.Array:
    """Returns the bilinear weight of each of `length` pixels: max(0, 1 - distance from `at`)."""
    return jnp.maximum(0, 1 - jnp.abs(at - jnp.arange(length, dtype=at.dtype)))


def _places(matrix: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the input row and column of every output pixel, [height, width] each."""
    rows, columns = jnp.meshgrid(*(jnp.arange(n, dtype=matrix.dtype) for n in shape), indexing="ij")
    row = matrix[0, 0] * rows + matrix[0, 1] * columns + matrix[0, 2]
    return row, matrix[1, 0] * rows + matrix[1, 1] * columns + matrix[1, 2]


def _outside(matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns bool [height, width], whether `affine` fills the output pixel with padding."""
    row, column = _places(matrix, shape)
    within = (row > -0.5) & (row < shape[0] - 0.5) & (column > -0.5) & (column < shape[1] - 0.5)
    return ~within


def keras_affine(
    shear: jax.Array, zoom: jax.Array, rotate: jax.Array, shift: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Returns the matrix of Keras's `apply_affine_transform`, relative to the image centre.

    It is rotation @ shift @ shear @ zoom in homogeneous (row, column) coordinates.

    Args:
        shear: shear angle, in radians.
        zoom: [2], input size divided by output size, for height and width; above 1 the image
            shrinks.
        rotate: rotation angle, in radians.
        shift: [2], shift of rows and columns, in pixels.
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
        # Keras warps, then mirrors: output column c shows column width - 1 - c.
        mirror = jnp.array([[1.0, 0.0, 0.0], [0.0, -1.0, size[1] - 1.0], [0.0, 0.0, 1.0]])
        matrix = jnp.where(draws.flip < 0.5, _matmul(matrix, mirror), matrix)
    if config.crop < 1:
        sides = _sides(config.crop + (1 - config.crop) * draws.crop_area, draws.crop_aspect, 4 / 3)
        # The edges of the window lie on the edges of pixels, not on their centres.
        corner = jnp.stack([draws.crop_row, draws.crop_column]) * (1 - sides) * extent
        window = jnp.concatenate([jnp.diag(sides), (corner + (sides - 1) / 2)[:, None]], axis=1)
        matrix = _matmul(matrix, jnp.concatenate([window, jnp.array([[0.0, 0.0, 1.0]])]))
    return matrix


def _sides(area: jax.Array, draw: jax.Array, extreme: float) -> jax.Array:
    """Returns height and width, [2], of a rectangle with a random aspect ratio, as fractions.

    Args:
        area: area of the rectangle, as a fraction of the image.
        draw: random number in [0, 1) that determines the aspect ratio.
        extreme: largest aspect ratio; the smallest is its inverse. Sides are limited to 1.
    """
    stretch = jnp.exp(_within(draw, math.log(extreme) / 2))
    return jnp.minimum(jnp.sqrt(area) * jnp.stack([stretch, 1 / stretch]), 1)


def _sharpened(image: jax.Array, amount: jax.Array) -> jax.Array:
    """Unsharp mask: adds `amount` times the difference from a five-pixel binomial blur."""
    blurred = _blurred(_blurred(image, 0), 1)
    return jnp.clip(image + (image - blurred) * amount, 0, 1)


def _blurred(image: jax.Array, axis: int) -> jax.Array:
    """Blurs along an axis with the weights 1 4 6 4 1, with edge padding."""
    ends = [(2, 2) if i == axis else (0, 0) for i in range(image.ndim)]
    wide = jnp.pad(image, ends, mode="edge")
    length = image.shape[axis]
    shifted = [jax.lax.slice_in_dim(wide, k, k + length, axis=axis) for k in range(5)]
    a, b, c, d, e = shifted
    return (a + e + 4 * (b + d) + 6 * c) / 16


def _randomly_erased(image: jax.Array, draws: _Draws, largest: float) -> jax.Array:
    """Fills a random rectangle with the image's mean, with probability 1/2.

    Its aspect ratio is in [1/3, 3] and its area at most the fraction `largest` of the image.
    """
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
    # The default precision on accelerators has 11 or 8 bits: too few for coordinates in pixels.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _within(draw: jax.Array, bound: float) -> jax.Array:
    """Scales numbers in [0, 1) to [-bound, bound)."""
    return (2 * draw - 1) * bound


def _mix(a: jax.Array, b: jax.Array, part: jax.Array) -> jax.Array:
    return a + (b - a) * part


def _read(pixels: jax.Array, at: jax.Array) -> jax.Array:
    # The caller has clipped the positions, so XLA needs no bounds check per pixel.
    return pixels.at[at].get(mode="promise_in_bounds")
