"""Describes a data set, and how training would use it, before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from cnnjax.config import DataConfig
from cnnjax.data import cache, duplicates, framing
from cnnjax.data.decode import Layout, layout_of
from cnnjax.data.examples import Example, Examples
from cnnjax.data.index import ALL, SPLITS, Index
from cnnjax.data.prepare import (
    TrainingData,
    leaking_patients,
    protocol,
    side_of,
    training_data,
)
from cnnjax.errors import InputError
from cnnjax.machine.host import cpu_cores


class Pair(NamedTuple):
    """Two images of the same radiograph."""

    image: Example
    like: Example
    bits: int
    """Hamming distance between their hashes, of 240 bits (`cnnjax.data.duplicates`)."""


@dataclass(frozen=True)
class Survey:
    """The results of `survey`."""

    index: Index
    layouts: tuple[Layout, ...]
    """Layouts of the files with a readable header."""
    unreadable: tuple[tuple[str, str], ...]
    """(name, reason) of each file that cannot be decoded."""
    blank: tuple[str, ...]
    """Names of images with a single gray level."""
    pairs: tuple[Pair, ...]
    """One for each image that repeats an earlier radiograph."""
    leaks: tuple[Pair, ...]
    """The pairs whose images are on two sides of the given splits."""
    patients: dict[tuple[str, str], list[str]]
    """Patients who are on two sides of the given splits, by the names of the two splits."""
    data: TrainingData | None
    """The data that training would use; None if training would refuse them."""
    refusal: str
    """Why training would refuse the data; else empty."""
    lungless: tuple[str, ...] | None
    """Names of training and validation images in which no lungs are found; None with `--data.frame
    whole`."""
    shown: dict[tuple[str, str], list[tuple[str, np.ndarray]]]
    """Some (name, uint8 [size, size]) of each split and class."""


def survey(config: DataConfig, seed: int, index: Index, shown: int = 8) -> Survey:
    """Examines every image of a data set; the decoded images stay in the cache for training.

    Args:
        config: the data and their settings, as for training.
        seed: seed of the folds.
        index: from `cnnjax.data.prepare.open_index`, for the same config.
        shown: number of images of each split and class to keep for a contact sheet.

    Raises:
        InputError: no image can be decoded, or the cache cannot be written.
    """
    whole = replace(config, frame="whole", size=framing.decoded_size(config))
    # Load them as training and evaluation do, which then find them in the cache.
    parts = [
        cache.load(
            examples, index.source, whole.size, folder=config.cache, limit_mib=config.cache_mib
        )
        for examples in (
            index.examples.take(~index.examples.of_split("test")),
            index.examples.take(index.examples.of_split("test")),
        )
        if examples
    ]
    examples = [e for part in parts for e in part.examples]
    small = np.concatenate([part.thumbnails for part in parts if part.thumbnails is not None])
    pairs = tuple(
        Pair(examples[pair.image], examples[pair.like], pair.bits)
        for pair in duplicates.find(small, whole.size)
    )
    data, refusal = None, ""
    try:
        data = training_data(config, seed, lambda _: None, index=index)
    except InputError as error:
        refusal = str(error)
    places = [(part.images, row) for part in parts for row in range(len(part.images))]

    def image(i: int) -> np.ndarray:
        images, row = places[i]
        one: np.ndarray = images[row]
        return one

    flat = np.flatnonzero(small.min((1, 2)) == small.max((1, 2)))
    return Survey(
        index,
        tuple(_layouts(index)),
        tuple(pair for part in parts for pair in part.quarantine),
        tuple(examples[i].name for i in flat.tolist() if image(i).min() == image(i).max()),
        pairs,
        tuple(p for p in pairs if side_of(p.image, config) != side_of(p.like, config)),
        leaking_patients(index, config),
        data,
        refusal,
        _lungless(data),
        _some(index, examples, image, shown),
    )


def _lungless(data: TrainingData | None) -> tuple[str, ...] | None:
    if data is None or data.decoded.found is None:
        return None
    return tuple(data.decoded.examples[i].name for i in np.flatnonzero(~data.decoded.found))


def _some(
    index: Index, examples: Sequence[Example], image: Callable[[int], np.ndarray], count: int
) -> dict[tuple[str, str], list[tuple[str, np.ndarray]]]:
    """Returns images of each split and class, evenly spaced in the order of their names."""
    found = {}
    for split in (*SPLITS, ALL):
        for label, name in enumerate(index.classes):
            rows = [i for i, e in enumerate(examples) if (e.split, e.label) == (split, label)]
            if rows:
                at = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
                found[split, name] = [(examples[rows[i]].name, image(rows[i])) for i in at]
    return found


def _layouts(index: Index) -> Iterator[Layout]:
    """Yields the layouts of the files with a readable header."""

    def one(example: Example) -> Layout | None:
        try:
            return layout_of(index.source.read(example.name))
        except (OSError, ValueError):
            return None

    with ThreadPoolExecutor(cpu_cores()) as pool:
        found = pool.map(one, index.examples)
        bar = tqdm(found, desc="headers", total=len(index.examples), unit="image", disable=None)
        yield from (layout for layout in bar if layout is not None)


def to_json(found: Survey, config: DataConfig, seed: int) -> dict[str, Any]:
    """Returns the results of a survey as plain JSON."""
    index, classes = found.index, found.index.classes

    def pair(p: Pair) -> dict[str, Any]:
        return {
            side: {"image": e.name, "split": e.split, "class": classes[e.label]}
            for side, e in (("image", p.image), ("like", p.like))
        } | {"bits": p.bits}

    def part(examples: Examples) -> dict[str, Any]:
        count = Counter(examples.labels.tolist())
        return {
            "images": {name: count[label] for label, name in enumerate(classes)},
            "patients": len({*examples.patients}),
        }

    splits = {s: index.examples.take(index.examples.of_split(s)) for s in (*SPLITS, ALL)}
    sides = None
    if found.data is not None:
        rows = {"train": found.data.train, "validation": found.data.validation}
        sides = {name: part(found.data.decoded.examples.take(at)) for name, at in rows.items()}
    return {
        "root": str(index.root),
        "classes": list(classes),
        "splits": {split: part(examples) for split, examples in splits.items() if examples},
        "left_out": [{"file": name, "reason": reason} for name, reason in index.left_out],
        "formats": dict(Counter(x.form for x in found.layouts)),
        "modes": dict(Counter(x.mode for x in found.layouts)),
        "width": _range([x.width for x in found.layouts]),
        "height": _range([x.height for x in found.layouts]),
        "unreadable": [{"file": name, "reason": reason} for name, reason in found.unreadable],
        "blank": list(found.blank),
        "no_lungs_found": None if found.lungless is None else list(found.lungless),
        "duplicates": list(map(pair, found.pairs)),
        "leaks": {
            "patients": [
                {"splits": list(pair), "patients": names} for pair, names in found.patients.items()
            ],
            "images": list(map(pair, found.leaks)),
        },
        "protocol": protocol(config, seed),
        "training": sides,
        "refusal": found.refusal or None,
    }


def _range(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"least": min(values), "median": float(np.median(values)), "most": max(values)}
