"""Peak performance of devices, and the operations and memory traffic of networks."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.ops import layers

# By jax.Device.device_kind: operations per second in bfloat16, operations per second in float32
# with XLA's default precision (TF32 on NVIDIA's tensor cores, bfloat16 on TPUs), both without
# sparsity, and bytes per second of memory. Sources: data sheets of NVIDIA H100 SXM5, H200, A100 SXM
# 80 and 40 GB; Google Cloud TPU system architecture.
_SHEETS: dict[str, tuple[float, float, float]] = {
    "NVIDIA H100 80GB HBM3": (989e12, 494e12, 3.35e12),
    "NVIDIA H200": (989e12, 494e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 156e12, 2.04e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 156e12, 1.555e12),
    "TPU v4": (275e12, 275e12, 1.2e12),
    "TPU v5 lite": (197e12, 197e12, 0.819e12),
    "TPU v5": (459e12, 459e12, 2.765e12),
    "TPU v6 lite": (918e12, 918e12, 1.64e12),
}


@dataclass(frozen=True)
class Peak:
    """Peak performance of one device."""

    flops: float
    """Floating-point operations per second."""
    bandwidth: float
    """Memory bandwidth, in bytes per second."""
    source: str
    """`data sheet`, or `measured` with a large matrix product, a convolution and a copy."""

    def shared(self, devices: int) -> Peak:
        """Returns the peak of each of several virtual devices that share this one."""
        return replace(self, flops=self.flops / devices, bandwidth=self.bandwidth / devices)

    def bound(self, flops: float, bytes_moved: float) -> float:
        """Returns the lower bound of the time in seconds (roofline: Williams et al., 2009)."""
        return max(flops / self.flops, bytes_moved / self.bandwidth)


@functools.cache
def peak_of(device: Any, precision: str) -> Peak:
    """Returns the peak of a device: from its data sheet if known here, otherwise measured."""
    if sheet := _SHEETS.get(device.device_kind):
        bfloat16, float32, bandwidth = sheet
        return Peak(bfloat16 if precision == "bfloat16" else float32, bandwidth, "data sheet")
    with jax.default_device(device):
        n = 2048 if device.platform == "cpu" else 8192
        a = jnp.ones((n, n), precision)
        product = 2 * n**3 / _best(jax.jit(lambda a: a @ a), a)
        # On a CPU, different libraries compute products and convolutions.
        x, kernel = jnp.ones((32, 32, 32, 256), precision), jnp.ones((3, 3, 256, 256), precision)
        work = 2 * x.size * kernel.size // kernel.shape[2]
        convolution = work / _best(jax.jit(lambda x: layers.conv(x, kernel)), x)
        words = 2**25 if device.platform == "cpu" else 2**29
        # In place: with a new array, the time would include the allocation of its pages.
        add = jax.jit(lambda x: x + 1, donate_argnums=0)
        copy = _best(add, jnp.zeros(words, jnp.float32), in_place=True)
    return Peak(max(product, convolution), 2 * 4 * words / copy, "measured")


def _best(
    compute: Callable[[jax.Array], jax.Array], x: jax.Array, *, in_place: bool = False
) -> float:
    times = []
    for _ in range(8):  # the first compiles
        start = time.perf_counter()
        y = jax.block_until_ready(compute(x))
        times.append(time.perf_counter() - start)
        x = y if in_place else x
    return min(times)


def count_flops(model: Any, batch: int, size: int) -> tuple[int, int]:
    """Counts the operations of a network's matrix products and convolutions: (forward, train).

    A multiplication and an addition count as two operations; elementwise operations are not
    counted. Training adds the gradient by the weights of each layer, and the gradient by its input
    except at the first convolution. Products before the first convolution have no weights.
    """
    images = jax.ShapeDtypeStruct((batch, size, size, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with layers.portable():  # oneDNN's calls can return pooled arrays
        traced = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    found = _products(traced.jaxpr)
    first = [name for name, _ in found].index("conv_general_dilated")
    flops = [count for _, count in found]
    learned = flops[first:]
    return sum(flops), sum(flops) + 2 * sum(learned) - learned[0]


# %name = result operation(operands), ...; arrays are written as type[sides].
_INSTRUCTION = re.compile(r"%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)")
_ARRAY = re.compile(r"\b[a-z]+(\d+)\w*\[([\d,]*)\]")


def called_bytes(program: str) -> int:
    """Returns the bytes that the library calls of a compiled program read and write.

    XLA does not count them. The libraries are oneDNN on a CPU, cuDNN and cuBLAS on a GPU. Their
    scratch memory, a further result of one dimension in bytes, is not counted.

    Args:
        program: optimized HLO.
    """
    sizes: dict[str, int] = {}
    total = 0
    for name, result, operation, operands in _INSTRUCTION.findall(program):
        called = operation == "custom-call"
        arrays = [(int(bits), shape.split(",")) for bits, shape in _ARRAY.findall(result)]
        sizes[name] = sum(
            bits // 8 * int(np.prod([int(side) for side in shape if side]))
            for bits, shape in arrays
            if not (called and bits == 8 and len(shape) == 1)
        )
        if called:
            read = (sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
            total += sizes[name] + sum(read)
    return total


def _products(jaxpr: Any) -> list[tuple[str, int]]:
    """Returns the primitive and the operations of each product, in order of execution."""
    found: list[tuple[str, int]] = []
    for equation in jaxpr.eqns:
        output = equation.outvars[0].aval
        name = equation.primitive.name
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            found.append((name, 2 * output.size * int(np.prod(kernel[:3]))))
        elif name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = int(np.prod([equation.invars[0].aval.shape[d] for d in contracted]))
            found.append((name, 2 * output.size * depth))
        else:
            for parameter in equation.params.values():
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    found += _products(inner)
    return found
