"""The layers, each with a forward function and a backward function, and its derivation.

The calls are `y, cache = <layer>_forward(x, ...)` and `dx, ... = <layer>_backward(dy, cache)`,
where dy is delta = dL/dy. Every derivation applies the chain rule, dL/dx_j = sum_i dL/dy_i
dy_i/dx_j, to the formula of the forward pass. Indices: n is the image, (h, w) the position in the
output, (i, j) the position in a window, c the input channel, o the output channel.

Images are float [batch, height, width, channels]. All functions are pure; the result has x's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cnnjax.scratch.shapes import expect, show

Pair = tuple[int, int]
Padding = Literal["SAME", "VALID"] | tuple[Pair, Pair]

IMAGES = ("batch", "height", "width", "channels")


class ConvCache(NamedTuple):
    """What the backward pass of a convolution needs."""

    columns: np.ndarray
    """[batch * height' * width', kernel height * kernel width * in]; each row is a window."""
    kernel: np.ndarray
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    stride: Pair
    padding: tuple[Pair, Pair]


def conv_forward(
    x: np.ndarray, kernel: np.ndarray, *, stride: int | Pair = 1, padding: Padding = "SAME"
) -> tuple[np.ndarray, ConvCache]:
    """Convolves images with a bank of filters (without flipping them: cross-correlation).

    With zero-padded x and strides s and t,

        y[n, h, w, o] = sum_ijc x[n, s h + i, t w + j, c] K[i, j, c, o].

    As a matrix product: each window of x is a row of a matrix X, [windows, kernel height * kernel
    width * in], and each filter is a column of a matrix K, [kernel height * kernel width * in,
    out]; then Y = X K. This copies each pixel once for every window that contains it (im2col). The
    remaining work is one product of large matrices, which processors compute most efficiently.

    Args:
        x: [batch, height, width, in].
        kernel: [kernel height, kernel width, in, out].
        stride: stride of the filters in pixels, one number or (rows, columns).
        padding: `SAME` pads with zeros to ceil(size / stride), with an odd row or column at the
            bottom or right; `VALID` does not pad; ((top, bottom), (left, right)) gives the amounts.

    Returns:
        [batch, height', width', out], and the cache.

    Raises:
        ValueError: the shapes do not fit.
    """
    expect("x", x.shape, IMAGES)
    because = f"for x of shape {show(x.shape)}"
    expect("kernel", kernel.shape, ("kernel height", "kernel width", x.shape[-1], "out"), because)
    window = kernel.shape[:2]
    stride = _pair(stride)
    padding = _amounts(padding, x.shape[1:3], window, stride)
    padded = np.pad(x, ((0, 0), *padding, (0, 0))) if any(map(any, padding)) else x
    height, width = _places(padded.shape, window, stride)
    # [batch, height', width', in, kernel height, kernel width]: a view, no pixel copied yet.
    windows = sliding_window_view(padded, window, axis=(1, 2))[:, :: stride[0], :: stride[1]]
    filters = kernel.reshape(-1, kernel.shape[-1])
    columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, filters.shape[0])
    y = (columns @ filters).reshape(x.shape[0], height, width, kernel.shape[-1])
    return y, ConvCache(columns, kernel, x.shape, y.shape, stride, padding)


def conv_backward(dy: np.ndarray, cache: ConvCache) -> tuple[np.ndarray, np.ndarray]:
    """Returns (dL/dx, dL/dK) for dy = dL/dy, [batch, height', width', out]."""
    return conv_input_gradient(dy, cache), conv_kernel_gradient(dy, cache)


def conv_kernel_gradient(dy: np.ndarray, cache: ConvCache) -> np.ndarray:
    """Returns dL/dK, [kernel height, kernel width, in, out].

    Every position uses the same K, so the derivative is a sum over positions:

        dL/dK[i, j, c, o] = sum_nhw x[n, s h + i, t w + j, c] delta[n, h, w, o].

    With the matrices of the forward pass this is dL/dK = X^T delta.
    """
    expect("dy", dy.shape, cache.y_shape, "like the convolution's output")
    flat = cache.columns.T @ dy.reshape(-1, dy.shape[-1])
    return flat.reshape(cache.kernel.shape)


def conv_input_gradient(dy: np.ndarray, cache: ConvCache) -> np.ndarray:
    """Returns dL/dx, [batch, height, width, in].

    With the matrices of the forward pass, dL/dX = delta K^T. A pixel of x is in X once for each
    window that contains it, and the chain rule sums over these windows:

        dL/dx[n, h', w', c] = sum of (delta K^T)[n, h, w, i, j, c] where s h + i = h', t w + j = w'.

    For one position (i, j) in the window, no pixel occurs twice. The sum is therefore one addition
    of arrays for each (i, j) (col2im). It equals a convolution of delta with the kernel rotated by
    180 degrees.
    """
    expect("dy", dy.shape, cache.y_shape, "like the convolution's output")
    kernel, (top, bottom), (left, right) = cache.kernel, *cache.padding
    batch, height, width, channels = cache.x_shape
    window = kernel.shape[:2]
    dcolumns = dy.reshape(-1, dy.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1]).T
    dcolumns = dcolumns.reshape(*dy.shape[:3], *window, channels)
    dpadded = np.zeros((batch, top + height + bottom, left + width + right, channels), dy.dtype)
    for i, j, seen in _seen_at(dpadded, window, cache.stride):
        seen += dcolumns[:, :, :, i, j]
    return dpadded[:, top : top + height, left : left + width]


class PoolCache(NamedTuple):
    """What the backward pass of pooling needs."""

    x: np.ndarray
    y: np.ndarray
    window: Pair
    stride: Pair


def max_pool_forward(
    x: np.ndarray, *, size: int | Pair = 2, stride: int | Pair | None = None
) -> tuple[np.ndarray, PoolCache]:
    """Takes the maximum of each window, y[n, h, w, c] = max_ij x[n, s h + i, t w + j, c].

    Args:
        x: [batch, height, width, channels].
        size: size of the windows in pixels, one number or (rows, columns).
        stride: stride of the windows; by default their size, so they do not overlap. Rows and
            columns that do not fill a window are dropped.

    Returns:
        [batch, height', width', channels], and the cache.

    Raises:
        ValueError: x does not have four axes, or is smaller than a window.
    """
    window, step = _pool(x, size, stride)
    first, *rest = (seen for _, _, seen in _seen_at(x, window, step))
    y = first.copy()
    for seen in rest:
        np.maximum(y, seen, out=y)
    return y, PoolCache(x, y, window, step)


def max_pool_backward(dy: np.ndarray, cache: PoolCache) -> np.ndarray:
    """Returns dL/dx, [batch, height, width, channels].

    y is a copy of the maximum of its window. Hence dy/dx is 1 at that pixel and 0 elsewhere, and
    that pixel gets delta. If several pixels have the maximum, y is not differentiable; the first of
    them in row order gets delta, as in `cnnjax.ops.layers.max_pool`. Overlapping windows add up.
    """
    expect("dy", dy.shape, cache.y.shape, "like the pool's output")
    dx = np.zeros(cache.x.shape, dy.dtype)
    waiting = np.ones(dy.shape, bool)  # windows whose maximum has not been found yet
    pixels = _seen_at(cache.x, cache.window, cache.stride)
    targets = _seen_at(dx, cache.window, cache.stride)
    for (_, _, seen), (_, _, target) in zip(pixels, targets, strict=True):
        first = seen == cache.y
        first &= waiting
        waiting ^= first
        target += dy * first
    return dx


def average_pool_forward(
    x: np.ndarray, *, size: int | Pair = 2, stride: int | Pair | None = None
) -> tuple[np.ndarray, PoolCache]:
    """Takes the mean of each window, y[n, h, w, c] = sum_ij x[n, s h + i, t w + j, c] / k.

    k is the number of pixels in a window. Arguments, results and errors are those of
    `max_pool_forward`.
    """
    window, step = _pool(x, size, stride)
    first, *rest = (seen for _, _, seen in _seen_at(x, window, step))
    y = first.copy()
    for seen in rest:
        y += seen
    y /= window[0] * window[1]
    return y, PoolCache(x, y, window, step)


def average_pool_backward(dy: np.ndarray, cache: PoolCache) -> np.ndarray:
    """Returns dL/dx: each pixel gets delta / k from every window of k pixels that contains it."""
    expect("dy", dy.shape, cache.y.shape, "like the pool's output")
    dx = np.zeros(cache.x.shape, dy.dtype)
    share = dy / (cache.window[0] * cache.window[1])
    for _, _, target in _seen_at(dx, cache.window, cache.stride):
        target += share
    return dx


def global_average_pool_forward(x: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns the mean of each channel over the k pixels of an image, [batch, channels]."""
    expect("x", x.shape, IMAGES)
    return x.mean((1, 2)), x.shape


def global_average_pool_backward(dy: np.ndarray, x_shape: tuple[int, ...]) -> np.ndarray:
    """Returns dL/dx, [batch, height, width, channels]: dy/dx is 1 / k at every pixel."""
    batch, height, width, channels = x_shape
    expect("dy", dy.shape, (batch, channels), f"for x of shape {show(x_shape)}")
    return np.broadcast_to((dy / (height * width))[:, None, None], x_shape).copy()


def flatten_forward(x: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Reshapes each image to a vector, [batch, height * width * channels], in row-major order."""
    return x.reshape(x.shape[0], -1), x.shape


def flatten_backward(dy: np.ndarray, x_shape: tuple[int, ...]) -> np.ndarray:
    """Returns dL/dx: the same numbers in x's shape."""
    expect("dy", (dy.size,), (int(np.prod(x_shape)),), f"for x of shape {show(x_shape)}")
    return dy.reshape(x_shape)


class DenseCache(NamedTuple):
    """What the backward pass of a dense layer needs."""

    x: np.ndarray
    kernel: np.ndarray


def dense_forward(
    x: np.ndarray, kernel: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, DenseCache]:
    """Applies a dense layer, Y = X K + b.

    Args:
        x: [batch, in].
        kernel: [in, out].
        bias: [out].

    Returns:
        [batch, out], and the cache.

    Raises:
        ValueError: the shapes do not fit.
    """
    expect("x", x.shape, ("batch", "in"))
    expect("kernel", kernel.shape, (x.shape[1], "out"), f"for x of shape {show(x.shape)}")
    expect("bias", bias.shape, kernel.shape[1:], f"for kernel of shape {show(kernel.shape)}")
    return x @ kernel + bias, DenseCache(x, kernel)


def dense_backward(dy: np.ndarray, cache: DenseCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (dL/dx, dL/dK, dL/db).

    The derivatives of y[n, o] = sum_c x[n, c] K[c, o] + b[o] give:

        dL/dx[n, c] = sum_o delta[n, o] K[c, o],    dL/dX = delta K^T,
        dL/dK[c, o] = sum_n x[n, c] delta[n, o],    dL/dK = X^T delta,
        dL/db[o] = sum_n delta[n, o].
    """
    x, kernel = cache
    expect("dy", dy.shape, (x.shape[0], kernel.shape[1]), "like the dense layer's output")
    return dy @ kernel.T, x.T @ dy, dy.sum(0)


def bias_forward(x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Adds a bias to each channel (the last axis): y = x + b."""
    expect("bias", bias.shape, x.shape[-1:], f"for x of shape {show(x.shape)}")
    return x + bias


def bias_backward(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (dL/dx, dL/db): delta, and its sum over all positions, which share the bias b."""
    return dy, _sum_channels(dy)


def relu_forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sets negative numbers to zero, y = max(x, 0). The cache is y."""
    y = np.maximum(x, 0)
    return y, y


def relu_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns dL/dx: delta where y > 0, which is where x > 0, and 0 elsewhere, including x = 0."""
    expect("dy", dy.shape, y.shape, "like the relu's output")
    return dy * (y > 0)


def residual_forward(x: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """Adds the output of a branch to the shortcut: y = x + branch."""
    expect("branch", branch.shape, x.shape, "like the shortcut")
    return x + branch


def residual_backward(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (dL/dx, dL/dbranch); both are delta."""
    return dy, dy


def dropout_forward(
    x: np.ndarray, rate: float, keep: np.ndarray | np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sets random values of x to zero and scales up the others (inverted dropout), in training.

    With the mask m, 1 for kept values and 0 for dropped ones, and the rate p, y = x m / (1 - p).
    Since E[m] = 1 - p, E[y] = x. Evaluation therefore leaves out the layer, without any scaling
    (Srivastava et al., JMLR 2014).

    Args:
        x: any shape.
        rate: p, the probability that a value is dropped, in [0, 1).
        keep: m, bool of the shape of x, or a generator that draws it.

    Returns:
        y, and the cache m / (1 - p).

    Raises:
        ValueError: the rate is out of range, or the shapes differ.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"expected a dropout rate in [0, 1), got {rate}")
    if isinstance(keep, np.random.Generator):
        keep = keep.random(x.shape) >= rate
    expect("keep", keep.shape, x.shape, "like x")
    scale = keep.astype(x.dtype) / (1 - float(rate))
    return x * scale, scale


def dropout_backward(dy: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns dL/dx = delta m / (1 - p), with the mask m of the forward pass."""
    expect("dy", dy.shape, scale.shape, "like the dropout's output")
    return dy * scale


class BatchNormCache(NamedTuple):
    """What the backward pass of batch norm needs."""

    normal: np.ndarray
    """x^, the normalized input: (x - mean) / standard deviation."""
    gain: np.ndarray
    """[channels], gamma / sqrt(var + epsilon)."""
    train: bool
    """Whether the statistics of the batch were used."""


def batch_norm_forward(
    x: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    *,
    train: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], BatchNormCache]:
    """Normalizes each channel to mean 0 and variance 1, then applies a learned scale and bias.

    With the mean mu and the (biased) variance v of the channel,

        x^ = (x - mu) / sqrt(v + epsilon),    y = gamma x^ + beta.

    In training mu and v are the statistics of the batch, over the m pixels of all its images. The
    running statistics are updated as running <- momentum running + (1 - momentum) batch. In
    evaluation mu and v are the running statistics, so the result for an image does not depend on
    the other images (Ioffe and Szegedy, arXiv:1502.03167).

    Args:
        x: [batch, ..., channels].
        scale: gamma, [channels].
        bias: beta, [channels].
        mean: running mean, [channels].
        var: running variance, [channels].
        train: whether to use the statistics of the batch and to update the running ones.
        momentum: momentum of the running statistics.
        epsilon: added to the variance, against division by zero.

    Returns:
        y, the running (mean, var) after this batch, and the cache.

    Raises:
        ValueError: the shapes do not fit.
    """
    expect("x", x.shape, ("batch", *(["size"] * (x.ndim - 2)), "channels"))
    channels, because = x.shape[-1:], f"for x of shape {show(x.shape)}"
    for name, value in (("scale", scale), ("bias", bias), ("mean", mean), ("var", var)):
        expect(name, value.shape, channels, because)
    if train:
        pixels = x.size // x.shape[-1]
        batch_mean = _sum_channels(x) / pixels
        batch_var = _sum_channels((x - batch_mean) ** 2) / pixels
        running = (
            momentum * mean + (1 - momentum) * batch_mean,
            momentum * var + (1 - momentum) * batch_var,
        )
        mean, var = batch_mean, batch_var
    else:
        running = mean, var
    deviation = np.sqrt(var + epsilon)
    normal = (x - mean) / deviation
    return normal * scale + bias, running, BatchNormCache(normal, scale / deviation, train)


def batch_norm_backward(
    dy: np.ndarray, cache: BatchNormCache
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (dL/dx, dL/dgamma, dL/dbeta).

    From y = gamma x^ + beta, with sums over all pixels p of the channel:

        dL/dgamma = sum_p delta_p x^_p,    dL/dbeta = sum_p delta_p.

    In evaluation mu and v are constants, and dL/dx = gamma delta / sqrt(v + epsilon). In training
    mu = sum_p x_p / m and v = sum_p (x_p - mu)^2 / m also depend on a pixel q, with derivatives

        dmu/dx_q = 1 / m,    dv/dx_q = 2 (x_q - mu) / m

    (the change of mu does not affect v, because sum_p (x_p - mu) = 0). Every x^_p depends on both:

        dx^_p/dmu = -1 / sqrt(v + epsilon),
        dx^_p/dv = -(x_p - mu) / 2 (v + epsilon)^(3/2) = -x^_p / 2 (v + epsilon).

    The three paths from x_q to L add up to

        dL/dx_q = gamma / sqrt(v + epsilon) [delta_q - dL/dbeta / m - x^_q dL/dgamma / m].

    This removes from delta its mean and its component along x^, because a shift or a scaling of the
    whole batch does not change y.
    """
    normal, gain, train = cache
    expect("dy", dy.shape, normal.shape, "like batch norm's output")
    dscale, dbias = _sum_channels(dy * normal), _sum_channels(dy)
    if train:
        dy = dy - (dbias + normal * dscale) / (dy.size // dy.shape[-1])
    return gain * dy, dscale, dbias


def _seen_at(x: np.ndarray, window: Pair, stride: Pair) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields i, j and the view x[n, s h + i, t w + j, c] [batch, height', width', channels].

    The view holds the pixel at position (i, j) of every window. Positions are in row order. The
    views share the memory of x: adding to a view adds to x.
    """
    height, width = _places(x.shape, window, stride)
    for i in range(window[0]):
        for j in range(window[1]):
            rows = slice(i, i + stride[0] * height, stride[0])
            columns = slice(j, j + stride[1] * width, stride[1])
            yield i, j, x[:, rows, columns][:, :height, :width]


def _places(shape: tuple[int, ...], window: Pair, stride: Pair) -> Pair:
    """Returns the number of windows in the vertical and horizontal direction."""
    if window[0] > shape[1] or window[1] > shape[2]:
        raise ValueError(
            f"expected images at least as large as the window {show(window)},"
            f" got {show(shape)} including padding"
        )
    return (shape[1] - window[0]) // stride[0] + 1, (shape[2] - window[1]) // stride[1] + 1


def _amounts(padding: Padding, size: Pair, window: Pair, stride: Pair) -> tuple[Pair, Pair]:
    """Returns the number of padding pixels: ((top, bottom), (left, right))."""
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding == "SAME":
        top, left = (
            max((-(-length // step) - 1) * step + k - length, 0)
            for length, k, step in zip(size, window, stride, strict=True)
        )
        return (top // 2, top - top // 2), (left // 2, left - left // 2)
    amounts = np.array(padding)
    if amounts.shape != (2, 2) or amounts.min() < 0:
        raise ValueError(
            f"expected padding SAME, VALID or ((top, bottom), (left, right)), got {padding!r}"
        )
    return padding


def _pool(x: np.ndarray, size: int | Pair, stride: int | Pair | None) -> tuple[Pair, Pair]:
    expect("x", x.shape, IMAGES)
    window = _pair(size)
    return window, window if stride is None else _pair(stride)


def _pair(value: int | Pair) -> Pair:
    pair = (value, value) if isinstance(value, int) else value
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"expected one or two positive integers, got {value!r}")
    return pair


def _sum_channels(x: np.ndarray) -> np.ndarray:
    """Sums over all axes except the last.

    It sums within images first, because shorter sums have smaller rounding errors in float32.
    """
    return x.sum(tuple(range(1, x.ndim - 1))).sum(0)
