"""Compares fine-tuning with training from scratch on few radiographs.

    python experiments/finetune.py --data.root DIR --workdir RUN --json finetune.json

A network was trained at one hospital, and another hospital has 50, 200 or 1,000 radiographs of its
own. Should it fine-tune the network on them, or train one from scratch? The released networks
cannot answer this question, because together they were trained on every patient of train and val.
This script therefore holds out a block of the file numbering (`--data.validation blocks`). A block
differs from the rest of the collection, for example by season or export. The script does the
following:

1. Pretraining: it trains the recipe on the other blocks (RUN/pretrained), or uses the run given as
   `--init`, which must have the same recipe and folds. A run that was trained on an image of the
   block is refused.
2. Split: a third of the block's patients become the test images; the images of the others are
   the pool to train on. Images of the pool that show the same radiograph as a test image are left
   out.
3. Training: for each seed it draws 1,000 images from the pool, with the class shares of the pool.
   The first 200 and the first 50 of them are the smaller sets. On each set it trains two networks:
   one from the weights of step 1, one from scratch. Both take `--steps` steps of the same recipe;
   the learning rate of fine-tuning is a tenth (`--share`). Neither was tuned. Nothing is chosen on
   the test images: the results are those of the last epoch.

It prints AUC and accuracy at probability 0.5 on the test images for each size and for the network
of step 1, and the difference of AUC between fine-tuning and training from scratch. The 95 %
intervals are a bootstrap of both seeds and test patients. The recipe of step 1 was chosen with
knowledge of all blocks, so the absolute values are optimistic; only the differences matter.

The same command resumes a stopped experiment. Hardware: 2 cores of an AMD EPYC (Zen 5), busy
with other work. Step 1 took 3 minutes, the 30 trainings of 3 sizes and 5 seeds 21 minutes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from cnnjax import recipes
from cnnjax.cli import guarded
from cnnjax.config import Config
from cnnjax.data.patients import grouped_folds
from cnnjax.data.prepare import TrainingData, data_of, training_data
from cnnjax.errors import InputError
from cnnjax.evaluation.predict import Predictor
from cnnjax.lungs import as_framed
from cnnjax.machine import devices
from cnnjax.metrics import auc, patient_bootstrap
from cnnjax.run.workdir import Workdir, read_table, write_json
from cnnjax.steps import variables_of
from cnnjax.train import fit

EPOCHS = 10  # number of epochs that the steps of a training are split into
TEST = 1, 3  # 2 of 5 folds of the block's patients are the test images
DRAWS = 1000  # bootstrap samples
ARMS = "fine-tuned", "from scratch"


@dataclass(frozen=True)
class Options:
    """The recipe, and which trainings to compare."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(
        default_factory=lambda: replace(
            recipes.pneumonia,
            workdir=Path("runs/finetune"),
            data=replace(recipes.pneumonia.data, validation="blocks", folds=3),
        )
    )
    init: Path | None = None
    """Workdir of a run that was trained without the block; by default one is trained first."""
    sizes: tuple[int, ...] = (50, 200, 1000)
    """Numbers of training images."""
    seeds: int = 5
    """Number of seeds; each draws other training images and other initial weights."""
    steps: int = 1000
    """Steps of each training."""
    share: float = 0.1
    """Learning rate of fine-tuning, as a fraction of the recipe's learning rate."""
    json: Path | None = None
    """Write the results to this file."""

    def __post_init__(self) -> None:
        if self.config.data.validation == "official":
            raise InputError("--data.validation official holds out no block; give blocks")
        if min(self.sizes, default=0) < 2 or self.seeds < 1:
            raise InputError("--sizes must be at least 2, --seeds at least 1")
        if self.steps < EPOCHS or self.steps % EPOCHS:
            raise InputError(f"--steps must be a multiple of {EPOCHS}, got {self.steps}")
        if not self.share > 0:
            raise InputError(f"--share must be positive, got {self.share}")
        if self.config.train.patience:
            raise InputError(
                "--train.patience lets the test images choose the last epoch; set it to 0"
            )


class Test(NamedTuple):
    """Labels and patient IDs of the n test images."""

    labels: np.ndarray
    """int [n]."""
    patients: list[str]


def compare(options: Options) -> dict[str, Any]:
    """Trains all networks; prints and returns the results."""
    config = options.config
    whole = training_data(config.data, config.seed, print, devices.make_mesh(config.device))
    if len(whole.classes) != 2:
        raise InputError(f"this script needs two classes, and the data have {len(whole.classes)}")
    pretrained = options.init or config.workdir / "pretrained"
    if options.init is None:
        fit(replace(config, workdir=pretrained), data=whole)
    names = [whole.decoded.examples[i].name for i in whole.validation]
    if seen := Workdir(pretrained).trained_on(names):
        raise InputError(
            f"--init {pretrained} was trained on {seen:,} images of the block; give a run with the"
            " same --data.validation, --data.folds and --data.fold"
        )
    mesh = devices.make_mesh(config.device)
    predictor = Predictor.of_run(pretrained, mesh, "latest", views=1)
    weights = variables_of(predictor.members[0])

    pool, test_rows = divide(whole)
    if len(pool) < max(options.sizes):
        raise InputError(
            f"the block has {len(pool):,} images to train on, fewer than --sizes"
            f" {max(options.sizes)}; reduce it, or hold out more with a smaller --data.folds"
        )
    test = Test(whole.labels[test_rows], [whole.decoded.examples[i].patient for i in test_rows])
    print(f"block     {len(pool):,} images to draw from, {len(test_rows):,} to test on")
    as_it_is = predictor.logits(as_framed(np.asarray(whole.decoded.images[test_rows])))
    logits: dict[tuple[int, str], list[np.ndarray]] = {}
    for seed in range(options.seeds):
        order = drawn(whole.labels[pool], max(options.sizes), seed)
        for size in sorted(options.sizes):
            data = few(whole, pool[order[:size]], test_rows, options)
            for arm in ARMS:
                run = training_of(options, size, arm, seed)
                fit(run, data=data, init=weights if arm == ARMS[0] else None)
                rows = read_table(Workdir(run.workdir).validation, ("logit_last",))
                found = np.array([float(row["logit_last"]) for row in rows])
                logits.setdefault((size, arm), []).append(found)
    document = {
        "protocol": f"block {config.data.fold} of {config.data.folds} ({config.data.validation})"
        f" held out from pretraining; {len(test_rows)} test images of {len(set(test.patients))}"
        f" patients; {options.seeds} seeds, {options.steps} steps, last epoch",
        "pool": len(pool),
        "as it is": figures([as_it_is], test),
        "sizes": {
            str(size): {
                **{arm: figures(logits[size, arm], test) for arm in ARMS},
                "gain": gain(logits[size, ARMS[0]], logits[size, ARMS[1]], test),
            }
            for size in sorted(options.sizes)
        },
    }
    show(document)
    return document


def divide(whole: TrainingData) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the block for training and for testing; no patient is in both."""
    block = whole.validation
    examples = [whole.decoded.examples[i] for i in block]
    tested = grouped_folds(examples, TEST[1], 0) < TEST[0]
    of_test = {e.name for e, tests in zip(examples, tested, strict=True) if tests}
    twins = {
        name
        for pair in whole.duplicates
        for name, other in (
            (pair.image.name, pair.like.name),
            (pair.like.name, pair.image.name),
        )
        if other in of_test
    }
    kept = np.array([e.name not in twins for e in examples])
    return block[~tested & kept], block[tested]


def drawn(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws `count` images in a random order; every prefix has about the class shares of `labels`.

    Args:
        labels: int [n], 0 or 1, labels of the images to draw from.
        count: number of images to draw, at most n.
        seed: seed of the order.

    Returns:
        int [count], indices among the n images.
    """
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))
    for label in (0, 1):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(place, kind="stable")[:count]


def few(whole: TrainingData, train: np.ndarray, test: np.ndarray, options: Options) -> TrainingData:
    """Returns the data of one training; the training images are repeated to fill an epoch."""
    repeated = np.resize(train, options.steps // EPOCHS * options.config.train.batch)
    rows = np.concatenate([repeated, test])
    examples = [whole.decoded.examples[i] for i in rows]
    return data_of(
        np.asarray(whole.decoded.images[rows]),
        whole.labels[rows],
        np.arange(len(rows)) >= len(repeated),
        whole.classes,
        patients=[e.patient for e in examples],
        names=[f"{i}/{e.name}" for i, e in enumerate(examples)],
    )


def training_of(options: Options, size: int, arm: str, seed: int) -> Config:
    """Returns the config of one training."""
    config = options.config
    rate = config.train.learning_rate * (options.share if arm == ARMS[0] else 1)
    return replace(
        config,
        workdir=config.workdir / arm.replace(" ", "-") / f"{size}-{seed}",
        seed=seed,
        train=replace(config.train, epochs=EPOCHS, learning_rate=rate, auxiliary=0.0),
    )


def figures(logits: list[np.ndarray], test: Test) -> dict[str, Any]:
    """Returns AUC and accuracy: the mean over seeds, the 95 % interval, and all values."""
    return {
        "auc": estimate(lambda rows: [area(x, test, rows) for x in logits], test),
        "accuracy": estimate(lambda rows: [accuracy(x, test, rows) for x in logits], test),
    }


def gain(tuned: list[np.ndarray], scratch: list[np.ndarray], test: Test) -> dict[str, Any]:
    """Returns the AUC of `tuned` minus that of `scratch`, paired by seed; see `estimate`."""

    def differences(rows: np.ndarray) -> list[float]:
        return [
            area(a, test, rows) - area(b, test, rows) for a, b in zip(tuned, scratch, strict=True)
        ]

    return {"auc": estimate(differences, test)}


def area(logits: np.ndarray, test: Test, rows: np.ndarray) -> float:
    """Returns the AUC on some of the test images; NaN if they lack a class."""
    found = auc(logits[rows], test.labels[rows])
    return float("nan") if found is None else found


def accuracy(logits: np.ndarray, test: Test, rows: np.ndarray) -> float:
    """Returns the accuracy at probability 0.5 on some of the test images."""
    return float(np.mean((logits[rows] >= 0) == (test.labels[rows] == 1)))


def estimate(values: Any, test: Test) -> dict[str, Any]:
    """Returns the mean over seeds of a metric, its 95 % interval, and the value of each seed.

    The interval is a bootstrap that resamples both test patients and seeds.

    Args:
        values: function from rows of test images to the metric of each seed.
        test: the test images.
    """
    each = values(np.arange(len(test.labels)))
    rng = np.random.default_rng(0)
    draws = [
        np.mean(rng.choice(values(np.repeat(np.arange(len(times)), times.astype(int))), len(each)))
        for some in patient_bootstrap(test.patients, DRAWS)
        for times in some
    ]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return {"value": float(np.mean(each)), "ci95": [float(low), float(high)], "seeds": each}


def show(document: dict[str, Any]) -> None:
    """Prints the table."""

    def cell(found: dict[str, Any], sign: str = "") -> str:
        low, high = found["ci95"]
        return f"{found['value']:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"

    print(f"\n{document['protocol']}; with 95 % intervals")
    print(f"{'images':>6}  {'network':<12}  {'AUC':<24}  {'accuracy at 0.5':<24}")
    found = document["as it is"]
    print(f"{0:>6}  {'as it is':<12}  {cell(found['auc'])}  {cell(found['accuracy'])}")
    for size, row in document["sizes"].items():
        for arm in ARMS:
            print(f"{size:>6}  {arm:<12}  {cell(row[arm]['auc'])}  {cell(row[arm]['accuracy'])}")
        print(f"{size:>6}  {'difference':<12}  {cell(row['gain']['auc'], '+')}")


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    document = compare(options)
    if options.json is not None:
        write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
