"""What `cnnjax.train.fit` was given beside its config, written down in the run.

A network or an objective of the user's own is named by its import path and its fields, so that a
resumed run, a prediction or a report finds the same again, or says what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnnjax.errors import InputError

PyTree = Any


def described(part: Any) -> dict[str, Any]:
    """Returns the import path and the fields of a dataclass instance, as plain JSON.

    Args:
        part: such as a Linen module.

    Returns:
        `part`, as `module:Name`, and `fields`; `fields` is None where they are not all numbers,
        texts, or lists of them.
    """
    cls, fields = type(part), {}
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        if field.init and field.name not in ("parent", "name"):
            value = getattr(part, field.name)
            fields[field.name] = list(value) if isinstance(value, tuple) else value
    plain = all(map(_plain, fields.values()))
    return {"part": f"{cls.__module__}:{cls.__qualname__}", "fields": fields if plain else None}


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def rebuilt(description: dict[str, Any], run: Path, argument: str) -> Any:
    """Returns the part that `described` described.

    Args:
        description: its answer.
        run: the workdir, for the message.
        argument: by which the caller could give the part itself, likewise.

    Raises:
        InputError: it cannot be imported, or its fields were not written down.
    """
    path, fields = description["part"], description["fields"]
    module, _, name = path.partition(":")
    try:
        if fields is None or module == "__main__" or "<locals>" in name:
            raise ImportError("it cannot be made again from what was written down")
        part: Any = importlib.import_module(module)
        for each in name.split("."):
            part = getattr(part, each)
        return part(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"{run} was trained with {path} ({error}); make it importable, or call from Python"
            f" with {argument}=..."
        ) from None


def fingerprint(variables: PyTree) -> str:
    """Returns the SHA-256 of the names, shapes, dtypes and values of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(variables)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
