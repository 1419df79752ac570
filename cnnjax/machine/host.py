"""What the program takes from its machine: cores, memory, a place to keep things."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import platformdirs

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


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

    XLA allocates its temporary memory anew for each step, on a CPU. From 32 MiB on, glibc takes it
    from the kernel and gives it back each time: page faults then took 15 of a step's 39 ms.
    Another C library is left as it is. What no heap of a thread other than the first can hold, from
    64 MiB on, still comes from the kernel: one heap for all threads would end that, but makes the
    compiler take half as long again.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # In bytes, and the largest that this glibc takes. Without the first, the others would have
        # it take even small blocks from the kernel.
        if any(libc.mallopt(_M_MMAP_THRESHOLD, most) for most in (2**31 - 1, 2**25)):
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_TOP_PAD, 2**26)
