"""The NumPy networks and their training against the JAX ones, parameter by parameter."""

from __future__ import annotations

import ast
import copy
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnnjax.networks
import cnnjax.optimizers
import cnnjax.steps
from cnnjax import objectives
from cnnjax.config import TrainConfig
from cnnjax.scratch import convert, layers, models, optimizers, steps
from cnnjax.scratch.initializers import glorot_uniform, he_normal, lecun_normal
from cnnjax.scratch.trees import Tree, map_tree

WEIGHTS, SMOOTHING = (1.9, 0.7), 0.1

# name: (NumPy's network, JAX's, size of the images)
NETWORKS: dict[str, tuple[models.Network, Any, int]] = {
    "baseline": (models.BaselineCNN(), cnnjax.networks.BaselineCNN(), 18),
    "baseline of the post": (
        models.BaselineCNN(channels=3),
        cnnjax.networks.BaselineCNN(channels=3),
        64,
    ),
    "baseline of local contrast": (
        models.BaselineCNN(channels=3, standardize=True, local_contrast=True),
        cnnjax.networks.BaselineCNN(channels=3, standardize=True, local_contrast=True),
        14,
    ),
    "resnet": (models.ResNet(width=4), cnnjax.networks.ResNet(width=4), 20),
    "deeper resnet": (
        models.ResNet(channels=3, width=3, depth=2, stages=2),
        cnnjax.networks.ResNet(channels=3, width=3, depth=2, stages=2),
        17,
    ),
    "recipe's resnet": (
        models.ResNet(width=4, stages=3, stem=4, standardize=True, local_contrast=True),
        cnnjax.networks.ResNet(width=4, stages=3, stem=4, standardize=True, local_contrast=True),
        24,
    ),
}
# name: (NumPy's optimizer, JAX's as the recipes make it)
OPTIMIZERS = {
    "adam": (optimizers.adam(1e-3), TrainConfig()),
    "adamw": (
        optimizers.adamw(1e-3, 0.1),
        TrainConfig(optimizer="adamw", weight_decay=0.1),
    ),
    "sgd": (optimizers.sgd(1e-2), TrainConfig(optimizer="sgd", learning_rate=1e-2)),
}


def assert_close(found: Tree, expected: Tree, tolerance: float, name: str = "") -> None:
    """Asserts that each array's difference is small in norm, relative to that of the expected."""
    assert sorted(found) == sorted(expected), name
    for key in expected:
        at, a, b = f"{name}/{key}", found[key], expected[key]
        if isinstance(b, dict):
            assert_close(a, b, tolerance, at)
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, at
        error = np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12)
        assert error < tolerance, f"{at}: relative error {error:.1e}"


def batch_of(size: int, seed: int, n: int = 8) -> steps.Batch:
    """Returns images of noise below and black above, and a patch where the label is 1."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
    labels = rng.integers(0, 2, n).astype(np.int32)
    images[labels == 1, -6:-2, 2:6] //= 4
    # So far down that there are ties in both pools of the baseline.
    images[:, : size // 2] = 0
    return steps.Batch(images, labels)


def started(network: str, moved: float = 0.0) -> tuple[Tree, Tree]:
    """Returns new (params, batch_stats), each parameter moved by noise of that size."""
    ours, _, size = NETWORKS[network]
    rng = np.random.default_rng(0)
    params, batch_stats = ours.init(rng, size)
    params = map_tree(lambda p: p + (moved * rng.standard_normal(p.shape)).astype(p.dtype), params)
    return params, batch_stats


def numpy_gradients(network: str, params: Tree, batch_stats: Tree, batch: Any) -> steps.Gradients:
    return steps.loss_and_gradients(
        NETWORKS[network][0],
        params,
        batch_stats,
        steps.to_float(batch.images),
        batch.labels,
        class_weights=WEIGHTS,
        label_smoothing=SMOOTHING,
    )


@functools.cache
def jax_gradients(network: str) -> Any:
    """Returns the jitted (params, batch_stats, batch) -> (loss, (logits, statistics)), gradients.

    It is written out here, and `cnnjax.steps` held against NumPy below.
    """
    model = NETWORKS[network][1]

    def loss(params: Any, batch_stats: Any, batch: steps.Batch) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        images = objectives.to_float(batch.images)
        logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
        weights = objectives.weights_of(batch.labels, WEIGHTS)
        losses = objectives.cross_entropy(logits, batch.labels, weights, SMOOTHING)
        return losses.mean(), (logits, changed.get("batch_stats", {}))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def check_gradients(network: str) -> None:
    """Asserts that loss, logits, statistics and each parameter's gradient are those of JAX."""
    # Moved, or the zero scales of a fresh ResNet would hide what stands before them.
    params, batch_stats = started(network, moved=0.05)
    batch = batch_of(NETWORKS[network][2], 1)
    found = numpy_gradients(network, params, batch_stats, batch)
    (loss, (logits, stats)), gradients = jax_gradients(network)(params, batch_stats, batch)
    output = {"loss": found.loss, "logits": found.logits}
    assert_close(output, {"loss": loss, "logits": logits}, 1e-4)
    assert_close(found.batch_stats, stats, 1e-5)
    assert_close(found.params, gradients, 1e-4)


@pytest.mark.parametrize(
    "network",
    [
        "baseline",
        "baseline of the post",
        "baseline of local contrast",
        "resnet",
        "recipe's resnet",
        pytest.param("deeper resnet", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_jax(network: str) -> None:
    check_gradients(network)


@pytest.mark.parametrize("network", ["baseline", "resnet"])
def test_evaluation_is_that_of_jax(network: str) -> None:
    ours, model, size = NETWORKS[network]
    params, batch_stats = started(network, moved=0.05)
    batch_stats = map_tree(lambda s: s + np.float32(0.3), batch_stats)
    state = steps.TrainState(0, params, batch_stats, None)
    batch = batch_of(size, 0)
    found = steps.make_eval_step(ours)(state, batch)
    images = objectives.to_float(jnp.asarray(batch.images))
    variables = convert.to_flax(params, batch_stats)
    expected = jax.jit(model.apply)(variables, images)
    assert_close({"logits": found}, {"logits": expected}, 1e-5)


def wrong_max_pool(dy: np.ndarray, cache: layers.PoolCache) -> np.ndarray:
    """Gives every maximum of a window the gradient, not the first alone: wrong on ties only."""
    dx = np.zeros_like(cache.x)
    for i in (0, 1):
        for j in (0, 1):
            height, width = dy.shape[1:3]
            rows, columns = slice(i, 2 * height, 2), slice(j, 2 * width, 2)
            dx[:, rows, columns] = dy * (cache.x[:, rows, columns] == cache.y)
    return dx


def wrong_batch_norm(dy: np.ndarray, cache: layers.BatchNormCache) -> Any:
    """Takes mean and variance for constants, as they are in evaluation."""
    return RIGHT["batch_norm_backward"](dy, cache._replace(train=False))


def wrong_kernel_gradient(dy: np.ndarray, cache: layers.ConvCache) -> np.ndarray:
    """Forgets one image in eight."""
    dy = dy.copy()
    dy[0] = 0
    return RIGHT["conv_kernel_gradient"](dy, cache)


def wrong_input_gradient(dy: np.ndarray, cache: layers.ConvCache) -> np.ndarray:
    """Forgets to turn the kernel."""
    return RIGHT["conv_input_gradient"](dy, cache._replace(kernel=cache.kernel[::-1, ::-1]))


WRONG: dict[str, Callable[..., Any]] = {
    "max_pool_backward": wrong_max_pool,
    "batch_norm_backward": wrong_batch_norm,
    "conv_kernel_gradient": wrong_kernel_gradient,
    "conv_input_gradient": wrong_input_gradient,
}
RIGHT = {name: getattr(layers, name) for name in WRONG}


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, name, WRONG[name])
    with pytest.raises(AssertionError, match="relative error"):
        check_gradients("resnet" if name == "batch_norm_backward" else "baseline")


@pytest.mark.parametrize("network", ["baseline", "resnet"])
def test_gradient_is_the_central_difference_along_a_line(network: str) -> None:
    """Without JAX: in float64 the loss rises along a direction by its product with the gradient."""
    start, stats = started(network, moved=0.05)
    params, stats = convert.from_flax(convert.to_flax(start, stats), np.float64)
    batch = batch_of(NETWORKS[network][2], 0)
    images = steps.to_float(batch.images, np.float64)
    rng = np.random.default_rng(0)
    direction = map_tree(lambda p: rng.standard_normal(p.shape), params)

    def at(h: float) -> steps.Gradients:
        moved = map_tree(lambda p, d: p + h * d, params, direction)
        ours = NETWORKS[network][0]
        return steps.loss_and_gradients(ours, moved, stats, images, batch.labels)

    h = 1e-7  # so small that hardly any relu or maximum changes over
    expected = (at(h).loss - at(-h).loss) / (2 * h)
    products: list[float] = []
    gradients = at(0).params
    map_tree(lambda g, d: products.append((g * d).sum()) or g, gradients, direction)
    assert sum(products) == pytest.approx(expected, rel=1e-6)


def remembered(opt_state: Any, name: str) -> Any:
    """Finds a field of a state in optax's nested tuples of them."""
    if name in getattr(opt_state, "_fields", ()):
        return getattr(opt_state, name)
    found = (remembered(part, name) for part in opt_state if isinstance(part, tuple))
    return next((value for value in found if value is not None), None)


def check_states(found: steps.TrainState, expected: cnnjax.steps.TrainState) -> None:
    """Asserts that step, parameters, statistics and optimizer state are those of JAX."""
    assert found.step == int(expected.step)
    assert_close(found.params, expected.params, 1e-4)
    assert_close(found.batch_stats, expected.batch_stats, 1e-4)
    for name in found.opt_state._fields:
        if name == "step":
            assert found.opt_state.step == int(remembered(expected.opt_state, "count"))
        else:
            moments = remembered(expected.opt_state, name)
            assert_close(getattr(found.opt_state, name), moments, 1e-4)


@pytest.mark.parametrize(
    ("network", "optimizer", "count"),
    [
        ("baseline", "adam", 4),
        ("resnet", "adam", 4),
        ("baseline", "adamw", 4),
        ("baseline", "sgd", 4),
    ],
)
def test_steps_are_those_of_jax(network: str, optimizer: str, count: int) -> None:
    ours, model, size = NETWORKS[network]
    rule, config = OPTIMIZERS[optimizer]
    transformation, _ = cnnjax.optimizers.make_optimizer(config, 10)
    options: Any = {"class_weights": WEIGHTS, "label_smoothing": SMOOTHING}
    step = steps.make_train_step(ours, rule, **options)
    binary = objectives.Binary(**options)
    jax_step = cnnjax.steps.make_train_step(model, transformation, lambda _, x: x, binary)

    params, batch_stats = started(network)
    mine = steps.TrainState(0, params, batch_stats, rule.init(params))
    start = jax.tree.map(jnp.asarray, convert.to_flax(params, batch_stats))
    theirs = cnnjax.steps.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=start["params"],
        batch_stats=start.get("batch_stats", {}),
        opt_state=jax.jit(transformation.init)(start["params"]),
        ema=None,
    )
    # Batches that put no unit within rounding of relu's kink, where gradients may differ.
    for i in range(count):
        batch = batch_of(size, 100 + i)
        mine, sums = step(mine, batch)
        jax_batch = objectives.Batch(*map(jnp.asarray, batch))
        theirs, jax_sums = jax_step(theirs, jax_batch, jax.random.key(0))
        assert sums[1:] == (int(jax_sums.correct), int(jax_sums.images))
        assert sums.loss == pytest.approx(float(jax_sums.loss), rel=1e-4)
        if i in (0, count - 1):
            check_states(mine, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("network", [models.BaselineCNN(), models.ResNet(width=3)], ids=type)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_pure_and_keeps_the_dtype(
    network: models.Network, optimizer: str, dtype: type
) -> None:
    rule, _ = OPTIMIZERS[optimizer]
    step = steps.make_train_step(network, rule)
    state = steps.init_state(network, rule, np.random.default_rng(0), 16, dtype)
    batch = batch_of(16, 0)
    before = copy.deepcopy((state, batch))
    first, sums = step(state, batch)
    second, again = step(state, batch)
    assert sums == again
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, (state, batch), before)
    for leaf in jax.tree.leaves((first.params, first.batch_stats, first.opt_state)):
        assert isinstance(leaf, int) or leaf.dtype == dtype


@pytest.mark.parametrize("network", [models.BaselineCNN(), models.ResNet(width=4)], ids=type)
def test_it_learns(network: models.Network) -> None:
    rule = optimizers.adam(3e-3)
    step = steps.make_train_step(network, rule)
    state = steps.init_state(network, rule, np.random.default_rng(0), 16)
    losses = []
    for _ in range(30):
        state, sums = step(state, batch_of(16, 0))
        losses.append(sums.loss / sums.images)
    assert losses[-1] < 0.2 * losses[0]
    assert sums.correct == sums.images == 8


def test_a_learning_rate_may_follow_the_steps() -> None:
    params = {"kernel": np.ones((2, 2), np.float32)}
    asked: list[int] = []

    def rate(step: int) -> Any:
        asked.append(step)
        return np.float64(0.5) ** step  # must not make float64 of the parameters

    for rule in (optimizers.sgd(rate, momentum=0.0), optimizers.adam(rate)):
        state, moved = rule.init(params), params
        for _ in range(3):
            moved, state = rule.update(params, state, moved)
        np.testing.assert_allclose(moved["kernel"], 1 - 1 - 0.5 - 0.25, rtol=1e-5)
        assert moved["kernel"].dtype == np.float32
    assert asked == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("network", NETWORKS)
def test_conversion_goes_both_ways(network: str) -> None:
    ours, model, size = NETWORKS[network]

    @jax.jit
    def init() -> Any:
        """Starts the network; without its random draws, which are what takes long to compile."""
        variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
        return jax.tree.map(lambda p: p if p.ndim == 1 else jnp.ones_like(p), variables)

    variables = init()
    params, batch_stats = convert.from_flax(variables)
    back = convert.to_flax(params, batch_stats)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)

    # What NumPy drew has Flax's names, shapes and dtypes, and its constants.
    drawn = convert.to_flax(*ours.init(np.random.default_rng(0), size))
    assert jax.tree.structure(drawn) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves(variables), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.ndim == 1:
            np.testing.assert_array_equal(a, b)

    # Copies: what is done to one is not done to the other.
    next(iter(jax.tree.leaves(params)))[...] = 7
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("shape", [(3, 3, 32, 64), (300, 200)])
@pytest.mark.parametrize("name", ["he_normal", "lecun_normal", "glorot_uniform"])
def test_variance_of_initializers(name: str, shape: tuple[int, ...]) -> None:
    inputs = int(np.prod(shape[:-1]))
    outputs = int(np.prod(shape[:-2])) * shape[-1]
    # The largest draw in standard deviations: of a normal cut off at 2, which has deviation
    # 0.8796, and of a uniform.
    draw, variance, largest = {
        "he_normal": (he_normal, 2 / inputs, 2 / 0.8796),
        "lecun_normal": (lecun_normal, 1 / inputs, 2 / 0.8796),
        "glorot_uniform": (glorot_uniform, 2 / (inputs + outputs), math.sqrt(3)),
    }[name]
    kernel = draw(np.random.default_rng(0), shape)
    assert kernel.shape == shape
    assert kernel.dtype == np.float32
    assert abs(kernel.mean()) < 4 * math.sqrt(variance / kernel.size)
    assert kernel.var() == pytest.approx(variance, rel=0.03)
    assert np.abs(kernel).max() == pytest.approx(largest * math.sqrt(variance), rel=0.01)
    np.testing.assert_array_equal(kernel, draw(np.random.default_rng(0), shape))


def test_the_package_needs_nothing_but_numpy() -> None:
    folder = Path(models.__file__).parent
    imported = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    roots = {name for name in imported if not name.startswith("cnnjax.scratch")}
    assert {name.split(".")[0] for name in roots} - sys.stdlib_module_names == {"numpy"}


PARAMS = models.BaselineCNN().init(np.random.default_rng(0), 16)[0]
IMAGES = np.zeros((2, 16, 16, 1), np.float32)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "images without channels": (
        lambda: models.BaselineCNN().forward(PARAMS, {}, IMAGES[..., 0]),
        r"expected images of shape \[batch, height, width, 1\], got \[2, 16, 16\]",
    ),
    "images of another size": (
        lambda: models.BaselineCNN().forward(PARAMS, {}, np.zeros((2, 20, 20, 1))),
        r"expected kernel of shape \[288, out\] for x of shape \[2, 288\], got \[128, 128\]",
    ),
    "images too small": (
        lambda: models.BaselineCNN().init(np.random.default_rng(0), 9),
        "at least 10 x 10 pixels, got 9 x 9",
    ),
    "parameters of another network": (
        lambda: models.ResNet().forward(PARAMS, {}, IMAGES),
        r"expected the layers \['head', .*\], got \['conv1', 'conv2', 'dense1', 'dense2'\]",
    ),
    "integers in [0, 255] as [batch, height, width, 1]": (
        lambda: steps.to_float(np.zeros((2, 16, 16, 1), np.uint8)),
        r"expected images of shape \[batch, height, width\], got \[2, 16, 16, 1\]",
    ),
    "labels": (
        lambda: steps.loss_and_gradients(
            models.BaselineCNN(), PARAMS, {}, IMAGES, np.zeros(3, int)
        ),
        r"expected labels of shape \[2\] for images \[2, 16, 16, 1\], got \[3\]",
    ),
    "trees of other names": (
        lambda: map_tree(np.add, {"a": {"b": np.ones(2)}}, {"a": {"c": np.ones(2)}}),
        r"expected the names \['b'\] at /a/, got \['c'\]",
    ),
    "trees of other shapes": (
        lambda: map_tree(np.add, {"a": {"b": np.ones(2)}}, {"a": {"b": np.ones(1)}}),
        r"expected /a/b of shape \[2\], got \[1\]",
    ),
    "params where variables belong": (
        lambda: convert.from_flax(PARAMS),
        r"expected the collections .* got \['conv1', 'conv2', 'dense1', 'dense2'\]",
    ),
    "fans of a vector": (lambda: he_normal(np.random.default_rng(0), (3,)), r"got \[3\]"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=list(BAD))
def test_what_does_not_fit_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
