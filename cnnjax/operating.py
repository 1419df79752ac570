"""The operating point: what probability a logit means, and from which one on to call it positive.

Both are fitted on images that trained nothing, and judged on yet others. A threshold is a place on
the logit, so its sensitivity and specificity do not depend on how common the disease is; what a
logit means in terms of probability does, and `OperatingPoint.probabilities` takes a prevalence.

Three and more classes have no positive one, and so no threshold and no prevalence: their logits are
calibrated alike, and the most probable class is the decision (`SoftmaxPoint`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from cnnjax.config import OperatingConfig
from cnnjax.errors import InputError
from cnnjax.metrics import Evaluation, evaluate, log_softmax, sigmoid, softmax


@dataclass(frozen=True)
class OperatingPoint:
    """From a network's logit to a probability and a decision."""

    slope: float = 1.0
    """What the logit is multiplied with: one over the temperature."""
    bias: float = 0.0
    """What is added then."""
    prevalence: float = 0.5
    """Share of positives among the images that slope and bias were fitted on."""
    threshold: float = 0.0
    """The network's logit from which on an image counts as positive."""
    criterion: str = "probability 0.5"
    """How the threshold was chosen."""

    def calibrated(self, logits: np.ndarray, prevalence: float | None = None) -> np.ndarray:
        """Returns float64 [n], the log-odds that logits [n] mean.

        Args:
            logits: the network's.
            prevalence: share of positives where the images come from; that of the fit if None. The
                log-odds move by the difference of the two priors' (Saerens et al., Neural
                Computation 14, 2002): as if each class looked the same there.
        """
        moved = 0.0 if prevalence is None else _log_odds(prevalence) - _log_odds(self.prevalence)
        return self.slope * np.asarray(logits, np.float64) + self.bias + moved

    def probabilities(self, logits: np.ndarray, prevalence: float | None = None) -> np.ndarray:
        """Returns float64 [n], the probabilities that logits [n] mean; see `calibrated`."""
        return sigmoid(self.calibrated(logits, prevalence))

    def probability_threshold(self, prevalence: float | None = None) -> float:
        """Returns the probability from which on an image counts as positive."""
        return float(self.probabilities(np.array([self.threshold]), prevalence)[0])

    def margins(self, logits: np.ndarray) -> np.ndarray:
        """Returns float64 [n], how far above the threshold logits [n] are, in log-odds.

        From 0 on an image is positive. Those of networks of other scales can be compared.
        """
        return self.slope * (np.asarray(logits, np.float64) - self.threshold)

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Returns int64 [n], the labels that logits [n] are called."""
        return (np.asarray(logits) >= self.threshold).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers and strings, for `OperatingPoint(**values)`."""
        return asdict(self)


@dataclass(frozen=True)
class SoftmaxPoint:
    """From a network's K logits to probabilities of K classes and a decision.

    Temperature scaling with a bias for each class (Alexandari et al., ICML 2020, arXiv:1901.06852),
    which undoes what class weights do to the probabilities.
    """

    slope: float = 1.0
    """What the logits are multiplied with: one over the temperature."""
    bias: tuple[float, ...] = ()
    """What is added then to the logit of each class; nothing where empty."""
    criterion: str = "the most probable class"
    """How an image's class is decided."""

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Returns float64 [n, K], the log-probabilities that logits [n, K] mean."""
        return log_softmax(self.slope * np.asarray(logits, np.float64) + (self.bias or 0.0))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns float64 [n, K], the probabilities that logits [n, K] mean."""
        return np.exp(self.calibrated(logits))

    def margins(self, logits: np.ndarray) -> np.ndarray:
        """Returns float64 [n, K]: those of networks of other scales can be compared."""
        return self.calibrated(logits)

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Returns int64 [n], the most probable label of each row of logits [n, K]."""
        return self.calibrated(logits).argmax(1)

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers, lists and strings."""
        return asdict(self) | {"bias": list(self.bias)}


Point = OperatingPoint | SoftmaxPoint
Points = dict[int, Point]
"""The operating point for each number of views that an image's logit may be the mean of."""


def at_views(points: Points, views: int, source: str) -> Point:
    """Returns the point for so many views.

    Raises:
        InputError: there is none.
    """
    if views not in points:
        known = " or ".join(str(n) for n in sorted(points))
        several = "view" if set(points) == {1} else "views"
        raise InputError(
            f"--views {views}: {source} has an operating point for {known} {several} of an image"
        )
    return points[views]


def points_to_json(points: Points) -> dict[str, Any]:
    """Returns plain JSON, for `points_from_json`."""
    return {str(views): point.to_json() for views, point in points.items()}


def points_from_json(values: dict[str, Any]) -> Points:
    """Returns the points that `points_to_json` wrote down.

    Raises:
        TypeError, ValueError, AttributeError, KeyError: the values are none.
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
    """Chooses calibration and threshold on images that trained nothing.

    Args:
        logits: float [n], or [n, K] of K classes, which have no threshold.
        labels: int [n], 0 or 1, or 0 to K - 1, all of them there.
        config: by what to choose the threshold.
        weights: float [n], of the images in the choice of the threshold; equal when None.

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
        criterion = f"least cost, a miss {config.cost:g} times a false alarm, of {wanted:.3g} ill"
    else:
        alarm, missed = 1 / (1 - prevalence), 1 / prevalence
        threshold = least_cost_threshold(logits, labels, alarm, missed, weights)
        criterion = "highest sensitivity + specificity (Youden)"
    return OperatingPoint(slope, bias, prevalence, threshold, criterion)


def evaluate_at(
    point: Point, logits: np.ndarray, labels: np.ndarray, patients: Sequence[str]
) -> Evaluation:
    """Returns the figures of calibrated probabilities at an operating point.

    Args:
        point: of the logits.
        logits: the network's, float [n] or [n, K].
        labels: int [n].
        patients: n patients.
    """
    threshold = point.probability_threshold() if isinstance(point, OperatingPoint) else 0.5
    return evaluate(point.calibrated(logits), labels, patients, threshold=threshold)


def expect_decidable(config: OperatingConfig, classes: int) -> None:
    """Raises InputError where a threshold is asked for that only a positive class has."""
    if config.criterion != "youden":
        raise InputError(
            f"--operating.criterion {config.criterion} is of a positive class, and {classes}"
            " classes with a logit each have none: the most probable is called; drop the flag"
        )


def fit_softmax_calibration(
    logits: np.ndarray, labels: np.ndarray
) -> tuple[float, tuple[float, ...]]:
    """Returns (slope, bias [K]) such that softmax(slope * logits + bias) is calibrated.

    Multinomial logistic regression with one slope for all logits, by Newton's method, on targets
    as of `fit_calibration`: those of a class of n_k images are (n_k + 1) / (n_k + K) for itself,
    and the rest evenly for the others. The slope is positive; the biases have the sum 0.

    Args:
        logits: float [n, K].
        labels: int [n], 0 to K - 1, all of them there.
    """
    x = np.asarray(logits, np.float64)
    n, classes = x.shape
    counts = np.bincount(labels, minlength=classes)
    target = np.repeat(1 / (counts + classes)[:, None], classes, axis=1)
    target[np.diag_indices(classes)] *= counts + 1
    target = target[labels]
    x = x - x.mean(1, keepdims=True)  # what all classes share says nothing
    scale = x.std() or 1.0
    x = (x - x.mean(0)) / scale
    # [n, K, 1 + K]: what the logits are of slope and biases
    design = np.concatenate(
        [x[:, :, None], np.broadcast_to(np.eye(classes), (n, classes, classes))], 2
    )

    def loss(w: np.ndarray) -> float:
        return float(-np.mean((target * log_softmax(design @ w)).sum(1)))

    fitted = np.append(1.0, np.log(counts / n))
    for _ in range(50):
        p = softmax(design @ fitted)
        gradient = np.einsum("nkw,nk->w", design, p - target) / n
        mean = np.einsum("nkw,nk->nw", design, p)
        hessian = np.einsum("nkw,nk,nkv->wv", design, p, design) - mean.T @ mean
        # A number added to all biases changes nothing; the ridge takes the least.
        step = np.linalg.solve(hessian / n + 1e-9 * np.eye(1 + classes), gradient)
        before, size = loss(fitted), 1.0
        while loss(fitted - size * step) > before and size > 1e-6:
            size /= 2
        fitted = fitted - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    if fitted[0] <= 0:  # see `fit_calibration`
        slope, bias = _FLAT, np.log(counts + 1)
    else:
        slope = float(fitted[0] / scale)
        bias = fitted[1:] - slope * np.asarray(logits, np.float64).mean(0)
    return slope, tuple((bias - bias.mean()).tolist())


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns (slope, bias) such that sigmoid(slope * logit + bias) is a calibrated probability.

    Logistic regression on the logit by Newton's method, with Platt's targets, which stay off 0 and
    1 by what a uniform prior adds (Platt, Advances in Large Margin Classifiers, 1999). Temperature
    scaling (Guo et al., arXiv:1706.04599) is the case of bias 0; class weights and label smoothing
    move the logits, so there is need of both. The slope is positive even for a network that ranks
    the wrong way round, whose probabilities are then all the same.

    Args:
        logits: float [n].
        labels: int [n], 0 or 1, both of them there.
    """
    x = np.asarray(logits, np.float64)
    positive = np.asarray(labels) == 1
    n1, n0 = positive.sum(), (~positive).sum()
    target = np.where(positive, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    # On standardised logits Newton's steps are well scaled.
    centre, scale = x.mean(), x.std() or 1.0
    design = np.stack([(x - centre) / scale, np.ones_like(x)], axis=1)
    fitted = np.array([1.0, 0.0])

    def loss(w: np.ndarray) -> float:
        z = design @ w
        return float(np.mean(np.logaddexp(0, z) - target * z))

    for _ in range(50):
        p = sigmoid(design @ fitted)
        gradient = design.T @ (p - target) / len(x)
        hessian = (design.T * (p * (1 - p))) @ design / len(x) + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        before, size = loss(fitted), 1.0
        while loss(fitted - size * step) > before and size > 1e-6:
            size /= 2
        fitted = fitted - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    slope = fitted[0] / scale
    if slope <= 0:  # it ranks no better than chance: then a logit says next to nothing
        return _FLAT, math.log((n1 + 1) / (n0 + 1))
    return float(slope), float(fitted[1] - slope * centre)


_FLAT = 1e-6  # a slope that leaves the order of the logits as it is, and little else


def least_cost_threshold(
    logits: np.ndarray,
    labels: np.ndarray,
    alarm: float = 1.0,
    missed: float = 1.0,
    weights: np.ndarray | None = None,
) -> float:
    """Returns the logit from which on to call images positive so that the errors cost least.

    Equal costs give the highest accuracy; one over the number of each class gives the highest
    sensitivity + specificity (Youden, Cancer 3, 1950).

    Args:
        logits: float [n].
        labels: int [n], 0 or 1.
        alarm: cost of a negative called positive.
        missed: cost of a positive called negative.
        weights: float [n], of the images; equal when None.

    Returns:
        Midway between two neighbouring logits; of equally good places the middle one. One
        beyond them all if it is best to call all images negative, or all positive.
    """
    order = np.argsort(logits, kind="stable")
    ranked, positive = np.asarray(logits, np.float64)[order], np.asarray(labels)[order] == 1
    counts = np.ones(len(ranked)) if weights is None else weights[order] / weights.mean()
    # cost[k]: what it costs if the k lowest count as negative
    cost = np.append(0, np.cumsum(positive * counts)) * missed
    cost = cost + np.append(np.cumsum((~positive * counts)[::-1])[::-1], 0) * alarm
    between = np.append(True, np.append(ranked[1:] > ranked[:-1], True))  # no cut between equals
    least = cost[between].min()
    best = np.flatnonzero(between & (cost <= least + 1e-9 * (alarm + missed)))
    edges = np.concatenate([[ranked[0] - 2], ranked, [ranked[-1] + 2]])
    k = best[len(best) // 2]
    return float((edges[k] + edges[k + 1]) / 2)


def sensitive_threshold(
    logits: np.ndarray, labels: np.ndarray, sensitivity: float, weights: np.ndarray | None = None
) -> float:
    """Returns the highest logit from which on at least so large a part of the positives lies.

    Args:
        logits: float [n].
        labels: int [n], 0 or 1, at least one 1.
        sensitivity: in (0, 1].
        weights: float [n], of the images; equal when None.

    Returns:
        Midway between a positive's logit and the next lower one.
    """
    logits = np.asarray(logits, np.float64)
    positive = np.asarray(labels) == 1
    order = np.argsort(logits[positive], kind="stable")
    positives = logits[positive][order]
    counts = np.ones(len(positives)) if weights is None else weights[positive][order]
    below_each = np.cumsum(counts) - counts  # what lies below each positive
    allowed = (1 - sensitivity) * counts.sum() * (1 + 1e-9)
    lowest = positives[np.searchsorted(below_each, allowed, side="right") - 1]
    below = logits[logits < lowest]
    return float((lowest + below.max()) / 2 if len(below) else lowest)


class Bin(NamedTuple):
    """Images whose probabilities lie close together."""

    predicted: float
    """Mean probability."""
    observed: float
    """Share of positives."""
    images: int


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[Bin]:
    """Returns the filled ones of equally wide bins of the probability: a reliability diagram.

    Args:
        probabilities: float [n], in [0, 1].
        labels: int [n], 0 or 1.
        bins: how many.
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
