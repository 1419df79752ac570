"""Every kind of image becomes the gray that a viewer would show; every other a reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnnjax.data.decode import DecodeError, decode

RAMP = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8) * 2


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


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
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match="too many pixels"):
        decode(bomb, 32)
