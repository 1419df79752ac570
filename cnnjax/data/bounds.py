"""Limits on what one file may cost, and readers that keep to them whatever the file says of itself.

A chest radiograph has at most some 28 million pixels, 60 MB as a plain 16-bit file. A file that
would cost a multiple of that is damaged or made to do harm.
"""

from __future__ import annotations

import os
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LARGEST_FILE = 128 * 2**20
"""Bytes of an encoded image, in a file, in an archive, or inflated from a DICOM file."""
LARGEST_PIXELS = 64_000_000
"""Twice the largest plain film."""
LARGEST_DECODED = 128 * 2**20
"""Bytes of an image as Pillow holds it."""
LARGEST_ASPECT = 20
"""Ratio of the longer to the shorter side."""

_CHUNK = 2**20
_STRIP = 2**21
_PATIENCE = 0.5  # seconds to wait for somebody to write into a pipe

TOO_LARGE = f"larger than {LARGEST_FILE // 2**20} MiB"


def pixel_fault(width: int, height: int) -> str | None:
    """Returns why an image of this shape is refused, or None where it is taken."""
    if width * height > LARGEST_PIXELS:
        return f"too many pixels: {width} x {height}"
    if min(width, height) < 1:
        return f"no pixels: {width} x {height}"
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        return f"too long and narrow: {width} x {height}"
    return None


def strips(height: int, width: int) -> Iterator[slice]:
    """Returns slices of rows, each of some two million pixels, that together are the image."""
    rows = max(1, _STRIP // max(width, 1))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def read_stream(stream: IO[bytes]) -> bytes:
    """Returns what is left of a stream.

    Raises:
        OSError: there is more than `LARGEST_FILE`, or it cannot be read.
    """
    read = bytearray()
    while chunk := stream.read(_CHUNK):
        read += chunk
        if len(read) > LARGEST_FILE:
            raise OSError(TOO_LARGE)
    return bytes(read)


def read_file(path: Path, *, pipes: bool = False) -> bytes:
    """Returns the bytes of a file.

    Args:
        path: the file.
        pipes: also take a pipe or a device, if it gives something within half a second.

    Raises:
        OSError: it is larger than `LARGEST_FILE`, no regular file, or cannot be read.
    """
    # Without O_NONBLOCK, to open a pipe waits until somebody writes into it.
    with os.fdopen(os.open(path, os.O_RDONLY | _NONBLOCK), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            if status.st_size > LARGEST_FILE:
                raise OSError(TOO_LARGE)
            return read_stream(file)
        if stat.S_ISDIR(status.st_mode) or not pipes:
            raise OSError("no regular file")
        first = _first_of_pipe(file)
        os.set_blocking(file.fileno(), True)
        return first + read_stream(file) if first else first


_NONBLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _first_of_pipe(file: IO[bytes]) -> bytes:
    """Returns the first bytes of a pipe, none where nobody writes; waits for one who has it open.

    Raises:
        OSError: nobody has opened the pipe to write.
    """
    ends = time.monotonic() + _PATIENCE
    while True:
        read: bytes | None = file.read(_CHUNK)
        if read:
            return read
        if read is None:  # somebody has the pipe open, and has written nothing yet
            os.set_blocking(file.fileno(), True)
            return file.read(_CHUNK)
        if time.monotonic() > ends:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise OSError("a pipe into which nothing is written")
            return b""
        time.sleep(0.01)


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Returns the bytes of an archive's entry.

    Raises:
        OSError: it is larger than `LARGEST_FILE`, whatever the archive says, or is compressed in a
            way that does not let us stop.
        Exception: it is broken; each method of compression has its own.
    """
    if entry.file_size > LARGEST_FILE:
        raise OSError(TOO_LARGE)
    if entry.compress_type not in _METHODS:
        raise OSError("compressed by another method than deflate; pack the archive again")
    with archive.open(entry) as stream:
        return read_stream(stream)


# Python inflates the other methods a block at a time, and a block of bzip2 can be gigabytes.
_METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA


def inflates_beyond(deflated: bytes) -> bool:
    """Tells whether a raw deflate stream holds more than `LARGEST_FILE`; keeps none of it.

    Raises:
        zlib.error: it is broken.
    """
    inflater, length = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for start in range(0, len(deflated), 2**14):
        rest = deflated[start : start + 2**14]
        while rest and not inflater.eof:
            length += len(inflater.decompress(rest, _CHUNK))
            if length > LARGEST_FILE:
                return True
            rest = inflater.unconsumed_tail
    return False
