"""The folder of a run: what stands in it, and that it belongs to one config and one process.

Of several processes of a run (`cnnjax.machine.processes`), the main one claims it and writes to it.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import filelock
import numpy as np

from cnnjax import __version__
from cnnjax.config import Config, differences, expect_effect, flags, from_json, to_json
from cnnjax.errors import InputError
from cnnjax.machine import processes
from cnnjax.machine.files import read_cell, write_atomically
from cnnjax.operating import OperatingPoint, Points, SoftmaxPoint, points_from_json

BINARY, SOFTMAX = "cnnjax.objectives:Binary", "cnnjax.objectives:Softmax"
"""The objectives of one logit, and of one for each class, as `parts.json` names them."""


class Judged(NamedTuple):
    """A run's held-out images with what it says of them."""

    names: list[str]
    labels: np.ndarray
    """int [n]."""
    patients: list[str]
    logits: np.ndarray
    """float64 [n], or [n, K] of K classes."""


class Workdir:
    """Paths of a run's files, and what is read back from them.

    Attributes:
        config: `config.json`, all that decides the run.
        data: `data.json`, the fingerprint of the images it was trained on, the class names, and
            whether they are drawn.
        parts: `parts.json`, what `fit` was given beside the config, if anything (see
            `cnnjax.run.parts`).
        init: `init.json`, what was copied of the weights of `--train.init`.
        split: `split.csv`, each image's patient, label and role.
        quarantine: `quarantine.csv`, files that are left out, each with the reason.
        duplicates: `duplicates.csv`, images that show the film of an earlier one.
        sessions: `sessions.jsonl`, versions and devices of each start.
        metrics: `metrics.jsonl`, an object for each epoch.
        throughput: `throughput.jsonl`, wall time for each epoch; the only file with times in it.
        events: `tensorboard/`, event files where the config asks for them.
        checkpoints: `checkpoints/latest` and `checkpoints/best`.
        validation: `validation.csv`, the logits of each held-out image.
        operating: `operating.json`, the operating points of the best and the latest state.
        summary: `summary.json`, written when training has ended.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.data = root / "data.json"
        self.parts = root / "parts.json"
        self.init = root / "init.json"
        self.split = root / "split.csv"
        self.quarantine = root / "quarantine.csv"
        self.duplicates = root / "duplicates.csv"
        self.sessions = root / "sessions.jsonl"
        self.metrics = root / "metrics.jsonl"
        self.throughput = root / "throughput.jsonl"
        self.events = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.validation = root / "validation.csv"
        self.operating = root / "operating.json"
        self.summary = root / "summary.json"

    @property
    def begun(self) -> bool:
        """Whether a run lives here: one that was given up before its data were read is none."""
        return self.config.exists() and (self.data.exists() or self.checkpoints.exists())

    def read_config(self) -> Config:
        """Returns the run's config.

        Raises:
            InputError: there is no run here.
        """
        if not self.config.is_file():
            missing = "it has no config.json" if self.root.exists() else "it does not exist"
            raise InputError(f"{self.root} is no run: {missing}; give a run's --workdir")
        return from_json(_read_text(self.config), str(self.config))

    def write_config(self, config: Config) -> None:
        """Writes down what the run was last given; what decides it is the same as before."""
        if not processes.is_main():
            return
        with write_atomically(self.config) as file:
            file.write(to_json(config))

    def read_classes(self) -> tuple[str, ...]:
        """Returns the names of the labels, 0 and up."""
        return tuple(read_json(self.data, "classes"))

    @property
    def has_softmax(self) -> bool:
        """Whether the network has a logit for each class: always, where there are three or more."""
        objective = self.read_parts()["objective"]
        return len(self.read_classes()) > 2 or (
            objective is not None and objective["part"] == SOFTMAX
        )

    def read_parts(self) -> dict[str, Any]:
        """Returns what `cnnjax.train.fit` was given beside the config; see `cnnjax.run.parts`."""
        nothing = dict.fromkeys(("network", "objective", "optimizer", "augment", "init"))
        return nothing | read_json(self.parts) if self.parts.exists() else nothing

    def claim_parts(self, given: dict[str, Any]) -> None:
        """Notes what `cnnjax.train.fit` is given, or checks that it is the same as before.

        Raises:
            InputError: it is not.
        """
        if not self.checkpoints.exists():
            if any(given.values()):
                write_json(self.parts, given)
            return
        for name, before in self.read_parts().items():
            now = given[name]
            # What has begun needs nothing to start from.
            if now != before and not (name == "init" and now is None):
                raise InputError(
                    f"{self.root} was trained with another {name}: {_shown(now)} (was"
                    f" {_shown(before)}); give the same to resume it, or choose another --workdir"
                )

    def read_operating(self, kind: str) -> Points:
        """Returns the operating points of the `best` or `latest` state.

        A run that has not ended has none yet: then probabilities are as the network gives them,
        and the decision is at 0.5 or, of three and more classes, for the most probable one.
        """
        if not self.operating.exists() and not self.summary.exists():
            nothing = SoftmaxPoint() if self.has_softmax else OperatingPoint()
            return dict.fromkeys(self.read_config().augment.looks, nothing)
        try:
            return points_from_json(read_json(self.operating, kind))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{self.operating} holds no operating points; restore it") from None

    def expect_ended(self) -> None:
        """Raises InputError where training has not come to its end."""
        if not self.summary.exists():
            raise InputError(
                f"{self.root} has not ended; give its training command again, then the report"
            )

    def read_summary(self) -> dict[str, Any]:
        """Returns what a run that has ended came to."""
        summary: dict[str, Any] = read_json(self.summary)
        return summary

    def read_validation(self) -> Judged:
        """Returns the held-out images of a run that has ended, as its best epoch judges them."""
        logits = ["logit_best"]
        if self.has_softmax:
            logits = [f"logit_best_{name}" for name in self.read_classes()]
        rows = read_table(self.validation, ("image", "label", "patient", *logits))
        if not rows:
            raise InputError(f"{self.validation} holds no images; restore it")
        with _undamaged(self.validation):
            labels = np.array([int(row["label"]) for row in rows])
            found = np.array([[float(row[name]) for name in logits] for row in rows])
            return Judged(
                [row["image"] for row in rows],
                labels,
                [row["patient"] for row in rows],
                found if self.has_softmax else found[:, 0],
            )

    def read_split(self) -> list[dict[str, str]]:
        """Returns the rows of the run's split: image, patient, label and role of each image."""
        rows = read_table(self.split, ("image", "patient", "label", "role"))
        with _undamaged(self.split):
            for row in rows:
                int(row["label"])
        return rows

    def trained_on(self, names: Iterable[str]) -> int:
        """Counts the names, by split, class and file, that the run's training images bear."""
        if not self.split.exists():
            return 0
        rows = self.read_split()
        ours = {PurePosixPath(row["image"]).parts[-3:] for row in rows if row["role"] == "train"}
        return sum(PurePosixPath(name).parts[-3:] in ours for name in names)

    def read_drawn(self) -> bool:
        """Tells whether the run was trained on drawn images (phantoms)."""
        values = read_json(self.data)
        if "drawn" not in values:  # as of 0.2
            return self.read_config().data.root == "phantom"
        return bool(values["drawn"])

    def claim_data(self, fingerprint: str, classes: tuple[str, ...], drawn: bool = False) -> None:
        """Notes what the run is trained on, or checks that it is the same as before.

        Args:
            fingerprint: of the images.
            classes: their names.
            drawn: whether they are phantoms.

        Raises:
            InputError: it is not, or another process reads other images.
        """
        if len(set(processes.gather(fingerprint))) > 1:
            raise InputError("the processes read different images; give each the same --data.root")
        processes.on_main(lambda: self._claim_data(fingerprint, classes, drawn))

    def _claim_data(self, fingerprint: str, classes: tuple[str, ...], drawn: bool) -> None:
        if not self.data.exists() and not self.checkpoints.exists():
            values = {"fingerprint": fingerprint, "classes": classes, "drawn": drawn}
            write_json(self.data, values)
        elif read_json(self.data, "fingerprint") != fingerprint:
            raise InputError(
                f"{self.root} was trained on other images than --data.root holds now;"
                " restore them or choose another --workdir"
            )

    def expect_split(self, names: Sequence[str], held_out: np.ndarray) -> None:
        """Raises InputError where a run that has begun was trained on another split of its images.

        Earlier versions drew other splits of some data sets.

        Args:
            names: of n images.
            held_out: bool [n], true where the image validates now.
        """
        if not self.checkpoints.exists():
            return
        validated = {row["image"] for row in self.read_split() if row["role"] == "validation"}
        validates = {name for name, held in zip(names, held_out, strict=True) if held}
        if moved := sorted(validated ^ validates):
            now, was = ("train", "validation") if moved[0] in validated else ("validation", "train")
            raise InputError(
                f"{self.root} was trained on another split of the images: {len(moved):,} have"
                f" another role now, as {moved[0]}, {now} (was {was}); resume it with the version"
                " of cnnjax that began it, or choose another --workdir"
            )

    def expect_versions(self) -> None:
        """Raises InputError where the run was last trained with other versions.

        Those of cnnjax and jax count, by their first two numbers, which tell what may change the
        outcome by more than rounding.
        """
        lines = read_lines(self.sessions) if self.sessions.exists() else []
        for name in ("cnnjax", "jax") if lines else ():
            before, now = lines[-1]["versions"][name], versions()[name]
            if before.split(".")[:2] != now.split(".")[:2]:
                raise InputError(
                    f"{self.root} was trained with {name} {before}, and this is {now}; install"
                    f" that, or give --other-versions to go on with this one"
                )

    def read_history(self, epochs: int) -> list[dict[str, Any]]:
        """Returns the first `epochs` lines of `metrics.jsonl`, and drops what follows from it.

        A run that was killed may have written a line or two, or part of one, beyond its checkpoint,
        and so in `throughput.jsonl`.

        Raises:
            InputError: there are fewer, or so many more that a checkpoint is gone.
        """
        if not self.metrics.exists() and not epochs:
            return []
        lines = _read_text(self.metrics).splitlines(keepends=True)
        if len(lines) > epochs + 2:
            raise InputError(
                f"{self.metrics} tells of {len(lines)} epochs, {self.checkpoints / 'latest'} of"
                f" {epochs}; restore that, or choose another --workdir"
            )
        lines = lines[:epochs]
        if len(lines) < epochs:
            raise InputError(
                f"{self.metrics} holds {len(lines)} epochs of {epochs}; restore it, or choose"
                " another --workdir"
            )
        with write_atomically(self.metrics) as file:
            file.writelines(lines)
        if self.throughput.exists():
            times = _read_text(self.throughput).splitlines(keepends=True)
            with write_atomically(self.throughput) as file:
                file.writelines(line for line in times if _epoch_of(line) <= epochs)
        return read_lines(self.metrics)


@contextmanager
def claim(config: Config) -> Iterator[Workdir]:
    """Makes the config's workdir, or takes it up again, and locks it while the block runs.

    Raises:
        InputError: it is in use, belongs to another config, cannot be written, or is not one folder
            for all processes, or those have different configs.
    """
    given = {flag: str(x) for flag, x in flags(config).items() if flag != "--distributed.process"}
    for theirs in processes.gather(given):
        if changed := [flag for flag in given if given[flag] != theirs[flag]]:
            raise InputError(f"the processes were given different {changed[0]}; give all the same")
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(_locked(config))

        processes.on_main(enter)
        if not processes.see(config.workdir):
            raise InputError(
                f"--workdir {config.workdir} is not one folder for all processes; choose one on a"
                " file system that they share"
            )
        yield Workdir(config.workdir)


@contextmanager
def _locked(config: Config) -> Iterator[None]:
    """Makes or checks the config's workdir, and locks it while the block runs; see `claim`."""
    workdir = Workdir(config.workdir)
    try:
        workdir.root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir.root / "run.lock")
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(
            f"{workdir.root} is in use by another run; wait for it or choose another --workdir"
        ) from None
    except OSError as error:
        raise InputError(
            f"--workdir {workdir.root} cannot be written ({error.strerror or error})"
        ) from None
    try:
        if not workdir.config.exists() and workdir.checkpoints.exists():
            raise InputError(
                f"{workdir.root} has checkpoints but no config.json, which tells what they are of;"
                " restore it, or choose another --workdir"
            )
        expect_effect(config, resumed=workdir.begun)
        if workdir.begun:
            before = workdir.read_config()
            changed = differences(config, before)
            if changed:
                more = config.train.epochs - before.train.epochs
                extend = f" (to go on for more epochs, --train.extend {more})" if more > 0 else ""
                raise InputError(
                    f"{workdir.root} belongs to another config: {', '.join(changed)};"
                    f" give the same flags to resume it{extend}, or choose another --workdir"
                )
            if not config.other_versions:
                workdir.expect_versions()
            if config.train.extend != before.train.extend:
                workdir.write_config(config)
        else:
            workdir.write_config(config)
        yield
    finally:
        lock.release()


def versions() -> dict[str, str]:
    """Returns the versions of what decides a run's outcome, by the name of the package."""
    others = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {"cnnjax": __version__} | {name: version(name) for name in others}


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows of a CSV file as `cnnjax.machine.files.write_rows` writes it.

    Raises:
        InputError: it is not there, or lacks one of the columns in a row.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [
                {name: cell and read_cell(cell) for name, cell in row.items() if name is not None}
                for row in csv.DictReader(file)
            ]
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason}); restore it") from None
    if any(row.get(column) is None for row in rows for column in columns):
        raise InputError(f"{path} lacks some of {', '.join(columns)}; restore it")
    return rows


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON Lines."""
    try:
        return [json.loads(line) for line in _read_text(path).splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON Lines ({error}); restore it") from None


def read_json(path: Path, key: str | None = None) -> Any:
    """Returns what a JSON file holds, or what its object holds by a key.

    Raises:
        InputError: it is not there or not valid, or there is no such key.
    """
    try:
        values = json.loads(_read_text(path))
        return values if key is None else values[key]
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore it") from None
    except (KeyError, TypeError):
        raise InputError(f"{path} has no {key}; restore it") from None


def _shown(part: Any) -> str:
    """Returns a part's description as a phrase."""
    if isinstance(part, dict):
        fields = part["fields"] or {}
        return f"{part['part']}({', '.join(f'{k}={v}' for k, v in fields.items())})"
    return "that of the config" if part is None else str(part)[:16]


def _epoch_of(line: str) -> float:
    """Returns the number of the epoch that a line is about; infinity for a broken one."""
    try:
        return float(json.loads(line)["epoch"])
    except (KeyError, TypeError, ValueError):
        return math.inf


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path} cannot be read ({reason}); restore it") from None


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Adds one JSON object as a line, in place of a line that was left unfinished."""
    if not processes.is_main():
        return
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    if not processes.is_main():
        return
    with write_atomically(path) as file:
        json.dump(values, file, indent=2)
        file.write("\n")
