"""Crops decoded images to the lungs (`--data.frame lungs`) and caches the crops.

The name of a cache folder is a hash of the images and of the lung finder. The folder appears whole
or not at all, as in `cnnjax.data.cache`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from cnnjax import lungs
from cnnjax.config import DataConfig, DeviceConfig
from cnnjax.data import cache
from cnnjax.data.cache import Decoded
from cnnjax.data.examples import Example
from cnnjax.data.sources import Source
from cnnjax.errors import InputError
from cnnjax.machine import devices, processes
from cnnjax.machine.files import (
    checksum,
    no_cache,
    save_array,
    write_atomically,
)
from cnnjax.machine.host import cache_folder

_ARRAYS = ("images", "boxes", "found")


def load(
    examples: Sequence[Example], source: Source, config: DataConfig, mesh: Mesh | None = None
) -> Decoded:
    """Returns decoded images, cropped as the config says.

    Args:
        examples: the images to load.
        source: source of their bytes.
        config: its `frame`, `size`, `cache` and `strict` are used.
        mesh: the devices that find the lungs; by default all devices of the fastest kind. With
            several processes, each uses its own devices for its part of the images.

    Raises:
        InputError: see `cnnjax.data.cache.load`.
    """
    decoded = cache.load(
        examples, source, decoded_size(config), folder=config.cache, strict=config.strict
    )
    return decoded if config.frame == "whole" else framed(decoded, config, mesh)


def decoded_size(config: DataConfig) -> int:
    """Returns the side, in pixels, at which the images are decoded and cached."""
    return config.size if config.frame == "whole" else lungs.FILM


def framed(films: Decoded, config: DataConfig, mesh: Mesh | None = None) -> Decoded:
    """Returns images of `lungs.FILM` pixels cropped to the lungs, from the cache if it has them.

    Raises:
        InputError: the cache folder cannot be written.
    """
    folder = cache_folder() if config.cache is None else config.cache
    made_from = f"{films.fingerprint} {lungs.version()} {config.size}"
    key = hashlib.sha256(made_from.encode()).hexdigest()
    home = folder / f"framed-{config.size}-{key[:32]}"
    arrays = _read(home)
    together = cache.make_together(folder, arrays is None)
    if arrays is None or together:
        if home.exists() and processes.is_main():
            print(f"{home} is damaged and is created again", file=sys.stderr)
        try:
            mesh = devices.make_mesh(DeviceConfig()) if mesh is None else devices.local_mesh(mesh)
            _frame_into(home, films.images, config.size, mesh, together)
        except OSError as error:
            raise no_cache(folder, error) from None
        arrays = _read(home)
    if arrays is None:
        raise InputError(f"{home} cannot be read back; choose another disk with --data.cache")
    images, boxes, found = arrays
    return replace(
        films, images=images, boxes=boxes, found=found, films=films.images, fingerprint=key
    )


def _read(home: Path) -> list[np.ndarray] | None:
    """Returns the arrays of a cache folder; None if they are missing or damaged."""
    try:
        checksums = json.loads((home / "done.json").read_text("utf-8"))
        arrays = [
            np.load(home / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS
        ]
        if [checksum(array) for array in arrays] == [checksums[name] for name in _ARRAYS]:
            return arrays
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        pass
    return None


def _frame_into(home: Path, films: np.ndarray, size: int, mesh: Mesh, together: bool) -> None:
    with cache.shared_work_folder(home, together) as work:
        mine = processes.share(len(films)) if together else range(len(films))
        found = lungs.Framer(size, mesh)(films[mine.start : mine.stop])
        for name, array in found._asdict().items():
            save_array(work / f"{name}-{mine.start:012}.npy", array)
        if together:
            processes.gather(None)
            if not processes.is_main():
                return
        for name in _ARRAYS:
            cache.joined(sorted(work.glob(f"{name}-*.npy")), work / f"{name}.npy")
        arrays = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        with write_atomically(work / "done.json") as file:
            json.dump({name: checksum(array) for name, array in arrays.items()}, file)
        if home.exists() and _read(home) is None:
            home.rename(work.with_name("before"))  # removed with the work folder
        try:
            work.rename(home)
        except OSError:
            if not home.is_dir():  # otherwise another process was first, with the same result
                raise
