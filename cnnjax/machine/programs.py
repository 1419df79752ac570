"""Caches compiled programs, each with its checksum.

JAX's own cache writes an entry in place and never replaces it. An entry damaged by a killed process
or a failing disk therefore costs a compilation and a warning at every start. With zstd compression
(Python 3.14) a changed bit is not even detected, and the entry is executable code.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import sys
from pathlib import Path
from typing import Any

_DIGEST = hashlib.sha256().digest_size


class Programs:
    """Compiled programs in a folder; JAX calls `get` and `put`.

    A file holds the SHA-256 checksum of the program, followed by the program, and is written
    atomically. A damaged file is removed and replaced at the next compilation; the first one is
    reported on standard error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = str(folder)  # JAX logs this
        self._told = False

    def get(self, key: str) -> bytes | None:
        """Returns a program; None if it is missing or damaged."""
        path = self._file(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        program = content[_DIGEST:]
        if hashlib.sha256(program).digest() == content[:_DIGEST]:
            return program
        with contextlib.suppress(OSError):
            path.unlink()
        if not self._told:
            print(
                f"compiled programs in {self.folder} are damaged and are compiled again",
                file=sys.stderr,
            )
            self._told = True
        return None

    def put(self, key: str, value: bytes) -> None:
        """Caches a program; if the folder cannot be written, the next run compiles it again."""
        path = self._file(key)
        partial = path.with_name(f".{secrets.token_hex(8)}")
        try:
            try:
                partial.write_bytes(hashlib.sha256(value).digest() + value)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError:
            pass

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}-cache"


def keep_in(folder: Path) -> None:
    """Makes JAX cache its compiled programs in a folder through `Programs`.

    JAX has no public interface for a custom cache. If a later version lacks the internal function
    used here, JAX uses its own cache.
    """
    import jax
    from jax._src import compilation_cache

    opened: Any = getattr(compilation_cache, "get_file_cache", None)

    def open_cache(path: str) -> Any:
        return (Programs(folder), path) if path == str(folder) else opened(path)

    if opened is not None:
        compilation_cache.get_file_cache = open_cache
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
