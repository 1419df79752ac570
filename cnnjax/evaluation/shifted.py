"""Stress-test validation: a run is evaluated on its held-out images and on renderings of them.

One operating point is used for all renderings, because in practice nobody knows how an image was
produced. It is fitted and evaluated on different patients. The score of a recipe is the worst AUC
of each group of renderings (`cnnjax.evaluation.rerender.GROUPS`), averaged over the groups: many
mild changes cannot hide a harmful one.
"""

from __future__ import annotations

import csv
import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from cnnjax import lungs
from cnnjax.config import Config, DataConfig, OperatingConfig
from cnnjax.data import cache
from cnnjax.data.decode import decode
from cnnjax.data.onthefly import Films
from cnnjax.data.prepare import TrainingData, open_index, training_data
from cnnjax.errors import InputError
from cnnjax.evaluation import rerender
from cnnjax.evaluation.predict import Predictor
from cnnjax.evaluation.rerender import GROUPS, RENDERINGS, Facts
from cnnjax.machine.files import no_cache
from cnnjax.machine.host import cache_folder
from cnnjax.metrics import AT_ZERO, against_rest, at_zero, auc, evaluate, sigmoid, softmax
from cnnjax.operating import OperatingPoint, Point, fit_operating_point, reliability
from cnnjax.run.workdir import Workdir

PLAIN = "as they are"
"""Name of the original images among the renderings."""

_MADE_FROM = "made from"  # key in the file of logits that identifies the images

METRICS = AT_ZERO


@dataclass(frozen=True)
class HeldOut:
    """Logits of a run's held-out images."""

    labels: np.ndarray
    """int [n]."""
    patients: tuple[str, ...]
    sets: dict[str, np.ndarray]
    """Logits by rendering, including `PLAIN`: float32 [n], or [n, K] for K classes. NaN for images
    for which the rendering needs an unknown fact."""


def held_out_logits(
    run: Path,
    mesh: Mesh,
    looks: Sequence[int],
    facts: Mapping[str, Facts] | None = None,
    *,
    renderings: bool = True,
) -> dict[int, HeldOut]:
    """Returns the logits of a run's held-out images at its last epoch, by number of views.

    The logits are saved to `shifted-VIEWS.npz` in the workdir and read from there the next time.

    Args:
        run: workdir of a finished run.
        mesh: the devices to use.
        looks: the numbers of views (test-time augmentation) to evaluate.
        facts: facts about images by file name (`cnnjax.evaluation.rerender.read_facts`). A
            rendering that needs facts is left out if none are known.
        renderings: whether to evaluate renderings too, not only the original images.

    Raises:
        InputError: the run or its images no longer exist.
    """
    config = Workdir(run).read_config()
    data = training_data(config.data, config.seed, lambda _: None, mesh)
    rows = data.validation
    examples = data.decoded.examples.take(rows)
    names = list(examples.names)
    facts = facts or {}
    known = [repr(facts.get(PurePosixPath(name).name)) for name in names] if renderings else []
    made_from = np.array([data.decoded.fingerprint, str(rerender.VERSION), *names, *known])
    found = {views: _kept(run, views, made_from) for views in looks}
    missing = [views for views, sets in found.items() if sets is None]
    if missing:
        predictors = {views: Predictor.of_run(run, mesh, "latest", views) for views in missing}
        fresh: dict[int, dict[str, np.ndarray]] = {views: {} for views in missing}
        plain = np.asarray(data.decoded.images[rows])

        def judged(name: str, images: np.ndarray, at: np.ndarray) -> None:
            for views, predictor in predictors.items():
                found = predictor.logits(lungs.as_framed(images))
                logits = np.full((len(rows), *found.shape[1:]), np.nan, np.float32)
                logits[at] = found
                fresh[views][name] = logits

        judged(PLAIN, plain, np.arange(len(rows)))
        if renderings:
            key = hashlib.sha256("\0".join(made_from.tolist()).encode("utf-8", "surrogateescape"))
            home = f"rendered-{config.data.size}-{key.hexdigest()[:32]}"
            for name, images, at in _rendered(config, data, facts, mesh, home):
                judged(name, images, at)
        for views, sets in fresh.items():
            partial = run / f"shifted-{views}.partial.npz"
            np.savez(partial, **(sets | {_MADE_FROM: made_from}))  # type: ignore[arg-type]
            partial.replace(run / f"shifted-{views}.npz")
            found[views] = sets
    labels = data.decoded.labels[rows]
    patients = tuple(examples.patients)
    return {views: HeldOut(labels, patients, sets or {}) for views, sets in found.items()}


def _kept(run: Path, views: int, made_from: np.ndarray) -> dict[str, np.ndarray] | None:
    """Returns the saved logits of an earlier call; None if there are none of the same images."""
    path = run / f"shifted-{views}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        sets = {name: file[name] for name in file.files}
    return sets if np.array_equal(sets.pop(_MADE_FROM, ()), made_from) else None


def _rendered(
    config: Config, data: TrainingData, facts: Mapping[str, Facts], mesh: Mesh, home: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields each rendering of a run's held-out images, preprocessed for the network.

    Rendered images are stored in the cache, because runs of a study hold out the same images.

    Args:
        config: configuration of the run.
        data: data of the run.
        facts: facts about images by file name.
        mesh: the devices that run the lung finder.
        home: name of the folder in the cache.

    Yields:
        The name of the rendering, its images, uint8 [k, size, size], and their indices among the
        held-out images, int64 [k].
    """
    rows, size = data.validation, config.data.size
    names = list(data.decoded.examples.take(rows).names)
    folder = (config.data.cache or cache_folder()) / home
    framer = lungs.Framer(size, mesh) if config.data.frame == "lungs" else None
    films = None
    for name in tqdm(RENDERINGS, "rendering", unit="set", disable=None):
        path = folder / f"{name}.npz"
        if not path.exists():
            if films is None:
                films = _films(config, data)[rows]
            changed, at = rerender.render(films, names, name, facts)
            if framer is not None:
                images = framer(changed).images
            else:
                images = np.array([decode(film, size) for film in changed], np.uint8)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                partial = folder / f".{name}.{secrets.token_hex(4)}.npz"
                np.savez(partial, images=images, at=at)
                partial.replace(path)
            except OSError as error:
                raise no_cache(folder.parent, error) from None
        with np.load(path, allow_pickle=False) as file:
            images, at = file["images"], file["at"]
        if len(at):
            yield name, images, at


def _films(config: Config, data: TrainingData) -> np.ndarray | Films:
    """Returns the images of a run before cropping and resizing, uint8 [n, SIZE, SIZE]."""
    if data.decoded.films is not None:
        return data.decoded.films
    index = open_index(replace(config.data, size=rerender.SIZE), lambda _: None)
    examples = index.split("train", "val")
    decoded = cache.load(
        examples,
        index.source,
        rerender.SIZE,
        folder=config.data.cache,
        limit_mib=config.data.cache_mib,
    )
    if decoded.examples != data.decoded.examples:
        raise InputError(f"{config.workdir}: the decodable images have changed since training")
    return decoded.images


def external(predictor: Predictor, root: Path) -> dict[str, float]:
    """Returns the AUC of a network on the test split of an external data set.

    Args:
        predictor: the network.
        root: the data set. If it contains `metadata.csv` (columns `file` and `view`), the AUC is
            also computed for each radiographic view.

    Returns:
        AUC by name: `all`, and each view. A view that lacks a class is left out.

    Raises:
        InputError: the data set cannot be read.
    """
    index = open_index(DataConfig(str(root)), lambda _: None)
    decoded = cache.load(index.split("test"), index.source, predictor.size)
    logits = predictor.logits(np.asarray(decoded.images))
    found = {"all": auc(logits, decoded.labels) or 0.0}
    if (root / "metadata.csv").exists():
        with (root / "metadata.csv").open(newline="", encoding="utf-8") as file:
            views = {row["file"]: row["view"] for row in csv.DictReader(file)}
        seen = np.array(
            [views.get(PurePosixPath(name).name, "") for name in decoded.examples.names]
        )
        for view in sorted(set(seen.tolist()) - {""}):
            area = auc(logits[seen == view], decoded.labels[seen == view])
            found |= {view: area} if area is not None else {}
    return found


def fit_point(sets: Mapping[str, np.ndarray], labels: np.ndarray, config: OperatingConfig) -> Point:
    """Returns the operating point with one threshold for all renderings.

    The threshold is chosen on the original images and all renderings. The original images and each
    group of renderings have the same weight, and so have the renderings within a group. Slope and
    bias (the calibration) are fitted on the original images only, because probabilities should be
    calibrated for the images of the place of use.

    Args:
        sets: logits by rendering, including `PLAIN`: [n], or [n, K] for K classes; NaN if unknown.
        labels: int [n].
        config: criterion of the threshold.

    Returns:
        An `OperatingPoint`; for K classes a `SoftmaxPoint`, fitted on the original images.
    """
    plain = fit_operating_point(sets[PLAIN], labels, config)
    if len(sets) == 1 or not isinstance(plain, OperatingPoint):
        return plain
    logits, repeated, weights = [], [], []
    for names in ((PLAIN,), *_by_group(sets).values()):
        for name in names:
            known = _known(sets[name])
            logits.append(sets[name][known])
            repeated.append(labels[known])
            weights.append(np.full(known.sum(), 1 / (len(names) * known.sum())))
    every = fit_operating_point(
        np.concatenate(logits), np.concatenate(repeated), config, np.concatenate(weights)
    )
    assert isinstance(every, OperatingPoint)
    return replace(
        plain, threshold=every.threshold, criterion=f"{every.criterion}, over all renderings"
    )


def _known(logits: np.ndarray) -> np.ndarray:
    """Returns bool [n], whether all logits [n(, K)] of each image are finite."""
    known: np.ndarray = np.isfinite(logits.reshape(len(logits), -1)).all(1)
    return known


def _by_group(sets: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the names of the renderings in `sets` by group; empty groups are left out."""
    groups = {
        group: [n for n in sets if n != PLAIN and RENDERINGS[n].group == group] for group in GROUPS
    }
    return {group: names for group, names in groups.items() if names}


def judge(held_out: HeldOut, parts: np.ndarray, config: OperatingConfig) -> dict[str, Any]:
    """Evaluates all renderings at operating points fitted on other patients.

    Args:
        held_out: the logits of n images.
        parts: int [n], the part of each image. Each part is evaluated at the operating point fitted
            on the images of the other parts in all renderings. All images of a patient must be in
            the same part.
        config: criterion of the threshold.

    Returns:
        Plain JSON with these keys:

        - `images`: n.
        - `sets`: AUC, accuracy, sensitivity and specificity of each rendering.
        - `plain`: metrics of the original images, with intervals.

        And if there are renderings:

        - `groups`: the worst value of each metric in each group; `ece`, the expected calibration
          error over the group's images; `across`, the `auc_across` of the group.
        - `score`: the worst AUC of each group, averaged over groups.
        - `mean`: the mean of each metric in each group, averaged over groups.
    """
    labels = held_out.labels
    moved = {name: np.empty(logits.shape) for name, logits in held_out.sets.items()}
    calibrated = {name: np.empty(logits.shape) for name, logits in held_out.sets.items()}
    for part in np.unique(parts):
        inside = parts == part
        others = {name: logits[~inside] for name, logits in held_out.sets.items()}
        point = fit_point(others, labels[~inside], config)
        for name, logits in held_out.sets.items():
            known = inside & _known(logits)
            moved[name][inside] = calibrated[name][inside] = np.nan
            moved[name][known] = point.margins(logits[known])
            calibrated[name][known] = point.calibrated(logits[known])
    sets = {}
    for name, logits in moved.items():
        known = _known(logits)
        sets[name] = at_zero(logits[known], labels[known])
    plain = evaluate(moved[PLAIN], labels, held_out.patients).to_json()
    probabilities = evaluate(calibrated[PLAIN], labels, held_out.patients).to_json()
    document: dict[str, Any] = {
        "images": len(labels),
        "sets": sets,
        "plain": {name: plain[name] for name in METRICS}
        | {name: probabilities[name] for name in ("brier", "ece")},
    }
    groups = _by_group(sets)
    if groups:
        document["groups"] = {
            group: {m: float(min(sets[name][m] for name in names)) for m in METRICS}
            | {
                "across": auc_across([moved[name] for name in (PLAIN, *names)], labels),
                "ece": _calibration_error([calibrated[name] for name in names], labels),
            }
            for group, names in groups.items()
        }
        document["score"] = float(np.mean([each["auc"] for each in document["groups"].values()]))
        document["mean"] = {
            m: float(np.mean([np.mean([sets[n][m] for n in names]) for names in groups.values()]))
            for m in METRICS
        }
    return document


def score(held_out: HeldOut) -> float:
    """Returns the worst AUC of each group of renderings, averaged over the groups."""
    areas = {}
    for name, logits in held_out.sets.items():
        known = _known(logits)
        areas[name] = auc(logits[known], held_out.labels[known]) or 0.0
    groups = _by_group(areas).values()
    return float(np.mean([min(areas[name] for name in names) for names in groups]))


def auc_across(logits: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """Returns the worst AUC of negatives in one rendering against positives in another.

    The AUC within one rendering does not change if the rendering shifts the logits of all images by
    the same amount. Such a shift does matter if the two classes are rendered differently, for
    example in a collection whose normal images are framed more tightly than those with pneumonia.
    It also matters at a fixed threshold.

    Args:
        logits: logits of each rendering: float [n], or [n, K] for K classes; NaN if unknown. For K
            classes, each is compared with the rest, and the mean over classes is returned.
        labels: int [n], 0 or 1, or 0 to K - 1.
    """
    if logits[0].ndim == 2:
        with np.errstate(invalid="ignore"):  # NaN for images without logits
            scores = [against_rest(each) for each in logits]
        classes = range(logits[0].shape[1])
        each_class = [auc_across([s[:, k] for s in scores], labels == k) for k in classes]
        return float(np.mean(each_class))
    negatives = [each[(labels == 0) & np.isfinite(each)] for each in logits]
    positives = [each[(labels == 1) & np.isfinite(each)] for each in logits]
    return min(
        auc(np.concatenate([low, high]), np.repeat([0, 1], [len(low), len(high)])) or 0.0
        for low in negatives
        for high in positives
    )


def _calibration_error(logits: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """Returns the expected calibration error over the log-odds of several renderings.

    For K classes, it is the calibration error of the predicted (highest) probability.
    """
    whole, repeated = np.concatenate(logits), np.tile(labels, len(logits))
    known = _known(whole)
    if whole.ndim == 1:
        bins = reliability(sigmoid(whole[known]), repeated[known])
    else:
        bins = reliability(softmax(whole[known]).max(1), whole[known].argmax(1) == repeated[known])
    gaps = [each.images * abs(each.predicted - each.observed) for each in bins]
    return float(sum(gaps) / known.sum())


def together(held_out: Mapping[int, HeldOut]) -> tuple[HeldOut, np.ndarray]:
    """Concatenates the held-out images of several folds.

    Args:
        held_out: held-out images by number of the fold.

    Returns:
        All n images, and the number of the fold of each, int [n].
    """
    folds = list(held_out.values())
    joined = HeldOut(
        np.concatenate([fold.labels for fold in folds]),
        tuple(patient for fold in folds for patient in fold.patients),
        {name: np.concatenate([fold.sets[name] for fold in folds]) for name in folds[0].sets},
    )
    return joined, np.repeat(list(held_out), [len(fold.labels) for fold in folds])
