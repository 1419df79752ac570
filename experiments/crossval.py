"""A recipe on every fold; each image is judged by the network that never saw it.

    python experiments/crossval.py baseline --data.root DIR --workdir RUN
    python experiments/crossval.py pneumonia --data.root DIR --workdir RUN --shifted \
        --outlines LUNG_MASKS --external OTHER --release OUT

Any flag of the recipe goes here too, except --data.fold; `--data.validation blocks` holds out
blocks of the file numbering. Each fold is a run of its own in RUN/fold0, RUN/fold1, ...; the same
command goes on where it was stopped. The figures are those of the last epoch, which the held-out
fold had no part in choosing, at the operating point that was fitted on the other folds' held-out
images. They go to the screen and to RUN/crossval.json, with what other operating points would come
to and the probability to give `cnnjax evaluate` and `predict` for them as --threshold. Of three and
more classes AUC, sensitivity and specificity are means over the classes, each against the rest.
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
from cnnjax.evaluation import release, shifted
from cnnjax.evaluation.predict import Predictor
from cnnjax.evaluation.rerender import read_facts
from cnnjax.machine import devices
from cnnjax.metrics import Estimate, auc
from cnnjax.operating import OperatingPoint
from cnnjax.run.workdir import Workdir, write_json
from cnnjax.steps import variables_of
from cnnjax.train import fit

OTHERS = (
    OperatingConfig("youden"),
    OperatingConfig("cost"),
    *(OperatingConfig("sensitivity", sensitivity=wanted) for wanted in (0.98, 0.99)),
)
"""The operating points that are reported whichever the config asks for."""


@dataclass(frozen=True)
class Options:
    """What is trained, and what is made of it."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    shifted: bool = False
    """Judge the held-out images in every rendering too (docs/shifted-validation.md)."""
    outlines: Path | None = None
    """Folder of drawn lung outlines (`masks_128.npz`, `masks.csv`) for the renderings that cut to
    the lungs or restore the published aspect ratio; without it they are left out."""
    external: Path | None = None
    """Data set of another place; the networks are judged on its test split too, and nothing is
    chosen by it."""
    release: Path | None = None
    """Write the networks of all folds to this folder as one ensemble, for evaluate and predict."""

    def __post_init__(self) -> None:
        if self.config.data.validation == "official":
            raise InputError("--data.validation official has no folds; take patients or blocks")
        if self.config.data.fold:
            raise InputError("--data.fold has no effect here: every fold is trained")
        expect_no_patience(self.config)


def expect_no_patience(config: Config) -> None:
    """Raises where the held-out images would choose the last epoch, whose figures are reported."""
    if config.train.patience:
        raise InputError(
            "--train.patience lets the held-out images end the training, so they could not judge"
            " its last epoch; give --train.epochs"
        )


def crossvalidate(options: Options) -> None:
    """Trains each fold, pools the out-of-fold logits, and writes and prints what they come to."""
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
    """Returns the pooled out-of-fold logits for so many views of an image, and their figures."""
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
        f" seed {config.seed}; images judged {looks};"
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
    """Returns what an operating point came to, and where it lies if fitted on all folds."""
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
    """Prints the table of renderings, and the figures on the images as they are."""
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
        print(f"\nscore {document['score']:.4f}, the mean of the groups' worst AUC ({by_fold})")
        errors = ", ".join(f"{g} {row['ece']:.3f}" for g, row in document["groups"].items())
        print(f"expected calibration error by group: {errors}")
        across = ", ".join(f"{g} {row['across']:.4f}" for g, row in document["groups"].items())
        print(f"AUC of one rendering's negatives and another's positives, worst: {across}")
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
    """Packs every fold's network, with the operating points of all held-out images."""
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
    print(f"\nwritten to {options.release}; judge it on a test split with")
    print(f"  cnnjax evaluate --run {quote(str(options.release))} --data DIR --split test")


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    options = tyro.extras.overridable_config_cli(
        {
            "baseline": ("The post's recipe, as in baseline.py.", Options(baseline.CONFIG)),
            "pneumonia": ("Our recipe, as in pneumonia.py.", Options(pneumonia.CONFIG)),
        },
        description=__doc__,
    )
    crossvalidate(options)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
