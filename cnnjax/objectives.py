"""Objectives: what a network's outputs are compared with, and the loss of each image.

An objective is the part of the train step that knows the task. `Binary` is the project's own task,
one logit for two classes; `Softmax` has a logit for each of three and more; `Segmentation` is that
of the lung finder, a map of logits.
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
from cnnjax.networks import AUXILIARY

PyTree = Any

_MIXUP = 2**31  # folded into a step's key; images fold in their rows, which are fewer


class Batch(NamedTuple):
    """The images of one step."""

    images: jax.Array
    """uint8 [batch, height, width]."""
    labels: jax.Array
    """int32 [batch], 0 and up, of two classes 1 for the positive; for `Segmentation` uint8
    [batch, height, width], 255 on the object."""
    auxiliary: jax.Array | None = None
    """int32 [batch], 0 or 1, what the auxiliary head learns; -1 where that is not known; None where
    there is no such head."""
    weights: jax.Array | None = None
    """float32 [batch], by which the train step multiplies each image's losses; None for 1. (A mixed
    image has the weight of its larger share.)"""


class Losses(NamedTuple):
    """What an objective says of each image of a batch."""

    minimized: jax.Array
    """float [batch], whose mean the step minimizes, in nats."""
    reported: jax.Array
    """float [batch], the loss that an epoch reports."""
    correct: jax.Array
    """bool [batch], whether the output is right."""


class Objective(Protocol):
    """What training asks of a task; `prepare` and `losses` are pure and traced inside jit.

    An objective is a pytree, such as a `flax.struct.PyTreeNode`: it is an argument of the compiled
    step, so runs whose objectives differ in their arrays alone share the program.
    """

    @property
    def collections(self) -> Sequence[str]:
        """Names of the variable collections, beside batch statistics, that `losses` reads."""

    def prepare(self, key: jax.Array, augment: Augment, batch: Batch) -> tuple[jax.Array, PyTree]:
        """Returns what the network sees of a batch, and the targets.

        Args:
            key: of the step.
            augment: (key, images) -> images, or (key, images, maps) -> (images, maps).
            batch: the images of the step.

        Returns:
            float32 [batch, height, width, 1] in [0, 1], and any pytree of arrays for `losses`.
        """

    def losses(self, outputs: jax.Array, kept: PyTree, targets: PyTree) -> Losses:
        """Returns the losses of each image.

        Args:
            outputs: of the network, [batch, ...].
            kept: the `collections` that the network wrote.
            targets: of `prepare`.
        """

    def figures(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns what an epoch reports of held-out images, `loss` among it.

        Args:
            outputs: of the network, float [n, ...].
            labels: [n, ...].
        """


class Binary(struct.PyTreeNode):
    """Class-weighted binary cross-entropy of one logit, with mixup and an auxiliary head.

    The class weights are arrays, so that folds and seeds share one compiled step; the other fields
    are part of the program.
    """

    class_weights: Any = (1.0, 1.0)
    """Weights of labels 0 and 1."""
    label_smoothing: float = struct.field(pytree_node=False, default=0.0)
    """s turns labels into s / 2 and 1 - s / 2."""
    mixup: float = struct.field(pytree_node=False, default=0.0)
    """Each image is mixed with the next, in shares from Beta(mixup, mixup); 0 mixes nothing."""
    auxiliary: float = struct.field(pytree_node=False, default=0.0)
    """Weight of the same loss of the auxiliary head, by `Batch.auxiliary`; 0 where the network has
    none. (A mixed image counts as what its larger share is.)"""

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
        """See `Objective`; correct is an image on the right side of probability 0.5."""
        labels, weights, own, truth, second = targets
        reported = whole = cross_entropy(outputs, labels, weights, self.label_smoothing)
        if self.auxiliary:
            assert second is not None, "an auxiliary head needs Batch.auxiliary"
            (logits,) = kept[AUXILIARY]["logits"]
            more = cross_entropy(logits, second, own, self.label_smoothing)
            whole = reported + self.auxiliary * jnp.where(second >= 0, more, 0)
        return Losses(whole, reported, (outputs >= 0) == (truth == 1))

    def figures(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """See `Objective`: unweighted cross-entropy, AUC, and shares at probability 0.5."""
        wide = outputs.astype(np.float64)
        loss = np.logaddexp(0, np.where(labels == 1, -wide, wide)).mean()
        return {"loss": float(loss), **metrics.at_zero(wide, labels)}


class Softmax(struct.PyTreeNode):
    """Class-weighted cross-entropy of K logits for K classes, each image of one class."""

    class_weights: Any = 1.0
    """Weights of the labels, [K], or one for all."""
    label_smoothing: float = struct.field(pytree_node=False, default=0.0)
    """s moves a share s of each label evenly to all classes."""
    mixup: float = struct.field(pytree_node=False, default=0.0)
    """Each image is mixed with the next, in shares from Beta(mixup, mixup); 0 mixes nothing."""

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
        """See `Objective`; correct is an image whose own logit is the largest."""
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
        """See `Objective`: unweighted cross-entropy, and what `metrics.at_zero` tells."""
        own = np.take_along_axis(metrics.log_softmax(outputs), labels[:, None], 1)
        return {"loss": float(-own.mean()), **metrics.at_zero(outputs, labels)}


class Segmentation(struct.PyTreeNode):
    """Cross-entropy of every place plus one minus the soft Dice coefficient of every image.

    The Dice loss is that of Milletari et al., "V-Net", 3DV 2016 (arXiv:1606.04797), with sums in
    place of sums of squares. The network returns logits [batch, height / k, width / k]; targets are
    averaged to that size.
    """

    smooth: float = struct.field(pytree_node=False, default=1e-3)
    """Added to numerator and denominator of Dice, as a fraction of the places: an empty map that is
    found empty has no loss."""

    @property
    def collections(self) -> Sequence[str]:
        """See `Objective`."""
        return ()

    def prepare(self, key: jax.Array, augment: Augment, batch: Batch) -> tuple[jax.Array, PyTree]:
        """See `Objective`; the maps are moved with the images."""
        images, maps = augment(key, to_float(batch.images), to_float(batch.labels))
        return images, maps[..., 0]

    def losses(self, outputs: jax.Array, kept: PyTree, targets: PyTree) -> Losses:
        """See `Objective`; correct is a soft Dice coefficient of at least 0.9."""
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


def to_float(images: jax.Array) -> jax.Array:
    """Maps uint8 [batch, height, width] to float32 [batch, height, width, 1] in [0, 1]."""
    return images[..., None].astype(jnp.float32) / 255


def averaged_to(maps: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Averages float [batch, height, width] over blocks, to the smaller height and width given."""
    batch, height, width = maps.shape
    rows, columns = shape
    return maps.reshape(batch, rows, height // rows, columns, width // columns).mean((2, 4))


def weights_of(labels: jax.Array, class_weights: Any) -> jax.Array:
    """Returns float32 [batch], the weight of the class of each of int labels [batch]."""
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
        weights: [batch], or one for all.
        label_smoothing: s turns labels into s / 2 and 1 - s / 2.

    Returns:
        float [batch].
    """
    target = labels.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return weights * optax.sigmoid_binary_cross_entropy(logits, target)


def _shares(key: jax.Array, alpha: float, rows: int) -> jax.Array:
    """Draws float32 [rows], each image's share that is another's: at most half."""

    def draw(i: jax.Array) -> jax.Array:
        return jax.random.beta(jax.random.fold_in(key, i), alpha, alpha, dtype=jnp.float32)

    share = jax.vmap(draw)(jnp.arange(rows))
    return jnp.minimum(share, 1 - share)


def _mixed(each: jax.Array, share: jax.Array) -> jax.Array:
    """Mixes each row with the next one of the batch, the last with the first."""
    return each + (jnp.roll(each, -1, axis=0) - each) * share
