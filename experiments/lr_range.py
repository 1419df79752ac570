"""Learning-rate range test: the loss while the learning rate grows from step to step.

    python experiments/lr_range.py pneumonia --data.root DIR --out lr_range.svg

The method is that of Smith, "Cyclical learning rates for training neural networks", WACV 2017
(arXiv:1506.01186), section 3.3, but the rate grows by a constant factor instead of a constant
amount. The recipe is trained once, from its initial weights or those of `--train.init`. The rate
grows from `--low` to `--high`; the test ends early if the smoothed loss reaches four times its
minimum.

A good rate lies where the loss falls fast, well below the rate where it begins to rise. The script
prints the rate of the steepest descent and the rate of the minimum loss; a tenth of the latter is a
common choice. Both are rough and depend on batch size, optimizer and seed: look at the plot, and
try the rate.

The test uses the recipe's optimizer, weight decay, clipping and augmentation, but not its schedule.
It writes only the plot and, with `--json`, the curve. Hardware: 2 cores of an AMD EPYC (Zen 3). 200
steps of the default recipe take about 20 s after decoding and compiling, estimated from 0.1 s per
step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm

from cnnjax import recipes
from cnnjax.augment import make_augment
from cnnjax.cli import guarded
from cnnjax.cli.common import expect_place
from cnnjax.config import Config
from cnnjax.errors import InputError
from cnnjax.machine import devices
from cnnjax.objectives import Batch, Objective
from cnnjax.optimizers import layers_of, optimizer_at
from cnnjax.report.plots import BLUE, GREEN, ORANGE, svg
from cnnjax.run.opening import open_run
from cnnjax.run.training import Run
from cnnjax.run.workdir import write_json
from cnnjax.steps import Metrics, TrainState, make_train_step
from cnnjax.train import calls, compile_steps

SMOOTHING = 0.95  # decay of the moving average of the loss
DIVERGED = 4  # the test ends when the smoothed loss exceeds its minimum by this factor


@dataclass(frozen=True)
class Options:
    """The recipe and the range of learning rates."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    low: float = 1e-6
    """Lowest learning rate, at the first step."""
    high: float = 1.0
    """Highest learning rate, at the last step."""
    steps: int = 200
    """Number of steps."""
    out: Path = Path("lr_range.svg")
    """Output file of the plot (SVG)."""
    json: Path | None = None
    """Write learning rates and losses to this file."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise InputError(f"--low must be positive and below --high, got {self.low}")
        if self.steps < 10:
            raise InputError(f"--steps must be at least 10, got {self.steps}")
        expect_place(self.out, "--out")
        expect_place(self.json, "--json")


def losses_of(run: Run, options: Options) -> Iterator[float]:
    """Yields the mean loss of each step's batch while the learning rate grows.

    Ends early if the loss or a gradient of a step is not finite.
    """
    config = run.config
    rate = rate_of(options)
    layers = layers_of(run.network, config.data.size) if config.train.layer_decay < 1 else ()
    optimizer = optimizer_at(rate, config.train, layers=layers)
    augment = make_augment(config.augment)

    def train_step(
        state: TrainState, batch: Batch, given: tuple[jax.Array, Objective]
    ) -> tuple[TrainState, Metrics]:
        key, objective = given
        step = make_train_step(
            run.network, optimizer, augment, objective, freeze=config.train.freeze
        )
        return step(state, batch, key)

    steps, feeder = compile_steps(run.mesh, train_step), run.feeder()
    given = jax.device_put(
        (jax.random.key(config.seed), run.objective), devices.replicated(run.mesh)
    )
    state = run.first_state()
    taken = epoch = 0
    while taken < options.steps:
        epoch += 1
        order = run.order(epoch)[: options.steps - taken]
        taken += len(order)
        for step, feed in calls(steps, feeder, order):
            state, sums = step(state, feeder.data, feed, given)
            found = jax.device_get(sums)
            each = np.ravel(found.loss) / np.ravel(found.images)
            for loss, rejected in zip(each.tolist(), np.ravel(found.rejected), strict=True):
                if rejected:
                    return
                yield loss


def rate_of(options: Options) -> optax.Schedule:
    """Returns the schedule: exponential growth from `low` to `high`."""
    return optax.exponential_decay(options.low, options.steps - 1, options.high / options.low)


def find_range(options: Options) -> dict[str, Any]:
    """Runs the test.

    Returns:
        A document of plain JSON: the lists `rates`, `losses` and `smooth` (the smoothed losses) by
        step; `steepest`, the rate of the steepest descent; `least`, the rate of the minimum loss.

    Raises:
        InputError: the loss is not finite within the first ten steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        train = replace(
            options.config.train, ema=0.0
        )  # the moving average does not affect the loss
        config = replace(options.config, workdir=Path(folder) / "run", train=train)
        losses: list[float] = []
        smooth: list[float] = []
        mean = 0.0
        with open_run(config) as run, tqdm(total=options.steps, unit="step", disable=None) as bar:
            for loss in losses_of(run, options):
                losses.append(loss)
                mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
                smooth.append(mean / (1 - SMOOTHING ** len(losses)))  # bias correction
                bar.update()
                if smooth[-1] > DIVERGED * min(smooth):
                    break
    rates = [float(rate_of(options)(i)) for i in range(len(losses))]
    if len(losses) < 10:
        raise InputError(f"the loss is not finite from --low {options.low:g} on; give a lower one")
    least = int(np.argmin(smooth))
    slope = np.gradient(np.array(smooth), np.log(rates))
    return {
        "rates": rates,
        "losses": losses,
        "smooth": smooth,
        "steepest": rates[int(np.argmin(slope[: least + 1]))],
        "least": rates[least],
    }


def draw(found: dict[str, Any]) -> str:
    """Returns a plot as SVG: loss by learning rate, with the two rates of `find_range` marked."""

    def curve(axes: Any) -> None:
        axes.plot(found["rates"], found["losses"], ".", color=BLUE, ms=2, alpha=0.5, label="step")
        axes.plot(found["rates"], found["smooth"], color=BLUE, label="smoothed")
        for name, color, dash in (("steepest", GREEN, "--"), ("least", ORANGE, ":")):
            label = f"{name}, {found[name]:.1e}"
            axes.axvline(found[name], color=color, ls=dash, label=label)
        top = 1.2 * max(found["smooth"][:10])
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats", ylim=(0, top))

    return svg("lr-range", curve)


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    options = tyro.extras.overridable_config_cli(
        {
            "baseline": ("The blog post's recipe.", Options(recipes.baseline)),
            "pneumonia": ("The default recipe.", Options(recipes.pneumonia)),
        },
        description=__doc__,
    )
    found = find_range(options)
    options.out.write_text(draw(found), "utf-8")
    if options.json is not None:
        write_json(options.json, found)
    print(
        f"\nsteepest descent at {found['steepest']:.2g}, minimum loss at {found['least']:.2g}"
        f" (a tenth: {found['least'] / 10:.2g}); the plot is in {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
