"""From a config to the arrays that training uses: index, decode, split by patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from cnnjax.config import DataConfig
from cnnjax.data import cache, framing
from cnnjax.data.files import no_cache, sweep
from cnnjax.data.index import Example, Index, read_index
from cnnjax.data.patients import block_folds, grouped_folds, in_several_splits
from cnnjax.errors import InputError
from cnnjax.machine import cache_folder

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


def open_index(config: DataConfig, say: Say) -> Index:
    """Returns the index of the config's root; draws the phantoms first if that is the root.

    Raises:
        InputError: see `read_index`.
    """
    try:
        root = Path(config.root).expanduser()  # not every shell does after a =
    except RuntimeError:
        raise InputError(f"{config.root} does not exist; there is no such user's home") from None
    if config.root == "phantom":
        from cnnjax.data import phantom

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
    return read_index(root, config.positive)


def training_data(
    config: DataConfig, seed: int, say: Say, mesh: Mesh | None = None
) -> TrainingData:
    """Returns the decoded images of train and val, and which of them validate.

    The split is drawn over every image of the index, so that a file which cannot be decoded changes
    nothing for the others.

    Args:
        config: where from and how.
        seed: of the folds.
        say: told what was found, a few lines at a time.
        mesh: the devices that find the lungs for `--data.frame lungs`; by default all of the
            fastest kind.

    Raises:
        InputError: the data cannot serve; see `read_index`, `Index.split`, `cache.load`.
    """
    index = open_index(config, say)
    say(index.describe())
    for (a, b), shared in in_several_splits(index.examples).items():
        if {a, b} == {"train", "val"} and config.validation != "official":
            continue  # these two are pooled and split anew
        names = ", ".join(shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else "")
        say(f"warning: {len(shared)} patients are in both {a} and {b}: {names}")
    if config.validation == "official":
        index.split("val")
        index.split("train")
    examples = index.split("train", "val")
    if config.validation == "official":
        validates = [e.split == "val" for e in examples]
    elif config.validation == "blocks":
        validates = list(block_folds(examples, config.folds) == config.fold)
    else:
        validates = list(grouped_folds(examples, config.folds, seed) == config.fold)
    _expect_both_classes(
        np.array([e.label for e in examples]),
        np.array(validates),
        f"{index.root}: with --data.validation {config.validation}, --data.folds {config.folds} and"
        f" --data.fold {config.fold},",
        "choose others",
    )
    decoded = framing.load(examples, index.source, config, mesh)
    if decoded.quarantine:
        say(f"  left out: {len(decoded.quarantine):,} that cannot be decoded, see quarantine.csv")
    if decoded.found is not None and (missed := int((~decoded.found).sum())):
        say(f"  no lungs found in {missed:,} images, which are taken whole")
    role = {e.name: v for e, v in zip(examples, validates, strict=True)}
    held_out = np.array([role[e.name] for e in decoded.examples])
    _expect_both_classes(
        decoded.labels, held_out, f"{index.root}: after decoding,", "fix the files"
    )
    return TrainingData(decoded, held_out, index.classes)


def _expect_both_classes(labels: np.ndarray, held_out: np.ndarray, when: str, do: str) -> None:
    for side, name in ((~held_out, "training"), (held_out, "validation")):
        if len(set(labels[side])) < 2:
            raise InputError(f"{when} {name} lacks a class; {do}")
