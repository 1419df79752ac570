"""Objectives: the targets of a batch, the loss of each image and the metrics of an epoch.

An objective is the part of the train step that depends on the task. `Binary` has one logit for two
classes; `Softmax` has one logit per class, for three or more classes; `Segmentation` has a map of
logits, for the lung finder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from cnnjax import metrics
from cnnjax.augment import Augment
from cnnjax.config import TrainConfig
from cnnjax.networks import AUXILIARY, second_head

PyTree = Any

_MIXUP = 2**31  # folded into a step's key; larger than the row numbers that images fold in


class Batch(NamedTuple):
    """The images of one step."""

    images: jax.Array
    """uint8 [batch, height, width]."""
    labels: jax.Array
    """int32 [batch], labels from 0; with two classes, 1 is the positive class. For `Segmentation`
    uint8 [batch, height, width], 255 on the object and 0 elsewhere."""
    auxiliary: jax.Array | None = None
    """int32 [batch], labels 0 or 1 of the auxiliary head, -1 where unknown; None without such a
    head."""
    weights: jax.Array | None = None
    """float32 [batch], the weight of each image's loss; None for weights of 1. With mixup, a mixed
    image has the weight of the image with the larger share."""


class Losses(NamedTuple):
    """The losses of each image of a batch."""

    minimized: jax.Array
    """float [batch], in nats; the train step minimizes the mean."""
    reported: jax.Array
    """float [batch], the loss that an epoch reports."""
    correct: jax.Array
    """bool [batch], whether the output is correct."""


class Objective(Protocol):
    """The interface of an objective; `prepare` and `losses` are pure and traced inside jit.

    An objective is a pytree, such as a `flax.struct.PyTreeNode`, and an argument of the compiled
    step. Runs whose objectives differ only in their arrays share the compiled program.
    """

    @property
    def collections(self) -> Sequence[str]:
        """Names of the Flax collections that the network writes for `losses`; often none."""

    def prepare(self, key: jax.Array, augment: Augment, batch: Batch) -> tuple[jax.Array, PyTree]:
        """Returns the input of the network and the targets.

        Args:
            key: random key of the step.
            augment: (key, images) -> images, or (key, images, maps) -> (images, maps).
            batch: the images of the step.

        Returns:
            Images float32 [batch, height, width, 1] in [0, 1], and any pytree of arrays, which
            `losses` gets as `targets`.
        """

    def losses(self, outputs: jax.Array, kept: PyTree, targets: PyTree) -> Losses:
        """Returns the losses of each image.

        Args:
            outputs: outputs of the network, [batch, ...].
            kept: the Flax variables that the network wrote, by collection: those of `collections`
                and `batch_stats`.
            targets: the targets that `prepare` returned.
        """

    def figures(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns the metrics that an epoch reports for the held-out images, including `loss`.

        Args:
            outputs: outputs of the network for all held-out images, float [n, ...].
            labels: their labels, [n, ...].
        """


class Binary(struct.PyTreeNode):
    """Class-weighted binary cross-entropy of one logit, with mixup and an auxiliary head.

    The class weights are leaves of the pytree; folds and seeds therefore share one compiled step.
    The other fields are static: each value is compiled separately.
    """

    class_weights: Any = (1.0, 1.0)
    """Weights of labels 0 and 1."""
    label_smoothing: float = struct.field(pytree_node=False, default=0.0)
    """Label smoothing s: the labels become s / 2 and 1 - s / 2."""
    mixup: float = struct.field(pytree_node=False, default=0.0)
    """Mixup: each image is mixed with the next one of the batch, in proportions drawn from
    Beta(mixup, mixup). 0 disables it."""
    auxiliary: float = struct.field(pytree_node=False, default=0.0)
    """Weight of the cross-entropy of the auxiliary head against `Batch.auxiliary`; 0 if the network
    has no such head. With mixup, a mixed image has the auxiliary label of the image with the larger
    share."""

    @property
    def collections(self) -> Sequence[str]:
        """See `Objective`."""
        return (AUXILIARY,)

    def prepare(self, key: jax.Array, augment: Augment, batch: Batch) -> tuple[jax.Array, PyTree]:
        """See `Objective`."""
        images = augment(key, to_float(batch.images))
        labels = batch.labels.astype(jnp.float32)
        own = weights = weights_of(batch.labels, self.class_weights)
        if self.mixup:
            share = _shares(jax.random.fold_in(key, _MIXUP), self.mixup, len(labels))
            images = _mixed(images, share[:, None, None, None])
            labels, weights = _mixed(labels, share), _mixed(weights, share)
        return images, (labels, weights, own, batch.labels, batch.auxiliary)

    def losses(self, outputs: jax.Array, kept: PyTree, targets: PyTree) -> Losses:
        """See `Objective`; an output is correct if (probability >= 0.5) == (label is 1)."""
        labels, weights, own, truth, second = targets
        reported = whole = cross_entropy(outputs, labels, weights, self.label_smoothing)
        if self.auxiliary:
            assert second is not None, "an auxiliary head needs Batch.auxiliary"
            (logits,) = kept[AUXILIARY]["logits"]
            more = cross_entropy(logits, second, own, self.label_smoothing)
            whole = reported + self.auxiliary * jnp.where(second >= 0, more, 0)
        return Losses(whole, reported, (outputs >= 0) == (truth == 1))

    def figures(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """See `Objective`: unweighted cross-entropy and the metrics of `metrics.at_zero`."""
        wide = outputs.astype(np.float64)
        loss = np.logaddexp(0, np.where(labels == 1, -wide, wide)).mean()
        return {"loss": float(loss), **metrics.at_zero(wide, labels)}


class Softmax(struct.PyTreeNode):
    """Class-weighted softmax cross-entropy of K logits for K mutually exclusive classes."""

    class_weights: Any = 1.0
    """Weights of the labels, [K], or one weight for all."""
    label_smoothing: float = struct.field(pytree_node=False, default=0.0)
    """Label smoothing s: one-hot labels y become (1 - s) y + s / K."""
    mixup: float = struct.field(pytree_node=False, default=0.0)
    """Mixup: each image is mixed with the next one of the batch, in proportions drawn from
    Beta(mixup, mixup). 0 disables it."""

    @property
    def collections(self) -> Sequence[str]:
        """See `Objective`."""
        return ()

    def prepare(self, key: jax.Array, augment: Augment, batch: Batch) -> tuple[jax.Array, PyTree]:
        """See `Objective`."""
        images = augment(key, to_float(batch.images))
        share = jnp.zeros(len(images), jnp.float32)
        if self.mixup:
            share = _shares(jax.random.fold_in(key, _MIXUP), self.mixup, len(images))
            images = _mixed(images, share[:, None, None, None])
        return images, (batch.labels, share)

    def losses(self, outputs: jax.Array, kept: PyTree, targets: PyTree) -> Losses:
        """See `Objective`; an output is correct if the logit of the label is the largest."""
        labels, share = targets
        classes = outputs.shape[-1]
        given = jnp.broadcast_to(jnp.asarray(self.class_weights, jnp.float32), (classes,))
        wanted, weights = jax.nn.one_hot(labels, classes), given[labels]
        if self.mixup:
            wanted, weights = _mixed(wanted, share[:, None]), _mixed(weights, share)
        smooth = optax.smooth_labels(wanted, self.label_smoothing)
        losses = weights * optax.softmax_cross_entropy(outputs, smooth)
        return Losses(losses, losses, outputs.argmax(-1) == labels)

    def figures(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """See `Objective`: unweighted cross-entropy and the metrics of `metrics.at_zero`."""
        own = np.take_along_axis(metrics.log_softmax(outputs), labels[:, None], 1)
        return {"loss": float(-own.mean()), **metrics.at_zero(outputs, labels)}


class Segmentation(struct.PyTreeNode):
    """Mean cross-entropy over the pixels of the map plus the soft Dice loss, for each image.

    The Dice loss is one minus the soft Dice coefficient of Milletari et al., "V-Net", 3DV 2016
    (arXiv:1606.04797), with sums instead of sums of squares in the denominator. The network returns
    logits [batch, height / k, width / k]; the targets are averaged to that size.
    """

    smooth: float = struct.field(pytree_node=False, default=1e-3)
    """Added to the numerator and denominator of the Dice coefficient, which are means over the
    pixels. The Dice loss is then zero if target and prediction are both empty."""

    @property
    def collections(self) -> Sequence[str]:
        """See `Objective`."""
        return ()

    def prepare(self, key: jax.Array, augment: Augment, batch: Batch) -> tuple[jax.Array, PyTree]:
        """See `Objective`; the target maps are transformed together with the images."""
        images, maps = augment(key, to_float(batch.images), to_float(batch.labels))
        return images, maps[..., 0]

    def losses(self, outputs: jax.Array, kept: PyTree, targets: PyTree) -> Losses:
        """See `Objective`; an output is correct if its soft Dice coefficient is at least 0.9."""
        maps = averaged_to(targets, outputs.shape[1:])
        places = (1, 2)
        entropy = optax.sigmoid_binary_cross_entropy(outputs, maps).mean(places)
        found = jax.nn.sigmoid(outputs)
        both = (found * maps).mean(places)
        either = found.mean(places) + maps.mean(places)
        dice = (2 * both + self.smooth) / (either + self.smooth)
        loss = entropy + 1 - dice
        return Losses(loss, loss, dice >= 0.9)

    def figures(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """See `Objective`."""
        found = self.losses(jnp.asarray(outputs), {}, jnp.asarray(labels, jnp.float32) / 255)
        return {"loss": float(found.reported.mean()), "accuracy": float(found.correct.mean())}


def objective_of(config: TrainConfig, classes: Sequence[str], labels: np.ndarray) -> Objective:
    """Returns the objective of a config: `Binary` for two classes, `Softmax` for more.

    Args:
        config: class weights, label smoothing, mixup and the auxiliary head.
        classes: names of the classes.
        labels: int [n], the labels of the training images.
    """
    weights = class_weights_of(labels) if config.class_weights else (1.0,) * len(classes)
    if len(classes) == 2:
        head = second_head(config, classes)
        return Binary(weights, config.label_smoothing, config.mixup, head)
    return Softmax(np.array(weights, np.float32), config.label_smoothing, config.mixup)


def class_weights_of(labels: np.ndarray) -> tuple[float, ...]:
    """Returns n / (K n_c) for each label c of K; each class then has the same total weight.

    Args:
        labels: int [n], with n_c images of label c.
    """
    counts = np.bincount(labels).tolist()
    return tuple(len(labels) / (len(counts) * count) for count in counts)


def to_float(images: jax.Array) -> jax.Array:
    """Converts uint8 [batch, height, width] to float32 [batch, height, width, 1] in [0, 1]."""
    return images[..., None].astype(jnp.float32) / 255


def averaged_to(maps: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Downsamples maps by averaging over blocks.

    Args:
        maps: float [batch, height, width].
        shape: the new (height, width), divisors of the old ones.

    Returns:
        float [batch, *shape].
    """
    batch, height, width = maps.shape
    rows, columns = shape
    return maps.reshape(batch, rows, height // rows, columns, width // columns).mean((2, 4))


def weights_of(labels: jax.Array, class_weights: Any) -> jax.Array:
    """Returns float32 [batch], the class weight for each of the int labels [batch] in {0, 1}."""
    return jnp.where(labels == 1, class_weights[1], class_weights[0])


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Returns each image's weighted binary cross-entropy, in nats; stable for large logits.

    Args:
        logits: float [batch].
        labels: [batch], in [0, 1].
        weights: [batch], or one weight for all.
        label_smoothing: s; the labels become s / 2 and 1 - s / 2.

    Returns:
        float [batch].
    """
    target = labels.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return weights * optax.sigmoid_binary_cross_entropy(logits, target)


def _shares(key: jax.Array, alpha: float, rows: int) -> jax.Array:
    """Draws float32 [rows], the share of the other image in each mixed image, at most 1/2."""

    def draw(i: jax.Array) -> jax.Array:
        return jax.random.beta(jax.random.fold_in(key, i), alpha, alpha, dtype=jnp.float32)

    share = jax.vmap(draw)(jnp.arange(rows))
    return jnp.minimum(share, 1 - share)


def _mixed(each: jax.Array, share: jax.Array) -> jax.Array:
    """Mixes each row with the next row of the batch, and the last row with the first."""
    return each + (jnp.roll(each, -1, axis=0) - each) * share
