"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_NAMES = "surrogateescape"  # a file name that is no UTF-8 is written as it is


@contextmanager
def write_atomically(path: Path) -> Iterator[TextIO]:
    """Opens a text file that replaces `path` when the block ends well, and never otherwise.

    A link stays one, to the new file; into a pipe or a device, as /dev/stdout, it writes at once.
    """
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or path.parent == Path("/dev"):
        with path.open("w", encoding="utf-8", newline="", errors=_NAMES) as file:
            yield file
        return
    asked, path = path, path.resolve()
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # name the file that was asked for
        raise type(error)(error.errno, error.strerror, str(asked)) from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="", errors=_NAMES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a run's outputs get the permissions that open() would give.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
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
