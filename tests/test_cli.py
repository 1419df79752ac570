"""The commands, as a person types them: what they print, what they write, how they end."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_dicom import file_of

from cnnjax import __version__, cli
from cnnjax.config import Config, DataConfig, DeviceConfig, TrainConfig
from cnnjax.data.cache import write_quarantine
from cnnjax.data.index import read_index
from cnnjax.data.patients import write_split
from cnnjax.run.workdir import read_table, write_json
from cnnjax.train import fit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a trained run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(
        Config(
            workdir=folder,
            data=DataConfig(root=str(tree), size=20),
            train=TrainConfig(epochs=4, batch=16),
            device=DeviceConfig(count=2),
        )
    )
    return folder


def cnnjax(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return int(ended.value.code or 0)


def test_evaluate(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "metrics.json", tmp_path / "images.csv"
    command = ("evaluate", "--run", run, "--data", tree, "--split", "test")
    assert cnnjax(*command, "--json", out, "--csv", table) == 0
    found = json.loads(out.read_text())
    c = found["confusion"]
    assert found["n"] == c["tn"] + c["fp"] + c["fn"] + c["tp"] == 32
    assert found["accuracy"]["value"] == (c["tp"] + c["tn"]) / 32
    assert found["auc"]["value"] > 0.8
    screen = capsys.readouterr().out
    assert "test split, best checkpoint" in screen
    assert f"{found['auc']['value']:.4f}" in screen

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"].split("/")[-2] for row in rows] == [row["truth"] for row in rows]
    assert len({row["patient"] for row in rows}) == found["patients"]
    assert sum(row["class"] == row["truth"] for row in rows) == c["tp"] + c["tn"]
    probability = np.array([float(row["probability"]) for row in rows])
    ill = np.array([row["truth"] == "PNEUMONIA" for row in rows])
    assert np.square(probability - ill).mean() == pytest.approx(found["brier"]["value"])

    capsys.readouterr()
    assert cnnjax(*command, "--prevalence", 0.05, "--json", out) == 0
    here = json.loads(out.read_text())
    assert here["confusion"] == c  # the threshold moves along
    assert (found["prevalence"], here["prevalence"]) == (None, 0.05)
    # Probabilities that are made for one share of positives, of images with another.
    assert here["brier"]["value"] is here["ece"]["value"] is None
    right = here["sensitivity"]["value"] * 0.05
    spared = here["specificity"]["value"] * 0.95
    said = f"at 0.05, accuracy is {right + spared:.4f}"
    said += f" and precision {right / (right + 0.95 - spared):.4f}"
    assert said in capsys.readouterr().out

    assert cnnjax("evaluate", "--run", run, "--data", tree, "--threshold", 0, "--json", out) == 0
    assert json.loads(out.read_text())["sensitivity"]["value"] == 1


def test_evaluate_warns_of_images_that_trained_the_run(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cnnjax("evaluate", "--run", run, "--data", tree, "--split", "train") == 0
    said = re.search(r"was trained on (\d+) images with the same names", capsys.readouterr().out)
    assert said is not None
    with (run / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert int(said[1]) == sum(r["role"] == "train" and "train/" in r["image"] for r in rows)
    assert cnnjax("evaluate", "--run", run, "--data", tree) == 0
    assert "was trained on" not in capsys.readouterr().out
    shutil.copytree(tree, tmp_path / "zip" / tree.name)  # as a zip holds it
    assert cnnjax("evaluate", "--run", run, "--data", tmp_path / "zip", "--split", "train") == 0
    assert said[0] in capsys.readouterr().out


def test_a_tree_with_only_test_can_be_evaluated(run: Path, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "test", tmp_path / "only" / "test")
    assert cnnjax("evaluate", "--run", run, "--data", tmp_path / "only") == 0


def test_predict_goes_on_past_a_bad_file(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(tree / "test" / "PNEUMONIA", images)
    bad = images / "bad.jpeg"
    bad.write_bytes(b"nothing")
    single = next((tree / "test" / "NORMAL").iterdir())
    missing = tmp_path / "missing.png"
    out = tmp_path / "out.jsonl", tmp_path / "out.csv"
    status = cnnjax(
        "predict", "--run", run, "--json", out[0], "--csv", out[1], images, single, missing
    )
    assert status == 2
    screen = capsys.readouterr()
    assert f"{bad}: error: neither JPEG nor PNG nor DICOM" in screen.err
    assert f"{missing}: error: No such file" in screen.err
    assert screen.out == out[0].read_text()  # no terminal: an object a line
    rows = [json.loads(line) for line in out[0].read_text().splitlines()]
    assert len(rows) == 19
    with out[1].open(newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(rows, table, strict=True):
        assert row["path"] == line["path"]
        if "error" in row:
            assert row["path"] in (str(bad), str(missing))
        else:
            assert row["class"] == ("PNEUMONIA" if row["probability"] >= 0.5 else "NORMAL")
            assert float(line["probability"]) == row["probability"]
            assert row["confidence"] == max(row["probability"], 1 - row["probability"])


def test_predict_shows_a_person_a_table(
    run: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, *_ = sorted((tree / "test" / "PNEUMONIA").iterdir())
    assert cnnjax("predict", "--run", run, "--format", "table", one, "missing.png") == 2
    head, judged, missing, note, *more = capsys.readouterr().out.splitlines()
    assert max(map(len, (note, *more))) <= 80
    assert head.split() == ["image", "P(PNEUMONIA)", "class", "confidence"]
    path, probability, label, sure, percent = judged.split()
    assert (path, percent) == (str(one), "%")
    assert label in ("NORMAL", "PNEUMONIA")
    expected = float(probability) if label == "PNEUMONIA" else 1 - float(probability)
    assert float(sure) == pytest.approx(100 * expected, abs=0.1)
    assert missing.split() == ["missing.png", "not", "read"]
    assert note.startswith("PNEUMONIA from probability 0.")


@pytest.mark.skipif(sys.platform == "darwin", reason="there, names of files are UTF-8")
@pytest.mark.parametrize("form", ["table", "csv"])
def test_predict_shows_a_name_of_any_bytes(
    run: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    one, *_ = sorted((tree / "test" / "PNEUMONIA").iterdir())
    name = b"m\xfcller.jpeg"  # Latin-1
    shutil.copy(one, tmp_path / os.fsdecode(name))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "utf-8", write_through=True))
    assert cnnjax("predict", "--run", run, "--format", form, tmp_path) == 0
    assert name in shown.getvalue()


def test_predict_reads_a_pipe(
    run: Path,
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, *_ = sorted((tree / "test" / "PNEUMONIA").iterdir())
    with one.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read())))
    heat = tmp_path / "heat"
    asked = ("predict", "--run", run, "--format", "csv")
    assert cnnjax(*asked, "-", one, "--heatmap", heat) == 0
    piped, named = csv.DictReader(capsys.readouterr().out.splitlines())
    assert piped["path"] == "-"
    assert piped["probability"] == named["probability"]
    assert {path.name for path in heat.iterdir()} == {"stdin.png", f"{one.stem}.png"}


def test_few_images_and_many_get_the_same(
    run: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few take a program that can be kept for the next start, many one that is faster."""
    files = sorted((tree / "test").rglob("*.jpeg"))
    assert cnnjax("predict", "--run", run, *files) == 0
    many = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert cnnjax("predict", "--run", run, *files[:3]) == 0
    few = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for a, b in zip(few, many, strict=False):
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)


def test_a_pipe_by_name_is_read_once(run: Path, tree: Path, tmp_path: Path) -> None:
    one, *_ = sorted((tree / "test" / "PNEUMONIA").iterdir())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "import sys; from cnnjax import cli; cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "predict", "--run", run, pipe, "--heatmap"]
    writer = subprocess.Popen(["cp", one, pipe])
    try:
        subprocess.run([*command, tmp_path / "heat"], check=True, timeout=120)
    finally:
        writer.kill()
        writer.wait()
    assert (tmp_path / "heat" / "pipe.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_predict_refuses_by_name_what_is_no_film_of_bearable_size(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    films = tmp_path / "films"
    films.mkdir()
    shutil.copy(next((tree / "test/NORMAL").glob("*")), films / "good.jpeg")
    os.mkfifo(films / "pipe.jpeg")
    with (films / "sparse.png").open("wb") as file:
        file.truncate(6 * 2**30)
    (films / "again.jpeg").symlink_to(films / "good.jpeg")
    (films / "loop").symlink_to(films)
    assert cnnjax("predict", "--run", run, films, films / "pipe.jpeg") == 2
    screen = capsys.readouterr()
    rows = [json.loads(line) for line in screen.out.splitlines()]
    assert [(Path(row["path"]).name, row.get("error")) for row in rows] == [
        ("good.jpeg", None),
        ("pipe.jpeg", "not a regular file"),
        ("sparse.png", "larger than 128 MiB"),
        ("pipe.jpeg", "a pipe into which nothing is written"),
    ]
    assert f"{films}: 1 links to listed images skipped\n" in screen.err
    assert "Traceback" not in screen.err


def test_predict_finds_dicom_files_without_a_suffix(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    for name in ("IM0001", "1.2.840.3"):
        (tmp_path / name).write_bytes(file_of(film, WindowCenter=1, WindowWidth=0))
    (tmp_path / "notes").write_text("text")
    assert cnnjax("predict", "--run", run, tmp_path) == 0
    screen = capsys.readouterr()
    rows = [json.loads(line) for line in screen.out.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["1.2.840.3", "IM0001"]
    assert all("the range of the values is used" in row["warning"] for row in rows)
    assert "1 other files skipped" in screen.err


def test_tables_hold_names_with_carriage_returns(run: Path, tree: Path, tmp_path: Path) -> None:
    name = "a\rb.jpeg"
    copied = Path(shutil.copytree(tree / "test", tmp_path / "root" / "test"))
    film = next((copied / "NORMAL").glob("*"))
    film.rename(film.with_name(name))
    judged, predicted = tmp_path / "judged.csv", tmp_path / "predicted.csv"
    assert cnnjax("predict", "--run", run, film.with_name(name), "--csv", predicted) == 0
    root = copied.parent
    assert cnnjax("evaluate", "--run", run, "--data", root, "--csv", judged, "--cache", root) == 0
    assert [row["path"] for row in read_table(predicted, ["path"])] == [str(film.with_name(name))]
    assert f"test/NORMAL/{name}" in [row["image"] for row in read_table(judged, ["image"])]
    examples = read_index(root).examples
    write_split(tmp_path / "split.csv", examples, np.zeros(len(examples), bool))
    write_quarantine(tmp_path / "quarantine.csv", [(name, "broken")])
    rows = read_table(tmp_path / "split.csv", ["image"])
    assert [row["image"] for row in rows] == [example.name for example in examples]
    assert read_table(tmp_path / "quarantine.csv", ["reason"]) == [
        {"image": name, "reason": "broken"}
    ]


def test_an_output_without_room_is_one_sentence() -> None:
    code = "import sys; from cnnjax import cli; cli.main(sys.argv[1:])"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "devices"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the disk is full")
    assert len(done.stderr.splitlines()) == 1


def test_output_goes_into_a_pipe_and_through_a_link(run: Path, tree: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--run", run, "--data", tree, "--json"]
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    assert cnnjax(*command, tmp_path / "link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    written = (tmp_path / "there.json").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert cnnjax(*command, tmp_path / "pipe") == 0
    assert os.read(reader, 1 << 16) == written
    os.close(reader)
    code = "import sys; from cnnjax import cli; cli.main(sys.argv[1:])"
    words = [sys.executable, "-c", code, *map(str, command), "/dev/stdout"]
    done = subprocess.run(words, capture_output=True, check=True)
    # A process of its own has other devices, and thus other last digits.
    printed = json.loads(done.stdout[done.stdout.index(b"\n{\n") :])
    assert printed["confusion"] == json.loads(written)["confusion"]
    (tmp_path / "log").write_text("before\n")
    with (tmp_path / "log").open("a") as log:
        subprocess.run(words, stdout=log, check=True)
    assert (tmp_path / "log").read_bytes() == b"before\n" + done.stdout


def test_a_damaged_run_is_named(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name, message in (("operating.json", "is not valid JSON"), ("data.json", "cannot be read")):
        kept = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(b"{" if "valid" in message else b"\xff")
        assert cnnjax("evaluate", "--run", tmp_path / "run", "--data", tree) == 2
        error = capsys.readouterr().err
        assert f"{name} {message}" in error
        assert error.count("\n") == 1
        (tmp_path / "run" / name).write_bytes(kept)
    for name in ("throughput.jsonl", "operating.json"):
        (tmp_path / "run" / name).unlink()
        assert cnnjax("report", "--run", tmp_path / "run") == 2
        assert f"{name} cannot be read" in capsys.readouterr().err
    # Without its summary it is one that has not ended.
    (tmp_path / "run" / "summary.json").unlink()
    assert cnnjax("predict", "--run", tmp_path / "run", tree / "test") == 0
    assert "has no operating point yet" in capsys.readouterr().err


def test_hidden_files_are_passed_over_and_parents_are_not(
    run: Path,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    films = tmp_path / "films"
    shutil.copytree(tree / "test" / "NORMAL", films)
    shutil.copytree(tree / "test" / "NORMAL", films / ".trash")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cnnjax("predict", "--run", run, "../films") == 0
    assert len(capsys.readouterr().out.splitlines()) == 16


def test_predict_agrees_with_evaluate(run: Path, tree: Path, tmp_path: Path) -> None:
    cnnjax("evaluate", "--run", run, "--data", tree, "--json", tmp_path / "e.json")
    cnnjax("predict", "--run", run, tree / "test", "--json", tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    right = sum(Path(r["path"]).parent.name == r["class"] for r in rows)
    assert right / len(rows) == json.loads((tmp_path / "e.json").read_text())["accuracy"]["value"]


def test_predict_draws_heat_maps_of_what_it_can_read(run: Path, tree: Path, tmp_path: Path) -> None:
    one = sorted((tree / "test" / "PNEUMONIA").iterdir())[0]
    other = tmp_path / "elsewhere" / one.name  # of the same name
    other.parent.mkdir()
    with Image.open(sorted((tree / "test" / "NORMAL").iterdir())[0]) as image:
        image.resize((32, 24)).save(other)
    (tmp_path / "bad.jpeg").write_bytes(b"nothing")
    heat = tmp_path / "heat"
    status = cnnjax("predict", "--run", run, one, other, tmp_path / "bad.jpeg", "--heatmap", heat)
    assert status == 2
    pictures = sorted(heat.iterdir())
    assert [picture.name for picture in pictures] == [f"{one.stem}-0.png", f"{one.stem}-1.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (512, 512)
        pixels = np.asarray(picture)
        assert np.ptp(pixels.astype(int), axis=2).max() > 50  # colour where there is heat
    with Image.open(pictures[1]) as picture:
        assert picture.size == (512, 384)  # of the image's aspect ratio


def test_heat_maps_take_the_place_of_no_image(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "film.png")
    before = (tmp_path / "film.png").read_bytes()
    heat = tmp_path / "elsewhere" / ".."
    assert cnnjax("predict", "--run", run, tmp_path / "film.png", "--heatmap", heat) == 2
    assert f"--heatmap {heat} is the folder of the images" in capsys.readouterr().err
    assert (tmp_path / "film.png").read_bytes() == before


def test_heat_maps_are_kept_from_links_and_from_the_next_judging(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, films = tmp_path / "store", tmp_path / "films"
    for folder in (store, films):
        folder.mkdir()
    Image.new("L", (30, 30)).save(store / "film.png")
    (films / "film.png").symlink_to(store / "film.png")
    before = (store / "film.png").read_bytes()
    for heat in (films, store):
        assert cnnjax("predict", "--run", run, films / "film.png", "--heatmap", heat) == 2
        assert f"--heatmap {heat} is the folder of the images" in capsys.readouterr().err
    (films / "ward").symlink_to(store)
    for heat in (films / "heat", store / "heat"):
        assert cnnjax("predict", "--run", run, films, "--heatmap", heat) == 2
        sentence = f"--heatmap {heat} is inside {films}, an input folder"
        assert sentence in capsys.readouterr().err
    assert cnnjax("predict", "--run", run, tmp_path, "--heatmap", tmp_path) == 2
    assert f"--heatmap {tmp_path} is inside {tmp_path}, an" in capsys.readouterr().err
    assert (store / "film.png").read_bytes() == before


def test_folders_are_judged_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With those that are links, or told of where they cannot be read."""
    (tmp_path / "store").mkdir()
    films = tmp_path / "films"
    (films / "folder.png").mkdir(parents=True)
    for path in (tmp_path / "store" / "a.png", films / "folder.png" / "b.PNG"):
        Image.linear_gradient("L").resize((30, 30)).save(path)
    (films / "ward").symlink_to(tmp_path / "store")
    (films / "notes.txt").touch()
    assert cnnjax("predict", "--run", run, films) == 0
    screen = capsys.readouterr()
    assert f"{films}: 1 other files skipped, not .jpeg, .jpg, .png, .dcm\n" == screen.err
    rows = [json.loads(line) for line in screen.out.splitlines()]
    assert [row["path"] for row in rows] == [
        str(films / name) for name in ("folder.png/b.PNG", "ward/a.png")
    ]

    scandir = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "ward":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert cnnjax("predict", "--run", run, films) == 2
    assert f"{films / 'ward'} cannot be read (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--run", "nowhere"], "nowhere is not a run: it does not exist"),
        (["evaluate", "--run", "RUN", "--data", "nowhere"], "nowhere does not exist"),
        (["evaluate", "--run", "RUN", "--data", "TREE", "--threshold", "2"], "--threshold must be"),
        (
            ["predict", "--run", "RUN", "TREE", "--views", "2"],
            "operating point for 1 view of an image",
        ),
        (["evaluate", "--run", "RUN", "--data", "LETTERS"], "has the classes A and PNEUMONIA, but"),
        (
            ["evaluate", "--run", "RUN", "--data", "TREE", "--json", "no/dir/x"],
            "--json no/dir/x can",
        ),
        (["evaluate", "--run", "RUN", "--data", "TREE", "--csv", "no/dir/x"], "--csv no/dir/x can"),
        (["predict", "--run", "RUN", "TREE", "--json", "EMPTY"], "empty is a folder; give a file"),
        (["report", "--run", "RUN", "--out", "EMPTY"], "empty is a folder; give a file"),
        (["predict", "--run", "RUN", "EMPTY"], "holds no .jpeg, .jpg, .png, .dcm"),
        (
            ["evaluate", "--run", "RUN", "--data", "~no-one-of-this-name/x"],
            "~no-one-of-this-name/x does not exist",
        ),
        (["phantom", "EMPTY", "--seed", "-1"], "the seed must be at least 0, got -1"),
        (
            ["devices", "--device.platform", "gpu"],
            "--device.platform gpu: JAX finds no such device",
        ),
        (["devices", "--device.count", "99"], "--device.count 99: there are only 4 cpu devices"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    run: Path,
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("A", "PNEUMONIA"):
        (tmp_path / "letters" / "test" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / f"letters/test/{name}/a.png")
    named = {
        "RUN": run,
        "TREE": tree,
        "EMPTY": tmp_path / "empty",
        "LETTERS": tmp_path / "letters",
    }
    assert cnnjax(*(named.get(a, a) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--nonsense"], ["evaluate", "--speed", "3"], []])
def test_unknown_flags_end_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cnnjax(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cnnjax("devices", "--device.count", "2") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_devices_that_xla_was_told_to_make_are_taken() -> None:
    command = [sys.executable, "-c", "from cnnjax.cli import main; main()", "devices"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "3 x cpu" in done.stdout


def test_a_platform_that_is_not_there_is_told() -> None:
    command = [sys.executable, "-c", "from cnnjax import cli; cli.main(['devices'])"]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: JAX finds no device (" in done.stderr
    assert "check JAX_PLATFORMS" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_from_the_shell(tree: Path, tmp_path: Path) -> None:
    """As the command and as the script, killed once on its way, ending like one that was not."""
    recipe = [str(ROOT / "experiments" / "baseline.py")]

    def command(run: str) -> list[str]:
        flags = {"data.root": tree, "data.size": 20, "train.epochs": 3, "workdir": tmp_path / run}
        return [
            sys.executable,
            *(recipe if run == "killed" else ["-m", "cnnjax", "train", "baseline"]),
            *(str(part) for k, v in flags.items() for part in (f"--{k}", v)),
        ]

    whole = subprocess.run(command("whole"), capture_output=True, text=True, check=True)
    assert [line for line in whole.stdout.splitlines() if len(line) > 80 and "/" not in line] == []
    found = json.loads((tmp_path / "whole" / "summary.json").read_text())
    page = (tmp_path / "whole" / "report.html").read_text()
    for name in ("accuracy", "sensitivity", "specificity", "auc", "brier", "ece"):
        value = found["best"][name]["value"]  # one figure on the screen, in the file, on the page
        assert re.search(rf"^{name} +{value:.4f}  ", whole.stdout, re.MULTILINE), name
        assert f"<td>{value:.3f}</td>" in page, name
    assert "at probability 0.5, uncalibrated; * new best by auc" in whole.stdout
    threshold = f"from probability {found['best']['threshold']:.3f} on"
    assert threshold in whole.stdout
    assert threshold in page
    half = f"accuracy {found['at_0.5']['best']['accuracy']:.4f},"
    assert half in whole.stdout
    assert half in page
    assert "1 view of each image" in whole.stdout
    assert "one view of each image" in page
    assert "--split test" in whole.stdout
    assert whole.stderr == ""  # no bar and no warning where there is no terminal
    killed = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if re.match(" *1/3 ", line):
            killed.kill()
            break
    killed.communicate()
    assert killed.returncode == -9
    subprocess.run(command("killed"), capture_output=True, check=True)
    for name in ("metrics.jsonl", "summary.json", "validation.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_device_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def study() -> int:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand more")

    assert cli.guarded(study) == 2
    screen = capsys.readouterr().err
    assert screen.startswith("error: the device is out of memory")
    assert len(screen.splitlines()) == 1
    with pytest.raises(RuntimeError, match="another"):
        cli.guarded(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_a_file_that_cannot_be_written_is_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def study() -> int:
        write_json(tmp_path / "nowhere" / "rows.json", {})
        return 0

    assert cli.guarded(study) == 2
    screen = capsys.readouterr().err
    assert screen == f"error: {tmp_path / 'nowhere' / 'rows.json'}: No such file or directory\n"


def test_the_version_is_told_by_the_command_and_by_the_module() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "cnnjax", "--version"], capture_output=True, text=True, check=True
    )
    assert told.stdout == f"cnnjax {__version__}\n"
