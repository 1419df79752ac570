"""The logits of many images: what training validates with, and what prediction is made of."""

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

    It compiles once for a feeder's data set, and multiplies float32 in full on accelerators too;
    the same arguments get the same function, with what it has compiled. `rows` is int [n], places
    of images in the data set; `draw` is that of `cnnjax.steps.make_eval_step`. The answer is
    float32 [n, k] for a network with k outputs.

    Args:
        model: any network that `cnnjax.steps.make_eval_step` takes.
        mesh: the devices.
        views: how many of each image the logit is the mean of.
        augment: what several views differ by.
        batch: images per step, at most; by default as
            `cnnjax.machine.devices.Traits.evaluated` says.
    """
    eval_step = make_eval_step(model, make_views(augment or AugmentConfig(), views))

    def step(
        state: TrainState, data: Resident | None, feed: Batch | jax.Array, draw: jax.Array
    ) -> jax.Array:
        return eval_step(state, load(data, feed, mesh), draw)

    # A process can fetch what is on its own devices.
    outputs_on = replicated(mesh) if mesh.is_multi_process else divided(mesh)
    compiled = jax.jit(step, out_shardings=outputs_on)

    def logits(state: TrainState, feeder: Feeder, rows: np.ndarray, draw: int = 0) -> np.ndarray:
        most = max(1, traits(mesh).evaluated_at(feeder.side) // views)
        most = -(-most // mesh.size) * mesh.size  # each device gets one at least
        most = min(most, batch or most)
        cut = in_batches(rows.astype(np.int32), most)
        with full_float32(mesh):
            outputs = [compiled(state, feeder.data, feed, draw) for feed in feeder.feed(cut)]
        # Each step's output may have a few rows more, which even out the devices.
        whole = [np.asarray(x)[:most] for x in jax.device_get(outputs)]
        return np.concatenate(whole)[: len(rows)] if whole else np.zeros(0, np.float32)

    return logits
