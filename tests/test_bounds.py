"""Files made to cost far more than they weigh are refused at once, in little memory."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from test_decode import chunk, encode, png_of
from test_dicom import file_of
from test_grayscale import RLE, colour_file, frame_of

from cnnjax.data import grayscale
from cnnjax.data.decode import DecodeError, decode
from cnnjax.data.index import read_index
from cnnjax.errors import InputError

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 2**20
JPEG_LS = "1.2.840.10008.1.2.4.80"
ZEROS = bytes(MIB)
ALLOWED_MIB, ALLOWED_SECONDS = 200, 1.0

# Run in a process of its own: tells of each input what came of it, the processor's time, and the
# highest memory above that of the process before.
CHILD = """
import json, sys, threading, time
from pathlib import Path
import pydicom.pixels  # its import is no cost of a file
from cnnjax.data.bounds import read_file
from cnnjax.data.decode import decode
from cnnjax.data.index import read_index

def memory(key):
    text = Path("/proc/self/status").read_text()
    return int(text.partition(key)[2].split()[0]) / 1024

for kind, path in json.loads(sys.argv[1]):
    Path("/proc/self/clear_refs").write_text("5")
    before, start, began = memory("VmRSS:"), time.process_time(), time.monotonic()
    try:
        if kind == "file":
            decode(read_file(Path(path)), 224)
        elif kind == "pipe":
            read_file(Path(path), pipes=True)
        else:
            index = read_index(path)
            for example in index.examples:
                index.source.read(example.name)
        said = "taken"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    cost = time.process_time() - start, time.monotonic() - began, memory("VmHWM:") - before
    print(json.dumps([said, *cost]))
"""


@functools.cache
def deflated(mib: int) -> bytes:
    """Returns a raw deflate stream of so many MiB of zeros."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"".join(packer.compress(ZEROS) for _ in range(mib)) + packer.flush()


def deflated_dicom(mib: int) -> bytes:
    """Returns a deflated DICOM file whose pixels are so many MiB of zeros."""
    plain = file_of(np.zeros((8, 8), np.uint16))
    file = pydicom.dcmread(io.BytesIO(plain))
    file.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    # The group length, at byte 140, counts what follows it in the header.
    ends = [144 + int.from_bytes(x[140:144], "little") for x in (plain, out.getvalue())]
    tags = plain[ends[0] : plain.index(b"\xe0\x7f\x10\0")]
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    pixels = b"\xe0\x7f\x10\0OW\0\0" + (mib * MIB).to_bytes(4, "little")
    body = b"".join(packer.compress(part) for part in (tags, pixels, *[ZEROS] * mib))
    return out.getvalue()[: ends[1]] + body + packer.flush()


def encapsulated(syntax: str, frame: bytes, side: int) -> bytes:
    """Returns a DICOM file of side x side pixels of 8 bits whose one frame is this."""
    file = pydicom.dcmread(io.BytesIO(file_of(np.zeros((side, side), np.uint8))))
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate([frame])
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def rle_of(segment: bytes) -> bytes:
    return np.array([1, 64, *[0] * 14], "<u4").tobytes() + segment


def many_components(side: int, count: int) -> bytes:
    """Returns a black JPEG-LS of so many components, each a scan of its own."""
    imagecodecs = pytest.importorskip("imagecodecs")
    one = imagecodecs.jpegls_encode(np.zeros((side, side), np.uint8))
    frame, scan = one.index(b"\xff\xf7"), one.index(b"\xff\xda")
    each = b"".join(bytes([i + 1, 0x11, 0]) for i in range(count))
    header = b"\xff\xf7" + (8 + 3 * count).to_bytes(2, "big") + one[frame + 4 : frame + 9]
    scans = (one[scan : scan + 5] + bytes([i + 1]) + one[scan + 6 : -2] for i in range(count))
    return one[:frame] + header + bytes([count]) + each + b"".join(scans) + b"\xff\xd9"


def black_png(width: int, height: int, colour: int, *between: bytes) -> bytes:
    packer = zlib.compressobj(1)
    row = bytes(1 + width)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png_of(width, height, 8, colour, *between, chunk(b"IDAT", data))


def progressive(side: int) -> bytes:
    """Returns a black progressive JPEG of all the scans that there can be, hardly a byte each.

    Its one code of length 1 means "no difference" of DC, and a run of 2^14 blocks and more of AC.
    """
    blocks = (side // 8) ** 2

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + (2 + len(body)).to_bytes(2, "big") + body

    def packed(bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def scan(low: int, approximation: int, bits: str) -> bytes:
        return segment(0xDA, bytes([1, 1, 0, low, low, approximation])) + packed(bits)

    edge = side.to_bytes(2, "big")
    out = [b"\xff\xd8", segment(0xDB, bytes([0]) + bytes([1] * 64))]
    out.append(segment(0xC2, b"\x08" + edge + edge + bytes([1, 1, 0x11, 0])))
    for table, symbol in ((0x00, 0), (0x10, 0xE0)):
        out.append(segment(0xC4, bytes([table, 1]) + bytes(15) + bytes([symbol])))
    out.append(scan(0, 0, "0" * blocks))
    run = ("0" + "1" * 14) * -(-blocks // 32767)
    for low in range(1, 64):
        out.append(scan(low, 13, run))
        out += [scan(low, (high << 4) | (high - 1), run) for high in range(13, 0, -1)]
    return b"".join(out) + b"\xff\xd9"


def lying_zip(path: Path, said: int, mib: int) -> None:
    """Writes a zip of an entry that holds more than its headers say, twice where a size stands."""
    name, data = "train/PNEUMONIA/bomb.png", deflated(mib)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        out.writestr("train/NORMAL/a.png", b"")
        out.writestr(name, data)
    raw = bytearray(path.read_bytes())
    for signature, method, size in ((b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)):
        at = raw.rindex(signature)
        raw[at + method : at + method + 2] = (8).to_bytes(2, "little")
        raw[at + size : at + size + 4] = said.to_bytes(4, "little")
    path.write_bytes(raw)


def flat_npz(path: Path, mib: int) -> None:
    """Writes an .npz whose images are gigabytes of zeros by their header, and in the zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        with out.open("train_images.npy", "w") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (mib, 1024, 1024)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(mib):
                member.write(ZEROS)
        with out.open("train_labels.npy", "w") as member:
            np.lib.format.write_array(member, np.arange(mib) % 2)


@linux
def test_bombs_are_refused_in_a_second_and_little_memory(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    with (tmp_path / "sparse.jpeg").open("wb") as file:
        file.truncate(6 * 2**30)
    for pipe in ("pipe.jpeg", "tree/train/NORMAL/pipe.jpeg"):
        (tmp_path / pipe).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / pipe)
    write("tree/train/NORMAL/a.png", encode(Image.new("L", (8, 8))))
    write("tree/train/PNEUMONIA/b.png", encode(Image.new("L", (8, 8))))
    lying_zip(tmp_path / "lying.zip", 1000, 240)
    lying_zip(tmp_path / "honest.zip", 240 * MIB, 240)
    flat_npz(tmp_path / "flat.npz", 240)

    seen = [
        ("file", write("scans.jpeg", progressive(4000)), "a JPEG of more than 25 scans over 4000"),
        ("file", write("clear.png", black_png(7900, 7900, 3, *PALETTE)), "of 4 bytes"),
        ("file", write("large.png", black_png(9000, 9000, 0)), "too many pixels: 9000 x 9000"),
        ("file", write("narrow.png", black_png(2, 90_000, 0)), "too long and narrow: 2 x 90000"),
        ("file", write("deflated.dcm", deflated_dicom(240)), "when inflated"),
        (
            "file",
            write("rle.dcm", encapsulated(RLE, rle_of(b"\x81\0" * 2_000_000), 2000)),
            "RLE with more than its pixels",
        ),
        (
            "file",
            write("many.dcm", encapsulated(JPEG_LS, many_components(500, 99), 500)),
            "have 99 samples, not 1",
        ),
        ("file", str(tmp_path / "sparse.jpeg"), "larger than 128 MiB"),
        ("file", str(tmp_path / "pipe.jpeg"), "not a regular file"),
        ("pipe", str(tmp_path / "pipe.jpeg"), "a pipe into which nothing is written"),
        ("pipe", "/dev/zero", "larger than 128 MiB"),
        ("index", str(tmp_path / "lying.zip"), "broken in the zip"),
        ("index", str(tmp_path / "honest.zip"), "larger than 128 MiB"),
        ("index", str(tmp_path / "flat.npz"), "it would take 240 MiB"),
        ("index", str(tmp_path / "tree"), "taken"),
    ]
    told = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([case[:2] for case in seen])],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(found) == len(seen), told.stderr
    for (_, path, expected), (said, seconds, waited, mib) in zip(seen, found, strict=True):
        print(f"{Path(path).name:14} {seconds:6.2f} s {waited:6.2f} s {mib:6.0f} MiB  {said}")
        assert expected in said
        assert seconds < ALLOWED_SECONDS, path
        assert mib < ALLOWED_MIB, path


PALETTE = chunk(b"PLTE", bytes(3)), chunk(b"tRNS", bytes(1))


def test_what_is_no_file_is_left_out_of_a_tree_by_name(tmp_path: Path) -> None:
    for name in ("NORMAL", "PNEUMONIA"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.png").touch()
    os.mkfifo(tmp_path / "train" / "NORMAL" / "b.png")
    index = read_index(tmp_path)
    assert index.left_out == (("train/NORMAL/b.png", "not a regular file"),)
    assert len(index.examples) == 2


def test_many_frames_are_refused_unread() -> None:
    with pytest.raises(DecodeError, match="1000000000 frames"):
        decode(file_of(NumberOfFrames=10**9), 8)


def test_rle_of_more_bytes_than_pixels_is_refused_undecoded() -> None:
    file = pydicom.dcmread(io.BytesIO(colour_file(np.zeros((8, 8, 3), np.uint8), "RGB", RLE)))
    segment = b"\x81\0" * 50_000
    header = np.array([3, 64, 64 + len(segment), 64 + 2 * len(segment), *[0] * 12], "<u4").tobytes()
    file.PixelData = encapsulate([header + 3 * segment])
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    with pytest.raises(DecodeError, match="too many bytes of RLE"):
        decode(out.getvalue(), 8)


def test_rle_that_is_too_finely_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of 128 stands for nothing, and a film of them takes long to walk through."""
    fine = encapsulated(RLE, rle_of(b"\x80" * 3000 + b"\x81\0" * 32), 64)
    assert not decode(fine, 8).any()
    monkeypatch.setattr(grayscale, "_MOST_RUNS", 2000)
    with pytest.raises(DecodeError, match="RLE with too many runs"):
        decode(fine, 8)


def test_the_pixels_of_a_frame_are_counted_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    frame = imagecodecs.jpegls_encode(np.zeros((32, 32), np.uint8))
    given = []

    def watched(encoded: bytes, out: np.ndarray) -> np.ndarray:
        given.append(out.shape)
        return np.asarray(decoded(encoded, out=out))

    decoded = imagecodecs.jpegls_decode
    monkeypatch.setattr(imagecodecs, "jpegls_decode", watched)
    decode(encapsulated(JPEG_LS, frame, 32), 8)
    assert given == [(32, 32)]
    monkeypatch.setattr(imagecodecs, "jpegls_decode", lambda *_, **__: pytest.fail("decoded"))
    frame = imagecodecs.jpegls_encode(np.zeros((5000, 5000, 3), np.uint8))
    small = colour_file(np.zeros((2, 2, 3), np.uint8), "RGB", JPEG_LS, frame)
    file = pydicom.dcmread(io.BytesIO(small))
    file.Rows = file.Columns = 5000
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    with pytest.raises(DecodeError, match="too many pixels of 3 samples: 5000 x 5000"):
        decode(out.getvalue(), 8)


def test_common_progressive_jpegs_are_taken() -> None:
    large = np.kron(np.arange(64, dtype=np.uint8)[:, None] * 4, np.ones((40, 2560), np.uint8))
    encoded = frame_of(large, "JPEG", progressive=True)
    assert np.abs(decode(encoded, 64)[:, 0].astype(int) - np.arange(64) * 4).max() <= 2


def test_an_npz_whose_header_tells_of_more_than_there_is(tmp_path: Path) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 100, 100)}
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
        with out.open("train_images.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)
        with out.open("train_labels.npy", "w") as member:
            np.lib.format.write_array(member, np.arange(2))
    with pytest.raises(InputError, match=r"train_images cannot be read .* more than the data"):
        read_index(tmp_path / "a.npz")


def test_entries_of_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    """A block of bzip2 is inflated whole, and can be gigabytes."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as out:
        for name in ("NORMAL", "PNEUMONIA"):
            out.writestr(f"train/{name}/a.png", b"x" * 1000)
    source = read_index(tmp_path / "a.zip").source
    with pytest.raises(OSError, match="not compressed with deflate"):
        source.read("train/NORMAL/a.png")
