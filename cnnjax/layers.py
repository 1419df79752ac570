"""Convolution and pooling in the forms that XLA compiles well.

Each has the plain form's meaning, values and gradients; the tests hold it against that form.
Images are NHWC and kernels HWIO throughout.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Padding = Literal["SAME", "VALID"]


def conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = "SAME"
) -> jax.Array:
    """Convolves images with a bank of filters (cross-correlation, as the field has it).

    Args:
        x: [batch, height, width, in].
        kernel: [kernel height, kernel width, in, out], of x's dtype.
        stride: step of the filters in both directions, in pixels.
        padding: `SAME` pads with zeros to ceil(size / stride), `VALID` does not pad.

    Returns:
        [batch, height', width', out].
    """
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of each 2x2 square; a last odd row or column is dropped.

    The gradient goes to the first maximum of a square in row order, as that of
    `lax.reduce_window` does. XLA turns that one into a select-and-scatter, which is slow on a CPU;
    this one compares the input with the maximum and selects, one pass over memory.

    Args:
        x: [batch, height, width, channels].

    Returns:
        [batch, height // 2, width // 2, channels].
    """
    a, b, c, d = _corners(x)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool(x)
    return y, (x, y)


def _max_pool_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    x, y = saved
    a, b, c, _ = (corner == y for corner in _corners(x))
    zero = jnp.zeros_like(g)
    ga = jnp.where(a, g, zero)
    gb = jnp.where(b & ~a, g, zero)
    gc = jnp.where(c & ~(a | b), g, zero)
    gd = jnp.where(a | b | c, zero, g)
    batch, height, width, channels = y.shape
    # Interleave the four corners: [batch, height, 2, width, 2, channels].
    rows = jnp.stack([jnp.stack([ga, gb], axis=3), jnp.stack([gc, gd], axis=3)], axis=2)
    gx = rows.reshape(batch, 2 * height, 2 * width, channels)
    odd = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    return (jnp.pad(gx, odd),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _corners(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the four pixels of each 2x2 square, in row order."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width]
    return x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]
