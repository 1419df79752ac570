"""Compiles train steps ahead of time for a GPU or a TPU that is not available.

    pip install "jax[tpu]"
    python -m benchmarks.ahead --target tpu-v5e
    pip install "jax[cuda13]"
    python -m benchmarks.ahead --target h100 --batches 32 512 --json ahead.json

The steps of the recipes are compiled for a description of the device, by the compiler of that
device. Sixteen steps are one program, as in the training loop on these devices. This proves that
the steps compile, and gives the number of launches, the memory and, for a TPU, the bytes moved as
the compiler counts them. It does not measure speed. The bound is the larger of the operations
divided by the device's peak and the bytes divided by the memory bandwidth. The bytes include
accesses that never leave the on-chip memory, so a device can be faster than the bound.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.measure import circumstances, headline, print_table, recipe_of, write_json
from benchmarks.peaks import count_flops, peak_of
from cnnjax import steps, train
from cnnjax.augment import make_augment
from cnnjax.cli import guarded
from cnnjax.config import DeviceConfig
from cnnjax.data.batches import Resident
from cnnjax.errors import InputError, first_line
from cnnjax.machine import devices
from cnnjax.networks import make_model
from cnnjax.objectives import Binary
from cnnjax.optimizers import make_optimizer

Target = Literal["tpu-v5e", "h100"]
Forms = Literal["chosen", "default"]

_IMAGES = 4_096  # size of the data set on the device

# Description of the GPU that XLA's compiler needs if there is none. Sources: NVIDIA's data sheet
# and CUDA's programming guide, compute capability 9.0.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 device_memory_size: 85899345920 l2_cache_size: 52428800
}
"""

# XLA instructions that launch nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_INSTRUCTION = re.compile(r"  (?:ROOT )?%[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][a-z-]*)\(")


@dataclass(frozen=True)
class Options:
    """What is compiled: all combinations of these options."""

    target: Target = "tpu-v5e"
    """The device: a TPU v5e or an NVIDIA H100."""
    recipes: tuple[Literal["baseline", "pneumonia"], ...] = ("baseline", "pneumonia")
    """Names of recipes in experiments/."""
    batches: tuple[int, ...] = (32,)
    """Images per step, over all devices."""
    counts: tuple[Literal[1, 4], ...] = (1, 4)
    """Numbers of devices."""
    forms: tuple[Forms, ...] = ("chosen",)
    """Implementations of layers and augmentation: those chosen for the target, or the default."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""

    def __post_init__(self) -> None:
        if min(self.batches, default=0) < 4 or any(batch % 4 for batch in self.batches):
            raise InputError("--batches must be multiples of 4, the largest number of devices")


@dataclass(frozen=True)
class Row:
    """One compiled program of sixteen steps."""

    recipe: str
    batch: int
    devices: int
    forms: str
    compile_seconds: float
    launches: int
    """Kernels launched per step, or their equivalent on a TPU."""
    memory_mib: float
    """Temporary memory of the program on each device, in MiB."""
    flops: int
    """Operations of a step, as `peaks.count_flops` counts them."""
    traffic_mb: float | None
    """Memory traffic per step and device, in MB; None if XLA does not count it."""
    bound_ms: float | None


def mesh_of(target: Target, count: int) -> tuple[Mesh, str]:
    """Returns a mesh of described devices and XLA's name of their platform.

    Raises:
        InputError: the compiler for them is not installed.
    """
    try:
        if target == "h100":
            found = topologies.get_topology_desc(
                "h100", "cuda", topology=f"1x1x{count}", target_config=_H100
            )
        else:
            found = topologies.get_topology_desc("v5e:2x2", "tpu")
    except Exception as error:
        needed = "jax[cuda13]" if target == "h100" else "jax[tpu]"
        raise InputError(
            f'--target {target}: its compiler is not installed; pip install "{needed}"'
            f" ({first_line(error)})"
        ) from None
    return Mesh(np.array(found.devices[:count]), (devices.AXIS,)), (
        "cuda" if target == "h100" else "tpu"
    )


def compiled(target: Target, recipe: str, batch: int, count: int, forms: Forms) -> Row:
    """Compiles sixteen steps of a recipe in bfloat16, the default on these devices."""
    config = recipe_of(recipe)
    mesh, platform = mesh_of(target, count)
    everywhere = devices.replicated(mesh)
    auxiliary, size = config.train.auxiliary, config.data.size
    model = make_model(config.model, jnp.dtype("bfloat16"), auxiliary=bool(auxiliary))
    optimizer, _ = make_optimizer(config.train, 100)
    step = steps.make_train_step(
        model,
        optimizer,
        make_augment(config.augment),
        Binary(label_smoothing=config.train.label_smoothing, auxiliary=auxiliary),
        ema_decay=config.train.ema,
    )

    def shaped(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(
        lambda key: steps.init_state(model, optimizer, key, size, ema=bool(config.train.ema)), key
    )
    numbers = jax.ShapeDtypeStruct((_IMAGES,), jnp.int32)
    images = jax.ShapeDtypeStruct((_IMAGES, size, size), jnp.uint8)
    whole: Any = images, numbers, numbers if auxiliary else None
    data = Resident(*whole)
    feeds = jax.ShapeDtypeStruct((devices.traits(mesh).steps, batch), jnp.int32)
    by_row = NamedSharding(mesh, PartitionSpec(None, devices.AXIS))
    start = time.perf_counter()
    choice = mock.patch.object(jax.lax, "platform_dependent", _default)
    with choice if forms == "default" else contextlib.nullcontext():
        traced = train.compile_steps(mesh, step).many.trace(
            *shaped((state, data), everywhere), shaped(feeds, by_row), shaped(key, everywhere)
        )
    program = traced.lower(lowering_platforms=(platform,)).compile()
    seconds = time.perf_counter() - start
    cost = program.cost_analysis()  # counts the body of a loop once
    traffic = cost["bytes accessed"] if cost else None  # unknown for GPUs
    flops = count_flops(model, batch, size)[1]
    peak = peak_of(mesh.devices.flat[0], "bfloat16")
    return Row(
        recipe=recipe,
        batch=batch,
        devices=count,
        forms=forms,
        compile_seconds=seconds,
        launches=launches(program.as_text()),
        memory_mib=program.memory_analysis().temp_size_in_bytes / 2**20,
        flops=flops,
        traffic_mb=None if traffic is None else traffic / 1e6,
        bound_ms=None if traffic is None else peak.bound(flops / count, traffic) * 1e3,
    )


def launches(program: str) -> int:
    """Counts the launches of the largest computation (the loop body) in the text of a program."""
    fused = set(re.findall(r"calls=%([\w.-]+)", program))  # one launch each, counted at the call
    most = count = 0
    name = ""
    for line in program.splitlines():
        if line.endswith("{"):
            name, count = re.sub(r"^(ENTRY )?%?", "", line).split(" ")[0], 0
        elif name not in fused and (found := _INSTRUCTION.match(line)):
            kind = found.group(1)
            count += kind not in _FREE and not kind.endswith("-done")
            most = max(most, count)
    return most


def _default(*arguments: Any, default: Any, **others: Any) -> Any:
    return default(*arguments)


def main() -> int:
    """Compiles, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ["CNNJAX_ONEDNN"] = "0"  # its kernels are for this machine
    found = circumstances(DeviceConfig("cpu"))
    mesh, _ = mesh_of(options.target, 1)
    found["device"] = devices.describe(mesh)
    found["device_kind"] = mesh.devices.flat[0].device_kind
    found["platform"] = devices.platform(mesh)
    rows = [
        compiled(options.target, recipe, batch, count, forms)
        for recipe in options.recipes
        for batch in options.batches
        for count in options.counts
        for forms in options.forms
    ]
    print(headline(found))
    names = ["recipe", "batch", "devices", "forms", "compile s", "launches", "MiB", "flops"]
    print_table([*names, "traffic MB", "bound ms"], [list(asdict(row).values()) for row in rows])
    if options.json is not None:
        asked = asdict(options)
        del asked["json"]
        write_json(
            options.json,
            {"circumstances": found, "options": asked, "rows": [asdict(row) for row in rows]},
        )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
