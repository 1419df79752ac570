"""Each rendering is the one that its name says, leaves what it must, and is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from cnnjax.errors import InputError
from cnnjax.evaluation import rerender
from cnnjax.evaluation.rerender import GROUPS, RENDERINGS, SIZE, Facts

FACTS = Facts(lungs=(0.25, 0.125, 0.75, 0.875), aspect=1.6)
MILD = [name for name in RENDERINGS if name.endswith(", mild")]


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """A smooth image of many gray levels, with some detail."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 12)
    detail = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 1)
    image = 120 + 30 * smooth / smooth.std() + 6 * detail / detail.std()
    return np.clip(image, 1, 255).astype(np.uint8)


def rendered(film: np.ndarray, name: str, image: str = "train/a.jpeg", seed: int = 0) -> np.ndarray:
    found = rerender.rerender(film, name, image, FACTS, seed)
    assert found is not None
    assert found.shape == film.shape
    assert found.dtype == np.uint8
    return found.astype(float)


def part(film: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """A box of the film, in parts of the side, enlarged to the whole."""
    box = tuple(SIZE * edge for edge in (left, top, right, bottom))
    return np.asarray(Image.fromarray(film).resize((SIZE, SIZE), 2, box), float)


def test_every_group_holds_several_renderings_and_framing_is_the_first() -> None:
    assert GROUPS == ("framing", "tone", "sharpness", "damage", "stretch")
    for group in GROUPS:
        assert sum(rendering.group == group for rendering in RENDERINGS.values()) >= 4


@pytest.mark.parametrize("name", MILD)
def test_strong_is_further_from_the_image_than_mild(film: np.ndarray, name: str) -> None:
    strong = np.abs(rendered(film, name.replace("mild", "strong")) - film).mean()
    assert 0 < np.abs(rendered(film, name) - film).mean() < strong < 60


@pytest.mark.parametrize("name", RENDERINGS)
def test_the_name_and_the_seed_decide_what_is_drawn(film: np.ndarray, name: str) -> None:
    found = rendered(film, name)
    np.testing.assert_array_equal(rendered(film, name), found)
    drawn = ("off-centre", "black frame", "gray frame", "noise", "rotate")
    if name.startswith(drawn):
        assert (rendered(film, name, "train/b.jpeg") != found).any()
        assert (rendered(film, name, seed=1) != found).any()


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("middle 0.7", (0.15, 0.15, 0.85, 0.85)),
        ("middle 0.6", (0.2, 0.2, 0.8, 0.8)),
        ("lungs, margin 0", (0.25, 0.125, 0.75, 0.875)),
        ("lungs, margin 0.1", (0.2, 0.05, 0.8, 0.95)),
        ("lungs, margin 0.25", (0.125, 0, 0.875, 1)),
        ("aspect, cut", (0.1875, 0, 0.8125, 1)),
        ("wider", (0.125, 0, 0.875, 1)),
        ("taller", (0, 0.125, 1, 0.875)),
    ],
)
def test_a_part_of_the_film_is_enlarged_to_the_whole(
    film: np.ndarray, name: str, box: tuple[float, float, float, float]
) -> None:
    np.testing.assert_allclose(rendered(film, name), part(film, *box), atol=1)


def test_off_centre_shows_a_square_that_is_not_always_the_middle(film: np.ndarray) -> None:
    rows, columns = np.mgrid[:SIZE, :SIZE] * 255 // SIZE
    corners = set()
    for image in "abcd":
        across = rendered(columns.astype(np.uint8), "off-centre 0.7", image)
        down = rendered(rows.astype(np.uint8), "off-centre 0.7", image)
        for found in (across, down):
            assert np.ptp(found) == pytest.approx(0.7 * 255, abs=4)
        corners.add((across.min() // 8, down.min() // 8))
    assert len(corners) > 2


@pytest.mark.parametrize("name", ["gamma, strong", "tone curve, strong", "levels, strong"])
def test_tone_keeps_the_order_of_gray_levels(film: np.ndarray, name: str) -> None:
    order = np.argsort(film, axis=None, kind="stable")
    assert (np.diff(rendered(film, name).reshape(-1)[order]) >= 0).all()


@pytest.mark.parametrize("name", ["blur, strong", "resample, strong"])
def test_detail_goes_and_the_rest_stays(film: np.ndarray, name: str) -> None:
    found = rendered(film, name)
    assert found.mean() == pytest.approx(film.mean(), abs=1)
    assert ndimage.laplace(found).std() < 0.3 * ndimage.laplace(film.astype(float)).std()


def test_sharpening_adds_detail(film: np.ndarray) -> None:
    found = ndimage.laplace(rendered(film, "sharpen, strong")).std()
    assert found > 1.5 * ndimage.laplace(film.astype(float)).std()


@pytest.mark.parametrize(("name", "gray"), [("black frame", 0), ("gray frame", None)])
def test_a_frame_is_even_around_the_whole_film(
    film: np.ndarray, name: str, gray: int | None
) -> None:
    found = rendered(film, name)
    inside = found != (round(film.mean()) if gray is None else gray)
    inside = ndimage.binary_opening(inside, iterations=3)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 0.68 * SIZE <= min(height, width) < SIZE
    small = Image.fromarray(film).resize((int(width), int(height)), Image.Resampling.BILINEAR)
    shown = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert np.corrcoef(shown.reshape(-1), np.asarray(small, float).reshape(-1))[0, 1] > 0.9


def test_the_published_aspect_is_restored_with_black_bars(film: np.ndarray) -> None:
    found = rendered(film, "aspect, padded")
    shown = np.flatnonzero(found.any(1))
    assert len(shown) == pytest.approx(SIZE / 1.6, abs=1)
    assert shown[0] == pytest.approx(SIZE - 1 - shown[-1], abs=1)


def test_a_rendering_that_needs_what_is_not_known_is_left_out(film: np.ndarray) -> None:
    films, names = np.stack([film, film]), ["train/a.jpeg", "train/b.jpeg"]
    facts = {"b.jpeg": FACTS}
    for name in RENDERINGS:
        images, rows = rerender.render(films, names, name, facts)
        needs = name.startswith(("lungs", "aspect"))
        assert rows.tolist() == ([1] if needs else [0, 1])
        assert images.shape == (len(rows), SIZE, SIZE)
    assert rerender.render(films, names, "lungs, margin 0", {})[0].shape == (0, SIZE, SIZE)


@pytest.mark.parametrize("name", RENDERINGS)
def test_a_mask_moves_with_its_film(name: str) -> None:
    """A film that is white on its mask is white there after the rendering as well."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[70:150, 60:110] = True
    film = np.where(mask, 255, 60).astype(np.uint8)
    changed = rendered(film, name)
    moved = rerender.rerender_mask(mask, name, "train/a.jpeg", FACTS)
    assert moved is not None
    bright = ndimage.gaussian_filter(changed, 2) > (changed.min() + changed.max()) / 2
    both = 2 * (bright & moved).sum() / (bright.sum() + moved.sum())
    assert both > 0.9


def test_facts_come_from_outlines_and_native_sizes(tmp_path: Path) -> None:
    masks = np.zeros((2, 128, 128), bool)
    masks[0, 16:64, 32:96] = True
    np.savez(
        tmp_path / "masks_128.npz",
        names=np.array(["a.jpeg", "empty.jpeg"]),
        masks=np.packbits(masks.reshape(2, -1), axis=1),
    )
    table = "file,native_width,native_height\na.jpeg,1500,1000\nc.jpeg,800,1000\n"
    (tmp_path / "masks.csv").write_text(table)
    found = rerender.read_facts(tmp_path)
    assert found["a.jpeg"] == Facts((0.25, 0.125, 0.75, 0.5), 1.5)
    assert found["c.jpeg"] == Facts(None, 0.8)
    assert found["empty.jpeg"] == Facts(None, None)
    (tmp_path / "masks.csv").unlink()
    with pytest.raises(InputError, match="holds no lung outlines"):
        rerender.read_facts(tmp_path)
