"""A run during training: its parts, its state, its history and its checkpoints."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cnnjax.augment import make_augment
from cnnjax.config import Config, TrainConfig
from cnnjax.data.batches import Feeder, resident_bytes, step_rows
from cnnjax.data.onthefly import Films
from cnnjax.data.prepare import TrainingData
from cnnjax.errors import TrainingError
from cnnjax.machine import devices, processes
from cnnjax.machine.host import cpu_cores
from cnnjax.networks import second_head
from cnnjax.objectives import Batch, Objective
from cnnjax.optimizers import layers_of, make_optimizer
from cnnjax.run import initial, signals
from cnnjax.run.checkpoint import Checkpoints, Kind, template_of
from cnnjax.run.events import Events, figures_of
from cnnjax.run.parts import Parts
from cnnjax.run.workdir import Workdir, append_line, write_json
from cnnjax.steps import (
    Metrics,
    TrainState,
    init_state,
    make_train_step,
    state_of,
    variables_of,
)

PyTree = Any

OnEpoch = Callable[[int, dict[str, float]], bool | None]
"""(epoch, figures) -> whether to stop training."""

# Each purpose has its own random key. A new purpose takes the next number, never a used one.
INIT, ORDER, STEP = range(3)

_NAMED = 10  # largest number of images named in an error

_ADVICE = "start a new run (--workdir) with a lower --train.learning-rate or with --train.clip-norm"


class Run:
    """A run during training: its parts, its history and its workdir.

    Attributes:
        config: config of the run; its precision is float32 or bfloat16, not `auto`.
        data: the images, with their split.
        workdir: the folder of the run.
        mesh: the devices; their number divides the batch size.
        auxiliary: weight of the auxiliary head's loss; 0 if the classes leave it nothing to learn.
        network: a Linen module.
        objective: the loss and the figures that an epoch reports.
        steps_per_epoch: number of batches of the training images, rounded up.
        train_step: (state, batch, (key, objective)) -> (state, metrics), for `compile_steps`.
        done: number of finished epochs.
        within: number of steps of the unfinished epoch that were finished before the run was
            resumed.
        history: the lines of `metrics.jsonl`, one per finished epoch.
        checkpoints: the saved states.
    """

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        workdir: Workdir,
        mesh: Mesh,
        given: Parts,
        weights: initial.Weights | None = None,
    ) -> None:
        train = config.train
        self.config, self.data, self.workdir, self.mesh = config, data, workdir, mesh
        self.network, self.objective = given.network, given.objective
        self.auxiliary = second_head(train, data.classes)
        self._feeder: Feeder | None = None
        self.steps_per_epoch = math.ceil(len(data.train) / train.batch)
        layers = layers_of(self.network, config.data.size) if train.layer_decay < 1 else ()
        self._optimizer, self._learning_rate = make_optimizer(
            train, self.steps_per_epoch, given.optimizer, layers
        )
        augment = given.augment or make_augment(config.augment)

        def train_step(
            state: TrainState, batch: Batch, given: tuple[jax.Array, Objective]
        ) -> tuple[TrainState, Metrics]:
            # The objective is an argument. Its class weights are therefore not constants of the
            # program, and other folds and seeds reuse the compiled program.
            key, objective = given
            step = make_train_step(
                self.network,
                self._optimizer,
                augment,
                objective,
                ema_decay=train.ema,
                freeze=train.freeze,
                accumulate=train.accumulate,
            )
            return step(state, batch, key)

        self.train_step = train_step
        self._given_init, self._weights = given.init, weights
        self.checkpoints = Checkpoints(workdir.checkpoints)
        self.done = self.checkpoints.epoch("latest") or 0
        self._shown = False  # whether the head of the table of epochs has been printed
        self.history = processes.on_main(lambda: workdir.read_history(self.done))
        # A checkpoint within an epoch is used only if that epoch is the next one.
        within = (self.checkpoints.epoch("within") or 0) - self.done * self.steps_per_epoch
        self.within = within if 0 < within <= self.steps_per_epoch else 0
        logs = config.tensorboard and processes.is_main()
        self._events = Events(workdir.events, self.history) if logs else None

    def key(self, purpose: int) -> jax.Array:
        """Returns the run's random key for a purpose, such as `INIT`."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    def order(self, epoch: int) -> np.ndarray:
        """Returns int32 [steps, batch], the rows of the data set for each step of an epoch."""
        last = epoch * self.steps_per_epoch
        steps = range(last - self.steps_per_epoch, last)
        return step_rows(self.key(ORDER), steps, self.data.train, self.config.train.batch)

    @property
    def resident(self) -> bool:
        """Whether the images are kept in device memory."""
        held = resident_bytes(self.data.decoded.images, self.mesh)
        return held <= self.config.data.resident_mib * 2**20

    @property
    def workers(self) -> int:
        """The number of processes that decode images during training; 0 if there is no need."""
        if self.resident or not isinstance(self.data.decoded.images, Films):
            return 0
        return self.config.data.workers or cpu_cores()

    def feeder(self) -> Feeder:
        """Returns the feeder, which copies the images to the devices; each call returns the same.

        Its worker processes, if there are any, end with the run.
        """
        if self._feeder is None:
            decoded, limit = self.data.decoded, self.config.data.resident_mib
            auxiliary = decoded.viral if self.auxiliary else None
            self._feeder = Feeder(
                decoded.images,
                self.data.labels,
                self.mesh,
                limit,
                auxiliary,
                decoded.weights,
                self.workers,
            )
        return self._feeder

    def new_state(self, key: jax.Array) -> TrainState:
        """Returns a random state before the first step; a pure function, for jit."""
        ema, size = bool(self.config.train.ema), self.config.data.size
        return init_state(self.network, self._optimizer, key, size, ema=ema)

    @property
    def steps_done(self) -> int:
        """The number of finished steps, including those of an unfinished epoch."""
        return self.done * self.steps_per_epoch + self.within

    def starting_state(self) -> tuple[TrainState, Metrics | None]:
        """Returns the state to train from: the first, or the latest of a resumed run.

        Within an epoch, it also returns the metrics [steps] of the epoch's finished steps;
        otherwise None.
        """
        if not self.steps_done:
            return self.first_state(), None
        if not self.within:
            return self.restored("latest"), None
        kept = self.checkpoints.beside("within") | {"rejected": [False] * self.within}
        taken: Any = {name: np.array(each) for name, each in kept.items()}
        return self.restored("within"), Metrics(**taken)

    def save_within(self, state: TrainState, taken: Metrics) -> None:
        """Starts to save the state within an epoch, with the metrics [steps] of its steps so far.

        Both are read by `starting_state`.
        """
        step = self.done * self.steps_per_epoch + len(taken.loss)
        kept = {name: x.tolist() for name, x in taken._asdict().items() if name != "rejected"}
        self.checkpoints.save(("within",), step, state, kept)

    def first_state(self) -> TrainState:
        """Returns the state before the first step, on the devices.

        Raises:
            InputError: the initial variables do not fit the network.
        """
        init = self._given_init
        placed: Any = {
            "out_shardings": self.placement,
            "compiler_options": devices.traits(self.mesh).once,
        }
        if init is None:
            drawn = jax.jit(self.new_state, **placed)(self.key(INIT))
            if self.config.train.init == "random":
                return drawn
            init = self._started(drawn)
        template = self.template()
        wanted = {"params": template.params, "batch_stats": template.batch_stats}
        given = {"params": init["params"], "batch_stats": init.get("batch_stats", {})}
        given = jax.device_get(given)
        initial.expect_shapes(given, wanted)
        ema = bool(self.config.train.ema)
        return jax.jit(lambda v: state_of(v, self._optimizer, ema=ema), **placed)(given)

    def _started(self, drawn: TrainState) -> PyTree:
        """Returns the variables of `--train.init`; those that it lacks are taken from `drawn`."""
        config = self.config
        weights = self._weights or initial.read(config.train.init, config.data.fold)
        variables = {"params": drawn.params, "batch_stats": drawn.batch_stats}
        variables, told = initial.started(jax.device_get(variables), weights, config)
        write_json(self.workdir.init, told)
        print(initial.describe(told, weights, config))
        return variables

    def template(self) -> TrainState:
        """Returns the shapes, dtypes and shardings of the state."""
        return template_of(self._shapes, self.placement)

    @functools.cached_property
    def placement(self) -> NamedSharding | TrainState:
        """The sharding of the state: one for all arrays, or one for each part of the state."""
        everywhere = devices.replicated(self.mesh)
        if not self.config.train.shard_optimizer:
            return everywhere
        parts = devices.parts_of(self._shapes.opt_state, self.mesh)
        each: Any = dict.fromkeys(("step", "params", "batch_stats", "ema"), everywhere)
        return TrainState(**each, opt_state=parts)

    @functools.cached_property
    def _shapes(self) -> TrainState:
        """Shapes and dtypes of the state."""
        shapes: TrainState = jax.eval_shape(self.new_state, self.key(INIT))
        return shapes

    def restored(self, kind: Kind) -> TrainState:
        """Returns the state of a checkpoint, on the devices."""
        return self.checkpoints.restore(kind, self.template())

    @property
    def best(self) -> int:
        """The number of the best epoch; 0 before there is one."""
        return max((line["epoch"] for line in self.history if line["best"]), default=0)

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping applies: no better checkpoint in `--train.patience` epochs."""
        patience = self.config.train.patience
        return bool(patience and self.done - self.best >= patience)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.done >= self.config.train.all_epochs or self.out_of_patience

    def asked_to_stop(self, on_epoch: OnEpoch) -> bool:
        """Calls `on_epoch` of `fit` for the last epoch; returns whether training should stop."""
        figures = figures_of(self.history[-1])
        return processes.on_main(lambda: bool(on_epoch(self.done, figures)))

    def mend(self) -> None:
        """Writes the missing `best` checkpoint if the process died between `latest` and `best`."""
        if self.done and self.best == self.done != self.checkpoints.epoch("best"):
            self.checkpoints.save(("best",), self.done, self.restored("latest"))

    def record(
        self,
        state: TrainState,
        trained: dict[str, float],
        outputs: np.ndarray,
        seconds: tuple[float, float],
    ) -> str:
        """Records an epoch, starts to write its checkpoints, and returns the line to print.

        Args:
            state: the state after the epoch, on the devices or on the host.
            trained: mean loss and accuracy, from `take_epoch`.
            outputs: outputs of the network for the held-out images.
            seconds: time for training and time for validation.

        Raises:
            TrainingError: an output is not finite.
        """
        epoch, config, rows = self.done + 1, self.config.train, self.data.validation
        if not np.isfinite(outputs).all():  # the weights of the last step may have overflowed
            raise TrainingError(
                f"{self.workdir.root}: outputs of the network are not finite after epoch {epoch};"
                f" {_ADVICE}"
            )
        figures = self.objective.figures(outputs, self.data.labels[rows])
        score = _score(figures, config)
        line = {
            "epoch": epoch,
            "step": epoch * self.steps_per_epoch,
            "learning_rate": float(self._learning_rate(epoch * self.steps_per_epoch - 1)),
            "train": trained,
            "validation": figures,
            "best": all(score > _score(past["validation"], config) for past in self.history),
        }
        self.history.append(line)
        # The line is written before the states: a resume drops a line without its state.
        append_line(self.workdir.metrics, line)
        kinds: tuple[Kind, ...] = ("latest", "best") if line["best"] else ("latest",)
        self.checkpoints.save(kinds, epoch, state)
        self.done, self.within = epoch, 0
        if self._events:
            self._events.add(line)
        speed = self.steps_per_epoch * config.batch / seconds[0]
        times = {"epoch": epoch, "train_seconds": seconds[0], "validation_seconds": seconds[1]}
        append_line(self.workdir.throughput, times | {"images_per_second": speed})
        first, self._shown = not self._shown, True
        return _epoch_line(line, config, speed, first=first)

    @property
    def parameters(self) -> int:
        """The number of parameters used in evaluation, without those of an auxiliary head."""
        return sum(p.size for p in jax.tree.leaves(variables_of(self.template())["params"]))

    def not_finite(self, step: int, rows: np.ndarray) -> TrainingError:
        """Returns the error of a step that is not finite.

        Args:
            step: its number in the unfinished epoch.
            rows: the rows of its images.
        """
        number = self.done * self.steps_per_epoch + step
        names = [self.data.decoded.examples[i].name for i in rows]
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        return TrainingError(
            f"{self.workdir.root}: loss, gradient or batch statistics are not finite at step"
            f" {number} (epoch {self.done + 1}), which was not applied; its images: {shown}."
            f" The checkpoint of epoch {self.done} is kept; {_ADVICE}"
        )

    def close(self) -> None:
        """Closes the files that the run writes to, and ends its worker processes."""
        if self._feeder is not None:
            self._feeder.close()
        self.checkpoints.close()
        if self._events:
            self._events.close()


class Saver:
    """Saves the state within an epoch.

    It does so every `--train.save-every` minutes, and when a signal asks the process to end.
    """

    def __init__(self, run: Run, held: signals.Held) -> None:
        self.run, self._held = run, held
        self._saved = time.monotonic()
        self._agreed = processes.Agreement(run.mesh)

    def is_due(self) -> bool:
        """Returns whether to save now; all processes must call it after the same steps."""
        pause = 60 * self.run.config.train.save_every
        due = bool(pause) and time.monotonic() - self._saved > pause
        return self._agreed(due or self._held.asked is not None)

    def save(self, state: TrainState, taken: Metrics) -> None:
        """Starts to save the state and the metrics [steps] of the epoch's steps so far.

        Raises:
            Ended: a signal asked the process to end.
        """
        self.run.save_within(state, taken)
        self._saved = time.monotonic()
        self._held.end()


def _score(figures: dict[str, float], config: TrainConfig) -> float:
    """Returns the score that selects the best epoch; higher is better."""
    chosen = config.best if config.best in figures else "loss"
    return -figures["loss"] if chosen == "loss" else figures[chosen]


def _epoch_line(line: dict[str, Any], config: TrainConfig, speed: float, *, first: bool) -> str:
    """Returns an epoch as a row of a table, at most 80 columns wide unless names are long.

    Args:
        line: the epoch's line of `metrics.jsonl`.
        config: config of the run.
        speed: training speed in images/s.
        first: whether to add the head of the table above the row.
    """
    figures = line["validation"]
    # "loss" is the training loss; the validation loss is "val loss".
    heads = ["epoch", "loss", *(f"val {name}" if name == "loss" else name for name in figures)]
    heads.append("images/s")
    cells = [
        f"{line['epoch']}/{config.all_epochs}",
        f"{line['train']['loss']:.4f}",
        *(f"{value:.4f}" for value in figures.values()),
        f"{speed:,.0f}",
    ]
    least = [2 * len(str(config.all_epochs)) + 1, *(6 for _ in cells[1:-1]), 7]
    widths = [max(len(head), n) for head, n in zip(heads, least, strict=True)]
    rows = [heads, cells] if first else [cells]
    lines = ["  ".join(f"{x:>{n}}" for x, n in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines) + (" *" if line["best"] else "")
