"""Every kind of image becomes the gray that a viewer would show; every other a reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnjax.data import jpeg
from cnnjax.data.decode import DecodeError, decode

RAMP = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8) * 2


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, depth: int, colour: int, *chunks: bytes) -> bytes:
    """Returns a PNG of these chunks between its first and its last."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IEND", b"")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "PA"])
def test_modes_of_png(mode: str) -> None:
    image = Image.fromarray(RAMP)
    image = image.convert("RGBA").convert("LA") if mode == "LA" else image.convert(mode)
    encoded = encode(image if mode != "PA" else Image.fromarray(RAMP).convert("P"))
    np.testing.assert_allclose(decode(encoded, 64).astype(int), RAMP, atol=1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_modes_of_jpeg(mode: str) -> None:
    encoded = encode(Image.fromarray(RAMP).convert(mode), "JPEG", quality=100)
    np.testing.assert_allclose(decode(encoded, 64).astype(int), RAMP, atol=4)


def test_colour_is_weighted_as_luma() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert decode(encode(red), 8)[0, 0] == round(0.299 * 255)


def test_transparency_shows_the_black_around_a_film() -> None:
    image = Image.new("RGBA", (8, 8), (200, 200, 200, 255))
    image.paste((200, 200, 200, 0), (0, 0, 8, 4))
    square = decode(encode(image), 8)
    assert square[0, 0] == 0
    assert square[7, 7] == 200


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    square = decode(encode(Image.fromarray(deep)), 64)
    np.testing.assert_allclose(square, deep / 257, atol=0.51)


def test_one_bit() -> None:
    image = Image.fromarray(RAMP > 120)
    np.testing.assert_array_equal(decode(encode(image), 64), np.where(RAMP > 120, 255, 0))


def test_exif_orientation_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for display
    image = np.zeros((64, 64), np.uint8)
    image[:32] = 255  # the top half is bright: turned, the right half
    square = decode(encode(Image.fromarray(image), "JPEG", quality=100, exif=exif), 16)
    assert square[:, 9:].min() > 240
    assert square[:, :7].max() < 15


def test_large_jpegs_reduce_to_their_area_mean() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (12, 16)).astype(np.uint8)
    large = np.kron(coarse, np.ones((100, 100), np.uint8))
    square = decode(encode(Image.fromarray(large), "JPEG", quality=95), 48)
    expected = np.asarray(Image.fromarray(large).resize((48, 48), Image.Resampling.BOX)).astype(int)
    assert np.abs(square - expected).mean() < 6
    assert abs(square.mean() - large.mean()) < 1


def test_arrays_are_resized_too() -> None:
    square = decode(np.stack([RAMP] * 3, -1), 32)
    assert square.shape == (32, 32)
    assert square.dtype == np.uint8
    np.testing.assert_allclose(square.astype(int), RAMP[::2, ::2] + 2, atol=2)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty file"),
        (b"not an image", "neither JPEG nor PNG nor DICOM"),
        (encode(Image.fromarray(RAMP), "GIF"), "neither JPEG nor PNG nor DICOM"),
        (encode(Image.fromarray(RAMP), "TIFF"), "neither JPEG nor PNG nor DICOM"),
        (encode(Image.fromarray(RAMP), "JPEG")[:-200], "broken image"),
        (encode(Image.fromarray(RAMP))[:60], "broken"),
    ],
    ids=["empty", "text", "gif", "tiff", "short jpeg", "short png"],
)
def test_reasons(encoded: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode(encoded, 32)


@pytest.mark.parametrize("side", [12_000, 40_000])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    bomb = png_of(side, side, 8, 0, chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(DecodeError, match="too many pixels"):
        decode(bomb, 32)


def damaged(jpeg: bytes, kind: str) -> bytes:
    """Returns a JPEG whose compressed data are cut, overwritten or longer, with its end marker."""
    start, noise = len(jpeg) // 2, np.random.default_rng(1).integers(0, 255, 60, np.uint8).tobytes()
    noise = noise.replace(b"\xff", b"\xfe")
    return {
        "cut": jpeg[: len(jpeg) * 4 // 5] + b"\xff\xd9",
        "cut early": jpeg[: len(jpeg) * 3 // 10] + b"\xff\xd9",
        "overwritten": jpeg[:start] + noise + jpeg[start + len(noise) :],
        "inserted": jpeg[:start] + noise + jpeg[start:],
        "removed": jpeg[:start] + jpeg[start + 200 :],
    }[kind]


@pytest.mark.parametrize("kind", ["cut", "cut early", "overwritten", "inserted", "removed"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [16, 100])
def test_damaged_jpegs_are_refused(kind: str, mode: str, progressive: bool, size: int) -> None:
    film = np.random.default_rng(0).integers(60, 200, (200, 180)).astype(np.uint8)
    whole = encode(Image.fromarray(film).convert(mode), "JPEG", progressive=progressive)
    decode(whole, size)
    with pytest.raises(DecodeError, match=r"Corrupt JPEG data|Premature end|some scans"):
        decode(damaged(whole, kind), size)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [5, 30, 64])
def test_jpegs_have_pillows_pixels(orientation: int, size: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    film = np.random.default_rng(0).integers(0, 255, (100, 130, 3)).astype(np.uint8)
    encoded = encode(Image.fromarray(film), "JPEG", quality=80, exif=exif)
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("L", (size, size))
        expected = ImageOps.exif_transpose(image).convert("L")
    expected = expected.resize((size, size), Image.Resampling.HAMMING)
    np.testing.assert_array_equal(decode(encoded, size), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_jpegs_are_judged_as_by_pillow(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(Image.fromarray(RAMP[:16, :24]).convert(mode), "JPEG", restart_marker_rows=1)
    scan = encoded.index(b"\xff\xda") + 14
    changed = [encoded, *(encoded[:at] for at in range(scan))]
    for at in range(scan):
        changed += [encoded[:at] + bytes([byte]) + encoded[at + 1 :] for byte in (0, 3, 17, 255)]

    def outcome(file: bytes) -> bytes | str:
        try:
            return decode(file, 8).tobytes()
        except DecodeError as error:
            return str(error)

    found = [outcome(file) for file in changed]
    assert jpeg.plain_size(encoded) == (24, 16)
    monkeypatch.setattr(jpeg, "plain_size", lambda file: None)
    assert found == [outcome(file) for file in changed]


def test_a_warning_that_is_no_damage_refuses_nothing() -> None:
    """Of an Adobe marker of a colour transform that nobody knows; the pixels are fine."""
    plain = encode(Image.fromarray(np.stack([RAMP] * 3, -1)), "JPEG", quality=100)
    marked = plain[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09" + plain[20:]
    np.testing.assert_allclose(decode(marked, 64).astype(int), RAMP, atol=4)


LONG = zlib.compress(b"text " * 400_000)
ANCILLARY = {
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"text " * 400_000),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + LONG),
    "many": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "checksum": chunk(b"tEXt", b"Comment\0text")[:-1] + b"?",
    "not compressed": chunk(b"zTXt", b"Comment\0\0text"),
}


@pytest.mark.parametrize("kind", ANCILLARY)
@pytest.mark.parametrize("last", [False, True], ids=["before", "behind"])
def test_texts_and_profiles_keep_no_png_from_being_read(kind: str, last: bool) -> None:
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in RAMP)))
    chunks = (data, ANCILLARY[kind]) if last else (ANCILLARY[kind], data)
    np.testing.assert_array_equal(decode(png_of(64, 64, 8, 0, *chunks), 64), RAMP)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_long_xmp_still_turns_the_image(compressed: bool) -> None:
    xmp = b'<x tiff:Orientation="3"/>' + b"text " * 400_000
    body = b"XML:com.adobe.xmp\0" + (b"\1" if compressed else b"\0") + b"\0\0\0"
    text = chunk(b"iTXt", body + (zlib.compress(xmp) if compressed else xmp))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in RAMP)))
    turned = decode(png_of(64, 64, 8, 0, text, data), 64)
    np.testing.assert_array_equal(turned, RAMP[::-1, ::-1])


def test_a_bad_checksum_of_pixels_is_called_by_its_name() -> None:
    data = chunk(b"IDAT", zlib.compress(bytes(65 * 64)))
    with pytest.raises(DecodeError, match="broken image: a wrong checksum of IDAT"):
        decode(png_of(64, 64, 8, 0, data[:-1] + b"?"), 64)
    film = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    damaged = bytearray(encode(Image.fromarray(film), compress_level=0))
    damaged[2000] ^= 1
    with pytest.raises(DecodeError, match="broken image: a wrong checksum of IDAT"):
        decode(bytes(damaged), 64)
    with pytest.raises(DecodeError, match="broken header of a PNG"):
        decode(encode(Image.fromarray(RAMP))[:20] + bytes(40), 64)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 3], ids=["gray", "palette"])
def test_a_transparent_value_is_black_at_every_depth(depth: int, colour: int) -> None:
    if (depth, colour) == (16, 3):
        pytest.skip("palettes have up to 8 bits")
    highest = 2**depth - 1
    values = np.linspace(0, highest, 64 * 64).astype(np.uint16).reshape(64, 64)
    values[0] = highest
    if depth == 16:
        rows = [b"\0" + row.astype(">u2").tobytes() for row in values]
    else:
        bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = [b"\0" + np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in bits]
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    grays = [round(255 * v / highest) for v in range(highest + 1)] if depth < 16 else []
    if colour == 3:
        extra = chunk(b"PLTE", bytes(g for gray in grays for g in [gray] * 3))
        extra += chunk(b"tRNS", bytes([255] * highest + [0]))
    else:
        extra = chunk(b"tRNS", highest.to_bytes(2, "big"))
    shown = decode(png_of(64, 64, depth, colour, extra, data), 64).astype(int)
    expected = np.where(values == highest, 0, np.rint(255 * values.astype(float) / highest))
    np.testing.assert_allclose(shown, expected, atol=1)
    assert shown[0].max() == 0


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [4, 6], ids=["gray", "RGB"])
def test_alpha_is_laid_over_black_at_every_depth(depth: int, colour: int) -> None:
    channels = np.stack([RAMP] * (1 if colour == 4 else 3) + [RAMP[:, ::-1]], -1).astype(np.uint16)
    stored = channels if depth == 8 else channels * 257
    rows = [b"\0" + row.astype("u1" if depth == 8 else ">u2").tobytes() for row in stored]
    shown = decode(png_of(64, 64, depth, colour, chunk(b"IDAT", zlib.compress(b"".join(rows)))), 64)
    expected = RAMP.astype(float) * RAMP[:, ::-1] / 255
    np.testing.assert_allclose(shown, expected, atol=1)


def test_a_transparent_colour_of_sixteen_bits_is_black() -> None:
    pixels = np.stack([RAMP, RAMP, RAMP], -1).astype(">u2") * 257
    pixels[10:20] = (51_200, 25_600, 12_800)
    rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels]
    key = chunk(b"tRNS", struct.pack(">HHH", 51_200, 25_600, 12_800))
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    shown = decode(png_of(64, 64, 16, 2, key, data), 64)
    assert shown[10:20].max() == 0
    np.testing.assert_allclose(shown[30:].astype(int), RAMP[30:], atol=1)


def test_a_transparent_colour_is_black() -> None:
    pixels = np.stack([RAMP, RAMP, RAMP], -1)
    pixels[10:20] = (200, 100, 50)
    shown = decode(encode(Image.fromarray(pixels), transparency=(200, 100, 50)), 64)
    assert shown[10:20].max() == 0
    np.testing.assert_allclose(shown[30:].astype(int), RAMP[30:], atol=1)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_fewer_bits_in_sixteen_fill_the_range(bits: int) -> None:
    deep = np.linspace(0, 2**bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected = deep * 255.0 / (2**bits - 1)
    np.testing.assert_allclose(decode(encode(Image.fromarray(deep)), 64), expected, atol=0.51)


@pytest.mark.parametrize("mode", ["RGBA", "P", "16 bits"])
def test_images_read_in_strips_have_the_same_bits(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 70, 4)).astype(np.uint8)
    if mode == "16 bits":
        encoded = encode(Image.fromarray(pixels.view(np.uint16)[..., 0].copy()))
    elif mode == "RGBA":
        encoded = encode(Image.fromarray(pixels))
    else:
        encoded = encode(
            Image.fromarray(pixels[..., :3]).convert("P"), transparency=bytes(range(200))
        )
    whole = decode(encoded, 24)
    monkeypatch.setattr("cnnjax.data.bounds._STRIP", 500)
    monkeypatch.setattr("cnnjax.data.decode._HELD", 0)
    np.testing.assert_array_equal(decode(encoded, 24), whole)


def interlaced(pixels: np.ndarray) -> bytes:
    """Returns the rows of Adam7's seven passes, before they are compressed."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in [*passes, (1, 0, 2, 1)]]
    return b"".join(b"\0" + row.tobytes() for part in parts for row in part)


@pytest.mark.parametrize("height", [64, 63])
@pytest.mark.parametrize("adam7", [False, True])
@pytest.mark.parametrize("missing", [0, 1, 20])
def test_rows_that_are_missing_from_a_png_are_no_black_ones(
    missing: int, adam7: bool, height: int
) -> None:
    """Its compressed data are whole, and end too soon."""
    film = RAMP[:height].copy()
    film[-1] = 0  # black, and there
    rows = interlaced(film) if adam7 else b"".join(b"\0" + row.tobytes() for row in film)
    rows = rows[: len(rows) - 65 * missing]
    header = struct.pack(">IIBBBBB", 64, height, 8, 0, 0, 0, int(adam7))
    data = chunk(b"IDAT", zlib.compress(rows)[:5]) + chunk(b"IDAT", zlib.compress(rows)[5:])
    encoded = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")
    if missing:
        with pytest.raises(DecodeError, match="broken image: rows at its end are missing"):
            decode(encoded, 64)
    else:
        decode(encoded, 64)


def test_a_palette_that_lacks_a_colour_is_damaged() -> None:
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in RAMP)))
    colours = chunk(b"PLTE", bytes(range(253)) * 3)
    decode(png_of(64, 64, 8, 3, colours, data), 64)
    with pytest.raises(DecodeError, match="broken image: a colour that its palette lacks"):
        decode(png_of(64, 64, 8, 3, chunk(b"PLTE", bytes(252 * 3)), data), 64)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_exif_that_cannot_be_read_turns_nothing(form: str) -> None:
    encoded = encode(Image.fromarray(RAMP), form, exif=b"Exif\0\0garbage!")
    np.testing.assert_allclose(decode(encoded, 64).astype(int), RAMP, atol=4)


@pytest.mark.parametrize("scans", [1, 2, -1])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_without_all_of_its_scans_is_refused(mode: str, scans: int) -> None:
    """Cut between two scans and closed: libjpeg shows what there is, and does not warn."""
    film = np.random.default_rng(0).integers(60, 200, (64, 64)).astype(np.uint8)
    whole = encode(Image.fromarray(film).convert(mode), "JPEG", progressive=True, quality=95)
    decode(whole, 64)
    starts = [i for i in range(len(whole)) if whole.startswith(b"\xff\xda", i)]
    cut = whole[: starts[scans]] + b"\xff\xd9"
    with pytest.raises(DecodeError, match="some scans of the JPEG are missing"):
        decode(cut, 64)
