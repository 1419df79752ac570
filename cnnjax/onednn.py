"""oneDNN's convolutions on an x86 CPU, by its C API.

XLA's own convolution on a CPU is Eigen's, and its gradients are several times slower than oneDNN's
(https://uxlfoundation.github.io/oneDNN). The package onednn-cpu-gomp brings that library, on Linux,
and OpenMP's threads come from the system's libgomp. `cnnjax.ffi` lets XLA call what is here.

Images are NHWC and filters HWIO in memory. A primitive, in oneDNN's words, is a kernel made for
given sizes; it is found once a process and keeps the filters' order in memory that is fastest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_void_p
from importlib import metadata
from typing import Any, Literal, NamedTuple

PACKAGE = "onednn-cpu-gomp"

Pads = tuple[tuple[int, int], tuple[int, int]]
Kind = Literal["forward", "input gradient", "filter gradient"]

# From oneDNN's dnnl_types.h and dnnl_common_types.h, version 3.
_CPU, _IN_ORDER, _DIRECT, _TRAINING, _ANY = 1, 1, 1, 64, 1
_TYPES = {"bfloat16": 2, "float32": 3}
_SRC, _DST, _WEIGHTS, _SCRATCHPAD = 1, 17, 33, 80
_DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS = 129, 145, 161
_WEIGHTS_MD, _DIFF_WEIGHTS_MD, _SCRATCHPAD_MD = 131, 132, 136
_USER = 1  # whose scratchpad
_AVX2, _AVX512 = 0x7, 0x27  # the latter with its instructions for bytes, words and short vectors
_ALLOCATE = 2**64 - 1  # in place of an address: memory of oneDNN's own
_Dims = c_int64 * 12

# OpenMP starts so many for each of XLA's threads that calls; small networks have no use for more.
_THREADS = 16


class Convolution(NamedTuple):
    """A convolution or one of its gradients, with all that a kernel is made for.

    Attributes:
        kind: `forward` maps images and filters to feature maps; `input gradient` the maps' gradient
            and the filters to the images'; `filter gradient` images and the maps' gradient to the
            filters'.
        dtype: of the two arrays that are given, float32 or bfloat16; the result is float32.
        images: [batch, height, width, in].
        filters: [kernel height, kernel width, in, out].
        maps: [batch, height', width', out].
        stride: step of the filters in both directions, in pixels.
        pads: rows of zeros (above, below) and columns of zeros (left, right).
    """

    kind: Kind
    dtype: str
    images: tuple[int, ...]
    filters: tuple[int, ...]
    maps: tuple[int, ...]
    stride: int
    pads: Pads


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the library; None where it is not installed, does not load, or finds no AVX2."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
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
    """Has libgomp, if it is loaded in the block, spin longer before its threads sleep.

    Where it counts more threads than cores, as each of XLA's that calls has its own, they spin a
    hundred times by default: too short to bridge the time between two calls. Other waits stay as
    they are by default (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
    """
    wanted = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}
    if wanted.keys() & os.environ.keys():  # the user's own
        yield
        return
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)


def has_bfloat16() -> bool:
    """Tells whether this CPU has AVX-512, without which oneDNN has no kernels for bfloat16."""
    found = library()
    return found is not None and found.dnnl_get_effective_cpu_isa() & _AVX512 == _AVX512


class Primitive:
    """The kernels of a convolution: itself, and one that puts its filters in order.

    Raises:
        RuntimeError: oneDNN has no such kernel.
    """

    def __init__(self, convolution: Convolution) -> None:
        with _at_most(_THREADS):
            self._make(convolution)

    def _make(self, convolution: Convolution) -> None:
        kind, given, stride = convolution.kind, convolution.dtype, convolution.stride
        height, width, channels, features = convolution.filters
        filters = (features, channels, height, width)
        (top, bottom), (left, right) = convolution.pads
        geometry = (_Dims(stride, stride), _Dims(), _Dims(top, left), _Dims(bottom, right))

        def dtype_where(is_result: bool) -> str:
            return "float32" if is_result else given

        of_images = dtype_where(kind == "input gradient")
        of_filters = dtype_where(kind == "filter gradient")
        of_maps = dtype_where(kind == "forward")
        images = _channels_last(convolution.images, of_images)
        maps = _channels_last(convolution.maps, of_maps)
        ours = _described(filters, of_filters, (2, 3, 1, 0))
        any_order = _described(filters, of_filters, None)
        # The gradients' kernels want that of a convolution of given arrays for a hint.
        forward = _new(
            "dnnl_convolution_forward_primitive_desc_create",
            _engine(), _TRAINING, _DIRECT, _channels_last(convolution.images, given),
            _described(filters, given, None), None, maps, *geometry, _attributes(),
        )  # fmt: skip
        if kind == "forward":
            kernel = forward
            roles, sides = (_SRC, _WEIGHTS, _DST), (images, ours, maps)
        elif kind == "input gradient":
            kernel = _new(
                "dnnl_convolution_backward_data_primitive_desc_create",
                _engine(), _DIRECT, images, any_order, maps, *geometry, forward,
                _attributes(),
            )  # fmt: skip
            roles, sides = (_DIFF_DST, _WEIGHTS, _DIFF_SRC), (maps, ours, images)
        else:
            kernel = _new(
                "dnnl_convolution_backward_weights_primitive_desc_create",
                _engine(), _DIRECT, images, any_order, None, maps, *geometry, forward,
                _attributes(),
            )  # fmt: skip
            roles, sides = (_SRC, _DIFF_DST, _DIFF_WEIGHTS), (images, maps, ours)
        self._sides = [_memory(side, None) for side in sides]
        is_result = kind == "filter gradient"
        at = 2 if is_result else 1  # which of the three are the filters
        query = _api().dnnl_primitive_desc_query_md
        theirs = c_void_p(query(kernel, _DIFF_WEIGHTS_MD if is_result else _WEIGHTS_MD, 0))
        inner = _memory(theirs, _ALLOCATE)
        own = [inner if i == at else side for i, side in enumerate(self._sides)]
        main = _Kernel(kernel, zip(roles, own, strict=True))
        ends = (inner, self._sides[at]) if is_result else (self._sides[at], inner)
        orders = (theirs, ours) if is_result else (ours, theirs)
        with _at_most(1):  # filters are small: waking a second thread takes longer
            reorder = _Kernel(
                _new(
                    "dnnl_reorder_primitive_desc_create",
                    orders[0], _engine(), orders[1], _engine(), _attributes(),
                ),
                zip((_SRC, _DST), ends, strict=True),
            )  # fmt: skip
        self._kernels = (main, reorder) if is_result else (reorder, main)

    def __call__(self, first: int, second: int, result: int) -> None:
        """Computes, from two arrays to a third, given by their addresses.

        Not to be called by two threads at once.

        Raises:
            RuntimeError: oneDNN failed.
        """
        handle = _api().dnnl_memory_set_data_handle
        for memory, address in zip(self._sides, (first, second, result), strict=True):
            _check("dnnl_memory_set_data_handle", handle(memory, address))
        for kernel in self._kernels:
            kernel()


class _Argument(ctypes.Structure):
    _fields_ = (("role", c_int), ("memory", c_void_p))


class _Kernel:
    """A primitive with its arguments."""

    def __init__(self, description: c_void_p, arguments: Any) -> None:
        self._primitive = _new("dnnl_primitive_create", description)
        found = [_Argument(role, memory) for role, memory in arguments]
        scratch = _api().dnnl_primitive_desc_query_md(description, _SCRATCHPAD_MD, 0)
        found.append(_Argument(_SCRATCHPAD, _memory(c_void_p(scratch), _ALLOCATE)))
        self._arguments = (_Argument * len(found))(*found)

    def __call__(self) -> None:
        name = "dnnl_primitive_execute"
        number, arguments = len(self._arguments), self._arguments
        _check(name, _api().dnnl_primitive_execute(self._primitive, _stream(), number, arguments))


@functools.cache
def _api() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError(f"no {PACKAGE} here")
    found.dnnl_primitive_desc_query_md.restype = c_void_p
    found.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
    found.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
    found.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, POINTER(_Argument))
    return found


@functools.cache
def _engine() -> c_void_p:
    return _new("dnnl_engine_create", _CPU, c_size_t(0))


@functools.cache
def _attributes() -> c_void_p:
    """Returns the wish for scratch memory of our own; oneDNN's may be of the thread that calls."""
    created = _new("dnnl_primitive_attr_create")
    name = "dnnl_primitive_attr_set_scratchpad_mode"
    _check(name, _api().dnnl_primitive_attr_set_scratchpad_mode(created, _USER))
    return created


@functools.cache
def _stream() -> c_void_p:
    return _new("dnnl_stream_create", _engine(), _IN_ORDER)


def _described(sizes: Sequence[int], dtype: str, order: Sequence[int] | None) -> c_void_p:
    """Returns the description of an array: its axes from the outermost in memory; None for any."""
    number, dims = len(sizes), _Dims(*sizes)
    if order is None:
        name = "dnnl_memory_desc_create_with_tag"
        return _new(name, number, dims, _TYPES[dtype], _ANY)
    strides, step = _Dims(), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= sizes[axis]
    return _new("dnnl_memory_desc_create_with_strides", number, dims, _TYPES[dtype], strides)


def _channels_last(sizes: Sequence[int], dtype: str) -> c_void_p:
    """Returns the description of images or maps [batch, height, width, channels]."""
    batch, height, width, channels = sizes
    return _described((batch, channels, height, width), dtype, (0, 2, 3, 1))


def _memory(description: c_void_p, address: int | None) -> c_void_p:
    return _new("dnnl_memory_create", description, _engine(), c_void_p(address))


def _new(name: str, *arguments: Any) -> c_void_p:
    """Calls a function that creates something; kept as long as the process lives."""
    created = c_void_p()
    _check(name, getattr(_api(), name)(byref(created), *arguments))
    return created


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


@contextlib.contextmanager
def _at_most(threads: int) -> Iterator[None]:
    """Limits the threads of the kernels that are made in the block."""
    before = _openmp().omp_get_max_threads()
    _openmp().omp_set_num_threads(min(threads, before))
    try:
        yield
    finally:
        _openmp().omp_set_num_threads(before)


@functools.cache
def _openmp() -> ctypes.CDLL:
    return ctypes.CDLL("libgomp.so.1")
