"""Does the heat fall on the opacity? On phantoms the place is known, as it was drawn.

    python experiments/pointing.py --run runs/phantom --json pointing.json

Phantoms of patients that no run has seen are judged by a run on phantoms, or by a release, and the
heat of each is held against the opacity that was drawn into it: the pointing game of Zhang et al.
(IJCV 126, 2018), a hit where the hottest pixel lies on the opacity or at most a sixteenth of the
side beside it; and the mean heat inside over that outside. `chance` is the share of the image that
a hit may lie in.
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

NEAR = 1 / 16  # of the side
_UNSEEN = 1  # seed of the population; the default tree is of seed 0


@dataclass(frozen=True)
class Options:
    """Which network, on how many phantoms."""

    run: Path = Path("runs/phantom")
    """Workdir of a run on phantoms, or a folder with a release."""
    images: int = 200
    """Phantoms with an opacity, each of another patient."""
    methods: tuple[Literal["hires-cam", "grad-cam", "occlusion"], ...] = (
        "hires-cam",
        "grad-cam",
        "occlusion",
    )
    """What makes the heat."""
    json: Path | None = None
    """Write what is found to this file."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InputError(f"--images must be at least 1, got {self.images}")


def draw(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 and bool [count, size, size]: phantoms and where their opacities are."""
    kinds: tuple[phantom.Kind, ...] = ("bacteria", "bacteria", "virus")
    drawn = [phantom.draw(_UNSEEN, i, 0, kinds[i % 3]) for i in range(count)]
    images = np.stack([decode(one.image, size) for one in drawn])
    masks = [Image.fromarray(one.opacity.astype(np.uint8) * 255) for one in drawn]
    return images, np.stack([np.asarray(m.resize((size, size))) > 127 for m in masks])


def score(heat: np.ndarray, opacity: np.ndarray) -> dict[str, Any]:
    """Holds maps of heat against where the opacities are.

    Args:
        heat: float [n, size, size].
        opacity: bool [n, size, size], each somewhere true.

    Returns:
        `hits`, `of` and `hit_rate` with its 95 % interval; `chance`; `ratio`, the median over
        images of the mean heat inside over that outside.
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
    """Reads the flags, judges, prints; returns the exit status."""
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
