"""Trains several networks at once in one compiled step with `vmap`; for accelerators.

    python experiments/ensemble.py --data.root DIR --workdir RUN --members 5

A single small network leaves most of an accelerator idle. This script stacks the states of all
members along a new first axis and maps the train step over it. Member k holds out fold k; its
workdir is RUN/foldk. Each member is an ordinary run, equal up to rounding to one trained by
`cnnjax.fit`. `crossval.py` with the same flags therefore finds the finished runs and only evaluates
them. On a CPU, `crossval.py` alone is faster.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pneumonia
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from cnnjax.cli import guarded
from cnnjax.config import Config
from cnnjax.data.batches import Resident, load
from cnnjax.errors import InputError, TrainingError
from cnnjax.logits import make_logits
from cnnjax.machine import devices
from cnnjax.run.opening import open_run
from cnnjax.run.result import Result
from cnnjax.run.training import STEP, Run
from cnnjax.steps import Metrics, TrainState
from cnnjax.train import fit, means


@dataclass(frozen=True)
class Options:
    """The recipe and the number of members."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(
        default_factory=lambda: pneumonia.CONFIG
    )
    members: int = 5
    """Number of members; they hold out the first folds."""

    def __post_init__(self) -> None:
        if not 1 <= self.members <= self.config.data.folds:
            raise InputError(f"--members must be between 1 and {self.config.data.folds}")


def fit_together(configs: Sequence[Config]) -> list[Result]:
    """Trains members that differ only in workdir, seed and fold, in one compiled step.

    Each device computes the same number of members, and devices do not wait for each other. For
    example, ten members use five of eight devices. Five members use three of four devices; the
    first member is computed twice to fill the third device. If the members are at different epochs
    after a stop, they are trained one after another by `fit`.

    Args:
        configs: the config of each member; their data must fit on one device.

    Returns:
        The result of each member, as from `fit`.

    Raises:
        InputError: see `fit`; or the members have different images.
        TrainingError: see `fit`.
    """
    if configs[0].train.patience:
        raise InputError("--train.patience has no effect here; give --train.epochs")
    mesh = devices.make_mesh(configs[0].device)
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(open_run(config)) for config in configs]
        first = runs[0]
        shared = {
            (run.data.decoded.fingerprint, run.steps_per_epoch, run.steps_done) for run in runs
        }
        whole = not first.steps_done % first.steps_per_epoch
        if len(shared) == 1 and whole and all(run.resident for run in runs):
            _train(runs, mesh)
        elif {run.data.decoded.fingerprint for run in runs} != {first.data.decoded.fingerprint}:
            raise InputError("the members of an ensemble must have the same images")
    return [fit(config) for config in configs]  # finishes each run and returns its result


def _train(runs: list[Run], mesh: Mesh) -> None:
    first, count = runs[0], len(runs)
    each = -(-count // mesh.size)
    mesh = Mesh(mesh.devices[: -(-count // each)], mesh.axis_names)
    filled = [*runs, *[first] * (each * mesh.size - count)]
    by_member = devices.divided(mesh)
    data = jax.device_put(first.feeder().data, devices.replicated(mesh))

    def step(
        states: TrainState, data: Resident, feeds: jax.Array, given: Any
    ) -> tuple[TrainState, Metrics]:
        def one(state: TrainState, feed: jax.Array, given: Any) -> tuple[TrainState, Metrics]:
            return first.train_step(state, load(data, feed), given)

        return jax.vmap(one)(states, feeds, given)

    def many(
        states: TrainState, data: Resident, feeds: jax.Array, given: Any
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda s, feed: step(s, data, feed, given), states, feeds)

    # Without shard_map, XLA would gather the feature maps of all members on every device: `vmap`
    # over kernels makes grouped convolutions, which XLA does not shard.
    member, by_step, whole = by_member.spec, PartitionSpec(None, devices.AXIS), PartitionSpec()
    shard = functools.partial(
        jax.shard_map, mesh=mesh, check_vma=False, in_specs=(member, whole, by_step, member)
    )
    epoch_of = jax.jit(shard(many, out_specs=(member, by_step)), donate_argnums=0)

    def stacked(trees: Sequence[Any]) -> Any:
        return jax.device_put(
            jax.tree.map(lambda *x: np.stack([np.asarray(each) for each in x]), *trees), by_member
        )

    keys = jax.device_put(jnp.stack([run.key(STEP) for run in filled]), by_member)
    objectives = jax.tree.map(lambda x: np.float32(x), [run.objective for run in filled])
    given = keys, stacked(objectives)
    states = stacked(
        [
            jax.device_get(run.restored("latest") if run.done else run.first_state())
            for run in filled
        ]
    )
    outputs_of, feeder = make_logits(first.network, first.mesh), first.feeder()
    fused = max(1, devices.traits(mesh).steps)
    epochs = range(first.done + 1, first.config.train.epochs + 1)
    for epoch in tqdm(epochs, "epoch", disable=None):
        start = time.perf_counter()
        order = np.stack([run.order(epoch) for run in filled], axis=1)  # [steps, members, batch]
        sums: list[Metrics] = []
        for at in range(0, len(order), fused):
            feeds = jax.device_put(order[at : at + fused], NamedSharding(mesh, by_step))
            states, found = epoch_of(states, data, feeds, given)
            sums.append(found)
        parts: list[Any] = [np.concatenate(x) for x in zip(*jax.device_get(sums), strict=True)]
        taken, each_state = Metrics(*parts), jax.device_get(states)  # metrics [steps, members]
        if np.any(taken.rejected):
            raise TrainingError(
                f"the loss of a member is not finite in epoch {epoch}; train it with fit"
            )
        middle = time.perf_counter()
        for i, run in enumerate(runs):
            state = jax.device_put(
                jax.tree.map(lambda x, i=i: x[i], each_state), devices.replicated(run.mesh)
            )
            trained = means(Metrics(*(x[:, i] for x in taken)))
            outputs = outputs_of(state, feeder, run.data.validation)
            seconds = middle - start, time.perf_counter() - middle
            tqdm.write(run.record(state, trained, outputs, seconds))


def main() -> int:
    """Reads the flags and runs; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    config = options.config
    fit_together(
        [
            replace(config, workdir=config.workdir / f"fold{k}", data=replace(config.data, fold=k))
            for k in range(options.members)
        ]
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
