"""The whole of training in one file, to be read from top to bottom.

    python experiments/minimal.py --data.root phantom --epochs 5

It shares the network and the data with the library, and nothing of its loop. The library's loop
(cnnjax/train.py) does the same, and also resumes, streams, picks the best epoch and reports.
"""

import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cnnjax.augment import make_augment
from cnnjax.cli import guarded
from cnnjax.config import AugmentConfig, DataConfig, DeviceConfig
from cnnjax.data.prepare import expect_two_classes, training_data
from cnnjax.machine import devices
from cnnjax.metrics import evaluate
from cnnjax.networks import BaselineCNN

# All that is random comes from this number: split, weights, order of images, augmentation.
SEED = 0
BATCH = 32

# Pure objects without state: they hold hyperparameters. What is learned is always passed to them.
model = BaselineCNN()
optimizer = optax.adam(1e-3)
augment = make_augment(AugmentConfig())


class State(NamedTuple):
    """All that a step changes.

    A pytree, that is nested tuples and dicts of arrays: what JAX can trace through, differentiate
    by, copy to devices and save. Attributes of an object would be read once, while tracing.
    """

    step: jax.Array
    params: Any
    optimizer: Any


def init(key: jax.Array, size: int) -> State:
    """Returns the state before the first step; the same key gives the same weights."""
    params = model.init(key, jnp.zeros((1, size, size, 1)))["params"]
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def loss_of(params: Any, images: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy over the valid rows; jax.grad takes it by `params`."""
    logits = model.apply({"params": params}, images, train=True)
    losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32))
    return jnp.where(valid, losses, 0).sum() / valid.sum()


def train_step(
    state: State, images: jax.Array, labels: jax.Array, rows: jax.Array, key: jax.Array
) -> tuple[State, jax.Array]:
    """One step: a function of its arguments and nothing else.

    Python runs this body once, with tracers in the place of arrays, to record what is computed;
    XLA compiles the record, and each later call runs the compiled program. Another shape or dtype
    would be traced again: that is why the last batch is filled up with -1 and not cut short.
    """
    # The data set stays on the device as bytes; a batch is gathered there, and made floats here.
    pixels = images[rows][..., None].astype(jnp.float32) / 255
    # A key is a value: the run's key, folded with the step's number, is fresh randomness for each
    # step, and the same again if the step is taken again.
    pixels = augment(jax.random.fold_in(key, state.step), pixels)
    loss, gradient = jax.value_and_grad(loss_of)(state.params, pixels, labels[rows], rows >= 0)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), loss


def eval_step(state: State, images: jax.Array) -> jax.Array:
    """Returns the logits of uint8 images."""
    floats = images[..., None].astype(jnp.float32) / 255
    return model.apply({"params": state.params}, floats, train=False)


def main(data: DataConfig, epochs: int = 5) -> int:
    """Trains, and evaluates on the held-out patients; returns the exit status."""
    mesh = devices.make_mesh(DeviceConfig())  # the CPU, or each of its cores, or each GPU
    batch_size = math.ceil(BATCH / mesh.size) * mesh.size  # divisible among the devices
    everywhere, by_row = devices.replicated(mesh), devices.divided(mesh)
    found = training_data(data, SEED, print)
    expect_two_classes(found.classes, "experiments/minimal.py")
    init_key, order_key, step_key = jax.random.split(jax.random.key(SEED), 3)
    state = jax.device_put(init(init_key, data.size), everywhere)
    images, labels, step_key = jax.device_put(
        (np.asarray(found.decoded.images), found.decoded.labels, step_key), everywhere
    )
    # Donating the state lets XLA write the new weights over the old ones: half the memory, no copy.
    # The old state is gone after the call, hence `state = step(state, ...)`. Since the rows of a
    # batch are divided among the devices, XLA divides the work and sums the gradients over them.
    step = jax.jit(train_step, donate_argnames="state", out_shardings=everywhere)

    steps = math.ceil(len(found.train) / batch_size)
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(found.train))
        shuffled = np.full(steps * batch_size, -1, np.int32)
        shuffled[: len(found.train)] = found.train[np.asarray(order)]
        losses = []
        for rows in jax.device_put(list(shuffled.reshape(steps, batch_size)), by_row):
            # The call returns before the device has finished: Python is already at the next batch.
            # Only a look at a number waits, so the losses stay on the device until the epoch's end.
            state, loss = step(state, images, labels, rows, step_key)
            losses.append(loss)
        print(f"epoch {epoch + 1}: loss {np.mean(jax.device_get(losses)):.4f}")

    logits = np.asarray(jax.jit(eval_step)(state, images[found.validation]))
    patients = [found.decoded.examples[i].patient for i in found.validation]
    truth = found.decoded.labels[found.validation]
    print(evaluate(logits, truth, patients).report(found.classes))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: tyro.cli(main, description=__doc__)))
