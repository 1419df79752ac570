"""Three classes from end to end: trained, evaluated, predicted, reported, exported, shown."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference

from cnnjax import Predictor, cli, metrics, report
from cnnjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OperatingConfig,
    TrainConfig,
)
from cnnjax.data.index import read_index
from cnnjax.data.prepare import data_of
from cnnjax.errors import InputError
from cnnjax.evaluation import explain, shifted
from cnnjax.evaluation.predict import FEW
from cnnjax.evaluation.rerender import RENDERINGS
from cnnjax.networks import make_model
from cnnjax.objectives import Batch, Binary, Softmax, class_weights_of
from cnnjax.operating import (
    OperatingPoint,
    SoftmaxPoint,
    fit_calibration,
    fit_operating_point,
    fit_softmax_calibration,
)
from cnnjax.run import release
from cnnjax.run.workdir import Workdir, read_table
from cnnjax.train import fit

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
CLASSES = ("BACTERIA", "NORMAL", "VIRUS")
SIZE = 16


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of noise, brighter in another quarter for each class; NORMAL is the largest."""
    root = tmp_path_factory.mktemp("three") / "films"
    rng = np.random.default_rng(0)
    for split, each in (("train", (12, 24, 12)), ("test", (6, 8, 6))):
        for label, (name, count) in enumerate(zip(CLASSES, each, strict=True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 110, (32, 32))
                image[16 * (label // 2) :, 16 * (label % 2) :][:16, :16] += rng.integers(50, 110)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{split}{i}.png")
    return root


@pytest.fixture(scope="module")
def config(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        workdir=tmp_path_factory.mktemp("runs") / "three",
        data=DataConfig(str(films), size=SIZE, folds=2, cache=films.parent / "cache"),
        augment=AugmentConfig(shear=0, zoom=0, flip=False),
        # The second head is of two classes alone, so it is left out.
        train=TrainConfig(epochs=8, batch=12, learning_rate=3e-3, auxiliary=0.3, mixup=0.1),
        device=DeviceConfig(count=1),
    )


@pytest.fixture(scope="module")
def released(config: Config) -> Path:
    """The release of a cross-validation, whose folds are runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        import crossval

        crossval.crossvalidate(crossval.Options(config, release=config.workdir.parent / "release"))
    return config.workdir.parent / "release"


@pytest.fixture(scope="module")
def run(released: Path, config: Config) -> Path:
    """The workdir of a run of the first fold."""
    return config.workdir / "fold0"


def cnnjax(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return int(ended.value.code or 0)


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_a_run_of_three_classes(run: Path) -> None:
    summary = read(run / "summary.json")
    assert read(run / "data.json")["classes"] == list(CLASSES)
    assert summary["last"]["accuracy"]["value"] > 0.7
    assert [len(row) for row in summary["last"]["confusion"]] == [3, 3, 3]
    assert summary["rules"]["majority_accuracy"] == 0.5
    held_out = Workdir(run).read_validation()
    assert held_out.logits.shape == (24, 3)
    columns = read_table(run / "validation.csv", ())[0].keys()
    assert [name for name in columns if name.startswith("logit_best")] == [
        f"logit_best_{name}" for name in CLASSES
    ]
    point = Workdir(run).read_operating("best")[1]
    assert isinstance(point, SoftmaxPoint)
    assert len(point.bias) == 3
    epoch = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(epoch["validation"]) == {"loss", *metrics.AT_ZERO}
    predictor = Predictor.open(run)
    assert predictor.has_softmax
    assert "auxiliary" not in predictor.members[0].params
    assert predictor.members[0].params["dense2"]["kernel"].shape == (128, 3)


def test_a_cross_validation_of_three_classes(released: Path, config: Config) -> None:
    found = read(config.workdir / "crossval.json")
    assert found["plain"]["auc"]["value"] > 0.8
    assert found["points"] == []  # of a threshold
    assert release.read(released).classes == CLASSES
    predictor = Predictor.open(released)
    images = np.zeros((2, SIZE, SIZE), np.uint8)
    assert predictor.member_logits(images).shape == (2, 2, 3)
    assert predictor.operating.probabilities(predictor.logits(images)).sum(1) == pytest.approx(1)


def test_evaluate(
    run: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "metrics.json", tmp_path / "images.csv"
    assert cnnjax("evaluate", "--run", run, "--data", films, "--json", out, "--csv", table) == 0
    found, screen = read(out), capsys.readouterr().out
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    truth = np.array([CLASSES.index(row["truth"]) for row in rows])
    given = np.array([[float(row[f"probability_{name}"]) for name in CLASSES] for row in rows])
    called = np.array([CLASSES.index(row["class"]) for row in rows])
    assert (called == given.argmax(1)).all()
    assert given.sum(1) == pytest.approx(1)
    assert found["confusion"] == reference.confusion_matrix(truth, called).tolist()
    assert found["accuracy"]["value"] == np.mean(truth == called)
    assert found["auc"]["value"] == pytest.approx(
        reference.roc_auc_score(truth, given, multi_class="ovr")
    )
    assert found["brier"]["value"] == pytest.approx(
        np.square(given - np.eye(3)[truth]).sum(1).mean()
    )
    assert [one["confusion"]["tp"] + one["confusion"]["fn"] for one in found["each"]] == [6, 8, 6]
    assert "predicted: the most probable class; 20 images" in screen
    for name, row in zip(CLASSES, found["confusion"], strict=True):
        assert any(line.split() == [name, *map(str, row)] for line in screen.splitlines())


def test_predict(
    run: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = films / "test" / "VIRUS"
    table, heat = tmp_path / "out.csv", tmp_path / "heat"
    command = ("predict", "--run", run, folder, "--csv", table, "--heatmap", heat)
    assert cnnjax(*command, "--format", "jsonl") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        assert list(row["probabilities"]) == list(CLASSES)
        assert row["confidence"] == max(row["probabilities"].values())
        assert row["probabilities"][row["class"]] == row["confidence"]
    assert np.mean([row["class"] == "VIRUS" for row in rows]) > 0.5
    with table.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["probability_VIRUS"]) for row in written] == [
        row["probabilities"]["VIRUS"] for row in rows
    ]
    names = {f"{path.stem}-{name}.png" for path in folder.iterdir() for name in CLASSES}
    assert {path.name for path in heat.iterdir()} == names

    assert cnnjax("predict", "--run", run, folder, "--format", "table") == 0
    head, *lines, tail = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", *(f"P({name})" for name in CLASSES), "class", "confidence"]
    assert [line.split()[4] for line in lines] == [row["class"] for row in rows]
    assert "most probable" in tail


@pytest.mark.parametrize("flag", ["--threshold", "--prevalence"])
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_flags_of_a_positive_class_are_refused(
    command: str, flag: str, run: Path, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ("--data", films) if command == "evaluate" else (films / "test" / "VIRUS",)
    assert cnnjax(command, "--run", run, *what, flag, 0.3) == 2
    assert f"error: {flag} needs a positive class, but " in capsys.readouterr().err


def test_a_threshold_for_three_classes_is_refused_before_training(config: Config) -> None:
    other = replace(
        config,
        workdir=config.workdir.parent / "refused",
        operating=OperatingConfig("sensitivity", sensitivity=0.9),
    )
    with pytest.raises(InputError, match=r"--operating\.criterion sensitivity needs a positive"):
        fit(other)
    assert not (other.workdir / "metrics.jsonl").exists()


def test_the_report(run: Path, films: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert cnnjax("report", "--run", run, "--data", films, "--out", out) == 0
    page = out.read_text()
    found = read(run / "summary.json")
    assert found["best_epoch"] > 0
    for name in CLASSES:
        assert f'<th scope="col">predicted {name}</th>' in page
    assert "Each class against the rest, with 95 % intervals" in page
    assert "--prevalence" not in page
    assert page.count("purple to yellow&#34;") == 0
    assert "probability of VIRUS" in page


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(run, tmp_path / name)
    page = report.compare([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html").read_text()
    assert "are means over BACTERIA, NORMAL, VIRUS, each against the rest" in page
    assert "+0.0000" in page


def test_an_exported_program_gives_the_probabilities(run: Path, tmp_path: Path) -> None:
    program = tmp_path / "three.stablehlo"
    assert cnnjax("export", "--run", run, program) == 0
    about = read(tmp_path / "three.stablehlo.json")["output"]
    assert about["classes"] == list(CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE), dtype=np.uint8)
    given = jax.export.deserialize(program.read_bytes()).call(jnp.asarray(images))
    predictor = Predictor.open(run)
    ours = predictor.operating.probabilities(predictor.logits(images))
    np.testing.assert_allclose(given, ours, atol=1e-5)


def test_heat_is_about_the_class_that_is_asked_for(run: Path, films: Path) -> None:
    """Each class is bright in a quarter of its own, in which its evidence lies."""
    predictor = Predictor.open(run)
    images = np.stack(
        [np.asarray(Image.open(f).resize((SIZE, SIZE))) for f in (films / "test").rglob("*.png")]
    )
    assert len(images) > FEW
    called = predictor.operating.decide(predictor.logits(images))
    heat = predictor.heat(images)
    assert heat.shape == images.shape
    np.testing.assert_allclose(heat, predictor.heat(images, called), atol=1e-6)
    maps = [predictor.heat(images, np.full(len(images), k)) for k in range(3)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in ((maps[0], maps[1]), (maps[1], maps[2])))


def test_evidence_is_the_log_odds_of_a_class() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    expected, evidence = metrics.against_rest(np.asarray(logits)), jax.jit(explain.evidence)
    for label in range(3):
        found = evidence(logits, jnp.full(4, label))
        np.testing.assert_allclose(found, expected[:, label], rtol=1e-5)
    np.testing.assert_allclose(evidence(logits), expected.max(1), rtol=1e-5)
    two = logits[:, 1]
    np.testing.assert_array_equal(evidence(two, jnp.asarray([1, 1, 0, 0]))[2:], -two[2:])
    told = jax.jit(jax.grad(lambda x: explain.evidence(x, jnp.zeros(4, jnp.int32)).sum()))
    gradient = told(logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-6)  # a shift of all logits says nothing


def drawn(seed: int, n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [n, 3] that are calibrated log-probabilities, and their labels."""
    rng = np.random.default_rng(seed)
    logits = metrics.log_softmax(2 * rng.normal(size=(n, 3)) + np.array([1, 0, -1]))
    return logits, (logits + rng.gumbel(size=(n, 3))).argmax(1)


def test_values_against_scikit_learn() -> None:
    logits, labels = drawn(0)
    found = metrics.evaluate(logits, labels, [f"p{i // 2}" for i in range(600)], replicates=200)
    called, given = logits.argmax(1), metrics.softmax(logits)
    for ours, theirs in (
        (found.accuracy, reference.accuracy_score(labels, called)),
        (found.sensitivity, reference.recall_score(labels, called, average="macro")),
        (found.precision, reference.precision_score(labels, called, average="macro")),
        (found.f1, reference.f1_score(labels, called, average="macro")),
        (found.auc, reference.roc_auc_score(labels, given, multi_class="ovr")),
        (found.brier, np.square(given - np.eye(3)[labels]).sum(1).mean()),
    ):
        assert ours.value == pytest.approx(theirs, abs=1e-12)
        assert ours.ci95 is not None
        assert ours.ci95[0] < theirs < ours.ci95[1]
        assert ours.ci95[1] - ours.ci95[0] < 0.2
    assert found.confusion.counts == tuple(
        map(tuple, reference.confusion_matrix(labels, called).tolist())
    )
    for label, one in enumerate(found.each):
        mine = labels == label
        assert one.auc.value == pytest.approx(reference.roc_auc_score(mine, given[:, label]))
        assert one.specificity.value == np.mean(called[~mine] != label)
    assert metrics.at_zero(logits, labels)["specificity"] == pytest.approx(found.specificity.value)
    differences = metrics.paired_differences(logits, logits[:, ::-1], labels, ["p"] * 600)
    assert differences["accuracy"].value == pytest.approx(
        np.mean(logits[:, ::-1].argmax(1) == labels) - found.accuracy.value
    )


def test_two_classes_with_a_logit_each_are_as_with_one() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    logits = rng.normal(size=200) + 2 * labels
    both = np.stack([0 * logits, logits], 1)
    patients = [f"p{i // 2}" for i in range(200)]
    one, two = (metrics.evaluate(x, labels, patients, replicates=100) for x in (logits, both))
    for name in ("accuracy", "sensitivity", "precision", "f1", "auc", "brier", "ece"):
        ours, theirs = getattr(two.each[1], name), getattr(one, name)
        assert (ours.value, *ours.ci95) == pytest.approx((theirs.value, *theirs.ci95)), name
    assert two.confusion == one.confusion
    slope, bias = fit_calibration(logits, labels)
    same, biases = fit_softmax_calibration(both, labels)
    assert (same, biases[1] - biases[0]) == pytest.approx((slope, bias))


def test_the_text_of_three_classes_is_a_table() -> None:
    logits, labels = 5 * np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 0])
    found = metrics.evaluate(logits, labels, list("aabc"), replicates=0)
    lines = found.report(("NORMAL", "BACTERIA", "VIRUS")).splitlines()
    assert lines[-6:] == [
        "truth     called NORMAL  BACTERIA   VIRUS",
        "NORMAL                1         0       1",
        "BACTERIA              0         1       0",
        "VIRUS                 0         0       1",
        "",
        "predicted: the most probable class; 4 images of 3 patients",
    ]
    assert [line.partition(" ")[0] for line in lines[11:14]] == ["NORMAL", "BACTERIA", "VIRUS"]
    assert len({line.index(".") for line in lines[11:14]}) == 1


def test_a_missing_class_is_undefined() -> None:
    logits, labels = drawn(2, 60)
    found = metrics.evaluate(logits, np.minimum(labels, 1), [str(i) for i in range(60)])
    assert found.auc.value is found.sensitivity.value is None
    assert found.each[0].auc.value is not None
    assert metrics.auc(logits, np.minimum(labels, 1)) is None
    assert "undefined" in found.report(CLASSES)


def test_calibration_finds_temperature_and_biases() -> None:
    logits, labels = drawn(3, 4000)
    spoilt = 3 * (logits + np.array([0.0, 1.5, -0.5]))
    point = fit_operating_point(spoilt, labels, OperatingConfig())
    assert isinstance(point, SoftmaxPoint)
    assert point.slope == pytest.approx(1 / 3, rel=0.05)
    assert np.subtract(point.bias, point.bias[0]) == pytest.approx([0, -1.5, 0.5], abs=0.15)
    ece, before = (
        metrics.evaluate(x, labels, labels.astype(str), replicates=0).ece.value or 0
        for x in (point.calibrated(spoilt), spoilt)
    )
    assert ece < 0.03 < before
    with pytest.raises(InputError, match=r"--operating\.criterion cost needs a positive class"):
        fit_operating_point(spoilt, labels, OperatingConfig("cost"))


def test_logits_that_rank_the_wrong_way_round_say_next_to_nothing() -> None:
    logits, labels = drawn(4)
    point = SoftmaxPoint(*fit_softmax_calibration(-logits, labels))
    shares = np.bincount(labels) / len(labels)
    np.testing.assert_allclose(point.probabilities(-logits), np.tile(shares, (600, 1)), atol=0.01)


def test_the_loss_of_two_logits_is_that_of_one() -> None:
    rng = np.random.default_rng(0)
    batch = Batch(jnp.asarray(rng.integers(0, 256, (8, 4, 4), dtype=np.uint8)), jnp.arange(8) % 2)
    outputs = jnp.asarray(rng.normal(size=8), jnp.float32)

    @jax.jit
    def losses(batch: Batch, outputs: jax.Array) -> Any:
        both = jnp.stack([jnp.zeros(8), outputs], 1)
        found = []
        for objective, given in (
            (Binary((0.5, 2.0), 0.1, mixup=0.4), outputs),
            (Softmax((0.5, 2.0), 0.1, mixup=0.4), both),
        ):
            images, targets = objective.prepare(jax.random.key(3), lambda key, x: x, batch)
            found.append((images, objective.losses(given, {}, targets)))
        return found

    one, two = losses(batch, outputs)
    assert len(set(np.asarray(one[1].minimized).tolist())) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


def test_class_weights() -> None:
    assert class_weights_of(np.array([0, 0, 0, 1, 2, 2])) == pytest.approx((2 / 3, 2.0, 1.0))


def test_what_does_not_fit_the_classes_is_refused(tmp_path: Path) -> None:
    images = np.zeros((6, SIZE, SIZE), np.uint8)
    data = data_of(images, np.arange(6) % 3, np.arange(6) >= 3, CLASSES)
    config = Config(workdir=tmp_path / "run", data=DataConfig(size=SIZE))
    with pytest.raises(InputError, match="Binary is for two classes, not 3"):
        fit(config, data=data, objective=Binary())
    from test_parts import Plain, ThreeLogits

    with pytest.raises(InputError, match=r"Plain returns an array of shape \(2,\)"):
        fit(config, data=data, network=Plain())
    with pytest.raises(InputError, match=r"but 3 classes need logits of shape \(2, 3\)"):
        fit(config, data=data, network=ThreeLogits(4))
    several = np.eye(3, dtype=int)[np.arange(6) % 3]
    path = tmp_path / "several.npz"
    np.savez(path, train_images=images, train_labels=several)
    with pytest.raises(InputError, match="train_labels holds 3 findings per image"):
        read_index(path)
    with pytest.raises(InputError, match="multi-label"):
        data_of(images, several, np.arange(6) >= 3, CLASSES)


class Linear(nn.Module):
    """A network of the user's own, which asks how many logits there are."""

    outputs: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(self.outputs)(images.reshape(len(images), -1))


def test_a_network_by_its_path_is_told_the_number_of_logits() -> None:
    network = make_model(ModelConfig("test_classes:Linear"), classes=4)
    assert network == Linear(4)


def test_points_of_both_kinds_are_read_back() -> None:
    from cnnjax.operating import points_from_json, points_to_json

    points = {1: OperatingPoint(), 4: SoftmaxPoint(0.5, (0.1, 0.2, -0.3))}
    assert points_from_json(json.loads(json.dumps(points_to_json(points)))) == points


def test_without_calibration_the_probabilities_are_the_networks() -> None:
    logits, _ = drawn(6, 10)
    np.testing.assert_allclose(SoftmaxPoint().probabilities(logits), metrics.softmax(logits))


@pytest.mark.parametrize("classes", [2, 3])
def test_renderings_are_judged_alike(classes: int) -> None:
    """Log-odds of three classes, of which one image lacks a rendering, and of two likewise."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    own = np.eye(classes)[labels]
    sets = {shifted.PLAIN: rng.normal(size=own.shape) + 2 * own}
    for name in list(RENDERINGS)[:4]:
        sets[name] = rng.normal(size=own.shape) + own
        sets[name][0] = np.nan
    if classes == 2:
        sets = {name: each[:, 1] - each[:, 0] for name, each in sets.items()}
    held_out = shifted.HeldOut(labels, tuple(map(str, range(60))), sets)
    found = shifted.judge(held_out, np.arange(60) // 6 % 2, OperatingConfig())
    assert found["plain"]["auc"]["value"] > found["score"] > 0.5
    for group in found["groups"].values():
        assert group["across"] <= group["auc"] + 1e-9
