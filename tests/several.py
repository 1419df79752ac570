"""What `test_processes.py` and the processes that it starts have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnnjax import Config
from cnnjax.augment import make_augment
from cnnjax.config import AugmentConfig, DataConfig, DistributedConfig, TrainConfig
from cnnjax.data.batches import Feeder, load, step_rows
from cnnjax.machine import devices
from cnnjax.objectives import to_float


def config_of(workdir: Path, root: Path, cache: Path, **distributed: Any) -> Config:
    """Returns a run of two epochs of four steps."""
    return Config(
        workdir=workdir,
        data=DataConfig(str(root), size=16, cache=cache),
        augment=AugmentConfig(rotate=5.0, noise=0.1),
        train=TrainConfig(epochs=2, batch=8, mixup=0.2),
        distributed=DistributedConfig(**distributed),
    )


def batches(mesh: jax.sharding.Mesh, resident_mib: int) -> list[list[int]]:
    """Returns the augmented images of three steps, as the bits of their float32 numbers."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (21, 8, 8)).astype(np.uint8)
    feeder = Feeder(whole, np.arange(21, dtype=np.int32), mesh, resident_mib)
    augment = make_augment(AugmentConfig(rotate=10.0, noise=0.1, gamma=0.2, erase=0.1))

    @jax.jit
    def seen(data: Any, feed: Any, key: jax.Array) -> Any:
        batch = load(data, feed, mesh)
        return augment(key, to_float(batch.images)), batch.labels

    everywhere = jax.jit(lambda x: x, out_shardings=devices.replicated(mesh))
    order = step_rows(jax.random.key(0), range(3), np.arange(21), 8)
    found = []
    for feed in feeder.feed(order):
        key = devices.place(jax.random.key(1), devices.replicated(mesh))
        pixels, labels = jax.device_get(everywhere(seen(feeder.data, feed, key)))
        found.append([*pixels.view(np.uint32).ravel().tolist(), *labels.tolist()])
    return found
