"""Projects the time of a train step on many devices from one measured step and link speeds.

The model is data parallelism with a constant batch per device (weak scaling) and the state on every
device. Compared with one device, a step has four more parts: the all-reduce of the gradients, the
all-reduces of batch norm's sums, the exchange of the sharded uint8 images, and, if the images are
streamed instead, their reading. No overlap is assumed, so the time is an upper bound.

All-reduce is modelled as a ring within a machine and a ring across machines (Patarasuk and Yuan,
JPDC 2009): 2 (n - 1) / n of the bytes pass each link, in 2 (n - 1) steps. Small messages use a tree
with 2 log2(n) steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a projection, besides the measured step."""

    per_machine: int = 8
    """Devices in a machine."""
    inner_gb_s: float = 450.0
    """Speed of a device's links within a machine, in GB/s each way. Default: NVLink of an H100, 900
    GB/s both ways (NVIDIA's data sheet)."""
    outer_gb_s: float = 50.0
    """Speed of a device's link to other machines, in GB/s each way. Default: one InfiniBand NDR
    port, 400 Gbit/s, for each device."""
    inner_us: float = 3.0
    """Latency of a message within a machine, in microseconds. An assumption."""
    outer_us: float = 10.0
    """Latency of a message between machines, in microseconds. An assumption."""
    read_images_s: float = 0.0
    """Images that a machine reads per second; 0 for a data set that is on the devices."""


@dataclass(frozen=True)
class Step:
    """A train step on one device."""

    ms: float
    """Time, in milliseconds."""
    batch: int
    """Images per device."""
    size: int
    """Side of the images, in pixels."""
    parameters: int
    """Number of float32 parameters."""
    norms: int
    """Number of batch norms; each has two sums over the batch forward and two backward."""


def project(step: Step, given: Assumptions, devices: int) -> dict[str, Any]:
    """Returns the parts of the time of a step on many devices and their sum, in milliseconds.

    Args:
        step: a train step on one device.
        given: speeds and latencies.
        devices: number of devices.
    """
    inner = min(devices, given.per_machine)
    outer = math.ceil(devices / given.per_machine)

    def all_reduce(size: float) -> float:
        """Returns the seconds of an all-reduce of `size` bytes within and across machines."""
        ring = 2 * size * (inner - 1) / inner / (given.inner_gb_s * 1e9)
        ring += 2 * size / inner * (outer - 1) / outer / (given.outer_gb_s * 1e9)
        return ring + latency(small=False)

    def latency(*, small: bool) -> float:
        turns = (math.log2(inner), math.log2(outer)) if small else (inner - 1, outer - 1)
        return 2e-6 * (turns[0] * given.inner_us + turns[1] * given.outer_us)

    gradients = all_reduce(4 * step.parameters)
    norms = 4 * step.norms * latency(small=True)
    # Each device sends the rows that it holds to the devices that need them: a reduce-scatter.
    pixels = step.batch * devices * step.size**2
    images = reading = 0.0
    if given.read_images_s:
        reading = step.batch * inner / given.read_images_s
    else:
        images = pixels * (inner - 1) / inner / (given.inner_gb_s * 1e9)
        images += pixels / inner * (outer - 1) / outer / (given.outer_gb_s * 1e9)
        images += latency(small=False) / 2
    parts = {
        "compute": step.ms,
        "gradients": gradients * 1e3,
        "batch_norm": norms * 1e3,
        "images": images * 1e3,
        "reading": max(0.0, reading * 1e3 - step.ms),  # images are read while a step is computed
    }
    total = sum(parts.values())
    return {
        "devices": devices,
        **{f"{name}_ms": value for name, value in parts.items()},
        "step_ms": total,
        "images_s": step.batch * devices / total * 1e3,
        "efficiency": step.ms / total,
        "most": max(parts, key=lambda name: parts[name]),
    }
