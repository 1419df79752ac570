"""Figures of a report as SVG in the text colour and font of the page.

Lines differ in dash and marker as well as in colour. The colours are those of Okabe and Ito, which
are distinguishable with any colour vision.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from cnnjax.metrics import Evaluation, patient_bootstrap
from cnnjax.operating import reliability

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
_INK = "#010203"  # placeholder for the text colour of the page
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    **dict.fromkeys((*_INKED, "legend.labelcolor", "grid.color"), _INK),
}


def svg(name: str, draw: Callable[[Any], None], size: tuple[float, float] = (5.2, 4.0)) -> str:
    """Returns a figure as an SVG element.

    Args:
        name: name of the figure; seeds the identifiers inside the SVG, so that they are unique on a
            page and the same each time.
        draw: a function that draws on the matplotlib axes it is given.
        size: width and height, in inches of 72 pixels.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
            axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    # Only the <svg> element, without the XML header. It is hidden from screen readers: the page
    # describes the figure in words.
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def curves(history: Sequence[dict[str, Any]], best: int) -> str:
    """Draws the training and validation loss by epoch."""
    epochs = [line["epoch"] for line in history]

    def draw(axes: Any) -> None:
        for part, color, mark in (("train", BLUE, "o-"), ("validation", ORANGE, "s--")):
            axes.plot(
                epochs, [h[part]["loss"] for h in history], mark, color=color, label=part, ms=3
            )
        axes.axvline(best, color=GREEN, ls=":", label="best epoch")
        axes.set(xlabel="epoch", ylabel="loss, nats", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)

    return svg("curves", draw)


def quality(history: Sequence[dict[str, Any]], best: int) -> str:
    """Draws AUC, sensitivity and specificity at probability 0.5 on the held-out images."""
    epochs = [line["epoch"] for line in history]

    def draw(axes: Any) -> None:
        marks = (("auc", BLUE, "o-"), ("sensitivity", ORANGE, "s--"), ("specificity", GREEN, "^-."))
        for metric, color, mark in marks:
            values = [line["validation"][metric] for line in history]
            axes.plot(epochs, values, mark, color=color, label=metric, ms=3)
        axes.axvline(best, color="0.5", ls=":")
        axes.set(xlabel="epoch", ylabel="on held-out images", ylim=(None, 1.005))
        axes.xaxis.get_major_locator().set_params(integer=True)

    return svg("quality", draw)


def roc(logits: np.ndarray, labels: np.ndarray, patients: Sequence[str], at: Evaluation) -> str:
    """Draws the ROC curve with a 95 % band (bootstrap of patients) and the operating point."""
    grid = np.linspace(0, 1, 101)

    def sensitivity(weights: np.ndarray) -> np.ndarray:
        false, true = _ranked(logits, labels, weights)
        return np.interp(grid, false / false[-1], true / true[-1])

    low, high = _band(sensitivity, patients)

    def draw(axes: Any) -> None:
        axes.fill_between(grid, low, high, color=BLUE, alpha=0.25, lw=0, label="95 % band")
        false, true = _ranked(logits, labels, np.ones(len(labels)))
        axes.plot(false / false[-1], true / true[-1], color=BLUE, label="ROC")
        axes.plot([0, 1], [0, 1], ls=":", color="0.5", label="chance")
        point = 1 - (at.specificity.value or 0), at.sensitivity.value or 0
        axes.plot(*point, "D", color=ORANGE, label="operating point")
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")

    return svg("roc", draw)


def precision_at(
    recall: np.ndarray, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Returns the precision at given recalls, float64 [n].

    Between two recalls that thresholds reach, the precision is interpolated linearly. It is NaN if
    no positive image has a weight above zero.

    Args:
        recall: float [n], in (0, 1].
        logits: float [images].
        labels: int [images], 0 or 1.
        weights: float [images], weight of each image.
    """
    false, true = _ranked(logits, labels, weights)
    rises = np.diff(true, prepend=0) > 0  # the first point of each recall has the highest precision
    if not rises.any():
        return np.full(len(recall), np.nan)
    found = true[rises]
    return np.interp(recall, found / true[-1], found / (found + false[rises]))


def precision_recall(
    logits: np.ndarray, labels: np.ndarray, patients: Sequence[str], at: Evaluation
) -> str:
    """Draws precision against recall with a 95 % band, and the operating point."""
    grid = np.linspace(0.01, 1, 100)

    def precision(weights: np.ndarray) -> np.ndarray:
        return precision_at(grid, logits, labels, weights)

    low, high = _band(precision, patients)

    def draw(axes: Any) -> None:
        axes.fill_between(grid, low, high, color=BLUE, alpha=0.25, lw=0, label="95 % band")
        axes.plot(grid, precision(np.ones(len(labels))), color=BLUE, label="precision")
        axes.axhline(labels.mean(), ls=":", color="0.5", label="chance")
        if at.precision.value is not None:  # undefined if no image is predicted positive
            point = at.sensitivity.value, at.precision.value
            axes.plot(*point, "D", color=ORANGE, label="operating point")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision", ylim=(0, 1.02))

    return svg("precision-recall", draw)


def thresholds(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> str:
    """Draws sensitivity and specificity by threshold."""
    grid = np.linspace(0, 1, 201)
    positive, negative = probabilities[labels == 1], probabilities[labels == 0]

    def draw(axes: Any) -> None:
        rise = [np.mean(positive >= t) for t in grid]
        axes.plot(grid, rise, color=BLUE, label="sensitivity")
        axes.plot(
            grid, [np.mean(negative < t) for t in grid], "--", color=ORANGE, label="specificity"
        )
        axes.axvline(threshold, color=GREEN, ls=":", label="operating point")
        axes.set(xlabel="threshold on the probability", ylim=(0, 1.02))

    return svg("thresholds", draw)


def calibration(
    probabilities: np.ndarray, labels: np.ndarray, observed: str = "share of positives"
) -> str:
    """Draws the reliability diagram; the area of a dot grows with the images in its bin."""
    bins = reliability(probabilities, labels)

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], ls=":", color="0.5", label="perfect")
        most = max(one.images for one in bins)
        axes.plot([b.predicted for b in bins], [b.observed for b in bins], color=BLUE, alpha=0.5)
        axes.scatter(
            [b.predicted for b in bins],
            [b.observed for b in bins],
            s=[12 + 120 * b.images / most for b in bins],
            color=BLUE,
            label="images, in bins",
        )
        axes.set(xlabel="mean predicted probability", ylabel=observed, aspect="equal")

    return svg("calibration", draw)


def scores(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], threshold: float
) -> str:
    """Draws a histogram of the probabilities of each class; the axis of counts is logarithmic."""

    def draw(axes: Any) -> None:
        edges = np.linspace(0, 1, 31)
        for label, color, hatch in ((0, ORANGE, "//"), (1, BLUE, "")):
            axes.hist(
                probabilities[labels == label],
                edges,
                color=color,
                alpha=0.55,
                hatch=hatch,
                label=_label(classes[label]),
            )
        axes.axvline(threshold, color=GREEN, ls=":", label="operating point")
        axes.set(xlabel="probability", ylabel="images", yscale="log")

    return svg("scores", draw)


# For several curves: the colours of Okabe and Ito without yellow, which is too light on paper.
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c564b")
_DASHES = ("-", "--", "-.", ":")


def rocs(runs: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> str:
    """Draws the ROC curves of several runs or classes.

    Args:
        runs: (name, logits [n], labels [n], 0 or 1) for each curve.
    """

    def draw(axes: Any) -> None:
        for i, (name, logits, labels) in enumerate(runs):
            false, true = _ranked(logits, labels, np.ones(len(labels)))
            dash = _DASHES[i % len(_DASHES)]
            color = _RUNS[i % len(_RUNS)]
            axes.plot(false / false[-1], true / true[-1], dash, color=color, label=_label(name))
        axes.plot([0, 1], [0, 1], ls=":", color="0.5", label="chance")
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")

    return svg("rocs", draw)


def progress(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str:
    """Draws the held-out AUC of several runs by epoch.

    Args:
        runs: (name, lines of `metrics.jsonl`) for each run.
    """

    def draw(axes: Any) -> None:
        for i, (name, history) in enumerate(runs):
            epochs = [line["epoch"] for line in history]
            areas = [line["validation"]["auc"] for line in history]
            dash = _DASHES[i % len(_DASHES)]
            axes.plot(epochs, areas, dash, marker="o", ms=3, color=_RUNS[i], label=_label(name))
        axes.set(xlabel="epoch", ylabel="AUC on held-out images", ylim=(None, 1.005))
        axes.xaxis.get_major_locator().set_params(integer=True)

    return svg("progress", draw)


def forest(runs: Sequence[tuple[str, Evaluation]]) -> str:
    """Draws the sensitivity and specificity of several runs with 95 % intervals."""

    def draw(axes: Any) -> None:
        marks = (("sensitivity", BLUE, "o", -0.12), ("specificity", ORANGE, "s", 0.12))
        for metric, color, mark, aside in marks:
            for i, (_, found) in enumerate(runs):
                estimate = getattr(found, metric)
                label = metric if i == 0 else None
                axes.plot(estimate.value, i + aside, mark, color=color, ms=5, label=label)
                if estimate.ci95:
                    axes.plot(estimate.ci95, [i + aside] * 2, color=color, lw=1.5)
        axes.set_yticks(range(len(runs)), [_label(name) for name, _ in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set(xlabel="at each run's operating point")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    return svg("forest", draw, (5.2, 1.4 + 0.5 * len(runs)))


def _label(name: str) -> str:
    """Returns a name escaped for matplotlib.

    Matplotlib typesets $...$ and leaves names that begin with an underscore out of legends.
    """
    name = name.replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name


def _ranked(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of false and of true positives at each distinct threshold, descending.

    Both arrays are float [k + 1] for k distinct logits; they begin with 0.
    """
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    last = np.append(ranked[1:] != ranked[:-1], True)
    false = np.cumsum((weights * (labels == 0))[order])[last]
    true = np.cumsum((weights * (labels == 1))[order])[last]
    return np.append(0, false), np.append(0, true)


def _band(
    curve: Callable[[np.ndarray], np.ndarray], patients: Sequence[str], draws: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 2.5th and 97.5th percentile of a curve over bootstrap samples of patients."""
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = [curve(one) for some in patient_bootstrap(patients, draws) for one in some]
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    return low, high
