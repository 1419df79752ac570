"""The devices of a run: a mesh with one axis, over which each batch is sharded.

The same code runs on eight GPUs, the cores of a CPU, and the devices of several processes. With
oneDNN, which uses all cores, the CPU is one device; without it, every core is a device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.config import DeviceConfig, DistributedConfig
from cnnjax.errors import InputError, first_line
from cnnjax.machine import processes, programs
from cnnjax.machine.host import cache_folder, cpu_cores, keep_freed_memory
from cnnjax.ops import ffi, onednn

AXIS = "batch"


def make_mesh(config: DeviceConfig, distributed: DistributedConfig | None = None) -> Mesh:
    """Returns the mesh of the run's devices, with one axis, `batch`.

    Call it before JAX is first used: after that, the CPU can no longer be split into devices, and
    other processes can no longer be joined.

    Args:
        config: which devices, and how many.
        distributed: the processes to join, whose devices become part of the mesh; None for the
            devices of this process only.

    Raises:
        InputError: the platform does not exist here or has too few devices, or the other processes
            cannot be joined.
    """
    if distributed is not None:
        processes.join(distributed)
    several = distributed is not None and jax.distributed.is_initialized()
    keep_compiled_programs()
    keep_freed_memory()
    if not _cpu_devices_chosen():
        # JAX raises an error if it is already in use, as in a notebook; then use the existing
        # devices.
        with contextlib.suppress(RuntimeError):
            devices = config.count or (1 if onednn.library() else cpu_cores())
            jax.config.update("jax_num_cpu_devices", devices)
    if config.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        name = None if config.platform == "auto" else config.platform
        found = jax.devices(name) if several else jax.local_devices(backend=name)
    except Exception as error:
        if config.platform == "auto":
            raise InputError(
                f"JAX finds no device ({first_line(error)}); check JAX_PLATFORMS"
            ) from None
        hint = "" if config.platform == "tpu" else ' with pip install "cnnjax[cuda13]"'
        raise InputError(
            f"--device.platform {config.platform}: JAX finds no such device; drop the flag,"
            f" or install JAX for it{hint} ({first_line(error)})"
        ) from None
    if config.count > len(found):
        name = found[0].platform
        raise InputError(
            f"--device.count {config.count}: there are only {len(found)} {name} devices"
        )
    return _spread(found, config.count or len(found), "--device.count", config.count)


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh of the devices of this process."""
    return Mesh(np.array(mesh.local_devices), mesh.axis_names) if mesh.is_multi_process else mesh


def _spread(found: Sequence[Any], count: int, flag: str, value: int) -> Mesh:
    """Returns a mesh of `count` devices, equally many of each process and in the processes' order.

    Raises:
        InputError: the devices cannot be spread evenly; the message names `flag` and its `value`.
    """
    of_each: dict[int, list[Any]] = {}
    for device in found:
        of_each.setdefault(device.process_index, []).append(device)
    some, left = divmod(count, len(of_each))
    if left or not some or some > min(map(len, of_each.values())):
        raise InputError(
            f"{flag} {value} cannot be spread evenly over {len(of_each)} processes; choose a"
            " multiple of that number"
        )
    return Mesh(np.array([d for i in sorted(of_each) for d in of_each[i][:some]]), (AXIS,))


def _cpu_devices_chosen() -> bool:
    """Returns whether JAX or XLA has been told how many devices to make of the CPU."""
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return forced or jax.config.values["jax_num_cpu_devices"] > 0


def keep_compiled_programs() -> None:
    """Makes JAX cache compiled programs in the user's cache folder.

    A folder chosen through JAX's own settings stays in use. Compiled programs are executable code,
    so only this user can access the folder.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # without a writable home, each run compiles again
    programs.keep_in(folder)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that copies an array to each device."""
    return NamedSharding(mesh, PartitionSpec())


def divided(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array's first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def parts_of(tree: Any, mesh: Mesh) -> Any:
    """Returns shardings of each array over all devices.

    The sharded axis is the longest one that the number of devices divides; an array without such an
    axis is replicated.

    Args:
        tree: arrays, or their shapes.
        mesh: the devices.
    """

    def part(x: Any) -> NamedSharding:
        even = [axis for axis, length in enumerate(x.shape) if length and length % mesh.size == 0]
        if not even:
            return replicated(mesh)
        longest = max(even, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))

    return jax.tree.map(part, tree)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host arrays, which are equal on all processes, on the devices of a mesh.

    Args:
        tree: NumPy arrays; of a memory-mapped array, a process reads only the part for its devices.
        sharding: sharding of each array.
    """
    if not sharding.mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def each(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(each(jax.random.key_data(x)))
        x = x if isinstance(x, np.ndarray) else np.asarray(x, jax.dtypes.result_type(x))
        return jax.make_array_from_callback(x.shape, sharding, lambda at: np.asarray(x[at]))

    return jax.tree.map(each, tree)


def platform(mesh: Mesh) -> str:
    """Returns `cpu`, `gpu` or `tpu`."""
    name: str = mesh.devices.flat[0].platform
    return name


@dataclass(frozen=True)
class Traits:
    """Settings that depend on the kind of device; see `traits`."""

    precision: Literal["float32", "bfloat16"]
    """The meaning of `--train.precision auto`."""
    evaluated: int
    """Number of images of up to `LARGEST` pixels per side in one step of an evaluation. More images
    do not fit into the cache of a CPU core; on an accelerator, a smaller step takes less time than
    its call from Python (not measured)."""
    framed: int
    """Number of images in one batch of the lung finder."""
    steps: int
    """Number of train steps in one call. On an accelerator, a step of a small network takes less
    time than its call from Python. On a CPU it takes longer, and XLA's convolutions are slow in
    loops."""
    once: dict[str, Any] = field(default_factory=dict)
    """`compiler_options` of `jax.jit` for a program that runs once: on a CPU, optimizing the
    generation of random numbers takes LLVM longer than generating them."""

    def evaluated_at(self, side: int) -> int:
        """Returns the number of images of side x side pixels in one step of an evaluation."""
        return max(1, self.evaluated * LARGEST**2 // max(LARGEST, side) ** 2)


LARGEST = 128
"""Largest side, in pixels, of images that are evaluated `Traits.evaluated` at a time: the feature
maps of all of them must fit in memory."""

_ACCELERATOR = Traits("bfloat16", evaluated=1024, framed=1024, steps=16)
TRAITS = {
    "cpu": Traits(
        "float32", evaluated=64, framed=64, steps=1, once={"xla_backend_optimization_level": 1}
    ),
    "gpu": _ACCELERATOR,
    "tpu": _ACCELERATOR,
}


def traits(mesh: Mesh) -> Traits:
    """Returns the settings for the kind of device in the mesh."""
    return TRAITS[platform(mesh)]


def dividing(mesh: Mesh, batch: int, flag: str = "--train.batch") -> Mesh:
    """Returns the mesh of the largest number of devices that divides the batch into equal parts.

    Raises:
        InputError: the processes of the mesh cannot have equal parts.
    """
    several = len({d.process_index for d in mesh.devices.flat})
    sizes = range(several, min(mesh.size, batch) + 1, several)
    count = max((n for n in sizes if batch % n == 0), default=0)
    return mesh if count == mesh.size else _spread(list(mesh.devices.flat), count, flag, batch)


def full_float32(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Uses full float32 precision for matrix products traced inside the block.

    See `TrainConfig.precision`. By default XLA rounds both factors on accelerators: to 11 bits on
    an NVIDIA GPU (TF32), to 8 bits on a TPU (bfloat16).
    """
    if platform(mesh) == "cpu":
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = jax.default_matmul_precision("highest")
    return context


def describe(mesh: Mesh) -> str:
    """Returns a phrase such as `1 x cpu (2 cores, oneDNN)`."""
    several = len({d.process_index for d in mesh.devices.flat})
    among = f", of {several} processes" if several > 1 else ""
    return _described(mesh) + among


def _described(mesh: Mesh) -> str:
    first = mesh.devices.flat[0]
    if platform(mesh) == "cpu":
        kernels = ", oneDNN" if ffi.available() else ""
        return f"{mesh.size} x cpu ({cpu_cores()} cores{kernels})"
    return f"{mesh.size} x {first.platform} ({first.device_kind})"
