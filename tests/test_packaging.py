"""The order of the modules, and what a package index gets: distributions and a readme."""

from __future__ import annotations

import ast
import email
import graphlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_imports_between_packages_have_one_direction() -> None:
    """Also those within functions; of modules of the same package, any may import another."""
    needs: dict[str, set[str]] = {}
    for file in (ROOT / "cnnjax").rglob("*.py"):
        package = file.relative_to(ROOT / "cnnjax").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and package not in ("__init__", "__main__"):
                first, *rest = (node.module or "").split(".")
                names = rest[:1] or [each.name for each in node.names]
                found = {name for name in names if first == "cnnjax" and name != package}
                needs.setdefault(package, set()).update(found)
    order = list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError
    assert order.index("config") < order.index("run") < order.index("train") < order.index("cli")
    assert "evaluation" not in needs["train"] | needs["run"]  # training without what judges it


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions, made as `python -m build --no-isolation` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    code = "from hatchling.build import *; build_sdist(D); build_wheel(D)"
    command = [sys.executable, "-c", code.replace("D", repr(str(folder)))]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return folder


def test_the_source_distribution_has_what_a_packager_needs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = ("README.md", "LICENSE", "MODEL_CARD.md", "CITATION.cff", "Makefile")
    wanted += ("tests/conftest.py", "docs/api.md", "experiments/pneumonia.py", "benchmarks/page.py")
    assert names >= {*wanted}
    assert not [name for name in names if name.startswith((".ci", ".venv", "runs", "dist"))]


def test_the_wheel_has_all_that_the_package_reads(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cnnjax").rglob("*") if p.is_file()}
    assert names == {name for name in ours if "__pycache__" not in name}


def test_the_readme_has_no_link_that_leads_nowhere_on_an_index(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("METADATA"))
        found = email.message_from_bytes(file.read(name))
    assert found["Description-Content-Type"] == "text/markdown"
    readme = str(found.get_payload())
    links = re.findall(r"\]\(([^)]+)\)|^\[[^\]]+\]: (\S+)$", readme, re.MULTILINE)
    assert len(links) > 3
    for link in links:
        assert "".join(link).startswith("https://"), link
    assert "![" not in readme
    assert "heat\nmaps" not in readme  # an image goes with its text
    assert "docs/functional-training.md" in readme  # the text of a link stays
    for minor in range(11, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in found.get_all("Classifier", [])


def test_the_model_card_has_the_front_matter_that_hubs_read() -> None:
    yaml = pytest.importorskip("yaml")
    _, front, card = (ROOT / "MODEL_CARD.md").read_text("utf-8").split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "apache-2.0"
    assert values["pipeline_tag"] == "image-classification"
    (model,) = values["model-index"]
    (result,) = model["results"]
    names = {"Accuracy": "accuracy", "Sensitivity": "sensitivity", "Specificity": "specificity"}
    names |= {"AUC": "AUC, pooled"}
    assert {metric["name"] for metric in result["metrics"]} == set(names)
    for metric in result["metrics"]:  # of the card's own table
        assert f"| {names[metric['name']]} | {metric['value']:.3f} [" in card
