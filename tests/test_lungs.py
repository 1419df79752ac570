"""The lung finder finds lungs where there are some, and films are cut to them alike everywhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnnjax import cli, lungs, phantom
from cnnjax.augment import make_augment
from cnnjax.config import AugmentConfig, Config, DataConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.data import framing
from cnnjax.data.decode import decode
from cnnjax.data.index import read_index
from cnnjax.errors import InputError
from cnnjax.evaluation.predict import Predictor
from cnnjax.machine import devices
from cnnjax.networks import LungFinder
from cnnjax.objectives import Batch, Segmentation
from cnnjax.optimizers import make_optimizer
from cnnjax.steps import init_state, make_train_step
from cnnjax.train import fit


def mesh() -> devices.Mesh:
    return devices.make_mesh(DeviceConfig("cpu"))


@pytest.fixture(scope="module")
def drawn() -> list[phantom.Phantom]:
    """Radiographs that the finder was not trained on."""
    return [phantom.draw(7, patient, 0, "normal", lungs.FILM) for patient in range(12)]


@pytest.fixture(scope="module")
def films(drawn: list[phantom.Phantom]) -> np.ndarray:
    return np.stack([one.image for one in drawn])


def test_resample_is_pillows_hamming_filter() -> None:
    rng = np.random.default_rng(0)
    smooth = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (20, 24), dtype=np.uint8)).resize((90, 70)))
        for _ in range(4)
    ]
    boxes = np.array(
        [[0.1, 0.05, 0.83, 0.9], [0, 0, 1, 1], [0.2, 0.3, 0.9, 0.7], [0.4, 0.4, 0.6, 0.5]],
        np.float32,
    )
    found = lungs.resample(jnp.asarray(np.stack(smooth), jnp.float32), jnp.asarray(boxes), 32)
    for image, box, ours in zip(smooth, boxes, found, strict=True):
        edges = tuple((box * (90, 70, 90, 70)).tolist())
        theirs = Image.fromarray(image).resize((32, 32), Image.Resampling.HAMMING, edges)
        np.testing.assert_allclose(ours, np.asarray(theirs, float), atol=1.5)


def test_the_box_is_around_what_is_lung() -> None:
    maps = np.zeros((3, 48, 48), np.float32)
    maps[0, 10:30, 5:18] = maps[0, 12:34, 28:40] = 1  # two lungs
    maps[1] = 1
    maps[2, 20:28, :] = 0.999  # reaches both sides
    boxes = np.asarray(lungs.lung_boxes(jnp.asarray(maps)))
    np.testing.assert_allclose(boxes[0], np.array([5, 10, 40, 34]) / 48, atol=0.5 / 48)
    np.testing.assert_allclose(boxes[1], [0, 0, 1, 1])
    np.testing.assert_allclose(boxes[2], [0, 20 / 48, 1, 28 / 48], atol=0.5 / 48)


def test_the_margin_ends_at_the_films_edge() -> None:
    boxes = lungs.with_margin(jnp.array([[0.2, 0.05, 0.7, 0.95]]), 0.1)
    np.testing.assert_allclose(boxes, [[0.15, 0, 0.75, 1]], atol=1e-6)


def test_lungs_of_unseen_phantoms_are_found(
    drawn: list[phantom.Phantom], films: np.ndarray
) -> None:
    framer = lungs.Framer(64, mesh())
    framed = framer(films)
    assert framed.found.all()
    assert framed.images.shape == (12, 64, 64)
    for box, one, map_ in zip(framed.boxes, drawn, framer.maps(films), strict=True):
        rows, columns = np.flatnonzero(one.lungs.any(1)), np.flatnonzero(one.lungs.any(0))
        tight = np.array([columns[0], rows[0], columns[-1], rows[-1]]) / lungs.FILM
        assert (box[:2] <= tight[:2] + 0.03).all()
        assert (box[2:] >= tight[2:] - 0.03).all()
        both = 2 * (one.lungs & (map_ > 0.5)).sum()
        assert both / (one.lungs.sum() + (map_ > 0.5).sum()) > 0.85


def test_what_is_cut_out_hardly_depends_on_the_frame(films: np.ndarray) -> None:
    framer = lungs.Framer(64, mesh())
    small = np.zeros_like(films)
    for film, inner in zip(small, films, strict=True):
        film[20:210, 10:200] = np.asarray(Image.fromarray(inner).resize((190, 190)))
    whole, framed = framer(films).images.astype(float), framer(small).images.astype(float)
    apart = np.abs(whole - framed).mean((1, 2))
    assert np.median(apart) < 10
    # As it was, the frame alone changes far more.
    resized = [
        np.abs(decode(a, 64).astype(float) - decode(b, 64)).mean()
        for a, b in zip(films, small, strict=True)
    ]
    assert np.median(apart) < 0.3 * np.median(resized)


def blanks() -> list[np.ndarray]:
    """Pictures without lungs, none of them as the finder's training draws them."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[: lungs.FILM, : lungs.FILM] / lungs.FILM
    fingers = sum(
        np.exp(-(((columns - x) / 0.03) ** 2)) * (rows < 0.6) for x in (0.2, 0.35, 0.5, 0.65)
    )
    pictures = [
        np.zeros_like(rows),
        np.ones_like(rows),
        rng.random(rows.shape),
        columns,
        np.sin(60 * columns) > 0,
        (np.floor(8 * rows) + np.floor(8 * columns)) % 2,
        np.exp(-8 * ((rows - 0.5) ** 2 + (columns - 0.5) ** 2)),
        np.clip(fingers + 0.8 * (rows > 0.55) * (abs(columns - 0.42) < 0.3), 0, 1),
    ]
    return [np.clip(255 * picture, 0, 255).astype(np.uint8) for picture in pictures]


def test_no_lungs_are_found_where_there_are_none() -> None:
    from sklearn.datasets import load_sample_images

    photos = [decode(np.asarray(photo), lungs.FILM) for photo in load_sample_images().images]
    framed = lungs.Framer(64, mesh())(np.stack([*blanks(), *photos]))
    assert not framed.found.any()
    np.testing.assert_array_equal(framed.boxes, np.tile([0, 0, 1, 1], (len(framed.boxes), 1)))


def test_maps_are_put_back_where_they_were_cut_out() -> None:
    maps = np.ones((2, 8, 8), np.float32)
    boxes = np.array([[0.25, 0.5, 0.75, 1], [0, 0, 1, 1]], np.float32)
    whole = lungs.put_back(maps, boxes, 40)
    expected = np.zeros((40, 40))
    expected[20:, 10:30] = 1
    np.testing.assert_allclose(whole[0], expected, atol=1e-6)
    np.testing.assert_allclose(whole[1], 1, atol=1e-6)


def test_segmentation_learns_through_the_train_step() -> None:
    """A bright square on noise is found after a few steps, wherever it is moved."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 80, (8, 32, 32), dtype=np.uint8)
    maps = np.zeros((8, 32, 32), np.uint8)
    for image, map_, (row, column) in zip(images, maps, rng.integers(4, 16, (8, 2)), strict=True):
        image[row : row + 12, column : column + 12] += 150
        map_[row : row + 12, column : column + 12] = 255
    batch = Batch(jnp.asarray(images), jnp.asarray(maps))
    model = LungFinder(4)
    optimizer, _ = make_optimizer(TrainConfig(learning_rate=1e-2), 1)
    augment = make_augment(AugmentConfig(shear=0, zoom=0.1, flip=True, shift=0.05, black=0.5))
    step = make_train_step(model, optimizer, augment, Segmentation())
    state = jax.jit(lambda key: init_state(model, optimizer, key, 32))(jax.random.key(0))
    losses = []
    for _ in range(25):
        state, sums = step(state, batch, jax.random.key(1))
        losses.append(float(sums.loss) / 8)
    assert losses[-1] < 0.5 * losses[0]
    assert int(sums.images) == 8


def test_segmentation_rewards_nothing_found_where_there_is_nothing() -> None:
    empty = jnp.zeros((1, 16, 16))
    for logit, least, most in ((-12.0, 0.0, 0.01), (12.0, 10.0, 20.0)):
        outputs = jnp.full((1, 8, 8), logit)
        (loss,) = Segmentation().losses(outputs, {}, empty).minimized
        assert least <= float(loss) <= most


def test_maps_are_moved_as_images_are() -> None:
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((4, 24, 24, 1)), jnp.float32)
    config = AugmentConfig(shear=5, zoom=0.2, flip=True, rotate=10, shift=0.1, crop=0.5, black=1.0)
    augment = make_augment(config)
    key = jax.random.key(3)
    moved, maps = augment(key, images, images)
    np.testing.assert_allclose(maps, moved, atol=1e-6)
    np.testing.assert_array_equal(augment(key, images), moved)
    # Tone is for the image alone, and nothing lies beyond the edge.
    toned, maps = make_augment(AugmentConfig(0, 0, False, gamma=0.5, black=0))(key, images, images)
    np.testing.assert_array_equal(maps, images)
    assert np.abs(toned - images).max() > 0.01
    shifted = make_augment(AugmentConfig(0, 0, False, shift=0.5, black=0))
    _, ones = shifted(key, images, jnp.ones_like(images))
    assert 0 < float((ones == 0).mean()) < 1


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree of drawn radiographs."""
    root = tmp_path_factory.mktemp("drawn") / "chests"
    phantom.write_tree(root, train=24, val=4, test=8, size=128)
    return root


@pytest.fixture(scope="module")
def run(chests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lungs")
    fit(
        Config(
            workdir=folder / "run",
            data=DataConfig(str(chests), 24, "lungs", folds=4, cache=folder / "cache"),
            model=ModelConfig("resnet", width=4, stages=2),
            train=TrainConfig(epochs=1, batch=16),
        )
    )
    return folder / "run"


def test_a_run_sees_framed_films_and_keeps_them(run: Path, chests: Path) -> None:
    config = DataConfig(root=str(chests), size=24, frame="lungs", cache=run.parent / "cache")
    index = read_index(chests)
    made = {path: path.stat().st_mtime_ns for path in config.cache.rglob("images.npy")}
    decoded = framing.load(index.split("train", "val"), index.source, config, mesh())
    assert made == {path: path.stat().st_mtime_ns for path in config.cache.rglob("images.npy")}
    assert decoded.films is not None
    assert decoded.films.shape[1:] == (lungs.FILM, lungs.FILM)
    again = lungs.Framer(24, mesh())(decoded.films)
    np.testing.assert_array_equal(decoded.images, again.images)
    np.testing.assert_array_equal(decoded.boxes, again.boxes)
    whole = framing.load(
        index.split("train", "val"), index.source, DataConfig(str(chests), 24, cache=config.cache)
    )
    assert whole.fingerprint != decoded.fingerprint
    assert np.abs(whole.images.astype(float) - decoded.images).mean() > 5


def test_the_predictor_frames_what_it_is_given(run: Path, films: np.ndarray) -> None:
    predictor = Predictor.open(run, mesh())
    assert (predictor.size, predictor.side) == (lungs.FILM, 24)
    framed = predictor.frame(films)
    np.testing.assert_allclose(predictor.logits(films), predictor.logits(framed), atol=1e-5)
    heat = predictor.heat(films)
    assert heat.shape == films.shape
    for one, (left, top, right, bottom) in zip(heat, framed.boxes * lungs.FILM, strict=True):
        inside = np.zeros_like(one)
        inside[round(top) : round(bottom), round(left) : round(right)] = 1
        assert one.any()
        assert not (one * (1 - inside)).any()


def test_predict_says_that_there_are_no_lungs(
    run: Path, films: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(films[0]).save(tmp_path / "film.png")
    Image.fromarray(blanks()[4]).save(tmp_path / "stripes.png")
    names = [str(tmp_path / name) for name in ("stripes.png", "film.png")]
    command = ["predict", *names, "--run", str(run), "--csv", str(tmp_path / "table.csv")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--heatmap", str(tmp_path / "heat")])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    stripes, film = map(json.loads, printed.out.splitlines())
    assert stripes["lungs"] is False
    assert "no lungs found: is this a frontal chest radiograph?" in stripes["warning"]
    assert not {"probability", "class", "confidence"} & stripes.keys()
    assert film["lungs"] is True
    assert film["class"] in ("NORMAL", "PNEUMONIA")
    assert "stripes.png: warning: no lungs found" in printed.err
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0].split(",")[:5] == ["path", "probability", "class", "confidence", "lungs"]
    assert lines[1].split(",")[1:5] == ["", "", "", "False"]
    assert {path.name for path in (tmp_path / "heat").iterdir()} == {"stripes.png", "film.png"}
    with pytest.raises(SystemExit):
        cli.main(["predict", *names, "--run", str(run), "--format", "table"])
    assert "no prediction" in capsys.readouterr().out


def test_evaluate_counts_films_without_lungs(
    run: Path, chests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("NORMAL", "PNEUMONIA"):
        folder = tmp_path / "data" / "test" / kind
        folder.mkdir(parents=True)
        for path in sorted((chests / "test" / kind).iterdir())[:4]:
            (folder / path.name).write_bytes(path.read_bytes())
    Image.new("L", (100, 100)).save(folder / "black.png")
    out, table = tmp_path / "metrics.json", tmp_path / "images.csv"
    command = ["evaluate", "--run", str(run), "--data", str(tmp_path / "data")]
    command += ["--json", str(out), "--csv", str(table), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 0
    assert "no lungs found in 1 of 8 images" in capsys.readouterr().out
    assert json.loads(out.read_text())["no_lungs_found"] == 1
    flagged = [line.endswith("false") for line in table.read_text().splitlines()[1:]]
    assert flagged == ["black" in line for line in table.read_text().splitlines()[1:]]


def test_a_damaged_finder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lungs.npz"
    with pytest.raises(InputError, match="holds no valid lung finder"):
        lungs.read(path)
    path.write_bytes(lungs.SHIPPED.read_bytes()[:1000])
    with pytest.raises(InputError, match="holds no valid lung finder"):
        lungs.read(path)


@pytest.mark.parametrize("side", [1, 60])
def test_predict_says_that_an_image_is_blank(
    side: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (side, side), 90).save(tmp_path / "blank.png")
    film, out = str(tmp_path / "blank.png"), str(tmp_path / "out.csv")
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", film, "--run", str(run), "--csv", out])
    assert ended.value.code == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "all pixels have the same gray level" in row["warning"]
    with Path(out).open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert (written["class"], written["warning"]) == ("", row["warning"])
    assert not {"probability", "class", "confidence"} & row.keys()
