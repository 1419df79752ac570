"""Data of one's own: flat class folders, tables of images, any classes, patients by a pattern."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_dicom import file_of

from cnnjax.cli import main
from cnnjax.config import Config, DataConfig, TrainConfig, expect_effect
from cnnjax.data.index import Index, read_index
from cnnjax.data.prepare import open_index, training_data
from cnnjax.errors import InputError
from cnnjax.run.workdir import Workdir, read_table
from cnnjax.train import fit

ROWS = (
    ("a/1.png", "normal", "p1"),
    ("a/2.png", "Covid", "p2"),
    ("b/3.png", "TB", "p3"),
    ("b/4.png", "covid", "p1"),
)


def table(path: Path, *rows: str, header: str = "path,label,patient") -> Path:
    path.write_text("\n".join((header, *rows)) + "\n", "utf-8")
    return path


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(str(ended.value.code or 0))


@pytest.fixture
def films(make_tree: Callable[..., Path]) -> Path:
    """A folder of images that no class folders sort, with its table."""
    root = make_tree(*(name for name, _, _ in ROWS), "a/other.png")
    return table(root / "films.csv", *map(",".join, ROWS))


def rows(index: Index) -> list[tuple[str, str, str, str]]:
    return [(e.name, e.split, index.classes[e.label], e.patient) for e in index.examples]


def test_flat_class_folders_are_any_number_of_classes(make_tree: Callable[..., Path]) -> None:
    root = make_tree(
        "films/tb/IM-0001-0001.png",
        "films/Normal/1.png",
        "films/COVID/2.png",
        "films/COVID/notes.txt",
        "films/readme.png",
    )
    index = read_index(root)
    assert index.classes == ("COVID", "NORMAL", "TB")
    assert rows(index) == [
        ("films/COVID/2.png", "all", "COVID", "films/COVID/2.png"),
        ("films/Normal/1.png", "all", "NORMAL", "films/Normal/1.png"),
        ("films/tb/IM-0001-0001.png", "all", "TB", "IM-0001"),
    ]
    assert dict(index.left_out) == {
        "films/COVID/notes.txt": "not .jpeg, .jpg, .png, .dcm",
        "films/readme.png": "not in a class folder",
    }
    assert len(index.split("train", "val")) == len(index.split("all")) == 3
    assert "  all    1 COVID, 1 NORMAL, 1 TB; 3 patients" in index.describe()
    with pytest.raises(InputError, match=r"not divided into splits; .* evaluate with --split all"):
        index.split("test")


def test_two_flat_classes_have_a_positive_one(make_tree: Callable[..., Path]) -> None:
    root = make_tree("a/1.png", "b/2.png")
    with pytest.raises(InputError, match=r"the classes A, B, not PNEUMONIA; .* --data\.positive"):
        read_index(root)
    assert read_index(root, "a").classes == ("B", "A")


def test_classes_that_are_numbers_are_sorted_by_value(make_tree: Callable[..., Path]) -> None:
    index = read_index(make_tree("10/1.png", "9/2.png", "0/3.png"))
    assert index.classes == ("0", "9", "10")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("COVID/images/1.png", "NORMAL/images/2.png"), "COVID/images and in NORMAL/images, which"),
        (("train/1.png", "test/2.png"), "holds no images in class folders"),
        (("1.png", "2.png"), "holds no images in class folders"),
        (("films/1.png",), "at least two classes, found FILMS"),
    ],
)
def test_folders_that_are_no_classes(
    make_tree: Callable[..., Path], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_index(make_tree(*names))


KERMANY = (
    "train/NORMAL/IM-0115-0001.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg",
    "train/PNEUMONIA/VIRUS-1008087-0001.jpeg",
    "test/PNEUMONIA/person2_virus_2.jpeg",
    "test/NORMAL/person9_virus_1.jpeg",
    "test/PNEUMONIA/scan.jpeg",
)


def test_published_names_tell_the_cause(make_tree: Callable[..., Path]) -> None:
    root = make_tree(*KERMANY)
    index = read_index(root, classes=("normal", "bacteria", "virus"))
    assert index.classes == ("NORMAL", "BACTERIA", "VIRUS")
    assert [(e.name, e.label) for e in index.examples] == [
        ("train/NORMAL/IM-0115-0001.jpeg", 0),
        ("train/PNEUMONIA/VIRUS-1008087-0001.jpeg", 2),
        ("train/PNEUMONIA/person1_bacteria_1.jpeg", 1),
        ("test/NORMAL/person9_virus_1.jpeg", 0),  # the folder's word goes before the name's
        ("test/PNEUMONIA/person2_virus_2.jpeg", 2),
    ]
    reason = "of class PNEUMONIA, which is none of NORMAL, BACTERIA, VIRUS"
    assert index.left_out == (("test/PNEUMONIA/scan.jpeg", reason),)
    assert f"left out: 1 {reason}" in index.describe()
    assert read_index(root, classes=("virus", "bacteria")).classes == ("VIRUS", "BACTERIA")
    with pytest.raises(InputError, match="two classes of TB, VIRUS; it holds VIRUS"):
        read_index(root, classes=("tb", "virus"))
    config = DataConfig(str(root), classes="normal,bacteria,virus,tb", folds=2)
    with pytest.raises(InputError, match="no image of class TB to train on, but of NORMAL, BACT"):
        training_data(config, 0, lambda _: None)


def test_the_classes_of_before_are_as_before(make_tree: Callable[..., Path]) -> None:
    root = make_tree(*KERMANY)
    given = read_index(root, classes=("normal", "pneumonia"))
    assert (given.classes, given.examples) == (read_index(root).classes, read_index(root).examples)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classes": "normal"}, r"--data\.classes must name two or more"),
        ({"classes": "a,b,A"}, r"--data\.classes must name two or more"),
        ({"classes": "pneumonia,normal"}, r"--data\.positive PNEUMONIA must be the last of"),
        ({"classes": "a,b", "positive": "c"}, r"--data\.positive c must be the last of"),
    ],
)
def test_classes_that_cannot_be(config: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [r"p\d+", r"(p\d+)_\d", r"(?:x|y)/(p\d+)"])
def test_a_pattern_finds_the_patients(make_tree: Callable[..., Path], pattern: str) -> None:
    root = make_tree("x/p1_1.png", "x/p1_2.png", "y/p2_1.png", "y/other.png")
    index = read_index(root, "y", patient_pattern=pattern)
    assert {e.name: e.patient for e in index.examples} == {
        "x/p1_1.png": "p1",
        "x/p1_2.png": "p1",
        "y/p2_1.png": "p2",
        "y/other.png": "y/other.png",
    }
    assert "1 file names give no patient ID" in index.describe()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(p", "is not a regular expression"),
        ("(a)(b)", "has 2 groups"),
        ("q[0-9]", "finds no patient in any of 2 names, such as x/1.png"),
    ],
)
def test_patterns_of_no_use(make_tree: Callable[..., Path], pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"--data\.patient-pattern .* {message}"):
        read_index(make_tree("x/1.png", "y/2.png"), "y", patient_pattern=pattern)


def test_a_table_says_what_its_images_are(films: Path) -> None:
    index = open_index(DataConfig(table=films), print)
    assert index.classes == ("COVID", "NORMAL", "TB")
    assert rows(index) == [
        ("a/1.png", "all", "NORMAL", "p1"),
        ("a/2.png", "all", "COVID", "p2"),
        ("b/3.png", "all", "TB", "p3"),
        ("b/4.png", "all", "COVID", "p1"),
    ]
    assert rows(open_index(DataConfig(str(films)), print)) == rows(index)
    moved = films.rename(films.parent.parent / "moved.csv")
    assert rows(open_index(DataConfig(str(films.parent), table=moved), print)) == rows(index)


def test_a_table_of_a_zip(films: Path) -> None:
    with zipfile.ZipFile(films.with_suffix(".zip"), "w") as out:
        for name, _, _ in ROWS:
            out.writestr(name, b"film")
    zipped = open_index(DataConfig(str(films.with_suffix(".zip")), table=films), print)
    assert rows(zipped) == rows(open_index(DataConfig(table=films), print))
    assert zipped.source.read("a/1.png") == b"film"


def test_a_table_of_dicom_files_without_suffix(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"IM{number}").write_bytes(file_of(PatientID=f"{number % 2}"))
    path = table(tmp_path / "t.csv", "IM0,0", "IM1,1", "IM2,1", header="path,label")
    index = read_index(tmp_path, "1", table=path)
    assert [len(e.patient) for e in index.examples] == [16] * 3
    assert index.examples[0].patient == index.examples[2].patient != index.examples[1].patient


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them(films: Path, separator: str) -> None:
    lines = [separator.join(row) for row in (("Finding", "note", "FILE"), *rows_of())]
    text = "\ufeff" + "\r\n".join(lines) + "\r\n\r\n"
    films.write_bytes(text.encode())
    index = read_index(films.parent, table=films, columns="path=file, label=finding")
    assert [e.name for e in index.examples] == [name for name, _, _ in ROWS]
    assert index.classes == ("COVID", "NORMAL", "TB")


def rows_of() -> list[tuple[str, str, str]]:
    """The rows in another order of columns, with paths as Windows and `find .` write them."""
    names = ("a\\1.png", "./a/2.png", "b/3.png", ".\\b\\4.png")
    return [(label, '"x, y"', name) for name, (_, label, _) in zip(names, ROWS, strict=True)]


def test_absolute_paths_below_the_root(films: Path) -> None:
    root = films.parent
    table(films, *(f"{root / name},{label},{patient}" for name, label, patient in ROWS))
    assert [e.name for e in read_index(root, table=films).examples] == [n for n, _, _ in ROWS]
    with pytest.raises(InputError, match=r"row 2: .*1\.png is not below .*b; give its folder"):
        read_index(root / "b", table=films)


def test_splits_and_weights_of_a_table(films: Path) -> None:
    splits, weights = ("train", "Validation", "test", "val"), ("1", "0.5", "2", "0")
    lines = [
        f"{name},{label},{s},{w}"
        for (name, label, _), s, w in zip(ROWS, splits, weights, strict=True)
    ]
    table(films, *lines, header="path,label,split,weight")
    index = read_index(films.parent, table=films)
    assert [(e.name, e.split, e.weight) for e in index.examples] == [
        ("a/1.png", "train", 1.0),
        ("a/2.png", "val", 0.5),
        ("b/4.png", "val", 0.0),
        ("b/3.png", "test", 2.0),
    ]
    assert "losses are weighted by 0 to 2" in index.describe()
    plain = read_index(films.parent, table=films, columns="weight=,split=")
    assert {(e.split, e.weight) for e in plain.examples} == {("all", 1.0)}


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("path,label", "a/9.png,TB", r"row 6: a/9\.png is not a file in .*tree"),
        ("path,label", "../a.png,TB", r"row 6: \.\./a\.png is not below .*tree"),
        ("path,label", "a/1.png,TB", r"row 6: a/1\.png is the image of row 2; keep one row"),
        ("path,label", "a/other.png,", r"row 6: the column label is empty; fill it in"),
        ("path,label", "a/other.png", r"row 6: the column label is empty; fill it in"),
        ("path,label", "a/other.png,TB|Covid", r"row 6: TB\|Covid are several findings"),
        ("path,label", "a/other.png,TB,more", r"row 6: 3 cells for 2 columns; quote"),
        ("path,label,patient", "a/other.png,TB,", r"row 2: the column patient is empty"),
        ("path,label", '"a/other.png,TB', r"line 6: unexpected end of data; save it"),
        ("file,label", "", r"has no column path, but file, label; .*--data\.columns path="),
        ("path,label,LABEL", "", r"has 2 columns named label; rename one"),
    ],
)
def test_what_is_wrong_with_a_row_is_named(
    films: Path, header: str, line: str, message: str
) -> None:
    table(films, *(f"{name},{label}" for name, label, _ in ROWS), line, header=header)
    with pytest.raises(InputError, match=rf"films\.csv,? {message}"):
        read_index(films.parent, table=films)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("split", "later", "the split later is not train, val or test"),
        ("weight", "-1", "the weight -1 is not a number of at least 0"),
        ("weight", "0,5", "the weight 0,5 is not a number of at least 0"),
    ],
)
def test_splits_and_weights_that_cannot_be(
    films: Path, column: str, cell: str, message: str
) -> None:
    table(films, f'a/1.png,TB,"{cell}"', header=f"path,label,{column}")
    with pytest.raises(InputError, match=rf"films\.csv, row 2: {message}"):
        read_index(films.parent, table=films)


def test_what_is_no_table_is_one_sentence(films: Path, tmp_path: Path) -> None:
    root = films.parent
    with pytest.raises(InputError, match=r"the table .*none\.csv cannot be read \(No such"):
        read_index(root, table=tmp_path / "none.csv")
    films.write_bytes(b"PK\x03\x04\xff")
    with pytest.raises(InputError, match="is not UTF-8 text; save it as CSV in UTF-8"):
        read_index(root, table=films)
    table(films)
    with pytest.raises(InputError, match="no rows below its header"):
        read_index(root, table=films)
    with pytest.raises(InputError, match=r"--data\.columns must be like path=file"):
        read_index(root, table=films, columns="file")
    with pytest.raises(InputError, match="has no column person, but path, label, patient"):
        read_index(root, table=films, columns="patient=person")
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    with pytest.raises(InputError, match=r"cannot go with .*a\.npz"):
        read_index(tmp_path / "a.npz", table=films)
    with pytest.raises(InputError, match=r"column of patients, so --data\.patient-pattern"):
        read_index(root, table=table(films, *map(",".join, ROWS)), patient_pattern="p.")


def test_links_out_of_the_root_are_refused_by_their_row(films: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").touch()
    (films.parent / "link.png").symlink_to(tmp_path / "outside.png")
    table(films, "a/1.png,TB,p", "link.png,TB,p")
    with pytest.raises(InputError, match=r"row 3: link\.png is a link that leads out of the root"):
        read_index(films.parent, table=films)


def test_columns_need_a_table() -> None:
    with pytest.raises(InputError, match=r"--data\.columns needs --data\.table"):
        expect_effect(Config(data=DataConfig(columns="path=file")))


def test_weights_of_a_table_weigh_the_losses(tree: Path, tmp_path: Path) -> None:
    names = [path.relative_to(tree) for path in sorted(tree.glob("train/*/*.jpeg"))]
    losses = []
    for weight in ("1", "2"):
        path = table(
            tmp_path / f"{weight}.csv",
            *(f"{name},{name.parent.name},{weight}" for name in names),
            header="path,label,weight",
        )
        config = Config(
            workdir=tmp_path / weight,
            data=DataConfig(str(tree), size=16, table=path),
            train=TrainConfig(epochs=1, optimizer="sgd", learning_rate=1e-7),
        )
        fit(config)
        losses.append(Workdir(config.workdir).read_history(1)[0]["train"]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-3)
    fingerprints = {(tmp_path / weight / "data.json").read_text("utf-8") for weight in ("1", "2")}
    assert len(fingerprints) == 2


def test_the_table_that_the_page_shows_can_be_read(make_tree: Callable[..., Path]) -> None:
    page = Path(__file__).parent.parent / "docs" / "data.md"
    block = re.search(r"^```csv\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = block[1].splitlines()
    root = make_tree(*(line.partition(",")[0] for line in lines[1:]))
    index = read_index(root, table=table(root / "images.csv", *lines[1:], header=lines[0]))
    assert rows(index) == [
        ("2024/a17.png", "train", "NORMAL", "p001"),
        ("2024/a18.png", "train", "BACTERIA", "p002"),
        ("2023/IM000001", "test", "VIRUS", "p003"),
    ]


@pytest.fixture
def split_table(tree: Path, tmp_path: Path) -> Path:
    """The images of train and test in a table of other columns; `person` is of no use."""
    lines = [
        f"{path.relative_to(tree)},{path.parent.name},{number},{split}"
        for split in ("train", "test")
        for number, path in enumerate(sorted(tree.glob(f"{split}/*/*.jpeg")))
    ]
    return table(tmp_path / "films.csv", *lines, header="file,finding,patient,split")


OWN = ("path=file,label=finding,patient=", "(person[0-9]+)|(?:IM-[0-9]+)")


def test_a_run_of_a_table_evaluates_others_as_its_own(
    tree: Path, tmp_path: Path, split_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "images.csv"
    data = DataConfig(str(tree), size=16, table=split_table, columns=OWN[0], patient_pattern=OWN[1])
    fit(Config(workdir=run, data=data, train=TrainConfig(epochs=1)))
    given = ("evaluate", "--run", run, "--csv", out)
    assert command(*given, "--data", tree, "--table", split_table) == 0
    judged = read_table(out, ("patient", "truth"))
    assert len(judged) == 32
    ill = {row["patient"] for row in judged if row["truth"] == "PNEUMONIA"}
    assert len(ill) == 8
    assert all(re.fullmatch("person[0-9]+", patient) for patient in ill)
    # Other data may have columns of their own, and no splits.
    plain = tree / "plain.csv"
    cells = [line.split(",") for line in split_table.read_text("utf-8").splitlines()[1:]]
    try:
        table(plain, *(",".join(row[:2]) for row in cells), header="path,label")
        given = (*given, "--data", plain, "--columns", "")
        assert command(*given, "--split", "all") == 0
        assert len(read_table(out, ("patient",))) == len(cells)
        assert command(*given) == 2
        assert "not divided into splits" in capsys.readouterr().err
    finally:
        plain.unlink()
    assert command("evaluate", "--run", run, "--data", tree, "--columns", "path=file") == 2
    assert "--columns needs --table" in capsys.readouterr().err


@pytest.mark.slow
def test_training_says_how_to_evaluate_a_run_of_a_table(
    tree: Path, tmp_path: Path, split_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ("--data.columns", OWN[0], "--data.size", 20, "--train.epochs", 1)
    place = ("--workdir", run, "--data.root", tree, "--data.table", split_table)
    assert command("train", "baseline", *place, *flags) == 0
    advice = capsys.readouterr().out.splitlines()[-1].strip()
    assert advice == f"cnnjax evaluate --run {run} --data {tree} --table {split_table} --split test"
    assert command(*advice.split()[1:]) == 0
    assert "drawn" not in capsys.readouterr().out
    assert command("report", run, "--data", tree, "--table", split_table) == 0
    assert f"the test split of {split_table}" in (run / "report-test.html").read_text("utf-8")
