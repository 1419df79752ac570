"""The hook of each epoch, and what docs/watching.md shows of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnjax.config import AugmentConfig, Config, DataConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.data.prepare import TrainingData, data_of
from cnnjax.run.events import figures_of
from cnnjax.train import fit

PAGE = Path(__file__).parents[1] / "docs" / "watching.md"
SIZE = 16


@pytest.fixture(scope="module")
def data() -> TrainingData:
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2
    images = rng.integers(0, 120, (48, SIZE, SIZE), dtype=np.uint8)
    images[labels == 1, :, : SIZE // 2] += 100
    return data_of(images, labels, np.arange(48) >= 36, ("dark", "bright"))


def config_for(run: Path, epochs: int = 4) -> Config:
    return Config(
        workdir=run,
        data=DataConfig(size=SIZE),
        model=ModelConfig("resnet", width=2, stages=1),
        augment=AugmentConfig(shear=0, zoom=0, flip=False),
        train=TrainConfig(epochs=epochs, batch=12, precision="float32"),
        device=DeviceConfig(count=1),
    )


def test_a_hook_sees_each_epoch_and_may_stop_the_run(data: TrainingData, tmp_path: Path) -> None:
    config = config_for(tmp_path / "run")
    seen: list[tuple[int, dict[str, float]]] = []

    def hook(epoch: int, figures: dict[str, float]) -> bool:
        seen.append((epoch, dict(figures)))
        figures.clear()  # is its own to change
        return epoch == 2

    result = fit(config, data=data, on_epoch=hook)
    assert result.summary["epochs"] == 2
    lines = [json.loads(x) for x in (config.workdir / "metrics.jsonl").read_text().splitlines()]
    table = result._repr_html_()
    assert "dark / bright: the last of 2 epochs" in table
    assert f"<tr><th>auc</th><td>{result.last.auc}</td></tr>" in table
    assert seen == [(line["epoch"], figures_of(line)) for line in lines]
    assert {"learning_rate", "train/loss", "validation/auc"} <= seen[0][1].keys()
    assert json.loads((config.workdir / "summary.json").read_text())["epochs"] == 2

    # Gone on with, and never stopped: the same.
    seen.clear()
    fit(config, data=data, on_epoch=lambda epoch, figures: seen.append((epoch, figures)))
    assert [epoch for epoch, _ in seen] == [3, 4]
    whole = config_for(tmp_path / "whole")
    fit(whole, data=data)
    for name in ("metrics.jsonl", "validation.csv", "summary.json"):
        assert (config.workdir / name).read_bytes() == (whole.workdir / name).read_bytes()


def test_a_hook_that_raises_leaves_a_run_to_be_resumed(data: TrainingData, tmp_path: Path) -> None:
    class Pruned(Exception):
        pass

    def prune(epoch: int, figures: dict[str, float]) -> None:
        raise Pruned

    config = config_for(tmp_path / "run", epochs=2)
    with pytest.raises(Pruned):
        fit(config, data=data, on_epoch=prune)
    assert not (config.workdir / "summary.json").exists()
    epochs: list[int] = []
    fit(config, data=data, on_epoch=lambda epoch, _: epochs.append(epoch))
    assert epochs == [2]


def shown(kind: str) -> str:
    """The page's code of a kind."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    return "".join(blocks)


@pytest.fixture
def page(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Any]]:
    shutil.copytree(tree, tmp_path / "chest_xray")
    monkeypatch.chdir(tmp_path)

    def run(kind: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(compile(shown("python"), str(PAGE), "exec"), names)
        exec(compile(shown(f"python {kind}"), str(PAGE), "exec"), names)
        return names

    return run


@pytest.mark.filterwarnings("ignore")  # of the packages that it needs
def test_mlflow_is_told(
    page: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    page("mlflow")
    (run,) = mlflow.search_runs(output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation/auc")
    lines = (tmp_path / "runs" / "mlflow" / "metrics.jsonl").read_text().splitlines()
    assert [each.value for each in history] == [json.loads(x)["validation"]["auc"] for x in lines]


@pytest.mark.filterwarnings("ignore")
def test_optuna_prunes(page: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    study = page("optuna")["study"]
    assert len(study.trials) == 3
    ended = {i for i in range(3) if (tmp_path / f"runs/optuna/{i}/summary.json").exists()}
    assert ended == {t.number for t in study.trials if t.state.name == "COMPLETE"}
