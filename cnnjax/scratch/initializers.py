"""Initializers of kernels: (rng, shape, dtype) -> array.

The variance of the weights is chosen to preserve the variance of the signal in a layer. Each output
is a sum of `fan_in` products of an input and a weight, which are independent and have mean zero, so
Var(y) = fan_in Var(w) E[x^2]. A linear layer preserves E[x^2] if Var(w) = 1 / fan_in (LeCun). Relu
sets half of the signal to zero, which Var(w) = 2 / fan_in compensates (He). In the backward pass
each input is in `fan_out` sums; Var(w) = 2 / (fan_in + fan_out) is a compromise between both
directions (Glorot).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

# The standard deviation of a standard normal distribution truncated to [-2, 2].
_CUT_DEVIATION = 0.87962566103423978


def he_normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike = np.float32
) -> np.ndarray:
    """Draws from a truncated normal of variance 2 / fan_in (He et al., arXiv:1502.01852)."""
    return _cut_normal(rng, shape, 2 / fans(shape)[0], dtype)


def lecun_normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike = np.float32
) -> np.ndarray:
    """Draws from a truncated normal of variance 1 / fan_in (LeCun et al., Efficient BackProp)."""
    return _cut_normal(rng, shape, 1 / fans(shape)[0], dtype)


def glorot_uniform(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike = np.float32
) -> np.ndarray:
    """Draws uniformly with variance 2 / (fan_in + fan_out) (Glorot and Bengio, AISTATS 2010)."""
    # A uniform draw from [-a, a] has variance a^2 / 3.
    bound = math.sqrt(3 * 2 / sum(fans(shape)))
    return rng.uniform(-bound, bound, shape).astype(dtype)


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns (fan_in, fan_out): inputs per output and outputs per input.

    Args:
        shape: [in, out] or [kernel height, kernel width, in, out].

    Raises:
        ValueError: the shape has fewer than two axes.
    """
    if len(shape) < 2:
        raise ValueError(f"expected a kernel's shape [..., in, out], got {list(shape)}")
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def _cut_normal(
    rng: np.random.Generator, shape: tuple[int, ...], variance: float, dtype: DTypeLike
) -> np.ndarray:
    """Draws from a normal distribution truncated at two standard deviations.

    Values outside are drawn again; the result is scaled to the given variance.
    """
    draws = rng.standard_normal(shape)
    while (outside := np.abs(draws) > 2).any():
        draws[outside] = rng.standard_normal(int(outside.sum()))
    return (draws * (math.sqrt(variance) / _CUT_DEVIATION)).astype(dtype)
