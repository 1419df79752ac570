"""Splits that keep all images of a patient on one side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnnjax.data.index import Example
from cnnjax.data.kermany import group_of, place_in_numbering
from cnnjax.errors import InputError
from cnnjax.machine.files import write_atomically, write_rows


def in_several_splits(examples: Sequence[Example]) -> dict[tuple[str, str], list[str]]:
    """Returns, for each pair of splits, the sorted patients that occur in both."""
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


def grouped_folds(
    examples: Sequence[Example], folds: int, seed: int, classes: Sequence[str] = ()
) -> np.ndarray:
    """Assigns each image to a fold: grouped by patient, and stratified by class.

    Args:
        examples: n images.
        folds: number of folds.
        seed: seed of the order of patients with the same mixture of classes.
        classes: names of the labels, for the error message.

    Returns:
        int64 [n], the fold, from 0 to folds - 1, in which each image is held out.

    Raises:
        InputError: a class has fewer patients than folds.
    """
    labels = np.array([e.label for e in examples])
    groups = np.array([group_of(e.patient) for e in examples])
    for label in range(_count(examples, classes)):
        _enough_patients(label, list(groups[labels == label]), folds, classes)
    names, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), _count(examples, classes)))
    np.add.at(counts, (group, labels), 1)
    return _deal(counts, folds, seed)[group]


def block_folds(examples: Sequence[Example], folds: int, classes: Sequence[str] = ()) -> np.ndarray:
    """Assigns each image to a fold of neighbours in the file numbering, grouped by patient.

    File numbers follow the order in which a hospital took or stored its images. A block therefore
    differs from the rest as one season or one exporter differs from another. Each class is split
    separately, into runs of about equally many images. If the names of a class form several series
    (`IM-...` and `NORMAL2-IM-...`), the last fold is the whole last series, unless it is small, and
    the other folds share the rest.

    Args:
        examples: n images.
        folds: number of folds, at least 2.
        classes: names of the labels, for the error message.

    Returns:
        int64 [n], the fold, from 0 to folds - 1, in which each image is held out.

    Raises:
        InputError: a class has fewer patients than folds, or the patients have no numbers, as in
            DICOM files.
    """
    if any(_HASHED.fullmatch(e.patient) for e in examples):
        raise InputError(
            "--data.validation blocks needs patient numbers, and DICOM files give only a hash"
            " of the patient ID; use --data.validation patients"
        )
    groups = [group_of(e.patient) for e in examples]
    fold_of: dict[str, int] = {}
    for label in range(_count(examples, classes)):
        sizes: Counter[str] = Counter()
        for group, example in zip(groups, examples, strict=True):
            if example.label == label:
                sizes[group] += 1
        _enough_patients(label, list(sizes.elements()), folds, classes)
        ranked = sorted(sizes, key=place_in_numbering)
        series = {place_in_numbering(group)[0] for group in ranked}
        runs = folds
        if len(series) > 1 and folds > 2:
            of_last = [g for g in ranked if place_in_numbering(g)[0] == max(series)]
            rest = [g for g in ranked if g not in set(of_last)]
            large = 2 * folds * sum(sizes[g] for g in of_last) >= sizes.total()
            if large and len(rest) >= folds - 1:
                fold_of |= dict.fromkeys(of_last, folds - 1)
                ranked, runs = rest, folds - 1
        images = np.array([sizes[group] for group in ranked])
        middle = (np.cumsum(images) - images / 2) / images.sum()
        # A patient of several classes stays in the fold of the first class.
        for group, place in zip(ranked, middle, strict=True):
            fold_of.setdefault(group, int(place * runs))
    return np.array([fold_of[group] for group in groups])


_HASHED = re.compile("[0-9a-f]{16}")  # the patient IDs of `cnnjax.data.dicom`


def _count(examples: Sequence[Example], classes: Sequence[str]) -> int:
    """Returns the number of classes, from their names or else from the labels."""
    return len(classes) or max([2, *(1 + e.label for e in examples)])


def _enough_patients(label: int, groups: Sequence[str], folds: int, classes: Sequence[str]) -> None:
    """Raises InputError if a class's images, given by their patients, show too few patients."""
    name = classes[label] if classes else label
    patients = len(set(groups))
    if patients == 1 < len(groups) and _HASHED.fullmatch(groups[0]):
        raise InputError(
            f"all {len(groups)} images of class {name} have the same PatientID (0010,0020), which"
            " some programs write to anonymise them; folds of patients cannot be made. Write a"
            " different PatientID for each patient"
        )
    if patients < folds:
        raise InputError(
            f"{patients} patients of class {name} are too few for {folds} folds;"
            " lower --data.folds or add images"
        )


def _deal(counts: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assigns groups to folds, stratified by class.

    Groups with the most uneven class counts come first. Each group goes to the fold for which the
    class shares of all folds become most equal; ties go to the smallest fold. The result is that of
    scikit-learn's `StratifiedGroupKFold(folds, shuffle=True, random_state=seed)`, whose import
    alone takes longer than JAX's.

    Args:
        counts: [groups, classes], number of images of each class in each group.
        folds: number of folds.
        seed: seed of the order among equal groups.

    Returns:
        int64 [groups], the fold of each group.
    """
    order = np.arange(len(counts))
    np.random.RandomState(seed).shuffle(order)
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    total = counts.sum(0)
    dealt = np.zeros((folds, counts.shape[1]))
    fold = np.empty(len(counts), np.int64)
    for g in order:
        # shares[k]: the folds' shares of each class if the group went to fold k.
        shares = (dealt + np.eye(folds)[..., None] * counts[g]) / total
        uneven = shares.std(axis=1).mean(axis=1)
        best = 0
        for k in range(1, folds):
            level = abs(uneven[k] - uneven[best]) <= 1e-8 + 1e-5 * abs(uneven[best])
            smaller = dealt[k].sum() < dealt[best].sum()
            if uneven[k] < uneven[best] or (level and smaller):
                best = k
        dealt[best] += counts[g]
        fold[g] = best
    return fold


def write_split(path: Path, examples: Sequence[Example], held_out: np.ndarray) -> None:
    """Writes `split.csv`: one line per image, with its patient, label and role in the run.

    Args:
        path: the file, which is replaced atomically.
        examples: n images.
        held_out: bool [n], true for validation images.
    """
    with write_atomically(path) as file:
        write_rows(file, [["image", "patient", "label", "role"]])
        roles = ("validation" if validates else "train" for validates in held_out)
        write_rows(
            file,
            ([e.name, e.patient, e.label, role] for e, role in zip(examples, roles, strict=True)),
        )
