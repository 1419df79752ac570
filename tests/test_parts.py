"""Networks, objectives, data and variables of the user's own go through `fit`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import Predictor
from cnnjax.config import AugmentConfig, Config, DataConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.data.prepare import TrainingData, data_of
from cnnjax.errors import InputError
from cnnjax.machine.devices import make_mesh
from cnnjax.networks import make_model
from cnnjax.objectives import Softmax
from cnnjax.train import fit

SIZE = 16


class Plain(nn.Module):
    """Dense layers and nothing else."""

    width: int = 8

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Dense(self.width)(images.reshape(len(images), -1)))
        return nn.Dense(1)(x)[:, 0]


class WithDropout(nn.Module):
    """It asks for a key."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = images.reshape(len(images), -1)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(16)(x)))
        return nn.Dense(1)(x)[:, 0]


class WithBatchNorm(nn.Module):
    """Flax's own, with statistics."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Conv(8, (3, 3), strides=2)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        return nn.Dense(1)(x)[:, 0]


class ThreeLogits(nn.Module):
    """One for each of three classes."""

    classes: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(self.classes)(images.reshape(len(images), -1))


class ConvNeXt(nn.Module):
    """A patch embedding and a block of Liu et al., CVPR 2022 (arXiv:2201.03545)."""

    width: int = 8

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.LayerNorm()(nn.Conv(self.width, (4, 4), strides=4)(images))
        y = nn.Conv(self.width, (7, 7), feature_group_count=self.width)(x)
        y = nn.Dense(4 * self.width)(nn.LayerNorm()(y))
        y = nn.Dense(self.width)(nn.gelu(y))
        x = x + y * self.param("scale", nn.initializers.constant(0.1), (self.width,))
        return nn.Dense(1)(x.mean((1, 2)))[:, 0]


class VisionTransformer(nn.Module):
    """Patches, one encoder block and a mean (Dosovitskiy et al., arXiv:2010.11929)."""

    width: int = 8
    heads: int = 2

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width, (4, 4), strides=4)(images)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dropout_rate=0.1)(
            y, deterministic=not train
        )
        x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(1)(nn.LayerNorm()(x).mean(1))[:, 0]


@pytest.fixture(scope="module")
def make_data() -> Callable[[int], TrainingData]:
    """Squares of noise, brighter in another corner for each class."""

    def make(classes: int) -> TrainingData:
        rng = np.random.default_rng(0)
        labels = np.arange(60) % classes
        images = rng.integers(0, 100, (60, SIZE, SIZE), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[8 * (label // 2) :, 8 * (label % 2) :][:8, :8] += 120
        names = tuple(f"class{k}" for k in range(classes))
        patients = [f"patient{i // 2}" for i in range(60)]
        return data_of(images, labels, np.arange(60) >= 44, names, patients=patients)

    return make


def config_for(run: Path, **train: Any) -> Config:
    options = {"epochs": 4, "batch": 12, "learning_rate": 1e-2, "precision": "float32", **train}
    return Config(
        workdir=run,
        data=DataConfig(size=SIZE),
        augment=AugmentConfig(shear=0, zoom=0, flip=False),
        train=TrainConfig(**options),
        device=DeviceConfig(count=1),
    )


@pytest.mark.filterwarnings("ignore:.*dtype promotion")
@pytest.mark.parametrize(
    "network",
    [Plain(), WithDropout(), WithBatchNorm(), ConvNeXt(), VisionTransformer()],
    ids=lambda network: type(network).__name__,
)
def test_a_network_of_ones_own_is_trained_and_found_again(
    make_data: Callable[[int], TrainingData], tmp_path: Path, network: Any
) -> None:
    with jax.numpy_dtype_promotion("standard"):
        config, data = config_for(tmp_path / "run"), make_data(2)
        result = fit(config, data=data, network=network)
        losses = [
            json.loads(line)["train"]["loss"]
            for line in (config.workdir / "metrics.jsonl").read_text().splitlines()
        ]
        assert losses[-1] < losses[0]
        predictor = Predictor.open(config.workdir, make_mesh(config.device), "latest")
        assert predictor.model == network
        logits = predictor.logits(np.asarray(data.decoded.images[data.validation]))
        with pytest.raises(InputError, match="names no feature maps for heat maps"):
            predictor.heat(np.asarray(data.decoded.images[:1]))
    assert np.isfinite(logits).all()
    assert result.last.n == 16


def test_three_classes(make_data: Callable[[int], TrainingData], tmp_path: Path) -> None:
    config, data = config_for(tmp_path / "run", epochs=4), make_data(3)
    result = fit(config, data=data, network=ThreeLogits(), objective=Softmax())
    assert result.classes == ("class0", "class1", "class2")
    assert result.summary["last"]["accuracy"] > 0.8
    assert set(result.summary["last"]) == {"loss", "accuracy"}
    with pytest.raises(InputError, match=r"trained with cnnjax\.objectives:Softmax; only runs of"):
        Predictor.open(config.workdir)


def test_a_run_is_gone_on_with_by_the_same_parts_alone(
    make_data: Callable[[int], TrainingData], tmp_path: Path
) -> None:
    config, data = config_for(tmp_path / "run", epochs=1), make_data(2)
    fit(config, data=data, network=Plain(4))
    fit(config, data=data, network=Plain(4))
    with pytest.raises(
        InputError,
        match=r"another network: .*Plain\(width=8\) \(was .*Plain\(width=4\)\); give the same",
    ):
        fit(config, data=data, network=Plain(8))
    with pytest.raises(InputError, match=r"another network: that of the config \(was "):
        fit(config, data=data)


def test_a_network_that_cannot_be_made_again_is_asked_for(
    make_data: Callable[[int], TrainingData], tmp_path: Path
) -> None:
    class Local(Plain):
        pass

    config, data = config_for(tmp_path / "run", epochs=1), make_data(2)
    fit(config, data=data, network=Local())
    with pytest.raises(InputError, match=r"call from Python with network=\.\.\."):
        Predictor.open(config.workdir)
    mesh = make_mesh(config.device)
    images = np.asarray(data.decoded.images[:3])
    assert Predictor.of_run(config.workdir, mesh, network=Local()).logits(images).shape == (3,)


def test_variables_to_start_from(make_data: Callable[[int], TrainingData], tmp_path: Path) -> None:
    data = make_data(2)
    config = replace(
        config_for(tmp_path / "run", epochs=1, learning_rate=1e-9),
        model=ModelConfig("resnet", width=2, stages=1),
    )
    model = make_model(config.model)
    init = jax.jit(model.init)(jax.random.key(9), jnp.zeros((1, SIZE, SIZE, 1)))
    fit(config, data=data, init=init)
    mesh = make_mesh(config.device)
    kept = Predictor.of_run(config.workdir, mesh, "latest").members[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, init["params"])
    other = jax.jit(model.clone(width=3).init)(jax.random.key(9), jnp.zeros((1, SIZE, SIZE, 1)))
    with pytest.raises(InputError, match=r"init does not fit the network: \['batch_stats'\]"):
        fit(replace(config, workdir=tmp_path / "other"), data=data, init=other)


def test_data_that_do_not_fit_together_are_refused() -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    side = np.array([0, 0, 1, 1], bool)
    data_of(images, labels, side, ("A", "B"))
    with pytest.raises(InputError, match="must be uint8"):
        data_of(images.astype(float), labels, side, ("A", "B"))
    with pytest.raises(InputError, match="each show all of"):
        data_of(images, labels, np.array([0, 1, 0, 1], bool), ("A", "B"))
    with pytest.raises(InputError, match="patient p is both"):
        data_of(images, labels, side, ("A", "B"), patients=["p", "q", "p", "r"])
    with pytest.raises(InputError, match="of 4 images"):
        data_of(images, labels[:3], side, ("A", "B"))
