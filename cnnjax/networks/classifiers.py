"""The networks that tell classes apart."""

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
"""The second head, and the collection in which a network made with one leaves its logits."""

FINAL, FINE = "final", "fine"
"""The last feature maps; and those of the stage before, twice as fine, where there is one."""

SMALLEST = 10  # pixels: side of the smallest image that leaves BaselineCNN's pools something

STEM_SIZES = {2: 3, 4: 7}  # side of the ResNet's first kernel, by its stride


def make_model(
    config: ModelConfig,
    dtype: Dtype = jnp.float32,
    *,
    classes: int = 2,
    auxiliary: bool = False,
    remat: bool = False,
) -> nn.Module:
    """Returns the network that the config names; its parameters come from `model.init`.

    Args:
        config: which network, and its size.
        dtype: what it computes in, float32 or bfloat16. Parameters and the statistics of batch norm
            are float32 in any case, and so are the logits.
        classes: how many to tell apart: two have one logit, [batch]; K of them K, [batch, K].
        auxiliary: with a second head on the last features, whose logits [batch] `apply` leaves in
            the collection `AUXILIARY` in training, where that is mutable. Else it is not needed,
            nor are its parameters.
        remat: the ResNet keeps no activations inside its blocks for the backward pass, which
            computes them again (`jax.checkpoint`).
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
    """Returns the network that a run of the config trains, in the precision that it settled on.

    Args:
        config: of the run.
        classes: names of the labels that it tells apart.
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
    """Returns the weight of the auxiliary head's loss: 0 where it has nothing to add to classes.

    It tells the causes of one of two classes apart.
    """
    causes = {"BACTERIA", "VIRUS"} & {name.upper() for name in classes}
    return train.auxiliary if len(classes) == 2 and not causes else 0.0


def _prepared(images: jax.Array, network: BaselineCNN | ResNet) -> jax.Array:
    """Returns what the first convolution sees: [batch, height, width, 1 or 2]."""
    if network.standardize:
        images = standardized(images)
    if network.local_contrast:
        images = jnp.concatenate([images, local_contrast(images)], -1)
    return images


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
    outputs: int = 1

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns logits of images [batch, height, width, 1]; see the module.

        Returns:
            float32 [batch] of one output, else [batch, outputs].

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
        x = nn.Dense(self.outputs, kernel_init=glorot, dtype=dtype, name="dense2")(x)
        return (x[:, 0] if self.outputs == 1 else x).astype(jnp.float32)


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
    outputs: int = 1
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns logits of images [batch, height, width, 1]; see the module.

        Returns:
            float32 [batch] of one output, else [batch, outputs].
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
    """Lets `cnnjax.evaluation.explain` see feature maps, and take gradients by them."""
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
