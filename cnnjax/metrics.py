"""Metrics of logits with 95 % confidence intervals, computed on the host in float64.

Two classes have one logit, and label 1 is the positive class. K classes have K logits. A metric of
a class is then computed one-vs-rest, and the overall metric is the unweighted mean over the classes
(macro average). A metric whose denominator is zero is undefined: None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_Z95 = 1.959963984540054  # the standard normal's 97.5th percentile
_BINS = 15  # number of bins of the probability, for the calibration error
_REPLICATES = 2000  # number of bootstrap draws
_CHUNK = 2_000_000  # largest number of bootstrap weights in memory

AT_ZERO = ("auc", "accuracy", "sensitivity", "specificity")
"""The metrics of `at_zero` and `paired_differences`."""

_MACRO = ("sensitivity", "specificity", "precision", "f1", "auc")
"""The metrics that are averaged over the classes if there are K logits."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % confidence interval; None if undefined."""

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
"""A metric that is undefined for these data."""


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix."""

    counts: tuple[tuple[int, ...], ...]
    """Number of images by true class (row) and predicted class (column), K x K."""

    @property
    def tn(self) -> int:
        """True negatives, for two classes."""
        return self.counts[0][0]

    @property
    def fp(self) -> int:
        """False positives, for two classes."""
        return self.counts[0][1]

    @property
    def fn(self) -> int:
        """False negatives, for two classes."""
        return self.counts[1][0]

    @property
    def tp(self) -> int:
        """True positives, for two classes."""
        return self.counts[1][1]

    def to_json(self) -> Any:
        """Returns a dict of `tn`, `fp`, `fn` and `tp` for two classes, a list of rows for more."""
        if len(self.counts) > 2:
            return [list(row) for row in self.counts]
        return {name: getattr(self, name) for name in ("tn", "fp", "fn", "tp")}


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`; `to_json` returns the form that is written to files.

    With K logits for K classes, sensitivity, specificity, precision, F1 and AUC are macro averages,
    and `each` holds the metrics of each class.
    """

    accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    precision: Estimate
    f1: Estimate
    auc: Estimate
    brier: Estimate
    """Mean squared error of the probability (Brier, Monthly Weather Review 78, 1950). With K
    logits, the sum over the classes."""
    ece: Estimate
    """Expected calibration error (Naeini et al., AAAI 2015), over 15 bins of equal width. With K
    logits, the error of the highest probability (Guo et al., arXiv:1706.04599)."""
    confusion: Confusion
    threshold: float | None
    """An image is positive if its probability is at least this threshold. None if the most probable
    class is predicted."""
    n: int
    """Number of images."""
    patients: int
    """Number of patients."""
    each: tuple[Evaluation, ...] = ()
    """With K logits, the evaluation of each class against the rest; empty for one logit."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers, lists and dicts."""
        out: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                ci95 = None if value.ci95 is None else list(value.ci95)
                out[name] = {"value": value.value, "ci95": ci95}
            else:
                out[name] = value.to_json() if isinstance(value, Confusion) else value
        del out["each"]
        return out | ({"each": [one.to_json() for one in self.each]} if self.each else {})

    def elsewhere(self, prevalence: float) -> str:
        """Returns a sentence with accuracy and precision at another prevalence, for two classes.

        Accuracy, precision and F1 depend on the prevalence in the images. The sentence states this
        prevalence. It also gives the accuracy and precision that follow from sensitivity and
        specificity at the given prevalence, if they are defined.

        Args:
            prevalence: proportion of positives, in (0, 1).
        """
        here = (self.confusion.tp + self.confusion.fn) / self.n
        said = f"the figures above are for a prevalence of {here:.3g}"
        found, spared = self.sensitivity.value, self.specificity.value
        if found is None or spared is None:
            return said
        true, false = prevalence * found, (1 - prevalence) * (1 - spared)
        precision = _ratio(true, true + false)
        said += f"; at {prevalence:.3g}, accuracy is {true + (1 - prevalence) * spared:.4f}"
        return said if precision is None else f"{said} and precision {precision:.4f}"

    def _repr_html_(self) -> str:
        """Returns the metrics with intervals as an HTML table, for notebooks."""
        rows = "".join(
            f"<tr><th>{name}</th><td>{value}</td></tr>"
            for name, value in vars(self).items()
            if isinstance(value, Estimate)
        )
        about = f"{self.n:,} images of {self.patients:,} patients, with 95 % intervals"
        return f"<table><caption>{about}</caption>{rows}</table>"

    def report(self, classes: Sequence[str]) -> str:
        """Returns the metrics with intervals and a classification report per class, as text.

        Args:
            classes: names of the classes, in the order of their labels.
        """
        lines = [
            f"{name:<12} {value}"
            for name, value in vars(self).items()
            if isinstance(value, Estimate)
        ]
        lines[1] += "   (recall)"
        if self.each:
            lines.append(
                "except accuracy, brier and ece: means over classes, each against the rest"
            )
        width = max(map(len, classes))
        areas = [f"  {one.auc}" for one in self.each] or [""] * len(classes)
        last = "  AUC" if self.each else ""
        lines += ["", f"{'':<{width}}  precision  recall      f1  images{last}"]
        counts = np.array(self.confusion.counts)
        for name, right, said, true, area in zip(
            classes, counts.diagonal(), counts.sum(0), counts.sum(1), areas, strict=True
        ):
            parts = _ratio(right, said), _ratio(right, true), _ratio(2 * right, said + true)
            shown = ["  --  " if p is None else f"{p:.4f}" for p in parts]
            lines.append(
                f"{name:<{width}}     {shown[0]}  {shown[1]}  {shown[2]}  {true:>6,}{area}"
            )
        images = f"{self.n:,} images of {self.patients:,} patients"
        if self.threshold is None:
            columns = [max(len(name), 6) for name in classes]
            named = "  ".join(f"{n:>{w}}" for n, w in zip(classes, columns, strict=True))
            lines += ["", f"{'truth':<{width}}  called {named}"]
            for name, row in zip(classes, counts.tolist(), strict=True):
                shown = [f"{n:>{w},}" for n, w in zip(row, columns, strict=True)]
                lines.append(f"{name:<{width}}         {'  '.join(shown)}")
            lines += ["", f"predicted: the most probable class; {images}"]
        else:
            c = self.confusion
            lines += [
                "",
                f"positive from probability {self.threshold:.3f} on: {c.tp:,} true and"
                f" {c.fp:,} false positives,",
                f"  {c.tn:,} true and {c.fn:,} false negatives; {images}",
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
    """Evaluates logits against labels.

    All intervals take into account that images of the same patient are correlated. Accuracy,
    sensitivity, specificity and precision have the interval of `clustered_proportion`. F1, AUC,
    Brier score, calibration error and all averages over classes have the percentile interval of a
    bootstrap over patients. The interval of the calibration error is corrected for the bootstrap's
    bias: each draw adds noise, which increases a mean of absolute values. If all draws give the
    same value, for example with a single patient or a perfect ranking, the bootstrap does not
    estimate the error, and there is no interval.

    Args:
        logits: float [n] for two classes, or [n, K] for K classes.
        labels: int [n], 0 or 1, or 0 to K - 1.
        patients: n patient IDs.
        threshold: with one logit, an image is positive if its probability is at least this
            threshold. With K logits, the class of the highest logit is predicted.
        replicates: number of bootstrap draws; 0 leaves out the bootstrap's intervals.
        seed: random seed of the bootstrap.

    Raises:
        ValueError: logits, labels and patients differ in length, or are empty.
    """
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(labels)
    _expect_as_many(logits=logits, labels=labels, patients=patients)
    bootstrap = patients, replicates, seed
    if logits.ndim == 1:
        probability = sigmoid(logits)
        one, _ = _against_rest(
            logits, probability, probability >= threshold, labels == 1, bootstrap
        )
        return replace(one, threshold=threshold)

    classes = range(logits.shape[1])
    scores, probabilities = against_rest(logits), softmax(logits)
    called = logits.argmax(1)
    each, drawn = [], []
    for k in classes:
        one, draws = _against_rest(
            scores[:, k], probabilities[:, k], called == k, labels == k, bootstrap
        )
        each.append(one)
        drawn.append(draws)

    def summed(name: str, times: float = 1.0) -> Estimate:
        """Returns a metric summed over the classes; undefined if it is undefined for a class."""
        values = [getattr(one, name).value for one in each]
        value = None if None in values else times * sum(values)
        return _bootstrapped(value, times * np.sum([draws[name] for draws in drawn], axis=0))

    # The highest probability is the confidence in the decision, which calibration is about.
    right = called == labels
    confidence, _ = _against_rest(
        probabilities.max(1), probabilities.max(1), np.ones(len(labels), bool), right, bootstrap
    )
    return Evaluation(
        accuracy=clustered_proportion(right, np.asarray(patients)),
        **{name: summed(name, 1 / len(classes)) for name in _MACRO},
        brier=summed("brier"),
        ece=confidence.ece,
        confusion=Confusion(
            tuple(
                tuple(int(((labels == row) & (called == column)).sum()) for column in classes)
                for row in classes
            )
        ),
        threshold=None,
        n=len(labels),
        patients=each[0].patients,
        each=tuple(each),
    )


def _against_rest(
    scores: np.ndarray,
    probability: np.ndarray,
    decided: np.ndarray,
    truth: np.ndarray,
    bootstrap: tuple[Sequence[str], int, int],
) -> tuple[Evaluation, dict[str, np.ndarray]]:
    """Evaluates one class against the rest.

    Args:
        scores: float64 [n], the scores for the ROC curve.
        probability: float64 [n], the probability of the class.
        decided: bool [n], whether the class is predicted for an image.
        truth: bool [n], whether the class is the true one.
        bootstrap: patients, replicates and seed.

    Returns:
        The evaluation, without a threshold, and the bootstrap draws [replicates] of each metric,
        NaN where a metric is undefined for a draw.
    """
    patients, replicates, seed = bootstrap
    c = Confusion(
        (
            (int((~truth & ~decided).sum()), int((~truth & decided).sum())),
            (int((truth & ~decided).sum()), int((truth & decided).sum())),
        )
    )
    whom, patient = np.unique(np.asarray(patients), return_inverse=True)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in (*_MACRO, "brier", "ece")}
    # [n, bins]: probability minus truth of each image, in the column of its bin
    excess = np.zeros((len(truth), _BINS))
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    excess[np.arange(len(truth)), bins] = probability - truth
    for weights in patient_bootstrap(patients, replicates, seed):
        images = weights.sum(1)
        drawn["auc"].append(_weighted_auc(scores, truth, weights))
        drawn["brier"].append(weights @ (probability - truth) ** 2 / images)
        drawn["ece"].append(np.abs(weights @ excess).sum(1) / images)
        hits, said, true = weights @ (truth & decided), weights @ decided, weights @ truth
        drawn["f1"].append(_divide(2 * hits, said + true))
        drawn["sensitivity"].append(_divide(hits, true))
        drawn["specificity"].append(_divide(images - said - true + hits, images - true))
        drawn["precision"].append(_divide(hits, said))

    draws = {name: np.concatenate([np.empty(0), *some]) for name, some in drawn.items()}
    ece = float(np.abs(excess.sum(0)).sum() / len(truth))
    if len(_telling(draws["ece"])):
        draws["ece"] = np.maximum(draws["ece"] + ece - np.median(draws["ece"]), 0)
    found = Evaluation(
        accuracy=clustered_proportion(decided == truth, patient),
        sensitivity=clustered_proportion(decided[truth], patient[truth]),
        specificity=clustered_proportion(~decided[~truth], patient[~truth]),
        precision=clustered_proportion(truth[decided], patient[decided]),
        f1=_bootstrapped(_ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn), draws["f1"]),
        auc=_bootstrapped(auc(scores, truth), draws["auc"]),
        brier=_bootstrapped(float(np.mean((probability - truth) ** 2)), draws["brier"]),
        ece=_bootstrapped(ece, draws["ece"]),
        confusion=c,
        threshold=None,
        n=len(truth),
        patients=len(whom),
    )
    return found, draws


def patient_bootstrap(
    patients: Sequence[str], replicates: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yields bootstrap weights float64 [draws, n]: how often each image occurs in each draw.

    A draw samples as many patients as there are, with replacement, and takes all of their images.

    Args:
        patients: n patient IDs, one for each image.
        replicates: total number of draws. They are yielded in chunks that fit into memory.
        seed: random seed of the draws.
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
    """Returns the differences of the metrics between two sets of logits for the same images.

    The metrics are those of `at_zero`; each difference is that of `others` minus that of `logits`.
    The intervals are percentiles of 2000 bootstrap draws of patients, the same draws for both sets:
    variation that both have in common cancels. If all draws give the same value, there is no
    interval, as in `evaluate`.

    Args:
        logits: float [n], or [n, K] for K classes.
        others: the other logits, of the same shape.
        labels: int [n], 0 or 1, or 0 to K - 1.
        patients: n patient IDs.

    Returns:
        The difference by the name of the metric, for each name in `AT_ZERO`.

    Raises:
        ValueError: the arguments differ in length, or are empty.
    """
    _expect_as_many(logits=logits, others=others, labels=labels, patients=patients)

    def gain(weights: np.ndarray) -> np.ndarray:
        first, second = (_weighted_at_zero(each, labels, weights) for each in (logits, others))
        return second - first

    values = gain(np.ones((1, len(labels))))[:, 0].tolist()
    drawn = np.hstack([gain(weights) for weights in patient_bootstrap(patients, _REPLICATES)])
    return {
        name: _bootstrapped(None if math.isnan(value) else value, draws)
        for name, value, draws in zip(AT_ZERO, values, drawn, strict=True)
    }


def _expect_as_many(**arrays: Sequence[Any] | np.ndarray) -> None:
    sizes = [len(array) for array in arrays.values()]
    if min(sizes) < max(sizes) or not min(sizes):
        names, counts = (", ".join(map(str, some)) for some in (arrays, sizes))
        raise ValueError(f"{names} must have the same length, at least 1; got {counts}")


def _bootstrapped(value: float | None, draws: np.ndarray) -> Estimate:
    """Returns a metric with the percentile interval of its draws, if they differ."""
    draws = _telling(draws)
    if value is None or not len(draws):
        return Estimate(value, None)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(value, (float(low), float(high)))


def _telling(draws: np.ndarray) -> np.ndarray:
    """Returns the finite draws; none of them if they are all equal."""
    draws = draws[np.isfinite(draws)]
    return draws if len(np.unique(draws)) > 1 else draws[:0]


def _weighted_at_zero(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [metrics, draws], the metrics of `AT_ZERO` for each row of weights [draws, n].

    A metric is NaN where it is undefined.
    """
    scores, decided, truth = _by_class(np.asarray(logits), np.asarray(labels))
    areas, found, spared = [], [], []
    for score, said, true in zip(scores.T, decided.T, truth.T, strict=True):
        areas.append(_weighted_auc(score, true, weights))
        found.append(_divide(weights @ (said & true), weights @ true))
        spared.append(_divide(weights @ ~(said | true), weights @ ~true))
    accuracy = weights @ (decided == truth).all(1) / weights.sum(1)
    return np.stack([np.mean(areas, 0), accuracy, np.mean(found, 0), np.mean(spared, 0)])


def _by_class(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scores, decisions and truth of each class against the rest, [n, classes].

    With one logit [n] there is one column, for the positive class, predicted at logits >= 0.
    """
    if logits.ndim == 1:
        return logits[:, None], logits[:, None] >= 0, labels[:, None] == 1
    classes = np.arange(logits.shape[1])
    return against_rest(logits), logits.argmax(1)[:, None] == classes, labels[:, None] == classes


def at_zero(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns AUC, accuracy, sensitivity and specificity at the logit threshold 0.

    Args:
        logits: float [n], positive if at least 0. Or [n, K] for K classes, where the class of the
            highest logit is predicted; then all metrics except accuracy are means over the classes,
            each against the rest.
        labels: int [n], with at least one image of every class.
    """
    values = _weighted_at_zero(logits, labels, np.ones((1, len(labels))))[:, 0]
    assert not np.isnan(values).any(), "training_data() ensures held-out images of all classes"
    return dict(zip(AT_ZERO, values.tolist(), strict=True))


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the area under the ROC curve: P(positive scores higher) + P(tie) / 2.

    Args:
        scores: float [n]; or logits [n, K] for K classes, each compared with the rest.
        labels: int [n], 0 or 1, or 0 to K - 1.

    Returns:
        A number in [0, 1]; for K classes the mean over the classes; None if a class is missing.
    """
    columns, _, truth = _by_class(np.asarray(scores), np.asarray(labels))
    one = np.ones((1, len(columns)))
    value = float(
        np.mean([_weighted_auc(c, t, one)[0] for c, t in zip(columns.T, truth.T, strict=True)])
    )
    return None if math.isnan(value) else value


def clustered_proportion(hits: np.ndarray, patients: np.ndarray) -> Estimate:
    """Returns the proportion of hits, with a 95 % interval for images clustered by patient.

    It is Wilson's interval for the effective number of images, n divided by the design effect
    (Kish, Survey Sampling, 1965). The design effect is the variance of the proportion when patients
    are sampled, divided by the variance when images are sampled; it is at least 1 (see Dean and
    Pagano, J. Surv. Stat. Methodol. 3, 2015).

    The estimate of the design effect rests on the m patients who have the rarer outcome. With few
    or none of them, it would be unreliable and the interval too short. It is therefore averaged
    with a prior value, with weights m and 1. The prior is n / (number of patients): the design
    effect if all images of a patient have the same outcome and all patients have equally many.

    Args:
        hits: bool [n].
        patients: [n], the patient ID of each image.
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
        hits: number of hits.
        n: number of trials; if it is 0, the result is undefined.
        effective: effective number of independent trials, for the interval; n if None.
    """
    if n == 0:
        return Estimate(None, None)
    p, m, z2 = hits / n, n if effective is None else effective, _Z95**2
    middle = (p + z2 / (2 * m)) / (1 + z2 / m)
    half = _Z95 / (1 + z2 / m) * math.sqrt(p * (1 - p) / m + z2 / (4 * m * m))
    return Estimate(p, (max(0.0, middle - half), min(1.0, middle + half)))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities float64 [n] of logits [n], without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities float64 [n, K] of logits [n, K], without overflow."""
    return np.exp(log_softmax(logits))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the log-probabilities float64 [n, K] of logits [n, K], without overflow."""
    wide = np.asarray(logits, np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)


def against_rest(logits: np.ndarray) -> np.ndarray:
    """Returns the log-odds float64 [n, K] of each class against the rest, from logits [n, K]."""
    wide = np.asarray(logits, np.float64)
    own = np.eye(wide.shape[1], dtype=bool)
    rest = np.where(own, -np.inf, wide[:, None])  # [n, class, the others]
    return wide - np.logaddexp.reduce(rest, axis=2)


def _weighted_auc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [draws], the AUC of n scores for each row of weights [draws, n]."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))  # starts of tied scores
    positive = np.add.reduceat((weights * truth)[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * ~truth)[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(1)
    return _divide(wins, positive.sum(1) * negative.sum(1))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
