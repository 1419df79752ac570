"""Each operation against SciPy or Pillow, and the drawing against its bounds."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from cnnjax.augment import (
    Augment,
    affine,
    keras_affine,
    make_augment,
    make_views,
    resample_by_products,
    resample_by_reads,
)
from cnnjax.config import AugmentConfig

NONE = AugmentConfig(shear=0, zoom=0, flip=False)
KEY = jax.random.key(3)


def images(n: int = 4, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(5).random((n, height, width, 1), np.float32)


@functools.cache
def compiled(config: AugmentConfig) -> Augment:
    return jax.jit(make_augment(config))


def augmented(config: AugmentConfig, given: np.ndarray, key: jax.Array = KEY) -> np.ndarray:
    return np.asarray(compiled(config)(key, given))


@pytest.mark.parametrize("seed", range(6))
def test_affine_against_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.random((24, 20)).astype(np.float32)
    matrix = np.concatenate([rng.normal(size=(2, 2)) + np.eye(2), rng.normal(size=(2, 1)) * 5], 1)
    found = jax.jit(affine)(image, matrix.astype(np.float32))
    expected = ndimage.affine_transform(
        image, matrix[:, :2], matrix[:, 2], order=1, mode="nearest", output=np.float64
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("shape", [(24, 20), (2, 7)])
def test_products_resample_as_reads_do(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.random(shape).astype(np.float32)
    height, width = shape
    row = np.append(rng.uniform(0, height - 1, 200), [0, height - 1, height // 2])
    column = np.append(rng.uniform(0, width - 1, 200), [0, width - 1, width // 2])
    row, column = (at.astype(np.float32).reshape(7, 29) for at in (row, column))
    expected = jax.jit(resample_by_reads)(image, row, column)
    np.testing.assert_allclose(
        jax.jit(resample_by_products)(image, row, column), expected, atol=2e-6
    )


def test_matrix_is_that_of_keras() -> None:
    """The composition of Keras's apply_affine_transform, written as there, in NumPy."""
    theta, tx, ty, shear, zx, zy = 0.3, 2.0, -1.5, 0.2, 0.8, 1.1
    height, width = 24, 20
    matrix = np.array(
        [[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]]
    )
    matrix = matrix @ np.array([[1, 0, tx], [0, 1, ty], [0, 0, 1]])
    matrix = matrix @ np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    matrix = matrix @ np.diag([zx, zy, 1])
    x, y = height / 2 - 0.5, width / 2 - 0.5
    centre = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
    expected = centre @ matrix @ np.linalg.inv(centre)
    found = keras_affine(
        jnp.float32(shear), jnp.array([zx, zy]), jnp.float32(theta), jnp.array([tx, ty]), (24, 20)
    )
    np.testing.assert_allclose(found, expected[:2], atol=1e-5)


def test_nothing_asked_nothing_done() -> None:
    given = images()
    np.testing.assert_array_equal(augmented(NONE, given), given)


def test_flip_mirrors_about_half_of_the_images() -> None:
    given = images(64)
    flipped = 0
    for before, after in zip(given, augmented(AugmentConfig(0, 0, True), given), strict=True):
        mirrored = np.abs(after - before[:, ::-1]).max() < 1e-5
        assert mirrored or np.abs(after - before).max() < 1e-5
        flipped += mirrored
    assert 20 < flipped < 44


def test_one_change_more_leaves_the_others_as_they_are() -> None:
    toned = AugmentConfig(0, 0, False, contrast=0.5, brightness=0.2)
    given = images(16)
    mirrored = 0
    for one, other in zip(
        augmented(toned, given), augmented(replace(toned, flip=True), given), strict=True
    ):
        turned = np.abs(other - one).max() > 1e-5
        np.testing.assert_allclose(other, one[:, ::-1] if turned else one, atol=1e-5)
        mirrored += turned
    assert 0 < mirrored < 16


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(20, 0, False),
        AugmentConfig(0, 0.3, False),
        AugmentConfig(0, 0, False, rotate=30),
        AugmentConfig(0, 0, False, shift=0.2),
    ],
    ids=["shear", "zoom", "rotate", "shift"],
)
def test_geometry_moves_a_ramp_within_its_bounds(config: AugmentConfig) -> None:
    """Where each pixel was read from shows in the warp of an image of coordinates."""
    size = 33
    ramps = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1) / size
    given = np.moveaxis(np.stack([ramps] * 128), -1, 0).astype(np.float32)[..., None]
    row, column = (augmented(config, g, jax.random.key(1))[..., 0] * size for g in given)
    middle = size // 2
    inner = slice(middle - 3, middle + 4)
    down = np.diff(row[:, inner, middle], axis=1).mean(1)  # d(row read) / d(row), and so on
    right = np.diff(column[:, middle, inner], axis=1).mean(1)
    down_right = np.diff(row[:, middle, inner], axis=1).mean(1)
    offset = np.hypot(row[:, middle, middle] - middle, column[:, middle, middle] - middle)
    if config.zoom:
        for scale in (down, right):
            assert 0.69 < scale.min() < 0.75
            assert 1.25 < scale.max() < 1.31
        assert abs(np.corrcoef(down, right)[0, 1]) < 0.3
    if config.rotate:
        angle = np.rad2deg(np.arctan2(down_right, down))
        assert -30.1 < angle.min() < -25
        assert 25 < angle.max() < 30.1
    if config.shear:
        assert np.abs(down_right).max() == pytest.approx(np.sin(np.deg2rad(20)), abs=0.03)
        np.testing.assert_allclose(down, 1, atol=1e-3)
    if config.shift:
        assert 0.2 * size < offset.max() < 0.2 * size * 2**0.5
    else:
        assert offset.max() < 1e-3


def test_contrast_and_brightness_against_pillow() -> None:
    """Pillow's enhancers, at the factors that the warp of a two-pixel image gives away."""
    given = np.full((16, 20, 20, 1), 0.4, np.float32)
    given[:, 10:] = 0.6
    found = augmented(AugmentConfig(0, 0, False, contrast=0.5), given, jax.random.key(0))
    image = Image.fromarray(np.round(given[0, ..., 0] * 255).astype(np.uint8))
    factors = (found[:, -1, 0, 0] - found[:, 0, 0, 0]) / 0.2
    assert 0.5 <= factors.min() < 0.75
    assert 1.25 < factors.max() <= 1.5
    for factor, one in zip(factors, found, strict=True):
        expected = np.asarray(ImageEnhance.Contrast(image).enhance(float(factor)), float) / 255
        np.testing.assert_allclose(one[..., 0], expected, atol=2 / 255)
    added = augmented(AugmentConfig(0, 0, False, brightness=0.2), given) - given
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
    assert 0.1 < np.abs(added).max() <= 0.2


def test_an_image_draws_the_same_in_a_longer_batch_and_another_in_another_row() -> None:
    config = AugmentConfig(rotate=10, contrast=0.3)
    given = np.concatenate([images(1)] * 8)
    short, long = augmented(config, given[:5]), augmented(config, given)
    np.testing.assert_allclose(short, long[:5], atol=1e-6)
    assert np.abs(long[0] - long[1]).max() > 0.05
    assert np.abs(augmented(config, given, jax.random.key(1)) - long).max() > 0.05


def test_views_are_draws_that_all_images_share() -> None:
    config = AugmentConfig(zoom=0.2, rotate=5, gamma=0.3, noise=0.1)
    given = images(3)
    draw = jax.jit(make_views(config, 5))
    views = np.asarray(draw(KEY, given))
    assert views.shape == (3, 5, 24, 20, 1)
    for i, image in enumerate(given):
        expected = augmented(config, np.stack([image] * 5))
        np.testing.assert_allclose(views[i], expected, atol=1e-6)
    spread = np.ptp(views, axis=1).mean()
    assert spread > 0.05  # they differ
    others = np.asarray(draw(KEY, given[[1, 0, 0]]))
    np.testing.assert_allclose(others[0], views[1], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(make_views(config, 1)(KEY, given))[:, 0], given)


def test_crop_keeps_the_area_and_the_aspect_asked_for() -> None:
    """The window read shows in the warp of an image of coordinates."""
    size = 32
    at = (np.arange(size) + 0.5) / size  # centres of the pixels, in parts of the side
    ramps = np.stack(np.meshgrid(at, at, indexing="ij"), -1)
    given = np.moveaxis(np.stack([ramps] * 256), -1, 0).astype(np.float32)[..., None]
    config = AugmentConfig(0, 0, False, crop=0.3)
    row, column = (augmented(config, g, jax.random.key(2))[..., 0] for g in given)
    height = np.diff(row[:, :, 16], axis=1).max(1) * size  # the edge's half pixel is clipped
    width = np.diff(column[:, 16], axis=1).max(1) * size
    area = height * width
    assert 0.25 < area.min() < 0.4
    assert 0.85 < area.max() < 1.001
    aspect = np.log(width / height)
    assert np.abs(aspect).max() < np.log(4 / 3) + 1e-3
    assert aspect.min() < -0.2 < 0.2 < aspect.max()
    # The windows lie within the image, and all over it.
    middle = row[:, :, 16].mean(1)
    assert (middle - height / 2 > -0.02).all()
    assert (middle + height / 2 < 1.02).all()
    assert middle.min() < 0.35 < 0.65 < middle.max()


def test_sharpness_scales_what_a_binomial_blur_takes_away() -> None:
    rng = np.random.default_rng(0)
    image = 0.3 + 0.4 * rng.random((12, 14)).astype(np.float32)
    given = np.tile(image[None, ..., None], (64, 1, 1, 1))
    weights = np.array([1, 4, 6, 4, 1]) / 16
    blurred = image
    for axis in (0, 1):
        blurred = ndimage.correlate1d(blurred, weights, axis, mode="nearest")
    found = augmented(AugmentConfig(0, 0, False, sharpness=0.9), given)[..., 0]
    factors = ((found - blurred) * (image - blurred)).sum((1, 2)) / ((image - blurred) ** 2).sum()
    assert 0.1 <= factors.min() < 0.25
    assert 1.75 < factors.max() <= 1.9
    for factor, one in zip(factors, found, strict=True):
        np.testing.assert_allclose(one, blurred + factor * (image - blurred), atol=1e-5)


def test_gamma_is_a_power_of_the_pixels() -> None:
    rows = np.array([0.25, 0.5, 0, 1], np.float32)
    given = np.broadcast_to(rows[:, None, None], (64, 4, 4, 1))
    found = augmented(AugmentConfig(0, 0, False, gamma=0.5), given)[..., 0]
    powers = np.log(found[:, 1, 0]) / np.log(0.5)
    np.testing.assert_allclose(found[:, 0, 0], 0.25**powers, rtol=1e-4)
    np.testing.assert_array_equal(found[:, 2], 0)
    np.testing.assert_array_equal(found[:, 3], 1)
    assert np.exp(-0.5) <= powers.min() < 0.75 < 1.4 < powers.max() <= np.exp(0.5)


def test_noise_is_normal_and_of_many_strengths() -> None:
    given = np.full((64, 40, 40, 1), 0.5, np.float32)
    found = augmented(AugmentConfig(0, 0, False, noise=0.1), given)
    strengths = found.std((1, 2, 3))
    assert strengths.min() < 0.02 < 0.08 < strengths.max() < 0.105
    standard = (found - 0.5) / strengths[:, None, None, None]
    assert abs(np.mean(np.abs(standard) < 1) - 0.683) < 0.01


def test_erasing_fills_a_rectangle_in_half_of_the_images() -> None:
    given = images(200, 30, 30)
    found = augmented(AugmentConfig(0, 0, False, erase=0.3), given)
    areas = []
    for before, after in zip(given, found, strict=True):
        changed = (after != before)[..., 0]
        if not changed.any():
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed[inside].mean() > 0.99
        np.testing.assert_allclose(after[inside], before.mean(), atol=1e-5)
        areas.append(changed.mean())
    assert 70 < len(areas) < 130
    assert 0.2 < max(areas) < 0.34


def test_black_fills_what_comes_from_beyond_the_edge() -> None:
    """White images: what is not white has come from beyond, as in scipy's constant mode."""
    given = np.ones((64, 20, 20, 1), np.float32)
    config = AugmentConfig(0, 0.3, False, rotate=20, black=1.0)
    found = augmented(config, given)[..., 0]
    assert set(np.unique(found.round(4))) == {0, 1}
    assert (found == 0).any((1, 2)).sum() > 32  # half of them shrink, nearly all are turned
    assert (found[:, 6:14, 6:14] == 1).all()
    half = augmented(replace(config, black=0.5), given)
    assert 15 < (half == 0).any((1, 2, 3)).sum() < 45
