"""From a config to the arrays that training uses: index, decode, split by patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from cnnjax.config import DataConfig
from cnnjax.data import cache, duplicates, framing
from cnnjax.data.index import Example, Index, read_index
from cnnjax.data.kermany import group_of
from cnnjax.data.patients import block_folds, grouped_folds, in_several_splits
from cnnjax.errors import InputError
from cnnjax.machine.files import no_cache, sweep
from cnnjax.machine.host import cache_folder

Say = Callable[[str], None]

_NAMED = 10  # patients named in a warning; the rest are counted


@dataclass(frozen=True)
class TrainingData:
    """The decoded images of a run and the part each plays."""

    decoded: cache.Decoded
    held_out: np.ndarray
    """bool [n], true where the image validates."""
    classes: tuple[str, ...]
    """Names of the labels, 0 and up."""
    duplicates: tuple[duplicates.Duplicate, ...] = ()
    """Images that show the film of an earlier one, those that are left out included."""

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
        images: uint8 [n, size, size], of the size that the config says.
        labels: int [n], 0 and up.
        held_out: bool [n], true where the image validates; patients on one side each.
        classes: names of the labels.
        patients: whom each image shows; by default each another one.
        names: of the images; by default their numbers.

    Raises:
        InputError: the arrays do not fit together, or a side lacks a class.
    """
    n = len(images)
    names = [f"image-{i:07}" for i in range(n)] if names is None else names
    patients = names if patients is None else patients
    if images.dtype != np.uint8 or images.shape[1:] != images.shape[1:2] * 2:
        raise InputError(
            f"images must be uint8 [n, size, size], got {images.dtype} {list(images.shape)}"
        )
    if {len(part) for part in (labels, held_out, patients, names)} != {n}:
        raise InputError(f"labels, held_out, patients and names must each be of {n} images")
    if np.ndim(labels) != 1:
        raise InputError(
            f"labels must be int [n], got {list(np.shape(labels))}: several findings an image"
            " (multi-label) are not supported; give each image one class"
        )
    held_out = np.asarray(held_out, bool)
    for side in (~held_out, held_out):
        if set(np.asarray(labels)[side].tolist()) != set(range(len(classes))):
            raise InputError(f"training and held-out images must each show all of {classes}")
    shared = {p for p, h in zip(patients, held_out, strict=True) if h}
    shared &= {p for p, h in zip(patients, held_out, strict=True) if not h}
    if shared:
        raise InputError(f"patient {min(shared)} is both trained on and held out")
    each = zip(names, np.asarray(labels).tolist(), patients, strict=True)
    examples = tuple(Example(name, "train", label, patient) for name, label, patient in each)
    return TrainingData(cache.decoded_of(images, examples), held_out, classes)


def expect_two_classes(classes: Sequence[str], who: str) -> None:
    """Raises InputError where there are more classes than `who`, a phrase, can tell apart."""
    if len(classes) > 2:
        raise InputError(
            f"{who} tells two classes apart, and these are {len(classes)}: {', '.join(classes)}"
        )


def open_index(config: DataConfig, say: Say) -> Index:
    """Returns the index of the config's root; draws the phantoms first if that is the root.

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
                pass  # another process drew the same ones meanwhile
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
        return Path(path).expanduser()  # not every shell does after a =
    except RuntimeError:
        raise InputError(f"{path} does not exist; there is no such user's home") from None


def training_data(
    config: DataConfig,
    seed: int,
    say: Say,
    mesh: Mesh | None = None,
    index: Index | None = None,
) -> TrainingData:
    """Returns the decoded images of train and val, and which of them validate.

    The split is drawn over every image of the index, so that a file which cannot be decoded changes
    nothing for the others. Patients of whom images show the same film are then brought into one
    fold, and films that are in two classes are left out (`cnnjax.data.duplicates`).

    Args:
        config: where from and how.
        seed: of the folds.
        say: told what was found, a few lines at a time.
        mesh: the devices that find the lungs for `--data.frame lungs`; by default all of the
            fastest kind.
        index: the images, where `open_index` has listed them already.

    Raises:
        InputError: the data cannot serve; see `read_index`, `Index.split`, `cache.load`.
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
        and {"train", "val"} <= {e.split for e in examples}
    ):
        say("  train and val are pooled and split anew; --data.validation official keeps them")
    if config.validation == "official":
        folds = np.array([int(e.split != "val") for e in examples])
        held_out_fold = 0
    elif config.validation == "blocks":
        folds, held_out_fold = block_folds(examples, config.folds, index.classes), config.fold
    else:
        folds = grouped_folds(examples, config.folds, seed, index.classes)
        held_out_fold = config.fold
    _expect_classes_on_both_sides(
        np.array([e.label for e in examples]),
        folds == held_out_fold,
        index.classes,
        f"{index.root}: with --data.validation {config.validation}, --data.folds {config.folds} and"
        f" --data.fold {config.fold},",
        "choose others",
    )
    _warn_of_copies(index, say)
    decoded, folds, twice = _each_film_once(examples, folds, index, config)
    if decoded.quarantine:
        both = sum(reason.startswith(_BOTH) for _, reason in decoded.quarantine)
        if broken := len(decoded.quarantine) - both:
            say(f"  left out: {broken:,} that cannot be decoded, see quarantine.csv")
        if both:
            say(f"  left out: {both:,} of films that are in two classes, see quarantine.csv")
    if twice:
        say(_describe(twice))
    if config.frame == "lungs":
        decoded = framing.framed(decoded, config, mesh)
    if decoded.found is not None and (missed := int((~decoded.found).sum())):
        say(f"  no lungs found in {missed:,} images, which are taken whole")
    held_out = folds == held_out_fold
    _expect_classes_on_both_sides(
        decoded.labels, held_out, index.classes, f"{index.root}: after decoding,", "fix the files"
    )
    return TrainingData(decoded, held_out, index.classes, twice)


def protocol(config: DataConfig, seed: int) -> str:
    """Returns a phrase that says which images validate."""
    if config.validation == "official":
        return f"official val folder, seed {seed}"
    kind = {
        "patients": "patient-grouped and class-stratified",
        "blocks": "blocks of the file numbering",
    }[config.validation]
    return f"fold {config.fold} of {config.folds}, {kind}, seed {seed}"


def side_of(example: Example, config: DataConfig) -> str:
    """Returns on which side of the given splits an image is: train and val are one if pooled."""
    return example.split if config.validation == "official" else _pooled(example.split)


def _pooled(split: str) -> str:
    return split if split == "test" else "train"


def leaking_patients(index: Index, config: DataConfig) -> dict[tuple[str, str], list[str]]:
    """Returns the sorted patients of each pair of splits that share some.

    Train and val are no such pair where they are pooled and split anew.
    """
    return {
        (a, b): shared
        for (a, b), shared in in_several_splits(index.examples).items()
        if config.validation == "official" or _pooled(a) != _pooled(b)
    }


_BOTH = "in two classes"
_SHOWN = 2  # duplicates named in a line; duplicates.csv has them all


def _each_film_once(
    examples: Sequence[Example], folds: np.ndarray, index: Index, config: DataConfig
) -> tuple[cache.Decoded, np.ndarray, tuple[duplicates.Duplicate, ...]]:
    """Decodes the images, and sees to those that show the same film.

    Args:
        examples: n images.
        folds: int [n], as they were drawn.
        index: that the images are of.
        config: its data set's.

    Returns:
        The m images that can be decoded and are not in two classes, int [m], their folds, and the
        duplicates among all.

    Raises:
        InputError: see `cache.load`; with `--data.strict`, also where a film is in two classes.
    """
    size, folder = framing.decoded_size(config), config.cache
    decoded = cache.load(examples, index.source, size, folder=folder, strict=config.strict)
    assert decoded.thumbnails is not None
    drawn = {e.name: fold for e, fold in zip(examples, folds.tolist(), strict=True)}
    before = np.array([drawn[e.name] for e in decoded.examples])
    pairs = duplicates.find(decoded.thumbnails, size)
    both = duplicates.contradicting(pairs, decoded.labels)
    after = before
    if config.validation != "official":
        groups = [group_of(e.patient) for e in decoded.examples]
        alike = [(groups[p.image], groups[p.like]) for p in pairs if not both[p.image]]
        after = duplicates.shared_folds(before, groups, alike)
    twice = duplicates.told(decoded.examples, pairs, both, before, after)
    if not both.any():
        return decoded, after, twice
    film = duplicates.films(pairs, len(both))
    reasons = {}
    for row in np.flatnonzero(both):
        others = np.flatnonzero((film == film[row]) & (decoded.labels != decoded.labels[row]))
        other = decoded.examples[others[0]].name
        reasons[decoded.examples[row].name] = f"{_BOTH}: the film of {other}"
    if config.strict:
        name, reason = next(iter(reasons.items()))
        raise InputError(f"{name} is {reason}; remove the wrong one or drop --data.strict")
    if both.all():
        raise InputError(f"{index.root}: every film is in two classes; give each image one")
    left = tuple(e for e in examples if e.name not in reasons)
    known = dict(zip((e.name for e in decoded.examples), decoded.images, strict=True))
    fewer = cache.load(left, index.source, size, folder=folder, progress=False, known=known)
    quarantine = (*fewer.quarantine, *reasons.items())
    return replace(fewer, quarantine=quarantine), after[~both], twice


def _describe(twice: Sequence[duplicates.Duplicate]) -> str:
    """Returns a line about images that show the same film."""
    named = ", ".join(f"{d.image.name} as {d.like.name}" for d in twice[:_SHOWN])
    more = ", ..." if len(twice) > _SHOWN else ""
    moved = sum(" moved to " in d.done for d in twice)
    apart = sum("both sides" in d.done for d in twice)
    notes = f"; {moved:,} had their patient moved to the other's fold" if moved else ""
    notes += f"; {apart:,} have the other on the other side" if apart else ""
    return (
        f"warning: {len(twice):,} images show a film that another shows{notes}, see duplicates.csv:"
        f" {named}{more}"
    )


def _warn_of_copies(index: Index, say: Say) -> None:
    """Tells of files of test that are files of train or val."""
    found = duplicates.copies(index.examples, index.source)
    if found:
        named = ", ".join(f"{ours.name} is {theirs.name}" for ours, theirs in found[:_SHOWN])
        more = ", ..." if len(found) > _SHOWN else ""
        say(f"warning: {len(found):,} files of test are copies from train or val: {named}{more}")


def _expect_each_class(examples: Sequence[Example], index: Index, config: DataConfig) -> None:
    """Raises InputError where a class has no image, or --data.positive has no effect."""
    there = {e.label for e in examples}
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
        for label in sorted(set(range(len(classes))) - set(labels[side].tolist())):
            raise InputError(f"{when} {name} lacks the class {classes[label]}; {do}")
