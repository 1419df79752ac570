"""The classification networks."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.config import Config, ModelConfig, TrainConfig
from cnnjax.errors import InputError
from cnnjax.networks.imported import expect_second_head, make_imported
from cnnjax.networks.modules import BatchNorm, Conv, ConvPool, local_contrast, standardized
from cnnjax.ops import layers
from cnnjax.ops.layers import Dtype

AUXILIARY = "auxiliary"
"""Name of the auxiliary head, and of the variable collection to which its logits are written."""

FINAL, FINE = "final", "fine"
"""Names of the last feature maps, and of those of the stage before, with twice the resolution. If
there is no stage before, both names have the same maps."""

SMALLEST = 10  # smallest side length in pixels that BaselineCNN accepts

STEM_SIZES = {2: 3, 4: 7}  # side length of the ResNet's first kernel, by its stride


def make_model(
    config: ModelConfig,
    dtype: Dtype = jnp.float32,
    *,
    classes: int = 2,
    auxiliary: bool = False,
    remat: bool = False,
) -> nn.Module:
    """Returns the network that the config names; `init` of the network draws its parameters.

    Args:
        config: the network and its size.
        dtype: dtype of the computation, float32 or bfloat16. Parameters, batch norm statistics and
            logits are always float32.
        classes: number of classes. Two classes have one logit, [batch]; K > 2 classes have logits
            [batch, K].
        auxiliary: whether to add an auxiliary head on the last features. In training, `apply`
            writes its logits [batch] to the collection `AUXILIARY`, if that is mutable. Evaluation
            needs neither the head nor its parameters.
        remat: ResNet only: recompute the activations inside the blocks in the backward pass instead
            of storing them (`jax.checkpoint`).

    Raises:
        InputError: `config.name` is an import path that does not give a suitable network.
    """
    outputs = 1 if classes == 2 else classes
    if ":" in config.name:
        network = make_imported(config.name, dtype=dtype, auxiliary=auxiliary, outputs=outputs)
        if auxiliary:
            expect_second_head(network)
        return network
    if config.name == "baseline":
        return BaselineCNN(
            config.channels, config.standardize, config.local_contrast, dtype, auxiliary, outputs
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
        outputs=outputs,
        remat=remat,
    )


def model_of(config: Config, classes: Sequence[str]) -> nn.Module:
    """Returns the network of a run.

    Args:
        config: config of the run; its precision must not be `auto`.
        classes: names of the classes, in the order of their labels.
    """
    precision = jnp.dtype(config.train.precision)
    second = bool(second_head(config.train, classes))
    return make_model(
        config.model,
        precision,
        classes=len(classes),
        auxiliary=second,
        remat=config.train.remat,
    )


def second_head(train: TrainConfig, classes: Sequence[str]) -> float:
    """Returns the weight of the auxiliary head's loss, or 0 if the head does not apply.

    The head tells bacterial from viral pneumonia. It applies if there are two classes and neither
    of them is one of these causes.
    """
    causes = {"BACTERIA", "VIRUS"} & {name.upper() for name in classes}
    return train.auxiliary if len(classes) == 2 and not causes else 0.0


def _prepared(images: jax.Array, network: BaselineCNN | ResNet) -> jax.Array:
    """Returns the input of the first convolution, [batch, height, width, 1 or 2]."""
    if network.standardize:
        images = standardized(images)
    if network.local_contrast:
        images = jnp.concatenate([images, local_contrast(images)], -1)
    return images


class BaselineCNN(nn.Module):
    """The Keras network of the blog post, layer by layer.

    Convolution 3x3 with 32 filters, relu, max-pool 2; the same again; dense 128, relu; dense 1. As
    in Keras, convolutions have no padding and kernels are initialized Glorot-uniform. With
    `channels=3` on 64 x 64 pixels it has 813,217 parameters, as in the post.

    Attributes:
        channels: number of input channels (the gray image is repeated).
        standardize: whether to standardize each image first.
        local_contrast: whether to add the local contrast as another input channel.
        dtype: dtype of the computation.
        auxiliary: whether there is an auxiliary head.
        outputs: number of logits per image.
    """

    channels: int = 1
    standardize: bool = False
    local_contrast: bool = False
    dtype: Dtype = jnp.float32
    auxiliary: bool = False
    outputs: int = 1

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns the logits of images [batch, height, width, 1]; see `cnnjax.networks`.

        Returns:
            float32 [batch] for one output, else [batch, outputs].

        Raises:
            InputError: the images have fewer than 10 rows or columns.
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
        x = nn.Dense(self.outputs, kernel_init=glorot, dtype=dtype, name="dense2")(x)
        return (x[:, 0] if self.outputs == 1 else x).astype(jnp.float32)


class ResidualBlock(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))) of He et al., CVPR 2016 (arXiv:1512.03385), figure 2.

    If the shape changes, the shortcut applies a 1x1 convolution with the same stride and batch norm
    to x. The scale of the last batch norm is initialized to zero, so the block starts as the
    identity (Goyal et al., arXiv:1706.02677).
    """

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
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

    The stem is a convolution (3x3 with stride 2, or 7x7 with stride 4), batch norm and relu. Stage
    k, from 0, has width * 2**k channels; each stage after the first halves the resolution.

    Attributes:
        channels: number of input channels (the gray image is repeated).
        width: number of channels of the first stage.
        depth: number of residual blocks per stage.
        stages: number of stages.
        stem: stride of the first convolution, 2 or 4.
        standardize: whether to standardize each image first.
        local_contrast: whether to add the local contrast as another input channel.
        dtype: dtype of the computation.
        auxiliary: whether there is an auxiliary head.
        outputs: number of logits per image.
        remat: whether to recompute activations in the backward pass.
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
    outputs: int = 1
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns the logits of images [batch, height, width, 1]; see `cnnjax.networks`.

        Returns:
            float32 [batch] for one output, else [batch, outputs].
        """
        x = Conv(
            self.width,
            size=STEM_SIZES[self.stem],
            stride=self.stem,
            repeat=self.channels,
            dtype=self.dtype,
            name="stem",
        )(_prepared(images, self))
        x = nn.relu(BatchNorm(name="stem_norm")(x, train=train)).astype(self.dtype)
        residual_block = nn.remat(ResidualBlock, static_argnums=2) if self.remat else ResidualBlock
        for stage in range(self.stages):
            for block in range(self.depth):
                x = residual_block(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train)
            if stage == max(0, self.stages - 2):
                x = _exposed(self, FINE, x)
        x = _exposed(self, FINAL, x)
        x = x.mean((1, 2), dtype=jnp.float32)
        _second_head(self, x, train)
        x = nn.Dense(self.outputs, dtype=jnp.float32, name="head")(x)
        return x[:, 0] if self.outputs == 1 else x


def _exposed(network: nn.Module, name: str, maps: jax.Array) -> jax.Array:
    """Exposes feature maps to `cnnjax.evaluation.explain`, for their values and gradients."""
    if network.is_initializing():  # the maps are not variables of the network
        return maps
    network.sow("intermediates", name, maps)
    perturbed: jax.Array = network.perturb(name, maps)
    return perturbed


def _second_head(network: BaselineCNN | ResNet, features: jax.Array, train: bool) -> None:
    """Writes the auxiliary head's logits of features [batch, n] to the collection `AUXILIARY`.

    Does nothing if the network has no auxiliary head, or in evaluation.
    """
    if network.auxiliary and (train or network.is_initializing()):
        logits = nn.Dense(1, dtype=jnp.float32, name=AUXILIARY)(features)[:, 0]
        if not network.is_initializing():
            network.sow(AUXILIARY, "logits", logits)
