"""Training, from a config to a run on disk; the only place with side effects while training.

Read `fit` from top to bottom. Everything that decides the outcome is a function of (config, data,
seed): the loop holds no state but `state` and the history in `metrics.jsonl`, so that a run which
is stopped and started again goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from cnnjax import devices, metrics
from cnnjax.checkpoint import KINDS, Checkpoints
from cnnjax.config import Config, Precision, TrainConfig
from cnnjax.data.cache import write_quarantine
from cnnjax.data.duplicates import write_duplicates
from cnnjax.data.files import write_atomically, write_rows
from cnnjax.data.patients import write_split
from cnnjax.data.prepare import TrainingData, training_data
from cnnjax.errors import InputError, first_line
from cnnjax.events import Events
from cnnjax.operating import fit_operating_point, points_to_json
from cnnjax.predict import make_logits
from cnnjax.programs import Alone, Program, Task, Together
from cnnjax.steps import TrainState, variables_of
from cnnjax.workdir import Workdir, append_line, claim, write_json


@dataclass(frozen=True)
class Result:
    """What a finished run comes to; `summary.json` holds the same."""

    best: metrics.Evaluation
    """The best checkpoint on the images that chose it, so a little optimistic."""
    last: metrics.Evaluation
    """The last epoch on the same images, which chose nothing of it, but by --train.patience."""
    classes: tuple[str, str]
    summary: dict[str, Any]


def fit(config: Config) -> Result:
    """Trains the config's network on the config's data, or goes on where its workdir stopped.

    Prints what it uses and a line for each epoch; leaves in the workdir what
    `cnnjax.workdir.Workdir` lists.

    Raises:
        InputError: the data, the devices or the workdir cannot serve, or the loss is not finite.
    """
    return fit_all([config])[0]


def fit_all(configs: Sequence[Config], *, together: bool | None = None) -> list[Result]:
    """Trains several networks that differ by seed or fold alone, each as `fit` would.

    Args:
        configs: one for each, with a workdir of its own.
        together: all in one compiled step, by `vmap`; one after another if false. By default as is
            faster: together on an accelerator, one after another on a CPU. Data that is streamed,
            and members with another number of steps, precision or set of readable images, are never
            trained together.

    Returns:
        What each comes to; the same either way, up to rounding.

    Raises:
        InputError: see `fit`.
        ValueError: the configs differ by more.
    """
    _expect_alike(configs)
    _expect_writable(configs[0].profile)
    mesh = devices.make_mesh(configs[0].device)
    if together is None:
        together = devices.platform(mesh) != "cpu"
    with contextlib.ExitStack() as stack:
        entered = [_enter(config, mesh, stack, i == 0) for i, config in enumerate(configs)]
        # Only now are their data theirs: until all can serve, a workdir may be given anew.
        members = [_begin(*each, mesh, stack) for each in entered]
        groups: list[list[Member]] = [[member] for member in members]
        if together and all(member.resident for member in members):
            alike: dict[Any, list[Member]] = {}
            for member in members:
                alike.setdefault(member.shared, []).append(member)
            groups = list(alike.values())
        for group in groups:
            _train(group, mesh)
        return [_conclude(member, mesh) for member in members]


def _expect_alike(configs: Sequence[Config]) -> None:
    def rest(config: Config) -> Config:
        data = replace(config.data, fold=0)
        return replace(config, workdir=Path(), seed=0, profile=None, tensorboard=False, data=data)

    if len({rest(config) for config in configs}) != 1:
        raise ValueError("members of an ensemble may differ by workdir, seed and fold alone")
    if len({config.workdir for config in configs}) != len(configs):
        raise ValueError("each member of an ensemble needs a workdir of its own")


def _with_precision(config: Config, mesh: Mesh) -> Config:
    """Settles `--train.precision auto`: a run keeps what it began with, on whatever device."""
    if config.train.precision != "auto":
        return config
    workdir = Workdir(config.workdir)
    precision: Precision = "float32" if devices.platform(mesh) == "cpu" else "bfloat16"
    if workdir.begun:
        precision = workdir.read_config().train.precision
    return replace(config, train=replace(config.train, precision=precision))


class Member(Task):
    """A run while it is trained: what it computes, what it has come to, where that is kept."""

    def __init__(self, config: Config, data: TrainingData, workdir: Workdir) -> None:
        super().__init__(config, data)
        self.workdir = workdir
        self.checkpoints = Checkpoints(workdir.checkpoints)
        self.done = self.checkpoints.epoch("latest") or 0
        self.history = workdir.read_history(self.done)
        self.events = Events(workdir.events, self.history) if config.tensorboard else None

    @property
    def shared(self) -> tuple[int, str, str]:
        """What members have in common that are trained in one step."""
        precision, images = self.config.train.precision, self.data.decoded.fingerprint
        return self.steps_per_epoch, precision, images

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.done >= self.config.train.epochs or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether it has gone on for too long without a better checkpoint."""
        patience = self.config.train.patience
        return bool(patience and self.done - self.best >= patience)

    @property
    def best(self) -> int:
        """The number of the best epoch; 0 before there is one."""
        return max((line["epoch"] for line in self.history if line["best"]), default=0)

    def mend(self, mesh: Mesh) -> None:
        """Writes the best state where the process died when it had written it as the latest."""
        if self.best == self.done and self.checkpoints.epoch("best") != self.done:
            latest = self.checkpoints.restore("latest", self.template(mesh))
            self.checkpoints.save(("best",), self.done, jax.device_get(latest))

    def note(
        self,
        state: TrainState,
        trained: dict[str, float],
        logits: np.ndarray,
        seconds: tuple[float, float],
        images: int,
    ) -> str:
        """Writes down an epoch, begins to write its state, and returns the line to show.

        Args:
            state: after the epoch.
            trained: loss and accuracy over it.
            logits: of the held-out images after it.
            seconds: what training and validation took.
            images: how many were trained on in them, those of members beside it counted.

        Raises:
            InputError: the loss is not finite, or a logit.
        """
        epoch, config = self.done + 1, self.config.train
        self._expect_finite(trained["loss"])
        # Its last step may have been the first to break the network.
        self._expect_finite(float(np.abs(logits).max()))
        judged = _validate(logits, self.labels[self.data.validation])
        score = _score(judged, config)
        line = {
            "epoch": epoch,
            "step": epoch * self.steps_per_epoch,
            "learning_rate": float(self.learning_rate(epoch * self.steps_per_epoch - 1)),
            "train": trained,
            "validation": judged,
            "best": all(score > _score(past["validation"], config) for past in self.history),
        }
        self.history.append(line)
        # First the line, then the states: a line without its state is dropped on a resume.
        append_line(self.workdir.metrics, line)
        self.checkpoints.save(("latest", "best") if line["best"] else ("latest",), epoch, state)
        self.done = epoch
        speed = images / seconds[0]
        if self.events:
            self.events.add(line)
        append_line(
            self.workdir.throughput,
            {
                "epoch": epoch,
                "train_seconds": seconds[0],
                "validation_seconds": seconds[1],
                "images_per_second": speed,
            },
        )
        return _epoch_line(line, config, speed)

    def _expect_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            kept = f" (this one is kept as it was after epoch {self.done})" if self.done else ""
            raise InputError(
                f"{self.workdir.root}: the loss is {loss} in epoch {self.done + 1}; begin another"
                " run (--workdir) with a lower --train.learning-rate or with --train.clip-norm"
                + kept
            )

    def close(self) -> None:
        """Releases the files that it writes to."""
        self.checkpoints.close()
        if self.events:
            self.events.close()


def _enter(
    config: Config, mesh: Mesh, stack: contextlib.ExitStack, first: bool
) -> tuple[Config, TrainingData, Workdir]:
    """Claims a member's workdir and reads its data; tells of them for the first."""
    config = _with_precision(config, mesh)
    workdir = stack.enter_context(claim(config))
    say = print if first else lambda _: None
    say(f"cnnjax    {version('cnnjax')} on jax {jax.__version__}, flax {version('flax')}")
    say(f"devices   {devices.describe(mesh)}")
    return config, training_data(config.data, config.seed, say, mesh), workdir


def _begin(
    config: Config, data: TrainingData, workdir: Workdir, mesh: Mesh, stack: contextlib.ExitStack
) -> Member:
    """Writes down what a member is trained on, or finds it as it was, and where that stopped."""
    workdir.claim_data(data.decoded.fingerprint, data.classes)
    write_split(workdir.split, data.decoded.examples, data.held_out)
    write_quarantine(workdir.quarantine, data.decoded.quarantine)
    write_duplicates(workdir.duplicates, data.duplicates)
    versions = {
        name: version(name) for name in ("cnnjax", "jax", "jaxlib", "flax", "optax", "numpy")
    }
    append_line(workdir.sessions, {"devices": devices.describe(mesh), "versions": versions})
    member = Member(config, data, workdir)
    stack.callback(member.close)
    return member


def _train(members: list[Member], mesh: Mesh) -> None:
    """Trains members side by side until each has ended."""
    for member in members:
        _describe(member, mesh)
        if member.done:
            print(f"resuming after epoch {member.done}")
            member.mend(mesh)
    # Those that were killed before the others' last epoch was kept catch up by themselves.
    while pending := [member for member in members if not member.ended]:
        first = min(member.done for member in pending)
        behind = [member for member in pending if member.done == first]
        ahead = [member.done for member in pending if member.done > first]
        _train_until(behind, mesh, min(ahead, default=members[0].config.train.epochs))


def _train_until(members: list[Member], mesh: Mesh, last: int) -> None:
    """Trains members that have done equally many epochs, up to `last`, or until all have ended."""
    config = members[0].config
    program: Program = Alone(members[0], mesh) if len(members) == 1 else Together(members, mesh)
    done = members[0].done
    if done:
        states = program.join(
            [member.checkpoints.restore("latest", member.template(mesh)) for member in members]
        )
    else:
        states = program.start()
    images = sum(len(member.data.train) for member in members)
    bar = tqdm(
        total=config.train.epochs * images,
        initial=done * images,
        unit="image",
        unit_scale=True,
        disable=None,
        dynamic_ncols=True,
    )
    with bar:
        for epoch in range(done + 1, last + 1):
            start = time.perf_counter()
            bar.set_description(f"epoch {epoch}/{config.train.epochs}")
            with _profiled(config.profile if epoch == min(done + 2, config.train.epochs) else None):
                orders = [member.order(epoch) for member in members]
                states, trained = program.epoch(states, orders, bar)
            middle = time.perf_counter()
            logits = program.logits(states)
            seconds = middle - start, time.perf_counter() - middle
            # Copies: the next step is given the buffers, which on a CPU are what is fetched.
            fetched = jax.tree.map(np.array, jax.device_get(states))
            for i, member in enumerate(members):
                if not member.ended:
                    state = program.part(fetched, i)
                    bar.write(member.note(state, trained[i], logits[i], seconds, images))
                    if member.out_of_patience:
                        patience = config.train.patience
                        bar.write(f"no better checkpoint in {patience} epochs: stopping early")
            if all(member.ended for member in members):
                break


@contextlib.contextmanager
def _profiled(folder: Path | None) -> Iterator[None]:
    """Writes a trace of what the block does, if there is a folder for it."""
    if folder is None:
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


def _expect_writable(folder: Path | None) -> None:
    """Raises InputError where a trace could not be written, before anything is trained."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--profile {folder} cannot be written ({reason})") from None


def _validate(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the metrics that each epoch is followed by; intervals wait for the end."""
    logits = logits.astype(np.float64)
    wrong_way = np.where(labels == 1, -logits, logits)
    return {"loss": float(np.mean(np.logaddexp(0, wrong_way))), **metrics.at_zero(logits, labels)}


def _score(judged: dict[str, float], config: TrainConfig) -> float:
    """Returns the number that is highest at the best epoch."""
    return -judged["loss"] if config.best == "loss" else judged[config.best]


def _conclude(member: Member, mesh: Mesh) -> Result:
    """Judges the best and the last state with intervals, and writes what remains of the run."""
    config, data, workdir = member.config, member.data, member.workdir
    held_out = [data.decoded.examples[i] for i in data.validation]
    labels = member.labels[data.validation]
    patients = [e.patient for e in held_out]
    template = member.template(mesh)
    feeder = member.feeder(mesh)
    states = {kind: member.checkpoints.restore(kind, template) for kind in KINDS}
    each: dict[int, dict[str, np.ndarray]] = {}
    for views in config.augment.looks:
        logits = make_logits(member.model, mesh, views, config.augment)
        each[views] = {kind: logits(states[kind], feeder, data.validation) for kind in KINDS}
    points: dict[str, Any] = {
        kind: points_to_json(
            {
                views: fit_operating_point(out[kind], labels, config.operating)
                for views, out in each.items()
            }
        )
        for kind in KINDS
    }
    outputs = each[config.augment.views]
    judged = {kind: metrics.evaluate(out, labels, patients) for kind, out in outputs.items()}
    with write_atomically(workdir.validation) as file:
        write_rows(file, [["image", "patient", "label", "logit_best", "logit_last"]])
        for e, a, b in zip(held_out, outputs["best"], outputs["latest"], strict=True):
            write_rows(file, [[e.name, e.patient, e.label, float(a), float(b)]])
    summary = {
        "protocol": _protocol(config),
        "train_images": len(data.train),
        "validation_images": len(data.validation),
        "parameters": _parameters(template),
        "epochs": member.history[-1]["epoch"],
        "views": config.augment.views,
        "best_epoch": member.best,
        "best": judged["best"].to_json(),
        "last": judged["latest"].to_json(),
        "rules": _trivial_rules(data),
    }
    workdir.write_config(config)
    write_json(workdir.operating, points)
    write_json(workdir.summary, summary)
    return Result(judged["best"], judged["latest"], data.classes, summary)


def _trivial_rules(data: TrainingData) -> dict[str, float]:
    """Returns what needs no network: accuracy of the larger class, AUC of mean brightness."""
    labels = data.decoded.labels
    brightness = np.array([image.mean() for image in data.decoded.images])

    def area(rows: np.ndarray) -> float:
        return metrics.auc(brightness[rows], labels[rows]) or 0.0

    # Whether brighter means positive is for the training images to say.
    validated = area(data.validation)
    return {
        "majority_accuracy": float(
            np.mean(labels[data.validation] == labels[data.train].mean().round())
        ),
        "brightness_auc": validated if area(data.train) >= 0.5 else 1 - validated,
    }


def _protocol(config: Config) -> str:
    if config.data.validation == "official":
        return f"official val folder, seed {config.seed}"
    kind = {
        "patients": "patient-grouped and class-stratified",
        "blocks": "blocks of the file numbering",
    }[config.data.validation]
    return f"fold {config.data.fold} of {config.data.folds}, {kind}, seed {config.seed}"


def _describe(member: Member, mesh: Mesh) -> None:
    config, data = member.config, member.data
    size = config.data.size
    place = "on the device" if member.resident else "streamed from the cache"
    print(f"split     {_protocol(config)}")
    for name, rows in (("train", data.train), ("validate", data.validation)):
        positive = int(member.labels[rows].sum())
        print(
            f"  {name:<8} {len(rows) - positive:,} {data.classes[0]},"
            f" {positive:,} {data.classes[1]}"
        )
    if config.train.auxiliary:
        viral = data.decoded.viral[data.train]
        known = f"{(viral == 0).sum():,} bacterial, {(viral == 1).sum():,} viral"
        both = {0, 1} <= set(viral)
        idle = "" if both else ": --train.auxiliary has nothing to tell apart"
        print(f"  by name  {known}{idle}")
    print(f"images    {size} x {size}, {data.decoded.images.nbytes / 2**20:,.0f} MiB, {place}")
    print(f"network   {config.model.name}, {_parameters(member.template(mesh)):,} parameters")
    print(f"workdir   {config.workdir}")


def _parameters(state: TrainState) -> int:
    """Counts what the answer takes, so without a second head."""
    return sum(p.size for p in jax.tree.leaves(variables_of(state)["params"]))


def _epoch_line(line: dict[str, Any], config: TrainConfig, speed: float) -> str:
    judged = line["validation"]
    return (
        f"epoch {line['epoch']:>3}/{config.epochs}  loss {line['train']['loss']:.4f}"
        f"  validation: loss {judged['loss']:.4f}  auc {judged['auc']:.4f}"
        f"  accuracy {judged['accuracy']:.4f}  sensitivity {judged['sensitivity']:.4f}"
        f"  specificity {judged['specificity']:.4f}  {speed:,.0f} images/s"
        f"{'  *' if line['best'] else ''}"
    )
