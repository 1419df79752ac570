"""Trains the blog post's network in plain NumPy and in JAX, side by side.

    python experiments/scratch.py --data.root phantom --epochs 3

Both start from the same weights and see the same batches, without augmentation. After each epoch
the script prints both losses and their largest difference at any step.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from cnnjax import metrics, steps
from cnnjax.cli import guarded
from cnnjax.config import DataConfig, TrainConfig
from cnnjax.data.batches import in_batches, step_rows
from cnnjax.data.prepare import expect_two_classes, training_data
from cnnjax.errors import InputError
from cnnjax.machine.devices import keep_compiled_programs
from cnnjax.networks import BaselineCNN
from cnnjax.objectives import Batch, Binary, class_weights_of
from cnnjax.optimizers import make_optimizer
from cnnjax.scratch import models as scratch_models
from cnnjax.scratch import steps as scratch_steps
from cnnjax.scratch.convert import from_flax
from cnnjax.scratch.optimizers import adam


@dataclass(frozen=True)
class Options:
    """Data and settings of the training."""

    data: DataConfig = field(default_factory=DataConfig)
    epochs: int = 3
    """Number of epochs."""
    batch: int = 32
    """Batch size."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""
    seed: int = 0
    """Seed of the split, the initial weights and the order of images."""
    alone: bool = False
    """Train the NumPy network only."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")


def main(options: Options) -> metrics.Evaluation:
    """Trains; returns the metrics of the NumPy network on the held-out images."""
    keep_compiled_programs()
    data = training_data(options.data, options.seed, print)
    images, labels = data.decoded.images, data.decoded.labels
    expect_two_classes(data.classes, "experiments/scratch.py")
    negative, positive = class_weights_of(labels[data.train])
    weights = negative, positive
    key = jax.random.key(options.seed)
    init_key, order_key = jax.random.split(key)

    model = BaselineCNN()
    size = options.data.size
    variables = jax.jit(model.init)(init_key, jnp.zeros((1, size, size, 1)))
    optimizer, _ = make_optimizer(TrainConfig(learning_rate=options.learning_rate), 1)
    compiled = steps.make_train_step(
        model, optimizer, lambda key, images: images, Binary(class_weights=weights)
    )
    state = steps.state_of(variables, optimizer)

    network = scratch_models.BaselineCNN()
    descent = adam(options.learning_rate)
    params, _ = from_flax(variables)
    by_hand = scratch_steps.make_train_step(network, descent, class_weights=weights)
    own = scratch_steps.TrainState(0, params, {}, descent.init(params))

    for epoch in range(1, options.epochs + 1):
        steps_per_epoch = -(-len(data.train) // options.batch)
        numbers = range((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch)
        rows = step_rows(order_key, numbers, data.train, options.batch)
        sums, seconds = np.zeros((2, len(rows))), np.zeros(2)
        for i, row in enumerate(tqdm(rows, f"epoch {epoch}", unit="step", disable=None)):
            batch = scratch_steps.Batch(images[row], labels[row])
            start = time.perf_counter()
            own, found = by_hand(own, batch)
            middle = time.perf_counter()
            sums[0, i] = found.loss / found.images
            if not options.alone:
                state, theirs = compiled(state, Batch(*map(jnp.asarray, batch)), key)
                sums[1, i] = float(theirs.loss) / int(theirs.images)
            seconds += middle - start, time.perf_counter() - middle
        numpy_loss, jax_loss = sums.mean(1)
        line = f"epoch {epoch}/{options.epochs}  NumPy: loss {numpy_loss:.4f}"
        line += f" {len(data.train) / seconds[0]:,.0f} images/s"
        if not options.alone:
            line += f"  JAX: loss {jax_loss:.4f} {len(data.train) / seconds[1]:,.0f} images/s"
            line += f"  largest difference at a step {np.abs(sums[0] - sums[1]).max():.1e}"
        print(line)

    def judge(logits: list[np.ndarray]) -> metrics.Evaluation:
        patients = [data.decoded.examples[i].patient for i in data.validation]
        whole = np.concatenate(logits)[: len(patients)]
        return metrics.evaluate(whole, labels[data.validation], patients)

    eval_by_hand = scratch_steps.make_eval_step(network)
    cut = [scratch_steps.Batch(images[row], labels[row]) for row in in_batches(data.validation, 64)]
    judged = judge([eval_by_hand(own, batch) for batch in cut])
    print(f"\nNumPy, on {judged.n:,} images of held-out patients, with 95 % intervals")
    print(judged.report(data.classes))
    if not options.alone:
        eval_compiled = steps.make_eval_step(model)
        logits = [np.asarray(eval_compiled(state, Batch(*map(jnp.asarray, b)))) for b in cut]
        print(f"\nJAX, on the same: AUC {judge(logits).auc}")
    return judged


def _run() -> int:
    main(tyro.cli(Options, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(_run))
