"""The command line: one module for each command of `cnnjax`.

Modules that import JAX are imported inside functions. This keeps `cnnjax --help` fast, and
`cnnjax.machine.devices.make_mesh` can still split the CPU into devices before JAX starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from cnnjax import __version__
from cnnjax.cli.check import Check
from cnnjax.cli.common import guarded
from cnnjax.cli.devices import Devices
from cnnjax.cli.evaluate import Evaluate
from cnnjax.cli.export import Export
from cnnjax.cli.phantom import Phantom
from cnnjax.cli.predict import Predict
from cnnjax.cli.report import Report
from cnnjax.cli.train import Train, train_recipe

__all__ = ["guarded", "main", "train_recipe"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `cnnjax` command and exits with its status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        print(f"cnnjax {__version__}")
        sys.exit(0)
    if given[:1] == ["train"]:  # the defaults of its flags depend on the recipe
        sys.exit(guarded(Train(tuple(given[1:]))))
    commands: Any = (
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Phantom, tyro.conf.subcommand("phantom")]
        | Annotated[Devices, tyro.conf.subcommand("devices")]
    )
    sys.exit(guarded(lambda: tyro.cli(commands, prog="cnnjax", args=given)()))
