"""How good the logits are: counts, curves and their intervals, on the host in float64.

The positive class is label 1. Where a metric has nothing to divide by, it is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054  # the standard normal's 97.5th percentile
_BINS = 15  # of the probability, for the calibration error
_REPLICATES = 2000  # draws of the bootstrap
_CHUNK = 2_000_000  # bootstrap weights held at once

AT_ZERO = ("auc", "accuracy", "sensitivity", "specificity")
"""The metrics of `at_zero` and `paired_differences`."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % confidence interval."""

    value: float | None
    ci95: tuple[float, float] | None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        if self.ci95 is None:
            return f"{self.value:.4f}  [no interval]"
        low, high = self.ci95
        return f"{self.value:.4f}  [{low:.4f}, {high:.4f}]"


UNDEFINED = Estimate(None, None)
"""A metric that the images do not tell."""


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

    def elsewhere(self, prevalence: float) -> str:
        """Returns in words what sensitivity and specificity come to at another share of positives.

        It is the images' own that accuracy, precision and F1 are of.
        """
        here = (self.confusion.tp + self.confusion.fn) / self.n
        said = f"the figures above are of a share of positives of {here:.3g}"
        found, spared = self.sensitivity.value, self.specificity.value
        if found is None or spared is None:
            return said
        true, false = prevalence * found, (1 - prevalence) * (1 - spared)
        precision = _ratio(true, true + false)
        said += f"; where {prevalence:.3g} are, accuracy is {true + (1 - prevalence) * spared:.4f}"
        return said if precision is None else f"{said} and precision {precision:.4f}"

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
            f"positive from probability {self.threshold:.3f} on: {c.tp:,} true and {c.fp:,} false"
            " positives,",
            f"  {c.tn:,} true and {c.fn:,} false negatives;"
            f" {self.n:,} images of {self.patients:,} patients",
        ]
        return "\n".join(lines)


def evaluate(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str],
    *,
    threshold: float = 0.5,
    replicates: int = _REPLICATES,
    seed: int = 0,
) -> Evaluation:
    """Judges logits against labels.

    All intervals allow for what the images of one patient have in common. Accuracy, sensitivity,
    specificity and precision get that of `clustered_proportion`; F1, AUC, Brier score and
    calibration error get the percentile interval of a bootstrap that draws whole patients. That of
    the calibration error is moved by the bootstrap's bias: each draw adds noise, and an average of
    absolute values rises with it. Where all draws agree, as of a single patient or for a perfect
    ranking, they cannot tell how far off the metric may be, and there is no interval.

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
    _expect_as_many(logits=logits, labels=labels, patients=patients)
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
    drawn: dict[str, list[np.ndarray]] = {"f1": [], "auc": [], "brier": [], "ece": []}
    # [n, bins]: how much each image's probability is too high, in the column of its bin
    excess = np.zeros((len(labels), _BINS))
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    excess[np.arange(len(labels)), bins] = probability - truth
    for weights in patient_bootstrap(patients, replicates, seed):
        drawn["auc"].append(_weighted_auc(logits, truth, weights))
        drawn["brier"].append(weights @ (probability - truth) ** 2 / weights.sum(1))
        drawn["ece"].append(np.abs(weights @ excess).sum(1) / weights.sum(1))
        hits = weights @ (truth & decided)
        drawn["f1"].append(_divide(2 * hits, weights @ decided + weights @ truth))

    draws = {name: np.concatenate([np.empty(0), *some]) for name, some in drawn.items()}
    ece = float(np.abs(excess.sum(0)).sum() / len(labels))
    if len(_telling(draws["ece"])):
        draws["ece"] = np.maximum(draws["ece"] + ece - np.median(draws["ece"]), 0)

    return Evaluation(
        accuracy=clustered_proportion(decided == truth, patient),
        sensitivity=clustered_proportion(decided[truth], patient[truth]),
        specificity=clustered_proportion(~decided[~truth], patient[~truth]),
        precision=clustered_proportion(truth[decided], patient[decided]),
        f1=_bootstrapped(_ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn), draws["f1"]),
        auc=_bootstrapped(auc(logits, labels), draws["auc"]),
        brier=_bootstrapped(float(np.mean((probability - truth) ** 2)), draws["brier"]),
        ece=_bootstrapped(ece, draws["ece"]),
        confusion=c,
        threshold=threshold,
        n=len(labels),
        patients=len(whom),
    )


def patient_bootstrap(
    patients: Sequence[str], replicates: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yields float64 [draws, n]: how often each of n images is in a bootstrap of whole patients.

    Args:
        patients: n patients.
        replicates: draws in all; they come some at a time, so that they fit into memory.
        seed: of the draws.
    """
    whom, patient = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // len(patients))
    for start in range(0, replicates, chunk):
        draws = min(chunk, replicates - start)
        times = rng.multinomial(len(whom), np.full(len(whom), 1 / len(whom)), size=draws)
        yield times[:, patient].astype(np.float64)


def paired_differences(
    logits: np.ndarray, others: np.ndarray, labels: np.ndarray, patients: Sequence[str]
) -> dict[str, Estimate]:
    """Returns how far the second logits of the same images are above the first, by metric.

    AUC, accuracy, sensitivity and specificity; positive are logits from 0 on. The intervals are
    percentiles of 2000 bootstrap draws of whole patients, the same for both: what makes an image
    hard for both does not widen them. Where all draws agree there is none, as in `evaluate`.

    Args:
        logits: float [n].
        others: float [n].
        labels: int [n], 0 or 1.
        patients: n patients.

    Raises:
        ValueError: the four do not have the same length, or are empty.
    """
    _expect_as_many(logits=logits, others=others, labels=labels, patients=patients)
    truth = np.asarray(labels) == 1

    def gain(weights: np.ndarray) -> np.ndarray:
        first, second = (_weighted_at_zero(scores, truth, weights) for scores in (logits, others))
        return second - first

    values = gain(np.ones((1, len(truth))))[:, 0].tolist()
    drawn = np.hstack([gain(weights) for weights in patient_bootstrap(patients, _REPLICATES)])
    return {
        name: _bootstrapped(None if math.isnan(value) else value, draws)
        for name, value, draws in zip(AT_ZERO, values, drawn, strict=True)
    }


def _expect_as_many(**arrays: Sequence[Any] | np.ndarray) -> None:
    sizes = [len(array) for array in arrays.values()]
    if min(sizes) < max(sizes) or not min(sizes):
        names, counts = (", ".join(map(str, some)) for some in (arrays, sizes))
        raise ValueError(f"need as many {names}, at least one; got {counts}")


def _bootstrapped(value: float | None, draws: np.ndarray) -> Estimate:
    """Returns a metric with the interval of its draws, if they tell one."""
    draws = _telling(draws)
    if value is None or not len(draws):
        return Estimate(value, None)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(value, (float(low), float(high)))


def _telling(draws: np.ndarray) -> np.ndarray:
    """Returns the draws that define their metric; none where these all agree."""
    draws = draws[np.isfinite(draws)]
    return draws if len(np.unique(draws)) > 1 else draws[:0]


def _weighted_at_zero(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [metrics, draws] under each row of weights [draws, n]; NaN where undefined."""
    decided = np.asarray(scores) >= 0
    return np.stack(
        [
            _weighted_auc(np.asarray(scores), truth, weights),
            weights @ (decided == truth) / weights.sum(1),
            _divide(weights @ (decided & truth), weights @ truth),
            _divide(weights @ ~(decided | truth), weights @ ~truth),
        ]
    )


def at_zero(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns AUC, accuracy, sensitivity and specificity where logits from 0 on are positive.

    Args:
        logits: float [n].
        labels: int [n], 0 and 1, both of them.
    """
    values = _weighted_at_zero(logits, labels == 1, np.ones((1, len(labels))))[:, 0]
    assert not np.isnan(values).any(), "training_data() sees to it that both classes validate"
    return dict(zip(AT_ZERO, values.tolist(), strict=True))


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


def clustered_proportion(hits: np.ndarray, patients: np.ndarray) -> Estimate:
    """Returns the share of images that are hits, with its 95 % interval.

    Wilson's, for the effective number of images: their number over the design effect (Kish, Survey
    Sampling, 1965), the ratio of the share's variance among draws of patients to that among draws
    of images, at least 1 (see Dean and Pagano, J. Surv. Stat. Methodol. 3, 2015). What tells of it
    are the patients with the rarer outcome. So that few or none of them do not make the interval
    short, one is added whose effect is n over patients: that of images all alike within a patient,
    if all patients have as many.

    Args:
        hits: bool [n].
        patients: [n], whom each image shows.
    """
    n, k = len(hits), int(hits.sum())
    if n == 0:
        return proportion(0, 0)
    whom, patient = np.unique(patients, return_inverse=True)
    people = len(whom)
    effect = n / people
    if 0 < k < n and people > 1:
        residuals = np.bincount(patient, hits - k / n)
        among_patients = people / (people - 1) * np.square(residuals).sum() / n**2
        among_images = k / n * (1 - k / n) / (n - 1)
        rarer = np.unique(patient[hits == (k < n / 2)]).size
        effect += rarer * max(1.0, float(among_patients / among_images))
        effect /= 1 + rarer
    return proportion(k, n, n / effect)


def proportion(hits: int, n: int, effective: float | None = None) -> Estimate:
    """Returns hits / n with Wilson's 95 % score interval (J. Am. Stat. Assoc. 22, 1927).

    Args:
        hits: how many of n.
        n: of how many.
        effective: how many independent ones tell as much; n if None.
    """
    if n == 0:
        return Estimate(None, None)
    p, m, z2 = hits / n, n if effective is None else effective, _Z95**2
    middle = (p + z2 / (2 * m)) / (1 + z2 / m)
    half = _Z95 / (1 + z2 / m) * math.sqrt(p * (1 - p) / m + z2 / (4 * m * m))
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
