"""`cnnjax predict`."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from cnnjax.cli import outputs
from cnnjax.cli.common import (
    check_probabilities,
    expect_place,
    expect_positive_class,
    tell_drawn,
    tell_uncalibrated,
    writing,
)
from cnnjax.config import DeviceConfig, DistributedConfig
from cnnjax.operating import SoftmaxPoint

if TYPE_CHECKING:
    from cnnjax.evaluation.predict import Predictor
    from cnnjax.lungs import Framed

_TOGETHER = 64  # images per chunk, at least
_NO_LUNGS = "no lungs found: is this a frontal chest radiograph?"


@dataclass(frozen=True)
class Predict:
    """Predict the probability and class of each image.

    Blank images and images in which no lungs are found get a warning instead. The exit status is 2
    if an image could not be read.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files or folders of images; `-` reads one image from standard input."""
    run: Path | None = None
    """Workdir of a run, or folder of a release; by default the weights in the package."""
    checkpoint: Literal["best", "latest"] = "best"
    """Checkpoint of a run: the best epoch by validation, or the last epoch."""
    threshold: float | None = None
    """Decision threshold: an image is positive from this probability on, after the correction by
    --prevalence. By default the threshold of the operating point."""
    prevalence: float | None = None
    """Share of positives where the images come from; probabilities are corrected for it. By default
    the share in the images that calibrated the network."""
    views: int | None = None
    """Test-time augmentation: number of augmented copies of each image whose logits are averaged.
    Either the number in the recipe (the default), or 1: the original image only, which is
    faster."""
    format: Literal["auto", "table", "jsonl", "json", "csv"] = "auto"
    """Format on standard output; `auto` is `table` on a terminal and `jsonl` (JSON Lines, one
    object per line) otherwise."""
    json: Path | None = None
    """Also write the predictions to this file: one JSON array if its name ends in .json, otherwise
    JSON Lines. Rows are written as soon as they are predicted, as in all outputs."""
    csv: Path | None = None
    """Also write the predictions to this CSV file."""
    heatmap: Path | None = None
    """Write heat maps (HiResCAM) to this folder: a PNG of each image with the evidence for the
    positive class as an overlay. Each map is scaled to its own maximum. For three or more classes,
    one PNG for each class: IMAGE-CLASS.png."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __call__(self) -> int:
        """Prints the predictions; returns the exit status."""
        from cnnjax.cli import films
        from cnnjax.evaluation.predict import FEW, Predictor
        from cnnjax.machine import devices, processes

        check_probabilities(self.threshold, self.prevalence)
        expect_place(self.json, "--json")
        expect_place(self.csv, "--csv")
        given = films.find(self.paths)
        for path, flag in ((self.json, "--json"), (self.csv, "--csv")):
            films.expect_none_of(path, flag, given)
        if self.heatmap is not None:
            films.expect_apart(self.heatmap, given, self.paths)
        mesh = devices.local_mesh(devices.make_mesh(self.device, self.distributed))
        main = processes.is_main()
        predictor = Predictor.open(self.run, mesh, self.checkpoint, self.views)
        expect_positive_class(predictor, self.threshold, self.prevalence)
        tell_uncalibrated(predictor)
        tell_drawn(self.run)
        several = predictor.classes if predictor.has_softmax else ()
        threshold = self.threshold
        if threshold is None and not isinstance(predictor.operating, SoftmaxPoint):
            threshold = predictor.operating.probability_threshold(self.prevalence)
        form = self.format
        if form == "auto":
            form = "table" if sys.stdout.isatty() else "jsonl"
        table = outputs.Csv(several=several)
        forms: dict[str, outputs.Form] = {
            "table": outputs.Table(
                predictor.classes, threshold, max(len(film.name) for film in given)
            ),
            "jsonl": outputs.Lines(),
            "json": outputs.Array(),
            "csv": table,
        }
        heat_names = films.heat_names(given)
        # A few steps at a time: memory use does not grow with the number of images.
        step = devices.traits(mesh).evaluated_at(predictor.side)
        chunks = films.in_chunks(given, step * -(-_TOGETHER // step), FEW)
        starts = [0, *itertools.accumulate(map(len, chunks))]
        mine = processes.rounds(chunks, ())
        unread = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(processes.quiet())
            printed = outputs.Output(sys.stdout, forms[form])
            lines = outputs.json_form(self.json) if self.json else outputs.Lines()
            files = [
                stack.enter_context(outputs.opened(self.json if main else None, lines, "--json")),
                stack.enter_context(outputs.opened(self.csv if main else None, table, "--csv")),
            ]
            off = processes.no_bars()
            bar = stack.enter_context(tqdm(total=len(given), unit="image", disable=off))
            decoded = films.decoded([chunk for _, chunk in mine], predictor.size)
            for (number, _), (rows, images) in zip(mine, decoded, strict=True):
                good = [i for i, row in enumerate(rows) if "error" not in row]
                if images is not None:
                    framed = predictor.frame(images)
                    self._judge(predictor, [rows[i] for i in good], images, framed, threshold)
                rows = [row for theirs in processes.gather(rows) for row in theirs]
                with tqdm.external_write_mode():
                    if main:
                        _tell_doubts(rows)
                    printed.write(rows)
                for file in files:
                    if file is not None:
                        file.write(rows)
                if self.heatmap is not None and images is not None:
                    with writing(self.heatmap, "--heatmap"):
                        at = [starts[number] + i for i in good]
                        for label, suffix in films.heat_classes(several).items():
                            some = [(given[i], heat_names[i] + suffix) for i in at]
                            about = None if label is None else np.full(len(good), label)
                            heat = predictor.heat(framed, about)
                            films.write_heat(self.heatmap, some, heat, framed.boxes)
                unread += sum("error" in row for row in rows)
                bar.update(len(rows))
        if main:
            printed.close()
        return 2 if unread else 0

    def _judge(
        self,
        predictor: Predictor,
        rows: Sequence[dict[str, Any]],
        images: np.ndarray,
        framed: Framed,
        threshold: float | None,
    ) -> None:
        """Adds the prediction, or a warning that explains why there is none, to each row."""
        point, logits = predictor.operating, predictor.logits(framed)
        if isinstance(point, SoftmaxPoint):
            probabilities = point.probabilities(logits)
        else:
            probabilities = point.probabilities(logits, self.prevalence)
        blank = images.min((1, 2)) == images.max((1, 2))
        for row, probability, lungs, empty in zip(
            rows, probabilities.tolist(), framed.found.tolist(), blank.tolist(), strict=True
        ):
            if predictor.framed:
                row["lungs"] = lungs
            if empty or not lungs:
                doubt = _NO_LUNGS if not empty else "all pixels have the same gray level"
                row["warning"] = "; ".join(filter(None, (row.get("warning"), doubt)))
                continue
            row |= outputs.row_of(probability, predictor.classes, threshold)


def _tell_doubts(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the errors and warnings of the rows on standard error."""
    for row in rows:
        for kind in ("error", "warning"):
            if kind in row:
                print(f"{row['path']}: {kind}: {row[kind]}", file=sys.stderr)
