"""The pure functions that training is made of, jitted: train_step and eval_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cnnjax.augment import Augment, Views, unchanged
from cnnjax.config import TrainConfig
from cnnjax.models import AUXILIARY

PyTree = Any


class Batch(NamedTuple):
    """The images of one step, filled up to a fixed size."""

    images: jax.Array
    """uint8 [batch, height, width]."""
    labels: jax.Array
    """int32 [batch], 1 for the positive class."""
    mask: jax.Array
    """bool [batch], false on rows that only fill up the batch."""
    viral: jax.Array | None = None
    """int32 [batch], 1 for a viral pneumonia, 0 for a bacterial one, -1 where that is not known;
    None where nothing learns it."""


class TrainState(struct.PyTreeNode):
    """All that a step changes: a pytree of arrays, and nothing else."""

    step: jax.Array
    """int32, the number of steps taken."""
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree
    """Moving average of `params`; None where the config has none."""


class Metrics(NamedTuple):
    """Sums over the rows that count, so that batches of any size add up."""

    loss: jax.Array
    """float32, sum of the loss, class weights included; not that of a second head."""
    correct: jax.Array
    """int32, images on the right side of probability 0.5."""
    images: jax.Array
    """int32, images."""


_MIXUP = 2**31  # folded into a step's key; images fold in their rows, which are fewer

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


class EvalStep(Protocol):
    """What `make_eval_step` returns."""

    def __call__(self, state: TrainState, batch: Batch, draw: jax.Array | int = 0) -> jax.Array:
        """Returns logits float32 [batch]."""


def make_optimizer(
    config: TrainConfig, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer that the config describes, and its learning rate as of step."""
    total = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        warmup = min(int(config.warmup * steps_per_epoch), total - 1)
        rate = optax.warmup_cosine_decay_schedule(
            0.0 if warmup else config.learning_rate, config.learning_rate, warmup, total
        )
    else:
        rate = optax.constant_schedule(config.learning_rate)
    if config.optimizer == "adam":
        optimizer = optax.adam(rate, eps=1e-7)  # Keras's epsilon
    elif config.optimizer == "adamw":
        optimizer = optax.adamw(rate, weight_decay=config.weight_decay, mask=_is_kernel)
    else:
        optimizer = optax.sgd(rate, momentum=0.9, nesterov=True)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer, rate


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    size: int,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the state before the first step, for images of size x size pixels."""
    return state_of(model.init(key, jnp.zeros((1, size, size, 1), jnp.float32)), optimizer, ema=ema)


def state_of(
    variables: PyTree, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Returns the state before the first step from given initial variables of a network."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        # A copy: the step donates its state, and one buffer cannot be given away twice.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    augment: Augment,
    *,
    class_weights: tuple[float, float] = (1.0, 1.0),
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    ema_decay: float = 0.0,
    auxiliary: float = 0.0,
) -> TrainStep:
    """Returns the jitted pure step (state, batch, key) -> (state, metrics); `state` is donated.

    One step augments the batch, takes the gradient of the mean over its rows of the class-weighted
    binary cross-entropy, and updates weights, batch statistics and moving average. `key` is that of
    the run: the step folds its own number into it.

    Args:
        model: a network of `cnnjax.models`.
        optimizer: any optax transformation.
        augment: (key, images) -> images.
        class_weights: of labels 0 and 1.
        label_smoothing: s turns labels into s / 2 and 1 - s / 2.
        mixup: shares of an image and the next are drawn from Beta(mixup, mixup); 0 mixes nothing.
        ema_decay: of the moving average of the weights; 0 for none. It warms up as
            min(decay, (1 + step) / (10 + step)), so that it is unbiased from early on.
        auxiliary: weight of the same loss of the network's second head, by `Batch.viral`; 0 where
            it has none. (An image that is mixed counts as what its larger share is.)
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        images = augment(key, to_float(batch.images))
        images_seen = batch.mask.sum(dtype=jnp.int32)
        targets = batch.labels.astype(jnp.float32)
        weights = weights_of(batch.labels, class_weights)
        if mixup:
            mix_key = jax.random.fold_in(key, _MIXUP)
            partner, share = _mixing(mix_key, mixup, images_seen, len(targets))
            images = _mix(images, images[partner], share[:, None, None, None])
            targets = _mix(targets, targets[partner], share)
            weights = _mix(weights, weights[partner], share)

        def mean(losses: jax.Array) -> jax.Array:
            total = jnp.where(batch.mask, losses, 0).sum()
            return total / jnp.maximum(images_seen, 1).astype(total.dtype)

        def loss_of(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array, PyTree]]:
            logits, changed = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mask=batch.mask,
                mutable=["batch_stats", AUXILIARY],
            )
            loss = whole = mean(cross_entropy(logits, targets, weights, label_smoothing))
            if auxiliary:
                assert batch.viral is not None, "a second head needs Batch.viral"
                (second,) = changed[AUXILIARY]["logits"]
                own = weights_of(batch.labels, class_weights)
                more = cross_entropy(second, batch.viral, own, label_smoothing)
                whole = loss + auxiliary * mean(jnp.where(batch.viral >= 0, more, 0))
            return whole, (loss, logits, changed.get("batch_stats", {}))

        gradient, (loss, logits, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
        # Optax mixes its integer counts with floats, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            step = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
            ema = jax.tree.map(lambda mean, new: mean + (new - mean) * (1 - decay), ema, params)
        state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        correct = ((logits >= 0) == (batch.labels == 1)) & batch.mask
        loss = loss * images_seen.astype(loss.dtype)
        return state, Metrics(loss, correct.sum(dtype=jnp.int32), images_seen)

    return jax.jit(train_step, donate_argnames="state")


def make_eval_step(model: Any, views: Views = unchanged) -> EvalStep:
    """Returns the jitted pure step (state, batch, draw) -> logits float32 [batch].

    It uses the moving average of the weights where the state has one. Rows outside the mask get
    logits too, of no meaning.

    Args:
        model: a network of `cnnjax.models`.
        views: what the network sees of an image; of several views, the logits are averaged. `draw`
            is for them: another number gives others.
    """

    def eval_step(state: TrainState, batch: Batch, draw: jax.Array | int = 0) -> jax.Array:
        seen = views(jax.random.key(draw), to_float(batch.images))
        flat = seen.reshape(-1, *seen.shape[2:])
        logits: jax.Array = model.apply(variables_of(state), flat, train=False)
        return logits.reshape(seen.shape[:2]).mean(1)

    return jax.jit(eval_step)


def variables_of(state: TrainState) -> PyTree:
    """Returns the Flax variables that a state is evaluated with, so without the second head."""
    params = state.params if state.ema is None else state.ema
    needed = {name: value for name, value in params.items() if name != AUXILIARY}
    return {"params": needed, "batch_stats": state.batch_stats}


def to_float(images: jax.Array) -> jax.Array:
    """Maps uint8 [batch, height, width] to float32 [batch, height, width, 1] in [0, 1]."""
    return images[..., None].astype(jnp.float32) / 255


def weights_of(labels: jax.Array, class_weights: tuple[float, float]) -> jax.Array:
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


def _mixing(
    key: jax.Array, alpha: float, images: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's partner, the next that counts, and the partner's share, at most half."""
    row = jnp.arange(rows)
    partner = jnp.where(row + 1 < images, row + 1, 0)

    def draw(i: jax.Array) -> jax.Array:
        return jax.random.beta(jax.random.fold_in(key, i), alpha, alpha, dtype=jnp.float32)

    share = jax.vmap(draw)(row)
    return partner, jnp.minimum(share, 1 - share)


def _mix(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
    return a + (b - a) * share


def _is_kernel(params: PyTree) -> PyTree:
    """Marks what weight decay shrinks: kernels, not biases or batch norm's scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)
