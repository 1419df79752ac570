"""The segmentation network that finds the lungs."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.networks.modules import BatchNorm, Conv, local_contrast, standardized


class LungFinder(nn.Module):
    """A small U-Net from a radiograph to a map of logits: lung (including the heart) or not.

    Each block is convolution, batch norm and relu. The encoder halves the resolution four times.
    The decoder uses nearest-neighbour upsampling, concatenated with the encoder's maps of the same
    size (Ronneberger et al., MICCAI 2015, arXiv:1505.04597). The output has half the resolution of
    the image. The input of the first block is the standardized image and its local contrast.

    Attributes:
        width: number of channels at the highest resolution.
    """

    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits [batch, height / 2, width / 2] of images [batch, height, width, 1].

        Height and width must be multiples of 16.
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
    """Doubles height and width of [batch, height, width, channels] by repeating each pixel."""
    batch, height, width, channels = x.shape
    shape = (batch, height, 2, width, 2, channels)
    return jnp.broadcast_to(x[:, :, None, :, None], shape).reshape(
        batch, 2 * height, 2 * width, channels
    )
