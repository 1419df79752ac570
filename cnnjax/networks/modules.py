"""The modules that the networks are built of."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.ops import layers
from cnnjax.ops.layers import Dtype

SURROUND = 1 / 12
"""Standard deviation of the Gaussian window of `local_contrast`, as a fraction of the side."""

Initializer = Callable[..., jax.Array]


def standardized(images: jax.Array) -> jax.Array:
    """Standardizes each image to mean 0 and standard deviation 1 over its pixels.

    Args:
        images: float32 [batch, height, width, 1]. A constant image becomes zero.
    """
    centred = images - images.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(centred).mean((1, 2, 3), keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6)


def local_contrast(images: jax.Array) -> jax.Array:
    """Subtracts the local mean from each pixel and divides by the local standard deviation.

    This is local contrast normalization: c / sqrt(G(c^2) + 0.01) with c = z - G(z). G is a Gaussian
    weighted mean around the pixel; its standard deviation is `SURROUND` times the side, and pixels
    beyond the edge have no weight. It follows Jarrett et al., "What is the best multi-stage
    architecture for object recognition?", ICCV 2009, with one difference: they limit the divisor
    from below by the image's mean deviation; here 0.1^2 is added to the variance.

    Args:
        images: z, float32 [batch, height, width, 1], as `standardized` returns them.

    Returns:
        [batch, height, width, 1].
    """
    centred = images - layers.mean_around(images, SURROUND)
    variance = layers.mean_around(jnp.square(centred), SURROUND)
    return centred * jax.lax.rsqrt(variance + 0.01)


class Conv(nn.Module):
    """A convolution, `layers.conv`, with its kernel as a parameter.

    With `repeat`, the kernel is that of an input whose channels are repeated so many times.

    Attributes:
        features: number of output channels.
        size: side length of the kernel.
        stride: stride in both directions.
        padding: see `layers.conv`.
        repeat: number of repetitions of the input channels.
        dtype: dtype of the computation.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: layers.Padding = "SAME"
    repeat: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, in] to [batch, height', width', features]."""
        shape = (self.size, self.size, x.shape[-1] * self.repeat, self.features)
        kernel = _merge_equal(self.param("kernel", _he_normal, shape), self.repeat)
        return layers.conv(
            x,
            kernel,
            stride=self.stride,
            padding=self.padding,
            dtype=self.dtype,
        )


class ConvPool(nn.Module):
    """3x3 convolution, bias, relu and 2x2 max-pool.

    It pools before bias and relu. Both are monotonic, so relu(pool(x) + b) = pool(relu(x + b)),
    with the same gradient and a quarter of the elementwise work.

    Attributes:
        features: number of output channels.
        repeat: see `Conv`.
        dtype: dtype of the computation.
    """

    features: int
    repeat: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, in] to [batch, (height-2)//2, (width-2)//2, features]."""
        kernel_init = nn.initializers.glorot_uniform()
        shape = (3, 3, x.shape[-1] * self.repeat, self.features)
        kernel = _merge_equal(self.param("kernel", kernel_init, shape), self.repeat)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = layers.conv_pool(x, kernel, padding="VALID", dtype=self.dtype)
        return nn.relu(x + bias.astype(x.dtype))


class BatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy, arXiv:1502.03167).

    Variables and the formula of the variance, E[x^2] - E[x]^2, are those of `flax.linen.BatchNorm`
    with momentum 0.9. It is computed as a x + b, with two numbers per channel; this needs two sums
    over the batch in the forward pass and two in the backward pass. It computes in float32 and
    returns float32: rounding after the following operation saves one pass over the maps.
    """

    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [batch, height, width, channels] to float32 of the same shape."""
        channels = x.shape[3:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        x = x.astype(jnp.float32)
        if train:
            mean, square = x.mean((0, 1, 2)), jnp.square(x).mean((0, 1, 2))
            variance = jnp.maximum(0, square - jnp.square(mean))
            if not self.is_initializing():
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean
                running_variance.value = 0.9 * running_variance.value + 0.1 * variance
        else:
            mean, variance = running_mean.value, running_variance.value
        a = scale * jax.lax.rsqrt(variance + 1e-5)
        return x * a + (bias - mean * a)


def _he_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws a kernel as a matrix: the same fan-in, compiled in half the time."""
    matrix = (math.prod(shape[:-1]), shape[-1])
    return nn.initializers.he_normal()(key, matrix).reshape(shape)


def _merge_equal(kernel: jax.Array, repeat: int) -> jax.Array:
    """Sums the filters over repeated channels: equal to filtering the repeated input."""
    if repeat == 1:
        return kernel
    height, width, channels, features = kernel.shape
    return kernel.reshape(height, width, repeat, channels // repeat, features).sum(2)
