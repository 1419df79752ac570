"""The forms that XLA likes mean the same as the plain ones."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import layers


def plain_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), (2, 2))  # lax.reduce_window


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 9, 2), (3, 2, 3, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool(shape: tuple[int, ...], dtype: jnp.dtype, ties: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, shape) if ties else rng.normal(size=shape)
    x = jnp.asarray(x, dtype)
    y, pull = jax.vjp(jax.jit(layers.max_pool), x)
    y_plain, pull_plain = jax.vjp(jax.jit(plain_pool), x)
    np.testing.assert_array_equal(y, y_plain)
    g = jnp.asarray(rng.normal(size=y.shape), dtype)
    np.testing.assert_array_equal(pull(g)[0], pull_plain(g)[0])


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_is_a_cross_correlation(padding: layers.Padding, stride: int) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(3, 3, 3, 4))
    found = layers.conv(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
        stride=stride,
        padding=padding,
    )
    if padding == "SAME":  # TensorFlow's rule: with stride 2 on an even size, all below and right
        before = 0 if stride == 2 else 1
        x = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    expected = np.einsum("nhwcij,ijco->nhwo", windows[:, ::stride, ::stride], kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)
