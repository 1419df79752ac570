"""Training, from a config to a run on disk; the only place with side effects while training.

Read `fit` from top to bottom. Everything that decides the outcome is a function of (config, data,
seed): the loop holds no state but `state` and the history in `metrics.jsonl`, so that a run which
is stopped and started again goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from cnnjax import devices, metrics
from cnnjax.augment import make_augment
from cnnjax.checkpoint import Checkpoints, template_of
from cnnjax.config import Config, Precision, TrainConfig
from cnnjax.data.batches import Feeder, Resident, epoch_rows, load
from cnnjax.data.cache import write_quarantine
from cnnjax.data.files import write_atomically
from cnnjax.data.patients import write_split
from cnnjax.data.prepare import TrainingData, training_data
from cnnjax.errors import InputError
from cnnjax.models import make_model
from cnnjax.operating import fit_operating_point
from cnnjax.predict import Logits, make_logits
from cnnjax.steps import (
    Batch,
    Metrics,
    TrainState,
    TrainStep,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)
from cnnjax.workdir import Workdir, append_line, claim, write_json

# One key each; a new purpose takes the next number and never a used one.
_INIT, _ORDER, _STEP = range(3)

_LOOK = 16  # steps between looks at the loss, each of which waits for the device

# Steps in one call of the device. A step of a small network takes an accelerator less time than
# calling it takes Python; a CPU's takes more, and XLA's convolutions are slow in its loops there.
TOGETHER = {"cpu": 1, "gpu": _LOOK, "tpu": _LOOK}


@dataclass(frozen=True)
class Result:
    """What a finished run comes to; `summary.json` holds the same."""

    best: metrics.Evaluation
    """The best checkpoint on the images that chose it, so a little optimistic."""
    last: metrics.Evaluation
    """The last epoch on the same images, which chose nothing of it."""
    classes: tuple[str, str]
    summary: dict[str, Any]


def fit(config: Config) -> Result:
    """Trains the config's network on the config's data, or goes on where its workdir stopped.

    Prints what it uses and a line for each epoch; leaves in the workdir what
    `cnnjax.workdir.Workdir` lists.

    Raises:
        InputError: the data, the devices or the workdir cannot serve, or the loss is not finite.
    """
    mesh = devices.make_mesh(config.device)
    config = _with_precision(config, mesh)
    with claim(config) as workdir:
        print(f"cnnjax    {version('cnnjax')} on jax {jax.__version__}, flax {version('flax')}")
        print(f"devices   {devices.describe(mesh)}")
        data = training_data(config.data, config.seed, print)
        workdir.claim_data(data.decoded.fingerprint, data.classes)
        write_split(workdir.split, data.decoded.examples, data.held_out)
        write_quarantine(workdir.quarantine, data.decoded.quarantine)
        return _train(config, data, mesh, workdir)


def _with_precision(config: Config, mesh: Mesh) -> Config:
    """Settles `--train.precision auto`: a run keeps what it began with, on whatever device."""
    if config.train.precision != "auto":
        return config
    begun = Workdir(config.workdir)
    precision: Precision = "float32" if devices.platform(mesh) == "cpu" else "bfloat16"
    if begun.config.exists():
        precision = begun.read_config().train.precision
    return replace(config, train=replace(config.train, precision=precision))


def _train(config: Config, data: TrainingData, mesh: Mesh, workdir: Workdir) -> Result:
    key = jax.random.key(config.seed)
    init_key, order_key, step_key = (jax.random.fold_in(key, k) for k in (_INIT, _ORDER, _STEP))
    labels = data.decoded.labels
    rows = data.train
    steps_per_epoch = math.ceil(len(rows) / config.train.batch)

    model = make_model(config.model, jnp.dtype(config.train.precision))
    optimizer, learning_rate = make_optimizer(config.train, steps_per_epoch)
    train_step = make_train_step(
        model,
        optimizer,
        make_augment(config.augment),
        class_weights=class_weights_of(labels[rows]) if config.train.class_weights else (1.0, 1.0),
        label_smoothing=config.train.label_smoothing,
        mixup=config.train.mixup,
        ema_decay=config.train.ema,
    )
    everywhere = devices.replicated(mesh)
    state = jax.jit(
        lambda key: init_state(model, optimizer, key, config.data.size, ema=bool(config.train.ema)),
        out_shardings=everywhere,
    )(init_key)
    step_key = jax.device_put(step_key, everywhere)
    steps = compile_steps(mesh, train_step)
    logits = make_logits(make_eval_step(model), mesh)
    feeder = Feeder(data.decoded.images, labels, mesh, config.data.resident_mib)
    _describe(config, data, state, feeder)

    checkpoints = Checkpoints(workdir.checkpoints)
    done = checkpoints.epoch("latest") or 0
    history = workdir.read_history(done)
    if done:
        state = checkpoints.restore("latest", template_of(state, everywhere))
        print(f"resuming after epoch {done}")

    bar = tqdm(
        total=config.train.epochs * len(rows),
        initial=done * len(rows),
        unit="image",
        unit_scale=True,
        disable=None,
        dynamic_ncols=True,
    )
    with bar:
        for epoch in range(done + 1, config.train.epochs + 1):
            if _out_of_patience(history, config.train):
                bar.write(f"no better checkpoint in {config.train.patience} epochs: stopping early")
                break
            start = time.perf_counter()
            order = epoch_rows(order_key, epoch, rows, config.train.batch)
            bar.set_description(f"epoch {epoch}/{config.train.epochs}")
            with _profiled(config.profile if epoch == min(done + 2, config.train.epochs) else None):
                state, trained = _epoch(state, steps, feeder, order, step_key, bar)
            if not math.isfinite(trained["loss"]):
                raise InputError(
                    f"the loss is {trained['loss']} in epoch {epoch}; lower --train.learning-rate"
                    f" or set --train.clip-norm (the run is kept as of epoch {epoch - 1})"
                )
            middle = time.perf_counter()
            judged = _validate(logits(state, feeder, data.validation), labels[data.validation])
            score = _score(judged, config.train)
            better = all(score > _score(past["validation"], config.train) for past in history)
            line = {
                "epoch": epoch,
                "step": epoch * steps_per_epoch,
                "learning_rate": float(learning_rate(epoch * steps_per_epoch - 1)),
                "train": trained,
                "validation": judged,
                "best": better,
            }
            history.append(line)
            end = time.perf_counter()
            # First the line, then the states: a line without its state is dropped on a resume.
            append_line(workdir.metrics, line)
            if better:
                checkpoints.save("best", epoch, state)
            checkpoints.save("latest", epoch, state)
            append_line(
                workdir.throughput,
                {
                    "epoch": epoch,
                    "train_seconds": middle - start,
                    "validation_seconds": end - middle,
                    "images_per_second": len(rows) / (middle - start),
                },
            )
            bar.write(_epoch_line(line, config.train, len(rows) / (middle - start)))
    result = _conclude(config, data, workdir, state, checkpoints, logits, feeder, history)
    checkpoints.close()
    return result


class Steps(NamedTuple):
    """The compiled train step, (state, data, feed, key) -> (state, metrics)."""

    one: Any
    many: Any
    """The same for a feed of `together` steps at once."""
    together: int


def compile_steps(mesh: Mesh, train_step: TrainStep) -> Steps:
    """Returns what the loop calls: the step on a mesh, with the batch fetched inside it."""

    def one(
        state: TrainState, data: Resident | None, feed: Batch | jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return train_step(state, load(data, feed), key)

    def many(
        state: TrainState, data: Resident, feeds: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, feed: one(state, data, feed, key), state, feeds)

    options: Any = {"donate_argnames": "state", "out_shardings": devices.replicated(mesh)}
    together = TOGETHER[devices.platform(mesh)]
    return Steps(jax.jit(one, **options), jax.jit(many, **options), together)


def _epoch(
    state: TrainState,
    steps: Steps,
    feeder: Feeder,
    order: np.ndarray,
    key: jax.Array,
    bar: tqdm[Any],
) -> tuple[TrainState, dict[str, float]]:
    """Takes the steps of one epoch; returns the state and the mean loss and accuracy over it."""
    resident = feeder.data is not None and steps.together > 1
    fused = len(order) // steps.together * steps.together if resident else 0
    calls = itertools.chain(
        ((steps.many, feed) for feed in feeder.feed_together(order[:fused], steps.together)),
        ((steps.one, feed) for feed in feeder.feed(order[fused:])),
    )
    sums: list[Metrics] = []
    taken = looked = 0
    for step, feed in calls:
        state, step_sums = step(state, feeder.data, feed, key)
        sums.append(step_sums)
        taken += step_sums.loss.size
        if taken - looked >= _LOOK or taken == len(order):
            last = jax.device_get(step_sums)
            loss = np.sum(last.loss) / np.sum(last.images)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(int((order[looked:taken] >= 0).sum()))
            looked = taken
    sums = jax.device_get(sums)
    totals = Metrics(
        *(np.sum([np.sum(x, dtype=np.float64) for x in part]) for part in zip(*sums, strict=True))
    )
    return state, {
        "loss": float(totals.loss / totals.images),
        "accuracy": float(totals.correct / totals.images),
    }


@contextlib.contextmanager
def _profiled(folder: Path | None) -> Iterator[None]:
    """Writes a trace of what the block does, if there is a folder for it."""
    if folder is None:
        yield
        return
    try:
        with jax.profiler.trace(str(folder)):
            yield
    except OSError as error:
        raise InputError(f"--profile {folder}: {error.strerror or error}") from None


def _validate(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the metrics that each epoch is followed by; intervals wait for the end."""
    logits = logits.astype(np.float64)
    positive, decided = labels == 1, logits >= 0
    area = metrics.auc(logits, labels)
    assert area is not None, "training_data() sees to it that both classes validate"
    return {
        "loss": float(np.mean(np.logaddexp(0, np.where(positive, -logits, logits)))),
        "auc": area,
        "accuracy": float(np.mean(decided == positive)),
        "sensitivity": float(np.mean(decided[positive])),
        "specificity": float(np.mean(~decided[~positive])),
    }


def _score(judged: dict[str, float], config: TrainConfig) -> float:
    """Returns the number that is highest at the best epoch."""
    return -judged["loss"] if config.best == "loss" else judged[config.best]


def _out_of_patience(history: list[dict[str, Any]], config: TrainConfig) -> bool:
    best = max((line["epoch"] for line in history if line["best"]), default=0)
    return bool(config.patience and history and history[-1]["epoch"] - best >= config.patience)


def class_weights_of(labels: np.ndarray) -> tuple[float, float]:
    """Returns n / (2 n_c) for each label c, so that both classes weigh the same in sum."""
    n = len(labels)
    positive = int(labels.sum())
    return n / (2 * (n - positive)), n / (2 * positive)


def _conclude(
    config: Config,
    data: TrainingData,
    workdir: Workdir,
    last: TrainState,
    checkpoints: Checkpoints,
    logits: Logits,
    feeder: Feeder,
    history: list[dict[str, Any]],
) -> Result:
    """Judges the best and the last state with intervals, and writes what remains of the run."""
    held_out = [data.decoded.examples[i] for i in data.validation]
    labels = data.decoded.labels[data.validation]
    patients = [e.patient for e in held_out]
    template = template_of(last, devices.replicated(feeder.mesh))
    best = checkpoints.restore("best", template)
    outputs = {
        "best": logits(best, feeder, data.validation),
        "last": logits(last, feeder, data.validation),
    }
    points = {
        kind: fit_operating_point(outputs[name], labels, config.operating)
        for kind, name in (("best", "best"), ("latest", "last"))
    }
    judged = {kind: metrics.evaluate(out, labels, patients) for kind, out in outputs.items()}
    with write_atomically(workdir.validation) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "patient", "label", "logit_best", "logit_last"])
        for example, a, b in zip(held_out, outputs["best"], outputs["last"], strict=True):
            table.writerow([example.name, example.patient, example.label, float(a), float(b)])
    summary = {
        "protocol": _protocol(config),
        "train_images": len(data.train),
        "validation_images": len(data.validation),
        "parameters": _parameters(last),
        "epochs": history[-1]["epoch"],
        "best_epoch": max(line["epoch"] for line in history if line["best"]),
        "best": judged["best"].to_json(),
        "last": judged["last"].to_json(),
        "rules": _trivial_rules(data),
    }
    write_json(workdir.operating, {kind: point.to_json() for kind, point in points.items()})
    write_json(workdir.summary, summary)
    return Result(judged["best"], judged["last"], data.classes, summary)


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


def _describe(config: Config, data: TrainingData, state: TrainState, feeder: Feeder) -> None:
    labels = data.decoded.labels
    size = config.data.size
    place = "on the device" if feeder.data is not None else "streamed from the cache"
    print(f"split     {_protocol(config)}")
    for name, rows in (("train", data.train), ("validate", data.validation)):
        positive = int(labels[rows].sum())
        print(
            f"  {name:<8} {len(rows) - positive:,} {data.classes[0]},"
            f" {positive:,} {data.classes[1]}"
        )
    print(f"images    {size} x {size}, {data.decoded.images.nbytes / 2**20:,.0f} MiB, {place}")
    print(f"network   {config.model.name}, {_parameters(state):,} parameters")
    print(f"workdir   {config.workdir}")


def _parameters(state: TrainState) -> int:
    return sum(p.size for p in jax.tree.leaves(state.params))


def _epoch_line(line: dict[str, Any], config: TrainConfig, speed: float) -> str:
    judged = line["validation"]
    return (
        f"epoch {line['epoch']:>3}/{config.epochs}  loss {line['train']['loss']:.4f}"
        f"  validation: loss {judged['loss']:.4f}  auc {judged['auc']:.4f}"
        f"  accuracy {judged['accuracy']:.4f}  sensitivity {judged['sensitivity']:.4f}"
        f"  specificity {judged['specificity']:.4f}  {speed:,.0f} images/s"
        f"{'  *' if line['best'] else ''}"
    )
