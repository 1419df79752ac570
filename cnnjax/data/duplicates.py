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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from cnnjax.data.examples import Example, Examples
from cnnjax.data.kermany import group_of
from cnnjax.data.onthefly import Films
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

_ENTRIES = 2**22  # distances after which the order changes to mirror images, and back
_TILE = 2048  # thumbnails whose distances from as many others are computed at a time
_PART = 1024  # thumbnails that are read at a time
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


def thumbnails(images: np.ndarray | Films, out: np.ndarray | None = None) -> np.ndarray:
    """Returns uint8 [n, 32, 32], block means of uint8 [n, size, size]; they are written to `out`.

    Stacked images are reduced together, along rows and then along columns. The windows of a box
    filter do not cross the images' borders, so each result is that of the image alone.

    Args:
        images: the images; may be memory-mapped.
        out: uint8 [n, 32, 32]; by default a new array.
    """
    found = np.empty((len(images), SIDE, SIDE), np.uint8) if out is None else out

    def reduce(start: int) -> None:
        some = np.asarray(images[start : start + _STACKED])
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

    Computes n^2 dot products of 240 bits, a few megabytes at a time (`cnnjax.data.comparisons`
    keeps the result). Images of a single gray level are no radiographs, and are skipped.

    Args:
        small: uint8 [n, 32, 32], from `thumbnails`; may be memory-mapped.
        size: side, in pixels, of the images from which the thumbnails were made.

    Returns:
        Pairs sorted by image. Images that pairs connect, directly or through others, show the same
        radiograph; each such group of k images has k - 1 pairs.
    """
    rows, pairs = _distinct(small)
    if size < SMALLEST:
        return pairs
    film = np.arange(len(rows))  # the first image of the same radiograph that is known so far
    for at, others, turned in _near(small, rows):
        others = others[film[others] != film[at]]
        if not len(others):
            continue
        plain, theirs = small[rows[at : at + 1]], small[rows[others]]
        alike = detail(theirs[:, :, ::-1] if turned else theirs) @ detail(plain)[0]
        for j in np.flatnonzero(alike >= LEAST_CORRELATION):
            other = int(others[j])
            ends = sorted((int(film[other]), int(film[at])))
            if ends[0] != ends[1]:
                film[film == ends[1]] = ends[0]
                one, two = plain, theirs[j : j + 1]
                bits = hashes(one) != hashes(two[:, :, ::-1] if turned else two)
                pair = int(rows[other]), int(rows[at]), int(bits.sum()), float(alike[j])
                pairs.append(Pair(*pair, mirrored=turned))
    return sorted(pairs)


def _distinct(small: np.ndarray) -> tuple[np.ndarray, list[Pair]]:
    """Finds identical thumbnails; those of a single gray level are left out.

    Returns:
        int64 [m], the first row of each distinct thumbnail; and a pair for each other row.
    """
    codes, flat = np.empty(len(small), np.int64), np.empty(len(small), bool)
    for part in _parts(len(small)):
        some = np.ascontiguousarray(small[part])
        codes[part] = [hash(one.tobytes()) for one in some]
        flat[part] = some.min((1, 2)) == some.max((1, 2))
    rows = np.flatnonzero(~flat)
    rows = rows[np.argsort(codes[rows], kind="stable")]
    same = np.diff(codes[rows]) == 0
    alike = np.zeros(len(rows), bool)
    alike[1:] |= same
    alike[:-1] |= same
    pairs: list[Pair] = []
    code, first = 0, dict[bytes, int]()
    for row in rows[alike].tolist():
        if codes[row] != code or not first:
            code, first = codes[row], {}
        like = first.setdefault(small[row].tobytes(), row)
        if like != row:
            pairs.append(Pair(row, like, 0, 1.0))
    again = np.array([pair.image for pair in pairs], np.int64)
    return np.setdiff1d(rows, again), sorted(pairs)


def _near(small: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Finds thumbnails whose hashes differ in few bits, also mirrored.

    Args:
        small: uint8 [n, 32, 32].
        rows: int64 [m], the rows of the thumbnails to compare.

    Yields:
        (i, int64 [k], mirrored): an image, and later images whose hashes, or the hashes of whose
        mirror images, are near. All are positions in `rows`.
    """
    m = len(rows)
    plain, mirrored = np.empty((2, m, _BITS // 8), np.uint8)
    for part in _parts(m):
        some = small[rows[part]]
        plain[part] = np.packbits(hashes(some), axis=1)
        mirrored[part] = np.packbits(hashes(some[:, :, ::-1]), axis=1)
    turn = max(1, _ENTRIES // max(1, m))  # images that are compared before their mirror images
    block = turn * max(1, _TILE // turn)
    bar = tqdm(total=m * (m + 1) // 2, desc="comparing", unit="pair", unit_scale=True, disable=None)
    for start in range(0, m, block):
        stop = min(start + block, m)
        ours = _signs(plain[start:stop])
        near: list[np.ndarray] = []  # int64 [k, 3]: mirrored, i, j
        for column in range(start, m, _TILE):
            for turned, theirs in enumerate((plain, mirrored)):
                # If b bits differ, the dot product of the signs is 240 - 2b.
                signs = _signs(theirs[column : column + _TILE])
                i, j = np.nonzero(ours @ signs.T >= _BITS - 2 * MOST_BITS)
                i, j = i + start, j + column
                near.append(np.stack([np.full(len(i), turned), i, j], 1)[j > i])
            bar.update((stop - start) * min(_TILE, m - column))
        found = np.concatenate(near)
        turned, i, j = found[np.lexsort((found[:, 2], found[:, 1], found[:, 0]))].T
        order = np.argsort((i - start) // turn, kind="stable")
        turned, i, j = turned[order], i[order], j[order]
        for some in np.split(np.arange(len(i)), np.flatnonzero(np.diff(i * 2 + turned)) + 1):
            if len(some):
                yield int(i[some[0]]), j[some], bool(turned[some[0]])
    bar.close()


def _signs(packed: np.ndarray) -> np.ndarray:
    """Returns packed bits, uint8 [n, 30], as 1 or -1, float32 [n, 240]."""
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1


def _parts(n: int) -> list[slice]:
    return [slice(start, min(start + _PART, n)) for start in range(0, n, _PART)]


def films(pairs: Sequence[Pair], n: int) -> np.ndarray:
    """Returns int64 [n], for each of n images the first image that shows the same radiograph."""
    return _first([(pair.image, pair.like) for pair in pairs], n)


def _first(pairs: Iterable[tuple[int, int]], n: int) -> np.ndarray:
    """Returns int64 [n], for each of n numbers the smallest that pairs connect with it."""
    first: dict[int, int] = {}  # a number leads to a smaller one, and at last to the smallest

    def of(number: int) -> int:
        while (smaller := first.setdefault(number, number)) != number:
            first[number] = number = first[smaller]
        return number

    for a, b in pairs:
        one, other = sorted((of(a), of(b)))
        first[other] = one
    found = np.arange(n)
    for number in first:
        found[number] = of(number)
    return found


def contradicting(pairs: Sequence[Pair], labels: np.ndarray) -> np.ndarray:
    """Returns bool [n], whether an image's radiograph occurs in two classes, by labels int [n]."""
    film = films(pairs, len(labels))
    shown = np.zeros((len(labels), 1 + labels.max(initial=0)), bool)
    shown[film, labels] = True
    return shown[film].sum(1) > 1


def shared_folds(
    folds: np.ndarray, groups: np.ndarray, alike: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Moves patients who share a radiograph into one fold, that of the first; no other image moves.

    Args:
        folds: int [n], the fold of each image, the same for all images of a patient.
        groups: int [n], the numbers of the patients (`cnnjax.data.patients.groups_of`).
        alike: pairs of patients with images of the same radiograph.

    Returns:
        int [n], the new folds.
    """
    numbers, first, group = np.unique(groups, return_index=True, return_inverse=True)
    rows = first[np.searchsorted(numbers, np.array(alike, np.int64).reshape(-1, 2))]
    leader = _first(rows.tolist(), len(folds))[first][group]
    return np.where(leader == first[group], folds, folds[leader])


def copies(examples: Sequence[Example], source: Source) -> list[tuple[Example, Example]]:
    """Finds files of the test split that are byte-identical to files of train or val.

    No file is decoded. A file is read only if a file of the other side has the same size.

    Returns:
        (image of test, the first identical image of train or val).
    """
    examples = Examples.of(examples)
    sizes = (source.signature(name)[0] for name in examples.names)
    rows = copied(examples, source, np.fromiter(sizes, np.int64, len(examples)))
    return [(examples[test], examples[like]) for test, like in rows]


def copied(examples: Examples, source: Source, sizes: np.ndarray) -> list[tuple[int, int]]:
    """Finds the rows of the pairs that `copies` returns; sizes are those of the files, int [n]."""
    test = examples.of_split("test")
    rows = np.flatnonzero(np.isin(sizes, np.intersect1d(sizes[test], sizes[~test])))
    rows = rows[np.lexsort((test[rows], sizes[rows]))]
    found = []
    size, first = -1, dict[bytes, int]()
    for row in rows.tolist():
        if sizes[row] != size:
            size, first = sizes[row], {}
        try:
            content = source.read(examples.names[row])
        except OSError:
            continue  # decoding reports it
        digest = hashlib.sha256(np.ascontiguousarray(content).data).digest()
        if not test[row]:
            first.setdefault(digest, row)
        elif digest in first:
            found.append((row, first[digest]))
    return sorted(found, key=lambda pair: examples.names[pair[0]])


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
