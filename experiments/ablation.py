"""What each ingredient of the recipe is worth: the recipe, and the recipe without or with one.

    python experiments/ablation.py --data.root DIR --workdir RUN --json ablation.json

Every variant is trained over seeds, once with a fold of patients held out and once with a block of
the file numbering, and judged on what is held out and on its re-renderings. The operating point of
one half of the held-out patients serves the other half. Each training is a run of its own in
RUN/VARIANT/VALIDATION-SEED; the same command goes on where it was stopped, and a smaller one (with
`--only`, `--seeds` or `--validations`) makes a part of the table.
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
    """Returns the recipe, the recipe without each ingredient or with one more, and the post's."""

    def modelled(**changes: Any) -> Config:
        return replace(recipe, model=replace(recipe.model, **changes))

    def augmented(**changes: Any) -> Config:
        return replace(recipe, augment=replace(recipe.augment, **changes))

    def trained(**changes: Any) -> Config:
        return replace(recipe, train=replace(recipe.train, **changes))

    def with_data(**changes: Any) -> Config:
        return replace(recipe, data=replace(recipe.data, **changes))

    return {
        RECIPE: recipe,
        "whole-films": with_data(frame="whole"),
        "no-crops": augmented(crop=1.0),
        "crops-of-0.5": augmented(crop=0.5),
        "crops-of-0.25": augmented(crop=0.25),
        "no-tone": augmented(gamma=0.0, contrast=0.0, brightness=0.0),
        "no-sharpness": augmented(sharpness=0.0),
        "no-moves": augmented(zoom=0.0, rotate=0.0, shift=0.0),
        "no-black": augmented(black=0.0),
        "no-local-contrast": modelled(local_contrast=False),
        "strong-tone": augmented(gamma=0.5, contrast=0.4, brightness=0.15, sharpness=1.0),
        "no-moving-average": trained(ema=0.0),
        "no-class-weights": trained(class_weights=False),
        "no-smoothing": trained(label_smoothing=0.0),
        "no-auxiliary": trained(auxiliary=0.0),
        "with-flips": augmented(flip=True),
        "with-erasing-and-noise": augmented(erase=0.2, noise=0.05),
        "with-mixup": trained(mixup=0.2),
        "128-pixels": with_data(size=128),
        "48-channels": modelled(width=48),
        "with-views": augmented(views=8),
        # The recipe of the first release, in one view.
        "release-1": replace(
            recipe,
            data=replace(recipe.data, frame="whole"),
            augment=replace(recipe.augment, crop=1.0),
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
    """Which part of the table."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(
        default_factory=lambda: replace(pneumonia.CONFIG, workdir=Path("runs/ablation"))
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the split, the weights and the order of images."""
    validations: tuple[Validation, ...] = ("patients", "blocks")
    """What is held out; of the blocks, the last for seed 0, the one before for seed 1."""
    only: tuple[str, ...] = ()
    """Names of variants; all by default."""
    outlines: Path | None = None
    """Folder of drawn lung outlines; see crossval.py."""
    external: Path | None = None
    """Data set of another place, judged beside; see crossval.py."""
    json: Path | None = None
    """Write the rows to this file."""
    plot: Path | None = None
    """Draw them to this SVG."""

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
    """Trains and judges every variant; returns a row for each training."""
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
    """Judges a finished run, each half of its held-out patients at the point of the other."""
    mesh, views = devices.make_mesh(run.device), run.augment.views
    facts = None if options.outlines is None else read_facts(options.outlines)
    held_out = shifted.held_out_logits(run.workdir, mesh, [views], facts)[views]
    names = (patient.encode("utf-8", "surrogateescape") for patient in held_out.patients)
    halves = np.array([zlib.crc32(name) % 2 for name in names])
    if any(len(set(held_out.labels[halves == half])) < 2 for half in (0, 1)):
        raise InputError(
            f"{run.workdir}: too few patients are held out to judge half of them at the operating"
            " point of the others; hold out more with a smaller --data.folds"
        )
    found = shifted.judge(held_out, halves, run.operating)
    kept = {name: found[name] for name in ("score", "groups", "mean", "sets")}
    row = {"epochs": run.train.epochs, "plain": found["sets"][shifted.PLAIN]} | kept
    if options.external is not None:
        predictor = Predictor.of_run(run.workdir, mesh, "latest", views)
        row["external"] = shifted.external(predictor, options.external)
    return row


def shown(found: dict[str, Any]) -> str:
    """Returns the AUCs of a row as a phrase."""
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
"""The columns of the table, each with what it takes of a row."""


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the means over seeds as a Markdown table.

    The last columns are paired differences from the recipe on the same held-out images, of the
    score and of the AUC across framings: their mean, and its standard error over seeds.
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
    """Returns by how much a value of a variant differs from the recipe's, over seeds."""
    key = ("validation", "seed")
    recipe = {tuple(r[k] for k in key): value(r) for r in rows if r["variant"] == RECIPE}
    paired = [value(r) - recipe[at] for r in mine if (at := tuple(r[k] for k in key)) in recipe]
    if mine[0]["variant"] == RECIPE or len(paired) < 2:
        return ""
    error = np.std(paired, ddof=1) / np.sqrt(len(paired))
    return f"{np.mean(paired):+.4f} ± {error:.4f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws 1 - score: a bar for the mean over seeds, a dot for each."""
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
