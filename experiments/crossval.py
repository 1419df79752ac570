"""Cross-validation of a recipe: each image is evaluated by the network that did not train on it.

    python experiments/crossval.py baseline --data.root DIR --workdir RUN
    python experiments/crossval.py pneumonia --data.root DIR --workdir RUN --shifted \
        --outlines LUNG_MASKS --external OTHER --release OUT

All flags of the recipe can be used except --data.fold. `--data.validation blocks` holds out blocks
of the file numbering. Each fold is a separate run in RUN/fold0, RUN/fold1, ...; the same command
resumes a stopped cross-validation.

The results are those of the last epoch, which is not chosen on the held-out fold, at the operating
point fitted on the held-out images of the other folds. They are printed and written to
RUN/crossval.json. The results at other operating points are listed too, each with the probability
to give as --threshold to `cnnjax evaluate` and `cnnjax predict`. For three or more classes, AUC,
sensitivity and specificity are means over the classes, each against the rest.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import baseline
import numpy as np
import pneumonia
import tyro

from cnnjax.cli import guarded
from cnnjax.config import Config, OperatingConfig
from cnnjax.errors import InputError
from cnnjax.evaluation import shifted
from cnnjax.evaluation.predict import Predictor
from cnnjax.evaluation.rerender import read_facts
from cnnjax.machine import devices
from cnnjax.metrics import Estimate, auc
from cnnjax.operating import OperatingPoint
from cnnjax.run import release
from cnnjax.run.workdir import Workdir, write_json
from cnnjax.steps import variables_of
from cnnjax.train import fit

OTHERS = (
    OperatingConfig("youden"),
    OperatingConfig("cost"),
    *(OperatingConfig("sensitivity", sensitivity=wanted) for wanted in (0.98, 0.99)),
)
"""Operating points that are always reported, in addition to that of the config."""


@dataclass(frozen=True)
class Options:
    """The recipe, and what to do with the trained networks."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    shifted: bool = False
    """Stress-test validation: also evaluate renderings of the held-out images
    (docs/shifted-validation.md)."""
    outlines: Path | None = None
    """Folder of lung outlines (`masks_128.npz`, `masks.csv`). The renderings that crop to the lungs
    or restore the published aspect ratio need it; without it they are left out."""
    external: Path | None = None
    """External data set: also evaluate the networks on its test split. Nothing is chosen on it."""
    release: Path | None = None
    """Write the networks of all folds as one ensemble to this folder. Give the folder to `cnnjax
    evaluate` and `cnnjax predict` as --run."""

    def __post_init__(self) -> None:
        if self.config.data.validation == "official":
            raise InputError("--data.validation official has no folds; give patients or blocks")
        if self.config.data.fold:
            raise InputError("--data.fold has no effect here: every fold is trained")
        expect_no_patience(self.config)


def expect_no_patience(config: Config) -> None:
    """Raises InputError if --train.patience is set.

    With it, the held-out images would choose the last epoch, and its results would be biased.
    """
    if config.train.patience:
        raise InputError(
            "--train.patience lets the held-out images choose the last epoch, so they cannot be"
            " used to evaluate it; give --train.epochs"
        )


def crossvalidate(options: Options) -> None:
    """Trains each fold, pools the logits of the held-out images, and writes the results."""
    config = options.config
    folds = [
        replace(config, workdir=config.workdir / f"fold{k}", data=replace(config.data, fold=k))
        for k in range(config.data.folds)
    ]
    for fold in folds:
        fit(fold)
    runs = [fold.workdir for fold in folds]
    mesh = devices.make_mesh(config.device)
    facts = None if options.outlines is None else read_facts(options.outlines)
    looks = config.augment.looks
    held_out = [
        shifted.held_out_logits(run, mesh, looks, facts, renderings=options.shifted) for run in runs
    ]
    pooled, documents = {}, {}
    for views in looks:
        by_fold = {fold: each[views] for fold, each in enumerate(held_out)}
        pooled[views], documents[views] = judge(options, by_fold, views)
        if options.external is not None:
            documents[views]["external"] = [
                shifted.external(Predictor.of_run(run, mesh, "latest", views), options.external)
                for run in runs
            ]
        show(documents[views])
    document = documents[config.augment.views]
    if config.augment.views > 1:
        document |= {"one_view": documents[1]}
    write_json(config.workdir / "crossval.json", document)
    if options.release is not None:
        write_release(options, runs, pooled, document)


def judge(
    options: Options, each: dict[int, shifted.HeldOut], views: int
) -> tuple[shifted.HeldOut, dict[str, Any]]:
    """Returns the held-out images of all folds, and their metrics.

    Args:
        options: the recipe and its options.
        each: the logits of the held-out images with `views` views, by fold.
        views: number of views of an image.
    """
    config = options.config
    pooled, fold_of = shifted.together(each)
    found = shifted.judge(pooled, fold_of, config.operating)
    points = [
        operate(
            pooled,
            criterion,
            found if criterion == config.operating else shifted.judge(pooled, fold_of, criterion),
        )
        for criterion in (OTHERS if pooled.sets[shifted.PLAIN].ndim == 1 else ())
    ]
    areas = [auc(fold.sets[shifted.PLAIN], fold.labels) or 0.0 for fold in each.values()]
    scores = [shifted.score(fold) for fold in each.values()] if options.shifted else []
    kind = (
        "blocks of the file numbering" if config.data.validation == "blocks" else "patient-grouped"
    )
    looks = "as they are" if views == 1 else f"in {views} views"
    return pooled, {
        "protocol": f"out of fold, {config.data.folds} folds, {kind}, last epoch,"
        f" seed {config.seed}; images evaluated {looks};"
        " operating point fitted on the other folds",
        "auc_by_fold": areas,
        "score_by_fold": scores,
        "auc_mean": float(np.mean(areas)),
        "auc_sd": float(np.std(areas, ddof=1)),
        "points": points,
    } | found


def operate(
    pooled: shifted.HeldOut, criterion: OperatingConfig, found: dict[str, Any]
) -> dict[str, Any]:
    """Returns the metrics of an operating point, and its threshold if fitted on all folds."""
    point = shifted.fit_point(pooled.sets, pooled.labels, criterion)
    assert isinstance(point, OperatingPoint), "only two classes have a threshold"
    shares = shifted.METRICS[1:]
    kinds = {"plain": found["plain"]}
    if "groups" in found:
        kinds |= {"mean": found["mean"], "framing at worst": found["groups"]["framing"]}
    return {
        "criterion": point.criterion,
        "threshold": point.probability_threshold(),
    } | {kind: {share: row[share] for share in shares} for kind, row in kinds.items()}


def show(document: dict[str, Any]) -> None:
    """Prints the table of renderings and the metrics of the original images."""
    print(f"\n{document['protocol']}")
    print(f"{'rendering':<18}" + "".join(f"{name:>13}" for name in shifted.METRICS))
    rows = dict(document["sets"])
    for group, row in document.get("groups", {}).items():
        rows[f"{group}, worst"] = row
    if "mean" in document:
        rows["mean of groups"] = document["mean"]
    for name, row in rows.items():
        print(f"{name:<18}" + "".join(f"{row[metric]:>13.4f}" for metric in shifted.METRICS))
    if "score" in document:
        by_fold = ", ".join(f"{score:.4f}" for score in document["score_by_fold"])
        print(f"\nscore {document['score']:.4f}: mean of the groups' worst AUC ({by_fold})")
        errors = ", ".join(f"{g} {row['ece']:.3f}" for g, row in document["groups"].items())
        print(f"expected calibration error by group: {errors}")
        across = ", ".join(f"{g} {row['across']:.4f}" for g, row in document["groups"].items())
        print(f"worst AUC of negatives in one rendering and positives in another: {across}")
    for name in document.get("external", [{}])[0]:
        areas = [run[name] for run in document["external"]]
        shown = ", ".join(f"{area:.3f}" for area in areas)
        print(f"external, {name}: AUC {np.mean(areas):.3f} ({shown})")
    print(f"\nAUC by fold: {document['auc_mean']:.4f} +- {document['auc_sd']:.4f}")
    print(f"as they are, pooled over {document['images']:,} images, with 95 % intervals")
    for name, value in document["plain"].items():
        print(f"  {name:<12} {Estimate(**value)}")
    if not document["points"]:
        return
    names = ("threshold", *shifted.METRICS[1:])
    print("\nas they are, at other operating points")
    width = max(len(point["criterion"]) for point in document["points"])
    print(f"{'criterion':<{width}}" + "".join(f"{name:>13}" for name in names))
    for point in document["points"]:
        shares = [point["threshold"], *(value["value"] for value in point["plain"].values())]
        print(f"{point['criterion']:<{width}}" + "".join(f"{share:>13.4f}" for share in shares))


def write_release(
    options: Options,
    runs: list[Path],
    pooled: dict[int, shifted.HeldOut],
    document: dict[str, Any],
) -> None:
    """Writes the networks of all folds as a release, with operating points fitted on all folds."""
    assert options.release is not None
    config = options.config
    mesh = devices.make_mesh(config.device)
    members = [Predictor.of_run(run, mesh, "latest").members[0] for run in runs]
    release.write(
        release.Release(
            config.model,
            config.data.size,
            config.data.frame,
            Workdir(runs[0]).read_classes(),
            config.augment,
            {
                views: shifted.fit_point(held_out.sets, held_out.labels, config.operating)
                for views, held_out in pooled.items()
            },
            tuple(variables_of(member) for member in members),
            {
                "figures": document,
                "folds": {
                    "validation": config.data.validation,
                    "folds": config.data.folds,
                    "seed": config.seed,
                },
            },
        ),
        options.release,
    )
    print(f"\nwritten to {options.release}; evaluate it on a test split with")
    print(f"  cnnjax evaluate --run {quote(str(options.release))} --data DIR --split test")


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    options = tyro.extras.overridable_config_cli(
        {
            "baseline": ("The blog post's recipe (baseline.py).", Options(baseline.CONFIG)),
            "pneumonia": ("The default recipe (pneumonia.py).", Options(pneumonia.CONFIG)),
        },
        description=__doc__,
    )
    crossvalidate(options)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
