"""From images to logits with a trained network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cnnjax.checkpoint import Checkpoints, Kind, template_of
from cnnjax.config import Config
from cnnjax.data.batches import Feeder, Resident, in_batches, load
from cnnjax.devices import divided, replicated
from cnnjax.models import make_model
from cnnjax.steps import Batch, EvalStep, TrainState, init_state, make_eval_step, make_optimizer
from cnnjax.workdir import Workdir

BATCH = 64  # images per step; more only fall out of a CPU core's cache

Logits = Callable[[TrainState, Feeder, np.ndarray], np.ndarray]


def make_logits(eval_step: EvalStep, mesh: Mesh) -> Logits:
    """Returns the function (state, feeder, rows) -> logits float32 [rows], which compiles once."""

    def step(state: TrainState, data: Resident | None, feed: Batch | jax.Array) -> jax.Array:
        return eval_step(state, load(data, feed))

    compiled = jax.jit(step, out_shardings=divided(mesh))

    def logits(state: TrainState, feeder: Feeder, rows: np.ndarray) -> np.ndarray:
        cut = in_batches(rows.astype(np.int32), BATCH)
        outputs = [compiled(state, feeder.data, feed) for feed in feeder.feed(cut)]
        # Each step's output may have a few rows more, which even out the devices.
        whole = [np.asarray(x)[:BATCH] for x in jax.device_get(outputs)]
        return np.concatenate(whole)[: len(rows)]

    return logits


class Predictor:
    """A trained run, ready to judge images.

    Args:
        run: the workdir of a run.
        mesh: the devices to use.
        kind: `best` by validation, or `latest`.

    Attributes:
        config: the run's config.
        classes: names of labels 0 and 1.

    Raises:
        InputError: the run is not there or has no checkpoint.
    """

    def __init__(self, run: Path, mesh: Mesh, kind: Kind = "best") -> None:
        workdir = Workdir(run)
        self.config: Config = workdir.read_config()
        model = make_model(self.config.model, jnp.dtype(self.config.train.precision))
        optimizer, _ = make_optimizer(self.config.train, 1)
        shapes = jax.eval_shape(
            lambda key: init_state(
                model, optimizer, key, self.config.data.size, ema=bool(self.config.train.ema)
            ),
            jax.random.key(0),
        )
        checkpoints = Checkpoints(workdir.checkpoints)
        self._state = checkpoints.restore(kind, template_of(shapes, replicated(mesh)))
        checkpoints.close()
        self.classes = workdir.read_classes()
        self._mesh = mesh
        self._logits = make_logits(make_eval_step(model), mesh)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns float32 [n], the logits of uint8 images [n, size, size]."""
        feeder = Feeder(
            images, np.zeros(len(images), np.int32), self._mesh, self.config.data.resident_mib
        )
        return self._logits(self._state, feeder, np.arange(len(images)))
