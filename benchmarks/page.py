"""Runs benchmarks, stores their results in `results/`, and writes `README.md` from them.

    python -m benchmarks.page                               # write the page from stored results
    python -m benchmarks.page --run peers step_time         # run these benchmarks first
    python -m benchmarks.page --keep gpu.json=step_time     # store a result of another machine

Each device has one file of results, named after the device, with one section per benchmark.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.measure import write_json
from cnnjax.cli import guarded
from cnnjax.errors import InputError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

Section = Literal["step_time", "peers", "input", "end_to_end", "scaling", "precision", "ahead"]
Cell = str | float | int | None


@dataclass(frozen=True)
class Options:
    """What to do before the page is written."""

    run: tuple[Section, ...] = ()
    """Benchmarks to run."""
    flags: str = ""
    """Flags for these benchmarks, such as --flags="--data DIR"; an unknown flag is an error."""
    keep: tuple[str, ...] = ()
    """FILE=SECTION: results to store, as a benchmark wrote them with --json."""


def keep(section: str, path: Path) -> None:
    """Stores the result file of a benchmark in the results of its device."""
    try:
        document = json.loads(path.read_text("utf-8"))
        kind = document["circumstances"]["device_kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a result of a benchmark ({error})") from None
    if document["circumstances"]["platform"] == "cpu":
        kind = document["circumstances"]["processor"]
    name = "-".join(re.findall("[a-z0-9]+", kind.lower().replace("(r)", "")))
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{name}.json"
    sections = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    write_json(kept, sections | {section: document})


def page(plots: Path = RESULTS) -> str:
    """Returns the text of README.md, and writes its plots to a folder."""
    parts = [_HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        sections = json.loads(path.read_text("utf-8"))
        parts.append(f"## {_title(next(iter(sections.values()))['circumstances'])}\n")
        for name, make in _SECTIONS.items():
            if name in sections:
                found = sections[name]["circumstances"]
                parts.append(make(sections[name], plots / path.stem))
                load = found["load_average"]
                versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
                parts.append(
                    f"*Commit {found['commit']}; Python {found['python']}, {versions};"
                    f" {found['device']}; load before {load[0] or 0:.1f}.*\n"
                )
        platform = next(iter(sections.values()))["circumstances"]["platform"]
        # `ahead` is for devices that are not available; `input` is measured on the CPU.
        elsewhere = ("ahead",) if platform == "cpu" else ("ahead", "input")
        missing = [name for name in _SECTIONS if name not in sections and name not in elsewhere]
        if missing:
            parts.append(f"Not yet measured on this device: {', '.join(missing)}.\n")
    if not any("gpu" in section for section in _platforms()):
        parts.append("## GPU\n\nNot yet measured.\n")
    return "\n".join(parts)


def _platforms() -> set[str]:
    found = set()
    for path in RESULTS.glob("*.json"):
        for document in json.loads(path.read_text("utf-8")).values():
            found.add(document["circumstances"]["platform"])
    return found


def _title(found: dict[str, Any]) -> str:
    return (
        found["device"]
        if found["platform"] != "cpu"
        else f"{found['processor']}: {found['device']}"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def _step_time(document: dict[str, Any], plots: Path) -> str:
    rows = [
        [
            *(row["network"], row["step"], row["batch"], row["size"]),
            *(row["precision"], row["devices"], row["compile_seconds"]),
            f"{row['median_ms']:.3g} ({row['quartile1_ms']:.3g} to {row['quartile3_ms']:.3g})",
            row["images_per_second"],
            _percent(row["mfu"]),
            # Older results did not count the bytes of the convolutions, so this was no bound.
            None if row.get("bytes") is None else _percent(row["of_bound"]),
            row["memory_mib"],
        ]
        for row in document["rows"]
    ]
    columns = ["network", "step", "batch", "pixels", "precision", "devices", "compile, s"]
    columns += ["step, ms (quartiles)", "images/s", "MFU, %", "of the roofline, %", "MiB"]
    plot = _throughput(document["rows"], plots)
    note = (
        "MFU (model FLOPs utilization) is relative to the peak of the device. The bytes of the"
        " roofline are those that XLA counts and those of calls into libraries; accesses served by"
        " a cache count too, so a step can be faster than the roofline. The column is empty for"
        " measurements made before the calls were counted. Both columns are empty if the peak is"
        " unknown (full float32 precision on an accelerator). Augmentation is part of the train"
        " step. Both networks have one input channel, and `resnet` has 16 channels in the first"
        " stage (the library's default is 32); `peers` has the networks of the recipes.\n"
    )
    return f"### {_NAMES['step_time']}\n\n{_table(columns, rows)}\n{note}\n{plot}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _throughput(rows: list[dict[str, Any]], plots: Path) -> str:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = _named(row, rows, ("network", "step", "precision"), ("size", "devices"))
        lines.setdefault(name, []).append(row)
    if max(map(len, lines.values()), default=0) < 2:
        return ""

    def draw(axes: Any) -> None:
        for (name, line), marker in zip(lines.items(), "osD^vP*X" * 4, strict=False):
            line.sort(key=lambda row: row["batch"])
            x, y = ([row[key] for row in line] for key in ("batch", "images_per_second"))
            axes.plot(x, y, marker=marker, label=name)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s")
        ticks = sorted({row["batch"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")

    return _plot(plots, "step-time", "Throughput against batch size", draw)


def _named(
    row: dict[str, Any], rows: list[dict[str, Any]], always: Sequence[str], varying: Sequence[str]
) -> str:
    """Returns the name of a row in a plot: some values always, others only if they vary."""
    told = [str(row[key]) for key in always]
    told += [f"{row[key]} {key}" for key in varying if len({other[key] for other in rows}) > 1]
    return ", ".join(told)


def _peers(document: dict[str, Any], plots: Path) -> str:
    rows = [
        [
            *(row["network"], row["peer"], row["precision"], row["batch"], row["pixels"]),
            *(row["ours_ms"], row["theirs_ms"]),
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        ]
        for row in document["rows"]
    ]
    columns = ["network", "peer", "precision", "batch", "pixels", "ours, ms", "theirs, ms"]
    columns += ["our throughput over theirs (least to most)"]
    proofs = document["proofs"]
    proven = "Logits and losses were not compared, because this is done in float32 only"
    if proofs:
        logits, losses = (max(proof[name] for proof in proofs) for name in ("logits", "losses"))
        proven = f"With the same weights, the logits agree within {logits:.1g}"
        proven += f" and the losses of ten steps within {losses:.1g}"

    def draw(axes: Any) -> None:
        shown = document["rows"]
        places = range(len(shown))
        ratios = [row["ratio"] for row in shown]
        spread = [
            [row["ratio"] - row["ratio_min"] for row in shown],
            [row["ratio_max"] - row["ratio"] for row in shown],
        ]
        axes.barh(places, ratios, xerr=spread, color="#4477aa", ecolor="0.3")
        axes.set_yticks(
            places,
            [_named(row, shown, ("network", "peer", "precision"), ("batch",)) for row in shown],
        )
        axes.invert_yaxis()
        axes.axvline(1, color="0.2", linestyle="--")
        axes.set(xlabel="our throughput over theirs")

    return (
        f"### {_NAMES['peers']}\n\n{'; '.join(document['versions'])}. {proven}. The networks are"
        " those of the recipes at the commit below, without augmentation. The three input channels"
        " of the baseline are the same gray image: the peers convolve all three, ours sums the"
        " filters and convolves one. Keras gets its batches through `tf.data` from host memory. The"
        " ratio is the median over the rounds, which can differ from the ratio of the medians.\n\n"
        f"{_table(columns, rows)}\n{_left_out(document)}"
        + _plot(plots, "peers", "Our throughput over the peers'", draw, 1 + 0.2 * len(rows))
    )


def _left_out(document: dict[str, Any]) -> str:
    lines = [
        f"Left out of {row['network']}, {row['precision']}, batch {row['batch']}: {row['why']}.\n\n"
        for row in document.get("left_out", ())
    ]
    return "".join(lines)


def _input(document: dict[str, Any], plots: Path) -> str:
    rows = [
        [row["what"], row["by"], row["images"], row["images_per_second"]]
        for row in document["rows"]
    ]
    waiting = "; ".join(
        f"{row['feed']} data {100 * row['share']:.2g} %" for row in document["waiting"]
    )
    return (
        f"### {_NAMES['input']}\n\n{_table(['files', 'by', 'images', 'images/s'], rows)}\n"
        f"Share of the training time after the first epoch spent waiting for data: {waiting}.\n"
    )


def _end_to_end(document: dict[str, Any], plots: Path) -> str:
    rows = [
        [
            *(row[key] for key in ("job", "by", "start", "files", "epochs", "seconds")),
            _phases(row.get("phases")),
        ]
        for row in document["rows"]
    ]
    columns = ["job", "by", "start", "files", "epochs", "seconds", "phases, s"]
    text = f"### {_NAMES['end_to_end']}\n\n{_table(columns, rows)}"
    reached = document.get("time_to_quality") or []
    if reached:
        quality = [
            [
                *(row["recipe"], row["auc"], row["seconds"] or "not reached"),
                row.get("compiling_seconds"),  # missing in older results
            ]
            for row in reached
        ]
        columns = ["recipe", "held-out AUC", "seconds from the start", "of them compiling"]
        text += "\n" + _table(columns, quality)
    return text


def _phases(phases: dict[str, float] | None) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in (phases or {}).items())


def _scaling(document: dict[str, Any], plots: Path) -> str:
    text = f"### {_NAMES['scaling']}\n\n"
    text += (
        "Each point is a separate process. The points are measured one after another, so other load"
        " on a shared machine affects them differently.\n\n"
    )
    if document["circumstances"]["platform"] == "cpu":
        text += (
            "The devices of a CPU are virtual and share its cores. Two and more devices use XLA's"
            " convolutions instead of oneDNN's. The curves show the cost of sharding, not the"
            " benefit of more hardware.\n\n"
        )
    for curve, title in (
        ("weak", "Weak scaling: the same batch for each device"),
        ("strong", "Strong scaling: one batch sharded over the devices"),
        ("size", "Image size"),
        ("images", "Number of images"),
    ):
        points = document[curve]
        columns = [name.replace("_", " ") for name in points[0]]
        text += f"{title}\n\n{_table(columns, [list(point.values()) for point in points])}\n"

    def draw(axes: Any) -> None:
        for curve, marker in (("weak", "o"), ("strong", "s")):
            points = document[curve]
            base = points[0]["images_per_second"]
            x = [point["devices"] for point in points]
            axes.plot(
                x,
                [point["images_per_second"] / base for point in points],
                marker=marker,
                label=curve,
            )
        axes.set(xlabel="devices", ylabel="throughput relative to the fewest devices")

    return text + _plot(plots, "scaling", "Throughput against devices", draw)


def _precision(document: dict[str, Any], plots: Path) -> str:
    first = document["rows"][0]
    rows = [
        [
            *(line["precision"], line["seeds"]),
            *(f"{line[m]:.4f} ({line[f'{m} range']})" for m in ("auc", "accuracy")),
            line["seconds"],
        ]
        for line in document["summary"]
    ]
    columns = ["precision", "seeds", "AUC (range over seeds)", "accuracy at 0.5", "seconds"]
    return (
        f"### {_NAMES['precision']}\n\n`{first['recipe']}` on `{first['data']}`, fold 0 held out,"
        f" last of {first['epochs']} epochs.\n\n{_table(columns, rows)}"
    )


def _ahead(document: dict[str, Any], plots: Path) -> str:
    rows = [
        [
            *(row["recipe"], row["batch"], row["devices"], row["forms"]),
            *(row["compile_seconds"], row["launches"], row["memory_mib"]),
            *(row["traffic_mb"], row["bound_ms"]),
        ]
        for row in document["rows"]
    ]
    columns = ["recipe", "batch", "devices", "forms", "compile, s", "launches per step"]
    columns += ["temporary MiB", "memory traffic per step, MB", "bound, ms"]
    return (
        f"### {_NAMES['ahead']}\n\nThe device was not available. Its compiler compiled the steps"
        " of the recipes in bfloat16; nothing was executed. `chosen`: the implementations of layers"
        " and augmentation for this device; `default`: those for all other devices.\n\n"
        f"{_table(columns, rows)}"
    )


def _plot(plots: Path, name: str, alt: str, draw: Callable[[Any], None], height: float = 4) -> str:
    """Draws a plot to a file of the device; returns the Markdown line that shows it."""
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    file = f"{plots.name}-{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": file}):
        figure.savefig(plots.with_name(file), metadata={"Date": None})
    return f"![{alt}](results/{file})\n"


_NAMES = {
    "peers": "Comparison with PyTorch and Keras: `peers`",
    "step_time": "Time of a step: `step_time`",
    "input": "Reading images: `input`",
    "end_to_end": "From the start of the process to a trained network: `end_to_end`",
    "scaling": "Scaling: `scaling`",
    "precision": "Quality in bfloat16: `precision`",
    "ahead": "Compiled ahead of time: `ahead`",
}
_SECTIONS: dict[str, Callable[[dict[str, Any], Path], str]] = {
    "peers": _peers,
    "step_time": _step_time,
    "input": _input,
    "end_to_end": _end_to_end,
    "scaling": _scaling,
    "precision": _precision,
    "ahead": _ahead,
}
_HEAD = """\
<!-- Written by benchmarks/page.py from benchmarks/results/*.json; edit those. -->

# Benchmarks

The results of the modules in this folder. The machines are shared. Therefore the sides of each
comparison alternate within one run (A B C A B C), and the ratios and their spread are more
reliable than the milliseconds. The docstring of each module says how to run it, from the root of
the checkout, and what it measures. `python -m benchmarks.page --run NAME` runs a module (add
`--flags="--data DIR"` for those that need the real images) and writes this page. PyTorch and Keras
need `python -m benchmarks.peers --setup` first. A plus after a commit means that files differed
from it.
"""


def main() -> int:
    """Runs benchmarks, stores results and writes the page; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    for section in options.run:
        print(f"--- {section}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, "-m", f"benchmarks.{section}", "--json", str(out)]
            if subprocess.run([*command, *options.flags.split()], check=False).returncode:
                raise InputError(f"--run {section} failed; see above")
            keep(section, out)
    for named in options.keep:
        path, _, name = named.partition("=")
        if name not in _SECTIONS:
            raise InputError(f"--keep {named}: write FILE=SECTION, with one of {', '.join(_NAMES)}")
        keep(name, Path(path))
    (HERE / "README.md").write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
