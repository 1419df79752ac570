"""The same film twice: found, kept on one side of the split, and left out where labels disagree."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnjax import report
from cnnjax.config import Config, DataConfig, DeviceConfig, TrainConfig
from cnnjax.data import duplicates
from cnnjax.data.index import read_index
from cnnjax.data.prepare import TrainingData, training_data
from cnnjax.errors import InputError
from cnnjax.machine.devices import make_mesh
from cnnjax.run.workdir import Workdir, read_table
from cnnjax.train import fit

Said = list[str]


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "chest_xray"))


def prepared(root: Path, **settings: object) -> tuple[TrainingData, Said]:
    said: Said = []
    config = DataConfig(str(root), size=32, cache=root.parent / "cache", **settings)  # type: ignore[arg-type]
    return training_data(config, 0, said.append), said


def roles(data: TrainingData) -> dict[str, bool]:
    names = (e.name for e in data.decoded.examples)
    return dict(zip(names, data.held_out.tolist(), strict=True))


def film(rng: np.random.Generator, side: int = 224) -> np.ndarray:
    """Returns uint8 [side, side] with detail of every scale, as a radiograph has."""
    levels = np.zeros((side, side), np.float32)
    for places in (3, 7, 14, 28, 56):
        coarse = Image.fromarray(rng.standard_normal((places, places)).astype(np.float32))
        levels += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / places**0.5
    low, high = np.percentile(levels, (1, 99))
    return np.clip(255 * (levels - low) / (high - low), 0, 255).astype(np.uint8)


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def smaller(image: np.ndarray, side: int) -> np.ndarray:
    shape = Image.fromarray(image).size
    return np.asarray(Image.fromarray(image).resize((side, side)).resize(shape))


def cut(image: np.ndarray, part: float) -> np.ndarray:
    side, edge = len(image), part * len(image)
    box = (edge, edge, side - edge, side - edge)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the same bytes": lambda image: image,
    "JPEG quality 20": lambda image: as_jpeg(image, 20),
    "half the side": lambda image: smaller(image, 112),
    "gamma": lambda image: np.rint(255 * (image / 255) ** 1.5).astype(np.uint8),
    "a window": lambda image: np.clip((image - 20.0) * 255 / 215, 0, 255).astype(np.uint8),
    "a thin edge cut off": lambda image: cut(image, 0.005),
}


@pytest.mark.parametrize("size", [16, 33, 64])
def test_a_thumbnail_is_that_of_its_image_alone(size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, size, size), np.uint8)
    alone = [Image.fromarray(image).resize((32, 32), Image.Resampling.BOX) for image in images]
    np.testing.assert_array_equal(duplicates.thumbnails(images), np.stack(alone))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_film_that_was_made_anew_is_found_and_no_other(change: str, mirrored: bool) -> None:
    rng = np.random.default_rng(0)
    films = [film(rng) for _ in range(40)]
    again = CHANGES[change](films[7])
    images = np.stack([*films, again[:, ::-1] if mirrored else again])
    (pair,) = duplicates.find(duplicates.thumbnails(images), images.shape[1])
    assert (pair.image, pair.like, pair.mirrored) == (40, 7, mirrored)


def test_an_image_that_is_its_own_mirror_image_is_no_duplicate() -> None:
    half = film(np.random.default_rng(0))
    whole = np.concatenate([half, half[:, ::-1]], 1)[:, ::2]
    images = np.stack([whole, film(np.random.default_rng(1))])
    assert duplicates.find(duplicates.thumbnails(images), 224) == []


def test_images_of_one_gray_level_are_no_films() -> None:
    images = np.stack([np.full((32, 32), level, np.uint8) for level in (0, 0, 90, 90)])
    assert duplicates.find(duplicates.thumbnails(images), images.shape[1]) == []


def test_images_too_small_to_tell_apart_are_one_film_only_where_they_are_equal() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 200, (16, 16), np.uint8)
    brighter = one + 20
    images = np.stack([one, brighter, one])
    (pair,) = duplicates.find(duplicates.thumbnails(images), 16)
    assert (pair.image, pair.like) == (2, 0)


def test_a_thousand_copies_are_one_film_and_take_no_square_of_memory() -> None:
    rng = np.random.default_rng(0)
    one = film(rng, 64)
    noise = rng.integers(-2, 3, (1000, 64, 64))
    copies = np.clip(one + noise, 0, 255).astype(np.uint8)
    pairs = duplicates.find(duplicates.thumbnails(copies), 64)
    assert len(pairs) == 999
    assert set(duplicates.films(pairs, 1000)) == {0}


def test_in_the_published_films_only_known_pairs_are_found() -> None:
    root = Path(__file__).parents[3] / "shared" / "data" / "chest_xray"
    if not root.is_dir():
        pytest.skip("no radiographs at ../shared/data")
    from cnnjax.data.decode import decode

    names = [e.name for e in read_index(root).split("train") if "person1" in e.name][:400]
    images = np.stack([decode((root / name).read_bytes(), 64) for name in names])
    found = duplicates.find(duplicates.thumbnails(images), images.shape[1])
    assert found
    for pair in found:
        same = [names[i].rpartition("_")[0] for i in (pair.image, pair.like)]
        assert same[0] == same[1]  # one patient, though the search does not know


def test_patients_who_share_a_film_are_on_one_side_and_nobody_else_moves(copy: Path) -> None:
    before = roles(prepared(copy)[0])
    patient = {e.name: e.patient for e in read_index(copy).split("train", "val")}
    ill = sorted(name for name in before if "PNEUMONIA" in name)
    trains = next(name for name in ill if not before[name])
    held = next(
        name for name in ill if before[name] and name > trains and patient[name] != patient[trains]
    )
    # The film of a held-out patient is one of a patient who trains.
    shutil.copy(copy / trains, copy / held)
    data, said = prepared(copy)
    after = roles(data)
    theirs = {name for name in before if patient[name] == patient[held]}
    assert len(theirs) == 2
    assert {name for name in before if before[name] != after[name]} == theirs
    (found,) = data.duplicates
    assert (found.image.name, found.like.name) == (held, trains)
    assert "moved to the fold of the other" in found.done
    (line,) = [line for line in said if "repeat another radiograph" in line]
    assert line.startswith("warning: 1 images repeat another radiograph; 1 had their patient")
    assert f"{held} as {trains}" in line


def test_official_folders_stay_and_the_pair_is_named(copy: Path) -> None:
    kept, other = (sorted((copy / split / "NORMAL").iterdir())[0] for split in ("train", "val"))
    shutil.copy(kept, other)
    data, said = prepared(copy, validation="official")
    assert [d.done for d in data.duplicates] == ["nothing: on both sides by their folders"]
    assert any("1 have the other image on the other side" in line for line in said)


def test_a_film_in_both_classes_is_left_out_by_name(copy: Path) -> None:
    before = prepared(copy)[0]
    well, ill = (sorted((copy / "train" / c).iterdir())[5] for c in ("NORMAL", "PNEUMONIA"))
    shutil.copy(ill, well)
    names = {path.relative_to(copy).as_posix() for path in (well, ill)}
    for _ in range(2):  # decoded, then found in the cache
        data, said = prepared(copy)
        after = roles(data)
        assert names == {name for name, _ in data.decoded.quarantine}
        assert all(reason.startswith("in two classes") for _, reason in data.decoded.quarantine)
        assert after == {n: role for n, role in roles(before).items() if n not in names}
        assert any("left out: 2 images of radiographs in two classes" in line for line in said)
    kept = [i for i, e in enumerate(before.decoded.examples) if e.name not in names]
    np.testing.assert_array_equal(data.decoded.images, before.decoded.images[kept])
    with pytest.raises(
        InputError, match=r"in two classes: the radiograph of .*drop --data\.strict"
    ):
        prepared(copy, strict=True)


def test_copies_in_test_are_told_before_training(copy: Path) -> None:
    assert not any("of test" in line for line in prepared(copy)[1])
    theirs, ours = (sorted((copy / s / "NORMAL").iterdir())[1] for s in ("train", "test"))
    shutil.copy(theirs, ours)
    _, said = prepared(copy)
    assert any(line.startswith("warning: 1 files of test are copies") for line in said)
    shutil.make_archive(str(copy.parent / "zipped"), "zip", copy)
    _, said = prepared(copy.parent / "zipped.zip")
    assert any(line.startswith("warning: 1 files of test are copies") for line in said)


def test_thumbnails_are_kept_and_made_anew_where_they_are_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = np.array(prepared(copy)[0].decoded.thumbnails)
    (kept,) = (copy.parent / "cache").glob("images-*/thumbnails.npy")
    with monkeypatch.context() as patched:
        patched.setattr(duplicates, "thumbnails", lambda *_: pytest.fail("made again"))
        prepared(copy)
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        kept.write_bytes(damaged)
        again = prepared(copy)[0].decoded.thumbnails
        np.testing.assert_array_equal(first, again)
        assert kept.read_bytes() == whole


def test_comparisons_are_kept_until_a_file_changes(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = sorted((copy / "train" / "PNEUMONIA").iterdir())[:2]
    shutil.copy(one, other)
    tested = min((copy / "test" / "PNEUMONIA").iterdir())
    first, said = prepared(copy)
    assert len(first.duplicates) == 1
    with monkeypatch.context() as patched:
        for name in ("find", "copied"):
            patched.setattr(duplicates, name, lambda *_: pytest.fail("compared again"))
        again, told = prepared(copy)
        assert (again.duplicates, told) == (first.duplicates, said)
    (kept,) = (copy.parent / "cache").glob("images-*/duplicates.json")
    kept.write_text("{")
    assert prepared(copy)[0].duplicates == first.duplicates
    shutil.copy(tested, other)
    changed, told = prepared(copy)
    assert changed.duplicates == ()
    assert any("1 files of test are copies from train or val" in line for line in told)


def test_duplicates_csv(copy: Path, tmp_path: Path) -> None:
    one, other, mirrored = sorted((copy / "train" / "PNEUMONIA").iterdir())[:3]
    shutil.copy(one, other)
    ImageOps.mirror(Image.open(one)).save(mirrored, quality=95)
    data, _ = prepared(copy)
    duplicates.write_duplicates(tmp_path / "duplicates.csv", data.duplicates)
    with (tmp_path / "duplicates.csv").open(newline="") as file:
        row, turned = csv.DictReader(file)
    assert turned["image"].endswith(mirrored.name)
    assert turned["done"].endswith("; one is the mirror image of the other")
    assert row["image"].endswith(other.name)
    assert row["like"].endswith(one.name)
    assert (row["bits"], float(row["correlation"])) == ("0", 1.0)


def test_a_run_of_a_version_that_did_not_look_for_them_is_not_gone_on_with(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training images would validate now."""
    config = Config(
        workdir=tmp_path / "run",
        data=DataConfig(root=str(copy), size=32, cache=tmp_path / "cache"),
        train=TrainConfig(epochs=1, batch=16),
        device=DeviceConfig(count=1),
    )
    patient = {e.name: e.patient for e in read_index(copy).split("train", "val")}
    before = roles(prepared(copy)[0])
    held = sorted(name for name in before if before[name] and "PNEUMONIA" in name)
    trained = sorted(name for name in before if not before[name] and "PNEUMONIA" in name)
    shutil.copy(copy / trained[0], copy / held[-1])
    moved = [name for name in held if patient[name] == patient[held[-1]]]
    with monkeypatch.context() as earlier:
        earlier.setattr(duplicates, "find", lambda *_: [])
        fit(config)
    for kept in (tmp_path / "cache").glob("images-*/duplicates.json"):
        kept.unlink()
    split = (config.workdir / "split.csv").read_bytes()
    with pytest.raises(
        InputError,
        match=rf"another split of the images: {len(moved)} have another role now:"
        rf" {moved[0]}, train \(was validation\); resume it with the version",
    ):
        fit(config)
    assert (config.workdir / "split.csv").read_bytes() == split


def test_a_run_names_them_in_its_folder_its_report_and_on_screen(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = sorted((copy / "train" / "PNEUMONIA").iterdir())[:2]
    well = sorted((copy / "train" / "NORMAL").iterdir())[0]
    shutil.copy(one, other)
    shutil.copy(sorted((copy / "train" / "PNEUMONIA").iterdir())[9], well)
    config = Config(
        workdir=tmp_path / "run",
        data=DataConfig(root=str(copy), size=20, cache=tmp_path / "cache"),
        train=TrainConfig(epochs=1, batch=16),
        device=DeviceConfig(count=1),
    )
    fit(config)
    assert "2 images repeat another radiograph" in capsys.readouterr().out
    workdir = Workdir(config.workdir)
    assert {row["image"].split("/")[-1] for row in read_table(workdir.duplicates, ["done"])} >= {
        other.name
    }
    left = [row["image"].split("/")[-1] for row in read_table(workdir.quarantine, ["reason"])]
    assert well.name in left
    assert not {row["image"].split("/")[-1] for row in workdir.read_split()} & set(left)
    page = report.write(config.workdir, make_mesh(config.device)).read_text()
    assert "2 images show the same radiograph" in page
    assert f"{other.name} shows the same as train/PNEUMONIA/{one.name}" in page
