"""Splits that keep all images of a patient on one side."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnnjax.data.examples import Example, Examples
from cnnjax.data.kermany import group_of, place_in_numbering
from cnnjax.errors import InputError
from cnnjax.machine.files import write_atomically, write_rows


def in_several_splits(examples: Sequence[Example]) -> dict[tuple[str, str], list[str]]:
    """Returns, for each pair of splits, the sorted patients that occur in both."""
    examples = Examples.of(examples)
    numbers, first = np.unique(examples.patient_numbers, return_index=True)
    of_split = {
        split: np.isin(numbers, examples.take(examples.of_split(split)).patient_numbers)
        for split in examples.splits
    }
    return {
        (a, b): sorted(set(examples.take(first[shared]).patients))
        for a, b in itertools.combinations(of_split, 2)
        if (shared := of_split[a] & of_split[b]).any()
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
    examples = Examples.of(examples)
    names, group = groups_of(examples)
    counts = np.zeros((len(names), _count(examples, classes)))
    np.add.at(counts, (group, examples.labels), 1)
    for label, count in enumerate(counts.T):
        _enough_patients(label, names, count, folds, classes)
    return _deal(counts, folds, seed)[group]


def _distinct(examples: Examples) -> tuple[list[str], np.ndarray]:
    """Returns the m patients, and the number of each image's patient, int64 [n]."""
    _, first, patient = np.unique(examples.patient_numbers, return_index=True, return_inverse=True)
    return examples.take(first).patients, patient


def groups_of(examples: Examples) -> tuple[list[str], np.ndarray]:
    """Returns the m keys of `group_of`, sorted, and the number of each image's key, int64 [n]."""
    patients, patient = _distinct(examples)
    keys = [group_of(name) for name in patients]
    names = sorted(set(keys))
    number = {name: k for k, name in enumerate(names)}
    return names, np.fromiter((number[key] for key in keys), np.int64, len(keys))[patient]


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
    examples = Examples.of(examples)
    if any(map(_HASHED.fullmatch, _distinct(examples)[0])):
        raise InputError(
            "--data.validation blocks needs patient numbers, and DICOM files give only a hash"
            " of the patient ID; use --data.validation patients"
        )
    names, group = groups_of(examples)
    places = [place_in_numbering(name) for name in names]
    fold_of = np.full(len(names), -1)
    for label in range(_count(examples, classes)):
        of_label = group[examples.labels == label]
        found, first, images = np.unique(of_label, return_index=True, return_counts=True)
        _enough_patients(label, names, np.bincount(of_label), folds, classes)
        # Equal places in the numbering stay in the order of their first images.
        order = sorted(np.argsort(first).tolist(), key=lambda i: places[found[i]])
        ranked, images, runs = found[order], images[order], folds
        series = np.array([places[each][0] for each in ranked], object)
        last = series == max(series)
        if not last.all() and folds > 2:
            large = 2 * folds * images[last].sum() >= images.sum()
            if large and (~last).sum() >= folds - 1:
                fold_of[ranked[last]] = folds - 1
                ranked, images, runs = ranked[~last], images[~last], folds - 1
        middle = (np.cumsum(images) - images / 2) / images.sum()
        # A patient of several classes stays in the fold of the first class.
        new = fold_of[ranked] < 0
        fold_of[ranked[new]] = (middle[new] * runs).astype(np.int64)
    return fold_of[group]


_HASHED = re.compile("[0-9a-f]{16}")  # the patient IDs of `cnnjax.data.dicom`


def _count(examples: Examples, classes: Sequence[str]) -> int:
    """Returns the number of classes, from their names or else from the labels."""
    return len(classes) or max(2, 1 + int(examples.labels.max(initial=0)))


def _enough_patients(
    label: int, names: Sequence[str], images: np.ndarray, folds: int, classes: Sequence[str]
) -> None:
    """Raises InputError if a class has too few patients, given their names and images, int [m]."""
    name = classes[label] if classes else label
    patients, total = np.count_nonzero(images), int(images.sum())
    if patients == 1 < total and _HASHED.fullmatch(names[int(np.argmax(images))]):
        raise InputError(
            f"all {total} images of class {name} have the same PatientID (0010,0020), which"
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
    total = counts.sum(0).tolist()
    images = [0.0] * folds
    dealt = [[0.0] * folds for _ in total]
    shares = [[0.0] * folds for _ in total]
    spreads = [0.0] * len(total)
    fold = np.empty(len(counts), np.int64)
    for g in order.tolist():
        given = counts[g].tolist()
        # spreads_if[c][k]: the spread of the shares of class c if the group went to fold k.
        spreads_if = [
            _spreads(dealt[c], shares[c], n, total[c]) if n else [spreads[c]] * folds
            for c, n in enumerate(given)
        ]
        uneven = [_sum(each) / len(total) for each in zip(*spreads_if, strict=True)]
        best = 0
        for k in range(1, folds):
            level = abs(uneven[k] - uneven[best]) <= 1e-8 + 1e-5 * abs(uneven[best])
            if uneven[k] < uneven[best] or (level and images[k] < images[best]):
                best = k
        for c, n in enumerate(given):
            dealt[c][best] += n
            images[best] += n
            shares[c][best] = dealt[c][best] / total[c]
            spreads[c] = spreads_if[c][best]
        fold[g] = best
    return fold


def _spreads(
    dealt: Sequence[float], shares: Sequence[float], n: float, total: float
) -> list[float]:
    """Returns, for each fold k, the standard deviation of all shares if fold k had n more images.

    The operations are those of `np.std` in the same order: the result is equal to the last bit.
    Python's floats take a tenth of the time of arrays that are so small.
    """
    spreads = []
    for k, before in enumerate(dealt):
        others = [*shares]
        others[k] = (before + n) / total
        mean = 0.0
        for share in others:
            mean += share
        mean /= len(others)
        square = 0.0
        for share in others:
            square += (share - mean) * (share - mean)
        spreads.append(math.sqrt(square / len(others)))
    return spreads


def _sum(values: Sequence[float]) -> float:
    """Returns the sum as `np.sum` rounds it; the `sum` of Python 3.12 rounds less."""
    if len(values) >= 8:  # np.sum adds in another order
        return float(np.sum(values))
    total = 0.0
    for value in values:
        total += value
    return total


def write_split(path: Path, examples: Sequence[Example], held_out: np.ndarray) -> None:
    """Writes `split.csv`: one line per image, with its patient, label and role in the run.

    Args:
        path: the file, which is replaced atomically.
        examples: n images.
        held_out: bool [n], true for validation images.
    """
    with write_atomically(path) as file:
        write_rows(file, [["image", "patient", "label", "role"]])
        roles = map(("train", "validation").__getitem__, held_out.astype(int).tolist())
        write_rows(
            file,
            ([e.name, e.patient, e.label, role] for e, role in zip(examples, roles, strict=True)),
        )
