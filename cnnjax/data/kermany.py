"""Parses the file names of the published pediatric radiographs (Kermany et al., Cell 172, 2018).

=========================================  ======================
file name                                  patient
=========================================  ======================
``person12_bacteria_46.jpeg``              ``person12_bacteria``
``IM-0115-0001.jpeg``                      ``IM-0115``
``NORMAL2-IM-0395-0001-0002.jpeg``         ``NORMAL2-IM-0395``
``BACTERIA-1008087-0001.jpeg`` (Mendeley)  ``1008087``
=========================================  ======================

The rest of the package uses only the patient IDs and causes that this module returns.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_PATIENT = (
    (re.compile(r"(person\d+_(?:bacteria|virus))_\d+", re.IGNORECASE), str.lower),
    (re.compile(r"((?:NORMAL2-)?IM-\d+)-\d+", re.IGNORECASE), str.upper),
    (re.compile(r"(?:NORMAL|BACTERIA|VIRUS|PNEUMONIA)-(\d+)-\d+", re.IGNORECASE), str),
)
_CAUSE = re.compile(r"(?:person\d+_)?(bacteria|virus)[_-]", re.IGNORECASE)


PUBLISHED = (
    ("the post, its own CNN, official test", "0.917", "0.956", "", ""),
    ("Kermany et al., Inception-v3, official test", "0.928", "0.932", "0.901", "0.968"),
)
"""Accuracy, sensitivity, specificity and AUC that others report for the official test split."""


def patient_of(name: str) -> str:
    """Returns the patient ID in a file name; the name itself if it follows no known scheme.

    The schemes are listed above.
    """
    start = name.rfind("/") + 1
    for scheme, spelled in _PATIENT:
        if match := scheme.match(name, start):
            return spelled(match[1])
    return name


def cause_of(name: str) -> str | None:
    """Returns the cause of pneumonia in a published file name: BACTERIA or VIRUS; None without one.

    (`IM-...` does not imply a class: other programs use such names too.)
    """
    match = _CAUSE.match(name, name.rfind("/") + 1)
    return match[1].upper() if match else None


def viral_of(name: str) -> int:
    """Returns 1 if the file name says viral, 0 if bacterial, -1 if neither."""
    cause = cause_of(name)
    return ("BACTERIA", "VIRUS").index(cause) if cause else -1


def group_of(patient: str) -> str:
    """Returns the key that keeps the images of a patient on one side of a split.

    Kermany's person numbers are counted separately for bacteria and virus, so person12_bacteria and
    person12_virus are most likely different patients. They share a key nevertheless: the split is
    then correct in either case.
    """
    return re.sub(r"^(person\d+)_(?:bacteria|virus)$", r"\1", patient)


def place_in_numbering(group: str) -> tuple[str, int]:
    """Returns the series of a name, and its number in the series."""
    name = PurePosixPath(group).stem  # a name of no known scheme keeps its suffix
    match = re.search(r"\d+$", name)
    return (name[: match.start()], int(match[0])) if match else (name, 0)
