"""Ablation study: the recipe, and variants that change one ingredient of it.

    python experiments/ablation.py --data.root DIR --workdir RUN --json ablation.json

Every variant is trained with several seeds, once with a fold of patients held out and once with a
block of the file numbering. It is evaluated on the held-out images and on renderings of them. Each
half of the held-out patients is evaluated at the operating point fitted on the other half. Each
training is a separate run in RUN/VARIANT/VALIDATION-SEED. The same command resumes a stopped study;
`--only`, `--seeds` and `--validations` select a part of the table.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import baseline
import numpy as np
import pneumonia
import tyro
from crossval import expect_no_patience

from cnnjax.cli import guarded
from cnnjax.config import Config, DataConfig
from cnnjax.errors import InputError
from cnnjax.evaluation import shifted
from cnnjax.evaluation.predict import Predictor
from cnnjax.evaluation.rerender import GROUPS, read_facts
from cnnjax.machine import devices
from cnnjax.run.workdir import write_json
from cnnjax.train import fit

Validation = Literal["patients", "blocks"]
RECIPE, POST = "recipe", "post"


def variants(recipe: Config) -> dict[str, Config]:
    """Returns all variants by name: the recipe, its variants, and the blog post's recipe."""

    def modelled(**changes: Any) -> Config:
        return replace(recipe, model=replace(recipe.model, **changes))

    def augmented(**changes: Any) -> Config:
        return replace(recipe, augment=replace(recipe.augment, **changes))

    def trained(**changes: Any) -> Config:
        return replace(recipe, train=replace(recipe.train, **changes))

    def with_data(**changes: Any) -> Config:
        return replace(recipe, data=replace(recipe.data, **changes))

    # What releases 0.1 to 0.3 had besides.
    moves: dict[str, Any] = {"zoom": 0.1, "rotate": 5.0, "shift": 0.04, "black": 0.5}
    weighted: dict[str, Any] = {"class_weights": True, "label_smoothing": 0.05, "ema": 0.98}
    return {
        RECIPE: recipe,
        "whole-films": with_data(frame="whole"),
        "no-crops": augmented(crop=1.0),
        "crops-of-0.5": augmented(crop=0.5),
        "crops-of-0.25": augmented(crop=0.25),
        "no-tone": augmented(gamma=0.0, contrast=0.0, brightness=0.0),
        "no-sharpness": augmented(sharpness=0.0),
        "with-moves": augmented(**moves),
        "no-local-contrast": modelled(local_contrast=False),
        "strong-tone": augmented(gamma=0.5, contrast=0.4, brightness=0.15, sharpness=1.0),
        "with-class-weights-smoothing-ema": trained(**weighted),
        "no-auxiliary": trained(auxiliary=0.0),
        "with-flips": augmented(flip=True),
        "with-erasing-and-noise": augmented(erase=0.2, noise=0.05),
        "with-mixup": trained(mixup=0.2),
        "128-pixels": with_data(size=128),
        "48-channels": modelled(width=48),
        "with-views": augmented(views=8),
        # The recipe of the first release, without test-time augmentation.
        "release-1": replace(
            recipe,
            data=replace(recipe.data, frame="whole"),
            augment=replace(recipe.augment, crop=1.0, **moves),
            train=replace(recipe.train, **weighted),
        ),
        POST: replace(
            baseline.CONFIG,
            data=replace(recipe.data, frame="whole", size=baseline.CONFIG.data.size),
            operating=recipe.operating,
            device=recipe.device,
        ),
    }


@dataclass(frozen=True)
class Options:
    """The recipe, and which variants to train."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(
        default_factory=lambda: replace(pneumonia.CONFIG, workdir=Path("runs/ablation"))
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the split, the weights and the order of images."""
    validations: tuple[Validation, ...] = ("patients", "blocks")
    """What to hold out: a fold of patients, or a block of the file numbering. Seed 0 holds out the
    last block, seed 1 the one before, and so on."""
    only: tuple[str, ...] = ()
    """Names of the variants to train; by default all."""
    outlines: Path | None = None
    """Folder of lung outlines; see crossval.py."""
    external: Path | None = None
    """External data set to evaluate on as well; see crossval.py."""
    json: Path | None = None
    """Write the rows of the table to this file."""
    plot: Path | None = None
    """Write a bar chart to this SVG file."""

    def __post_init__(self) -> None:
        unknown = set(self.only) - set(variants(self.config))
        if unknown:
            names = ", ".join(variants(self.config))
            raise InputError(f"--only {min(unknown)}: the variants are {names}")
        if not self.seeds:
            raise InputError("--seeds needs at least one number")
        config = self.config
        fixed = {"--seed": config.seed, "--data.fold": config.data.fold}
        for flag, value in fixed.items():
            if value:
                raise InputError(f"{flag} has no effect here; give --seeds and --validations")
        if config.data.validation != DataConfig().validation:
            raise InputError("--data.validation has no effect here; give --validations")
        expect_no_patience(config)


def ablate(options: Options) -> list[dict[str, Any]]:
    """Trains and evaluates every variant; returns a row for each training."""
    rows = []
    for validation in options.validations:
        for seed in options.seeds:
            for name, variant in variants(options.config).items():
                if options.only and name not in options.only:
                    continue
                folds = variant.data.folds
                fold = (folds - 1 - seed) % folds if validation == "blocks" else 0
                run = replace(
                    variant,
                    workdir=options.config.workdir / name / f"{validation}-{seed}",
                    seed=seed,
                    data=replace(variant.data, validation=validation, fold=fold),
                )
                fit(run)
                found = judge(run, options)
                rows.append({"variant": name, "validation": validation, "seed": seed} | found)
                print(f"{name}, {validation}, seed {seed}: {shown(found)}")
    return rows


def judge(run: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run; each half of its held-out patients chooses the other's threshold.

    Raises:
        InputError: a half of the held-out patients lacks a class.
    """
    mesh, views = devices.make_mesh(run.device), run.augment.views
    facts = None if options.outlines is None else read_facts(options.outlines)
    held_out = shifted.held_out_logits(run.workdir, mesh, [views], facts)[views]
    names = (patient.encode("utf-8", "surrogateescape") for patient in held_out.patients)
    halves = np.array([zlib.crc32(name) % 2 for name in names])
    if any(len(set(held_out.labels[halves == half])) < 2 for half in (0, 1)):
        raise InputError(
            f"{run.workdir}: too few patients are held out: a half of them lacks a class, so it has"
            " no operating point; hold out more with a smaller --data.folds"
        )
    found = shifted.judge(held_out, halves, run.operating)
    kept = {name: found[name] for name in ("score", "groups", "mean", "sets")}
    row = {"epochs": run.train.epochs, "plain": found["sets"][shifted.PLAIN]} | kept
    if options.external is not None:
        predictor = Predictor.of_run(run.workdir, mesh, "latest", views)
        row["external"] = shifted.external(predictor, options.external)
    return row


def shown(found: dict[str, Any]) -> str:
    """Returns a summary of the AUCs of a row as text."""
    worst = ", ".join(f"{group} {row['auc']:.4f}" for group, row in found["groups"].items())
    return f"AUC {found['plain']['auc']:.4f} as they are, score {found['score']:.4f} ({worst})"


def _worst(group: str, metric: str = "auc") -> Callable[[dict[str, Any]], float]:
    return lambda row: row["groups"][group][metric]


COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "score": lambda row: row["score"],
    "AUC as they are": lambda row: row["plain"]["auc"],
    "middle 0.7": lambda row: row["sets"]["middle 0.7"]["auc"],
    **{f"{group}, worst": _worst(group) for group in GROUPS},
    "across framings": _worst("framing", "across"),
    "specificity, framing": _worst("framing", "specificity"),
    "sensitivity, framing": _worst("framing", "sensitivity"),
}
"""Columns of the table: a function for each that returns its value from a row."""


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the means over seeds as a Markdown table.

    The last columns are differences from the recipe on the same held-out images: of the score, and
    of the AUC across framings. They give the mean over seeds and its standard error.
    """
    external = [f"external, {name}" for name in rows[0].get("external", ())]
    differences = ("score", "across framings")
    names = [*COLUMNS, *external, *(f"{name}, less the recipe's" for name in differences)]
    lines = [
        f"| variant | held out | seeds | {' | '.join(names)} |",
        f"| --- | --- | ---{' | ---' * len(names)} |",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        for validation in dict.fromkeys(row["validation"] for row in rows):
            mine = [r for r in rows if (r["variant"], r["validation"]) == (name, validation)]
            if not mine:
                continue
            cells = [name, validation, str(len(mine))]
            cells += [f"{np.mean([value(row) for row in mine]):.4f}" for value in COLUMNS.values()]
            for place in rows[0].get("external", ()):
                cells.append(f"{np.mean([row['external'][place] for row in mine]):.3f}")
            cells += [difference(mine, rows, COLUMNS[name]) for name in differences]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference(
    mine: list[dict[str, Any]], rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> str:
    """Returns the mean difference of a value from the recipe over seeds, with standard error.

    Empty for the recipe itself, and if fewer than two seeds can be compared.
    """
    key = ("validation", "seed")
    recipe = {tuple(r[k] for k in key): value(r) for r in rows if r["variant"] == RECIPE}
    paired = [value(r) - recipe[at] for r in mine if (at := tuple(r[k] for k in key)) in recipe]
    if mine[0]["variant"] == RECIPE or len(paired) < 2:
        return ""
    error = np.std(paired, ddof=1) / np.sqrt(len(paired))
    return f"{np.mean(paired):+.4f} ± {error:.4f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws 1 - score of each variant: a bar for the mean over seeds, a dot for each seed."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "cnnjax"
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["variant"] for row in rows))
    validations = list(dict.fromkeys(row["validation"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.45 * len(names)), layout="constrained")
    height = 0.8 / len(validations)
    for k, (validation, color) in enumerate(zip(validations, ("#0072b2", "#e69f00"), strict=False)):
        for i, name in enumerate(names):
            errors = [
                1 - row["score"]
                for row in rows
                if (row["variant"], row["validation"]) == (name, validation)
            ]
            if errors:
                at = i + (k - (len(validations) - 1) / 2) * height
                label = f"held out: {validation}" if not i else None
                axes.barh(at, np.mean(errors), height * 0.9, color=color, label=label)
                axes.plot(errors, [at] * len(errors), "o", color="black", ms=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("1 - score (smaller is better; dots are seeds)")
    figure.legend(loc="outside upper center", ncols=len(validations))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    rows = ablate(options)
    print(f"\n{table(rows)}")
    if options.json is not None:
        write_json(options.json, {"rows": rows})
    if options.plot is not None:
        draw(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
