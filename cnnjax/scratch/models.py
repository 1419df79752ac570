"""The networks of `cnnjax.networks` as chains of layers, with forward and backward passes.

Parameters and running statistics are nested dicts with the names and shapes of Flax and can be
exchanged with Flax (see `convert`). A network has no state: `forward` returns a cache with the
values that `backward` needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from cnnjax.scratch import layers
from cnnjax.scratch.initializers import glorot_uniform, he_normal, lecun_normal
from cnnjax.scratch.shapes import expect
from cnnjax.scratch.trees import Tree

_STEM_SIZES = {2: (3, 3), 4: (7, 7)}  # size of the ResNet's first kernel, by its stride


class Network(Protocol):
    """The interface of a network for `cnnjax.scratch.steps`."""

    def init(
        self, rng: np.random.Generator, size: int, dtype: DTypeLike = np.float32
    ) -> tuple[Tree, Tree]:
        """Returns initial (params, batch_stats) for images of size x size pixels."""

    def forward(
        self,
        params: Tree,
        batch_stats: Tree,
        images: np.ndarray,
        *,
        train: bool = False,
    ) -> tuple[np.ndarray, Any, Tree]:
        """Returns logits [batch] of images [batch, height, width, 1], the cache and batch_stats.

        Args:
            params: parameters, as returned by `init`.
            batch_stats: running statistics, as returned by `init`.
            images: float in [0, 1].
            train: whether batch norm uses the statistics of the batch and updates the running ones.

        Raises:
            ValueError: shapes or names do not fit.
        """

    def backward(self, dlogits: np.ndarray, cache: Any) -> Tree:
        """Returns dL/dparams, a tree like params, from dL/dlogits [batch]."""


class ConvPoolCache(NamedTuple):
    """What the backward pass of convolution, pool, bias and relu needs."""

    conv: layers.ConvCache
    pool: layers.PoolCache
    relu: np.ndarray


class BaselineCache(NamedTuple):
    """What the backward pass of `BaselineCNN` needs, in the order of the forward one."""

    conv1: ConvPoolCache
    conv2: ConvPoolCache
    flatten: tuple[int, ...]
    dense1: layers.DenseCache
    relu: np.ndarray
    dense2: layers.DenseCache


@dataclass(frozen=True)
class BaselineCNN:
    """The Keras network of the blog post, like `cnnjax.networks.BaselineCNN`.

    Convolution 3x3 with 32 filters, relu, max-pool 2; the same again; dense 128, relu; dense 1.
    Pooling comes before bias and relu. Both are monotonic, so the result is the same, for a quarter
    of the work.

    Attributes:
        channels: number of input channels (the gray image is repeated), 3 in the blog post.
        standardize: whether to standardize each image first.
        local_contrast: whether to add the local contrast as another input channel.
    """

    channels: int = 1
    standardize: bool = False
    local_contrast: bool = False

    def init(
        self, rng: np.random.Generator, size: int, dtype: DTypeLike = np.float32
    ) -> tuple[Tree, Tree]:
        """Draws Glorot-uniform kernels, as Keras does; see `Network`."""
        side = ((size - 2) // 2 - 2) // 2
        if side < 1:
            raise ValueError(f"expected images of at least 10 x 10 pixels, got {size} x {size}")

        def layer(*shape: int) -> Tree:
            return {
                "kernel": glorot_uniform(rng, shape, dtype),
                "bias": np.zeros(shape[-1], dtype),
            }

        params = {
            "conv1": layer(3, 3, _input_channels(self), 32),
            "conv2": layer(3, 3, 32, 32),
            "dense1": layer(side * side * 32, 128),
            "dense2": layer(128, 1),
        }
        return params, {}

    def forward(
        self,
        params: Tree,
        batch_stats: Tree,
        images: np.ndarray,
        *,
        train: bool = False,
    ) -> tuple[np.ndarray, BaselineCache, Tree]:
        """Returns logits, cache and statistics; see `Network`."""
        _expect_names(params, {"conv1", "conv2", "dense1", "dense2"})
        x = _prepared(images, self)
        x, conv1 = _conv_pool_forward(x, **params["conv1"])
        x, conv2 = _conv_pool_forward(x, **params["conv2"])
        x, flatten = layers.flatten_forward(x)
        x, dense1 = layers.dense_forward(x, **params["dense1"])
        x, relu = layers.relu_forward(x)
        x, dense2 = layers.dense_forward(x, **params["dense2"])
        cache = BaselineCache(conv1, conv2, flatten, dense1, relu, dense2)
        return x[:, 0], cache, batch_stats

    def backward(self, dlogits: np.ndarray, cache: BaselineCache) -> Tree:
        """Returns the gradient with respect to each parameter; see `Network`."""
        gradients: Tree = {}
        dy, dkernel, dbias = layers.dense_backward(dlogits[:, None], cache.dense2)
        gradients["dense2"] = {"kernel": dkernel, "bias": dbias}
        dy = layers.relu_backward(dy, cache.relu)
        dy, dkernel, dbias = layers.dense_backward(dy, cache.dense1)
        gradients["dense1"] = {"kernel": dkernel, "bias": dbias}
        dy = layers.flatten_backward(dy, cache.flatten)
        dy, gradients["conv2"] = _conv_pool_backward(dy, cache.conv2)
        dy = layers.conv_input_gradient(dy, cache.conv2.conv)
        # The backward pass ends here: the gradient with respect to the images is not needed.
        _, gradients["conv1"] = _conv_pool_backward(dy, cache.conv1)
        return gradients


class ConvNormCache(NamedTuple):
    """What the backward pass of convolution and batch norm needs."""

    conv: layers.ConvCache
    norm: layers.BatchNormCache


class BlockCache(NamedTuple):
    """What the backward pass of a residual block needs."""

    first: ConvNormCache
    relu1: np.ndarray
    second: ConvNormCache
    shortcut: ConvNormCache | None
    relu2: np.ndarray


class ResNetCache(NamedTuple):
    """What the backward pass of `ResNet` needs, in the order of the forward one."""

    stem: ConvNormCache
    relu: np.ndarray
    blocks: dict[str, BlockCache]
    pool: tuple[int, ...]
    head: layers.DenseCache


@dataclass(frozen=True)
class ResNet:
    """A small residual network, like `cnnjax.networks.ResNet`.

    The stem is a convolution (3x3 with stride 2, or 7x7 with stride 4), batch norm and relu. Stages
    of `depth` blocks follow; each stage after the first has half the resolution and twice the
    channels. The last layers are global average pool and dense 1.

    Attributes:
        channels: number of input channels (the gray image is repeated), 1 or 3.
        width: number of channels of the first stage.
        depth: number of blocks per stage.
        stages: number of stages.
        stem: stride of the first convolution, 2 or 4.
        standardize: whether to standardize each image first.
        local_contrast: whether to add the local contrast as another input channel.
    """

    channels: int = 1
    width: int = 32
    depth: int = 1
    stages: int = 4
    stem: int = 2
    standardize: bool = False
    local_contrast: bool = False

    def init(
        self, rng: np.random.Generator, size: int, dtype: DTypeLike = np.float32
    ) -> tuple[Tree, Tree]:
        """Draws He-normal kernels, and a LeCun-normal kernel for the head; see `Network`."""

        def kernel(*shape: int) -> Tree:
            return {"kernel": he_normal(rng, shape, dtype)}

        def norm(features: int, scale: float = 1.0) -> Tree:
            return {"scale": np.full(features, scale, dtype), "bias": np.zeros(features, dtype)}

        def running(features: int) -> Tree:
            return {"mean": np.zeros(features, dtype), "var": np.ones(features, dtype)}

        params: Tree = {
            "stem": kernel(*_STEM_SIZES[self.stem], _input_channels(self), self.width),
            "stem_norm": norm(self.width),
        }
        stats: Tree = {"stem_norm": running(self.width)}
        before = self.width
        for name, features, stride in self._blocks():
            params[name] = {
                "conv1": kernel(3, 3, before, features),
                "norm1": norm(features),
                "conv2": kernel(3, 3, features, features),
                # Zero: a block starts as the identity (Goyal et al., arXiv:1706.02677).
                "norm2": norm(features, 0.0),
            }
            if stride != 1 or features != before:
                params[name] |= {"conv3": kernel(1, 1, before, features), "norm3": norm(features)}
            norms = [key for key in params[name] if key.startswith("norm")]
            stats[name] = {key: running(features) for key in norms}
            before = features
        params["head"] = {
            "kernel": lecun_normal(rng, (before, 1), dtype),
            "bias": np.zeros(1, dtype),
        }
        return params, stats

    def forward(
        self,
        params: Tree,
        batch_stats: Tree,
        images: np.ndarray,
        *,
        train: bool = False,
    ) -> tuple[np.ndarray, ResNetCache, Tree]:
        """Returns logits, cache and statistics; see `Network`."""
        names = {name for name, _, _ in self._blocks()}
        _expect_names(params, {"stem", "stem_norm", "head"} | names)
        _expect_names(batch_stats, {"stem_norm"} | names)
        x = _prepared(images, self)
        x, stem_stats, stem = _conv_norm_forward(
            x,
            params["stem"],
            params["stem_norm"],
            batch_stats["stem_norm"],
            train,
            stride=self.stem,
        )
        stats = {"stem_norm": stem_stats}
        x, relu = layers.relu_forward(x)
        blocks = {}
        for name, _, stride in self._blocks():
            x, stats[name], blocks[name] = _block_forward(
                x, params[name], batch_stats[name], train, stride=stride
            )
        x, pool = layers.global_average_pool_forward(x)
        x, head = layers.dense_forward(x, **params["head"])
        return x[:, 0], ResNetCache(stem, relu, blocks, pool, head), stats

    def backward(self, dlogits: np.ndarray, cache: ResNetCache) -> Tree:
        """Returns the gradient with respect to each parameter; see `Network`."""
        gradients: Tree = {}
        dy, dkernel, dbias = layers.dense_backward(dlogits[:, None], cache.head)
        gradients["head"] = {"kernel": dkernel, "bias": dbias}
        dy = layers.global_average_pool_backward(dy, cache.pool)
        for name, block in reversed(cache.blocks.items()):
            dy, gradients[name] = _block_backward(dy, block)
        dy = layers.relu_backward(dy, cache.relu)
        _, gradients["stem"], gradients["stem_norm"] = _conv_norm_backward(dy, cache.stem)
        return gradients

    def _blocks(self) -> Iterator[tuple[str, int, int]]:
        """Yields each block's name, channels and stride."""
        for stage in range(self.stages):
            for block in range(self.depth):
                stride = 2 if stage > 0 and block == 0 else 1
                yield f"stage{stage + 1}_block{block + 1}", self.width * 2**stage, stride


def _conv_pool_forward(
    x: np.ndarray, kernel: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, ConvPoolCache]:
    x, conv = layers.conv_forward(x, kernel, padding="VALID")
    x, pool = layers.max_pool_forward(x)
    x, relu = layers.relu_forward(layers.bias_forward(x, bias))
    return x, ConvPoolCache(conv, pool, relu)


def _conv_pool_backward(dy: np.ndarray, cache: ConvPoolCache) -> tuple[np.ndarray, Tree]:
    """Returns the gradients with respect to the convolution's output, and to kernel and bias.

    It leaves out the gradient with respect to the convolution's input, which the first convolution
    does not need.
    """
    dy = layers.relu_backward(dy, cache.relu)
    dy, dbias = layers.bias_backward(dy)
    dy = layers.max_pool_backward(dy, cache.pool)
    return dy, {"kernel": layers.conv_kernel_gradient(dy, cache.conv), "bias": dbias}


def _conv_norm_forward(
    x: np.ndarray, conv: Tree, norm: Tree, stats: Tree, train: bool, *, stride: int = 1
) -> tuple[np.ndarray, Tree, ConvNormCache]:
    x, conv_cache = layers.conv_forward(x, **conv, stride=stride)
    x, (mean, var), norm_cache = layers.batch_norm_forward(x, **norm, **stats, train=train)
    return x, {"mean": mean, "var": var}, ConvNormCache(conv_cache, norm_cache)


def _conv_norm_backward(dy: np.ndarray, cache: ConvNormCache) -> tuple[np.ndarray, Tree, Tree]:
    dy, dscale, dbias = layers.batch_norm_backward(dy, cache.norm)
    dx, dkernel = layers.conv_backward(dy, cache.conv)
    return dx, {"kernel": dkernel}, {"scale": dscale, "bias": dbias}


def _block_forward(
    x: np.ndarray, params: Tree, stats: Tree, train: bool, *, stride: int
) -> tuple[np.ndarray, Tree, BlockCache]:
    """Returns relu(x + BN(conv(relu(BN(conv(x))))) of He et al., arXiv:1512.03385, figure 2.

    If the shape changes, the shortcut applies a 1x1 convolution with the same stride and batch norm
    to x.
    """
    after: Tree = {}

    def conv_norm(x: np.ndarray, k: int, stride: int) -> tuple[np.ndarray, ConvNormCache]:
        conv, norm = params[f"conv{k}"], params[f"norm{k}"]
        x, after[f"norm{k}"], cache = _conv_norm_forward(
            x, conv, norm, stats[f"norm{k}"], train, stride=stride
        )
        return x, cache

    y, first = conv_norm(x, 1, stride)
    y, relu1 = layers.relu_forward(y)
    y, second = conv_norm(y, 2, 1)
    shortcut = None
    if "conv3" in params:
        x, shortcut = conv_norm(x, 3, stride)
    y, relu2 = layers.relu_forward(layers.residual_forward(x, y))
    return y, after, BlockCache(first, relu1, second, shortcut, relu2)


def _block_backward(dy: np.ndarray, cache: BlockCache) -> tuple[np.ndarray, Tree]:
    """Returns dL/dx and the gradient with respect to each parameter.

    x is used by the branch and by the shortcut; the chain rule sums over both paths.
    """
    gradients: Tree = {}
    dy = layers.relu_backward(dy, cache.relu2)
    dx, dy = layers.residual_backward(dy)
    if cache.shortcut is not None:
        dx, gradients["conv3"], gradients["norm3"] = _conv_norm_backward(dx, cache.shortcut)
    dy, gradients["conv2"], gradients["norm2"] = _conv_norm_backward(dy, cache.second)
    dy = layers.relu_backward(dy, cache.relu1)
    dy, gradients["conv1"], gradients["norm1"] = _conv_norm_backward(dy, cache.first)
    return dx + dy, gradients


def _input_channels(network: BaselineCNN | ResNet) -> int:
    return network.channels * (2 if network.local_contrast else 1)


def _prepared(images: np.ndarray, network: BaselineCNN | ResNet) -> np.ndarray:
    """Returns the input of the first convolution; it has no parameters and no backward pass."""
    expect("images", images.shape, ("batch", "height", "width", 1))
    if network.standardize:
        images = images - images.mean((1, 2, 3), keepdims=True)
        images = images / np.sqrt((images**2).mean((1, 2, 3), keepdims=True) + 1e-6)
    if network.local_contrast:
        images = np.concatenate([images, _local_contrast(images)], -1)
    return np.tile(images, network.channels)


def _local_contrast(images: np.ndarray) -> np.ndarray:
    """Returns each pixel minus the local mean, divided by the local standard deviation.

    This is local contrast normalization (Jarrett et al., ICCV 2009). The window is a Gaussian whose
    standard deviation is 1/12 of the side.
    """
    rows, columns = (_gaussian(side).astype(images.dtype) for side in images.shape[1:3])

    def around(x: np.ndarray) -> np.ndarray:
        return rows @ x @ columns.T

    centred = images[..., 0] - around(images[..., 0])
    return (centred / np.sqrt(around(centred**2) + 0.01))[..., None]


def _gaussian(side: int) -> np.ndarray:
    """Returns [side, side]; row i has the weights of the pixels around pixel i, with sum 1."""
    at = np.arange(side)
    weights = np.exp(-0.5 * ((at[:, None] - at) / (side / 12)) ** 2)
    return weights / weights.sum(1, keepdims=True)


def _expect_names(tree: Tree, names: set[str]) -> None:
    if tree.keys() != names:
        raise ValueError(f"expected the layers {sorted(names)}, got {sorted(tree)}")
