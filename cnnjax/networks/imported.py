"""The user's own networks, given by their import path."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.errors import InputError


def imported(path: str) -> Any:
    """Returns the object at an import path `package.module:Name`.

    Modules are searched on Python's path, and finally in the working directory.

    Raises:
        ImportError: the module does not exist, or does not have the name.
    """
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    module, _, name = path.partition(":")
    part: Any = importlib.import_module(module)
    for each in name.split("."):
        if not hasattr(part, each):
            raise ImportError(f"{module} has no {name}")
        part = getattr(part, each)
    return part


def make_imported(name: str, **settled: Any) -> nn.Module:
    """Returns the Linen module of an import path, `package.module:Name(width=64)`.

    Args:
        name: the import path, optionally with values of fields as Python literals.
        settled: values of fields that the run determines. They are used if the module has the field
            and `name` does not set it.

    Raises:
        InputError: the module cannot be imported, is not a Linen module, or lacks a field.
    """
    path, _, rest = name.partition("(")
    try:
        fields = _literals(rest.removesuffix(")"))
        cls = imported(path)
    except (ImportError, SyntaxError, ValueError) as error:
        raise InputError(
            f"--model.name {name} cannot be used ({error}); give package.module:Name or"
            " package.module:Name(width=64), importable from here"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(
            f"--model.name {name} is not a subclass of flax.linen.Module; give a subclass"
        )
    known = {field.name for field in dataclasses.fields(cls) if field.init} - {"parent", "name"}
    if unknown := sorted(fields.keys() - known):
        raise InputError(
            f"--model.name {name}: {cls.__name__} has no field {unknown[0]}; its fields are"
            f" {', '.join(sorted(known)) or 'none'}"
        )
    try:
        return cls(**{k: v for k, v in settled.items() if k in known} | fields)
    except TypeError as error:  # a field without default
        raise InputError(f"--model.name {name} cannot be made: {error}") from None


def expect_second_head(network: nn.Module) -> None:
    """Raises InputError if a network lacks the auxiliary head that `--train.auxiliary` needs."""
    if not getattr(network, "auxiliary", False):
        raise InputError(
            "--train.auxiliary needs a network with an auxiliary head, and"
            f" {type(network).__name__} has no field `auxiliary` that is true; give"
            " --train.auxiliary 0"
        )


def expect_logits(network: nn.Module, size: int, classes: int, outputs: int) -> None:
    """Raises InputError if a network does not return logits of the expected shape.

    Args:
        network: the network.
        size: side length of its images, in pixels.
        classes: number of classes, for the error message.
        outputs: 1 for logits [batch], more for logits [batch, outputs].
    """
    images = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, logits = jax.eval_shape(
        lambda key, x: (v := network.init(key, x), network.apply(v, x, train=False)), key, images
    )
    wanted = (2,) if outputs == 1 else (2, outputs)
    shape = getattr(logits, "shape", None)
    if shape != wanted:
        raise InputError(
            f"{type(network).__name__} returns an array of shape {shape} for two images, but"
            f" {classes} classes need logits of shape {wanted}"
            + ("; return the only column of the last layer, [:, 0]" if shape == (2, 1) else "")
        )


def _literals(fields: str) -> dict[str, Any]:
    """Returns the keyword arguments of a call, which must be Python literals."""
    call = ast.parse(f"f({fields})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError("its fields must be given as name=value")
    return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
