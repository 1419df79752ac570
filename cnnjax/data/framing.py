"""Crops decoded images to the lungs (`--data.frame lungs`) and caches the crops.

The name of a cache folder is a hash of the images and of the lung finder. The folder appears whole
or not at all, as in `cnnjax.data.cache`. If the crops would be larger than `--data.cache-mib`, only
their boxes and means are cached, and the images are cropped when they are read.
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
from cnnjax.data.onthefly import Films
from cnnjax.data.sources import Source
from cnnjax.errors import InputError
from cnnjax.machine import devices, processes
from cnnjax.machine.files import (
    checksum,
    no_cache,
    write_atomically,
)
from cnnjax.machine.host import cache_folder

_VERSION = 1  # increase it when `cnnjax.crop.crop` returns other pixels for the same box
_BOXED = ("boxes", "found")
_CROPS, _BOXES = ("images", *_BOXED), ("means", *_BOXED)


def load(
    examples: Sequence[Example], source: Source, config: DataConfig, mesh: Mesh | None = None
) -> Decoded:
    """Returns decoded images, cropped as the config says.

    Args:
        examples: the images to load.
        source: source of their bytes.
        config: its `frame`, `size`, `cache`, `cache_mib` and `strict` are used.
        mesh: the devices that find the lungs; by default all devices of the fastest kind. With
            several processes, each uses its own devices for its part of the images.

    Raises:
        InputError: see `cnnjax.data.cache.load`.
    """
    decoded = cache.load(
        examples,
        source,
        decoded_size(config),
        folder=config.cache,
        strict=config.strict,
        limit_mib=config.cache_mib,
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
    fits = len(films.images) * config.size**2 <= config.cache_mib * 2**20
    fits = fits or not isinstance(films.images, Films)
    crops, boxes_only = (
        folder / f"{kind}-{config.size}-{_VERSION}-{key[:32]}" for kind in ("crops", "boxes")
    )
    home, other = (crops, boxes_only) if fits else (boxes_only, crops)
    names = _CROPS if fits else _BOXES
    arrays = _read(home, names)
    together = cache.make_together(folder, arrays is None)
    if arrays is None or together:
        if home.exists() and processes.is_main():
            print(f"{home} is damaged and is created again", file=sys.stderr)
        boxed = _read(other, _BOXED)
        if together and not all(processes.gather(boxed is not None)):
            boxed = None
        try:
            mesh = devices.make_mesh(DeviceConfig()) if mesh is None else devices.local_mesh(mesh)
            framer = lungs.Framer(config.size, mesh)
            _frame_into(home, films.images, framer, names, boxed, together)
        except OSError as error:
            raise no_cache(folder, error) from None
        arrays = _read(home, names)
    if arrays is None:
        raise InputError(f"{home} cannot be read back; choose another disk with --data.cache")
    images: np.ndarray | Films
    if isinstance(films.images, Films) and not fits:
        images = films.images.cropped(home / "boxes.npy", config.size, home / "means.npy")
    else:
        images = arrays["images"]
    return replace(
        films,
        images=images,
        boxes=arrays["boxes"],
        found=arrays["found"],
        films=films.images,
        fingerprint=key,
    )


def _read(home: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Returns these arrays of a cache folder; None if they are missing or damaged."""
    try:
        checksums = json.loads((home / "done.json").read_text("utf-8"))
        arrays = {
            name: np.load(home / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names
        }
        if all(checksum(array) == checksums[name] for name, array in arrays.items()):
            return arrays
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        pass
    return None


def _frame_into(
    home: Path,
    films: np.ndarray | Films,
    framer: lungs.Framer,
    names: Sequence[str],
    boxed: dict[str, np.ndarray] | None,
    together: bool,
) -> None:
    """Makes a cache folder.

    Args:
        home: the folder.
        films: uint8 [n, height, width].
        framer: finds the lungs and crops to them.
        names: the arrays to keep.
        boxed: the arrays `_BOXED`, if they are known.
        together: whether the processes create it together.
    """
    shapes = {
        "images": (np.uint8, (framer.size,) * 2),
        "boxes": (np.float32, (4,)),
        "found": (np.bool_, ()),
        "means": (np.float64, ()),
    }
    with cache.shared_work_folder(home, together) as work:
        mine = processes.share(len(films)) if together else range(len(films))
        mine_of = slice(mine.start, mine.stop)
        parts = {}
        for name in names:
            dtype, shape = shapes[name]
            path = work / f"{name}-{mine.start:012}.npy"
            parts[name] = np.lib.format.open_memmap(
                path, mode="w+", dtype=dtype, shape=(len(mine), *shape)
            )
            cache.claim_disk(path)
        boxes = None if boxed is None else (boxed["boxes"][mine_of], boxed["found"][mine_of])
        row = 0
        for some in framer.by_batch(films[mine_of], boxes):
            means = some.images.sum((1, 2), np.int64) / framer.size**2
            each = some._asdict() | {"means": means}
            for name, part in parts.items():
                part[row : row + len(means)] = each[name]
            row += len(means)
        for name in names:
            parts.pop(name).flush()
        if together:
            processes.gather(None)
            if not processes.is_main():
                return
        for name in names:
            cache.joined(sorted(work.glob(f"{name}-*.npy")), work / f"{name}.npy")
        arrays = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in names}
        with write_atomically(work / "done.json") as file:
            json.dump({name: checksum(array) for name, array in arrays.items()}, file)
        if home.exists() and _read(home, names) is None:
            home.rename(work.with_name("before"))  # removed with the work folder
        try:
            work.rename(home)
        except OSError:
            if not home.is_dir():  # otherwise another process was first, with the same result
                raise
