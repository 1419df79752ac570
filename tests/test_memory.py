"""What saves memory: parts of a batch, recomputed activations, sharded optimizer states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import radiograph

from cnnjax import Config, InputError, fit
from cnnjax.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from cnnjax.data.prepare import TrainingData, data_of
from cnnjax.networks import make_model
from cnnjax.objectives import Batch, Binary
from cnnjax.run.opening import open_run
from cnnjax.steps import init_state, make_train_step

BASELINE = ModelConfig("baseline")
RESNET = ModelConfig("resnet", width=4, stages=2)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    images = np.stack([radiograph(rng, i % 2 == 1, 16) for i in range(16)])
    weights = rng.uniform(0.5, 1.5, 16).astype(np.float32)
    return Batch(jnp.asarray(images), jnp.arange(16) % 2, weights=jnp.asarray(weights))


def after(model: ModelConfig, steps: int = 3, remat: bool = False, **how: Any) -> Any:
    """Returns the state after some steps, and the sums of the last."""
    network = make_model(model, remat=remat)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = init_state(network, optimizer, jax.random.key(0), 16)
    assert state.ema is None
    step = make_train_step(network, optimizer, lambda _, x: x, Binary((0.8, 1.2)), **how)
    for _ in range(steps):
        state, sums = step(state, batch(), jax.random.key(1))
    return state, sums


def expect_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_parts_of_a_batch_make_one_gradient() -> None:
    whole, parts = after(BASELINE), after(BASELINE, accumulate=4)
    expect_equal(parts[0].params, whole[0].params)
    expect_equal(parts[1].loss, whole[1].loss)
    assert int(parts[1].images) == 16


def test_batch_norm_sees_each_part() -> None:
    state, _ = after(RESNET, steps=1, accumulate=2)
    network = make_model(RESNET)
    variables = init_state(network, optax.sgd(0.1), jax.random.key(0), 16)
    stats, images = variables.batch_stats, batch().images[..., None].astype(jnp.float32) / 255
    for part in (images[0::2], images[1::2]):
        _, changed = network.apply(
            {"params": variables.params, "batch_stats": stats},
            part,
            train=True,
            mutable=["batch_stats"],
        )
        stats = changed["batch_stats"]
    expect_equal(state.batch_stats, stats)


def test_activations_are_computed_again() -> None:
    kept, again = after(RESNET), after(RESNET, remat=True)
    expect_equal(again, kept)

    def program(remat: bool) -> str:
        network = make_model(RESNET, remat=remat)
        variables = network.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
        images = jnp.zeros((2, 16, 16, 1))
        return str(jax.make_jaxpr(lambda v: network.apply(v, images))(variables))

    assert "remat" in program(True)
    assert "remat" not in program(False)


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def small(workdir: Path, **train: Any) -> tuple[Config, TrainingData]:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    images = np.stack([radiograph(rng, bool(label), 16) for label in labels])
    config = Config(
        workdir=workdir,
        data=DataConfig(size=16),
        model=RESNET,
        augment=AugmentConfig(shear=0, zoom=0, flip=False),
        train=TrainConfig(epochs=2, batch=8, **train),
    )
    return config, data_of(images, labels, np.arange(24) >= 16, ("NORMAL", "PNEUMONIA"))


def test_each_device_keeps_a_part_of_the_optimizer(tmp_path: Path) -> None:
    config, data = small(tmp_path / "parts", shard_optimizer=True)
    with open_run(config, data) as run:
        state = run.first_state()
        kernel = state.opt_state[0].mu["stage2_block1"]["conv2"]["kernel"]
        assert len(kernel.sharding.device_set) == run.mesh.size == 4
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
        assert state.params["stage2_block1"]["conv2"]["kernel"].sharding.is_fully_replicated
    fit(config, data=data)
    whole, data = small(tmp_path / "whole")
    fit(whole, data=data)
    for a, b in zip(lines(tmp_path / "parts"), lines(tmp_path / "whole"), strict=True):
        assert a["train"] == pytest.approx(b["train"], rel=1e-5)
        assert a["validation"] == pytest.approx(b["validation"], rel=1e-5)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"batch": 10, "accumulate": 4}, "--train.batch 10 must be a multiple of"),
        ({"accumulate": 0}, "--train.accumulate must be at least 1"),
    ],
)
def test_flags_that_do_not_fit(train: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TrainConfig(**train)
