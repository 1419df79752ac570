"""What the program takes from the machine that it runs on: cores, and a place to keep things."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cpu_cores() -> int:
    """Returns how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_folder() -> Path:
    """Returns the user's own cache folder for this program; it may not exist yet."""
    return Path(platformdirs.user_cache_dir("cnnjax"))
