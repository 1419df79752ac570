"""Lists the images under a data root: class folders, a zip of them, a MedMNIST .npz, or a table.

`read_index` looks only at names, and at the patient IDs in DICOM files; no image is decoded. An
index can be counted, split by patient, and decoded with `cnnjax.data.cache`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from cnnjax.data import dicom
from cnnjax.data.examples import Examples, Texts
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
from cnnjax.data.sources import SHARDS, Arrays, Source, Tree, Zip, name_of, record_of
from cnnjax.data.table import read_rows
from cnnjax.errors import InputError

SPLITS = ("train", "val", "test")
ALL = "all"
"""The split of an image that neither a folder nor a table assigns to one of `SPLITS`."""

_MEDMNIST_CLASSES = ("NORMAL", "PNEUMONIA")
_NAMED = 10  # links listed by name; the rest are counted


@dataclass(frozen=True)
class Index:
    """The images under a root, with their classes and patients, and the files left out."""

    root: Path
    """The folder, archive or table from which the index was read."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ...; of two classes, the positive one is last."""
    examples: Examples
    """Every image, sorted by split and name."""
    empty: tuple[str, ...]
    """`split/class` folders that hold no image."""
    left_out: tuple[tuple[str, str], ...]
    """(name, reason) of each file that is not one of the images."""
    source: Source

    def split(self, *names: str) -> Examples:
        """Returns the images of these splits.

        The images of a data set without splits all count as `train`. The name `all` selects every
        image of any data set.

        Raises:
            InputError: the data set has none of the splits, one of the splits has an empty class
                folder, or together they hold only one class.
        """
        wanted = " or ".join(names)
        every = ALL in names
        wanted_too = (ALL,) if "train" in names else ()
        chosen = self.examples
        if not every:
            chosen = chosen.take(chosen.of_split(*names, *wanted_too))
        for folder in self.empty:
            if every or folder.partition("/")[0] in names:
                raise InputError(f"{self.root}: the class folder {folder} holds no image")
        if not chosen:
            there = self.examples.splits
            if there == (ALL,):
                raise InputError(
                    f"{self.root} has no {wanted} split: it is not divided into splits;"
                    " train with --data.validation patients, evaluate with --split all"
                )
            raise InputError(f"{self.root} has no {wanted} split, only {', '.join(there)}")
        labels = np.unique(chosen.labels)
        if len(labels) == 1:
            raise InputError(
                f"{self.root}: {wanted} holds only one class, {self.classes[labels[0]]};"
                f" add images of {' and '.join(c for c in self.classes if c)}"
            )
        return chosen

    def describe(self) -> str:
        """Returns a few lines: images per split and class, patients, and files left out."""
        lines = [f"data      {self.root}"]
        for split in (*SPLITS, ALL):
            members = self.examples.take(self.examples.of_split(split))
            if members:
                counts = np.bincount(members.labels, minlength=len(self.classes))
                each = zip(counts, self.classes, strict=True)
                per_class = ", ".join(f"{count:,} {name}" for count, name in each)
                patients = len(np.unique(members.patient_numbers))
                lines.append(f"  {split:<6} {per_class}; {patients:,} patients")
        nameless = int(self.examples.without_patient.sum())
        if nameless:
            lines.append(f"  {nameless:,} file names give no patient ID: each counts as a patient")
        weights = self.examples.weights
        if (weights != 1).any():
            lines.append(f"  losses are weighted by {weights.min():g} to {weights.max():g}")
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
    """Images whose classes have no numbers yet, in columns."""

    names: Texts
    splits: Sequence[str]
    kinds: Sequence[str]
    """The class names in the folders or the table, in the spelling of `same_name`."""
    patients: Sequence[str | None] | None = None
    weights: Sequence[float] | None = None

    def at(self, rows: np.ndarray) -> _Found:
        """Returns the images at these rows, int [m]."""

        def some(column: Sequence[Any] | None) -> Any:
            return None if column is None else [column[row] for row in rows]

        names, *others = self
        return _Found(names.take(rows), *map(some, others))


def _index_of(
    root: Path,
    found: _Found,
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
        pairs = zip(found.names, found.kinds, strict=True)
        told = [_kind(name, kind, reading.classes) for name, kind in pairs]
        out += [
            (name, f"of class {kind}, which is none of {', '.join(reading.classes)}")
            for name, kind, ours in zip(found.names, found.kinds, told, strict=True)
            if ours is None
        ]
        found = found._replace(kinds=[kind or "" for kind in told])
        found = found.at(np.flatnonzero([kind is not None for kind in told]))
        kinds = ()
    classes = _classes(root, set(found.kinds) | set(kinds), reading)
    label = {name: k for k, name in enumerate(classes)}
    searched = _pattern(root, found, reading.patient_pattern)
    rows = found.names.order()
    rank = {split: k for k, split in enumerate((*SPLITS, ALL))}
    ranks = np.fromiter((rank[found.splits[row]] for row in rows), np.int8, len(rows))
    found = found.at(rows[np.argsort(ranks, kind="stable")])
    examples = Examples(
        found.names,
        found.splits,
        (label[kind] for kind in found.kinds),
        _patients(found, source, searched),
        found.weights,
    )
    bare = tuple(sorted(f"{split}/{kind}" for split, kind in empty if kind in label))
    return Index(root, classes, examples, bare, tuple(sorted(out)), source)


def _kind(name: str, kind: str, classes: tuple[str, ...]) -> str | None:
    """Returns the class of an image if it is among these classes, else None."""
    if kind in classes:
        return kind
    cause = cause_of(name)
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


def _pattern(root: Path, found: _Found, pattern: str) -> re.Pattern[str] | None:
    """Returns the pattern that finds the patients in the names; None if there is none.

    Raises:
        InputError: it is not a pattern, has no effect, or finds no patient.
    """
    if not pattern:
        return None
    if found.patients is not None:
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
    if not any((match := searched.search(name)) and match[searched.groups] for name in found.names):
        raise InputError(
            f"--data.patient-pattern {pattern} finds no patient in any of {len(found.names):,}"
            f" names, such as {found.names[0]}"
        )
    return searched


def _patients(found: _Found, source: Source, searched: re.Pattern[str] | None) -> Iterator[str]:
    """Yields the patient ID of each image."""
    if searched is not None:
        for name in found.names:
            match = searched.search(name)
            yield (match and match[searched.groups]) or name
        return
    for name, patient in zip(found.names, found.patients or itertools.repeat(None), strict=False):
        yield patient or _patient(name, source)


def _from_names(root: Path, walked: Walked, source: Tree | Zip, reading: Reading) -> Index:
    """Finds split and class folders in the paths of a folder or a zip."""
    place, is_hidden = functools.cache(_place), functools.cache(_hidden)
    left_out = [pair for pair in walked.refused if not is_hidden(pair[0])]
    class_folders: set[tuple[str, str, str]] = set()
    for folder in walked.folders:
        if not is_hidden(folder) and (found_in := place(folder)):
            class_folders.add(found_in)

    def is_image(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if is_hidden(folder) or hidden(file):
            return False
        found_in = place(folder)
        if not _may_be_image(name, source) and not (found_in and _is_bare_dicom(name, source)):
            left_out.append((name, f"not {SUFFIXES}"))
        elif not found_in:
            left_out.append((name, "not in a class folder of train, val or test"))
        else:
            class_folders.add(found_in)
            return True
        return False

    once, again = walked.once(walked.files.where(map(is_image, walked.files)))
    left_out += again
    if not class_folders:
        _expect_no_links_out(root, walked)
        return _from_flat(root, walked, source, reading)
    # The Kaggle archive contains a second copy of itself one folder down: take the outermost.
    top = min({prefix for prefix, _, _ in class_folders}, key=lambda p: (len(p.split("/")), p))
    if top.count("/") > 1:
        raise InputError(f"{root} has its splits too deep, in {top}; give that folder as the root")

    def in_top(name: str) -> bool:
        found_in = place(name.rpartition("/")[0])
        if found_in is not None and found_in[0] == top:
            return True
        left_out.append((name, "in a second copy of the tree"))
        return False

    files = once.where(map(in_top, once))
    names, rows = _images_of(files, source)
    places = [place(name.rpartition("/")[0]) or ("", "", "") for name in files]
    splits, kinds = [places[row][1] for row in rows], [places[row][2] for row in rows]
    if not names:
        _expect_no_links_out(root, walked)
        raise InputError(f"{root} holds class folders but no {SUFFIXES} in them")
    there = {(split, kind) for prefix, split, kind in class_folders if prefix == top}
    return _index_of(
        root,
        _Found(names, splits, kinds),
        source,
        reading,
        {kind for _, kind in there},
        there - set(zip(splits, kinds, strict=True)),
        left_out,
    )


def _from_flat(root: Path, walked: Walked, source: Tree | Zip, reading: Reading) -> Index:
    """Finds class folders that lie side by side, without split folders."""
    is_hidden = functools.cache(_hidden)
    left_out = [pair for pair in walked.refused if not is_hidden(pair[0])]

    def is_image(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if is_hidden(folder) or hidden(file):
            return False
        if _may_be_image(name, source) or _is_bare_dicom(name, source):
            return True
        left_out.append((name, f"not {SUFFIXES}"))
        return False

    once, again = walked.once(walked.files.where(map(is_image, walked.files)))
    left_out += again
    folders = {PurePosixPath(folder) for folder in {name.rpartition("/")[0] for name in once}}
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
    kind_of = {str(folder): same_name(folder.name) for folder in folders}
    left_out += [
        (name, "not in a class folder") for name in once if name.rpartition("/")[0] not in kind_of
    ]
    files = once.where(name.rpartition("/")[0] in kind_of for name in once)
    names, rows = _images_of(files, source)
    kinds = [kind_of[name.rpartition("/")[0]] for name in files]
    found = _Found(names, [ALL] * len(names), [kinds[row] for row in rows])
    return _index_of(root, found, source, reading, left_out=left_out)


def _place(folder: str) -> tuple[str, str, str] | None:
    """Returns (prefix, split, class) of a class folder; None if it is in no split folder."""
    parts = folder.split("/")
    if len(parts) < 2 or parts[-2].lower() not in SPLITS:
        return None
    return "/".join(parts[:-2]), parts[-2].lower(), same_name(parts[-1])


def _hidden(path: str) -> bool:
    """Returns whether a path, or a folder above it, is ignored."""
    return any(map(hidden, path.split("/")))


def _expect_no_links_out(root: Path, walked: Walked) -> None:
    """Raises InputError if the reason for finding no images is links that lead out of the root."""
    for name, reason in walked.refused:
        if reason == LEADS_OUT:
            raise InputError(f"{root}: {name} is {reason}, or give the folder that holds both")


def _may_be_image(name: str, source: Tree | Zip) -> bool:
    """Returns whether the suffix is that of an image, or in a folder of an ArrayRecord file."""
    suffixes = IMAGE_SUFFIXES + (SHARDS if isinstance(source, Tree) else ())
    return name.lower().endswith(suffixes)


def _images_of(files: Texts, source: Tree | Zip) -> tuple[Texts, np.ndarray]:
    """Returns the names of the images in files, their own or those of records; and their files.

    Returns:
        The names of n images; int [n], the row of each image's file.
    """
    rows = np.arange(len(files))
    if not isinstance(source, Tree) or not any(name.lower().endswith(SHARDS) for name in files):
        return files, rows
    records = [source.records(name) if name.lower().endswith(SHARDS) else None for name in files]
    names = Texts(
        image
        for name, count in zip(files, records, strict=True)
        for image in ([name] if count is None else (name_of(name, k) for k in range(count)))
    )
    return names, rows.repeat([1 if count is None else count for count in records])


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
    record = record_of(name)
    if record and isinstance(source, Tree) and not _holds_dicom(record[0], source):
        return patient_of(name)
    if not isinstance(source, Arrays) and not name.lower().endswith((".jpeg", ".jpg", ".png")):
        with contextlib.suppress(OSError, dicom.DicomError):
            if isinstance(source, Tree) and not record:
                encoded: Path | bytes | np.ndarray = source.root / name
            else:
                encoded = source.read(name)
            assert not isinstance(encoded, np.ndarray)
            if patient := dicom.patient_of(encoded):
                return patient
    return patient_of(name)


@functools.lru_cache(maxsize=1)  # the records of a file are asked for one after another
def _holds_dicom(shard: str, source: Tree) -> bool:
    """Returns whether the first record of an ArrayRecord file is a DICOM file."""
    try:
        return dicom.is_dicom(source.read(name_of(shard, 0)))
    except OSError:
        return False


def _from_npz(path: Path, reading: Reading) -> Index:
    source = Arrays(path)
    found: list[str] = []
    splits: list[str] = []
    numbers: list[int] = []
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
        found += [f"{split}/{number:05d}" for number in range(len(labels))]
        splits += [split] * len(labels)
        numbers += map(int, labels)
    if not found:
        raise InputError(f"{path} holds no train_images and train_labels, as MedMNIST files do")
    names = _MEDMNIST_CLASSES if max(numbers) < 2 else [str(k) for k in range(1 + max(numbers))]
    kinds = [names[number] for number in numbers]
    return _index_of(path, _Found(Texts(found), splits, kinds), source, reading, names)


def _from_table(path: Path, columns: str, root: Path, reading: Reading) -> Index:
    if root.suffix.lower() == ".npz" and not root.is_dir():
        raise InputError(f"a table lists files, so it cannot go with {root}; drop one of the two")
    if not root.exists():
        raise InputError(f"{root} does not exist; give the folder or .zip that holds the images")
    if not root.is_dir() and root.suffix.lower() != ".zip":
        raise InputError(f"{root} is not a folder or .zip; give the one with the files of {path}")
    source = Tree(root) if root.is_dir() else Zip(root)
    rows = read_rows(path, columns, source)
    kind = functools.cache(same_name)
    found = _Found(
        rows.names,
        rows.splits or [ALL] * len(rows.names),
        list(map(kind, rows.labels)),
        rows.patients,
        rows.weights,
    )
    return _index_of(path, found, source, reading)
