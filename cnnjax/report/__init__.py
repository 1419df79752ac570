"""HTML reports: `write` for one run, `compare` for several.

A report is one self-contained page with embedded styles and pictures. It needs no network, no
script and no other file. The results come from the workdir of the run. The radiographs come from
the data set; if it no longer exists, the page says so and shows none.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm.auto import tqdm

from cnnjax import metrics
from cnnjax.augment import make_augment
from cnnjax.config import Config, DataConfig, OtherData, flags
from cnnjax.data.cache import load
from cnnjax.data.decode import layout_of
from cnnjax.data.duplicates import COLUMNS
from cnnjax.data.kermany import PUBLISHED
from cnnjax.data.prepare import open_index, training_data
from cnnjax.data.sources import Source
from cnnjax.errors import InputError
from cnnjax.evaluation.explain import draw_box, normalized, overlay
from cnnjax.evaluation.predict import Predictor
from cnnjax.lungs import Framed, put_back
from cnnjax.machine.files import write_atomically
from cnnjax.metrics import Estimate, Evaluation
from cnnjax.objectives import to_float
from cnnjax.operating import OperatingPoint, evaluate_at
from cnnjax.phantom import DRAWN, is_drawn
from cnnjax.report import plots
from cnnjax.report.comparison import compare
from cnnjax.report.template import render
from cnnjax.run.workdir import Judged, Workdir, read_json, read_lines, read_table

__all__ = ["compare", "write"]

MISTAKES, SAMPLES, AUGMENTED = 10, 6, 12
MEASURED = 100  # images whose heat is measured; of two classes, positive images only
_SHOWN = 160  # pixels: longer side of the pictures


def write(
    run: Path,
    mesh: Mesh,
    *,
    data: str | None = None,
    other: OtherData | None = None,
    split: str = "test",
    out: Path | None = None,
    cache: Path | None = None,
) -> Path:
    """Writes the report of a finished run.

    Args:
        run: workdir of the run.
        mesh: the devices to use.
        data: data set to evaluate the run on; its held-out images if None.
        other: how to read `data`, if it differs from how the run reads its own data set.
        split: split of `data`.
        out: the output file. If None, `report.html` in the workdir, or `report-SPLIT.html` if
            `data` is given.
        cache: folder of the decoded images; if None, the one that the run was trained with.

    Returns:
        The path of the page.

    Raises:
        InputError: the run has not finished, or `data` cannot be read.
    """
    workdir = Workdir(run)
    config = workdir.read_config()
    if cache is not None:
        config = replace(config, data=replace(config.data, cache=cache))
    workdir.expect_ended()
    predictor = Predictor.of_run(run, mesh)
    asked = None
    if data is None:
        judged = workdir.read_validation()
        where = "the held-out images, which also chose the best epoch and the operating point"
        images = _held_out_images(workdir, config, judged.names, strict=cache is not None)
    else:
        other = OtherData() if other is None else other
        asked = other.read_like(config.data, data, predictor.classes)
        asked = replace(asked, size=predictor.size, frame="whole")
        data = str(asked.table or data)
        judged, images, broken = _split(predictor, asked, split)
        where = f"the {split} split of {data}"
        if broken:
            where += f" ({broken:,} files cannot be decoded and are left out)"
        if seen := workdir.trained_on(judged.names):
            where += f" (warning: {seen:,} images have the names of images it was trained on)"
    rules = workdir.read_summary()["rules"] if data is None else None
    drawn = workdir.read_drawn() or (asked is not None and is_drawn(asked.root))
    page = _render(workdir, config, predictor, judged, where, images, rules, drawn)
    name = "report.html" if data is None else f"report-{split}.html"
    path = run / name if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(page)
    return path


class Images(NamedTuple):
    """The evaluated images."""

    squares: np.ndarray
    """uint8 [n, side, side], the input of a `Predictor`."""
    source: Source
    """The files that they were decoded from."""

    def sides(self, name: str) -> tuple[int, int]:
        """Returns width and height, in pixels, for showing an image in its aspect ratio."""
        try:
            return layout_of(self.source.read(name)).within(_SHOWN)
        except (OSError, ValueError):  # the file no longer exists
            return _SHOWN, _SHOWN


def _held_out_images(
    workdir: Workdir, config: Config, names: Sequence[str], *, strict: bool
) -> Images | None:
    """Returns the held-out images of a run; None if they no longer exist.

    If `strict`, an InputError in reading them is raised instead.
    """
    try:
        decoded = training_data(config.data, config.seed, lambda _: None).decoded
        if decoded.fingerprint != read_json(workdir.data, "fingerprint"):
            return None
        place = {name: i for i, name in enumerate(decoded.examples.names)}
        images = decoded.images if decoded.films is None else decoded.films
        squares = np.asarray(images[[place[name] for name in names]])
        return Images(squares, open_index(config.data, lambda _: None).source)
    except (InputError, KeyError) as error:
        if strict and isinstance(error, InputError):
            raise
        return None  # the page says so


def _split(predictor: Predictor, config: DataConfig, split: str) -> tuple[Judged, Images, int]:
    """Returns the predictions on a split, its images, and how many files cannot be decoded."""
    index = open_index(config, lambda _: None)
    predictor.expect_classes(index)
    decoded = load(
        index.split(split),
        index.source,
        config.size,
        folder=config.cache,
        limit_mib=config.cache_mib,
    )
    images = np.asarray(decoded.images)
    names, patients = list(decoded.examples.names), decoded.examples.patients
    judged = Judged(names, decoded.labels, patients, predictor.logits(images))
    return judged, Images(images, index.source), len(decoded.quarantine)


def _render(
    workdir: Workdir,
    config: Config,
    predictor: Predictor,
    judged: Judged,
    where: str,
    images: Images | None,
    rules: dict[str, float] | None,
    drawn: bool,
) -> str:
    point = predictor.operating
    probabilities = point.probabilities(judged.logits)
    found = evaluate_at(point, judged.logits, judged.labels, judged.patients)
    summary = workdir.read_summary()
    notes = [DRAWN] if drawn else []
    if rules is not None:  # the notes of training are about the held-out images
        notes += [note for note in summary.get("notes", ()) if note != DRAWN]
    history, speeds = read_lines(workdir.metrics), read_lines(workdir.throughput)
    rows = workdir.read_split()
    draw: dict[str, Callable[[], str]] = {
        "curves": lambda: plots.curves(history, summary["best_epoch"]),
        "quality": lambda: plots.quality(history, summary["best_epoch"]),
        **_figures(predictor, judged, probabilities, found),
    }
    figures = {}
    with tqdm(total=len(draw) + 1, desc="report", leave=False, disable=None) as bar:
        for name, figure in draw.items():
            figures[name] = figure()
            bar.update()
        bar.set_description("report, heat maps")
        pictures = _pictures(config, predictor, judged, images, probabilities, found)
        bar.update()
    return render(
        "page.html.jinja",
        figures,
        title=str(workdir.root),
        config=config,
        settings=flags(workdir.read_config()),
        sessions=read_lines(workdir.sessions),
        split=_counts(rows, predictor.classes),
        shared=_shared(rows),
        quarantine=read_table(workdir.quarantine, ("image", "reason")),
        # Runs of earlier versions did not search for duplicates.
        duplicates=read_table(workdir.duplicates, COLUMNS) if workdir.duplicates.exists() else None,
        classes=predictor.classes,
        summary=summary,
        rules=rules,
        where=where,
        found=found,
        estimates=[(n, v) for n, v in vars(found).items() if isinstance(v, Estimate)],
        half=metrics.evaluate(judged.logits, judged.labels, judged.patients, replicates=0),
        views="one view" if predictor.views == 1 else f"{predictor.views} views",
        notes=notes,
        others=() if drawn or found.each else PUBLISHED,
        point=point,
        threshold=found.threshold,
        history=history,
        seconds=sum(s["train_seconds"] + s["validation_seconds"] for s in speeds),
        speed=float(np.median([s["images_per_second"] for s in speeds])),
        **pictures,
    )


def _figures(
    predictor: Predictor, judged: Judged, probabilities: np.ndarray, found: Evaluation
) -> dict[str, Callable[[], str]]:
    """Returns functions that draw the figures, by name; ROC curves need images of both classes."""
    labels, patients = judged.labels, judged.patients
    there = set(labels.tolist())
    if found.threshold is None:
        scores = metrics.against_rest(predictor.operating.calibrated(judged.logits))
        curves = [
            (name, scores[:, k], (labels == k).astype(int))
            for k, name in enumerate(predictor.classes)
            if k in there != {k}
        ]
        right = probabilities.argmax(1) == labels
        return {
            "rocs": lambda: plots.rocs(curves),
            "calibration": lambda: plots.calibration(
                probabilities.max(1), right, "share of correct predictions"
            ),
        }
    threshold = found.threshold
    draw: dict[str, Callable[[], str]] = {
        "thresholds": lambda: plots.thresholds(probabilities, labels, threshold),
        "calibration": lambda: plots.calibration(probabilities, labels),
        "scores": lambda: plots.scores(probabilities, labels, predictor.classes, threshold),
    }
    if len(there) == 2:
        draw["roc"] = lambda: plots.roc(judged.logits, labels, patients, found)
        draw["precision_recall"] = lambda: plots.precision_recall(
            judged.logits, labels, patients, found
        )
    return draw


def _pictures(
    config: Config,
    predictor: Predictor,
    judged: Judged,
    films: Images | None,
    probabilities: np.ndarray,
    found: Evaluation,
) -> dict[str, Any]:
    """Returns pictures of mistakes, samples and augmented images; None for each without images."""
    if films is None:
        return {"mistakes": None, "samples": None, "augmented": None, "heat": None}
    images = films.squares
    if isinstance(predictor.operating, OperatingPoint):
        decided = (probabilities >= found.threshold).astype(int)
        wrong = np.flatnonzero(decided != judged.labels)
        sure = np.abs(predictor.operating.margins(judged.logits[wrong]))
        measured = np.flatnonzero(judged.labels == 1)
    else:
        decided = probabilities.argmax(1)
        wrong = np.flatnonzero(decided != judged.labels)
        sure = probabilities[wrong].max(1)
        measured = np.arange(len(images))
    surest = wrong[np.argsort(-sure, kind="stable")]
    rng = np.random.default_rng(0)
    of_class = [np.flatnonzero(judged.labels == k) for k in range(len(predictor.classes))]
    sample = np.concatenate([rng.permutation(rows)[:SAMPLES] for rows in of_class])
    rows = np.concatenate([surest[:MISTAKES], sample])
    framed = predictor.frame(images[rows])
    heat = np.zeros(images[rows].shape, np.float32)
    if len(rows) and predictor.explains:
        heat = normalized(predictor.heat(framed))

    def picture(i: int) -> dict[str, Any]:
        row, image = rows[i], images[rows[i]]
        sides = films.sides(judged.names[row])
        return {
            "name": judged.names[row],
            "sides": sides,
            "truth": predictor.classes[judged.labels[row]],
            "said": predictor.classes[decided[row]],
            # The class that the probability and the heat map are about.
            "of": predictor.classes[decided[row] if predictor.has_softmax else 1],
            "probability": float(probabilities[row].max()),
            "lungs": bool(framed.found[i]),
            "image": _encoded(image, sides, framed.boxes[i]),
            "overlay": _encoded(overlay(image, heat[i]), sides, framed.boxes[i]),
        }

    shown = [picture(i) for i in range(len(rows))]
    few = predictor.frame(np.asarray(images[rng.permutation(len(images))[:AUGMENTED]])).images
    augmented = jax.jit(make_augment(config.augment))(
        jax.random.key(config.seed), to_float(jnp.asarray(few))
    )
    changed = np.rint(np.asarray(augmented)[..., 0] * 255).astype(np.uint8)
    return {
        "mistakes": shown[: len(surest[:MISTAKES])],
        "samples": shown[len(surest[:MISTAKES]) :],
        "augmented": [(_encoded(a), _encoded(b)) for a, b in zip(few, changed, strict=True)],
        "heat": _heat_in_lungs(predictor, images[measured[:MEASURED]]),
    }


def _heat_in_lungs(predictor: Predictor, images: np.ndarray) -> dict[str, Any] | None:
    """Returns the mean share of the heat, and of the cropped area, that lies in the lungs.

    None if images are not cropped to the lungs or the network has no heat maps.
    """
    if not predictor.framed or not predictor.explains:
        return None
    framed = predictor.frame(images)
    images, framed = images[framed.found], Framed(*(x[framed.found] for x in framed))
    if not len(images):
        return None
    heat, inside = predictor.heat(framed), predictor.lungs(images)
    seen = put_back(np.ones(framed.images.shape, np.float32), framed.boxes, predictor.size) > 0.5
    share = (heat * inside).sum((1, 2)) / np.maximum(heat.sum((1, 2)), 1e-9)
    area = (inside & seen).sum((1, 2)) / seen.sum((1, 2))
    return {"images": len(images), "inside": float(share.mean()), "area": float(area.mean())}


def _encoded(
    image: np.ndarray,
    sides: tuple[int, int] = (_SHOWN, _SHOWN),
    box: np.ndarray | None = None,
) -> str:
    """Returns an image as a data URL of a JPEG.

    Args:
        image: uint8 [height, width] or [height, width, 3].
        sides: width and height of the JPEG, in pixels.
        box: part of the image that the network saw, as in `draw_box`; its outline is drawn.
    """
    picture = Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC)
    if box is not None:
        picture = picture.convert("RGB")
        draw_box(picture, box)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _counts(rows: Sequence[dict[str, str]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the number of images by class and of patients for training and validation."""
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


def _shared(rows: Sequence[dict[str, str]]) -> int:
    """Returns the number of patients in both training and validation."""
    train, validation = (
        {row["patient"] for row in rows if row["role"] == role} for role in ("train", "validation")
    )
    return len(train & validation)
