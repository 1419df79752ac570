"""What lies under a data root: a class-folder tree, a zip of one, or a MedMNIST .npz.

`read_index` looks at names only, and in DICOM files at whom they show; no image is decoded. What it
returns can be counted, split by patient, and handed to `cnnjax.data.cache` to be decoded.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cnnjax.data import dicom
from cnnjax.data.bounds import read_entry, read_file
from cnnjax.data.kermany import patient_of
from cnnjax.data.names import (
    IMAGE_SUFFIXES,
    LEADS_OUT,
    SUFFIXES,
    Walked,
    hidden,
    in_archive,
    may_be_dicom,
    same_name,
    walk,
)
from cnnjax.errors import InputError

SPLITS = ("train", "val", "test")

_MEDMNIST_CLASSES = ("NORMAL", "PNEUMONIA")
# Bytes of an array in an .npz that are refused, that are taken however well they are compressed,
# and how well others may be: radiographs halve.
_LARGEST_ARRAY, _LARGEST_FLAT, _LARGEST_RATIO = 4 * 2**30, 128 * 2**20, 50
_NAMED = 10  # links that are named; the rest are counted


@dataclass(frozen=True)
class Example:
    """One image of the index."""

    name: str
    """Where it lies: a path relative to the root, with forward slashes."""
    split: str
    """`train`, `val` or `test`."""
    label: int
    """1 for the positive class, else 0."""
    patient: str
    """Whom it shows; the image's own name where that cannot be told."""


class Source(Protocol):
    """Gives the encoded bytes, or the pixels, of the images of an index."""

    def read(self, name: str) -> bytes | np.ndarray:
        """Returns the file's bytes or, from an array file, uint8 [height, width(, 3)].

        Raises:
            OSError: it cannot be read; the text says why.
        """

    def signature(self, name: str) -> tuple[int, ...]:
        """Returns numbers, the size in bytes first: others mean that the content may be another."""


@dataclass(frozen=True)
class Index:
    """The images under a root, their classes and patients, and what was left out."""

    root: Path
    classes: tuple[str, str]
    """Names of the negative and the positive class."""
    examples: tuple[Example, ...]
    """Every image, sorted by split and name."""
    empty: tuple[str, ...]
    """`split/class` folders without an image."""
    left_out: tuple[tuple[str, str], ...]
    """(name, reason) of each file that is not one of the images."""
    source: Source

    def split(self, *names: str) -> tuple[Example, ...]:
        """Returns the images of these splits.

        Raises:
            InputError: none of the splits is there, one of them has an empty class folder, or
                together they hold one class only.
        """
        chosen = tuple(e for e in self.examples if e.split in names)
        wanted = " or ".join(names)
        for folder in self.empty:
            if folder.partition("/")[0] in names:
                raise InputError(f"{self.root}: the class folder {folder} holds no image")
        if not chosen:
            there = ", ".join(sorted({e.split for e in self.examples}))
            raise InputError(f"{self.root} has no {wanted} split, only {there}")
        labels = {e.label for e in chosen}
        if len(labels) == 1:
            raise InputError(
                f"{self.root}: {wanted} holds one class only, {self.classes[labels.pop()]};"
                f" add images of {' and '.join(c for c in self.classes if c)}"
            )
        return chosen

    def describe(self) -> str:
        """Returns a few lines: images per split and class, patients, and what was left out."""
        lines = [f"data      {self.root}"]
        for split in SPLITS:
            members = [e for e in self.examples if e.split == split]
            if members:
                count = Counter(e.label for e in members)
                per_class = ", ".join(f"{count[k]:,} {self.classes[k]}" for k in (0, 1))
                patients = len({e.patient for e in members})
                lines.append(f"  {split:<6} {per_class}; {patients:,} patients")
        nameless = sum(e.patient == e.name for e in self.examples)
        if nameless:
            lines.append(f"  {nameless:,} file names tell no patient: each counts as a patient")
        reasons = Counter(reason for _, reason in self.left_out)
        lines += [f"  left out: {n:,} {reason}" for reason, n in sorted(reasons.items())]
        refused = [name for name, reason in self.left_out if reason.startswith("a link")]
        lines += [f"    {name}" for name in refused[:_NAMED]]
        if len(refused) > _NAMED:
            lines.append(f"    and {len(refused) - _NAMED:,} more links")
        return "\n".join(lines)


def read_index(root: Path | str, positive: str = "PNEUMONIA") -> Index:
    """Lists the images under a root.

    Args:
        root: a folder or a zip that holds `train`, `val` or `test` with a folder for each of two
            classes (at the top or nested up to two folders down, as archives are), or a MedMNIST
            .npz. Letter case does not matter; hidden files and `__MACOSX` are passed over.
        positive: name of the class that gets label 1.

    Raises:
        InputError: the root is not there, cannot be read, or holds no such images.
    """
    root = Path(root)
    if root.is_dir():
        return _from_names(root, walk(root, confined=True), _Tree(root), positive)
    if not root.exists():
        raise InputError(f"{root} does not exist; give a folder, a .zip or a .npz")
    if root.suffix.lower() == ".npz":
        return _from_npz(root, positive)
    if root.suffix.lower() == ".zip":
        zipped = _Zip(root)
        return _from_names(root, zipped.walked, zipped, positive)
    raise InputError(f"{root} is no folder, .zip or .npz; give one of these")


class _Tree:
    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes:
        return read_file(self.root / name)

    def head(self, name: str) -> bytes:
        """Returns the first bytes of a file, as many as tell DICOM; raises OSError."""
        with (self.root / name).open("rb") as file:
            return file.read(dicom.HEAD)

    def signature(self, name: str) -> tuple[int, ...]:
        try:
            status = (self.root / name).stat()
        except OSError:  # a link to nowhere: decoding it will say so
            return -1, 0
        # Copies may keep the time of the content's change; that of the inode's cannot be set.
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class _Zip:
    def __init__(self, path: Path) -> None:
        try:
            # One open file serves every thread: ZipFile locks its reads and inflates outside.
            self.archive = zipfile.ZipFile(path)
        # ValueError: names that are not the Unicode they are said to be.
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{path} cannot be read as a zip ({error}); fetch it again") from None
        self.infos: dict[str, zipfile.ZipInfo] = {}
        self.walked = Walked()
        for info in self.archive.infolist():
            name = in_archive(info.filename)
            if name is None:
                self.walked.refused.append((info.filename, "a name that leads out of the zip"))
            elif info.filename.endswith(("/", "\\")):
                self.walked.folders.append(name)
            else:
                self.infos[name] = info
                self.walked.files[name] = "/" + name

    def read(self, name: str) -> bytes:
        with _named_broken():
            return read_entry(self.archive, self.infos[name])

    def head(self, name: str) -> bytes:
        """Returns the first bytes of an entry, as many as tell DICOM; raises OSError."""
        with _named_broken(), self.archive.open(self.infos[name]) as entry:
            return entry.read(dicom.HEAD)

    def signature(self, name: str) -> tuple[int, ...]:
        return self.infos[name].file_size, self.infos[name].CRC


@contextlib.contextmanager
def _named_broken() -> Iterator[None]:
    """Turns the errors of a broken zip, of which each compression has its own, into OSError."""
    try:
        yield
    except MemoryError:
        raise
    except OSError:
        raise  # of the disk, or of our limits
    except Exception as error:
        raise OSError(f"broken in the zip: {error}") from None


class _Arrays:
    """The arrays of a MedMNIST file, each loaded once and kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as members:
                self.members = {i.filename: (i.file_size, i.CRC) for i in members.infolist()}
            self.file = np.load(path, allow_pickle=False)
        # NotImplementedError: it says that it needs a later version of zip.
        except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as an .npz ({error})") from None
        self.loaded: dict[str, np.ndarray] = {}

    def array(self, key: str) -> np.ndarray:
        if key not in self.loaded:
            try:
                self._expect_bounded(f"{key}.npy")
                self.loaded[key] = self.file[key]
            except Exception as error:  # zlib.error, ValueError, BadZipFile: whatever broke
                raise InputError(f"{self.path}: {key} cannot be read ({error})") from None
        return self.loaded[key]

    def _expect_bounded(self, member: str) -> None:
        """Raises ValueError where an array is larger than its file or than memory should hold."""
        info = self.file.zip.getinfo(member)
        size = info.file_size
        if size > _LARGEST_ARRAY or size > max(_LARGEST_FLAT, _LARGEST_RATIO * info.compress_size):
            raise ValueError(f"it would take {size / 2**20:,.0f} MiB")
        with self.file.zip.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = reader(stream)
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"its header tells of {list(shape)}, which is more than there is")

    def read(self, name: str) -> np.ndarray:
        split, number = name.split("/")
        pixels: np.ndarray = self.array(f"{split}_images")[int(number)]
        return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels

    def signature(self, name: str) -> tuple[int, ...]:
        return self.members[f"{name.partition('/')[0]}_images.npy"]


def _from_names(root: Path, walked: Walked, source: _Tree | _Zip, positive: str) -> Index:
    """Finds the split and class folders in a list of paths; trees and zips alike."""
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
        hint = f"; did you mean {root.parent}?" if root.name.lower() in SPLITS else ""
        raise InputError(
            f"{root} holds no images in class folders; "
            f"it should look like train/NORMAL/*.jpeg and train/PNEUMONIA/*.jpeg{hint}"
        )
    # The Kaggle archive carries a second copy of itself one folder down: take the outermost.
    top = min({prefix for prefix, _, _ in class_folders}, key=lambda p: (len(p.split("/")), p))
    if top.count("/") > 1:
        raise InputError(f"{root} has its splits too deep, in {top}; give that folder as the root")
    left_out += [(name, "in a second copy of the tree") for p, _, _, name in found if p != top]
    class_folders = {key for key in class_folders if key[0] == top}
    found = [entry for entry in found if entry[0] == top]
    if not found:
        _expect_no_links_out(root, walked)
        raise InputError(f"{root} holds class folders but no {SUFFIXES} in them")

    classes = _two_classes(root, {c for _, _, c in class_folders}, positive)
    filled = {(split, c) for _, split, c, _ in found}
    return Index(
        root=root,
        classes=classes,
        examples=_sorted(
            Example(name, split, classes.index(c), _patient(name, source))
            for _, split, c, name in found
        ),
        empty=tuple(sorted(f"{s}/{c}" for _, s, c in class_folders if (s, c) not in filled)),
        left_out=tuple(sorted(left_out)),
        source=source,
    )


def _place(name: str) -> tuple[str, str, str]:
    """Returns (prefix, split, class) of an image in a class folder."""
    parts = name.split("/")
    return "/".join(parts[:-3]), parts[-3].lower(), same_name(parts[-2])


def _expect_no_links_out(root: Path, walked: Walked) -> None:
    """Raises InputError where links out of the root are why nothing is found in it."""
    for name, reason in walked.refused:
        if reason == LEADS_OUT:
            raise InputError(f"{root}: {name} is {reason}, or give the folder that holds both")


def _is_bare_dicom(name: str, source: _Tree | _Zip) -> bool:
    """Tells whether a file is DICOM, by its content, though its name does not end in .dcm."""
    if not may_be_dicom(name):
        return False
    try:
        return dicom.is_dicom(source.head(name))
    except OSError:
        return False


def _patient(name: str, source: _Tree | _Zip) -> str:
    """Returns whom an image shows: by its tag in a DICOM file, else by its name."""
    if not name.lower().endswith((".jpeg", ".jpg", ".png")):
        with contextlib.suppress(OSError, dicom.DicomError):
            encoded = source.root / name if isinstance(source, _Tree) else source.read(name)
            if patient := dicom.patient_of(encoded):
                return patient
    return patient_of(name)


def _from_npz(path: Path, positive: str) -> Index:
    source = _Arrays(path)
    classes = _two_classes(path, set(_MEDMNIST_CLASSES), positive)
    examples: list[Example] = []
    for split in SPLITS:
        if f"{split}_labels.npy" not in source.members:
            continue
        labels = source.array(f"{split}_labels").reshape(-1)
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
        if not np.isin(labels, (0, 1)).all():
            raise InputError(f"{path}: {split}_labels holds values other than 0 and 1")
        for number, label in enumerate(labels):
            name = f"{split}/{number:05d}"
            positive_here = _MEDMNIST_CLASSES[int(label)] == classes[1]
            examples.append(Example(name, split, int(positive_here), patient_of(name)))
    if not examples:
        raise InputError(f"{path} holds no train_images and train_labels, as MedMNIST files do")
    return Index(path, classes, _sorted(examples), (), (), source)


def _two_classes(root: Path, names: set[str], positive: str) -> tuple[str, str]:
    positive = same_name(positive)
    listed = ", ".join(sorted(names))
    if len(names) != 2:
        raise InputError(f"{root} needs images of exactly two classes, found {listed}")
    if positive not in names:
        raise InputError(
            f"{root} has the classes {listed}, not {positive}; for training, name one of them with"
            " --data.positive"
        )
    (negative,) = names - {positive}
    return negative, positive


def _sorted(examples: Iterable[Example]) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=lambda e: (SPLITS.index(e.split), e.name)))
