"""Convolution and pooling in the forms that XLA compiles well.

Each function has the same values and the same first reverse-mode gradients as the plain form; the
tests compare the two. Images are NHWC and kernels HWIO throughout.
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

# Feature maps of at least this size in bytes are pooled without storing them whole. On 2 cores of a
# Xeon, with 2 MiB of L2 cache each, a step of the blog post's network is then 8 % faster at batch
# size 32 (15 MiB) and twice as fast at 128. At batch size 8 (4 MiB) it would be a third slower.
_LARGE = 2**23

_portable: ContextVar[bool] = ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Uses only operations of all platforms in functions traced inside this block.

    JAX traces a function once per signature: a function traced before the block is not changed.
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
    """Convolves images with a bank of filters (without flipping them: cross-correlation).

    Args:
        x: float [batch, height, width, in].
        kernel: float [kernel height, kernel width, in, out].
        stride: stride of the filters in both directions, in pixels.
        padding: `SAME` pads with zeros to ceil(size / stride), `VALID` does not pad.
        dtype: dtype to which x and the kernel are rounded before they are multiplied; by default
            the dtype of x. If oneDNN is used, images of one channel use float32 instead of
            bfloat16, which is faster.

    Returns:
        [batch, height', width', out] of `dtype`, or of float32 if oneDNN is used.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if (taken := _onednn_takes(x, dtype)) is not None:
        if kernel.shape[:2] == (1, 1):  # needs no other pixels; oneDNN is faster without stride
            x, stride = x[:, ::stride, ::stride], 1
        both = (a.astype(jnp.float32) for a in (x, kernel))
        return conv_onednn(*both, stride, padding, taken)
    return conv_plain(x.astype(dtype), kernel.astype(dtype), stride, padding)


def conv_pool(
    x: jax.Array, kernel: jax.Array, *, padding: Padding = "SAME", dtype: Dtype = None
) -> jax.Array:
    """Convolves with stride 1 and takes the maximum of each 2x2 square: `max_pool(conv(...))`.

    If oneDNN is used and the maps before the pool are large, both operations are applied to a few
    images at a time, and the maps are not stored. In this case a square with numbers and NaN has
    the maximum of the numbers; a square of only NaN or -inf is NaN.

    Args:
        x: float [batch, height, width, in].
        kernel: float [kernel height, kernel width, in, out].
        padding: see `conv`.
        dtype: see `conv`.

    Returns:
        [batch, height' // 2, width' // 2, out], of the same dtype as the result of `conv`.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    maps = ffi.maps_of(x, kernel, _pads(x, kernel, 1, padding), 1)
    taken = _onednn_takes(x, dtype)
    if taken is not None and 4 * math.prod(maps) >= _LARGE:
        both = (a.astype(jnp.float32) for a in (x, kernel))
        return conv_onednn(*both, 1, padding, taken, True)
    return max_pool(conv(x, kernel, padding=padding, dtype=dtype))


def dense_dtype(dtype: Dtype) -> Dtype:
    """Returns the dtype in which a dense layer should compute.

    It is `dtype`, except float32 for bfloat16 on a CPU. There XLA multiplies in float32 anyway,
    after rounding the weights to bfloat16. Without the rounding a step of the blog post's network
    is a fifth faster at batch size 32 and almost twice as fast at 8 (2 cores of a Xeon).
    """
    if dtype == jnp.bfloat16 and not _portable.get() and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    return dtype


def _onednn_takes(x: jax.Array, dtype: Dtype) -> Dtype:
    """Returns the dtype in which oneDNN convolves the images x; None if oneDNN is not used."""
    if _portable.get() or not ffi.available():
        return None
    if x.shape[3] == 1 and dtype == jnp.bfloat16:
        dtype = jnp.dtype(jnp.float32)
    return dtype if ffi.takes(dtype) else None


def conv_plain(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """XLA's convolution: used by `conv` if oneDNN is not available, and the reference in tests."""
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
    """`conv`, or `conv_pool` if `pooled`, of float32 arrays by oneDNN, with float32 gradients.

    The inputs are rounded to `dtype`. Results and gradients are not, because XLA would only convert
    them back to float32.
    """
    y, _ = _computed(x.astype(dtype), kernel.astype(dtype), stride, padding, pooled)
    return y


def _computed(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, pooled: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the result, and the positions of the maxima for the gradients (None without pool)."""
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
    # XLA cannot remove half of a call, such as an unused gradient with respect to the images.
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
    if isinstance(g, SymbolicZero):  # the loss does not depend on the result
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
    """XLA's max-pool; its gradient is a select-and-scatter, which is slow on a CPU."""
    window = (1, 2, 2, 1)
    y: jax.Array = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
    return y


@jax.custom_vjp
def max_pool_by_corners(x: jax.Array) -> jax.Array:
    """`max_pool` as a maximum of four strided slices; its gradient uses comparisons and selects.

    This is one pass over memory, except on a TPU: pixels are laid out in tiles there, and XLA
    copies the slices between layouts.
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
    """Returns the Gaussian weighted mean around each pixel; padding has no weight.

    Args:
        x: float [batch, height, width, channels].
        deviation: standard deviation of the Gaussian, as a fraction of the side.

    Returns:
        An array of the same shape.
    """
    if _portable.get():
        return mean_around_by_products(x, deviation)
    thin = functools.partial(mean_around_by_thin_products, deviation=deviation)
    whole = functools.partial(mean_around_by_products, deviation=deviation)
    return lax.platform_dependent(x, cpu=thin, default=whole)


def mean_around_by_products(x: jax.Array, deviation: float) -> jax.Array:
    """`mean_around` as a matrix product for the rows and one for the columns, for accelerators.

    A convolution with filters of the same width would be far slower.
    """
    rows, columns = (_gaussian(side, deviation) for side in x.shape[1:3])
    return _by_rows_and_columns(rows, x, columns)


def mean_around_by_thin_products(x: jax.Array, deviation: float) -> jax.Array:
    """`mean_around` by low-rank matrices: at 96 pixels a third of the operations, for CPUs.

    Each Gaussian matrix is factored into two thin matrices. A Gaussian is a low-pass filter: with a
    deviation of 1/12 of the side, only 24 singular values are above float32 precision relative to
    the first, at any image size.
    """
    thin = (_thin_gaussian(side, deviation) for side in x.shape[1:3])
    for rows, columns in zip(*thin, strict=True):
        x = _by_rows_and_columns(rows, x, columns)
    return x


def _by_rows_and_columns(rows: np.ndarray, x: jax.Array, columns: np.ndarray) -> jax.Array:
    # Full float32 precision on accelerators too, because the mean is subtracted from close values.
    return jnp.einsum(
        "ij,bjkc,lk->bilc",
        rows.astype(x.dtype),
        x,
        columns.astype(x.dtype),
        precision=lax.Precision.HIGHEST,
    )


@functools.cache
def _thin_gaussian(side: int, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns matrices [rank, side] and [side, rank]; second @ first equals `_gaussian`."""
    left, values, right = np.linalg.svd(_gaussian(side, deviation))
    told = values > 2**-22 * values[0]
    return right[told], (left * values)[:, told]


def _gaussian(side: int, deviation: float) -> np.ndarray:
    """Returns [side, side]; row i has the weights of the pixels around pixel i, with sum 1."""
    at = np.arange(side)
    weights = np.exp(-0.5 * np.square((at[:, None] - at) / (deviation * side)))
    return weights / weights.sum(1, keepdims=True)
