"""Trains the lung finder and evaluates it on held-out patients.

    python experiments/lungs.py --data chest_xray --outlines lung_masks --out lungs.npz

Hardware: 2 cores of an AMD EPYC (Zen 3). An epoch takes half a minute, the training ten minutes. On
908 images of held-out patients, the Dice coefficient is 0.941; see docs/lungs.md for more results.

The lung outlines were annotated by people (V7 Labs' covid-19-xray-dataset, CC BY 4.0).
`masks_128.npz` holds `names` and packed `masks`; `masks.csv` holds the sizes of the published
files. The training set also contains phantoms with their known lungs, and synthetic pictures
without lungs, which teach the finder to report none. The fold of patients that `--data.fold 0` of a
recipe holds out is not used for training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from cnnjax import lungs, phantom
from cnnjax.augment import make_augment
from cnnjax.cli import guarded
from cnnjax.config import AugmentConfig, DeviceConfig, TrainConfig
from cnnjax.data import cache
from cnnjax.data.batches import Feeder, step_rows
from cnnjax.data.decode import decode
from cnnjax.data.examples import Example
from cnnjax.data.index import read_index
from cnnjax.data.names import IMAGE_SUFFIXES
from cnnjax.data.patients import grouped_folds
from cnnjax.errors import InputError
from cnnjax.evaluation.rerender import (
    RENDERINGS,
    SIZE,
    UNKNOWN,
    box_of,
    read_facts,
    read_masks,
    render,
    rerender_mask,
)
from cnnjax.machine import devices
from cnnjax.networks import LungFinder
from cnnjax.networks.variables import flatten
from cnnjax.objectives import Segmentation
from cnnjax.optimizers import make_optimizer
from cnnjax.run.workdir import write_json
from cnnjax.steps import init_state, make_train_step, variables_of
from cnnjax.train import compile_steps, take_epoch

AUGMENT = AugmentConfig(
    shear=4,
    zoom=0.4,
    rotate=10,
    shift=0.08,
    flip=True,
    black=0.5,
    contrast=0.5,
    brightness=0.25,
    crop=0.4,
    gamma=0.8,
    sharpness=1.0,
    noise=0.06,
)

PHANTOMS, EMPTY = 400, 900  # numbers of phantoms and of synthetic pictures without lungs


@dataclass(frozen=True)
class Options:
    """Data and settings of the training."""

    data: Path
    """Data set of radiographs with the splits train and val."""
    outlines: Path
    """Folder of the lung outlines of these radiographs."""
    out: Path = lungs.SHIPPED
    """Output file of the weights; by default the one in the package."""
    others: Path | None = None
    """Folder of pictures that are not chest radiographs; the share in which no lungs are found is
    printed."""
    json: Path | None = None
    """Write the results to this file."""
    epochs: int = 20
    """Number of epochs."""
    width: int = 16
    """Number of channels at the highest resolution."""
    seed: int = 0
    """Seed of the folds, the weights, the order of images and the augmentation."""


def train(options: Options) -> None:
    """Trains the lung finder, writes its weights, and evaluates it on held-out patients."""
    mesh = devices.make_mesh(DeviceConfig())
    index = read_index(options.data)
    examples = index.split("train", "val")
    films = cache.load(examples, index.source, SIZE)
    masks = outlines_of(options.outlines, films.examples)
    drawn = np.array([mask is not None for mask in masks])
    folds = grouped_folds(films.examples, 5, options.seed)
    rows = np.flatnonzero(drawn & (folds != 0))
    print(f"{drawn.sum():,} outlines, {len(rows):,} to train on, {mesh.size} devices")

    rng = np.random.default_rng(options.seed)
    images = [decode(np.asarray(films.images[i]), lungs.SIDE) for i in rows]
    maps = [shrunk(masks[i]) for i in rows]
    for patient in range(PHANTOMS):
        one = phantom.draw(options.seed + 1, patient, 0, get_args(phantom.Kind)[patient % 3])
        images.append(decode(one.image, lungs.SIDE))
        maps.append(shrunk(one.lungs))
    images += [empty_picture(rng, i) for i in range(EMPTY)]
    maps += [np.zeros((lungs.SIDE, lungs.SIDE), np.uint8)] * EMPTY

    config = TrainConfig(
        epochs=options.epochs,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.01,
        schedule="cosine",
        ema=0.98,
    )
    model = LungFinder(options.width)
    every = np.arange(len(images))
    steps_per_epoch = -(-len(every) // config.batch)
    optimizer, _ = make_optimizer(config, steps_per_epoch)
    step = make_train_step(
        model, optimizer, make_augment(AUGMENT), Segmentation(), ema_decay=config.ema
    )
    steps = compile_steps(mesh, step)
    feeder = Feeder(np.stack(images), np.stack(maps), mesh, 2**14)
    init_key, order_key, step_key = jax.random.split(jax.random.key(options.seed), 3)
    new = jax.jit(
        lambda key: init_state(model, optimizer, key, lungs.SIDE, ema=True),
        out_shardings=devices.replicated(mesh),
    )
    state = new(init_key)
    size = sum(x.size for x in jax.tree.leaves(state.params))
    print(f"{size:,} parameters, {len(every):,} pictures")
    with tqdm(total=options.epochs * len(every), unit="image", disable=None) as bar:
        for epoch in range(options.epochs):
            numbers = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
            order = step_rows(order_key, numbers, every, config.batch)
            state, sums = take_epoch(state, steps, feeder, order, step_key, bar)
            bar.write(f"epoch {epoch + 1:>3}  loss {sums['loss']:.4f}  Dice {sums['accuracy']:.3f}")

    variables = jax.device_get(variables_of(state))
    halves = jax.tree.map(lambda x: np.asarray(x, np.float16), variables)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("wb") as file:
        np.savez_compressed(file, **flatten(halves))
    print(f"written to {options.out}")

    judged = np.flatnonzero(folds == 0)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), halves)
    found = judge(options, rounded, films, masks, judged)
    if options.json is not None:
        write_json(options.json, {"parameters": size, "epochs": options.epochs} | found)


def outlines_of(folder: Path, examples: Sequence[Example]) -> list[np.ndarray | None]:
    """Returns the lung mask, bool [224, 224], of each image; None for images without an outline."""
    names, masks = read_masks(folder)
    place = {name: i for i, name in enumerate(names)}
    found: list[np.ndarray | None] = []
    for example in examples:
        i = place.get(PurePosixPath(example.name).name)
        if i is None:
            found.append(None)
            continue
        mask = Image.fromarray(masks[i].astype(np.uint8) * 255)
        found.append(np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) > 127)
    return found


def shrunk(mask: np.ndarray | None) -> np.ndarray:
    """Returns a mask resized to uint8 [SIDE, SIDE], 255 in the lungs."""
    assert mask is not None
    return decode(mask.astype(np.uint8) * 255, lungs.SIDE)


def empty_picture(rng: np.random.Generator, kind: int) -> np.ndarray:
    """Draws a picture without lungs, uint8 [SIDE, SIDE]: uniform, gradient, shapes or noise."""
    side = lungs.SIDE
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    if kind % 6 == 0:
        picture = rng.uniform(0, 255) + rng.normal(0, rng.uniform(0, 5), (side, side))
    elif kind % 6 == 1:
        coarse = rng.random((n := int(rng.integers(2, 40)), n)) * 255
        small = Image.fromarray(coarse.astype(np.uint8))
        picture = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), float)
    elif kind % 6 == 2:
        slope = rng.normal(size=2)
        picture = 127 + 120 * np.tanh(slope[0] * rows + slope[1] * columns)
    elif kind % 6 == 3:
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
        frequency[0, 0] = 1
        noise = np.fft.fft2(rng.normal(size=(side, side))) / frequency ** rng.uniform(0.5, 2.5)
        clouds = np.real(np.fft.ifft2(noise))
        clouds = (clouds - clouds.mean()) / clouds.std()
        picture = clouds * rng.uniform(20, 70) + rng.uniform(60, 190)
    else:
        picture = np.full((side, side), rng.uniform(0, 255))
        for _ in range(int(rng.integers(1, 12))):
            y, x = rng.uniform(-0.5, 0.5, 2)
            height, width = rng.uniform(0.02, 0.4, 2)
            turn = rng.uniform(0, np.pi)
            u = (rows - y) * np.cos(turn) + (columns - x) * np.sin(turn)
            v = (columns - x) * np.cos(turn) - (rows - y) * np.sin(turn)
            square = (abs(u) < height) & (abs(v) < width)
            round_ = (u / height) ** 2 + (v / width) ** 2 < 1
            shade = 1 - 0.5 * np.clip(np.hypot(u, v) / max(height, width), 0, 1)
            level = rng.uniform(0, 255) * (shade if rng.random() < 0.5 else 1)
            picture = np.where(square if rng.random() < 0.5 else round_, level, picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


def judge(
    options: Options,
    variables: Any,
    films: cache.Decoded,
    masks: list[np.ndarray | None],
    rows: np.ndarray,
) -> dict[str, object]:
    """Evaluates the lung finder on held-out patients: original images and each rendering.

    Prints and returns the Dice coefficient and the error of the boxes.

    Args:
        options: the options of the script.
        variables: the weights of the lung finder.
        films: the decoded images.
        masks: the lung mask of each image, or None; see `outlines_of`.
        rows: the rows of the held-out images.

    Returns:
        The results by name of the rendering, as plain JSON.
    """
    maps = jax.jit(lungs.lung_maps)
    tell = jax.jit(lambda p: (lungs.lung_boxes(p), lungs.lungs_found(p)))
    facts = read_facts(options.outlines)
    names = [films.examples[i].name for i in rows]

    def look(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = []
        for start in range(0, len(images), 64):
            some = images[start : start + 64]
            filled = np.pad(some, ((0, 64 - len(some)), (0, 0), (0, 0)))
            probabilities = maps(variables, jnp.asarray(filled))
            parts.append(
                [np.asarray(x)[: len(some)] for x in (probabilities, *tell(probabilities))]
            )
        whole, boxes, found = (np.concatenate(x) for x in zip(*parts, strict=True))
        return whole, boxes, found

    def compare(images: np.ndarray, truth: list[np.ndarray]) -> dict[str, float]:
        probabilities, boxes, found = look(images)
        dice, off = [], []
        for p, box, mask in zip(probabilities, boxes, truth, strict=True):
            ours = np.asarray(Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            both = int((mask & (ours > 0.5)).sum())
            dice.append(2 * both / max(1, int(mask.sum()) + int((ours > 0.5).sum())))
            off.append(np.abs(np.array(box_of(mask) or (0, 0, 1, 1)) - box))
        worst = np.max(off, axis=1)
        return {
            "images": len(truth),
            "dice": float(np.mean(dice)),
            "dice_5_percent": float(np.quantile(dice, 0.05)),
            "box_within_4_percent": float((worst < 0.04).mean()),
            "box_error_95_percent": float(np.quantile(worst, 0.95)),
            "flagged": float((~found).mean()),
        }

    held_out = np.asarray(films.images[rows])
    figures: dict[str, object] = {}
    print(f"\n{'rendering':<20}{'images':>8}{'Dice':>8}{'5 %':>8}{'box':>8}{'flagged':>9}")

    def show(name: str, found: dict[str, float]) -> None:
        figures[name] = found
        print(
            f"{name:<20}{found['images']:>8}{found['dice']:>8.3f}{found['dice_5_percent']:>8.3f}"
            f"{found['box_within_4_percent']:>8.3f}{found['flagged']:>9.4f}"
        )

    has = [k for k, i in enumerate(rows) if masks[i] is not None]
    show("as they are", compare(held_out[has], [m for i in rows if (m := masks[i]) is not None]))
    for name in RENDERINGS:
        images, at = render(held_out, names, name, facts)
        chosen, truth = [], []
        for k, i in enumerate(at):
            mask, known = masks[rows[i]], facts.get(PurePosixPath(names[i]).name, UNKNOWN)
            moved = None if mask is None else rerender_mask(mask, name, names[i], known)
            if moved is not None:
                chosen.append(k)
                truth.append(moved)
        show(name, compare(images[chosen], truth))
    flagged = 1 - look(held_out)[2].mean()
    print(f"no lungs found in {flagged:.2%} of {len(rows):,} held-out images")
    figures["flagged_held_out"] = float(flagged)
    if options.others is not None:
        files = sorted(p for p in options.others.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise InputError(f"--others {options.others} holds no pictures")
        pictures = np.stack([decode(p.read_bytes(), lungs.FILM) for p in files])
        found = look(pictures)[2]
        print(f"no lungs found in {1 - found.mean():.2%} of {len(files):,} other pictures")
        print(
            "  lungs found in: " + ", ".join(p.name for p, f in zip(files, found, strict=True) if f)
        )
        figures["others"] = {"pictures": len(files), "flagged": float(1 - found.mean())}
    return figures


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    train(tyro.cli(Options, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
