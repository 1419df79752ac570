"""Heat maps show what the network goes by, and change when the network does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import convolve1d

from cnnjax.config import DeviceConfig
from cnnjax.evaluation import explain
from cnnjax.evaluation.predict import Predictor
from cnnjax.machine import devices
from cnnjax.networks import FINAL, FINE, BaselineCNN, ResNet
from cnnjax.objectives import to_float
from cnnjax.train import fit

NETWORKS = {"baseline": BaselineCNN(), "resnet": ResNet(width=4, stages=2)}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)


def variables_of(model: Any, seed: int = 0) -> Any:
    new = jax.jit(model.init, compiler_options=devices.TRAITS["cpu"].once)
    variables = jax.device_get(new(jax.random.key(seed), np.zeros((1, 32, 32, 1), np.float32)))
    # Zero scales would hide the blocks.
    return jax.tree.map(lambda x: x + 0.1, variables)


def test_grad_cam_of_a_pooled_network_is_its_class_activation_map(images: np.ndarray) -> None:
    """With a global average before one dense layer: maps times the layer's weights."""
    model = NETWORKS["resnet"]
    variables = variables_of(model)
    logits, every = explain.features_of(model, variables, to_float(jnp.asarray(images)))
    maps, head = every[FINAL], variables["params"]["head"]
    expected = np.maximum(np.asarray(maps) @ np.asarray(head["kernel"])[:, 0], 0)
    expected = expected / (maps.shape[1] * maps.shape[2])
    found = explain.make_grad_cam(model)(variables, images)
    assert found.shape == images.shape
    enlarged = jax.image.resize(expected, images.shape, "bilinear")
    np.testing.assert_allclose(found, enlarged, atol=1e-5)
    pooled = np.asarray(maps).mean((1, 2)) @ np.asarray(head["kernel"])[:, 0] + head["bias"]
    np.testing.assert_allclose(logits, pooled, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_cam_by_finite_differences(name: str, images: np.ndarray) -> None:
    model = NETWORKS[name]
    variables = variables_of(model)
    pixels = to_float(jnp.asarray(images))
    _, maps = explain.features_of(model, variables, pixels)
    still = jax.tree.map(jnp.zeros_like, maps)
    rng = np.random.default_rng(1)
    direction = jnp.asarray(rng.normal(size=maps[FINAL].shape[3]).astype(np.float32))

    @jax.jit
    def logits(size: float) -> jax.Array:
        moved = jnp.broadcast_to(size * direction, maps[FINAL].shape)
        return explain.features_of(model, variables, pixels, still | {FINAL: moved})[0]

    # The slope along one step everywhere is the sum over places and channels of the gradient.
    slope = (logits(0.01) - logits(-0.01)) / 0.02
    _, pull = jax.vjp(lambda n: explain.features_of(model, variables, pixels, n)[0], still)
    (gradient,) = pull(jnp.ones(len(images)))
    expected = (gradient[FINAL].sum((1, 2)) * direction).sum(1)
    np.testing.assert_allclose(slope, expected, rtol=0.05, atol=0.02)


def test_occlusion_is_the_fall_of_the_logit(images: np.ndarray) -> None:
    """With a square as large as the image there is one place, and one fall for all pixels."""
    model = NETWORKS["baseline"]
    variables = variables_of(model)
    found = explain.make_occlusion(model, patch=1.0, steps=2)(variables, images)
    pixels = to_float(jnp.asarray(images))
    gray = jnp.broadcast_to(pixels.mean((1, 2, 3), keepdims=True), pixels.shape)
    apply = jax.jit(model.apply)
    fall = apply(variables, pixels) - apply(variables, gray)
    np.testing.assert_allclose(found, np.broadcast_to(fall[:, None, None], found.shape), rtol=1e-4)


def test_hires_cam_by_hand(images: np.ndarray) -> None:
    model = NETWORKS["resnet"]
    variables = variables_of(model)
    run = explain.make_hires_cam(model)
    found = np.asarray(run(variables, images))
    assert found.shape == images.shape

    # The maps before the last stage, times the gradient of what follows them.
    pixels = to_float(jnp.asarray(images))
    _, maps = explain.features_of(model, variables, pixels)

    def logit(perturbations: dict[str, jax.Array]) -> jax.Array:
        return explain.features_of(model, variables, pixels, perturbations)[0].sum()

    gradient = jax.grad(logit)(jax.tree.map(jnp.zeros_like, maps))
    heat = np.maximum(np.asarray((gradient[FINE] * maps[FINE]).sum(3)), 0)
    for axis in (1, 2):
        heat = convolve1d(heat, np.array([1, 2, 1]) / 4, axis, mode="nearest")
    assert heat.shape[1] == images.shape[1] // 2  # the stem's; the last maps are half as fine
    enlarged = jax.image.resize(heat, images.shape, "bilinear")
    np.testing.assert_allclose(found, enlarged, atol=1e-5)


@pytest.mark.slow
def test_the_heat_falls_on_the_opacity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pointing game on phantoms, whose opacities are known; chance is one in nine."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")
    import pneumonia
    import pointing

    fit(replace(pneumonia.CONFIG, workdir=tmp_path / "run"))
    predictor = Predictor.open(tmp_path / "run", devices.make_mesh(DeviceConfig()))
    images, opacity = pointing.draw(200, predictor.size)
    found = pointing.score(predictor.heat(images), opacity)
    assert found["hit_rate"] >= 0.9
    assert found["ratio"] > 2
    nowhere = np.random.default_rng(0).random(images.shape)
    assert pointing.score(nowhere, opacity)["hit_rate"] < 0.25


@pytest.mark.parametrize(
    "make", [explain.make_grad_cam, explain.make_hires_cam, explain.make_occlusion]
)
def test_other_weights_give_another_map(make: Any, images: np.ndarray) -> None:
    """The sanity check of Adebayo et al., NeurIPS 2018: a map that stays is no explanation."""
    model = NETWORKS["resnet"]
    run = make(model)
    a, b = (np.asarray(run(variables_of(model, seed), images)) for seed in (0, 1))
    for one, other in zip(a, b, strict=True):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.8


def test_normalized_and_overlay() -> None:
    heat = explain.normalized(np.array([[[-1.0, 2.0], [4.0, 0.0]], [[-1.0, -2.0], [0.0, 0.0]]]))
    np.testing.assert_array_equal(heat[0], [[0, 0.5], [1, 0]])
    assert not heat[1].any()
    image = np.full((2, 2), 100, np.uint8)
    shown = explain.overlay(image, heat[0])
    np.testing.assert_array_equal(shown[0, 0], [100, 100, 100])
    assert shown[1, 0, 0] > shown[1, 0, 2]  # yellow: red above blue
    assert shown.dtype == np.uint8
