"""`cnnjax check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cnnjax.cli.common import expect_place, writing
from cnnjax.config import DataConfig
from cnnjax.errors import InputError

if TYPE_CHECKING:
    from cnnjax.data.survey import Pair, Survey

_NAMED = 5  # images or patients listed per problem; --json lists all


@dataclass(frozen=True)
class Check:
    """Describe a data set and its split before training.

    Every image is decoded and stored in the cache that training uses. The exit status is 2 if
    training would refuse the data.
    """

    root: Annotated[str, tyro.conf.Positional] = ""
    """The data set, as for --data.root: a folder, a .zip, an .npz, a .csv table, or `phantom`."""
    seed: int = 0
    """Seed of the split."""
    json: Path | None = None
    """Write the full results to this file."""
    sheet: Path | None = None
    """Write a contact sheet (some images of each split and class) to this .html or .png file."""
    data: DataConfig = field(default_factory=lambda: DataConfig(size=96, frame="lungs"))

    def __call__(self) -> int:
        """Prints the results; returns the exit status."""
        if self.root and self.data.root not in (DataConfig.root, self.root):
            raise InputError(
                f"{self.root} and --data.root {self.data.root} are two data sets; give one"
            )
        if not self.root and self.data.root == DataConfig.root:
            raise InputError(
                "check needs a data set: a folder, a .zip, an .npz, a .csv table, or phantom"
            )
        expect_place(self.json, "--json")
        expect_place(self.sheet, "--sheet")
        if self.sheet is not None and self.sheet.suffix.lower() not in (".html", ".png"):
            raise InputError(f"--sheet {self.sheet} must end in .html or .png")

        from cnnjax.data import survey
        from cnnjax.data.prepare import open_index, protocol
        from cnnjax.report.sheet import write_sheet
        from cnnjax.run.workdir import write_json

        config = replace(self.data, root=self.root or self.data.root)
        index = open_index(config, print)
        print(index.describe())
        found = survey.survey(config, self.seed, index)
        for line in _described(found, protocol(config, self.seed)):
            print(line)
        if self.json is not None:
            with writing(self.json, "--json"):
                write_json(self.json, survey.to_json(found, config, self.seed))
        if self.sheet is not None:
            with writing(self.sheet, "--sheet"):
                write_sheet(self.sheet, str(index.root), found.shown)
        return 2 if found.refusal else 0


def _described(found: Survey, protocol: str) -> Iterator[str]:
    """Yields the lines to print after the description of the index."""
    layouts, classes = found.layouts, found.index.classes
    yield f"files     {_counted(x.form for x in layouts)}"
    yield f"  pixels  {_counted(x.mode for x in layouts)}"
    for side in ("width", "height") if layouts else ():
        values = sorted(getattr(x, side) for x in layouts)
        median = values[len(values) // 2]
        yield f"  {side:<7} {values[0]:,} to {values[-1]:,} pixels, median {median:,}"
    broken = [f"{name}: {reason}" for name, reason in found.unreadable]
    yield f"damaged   {_some(broken, 'files that cannot be decoded')}"
    if found.blank:
        yield f"blank     {_some(found.blank, 'images with a single gray level')}"
    if found.lungless is not None:
        yield f"lungs     {_some(found.lungless, 'images in which no lungs are found')}"
    twice = _some(_pairs(found.pairs), "images that show the same radiograph as another image")
    yield f"repeated  {twice}"
    mixed = [
        f"{p.image.name} ({classes[p.image.label]}) = {p.like.name} ({classes[p.like.label]})"
        for p in found.pairs
        if p.image.label != p.like.label
    ]
    if mixed:
        yield f"  warning: {_some(mixed, 'pairs in two classes')}"
    yield f"leaks     {_some(_pairs(found.leaks), 'radiographs in more than one given split')}"
    for (a, b), patients in found.patients.items():
        yield f"  warning: {_some(patients, f'patients in both {a} and {b}')}"
    yield f"held out  {protocol}"
    if found.data is None:
        yield f"  training would refuse this: {found.refusal}"
        return
    for name, rows in (("train", found.data.train), ("validate", found.data.validation)):
        examples = found.data.decoded.examples.take(rows)
        count = Counter(examples.labels.tolist())
        images = ", ".join(f"{count[k]:,} {c}" for k, c in enumerate(classes))
        yield f"  {name:<8} {images}; {len({*examples.patients}):,} patients"


def _counted(values: Iterator[str]) -> str:
    return ", ".join(f"{n:,} {value}" for value, n in Counter(values).most_common()) or "none"


def _pairs(pairs: Sequence[Pair]) -> list[str]:
    return [f"{p.image.name} = {p.like.name}" for p in pairs]


def _some(names: Sequence[str], what: str) -> str:
    """Returns a line with the number of names, then lines with the first `_NAMED` names."""
    rest = len(names) - _NAMED
    more = [f"    and {rest:,} more"] if rest > 0 else []
    return "\n".join([f"{what}: {len(names):,}", *(f"    {n}" for n in names[:_NAMED]), *more])
