"""The weights that come with the package are those that the model card speaks of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnjax import devices, release
from cnnjax.config import DeviceConfig
from cnnjax.data import cache
from cnnjax.data.index import read_index
from cnnjax.data.patients import grouped_folds
from cnnjax.metrics import auc
from cnnjax.predict import Predictor

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


@pytest.mark.skipif(not DATA.exists(), reason=f"no radiographs in {DATA}")
def test_each_network_has_the_recorded_figure_on_the_fold_that_it_never_saw() -> None:
    released = release.read()
    split = released.about["folds"]
    assert split["validation"] == "patients"
    index = read_index(DATA)
    examples = index.split("train", "val")
    fold = grouped_folds(examples, split["folds"], split["seed"])
    decoded = cache.load(examples, index.source, released.size)
    mesh = devices.make_mesh(DeviceConfig())
    predictor = Predictor.of_release(released, mesh, views=1)
    logits = predictor.member_logits(decoded.images)
    figures = released.about["figures"]
    recorded = figures["one_view"]["auc_by_fold"]
    assert len(logits) == len(recorded) == split["folds"]
    trained = []
    for k, area in enumerate(recorded):
        held_out = fold == k
        assert auc(logits[k][held_out], decoded.labels[held_out]) == pytest.approx(area, abs=3e-4)
        trained.append(auc(logits[k][~held_out], decoded.labels[~held_out]))
    # On what they were trained on they do better, or the folds are others.
    assert np.mean(trained) > np.mean(recorded)
    # The first network by itself takes all the views.
    one = Predictor.of_release(replace(released, members=released.members[:1]), mesh)
    held_out = fold == 0
    judged = auc(one.logits(decoded.images[held_out]), decoded.labels[held_out])
    assert judged == pytest.approx(figures["auc_by_fold"][0], abs=3e-4)
