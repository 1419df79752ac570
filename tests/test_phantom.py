"""Phantoms are a function of their seed, hold what their masks say, and give no class away."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cnnjax import phantom
from cnnjax.data.decode import decode
from cnnjax.data.examples import Example
from cnnjax.data.index import read_index
from cnnjax.data.kermany import group_of
from cnnjax.data.patients import in_several_splits
from cnnjax.phantom import tree as tree_module

KINDS: tuple[phantom.Kind, ...] = get_args(phantom.Kind)
ILL: tuple[phantom.Kind, ...] = ("bacteria", "virus")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom") / "tree"
    phantom.write_tree(root, train=120, val=12, test=36, size=64, seed=3, progress=False, workers=1)
    return root


def contents(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*.jpeg")
    }


def of_split(examples: Sequence[Example], split: str) -> list[Example]:
    return [example for example in examples if example.split == split]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 97])
def test_shapes_and_types(kind: phantom.Kind, size: int) -> None:
    drawing = phantom.draw(0, 1, 0, kind, size)
    for field, dtype in ((drawing.image, np.uint8), (drawing.opacity, bool), (drawing.lungs, bool)):
        assert field.shape == (size, size)
        assert field.dtype == dtype


def test_a_drawing_is_a_function_of_its_numbers() -> None:
    first = phantom.draw(0, 1, 0, "virus", 64)
    again = phantom.draw(0, 1, 0, "virus", 64)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.opacity, again.opacity)
    for other in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        assert np.any(phantom.draw(*other, "virus", 64).image != first.image)


def test_lungs_differ_more_between_patients_than_between_films_of_one() -> None:
    share = np.array(
        [[phantom.draw(0, p, s, "normal", 64).lungs.mean() for s in range(4)] for p in range(20)]
    )
    within = share.var(axis=1, ddof=1).mean()
    between = share.mean(axis=1).var(ddof=1)
    assert between > 2 * within / 4  # were all patients alike, it would be near within / 4


@pytest.mark.parametrize("kind", ILL)
def test_the_opacity_lies_in_the_lungs(kind: phantom.Kind) -> None:
    for patient in range(20):
        drawing = phantom.draw(0, patient, 0, kind, 64)
        assert drawing.opacity.sum() >= 0.03 * drawing.lungs.sum()
        assert not np.any(drawing.opacity & ~drawing.lungs)
        assert drawing.opacity.sum() < 0.8 * drawing.lungs.sum()


def test_bacteria_take_one_lung_and_a_virus_both() -> None:
    bounds: dict[phantom.Kind, tuple[float, float]] = {"bacteria": (0, 0.02), "virus": (0.2, 1)}
    for kind, (low, high) in bounds.items():
        balance = []
        for patient in range(20):
            drawing = phantom.draw(0, patient, 0, kind, 64)
            middle = round(np.nonzero(drawing.lungs)[1].mean())
            sides = drawing.opacity[:, :middle].sum(), drawing.opacity[:, middle:].sum()
            balance.append(min(sides) / max(sides))
        assert low <= np.median(balance) <= high


@pytest.mark.parametrize("kind", ILL)
def test_pneumonia_brightens_the_film_where_its_mask_is(kind: phantom.Kind) -> None:
    """The rest of the film changes less, and only by the exposure that makes up for it."""
    for patient in range(20):
        ill = phantom.draw(0, patient, 0, kind, 64)
        well = phantom.draw(0, patient, 0, "normal", 64)
        np.testing.assert_array_equal(ill.lungs, well.lungs)
        assert not well.opacity.any()
        change = ill.image.astype(int) - well.image
        clear = ill.lungs & ~ill.opacity
        assert change[ill.opacity].mean() > change[clear].mean() + 5, patient


def test_the_heart_is_on_the_right_of_the_film_and_the_lungs_are_dark() -> None:
    films = [phantom.draw(0, patient, 0, "normal", 64) for patient in range(20)]
    for film in films:
        rows, columns = (slice(i.min(), i.max()) for i in np.nonzero(film.lungs))
        between = film.image[rows, columns][~film.lungs[rows, columns]]
        assert film.image[film.lungs].mean() < between.mean() - 20
    right_lung = np.mean([film.lungs[:, :32].sum() for film in films])
    left_lung = np.mean([film.lungs[:, 32:].sum() for film in films])
    assert right_lung > 1.1 * left_lung  # the heart takes room from the patient's left lung


def test_the_same_bytes_from_any_number_of_workers(tmp_path: Path) -> None:
    trees = []
    for workers in (1, 2):
        root = tmp_path / str(workers)
        phantom.write_tree(
            root, train=20, val=0, test=6, size=64, seed=1, progress=False, workers=workers
        )
        trees.append(contents(root))
    assert len(trees[0]) == 26
    assert trees[0] == trees[1]


def test_splits_hold_what_was_asked_for(drawn: Path) -> None:
    index = read_index(drawn)
    assert index.classes == ("NORMAL", "PNEUMONIA")
    assert not index.left_out
    for split, total in (("train", 120), ("val", 12), ("test", 36)):
        members = of_split(index.examples, split)
        assert len(members) == total
        assert 0.6 < np.mean([e.label for e in members]) < 0.73
        causes = Counter(e.patient.partition("_")[2] for e in members if e.label)
        assert causes["bacteria"] > causes["virus"] > 0


def test_names_tell_patients_and_no_patient_is_in_two_splits(drawn: Path) -> None:
    examples = read_index(drawn).examples
    assert all(e.patient != Path(e.name).name for e in examples)
    assert not any(in_several_splits(examples).values())
    shots = Counter(e.patient for e in examples)
    assert set(shots.values()) == {1, 2, 3, 4}
    # Neither does a number stand for two patients, whoever groups by the number alone.
    assert len({group_of(patient) for patient in shots}) == len(shots)


def test_all_name_schemes_occur(drawn: Path) -> None:
    names = " ".join(Path(e.name).name for e in read_index(drawn).examples)
    for pattern in (" IM-", "NORMAL2-IM-", "-0001-0002.jpeg", "_bacteria_", "_virus_"):
        assert pattern in names


def test_mean_brightness_does_not_tell_the_class(drawn: Path) -> None:
    examples = read_index(drawn).examples
    brightness = [decode((drawn / e.name).read_bytes(), 64).mean() for e in examples]
    auc = roc_auc_score([e.label for e in examples], brightness)
    assert max(auc, 1 - auc) < 0.7
    assert np.std(brightness) > 5  # and not since all films are equally bright


def test_a_split_of_no_images_is_absent(tmp_path: Path) -> None:
    phantom.write_tree(tmp_path / "t", train=2, val=0, test=0, size=64, progress=False)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [".phantom", "train"]
    assert {e.label for e in read_index(tmp_path / "t").examples} == {0, 1}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    phantom.write_tree(tmp_path, train=2, val=0, test=2, size=64, progress=False)
    assert len(contents(tmp_path)) == 4


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("keep")
    for directory in (tmp_path, precious):
        with pytest.raises(FileExistsError, match="choose another directory"):
            phantom.write_tree(directory, train=2, val=0, test=0, size=64, progress=False)
    assert precious.read_text() == "keep"
    assert list(tmp_path.iterdir()) == [precious]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tree_module, "draw", fail)
    with pytest.raises(OSError, match="no space left"):
        phantom.write_tree(tmp_path / "t", train=4, size=64, progress=False, workers=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"test": 1}, "test cannot hold both classes in 1 image"),
        ({"train": -1}, "fewer than 0"),
        ({"train": 0, "val": 0, "test": 0}, "nor all of them 0"),
        ({"size": 16}, "at least 32 pixels, got 16"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path: Path, wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phantom.write_tree(tmp_path / "t", **wrong, progress=False)
    assert not list(tmp_path.iterdir())
