"""Writes files and folders atomically."""

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

SURROGATES = "surrogateescape"  # a file name that is not UTF-8 is written unchanged


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[TextIO]:
    """Opens a text file that replaces `path` if the block succeeds, and is discarded otherwise.

    If `path` is a link, its target is replaced. Pipes and devices, such as /dev/stdout, are written
    directly, after their previous content.
    """
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or path.parent == Path("/dev"):
        sys.stdout.flush()  # in case path is standard output: earlier output comes first
        # Append, since /dev/stdout may be a redirected file.
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

    Fields with a carriage return are quoted like those with a line feed. Python's writer quotes
    only the characters of its own line terminator, but its reader ends a line at either.

    Text that a spreadsheet would run as a formula gets an apostrophe in front, which `read_cell`
    removes. Numbers are unchanged, and so is a single sign, such as the `-` of predict.
    """
    csv.writer(_Lines(file)).writerows([_as_text(cell) for cell in row] for row in rows)


def read_cell(cell: str) -> str:
    """Returns the text of a cell as it was given to `write_rows`."""
    return cell[1:] if _WRITTEN.match(cell) else cell


def _as_text(cell: Any) -> Any:
    runs = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if runs else cell


# An existing apostrophe before such a text is doubled, to distinguish it from an added one.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n].", re.DOTALL)
_WRITTEN = re.compile(r"'+[=+\-@\t\r\n].", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


class _Lines:
    r"""Writes lines that end in \r\n to a file, with \n instead."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, line: str) -> int:
        return self.file.write(line.removesuffix("\r\n") + "\n")


@contextlib.contextmanager
def _named(asked: Path) -> Iterator[None]:
    """Makes errors name the file that the caller asked for."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(asked)) from None


def no_cache(folder: Path, error: OSError) -> InputError:
    """Returns the error for a cache folder that cannot be written."""
    return InputError(
        f"the cache {folder} cannot be written ({error.strerror or error}); free some space there"
        " or choose another with --data.cache (evaluate, report: --cache)"
    )


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file, and waits until it is on disk."""
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def checksum(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes; reads a memory-mapped array in parts."""
    digest = hashlib.sha256()
    for start in range(0, len(array), 1024):
        digest.update(np.ascontiguousarray(array[start : start + 1024]).data)
    return digest.hexdigest()


def sweep(home: Path) -> None:
    """Removes remains of a `work_folder` beside `home` that killed processes left over a day ago.

    Use it only where no other program creates folders: it recognizes them by name.
    """
    for left in home.parent.glob(f".{glob.escape(home.name)}.????????"):
        with contextlib.suppress(FileNotFoundError):  # another process was first
            touched = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - touched > 86_400:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def work_folder(home: Path) -> Iterator[Path]:
    """Makes an empty folder beside `home`; the block fills it and renames it to `home`.

    Whatever remains is removed at the end. The folder has the usual permissions; `mkdtemp` alone
    makes folders that other users cannot read.
    """
    private = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}."))
    try:
        work = private / home.name
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(private, ignore_errors=True)
