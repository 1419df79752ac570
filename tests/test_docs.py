"""What the documents show is run here, and the paths that they name are there."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

import cnnjax
from cnnjax.data.index import read_index

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "MODEL_CARD.md", *(ROOT / "docs").glob("*.md")])


def snippets(document: Path) -> str:
    """Returns the document's Python, at the lines where it stands, for readable tracebacks."""
    text = document.read_text("utf-8")
    out, position = "", 0
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        out += "\n" * text.count("\n", position, block.start(1)) + block[1]
        position = block.end(1)
    return out


def test_functional_training_runs_from_top_to_bottom() -> None:
    document = ROOT / "docs" / "functional-training.md"
    code = compile(snippets(document), str(document), "exec")
    with jax.numpy_dtype_promotion("standard"):  # as its readers have it
        exec(code, {})


@pytest.fixture
def place(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the documents' code runs in; `fit` takes one epoch, whatever is asked for."""
    shutil.copytree(tree, tmp_path / "chest_xray")
    shutil.copytree(tree / "test" / "NORMAL", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    fit = cnnjax.fit

    @functools.wraps(fit)
    def shortened(config: cnnjax.Config, **parts: Any) -> Any:
        return fit(replace(config, train=replace(config.train, epochs=1)), **parts)

    monkeypatch.setattr(cnnjax, "fit", shortened)
    return tmp_path


def test_the_readme_trains(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippets(ROOT / "README.md"), "README.md", "exec"), {})
    assert (place / "runs" / "mine" / "summary.json").exists()
    assert re.search(
        r"^0\.\d{4}  \[0\.\d{4}, [01]\.\d{4}\]$", capsys.readouterr().out, re.MULTILINE
    )


@pytest.mark.usefixtures("place")
def test_the_library_is_what_its_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    document = ROOT / "docs" / "api.md"
    exec(compile(snippets(document), str(document), "exec"), {})
    assert "neither JPEG nor PNG nor DICOM" in capsys.readouterr().out
    for name in cnnjax.__all__:
        assert getattr(cnnjax, name).__doc__
        assert f"`{name}" in document.read_text("utf-8"), name


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    shown: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)  # as git is to have it
            source = "".join(cell["source"])
            if cell["id"] == "draw":  # fewer images and epochs than a reader waits for
                fewer = source.replace("IMAGES, EPOCHS = 600, 10", "IMAGES, EPOCHS = 100, 1")
                assert fewer != source
                source = fewer
            exec(compile(source, f"cell {cell['id']}", "exec"), shown)
    index = read_index(tmp_path / "runs" / "notebook-images")
    assert shown["test"].n == 60
    assert shown["test"].patients == len({e.patient for e in index.split("test")})
    assert shown["heat"].shape == (4, shown["predictor"].size, shown["predictor"].size)
    assert "drawn images" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", ["fine-tuning.md", "own-networks.md", "watching.md"])
def test_a_page_runs_from_top_to_bottom(
    page: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tree, tmp_path / "chest_xray")
    monkeypatch.chdir(tmp_path)
    document = ROOT / "docs" / page
    if page == "own-networks.md":  # it has its reader put the first block into a file
        first = re.search(r"^```python\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)
        assert first is not None
        (tmp_path / "mynets.py").write_text(first[1], "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(snippets(document), str(document), "exec"), {})
    sys.modules.pop("mynets", None)


def test_the_package_alone_starts_no_jax() -> None:
    code = "import sys, cnnjax; cnnjax.Config(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^):]+)\)", document.read_text("utf-8"))
    for link in links:
        path, _, _ = link.partition("#")  # mkdocs checks the anchors
        assert (document.parent / path).exists(), link


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in ("reference", "model-card", "benchmarks-all"):
        assert (tmp_path / page / "index.html").exists()
    assert 'id="cnnjax.train.fit"' in (tmp_path / "reference" / "index.html").read_text("utf-8")


def test_flags_of_commands_are_fields() -> None:
    """Every flag that a document gives a script is a field of its options, or of the config."""
    config = (ROOT / "cnnjax" / "config.py").read_text("utf-8")
    found = 0
    for document in (*DOCUMENTS, ROOT / "benchmarks" / "README.md"):
        text = document.read_text("utf-8").replace("\\\n", " ")
        for script, rest in re.findall(
            r"(-m benchmarks\.[a-z_]+|experiments/\w+\.py)([^`\n;)]*)", text
        ):
            path = ROOT / script.removeprefix("-m ").replace("benchmarks.", "benchmarks/")
            path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            fields = config + path.read_text("utf-8")
            for flag in re.findall(r"--([\w.-]+)", rest):
                found += 1
                name = flag.rpartition(".")[2].removeprefix("no-").replace("-", "_")
                assert re.search(rf"^    {name}: ", fields, re.MULTILINE), (document, script, flag)
    assert found > 20


def test_minimal_is_short_and_learns(tree: Path) -> None:
    script = ROOT / "experiments" / "minimal.py"
    assert len(script.read_text("utf-8").splitlines()) <= 125
    done = subprocess.run(
        [sys.executable, script, "--data.root", tree, "--data.size", "20", "--epochs", "8"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"^auc +(\d\.\d+)", done.stdout, re.MULTILINE)
    assert found is not None
    assert float(found[1]) > 0.8


def test_scratch_trains_as_the_compiled_network_does(tree: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "experiments" / "scratch.py"),
            *("--data.root", tree, "--data.size", "20", "--epochs", "6"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    differences = re.findall(r"largest difference at a step (\S+)", done.stdout)
    assert len(differences) == 6
    assert max(map(float, differences)) < 1e-3
    areas = re.findall(r"(?:^auc|AUC) +(\d\.\d+)", done.stdout, re.MULTILINE)
    assert float(areas[0]) > 0.8
    assert abs(float(areas[0]) - float(areas[1])) < 0.01
