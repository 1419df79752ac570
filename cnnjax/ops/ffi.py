"""oneDNN's convolutions as foreign function calls in XLA programs, on one CPU device.

XLA calls a foreign function with the address of a call frame, which describes the arrays
(https://docs.jax.dev/en/latest/ffi.html; `xla/ffi/api/c_api.h` in jaxlib). The function here is a
Python function: it needs the interpreter lock, and adds 8 microseconds to each convolution
(measured on a Sapphire Rapids Xeon). Programs with such calls can be stored in JAX's compilation
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
_PLACES = "places"  # the only array that does not have the dtype of the call


@functools.cache
def available() -> bool:
    """Returns whether this process computes on one CPU device and oneDNN works on it.

    With several devices oneDNN is not used, because XLA cannot shard the calls over devices.
    """
    if onednn.library() is None or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    return _works()


def takes(dtype: Any) -> bool:
    """Returns whether oneDNN supports a dtype on this CPU."""
    return bool(dtype == jnp.float32) or (dtype == jnp.bfloat16 and onednn.has_bfloat16())


def convolution(x: jax.Array, kernel: jax.Array, pads: onednn.Pads, stride: int) -> jax.Array:
    """Returns the cross-correlation of images with filters; JAX cannot differentiate it.

    Args:
        x: float32 or bfloat16 [batch, height, width, in].
        kernel: [kernel height, kernel width, in, out], of the dtype of x.
        pads: number of zero rows (above, below) and zero columns (left, right).
        stride: stride of the filters in both directions, in pixels.

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
    """Returns the maxima of the 2x2 squares of a `convolution`, and their positions.

    NaN is ignored; the maximum of a square of only NaN or -inf is the lowest finite float32.

    Args:
        x: see `convolution`.
        kernel: see `convolution`.
        pads: see `convolution`.
        stride: see `convolution`.

    Returns:
        The maxima, float32 [batch, height' // 2, width' // 2, out], and the positions in the
        squares, uint8 of the same shape, for `gradients`.
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
    """Returns the gradients with respect to images and filters of a (pooled) `convolution`.

    Both are computed in one call, which keeps g in the caches of the cores.

    Args:
        x: see `convolution`.
        kernel: see `convolution`.
        g: gradient with respect to the result of `convolution`, or to the maxima of
            `pooled_convolution`; of the dtype of x.
        pads: see `convolution`.
        stride: see `convolution`.
        places: the positions that `pooled_convolution` returned; None without a pool.
        wanted: names of the gradients to compute; the other one is None.

    Returns:
        The gradients (gx, gkernel), float32, of the shapes of x and kernel.

    Raises:
        TypeError: the arrays differ in dtype, or the shapes of g and places do not fit.
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
            raise TypeError(
                f"g and places have shapes {g.shape} and {places.shape}, which do not fit pooled"
                f" maps of shape {maps}"
            )
    shapes = {"gx": x.shape, "gkernel": kernel.shape}
    results = {name: shapes[name] for name in wanted}
    sizes = x.shape, kernel.shape, maps
    found = dict(zip(results, _call(given, results, *sizes, stride, pads), strict=True))
    return found.get("gx"), found.get("gkernel")


def maps_of(
    x: jax.Array, kernel: jax.Array, pads: onednn.Pads, stride: int
) -> tuple[int, int, int, int]:
    """Returns the shape of the result of `convolution`."""
    sides = zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)
    height, width = ((side + sum(pad) - window) // stride + 1 for side, pad, window in sides)
    return x.shape[0], height, width, kernel.shape[3]


def _call(
    given: Mapping[str, jax.Array], results: Mapping[Any, tuple[int, ...]], *sizes: Any
) -> Sequence[jax.Array]:
    """Calls `onednn.Call`; its roles are the names of the arrays."""
    dtype, *others = (array.dtype for name, array in given.items() if name != _PLACES)
    for other in others:
        if other != dtype:
            raise TypeError(
                f"a convolution needs arrays of the same dtype, got {dtype} and {other}"
            )
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
    """Handles a call from XLA; returns None, or the address of an XLA error."""
    try:
        _keep_thread()
        _serve(frame.contents)
        return None
    except BaseException as error:
        message = f"oneDNN: {str(error) or type(error).__name__}".encode()
        failure = _Failure(ctypes.sizeof(_Failure), None, message, _INTERNAL)
        address: int = frame.contents.api.contents.create_error(ctypes.byref(failure))
        if isinstance(error, KeyboardInterrupt):
            # XLA only knows errors, and this function must return to XLA. The interrupt is sent to
            # the main thread again a little later, after XLA has returned.
            passed_on = threading.main_thread().ident, signal.SIGINT
            timer = threading.Timer(0.1, signal.pthread_kill, passed_on)
            timer.daemon = True
            timer.start()
        return address


_thread_local = threading.local()


def _keep_thread() -> None:
    """Registers XLA's thread with Python permanently; registration at each call would be slow."""
    if not hasattr(_thread_local, "known"):
        _thread_local.known = ctypes.pythonapi.PyGILState_Ensure()  # never released


def _serve(frame: _CallFrame) -> None:
    if frame.extension and frame.extension.contents.type == _METADATA:
        # XLA asks for the version of the interface that this code supports. The answer is XLA's own
        # version: within a major version, structures only grow at their ends.
        version = frame.extension.contents.metadata.contents.version
        runtime = frame.api.contents.version
        if runtime.major != 0:
            raise RuntimeError(f"XLA's FFI has the unsupported major version {runtime.major}")
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


# One call uses all cores, and a primitive holds the addresses of one call.
_one_at_a_time = threading.Lock()


@functools.cache
def _computation(text: bytes) -> tuple[list[str], onednn.Call]:
    """Returns the names of a call's arrays and its kernels, cached by shapes and dtype."""
    roles, *sizes = json.loads(text)
    return roles, onednn.Call(roles, *sizes)


@functools.cache
def _register() -> None:
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_handler), platform="cpu")
    atexit.register(_finish)


def _finish() -> None:
    """Waits for running XLA programs at exit: without Python, their calls would hang forever."""
    with contextlib.suppress(Exception):
        jax.block_until_ready(jax.live_arrays())
        # Programs whose results were dropped finish before a program that is started later.
        jax.block_until_ready(_all_three(*_example()))


_PADS, _STRIDE = ((1, 0), (0, 1)), 2


def _example() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns example images, filters and a gradient with respect to the maps."""
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
    """Returns whether the results of all three calls agree with XLA's own convolution."""

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (_STRIDE, _STRIDE), _PADS, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    try:
        with jax.ensure_compile_time_eval():  # works while a program is traced
            x, kernel, g = _example()
            y, pull = jax.vjp(plain, x, kernel)
            pairs = zip(_all_three(x, kernel, g), (y, *pull(g)), strict=True)
            return all(bool(jnp.allclose(a, b, rtol=1e-4, atol=1e-3)) for a, b in pairs)
    except Exception as error:
        warnings.warn(f"oneDNN is not used, as it failed: {error}", RuntimeWarning, stacklevel=2)
        return False
