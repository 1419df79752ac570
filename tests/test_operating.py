"""The operating point against a search over every threshold."""

from __future__ import annotations

import numpy as np
import pytest

from cnnjax.operating import most_accurate_threshold


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_more_accurate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 40)
    logits = np.round(rng.normal(size=40) + labels, 1)  # some are equal
    found = most_accurate_threshold(logits, labels)

    def accuracy(threshold: float) -> float:
        return float(np.mean((logits >= threshold) == labels))

    tried = [-np.inf, *(np.unique(logits) - 0.05), np.inf]
    assert accuracy(found) == max(map(accuracy, tried))


def test_all_of_one_class() -> None:
    assert most_accurate_threshold(np.array([1.0, 2.0]), np.array([1, 1])) == -np.inf
    assert most_accurate_threshold(np.array([1.0, 2.0]), np.array([0, 0])) == np.inf
