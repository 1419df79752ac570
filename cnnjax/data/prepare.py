"""Makes the arrays for training from a config: lists, decodes and splits the images."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from cnnjax.config import DataConfig
from cnnjax.data import cache, duplicates, framing
from cnnjax.data.comparisons import copies_of, pairs_of
from cnnjax.data.examples import Example, Examples
from cnnjax.data.index import Index, read_index
from cnnjax.data.patients import block_folds, grouped_folds, groups_of, in_several_splits
from cnnjax.errors import InputError
from cnnjax.machine.files import no_cache, sweep
from cnnjax.machine.host import cache_folder

Say = Callable[[str], None]

_NAMED = 10  # patients listed by name in a warning; the rest are counted


@dataclass(frozen=True)
class TrainingData:
    """The decoded images of a run, and which of them are held out."""

    decoded: cache.Decoded
    held_out: np.ndarray
    """bool [n], true for validation images."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    duplicates: tuple[duplicates.Duplicate, ...] = ()
    """Images that repeat an earlier radiograph, including those that are left out."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [n], of all images."""
        return self.decoded.labels

    @property
    def train(self) -> np.ndarray:
        """int64 [n_train], rows of the training images."""
        return np.flatnonzero(~self.held_out)

    @property
    def validation(self) -> np.ndarray:
        """int64 [n_validation], rows of the held-out images."""
        return np.flatnonzero(self.held_out)


def data_of(
    images: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    classes: tuple[str, ...],
    *,
    patients: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> TrainingData:
    """Returns arrays as the data of a run, for `cnnjax.fit(config, data=...)`.

    Args:
        images: uint8 [n, size, size]; size as in the config.
        labels: int [n], from 0.
        held_out: bool [n], true for validation images; each patient must be on one side.
        classes: names of the labels.
        patients: patient ID of each image; by default each image is a patient of its own.
        names: names of the images; by default their numbers.

    Raises:
        InputError: the arrays do not fit together, a side lacks a class, or a patient is on both
            sides.
    """
    n = len(images)
    names = [f"image-{i:07}" for i in range(n)] if names is None else names
    patients = names if patients is None else patients
    if images.dtype != np.uint8 or images.shape[1:] != images.shape[1:2] * 2:
        raise InputError(
            f"images must be uint8 [n, size, size], got {images.dtype} {list(images.shape)}"
        )
    if {len(part) for part in (labels, held_out, patients, names)} != {n}:
        raise InputError(f"labels, held_out, patients and names must each have length {n}")
    if np.ndim(labels) != 1:
        raise InputError(
            f"labels must be int [n], got {list(np.shape(labels))}: several findings per image"
            " (multi-label) are not supported; give each image one class"
        )
    held_out = np.asarray(held_out, bool)
    for side in (~held_out, held_out):
        if set(np.asarray(labels)[side].tolist()) != set(range(len(classes))):
            raise InputError(f"training and held-out images must each show all of {classes}")
    shared = {p for p, h in zip(patients, held_out, strict=True) if h}
    shared &= {p for p, h in zip(patients, held_out, strict=True) if not h}
    if shared:
        raise InputError(f"patient {min(shared)} is in both the training and the held-out images")
    examples = Examples(names, itertools.repeat("train", n), np.asarray(labels).tolist(), patients)
    return TrainingData(cache.decoded_of(images, examples), held_out, classes)


def expect_two_classes(classes: Sequence[str], who: str) -> None:
    """Raises InputError if there are more than two classes; `who` names the program."""
    if len(classes) > 2:
        raise InputError(
            f"{who} supports two classes, and these are {len(classes)}: {', '.join(classes)}"
        )


def open_index(config: DataConfig, say: Say) -> Index:
    """Returns the index of the config's root; for the root `phantom`, draws the phantoms first.

    Raises:
        InputError: see `read_index`.
    """
    root = _expanded(config.root)
    if config.root == "phantom":
        from cnnjax import phantom

        root = (config.cache or cache_folder()) / f"phantom-{phantom.VERSION}"
        if not root.is_dir():
            say(f"drawing the phantom radiographs into {root}")
            sweep(root)
            try:
                phantom.write_tree(root)
            except FileExistsError:
                pass  # another process drew the same ones in the meantime
            except OSError as error:
                raise no_cache(root, error) from None
    return read_index(
        root,
        config.positive,
        classes=config.class_names,
        patient_pattern=config.patient_pattern,
        table=config.table and _expanded(str(config.table)),
        columns=config.columns,
    )


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()  # not every shell expands ~ after a =
    except RuntimeError:
        raise InputError(f"{path} does not exist; the user's home is unknown") from None


def training_data(
    config: DataConfig,
    seed: int,
    say: Say,
    mesh: Mesh | None = None,
    index: Index | None = None,
) -> TrainingData:
    """Returns the decoded images of train and val, and which of them are held out.

    The split is drawn over every image of the index; a file that cannot be decoded therefore does
    not change the split of the others. Patients who share a radiograph are then moved into one
    fold, and radiographs that occur in two classes are left out (`cnnjax.data.duplicates`).

    Args:
        config: the data and their settings.
        seed: seed of the folds.
        say: called with messages of a few lines.
        mesh: the devices that find the lungs for `--data.frame lungs`; by default all devices of
            the fastest kind.
        index: the index, if `open_index` has been called already.

    Raises:
        InputError: the data are not usable; see `read_index`, `Index.split`, `cache.load`.
    """
    index = open_index(config, say) if index is None else index
    say(index.describe())
    for (a, b), shared in leaking_patients(index, config).items():
        names = ", ".join(shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else "")
        say(f"warning: {len(shared)} patients are in both {a} and {b}: {names}")
    if config.validation == "official":
        index.split("val")
        index.split("train")
    examples = index.split("train", "val")
    _expect_each_class(examples, index, config)
    if (
        config.table is not None
        and config.validation != "official"
        and {"train", "val"} <= {*examples.splits}
    ):
        say("  train and val are pooled and split again; --data.validation official keeps them")
    if config.validation == "official":
        folds = 1 - examples.of_split("val").astype(np.int64)
        held_out_fold = 0
    elif config.validation == "blocks":
        folds, held_out_fold = block_folds(examples, config.folds, index.classes), config.fold
    else:
        folds = grouped_folds(examples, config.folds, seed, index.classes)
        held_out_fold = config.fold
    _expect_classes_on_both_sides(
        examples.labels,
        folds == held_out_fold,
        index.classes,
        f"{index.root}: with --data.validation {config.validation}, --data.folds {config.folds} and"
        f" --data.fold {config.fold},",
        "choose others",
    )
    _warn_of_copies(index, say, config)
    decoded, folds, twice = _each_film_once(examples, folds, index, config)
    if decoded.quarantine:
        both = sum(reason.startswith(_BOTH) for _, reason in decoded.quarantine)
        if broken := len(decoded.quarantine) - both:
            say(f"  left out: {broken:,} that cannot be decoded, see quarantine.csv")
        if both:
            say(f"  left out: {both:,} images of radiographs in two classes, see quarantine.csv")
    if twice:
        say(_describe(twice))
    if config.frame == "lungs":
        decoded = framing.framed(decoded, config, mesh)
    if decoded.found is not None and (missed := int((~decoded.found).sum())):
        say(f"  no lungs found in {missed:,} images, which are not cropped")
    held_out = folds == held_out_fold
    _expect_classes_on_both_sides(
        decoded.labels, held_out, index.classes, f"{index.root}: after decoding,", "fix the files"
    )
    return TrainingData(decoded, held_out, index.classes, twice)


def protocol(config: DataConfig, seed: int) -> str:
    """Returns a phrase that describes the validation split."""
    if config.validation == "official":
        return f"official val folder, seed {seed}"
    kind = {
        "patients": "patient-grouped and class-stratified",
        "blocks": "blocks of the file numbering",
    }[config.validation]
    return f"fold {config.fold} of {config.folds}, {kind}, seed {seed}"


def side_of(example: Example, config: DataConfig) -> str:
    """Returns the side of the given splits that an image is on; train and val are one if pooled."""
    return example.split if config.validation == "official" else _pooled(example.split)


def _pooled(split: str) -> str:
    return split if split == "test" else "train"


def leaking_patients(index: Index, config: DataConfig) -> dict[tuple[str, str], list[str]]:
    """Returns the sorted patients that two splits share, for each such pair of splits.

    Train and val are not such a pair if they are pooled.
    """
    return {
        (a, b): shared
        for (a, b), shared in in_several_splits(index.examples).items()
        if config.validation == "official" or _pooled(a) != _pooled(b)
    }


_BOTH = "in two classes"
_SHOWN = 2  # duplicates listed by name; duplicates.csv has all of them


def _each_film_once(
    examples: Examples, folds: np.ndarray, index: Index, config: DataConfig
) -> tuple[cache.Decoded, np.ndarray, tuple[duplicates.Duplicate, ...]]:
    """Decodes the images, and handles those of the same radiograph.

    Args:
        examples: n images.
        folds: int [n], as drawn.
        index: the index of the images.
        config: the settings of the data set.

    Returns:
        The m images that can be decoded and are not in two classes; int [m], their folds; and the
        duplicates among all images.

    Raises:
        InputError: see `cache.load`; with `--data.strict`, also if a radiograph is in two classes.
    """
    size, folder = framing.decoded_size(config), config.cache
    limit = config.cache_mib
    decoded = cache.load(
        examples, index.source, size, folder=folder, strict=config.strict, limit_mib=limit
    )
    before = folds
    if len(decoded.examples) < len(examples):
        drawn = dict(zip(examples.names, folds.tolist(), strict=True))
        before = np.array([drawn[name] for name in decoded.examples.names])
    pairs = pairs_of(decoded, size)
    both = duplicates.contradicting(pairs, decoded.labels)
    after = before
    if config.validation != "official":
        _, group = groups_of(decoded.examples)
        alike = [(int(group[p.image]), int(group[p.like])) for p in pairs if not both[p.image]]
        after = duplicates.shared_folds(before, group, alike)
    twice = duplicates.told(decoded.examples, pairs, both, before, after)
    if not both.any():
        return decoded, after, twice
    film = duplicates.films(pairs, len(both))
    reasons = {}
    for row in np.flatnonzero(both):
        others = np.flatnonzero((film == film[row]) & (decoded.labels != decoded.labels[row]))
        other = decoded.examples[others[0]].name
        reasons[decoded.examples[row].name] = f"{_BOTH}: the radiograph of {other}"
    if config.strict:
        name, reason = next(iter(reasons.items()))
        raise InputError(f"{name} is {reason}; remove the wrong one or drop --data.strict")
    if both.all():
        raise InputError(f"{index.root}: every radiograph is in two classes; give each one class")
    left = examples.take(np.array([name not in reasons for name in examples.names]))
    known = _Known(decoded)
    fewer = cache.load(
        left, index.source, size, folder=folder, progress=False, known=known, limit_mib=limit
    )
    quarantine = (*fewer.quarantine, *reasons.items())
    return replace(fewer, quarantine=quarantine), after[~both], twice


class _Known(Mapping[str, np.ndarray]):
    """The decoded images by name."""

    def __init__(self, decoded: cache.Decoded) -> None:
        self.decoded = decoded

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.decoded.examples.names)}

    def __getitem__(self, name: str) -> np.ndarray:
        image: np.ndarray = self.decoded.images[self._rows[name]]
        return image

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _describe(twice: Sequence[duplicates.Duplicate]) -> str:
    """Returns a line about images of the same radiograph."""
    named = ", ".join(f"{d.image.name} as {d.like.name}" for d in twice[:_SHOWN])
    more = ", ..." if len(twice) > _SHOWN else ""
    moved = sum(" moved to " in d.done for d in twice)
    apart = sum("both sides" in d.done for d in twice)
    notes = f"; {moved:,} had their patient moved to the other's fold" if moved else ""
    notes += f"; {apart:,} have the other image on the other side" if apart else ""
    return (
        f"warning: {len(twice):,} images repeat another radiograph{notes}, see duplicates.csv:"
        f" {named}{more}"
    )


def _warn_of_copies(index: Index, say: Say, config: DataConfig) -> None:
    """Warns of files of the test split that are identical to files of train or val."""
    found = copies_of(index, config.cache)
    if found:
        named = ", ".join(f"{ours.name} is {theirs.name}" for ours, theirs in found[:_SHOWN])
        more = ", ..." if len(found) > _SHOWN else ""
        say(f"warning: {len(found):,} files of test are copies from train or val: {named}{more}")


def _expect_each_class(examples: Examples, index: Index, config: DataConfig) -> None:
    """Raises InputError if a class has no image, or --data.positive has no effect."""
    there = set(examples.labels.tolist())
    for label, name in enumerate(index.classes):
        if label not in there:
            others = ", ".join(index.classes[k] for k in sorted(there))
            raise InputError(
                f"{index.root} has no image of class {name} to train on, but of {others};"
                " name others with --data.classes, or add images"
            )
    if len(index.classes) > 2 and config.positive != DataConfig.positive:
        raise InputError(
            f"--data.positive {config.positive} is for two classes, and {index.root} has"
            f" {', '.join(index.classes)}; leave it out, or choose two with --data.classes"
        )


def _expect_classes_on_both_sides(
    labels: np.ndarray, held_out: np.ndarray, classes: Sequence[str], when: str, do: str
) -> None:
    for side, name in ((~held_out, "training"), (held_out, "validation")):
        for label in sorted(set(range(len(classes))) - set(np.unique(labels[side]).tolist())):
            raise InputError(f"{when} {name} lacks the class {classes[label]}; {do}")
