"""The network that finds the lungs."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.networks.modules import BatchNorm, Conv, local_contrast, standardized


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
