"""Synthetic pediatric chest radiographs, drawn from a seed: the embedded default data set.

A chest is a few dozen analytic shapes: rib cage, lungs, heart, diaphragm, bones and vessels, whose
attenuation adds up along the beam. `bacteria` fills part of one lung (a consolidation), `virus`
draws streaks and patches about both hila, and `normal` leaves the lungs alone. All else that
varies (size, pose, turn, exposure, blur, noise, shutters, tubes, markers) does so in every class
alike.

It is a stand-in: it exercises the whole path from files to report, with a known answer, where the
real films are not at hand. How well a network does on it is no evidence of how well it does on
radiographs.

Measured on the default tree (seed 0: 1,200 images to train on, 400 of other patients to test),
area under the ROC curve on the test images:

=====================================================================  =====
mean brightness                                                        0.506
logistic regression on 32 x 32 pixels, best of four penalties on test  0.761
two convolutions and a dense layer, 64 px, 12 epochs, two seeds        0.954
residual network of four blocks, 64 px, 12 epochs, two seeds           0.994
=====================================================================  =====
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cnnjax.data.files import work_folder
from cnnjax.machine import cpu_cores

VERSION = 1
"""Raised whenever the same seed draws other pixels, so that stored trees are told apart."""

Kind = Literal["normal", "bacteria", "virus"]

_GRID = 128  # pixels a side of the anatomy; finer costs time, and films are soft
_ANATOMY, _FILM, _DISEASE, _PLAN = range(4)  # independent streams of random numbers
_MOST_SHOTS = 4
_SMALLEST = 32  # pixels
_NORMAL_SHARE = 1 / 3
_VIRUS_SHARE = 1 / 3  # of the pneumonias


@dataclass(frozen=True)
class Phantom:
    """One drawn radiograph, and the truth about it."""

    image: np.ndarray
    """uint8 [size, size], bone white."""
    opacity: np.ndarray
    """bool [size, size], true in the lungs where the opacity takes away, on local average, at least
    half as much air as it does where it is strongest; nowhere in a normal film."""
    lungs: np.ndarray
    """bool [size, size], true on the lung fields."""


def draw(seed: int, patient: int, shot: int, kind: Kind, size: int = 256) -> Phantom:
    """Draws one frontal film of one patient.

    The anatomy and the place of disease are functions of (seed, patient); pose, exposure, tubes and
    marker of (seed, patient, shot). The kind adds an opacity and changes nothing else, so a
    patient's normal drawing is the counterfactual of the ill one.

    Args:
        seed: which population.
        patient: which patient of it.
        shot: which film of the patient.
        kind: `bacteria` adds a confluent consolidation to one lung, `virus` streaks and patches to
            both, `normal` nothing.
        size: side of the film in pixels.

    Raises:
        ValueError: the size is below 32 pixels, or a number is negative.
    """
    _check_size(size)
    anatomy = _Anatomy.sample(np.random.default_rng((_ANATOMY, seed, patient, 0)))
    film = np.random.default_rng((_FILM, seed, patient, shot))
    pose = _Pose.sample(film)
    chest = _chest(np.random.default_rng((_ANATOMY, seed, patient, 1)), anatomy, pose)
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
    # Averaged over a sixteenth of the film, so that the mask outlines streaks as a region.
    lost = np.where(lungs, _resize(_resize(lost, 16), _GRID), 0)
    opacity = lost > max(0.5 * lost.max(), 1e-6)
    return Phantom(image, _resize_mask(opacity, size), _resize_mask(lungs, size))


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
    _check_size(size)
    _check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(directory) as root:
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


def _check_size(size: int) -> None:
    if size < _SMALLEST:
        raise ValueError(f"phantoms need a size of at least {_SMALLEST} pixels, got {size}")


class _Pose(NamedTuple):
    """How the patient lay before the film: an affine map, and a turn about the long axis.

    Patient coordinates: x from the midline to the patient's left, which is the film's right; y
    downwards; one unit is half a film.
    """

    angle: float
    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float
    turn: float
    """Sine of the turn, roughly; it moves the heart and makes one lung darker than the other."""

    @classmethod
    def sample(cls, rng: np.random.Generator) -> _Pose:
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
        """Returns the patient coordinates x and y of the anatomy's grid."""
        axis = _axis(_GRID)
        u, v = axis[None, :] - self.shift_x, axis[:, None] - self.shift_y
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        x = (np.float32(cos) * u + np.float32(sin) * v) / np.float32(self.scale_x)
        y = (np.float32(cos) * v - np.float32(sin) * u) / np.float32(self.scale_y)
        return x, y

    def to_film(self, points: np.ndarray, size: int) -> np.ndarray:
        """Maps patient coordinates [..., 2] to pixels (column, row) of a film of this size."""
        x, y = points[..., 0] * self.scale_x, points[..., 1] * self.scale_y
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        film = np.stack(
            [cos * x - sin * y + self.shift_x, sin * x + cos * y + self.shift_y], axis=-1
        )
        return (film + 1) * (size / 2)


class _Anatomy(NamedTuple):
    """What differs between patients; lengths in patient coordinates."""

    chest_width: float
    """Inner half-width of the rib cage."""
    chest_height: float
    chest_centre: float
    taper: float
    body_width: float
    thickness: float
    """Of soft tissue, relative to the chest's depth."""
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
    """Mineral content, relative."""
    clavicle: float
    scapula: float
    aeration: float
    stomach: float
    vessels: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> _Anatomy:
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


class _Chest(NamedTuple):
    """A patient in a pose; the fields are float32 on the anatomy's grid."""

    anatomy: _Anatomy
    pose: _Pose
    x: np.ndarray
    y: np.ndarray
    """Patient coordinates."""
    tissue: np.ndarray
    """Attenuation along the beam were the lungs solid; a healthy, deep lung takes 1 of it away."""
    air: np.ndarray
    """What the air in the lungs takes away."""


def _chest(rng: np.random.Generator, anatomy: _Anatomy, pose: _Pose) -> _Chest:
    """Draws the healthy chest."""
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
    heart = _ramp(1 - along * along - across * across, 0.16)
    bulge = np.exp(-np.square((y + 0.28) / 0.18))
    narrow = np.abs(x - 0.02 * pose.turn) - a.mediastinum - a.thymus * bulge
    mediastinum = np.maximum(_ramp(-narrow, 0.05), heart)

    # A lung is deepest where the chest is, and keeps some air before and behind the heart.
    depth = np.sqrt(np.clip(cage * 1.5, 0, 1))
    lung = depth * _ramp(above, 0.035)
    air = lung * (1 - (0.78 + 0.17 * _ramp(-narrow, 0.03)) * mediastinum)
    air *= np.float32(a.aeration) * (1 + np.float32(0.17 * pose.turn) * np.sign(x))
    air *= 1 - a.vessels * _vessels(rng, pose)

    half_body = a.body_width * (0.24 + 0.76 * _smooth((y + 1.12) / 0.5))
    chord = np.sqrt(np.clip(1 - np.square(x / half_body), 0, 1))
    tissue = chord * np.float32(1.35 + 0.35 * a.thickness)
    tissue += 0.22 * _ramp(-above, 0.5) * chord  # the abdomen is deeper than the chest
    tissue += 0.1 * heart
    tissue += a.bone * _bones(a, s, y, cage, above, mediastinum, chord)
    tissue -= 0.3 * _trachea(x - 0.03 * pose.turn, s, y)
    bubble = np.square((x - 0.36) / 0.2) + np.square((y - a.left_dome - 0.2) / 0.11)
    tissue -= np.float32(0.45 * a.stomach) * _ramp(1 - bubble, 0.5)
    return _Chest(anatomy, pose, x, y, tissue, air)


def _bones(
    a: _Anatomy,
    s: np.ndarray,
    y: np.ndarray,
    cage: np.ndarray,
    above: np.ndarray,
    mediastinum: np.ndarray,
    chord: np.ndarray,
) -> np.ndarray:
    """Returns the attenuation of ribs, spine, clavicles and shoulder blades."""
    t = s / a.chest_width
    inside = _ramp(cage + 0.06, 0.1) * (1 - 0.55 * mediastinum) * _ramp(above + 0.12, 0.5)
    # Behind, ribs leave the spine almost level and then fall; in front, they rise to the side.
    behind = (y - a.rib_slope * t * t * t + 0.12 * t * (1 - t)) / a.rib_pitch + a.rib_phase
    before = (y + 0.55 * t + 0.15 * t * t) / a.rib_pitch + (a.rib_phase + 0.3)
    ribs = _rib(behind, 0.22)
    bones = 0.22 * inside * ribs
    bones += 0.06 * inside * _ramp(t - 0.5, 0.25) * _rib(before, 0.25)
    wall = np.exp(-np.square(cage / 0.12))  # ribs seen edge on, along the chest wall
    bones += wall * (0.05 + 0.12 * ribs) * _ramp(above + 0.1, 0.4)

    bodies = np.abs(np.mod(y / (0.9 * a.rib_pitch) + a.rib_phase, 1) - 0.5)
    bones += 0.2 * _ramp(0.09 - s, 0.05) * (0.65 + 0.35 * _ramp(0.42 - bodies, 0.1))

    arc = a.clavicle - 0.3 * (s - 0.1) + 0.32 * np.square(s - 0.1)
    collar = _ramp(0.028 + 0.012 * s - np.abs(y - arc), 0.02) * _ramp(s - 0.09, 0.04)
    bones += 0.38 * collar * _ramp(0.78 - s, 0.05)

    blade = s - a.chest_width * (0.92 + 0.2 * y)
    wing = _ramp(blade, 0.03) * _ramp(y + 0.62, 0.15) * _ramp(0.12 - y, 0.1)
    bones += a.scapula * wing * chord * (0.1 + 0.12 * np.exp(-np.square(blade / 0.025)))
    return bones


def _rib(phase: np.ndarray, half_width: float) -> np.ndarray:
    """Returns the profile of ribs one phase apart: denser at both edges, where the cortex is."""
    off = np.abs(phase - np.floor(phase) - 0.5)
    return _ramp(half_width - off, 0.1) * (0.7 + (0.5 / half_width) * off)


def _trachea(x: np.ndarray, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the air of the trachea and the main bronchi, 0 to 1."""
    pipe = _ramp(0.045 - np.abs(x), 0.03) * _ramp(-0.26 - y, 0.04)
    bronchi = _ramp(0.03 - np.abs(y + 0.26 - 0.75 * s), 0.03) * _ramp(0.2 - s, 0.08)
    return np.maximum(pipe, 0.7 * bronchi * _ramp(y + 0.3, 0.04))


def _vessels(rng: np.random.Generator, pose: _Pose) -> np.ndarray:
    """Returns the vessels that fan out from both hila, 0 to 1, thinner and fainter outwards."""
    strokes = _Strokes(pose)
    side = np.repeat((-1, 1), 8)
    start = np.stack([0.14 * side, np.full(16, -0.05)], 1) + rng.normal(0, 0.03, (16, 2))
    angle = np.tile(np.linspace(-1.3, 1.4, 8), 2) + rng.normal(0, 0.15, 16)
    width, length = 0.022, 0.19
    for _ in range(4):
        end = start + length * _heading(side, angle)
        bend = (start + end) / 2 + rng.normal(0, 0.07 * length, start.shape)
        strokes.add(np.stack([start, bend, end], 1), width, width / 0.022)
        side, start = np.repeat(side, 2), np.repeat(end, 2, 0)
        fork = np.tile((-0.3, 0.3), len(angle)) * rng.normal(1, 0.5, len(side))
        angle = np.repeat(angle, 2) + fork
        width, length = 0.7 * width, 0.85 * length
    return strokes.render()


def _heading(side: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Returns unit vectors [n, 2]: outwards at angle 0, downwards at pi / 2."""
    return np.stack([side * np.cos(angle), np.sin(angle)], 1)


def _consolidation(
    disease: np.random.Generator, course: np.random.Generator, chest: _Chest
) -> np.ndarray:
    """Returns the share of air that a consolidated lobe has lost: one opacity with soft edges."""
    side = 1 if disease.random() < 0.5 else -1
    centre_x = side * chest.anatomy.chest_width * disease.uniform(0.48, 0.74)
    centre_y = disease.uniform(-0.45, 0.32 if side < 0 else 0.12)  # the left base is the heart's
    radius = disease.uniform(0.21, 0.4) * course.uniform(0.9, 1.1)
    stretch = disease.uniform(0.75, 1.35)
    tilt = disease.uniform(-0.6, 0.6)
    strength = min(disease.uniform(0.5, 1) * course.uniform(0.9, 1.1), 0.95)
    ragged = disease.uniform(0.2, 0.7)
    texture = _noise(disease, 12)

    x, y = chest.x - centre_x, chest.y - centre_y
    along = (x + tilt * y) / (radius * stretch)
    across = (y - tilt * x) / (radius / stretch)
    edge = 1 - np.sqrt(along * along + across * across) + ragged * 0.45 * texture
    density = _smooth((edge + 0.15) / disease.uniform(0.5, 0.9))
    if disease.random() < 0.2:  # a fissure bounds the lobe
        upper = -1 if disease.random() < 0.5 else 1
        density *= _ramp(upper * (y - 0.25 * x) + 0.4 * radius, 0.03)
    density *= _ramp(chest.x * side, 0.02)  # the other lung stays clear
    return (strength * density * (1 + 0.12 * _noise(disease, 40))).clip(0, 0.95)


def _interstitial(
    disease: np.random.Generator, course: np.random.Generator, chest: _Chest
) -> np.ndarray:
    """Returns the share of air lost to streaks and patches about the hila of both lungs."""
    strength = disease.uniform(0.65, 1.2) * course.uniform(0.9, 1.1)
    reach = disease.uniform(0.35, 0.6)
    balance = disease.normal(0, 0.15)
    strokes = _Strokes(chest.pose)
    side = disease.choice((-1, 1), 220)
    angle = disease.uniform(-1.5, 1.5, 220)
    distance = 0.1 + np.abs(disease.normal(0, reach, 220))
    start = distance[:, None] * _heading(side, angle) + np.outer(side, (0.12, 0))
    heading = angle + disease.normal(0, 0.7, 220)
    end = start + disease.uniform(0.03, 0.1, (220, 1)) * _heading(side, heading)
    bend = (start + end) / 2 + disease.normal(0, 0.012, start.shape)
    strokes.add(np.stack([start, bend, end], 1), 0.013, disease.uniform(0.4, 1, 220))
    away = np.square((np.abs(chest.x) - 0.25) / 0.8) + np.square((chest.y - 0.02) / 1.1)
    around = np.exp(-away / (reach * reach)) * (1 + balance * np.sign(chest.x))
    patches = _smooth(0.35 + 0.5 * _noise(disease, 24))
    return np.clip(strength * around * (0.7 * strokes.render() + 0.5 * patches), 0, 0.9)


class _Strokes:
    """Lines in patient coordinates, drawn at twice the grid's resolution against aliasing."""

    def __init__(self, pose: _Pose) -> None:
        self.pose = pose
        self.canvas = Image.new("L", (2 * _GRID, 2 * _GRID))
        self.pen = ImageDraw.Draw(self.canvas)

    def add(self, points: np.ndarray, width: float, value: np.ndarray | float) -> None:
        """Draws polylines [n, points, 2] of one width; the values, in 0 to 1, are [n] or one."""
        pixels = self.pose.to_film(points, 2 * _GRID).reshape(len(points), -1).tolist()
        fills = np.broadcast_to(np.rint(255 * np.asarray(value)), len(points)).tolist()
        pen_width = max(1, round(width * _GRID))
        for line, fill in zip(pixels, fills, strict=True):
            self.pen.line(line, int(fill), pen_width)

    def render(self) -> np.ndarray:
        """Returns the lines on the grid, float32 in 0 to 1."""
        return np.asarray(self.canvas.reduce(2), np.float32) / 255


def _expose(
    film: np.random.Generator, attenuation: np.ndarray, pose: _Pose, size: int
) -> np.ndarray:
    """Turns attenuation into an 8-bit film: windowed, noisy, blurred, collimated and marked.

    The window and a gamma bring every film to a mean brightness drawn without regard to the class,
    as automatic exposure does: how bright a film is must not tell who is ill.
    """
    attenuation = _soften(attenuation, film.uniform(0, 1)) + _tubes(film, pose)
    attenuation += film.uniform(0.03, 0.11) * _noise(film, 3)
    shutters = 1.02 - film.exponential(0.03, 4) * (film.random(4) < 0.5)
    every = slice(None, None, 2)  # the window needs no more pixels
    sample, weight = attenuation[every, every], _open_field(shutters, _GRID)[every, every]
    low, high = np.quantile(
        sample[weight > 0.5], (film.uniform(0, 0.03), film.uniform(0.985, 1))
    ).tolist()
    windowed = np.clip((attenuation - low) / (high - low), 1e-3, 1)

    target = min(max(film.normal(0.49, 0.05), 0.35), 0.63)
    sample, share, gamma = windowed[every, every], float(weight.mean()), 1.0
    for _ in range(3):  # to a fixed point, as the mean of image**gamma is near constant**gamma
        mean = float((sample**gamma * weight).mean())
        gamma = min(max(gamma * math.log(target / share) / math.log(mean / share), 0.4), 2.5)
    image = _resize(windowed**gamma, size)

    image += film.uniform(0.006, 0.025) * film.standard_normal(image.shape, np.float32)
    image = _mark(film, image * _open_field(shutters, size))
    black, white = film.uniform(0, 0.06), film.uniform(0.86, 1)
    return np.rint(255 * np.clip(black + (white - black) * image, 0, 1)).astype(np.uint8)


def _tubes(film: np.random.Generator, pose: _Pose) -> np.ndarray:
    """Returns the attenuation of monitor leads and of a tube along the midline, if any."""
    strokes = _Strokes(pose)
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
    """Returns 1 between the shutters (left, right, top, bottom; film's edge at 1), 0 beyond."""
    left, right, top, bottom = shutters.tolist()
    axis = _axis(size)
    across = _ramp(np.minimum(axis + left, right - axis), 0.02)
    down = _ramp(np.minimum(axis + top, bottom - axis), 0.02)
    return down[:, None] * across[None, :]


def _mark(film: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Puts the side marker, R or L, and sometimes a number into a corner."""
    size = len(image)
    letter = "RL"[film.integers(2)]
    text = letter + (f" {film.integers(1, 100)}" if film.random() < 0.4 else "")
    stamp = Image.new("L", (size, size))
    # R is put on the patient's right, which is the film's left.
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


def _soften(field: np.ndarray, share: float) -> np.ndarray:
    """Mixes a field with its binomial blur over 3 x 3 pixels; the border stays."""
    blurred = field.copy()
    blurred[1:-1] = (field[:-2] + 2 * field[1:-1] + field[2:]) / 4
    blurred[:, 1:-1] = (blurred[:, :-2] + 2 * blurred[:, 1:-1] + blurred[:, 2:]) / 4
    return field + share * (blurred - field)


@lru_cache
def _axis(size: int) -> np.ndarray:
    """Returns pixel centres from -1 to 1, float32 [size]."""
    return ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Returns smooth noise on the grid, of a variance near 1: cells x cells values, bicubic."""
    return _resize(rng.standard_normal((cells, cells), np.float32), _GRID)


def _resize(values: np.ndarray, size: int) -> np.ndarray:
    """Resamples a square field, float32, to [size, size] with a bicubic kernel."""
    return np.array(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC))


def _resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resamples a square mask to [size, size]."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) > 127


def _ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """Returns 0 to 1 as the distance goes from -width / 2 to width / 2."""
    return np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


def _smooth(t: np.ndarray) -> np.ndarray:
    """Returns 3 t^2 - 2 t^3 of t held within 0 to 1."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)
