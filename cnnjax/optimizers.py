"""How parameters are updated: learning rates, optimizers, and what is left as it is.

All of it is optax: a schedule, an optimizer that takes it, and transformations around that.
Parameters are named by their path, `stem/kernel`, and a layer is an entry at the top of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cnnjax.config import TrainConfig
from cnnjax.errors import InputError

PyTree = Any

Factory = Callable[[optax.Schedule], optax.GradientTransformation]
"""From a learning rate to an optimizer, as `optax.lion` or `functools.partial(optax.sgd,
momentum=0.9)`."""


def make_optimizer(
    config: TrainConfig,
    steps_per_epoch: int,
    factory: Factory | None = None,
    layers: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer that the config describes, and its learning rate as of step.

    Args:
        config: how the weights are fitted.
        steps_per_epoch: how many steps an epoch has.
        factory: makes the optimizer in place of the one that `config.optimizer` names; schedule,
            clipping, frozen parameters and layer-wise learning rates are the config's still.
        layers: of the network, from the input on, see `layers_of`; for `config.layer_decay`.
    """
    rate = schedule_of(config, steps_per_epoch)
    return optimizer_at(rate, config, factory, layers), rate


def optimizer_at(
    rate: optax.Schedule,
    config: TrainConfig,
    factory: Factory | None = None,
    layers: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Returns the optimizer that the config describes, at a learning rate; see `make_optimizer`."""
    optimizer = (factory or _factory(config))(rate)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.layer_decay < 1:
        optimizer = optax.chain(optimizer, scale_layers(layers, config.layer_decay))
    if config.freeze:
        # Outermost, so that the norm of a clipped gradient is that of what is trained.
        kinds = {"trained": optimizer, "frozen": optax.set_to_zero()}
        optimizer = optax.partition(kinds, lambda params: _kinds(params, config.freeze))
    return optimizer


def schedule_of(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps taken."""
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)

    def cosine(epochs: int) -> optax.Schedule:
        total = epochs * steps_per_epoch
        warmup = min(int(config.warmup * steps_per_epoch), total - 1)
        start = 0.0 if warmup else config.learning_rate
        return optax.warmup_cosine_decay_schedule(start, config.learning_rate, warmup, total)

    if not config.extend:
        return cosine(config.epochs)
    parts = [cosine(config.epochs), cosine(config.extend)]
    return optax.join_schedules(parts, [config.epochs * steps_per_epoch])


def scale_layers(layers: Sequence[str], decay: float) -> optax.GradientTransformation:
    """Returns a transformation that multiplies updates by decay ** (layers above).

    Discriminative fine-tuning of Howard and Ruder, "ULMFiT", ACL 2018 (arXiv:1801.06146), with the
    layers' rates in a geometric series.

    Args:
        layers: from the input on; the parameters of the last one are updated in full.
        decay: in (0, 1].
    """
    factors = {name: decay**above for above, name in enumerate(reversed(layers))}

    def scaled(updates: PyTree, params: PyTree = None) -> PyTree:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * factors[path_of(path).partition("/")[0]], updates
        )

    return optax.stateless(scaled)


def layers_of(network: Any, size: int) -> tuple[str, ...]:
    """Returns the entries at the top of a network's parameters, in the order of their creation.

    Args:
        network: a Linen module.
        size: side of its images, in pixels.
    """
    found: list[str] = []

    def init(key: jax.Array) -> None:
        variables = network.init(key, jnp.zeros((1, size, size, 1), jnp.float32))
        found.extend(variables["params"])  # what JAX returns has sorted names, what Flax has not

    jax.eval_shape(init, jax.random.key(0))
    return tuple(found)


def held(params: PyTree, freeze: str) -> PyTree:
    """Returns parameters with no gradient through those that a pattern freezes.

    What lies below the lowest trained layer then needs no backward pass.
    """
    if not freeze:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jax.lax.stop_gradient(p) if re.search(freeze, path_of(path)) else p, params
    )


def expect_trainable(params: PyTree, freeze: str) -> None:
    """Raises InputError where a pattern freezes nothing, or everything."""
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    matched = sum(bool(re.search(freeze, name)) for name in names)
    if not 0 < matched < len(names):
        what = "all" if matched else "none"
        raise InputError(
            f"--train.freeze {freeze!r} matches {what} of the network's parameters, which are"
            f" {', '.join(names)}"
        )


def path_of(path: Sequence[Any]) -> str:
    """Returns the path of a leaf as text, `stem/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _factory(config: TrainConfig) -> Factory:
    """Returns the optimizer that the config names, but for its learning rate."""
    if config.optimizer == "adam":
        return lambda rate: optax.adam(rate, eps=1e-7)  # Keras's epsilon
    if config.optimizer == "adamw":
        return lambda rate: optax.adamw(rate, weight_decay=config.weight_decay, mask=_is_kernel)
    return lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True)


def _is_kernel(params: PyTree) -> PyTree:
    """Marks what weight decay shrinks: kernels, not biases or batch norm's scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _kinds(params: PyTree, freeze: str) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if re.search(freeze, path_of(path)) else "trained", params
    )
