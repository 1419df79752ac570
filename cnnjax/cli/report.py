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
    """Write an HTML report of a run, or a page that compares several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Workdirs of finished runs; two or more are compared on one page."""
    run: Path | None = None
    """Workdir of one run; the same as a positional workdir."""
    data: str | None = None
    """Evaluate one run on this data set instead of on its held-out images."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Split of --data to evaluate on; `all` for all images; by default `test`."""
    other: tyro.conf.OmitArgPrefixes[OtherData] = field(default_factory=OtherData)
    out: Path | None = None
    """Output file. By default report.html in the workdir; report-SPLIT.html in the workdir with
    --data; comparison.html in the current folder for several runs."""
    cache: Path | None = None
    """Folder of the decoded images; by default the cache folder that the run was trained with."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Writes the page; returns the exit status."""
        runs = self.runs if self.run is None else (self.run, *self.runs)
        if not runs:
            raise InputError("report needs the workdir of a run; give it with --run")
        data = "phantom" if self.data is None and self.other.table is not None else self.data
        if data is not None and len(runs) > 1:
            raise InputError("--data needs one run; several are compared on their held-out images")
        if self.cache is not None and len(runs) > 1:
            raise InputError("--cache needs one run; a comparison shows no images")
        if self.split is not None and data is None:
            raise InputError(
                f"--split {self.split} needs --data; without it, the held-out images are evaluated"
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
