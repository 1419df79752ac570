"""Nested dicts of arrays, for parameters, statistics and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cnnjax.scratch.shapes import show

Tree = dict[str, Any]
"""A dict whose values are arrays or other such dicts."""


def map_tree(f: Callable[..., np.ndarray], tree: Tree, *others: Tree, at: str = "") -> Tree:
    """Applies a function to the corresponding leaves of trees, like `jax.tree.map`.

    Args:
        f: a function of one leaf of each tree.
        tree: the first tree.
        others: other trees, with the same names and shapes.
        at: path of these trees in a larger tree, for the message.

    Returns:
        A tree of the results of `f`.

    Raises:
        ValueError: the trees differ in names or shapes. The message has both of them.
    """
    for other in others:
        if other.keys() != tree.keys():
            raise ValueError(f"expected the names {sorted(tree)} at /{at}, got {sorted(other)}")
    mapped: Tree = {}
    for name, value in tree.items():
        values = [value, *(other[name] for other in others)]
        if all(isinstance(v, dict) for v in values):
            mapped[name] = map_tree(f, *values, at=f"{at}{name}/")
            continue
        for v in values:
            if np.shape(v) != np.shape(value):
                expected, found = show(np.shape(value)), show(np.shape(v))
                raise ValueError(f"expected /{at}{name} of shape {expected}, got {found}")
        mapped[name] = f(*values)
    return mapped
