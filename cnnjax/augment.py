"""Random changes to training images, inside the compiled step: (key, images) -> images.

Each image draws from its own key, folded with its number in the batch, so neither the number of
devices nor of the rows that fill up the batch changes what it draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cnnjax.config import AugmentConfig

Augment = Callable[[jax.Array, jax.Array], jax.Array]
Views = Callable[[jax.Array, jax.Array], jax.Array]


def make_augment(config: AugmentConfig) -> Augment:
    """Returns the pure function (key, images) -> images that the config describes.

    Images are float32 [batch, height, width, 1] in [0, 1], before and after. What the config has at
    zero is left out of the compiled program.
    """
    moves = (config.shear, config.zoom, config.rotate, config.shift, config.flip, config.crop < 1)

    def augment_one(key: jax.Array, image: jax.Array) -> jax.Array:
        geometry, tone = jax.random.split(key)
        sharpness, gamma, noise, erase = (jax.random.fold_in(key, k) for k in range(4))
        if any(moves):
            matrix = _random_affine(geometry, config, (image.shape[0], image.shape[1]))
            moved = affine(image[..., 0], matrix)
            if config.black:
                fill = jax.random.bernoulli(jax.random.fold_in(key, 4), config.black)
                moved = jnp.where(fill & _outside(matrix, moved.shape), 0, moved)
            image = moved[..., None]
        if config.sharpness:
            image = _random_sharpness(sharpness, config.sharpness, image)
        if config.gamma:
            # A power as XLA vectorises it on a CPU; black stays black, exp(-inf).
            image = jnp.exp(jnp.log(image) * jnp.exp(_uniform(gamma, config.gamma)))
        if config.contrast or config.brightness:
            image = _random_tone(tone, config, image)
        if config.noise:
            image = _random_noise(noise, config.noise, image)
        if config.erase:
            image = _random_erasing(erase, config.erase, image)
        return image

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(images.shape[0]))
        return jax.vmap(augment_one)(keys, images)

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


def _random_affine(key: jax.Array, config: AugmentConfig, size: tuple[int, int]) -> jax.Array:
    """Draws shear, zoom, rotation, shift and flip, as one matrix for `affine`."""
    shear, zoom, rotate, shift, flip = jax.random.split(key, 5)
    extent = jnp.array(size, jnp.float32)
    matrix = keras_affine(
        jnp.deg2rad(_uniform(shear, config.shear)),
        1 + _uniform(zoom, config.zoom, (2,)),
        jnp.deg2rad(_uniform(rotate, config.rotate)),
        _uniform(shift, config.shift, (2,)) * extent,
        size,
    )
    if config.flip:
        # Keras warps, then mirrors: output column c shows what stood at width - 1 - c.
        mirror = jnp.array([[1.0, 0.0, 0.0], [0.0, -1.0, size[1] - 1.0], [0.0, 0.0, 1.0]])
        matrix = jnp.where(jax.random.bernoulli(flip), _matmul(matrix, mirror), matrix)
    if config.crop < 1:
        window = _random_crop(jax.random.fold_in(key, 0), config.crop, size)
        matrix = _matmul(matrix, jnp.concatenate([window, jnp.array([[0.0, 0.0, 1.0]])]))
    return matrix


def _random_crop(key: jax.Array, smallest: float, size: tuple[int, int]) -> jax.Array:
    """Returns the matrix, for `affine`, that fills the image with a random window of it."""
    area, aspect, place = jax.random.split(key, 3)
    part = jax.random.uniform(area, minval=smallest, maxval=1)
    stretch = jnp.exp(_uniform(aspect, math.log(4 / 3) / 2))
    sides = jnp.minimum(jnp.sqrt(part) * jnp.stack([stretch, 1 / stretch]), 1)
    # Pixels are squares whose edges, not centres, the window's edges meet.
    extent = jnp.array(size, jnp.float32)
    corner = jax.random.uniform(place, (2,)) * (1 - sides) * extent
    return jnp.concatenate([jnp.diag(sides), (corner + (sides - 1) / 2)[:, None]], axis=1)


def _random_sharpness(key: jax.Array, bound: float, image: jax.Array) -> jax.Array:
    """Adds or takes away a part of what a binomial blur of five pixels takes away."""
    blurred = _blurred(_blurred(image, 0), 1)
    return jnp.clip(image + (image - blurred) * _uniform(key, bound), 0, 1)


def _blurred(image: jax.Array, axis: int) -> jax.Array:
    """Blurs along an axis with the weights 1 4 6 4 1; beyond the edge the edge goes on."""
    ends = [(2, 2) if i == axis else (0, 0) for i in range(image.ndim)]
    wide = jnp.pad(image, ends, mode="edge")
    length = image.shape[axis]
    shifted = [jax.lax.slice_in_dim(wide, k, k + length, axis=axis) for k in range(5)]
    a, b, c, d, e = shifted
    return (a + e + 4 * (b + d) + 6 * c) / 16


def _random_noise(key: jax.Array, bound: float, image: jax.Array) -> jax.Array:
    amount, values = jax.random.split(key)
    scale = jax.random.uniform(amount, maxval=bound)
    return jnp.clip(image + scale * jax.random.normal(values, image.shape, image.dtype), 0, 1)


def _random_erasing(key: jax.Array, largest: float, image: jax.Array) -> jax.Array:
    """Fills a rectangle of an aspect ratio in [1/3, 3] with the image's mean, or does nothing."""
    whether, area, aspect, place = jax.random.split(key, 4)
    part = jax.random.uniform(area, maxval=largest)
    stretch = jnp.exp(_uniform(aspect, math.log(3) / 2))
    sides = jnp.minimum(jnp.sqrt(part) * jnp.stack([stretch, 1 / stretch]), 1)
    start = jax.random.uniform(place, (2,)) * (1 - sides)
    inside = jax.random.bernoulli(whether)
    for axis in (0, 1):
        n = image.shape[axis]
        at = (jnp.arange(n, dtype=image.dtype) + 0.5) / n
        within = (at >= start[axis]) & (at < start[axis] + sides[axis])
        inside = inside & jnp.expand_dims(within, (1 - axis, 2))
    return jnp.where(inside, image.mean(), image)


def _random_tone(key: jax.Array, config: AugmentConfig, image: jax.Array) -> jax.Array:
    contrast, brightness = jax.random.split(key)
    mean = image.mean()
    image = mean + (image - mean) * (1 + _uniform(contrast, config.contrast))
    return jnp.clip(image + _uniform(brightness, config.brightness), 0, 1)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    # An accelerator's default rounds to 10 bits: coordinates would be off by parts of a pixel.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _uniform(key: jax.Array, bound: float, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _mix(a: jax.Array, b: jax.Array, part: jax.Array) -> jax.Array:
    return a + (b - a) * part


def _read(pixels: jax.Array, at: jax.Array) -> jax.Array:
    # The caller has clipped the places; saying so spares a comparison a pixel.
    return pixels.at[at].get(mode="promise_in_bounds")
