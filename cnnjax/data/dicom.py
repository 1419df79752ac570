"""Radiographs as hospitals keep them: DICOM files, read with pydicom (the extra `dicom`).

A file becomes gray levels as a viewer shows them: stored values rescaled, windowed (DICOM PS3.3,
C.11), and turned over where MONOCHROME1 has bright for little. Of the patient, nothing leaves this
module but a hash of the identifier, and in a doubt of `doubts` an age that is not a young child's.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

_LATERAL = {"LL", "RL", "LLD", "RLD", "LATERAL"}  # View Position (0018,5101)


class DicomError(Exception):
    """The file holds no radiograph that we take; the text says why, in a few words."""


class NoDecoder(DicomError):
    """What would read the file is not installed here."""


def is_dicom(encoded: bytes) -> bool:
    """Tells whether a file's bytes begin as DICOM files do."""
    return encoded[128:132] == b"DICM"


def read(encoded: bytes, largest: int) -> np.ndarray:
    """Returns the image of a DICOM file as a viewer shows it.

    Args:
        encoded: the file.
        largest: most pixels that are taken.

    Returns:
        float32 [height, width] in [0, 1].

    Raises:
        DicomError: it has no image, or several, or one that cannot be decoded here
            (then `NoDecoder`).
    """
    try:
        return _read(_open(encoded), largest)
    except DicomError:
        raise
    except Exception as error:  # a tag can be wrong in any way
        raise DicomError(f"a DICOM file with broken tags: {_reason(error)}") from None


def _read(file: Any, largest: int) -> np.ndarray:
    if "PixelData" not in file:
        raise DicomError("a DICOM file without an image")
    frames = int(file.get("NumberOfFrames") or 1)
    if frames > 1:
        raise DicomError(f"a DICOM file of {frames} frames; give the one to be judged by itself")
    if int(file.Rows) * int(file.Columns) > largest:
        raise DicomError(f"too many pixels: {file.Columns} x {file.Rows}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = _pixels(file)
        if stored.ndim == 3:  # colour: a secondary capture; luma of ITU-R 601
            gray = stored.astype(np.float64) @ (0.299, 0.587, 0.114)
            return np.asarray(gray / (2 ** int(file.BitsStored) - 1), np.float32)
        shown = _windowed(file, stored)
    if file.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    return np.asarray(shown, np.float32)


def patient_of(encoded: bytes | Path) -> str | None:
    """Returns a hash of the patient's identifier, 16 hexadecimal digits; None where it is empty.

    Of a file named by its path, only what stands before the pixels is read.
    """
    identifier = _tag(_open(encoded, pixels=False), "PatientID")
    return hashlib.sha256(identifier.encode()).hexdigest()[:16] if identifier else None


def doubts(encoded: bytes) -> list[str]:
    """Returns sentences about what makes this no frontal chest radiograph, by its tags."""
    file = _open(encoded, pixels=False)
    found = []
    view = _tag(file, "ViewPosition").upper()
    if view in _LATERAL:
        found.append(f"a lateral view ({view}); the network knows frontal ones alone")
    modality = _tag(file, "Modality")
    if modality not in ("", "CR", "DX", "RG", "OT", "SC"):
        found.append(f"no radiograph by its modality ({modality})")
    part = _tag(file, "BodyPartExamined").upper()
    if part and part not in ("CHEST", "THORAX", "LUNG", "PORT CHEST"):
        found.append(f"not of the chest ({part})")
    age = _tag(file, "PatientAge").upper()
    if match := re.fullmatch(r"(\d{3})([DWMY])", age):
        years = int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[match[2]]
        if not 1 <= years < 6:
            found.append(f"of a patient aged {age}; the network knows children of 1 to 5 years")
    return found


def _tag(file: Any, name: str) -> str:
    """Returns a tag's text; empty where there is none, or none that can be read."""
    try:
        return str(file.get(name) or "").strip()
    except Exception:  # pydicom reads a tag when it is asked for; it can be broken in any way
        return ""


def _open(encoded: bytes | Path, *, pixels: bool = True) -> Any:
    try:
        import pydicom
    except ImportError:
        raise NoDecoder('a DICOM file; to read it: pip install -e ".[dicom]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the many ways to bend the standard
            file = encoded if isinstance(encoded, Path) else io.BytesIO(encoded)
            return pydicom.dcmread(file, stop_before_pixels=not pixels)
    except Exception as error:  # a file can be broken in any way
        raise DicomError(f"broken DICOM file: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Returns the first line of what an exception says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _pixels(file: Any) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, convert_color_space

    kind = str(file.PhotometricInterpretation)
    try:
        stored: np.ndarray = file.pixel_array
        if kind == "PALETTE COLOR":
            table = apply_color_lut(stored, file)[..., :3]
            file.BitsStored = 8 * table.dtype.itemsize
            return table
        # pydicom has turned compressed YBR to RGB, and left the rest.
        left = str(file.PhotometricInterpretation)
        if stored.ndim == 3 and left.startswith("YBR_FULL"):
            stored = convert_color_space(stored, left, "RGB")
    except Exception as error:  # each decoder has its own
        syntax = file.file_meta.TransferSyntaxUID
        kind_of_error = NoDecoder if _lacks_decoders(syntax) else DicomError
        raise kind_of_error(
            f"DICOM pixels that cannot be decoded here ({syntax.name}): {_reason(error)}"
        ) from None
    return stored


def _lacks_decoders(syntax: Any) -> bool:
    """Whether what is not installed here may decode pixels of a transfer syntax."""
    from pydicom.pixels import get_decoder

    try:
        return bool(get_decoder(syntax).missing_dependencies)
    except NotImplementedError:  # pydicom itself cannot
        return True


def _windowed(file: Any, stored: np.ndarray) -> np.ndarray:
    """Returns float64 in [0, 1] of stored values, by the file's window or, without, their range."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = np.asarray(apply_modality_lut(stored, file), np.float64)
    table = file.get("VOILUTSequence")
    if table:
        rescaled = np.rint(values).astype(np.int64)
        shown = np.asarray(apply_voi(rescaled, file, index=0), np.float64)
        return shown / (2 ** int(table[0].LUTDescriptor[2]) - 1)
    centre, width = _first(file.get("WindowCenter")), _first(file.get("WindowWidth"))
    if centre is None or width is None or width < 1:
        low, high = values.min(), values.max()
        return (values - low) / max(high - low, 1e-12)
    function = str(file.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID":
        shown = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        shown = (values - centre) / width + 0.5
    else:
        shown = (values - (centre - 0.5)) / max(width - 1, 1e-12) + 0.5
    return np.clip(shown, 0, 1)


def _first(value: Any) -> float | None:
    """Returns the first of one or several windows."""
    if value is None or value == "":
        return None
    several = hasattr(value, "__len__") and not isinstance(value, str)
    return float(value[0] if several else value)
