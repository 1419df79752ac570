"""Renderings of held-out radiographs for stress-test validation.

A rendering is a changed version of an image, as another hospital might have produced it. The folds
of one collection share scanners, export and framing, so nearly every network scores well on them.
Renderings keep the diagnosis and change one of these. They are applied to the decoded image at
`SIZE` pixels, before it is cropped to the lungs and resized for the network. Each belongs to a
group (`GROUPS`): `framing`, `tone`, `sharpness`, `damage` or `stretch`. Framing differs most
between collections. The random numbers for an image depend only on a seed, the rendering and the
name of the image.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from cnnjax.errors import InputError
from cnnjax.machine.host import cpu_cores

VERSION = 2  # increase it when a rendering gives other pixels for the same image

SIZE = 224  # pixels: side of the images that renderings change

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle, as fractions of the image's sides."""


class Facts(NamedTuple):
    """Facts about an image that its pixels do not contain; None if unknown."""

    lungs: Box | None = None
    """The box around the lungs."""
    aspect: float | None = None
    """Width / height of the published file, before it was stretched to a square."""


UNKNOWN = Facts()

# (image, random generator, magnitude, facts) -> image; None if a needed fact is unknown.
_Change = Callable[[Image.Image, np.random.Generator, float, Facts], Image.Image | None]


class Rendering(NamedTuple):
    """One kind of change with its magnitude."""

    group: str
    change: _Change
    by: float
    """The magnitude; its unit depends on `change`."""


def _window(image: Image.Image, box: Box) -> Image.Image:
    """Crops an image to a box and resizes the crop to the size of the image."""
    left, top, right, bottom = (SIZE * edge for edge in box)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, right, bottom))


def _middle(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Crops to the centre; `by` is the fraction of the side that is kept."""
    edge = (1 - by) / 2
    return _window(image, (edge, edge, 1 - edge, 1 - edge))


def _off_centre(
    image: Image.Image, rng: np.random.Generator, by: float, facts: Facts
) -> Image.Image:
    """Crops to a square at a random position; `by` is the fraction of the side that is kept."""
    left, top = rng.uniform(0, 1 - by, 2)
    return _window(image, (left, top, left + by, top + by))


def _lungs(
    image: Image.Image, rng: np.random.Generator, by: float, facts: Facts
) -> Image.Image | None:
    """Crops to the lungs; `by` is the margin on each side as a fraction of the box's side."""
    if facts.lungs is None:
        return None
    left, top, right, bottom = facts.lungs
    x, y = by * (right - left), by * (bottom - top)
    return _window(
        image, (max(0, left - x), max(0, top - y), min(1, right + x), min(1, bottom + y))
    )


def _looser(image: Image.Image, rng: np.random.Generator, by: float, gray: int) -> Image.Image:
    left, top, right, bottom = rng.integers(0, round(by * SIZE) + 1, 4)
    frame = Image.new("L", (SIZE, SIZE), gray)
    inner = (SIZE - left - right, SIZE - top - bottom)
    frame.paste(image.resize(inner, Image.Resampling.BILINEAR), (int(left), int(top)))
    return frame


def _black_frame(
    image: Image.Image, rng: np.random.Generator, by: float, facts: Facts
) -> Image.Image:
    """Shrinks the image into a black frame; each edge is at most `by` of the side wide."""
    return _looser(image, rng, by, 0)


def _gray_frame(
    image: Image.Image, rng: np.random.Generator, by: float, facts: Facts
) -> Image.Image:
    """Shrinks the image into a frame of its mean gray level; see `_black_frame`."""
    return _looser(image, rng, by, round(float(np.asarray(image).mean())))


def _aspect_padded(
    image: Image.Image, rng: np.random.Generator, by: float, facts: Facts
) -> Image.Image | None:
    """Restores the published aspect ratio; black bars make the image square."""
    if facts.aspect is None:
        return None
    width, height = (round(SIZE * min(1, part)) for part in (facts.aspect, 1 / facts.aspect))
    frame = Image.new("L", (SIZE, SIZE))
    inner = image.resize((width, height), Image.Resampling.BILINEAR)
    frame.paste(inner, ((SIZE - width) // 2, (SIZE - height) // 2))
    return frame


def _aspect_cut(
    image: Image.Image, rng: np.random.Generator, by: float, facts: Facts
) -> Image.Image | None:
    """Restores the published aspect ratio; crops to the square in the centre."""
    if facts.aspect is None:
        return None
    x, y = ((1 - min(1, part)) / 2 for part in (1 / facts.aspect, facts.aspect))
    return _window(image, (x, y, 1 - x, 1 - y))


def _curve(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Maps gray levels: values in [0, 1] for the levels 0 to 255."""
    return image.point(np.rint(np.clip(values, 0, 1) * 255).astype(int).tolist())


_LEVELS = np.arange(256) / 255


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _gamma(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Raises gray levels to the power exp(by) or exp(-by)."""
    return _curve(image, _LEVELS ** np.exp(_sign(rng) * by))


def _tone(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Applies an S-shaped tone curve or its inverse, monotonic for by < 1."""
    return _curve(image, _LEVELS - _sign(rng) * by * np.sin(2 * np.pi * _LEVELS) / (2 * np.pi))


def _levels(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Stretches the contrast: the quantile `by` becomes black, the quantile 1 - `by` white."""
    low, high = np.percentile(np.asarray(image), (100 * by, 100 * (1 - by))) / 255
    return _curve(image, (_LEVELS - low) / max(high - low, 1 / 255))


def _blur(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Blurs with a Gaussian; `by` is its standard deviation in pixels."""
    return image.filter(ImageFilter.GaussianBlur(by))


def _resample(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Reduces the image by the factor `by` and enlarges it again."""
    small = image.resize((round(SIZE / by),) * 2, Image.Resampling.BILINEAR)
    return small.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def _sharpen(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Applies an unsharp mask with a radius of two pixels; `by` is its strength."""
    return image.filter(ImageFilter.UnsharpMask(2, round(100 * by), 0))


def _jpeg(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Compresses as JPEG; `by` is Pillow's quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(by))
    return Image.open(file).convert("L")


def _noise(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Adds Gaussian noise; `by` is its standard deviation in gray levels."""
    noisy = np.asarray(image, np.float32) + by * rng.standard_normal((SIZE, SIZE), np.float32)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _wider(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Stretches the image horizontally; keeps the fraction `by` of the width at the centre."""
    return _window(image, ((1 - by) / 2, 0, (1 + by) / 2, 1))


def _taller(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Stretches the image vertically; keeps the fraction `by` of the height at the centre."""
    return _window(image, (0, (1 - by) / 2, 1, (1 + by) / 2))


def _rotate(image: Image.Image, rng: np.random.Generator, by: float, facts: Facts) -> Image.Image:
    """Rotates by a random angle of `by` / 2 to `by` degrees in a random direction."""
    return image.rotate(rng.uniform(by / 2, by) * _sign(rng), Image.Resampling.BILINEAR)


RENDERINGS: dict[str, Rendering] = {
    "middle 0.9": Rendering("framing", _middle, 0.9),
    "middle 0.8": Rendering("framing", _middle, 0.8),
    "middle 0.7": Rendering("framing", _middle, 0.7),
    "middle 0.6": Rendering("framing", _middle, 0.6),
    "off-centre 0.8": Rendering("framing", _off_centre, 0.8),
    "off-centre 0.7": Rendering("framing", _off_centre, 0.7),
    "lungs, margin 0": Rendering("framing", _lungs, 0.0),
    "lungs, margin 0.1": Rendering("framing", _lungs, 0.1),
    "lungs, margin 0.25": Rendering("framing", _lungs, 0.25),
    "black frame": Rendering("framing", _black_frame, 0.15),
    "gray frame": Rendering("framing", _gray_frame, 0.15),
    "aspect, padded": Rendering("framing", _aspect_padded, 0),
    "aspect, cut": Rendering("framing", _aspect_cut, 0),
    "gamma, mild": Rendering("tone", _gamma, 0.25),
    "gamma, strong": Rendering("tone", _gamma, 0.5),
    "tone curve, mild": Rendering("tone", _tone, 0.4),
    "tone curve, strong": Rendering("tone", _tone, 0.8),
    "levels, mild": Rendering("tone", _levels, 0.01),
    "levels, strong": Rendering("tone", _levels, 0.05),
    "blur, mild": Rendering("sharpness", _blur, 1.0),
    "blur, strong": Rendering("sharpness", _blur, 2.0),
    "resample, mild": Rendering("sharpness", _resample, 2.0),
    "resample, strong": Rendering("sharpness", _resample, 3.5),
    "sharpen, mild": Rendering("sharpness", _sharpen, 1.0),
    "sharpen, strong": Rendering("sharpness", _sharpen, 2.5),
    "jpeg, mild": Rendering("damage", _jpeg, 30),
    "jpeg, strong": Rendering("damage", _jpeg, 10),
    "noise, mild": Rendering("damage", _noise, 6),
    "noise, strong": Rendering("damage", _noise, 15),
    "wider": Rendering("stretch", _wider, 0.75),
    "taller": Rendering("stretch", _taller, 0.75),
    "rotate, mild": Rendering("stretch", _rotate, 5),
    "rotate, strong": Rendering("stretch", _rotate, 10),
}
"""All renderings by name."""

GROUPS = tuple(dict.fromkeys(rendering.group for rendering in RENDERINGS.values()))
"""Groups of renderings: `framing`, `tone`, `sharpness`, `damage`, `stretch`."""


def rerender(
    image: np.ndarray, rendering: str, name: str, facts: Facts = UNKNOWN, seed: int = 0
) -> np.ndarray | None:
    """Returns one rendering of an image.

    Args:
        image: uint8 [224, 224].
        rendering: one of `RENDERINGS`.
        name: name of the image. The random numbers depend on it, on `rendering` and on `seed`.
        facts: facts about the image.
        seed: seed of the random numbers.

    Returns:
        uint8 [224, 224]; None if the rendering needs a fact that is unknown.
    """
    _, change, by = RENDERINGS[rendering]
    changed = change(Image.fromarray(image), _generator(rendering, name, seed), by, facts)
    return None if changed is None else np.asarray(changed)


def rerender_mask(mask: np.ndarray, rendering: str, name: str, facts: Facts) -> np.ndarray | None:
    """Returns the mask of an image after the geometric change that `rerender` makes with seed 0.

    Args:
        mask: bool [224, 224].
        rendering: see `rerender`.
        name: see `rerender`.
        facts: see `rerender`.

    Returns:
        bool [224, 224]; None if the rendering needs a fact that is unknown.
    """
    group, change, by = RENDERINGS[rendering]
    if group not in ("framing", "stretch"):
        return mask
    if change is _gray_frame:
        change = _black_frame
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    changed = change(image, _generator(rendering, name, 0), by, facts)
    return None if changed is None else np.asarray(changed) > 127


def _generator(rendering: str, name: str, seed: int) -> np.random.Generator:
    text = f"{seed} {rendering} {name}".encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(text).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def render(
    images: np.ndarray, names: list[str], rendering: str, facts: Mapping[str, Facts]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns one rendering of many images, computed on all cores.

    Args:
        images: uint8 [n, 224, 224].
        names: names of the n images.
        rendering: one of `RENDERINGS`.
        facts: facts by file name, from `read_facts`.

    Returns:
        The rendered images, uint8 [k, 224, 224], and their indices among the n images, int64 [k].
        Images for which a needed fact is unknown are left out.
    """

    def one(i: int) -> np.ndarray | None:
        known = facts.get(PurePosixPath(names[i]).name, UNKNOWN)
        return rerender(images[i], rendering, names[i], known)

    with ThreadPoolExecutor(cpu_cores()) as pool:
        films = list(pool.map(one, range(len(images))))
    rows = np.array([i for i, film in enumerate(films) if film is not None], np.int64)
    shape = (len(rows), SIZE, SIZE)
    return np.array([films[i] for i in rows], np.uint8).reshape(shape), rows


def read_facts(folder: Path) -> dict[str, Facts]:
    """Returns the facts in a folder of lung outlines, by file name of the image.

    The folder holds two files. `masks_128.npz` has the arrays `names` and `masks`; a row of `masks`
    is a mask of 128 x 128 pixels as packed bits. `masks.csv` has the columns `file`,
    `native_width` and `native_height`.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        with (folder / "masks.csv").open(newline="", encoding="utf-8") as file:
            aspects = {
                row["file"]: float(row["native_width"]) / float(row["native_height"])
                for row in csv.DictReader(file)
            }
        names, masks = read_masks(folder)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder} holds no lung outlines ({error}); see its README") from None
    boxes = {name: box_of(mask) for name, mask in zip(names, masks, strict=True)}
    return {name: Facts(boxes.get(name), aspects.get(name)) for name in {*boxes, *aspects}}


def read_masks(folder: Path) -> tuple[list[str], np.ndarray]:
    """Returns file names and lung masks, bool [n, 128, 128]; for the files see `read_facts`."""
    with np.load(folder / "masks_128.npz", allow_pickle=False) as file:
        names, packed = file["names"].tolist(), file["masks"]
    return names, np.unpackbits(packed, axis=1).reshape(len(names), 128, 128).astype(bool)


def box_of(mask: np.ndarray) -> Box | None:
    """Returns the bounding box of a mask, bool [height, width]; None if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    height, width = mask.shape
    return (
        columns[0] / width,
        rows[0] / height,
        (columns[-1] + 1) / width,
        (rows[-1] + 1) / height,
    )
