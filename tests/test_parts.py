"""Networks, objectives, data and variables of the user's own go through `fit`."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from cnnjax import Predictor
from cnnjax.config import AugmentConfig, Config, DataConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.data.prepare import TrainingData, data_of
from cnnjax.errors import InputError
from cnnjax.evaluation.export import export
from cnnjax.machine.devices import make_mesh
from cnnjax.networks import make_model
from cnnjax.objectives import Binary, Softmax
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


PAGE = Path(__file__).parents[1] / "docs" / "own-networks.md"


@pytest.fixture(scope="module", autouse=True)
def mynets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module that docs/own-networks.md shows, as a file of the user's."""
    folder = tmp_path_factory.mktemp("mynets")
    shown = re.search(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert shown is not None
    (folder / "mynets.py").write_text(shown[1], "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("mynets")
    del sys.modules["mynets"]


def shown_network(name: str) -> nn.Module:
    """One of the page's networks, made small."""
    classes = importlib.import_module("mynets")
    small = {"width": 8, "blocks": 1, "patch": 4}
    return getattr(classes, name)(**small | ({"heads": 2} if name == "ViT" else {}))


class TwoColumns(Plain):
    """It forgets to take the only column."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(1)(images.reshape(len(images), -1))


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
    "make",
    [Plain, WithDropout, WithBatchNorm, *(partial(shown_network, n) for n in ("ConvNeXt", "ViT"))],
    ids=["Plain", "WithDropout", "WithBatchNorm", "ConvNeXt", "ViT"],
)
def test_a_network_of_ones_own_is_trained_and_found_again(
    make_data: Callable[[int], TrainingData], tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    network = make()
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


@pytest.mark.filterwarnings("ignore:.*dtype promotion")
def test_a_network_named_on_the_command_line_is_found_again(
    make_data: Callable[[int], TrainingData], tmp_path: Path, mynets: Any
) -> None:
    name = "mynets:ViT(width=8, heads=2, blocks=1, patch=4)"
    arguments = ["--model.name", name, "--train.epochs", "1", "--train.batch", "12"]
    small = config_for(tmp_path / "run")
    config = tyro.cli(Config, default=small, args=arguments)
    data = make_data(2)
    with jax.numpy_dtype_promotion("standard"):
        fit(config, data=data)
        assert json.loads((config.workdir / "config.json").read_text())["model"]["name"] == name
        fit(replace(config, train=replace(config.train, extend=1)), data=data)
        predictor = Predictor.open(config.workdir, make_mesh(config.device), views=1)
        assert predictor.model == mynets.ViT(width=8, heads=2, blocks=1, patch=4)
        images = np.asarray(data.decoded.images[:3])
        export(predictor, "stablehlo", tmp_path / "net")
        program = jax.export.deserialize((tmp_path / "net").read_bytes())
    np.testing.assert_allclose(program.call(images), predictor.logits(images), atol=1e-5)
    assert not (config.workdir / "parts.json").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere:Net", r"cannot be used \(No module named 'nowhere'\)"),
        ("mynets:Nothing", r"cannot be used \(mynets has no Nothing\)"),
        ("mynets:ViT(64)", "must be given as name=value"),
        ("mynets:ViT(width=__import__('os'))", "cannot be used"),
        ("mynets:ViT(width=)", "cannot be used"),
        ("mynets:ViT(depth=3)", "ViT has no field depth; its fields are blocks, dropout, heads"),
        ("subprocess:Popen(args='false')", r"is not a subclass of flax\.linen\.Module"),
        ("mynets:ConvNeXtBlock", "cannot be made: .* 'width'"),
        (f"{__name__}:TwoColumns", r"shape \(2, 1\) for two images.*return the only column"),
    ],
)
def test_a_name_that_cannot_serve_is_refused(
    make_data: Callable[[int], TrainingData], tmp_path: Path, name: str, reason: str
) -> None:
    config = replace(config_for(tmp_path / "run"), model=ModelConfig(name))
    with pytest.raises(InputError, match=reason):
        fit(config, data=make_data(2))
    # The workdir is not taken.
    second = replace(config, train=replace(config.train, auxiliary=0.3))
    with pytest.raises(InputError, match="needs a network with an auxiliary head"):
        fit(second, data=make_data(2), network=Plain())


def black(key: jax.Array, images: jax.Array, level: float = 0.0) -> jax.Array:
    """Leaves nothing of the images."""
    return jnp.full_like(images, level)


def test_an_optimizer_and_an_augmentation_of_ones_own(
    make_data: Callable[[int], TrainingData], tmp_path: Path
) -> None:
    rate = 1e-3
    config, data = config_for(tmp_path / "run", epochs=1, learning_rate=rate), make_data(2)
    init = jax.jit(Plain().init)(jax.random.key(9), jnp.zeros((1, SIZE, SIZE, 1)))
    parts: Any = {"optimizer": partial(optax.lion, weight_decay=0.0), "augment": black}
    fit(config, data=data, network=Plain(), init=init, **parts)
    told = json.loads((config.workdir / "parts.json").read_text())
    assert told["optimizer"]["part"].endswith(":lion")
    assert told["optimizer"]["fields"] == {"weight_decay": 0.0}
    assert told["augment"] == {"part": f"{__name__}:black", "fields": {}}
    after = Predictor.open(config.workdir, make_mesh(config.device), "latest").members[0].params
    moved = jax.tree.map(lambda new, old: np.asarray(new - old) / rate, after, init["params"])
    # Black images have no gradient for what they are multiplied with, and a step of Lion is the
    # learning rate, up or down.
    assert not moved["Dense_0"]["kernel"].any()
    assert moved["Dense_1"]["kernel"].any() or moved["Dense_1"]["bias"].any()
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, leaf.round(), atol=0.01)
    with pytest.raises(InputError, match="another optimizer: that of the config"):
        fit(config, data=data, network=Plain(), augment=black)
    parts |= {"augment": partial(black, level=0.5)}
    with pytest.raises(InputError, match=r"another augment: .*black\(level=0\.5\)"):
        fit(config, data=data, network=Plain(), **parts)
    other = replace(config, workdir=tmp_path / "other")
    with pytest.raises(InputError, match="views 4 would use the config's augmentation"):
        fit(replace(other, augment=AugmentConfig(views=4)), data=data, augment=black)
    decayed = TrainConfig(optimizer="adamw", weight_decay=0.1)
    with pytest.raises(InputError, match="has no effect on optimizer="):
        fit(replace(other, train=decayed), data=data, optimizer=optax.lion)


def test_three_classes(make_data: Callable[[int], TrainingData], tmp_path: Path) -> None:
    config, data = config_for(tmp_path / "run", epochs=4), make_data(3)
    result = fit(config, data=data, network=ThreeLogits(), objective=Softmax())
    assert result.classes == ("class0", "class1", "class2")
    assert result.last.accuracy.value is not None
    assert result.last.accuracy.value > 0.8
    predictor = Predictor.open(config.workdir, make_mesh(config.device), "latest")
    logits = predictor.logits(np.asarray(data.decoded.images[data.validation]))
    called = predictor.operating.decide(logits)
    assert np.mean(called == data.labels[data.validation]) > 0.8


def test_two_classes_with_a_logit_each(
    make_data: Callable[[int], TrainingData], tmp_path: Path
) -> None:
    config, data = config_for(tmp_path / "run", epochs=4), make_data(2)
    result = fit(config, data=data, network=ThreeLogits(2), objective=Softmax())
    assert [len(row) for row in result.last.confusion.counts] == [2, 2]
    predictor = Predictor.open(config.workdir, make_mesh(config.device))
    assert predictor.has_softmax
    assert predictor.logits(np.asarray(data.decoded.images[:3])).shape == (3, 2)


class Own(Softmax):
    """An objective of the user's own."""


def test_predictions_take_runs_of_our_objectives(
    make_data: Callable[[int], TrainingData], tmp_path: Path
) -> None:
    config, data = config_for(tmp_path / "run", epochs=1), make_data(2)
    fit(config, data=data, network=Plain(), objective=Binary())
    assert not Predictor.open(config.workdir, make_mesh(config.device)).has_softmax
    config = replace(config, workdir=tmp_path / "own")
    fit(config, data=make_data(3), network=ThreeLogits(), objective=Own())
    with pytest.raises(InputError, match=r"with test_parts:Own; only runs of the objectives"):
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
    with pytest.raises(InputError, match="patient p is in both"):
        data_of(images, labels, side, ("A", "B"), patients=["p", "q", "p", "r"])
    with pytest.raises(InputError, match="must each have length 4"):
        data_of(images, labels[:3], side, ("A", "B"))
