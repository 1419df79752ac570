"""Effect of bfloat16 on quality: trains a recipe in both precisions, with several seeds.

    python -m benchmarks.precision --data chest_xray --json precision.json

Each seed has its own split, initial weights and order of images, which the two precisions share.
Compare the difference within a seed with the spread between seeds. Metrics are those of the last
epoch on the held-out fold.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.measure import circumstances, headline, print_table, recipe_of, write_json
from cnnjax.cli import guarded
from cnnjax.config import DeviceConfig
from cnnjax.errors import InputError
from cnnjax.train import fit


@dataclass(frozen=True)
class Options:
    """What is trained."""

    data: str = "phantom"
    """A tree of images, or the word `phantom`."""
    recipe: Literal["baseline", "pneumonia"] = "pneumonia"
    """Recipe to train."""
    epochs: int | None = None
    """Number of epochs; by default that of the recipe."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each is trained once in each precision."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Platform to compute on."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("--seeds needs at least one number")


def measure(options: Options, scratch: Path) -> list[dict[str, Any]]:
    """Trains with each seed and precision; returns a row for each."""
    recipe = recipe_of(options.recipe)
    epochs = recipe.train.epochs if options.epochs is None else options.epochs
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for precision in ("float32", "bfloat16"):
            start = time.perf_counter()
            result = fit(
                replace(
                    recipe,
                    workdir=scratch / f"{precision}-{seed}",
                    seed=seed,
                    data=replace(recipe.data, root=options.data),
                    train=replace(recipe.train, precision=precision, epochs=epochs),
                    device=DeviceConfig(options.device),
                )
            )
            rows.append(
                {
                    "recipe": options.recipe,
                    "data": Path(options.data).name,
                    "epochs": epochs,
                    "precision": precision,
                    "seed": seed,
                    "auc": result.last.auc.value,
                    "accuracy": result.summary["at_0.5"]["last"]["accuracy"],
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean, lowest and highest AUC and accuracy over the seeds, for each precision."""
    found = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        mine = [row for row in rows if row["precision"] == precision]
        line = {"precision": precision, "seeds": len(mine)}
        for metric in ("auc", "accuracy"):
            values = [row[metric] for row in mine]
            line[metric] = float(np.mean(values))
            line[f"{metric} range"] = f"{min(values):.4f} to {max(values):.4f}"
        line["seconds"] = float(np.median([row["seconds"] for row in mine]))
        found.append(line)
    return found


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    found = circumstances(DeviceConfig(options.device))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    print(headline(found))
    lines = summary(rows)
    print_table(list(lines[0]), [list(line.values()) for line in lines])
    if options.json is not None:
        write_json(options.json, {"circumstances": found, "rows": rows, "summary": lines})
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
