"""SGD with momentum, Adam and AdamW: pure functions (gradients, state, params) -> (params, state).

They compute the same updates as the optax transformations of `cnnjax.optimizers.make_optimizer`. A
learning rate is a number, or a function of the number of steps taken before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cnnjax.scratch.trees import Tree, map_tree

LearningRate = float | Callable[[int], float]


class Optimizer(NamedTuple):
    """An optimizer as a pair of pure functions."""

    init: Callable[[Tree], Any]
    """params -> state before the first step."""
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]
    """(gradients, state, params) -> (params, state); ValueError if the trees differ in shape."""


class MomentumState(NamedTuple):
    """State of SGD."""

    step: int
    """Steps taken."""
    trace: Tree
    """Decaying sum of the gradients."""


class AdamState(NamedTuple):
    """State of Adam and AdamW."""

    step: int
    """Steps taken."""
    mu: Tree
    """Moving average of the gradients: the first moment."""
    nu: Tree
    """Moving average of their squares: the second moment."""


def sgd(learning_rate: LearningRate, *, momentum: float = 0.9, nesterov: bool = True) -> Optimizer:
    """Returns stochastic gradient descent with (Nesterov) momentum, like `optax.sgd`.

    With the gradient g, the momentum b and the learning rate r, the update uses a decaying sum of
    gradients: v <- g + b v, p <- p - r v. If the gradients agree, v grows to g / (1 - b); if they
    alternate, they cancel. Nesterov's form looks one step ahead: p <- p - r (g + b v) (Sutskever et
    al., ICML 2013, rewritten so that only gradients at p are needed).
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

    It divides the mean gradient by the root mean square of the gradients. Each parameter then
    changes by about the learning rate r, whatever the size of its gradient g:

        m <- b1 m + (1 - b1) g,    n <- b2 n + (1 - b2) g^2,
        p <- p - r (m / (1 - b1^t)) / (sqrt(n / (1 - b2^t)) + eps).

    Both averages start at 0. After t steps their weights sum to (1 - b) (1 + b + ... + b^(t-1)) =
    1 - b^t; the division corrects this bias.
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

    Like `adam`, with an additional term for kernels: p <- p - r (... + decay p). The term is not
    part of the gradient, because the division by the root mean square would cancel its effect. It
    does not apply to biases and batch norm scales, which are vectors.
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
    # A Python float, because a NumPy float64 would convert float32 parameters to float64.
    return float(learning_rate(step) if callable(learning_rate) else learning_rate)
