"""What the pixels of a DICOM image mean: from stored values to the gray that a viewer shows.

This module is the one place that says what pydicom hands over and what is still to be done (DICOM
PS3.3, C.7.6.3 and C.11). For the state of colours see `_stored`; for one sample a pixel the steps
are: bits moved to the low end, Modality LUT or rescale, VOI LUT, window or range, MONOCHROME1
turned over, padding black.

Tags that only say how to display values never keep them from being shown: where one is of no use,
the next step is taken as if it were absent, and `notes` tells.
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
_UNUSED = "; shown by the range of its values"


class PixelError(Exception):
    """The pixels cannot be shown; the text says why, in a few words."""


class NoPixelDecoder(PixelError):
    """What would decode the pixels is not installed here."""


class Table(NamedTuple):
    """A lookup table of PS3.3, C.11.1 or C.11.2."""

    first: int
    """The value that the first entry is for; smaller ones take it too."""
    entries: np.ndarray
    """uint8 or uint16 [n]."""

    def of(self, values: np.ndarray) -> np.ndarray:
        """Returns float64, the entries for these values."""
        at = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return self.entries[at.astype(np.int64)].astype(np.float64)

    def signed_as(self, values: np.ndarray) -> Table:
        """Returns the table for an image of these values, which tell whether `first` has a sign.

        Its two bytes are signed where the values are (PS3.3, C.11.1.1), and are often read as if
        they were not: then all values would lie before the first entry.
        """
        below = self.first > 32767 and values.max() < self.first
        return self._replace(first=self.first - 65536) if below else self

    @property
    def white(self) -> int:
        """The value that is shown white."""
        return _white_of(self.entries)


def _white_of(entries: np.ndarray) -> int:
    """Returns the largest value of as many bits as the entries of a table fill, 8 or more.

    Files say 16 for tables that end at 4095, and 8 for those that go beyond 255.
    """
    return 2 ** max(8, int(entries.max()).bit_length()) - 1


class Display(NamedTuple):
    """How the values are to be shown, of the tags that can be used."""

    slope: float
    intercept: float
    modality: Table | None
    voi: Table | None
    window: tuple[str, float, float] | None
    """(function, centre, width)"""
    notes: tuple[str, ...]
    """Sentences on the tags that cannot."""


def gray(file: Any, largest: int) -> np.ndarray:
    """Returns the image as a viewer shows it.

    Args:
        file: pydicom's dataset.
        largest: most pixels that are taken.

    Returns:
        float32 [height, width] in [0, 1].

    Raises:
        PixelError: there is no image, or several, or none that can be decoded here
            (then `NoPixelDecoder`).
    """
    if "PixelData" not in file:
        raise PixelError("a DICOM file without an image")
    frames = int(file.get("NumberOfFrames") or 1)
    if frames > 1:
        raise PixelError(f"a DICOM file of {frames} frames; give the one to be judged by itself")
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
    """Gives a file the tags of layout that some writers leave out, as other readers do."""
    samples = 1 if kind.startswith(("MONOCHROME", "PALETTE")) else 3
    absent = {"SamplesPerPixel": samples, "PixelRepresentation": 0, "PlanarConfiguration": 0}
    for name, value in absent.items():
        if file.get(name) is None:
            setattr(file, name, value)


def _expect_consistent(file: Any, kind: str) -> None:
    """Raises PixelError where tags of layout contradict each other: no reading is the right one."""
    samples = int(file.SamplesPerPixel)
    if (samples == 1) != kind.startswith(("MONOCHROME", "PALETTE")):
        raise PixelError(f"a DICOM file of {_cut(kind)} with {samples} samples a pixel")
    shape = str(file.get("PresentationLUTShape") or "").strip().upper()
    if (kind, shape) in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
        raise PixelError(f"a DICOM file of {kind} with the Presentation LUT Shape {_cut(shape)}")
    allocated, bits, high = int(file.BitsAllocated), int(file.BitsStored), file.get("HighBit")
    placed = high is None or not _bits_have_places(file) or bits <= int(high) + 1 <= allocated
    if not 1 <= bits <= allocated or not placed:
        raise PixelError(
            f"a DICOM file of {bits} bits up to bit {high} in {allocated}; nothing can be so stored"
        )


def _stored(file: Any, kind: str) -> tuple[np.ndarray, str]:
    """Returns the pixels as they are handed over, and the state of their colours.

    With `raw=True` pydicom converts no colours, only spreads the chroma of YBR_FULL_422 over both
    pixels and undoes JPEG 2000's own transforms (YBR_RCT and YBR_ICT are RGB then); it names the
    state that this leaves. JPEGs that tell of their colours themselves become RGB here, as pydicom
    goes by the tag. imagecodecs is told to convert nothing, so that the state is what the tag says.

    Returns:
        integers [height, width] or [height, width, 3], and a Photometric Interpretation.

    Raises:
        PixelError, NoPixelDecoder: they cannot be decoded.
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


# Transfer syntaxes that Pillow does not decode. (What else pydicom may use for them, GDCM, ends the
# process at damaged ones.)
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_JPEG_LOSSLESS = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
_JPEG_LS = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"


def _by_imagecodecs(frame: bytes, header: jpeg.Header | None, file: Any, syntax: Any) -> np.ndarray:
    """Returns the pixels of a JPEG Lossless, JPEG Extended or JPEG-LS frame, as they are coded.

    The decoders are given the array to fill: one of another shape, by their own reading of the
    frame, they refuse before they decode any of it.
    """
    try:
        import imagecodecs
    except ImportError:
        raise NoPixelDecoder(
            f"DICOM pixels that cannot be decoded here ({_cut(syntax.name.partition(',')[0])});"
            " install what does: pip install imagecodecs"
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
    except Exception as error:  # each codec has its own
        raise _undecodable(syntax, error) from None
    if str(syntax) in _JPEG_LOSSLESS and coded.flat[-1] == 2 ** (header.bits - 1):
        _expect_last_values(frame, coded)
    if file.PixelRepresentation == 0 or coded.ndim == 3:
        return coded
    signed = coded.view(f"i{coded.dtype.itemsize}")
    above = 8 * coded.dtype.itemsize - int(file.BitsStored)
    return (signed << above) >> above


def _expect_last_values(frame: bytes, coded: np.ndarray) -> None:
    """Raises PixelError where the data of a JPEG Lossless frame end before its last value.

    libjpeg then goes on with the middle of the range, and imagecodecs keeps its warning to itself.
    Another decoder goes on with something else.
    """
    import imagecodecs

    try:
        other = imagecodecs.ljpeg_decode(frame)
    except Exception:  # it takes fewer forms
        return
    if other.shape == coded.shape and not np.array_equal(other, coded):
        raise PixelError("damaged pixels in a DICOM file: they end too soon")


def _by_pydicom(file: Any, syntax: Any) -> tuple[np.ndarray, str]:
    """Returns the pixels of any other file, and the state of their colours."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise NoPixelDecoder(
            f"DICOM pixels that pydicom cannot decode ({_cut(syntax.name)})"
        ) from None
    # These, even where more is installed: then the pixels are the same everywhere.
    plugin = next((p for p in ("pillow", "pydicom") if p in decoder.available_plugins), "")
    spare = _spare_bits(file)
    options = {"correct_unused_bits": False} if spare else {}
    try:
        stored, properties = decoder.as_array(
            file, raw=True, index=0, decoding_plugin=plugin, **options
        )
    except Exception as error:  # each decoder has its own
        if not decoder.is_available:
            raise NoPixelDecoder(str(_undecodable(syntax, error))) from None
        raise _undecodable(syntax, error) from None
    if spare:
        above = 8 * stored.dtype.itemsize - int(file.BitsStored) - spare
        stored = (stored << above) >> (above + spare)  # of signed values, the sign moves along
    return stored, str(properties["photometric_interpretation"])


def _undecodable(syntax: Any, error: Exception) -> PixelError:
    return PixelError(
        f"DICOM pixels that cannot be decoded here ({_cut(syntax.name)}): {reason(error)}"
    )


def _spare_bits(file: Any) -> int:
    """Returns how many bits lie unused below the stored ones, as HighBit tells."""
    if file.get("HighBit") is None or not _bits_have_places(file):
        return 0
    return int(file.HighBit) + 1 - int(file.BitsStored)


def _bits_have_places(file: Any) -> bool:
    """Tells whether HighBit counts: decoders of the JPEG family give values at the low end."""
    syntax = file.file_meta.TransferSyntaxUID
    return not syntax.is_encapsulated or "RLE" in syntax.name


def _frame(file: Any) -> bytes:
    """Returns the first compressed frame; raises PixelError where there is none."""
    from pydicom.encaps import get_frame

    try:
        return bytes(get_frame(file.PixelData, 0, number_of_frames=1))
    except Exception as error:  # fragments can be broken in any way
        raise _undecodable(file.file_meta.TransferSyntaxUID, error) from None


def _checked(frame: bytes, file: Any, syntax: Any) -> jpeg.Header | None:
    """Checks the size of a compressed frame and, of JPEG, its cost and wholeness.

    Returns:
        Its header, if it is JPEG or JPEG-LS.

    Raises:
        PixelError: the frame is larger than its tags say, costs too much, or is damaged.
    """
    width, height = int(file.Columns), int(file.Rows)
    plain = width * height * int(file.SamplesPerPixel) * -(-int(file.BitsAllocated) // 8)
    if plain > LARGEST_DECODED:
        raise PixelError(
            f"too many pixels of {plain // (width * height)} bytes: {width} x {height}"
        )
    if "RLE" in syntax.name:
        # A literal run costs one byte in 128; more is no image.
        if len(frame) > 1.1 * plain + 1024:
            raise PixelError("DICOM pixels that cannot be decoded here: RLE of too many bytes")
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
    """Raises PixelError where segments of RLE hold more than their pixels, or are too finely cut.

    They are walked through without being decoded: each run tells its length.
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
            # A writer may fill up a segment with one more run.
            if length > pixels + 128 or runs > _MOST_RUNS:
                more = "more than its pixels" if runs <= _MOST_RUNS else "too many runs"
                raise PixelError(f"DICOM pixels that cannot be decoded here: RLE of {more}")


# Of all segments together, some seconds. A film of 28 million pixels has about 4 million.
_MOST_RUNS = 8_000_000


def _side_of_jpeg2000(frame: bytes) -> tuple[int, int] | None:
    """Returns (width, height) of a JPEG 2000 codestream, by its SIZ segment; None without one."""
    at = frame.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(frame) < at + 24:
        return None
    x1, y1, x0, y0 = (int.from_bytes(frame[at + i : at + i + 4], "big") for i in (8, 12, 16, 20))
    return x1 - x0, y1 - y0


def reason(error: Exception) -> str:
    """Returns the first line of what an exception says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _luma(stored: np.ndarray, state: str, white: int) -> np.ndarray:
    """Returns float32 [height, width] in [0, 1]: the luma of colours in one of their states.

    Y of YBR is the luma already; that of the PARTIAL ones goes from 16 to 235 (PS3.3, C.7.6.3.1.2).
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
        raise PixelError(f"a DICOM file of PALETTE COLOR with {file.BitsAllocated} bits a pixel")
    index = stored.astype(f"u{stored.dtype.itemsize}", copy=False)
    possible = np.arange(2 ** (8 * index.dtype.itemsize), dtype=index.dtype)
    colours = apply_color_lut(possible, file)[..., :3]
    table = (colours.astype(np.float64) @ LUMA / _white_of(colours)).astype(np.float32)
    shown: np.ndarray = table[index]
    return shown


def _monochrome(file: Any, stored: np.ndarray, turned: bool) -> np.ndarray:
    """Returns float32 [height, width] in [0, 1] of one sample a pixel."""
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
        """Returns the range of values among those that are no padding; fits tables to it."""
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
    # All values that can be stored, once; then each pixel takes its own from the table.
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    possible = (
        np.arange(2 ** (8 * stored.dtype.itemsize))
        .astype(unsigned)
        .view(stored.dtype.newbyteorder("="))
    )
    index = stored.astype(stored.dtype.newbyteorder("="), copy=False).view(unsigned)
    if display.modality is None and not padding(possible).any():
        inside = np.array([stored.min(), stored.max()])  # a slope keeps them the extremes
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
    """Returns float64 in [0, 1] of values by VOI LUT, window or range (PS3.3, C.11.2)."""
    if display.voi is not None:
        return display.voi.of(values) / display.voi.white
    if display.window is None:
        # Padding may lie outside the range; it is painted later.
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
    """Returns what tells padding among stored values (PS3.3, C.7.5.1.1.2)."""
    ends = [_as_stored(file, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    known = [end for end in ends if end is not None]
    if ends[0] is None:
        return lambda some: np.zeros(some.shape, bool)
    return lambda some: (some >= min(known)) & (some <= max(known))


def _as_stored(file: Any, name: str) -> int | None:
    """Returns a tag of padding as a value that can be stored; None without one.

    Writers confuse signed and unsigned 16-bit numbers, and numbers of fewer bits.
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
    """Returns sentences about tags of display that are of no use, and what was done instead."""
    kinds = _texts(file, "PhotometricInterpretation")
    return list(display_of(file).notes) if kinds[:1] in _MONOCHROME else []


def display_of(file: Any) -> Display:
    """Returns how the values of a file of one sample a pixel are to be shown."""
    found: list[str] = []
    slope = _one(file, "RescaleSlope", 1.0, lambda x: x != 0, found)
    intercept = _one(file, "RescaleIntercept", 0.0, lambda _: True, found)
    modality = _table(file, "ModalityLUTSequence", found, "; passed over")
    voi = _table(file, "VOILUTSequence", found, "; passed over")
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
        found.append(f"{name} {_quoted(texts[:1])} is of no use; taken as {absent:g}")
        return absent
    return number


def _window(file: Any, found: list[str]) -> tuple[str, float, float] | None:
    """Returns the first window of the file; None where there is none that can be used."""
    centres, widths = _texts(file, "WindowCenter"), _texts(file, "WindowWidth")
    if not centres and not widths:
        return None
    function = (_texts(file, "VOILUTFunction") or ["LINEAR"])[0].upper()
    if function not in _FUNCTIONS:
        found.append(f"VOILUTFunction {_quoted([function])} is unknown; taken as LINEAR")
        function = "LINEAR"
    centre, width = (_number(texts[0], found) if texts else None for texts in (centres, widths))
    narrowest = 1 if function == "LINEAR" else 1e-9
    if centre is None or width is None or width < narrowest:
        told = _quoted([*(centres[:1] or ["none"]), *(widths[:1] or ["none"])])
        found.append(f"a window (centre, width: {told}) of no use{_UNUSED}")
        return None
    return function, centre, width


def _texts(file: Any, name: str) -> list[str]:
    """Returns the values of a tag as they are written, whether they are numbers or not."""
    from pydicom.datadict import tag_for_keyword

    try:
        value = file.get_item(tag_for_keyword(name)).value
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace").split("\\")
        several = value if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]
        texts = [str(one).strip(" \0") for one in several if one is not None]
    except Exception:  # there is none, or it is wrong in some way
        return []
    return texts if any(texts) else []


def _number(text: str, found: list[str]) -> float | None:
    """Returns a decimal string as a number; None where it is no finite one of sensible size."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    if not math.isfinite(number) or abs(number) > 1e15 or "_" in text:
        return None
    if "," in text:
        found.append(f"{_quoted([text])} with a decimal comma; read as {number:g}")
    return number


def _quoted(texts: list[str]) -> str:
    """Returns what a tag says, cut short and without control characters."""
    return ", ".join(_cut(text, 20) for text in texts)


def _cut(text: str, most: int = 80) -> str:
    """Returns text of a file, which may be any, for a sentence."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def _table(file: Any, name: str, found: list[str], instead: str) -> Table | None:
    """Returns the first table of a sequence; None without one, or where it is broken.

    The data are words, or bytes packed two to a word with the lower one first (PS3.3, C.11.1.1).
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
