"""Computes the logits of many images, for validation and prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cnnjax.augment import make_views
from cnnjax.config import AugmentConfig
from cnnjax.data.batches import Feeder, Resident, in_batches, load
from cnnjax.machine.devices import divided, full_float32, replicated, traits
from cnnjax.objectives import Batch
from cnnjax.steps import TrainState, make_eval_step

Logits = Callable[..., np.ndarray]


@functools.lru_cache(maxsize=8)
def make_logits(
    model: Any,
    mesh: Mesh,
    views: int = 1,
    augment: AugmentConfig | None = None,
    batch: int | None = None,
) -> Logits:
    """Returns the function (state, feeder, rows, draw=0) -> logits float32 [n].

    The function compiles once for a feeder's data set. It uses full float32 precision on
    accelerators too. Calls with the same arguments return the same function, with its compiled
    programs. `rows` is int [n], the indices of the images in the data set; `draw` is the random
    seed of the views, see `cnnjax.steps.make_eval_step`. For a network with k outputs the result is
    float32 [n, k].

    Args:
        model: any network that `cnnjax.steps.make_eval_step` accepts.
        mesh: the devices.
        views: number of views of each image over which the logits are averaged.
        augment: the augmentation that makes the views, if there are several.
        batch: largest number of images per step; by default
            `cnnjax.machine.devices.Traits.evaluated`.
    """
    eval_step = make_eval_step(model, make_views(augment or AugmentConfig(), views))

    def step(
        state: TrainState, data: Resident | None, feed: Batch | jax.Array, draw: jax.Array
    ) -> jax.Array:
        return eval_step(state, load(data, feed, mesh), draw)

    # A process can only fetch arrays from its own devices.
    outputs_on = replicated(mesh) if mesh.is_multi_process else divided(mesh)
    compiled = jax.jit(step, out_shardings=outputs_on)

    def logits(state: TrainState, feeder: Feeder, rows: np.ndarray, draw: int = 0) -> np.ndarray:
        most = max(1, traits(mesh).evaluated_at(feeder.side) // views)
        most = -(-most // mesh.size) * mesh.size  # at least one image per device
        most = min(most, batch or most)
        cut = in_batches(rows.astype(np.int32), most)
        with full_float32(mesh):
            outputs = [compiled(state, feeder.data, feed, draw) for feed in feeder.feed(cut)]
        # A step's output may have extra rows, which give each device the same number of rows.
        whole = [np.asarray(x)[:most] for x in jax.device_get(outputs)]
        return np.concatenate(whole)[: len(rows)] if whole else np.zeros(0, np.float32)

    return logits
