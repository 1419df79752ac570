"""Draws a chest from a seed: pose, rib cage, lungs, heart, bones and vessels, on a grid."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

GRID = 128  # side of the anatomy grid, in pixels; finer grids cost time, and radiographs are smooth


class Pose(NamedTuple):
    """Position of the patient: an affine map, and a rotation about the long axis.

    Patient coordinates: x goes from the midline to the patient's left, which is the image's right;
    y goes down; one unit is half the image.
    """

    angle: float
    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float
    turn: float
    """Approximate sine of the rotation; it moves the heart and makes one lung darker than the
    other."""

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Pose:
        """Draws a pose."""
        scale = rng.uniform(0.8, 1.12)
        return cls(
            angle=rng.normal(0, 0.07),
            scale_x=scale * rng.uniform(0.93, 1.07),
            scale_y=scale * rng.uniform(0.93, 1.07),
            shift_x=rng.normal(0, 0.08),
            shift_y=rng.normal(0, 0.08),
            turn=min(max(rng.normal(0, 0.6), -1.5), 1.5),
        )

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the patient coordinates x and y of the anatomy grid."""
        axis = axis_of(GRID)
        u, v = axis[None, :] - self.shift_x, axis[:, None] - self.shift_y
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        x = (np.float32(cos) * u + np.float32(sin) * v) / np.float32(self.scale_x)
        y = (np.float32(cos) * v - np.float32(sin) * u) / np.float32(self.scale_y)
        return x, y

    def to_film(self, points: np.ndarray, size: int) -> np.ndarray:
        """Maps patient coordinates [..., 2] to pixels (column, row) of an image of this size."""
        x, y = points[..., 0] * self.scale_x, points[..., 1] * self.scale_y
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        film = np.stack(
            [cos * x - sin * y + self.shift_x, sin * x + cos * y + self.shift_y], axis=-1
        )
        return (film + 1) * (size / 2)


class Anatomy(NamedTuple):
    """The properties in which patients differ; lengths are in patient coordinates."""

    chest_width: float
    """Inner half-width of the rib cage."""
    chest_height: float
    chest_centre: float
    taper: float
    body_width: float
    thickness: float
    """Thickness of soft tissue, relative to the chest's depth."""
    right_dome: float
    left_dome: float
    dome_fall: float
    heart_x: float
    heart_y: float
    heart_width: float
    heart_height: float
    mediastinum: float
    thymus: float
    rib_pitch: float
    rib_phase: float
    rib_slope: float
    bone: float
    """Relative mineral content."""
    clavicle: float
    scapula: float
    aeration: float
    stomach: float
    vessels: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Anatomy:
        """Draws an anatomy."""
        right_dome = rng.uniform(0.42, 0.6)
        heart = rng.normal(1, 0.1)
        return cls(
            chest_width=rng.uniform(0.63, 0.82),
            chest_height=rng.uniform(0.92, 1.02),
            chest_centre=rng.uniform(0.12, 0.2),
            taper=rng.uniform(0.1, 0.25),
            body_width=rng.uniform(0.92, 1.25),
            thickness=rng.uniform(0.6, 1.1),
            right_dome=right_dome,
            left_dome=right_dome + rng.uniform(0.02, 0.08),
            dome_fall=rng.uniform(0.5, 0.9),
            heart_x=rng.normal(0.11, 0.025),
            heart_y=right_dome - rng.uniform(0.16, 0.22),
            heart_width=0.35 * heart,
            heart_height=0.29 * heart,
            mediastinum=rng.uniform(0.12, 0.17),
            thymus=rng.uniform(0, 0.12) * (rng.random() < 0.6),
            rib_pitch=rng.uniform(0.135, 0.165),
            rib_phase=rng.random(),
            rib_slope=rng.uniform(0.2, 0.42),
            bone=rng.uniform(0.6, 1.2),
            clavicle=rng.uniform(-0.66, -0.54),
            scapula=rng.uniform(0.4, 1.3),
            aeration=rng.uniform(0.7, 1.15),
            stomach=rng.uniform(0, 1) * (rng.random() < 0.7),
            vessels=rng.uniform(0.15, 0.45),
        )


class Chest(NamedTuple):
    """A patient in a pose; the fields are float32 on the anatomy grid."""

    anatomy: Anatomy
    pose: Pose
    x: np.ndarray
    y: np.ndarray
    """Patient coordinates."""
    tissue: np.ndarray
    """Attenuation along the beam if the lungs were solid; a healthy lung at full depth reduces it
    by 1."""
    air: np.ndarray
    """The reduction of attenuation by the air in the lungs."""


def chest_of(rng: np.random.Generator, anatomy: Anatomy, pose: Pose) -> Chest:
    """Draws a healthy chest."""
    a = anatomy
    x, y = pose.grid()
    right = x < 0
    s = np.abs(x)

    # The rib cage is a superellipse, wider at the base; `cage` falls from 1 to 0 at its wall.
    reach = s / (a.chest_width * (1 + a.taper * y))
    level = (y - a.chest_centre) / a.chest_height
    level *= level
    cage = 1 - reach * reach * np.sqrt(reach) - level * level
    dome = np.where(right, a.right_dome, a.left_dome).astype(np.float32)
    fall = s / a.chest_width - 0.42
    dome += a.dome_fall * fall * fall
    above = dome - y

    heart_x = x - (a.heart_x + 0.03 * pose.turn)
    heart_y = y - a.heart_y
    along = (heart_x * 0.9 + heart_y * 0.43) / a.heart_width
    across = (heart_y * 0.9 - heart_x * 0.43) / a.heart_height
    heart = ramp(1 - along * along - across * across, 0.16)
    bulge = np.exp(-np.square((y + 0.28) / 0.18))
    narrow = np.abs(x - 0.02 * pose.turn) - a.mediastinum - a.thymus * bulge
    mediastinum = np.maximum(ramp(-narrow, 0.05), heart)

    # A lung is deepest where the chest is, and has some air in front of and behind the heart.
    depth = np.sqrt(np.clip(cage * 1.5, 0, 1))
    lung = depth * ramp(above, 0.035)
    air = lung * (1 - (0.78 + 0.17 * ramp(-narrow, 0.03)) * mediastinum)
    air *= np.float32(a.aeration) * (1 + np.float32(0.17 * pose.turn) * np.sign(x))
    air *= 1 - a.vessels * _vessels(rng, pose)

    half_body = a.body_width * (0.24 + 0.76 * smooth((y + 1.12) / 0.5))
    chord = np.sqrt(np.clip(1 - np.square(x / half_body), 0, 1))
    tissue = chord * np.float32(1.35 + 0.35 * a.thickness)
    tissue += 0.22 * ramp(-above, 0.5) * chord  # the abdomen is deeper than the chest
    tissue += 0.1 * heart
    tissue += a.bone * _bones(a, s, y, cage, above, mediastinum, chord)
    tissue -= 0.3 * _trachea(x - 0.03 * pose.turn, s, y)
    bubble = np.square((x - 0.36) / 0.2) + np.square((y - a.left_dome - 0.2) / 0.11)
    tissue -= np.float32(0.45 * a.stomach) * ramp(1 - bubble, 0.5)
    return Chest(anatomy, pose, x, y, tissue, air)


def _bones(
    a: Anatomy,
    s: np.ndarray,
    y: np.ndarray,
    cage: np.ndarray,
    above: np.ndarray,
    mediastinum: np.ndarray,
    chord: np.ndarray,
) -> np.ndarray:
    """Returns the attenuation of ribs, spine, clavicles and shoulder blades."""
    t = s / a.chest_width
    inside = ramp(cage + 0.06, 0.1) * (1 - 0.55 * mediastinum) * ramp(above + 0.12, 0.5)
    # Posterior ribs leave the spine almost level and then descend; anterior ribs rise laterally.
    behind = (y - a.rib_slope * t * t * t + 0.12 * t * (1 - t)) / a.rib_pitch + a.rib_phase
    before = (y + 0.55 * t + 0.15 * t * t) / a.rib_pitch + (a.rib_phase + 0.3)
    ribs = _rib(behind, 0.22)
    bones = 0.22 * inside * ribs
    bones += 0.06 * inside * ramp(t - 0.5, 0.25) * _rib(before, 0.25)
    wall = np.exp(-np.square(cage / 0.12))  # ribs seen edge on, along the chest wall
    bones += wall * (0.05 + 0.12 * ribs) * ramp(above + 0.1, 0.4)

    bodies = np.abs(np.mod(y / (0.9 * a.rib_pitch) + a.rib_phase, 1) - 0.5)
    bones += 0.2 * ramp(0.09 - s, 0.05) * (0.65 + 0.35 * ramp(0.42 - bodies, 0.1))

    arc = a.clavicle - 0.3 * (s - 0.1) + 0.32 * np.square(s - 0.1)
    collar = ramp(0.028 + 0.012 * s - np.abs(y - arc), 0.02) * ramp(s - 0.09, 0.04)
    bones += 0.38 * collar * ramp(0.78 - s, 0.05)

    blade = s - a.chest_width * (0.92 + 0.2 * y)
    wing = ramp(blade, 0.03) * ramp(y + 0.62, 0.15) * ramp(0.12 - y, 0.1)
    bones += a.scapula * wing * chord * (0.1 + 0.12 * np.exp(-np.square(blade / 0.025)))
    return bones


def _rib(phase: np.ndarray, half_width: float) -> np.ndarray:
    """Returns the profile of ribs with period 1, denser at both edges, where the cortex is."""
    off = np.abs(phase - np.floor(phase) - 0.5)
    return ramp(half_width - off, 0.1) * (0.7 + (0.5 / half_width) * off)


def _trachea(x: np.ndarray, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the air of the trachea and the main bronchi, 0 to 1."""
    pipe = ramp(0.045 - np.abs(x), 0.03) * ramp(-0.26 - y, 0.04)
    bronchi = ramp(0.03 - np.abs(y + 0.26 - 0.75 * s), 0.03) * ramp(0.2 - s, 0.08)
    return np.maximum(pipe, 0.7 * bronchi * ramp(y + 0.3, 0.04))


def _vessels(rng: np.random.Generator, pose: Pose) -> np.ndarray:
    """Returns vessels that branch from both hila, 0 to 1, thinner and fainter outwards."""
    strokes = Strokes(pose)
    side = np.repeat((-1, 1), 8)
    start = np.stack([0.14 * side, np.full(16, -0.05)], 1) + rng.normal(0, 0.03, (16, 2))
    angle = np.tile(np.linspace(-1.3, 1.4, 8), 2) + rng.normal(0, 0.15, 16)
    width, length = 0.022, 0.19
    for _ in range(4):
        end = start + length * heading_of(side, angle)
        bend = (start + end) / 2 + rng.normal(0, 0.07 * length, start.shape)
        strokes.add(np.stack([start, bend, end], 1), width, width / 0.022)
        side, start = np.repeat(side, 2), np.repeat(end, 2, 0)
        fork = np.tile((-0.3, 0.3), len(angle)) * rng.normal(1, 0.5, len(side))
        angle = np.repeat(angle, 2) + fork
        width, length = 0.7 * width, 0.85 * length
    return strokes.render()


def heading_of(side: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Returns unit vectors [n, 2]; angle 0 points laterally, pi / 2 downwards."""
    return np.stack([side * np.cos(angle), np.sin(angle)], 1)


class Strokes:
    """Lines in patient coordinates, drawn at twice the grid's resolution to reduce aliasing."""

    def __init__(self, pose: Pose) -> None:
        self.pose = pose
        self.canvas = Image.new("L", (2 * GRID, 2 * GRID))
        self.pen = ImageDraw.Draw(self.canvas)

    def add(self, points: np.ndarray, width: float, value: np.ndarray | float) -> None:
        """Draws polylines [n, points, 2] of one width; values in 0 to 1 are [n] or a scalar."""
        pixels = self.pose.to_film(points, 2 * GRID).reshape(len(points), -1).tolist()
        fills = np.broadcast_to(np.rint(255 * np.asarray(value)), len(points)).tolist()
        pen_width = max(1, round(width * GRID))
        for line, fill in zip(pixels, fills, strict=True):
            self.pen.line(line, int(fill), pen_width)

    def render(self) -> np.ndarray:
        """Returns the lines on the grid, float32 in 0 to 1."""
        return np.asarray(self.canvas.reduce(2), np.float32) / 255


def soften(field: np.ndarray, share: float) -> np.ndarray:
    """Mixes a field with its 3 x 3 binomial blur; the border is unchanged."""
    blurred = field.copy()
    blurred[1:-1] = (field[:-2] + 2 * field[1:-1] + field[2:]) / 4
    blurred[:, 1:-1] = (blurred[:, :-2] + 2 * blurred[:, 1:-1] + blurred[:, 2:]) / 4
    return field + share * (blurred - field)


@lru_cache
def axis_of(size: int) -> np.ndarray:
    """Returns pixel centres from -1 to 1, float32 [size]."""
    return ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)


def noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Returns smooth noise: cells x cells normal values, resized to the grid (bicubic)."""
    return resize(rng.standard_normal((cells, cells), np.float32), GRID)


def resize(values: np.ndarray, size: int) -> np.ndarray:
    """Resamples a square field, float32, to [size, size] with a bicubic kernel."""
    return np.array(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resamples a square mask to [size, size]."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) > 127


def ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """Returns 0 to 1 as the distance goes from -width / 2 to width / 2."""
    return np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


def smooth(t: np.ndarray) -> np.ndarray:
    """Returns 3 t^2 - 2 t^3, for t clipped to 0 to 1."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)
