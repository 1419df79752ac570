"""Time from the start of the process to an evaluated network, compared with the post's program.

    python -m benchmarks.end_to_end --data chest_xray --full-resolution DIR --json end_to_end.json

There are two jobs: the post's 15 epochs on a tree of small images, and 5 epochs on files as
published, repeated under new names up to `--files`. Our program and the post's Keras program
alternate on the same training and held-out files, each in a separate process. "Cold" starts without
cached images and compiled programs, "warm" with both. One start of each side is made first and not
measured, to bring files and programs into the system's cache. The time to quality is the time from
a cold start until the held-out AUC of a recipe first exceeds given values.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.measure import (
    ENVIRONMENTS,
    ROOT,
    call,
    circumstances_apart,
    headline,
    print_table,
    python_of,
    write_json,
)
from cnnjax.cli import guarded
from cnnjax.data.index import read_index
from cnnjax.errors import InputError
from cnnjax.run.workdir import Workdir


@dataclass(frozen=True)
class Options:
    """What is measured."""

    data: Path
    """A tree of small images: train/NORMAL and so on."""
    full_resolution: Path | None = None
    """A tree of images as published."""
    files: int = 5216
    """Files of the job on images as published."""
    epochs: int = 15
    """Epochs of the job on small images."""
    full_epochs: int = 5
    """Epochs of the job on images as published."""
    rounds: int = 1
    """Number of times that each side does each job."""
    quality: tuple[float, ...] = (0.98, 0.99)
    """Values of the held-out AUC for the time to quality."""
    environments: Path = ENVIRONMENTS
    """Folder of the peers' environments (made by `python -m benchmarks.peers --setup`)."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""

    def __post_init__(self) -> None:
        for name in ("files", "epochs", "full_epochs", "rounds"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least 1, got {getattr(self, name)}")


def repeated(source: Path, files: int, target: Path) -> None:
    """Copies the training images of a tree under names of new patients, `files` files in all."""
    examples = list(read_index(source).split("train"))
    random.Random(0).shuffle(examples)  # both classes, even for few files
    for i in range(files):
        example = examples[i % len(examples)]
        name = f"person{i}_virus_1.jpeg" if example.label else f"IM-{i}-0001.jpeg"
        to = target / "train" / ("PNEUMONIA" if example.label else "NORMAL") / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / example.name, to)


@dataclass(frozen=True)
class Job:
    """Times of one of our jobs."""

    seconds: float
    phases: dict[str, float]
    """Seconds of each phase; their sum is `seconds`."""
    compiling: float
    """Seconds of tracing and compilation within the phases."""
    lines: list[tuple[float, float]]
    """For each epoch, the seconds from the start until its line was written to `metrics.jsonl`, and
    the seconds of compilation among them."""


def ours(
    root: Path, epochs: int | None, scratch: Path, *, cold: bool, recipe: str = "baseline"
) -> Job:
    """Trains a recipe in a separate process; None means the recipe's own number of epochs."""
    shutil.rmtree(scratch / "run", ignore_errors=True)
    if cold:
        shutil.rmtree(scratch / "cache", ignore_errors=True)
    script = ROOT / "experiments" / f"{recipe}.py"
    command: list[object] = [sys.executable, "-m", "benchmarks.phases", script]
    command += ["--data.root", root, "--workdir", scratch / "run"]
    command += [] if epochs is None else ["--train.epochs", str(epochs)]
    began = time.time()
    seconds, printed = _timed(command, XDG_CACHE_HOME=str(scratch / "cache"))
    told = json.loads(printed.splitlines()[-1])
    phases: dict[str, float] = told["phases"]
    phases["else"] = seconds - sum(phases.values())
    lines = [(at - began, compiling) for at, compiling in told["lines"]]
    return Job(seconds, phases, told["compiling"], lines)


def theirs(options: Options, folder: Path, epochs: int, on: str) -> float:
    """Trains with Keras on a platform in a separate process; returns the seconds."""
    python = python_of("keras", options.environments, on)
    return _timed([python, "-m", "benchmarks.peers.keras_job", folder, str(epochs), on])[0]


def split_folder(root: Path, run: Path, target: Path) -> None:
    """Links the images of a run as Keras reads them: train/CLASS and val/CLASS (held out)."""
    for row in Workdir(run).read_split():
        path = root / row["image"]
        side = "train" if row["role"] == "train" else "val"
        to = target / side / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(path.resolve())


def measure(options: Options, scratch: Path, on: str) -> dict[str, Any]:
    """Measures every job of both sides on a platform; returns the document."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    jobs = [("small", options.data, options.epochs)]
    if options.full_resolution is not None:
        repeated(options.full_resolution, options.files, scratch / "full")
        jobs.append(("full resolution", scratch / "full", options.full_epochs))
    for job, root, epochs in jobs:
        # Not measured: writes the split, and brings files and programs into the system's cache.
        ours(root, 1, scratch, cold=True)
        folder = scratch / f"keras-{job.split()[0]}"
        split_folder(root, scratch / "run", folder)
        files = sum(path.is_symlink() for path in folder.rglob("*"))
        theirs(options, folder, 1, on)
        took: dict[str, list[float]] = {"cold": [], "warm": [], "keras": []}
        phases: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(options.rounds):
            for start in ("cold", "warm"):
                done = ours(root, epochs, scratch, cold=start == "cold")
                took[start].append(done.seconds)
                phases[start].append(done.phases | {"compiling, in these": done.compiling})
            took["keras"].append(theirs(options, folder, epochs, on))
        for name, seconds_all in took.items():
            mine = name != "keras"
            rows.append(
                {
                    "job": job,
                    "by": "ours" if mine else "keras",
                    "start": name if mine else "cold",
                    "files": files,
                    "epochs": epochs,
                    "seconds": float(np.median(seconds_all)),
                    "each": seconds_all,
                    "phases": _medians(phases[name]) if mine else None,
                }
            )
        for start in ("cold", "warm"):
            each = np.array(took["keras"]) / np.array(took[start])
            ratios[f"{job}, {start}"] = float(np.median(each))
    return {"rows": rows, "ratio": ratios, "time_to_quality": to_quality(options, scratch)}


def to_quality(options: Options, scratch: Path) -> list[dict[str, Any]]:
    """Returns the time from a cold start until each recipe's held-out AUC exceeds each value."""
    found = []
    for recipe in ("baseline", "pneumonia"):
        done = ours(options.data, None, scratch, cold=True, recipe=recipe)
        areas = [line["validation"]["auc"] for line in _lines(scratch / "run" / "metrics.jsonl")]
        for wanted in options.quality:
            passes = zip(done.lines, areas, strict=True)
            at, compiling = next((line for line, area in passes if area > wanted), (None, None))
            named = {"recipe": recipe, "auc": wanted, "seconds": at}
            found.append(named | {"compiling_seconds": compiling})
    return found


def _medians(phases: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([each[name] for each in phases])) for name in phases[0]}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _timed(command: Sequence[object], **environment: str) -> tuple[float, str]:
    start = time.perf_counter()
    printed = call(f"the job of {command[2]}", command, **environment)
    return time.perf_counter() - start, printed


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    found = circumstances_apart("auto")
    on = "gpu" if found["platform"] == "gpu" else "cpu"  # this TensorFlow does not support TPUs
    keras = python_of("keras", options.environments, on)
    if not keras.exists():
        raise InputError(f"no {keras}; make it with: python -m benchmarks.peers --setup")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder), on)
    print(headline(found))
    keys = ["job", "by", "start", "files", "epochs", "seconds"]
    print_table(keys, [[row[key] for key in keys] for row in measured["rows"]])
    for row in measured["rows"]:
        if row["phases"]:
            spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
            print(f"{row['job']}, {row['start']}: {spent}")
    for name, ratio in measured["ratio"].items():
        print(f"{name}: {ratio:.2f} times as fast as Keras")
    keys = ["recipe", "auc", "seconds", "compiling_seconds"]
    print_table(keys, [[row[key] for key in keys] for row in measured["time_to_quality"]])
    if options.json is not None:
        write_json(options.json, {"circumstances": found} | measured)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
