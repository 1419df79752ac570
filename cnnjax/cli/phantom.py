"""`cnnjax phantom`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cnnjax.cli.common import writing
from cnnjax.errors import InputError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Phantom:
    """Write a data set of synthetic chest radiographs (phantoms)."""

    directory: Annotated[Path, tyro.conf.Positional]
    """Output folder; must be empty or not exist."""
    train: int = 1200
    """Number of images in the train split."""
    val: int = 16
    """Number of images in the val split."""
    test: int = 400
    """Number of images in the test split."""
    size: int = 256
    """Side of the images, in pixels."""
    seed: int = 0
    """Random seed; each seed gives other patients."""

    def __call__(self) -> int:
        """Writes the images; returns the exit status."""
        from cnnjax import phantom

        with writing(self.directory, "the directory"):
            try:
                phantom.write_tree(
                    self.directory,
                    train=self.train,
                    val=self.val,
                    test=self.test,
                    size=self.size,
                    seed=self.seed,
                )
            except (FileExistsError, ValueError) as error:
                raise InputError(str(error)) from None
        return 0
