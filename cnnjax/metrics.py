"""How good the logits are: counts, curves and their intervals, on the host in float64.

The positive class is label 1. Where a metric has nothing to divide by, it is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054  # the standard normal's 97.5th percentile
_BINS = 15  # of the probability, for the calibration error
_CHUNK = 2_000_000  # bootstrap weights held at once


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % confidence interval."""

    value: float | None
    ci95: tuple[float, float] | None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        low, high = self.ci95 or (math.nan, math.nan)
        return f"{self.value:.4f}  [{low:.4f}, {high:.4f}]"


@dataclass(frozen=True)
class Confusion:
    """Images by truth and decision."""

    tn: int
    fp: int
    fn: int
    tp: int


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` finds; `to_json` is the form on disk."""

    accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    precision: Estimate
    f1: Estimate
    auc: Estimate
    brier: Estimate
    ece: Estimate
    """Expected calibration error (Naeini et al., AAAI 2015), over 15 bins of equal width."""
    confusion: Confusion
    threshold: float
    n: int
    patients: int

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers, lists and dicts."""
        out: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                ci95 = None if value.ci95 is None else list(value.ci95)
                out[name] = {"value": value.value, "ci95": ci95}
            else:
                out[name] = vars(value) if isinstance(value, Confusion) else value
        return out

    def report(self, classes: Sequence[str]) -> str:
        """Returns the metrics with intervals, and the classification report per class, as text."""
        c = self.confusion
        lines = [
            f"{name:<12} {value}"
            for name, value in vars(self).items()
            if isinstance(value, Estimate)
        ]
        lines[1] += "   (recall)"
        width = max(map(len, classes))
        lines += ["", f"{'':<{width}}  precision  recall      f1  images"]
        for name, right, false, missed in (
            (classes[0], c.tn, c.fn, c.fp),
            (classes[1], c.tp, c.fp, c.fn),
        ):
            parts = (
                _ratio(right, right + false),
                _ratio(right, right + missed),
                _ratio(2 * right, 2 * right + false + missed),
            )
            shown = ["  --  " if p is None else f"{p:.4f}" for p in parts]
            lines.append(
                f"{name:<{width}}     {shown[0]}  {shown[1]}  {shown[2]}  {right + missed:>6,}"
            )
        lines += [
            "",
            f"decided at probability {self.threshold:.3g}:"
            f" {c.tp:,} true and {c.fp:,} false positives,"
            f" {c.tn:,} true and {c.fn:,} false negatives;"
            f" {self.n:,} images of {self.patients:,} patients",
        ]
        return "\n".join(lines)


def evaluate(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str],
    *,
    threshold: float = 0.5,
    replicates: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Judges logits against labels.

    Accuracy, sensitivity, specificity and precision get Wilson's score interval (J. Am. Stat.
    Assoc. 22, 1927), which takes images as independent; F1, AUC, Brier score and calibration error
    get the percentile interval of a bootstrap that draws whole patients. That of the calibration
    error is moved by the bootstrap's bias: each draw adds noise, and an average of absolute values
    rises with it.

    Args:
        logits: float [n].
        labels: int [n], 0 or 1.
        patients: n patients.
        threshold: an image is positive from this probability on.
        replicates: draws of the bootstrap; 0 leaves its intervals out.
        seed: of the bootstrap.

    Raises:
        ValueError: the three do not have the same length, or are empty.
    """
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(labels)
    if not len(logits) == len(labels) == len(patients) or not len(logits):
        sizes = f"{len(logits)}, {len(labels)} and {len(patients)}"
        raise ValueError(f"need as many logits, labels and patients, at least one; got {sizes}")
    probability = sigmoid(logits)
    decided = probability >= threshold
    truth = labels == 1
    c = Confusion(
        tn=int((~truth & ~decided).sum()),
        fp=int((~truth & decided).sum()),
        fn=int((truth & ~decided).sum()),
        tp=int((truth & decided).sum()),
    )

    whom, patient = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {"f1": [], "auc": [], "brier": [], "ece": []}
    # [n, bins]: how much each image's probability is too high, in the column of its bin
    excess = np.zeros((len(labels), _BINS))
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    excess[np.arange(len(labels)), bins] = probability - truth
    chunk = max(1, _CHUNK // len(labels))
    for start in range(0, replicates, chunk):
        draws = min(chunk, replicates - start)
        times = rng.multinomial(len(whom), np.full(len(whom), 1 / len(whom)), size=draws)
        weights = times[:, patient].astype(np.float64)
        drawn["auc"].append(_weighted_auc(logits, truth, weights))
        drawn["brier"].append(weights @ (probability - truth) ** 2 / weights.sum(1))
        drawn["ece"].append(np.abs(weights @ excess).sum(1) / weights.sum(1))
        hits = weights @ (truth & decided)
        drawn["f1"].append(_divide(2 * hits, weights @ decided + weights @ truth))

    def bootstrapped(name: str, value: float | None) -> Estimate:
        draws = np.concatenate([np.empty(0), *drawn[name]])
        draws = draws[np.isfinite(draws)]
        if value is None or not len(draws):
            return Estimate(value, None)
        low, high = np.percentile(draws, (2.5, 97.5))
        if name == "ece":
            low, high = np.maximum(np.array([low, high]) + value - np.median(draws), 0)
        return Estimate(value, (float(low), float(high)))

    return Evaluation(
        accuracy=proportion(c.tn + c.tp, len(labels)),
        sensitivity=proportion(c.tp, c.tp + c.fn),
        specificity=proportion(c.tn, c.tn + c.fp),
        precision=proportion(c.tp, c.tp + c.fp),
        f1=bootstrapped("f1", _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)),
        auc=bootstrapped("auc", auc(logits, labels)),
        brier=bootstrapped("brier", float(np.mean((probability - truth) ** 2))),
        ece=bootstrapped("ece", float(np.abs(excess.sum(0)).sum() / len(labels))),
        confusion=c,
        threshold=threshold,
        n=len(labels),
        patients=len(whom),
    )


def at_zero(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns AUC, accuracy, sensitivity and specificity where logits from 0 on are positive.

    Args:
        logits: float [n].
        labels: int [n], 0 and 1, both of them.
    """
    positive, decided = labels == 1, logits >= 0
    area = auc(logits, labels)
    assert area is not None, "training_data() sees to it that both classes validate"
    return {
        "auc": area,
        "accuracy": float(np.mean(decided == positive)),
        "sensitivity": float(np.mean(decided[positive])),
        "specificity": float(np.mean(~decided[~positive])),
    }


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the area under the ROC curve: P(positive scores higher) + P(tie) / 2.

    Args:
        scores: float [n].
        labels: int [n], 0 or 1.

    Returns:
        A number in [0, 1]; None if a class is missing.
    """
    value = _weighted_auc(np.asarray(scores), np.asarray(labels) == 1, np.ones((1, len(scores))))[0]
    return None if math.isnan(value) else float(value)


def proportion(hits: int, n: int) -> Estimate:
    """Returns hits / n with Wilson's 95 % score interval."""
    if n == 0:
        return Estimate(None, None)
    p, z2 = hits / n, _Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, (max(0.0, middle - half), min(1.0, middle + half)))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities float64 [n] of logits [n], without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


def _weighted_auc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [draws], the AUC of n scores under each row of weights [draws, n]."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))  # of runs of equal scores
    positive = np.add.reduceat((weights * truth)[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * ~truth)[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(1)
    return _divide(wins, positive.sum(1) * negative.sum(1))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
