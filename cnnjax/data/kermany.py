"""What the file names of the published pediatric radiographs tell (Kermany et al., Cell 172, 2018).

=========================================  ======================
file name                                  patient
=========================================  ======================
``person12_bacteria_46.jpeg``              ``person12_bacteria``
``IM-0115-0001.jpeg``                      ``IM-0115``
``NORMAL2-IM-0395-0001-0002.jpeg``         ``NORMAL2-IM-0395``
``BACTERIA-1008087-0001.jpeg`` (Mendeley)  ``1008087``
=========================================  ======================

The rest of the package knows only the columns that come of this.
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
"""Accuracy, sensitivity, specificity and AUC that others report on the official test split."""


def patient_of(name: str) -> str:
    """Returns whom an image shows, by its file name; one of no known scheme is its own patient.

    The schemes are listed above.
    """
    for scheme, spelled in _PATIENT:
        if match := scheme.match(PurePosixPath(name).stem):
            return spelled(match[1])
    return name


def cause_of(name: str) -> str | None:
    """Returns the class that a published file name tells: BACTERIA, VIRUS, or None for neither.

    (`IM-...` tells nothing: other programs name files so, too.)
    """
    match = _CAUSE.match(PurePosixPath(name).name)
    return match[1].upper() if match else None


def viral_of(name: str) -> int:
    """Returns 1 if the file name tells of a virus, 0 if of bacteria, -1 if of neither."""
    cause = cause_of(name)
    return ("BACTERIA", "VIRUS").index(cause) if cause else -1


def group_of(patient: str) -> str:
    """Returns the key under which a patient's images stay on one side of a split.

    Kermany's person numbers are counted separately for bacteria and for virus, so person12_bacteria
    and person12_virus are most likely strangers. Should they not be, a split that keeps the number
    together is right all the same, so it does.
    """
    return re.sub(r"^(person\d+)_(?:bacteria|virus)$", r"\1", patient)


def place_in_numbering(group: str) -> tuple[str, int]:
    """Returns the series that a name belongs to, and its number there."""
    name = PurePosixPath(group).stem  # a name of no known scheme is its own patient, suffix and all
    match = re.search(r"\d+$", name)
    return (name[: match.start()], int(match[0])) if match else (name, 0)
