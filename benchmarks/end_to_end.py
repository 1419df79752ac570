"""From the start of a process to a trained and judged network, beside the post's own Keras program.

    python -m benchmarks.end_to_end --data chest_xray --full-resolution DIR --json end_to_end.json

Two jobs, each a process of its own, ours and Keras's in turn, on the same training and held-out
files: the post's 15 epochs on a tree of small images, and 5 epochs on files as published, the
tree's repeated under new names up to `--files`. Cold means that our process finds neither decoded
images nor compiled programs, warm that it finds both. A first start of each side is not measured:
it brings files and programs into the system's cache. Then the time to quality: how long after a
cold start a recipe's held-out AUC first passes some values.
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
    """Which jobs."""

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
    """How often each job is done by each side."""
    quality: tuple[float, ...] = (0.98, 0.99)
    """Held-out AUC to be reached."""
    environments: Path = ENVIRONMENTS
    """Folder of the peers' environments (`python -m benchmarks.peers --setup`)."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""

    def __post_init__(self) -> None:
        for name in ("files", "epochs", "full_epochs", "rounds"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least 1, got {getattr(self, name)}")


def repeated(source: Path, files: int, target: Path) -> None:
    """Repeats the training images of a tree as copies of new patients, up to so many files."""
    examples = list(read_index(source).split("train"))
    random.Random(0).shuffle(examples)  # both classes, however few the files
    for i in range(files):
        example = examples[i % len(examples)]
        name = f"person{i}_virus_1.jpeg" if example.label else f"IM-{i}-0001.jpeg"
        to = target / "train" / ("PNEUMONIA" if example.label else "NORMAL") / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / example.name, to)


@dataclass(frozen=True)
class Job:
    """How long one of our jobs took."""

    seconds: float
    phases: dict[str, float]
    """Seconds of each phase; they add up to all."""
    compiling: float
    """Seconds in which JAX traced and XLA compiled, within the phases."""
    lines: list[tuple[float, float]]
    """For each epoch, the seconds from the start until its line stood in `metrics.jsonl`, and those
    of compiling among them."""


def ours(
    root: Path, epochs: int | None, scratch: Path, *, cold: bool, recipe: str = "baseline"
) -> Job:
    """Trains in a process of its own, for the recipe's own number of epochs if that is None."""
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
    """Trains with Keras on a platform in a process of its own; returns its seconds."""
    python = python_of("keras", options.environments, on)
    return _timed([python, "-m", "benchmarks.peers.keras_job", folder, str(epochs), on])[0]


def split_folder(root: Path, run: Path, target: Path) -> None:
    """Links a run's training and held-out images as Keras wants them: train/CLASS, val/CLASS."""
    for row in Workdir(run).read_split():
        path = root / row["image"]
        side = "train" if row["role"] == "train" else "val"
        to = target / side / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(path.resolve())


def measure(options: Options, scratch: Path, on: str) -> dict[str, Any]:
    """Does every job by both sides on a platform; returns the document."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    jobs = [("small", options.data, options.epochs)]
    if options.full_resolution is not None:
        repeated(options.full_resolution, options.files, scratch / "full")
        jobs.append(("full resolution", scratch / "full", options.full_epochs))
    for job, root, epochs in jobs:
        # Unmeasured: writes the split, and brings files and programs into the system's cache.
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
    """Returns when each recipe's held-out AUC first passed each value, from a cold start."""
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
    on = "gpu" if found["platform"] == "gpu" else "cpu"  # TensorFlow's here take no TPU
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
