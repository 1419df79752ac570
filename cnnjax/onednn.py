"""oneDNN's convolution and matrix product, as jaxlib carries them for x86 CPUs.

XLA's own convolution on a CPU is Eigen's, and several times slower than oneDNN's. jaxlib's builds
for x86 link oneDNN in, and XLA's CPU backend makes calls to it out of the custom calls
`__onednn$convolution` and `__onednn$matmul`. They are meant for a rewriting pass of XLA's
(xla/service/cpu/onednn_contraction_rewriter.cc), which does not run in the way that JAX compiles,
and are not documented. So `available` finds out by trial, once a process, and `cnnjax.layers` falls
back on XLA's own.

The calls are for one device: XLA would not divide them among several. Nor can a program with such
a call be kept in JAX's persistent compilation cache.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def expected() -> bool:
    """Tells, before JAX is first used, whether this jaxlib should have oneDNN in it."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@functools.cache
def available() -> bool:
    """Tells whether this process computes on one CPU device whose programs can call oneDNN."""
    if not expected() or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    return _works()


def takes(dtype: Any) -> bool:
    """Tells whether oneDNN computes in a type here; in bfloat16 only where AVX-512 is."""
    return bool(dtype == jnp.float32) or avx512()


@functools.cache
def avx512() -> bool:
    """Tells whether this CPU has AVX-512, with which oneDNN takes other kernels."""
    return " avx512f " in Path("/proc/cpuinfo").read_text()


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    pads: Pads,
    stride: int,
    dilation: int = 1,
    axes: str = "HWIO",
) -> jax.Array:
    """Returns the cross-correlation of images with filters.

    Args:
        x: float32 or bfloat16 [batch, height, width, in].
        kernel: the filters, of x's dtype.
        pads: rows of zeros (above, below) and columns of zeros (left, right).
        stride: step of the filters in both directions, in pixels.
        dilation: from one of a filter's rows, or columns, to the next, in pixels.
        axes: those of `kernel`, named as in `jax.lax.conv_general_dilated`. (Images must have the
            channels last: with their axes in another order oneDNN takes hundreds of times as long.)

    Returns:
        [batch, height', width', out].
    """
    sizes = dict(zip(axes, kernel.shape, strict=True))
    height, width = (
        (size + sum(pad) - (window - 1) * dilation - 1) // stride + 1
        for size, pad, window in zip(x.shape[1:3], pads, (sizes["H"], sizes["W"]), strict=True)
    )
    images = {"data": {"batch_dim": "0", "feature_dim": "3", "spatial_dims": ["1", "2"]}}
    filters = {
        "input_feature_dim": str(axes.index("I")),
        "output_feature_dim": str(axes.index("O")),
        "spatial_dims": [str(axes.index("H")), str(axes.index("W"))],
    }
    config = {
        "dims": "4",
        "feature_groups": "1",
        "input": images,
        "kernel": {"filter": filters},
        "output": images,
        "window": {
            "pad_left": [str(before) for before, _ in pads],
            "pad_right": [str(after) for _, after in pads],
            "strides": [str(stride)] * 2,
            "window_dilations": [str(dilation)] * 2,
        },
    }
    shape = (x.shape[0], height, width, sizes["O"])
    return _call("convolution", {"onednn_conv_config": config}, shape, x, kernel)


def transposed_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a.T @ b, [k, m], of float32 or bfloat16 a [n, k] and b [n, m]."""
    config = {"onednn_matmul_config": {"transpose_a": True, "transpose_b": False}}
    return _call("matmul", config, (a.shape[1], b.shape[1]), a, b)


def _call(name: str, config: Any, shape: tuple[int, ...], *operands: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call(
        f"__onednn${name}",
        jax.ShapeDtypeStruct(shape, operands[0].dtype),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(config),
    )
    result: jax.Array = call(*operands)
    return result


def _works() -> bool:
    """Compiles both calls and compares what they give with NumPy's and XLA's own."""
    rng = np.random.default_rng(0)
    pads = ((1, 0), (0, 1))
    try:
        with jax.ensure_compile_time_eval():  # also when asked while a program is traced
            x = jnp.asarray(rng.normal(size=(2, 6, 5, 4)), jnp.float32)
            kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)
            rows = x.reshape(-1, 4)
            found = jax.jit(convolution, static_argnums=(2, 3))(x, kernel, pads, 2)
            product = jax.jit(transposed_product)(rows, rows)
            plain = lax.conv_general_dilated(
                x, kernel, (2, 2), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            right = jnp.allclose(found, plain, atol=1e-4)
            return bool(right & jnp.allclose(product, rows.T @ rows, atol=1e-4))
    except Exception:  # whatever it is, XLA's own convolution will serve
        return False
