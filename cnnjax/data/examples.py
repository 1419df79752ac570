"""The images of a data set as a sequence that is stored in columns.

A data set of 500,000 images has as many names. As Python objects they would take more memory than
the pixels of the batches that are trained on; in columns an image costs its name and about 30 bytes
(docs/scaling.md has the measured sizes).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex, overload

import numpy as np

_PART = 4096  # rows that are converted to Python objects at a time


@dataclass(frozen=True, slots=True)
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


class Texts(Sequence[str]):
    """Strings in one buffer: each takes its bytes in UTF-8, and 4 (8 above 4 GiB) for its place.

    Args:
        texts: the strings; lone surrogates, as in file names that are not UTF-8, are kept.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        texts, parts, lengths = iter(texts), [], [np.zeros(1, np.uint32)]
        # A buffer that grows would leave holes in memory, since it moves each time.
        while some := [
            text.encode("utf-8", "surrogatepass") for text in itertools.islice(texts, _PART)
        ]:
            parts.append(b"".join(some))
            lengths.append(np.fromiter(map(len, some), np.uint32, len(some)))
        kind = np.uint32 if sum(map(len, parts)) < 2**32 else np.uint64
        bounds = np.concatenate(lengths).cumsum(dtype=kind)
        self._buffer, self._starts, self._ends = b"".join(parts), bounds[:-1], bounds[1:]

    def take(self, rows: np.ndarray | slice) -> Texts:
        """Returns the strings at these rows; the buffer is shared."""
        some = Texts.__new__(Texts)
        some._buffer, some._starts, some._ends = self._buffer, self._starts[rows], self._ends[rows]
        return some

    def where(self, keep: Iterable[bool]) -> Texts:
        """Returns the strings for which the other value is true."""
        kept = np.fromiter(keep, bool, len(self))
        return self if kept.all() else self.take(kept)

    def order(self) -> np.ndarray:
        """Returns the rows of the strings in sorted order, int64 [n]."""
        if all(a <= b for a, b in itertools.pairwise(self)):
            return np.arange(len(self))
        texts = list(self)
        return np.array(sorted(range(len(self)), key=texts.__getitem__), np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Lengths in bytes, int64 [n]."""
        return self._ends.astype(np.int64) - self._starts.astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, at: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Texts: ...
    def __getitem__(self, at: SupportsIndex | slice) -> str | Texts:
        if isinstance(at, slice):
            return self.take(at)
        at = operator.index(at)
        return str(self._buffer[self._starts[at] : self._ends[at]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        buffer = self._buffer
        for part in _parts(len(self)):
            bounds = zip(self._starts[part].tolist(), self._ends[part].tolist(), strict=True)
            for start, end in bounds:
                yield str(buffer[start:end], "utf-8", "surrogatepass")


class _Columns(NamedTuple):
    """The values of n images."""

    names: Texts
    splits: np.ndarray
    """int8 [n], in `split_names`."""
    split_names: tuple[str, ...]
    labels: np.ndarray
    """int32 [n]."""
    patients: np.ndarray
    """int32 [n], in `patient_names`; -1 if the patient ID is the image's own name and occurs at no
    other image."""
    patient_names: Texts
    weights: np.ndarray | None
    """float64 [n]; None if all are 1."""


class Examples(Sequence[Example]):
    """A sequence of `Example`, stored in columns; an item is made when it is asked for.

    Args:
        names: names of n images.
        splits: the split of each.
        labels: int [n].
        patients: the patient ID of each.
        weights: float [n]; 1 by default.
    """

    def __init__(
        self,
        names: Sequence[str],
        splits: Iterable[str],
        labels: Iterable[int],
        patients: Iterable[str],
        weights: Iterable[float] | None = None,
    ) -> None:
        n = len(names)
        split_number: dict[str, int] = {}
        numbers = (split_number.setdefault(split, len(split_number)) for split in splits)
        factors = None if weights is None else np.fromiter(weights, np.float64, n)
        split_numbers = np.fromiter(numbers, np.int8, n)
        patient_numbers, patient_names = _numbered(names, patients)
        self._columns = _Columns(
            names if isinstance(names, Texts) else Texts(names),
            split_numbers,
            tuple(split_number),
            np.fromiter(labels, np.int32, n),
            patient_numbers,
            patient_names,
            None if factors is None or (factors == 1).all() else factors,
        )
        self._rows: np.ndarray | None = None  # int32, the rows of the columns; None for all

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Returns any sequence of examples as one in columns."""
        if isinstance(examples, cls):
            return examples
        return cls(
            [e.name for e in examples],
            (e.split for e in examples),
            (e.label for e in examples),
            (e.patient for e in examples),
            (e.weight for e in examples),
        )

    @property
    def names(self) -> Texts:
        """The names."""
        names = self._columns.names
        return names if self._rows is None else names.take(self._rows)

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]."""
        return self._of(self._columns.labels)

    @property
    def weights(self) -> np.ndarray:
        """float64 [n]."""
        weights = self._columns.weights
        return np.ones(len(self)) if weights is None else self._of(weights)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that occur, sorted."""
        there = np.unique(self._of(self._columns.splits))
        return tuple(sorted(self._columns.split_names[k] for k in there))

    @property
    def patients(self) -> list[str]:
        """The patient IDs."""
        return list(self._patients())

    def _patients(self) -> Iterator[str]:
        names, numbers = self.names, self._of(self._columns.patients)
        for part in _parts(len(self)):
            some = numbers[part]
            known = iter(self._columns.patient_names.take(some[some >= 0]))
            for name, number in zip(names[part], some.tolist(), strict=True):
                yield name if number < 0 else next(known)

    @property
    def patient_numbers(self) -> np.ndarray:
        """int64 [n], a number for each patient ID; gaps are possible."""
        numbers = self._of(self._columns.patients).astype(np.int64)
        own = numbers < 0
        rows = np.arange(len(self)) if self._rows is None else self._rows
        numbers[own] = len(self._columns.patient_names) + rows[own]
        return numbers

    @property
    def without_patient(self) -> np.ndarray:
        """Whether the patient ID is the image's own name, bool [n]."""
        numbers, known = self._of(self._columns.patients), self._columns.patient_names
        own = numbers < 0
        if len(known):
            # Those that share their name as a patient ID with another image have a number.
            alike = np.flatnonzero(~own & (known.lengths[numbers] == self.names.lengths))
            own[alike] = [e.name == e.patient for e in self.take(alike)]
        return own

    def of_split(self, *names: str) -> np.ndarray:
        """Returns bool [n], whether an image is in one of the splits."""
        wanted = [k for k, name in enumerate(self._columns.split_names) if name in names]
        return np.isin(self._of(self._columns.splits), wanted)

    def _of(self, column: np.ndarray) -> np.ndarray:
        return column if self._rows is None else column[self._rows]

    def __len__(self) -> int:
        return len(self._columns.names if self._rows is None else self._rows)

    def take(self, rows: np.ndarray | slice) -> Examples:
        """Returns the images at these rows, given as ints, as bools or as a slice.

        The columns are shared; the result takes 4 bytes for each of its images.
        """
        known = np.arange(len(self), dtype=np.int32) if self._rows is None else self._rows
        some = Examples.__new__(Examples)
        some._columns, some._rows = self._columns, known[rows]
        return some

    @overload
    def __getitem__(self, at: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Examples: ...
    def __getitem__(self, at: SupportsIndex | slice) -> Example | Examples:
        if isinstance(at, slice):
            return self.take(at)
        at = operator.index(at)
        if not -len(self) <= at < len(self):
            raise IndexError(f"{at} is out of range for {len(self)} images")
        at %= len(self)
        return next(iter(self[at : at + 1]))

    def __iter__(self) -> Iterator[Example]:
        columns, weights = self._columns, self._columns.weights
        splits = self._of(columns.splits)
        rows = zip(
            self.names,
            (columns.split_names[k] for k in splits),
            map(int, self.labels),
            self._patients(),
            itertools.repeat(1.0) if weights is None else map(float, self.weights),
            strict=False,
        )
        return itertools.starmap(Example, rows)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Examples | tuple):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"


def _numbered(names: Sequence[str], patients: Iterable[str]) -> tuple[np.ndarray, Texts]:
    """Returns the columns `patients` and `patient_names` of `_Columns`."""
    known: dict[str, int] = {}
    numbers = np.fromiter(
        (
            -1 if patient == name else known.setdefault(patient, len(known))
            for name, patient in zip(names, patients, strict=True)
        ),
        np.int32,
        len(names),
    )
    own = np.flatnonzero(numbers < 0).tolist()
    again = len(np.unique([hash(names[row]) for row in own])) < len(own)
    for row in own if again or known else ():
        if again or names[row] in known:
            numbers[row] = known.setdefault(names[row], len(known))
    return numbers, Texts(known)


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _PART, n)) for start in range(0, n, _PART))
