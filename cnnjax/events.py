"""The epochs of a run as TensorBoard's event files (the extra `tensorboard`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnjax.errors import InputError


class Events:
    """Writes what `metrics.jsonl` has of each epoch, by epoch, under `train/` and `validation/`.

    Args:
        folder: where to.
        done: epochs that the run has behind it; what a killed run wrote beyond them is hidden.

    Raises:
        InputError: the extra is not installed.
    """

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError(
                "--tensorboard needs tensorboardX; install it with:"
                " pip install 'cnnjax[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def add(self, line: dict[str, Any], images_per_second: float) -> None:
        """Adds an epoch: a line of `metrics.jsonl`, and its speed."""
        epoch = line["epoch"]
        for side in ("train", "validation"):
            for name, value in line[side].items():
                self._writer.add_scalar(f"{side}/{name}", value, epoch)
        self._writer.add_scalar("learning_rate", line["learning_rate"], epoch)
        self._writer.add_scalar("images_per_second", images_per_second, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
