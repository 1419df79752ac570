"""Held-out radiographs as another place might have rendered them: a validation that hurts.

Folds of one collection share its scanners, its export and its framing, and nearly every network
does well on them. These are fixed changes that leave the diagnosis as it is, each at two strengths,
applied to the decoded image at `SIZE` pixels before it is reduced to the network's size. What is
drawn at random for an image follows from a seed, the change and the image's name alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from cnnjax.data.cache import Decoded
from cnnjax.data.decode import decode
from cnnjax.data.files import no_cache, save_array, sweep, work_folder
from cnnjax.machine import cache_folder, cpu_cores

VERSION = 1  # raise it when a change gives other pixels for the same image

SIZE = 224  # pixels: the side at which images are changed

Strength = Literal["mild", "strong"]
STRENGTHS: tuple[Strength, ...] = ("mild", "strong")

# An image, its random numbers, and the magnitude at the strength asked for.
_Change = Callable[[Image.Image, np.random.Generator, float], Image.Image]


def _curve(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Maps gray levels: values in [0, 1] for the levels 0 to 255."""
    return image.point(np.rint(np.clip(values, 0, 1) * 255).astype(int).tolist())


_LEVELS = np.arange(256) / 255


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _gamma(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    return _curve(image, _LEVELS ** np.exp(_sign(rng) * by))


def _tone(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    """An S-shaped curve or its inverse, monotonic for by < 1."""
    return _curve(image, _LEVELS - _sign(rng) * by * np.sin(2 * np.pi * _LEVELS) / (2 * np.pi))


def _stretch(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    low, high = np.percentile(np.asarray(image), (100 * by, 100 * (1 - by))) / 255
    return _curve(image, (_LEVELS - low) / max(high - low, 1 / 255))


def _blur(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(by))


def _resample(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    small = image.resize((round(SIZE / by),) * 2, Image.Resampling.BILINEAR)
    return small.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def _jpeg(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(by))
    return Image.open(file).convert("L")


def _noise(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    noisy = np.asarray(image, np.float32) + rng.normal(0, by, (SIZE, SIZE)).astype(np.float32)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _crop(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    """Cuts up to a part `by` off each side by itself, so the aspect changes too."""
    left, top, right, bottom = rng.uniform(0, by * SIZE, 4)
    box = (left, top, SIZE - right, SIZE - bottom)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)


def _border(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    """Puts the image, made smaller, into a black frame of uneven width."""
    left, top, right, bottom = rng.integers(0, round(by * SIZE) + 1, 4)
    frame = Image.new("L", (SIZE, SIZE))
    inner = (SIZE - left - right, SIZE - top - bottom)
    frame.paste(image.resize(inner, Image.Resampling.BILINEAR), (int(left), int(top)))
    return frame


def _rotate(image: Image.Image, rng: np.random.Generator, by: float) -> Image.Image:
    return image.rotate(rng.uniform(by / 2, by) * _sign(rng), Image.Resampling.BILINEAR)


# The change, and its magnitude when mild and when strong.
CHANGES: dict[str, tuple[_Change, float, float]] = {
    "gamma": (_gamma, 0.25, 0.5),  # exponents e^-m to e^m
    "tone": (_tone, 0.4, 0.8),
    "stretch": (_stretch, 0.01, 0.05),  # quantiles made black and white
    "blur": (_blur, 1.0, 2.0),  # pixels
    "resample": (_resample, 2.0, 3.5),  # times smaller, and back
    "jpeg": (_jpeg, 30, 10),  # quality
    "noise": (_noise, 6, 15),  # gray levels
    "crop": (_crop, 0.06, 0.12),  # of the side
    "border": (_border, 0.05, 0.10),  # of the side
    "rotate": (_rotate, 5, 10),  # degrees
}


def rerender(
    image: np.ndarray, change: str, strength: Strength, name: str, seed: int = 0
) -> np.ndarray:
    """Returns one image as another place might have rendered it.

    Args:
        image: uint8 [224, 224].
        change: one of `CHANGES`.
        strength: how much of it.
        name: of the image; with `change` and `seed` it decides what is drawn at random.
        seed: another one draws anew.

    Returns:
        uint8 [224, 224].
    """
    make, mild, strong = CHANGES[change]
    digest = hashlib.sha256(f"{seed} {change} {name}".encode("utf-8", "surrogateescape")).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return np.asarray(make(Image.fromarray(image), rng, mild if strength == "mild" else strong))


def load(decoded: Decoded, size: int, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Returns every image in every rendering, out of the cache if they are there.

    Args:
        decoded: n images of `SIZE` pixels.
        size: side of the squares wanted, in pixels.
        folder: where the cache lies; `cnnjax.machine.cache_folder()` when None.

    Returns:
        uint8 [n, size, size], memory-mapped, by name: `gamma, mild` and so on.

    Raises:
        InputError: the cache folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    home = folder / f"rerendered-{VERSION}-{size}-{decoded.fingerprint[:32]}"
    names = [f"{change}, {strength}" for change, strength in product(CHANGES, STRENGTHS)]
    try:
        if not home.is_dir():
            _render_into(home, decoded, size)
    except OSError as error:
        raise no_cache(folder, error) from None
    return {name: np.load(home / f"{name}.npy", mmap_mode="r") for name in names}


def _render_into(home: Path, decoded: Decoded, size: int) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    sweep(home)
    with work_folder(home) as work:
        with ThreadPoolExecutor(cpu_cores()) as pool:
            renderings = list(product(CHANGES, STRENGTHS))
            for change, strength in tqdm(renderings, "re-rendering", unit="set", disable=None):

                def one(i: int, change: str = change, strength: Strength = strength) -> np.ndarray:
                    name = decoded.examples[i].name
                    return decode(rerender(decoded.images[i], change, strength, name), size)

                images = np.stack(list(pool.map(one, range(len(decoded.examples)))))
                save_array(work / f"{change}, {strength}.npy", images)
        try:
            work.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was first, with the same
                raise
