"""Each NumPy layer against central differences, and against JAX's gradient of the same layer.

A case is one layer with drawn arguments, written three times: forward and backward as we have them,
and as functions that JAX differentiates, ours from `cnnjax` and the plain ones of `lax` and Flax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import cnnjax.ops.layers
from cnnjax import objectives
from cnnjax.scratch import layers, losses

# In units of the norm of what is expected. A bfloat16 has 8 bits of fraction; both sides start from
# the same rounded inputs, and JAX rounds its intermediate and final results once more.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Case:
    """One layer with drawn arguments."""

    arrays: tuple[np.ndarray, ...]
    """What gradients are taken by, in float64."""
    forward: Callable[..., tuple[np.ndarray, Any]]
    """(*arrays) -> (y, cache)."""
    backward: Callable[[np.ndarray, Any], tuple[np.ndarray, ...]]
    """(dy, cache) -> a gradient for each array."""
    jax_forms: tuple[Callable[..., jax.Array], ...]
    """(*arrays) -> y, each to mean the same."""


def one(backward: Callable[..., np.ndarray]) -> Callable[..., tuple[np.ndarray]]:
    """Returns the gradient as a tuple, where a layer has only one."""
    return lambda dy, cache: (backward(dy, cache),)


def assert_close(found: Any, expected: Any, tolerance: float, least: float = 1e-3) -> None:
    """Asserts that the difference is small in norm, relative to that of what is expected.

    Args:
        found: an array.
        expected: an array.
        tolerance: the largest relative error.
        least: what errors are relative to where the expected array is smaller. A gradient may be a
            sum that cancels to (nearly) nothing, and leaves the rounding of what was summed.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), least)
    assert error <= tolerance, f"relative error {error:.1e}"


def normal(seed: int, *shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape) for shape in shapes)


seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 3)
pairs = st.tuples(sizes, sizes)


@st.composite
def conv(draw: st.DrawFn) -> Case:
    window, stride = draw(pairs), draw(st.one_of(sizes, pairs))
    padding = draw(st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(pairs, pairs)))
    height, width = (draw(st.integers(k, 6)) for k in window)
    n, c, o = draw(sizes), draw(sizes), draw(sizes)
    arrays = normal(draw(seeds), (n, height, width, c), (*window, c, o))

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        strides = (stride, stride) if isinstance(stride, int) else stride
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return cnnjax.ops.layers.conv(x, kernel, stride=stride, padding=padding)

    both = isinstance(stride, int) and isinstance(padding, str)
    return Case(
        arrays,
        lambda x, kernel: layers.conv_forward(x, kernel, stride=stride, padding=padding),
        layers.conv_backward,
        (plain, ours) if both else (plain,),
    )


@st.composite
def our_conv(draw: st.DrawFn) -> Case:
    """The convolutions that the networks are made of."""
    size, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
    padding = draw(st.sampled_from(["SAME", "VALID"]))
    height, width = draw(st.integers(3, 9)), draw(st.integers(3, 9))
    c, o = draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([1, 4]))
    arrays = normal(draw(seeds), (2, height, width, c), (size, size, c, o))
    return Case(
        arrays,
        lambda x, kernel: layers.conv_forward(x, kernel, stride=stride, padding=padding),
        layers.conv_backward,
        (lambda x, kernel: cnnjax.ops.layers.conv(x, kernel, stride=stride, padding=padding),),
    )


@st.composite
def pool(draw: st.DrawFn, maximum: bool) -> Case:
    size = draw(st.one_of(sizes, pairs))
    window = (size, size) if isinstance(size, int) else size
    stride = draw(st.one_of(st.none(), sizes, pairs))
    height, width = (draw(st.integers(k, 7)) for k in window)
    (x,) = normal(draw(seeds), (draw(sizes), height, width, draw(sizes)))
    strides = window if stride is None else (stride, stride) if isinstance(stride, int) else stride

    def plain(x: jax.Array) -> jax.Array:
        window4, strides4 = (1, *window, 1), (1, *strides, 1)
        if maximum:
            return lax.reduce_window(x, -jnp.inf, lax.max, window4, strides4, "VALID")
        total = lax.reduce_window(x, 0.0, lax.add, window4, strides4, "VALID")
        return total / math.prod(window)

    forward = layers.max_pool_forward if maximum else layers.average_pool_forward
    backward = layers.max_pool_backward if maximum else layers.average_pool_backward
    return Case((x,), lambda x: forward(x, size=size, stride=stride), one(backward), (plain,))


@st.composite
def our_max_pool(draw: st.DrawFn) -> Case:
    (x,) = normal(draw(seeds), (2, draw(st.integers(2, 7)), draw(st.integers(2, 7)), 3))
    return Case(
        (x,),
        layers.max_pool_forward,
        one(layers.max_pool_backward),
        (cnnjax.ops.layers.max_pool,),
    )


@st.composite
def batch_norm(draw: st.DrawFn, train: bool) -> Case:
    n, c = draw(st.integers(3, 5)), draw(sizes)
    shape = draw(st.sampled_from([(n, 2, 3, c), (n, 4, 1, c), (3 * n, c)]))
    seed = draw(seeds)
    x, scale, bias, mean, var = normal(seed, shape, (c,), (c,), (c,), (c,))
    x, var = 2 * x + bias, np.exp(var)

    def forward(*arrays: np.ndarray) -> tuple[np.ndarray, Any]:
        running = (mean.astype(arrays[0].dtype), var.astype(arrays[0].dtype))
        y, _, cache = layers.batch_norm_forward(*arrays, *running, train=train)
        return y, cache

    def flax(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return flax_norm(x, scale, bias, mean, var, train)[0]

    return Case((x, scale, bias), forward, layers.batch_norm_backward, (flax,))


def flax_norm(
    x: Any, scale: Any, bias: Any, mean: Any, var: Any, train: bool
) -> tuple[jax.Array, Any]:
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=x.dtype)
    running = {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(var, jnp.float32)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": running}
    with jax.numpy_dtype_promotion("standard"):
        y, changed = norm.apply(variables, x, mutable=["batch_stats"])
    return y, changed["batch_stats"]


@st.composite
def dense(draw: st.DrawFn) -> Case:
    n, c, o = draw(sizes), draw(sizes), draw(sizes)
    return Case(
        normal(draw(seeds), (n, c), (c, o), (o,)),
        layers.dense_forward,
        layers.dense_backward,
        (lambda x, kernel, bias: x @ kernel + bias,),
    )


@st.composite
def simple(draw: st.DrawFn, name: str) -> Case:
    """The layers without parameters."""
    seed = draw(seeds)
    x, branch = normal(seed, *2 * [(draw(sizes), draw(sizes), draw(sizes), draw(sizes))])
    keep = np.random.default_rng(seed).random(x.shape) < 0.7
    return {
        "relu": Case((x,), layers.relu_forward, one(layers.relu_backward), (jax.nn.relu,)),
        "flatten": Case(
            (x,),
            layers.flatten_forward,
            one(layers.flatten_backward),
            (lambda x: x.reshape(x.shape[0], -1),),
        ),
        "global average pool": Case(
            (x,),
            layers.global_average_pool_forward,
            one(layers.global_average_pool_backward),
            (lambda x: x.mean((1, 2)),),
        ),
        "residual": Case(
            (x, branch),
            lambda x, branch: (layers.residual_forward(x, branch), None),
            lambda dy, _: layers.residual_backward(dy),
            (lambda x, branch: x + branch,),
        ),
        "bias": Case(
            (x, branch[0, 0, 0]),
            lambda x, bias: (layers.bias_forward(x, bias), None),
            lambda dy, _: layers.bias_backward(dy),
            (lambda x, bias: x + bias,),
        ),
        "dropout": Case(
            (x,),
            lambda x: layers.dropout_forward(x, 0.3, keep),
            one(layers.dropout_backward),
            (lambda x: jnp.where(keep, x / 0.7, 0),),
        ),
    }[name]


@st.composite
def cross_entropy(draw: st.DrawFn) -> Case:
    (logits,) = normal(draw(seeds), (draw(st.integers(1, 8)),))
    labels = np.random.default_rng(draw(seeds)).integers(0, 2, logits.shape).astype(np.int32)
    weights = (draw(st.floats(0.2, 5)), draw(st.floats(0.2, 5)))
    smoothing = draw(st.floats(0, 0.5))

    def ours(logits: jax.Array) -> jax.Array:
        # The networks return float32 whatever they compute in.
        each = objectives.weights_of(jnp.asarray(labels), weights)
        return objectives.cross_entropy(logits.astype(jnp.float32), labels, each, smoothing)

    return Case(
        (5 * logits,),
        lambda z: losses.cross_entropy_forward(z, labels, weights, smoothing),
        one(losses.cross_entropy_backward),
        (ours,),
    )


LAYERS: dict[str, st.SearchStrategy[Case]] = {
    "conv": conv(),
    "our conv": our_conv(),
    "max pool": pool(True),
    "our max pool": our_max_pool(),
    "average pool": pool(False),
    "batch norm in training": batch_norm(True),
}
# What takes no window and no statistics needs fewer examples, each of which XLA has to compile.
SIMPLE: dict[str, st.SearchStrategy[Case]] = {
    "batch norm in evaluation": batch_norm(False),
    "dense": dense(),
    "cross-entropy": cross_entropy(),
    **{
        name: simple(name)
        for name in ("relu", "flatten", "global average pool", "residual", "bias", "dropout")
    },
}


def check_central_differences(case: Case) -> None:
    """Asserts that each gradient of L = sum(y dy) is the central difference, element by element.

    It is that of fourth order, (8 (L(x + h) - L(x - h)) - (L(x + 2h) - L(x - 2h))) / 12h.
    """
    y, cache = case.forward(*case.arrays)
    (dy,) = normal(0, y.shape)
    gradients = case.backward(dy, cache)
    assert len(gradients) == len(case.arrays)
    h = 1e-4  # truncation h^4 and rounding 1e-16 / h both stay below 1e-11
    for k, gradient in enumerate(gradients):
        expected = np.zeros_like(case.arrays[k])
        for place in np.ndindex(expected.shape):
            for step, weight in ((h, 8), (-h, -8), (2 * h, -1), (-2 * h, 1)):
                moved = [array.copy() for array in case.arrays]
                moved[k][place] += step
                expected[place] += weight * (case.forward(*moved)[0] * dy).sum() / (12 * h)
        assert gradient.dtype == np.float64
        assert_close(gradient, expected, 1e-6)


def check_jax(case: Case, dtype: str) -> None:
    """Asserts that y and each gradient are those that JAX finds, through jit."""
    # NumPy's conversions: JAX would compile one for each shape.
    rounded = [array.astype(np.float32).astype(jnp.dtype(dtype)) for array in case.arrays]
    arrays = [np.asarray(array, np.float32) for array in rounded]
    before = [array.copy() for array in arrays]
    y, cache = case.forward(*arrays)
    for form in case.jax_forms:
        y_jax = jax.eval_shape(form, *rounded)
        dy = normal(0, y.shape)[0].astype(np.float32).astype(y_jax.dtype)

        @jax.jit
        def both(dy: jax.Array, *arrays: jax.Array, form: Any = form) -> Any:
            y, pull = jax.vjp(form, *arrays)
            return y, pull(dy)

        y_jax, expected = both(dy, *rounded)
        assert_close(y, y_jax, TOLERANCE[dtype])
        delta = np.asarray(dy, np.float32)
        least = float(np.linalg.norm(delta))
        found = case.backward(delta, cache)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == np.float32
            assert_close(mine, theirs, TOLERANCE[dtype], least)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("layer", LAYERS | SIMPLE)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_backward_is_the_central_difference(layer: str, data: st.DataObject) -> None:
    check_central_differences(data.draw((LAYERS | SIMPLE)[layer]))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_forward_and_backward_are_those_of_jax(layer: str, dtype: str, data: st.DataObject) -> None:
    check_jax(data.draw(LAYERS[layer]), dtype)


@pytest.mark.parametrize("layer", SIMPLE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(data=st.data())
def test_simple_layers_are_those_of_jax(layer: str, dtype: str, data: st.DataObject) -> None:
    check_jax(data.draw(SIMPLE[layer]), dtype)


def test_a_planted_error_is_caught() -> None:
    """Each wrong gradient is one that a careless derivation would give."""
    x, kernel = normal(0, (2, 5, 5, 2), (3, 3, 2, 3))
    right = Case(
        (x, kernel),
        layers.conv_forward,
        layers.conv_backward,
        (cnnjax.ops.layers.conv,),
    )

    def turned(dy: np.ndarray, cache: Any) -> tuple[np.ndarray, np.ndarray]:
        dx, dkernel = layers.conv_backward(dy, cache)
        return dx, dkernel[::-1, ::-1]

    def edge_forgotten(dy: np.ndarray, cache: Any) -> tuple[np.ndarray, np.ndarray]:
        dx, dkernel = layers.conv_backward(dy, cache)
        edge = np.zeros_like(dx[:, -1:])
        return np.concatenate([dx[:, :-1], edge], axis=1), dkernel

    check_central_differences(right)
    check_jax(right, "float32")
    for wrong in (turned, edge_forgotten):
        planted = replace(right, backward=wrong)
        with pytest.raises(AssertionError, match="relative error"):
            check_central_differences(planted)
        with pytest.raises(AssertionError, match="relative error"):
            check_jax(planted, "float32")


@pytest.mark.parametrize("overlap", [False, True])
def test_of_several_maxima_the_first_in_row_order_gets_the_gradient(overlap: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (3, 7, 8, 2)).astype(np.float32)
    stride = 1 if overlap else 2
    y, cache = layers.max_pool_forward(x, size=2, stride=stride)
    # Whole numbers, so that overlapping windows may add up in any order.
    dy = rng.integers(-9, 9, y.shape).astype(np.float32)
    found = layers.max_pool_backward(dy, cache)
    plain = jax.jit(lambda x: nn.max_pool(x, (2, 2), (stride, stride)))
    np.testing.assert_array_equal(found, jax.vjp(plain, x)[1](dy)[0])
    if not overlap:
        np.testing.assert_array_equal(found, jax.vjp(cnnjax.ops.layers.max_pool, x)[1](dy)[0])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=seeds)
def test_running_statistics_are_those_of_flax(seed: int) -> None:
    shapes = [(6, 3, 2, 4), (4,), (4,), (4,), (4,)]
    x, scale, bias, mean, var = (a.astype(np.float32) for a in normal(seed, *shapes))
    var = np.exp(var)
    _, found, _ = layers.batch_norm_forward(x, scale, bias, mean, var, train=True)
    _, expected = flax_norm(x, scale, bias, mean, var, True)
    assert_close(found[0], expected["mean"], 1e-5)
    assert_close(found[1], expected["var"], 1e-5)
    assert found[0].dtype == found[1].dtype == np.float32
    _, same, _ = layers.batch_norm_forward(x, scale, bias, mean, var, train=False)
    assert same[0] is mean
    assert same[1] is var


def test_dropout_keeps_the_mean() -> None:
    x = np.full((100, 100), 3.0, np.float32)
    y, _ = layers.dropout_forward(x, 0.25, np.random.default_rng(0))
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.02)
    assert y.mean() == pytest.approx(3, abs=0.1)
    np.testing.assert_allclose(y[y > 0], 4, rtol=1e-6)
    again, _ = layers.dropout_forward(x, 0.25, np.random.default_rng(0))
    np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_is_stable(dtype: type) -> None:
    logits = np.array([-1e4, 1e4, 1e4, 0.0, 20.0, -20.0], dtype)
    labels = np.array([0, 1, 0, 1, 1, 1])
    found, cache = losses.cross_entropy_forward(logits, labels, (1.0, 2.0))
    small = np.log1p(np.exp(-20.0))
    expected = [0, 0, 1e4, 2 * np.log(2), 2 * small, 2 * (20 + small)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    dlogits = losses.cross_entropy_backward(np.ones_like(logits), cache)
    p = 1 / (1 + np.exp(-20.0))
    q = np.exp(-20.0) / (1 + np.exp(-20.0))
    np.testing.assert_allclose(dlogits, [0, 0, 1, -1, -2 * q, -2 * p], rtol=1e-6)
    assert found.dtype == dlogits.dtype == dtype


x4, x2, kernel4 = np.zeros((2, 8, 8, 3)), np.zeros((2, 5)), np.zeros((3, 3, 3, 4))
ones3 = np.ones(3)
BAD = {
    "images without channels": (
        lambda: layers.conv_forward(np.zeros((2, 8, 8)), kernel4),
        r"expected x of shape \[batch, height, width, channels\], got \[2, 8, 8\]",
    ),
    "kernel of other channels": (
        lambda: layers.conv_forward(x4, np.zeros((3, 3, 4, 8))),
        r"expected kernel of shape \[kernel height, kernel width, 3, out\]"
        r" for x of shape \[2, 8, 8, 3\], got \[3, 3, 4, 8\]",
    ),
    "window larger than the image": (
        lambda: layers.conv_forward(x4, np.zeros((9, 3, 3, 4)), padding="VALID"),
        r"at least as large as the window \[9, 3\], got \[2, 8, 8, 3\]",
    ),
    "negative padding": (
        lambda: layers.conv_forward(x4, kernel4, padding=((0, -1), (0, 0))),
        r"expected padding .* got \(\(0, -1\), \(0, 0\)\)",
    ),
    "stride of zero": (lambda: layers.conv_forward(x4, kernel4, stride=0), r"got 0"),
    "gradient of another shape": (
        lambda: layers.conv_backward(np.zeros((2, 6, 6, 4)), layers.conv_forward(x4, kernel4)[1]),
        r"expected dy of shape \[2, 8, 8, 4\] .*, got \[2, 6, 6, 4\]",
    ),
    "pool larger than the image": (
        lambda: layers.max_pool_forward(x4, size=(2, 9)),
        r"window \[2, 9\], got \[2, 8, 8, 3\]",
    ),
    "pool's gradient": (
        lambda: layers.max_pool_backward(x4, layers.max_pool_forward(x4)[1]),
        r"expected dy of shape \[2, 4, 4, 3\] .*, got \[2, 8, 8, 3\]",
    ),
    "dense kernel": (
        lambda: layers.dense_forward(x2, np.zeros((4, 1)), np.zeros(1)),
        r"expected kernel of shape \[5, out\] for x of shape \[2, 5\], got \[4, 1\]",
    ),
    "dense bias, which would broadcast": (
        lambda: layers.dense_forward(x2, np.zeros((5, 4)), np.zeros(1)),
        r"expected bias of shape \[4\] .*, got \[1\]",
    ),
    "bias": (lambda: layers.bias_forward(x4, np.zeros(8)), r"shape \[3\] .*, got \[8\]"),
    "batch norm's scale": (
        lambda: layers.batch_norm_forward(x4, np.ones(1), *3 * [ones3], train=True),
        r"expected scale of shape \[3\] for x of shape \[2, 8, 8, 3\], got \[1\]",
    ),
    "residual": (
        lambda: layers.residual_forward(x4, np.zeros((2, 1, 1, 3))),
        r"expected branch of shape \[2, 8, 8, 3\] .*, got \[2, 1, 1, 3\]",
    ),
    "dropout's mask": (
        lambda: layers.dropout_forward(x2, 0.5, np.ones(5, bool)),
        r"expected keep of shape \[2, 5\] like x, got \[5\]",
    ),
    "dropout's rate": (
        lambda: layers.dropout_forward(x2, 1.0, np.ones((2, 5), bool)),
        r"in \[0, 1\), got 1.0",
    ),
    "labels": (
        lambda: losses.cross_entropy_forward(np.zeros(3), np.zeros((3, 1), int)),
        r"expected labels of shape \[3\] like the logits, got \[3, 1\]",
    ),
    "logits": (
        lambda: losses.cross_entropy_forward(np.zeros((3, 1)), np.zeros(3, int)),
        r"expected logits of shape \[batch\], got \[3, 1\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=list(BAD))
def test_shapes_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
