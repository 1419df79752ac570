"""Opens a run: claims its workdir, reads its data, makes its parts and prints what it found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cnnjax.config import Config
from cnnjax.data.cache import write_quarantine
from cnnjax.data.duplicates import write_duplicates
from cnnjax.data.onthefly import expect_workers
from cnnjax.data.patients import write_split
from cnnjax.data.prepare import TrainingData, protocol, training_data
from cnnjax.errors import InputError
from cnnjax.machine import devices, processes
from cnnjax.networks import model_of
from cnnjax.networks.imported import expect_logits
from cnnjax.objectives import Binary, Objective, Softmax, objective_of
from cnnjax.operating import expect_decidable
from cnnjax.phantom import DRAWN, is_drawn
from cnnjax.run import initial
from cnnjax.run.parts import Parts, expect_together
from cnnjax.run.trace import expect_writable
from cnnjax.run.training import Run
from cnnjax.run.workdir import Workdir, append_line, claim, versions

_NOTHING_GIVEN = Parts()


@contextlib.contextmanager
def open_run(
    config: Config,
    data: TrainingData | None = None,
    given: Parts = _NOTHING_GIVEN,
) -> Iterator[Run]:
    """Claims the workdir, reads the data and yields the run, ready to train; see `fit`."""
    expect_together(given, config)
    expect_writable(config.profile)
    mesh = devices.make_mesh(config.device, config.distributed)
    config = _with_precision(config, mesh)
    with processes.quiet(), claim(config) as workdir:
        found = versions()
        print(f"cnnjax    {found['cnnjax']} on jax {found['jax']}, flax {found['flax']}")
        begins = config.train.init != "random" and not processes.on_main(lambda: workdir.begun)
        # Read before the images, which take longer: errors in the flags are reported at once.
        weights = initial.read(config.train.init, config.data.fold) if begins else None
        parts = config.train.accumulate
        flag = "--train.batch" + (" / --train.accumulate" if parts > 1 else "")
        mesh, whole = devices.dividing(mesh, config.train.batch // parts, flag), mesh
        some = f", of {whole.size}: it must divide a batch evenly" if mesh.size < whole.size else ""
        print(f"devices   {devices.describe(mesh)}{some}")
        drawn = data is None and is_drawn(config.data.root)
        if data is None:
            data = training_data(config.data, config.seed, print, mesh)
        if drawn:
            print(f"note      {DRAWN}")
        network, objective = given.network, given.objective
        if network is None:
            network = model_of(config, data.classes)
        if objective is None:
            objective = objective_of(config.train, data.classes, data.labels[data.train])
        # Checked before the workdir is claimed: the user can correct the flags and try again.
        if given.network or given.objective or ":" in config.model.name:
            _expect_outputs(network, objective, config.data.size, len(data.classes))
        if isinstance(objective, Softmax):
            expect_decidable(config.operating, len(data.classes))
        initial.expect_fit(network, config, weights)
        workdir.claim_data(data.decoded.fingerprint, data.classes, drawn)
        processes.on_main(lambda: _claim_rest(workdir, data, given))
        append_line(workdir.sessions, {"devices": devices.describe(mesh), "versions": found})
        given = given._replace(network=network, objective=objective)
        with contextlib.closing(Run(config, data, workdir, mesh, given, weights)) as run:
            if run.workers:
                expect_workers()
            _describe(run)
            run.mend()
            yield run


def _claim_rest(workdir: Workdir, data: TrainingData, given: Parts) -> None:
    """Records or checks the parts and the split of a run, and writes the tables of its images."""
    workdir.claim_parts(given.described())
    workdir.expect_split(data.decoded.examples.names, data.held_out)
    write_split(workdir.split, data.decoded.examples, data.held_out)
    write_quarantine(workdir.quarantine, data.decoded.quarantine)
    write_duplicates(workdir.duplicates, data.duplicates)


def _with_precision(config: Config, mesh: Mesh) -> Config:
    """Replaces `--train.precision auto`; a resumed run keeps its precision on any device."""
    if config.train.precision != "auto":
        return config
    workdir = Workdir(config.workdir)
    begun = workdir.read_config().train.precision if workdir.begun else None
    precision = begun or devices.traits(mesh).precision
    return replace(config, train=replace(config.train, precision=precision))


def _expect_outputs(network: Any, objective: Objective, size: int, classes: int) -> None:
    """Raises InputError if the network's outputs do not have the shape the objective expects."""
    if isinstance(objective, Binary):
        if classes > 2:
            raise InputError(
                f"Binary is for two classes, not {classes}; give Softmax, or no objective"
            )
        expect_logits(network, size, classes, outputs=1)
    elif isinstance(objective, Softmax):
        expect_logits(network, size, classes, outputs=classes)


def _place(run: Run) -> str:
    """Returns where the images are during training, and why."""
    if run.resident:
        return "on the device"
    data = run.config.data
    over = f"larger than --data.resident-mib {data.resident_mib:,}"
    if not run.workers:
        return f"streamed from the cache\n  {over}"
    by = f"{run.workers} worker process" + ("es" if run.workers > 1 else "")
    return f"decoded on the fly by {by}\n  {over} and --data.cache-mib {data.cache_mib:,}"


def _describe(run: Run) -> None:
    """Prints the split, the images, the network and the state of the run."""
    config, data = run.config, run.data
    size = config.data.size
    print(f"split     {protocol(config.data, config.seed)}")
    for name, rows in (("train", data.train), ("validate", data.validation)):
        counts = np.bincount(data.labels[rows], minlength=len(data.classes))
        shown = (f"{n:,} {c}" for n, c in zip(counts, data.classes, strict=True))
        print(f"  {name:<8} {', '.join(shown)}")
    if config.train.auxiliary and not run.auxiliary:
        print(f"  --train.auxiliary has no effect for the classes {', '.join(data.classes)}")
    if run.auxiliary:
        viral = data.decoded.viral[data.train]
        known = f"{(viral == 0).sum():,} bacterial, {(viral == 1).sum():,} viral"
        both = {0, 1} <= set(viral)
        idle = "" if both else ": --train.auxiliary needs images of both causes"
        print(f"  by name  {known}{idle}")
    print(
        f"images    {size} x {size}, {data.decoded.images.nbytes / 2**20:,.0f} MiB, {_place(run)}"
    )
    name = type(run.network).__name__
    print(f"network   {name}, {run.parameters:,} parameters")
    print(f"workdir   {config.workdir}")
    at = "at probability 0.5, uncalibrated; " if isinstance(run.objective, Binary) else ""
    print(f"validate  {at}* new best by {config.train.best}")
    if run.steps_done:
        within = f" and {run.within} steps" if run.within else ""
        print(f"resuming after epoch {run.done}{within}")
