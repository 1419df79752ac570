"""The same film twice: exact and near duplicates among decoded images.

A perceptual hash proposes pairs, the fine detail of thumbnails confirms them. The hash (dHash: is a
place darker than its right neighbour) is the same for a film that was encoded, scaled or windowed
anew, but also for two children who stand alike. What is smaller than a rib tells them apart.

The same is looked for between each film and the mirror images of the others.

Measured on the 5,232 published training films of 224 pixels: 26 show the film of another, all with
a distance of 0 bits and a correlation of 1.00, and none is mirrored. Of other pairs the nearest
differ in 11 bits, and the highest correlation within 24 bits is 0.75; with mirror images, 15 bits
and 0.66. Of 300 films drawn at random, copies of JPEG quality 10, of a quarter of the side, of
gamma 2 and with noise of 15 gray levels are all found, mirrored or not; of gamma 0.5, 299; with 1 %
cut off each edge, 291. Decoded at 28 to 96 pixels the same 26 are found. At 16 pixels ribs are
gone, and 600 others would be: of images below 28 pixels only those that are equal are taken for one
film.

Not found: rotated films, larger cuts, shifts of more than 1 %, marks burnt in later; mirrored films
below 28 pixels.
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
"""Largest Hamming distance of duplicates, of 240 bits."""
LEAST_CORRELATION = 0.85
"""Least correlation of the thumbnails' detail."""
SMALLEST = 28
"""Side of images, in pixels, of which near duplicates are looked for."""

_ENTRIES = 2**22  # of a block of distances
_BITS = 240


class Pair(NamedTuple):
    """An image, and an earlier one that shows the same film."""

    image: int
    like: int
    bits: int
    """Hamming distance of their hashes, of 240."""
    correlation: float
    """Of the detail of their thumbnails."""
    mirrored: bool = False
    """Whether one is the mirror image of the other, left to right."""


class Duplicate(NamedTuple):
    """A `Pair` of a data set's images, and what was done about it."""

    image: Example
    like: Example
    bits: int
    correlation: float
    done: str


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 32, 32], the mean gray of the parts of uint8 [n, size, size]."""

    def one(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
        return np.asarray(small)

    found = np.empty((len(images), SIDE, SIDE), np.uint8)
    with ThreadPoolExecutor(cpu_cores()) as pool:
        for row, small in enumerate(pool.map(one, images)):
            found[row] = small
    return found


def hashes(small: np.ndarray) -> np.ndarray:
    """Returns bool [n, 240], the difference hash of uint8 [n, 32, 32] (dHash of 16 x 16 places)."""
    half = SIDE // 2
    gray = small.reshape(len(small), half, 2, half, 2).sum((2, 4), dtype=np.int32)
    return (gray[:, :, 1:] > gray[:, :, :-1]).reshape(len(small), _BITS)


def detail(small: np.ndarray) -> np.ndarray:
    """Returns what is finer than 3 x 3 places, with mean 0 and norm 1; 0 where there is none.

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
    """Finds images that show the same film, or its mirror image.

    Takes n^2 dot products of 240 bits, a few megabytes at a time. Images of one gray level are
    no films, and are left out.

    Args:
        small: uint8 [n, 32, 32], of `thumbnails`.
        size: side of the images that they were made of, in pixels.

    Returns:
        One pair for each image of which an earlier one, or one that is linked to it by other
        pairs, shows the same film; sorted by image. Images that the pairs connect are one film.
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
    film = np.arange(len(rows))  # the first image of the film, as far as is known
    block = max(1, _ENTRIES // max(1, len(rows)))
    for start, (theirs, their_signs, turned) in itertools.product(range(0, len(rows), block), seen):
        stop = min(start + block, len(rows))
        # Of b bits that differ, the dot product of signs is 240 - 2b.
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
    """Returns float32 [n, 240], 1 or -1, the bits of `hashes`."""
    return hashes(small).astype(np.float32) * 2 - 1


def films(pairs: Sequence[Pair], n: int) -> np.ndarray:
    """Returns int64 [n], the first image that shows the same film as each of n images."""
    film = np.arange(n)
    for pair in pairs:
        a, b = sorted((int(film[pair.image]), int(film[pair.like])))
        film[film == b] = a
    return film


def contradicting(pairs: Sequence[Pair], labels: np.ndarray) -> np.ndarray:
    """Returns bool [n], whether an image's film is in two classes, by labels int [n]."""
    film = films(pairs, len(labels))
    shown = np.zeros((len(labels), 1 + max(labels, default=0)), bool)
    shown[film, labels] = True
    return shown[film].sum(1) > 1


def shared_folds(
    folds: np.ndarray, groups: Sequence[str], alike: Sequence[tuple[str, str]]
) -> np.ndarray:
    """Moves patients who share a film into one fold, that of the first; no other image moves.

    Args:
        folds: int [n], the fold of each image, the same for the images of a patient.
        groups: the n images' patients, as `cnnjax.data.patients.group_of` names them.
        alike: pairs of patients of whom images show the same film.

    Returns:
        int [n].
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
    """Finds files of test that are, byte by byte, files of train or val; decodes none.

    Only files whose size is that of one on the other side are read.

    Returns:
        (image of test, the first of train or val that is the same).
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
                continue  # decoding it will tell
            digest = hashlib.sha256(np.ascontiguousarray(content).data).digest()
            if example.split != "test":
                first.setdefault(digest, example)
            elif digest in first:
                found.append((example, first[digest]))
    return sorted(found, key=lambda pair: pair[0].name)


def write_duplicates(path: Path, duplicates: Sequence[Duplicate]) -> None:
    """Writes `duplicates.csv`: a line for each image that shows the film of an earlier one."""
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
"""Of `duplicates.csv`."""


def told(
    examples: Sequence[Example],
    pairs: Sequence[Pair],
    left_out: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> tuple[Duplicate, ...]:
    """Returns the pairs with their images' names and what was done.

    Args:
        examples: n images.
        pairs: of their rows.
        left_out: bool [n], of `contradicting`.
        before: int [n], the fold or side of each image as it was drawn.
        after: likewise, as `shared_folds` makes it.
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
