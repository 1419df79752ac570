"""Decodes one encoded radiograph to a square grayscale image."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from cnnjax.data import dicom, jpeg, png
from cnnjax.data.bounds import LARGEST_FILE, LARGEST_PIXELS, TOO_LARGE, pixel_fault, strips

FORMATS = ("JPEG", "PNG")
_JPEG_SIGNATURE = b"\xff\xd8\xff"

_HELD = 2**23  # largest 16-bit image that is held in memory twice; strips are slower

_TURNED: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Layout(NamedTuple):
    """The content of an image file's header."""

    form: str
    """JPEG, PNG, DICOM, or `array` for an image of an .npz."""
    mode: str
    """Pixel format: Pillow's mode (`L`, `RGB`, `I;16`), or DICOM's photometric interpretation and
    number of bits."""
    width: int
    """In pixels, after the EXIF orientation is applied."""
    height: int

    def within(self, side: int) -> tuple[int, int]:
        """Returns the width and height of the image, scaled to this length of the longer side."""
        longest = max(self.width, self.height, 1)
        width, height = (max(1, round(side * x / longest)) for x in (self.width, self.height))
        return width, height


class DecodeError(Exception):
    """The file is not an accepted image; the message gives the reason in a few words."""


class MissingDecoder(DecodeError):
    """The decoder for the file is not installed; a later attempt may succeed."""


def decode(encoded: bytes | np.ndarray, size: int) -> np.ndarray:
    """Decodes an image to grayscale and resizes it to a square, without keeping the aspect ratio.

    Luma is ITU-R 601 (Pillow's `L`). Transparent pixels become black, the usual background of a
    radiograph. 16-bit values are scaled to 8 bits; if all values fit into k <= 14 bits, 2^k - 1
    becomes white. EXIF orientation is applied. JPEGs are reduced by 2, 4 or 8 during decoding
    (libjpeg's scaled inverse DCT, an average over blocks) as long as at least `size` pixels remain;
    the rest of the reduction is a Hamming-windowed area filter.

    Args:
        encoded: a JPEG, PNG or DICOM file (see `cnnjax.data.dicom`), or uint8 [height, width] or
            [height, width, 3].
        size: side of the square, in pixels.

    Returns:
        uint8 [size, size].

    Raises:
        DecodeError: the format is not supported, the data are damaged, or a limit of
            `cnnjax.data.bounds` is exceeded.
    """
    if isinstance(encoded, np.ndarray):
        return _to_square(Image.fromarray(encoded), size)
    if len(encoded) > LARGEST_FILE:
        raise DecodeError(TOO_LARGE)
    if (square := _plain_jpeg(encoded, size)) is not None:
        return square
    if dicom.is_dicom(encoded):
        try:
            levels = dicom.read(encoded, LARGEST_PIXELS)
        except dicom.NoDecoder as error:
            raise MissingDecoder(str(error)) from None
        except dicom.DicomError as error:
            raise DecodeError(str(error)) from None
        return _shrunk(levels.shape, size, lambda rows: levels[rows] * 65535 / 257)
    try:
        return _decode(encoded, size)
    except DecodeError:
        if not encoded.startswith(png.SIGNATURE):
            raise
        bare = png.without_text(encoded)
        if len(bare) == len(encoded):
            raise
        return _decode(bare, size)


def layout_of(encoded: bytes | np.ndarray) -> Layout:
    """Returns the layout that an image's header declares; the pixels are not decoded.

    Raises:
        ValueError: the header cannot be read.
    """
    if isinstance(encoded, np.ndarray):
        return Layout("array", "RGB" if encoded.ndim == 3 else "L", *encoded.shape[1::-1])
    try:
        if dicom.is_dicom(encoded):
            return Layout("DICOM", *dicom.layout_of(encoded))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of too many pixels, which decoding refuses
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                lying = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                sides = image.size[::-1] if lying else image.size
                return Layout(str(image.format), image.mode, *sides)
    except Exception as error:  # a header can break Pillow's parsers in many ways
        raise ValueError(str(error)) from None


def _decode(encoded: bytes, size: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # Pillow warns of decompression bombs; the limits below are lower, and raise errors.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise DecodeError(_unidentified(encoded)) from None
    except Image.DecompressionBombError:
        raise DecodeError("too many pixels") from None
    except Exception as error:  # a header can break Pillow's parsers in many ways
        raise DecodeError(f"broken header: {error}") from None
    with image:
        width, height = image.size
        try:
            fault = pixel_fault(width, height) or (
                png.memory_fault(image.mode, width, height, image.has_transparency_data)
                if image.format == "PNG"
                else jpeg.scan_fault(
                    encoded, width, height, len(image.getbands()), "progressive" in image.info
                )
            )
            if fault:
                raise DecodeError(fault)
            if image.format != "PNG":
                return _jpeg(image, encoded, size)
            png.expect_whole(encoded)
            image.load()
            png.expect_all_pixels(encoded, image)
            if encoded[24] == 16 and isinstance(key := image.info.get("transparency"), tuple):
                # Pillow keeps the upper 8 bits of the colours, but all 16 bits of the transparent
                # colour.
                image.info["transparency"] = tuple(value >> 8 for value in key)
            return _to_square(_upright(image), size, png.gray_key(encoded))
        except DecodeError:
            raise
        except Exception as error:  # OSError, SyntaxError, ValueError, struct.error...
            raise DecodeError(f"broken image: {error or type(error).__name__}") from None


def _plain_jpeg(encoded: bytes, size: int) -> np.ndarray | None:
    """Decodes a plain, undamaged JPEG without Pillow's parser, a quarter of a small file's time.

    Returns:
        None for any other file, which the caller decodes or reports.
    """
    sides = jpeg.plain_size(encoded)
    if sides is None or dicom.is_dicom(encoded) or pixel_fault(*sides):
        return None
    try:
        pixels = jpeg.luma(encoded, *sides, _reduction(*sides, size))
    except ValueError:
        return None
    return _to_square(Image.fromarray(pixels), size)


def _reduction(width: int, height: int, size: int) -> int:
    """Returns the factor by which libjpeg reduces the sides during decoding."""
    return next(k for k in (8, 4, 2, 1) if k <= max(1, min(width // size, height // size)))


def _unidentified(encoded: bytes) -> str:
    for name, signature in (("JPEG", _JPEG_SIGNATURE), ("PNG", png.SIGNATURE)):
        if encoded.startswith(signature):
            return f"broken header of a {name}"
    return "empty file" if not encoded else "neither JPEG nor PNG nor DICOM"


def _jpeg(image: Image.Image, encoded: bytes, size: int) -> np.ndarray:
    """Decodes a JPEG whose header Pillow has read."""
    width, height = image.size
    if image.mode in ("L", "RGB"):
        try:
            pixels = jpeg.luma(encoded, width, height, _reduction(width, height, size))
        except ValueError:
            pass  # damage is reported below; Pillow ignores other warnings too
        else:
            return _to_square(_upright(image, Image.fromarray(pixels)), size)
    jpeg.expect_whole(encoded, width, height)
    image.draft("L", (size, size))
    return _to_square(_upright(image), size)


def _upright(image: Image.Image, pixels: Image.Image | None = None) -> Image.Image:
    """Returns an image, or its pixels, turned upright by the EXIF orientation if it can be read."""
    try:
        turned = _TURNED.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # metadata can be broken in any way
        turned = None
    pixels = image if pixels is None else pixels
    return pixels if turned is None else pixels.transpose(turned)


def _to_square(
    image: Image.Image, size: int, transparent: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns uint8 [size, size] of an image of any mode; for `transparent` see `png.gray_key`."""
    height, width = image.height, image.width
    if image.mode.startswith("I"):
        # Pillow clips these modes when it converts to L. PNG has no integers of more than 16 bits.

        held = np.asarray(image) if width * height <= _HELD else None

        def deep(rows: slice) -> np.ndarray:
            box = (0, rows.start, width, rows.stop)
            strip = np.asarray(image.crop(box)) if held is None else held[rows]
            return strip if transparent is None else png.with_key_black(strip, transparent)

        scale = png.scale_of(max(int(deep(rows).max()) for rows in strips(height, width)))
        return _shrunk((height, width), size, lambda rows: deep(rows).astype(np.float32) / scale)
    if transparent is not None:
        image = Image.fromarray(png.with_key_black(np.asarray(image), transparent))
    elif image.has_transparency_data:
        gray = Image.new("L", image.size)
        for rows in strips(height, width):
            box = (0, rows.start, width, rows.stop)
            strip = (image if box == (0, 0, width, height) else image.crop(box)).convert("RGBA")
            black = Image.new("RGBA", strip.size, (0, 0, 0, 255))
            gray.paste(Image.alpha_composite(black, strip).convert("L"), (0, rows.start))
        image = gray
    if image.mode == "CMYK":
        image = image.convert("RGB")  # Pillow's direct way to L ignores the black plate
    if image.mode != "L":
        image = image.convert("L")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.HAMMING)
    return np.asarray(image)


def _shrunk(shape: tuple[int, ...], size: int, levels: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Returns uint8 [size, size] of gray levels that are too large to be held all at once.

    Pillow resamples along rows first and along columns second, so strips of rows give identical
    bits.

    Args:
        shape: height and width.
        size: side of the square, in pixels.
        levels: a function that returns float32 in [0, 255] for a slice of rows.
    """
    height, width = shape
    narrow = Image.new("F", (size, height))
    for rows in strips(height, width):
        strip = Image.fromarray(np.asarray(levels(rows), np.float32))
        narrow.paste(strip.resize((size, strip.height), Image.Resampling.HAMMING), (0, rows.start))
    square = np.asarray(narrow.resize((size, size), Image.Resampling.HAMMING))
    return np.clip(np.rint(square), 0, 255).astype(np.uint8)
