"""The pure functions of training and evaluation, like `cnnjax.steps` but not compiled.

A step has no randomness: it is a function of (state, batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from cnnjax.scratch.losses import cross_entropy_backward, cross_entropy_forward
from cnnjax.scratch.models import Network
from cnnjax.scratch.optimizers import Optimizer
from cnnjax.scratch.shapes import expect
from cnnjax.scratch.trees import Tree


class Batch(NamedTuple):
    """The images of one step."""

    images: np.ndarray
    """uint8 [batch, height, width]."""
    labels: np.ndarray
    """int [batch], 1 for the positive class."""


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: int
    """The number of steps taken."""
    params: Tree
    batch_stats: Tree
    opt_state: Any


class Metrics(NamedTuple):
    """Sums over a batch; the sums of several batches can be added."""

    loss: float
    """Sum of the loss, including class weights."""
    correct: int
    """Number of images whose logit is on the label's side of probability 0.5."""
    images: int
    """Number of images."""


class Gradients(NamedTuple):
    """Result of `loss_and_gradients`."""

    loss: float
    """Mean loss over the batch."""
    logits: np.ndarray
    """float [batch]."""
    batch_stats: Tree
    """Running statistics after this batch."""
    params: Tree
    """Gradient of the loss with respect to each parameter."""


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], np.ndarray]


def init_state(
    model: Network,
    optimizer: Optimizer,
    rng: np.random.Generator,
    size: int,
    dtype: DTypeLike = np.float32,
) -> TrainState:
    """Returns the state before the first step, for images of size x size pixels."""
    params, batch_stats = model.init(rng, size, dtype)
    return TrainState(0, params, batch_stats, optimizer.init(params))


def loss_and_gradients(
    model: Network,
    params: Tree,
    batch_stats: Tree,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    class_weights: tuple[float, float] = (1.0, 1.0),
    label_smoothing: float = 0.0,
) -> Gradients:
    """Computes the loss and its gradient with respect to every parameter.

    The loss is the mean over the n images of the batch, L = sum_i l_i / n. The backward pass
    therefore starts with dL/dl_i = 1 / n.

    Args:
        model: the network.
        params: its parameters.
        batch_stats: its running statistics; empty if it has no batch norm.
        images: float [batch, height, width, 1] in [0, 1].
        labels: int [batch], 0 or 1.
        class_weights: weights of labels 0 and 1.
        label_smoothing: s; the labels become s / 2 and 1 - s / 2.

    Raises:
        ValueError: shapes do not fit.
    """
    expect("labels", labels.shape, images.shape[:1], f"for images {list(images.shape)}")
    logits, cache, batch_stats = model.forward(params, batch_stats, images, train=True)
    losses, loss_cache = cross_entropy_forward(logits, labels, class_weights, label_smoothing)
    dlosses = np.full_like(losses, 1 / len(losses))
    gradients = model.backward(cross_entropy_backward(dlosses, loss_cache), cache)
    return Gradients(float(losses.mean()), logits, batch_stats, gradients)


def make_train_step(
    model: Network,
    optimizer: Optimizer,
    *,
    class_weights: tuple[float, float] = (1.0, 1.0),
    label_smoothing: float = 0.0,
) -> TrainStep:
    """Returns the pure step (state, batch) -> (state, metrics).

    It is equivalent to the step of `cnnjax.steps.make_train_step` without augmentation, mixup,
    moving average and auxiliary head. It computes in the dtype of the parameters.

    Args:
        model: a network of `cnnjax.scratch.models`.
        optimizer: an optimizer of `cnnjax.scratch.optimizers`.
        class_weights: weights of labels 0 and 1.
        label_smoothing: s; the labels become s / 2 and 1 - s / 2.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        found = loss_and_gradients(
            model,
            state.params,
            state.batch_stats,
            to_float(batch.images, _dtype(state.params)),
            batch.labels,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
        )
        params, opt_state = optimizer.update(found.params, state.opt_state, state.params)
        images = len(batch.labels)
        correct = (found.logits >= 0) == (batch.labels == 1)
        metrics = Metrics(found.loss * images, int(correct.sum()), images)
        return TrainState(state.step + 1, params, found.batch_stats, opt_state), metrics

    return train_step


def make_eval_step(model: Network) -> EvalStep:
    """Returns the pure step (state, batch) -> logits float [batch]."""

    def eval_step(state: TrainState, batch: Batch) -> np.ndarray:
        images = to_float(batch.images, _dtype(state.params))
        logits, _, _ = model.forward(state.params, state.batch_stats, images, train=False)
        return logits

    return eval_step


def to_float(images: np.ndarray, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Converts uint8 [batch, height, width] to float [batch, height, width, 1] in [0, 1]."""
    expect("images", images.shape, ("batch", "height", "width"))
    return images[..., None].astype(dtype) / 255


def _dtype(params: Tree) -> np.dtype:
    leaf: Any = params
    while isinstance(leaf, dict):
        leaf = next(iter(leaf.values()))
    return leaf.dtype
