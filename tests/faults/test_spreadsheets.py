"""Names that do harm where they are pasted: into a spreadsheet, into a shell."""

from __future__ import annotations

import csv
import io
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnjax.cli.outputs import Csv
from cnnjax.cli.train import train_recipe
from cnnjax.config import Config, DataConfig, DeviceConfig, TrainConfig
from cnnjax.data.cache import write_quarantine
from cnnjax.data.examples import Example
from cnnjax.data.patients import write_split
from cnnjax.machine.files import read_cell, write_rows
from cnnjax.run.workdir import read_table

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]
PLAIN = ["a.png", "-", "=", "'", "it's", "'tis", "-1", "+2.5", "-3e-05", "", "a=b"]


def cells(*values: object) -> list[str]:
    file = io.StringIO(newline="")
    write_rows(file, [values])
    (row,) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    return row


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_begins_as_a_formula_does(text: str) -> None:
    (cell,) = cells(text)
    assert cell == "'" + text
    assert read_cell(cell) == text


def test_other_text_and_numbers_stay_as_they_are() -> None:
    assert cells(*PLAIN) == PLAIN
    assert cells(-1, -0.25, np.float64(-3.5), True, None) == ["-1", "-0.25", "-3.5", "True", ""]


@given(st.text(alphabet="'=+-@\t\r\n1.eE ab,\"", max_size=6))
def test_every_cell_is_read_back_as_it_was(text: str) -> None:
    (cell,) = cells(text) or [""]
    assert read_cell(cell) == text
    assert cell[:1] not in set("=+-@\t\r\n") or len(cell) == 1 or float(cell) is not None


def test_our_own_tables_are_read_back_as_they_were(tmp_path: Path) -> None:
    names = [*FORMULAS, *(f"'{name}" for name in FORMULAS), "'x.png", "-1"]
    write_split(
        tmp_path / "split.csv",
        [Example(name, "train", 0, name) for name in names],
        np.zeros(len(names), bool),
    )
    rows = read_table(tmp_path / "split.csv", ["image", "patient"])
    assert [row["image"] for row in rows] == [row["patient"] for row in rows] == names
    write_quarantine(tmp_path / "quarantine.csv", [(name, "broken") for name in names])
    rows = read_table(tmp_path / "quarantine.csv", ["reason"])
    assert [row["image"] for row in rows] == names


def test_predictions_are_written_through_the_same_place() -> None:
    text = Csv().body([{"path": "=1+1.png", "probability": 0.5, "confidence": 0.5}])
    assert text.startswith("'=1+1.png,0.5,")


def test_a_command_to_copy_names_its_folders_whatever_they_are_called(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(tree, tmp_path / "my films; touch owned"))
    workdir = tmp_path / "$(run) 'a'"
    default = Config(
        data=DataConfig(root=str(root), size=20, cache=tmp_path / "cache"),
        train=TrainConfig(epochs=1, batch=16),
        device=DeviceConfig(count=1),
    )
    with pytest.raises(SystemExit) as ended:
        train_recipe(default, "test", ["--workdir", str(workdir)])
    assert ended.value.code == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  cnnjax evaluate")]
    words = ["cnnjax", "evaluate", "--run", str(workdir), "--data", str(root), "--split", "test"]
    assert shlex.split(line) == words
    assert sys.platform == "win32" or ";" not in line.replace(shlex.quote(str(root)), "")
