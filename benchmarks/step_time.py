"""How long a train step and an eval step take, compiled and in plain NumPy, in turn in one run.

    python benchmarks/step_time.py --json step_time.json

Each round times every row once, so that a busy machine slows all of them alike; compare the ratios.
A row is the median of the rounds with its quartiles, each round the mean over a few steps that end
with the device idle. Compiling is timed apart. The data are synthetic, the augmentation the post's
for the compiled step and none for NumPy, which has none.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from cnnjax import devices, steps
from cnnjax.augment import make_augment
from cnnjax.cli import guarded
from cnnjax.config import AugmentConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.errors import InputError
from cnnjax.models import make_model
from cnnjax.scratch import models as scratch_models
from cnnjax.scratch import steps as scratch_steps
from cnnjax.scratch.optimizers import adam

Step = Callable[[], None]
Network = Literal["baseline", "resnet"]


@dataclass(frozen=True)
class Options:
    """What is timed."""

    networks: tuple[Network, ...] = ("baseline",)
    """Which networks."""
    width: int = 16
    """Channels of the ResNet's first stage."""
    batch: int = 32
    """Images per step."""
    size: int = 64
    """Side of the images, in pixels."""
    rounds: int = 9
    """Rounds after the first, which is not counted."""
    steps: int = 4
    """Steps in a round."""
    numpy: bool = True
    """Time the networks in NumPy too."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __post_init__(self) -> None:
        for name in ("width", "batch", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.size < 16:
            raise InputError(f"--size must be at least 16 pixels, got {self.size}")


@dataclass(frozen=True)
class Row:
    """One kind of step."""

    network: str
    by: str
    step: str
    compile_seconds: float | None
    median_ms: float
    quartiles_ms: tuple[float, float]
    images_per_second: float


def compiled_steps(options: Options, config: ModelConfig) -> dict[str, tuple[Step, float]]:
    """Returns the compiled train and eval step, each with the seconds that compiling took."""
    mesh = devices.make_mesh(options.device)
    everywhere, by_row = devices.replicated(mesh), devices.divided(mesh)
    if options.batch % mesh.size:
        raise InputError(f"--batch {options.batch} must be a multiple of {mesh.size} devices")
    model = make_model(config)
    optimizer, _ = steps.make_optimizer(TrainConfig(), 1)
    start: Any = jax.jit(
        lambda key: steps.init_state(model, optimizer, key, options.size), out_shardings=everywhere
    )(jax.random.key(0))
    batch = steps.Batch(*jax.device_put(_batch(options), by_row))
    key = jax.device_put(jax.random.key(1), everywhere)
    state = start

    began = time.perf_counter()
    train_step = steps.make_train_step(model, optimizer, make_augment(AugmentConfig()))
    jitted = jax.jit(train_step, donate_argnames="state", out_shardings=everywhere)
    train = jitted.lower(state, batch, key).compile()
    middle = time.perf_counter()
    judge = steps.make_eval_step(model).lower(state, batch).compile()  # type: ignore[attr-defined]
    ended = time.perf_counter()

    def run_train() -> None:
        nonlocal state
        for _ in range(options.steps):
            state, _ = train(state, batch, key)
        jax.block_until_ready(state)

    def run_eval() -> None:
        for _ in range(options.steps):
            logits = judge(state, batch)
        jax.block_until_ready(logits)

    return {"train": (run_train, middle - began), "eval": (run_eval, ended - middle)}


def numpy_steps(options: Options, config: ModelConfig) -> dict[str, Step]:
    """Returns the train and eval step in NumPy."""
    model: scratch_models.Network = scratch_models.BaselineCNN()
    if config.name == "resnet":
        model = scratch_models.ResNet(width=config.width)
    optimizer = adam(1e-3)
    state = scratch_steps.init_state(model, optimizer, np.random.default_rng(0), options.size)
    batch = scratch_steps.Batch(*_batch(options))
    train_step = scratch_steps.make_train_step(model, optimizer)
    eval_step = scratch_steps.make_eval_step(model)

    def run_train() -> None:
        nonlocal state
        for _ in range(options.steps):
            state, _ = train_step(state, batch)

    def run_eval() -> None:
        for _ in range(options.steps):
            eval_step(state, batch)

    return {"train": run_train, "eval": run_eval}


def measure(options: Options) -> list[Row]:
    """Times every row in every round."""
    timed: dict[tuple[str, str, str], tuple[Step, float | None]] = {}
    for network in options.networks:
        config = ModelConfig(network, width=options.width)
        for step, compiled in compiled_steps(options, config).items():
            timed[network, "jax", step] = compiled
        if options.numpy:
            for step, run in numpy_steps(options, config).items():
                timed[network, "numpy", step] = run, None
    took: dict[tuple[str, str, str], list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds + 1):
        for name, (run, _) in timed.items():
            start = time.perf_counter()
            run()
            took[name].append((time.perf_counter() - start) / options.steps)
    rows = []
    for name, (_, seconds) in timed.items():
        low, median, high = np.percentile(took[name][1:], (25, 50, 75)) * 1e3
        rate = options.batch / median * 1e3
        rows.append(Row(*name, seconds, float(median), (float(low), float(high)), float(rate)))
    return rows


def circumstances(options: Options) -> dict[str, Any]:
    """Returns what else one must know to compare with another run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": devices.describe(devices.make_mesh(options.device)),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "commit": commit or None,
        "options": json.loads(json.dumps(asdict(options), default=str)),
    }


def _batch(options: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (options.batch, options.size, options.size)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, 2, options.batch).astype(np.int32)
    return images, labels, np.ones(options.batch, bool)


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    before = circumstances(options)
    rows = measure(options)
    print(f"{before['device']}, jax {before['versions']['jax']}, batch {options.batch},", end=" ")
    print(f"{options.size} x {options.size} pixels, load {before['load_average']}")
    print("network   by     step   compile s  median ms  (quartiles)        images/s")
    for row in rows:
        seconds = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
        low, high = row.quartiles_ms
        print(
            f"{row.network:<9} {row.by:<6} {row.step:<6} {seconds:>9}  {row.median_ms:>9.1f}"
            f"  ({low:.1f} to {high:.1f})".ljust(62)
            + f"{row.images_per_second:>9,.0f}"
        )
    if options.json is not None:
        document = before | {"rows": [asdict(row) for row in rows]}
        try:
            options.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise InputError(f"--json {options.json}: {error.strerror or error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
