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
    accumulate: int = 1,
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
        accumulate: into so many parts of equal size the batch is cut, which are computed one after
            the other; their mean gradient makes one update. Batch norm normalizes each part by its
            own statistics, and its running statistics see the parts in turn. The objective's
            targets must then be arrays [batch, ...].
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
        images_seen = jnp.asarray(losses.correct.size, jnp.int32)
        return state, Metrics(losses.reported.sum(), correct, images_seen, ~finite)

    return jax.jit(train_step, donate_argnames="state")


def _cut(batch: PyTree, parts: int) -> PyTree:
    """Cuts arrays [batch, ...] into [parts, batch / parts, ...].

    Part k has the images k, k + parts, and so on: of a batch that is divided among devices, each
    device has equally many of every part, and none moves.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


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
