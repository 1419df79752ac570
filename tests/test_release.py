"""The weights that come with the package are those that the model card speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax.config import DataConfig, DeviceConfig
from cnnjax.data import framing
from cnnjax.data.index import read_index
from cnnjax.data.patients import grouped_folds
from cnnjax.errors import InputError
from cnnjax.evaluation import release
from cnnjax.evaluation.predict import Predictor
from cnnjax.lungs import as_framed
from cnnjax.machine import devices
from cnnjax.metrics import auc

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "chest_xray"


def test_they_are_small_and_hold_no_pickles() -> None:
    files = list(release.SHIPPED.iterdir())
    assert sum(path.stat().st_size for path in files) < 6 * 2**20
    released = release.read()
    assert released.classes == ("NORMAL", "PNEUMONIA")
    card = (ROOT / "MODEL_CARD.md").read_text("utf-8")
    figures = released.about["figures"]
    assert f"{figures['auc_mean']:.4f}" in card
    for name in ("accuracy", "sensitivity", "specificity"):
        low, high = figures["plain"][name]["ci95"]
        assert f"{figures['plain'][name]['value']:.3f} [{low:.3f}, {high:.3f}]" in card


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
@pytest.mark.parametrize("of", [(3,), pytest.param(range(5), id="all", marks=pytest.mark.slow)])
def test_a_network_has_the_recorded_figure_on_the_fold_that_it_never_saw(of: Sequence[int]) -> None:
    released = release.read()
    images, labels, fold = radiographs(released)
    recorded = released.about["figures"]["auc_by_fold"]
    assert len(released.members) == len(recorded) == released.about["folds"]["folds"] == 5
    trained = []
    for k in of:
        network, area = alone(released, k), recorded[k]
        held_out, seen = fold == k, fold == (k + 1) % len(recorded)
        judged = auc(network.logits(as_framed(images[held_out])), labels[held_out])
        assert judged == pytest.approx(area, abs=3e-4)
        trained.append(auc(network.logits(as_framed(images[seen])), labels[seen]))
    # On what they were trained on they do better, or the folds are others.
    assert np.mean(trained) > np.mean([recorded[k] for k in of])


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
