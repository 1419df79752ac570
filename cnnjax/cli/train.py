"""`cnnjax train`, and what a script of one's own calls to do the same: `train_recipe`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import tyro

from cnnjax import recipes
from cnnjax.cli.common import guarded
from cnnjax.config import Config
from cnnjax.errors import InputError, first_line

if TYPE_CHECKING:
    from cnnjax.train import Result

RECIPES = {"baseline": recipes.baseline, "pneumonia": recipes.pneumonia}
_DEFAULT = "pneumonia"
_ABOUT = """Train a network, or go on with a run that was stopped.

  cnnjax train [baseline | pneumonia | FILE.py] [flags]

baseline is the blog post's network, pneumonia (the default) our own. FILE.py is a Python file of
yours whose CONFIG is a cnnjax.Config. The flags below change the recipe; their defaults are those
of: """


@dataclass(frozen=True)
class Train:
    """Train a network: by the recipe baseline or pneumonia, or by a Python file of yours."""

    # Its flags depend on the recipe, so `main` gives all that follows the word to `train`.
    arguments: tyro.conf.Positional[tuple[str, ...]] = ()

    def __call__(self) -> int:
        """Trains; returns the exit status."""
        return train(self.arguments)


def train(arguments: Sequence[str]) -> int:
    """Trains the recipe that the arguments of `cnnjax train` begin with; returns the exit status.

    Raises:
        InputError: there is no such recipe; and see `cnnjax.fit`.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else _DEFAULT
    config = RECIPES[name] if name in RECIPES else _read(name)
    prog = f"cnnjax train {name}" if named else "cnnjax train"
    return _train(config, _ABOUT + name, arguments[1:] if named else arguments, prog)


def train_recipe(default: Config, description: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a recipe as a script: its flags, its training, its report; exits with the status.

    Args:
        default: what the recipe sets.
        description: the text of `--help`.
        arguments: the command line; `sys.argv[1:]` when None.
    """
    sys.exit(guarded(lambda: _train(default, description, arguments)))


def _read(name: str) -> Config:
    """Returns the `CONFIG` of a Python file."""
    path = Path(name)
    if path.suffix != ".py":
        raise InputError(
            f"there is no recipe {name}; give {', '.join(RECIPES)}, or a Python file (.py) whose"
            " CONFIG is a cnnjax.Config"
        )
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a recipe")
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE.py` has it
    try:
        config = runpy.run_path(str(path), run_name=path.stem).get("CONFIG")
    except InputError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise InputError(f"{path} cannot be run ({kind}: {first_line(error)})") from None
    if not isinstance(config, Config):
        raise InputError(f"{path} has no CONFIG that is a cnnjax.Config; add one")
    return config


def _train(
    default: Config, description: str, arguments: Sequence[str] | None, prog: str | None = None
) -> int:
    config = tyro.cli(Config, default=default, description=description, args=arguments, prog=prog)
    from cnnjax import report
    from cnnjax.machine import devices, processes
    from cnnjax.train import fit

    result = fit(config)
    if not processes.is_main():
        return 0
    print(f"\n{_told(result)}")
    mesh = devices.local_mesh(devices.make_mesh(config.device, config.distributed))
    with processes.alone():  # the others have ended, or wait for this one to end
        page = report.write(config.workdir, mesh)
    print(f"\nwritten to {config.workdir}; to see what it learned and where it errs, open")
    print(f"  {page}")
    if advice := _advice(config):
        print(advice)
    return 0


def _told(result: Result) -> str:
    """Returns what training came to, as text of at most 80 columns."""
    summary, found = result.summary, result.best
    rules, half = summary["rules"], summary.get("at_0.5", {}).get("best")
    if half is None:  # three and more classes, which are decided for the most probable one
        own, size = "", "largest"
    else:
        own, size = (
            (
                f"at the network's own probability 0.5, before calibration:"
                f" accuracy {half['accuracy']:.4f},\n"
                f"  sensitivity {half['sensitivity']:.4f}, specificity {half['specificity']:.4f}\n"
            ),
            "larger",
        )
    views = "1 view" if summary["views"] == 1 else f"{summary['views']} views"
    return (
        f"best epoch, {summary['best_epoch']} of {summary['epochs']}, by {views} of each image,"
        " with 95 % intervals, on the\n"
        f"{found.n:,} held-out images, which also chose the epoch and the operating point\n\n"
        f"{found.report(result.classes)}\n\n"
        f"{own}without a network: the {size} class always,"
        f" accuracy {rules['majority_accuracy']:.4f};\n"
        f"  mean brightness, AUC {rules['brightness_auc']:.4f}"
    )


def _advice(config: Config) -> str:
    """Returns how to evaluate the run on what took no part in it, if its data have such a split."""
    from cnnjax.data.prepare import open_index

    try:
        splits = {e.split for e in open_index(config.data, lambda _: None).examples}
    except InputError:  # gone meanwhile
        return ""
    if "test" not in splits:
        return ""
    table = f" --table {quote(str(config.data.table))}" if config.data.table else ""
    return (
        "and evaluate it on the test split, which took no part in training, with\n"
        f"  cnnjax evaluate --run {quote(str(config.workdir))}"
        f" --data {quote(config.data.root)}{table} --split test"
    )
