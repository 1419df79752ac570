"""The images that `cnnjax predict` is given, and the pictures of heat that it makes of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cnnjax.data import dicom
from cnnjax.data.bounds import read_file, read_stream
from cnnjax.data.decode import DecodeError, decode, layout_of
from cnnjax.data.names import IMAGE_SUFFIXES, SUFFIXES, may_be_dicom, walk
from cnnjax.errors import InputError
from cnnjax.evaluation.explain import draw_box, normalized, overlay
from cnnjax.machine.host import cpu_cores

_SHOWN = 512  # pixels: side of the pictures of heat


class Film(NamedTuple):
    """An image to be judged."""

    name: str
    """Its path; `-` for that of standard input."""
    read: Callable[[], bytes]
    """Returns the encoded image, as often as it is asked; raises OSError."""


def expect_apart(folder: Path, films: Sequence[Film], given: Sequence[Path]) -> None:
    """Checks that pictures of heat would not lie among the films, over one or to be judged as one.

    Args:
        folder: of the pictures.
        films: what is judged now.
        given: the files and folders that it was found in.

    Raises:
        InputError: they would.
    """
    files = [Path(film.name) for film in films if film.name != "-"]
    homes = {file.resolve().parent for file in files} | {file.parent.resolve() for file in files}
    if folder.resolve() in homes:
        raise InputError(f"--heatmap {folder} is the images' own folder; name another one")
    for path in filter(Path.is_dir, given):
        judged = {
            path.resolve(),
            *((path / inner).resolve() for inner in walk(path, confined=False).folders),
        }
        if not judged.isdisjoint((folder.resolve(), *folder.resolve().parents)):
            raise InputError(
                f"--heatmap {folder} lies in {path}, whose images are judged; name one elsewhere"
            )


def expect_none_of(path: Path | None, flag: str, films: Sequence[Film]) -> None:
    """Raises InputError where an output would be written over one of the films."""
    if path is None or not path.is_file():
        return
    status = path.stat()
    for film in films:
        with contextlib.suppress(OSError):
            if film.name != "-" and os.path.samestat(Path(film.name).stat(), status):
                raise InputError(f"{flag} {path} is one of the images; name another file")


def in_chunks(films: Sequence[Film], size: int, few: int) -> list[Sequence[Film]]:
    """Cuts films into chunks of `size`; up to `few` that would be left go with those before."""
    ends = list(range(size, len(films), size))
    if ends and len(films) - ends[-1] <= few:
        ends.pop()
    return [films[a:b] for a, b in itertools.pairwise([0, *ends, len(films)])]


def decoded(
    chunks: Sequence[Sequence[Film]], size: int
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray | None]]:
    """Decodes chunks of films on all cores, each while the one before is judged.

    Args:
        chunks: the films.
        size: side of the squares, in pixels.

    Yields:
        For each chunk a row for each film, with its `path`, an `error` where it cannot be decoded,
        and a `warning` where its tags give one; and uint8 [n, size, size] of those that can be
        decoded, None where there are none.
    """
    with ThreadPoolExecutor(cpu_cores()) as pool:
        waiting: deque[list[Future[_Read]]] = deque()
        try:
            for chunk in (*chunks, ()):
                waiting.append([pool.submit(_read, film, size) for film in chunk])
                if len(waiting) > 1:
                    done = [future.result() for future in waiting.popleft()]
                    images = [image for image, _ in done if image is not None]
                    yield [row for _, row in done], np.stack(images) if images else None
        finally:
            for future in itertools.chain.from_iterable(waiting):
                future.cancel()


_Read = tuple[np.ndarray | None, dict[str, Any]]


def _read(film: Film, size: int) -> _Read:
    row: dict[str, Any] = {"path": film.name}
    try:
        encoded = film.read()
        image = decode(encoded, size)
    except (DecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return None, row | {"error": reason or str(error)}
    if dicom.is_dicom(encoded) and (doubts := dicom.doubts(encoded)):
        row["warning"] = "; ".join(doubts)
    return image, row


def heat_names(films: Sequence[Film]) -> list[str]:
    """Returns the names of the films' pictures without suffix; numbered where two are alike."""
    names = ["stdin" if film.name == "-" else Path(film.name).stem for film in films]
    if len(set(names)) < len(names):  # so that none is written over another
        names = [f"{name}-{i}" for i, name in enumerate(names)]
    return names


def heat_classes(several: Sequence[str]) -> dict[int | None, str]:
    """Returns what is added to the names of the pictures, by the label that their heat is about.

    Args:
        several: the classes, where each has a probability; else the one picture is of the positive
            class.
    """
    if not several:
        return {None: ""}
    names = [re.sub(r"[^\w.-]", "_", name) for name in several]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names)]
    return {label: f"-{name}" for label, name in enumerate(names)}


def write_heat(
    folder: Path, films: Sequence[tuple[Film, str]], heat: np.ndarray, boxes: np.ndarray
) -> None:
    """Writes a PNG for each image, of its aspect ratio, brightest where it has most evidence.

    Args:
        folder: where to; made where it is not there.
        films: n images that can be decoded, each with the name of its picture.
        heat: float [n, size, size], evidence for a class.
        boxes: float [n, 4], what the network saw of each image: left, top, right and bottom, as
            parts of the side; the edge of a part is drawn.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for (film, name), one, box in zip(films, normalized(heat), boxes, strict=True):
        large = Image.fromarray(one).resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC)
        encoded = film.read()
        shown = overlay(decode(encoded, _SHOWN), np.clip(np.asarray(large), 0, 1))
        sides = layout_of(encoded).within(_SHOWN)
        picture = Image.fromarray(shown).resize(sides, Image.Resampling.BICUBIC)
        draw_box(picture, box)
        picture.save(folder / f"{name}.png")


def _reader(path: Path) -> Callable[[], bytes]:
    """Returns what reads a file; a pipe only once: it is empty then, and heat maps read again."""
    with contextlib.suppress(OSError):  # what reads it will tell
        if path.is_file():
            return functools.partial(read_file, path)
    return functools.cache(functools.partial(read_file, path, pipes=True))


def _refusal(reason: str) -> Callable[[], bytes]:
    """Returns what raises OSError wherever a film is read."""

    def read() -> bytes:
        raise OSError(reason)

    return read


def _piped() -> Film:
    """Returns the film of standard input, read to its end."""
    if sys.stdin.isatty():
        raise InputError("predict - reads an image from a pipe; give it one: predict - < F")
    try:
        return Film("-", functools.partial(bytes, read_stream(sys.stdin.buffer)))
    except OSError as error:
        return Film("-", _refusal(error.strerror or str(error)))


def _inside(folder: Path) -> list[Film]:
    """Returns the films in a folder, sorted by name; tells on standard error what else is there.

    What is no file, as a pipe, but named as an image is a film that cannot be read.

    Raises:
        InputError: there is none, or the folder cannot be read.
    """
    walked = walk(folder, confined=False)
    images = [name for name in walked.files if _is_image(folder, name)]
    once, again = walked.once(images)
    films = {name: _reader(folder / name) for name in once}
    for name, reason in walked.refused:
        if name.lower().endswith(IMAGE_SUFFIXES):
            films[name] = _refusal(reason)
    if not films:
        raise InputError(f"{folder} holds no {SUFFIXES}")
    if others := len(walked.files) - len(images):
        print(f"{folder}: {others:,} other files passed over, not {SUFFIXES}", file=sys.stderr)
    if again:
        print(f"{folder}: {len(again):,} links to listed films passed over", file=sys.stderr)
    return [Film(str(folder / name), films[name]) for name in sorted(films)]


def _is_image(folder: Path, name: str) -> bool:
    """Tells whether a file is a film, by its suffix or as DICOM files of another suffix begin."""
    if name.lower().endswith(IMAGE_SUFFIXES):
        return True
    if not may_be_dicom(name):
        return False
    try:
        with (folder / name).open("rb") as file:
            return dicom.is_dicom(file.read(dicom.HEAD))
    except OSError:
        return False


def find(paths: Sequence[Path]) -> list[Film]:
    """Returns the files named, and those in the folders named, sorted within each.

    What else lies in a folder is told on standard error.

    Raises:
        InputError: there is none in a folder, or at all, or a folder cannot be read.
    """
    films: list[Film] = []
    for path in paths:
        if str(path) == "-":
            films.append(_piped())
        elif path.is_dir():
            films += _inside(path)
        else:
            films.append(Film(str(path), _reader(path)))
    if not films:
        raise InputError("predict needs image files or folders")
    return films
