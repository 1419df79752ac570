"""Nested dicts of arrays: what parameters, statistics and gradients are kept in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cnnjax.scratch.shapes import show

Tree = dict[str, Any]
"""A dict whose values are arrays or again such dicts."""


def map_tree(f: Callable[..., np.ndarray], tree: Tree, *others: Tree, at: str = "") -> Tree:
    """Applies `f` to the leaves that stand at the same place of each tree, as `jax.tree.map` does.

    Args:
        f: takes one leaf of each tree.
        tree: the first one; the others must have its names and its leaves' shapes.
        others: any number of further ones.
        at: where in a larger tree these stand, for the message.

    Returns:
        A tree of what `f` returned.

    Raises:
        ValueError: the trees differ in names or shapes. The message holds both.
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
