"""Decodes the luma of JPEG files with detection of damage, and estimates the cost of decoding.

If compressed data are damaged, libjpeg continues, fills the rest with gray, and warns. Pillow
discards these warnings; simplejpeg, which uses the same libjpeg-turbo, raises them as errors. Both
give the same pixels.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg

from cnnjax.data.bounds import LARGEST_DECODED

# Files of common encoders have up to 10 scans; each scan processes all pixels again.
MOST_SCANS = 100
MOST_SCANNED = 400_000_000  # pixels times scans

_DAMAGE = "Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression"
_MARKER = re.compile(rb"\xff([^\x00\xff])")  # may follow fill bytes
_SOF0, _SCAN, _ADOBE = 0xC0, 0xDA, 0xEE
_TABLES = {0xC4, 0xDB, 0xDD}  # DHT, DQT and DRI
_JFIF = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
_FRAME = struct.Struct(">BHHB")
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF of JPEG and of JPEG-LS
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}


class Damaged(ValueError):
    """The compressed data are damaged; the message is libjpeg's."""


class Header(NamedTuple):
    """The header of a JPEG or JPEG-LS file, up to its first scan."""

    width: int
    height: int
    components: int
    bits: int
    progressive: bool
    tells_colours: bool
    """Whether Adobe's marker, or components named R, G and B, declare the colour space."""


def header_of(encoded: bytes) -> Header | None:
    """Returns the header of a JPEG or JPEG-LS file; None if it has none."""
    adobe, frame = False, None
    for marker, start in _segments(encoded):
        body = encoded[start + 2 : start + 17]
        if marker == _ADOBE and body.startswith(b"Adobe"):
            # libjpeg ignores shorter ones.
            adobe = int.from_bytes(encoded[start : start + 2], "big") >= 14
        elif marker in _FRAMES and len(body) >= 6:
            frame = marker, body
        elif marker == _SCAN:
            break
    if frame is None:
        return None
    marker, body = frame
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    named = body[6:15:3] in (b"RGB", b"rgb")
    return Header(width, height, body[5], body[0], marker in _PROGRESSIVE, adobe or named)


def plain_size(encoded: bytes) -> tuple[int, int] | None:
    """Returns width and height of a plain JPEG, and None for any other file.

    A plain JPEG is a baseline file with 8 bits per sample, one or three components, and all of them
    in its first scan. Its header contains a JFIF segment and the segments that decoding needs, so
    there is no Exif and no orientation. Pillow accepts every such file that libjpeg accepts; most
    copies of data sets consist of such files.
    """
    if not encoded.startswith(_JFIF):
        return None
    at, size, components = len(_JFIF) + 9, None, 0
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], encoded[at + 2] << 8 | encoded[at + 3]
        start, at = at + 4, at + 2 + length
        if length < 2 or at > len(encoded):
            return None
        if marker == _SCAN:
            whole = length == 6 + 2 * components and encoded[start] == components
            return size if whole else None
        if marker == _SOF0 and size is None and length in (11, 17):
            bits, height, width, components = _FRAME.unpack_from(encoded, start)
            size = width, height
            if bits != 8 or length != 8 + 3 * components:
                return None
        elif marker not in _TABLES:
            return None
    return None


def scan_fault(encoded: bytes, width: int, height: int, components: int, progressive: bool) -> str:
    """Returns why the scans of a JPEG cost too much or are incomplete; empty if they are not.

    If whole scans are missing, libjpeg shows a blurred image, or one without some colours, and does
    not warn.

    Args:
        encoded: the file.
        width: width of the image in pixels.
        height: height of the image in pixels.
        components: 1 for gray, 3 for colour.
        progressive: whether the coefficients of the whole image are kept until the last scan.
    """
    if not progressive and (components == 1 or _interleaved(encoded, components)):
        return ""  # libjpeg reads only the first scan
    if width * height * components * 2 > LARGEST_DECODED * 3 // 2:
        return f"too many pixels for a JPEG of several scans: {width} x {height}"
    most, scans = min(MOST_SCANS, MOST_SCANNED // (width * height)), 0
    waiting = {(part, i) for part in range(components) for i in range(64)}
    named: list[int] = []
    for marker, start in _segments(encoded):
        body = encoded[start + 2 : start + int.from_bytes(encoded[start : start + 2], "big")]
        if marker in _FRAMES:
            named = list(body[6::3])
        elif marker == _SCAN and body:
            scans += 1
            if scans > most:
                return f"a JPEG of more than {most} scans over {width} x {height} pixels"
            first, last, bits = body[-3:] if progressive else (0, 63, 0)
            if not bits & 15:  # no bits of a coefficient are left for a later scan
                parts = [named.index(name) for name in body[1:-3:2] if name in named]
                waiting -= {(part, i) for part in parts for i in range(first, last + 1)}
    return "some scans of the JPEG are missing" if waiting else ""


def _interleaved(encoded: bytes, components: int) -> bool:
    """Returns whether the first scan holds all components."""
    first = next((start for marker, start in _segments(encoded) if marker == _SCAN), None)
    return first is not None and encoded[first + 2 : first + 3] == bytes([components])


def luma(encoded: bytes, width: int, height: int, reduced: int = 1) -> np.ndarray:
    """Decodes a JPEG to its luma (ITU-R 601).

    Args:
        encoded: the file.
        width: width of the image in pixels.
        height: height of the image in pixels.
        reduced: 1, 2, 4 or 8, the factor by which the sides are reduced during decoding (libjpeg's
            scaled inverse DCT).

    Returns:
        uint8 [ceil(height / reduced), ceil(width / reduced)].

    Raises:
        Damaged: libjpeg warns of damage.
        ValueError: the file cannot be decoded, or libjpeg warns of something else.
    """
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            encoded,
            "GRAY",
            min_height=-(-height // reduced),
            min_width=-(-width // reduced),
            min_factor=reduced,
        )
    except ValueError as error:
        if str(error).startswith(_DAMAGE):
            raise Damaged(str(error)) from None
        raise
    return pixels[..., 0]


def rgb(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG that declares its colour space (`Header.tells_colours`).

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: the file cannot be decoded.
    """
    pixels: np.ndarray = simplejpeg.decode_jpeg(encoded, "RGB", strict=False)
    return pixels


def expect_ended(encoded: bytes) -> None:
    """Raises Damaged if no marker ends the last scan.

    For JPEG Lossless and 12-bit JPEG, whose decoder discards libjpeg's warnings.
    """
    if encoded.rfind(b"\xff\xd9") < encoded.rfind(bytes([0xFF, _SCAN])):
        raise Damaged("Premature end of JPEG file")


def expect_whole(encoded: bytes, width: int, height: int) -> None:
    """Raises Damaged if libjpeg warns of damage; for files that another decoder decodes."""
    try:
        luma(encoded, width, height, 8)
    except Damaged:
        raise
    except ValueError:
        pass  # libjpeg cannot convert it to gray, or warns of something else


def _segments(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Yields (marker, offset of the segment's length) of all segments of a JPEG."""
    at = 0
    while match := _MARKER.search(encoded, at):
        marker, at = match[1][0], match.end()
        if marker == 0xD9:
            return
        if marker in _WITHOUT_LENGTH:
            continue
        yield marker, at
        at += max(2, int.from_bytes(encoded[at : at + 2], "big"))
