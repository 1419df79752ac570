"""`cnnjax train`: a recipe by its name, or a file of one's own, by the package alone."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

import cnnjax
from cnnjax import cli, phantom
from cnnjax.cli.train import RECIPES
from cnnjax.config import Config

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def train(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_recipes_are_public_and_the_scripts_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    public = {name: x for name, x in vars(cnnjax.recipes).items() if isinstance(x, Config)}
    assert public == RECIPES
    for name, recipe in public.items():
        assert importlib.import_module(name).CONFIG is recipe
        assert recipe.workdir.parent == Path("runs")  # which git ignores


def test_a_file_of_ones_own_is_trained_and_evaluated(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sizes.py").write_text("SIZE = 20\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "import cnnjax\n"
        "from sizes import SIZE\n"
        "recipe = cnnjax.recipes.baseline\n"
        "CONFIG = replace(recipe, data=cnnjax.DataConfig(size=SIZE),\n"
        "                 train=cnnjax.TrainConfig(epochs=7, batch=16))\n"
    )
    monkeypatch.setattr("sys.path", [*sys.path])  # which the neighbour's folder goes to
    run = tmp_path / "run"
    flags = ("--data.root", tree, "--train.epochs", 1, "--device.count", 2, "--workdir", run)
    assert train(tmp_path / "mine.py", *flags) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["data"]["size"], config["model"]["channels"]) == (20, 3)
    assert (config["train"]["epochs"], config["train"]["batch"]) == (1, 16)  # a flag, and the file
    screen = capsys.readouterr().out
    assert f"cnnjax evaluate --run {run} --data {tree} --split test" in screen
    assert "drawn" not in screen


def test_the_advice_names_only_splits_that_are_there(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        shutil.copytree(tree / split, tmp_path / "films" / split)
    (tmp_path / "films" / ".phantom").touch()  # as `cnnjax phantom` leaves
    run = tmp_path / "run"
    flags = ("--data.size", 20, "--train.batch", 16, "--device.count", 2, "--workdir", run)
    flags += ("--train.learning-rate", 1e-12, "--train.epochs", 1)
    assert train("baseline", "--data.root", tmp_path / "films", *flags) == 0
    screen = capsys.readouterr().out
    assert "--split" not in screen
    page = (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    drawn, learned_nothing = summary["notes"]
    assert drawn == phantom.DRAWN
    assert "is no better than always predicting the most frequent class" in learned_nothing
    for note in summary["notes"]:
        assert note in " ".join(screen.split())
        assert note in page
    assert "official test split" not in page  # nothing drawn is set beside published figures


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bogus", None, "there is no recipe bogus; give baseline, pneumonia, or a Python file"),
        ("gone.py", None, "gone.py does not exist"),
        ("bare.py", "config = 3", "bare.py does not set CONFIG to a cnnjax.Config"),
        ("other.py", "CONFIG = {}", "other.py does not set CONFIG to a cnnjax.Config"),
        ("broken.py", "1 / 0", "broken.py cannot be run (ZeroDivisionError: division by zero)"),
        ("typo.py", "CONFIG =", "typo.py cannot be run (SyntaxError: invalid syntax"),
    ],
)
def test_what_is_no_recipe_is_one_sentence(
    name: str,
    text: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    assert train(name, "--workdir", "run") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, workdir in (((), "runs/pneumonia"), (("baseline",), "runs/baseline")):
        assert train(*arguments, "--help") == 0
        shown = capsys.readouterr().out
        assert f"(default: {workdir})" in shown
        assert "cnnjax train [baseline | pneumonia | FILE.py] [flags]" in shown
