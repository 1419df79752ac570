"""The folder of a run: what stands in it, and that it belongs to one config and one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from cnnjax.config import Config, differences, from_json, to_json
from cnnjax.data.files import write_atomically
from cnnjax.errors import InputError
from cnnjax.operating import OperatingPoint


class Workdir:
    """Paths of a run's files, and the few that are read back.

    Attributes:
        config: `config.json`, all that decides the run.
        data: `data.json`, the fingerprint of the images it was trained on, and the class names.
        split: `split.csv`, each image's patient, label and role.
        quarantine: `quarantine.csv`, files that could not be decoded.
        sessions: `sessions.jsonl`, versions and devices of each start.
        metrics: `metrics.jsonl`, an object for each epoch.
        throughput: `throughput.jsonl`, wall time for each epoch; the only file with times in it.
        checkpoints: `checkpoints/latest` and `checkpoints/best`.
        validation: `validation.csv`, a logit for each held-out image.
        operating: `operating.json`, the operating point of the best and the latest state.
        summary: `summary.json`, written when training has ended.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.data = root / "data.json"
        self.split = root / "split.csv"
        self.quarantine = root / "quarantine.csv"
        self.sessions = root / "sessions.jsonl"
        self.metrics = root / "metrics.jsonl"
        self.throughput = root / "throughput.jsonl"
        self.checkpoints = root / "checkpoints"
        self.validation = root / "validation.csv"
        self.operating = root / "operating.json"
        self.summary = root / "summary.json"

    def read_config(self) -> Config:
        """Returns the run's config.

        Raises:
            InputError: there is no run here.
        """
        if not self.config.is_file():
            raise InputError(
                f"{self.root} is no run: it has no config.json; give a run's --workdir"
            )
        return from_json(self.config.read_text("utf-8"), str(self.config))

    def read_classes(self) -> tuple[str, str]:
        """Returns the names of labels 0 and 1."""
        negative, positive = json.loads(self.data.read_text("utf-8"))["classes"]
        return negative, positive

    def read_operating(self, kind: str) -> OperatingPoint:
        """Returns the operating point of the `best` or `latest` state.

        A run that has not ended has none yet: then it is probability 0.5, as the network gives it.
        """
        if not self.operating.exists():
            return OperatingPoint()
        return OperatingPoint(**json.loads(self.operating.read_text("utf-8"))[kind])

    def claim_data(self, fingerprint: str, classes: tuple[str, str]) -> None:
        """Notes what the run is trained on, or checks that it is the same as before.

        Raises:
            InputError: it is not.
        """
        if not self.data.exists():
            write_json(self.data, {"fingerprint": fingerprint, "classes": classes})
        elif json.loads(self.data.read_text("utf-8"))["fingerprint"] != fingerprint:
            raise InputError(
                f"{self.root} was trained on other images than --data.root holds now;"
                " restore them or choose another --workdir"
            )

    def read_history(self, epochs: int) -> list[dict[str, Any]]:
        """Returns the first `epochs` lines of `metrics.jsonl`, and drops what follows from it.

        A run that was killed may have written a line, or part of one, beyond its checkpoint.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text("utf-8").splitlines(keepends=True)[:epochs]
        with write_atomically(self.metrics) as file:
            file.writelines(lines)
        return [json.loads(line) for line in lines]


@contextmanager
def claim(config: Config) -> Iterator[Workdir]:
    """Makes the config's workdir, or takes it up again, and locks it while the block runs.

    Raises:
        InputError: it is in use, belongs to another config, or cannot be written.
    """
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
    with lock:
        if workdir.config.exists():
            changed = differences(config, workdir.read_config())
            if changed:
                raise InputError(
                    f"{workdir.root} belongs to another config: {', '.join(changed)};"
                    " give the same flags to resume it, or choose another --workdir"
                )
        else:
            with write_atomically(workdir.config) as file:
                file.write(to_json(config))
        yield workdir


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Adds one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    with write_atomically(path) as file:
        json.dump(values, file, indent=2)
        file.write("\n")
