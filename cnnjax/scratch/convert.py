"""Parameters and batch statistics to Flax and back.

The networks here keep Flax's nested dicts of the same names and shapes, so there is nothing to
rename or transpose: to convert is to copy the leaves into NumPy's arrays and back into one dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cnnjax.scratch.trees import Tree, map_tree


def from_flax(variables: Mapping[str, Any], dtype: DTypeLike | None = None) -> tuple[Tree, Tree]:
    """Returns (params, batch_stats), copied, of what a Flax network's `init` returned.

    Args:
        variables: {"params": ..., "batch_stats": ...}, the latter only where there are any. Leaves
            may be of any kind that NumPy can copy, JAX's arrays included.
        dtype: of the copies; by default each leaf keeps its own.

    Raises:
        ValueError: there are no params, or there are collections of another kind.
    """
    if "params" not in variables or not variables.keys() <= {"params", "batch_stats"}:
        raise ValueError(
            f"expected the collections ['params'] or ['batch_stats', 'params'],"
            f" got {sorted(variables)}"
        )

    def copy(leaf: Any) -> np.ndarray:
        return np.array(leaf, dtype)

    params, stats = variables["params"], variables.get("batch_stats", {})
    return map_tree(copy, params), map_tree(copy, stats)


def to_flax(params: Tree, batch_stats: Tree) -> dict[str, Tree]:
    """Returns the variables, copied, for a Flax network's `apply`: the inverse of `from_flax`."""
    variables = {"params": map_tree(np.copy, params)}
    if batch_stats:
        variables["batch_stats"] = map_tree(np.copy, batch_stats)
    return variables
