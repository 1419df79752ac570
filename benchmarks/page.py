"""Runs the benchmarks, keeps what they find in `results/`, and makes `README.md` of it.

    python -m benchmarks.page                               # the page, from the results kept
    python -m benchmarks.page --run peers step_time         # measure these anew, then the page
    python -m benchmarks.page --keep gpu.json=step_time     # take a result from elsewhere

There is one file of results for each device, named after it, with a section for each benchmark.
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
    """What to do before the page is made."""

    run: tuple[Section, ...] = ()
    """Benchmarks to run now."""
    flags: str = ""
    """Flags for them, such as --flags="--data DIR"; those that a benchmark does not have stop it.
    """
    keep: tuple[str, ...] = ()
    """FILE=SECTION: results that a benchmark wrote with --json."""


def keep(section: str, path: Path) -> None:
    """Puts what a benchmark wrote into the results of its device."""
    try:
        document = json.loads(path.read_text("utf-8"))
        kind = document["circumstances"]["device_kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of a benchmark ({error})") from None
    if document["circumstances"]["platform"] == "cpu":
        kind = document["circumstances"]["processor"]
    name = "-".join(re.findall("[a-z0-9]+", kind.lower().replace("(r)", "")))
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{name}.json"
    sections = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    write_json(kept, sections | {section: document})


def page(plots: Path = RESULTS) -> str:
    """Returns the text of README.md, and writes the plots that it shows into a folder."""
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
        # What is compiled ahead is for devices that are not at hand; and the CPU reads the images.
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
            # Before bytes were counted with those of the convolutions, it was no bound.
            None if row.get("bytes") is None else _percent(row["of_bound"]),
            row["memory_mib"],
        ]
        for row in document["rows"]
    ]
    columns = ["network", "step", "batch", "pixels", "precision", "devices", "compile, s"]
    columns += ["step, ms (quartiles)", "images/s", "MFU, %", "of the roofline, %", "MiB"]
    plot = _throughput(document["rows"], plots)
    note = (
        "MFU (model FLOPs utilization) is of the device's peak. The roofline's bytes are those that"
        " XLA counts and those of the calls into libraries, over the bandwidth of memory; what a"
        " cache serves beats it. It is empty where it was measured before the calls were counted,"
        " as both are where no peak is known: of float32 in full, on an accelerator."
        " Augmentation is part of the train step."
        " Both networks see one channel, and `resnet` has 16 at first (the library's default is"
        " 32); the recipes' networks are in `peers`.\n"
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
    """Returns what a plot calls a row: some values, and others where they tell rows apart."""
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
    proven = "Nothing was compared (bfloat16 alone is not)"
    if proofs:
        logits, losses = (max(proof[name] for proof in proofs) for name in ("logits", "losses"))
        proven = f"Logits of the same weights agree within {logits:.1g}"
        proven += f", losses over ten steps within {losses:.1g}"

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
        " those of the recipes as the commit below has them, without augmentation. The baseline's"
        " three channels are one gray image: the peers convolve all three, ours the sum of their"
        " filters with one. Keras's batches come by `tf.data`, from the host's memory. The ratio is"
        " the median of the rounds' ratios, so it need not be that of the two medians.\n\n"
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
        f"Share of training, after the first epoch, spent waiting for data: {waiting}.\n"
    )


def _end_to_end(document: dict[str, Any], plots: Path) -> str:
    rows = [
        [
            *(row[key] for key in ("job", "by", "start", "files", "epochs", "seconds")),
            _phases(row.get("phases")),
        ]
        for row in document["rows"]
    ]
    columns = ["job", "by", "start", "files", "epochs", "seconds", "of these"]
    text = f"### {_NAMES['end_to_end']}\n\n{_table(columns, rows)}"
    reached = document.get("time_to_quality") or []
    if reached:
        quality = [
            [
                *(row["recipe"], row["auc"], row["seconds"] or "not reached"),
                row.get("compiling_seconds"),  # earlier, that of the whole job was kept
            ]
            for row in reached
        ]
        columns = ["recipe", "held-out AUC", "seconds from the start", "of these compiling"]
        text += "\n" + _table(columns, quality)
    return text


def _phases(phases: dict[str, float] | None) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in (phases or {}).items())


def _scaling(document: dict[str, Any], plots: Path) -> str:
    text = f"### {_NAMES['scaling']}\n\n"
    text += (
        "Each point is a process of its own, one after another: where the machine is shared, so are"
        " its moods.\n\n"
    )
    if document["circumstances"]["platform"] == "cpu":
        text += (
            "A CPU's devices are virtual: they share the cores, and from two on they have XLA's"
            " convolutions instead of oneDNN's. The curves show what dividing costs, not what more"
            " hardware brings.\n\n"
        )
    for curve, title in (
        ("weak", "Weak scaling: the same batch for each device"),
        ("strong", "Strong scaling: one batch divided"),
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
        axes.set(xlabel="devices", ylabel="throughput over that of the fewest devices")

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
    columns = ["recipe", "batch", "devices", "forms", "compile, s", "launches a step"]
    columns += ["temporary MiB", "memory traffic of a step, MB", "bound, ms"]
    return (
        f"### {_NAMES['ahead']}\n\nThe device was not at hand: its compiler made the"
        " recipes' steps, in bfloat16, and nothing ran. `chosen` are the forms of layers and"
        " augmentation that a device gets, `default` those of all others.\n\n"
        f"{_table(columns, rows)}"
    )


def _plot(plots: Path, name: str, alt: str, draw: Callable[[Any], None], height: float = 4) -> str:
    """Draws into the device's file of that name; returns the line that shows it."""
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
    "peers": "Beside PyTorch and Keras: `peers`",
    "step_time": "One step: `step_time`",
    "input": "Reading images: `input`",
    "end_to_end": "From start to a trained network: `end_to_end`",
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
<!-- Made by benchmarks/page.py from benchmarks/results/*.json; edit those. -->

# Benchmarks

What the modules here measured. Every comparison with others is made in turn within one run, A B C
A B C, since the machines are shared: trust the ratios, and their spread, before the milliseconds.
Each module's first lines say how to run it, from the root of the checkout, and what it counts;
`python -m benchmarks.page --run NAME` runs one (with `--flags="--data DIR"` those that train on the
real images) and makes this page anew. PyTorch and Keras need `python -m benchmarks.peers --setup`
first. A plus behind a commit says that files differed from it.
"""


def main() -> int:
    """Runs, keeps and writes; returns the exit status."""
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
