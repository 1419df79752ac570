"""DICOM files as pydicom ships them and as we write them, against what the standard says."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from cnnjax import cli, phantom
from cnnjax.data import dicom
from cnnjax.data.decode import DecodeError, MissingDecoder, decode
from cnnjax.data.index import read_index
from cnnjax.data.patients import block_folds, grouped_folds
from cnnjax.errors import InputError

RAMP = np.add.outer(np.arange(40), 10 * np.arange(30)).astype(np.uint16)  # 0 to 329


def file_of(pixels: np.ndarray = RAMP, **tags: Any) -> bytes:
    """Returns the bytes of a DICOM file of one gray image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = 8 * pixels.dtype.itemsize
    file.BitsStored = file.BitsAllocated if pixels.dtype == np.uint8 else 12
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, 0
    file.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def test_a_tag_that_cannot_be_read_says_nothing() -> None:
    good = file_of(PatientID="ABC", Modality="CT")
    assert dicom.doubts(good) == ["not a radiograph by its modality (CT)"]
    assert dicom.patient_of(good) is not None
    # Three bytes that are to be numbers of two.
    bad = good.replace(b"CS\x02\0CT", b"US\x02\0CT").replace(b"LO\x04\0ABC ", b"FL\x03\0ABC")
    assert len(bad) == len(good) - 1
    assert dicom.patient_of(bad) is None
    assert dicom.doubts(bad) in ([], ["not a radiograph by its modality (21571)"])


def levels(encoded: bytes) -> np.ndarray:
    return dicom.read(encoded, 10**8)


def test_without_a_window_the_range_of_the_image_is_shown() -> None:
    np.testing.assert_allclose(levels(file_of()), RAMP / RAMP.max(), atol=1e-6)
    eight = RAMP.astype(np.uint8)
    np.testing.assert_allclose(levels(file_of(eight)), eight / eight.max(), atol=1e-6)


def test_monochrome1_is_turned_over() -> None:
    turned = levels(file_of(PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(turned, 1 - RAMP / RAMP.max(), atol=1e-6)


def test_rescale_comes_before_the_window() -> None:
    """PS3.3, C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5), clipped."""
    found = levels(
        file_of(RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[150, 9], WindowWidth=[201, 9])
    )
    expected = np.clip((2.0 * RAMP - 100 - 149.5) / 200 + 0.5, 0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected.min() == 0
    assert expected.max() == 1


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR_EXACT", np.clip((RAMP - 150.0) / 200 + 0.5, 0, 1)),
        ("SIGMOID", 1 / (1 + np.exp(-4 * (RAMP - 150.0) / 200))),
    ],
)
def test_other_window_functions(function: str, expected: np.ndarray) -> None:
    encoded = file_of(WindowCenter=150, WindowWidth=200, VOILUTFunction=function)
    np.testing.assert_allclose(levels(encoded), expected, atol=1e-6)


def test_a_square_of_a_dicom_file_is_that_of_the_same_png() -> None:
    eight = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(eight).save(png, "PNG")
    ours, theirs = decode(file_of(eight), 24), decode(png.getvalue(), 24)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


CODECS = importlib.util.find_spec("imagecodecs") is not None

SHIPPED = {
    "CT_small.dcm": None,
    "MR_small_RLE.dcm": None,
    "MR_small_bigendian.dcm": None,
    "JPEG2000.dcm": None,
    "SC_rgb_jpeg_dcmtk.dcm": None,
    "examples_palette.dcm": None,
    "image_dfl.dcm": None,
    "SC_rgb_rle_2frame.dcm": "2 frames; save one frame as a file",
    "rtplan.dcm": "without an image",
    "MR_small_jpeg_ls_lossless.dcm": None if CODECS else "cannot be decoded here (JPEG-LS Lossless",
    "SC_rgb_jpeg_gdcm.dcm": None
    if CODECS
    else "JPEG Lossless); install their decoder with: pip install i",
    "MR_truncated.dcm": "cannot be decoded here",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_files_that_pydicom_ships(name: str) -> None:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    encoded, refused = Path(path).read_bytes(), SHIPPED[name]
    if refused is not None:
        with pytest.raises(DecodeError) as caught:
            decode(encoded, 32)
        assert refused in str(caught.value)
        # What another decoder may read is tried again by the next start.
        assert isinstance(caught.value, MissingDecoder) == ("JPEG" in refused)
        assert "\n" not in str(caught.value)
        return
    found = decode(encoded, 32)
    assert found.shape == (32, 32)
    assert np.ptp(found) > 100
    file = pydicom.dcmread(path)
    if file.PhotometricInterpretation == "MONOCHROME2" and "WindowWidth" not in file:
        stored = file.pixel_array.astype(float)
        assert np.corrcoef(levels(encoded).ravel(), stored.ravel())[0, 1] > 0.999


def test_broken_and_too_large_files_are_refused() -> None:
    with pytest.raises(DecodeError, match=r"broken DICOM file|without an image"):
        decode(file_of()[:200], 8)
    with pytest.raises(dicom.DicomError, match="too many pixels: 30 x 40"):
        dicom.read(file_of(), 1000)


@pytest.mark.parametrize("tag", ["Rows", "BitsStored", "PhotometricInterpretation"])
def test_a_file_without_a_tag_that_it_needs_is_refused(tag: str) -> None:
    with pytest.raises(DecodeError, match="DICOM"):
        decode(file_of(**{tag: None}), 8)


def test_a_lookup_table_is_of_rescaled_values() -> None:
    table = Dataset()
    table.LUTDescriptor = [100, 500, 12]  # from 500 on
    table.LUTData = np.arange(4000, 3900, -1, np.uint16).tobytes()
    rescale = {"RescaleSlope": 1, "RescaleIntercept": 500}
    shown = levels(file_of(RAMP[:8, :8], VOILUTSequence=Sequence([table]), **rescale))
    np.testing.assert_allclose(shown, (4000 - RAMP[:8, :8]) / 4095, atol=1e-6)


@pytest.mark.parametrize(
    ("age", "known"), [("003Y", True), ("067Y", False), ("018M", True), ("002W", False), ("", True)]
)
def test_other_ages_are_doubted(age: str, known: bool) -> None:
    told = dicom.doubts(file_of(PatientAge=age))
    assert (told == []) is known
    assert known or told[0].startswith(f"a patient aged {age}")


def test_doubts_are_told_by_tags() -> None:
    assert dicom.doubts(file_of(Modality="DX", ViewPosition="PA", BodyPartExamined="CHEST")) == []
    (lateral,) = dicom.doubts(file_of(ViewPosition="LL"))
    assert lateral.startswith("a lateral view (LL)")
    told = dicom.doubts(file_of(Modality="CT", BodyPartExamined="HAND"))
    assert told == ["not a radiograph by its modality (CT)", "not of the chest (HAND)"]


@pytest.mark.parametrize(
    ("age", "known"),
    [
        ("51", False),
        ("3", True),
        ("51Y", False),
        ("4Y", True),
        ("051 Y", False),
        ("30M", True),
        ("3.5", True),
        ("51 YEARS", False),
        ("adult", True),
    ],
)
def test_ages_may_be_written_freely(age: str, known: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, on how it is written
        encoded = file_of(PatientAge=age)
    assert (dicom.doubts(encoded) == []) is known


@pytest.mark.parametrize(
    ("view", "frontal"),
    [
        ("LAT", False),
        ("XTABLE LATERAL", False),
        ("X-TABLE", False),
        ("CROSS TABLE LAT", False),
        ("L LAT", False),
        ("LLAT", False),
        ("LEFT LATERAL", False),
        ("lateral", False),
        ("RLD", False),
        ("PA", True),
        ("AP", True),
        ("AP SUPINE", True),
        ("BILATERAL", True),
    ],
)
def test_views_may_be_written_freely(view: str, frontal: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = file_of(ViewPosition=view)
    told = dicom.doubts(encoded)
    assert (told == []) is frontal
    assert frontal or told[0].startswith(f"a lateral view ({view.upper()})")


@pytest.mark.parametrize(
    ("part", "chest"),
    [
        ("CHEST PA", True),
        ("TORAX", True),
        ("T\u00d3RAX", True),
        ("THORAX AP", True),
        ("CHEST_2VIEW", True),
        ("PORT CHEST", True),
        ("LUNGS", True),
        ("T SPINE", False),
        ("THORACIC SPINE", False),
        ("CHESTABDOMEN", False),
        ("HAND", False),
        ("-", True),
    ],
)
def test_body_parts_may_be_written_freely(part: str, chest: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = file_of(SpecificCharacterSet="ISO_IR 192", BodyPartExamined=part)
    assert (dicom.doubts(encoded) == []) is chest


def without(encoded: bytes, preamble: bool, header: bool) -> bytes:
    """Returns a DICOM file without its preamble, or its header with the transfer syntax."""
    start = 144 + int.from_bytes(encoded[140:144], "little")
    kept = encoded[:132] if not preamble else b""
    return kept + (encoded[start:] if header else encoded[132:])


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
@pytest.mark.parametrize(("preamble", "header"), [(True, False), (True, True), (False, True)])
def test_files_without_preamble_or_header_are_read(
    preamble: bool, header: bool, syntax: str, tmp_path: Path
) -> None:
    file = pydicom.dcmread(io.BytesIO(file_of(PatientID="7", ViewPosition="LL")))
    fresh = Dataset()
    fresh.update({element.tag: element for element in file})
    fresh.file_meta = file.file_meta
    fresh.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    fresh.save_as(out, enforce_file_format=True)
    encoded = without(out.getvalue(), preamble, header)
    assert dicom.is_dicom(encoded)
    np.testing.assert_array_equal(levels(encoded), levels(file_of()))
    assert dicom.doubts(encoded)[0].startswith("a lateral view")
    (tmp_path / "film").write_bytes(encoded)
    assert dicom.patient_of(tmp_path / "film") == dicom.patient_of(encoded) is not None


def test_compressed_pixels_without_a_transfer_syntax_are_refused_by_name() -> None:
    path = get_testdata_file("SC_rgb_rle.dcm", download=False)
    assert isinstance(path, str)
    encoded = without(Path(path).read_bytes(), preamble=False, header=True)
    with pytest.raises(DecodeError, match="compressed pixels without a Transfer Syntax UID"):
        decode(encoded, 8)


@pytest.mark.parametrize(
    "other", [b"", b"\x08\0", b"\x08\0\5\0CS" + b"x" * 20, b"\x02\0 text " * 30]
)
def test_what_begins_like_dicom_and_is_none(other: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(other, 8)


@pytest.mark.skipif(not CODECS, reason="imagecodecs is not installed")
def test_jpeg_lossless_is_read_with_imagecodecs() -> None:
    path = get_testdata_file("SC_rgb_jpeg_gdcm.dcm", download=False)
    assert isinstance(path, str)
    shown = 255 * levels(Path(path).read_bytes())[5::10, 50]
    np.testing.assert_allclose(shown, [76, 166, 150, 203, 29, 142, 0, 64, 192, 255], atol=1)


@pytest.mark.skipif(not CODECS, reason="imagecodecs is not installed")
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", ["4.57", "4.70", "4.51", "4.80"])
def test_twelve_bits_of_other_jpegs_are_read_with_imagecodecs(syntax: str, signed: bool) -> None:
    import imagecodecs

    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    if syntax == "4.80":
        frame = imagecodecs.jpegls_encode(values)
    else:
        how = {"level": 100} if syntax == "4.51" else {"lossless": True}
        frame = imagecodecs.jpeg8_encode(values, bitspersample=12, **how)
    file = pydicom.dcmread(io.BytesIO(file_of(values, PixelRepresentation=int(signed))))
    file.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.{syntax}"
    file.PixelData = encapsulate([frame])
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    expected = values.astype(np.int64)
    if signed:  # its upper half are the numbers below 0
        expected = np.where(expected > 2047, expected - 4096, expected) + 2048
    atol = 1e-6 if syntax != "4.51" else 0.01
    far = np.abs(levels(out.getvalue()) - expected / 4095) > atol
    assert far.mean() < (0.01 if syntax == "4.51" else 1e-9)  # at the jump, lossy values wrap


@pytest.mark.skipif(not CODECS, reason="imagecodecs is not installed")
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("syntax", ["4.57", "4.70", "4.51", "4.80"])
@pytest.mark.parametrize("part", [0.5, 0.95])
def test_other_jpegs_that_are_cut_are_refused(syntax: str, part: float, closed: bool) -> None:
    import imagecodecs

    if syntax == "4.51" and closed:
        pytest.skip("nothing tells: the decoder of JPEG of 12 bits keeps its warnings to itself")
    values = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    values[-1, -1] = 2048  # which is what libjpeg fills up with
    if syntax == "4.80":
        frame = imagecodecs.jpegls_encode(values)
    else:
        how = {"level": 100} if syntax == "4.51" else {"lossless": True}
        frame = imagecodecs.jpeg8_encode(values, bitspersample=12, **how)
    file = pydicom.dcmread(io.BytesIO(file_of(values)))
    file.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.{syntax}"
    for whole in (True, False):
        cut = frame[: int(len(frame) * part)] + (b"\xff\xd9" if closed else b"")
        file.PixelData = encapsulate([frame if whole else cut])
        out = io.BytesIO()
        file.save_as(out, enforce_file_format=True)
        if whole:
            decode(out.getvalue(), 64)
    with pytest.raises(DecodeError, match=r"damaged pixels in a DICOM file|cannot be decoded here"):
        decode(out.getvalue(), 64)


def test_a_decoder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    path = get_testdata_file("SC_rgb_jpeg_gdcm.dcm", download=False)
    assert isinstance(path, str)
    with pytest.raises(
        MissingDecoder, match=r"JPEG Lossless\); install their decoder with: pip install im"
    ):
        decode(Path(path).read_bytes(), 8)


def test_patients_that_all_have_one_identifier_are_the_cause_of_no_folds(tmp_path: Path) -> None:
    for name in ("NORMAL", "PNEUMONIA"):
        for number in range(6):
            path = tmp_path / "train" / name / f"{number}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file_of(PatientID="ANONYMOUS"))
    examples = read_index(tmp_path).examples
    cause = r"all 6 images of class 0 have the same PatientID \(0010,0020\), which some programs"
    with pytest.raises(InputError, match=cause):
        grouped_folds(examples, 3, 0)


def test_the_patient_is_a_hash_of_the_identifier(tmp_path: Path) -> None:
    a, b, same = (file_of(PatientID=i, PatientName="Doe^Jane") for i in ("7", "8", " 7"))
    assert dicom.patient_of(a) == dicom.patient_of(same) != dicom.patient_of(b)
    assert dicom.patient_of(file_of()) is None
    for i, encoded in enumerate((a, b, same)):
        for name in ("NORMAL", "PNEUMONIA"):
            path = tmp_path / "train" / name / f"{name}{i}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    examples = read_index(tmp_path).examples
    assert len({example.patient for example in examples}) == 2
    assert all(len(example.patient) == 16 for example in examples)
    with pytest.raises(InputError, match="blocks needs patient numbers"):
        block_folds(examples, 2)


def test_predict_judges_a_dicom_file_and_passes_its_doubts_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, lateral = tmp_path / "film.dcm", tmp_path / "lateral.dcm"
    chest = phantom.draw(7, 0, 0, "normal").image
    film.write_bytes(file_of(chest, Modality="DX", PatientID="7", PatientName="Doe^Jane"))
    lateral.write_bytes(file_of(chest, ViewPosition="LL"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", str(film), str(lateral)])
    assert ended.value.code == 0
    screen = capsys.readouterr()
    plain, doubted = (json.loads(line) for line in screen.out.splitlines())
    assert "warning" not in plain
    assert doubted["warning"].startswith("a lateral view (LL)")
    assert f"{lateral}: warning: a lateral view (LL)" in screen.err
    assert plain["probability"] == pytest.approx(doubted["probability"])  # of the same pixels
    assert "Doe" not in screen.out + screen.err
