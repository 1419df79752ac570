"""oneDNN's convolutions as calls that XLA makes from within its programs, on one CPU device.

XLA calls a foreign function with the address of a call frame, which names the arrays
(https://docs.jax.dev/en/latest/ffi.html; `xla/ffi/api/c_api.h` in jaxlib). The function here is
Python's: it waits for the interpreter's lock, and takes 8 microseconds beside the convolution
(measured on a Sapphire Rapids Xeon). Programs with such calls can be kept in JAX's compilation
cache.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import signal
import threading
import warnings
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.ops import onednn

_TARGET = "cnnjax_convolution"
_PLACES = "places"  # the one array that is not of numbers


@functools.cache
def available() -> bool:
    """Tells whether this process computes on one CPU device whose programs can call oneDNN.

    XLA would not divide the calls among several devices.
    """
    if onednn.library() is None or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    return _works()


def takes(dtype: Any) -> bool:
    """Tells whether oneDNN computes in a type here."""
    return bool(dtype == jnp.float32) or (dtype == jnp.bfloat16 and onednn.has_bfloat16())


def convolution(x: jax.Array, kernel: jax.Array, pads: onednn.Pads, stride: int) -> jax.Array:
    """Returns the cross-correlation of images with filters; no gradients of its own.

    Args:
        x: float32 or bfloat16 [batch, height, width, in].
        kernel: [kernel height, kernel width, in, out], of x's dtype.
        pads: rows of zeros (above, below) and columns of zeros (left, right).
        stride: step of the filters in both directions, in pixels.

    Returns:
        float32 [batch, height', width', out].
    """
    maps = maps_of(x, kernel, pads, stride)
    sizes = x.shape, kernel.shape, maps
    (y,) = _call({"x": x, "kernel": kernel}, {"y": maps}, *sizes, stride, pads)
    return y


def pooled_convolution(
    x: jax.Array, kernel: jax.Array, pads: onednn.Pads, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima of the 2x2 squares of a `convolution`, and of which pixel each is.

    Of a square of nothing but NaN or -inf, the maximum is the least float32 there is; else a NaN is
    passed over.

    Returns:
        float32 [batch, height' // 2, width' // 2, out], and as many bytes, for the gradients.
    """
    maps = maps_of(x, kernel, pads, stride)
    pooled = onednn.pooled_sizes(maps)
    sizes = x.shape, kernel.shape, maps
    results = {"y": pooled, _PLACES: pooled}
    y, places = _call({"x": x, "kernel": kernel}, results, *sizes, stride, pads)
    return y, places


def gradients(
    x: jax.Array,
    kernel: jax.Array,
    g: jax.Array,
    pads: onednn.Pads,
    stride: int,
    places: jax.Array | None = None,
    *,
    wanted: Sequence[Literal["gx", "gkernel"]] = ("gx", "gkernel"),
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns those of `convolution` by images and by filters, from that by its result.

    In one call: with another program's threads in between, g would leave the cores' caches.

    Args:
        x: as `convolution` has it.
        kernel: likewise.
        g: gradient by what `convolution` returned, or `pooled_convolution`; of x's dtype.
        pads: as `convolution` has them.
        stride: likewise.
        places: what `pooled_convolution` returned beside that.
        wanted: which of the two to compute; the other is None.

    Returns:
        float32, of the shapes of x and of the kernel.
    """
    maps = g.shape
    given = {"x": x, "kernel": kernel, "g": g}
    if "gx" not in wanted:
        del given["kernel"]
    if "gkernel" not in wanted:
        del given["x"]
    if places is not None:
        maps, given = maps_of(x, kernel, pads, stride), given | {_PLACES: places}
        if not g.shape == places.shape == onednn.pooled_sizes(maps):
            raise TypeError(f"{maps} do not pool to {g.shape} and {places.shape}")
    shapes = {"gx": x.shape, "gkernel": kernel.shape}
    results = {name: shapes[name] for name in wanted}
    sizes = x.shape, kernel.shape, maps
    found = dict(zip(results, _call(given, results, *sizes, stride, pads), strict=True))
    return found.get("gx"), found.get("gkernel")


def maps_of(
    x: jax.Array, kernel: jax.Array, pads: onednn.Pads, stride: int
) -> tuple[int, int, int, int]:
    """Returns the shape of what `convolution` returns."""
    sides = zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)
    height, width = ((side + sum(pad) - window) // stride + 1 for side, pad, window in sides)
    return x.shape[0], height, width, kernel.shape[3]


def _call(
    given: Mapping[str, jax.Array], results: Mapping[Any, tuple[int, ...]], *sizes: Any
) -> Sequence[jax.Array]:
    """Calls `onednn.Call`, whose roles are the names of the arrays."""
    dtype, *others = (array.dtype for name, array in given.items() if name != _PLACES)
    for other in others:
        if other != dtype:
            raise TypeError(f"a convolution needs arrays of one type, got {dtype} and {other}")
    _register()
    like = [
        jax.ShapeDtypeStruct(shape, jnp.uint8 if name == _PLACES else jnp.float32)
        for name, shape in results.items()
    ]
    call = jax.ffi.ffi_call(_TARGET, like, vmap_method="sequential")
    text = json.dumps(((*given, *results), dtype.name, *sizes))
    found: Sequence[jax.Array] = call(*given.values(), call=text)
    return found


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", c_void_p),
    )


class _Buffers(ctypes.Structure):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("buffers", POINTER(POINTER(_Buffer))),
    )


class _Text(ctypes.Structure):
    _fields_ = (("start", c_void_p), ("length", c_size_t))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("texts", POINTER(POINTER(_Text))),
    )


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("major", c_int),
        ("minor", c_int),
    )


class _Metadata(ctypes.Structure):
    """The beginning of XLA_FFI_Metadata."""

    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    )


class _Failure(ctypes.Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("message", c_char_p),
        ("code", c_int),
    )


class _Api(ctypes.Structure):
    """The beginning of XLA_FFI_Api."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_Failure))),
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_METADATA, _INTERNAL = 1, 13  # of XLA_FFI_Extension_Type and XLA_FFI_Error_Code


@ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))
def _handler(frame: Any) -> int | None:
    """Serves XLA: returns None, or the address of an error of XLA's."""
    try:
        _keep_thread()
        _serve(frame.contents)
        return None
    except BaseException as error:
        message = f"oneDNN: {str(error) or type(error).__name__}".encode()
        failure = _Failure(ctypes.sizeof(_Failure), None, message, _INTERNAL)
        address: int = frame.contents.api.contents.create_error(ctypes.byref(failure))
        if isinstance(error, KeyboardInterrupt):
            # XLA knows errors alone; whom it was for hears of it a little later, once XLA has
            # returned: here it would end this function without an answer to XLA.
            passed_on = threading.main_thread().ident, signal.SIGINT
            timer = threading.Timer(0.1, signal.pthread_kill, passed_on)
            timer.daemon = True
            timer.start()
        return address


_thread_local = threading.local()


def _keep_thread() -> None:
    """Lets Python know XLA's thread for good; making it known takes as long as all else here."""
    if not hasattr(_thread_local, "known"):
        _thread_local.known = ctypes.pythonapi.PyGILState_Ensure()  # never released


def _serve(frame: _CallFrame) -> None:
    if frame.extension and frame.extension.contents.type == _METADATA:
        # XLA asks which version of the interface this is made for: its own, since within a major
        # version structures only grow at their ends.
        version = frame.extension.contents.metadata.contents.version
        runtime = frame.api.contents.version
        if runtime.major != 0:
            raise RuntimeError(f"XLA's interface has version {runtime.major}")
        version.major, version.minor = runtime.major, runtime.minor
        return
    text = frame.attributes.texts[0].contents
    addresses = [
        side.buffers[i].contents.data
        for side in (frame.arguments, frame.results)
        for i in range(side.size)
    ]
    with _one_at_a_time:
        roles, compute = _computation(ctypes.string_at(text.start, text.length))
        compute(dict(zip(roles, addresses, strict=True)))


# One call uses all cores; and a primitive holds the addresses of one call.
_one_at_a_time = threading.Lock()


@functools.cache
def _computation(text: bytes) -> tuple[list[str], onednn.Call]:
    """Returns the names of a call's arrays and its kernels; kept, for each size that there is."""
    roles, *sizes = json.loads(text)
    return roles, onednn.Call(roles, *sizes)


@functools.cache
def _register() -> None:
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_handler), platform="cpu")
    atexit.register(_finish)


def _finish() -> None:
    """Waits for what XLA still computes: once Python ends, it would wait for Python forever."""
    with contextlib.suppress(Exception):
        jax.block_until_ready(jax.live_arrays())
        # What has no name any more is done before what the same thread asks for later.
        jax.block_until_ready(_all_three(*_example()))


_PADS, _STRIDE = ((1, 0), (0, 1)), 2


def _example() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns images, filters and a gradient of the maps."""
    rng = np.random.default_rng(0)
    shapes = (2, 6, 5, 4), (3, 3, 4, 8), (2, 3, 2, 8)
    x, kernel, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return x, kernel, g


@jax.jit
def _all_three(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    y = convolution(x, kernel, _PADS, _STRIDE)
    gx, gkernel = gradients(x, kernel, g, _PADS, _STRIDE)
    assert gx is not None
    assert gkernel is not None
    return y, gx, gkernel


def _works() -> bool:
    """Compares what all three calls give with XLA's own convolution."""

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (_STRIDE, _STRIDE), _PADS, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    try:
        with jax.ensure_compile_time_eval():  # also when asked while a program is traced
            x, kernel, g = _example()
            y, pull = jax.vjp(plain, x, kernel)
            pairs = zip(_all_three(x, kernel, g), (y, *pull(g)), strict=True)
            return all(bool(jnp.allclose(a, b, rtol=1e-4, atol=1e-3)) for a, b in pairs)
    except Exception as error:
        warnings.warn(f"oneDNN does not serve here: {error}", RuntimeWarning, stacklevel=2)
        return False
