"""Conversion of parameters and batch statistics from Flax and to Flax.

The networks of `cnnjax.scratch` use nested dicts with the same names and shapes as Flax. A
conversion therefore only copies the leaves; it renames and transposes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cnnjax.scratch.trees import Tree, map_tree


def from_flax(variables: Mapping[str, Any], dtype: DTypeLike | None = None) -> tuple[Tree, Tree]:
    """Returns copies (params, batch_stats) of the variables of a Flax network.

    Args:
        variables: {"params": ..., "batch_stats": ...}, as returned by `init`; `batch_stats` is
            optional. Leaves are any arrays that NumPy can copy, such as JAX arrays.
        dtype: dtype of the copies; by default the dtype of each leaf.

    Raises:
        ValueError: `params` is missing, or there are other collections.
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
    """Returns a copy of the variables for `apply` of a Flax network; the inverse of `from_flax`."""
    variables = {"params": map_tree(np.copy, params)}
    if batch_stats:
        variables["batch_stats"] = map_tree(np.copy, batch_stats)
    return variables
