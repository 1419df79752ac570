"""The folder of a run: its files, and the checks that it belongs to one config and one process.

If a run has several processes (`cnnjax.machine.processes`), only the main process locks the folder
and writes to it.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
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
"""The objectives with one logit, and with one logit per class, as named in `parts.json`."""


class Judged(NamedTuple):
    """The held-out images of a run, with their logits."""

    names: list[str]
    labels: np.ndarray
    """int [n]."""
    patients: list[str]
    logits: np.ndarray
    """float64 [n], or [n, K] for K classes."""


class Workdir:
    """Paths of a run's files, and functions that read them.

    Attributes:
        config: `config.json`, all settings that decide the run.
        data: `data.json`, the fingerprint of the training images, the class names, and whether the
            images are phantoms.
        parts: `parts.json`, the arguments of `fit` other than the config, if any (see
            `cnnjax.run.parts`).
        init: `init.json`, the layers that were copied from the weights of `--train.init`.
        split: `split.csv`, each image's patient, label and role.
        quarantine: `quarantine.csv`, files that are left out, each with the reason.
        duplicates: `duplicates.csv`, images that repeat an earlier radiograph.
        sessions: `sessions.jsonl`, versions and devices of each start.
        metrics: `metrics.jsonl`, an object for each epoch.
        throughput: `throughput.jsonl`, wall time for each epoch; the only file that contains times.
        events: `tensorboard/`, event files if the config asks for them.
        checkpoints: `checkpoints/latest` and `checkpoints/best`.
        validation: `validation.csv`, the logits of each held-out image.
        operating: `operating.json`, the operating points of the best and the latest state.
        summary: `summary.json`, written when training has finished.
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
        """Whether the workdir holds a run that got as far as reading its data."""
        return self.config.exists() and (self.data.exists() or self.checkpoints.exists())

    def read_config(self) -> Config:
        """Returns the run's config.

        Raises:
            InputError: there is no run here.
        """
        if not self.config.is_file():
            missing = "it has no config.json" if self.root.exists() else "it does not exist"
            raise InputError(f"{self.root} is not a run: {missing}; give a run's --workdir")
        return from_json(_read_text(self.config), str(self.config))

    def write_config(self, config: Config) -> None:
        """Writes the config of the latest start; what decides the run must be unchanged."""
        if not processes.is_main():
            return
        with write_atomically(self.config) as file:
            file.write(to_json(config))

    def read_classes(self) -> tuple[str, ...]:
        """Returns the names of the labels 0, 1, ..."""
        return tuple(read_json(self.data, "classes"))

    @property
    def has_softmax(self) -> bool:
        """Whether the network has a logit per class; always true for three or more classes."""
        objective = self.read_parts()["objective"]
        return len(self.read_classes()) > 2 or (
            objective is not None and objective["part"] == SOFTMAX
        )

    def read_parts(self) -> dict[str, Any]:
        """Returns the recorded arguments of `cnnjax.train.fit`; see `cnnjax.run.parts`."""
        nothing = dict.fromkeys(("network", "objective", "optimizer", "augment", "init"))
        return nothing | read_json(self.parts) if self.parts.exists() else nothing

    def claim_parts(self, given: dict[str, Any]) -> None:
        """Records the arguments of `cnnjax.train.fit`, or checks that they are unchanged.

        Raises:
            InputError: they have changed.
        """
        if not self.checkpoints.exists():
            if any(given.values()):
                write_json(self.parts, given)
            return
        for name, before in self.read_parts().items():
            now = given[name]
            # A resumed run does not need initial weights.
            if now != before and not (name == "init" and now is None):
                raise InputError(
                    f"{self.root} was trained with another {name}: {_shown(now)} (was"
                    f" {_shown(before)}); give the same to resume it, or choose another --workdir"
                )

    def read_operating(self, kind: str) -> Points:
        """Returns the operating points of the `best` or `latest` state.

        An unfinished run has none. Its probabilities are not calibrated, and the decision threshold
        is 0.5 or, for three and more classes, the most probable class is chosen.

        Raises:
            InputError: the file is damaged.
        """
        if not self.operating.exists() and not self.summary.exists():
            nothing = SoftmaxPoint() if self.has_softmax else OperatingPoint()
            return dict.fromkeys(self.read_config().augment.looks, nothing)
        try:
            return points_from_json(read_json(self.operating, kind))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{self.operating} holds no operating points; restore it") from None

    def expect_ended(self) -> None:
        """Raises InputError if training has not finished."""
        if not self.summary.exists():
            raise InputError(
                f"{self.root} is not finished; give its training command again, then the report"
            )

    def read_summary(self) -> dict[str, Any]:
        """Returns the results of a finished run."""
        summary: dict[str, Any] = read_json(self.summary)
        return summary

    def read_validation(self) -> Judged:
        """Returns the held-out images of a finished run, with the logits of its best epoch."""
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
        return list(self._split_rows())

    def _split_rows(self) -> Iterator[dict[str, str]]:
        """Yields the rows of `read_split`, one at a time."""
        for row in _rows_of(self.split, ("image", "patient", "label", "role")):
            with _undamaged(self.split):
                int(row["label"])
            yield row

    def trained_on(self, names: Iterable[str]) -> int:
        """Counts the names that match a training image of the run by split, class and file name."""
        if not self.split.exists():
            return 0

        def place(name: str) -> str:
            return "/".join(name.split("/")[-3:])

        theirs = Counter(map(place, names))
        rows = (row["image"] for row in self._split_rows() if row["role"] == "train")
        return sum(theirs[each] for each in theirs.keys() & map(place, rows))

    def read_drawn(self) -> bool:
        """Returns whether the run was trained on drawn images (phantoms)."""
        values = read_json(self.data)
        if "drawn" not in values:  # written by version 0.2
            return self.read_config().data.root == "phantom"
        return bool(values["drawn"])

    def claim_data(self, fingerprint: str, classes: tuple[str, ...], drawn: bool = False) -> None:
        """Records the data of the run, or checks that they are unchanged.

        Args:
            fingerprint: fingerprint of the images.
            classes: names of the classes.
            drawn: whether the images are phantoms.

        Raises:
            InputError: the images have changed, or another process reads other images.
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
                f"{self.root} was trained on other images than those in --data.root now;"
                " restore them or choose another --workdir"
            )

    def expect_split(self, names: Sequence[str], held_out: np.ndarray) -> None:
        """Raises InputError if a resumed run was trained on another split of its images.

        Earlier versions drew other splits of some data sets.

        Args:
            names: names of n images.
            held_out: bool [n], true for images that are in validation now.
        """
        if not self.checkpoints.exists():
            return
        rows = self._split_rows()
        validated = {row["image"] for row in rows if row["role"] == "validation"}
        validates = {name for name, held in zip(names, held_out, strict=True) if held}
        if moved := sorted(validated ^ validates):
            now, was = ("train", "validation") if moved[0] in validated else ("validation", "train")
            raise InputError(
                f"{self.root} was trained on another split of the images: {len(moved):,} have"
                f" another role now: {moved[0]}, {now} (was {was}); resume it with the version"
                " of cnnjax that began it, or choose another --workdir"
            )

    def expect_versions(self) -> None:
        """Raises InputError if the run was last trained with other versions.

        The first two numbers of the versions of cnnjax and jax are compared: changes of these may
        change the results by more than rounding.
        """
        lines = read_lines(self.sessions) if self.sessions.exists() else []
        for name in ("cnnjax", "jax") if lines else ():
            before, now = lines[-1]["versions"][name], versions()[name]
            if before.split(".")[:2] != now.split(".")[:2]:
                raise InputError(
                    f"{self.root} was trained with {name} {before}, and this is {now}; install"
                    f" {before}, or give --other-versions to resume with {now}"
                )

    def read_history(self, epochs: int) -> list[dict[str, Any]]:
        """Returns the first `epochs` lines of `metrics.jsonl`, and removes later lines from it.

        A killed run may have written a few lines, or a part of one, after its last checkpoint. The
        same holds for `throughput.jsonl`.

        Raises:
            InputError: there are fewer lines, or so many more that a checkpoint is missing.
        """
        if not self.metrics.exists() and not epochs:
            return []
        lines = _read_text(self.metrics).splitlines(keepends=True)
        if len(lines) > epochs + 2:
            raise InputError(
                f"{self.metrics} has {len(lines)} epochs, {self.checkpoints / 'latest'} has"
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
    """Makes the config's workdir, or reopens it, and locks it while the block runs.

    Raises:
        InputError: the workdir is in use, belongs to another config, or cannot be written; or the
            processes have different configs or do not share the workdir.
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
                f"{workdir.root} has checkpoints but no config.json, which describes their run;"
                " restore it, or choose another --workdir"
            )
        expect_effect(config, resumed=workdir.begun)
        if workdir.begun:
            before = workdir.read_config()
            changed = differences(config, before)
            if changed:
                more = config.train.epochs - before.train.epochs
                extend = f" (to add epochs, --train.extend {more})" if more > 0 else ""
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
    """Returns the versions of the packages that affect a run's results, by package name."""
    others = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {"cnnjax": __version__} | {name: version(name) for name in others}


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows of a CSV file written by `cnnjax.machine.files.write_rows`.

    Raises:
        InputError: the file does not exist, or a row lacks one of the columns.
    """
    return list(_rows_of(path, columns))


def _rows_of(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yields the rows of `read_table`, one at a time."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for cells in csv.DictReader(file):
                row = {
                    name: cell and read_cell(cell)
                    for name, cell in cells.items()
                    if name is not None
                }
                if any(row.get(column) is None for column in columns):
                    raise InputError(f"{path} lacks some of {', '.join(columns)}; restore it")
                yield row
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason}); restore it") from None


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
    """Returns the content of a JSON file, or the value of a key in its object.

    Raises:
        InputError: the file does not exist or is not valid, or there is no such key.
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
    """Returns the epoch number of a line; infinity if the line is broken."""
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
    """Appends a JSON object as a line; an incomplete last line is replaced."""
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
    """Writes a JSON object atomically."""
    if not processes.is_main():
        return
    with write_atomically(path) as file:
        json.dump(values, file, indent=2)
        file.write("\n")
