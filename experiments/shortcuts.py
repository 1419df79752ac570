"""Measures shortcuts: how well properties unrelated to the lungs predict the class.

    python experiments/shortcuts.py --data DIR --full-resolution DIR --workdir RUN --json FILE

The first part computes the AUC of single numbers: size, shape and colour mode of a file, mean and
standard deviation of its gray levels. The second part trains networks on changed images that do not
show the diagnosis: the border of the image only, and the image after a strong blur. The networks
use the blog post's recipe (`baseline.py`) on a patient-grouped fold for `--epochs`, on standardized
images. Without standardization, blurred images have too little contrast to learn from.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import baseline
import numpy as np
import tyro
from PIL import Image, ImageFilter
from tqdm import tqdm

from cnnjax.cli import guarded
from cnnjax.data.decode import DecodeError, decode
from cnnjax.data.index import Index, read_index
from cnnjax.errors import InputError
from cnnjax.metrics import Estimate, evaluate
from cnnjax.run.workdir import write_json
from cnnjax.train import fit

SIZE = baseline.CONFIG.data.size  # pixels
BORDER = 0.15  # width of the border as a fraction of the side
BLUR = 0.1  # standard deviation as a fraction of the side


@dataclass(frozen=True)
class Options:
    """Data and settings of the study."""

    data: Path
    """Data set: a folder of images."""
    full_resolution: Path | None = None
    """Folder of the same images as published; the AUC of single numbers is computed for it too."""
    workdir: Path = Path("runs/shortcuts")
    """Folder for the changed images and the runs."""
    epochs: int = 8
    """Epochs of each network."""
    json: Path | None = None
    """Write the rows of the table to this file."""
    plot: Path | None = None
    """Write a bar chart to this SVG file."""


def numbers(index: Index) -> dict[str, np.ndarray]:
    """Returns properties of each training image, float64 [n], by name of the property."""
    rows = []
    for example in tqdm(index.split("train"), "reading", unit="image", disable=None):
        encoded = index.source.read(example.name)
        if isinstance(encoded, np.ndarray):
            raise InputError(f"{index.root} holds arrays; shortcuts.py needs image files")
        try:
            opened = Image.open(io.BytesIO(encoded))
            opened.load()
        except OSError:
            raise InputError(f"{index.root}: {example.name} is no image; remove it") from None
        with opened as image:
            width, height = image.size
            gray = np.asarray(image.convert("L"), np.float64)
            rows.append(
                {
                    "width": width,
                    "height": height,
                    "aspect ratio": width / height,
                    "colour mode": image.mode == "RGB",
                    "file size": len(encoded),
                    "bytes per pixel": len(encoded) / (width * height),
                    "mean gray level": gray.mean(),
                    "spread of gray levels": gray.std(),
                }
            )
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def single_numbers(tree: str, root: Path) -> list[dict[str, Any]]:
    """Returns a row for each property with its AUC; an AUC below 0.5 is replaced by 1 - AUC.

    Args:
        tree: what to call the images in the rows.
        root: folder of the images.
    """
    index = read_index(root)
    examples = index.split("train")
    labels = np.array([e.label for e in examples])
    patients = [e.patient for e in examples]
    found = []
    for name, values in numbers(index).items():
        spread = values.std() or 1.0
        area = evaluate((values - values.mean()) / spread, labels, patients).auc
        assert area.value is not None
        turned = area.value < 0.5
        found.append(
            {
                "what": name,
                "images": tree,
                "n": len(labels),
                "auc": 1 - area.value if turned else area.value,
                "ci95": sorted(1 - end if turned else end for end in area.ci95 or ()),
                "higher in": index.classes[0 if turned else 1],
            }
        )
    return found


def border(image: Image.Image) -> Image.Image:
    """Returns the image with everything but the border set to gray."""
    edge = round(BORDER * image.width)
    image = image.copy()
    image.paste(128, (edge, edge, image.width - edge, image.height - edge))
    return image


def blurred(image: Image.Image) -> Image.Image:
    """Returns the image after a strong Gaussian blur."""
    return image.filter(ImageFilter.GaussianBlur(BLUR * image.width))


VIEWS: dict[str, Callable[[Image.Image], Image.Image] | None] = {
    "whole image": None,
    "border": border,
    "blurred": blurred,
}


def view(index: Index, change: Callable[[Image.Image], Image.Image], target: Path) -> None:
    """Writes the changed images of train and val to the folder `target`, unless it exists."""
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    for example in tqdm(index.split("train", "val"), target.name, unit="image", disable=None):
        try:
            image = Image.fromarray(decode(index.source.read(example.name), SIZE))
        except (OSError, DecodeError) as error:
            raise InputError(f"{index.root}: {example.name} {error}; remove it") from None
        to = (partial / example.name).with_suffix(".png")
        to.parent.mkdir(parents=True, exist_ok=True)
        change(image).save(to)
    partial.rename(target)


def networks(options: Options) -> list[dict[str, Any]]:
    """Trains a network on each of `VIEWS`; returns rows with the AUC of its last epoch."""
    found = []
    index = read_index(options.data)
    for name, change in VIEWS.items():
        root = options.data
        if change is not None:
            root = options.workdir / f"view {name}"
            view(index, change, root)
        config = baseline.CONFIG
        result = fit(
            replace(
                config,
                model=replace(config.model, standardize=True),
                workdir=options.workdir / f"run {name}",
                data=replace(config.data, root=str(root)),
                train=replace(config.train, epochs=options.epochs),
            )
        )
        auc = result.last.auc
        row = {"what": f"network, {name}", "images": "held-out fold 0", "n": result.last.n}
        found.append(row | {"auc": auc.value, "ci95": list(auc.ci95 or ())})
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws a bar chart of the AUCs with their 95 % intervals."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "cnnjax"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1 + 0.28 * len(rows)), layout="constrained")
    colors = dict(zip(dict.fromkeys(row["images"] for row in rows), COLORS, strict=False))
    for i, row in enumerate(rows):
        label = row["images"] if row["images"] not in [r["images"] for r in rows[:i]] else None
        axes.barh(i, row["auc"] - 0.5, left=0.5, color=colors[row["images"]], label=label)
        axes.plot(row["ci95"], [i] * len(row["ci95"]), color="black")
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0.5, 1)
    axes.set_xlabel("AUC (0.5: no information), with 95 % interval")
    figure.legend(loc="outside upper center", ncols=len(colors))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


COLORS = ("#0072b2", "#e69f00", "#009e73")


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    rows = []
    if options.full_resolution is not None:
        rows += single_numbers("as published", options.full_resolution)
    small = single_numbers("as given", options.data)
    rows += [row for row in small if row["auc"] > 0.5]  # leave out constants
    rows += networks(options)
    for row in rows:
        print(f"{row['what']:<24} {row['images']:<16} {Estimate(row['auc'], row['ci95'] or None)}")
    if options.json is not None:
        write_json(options.json, {"rows": rows})
    if options.plot is not None:
        draw(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
