"""Every form of data root gives the same kind of index; each broken one a sentence."""

from __future__ import annotations

import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_dicom import file_of

from cnnjax.data.index import Index, read_index
from cnnjax.data.kermany import patient_of, viral_of
from cnnjax.data.names import walk
from cnnjax.errors import InputError

KAGGLE = (
    "train/NORMAL/IM-0115-0001.jpeg",
    "train/NORMAL/NORMAL2-IM-0395-0001-0002.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg",
    "val/NORMAL/NORMAL2-IM-1427-0001.jpeg",
    "val/PNEUMONIA/person1946_bacteria_4874.jpeg",
    "test/NORMAL/IM-0001-0001.jpeg",
    "test/PNEUMONIA/person1_virus_6.jpeg",
)


def rows(index: Index) -> list[tuple[str, str, int, str]]:
    return [(e.name, e.split, e.label, e.patient) for e in index.examples]


def test_kaggle_tree(make_tree: Callable[..., Path]) -> None:
    index = read_index(make_tree(*KAGGLE))
    assert index.classes == ("NORMAL", "PNEUMONIA")
    assert rows(index) == [
        ("train/NORMAL/IM-0115-0001.jpeg", "train", 0, "IM-0115"),
        ("train/NORMAL/NORMAL2-IM-0395-0001-0002.jpeg", "train", 0, "NORMAL2-IM-0395"),
        ("train/PNEUMONIA/person1_bacteria_1.jpeg", "train", 1, "person1_bacteria"),
        ("val/NORMAL/NORMAL2-IM-1427-0001.jpeg", "val", 0, "NORMAL2-IM-1427"),
        ("val/PNEUMONIA/person1946_bacteria_4874.jpeg", "val", 1, "person1946_bacteria"),
        ("test/NORMAL/IM-0001-0001.jpeg", "test", 0, "IM-0001"),
        ("test/PNEUMONIA/person1_virus_6.jpeg", "test", 1, "person1_virus"),
    ]


@pytest.mark.parametrize("prefix", ["chest_xray", "chest_xray/chest_xray"])
def test_nested_mixed_case_and_litter(make_tree: Callable[..., Path], prefix: str) -> None:
    index = read_index(
        make_tree(
            f"{prefix}/Train/Normal/a.JPG",
            f"{prefix}/Train/pneumonia/b.PnG",
            f"{prefix}/Train/pneumonia/.DS_Store",
            f"{prefix}/Train/pneumonia/.hidden.jpeg",
            f"{prefix}/Train/pneumonia/notes.txt",
            f"{prefix}/loose.jpeg",
            f"__MACOSX/{prefix}/Train/Normal/a.JPG",
        )
    )
    assert [(e.split, e.label, e.patient) for e in index.examples] == [
        ("train", 0, f"{prefix}/Train/Normal/a.JPG"),
        ("train", 1, f"{prefix}/Train/pneumonia/b.PnG"),
    ]
    assert dict(index.left_out) == {
        f"{prefix}/Train/pneumonia/notes.txt": "not .jpeg, .jpg, .png, .dcm",
        f"{prefix}/loose.jpeg": "not in a class folder of train, val or test",
    }
    assert "2 file names give no patient ID" in index.describe()
    assert "left out: 1 not in a class folder" in index.describe()


def test_a_split_folder_is_told_from_its_root(make_tree: Callable[..., Path]) -> None:
    root = make_tree("train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg")
    with pytest.raises(InputError, match=f"did you mean {root}"):
        read_index(root / "train")


def test_equal_names_in_several_folders_are_several_patients(
    make_tree: Callable[..., Path],
) -> None:
    folders = ("train/NORMAL", "train/PNEUMONIA", "test/NORMAL", "test/PNEUMONIA")
    index = read_index(make_tree(*(f"{folder}/1.png" for folder in folders)))
    assert len({e.patient for e in index.examples}) == 4
    assert "4 file names give no patient ID" in index.describe()


def test_folders_may_be_links_even_in_a_circle(make_tree: Callable[..., Path]) -> None:
    linked = make_tree(
        "store/1/NORMAL/a.jpeg", "store/1/PNEUMONIA/b.jpeg", "store/2/c.jpeg", "store/2/d.jpeg"
    )
    (linked / "train").symlink_to(linked / "store" / "1")
    for name, file in (("NORMAL", "c.jpeg"), ("PNEUMONIA", "d.jpeg")):
        (linked / "test" / name).mkdir(parents=True)
        (linked / "test" / name / file).symlink_to(linked / "store" / "2" / file)
    (linked / "train" / "NORMAL" / "again").symlink_to(linked)
    assert [e.name for e in read_index(linked).examples] == [
        "train/NORMAL/a.jpeg",
        "train/PNEUMONIA/b.jpeg",
        "test/NORMAL/c.jpeg",
        "test/PNEUMONIA/d.jpeg",
    ]


def test_links_out_of_the_root_are_left_out_by_name(
    make_tree: Callable[..., Path], tmp_path: Path
) -> None:
    outside = make_tree("a.jpeg", "more/b.jpeg", root="outside")
    root = make_tree("train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg")
    (root / "train/NORMAL/film.jpeg").symlink_to(outside / "a.jpeg")
    (root / "train/PNEUMONIA/more").symlink_to(outside / "more")
    index = read_index(root)
    assert len(index.examples) == 2
    reason = "a link that leads out of the root; copy its target into the root"
    assert index.left_out == (
        ("train/NORMAL/film.jpeg", reason),
        ("train/PNEUMONIA/more", reason),
    )
    assert f"left out: 2 {reason}\n    train/NORMAL/film.jpeg" in index.describe()
    linked = make_tree("readme.txt", root="linked")
    (linked / "train").symlink_to(root / "train")
    with pytest.raises(
        InputError, match="linked: train is a link that leads out of the root; copy"
    ):
        read_index(linked)
    assert len(read_index(_link(tmp_path / "root", root)).examples) == 2  # the root may be one


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def test_a_film_that_several_links_lead_to_is_listed_once(make_tree: Callable[..., Path]) -> None:
    root = make_tree("train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg", "test/NORMAL/c.jpeg")
    (root / "train/NORMAL/again.jpeg").symlink_to(root / "train/NORMAL/a.jpeg")
    (root / "test/PNEUMONIA").symlink_to(root / "train/PNEUMONIA")
    (root / "val").symlink_to(root / "train")
    index = read_index(root)
    assert [e.name for e in index.examples] == [
        "train/NORMAL/a.jpeg",
        "train/PNEUMONIA/b.jpeg",
        "test/NORMAL/c.jpeg",
    ]
    assert ("train/NORMAL/again.jpeg", "a link to an image that is listed") in index.left_out


def test_links_from_folder_to_folder_end(make_tree: Callable[..., Path]) -> None:
    names = [f"{i}/a.jpeg" for i in range(7)]
    root = make_tree(*names)
    for i in range(7):
        for j in range(7):
            (root / f"{i}" / f"{j}").symlink_to(root / f"{j}")
    walked = walk(root, confined=True)
    assert list(walked.once(walked.files)[0]) == names
    assert len(walked.folders) <= 2 * 7  # not one for each way through them


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Neumon\u00eda") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("form", ["tree", "zip"])
@pytest.mark.parametrize("positive", [COMPOSED, DECOMPOSED, COMPOSED.upper()])
def test_classes_are_the_same_however_an_accent_is_spelled(
    make_tree: Callable[..., Path], tmp_path: Path, positive: str, form: str
) -> None:
    names = (
        "train/NORMAL/a.png",
        f"train/{DECOMPOSED}/b.png",
        "test/NORMAL/c.png",
        f"test/{COMPOSED}/d.png",
    )
    root = make_tree(*names)
    if form == "zip":
        root = tmp_path / "a.zip"
        with zipfile.ZipFile(root, "w") as out:
            for name in names:
                out.writestr(name, b"film")
    index = read_index(root, positive)
    assert index.classes == ("NORMAL", COMPOSED.upper())
    assert [e.label for e in index.examples] == [0, 1, 0, 1]
    for example in index.examples:
        index.source.read(example.name)


@pytest.mark.parametrize(
    "spelled", ["{}", "./{}", "{backslashes}", ".\\{backslashes}", "/{}", "a//./{}"]
)
def test_zips_of_every_spelling(tmp_path: Path, spelled: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        for name in ("train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg"):
            entry = zipfile.ZipInfo()
            entry.filename = spelled.format(name, backslashes=name.replace("/", "\\"))
            out.writestr(entry, name)
        out.writestr("train/NORMAL/../../../out.jpeg", b"")
    index = read_index(tmp_path / "a.zip")
    prefix = "a/" if spelled.startswith("a") else ""
    names = [f"{prefix}train/NORMAL/a.jpeg", f"{prefix}train/PNEUMONIA/b.jpeg"]
    assert [e.name for e in index.examples] == names
    assert index.source.read(names[1]) == b"train/PNEUMONIA/b.jpeg"
    assert index.left_out == (
        ("train/NORMAL/../../../out.jpeg", "a name that leads out of the zip"),
    )


@pytest.mark.parametrize("form", ["tree", "zip"])
def test_dicom_files_need_no_suffix(
    make_tree: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    root = make_tree("train/NORMAL/notes", "train/NORMAL/1.2.3", "train/NORMAL/readme.txt")
    names = ("train/NORMAL/IM000001", "train/NORMAL/1.2.840.113", "train/PNEUMONIA/a.dicom")
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file_of(PatientID=f"{number}"))
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
            for path in sorted(root.rglob("*")):
                out.write(path, path.relative_to(root))
        root = tmp_path / "a.zip"
    index = read_index(root)
    assert sorted(e.name for e in index.examples) == sorted(names)
    assert len({e.patient for e in index.examples}) == 3
    assert all(len(e.patient) == 16 for e in index.examples)
    assert [name for name, _ in index.left_out] == [
        "train/NORMAL/1.2.3",
        "train/NORMAL/notes",
        "train/NORMAL/readme.txt",
    ]


def test_kaggle_archive_holds_itself_twice(make_tree: Callable[..., Path]) -> None:
    names = ("train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg")
    index = read_index(
        make_tree(*(f"x/{n}" for n in names), *(f"x/x/{n}" for n in names), root="twice")
    )
    assert [e.name for e in index.examples] == [f"x/{n}" for n in names]
    assert {reason for _, reason in index.left_out} == {"in a second copy of the tree"}


def test_mendeley_tree_and_positive_class(make_tree: Callable[..., Path]) -> None:
    root = make_tree(
        "train/NORMAL/NORMAL-3464500-0001.jpeg",
        "train/PNEUMONIA/BACTERIA-1008087-0001.jpeg",
        "train/PNEUMONIA/VIRUS-1008087-0002.jpeg",
        "test/NORMAL/NORMAL-1049278-0001.jpeg",
        "test/PNEUMONIA/VIRUS-1002131-0001.jpeg",
    )
    index = read_index(root, positive="normal")
    assert index.classes == ("PNEUMONIA", "NORMAL")
    assert [(e.label, e.patient) for e in index.split("train")] == [
        (1, "3464500"),
        (0, "1008087"),
        (0, "1008087"),
    ]


def test_zip_reads_like_the_tree(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("__MACOSX/train/NORMAL/x.jpeg", b"")
        for path in sorted(tree.rglob("*")):
            out.write(path, path.relative_to(tree))
    plain, zipped = read_index(tree), read_index(archive)
    assert rows(plain) == rows(zipped)
    for example in plain.examples[::20]:
        assert plain.source.read(example.name) == zipped.source.read(example.name)


def test_medmnist(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 6), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 2
    np.savez(tmp_path / "deep.npz", **{k: v[..., None] for k, v in arrays.items()})
    deep = read_index(tmp_path / "deep.npz").source
    np.testing.assert_array_equal(deep.read("test/00003"), arrays["test_images"][3])
    np.savez_compressed(tmp_path / "pneumoniamnist.npz", **arrays)
    index = read_index(tmp_path / "pneumoniamnist.npz")
    assert [e.label for e in index.examples] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert len({e.patient for e in index.split("train")}) == 6
    np.testing.assert_array_equal(index.source.read("test/00003"), arrays["test_images"][3])
    with pytest.raises(InputError, match="no val split, only test, train"):
        index.split("val")


def test_a_tree_with_only_test_serves_where_test_is_wanted(make_tree: Callable[..., Path]) -> None:
    index = read_index(make_tree("test/NORMAL/a.jpeg", "test/PNEUMONIA/b.jpeg"))
    assert len(index.split("test")) == 2
    with pytest.raises(InputError, match="no train or val split, only test"):
        index.split("train", "val")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "does not exist"),
        (("readme.txt",), "holds no images in class folders"),
        (("train/readme.txt", "train/NORMAL/readme.txt"), "but no .jpeg"),
        (("train/NORMAL/a.jpeg",), "at least two classes, found NORMAL"),
        (
            ("train/A/a.png", "train/B/b.png"),
            "classes A, B, not PNEUMONIA; for training, name one of them",
        ),
        (("a/b/c/train/NORMAL/a.png",), "too deep, in a/b/c; give that folder as the root"),
    ],
)
def test_bad_roots(make_tree: Callable[..., Path], names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_index(make_tree(*names))


def test_empty_class_folder_is_named(make_tree: Callable[..., Path]) -> None:
    root = make_tree("train/NORMAL/a.jpeg", "test/NORMAL/a.jpeg", "test/PNEUMONIA/b.jpeg")
    (root / "train/PNEUMONIA").mkdir()
    index = read_index(root)
    with pytest.raises(InputError, match="class folder train/PNEUMONIA holds no image"):
        index.split("train")
    assert len(index.split("test")) == 2


def test_one_class_in_the_split_wanted(make_tree: Callable[..., Path]) -> None:
    index = read_index(make_tree("train/NORMAL/a.jpeg", "test/PNEUMONIA/b.jpeg"))
    with pytest.raises(InputError, match="train holds only one class, NORMAL"):
        index.split("train")


@pytest.mark.parametrize(("name", "form"), [("a.zip", "a zip"), ("a.npz", "an .npz")])
def test_broken_archives(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 but nothing more")
    with pytest.raises(InputError, match=f"cannot be read as {form}"):
        read_index(tmp_path / name)


@pytest.mark.parametrize("name", ["a.zip", "a.npz"])
def test_archives_of_a_later_version_of_zip(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("train_images.npy", b"")
    content = bytearray((tmp_path / name).read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 255
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError, match=rf"{name} cannot be read as an? \.?[a-z]+ \(zip file version"
    ):
        read_index(tmp_path / name)


def test_npz_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="holds no train_images"):
        read_index(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", train_images=np.zeros((3, 4, 4)), train_labels=np.zeros(3))
    with pytest.raises(InputError, match="not uint8"):
        read_index(tmp_path / "b.npz")


def test_damaged_zip_member_is_an_error_of_that_file(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("train/NORMAL/a.jpeg", b"x" * 1000)
        out.writestr("train/PNEUMONIA/b.jpeg", b"y" * 1000)
    raw = archive.read_bytes()
    archive.write_bytes(raw.replace(b"x" * 1000, b"z" * 1000))
    source = read_index(archive).source
    with pytest.raises(OSError, match="broken in the zip"):
        source.read("train/NORMAL/a.jpeg")
    assert source.read("train/PNEUMONIA/b.jpeg") == b"y" * 1000


@pytest.mark.parametrize(
    ("name", "patient", "viral"),
    [
        ("train/PNEUMONIA/person12_bacteria_46.jpeg", "person12_bacteria", 0),
        ("person1637_virus_2834_2.jpeg", "person1637_virus", 1),
        ("IM-0115-0001.jpeg", "IM-0115", -1),
        ("IM-0451-0001-0001.jpeg", "IM-0451", -1),
        ("NORMAL2-IM-0395-0001-0002.jpeg", "NORMAL2-IM-0395", -1),
        ("normal-3464500-0001.jpeg", "3464500", -1),
        ("BACTERIA-1008087-0001.jpeg", "1008087", 0),
        ("train/PNEUMONIA/VIRUS-1008087-0001.jpeg", "1008087", 1),
        ("PERSON12_Bacteria_46.JPEG", "person12_bacteria", 0),
        ("normal2-im-0395-0001.jpg", "NORMAL2-IM-0395", -1),
        ("virus/scan.jpeg", "virus/scan.jpeg", -1),
        ("00012", "00012", -1),
    ],
)
def test_what_a_name_tells(name: str, patient: str, viral: int) -> None:
    assert patient_of(name) == patient
    assert viral_of(name) == viral
