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
"""What lies around a pixel for `local_contrast`: a Gaussian's deviation, as a part of the side."""

Initializer = Callable[..., jax.Array]


def standardized(images: jax.Array) -> jax.Array:
    """Brings each image to mean 0 and standard deviation 1 over its pixels.

    Args:
        images: float32 [batch, height, width, 1]; an image of one gray level becomes zero.
    """
    centred = images - images.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(centred).mean((1, 2, 3), keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6)


def local_contrast(images: jax.Array) -> jax.Array:
    """Takes off each pixel the mean around it, and divides by the deviation around it.

    This is local contrast normalization: c / sqrt(G(c^2) + 0.01) of c = z - G(z), where G is the
    mean under a Gaussian around the pixel, with a deviation of `SURROUND` of the side; what lies
    beyond the edge does not count. After Jarrett et al., "What is the best multi-stage architecture
    for object recognition?", ICCV 2009, who divide by no less than the image's mean deviation,
    where this adds 0.1^2 to the variance.

    Args:
        images: z, float32 [batch, height, width, 1], as `standardized` returns them.

    Returns:
        [batch, height, width, 1].
    """
    centred = images - layers.mean_around(images, SURROUND)
    variance = layers.mean_around(jnp.square(centred), SURROUND)
    return centred * jax.lax.rsqrt(variance + 0.01)


class Conv(nn.Module):
    """A convolution's kernel around `layers.conv`.

    `repeat` says how many times the kernel has the channels of x, one set after the other.
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
    """Convolution, bias, relu and 2x2 max-pool, the last three in the order that costs least.

    Bias and relu are monotonic, so relu(pool(x) + b) = pool(relu(x + b)), with the same gradient
    and a quarter of the elementwise work. `repeat` is that of `Conv`.
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

    Variables and variance, E[x^2] - E[x]^2, are those of `flax.linen.BatchNorm` with momentum 0.9.
    As a x + b, with two numbers for each channel, it takes two sums over the batch forward and two
    backward. It computes in float32 and returns that: rounded only after what follows, it costs one
    pass over the maps fewer.
    """

    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [batch, height, width, channels] to the same in float32."""
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
    """Draws a kernel: as a matrix, which has the same fan-in and is compiled in half the time."""
    matrix = (math.prod(shape[:-1]), shape[-1])
    return nn.initializers.he_normal()(key, matrix).reshape(shape)


def _merge_equal(kernel: jax.Array, repeat: int) -> jax.Array:
    """Adds up filters over equal channels: they see what their sum sees in one of each kind."""
    if repeat == 1:
        return kernel
    height, width, channels, features = kernel.shape
    return kernel.reshape(height, width, repeat, channels // repeat, features).sum(2)
