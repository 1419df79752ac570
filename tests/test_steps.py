"""The steps are pure, compile once, and do not see how a batch is divided."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax.augment import make_augment, make_views
from cnnjax.config import AugmentConfig, DeviceConfig, TrainConfig
from cnnjax.machine import devices
from cnnjax.networks import AUXILIARY, BaselineCNN, ResNet
from cnnjax.objectives import Batch, Binary, cross_entropy, to_float
from cnnjax.optimizers import make_optimizer
from cnnjax.steps import (
    TrainState,
    make_eval_step,
    make_train_step,
    state_of,
)

SIZE = 16
KEY = jax.random.key(0)


def still(key: jax.Array, images: jax.Array) -> jax.Array:
    return images


def batch_of(n: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 255, (n, SIZE, SIZE), dtype=np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, 2, n), jnp.int32))


@functools.cache
def variables_of(model: nn.Module) -> Any:
    """The model's initial variables, in host memory: compiling an initialiser takes seconds."""
    new = jax.jit(model.init, compiler_options=devices.TRAITS["cpu"].once)
    return jax.device_get(new(KEY, np.zeros((1, SIZE, SIZE, 1), np.float32)))


def started(model: nn.Module, config: TrainConfig | None = None, **options: Any) -> Any:
    config = config or TrainConfig()
    optimizer, _ = make_optimizer(config, 10)
    augment, ema_decay = options.pop("augment", still), options.pop("ema_decay", 0.0)
    step = make_train_step(model, optimizer, augment, Binary(**options), ema_decay=ema_decay)
    variables = jax.tree.map(jnp.array, variables_of(model))
    return step, state_of(variables, optimizer, ema=bool(ema_decay))


def close(a: Any, b: Any, rtol: float = 1e-4) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = float(np.abs(y).max()) or 1.0
        np.testing.assert_allclose(x, y, atol=rtol * scale, rtol=0)


@pytest.mark.parametrize(
    "model", [BaselineCNN(), ResNet(width=8, stages=2)], ids=["baseline", "resnet"]
)
def test_loss_falls_and_nothing_is_traced_twice(model: nn.Module) -> None:
    traced: list[int] = []

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        traced.append(1)
        return images

    rate = 1e-3 if isinstance(model, BaselineCNN) else 1e-2
    step, state = started(model, TrainConfig(learning_rate=rate), augment=augment)
    losses = []
    for i in range(30):
        state, sums = step(state, batch_of(8, seed=i % 2), KEY)
        losses.append(float(sums.loss) / int(sums.images))
    assert losses[-1] < 0.8 * losses[1]
    assert len(traced) == 1
    assert int(state.step) == 30

    judge = make_eval_step(model)
    for seed in range(3):
        assert judge(state, batch_of(8, seed=seed)).shape == (8,)
    assert judge._cache_size() == 1


def test_state_is_donated_and_the_outcome_a_function_of_the_arguments() -> None:
    step, state = started(BaselineCNN(), augment=make_augment(AugmentConfig()))
    _, again = started(BaselineCNN())
    first, _ = step(state, batch_of(8), KEY)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    second, _ = step(again, batch_of(8), KEY)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)


BOTH = [
    pytest.param(BaselineCNN(), id="baseline", marks=pytest.mark.slow),
    pytest.param(ResNet(width=4, stages=2), id="resnet"),
]


@pytest.mark.parametrize("model", BOTH)
def test_the_number_of_devices_changes_nothing(model: nn.Module) -> None:
    outcomes: list[TrainState] = []
    for count in (1, 4):
        mesh = devices.make_mesh(DeviceConfig(count=count))
        step, state = started(
            model, TrainConfig(optimizer="sgd"), augment=make_augment(AugmentConfig())
        )
        state = jax.device_put(state, devices.replicated(mesh))
        for i in range(2):
            batch = jax.device_put(batch_of(8, seed=i), devices.divided(mesh))
            state, _ = step(state, batch, jax.device_put(KEY, devices.replicated(mesh)))
        outcomes.append(jax.device_get(state))
    close(outcomes[0].params, outcomes[1].params, 1e-3)
    close(outcomes[0].batch_stats, outcomes[1].batch_stats)


@pytest.mark.parametrize("count", [1, 4])
def test_the_logit_is_the_mean_over_views(count: int) -> None:
    config = AugmentConfig(zoom=0.2, contrast=0.3)
    _, state = started(ResNet(width=4, stages=2))
    mesh = devices.make_mesh(DeviceConfig(count=count))
    batch = jax.device_put(batch_of(4), devices.divided(mesh))
    state = jax.device_put(state, devices.replicated(mesh))
    judge = make_eval_step(ResNet(width=4, stages=2), make_views(config, 3))
    found = judge(state, batch, 7)
    seen = jax.jit(make_views(config, 3))(jax.random.key(7), to_float(batch_of(4).images))
    seen = np.asarray(seen)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    apply = jax.jit(ResNet(width=4, stages=2).apply)
    each = [apply(variables, seen[:, i]) for i in range(3)]
    close(found, np.mean(each, axis=0))
    plain = make_eval_step(ResNet(width=4, stages=2))(state, batch)
    for other in (judge(state, batch, 8), plain):
        assert np.abs(np.asarray(found) - np.asarray(other)).max() > 1e-4


def test_sums_and_gradient_are_those_of_the_mean_loss() -> None:
    model = BaselineCNN()
    weights, smoothing = (2.0, 0.6), 0.1
    step, state = started(
        model,
        TrainConfig(optimizer="sgd", learning_rate=0.1),
        class_weights=weights,
        label_smoothing=smoothing,
    )
    batch = batch_of(6)
    images = np.asarray(batch.images)[..., None].astype(np.float32) / 255
    labels = np.asarray(batch.labels)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, images)
        target = labels.astype(np.float32) * (1 - smoothing) + smoothing / 2
        p = jax.nn.sigmoid(logits)
        losses = -target * jnp.log(p) - (1 - target) * jnp.log(1 - p)
        return (losses * jnp.where(labels == 1, weights[1], weights[0])).mean(), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    # Nesterov's first step is (1 + momentum) times the gradient.
    before = jax.device_get(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * 1.9 * np.asarray(g), before, gradient)
    after, sums = step(state, batch, KEY)
    close(after.params, expected)
    assert float(sums.loss) == pytest.approx(6 * float(value), rel=1e-5)
    assert int(sums.images) == 6
    assert int(sums.correct) == ((np.asarray(logits) > 0) == (labels == 1)).sum()


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(BaselineCNN, id="baseline"),
        pytest.param(
            functools.partial(ResNet, width=4, stages=2), id="resnet", marks=pytest.mark.slow
        ),
    ],
)
def test_the_second_head_learns_from_the_images_that_it_is_told_of(
    model: Callable[..., Any],
) -> None:
    """By differences: of the loss with the head and without, and of what it is told."""
    plain, both = model(), model(auxiliary=True)
    head = variables_of(both)["params"][AUXILIARY]
    assert jax.tree.map(jnp.shape, head)["kernel"][1] == 1
    config = TrainConfig(optimizer="sgd", learning_rate=0.1)
    batch = batch_of(6)
    viral = np.array([1, 0, -1, -1, 1, 0], np.int32)

    def step_of(weight: float, viral: np.ndarray) -> tuple[TrainState, float]:
        step, state = started(both, config, class_weights=(3.0, 0.5), auxiliary=weight)
        after, sums = step(state, batch._replace(auxiliary=jnp.asarray(viral)), KEY)
        return jax.device_get(after), float(sums.loss)

    step, _ = started(plain, config, class_weights=(3.0, 0.5))
    state = state_of(without_head(variables_of(both)), make_optimizer(config, 10)[0])
    alone, alone_sums = step(state, batch, KEY)
    untold, loss = step_of(1.0, np.full(6, -1, np.int32))
    close(without_head({"params": untold.params})["params"], alone.params)
    close(untold.params[AUXILIARY], head)

    told, told_loss = step_of(1.0, viral)
    half, _ = step_of(0.5, viral)
    close(half.params[AUXILIARY]["bias"], told.params[AUXILIARY]["bias"] / 2)
    for reported in (loss, told_loss):  # that of the answer alone
        assert reported == pytest.approx(float(alone_sums.loss), rel=1e-5)
    # The head starts with no bias: its bias moves by the mean of weight times error.
    apply = functools.partial(both.apply, train=True, mutable=[AUXILIARY, "batch_stats"])
    _, changed = jax.jit(apply)(variables_of(both), to_float(batch.images))
    (logits,) = changed[AUXILIARY]["logits"]
    weight = np.where(batch.labels == 1, 0.5, 3.0)
    error = weight * (1 / (1 + np.exp(-np.asarray(logits))) - viral)
    error = np.where(viral >= 0, error, 0)
    np.testing.assert_allclose(told.params[AUXILIARY]["bias"], -0.19 * error.sum() / 6, rtol=1e-3)
    # The rest of the network hears of it too.
    first = "conv1" if model is BaselineCNN else "stem"
    assert np.abs(told.params[first]["kernel"] - untold.params[first]["kernel"]).max() > 1e-5

    # Judging needs no second head.
    judged = make_eval_step(both)(told, batch)
    params = without_head({"params": told.params})["params"]
    close(judged, make_eval_step(plain)(told.replace(params=params), batch), 1e-6)


def without_head(variables: Any) -> Any:
    params = {name: value for name, value in variables["params"].items() if name != AUXILIARY}
    return jax.tree.map(jnp.array, {**variables, "params": params})


def test_mixup_is_a_mix_of_images_labels_and_weights() -> None:
    """Against the gradient of the mixed loss, written out, with the shares that the images tell."""
    seen: list[jax.Array] = []

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
            return nn.Dense(1)(images.reshape(len(images), -1))[:, 0]

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 4), dtype=np.uint8)
    labels = np.array([0, 1, 1, 0, 1, 0], np.int32)
    batch = Batch(jnp.asarray(pixels), jnp.asarray(labels))
    optimizer = optax.sgd(1.0)
    state = state_of(
        Linear().init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), train=True), optimizer
    )
    seen.clear()
    before = jax.tree.map(np.asarray, state.params)
    objective = Binary(class_weights=(3.0, 0.5), mixup=0.4)
    step = make_train_step(Linear(), optimizer, lambda _, x: x, objective)
    after, sums = step(state, batch, jax.random.key(7))
    jax.effects_barrier()
    flat = pixels.reshape(6, -1) / 255
    partner = np.array([1, 2, 3, 4, 5, 0])  # the next
    mixed = seen[0].reshape(6, -1)
    way = flat[partner] - flat
    share = ((mixed - flat) * way).sum(1) / (way**2).sum(1)
    np.testing.assert_allclose(mixed, flat + share[:, None] * way, atol=1e-5)
    assert (share >= -1e-6).all()
    assert (share <= 0.5 + 1e-6).all()
    assert len(np.unique(share.round(3))) > 2
    weight = np.where(labels == 1, 0.5, 3.0)
    target = labels + share * (labels[partner] - labels)
    weights = weight + share * (weight[partner] - weight)
    logits = mixed @ before["Dense_0"]["kernel"][:, 0] + before["Dense_0"]["bias"]
    error = weights * (1 / (1 + np.exp(-logits)) - target) / 6
    found = before["Dense_0"]["kernel"] - np.asarray(after.params["Dense_0"]["kernel"])
    np.testing.assert_allclose(found[:, 0], mixed.T @ error, atol=1e-5)
    losses = weights * (np.logaddexp(0, logits) - target * logits)
    assert float(sums.loss) == pytest.approx(losses.sum(), rel=1e-5)


def test_an_image_of_weight_0_counts_for_nothing() -> None:
    batch = batch_of(8)
    step, state = started(BaselineCNN(), TrainConfig(optimizer="sgd"))
    weights = jnp.asarray([2.0] * 4 + [0.0] * 4)
    weighted, sums = step(state, batch._replace(weights=weights), KEY)
    step, state = started(BaselineCNN(), TrainConfig(optimizer="sgd"))
    alone, fewer = step(state, Batch(batch.images[:4], batch.labels[:4]), KEY)
    close(weighted.params, alone.params)
    assert float(sums.loss) == pytest.approx(2 * float(fewer.loss), rel=1e-5)
    assert int(sums.images) == 8


@pytest.mark.parametrize("what", ["image", "gradient", "infinite gradient"])
def test_a_step_that_is_not_finite_is_rejected(what: str) -> None:
    """The state stays as it was, and the metrics say so."""

    def broken(key: jax.Array, images: jax.Array) -> jax.Array:
        return images.at[2, 3, 4].set(jnp.nan) if what == "image" else images

    class Steep(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
            x = nn.Dense(1)(images.reshape(len(images), -1))[:, 0]
            return x + jnp.sqrt(jnp.abs(x - x))  # its value is finite, its derivative is not

    class Falling(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
            zero = self.param("zero", nn.initializers.zeros, ())
            return -jnp.sqrt(zero) * jnp.ones(len(images))  # its derivative is -inf

    model = {"image": ResNet(width=4, stages=2), "gradient": Steep()}.get(what, Falling())
    optimizer = optax.sgd(0.1)
    images = jnp.zeros((1, SIZE, SIZE, 1))
    variables = variables_of(model) if what == "image" else model.init(KEY, images, train=True)
    state = state_of(jax.tree.map(jnp.array, variables), optimizer, ema=True)
    before = jax.device_get(state)
    step = make_train_step(model, optimizer, broken, ema_decay=0.9)
    batch = batch_of(8)
    if what == "infinite gradient":
        batch = batch._replace(labels=jnp.zeros(8, jnp.int32))
    after, sums = step(state, batch, KEY)
    assert bool(sums.rejected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_cross_entropy_is_stable() -> None:
    logits = jnp.array([-1e4, 1e4, 1e4, 0.0])
    found = cross_entropy(logits, jnp.array([0, 1, 0, 1]))
    np.testing.assert_allclose(found, [0, 0, 1e4, np.log(2)])


def test_moving_average_is_what_eval_uses() -> None:
    model = BaselineCNN()
    step, state = started(model, ema_decay=0.2)  # the last of four steps reach it
    mean = jax.tree.map(np.asarray, state.params)
    for i in range(4):
        state, _ = step(state, batch_of(8, seed=i), KEY)
        decay = min(0.2, (1 + i) / (10 + i))
        mean = jax.tree.map(
            lambda m, p, d=decay: d * m + (1 - d) * np.asarray(p), mean, state.params
        )
    close(state.ema, mean)
    judged = make_eval_step(model)(state, batch_of(8))
    images = to_float(batch_of(8).images)
    expected = jax.jit(model.apply)({"params": mean}, images)
    np.testing.assert_allclose(judged, expected, atol=1e-4)


def test_clipping_bounds_the_step() -> None:
    config = TrainConfig(optimizer="sgd", learning_rate=1.0, clip_norm=0.01)
    step, state = started(BaselineCNN(), config)
    before = jax.tree.map(np.asarray, state.params)
    after, _ = step(state, batch_of(8), KEY)
    moved = jax.tree.map(lambda a, b: np.square(np.asarray(a) - b).sum(), after.params, before)
    norm = np.sqrt(sum(jax.tree.leaves(moved)))
    assert norm == pytest.approx(0.01 * 1.9, rel=1e-3)


def test_weight_decay_shrinks_kernels_only() -> None:
    config = TrainConfig(optimizer="adamw", weight_decay=0.5, learning_rate=1e-9)
    optimizer, _ = make_optimizer(config, 10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert float(jnp.abs(updates["kernel"]).min()) > 0
    assert float(jnp.abs(updates["bias"]).max()) == float(jnp.abs(updates["scale"]).max()) == 0


def test_adam_adds_the_epsilon_of_keras() -> None:
    optimizer, _ = make_optimizer(TrainConfig(optimizer="adam", learning_rate=1.0), 10)
    params = {"kernel": jnp.zeros(())}
    with jax.numpy_dtype_promotion("standard"):
        gradient = {"kernel": jnp.asarray(1e-7)}
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert float(updates["kernel"]) == pytest.approx(-1 / 2, rel=1e-3)  # -g / (|g| + 1e-7)


def test_each_step_drops_others() -> None:
    """What is drawn is a function of the run's key and of the step's number."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
            kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(images), 64)))
            return nn.Dense(1, kernel_init=nn.initializers.ones)(kept)[:, 0]

    def losses(key: jax.Array) -> list[float]:
        optimizer = optax.sgd(0.0)
        state = state_of(Dropping().init(KEY, jnp.zeros((1, 2, 2, 1)), train=False), optimizer)
        assert state.ema is None
        step = make_train_step(Dropping(), optimizer, still)
        found = []
        for _ in range(2):
            state, sums = step(state, batch_of(8), key)
            found.append(float(sums.loss))
        return found

    first = losses(KEY)
    assert first[0] != first[1]
    assert losses(KEY) == first
    assert losses(jax.random.key(1))[0] != first[0]


@pytest.mark.parametrize(
    ("config", "at", "expected"),
    [
        (TrainConfig(), 40, 1e-3),
        # A warmup is no longer than the training, less a step.
        (TrainConfig(schedule="cosine", epochs=4, warmup=9), 39, 1e-3),
        (TrainConfig(schedule="cosine", epochs=4, warmup=0.5), 5, 1e-3),
        (TrainConfig(schedule="cosine", epochs=4), 0, 0.0),
        (TrainConfig(schedule="cosine", epochs=4), 10, 1e-3),
        (TrainConfig(schedule="cosine", epochs=4), 25, 5e-4),
        (TrainConfig(schedule="cosine", epochs=4), 40, 0.0),
        (TrainConfig(schedule="cosine", epochs=4, warmup=0), 0, 1e-3),
    ],
)
def test_learning_rate(config: TrainConfig, at: int, expected: float) -> None:
    rate: Callable[[int], jax.Array] = make_optimizer(config, 10)[1]
    assert float(rate(at)) == pytest.approx(expected, abs=1e-9)
