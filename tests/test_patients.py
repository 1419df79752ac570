"""A split never divides a patient, and keeps the classes in proportion."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from cnnjax.config import DataConfig
from cnnjax.data.examples import Example
from cnnjax.data.patients import (
    block_folds,
    group_of,
    grouped_folds,
    in_several_splits,
    write_split,
)
from cnnjax.data.prepare import training_data
from cnnjax.errors import InputError


def examples(patients: int = 60) -> list[Example]:
    """Three quarters positive; one to four images a patient; bacteria and virus share numbers."""
    out = []
    for number in range(patients):
        label = int(number % 4 > 0)
        names = [f"person{number}_bacteria", f"person{number}_virus"] if label else [f"IM-{number}"]
        for patient in names:
            for i in range(1 + number % 3):
                out.append(Example(f"train/{patient}_{i}.jpeg", "train", label, patient))
    return out


def test_no_patient_is_divided_and_classes_keep_their_share() -> None:
    given = examples()
    fold = grouped_folds(given, 5, seed=0)
    side: dict[str, int] = {}
    for example, k in zip(given, fold, strict=True):
        assert side.setdefault(group_of(example.patient), k) == k
    labels = np.array([e.label for e in given])
    assert set(fold) == set(range(5))
    for k in range(5):
        assert abs(labels[fold == k].mean() - labels.mean()) < 0.06


def test_folds_are_a_function_of_the_seed() -> None:
    given = examples()
    np.testing.assert_array_equal(grouped_folds(given, 5, 7), grouped_folds(given, 5, 7))
    assert (grouped_folds(given, 5, 7) != grouped_folds(given, 5, 8)).any()


@pytest.mark.parametrize(
    ("folds", "seed", "classes"),
    [(2, 0, 2), (2, 1, 2), (5, 0, 2), (5, 1, 3), (5, 2, 9), (10, 0, 2)],
)
def test_folds_are_those_of_scikit_learn(folds: int, seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    images = [
        Example(f"train/{i}.png", "train", label, f"p{rng.integers(120)}")
        for i, label in enumerate(np.minimum(rng.geometric(0.3, 400) - 1, classes - 1).tolist())
    ]
    labels = [e.label for e in images]
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    expected = np.empty(len(images), int)
    groups = [e.patient for e in images]
    for k, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        expected[held_out] = k
    np.testing.assert_array_equal(grouped_folds(images, folds, seed), expected)


def test_blocks_are_runs_of_the_numbering_and_the_last_holds_the_other_series() -> None:
    given = [e for e in examples(120) if e.label == 1]
    for series, numbers in (("IM", range(115, 155)), ("NORMAL2-IM", range(383, 393))):
        given += [
            Example(f"train/{series}-{number:04d}-{i}.jpeg", "train", 0, f"{series}-{number:04d}")
            for number in numbers
            for i in range(3)
        ]
    fold = block_folds(given, 5)
    normal2 = np.array(["NORMAL2" in e.name for e in given])
    labels = np.array([e.label for e in given])
    assert set(fold[normal2]) == {4}
    assert set(fold[(labels == 0) & ~normal2]) == {0, 1, 2, 3}
    side: dict[str, int] = {}
    for example, k in zip(given, fold, strict=True):
        assert side.setdefault(group_of(example.patient), k) == k
    for label in (0, 1):
        numbers = [int(re.search(r"\d{1,4}(?!.*\d)", e.patient)[0]) for e in given]  # type: ignore[index]
        at = np.array(numbers)[(labels == label) & ~normal2]
        k = fold[(labels == label) & ~normal2]
        assert (np.diff(k[np.argsort(at, kind="stable")]) >= 0).all()
        sizes = np.bincount(k)
        assert sizes.max() - sizes.min() <= 6  # a patient or two


def test_blocks_of_names_of_no_known_scheme() -> None:
    names = [f"img{number:04d}.jpeg" for number in range(100)]
    given = [Example(f"train/{name}", "train", i % 2, name) for i, name in enumerate(names)]
    fold = block_folds(given, 5)
    np.testing.assert_array_equal(fold, np.arange(100) // 20)
    # One file of another series is no block of its own.
    stray = [*given, Example("train/zzz1.jpeg", "train", 0, "zzz1.jpeg")]
    assert np.bincount(block_folds(stray, 5)).min() > 10


def test_too_few_patients_for_blocks() -> None:
    with pytest.raises(InputError, match="1 patients of class 0 are too few for 5 folds"):
        block_folds(examples(4), 5)


def test_a_fold_without_a_class_is_told_before_decoding(make_tree: Callable[..., Path]) -> None:
    """One patient has nearly all of a class."""
    ill = [f"train/PNEUMONIA/person1_virus_{i}.jpeg" for i in range(96)]
    ill += [f"train/PNEUMONIA/person{i}_virus_{i}.jpeg" for i in range(2, 6)]
    tree = make_tree(*ill, *(f"train/NORMAL/IM-{i:04}-0001.jpeg" for i in range(10)))
    config = DataConfig(str(tree), validation="blocks", fold=1)
    with pytest.raises(
        InputError, match=r"--data\.fold 1, validation lacks the class PNEUMONIA; choose"
    ):
        training_data(config, 0, print)


def test_one_number_is_one_group_whatever_the_germ() -> None:
    assert group_of("person12_bacteria") == group_of("person12_virus") == "person12"
    assert group_of("NORMAL2-IM-0395") == "NORMAL2-IM-0395"


def test_too_few_patients() -> None:
    with pytest.raises(InputError, match="1 patients of class 0 are too few for 5 folds"):
        grouped_folds(examples(4), 5, 0)


def test_shared_patients_are_found_but_not_strangers_of_one_number() -> None:
    given = [
        Example("train/a", "train", 1, "person1_bacteria"),
        Example("test/b", "test", 1, "person1_virus"),
        Example("train/c", "train", 0, "IM-0001"),
        Example("test/d", "test", 0, "IM-0001"),
    ]
    assert in_several_splits(given) == {("test", "train"): ["IM-0001"]}


def test_split_csv(tmp_path: Path) -> None:
    write_split(tmp_path / "split.csv", examples(2)[:2], np.array([False, True]))
    assert (tmp_path / "split.csv").read_text() == (
        "image,patient,label,role\n"
        "train/IM-0_0.jpeg,IM-0,0,train\n"
        "train/person1_bacteria_0.jpeg,person1_bacteria,1,validation\n"
    )
