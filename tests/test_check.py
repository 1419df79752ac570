"""`cnnjax check` says what is in a data set, and what training would hold out of it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from test_dicom import file_of

from cnnjax.cli import main
from cnnjax.config import DataConfig
from cnnjax.data.decode import Layout, layout_of
from cnnjax.data.prepare import training_data

SIZE = ("--data.frame", "whole", "--data.size", "32")


def check(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["check", *map(str, arguments)])
    return int(str(ended.value.code))


@pytest.fixture
def faulty(tree: Path, tmp_path: Path) -> Path:
    """A tree with one fault of each kind."""
    root = tmp_path / "faulty"
    shutil.copytree(tree, root)
    normal, ill = (sorted((root / "train" / name).iterdir()) for name in ("NORMAL", "PNEUMONIA"))
    (root / "train/NORMAL/broken.jpeg").write_bytes(b"\xff\xd8\xff and no more")
    Image.new("RGB", (40, 20)).save(root / "train/NORMAL/black.png")
    shutil.copy(normal[0], root / "test/NORMAL/IM-7777-1.jpeg")  # an image on both sides
    shutil.copy(ill[0], root / "train/NORMAL/IM-8888-1.jpeg")  # and one of two classes
    later = sorted((root / "test/NORMAL").iterdir())[5]
    later.rename(later.with_name(normal[4].name))  # a patient on both sides
    return root


def test_it_says_what_is_there(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    assert check(faulty, *SIZE, "--json", out) == 0
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    assert found["classes"] == ["NORMAL", "PNEUMONIA"]
    assert found["splits"]["train"]["images"] == {"NORMAL": 51, "PNEUMONIA": 48}
    assert found["splits"]["test"]["images"] == {"NORMAL": 17, "PNEUMONIA": 16}
    assert found["formats"] == {"JPEG": 138, "PNG": 1}
    assert found["modes"] == {"L": 138, "RGB": 1}
    assert found["width"] == {"least": 32, "median": 32.0, "most": 40}
    broken = [{"file": "train/NORMAL/broken.jpeg", "reason": "broken header of a JPEG"}]
    assert found["unreadable"] == broken
    assert found["blank"] == ["train/NORMAL/black.png"]
    pairs = [{pair["image"]["image"], pair["like"]["image"]} for pair in found["duplicates"]]
    first, ill = (
        min(
            path.relative_to(faulty).as_posix() for path in (faulty / "train" / name).glob("*.jpeg")
        )
        for name in ("NORMAL", "PNEUMONIA")
    )
    both = {first, "test/NORMAL/IM-7777-1.jpeg"}
    assert sorted(pairs, key=sorted) == sorted(
        [both, {ill, "train/NORMAL/IM-8888-1.jpeg"}], key=sorted
    )
    (leak,) = found["leaks"]["images"]
    assert {leak["image"]["image"], leak["like"]["image"]} == both
    (patients,) = found["leaks"]["patients"]
    assert patients["splits"] == ["test", "train"]
    assert len(patients["patients"]) == 1
    assert found["refusal"] is None

    printed = capsys.readouterr().out
    for line in (
        "  train  51 NORMAL, 48 PNEUMONIA; ",
        "files     138 JPEG, 1 PNG",
        "  width   32 to 40 pixels, median 32",
        "damaged   files that cannot be decoded: 1\n    train/NORMAL/broken.jpeg: broken header",
        "blank     images with a single gray level: 1\n    train/NORMAL/black.png",
        "repeated  images that show the same radiograph as another image: 2\n",
        "  warning: pairs in two classes: 1\n",
        "leaks     radiographs in more than one given split: 1\n",
        f"  warning: patients in both test and train: 1\n    {patients['patients'][0]}\n",
        "held out  fold 0 of 5, patient-grouped and class-stratified, seed 0\n",
    ):
        assert line in printed


def test_what_it_says_is_held_out_is_what_training_holds_out(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    flags = (*SIZE, "--seed", 3, "--data.fold", 2, "--data.cache", cache)
    assert check(faulty, *flags, "--json", tmp_path / "check.json") == 0
    decoded = sorted(path.name for path in cache.iterdir())
    config = DataConfig(str(faulty), size=32, fold=2, cache=cache)
    data = training_data(config, 3, lambda _: None)
    assert sorted(path.name for path in cache.iterdir()) == decoded  # found, not made anew
    said = json.loads((tmp_path / "check.json").read_text("utf-8"))["training"]
    for name, rows in (("train", data.train), ("validation", data.validation)):
        counts = np.bincount(data.labels[rows])
        assert said[name]["images"] == dict(zip(data.classes, counts.tolist(), strict=True))
        patients = {data.decoded.examples[i].patient for i in rows}
        assert said[name]["patients"] == len(patients)


def test_official_splits_leak_between_train_and_val(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "leaking"
    shutil.copytree(tree, root)
    shutil.copy(min((root / "train/NORMAL").iterdir()), root / "val/NORMAL/IM-7777-1.jpeg")
    for validation, leaks in (("patients", 0), ("official", 1)):
        out = tmp_path / f"{validation}.json"
        assert check(root, *SIZE, "--data.validation", validation, "--json", out) == 0
        found = json.loads(out.read_text("utf-8"))
        assert (len(found["leaks"]["images"]), len(found["duplicates"])) == (leaks, 1)


def test_what_training_would_refuse_is_said_and_status_2(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tree, *SIZE, "--data.folds", 50) == 2
    printed = capsys.readouterr().out
    assert "leaks     radiographs in more than one given split: 0\n" in printed
    assert "  training would refuse this: 26 patients of class NORMAL are too few" in printed


def test_flat_folders_and_causes_have_their_sheet(tree: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(tree / "train", flat)
    classes = ("--data.classes", "normal,bacteria,virus")
    assert check(flat, *SIZE, *classes, "--sheet", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 8 * 160
        assert 3 * 160 < sheet.height < 4 * 160
    assert check(flat, *SIZE, *classes, "--sheet", tmp_path / "sheet.html") == 0
    page = (tmp_path / "sheet.html").read_text("utf-8")
    assert page.count("<img ") == 3 * 8
    for name in ("NORMAL", "BACTERIA", "VIRUS"):
        assert f"all: {name}" in page


def test_bad_flags_are_one_sentence_and_status_2(
    tree: Path,
    tmp_path: Path,
    make_tree: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, message in (
        ((), "error: check needs a data set"),
        ((tree, "--data.root", tmp_path), "are two data sets; give one"),
        ((tree, "--sheet", "a.pdf"), "--sheet a.pdf must end in .html or .png"),
        ((tree, "--json", tmp_path / "no/a.json"), "--json"),
        ((tmp_path / "none",), "does not exist; give a folder"),
        ((make_tree("a/1.png", "b/2.png", "c/3.png"),), "none of the 3 images can be decoded"),
    ):
        assert check(*arguments) == 2
        assert message in capsys.readouterr().err


def test_images_without_lungs_are_named(tmp_path: Path) -> None:
    root, rng = tmp_path / "images", np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            noise = rng.integers(0, 255, (24, 24), dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}.png")
    out = tmp_path / "check.json"
    assert check(root, "--data.positive", "b", "--data.folds", 2, "--json", out) == 0
    named = json.loads(out.read_text("utf-8"))["no_lungs_found"]
    assert named == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


def test_layouts() -> None:
    encoded = file_of(PatientID="1")
    assert layout_of(encoded)[0] == "DICOM"
    assert layout_of(np.zeros((20, 30), np.uint8)) == Layout("array", "L", 30, 20)
    file, lying = io.BytesIO(), Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    Image.new("L", (300, 200)).save(file, "JPEG", exif=lying)
    assert layout_of(file.getvalue()) == Layout("JPEG", "L", 200, 300)  # as it is shown
    assert layout_of(file.getvalue()).within(160) == (107, 160)
    with pytest.raises(ValueError, match="cannot identify"):
        layout_of(b"no image")
