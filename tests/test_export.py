"""What is exported gives our logits in a process that has none of our code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cnnjax import cli
from cnnjax.config import AugmentConfig, Config, DataConfig, DeviceConfig, ModelConfig, TrainConfig
from cnnjax.evaluation.predict import Predictor
from cnnjax.machine import devices
from cnnjax.train import fit


def trained(folder: Path, tree: Path, model: ModelConfig) -> Path:
    fit(
        Config(
            workdir=folder,
            data=DataConfig(root=str(tree), size=24),
            model=model,
            augment=AugmentConfig(0, 0, True),
            train=TrainConfig(epochs=1, batch=16),
        )
    )
    return folder


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ModelConfig("resnet", width=4, stages=2, standardize=True, local_contrast=True)
    return trained(tmp_path_factory.mktemp("exported") / "run", tree, model)


@pytest.fixture(scope="module")
def post(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the other network, which pools."""
    return trained(tmp_path_factory.mktemp("exported") / "post", tree, ModelConfig())


def exported(run: Path, form: str, out: Path) -> dict[str, object]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "--run", str(run), "--format", form, str(out)])
    assert ended.value.code == 0
    return json.loads(out.with_name(out.name + ".json").read_text())


def test_stablehlo_runs_without_our_code(run: Path, tmp_path: Path) -> None:
    program = tmp_path / "network.stablehlo"
    # In a process of its own, which has one device and thus oneDNN where there is any.
    main = "from cnnjax.cli import main; main()"
    command = [sys.executable, "-c", main, "export", "--run", str(run), str(program)]
    subprocess.run(command, check=True, capture_output=True)
    about = json.loads((tmp_path / "network.stablehlo.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["input"]["shape"] == ["batch", 24, 24]
    predictor = Predictor.open(run, devices.make_mesh(DeviceConfig()))
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 24), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    foreign = (
        "import sys, pathlib, numpy as np, jax\n"
        "sys.modules['cnnjax'] = sys.modules['flax'] = None\n"
        "program = jax.export.deserialize(pathlib.Path('network.stablehlo').read_bytes())\n"
        "images = np.load('images.npy')\n"
        "np.save('found.npy', [program.call(images[:n])[n - 1] for n in (1, 5)])\n"
    )
    subprocess.run([sys.executable, "-c", foreign], check=True, cwd=tmp_path)
    expected = predictor.logits(images)[[0, 4]]
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-4)
    point = predictor.operating
    told = about["output"]
    assert (told["slope"], told["bias"]) == (point.slope, point.bias)


def test_stablehlo_multiplies_float32_in_full_everywhere(post: Path, tmp_path: Path) -> None:
    exported(post, "stablehlo", tmp_path / "network")
    program = jax.export.deserialize(bytearray((tmp_path / "network").read_bytes()))
    text = program.mlir_module()
    assert "HIGHEST" in text
    assert "DEFAULT" not in text
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24), dtype=np.uint8)
    expected = Predictor.open(post, devices.make_mesh(DeviceConfig())).logits(images)
    np.testing.assert_allclose(program.call(images), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["run", "post"])
def test_onnx_runs_in_onnxruntime(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pytest.importorskip("jax2onnx", reason="the extra onnx is not installed")
    run = request.getfixturevalue(name)
    program = tmp_path / "network.onnx"
    about = exported(run, "onnx", program)
    assert about["opset"] == 18
    images = np.random.default_rng(1).integers(0, 256, (5, 24, 24), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    foreign = (
        "import sys, numpy as np, onnxruntime\n"
        "sys.modules['cnnjax'] = sys.modules['jax'] = None\n"
        "session = onnxruntime.InferenceSession('network.onnx')\n"
        "images = np.load('images.npy')\n"
        "found = [session.run(['logits'], {'images': images[:n]})[0][n - 1] for n in (1, 5)]\n"
        "np.save('found.npy', found)\n"
    )
    subprocess.run([sys.executable, "-c", foreign], check=True, cwd=tmp_path)
    predictor = Predictor.open(run, devices.make_mesh(DeviceConfig()))
    expected = predictor.logits(images)[[0, 4]]
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "module", "extra"),
    [("onnx", "jax2onnx", "onnx"), ("safetensors", "safetensors", "export")],
)
def test_what_is_not_installed_is_named(
    run: Path,
    tmp_path: Path,
    form: str,
    module: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "--run", str(run), "--format", form, str(tmp_path / "x")])
    assert ended.value.code == 2
    assert f"pip install 'cnnjax[{extra}]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_safetensors_hold_every_weight(run: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    about = exported(run, "safetensors", tmp_path / "weights.safetensors")
    assert about["format"] == "safetensors"
    found = load_file(tmp_path / "weights.safetensors")
    predictor = Predictor.open(run, devices.make_mesh(DeviceConfig()))
    params = predictor.members[0].params
    np.testing.assert_array_equal(found["0/params/head/kernel"], params["head"]["kernel"])
    assert sum(value.size for name, value in found.items() if "/params/" in name) == sum(
        value.size for layer in params.values() for value in _leaves(layer)
    )


def _leaves(tree: object) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in _leaves(branch)]
    return [np.asarray(tree)]
