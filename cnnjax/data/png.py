"""Handles chunks and transparency of PNG files where Pillow does not."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from cnnjax.data.bounds import LARGEST_DECODED

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# The chunks that Pillow needs for the pixels and their orientation.
_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
_XMP = b"XML:com.adobe.xmp\0"
_XMP_READ = 2**22
_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def without_text(encoded: bytes) -> bytes:
    """Returns a PNG without texts and profiles; Pillow refuses large or damaged ones.

    The orientation in an XMP text is kept.
    """
    kept = [SIGNATURE]
    for kind, body, whole in _chunks(encoded):
        if kind in _KEPT:
            kept.append(whole)
        elif kind == b"iTXt" and body.startswith(_XMP):
            kept.append(_orientation_only(body))
    return b"".join(kept)


def _chunks(encoded: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yields (kind, body, whole chunk); the last chunk may be truncated."""
    at = len(SIGNATURE)
    while at < len(encoded):
        (length,) = struct.unpack(">I", encoded[at : at + 4].ljust(4, b"\0"))
        whole = encoded[at : at + 12 + length]
        yield whole[4:8], whole[8 : 8 + length], whole
        at += len(whole)


def expect_whole(encoded: bytes) -> None:
    """Raises ValueError if a checksum of the pixel data is wrong; Pillow does not verify them."""
    view, at = memoryview(encoded), len(SIGNATURE)
    while at + 8 <= len(encoded):
        (length,) = struct.unpack(">I", view[at : at + 4])
        kind, end = bytes(view[at + 4 : at + 8]), at + 8 + length
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            raise ValueError("a wrong checksum of IDAT")
        at = end + 4


def expect_all_pixels(encoded: bytes, image: Image.Image) -> None:
    """Raises ValueError if rows, or colours of the palette, are missing.

    If the compressed data end after a row, Pillow leaves the remaining rows black. The data are
    inflated again only if the last row is black; for an interlaced image, the last row of its last
    pass.

    Args:
        encoded: the file.
        image: the image decoded by Pillow.
    """
    width, height = image.size
    if image.mode == "P":
        colours = next((len(body) // 3 for kind, body, _ in _chunks(encoded) if kind == b"PLTE"), 0)
        if int(np.asarray(image).max()) >= colours:
            raise ValueError("a colour that its palette lacks")
    last = height - 1 if not encoded[28] or height % 2 == 0 else max(0, height - 2)
    if np.asarray(image.crop((0, last, width, last + 1))).any():
        return
    missing = _length(encoded, width, height)
    inflater = zlib.decompressobj()
    for kind, body, _ in _chunks(encoded):
        part = inflater.decompress(body, _INFLATED) if kind == b"IDAT" else b""
        while part and missing > 0:
            missing -= len(part)
            part = inflater.decompress(inflater.unconsumed_tail, _INFLATED)
    if missing > 0:
        raise ValueError("rows at its end are missing")


def _length(encoded: bytes, width: int, height: int) -> int:
    """Returns the number of bytes of a PNG's rows before compression."""
    bits = encoded[24] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[encoded[25]]
    passes = _ADAM7 if encoded[28] else [(0, 0, 1, 1)]
    shapes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in shapes if columns > 0)


_INFLATED = 2**20  # bytes inflated at a time
_ADAM7 = [  # first column, first row, and the steps between columns and rows, of each pass
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
]


def _orientation_only(body: bytes) -> bytes:
    """Returns an iTXt chunk with only the XMP orientation; empty if there is none."""
    compressed = body[len(_XMP) : len(_XMP) + 1] == b"\1"
    _, _, text = body[len(_XMP) + 2 :].partition(b"\0")[2].partition(b"\0")
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, _XMP_READ)
        except zlib.error:
            return b""
    found = _ORIENTATION.search(text[:_XMP_READ])
    if found is None:
        return b""
    body = b"iTXt" + _XMP + b'\0\0\0\0tiff:Orientation="' + found[1] + b'"'
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def memory_fault(mode: str, width: int, height: int, transparent: bool) -> str:
    """Returns why a PNG would take too much memory; empty if it would not.

    Args:
        mode: Pillow's mode.
        width: width of the image in pixels.
        height: height of the image in pixels.
        transparent: whether it is converted to RGBA.
    """
    deep = mode.startswith(("I", "F"))
    each = 4 if transparent and not deep else {"1": 1, "L": 1, "P": 1}.get(mode, 2 if deep else 4)
    if width * height * each > LARGEST_DECODED:
        return f"too many pixels: {width} x {height} of {each} bytes"
    return ""


def gray_key(encoded: bytes) -> tuple[int, int] | None:
    """Returns (value, bits) of the gray level that is transparent; None if there is none.

    The value has the file's own bit depth; Pillow scales depths of 2 and 4 bits to 8.
    """
    bits, colour = encoded[24], encoded[25]
    if colour != 0:
        return None
    for kind, body, _ in _chunks(encoded):
        if kind == b"IDAT":
            break
        if kind == b"tRNS" and len(body) >= 2:
            return int.from_bytes(body[:2], "big") & (2**bits - 1), bits
    return None


def scale_of(deepest: int) -> float:
    """Returns the divisor that converts 16-bit values to 8-bit ones, given the largest value.

    Scanners write 10, 12 or 14 bits into 16-bit files; white is then the largest value of that many
    bits.
    """
    bits = deepest.bit_length()
    return (2 ** max(bits, 8) - 1) / 255 if 0 < bits <= 14 else 257


def with_key_black(pixels: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Returns gray pixels as read by Pillow, with those of the transparent value set to black."""
    value, bits = key
    if pixels.dtype == bool:
        return pixels & (pixels != bool(value))
    seen = value if bits > 8 else value * 255 // (2**bits - 1)
    return np.where(pixels == seen, 0, pixels).astype(pixels.dtype)
