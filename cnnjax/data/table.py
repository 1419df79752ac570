"""Reads a table of images: a CSV file with a row per image.

Columns are found by name, in any order; other columns are ignored. `path` is relative to the root
(a folder or a zip), or absolute and below it; `label` is the name of the class. These columns are
optional: `patient`, any text that is the same for all images of a patient; `split`, train, val or
test; `weight`, a factor of at least 0 on the image's loss in training. Cells are separated by
commas, semicolons or tabs; the encoding is UTF-8.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cnnjax.data.bounds import read_file
from cnnjax.data.examples import Texts
from cnnjax.data.names import LEADS_OUT, in_archive
from cnnjax.data.sources import Tree, Zip, name_of, record_of
from cnnjax.errors import InputError

COLUMNS = ("path", "label", "patient", "split", "weight")
"""Default names of the columns in a table; `--data.columns` changes them."""

_NEEDED = COLUMNS[:2]
_SPLITS = {
    **{name: name for name in ("train", "val", "test")},
    **dict.fromkeys(("valid", "validation"), "val"),
}


class Rows(NamedTuple):
    """The columns of a table; a row is an image."""

    names: Texts
    """Paths relative to the root, with forward slashes."""
    labels: list[str]
    patients: list[str] | None
    """None if the table has no such column."""
    splits: list[str] | None
    """None if the table has no such column."""
    weights: list[float] | None
    """None if the table has no such column."""


def read_rows(path: Path, columns: str, source: Tree | Zip) -> Rows:
    """Reads a table.

    Args:
        path: the CSV file.
        columns: other names of columns, such as `path=file,label=finding`; an empty name
            (`weight=`) means that the column is not used.
        source: where the images are.

    Raises:
        InputError: the table cannot be read, lacks a column, or has an invalid row. The message
            numbers rows as a spreadsheet does: the header is row 1.
    """
    names = _names(columns)
    rows = _cells(path, names)
    _, header = next(rows, (1, []))
    place = _places(path, header, names)
    locate = _locator(source)
    found: list[str] = []
    kept: dict[str, list[Any]] = {name: [] for name in place if name != "path"}
    same: dict[str, str] = {}  # one object for the equal texts of many rows
    seen: dict[str, int] = {}
    missing: list[tuple[int, str]] = []
    for number, cells in rows:
        if not any(cells):
            continue
        if len(cells) > len(header):
            raise _wrong(
                path,
                number,
                f"{len(cells)} cells for {len(header)} columns; quote those that hold a separator",
            )
        cells += [""] * (len(header) - len(cells))
        row = {name: cells[at] for name, at in place.items()}
        for name, cell in row.items():
            if not cell:
                raise _wrong(path, number, f"the column {names[name]} is empty; fill it in")
        if "|" in row["label"]:  # the format of ChestX-ray14
            raise _wrong(
                path,
                number,
                f"{row['label']} are several findings (multi-label), which are not supported; give"
                " each image one class",
            )
        name, file, fault = locate(row["path"])
        if fault:
            missing.append((number, f"{row['path']} {fault}"))
            continue
        first = seen.setdefault(file, number)
        if first != number:
            raise _wrong(path, number, f"{row['path']} is the image of row {first}; keep one row")
        found.append(name)
        for column, values in kept.items():
            cell = row[column]
            if column == "split":
                values.append(_split(path, number, cell))
            elif column == "weight":
                values.append(_weight(path, number, cell))
            else:
                values.append(same.setdefault(cell, cell))
    if missing:
        more = f" (the same problem in {len(missing) - 1:,} more rows)" if len(missing) > 1 else ""
        raise _wrong(path, *missing[0], more)
    if not found:
        raise InputError(f"{path} has no rows below its header; add one for each image")
    if "weight" in kept and not any(kept["weight"]):
        raise InputError(f"{path}: the column {names['weight']} is 0 in every row")
    others = (kept.get(name) for name in ("patient", "split", "weight"))
    return Rows(Texts(found), kept["label"], *others)


def _names(columns: str) -> dict[str, str]:
    """Returns the name of each column in the table; empty for a column that is not used."""
    names = dict(zip(COLUMNS, COLUMNS, strict=True))
    for part in filter(None, (part.strip() for part in columns.split(","))):
        ours, sign, theirs = (text.strip() for text in part.partition("="))
        if not sign or ours not in COLUMNS:
            raise InputError(
                f"--data.columns must be like path=file,label=finding, of {', '.join(COLUMNS)};"
                f" got {part}"
            )
        if not theirs and ours in _NEEDED:
            raise InputError(f"--data.columns {part}: a table needs the column {ours}; name it")
        names[ours] = theirs
    return names


def _cells(path: Path, names: dict[str, str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (number, cells without surrounding spaces) of each row, the header first."""
    try:
        content = read_file(path)
        first = content.partition(b"\n")[0].decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"the table {path} cannot be read ({reason})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as CSV in UTF-8") from None
    wanted = {name.casefold() for name in names.values()}

    def found(separator: str) -> int:
        header = next(csv.reader([first], delimiter=separator), [])
        return len(wanted & {cell.strip().casefold() for cell in header})

    separator = max(",;\t", key=found)
    text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=separator, strict=True)
    try:
        for number, cells in enumerate(rows, 1):
            yield number, [cell.strip() for cell in cells]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}; save it as CSV again") from None


def _places(path: Path, header: list[str], names: dict[str, str]) -> dict[str, int]:
    """Returns the positions of our columns in the header; optional ones may be absent."""
    folded = [cell.casefold() for cell in header]
    place = {}
    for ours, theirs in names.items():
        count = folded.count(theirs.casefold()) if theirs else 0
        if count > 1:
            raise InputError(f"{path} has {count} columns named {theirs}; rename one")
        if count:
            place[ours] = folded.index(theirs.casefold())
        elif ours in _NEEDED or theirs not in ("", ours):
            shown = ", ".join(header) or "nothing"
            raise InputError(
                f"{path} has no column {theirs}, but {shown}; its first row must name the columns;"
                " give other names with --data.columns path=...,label=..."
            )
    return place


def _locator(source: Tree | Zip) -> Callable[[str], tuple[str, str, str]]:
    """Returns a function that maps a path to its name, the file it leads to, and any error.

    The file is given by its path below the root, without links.
    """
    if isinstance(source, Zip):
        archive = source

        def entry(path: str) -> tuple[str, str, str]:
            name = in_archive(path) or ""
            return name, name, "" if name in archive.infos else "is not in the zip"

        return entry
    root = source.root
    home, plain = os.path.realpath(root), os.path.abspath(root)  # noqa: PTH100

    @functools.lru_cache(1024)
    def below(name: str) -> str | None:
        """Returns the real path of a file or folder, relative to the root; None if it leads out."""
        target = Path(os.path.realpath(root / name))
        if not target.is_relative_to(home):
            return None
        return target.relative_to(home).as_posix() if name else ""

    def file(path: str) -> tuple[str, str, str]:
        relative = path
        if os.path.isabs(path):  # noqa: PTH117
            relative = next(
                (
                    str(Path(path).relative_to(top))
                    for top in (plain, home)
                    if Path(path).is_relative_to(top)
                ),
                "..",
            )
        name = in_archive(relative)
        if not name:
            return "", "", f"is not below {root}; give its folder with --data.root"
        folder = name.rpartition("/")[0]
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(f"{root}/{name}").st_mode) and below(folder) == folder:
                return name, name, ""
        shard, number = record_of(name) or (name, None)
        if not (root / shard).is_file():
            return name, "", f"is not a file in {root}; paths are relative to --data.root"
        target = below(shard)
        if number is not None:
            if number >= source.records(shard):
                return name, "", f"is not a record: {shard} has {source.records(shard)}, from 0"
            name = name_of(shard, number)
        if target is None:
            return name, "", f"is {LEADS_OUT}"
        return name, target if number is None else name_of(target, number), ""

    return file


def _split(path: Path, number: int, cell: str) -> str:
    split = _SPLITS.get(cell.casefold())
    if split is None:
        raise _wrong(path, number, f"the split {cell} is not train, val or test")
    return split


def _weight(path: Path, number: int, cell: str) -> float:
    try:
        weight = float(cell)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise _wrong(path, number, f"the weight {cell} is not a number of at least 0")
    return weight


def _wrong(path: Path, number: int, what: str, more: str = "") -> InputError:
    return InputError(f"{path}, row {number}: {what}{more}")
