"""Checks of shapes, with clearer messages than NumPy's broadcasting errors."""

from __future__ import annotations

from collections.abc import Sequence


def expect(name: str, found: Sequence[int], expected: Sequence[int | str], why: str = "") -> None:
    """Checks that an array has the expected shape.

    Args:
        name: name of the array, for the message.
        found: shape of the array.
        expected: size of each axis; a word is the name of an axis of any size.
        why: reason for the expected shape, for the message, such as the shape of another array.

    Raises:
        ValueError: the shapes differ. The message has both of them.
    """
    fits = len(found) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, found, strict=True)
    )
    if not fits:
        reason = f" {why}" if why else ""
        raise ValueError(f"expected {name} of shape {show(expected)}{reason}, got {show(found)}")


def show(shape: Sequence[int | str]) -> str:
    """Returns a shape as text, such as [2, 8, 8, channels]."""
    return f"[{', '.join(str(size) for size in shape)}]"
