"""Comparison of finished runs on one HTML page: `compare`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax import metrics
from cnnjax.config import flags
from cnnjax.errors import InputError
from cnnjax.machine.files import write_atomically
from cnnjax.metrics import Estimate, Evaluation
from cnnjax.operating import evaluate_at
from cnnjax.phantom import DRAWN
from cnnjax.report import plots
from cnnjax.report.template import render
from cnnjax.run.workdir import Workdir, read_lines

MOST = 8  # runs whose curves can be told apart


@dataclass(frozen=True)
class Run:
    """Results of a finished run, read from its workdir."""

    name: str
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    settings: dict[str, Any]
    """Every flag with its value."""
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    names: list[str]
    """Names of the n held-out images; `patients`, `labels` and `margins` have the same order."""
    patients: list[str]
    """Patient IDs."""
    labels: np.ndarray
    """int [n]."""
    margins: np.ndarray
    """Predictions of the best epoch. For two classes, float [n], log-odds minus those of the
    threshold of the run's operating point; for K classes, log-probabilities [n, K]."""
    found: Evaluation
    """Metrics at the run's operating point."""
    notes: list[str]
    """Warnings to show with the results."""
    seconds: float
    """Total time of training and validation."""
    speed: float
    """Training speed in images per second, the median over epochs."""


def read(folder: Path, name: str) -> Run:
    """Reads the results of a finished run.

    Args:
        folder: the workdir.
        name: name of the run on the page.

    Raises:
        InputError: there is no run, or it has not finished.
    """
    workdir = Workdir(folder)
    config = workdir.read_config()
    workdir.expect_ended()
    held_out = workdir.read_validation()
    summary = workdir.read_summary()
    notes = summary.get("notes", [DRAWN] if workdir.read_drawn() else [])
    point = workdir.read_operating("best")[config.augment.views]
    speeds = read_lines(workdir.throughput)
    return Run(
        name=name,
        classes=workdir.read_classes(),
        settings=flags(config),
        summary=summary,
        history=read_lines(workdir.metrics),
        names=held_out.names,
        patients=held_out.patients,
        labels=held_out.labels,
        margins=point.margins(held_out.logits),
        found=evaluate_at(point, held_out.logits, held_out.labels, held_out.patients),
        notes=notes,
        seconds=sum(line["train_seconds"] + line["validation_seconds"] for line in speeds),
        speed=float(np.median([line["images_per_second"] for line in speeds])),
    )


def differences(first: Run, other: Run) -> dict[str, Estimate] | None:
    """Returns the metrics of `other` minus those of `first`, with intervals, by metric.

    None if their held-out images differ.
    """
    images, others = (
        list(zip(run.names, run.labels.tolist(), run.patients, strict=True))
        for run in (first, other)
    )
    order, theirs = (sorted(range(len(some)), key=some.__getitem__) for some in (images, others))
    if [images[i] for i in order] != [others[i] for i in theirs]:
        return None
    return metrics.paired_differences(
        first.margins[order],
        other.margins[theirs],
        first.labels[order],
        [first.patients[i] for i in order],
    )


def _notes(runs: Sequence[Run]) -> list[str]:
    """Returns each distinct note, preceded by the names of its runs."""
    said = []
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        names = [run.name for run in runs if note in run.notes]
        said.append(f"{'all' if len(names) == len(runs) else ', '.join(names)}: {note}")
    return said


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares finished runs, each on its own held-out images.

    Args:
        folders: workdirs of the runs, at least two.
        out: the output file.

    Returns:
        The path of the page.

    Raises:
        InputError: a run does not exist or has not finished, the runs have different classes, or
            there are more than `MOST` runs.
    """
    if len(folders) > MOST:
        raise InputError(f"{len(folders)} runs are too many for one page; give at most {MOST}")
    shared = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    runs = [read(folder, str(folder.absolute().relative_to(shared))) for folder in folders]
    if len({(run.classes, run.margins.ndim) for run in runs}) > 1:
        raise InputError("the runs have different classes and cannot be compared")
    differing = [
        flag
        for flag in runs[0].settings
        if flag != "--workdir" and len({str(run.settings[flag]) for run in runs}) > 1
    ]
    figures = {
        "progress": plots.progress([(run.name, run.history) for run in runs]),
        "forest": plots.forest([(run.name, run.found) for run in runs]),
    }
    if runs[0].margins.ndim == 1:
        figures["roc"] = plots.rocs([(run.name, run.margins, run.labels) for run in runs])
    page = render(
        "comparison.html.jinja",
        figures,
        runs=runs,
        differing=differing,
        notes=_notes(runs),
        against=[differences(runs[0], run) for run in runs[1:]],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(out) as file:
        file.write(page)
    return out
