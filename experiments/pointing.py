"""Tests whether heat maps point at the opacity, on phantoms, where its position is known.

    python experiments/pointing.py --run runs/phantom --json pointing.json

A run on phantoms, or a release, makes heat maps of phantoms of new patients. They are compared with
the opacities drawn into the phantoms in two ways. The pointing game of Zhang et al. (IJCV 126,
2018) counts a hit if the maximum of the heat map lies on the opacity or at most a sixteenth of the
image side away from it; `chance` is the share of the image in which the maximum counts as a hit.
The second measure is the mean heat inside the opacity divided by the mean heat outside.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image, ImageFilter

from cnnjax import phantom
from cnnjax.cli import guarded
from cnnjax.config import DeviceConfig
from cnnjax.data.decode import decode
from cnnjax.errors import InputError
from cnnjax.evaluation.explain import make_grad_cam, make_hires_cam, make_occlusion
from cnnjax.evaluation.predict import FEW, Predictor
from cnnjax.lungs import put_back
from cnnjax.machine import devices
from cnnjax.metrics import proportion
from cnnjax.run.workdir import write_json
from cnnjax.steps import variables_of

NEAR = 1 / 16  # tolerance of the pointing game, as a fraction of the image side
_UNSEEN = 1  # seed of the phantoms; `cnnjax phantom` uses seed 0 by default


@dataclass(frozen=True)
class Options:
    """The network, the number of phantoms and the methods."""

    run: Path = Path("runs/phantom")
    """Workdir of a run on phantoms, or folder of a release."""
    images: int = 200
    """Number of phantoms with an opacity, each of another patient."""
    methods: tuple[Literal["hires-cam", "grad-cam", "occlusion"], ...] = (
        "hires-cam",
        "grad-cam",
        "occlusion",
    )
    """Methods that make the heat maps."""
    json: Path | None = None
    """Write the results to this file."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InputError(f"--images must be at least 1, got {self.images}")


def draw(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns phantoms, uint8 [count, size, size], and masks of their opacities, bool."""
    kinds: tuple[phantom.Kind, ...] = ("bacteria", "bacteria", "virus")
    drawn = [phantom.draw(_UNSEEN, i, 0, kinds[i % 3]) for i in range(count)]
    images = np.stack([decode(one.image, size) for one in drawn])
    masks = [Image.fromarray(one.opacity.astype(np.uint8) * 255) for one in drawn]
    return images, np.stack([np.asarray(m.resize((size, size))) > 127 for m in masks])


def score(heat: np.ndarray, opacity: np.ndarray) -> dict[str, Any]:
    """Compares heat maps with the positions of the opacities.

    Args:
        heat: float [n, size, size].
        opacity: bool [n, size, size], masks of the opacities; none may be empty.

    Returns:
        `hits` of the pointing game, `of` n, `hit_rate` and its 95 % interval `ci95`, and `chance`;
        `ratio`: mean heat inside the opacity divided by the mean outside, the median over images.
    """
    n, size, _ = heat.shape
    reach = 2 * round(NEAR * size) + 1
    around = np.stack(
        [
            np.asarray(Image.fromarray(m).convert("L").filter(ImageFilter.MaxFilter(reach))) > 0
            for m in opacity
        ]
    )
    hottest = heat.reshape(n, -1).argmax(1)
    hits = int(around.reshape(n, -1)[np.arange(n), hottest].sum())
    positive = np.maximum(heat, 0)
    inside = (positive * opacity).sum((1, 2)) / opacity.sum((1, 2))
    outside = (positive * ~opacity).sum((1, 2)) / (~opacity).sum((1, 2))
    rate = proportion(hits, n)
    return {
        "hits": hits,
        "of": n,
        "hit_rate": rate.value,
        "ci95": list(rate.ci95 or ()),
        "chance": float(around.mean()),
        "ratio": float(np.median(inside / np.maximum(outside, 1e-12))),
    }


def main() -> int:
    """Reads the flags, evaluates the heat maps, and prints the results; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    predictor = Predictor.open(options.run, devices.make_mesh(options.device))
    images, opacity = draw(options.images, predictor.size)
    framed = predictor.frame(images)
    lungs = predictor.lungs(images) if predictor.framed else None

    makers = {
        "hires-cam": make_hires_cam,
        "grad-cam": make_grad_cam,
        "occlusion": make_occlusion,
    }
    found = {}
    for method in options.methods:
        explain = makers[method](predictor.model)
        maps = [
            np.mean([explain(variables_of(m), jnp.asarray(c)) for m in predictor.members], axis=0)
            for c in np.split(framed.images, range(FEW, len(images), FEW))
        ]
        heat = put_back(np.concatenate(maps), framed.boxes, predictor.size)
        found[method] = score(heat, opacity)
        if lungs is not None:
            heat = np.maximum(heat, 0)
            share = (heat * lungs).sum((1, 2)) / np.maximum(heat.sum((1, 2)), 1e-12)
            found[method]["in_lungs"] = float(share.mean())
    print(f"{predictor.about}, {options.images} phantoms")
    for name, row in found.items():
        low, high = row["ci95"]
        print(
            f"{name:<10} hits {row['hits']} of {row['of']}: {row['hit_rate']:.3f}"
            f" [{low:.3f}, {high:.3f}] (chance {row['chance']:.3f});"
            f" {row['ratio']:.1f} times as hot inside as outside"
            + (f"; {row['in_lungs']:.0%} of the heat in the lungs" if lungs is not None else "")
        )
    if options.json is not None:
        write_json(options.json, {"images": options.images, "methods": found})
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
