"""Our side of the comparison: the step of `cnnjax.train`, with the data set on the device."""

from __future__ import annotations

from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers.worker import Problem, serve
from cnnjax import steps, train
from cnnjax.config import DeviceConfig, ModelConfig
from cnnjax.data.batches import Feeder
from cnnjax.machine import devices
from cnnjax.networks import make_model
from cnnjax.objectives import Batch


class Ours:
    """See `benchmarks.peers.worker.Network`."""

    def __init__(self, problem: Problem) -> None:
        # One GPU, as for the peers; on a CPU all its devices.
        count = 0 if problem.device == "cpu" else 1
        config = DeviceConfig(problem.device, count)  # type: ignore[arg-type]
        self._mesh = devices.make_mesh(config)
        self.version = f"jax {version('jax')} on {devices.describe(self._mesh)}"
        network = ModelConfig(
            problem.network,
            channels=problem.channels,
            width=problem.width,
            stages=problem.stages,
            stem=problem.stem,  # type: ignore[arg-type]
            standardize=problem.standardize,
            local_contrast=problem.local_contrast,
        )
        model = make_model(network, jnp.dtype(problem.precision))
        size = problem.images.shape[2]
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 1)))
        self._params = problem.tree()
        self._stats = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (jnp.ones if path[-1].key == "var" else jnp.zeros)(leaf.shape),
            variables.get("batch_stats", {}),
        )
        self._optimizer = (
            optax.adamw(
                problem.rate,
                eps=problem.epsilon,
                weight_decay=problem.decay,
                mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
            )
            if problem.decay
            else optax.adam(problem.rate, eps=problem.epsilon)
        )
        self._step = train.compile_steps(
            self._mesh, steps.make_train_step(model, self._optimizer, lambda key, images: images)
        )
        self._eval = steps.make_eval_step(model)
        self._key = jax.device_put(jax.random.key(0), devices.replicated(self._mesh))
        batches, batch = problem.labels.shape
        self._feeder = Feeder(
            problem.images.reshape(-1, size, size), problem.labels.reshape(-1), self._mesh, 2**14
        )
        self._rows = np.arange(batches * batch, dtype=np.int32).reshape(batches, batch)
        self._first = Batch(jnp.asarray(problem.images[0]), jnp.asarray(problem.labels[0]))
        self._state = self._start()

    def logits(self) -> np.ndarray:
        """See `benchmarks.peers.worker.Network`."""
        with devices.full_float32(self._mesh):
            return np.asarray(self._eval(self._start(), self._first))

    def losses(self, steps: int) -> list[float]:
        """See `benchmarks.peers.worker.Network`."""
        state, found = self._start(), []
        with devices.full_float32(self._mesh):
            for feed in self._feeder.feed(self._rows[:steps]):
                state, sums = self._step.one(state, self._feeder.data, feed, self._key)
                found.append(float(sums.loss / sums.images))
        return found

    def train(self, steps: int) -> None:
        """See `benchmarks.peers.worker.Network`."""
        rows = np.resize(self._rows, (steps, self._rows.shape[1]))
        for step, feed in train.calls(self._step, self._feeder, rows):
            self._state, _ = step(self._state, self._feeder.data, feed, self._key)
        jax.block_until_ready(self._state)

    def _start(self) -> steps.TrainState:
        variables = {"params": self._params, "batch_stats": self._stats}
        copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), variables)
        state = steps.state_of(copied, self._optimizer)
        return jax.device_put(state, devices.replicated(self._mesh))


if __name__ == "__main__":
    serve(Ours)
