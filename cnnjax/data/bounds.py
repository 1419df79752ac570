"""Limits on the size of one file, and readers that enforce them whatever the file's header claims.

A chest radiograph has at most about 28 million pixels, or 60 MB as an uncompressed 16-bit file. A
file several times as large is damaged or malicious.
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
"""Largest size, in bytes, of an encoded image: a file, an archive entry, or an inflated DICOM
file."""
LARGEST_PIXELS = 64_000_000
"""Largest number of pixels; about twice that of the largest radiograph."""
LARGEST_DECODED = 128 * 2**20
"""Largest size, in bytes, of a decoded image in Pillow."""
LARGEST_ASPECT = 20
"""Largest ratio of the longer to the shorter side."""

_CHUNK = 2**20
_STRIP = 2**21
_PATIENCE = 0.5  # seconds to wait for a process to write into a pipe

TOO_LARGE = f"larger than {LARGEST_FILE // 2**20} MiB"


def pixel_fault(width: int, height: int) -> str | None:
    """Returns why an image of this shape is refused, or None if it is accepted."""
    if width * height > LARGEST_PIXELS:
        return f"too many pixels: {width} x {height}"
    if min(width, height) < 1:
        return f"no pixels: {width} x {height}"
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        return f"too long and narrow: {width} x {height}"
    return None


def strips(height: int, width: int) -> Iterator[slice]:
    """Yields slices of rows, of about two million pixels each, that together cover the image."""
    rows = max(1, _STRIP // max(width, 1))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def read_stream(stream: IO[bytes], expected: int = _CHUNK) -> bytes:
    """Returns the rest of a stream.

    Args:
        stream: the stream.
        expected: its length in bytes, if known; a buffer of this size is read in half the time.

    Raises:
        OSError: the rest is larger than `LARGEST_FILE`, or cannot be read.
    """
    first = stream.read(max(1, expected))
    if not (more := stream.read(1)):
        return first
    read = bytearray(first + more)
    while chunk := stream.read(_CHUNK):
        read += chunk
        if len(read) > LARGEST_FILE:
            raise OSError(TOO_LARGE)
    return bytes(read)


def read_file(path: Path, *, pipes: bool = False) -> bytes:
    """Returns the bytes of a file.

    Args:
        path: the file.
        pipes: also accept a pipe or a device that delivers data within half a second.

    Raises:
        OSError: the file is larger than `LARGEST_FILE`, is not a regular file, or cannot be read.
    """
    # Without O_NONBLOCK, opening a pipe blocks until a process writes into it.
    with os.fdopen(os.open(path, os.O_RDONLY | _NONBLOCK), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            if status.st_size > LARGEST_FILE:
                raise OSError(TOO_LARGE)
            return read_stream(file, status.st_size)
        if stat.S_ISDIR(status.st_mode) or not pipes:
            raise OSError("not a regular file")
        first = _first_of_pipe(file)
        os.set_blocking(file.fileno(), True)
        return first + read_stream(file) if first else first


_NONBLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _first_of_pipe(file: IO[bytes]) -> bytes:
    """Returns the first bytes of a pipe; waits as long as a process has it open for writing.

    The result is empty if nothing is written.

    Raises:
        OSError: no process has opened the pipe for writing.
    """
    ends = time.monotonic() + _PATIENCE
    while True:
        read: bytes | None = file.read(_CHUNK)
        if read:
            return read
        if read is None:  # a process has the pipe open, and has not written yet
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
        OSError: the entry is larger than `LARGEST_FILE`, whatever its header claims, or its
            compression method does not allow inflating it in bounded pieces.
        Exception: the entry is broken; each compression method raises its own type.
    """
    if entry.file_size > LARGEST_FILE:
        raise OSError(TOO_LARGE)
    if entry.compress_type not in _METHODS:
        raise OSError("not compressed with deflate; create the archive again with deflate")
    with archive.open(entry) as stream:
        return read_stream(stream)


# Python inflates the other methods in whole blocks, and a block of bzip2 can be gigabytes.
_METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA


def inflates_beyond(deflated: bytes) -> bool:
    """Returns whether a raw deflate stream inflates to more than `LARGEST_FILE`; keeps no data.

    Raises:
        zlib.error: the stream is broken.
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
