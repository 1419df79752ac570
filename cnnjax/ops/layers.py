"""Convolution and pooling in the forms that XLA compiles well.

Each has the plain form's meaning, values and first gradients, in reverse mode; the tests hold it
against that form.
Images are NHWC and kernels HWIO throughout.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.tree_util import Partial

from cnnjax.ops import ffi, onednn

Padding = Literal["SAME", "VALID"]
Dtype = Any

# Bytes of maps from which on they had better not be written down. On 2 cores of a Xeon, with 2 MiB
# of second-level cache each, the post's network takes a step 8 % faster then at batch 32 (15 MiB),
# twice as fast at 128; at 8 (4 MiB), it would be slower by a third.
_LARGE = 2**23

_portable: ContextVar[bool] = ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Keeps what is traced in the block to forms that every platform has.

    JAX traces a function once: one that it has traced before stays as it was.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    dtype: Dtype = None,
) -> jax.Array:
    """Convolves images with a bank of filters (cross-correlation, as the field has it).

    Args:
        x: float [batch, height, width, in].
        kernel: float [kernel height, kernel width, in, out].
        stride: step of the filters in both directions, in pixels.
        padding: `SAME` pads with zeros to ceil(size / stride), `VALID` does not pad.
        dtype: what both are rounded to, and what products are taken in; by default x's. Where
            oneDNN serves, float32 in place of bfloat16 for images of one channel: it is faster.

    Returns:
        [batch, height', width', out], of `dtype`, or of float32 where the sums are at hand in that.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if (taken := _onednn_takes(x, dtype)) is not None:
        if kernel.shape[:2] == (1, 1):  # it sees no other pixels, and oneDNN is faster without them
            x, stride = x[:, ::stride, ::stride], 1
        both = (a.astype(jnp.float32) for a in (x, kernel))
        return conv_onednn(*both, stride, padding, taken)
    return conv_plain(x.astype(dtype), kernel.astype(dtype), stride, padding)


def conv_pool(
    x: jax.Array, kernel: jax.Array, *, padding: Padding = "SAME", dtype: Dtype = None
) -> jax.Array:
    """Convolves with stride 1 and takes the maximum of each 2x2 square: `max_pool` of `conv`.

    Where oneDNN serves, a few images at a time pass both if the maps between them are large, which
    then need no memory. A NaN among numbers is passed over there; a square of nothing but NaN or
    -inf is NaN.

    Args:
        x: float [batch, height, width, in].
        kernel: float [kernel height, kernel width, in, out].
        padding: as `conv` has it.
        dtype: likewise.

    Returns:
        [batch, height' // 2, width' // 2, out], of the dtype that `conv` has.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    maps = ffi.maps_of(x, kernel, _pads(x, kernel, 1, padding), 1)
    taken = _onednn_takes(x, dtype)
    if taken is not None and 4 * math.prod(maps) >= _LARGE:
        both = (a.astype(jnp.float32) for a in (x, kernel))
        return conv_onednn(*both, 1, padding, taken, True)
    return max_pool(conv(x, kernel, padding=padding, dtype=dtype))


def dense_dtype(dtype: Dtype) -> Dtype:
    """Returns what a dense layer had better compute in, instead of a dtype.

    For bfloat16 that is float32 on a CPU: XLA multiplies in float32 there, having rounded the
    weights to bfloat16 and back. Without that the post's network takes a step of batch 32 a fifth
    faster, one of batch 8 almost twice as fast (2 cores of a Xeon).
    """
    if dtype == jnp.bfloat16 and not _portable.get() and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    return dtype


def _onednn_takes(x: jax.Array, dtype: Dtype) -> Dtype:
    """Returns what oneDNN is to take products of images in; None where it does not serve."""
    if _portable.get() or not ffi.available():
        return None
    if x.shape[3] == 1 and dtype == jnp.bfloat16:
        dtype = jnp.dtype(jnp.float32)
    return dtype if ffi.takes(dtype) else None


def conv_plain(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """XLA's own convolution: `conv` where nothing is faster, and what the tests hold it against."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def conv_onednn(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: Padding,
    dtype: Dtype = jnp.float32,
    pooled: bool = False,
) -> jax.Array:
    """`conv` of float32 by oneDNN, or `conv_pool`, and so its gradients, all float32.

    None is rounded to `dtype` on its way out: XLA would convert it back, pixel by pixel.
    """
    y, _ = _computed(x.astype(dtype), kernel.astype(dtype), stride, padding, pooled)
    return y


def _computed(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, pooled: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the result, and what the gradients of a pool want to know of it."""
    pads = _pads(x, kernel, stride, padding)
    if not pooled:
        return ffi.convolution(x, kernel, pads, stride), None
    y, places = ffi.pooled_convolution(x, kernel, pads, stride)
    return jnp.where(y > jnp.finfo(y.dtype).min, y, jnp.nan), places


_GRADIENTS = {
    (True, True): ffi.gradients,
    (True, False): functools.partial(ffi.gradients, wanted=("gx",)),
    (False, True): functools.partial(ffi.gradients, wanted=("gkernel",)),
}


def _conv_onednn_forward(
    x: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    stride: int,
    padding: Padding,
    dtype: Dtype,
    pooled: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None, Partial]]:
    both = x.value.astype(dtype), kernel.value.astype(dtype)
    y, places = _computed(*both, stride, padding, pooled)
    # XLA cannot leave out that half of a call which nothing needs, as the gradient by the images.
    needed = _GRADIENTS[x.perturbed, kernel.perturbed]
    return y, (*both, places, Partial(needed))


def _conv_onednn_backward(
    stride: int,
    padding: Padding,
    dtype: Dtype,
    pooled: bool,
    saved: tuple[jax.Array, jax.Array, jax.Array | None, Partial],
    g: jax.Array | SymbolicZero,
) -> tuple[jax.Array | None, jax.Array | None]:
    if isinstance(g, SymbolicZero):  # nothing comes of the result
        return None, None
    x, kernel, places, gradients = saved
    pads = _pads(x, kernel, stride, padding)
    found: tuple[jax.Array | None, jax.Array | None]
    found = gradients(x, kernel, g.astype(dtype), pads, stride, places)
    return found


conv_onednn.defvjp(_conv_onednn_forward, _conv_onednn_backward, symbolic_zeros=True)


def _pads(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> onednn.Pads:
    rows, columns = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
    return (int(rows[0]), int(rows[1])), (int(columns[0]), int(columns[1]))


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of each 2x2 square; a last odd row or column is dropped.

    The gradient goes to the first maximum of a square in row order.

    Args:
        x: [batch, height, width, channels].

    Returns:
        [batch, height // 2, width // 2, channels].
    """
    if _portable.get():
        return max_pool_by_corners(x)
    return lax.platform_dependent(x, tpu=max_pool_plain, default=max_pool_by_corners)


def max_pool_plain(x: jax.Array) -> jax.Array:
    """XLA's own pool; its gradient is a select-and-scatter, which is slow on a CPU."""
    window = (1, 2, 2, 1)
    y: jax.Array = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
    return y


@jax.custom_vjp
def max_pool_by_corners(x: jax.Array) -> jax.Array:
    """The same from the four corners of each square; its gradient compares, and selects.

    That is one pass over memory, except on a TPU: it lays out pixels in tiles, and XLA copies the
    corners from layout to layout there.
    """
    a, b, c, d = _corners(x)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool_by_corners(x)
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


max_pool_by_corners.defvjp(_max_pool_forward, _max_pool_backward)


def _corners(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the four pixels of each 2x2 square, in row order."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width]
    return x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]


def mean_around(x: jax.Array, deviation: float) -> jax.Array:
    """Takes the mean around each pixel, under a Gaussian; what lies beyond the edge has no weight.

    Args:
        x: float [batch, height, width, channels].
        deviation: the Gaussian's, as a part of the side.

    Returns:
        The same shape.
    """
    if _portable.get():
        return mean_around_by_products(x, deviation)
    thin = functools.partial(mean_around_by_thin_products, deviation=deviation)
    whole = functools.partial(mean_around_by_products, deviation=deviation)
    return lax.platform_dependent(x, cpu=thin, default=whole)


def mean_around_by_products(x: jax.Array, deviation: float) -> jax.Array:
    """The same by a matrix for the rows and one for the columns: an accelerator's form.

    A convolution with filters as wide would cost far more.
    """
    rows, columns = (_gaussian(side, deviation) for side in x.shape[1:3])
    return _by_rows_and_columns(rows, x, columns)


def mean_around_by_thin_products(x: jax.Array, deviation: float) -> jax.Array:
    """The same by matrices of which each is two thin ones: at 96 pixels a third of the operations.

    A Gaussian passes few frequencies: of one with a deviation of a twelfth of the side, whatever
    that is, 24 singular values are what float32 can tell from nothing beside the first.
    """
    thin = (_thin_gaussian(side, deviation) for side in x.shape[1:3])
    for rows, columns in zip(*thin, strict=True):
        x = _by_rows_and_columns(rows, x, columns)
    return x


def _by_rows_and_columns(rows: np.ndarray, x: jax.Array, columns: np.ndarray) -> jax.Array:
    # In full on accelerators too: what is near this mean is told apart from it by subtraction.
    return jnp.einsum(
        "ij,bjkc,lk->bilc",
        rows.astype(x.dtype),
        x,
        columns.astype(x.dtype),
        precision=lax.Precision.HIGHEST,
    )


@functools.cache
def _thin_gaussian(side: int, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns [rank, side] and [side, rank]: `_gaussian` is the second times the first."""
    left, values, right = np.linalg.svd(_gaussian(side, deviation))
    told = values > 2**-22 * values[0]
    return right[told], (left * values)[:, told]


def _gaussian(side: int, deviation: float) -> np.ndarray:
    """Returns [side, side]: row i weighs the pixels around pixel i, and sums to 1."""
    at = np.arange(side)
    weights = np.exp(-0.5 * np.square((at[:, None] - at) / (deviation * side)))
    return weights / weights.sum(1, keepdims=True)
