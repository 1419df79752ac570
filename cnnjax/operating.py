"""The operating point: calibration of the logits and decision threshold.

Both are fitted on held-out images, and should be evaluated on other images. The threshold is a
value of the logit; its sensitivity and specificity do not depend on the prevalence of the disease.
The calibrated probability of a logit depends on it, so `OperatingPoint.probabilities` accepts a
prevalence.

Three or more classes have no positive class, hence no threshold and no prevalence. Their logits are
calibrated too, and the most probable class is predicted (`SoftmaxPoint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from cnnjax.config import OperatingConfig
from cnnjax.errors import InputError
from cnnjax.metrics import Evaluation, evaluate, log_softmax, sigmoid, softmax


@dataclass(frozen=True)
class OperatingPoint:
    """Calibration and decision threshold of one logit.

    The calibrated log-odds are slope * logit + bias.
    """

    slope: float = 1.0
    """Factor of the logit, the inverse of the temperature."""
    bias: float = 0.0
    """Added to the scaled logit."""
    prevalence: float = 0.5
    """Proportion of positives among the images that slope and bias were fitted on."""
    threshold: float = 0.0
    """Decision threshold: an image is positive if the network's logit is at least this value."""
    criterion: str = "probability 0.5"
    """How the threshold was chosen, in words."""

    def calibrated(self, logits: np.ndarray, prevalence: float | None = None) -> np.ndarray:
        """Returns the calibrated log-odds, float64 [n].

        Args:
            logits: logits of the network, [n].
            prevalence: proportion of positives in the population of the images; None for the
                `prevalence` of the fit. The log-odds are shifted by the difference between the
                log-odds of the two prevalences (Saerens et al., Neural Computation 14, 2002). This
                assumes that each class looks the same in both populations.
        """
        moved = 0.0 if prevalence is None else _log_odds(prevalence) - _log_odds(self.prevalence)
        return self.slope * np.asarray(logits, np.float64) + self.bias + moved

    def probabilities(self, logits: np.ndarray, prevalence: float | None = None) -> np.ndarray:
        """Returns the calibrated probabilities, float64 [n], of logits [n]; see `calibrated`."""
        return sigmoid(self.calibrated(logits, prevalence))

    def probability_threshold(self, prevalence: float | None = None) -> float:
        """Returns the calibrated probability at the threshold; see `calibrated`."""
        return float(self.probabilities(np.array([self.threshold]), prevalence)[0])

    def margins(self, logits: np.ndarray) -> np.ndarray:
        """Returns float64 [n], the distance of logits [n] from the threshold, in log-odds.

        An image is positive if its margin is at least 0. Margins of networks whose logits have
        different scales can be compared.
        """
        return self.slope * (np.asarray(logits, np.float64) - self.threshold)

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Returns the predicted labels, int64 [n], of logits [n]: 1 at or above the threshold."""
        return (np.asarray(logits) >= self.threshold).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Returns a dict of numbers and strings; `OperatingPoint(**values)` is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class SoftmaxPoint:
    """Calibration of K logits for K classes; the most probable class is predicted.

    It is temperature scaling with a bias for each class (Alexandari et al., ICML 2020,
    arXiv:1901.06852). The biases also correct the effect of class weights on the probabilities.
    """

    slope: float = 1.0
    """Factor of the logits, the inverse of the temperature."""
    bias: tuple[float, ...] = ()
    """Added to the scaled logit of each class, [K]; empty for no bias."""
    criterion: str = "the most probable class"
    """How the class is predicted, in words."""

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Returns the calibrated log-probabilities, float64 [n, K], of logits [n, K]."""
        return log_softmax(self.slope * np.asarray(logits, np.float64) + (self.bias or 0.0))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns the calibrated probabilities, float64 [n, K], of logits [n, K]."""
        return np.exp(self.calibrated(logits))

    def margins(self, logits: np.ndarray) -> np.ndarray:
        """Returns the calibrated log-probabilities, float64 [n, K], of logits [n, K].

        Margins of networks whose logits have different scales can be compared.
        """
        return self.calibrated(logits)

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Returns the most probable labels, int64 [n], of logits [n, K]."""
        return self.calibrated(logits).argmax(1)

    def to_json(self) -> dict[str, Any]:
        """Returns a dict of numbers, lists and strings."""
        return asdict(self) | {"bias": list(self.bias)}


Point = OperatingPoint | SoftmaxPoint
Points = dict[int, Point]
"""The operating points by the number of views over which the logits are averaged."""


def at_views(points: Points, views: int, source: str) -> Point:
    """Returns the operating point for a number of views.

    Args:
        points: operating points by number of views.
        views: the number of views.
        source: name of the run or model, for the error message.

    Raises:
        InputError: there is no operating point for this number of views.
    """
    if views not in points:
        known = " or ".join(map(str, points))
        several = "view" if set(points) == {1} else "views"
        raise InputError(
            f"--views {views}: {source} has an operating point for {known} {several} of an image"
        )
    return points[views]


def points_to_json(points: Points) -> dict[str, Any]:
    """Returns the operating points as JSON values, for `points_from_json`."""
    return {str(views): point.to_json() for views, point in points.items()}


def points_from_json(values: dict[str, Any]) -> Points:
    """Returns the operating points from the JSON values of `points_to_json`.

    Raises:
        TypeError, ValueError, AttributeError, KeyError: the values are not operating points.
    """
    return {
        int(views): OperatingPoint(**point)
        if "threshold" in point
        else SoftmaxPoint(**point | {"bias": tuple(point["bias"])})
        for views, point in values.items()
    }


def fit_operating_point(
    logits: np.ndarray,
    labels: np.ndarray,
    config: OperatingConfig,
    weights: np.ndarray | None = None,
) -> Point:
    """Fits calibration and decision threshold on held-out images.

    Args:
        logits: float [n], or [n, K] for K classes, which have no threshold.
        labels: int [n], 0 or 1, or 0 to K - 1, with at least one image of each class.
        config: criterion of the threshold.
        weights: float [n], weights of the images for the threshold and for
            `OperatingPoint.prevalence`, but not for the calibration; None for equal weights.

    Raises:
        InputError: the config asks for a threshold on K logits; see `expect_decidable`.
    """
    labels = np.asarray(labels)
    if np.ndim(logits) == 2:
        expect_decidable(config, np.shape(logits)[1])
        return SoftmaxPoint(*fit_softmax_calibration(logits, labels))
    weights = np.ones(len(labels)) if weights is None else weights
    slope, bias = fit_calibration(logits, labels)
    prevalence = float(np.average(labels, weights=weights))
    if config.criterion == "sensitivity":
        threshold = sensitive_threshold(logits, labels, config.sensitivity, weights)
        criterion = f"sensitivity {config.sensitivity:g}"
    elif config.criterion == "cost":
        wanted = prevalence if config.prevalence is None else config.prevalence
        missed = config.cost * wanted / prevalence
        alarm = (1 - wanted) / (1 - prevalence)
        threshold = least_cost_threshold(logits, labels, alarm, missed, weights)
        criterion = (
            f"least cost, a false negative costs {config.cost:g} false positives,"
            f" prevalence {wanted:.3g}"
        )
    else:
        alarm, missed = 1 / (1 - prevalence), 1 / prevalence
        threshold = least_cost_threshold(logits, labels, alarm, missed, weights)
        criterion = "highest sensitivity + specificity (Youden)"
    return OperatingPoint(slope, bias, prevalence, threshold, criterion)


def evaluate_at(
    point: Point, logits: np.ndarray, labels: np.ndarray, patients: Sequence[str]
) -> Evaluation:
    """Evaluates the calibrated probabilities and the decisions of an operating point.

    Args:
        point: the operating point of the network.
        logits: logits of the network, float [n] or [n, K].
        labels: int [n].
        patients: n patient IDs.
    """
    threshold = point.probability_threshold() if isinstance(point, OperatingPoint) else 0.5
    return evaluate(point.calibrated(logits), labels, patients, threshold=threshold)


def expect_decidable(config: OperatingConfig, classes: int) -> None:
    """Raises InputError if the config has a criterion other than the default, `youden`.

    The others need a positive class, which three or more classes do not have.

    Args:
        config: criterion of the threshold.
        classes: number of classes, three or more, for the error message.
    """
    if config.criterion != "youden":
        raise InputError(
            f"--operating.criterion {config.criterion} needs a positive class, and {classes}"
            " classes with a logit each have none: the most probable class is predicted; drop the"
            " flag"
        )


def fit_softmax_calibration(
    logits: np.ndarray, labels: np.ndarray
) -> tuple[float, tuple[float, ...]]:
    """Returns (slope, bias [K]) such that softmax(slope * logits + bias) is calibrated.

    It is a multinomial logistic regression with one slope for all logits, by Newton's method. The
    targets are smoothed as in `fit_calibration`: (n_k + 1) / (n_k + K) for the image's own class,
    which has n_k images, and 1 / (n_k + K) for each other class. The slope is positive; the biases
    sum to 0.

    Args:
        logits: float [n, K].
        labels: int [n], 0 to K - 1, with at least one image of each class.
    """
    x = np.asarray(logits, np.float64)
    n, classes = x.shape
    counts = np.bincount(labels, minlength=classes)
    target = np.repeat(1 / (counts + classes)[:, None], classes, axis=1)
    target[np.diag_indices(classes)] *= counts + 1
    target = target[labels]
    x = x - x.mean(1, keepdims=True)  # softmax ignores a number added to all logits
    scale = x.std() or 1.0
    x = (x - x.mean(0)) / scale
    # [n, K, 1 + K]: the calibrated logits are linear in the slope and the K biases
    design = np.concatenate(
        [x[:, :, None], np.broadcast_to(np.eye(classes), (n, classes, classes))], 2
    )

    def loss(w: np.ndarray) -> float:
        return float(-np.mean((target * log_softmax(design @ w)).sum(1)))

    def derivatives(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = softmax(design @ w)
        gradient = np.einsum("nkw,nk->w", design, p - target) / n
        mean = np.einsum("nkw,nk->nw", design, p)
        hessian = np.einsum("nkw,nk,nkv->wv", design, p, design) - mean.T @ mean
        # Softmax ignores a number added to all biases; the ridge makes the solution unique.
        return gradient, hessian / n + 1e-9 * np.eye(1 + classes)

    fitted = _minimized(loss, derivatives, np.append(1.0, np.log(counts / n)))
    if fitted[0] <= 0:  # see `fit_calibration`
        slope, bias = _FLAT, np.log(counts + 1)
    else:
        slope = float(fitted[0] / scale)
        bias = fitted[1:] - slope * np.asarray(logits, np.float64).mean(0)
    return slope, tuple((bias - bias.mean()).tolist())


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns (slope, bias) such that sigmoid(slope * logit + bias) is a calibrated probability.

    It is a logistic regression on the logit, by Newton's method, with Platt's smoothed targets
    (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) for n1 positives and n0 negatives (Platt, Advances in Large
    Margin Classifiers, 1999). Temperature scaling (Guo et al., arXiv:1706.04599) is the special
    case of bias 0; both numbers are needed because class weights and label smoothing change the
    logits. The slope is always positive. If a network ranks the images in the wrong order, the
    slope is nearly 0 and all probabilities are nearly the same.

    Args:
        logits: float [n].
        labels: int [n], 0 or 1, with at least one image of each class.
    """
    x = np.asarray(logits, np.float64)
    positive = np.asarray(labels) == 1
    n1, n0 = positive.sum(), (~positive).sum()
    target = np.where(positive, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    # Newton's steps are well scaled for standardized logits.
    centre, scale = x.mean(), x.std() or 1.0
    design = np.stack([(x - centre) / scale, np.ones_like(x)], axis=1)

    def loss(w: np.ndarray) -> float:
        z = design @ w
        return float(np.mean(np.logaddexp(0, z) - target * z))

    def derivatives(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = sigmoid(design @ w)
        gradient = design.T @ (p - target) / len(x)
        return gradient, (design.T * (p * (1 - p))) @ design / len(x) + 1e-12 * np.eye(2)

    fitted = _minimized(loss, derivatives, np.array([1.0, 0.0]))
    slope = fitted[0] / scale
    if slope <= 0:  # ranks no better than chance: the logit carries almost no information
        return _FLAT, math.log((n1 + 1) / (n0 + 1))
    return float(slope), float(fitted[1] - slope * centre)


_FLAT = 1e-6  # a slope near 0 that preserves the order of the logits


def least_cost_threshold(
    logits: np.ndarray,
    labels: np.ndarray,
    alarm: float = 1.0,
    missed: float = 1.0,
    weights: np.ndarray | None = None,
) -> float:
    """Returns the threshold of the logit with the lowest total cost of the errors.

    Equal costs give the highest accuracy. `alarm` = 1 / (number of negatives) and `missed` = 1 /
    (number of positives) give the highest sensitivity + specificity (Youden, Cancer 3, 1950).

    Args:
        logits: float [n].
        labels: int [n], 0 or 1.
        alarm: cost of a false positive.
        missed: cost of a false negative.
        weights: float [n], weights of the images; None for equal weights.

    Returns:
        The midpoint of two neighbouring logits; if several thresholds are equally good, the middle
        one. It is 1 above or below all logits if the best decision is the same for all images.
    """
    order = np.argsort(logits, kind="stable")
    ranked, positive = np.asarray(logits, np.float64)[order], np.asarray(labels)[order] == 1
    counts = np.ones(len(ranked)) if weights is None else weights[order] / weights.mean()
    # cost[k]: total cost if the k lowest logits are negative
    cost = np.append(0, np.cumsum(positive * counts)) * missed
    cost = cost + np.append(np.cumsum((~positive * counts)[::-1])[::-1], 0) * alarm
    between = np.append(True, np.append(ranked[1:] > ranked[:-1], True))  # not between equal logits
    least = cost[between].min()
    best = np.flatnonzero(between & (cost <= least + 1e-9 * (alarm + missed)))
    edges = np.concatenate([[ranked[0] - 2], ranked, [ranked[-1] + 2]])
    k = best[len(best) // 2]
    return float((edges[k] + edges[k + 1]) / 2)


def sensitive_threshold(
    logits: np.ndarray, labels: np.ndarray, sensitivity: float, weights: np.ndarray | None = None
) -> float:
    """Returns the highest threshold of the logit that reaches a sensitivity.

    Args:
        logits: float [n].
        labels: int [n], 0 or 1, with at least one positive.
        sensitivity: smallest sensitivity, in (0, 1].
        weights: float [n], weights of the images; None for equal weights.

    Returns:
        The midpoint of a positive's logit and the next lower logit; the positive's logit itself if
        there is no lower one.
    """
    logits = np.asarray(logits, np.float64)
    positive = np.asarray(labels) == 1
    order = np.argsort(logits[positive], kind="stable")
    positives = logits[positive][order]
    counts = np.ones(len(positives)) if weights is None else weights[positive][order]
    below_each = np.cumsum(counts) - counts  # weight of the positives below each one
    allowed = (1 - sensitivity) * counts.sum() * (1 + 1e-9)
    lowest = positives[np.searchsorted(below_each, allowed, side="right") - 1]
    below = logits[logits < lowest]
    return float((lowest + below.max()) / 2 if len(below) else lowest)


class Bin(NamedTuple):
    """A bin of a reliability diagram."""

    predicted: float
    """Mean probability of its images."""
    observed: float
    """Proportion of positives among its images."""
    images: int
    """Number of images."""


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[Bin]:
    """Returns a reliability diagram: the bins of the probability that have images.

    Args:
        probabilities: float [n], in [0, 1].
        labels: int [n], 0 or 1.
        bins: number of bins of equal width, including empty ones.
    """
    at = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    found = []
    for k in np.unique(at):
        inside = at == k
        means = float(probabilities[inside].mean()), float(np.mean(labels[inside]))
        found.append(Bin(*means, int(inside.sum())))
    return found


def _log_odds(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def _minimized(
    loss: Callable[[np.ndarray], float],
    derivatives: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    start: np.ndarray,
) -> np.ndarray:
    """Returns the minimum of a convex loss, by Newton's method with halved steps.

    Args:
        loss: from float64 [w].
        derivatives: from float64 [w] to the gradient [w] and the Hessian [w, w].
        start: float64 [w].
    """
    fitted = start
    for _ in range(50):
        gradient, hessian = derivatives(fitted)
        step = np.linalg.solve(hessian, gradient)
        before, size = loss(fitted), 1.0
        while loss(fitted - size * step) > before and size > 1e-6:
            size /= 2
        fitted = fitted - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return fitted
