"""Predictions are written as they come: constant memory, and what was done stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import cnnjax

from cnnjax.cli import films, outputs
from cnnjax.errors import InputError

ROWS = [
    {"path": "a.png", "probability": 0.25, "class": "NORMAL", "confidence": 0.75},
    {"path": "b.png", "error": "empty file"},
    {"path": "c.png", "warning": "no lungs found"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 small films, by way of links to a few, in folders of their own."""
    root = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    stored = []
    for i in range(4):
        pixels = rng.integers(0, 255, (24, 24), np.uint8)
        stored.append(root / f"stored-{i}.png")
        Image.fromarray(pixels).save(stored[-1])
    (root / "many").mkdir()
    for i in range(300):
        os.link(stored[i % 4], root / "many" / f"film-{i:03}.png")
    return root / "many"


def in_parts(form: outputs.Form) -> str:
    return form.head() + form.body(ROWS[:1]) + form.body([]) + form.body(ROWS[1:]) + form.tail()


@pytest.mark.parametrize("form", [outputs.Lines, outputs.Array, outputs.Csv])
def test_a_form_is_the_same_however_it_is_cut(form: type[outputs.Form]) -> None:
    whole = form()
    assert in_parts(form()) == whole.head() + whole.body(ROWS) + whole.tail()


def test_an_array_is_json_with_any_number_of_elements() -> None:
    assert json.loads(in_parts(outputs.Array())) == ROWS
    empty = outputs.Array()
    assert json.loads(empty.head() + empty.tail()) == []


def test_a_form_of_a_file_goes_by_its_name() -> None:
    assert isinstance(outputs.json_form(Path("a.JSON")), outputs.Array)
    assert isinstance(outputs.json_form(Path("a.jsonl")), outputs.Lines)


def test_a_table_is_aligned() -> None:
    text = in_parts(outputs.Table(("NORMAL", "PNEUMONIA"), 0.85, 5))
    head, first, broken, nothing, *note = text.splitlines()
    assert len(head) == len(first)
    assert first.split() == ["a.png", "0.2500", "NORMAL", "75.0", "%"]
    assert broken.split() == ["b.png", "not", "read"]
    assert nothing.split() == ["c.png", "no", "prediction"]
    assert note[0].startswith("PNEUMONIA from probability 0.850 on")


def test_what_was_written_stays_and_is_whole_when_the_work_fails(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def work() -> None:
        with outputs.opened(out, outputs.Array(), "--json") as output:
            assert output is not None
            output.write(ROWS[:1])
            assert json.loads(out.read_text() + "]") == ROWS[:1]  # there at once
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert json.loads(out.read_text()) == ROWS[:1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_without_room_is_named() -> None:
    with (
        pytest.raises(InputError, match=r"--csv /dev/full cannot be written \(No space left"),
        outputs.opened(Path("/dev/full"), outputs.Csv(), "--csv"),
    ):
        pytest.fail("opened")


def test_chunks_hold_each_film_once_and_none_is_tiny() -> None:
    for n in range(1, 40):
        some = [films.Film(str(i), bytes) for i in range(n)]
        chunks = films.in_chunks(some, 10, 3)
        assert [film for chunk in chunks for film in chunk] == some
        assert all(len(chunk) <= 13 for chunk in chunks)
        assert n <= 3 or all(len(chunk) > 3 for chunk in chunks)


def test_only_two_chunks_are_held_at_a_time(tmp_path: Path) -> None:
    read: list[int] = []

    def film(i: int) -> films.Film:
        def content() -> bytes:
            read.append(i)
            return b"nothing"

        return films.Film(str(i), content)

    chunks = films.in_chunks([film(i) for i in range(100)], 10, 0)
    for i, (rows, images) in enumerate(films.decoded(chunks, 16)):
        assert [row["path"] for row in rows] == [str(10 * i + j) for j in range(10)]
        assert images is None
        assert len(read) <= 10 * (i + 2)


def test_an_output_over_a_film_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = folder / "film-000.png"
    before = film.read_bytes()
    for flag in ("--csv", "--json"):
        assert cnnjax("predict", folder, flag, film) == 2
        assert f"{flag} {film} is one of the images" in capsys.readouterr().err
    assert film.read_bytes() == before


PROGRAM = "import sys; from cnnjax import cli; cli.main(sys.argv[1:])"


@pytest.mark.parametrize("name", ["p.json", pytest.param("p.jsonl", marks=pytest.mark.slow)])
def test_a_killed_process_leaves_what_it_had_judged(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """Of standard output, CSV and JSON, and in order; a pipe gets them while others are judged."""
    held = tmp_path / "z-held.png"  # the last film: a pipe into which nobody writes an end
    os.mkfifo(held)
    writer = os.open(held, os.O_RDWR)
    csv, out = tmp_path / "p.csv", tmp_path / name
    command = [sys.executable, "-c", PROGRAM, "predict", folder, held]
    process = subprocess.Popen(
        [*command, "--json", out, "--csv", csv],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    too_long = threading.Timer(120, process.kill)
    too_long.start()
    printed = [json.loads(process.stdout.readline()) for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    too_long.cancel()
    process.stdout.close()
    assert [Path(row["path"]).name for row in printed] == [f"film-{i:03}.png" for i in range(200)]
    assert len(csv.read_text().splitlines()) > 128
    whole = out.read_text().rpartition("\n")[0]  # it may have been killed within a row
    lines = whole.splitlines()
    kept = json.loads(whole.rstrip(",") + "]") if name == "p.json" else [*map(json.loads, lines)]
    assert kept[:128] == printed[:128]
    os.close(writer)


def test_json_is_one_document_when_all_are_judged(folder: Path, tmp_path: Path) -> None:
    some = sorted(folder.iterdir())[:3]
    out = tmp_path / "p.json"
    assert cnnjax("predict", *some, tmp_path / "missing.png", "--json", out) == 2
    rows = json.loads(out.read_text())
    assert [row["path"] for row in rows] == [*map(str, some), str(tmp_path / "missing.png")]
