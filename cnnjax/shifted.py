"""How a run does on its held-out images as they are, and on each re-rendering of them.

One operating point serves all of them, as it would at a bedside where nobody knows how an image
was made. It is fitted on other images than it is judged on, re-rendered ones among them: on images
as they are, nearly everything is right and many thresholds do equally well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cnnjax.config import OperatingConfig
from cnnjax.data import cache, rerender
from cnnjax.data.prepare import TrainingData, open_index, training_data
from cnnjax.errors import InputError
from cnnjax.metrics import AT_ZERO, at_zero, evaluate
from cnnjax.operating import OperatingPoint, fit_operating_point
from cnnjax.predict import Predictor
from cnnjax.workdir import Workdir

PLAIN = "as they are"
"""Name of the rendering that changes nothing."""

_MADE_FROM = "made from"  # beside the renderings, in the file of logits that are kept

METRICS = AT_ZERO


@dataclass(frozen=True)
class HeldOut:
    """Logits of a run's held-out images."""

    labels: np.ndarray
    """int [n]."""
    patients: tuple[str, ...]
    sets: dict[str, np.ndarray]
    """float32 [n] by rendering; `PLAIN` is one of them."""


def held_out_logits(
    run: Path, mesh: Mesh, views: int | None = None, *, renderings: bool = True
) -> HeldOut:
    """Returns what a finished run's last state says of its held-out images, in every rendering.

    It is written to the run's `shifted-VIEWS.npz`, and read from there the next time.

    Args:
        run: its workdir.
        mesh: the devices to use.
        views: how many views of each image to judge; by default as the run's config says.
        renderings: whether the changed ones are wanted too.

    Raises:
        InputError: the run or its images are not there any more.
    """
    workdir = Workdir(run)
    config = workdir.read_config()
    data = training_data(config.data, config.seed, lambda _: None)
    rows = data.validation
    names = np.array([data.decoded.examples[i].name for i in rows])
    labels = data.decoded.labels[rows]
    patients = tuple(data.decoded.examples[i].patient for i in rows)
    views = config.augment.views if views is None else views
    kept = run / f"shifted-{views}.npz"
    made_from = np.array([data.decoded.fingerprint, str(rerender.VERSION), *names])
    if kept.exists():
        with np.load(kept) as file:
            sets = {name: file[name] for name in file.files}
        if np.array_equal(sets.pop(_MADE_FROM, ()), made_from):
            if not renderings:
                return HeldOut(labels, patients, {PLAIN: sets[PLAIN]})
            if len(sets) > 1:
                return HeldOut(labels, patients, sets)
    predictor = Predictor.of_run(run, mesh, "latest", views)
    sets = {PLAIN: predictor.logits(np.asarray(data.decoded.images[rows]))}
    for name, images in (_renderings(run, data) if renderings else {}).items():
        sets[name] = predictor.logits(np.asarray(images[rows]))
    partial = kept.with_suffix(".partial.npz")
    np.savez(partial, **(sets | {_MADE_FROM: made_from}))
    partial.replace(kept)
    return HeldOut(labels, patients, sets)


def _renderings(run: Path, data: TrainingData) -> dict[str, np.ndarray]:
    config = Workdir(run).read_config().data
    index = open_index(replace(config, size=rerender.SIZE), lambda _: None)
    examples = index.split("train", "val")
    decoded = cache.load(examples, index.source, rerender.SIZE, folder=config.cache)
    if decoded.examples != data.decoded.examples:
        raise InputError(f"{run}: other images can be decoded than it was trained on")
    return rerender.load(decoded, config.size, config.cache)


def fit_point(
    sets: Mapping[str, np.ndarray], labels: np.ndarray, config: OperatingConfig
) -> OperatingPoint:
    """Returns the point whose threshold serves every rendering.

    What a probability means in a place is for images of that place to say, so slope and bias are
    fitted on the images as they are.

    Args:
        sets: logits [n] by rendering, `PLAIN` among them.
        labels: int [n].
        config: by what the threshold is chosen.
    """
    plain = fit_operating_point(sets[PLAIN], labels, config)
    if len(sets) == 1:
        return plain
    every = fit_operating_point(
        np.concatenate([*sets.values()]), np.tile(labels, len(sets)), config
    )
    return replace(
        plain, threshold=every.threshold, criterion=f"{every.criterion}, re-rendered too"
    )


def judge(held_out: HeldOut, parts: np.ndarray, config: OperatingConfig) -> dict[str, Any]:
    """Judges every rendering at an operating point that saw none of the judged patients.

    Args:
        held_out: n images' logits.
        parts: int [n]; each part is judged at the point fitted on the images of the others, in all
            renderings. Parts do not divide patients.
        config: by what the threshold is chosen.

    Returns:
        A document of plain JSON: `sets`, the AUC, accuracy, sensitivity and specificity on each
        rendering; `mean` and `worst` of each over the changed ones; `plain`, the metrics on the
        images as they are, with intervals.
    """
    labels = held_out.labels
    moved = {name: np.empty(len(labels)) for name in held_out.sets}
    calibrated = np.empty(len(labels))
    for part in np.unique(parts):
        inside = parts == part
        others = {name: logits[~inside] for name, logits in held_out.sets.items()}
        point = fit_point(others, labels[~inside], config)
        calibrated[inside] = point.calibrated(held_out.sets[PLAIN][inside])
        for name, logits in held_out.sets.items():
            moved[name][inside] = point.margins(logits[inside])
    sets = {name: at_zero(logits, labels) for name, logits in moved.items()}
    plain = evaluate(moved[PLAIN], labels, held_out.patients).to_json()
    probabilities = evaluate(calibrated, labels, held_out.patients).to_json()
    document: dict[str, Any] = {
        "images": len(labels),
        "sets": sets,
        "plain": {name: plain[name] for name in METRICS}
        | {name: probabilities[name] for name in ("brier", "ece")},
    }
    changed = [metrics for name, metrics in sets.items() if name != PLAIN]
    if changed:
        document["mean"] = {m: float(np.mean([each[m] for each in changed])) for m in METRICS}
        document["worst"] = {m: float(np.min([each[m] for each in changed])) for m in METRICS}
    return document


def together(held_out: Mapping[int, HeldOut]) -> tuple[HeldOut, np.ndarray]:
    """Joins the held-out images of several folds, and tells which fold each comes from.

    Args:
        held_out: by fold.

    Returns:
        All images, and int [n], their folds.
    """
    folds = list(held_out.values())
    joined = HeldOut(
        np.concatenate([fold.labels for fold in folds]),
        tuple(patient for fold in folds for patient in fold.patients),
        {name: np.concatenate([fold.sets[name] for fold in folds]) for name in folds[0].sets},
    )
    return joined, np.repeat(list(held_out), [len(fold.labels) for fold in folds])
