"""The NumPy side of the comparison: the networks of `cnnjax.scratch`, in our own environment.

NumPy has no bfloat16. It computes matrix products with its BLAS, on the CPU.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import cycle, islice

import numpy as np

from benchmarks.peers.worker import Problem, serve
from cnnjax.scratch.models import BaselineCNN, Network, ResNet
from cnnjax.scratch.optimizers import adamw
from cnnjax.scratch.steps import Batch, TrainState, make_eval_step, make_train_step


class Scratch:
    """See `benchmarks.peers.worker.Network`."""

    def __init__(self, problem: Problem) -> None:
        self.version = f"numpy {version('numpy')} on cpu"
        model: Network = BaselineCNN(problem.channels, problem.standardize, problem.local_contrast)
        if problem.network == "resnet":
            model = ResNet(
                problem.channels,
                problem.width,
                stages=problem.stages,
                stem=problem.stem,
                standardize=problem.standardize,
                local_contrast=problem.local_contrast,
            )
        optimizer = adamw(problem.rate, problem.decay, eps=problem.epsilon)
        params = problem.tree()
        _, stats = model.init(np.random.default_rng(0), problem.images.shape[2])
        self._start = self._state = TrainState(0, params, stats, optimizer.init(params))
        self._batches = [
            Batch(images, labels)
            for images, labels in zip(problem.images, problem.labels, strict=True)
        ]
        self._train = make_train_step(model, optimizer)
        self._eval = make_eval_step(model)

    def logits(self) -> np.ndarray:
        """See `benchmarks.peers.worker.Network`."""
        return self._eval(self._start, self._batches[0])

    def losses(self, steps: int) -> list[float]:
        """See `benchmarks.peers.worker.Network`."""
        state, found = self._start, []
        for batch in self._batches[:steps]:
            state, sums = self._train(state, batch)
            found.append(sums.loss / sums.images)
        return found

    def train(self, steps: int) -> None:
        """See `benchmarks.peers.worker.Network`."""
        for batch in islice(cycle(self._batches), steps):
            self._state, _ = self._train(self._state, batch)


if __name__ == "__main__":
    serve(Scratch)
