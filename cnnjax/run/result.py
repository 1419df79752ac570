"""The results of a finished run: its evaluation and the files that it leaves."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from cnnjax import metrics
from cnnjax.data.prepare import TrainingData, protocol
from cnnjax.logits import make_logits
from cnnjax.machine import processes
from cnnjax.machine.files import write_atomically, write_rows
from cnnjax.objectives import Binary, Softmax
from cnnjax.operating import evaluate_at, fit_operating_point, points_to_json
from cnnjax.phantom import DRAWN
from cnnjax.run.checkpoint import KINDS, Kind
from cnnjax.run.training import Run
from cnnjax.run.workdir import write_json


@dataclass(frozen=True)
class Result:
    """Results of a finished run, as in its `summary.json`."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of their labels from 0."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    evaluations: dict[str, metrics.Evaluation]
    """Evaluations of the checkpoints `best` and `latest`. Empty for objectives other than
    `cnnjax.objectives.Binary` and `Softmax`; their figures are in `summary`."""

    @property
    def best(self) -> metrics.Evaluation:
        """Evaluation of the best checkpoint at its operating point.

        It is slightly optimistic: the same held-out images selected the checkpoint and the
        operating point.
        """
        return self.evaluations["best"]

    @property
    def last(self) -> metrics.Evaluation:
        """Evaluation of the last epoch at its operating point, on the same held-out images.

        These images selected the operating point, but not the epoch (except with early stopping,
        --train.patience).
        """
        return self.evaluations["latest"]

    def _repr_html_(self) -> str:
        """Returns the last epoch's metrics as an HTML table, for notebooks."""
        told = f"{' / '.join(self.classes)}: the last of {self.summary['epochs']} epochs"
        figures = self.last._repr_html_() if self.evaluations else str(self.summary["last"])
        return f"<p>{html.escape(told)}</p>{figures}"


def conclude(run: Run) -> Result:
    """Evaluates the best and the last state, and writes the remaining files of the run."""
    config, data, workdir = run.config, run.data, run.workdir
    labels, each = data.labels[data.validation], _outputs_of(run)
    outputs = each[config.augment.views]
    summary: dict[str, Any] = {
        "protocol": protocol(config.data, config.seed),
        "train_images": len(data.train),
        "validation_images": len(data.validation),
        "parameters": run.parameters,
        "epochs": run.history[-1]["epoch"],
        "views": config.augment.views,
        "best_epoch": run.best,
        "notes": [DRAWN] if workdir.read_drawn() else [],
    }
    workdir.write_config(config)
    run.checkpoints.drop("within")
    if not isinstance(run.objective, Binary | Softmax):
        figures = {kind: run.objective.figures(out, labels) for kind, out in outputs.items()}
        summary |= {"best": figures["best"], "last": figures["latest"]}
        write_json(workdir.summary, summary)
        return Result(data.classes, summary, {})
    points = {
        kind: {
            views: fit_operating_point(out[kind], labels, config.operating)
            for views, out in each.items()
        }
        for kind in KINDS
    }
    patients = data.decoded.examples.take(data.validation).patients
    judged: dict[str, metrics.Evaluation] = {}
    off = processes.no_bars()
    for kind, out in tqdm(outputs.items(), "intervals", leave=False, disable=off):
        point = points[kind][config.augment.views]
        judged[kind] = evaluate_at(point, out, labels, patients)
    several = isinstance(run.objective, Softmax)
    _write_validation(workdir.validation, data, outputs, several)
    rules = processes.on_main(lambda: _trivial_rules(data))
    undecided = {kind: metrics.at_zero(out, labels) for kind, out in outputs.items()}
    summary |= {
        "best": judged["best"].to_json(),
        "last": judged["latest"].to_json(),
        "rules": rules,
    }
    if not several:
        # At probability 0.5 of the uncalibrated network, as in metrics.jsonl.
        summary["at_0.5"] = {"best": undecided["best"], "last": undecided["latest"]}
    found = undecided["latest"]
    if found["accuracy"] <= rules["majority_accuracy"]:
        summary["notes"].append(
            f"on the held-out images the last epoch (accuracy {found['accuracy']:.4f}"
            f"{'' if several else ' at its probability 0.5'}, AUC {found['auc']:.4f}) is no"
            " better than always predicting the most frequent class (accuracy"
            f" {rules['majority_accuracy']:.4f}): training was too short, or diverged; start"
            " a new run (--workdir) with more --train.epochs, or a lower"
            " --train.learning-rate"
        )
    for note in summary["notes"]:
        print(textwrap.fill(f"note: {note}", 80, break_on_hyphens=False))
    write_json(workdir.operating, {kind: points_to_json(each) for kind, each in points.items()})
    write_json(workdir.summary, summary)
    return Result(data.classes, summary, judged)


def _outputs_of(run: Run) -> dict[int, dict[Kind, np.ndarray]]:
    """Returns the outputs for the held-out images, by number of views and by kind of checkpoint."""
    looks, rows, feeder = run.config.augment.looks, run.data.validation, run.feeder()
    states = {kind: run.restored(kind) for kind in KINDS}
    each: dict[int, dict[Kind, np.ndarray]] = {views: {} for views in looks}
    with tqdm(total=len(looks) * len(KINDS), leave=False, disable=processes.no_bars()) as bar:
        for views in looks:
            outputs_of = make_logits(run.network, run.mesh, views, run.config.augment)
            for kind, state in states.items():
                bar.set_description(f"evaluating the {kind} epoch, views: {views}")
                each[views][kind] = outputs_of(state, feeder, rows)
                bar.update()
    return each


def _write_validation(
    path: Path, data: TrainingData, outputs: dict[Kind, np.ndarray], several: bool
) -> None:
    """Writes the logits of the held-out images at the best and the last epoch, as CSV.

    Args:
        path: the file.
        data: the images, with their split.
        outputs: float [n], or [n, K] for several logits, by kind of checkpoint.
        several: whether there is a logit for each class.
    """
    if not processes.is_main():
        return
    columns = [f"_{name}" for name in data.classes] if several else [""]
    logits = [f"logit_{epoch}{column}" for epoch in ("best", "last") for column in columns]
    both = np.hstack([outputs[k].reshape(len(data.validation), -1) for k in ("best", "latest")])
    with write_atomically(path) as file:
        write_rows(file, [["image", "patient", "label", *logits]])
        held_out = data.decoded.examples.take(data.validation)
        for e, row in zip(held_out, both.tolist(), strict=True):
            write_rows(file, [[e.name, e.patient, e.label, *row]])


def _trivial_rules(data: TrainingData) -> dict[str, float]:
    """Returns baselines without a network: accuracy of the largest class, AUC of mean brightness.

    With three or more classes the AUC is the mean over the classes, each against the rest.
    """
    labels = data.labels
    brightness = data.decoded.brightness

    def area(label: int, rows: np.ndarray) -> float:
        return metrics.auc(brightness[rows], labels[rows] == label) or 0.0

    areas = []
    for label in (1,) if len(data.classes) == 2 else range(len(data.classes)):
        # The training images decide whether brighter means positive.
        validated = area(label, data.validation)
        areas.append(validated if area(label, data.train) >= 0.5 else 1 - validated)
    largest = np.bincount(labels[data.train]).argmax()
    return {
        "majority_accuracy": float(np.mean(labels[data.validation] == largest)),
        "brightness_auc": float(np.mean(areas)),
    }
