"""One encoded radiograph to one grayscale square."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnjax.data import dicom

FORMATS = ("JPEG", "PNG")
LARGEST_PIXELS = 100_000_000  # five times the largest plain film; more is a decompression bomb


class DecodeError(Exception):
    """The file is no image that we take; the text says why, in a few words."""


class MissingDecoder(DecodeError):
    """What would decode the file is not installed here; it may be the next time."""


def decode(encoded: bytes | np.ndarray, size: int) -> np.ndarray:
    """Decodes an image to a grayscale square, stretched to it.

    Luma is ITU-R 601 (Pillow's `L`), transparency shows the black that surrounds a film, 16-bit
    values are scaled to 8, and EXIF orientation is applied. JPEGs are reduced by 2, 4 or 8 while
    they are decoded (libjpeg's scaled inverse DCT, an average over blocks), as far as that leaves
    at least `size` pixels; the rest is a Hamming-windowed area filter.

    Args:
        encoded: a JPEG, PNG or DICOM file (see `cnnjax.data.dicom`), or uint8 [height, width] or
            [height, width, 3].
        size: side of the square, in pixels.

    Returns:
        uint8 [size, size].

    Raises:
        DecodeError: another format, too many pixels, or broken data.
    """
    if isinstance(encoded, np.ndarray):
        return _to_square(Image.fromarray(encoded), size)
    if dicom.is_dicom(encoded):
        try:
            levels = dicom.read(encoded, LARGEST_PIXELS)
        except dicom.NoDecoder as error:
            raise MissingDecoder(str(error)) from None
        except dicom.DicomError as error:
            raise DecodeError(str(error)) from None
        return _to_square(Image.fromarray(levels * 65535), size)
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning: the limit below is lower, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise DecodeError(
            "empty file" if not encoded else "neither JPEG nor PNG nor DICOM"
        ) from None
    except Image.DecompressionBombError:
        raise DecodeError("too many pixels") from None
    except Exception as error:  # a header can break Pillow's parsers in many ways
        raise DecodeError(f"broken header: {error}") from None
    with image:
        width, height = image.size
        if width * height > LARGEST_PIXELS:
            raise DecodeError(f"too many pixels: {width} x {height}")
        try:
            image.draft("L", (size, size))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_square(image, size)
        except Exception as error:  # OSError, SyntaxError, ValueError, struct.error...
            raise DecodeError(f"broken image: {error}") from None


def _to_square(image: Image.Image, size: int) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        # Pillow clips these when it converts to L. PNG has no deeper integers than 16 bits.
        image = Image.fromarray(np.asarray(image, np.float32) / 257)
        square = np.asarray(image.resize((size, size), Image.Resampling.HAMMING))
        return np.clip(np.rint(square), 0, 255).astype(np.uint8)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode == "CMYK":
        image = image.convert("RGB")  # Pillow's direct way to L ignores the black plate
    image = image.convert("L")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.HAMMING)
    return np.asarray(image)
