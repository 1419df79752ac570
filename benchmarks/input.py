"""Speed of reading images: into the cache, from the cache, and by the peers.

    python -m benchmarks.input --data chest_xray --full-resolution DIR --json input.json

Each reader makes one pass over the training images of each tree, and the readers alternate. Ours
decodes into an empty cache (cold) or maps an existing one (warm). Pillow decodes at full size in a
plain loop, Keras reads with `flow_from_directory`, and PyTorch with a `DataLoader` over Pillow.
Then short trainings measure the share of their time spent waiting for data, for each way in which
the images reach the devices (docs/scaling.md). The first round is not
counted; after it the files are in the operating system's cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import numpy as np
import tyro
from PIL import Image

from benchmarks.measure import (
    ENVIRONMENTS,
    Run,
    call,
    circumstances,
    headline,
    in_turn,
    print_table,
    python_of,
    spread,
    write_json,
)
from cnnjax import recipes, train
from cnnjax.cli import guarded
from cnnjax.config import Config, DataConfig, DeviceConfig, ModelConfig
from cnnjax.data import cache
from cnnjax.data.batches import Feeder
from cnnjax.data.index import read_index
from cnnjax.errors import InputError
from cnnjax.machine.host import cpu_cores
from cnnjax.run import training


@dataclass(frozen=True)
class Options:
    """What is measured."""

    data: Path
    """A tree of small images: train/NORMAL and so on."""
    full_resolution: Path | None = None
    """A tree of images as published."""
    size: int = 64
    """Side of the squares, in pixels."""
    rounds: int = 3
    """Rounds after the first, which is not counted."""
    environments: Path = ENVIRONMENTS
    """Folder of the peers' environments (made by `python -m benchmarks.peers --setup`); missing
    ones are left out."""
    reading: bool = True
    """Measure the speed of the readers."""
    waiting: bool = True
    """Measure the time that training waits for data."""
    recipe: Literal["baseline", "pneumonia"] = "baseline"
    """The recipe that is trained for the time that it waits; `pneumonia` at its own size."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""

    def __post_init__(self) -> None:
        for name in ("size", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")


def readers(options: Options, root: Path, scratch: Path) -> tuple[int, dict[str, Run]]:
    """Returns the number of images under root, and functions that read all of them, by name."""
    index = read_index(root)
    examples = index.split("train")
    kept = scratch / f"kept-{root.name}"

    def cold() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            cache.load(examples, index.source, options.size, folder=Path(folder), progress=False)

    def warm() -> None:
        decoded = cache.load(examples, index.source, options.size, folder=kept, progress=False)
        np.asarray(decoded.images).sum()

    files = [
        path for path in sorted((root / "train").rglob("*")) if path.suffix.lower() in _SUFFIXES
    ]

    def pillow() -> None:
        for path in files:
            with Image.open(path) as image:
                image.convert("L").resize((options.size, options.size), Image.Resampling.BOX)

    runs: dict[str, Run] = {"ours, cold": cold, "ours, warm": warm, "Pillow loop": pillow}
    for peer in ("keras", "torch"):
        # Both environments read alike.
        pythons = [python_of(peer, options.environments, on) for on in ("cpu", "gpu")]
        python = next((python for python in pythons if python.exists()), pythons[0])
        if python.exists():
            runs[peer] = partial(_peer, peer, python, root / "train", options.size)
        else:
            made = "make it with python -m benchmarks.peers --setup"
            print(f"{peer} is left out: no {python}; {made}")
    return len(files), runs


_SUFFIXES = {".jpeg", ".jpg", ".png"}
_inside: dict[str, float] = {}  # seconds measured in the process of a peer


def _peer(peer: str, python: Path, root: Path, size: int) -> None:
    command = [python, "-m", "benchmarks.peers.reading", peer, root, size, cpu_cores()]
    _inside[peer] = float(call(f"{peer}, reading {root},", command))


def measure(options: Options, scratch: Path) -> list[dict[str, Any]]:
    """Times every reader on every tree; returns the rows."""
    rows = []
    for what, root in (("small", options.data), ("full resolution", options.full_resolution)):
        if root is None:
            continue
        images, runs = readers(options, root, scratch)
        inner: dict[str, list[float]] = {}

        def noting(name: str, run: Run, inner: dict[str, list[float]] = inner) -> Run:
            def noted() -> None:
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                inner.setdefault(name, []).append(_inside.pop(name, took))

            return noted

        in_turn({name: noting(name, run) for name, run in runs.items()}, options.rounds)
        for name, seconds in inner.items():
            found = spread(seconds[1:])
            rate = images / found["median_ms"] * 1e3
            named = {"what": what, "by": name, "images": images, "images_per_second": rate}
            rows.append(named | found)
    return rows


WAYS: dict[str, dict[str, int]] = {
    "resident": {},
    "streamed": {"resident_mib": 0},
    "on-the-fly": {"resident_mib": 0, "cache_mib": 0},
}
"""The ways in which images reach the devices, and the fields of `DataConfig` that choose them."""


def waiting_share(options: Options, scratch: Path, way: str) -> float:
    """Returns the share of the training time, from the second epoch on, spent waiting for data.

    The loop waits for each step here, so the time until the next batch is a wait for data only.
    Otherwise the loop asks for a batch long before the device has finished the previous step.
    """
    waited = 0.0
    epochs: list[tuple[float, float]] = []  # seconds of waiting, total seconds

    class Watched(Feeder):
        def feed(self, rows: np.ndarray) -> Iterator[Any]:
            nonlocal waited
            feeds = super().feed(rows)
            while True:
                start = time.perf_counter()
                batch = next(feeds, None)
                waited += time.perf_counter() - start
                if batch is None:
                    return
                yield batch

    def epoch(*arguments: Any) -> Any:
        # Validation between the epochs also waits for data; it is not counted.
        before, start = waited, time.perf_counter()
        found = take_epoch(*arguments)
        epochs.append((waited - before, time.perf_counter() - start))
        return found

    def stepwise(*arguments: Any) -> train.Steps:
        steps = compile_steps(*arguments)
        return steps._replace(one=lambda *x: jax.block_until_ready(steps.one(*x)), together=1)

    config = recipes.pneumonia
    if options.recipe == "baseline":
        data = DataConfig(size=options.size)
        config = Config(model=ModelConfig("baseline"), data=data)
    data = replace(config.data, root=str(options.data), cache=scratch)
    for name, value in WAYS[way].items():
        data = replace(data, **{name: value})  # type: ignore[arg-type]
    config = replace(
        config,
        workdir=scratch / f"run-{way}",
        data=data,
        train=replace(config.train, epochs=3),
    )
    compile_steps, take_epoch = train.compile_steps, train.take_epoch
    fed = mock.patch.object(training, "Feeder", Watched)
    with fed, mock.patch.multiple(train, compile_steps=stepwise, take_epoch=epoch):
        train.fit(config)
    return sum(wait for wait, _ in epochs[1:]) / sum(seconds for _, seconds in epochs[1:])


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    found = circumstances(DeviceConfig("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder)) if options.reading else []
        waiting: list[dict[str, Any]] = []
        if options.waiting:
            for way in WAYS:
                waiting.append({"feed": way, "share": waiting_share(options, Path(folder), way)})
    print(headline(found))
    keys = ["what", "by", "images", "images_per_second", "median_ms"]
    print_table(keys, [[row[key] for key in keys] for row in rows])
    for row in waiting:
        print(f"waiting for {row['feed']} data: {100 * float(row['share']):.2g} % of the steps")
    if options.json is not None:
        write_json(options.json, {"circumstances": found, "rows": rows, "waiting": waiting})
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
