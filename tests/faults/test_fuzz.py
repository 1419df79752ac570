"""Bytes and names changed at random: an image or one clear error, nothing else, and in time.

Each test goes on for as many seconds as the environment variable FUZZ_SECONDS says (`make fuzz`);
without it, over a few examples that are always the same.
"""

from __future__ import annotations

import io
import os
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import hypothesis
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from test_dicom import file_of

from cnnjax.data import dicom
from cnnjax.data.decode import DecodeError, decode
from cnnjax.data.index import read_index
from cnnjax.errors import InputError

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
# Seconds of the processor for one small file. CharLS takes up to 2.7 to see that some changed
# JPEG-LS frames are damaged, whatever their size; others take thousandths.
SLOWEST = 6.0


def fuzz(check: Callable[[Any], None], examples: st.SearchStrategy[Any]) -> None:
    """Checks examples, for SECONDS or a few that are always the same; shrinks one that fails."""
    ends, rounds = time.monotonic() + SECONDS, 0
    while True:
        chosen = settings(
            max_examples=40,
            deadline=None,
            database=None,
            derandomize=not SECONDS,
            suppress_health_check=list(HealthCheck),
        )
        run = chosen(hypothesis.given(examples)(check))
        if SECONDS:
            run = hypothesis.seed(time.time_ns())(run)
        run()
        rounds += 1
        if time.monotonic() >= ends:
            print(f"{40 * rounds:,} examples")
            return


FILM = (np.add.outer(np.arange(48), 2 * np.arange(48)) % 200).astype(np.uint8)


def saved(form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(FILM).save(out, form, **options)
    return out.getvalue()


def deep_png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(FILM.astype(np.uint16) * 256).save(out, "PNG")
    return out.getvalue()


PICTURES = [
    saved("JPEG"),
    saved("JPEG", progressive=True),
    saved("PNG"),
    deep_png(),
]


def dicoms() -> list[bytes]:
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = FILM.astype(np.uint16) * 16
    frames = {
        "4.50": (FILM, saved("JPEG")),
        "4.57": (deep, imagecodecs.jpeg8_encode(deep, bitspersample=12, lossless=True)),
        "4.80": (deep, imagecodecs.jpegls_encode(deep)),
        "4.90": (FILM, saved("JPEG2000", no_jp2=True)),
    }
    found = [file_of(deep, WindowCenter=2000, WindowWidth=1000, PatientAge="003Y")]
    rle = pydicom.dcmread(io.BytesIO(found[0]))
    rle.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    for syntax, (pixels, frame) in frames.items():
        file = pydicom.dcmread(io.BytesIO(file_of(pixels)))
        file.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.{syntax}"
        file.PixelData = encapsulate([frame])
        found.append(bytes_of(file))
    return [*found, bytes_of(rle)]


def bytes_of(file: pydicom.Dataset) -> bytes:
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


@st.composite
def changed(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """A file with a few bytes overwritten, put in, taken out, or cut off at its end."""
    found = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 5))):
        # Headers are where most is decided.
        at = draw(st.integers(0, min(len(found), 700)) | st.integers(0, len(found)))
        how = draw(st.sampled_from(["over", "in", "out", "number", "cut"]))
        if how == "cut":
            del found[max(at, 1) :]
        elif how == "out":
            del found[at : at + draw(st.integers(1, 40))]
        elif how == "in":
            found[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif how == "number":
            number = draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
            few = number.to_bytes(4, draw(st.sampled_from(["little", "big"])))
            found[at : at + 4] = few
        else:
            put = draw(st.binary(min_size=1, max_size=4))
            found[at : at + len(put)] = put
    return bytes(found)


def expect_image_or_error(encoded: bytes) -> None:
    began = time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode(encoded, 16)
        except DecodeError as error:
            said = str(error)
            assert 0 < len(said.splitlines()[0]) < 300
        else:
            assert (image.shape, image.dtype) == ((16, 16), np.uint8)
            if dicom.is_dicom(encoded):
                dicom.doubts(encoded)  # as predict asks of what was decoded
    assert time.thread_time() - began < SLOWEST


def test_pictures() -> None:
    fuzz(expect_image_or_error, changed(PICTURES))


def test_dicom_files() -> None:
    fuzz(expect_image_or_error, changed(dicoms()))


def test_dicom_patients(tmp_path: Path) -> None:
    def check(encoded: bytes) -> None:
        path = tmp_path / "film.dcm"
        path.write_bytes(encoded)
        for given in (encoded, path):
            try:
                found = dicom.patient_of(given)
            except (OSError, dicom.DicomError):
                continue
            assert found is None or len(found) == 16

    fuzz(check, changed(dicoms()))


def expect_index_or_error(root: Path) -> None:
    """Reads all that an index lists; only the errors that are promised may come."""
    began = time.thread_time()
    try:
        index = read_index(root)
    except InputError as error:
        said = str(error)
        assert str(root) in said
        return
    for example in index.examples:
        parts = PurePosixPath(example.name).parts
        assert ".." not in parts
        assert not example.name.startswith("/")
        try:
            content = index.source.read(example.name)
        except OSError:
            continue
        assert isinstance(content, bytes | np.ndarray)
    assert time.thread_time() - began < SLOWEST


NAMES = st.lists(
    st.lists(
        st.sampled_from(["train", "Test", "val", "NORMAL", "PNEUMONIA", "..", ".", "x", "a.png"])
        | st.text(alphabet="ab./\\: é\N{COMBINING ACUTE ACCENT}\r\n", max_size=6),
        min_size=1,
        max_size=5,
    ).map("/".join),
    max_size=8,
)
WHOLE = ["train/NORMAL/a.png", "train/PNEUMONIA/b.png"]


def zip_of(names: list[str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name in filter(None, names):
            archive.writestr(name, PICTURES[2])
    return out.getvalue()


def test_names_in_zips(tmp_path: Path) -> None:
    def check(names: list[str]) -> None:
        path = tmp_path / "films.zip"
        path.write_bytes(zip_of([*WHOLE, *names]))
        expect_index_or_error(path)

    fuzz(check, NAMES)


def test_names_in_trees(tmp_path_factory: pytest.TempPathFactory) -> None:
    def check(names: list[str]) -> None:
        root = tmp_path_factory.mktemp("tree")
        for name in (*WHOLE, *names):
            parts = [part for part in name.split("/") if part not in ("", ".", "..")]
            if parts:
                path = root.joinpath(*parts)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(PICTURES[2])
                except OSError:  # a folder of this name, or a file in its way
                    continue
        expect_index_or_error(root)

    fuzz(check, NAMES)


def test_zips(tmp_path: Path) -> None:
    files = [zip_of(WHOLE), zip_of(WHOLE, zipfile.ZIP_STORED), zip_of(WHOLE, zipfile.ZIP_LZMA)]

    def check(content: bytes) -> None:
        path = tmp_path / "films.zip"
        path.write_bytes(content)
        expect_index_or_error(path)

    fuzz(check, changed(files))


def test_npz_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 255, (6, 8, 8), np.uint8),
        "train_labels": np.arange(6)[:, None] % 2,
    }
    files = []
    for save in (np.savez, np.savez_compressed):
        out = io.BytesIO()
        save(out, **arrays)  # type: ignore[operator]
        files.append(out.getvalue())

    def check(content: bytes) -> None:
        path = tmp_path / "films.npz"
        path.write_bytes(content)
        expect_index_or_error(path)

    fuzz(check, changed(files))
