"""`cnnjax train`, and `train_recipe`, which does the same for a user's own script."""

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
    from cnnjax.run.result import Result

RECIPES = {"baseline": recipes.baseline, "pneumonia": recipes.pneumonia}
_DEFAULT = "pneumonia"
_ABOUT = """Train a network, or resume a run that was stopped.

  cnnjax train [baseline | pneumonia | FILE.py] [flags]

The recipe pneumonia is the default; the recipe baseline reproduces the blog post. FILE.py is a
Python file that sets CONFIG to a cnnjax.Config. The flags below change the recipe. The defaults
shown are those of the recipe: """


@dataclass(frozen=True)
class Train:
    """Train a network with the recipe baseline or pneumonia, or with a recipe in a Python file."""

    # The flags depend on the recipe, so `main` passes all arguments after `train` unparsed.
    arguments: tyro.conf.Positional[tuple[str, ...]] = ()

    def __call__(self) -> int:
        """Trains; returns the exit status."""
        return train(self.arguments)


def train(arguments: Sequence[str]) -> int:
    """Trains a recipe; returns the exit status.

    Args:
        arguments: those of `cnnjax train`: the name of the recipe or its file, then flags. Without
            a name, the default recipe.

    Raises:
        InputError: there is no such recipe; see also `cnnjax.fit`.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else _DEFAULT
    config = RECIPES[name] if name in RECIPES else _read(name)
    prog = f"cnnjax train {name}" if named else "cnnjax train"
    return _train(config, _ABOUT + name, arguments[1:] if named else arguments, prog)


def train_recipe(default: Config, description: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a recipe as a script: parses the flags, trains, writes the report, and exits.

    Args:
        default: configuration of the recipe; flags change it.
        description: the text of `--help`.
        arguments: the command line; `sys.argv[1:]` if None.
    """
    sys.exit(guarded(lambda: _train(default, description, arguments)))


def _read(name: str) -> Config:
    """Returns the `CONFIG` of a Python file."""
    path = Path(name)
    if path.suffix != ".py":
        raise InputError(
            f"there is no recipe {name}; give {', '.join(RECIPES)}, or a Python file (.py) that"
            " sets CONFIG to a cnnjax.Config"
        )
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a recipe")
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE.py` does
    try:
        config = runpy.run_path(str(path), run_name=path.stem).get("CONFIG")
    except InputError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise InputError(f"{path} cannot be run ({kind}: {first_line(error)})") from None
    if not isinstance(config, Config):
        raise InputError(f"{path} does not set CONFIG to a cnnjax.Config")
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
    with processes.alone():  # the other processes have ended or wait for this one
        page = report.write(config.workdir, mesh)
    print(f"\nwritten to {config.workdir}; for metrics, mistakes and heat maps, open the report")
    print(f"  {page}")
    if advice := _advice(config):
        print(advice)
    return 0


def _told(result: Result) -> str:
    """Returns the results of training as text, at most 80 columns wide."""
    summary, found = result.summary, result.best
    rules, half = summary["rules"], summary.get("at_0.5", {}).get("best")
    if half is None:  # three or more classes: the most probable one is predicted, no threshold
        own, size = "", "largest"
    else:
        own, size = (
            (
                f"at probability 0.5, before calibration:"
                f" accuracy {half['accuracy']:.4f},\n"
                f"  sensitivity {half['sensitivity']:.4f}, specificity {half['specificity']:.4f}\n"
            ),
            "larger",
        )
    views = "1 view" if summary["views"] == 1 else f"{summary['views']} views"
    return (
        f"best epoch: {summary['best_epoch']} of {summary['epochs']}, {views} of each image,"
        " with 95 % intervals, on the\n"
        f"{found.n:,} held-out images, which also chose the epoch and the operating point\n\n"
        f"{found.report(result.classes)}\n\n"
        f"{own}without a network: always the {size} class,"
        f" accuracy {rules['majority_accuracy']:.4f};\n"
        f"  mean brightness, AUC {rules['brightness_auc']:.4f}"
    )


def _advice(config: Config) -> str:
    """Returns the command that evaluates the run on the test split; empty if there is none."""
    from cnnjax.data.prepare import open_index

    try:
        splits = open_index(config.data, lambda _: None).examples.splits
    except InputError:  # the data set is no longer there
        return ""
    if "test" not in splits:
        return ""
    table = f" --table {quote(str(config.data.table))}" if config.data.table else ""
    return (
        "to evaluate it on the test split, which was not used in training:\n"
        f"  cnnjax evaluate --run {quote(str(config.workdir))}"
        f" --data {quote(config.data.root)}{table} --split test"
    )
