"""`cnnjax report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cnnjax.cli.common import expect_no_folder, writing
from cnnjax.config import DeviceConfig, OtherData
from cnnjax.errors import InputError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Report:
    """Write the page that tells a run's story, or one that sets several runs side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Workdirs; given several, the page compares them."""
    run: Path | None = None
    """Workdir of one run, as training gives its command."""
    data: str | None = None
    """Judge one run on this data set instead of on its held-out images."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Which split of --data, or all its images; by default `test`."""
    other: tyro.conf.OmitArgPrefixes[OtherData] = field(default_factory=OtherData)
    out: Path | None = None
    """Where to; by default report.html in the workdir, report-SPLIT.html for --data, or
    comparison.html here."""
    cache: Path | None = None
    """Folder of the decoded images; by default the one that the run was trained with."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Writes the page; returns the exit status."""
        runs = self.runs if self.run is None else (self.run, *self.runs)
        if not runs:
            raise InputError("report needs the workdir of a run; give it with --run")
        data = "phantom" if self.data is None and self.other.table is not None else self.data
        if data is not None and len(runs) > 1:
            raise InputError("--data goes with one run; several are compared on what they held out")
        if self.cache is not None and len(runs) > 1:
            raise InputError("--cache goes with one run; a comparison shows no images")
        if self.split is not None and data is None:
            raise InputError(
                f"--split {self.split} needs --data; without, held-out images are judged"
            )
        expect_no_folder(self.out, "--out")
        split = self.split or "test"
        from cnnjax import report
        from cnnjax.machine import devices

        mesh = devices.make_mesh(self.device)
        out = self.out or (runs[0] if len(runs) == 1 else Path("comparison.html"))
        with writing(out, "--out"):
            if len(runs) > 1:
                path = report.compare(runs, out)
            else:
                path = report.write(
                    runs[0],
                    mesh,
                    data=data,
                    other=self.other,
                    split=split,
                    out=self.out,
                    cache=self.cache,
                )
        print(path)
        return 0
