"""Writes a tree of drawn radiographs, with the names and splits of the published data set."""

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

_PLAN = 3  # number of a random stream; `cnnjax.phantom.film` uses others
_MOST_SHOTS = 4
_NORMAL_SHARE = 1 / 3
_VIRUS_SHARE = 1 / 3  # among the pneumonia images

_MARK = ".phantom"  # name of the file that marks a tree as drawn

DRAWN = "drawn images (phantoms): no figure says anything about radiographs"
"""Note that is printed next to every figure of a run on phantoms."""


def is_drawn(root: str) -> bool:
    """Returns whether a data root is the word `phantom` or a tree from `write_tree`."""
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
    """Writes a tree of phantoms, `train|val|test/NORMAL|PNEUMONIA/*.jpeg`, atomically.

    A third of a split's images is normal; a third of the others is viral. A patient has one to four
    images, all in one split, and each person number is used once. The files are named like those of
    Kermany et al. (see `cnnjax.data.kermany`). On one machine and with one version of NumPy and
    Pillow, the same seed gives the same bytes, for any number of workers.

    Args:
        directory: the target; its parents are created, and it must be empty or not exist.
        train: number of images in the train split; 0 omits the split.
        val: number of images in the val split.
        test: number of images in the test split.
        size: side of the images in pixels.
        seed: seed of the population.
        progress: show a progress bar if standard error is a terminal.
        workers: number of processes that draw; by default one per CPU core, or fewer for few
            images. With 1, the caller's process draws.

    Raises:
        FileExistsError: the directory is a file or is not empty.
        ValueError: a split is too small for both classes, or there is no split; or see `draw`.
        OSError: the tree cannot be written.
    """
    directory = directory.resolve()  # rename needs a name, even for "."
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
            _check_free(directory)  # another process may have been first
            raise


class _Film(NamedTuple):
    """An image of the tree that is not drawn yet."""

    name: PurePosixPath
    patient: int
    shot: int
    kind: Kind


def _plan(images: Mapping[str, int], seed: int) -> list[_Film]:
    """Returns the images of every split, grouped by patient, with consecutive numbers."""
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
    """Calls work for each image, in this process or in others, and yields after each."""
    if workers is None:
        # Starting a process takes as long as drawing some tens of images.
        workers = min(cpu_cores(), 1 + len(films) // 100)
    # Threads would be slower: the arrays are so small that the GIL is the bottleneck.
    # multiprocessing would run the caller's script again; joblib does not.
    yield from Parallel(workers, return_as="generator")(delayed(work)(film) for film in films)


def _check_free(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; choose another directory")
