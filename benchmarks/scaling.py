"""Scaling of a train step with devices, image size and number of images.

    python -m benchmarks.scaling --json scaling.json

Each point is a separate process that runs `step_time`. Weak scaling gives each device the same
batch, strong scaling shards one batch over the devices. Image sizes are measured on one device. The
devices of a CPU are virtual and share its cores; one device uses oneDNN's convolutions on all
cores, two and more use XLA's. On a CPU the curves show the cost of sharding, not the benefit of
more hardware.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.measure import call, circumstances_apart, headline, print_table, write_json
from benchmarks.projection import Assumptions, Step, project
from cnnjax import steps, train
from cnnjax.augment import make_augment
from cnnjax.cli import guarded
from cnnjax.config import AugmentConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.data import batches
from cnnjax.data.batches import Feeder
from cnnjax.errors import InputError
from cnnjax.machine import devices
from cnnjax.networks import make_model
from cnnjax.optimizers import make_optimizer

_EPOCH = "epoch"  # first argument of a process that measures one point of `images`


@dataclass(frozen=True)
class Options:
    """What is measured."""

    network: Literal["baseline", "resnet"] = "baseline"
    """Network to train."""
    counts: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; on an accelerator, numbers above the available devices are left out."""
    batch: int = 32
    """Images per step and device (weak scaling); strong scaling uses this times the largest of
    --counts as its batch."""
    images: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Numbers of images in the data set."""
    sizes: tuple[int, ...] = (32, 64, 96, 128, 224)
    """Sides of the images, in pixels."""
    rounds: int = 5
    """Rounds of each measurement."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Platform to compute on."""
    json: Path | None = None
    """Write the points and the circumstances to this file."""
    project: bool = False
    """Instead, project the time of a step on 8, 64 and 512 devices from a step of --batch images on
    one device (docs/scaling.md)."""
    step_ms: float = 0.0
    """Time of the step on one device, in milliseconds; 0 measures it."""
    links: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        for name in ("counts", "sizes"):
            if min(getattr(self, name), default=0) < 1:
                raise InputError(f"--{name} must be numbers of at least 1")
        if min(self.images, default=0) < 2 * self.batch or self.batch < 1:
            raise InputError("--images must be numbers of at least twice --batch")


def epoch(
    network: Any, platform: Any, images: int, size: int, batch: int, rounds: int
) -> dict[str, float]:
    """Times rounds of steps on a data set of random images; returns times and peak memory."""
    mesh = devices.make_mesh(DeviceConfig(platform))
    model = make_model(ModelConfig(network, width=16))
    optimizer, _ = make_optimizer(TrainConfig(), 1)
    everywhere = devices.replicated(mesh)
    key = jax.device_put(jax.random.key(0), everywhere)
    state: Any = jax.jit(
        lambda key: steps.init_state(model, optimizer, key, size), out_shardings=everywhere
    )(key)
    step = train.compile_steps(
        mesh, steps.make_train_step(model, optimizer, make_augment(AugmentConfig()))
    )
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, size, size), dtype=np.uint8)
    start = time.perf_counter()
    feeder = Feeder(pixels, rng.integers(0, 2, images).astype(np.int32), mesh, 2**15)
    jax.block_until_ready(feeder.data)
    place = time.perf_counter() - start
    numbers = range(-(-images // batch))
    batches.step_rows(key, numbers, np.arange(images), batch)  # the first call compiles
    start = time.perf_counter()
    order = batches.step_rows(key, numbers, np.arange(images), batch)
    shuffle = time.perf_counter() - start
    some = np.resize(order, (16, batch))
    bar: Any = tqdm(disable=True)
    took = []
    for _ in range(rounds + 1):  # the first round compiles
        start = time.perf_counter()
        state, _ = train.take_epoch(state, step, feeder, some, key, bar)
        took.append(time.perf_counter() - start)
    seconds = float(np.median(took[1:])) / len(some)
    return {
        "place_s": place,
        "shuffle_s": shuffle,
        "step_ms": seconds * 1e3,
        "epoch_s": seconds * len(order),
        "data_mib": pixels.nbytes / 2**20,
        "peak_mib": _peak_bytes(mesh.devices.flat[0]) / 2**20,
    }


def step_rows(options: Options, *flags: str) -> list[dict[str, Any]]:
    """Runs `step_time` in a separate process; returns its rows of train steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.step_time", "--networks", options.network]
        command += ["--rounds", str(options.rounds), "--device", options.device]
        call("step_time", [*command, *flags, "--json", str(out)])
        rows = json.loads(out.read_text("utf-8"))["rows"]
    return [row for row in rows if row["step"] == "train"]


def measure(options: Options, found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the points of each curve, given the circumstances."""
    virtual = found["platform"] == "cpu"
    counts = [n for n in options.counts if virtual or n <= found["devices"]]
    if not counts:
        raise InputError(f"--counts: there are only {found['devices']} devices; name fewer")
    curves: dict[str, list[dict[str, Any]]] = {"weak": [], "strong": [], "size": [], "images": []}
    total = options.batch * max(counts)
    for n in counts:
        for curve, batch in (("weak", options.batch * n), ("strong", total)):
            (row,) = step_rows(options, "--counts", str(n), "--batches", str(batch))
            curves[curve].append({"devices": n, "batch": batch} | _of(row))
    for size in options.sizes:
        sized = ("--sizes", str(size), "--batches", str(options.batch))
        (row,) = step_rows(options, "--counts", "1", *sized)
        curves["size"].append({"size": size, "batch": options.batch} | _of(row))
    for images in options.images:
        asked = [options.network, options.device, images, 64, options.batch, options.rounds]
        point = json.dumps(asked)
        command = [sys.executable, "-m", "benchmarks.scaling", _EPOCH, point]
        found = json.loads(call("an epoch", command).splitlines()[-1])
        curves["images"].append({"images": images} | found)
    return curves


def projected(options: Options) -> list[dict[str, Any]]:
    """Returns the parts of a step's time on 8, 64 and 512 devices."""
    size, batch = options.sizes[0] if len(options.sizes) == 1 else 64, options.batch
    ms = options.step_ms
    if not ms:
        flags = ("--counts", "1", "--sizes", str(size), "--batches", str(batch))
        (row,) = step_rows(options, *flags)
        ms = row["median_ms"]
    network = make_model(ModelConfig(options.network))
    images = jax.ShapeDtypeStruct((1, size, size, 1), np.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), images)
    norms = len(jax.tree.leaves(shapes.get("batch_stats", {}))) // 2
    parameters = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    step = Step(ms, batch, size, parameters, norms)
    print(f"{options.network}, {parameters:,} parameters, {size} x {size} pixels:")
    print(f"{ms:.3g} ms for a step of {batch} images on one device")
    return [project(step, options.links, devices) for devices in (8, 64, 512)]


def _of(row: dict[str, Any]) -> dict[str, Any]:
    names = ("median_ms", "quartile1_ms", "quartile3_ms", "images_per_second", "memory_mib")
    return {name: row[name] for name in names}


def _peak_bytes(device: Any) -> int:
    """Returns the peak memory of an accelerator or, on a CPU, of this process, in bytes."""
    if device.platform != "cpu":
        return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
    # The unit is bytes on macOS, KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    if options.project:
        points = projected(options)
        print_table(list(points[0]), [list(point.values()) for point in points])
        if options.json is not None:
            write_json(options.json, {"assumptions": asdict(options.links), "points": points})
        return 0
    found = circumstances_apart(options.device)
    curves = measure(options, found)
    print(headline(found))
    for name, points in curves.items():
        print(f"\n{name}")
        print_table(list(points[0]), [list(point.values()) for point in points])
    if options.json is not None:
        write_json(options.json, {"circumstances": found, "network": options.network} | curves)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == [_EPOCH]:
        print(json.dumps(epoch(*json.loads(sys.argv[2]))))
        sys.exit()
    sys.exit(guarded(main))
