"""Memory of decoding on the fly, of this process and of its workers, by the size of the data set.

    python -m benchmarks.memory --films 5000 50000

Each size has a process of its own. It links a few random JPEG files as often as needed into class
folders, reads the index, decodes each file once for its facts, and then feeds batches to the
devices, decoded by worker processes. The table shows the anonymous memory (RssAnon) at the end.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from benchmarks.measure import print_table
from cnnjax.cli import guarded
from cnnjax.config import DeviceConfig
from cnnjax.data import cache
from cnnjax.data.batches import Feeder
from cnnjax.data.index import read_index
from cnnjax.errors import InputError
from cnnjax.machine import devices

_FILES, _PIXELS = 50, 128  # different files, and their side


@dataclass(frozen=True)
class Options:
    """What is measured."""

    films: tuple[int, ...] = (5_000, 50_000)
    """Numbers of films."""
    size: int = 96
    """Side of the squares, in pixels."""
    workers: int = 2
    """Worker processes."""
    steps: int = 200
    """Batches of 32 films that are fed before the memory is read."""

    def __post_init__(self) -> None:
        if min(*self.films, self.size, self.workers, self.steps) < 1:
            raise InputError("--films, --size, --workers and --steps must be at least 1")


def linked(root: Path, films: int) -> None:
    """Makes class folders of this many films, which are links to a few files."""
    rng = np.random.default_rng(0)
    for k in range(_FILES):
        pixels = rng.integers(0, 256, (_PIXELS, _PIXELS), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{k}.jpeg")
    folders = [root / "tree" / "train" / name for name in ("NORMAL", "PNEUMONIA")]
    for folder in folders:
        folder.mkdir(parents=True)
    for i in range(films):
        (folders[i % 2] / f"{i:07}.jpeg").hardlink_to(root / f"{i % _FILES}.jpeg")


def anonymous(pid: int | str) -> float:
    """Returns the anonymous memory of a process, in MiB."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def measure(options: Options) -> list[float]:
    """Returns MiB of this process after the index, and at the end; and of the largest worker."""
    (films,) = options.films
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        linked(root, films)
        index = read_index(root / "tree")
        mesh = devices.make_mesh(DeviceConfig("cpu"))
        before = anonymous("self")
        decoded = cache.load(
            index.split("train"), index.source, options.size, folder=root / "cache", limit_mib=0
        )
        feeder = Feeder(decoded.images, decoded.labels, mesh, -1, workers=options.workers)
        order = np.random.default_rng(0).integers(0, films, (options.steps, 32))
        for _ in feeder.feed(order):
            pass
        workers = [anonymous(p.pid) for p in multiprocessing.active_children() if p.pid]
        found = [before, anonymous("self"), max(workers)]
        feeder.close()
    return found


def main() -> int:
    """Measures and prints; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    if len(options.films) == 1:
        print(*measure(options))
        return 0
    rows = []
    for films in options.films:
        command = [sys.executable, "-m", "benchmarks.memory", "--films", str(films)]
        for name in ("size", "workers", "steps"):
            command += [f"--{name}", str(getattr(options, name))]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append([films, *map(float, told.splitlines()[-1].split())])
    print_table(["films", "MiB after the index", "MiB at the end", "MiB of a worker"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
