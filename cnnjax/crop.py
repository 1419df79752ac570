"""Crops an image to a box, without JAX."""

from __future__ import annotations

import numpy as np
from PIL import Image


def crop(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Crops an image to a box and resizes the crop to a square with a Hamming-windowed area filter.

    Pillow computes it in double precision on the host. The result is therefore the same in every
    process and on every machine, and does not depend on the other images of a batch.

    Args:
        image: uint8 [height, width].
        box: float32 [4], left, top, right and bottom, as fractions of the image's sides.
        size: side of the square, in pixels.

    Returns:
        uint8 [size, size].
    """
    height, width = image.shape
    edges = tuple((np.asarray(box, float) * (width, height, width, height)).tolist())
    square = Image.fromarray(image.astype(np.float32)).resize(
        (size, size), Image.Resampling.HAMMING, edges
    )
    return np.clip(np.rint(np.asarray(square)), 0, 255).astype(np.uint8)
