"""The compiled programs of training, and what they are made for: one network, or many in one step.

A `Task` is what a run computes, a function of config, data and seed. `Alone` computes one task's
epochs; `Together` those of several, their states stacked along a first axis and the step mapped
over it by `vmap`, so that an accelerator too large for one small network trains many in its time.
Either gives the same, up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from cnnjax import devices
from cnnjax.augment import make_augment
from cnnjax.checkpoint import template_of
from cnnjax.config import Config
from cnnjax.data.batches import Feeder, Resident, epoch_rows, in_batches, load
from cnnjax.data.prepare import TrainingData
from cnnjax.models import model_of
from cnnjax.objectives import Batch, Binary
from cnnjax.predict import at_once, make_logits
from cnnjax.steps import (
    Metrics,
    TrainState,
    TrainStep,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)

# One key each; a new purpose takes the next number and never a used one.
_INIT, _ORDER, _STEP = range(3)

_LOOK = 16  # steps between looks at the loss, each of which waits for the step of the last look

# Steps in one call of the device. A step of a small network takes an accelerator less time than
# calling it takes Python; a CPU's takes more, and XLA's convolutions are slow in its loops there.
TOGETHER = {"cpu": 1, "gpu": _LOOK, "tpu": _LOOK}


class Task:
    """What a run computes: a function of config, data and seed.

    Attributes:
        labels: int32 [n], of all images.
        steps_per_epoch: of the training images.
        class_weights: of labels 0 and 1.
        learning_rate: as of step.
    """

    def __init__(self, config: Config, data: TrainingData) -> None:
        self.config, self.data = config, data
        key = jax.random.key(config.seed)
        self.init_key, self.order_key, self.step_key = (
            jax.random.fold_in(key, k) for k in (_INIT, _ORDER, _STEP)
        )
        self.labels = data.decoded.labels
        self.steps_per_epoch = math.ceil(len(data.train) / config.train.batch)
        weights = class_weights_of(self.labels[data.train])
        self.class_weights = weights if config.train.class_weights else (1.0, 1.0)
        self.model = model_of(config)
        self.optimizer, self.learning_rate = make_optimizer(config.train, self.steps_per_epoch)

    @property
    def resident(self) -> bool:
        """Whether the images live on the device."""
        return self.data.decoded.images.nbytes <= self.config.data.resident_mib * 2**20

    def new_state(self, key: jax.Array) -> TrainState:
        """Returns the state before the first step; pure, for jit."""
        ema = bool(self.config.train.ema)
        return init_state(self.model, self.optimizer, key, self.config.data.size, ema=ema)

    def template(self, mesh: Mesh) -> TrainState:
        """Returns shapes, dtypes and placement of the state."""
        shapes = jax.eval_shape(self.new_state, self.init_key)
        return template_of(shapes, devices.replicated(mesh))

    def make_step(self, class_weights: Any) -> TrainStep:
        """Returns the train step, with these weights of the classes."""
        train = self.config.train
        objective = Binary(class_weights, train.label_smoothing, train.mixup, train.auxiliary)
        return make_train_step(
            self.model,
            self.optimizer,
            make_augment(self.config.augment),
            objective,
            ema_decay=train.ema,
        )

    def order(self, epoch: int) -> np.ndarray:
        """Returns int32 [steps, batch], the rows of each step of an epoch."""
        return epoch_rows(self.order_key, epoch, self.data.train, self.config.train.batch)

    def feeder(self, mesh: Mesh) -> Feeder:
        """Returns what brings the images to the devices."""
        images, limit = self.data.decoded.images, self.config.data.resident_mib
        viral = self.data.decoded.viral if self.config.train.auxiliary else None
        return Feeder(images, self.labels, mesh, limit, viral)


def class_weights_of(labels: np.ndarray) -> tuple[float, float]:
    """Returns n / (2 n_c) for each label c, so that both classes weigh the same in sum."""
    n = len(labels)
    positive = int(labels.sum())
    return n / (2 * (n - positive)), n / (2 * positive)


class Program(Protocol):
    """What computes tasks: `Alone` and `Together`."""

    def start(self) -> TrainState:
        """Returns the tasks' states before the first step."""

    def join(self, states: list[TrainState]) -> TrainState:
        """Returns the tasks' states as one."""

    def part(self, states: TrainState, i: int) -> TrainState:
        """Returns one task's state, of states that have been fetched."""

    def epoch(
        self, states: TrainState, orders: list[np.ndarray], bar: tqdm[Any]
    ) -> tuple[TrainState, list[dict[str, float]]]:
        """Takes the steps of an epoch; returns each task's mean loss and accuracy over it."""

    def logits(self, states: TrainState) -> list[np.ndarray]:
        """Returns the logits of each task's held-out images."""


class Alone:
    """The program of one task: the step as it is."""

    def __init__(self, task: Task, mesh: Mesh) -> None:
        self._task, self._mesh = task, mesh
        # The weights are no constants, so that other folds and seeds find the program compiled.
        weights = np.array(task.class_weights, np.float32)
        self._key = jax.device_put((task.step_key, weights), devices.replicated(mesh))

        def step(
            state: TrainState, batch: Batch, given: tuple[jax.Array, jax.Array]
        ) -> tuple[TrainState, Metrics]:
            key, w = given
            return task.make_step((w[0], w[1]))(state, batch, key)

        self._steps = compile_steps(mesh, step)
        self._feeder = task.feeder(mesh)
        self._logits = make_logits(task.model, mesh, 1, task.config.augment)

    def start(self) -> TrainState:
        """See `Program`."""
        new = jax.jit(
            self._task.new_state,
            out_shardings=devices.replicated(self._mesh),
            compiler_options=devices.once(devices.platform(self._mesh)),
        )
        state: TrainState = new(self._task.init_key)
        return state

    def join(self, states: list[TrainState]) -> TrainState:
        """See `Program`."""
        return states[0]

    def part(self, states: TrainState, i: int) -> TrainState:
        """See `Program`."""
        return states

    def epoch(
        self, states: TrainState, orders: list[np.ndarray], bar: tqdm[Any]
    ) -> tuple[TrainState, list[dict[str, float]]]:
        """See `Program`."""
        state, trained = take_epoch(states, self._steps, self._feeder, orders[0], self._key, bar)
        return state, [trained]

    def logits(self, states: TrainState) -> list[np.ndarray]:
        """See `Program`."""
        return [self._logits(states, self._feeder, self._task.data.validation)]


class Together:
    """The program of several tasks on the same images, with equally many steps an epoch.

    Each device computes equally many of them, and none of its work waits for another's: ten tasks
    take five of eight devices. Five take three of four, where the first is computed once more, to
    fill up.
    """

    def __init__(self, tasks: Sequence[Task], mesh: Mesh) -> None:
        self._tasks = tasks
        each = -(-len(tasks) // mesh.size)
        count = -(-len(tasks) // each)
        self._short = count * each - len(tasks)
        self._mesh = mesh = Mesh(mesh.devices[:count], mesh.axis_names)
        self._by_task = devices.divided(mesh)
        tasks, first = self._filled(tasks), tasks[0]
        self._data = first.feeder(mesh).data
        self._keys = jax.device_put(jnp.stack([t.step_key for t in tasks]), self._by_task)
        weights = np.array([t.class_weights for t in tasks], np.float32)
        self._weights = jax.device_put(weights, self._by_task)

        def one(
            states: TrainState, data: Resident, feeds: jax.Array, keys: jax.Array, w: jax.Array
        ) -> tuple[TrainState, Metrics]:
            def step(
                state: TrainState, feed: jax.Array, key: jax.Array, w: jax.Array
            ) -> tuple[TrainState, Metrics]:
                return first.make_step((w[0], w[1]))(state, load(data, feed), key)

            return jax.vmap(step)(states, feeds, keys, w)

        def many(
            states: TrainState, data: Resident, feeds: jax.Array, keys: jax.Array, w: jax.Array
        ) -> tuple[TrainState, Metrics]:
            return jax.lax.scan(lambda s, feed: one(s, data, feed, keys, w), states, feeds)

        eval_step = make_eval_step(first.model)

        def judge(states: TrainState, data: Resident, feeds: jax.Array) -> jax.Array:
            return jax.vmap(lambda state, feed: eval_step(state, load(data, feed)))(states, feeds)

        # Left to itself, XLA would gather all tasks' feature maps on every device: `vmap` over
        # kernels makes convolutions of groups, which it does not divide.
        shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        task, step, whole = self._by_task.spec, PartitionSpec(None, devices.AXIS), PartitionSpec()
        self._by_step = NamedSharding(mesh, step)
        sharded_one = shard(one, in_specs=(task, whole, task, task, task), out_specs=(task, task))
        sharded_many = shard(many, in_specs=(task, whole, step, task, task), out_specs=(task, step))
        self._one = jax.jit(sharded_one, donate_argnums=0)
        self._many = jax.jit(sharded_many, donate_argnums=0)
        self._judge = jax.jit(shard(judge, in_specs=(task, whole, task), out_specs=task))
        platform = devices.platform(mesh)
        self._batch = max(1, at_once(platform, first.config.data.size) // each)
        self._steps = TOGETHER[platform]

    def start(self) -> TrainState:
        """See `Program`."""
        keys = jnp.stack([task.init_key for task in self._filled(self._tasks)])
        new = jax.jit(
            jax.vmap(self._tasks[0].new_state),
            out_shardings=self._by_task,
            compiler_options=devices.once(devices.platform(self._mesh)),
        )
        states: TrainState = new(keys)
        return states

    def join(self, states: list[TrainState]) -> TrainState:
        """See `Program`."""
        stack = jax.jit(lambda *x: jax.tree.map(lambda *leaves: jnp.stack(leaves), *x))
        joined: TrainState = jax.device_put(stack(*self._filled(states)), self._by_task)
        return joined

    def part(self, states: TrainState, i: int) -> TrainState:
        """See `Program`."""
        one: TrainState = jax.tree.map(lambda x: x[i], states)
        return one

    def epoch(
        self, states: TrainState, orders: list[np.ndarray], bar: tqdm[Any]
    ) -> tuple[TrainState, list[dict[str, float]]]:
        """See `Program`."""
        order = np.stack(self._filled(orders), axis=1)  # [steps, tasks, batch]
        many = len(self._tasks)
        fused = len(order) // self._steps * self._steps if self._steps > 1 else 0
        groups = order[:fused].reshape(-1, self._steps, *order.shape[1:])
        sums: list[Metrics] = []
        for group in groups:
            feeds = jax.device_put(group, self._by_step)
            states, found = self._many(states, self._data, feeds, self._keys, self._weights)
            sums.append(found)
            bar.update(int((group[:, :many] >= 0).sum()))
        for step in order[fused:]:
            feeds = jax.device_put(step, self._by_task)
            states, found = self._one(states, self._data, feeds, self._keys, self._weights)
            sums.append(jax.tree.map(lambda x: x[None], found))
            bar.update(int((step[:many] >= 0).sum()))
        fetched = jax.device_get(sums)  # of each, [steps, tasks]
        return states, [
            means([Metrics(*(x[:, i] for x in found)) for found in fetched]) for i in range(many)
        ]

    def logits(self, states: TrainState) -> list[np.ndarray]:
        """See `Program`."""
        rows = [task.data.validation.astype(np.int32) for task in self._tasks]
        longest = max(map(len, rows))
        padded = [np.pad(r, (0, longest - len(r)), constant_values=-1) for r in self._filled(rows)]
        cut = np.stack([in_batches(r, self._batch) for r in padded], axis=1)
        with devices.full_float32(self._mesh):
            outputs = [
                self._judge(states, self._data, jax.device_put(feed, self._by_task)) for feed in cut
            ]
        whole = np.concatenate(jax.device_get(outputs), axis=1)
        return [whole[i, : len(r)] for i, r in enumerate(rows)]

    def _filled(self, each: Sequence[Any]) -> list[Any]:
        """Returns what belongs to each task, with the first's once more for those that fill up."""
        return [*each, *[each[0]] * self._short]


class Steps(NamedTuple):
    """The compiled train step, (state, data, feed, key) -> (state, metrics)."""

    one: Any
    many: Any
    """The same for a feed of `together` steps at once."""
    together: int


def compile_steps(
    mesh: Mesh, train_step: Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
) -> Steps:
    """Returns what the loop calls: the step on a mesh, with the batch fetched inside it.

    Args:
        mesh: the devices.
        train_step: (state, batch, key) -> (state, metrics); what it takes as its key, the same at
            each step, may be any arrays.
    """

    def one(
        state: TrainState, data: Resident | None, feed: Batch | jax.Array, key: Any
    ) -> tuple[TrainState, Metrics]:
        return train_step(state, load(data, feed), key)

    def many(
        state: TrainState, data: Resident, feeds: jax.Array, key: Any
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, feed: one(state, data, feed, key), state, feeds)

    options: Any = {"donate_argnames": "state", "out_shardings": devices.replicated(mesh)}
    together = TOGETHER[devices.platform(mesh)]
    return Steps(jax.jit(one, **options), jax.jit(many, **options), together)


def take_epoch(
    state: TrainState,
    steps: Steps,
    feeder: Feeder,
    order: np.ndarray,
    key: Any,
    bar: tqdm[Any],
) -> tuple[TrainState, dict[str, float]]:
    """Takes the steps of one epoch; returns the state and the mean loss and accuracy over it."""
    sums: list[Metrics] = []
    taken = looked = shown = 0
    waiting: Metrics | None = None
    for step, feed in calls(steps, feeder, order):
        state, step_sums = step(state, feeder.data, feed, key)
        sums.append(step_sums)
        taken += step_sums.loss.size
        if taken - looked >= _LOOK:
            # What the device came to a look ago: it has work while this is fetched.
            if waiting is not None:
                _show(bar, waiting, order[shown:looked])
                shown = looked
            waiting, looked = step_sums, taken
    _show(bar, sums[-1], order[shown:])
    return state, means(jax.device_get(sums))


def _show(bar: tqdm[Any], last: Metrics, order: np.ndarray) -> None:
    """Moves the bar on by the images of some steps, with the loss of the last; waits for that."""
    found = jax.device_get(last)
    loss = np.sum(found.loss) / np.sum(found.images)
    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    bar.update(int((order >= 0).sum()))


def calls(
    steps: Steps, feeder: Feeder, order: np.ndarray
) -> Iterator[tuple[Any, Batch | jax.Array]]:
    """Yields what to call for the steps of an order, and each call's feed: many at once, if any.

    Args:
        steps: of `compile_steps`.
        feeder: of the images.
        order: int32 [steps, batch], see `cnnjax.data.batches.epoch_rows`.
    """
    resident = feeder.data is not None and steps.together > 1
    fused = len(order) // steps.together * steps.together if resident else 0
    for feeds in feeder.feed_together(order[:fused], steps.together):
        yield steps.many, feeds
    for feed in feeder.feed(order[fused:]):
        yield steps.one, feed


def means(sums: Sequence[Metrics]) -> dict[str, float]:
    """Returns mean loss and accuracy over the images of many steps' sums."""
    totals = Metrics(
        *(np.sum([np.sum(x, dtype=np.float64) for x in part]) for part in zip(*sums, strict=True))
    )
    return {
        "loss": float(totals.loss / totals.images),
        "accuracy": float(totals.correct / totals.images),
    }
