"""A trained network in forms that need none of this project to run.

Beside each stands a `.json` that says how an image is brought to the network and what its logit
means, so that whoever loads it decodes and decides as we do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import layers
from cnnjax.errors import InputError
from cnnjax.predict import Predictor
from cnnjax.release import flatten
from cnnjax.steps import to_float, variables_of

Format = Literal["stablehlo", "safetensors"]
PLATFORMS = ("cpu", "cuda", "tpu")


def export(predictor: Predictor, form: Format, path: Path) -> list[Path]:
    """Writes the network to a file, and beside it what is to be known.

    `stablehlo` is a program: `jax.export.deserialize(path.read_bytes()).call(images)` takes uint8
    [n, size, size], for any n, and gives float32 [n], logits, on CPU, CUDA or TPU. `safetensors`
    are the weights alone, named `MEMBER/COLLECTION/LAYER/ARRAY`, in float32.

    Args:
        predictor: what to export; the logits of several networks are averaged, in either form.
        form: one of the two.
        path: the file.

    Returns:
        The two files' paths.

    Raises:
        InputError: the extra `export` is not installed.
    """
    beside = path.with_name(path.name + ".json")
    document = describe(predictor) | {"format": form}
    if form == "stablehlo":
        data, document["platforms"] = stablehlo(predictor), list(PLATFORMS)
    else:
        data = safetensors(predictor)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    beside.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return [path, beside]


def stablehlo(predictor: Predictor) -> bytes:
    """Returns the program from images to logits, its batch size left open; see `export`."""
    _require("flatbuffers")
    members = [variables_of(member) for member in predictor.members]

    def logits(images: jax.Array) -> jax.Array:
        pixels = to_float(images)
        each = [predictor.model.apply(m, pixels, train=False) for m in members]
        return jnp.stack(each).mean(0)

    (batch,) = jax.export.symbolic_shape("batch")
    taken = jax.ShapeDtypeStruct((batch, predictor.size, predictor.size), jnp.uint8)
    # oneDNN's kernels are of this machine; other platforms have no such thing.
    with layers.portable():
        exported = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(taken)
    return bytes(exported.serialize())


def safetensors(predictor: Predictor) -> bytes:
    """Returns the weights of all networks as the bytes of a safetensors file; see `export`."""
    _require("safetensors")
    from safetensors.numpy import save

    return save(
        {
            f"{i}/{name}": np.ascontiguousarray(value, np.float32)
            for i, member in enumerate(predictor.members)
            for name, value in flatten(jax.device_get(variables_of(member))).items()
        }
    )


def describe(predictor: Predictor) -> dict[str, Any]:
    """Returns what one needs to know to use the network elsewhere; plain JSON."""
    point = predictor.operating
    return {
        "weights": predictor.about,
        "input": {
            "shape": ["batch", predictor.size, predictor.size],
            "dtype": "uint8",
            "preprocessing": (
                f"gray by ITU-R 601 luma, the whole image stretched to {predictor.size} x"
                f" {predictor.size} pixels (an area filter: Pillow's HAMMING), 0 black to 255 white"
            ),
        },
        "output": {
            "dtype": "float32",
            "meaning": f"logit of {predictor.classes[1]} against {predictor.classes[0]}",
            "probability": "1 / (1 + exp(-(slope * logit + bias)))",
            "slope": point.slope,
            "bias": point.bias,
            "prevalence": point.prevalence,
            "positive from this logit on": point.threshold,
        },
        "intended use": "research and teaching; not a medical device",
    }


def _require(module: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise InputError(
            f"export needs {module}; install it with: pip install 'cnnjax[export]'"
        ) from None
