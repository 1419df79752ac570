"""Writes the metrics of a run's epochs as TensorBoard event files (extra `tensorboard`)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import InputError


class Events:
    """Writes the values of `metrics.jsonl` by epoch, under `train/` and `validation/`.

    Past epochs are written again. The files are therefore complete after any interruption, even if
    the run began without TensorBoard.

    Args:
        folder: the target; its content is replaced.
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
        """Adds an epoch, given as a line of `metrics.jsonl`."""
        for name, value in figures_of(line).items():
            self._writer.add_scalar(name, value, line["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    """Returns the values of a line of `metrics.jsonl` by name.

    They are `learning_rate` (of the last step), `train/loss` and `train/accuracy`, and the
    objective's metrics of the held-out images, such as `validation/auc`.
    """
    sides = {
        f"{side}/{name}": float(value)
        for side in ("train", "validation")
        for name, value in line[side].items()
    }
    return {"learning_rate": line["learning_rate"]} | sides
