"""The forms that XLA likes mean the same as the plain ones."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.cli import guarded
from cnnjax.ops import ffi, layers, onednn


def plain_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), (2, 2))  # lax.reduce_window


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 9, 2), (3, 2, 3, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool(shape: tuple[int, ...], dtype: jnp.dtype, ties: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, shape) if ties else rng.normal(size=shape)
    x = jnp.asarray(x, dtype)
    y, pull = jax.vjp(jax.jit(layers.max_pool), x)
    y_plain, pull_plain = jax.vjp(jax.jit(plain_pool), x)
    np.testing.assert_array_equal(y, y_plain)
    g = jnp.asarray(rng.normal(size=y.shape), dtype)
    np.testing.assert_array_equal(pull(g)[0], pull_plain(g)[0])
    on_tpu, pull_on_tpu = jax.vjp(jax.jit(layers.max_pool_plain), x)
    np.testing.assert_array_equal(y, on_tpu)
    np.testing.assert_array_equal(pull(g)[0], pull_on_tpu(g)[0])


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_is_a_cross_correlation(padding: layers.Padding, stride: int) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(3, 3, 3, 4))
    found = layers.conv(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
        stride=stride,
        padding=padding,
    )
    if padding == "SAME":  # TensorFlow's rule: with stride 2 on an even size, all below and right
        before = 0 if stride == 2 else 1
        x = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    expected = np.einsum("nhwcij,ijco->nhwo", windows[:, ::stride, ::stride], kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)


needs_onednn = pytest.mark.skipif(
    onednn.library() is None, reason="onednn-cpu-gomp and libgomp are on Linux and x86 only"
)


@needs_onednn
def test_the_environment_turns_onednn_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNJAX_ONEDNN", "0")
    assert onednn.library.__wrapped__() is None


@needs_onednn
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("window", "channels", "size"),
    [
        ((1, 1), 16, (3, 4)),
        ((3, 3), 1, (3, 4)),
        ((3, 3), 16, (3, 4)),
        ((5, 3), 16, (3, 4)),
        ((3, 3), 1, (40, 41)),
        ((5, 3), 16, (40, 41)),
    ],
)
def test_onednn_is_the_plain_convolution(
    padding: layers.Padding,
    stride: int,
    window: tuple[int, int],
    channels: int,
    size: tuple[int, int],
) -> None:
    rng = np.random.default_rng(0)
    height, width = (side * stride + 3 for side in size)
    x = jnp.asarray(rng.normal(size=(3, height, width, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*window, channels, 5)), jnp.float32)

    def differentiated(form: Any) -> Any:
        def pulled(x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
            y, pull = jax.vjp(lambda x, k: form(x, k, stride, padding), x, kernel)
            return y, pull(g)

        return jax.jit(pulled)

    shape = jax.eval_shape(lambda: layers.conv_plain(x, kernel, stride, padding)).shape
    g = jnp.asarray(rng.normal(size=shape), jnp.float32)
    y, gradients = differentiated(layers.conv_onednn)(x, kernel, g)
    y_plain, expected = differentiated(layers.conv_plain)(x, kernel, g)
    np.testing.assert_allclose(y, y_plain, atol=1e-4)
    for gradient, plain in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, plain, rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("side", "stride"), [(8, 2), (9, 2), (9, 3), (11, 3)])
def test_filters_of_one_pixel_see_every_second_or_third(
    padding: layers.Padding, side: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffi, "available", lambda: True)  # though there are several devices
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, side, side + 1, 16)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(1, 1, 16, 5)), jnp.float32)

    def pulled(form: Any) -> Any:
        y, pull = jax.vjp(form, x, kernel)
        return y, *pull(jnp.cos(y))

    ours = jax.jit(functools.partial(layers.conv, stride=stride, padding=padding))
    assert "cnnjax_convolution" in ours.lower(x, kernel).as_text()
    plain = functools.partial(layers.conv_plain, stride=stride, padding=padding)
    for found, expected in zip(pulled(ours), pulled(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("form", [layers.conv, layers.conv_pool])
@pytest.mark.parametrize("channels", [1, 4])
def test_bfloat16_does_not_round_images_of_one_channel(
    form: Any, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffi, "available", lambda: True)  # though there are several devices
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 64, 64, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, 16)), jnp.float32)
    exact, found = (
        form(x, kernel, dtype=dtype).astype(jnp.float32) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert bool((exact == found).all()) == (channels == 1)
    np.testing.assert_allclose(found, exact, atol=0.2)


@needs_onednn
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize(("images", "pieces"), [(1, 1), (7, 1), (7, 3)])
def test_onednn_is_the_plain_convolution_with_a_pool(
    padding: layers.Padding,
    channels: int,
    images: int,
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of whole numbers, so that many maxima are ties and every sum is exact."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, (images, 12, 11 + pieces, channels)), jnp.float32)
    kernel = jnp.asarray(rng.integers(-1, 2, (3, 3, channels, 5)), jnp.float32)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return plain_pool(layers.conv_plain(x, kernel, 1, padding))

    def pulled(form: Any, g: jax.Array) -> Any:
        y, pull = jax.vjp(form, x, kernel)
        return y, *pull(g)

    maps = layers.conv_plain(x, kernel, 1, padding)
    threads = min(onednn._THREADS, onednn._openmp().omp_get_max_threads())
    monkeypatch.setattr(onednn, "_PIECE", -(-maps.nbytes // (threads * pieces)))
    g = jnp.asarray(rng.integers(-3, 4, plain(x, kernel).shape), jnp.float32)
    form = functools.partial(layers.conv_onednn, stride=1, padding=padding, pooled=True)
    for found, expected in zip(pulled(jax.jit(form), g), pulled(plain, g), strict=True):
        np.testing.assert_array_equal(found, expected)


@needs_onednn
def test_large_maps_are_pooled_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "available", lambda: True)  # though there are several devices
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 64, 64, 1)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 16)), jnp.float32)
    pooled = jax.jit(lambda x, kernel: layers.conv_pool(x, kernel))
    assert "places" in pooled.lower(x, kernel).as_text()
    expected = plain_pool(layers.conv_plain(x, kernel, 1, "SAME"))
    np.testing.assert_allclose(pooled(x, kernel), expected, atol=1e-4)
    few = jax.jit(lambda x, kernel: layers.conv_pool(x, kernel))
    assert "places" not in few.lower(x[:2], kernel).as_text()
    np.testing.assert_allclose(few(x[:2], kernel), expected[:2], atol=1e-4)


@needs_onednn
def test_a_pool_of_nothing_but_nan_is_nan() -> None:
    """oneDNN passes over NaN: a run that diverges would look as if it went on."""
    x, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8)).at[0, 0, 0, 5].set(jnp.nan)
    y = layers.conv_onednn(x, kernel, 1, "VALID", pooled=True)
    np.testing.assert_array_equal(jnp.isnan(y).any((0, 1, 2)), np.arange(8) == 5)
    np.testing.assert_array_equal(jnp.isnan(y).all((0, 1, 2)), np.arange(8) == 5)
    least = jnp.full((3, 3, 4, 8), -jnp.inf)
    assert jnp.isnan(layers.conv_onednn(x, least, 1, "VALID", pooled=True)).all()


@needs_onednn
@pytest.mark.parametrize("pooled", [False, True])
def test_a_gradient_that_is_not_needed_changes_nothing(pooled: bool) -> None:
    """What oneDNN computes in one call it also computes alone."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 8, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)
    stride = 1 if pooled else 2

    def total(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.square(layers.conv_onednn(x, kernel, stride, "SAME", pooled=pooled)).sum()

    both = jax.grad(total, (0, 1))(x, kernel)
    assert np.abs(both[0]).max() > 0
    assert np.abs(both[1]).max() > 0
    for i, (alone, call) in enumerate(zip(both, ("gx", "gkernel"), strict=True)):
        by_one = jax.jit(jax.grad(total, i))
        np.testing.assert_array_equal(by_one(x, kernel), alone)
        text = by_one.lower(x, kernel).as_text()
        (other,) = {"gx", "gkernel"} - {call}
        assert f"\\22{call}\\22" in text
        assert f"\\22{other}\\22" not in text


@needs_onednn
def test_a_result_that_nothing_depends_on_has_no_gradient() -> None:
    @jax.custom_vjp
    def second(a: jax.Array, b: jax.Array) -> jax.Array:
        return a.sum() + b.sum()

    second.defvjp(lambda a, b: (second(a, b), b), lambda b, g: (None, g * jnp.ones_like(b)))
    x, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8))

    def total(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return second(layers.conv_onednn(x, kernel, 1, "SAME"), x)

    gx, gkernel = jax.grad(total, (0, 1))(x, kernel)
    np.testing.assert_array_equal(gx, 1)
    np.testing.assert_array_equal(gkernel, 0)


@needs_onednn
@pytest.mark.skipif(not onednn.has_bfloat16(), reason="no AVX-512")
@pytest.mark.parametrize("pooled", [False, True])
def test_onednn_rounds_what_it_is_given_and_nothing_else(pooled: bool) -> None:
    """Products of bfloat16 are float32, as are their sums: nothing is left to round."""
    rng = np.random.default_rng(0)
    rounded = [
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32)
        for shape in ((2, 8, 9, 4), (3, 3, 4, 8), (2, 4, 5 - pooled, 8))
    ]

    def pulled(dtype: Any, x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
        form = functools.partial(
            layers.conv_onednn, stride=2 - pooled, padding="SAME", dtype=dtype, pooled=pooled
        )
        y, pull = jax.vjp(form, x, kernel)
        return y, *pull(g)

    exact = pulled(jnp.dtype(jnp.float32), *rounded)
    for found, expected in zip(pulled(jnp.dtype(jnp.bfloat16), *rounded), exact, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)
    # Less than a half of a bfloat16's last bit, which rounding takes away.
    nudged = rounded[0] * (1 + 2**-12), *rounded[1:]
    np.testing.assert_array_equal(
        pulled(jnp.dtype(jnp.bfloat16), *nudged)[0], pulled(jnp.dtype(jnp.bfloat16), *rounded)[0]
    )


_TWO_STEPS = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from cnnjax.machine import devices
from cnnjax.ops import ffi, layers
from cnnjax import steps
from cnnjax.config import DeviceConfig, ModelConfig, TrainConfig
from cnnjax.networks import make_model
from cnnjax.objectives import Batch
from cnnjax.optimizers import make_optimizer

devices.make_mesh(DeviceConfig("cpu"))
if sys.argv[1] == "plain":
    layers.conv = lambda x, k, *, stride=1, padding="SAME", dtype: layers.conv_plain(
        x, k, stride, padding
    )
else:
    assert ffi.available()
model = make_model(ModelConfig(sys.argv[2], width=8))
optimizer, _ = make_optimizer(TrainConfig(), 1)
once = devices.TRAITS["cpu"].once
new = jax.jit(lambda key: steps.init_state(model, optimizer, key, 32), compiler_options=once)
state = new(jax.random.key(0))
rng = np.random.default_rng(0)
batch = Batch(
    jnp.asarray(rng.integers(0, 256, (6, 32, 32)), jnp.uint8),
    jnp.asarray(rng.integers(0, 2, 6), jnp.int32),
)
step = steps.make_train_step(model, optimizer, lambda key, images: images)
losses = []
for _ in range(2):
    state, sums = step(state, batch, jax.random.key(1))
    losses.append(float(sums.loss))
print(*losses, *np.asarray(steps.make_eval_step(model)(state, batch)))
"""


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("network", ["baseline", "resnet"])
def test_a_process_of_its_own_trains_the_same_with_onednn(network: str, tmp_path: Path) -> None:
    """And the next one need not compile it again."""

    def numbers_and_kept(form: str) -> tuple[list[float], set[str]]:
        done = subprocess.run(
            [sys.executable, "-c", _TWO_STEPS, form, network],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        # What compiles in about a tenth of a second is kept by some processes and not by others.
        kept = {file.name for file in tmp_path.rglob("jit_train_step*-cache")}
        return [float(x) for x in done.stdout.split()], kept

    numbers, kept = numbers_and_kept("onednn")
    assert kept
    assert numbers_and_kept("onednn") == (numbers, kept)
    plain, _ = numbers_and_kept("plain")
    np.testing.assert_allclose(numbers, plain, rtol=2e-3, atol=2e-3)


@needs_onednn
@pytest.mark.parametrize(
    ("own", "wait"), [({}, "ACTIVE"), ({"OMP_WAIT_POLICY": "passive"}, "PASSIVE")]
)
def test_openmp_waits_awake_unless_told_otherwise(own: dict[str, str], wait: str) -> None:
    script = "import os; from cnnjax.ops import onednn; onednn.library(); print(dict(os.environ))"
    chosen = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    rest = {name: value for name, value in os.environ.items() if name not in chosen}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=rest | own | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"OMP_WAIT_POLICY = '{wait}'" in done.stderr
    # Without it, an active wait would last for minutes where cores suffice for all threads.
    assert ("GOMP_SPINCOUNT = '300000'" in done.stderr) == (not own)
    assert "GOMP_SPINCOUNT" not in done.stdout  # processes that are started later are not told
    assert ("OMP_WAIT_POLICY" in done.stdout) == bool(own)


@needs_onednn
def test_what_onednn_refuses_is_an_error_of_the_program() -> None:
    x, g, pads = jnp.ones((2, 6, 6, 4)), jnp.ones((2, 4, 4, 8)), ((0, 0), (0, 0))
    gradient = functools.partial(ffi.gradients, wanted=("gkernel",))
    _, right = gradient(x, jnp.ones((3, 3, 4, 8)), g, pads, 1)
    np.testing.assert_array_equal(right, np.full((3, 3, 4, 8), 32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"oneDNN: .* failed with status"):
        jax.block_until_ready(gradient(x, jnp.ones((3, 3, 4, 9)), g, pads, 1))


@needs_onednn
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_within_a_call_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(frame: Any) -> None:
        raise KeyboardInterrupt

    x, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8))
    call = jax.jit(lambda x, kernel: ffi.convolution(x, kernel, ((1, 1), (1, 1)), 1))
    compiled = call.lower(x, kernel).compile()
    with monkeypatch.context() as patched:
        patched.setattr(ffi, "_serve", interrupted)
        with pytest.raises(jax.errors.JaxRuntimeError, match="oneDNN: KeyboardInterrupt"):
            jax.block_until_ready(compiled(x, kernel))
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
        assert time.monotonic() - started < 5
        # A command tells of it as of any other.
        assert guarded(lambda: int(compiled(x, kernel)[0, 0, 0, 0])) == 130
    assert compiled(x, kernel)[0, 3, 3, 0] == 36


_BFLOAT16 = """
import jax
import jax.numpy as jnp
from cnnjax.machine import devices
from cnnjax.ops import ffi, layers
from cnnjax.config import DeviceConfig

devices.make_mesh(DeviceConfig("cpu"))
assert ffi.available()
x, kernel = jnp.ones((2, 6, 6, 8), jnp.bfloat16), jnp.ones((3, 3, 8, 4), jnp.bfloat16)
conv = jax.jit(layers.conv)
y, pull = jax.vjp(conv, x, kernel)
# Its sums, as 72.0, are float32 where oneDNN takes them.
print("bfloat16" in conv.lower(x, kernel).as_text())  # of XLA's own, the type is bf16
print(y[0, 2, 2, 0], *(g.dtype for g in pull(y)))
"""


@needs_onednn
@pytest.mark.parametrize(
    ("isa", "printed"),
    [
        pytest.param("AVX2", ["False", "72"], id="AVX2"),
        pytest.param(
            "DEFAULT",
            ["True", "72.0"],
            id="AVX-512",
            marks=pytest.mark.skipif(not onednn.has_bfloat16(), reason="no AVX-512"),
        ),
    ],
)
def test_bfloat16_runs_with_onednn_and_without(isa: str, printed: list[str]) -> None:
    """Without AVX-512, oneDNN has no kernels for bfloat16."""
    done = subprocess.run(
        [sys.executable, "-c", _BFLOAT16],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*printed, "bfloat16", "bfloat16"]


_ENDS_EARLY = """
import jax
import jax.numpy as jnp
from cnnjax.machine import devices
from cnnjax.ops import ffi, layers
from cnnjax.config import DeviceConfig

devices.make_mesh(DeviceConfig("cpu"))
assert ffi.available()
# With a product, which XLA knows to take long: what it thinks cheap it computes at once.
step = jax.jit(lambda x, k: layers.conv(jnp.tanh(layers.conv(x, k) @ k[0, 0]), k))
x, kernel = jnp.ones((32, 64, 64, 32)), jnp.ones((3, 3, 32, 32)) / 288
jax.block_until_ready(step(x, kernel))


def take_steps(x):
    for _ in range(20):
        x = step(x, kernel)


take_steps(x)
raise SystemExit(3)
"""


@needs_onednn
def test_a_process_ends_while_steps_are_computed() -> None:
    """Else XLA's threads, which need the interpreter, and its end would wait for each other."""
    done = subprocess.run([sys.executable, "-c", _ENDS_EARLY], timeout=120, check=False)
    assert done.returncode == 3


@needs_onednn
def test_onednn_refuses_arrays_of_two_types() -> None:
    x, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8), jnp.bfloat16)
    with pytest.raises(TypeError, match="float32 and bfloat16"):
        ffi.convolution(x, kernel, ((1, 1), (1, 1)), 1)


def test_a_dense_layer_is_not_rounded_on_a_cpu() -> None:
    half, single = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    assert layers.dense_dtype(half) == layers.dense_dtype(single) == single
    with layers.portable():  # who loads the program may have another device
        assert layers.dense_dtype(half) == half


@pytest.mark.parametrize(
    ("shape", "deviation"), [((2, 96, 97, 1), 1 / 12), ((1, 9, 40, 3), 1 / 30)]
)
def test_thin_products_take_the_same_mean(shape: tuple[int, ...], deviation: float) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + 5
    expected = jax.jit(layers.mean_around_by_products, static_argnums=1)(x, deviation)
    thin = jax.jit(layers.mean_around_by_thin_products, static_argnums=1)(x, deviation)
    np.testing.assert_allclose(thin, expected, atol=2e-5)
    flat = np.ones(shape, np.float32)
    np.testing.assert_allclose(layers.mean_around(flat, deviation), flat, atol=2e-6)
    with layers.portable():
        lowered = jax.jit(lambda x: layers.mean_around(x, deviation)).lower(x).as_text()
    assert lowered.count("dot_general") == 2  # the form of accelerators, and of exports
