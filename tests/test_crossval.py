"""Cross-validation from folds to a release that `cnnjax evaluate` takes."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import cli
from cnnjax.augment import make_views
from cnnjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    TrainConfig,
)
from cnnjax.data import cache
from cnnjax.data.index import read_index
from cnnjax.errors import InputError
from cnnjax.evaluation import shifted
from cnnjax.evaluation.predict import Predictor
from cnnjax.evaluation.rerender import GROUPS, RENDERINGS
from cnnjax.machine import devices
from cnnjax.metrics import auc
from cnnjax.networks import AUXILIARY, make_model
from cnnjax.objectives import to_float
from cnnjax.operating import fit_operating_point
from cnnjax.run import release
from cnnjax.run.workdir import Workdir, read_table

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FOLDS = 2


@pytest.fixture(scope="module")
def made(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The workdir of a cross-validation, and the release made from it."""
    folder = tmp_path_factory.mktemp("crossval")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        import crossval

        config = Config(
            workdir=folder / "run",
            data=DataConfig(root=str(tree), size=24, folds=FOLDS, cache=folder / "cache"),
            model=ModelConfig("resnet", width=4, stages=2, standardize=True, local_contrast=True),
            augment=AugmentConfig(0, 0.1, True, views=3),
            train=TrainConfig(epochs=12, batch=16, learning_rate=1e-2, ema=0.9, auxiliary=0.3),
        )
        crossval.crossvalidate(crossval.Options(config, shifted=True, release=folder / "release"))
    return folder / "run", folder / "release"


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_every_rendering_is_judged(made: tuple[Path, Path]) -> None:
    found = read(made[0] / "crossval.json")
    unknown = {name for name in RENDERINGS if name.startswith(("lungs", "aspect"))}
    assert found["sets"].keys() == {shifted.PLAIN, *RENDERINGS} - unknown
    means = []
    for group in GROUPS:
        rows = [
            row
            for name, row in found["sets"].items()
            if name != shifted.PLAIN and RENDERINGS[name].group == group
        ]
        for metric in shifted.METRICS:
            assert found["groups"][group][metric] == min(row[metric] for row in rows)
        assert 0 <= found["groups"][group]["ece"] < 0.5
        means.append(np.mean([row["auc"] for row in rows]))
    assert found["mean"]["auc"] == pytest.approx(np.mean(means))
    worst = [found["groups"][group]["auc"] for group in GROUPS]
    assert found["score"] == pytest.approx(np.mean(worst))
    assert found["plain"]["auc"]["value"] == found["sets"][shifted.PLAIN]["auc"]
    assert found["mean"]["auc"] > 0.7
    assert "in 3 views" in found["protocol"]
    assert "as they are" in found["one_view"]["protocol"]
    assert found["one_view"]["sets"].keys() == found["sets"].keys()
    assert found["one_view"]["mean"] != found["mean"]


def test_without_renderings_none_is_looked_at(made: tuple[Path, Path]) -> None:
    """Though a run has kept their logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        import crossval

        runs = [made[0] / f"fold{fold}" for fold in range(FOLDS)]
        options = crossval.Options(Workdir(runs[0]).read_config())
        mesh = devices.make_mesh(DeviceConfig())
        each = {
            fold: shifted.held_out_logits(run, mesh, [3], renderings=False)[3]
            for fold, run in enumerate(runs)
        }
        pooled, document = crossval.judge(options, each, 3)
    assert [*pooled.sets] == [*document["sets"]] == [shifted.PLAIN]
    assert "mean" not in document
    assert "renderings" not in document["points"][0]["criterion"]


def test_other_operating_points_are_told(made: tuple[Path, Path]) -> None:
    found = read(made[0] / "crossval.json")
    youden, fewest, most, nearly_all = found["points"]
    assert "Youden" in youden["criterion"]
    assert youden["threshold"] == release.read(made[1]).operating[3].probability_threshold()
    rows = {"plain": found["plain"], "mean": found["mean"]}
    rows["framing at worst"] = found["groups"]["framing"]
    for kind, row in rows.items():
        assert youden[kind] == {name: row[name] for name in shifted.METRICS[1:]}
    assert "least cost" in fewest["criterion"]
    assert fewest["mean"]["accuracy"] >= youden["mean"]["accuracy"] - 0.02
    assert nearly_all["threshold"] <= most["threshold"]
    assert nearly_all["mean"]["sensitivity"] >= most["mean"]["sensitivity"] > 0.9
    assert nearly_all["mean"]["specificity"] <= most["mean"]["specificity"]
    one_view = found["one_view"]["points"]
    assert one_view[0]["threshold"] == release.read(made[1]).operating[1].probability_threshold()


def test_the_release_gives_each_held_out_fold_the_logits_of_its_run(
    made: tuple[Path, Path], tree: Path
) -> None:
    run, packed = made
    mesh = devices.make_mesh(Config().device)
    predictor = Predictor.open(packed, mesh, views=1)
    assert len(predictor.members) == FOLDS
    assert all(AUXILIARY not in member.params for member in predictor.members)
    index = read_index(tree)
    decoded = cache.load(index.split("train", "val"), index.source, 24, folder=run.parent / "cache")
    logits = predictor.member_logits(decoded.images)
    np.testing.assert_allclose(predictor.logits(decoded.images), logits.mean(0), atol=1e-6)
    names = [e.name for e in decoded.examples]
    for fold in range(FOLDS):
        workdir = Workdir(run / f"fold{fold}")
        rows = [names.index(name) for name in workdir.read_validation().names]
        trained = Predictor.open(workdir.root, mesh, "latest", views=1)
        expected = trained.logits(decoded.images[rows])
        # float16 has eleven bits
        np.testing.assert_allclose(logits[fold][rows], expected, atol=0.02, rtol=0.02)
        # What the run wrote down is of as many views as its config says.
        written = [
            float(row["logit_last"]) for row in read_table(workdir.validation, ("logit_last",))
        ]
        several = Predictor.open(workdir.root, mesh, "latest").logits(decoded.images[rows])
        np.testing.assert_allclose(several, written, atol=1e-3)
        assert np.abs(several - expected).max() > 1e-3


def test_members_share_the_views_and_each_draws_its_own(
    made: tuple[Path, Path], tree: Path
) -> None:
    """Of a release of two equal networks, each judges two of three views."""
    released = release.read(made[1])
    twins = replace(released, members=(released.members[0],) * 2)
    mesh = devices.make_mesh(DeviceConfig())
    predictor = Predictor.of_release(twins, mesh)
    assert predictor.views == 3
    index = read_index(tree)
    images = cache.load(index.split("test"), index.source, 24).images[:5]
    found = predictor.member_logits(images)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    model = make_model(released.model)
    variables = jax.tree.map(lambda x: x.astype(np.float32), released.members[0])
    draw_views = jax.jit(make_views(released.augment, 2))
    apply = jax.jit(functools.partial(model.apply, train=False))
    for draw in range(2):
        seen = draw_views(jax.random.key(draw), to_float(jnp.array(images)))
        each = [apply(variables, seen[:, i]) for i in range(2)]
        np.testing.assert_allclose(found[draw], np.mean(each, axis=0), atol=2e-3)


def test_more_members_than_views_draw_some_all_the_same(
    made: tuple[Path, Path], tree: Path
) -> None:
    released = release.read(made[1])
    many = replace(released, members=(released.members[0],) * 4)
    images = cache.load(read_index(tree).split("test"), read_index(tree).source, 24).images[:5]
    mesh = devices.make_mesh(DeviceConfig())
    in_views, alone = (
        Predictor.of_release(many, mesh, views=views).logits(images) for views in (3, 1)
    )
    assert np.abs(in_views - alone).max() > 1e-3


def test_images_of_another_size_or_type_are_refused(made: tuple[Path, Path]) -> None:
    predictor = Predictor.open(made[1], devices.make_mesh(DeviceConfig()))
    for images in (np.zeros((2, 25, 24), np.uint8), np.zeros((2, 24, 24), np.float32)):
        with pytest.raises(ValueError, match=r"must be uint8 \[n, 24, 24\], got"):
            predictor.logits(images)


def test_the_official_split_is_no_cross_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import crossval

    with pytest.raises(InputError, match="official has no folds"):
        crossval.Options(Config(data=DataConfig(validation="official")))
    with pytest.raises(InputError, match=r"--train\.patience lets the held-out images choose"):
        crossval.Options(Config(train=TrainConfig(patience=3)))


def test_evaluate_takes_a_release(
    made: tuple[Path, Path], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "metrics.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--run", str(made[1]), "--data", str(tree), "--json", str(out)])
    assert ended.value.code == 0
    points = release.read(made[1]).operating
    assert points.keys() == {1, 3}
    assert read(out)["threshold"] == points[3].probability_threshold()
    assert "over all renderings" in points[3].criterion
    command = ["evaluate", "--run", str(made[1]), "--data", str(tree), "--json", str(out)]
    with pytest.raises(SystemExit):
        cli.main([*command, "--views", "1"])
    assert read(out)["threshold"] == points[1].probability_threshold()
    assert "a release was trained on" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command, "--split", "train"])
    assert "a release was trained on all of train and val" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--views", "2"])
    assert ended.value.code == 2
    assert "has an operating point for 1 or 3 views of an image" in capsys.readouterr().err


def test_the_operating_point_is_fitted_on_other_parts() -> None:
    """Parts whose logits are offset by a constant: a point of the part itself would do well."""
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 100)
    logits = rng.normal(4.0 * labels, 1.0)
    offset = np.repeat([0.0, 10.0], 100)
    held_out = shifted.HeldOut(
        labels,
        tuple(map(str, range(200))),
        {shifted.PLAIN: logits + offset, "blur, mild": rng.normal(1.0 * labels, 1.0) + offset},
    )
    found = shifted.judge(held_out, np.repeat([0, 1], 100), Config().operating)
    assert found["plain"]["accuracy"]["value"] == pytest.approx(0.5, abs=0.05)
    again = shifted.judge(held_out, np.tile([0, 0, 1, 1], 50), Config().operating)
    assert again["sets"]["blur, mild"]["auc"] < again["plain"]["auc"]["value"]
    logits_alone = replace(held_out, sets={shifted.PLAIN: logits})
    alone = shifted.judge(logits_alone, np.tile([0, 0, 1, 1], 50), Config().operating)
    assert alone["plain"]["auc"]["value"] == pytest.approx(auc(logits, labels), abs=0.005)
    assert alone["plain"]["accuracy"]["value"] > 0.95
    assert "mean" not in alone


def test_groups_weigh_the_same_in_the_operating_point() -> None:
    """Many mild renderings of one kind do not outvote the one that another kind has."""
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 500)
    logits = rng.normal(4.0 * labels, 1.0)
    tone = {name: logits for name in RENDERINGS if RENDERINGS[name].group == "tone"}
    sets = {shifted.PLAIN: logits, **tone, "middle 0.7": logits + 3}
    point = shifted.fit_point(sets, labels, Config().operating)
    # Two thirds of the weight are at 2, one third is at 5: the least cost lies between.
    equal = np.concatenate([logits, logits, logits + 3])
    weights = fit_operating_point(equal, np.tile(labels, 3), Config().operating)
    assert point.threshold == pytest.approx(weights.threshold, abs=1e-6)
    alone = shifted.fit_point({shifted.PLAIN: logits}, labels, Config().operating)
    assert point.threshold > alone.threshold + 0.2
    assert (point.slope, point.bias) == (alone.slope, alone.bias)


def test_a_rendering_that_moves_all_logits_shows_across_renderings_alone() -> None:
    labels = np.arange(200) % 2
    logits = np.random.default_rng(0).normal(6.0 * labels, 1.0)
    some = np.where(np.arange(200) < 100, logits + 12, np.nan)
    sets = {shifted.PLAIN: logits, "middle 0.7": logits + 3, "lungs, margin 0": some}
    held_out = shifted.HeldOut(labels, tuple(map(str, range(200))), sets)
    found = shifted.judge(held_out, np.tile([0, 0, 1, 1], 50), Config().operating)
    assert found["groups"]["framing"]["auc"] > 0.99
    assert found["groups"]["framing"]["across"] < 0.01  # negatives + 12 against positives
    across = shifted.auc_across([logits, logits + 3], labels)
    assert across == auc(np.r_[logits[::2] + 3, logits[1::2]], np.repeat([0, 1], 100))


def test_films_without_a_rendering_count_in_the_others() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 100)
    logits = rng.normal(2.0 * labels, 1.0).astype(np.float32)
    some = np.where(np.arange(200) < 120, logits, np.nan)
    held_out = shifted.HeldOut(
        labels,
        tuple(map(str, range(200))),
        {shifted.PLAIN: logits, "lungs, margin 0": some, "blur, mild": logits},
    )
    found = shifted.judge(held_out, np.tile([0, 0, 1, 1], 50), Config().operating)
    expected = auc(logits[:120], labels[:120])
    # Margins of two halves of the patients are not quite comparable.
    assert found["groups"]["framing"]["auc"] == pytest.approx(expected, abs=0.02)
    assert shifted.score(held_out) == pytest.approx((expected + auc(logits, labels)) / 2)
