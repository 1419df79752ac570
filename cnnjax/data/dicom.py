"""Reads radiographs in DICOM files with pydicom (the extra `dicom`).

`cnnjax.data.grayscale` interprets the pixels. The only patient data that leave this module are a
hash of the patient ID, and, in a sentence of `doubts`, an age outside the range of the training
data.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data.bounds import LARGEST_FILE, TOO_LARGE, inflates_beyond, read_file
from cnnjax.data.grayscale import NoPixelDecoder, PixelError, gray, notes, reason

HEAD = 132
"""Number of bytes at the beginning of a file that `is_dicom` needs."""

# View Position (0018,5101) is free text if it is not one of the defined terms.
_LATERAL = re.compile(r"(?:LEFT|RIGHT|XTABLE|[LRX])?LAT(?:ERAL)?|LL|RL|LLD|RLD")
_ACROSS = re.compile(r"(?:X|CROSS)\W*TABLE")
_CHEST = re.compile(
    r"(?:PORT)?(?:CHEST|THORAX|THORACIC|TORAX|TORACE|LUNGS?|PULM\w*|POUMONS?|BRUST(?:KORB)?)"
)
_ELSEWHERE = re.compile(r"SPINE|VERTEBRAE?|ABDOMEN|COLUMNA?|WS")
_AGE = re.compile(r"0*(\d+(?:[.,]\d+)?)\s*(?:([DWMY])\w*)?")

_DEFLATED = "1.2.840.10008.1.2.1.99"
_PLAIN = {  # (implicit VR, little endian) of a file without a transfer syntax
    (True, True): "1.2.840.10008.1.2",
    (False, True): "1.2.840.10008.1.2.1",
    (False, False): "1.2.840.10008.1.2.2",
}
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_SHORT = {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN"}
_SHORT |= {b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}


class DicomError(Exception):
    """The file holds no accepted radiograph; the message gives the reason in a few words."""


class NoDecoder(DicomError):
    """The package that reads the file is not installed."""


def is_dicom(encoded: bytes) -> bool:
    """Returns whether a file's first bytes are those of a DICOM file, with or without the preamble.

    Without the preamble, the first element must belong to group 2 or 8 and have a known value
    representation or, without one, a short length.
    """
    if _has_preamble(encoded):
        return True
    for order in ("little", "big"):
        group, element = (int.from_bytes(encoded[i : i + 2], order) for i in (0, 2))
        if len(encoded) >= HEAD and group in (2, 8) and element < 0x100:
            return encoded[4:6] in _LONG | _SHORT or (
                order == "little" and int.from_bytes(encoded[4:8], order) <= 256
            )
    return False


def _has_preamble(encoded: bytes) -> bool:
    return encoded[128:132] == b"DICM"


def read(encoded: bytes, largest: int) -> np.ndarray:
    """Returns the image of a DICOM file as a viewer shows it.

    Args:
        encoded: the file.
        largest: largest number of pixels that is accepted.

    Returns:
        float32 [height, width] in [0, 1].

    Raises:
        DicomError: the file has no image or several images.
        NoDecoder: the image cannot be decoded with the installed packages.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gray(_open(encoded), largest)
    except DicomError:
        raise
    except PixelError as error:
        kind = NoDecoder if isinstance(error, NoPixelDecoder) else DicomError
        raise kind(str(error)) from None
    except Exception as error:  # a tag can be wrong in any way
        raise DicomError(f"a DICOM file with broken tags: {reason(error)}") from None


def patient_of(encoded: bytes | Path) -> str | None:
    """Returns a hash of the patient ID, 16 hexadecimal digits; None if the patient ID is empty.

    If the file is given by its path, only the part before the pixels is read.
    """
    identifier = _tag(_open(encoded, pixels=False), "PatientID")
    return hashlib.sha256(identifier.encode()).hexdigest()[:16] if identifier else None


def layout_of(encoded: bytes) -> tuple[str, int, int]:
    """Returns the pixel format of a file, such as `MONOCHROME2, 12 bits`, and its width and height.

    Raises:
        DicomError: this is not a DICOM file, or its tags lack the size.
    """
    file = _open(encoded, pixels=False)
    names = ("PhotometricInterpretation", "BitsStored", "Columns", "Rows")
    kept, bits, width, height = (_tag(file, name) for name in names)
    if not (width.isdecimal() and height.isdecimal()):
        raise DicomError("a DICOM file without the size of its image")
    return f"{kept}, {bits} bits", int(width), int(height)


def doubts(encoded: bytes) -> list[str]:
    """Returns sentences that say why the tags do not describe a frontal chest radiograph.

    They include sentences about display tags that cannot be used (see `cnnjax.data.grayscale`).
    """
    file = _open(encoded, pixels=False)
    found = []
    view = _tag(file, "ViewPosition").upper()
    if any(map(_LATERAL.fullmatch, _words(view))) or _ACROSS.search(view):
        found.append(f"a lateral view ({view}); the network was trained on frontal views only")
    modality = _tag(file, "Modality")
    if modality not in ("", "CR", "DX", "RG", "OT", "SC"):
        found.append(f"not a radiograph by its modality ({modality})")
    part = _tag(file, "BodyPartExamined").upper()
    words = _words(part)
    if words and (not any(map(_CHEST.fullmatch, words)) or any(map(_ELSEWHERE.fullmatch, words))):
        found.append(f"not of the chest ({part})")
    age = _tag(file, "PatientAge").upper()
    if match := _AGE.fullmatch(age):
        each = {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[match[2] or "Y"]
        if not 1 <= float(match[1].replace(",", ".")) / each < 6:
            found.append(f"a patient aged {age}; the network was trained on ages of 1 to 5 years")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found + notes(file)


def _words(text: str) -> list[str]:
    """Returns the words of a tag in ASCII, without separators."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.findall(r"[A-Z]+", plain)


def _tag(file: Any, name: str) -> str:
    """Returns a tag's text; empty if the tag is absent or cannot be read."""
    try:
        return str(file.get(name) or "").strip()
    except Exception:  # pydicom parses a tag at access, and it may be broken
        return ""


def _open(encoded: bytes | Path, *, pixels: bool = True) -> Any:
    try:
        import pydicom
    except ImportError:
        raise NoDecoder('a DICOM file; to read it, pip install "cnnjax[dicom]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many files deviate from the standard
            head = encoded if isinstance(encoded, bytes) else _head(encoded)
            syntax, start = _meta(head)
            if syntax == _DEFLATED:
                encoded = encoded if isinstance(encoded, bytes) else read_file(encoded)
                if inflates_beyond(encoded[start:]):
                    raise DicomError(f"a DICOM file that is {TOO_LARGE} when inflated")
            if not is_dicom(head):
                raise DicomError("not a DICOM file")
            file = encoded if isinstance(encoded, Path) else io.BytesIO(encoded)
            read = pydicom.dcmread(
                file, stop_before_pixels=not pixels, force=not _has_preamble(head)
            )
            if not syntax:
                _guess_syntax(read)
            return read
    except DicomError:
        raise
    except zlib.error as error:
        raise DicomError(f"broken DICOM file: {reason(error)}") from None
    except Exception as error:  # a file can be broken in any way
        raise DicomError(f"broken DICOM file: {reason(error)}") from None


def _head(path: Path) -> bytes:
    """Returns the beginning of a file of acceptable size, with all that precedes the data set."""
    if not path.is_file():
        raise DicomError("not a regular file")
    if path.stat().st_size > LARGEST_FILE:
        raise DicomError(TOO_LARGE)
    with path.open("rb") as file:
        return file.read(2**16)


def _meta(encoded: bytes) -> tuple[str, int]:
    """Returns a file's Transfer Syntax UID, empty if absent, and the offset of the data set."""
    at, syntax = HEAD if _has_preamble(encoded) else 0, ""
    while encoded[at : at + 2] == b"\2\0" and at + 12 <= len(encoded):
        if encoded[at + 4 : at + 6] in _LONG:
            start, length = at + 12, int.from_bytes(encoded[at + 8 : at + 12], "little")
        else:
            start, length = at + 8, int.from_bytes(encoded[at + 6 : at + 8], "little")
        if encoded[at + 2 : at + 4] == b"\x10\0":
            syntax = encoded[start : start + length].decode("ascii", "replace").strip(" \0")
        at = start + length
    return syntax, at


def _guess_syntax(file: Any) -> None:
    """Sets the transfer syntax of a file without one to the encoding that pydicom detected.

    Raises:
        DicomError: the pixels are compressed in an unknown way.
    """
    if "PixelData" in file and file["PixelData"].is_undefined_length:
        raise DicomError("a DICOM file of compressed pixels without a Transfer Syntax UID")
    guessed = _PLAIN.get(tuple(file.original_encoding))
    if guessed is not None:
        from pydicom.dataset import FileMetaDataset
        from pydicom.uid import UID

        if getattr(file, "file_meta", None) is None:
            file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = UID(guessed)
