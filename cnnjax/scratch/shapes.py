"""Shapes that do not fit, said in a sentence instead of left to a broadcast error."""

from __future__ import annotations

from collections.abc import Sequence


def expect(name: str, found: Sequence[int], expected: Sequence[int | str], why: str = "") -> None:
    """Compares the shape of an array with the one that a layer can take.

    Args:
        name: what the array is called.
        found: its shape.
        expected: the size of each axis; a word stands for any size and says what the axis is.
        why: what the expectation comes from, such as the shape of another array.

    Raises:
        ValueError: the shapes differ. The message holds both.
    """
    fits = len(found) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, found, strict=True)
    )
    if not fits:
        reason = f" {why}" if why else ""
        raise ValueError(f"expected {name} of shape {show(expected)}{reason}, got {show(found)}")


def show(shape: Sequence[int | str]) -> str:
    """Writes a shape as [2, 8, 8, channels]."""
    return f"[{', '.join(str(size) for size in shape)}]"
