"""Decode once: images on disk to one memory-mapped uint8 array, found again at the next start.

The array lies in a folder named by a hash of what it was made from: names, sizes, times and inodes
(in a zip, checksums) and decode settings. The folder appears whole or not at all, so any number of
processes may look for it or make it at once. Its checksum is verified whenever it is read, and what
is damaged is made anew. Processes of one run that see the same cache decode a part of the images
each.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from cnnjax.data import duplicates
from cnnjax.data.decode import DecodeError, MissingDecoder, decode
from cnnjax.data.index import Example
from cnnjax.data.kermany import viral_of
from cnnjax.data.sources import Source
from cnnjax.errors import InputError
from cnnjax.machine import processes
from cnnjax.machine.files import (
    checksum,
    no_cache,
    save_array,
    sweep,
    work_folder,
    write_atomically,
    write_rows,
)
from cnnjax.machine.host import cache_folder, cpu_cores

_VERSION = 3  # raise it when decode() gives other pixels for the same file

# Images that a thread decodes before it hands them over: a small one takes hardly longer than to
# wake another thread. Each thread has some such turns, so that none works alone in the end.
_TURN, _TURNS = 32, 8


@dataclass(frozen=True)
class Decoded:
    """Images as arrays, in the order of their index."""

    images: np.ndarray
    """uint8 [n, size, size], memory-mapped."""
    examples: tuple[Example, ...]
    """The n examples that could be decoded."""
    quarantine: tuple[tuple[str, str], ...]
    """(name, reason) of each file that could not, or is left out as one film of two classes."""
    fingerprint: str
    """SHA-256 over names under the root, labels, patients, weights and pixels; a copy has the same.
    Files that cannot be decoded count too, as folds are drawn over them."""
    films: np.ndarray | None = None
    """uint8 [n, film side, film side], memory-mapped: what `images` were cut from, if they were cut
    to the lungs (`cnnjax.data.framing`)."""
    boxes: np.ndarray | None = None
    """float32 [n, 4], where in the films: left, top, right, bottom, as parts of the side."""
    found: np.ndarray | None = None
    """bool [n], whether lungs were found."""
    thumbnails: np.ndarray | None = None
    """uint8 [n, 32, 32], of `cnnjax.data.duplicates`, of whole images."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [n], see `cnnjax.data.index.Example.label`."""
        return np.array([e.label for e in self.examples], np.int32)

    @property
    def weights(self) -> np.ndarray | None:
        """float32 [n], by which losses are multiplied; None where that is 1 for every image."""
        weights = np.array([e.weight for e in self.examples], np.float32)
        return None if (weights == 1).all() else weights

    @property
    def viral(self) -> np.ndarray:
        """int32 [n], 1 for a viral pneumonia, 0 for a bacterial one, -1 where no name tells."""
        return np.array([viral_of(e.name) for e in self.examples], np.int32)


def load(
    examples: Sequence[Example],
    source: Source,
    size: int,
    *,
    folder: Path | None = None,
    strict: bool = False,
    progress: bool = True,
    known: Mapping[str, np.ndarray] | None = None,
) -> Decoded:
    """Returns the decoded images, from the cache if it has them, else decoding them into it.

    Args:
        examples: the images wanted.
        source: where their bytes come from.
        size: side of the squares, in pixels.
        folder: where the cache lies; `cnnjax.machine.host.cache_folder()` when None.
        strict: raise at a file that cannot be decoded, instead of leaving it out.
        progress: show a bar on a terminal.
        known: images by name that need not be decoded, uint8 [size, size].

    Raises:
        InputError: no image could be decoded, one could not and `strict`, or the cache folder
            cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    key = _key(examples, source, size)
    home = folder / f"images-{size}-{key[:32]}"
    kept = _read(home)
    missing = kept is None or not kept.final
    together = make_together(folder, missing)
    if missing or together:
        if kept is None and home.exists() and processes.is_main():
            print(f"{home} is damaged and is made anew", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _decode_into(home, examples, source, size, progress, known or {}, together)
        except OSError as error:
            raise no_cache(folder, error) from None
        kept = _read(home)
    if kept is None:
        raise InputError(f"{home} cannot be read back; choose another disk with --data.cache")
    quarantine = kept.quarantine
    if quarantine and strict:
        name, reason = quarantine[0]
        more = f", and {len(quarantine) - 1} more files like it" if len(quarantine) > 1 else ""
        raise InputError(f"{name} cannot be decoded ({reason}){more}; fix it or drop --data.strict")
    broken = {name for name, _ in quarantine}
    whole = tuple(e for e in examples if e.name not in broken)
    if not whole:
        name, reason = quarantine[0]
        raise InputError(f"none of the {len(examples)} images can be decoded: {name}: {reason}")
    fingerprint = _fingerprint(examples, quarantine, kept.pixels)
    if processes.are_several():
        processes.on_main(lambda: len(_thumbnails(home, kept)))  # which the others may find then
    small = _thumbnails(home, kept)
    return Decoded(kept.images, whole, quarantine, fingerprint, thumbnails=small)


def decoded_of(images: np.ndarray, examples: tuple[Example, ...]) -> Decoded:
    """Returns images that are decoded already, uint8 [n, size, size], as a `Decoded`."""
    return Decoded(images, examples, (), _fingerprint(examples, (), checksum(images)))


class _Kept(NamedTuple):
    """What lies in a folder of the cache."""

    images: np.ndarray
    quarantine: tuple[tuple[str, str], ...]
    pixels: str
    """The checksum of the images."""
    final: bool
    """Whether everything is decoded that ever will be."""


def _read(home: Path) -> _Kept | None:
    """Returns what a folder of the cache holds; None where it holds nothing, or is damaged."""
    try:
        done = json.loads((home / "done.json").read_text("utf-8"))
        images = np.load(home / "images.npy", mmap_mode="r", allow_pickle=False)
        quarantine = tuple((name, reason) for name, reason in done["quarantine"])
        if checksum(images) == done["pixels"]:
            return _Kept(images, quarantine, done["pixels"], bool(done.get("final", True)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def write_quarantine(path: Path, quarantine: Sequence[tuple[str, str]]) -> None:
    """Writes `quarantine.csv`: a line for each file that is left out, with the reason."""
    with write_atomically(path) as file:
        write_rows(file, [("image", "reason"), *quarantine])


def _key(examples: Sequence[Example], source: Source, size: int) -> str:
    made_from = [_VERSION, size, *((e.name, *source.signature(e.name)) for e in examples)]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _fingerprint(
    examples: Sequence[Example], quarantine: Sequence[tuple[str, str]], pixels: str
) -> str:
    broken = sorted(name for name, _ in quarantine)
    rows = [(e.name, e.label, e.patient, *([e.weight] if e.weight != 1 else [])) for e in examples]
    content = [pixels, rows, *([broken] if broken else [])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _thumbnails(home: Path, kept: _Kept) -> np.ndarray:
    """Returns the images' thumbnails, from the folder of the cache if it has them."""
    path, told = home / "thumbnails.npy", home / "thumbnails.json"
    try:
        small = np.load(path, allow_pickle=False)
        # Of these images, in this way, and whole.
        made_from = [duplicates.SIDE, kept.pixels, checksum(small)]
        if json.loads(told.read_text("utf-8")) == made_from and len(small) == len(kept.images):
            return small
    except (OSError, EOFError, ValueError):
        pass
    small = duplicates.thumbnails(kept.images)
    with contextlib.suppress(OSError):  # a cache that can only be read serves all the same
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            save_array(partial, small)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        with write_atomically(told) as file:
            json.dump([duplicates.SIDE, kept.pixels, checksum(small)], file)
    return small


def make_together(folder: Path, missing: bool) -> bool:
    """Tells whether the processes of a run make a set together: one lacks it, and all see a folder.

    Where they don't, as with a disk for each machine, each makes what it lacks by itself.
    """
    if not any(processes.gather(missing)):
        return False
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return processes.are_several() and processes.see(folder)


def _decode_into(
    home: Path,
    examples: Sequence[Example],
    source: Source,
    size: int,
    progress: bool,
    known: Mapping[str, np.ndarray],
    together: bool,
) -> None:
    with shared_work_folder(home, together) as work:
        mine = processes.share(len(examples)) if together else range(len(examples))
        some = examples[mine.start : mine.stop]
        part = work / f"part-{mine.start:012}.npy"
        told = _decode_part(part, some, source, size, progress and processes.is_main(), known)
        each = processes.gather(told) if together else [told]
        if together and not processes.is_main():
            return
        joined(sorted(work.glob("part-*.npy")), work / "images.npy")
        images = np.load(work / "images.npy", mmap_mode="r")
        with write_atomically(work / "done.json") as file:
            done = {
                "pixels": checksum(images),
                "quarantine": [broken for one in each for broken in one["quarantine"]],
                "final": all(one["final"] for one in each),
            }
            json.dump(done, file)
        if home.exists() and ((kept := _read(home)) is None or not kept.final):
            home.rename(work.with_name("before"))  # goes with the work folder
        try:
            work.rename(home)
        except OSError:
            # Another process was first; what it made is what we made.
            if not (home / "done.json").exists():
                raise


@contextlib.contextmanager
def shared_work_folder(home: Path, together: bool) -> Iterator[Path]:
    """Makes a `work_folder`, one for all processes of a run if they make a set `together`.

    All leave the block when the main process has.
    """
    if not together:
        sweep(home)
        with work_folder(home) as work:
            yield work
        return
    with contextlib.ExitStack() as stack:
        own = ""
        if processes.is_main():
            sweep(home)
            own = str(stack.enter_context(work_folder(home)))
        yield Path(processes.gather(own)[0])
        processes.gather(None)


def joined(parts: Sequence[Path], whole: Path) -> None:
    """Puts arrays of .npy files one after the other into one, and removes the parts."""
    if len(parts) == 1:
        parts[0].rename(whole)
        return
    arrays = [np.load(part, mmap_mode="r") for part in parts]
    shape = sum(map(len, arrays)), *arrays[0].shape[1:]
    out = np.lib.format.open_memmap(whole, mode="w+", dtype=arrays[0].dtype, shape=shape)
    _claim_disk(whole)
    row = 0
    for part, array in zip(parts, arrays, strict=True):
        out[row : row + len(array)] = array
        row += len(array)
        part.unlink()
    out.flush()


def _decode_part(
    path: Path,
    examples: Sequence[Example],
    source: Source,
    size: int,
    progress: bool,
    known: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Decodes images into a .npy file, uint8 [n, size, size] of those that can be.

    Returns:
        `quarantine`, the name and the reason of each other one, and `final`, whether these would
        not be readable another time either.
    """
    passing = []  # files that may be readable the next time

    cores = cpu_cores()
    turn = max(1, min(_TURN, len(examples) // (cores * _TURNS)))

    def decode_some(start: int) -> list[np.ndarray | str]:
        return [decode_one(example) for example in examples[start : start + turn]]

    def decode_one(example: Example) -> np.ndarray | str:
        if example.name in known:
            return known[example.name]
        try:
            return decode(source.read(example.name), size)
        except DecodeError as error:
            if isinstance(error, MissingDecoder):
                passing.append(example.name)
            return str(error)
        except OSError as error:
            # The system's word, not one about the content. (A link's signature is its target's.)
            if error.errno is not None and not isinstance(error, FileNotFoundError):
                passing.append(example.name)
            return f"cannot be read: {error.strerror or error}"

    shape = len(examples), size, size
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    _claim_disk(path)
    quarantine: list[tuple[str, str]] = []
    row = 0
    # Threads suffice: Pillow decodes and resizes without holding the interpreter's lock.
    with ThreadPoolExecutor(cores) as pool:
        turns = pool.map(decode_some, range(0, len(examples), turn))
        outcomes = tqdm(
            zip(examples, itertools.chain.from_iterable(turns), strict=True),
            desc="decoding",
            total=len(examples),
            unit="image",
            disable=None if progress else True,
        )
        for example, outcome in outcomes:
            if isinstance(outcome, str):
                quarantine.append((example.name, outcome))
            else:
                images[row] = outcome
                row += 1
    images.flush()
    del images
    if quarantine:
        _shorten(path, row)
    return {"quarantine": quarantine, "final": not passing}


def _claim_disk(path: Path) -> None:
    """Raises OSError where the disk has no room for a sparse file: written through a memory map, it
    would end the process by a signal."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _shorten(path: Path, rows: int) -> None:
    """Rewrites the array without the rows at its end, which files in quarantine left unused."""
    images = np.load(path, mmap_mode="r")
    shorter = path.with_suffix(".shorter.npy")
    save_array(shorter, images[:rows])
    del images
    shorter.replace(path)
