"""A tree of drawn radiographs on disk, named and divided as the published one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from joblib import Parallel, delayed
from PIL import Image
from tqdm.auto import tqdm

from cnnjax.machine.files import work_folder
from cnnjax.machine.host import cpu_cores
from cnnjax.phantom.film import Kind, check_size, draw

_PLAN = 3  # a stream of random numbers beside those of `cnnjax.phantom.film`
_MOST_SHOTS = 4
_NORMAL_SHARE = 1 / 3
_VIRUS_SHARE = 1 / 3  # of the pneumonias

_MARK = ".phantom"  # says of a tree that it is drawn

DRAWN = "drawn images (phantoms): no figure tells anything about radiographs"
"""What is said beside every figure of a run on them."""


def is_drawn(root: str) -> bool:
    """Tells whether a data root is the word `phantom` or a tree that `write_tree` made."""
    return root == "phantom" or (Path(os.path.expanduser(root)) / _MARK).is_file()  # noqa: PTH111


def write_tree(
    directory: Path,
    *,
    train: int = 1200,
    val: int = 16,
    test: int = 400,
    size: int = 256,
    seed: int = 0,
    progress: bool = True,
    workers: int | None = None,
) -> None:
    """Writes a tree of phantoms, `train|val|test/NORMAL|PNEUMONIA/*.jpeg`, whole or not at all.

    A third of a split's images is normal; of the others, a third is viral. A patient has one to
    four images, all in one split, and no person number occurs twice. The files are named as those
    of Kermany et al. (see `cnnjax.data.patients`) and, on one machine and with one version of NumPy
    and Pillow, the same bytes for the same seed, however many workers draw.

    Args:
        directory: where to; its parents are made, and it must be empty or not there.
        train: images of the train split; no images, no split.
        val: images of the val split.
        test: images of the test split.
        size: side of the images in pixels.
        seed: another seed draws other patients.
        progress: show a bar if standard error is a terminal.
        workers: processes that draw; by default one a CPU core, or fewer for few images. With 1,
            the caller's own process draws.

    Raises:
        FileExistsError: the directory is a file or holds something.
        ValueError: a split is too small to hold both classes, or there is none; or see `draw`.
        OSError: it cannot be written.
    """
    directory = directory.resolve()  # a name to rename to, even for "."
    films = _plan({"train": train, "val": val, "test": test}, seed)
    check_size(size)
    _check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(directory) as root:
        text = "Drawn by cnnjax.phantom: these are no radiographs of anyone.\n"
        (root / _MARK).write_text(text, "utf-8")
        for folder in {film.name.parent for film in films}:
            (root / folder).mkdir(parents=True)

        bar = tqdm(
            desc="phantoms", total=len(films), unit="image", disable=None if progress else True
        )
        with bar:
            for _ in _each(partial(_write, root, seed, size), films, workers):
                bar.update()
        try:
            root.replace(directory)
        except OSError:
            _check_free(directory)  # another process may have been quicker
            raise


class _Film(NamedTuple):
    """One image of a tree, before it is drawn."""

    name: PurePosixPath
    patient: int
    shot: int
    kind: Kind


def _plan(images: Mapping[str, int], seed: int) -> list[_Film]:
    """Returns the films of every split, patients whole and numbered without regard to the class."""
    if seed < 0:
        raise ValueError(f"the seed must be at least 0, got {seed}")
    if min(images.values()) < 0 or not any(images.values()):
        given = ", ".join(f"{split} {total}" for split, total in images.items())
        raise ValueError(f"no split may have fewer than 0 images, nor all of them 0; got {given}")
    rng = np.random.default_rng((_PLAN, seed))
    films: list[_Film] = []
    patient = 0
    for split, total in images.items():
        if total == 1:
            raise ValueError(
                f"{split} cannot hold both classes in 1 image; give it 2 or more, or 0"
            )
        normal = max(round(total * _NORMAL_SHARE), min(total, 1))
        virus = round((total - normal) * _VIRUS_SHARE)
        wanted: dict[Kind, int] = {
            "normal": normal,
            "bacteria": total - normal - virus,
            "virus": virus,
        }
        for kind, left in wanted.items():
            while left:
                patient += 1
                shots = min(left, int(rng.integers(1, _MOST_SHOTS, endpoint=True)))
                prefix = "NORMAL2-" if rng.random() < 0.5 else ""
                for shot in range(shots):
                    if kind == "normal":
                        again = f"-{shot + 1:04}" if shot else ""
                        name = f"{split}/NORMAL/{prefix}IM-{patient:04}-0001{again}.jpeg"
                    else:
                        name = f"{split}/PNEUMONIA/person{patient}_{kind}_{len(films) + 1}.jpeg"
                    films.append(_Film(PurePosixPath(name), patient, shot, kind))
                left -= shots
    return films


def _write(root: Path, seed: int, size: int, film: _Film) -> None:
    image = draw(seed, film.patient, film.shot, film.kind, size).image
    Image.fromarray(image).save(root / film.name, quality=90)


def _each(
    work: Callable[[_Film], None], films: Sequence[_Film], workers: int | None
) -> Iterator[None]:
    """Does the work for each film, in this process or in others, and yields as it gets done."""
    if workers is None:
        # A process takes as long to start as some tens of images to draw.
        workers = min(cpu_cores(), 1 + len(films) // 100)
    # Not threads: the arrays are so small that the GIL changes hands more often than it frees. And
    # not multiprocessing: joblib's processes don't run the caller's script again.
    yield from Parallel(workers, return_as="generator")(delayed(work)(film) for film in films)


def _check_free(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is there and not empty; choose another directory")
