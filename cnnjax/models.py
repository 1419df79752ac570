"""The networks. The only module that imports Flax's layers.

Every network is called as `model.apply(variables, images, train=...)` with float32 images [batch,
height, width, 1] in [0, 1], and returns logits [batch]. Feature maps that `cnnjax.explain` looks at
are named by `_exposed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import layers
from cnnjax.config import Config, ModelConfig
from cnnjax.errors import InputError
from cnnjax.layers import Dtype

AUXILIARY = "auxiliary"
"""The second head, and the collection in which a network made with one leaves its logits."""

FINAL, FINE = "final", "fine"
"""The last feature maps; and those of the stage before, twice as fine, where there is one."""

SMALLEST = 10  # pixels: side of the smallest image that leaves BaselineCNN's pools something

STEM_SIZES = {2: 3, 4: 7}  # side of the ResNet's first kernel, by its stride

SURROUND = 1 / 12
"""What lies around a pixel for `local_contrast`: a Gaussian's deviation, as a part of the side."""

Initializer = Callable[..., jax.Array]


def make_model(
    config: ModelConfig, dtype: Dtype = jnp.float32, *, auxiliary: bool = False
) -> nn.Module:
    """Returns the network that the config names; its parameters come from `model.init`.

    Args:
        config: which network, and its size.
        dtype: what it computes in, float32 or bfloat16. Parameters and the statistics of batch norm
            are float32 in any case, and so are the logits.
        auxiliary: with a second head on the last features, whose logits [batch] `apply` leaves in
            the collection `AUXILIARY` in training, where that is mutable. Else it is not needed,
            nor are its parameters.
    """
    if config.name == "baseline":
        return BaselineCNN(
            config.channels, config.standardize, config.local_contrast, dtype, auxiliary
        )
    return ResNet(
        channels=config.channels,
        width=config.width,
        depth=config.depth,
        stages=config.stages,
        stem=config.stem,
        standardize=config.standardize,
        local_contrast=config.local_contrast,
        dtype=dtype,
        auxiliary=auxiliary,
    )


def model_of(config: Config) -> nn.Module:
    """Returns the network that a run of the config trains, in the precision that it settled on."""
    precision = jnp.dtype(config.train.precision)
    return make_model(config.model, precision, auxiliary=bool(config.train.auxiliary))


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


def _prepared(images: jax.Array, network: BaselineCNN | ResNet) -> jax.Array:
    """Returns what the first convolution sees: [batch, height, width, 1 or 2]."""
    if network.standardize:
        images = standardized(images)
    if network.local_contrast:
        images = jnp.concatenate([images, local_contrast(images)], -1)
    return images


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


class BaselineCNN(nn.Module):
    """The blog post's Keras network, layer by layer.

    Convolution 3x3 x 32, relu, max-pool 2; the same again; dense 128, relu; dense 1. Convolutions
    do not pad and kernels start Glorot-uniform, as Keras has it. With `channels=3` on 64x64 it has
    the post's 813,217 parameters.
    """

    channels: int = 1
    standardize: bool = False
    local_contrast: bool = False
    dtype: Dtype = jnp.float32
    auxiliary: bool = False

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns logits [batch] of images [batch, height, width, 1]; see the module.

        Raises:
            InputError: they have fewer than 10 rows or columns.
        """
        if min(images.shape[1:3]) < SMALLEST:
            raise InputError(
                f"the network baseline needs images of at least {SMALLEST} x {SMALLEST} pixels,"
                f" got {images.shape[1]} x {images.shape[2]}; raise --data.size"
            )
        glorot = nn.initializers.glorot_uniform()
        x = _prepared(images, self)
        x = ConvPool(32, repeat=self.channels, dtype=self.dtype, name="conv1")(x)
        x = ConvPool(32, dtype=self.dtype, name="conv2")(x)
        x = _exposed(self, FINAL, _exposed(self, FINE, x))
        x = x.reshape(x.shape[0], -1)
        dtype = layers.dense_dtype(self.dtype)
        x = nn.relu(nn.Dense(128, kernel_init=glorot, dtype=dtype, name="dense1")(x))
        _second_head(self, x, train)
        x = nn.Dense(1, kernel_init=glorot, dtype=dtype, name="dense2")(x)
        return x[:, 0].astype(jnp.float32)


class ResidualBlock(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))) of He et al., CVPR 2016 (arXiv:1512.03385), figure 2.

    Where the shape changes, x passes a 1x1 convolution with the same stride and batch norm. The
    last scale starts at zero, so that a block starts as the identity (Goyal et al.,
    arXiv:1706.02677).
    """

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [batch, height, width, in] to [batch, height', width', features]."""
        y = Conv(self.features, stride=self.stride, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(name="norm1")(y, train=train))
        y = Conv(self.features, dtype=self.dtype, name="conv2")(y)
        y = BatchNorm(nn.initializers.zeros, name="norm2")(y, train=train)
        if x.shape != y.shape:
            shortcut = Conv(self.features, 1, self.stride, dtype=self.dtype, name="conv3")
            x = BatchNorm(name="norm3")(shortcut(x), train=train)
        return nn.relu(x.astype(y.dtype) + y).astype(self.dtype)


class ResNet(nn.Module):
    """A small residual network: stem, stages of `depth` blocks, global average pool, dense 1.

    The stem is a convolution, 3x3 with stride 2 or 7x7 with stride 4, batch norm and relu. Stage k
    has width * 2**k channels; each stage after the first halves the resolution.
    """

    channels: int = 1
    width: int = 32
    depth: int = 1
    stages: int = 4
    stem: int = 2
    standardize: bool = False
    local_contrast: bool = False
    dtype: Dtype = jnp.float32
    auxiliary: bool = False

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns logits [batch] of images [batch, height, width, 1]; see the module."""
        x = Conv(
            self.width,
            size=STEM_SIZES[self.stem],
            stride=self.stem,
            repeat=self.channels,
            dtype=self.dtype,
            name="stem",
        )(_prepared(images, self))
        x = nn.relu(BatchNorm(name="stem_norm")(x, train=train)).astype(self.dtype)
        for stage in range(self.stages):
            for block in range(self.depth):
                x = ResidualBlock(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train)
            if stage == max(0, self.stages - 2):
                x = _exposed(self, FINE, x)
        x = _exposed(self, FINAL, x)
        x = x.mean((1, 2), dtype=jnp.float32)
        _second_head(self, x, train)
        return nn.Dense(1, dtype=jnp.float32, name="head")(x)[:, 0]


class LungFinder(nn.Module):
    """A small U-Net from a radiograph to logits of "this place is lung", the heart included.

    Convolution, batch norm and relu at each step; four halvings of the resolution on the way down,
    nearest-neighbour enlargement and the maps of the same size beside it on the way up (Ronneberger
    et al., MICCAI 2015, arXiv:1505.04597). It works at half the image's resolution at most, and
    sees each image standardized, with its local contrast beside it.
    """

    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits [batch, height / 2, width / 2] of images [batch, height, width, 1].

        Height and width are multiples of 16.
        """

        def block(x: jax.Array, features: int, name: str, stride: int = 1) -> jax.Array:
            x = Conv(features, stride=stride, name=f"{name}_conv")(x)
            return nn.relu(BatchNorm(name=f"{name}_norm")(x, train=train))

        width = self.width
        images = standardized(images)
        images = jnp.concatenate([images, local_contrast(images)], axis=-1)
        x = block(images, width, "down1", stride=2)
        skipped = [x]
        for level, features in enumerate((2 * width, 3 * width, 4 * width), start=2):
            x = block(x, features, f"down{level}a", stride=2)
            x = block(x, features, f"down{level}b")
            skipped.append(x)
        for level, features in ((3, 3 * width), (2, 2 * width), (1, width)):
            x = jnp.concatenate([_enlarged(x), skipped[level - 1]], axis=-1)
            x = block(x, features, f"up{level}")
        return nn.Dense(1, name="head")(x)[..., 0]


def _enlarged(x: jax.Array) -> jax.Array:
    """Repeats each place of [batch, height, width, channels] twice along both sides."""
    batch, height, width, channels = x.shape
    shape = (batch, height, 2, width, 2, channels)
    return jnp.broadcast_to(x[:, :, None, :, None], shape).reshape(
        batch, 2 * height, 2 * width, channels
    )


def _exposed(network: nn.Module, name: str, maps: jax.Array) -> jax.Array:
    """Lets `cnnjax.explain` see feature maps, and take gradients by them."""
    if network.is_initializing():  # they are no variables of the network
        return maps
    network.sow("intermediates", name, maps)
    perturbed: jax.Array = network.perturb(name, maps)
    return perturbed


def _second_head(network: BaselineCNN | ResNet, features: jax.Array, train: bool) -> None:
    """Leaves logits of features [batch, n] for `cnnjax.steps`, if the network is to have them."""
    if network.auxiliary and (train or network.is_initializing()):
        logits = nn.Dense(1, dtype=jnp.float32, name=AUXILIARY)(features)[:, 0]
        if not network.is_initializing():
            network.sow(AUXILIARY, "logits", logits)


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
