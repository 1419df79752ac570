"""Training, from a config to a run on disk: read `fit` from top to bottom.

Everything that decides the outcome is a function of (config, data, seed), and of the parts that a
caller may give beside the config. The loop holds no state but `state` and the history in
`metrics.jsonl`, so that a run that is stopped and started again goes on as if it had never stopped.
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
"""(epoch, figures) -> whether to stop."""

# One key each; a new purpose takes the next number and never a used one.
_INIT, _ORDER, _STEP = range(3)

_NAMED = 10  # images named in an error

_ADVICE = (
    "begin another run (--workdir) with a lower --train.learning-rate or with --train.clip-norm"
)

_NOTHING_GIVEN = Parts()

_LOOK = 16  # steps between looks at the loss, each of which waits for the step of the last look


@dataclass(frozen=True)
class Result:
    """Results of a finished run; `summary.json` holds the same."""

    classes: tuple[str, ...]
    """Names of the labels, 0 and up."""
    summary: dict[str, Any]
    evaluations: dict[str, metrics.Evaluation]
    """Of the `best` and the `latest` checkpoint; empty for objectives other than
    `cnnjax.objectives.Binary` and `Softmax`, whose figures are in `summary`."""

    @property
    def best(self) -> metrics.Evaluation:
        """The best checkpoint at its operating point, on the images that chose both, so a little
        optimistic."""
        return self.evaluations["best"]

    @property
    def last(self) -> metrics.Evaluation:
        """The last epoch on the same images, which did not choose it (but for --train.patience);
        they did choose its operating point."""
        return self.evaluations["latest"]

    def _repr_html_(self) -> str:
        """Returns the last epoch's metrics as a table, which notebooks show."""
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
    """Trains a network, or goes on where the run in the config's workdir stopped.

    Prints what it uses and a line for each epoch; leaves in the workdir what
    `cnnjax.run.workdir.Workdir` lists.

    Args:
        config: all that decides the run, but for the parts below.
        data: the images and what they are for; by default as `config.data` says.
        network: any Linen module that is called as `apply(variables, images, train=..., rngs=...)`
            with float32 images [batch, size, size, 1] in [0, 1] and returns what the objective
            takes; by default the one that `config.model` describes.
        objective: the loss and what an epoch reports, see `cnnjax.objectives.Objective`; by default
            `Binary` for two classes and `Softmax` for more, as `config.train` says.
        optimizer: from the learning rate, an optax schedule, to an optax transformation, as
            `optax.lion`; by default what `config.train.optimizer` names. The schedule and the other
            flags of `config.train` are in force.
        augment: a pure function (key, images) -> images, float32 [batch, size, size, 1] in [0, 1],
            in place of the changes that `config.augment` describes.
        init: Flax variables to start from; by default as `config.train.init` says.
        on_epoch: called after each epoch that is trained, with its number and its figures, such as
            `train/loss` and `validation/auc` (`cnnjax.run.events.figures_of`). Where it returns
            True, the run is concluded as after its last epoch; what it raises leaves the run to be
            resumed. Of several processes, the main one calls it.

    Raises:
        InputError: the data, the devices or the workdir cannot serve, or a run in the workdir was
            given other parts.
        TrainingError: a loss, a gradient or a batch statistic is not finite.
        KeyboardInterrupt: a signal asked the process to end; the state is saved
            (`cnnjax.run.signals.Ended` says which).
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
                    bar.write(f"stopped after epoch {epoch}, as on_epoch asked")
                    break
        return run.conclude()


class Run:
    """A run while it is trained: its parts, the epochs so far, and the folder that keeps them.

    Attributes:
        config: of the run, with its precision settled.
        data: the images and what they are for.
        workdir: where everything is kept.
        mesh: the devices: as many as divide a batch.
        auxiliary: weight of the second head's loss; 0 where the classes leave it nothing to learn.
        network: a Linen module.
        objective: the loss and what an epoch reports.
        steps_per_epoch: how many batches the training images fill, rounded up.
        train_step: (state, batch, (key, objective)) -> (state, metrics), for `compile_steps`.
        done: the number of epochs behind it.
        steps_done: the number of steps behind it, some of an unfinished epoch among them.
        history: the lines of `metrics.jsonl`, one for each of them.
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
            # The objective is an argument, so that class weights are no constants: other folds and
            # seeds find the program compiled.
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
        self._shown = False  # whether a line of the epochs' table is on the screen
        self.history = processes.on_main(lambda: workdir.read_history(self.done))
        # A checkpoint within an epoch counts where that epoch is the next.
        within = (self._checkpoints.epoch("within") or 0) - self.done * self.steps_per_epoch
        self._within = within if 0 < within <= self.steps_per_epoch else 0
        self.steps_done = self.done * self.steps_per_epoch + self._within
        self._profiled_epoch = min(self.done + 2, train.all_epochs)
        logs = config.tensorboard and processes.is_main()
        self._events = Events(workdir.events, self.history) if logs else None

    def key(self, purpose: int) -> jax.Array:
        """Returns the run's key for a purpose."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    def order(self, epoch: int) -> np.ndarray:
        """Returns int32 [steps, batch], the rows of each step of an epoch."""
        last = epoch * self.steps_per_epoch
        steps = range(last - self.steps_per_epoch, last)
        return step_rows(self.key(_ORDER), steps, self.data.train, self.config.train.batch)

    @property
    def resident(self) -> bool:
        """Whether the images live on the device."""
        held = resident_bytes(self.data.decoded.images, self.mesh)
        return held <= self.config.data.resident_mib * 2**20

    def feeder(self) -> Feeder:
        """Returns what brings the images to the devices."""
        decoded, limit = self.data.decoded, self.config.data.resident_mib
        auxiliary = decoded.viral if self.auxiliary else None
        return Feeder(
            decoded.images, self.data.labels, self.mesh, limit, auxiliary, decoded.weights
        )

    def new_state(self, key: jax.Array) -> TrainState:
        """Returns the state before the first step, drawn at random; pure, for jit."""
        ema, size = bool(self.config.train.ema), self.config.data.size
        return init_state(self.network, self._optimizer, key, size, ema=ema)

    @property
    def is_new(self) -> bool:
        """Whether no step is behind it."""
        return not self.steps_done

    def restored_latest(self) -> tuple[TrainState, Metrics | None]:
        """Returns the latest state, and the sums of the steps of an unfinished epoch behind it."""
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
        """Returns what saves the state within an epoch, for `take_epoch`.

        It does so when a signal asks the process to end, which it then raises, and every
        `--train.save-every` minutes.
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
            InputError: the variables to start from are of another network.
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
        """Returns the variables of `--train.init`, drawn ones where it has none."""
        config = self.config
        weights = self._weights or initial.read(config.train.init, config.data.fold)
        variables = {"params": drawn.params, "batch_stats": drawn.batch_stats}
        variables, told = initial.started(jax.device_get(variables), weights, config)
        write_json(self.workdir.init, told)
        print(initial.describe(told, weights, config))
        return variables

    def template(self) -> TrainState:
        """Returns shapes, dtypes and placement of the state."""
        return template_of(self._shapes, self.placement)

    @functools.cached_property
    def placement(self) -> NamedSharding | TrainState:
        """The sharding of the state: one for all arrays, or for its parts."""
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
        """Whether it has gone on for too long without a better checkpoint."""
        patience = self.config.train.patience
        return bool(patience and self.done - self.best >= patience)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.done >= self.config.train.all_epochs or self.out_of_patience

    def asked_to_stop(self, on_epoch: OnEpoch) -> bool:
        """Calls the hook of `fit` for the last epoch; returns whether it asks for the end."""
        figures = figures_of(self.history[-1])
        return processes.on_main(lambda: bool(on_epoch(self.done, figures)))

    def mend(self) -> None:
        """Writes the best state where the process died when it had written it as the latest."""
        if self.done and self.best == self.done != self._checkpoints.epoch("best"):
            self._checkpoints.save(("best",), self.done, _fetched(self.restored("latest")))

    def record(
        self,
        state: TrainState,
        trained: dict[str, float],
        outputs: np.ndarray,
        seconds: tuple[float, float],
    ) -> str:
        """Writes down an epoch, begins to write its state, and returns the line to show.

        Args:
            state: after the epoch; on the devices, or fetched.
            trained: what `take_epoch` returned.
            outputs: of the network for the held-out images.
            seconds: what training and validation took.

        Raises:
            TrainingError: an output is not finite.
        """
        epoch, config, rows = self.done + 1, self.config.train, self.data.validation
        if not np.isfinite(outputs).all():  # the last step may have been the first to break it
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
        # First the line, then the states: a line without its state is dropped on a resume.
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
        """Evaluates the best and the last state, and writes what remains of the run."""
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
            # At the network's own probability 0.5, before calibration, as in metrics.jsonl.
            summary["at_0.5"] = {"best": undecided["best"], "last": undecided["latest"]}
        found = undecided["latest"]
        if found["accuracy"] <= rules["majority_accuracy"]:
            summary["notes"].append(
                f"on the held-out images the last epoch (accuracy {found['accuracy']:.4f}"
                f"{'' if several else ' at its probability 0.5'}, AUC {found['auc']:.4f}) is no"
                " better than calling them all what most are (accuracy"
                f" {rules['majority_accuracy']:.4f}): training was too short, or diverged; begin"
                " another run (--workdir) with more --train.epochs, or a lower"
                " --train.learning-rate"
            )
        for note in summary["notes"]:
            print(textwrap.fill(f"note: {note}", 80, break_on_hyphens=False))
        write_json(workdir.operating, {kind: points_to_json(each) for kind, each in points.items()})
        write_json(workdir.summary, summary)
        return Result(data.classes, summary, judged)

    @property
    def parameters(self) -> int:
        """The number of parameters that an evaluation takes, so without an auxiliary head's."""
        return sum(p.size for p in jax.tree.leaves(variables_of(self.template())["params"]))

    @contextlib.contextmanager
    def profiled(self, epoch: int) -> Iterator[None]:
        """Writes a trace of the run's second epoch in this process, if `--profile` asks for it."""
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
        """Says of a step of the block that came to nothing finite which step and images it had."""
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
        """Prints what is trained on what."""
        config, data = self.config, self.data
        size = config.data.size
        place = "on the device" if self.resident else "streamed from the cache"
        print(f"split     {protocol(config.data, config.seed)}")
        for name, rows in (("train", data.train), ("validate", data.validation)):
            counts = np.bincount(data.labels[rows], minlength=len(data.classes))
            shown = (f"{n:,} {c}" for n, c in zip(counts, data.classes, strict=True))
            print(f"  {name:<8} {', '.join(shown)}")
        if config.train.auxiliary and not self.auxiliary:
            print(f"  no second head: --train.auxiliary is left out for {', '.join(data.classes)}")
        if self.auxiliary:
            viral = data.decoded.viral[data.train]
            known = f"{(viral == 0).sum():,} bacterial, {(viral == 1).sum():,} viral"
            both = {0, 1} <= set(viral)
            idle = "" if both else ": --train.auxiliary has nothing to tell apart"
            print(f"  by name  {known}{idle}")
        print(f"images    {size} x {size}, {data.decoded.images.nbytes / 2**20:,.0f} MiB, {place}")
        name = type(self.network).__name__
        print(f"network   {name}, {self.parameters:,} parameters")
        print(f"workdir   {config.workdir}")
        at = "at the network's own probability 0.5; " if isinstance(self.objective, Binary) else ""
        print(f"validate  {at}* new best by {config.train.best}")
        if self.steps_done:
            within = f" and {self._within} steps" if self._within else ""
            print(f"resuming after epoch {self.done}{within}")

    def close(self) -> None:
        """Releases the files that it writes to."""
        self._checkpoints.close()
        if self._events:
            self._events.close()


@contextlib.contextmanager
def open_run(
    config: Config,
    data: TrainingData | None = None,
    given: Parts = _NOTHING_GIVEN,
) -> Iterator[Run]:
    """Claims a workdir, reads the data, writes down what is trained on what; see `fit`."""
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
        # Before the images are: what is wrong with a flag is said at once.
        weights = initial.read(config.train.init, config.data.fold) if begins else None
        part, flag = config.train.batch, "--train.batch"
        if config.train.accumulate > 1:
            part, flag = part // config.train.accumulate, f"{flag} / --train.accumulate"
        mesh, whole = devices.dividing(mesh, part, flag), mesh
        some = f", of {whole.size}: a batch is divided evenly" if mesh.size < whole.size else ""
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
        # Before the workdir is this run's: what does not fit can be mended with other flags.
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
    """Notes, or checks, the parts and the split of a run, and writes the tables of its images."""
    workdir.claim_parts(given.described())
    workdir.expect_split([e.name for e in data.decoded.examples], data.held_out)
    write_split(workdir.split, data.decoded.examples, data.held_out)
    write_quarantine(workdir.quarantine, data.decoded.quarantine)
    write_duplicates(workdir.duplicates, data.duplicates)


class Steps(NamedTuple):
    """The compiled train step, (state, data, feed, given) -> (state, metrics)."""

    one: Any
    many: Any
    """The same for a feed of `together` steps at once."""
    together: int


def compile_steps(
    mesh: Mesh,
    train_step: Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]],
    placement: NamedSharding | TrainState | None = None,
) -> Steps:
    """Returns what the loop calls: the step on a mesh, with the batch fetched inside it.

    Args:
        mesh: the devices.
        train_step: (state, batch, given) -> (state, metrics); `given`, the same at each step, may
            be any arrays.
        placement: the sharding of the state; by default all of it is on each device.
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
    """Takes the steps of one epoch; returns the state and the mean loss and accuracy over it.

    Args:
        state: before the epoch; its buffers are given away.
        steps: of `compile_steps`.
        feeder: of the images.
        order: int32 [steps, batch], see `cnnjax.data.batches.step_rows`.
        given: what the train step takes beside state and batch.
        bar: is moved on by the images seen.
        before: the sums of the epoch's first steps, where those are behind the state.
        after_step: called with the state and the sums so far after each call of a step.

    Raises:
        TrainingError: a step came to something that is not finite.
    """
    sums: list[Metrics] = [] if before is None else [before]
    taken = looked = shown = sum(x.loss.size for x in sums)
    waiting: Metrics | None = None

    def show(last: Metrics, until: int) -> None:
        """Moves the bar on, with the loss of the last call; waits for that."""
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
            # What the device came to a look ago: it has work while this is fetched.
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
    """A step was rejected: its number in the epoch, and the rows of its images."""

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
    """Yields what to call for the steps of an order, and each call's feed: many at once, if any.

    Args:
        steps: of `compile_steps`.
        feeder: of the images.
        order: int32 [steps, batch], see `cnnjax.data.batches.step_rows`.
    """
    resident = feeder.data is not None and steps.together > 1
    fused = len(order) // steps.together * steps.together if resident else 0
    for feeds in feeder.feed_together(order[:fused], steps.together):
        yield steps.many, feeds
    for feed in feeder.feed(order[fused:]):
        yield steps.one, feed


def means(sums: Sequence[Metrics]) -> dict[str, float]:
    """Returns mean loss and accuracy over the images of many steps' sums."""
    # Exactly rounded sums: the same however the steps were called, and where they were resumed.
    loss, correct, images, _ = (
        math.fsum(np.concatenate([np.ravel(x) for x in part])) for part in zip(*sums, strict=True)
    )
    return {"loss": loss / images, "accuracy": correct / images}


def class_weights_of(labels: np.ndarray) -> tuple[float, ...]:
    """Returns n / (K n_c) for each label c of K, so that all classes weigh the same in sum."""
    counts = np.bincount(labels).tolist()
    return tuple(len(labels) / (len(counts) * count) for count in counts)


def objective_of(train: TrainConfig, data: TrainingData) -> Objective:
    """Returns the objective of a config: one logit for two classes, one for each of more."""
    weights = (1.0,) * len(data.classes)
    if train.class_weights:
        weights = class_weights_of(data.labels[data.train])
    if len(data.classes) == 2:
        return Binary(weights, train.label_smoothing, train.mixup, second_head(train, data.classes))
    return Softmax(np.array(weights, np.float32), train.label_smoothing, train.mixup)


def _expect_outputs(network: Any, objective: Objective, size: int, classes: int) -> None:
    """Raises InputError where the network does not return what the objective takes."""
    if isinstance(objective, Binary):
        if classes > 2:
            raise InputError(f"Binary is for two classes, not {classes}; give Softmax, or none")
        expect_logits(network, size, classes, outputs=1)
    elif isinstance(objective, Softmax):
        expect_logits(network, size, classes, outputs=classes)


def _fetched(state: TrainState) -> TrainState:
    """Returns a copy on the host: the next step is given the buffers, which a CPU fetches as is.

    A state on several processes, of which this one holds a part, is written as it is.
    """
    if processes.are_several():
        return state
    copy: TrainState = jax.tree.map(np.array, jax.device_get(state))
    return copy


def _with_precision(config: Config, mesh: Mesh) -> Config:
    """Settles `--train.precision auto`: a run keeps what it began with, on whatever device."""
    if config.train.precision != "auto":
        return config
    workdir = Workdir(config.workdir)
    begun = workdir.read_config().train.precision if workdir.begun else None
    precision = begun or devices.traits(mesh).precision
    return replace(config, train=replace(config.train, precision=precision))


def _expect_writable(folder: Path | None) -> None:
    """Raises InputError where a trace could not be written, before anything is trained."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--profile {folder} cannot be written ({reason})") from None


def _expect_fit(given: PyTree, wanted: PyTree) -> None:
    """Raises InputError where variables to start from are not those of the network."""
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, wanted))
    ]
    ours, theirs = shapes
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"init does not fit the network: {name} has shape"
                f" {ours.get(name, 'none')}, the network's has {theirs.get(name, 'none')}"
            )


def _score(figures: dict[str, float], config: TrainConfig) -> float:
    """Returns the number that is highest at the best epoch."""
    chosen = config.best if config.best in figures else "loss"
    return -figures["loss"] if chosen == "loss" else figures[chosen]


def _trivial_rules(data: TrainingData) -> dict[str, float]:
    """Returns what needs no network: accuracy of the largest class, AUC of mean brightness.

    Of three and more classes that is the mean over the classes, each against the rest.
    """
    labels = data.labels
    brightness = np.array([image.mean() for image in data.decoded.images])

    def area(label: int, rows: np.ndarray) -> float:
        return metrics.auc(brightness[rows], labels[rows] == label) or 0.0

    areas = []
    for label in (1,) if len(data.classes) == 2 else range(len(data.classes)):
        # Whether brighter means positive is for the training images to say.
        validated = area(label, data.validation)
        areas.append(validated if area(label, data.train) >= 0.5 else 1 - validated)
    largest = np.bincount(labels[data.train]).argmax()
    return {
        "majority_accuracy": float(np.mean(labels[data.validation] == largest)),
        "brightness_auc": float(np.mean(areas)),
    }


def _epoch_line(line: dict[str, Any], config: TrainConfig, speed: float, *, first: bool) -> str:
    """Returns an epoch as the row of a table of at most 80 columns, as far as names allow.

    Args:
        line: of `metrics.jsonl`.
        config: the run's.
        speed: of training, in images/s.
        first: whether to put the table's head above it.
    """
    figures = line["validation"]
    # Validation has a loss too: the first one is training's.
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
