"""The pure functions that training is made of, jitted: train_step and eval_step."""

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
    """All that a step changes: a pytree of arrays, and nothing else."""

    step: jax.Array
    """int32, the number of steps taken."""
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree
    """Moving average of `params`; None where the config has none."""


class Metrics(NamedTuple):
    """Sums over a batch, so that batches of any size add up."""

    loss: jax.Array
    """float32, sum of the loss that the objective reports."""
    correct: jax.Array
    """int32, images whose output is right."""
    images: jax.Array
    """int32, images."""
    rejected: jax.Array
    """bool, whether the step was not applied, because something in it is not finite."""


TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


class EvalStep(Protocol):
    """What `make_eval_step` returns."""

    def __call__(self, state: TrainState, batch: Batch, draw: jax.Array | int = 0) -> jax.Array:
        """Returns logits float32 [batch], or [batch, k] of a network with k outputs."""


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
    objective: Objective = _BINARY,
    *,
    ema_decay: float = 0.0,
    freeze: str = "",
) -> TrainStep:
    """Returns the jitted pure step (state, batch, key) -> (state, metrics); `state` is donated.

    One step augments the batch, takes the gradient of the objective's mean loss over it, each
    image's multiplied by its weight if the batch has weights, and updates parameters, batch
    statistics and moving average. Where the loss, a gradient or a batch statistic is not finite,
    the state stays as it was, and the metrics say so. `key` is that of the
    run: the step folds its own number into it.

    Args:
        model: any Linen module that is called as `apply(variables, images, train=..., rngs=...)`
            and returns what the objective takes.
        optimizer: any optax transformation.
        augment: as `cnnjax.augment.make_augment` returns it.
        objective: the task; see `cnnjax.objectives`.
        ema_decay: of the moving average of the weights; 0 for none. It warms up as
            min(decay, (1 + step) / (10 + step)), so that it is unbiased from early on.
        freeze: pattern of the parameters that the optimizer leaves as they are, which then need no
            gradient; see `cnnjax.optimizers.held`.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        images, targets = objective.prepare(key, augment, batch)
        drawn = jax.random.split(jax.random.fold_in(key, _RNGS))
        rngs = {"params": drawn[0], "dropout": drawn[1]}

        def loss_of(params: PyTree) -> tuple[jax.Array, tuple[Losses, PyTree]]:
            outputs, changed = model.apply(
                {"params": held(params, freeze), "batch_stats": state.batch_stats},
                images,
                train=True,
                rngs=rngs,
                mutable=["batch_stats", *objective.collections],
            )
            losses = objective.losses(outputs, changed, targets)
            if batch.weights is not None:
                minimized, reported = (batch.weights * x for x in losses[:2])
                losses = losses._replace(minimized=minimized, reported=reported)
            return losses.minimized.mean(), (losses, changed.get("batch_stats", {}))

        gradient, (losses, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
        # Optax mixes its integer counts with floats, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            step = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
            ema = jax.tree.map(lambda mean, new: mean + (new - mean) * (1 - decay), ema, params)
        after = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        # A gradient or statistic that is not finite would be in every later state.
        leaves = jax.tree.leaves((losses.minimized, gradient, batch_stats))
        finite = jnp.isfinite(
            jnp.stack([jnp.abs(x).max().astype(jnp.float32) for x in leaves])
        ).all()
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        correct = losses.correct.sum(dtype=jnp.int32)
        images_seen = jnp.asarray(len(losses.correct), jnp.int32)
        return state, Metrics(losses.reported.sum(), correct, images_seen, ~finite)

    return jax.jit(train_step, donate_argnames="state")


def make_eval_step(model: Any, views: Views = unchanged) -> EvalStep:
    """Returns the jitted pure step (state, batch, draw) -> logits float32 [batch].

    It uses the moving average of the weights where the state has one.

    Args:
        model: as for `make_train_step`.
        views: what the network sees of an image; of several views, the logits are averaged. `draw`
            is for them: another number gives others.
    """

    def eval_step(state: TrainState, batch: Batch, draw: jax.Array | int = 0) -> jax.Array:
        seen = views(jax.random.key(draw), to_float(batch.images))
        flat = seen.reshape(-1, *seen.shape[2:])
        logits: jax.Array = model.apply(variables_of(state), flat, train=False)
        return logits.reshape(*seen.shape[:2], *logits.shape[1:]).mean(1)

    return jax.jit(eval_step)


def variables_of(state: TrainState) -> PyTree:
    """Returns the Flax variables that a state is evaluated with, so without the second head."""
    params = state.params if state.ema is None else state.ema
    needed = {name: value for name, value in params.items() if name != AUXILIARY}
    return {"params": needed, "batch_stats": state.batch_stats}
