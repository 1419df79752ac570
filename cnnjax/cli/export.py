"""`cnnjax export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cnnjax.cli.common import tell_uncalibrated, writing
from cnnjax.config import DeviceConfig

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Export:
    """Write a network in a form that needs none of this project to run."""

    out: Annotated[Path, tyro.conf.Positional]
    """The file; what is to be known of it comes beside it, as .json."""
    run: Path | None = None
    """A run's workdir, or a folder with a release; by default the weights of the package."""
    format: Literal["stablehlo", "onnx", "safetensors"] = "stablehlo"
    """A program for CPU, CUDA and TPU, one for ONNX Runtime, or the weights alone."""
    checkpoint: Literal["best", "latest"] = "best"
    """Of a run: the best epoch by validation, or the last."""

    def __call__(self) -> int:
        """Writes the files; returns the exit status."""
        from cnnjax.evaluation import export
        from cnnjax.evaluation.predict import Predictor
        from cnnjax.machine import devices

        mesh = devices.make_mesh(DeviceConfig("cpu"))
        # One view: whoever loads the network should not need our augmentation.
        predictor = Predictor.open(self.run, mesh, self.checkpoint, views=1)
        tell_uncalibrated(predictor)
        with writing(self.out, "the file"):
            for path in export.export(predictor, self.format, self.out):
                print(path)
        return 0
