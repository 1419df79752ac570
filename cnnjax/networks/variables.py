"""Conversion between nested dicts of variables and flat dicts by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their paths, such as `params/stem/kernel`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts from a flat dict; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name in flat:
        *where, last = name.split("/")
        branch = tree
        for part in where:
            branch = branch.setdefault(part, {})
        branch[last] = flat[name]
    return tree
