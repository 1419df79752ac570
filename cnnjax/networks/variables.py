"""Trees of variables by the paths of their leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their path, `params/stem/kernel`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts that `flatten` made flat."""
    tree: dict[str, Any] = {}
    for name in flat:
        *where, last = name.split("/")
        branch = tree
        for part in where:
            branch = branch.setdefault(part, {})
        branch[last] = flat[name]
    return tree
