"""The weights that come with the package are those that the model card speaks of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax.config import DataConfig, DeviceConfig
from cnnjax.data import framing
from cnnjax.data.index import read_index
from cnnjax.data.patients import grouped_folds
from cnnjax.errors import InputError
from cnnjax.evaluation.predict import Predictor
from cnnjax.lungs import as_framed
from cnnjax.machine import devices
from cnnjax.metrics import auc
from cnnjax.run import release

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "chest_xray"


def test_they_are_small_and_hold_no_pickles() -> None:
    files = list(release.SHIPPED.iterdir())
    assert sum(path.stat().st_size for path in files) < 6 * 2**20
    assert release.read().classes == ("NORMAL", "PNEUMONIA")


RECORDED = ROOT / "docs" / "results" / "crossval.json"
PROPORTIONS = ("accuracy", "sensitivity", "specificity")


def test_the_record_is_of_these_weights() -> None:
    figures = release.read().about["figures"]
    recorded = json.loads(RECORDED.read_text("utf-8"))
    assert figures == {name: recorded[name] for name in figures}


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_tables_of_a_page_have_the_recorded_figures(page: str) -> None:
    found = json.loads(RECORDED.read_text("utf-8"))
    plain = [estimate(found["plain"][name]) for name in ("auc", *PROPORTIONS)]
    middle = found["sets"]["middle 0.7"]
    rows = {
        "as they are": plain,
        "the middle 0.7 of the side, enlarged": [f"{middle[x]:.3f}" for x in ("auc", *PROPORTIONS)],
        "*score*: mean of the groups' worst AUC": [f"**{found['score']:.3f}**", "", "", ""],
    }
    for group, worst in found["groups"].items():
        rows[f"{group}, worst rendering"] = [f"{worst[x]:.3f}" for x in ("auc", *PROPORTIONS)]
    expect_rows(page, rows)


def test_the_tables_of_the_model_card_have_the_recorded_figures() -> None:
    found = json.loads(RECORDED.read_text("utf-8"))
    names = {"auc": "AUC, pooled", "brier": "Brier score", "ece": "expected calibration error"}
    rows = {names.get(x, x): [estimate(value)] for x, value in found["plain"].items()}
    folds = ", ".join(f"{area:.4f}" for area in found["auc_by_fold"])
    between = f"{found['auc_mean']:.4f}, deviation between folds {found['auc_sd']:.4f} ({folds})"
    rows["AUC, mean over folds"] = [between]
    for group, worst in found["groups"].items():
        cells = [f"{worst[x]:.4f}" for x in ("auc", "across")]
        rows[group] = cells + [f"{worst[x]:.3f}" for x in (*PROPORTIONS, "ece")]
    for name, shown in found["sets"].items():
        rows[name] = [f"{shown['auc']:.4f}", *(f"{shown[x]:.3f}" for x in PROPORTIONS)]
    for name, areas in zip(("all", "AP views", "PA views"), by_view(found), strict=True):
        rows[name] = [f"{np.mean(areas):.2f} ({min(areas):.2f} to {max(areas):.2f})"]
    expect_rows("MODEL_CARD.md", rows)
    card = (ROOT / "MODEL_CARD.md").read_text("utf-8")
    for point in found["points"]:
        worst = point["framing at worst"]
        both = f"{worst['sensitivity']:.3f}, {worst['specificity']:.3f}"
        cells = [f"{point['threshold']:.3f}", *(estimate(point["plain"][x]) for x in PROPORTIONS)]
        assert f"| {' | '.join([*cells, both])} |" in card
    assert f"the first column: {found['score']:.4f}" in card


def estimate(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['value']:.3f} [{low:.3f}, {high:.3f}]"


def by_view(found: dict[str, Any]) -> list[list[float]]:
    return [[one[name] for one in found["external"]] for name in ("all", "AP", "PA")]


def expect_rows(page: str, rows: dict[str, list[str]]) -> None:
    """The page has a table row for each of these, ending in these cells."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    for name, cells in rows.items():
        ending = f" {' | '.join(cells)} |".replace("  ", " ")
        assert any(
            line.startswith(f"| {name} |") and line.replace("  ", " ").endswith(ending)
            for line in lines
        ), f"{page} has no row: | {name} |{ending}"


def test_they_answer_on_one_image() -> None:
    predictor = Predictor.open(None, devices.make_mesh(DeviceConfig()))
    image = np.asarray(Image.linear_gradient("L").resize((predictor.size,) * 2))
    (logit,) = predictor.logits(image[None])
    assert np.isfinite(logit)
    assert predictor.heat(image[None]).shape == (1, predictor.size, predictor.size)
    none = image[None][:0]
    assert predictor.logits(none).shape == (0,)
    assert predictor.heat(none).shape == none.shape


def test_weights_that_are_not_finite_give_no_answer() -> None:
    released = release.read()
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), released.members[0])
    one = replace(released, members=[broken])
    predictor = Predictor.of_release(one, devices.make_mesh(DeviceConfig()), views=1)
    seen = as_framed(np.zeros((1, released.size, released.size), np.uint8))
    with pytest.raises(InputError, match="release gives outputs that are not finite"):
        predictor.logits(seen)


def test_a_damaged_release_is_refused(tmp_path: Path) -> None:
    whole = {path.name: path.read_bytes() for path in release.SHIPPED.iterdir()}
    assert whole.keys() >= {"weights.npz", "release.json"}
    weights = bytearray(whole["weights.npz"])
    weights[len(weights) // 2] ^= 1
    (tmp_path / "release.json").write_bytes(whole["release.json"])
    (tmp_path / "weights.npz").write_bytes(weights)
    with pytest.raises(InputError, match=r"weights\.npz is damaged \(wrong checksum\)"):
        release.read(tmp_path)
    (tmp_path / "release.json").write_text("{}")
    with pytest.raises(InputError, match=r"weights\.npz is damaged"):
        release.read(tmp_path)
    with pytest.raises(InputError, match="holds no readable release"):
        release.read(tmp_path / "nowhere")


needs_radiographs = pytest.mark.skipif(not DATA.exists(), reason=f"no radiographs in {DATA}")


@needs_radiographs
@pytest.mark.slow
def test_each_network_has_the_recorded_figure_on_the_fold_that_it_never_saw() -> None:
    released = release.read()
    images, labels, fold = radiographs(released)
    recorded = released.about["figures"]["auc_by_fold"]
    assert len(released.members) == len(recorded) == released.about["folds"]["folds"] == 5
    trained = []
    for k in range(5):
        network, area = alone(released, k), recorded[k]
        held_out, seen = fold == k, fold == (k + 1) % len(recorded)
        judged = auc(network.logits(as_framed(images[held_out])), labels[held_out])
        assert judged == pytest.approx(area, abs=3e-4)
        trained.append(auc(network.logits(as_framed(images[seen])), labels[seen]))
    # On what they were trained on they do better, or the folds are others.
    assert np.mean(trained) > np.mean([recorded[k] for k in range(5)])


def alone(released: release.Release, k: int) -> Predictor:
    """One of the networks."""
    one = replace(released, members=released.members[k : k + 1])
    return Predictor.of_release(one, devices.make_mesh(DeviceConfig()))


def radiographs(released: release.Release) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images that it was made of, their labels, and in which fold each was held out."""
    split = released.about["folds"]
    assert split["validation"] == "patients"
    index = read_index(DATA)
    examples = index.split("train", "val")
    config = DataConfig(str(DATA), released.size, released.frame)
    decoded = framing.load(examples, index.source, config)
    return decoded.images, decoded.labels, grouped_folds(examples, split["folds"], split["seed"])
