"""Input images of `cnnjax predict`, and its heat-map files."""

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
from cnnjax.data.examples import Texts
from cnnjax.data.names import IMAGE_SUFFIXES, SUFFIXES, may_be_dicom, walk
from cnnjax.errors import InputError
from cnnjax.evaluation.explain import draw_box, normalized, overlay
from cnnjax.machine.host import cpu_cores

_SHOWN = 512  # pixels: longer side of the heat-map files


class Film(NamedTuple):
    """An input image."""

    name: str
    """Its path; `-` for standard input."""
    read: Callable[[], bytes]
    """Returns the encoded image; can be called repeatedly; raises OSError."""


def expect_apart(folder: Path, films: Sequence[Film], given: Sequence[Path]) -> None:
    """Checks that the heat-map folder is separate from the input images.

    Otherwise a heat map could overwrite an image, or become an input of the next call.

    Args:
        folder: folder for the heat maps.
        films: the input images.
        given: the files and folders given on the command line.

    Raises:
        InputError: the folder contains input images or lies in a given folder.
    """
    files = [Path(film.name) for film in films if film.name != "-"]
    homes = {file.resolve().parent for file in files} | {file.parent.resolve() for file in files}
    if folder.resolve() in homes:
        raise InputError(f"--heatmap {folder} is the folder of the images; give another folder")
    for path in filter(Path.is_dir, given):
        judged = {
            path.resolve(),
            *((path / inner).resolve() for inner in walk(path, confined=False).folders),
        }
        if not judged.isdisjoint((folder.resolve(), *folder.resolve().parents)):
            raise InputError(
                f"--heatmap {folder} is inside {path}, an input folder; give a folder outside it"
            )


def expect_none_of(path: Path | None, flag: str, films: Sequence[Film]) -> None:
    """Raises InputError if an output would overwrite an input image."""
    if path is None or not path.is_file():
        return
    status = path.stat()
    for film in films:
        with contextlib.suppress(OSError):
            if film.name != "-" and os.path.samestat(Path(film.name).stat(), status):
                raise InputError(f"{flag} {path} is one of the images; give another file")


def in_chunks(films: Sequence[Film], size: int, few: int) -> list[Sequence[Film]]:
    """Splits images into chunks of `size`; a last chunk of at most `few` joins the one before."""
    ends = list(range(size, len(films), size))
    if ends and len(films) - ends[-1] <= few:
        ends.pop()
    return [films[a:b] for a, b in itertools.pairwise([0, *ends, len(films)])]


def decoded(
    chunks: Sequence[Sequence[Film]], size: int
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray | None]]:
    """Decodes chunks of images on all cores; the next chunk is decoded while the caller works.

    Args:
        chunks: the images.
        size: side of the decoded squares, in pixels.

    Yields:
        For each chunk, a pair. First, one row for each image: its `path`, an `error` if it cannot
        be decoded, and a `warning` if its DICOM tags give one. Second, the n decoded images as
        uint8 [n, size, size]; None if there are none.
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
    """Returns the names of the heat-map files without suffix; numbered if any two are equal."""
    names = ["stdin" if film.name == "-" else Path(film.name).stem for film in films]
    if len(set(names)) < len(names):  # else one file would overwrite another
        names = [f"{name}-{i}" for i, name in enumerate(names)]
    return names


def heat_classes(several: Sequence[str]) -> dict[int | None, str]:
    """Returns the suffix of the heat-map file names, by the label that the heat explains.

    Args:
        several: the names of three or more classes. Empty for two classes: the key is then None,
            for the positive class, and the suffix is empty.
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
    """Writes a PNG for each image with its heat map as an overlay, in its aspect ratio.

    Args:
        folder: output folder; created if missing.
        films: n images that can be decoded, each with the name of its heat-map file.
        heat: float [n, size, size], evidence for a class.
        boxes: float [n, 4], the part of each image that the network saw: left, top, right and
            bottom, as fractions of the sides. Its outline is drawn unless it is the whole image.

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
    """Returns a function that reads a file.

    The content of a pipe is cached: it can be read once only, and heat maps read the image again.
    """
    with contextlib.suppress(OSError):  # the returned function will raise it again
        if path.is_file():
            return functools.partial(read_file, path)
    return functools.cache(functools.partial(read_file, path, pipes=True))


def _refusal(reason: str) -> Callable[[], bytes]:
    """Returns a reader that raises OSError with the given reason."""

    def read() -> bytes:
        raise OSError(reason)

    return read


def _piped() -> Film:
    """Returns the image on standard input, read to the end."""
    if sys.stdin.isatty():
        raise InputError("predict - reads an image from a pipe or file: predict - < FILE")
    try:
        return Film("-", functools.partial(bytes, read_stream(sys.stdin.buffer)))
    except OSError as error:
        return Film("-", _refusal(error.strerror or str(error)))


def _inside(folder: Path) -> list[Film]:
    """Returns the images in a folder, sorted by name; prints on standard error what is skipped.

    A path with the suffix of an image that is not a regular file, such as a pipe, becomes an
    image that cannot be read.

    Raises:
        InputError: the folder holds no images or cannot be read.
    """
    walked = walk(folder, confined=False)
    images = Texts(name for name in walked.files if _is_image(folder, name))
    once, again = walked.once(images)
    films = {name: _reader(folder / name) for name in once}
    for name, reason in walked.refused:
        if name.lower().endswith(IMAGE_SUFFIXES):
            films[name] = _refusal(reason)
    if not films:
        raise InputError(f"{folder} holds no {SUFFIXES}")
    if others := len(walked.files) - len(images):
        print(f"{folder}: {others:,} other files skipped, not {SUFFIXES}", file=sys.stderr)
    if again:
        print(f"{folder}: {len(again):,} links to listed images skipped", file=sys.stderr)
    return [Film(str(folder / name), films[name]) for name in sorted(films)]


def _is_image(folder: Path, name: str) -> bool:
    """Returns whether a file is an image, by its suffix or by the header of a DICOM file."""
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
    """Returns the images for the given paths: files, images in folders, or `-` (standard input).

    The images of a folder are sorted by name. Skipped files are reported on standard error.

    Raises:
        InputError: no path is given, or a folder holds no images or cannot be read.
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
