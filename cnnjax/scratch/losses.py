"""The loss: sigmoid and binary cross-entropy in one function, for numerical stability."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cnnjax.scratch.shapes import expect


class CrossEntropyCache(NamedTuple):
    """What the backward pass needs."""

    logits: np.ndarray
    target: np.ndarray
    weight: np.ndarray


def cross_entropy_forward(
    logits: np.ndarray,
    labels: np.ndarray,
    class_weights: tuple[float, float] = (1.0, 1.0),
    label_smoothing: float = 0.0,
) -> tuple[np.ndarray, CrossEntropyCache]:
    """Returns each image's weighted binary cross-entropy, in nats; stable for large logits.

    With the probability of label 1, p = sigma(z) = 1 / (1 + exp(-z)), the target t and the weight w
    of the image's class,

        l = -w [t log p + (1 - t) log(1 - p)].

    Since log p = z - log(1 + e^z) and log(1 - p) = -log(1 + e^z),

        l = w [log(1 + e^z) - t z] = w [max(z, 0) - t z + log(1 + e^-|z|)].

    In the last form no exponential can overflow, and a loss near 0 keeps its precision.

    Args:
        logits: z, float [batch].
        labels: int [batch], 0 or 1.
        class_weights: weights of labels 0 and 1.
        label_smoothing: s; the targets of labels 0 and 1 are s / 2 and 1 - s / 2.

    Returns:
        float [batch], and the cache.

    Raises:
        ValueError: the shapes do not fit.
    """
    expect("logits", logits.shape, ("batch",))
    expect("labels", labels.shape, logits.shape, "like the logits")
    z, dtype = logits, logits.dtype
    target = (labels * (1.0 - label_smoothing) + label_smoothing / 2).astype(dtype)
    weight = np.asarray(class_weights, dtype)[labels]
    losses = weight * (np.maximum(z, 0) - target * z + np.log1p(np.exp(-np.abs(z))))
    return losses, CrossEntropyCache(z, target, weight)


def cross_entropy_backward(dlosses: np.ndarray, cache: CrossEntropyCache) -> np.ndarray:
    """Returns dL/dz, float [batch], from dlosses = dL/dl, float [batch].

    The derivative of log(1 + e^z) is e^z / (1 + e^z) = sigma(z). Hence

        dl/dz = w [sigma(z) - t] = w [(1 - t) sigma(z) - t sigma(-z)].

    The second form uses 1 = sigma(z) + sigma(-z). It has no cancellation where sigma(z) is close
    to 1.
    """
    z, target, weight = cache
    expect("dlosses", dlosses.shape, z.shape, "like the logits")
    small = np.exp(-np.abs(z))  # in (0, 1], never an overflow
    larger, smaller = 1 / (1 + small), small / (1 + small)
    p = np.where(z >= 0, larger, smaller)
    q = np.where(z >= 0, smaller, larger)
    return dlosses * weight * ((1 - target) * p - target * q)
