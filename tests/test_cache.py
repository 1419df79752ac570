"""Images are decoded once; what is found again is what was decoded, whatever happened meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnjax.data import cache, decoding
from cnnjax.data.decode import MissingDecoder, decode
from cnnjax.data.index import Index, read_index
from cnnjax.errors import InputError


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree / "test", tmp_path / "copy" / "test").parent)


def load(root: Path, folder: Path, size: int = 16, strict: bool = False) -> cache.Decoded:
    index = read_index(root)
    return cache.load(index.split("test"), index.source, size, folder=folder, strict=strict)


def test_images_are_those_of_their_examples(copy: Path, tmp_path: Path) -> None:
    decoded = load(copy, tmp_path)
    assert decoded.images.shape == (32, 16, 16)
    assert decoded.labels.sum() == 16
    for image, example in zip(decoded.images, decoded.examples, strict=True):
        np.testing.assert_array_equal(image, decode((copy / example.name).read_bytes(), 16))


def test_second_start_decodes_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(copy, tmp_path)
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded again"))
    second = load(copy, tmp_path)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint


def test_changed_file_or_size_is_decoded_anew(copy: Path, tmp_path: Path) -> None:
    first = load(copy, tmp_path)
    a, b = (copy / e.name for e in first.examples[:2])
    shutil.copy(b, a)
    os.utime(a, ns=(1, 1))
    second = load(copy, tmp_path)
    np.testing.assert_array_equal(second.images[0], first.images[1])
    assert first.fingerprint != second.fingerprint
    assert load(copy, tmp_path, size=8).images.shape == (32, 8, 8)


def test_fingerprint_is_that_of_the_content_not_the_place(copy: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(copy, tmp_path / "elsewhere"))
    os.utime(elsewhere / load(copy, tmp_path).examples[0].name, ns=(1, 1))
    assert load(copy, tmp_path).fingerprint == load(elsewhere, tmp_path).fingerprint


def test_broken_files_go_to_quarantine(copy: Path, tmp_path: Path) -> None:
    whole = load(copy, tmp_path)
    bad = whole.examples[3].name
    (copy / bad).write_bytes(b"no image")
    for _ in range(2):  # decoded, then found
        decoded = load(copy, tmp_path)
        assert decoded.quarantine == ((bad, "neither JPEG nor PNG nor DICOM"),)
        assert [e.name for e in decoded.examples] == [
            e.name for e in whole.examples if e.name != bad
        ]
        np.testing.assert_array_equal(decoded.images, np.delete(whole.images, 3, axis=0))
    with pytest.raises(
        InputError, match=rf"{bad} cannot be decoded \(neither JPEG nor PNG nor DICOM\)"
    ):
        load(copy, tmp_path, strict=True)
    cache.write_quarantine(tmp_path / "quarantine.csv", decoded.quarantine)
    text = (tmp_path / "quarantine.csv").read_text()
    assert text == f"image,reason\n{bad},neither JPEG nor PNG nor DICOM\n"


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), MissingDecoder("install it")]
)
def test_what_may_be_readable_the_next_time_is_tried_again(
    copy: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on_one(encoded: bytes, size: int) -> np.ndarray:
        if encoded == bad.read_bytes():
            raise error
        return decode(encoded, size)

    bad = copy / read_index(copy).split("test")[3].name
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "decode", fail_on_one)
        first = load(copy, tmp_path)
    assert [copy / name for name, _ in first.quarantine] == [bad]
    second = load(copy, tmp_path)
    assert second.quarantine == ()
    np.testing.assert_array_equal(np.delete(second.images, 3, axis=0), first.images)
    np.testing.assert_array_equal(second.images[3], decode(bad.read_bytes(), 16))
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded again"))
    assert load(copy, tmp_path).fingerprint == second.fingerprint


def test_a_full_disk_is_one_sentence(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"No space left on device\); free some space there"):
        load(copy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_link_to_nowhere_goes_to_quarantine(copy: Path, tmp_path: Path) -> None:
    bad = load(copy, tmp_path).examples[3].name
    (copy / bad).unlink()
    (copy / bad).symlink_to(tmp_path / "gone.jpeg")
    ((name, reason),) = load(copy, tmp_path).quarantine
    assert (name, reason) == (bad, "cannot be read: No such file or directory")


def test_others_may_read_the_cache(copy: Path, tmp_path: Path) -> None:
    load(copy, tmp_path)
    (home,) = tmp_path.glob("images-*")
    (tmp_path / "plain").mkdir()
    assert home.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_decodes(copy: Path, tmp_path: Path) -> None:
    for path in copy.rglob("*.jpeg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 32 images can be decoded: .*: empty file"):
        load(copy, tmp_path)


def test_interrupted_decoding_leaves_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(copy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(copy, tmp_path / "cache").images) == 32


def test_what_killed_processes_left_goes_after_a_day(copy: Path, tmp_path: Path) -> None:
    made = load(copy, tmp_path / "cache")
    (home,) = (tmp_path / "cache").iterdir()
    old, new = (home.with_name(f".{home.name}.{name}") for name in ("killed00", "atwork00"))
    for folder in (old, new):
        (folder / "images").mkdir(parents=True)
    for path in (old / "images", old):
        os.utime(path, (0, 0))
    shutil.rmtree(home)
    assert len(load(copy, tmp_path / "cache").images) == len(made.images)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {home.name, new.name}


def test_unwritable_cache_is_named(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file cannot be written .* --data.cache"):
        load(copy, tmp_path / "file")


def test_index_of_the_fixture(tree: Path) -> None:
    index: Index = read_index(tree)
    assert (len(index.split("train")), len(index.split("val"))) == (96, 8)


def spoiled_cut(home: Path) -> None:
    path = home / "images.npy"
    path.write_bytes(path.read_bytes()[:5000])


def spoiled_bit(home: Path) -> None:
    path = home / "images.npy"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda home: (home / "done.json").write_text(""), id="empty"),
        pytest.param(lambda home: (home / "done.json").write_text("[]"), id="no object"),
        pytest.param(lambda home: (home / "images.npy").unlink(), id="gone"),
        pytest.param(spoiled_cut, id="cut"),
        pytest.param(spoiled_bit, id="bit"),
    ],
)
def test_a_damaged_cache_is_made_anew(
    copy: Path, tmp_path: Path, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = load(copy, tmp_path / "cache")
    (home,) = (tmp_path / "cache").glob("images-*")
    pixels = np.array(before.images)
    del before
    spoil(home)
    again = load(copy, tmp_path / "cache")
    np.testing.assert_array_equal(again.images, pixels)
    assert "is damaged and is created again" in capsys.readouterr().err
    load(copy, tmp_path / "cache")
    assert "damaged" not in capsys.readouterr().err


def test_trees_of_equal_names_sizes_and_times_share_nothing(tmp_path: Path) -> None:
    """Nor does a file whose content is replaced in place, under its old time."""
    for level, tree in ((40, "a"), (200, "b")):
        for kind in ("NORMAL", "PNEUMONIA"):
            path = tmp_path / tree / "test" / kind / "film.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (24, 24), level).save(path)
            os.utime(path, ns=(10**18, 10**18))

    def levels(tree: str) -> set[int]:
        decoded = load(tmp_path / tree, tmp_path / "cache")
        return set(np.unique(decoded.images).tolist())

    assert (levels("a"), levels("b")) == ({40}, {200})
    for kind in ("NORMAL", "PNEUMONIA"):
        path = tmp_path / "a" / "test" / kind / "film.png"
        path.write_bytes((tmp_path / "b" / "test" / kind / "film.png").read_bytes())
        os.utime(path, ns=(10**18, 10**18))
    assert levels("a") == {200}
