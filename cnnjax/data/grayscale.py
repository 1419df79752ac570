"""Converts the pixels of a DICOM image from stored values to the gray levels that a viewer shows.

All knowledge about what pydicom returns, and about the remaining steps, is in this module (DICOM
PS3.3, C.7.6.3 and C.11). For the colour space of the pixels see `_stored`. For images of one sample
per pixel the steps are: shift the bits to the low end, apply the Modality LUT or the rescale, apply
the VOI LUT, the window or the range of the values, invert for MONOCHROME1, and set padding to
black.

An invalid display tag never prevents an image from being shown: it is treated as absent, and
`notes` reports it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cnnjax.data import jpeg
from cnnjax.data.bounds import LARGEST_DECODED, LARGEST_PIXELS, pixel_fault, strips

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601

_MONOCHROME = ["MONOCHROME1"], ["MONOCHROME2"]
_FUNCTIONS = "LINEAR", "LINEAR_EXACT", "SIGMOID"
_UNUSED = "; the range of the values is used"


class PixelError(Exception):
    """The pixels cannot be shown; the message gives the reason in a few words."""


class NoPixelDecoder(PixelError):
    """The decoder for the pixels is not installed."""


class Table(NamedTuple):
    """A lookup table of PS3.3, C.11.1 or C.11.2."""

    first: int
    """The value that maps to the first entry; smaller values map to it too."""
    entries: np.ndarray
    """uint8 or uint16 [n]."""

    def of(self, values: np.ndarray) -> np.ndarray:
        """Returns the entries for these values, float64."""
        at = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return self.entries[at.astype(np.int64)].astype(np.float64)

    def signed_as(self, values: np.ndarray) -> Table:
        """Returns the table with `first` signed if the values are.

        The descriptor's two bytes are signed if the values are (PS3.3, C.11.1.1), but readers often
        take them as unsigned; then all values lie below the first entry.
        """
        below = self.first > 32767 and values.max() < self.first
        return self._replace(first=self.first - 65536) if below else self

    @property
    def white(self) -> int:
        """The value that is shown as white."""
        return _white_of(self.entries)


def _white_of(entries: np.ndarray) -> int:
    """Returns 2^k - 1 for the k bits, at least 8, that the largest entry of a table needs.

    The declared number of bits is not used: some files declare 16 for tables that end at 4095, and
    8 for tables that exceed 255.
    """
    return 2 ** max(8, int(entries.max()).bit_length()) - 1


class Display(NamedTuple):
    """How to display the values, by the valid display tags."""

    slope: float
    intercept: float
    modality: Table | None
    voi: Table | None
    window: tuple[str, float, float] | None
    """(function, centre, width)"""
    notes: tuple[str, ...]
    """Sentences about the invalid tags."""


def gray(file: Any, largest: int) -> np.ndarray:
    """Returns the image as a viewer shows it.

    Args:
        file: pydicom's dataset.
        largest: largest number of pixels that is accepted.

    Returns:
        float32 [height, width] in [0, 1].

    Raises:
        PixelError: there is no image, or there are several.
        NoPixelDecoder: the image cannot be decoded with the installed packages.
    """
    if "PixelData" not in file:
        raise PixelError("a DICOM file without an image")
    frames = int(file.get("NumberOfFrames") or 1)
    if frames > 1:
        raise PixelError(f"a DICOM file of {frames} frames; save one frame as a file")
    height, width = int(file.Rows), int(file.Columns)
    if height * width > largest:
        raise PixelError(f"too many pixels: {width} x {height}")
    if fault := pixel_fault(width, height):
        raise PixelError(fault)
    kind = str(file.PhotometricInterpretation)
    _fill_in(file, kind)
    _expect_consistent(file, kind)
    stored, state = _stored(file, kind)
    if stored.ndim == 3:
        return _luma(stored, state, 2 ** int(file.BitsStored) - 1)
    if kind == "PALETTE COLOR":
        return _palette(file, stored)
    return _monochrome(file, stored, turned=kind == "MONOCHROME1")


def _fill_in(file: Any, kind: str) -> None:
    """Sets layout tags that some writers omit to their usual values, as other readers do."""
    samples = 1 if kind.startswith(("MONOCHROME", "PALETTE")) else 3
    absent = {"SamplesPerPixel": samples, "PixelRepresentation": 0, "PlanarConfiguration": 0}
    for name, value in absent.items():
        if file.get(name) is None:
            setattr(file, name, value)


def _expect_consistent(file: Any, kind: str) -> None:
    """Raises PixelError if layout tags contradict each other, since no reading is then correct."""
    samples = int(file.SamplesPerPixel)
    if (samples == 1) != kind.startswith(("MONOCHROME", "PALETTE")):
        raise PixelError(f"a DICOM file of {_cut(kind)} with {samples} samples per pixel")
    shape = str(file.get("PresentationLUTShape") or "").strip().upper()
    if (kind, shape) in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
        raise PixelError(f"a DICOM file of {kind} with the Presentation LUT Shape {_cut(shape)}")
    allocated, bits, high = int(file.BitsAllocated), int(file.BitsStored), file.get("HighBit")
    placed = high is None or not _bits_have_places(file) or bits <= int(high) + 1 <= allocated
    if not 1 <= bits <= allocated or not placed:
        raise PixelError(
            f"a DICOM file of {bits} bits up to bit {high} in {allocated}, which is impossible"
        )


def _stored(file: Any, kind: str) -> tuple[np.ndarray, str]:
    """Returns the decoded pixels, and their colour space.

    With `raw=True` pydicom does not convert colours. It only upsamples the chroma of YBR_FULL_422
    and undoes the transforms of JPEG 2000 (YBR_RCT and YBR_ICT become RGB), and it returns the
    resulting photometric interpretation. A JPEG that declares its own colour space is converted to
    RGB here, since pydicom uses the tag instead. imagecodecs is called without conversion, so the
    tag gives the colour space.

    Returns:
        integers [height, width] or [height, width, 3], and a Photometric Interpretation.

    Raises:
        PixelError: the pixels cannot be decoded.
        NoPixelDecoder: their decoder is not installed.
    """
    syntax = file.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        frame = _frame(file)
        header = _checked(frame, file, syntax)
        if str(syntax) in _JPEG_LS + _JPEG_LOSSLESS or (
            str(syntax) == _JPEG_EXTENDED and int(file.BitsStored) > 8
        ):
            return _by_imagecodecs(frame, header, file, syntax), kind
        if header is not None and header.components == 3 and header.tells_colours:
            return jpeg.rgb(frame), "RGB"
    return _by_pydicom(file, syntax)


# Transfer syntaxes that Pillow does not decode. GDCM, the other decoder that pydicom may use for
# them, crashes the process on damaged data.
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_JPEG_LOSSLESS = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
_JPEG_LS = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"


def _by_imagecodecs(frame: bytes, header: jpeg.Header | None, file: Any, syntax: Any) -> np.ndarray:
    """Returns the pixels of a JPEG Lossless, JPEG Extended or JPEG-LS frame, without conversion.

    The decoders receive the output array. If the shape in the frame's own header differs, they
    refuse it before they decode anything.
    """
    try:
        import imagecodecs
    except ImportError:
        raise NoPixelDecoder(
            f"DICOM pixels that cannot be decoded here ({_cut(syntax.name.partition(',')[0])});"
            " install their decoder with: pip install imagecodecs"
        ) from None
    expected = (int(file.Rows), int(file.Columns), int(file.SamplesPerPixel))
    if header is None:
        raise PixelError("damaged pixels in a DICOM file: a frame without a header")
    if math.prod(expected) > LARGEST_PIXELS:
        raise PixelError(f"too many pixels of {expected[2]} samples: {expected[1]} x {expected[0]}")
    shape = expected if expected[2] > 1 else expected[:2]
    out = np.empty(shape, np.uint8 if header.bits <= 8 else np.uint16)
    try:
        if str(syntax) in _JPEG_LS:
            coded = imagecodecs.jpegls_decode(frame, out=out)
        else:
            same = "RGB" if file.SamplesPerPixel > 1 else None  # no conversion
            coded = imagecodecs.jpeg8_decode(frame, colorspace=same, outcolorspace=same, out=out)
    except Exception as error:  # each codec raises its own types
        raise _undecodable(syntax, error) from None
    if str(syntax) in _JPEG_LOSSLESS and coded.flat[-1] == 2 ** (header.bits - 1):
        _expect_last_values(frame, coded)
    if file.PixelRepresentation == 0 or coded.ndim == 3:
        return coded
    signed = coded.view(f"i{coded.dtype.itemsize}")
    above = 8 * coded.dtype.itemsize - int(file.BitsStored)
    return (signed << above) >> above


def _expect_last_values(frame: bytes, coded: np.ndarray) -> None:
    """Raises PixelError if the data of a JPEG Lossless frame end before the last value.

    libjpeg fills the missing values with the middle of the range, and imagecodecs discards its
    warning. Another decoder fills them with other values, so the two results differ.
    """
    import imagecodecs

    try:
        other = imagecodecs.ljpeg_decode(frame)
    except Exception:  # it supports fewer variants
        return
    if other.shape == coded.shape and not np.array_equal(other, coded):
        raise PixelError("damaged pixels in a DICOM file: the data end too early")


def _by_pydicom(file: Any, syntax: Any) -> tuple[np.ndarray, str]:
    """Returns the pixels of a file with any other transfer syntax, and their colour space."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise NoPixelDecoder(
            f"DICOM pixels that pydicom cannot decode ({_cut(syntax.name)})"
        ) from None
    # Use these even if other decoders are installed: the pixels are then the same everywhere.
    plugin = next((p for p in ("pillow", "pydicom") if p in decoder.available_plugins), "")
    spare = _spare_bits(file)
    options = {"correct_unused_bits": False} if spare else {}
    try:
        stored, properties = decoder.as_array(
            file, raw=True, index=0, decoding_plugin=plugin, **options
        )
    except Exception as error:  # each decoder raises its own types
        if not decoder.is_available:
            raise NoPixelDecoder(str(_undecodable(syntax, error))) from None
        raise _undecodable(syntax, error) from None
    if spare:
        above = 8 * stored.dtype.itemsize - int(file.BitsStored) - spare
        stored = (stored << above) >> (above + spare)  # preserves the sign of signed values
    return stored, str(properties["photometric_interpretation"])


def _undecodable(syntax: Any, error: Exception) -> PixelError:
    return PixelError(
        f"DICOM pixels that cannot be decoded here ({_cut(syntax.name)}): {reason(error)}"
    )


def _spare_bits(file: Any) -> int:
    """Returns the number of unused bits below the stored ones, by HighBit."""
    if file.get("HighBit") is None or not _bits_have_places(file):
        return 0
    return int(file.HighBit) + 1 - int(file.BitsStored)


def _bits_have_places(file: Any) -> bool:
    """Returns whether HighBit applies.

    It does not for the JPEG family, whose decoders return values at the low end.
    """
    syntax = file.file_meta.TransferSyntaxUID
    return not syntax.is_encapsulated or "RLE" in syntax.name


def _frame(file: Any) -> bytes:
    """Returns the first compressed frame; raises PixelError if there is none."""
    from pydicom.encaps import get_frame

    try:
        return bytes(get_frame(file.PixelData, 0, number_of_frames=1))
    except Exception as error:  # fragments can be broken in any way
        raise _undecodable(file.file_meta.TransferSyntaxUID, error) from None


def _checked(frame: bytes, file: Any, syntax: Any) -> jpeg.Header | None:
    """Checks the size of a compressed frame and, for JPEG, its decoding cost and completeness.

    Returns:
        The header of a JPEG or JPEG-LS frame; None for others.

    Raises:
        PixelError: the size of the frame differs from its tags, decoding costs too much, or the
            frame is damaged.
    """
    width, height = int(file.Columns), int(file.Rows)
    plain = width * height * int(file.SamplesPerPixel) * -(-int(file.BitsAllocated) // 8)
    if plain > LARGEST_DECODED:
        raise PixelError(
            f"too many pixels of {plain // (width * height)} bytes: {width} x {height}"
        )
    if "RLE" in syntax.name:
        # Literal runs add at most one byte in 128; a longer frame is not a valid image.
        if len(frame) > 1.1 * plain + 1024:
            raise PixelError("DICOM pixels that cannot be decoded here: too many bytes of RLE")
        _expect_bounded_rle(frame, width * height)
        return None
    header = jpeg.header_of(frame) if frame.startswith(b"\xff\xd8") else None
    found = header[:2] if header is not None else _side_of_jpeg2000(frame)
    if found is not None and found != (width, height):
        raise PixelError(
            f"a DICOM file whose pixels are {found[0]} x {found[1]}, not {width} x {height}"
        )
    if header is None:
        return None
    if header.components != file.SamplesPerPixel:
        raise PixelError(
            f"a DICOM file whose pixels have {header.components} samples, not"
            f" {file.SamplesPerPixel}"
        )
    fault = jpeg.scan_fault(frame, width, height, header.components, header.progressive)
    if fault:
        raise PixelError(fault)
    try:
        jpeg.expect_ended(frame)
        jpeg.expect_whole(frame, width, height)
    except jpeg.Damaged as error:
        raise PixelError(f"damaged pixels in a DICOM file: {error}") from None
    return header


def _expect_bounded_rle(frame: bytes, pixels: int) -> None:
    """Raises PixelError if RLE segments expand to more than the pixels, or have too many runs.

    The segments are scanned without decoding, since each run declares its length.
    """
    starts = np.frombuffer(frame[:64].ljust(64, b"\0"), "<u4")
    ends = [*starts[1 : min(int(starts[0]), 15) + 1].tolist(), len(frame)]
    runs = 0
    for start, end in itertools.pairwise(ends):
        length, at, end = 0, start, min(end, len(frame))
        while at < end:
            run = frame[at]
            runs += 1
            if run < 128:
                length += run + 1
                at += run + 2
            elif run > 128:
                length += 257 - run
                at += 2
            else:
                at += 1
            # A writer may pad a segment with one more run.
            if length > pixels + 128 or runs > _MOST_RUNS:
                more = "more than its pixels" if runs <= _MOST_RUNS else "too many runs"
                raise PixelError(f"DICOM pixels that cannot be decoded here: RLE with {more}")


# Largest number of runs in all segments, which takes a few seconds. A radiograph of 28 million
# pixels has about 4 million.
_MOST_RUNS = 8_000_000


def _side_of_jpeg2000(frame: bytes) -> tuple[int, int] | None:
    """Returns (width, height) from the SIZ segment of a JPEG 2000 codestream; None without one."""
    at = frame.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(frame) < at + 24:
        return None
    x1, y1, x0, y0 = (int.from_bytes(frame[at + i : at + i + 4], "big") for i in (8, 12, 16, 20))
    return x1 - x0, y1 - y0


def reason(error: Exception) -> str:
    """Returns the first line of an exception's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _luma(stored: np.ndarray, state: str, white: int) -> np.ndarray:
    """Returns the luma of colour pixels in this colour space, float32 [height, width] in [0, 1].

    Y of YBR is the luma; in the PARTIAL forms it ranges from 16 to 235 (PS3.3, C.7.6.3.1.2).
    """
    height, width = stored.shape[:2]
    shown = np.empty((height, width), np.float32)
    for rows in strips(height, width):
        if state.startswith("YBR"):
            level = stored[rows, :, 0].astype(np.float64) / white
            if "PARTIAL" in state:
                level = np.clip((level * 255 - 16) / 219, 0, 1)
            shown[rows] = level
        else:
            shown[rows] = stored[rows].astype(np.float64) @ LUMA / white
    return shown


def _palette(file: Any, stored: np.ndarray) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    if stored.dtype.itemsize > 2:
        raise PixelError(f"a DICOM file of PALETTE COLOR with {file.BitsAllocated} bits per pixel")
    index = stored.astype(f"u{stored.dtype.itemsize}", copy=False)
    possible = np.arange(2 ** (8 * index.dtype.itemsize), dtype=index.dtype)
    colours = apply_color_lut(possible, file)[..., :3]
    table = (colours.astype(np.float64) @ LUMA / _white_of(colours)).astype(np.float32)
    shown: np.ndarray = table[index]
    return shown


def _monochrome(file: Any, stored: np.ndarray, turned: bool) -> np.ndarray:
    """Returns float32 [height, width] in [0, 1] of an image of one sample per pixel."""
    display = display_of(file)
    padding = _padding(file)

    def values_of(some: np.ndarray) -> np.ndarray:
        if display.modality is not None:
            return display.modality.of(some.astype(np.float64))
        return some * display.slope + display.intercept

    def shown_of(some: np.ndarray, low: float, high: float) -> np.ndarray:
        level = _leveled(values_of(some), display, low, high)
        level = 1 - level if turned else level
        return np.where(padding(some), 0, level).astype(np.float32)

    def expect(inside: np.ndarray) -> tuple[float, float]:
        """Returns the range of the values without padding; adapts the tables to it."""
        nonlocal display
        inside = inside if inside.size else np.zeros(1, stored.dtype)
        if display.modality is not None:
            display = display._replace(modality=display.modality.signed_as(inside))
        values = values_of(inside)
        if display.voi is not None:
            display = display._replace(voi=display.voi.signed_as(values))
        return float(values.min()), float(values.max())

    if stored.dtype.itemsize > 2:
        return shown_of(stored, *expect(stored[~padding(stored)]))
    # Compute the gray level of each possible stored value once; then look up each pixel.
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    possible = (
        np.arange(2 ** (8 * stored.dtype.itemsize))
        .astype(unsigned)
        .view(stored.dtype.newbyteorder("="))
    )
    index = stored.astype(stored.dtype.newbyteorder("="), copy=False).view(unsigned)
    if display.modality is None and not padding(possible).any():
        inside = np.array([stored.min(), stored.max()])  # a linear rescale preserves the extremes
    else:
        there = np.zeros(len(possible), bool)
        for rows in strips(*stored.shape):
            there[index[rows]] = True
        inside = possible[there & ~padding(possible)]
    table = shown_of(possible, *expect(inside))
    shown = np.empty(stored.shape, np.float32)
    for rows in strips(*stored.shape):
        shown[rows] = table[index[rows]]
    return shown


def _leveled(values: np.ndarray, display: Display, low: float, high: float) -> np.ndarray:
    """Maps values to float64 in [0, 1] by VOI LUT, window or range (PS3.3, C.11.2)."""
    if display.voi is not None:
        return display.voi.of(values) / display.voi.white
    if display.window is None:
        # Padding may lie outside the range; it is set to black later.
        return np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    function, centre, width = display.window
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _padding(file: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that marks padding among stored values (PS3.3, C.7.5.1.1.2)."""
    ends = [_as_stored(file, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    known = [end for end in ends if end is not None]
    if ends[0] is None:
        return lambda some: np.zeros(some.shape, bool)
    return lambda some: (some >= min(known)) & (some <= max(known))


def _as_stored(file: Any, name: str) -> int | None:
    """Returns a padding tag as a value in the range of stored values; None without one.

    Some writers confuse signed with unsigned 16-bit numbers, or with numbers of fewer bits.
    """
    try:
        value = int(file.get(name))
        bits, signed = int(file.BitsStored), int(file.PixelRepresentation)
    except Exception:  # a tag can be wrong in any way
        return None
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    for one in (value, value - 65536, value + 65536, value - 2**bits, value & (2**bits - 1)):
        if low <= one <= high:
            return one
    return None


def notes(file: Any) -> list[str]:
    """Returns sentences about invalid display tags, and what was done instead."""
    kinds = _texts(file, "PhotometricInterpretation")
    return list(display_of(file).notes) if kinds[:1] in _MONOCHROME else []


def display_of(file: Any) -> Display:
    """Returns how to display the values of a file of one sample per pixel."""
    found: list[str] = []
    slope = _one(file, "RescaleSlope", 1.0, lambda x: x != 0, found)
    intercept = _one(file, "RescaleIntercept", 0.0, lambda _: True, found)
    modality = _table(file, "ModalityLUTSequence", found, "; ignored")
    voi = _table(file, "VOILUTSequence", found, "; ignored")
    window = _window(file, found) if voi is None else None
    return Display(slope, intercept, modality, voi, window, tuple(found))


def _one(
    file: Any, name: str, absent: float, legal: Callable[[float], bool], found: list[str]
) -> float:
    texts = _texts(file, name)
    if not texts:
        return absent
    number = _number(texts[0], found)
    if number is None or not legal(number):
        found.append(f"{name} {_quoted(texts[:1])} is invalid; {absent:g} is used")
        return absent
    return number


def _window(file: Any, found: list[str]) -> tuple[str, float, float] | None:
    """Returns the first window of the file; None if there is no valid one."""
    centres, widths = _texts(file, "WindowCenter"), _texts(file, "WindowWidth")
    if not centres and not widths:
        return None
    function = (_texts(file, "VOILUTFunction") or ["LINEAR"])[0].upper()
    if function not in _FUNCTIONS:
        found.append(f"VOILUTFunction {_quoted([function])} is unknown; LINEAR is used")
        function = "LINEAR"
    centre, width = (_number(texts[0], found) if texts else None for texts in (centres, widths))
    narrowest = 1 if function == "LINEAR" else 1e-9
    if centre is None or width is None or width < narrowest:
        told = _quoted([*(centres[:1] or ["none"]), *(widths[:1] or ["none"])])
        found.append(f"the window (centre, width: {told}) is invalid{_UNUSED}")
        return None
    return function, centre, width


def _texts(file: Any, name: str) -> list[str]:
    """Returns the values of a tag as the file's text, whether or not they are numbers."""
    from pydicom.datadict import tag_for_keyword

    try:
        value = file.get_item(tag_for_keyword(name)).value
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace").split("\\")
        several = value if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]
        texts = [str(one).strip(" \0") for one in several if one is not None]
    except Exception:  # the tag is absent or broken
        return []
    return texts if any(texts) else []


def _number(text: str, found: list[str]) -> float | None:
    """Returns a decimal string as a number; None if it is not finite or larger than 1e15."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    if not math.isfinite(number) or abs(number) > 1e15 or "_" in text:
        return None
    if "," in text:
        found.append(f"{_quoted([text])} has a decimal comma; {number:g} is used")
    return number


def _quoted(texts: list[str]) -> str:
    """Returns the texts of a tag, shortened and without control characters."""
    return ", ".join(_cut(text, 20) for text in texts)


def _cut(text: str, most: int = 80) -> str:
    """Returns arbitrary text of a file in a form that is safe to print."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def _table(file: Any, name: str, found: list[str], instead: str) -> Table | None:
    """Returns the first table of a sequence; None if it is absent or broken.

    The data are words, or bytes packed two to a word, the lower byte first (PS3.3, C.11.1.1).
    """
    try:
        sequence = file.get(name)
        if not sequence:
            return None
        length, first, _ = (int(value) for value in sequence[0].LUTDescriptor)
        length = length % 65536 or 65536
        data = sequence[0]["LUTData"].value
        if isinstance(data, bytes):
            word = np.dtype("<u2" if file.original_encoding[1] is not False else ">u2")
            words = np.frombuffer(data[: len(data) // 2 * 2], word)
            odd = np.frombuffer(data[len(words) * 2 :], np.uint8)
        else:
            several = data if hasattr(data, "__len__") else [data]
            words, odd = np.array([int(x) % 65536 for x in several], np.uint16), np.empty(0, "u1")
        if len(words) < length:
            packed = words.astype("<u2").view(np.uint8)
            words = np.concatenate([packed, odd])
        if len(words) < length:
            raise ValueError("too short")
        return Table(first, words[:length].astype(np.uint16))
    except Exception:  # a sequence can be wrong in any way
        found.append(f"{name} cannot be read{instead}")
        return None
