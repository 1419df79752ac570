"""A trained network in forms that need none of this project to run.

Beside each stands a `.json` that says how an image is brought to the network and what its logit
means, so that whoever loads it decodes and decides as we do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import lungs
from cnnjax.errors import InputError
from cnnjax.evaluation.predict import Predictor
from cnnjax.networks.variables import flatten
from cnnjax.objectives import to_float
from cnnjax.operating import SoftmaxPoint
from cnnjax.ops import layers
from cnnjax.steps import variables_of

Format = Literal["stablehlo", "onnx", "safetensors"]
PLATFORMS = ("cpu", "cuda", "tpu")

OPSET = 18  # of ONNX, from 2022: what reads nothing newer reads this
CLOSE = 1e-4  # by how much ONNX's logits may differ from ours, as a part of them or, below 1, whole


def export(predictor: Predictor, form: Format, path: Path) -> list[Path]:
    """Writes the network to a file, and beside it what is to be known.

    `stablehlo` is a program: `jax.export.deserialize(path.read_bytes()).call(images)` takes uint8
    [n, size, size], for any n, and gives float32 [n], logits, on CPU, CUDA or TPU; of networks with
    a logit for each of K classes [n, K], calibrated probabilities. `onnx` is the same program for
    ONNX Runtime and its like, from `images` to `logits` or `probabilities`. `safetensors` are the
    weights alone, named `MEMBER/COLLECTION/LAYER/ARRAY`, in float32; those of the lung finder are
    the member `lungs`. Where the networks see images cut to the lungs, the programs find and cut
    them.

    Args:
        predictor: what to export, of one view of an image (`Predictor.open(..., views=1)`), so that
            who loads it needs no augmentation; the logits of several networks are averaged.
        form: one of the three.
        path: the file.

    Returns:
        The two files' paths.

    Raises:
        InputError: the extra `export`, or `onnx`, is not installed, or what the converter to ONNX
            made does not give our logits.
        ValueError: the predictor is for several views.
    """
    if predictor.views != 1:
        raise ValueError(f"of a predictor for {predictor.views} views; open it with views=1")
    beside = path.with_name(path.name + ".json")
    document = describe(predictor) | {"format": form}
    if form == "stablehlo":
        data, document["platforms"] = stablehlo(predictor), list(PLATFORMS)
    elif form == "onnx":
        data, document["opset"] = onnx(predictor), OPSET
    else:
        data = safetensors(predictor)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    beside.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return [path, beside]


def stablehlo(predictor: Predictor) -> bytes:
    """Returns the program from images to logits, its batch size left open; see `export`."""
    _require("flatbuffers", "export")
    (batch,) = jax.export.symbolic_shape("batch")
    taken = jax.ShapeDtypeStruct((batch, predictor.size, predictor.size), jnp.uint8)
    # oneDNN's kernels are of this machine; other platforms have no such thing.
    # In full float32 everywhere: the operating point was chosen so.
    with layers.portable(), jax.default_matmul_precision("highest"):
        program = jax.jit(_program(predictor))
        exported = jax.export.export(program, platforms=PLATFORMS)(taken)
    return bytes(exported.serialize())


def onnx(predictor: Predictor) -> bytes:
    """Returns the program in float32 as an ONNX model, held against ONNX Runtime."""
    _require("jax2onnx", "onnx")
    _require("onnxruntime", "onnx")
    import onnxruntime
    from jax2onnx import to_onnx

    taken = jax.ShapeDtypeStruct(("batch", predictor.size, predictor.size), jnp.uint8)
    with layers.portable():
        program = _program(predictor, jnp.float32)  # runtimes lack convolutions in bfloat16
        model = to_onnx(
            program,
            [taken],
            model_name="cnnjax",
            opset=OPSET,
            input_names=["images"],
            output_names=["probabilities" if predictor.has_softmax else "logits"],
        )
    # The converter notes shapes in between that are those before a transposition.
    del model.graph.value_info[:]
    data = bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, predictor.size, predictor.size), dtype=np.uint8)
    (found,) = session.run(None, {"images": images})
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(program)(jnp.asarray(images))
    if not np.allclose(found, expected, rtol=CLOSE, atol=CLOSE):
        raise InputError(
            "what jax2onnx made of the network gives other outputs than it does;"
            " try another version of jax2onnx, or --format stablehlo"
        )
    return data


def _program(predictor: Predictor, dtype: Any = None) -> Callable[[jax.Array], jax.Array]:
    """Returns the pure function from uint8 images [n, size, size] to logits float32 [n].

    Where the networks have a logit for each of K classes, it gives probabilities [n, K].

    Args:
        predictor: whose networks.
        dtype: what they compute in; as they were trained when None.
    """
    model = predictor.model if dtype is None else predictor.model.clone(dtype=dtype)
    members = [variables_of(member) for member in predictor.members]
    finder = lungs.read() if predictor.framed else None

    point = predictor.operating

    def outputs(images: jax.Array) -> jax.Array:
        if finder is not None:
            images = lungs.frame(finder, images, predictor.side).images
        pixels = to_float(images)
        each = [model.apply(m, pixels, train=False) for m in members]
        mean = jnp.stack(each).mean(0)
        if isinstance(point, SoftmaxPoint):
            bias = jnp.asarray(point.bias or 0.0, jnp.float32)
            return jax.nn.softmax(jnp.float32(point.slope) * mean + bias)
        return mean

    return outputs


def safetensors(predictor: Predictor) -> bytes:
    """Returns the weights of all networks as the bytes of a safetensors file; see `export`."""
    _require("safetensors", "export")
    from safetensors.numpy import save

    networks = {
        str(i): jax.device_get(variables_of(member)) for i, member in enumerate(predictor.members)
    }
    if predictor.framed:
        networks["lungs"] = lungs.read()
    arrays = flatten(networks)
    return save({name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()})


_FRAMED = (
    "cut to the lungs: the lung finder sees the image reduced to"
    f" {lungs.SIDE} x {lungs.SIDE} pixels; the box around the lungs, wider by"
    f" {lungs.MARGIN:.0%} of its side in each direction within the image, is resized to the"
    " networks' square (Pillow's HAMMING); the whole image where no lungs are found. The StableHLO"
    " and ONNX programs do this themselves; for the weights alone see cnnjax/lungs.py"
)


def describe(predictor: Predictor) -> dict[str, Any]:
    """Returns what one needs to know to use the network elsewhere; plain JSON."""
    return {
        "weights": predictor.about,
        "input": {
            "shape": ["batch", predictor.size, predictor.size],
            "dtype": "uint8",
            "preprocessing": (
                f"gray by ITU-R 601 luma, the whole image stretched to {predictor.size} x"
                f" {predictor.size} pixels (an area filter: Pillow's HAMMING), 0 black to 255 white"
                "; before that upright by EXIF, transparency over black, 16 bits divided by 257,"
                " and a JPEG reduced by 2, 4 or 8 in decoding as far as that leaves so many pixels"
                " (Pillow's draft)"
            ),
            "frame": _FRAMED if predictor.framed else "the whole image",
        },
        "output": _output(predictor),
        "intended use": "research and teaching; not a medical device",
    }


def _output(predictor: Predictor) -> dict[str, Any]:
    point, classes = predictor.operating, predictor.classes
    if isinstance(point, SoftmaxPoint):
        return {
            "shape": ["batch", len(classes)],
            "dtype": "float32",
            "classes": list(classes),
            "meaning": "calibrated probability of each class, softmax(slope * logits + bias) of the"
            " network's logits; the class is that of the highest",
            "slope": point.slope,
            "bias": list(point.bias),
        }
    return {
        "dtype": "float32",
        "meaning": f"logit of {classes[1]} against {classes[0]}",
        "probability": "1 / (1 + exp(-(slope * logit + bias)))",
        "slope": point.slope,
        "bias": point.bias,
        "prevalence": point.prevalence,
        "positive from this logit on": point.threshold,
    }


def _require(module: str, extra: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise InputError(
            f"this export needs {module}; install it with: pip install 'cnnjax[{extra}]'"
        ) from None
