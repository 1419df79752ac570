"""What the program takes from its machine: cores, memory, a place to keep things."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import platformdirs

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def cpu_cores() -> int:
    """Returns how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_folder() -> Path:
    """Returns the user's own cache folder for this program; it may not exist yet."""
    return Path(platformdirs.user_cache_dir("cnnjax"))


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that the process frees, for its next allocation.

    XLA allocates its temporary memory anew for each step, on a CPU. From 32 MiB on, and from 64 MiB
    on in the heap of any thread but the first, glibc takes it from the kernel and gives it back
    each time: page faults then took 35 ms of the 80 ms of a step of the post's network at batch
    128. Another C library is left as it is.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if libc.mallopt(_M_MMAP_MAX, 0):  # all from the heap,
            libc.mallopt(_M_ARENA_MAX, 1)  # which is the same for all threads,
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # does not shrink,
            libc.mallopt(_M_TOP_PAD, 2**26)  # and grows in large steps
