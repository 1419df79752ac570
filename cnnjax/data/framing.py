"""Decoded films cut to their lungs, kept in the cache: `--data.frame lungs`.

The folder of a set is named by a hash of the films and of the finder, and appears whole or not at
all, as the decoded films themselves (`cnnjax.data.cache`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from cnnjax import devices, lungs
from cnnjax.config import DataConfig, DeviceConfig
from cnnjax.data import cache
from cnnjax.data.cache import Decoded
from cnnjax.data.files import no_cache, save_array, sweep, work_folder
from cnnjax.data.index import Example, Source
from cnnjax.machine import cache_folder

_ARRAYS = ("images", "boxes", "found")


def load(
    examples: Sequence[Example], source: Source, config: DataConfig, mesh: Mesh | None = None
) -> Decoded:
    """Returns decoded images as a network of the config sees them.

    Args:
        examples: the images wanted.
        source: where their bytes come from.
        config: `frame`, `size`, `cache` and `strict` of it.
        mesh: the devices that find the lungs; by default all of the fastest kind.

    Raises:
        InputError: see `cnnjax.data.cache.load`.
    """
    side = config.size if config.frame == "whole" else lungs.FILM
    decoded = cache.load(examples, source, side, folder=config.cache, strict=config.strict)
    return decoded if config.frame == "whole" else framed(decoded, config, mesh)


def framed(films: Decoded, config: DataConfig, mesh: Mesh | None = None) -> Decoded:
    """Returns films of `lungs.FILM` pixels cut to their lungs, out of the cache if they are there.

    Raises:
        InputError: the cache folder cannot be written.
    """
    folder = cache_folder() if config.cache is None else config.cache
    made_from = f"{films.fingerprint} {lungs.version()} {config.size}"
    key = hashlib.sha256(made_from.encode()).hexdigest()
    home = folder / f"framed-{config.size}-{key[:32]}"
    if not home.is_dir():
        try:
            mesh = devices.make_mesh(DeviceConfig()) if mesh is None else mesh
            _frame_into(home, films.images, config.size, mesh)
        except OSError as error:
            raise no_cache(folder, error) from None
    images, boxes, found = (np.load(home / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    return replace(
        films, images=images, boxes=boxes, found=found, films=films.images, fingerprint=key
    )


def _frame_into(home: Path, films: np.ndarray, size: int, mesh: Mesh) -> None:
    sweep(home)
    with work_folder(home) as work:
        for name, array in lungs.Framer(size, mesh)(films)._asdict().items():
            save_array(work / f"{name}.npy", array)
        try:
            work.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was first, with the same
                raise
