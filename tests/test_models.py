"""The networks are what their docstrings say."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cnnjax.config import ModelConfig
from cnnjax.machine import devices
from cnnjax.networks import BaselineCNN, ConvPool, ResNet, local_contrast, make_model


class PlainPost(nn.Module):
    """The post's network, with the layers that anyone would write first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name in ("conv1", "conv2"):
            x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", name=name)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128, name="dense1")(x))
        return nn.Dense(1, name="dense2")(x)[:, 0]


def initial(model: nn.Module, images: object) -> Any:
    new = jax.jit(model.init, compiler_options=devices.TRAITS["cpu"].once)
    return jax.device_get(new(jax.random.key(0), images))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape, np.float32)


def count(params: object) -> int:
    return sum(p.size for p in jax.tree.leaves(params))


def test_baseline_has_the_posts_shapes() -> None:
    model = make_model(ModelConfig(channels=3))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 1)))
    shapes = jax.tree.map(lambda p: p.shape, variables["params"])
    assert shapes == {
        "conv1": {"kernel": (3, 3, 3, 32), "bias": (32,)},
        "conv2": {"kernel": (3, 3, 32, 32), "bias": (32,)},
        "dense1": {"kernel": (6272, 128), "bias": (128,)},
        "dense2": {"kernel": (128, 1), "bias": (1,)},
    }
    assert count(variables) == 813_217


@pytest.mark.parametrize("channels", [1, 3])
def test_baseline_is_the_plain_network(channels: int) -> None:
    """Same parameters, same logits and gradients as the plain layers, ties included."""
    images = noise(4, 30, 30, 1)
    images[:, :8] = 0  # a black border makes ties in every pool
    ours, plain = BaselineCNN(channels), PlainPost()
    params = initial(ours, images)["params"]
    params = jax.tree.map(lambda p: p + 0.05, params)  # biases that are not zero

    def loss(params: object, model: nn.Module) -> jax.Array:
        seen = images if model is ours else jnp.repeat(images, channels, axis=3)
        logits = model.apply({"params": params}, seen)
        return (logits * jnp.arange(1.0, 5.0)).sum()

    a, ga = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, ours)
    b, gb = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, plain)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(y).max())


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("depth", [1, 2])
def test_resnet_takes_width_and_depth(width: int, depth: int) -> None:
    model = make_model(ModelConfig("resnet", width=width, depth=depth))
    images = jnp.zeros((2, 40, 40, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.eval_shape(model.apply, variables, images).shape == (2,)
    assert len(variables["params"]) == 3 + 4 * depth
    head = variables["params"]["head"]["kernel"]
    assert head.shape == (8 * width, 1)


@pytest.mark.parametrize(
    ("name", "local"), [("baseline", False), ("resnet", False), ("resnet", True)]
)
def test_standardized_networks_see_no_brightness_and_no_contrast(name: str, local: bool) -> None:
    config = ModelConfig(
        name,  # type: ignore[arg-type]
        width=4,
        stages=2,
        stem=4,
        standardize=True,
        local_contrast=local,
    )
    model = make_model(config)
    images = 0.2 + 0.5 * noise(3, 32, 32, 1)
    variables = initial(model, images)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(variables, images), apply(variables, 0.3 * images + 0.1), atol=2e-3
    )
    assert np.isfinite(apply(variables, np.zeros_like(images))).all()


def test_local_contrast_lies_under_scipys_gaussian() -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 36, 60))

    def around(x: np.ndarray) -> np.ndarray:
        # What lies beyond the edge does not count.
        options = {"sigma": (0, 3, 5), "mode": "constant", "truncate": 20}
        return gaussian_filter(x, **options) / gaussian_filter(np.ones_like(x), **options)

    centred = images - around(images)
    expected = centred / np.sqrt(around(centred**2) + 0.01)
    found = jax.jit(local_contrast)(jnp.asarray(images, jnp.float32)[..., None])
    assert found.shape == (2, 36, 60, 1)
    np.testing.assert_allclose(found[..., 0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        BaselineCNN(dtype=jnp.bfloat16),
        ResNet(width=4, stages=2, standardize=True, local_contrast=True, dtype=jnp.bfloat16),
    ],
)
def test_bfloat16_keeps_parameters_and_logits_in_float32(model: nn.Module) -> None:
    images = noise(2, 32, 32, 1)
    variables = initial(model, images)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    low = jax.jit(model.apply)(variables, images)
    full = jax.jit(model.clone(dtype=jnp.float32).apply)(variables, images)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, full, atol=0.05)


def test_conv_pool_drops_an_odd_row() -> None:
    x = jnp.zeros((1, 31, 31, 1))
    variables = ConvPool(2).init(jax.random.key(0), x)
    assert ConvPool(2).apply(variables, x).shape == (1, 14, 14, 2)


@pytest.mark.parametrize("name", ["baseline", pytest.param("resnet", marks=pytest.mark.slow)])
def test_bfloat16_computes_nearly_the_same_with_float32_parameters(name: str) -> None:
    images = noise(8, 32, 32, 1)
    config = ModelConfig(name, width=8)  # type: ignore[arg-type]
    single, half = make_model(config), make_model(config, jnp.bfloat16)
    variables = initial(half, images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))

    def run(model: nn.Module) -> tuple[jax.Array, object]:
        return jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
            variables, images
        )

    (a, stats_a), (b, stats_b) = run(single), run(half)
    assert b.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(a) - np.asarray(b)).max() < 0.1
    for x, y in zip(jax.tree.leaves(stats_a), jax.tree.leaves(stats_b), strict=True):
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=0.05)
