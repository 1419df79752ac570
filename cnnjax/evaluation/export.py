"""Export of trained networks to formats that run without cnnjax.

A `.json` file next to each export describes the preprocessing of images and the meaning of the
outputs. With it, other programs can reproduce the predictions of cnnjax.
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

OPSET = 18  # ONNX operator set, from 2022: old runtimes support it too
CLOSE = 1e-4  # relative and absolute tolerance between the logits of ONNX Runtime and of JAX


def export(predictor: Predictor, form: Format, path: Path) -> list[Path]:
    """Writes the network to a file, and a description as JSON next to it.

    The formats are:

    - `stablehlo`: a program for CPU, CUDA and TPU.
      `jax.export.deserialize(path.read_bytes()).call(images)` takes uint8 [n, size, size] for any
      n. It returns logits, float32 [n], for two classes. For networks with K logits it returns
      calibrated probabilities, float32 [n, K].
    - `onnx`: the same program for ONNX Runtime and other runtimes, with the input `images` and the
      output `logits` or `probabilities`.
    - `safetensors`: the weights only, in float32, named `MEMBER/COLLECTION/LAYER/ARRAY`. The
      weights of the lung finder are the member `lungs`.

    If the networks see images cropped to the lungs, the programs find the lungs and crop the images
    themselves.

    Args:
        predictor: what to export. It must use one view of an image (`Predictor.open(...,
            views=1)`), because exports contain no augmentation. The logits of several networks are
            averaged.
        form: one of the three formats.
        path: the output file.

    Returns:
        The paths of the two files.

    Raises:
        InputError: the extra `export` or `onnx` is not installed, or the converted ONNX model gives
            other outputs than the network.
        ValueError: the predictor uses several views.
    """
    if predictor.views != 1:
        raise ValueError(f"the predictor uses {predictor.views} views; open it with views=1")
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
    """Returns the serialized program with a symbolic batch size; see `export`."""
    _require("flatbuffers", "export")
    (batch,) = jax.export.symbolic_shape("batch")
    taken = jax.ShapeDtypeStruct((batch, predictor.size, predictor.size), jnp.uint8)
    # Without oneDNN's kernels, which exist on this platform only. With full float32 precision
    # everywhere, since the operating point was chosen with it.
    with layers.portable(), jax.default_matmul_precision("highest"):
        program = jax.jit(_program(predictor))
        exported = jax.export.export(program, platforms=PLATFORMS)(taken)
    return bytes(exported.serialize())


def onnx(predictor: Predictor) -> bytes:
    """Returns the program in float32 as an ONNX model, checked with ONNX Runtime."""
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
    # The converter records wrong intermediate shapes: those before a transposition.
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
            "the ONNX model that jax2onnx made gives other outputs than the network;"
            " try another version of jax2onnx, or --format stablehlo"
        )
    return data


def _program(predictor: Predictor, dtype: Any = None) -> Callable[[jax.Array], jax.Array]:
    """Returns the pure function from uint8 images [n, size, size] to logits float32 [n].

    For networks with K logits, the function returns calibrated probabilities [n, K] instead.

    Args:
        predictor: the networks.
        dtype: the dtype of their computations; as in training if None.
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
    "cropped to the lungs: the lung finder sees the image reduced to"
    f" {lungs.SIDE} x {lungs.SIDE} pixels; the box around the lungs is enlarged by"
    f" {lungs.MARGIN:.0%} of its side in each direction, clipped to the image, and resized to the"
    " networks' input size (Pillow's HAMMING filter). If no lungs are found, the whole image is"
    " used. The StableHLO and ONNX programs include this step; for the weights see cnnjax/lungs.py"
)


def describe(predictor: Predictor) -> dict[str, Any]:
    """Returns the description of inputs and outputs that is written as JSON; see `export`."""
    return {
        "weights": predictor.about,
        "input": {
            "shape": ["batch", predictor.size, predictor.size],
            "dtype": "uint8",
            "preprocessing": (
                "in this order: a JPEG is reduced by 2, 4 or 8 while decoding if its sides stay at"
                f" least {predictor.size} pixels (Pillow's draft mode); rotation by the EXIF"
                " orientation; transparency composited over black; 16-bit values divided by 257;"
                " conversion to gray with ITU-R 601 luma; the whole image stretched to"
                f" {predictor.size} x {predictor.size} pixels (area filter: Pillow's HAMMING);"
                " 0 is black, 255 is white"
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
            " network's logits; the predicted class has the highest probability",
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
