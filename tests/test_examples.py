"""Examples in columns: the same as a tuple of them, in a fraction of the memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cnnjax.data.examples import Example, Examples, Texts
from cnnjax.data.index import read_index

PLAIN = (
    Example("train/NORMAL/IM-0001-0001.jpeg", "train", 0, "IM-0001"),
    Example(
        "train/NORMAL/caf\u00e9 \U0001fa7b.jpeg",
        "train",
        0,
        "train/NORMAL/caf\u00e9 \U0001fa7b.jpeg",
    ),
    Example("val/PNEUMONIA/\udce9.jpeg", "val", 2, "val/PNEUMONIA/\udce9.jpeg", 0.25),
    Example("test/PNEUMONIA/b.jpeg", "test", 1, "IM-0001"),
    Example("test/PNEUMONIA/c.jpeg", "test", 1, "train/NORMAL/d.jpeg", 3.0),
    Example("train/NORMAL/d.jpeg", "train", 0, "train/NORMAL/d.jpeg"),
)


def test_they_are_a_sequence_of_examples() -> None:
    kept = Examples.of(PLAIN)
    assert kept == PLAIN
    assert kept == PLAIN
    assert kept != PLAIN[:-1]
    assert kept != (*PLAIN[:-1], PLAIN[0])
    assert tuple(kept) == PLAIN
    assert hash(kept) == hash(PLAIN)
    assert [kept[i] for i in range(-6, 6)] == [*PLAIN, *PLAIN]
    assert kept[np.int64(3)] == PLAIN[3]
    assert kept[1::2] == PLAIN[1::2]
    assert list(reversed(kept)) == [*reversed(PLAIN)]
    with pytest.raises(IndexError):
        kept[6]


@pytest.mark.parametrize("rows", [[], [4, 0, 0], [5, 3, 4, 2], [*range(6)]])
def test_some_of_them(rows: list[int]) -> None:
    wanted = tuple(PLAIN[i] for i in rows)
    some = Examples.of(PLAIN).take(np.array(rows, int))
    assert some == wanted
    assert some.take(slice(1, None)) == wanted[1:]
    assert list(some.names) == [e.name for e in wanted]
    assert some.patients == [e.patient for e in wanted]
    assert some.labels.tolist() == [e.label for e in wanted]
    assert some.weights.tolist() == [e.weight for e in wanted]
    assert some.splits == tuple(sorted({e.split for e in wanted}))
    assert some.of_split("val", "test").tolist() == [e.split != "train" for e in wanted]
    assert some.without_patient.tolist() == [e.name == e.patient for e in wanted]
    numbers = some.patient_numbers
    for i, one in enumerate(wanted):
        for j, other in enumerate(wanted):
            assert (numbers[i] == numbers[j]) == (one.patient == other.patient)


def test_images_of_one_name_are_of_one_patient() -> None:
    twice = Examples(["a", "b", "a"], ["train"] * 3, [0, 1, 0], ["a", "b", "a"])
    first, other, again = twice.patient_numbers
    assert first == again != other


def test_texts_of_any_length() -> None:
    texts = ["", "a" * 10_000, "", *map(str, range(5000))]
    assert list(Texts(texts)) == texts
    assert list(Texts(texts)[::-7]) == texts[::-7]
    assert Texts(texts)[-1] == "4999"


def test_an_index_takes_less_than_200_bytes_an_image(tmp_path: Path) -> None:
    """Of images of known patients and of unknown ones."""
    for kind in ("NORMAL", "PNEUMONIA"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    for i in range(2000):
        (tmp_path / f"train/PNEUMONIA/person{100_000 + i}_bacteria_{400_000 + i}.jpeg").touch()
        (tmp_path / f"train/NORMAL/a film whose patient is not known, {i:06}.jpeg").touch()
    read_index(tmp_path)  # what is loaded once is not counted
    tracemalloc.start()
    index = read_index(tmp_path)
    chosen = index.split("train")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(chosen) == 4000
    assert held / len(chosen) < 200
