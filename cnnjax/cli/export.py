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
    """Export a network to a format that runs without cnnjax."""

    out: Annotated[Path, tyro.conf.Positional]
    """Output file; a .json file with preprocessing and output format is written next to it."""
    run: Path | None = None
    """Workdir of a run, or folder of a release; by default the weights in the package."""
    format: Literal["stablehlo", "onnx", "safetensors"] = "stablehlo"
    """`stablehlo`: program for CPU, CUDA and TPU; `onnx`: program for ONNX Runtime;
    `safetensors`: weights only."""
    checkpoint: Literal["best", "latest"] = "best"
    """Checkpoint of a run: the best epoch by validation, or the last epoch."""

    def __call__(self) -> int:
        """Writes the files; returns the exit status."""
        from cnnjax.evaluation import export
        from cnnjax.evaluation.predict import Predictor
        from cnnjax.machine import devices

        mesh = devices.make_mesh(DeviceConfig("cpu"))
        # One view: the exported network must not depend on the augmentation of cnnjax.
        predictor = Predictor.open(self.run, mesh, self.checkpoint, views=1)
        tell_uncalibrated(predictor)
        with writing(self.out, "the file"):
            for path in export.export(predictor, self.format, self.out):
                print(path)
        return 0
