"""Figures against scikit-learn and SciPy, and intervals that cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as reference

from cnnjax import metrics
from cnnjax.operating import reliability


def drawn(seed: int, n: int = 300, ties: bool = False) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    logits = rng.normal(size=n) + 1.5 * labels
    if ties:
        logits = np.round(logits)
    return logits, labels, [f"p{i // 3}" for i in range(n)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_values_against_scikit_learn(ties: bool, threshold: float) -> None:
    logits, labels, patients = drawn(0, ties=ties)
    found = metrics.evaluate(logits, labels, patients, threshold=threshold, replicates=50)
    probability = 1 / (1 + np.exp(-logits))
    decided = probability >= threshold
    tn, fp, fn, tp = reference.confusion_matrix(labels, decided).ravel()
    assert found.confusion == metrics.Confusion(((tn, fp), (fn, tp)))
    for ours, theirs in (
        (found.accuracy, reference.accuracy_score(labels, decided)),
        (found.sensitivity, reference.recall_score(labels, decided)),
        (found.specificity, reference.recall_score(labels, decided, pos_label=0)),
        (found.precision, reference.precision_score(labels, decided)),
        (found.f1, reference.f1_score(labels, decided)),
        (found.auc, reference.roc_auc_score(labels, logits)),
        (found.brier, reference.brier_score_loss(labels, probability)),
    ):
        assert ours.value == pytest.approx(theirs, abs=1e-12)
        assert ours.ci95 is not None
        assert ours.ci95[0] <= theirs <= ours.ci95[1]
    assert (found.n, found.patients) == (300, 100)
    if threshold == 0.5:
        undecided = {name: getattr(found, name).value for name in metrics.AT_ZERO}
        assert metrics.at_zero(logits, labels) == pytest.approx(undecided)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 7), (950, 1000)])
def test_wilson_against_scipy(hits: int, n: int) -> None:
    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert metrics.proportion(hits, n).ci95 == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("metric", ["auc", "brier", "accuracy", "sensitivity", "specificity"])
def test_intervals_count_patients_not_images(metric: str) -> None:
    """Each image five times over, under one patient, tells no more than the image once."""
    logits, labels, _ = drawn(1, 100)
    names = [str(i) for i in range(100)]
    once = metrics.evaluate(logits, labels, names)
    again = metrics.evaluate(np.repeat(logits, 5), np.repeat(labels, 5), np.repeat(names, 5))
    independent = metrics.evaluate(
        np.repeat(logits, 5), np.repeat(labels, 5), [str(i) for i in range(500)]
    )

    def width(found: metrics.Evaluation) -> float:
        low, high = getattr(found, metric).ci95
        return high - low

    assert width(again) == pytest.approx(width(once), rel=0.1)
    assert width(independent) < 0.6 * width(once)


def test_the_interval_of_a_share_covers_it() -> None:
    """Of images like those of the same patient; one of independent images is too short."""
    rng = np.random.default_rng(0)
    covered = {"clustered": 0, "proportion": 0}
    for _ in range(1000):
        sizes = 1 + rng.poisson(2, 200)
        patients = np.repeat(np.arange(len(sizes)), sizes)
        rates = rng.beta(9 / 2, 1 / 2, len(sizes))  # mean 0.9
        hits = rng.random(len(patients)) < rates[patients]
        for name, found in (
            ("clustered", metrics.clustered_proportion(hits, patients)),
            ("proportion", metrics.proportion(int(hits.sum()), len(hits))),
        ):
            assert found.ci95 is not None
            covered[name] += found.ci95[0] <= 0.9 <= found.ci95[1]
    assert 925 <= covered["clustered"] <= 975
    assert covered["proportion"] < 920


@pytest.mark.parametrize("hit", [False, True])
def test_a_share_of_all_or_none_is_of_patients(hit: bool) -> None:
    found = metrics.clustered_proportion(np.full(12, hit), np.repeat(["a", "b", "c", "d"], 3))
    assert found == metrics.proportion(4 * hit, 4)


def test_few_errors_do_not_make_the_interval_short() -> None:
    """By the design effect alone, the first would raise the lower end from 0.981 to 0.994."""
    patients = np.repeat(np.arange(200), 5)
    lows = []
    for errors in (0, 1, 2, 5, 20):
        hits = np.ones(1000, bool)
        hits[: 5 * errors : 5] = False  # each of another patient
        found = metrics.clustered_proportion(hits, patients).ci95
        assert found is not None
        lows.append(found[0])
    assert max(lows) - lows[0] < 0.007
    assert lows[-1] == pytest.approx(metrics.proportion(980, 1000, 900).ci95[0], abs=1e-3)  # type: ignore[index]


def test_differences_are_judged_in_pairs() -> None:
    logits, labels, patients = drawn(5)
    others = logits + np.random.default_rng(6).normal(scale=0.1, size=len(logits))
    found = metrics.paired_differences(logits, others, labels, patients)
    first, second = metrics.at_zero(logits, labels), metrics.at_zero(others, labels)
    alone = metrics.evaluate(logits, labels, patients).to_json()
    assert found.keys() == first.keys()
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(second[name] - first[name], abs=1e-12)
        assert estimate.ci95 is not None
        low, high = estimate.ci95
        assert low <= estimate.value <= high
        own = alone[name]["ci95"]
        assert high - low < 0.8 * (own[1] - own[0])
    same = metrics.paired_differences(logits, logits, labels, patients)
    assert set(same.values()) == {metrics.Estimate(0.0, None)}
    better = metrics.paired_differences(logits, logits + 3 * labels, labels, patients)
    assert better["auc"].ci95 is not None
    assert better["auc"].ci95[0] > 0


def test_differences_of_a_class_that_is_missing_are_undefined() -> None:
    found = metrics.paired_differences(np.zeros(3), np.ones(3), np.ones(3, int), ["a", "b", "c"])
    assert found["auc"] == found["specificity"] == metrics.Estimate(None, None)
    assert found["sensitivity"] == metrics.Estimate(0.0, None)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    given = drawn(2)
    assert metrics.evaluate(*given, seed=1) == metrics.evaluate(*given, seed=1)
    assert metrics.evaluate(*given, seed=1) != metrics.evaluate(*given, seed=2)


def test_undefined_is_none_and_null() -> None:
    found = metrics.evaluate(np.array([-1.0, -2.0]), np.array([0, 0]), ["a", "b"])
    assert found.auc == found.sensitivity == found.precision == metrics.Estimate(None, None)
    assert found.to_json()["auc"] == {"value": None, "ci95": None}
    assert found.specificity.value == 1
    assert "undefined" in found.report(("NORMAL", "PNEUMONIA"))


@pytest.mark.parametrize("patients", [["a"] * 6, list("abcdef")], ids=["one patient", "perfect"])
def test_draws_that_all_agree_tell_no_interval(patients: list[str]) -> None:
    perfect = len(set(patients)) > 1
    logits = np.array([-2.0, -1, -3, 1, 2, 3 if perfect else -4])
    found = metrics.evaluate(logits, np.array([0, 0, 0, 1, 1, 1]), patients)
    assert found.auc.value is not None
    assert found.auc.ci95 is None
    assert found.f1.ci95 is None
    assert (found.brier.ci95 is None) is not perfect
    assert f"auc          {found.auc.value:.4f}  [no interval]" in found.report(("a", "b"))


def test_json_has_the_documented_form() -> None:
    logits, labels, patients = drawn(3)
    out = metrics.evaluate(logits, labels, patients).to_json()
    counts = reference.confusion_matrix(labels, logits >= 0).ravel().tolist()
    assert out["confusion"] == dict(zip(("tn", "fp", "fn", "tp"), counts, strict=True))
    for name in ("accuracy", "sensitivity", "specificity", "precision", "f1", "auc", "brier"):
        low, high = out[name]["ci95"]
        assert 0 <= low <= out[name]["value"] <= high <= 1
    assert out["threshold"] == 0.5
    assert out["n"] == 300


def test_report_agrees_with_the_classification_report() -> None:
    logits, labels, patients = drawn(4)
    text = metrics.evaluate(logits, labels, patients).report(("NORMAL", "PNEUMONIA"))
    theirs = reference.classification_report(
        labels, logits >= 0, target_names=("NORMAL", "PNEUMONIA"), output_dict=True
    )
    for name in ("NORMAL", "PNEUMONIA"):
        row = next(line for line in text.splitlines() if line.startswith(name)).split()
        expected = [theirs[name][k] for k in ("precision", "recall", "f1-score", "support")]
        assert [float(x) for x in row[1:]] == pytest.approx(expected, abs=5e-5)


def test_sigmoid_of_large_logits() -> None:
    np.testing.assert_array_equal(metrics.sigmoid(np.array([-1e4, 0, 1e4])), [0, 0.5, 1])


@pytest.mark.parametrize("n", [0, 2])
def test_lengths_must_agree(n: int) -> None:
    with pytest.raises(ValueError, match="logits, labels, patients must have the same length"):
        metrics.evaluate(np.zeros(n), np.zeros(3 if n else 0), ["a"] * n)
    for lengths in ((2, 3, 3, 3), (3, 2, 3, 3), (3, 3, 2, 3), (3, 3, 3, 2)):
        first, second, labels, patients = map(np.zeros, lengths)
        with pytest.raises(ValueError, match="must have the same length"):
            metrics.paired_differences(first, second, labels, patients)


def test_auc_of_one_class() -> None:
    assert metrics.auc(np.array([1.0, 2.0]), np.array([1, 1])) is None
    assert not math.isnan(metrics.auc(np.array([1.0, 2.0]), np.array([0, 1])) or 0)


def test_calibration_error_is_that_of_the_reliability_diagram() -> None:
    logits, labels, patients = drawn(2)
    found = metrics.evaluate(logits, labels, patients)
    bins = reliability(metrics.sigmoid(logits), labels)
    expected = sum(abs(b.predicted - b.observed) * b.images for b in bins) / len(labels)
    assert found.ece.value == pytest.approx(expected)
    assert found.ece.ci95 is not None
    assert found.ece.ci95[0] <= found.ece.value <= found.ece.ci95[1]
    assert found.ece.ci95[0] < found.ece.ci95[1]


def test_what_another_share_of_positives_would_give() -> None:
    logits = np.array([1.0, -1, 1, 1, -1, -1, -1, -1, 1, -1])
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])  # sensitivity 3/4, specificity 5/6
    said = metrics.evaluate(logits, labels, [str(i) for i in range(10)]).elsewhere(0.1)
    right, false = 0.1 * 3 / 4, 0.9 / 6
    assert said == (
        "the figures above are for a prevalence of 0.4; at 0.1, accuracy is"
        f" {right + 0.9 - false:.4f} and precision {right / (right + false):.4f}"
    )
    none = metrics.evaluate(-np.abs(logits), labels, [str(i) for i in range(10)]).elsewhere(0.1)
    assert none.endswith("at 0.1, accuracy is 0.9000")  # no precision: nothing is positive
    alone = metrics.evaluate(logits[:4], labels[:4], list("abcd")).elsewhere(0.1)
    assert alone == "the figures above are for a prevalence of 1"


def test_the_report_says_how_it_decided() -> None:
    logits, labels = np.array([2.0, 0.5, -1, 2]), np.array([1, 1, 0, 0])
    text = metrics.evaluate(logits, labels, list("aabc"), threshold=0.7).report(("well", "ill"))
    lines = text.splitlines()
    assert lines[1].startswith("sensitivity  0.5000")
    assert lines[1].endswith("(recall)")
    assert lines[9].split() == ["precision", "recall", "f1", "images"]
    assert text.endswith(
        "positive from probability 0.700 on: 1 true and 1 false positives,\n"
        "  1 true and 1 false negatives; 4 images of 3 patients"
    )


def test_a_bootstrap_draws_whole_patients_however_many_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patients = ["a", "b", "b", "c", "c", "c"]
    (whole,) = metrics.patient_bootstrap(patients, 50, seed=1)
    assert whole.shape == (50, 6)
    assert (whole[:, 1] == whole[:, 2]).all()
    assert (whole[:, 3] == whole[:, 5]).all()
    assert (whole[:, [0, 1, 3]].sum(1) == 3).all()
    monkeypatch.setattr(metrics, "_CHUNK", 6 * 20)
    pieces = list(metrics.patient_bootstrap(patients, 50, seed=1))
    assert [len(piece) for piece in pieces] == [20, 20, 10]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    monkeypatch.setattr(metrics, "_CHUNK", 1)
    assert len(list(metrics.patient_bootstrap(patients, 3))) == 3


def test_weighted_auc_is_that_of_images_as_often_as_they_weigh() -> None:
    logits, labels, _ = drawn(7, 60, ties=True)
    times = np.random.default_rng(0).integers(0, 4, 60)
    found = metrics._weighted_auc(logits, labels == 1, times[None].astype(float))
    expected = reference.roc_auc_score(np.repeat(labels, times), np.repeat(logits, times))
    assert found == pytest.approx([expected])


def test_the_design_effect_is_kishs_and_one_patient_more() -> None:
    """Written out patient by patient; two patients have the rarer outcome, one of them twice."""
    hits = np.array([1, 1, 0, 0, 1, 1, 1, 0, 1, 1], bool)
    patients = np.array(list("aabbccdddd"))
    n, k, people = 10, 7, 4
    residuals = [sum(hit - k / n for hit in hits[patients == one]) for one in "abcd"]
    among_patients = people / (people - 1) * sum(r**2 for r in residuals) / n**2
    ratio = max(1.0, among_patients / (k / n * (1 - k / n) / (n - 1)))
    assert ratio > 1
    effect = (n / people + 2 * ratio) / 3
    found = metrics.clustered_proportion(hits, patients)
    assert found.ci95 == pytest.approx(metrics.proportion(k, n, n / effect).ci95)


def test_the_design_effect_is_at_least_one() -> None:
    """Each patient has one hit and one miss: all have the same proportion, by chance."""
    found = metrics.clustered_proportion(np.arange(8) % 2 == 0, np.arange(8) // 2)
    assert found == metrics.proportion(4, 8, 8 / ((2 + 4 * 1) / 5))


def test_an_estimate_is_shown_with_its_interval() -> None:
    assert str(metrics.Estimate(0.5, (0.25, 0.75))) == "0.5000  [0.2500, 0.7500]"
    assert str(metrics.Estimate(0.5, None)) == "0.5000  [no interval]"
    assert str(metrics.UNDEFINED) == "undefined"
