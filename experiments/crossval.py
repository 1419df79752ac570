"""A recipe on every patient-grouped fold; each image is judged by the network that never saw it.

    python experiments/crossval.py baseline --data.root DIR --workdir RUN

Any flag of the recipe goes here too, except --data.fold. Each fold is a run of its own in
RUN/fold0, RUN/fold1, ...; the same command goes on where it was stopped. The figures are those of
the last epoch, which the held-out fold had no part in choosing: decided at probability 0.5, and at
the threshold that was most accurate on the other folds' held-out images. They go to the screen and
to RUN/crossval.json.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import baseline
import numpy as np
import pneumonia
import tyro

from cnnjax.cli import guarded
from cnnjax.config import Config
from cnnjax.loop import fit
from cnnjax.metrics import auc, evaluate
from cnnjax.operating import most_accurate_threshold
from cnnjax.workdir import Workdir, write_json


def crossvalidate(config: Config) -> None:
    """Trains each fold, pools the out-of-fold logits, and writes and prints what they come to."""
    runs: list[Workdir] = []
    classes = ("", "")
    for fold in range(config.data.folds):
        print(f"\n--- fold {fold} of {config.data.folds}")
        run = replace(
            config, workdir=config.workdir / f"fold{fold}", data=replace(config.data, fold=fold)
        )
        classes = fit(run).classes
        runs.append(Workdir(run.workdir))

    folds = [_last_logits(run) for run in runs]
    patients = [patient for fold in folds for patient in fold.patients]
    labels = np.concatenate([fold.labels for fold in folds])
    thresholds = [
        most_accurate_threshold(
            np.concatenate([other.logits for other in folds if other is not fold]),
            np.concatenate([other.labels for other in folds if other is not fold]),
        )
        for fold in folds
    ]
    found: dict[str, Any] = {}
    for name, cuts in (("at 0.5", [0.0] * len(folds)), ("at fitted thresholds", thresholds)):
        moved = [fold.logits - cut for fold, cut in zip(folds, cuts, strict=True)]
        each = [
            evaluate(logits, fold.labels, fold.patients, replicates=0)
            for logits, fold in zip(moved, folds, strict=True)
        ]
        together = evaluate(np.concatenate(moved), labels, patients, replicates=0).to_json()
        found[name] = {
            metric: together[metric] | _spread([getattr(one, metric).value for one in each])
            for metric in ("accuracy", "sensitivity", "specificity")
        }
    pooled = evaluate(np.concatenate([fold.logits for fold in folds]), labels, patients)
    areas = [auc(fold.logits, fold.labels) for fold in folds]
    found["auc"] = pooled.to_json()["auc"] | _spread([area or 0.0 for area in areas])
    protocol = (
        f"out of fold, {config.data.folds} patient-grouped folds, last epoch, seed {config.seed}"
    )
    write_json(
        config.workdir / "crossval.json",
        {"protocol": protocol, "thresholds": thresholds, **found},
    )
    print(f"\n{protocol}; pooled, with 95 % intervals, decided at probability 0.5")
    print(pooled.report(classes))
    print("\nmean over folds and standard deviation between them")
    for name in ("at 0.5", "at fitted thresholds"):
        print(name)
        for metric, values in found[name].items():
            print(f"  {metric:<12} {values['mean']:.4f} +- {values['sd']:.4f}")
    print(f"auc            {found['auc']['mean']:.4f} +- {found['auc']['sd']:.4f}")


class _Fold(NamedTuple):
    logits: np.ndarray
    labels: np.ndarray
    patients: list[str]


def _last_logits(run: Workdir) -> _Fold:
    with run.validation.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return _Fold(
        np.array([float(row["logit_last"]) for row in rows]),
        np.array([int(row["label"]) for row in rows]),
        [row["patient"] for row in rows],
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    config = tyro.extras.overridable_config_cli(
        {
            "baseline": ("The post's recipe.", baseline.CONFIG),
            "pneumonia": ("Ours.", pneumonia.CONFIG),
        },
        description=__doc__,
    )
    crossvalidate(config)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
