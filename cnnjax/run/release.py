"""Releases: the weights of one or more trained networks in two small files.

`weights.npz` holds the arrays of every member of an ensemble in float16, without pickles.
`release.json` holds the network's hyperparameters, the preprocessing of images, the operating
points, the checksum of the weights, and notes on protocol and results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.config import AugmentConfig, Frame, ModelConfig, from_dict
from cnnjax.errors import InputError
from cnnjax.networks.variables import flatten, unflatten
from cnnjax.operating import Points, points_from_json, points_to_json

SHIPPED = Path(__file__).parents[1] / "released"
"""Folder of the weights in the package."""

PyTree = Any
_WEIGHTS, _ABOUT = "weights.npz", "release.json"


@dataclass(frozen=True)
class Release:
    """An ensemble of trained networks, whose logits are averaged."""

    model: ModelConfig
    size: int
    """Side of the networks' input, in pixels."""
    frame: Frame
    """Part of an image that the networks see: `whole`, or `lungs` for a crop to the lungs."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    augment: AugmentConfig
    """Augmentation in training and in test-time augmentation."""
    operating: Points
    members: tuple[PyTree, ...]
    """Flax variables of each network: `params`, and `batch_stats` if it has any; float16."""
    about: dict[str, Any]
    """Notes as plain JSON: protocol and results."""


def write(release: Release, folder: Path) -> None:
    """Writes the two files of a release.

    Raises:
        ValueError: a weight is too large for float16.
        OSError: the folder cannot be written.
    """
    arrays = {
        f"{i}/{name}": value
        for i, member in enumerate(release.members)
        for name, value in flatten(member).items()
    }
    halves = {name: np.asarray(value, np.float16) for name, value in arrays.items()}
    for name, value in halves.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{name} does not fit into float16")
    file = io.BytesIO()
    np.savez_compressed(file, **halves)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _WEIGHTS).write_bytes(file.getvalue())
    document = {
        "model": dataclasses.asdict(release.model),
        "size": release.size,
        "frame": release.frame,
        "classes": list(release.classes),
        "members": len(release.members),
        "augment": dataclasses.asdict(release.augment),
        "operating": points_to_json(release.operating),
        "sha256": hashlib.sha256(file.getvalue()).hexdigest(),
        "about": release.about,
    }
    (folder / _ABOUT).write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def is_release(folder: Path) -> bool:
    """Returns whether a folder holds a release."""
    return (folder / _ABOUT).is_file()


def read(folder: Path = SHIPPED) -> Release:
    """Reads the release in a folder and verifies its checksum.

    Raises:
        InputError: the release is missing, damaged, or of another version of cnnjax.
    """
    path = folder / _ABOUT
    mend = "download it again" if folder != SHIPPED else "install cnnjax again"
    try:
        document = dict(json.loads(path.read_text("utf-8")))
        weights = (folder / _WEIGHTS).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no readable release ({error}); {mend}") from None
    if hashlib.sha256(weights).hexdigest() != document.get("sha256"):
        raise InputError(f"{folder / _WEIGHTS} is damaged (wrong checksum); {mend}")
    try:
        model = from_dict(ModelConfig, document["model"], str(path), "model.")
        classes = tuple(map(str, document["classes"]))
        augment = from_dict(AugmentConfig, document["augment"], str(path), "augment.")
        operating = points_from_json(document["operating"])
        size, about = document["size"], document["about"]
        frame = document.get("frame", "whole")  # the first release has no such key
        count = int(document["members"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is of another version of cnnjax ({error}); use that one, or {mend}"
        ) from None
    with np.load(io.BytesIO(weights), allow_pickle=False) as file:
        tree = unflatten(file)
    members = tuple(tree[str(i)] for i in range(count))
    return Release(model, size, frame, classes, augment, operating, members, about)
