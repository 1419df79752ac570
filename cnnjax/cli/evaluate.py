"""`cnnjax evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from cnnjax.cli.common import (
    check_probabilities,
    expect_place,
    expect_positive_class,
    tell_uncalibrated,
    writing,
)
from cnnjax.config import DataConfig, DeviceConfig, DistributedConfig, OtherData

if TYPE_CHECKING:
    from jax.sharding import Mesh

_JUDGED = ("image", "patient", "truth", "probability", "class", "lungs")


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained run or the released weights on a split of a data set."""

    run: Path | None = None
    """Workdir of a run, or folder of a release; by default the weights in the package."""
    data: str = "phantom"
    """Data set, as for --data.root: a folder, a zip, a MedMNIST .npz, a .csv table, or
    `phantom`."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Split of the data set to evaluate on; `all` for all images."""
    other: tyro.conf.OmitArgPrefixes[OtherData] = field(default_factory=OtherData)
    checkpoint: Literal["best", "latest"] = "best"
    """Checkpoint of a run: the best epoch by validation, or the last epoch."""
    threshold: float | None = None
    """Decision threshold: an image is positive from this probability on, after the correction by
    --prevalence. By default the threshold of the operating point."""
    prevalence: float | None = None
    """Share of positives where the network will be used; by default the share in the images that
    calibrated it. Probabilities are corrected for this share. It may differ from the share in the
    evaluated images, so the Brier score and ECE are undefined."""
    views: int | None = None
    """Test-time augmentation: number of augmented copies of each image whose logits are averaged.
    Either the number in the recipe (the default), or 1: the original image only, which is
    faster."""
    json: Path | None = None
    """Write the metrics to this file."""
    csv: Path | None = None
    """Write a table with one row for each decoded image: patient ID, true class, probability and
    predicted class."""
    cache: Path | None = None
    """Folder for the decoded images; by default the user's cache folder."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __call__(self) -> int:
        """Prints the metrics with their intervals; returns the exit status."""
        from cnnjax.machine import devices, processes

        check_probabilities(self.threshold, self.prevalence)
        expect_place(self.json, "--json")
        expect_place(self.csv, "--csv")
        mesh = devices.local_mesh(devices.make_mesh(self.device, self.distributed))
        with processes.quiet():
            return self._evaluate(mesh)

    def _evaluate(self, mesh: Mesh) -> int:
        """Evaluates a part of the images on each process; the main process prints all results."""
        from cnnjax import lungs, metrics
        from cnnjax.cli import outputs
        from cnnjax.data import framing
        from cnnjax.data.prepare import open_index
        from cnnjax.evaluation.predict import Predictor
        from cnnjax.machine import processes
        from cnnjax.machine.files import write_atomically
        from cnnjax.operating import SoftmaxPoint
        from cnnjax.phantom import DRAWN, is_drawn
        from cnnjax.run import release
        from cnnjax.run.workdir import Workdir, write_json

        predictor = Predictor.open(self.run, mesh, self.checkpoint, self.views)
        expect_positive_class(predictor, self.threshold, self.prevalence)
        tell_uncalibrated(predictor)
        workdir = None if self.run is None or release.is_release(self.run) else Workdir(self.run)
        trained = DataConfig() if workdir is None else workdir.read_config().data
        config = replace(
            self.other.read_like(trained, self.data, predictor.classes),
            size=predictor.side,
            frame=predictor.framing,
            cache=self.cache,
        )
        index = open_index(config, print)
        predictor.expect_classes(index)
        print(index.describe())
        decoded = framing.load(index.split(self.split), index.source, config, mesh)
        for name, reason in decoded.quarantine:
            print(f"  left out: {name}: {reason}")
        if is_drawn(config.root):
            print(f"  note: {DRAWN}")
        if workdir is None:
            if self.split != "test":
                print("  note: a release was trained on all of train and val of its data set")
        else:
            root = trained.root
            if workdir.read_drawn() and not is_drawn(config.root):
                print(f"  note: the run was trained on {DRAWN}")
            elif config.root == "phantom" != root:
                print(f"  note: the run was trained on {root}; give --data to evaluate on it")
            if seen := workdir.trained_on(decoded.examples.names):
                print(f"  warning: the run was trained on {seen:,} images with the same names")
        point, threshold = predictor.operating, self.threshold
        several = predictor.classes if predictor.has_softmax else ()
        mine = processes.share(len(decoded.images))
        framed = lungs.as_framed(decoded.images[mine.start : mine.stop])
        logits = processes.concatenated(predictor.logits(framed))
        if not processes.is_main():
            return 0
        patients = decoded.examples.patients
        if isinstance(point, SoftmaxPoint):
            probabilities = point.probabilities(logits)
            judged = metrics.evaluate(point.calibrated(logits), decoded.labels, patients)
        else:
            if threshold is None:
                threshold = point.probability_threshold(self.prevalence)
            probabilities = point.probabilities(logits, self.prevalence)
            judged = metrics.evaluate(
                point.calibrated(logits, self.prevalence),
                decoded.labels,
                patients,
                threshold=threshold,
            )
        if self.prevalence is not None:
            judged = replace(judged, brier=metrics.UNDEFINED, ece=metrics.UNDEFINED)
        views = "1 view" if predictor.views == 1 else f"{predictor.views} views"
        print(f"\n{self.split} split, {predictor.about},")
        print(f"{views} of each image, with 95 % intervals\n")
        print(judged.report(predictor.classes))
        if self.prevalence is not None:
            print(judged.elsewhere(self.prevalence))
        without = 0 if decoded.found is None else int((~decoded.found).sum())
        if without:
            print(
                f"warning: no lungs found in {without:,} of {judged.n:,} images, which were"
                " evaluated without cropping; are these frontal chest radiographs?"
            )
        if self.json is not None:
            more = {
                "views": predictor.views,
                "prevalence": self.prevalence,
                "no_lungs_found": without,
                "drawn": is_drawn(config.root),
            }
            with writing(self.json, "--json"):
                write_json(self.json, judged.to_json() | more)
        if self.csv is not None:
            rows = [
                {
                    "image": example.name,
                    "patient": example.patient,
                    "truth": predictor.classes[label],
                    **outputs.row_of(probability, predictor.classes, threshold),
                    "lungs": "" if decoded.found is None else str(bool(decoded.found[i])).lower(),
                }
                for i, (example, label, probability) in enumerate(
                    zip(
                        decoded.examples,
                        decoded.labels.tolist(),
                        probabilities.tolist(),
                        strict=True,
                    )
                )
            ]
            with writing(self.csv, "--csv"), write_atomically(self.csv) as file:
                form = outputs.Csv(_JUDGED, several)
                file.write(form.head() + form.body(rows))
        return 0
