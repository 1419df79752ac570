"""What the pixels of DICOM files mean: states of colours, tables, windows, padding, layout.

The reference for tables and windows is written here from PS3.3, C.11, one value at a time.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from test_dicom import file_of

from cnnjax.data import dicom
from cnnjax.data.decode import DecodeError, decode

SIDE = 64
JPEG, JPEG_2000, RLE = (f"1.2.840.10008.1.2.{end}" for end in ("4.50", "4.90", "5"))

# Twelve bits, from 0 to 4095 in steps of one.
DEEP = np.arange(4096, dtype=np.uint16).reshape(SIDE, SIDE)
ROW, COLUMN = np.mgrid[0:SIDE, 0:SIDE]
COLOURS = np.stack([4 * COLUMN, 4 * ROW, 255 - 4 * COLUMN], -1).astype(np.uint8)


def levels(encoded: bytes) -> np.ndarray:
    return dicom.read(encoded, 10**8)


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


def bytes_of(file: Dataset) -> bytes:
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def colour_file(pixels: np.ndarray, kind: str, syntax: str = "", frame: bytes = b"") -> bytes:
    """Returns a DICOM file of uint8 [height, width, 3], as it is or as a compressed frame."""
    file = pydicom.dcmread(io.BytesIO(file_of(pixels[..., 0].copy())))
    file.SamplesPerPixel, file.PlanarConfiguration = 3, 0
    file.PhotometricInterpretation = kind
    file.PixelData = pixels.tobytes()
    if syntax == RLE:
        file.compress(RLE, generate_instance_uid=False)
    elif syntax:
        file.file_meta.TransferSyntaxUID = syntax
        file.PixelData = encapsulate([frame])
        file["PixelData"].VR = "OB"
        file["PixelData"].is_undefined_length = True
    return bytes_of(file)


def ycbcr(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


def frame_of(pixels: np.ndarray, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def with_adobe(jpeg: bytes, transform: int) -> bytes:
    """Returns a JPEG with Adobe's marker instead of JFIF's, which ends at byte 20."""
    return jpeg[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + jpeg[20:]


def subsampled(pixels: np.ndarray) -> np.ndarray:
    """Returns YBR_FULL_422 bytes: Y Y B R of each two pixels, made to fit the file's shape."""
    pairs = pixels.reshape(SIDE, -1, 2, 3).astype(int)
    chroma = pairs[..., 1:].mean(2).astype(int)
    packed = [pairs[:, :, 0, 0], pairs[:, :, 1, 0], chroma[..., 0], chroma[..., 1]]
    return np.stack(packed, -1).astype(np.uint8)


J2K = {"quality_mode": "dB", "quality_layers": [80], "no_jp2": True}
STATES = {
    "native RGB": lambda: colour_file(COLOURS, "RGB"),
    "native YBR_FULL": lambda: colour_file(ycbcr(COLOURS), "YBR_FULL"),
    "RLE RGB": lambda: colour_file(COLOURS, "RGB", RLE),
    "RLE YBR_FULL": lambda: colour_file(ycbcr(COLOURS), "YBR_FULL", RLE),
    "JPEG YBR_FULL_422": lambda: colour_file(
        COLOURS, "YBR_FULL_422", JPEG, frame_of(COLOURS, "JPEG", quality=98, subsampling=1)
    ),
    "JPEG YBR_FULL_422, Adobe": lambda: colour_file(
        COLOURS, "YBR_FULL_422", JPEG, with_adobe(frame_of(COLOURS, "JPEG", quality=98), 1)
    ),
    "JPEG RGB by tag, JFIF": lambda: colour_file(
        COLOURS, "RGB", JPEG, frame_of(COLOURS, "JPEG", quality=98)
    ),
    "JPEG RGB, Adobe": lambda: colour_file(
        COLOURS, "RGB", JPEG, frame_of(COLOURS, "JPEG", quality=98, keep_rgb=True)
    ),
    "JPEG RGB by tag, too short a marker of Adobe's": lambda: colour_file(
        COLOURS, "RGB", JPEG, rgb_by_nothing()
    ),
    "JPEG YBR_FULL by tag, RGB by its components": lambda: colour_file(
        COLOURS, "YBR_FULL", JPEG, rgb_by_components()
    ),
    "JPEG 2000 YBR_RCT": lambda: colour_file(
        COLOURS, "YBR_RCT", JPEG_2000, frame_of(COLOURS, "JPEG2000", no_jp2=True, mct=1)
    ),
    "JPEG 2000 YBR_ICT": lambda: colour_file(
        COLOURS,
        "YBR_ICT",
        JPEG_2000,
        frame_of(COLOURS, "JPEG2000", irreversible=True, mct=1, **J2K),
    ),
    "JPEG 2000 RGB": lambda: colour_file(
        COLOURS, "RGB", JPEG_2000, frame_of(COLOURS, "JPEG2000", no_jp2=True, mct=0)
    ),
    "JPEG 2000 YBR_FULL": lambda: colour_file(
        COLOURS, "YBR_FULL", JPEG_2000, frame_of(ycbcr(COLOURS), "JPEG2000", no_jp2=True, mct=0)
    ),
}


def rgb_by_nothing() -> bytes:
    """Returns a JPEG of RGB that libjpeg takes for YCbCr, as its components have other names."""
    jpeg = rgb_by_components()
    for name, number in zip(b"RGB", (1, 2, 3), strict=True):
        for rest in (b"\x11", b"\0"):  # in the frame's header, and in the scan's
            jpeg = jpeg.replace(bytes([name]) + rest, bytes([number]) + rest)
    return jpeg[:2] + b"\xff\xee\0\x0cAdobe\0\0\0\0\0" + jpeg[2:]


def rgb_by_components() -> bytes:
    """Returns a JPEG of RGB that only its components' names tell, R, G and B."""
    jpeg = frame_of(COLOURS, "JPEG", quality=98, keep_rgb=True)
    assert jpeg[2:4] == b"\xff\xee"
    return jpeg[:2] + jpeg[4 + int.from_bytes(jpeg[4:6], "big") :]


@pytest.mark.parametrize("state", STATES)
def test_colours_become_luma_once(state: str) -> None:
    shown = decode(STATES[state](), SIDE).astype(float)
    np.testing.assert_allclose(shown, luma(COLOURS), atol=7 if "JPEG YBR" in state else 4)
    assert np.abs(shown - luma(COLOURS)).mean() < 1


def test_native_422_becomes_luma_once() -> None:
    file = pydicom.dcmread(io.BytesIO(colour_file(COLOURS, "YBR_FULL_422")))
    file.PixelData = subsampled(ycbcr(COLOURS)).tobytes()
    np.testing.assert_allclose(decode(bytes_of(file), SIDE), luma(COLOURS), atol=2)


SHIPPED = [
    "SC_rgb_dcmtk_+eb+cr.dcm",
    "SC_rgb_dcmtk_+eb+cy+n1.dcm",
    "SC_rgb_dcmtk_+eb+cy+np.dcm",
    "SC_rgb_dcmtk_+eb+cy+s4.dcm",
    "SC_rgb_gdcm_KY.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_jpeg_lossy_gdcm.dcm",
    "SC_rgb_rle.dcm",
    "SC_rgb_rle_16bit.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_other_programs_files_show_the_same_bars(name: str) -> None:
    """Of red, green and blue, each followed by a lighter one, and of black to white."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    shown = 255 * levels(Path(path).read_bytes())[5::10, 50]
    np.testing.assert_allclose(shown, [76, 166, 150, 203, 29, 142, 0, 64, 192, 255], atol=1)


def lut(
    entries: list[int], first: int, bits: int, form: str, signed: bool = False, count: int = -1
) -> Dataset:
    """Returns a table as an item of a sequence, its data as words, packed bytes or numbers."""
    item = Dataset()
    length = len(entries) % 65536 if count < 0 else count
    vr = "SS" if signed else "US"
    item.add_new("LUTDescriptor", vr, [length, first, bits])
    if form == "numbers":
        item.add_new("LUTData", "US", entries)
    else:
        kind = np.uint8 if form == "packed" else np.uint16
        data = np.array(entries, kind).tobytes()
        item.add_new("LUTData", "OW", data + b"\0" * (len(data) % 2))
    return item


def looked_up(value: float, entries: list[int], first: int) -> int:
    """C.11.1.1.1: the first entry is of the first value and of all below, the last of all above."""
    if value <= first:
        return entries[0]
    return entries[min(int(value) - first, len(entries) - 1)]


RISING = [i // 16 for i in range(4096)]
TABLES = {
    "8 bits in words": (RISING, 0, 8, "words", 255),
    "8 bits in numbers": (RISING, 0, 8, "numbers", 255),
    "8 bits packed": (RISING, 0, 8, "packed", 255),
    "8 bits packed, an odd number": (RISING[:4001], 0, 8, "packed", 255),
    "12 bits": ([4095 - i for i in range(4096)], 0, 12, "words", 4095),
    "16 bits": ([16 * i for i in range(4096)], 0, 16, "words", 65535),
    "16 bits that end at 4095": (list(range(4096)), 0, 16, "words", 4095),
    "8 bits that end at 1023": ([i // 4 for i in range(4096)], 0, 8, "words", 1023),
    "from 1000 on": ([2 * i for i in range(2000)], 1000, 12, "numbers", 4095),
    "0 for 65536 entries": ([i % 4096 for i in range(65536)], 0, 12, "words", 4095),
}


@pytest.mark.parametrize("name", TABLES)
def test_voi_tables(name: str) -> None:
    entries, first, bits, form, white = TABLES[name]
    encoded = file_of(DEEP, VOILUTSequence=Sequence([lut(entries, first, bits, form)]))
    expected = [looked_up(v, entries, first) / white for v in range(4096)]
    np.testing.assert_allclose(levels(encoded).ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("form", ["words", "packed", "numbers"])
def test_modality_tables_come_before_the_window(form: str) -> None:
    entries = [(i * i) // 70000 for i in range(4096)]  # to 239
    encoded = file_of(
        DEEP,
        ModalityLUTSequence=Sequence([lut(entries, 0, 8, form)]),
        WindowCenter=100,
        WindowWidth=101,
    )
    expected = [np.clip((entries[v] - 99.5) / 100 + 0.5, 0, 1) for v in range(4096)]
    np.testing.assert_allclose(levels(encoded).ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("tag", [True, False], ids=["SS", "US"])
@pytest.mark.parametrize("kind", ["ModalityLUTSequence", "VOILUTSequence"])
def test_the_first_value_of_signed_pixels_is_signed(kind: str, tag: bool) -> None:
    signed = (DEEP.astype(np.int16) - 2048).astype(np.int16)
    entries = [255 - i // 16 for i in range(4096)]
    first = -2048 if tag else 65536 - 2048
    item = lut(entries, first, 8, "words", signed=tag)
    encoded = file_of(signed, PixelRepresentation=1, **{kind: Sequence([item])})
    expected = np.array([looked_up(v - 2048, entries, -2048) for v in range(4096)])
    np.testing.assert_allclose(levels(encoded).ravel(), expected / 255, atol=1e-6)


def test_a_table_of_a_big_endian_file() -> None:
    file = pydicom.dcmread(io.BytesIO(file_of(DEEP)))
    file.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.2"
    item = lut([4095 - i for i in range(4096)], 0, 12, "words")
    item["LUTData"].value = np.array(4095 - np.arange(4096), ">u2").tobytes()
    file.VOILUTSequence = Sequence([item])
    file.PixelData = DEEP.astype(">u2").tobytes()
    fresh = Dataset()  # one that was read is not written in another order
    fresh.update({element.tag: element for element in file})
    fresh.file_meta = file.file_meta
    np.testing.assert_allclose(levels(bytes_of(fresh)), (4095 - DEEP) / 4095, atol=1e-6)


def test_a_broken_table_is_passed_over_and_told() -> None:
    encoded = file_of(
        DEEP,
        VOILUTSequence=Sequence([lut([1, 2, 3], 0, 12, "words", count=4096)]),
        WindowCenter=2048,
        WindowWidth=4096,
    )
    np.testing.assert_allclose(levels(encoded), DEEP / 4095, atol=1e-6)
    assert dicom.doubts(encoded) == ["VOILUTSequence cannot be read; ignored"]


def windowed(x: float, function: str, centre: float, width: float) -> float:
    """PS3.3, C.11.2.1.2.1 and C.11.2.1.3, to [0, 1]."""
    if function == "SIGMOID":
        return float(1 / (1 + np.exp(-4 * (x - centre) / width)))
    if function == "LINEAR_EXACT":
        if x <= centre - width / 2:
            return 0
        return 1 if x > centre + width / 2 else (x - centre) / width + 0.5
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0
    if x > centre - 0.5 + (width - 1) / 2:
        return 1
    return (x - (centre - 0.5)) / (width - 1) + 0.5


@pytest.mark.parametrize(
    ("function", "width"),
    [
        *(("LINEAR", width) for width in (1, 1.5, 2, 400, 9000)),
        *(("LINEAR_EXACT", width) for width in (0.25, 1, 2, 400, 9000)),
        *(("SIGMOID", width) for width in (0.25, 1, 400, 9000)),
    ],
)
@pytest.mark.parametrize("centre", [2000.0, 2000.5])
def test_window_functions_at_every_legal_width(function: str, width: float, centre: float) -> None:
    encoded = file_of(
        DEEP, WindowCenter=str(centre), WindowWidth=str(width), VOILUTFunction=function
    )
    with np.errstate(over="ignore"):
        expected = [windowed(x, function, centre, width) for x in range(4096)]
    np.testing.assert_allclose(levels(encoded).ravel(), expected, atol=1e-6)
    assert dicom.doubts(encoded) == []


def raw_text(encoded: bytes, tag: int, text: str) -> bytes:
    """Returns the file with text in a tag that pydicom would not write there; it is 8 bytes now."""
    file = pydicom.dcmread(io.BytesIO(encoded))
    place = file[tag].file_tell
    assert file[tag].VR == "DS"
    assert len(text) <= 8
    return encoded[:place] + text.ljust(8).encode() + encoded[place + 8 :]


CENTRE, WIDTH, SLOPE, INTERCEPT = 0x00281050, 0x00281051, 0x00281053, 0x00281052
RANGE = DEEP / 4095
WINDOW = np.clip((DEEP - 1999.5) / 999 + 0.5, 0, 1)


@pytest.mark.parametrize("text", ["NaN", "inf", "-Infini", "NONE", "1e300", "", "1_0", "--"])
@pytest.mark.parametrize("tag", [CENTRE, WIDTH])
def test_a_window_of_no_use_gives_way_to_the_range_and_is_told(tag: int, text: str) -> None:
    encoded = file_of(DEEP, WindowCenter="2000.000", WindowWidth="1000.000")
    encoded = raw_text(encoded, tag, text)
    np.testing.assert_allclose(levels(encoded), RANGE, atol=1e-6)
    (told,) = dicom.doubts(encoded)
    assert told.startswith("the window (centre, width: ")
    assert told.endswith("is invalid; the range of the values is used")
    assert told.isprintable()


@pytest.mark.parametrize(("function", "width"), [("LINEAR", 0.5), ("SIGMOID", 0), ("LINEAR", -5)])
def test_an_illegal_width_gives_way_to_the_range(function: str, width: float) -> None:
    encoded = file_of(DEEP, WindowCenter=9, WindowWidth=width, VOILUTFunction=function)
    np.testing.assert_allclose(levels(encoded), RANGE, atol=1e-6)
    assert len(dicom.doubts(encoded)) == 1


def test_a_decimal_comma_is_read_and_told() -> None:
    encoded = file_of(DEEP, WindowCenter="2000.000", WindowWidth="1000.000")
    encoded = raw_text(encoded, CENTRE, "2000,0")
    np.testing.assert_allclose(levels(encoded), WINDOW, atol=1e-6)
    assert dicom.doubts(encoded) == ["2000,0 has a decimal comma; 2000 is used"]


@pytest.mark.parametrize("text", ["NaN", "inf", "0", "0.0", "NONE"])
def test_a_slope_of_no_use_is_one_and_told(text: str) -> None:
    encoded = file_of(
        DEEP,
        WindowCenter=2000,
        WindowWidth=1000,
        RescaleSlope="1.000000",
        RescaleIntercept="0",
    )
    encoded = raw_text(encoded, SLOPE, text)
    np.testing.assert_allclose(levels(encoded), WINDOW, atol=1e-6)
    assert dicom.doubts(encoded) == [f"RescaleSlope {text} is invalid; 1 is used"]


@pytest.mark.parametrize(
    ("tags", "values"),
    [
        ({"RescaleSlope": None, "RescaleIntercept": None}, DEEP),
        ({"RescaleSlope": 2}, 2.0 * DEEP),
        ({"RescaleIntercept": 100}, DEEP + 100.0),
        ({"RescaleSlope": -1, "RescaleIntercept": 4000}, 4000.0 - DEEP),
    ],
)
def test_slope_and_intercept_each_hold_without_the_other(
    tags: dict[str, Any], values: np.ndarray
) -> None:
    encoded = file_of(DEEP, WindowCenter=2000, WindowWidth=1000, **tags)
    expected = np.clip((values - 1999.5) / 999 + 0.5, 0, 1)
    np.testing.assert_allclose(levels(encoded), expected, atol=1e-6)
    assert dicom.doubts(encoded) == []


def test_doubts_on_display_reach_whoever_predicts() -> None:
    encoded = file_of(DEEP, WindowCenter=9, WindowWidth=0, ViewPosition="LL")
    assert [told[:12] for told in dicom.doubts(encoded)] == ["a lateral vi", "the window ("]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2000, "WindowWidth": 1000}])
@pytest.mark.parametrize(
    ("value", "limit", "signed", "written"),
    [
        (0, None, False, 0),
        (4095, None, False, 4095),
        (-2000, None, True, -2000),
        (-2000, None, True, 63536),  # as a number without a sign
        (0, 30, False, 0),
        (4095, 4000, False, 4095),
    ],
)
def test_padding_is_black_and_no_part_of_the_range(
    value: int, limit: int | None, signed: bool, written: int, window: dict[str, Any], turned: bool
) -> None:
    film = (1000 + DEEP[:, ::-1] // 3).astype(np.int16 if signed else np.uint16)
    padded = film.copy()
    padded[:20] = value
    padded[5] = value if limit is None else limit
    vr = "SS" if written < 0 else "US"
    layout = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1} if signed else {}
    file = pydicom.dcmread(io.BytesIO(file_of(padded, **layout, **window)))
    file.add_new("PixelPaddingValue", vr, written)
    if limit is not None:
        file.add_new("PixelPaddingRangeLimit", vr, limit)
    file.PhotometricInterpretation = "MONOCHROME1" if turned else "MONOCHROME2"
    inside = film[20:].astype(float)
    low, high = inside.min(), inside.max()
    expected = (inside - low) / (high - low)
    if window:
        expected = np.clip((inside - 1999.5) / 999 + 0.5, 0, 1)
    shown = levels(bytes_of(file))
    assert shown[:20].max() == 0
    np.testing.assert_allclose(shown[20:], 1 - expected if turned else expected, atol=1e-6)


@pytest.mark.parametrize("written", [63536, 2096])  # in 16 bits without a sign, or in 12
def test_padding_of_signed_values_of_fewer_bits(written: int) -> None:
    film = (DEEP // 2).astype(np.int16)
    film[:20] = -2000
    file = pydicom.dcmread(io.BytesIO(file_of(film, PixelRepresentation=1)))
    file.add_new("PixelPaddingValue", "US", written)
    shown = levels(bytes_of(file))
    assert shown[:20].max() == 0
    low = film[20:].min()
    np.testing.assert_allclose(shown[20:], (film[20:] - low) / (2047 - low), atol=1e-6)


def test_a_film_of_padding_alone_is_black() -> None:
    file = file_of(np.zeros((8, 8), np.uint16), PixelPaddingValue=0, WindowCenter=1, WindowWidth=9)
    assert levels(file).max() == 0


@pytest.mark.parametrize("syntax", ["", RLE])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "high"), [(12, 15), (12, 13), (10, 15)])
def test_bits_that_are_not_at_the_low_end_are_moved(
    bits: int, high: int, signed: bool, syntax: str
) -> None:
    kind = np.int16 if signed else np.uint16
    values = (DEEP >> (12 - bits)).astype(kind) - (2 ** (bits - 1) if signed else 0)
    spare = high + 1 - bits
    stored = (values.astype(np.int64) << spare).astype(np.uint16) & (2 ** (high + 1) - 1)
    stored = stored.astype(np.uint16) | 1  # what lies below is of no account
    tags = {"BitsStored": bits, "HighBit": high, "PixelRepresentation": int(signed)}
    file = pydicom.dcmread(io.BytesIO(file_of(stored, **tags)))
    if syntax:
        file.compress(syntax, generate_instance_uid=False)
    expected = (values - float(values.min())) / float(np.ptp(values))
    np.testing.assert_allclose(levels(bytes_of(file)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("tags", "named"),
    [
        ({"PresentationLUTShape": "INVERSE"}, "MONOCHROME2 with the Presentation LUT Shape"),
        (
            {"PresentationLUTShape": "IDENTITY", "PhotometricInterpretation": "MONOCHROME1"},
            "MONOCHROME1 with the Presentation LUT Shape",
        ),
        ({"PhotometricInterpretation": "RGB"}, "RGB with 1 samples per pixel"),
        ({"SamplesPerPixel": 3, "PlanarConfiguration": 0}, "MONOCHROME2 with 3 samples per pixel"),
        ({"HighBit": 7}, "12 bits up to bit 7 in 16"),
        ({"BitsStored": 20, "HighBit": 19}, "20 bits up to bit 19 in 16"),
    ],
)
def test_tags_that_contradict_each_other_are_named(tags: dict[str, Any], named: str) -> None:
    with pytest.raises(DecodeError, match=named):
        decode(file_of(DEEP, **tags), 8)


def test_the_high_bit_of_a_jpeg_is_of_no_account() -> None:
    file = pydicom.dcmread(io.BytesIO(colour_file(COLOURS, "RGB", JPEG, rgb_by_components())))
    file.HighBit = 3
    np.testing.assert_allclose(decode(bytes_of(file), SIDE), luma(COLOURS), atol=4)


@pytest.mark.parametrize(("kind", "shape"), [("1", "INVERSE"), ("2", "IDENTITY"), ("2", "")])
def test_a_presentation_shape_that_agrees_changes_nothing(kind: str, shape: str) -> None:
    tags = {"PhotometricInterpretation": f"MONOCHROME{kind}"}
    plain, shaped = (
        levels(file_of(DEEP, **tags, **t)) for t in ({}, {"PresentationLUTShape": shape})
    )
    np.testing.assert_array_equal(plain, shaped)


def test_a_damaged_jpeg_in_a_dicom_file_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    frame = frame_of(noise, "JPEG", quality=90)
    cut = frame[: len(frame) * 2 // 3] + b"\xff\xd9"
    with pytest.raises(DecodeError, match="damaged pixels in a DICOM file"):
        decode(colour_file(noise, "YBR_FULL_422", JPEG, cut), SIDE)


def test_frames_larger_than_their_tags_are_refused() -> None:
    for form, syntax in (("JPEG", JPEG), ("JPEG2000", JPEG_2000)):
        options = {"no_jp2": True} if form == "JPEG2000" else {}
        frame = frame_of(np.kron(COLOURS, np.ones((4, 4, 1), np.uint8)), form, **options)
        with pytest.raises(DecodeError, match="pixels are 256 x 256, not 64 x 64"):
            decode(colour_file(COLOURS, "RGB", syntax, frame), SIDE)


def test_no_tag_of_display_lets_a_warning_through() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dicom.doubts(raw_text(file_of(DEEP, WindowCenter="1.000000"), CENTRE, "x"))


PALETTE = "PaletteColorLookupTable"
EIGHT = DEEP.astype(np.uint8)  # 0 to 255, again and again
PALETTES = {
    "16 bits": (16, 257 * np.arange(256), EIGHT),
    "16 bits, the values in the high bytes": (16, 256 * np.arange(256), EIGHT),
    "16 bits that end at 255": (16, np.arange(256), EIGHT),
    "8 bits": (8, np.arange(256, dtype=np.uint8), EIGHT),
    "8 bits in words": (8, np.arange(256), EIGHT),
    "from 10 on": (16, 655 * np.arange(100), np.clip(EIGHT.astype(int) - 10, 0, 99) * 655 / 257),
}


@pytest.mark.parametrize("name", PALETTES)
def test_palettes(name: str) -> None:
    bits, entries, shown = PALETTES[name]
    file = pydicom.dcmread(io.BytesIO(file_of(EIGHT, PhotometricInterpretation="PALETTE COLOR")))
    data = entries if entries.dtype == np.uint8 else entries.astype("<u2")
    for colour in ("Red", "Green", "Blue"):
        first = 10 if name == "from 10 on" else 0
        file.add_new(f"{colour}{PALETTE}Descriptor", "US", [len(entries), first, bits])
        file.add_new(f"{colour}{PALETTE}Data", "OW", data.tobytes())
    np.testing.assert_allclose(decode(bytes_of(file), SIDE), shown, atol=1)


@pytest.mark.parametrize("tag", ["SamplesPerPixel", "PixelRepresentation"])
def test_a_tag_of_layout_that_is_left_out_has_its_common_value(tag: str) -> None:
    np.testing.assert_allclose(levels(file_of(DEEP, **{tag: None})), RANGE, atol=1e-6)


@pytest.mark.parametrize("absent", [True, False])
def test_colours_by_pixel_or_by_plane(absent: bool) -> None:
    file = pydicom.dcmread(io.BytesIO(colour_file(COLOURS, "RGB")))
    if absent:
        del file.PlanarConfiguration
    else:
        file.PlanarConfiguration = 1
        file.PixelData = COLOURS.transpose(2, 0, 1).tobytes()
    np.testing.assert_allclose(decode(bytes_of(file), SIDE), luma(COLOURS), atol=1)


def test_overlays_above_the_stored_bits_are_no_part_of_the_pixels() -> None:
    overlay = (ROW % 2 << 12).astype(np.uint16)
    np.testing.assert_allclose(levels(file_of(DEEP | overlay)), RANGE, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_signed_values_without_their_sign_above_the_stored_bits(turned: bool) -> None:
    stored = (DEEP.astype(np.int64) - 2048 & 0xFFF).astype(np.uint16)
    kind = "MONOCHROME1" if turned else "MONOCHROME2"
    encoded = file_of(stored, PixelRepresentation=1, PhotometricInterpretation=kind)
    np.testing.assert_allclose(levels(encoded), 1 - RANGE if turned else RANGE, atol=1e-6)


def test_a_jpeg_of_other_samples_than_its_tags_say_is_named() -> None:
    frame = frame_of(COLOURS, "JPEG")
    file = pydicom.dcmread(io.BytesIO(colour_file(COLOURS, "RGB", JPEG, frame)))
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    with pytest.raises(DecodeError, match="a DICOM file whose pixels have 3 samples, not 1"):
        decode(bytes_of(file), SIDE)


@pytest.mark.parametrize("text", ["+2000", "2.0E3", "2000\\9", " 2000", "2000.", "2000\0"])
def test_a_decimal_string_in_any_of_its_forms(text: str) -> None:
    encoded = file_of(DEEP, WindowCenter="2000.000", WindowWidth="1000.000")
    encoded = raw_text(encoded, CENTRE, text)
    np.testing.assert_allclose(levels(encoded), WINDOW, atol=1e-6)
    assert dicom.doubts(encoded) == []
