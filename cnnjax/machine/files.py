"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np

from cnnjax.errors import InputError

SURROGATES = "surrogateescape"  # a file name that is no UTF-8 is written as it is


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[TextIO]:
    """Opens a text file that replaces `path` when the block ends well, and never otherwise.

    A link stays one, to the new file; into a pipe or a device, as /dev/stdout, it writes at once,
    after what is there.
    """
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or path.parent == Path("/dev"):
        sys.stdout.flush()  # what was printed before stands before it, should it be the same place
        # To append: /dev/stdout may be a file, by >.
        with path.open("a", encoding="utf-8", newline="", errors=SURROGATES) as file:
            yield file
        return
    asked, path = path, path.resolve()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _named(asked):
        opened = partial.open("x", encoding="utf-8", newline="", errors=SURROGATES)
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _named(asked):
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_rows(file: IO[str], rows: Iterable[Sequence[Any]]) -> None:
    r"""Writes the rows of a CSV file, each ended by one \n.

    Fields with a carriage return are quoted as those with a line feed are: Python's writer quotes
    only what its own line terminator holds, and its reader ends a line at either.

    Text that a spreadsheet would run as a formula gets an apostrophe before it; `read_cell` takes
    it off. Numbers stay as they are, and so does a lone sign, as predict's `-`.
    """
    csv.writer(_Lines(file)).writerows([_as_text(cell) for cell in row] for row in rows)


def read_cell(cell: str) -> str:
    """Returns what `write_rows` was given for a cell of text."""
    return cell[1:] if _WRITTEN.match(cell) else cell


def _as_text(cell: Any) -> Any:
    runs = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if runs else cell


# An apostrophe before such a text is doubled, as it could not be told from one of ours.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n].", re.DOTALL)
_WRITTEN = re.compile(r"'+[=+\-@\t\r\n].", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


class _Lines:
    r"""A file that is given lines ended by \r\n, each whole, and ends them by \n."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, line: str) -> int:
        return self.file.write(line.removesuffix("\r\n") + "\n")


@contextlib.contextmanager
def _named(asked: Path) -> Iterator[None]:
    """Lets errors name the file that was asked for."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(asked)) from None


def no_cache(folder: Path, error: OSError) -> InputError:
    """Returns what to raise where a cache folder cannot be written."""
    return InputError(
        f"the cache {folder} cannot be written ({error.strerror or error}); free some space there"
        " or choose another with --data.cache (evaluate, report: --cache)"
    )


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file, and waits until the disk has it."""
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def checksum(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes, read a part at a time."""
    digest = hashlib.sha256()
    for start in range(0, len(array), 1024):
        digest.update(np.ascontiguousarray(array[start : start + 1024]).data)
    return digest.hexdigest()


def sweep(home: Path) -> None:
    """Removes what killed processes left of a `work_folder` beside `home`, a day or more ago.

    For folders that are ours alone: it goes by their names.
    """
    for left in home.parent.glob(f".{glob.escape(home.name)}.????????"):
        with contextlib.suppress(FileNotFoundError):  # another process was first
            touched = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - touched > 86_400:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def work_folder(home: Path) -> Iterator[Path]:
    """Makes an empty folder with the usual rights beside `home`, for the block to rename to it.

    What is left of it is removed in the end. (`mkdtemp` alone makes folders that no other user can
    read.)
    """
    private = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}."))
    try:
        work = private / home.name
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(private, ignore_errors=True)
