"""Each operation against SciPy or Pillow, and the drawing against its bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from cnnjax.augment import affine, keras_affine, make_augment
from cnnjax.config import AugmentConfig

NONE = AugmentConfig(shear=0, zoom=0, flip=False)


def images(n: int = 4, height: int = 24, width: int = 20) -> jax.Array:
    return jax.random.uniform(jax.random.key(5), (n, height, width, 1))


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
    np.testing.assert_array_equal(make_augment(NONE)(jax.random.key(0), given), given)


def test_flip_mirrors_about_half_of_the_images() -> None:
    given = images(64)
    found = make_augment(AugmentConfig(0, 0, True))(jax.random.key(0), given)
    flipped = 0
    for before, after in zip(np.asarray(given), np.asarray(found), strict=True):
        mirrored = np.abs(after - before[:, ::-1]).max() < 1e-5
        assert mirrored or np.abs(after - before).max() < 1e-5
        flipped += mirrored
    assert 20 < flipped < 44


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
    augment = make_augment(config)
    key = jax.random.key(1)
    given = jnp.asarray(np.moveaxis(np.stack([ramps] * 128), -1, 0), jnp.float32)[..., None]
    row, column = (np.asarray(augment(key, g))[..., 0] * size for g in given)
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
    given = jnp.full((16, 20, 20, 1), 0.5).at[:, :10].set(0.4).at[:, 10:].set(0.6)
    found = np.asarray(
        make_augment(AugmentConfig(0, 0, False, contrast=0.5))(jax.random.key(0), given)
    )
    image = Image.fromarray(np.round(np.asarray(given[0, ..., 0]) * 255).astype(np.uint8))
    factors = (found[:, -1, 0, 0] - found[:, 0, 0, 0]) / 0.2
    assert 0.5 <= factors.min() < 0.75
    assert 1.25 < factors.max() <= 1.5
    for factor, one in zip(factors, found, strict=True):
        expected = np.asarray(ImageEnhance.Contrast(image).enhance(float(factor)), float) / 255
        np.testing.assert_allclose(one[..., 0], expected, atol=2 / 255)
    shifted = make_augment(AugmentConfig(0, 0, False, brightness=0.2))(jax.random.key(0), given)
    added = np.asarray(shifted - given)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
    assert 0.1 < np.abs(added).max() <= 0.2


def test_an_image_draws_the_same_in_a_longer_batch_and_another_in_another_row() -> None:
    augment = jax.jit(make_augment(AugmentConfig(rotate=10, contrast=0.3)))
    given = jnp.concatenate([images(1)] * 8)
    short, long = augment(jax.random.key(0), given[:5]), augment(jax.random.key(0), given)
    np.testing.assert_allclose(short, long[:5], atol=1e-6)
    assert np.abs(long[0] - long[1]).max() > 0.05
    assert np.abs(augment(jax.random.key(1), given) - long).max() > 0.05
