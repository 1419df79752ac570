"""One self-contained page that tells a run's story: `write`.

No network, no script, no file beside it: styles and pictures are inside. What it shows of the run
comes from its workdir; pictures of radiographs come from the data set, and are left out, with a
sentence that says so, where that is gone.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from jax.sharding import Mesh
from markupsafe import Markup
from PIL import Image

from cnnjax import metrics
from cnnjax.augment import make_augment
from cnnjax.config import Config, DataConfig
from cnnjax.data import cache
from cnnjax.data.files import write_atomically
from cnnjax.data.prepare import open_index, training_data
from cnnjax.errors import InputError
from cnnjax.explain import normalized, overlay
from cnnjax.metrics import Estimate, Evaluation
from cnnjax.predict import Predictor
from cnnjax.report import plots
from cnnjax.steps import to_float
from cnnjax.workdir import Workdir

MISTAKES, SAMPLES, AUGMENTED = 10, 6, 12
_SHOWN = 160  # pixels: side of the pictures

# What others report on the official test split of these radiographs, which is not where a run is
# judged: for orientation.
_OTHERS = (
    ("the post, its own CNN, official test", "0.917", "0.956", "", ""),
    ("Kermany et al., Inception-v3, official test", "0.928", "0.932", "0.901", "0.968"),
)


@dataclass(frozen=True)
class Judged:
    """Images of a split with what the network says of them."""

    where: str
    """A phrase that names them."""
    names: Sequence[str]
    labels: np.ndarray
    patients: Sequence[str]
    logits: np.ndarray
    images: np.ndarray | None
    """uint8 [n, size, size]; None where they are gone."""


def write(
    run: Path, mesh: Mesh, *, data: str | None = None, split: str = "test", out: Path | None = None
) -> Path:
    """Writes the report of a finished run.

    Args:
        run: its workdir.
        mesh: the devices to use.
        data: judge the run on this data set instead of on its held-out images.
        split: of `data`.
        out: the page; `report.html` in the workdir when None.

    Returns:
        The page's path.

    Raises:
        InputError: the run has not ended, or `data` cannot be read.
    """
    workdir = Workdir(run)
    config = workdir.read_config()
    if not workdir.summary.exists():
        raise InputError(f"{run} has not ended; give its training command again, then the report")
    predictor = Predictor.of_run(run, mesh)
    judged = (
        _held_out(workdir, config, predictor)
        if data is None
        else _split(predictor, DataConfig(data, config.data.size, config.data.positive), split)
    )
    page = _render(workdir, config, predictor, judged)
    path = run / "report.html" if out is None else out
    with write_atomically(path) as file:
        file.write(page)
    return path


def _held_out(workdir: Workdir, config: Config, predictor: Predictor) -> Judged:
    """Reads what the run wrote of its held-out images, and finds the images if they are there."""
    with workdir.validation.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [row["image"] for row in rows]
    images = None
    try:
        decoded = training_data(config.data, config.seed, lambda _: None).decoded
        place = {example.name: i for i, example in enumerate(decoded.examples)}
        images = np.asarray(decoded.images[[place[name] for name in names]])
    except (InputError, KeyError):
        pass  # the page says so
    return Judged(
        "the held-out images, which also chose the best epoch and the operating point",
        names,
        np.array([int(row["label"]) for row in rows]),
        [row["patient"] for row in rows],
        np.array([float(row["logit_best"]) for row in rows]),
        images,
    )


def _split(predictor: Predictor, config: DataConfig, split: str) -> Judged:
    index = open_index(config, lambda _: None)
    decoded = cache.load(index.split(split), index.source, config.size, folder=config.cache)
    images = np.asarray(decoded.images)
    return Judged(
        f"the {split} split of {config.root}",
        [example.name for example in decoded.examples],
        decoded.labels,
        [example.patient for example in decoded.examples],
        predictor.logits(images),
        images,
    )


def _render(workdir: Workdir, config: Config, predictor: Predictor, judged: Judged) -> str:
    point = predictor.operating
    threshold = point.probability_threshold()
    probabilities = point.probabilities(judged.logits)
    found = metrics.evaluate(
        point.calibrated(judged.logits), judged.labels, judged.patients, threshold=threshold
    )
    summary = _json(workdir.summary)
    history = [json.loads(line) for line in workdir.metrics.read_text("utf-8").splitlines()]
    speeds = [json.loads(line) for line in workdir.throughput.read_text("utf-8").splitlines()]
    labels, patients = judged.labels, judged.patients
    both = len(set(labels.tolist())) == 2
    figures = {
        "curves": plots.curves(history, summary["best_epoch"]),
        "quality": plots.quality(history, summary["best_epoch"]),
        "thresholds": plots.thresholds(probabilities, labels, threshold),
        "calibration": plots.calibration(probabilities, labels),
        "scores": plots.scores(probabilities, labels, predictor.classes, threshold),
    }
    if both:
        figures["roc"] = plots.roc(judged.logits, labels, patients, found)
        figures["precision_recall"] = plots.precision_recall(judged.logits, labels, patients, found)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cnnjax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment.get_template("page.html.jinja").render(
        title=str(workdir.root),
        config=config,
        settings=_flat(json.loads(workdir.config.read_text("utf-8"))),
        sessions=[json.loads(line) for line in workdir.sessions.read_text("utf-8").splitlines()],
        split=_counts(workdir, predictor.classes),
        quarantine=_quarantine(workdir),
        classes=predictor.classes,
        summary=summary,
        judged=judged,
        found=found,
        estimates=[(n, v) for n, v in vars(found).items() if isinstance(v, Estimate)],
        others=_OTHERS,
        point=point,
        threshold=threshold,
        history=history,
        seconds=sum(s["train_seconds"] + s["validation_seconds"] for s in speeds),
        speed=float(np.median([s["images_per_second"] for s in speeds])),
        figures={name: Markup(figure) for name, figure in figures.items()},
        **_pictures(config, predictor, judged, probabilities, found),
    )


def _pictures(
    config: Config,
    predictor: Predictor,
    judged: Judged,
    probabilities: np.ndarray,
    found: Evaluation,
) -> dict[str, Any]:
    """Returns the pictures of mistakes, samples and augmented images; None where there are none."""
    if judged.images is None:
        return {"mistakes": None, "samples": None, "augmented": None}
    decided = probabilities >= found.threshold
    wrong = np.flatnonzero(decided != (judged.labels == 1))
    surest = wrong[np.argsort(-np.abs(probabilities[wrong] - found.threshold), kind="stable")]
    rng = np.random.default_rng(0)
    of_class = [np.flatnonzero(judged.labels == label) for label in (0, 1)]
    sample = np.concatenate([rng.permutation(rows)[:SAMPLES] for rows in of_class])
    rows = np.concatenate([surest[:MISTAKES], sample])
    heat = normalized(predictor.heat(judged.images[rows])) if len(rows) else np.empty(0)

    def picture(i: int) -> dict[str, Any]:
        row, image = rows[i], judged.images[rows[i]]  # type: ignore[index]
        return {
            "name": judged.names[row],
            "truth": predictor.classes[judged.labels[row]],
            "said": predictor.classes[int(decided[row])],
            "probability": float(probabilities[row]),
            "image": _encoded(image),
            "overlay": _encoded(overlay(image, heat[i])),
        }

    shown = [picture(i) for i in range(len(rows))]
    few = np.asarray(judged.images[rng.permutation(len(judged.images))[:AUGMENTED]])
    augmented = make_augment(config.augment)(
        jax.random.key(config.seed), to_float(jnp.asarray(few))
    )
    changed = np.rint(np.asarray(augmented)[..., 0] * 255).astype(np.uint8)
    return {
        "mistakes": shown[: len(surest[:MISTAKES])],
        "samples": shown[len(surest[:MISTAKES]) :],
        "augmented": [(_encoded(a), _encoded(b)) for a, b in zip(few, changed, strict=True)],
    }


def _encoded(image: np.ndarray) -> str:
    """Returns uint8 [height, width] or [height, width, 3] as the address of a picture."""
    file = io.BytesIO()
    Image.fromarray(image).resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=85
    )
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _counts(workdir: Workdir, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns images by class, and patients, of each side of the run's split."""
    with workdir.split.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sides = []
    for role in ("train", "validation"):
        mine = [row for row in rows if row["role"] == role]
        images = Counter(int(row["label"]) for row in mine)
        sides.append(
            {
                "role": role,
                "images": [images[label] for label in range(len(classes))],
                "patients": len({row["patient"] for row in mine}),
            }
        )
    return sides


def _quarantine(workdir: Workdir) -> list[dict[str, str]]:
    with workdir.quarantine.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"--{prefix}{name}".replace("_", "-")] = value
    return flat


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
