"""Each change is the one that its name says, leaves what it must, and is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from cnnjax.data import cache, rerender
from cnnjax.data.index import read_index
from cnnjax.data.rerender import CHANGES, SIZE, STRENGTHS


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """A smooth image of many gray levels, with some detail."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 12)
    detail = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 1)
    image = 120 + 30 * smooth / smooth.std() + 6 * detail / detail.std()
    return np.clip(image, 0, 255).astype(np.uint8)


def change(film: np.ndarray, name: str, strength: rerender.Strength = "strong") -> np.ndarray:
    return rerender.rerender(film, name, strength, "train/a.jpeg").astype(float)


@pytest.mark.parametrize("name", CHANGES)
def test_strong_is_further_from_the_image_than_mild(film: np.ndarray, name: str) -> None:
    mild, strong = (np.abs(change(film, name, s) - film).mean() for s in STRENGTHS)
    assert 0 < mild < strong
    assert strong < 60


@pytest.mark.parametrize("name", CHANGES)
def test_the_name_and_the_seed_decide_what_is_drawn(film: np.ndarray, name: str) -> None:
    again = rerender.rerender(film, name, "strong", "train/a.jpeg")
    np.testing.assert_array_equal(again, change(film, name))
    if name in ("noise", "crop", "border", "rotate"):
        other = rerender.rerender(film, name, "strong", "train/b.jpeg")
        assert (other != again).any()
        assert (rerender.rerender(film, name, "strong", "train/a.jpeg", seed=1) != again).any()


@pytest.mark.parametrize("name", ["gamma", "tone", "stretch"])
def test_tone_keeps_the_order_of_gray_levels(film: np.ndarray, name: str) -> None:
    order = np.argsort(film, axis=None, kind="stable")
    assert (np.diff(change(film, name).reshape(-1)[order]) >= 0).all()


@pytest.mark.parametrize("name", ["blur", "resample"])
def test_detail_goes_and_the_rest_stays(film: np.ndarray, name: str) -> None:
    found = change(film, name)
    assert found.mean() == pytest.approx(film.mean(), abs=1)
    assert ndimage.laplace(found).std() < 0.3 * ndimage.laplace(film.astype(float)).std()


def test_border_is_black_around_the_whole_image(film: np.ndarray) -> None:
    found = change(film, "border")
    inside = found > 0
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 0.8 * SIZE <= min(height, width) < SIZE
    assert inside.mean() == pytest.approx(height * width / SIZE**2, abs=0.02)


def test_the_set_is_made_once_and_holds_every_image_in_every_rendering(
    tree: Path, tmp_path: Path
) -> None:
    index = read_index(tree)
    decoded = cache.load(index.split("val"), index.source, SIZE, folder=tmp_path)
    found = rerender.load(decoded, 20, tmp_path)
    assert len(found) == len(CHANGES) * len(STRENGTHS)
    for images in found.values():
        assert images.shape == (len(decoded.examples), 20, 20)
        assert images.dtype == np.uint8
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = rerender.load(decoded, 20, tmp_path)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    np.testing.assert_array_equal(again["blur, mild"], found["blur, mild"])
