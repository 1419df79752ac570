"""Records the arguments of `cnnjax.train.fit` other than the config and the data.

A user's part is recorded as its import path and its fields. A resumed run, a prediction or a report
can then import the same part again, or report what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from cnnjax.config import Config
from cnnjax.errors import InputError
from cnnjax.networks.imported import expect_second_head, imported

PyTree = Any


class Parts(NamedTuple):
    """The arguments of `cnnjax.train.fit` other than config and data; see there."""

    network: Any = None
    objective: Any = None
    optimizer: Any = None
    augment: Any = None
    init: PyTree = None

    def described(self) -> dict[str, Any]:
        """Returns the content of `parts.json`; None for each part that was not given."""
        parts = {
            name: None if part is None else described(part)
            for name, part in self._asdict().items()
            if name != "init"
        }
        return parts | {"init": None if self.init is None else fingerprint(self.init)}


def expect_together(given: Parts, config: Config) -> None:
    """Raises InputError if a user's part and a flag of the config exclude each other."""
    train = config.train
    if given.init is not None and train.init != "random":
        raise InputError(f"init=... and --train.init {train.init} exclude each other; give one")
    if given.augment is not None and config.augment.views > 1:
        raise InputError(
            f"--augment.views {config.augment.views} would use the config's augmentation, not"
            " augment=...; give --augment.views 1"
        )
    if given.optimizer is not None and train.weight_decay:
        raise InputError(
            f"--train.weight-decay {train.weight_decay} has no effect on optimizer=...; set it in"
            " the factory, functools.partial(optax.adamw, weight_decay=...), and to 0 in the config"
        )
    if given.network is not None and given.objective is None and train.auxiliary:
        expect_second_head(given.network)


def described(part: Any) -> dict[str, Any]:
    """Returns the import path and the fields of a part, as plain JSON.

    Args:
        part: a dataclass instance, such as a Linen module; a function; or a `functools.partial` of
            a function, whose arguments are its fields.

    Returns:
        `part`, as `module:Name`, and `fields`; `fields` is None if they are not all numbers,
        strings, or lists of them.
    """
    if isinstance(part, functools.partial):
        named, fields = part.func, dict(enumerate(part.args)) | part.keywords
    elif dataclasses.is_dataclass(part):
        named = type(part)
        fields = {
            field.name: getattr(part, field.name)
            for field in dataclasses.fields(part)
            if field.init
            and field.name not in ("parent", "name")
            # A default that is not plain JSON, such as a dtype, need not be recorded.
            and (_plain(value := getattr(part, field.name)) or value is not field.default)
        }
    else:
        named, fields = (part if hasattr(part, "__qualname__") else type(part)), {}
    kept = {
        str(name): list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }
    plain = all(map(_plain, kept.values()))
    return {"part": f"{named.__module__}:{named.__qualname__}", "fields": kept if plain else None}


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def rebuilt_network(description: dict[str, Any], run: Path) -> nn.Module:
    """Returns the network of a description.

    Args:
        description: the result of `described`.
        run: the workdir, for the error message.

    Raises:
        InputError: the network cannot be imported, its fields were not recorded, or it is not a
            Linen module.
    """
    path, fields = description["part"], description["fields"]
    try:
        if fields is None or path.startswith("__main__:") or "<locals>" in path:
            raise ImportError("it cannot be rebuilt from its record")
        cls = imported(path)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError("it is not a flax.linen.Module")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (ImportError, TypeError) as error:
        raise InputError(
            f"{run} was trained with {path} ({error}); make it importable, or call from Python"
            " with network=..."
        ) from None


def fingerprint(variables: PyTree) -> str:
    """Returns the SHA-256 of the names, shapes, dtypes and values of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(variables)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
