"""Training, from a config to a run on disk: read `fit` from top to bottom.

The result is a function of (config, data, seed) and of the optional parts that a caller passes to
`fit`. The loop has no state besides `state` and the history in `metrics.jsonl`. A run that is
stopped and resumed therefore gives the same result as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import html
import math
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm.auto import tqdm

from cnnjax import metrics
from cnnjax.augment import Augment, make_augment
from cnnjax.config import Config, TrainConfig
from cnnjax.data.batches import Feeder, Resident, load, resident_bytes, step_rows
from cnnjax.data.cache import write_quarantine
from cnnjax.data.duplicates import write_duplicates
from cnnjax.data.patients import write_split
from cnnjax.data.prepare import TrainingData, protocol, training_data
from cnnjax.errors import InputError, TrainingError, first_line
from cnnjax.logits import make_logits
from cnnjax.machine import devices, processes
from cnnjax.machine.files import write_atomically, write_rows
from cnnjax.networks import model_of, second_head
from cnnjax.networks.imported import expect_logits
from cnnjax.objectives import Batch, Binary, Objective, Softmax
from cnnjax.operating import (
    evaluate_at,
    expect_decidable,
    fit_operating_point,
    points_to_json,
)
from cnnjax.optimizers import Factory, layers_of, make_optimizer
from cnnjax.phantom import DRAWN, is_drawn
from cnnjax.run import initial, signals
from cnnjax.run.checkpoint import KINDS, Checkpoints, Kind, template_of
from cnnjax.run.events import Events, figures_of
from cnnjax.run.parts import Parts, expect_together
from cnnjax.run.workdir import Workdir, append_line, claim, versions, write_json
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
_INIT, _ORDER, _STEP = range(3)

_NAMED = 10  # largest number of images named in an error

_ADVICE = "start a new run (--workdir) with a lower --train.learning-rate or with --train.clip-norm"

_NOTHING_GIVEN = Parts()

_LOOK = 16  # steps between two reads of the loss; each read waits for the step of the previous one


@dataclass(frozen=True)
class Result:
    """Results of a finished run, as in its `summary.json`."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of their labels from 0."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    evaluations: dict[str, metrics.Evaluation]
    """Evaluations of the checkpoints `best` and `latest`. Empty for objectives other than
    `cnnjax.objectives.Binary` and `Softmax`; their figures are in `summary`."""

    @property
    def best(self) -> metrics.Evaluation:
        """Evaluation of the best checkpoint at its operating point.

        It is slightly optimistic: the same held-out images selected the checkpoint and the
        operating point.
        """
        return self.evaluations["best"]

    @property
    def last(self) -> metrics.Evaluation:
        """Evaluation of the last epoch at its operating point, on the same held-out images.

        These images selected the operating point, but not the epoch (except with early stopping,
        --train.patience).
        """
        return self.evaluations["latest"]

    def _repr_html_(self) -> str:
        """Returns the last epoch's metrics as an HTML table, for notebooks."""
        told = f"{' / '.join(self.classes)}: the last of {self.summary['epochs']} epochs"
        figures = self.last._repr_html_() if self.evaluations else str(self.summary["last"])
        return f"<p>{html.escape(told)}</p>{figures}"


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
        config, data, mesh = run.config, run.data, run.mesh
        if run.ended:
            return run.conclude()
        steps = compile_steps(mesh, run.train_step, run.placement)
        given = devices.place((run.key(_STEP), run.objective), devices.replicated(mesh))
        feeder = run.feeder()
        outputs_of = make_logits(run.network, mesh)
        state, sums = run.first_state() if run.is_new else run.restored_latest()
        bar = tqdm(
            total=config.train.all_epochs * run.steps_per_epoch * config.train.batch,
            initial=run.steps_done * config.train.batch,
            unit="image",
            unit_scale=True,
            disable=processes.no_bars(),
            dynamic_ncols=True,
        )
        with bar, signals.held() as held:
            for epoch in range(run.done + 1, config.train.all_epochs + 1):
                if run.out_of_patience:
                    patience = config.train.patience
                    bar.write(f"no better checkpoint in {patience} epochs: stopping early")
                    break
                start = time.perf_counter()
                bar.set_description(f"epoch {epoch}/{config.train.all_epochs}")
                with run.profiled(epoch), run.named(epoch):
                    state, trained = take_epoch(
                        state, steps, feeder, run.order(epoch), given, bar, sums, run.saver(held)
                    )
                sums = None
                middle = time.perf_counter()
                outputs = outputs_of(state, feeder, data.validation)
                seconds = middle - start, time.perf_counter() - middle
                bar.write(run.record(state, trained, outputs, seconds))
                held.end()
                if on_epoch is not None and run.asked_to_stop(on_epoch):
                    bar.write(f"on_epoch requested a stop after epoch {epoch}")
                    break
        return run.conclude()


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
        steps_done: number of finished steps, including those of an unfinished epoch.
        history: the lines of `metrics.jsonl`, one per finished epoch.
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
        self._checkpoints = Checkpoints(workdir.checkpoints)
        self.done = self._checkpoints.epoch("latest") or 0
        self._shown = False  # whether the head of the table of epochs has been printed
        self.history = processes.on_main(lambda: workdir.read_history(self.done))
        # A checkpoint within an epoch is used only if that epoch is the next one.
        within = (self._checkpoints.epoch("within") or 0) - self.done * self.steps_per_epoch
        self._within = within if 0 < within <= self.steps_per_epoch else 0
        self.steps_done = self.done * self.steps_per_epoch + self._within
        self._profiled_epoch = min(self.done + 2, train.all_epochs)
        logs = config.tensorboard and processes.is_main()
        self._events = Events(workdir.events, self.history) if logs else None

    def key(self, purpose: int) -> jax.Array:
        """Returns the run's random key for a purpose, such as `_INIT`."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    def order(self, epoch: int) -> np.ndarray:
        """Returns int32 [steps, batch], the rows of the data set for each step of an epoch."""
        last = epoch * self.steps_per_epoch
        steps = range(last - self.steps_per_epoch, last)
        return step_rows(self.key(_ORDER), steps, self.data.train, self.config.train.batch)

    @property
    def resident(self) -> bool:
        """Whether the images are kept in device memory."""
        held = resident_bytes(self.data.decoded.images, self.mesh)
        return held <= self.config.data.resident_mib * 2**20

    def feeder(self) -> Feeder:
        """Returns the feeder, which copies the images to the devices."""
        decoded, limit = self.data.decoded, self.config.data.resident_mib
        auxiliary = decoded.viral if self.auxiliary else None
        return Feeder(
            decoded.images, self.data.labels, self.mesh, limit, auxiliary, decoded.weights
        )

    def new_state(self, key: jax.Array) -> TrainState:
        """Returns a random state before the first step; a pure function, for jit."""
        ema, size = bool(self.config.train.ema), self.config.data.size
        return init_state(self.network, self._optimizer, key, size, ema=ema)

    @property
    def is_new(self) -> bool:
        """Whether the run has taken no step yet."""
        return not self.steps_done

    def restored_latest(self) -> tuple[TrainState, Metrics | None]:
        """Returns the latest state, and the metrics of the finished steps of an unfinished epoch.

        The metrics are None if the latest state is the end of an epoch.
        """
        if not self._within:
            return self.restored("latest"), None
        kept = self._checkpoints.beside("within")
        each: Any = {
            "loss": np.array(kept["loss"], np.float32),
            "correct": np.array(kept["correct"], np.int32),
            "images": np.array(kept["images"], np.int32),
            "rejected": np.zeros(self._within, bool),
        }
        return self.restored("within"), Metrics(**each)

    def saver(self, held: signals.Held) -> Callable[[TrainState, list[Metrics]], None]:
        """Returns the function that saves the state within an epoch, for `take_epoch`.

        The function saves every `--train.save-every` minutes, and when a signal asks the process to
        end. In the second case it then raises `cnnjax.run.signals.Ended`.
        """
        saved, pause = time.monotonic(), 60 * self.config.train.save_every
        agreed = processes.Agreement(self.mesh)

        def save(state: TrainState, sums: list[Metrics]) -> None:
            nonlocal saved
            due = bool(pause) and time.monotonic() - saved > pause
            if not agreed(due or held.asked is not None):
                return
            found = jax.device_get(sums)
            _expect_finite(found, self.order(self.done + 1))
            each = {
                name: np.concatenate([np.ravel(getattr(x, name)) for x in found]).tolist()
                for name in ("loss", "correct", "images")
            }
            step = self.done * self.steps_per_epoch + len(each["loss"])
            self._checkpoints.save(("within",), step, _fetched(state), each)
            saved = time.monotonic()
            held.end()

        return save

    def first_state(self) -> tuple[TrainState, None]:
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
            drawn = jax.jit(self.new_state, **placed)(self.key(_INIT))
            if self.config.train.init == "random":
                return drawn, None
            init = self._started(drawn)
        template = self.template()
        wanted = {"params": template.params, "batch_stats": template.batch_stats}
        given = {"params": init["params"], "batch_stats": init.get("batch_stats", {})}
        given = jax.device_get(given)
        _expect_fit(given, wanted)
        ema = bool(self.config.train.ema)
        return jax.jit(lambda v: state_of(v, self._optimizer, ema=ema), **placed)(given), None

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
        shapes: TrainState = jax.eval_shape(self.new_state, self.key(_INIT))
        return shapes

    def restored(self, kind: Kind) -> TrainState:
        """Returns the state of a checkpoint, on the devices."""
        return self._checkpoints.restore(kind, self.template())

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
        if self.done and self.best == self.done != self._checkpoints.epoch("best"):
            self._checkpoints.save(("best",), self.done, _fetched(self.restored("latest")))

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
        self._checkpoints.save(kinds, epoch, _fetched(state))
        self.done, self._within = epoch, 0
        if self._events:
            self._events.add(line)
        speed = self.steps_per_epoch * config.batch / seconds[0]
        times = {"epoch": epoch, "train_seconds": seconds[0], "validation_seconds": seconds[1]}
        append_line(self.workdir.throughput, times | {"images_per_second": speed})
        first, self._shown = not self._shown, True
        return _epoch_line(line, config, speed, first=first)

    def conclude(self) -> Result:
        """Evaluates the best and the last state, and writes the remaining files of the run."""
        config, data, workdir = self.config, self.data, self.workdir
        labels, feeder = data.labels[data.validation], self.feeder()
        states = {kind: self.restored(kind) for kind in KINDS}
        each: dict[int, dict[str, np.ndarray]] = {views: {} for views in config.augment.looks}
        with tqdm(total=len(each) * len(KINDS), leave=False, disable=processes.no_bars()) as bar:
            for views, some in each.items():
                outputs_of = make_logits(self.network, self.mesh, views, config.augment)
                for kind, state in states.items():
                    bar.set_description(f"evaluating the {kind} epoch, views: {views}")
                    some[kind] = outputs_of(state, feeder, data.validation)
                    bar.update()
        outputs = each[config.augment.views]
        summary: dict[str, Any] = {
            "protocol": protocol(config.data, config.seed),
            "train_images": len(data.train),
            "validation_images": len(data.validation),
            "parameters": self.parameters,
            "epochs": self.history[-1]["epoch"],
            "views": config.augment.views,
            "best_epoch": self.best,
            "notes": [DRAWN] if workdir.read_drawn() else [],
        }
        workdir.write_config(config)
        self._checkpoints.drop("within")
        if not isinstance(self.objective, Binary | Softmax):
            figures = {kind: self.objective.figures(out, labels) for kind, out in outputs.items()}
            summary |= {"best": figures["best"], "last": figures["latest"]}
            write_json(workdir.summary, summary)
            return Result(data.classes, summary, {})
        points = {
            kind: {
                views: fit_operating_point(out[kind], labels, config.operating)
                for views, out in each.items()
            }
            for kind in KINDS
        }
        held_out = [data.decoded.examples[i] for i in data.validation]
        patients = [e.patient for e in held_out]
        judged: dict[str, metrics.Evaluation] = {}
        off = processes.no_bars()
        for kind, out in tqdm(outputs.items(), "intervals", leave=False, disable=off):
            point = points[kind][config.augment.views]
            judged[kind] = evaluate_at(point, out, labels, patients)
        several = isinstance(self.objective, Softmax)
        if processes.is_main():
            columns = [f"_{name}" for name in data.classes] if several else [""]
            logits = [f"logit_{kind}{each}" for kind in ("best", "last") for each in columns]
            both = np.hstack([outputs[k].reshape(len(labels), -1) for k in ("best", "latest")])
            with write_atomically(workdir.validation) as file:
                write_rows(file, [["image", "patient", "label", *logits]])
                for e, row in zip(held_out, both.tolist(), strict=True):
                    write_rows(file, [[e.name, e.patient, e.label, *row]])
        rules = processes.on_main(lambda: _trivial_rules(data))
        undecided = {kind: metrics.at_zero(out, labels) for kind, out in outputs.items()}
        summary |= {
            "best": judged["best"].to_json(),
            "last": judged["latest"].to_json(),
            "rules": rules,
        }
        if not several:
            # At probability 0.5 of the uncalibrated network, as in metrics.jsonl.
            summary["at_0.5"] = {"best": undecided["best"], "last": undecided["latest"]}
        found = undecided["latest"]
        if found["accuracy"] <= rules["majority_accuracy"]:
            summary["notes"].append(
                f"on the held-out images the last epoch (accuracy {found['accuracy']:.4f}"
                f"{'' if several else ' at its probability 0.5'}, AUC {found['auc']:.4f}) is no"
                " better than always predicting the most frequent class (accuracy"
                f" {rules['majority_accuracy']:.4f}): training was too short, or diverged; start"
                " a new run (--workdir) with more --train.epochs, or a lower"
                " --train.learning-rate"
            )
        for note in summary["notes"]:
            print(textwrap.fill(f"note: {note}", 80, break_on_hyphens=False))
        write_json(workdir.operating, {kind: points_to_json(each) for kind, each in points.items()})
        write_json(workdir.summary, summary)
        return Result(data.classes, summary, judged)

    @property
    def parameters(self) -> int:
        """The number of parameters used in evaluation, without those of an auxiliary head."""
        return sum(p.size for p in jax.tree.leaves(variables_of(self.template())["params"]))

    @contextlib.contextmanager
    def profiled(self, epoch: int) -> Iterator[None]:
        """Writes a profiler trace of the second epoch in this process, if `--profile` is set."""
        folder = self.config.profile
        if folder is None or epoch != self._profiled_epoch or not processes.is_main():
            yield
            return
        jax.profiler.start_trace(str(folder))
        try:
            yield
        finally:
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"--profile {folder} cannot be written ({first_line(error)})"
                ) from None

    @contextlib.contextmanager
    def named(self, epoch: int) -> Iterator[None]:
        """Adds the step and its images to the error of a step that is not finite in this block."""
        try:
            yield
        except _NotFinite as error:
            step = (epoch - 1) * self.steps_per_epoch + error.step
            names = [self.data.decoded.examples[i].name for i in error.rows]
            shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            raise TrainingError(
                f"{self.workdir.root}: loss, gradient or batch statistics are not finite at step"
                f" {step} (epoch {epoch}), which was not applied; its images: {shown}."
                f" The checkpoint of epoch {self.done} is kept; {_ADVICE}"
            ) from None

    def describe(self) -> None:
        """Prints the split, the images, the network and the state of the run."""
        config, data = self.config, self.data
        size = config.data.size
        place = "on the device" if self.resident else "streamed from the cache"
        print(f"split     {protocol(config.data, config.seed)}")
        for name, rows in (("train", data.train), ("validate", data.validation)):
            counts = np.bincount(data.labels[rows], minlength=len(data.classes))
            shown = (f"{n:,} {c}" for n, c in zip(counts, data.classes, strict=True))
            print(f"  {name:<8} {', '.join(shown)}")
        if config.train.auxiliary and not self.auxiliary:
            print(f"  --train.auxiliary has no effect for the classes {', '.join(data.classes)}")
        if self.auxiliary:
            viral = data.decoded.viral[data.train]
            known = f"{(viral == 0).sum():,} bacterial, {(viral == 1).sum():,} viral"
            both = {0, 1} <= set(viral)
            idle = "" if both else ": --train.auxiliary needs images of both causes"
            print(f"  by name  {known}{idle}")
        print(f"images    {size} x {size}, {data.decoded.images.nbytes / 2**20:,.0f} MiB, {place}")
        name = type(self.network).__name__
        print(f"network   {name}, {self.parameters:,} parameters")
        print(f"workdir   {config.workdir}")
        at = "at probability 0.5, uncalibrated; " if isinstance(self.objective, Binary) else ""
        print(f"validate  {at}* new best by {config.train.best}")
        if self.steps_done:
            within = f" and {self._within} steps" if self._within else ""
            print(f"resuming after epoch {self.done}{within}")

    def close(self) -> None:
        """Closes the files that the run writes to."""
        self._checkpoints.close()
        if self._events:
            self._events.close()


@contextlib.contextmanager
def open_run(
    config: Config,
    data: TrainingData | None = None,
    given: Parts = _NOTHING_GIVEN,
) -> Iterator[Run]:
    """Claims the workdir, reads the data and yields the run, ready to train; see `fit`."""
    expect_together(given, config)
    _expect_writable(config.profile)
    mesh = devices.make_mesh(config.device, config.distributed)
    config = _with_precision(config, mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.quiet())
        workdir = stack.enter_context(claim(config))
        found = versions()
        print(f"cnnjax    {found['cnnjax']} on jax {found['jax']}, flax {found['flax']}")
        begins = config.train.init != "random" and not processes.on_main(lambda: workdir.begun)
        # Read before the images, which take longer: errors in the flags are reported at once.
        weights = initial.read(config.train.init, config.data.fold) if begins else None
        part, flag = config.train.batch, "--train.batch"
        if config.train.accumulate > 1:
            part, flag = part // config.train.accumulate, f"{flag} / --train.accumulate"
        mesh, whole = devices.dividing(mesh, part, flag), mesh
        some = f", of {whole.size}: it must divide a batch evenly" if mesh.size < whole.size else ""
        print(f"devices   {devices.describe(mesh)}{some}")
        drawn = data is None and is_drawn(config.data.root)
        if data is None:
            data = training_data(config.data, config.seed, print, mesh)
        if drawn:
            print(f"note      {DRAWN}")
        network, objective = given.network, given.objective
        if network is None:
            network = model_of(config, data.classes)
        if objective is None:
            objective = objective_of(config.train, data)
        # Checked before the workdir is claimed: the user can correct the flags and try again.
        if given.network or given.objective or ":" in config.model.name:
            _expect_outputs(network, objective, config.data.size, len(data.classes))
        if isinstance(objective, Softmax):
            expect_decidable(config.operating, len(data.classes))
        initial.expect_fit(network, config, weights)
        workdir.claim_data(data.decoded.fingerprint, data.classes, drawn)
        processes.on_main(lambda: _claim_rest(workdir, data, given))
        session = {"devices": devices.describe(mesh), "versions": versions()}
        append_line(workdir.sessions, session)
        parts = given._replace(network=network, objective=objective)
        run = Run(config, data, workdir, mesh, parts, weights)
        stack.callback(run.close)
        run.describe()
        run.mend()
        yield run


def _claim_rest(workdir: Workdir, data: TrainingData, given: Parts) -> None:
    """Records or checks the parts and the split of a run, and writes the tables of its images."""
    workdir.claim_parts(given.described())
    workdir.expect_split([e.name for e in data.decoded.examples], data.held_out)
    write_split(workdir.split, data.decoded.examples, data.held_out)
    write_quarantine(workdir.quarantine, data.decoded.quarantine)
    write_duplicates(workdir.duplicates, data.duplicates)


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
    after_step: Callable[[TrainState, list[Metrics]], None] | None = None,
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
        after_step: called with the state and the list of metrics so far after each call of a step.

    Returns:
        The state after the epoch, and its mean loss and accuracy.

    Raises:
        TrainingError: a loss, a gradient or a batch statistic is not finite.
    """
    sums: list[Metrics] = [] if before is None else [before]
    taken = looked = shown = sum(x.loss.size for x in sums)
    waiting: Metrics | None = None

    def show(last: Metrics, until: int) -> None:
        """Advances the bar and shows the loss of the last call; waits until it is computed."""
        found = jax.device_get(last)
        _expect_finite(jax.device_get(sums) if np.any(found.rejected) else [], order)
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
        if after_step is not None:
            after_step(state, sums)
    show(sums[-1], len(order))
    fetched = jax.device_get(sums)
    _expect_finite(fetched, order)
    return state, means(fetched)


class _NotFinite(TrainingError):
    """A step was rejected; holds its number in the epoch and the rows of its images."""

    def __init__(self, step: int, rows: np.ndarray) -> None:
        super().__init__(f"step {step} of the epoch is not finite")
        self.step, self.rows = step, rows


def _expect_finite(sums: Sequence[Metrics], order: np.ndarray) -> None:
    """Raises _NotFinite for the first step that was rejected."""
    rejected = np.concatenate([np.zeros(0, bool), *(np.ravel(s.rejected) for s in sums)])
    if rejected.any():
        step = int(np.argmax(rejected))
        raise _NotFinite(step, order[step])


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


def means(sums: Sequence[Metrics]) -> dict[str, float]:
    """Returns the mean loss and accuracy over all images of the steps."""
    # Exactly rounded sums do not depend on how the steps were grouped or where a run was resumed.
    loss, correct, images, _ = (
        math.fsum(np.concatenate([np.ravel(x) for x in part])) for part in zip(*sums, strict=True)
    )
    return {"loss": loss / images, "accuracy": correct / images}


def class_weights_of(labels: np.ndarray) -> tuple[float, ...]:
    """Returns n / (K n_c) for each label c of K; each class then has the same total weight.

    Args:
        labels: int [n], with n_c images of label c.
    """
    counts = np.bincount(labels).tolist()
    return tuple(len(labels) / (len(counts) * count) for count in counts)


def objective_of(train: TrainConfig, data: TrainingData) -> Objective:
    """Returns the objective of a config: `Binary` for two classes, `Softmax` for more."""
    weights = (1.0,) * len(data.classes)
    if train.class_weights:
        weights = class_weights_of(data.labels[data.train])
    if len(data.classes) == 2:
        return Binary(weights, train.label_smoothing, train.mixup, second_head(train, data.classes))
    return Softmax(np.array(weights, np.float32), train.label_smoothing, train.mixup)


def _expect_outputs(network: Any, objective: Objective, size: int, classes: int) -> None:
    """Raises InputError if the network's outputs do not have the shape the objective expects."""
    if isinstance(objective, Binary):
        if classes > 2:
            raise InputError(
                f"Binary is for two classes, not {classes}; give Softmax, or no objective"
            )
        expect_logits(network, size, classes, outputs=1)
    elif isinstance(objective, Softmax):
        expect_logits(network, size, classes, outputs=classes)


def _fetched(state: TrainState) -> TrainState:
    """Returns a copy of the state on the host.

    The copy is needed because the next step donates the buffers, and on a CPU fetched arrays share
    them. With several processes each holds only a part, so the state is returned unchanged.
    """
    if processes.are_several():
        return state
    copy: TrainState = jax.tree.map(np.array, jax.device_get(state))
    return copy


def _with_precision(config: Config, mesh: Mesh) -> Config:
    """Replaces `--train.precision auto`; a resumed run keeps its precision on any device."""
    if config.train.precision != "auto":
        return config
    workdir = Workdir(config.workdir)
    begun = workdir.read_config().train.precision if workdir.begun else None
    precision = begun or devices.traits(mesh).precision
    return replace(config, train=replace(config.train, precision=precision))


def _expect_writable(folder: Path | None) -> None:
    """Raises InputError if the folder for the trace is not writable, before training starts."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--profile {folder} cannot be written ({reason})") from None


def _expect_fit(given: PyTree, wanted: PyTree) -> None:
    """Raises InputError if the initial variables differ from the network's in names or shapes."""
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, wanted))
    ]
    ours, theirs = shapes
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"init does not fit the network: {name} has shape"
                f" {ours.get(name, 'none')} in init and {theirs.get(name, 'none')} in the network"
            )


def _score(figures: dict[str, float], config: TrainConfig) -> float:
    """Returns the score that selects the best epoch; higher is better."""
    chosen = config.best if config.best in figures else "loss"
    return -figures["loss"] if chosen == "loss" else figures[chosen]


def _trivial_rules(data: TrainingData) -> dict[str, float]:
    """Returns baselines without a network: accuracy of the largest class, AUC of mean brightness.

    With three or more classes the AUC is the mean over the classes, each against the rest.
    """
    labels = data.labels
    brightness = np.array([image.mean() for image in data.decoded.images])

    def area(label: int, rows: np.ndarray) -> float:
        return metrics.auc(brightness[rows], labels[rows] == label) or 0.0

    areas = []
    for label in (1,) if len(data.classes) == 2 else range(len(data.classes)):
        # The training images decide whether brighter means positive.
        validated = area(label, data.validation)
        areas.append(validated if area(label, data.train) >= 0.5 else 1 - validated)
    largest = np.bincount(labels[data.train]).argmax()
    return {
        "majority_accuracy": float(np.mean(labels[data.validation] == largest)),
        "brightness_auc": float(np.mean(areas)),
    }


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
