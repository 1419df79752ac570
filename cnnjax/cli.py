"""The command line: `cnnjax evaluate | predict | report | ...`, and the recipes' entry."""

from __future__ import annotations

import contextlib
import errno
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from cnnjax import __version__
from cnnjax.config import Config, DataConfig, DeviceConfig
from cnnjax.errors import InputError, TrainingError, first_line
from cnnjax.operating import OperatingPoint

if TYPE_CHECKING:
    from cnnjax.lungs import Framed
    from cnnjax.predict import Predictor

# Modules that import JAX are imported where they are used: `cnnjax --help` answers at once, and
# `cnnjax.devices.make_mesh` can still divide the CPU into devices.


@dataclass(frozen=True)
class Evaluate:
    """Judge a trained run, or the released weights, on a split of a data set."""

    run: Path | None = None
    """A run's workdir, or a folder with a release; by default the weights of the package."""
    data: str = "phantom"
    """A tree, a zip, a MedMNIST .npz, or the word `phantom`; as a run's --data.root."""
    split: Literal["train", "val", "test"] = "test"
    """Which split of it."""
    checkpoint: Literal["best", "latest"] = "best"
    """Of a run: the best epoch by validation, or the last."""
    threshold: float | None = None
    """Images count as positive from this probability on, as --prevalence makes it; by default the
    operating point's."""
    prevalence: float | None = None
    """Share of positives where the images come from; by default that of the fit. Probabilities
    are for that share then, not for that of the images, so they have no Brier score or ECE."""
    views: int | None = None
    """How many views of each image to judge: as many as the recipe says (the default), or 1, the
    image as it is, which takes less time."""
    json: Path | None = None
    """Write the metrics to this file."""
    csv: Path | None = None
    """Write to this file, for each image that can be decoded, patient, true class, probability and
    predicted class."""
    cache: Path | None = None
    """Folder of the decoded images; by default the user's cache folder."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Prints the metrics with their intervals; returns the exit status."""
        from cnnjax import devices, lungs, metrics, outputs, release
        from cnnjax.data import framing
        from cnnjax.data.files import write_atomically
        from cnnjax.data.prepare import open_index
        from cnnjax.predict import Predictor
        from cnnjax.workdir import Workdir, write_json

        _check_probabilities(self.threshold, self.prevalence)
        _expect_place(self.json, "--json")
        _expect_place(self.csv, "--csv")
        mesh = devices.make_mesh(self.device)
        predictor = Predictor.open(self.run, mesh, self.checkpoint, self.views)
        _tell_uncalibrated(predictor)
        positive = predictor.classes[1]
        config = DataConfig(
            self.data, predictor.side, predictor.framing, positive, cache=self.cache
        )
        index = open_index(config, print)
        predictor.expect_classes(index)
        print(index.describe())
        decoded = framing.load(index.split(self.split), index.source, config, mesh)
        for name, reason in decoded.quarantine:
            print(f"  left out: {name}: {reason}")
        if self.run is None or release.is_release(self.run):
            if self.data == "phantom":
                print("  note: drawn images; give real ones with --data")
            if self.split != "test":
                print("  note: a release is trained on all images of train and val of its data set")
        else:
            workdir = Workdir(self.run)
            root = workdir.read_config().data.root
            if self.data == "phantom" != root:
                print(f"  note: drawn images; the run was trained on {root}, which --data may name")
            if seen := workdir.trained_on(e.name for e in decoded.examples):
                print(f"  warning: the run was trained on {seen:,} images of these names")
        point, threshold = predictor.operating, self.threshold
        if threshold is None:
            threshold = point.probability_threshold(self.prevalence)
        framed = lungs.as_framed(decoded.images)
        logits = point.calibrated(predictor.logits(framed), self.prevalence)
        patients = [e.patient for e in decoded.examples]
        judged = metrics.evaluate(logits, decoded.labels, patients, threshold=threshold)
        if self.prevalence is not None:
            judged = replace(judged, brier=metrics.UNDEFINED, ece=metrics.UNDEFINED)
        print(f"\n{self.split} split, {predictor.about}, with 95 % intervals")
        print(judged.report(predictor.classes))
        if self.prevalence is not None:
            print(judged.elsewhere(self.prevalence))
        without = 0 if decoded.found is None else int((~decoded.found).sum())
        if without:
            print(
                f"warning: no lungs found in {without:,} of {judged.n:,} images, which were judged"
                " whole; are these frontal chest radiographs?"
            )
        if self.json is not None:
            more = {"prevalence": self.prevalence, "no_lungs_found": without}
            with _writing(self.json, "--json"):
                write_json(self.json, judged.to_json() | more)
        if self.csv is not None:
            rows = [
                {
                    "image": example.name,
                    "patient": example.patient,
                    "truth": predictor.classes[label],
                    "probability": probability,
                    "class": predictor.classes[int(probability >= threshold)],
                    "lungs": "" if decoded.found is None else str(bool(decoded.found[i])).lower(),
                }
                for i, (example, label, probability) in enumerate(
                    zip(
                        decoded.examples,
                        decoded.labels.tolist(),
                        metrics.sigmoid(logits).tolist(),
                        strict=True,
                    )
                )
            ]
            with _writing(self.csv, "--csv"), write_atomically(self.csv) as file:
                file.write(outputs.Csv(_JUDGED).head())
                file.write(outputs.Csv(_JUDGED).body(rows))
        return 0


@dataclass(frozen=True)
class Predict:
    """Give each image's probability and class; neither where it is blank or shows no lungs.

    The exit status is 2 if an image could not be read.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them; `-` reads one image from standard input."""
    run: Path | None = None
    """A run's workdir, or a folder with a release; by default the weights of the package."""
    checkpoint: Literal["best", "latest"] = "best"
    """Of a run: the best epoch by validation, or the last."""
    threshold: float | None = None
    """Images count as positive from this probability on, as --prevalence makes it; by default the
    operating point's."""
    prevalence: float | None = None
    """Share of positives where the images come from; by default that of the fit."""
    views: int | None = None
    """How many views of each image to judge: as many as the recipe says (the default), or 1, the
    image as it is, which takes less time."""
    format: Literal["auto", "table", "jsonl", "json", "csv"] = "auto"
    """What is printed: `auto` is a table on a terminal, else an object a line (JSON Lines)."""
    json: Path | None = None
    """Also write the predictions to this file: as one JSON array if its name ends in .json, else an
    object a line. Like all outputs it is written as the predictions come."""
    csv: Path | None = None
    """Also write the predictions to this file as a table."""
    heatmap: Path | None = None
    """Write to this folder a PNG of each image with what speaks for the positive class laid over it
    (HiResCAM), each by itself from nothing to most."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Prints the predictions; returns the exit status."""
        from cnnjax import devices, films, outputs
        from cnnjax.predict import FEW, Predictor

        _check_probabilities(self.threshold, self.prevalence)
        _expect_place(self.json, "--json")
        _expect_place(self.csv, "--csv")
        given = films.find(self.paths)
        for path, flag in ((self.json, "--json"), (self.csv, "--csv")):
            films.expect_none_of(path, flag, given)
        if self.heatmap is not None:
            films.expect_apart(self.heatmap, given, self.paths)
        mesh = devices.make_mesh(self.device)
        predictor = Predictor.open(self.run, mesh, self.checkpoint, self.views)
        _tell_uncalibrated(predictor)
        threshold = self.threshold
        if threshold is None:
            threshold = predictor.operating.probability_threshold(self.prevalence)
        form = self.format
        if form == "auto":
            form = "table" if sys.stdout.isatty() else "jsonl"
        forms: dict[str, outputs.Form] = {
            "table": outputs.Table(
                predictor.classes, threshold, max(len(film.name) for film in given)
            ),
            "jsonl": outputs.Lines(),
            "json": outputs.Array(),
            "csv": outputs.Csv(),
        }
        heat_names = films.heat_names(given)
        # A few steps at a time, so that memory does not grow with the films.
        step = devices.traits(mesh).evaluated_at(predictor.side)
        chunks = films.in_chunks(given, step * -(-_TOGETHER // step), FEW)
        judged = unread = 0
        with contextlib.ExitStack() as stack:
            printed = outputs.Output(sys.stdout, forms[form])
            lines = outputs.json_form(self.json) if self.json else outputs.Lines()
            files = [
                stack.enter_context(outputs.opened(self.json, lines, "--json")),
                stack.enter_context(outputs.opened(self.csv, outputs.Csv(), "--csv")),
            ]
            bar = stack.enter_context(tqdm(total=len(given), unit="image", disable=None))
            for rows, images in films.decoded(chunks, predictor.size):
                good = [i for i, row in enumerate(rows) if "error" not in row]
                if images is not None:
                    framed = predictor.frame(images)
                    self._judge(predictor, [rows[i] for i in good], images, framed, threshold)
                with tqdm.external_write_mode():
                    _tell_doubts(rows)
                    printed.write(rows)
                for file in files:
                    if file is not None:
                        file.write(rows)
                if self.heatmap is not None and images is not None:
                    with _writing(self.heatmap, "--heatmap"):
                        some = [(given[judged + i], heat_names[judged + i]) for i in good]
                        films.write_heat(self.heatmap, some, predictor.heat(framed), framed.boxes)
                judged += len(rows)
                unread += len(rows) - len(good)
                bar.update(len(rows))
        printed.close()
        return 2 if unread else 0

    def _judge(
        self,
        predictor: Predictor,
        rows: Sequence[dict[str, Any]],
        images: np.ndarray,
        framed: Framed,
        threshold: float,
    ) -> None:
        """Adds to the rows of images what the network says of them, or why it says nothing."""
        point = predictor.operating
        probabilities = point.probabilities(predictor.logits(framed), self.prevalence)
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
            positive = probability >= threshold
            row |= {
                "probability": probability,
                "class": predictor.classes[int(positive)],
                "confidence": probability if positive else 1 - probability,
            }


@dataclass(frozen=True)
class Report:
    """Write the page that tells a run's story, or one that sets several runs side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Workdirs; given several, the page compares them."""
    run: Path | None = None
    """Workdir of one run, as training gives its command."""
    data: str | None = None
    """Judge one run on this data set instead of on its held-out images."""
    split: Literal["train", "val", "test"] | None = None
    """Which split of --data; by default `test`."""
    out: Path | None = None
    """Where to; by default report.html in the workdir, report-SPLIT.html for --data, or
    comparison.html here."""
    cache: Path | None = None
    """Folder of the decoded images; by default the one that the run was trained with."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Writes the page; returns the exit status."""
        runs = self.runs if self.run is None else (self.run, *self.runs)
        if not runs:
            raise InputError("report needs the workdir of a run; give it with --run")
        if self.data is not None and len(runs) > 1:
            raise InputError("--data goes with one run; several are compared on what they held out")
        if self.cache is not None and len(runs) > 1:
            raise InputError("--cache goes with one run; a comparison shows no images")
        if self.split is not None and self.data is None:
            raise InputError(
                f"--split {self.split} needs --data; without, held-out images are judged"
            )
        _expect_no_folder(self.out, "--out")
        split = self.split or "test"
        from cnnjax import devices, report

        mesh = devices.make_mesh(self.device)
        out = self.out or (runs[0] if len(runs) == 1 else Path("comparison.html"))
        with _writing(out, "--out"):
            if len(runs) > 1:
                path = report.compare(runs, out)
            else:
                path = report.write(
                    runs[0], mesh, data=self.data, split=split, out=self.out, cache=self.cache
                )
        print(path)
        return 0


@dataclass(frozen=True)
class Export:
    """Write a network in a form that needs none of this project to run."""

    out: Annotated[Path, tyro.conf.Positional]
    """The file; what is to be known of it comes beside it, as .json."""
    run: Path | None = None
    """A run's workdir, or a folder with a release; by default the weights of the package."""
    format: Literal["stablehlo", "onnx", "safetensors"] = "stablehlo"
    """A program for CPU, CUDA and TPU, one for ONNX Runtime, or the weights alone."""
    checkpoint: Literal["best", "latest"] = "best"
    """Of a run: the best epoch by validation, or the last."""

    def __call__(self) -> int:
        """Writes the files; returns the exit status."""
        from cnnjax import devices, export
        from cnnjax.predict import Predictor

        mesh = devices.make_mesh(DeviceConfig("cpu"))
        # One view: whoever loads the network should not need our augmentation.
        predictor = Predictor.open(self.run, mesh, self.checkpoint, views=1)
        _tell_uncalibrated(predictor)
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
    if (sys.argv[1:] if arguments is None else list(arguments)) == ["--version"]:
        print(f"cnnjax {__version__}")
        sys.exit(0)
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
        from cnnjax.train import fit

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
            f"  cnnjax evaluate --run {quote(str(config.workdir))}"
            f" --data {quote(config.data.root)} --split test"
        )
        return 0

    sys.exit(guarded(run))


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; bad input becomes one sentence and status 2."""
    with contextlib.suppress(ValueError):  # it is closed
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            # A file's name may be any bytes; so it is shown, as `ls` does.
            sys.stdout.reconfigure(errors="surrogateescape")
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # while it can still be told that there is no room
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return _stopped(getattr(error, "number", signal.SIGINT))
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; it wants no traceback.
        sys.stdout = None
        return 141
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print("error: the disk is full; make room and give the command again", file=sys.stderr)
            try:
                if sys.stdout is not None:
                    sys.stdout.flush()
            except OSError:
                sys.stdout = None  # else Python tries once more at its end
            return 2
        if error.filename is None:  # no file of the user's
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "oneDNN: KeyboardInterrupt" in str(error):  # which `cnnjax.ffi` is about to pass on
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(1)
            return _stopped()
        if "RESOURCE_EXHAUSTED" not in str(error):  # as XLA says
            raise
        print(
            "error: the device's memory is full; free some, take another with --device.platform,"
            " or begin another run with a smaller --train.batch or --data.size"
            f" ({first_line(error)})",
            file=sys.stderr,
        )
        return 2


def _stopped(number: int = signal.SIGINT) -> int:
    print("\nstopped; a training goes on when its command is given again", file=sys.stderr)
    return 128 + number


@contextlib.contextmanager
def _writing(path: Path, flag: str) -> Iterator[None]:
    """Says of errors in writing to a file or folder which flag asked for it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            ours, theirs = path.absolute(), Path(str(error.filename)).absolute()
            if ours != theirs and ours not in theirs.parents and theirs not in ours.parents:
                raise  # of a file that was read meanwhile
        raise InputError(f"{flag} {path} cannot be written ({error.strerror or error})") from None


def _expect_no_folder(path: Path | None, flag: str) -> None:
    if path is not None and path.is_dir():
        raise InputError(f"{flag} {path} is a folder; name a file in it")


def _expect_place(path: Path | None, flag: str) -> None:
    """Says at once, and not after the work, that there is no place for a file."""
    _expect_no_folder(path, flag)
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{flag} {path} cannot be written (there is no folder {path.parent})")


def _tell_uncalibrated(predictor: Predictor) -> None:
    if predictor.operating == OperatingPoint():
        print(
            "note: the run has not ended, so it has no operating point yet: probabilities are as"
            " the network gives them, and positive is from 0.5 on",
            file=sys.stderr,
        )


def _check_probabilities(threshold: float | None, prevalence: float | None) -> None:
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold must be between 0 and 1, got {threshold}")
    if prevalence is not None and not 0 < prevalence < 1:
        raise InputError(f"--prevalence must be between 0 and 1, got {prevalence}")


_NO_LUNGS = "no lungs found: is this a frontal chest radiograph?"
_TOGETHER = 64  # images that are judged at a time, or a few more
_JUDGED = ("image", "patient", "truth", "probability", "class", "lungs")


def _tell_doubts(rows: Sequence[dict[str, Any]]) -> None:
    """Tells on standard error which images could not be read, and what to doubt of others."""
    for row in rows:
        for kind in ("error", "warning"):
            if kind in row:
                print(f"{row['path']}: {kind}: {row[kind]}", file=sys.stderr)
