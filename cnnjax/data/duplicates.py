"""Finds exact and near duplicates among decoded images: several images of one radiograph.

A perceptual hash proposes pairs, and the fine detail of thumbnails confirms them. The hash (dHash:
whether a pixel is darker than its right neighbour) is the same for a radiograph that was encoded,
scaled or windowed again, but also for two children in the same pose. Detail smaller than a rib
distinguishes them.

Mirror images are found too: each image is also compared with the mirror images of the others.

Measured on the 5,232 published training images at 224 pixels: 26 show the radiograph of another,
all with a distance of 0 bits and a correlation of 1.00, and none is mirrored. The nearest of the
other pairs differ in 11 bits, and their highest correlation within 24 bits is 0.75; with mirror
images, the values are 15 bits and 0.66. For 300 randomly drawn images, all copies of JPEG quality
10, of a quarter of the side, of gamma 2 and with noise of 15 gray levels are found, mirrored or
not; of copies of gamma 0.5, 299 are found; of copies with 1 % cropped off each edge, 291. Images
decoded at 28 to 96 pixels give the same 26 pairs. At 16 pixels the ribs are not visible, and 600
other pairs would be found: below 28 pixels only identical images count as duplicates.

Not found: rotated images, larger crops, shifts of more than 1 %, marks added later, and mirror
images below 28 pixels.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cnnjax.data.index import Example
from cnnjax.data.kermany import group_of
from cnnjax.data.sources import Source
from cnnjax.machine.files import write_atomically, write_rows
from cnnjax.machine.host import cpu_cores

SIDE = 32
"""Side of the thumbnails, in pixels."""
MOST_BITS = 24
"""Largest Hamming distance between duplicates, of 240 bits."""
LEAST_CORRELATION = 0.85
"""Smallest correlation between the detail of duplicates' thumbnails."""
SMALLEST = 28
"""Smallest side of images, in pixels, at which near duplicates are searched."""

_ENTRIES = 2**22  # entries in a block of distances
_BITS = 240
_STACKED = 64  # images that a thread reduces at a time


class Pair(NamedTuple):
    """An image, and an earlier image of the same radiograph."""

    image: int
    like: int
    bits: int
    """Hamming distance between their hashes, of 240 bits."""
    correlation: float
    """Correlation between the detail of their thumbnails."""
    mirrored: bool = False
    """Whether one is the left-right mirror image of the other."""


class Duplicate(NamedTuple):
    """A `Pair` of a data set's images, and the action that was taken."""

    image: Example
    like: Example
    bits: int
    correlation: float
    done: str


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 32, 32], block means of uint8 [n, size, size].

    Stacked images are reduced together, along rows and then along columns. The windows of a box
    filter do not cross the images' borders, so each result is that of the image alone.
    """
    found = np.empty((len(images), SIDE, SIDE), np.uint8)

    def reduce(start: int) -> None:
        some = images[start : start + _STACKED]
        stack = Image.fromarray(some.reshape(-1, some.shape[2]))
        for shape in ((SIDE, stack.height), (SIDE, SIDE * len(some))):
            stack = stack.resize(shape, Image.Resampling.BOX)
        found[start : start + _STACKED] = np.asarray(stack).reshape(-1, SIDE, SIDE)

    with ThreadPoolExecutor(cpu_cores()) as pool:
        list(pool.map(reduce, range(0, len(images), _STACKED)))
    return found


def hashes(small: np.ndarray) -> np.ndarray:
    """Returns bool [n, 240], the difference hash of uint8 [n, 32, 32] (dHash on a 16 x 16 grid)."""
    half = SIDE // 2
    gray = small.reshape(len(small), half, 2, half, 2).sum((2, 4), dtype=np.int32)
    return (gray[:, :, 1:] > gray[:, :, :-1]).reshape(len(small), _BITS)


def detail(small: np.ndarray) -> np.ndarray:
    """Returns the detail finer than 3 x 3 pixels, with mean 0 and norm 1; 0 if there is none.

    Args:
        small: uint8 [n, 32, 32].

    Returns:
        float32 [n, 1024].
    """
    gray = np.pad(small.astype(np.float32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = gray[:, :-2] + gray[:, 1:-1] + gray[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    fine = (gray[:, 1:-1, 1:-1] - around / 9).reshape(len(small), SIDE * SIDE)
    fine -= fine.mean(1, keepdims=True)
    norm = np.linalg.norm(fine, axis=1, keepdims=True)
    return np.divide(fine, norm, out=np.zeros_like(fine), where=norm > 1e-3)


def find(small: np.ndarray, size: int) -> list[Pair]:
    """Finds images that show the same radiograph, or its mirror image.

    Computes n^2 dot products of 240 bits, a few megabytes at a time. Images of a single gray level
    are no radiographs, and are skipped.

    Args:
        small: uint8 [n, 32, 32], from `thumbnails`.
        size: side, in pixels, of the images from which the thumbnails were made.

    Returns:
        Pairs sorted by image. Images that pairs connect, directly or through others, show the same
        radiograph; each such group of k images has k - 1 pairs.
    """
    pairs: list[Pair] = []
    first: dict[bytes, int] = {}
    for row, one in enumerate(small):
        if one.min() == one.max():
            continue
        like = first.setdefault(one.tobytes(), row)
        if like != row:
            pairs.append(Pair(row, like, 0, 1.0))
    if size < SMALLEST:
        return pairs
    rows = np.fromiter(first.values(), np.int64, len(first))
    plain = small[rows]
    signs = _signs(plain)
    seen = (plain, signs, False), (mirrored := plain[:, :, ::-1], _signs(mirrored), True)
    film = np.arange(len(rows))  # the first image of the same radiograph that is known so far
    block = max(1, _ENTRIES // max(1, len(rows)))
    for start, (theirs, their_signs, turned) in itertools.product(range(0, len(rows), block), seen):
        stop = min(start + block, len(rows))
        # If b bits differ, the dot product of the signs is 240 - 2b.
        near = signs[start:stop] @ their_signs[start:].T >= _BITS - 2 * MOST_BITS
        near[np.tril_indices(stop - start)] = False
        for i in np.flatnonzero(near.any(1)):
            at = start + int(i)
            others = start + np.flatnonzero(near[i])
            others = others[film[others] != film[at]]
            alike = detail(theirs[others]) @ detail(plain[at : at + 1])[0]
            for j in np.flatnonzero(alike >= LEAST_CORRELATION):
                other = int(others[j])
                ends = sorted((int(film[other]), int(film[at])))
                if ends[0] != ends[1]:
                    film[film == ends[1]] = ends[0]
                    bits = int((signs[at] != their_signs[other]).sum())
                    found = int(rows[other]), int(rows[at]), bits, float(alike[j])
                    pairs.append(Pair(*found, mirrored=turned))
    return sorted(pairs)


def _signs(small: np.ndarray) -> np.ndarray:
    """Returns the bits of `hashes` as 1 or -1, float32 [n, 240]."""
    return hashes(small).astype(np.float32) * 2 - 1


def films(pairs: Sequence[Pair], n: int) -> np.ndarray:
    """Returns int64 [n], for each of n images the first image that shows the same radiograph."""
    film = np.arange(n)
    for pair in pairs:
        a, b = sorted((int(film[pair.image]), int(film[pair.like])))
        film[film == b] = a
    return film


def contradicting(pairs: Sequence[Pair], labels: np.ndarray) -> np.ndarray:
    """Returns bool [n], whether an image's radiograph occurs in two classes, by labels int [n]."""
    film = films(pairs, len(labels))
    shown = np.zeros((len(labels), 1 + max(labels, default=0)), bool)
    shown[film, labels] = True
    return shown[film].sum(1) > 1


def shared_folds(
    folds: np.ndarray, groups: Sequence[str], alike: Sequence[tuple[str, str]]
) -> np.ndarray:
    """Moves patients who share a radiograph into one fold, that of the first; no other image moves.

    Args:
        folds: int [n], the fold of each image, the same for all images of a patient.
        groups: the patients of the n images, as named by `cnnjax.data.patients.group_of`.
        alike: pairs of patients with images of the same radiograph.

    Returns:
        int [n], the new folds.
    """
    place: dict[str, int] = {}
    for row, group in enumerate(groups):
        place.setdefault(group, row)
    leader = {group: group for pair in alike for group in pair}
    for a, b in alike:
        one, other = sorted((leader[a], leader[b]), key=place.__getitem__)
        if one != other:
            leader = {group: one if its == other else its for group, its in leader.items()}
    moved = folds.copy()
    for row, group in enumerate(groups):
        if group in leader:
            moved[row] = folds[place[leader[group]]]
    return moved


def copies(examples: Sequence[Example], source: Source) -> list[tuple[Example, Example]]:
    """Finds files of the test split that are byte-identical to files of train or val.

    No file is decoded. A file is read only if a file of the other side has the same size.

    Returns:
        (image of test, the first identical image of train or val).
    """
    sized: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        sized[source.signature(example.name)[0]].append(example)
    found = []
    for alike in sized.values():
        if len({example.split == "test" for example in alike}) < 2:
            continue
        first: dict[bytes, Example] = {}
        for example in sorted(alike, key=lambda e: e.split == "test"):
            try:
                content = source.read(example.name)
            except OSError:
                continue  # decoding reports it
            digest = hashlib.sha256(np.ascontiguousarray(content).data).digest()
            if example.split != "test":
                first.setdefault(digest, example)
            elif digest in first:
                found.append((example, first[digest]))
    return sorted(found, key=lambda pair: pair[0].name)


def write_duplicates(path: Path, duplicates: Sequence[Duplicate]) -> None:
    """Writes `duplicates.csv`: a line for each image that repeats an earlier radiograph."""
    with write_atomically(path) as file:
        write_rows(file, [COLUMNS])
        for image, like, bits, correlation, done in duplicates:
            ours, theirs = ((e.name, e.patient, e.label) for e in (image, like))
            write_rows(file, [(*ours, *theirs, bits, round(correlation, 4), done)])


COLUMNS = (
    "image",
    "patient",
    "label",
    "like",
    "like_patient",
    "like_label",
    "bits",
    "correlation",
    "done",
)
"""Columns of `duplicates.csv`."""


def told(
    examples: Sequence[Example],
    pairs: Sequence[Pair],
    left_out: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> tuple[Duplicate, ...]:
    """Returns the pairs with their examples and the action that was taken.

    Args:
        examples: n images.
        pairs: pairs of rows of examples.
        left_out: bool [n], from `contradicting`.
        before: int [n], the fold or side of each image as drawn.
        after: int [n], the fold or side after `shared_folds`.
    """

    def done(pair: Pair) -> str:
        a, b = examples[pair.image], examples[pair.like]
        if left_out[pair.image]:
            return "left out: in two classes"
        if group_of(a.patient) == group_of(b.patient):
            return "nothing: one patient"
        if after[pair.image] != after[pair.like]:
            return "nothing: on both sides by their folders"
        for one, other, name in ((pair.image, pair.like, a), (pair.like, pair.image, b)):
            if before[one] != after[one] and before[other] == after[other]:
                return f"{name.patient} moved to the fold of the other"
        moved = before[pair.image] != after[pair.image]
        return "both patients moved to a third's fold" if moved else "nothing: in one fold"

    def seen(pair: Pair) -> str:
        return done(pair) + ("; one is the mirror image of the other" if pair.mirrored else "")

    return tuple(
        Duplicate(examples[p.image], examples[p.like], p.bits, p.correlation, seen(p))
        for p in pairs
    )
