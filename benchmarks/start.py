"""Time and memory until the first batch, by the number of images.

    python -m benchmarks.start --images 5000 500000 --json start.json

Draws a tree of small images of noise with the names of the published data set, and decodes it into
a cache. Then starts a training of the streamed images (`--data.resident-mib 0`) in processes of
their own: from the start of the process to the first batch, without compiling, and on for some
steps. The seconds of the processor depend less on what else runs. Another process counts the bytes
of all objects that reading the data leaves in memory. The growth of the memory from the smallest
to the largest tree, divided by that of the number of images, is the memory of an image. Memory is
anonymous (`RssAnon`): the pages of memory-mapped files are the system's, which takes them back
when it needs them. Linux only.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import contextlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import tracemalloc  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import tyro  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    ROOT,
    circumstances,
    headline,
    print_table,
    recipe_of,
    write_json,
)
from cnnjax.cli import guarded  # noqa: E402
from cnnjax.config import Config, DeviceConfig  # noqa: E402
from cnnjax.errors import InputError  # noqa: E402
from cnnjax.machine.host import cpu_cores  # noqa: E402

_SHARES = {"train": 0.88, "val": 0.02, "test": 0.1}
_KINDS = {"NORMAL": 1 / 3, "bacteria": 1 / 3, "virus": 1 / 3}
_STEPS = 8  # steps after the first batch


@dataclass(frozen=True)
class Options:
    """What is measured."""

    images: tuple[int, ...] = (5_000, 500_000)
    """Numbers of images, ascending."""
    size: int = 16
    """Side of the decoded squares, in pixels."""
    rounds: int = 3
    """Starts of each tree that are counted; the first, which decodes, is not."""
    folder: Path | None = None
    """Keep the trees and the caches here; they are used again."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""

    def __post_init__(self) -> None:
        if len(self.images) < 2 or list(self.images) != sorted({*self.images}):
            raise InputError(f"--images needs two or more ascending numbers, got {self.images}")
        if self.images[0] < 1000:
            raise InputError("--images must be at least 1000")


def names_of(images: int) -> Iterator[str]:
    """Yields names as those published; a patient has one to four images."""
    rng = np.random.default_rng(0)
    number = patient = 0
    for split, part in _SHARES.items():
        for kind, share in _KINDS.items():
            left = round(images * part * share)
            while left:
                patient += 1
                shots = min(left, int(rng.integers(1, 5)))
                left -= shots
                for shot in range(shots):
                    number += 1
                    again = f"-{shot + 1:04}" if shot else ""
                    yield f"{split}/" + (
                        f"NORMAL/IM-{patient:04}-0001{again}.jpeg"
                        if kind == "NORMAL"
                        else f"PNEUMONIA/person{patient}_{kind}_{number}.jpeg"
                    )


def _draw(root: Path, names: Sequence[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in names:
        side = int(rng.integers(16, 25))
        noise = rng.integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(noise).save(root / name, quality=60)


def draw(root: Path, images: int) -> None:
    """Draws a tree of images, unless it exists."""
    if root.exists():
        return
    names = list(names_of(images))
    partial = root.with_name(f".{root.name}")
    for folder in {Path(name).parent for name in names}:
        (partial / folder).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(cpu_cores()) as pool:
        parts = range(0, len(names), 1000)
        some = [names[part : part + 1000] for part in parts]
        list(pool.map(_draw, [partial] * len(some), some, parts))
    partial.rename(root)


def starting(root: Path, cache: Path, size: int) -> dict[str, float]:
    """Starts a training, and takes some steps; returns the seconds until the first batch."""
    import jax

    from cnnjax.machine import devices
    from cnnjax.run.opening import open_run
    from cnnjax.train import compile_steps

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        run = stack.enter_context(open_run(_config(root, cache, size, folder)))
        feeds = run.feeder().feed(run.order(1)[: 1 + _STEPS])
        batch = next(feeds)
        found = {
            "seconds": time.perf_counter() - _START,
            "cpu_seconds": time.process_time(),
            "first_batch": time.monotonic(),
        }
        steps = compile_steps(run.mesh, run.train_step, run.placement)
        given = devices.place((run.key(0), run.objective), devices.replicated(run.mesh))
        state = run.first_state()
        for feed in itertools.chain([batch], feeds):
            state, _ = steps.one(state, None, feed, given)
        jax.block_until_ready(state)
    return found


def holding(root: Path, cache: Path, size: int) -> dict[str, float]:
    """Returns the bytes of all objects that reading the data leaves in memory."""
    from cnnjax.data.prepare import training_data

    config = _config(root, cache, size, "none")
    tracemalloc.start()
    data = training_data(config.data, config.seed, lambda _: None)
    held, _ = tracemalloc.get_traced_memory()
    return {"held_bytes": held, "train_images": len(data.labels)}


_CHILDREN = {"starting": starting, "holding": holding}


def _config(root: Path, cache: Path, size: int, workdir: str) -> Config:
    config = recipe_of("baseline")
    data = replace(config.data, root=str(root), cache=cache, size=size, resident_mib=0)
    return replace(config, workdir=Path(workdir), data=data)


def _child(what: str, *given: object) -> tuple[dict[str, Any], dict[float, int]]:
    """Runs a function in a process of its own.

    Returns:
        Its result, and the process's anonymous memory in bytes at each moment of `time.monotonic`.
    """
    command = [sys.executable, "-m", "benchmarks.start", what, *map(str, given)]
    memory: dict[float, int] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        while run.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{run.pid}/status").read_text().splitlines()
                line = next(line for line in status if line.startswith("RssAnon"))
                memory[time.monotonic()] = 1024 * int(line.split()[1])
            time.sleep(0.01)
        out, errors = run.communicate()
    if run.returncode:
        raise InputError(f"{what} failed: {errors.decode().strip().splitlines()[-1]}")
    return json.loads(out.splitlines()[-1]), memory


def measure(options: Options, folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each number of images."""
    rows: list[dict[str, Any]] = []
    trees = [(images, folder / f"{images}-films") for images in options.images]
    for images, root in trees:
        draw(root, images)
        rows.append({"images": images, "reading_peak": [], "peak": []})
        rows[-1] |= {"seconds": [], "cpu_seconds": []}
        for what in ("starting", "holding"):  # the first fills the cache
            found, _ = _child(what, root, folder / "cache", options.size)
        rows[-1] |= found
    for _ in range(options.rounds):
        for row, (_, root) in zip(rows, trees, strict=True):
            found, memory = _child("starting", root, folder / "cache", options.size)
            for key in ("seconds", "cpu_seconds"):
                row[key].append(found[key])
            reading = [held for at, held in memory.items() if at <= found["first_batch"]]
            row["reading_peak"].append(max(reading))
            row["peak"].append(max(memory.values()))
    for row in rows:
        for key in ("seconds", "cpu_seconds", "reading_peak", "peak"):
            row[key] = float(np.median(row[key]))
    for row in rows[1:]:
        for key in ("held_bytes", "reading_peak", "peak"):
            more = row["images"] - rows[0]["images"]
            row[f"{key}_per_image"] = (row[key] - rows[0][key]) / more
    return rows


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    if len(sys.argv) == 5 and sys.argv[1] in _CHILDREN:
        what, root, cache, size = sys.argv[1:]
        print(json.dumps(_CHILDREN[what](Path(root), Path(cache), int(size))))
        return 0
    options = tyro.cli(Options, description=__doc__)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(options, folder.resolve())
    found = circumstances(DeviceConfig("cpu"))
    print(headline(found))
    keys = ["images", "seconds", "cpu_seconds", "held_bytes", "reading_peak", "peak"]
    keys += [f"{key}_per_image" for key in keys[3:]]
    print_table(keys, [[row.get(key) for key in keys] for row in rows])
    if options.json is not None:
        write_json(options.json, {"circumstances": found, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
