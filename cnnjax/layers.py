"""Convolution and pooling in the forms that XLA compiles well.

Each has the plain form's meaning, values and gradients; the tests hold it against that form.
Images are NHWC and kernels HWIO throughout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax import onednn

Padding = Literal["SAME", "VALID"]

_portable: ContextVar[bool] = ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Keeps what is traced in the block to forms that every platform has."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


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
    if not _portable.get() and onednn.available() and onednn.takes(x.dtype):
        return conv_onednn(x, kernel, stride, padding)
    return conv_plain(x, kernel, stride, padding)


def conv_plain(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """XLA's own convolution: `conv` where nothing is faster, and what the tests hold it against."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_onednn(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`conv` by oneDNN, and its gradients by the fastest of what there is on an x86 CPU.

    XLA knows only oneDNN's forward convolution. The gradient of the input is one too, of the
    output's gradient with the filters turned around; with a stride it would meet mostly zeros, and
    XLA's own is faster. The gradient of the filters is a convolution too where oneDNN is good at
    that, else a matrix product.
    """
    return onednn.convolution(x, kernel, _pads(x, kernel, stride, padding), stride)


def _conv_onednn_forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv_onednn(x, kernel, stride, padding), (x, kernel)


def _conv_onednn_backward(
    stride: int, padding: Padding, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    pads = _pads(x, kernel, stride, padding)
    if stride > 1:
        (gx,) = jax.vjp(lambda x: conv_plain(x, kernel, stride, padding), x)[1](g)
        return gx, _filter_gradient(x, g, kernel.shape, pads, stride)
    around = kernel[::-1, ::-1].swapaxes(2, 3)
    rest = [
        (window - 1 - before, window - 1 - after)
        for window, (before, after) in zip(kernel.shape[:2], pads, strict=True)
    ]
    gx = onednn.convolution(g, around, (rest[0], rest[1]), 1)
    return gx, _filter_gradient(x, g, kernel.shape, pads, stride)


conv_onednn.defvjp(_conv_onednn_forward, _conv_onednn_backward)


def _pads(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> onednn.Pads:
    rows, columns = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
    return rows, columns


_FEW = 8  # channels below which all patches of an image are small
_WIDE = 32  # side from which on the output's gradient is slow as a filter


def _filter_gradient(
    x: jax.Array, g: jax.Array, shape: tuple[int, ...], pads: onednn.Pads, stride: int
) -> jax.Array:
    """Takes the form that was fastest with AVX2 (Zen 1); with AVX-512 (Xeon), of the products."""
    if max(g.shape[1:3]) < _WIDE and shape[:2] != (1, 1) and not onednn.avx512():
        return _filter_gradient_by_convolution(x, g, shape, pads, stride)
    if stride > 1 or x.shape[3] < _FEW:
        return _filter_gradient_by_patches(x, g, shape, pads, stride)
    return _filter_gradient_by_shifts(x, g, shape, pads)


def _filter_gradient_by_convolution(
    x: jax.Array, g: jax.Array, shape: tuple[int, ...], pads: onednn.Pads, stride: int
) -> jax.Array:
    """Convolves with the output's gradient as the filter, over the images instead of channels.

    What the stride of the forward convolution stepped over, the filter steps over: it is dilated.
    """
    images = _materialized(x).transpose(3, 1, 2, 0)  # [in, height, width, batch]
    found = onednn.convolution(images, g, pads, 1, dilation=stride, axes="IHWO")
    # What the last step of the forward convolution left of the image gives further rows.
    return found[:, : shape[0], : shape[1]].transpose(1, 2, 0, 3)


def _filter_gradient_by_patches(
    x: jax.Array, g: jax.Array, shape: tuple[int, ...], pads: onednn.Pads, stride: int
) -> jax.Array:
    """g.T @ patches, with the patches of all places side by side in memory (im2col)."""
    height, width, channels, filters = shape
    if channels == 1:
        x = _materialized(x)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((size - 1) * stride + 1 for size in g.shape[1:3])
    patches = jnp.concatenate(
        [
            x[:, i : i + rows : stride, j : j + columns : stride]
            for i in range(height)
            for j in range(width)
        ],
        axis=3,
    )
    product = onednn.transposed_product(
        g.reshape(-1, filters), patches.reshape(-1, height * width * channels)
    )
    return product.reshape(filters, height, width, channels).transpose(1, 2, 3, 0)


def _materialized(x: jax.Array) -> jax.Array:
    """Returns x out of a call that XLA cannot look into.

    Else it would compute what x comes from, a batch norm or the augmentation of the images, anew
    for each copy of x in another order. (It looks through `lax.optimization_barrier`.)
    """
    same = jnp.eye(x.shape[3], dtype=x.dtype)[None, None]
    return onednn.convolution(x, same, ((0, 0), (0, 0)), 1)


def _filter_gradient_by_shifts(
    x: jax.Array, g: jax.Array, shape: tuple[int, ...], pads: onednn.Pads
) -> jax.Array:
    """One product of the input shifted by columns and the output's gradient shifted by rows.

    The shifts of both together are those of the patches, with 2 k copies of an image for filters
    of k x k instead of k * k.
    """
    height, width, channels, filters = shape
    (top, _), (left, _) = pads
    wide = jnp.concatenate([_shifted(x, 2, left - j, g.shape[2]) for j in range(width)], axis=3)
    tall = jnp.concatenate([_shifted(g, 1, i - top, x.shape[1]) for i in range(height)], axis=3)
    product = onednn.transposed_product(
        tall.reshape(-1, height * filters), wide.reshape(-1, width * channels)
    )
    return product.reshape(height, filters, width, channels).transpose(0, 2, 3, 1)


def _shifted(x: jax.Array, axis: int, by: int, size: int) -> jax.Array:
    """Moves x along an axis into an array of the given size there; zeros where nothing came."""
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (by, size - x.shape[axis] - by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


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
