"""The devices of a run: one mesh axis over which each batch is divided.

The same code serves eight GPUs and the cores of a CPU. Where oneDNN is, which uses all cores, the
CPU is one device; elsewhere every core is made a device of its own.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.config import DeviceConfig
from cnnjax.errors import InputError, first_line
from cnnjax.machine import programs
from cnnjax.machine.host import cache_folder, cpu_cores, keep_freed_memory
from cnnjax.ops import ffi, onednn

AXIS = "batch"


def make_mesh(config: DeviceConfig) -> Mesh:
    """Returns the mesh of the run's devices, with one axis, `batch`.

    To be called before JAX is first used: later, the CPU can no longer be divided into devices.

    Raises:
        InputError: the platform asked for is not there, or has too few devices.
    """
    keep_compiled_programs()
    keep_freed_memory()
    if not _cpu_devices_chosen():
        # JAX refuses once it is in use, as in a notebook: then take the devices there are.
        with contextlib.suppress(RuntimeError):
            devices = config.count or (1 if onednn.library() else cpu_cores())
            jax.config.update("jax_num_cpu_devices", devices)
    if config.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        found = jax.devices(None if config.platform == "auto" else config.platform)
    except Exception as error:
        if config.platform == "auto":
            raise InputError(
                f"JAX finds nothing to compute on ({first_line(error)}); look at JAX_PLATFORMS"
            ) from None
        hint = "" if config.platform == "tpu" else ' with pip install "cnnjax[cuda13]"'
        raise InputError(
            f"--device.platform {config.platform}: JAX finds none here; drop the flag,"
            f" or install JAX for it{hint} ({first_line(error)})"
        ) from None
    if config.count > len(found):
        name = found[0].platform
        raise InputError(
            f"--device.count {config.count}: there are only {len(found)} {name} devices"
        )
    return Mesh(np.array(found[: config.count or None]), (AXIS,))


def _cpu_devices_chosen() -> bool:
    """Whether the user, or a test, has told JAX or XLA into how many devices to divide the CPU."""
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return forced or jax.config.values["jax_num_cpu_devices"] > 0


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in the user's cache folder, for the next start.

    A folder chosen through JAX's own settings is left as it is. Compiled programs are code, so the
    folder is for this user alone.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to costs compile time, nothing else
    programs.keep_in(folder)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def divided(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides an array's first axis among the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def platform(mesh: Mesh) -> str:
    """Returns `cpu`, `gpu` or `tpu`."""
    name: str = mesh.devices.flat[0].platform
    return name


@dataclass(frozen=True)
class Traits:
    """What depends on the kind of machine; see `traits`."""

    precision: Literal["float32", "bfloat16"]
    """What `--train.precision auto` stands for."""
    evaluated: int
    """Images of up to `LARGEST` pixels to a side in one step of an evaluation. More fall out of a
    CPU core's cache; a step of fewer takes an accelerator less time than calling it takes Python
    (not measured)."""
    framed: int
    """Films that the lung finder sees at once."""
    steps: int
    """Train steps in one call. A step of a small network takes an accelerator less time than
    calling it takes Python; a CPU's takes more, and XLA's convolutions are slow in its loops."""
    once: dict[str, Any] = field(default_factory=dict)
    """`compiler_options` of `jax.jit` for a program that is run once: LLVM takes longer to make
    random numbers fast on a CPU than they take."""

    def evaluated_at(self, side: int) -> int:
        """Returns how many images of side x side pixels are evaluated in one step."""
        return max(1, self.evaluated * LARGEST**2 // max(LARGEST, side) ** 2)


LARGEST = 128
"""Side, in pixels, up to which an evaluation takes `Traits.evaluated` images a step: the feature
maps of all must fit in memory."""

_ACCELERATOR = Traits("bfloat16", evaluated=1024, framed=1024, steps=16)
TRAITS = {
    "cpu": Traits(
        "float32", evaluated=64, framed=64, steps=1, once={"xla_backend_optimization_level": 1}
    ),
    "gpu": _ACCELERATOR,
    "tpu": _ACCELERATOR,
}


def traits(mesh: Mesh) -> Traits:
    """Returns what depends on the kind of machine that a mesh's devices are."""
    return TRAITS[platform(mesh)]


def dividing(mesh: Mesh, batch: int) -> Mesh:
    """Returns the mesh of as many of the devices as divide a batch into equal parts."""
    count = next(n for n in range(min(mesh.size, batch), 0, -1) if batch % n == 0)
    return mesh if count == mesh.size else Mesh(mesh.devices[:count], mesh.axis_names)


def full_float32(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Lets what is traced in the block multiply float32 as that; see `TrainConfig.precision`.

    By default XLA rounds both factors on accelerators: to 11 bits on an NVIDIA GPU (TF32), to 8 on
    a TPU (bfloat16).
    """
    if platform(mesh) == "cpu":
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = jax.default_matmul_precision("highest")
    return context


def describe(mesh: Mesh) -> str:
    """Returns a phrase such as `1 x cpu (2 cores, oneDNN)`."""
    first = mesh.devices.flat[0]
    if platform(mesh) == "cpu":
        kernels = ", oneDNN" if ffi.available() else ""
        return f"{mesh.size} x cpu ({cpu_cores()} cores{kernels})"
    return f"{mesh.size} x {first.platform} ({first.device_kind})"
