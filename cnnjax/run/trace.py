"""The profiler trace of one epoch, `--profile`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from cnnjax.errors import InputError, first_line
from cnnjax.machine import processes


def expect_writable(folder: Path | None) -> None:
    """Raises InputError if the folder for the trace is not writable, before training starts."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--profile {folder} cannot be written ({reason})") from None


@contextlib.contextmanager
def traced(folder: Path | None) -> Iterator[None]:
    """Writes a profiler trace of the block to a folder; with None, only runs the block.

    With several processes, only the main process writes a trace.
    """
    if folder is None or not processes.is_main():
        yield
        return
    jax.profiler.start_trace(str(folder))
    try:
        yield
    finally:
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"--profile {folder} cannot be written ({first_line(error)})"
            ) from None
