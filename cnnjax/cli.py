"""The command line: `cnnjax evaluate | predict | report | ...`, and the recipes' entry."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from cnnjax.config import Config, DataConfig, DeviceConfig
from cnnjax.errors import InputError
from cnnjax.machine import cpu_cores

# Modules that import JAX are imported where they are used: `cnnjax --help` answers at once, and
# `cnnjax.devices.make_mesh` can still divide the CPU into devices.


@dataclass(frozen=True)
class Evaluate:
    """Judge a trained run on a split of a data set."""

    run: Path | None = None
    """A run's workdir, or a folder with a release; by default the weights of the package."""
    data: str = "phantom"
    """A tree, a zip, a MedMNIST .npz, or the word `phantom`; as a run's --data.root."""
    split: Literal["train", "val", "test"] = "test"
    """Which split of it."""
    checkpoint: Literal["best", "latest"] = "best"
    """Of a run: the best epoch by validation, or the last."""
    threshold: float | None = None
    """Images count as positive from this probability on; by default the operating point's."""
    prevalence: float | None = None
    """Share of positives where the images come from; by default that of the fit."""
    json: Path | None = None
    """Write the metrics to this file."""
    cache: Path | None = None
    """Folder of the decoded images; by default the user's cache folder."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Prints the metrics with their intervals; returns the exit status."""
        from cnnjax import devices, metrics
        from cnnjax.data import cache
        from cnnjax.data.prepare import open_index
        from cnnjax.predict import Predictor
        from cnnjax.workdir import write_json

        _check_probabilities(self.threshold, self.prevalence)
        predictor = Predictor.open(self.run, devices.make_mesh(self.device), self.checkpoint)
        positive = predictor.classes[1]
        config = DataConfig(self.data, predictor.size, positive, cache=self.cache)
        index = open_index(config, print)
        if index.classes != predictor.classes:
            raise InputError(
                f"{self.data} has the classes {' and '.join(index.classes)},"
                f" but the network was trained on {' and '.join(predictor.classes)}"
            )
        print(index.describe())
        decoded = cache.load(index.split(self.split), index.source, config.size, folder=self.cache)
        for name, reason in decoded.quarantine:
            print(f"  left out: {name}: {reason}")
        point, threshold = predictor.operating, self.threshold
        judged = metrics.evaluate(
            point.calibrated(predictor.logits(decoded.images), self.prevalence),
            decoded.labels,
            [e.patient for e in decoded.examples],
            threshold=point.probability_threshold(self.prevalence)
            if threshold is None
            else threshold,
        )
        print(f"\n{self.split} split, {predictor.about}, with 95 % intervals")
        print(judged.report(predictor.classes))
        if self.json is not None:
            with _writing(self.json, "--json"):
                write_json(self.json, judged.to_json())
        return 0


@dataclass(frozen=True)
class Predict:
    """Give each image's probability and class; exit status 2 if one could not be read."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    run: Path | None = None
    """A run's workdir, or a folder with a release; by default the weights of the package."""
    checkpoint: Literal["best", "latest"] = "best"
    """Of a run: the best epoch by validation, or the last."""
    threshold: float | None = None
    """Images count as positive from this probability on; by default the operating point's."""
    prevalence: float | None = None
    """Share of positives where the images come from; by default that of the fit."""
    json: Path | None = None
    """Also write the predictions to this file, an object a line."""
    csv: Path | None = None
    """Also write the predictions to this file as a table."""
    heatmap: Path | None = None
    """Write to this folder a PNG of each image with what speaks for the positive class laid over it
    (Grad-CAM), each by itself from nothing to most."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Prints a line an image; returns the exit status."""
        from cnnjax import devices
        from cnnjax.data import dicom
        from cnnjax.data.decode import DecodeError, decode
        from cnnjax.predict import Predictor

        _check_probabilities(self.threshold, self.prevalence)
        files = _image_files(self.paths)
        predictor = Predictor.open(self.run, devices.make_mesh(self.device), self.checkpoint)
        size, point = predictor.size, predictor.operating
        threshold = self.threshold
        if threshold is None:
            threshold = point.probability_threshold(self.prevalence)

        doubts: dict[Path, list[str]] = {}

        def read(path: Path) -> np.ndarray | str:
            try:
                encoded = path.read_bytes()
                image = decode(encoded, size)
                if dicom.is_dicom(encoded):
                    doubts[path] = dicom.doubts(encoded)
                return image
            except DecodeError as error:
                return str(error)
            except OSError as error:
                return error.strerror or str(error)

        with ThreadPoolExecutor(cpu_cores()) as pool:
            bar = tqdm(pool.map(read, files), "decoding", len(files), unit="image", disable=None)
            read_files = list(bar)
        images = [image for image in read_files if not isinstance(image, str)]
        logits = predictor.logits(np.stack(images)) if images else np.empty(0)
        probabilities = iter(point.probabilities(logits, self.prevalence))
        results: list[dict[str, Any]] = []
        for path, image in zip(files, read_files, strict=True):
            if isinstance(image, str):
                results.append({"path": str(path), "error": image})
                print(f"{path}: {image}", file=sys.stderr)
                continue
            probability = float(next(probabilities))
            label = predictor.classes[int(probability >= threshold)]
            results.append({"path": str(path), "probability": probability, "class": label})
            print(f"{path}  {probability:.4f}  {label}")
            for doubt in doubts.get(path, ()):
                print(f"{path}: warning: {doubt}", file=sys.stderr)
        if self.json is not None:
            with _writing(self.json, "--json"):
                self.json.write_text("".join(json.dumps(r) + "\n" for r in results), "utf-8")
        if self.csv is not None:
            with _writing(self.csv, "--csv"), self.csv.open("w", encoding="utf-8", newline="") as f:
                table = csv.DictWriter(f, ["path", "probability", "class", "error"])
                table.writeheader()
                table.writerows(results)
        if self.heatmap is not None and images:
            whole = [
                path
                for path, image in zip(files, read_files, strict=True)
                if not isinstance(image, str)
            ]
            with _writing(self.heatmap, "--heatmap"):
                _write_heatmaps(self.heatmap, whole, predictor.heat(np.stack(images)))
        return 2 if len(images) < len(files) else 0


@dataclass(frozen=True)
class Report:
    """Write the page that tells a run's story, as training does at its end."""

    run: Path
    """Workdir of the run."""
    data: str | None = None
    """Judge it on this data set instead of on its held-out images."""
    split: Literal["train", "val", "test"] = "test"
    """Which split of --data."""
    out: Path | None = None
    """Where to; report.html in the workdir by default."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Writes the page; returns the exit status."""
        from cnnjax import devices, report

        mesh = devices.make_mesh(self.device)
        with _writing(self.out or self.run, "--out"):
            path = report.write(self.run, mesh, data=self.data, split=self.split, out=self.out)
        print(path)
        return 0


@dataclass(frozen=True)
class Export:
    """Write a network in a form that needs none of this project to run."""

    out: Annotated[Path, tyro.conf.Positional]
    """The file; what is to be known of it comes beside it, as .json."""
    run: Path | None = None
    """A run's workdir, or a folder with a release; by default the weights of the package."""
    format: Literal["stablehlo", "safetensors"] = "stablehlo"
    """A program for CPU, CUDA and TPU, or the weights alone."""
    checkpoint: Literal["best", "latest"] = "best"
    """Of a run: the best epoch by validation, or the last."""

    def __call__(self) -> int:
        """Writes the files; returns the exit status."""
        from cnnjax import devices, export
        from cnnjax.predict import Predictor

        mesh = devices.make_mesh(DeviceConfig("cpu"))
        predictor = Predictor.open(self.run, mesh, self.checkpoint)
        with _writing(self.out, "the file"):
            for path in export.export(predictor, self.format, self.out):
                print(path)
        return 0


@dataclass(frozen=True)
class Phantom:
    """Write a tree of synthetic radiographs."""

    directory: Annotated[Path, tyro.conf.Positional]
    """Where to; must be empty or not there."""
    train: int = 1200
    """Images of the train split."""
    val: int = 16
    """Images of the val split."""
    test: int = 400
    """Images of the test split."""
    size: int = 256
    """Side of the images, in pixels."""
    seed: int = 0
    """Another seed draws other patients."""

    def __call__(self) -> int:
        """Draws the tree; returns the exit status."""
        from cnnjax.data import phantom

        with _writing(self.directory, "the directory"):
            try:
                phantom.write_tree(
                    self.directory,
                    train=self.train,
                    val=self.val,
                    test=self.test,
                    size=self.size,
                    seed=self.seed,
                )
            except (FileExistsError, ValueError) as error:
                raise InputError(str(error)) from None
        return 0


@dataclass(frozen=True)
class Devices:
    """List what JAX can compute on here."""

    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Prints a line a device; returns the exit status."""
        from cnnjax import devices

        mesh = devices.make_mesh(self.device)
        print(devices.describe(mesh))
        for device in mesh.devices.flat:
            print(f"  {device.id}  {device.platform}  {device.device_kind}")
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `cnnjax` command and exits with its status."""
    commands: Any = (
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Phantom, tyro.conf.subcommand("phantom")]
        | Annotated[Devices, tyro.conf.subcommand("devices")]
    )
    sys.exit(guarded(lambda: tyro.cli(commands, prog="cnnjax", args=arguments)()))


def train(default: Config, description: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a recipe: its default config, changed by flags, is trained; exits with the status.

    Args:
        default: what the recipe sets.
        description: the text of `--help`.
        arguments: the command line; `sys.argv[1:]` when None.
    """

    def run() -> int:
        config = tyro.cli(Config, default=default, description=description, args=arguments)
        from cnnjax import devices, report
        from cnnjax.loop import fit

        result = fit(config)
        rules = result.summary["rules"]
        print(
            f"\nbest epoch {result.summary['best_epoch']} of {result.summary['epochs']},"
            f" on the {result.best.n:,} held-out images that chose it, with 95 % intervals"
        )
        print(result.best.report(result.classes))
        print(
            f"for comparison: the larger class always, accuracy {rules['majority_accuracy']:.4f};"
            f" mean brightness, AUC {rules['brightness_auc']:.4f}"
        )
        page = report.write(config.workdir, devices.make_mesh(config.device))
        print(
            f"\nwritten to {config.workdir}, the story in {page}; judge it on a test split with\n"
            f"  cnnjax evaluate --run {config.workdir} --data {config.data.root} --split test"
        )
        return 0

    sys.exit(guarded(run))


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; bad input becomes one sentence and status 2."""
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last epoch", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; it wants no traceback.
        sys.stdout = None
        return 141


@contextlib.contextmanager
def _writing(path: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written ({error.strerror or error})") from None


def _check_probabilities(threshold: float | None, prevalence: float | None) -> None:
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold must be between 0 and 1, got {threshold}")
    if prevalence is not None and not 0 < prevalence < 1:
        raise InputError(f"--prevalence must be between 0 and 1, got {prevalence}")


_SHOWN = 512  # pixels: side of the pictures of heat


def _write_heatmaps(folder: Path, files: Sequence[Path], heat: np.ndarray) -> None:
    """Writes a PNG for each file, brightest where the image has most evidence."""
    from PIL import Image

    from cnnjax.data.decode import decode
    from cnnjax.explain import normalized, overlay

    folder.mkdir(parents=True, exist_ok=True)
    names = [path.stem for path in files]
    pairs = zip(files, normalized(heat), strict=True)
    for i, (path, one) in enumerate(tqdm(pairs, "heat maps", len(files), disable=None)):
        twice = names.count(path.stem) > 1
        large = Image.fromarray(one).resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC)
        shown = overlay(decode(path.read_bytes(), _SHOWN), np.clip(np.asarray(large), 0, 1))
        Image.fromarray(shown).save(folder / f"{path.stem}{f'-{i}' if twice else ''}.png")


def _image_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the files named, and those in the folders named, sorted within each."""
    from cnnjax.data.index import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        inside = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
        if not inside:
            raise InputError(f"{path} holds no {', '.join(IMAGE_SUFFIXES)}")
        files += inside
    if not files:
        raise InputError("predict needs image files or folders")
    return files
