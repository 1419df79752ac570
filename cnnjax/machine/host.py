"""Resources of the host: CPU cores, memory, and the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import platformdirs

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def cpu_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_folder() -> Path:
    """Returns the user's cache folder for this program; it may not exist yet."""
    return Path(platformdirs.user_cache_dir("cnnjax"))


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for later allocations.

    On a CPU, XLA allocates its temporary memory again for each step. By default, glibc requests
    blocks of 32 MiB and more from the kernel, and returns them when they are freed: page faults
    then took 15 of a step's 39 ms. Other C libraries are not changed. In threads other than the
    first, blocks of 64 MiB and more do not fit in a heap, and still come from the kernel; one heap
    for all threads would avoid that, but slows compilation by half.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # The largest value, in bytes, that this glibc accepts. If it accepted none, the other two
        # settings would make it request even small blocks from the kernel.
        if any(libc.mallopt(_M_MMAP_THRESHOLD, most) for most in (2**31 - 1, 2**25)):
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_TOP_PAD, 2**26)
