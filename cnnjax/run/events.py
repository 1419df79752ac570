"""The figures of a run's epochs, and TensorBoard's event files of them (extra `tensorboard`)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import InputError


class Events:
    """Writes what `metrics.jsonl` has of each epoch, by epoch, under `train/` and `validation/`.

    Epochs that the run has behind it are written anew, so that the files are whole wherever it was
    stopped, and from whichever start on they were asked for.

    Args:
        folder: where to; what is there is replaced.
        history: the lines of `metrics.jsonl` so far.

    Raises:
        InputError: the extra is not installed.
    """

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError(
                "--tensorboard needs tensorboardX; install it with:"
                " pip install 'cnnjax[tensorboard]'"
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for line in history:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Adds an epoch, a line of `metrics.jsonl`."""
        for name, value in figures_of(line).items():
            self._writer.add_scalar(name, value, line["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of a line of `metrics.jsonl` by name.

    They are `learning_rate` (of the last step), `train/loss` and `train/accuracy`, and what the
    objective says of the held-out images, such as `validation/auc`.
    """
    sides = {
        f"{side}/{name}": float(value)
        for side in ("train", "validation")
        for name, value in line[side].items()
    }
    return {"learning_rate": line["learning_rate"]} | sides
