"""Convolution, and convolution with max-pool, by the C API of oneDNN on an x86 CPU.

XLA's own convolution on a CPU is Eigen's; its gradients are several times slower than oneDNN's
(https://uxlfoundation.github.io/oneDNN). The package onednn-cpu-gomp provides the library on Linux,
with OpenMP threads from the system's libgomp. `cnnjax.ops.ffi` makes these functions callable from
XLA.

Images are NHWC and filters HWIO in memory. A primitive is oneDNN's term for a kernel that is
compiled for given sizes. It is made once per process and uses the fastest memory layout of the
filters.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib import metadata
from typing import Any, Literal, NamedTuple

PACKAGE = "onednn-cpu-gomp"

Pads = tuple[tuple[int, int], tuple[int, int]]
Kind = Literal["forward", "input gradient", "filter gradient"]

# From oneDNN's dnnl_types.h and dnnl_common_types.h, version 3.
_CPU, _IN_ORDER, _DIRECT, _TRAINING, _ANY = 1, 1, 1, 64, 1
_TYPES = {"bfloat16": 2, "float32": 3, "uint8": 6}
_MAX = 0x1FF  # the max-pool algorithm
_SRC, _DST, _WEIGHTS, _WORKSPACE, _SCRATCHPAD = 1, 17, 33, 64, 80
_DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS = 129, 145, 161
_WEIGHTS_MD, _DIFF_WEIGHTS_MD, _WORKSPACE_MD, _SCRATCHPAD_MD = 131, 132, 135, 136
_USER = 1  # scratchpad mode: memory of the user
_AVX2, _AVX512 = 0x7, 0x27  # the latter is AVX-512 with the BW, VL and DQ extensions
_ALLOCATE = c_void_p(2**64 - 1)  # as an address: oneDNN allocates the memory
_Dims = c_int64 * 12

_BYTES = {"bfloat16": 2, "float32": 4}

# OpenMP starts this number of threads for each calling thread of XLA. Small networks gain nothing
# from more.
_THREADS = 16

# Bytes of maps per thread that are computed before they are pooled: few enough to stay in the cache
# of a core.
_PIECE = 2**20

# The arrays of each kind of convolution, with oneDNN's numbers; the last array is the result.
_ROLES: dict[Kind, dict[str, int]] = {
    "forward": {"x": _SRC, "kernel": _WEIGHTS, "y": _DST},
    "input gradient": {"g": _DIFF_DST, "kernel": _WEIGHTS, "gx": _DIFF_SRC},
    "filter gradient": {"x": _SRC, "g": _DIFF_DST, "gkernel": _DIFF_WEIGHTS},
}


class Convolution(NamedTuple):
    """Dtype, shapes, stride and padding of a convolution.

    Attributes:
        dtype: dtype of the input arrays, float32 or bfloat16; results are float32.
        images: shape [batch, height, width, in].
        filters: shape [kernel height, kernel width, in, out].
        maps: shape [batch, height', width', out] of the result.
        stride: stride of the filters in both directions, in pixels.
        pads: number of zero rows (above, below) and zero columns (left, right).
    """

    dtype: str
    images: tuple[int, ...]
    filters: tuple[int, ...]
    maps: tuple[int, ...]
    stride: int
    pads: Pads

    def of(self, count: int) -> Convolution:
        """Returns the same convolution for another number of images."""
        return self._replace(images=(count, *self.images[1:]), maps=(count, *self.maps[1:]))


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the oneDNN library, or None if it is missing, fails to load, or the CPU lacks AVX2.

    It is also None if the environment variable CNNJAX_ONEDNN is 0.
    """
    if (
        os.environ.get("CNNJAX_ONEDNN") == "0"
        or not sys.platform.startswith("linux")
        or platform.machine() != "x86_64"
    ):
        return None
    try:
        files = metadata.files(PACKAGE) or []
        paths = [str(file.locate()) for file in files if file.name == "libdnnl.so.3"]
        with _staying_awake():
            found = ctypes.CDLL(paths[0]) if paths else None
    except (metadata.PackageNotFoundError, OSError):
        return None
    return found if found and found.dnnl_get_effective_cpu_isa() & _AVX2 == _AVX2 else None


@contextlib.contextmanager
def _staying_awake() -> Iterator[None]:
    """Makes libgomp's threads spin longer before they sleep, if it is loaded in this block.

    Each calling thread of XLA has its own OpenMP threads. If libgomp counts more threads than
    cores, they spin only a hundred times by default, which is shorter than the time between two
    calls. The other waits keep their defaults
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
    """
    wanted = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}
    if wanted.keys() & os.environ.keys():  # settings of the user have priority
        yield
        return
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)


def has_bfloat16() -> bool:
    """Returns whether this CPU has AVX-512, which oneDNN's bfloat16 kernels need."""
    found = library()
    return found is not None and found.dnnl_get_effective_cpu_isa() & _AVX512 == _AVX512


def pooled_sizes(maps: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns the shape of maps [batch, height, width, channels] after a 2x2 pool."""
    batch, height, width, channels = maps
    return batch, height // 2, width // 2, channels


class Call:
    """A convolution or its gradients, with or without a max-pool, as a sequence of kernels.

    The pool takes squares of 2x2; a last odd row or column is dropped. The maps between convolution
    and pool would be the largest arrays of the network. They are never stored whole: both
    operations are applied to a few images at a time, in memory that stays in the cores' caches.
    """

    def __init__(self, roles: Sequence[str], *sizes: Any) -> None:
        """Creates the kernels.

        Args:
            roles: names of the arrays. Inputs are x (images), kernel (filters) and g (gradient with
                respect to the maps); results are y (maps), gx and gkernel (gradients). With a pool,
                y and g belong to the maxima, and there is an array `places` of bytes: the position
                of each maximum among its four pixels.
            sizes: the fields of `Convolution`; its maps are those before a pool.

        Raises:
            RuntimeError: oneDNN has no kernels for these sizes.
        """
        whole = Convolution(*sizes)
        batch, pieces = whole.images[0], 1
        self._arrays: list[tuple[c_void_p, str, int]] = []  # (memory, role, offset in bytes)
        self._kernels: list[_Kernel] = []
        self._filters: dict[tuple[Kind, int], c_void_p] = {}  # in the fastest layout
        self._between: c_void_p | None = None  # address of the maps before a pool
        if "places" in roles:
            threads = min(_THREADS, _openmp().omp_get_max_threads())
            of_image = math.prod(whole.maps[1:]) * _BYTES["float32"]
            pieces = min(batch, -(-batch * of_image // (threads * _PIECE)))
            most = _described((-(-batch // pieces) * of_image,), "uint8", (0,))
            self._between = _address(_memory(most, _ALLOCATE))
        edges = [batch * i // pieces for i in range(pieces + 1)]
        kinds = [kind for kind, arrays in _ROLES.items() if [*arrays][-1] in roles]
        with _at_most(_THREADS):
            for start, stop in itertools.pairwise(edges):
                part = whole.of(stop - start)
                if self._between and "y" not in roles:
                    self._pool("g", part, start)
                for kind in kinds:
                    self._convolve(kind, part, start)
                if self._between and "y" in roles:
                    self._pool("y", part, start)

    def __call__(self, addresses: Mapping[str, int]) -> None:
        """Runs the kernels on arrays in memory. Must not be called by two threads at once.

        Args:
            addresses: the address of each array, by role.

        Raises:
            RuntimeError: oneDNN failed.
        """
        # All addresses are set before the first kernel: between two kernels, OpenMP's threads stay
        # awake for microseconds only.
        handle = _api().dnnl_memory_set_data_handle
        for memory, role, offset in self._arrays:
            _check("dnnl_memory_set_data_handle", handle(memory, addresses[role] + offset))
        for kernel in self._kernels:
            kernel()

    def _array(self, role: str, description: c_void_p, offset: int = 0) -> c_void_p:
        """Returns a memory object for an array; each call sets its address."""
        memory = _memory(description, None)
        self._arrays.append((memory, role, offset))
        return memory

    def _images(self, role: str, sizes: Sequence[int], dtype: str, start: int) -> c_void_p:
        """Returns a memory object for a part of images or maps, starting at image `start`."""
        offset = start * math.prod(sizes[1:]) * _BYTES[dtype]
        return self._array(role, _channels_last(sizes, dtype), offset)

    def _convolve(self, kind: Kind, part: Convolution, start: int) -> None:
        """Adds the kernels of the convolution for a part of the images."""
        kernel = _convolution(kind, part)
        *_, result = _ROLES[kind]
        arguments = []
        for role, number in _ROLES[kind].items():
            dtype = "float32" if role == result else part.dtype
            if role in ("kernel", "gkernel"):
                memory = self._ordered(kind, part, kernel)
            elif role in ("x", "gx"):
                memory = self._images(role, part.images, dtype, start)
            elif self._between:
                memory = _memory(_channels_last(part.maps, dtype), self._between)
            else:
                memory = self._images(role, part.maps, dtype, start)
            arguments.append((number, memory))
        self._kernels.append(_Kernel(kernel, arguments))
        if kind == "filter gradient":
            ours = _filters(part, "float32")
            found = self._array(result, ours)
            ordered = self._filters[kind, part.images[0]]
            theirs = _queried(kernel, _DIFF_WEIGHTS_MD)
            self._kernels.append(_reorder(theirs, ordered, ours, found, add=start > 0))

    def _ordered(self, kind: Kind, part: Convolution, kernel: c_void_p) -> c_void_p:
        """Returns memory for the filters in a kernel's layout; input filters are copied to it."""
        key = kind, part.images[0]
        if key not in self._filters:
            gradient = kind == "filter gradient"
            theirs = _queried(kernel, _DIFF_WEIGHTS_MD if gradient else _WEIGHTS_MD)
            self._filters[key] = _memory(theirs, _ALLOCATE)
            if not gradient:
                ours = _filters(part, part.dtype)
                given = self._array("kernel", ours)
                self._kernels.append(_reorder(ours, given, theirs, self._filters[key]))
        return self._filters[key]

    def _pool(self, role: str, part: Convolution, start: int) -> None:
        """Adds the pool of a part of the maps (role y), or the gradient of the pool (role g)."""
        forward = role == "y"
        dtype = "float32" if forward else part.dtype
        pooled = pooled_sizes(part.maps)
        sides = _channels_last(part.maps, dtype), _channels_last(pooled, dtype)
        geometry = (_Dims(2, 2), _Dims(2, 2), _Dims(), _Dims(), _Dims())
        kernel = _new(
            "dnnl_pooling_forward_primitive_desc_create",
            _engine(), _TRAINING, _MAX, *sides, *geometry, _attributes(),
        )  # fmt: skip
        if not forward:
            kernel = _new(
                "dnnl_pooling_backward_primitive_desc_create",
                _engine(), _MAX, *sides, *geometry, kernel, _attributes(),
            )  # fmt: skip
        theirs = _queried(kernel, _WORKSPACE_MD)
        size = _api().dnnl_memory_desc_get_size(theirs)
        if size != math.prod(pooled):
            raise RuntimeError(
                f"the workspace of {math.prod(pooled)} maxima has {size} bytes, expected one each"
            )
        places = self._array("places", theirs, start * math.prod(pooled[1:]))
        numbers = (_SRC, _DST) if forward else (_DIFF_SRC, _DIFF_DST)
        whole, less = _memory(sides[0], self._between), self._images(role, pooled, dtype, start)
        arguments = zip((*numbers, _WORKSPACE), (whole, less, places), strict=True)
        self._kernels.append(_Kernel(kernel, arguments))


class _Argument(ctypes.Structure):
    _fields_ = (("role", c_int), ("memory", c_void_p))


class _Kernel:
    """A primitive with its arguments."""

    def __init__(self, description: c_void_p, arguments: Iterable[tuple[int, c_void_p]]) -> None:
        self._primitive = _new("dnnl_primitive_create", description)
        found = [_Argument(role, memory) for role, memory in arguments]
        scratch = _queried(description, _SCRATCHPAD_MD)
        found.append(_Argument(_SCRATCHPAD, _memory(scratch, _ALLOCATE)))
        self._arguments = (_Argument * len(found))(*found)

    def __call__(self) -> None:
        name = "dnnl_primitive_execute"
        number, arguments = len(self._arguments), self._arguments
        _check(name, _api().dnnl_primitive_execute(self._primitive, _stream(), number, arguments))


def _convolution(kind: Kind, sizes: Convolution) -> c_void_p:
    """Returns the description of a kernel."""
    given, stride = sizes.dtype, sizes.stride
    height, width, channels, features = sizes.filters
    (top, bottom), (left, right) = sizes.pads
    geometry = (_Dims(stride, stride), _Dims(), _Dims(top, left), _Dims(bottom, right))

    def filters(dtype: str) -> c_void_p:
        return _described((features, channels, height, width), dtype, None)

    # The kernels of the gradients need a forward convolution of the same inputs as a hint.
    forward = _new(
        "dnnl_convolution_forward_primitive_desc_create",
        _engine(), _TRAINING, _DIRECT, _channels_last(sizes.images, given), filters(given), None,
        _channels_last(sizes.maps, "float32" if kind == "forward" else given), *geometry,
        _attributes(),
    )  # fmt: skip
    if kind == "input gradient":
        return _new(
            "dnnl_convolution_backward_data_primitive_desc_create",
            _engine(), _DIRECT, _channels_last(sizes.images, "float32"), filters(given),
            _channels_last(sizes.maps, given), *geometry, forward, _attributes(),
        )  # fmt: skip
    if kind == "filter gradient":
        return _new(
            "dnnl_convolution_backward_weights_primitive_desc_create",
            _engine(), _DIRECT, _channels_last(sizes.images, given), filters("float32"), None,
            _channels_last(sizes.maps, given), *geometry, forward, _attributes(),
        )  # fmt: skip
    return forward


def _reorder(
    before: c_void_p, given: c_void_p, after: c_void_p, result: c_void_p, *, add: bool = False
) -> _Kernel:
    """Returns the kernel that copies filters to another layout, or adds them to the result."""
    with _at_most(1):  # filters are small: waking a second thread would take longer
        description = _new(
            "dnnl_reorder_primitive_desc_create",
            before, _engine(), after, _engine(), _attributes(add=add),
        )  # fmt: skip
        return _Kernel(description, ((_SRC, given), (_DST, result)))


@functools.cache
def _api() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError(f"the package {PACKAGE} is not installed or not usable")
    found.dnnl_primitive_desc_query_md.restype = c_void_p
    found.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
    found.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
    found.dnnl_memory_desc_get_size.restype = c_size_t
    found.dnnl_post_ops_append_sum.argtypes = (c_void_p, c_float, c_int, c_int)
    found.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, POINTER(_Argument))
    return found


@functools.cache
def _engine() -> c_void_p:
    return _new("dnnl_engine_create", _CPU, c_size_t(0))


@functools.cache
def _attributes(*, add: bool = False) -> c_void_p:
    """Returns attributes of a primitive: scratch memory is provided by the caller.

    oneDNN's own scratch memory may belong to the calling thread.

    Args:
        add: whether the result is added to the existing values.
    """
    created = _new("dnnl_primitive_attr_create")
    name = "dnnl_primitive_attr_set_scratchpad_mode"
    _check(name, _api().dnnl_primitive_attr_set_scratchpad_mode(created, _USER))
    if add:
        after, same_type = _new("dnnl_post_ops_create"), 0
        name = "dnnl_post_ops_append_sum"
        _check(name, _api().dnnl_post_ops_append_sum(after, 1.0, 0, same_type))
        name = "dnnl_primitive_attr_set_post_ops"
        _check(name, _api().dnnl_primitive_attr_set_post_ops(created, after))
    return created


@functools.cache
def _stream() -> c_void_p:
    return _new("dnnl_stream_create", _engine(), _IN_ORDER)


def _described(sizes: Sequence[int], dtype: str, order: Sequence[int] | None) -> c_void_p:
    """Returns the description of an array.

    Args:
        sizes: size of each axis.
        dtype: `float32`, `bfloat16` or `uint8`.
        order: the axes, from the outermost to the innermost in memory; None lets oneDNN choose.
    """
    number, dims = len(sizes), _Dims(*sizes)
    if order is None:
        name = "dnnl_memory_desc_create_with_tag"
        return _new(name, number, dims, _TYPES[dtype], _ANY)
    strides, step = _Dims(), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= sizes[axis]
    return _new("dnnl_memory_desc_create_with_strides", number, dims, _TYPES[dtype], strides)


def _filters(sizes: Convolution, dtype: str) -> c_void_p:
    """Returns the description of filters [height, width, in, out]."""
    height, width, channels, features = sizes.filters
    return _described((features, channels, height, width), dtype, (2, 3, 1, 0))


def _channels_last(sizes: Sequence[int], dtype: str) -> c_void_p:
    """Returns the description of images or maps [batch, height, width, channels]."""
    batch, height, width, channels = sizes
    return _described((batch, channels, height, width), dtype, (0, 2, 3, 1))


def _memory(description: c_void_p, address: c_void_p | None) -> c_void_p:
    return _new("dnnl_memory_create", description, _engine(), address)


def _address(memory: c_void_p) -> c_void_p:
    """Returns the address of a memory object."""
    found = c_void_p()
    name = "dnnl_memory_get_data_handle"
    _check(name, _api().dnnl_memory_get_data_handle(memory, byref(found)))
    return found


def _queried(kernel: c_void_p, what: int) -> c_void_p:
    """Returns the description of an array that a kernel expects."""
    return c_void_p(_api().dnnl_primitive_desc_query_md(kernel, what, 0))


def _new(name: str, *arguments: Any) -> c_void_p:
    """Calls a function that creates an object; the object is never freed."""
    created = c_void_p()
    _check(name, getattr(_api(), name)(byref(created), *arguments))
    return created


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


@contextlib.contextmanager
def _at_most(threads: int) -> Iterator[None]:
    """Limits the number of threads of the kernels that are created in this block."""
    before = _openmp().omp_get_max_threads()
    _openmp().omp_set_num_threads(min(threads, before))
    try:
        yield
    finally:
        _openmp().omp_set_num_threads(before)


@functools.cache
def _openmp() -> ctypes.CDLL:
    return ctypes.CDLL("libgomp.so.1")
