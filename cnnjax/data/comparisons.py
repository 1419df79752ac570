"""Comparisons of many images or files, whose results are kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data import duplicates
from cnnjax.data.cache import Decoded
from cnnjax.data.examples import Example
from cnnjax.data.index import Index
from cnnjax.machine.files import checksum, write_atomically
from cnnjax.machine.host import cache_folder

_VERSION = 1  # increase it when a comparison gives another result for the same images


def pairs_of(decoded: Decoded, size: int) -> list[duplicates.Pair]:
    """Returns the pairs of images of the same radiograph; see `cnnjax.data.duplicates.find`.

    Args:
        decoded: images from `cnnjax.data.cache.load`.
        size: their side, in pixels.
    """
    small = decoded.thumbnails
    assert small is not None
    if decoded.home is None:
        return duplicates.find(small, size)
    made_from = [_VERSION, size, checksum(small)]
    pairs = _kept(decoded.home / "duplicates.json", made_from, lambda: duplicates.find(small, size))
    return [duplicates.Pair(*pair) for pair in pairs]


def copies_of(index: Index, folder: Path | None) -> list[tuple[Example, Example]]:
    """Returns the files of test that are copies; see `cnnjax.data.duplicates.copies`.

    Args:
        index: the files.
        folder: the cache folder; `cnnjax.machine.host.cache_folder()` if None.
    """
    examples, source = index.examples, index.source
    if {*examples.splits} <= {"test"} or "test" not in examples.splits:
        return []
    digest, sizes = hashlib.sha256(), np.empty(len(examples), np.int64)
    for row, (name, tests) in enumerate(
        zip(examples.names, examples.of_split("test").tolist(), strict=True)
    ):
        signature = source.signature(name)
        sizes[row] = signature[0]
        digest.update(f"{name!a} {tests} {signature}\n".encode())
    folder = cache_folder() if folder is None else folder
    root = hashlib.sha256(f"{index.root.resolve()!a}".encode()).hexdigest()
    rows = _kept(
        folder / f"copies-{root[:32]}.json",
        [_VERSION, digest.hexdigest()],
        lambda: duplicates.copied(examples, source, sizes),
    )
    return [(examples[test], examples[like]) for test, like in rows]


def _kept(path: Path, made_from: list[Any], find: Callable[[], list[Any]]) -> list[Any]:
    """Returns a result from a file if it was made from the same; else finds and keeps it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text("utf-8"))
        if kept["made_from"] == made_from:
            result: list[Any] = kept["result"]
            return result
    result = find()
    with contextlib.suppress(OSError):  # a read-only cache is still usable
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            json.dump({"made_from": made_from, "result": result}, file)
    return result
