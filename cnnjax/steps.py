"""The jitted pure functions of training and evaluation: train_step and eval_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cnnjax.augment import Augment, Views, unchanged
from cnnjax.networks import AUXILIARY
from cnnjax.objectives import Batch, Binary, Losses, Objective, to_float
from cnnjax.optimizers import held

PyTree = Any

_BINARY = Binary()
_RNGS = 2**31 + 1  # folded into a step's key, as in `cnnjax.objectives`


class TrainState(struct.PyTreeNode):
    """Everything that a step changes, as a pytree of arrays."""

    step: jax.Array
    """int32, the number of steps taken."""
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree
    """Moving average of `params`; None if it is disabled."""


class Metrics(NamedTuple):
    """Sums over a batch; the sums of several batches can be added."""

    loss: jax.Array
    """float32, sum of the loss that the objective reports."""
    correct: jax.Array
    """int32, number of images with a correct output."""
    images: jax.Array
    """int32, number of images."""
    rejected: jax.Array
    """bool, whether the step was not applied because a value in it is not finite."""


TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


class EvalStep(Protocol):
    """The function that `make_eval_step` returns."""

    def __call__(self, state: TrainState, batch: Batch, draw: jax.Array | int = 0) -> jax.Array:
        """Returns logits float32 [batch], or [batch, k] for a network with k outputs."""


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    size: int,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the state before the first step, with random initial variables.

    Args:
        model: see `make_train_step`.
        optimizer: any optax transformation.
        key: random key of the variables.
        size: side length of the images, in pixels.
        ema: whether the state has a moving average of the weights.
    """
    return state_of(model.init(key, jnp.zeros((1, size, size, 1), jnp.float32)), optimizer, ema=ema)


def state_of(
    variables: PyTree, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Returns the state before the first step, with the given initial variables."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        # A copy, because the step donates its state and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    augment: Augment,
    objective: Objective = _BINARY,
    *,
    ema_decay: float = 0.0,
    freeze: str = "",
    accumulate: int = 1,
) -> TrainStep:
    """Returns the jitted pure step (state, batch, key) -> (state, metrics); `state` is donated.

    One step augments the batch, computes the gradient of the objective's mean loss, and updates the
    parameters, the batch statistics and the moving average. If the batch has weights, each image's
    loss is multiplied by its weight. If the loss, a gradient or a batch statistic is not finite,
    the state is returned unchanged and `Metrics.rejected` is true. `key` is the same for all steps;
    each step folds `state.step` into it.

    Args:
        model: any Linen module that is called as `apply(variables, images, train=..., rngs=...)`
            and returns the outputs that the objective expects.
        optimizer: any optax transformation.
        augment: a function as returned by `cnnjax.augment.make_augment`.
        objective: the task; see `cnnjax.objectives`.
        ema_decay: decay of the moving average of the weights; not used if `state.ema` is None. The
            decay warms up as min(decay, (1 + step) / (10 + step)), which reduces the bias towards
            the initial weights.
        freeze: regular expression for the parameters that get no gradient; see
            `cnnjax.optimizers.held`. The optimizer must not change them either, for example by
            weight decay; `cnnjax.optimizers.make_optimizer` ensures this.
        accumulate: number of equal parts that the batch is split into. The parts are computed one
            after the other; their mean gradient makes one update. Batch norm uses the statistics of
            each part, and its running statistics are updated once per part. If above 1, the
            objective's targets must be arrays [batch, ...].
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        images, targets = objective.prepare(key, augment, batch)
        drawn = jax.random.split(jax.random.fold_in(key, _RNGS))
        rngs = {"params": drawn[0], "dropout": drawn[1]}

        def loss_of(
            params: PyTree, batch_stats: PyTree, rngs: dict[str, jax.Array], part: PyTree
        ) -> tuple[jax.Array, tuple[Losses, PyTree]]:
            images, targets, weights = part
            outputs, changed = model.apply(
                {"params": held(params, freeze), "batch_stats": batch_stats},
                images,
                train=True,
                rngs=rngs,
                mutable=["batch_stats", *objective.collections],
            )
            losses = objective.losses(outputs, changed, targets)
            if weights is not None:
                minimized, reported = (weights * x for x in losses[:2])
                losses = losses._replace(minimized=minimized, reported=reported)
            return losses.minimized.mean(), (losses, changed.get("batch_stats", {}))

        gradient_of, whole = jax.grad(loss_of, has_aux=True), (images, targets, batch.weights)

        def add(carry: PyTree, numbered: PyTree) -> tuple[PyTree, Losses]:
            total, batch_stats = carry
            number, part = numbered
            own = {name: jax.random.fold_in(rng, number) for name, rng in rngs.items()}
            gradient, (losses, batch_stats) = gradient_of(state.params, batch_stats, own, part)
            return (jax.tree.map(jnp.add, total, gradient), batch_stats), losses

        if accumulate == 1:
            gradient, (losses, batch_stats) = gradient_of(
                state.params, state.batch_stats, rngs, whole
            )
        else:
            nothing = jax.tree.map(jnp.zeros_like, state.params)
            parts = jnp.arange(accumulate), _cut(whole, accumulate)
            (total, batch_stats), losses = jax.lax.scan(add, (nothing, state.batch_stats), parts)
            gradient = jax.tree.map(lambda x: x / accumulate, total)
        # Optax mixes its integer counts with floats, which strict promotion does not allow.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            step = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
            ema = jax.tree.map(lambda mean, new: mean + (new - mean) * (1 - decay), ema, params)
        after = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        # A value that is not finite would spread to all later states.
        leaves = jax.tree.leaves((losses.minimized, gradient, batch_stats))
        finite = jnp.isfinite(
            jnp.stack([jnp.abs(x).max().astype(jnp.float32) for x in leaves])
        ).all()
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        correct = losses.correct.sum(dtype=jnp.int32)
        images_seen = jnp.asarray(losses.correct.size, jnp.int32)
        return state, Metrics(losses.reported.sum(), correct, images_seen, ~finite)

    return jax.jit(train_step, donate_argnames="state")


def _cut(batch: PyTree, parts: int) -> PyTree:
    """Reshapes arrays [batch, ...] to [parts, batch / parts, ...].

    Part k has the images k, k + parts, and so on. If the batch is sharded over devices, each device
    holds equally many images of every part, and no image moves between devices.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def make_eval_step(model: Any, views: Views = unchanged) -> EvalStep:
    """Returns the jitted pure step (state, batch, draw) -> logits float32 [batch].

    It uses the moving average of the weights if the state has one.

    Args:
        model: see `make_train_step`.
        views: the function that makes the views of each image; the logits are averaged over them.
            The step's argument `draw` is the random seed of the views, an integer.
    """

    def eval_step(state: TrainState, batch: Batch, draw: jax.Array | int = 0) -> jax.Array:
        seen = views(jax.random.key(draw), to_float(batch.images))
        flat = seen.reshape(-1, *seen.shape[2:])
        logits: jax.Array = model.apply(variables_of(state), flat, train=False)
        return logits.reshape(*seen.shape[:2], *logits.shape[1:]).mean(1)

    return jax.jit(eval_step)


def variables_of(state: TrainState) -> PyTree:
    """Returns the Flax variables for evaluation: averaged weights if any, no auxiliary head."""
    params = state.params if state.ema is None else state.ema
    needed = {name: value for name, value in params.items() if name != AUXILIARY}
    return {"params": needed, "batch_stats": state.batch_stats}
