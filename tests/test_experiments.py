"""The studies run on a small tree, and their tables say what their runs found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    TrainConfig,
)
from cnnjax.errors import InputError
from cnnjax.run.workdir import Workdir

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)


@pytest.mark.usefixtures("_scripts")
def test_every_variant_of_the_ablation_differs_from_the_recipe() -> None:
    import ablation
    import pneumonia

    variants = ablation.variants(pneumonia.CONFIG)
    recipe = variants.pop(ablation.RECIPE)
    assert recipe == pneumonia.CONFIG
    assert variants["whole-films"].data.frame == variants["release-1"].data.frame == "whole"
    assert len({recipe, *variants.values()}) == 1 + len(variants)
    changed = replace(pneumonia.CONFIG, device=DeviceConfig("cpu"))
    assert ablation.variants(changed)[ablation.POST].device == DeviceConfig("cpu")
    with pytest.raises(InputError, match="--only nothing: the variants are recipe, whole-films"):
        ablation.Options(only=("nothing",))
    with pytest.raises(InputError, match=r"--data\.fold has no effect here"):
        ablation.Options(replace(pneumonia.CONFIG, data=DataConfig(fold=1)))


@pytest.mark.slow
@pytest.mark.usefixtures("_scripts")
def test_ablation_makes_a_table_and_goes_on_where_it_was(tree: Path, tmp_path: Path) -> None:
    import ablation

    config = Config(
        workdir=tmp_path / "runs",
        data=DataConfig(root=str(tree), size=20, folds=3, cache=tmp_path / "cache"),
        model=ModelConfig("resnet", width=4, stages=1),
        augment=AugmentConfig(0, 0, True),
        train=TrainConfig(epochs=1, batch=16),
    )
    options = ablation.Options(config, seeds=(0,), only=("recipe", "with-mixup"))
    rows = ablation.ablate(options)
    assert [(row["variant"], row["validation"]) for row in rows] == [
        ("recipe", "patients"),
        ("with-mixup", "patients"),
        ("recipe", "blocks"),
        ("with-mixup", "blocks"),
    ]
    worst = [group["auc"] for group in rows[0]["groups"].values()]
    assert rows[0]["score"] == pytest.approx(sum(worst) / len(worst))
    assert rows[0]["score"] <= rows[0]["mean"]["auc"]
    configs = {
        (path.parent.parent.name, path.parent.name): json.loads(path.read_text())
        for path in (tmp_path / "runs").glob("*/*/config.json")
    }
    assert configs["with-mixup", "blocks-0"]["train"]["mixup"] == 0.2
    assert configs["recipe", "blocks-0"]["data"]["fold"] == 2
    written = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("throughput.jsonl")}
    assert ablation.ablate(options) == rows
    assert written == {path: path.read_bytes() for path in written}  # nothing was trained again
    lines = ablation.table(rows).splitlines()
    assert len(lines) == 2 + 4
    assert f"{rows[0]['score']:.4f}" in lines[2]
    pair = [{**row, "seed": seed} for row in rows[:2] for seed in (0, 1)]
    pair[3] = {**pair[3], "score": pair[3]["score"] + 0.02}
    apart = rows[1]["score"] - rows[0]["score"] + 0.01
    assert f"| {apart:+.4f} ± 0.0100 |" in ablation.table(pair).splitlines()[3]
    ablation.draw(rows, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.usefixtures("_scripts")
def test_shortcuts_finds_the_file_that_gives_the_class_away(tree: Path, tmp_path: Path) -> None:
    import shortcuts

    found = {row["what"]: row for row in shortcuts.single_numbers("as given", tree)}
    assert found["width"]["auc"] == 0.5  # all have the same
    assert found["mean gray level"]["auc"] == 1  # here alone; so its draws tell no interval
    assert found["mean gray level"]["ci95"] == []
    low, high = found["file size"]["ci95"]
    assert 0.5 < low < found["file size"]["auc"] < high < 1
    options = shortcuts.Options(tree, workdir=tmp_path, epochs=2)
    rows = shortcuts.networks(options)
    assert [row["what"] for row in rows] == [f"network, {name}" for name in shortcuts.VIEWS]
    shortcuts.draw(rows, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


@pytest.mark.usefixtures("_scripts")
def test_a_learning_rate_is_looked_for(tree: Path, tmp_path: Path) -> None:
    import lr_range

    config = Config(
        data=DataConfig(root=str(tree), size=20, cache=tmp_path / "cache"),
        model=ModelConfig("baseline", standardize=True),
        augment=AugmentConfig(0, 0, False),
        train=TrainConfig(batch=16, label_smoothing=0.2),
        device=DeviceConfig("cpu", 1),
    )
    options = lr_range.Options(config, low=1e-5, high=10, steps=100)
    found = lr_range.find_range(options)
    assert found["rates"][0] == pytest.approx(1e-5)
    assert found["rates"][1] / found["rates"][0] == pytest.approx(1e6 ** (1 / 99), rel=1e-3)
    assert len(found["losses"]) == len(found["rates"]) <= 100
    assert found["rates"][0] < found["steepest"] <= found["least"] < found["rates"][-1]
    assert min(found["smooth"]) < 0.9 * found["smooth"][0]
    assert lr_range.draw(found).startswith("<svg")
    with pytest.raises(InputError, match="--low must be positive"):
        lr_range.Options(low=1.0, high=0.1)


@pytest.mark.usefixtures("_scripts")
def test_a_subset_of_the_pool_has_its_shares() -> None:
    import finetune

    labels = np.arange(1000) % 4 == 0
    order = finetune.drawn(labels.astype(int), 400, seed=1)
    assert len(set(order.tolist())) == 400
    for size in (8, 40, 400):
        assert labels[order[:size]].sum() == size // 4
    assert set(order) != set(finetune.drawn(labels.astype(int), 400, seed=2))


@pytest.mark.slow
@pytest.mark.usefixtures("_scripts")
def test_fine_tuning_is_compared_on_images_that_no_network_saw(tree: Path, tmp_path: Path) -> None:
    import finetune

    config = Config(
        workdir=tmp_path / "runs",
        data=DataConfig(
            root=str(tree), size=16, folds=2, validation="blocks", cache=tmp_path / "cache"
        ),
        model=ModelConfig("resnet", width=4, stages=1),
        augment=AugmentConfig(0, 0, False),
        train=TrainConfig(epochs=4, batch=8),
        device=DeviceConfig("cpu", 1),
    )
    options = finetune.Options(config, sizes=(4, 8), seeds=2, steps=10)
    document = finetune.compare(options)
    assert list(document["sizes"]) == ["4", "8"]
    row = document["sizes"]["8"]
    means = {arm: row[arm]["auc"]["value"] for arm in finetune.ARMS}
    assert row["gain"]["auc"]["value"] == pytest.approx(means["fine-tuned"] - means["from scratch"])
    low, high = row["gain"]["auc"]["ci95"]
    assert low <= row["gain"]["auc"]["value"] <= high
    trained = Workdir(tmp_path / "runs" / "pretrained")
    for seed in (0, 1):
        few = Workdir(tmp_path / "runs" / "fine-tuned" / f"8-{seed}").read_split()
        names = {row["image"].partition("/")[2] for row in few if row["role"] == "train"}
        assert len(names) == 8
        assert trained.trained_on(row["image"].partition("/")[2] for row in few) == 0
    # Given again, it trains nothing; and a run that saw the block is refused.
    assert finetune.compare(options) == document
    other = replace(config, workdir=tmp_path / "other", data=replace(config.data, fold=1))
    with pytest.raises(InputError, match=r"was trained on \d+ images of the block"):
        finetune.compare(replace(options, config=other, init=trained.root))
