"""Losses and figures of each objective against NumPy, written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from cnnjax.config import TrainConfig
from cnnjax.networks import AUXILIARY
from cnnjax.objectives import (
    Batch,
    Binary,
    Segmentation,
    Softmax,
    averaged_to,
    cross_entropy,
    objective_of,
    to_float,
    weights_of,
)

KEY = jax.random.key(0)


def unmoved(key: jax.Array, images: jax.Array, maps: jax.Array | None = None) -> Any:
    return images if maps is None else (images, maps)


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(2 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def sigmoid(x: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def test_images_become_numbers_from_0_to_1() -> None:
    found = to_float(jnp.asarray([[[0, 51], [255, 102]]], jnp.uint8))
    assert (found.shape, found.dtype) == ((1, 2, 2, 1), jnp.float32)
    np.testing.assert_allclose(found[0, ..., 0], [[0, 0.2], [1, 0.4]], atol=1e-7)


def test_weights_and_smoothing_of_two_classes() -> None:
    logits, labels = drawn(6), jnp.asarray([0, 1, 1, 0, 1, 0])
    weights = weights_of(labels, (3.0, 0.5))
    np.testing.assert_array_equal(weights, [3, 0.5, 0.5, 3, 0.5, 3])
    target, p = np.where(labels == 1, 0.9, 0.1), sigmoid(logits)
    expected = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    np.testing.assert_allclose(cross_entropy(logits, labels, 1.0, 0.2), expected, rtol=1e-5)
    found = cross_entropy(logits, labels, weights, 0.2)
    np.testing.assert_allclose(found, np.asarray(weights) * expected, rtol=1e-5)


def test_binary_reports_the_answer_and_minimizes_the_second_head_too() -> None:
    logits, second = jnp.asarray([-1.0, 0.0, 2.0, -3.0]), drawn(4, seed=1)
    batch = Batch(
        jnp.zeros((4, 2, 2), jnp.uint8), jnp.asarray([0, 1, 0, 1]), jnp.asarray([0, 1, -1, 1])
    )
    objective = Binary((2.0, 0.5), label_smoothing=0.2, auxiliary=0.3)
    assert tuple(objective.collections) == (AUXILIARY,)
    images, targets = objective.prepare(KEY, unmoved, batch)
    assert images.shape == (4, 2, 2, 1)
    kept = {AUXILIARY: {"logits": (second,)}}
    found = objective.losses(logits, kept, targets)
    weights = jnp.asarray([2.0, 0.5, 2.0, 0.5])
    own = cross_entropy(logits, batch.labels, weights, 0.2)
    more = cross_entropy(second, batch.auxiliary, weights, 0.2) * jnp.asarray([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(found.reported, own, rtol=1e-6)
    np.testing.assert_allclose(found.minimized, own + 0.3 * more, rtol=1e-6)
    np.testing.assert_array_equal(found.correct, [True, True, False, False])  # 0 is positive
    with pytest.raises(AssertionError, match=r"needs Batch\.auxiliary"):
        objective.losses(logits, kept, (*targets[:-1], None))


def test_figures_of_two_classes_weigh_nothing() -> None:
    logits, labels = np.asarray(drawn(40)), np.arange(40) % 3 // 2
    found = Binary((5.0, 0.1), label_smoothing=0.3).figures(logits, labels)
    assert found["loss"] == pytest.approx(log_loss(labels, sigmoid(logits)), rel=1e-5)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, logits))
    assert found["accuracy"] == pytest.approx(((logits >= 0) == (labels == 1)).mean())


def test_softmax_weighs_and_smooths_each_class() -> None:
    outputs, labels = drawn(5, 3), jnp.asarray([0, 2, 1, 2, 0])
    batch = Batch(jnp.full((5, 2, 2), 255, jnp.uint8), labels)
    p = np.exp(np.asarray(outputs, float))
    p /= p.sum(1, keepdims=True)
    for weights, each in ((jnp.asarray([1.0, 2.0, 0.5]), [1, 0.5, 2, 0.5, 1]), (3.0, [3] * 5)):
        objective = Softmax(weights, label_smoothing=0.3)
        assert tuple(objective.collections) == ()
        images, targets = objective.prepare(KEY, unmoved, batch)
        np.testing.assert_array_equal(images, 1)
        found = objective.losses(outputs, {}, targets)
        smooth = 0.7 * np.eye(3)[np.asarray(labels)] + 0.1
        expected = np.asarray(each) * -(smooth * np.log(p)).sum(1)
        np.testing.assert_allclose(found.minimized, expected, rtol=1e-5)
        np.testing.assert_array_equal(found.reported, found.minimized)
        np.testing.assert_array_equal(found.correct, p.argmax(1) == labels)


def test_figures_of_several_classes_are_those_of_scikit_learn() -> None:
    outputs, labels = np.asarray(drawn(30, 4)), np.arange(30) % 4
    p = np.exp(outputs.astype(float))
    p /= p.sum(1, keepdims=True)
    found = Softmax(jnp.asarray([9.0, 1.0, 1.0, 1.0])).figures(outputs, labels)
    assert found["loss"] == pytest.approx(log_loss(labels, p), rel=1e-5)
    assert found["accuracy"] == pytest.approx((p.argmax(1) == labels).mean())
    large = np.array([[2000.0, 0.0], [0.0, 0.0]], np.float32)
    expected = pytest.approx({"loss": (2000 + np.log(2)) / 2, "accuracy": 0.5})
    found = Softmax().figures(large, np.array([1, 0]))
    assert {name: found[name] for name in ("loss", "accuracy")} == expected


def test_by_default_no_class_weighs_more() -> None:
    batch = Batch(jnp.zeros((2, 2, 2), jnp.uint8), jnp.asarray([0, 1]))
    one, two = jnp.ones(2), jnp.asarray([[0.0, 1.0], [0.0, 1.0]])
    for objective, outputs in ((Binary(), one), (Softmax(), two)):
        _, targets = objective.prepare(KEY, unmoved, batch)
        found = objective.losses(outputs, {}, targets)
        np.testing.assert_allclose(found.minimized, np.log1p(np.exp([1, -1])), rtol=1e-6)


def test_maps_are_averaged_over_blocks() -> None:
    maps = np.random.default_rng(0).random((2, 6, 8)).astype(np.float32)
    expected = [
        [[one[3 * i : 3 * i + 3, 2 * j : 2 * j + 2].mean() for j in range(4)] for i in range(2)]
        for one in maps
    ]
    np.testing.assert_allclose(averaged_to(jnp.asarray(maps), (2, 4)), expected, rtol=1e-6)


def test_segmentation_is_cross_entropy_and_dice() -> None:
    outputs = jnp.concatenate([drawn(2, 3, 4), jnp.full((1, 3, 4), 9.0)])
    labels = np.random.default_rng(1).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    labels[2] = 255
    objective = Segmentation(smooth=0.05)
    assert tuple(objective.collections) == ()
    batch = Batch(jnp.asarray(labels // 2), jnp.asarray(labels))
    images, targets = objective.prepare(KEY, unmoved, batch)
    np.testing.assert_allclose(images[..., 0], (labels // 2) / 255, rtol=1e-6)
    np.testing.assert_allclose(targets, labels / 255, rtol=1e-6)
    maps = np.asarray(averaged_to(targets, (3, 4)), float)
    p = sigmoid(outputs)
    entropy = -(maps * np.log(p) + (1 - maps) * np.log(1 - p)).mean((1, 2))
    both, either = (p * maps).mean((1, 2)), p.mean((1, 2)) + maps.mean((1, 2))
    dice = (2 * both + 0.05) / (either + 0.05)
    found = objective.losses(outputs, {}, targets)
    np.testing.assert_allclose(found.minimized, entropy + 1 - dice, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.reported, found.minimized)
    np.testing.assert_array_equal(found.correct, [False, False, True])
    figures = objective.figures(np.asarray(outputs), labels)
    assert figures["loss"] == pytest.approx((entropy + 1 - dice).mean(), rel=1e-4)
    assert figures["accuracy"] == pytest.approx(1 / 3)


def test_a_dice_coefficient_of_nine_tenths_is_right() -> None:
    targets = jnp.ones((2, 1, 1))
    p = jnp.asarray([0.83, 0.81])  # Dice is 2 p / (1 + p): 0.907 and 0.895
    found = Segmentation(smooth=0.0).losses(jnp.log(p / (1 - p))[:, None, None], {}, targets)
    np.testing.assert_array_equal(found.correct, [True, False])


def test_an_empty_picture_needs_an_empty_map() -> None:
    """The smoothing of the Dice loss is small against one percent of the pixels."""
    logits = jnp.log(jnp.asarray([0.01, 1e-6]))[:, None, None]
    found = Segmentation().losses(logits, {}, jnp.zeros((2, 1, 1)))
    np.testing.assert_allclose(found.minimized, [0.01 + 1 - 1 / 11, 1e-3], atol=1e-3)


def test_the_objective_of_a_config_depends_on_the_classes() -> None:
    config = TrainConfig(label_smoothing=0.1, mixup=0.2, auxiliary=0.3)
    labels, names = np.array([0, 0, 0, 1]), ("NORMAL", "PNEUMONIA")
    assert objective_of(config, names, labels) == Binary((2 / 3, 2.0), 0.1, 0.2, 0.3)
    alike = replace(config, class_weights=False)
    assert objective_of(alike, names, labels) == Binary((1.0, 1.0), 0.1, 0.2, 0.3)
    causes = objective_of(config, ("BACTERIA", "VIRUS"), labels)  # what the head would tell
    assert causes == Binary((2 / 3, 2.0), 0.1, 0.2, 0.0)
    three = objective_of(config, ("A", "B", "C"), np.array([0, 0, 1, 2]))
    assert isinstance(three, Softmax)
    np.testing.assert_allclose(three.class_weights, [2 / 3, 4 / 3, 4 / 3], rtol=1e-6)
    assert (three.label_smoothing, three.mixup) == (0.1, 0.2)
