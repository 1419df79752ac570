"""The training loop, from a config to a run on disk: read `fit` from top to bottom.

The result is a function of (config, data, seed) and of the optional parts that a caller passes to
`fit`. The loop has no state besides `state` and the history in `metrics.jsonl`. A run that is
stopped and resumed therefore gives the same result as one that was never stopped.

`cnnjax.run` has what the loop calls: `opening` claims the workdir and reads the data, `training`
keeps the history and the checkpoints, `result` evaluates the finished run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm.auto import tqdm

from cnnjax.augment import Augment
from cnnjax.config import Config
from cnnjax.data.batches import Feeder, Resident, load
from cnnjax.data.prepare import TrainingData
from cnnjax.errors import TrainingError
from cnnjax.logits import make_logits
from cnnjax.machine import devices, processes
from cnnjax.objectives import Batch, Objective
from cnnjax.optimizers import Factory
from cnnjax.run import signals
from cnnjax.run.opening import open_run
from cnnjax.run.parts import Parts
from cnnjax.run.result import Result, conclude
from cnnjax.run.trace import traced
from cnnjax.run.training import STEP, OnEpoch, Saver
from cnnjax.steps import Metrics, TrainState

PyTree = Any

_LOOK = 16  # steps between two reads of the loss; each read waits for the step of the previous one


def fit(
    config: Config,
    *,
    data: TrainingData | None = None,
    network: Any = None,
    objective: Objective | None = None,
    optimizer: Factory | None = None,
    augment: Augment | None = None,
    init: PyTree = None,
    on_epoch: OnEpoch | None = None,
) -> Result:
    """Trains a network, or resumes the run in the config's workdir.

    Prints the data, network and devices that it uses and one line per epoch. Writes the files that
    `cnnjax.run.workdir.Workdir` lists to the workdir.

    Args:
        config: configuration of the run, except for the parts below.
        data: the images, with their split; by default read as `config.data` describes.
        network: any Linen module that is called as `apply(variables, images, train=..., rngs=...)`
            with float32 images [batch, size, size, 1] in [0, 1] and returns the outputs that the
            objective expects; by default the network that `config.model` describes.
        objective: the loss and the figures that an epoch reports, see
            `cnnjax.objectives.Objective`; by default `Binary` for two classes and `Softmax` for
            more, configured by `config.train`.
        optimizer: a function from an optax schedule (the learning rate) to an optax transformation,
            such as `optax.lion`; by default the optimizer that `config.train.optimizer` names. The
            schedule and the other fields of `config.train` still apply.
        augment: a pure function (key, images) -> images on float32 [batch, size, size, 1] in
            [0, 1]; it replaces the augmentation that `config.augment` describes.
        init: initial Flax variables; by default those that `config.train.init` describes.
        on_epoch: called after each trained epoch with its number and its figures, such as
            `train/loss` and `validation/auc` (`cnnjax.run.events.figures_of`). If it returns True,
            training ends and the run is finished as after its last epoch. If it raises, the run can
            be resumed. With several processes, only the main process calls it.

    Returns:
        The results of the finished run.

    Raises:
        InputError: the data, the devices or the workdir cannot be used, or the run in the workdir
            was started with other parts.
        TrainingError: a loss, a gradient or a batch statistic is not finite.
        KeyboardInterrupt: a signal asked the process to end; the state was saved first
            (`cnnjax.run.signals.Ended` names the signal).
    """
    with open_run(config, data, Parts(network, objective, optimizer, augment, init)) as run:
        if run.ended:
            return conclude(run)
        config, mesh, train = run.config, run.mesh, run.config.train
        steps = compile_steps(mesh, run.train_step, run.placement)
        given = devices.place((run.key(STEP), run.objective), devices.replicated(mesh))
        feeder = run.feeder()
        outputs_of = make_logits(run.network, mesh)
        state, before = run.starting_state()
        second = min(run.done + 2, train.all_epochs)  # without compilation
        bar = tqdm(
            total=train.all_epochs * run.steps_per_epoch * train.batch,
            initial=run.steps_done * train.batch,
            unit="image",
            unit_scale=True,
            disable=processes.no_bars(),
            dynamic_ncols=True,
        )
        with bar, signals.held() as held:
            for epoch in range(run.done + 1, train.all_epochs + 1):
                if run.out_of_patience:
                    bar.write(f"no better checkpoint in {train.patience} epochs: stopping early")
                    break
                bar.set_description(f"epoch {epoch}/{train.all_epochs}")
                start = time.perf_counter()
                order, saver = run.order(epoch), Saver(run, held)
                try:
                    with traced(config.profile if epoch == second else None):
                        state, trained = take_epoch(
                            state, steps, feeder, order, given, bar, before, saver
                        )
                except NotFinite as error:
                    raise run.not_finite(error.step, error.rows) from None
                before = None
                middle = time.perf_counter()
                outputs = outputs_of(state, feeder, run.data.validation)
                seconds = middle - start, time.perf_counter() - middle
                bar.write(run.record(state, trained, outputs, seconds))
                held.end()
                if on_epoch is not None and run.asked_to_stop(on_epoch):
                    bar.write(f"on_epoch requested a stop after epoch {epoch}")
                    break
        return conclude(run)


class Steps(NamedTuple):
    """The compiled train step, (state, data, feed, given) -> (state, metrics)."""

    one: Any
    """Takes one step."""
    many: Any
    """Takes `together` steps in one call."""
    together: int
    """Number of steps of one call of `many`."""


def compile_steps(
    mesh: Mesh,
    train_step: Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]],
    placement: NamedSharding | TrainState | None = None,
) -> Steps:
    """Returns the compiled train step on a mesh; it reads the batch from the data set itself.

    Args:
        mesh: the devices.
        train_step: (state, batch, given) -> (state, metrics). `given` is any pytree of arrays, the
            same for all steps.
        placement: sharding of the state; by default the state is replicated on all devices.
    """

    def one(
        state: TrainState, data: Resident | None, feed: Batch | jax.Array, given: Any
    ) -> tuple[TrainState, Metrics]:
        return train_step(state, load(data, feed, mesh), given)

    def many(
        state: TrainState, data: Resident, feeds: jax.Array, given: Any
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, feed: one(state, data, feed, given), state, feeds)

    everywhere = devices.replicated(mesh)
    out = placement or everywhere, everywhere
    options: Any = {"donate_argnames": "state", "out_shardings": out}
    together = devices.traits(mesh).steps
    return Steps(jax.jit(one, **options), jax.jit(many, **options), together)


def take_epoch(
    state: TrainState,
    steps: Steps,
    feeder: Feeder,
    order: np.ndarray,
    given: Any,
    bar: tqdm[Any],
    before: Metrics | None = None,
    saver: Saver | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Takes the steps of one epoch.

    Args:
        state: the state before the epoch; its buffers are donated.
        steps: from `compile_steps`.
        feeder: provides the images.
        order: int32 [steps, batch], see `cnnjax.data.batches.step_rows`.
        given: the third argument of the train step.
        bar: progress bar, advanced by the number of images.
        before: metrics of the epoch's first steps, if the state already includes these steps.
        saver: saves the state within the epoch when it is due.

    Returns:
        The state after the epoch, and its mean loss and accuracy.

    Raises:
        NotFinite: a loss, a gradient or a batch statistic is not finite.
    """
    sums: list[Metrics] = [] if before is None else [before]
    taken = looked = shown = sum(x.loss.size for x in sums)
    waiting: Metrics | None = None

    def show(last: Metrics, until: int) -> None:
        """Advances the bar and shows the loss of the last call; waits until it is computed."""
        found = jax.device_get(last)
        if np.any(found.rejected):
            _fetched(sums, order)  # raises NotFinite
        loss = np.sum(found.loss) / np.sum(found.images)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update(order[shown:until].size)

    for step, feed in calls(steps, feeder, order[taken:]):
        state, step_sums = step(state, feeder.data, feed, given)
        sums.append(step_sums)
        taken += step_sums.loss.size
        if taken - looked >= _LOOK:
            # Fetch the metrics of the previous read: the device has newer steps to work on.
            if waiting is not None:
                show(waiting, looked)
                shown = looked
            waiting, looked = step_sums, taken
        if saver is not None and saver.is_due():
            saver.save(state, _fetched(sums, order))
    show(sums[-1], len(order))
    return state, means(_fetched(sums, order))


def calls(
    steps: Steps, feeder: Feeder, order: np.ndarray
) -> Iterator[tuple[Any, Batch | jax.Array]]:
    """Yields (function to call, its feed) for the steps of an order.

    If the images are on the device, `steps.many` is used for as many steps as possible.

    Args:
        steps: from `compile_steps`.
        feeder: provides the images.
        order: int32 [steps, batch], see `cnnjax.data.batches.step_rows`.
    """
    resident = feeder.data is not None and steps.together > 1
    fused = len(order) // steps.together * steps.together if resident else 0
    for feeds in feeder.feed_together(order[:fused], steps.together):
        yield steps.many, feeds
    for feed in feeder.feed(order[fused:]):
        yield steps.one, feed


def means(taken: Metrics) -> dict[str, float]:
    """Returns the mean loss and accuracy over all images of the steps, from arrays [steps]."""
    # Exactly rounded sums do not depend on how the steps were grouped or where a run was resumed.
    loss, correct, images = map(math.fsum, (taken.loss, taken.correct, taken.images))
    return {"loss": loss / images, "accuracy": correct / images}


class NotFinite(TrainingError):
    """A step was rejected; has its number in the epoch and the rows of its images."""

    def __init__(self, step: int, rows: np.ndarray) -> None:
        super().__init__(f"step {step} of the epoch is not finite")
        self.step, self.rows = step, rows


def _fetched(sums: list[Metrics], order: np.ndarray) -> Metrics:
    """Returns the metrics of an epoch's steps so far, as NumPy arrays [steps].

    Raises:
        NotFinite: a step was rejected; the first one is named.
    """
    parts = zip(*jax.device_get(sums), strict=True)
    each: list[Any] = [np.concatenate([np.ravel(x) for x in part]) for part in parts]
    taken = Metrics(*each)
    if np.any(taken.rejected):
        step = int(np.argmax(taken.rejected))
        raise NotFinite(step, order[step])
    return taken
