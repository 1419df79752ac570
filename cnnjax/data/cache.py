"""Decodes images once, into a memory-mapped uint8 array that later runs find again.

The array lies in a folder whose name is a hash of its sources (names, sizes, times and inodes; in a
zip, checksums) and of the decode settings. The folder appears whole or not at all, so any number of
processes may look for it or create it at the same time. Its checksum is verified at each read, and
a damaged array is decoded again; therefore nothing waits until the data are on disk. The processes
of a run that share a cache folder each decode a part of the images.

If the array would be larger than a limit, the folder holds only the facts that need all pixels: the
files that cannot be decoded, and for each image a checksum, the mean and a thumbnail. The images
are then decoded when they are read (`cnnjax.data.onthefly`). All else is the same to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from cnnjax.config import DataConfig
from cnnjax.data import duplicates, onthefly
from cnnjax.data.decoding import Undecodable, decode_all
from cnnjax.data.examples import Example, Examples
from cnnjax.data.kermany import viral_of
from cnnjax.data.onthefly import Films
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
from cnnjax.machine.host import cache_folder

_VERSION = 3  # increase it when decode() returns other pixels for the same file

_ROWS = 4096  # rows that are converted to JSON at a time

_BLOCK = 1024  # images that are held in memory at once where their pixels are not kept


@dataclass(frozen=True)
class Decoded:
    """Images as arrays, in the order of their index."""

    images: np.ndarray | Films
    """uint8 [n, size, size], memory-mapped, or decoded when they are read."""
    examples: Examples
    """The n examples that could be decoded."""
    quarantine: tuple[tuple[str, str], ...]
    """(name, reason) of each file that could not be decoded, or is left out because its radiograph
    occurs in two classes."""
    fingerprint: str
    """SHA-256 over names under the root, labels, patients, weights and pixels; a copy of the data
    has the same. Files that cannot be decoded are included, since they take part in drawing the
    folds."""
    films: np.ndarray | Films | None = None
    """uint8 [n, side, side], like `images`: the whole images, if `images` are crops to the lungs
    (`cnnjax.data.framing`)."""
    boxes: np.ndarray | None = None
    """float32 [n, 4], the crop boxes: left, top, right, bottom, as fractions of the side of
    `films`."""
    found: np.ndarray | None = None
    """bool [n], whether lungs were found."""
    thumbnails: np.ndarray | None = None
    """uint8 [n, 32, 32], memory-mapped, thumbnails of the whole images, see
    `cnnjax.data.duplicates`."""
    home: Path | None = None
    """The folder of the images in the cache."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]; see `cnnjax.data.examples.Example.label`."""
        return self.examples.labels

    @property
    def weights(self) -> np.ndarray | None:
        """float32 [n], loss weights; None if all are 1."""
        weights = self.examples.weights.astype(np.float32)
        return None if (weights == 1).all() else weights

    @property
    def brightness(self) -> np.ndarray:
        """float64 [n], the mean gray level of each image."""
        if isinstance(self.images, Films):
            return self.images.means
        return np.array([image.mean() for image in self.images])

    @property
    def viral(self) -> np.ndarray:
        """int32 [n], 1 for viral pneumonia, 0 for bacterial, -1 if the file name does not tell."""
        return np.fromiter(map(viral_of, self.examples.names), np.int32, len(self.examples))


def load(
    examples: Sequence[Example],
    source: Source,
    size: int,
    *,
    folder: Path | None = None,
    strict: bool = False,
    progress: bool = True,
    known: Mapping[str, np.ndarray] | None = None,
    limit_mib: int = DataConfig.cache_mib,
) -> Decoded:
    """Returns the decoded images from the cache; images that it lacks are decoded into it.

    If the images would take more than the limit, they are decoded when they are read.

    Args:
        examples: the images to load.
        source: source of their bytes.
        size: side of the square images, in pixels.
        folder: the cache folder; `cnnjax.machine.host.cache_folder()` if None.
        strict: raise an error for a file that cannot be decoded, instead of leaving it out.
        progress: show a progress bar on a terminal.
        known: images that are already decoded, by name, uint8 [size, size]; used if the images fit
            the limit.
        limit_mib: largest size of the array of all images, in MiB, that is cached.

    Raises:
        InputError: no image could be decoded, one could not and `strict` is set, or the cache
            folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    examples = Examples.of(examples)
    fits = len(examples) * size**2 <= limit_mib * 2**20
    key = _key(examples, source, size)
    home = folder / f"{'images' if fits else 'facts'}-{size}-{key[:32]}"

    def read() -> _Kept | None:
        return _read(home) if fits else _read_facts(home, source, size)

    kept = read()
    missing = kept is None or not kept.final
    together = make_together(folder, missing)
    if missing or together:
        if kept is None and home.exists() and processes.is_main():
            print(f"{home} is damaged and is created again", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if fits:
                _decode_into(home, examples, source, size, progress, known or {}, together)
            else:
                _survey_into(home, examples, source, size, progress, together)
        except OSError as error:
            raise no_cache(folder, error) from None
        kept = read()
    if kept is None:
        raise InputError(f"{home} cannot be read back; choose another disk with --data.cache")
    quarantine = kept.quarantine
    if quarantine and strict:
        name, reason = quarantine[0]
        more = f", and {len(quarantine) - 1} more files like it" if len(quarantine) > 1 else ""
        raise InputError(f"{name} cannot be decoded ({reason}){more}; fix it or drop --data.strict")
    broken = {name for name, _ in quarantine}
    whole = examples
    if broken:
        whole = whole.take(np.array([name not in broken for name in examples.names]))
    if not whole:
        name, reason = quarantine[0]
        raise InputError(f"none of the {len(examples)} images can be decoded: {name}: {reason}")
    fingerprint = _fingerprint(examples, quarantine, kept.pixels)
    if processes.are_several():
        processes.on_main(lambda: len(_thumbnails(home, kept)))  # the others may then find them
    small = _thumbnails(home, kept)
    return Decoded(kept.images, whole, quarantine, fingerprint, thumbnails=small, home=home)


def decoded_of(images: np.ndarray, examples: Sequence[Example]) -> Decoded:
    """Wraps images that are already decoded, uint8 [n, size, size], in a `Decoded`."""
    examples = Examples.of(examples)
    return Decoded(images, examples, (), _fingerprint(examples, (), checksum(images)))


class _Kept(NamedTuple):
    """The content of a cache folder."""

    images: np.ndarray | Films
    quarantine: tuple[tuple[str, str], ...]
    pixels: str
    """The checksum of the images."""
    final: bool
    """Whether the files that cannot be decoded would fail again."""


def _read(home: Path) -> _Kept | None:
    """Returns the content of a cache folder; None if it is missing or damaged."""
    try:
        done = json.loads((home / "done.json").read_text("utf-8"))
        images = np.load(home / "images.npy", mmap_mode="r", allow_pickle=False)
        quarantine = tuple((name, reason) for name, reason in done["quarantine"])
        if checksum(images) == done["pixels"]:
            return _Kept(images, quarantine, done["pixels"], bool(done.get("final", True)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _read_facts(home: Path, source: Source, size: int) -> _Kept | None:
    """Returns the content of a folder of `_survey_into`; None if it is missing or damaged."""
    try:
        done = json.loads((home / "done.json").read_text("utf-8"))
        quarantine = tuple((name, reason) for name, reason in done["quarantine"])
        arrays = {name: np.load(home / f"{name}.npy", mmap_mode="r") for name in onthefly.FACTS}
        if {name: checksum(array) for name, array in arrays.items()} == done["facts"]:
            return _Kept(Films(home, source, size), quarantine, done["pixels"], done["final"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def write_quarantine(path: Path, quarantine: Sequence[tuple[str, str]]) -> None:
    """Writes `quarantine.csv`: a line for each file that is left out, with the reason."""
    with write_atomically(path) as file:
        write_rows(file, [("image", "reason"), *quarantine])


def _key(examples: Examples, source: Source, size: int) -> str:
    """Returns the SHA-256 of the JSON [version, size, [name, *signature], ...]."""
    digest = hashlib.sha256(f"[{_VERSION}, {size}, ".encode())
    for part in _json_of([name, *source.signature(name)] for name in examples.names):
        digest.update(part)
    digest.update(b"]")
    return digest.hexdigest()


def _fingerprint(examples: Examples, quarantine: Sequence[tuple[str, str]], pixels: str) -> str:
    """Returns the SHA-256 of the JSON [pixels, [[name, label, patient(, weight)], ...](, broken)].

    An image's weight is included if it is not 1, and the names of broken files if there are any.
    """
    digest = hashlib.sha256(f"[{json.dumps(pixels)}, [".encode())
    for part in _json_of(
        [e.name, e.label, e.patient, *([e.weight] if e.weight != 1 else [])] for e in examples
    ):
        digest.update(part)
    broken = sorted(name for name, _ in quarantine)
    digest.update(f"], {json.dumps(broken)}]".encode() if broken else b"]]")
    return digest.hexdigest()


def _json_of(rows: Iterable[Any]) -> Iterator[bytes]:
    """Yields the JSON of rows as in a list, in parts, so that few rows are in memory at a time."""
    rows, before = iter(rows), ""
    while part := list(itertools.islice(rows, _ROWS)):
        yield (before + json.dumps(part)[1:-1]).encode()
        before = ", "


def _thumbnails(home: Path, kept: _Kept) -> np.ndarray:
    """Returns the thumbnails of the images, memory-mapped, from the cache folder if it has them.

    If the folder cannot be written, they are in memory.
    """
    path, told = home / "thumbnails.npy", home / "thumbnails.json"

    def made_from(small: np.ndarray) -> list[Any]:
        """Valid thumbnails are made from these images, at this side, and undamaged."""
        return [duplicates.SIDE, kept.pixels, checksum(small)]

    try:
        small = np.load(path, mmap_mode="r", allow_pickle=False)
        known = json.loads(told.read_text("utf-8"))
        if len(small) == len(kept.images) and known == made_from(small):
            return small
    except (OSError, EOFError, ValueError):
        pass
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        shape = len(kept.images), duplicates.SIDE, duplicates.SIDE
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        claim_disk(partial)
        duplicates.thumbnails(kept.images, out)
        partial.replace(path)
        told.write_text(json.dumps(made_from(out)), "utf-8")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:  # a read-only cache is still usable
        return duplicates.thumbnails(kept.images)
    finally:
        partial.unlink(missing_ok=True)


def make_together(folder: Path, missing: bool) -> bool:
    """Returns whether the processes create a data set together: one lacks it, all share a folder.

    Without a shared folder, for example with a disk on each machine, each process creates its own.
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
        done = {
            "pixels": checksum(images),
            "quarantine": [broken for one in each for broken in one["quarantine"]],
            "final": all(one["final"] for one in each),
        }
        (work / "done.json").write_text(json.dumps(done), "utf-8")
        _put(work, home, _read(home))


def _put(work: Path, home: Path, before: _Kept | None) -> None:
    """Renames a finished work folder; a damaged or passing one `before` gives way to it."""
    if home.exists() and (before is None or not before.final):
        home.rename(work.with_name("before"))  # removed with the work folder
    try:
        work.rename(home)
    except OSError:
        # Another process was first; its result is the same.
        if not (home / "done.json").exists():
            raise


@contextlib.contextmanager
def shared_work_folder(home: Path, together: bool) -> Iterator[Path]:
    """Makes a `work_folder`; all processes share it if they create a data set `together`.

    The other processes leave the block after the main process.
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
    """Concatenates arrays of .npy files into one file, and removes the parts."""
    if len(parts) == 1:
        parts[0].rename(whole)
        return
    arrays = [np.load(part, mmap_mode="r") for part in parts]
    shape = sum(map(len, arrays)), *arrays[0].shape[1:]
    out = np.lib.format.open_memmap(whole, mode="w+", dtype=arrays[0].dtype, shape=shape)
    claim_disk(whole)
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
    """Decodes images into a .npy file, uint8 [n, size, size], without those that cannot be decoded.

    Returns:
        `quarantine`, the name and the reason of each file that cannot be decoded, and `final`,
        whether a later attempt would also fail for these files.
    """
    names = Examples.of(examples).names
    shape = len(names), size, size
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    claim_disk(path)
    quarantine: list[tuple[str, str]] = []
    row, final = 0, True
    new = [name for name in names if name not in known] if known else names
    bar = tqdm(names, desc="decoding", unit="image", disable=None if progress else True)
    with contextlib.closing(decode_all(source, new, size)) as decoded:
        for name in bar:
            outcome = known[name] if name in known else next(decoded)
            if isinstance(outcome, Undecodable):
                quarantine.append((name, outcome.reason))
                final = final and not outcome.passing
            else:
                images[row] = outcome
                row += 1
    if processes.are_several():  # another machine may read them
        images.flush()
    del images
    if quarantine:
        _shorten(path, row)
    return {"quarantine": quarantine, "final": final}


def _survey_into(
    home: Path,
    examples: Sequence[Example],
    source: Source,
    size: int,
    progress: bool,
    together: bool,
) -> None:
    """Decodes each image once, and keeps in a folder only the facts that need all pixels.

    The checksum of all pixels is taken in order.
    """
    names = Examples.of(examples).names
    width = max(len(os.fsencode(name)) for name in names)
    facts = {
        "names": ((), np.dtype(f"S{width}")),
        "digests": ((), np.dtype(np.uint64)),
        "means": ((), np.dtype(np.float64)),
        "thumbnails": ((duplicates.SIDE,) * 2, np.dtype(np.uint8)),
    }
    with shared_work_folder(home, together) as work:
        writes = processes.is_main() or not together
        arrays = {}
        for name, (shape, dtype) in facts.items() if writes else ():
            path = work / f"{name}.npy"
            arrays[name] = np.lib.format.open_memmap(
                path, mode="w+", dtype=dtype, shape=(len(examples), *shape)
            )
            claim_disk(path)
        digest = hashlib.sha256()
        quarantine: list[tuple[str, str]] = []
        row, final = 0, True
        shown = progress and processes.is_main()
        with tqdm(
            desc="decoding", total=len(examples), unit="image", disable=None if shown else True
        ) as bar:
            for images, good, broken in _by_block(names, source, size, together):
                digest.update(images.data)
                quarantine += [(name, outcome.reason) for name, outcome in broken]
                final = final and not any(outcome.passing for _, outcome in broken)
                rows = slice(row, row + len(images))
                row = rows.stop
                if writes:
                    arrays["names"][rows] = [os.fsencode(name) for name in good]
                    arrays["digests"][rows] = [onthefly.digest_of(image) for image in images]
                    arrays["means"][rows] = images.sum((1, 2), np.int64) / size**2
                    duplicates.thumbnails(images, arrays["thumbnails"][rows])
                bar.update(len(good) + len(broken))
        if not writes:
            return
        for name in [*arrays]:
            if together:  # another machine may read them
                arrays[name].flush()
            del arrays[name]
            if quarantine:
                _shorten(work / f"{name}.npy", row)
        found = {name: checksum(np.load(work / f"{name}.npy", mmap_mode="r")) for name in facts}
        pixels = digest.hexdigest()
        told = [duplicates.SIDE, pixels, found.pop("thumbnails")]
        (work / "thumbnails.json").write_text(json.dumps(told), "utf-8")
        done = {"pixels": pixels, "quarantine": quarantine, "final": final, "facts": found}
        (work / "done.json").write_text(json.dumps(done), "utf-8")
        _put(work, home, _read_facts(home, source, size))


def _by_block(
    names: Sequence[str], source: Source, size: int, together: bool
) -> Iterator[tuple[np.ndarray, list[str], list[tuple[str, Undecodable]]]]:
    """Yields blocks of decoded images, uint8 [m, size, size], their names, and the broken files.

    If `together`, each process decodes a part of a block and receives the others' parts.
    """
    for start in range(0, len(names), _BLOCK):
        block = names[start : start + _BLOCK]
        mine = processes.share(len(block)) if together else range(len(block))
        outcomes = list(decode_all(source, block[mine.start : mine.stop], size))
        whole = [image for image in outcomes if not isinstance(image, Undecodable)]
        images = np.array(whole, np.uint8).reshape(-1, size, size)
        found = [x if isinstance(x, Undecodable) else None for x in outcomes]
        if together:
            images = processes.concatenated(images)
            found = [x and Undecodable(*x) for each in processes.gather(found) for x in each]
        pairs = list(zip(block, found, strict=True))
        yield (
            images,
            [name for name, x in pairs if x is None],
            [(name, x) for name, x in pairs if x is not None],
        )


def claim_disk(path: Path) -> None:
    """Allocates the disk blocks of a sparse file; raises OSError if the disk is full.

    Without this, writing through a memory map to a full disk would end the process by a signal.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _shorten(path: Path, rows: int) -> None:
    """Rewrites the array without the unused rows at its end, which files in quarantine left."""
    images = np.load(path, mmap_mode="r")
    shorter = path.with_suffix(".shorter.npy")
    save_array(shorter, images[:rows])
    del images
    shorter.replace(path)
