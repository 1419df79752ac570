"""Weights to start from, what is left as it is, layer-wise rates, and going on for more epochs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import Predictor
from cnnjax.config import AugmentConfig, Config, DataConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.data.prepare import TrainingData, data_of
from cnnjax.errors import InputError
from cnnjax.evaluation.export import export
from cnnjax.machine.devices import make_mesh
from cnnjax.networks import ResNet
from cnnjax.networks.variables import flatten
from cnnjax.objectives import Batch
from cnnjax.optimizers import layers_of, make_optimizer, schedule_of
from cnnjax.run import initial, release
from cnnjax.run.checkpoint import Checkpoints
from cnnjax.steps import init_state, make_train_step
from cnnjax.train import fit

SIZE = 16
MODEL = ModelConfig("resnet", width=4, stages=2)
TINY = 1e-20  # a learning rate that changes no float32 weight


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """Squares of noise, those of label 1 brighter on the left."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2
    images = rng.integers(0, 120, (48, SIZE, SIZE), dtype=np.uint8)
    images[labels == 1, :, : SIZE // 2] += 100
    return data_of(images, labels, np.arange(48) >= 36, ("dark", "bright"))


def config_for(run: Path, model: ModelConfig = MODEL, **train: Any) -> Config:
    options = {"epochs": 1, "batch": 12, "learning_rate": 1e-2, "precision": "float32", **train}
    return Config(
        workdir=run,
        data=DataConfig(size=SIZE),
        model=model,
        augment=AugmentConfig(shear=0, zoom=0, flip=False),
        train=TrainConfig(**options),
        device=DeviceConfig(count=1),
    )


def arrays_of(run: Path, kind: Any = "best") -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(run / "checkpoints")
    arrays = flatten(checkpoints.variables(kind))
    checkpoints.close()
    return arrays


@pytest.fixture(scope="module")
def trained(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    run = tmp_path_factory.mktemp("trained") / "run"
    fit(config_for(run), data=data)
    return run


def params_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in arrays.items() if name.startswith("params/")}


def test_a_run_starts_from_the_weights_of_another(
    data: TrainingData, trained: Path, tmp_path: Path
) -> None:
    before = params_of(arrays_of(trained))
    config = config_for(tmp_path / "run", learning_rate=TINY, init=str(trained))
    fit(config, data=data)
    after = params_of(arrays_of(config.workdir))
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    told = json.loads((config.workdir / "init.json").read_text())
    assert told["drawn"] == told["left_out"] == []
    assert "head" in told["copied"]
    # The source is not needed to go on.
    shutil.move(trained, tmp_path / "away")
    try:
        fit(replace(config, train=replace(config.train, extend=1)), data=data)
    finally:
        shutil.move(tmp_path / "away", trained)


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_a_file_holds_the_weights_of_a_run(form: Any, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / f"weights.{form}"
    if form == "safetensors":
        export(Predictor.open(trained, make_mesh(DeviceConfig(count=1)), views=1), form, source)
    else:
        np.savez(source, **arrays_of(trained))
    expected = initial.read(str(trained), 0).arrays
    found = initial.read(str(source), 0).arrays
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_new_head_leaves_the_backbone(
    data: TrainingData, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(
        tmp_path / "run",
        replace(MODEL, standardize=True),
        learning_rate=TINY,
        init=str(trained),
        init_without="head",
    )
    fit(config, data=data)
    before, after = arrays_of(trained), arrays_of(config.workdir)
    np.testing.assert_array_equal(after["params/stem/kernel"], before["params/stem/kernel"])
    assert (after["params/head/kernel"] != before["params/head/kernel"]).any()
    shown = capsys.readouterr().out
    assert "initialized randomly: head\n" in shown
    assert "left out: head\n" in shown
    assert "note: these weights were trained with --model.no-standardize" in shown


def test_three_classes_start_from_the_backbone_of_two(trained: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (36, 24, 24), dtype=np.uint8)  # another size, too
    three = data_of(images, np.arange(36) % 3, np.arange(36) >= 24, ("a", "b", "c"))
    config = config_for(tmp_path / "run", init=str(trained))
    config = replace(config, data=DataConfig(size=24))
    fit(config, data=three)
    told = json.loads((config.workdir / "init.json").read_text())
    assert told["drawn"] == told["left_out"] == ["head"]
    assert "stage2_block1/conv1" in told["copied"]


def test_the_released_network_that_never_saw_the_fold(tmp_path: Path) -> None:
    released = release.read()
    for fold in (0, 1, len(released.members)):
        weights = initial.read("released", fold)
        member = released.members[fold % len(released.members)]
        np.testing.assert_array_equal(
            weights.arrays["params/stem/kernel"], member["params"]["stem"]["kernel"]
        )


def test_what_cannot_serve_is_refused(data: TrainingData, trained: Path, tmp_path: Path) -> None:
    def refused(reason: str, model: ModelConfig = MODEL, **train: Any) -> None:
        with pytest.raises(InputError, match=reason):
            fit(config_for(tmp_path / "run", model, **train), data=data)

    refused(
        r"no layer of the best checkpoint of .* --model\.name resnet",
        ModelConfig(),
        init=str(trained),
    )
    refused("is not a run, a release, a .safetensors or an .npz file", init=str(tmp_path / "none"))
    refused(r"is not a run: it has no config\.json", init=str(tmp_path))
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    refused(r"broken\.npz cannot be read", init=str(tmp_path / "broken.npz"))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    refused(r"broken\.safetensors cannot be read", init=str(tmp_path / "broken.safetensors"))
    refused("--train.init-without needs --train.init", init_without="head")
    refused(r"--train\.freeze 'nothing' matches none of", freeze="nothing")
    refused(r"--train\.freeze '\.' matches all of", freeze=".")
    with pytest.raises(InputError, match=r"--train\.freeze '\(' is not a valid regular expression"):
        TrainConfig(freeze="(")
    with pytest.raises(InputError, match=r"--train\.layer-decay must be in \(0, 1\]"):
        TrainConfig(layer_decay=0)


def test_frozen_parameters_stay_and_their_statistics_go_on(
    data: TrainingData, trained: Path, tmp_path: Path
) -> None:
    config = config_for(
        tmp_path / "run",
        optimizer="adamw",
        weight_decay=0.1,
        init=str(trained),
        freeze="^stem|norm",
        clip_norm=1.0,
        ema=0.9,
    )
    fit(config, data=data)
    before, after = arrays_of(trained), arrays_of(config.workdir, "latest")
    for name, value in params_of(before).items():
        frozen = bool(re.search("^stem|norm", name.removeprefix("params/")))
        assert np.array_equal(after[name], value) == frozen, name
    mean = "batch_stats/stem_norm/mean"
    assert not np.array_equal(after[mean], before[mean])
    # It goes on where it was stopped: the state of frozen parameters is none.
    fit(replace(config, train=replace(config.train, extend=1)), data=data)


def test_the_gradient_of_what_is_frozen_is_not_taken() -> None:
    """The backward pass ends at the lowest trained layer: fewer convolutions are compiled."""
    network, config = ResNet(width=4, stages=2), TrainConfig(freeze="^(stem|stage1)")

    def convolutions(freeze: str) -> int:
        optimizer, _ = make_optimizer(replace(config, freeze=freeze), 1)
        step = make_train_step(network, optimizer, lambda _, x: x, freeze=freeze)
        state = jax.eval_shape(lambda k: init_state(network, optimizer, k, SIZE), jax.random.key(0))
        batch = Batch(
            jax.ShapeDtypeStruct((2, SIZE, SIZE), jnp.uint8), jax.ShapeDtypeStruct((2,), jnp.int32)
        )
        traced = jax.make_jaxpr(step)(state, batch, jax.random.key(0))
        return str(traced).count("conv_general_dilated")

    assert convolutions(config.freeze) < convolutions("")


def test_the_learning_rate_of_a_layer_is_a_share_of_the_one_above() -> None:
    network = ResNet(width=2, stages=2)
    layers = layers_of(network, SIZE)
    assert layers == ("stem", "stem_norm", "stage1_block1", "stage2_block1", "head")
    config = TrainConfig(optimizer="sgd", learning_rate=1.0, layer_decay=0.5)
    optimizer, _ = make_optimizer(config, 1, lambda rate: optax.sgd(rate), layers)
    params = {name: {"kernel": jnp.zeros(2)} for name in layers}
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    found = {name: float(update["kernel"][0]) for name, update in updates.items()}
    assert found == {name: -(0.5 ** (4 - i)) for i, name in enumerate(layers)}


@pytest.mark.slow
def test_a_run_is_extended_as_if_it_had_been_longer(data: TrainingData, tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", epochs=2)
    fit(config, data=data)
    with pytest.raises(InputError, match=r"to add epochs, --train\.extend 2\)"):
        fit(replace(config, train=replace(config.train, epochs=4)), data=data)
    for extend in (1, 2):
        longer = replace(config, train=replace(config.train, extend=extend))
        assert fit(longer, data=data).summary["epochs"] == 2 + extend
    with pytest.raises(InputError, match=r"--train\.extend 1 \(was 2\)"):
        fit(replace(config, train=replace(config.train, extend=1)), data=data)
    whole = config_for(tmp_path / "whole", epochs=4)
    fit(whole, data=data)
    lines = [(c.workdir / "metrics.jsonl").read_text() for c in (config, whole)]
    assert lines[0] == lines[1]
    for name, value in arrays_of(config.workdir, "latest").items():
        np.testing.assert_array_equal(value, arrays_of(whole.workdir, "latest")[name])


def test_a_cosine_schedule_begins_anew_once(data: TrainingData, tmp_path: Path) -> None:
    train = TrainConfig(epochs=3, extend=2, schedule="cosine", learning_rate=1.0, warmup=1.0)
    once, again = schedule_of(replace(train, extend=0), 10), schedule_of(train, 10)
    assert [float(again(i)) for i in range(30)] == [float(once(i)) for i in range(30)]
    restarted = [float(again(i)) for i in range(30, 50)]
    assert restarted[0] == 0
    assert restarted[10] == 1
    assert restarted[-1] == pytest.approx(0, abs=0.03)
    config = config_for(tmp_path / "run", schedule="cosine")
    fit(config, data=data)
    fit(replace(config, train=replace(config.train, extend=1)), data=data)
    with pytest.raises(InputError, match=r"--train\.extend 2 \(was 1\)"):
        fit(replace(config, train=replace(config.train, extend=2)), data=data)
