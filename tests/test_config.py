"""A config is what its file says, and nothing else is let in."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OperatingConfig,
    TrainConfig,
    differences,
    expect_effect,
    from_json,
    to_json,
)
from cnnjax.errors import InputError


def test_file_and_back() -> None:
    config = Config(
        workdir=Path("somewhere"),
        seed=3,
        data=DataConfig(root="x.zip", cache=Path("c"), size=96),
        model=ModelConfig("resnet", width=8),
    )
    assert from_json(to_json(config), "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["train"].update(speed=3), "config.json has unknown key train.speed"),
        (lambda d: d.pop("seed"), "config.json has no seed"),
        (lambda d: d.update(train=3), "train. must be an object"),
        (lambda d: d["train"].update(epochs="many"), "train.epochs must be"),
        (lambda d: d["model"].update(name="vgg"), "model.name must be"),
    ],
)
def test_what_is_not_a_config(change: object, message: str) -> None:
    values = json.loads(to_json(Config()))
    change(values)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        from_json(json.dumps(values), "config.json")


def test_no_json() -> None:
    with pytest.raises(InputError, match=r"config.json is not valid JSON"):
        from_json("{", "config.json")


def test_the_config_of_a_run_of_version_0_2_can_be_read() -> None:
    path = Path(__file__).parent / "config-0.2.json"
    before = from_json(path.read_text("utf-8"), "config.json")
    assert before == Config()
    assert differences(Config(), before) == []


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: DataConfig(size=4), "--data.size"),
        (lambda: DataConfig(folds=1), "--data.folds"),
        (lambda: DataConfig(fold=5), "--data.fold"),
        (lambda: ModelConfig(channels=2), "--model.channels"),
        (lambda: ModelConfig(local_contrast=True), "--model.local-contrast needs"),
        (lambda: AugmentConfig(zoom=1.0), "--augment.zoom"),
        (lambda: TrainConfig(batch=0), "--train.batch"),
        (lambda: TrainConfig(learning_rate=0), "--train.learning-rate"),
        (lambda: TrainConfig(weight_decay=0.1), "--train.weight-decay needs"),
        (lambda: DeviceConfig(count=-1), "--device.count"),
        (lambda: Config(seed=-1), "--seed"),
        (lambda: OperatingConfig(cost=math.inf), "--operating.cost must be a finite number"),
        (lambda: Config(workdir=Path("~/runs/a")), "--workdir ~/runs/a begins with ~"),
        (lambda: TrainConfig(optimizer="rmsprop"), "--train.optimizer must be adam | adamw | sgd"),
        (
            lambda: ModelConfig("Baseline"),
            "--model.name must be baseline, resnet or",
        ),
        (lambda: TrainConfig(epochs=2.5), "--train.epochs must be int, got 2.5"),
        (lambda: Config(data=DataConfig(size=8)), "--data.size must be at least 10"),
    ],
)
def test_values_out_of_range_name_their_flag(make: object, flag: str) -> None:
    with pytest.raises(InputError, match=re.escape(flag)):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(train=TrainConfig(warmup=3)),
            "--train.warmup needs --train.schedule cosine",
        ),
        (
            Config(operating=OperatingConfig(sensitivity=0.99)),
            "--operating.sensitivity needs --operating.criterion sensitivity",
        ),
        (
            Config(operating=OperatingConfig(prevalence=0.1)),
            "--operating.prevalence needs --operating.criterion cost",
        ),
    ],
)
def test_a_flag_without_effect_names_the_one_it_needs(config: Config, message: str) -> None:
    assert from_json(to_json(config), "config.json") == config  # a run that has it can be read
    with pytest.raises(InputError, match=re.escape(message)):
        expect_effect(config)


def test_numbers_of_numpy_and_paths_as_text_are_taken() -> None:
    config = Config(
        workdir="runs/x",  # type: ignore[arg-type]
        seed=np.arange(3)[1],
        data=DataConfig(root=Path("films"), cache="c"),  # type: ignore[arg-type]
        model=ModelConfig(standardize=np.bool_(True)),  # type: ignore[arg-type]
        train=TrainConfig(learning_rate=jnp.float32(0.5)),
    )
    assert config.workdir == Path("runs/x")
    assert config.data == DataConfig(root="films", cache=Path("c"))
    assert from_json(to_json(config), "config.json") == config
    assert '"seed": 1,' in to_json(config)


def test_differences_are_those_that_change_the_outcome() -> None:
    theirs = Config()
    ours = replace(
        theirs,
        workdir=Path("elsewhere"),
        device=DeviceConfig("cpu", 2),
        data=replace(theirs.data, root="moved", fold=1),
        train=replace(theirs.train, learning_rate=0.1),
    )
    assert differences(theirs, theirs) == []
    assert differences(ours, theirs) == [
        "--data.fold 1 (was 0)",
        "--train.learning-rate 0.1 (was 0.001)",
    ]
