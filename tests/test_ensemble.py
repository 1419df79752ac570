"""Members trained in one compiled step are those that are trained alone."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnjax.config import Config, DataConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.machine import devices
from cnnjax.run import checkpoint
from cnnjax.train import fit

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def ensemble(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("ensemble")


def configs(tree: Path, where: Path, name: str, count: int, folds: tuple[int, ...]) -> list[Config]:
    return [
        Config(
            workdir=where / f"member{fold}",
            seed=fold,
            data=DataConfig(root=str(tree), size=20, folds=3, fold=fold),
            model=ModelConfig(name, width=4, stages=2),  # type: ignore[arg-type]
            train=TrainConfig(epochs=2, batch=10, ema=0.9, auxiliary=0.3),
            device=DeviceConfig(count=count),
        )
        for fold in folds
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "folds"),
    [
        ("baseline", 3, (0, 2)),  # two of the devices take a member each
        ("resnet", 2, (0, 1, 2)),  # one of the two computes one member, and another once more
    ],
)
def test_members_trained_together_are_those_trained_alone(
    ensemble: Any,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    count: int,
    folds: tuple[int, ...],
) -> None:
    monkeypatch.setitem(devices.TRAITS, "cpu", replace(devices.TRAITS["cpu"], steps=4))
    together = ensemble.fit_together(configs(tree, tmp_path / "together", name, count, folds))
    alone = [fit(config) for config in configs(tree, tmp_path / "alone", name, count, folds)]
    for fold, a, b in zip(folds, together, alone, strict=True):
        assert a.last.auc.value == pytest.approx(b.last.auc.value, abs=0.02)
        one, other = (
            np.loadtxt(
                tmp_path / where / f"member{fold}" / "validation.csv",
                delimiter=",",
                skiprows=1,
                usecols=(4,),
            )
            for where in ("together", "alone")
        )
        np.testing.assert_allclose(one, other, atol=5e-3)


@pytest.mark.slow
def test_members_killed_apart_catch_up(ensemble: Any, tree: Path, tmp_path: Path) -> None:
    """One member is an epoch behind, as when the process dies between the two checkpoints."""
    whole, killed = (
        configs(tree, tmp_path / where, "baseline", 1, (0, 1)) for where in ("whole", "killed")
    )
    ensemble.fit_together(whole)
    write = checkpoint.Checkpoints._write
    with pytest.MonkeyPatch.context() as patch:

        def dying(self: checkpoint.Checkpoints, kind: Any, epoch: int, *rest: Any) -> None:
            if epoch == 2 and kind == "latest" and "/member1/" in str(self.folder):
                raise KeyboardInterrupt
            write(self, kind, epoch, *rest)

        patch.setattr(checkpoint.Checkpoints, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            ensemble.fit_together(killed)
    ensemble.fit_together(killed)
    for member in ("member0", "member1"):
        lines = (tmp_path / "killed" / member / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
        one, other = (
            json.loads((tmp_path / where / member / "summary.json").read_text())["last"]["auc"]
            for where in ("whole", "killed")
        )
        assert one["value"] == pytest.approx(other["value"], abs=0.02)
