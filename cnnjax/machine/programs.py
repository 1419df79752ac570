"""Compiled programs, kept for the next start, each with its checksum.

JAX's own store writes an entry in place and never replaces it: one that a killed process or a
failing disk left damaged costs its compilation, and a warning, at every start. Compressed with zstd
(Python 3.14), a changed bit is not even seen, and the entry is code.
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

    A file holds the SHA-256 checksum of the program, then the program. It appears whole or not at
    all. A damaged one is removed, so that what is compiled in its place is kept; a line on standard
    error tells, once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = str(folder)  # which JAX logs
        self._told = False

    def get(self, key: str) -> bytes | None:
        """Returns a program; None where there is none, or a damaged one."""
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
                f"compiled programs in {self.folder} are damaged and are made anew", file=sys.stderr
            )
            self._told = True
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program; where the folder cannot be written, the next start compiles it again."""
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
    """Lets JAX keep its programs in a folder through `Programs`.

    JAX has no public way to give it another store: where its inner one is not found, in a later
    version, it keeps the programs as it does by itself.
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
