"""The operating point: from which logit on an image counts as positive.

It is chosen on images that trained nothing, and judged on yet others.
"""

from __future__ import annotations

import numpy as np


def most_accurate_threshold(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the logit from which on to call images positive for the highest accuracy.

    Args:
        logits: float [n].
        labels: int [n], 0 or 1.

    Returns:
        Midway between two neighbouring logits; of equally good places the middle one. Infinite if
        it is best to call all images negative, or all positive.
    """
    order = np.argsort(logits, kind="stable")
    ranked, positive = np.asarray(logits, np.float64)[order], np.asarray(labels)[order] == 1
    # right[k]: how many are right if the k lowest count as negative
    right = np.append(0, np.cumsum(~positive)) + np.append(np.cumsum(positive[::-1])[::-1], 0)
    between = np.append(True, np.append(ranked[1:] > ranked[:-1], True))  # no cut between equals
    best = np.flatnonzero(between & (right == right[between].max()))
    edges = np.concatenate([[-np.inf], ranked, [np.inf]])
    k = best[len(best) // 2]
    return float((edges[k] + edges[k + 1]) / 2)
