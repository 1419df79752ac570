"""SGD with momentum, Adam and AdamW: pure functions (gradients, state, params) -> (params, state).

They mean what the optax transformations of `cnnjax.optimizers.make_optimizer` mean. A learning rate
is a number, or a function of the number of steps taken before this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cnnjax.scratch.trees import Tree, map_tree

LearningRate = float | Callable[[int], float]


class Optimizer(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[Tree], Any]
    """params -> state before the first step."""
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]
    """(gradients, state, params) -> (params, state); ValueError if the trees differ in shape."""


class MomentumState(NamedTuple):
    """What SGD remembers."""

    step: int
    """Steps taken."""
    trace: Tree
    """Decaying sum of the gradients."""


class AdamState(NamedTuple):
    """What Adam remembers."""

    step: int
    """Steps taken."""
    mu: Tree
    """Moving average of the gradients: the first moment."""
    nu: Tree
    """Moving average of their squares: the second moment."""


def sgd(learning_rate: LearningRate, *, momentum: float = 0.9, nesterov: bool = True) -> Optimizer:
    """Returns stochastic gradient descent with (Nesterov) momentum, as `optax.sgd`.

    With g the gradient, b the momentum and r the learning rate, momentum walks along a decaying sum
    of gradients, v <- g + b v, p <- p - r v: where they agree it grows to 1 / (1 - b) times the
    step, where they alternate it cancels them. Nesterov's form looks one step ahead, p <- p - r (g
    + b v) (Sutskever et al., ICML 2013, in the variables that need no gradient elsewhere).
    """

    def init(params: Tree) -> MomentumState:
        return MomentumState(0, map_tree(np.zeros_like, params))

    def update(gradients: Tree, state: MomentumState, params: Tree) -> tuple[Tree, MomentumState]:
        rate = _rate(learning_rate, state.step)
        trace = map_tree(lambda g, v: g + momentum * v, gradients, state.trace)
        ahead = map_tree(lambda g, v: g + momentum * v, gradients, trace) if nesterov else trace
        params = map_tree(lambda p, v: p - rate * v, params, ahead)
        return params, MomentumState(state.step + 1, trace)

    return Optimizer(init, update)


def adam(
    learning_rate: LearningRate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> Optimizer:
    """Returns Adam (Kingma and Ba, arXiv:1412.6980), with Keras's epsilon.

    It divides the mean gradient by its root mean square, so that each parameter moves by about the
    learning rate r whatever the size of its gradient g:

        m <- b1 m + (1 - b1) g,    n <- b2 n + (1 - b2) g^2,
        p <- p - r (m / (1 - b1^t)) / (sqrt(n / (1 - b2^t)) + eps).

    Both averages start at 0. After t steps their weights sum to (1 - b) (1 + b + ... + b^(t-1)) =
    1 - b^t, which the division makes up for.
    """
    return adamw(learning_rate, 0.0, b1=b1, b2=b2, eps=eps)


def adamw(
    learning_rate: LearningRate,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Optimizer:
    """Returns Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101).

    As `adam`, and each kernel shrinks by r times the decay, p <- p - r (... + decay p): were decay
    p part of the gradient, the division by its root mean square would undo it. Biases and batch
    norm's scales, which are vectors, do not shrink.
    """

    def init(params: Tree) -> AdamState:
        return AdamState(0, map_tree(np.zeros_like, params), map_tree(np.zeros_like, params))

    def update(gradients: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        rate, t = _rate(learning_rate, state.step), state.step + 1
        mu = map_tree(lambda g, m: b1 * m + (1 - b1) * g, gradients, state.mu)
        nu = map_tree(lambda g, n: b2 * n + (1 - b2) * (g * g), gradients, state.nu)

        def step(p: np.ndarray, m: np.ndarray, n: np.ndarray) -> np.ndarray:
            direction = m / (1 - b1**t) / (np.sqrt(n / (1 - b2**t)) + eps)
            if weight_decay and p.ndim > 1:
                direction += weight_decay * p
            return p - rate * direction

        return map_tree(step, params, mu, nu), AdamState(t, mu, nu)

    return Optimizer(init, update)


def _rate(learning_rate: LearningRate, step: int) -> float:
    # A Python float, because a NumPy one would turn float32 parameters into float64.
    return float(learning_rate(step) if callable(learning_rate) else learning_rate)
