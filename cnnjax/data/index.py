"""Lists the images under a data root: class folders, a zip of them, a MedMNIST .npz, or a table.

`read_index` looks only at names, and at the patient IDs in DICOM files; no image is decoded. An
index can be counted, split by patient, and decoded with `cnnjax.data.cache`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from cnnjax.data import dicom
from cnnjax.data.kermany import cause_of, patient_of
from cnnjax.data.names import (
    IMAGE_SUFFIXES,
    LEADS_OUT,
    SUFFIXES,
    Walked,
    hidden,
    may_be_dicom,
    same_name,
    walk,
)
from cnnjax.data.sources import Arrays, Source, Tree, Zip
from cnnjax.data.table import read_rows
from cnnjax.errors import InputError

SPLITS = ("train", "val", "test")
ALL = "all"
"""The split of an image that neither a folder nor a table assigns to one of `SPLITS`."""

_MEDMNIST_CLASSES = ("NORMAL", "PNEUMONIA")
_NAMED = 10  # links listed by name; the rest are counted


@dataclass(frozen=True)
class Example:
    """One image of the index."""

    name: str
    """Path relative to the root, with forward slashes."""
    split: str
    """`train`, `val` or `test`; `all` if the data set has no splits."""
    label: int
    """Index of the class in `Index.classes`; of two classes, 1 is the positive one."""
    patient: str
    """Patient ID; the image's own name if the patient is unknown."""
    weight: float = 1.0
    """Factor on the image's loss in training."""


@dataclass(frozen=True)
class Index:
    """The images under a root, with their classes and patients, and the files left out."""

    root: Path
    """The folder, archive or table from which the index was read."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ...; of two classes, the positive one is last."""
    examples: tuple[Example, ...]
    """Every image, sorted by split and name."""
    empty: tuple[str, ...]
    """`split/class` folders that hold no image."""
    left_out: tuple[tuple[str, str], ...]
    """(name, reason) of each file that is not one of the images."""
    source: Source

    def split(self, *names: str) -> tuple[Example, ...]:
        """Returns the images of these splits.

        The images of a data set without splits all count as `train`. The name `all` selects every
        image of any data set.

        Raises:
            InputError: the data set has none of the splits, one of the splits has an empty class
                folder, or together they hold only one class.
        """
        wanted = " or ".join(names)
        every = ALL in names
        chosen = tuple(
            e
            for e in self.examples
            if every or e.split in names or (e.split == ALL and "train" in names)
        )
        for folder in self.empty:
            if every or folder.partition("/")[0] in names:
                raise InputError(f"{self.root}: the class folder {folder} holds no image")
        if not chosen:
            there = sorted({e.split for e in self.examples})
            if there == [ALL]:
                raise InputError(
                    f"{self.root} has no {wanted} split: it is not divided into splits;"
                    " train with --data.validation patients, evaluate with --split all"
                )
            raise InputError(f"{self.root} has no {wanted} split, only {', '.join(there)}")
        labels = {e.label for e in chosen}
        if len(labels) == 1:
            raise InputError(
                f"{self.root}: {wanted} holds only one class, {self.classes[labels.pop()]};"
                f" add images of {' and '.join(c for c in self.classes if c)}"
            )
        return chosen

    def describe(self) -> str:
        """Returns a few lines: images per split and class, patients, and files left out."""
        lines = [f"data      {self.root}"]
        for split in (*SPLITS, ALL):
            members = [e for e in self.examples if e.split == split]
            if members:
                count = Counter(e.label for e in members)
                per_class = ", ".join(f"{count[k]:,} {c}" for k, c in enumerate(self.classes))
                patients = len({e.patient for e in members})
                lines.append(f"  {split:<6} {per_class}; {patients:,} patients")
        nameless = sum(e.patient == e.name for e in self.examples)
        if nameless:
            lines.append(f"  {nameless:,} file names give no patient ID: each counts as a patient")
        weights = {e.weight for e in self.examples}
        if weights != {1.0}:
            lines.append(f"  losses are weighted by {min(weights):g} to {max(weights):g}")
        reasons = Counter(reason for _, reason in self.left_out)
        lines += [f"  left out: {n:,} {reason}" for reason, n in sorted(reasons.items())]
        refused = [name for name, reason in self.left_out if reason.startswith("a link")]
        lines += [f"    {name}" for name in refused[:_NAMED]]
        if len(refused) > _NAMED:
            lines.append(f"    and {len(refused) - _NAMED:,} more links")
        return "\n".join(lines)


@dataclass(frozen=True)
class Reading:
    """How to determine classes and patients; the fields are flags of `cnnjax.config.DataConfig`."""

    positive: str = "PNEUMONIA"
    """Of two classes, the name of the one with label 1."""
    classes: tuple[str, ...] = ()
    """The classes in the order of their labels. By default these are all classes that are found,
    sorted by name (by value if all are whole numbers); of two, the positive one is last. The class
    of an image is the one that its folder or table names, if that is among these classes; otherwise
    it is the cause in its published file name (`cnnjax.data.kermany.cause_of`). An image of neither
    is left out."""
    patient_pattern: str = ""
    """A regular expression that finds the patient ID in an image's path below the root: its group,
    or the whole match. By default DICOM tags and published file names give the patient ID."""


def read_index(
    root: Path | str,
    positive: str = "PNEUMONIA",
    *,
    classes: Sequence[str] = (),
    patient_pattern: str = "",
    table: Path | None = None,
    columns: str = "",
) -> Index:
    """Lists the images under a root.

    Args:
        root: a folder or a zip that holds `train`, `val` or `test` folders with a folder for each
            class (at the top or up to two folders down), or class folders side by side without
            splits; or a MedMNIST .npz. Letter case does not matter; hidden files and `__MACOSX` are
            ignored.
        positive: see `Reading`.
        classes: see `Reading`.
        patient_pattern: see `Reading`.
        table: a CSV file that lists the images below the root, see `cnnjax.data.table`.
        columns: names of its columns, see `cnnjax.data.table.read_rows`.

    Raises:
        InputError: the root does not exist, cannot be read, or holds no such images.
    """
    root = Path(root)
    reading = Reading(same_name(positive), tuple(map(same_name, classes)), patient_pattern)
    if table is not None:
        return _from_table(table, columns, root, reading)
    if root.is_dir():
        return _from_names(root, walk(root, confined=True), Tree(root), reading)
    if not root.exists():
        raise InputError(f"{root} does not exist; give a folder, a .zip or a .npz")
    if root.suffix.lower() == ".npz":
        return _from_npz(root, reading)
    if root.suffix.lower() == ".zip":
        zipped = Zip(root)
        return _from_names(root, zipped.walked, zipped, reading)
    raise InputError(
        f"{root} is not a folder, .zip or .npz; give one of these, or a table of images (.csv)"
    )


class _Found(NamedTuple):
    """An image whose class has no number yet."""

    name: str
    split: str
    kind: str
    """The class name in the folder or the table, in the spelling of `same_name`."""
    patient: str | None = None
    weight: float = 1.0


def _index_of(
    root: Path,
    found: Sequence[_Found],
    source: Source,
    reading: Reading,
    kinds: Iterable[str] = (),
    empty: Iterable[tuple[str, str]] = (),
    left_out: Iterable[tuple[str, str]] = (),
) -> Index:
    """Numbers the classes, finds the patients, and returns the index.

    Args:
        root: the path from which the index was read.
        found: the images.
        source: source of their bytes.
        reading: how classes and patients are determined.
        kinds: names of classes that may be without an image.
        empty: (split, class) of folders without an image.
        left_out: see `Index`.

    Raises:
        InputError: there are fewer than two classes, or the reading does not fit the images.
    """
    out = list(left_out)
    if reading.classes:
        told = [(each, _kind(each, reading.classes)) for each in found]
        out += [
            (each.name, f"of class {each.kind}, which is none of {', '.join(reading.classes)}")
            for each, kind in told
            if kind is None
        ]
        found = [each._replace(kind=kind) for each, kind in told if kind is not None]
        kinds = ()
    classes = _classes(root, {each.kind for each in found} | set(kinds), reading)
    label = {name: k for k, name in enumerate(classes)}
    patients = _patients(root, found, source, reading.patient_pattern)
    examples = (
        Example(each.name, each.split, label[each.kind], patient, each.weight)
        for each, patient in zip(found, patients, strict=True)
    )
    order = (*SPLITS, ALL)
    ranked = sorted(examples, key=lambda e: (order.index(e.split), e.name))
    bare = tuple(sorted(f"{split}/{kind}" for split, kind in empty if kind in label))
    return Index(root, classes, tuple(ranked), bare, tuple(sorted(out)), source)


def _kind(found: _Found, classes: tuple[str, ...]) -> str | None:
    """Returns the class of an image if it is among these classes, else None."""
    if found.kind in classes:
        return found.kind
    cause = cause_of(found.name)
    return cause if cause in classes else None


def _classes(root: Path, names: set[str], reading: Reading) -> tuple[str, ...]:
    """Returns the class names in the order of their labels."""
    positive, given = reading.positive, reading.classes
    listed = ", ".join(sorted(names))
    if given:
        if len(names) < 2:
            raise InputError(
                f"{root} needs images of at least two classes of {', '.join(given)};"
                f" it holds {listed or 'none of them'}"
            )
        return given
    if len(names) < 2:
        raise InputError(
            f"{root} needs images of at least two classes, found {listed or 'none'};"
            " each needs a folder, or a label in a table"
        )
    if len(names) == 2:
        if positive not in names:
            raise InputError(
                f"{root} has the classes {listed}, not {positive}; for training, name one of them"
                " with --data.positive"
            )
        (negative,) = names - {positive}
        return negative, positive
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _patients(root: Path, found: Sequence[_Found], source: Source, pattern: str) -> list[str]:
    """Returns the patient ID of each image."""
    if not pattern:
        return [each.patient or _patient(each.name, source) for each in found]
    if any(each.patient is not None for each in found):
        raise InputError(
            f"{root} has a column of patients, so --data.patient-pattern has no effect; remove"
            " one of them (--data.columns patient= ignores the column)"
        )
    try:
        searched = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"--data.patient-pattern {pattern} is not a regular expression ({error})"
        ) from None
    if searched.groups > 1:
        raise InputError(
            f"--data.patient-pattern {pattern} has {searched.groups} groups; mark the patient"
            " with one, and write (?:...) for the others"
        )
    matches = [searched.search(each.name) for each in found]
    patients = [match and match[searched.groups] for match in matches]
    if not any(patients):
        raise InputError(
            f"--data.patient-pattern {pattern} finds no patient in any of {len(found):,} names,"
            f" such as {found[0].name}"
        )
    return [patient or each.name for patient, each in zip(patients, found, strict=True)]


def _from_names(root: Path, walked: Walked, source: Tree | Zip, reading: Reading) -> Index:
    """Finds split and class folders in the paths of a folder or a zip."""
    found: list[tuple[str, str, str, str]] = []  # (prefix, split, class, name)
    left_out = [pair for pair in walked.refused if not any(map(hidden, pair[0].split("/")))]
    class_folders: set[tuple[str, str, str]] = set()
    for folder in walked.folders:
        parts = folder.split("/")
        if not any(map(hidden, parts)) and len(parts) >= 2 and parts[-2].lower() in SPLITS:
            class_folders.add(("/".join(parts[:-2]), parts[-2].lower(), same_name(parts[-1])))
    images = []
    for name in walked.files:
        parts = name.split("/")
        if any(map(hidden, parts)):
            continue
        in_class = len(parts) >= 3 and parts[-3].lower() in SPLITS
        if not name.lower().endswith(IMAGE_SUFFIXES) and not (
            in_class and _is_bare_dicom(name, source)
        ):
            left_out.append((name, f"not {SUFFIXES}"))
        elif not in_class:
            left_out.append((name, "not in a class folder of train, val or test"))
        else:
            images.append(name)
            class_folders.add(_place(name))
    once, again = walked.once(images)
    left_out += again
    found = [(*_place(name), name) for name in once]
    if not class_folders:
        _expect_no_links_out(root, walked)
        return _from_flat(root, walked, source, reading)
    # The Kaggle archive contains a second copy of itself one folder down: take the outermost.
    top = min({prefix for prefix, _, _ in class_folders}, key=lambda p: (len(p.split("/")), p))
    if top.count("/") > 1:
        raise InputError(f"{root} has its splits too deep, in {top}; give that folder as the root")
    left_out += [(name, "in a second copy of the tree") for p, _, _, name in found if p != top]
    class_folders = {key for key in class_folders if key[0] == top}
    found = [entry for entry in found if entry[0] == top]
    if not found:
        _expect_no_links_out(root, walked)
        raise InputError(f"{root} holds class folders but no {SUFFIXES} in them")

    filled = {(split, c) for _, split, c, _ in found}
    return _index_of(
        root,
        [_Found(name, split, kind) for _, split, kind, name in found],
        source,
        reading,
        {kind for _, _, kind in class_folders},
        [(split, kind) for _, split, kind in class_folders if (split, kind) not in filled],
        left_out,
    )


def _from_flat(root: Path, walked: Walked, source: Tree | Zip, reading: Reading) -> Index:
    """Finds class folders that lie side by side, without split folders."""
    left_out = [pair for pair in walked.refused if not any(map(hidden, pair[0].split("/")))]
    images = []
    for name in walked.files:
        if any(map(hidden, name.split("/"))):
            continue
        if name.lower().endswith(IMAGE_SUFFIXES) or _is_bare_dicom(name, source):
            images.append(name)
        else:
            left_out.append((name, f"not {SUFFIXES}"))
    once, again = walked.once(images)
    left_out += again
    folders = {PurePosixPath(name).parent for name in once}
    above = {parent for folder in folders for parent in folder.parents}
    folders -= above | {PurePosixPath()}  # files beside or above class folders have no class
    parents = sorted({folder.parent for folder in folders})
    if not folders or any(same_name(f.name).lower() in SPLITS for f in folders):
        hint = f"; did you mean {root.parent}?" if root.name.lower() in SPLITS else ""
        raise InputError(
            f"{root} holds no images in class folders; it should look like train/NORMAL/*.jpeg and"
            f" train/PNEUMONIA/*.jpeg, or NORMAL/*.jpeg and PNEUMONIA/*.jpeg{hint}"
        )
    if root.name.lower() in SPLITS:
        raise InputError(f"{root} is one split of a data set; did you mean {root.parent}?")
    if len(parents) > 1:
        a, b = (min(f for f in folders if f.parent == parent) for parent in parents[:2])
        raise InputError(
            f"{root} holds images in {a} and in {b}, which are not side by side as class folders"
            " should be; move them, or list the images in a table (--data.table)"
        )
    found = []
    for name in once:
        folder = PurePosixPath(name).parent
        if folder in folders:
            found.append(_Found(name, ALL, same_name(folder.name)))
        else:
            left_out.append((name, "not in a class folder"))
    return _index_of(root, found, source, reading, left_out=left_out)


def _place(name: str) -> tuple[str, str, str]:
    """Returns (prefix, split, class) of an image in a class folder."""
    parts = name.split("/")
    return "/".join(parts[:-3]), parts[-3].lower(), same_name(parts[-2])


def _expect_no_links_out(root: Path, walked: Walked) -> None:
    """Raises InputError if the reason for finding no images is links that lead out of the root."""
    for name, reason in walked.refused:
        if reason == LEADS_OUT:
            raise InputError(f"{root}: {name} is {reason}, or give the folder that holds both")


def _is_bare_dicom(name: str, source: Tree | Zip) -> bool:
    """Returns whether the content of a file without the suffix .dcm is DICOM."""
    if not may_be_dicom(name):
        return False
    try:
        return dicom.is_dicom(source.head(name))
    except OSError:
        return False


def _patient(name: str, source: Source) -> str:
    """Returns the patient ID of an image: from the tag of a DICOM file, else from its name."""
    if not isinstance(source, Arrays) and not name.lower().endswith((".jpeg", ".jpg", ".png")):
        with contextlib.suppress(OSError, dicom.DicomError):
            encoded = source.root / name if isinstance(source, Tree) else source.read(name)
            assert not isinstance(encoded, np.ndarray)
            if patient := dicom.patient_of(encoded):
                return patient
    return patient_of(name)


def _from_npz(path: Path, reading: Reading) -> Index:
    source = Arrays(path)
    found: list[tuple[str, str, int]] = []  # (name, split, number of the class)
    for split in SPLITS:
        if f"{split}_labels.npy" not in source.members:
            continue
        labels = source.array(f"{split}_labels")
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise InputError(
                f"{path}: {split}_labels holds {labels.shape[1]} findings per image (multi-label),"
                " which are not supported; give each image one class"
            )
        labels = labels.reshape(-1)
        if f"{split}_images.npy" not in source.members:
            raise InputError(f"{path} has {split}_labels but no {split}_images")
        images = source.array(f"{split}_images")
        if images.dtype != np.uint8 or images.shape[3:] not in ((), (1,), (3,)) or images.ndim < 3:
            shape = f"{images.dtype} {list(images.shape)}"
            raise InputError(
                f"{path}: {split}_images is {shape}, not uint8 [n, height, width(, 1 or 3)]"
            )
        if len(images) != len(labels):
            raise InputError(f"{path}: {len(labels)} {split}_labels for {len(images)} images")
        if not ((labels >= 0) & (labels == labels.astype(np.int64))).all():
            raise InputError(f"{path}: {split}_labels holds values other than 0, 1, 2 and so on")
        found += [
            (f"{split}/{number:05d}", split, int(label)) for number, label in enumerate(labels)
        ]
    if not found:
        raise InputError(f"{path} holds no train_images and train_labels, as MedMNIST files do")
    binary = all(label < 2 for _, _, label in found)
    names = _MEDMNIST_CLASSES if binary else [str(k) for k in range(1 + max(k for *_, k in found))]
    return _index_of(
        path,
        [_Found(name, split, names[label]) for name, split, label in found],
        source,
        reading,
        names,
    )


def _from_table(path: Path, columns: str, root: Path, reading: Reading) -> Index:
    if root.suffix.lower() == ".npz" and not root.is_dir():
        raise InputError(f"a table lists files, so it cannot go with {root}; drop one of the two")
    if not root.exists():
        raise InputError(f"{root} does not exist; give the folder or .zip that holds the images")
    if not root.is_dir() and root.suffix.lower() != ".zip":
        raise InputError(f"{root} is not a folder or .zip; give the one with the files of {path}")
    source = Tree(root) if root.is_dir() else Zip(root)
    found = [
        _Found(row.name, row.split or ALL, same_name(row.label), row.patient, row.weight)
        for row in read_rows(path, columns, source)
    ]
    return _index_of(path, found, source, reading)
