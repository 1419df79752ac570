"""Which patient an image shows, and splits that never divide a patient.

The schemes are those of the published pediatric radiographs (Kermany et al., Cell 172, 2018):

=========================================  ======================
file name                                  patient
=========================================  ======================
``person12_bacteria_46.jpeg``              ``person12_bacteria``
``IM-0115-0001.jpeg``                      ``IM-0115``
``NORMAL2-IM-0395-0001-0002.jpeg``         ``NORMAL2-IM-0395``
``BACTERIA-1008087-0001.jpeg`` (Mendeley)  ``1008087``
=========================================  ======================
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnnjax.data.files import write_atomically
from cnnjax.data.index import Example
from cnnjax.errors import InputError


def group_of(patient: str) -> str:
    """Returns the key under which a patient's images stay on one side of a split.

    Kermany's person numbers are counted separately for bacteria and for virus, so person12_bacteria
    and person12_virus are most likely strangers. Should they not be, a split that keeps the number
    together is right all the same, so it does.
    """
    return re.sub(r"^(person\d+)_(?:bacteria|virus)$", r"\1", patient)


def in_several_splits(examples: Sequence[Example]) -> dict[tuple[str, str], list[str]]:
    """Returns, for each pair of splits, the sorted patients that both of them hold."""
    patients: dict[str, set[str]] = {}
    for example in examples:
        patients.setdefault(example.split, set()).add(example.patient)
    splits = sorted(patients)
    return {
        (a, b): sorted(shared)
        for i, a in enumerate(splits)
        for b in splits[i + 1 :]
        if (shared := patients[a] & patients[b])
    }


def grouped_folds(examples: Sequence[Example], folds: int, seed: int) -> np.ndarray:
    """Assigns each image to a fold: patients whole, classes in equal shares, from a seed.

    Args:
        examples: n images.
        folds: how many folds.
        seed: seed of scikit-learn's `StratifiedGroupKFold`, which does the work.

    Returns:
        int64 [n], the fold, from 0 to folds - 1, in which each image is held out.

    Raises:
        InputError: there are too few patients of a class for so many folds.
    """
    # Here, since importing scikit-learn takes as long as importing JAX and only training needs it.
    from sklearn.model_selection import StratifiedGroupKFold

    labels = np.array([e.label for e in examples])
    groups = np.array([group_of(e.patient) for e in examples])
    for label in (0, 1):
        patients = len(set(groups[labels == label]))
        if patients < folds:
            raise InputError(
                f"{patients} patients of class {label} are too few for {folds} folds;"
                " lower --data.folds or add images"
            )
    fold = np.empty(len(examples), np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for k, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        fold[held_out] = k
    return fold


def write_split(path: Path, examples: Sequence[Example], held_out: np.ndarray) -> None:
    """Writes `split.csv`: one line an image, with its patient, label and role in this run.

    Args:
        path: the file, replaced as a whole.
        examples: n images.
        held_out: bool [n], true where the image validates.
    """
    with write_atomically(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "patient", "label", "role"])
        for example, validates in zip(examples, held_out, strict=True):
            role = "validation" if validates else "train"
            table.writerow([example.name, example.patient, example.label, role])
