"""Time of a train step and an eval step by network, batch, size, precision and device count.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --networks resnet --batches 32 128 512 --precisions float32 \\
        bfloat16 --json step_time.json --plot step_time.svg

The train step is that of `cnnjax.train`: it gathers the batch from the data set on the device,
augments it, and updates the weights. On an accelerator, sixteen steps are one call. Tracing,
lowering and compilation are timed separately. Then each round times every row once, so other load
on the machine affects all rows. The time in a round is the mean over a few steps, after as many
steps that are not counted, until the device is idle. The images are random bytes.

Operations are counted from the shapes (matrix products and convolutions) and by XLA. MFU divides
the former by the peak of the device. The bound is the larger of operations divided by the peak and
bytes divided by the memory bandwidth. The bytes are those that XLA counts and the arrays of library
calls, which XLA does not count. Accesses served by a cache count too, so a CPU can be faster than
the bound. An eval step uses full float32 precision, as validation and prediction do; `peaks` has no
peak for this on accelerators.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from benchmarks.measure import circumstances, headline, in_turn, print_table, spread, write_json
from benchmarks.peaks import Peak, called_bytes, count_flops, peak_of
from cnnjax import steps, train
from cnnjax.augment import make_augment
from cnnjax.cli import guarded
from cnnjax.config import AugmentConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.data.batches import Feeder, load
from cnnjax.errors import InputError
from cnnjax.machine import devices
from cnnjax.networks import make_model
from cnnjax.optimizers import make_optimizer

Network = Literal["baseline", "resnet"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Options:
    """What is timed: all combinations of these options."""

    networks: tuple[Network, ...] = ("baseline", "resnet")
    """Networks to time."""
    batches: tuple[int, ...] = (32,)
    """Images per step, over all devices."""
    precisions: tuple[Precision, ...] = ("float32",)
    """Dtypes of the computation."""
    sizes: tuple[int, ...] = (64,)
    """Side of the images, in pixels."""
    counts: tuple[int, ...] = (0,)
    """Numbers of devices; 0 for all. Several devices of a CPU are virtual and share its cores."""
    width: int = 16
    """Channels of the ResNet's first stage."""
    channels: int = 1
    """Number of input channels (the gray image is repeated)."""
    rounds: int = 9
    """Number of rounds after the first, which is not counted."""
    steps: int = 4
    """Calls of a step per round."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""
    plot: Path | None = None
    """Draw throughput against batch size into this file (.svg, .png or .pdf)."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Platform to compute on; it is an error if it is not available."""

    def __post_init__(self) -> None:
        for name in ("width", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name, least in (("batches", 1), ("sizes", 16), ("counts", 0)):
            if min(getattr(self, name), default=least - 1) < least:
                raise InputError(f"--{name} must be numbers of at least {least}")


@dataclass
class Row:
    """Results for one kind of step."""

    network: str
    step: str
    batch: int
    size: int
    precision: str
    devices: int
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    flops: int
    xla_flops: float | None
    bytes: float | None
    memory_mib: float | None
    median_ms: float = 0.0
    quartile1_ms: float = 0.0
    quartile3_ms: float = 0.0
    p95_ms: float = 0.0
    images_per_second: float = 0.0
    images_per_second_per_device: float = 0.0
    mfu: float | None = None
    bound_ms: float | None = None
    of_bound: float | None = None


@dataclass
class Timed:
    """A row to fill in, and the function to time for it."""

    row: Row
    run: Callable[[], None]
    steps: int
    peak: Peak | None


def compiled(
    options: Options, network: Network, batch: int, size: int, precision: Precision, mesh: Mesh
) -> list[Timed]:
    """Compiles the train step and the eval step of one combination."""
    if batch % mesh.size:
        raise InputError(f"--batches {batch} must be a multiple of {mesh.size} devices")
    model = make_model(
        ModelConfig(network, channels=options.channels, width=options.width), jnp.dtype(precision)
    )
    optimizer, _ = make_optimizer(TrainConfig(), 1)
    everywhere = devices.replicated(mesh)
    start: Any = jax.jit(
        lambda key: steps.init_state(model, optimizer, key, size), out_shardings=everywhere
    )(jax.random.key(0))
    rng = np.random.default_rng(0)
    many = 16 * batch
    images = rng.integers(0, 256, (many, size, size), dtype=np.uint8)
    feeder = Feeder(images, rng.integers(0, 2, many).astype(np.int32), mesh, resident_mib=2**14)
    rows = rng.integers(0, many, (16, batch)).astype(np.int32)
    key = jax.device_put(jax.random.key(1), everywhere)
    train_step = steps.make_train_step(model, optimizer, make_augment(AugmentConfig()))
    taken = train.compile_steps(mesh, train_step)
    fused = taken.together > 1
    feeds = list(feeder.feed_together(rows, 16) if fused else feeder.feed(rows))
    eval_step = steps.make_eval_step(model)
    judge = jax.jit(
        lambda state, data, feed: eval_step(state, load(data, feed)),
        out_shardings=devices.divided(mesh),
    )
    alone = next(iter(feeder.feed(rows[:1])))
    peak = peak_of(mesh.devices.flat[0], precision)
    on_cpu = devices.platform(mesh) == "cpu"
    if on_cpu:
        peak = peak.shared(mesh.size)
    forward, whole = count_flops(model, batch, size)

    def prepare(name: str, jitted: Any, arguments: tuple[Any, ...], flops: int) -> Timed:
        seconds = [time.perf_counter()]
        judging = devices.full_float32(mesh) if name == "eval" else contextlib.nullcontext()
        with judging:
            traced = jitted.trace(*arguments)
        seconds.append(time.perf_counter())
        lowered = traced.lower()
        seconds.append(time.perf_counter())
        program = lowered.compile()
        seconds.append(time.perf_counter())
        trace, lower, compile_ = np.diff(seconds).tolist()
        together = taken.together if name == "train" else 1
        counted, memory = program, program.memory_analysis()
        if together > 1:  # XLA counts the body of a loop once, but with all operands
            counted = taken.one.lower(start, feeder.data, alone, key).compile()
        cost = counted.cost_analysis() or {}
        moved = cost.get("bytes accessed")
        if moved is not None:  # XLA does not count library calls
            moved += called_bytes(counted.as_text())
        row = Row(
            network,
            name,
            batch,
            size,
            precision,
            mesh.size,
            trace_seconds=trace,
            lower_seconds=lower,
            compile_seconds=compile_,
            flops=flops,
            xla_flops=cost.get("flops"),
            bytes=moved,
            memory_mib=memory
            and (
                memory.temp_size_in_bytes
                + memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
            )
            / 2**20,
        )
        state = jax.tree.map(jnp.copy, start)

        def run() -> None:
            nonlocal state
            for i in range(options.steps):
                if name == "train":
                    state, out = program(state, feeder.data, feeds[i % len(feeds)], key)
                else:
                    out = program(state, feeder.data, alone)
            jax.block_until_ready((state, out))

        known = on_cpu or name == "train" or precision == "bfloat16"
        return Timed(row, run, options.steps * together, peak if known else None)

    step = taken.many if fused else taken.one
    return [
        prepare("train", step, (start, feeder.data, feeds[0], key), whole),
        prepare("eval", judge, (start, feeder.data, alone), forward),
    ]


def measure(options: Options) -> list[Row]:
    """Times all combinations; returns the rows."""
    whole = devices.make_mesh(DeviceConfig(options.device, max(options.counts)))
    timed: list[Timed] = []
    for count in options.counts:
        mesh = Mesh(whole.devices[: count or None], whole.axis_names)
        for network in options.networks:
            for size in options.sizes:
                for batch in options.batches:
                    for precision in options.precisions:
                        timed += compiled(options, network, batch, size, precision, mesh)
    runs = {str(i): one.run for i, one in enumerate(timed)}
    took = in_turn(runs, options.rounds, settled=True)
    for i, one in enumerate(timed):
        finish(one, [seconds / one.steps for seconds in took[str(i)]])
    return [one.row for one in timed]


def finish(one: Timed, seconds: list[float]) -> None:
    """Fills in the times of a row and the values derived from them."""
    row = one.row
    for name, value in spread(seconds).items():
        setattr(row, name, value)
    median = row.median_ms / 1e3
    row.images_per_second = row.batch / median
    row.images_per_second_per_device = row.images_per_second / row.devices
    if one.peak is None:
        return
    row.mfu = row.flops / row.devices / median / one.peak.flops
    if row.bytes is not None:
        bound = one.peak.bound(row.flops / row.devices, row.bytes)
        row.bound_ms, row.of_bound = bound * 1e3, bound / median


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Plots throughput against batch size, with a line for each network, step and precision."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        name = (row.network, row.step, row.size, row.precision, row.devices)
        lines.setdefault(name, []).append(row)
    for (network, step, size, precision, count), line in lines.items():
        line.sort(key=lambda row: row.batch)
        label = f"{network} {step} {size} px {precision} x{count}"
        x, y = [row.batch for row in line], [row.images_per_second for row in line]
        axes.plot(x, y, marker="o" if step == "train" else "s", label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title=title)
    axes.set_xticks(sorted({row.batch for row in rows}), minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: {error}") from None


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured too
    found = circumstances(DeviceConfig(options.device, max(options.counts)))
    rows = measure(options)
    print(headline(found))
    columns = [*("network", "step", "batch", "px", "precision", "devices")]
    columns += ["trace s", "lower s", "compile s", "median ms", "q1", "q3", "p95"]
    columns += ["images/s", "MFU %", "of bound %", "MiB"]
    print_table(
        columns,
        [
            [
                *(row.network, row.step, row.batch, row.size, row.precision, row.devices),
                *(row.trace_seconds, row.lower_seconds, row.compile_seconds),
                *(row.median_ms, row.quartile1_ms, row.quartile3_ms, row.p95_ms),
                row.images_per_second,
                None if row.mfu is None else 100 * row.mfu,
                None if row.of_bound is None else 100 * row.of_bound,
                row.memory_mib,
            ]
            for row in rows
        ],
    )
    if options.plot is not None:
        draw(rows, options.plot, found["device"])
    if options.json is not None:
        asked = asdict(options)
        del asked["json"], asked["plot"]
        write_json(
            options.json,
            {"circumstances": found, "options": asked, "rows": [asdict(row) for row in rows]},
        )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
