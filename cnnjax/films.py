"""The images that `cnnjax predict` is given, and the pictures of heat that it makes of them."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cnnjax.data import dicom
from cnnjax.data.bounds import read_file, read_stream
from cnnjax.data.decode import decode
from cnnjax.data.names import IMAGE_SUFFIXES, SUFFIXES, may_be_dicom, walk
from cnnjax.errors import InputError
from cnnjax.explain import normalized, overlay

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


def write_heat(folder: Path, films: Sequence[Film], heat: np.ndarray, boxes: np.ndarray) -> None:
    """Writes a PNG for each image, brightest where it has most evidence.

    Args:
        folder: where to; made where it is not there.
        films: n images that can be decoded.
        heat: float [n, size, size], evidence for the positive class.
        boxes: float [n, 4], what the network saw of each image: left, top, right and bottom, as
            parts of the side; the edge of a part is drawn.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [Path(film.name).stem for film in films]
    names = ["stdin" if name == "-" else name for name in names]
    if len(set(names)) < len(names):  # numbered, so that none is written over another
        names = [f"{name}-{i}" for i, name in enumerate(names)]
    pairs = zip(names, films, normalized(heat), boxes, strict=True)
    for name, film, one, box in tqdm(pairs, "heat maps", len(films), disable=None):
        large = Image.fromarray(one).resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC)
        shown = overlay(decode(film.read(), _SHOWN), np.clip(np.asarray(large), 0, 1))
        picture = Image.fromarray(shown)
        draw_box(picture, box)
        picture.save(folder / f"{name}.png")


def draw_box(picture: Image.Image, box: np.ndarray) -> None:
    """Draws the edge of a box into an RGB picture, unless it is the whole of it.

    Args:
        picture: is changed.
        box: float [4], left, top, right and bottom, as parts of the sides.
    """
    if np.array_equal(box, (0, 0, 1, 1)):
        return
    corners = np.asarray(box).reshape(2, 2) * picture.size
    left, top = np.floor(corners[0]).tolist()
    right, bottom = (np.ceil(corners[1]) - 1).tolist()
    ImageDraw.Draw(picture).rectangle((left, top, right, bottom), outline=(120, 200, 255))


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
