"""The operating point against a search over every threshold, and calibration against the truth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cnnjax.config import OperatingConfig
from cnnjax.errors import InputError
from cnnjax.metrics import sigmoid
from cnnjax.operating import (
    OperatingPoint,
    at_views,
    evaluate_at,
    fit_calibration,
    fit_operating_point,
    least_cost_threshold,
    points_from_json,
    points_to_json,
    reliability,
    sensitive_threshold,
)


def drawn(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return np.round(rng.normal(size=n) + labels, 1), labels  # some are equal


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("missed", [0.3, 1.0, 4.0])
def test_no_threshold_costs_less(seed: int, missed: float) -> None:
    logits, labels = drawn(seed)

    def cost(threshold: float) -> float:
        called = logits >= threshold
        return float((called & (labels == 0)).sum() + missed * (~called & (labels == 1)).sum())

    tried = [-np.inf, *(np.unique(logits) - 0.05), np.inf]
    found = least_cost_threshold(logits, labels, 1.0, missed)
    assert cost(found) == pytest.approx(min(map(cost, tried)))


def test_all_of_one_class() -> None:
    assert -np.inf < least_cost_threshold(np.array([1.0, 2.0]), np.array([1, 1])) < 1
    assert 2 < least_cost_threshold(np.array([1.0, 2.0]), np.array([0, 0])) < np.inf


@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_wanted_sensitivity_is_reached_and_no_higher_threshold_reaches_it(
    seed: int, wanted: float
) -> None:
    logits, labels = drawn(seed)
    found = sensitive_threshold(logits, labels, wanted)
    positives = logits[labels == 1]
    assert np.mean(positives >= found) >= wanted
    lowest = positives[positives >= found].min()
    assert np.mean(positives > lowest) < wanted
    assert not ((logits >= found) & (logits < lowest)).any()


def test_calibration_finds_the_line_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(2, 3, 200_000)
    labels = (rng.random(len(logits)) < sigmoid(0.4 * logits - 1.5)).astype(int)
    slope, bias = fit_calibration(logits, labels)
    assert slope == pytest.approx(0.4, abs=0.01)
    assert bias == pytest.approx(-1.5, abs=0.03)


def test_calibration_stays_finite_where_the_classes_lie_apart() -> None:
    logits, labels = np.array([-5.0, -4, -3, 3, 4, 5]), np.array([0, 0, 0, 1, 1, 1])
    slope, bias = fit_calibration(logits, labels)
    assert 0 < slope < 10
    assert bias == pytest.approx(0, abs=1e-6)


def test_prevalence_moves_probabilities_as_bayes_has_it() -> None:
    """Draw at one prevalence, fit, and ask for another: there the probabilities hold."""
    rng = np.random.default_rng(0)

    def sample(prevalence: float) -> tuple[np.ndarray, np.ndarray]:
        labels = (rng.random(200_000) < prevalence).astype(int)
        return rng.normal(2.0 * labels, 1.0), labels

    point = fit_operating_point(*sample(0.7), OperatingConfig())
    logits, labels = sample(0.1)
    asked = point.probabilities(logits, prevalence=0.1)
    assert asked.mean() == pytest.approx(0.1, abs=0.005)
    for one in reliability(asked, labels, bins=5):
        assert one.predicted == pytest.approx(one.observed, abs=0.03)
    # The decision is the same place on the logit, whatever the prevalence.
    by_probability = asked >= point.probability_threshold(0.1)
    np.testing.assert_array_equal(by_probability, logits >= point.threshold)


def test_criteria_order_their_thresholds() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(4000) < 0.7).astype(int)
    logits = rng.normal(2.0 * labels, 1.0)

    def threshold(**asked: object) -> float:
        return fit_operating_point(logits, labels, OperatingConfig(**asked)).threshold  # type: ignore[arg-type]

    assert threshold(criterion="youden") == pytest.approx(1.0, abs=0.15)  # where densities cross
    assert threshold(criterion="sensitivity", sensitivity=0.99) < threshold(criterion="youden")
    cheap, dear = (threshold(criterion="cost", cost=cost) for cost in (0.1, 10.0))
    assert dear < cheap
    rare = threshold(criterion="cost", cost=1.0, prevalence=0.05)
    assert rare > threshold(criterion="cost", cost=1.0)


def test_reliability_counts_every_image_once() -> None:
    probabilities = np.array([0.0, 0.05, 0.5, 0.99, 1.0])
    bins = reliability(probabilities, np.array([0, 1, 1, 1, 1]), bins=10)
    assert [one.images for one in bins] == [2, 1, 2]
    assert bins[0].observed == 0.5
    assert bins[2].predicted == pytest.approx(0.995)


def test_survives_json() -> None:
    point = fit_operating_point(*drawn(3), OperatingConfig())
    assert OperatingPoint(**json.loads(json.dumps(point.to_json()))) == point


def test_a_network_that_ranks_the_wrong_way_round_is_not_turned_over() -> None:
    """The threshold lies on the logit, and a probability must rise with it."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4 // 3
    logits = rng.normal(size=200) - 3 * labels
    slope, bias = fit_calibration(logits, labels)
    assert slope > 0
    np.testing.assert_allclose(1 / (1 + np.exp(-(slope * logits + bias))), 0.25, atol=0.01)


def test_a_point_turns_logits_into_probabilities_and_margins() -> None:
    point = OperatingPoint(slope=0.5, bias=-1.0, prevalence=0.25, threshold=3.0)
    np.testing.assert_allclose(point.calibrated(np.array([4.0, 0.0])), [1, -1])
    # At a prevalence of 0.5 the odds are three times those at 0.25.
    np.testing.assert_allclose(point.calibrated(np.array([4.0]), 0.5), 1 + np.log(3))
    expected = 1 / (1 + np.exp(-1.0))
    assert point.probabilities(np.array([4.0]))[0] == pytest.approx(expected)
    assert point.probability_threshold() == pytest.approx(1 / (1 + np.exp(-0.5)))
    np.testing.assert_allclose(point.margins(np.array([5.0, 3.0, 1.0])), [1, 0, -1])
    plain = OperatingPoint()
    assert plain.probability_threshold() == 0.5
    np.testing.assert_array_equal(plain.calibrated(np.array([2.0]), 0.5), [2])


def test_a_point_is_judged_by_its_decisions_and_probabilities() -> None:
    point = OperatingPoint(slope=0.5, bias=-1.0, threshold=3.0)
    logits, labels = np.array([4.0, 3.0, 2.0, 5.0]), np.array([0, 1, 1, 1])
    found = evaluate_at(point, logits, labels, list("abcd"))
    assert found.confusion.counts == ((0, 1), (1, 2))  # the logit 3 is at the threshold
    assert found.brier.value == pytest.approx(np.mean((point.probabilities(logits) - labels) ** 2))


def test_points_are_kept_for_each_number_of_views() -> None:
    points = {1: OperatingPoint(threshold=1.0), 4: OperatingPoint(bias=2.0, criterion="mine")}
    assert points_from_json(json.loads(json.dumps(points_to_json(points)))) == points
    assert at_views(points, 4, "run") is points[4]
    with pytest.raises(InputError, match=r"^--views 2: run has an operating .* 1 or 4 views of an"):
        at_views(points, 2, "run")
    with pytest.raises(InputError, match=r"point for 1 view of an image$"):
        at_views({1: points[1]}, 2, "run")


def test_criteria_are_told() -> None:
    logits, labels = np.array([-1.0, 0, 1, 2]), np.array([0, 1, 0, 1])

    def criterion(**asked: object) -> str:
        return fit_operating_point(logits, labels, OperatingConfig(**asked)).criterion  # type: ignore[arg-type]

    assert criterion(criterion="sensitivity", sensitivity=0.975) == "sensitivity 0.975"
    cost = "least cost, a false negative costs 3 false positives, prevalence"
    assert criterion(criterion="cost", cost=3.0) == f"{cost} 0.5"
    assert criterion(criterion="cost", cost=3.0, prevalence=0.0625) == f"{cost} 0.0625"
    told = criterion(criterion="youden")
    assert told == "highest sensitivity + specificity (Youden)"


@pytest.mark.parametrize("seed", range(5))
def test_the_least_cost_is_that_of_images_at_the_prevalence_asked(seed: int) -> None:
    logits, labels = drawn(seed, 60)
    config = OperatingConfig(criterion="cost", cost=4.0, prevalence=0.2)
    found = fit_operating_point(logits, labels, config).threshold

    def cost(threshold: float) -> float:
        called = logits >= threshold
        missed = 0.2 * np.mean(~called[labels == 1])
        return float(4 * missed + 0.8 * np.mean(called[labels == 0]))

    tried = [-np.inf, *(np.unique(logits) - 0.05), np.inf]
    assert cost(found) == pytest.approx(min(map(cost, tried)))


def test_a_weight_is_so_many_images() -> None:
    rng = np.random.default_rng(0)
    logits, labels = drawn(11, 50)
    times = rng.integers(1, 4, 50)
    often = np.repeat(logits, times), np.repeat(labels, times)
    weights = 7.0 * times
    for missed in (0.3, 1.0, 4.0):
        found = least_cost_threshold(logits, labels, 1.0, missed, weights)
        assert found == least_cost_threshold(*often, 1.0, missed)
    for wanted in (0.5, 0.9, 1.0):
        found = sensitive_threshold(logits, labels, wanted, weights)
        assert found == sensitive_threshold(*often, wanted)
    point = fit_operating_point(logits, labels, OperatingConfig(criterion="youden"), weights)
    assert point.prevalence == pytest.approx(often[1].mean())
    assert point.threshold == fit_operating_point(*often, OperatingConfig("youden")).threshold


def test_thresholds_lie_midway() -> None:
    logits, labels = np.array([0.0, 1.0, 4.0, 8.0]), np.array([0, 0, 1, 1])
    assert least_cost_threshold(logits, labels) == 2.5
    assert sensitive_threshold(logits, labels, 1.0) == 2.5
    assert sensitive_threshold(logits, labels, 0.5) == 6
    assert sensitive_threshold(logits[2:], labels[2:], 1.0) == 4  # nothing lies below
    # Of equally good places the middle one: any of these three has one error.
    assert least_cost_threshold(np.array([0.0, 2.0]), np.array([1, 0])) in (-1, 3)
    middle = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 1, 0, 1])
    assert least_cost_threshold(*middle) == 2.5
    all_ill, none_ill = np.array([1, 1]), np.array([0, 0])
    assert least_cost_threshold(np.array([3.0, 5.0]), all_ill) == 2  # one below them all
    assert least_cost_threshold(np.array([3.0, 5.0]), none_ill) == 6


def test_calibration_has_platts_targets() -> None:
    """A class of n images is expected to be one of n + 2 that are half right."""
    slope, bias = fit_calibration(np.array([1.0, 1, 1, 1]), np.array([1, 0, 0, 0]))
    assert sigmoid(slope * np.array([1.0]) + bias)[0] == pytest.approx(
        (4 * 0 + 2 / 3 + 3 / 5) / 4, abs=1e-3
    )
    _, flat = fit_calibration(np.array([3.0, 2, 1, 0]), np.array([0, 0, 0, 1]))
    assert flat == pytest.approx(np.log(2 / 4))
    two = fit_calibration(np.array([0.0, 1.0]), np.array([0, 1]))
    # Through both targets, 1/3 and 2/3.
    np.testing.assert_allclose(two, [2 * np.log(2), -np.log(2)], rtol=1e-6)


def test_a_diagram_has_fifteen_bins_unless_told() -> None:
    probabilities = (np.arange(15) + 0.5) / 15
    found = reliability(probabilities, np.arange(15) % 2)
    assert [one.images for one in found] == [1] * 15
    np.testing.assert_allclose([one.predicted for one in found], probabilities)
    assert [one.observed for one in found] == [i % 2 for i in range(15)]
