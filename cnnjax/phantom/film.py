"""Draws a radiograph of a chest: disease, exposure, tubes and markers, with the ground truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cnnjax.phantom.anatomy import (
    GRID,
    Anatomy,
    Chest,
    Pose,
    Strokes,
    axis_of,
    chest_of,
    heading_of,
    noise,
    ramp,
    resize,
    resize_mask,
    smooth,
    soften,
)

Kind = Literal["normal", "bacteria", "virus"]

_ANATOMY, _FILM, _DISEASE = range(3)  # independent streams of random numbers
_SMALLEST = 32  # pixels


@dataclass(frozen=True)
class Phantom:
    """A drawn radiograph, and its ground truth."""

    image: np.ndarray
    """uint8 [size, size], bones white."""
    opacity: np.ndarray
    """bool [size, size], true in the lungs where the opacity removes, on local average, at least
    half as much air as at its maximum; false everywhere in a normal image."""
    lungs: np.ndarray
    """bool [size, size], true in the lung fields."""


def draw(seed: int, patient: int, shot: int, kind: Kind, size: int = 256) -> Phantom:
    """Draws one frontal radiograph of one patient.

    The anatomy and the place of disease are functions of (seed, patient); pose, exposure, tubes and
    marker are functions of (seed, patient, shot). The kind adds an opacity and changes nothing
    else. A patient's normal image is therefore the counterfactual of the image with disease.

    Args:
        seed: seed of the population.
        patient: number of the patient in the population.
        shot: number of the image of the patient.
        kind: `bacteria` adds a confluent consolidation to one lung, `virus` adds streaks and
            patches to both lungs, `normal` adds nothing.
        size: side of the image in pixels.

    Raises:
        ValueError: the size is below 32 pixels, or a number is negative.
    """
    check_size(size)
    anatomy = Anatomy.sample(np.random.default_rng((_ANATOMY, seed, patient, 0)))
    film = np.random.default_rng((_FILM, seed, patient, shot))
    pose = Pose.sample(film)
    chest = chest_of(np.random.default_rng((_ANATOMY, seed, patient, 1)), anatomy, pose)
    lungs = chest.air > 0.32
    if kind == "normal":
        density = np.zeros_like(chest.air)
    else:
        disease = np.random.default_rng((_DISEASE, seed, patient, 0))
        course = np.random.default_rng((_DISEASE, seed, patient, 1 + shot))
        spread = _consolidation if kind == "bacteria" else _interstitial
        density = spread(disease, course, chest)
    lost = chest.air * density
    image = _expose(film, chest.tissue - chest.air + lost, pose, size)
    # Averaged over a sixteenth of the image, to outline streaks as a region.
    lost = np.where(lungs, resize(resize(lost, 16), GRID), 0)
    opacity = lost > max(0.5 * lost.max(), 1e-6)
    return Phantom(image, resize_mask(opacity, size), resize_mask(lungs, size))


def check_size(size: int) -> None:
    """Raises ValueError for a size of fewer than 32 pixels."""
    if size < _SMALLEST:
        raise ValueError(f"phantoms need a size of at least {_SMALLEST} pixels, got {size}")


def _consolidation(
    disease: np.random.Generator, course: np.random.Generator, chest: Chest
) -> np.ndarray:
    """Returns the fraction of air that a consolidated lobe loses: one opacity with soft edges."""
    side = 1 if disease.random() < 0.5 else -1
    centre_x = side * chest.anatomy.chest_width * disease.uniform(0.48, 0.74)
    centre_y = disease.uniform(-0.45, 0.32 if side < 0 else 0.12)  # the heart covers the left base
    radius = disease.uniform(0.21, 0.4) * course.uniform(0.9, 1.1)
    stretch = disease.uniform(0.75, 1.35)
    tilt = disease.uniform(-0.6, 0.6)
    strength = min(disease.uniform(0.5, 1) * course.uniform(0.9, 1.1), 0.95)
    ragged = disease.uniform(0.2, 0.7)
    texture = noise(disease, 12)

    x, y = chest.x - centre_x, chest.y - centre_y
    along = (x + tilt * y) / (radius * stretch)
    across = (y - tilt * x) / (radius / stretch)
    edge = 1 - np.sqrt(along * along + across * across) + ragged * 0.45 * texture
    density = smooth((edge + 0.15) / disease.uniform(0.5, 0.9))
    if disease.random() < 0.2:  # a fissure bounds the lobe
        upper = -1 if disease.random() < 0.5 else 1
        density *= ramp(upper * (y - 0.25 * x) + 0.4 * radius, 0.03)
    density *= ramp(chest.x * side, 0.02)  # the other lung stays clear
    return (strength * density * (1 + 0.12 * noise(disease, 40))).clip(0, 0.95)


def _interstitial(
    disease: np.random.Generator, course: np.random.Generator, chest: Chest
) -> np.ndarray:
    """Returns the fraction of air lost to streaks and patches around the hila of both lungs."""
    strength = disease.uniform(0.65, 1.2) * course.uniform(0.9, 1.1)
    reach = disease.uniform(0.35, 0.6)
    balance = disease.normal(0, 0.15)
    strokes = Strokes(chest.pose)
    side = disease.choice((-1, 1), 220)
    angle = disease.uniform(-1.5, 1.5, 220)
    distance = 0.1 + np.abs(disease.normal(0, reach, 220))
    start = distance[:, None] * heading_of(side, angle) + np.outer(side, (0.12, 0))
    heading = angle + disease.normal(0, 0.7, 220)
    end = start + disease.uniform(0.03, 0.1, (220, 1)) * heading_of(side, heading)
    bend = (start + end) / 2 + disease.normal(0, 0.012, start.shape)
    strokes.add(np.stack([start, bend, end], 1), 0.013, disease.uniform(0.4, 1, 220))
    away = np.square((np.abs(chest.x) - 0.25) / 0.8) + np.square((chest.y - 0.02) / 1.1)
    around = np.exp(-away / (reach * reach)) * (1 + balance * np.sign(chest.x))
    patches = smooth(0.35 + 0.5 * noise(disease, 24))
    return np.clip(strength * around * (0.7 * strokes.render() + 0.5 * patches), 0, 0.9)


def _expose(
    film: np.random.Generator, attenuation: np.ndarray, pose: Pose, size: int
) -> np.ndarray:
    """Converts attenuation to an 8-bit image with window, noise, blur, collimation and marks.

    The window and a gamma give each image a mean brightness that is drawn independently of the
    class, as automatic exposure does. The brightness of an image must not predict its class.
    """
    attenuation = soften(attenuation, film.uniform(0, 1)) + _tubes(film, pose)
    attenuation += film.uniform(0.03, 0.11) * noise(film, 3)
    shutters = 1.02 - film.exponential(0.03, 4) * (film.random(4) < 0.5)
    every = slice(None, None, 2)  # a quarter of the pixels suffices for the window
    sample, weight = attenuation[every, every], _open_field(shutters, GRID)[every, every]
    low, high = np.quantile(
        sample[weight > 0.5], (film.uniform(0, 0.03), film.uniform(0.985, 1))
    ).tolist()
    windowed = np.clip((attenuation - low) / (high - low), 1e-3, 1)

    target = min(max(film.normal(0.49, 0.05), 0.35), 0.63)
    sample, share, gamma = windowed[every, every], float(weight.mean()), 1.0
    for _ in range(3):  # fixed point; the mean of image**gamma is close to constant**gamma
        mean = float((sample**gamma * weight).mean())
        gamma = min(max(gamma * math.log(target / share) / math.log(mean / share), 0.4), 2.5)
    image = resize(windowed**gamma, size)

    image += film.uniform(0.006, 0.025) * film.standard_normal(image.shape, np.float32)
    image = _mark(film, image * _open_field(shutters, size))
    black, white = film.uniform(0, 0.06), film.uniform(0.86, 1)
    return np.rint(255 * np.clip(black + (white - black) * image, 0, 1)).astype(np.uint8)


def _tubes(film: np.random.Generator, pose: Pose) -> np.ndarray:
    """Returns the attenuation of monitor leads and of a tube along the midline, if any."""
    strokes = Strokes(pose)
    t = np.linspace(0, 1, 24)[:, None]
    if film.random() < 0.3:
        for _ in range(film.integers(1, 4)):
            ends = film.uniform((-0.9, -0.9), (0.9, 0.9), (2, 2))
            bend = film.uniform((-0.9, -0.9), (0.9, 0.9))
            curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]
            strokes.add(curve[None], 0.008, film.uniform(0.4, 0.9))
            disc = film.uniform(0.02, 0.04)
            around = 2 * np.pi * t
            circle = curve[-1] + disc / 4 * np.hstack([np.cos(around), np.sin(around)])
            strokes.add(circle[None], disc, 0.7)
    if film.random() < 0.25:
        sway = 0.03 * np.sin(film.uniform(2, 5) * t + film.uniform(0, 6))
        low = film.uniform(-0.25, 0.75)
        line = np.hstack([sway, -1.1 + (low + 1.1) * t])
        strokes.add(line[None], 0.014, film.uniform(0.4, 0.8))
    return 0.5 * strokes.render()


def _open_field(shutters: np.ndarray, size: int) -> np.ndarray:
    """Returns 1 between the shutters (left, right, top, bottom; the image edge is 1), else 0."""
    left, right, top, bottom = shutters.tolist()
    axis = axis_of(size)
    across = ramp(np.minimum(axis + left, right - axis), 0.02)
    down = ramp(np.minimum(axis + top, bottom - axis), 0.02)
    return down[:, None] * across[None, :]


def _mark(film: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws the side marker, R or L, and sometimes a number, in a corner."""
    size = len(image)
    letter = "RL"[film.integers(2)]
    text = letter + (f" {film.integers(1, 100)}" if film.random() < 0.4 else "")
    stamp = Image.new("L", (size, size))
    # R marks the patient's right, which is the image's left.
    column = film.uniform(0.03, 0.12) if letter == "R" else film.uniform(0.76, 0.85)
    row = film.uniform(0.03, 0.2) if film.random() < 0.8 else film.uniform(0.75, 0.9)
    ImageDraw.Draw(stamp).text(
        (column * size, row * size),
        text,
        fill=255,
        font=_font(round(size * film.uniform(0.05, 0.08))),
    )
    strength = np.asarray(stamp, np.float32) * np.float32(film.uniform(0.6, 1) / 255)
    return np.maximum(image, strength)


@lru_cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)
