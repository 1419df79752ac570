"""The entry of a recipe: its flags, its training, its report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from shlex import quote

import tyro

from cnnjax.cli.common import guarded
from cnnjax.config import Config


def train(default: Config, description: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a recipe: its default config, changed by flags, is trained; exits with the status.

    Args:
        default: what the recipe sets.
        description: the text of `--help`.
        arguments: the command line; `sys.argv[1:]` when None.
    """

    def run() -> int:
        config = tyro.cli(Config, default=default, description=description, args=arguments)
        from cnnjax import report
        from cnnjax.machine import devices
        from cnnjax.train import fit

        result = fit(config)
        rules = result.summary["rules"]
        print(
            f"\nbest epoch {result.summary['best_epoch']} of {result.summary['epochs']},"
            f" on the {result.best.n:,} held-out images that chose it, with 95 % intervals"
        )
        print(result.best.report(result.classes))
        print(
            f"for comparison: the larger class always, accuracy {rules['majority_accuracy']:.4f};"
            f" mean brightness, AUC {rules['brightness_auc']:.4f}"
        )
        page = report.write(config.workdir, devices.make_mesh(config.device))
        print(
            f"\nwritten to {config.workdir}, the story in {page}; judge it on a test split with\n"
            f"  cnnjax evaluate --run {quote(str(config.workdir))}"
            f" --data {quote(config.data.root)} --split test"
        )
        return 0

    sys.exit(guarded(run))
