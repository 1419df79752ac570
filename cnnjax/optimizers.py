"""Optimizers, learning rate schedules and frozen parameters, all made of optax transformations.

A parameter is named by its path, such as `stem/kernel`. A layer is a top-level entry of the
parameters.
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
"""A function from a learning rate schedule to an optimizer, such as `optax.lion` or
`functools.partial(optax.sgd, momentum=0.9)`."""


def make_optimizer(
    config: TrainConfig,
    steps_per_epoch: int,
    factory: Factory | None = None,
    layers: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer that the config describes, and its learning rate schedule.

    Args:
        config: training config.
        steps_per_epoch: number of steps of an epoch.
        factory: makes the optimizer, instead of the one that `config.optimizer` names. Schedule,
            clipping, frozen parameters and layer-wise learning rates still follow the config.
        layers: names of the network's layers from input to output, see `layers_of`; needed for
            `config.layer_decay` below 1.
    """
    rate = schedule_of(config, steps_per_epoch)
    return optimizer_at(rate, config, factory, layers), rate


def optimizer_at(
    rate: optax.Schedule,
    config: TrainConfig,
    factory: Factory | None = None,
    layers: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Returns the optimizer that the config describes, with another learning rate schedule.

    Args:
        rate: the schedule; `config.learning_rate` and `config.schedule` have no effect.
        config: see `make_optimizer`.
        factory: see `make_optimizer`.
        layers: see `make_optimizer`.
    """
    optimizer = (factory or _factory(config))(rate)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.layer_decay < 1:
        optimizer = optax.chain(optimizer, scale_layers(layers, config.layer_decay))
    if config.freeze:
        # Outermost, so that clipping uses the norm over the trained parameters only.
        kinds = {"trained": optimizer, "frozen": optax.set_to_zero()}
        optimizer = optax.partition(kinds, lambda params: _kinds(params, config.freeze))
    return optimizer


def schedule_of(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Returns the schedule: a function from the number of steps taken to the learning rate."""
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
    """Returns a transformation that multiplies updates by decay ** (number of later layers).

    This is the discriminative fine-tuning of Howard and Ruder, "ULMFiT", ACL 2018
    (arXiv:1801.06146), with the layers' learning rates in a geometric series.

    Args:
        layers: names of the layers from input to output; the last one has the factor 1.
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
    """Returns the top-level names of a network's parameters, in the order of their creation.

    Args:
        network: a Linen module.
        size: side length of its images, in pixels.
    """
    found: list[str] = []

    def init(key: jax.Array) -> None:
        variables = network.init(key, jnp.zeros((1, size, size, 1), jnp.float32))
        found.extend(variables["params"])  # Flax keeps the order of creation; JAX sorts the names

    jax.eval_shape(init, jax.random.key(0))
    return tuple(found)


def held(params: PyTree, freeze: str) -> PyTree:
    """Returns the parameters, with gradients stopped at the frozen ones.

    Layers before the first trained layer then need no backward pass.

    Args:
        params: parameters of a network.
        freeze: regular expression that is searched in the parameters' paths; empty for none.
    """
    if not freeze:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jax.lax.stop_gradient(p) if re.search(freeze, path_of(path)) else p, params
    )


def expect_trainable(params: PyTree, freeze: str) -> None:
    """Raises InputError if the pattern `freeze` matches no parameter, or all of them."""
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    matched = sum(bool(re.search(freeze, name)) for name in names)
    if not 0 < matched < len(names):
        what = "all" if matched else "none"
        raise InputError(
            f"--train.freeze {freeze!r} matches {what} of the network's parameters, which are"
            f" {', '.join(names)}"
        )


def path_of(path: Sequence[Any]) -> str:
    """Returns the path of a leaf as text, such as `stem/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _factory(config: TrainConfig) -> Factory:
    """Returns the factory of the optimizer that the config names."""
    if config.optimizer == "adam":
        return lambda rate: optax.adam(rate, eps=1e-7)  # Keras's epsilon
    if config.optimizer == "adamw":
        return lambda rate: optax.adamw(rate, weight_decay=config.weight_decay, mask=_is_kernel)
    return lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True)


def _is_kernel(params: PyTree) -> PyTree:
    """Returns the mask for weight decay: True for kernels, False for biases and norm scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _kinds(params: PyTree, freeze: str) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if re.search(freeze, path_of(path)) else "trained", params
    )
