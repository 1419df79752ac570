"""A run is a function of config, data and seed, however often it is stopped on its way."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pytest

from cnnjax import train
from cnnjax.cli import guarded
from cnnjax.config import (
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OperatingConfig,
    TrainConfig,
)
from cnnjax.data.prepare import training_data
from cnnjax.errors import InputError, TrainingError
from cnnjax.machine import devices
from cnnjax.run import checkpoint, training
from cnnjax.run.opening import open_run
from cnnjax.run.result import Result
from cnnjax.run.training import Run
from cnnjax.run.workdir import append_line, claim, read_lines
from cnnjax.steps import TrainState

EPOCHS = 4

_SHARED: dict[str, Any] = {}
_compile_steps = functools.cache(train.compile_steps)


def fit(config: Config) -> Result:
    """`cnnjax.train.fit`; but runs of one kind share a step, which is slow to trace, not to take.

    A run in `test_cli`, whose process is killed, goes on with a step that is traced anew.
    """

    @contextlib.contextmanager
    def opened(*arguments: Any) -> Iterator[Run]:
        with open_run(*arguments) as run:
            kind = run.config.model, run.config.train, run.config.augment, run.steps_per_epoch
            here = repr((kind, run.mesh, devices.traits(run.mesh)))
            run.train_step = _SHARED.setdefault(here, run.train_step)
            yield run

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "open_run", opened)
        patched.setattr(train, "compile_steps", _compile_steps)
        return train.fit(config)


def config_for(tree: Path, workdir: Path, **train: Any) -> Config:
    return Config(
        workdir=workdir,
        data=DataConfig(root=str(tree), size=20),
        train=TrainConfig(**{"epochs": EPOCHS, "batch": 16, **train}),
        device=DeviceConfig(count=2),
    )


@pytest.fixture(scope="module")
def finished(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(config_for(tree, folder))
    return folder


def outcome(run: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "summary.json", "validation.csv", "split.csv", "operating.json")
    return {name: (run / name).read_bytes() for name in names}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_its_files(finished: Path) -> None:
    lines = read_metrics(finished)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [6, 12, 18, 24]  # 84 or so images, 16 a step
    assert lines[-1]["train"]["loss"] < lines[0]["train"]["loss"]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["best"]["auc"]["value"] > 0.8
    assert summary["protocol"].startswith("fold 0 of 5, patient-grouped")
    assert summary["train_images"] + summary["validation_images"] == 96 + 8
    with (finished / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    side: dict[str, str] = {}
    for row in rows:
        assert side.setdefault(row["patient"], row["role"]) == row["role"]
    assert len(rows) == 104
    best = max(lines, key=lambda line: line["validation"]["auc"])
    assert summary["best_epoch"] == best["epoch"]
    with (finished / "validation.csv").open() as file:
        labels, logits = zip(
            *((int(r["label"]), float(r["logit_best"])) for r in csv.DictReader(file)), strict=True
        )
    right = np.mean((np.array(logits) >= 0) == np.array(labels))
    assert right == pytest.approx(summary["at_0.5"]["best"]["accuracy"])
    assert summary["at_0.5"]["last"]["auc"] == lines[-1]["validation"]["auc"]
    point = json.loads((finished / "operating.json").read_text())["best"]["1"]
    right = np.mean((np.array(logits) >= point["threshold"]) == np.array(labels))
    assert right == pytest.approx(summary["best"]["accuracy"]["value"])
    assert summary["notes"] == []


@pytest.mark.parametrize("where", ["before the line", "after the line", "after the latest state"])
def test_a_stopped_run_ends_with_the_same_bytes(
    tree: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = config_for(tree, tmp_path / "run")
    append, write = training.append_line, checkpoint.Checkpoints._write
    calls = {"append": 0}
    best = max(line["epoch"] for line in read_metrics(finished) if line["best"])

    def stopping_append(path: Path, values: Any) -> None:
        if path.name == "metrics.jsonl":
            calls["append"] += 1
            if where == "before the line" and calls["append"] == 2:
                raise KeyboardInterrupt
        append(path, values)

    def stopping_write(self: Any, kind: Any, epoch: int, *rest: Any) -> None:
        if where == "after the line" and epoch == 2:
            raise KeyboardInterrupt
        if where == "after the latest state" and epoch == best and kind == "best":
            raise KeyboardInterrupt
        write(self, kind, epoch, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "append_line", stopping_append)
        patched.setattr(checkpoint.Checkpoints, "_write", stopping_write)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert not (tmp_path / "run" / "summary.json").exists()
    fit(config)
    assert outcome(tmp_path / "run") == outcome(finished)
    times = read_lines(tmp_path / "run" / "throughput.jsonl")
    assert [line["epoch"] for line in times] == [1, 2, 3, 4]


def test_streaming_and_other_incidental_flags_change_nothing(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    moved = shutil.copytree(tree, tmp_path / "moved")
    config = config_for(moved, tmp_path / "run")
    fit(replace(config, data=replace(config.data, resident_mib=0, cache=tmp_path / "cache")))
    assert outcome(tmp_path / "run") == outcome(finished)


def test_steps_taken_together_are_the_same_steps(
    tree: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: 4 of the 6 steps of an epoch in one call, and 2 by themselves."""
    monkeypatch.setitem(devices.TRAITS, "cpu", replace(devices.TRAITS["cpu"], steps=4))
    fit(config_for(tree, tmp_path / "run"))
    ours, theirs = (read_metrics(run) for run in (tmp_path / "run", finished))
    for ours_epoch, theirs_epoch in zip(ours, theirs, strict=True):
        assert ours_epoch["step"] == theirs_epoch["step"]
        assert ours_epoch["train"]["loss"] == pytest.approx(theirs_epoch["train"]["loss"], rel=1e-3)


def test_bfloat16_learns_the_same_and_is_kept_on_a_resume(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    config = config_for(tree, tmp_path / "run", precision="bfloat16")
    result = fit(config)
    ours, theirs = (read_metrics(run) for run in (config.workdir, finished))
    assert ours[0] != theirs[0]
    assert ours[-1]["train"]["loss"] == pytest.approx(theirs[-1]["train"]["loss"], abs=0.1)
    assert (result.last.auc.value or 0) > 0.8
    # `auto` would be float32 here.
    fit(config_for(tree, config.workdir, precision="auto"))
    with pytest.raises(InputError, match=r"--train\.precision float32 \(was bfloat16\)"):
        fit(config_for(tree, config.workdir, precision="float32"))


def test_a_best_state_that_is_ahead_of_the_latest_is_written_again(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    """As an older version left it: it wrote the best state before the latest."""
    run = tmp_path / "run"
    write = checkpoint.Checkpoints._write

    def killed(self: Any, kind: Any, epoch: int, *rest: Any) -> None:
        if epoch == 2:
            write(self, "best", epoch, *rest)
            raise KeyboardInterrupt
        write(self, kind, epoch, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(config_for(tree, run))
    kept = sorted(path.parts[-2:] for path in (run / "checkpoints").glob("*/*"))
    assert kept == [("best", "2"), ("latest", "1")]
    (run / "throughput.jsonl").write_text("nothing\n")
    fit(config_for(tree, run))
    assert outcome(run) == outcome(finished)


def test_a_trace_that_cannot_be_written_is_refused_before_training(
    tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = replace(config_for(tree, tmp_path / "run"), profile=tmp_path / "file" / "trace")
    with pytest.raises(InputError, match=r"--profile .*trace cannot be written"):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_profile_writes_a_trace(tree: Path, tmp_path: Path) -> None:
    config = replace(config_for(tree, tmp_path / "run", epochs=1), profile=tmp_path / "trace")
    fit(config)
    assert list((tmp_path / "trace").rglob("*.trace.json.gz"))


def test_tensorboard_gets_every_epoch_once(tree: Path, tmp_path: Path, finished: Path) -> None:
    """However late they are asked for; and the run is the one that it would be without."""
    shutil.copytree(finished, tmp_path / "run")
    for _ in range(2):
        fit(replace(config_for(tree, tmp_path / "run"), tensorboard=True))
    assert outcome(tmp_path / "run") == outcome(finished)
    found: dict[tuple[str, int], float] = {}
    for file in (tmp_path / "run" / "tensorboard").iterdir():
        for event in events_of(file):
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    for line in read_metrics(finished):
        for side in ("train", "validation"):
            for name, value in line[side].items():
                assert found[f"{side}/{name}", line["epoch"]] == pytest.approx(value, rel=1e-6)


def events_of(file: Path) -> Iterator[Any]:
    """Yields the events of a file of TFRecords: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event()
        event.ParseFromString(data[at + 12 : at + 12 + length])
        yield event
        at += length + 16


def test_a_finished_run_is_not_trained_again(
    tree: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = outcome(finished)
    restored, restore = [], checkpoint.Checkpoints.restore

    def watched(self: Any, kind: Any, template: Any) -> Any:
        restored.append(kind)
        return restore(self, kind, template)

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", watched)
    fit(config_for(tree, finished))
    assert sorted(restored) == ["best", "latest"]  # to be evaluated
    assert "resuming after epoch 4" in capsys.readouterr().out
    assert outcome(finished) == before


def test_another_config_is_refused_with_the_difference(tree: Path, finished: Path) -> None:
    before = outcome(finished)
    with pytest.raises(InputError, match=r"another config: --train.batch 8 \(was 16\); give"):
        fit(config_for(tree, finished, batch=8))
    assert outcome(finished) == before


@pytest.mark.parametrize("what", ["one less", "another label", "other pixels"])
def test_other_images_are_refused(tree: Path, tmp_path: Path, finished: Path, what: str) -> None:
    changed = Path(shutil.copytree(tree, tmp_path / "changed"))
    one, other = sorted((changed / "train" / "NORMAL").iterdir())[:2]
    if what == "one less":
        one.unlink()
    elif what == "another label":
        one.rename(changed / "train" / "PNEUMONIA" / one.name)
    else:
        one.write_bytes(other.read_bytes())
    before = outcome(finished)
    with pytest.raises(InputError, match=r"was trained on other images than those in"):
        fit(config_for(changed, finished))
    assert outcome(finished) == before


def test_a_workdir_in_use_is_refused(tree: Path, tmp_path: Path) -> None:
    with (
        filelock.FileLock(tmp_path / "run.lock"),
        pytest.raises(InputError, match="in use by another run"),
    ):
        fit(config_for(tree, tmp_path))


def test_a_diverging_run_says_where(tree: Path, tmp_path: Path) -> None:
    config = config_for(tree, tmp_path / "run", learning_rate=1e30, optimizer="sgd")
    with pytest.raises(
        TrainingError,
        match=r"run: loss, gradient or batch statistics are not finite at step \d \(epoch 1\),"
        r" which was not applied; its images: train/.*\. The checkpoint of epoch 0 is kept;"
        r" start a new run \(--workdir\) with a lower --train\.learning-rate",
    ):
        fit(config)

    def run() -> int:
        fit(config)
        return 0

    assert guarded(run) == 1


def test_a_network_that_an_epochs_last_step_breaks_is_not_kept(tree: Path, tmp_path: Path) -> None:
    """The loss of the only step is that of the network before it."""
    config = config_for(tree, tmp_path / "run", learning_rate=1e30, optimizer="sgd", batch=96)
    with pytest.raises(TrainingError, match=r"not finite after epoch 1; start .*clip-norm$"):
        fit(config)
    assert not (config.workdir / "metrics.jsonl").exists()
    assert not list((config.workdir / "checkpoints").glob("*/*"))


def test_patience_stops_early_and_stays_stopped(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate too small to change any decision: no epoch is better than the first.
    config = config_for(
        tree, tmp_path / "run", epochs=9, patience=2, best="accuracy", learning_rate=1e-12
    )
    for _ in range(2):
        result = fit(config)
        assert (result.summary["epochs"], result.summary["best_epoch"]) == (3, 1)
    assert "no better checkpoint in 2 epochs: stopping early" in capsys.readouterr().out


def test_broken_images_are_left_out_and_listed(tree: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    names = sorted(p.relative_to(root).as_posix() for p in root.glob("train/*/*"))
    (root / names[5]).write_bytes(b"nothing")
    config = config_for(root, tmp_path / "run", epochs=1)
    result = fit(config)
    assert result.summary["train_images"] + result.summary["validation_images"] == 103
    listed = (tmp_path / "run" / "quarantine.csv").read_text()
    assert listed == f"image,reason\n{names[5]},neither JPEG nor PNG nor DICOM\n"
    strict = replace(config, workdir=tmp_path / "strict", data=replace(config.data, strict=True))
    with pytest.raises(InputError, match=r"cannot be decoded"):
        fit(strict)


def test_a_broken_image_that_goes_is_another_data_set(tree: Path, tmp_path: Path) -> None:
    """Folds are drawn over it: without it, patients that were trained on could be held out."""
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    bad = sorted((root / "train" / "NORMAL").iterdir())[0]
    bad.write_bytes(b"no image")
    fit(config_for(root, tmp_path / "run", epochs=1))
    split = (tmp_path / "run" / "split.csv").read_bytes()
    bad.unlink()
    with pytest.raises(InputError, match="was trained on other images"):
        fit(config_for(root, tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "split.csv").read_bytes() == split


def test_a_start_that_failed_on_its_data_leaves_the_workdir_to_the_next(
    tree: Path, tmp_path: Path
) -> None:
    config = config_for(tree, tmp_path / "run", epochs=1)
    wrong = replace(config, data=replace(config.data, positive="SICK"))
    with pytest.raises(InputError, match="name one of them with --data"):
        fit(wrong)
    fit(config)
    assert (tmp_path / "run" / "summary.json").exists()
    (tmp_path / "run" / "data.json").unlink()  # now it is no such start
    with pytest.raises(InputError, match="belongs to another config"):
        fit(replace(config, seed=1))


def test_a_second_head_says_what_it_learns_from(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tree, tmp_path / "told", epochs=1, auxiliary=0.3)
    fit(config)
    told = capsys.readouterr().out
    counts = re.search(r"(\d+) bacterial, (\d+) viral\n", told)
    assert counts
    bacterial, viral = map(int, counts.groups())
    assert 0 < viral < bacterial + viral
    assert f" {bacterial + viral} PNEUMONIA" in told
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    for i, path in enumerate(sorted(root.rglob("person*"))):
        path.rename(path.with_name(f"film{i}.jpeg"))
    config = replace(config, workdir=tmp_path / "untold", data=replace(config.data, root=str(root)))
    fit(config)
    idle = "0 bacterial, 0 viral: --train.auxiliary needs images of both causes"
    assert idle in capsys.readouterr().out


def test_official_validation_uses_the_val_folder(tree: Path, tmp_path: Path) -> None:
    config = config_for(tree, tmp_path / "run", epochs=1)
    result = fit(replace(config, data=replace(config.data, validation="official")))
    assert (result.summary["train_images"], result.summary["validation_images"]) == (96, 8)


def test_a_patient_in_train_and_test_is_named(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    source = sorted(root.glob("train/NORMAL/*"))[0]
    shutil.copy(source, root / "test" / "NORMAL" / source.name)
    fit(config_for(root, tmp_path / "run", epochs=1))
    assert "warning: 1 patients are in both test and train: IM-0001" in capsys.readouterr().out


@pytest.mark.slow
def test_resnet_with_every_option_resumes_on_other_devices(tree: Path, tmp_path: Path) -> None:
    """Another number of devices resumes too; the figures agree to rounding."""
    options = {"ema": 0.9, "clip_norm": 1.0, "schedule": "cosine", "label_smoothing": 0.1}
    options["auxiliary"] = 0.3
    config = replace(
        config_for(tree, tmp_path / "a", optimizer="adamw", weight_decay=0.01, **options),
        model=ModelConfig("resnet", width=4),
    )
    whole = fit(config).summary["last"]
    append = training.append_line

    def stop(path: Path, values: Any) -> None:
        append(path, values)
        if path.name == "throughput.jsonl" and values["epoch"] == 2:
            raise KeyboardInterrupt

    other = replace(config, workdir=tmp_path / "b")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "append_line", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(other)
    resumed = fit(replace(other, device=DeviceConfig(count=3))).summary["last"]
    assert resumed["brier"]["value"] == pytest.approx(whole["brier"]["value"], abs=0.02)


def test_folds_share_a_compiled_program(tree: Path, tmp_path: Path) -> None:
    """Whatever shares the classes have in them."""
    config = config_for(tree, tmp_path / "run", precision="float32")
    data = training_data(config.data, config.seed, lambda _: None)
    held_out = data.held_out.copy()
    held_out[np.flatnonzero(held_out & (data.labels == 0))[0]] = False
    held_out[np.flatnonzero(~held_out & (data.labels == 1))[0]] = True
    lowered, weights = set(), set()
    for i, each in enumerate((data, replace(data, held_out=held_out))):
        with open_run(replace(config, workdir=tmp_path / f"run{i}"), each) as run:
            step = train.compile_steps(run.mesh, run.train_step).one
            state = jax.eval_shape(run.new_state, run.key(0))
            given = (run.key(2), run.objective)
            lowered.add(step.lower(state, run.feeder().data, run.order(1)[0], given).as_text())
            weights.add(run.objective.class_weights)
    assert len(weights) == 2
    assert len(lowered) == 1


def test_a_refused_config_leaves_the_workdir_free(tree: Path, tmp_path: Path) -> None:
    config = config_for(tree, tmp_path / "run", epochs=1)
    with claim(config) as workdir:
        workdir.claim_data("data", ("A", "B"))
    with pytest.raises(InputError, match="belongs to another config") as kept:  # noqa: SIM117
        with claim(replace(config, seed=1)):
            pass
    with claim(config) as workdir:  # while the exception, and so its frames, are still there
        assert workdir.root == tmp_path / "run"
    assert kept.value is not None


@pytest.fixture(scope="module")
def stopped(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that was stopped after its third epoch."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    save = checkpoint.Checkpoints.save

    def stopping(self: Any, kinds: Any, epoch: int, state: Any) -> None:
        save(self, kinds, epoch, state)
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit(config_for(tree, run))
    return run


@pytest.mark.parametrize("damage", ["a bit", "a file cut short", "a file gone", "no checksums"])
def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(
    tree: Path,
    tmp_path: Path,
    finished: Path,
    stopped: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    """As after a power cut, or on a failing disk."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    latest = run / "checkpoints" / "latest"
    assert sorted(path.name for path in latest.iterdir()) == ["2", "3"]
    largest = max((latest / "3").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "a file cut short":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "a file gone":
        largest.unlink()
    else:
        (latest / "3" / "checksums.json").unlink()
    capsys.readouterr()
    fit(config_for(tree, run))
    told = capsys.readouterr()
    assert "latest/3 is damaged and is not used" in told.err
    assert "resuming after epoch 2" in told.out
    assert outcome(run) == outcome(finished)


def test_a_damaged_best_checkpoint_is_no_silent_answer(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "best").glob("*/checksums.json"):
        path.write_text("{}")
    with pytest.raises(InputError, match=r"best holds no undamaged checkpoint"):
        fit(config_for(tree, tmp_path / "run"))


def test_checkpoints_without_a_config_are_refused(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(InputError, match=r"has checkpoints but no config\.json"):
        fit(config_for(tree, tmp_path / "run"))


def test_other_versions_are_refused_or_asked_for(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (line,) = read_lines(run / "sessions.jsonl")[-1:]
    line["versions"]["jax"] = "0.4.1"
    append_line(run / "sessions.jsonl", line)
    with pytest.raises(
        InputError, match=r"was trained with jax 0\.4\.1, and this is .*--other-ver"
    ):
        fit(config_for(tree, run))
    fit(replace(config_for(tree, run), other_versions=True))
    fit(config_for(tree, run))


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("deletion", [1, 2])
def test_a_checkpoint_goes_at_once(
    tree: Path, tmp_path: Path, finished: Path, deletion: int
) -> None:
    """The process dies among the files of a checkpoint that it takes away."""
    run = tmp_path / "run"
    remove, calls = shutil.rmtree, []

    def partly(path: Path, **options: Any) -> None:
        if Path(path).exists():
            calls.append(path)
            if len(calls) == deletion:
                for file in [file for file in Path(path).rglob("*") if file.is_file()][::2]:
                    file.unlink()
                raise KeyboardInterrupt
        remove(path, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", partly)
        with pytest.raises(KeyboardInterrupt):
            fit(config_for(tree, run))
    assert len(calls) == deletion
    fit(config_for(tree, run))
    assert outcome(run) == outcome(finished)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "best"}


def test_a_full_disk_is_told_as_such(
    tree: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save = checkpoint.ocp.CheckpointManager.save

    def full(self: Any, epoch: int, **options: Any) -> Any:
        if epoch == 2:  # as Orbax says it
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
        return save(self, epoch, **options)

    def train() -> int:
        fit(config_for(tree, run))
        return 0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.ocp.CheckpointManager, "save", full)
        assert guarded(train) == 2
    assert "error: the disk is full" in capsys.readouterr().err
    fit(config_for(tree, run))
    assert outcome(run) == outcome(finished)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_a_checkpoint(tree: Path, tmp_path: Path, finished: Path) -> None:
    run, begun, written = tmp_path / "run", threading.Event(), []
    write, save = checkpoint.ocp.CheckpointManager.save, checkpoint.Checkpoints.save

    def slow(self: Any, epoch: int, **options: Any) -> Any:
        if epoch == 2:
            assert begun.wait(60)
            time.sleep(0.2)
        answer = write(self, epoch, **options)
        written.append(epoch)
        return answer

    def interrupted(self: Any, kinds: Any, epoch: int, state: Any) -> None:
        save(self, kinds, epoch, state)
        if epoch == 2:
            begun.set()
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.ocp.CheckpointManager, "save", slow)
        patched.setattr(checkpoint.Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(config_for(tree, run))
    assert written[-1] == 2
    assert sorted(path.name for path in (run / "checkpoints" / "latest").iterdir()) == ["1", "2"]
    fit(config_for(tree, run))
    assert outcome(run) == outcome(finished)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_within_a_step(
    tree: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """And the run that goes on ends with the same bytes."""
    run, number, calls = tmp_path / "run", getattr(signal, name), []
    order, more = train.calls, {}
    if name == "SIGINT":  # the images are decoded on the fly at first, and cached after that
        more = {"resident_mib": 0, "cache_mib": 0, "workers": 1, "cache": tmp_path / "cache"}

    def signalled(*arguments: Any) -> Iterator[Any]:
        for each in order(*arguments):
            calls.append(1)
            if len(calls) == 9:  # the third step of the second epoch
                for pid in [os.getpid(), *(p.pid for p in multiprocessing.active_children())]:
                    os.kill(pid, number)  # as a terminal does
            yield each

    def command() -> int:
        config = config_for(tree, run)
        fit(replace(config, data=replace(config.data, **more)))
        return 0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "calls", signalled)
        assert guarded(command) == 128 + number
    assert len(calls) == 9
    told = capsys.readouterr()
    assert "to resume a training, run the same command again" in told.err
    assert ("decoded on the fly by 1 worker process\n" in told.out) == bool(more)
    assert not multiprocessing.active_children()
    assert [path.name for path in (run / "checkpoints" / "within").iterdir()] == ["9"]
    more.pop("cache_mib", None)
    assert guarded(command) == 0
    assert "resuming after epoch 1 and 3 steps" in capsys.readouterr().out
    assert outcome(run) == outcome(finished)
    assert not (run / "checkpoints" / "within").exists()


def test_a_long_epoch_is_saved_on_its_way(tree: Path, tmp_path: Path, finished: Path) -> None:
    """Killed after a step, with no chance to save: what was saved some minutes ago is there."""
    run, calls = tmp_path / "run", []
    order = train.calls

    def killed(*arguments: Any) -> Iterator[Any]:
        for each in order(*arguments):
            calls.append(1)
            if len(calls) == 11:
                raise RuntimeError("killed")
            yield each

    config = config_for(tree, run, save_every=1e-9)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "calls", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit(config)
    assert [path.name for path in (run / "checkpoints" / "within").iterdir()] == ["10"]
    fit(config)
    assert outcome(run) == outcome(finished)


@pytest.mark.usefixtures("interruptible")
def test_so_does_one_that_comes_while_it_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, wait, written = threading.Event(), checkpoint.wait, []

    def waiting(futures: Any) -> None:
        closing.set()
        wait(futures)

    def slow(self: Any, kind: Any, epoch: int, *rest: Any) -> None:
        assert closing.wait(60)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
        written.append(epoch)

    monkeypatch.setattr(checkpoint, "wait", waiting)
    monkeypatch.setattr(checkpoint.Checkpoints, "_write", slow)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(("latest",), 1, TrainState(np.zeros(()), {}, {}, (), None))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.close()
    assert written == [1]


def test_what_an_abandoned_start_asked_for_is_forgotten(tree: Path, tmp_path: Path) -> None:
    config = config_for(tree, tmp_path / "run", epochs=1, precision="bfloat16")
    with pytest.raises(InputError, match="nowhere does not exist"):
        fit(replace(config, data=replace(config.data, root="nowhere")))
    fit(config_for(tree, config.workdir, epochs=1))
    assert '"precision": "float32"' in (config.workdir / "config.json").read_text()


def test_a_refused_start_leaves_the_config_as_it_was(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    config = config_for(tree, tmp_path / "run")
    with pytest.raises(InputError, match="nowhere does not exist"):
        fit(replace(config, data=replace(config.data, root="nowhere")))
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    with pytest.raises(InputError, match=r"--train\.warmup needs"):
        fit(config_for(tree, tmp_path / "new", warmup=3))


def test_another_operating_point_needs_no_other_training(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    config = config_for(tree, tmp_path / "run")
    fit(replace(config, operating=OperatingConfig("sensitivity", sensitivity=0.99)))
    point = json.loads((tmp_path / "run" / "operating.json").read_text())["best"]["1"]
    assert point["criterion"] == "sensitivity 0.99"
    assert outcome(tmp_path / "run")["metrics.jsonl"] == outcome(finished)["metrics.jsonl"]
    assert '"sensitivity": 0.99' in (tmp_path / "run" / "config.json").read_text()


def test_a_run_without_its_history_says_so(tree: Path, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read"):
        fit(config_for(tree, tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl holds 1 epochs of 4; restore it"):
        fit(config_for(tree, tmp_path / "run"))


def test_a_run_without_its_checkpoints_or_its_images_says_so(
    tree: Path, tmp_path: Path, finished: Path
) -> None:
    """And keeps what else it has."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "checkpoints" / "latest").rename(tmp_path / "latest")
    before = outcome(run)
    with pytest.raises(
        InputError, match=r"metrics\.jsonl has 4 epochs, .*latest has 0; restore that"
    ):
        fit(config_for(tree, run))
    assert outcome(run) == before
    (tmp_path / "latest").rename(run / "checkpoints" / "latest")
    (run / "data.json").unlink()
    with pytest.raises(InputError, match=r"data\.json cannot be read"):
        fit(config_for(tree, run))


def test_a_line_that_was_left_unfinished_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"epoch": 1})
    with path.open("a") as file:
        file.write('{"epo')
    append_line(path, {"epoch": 2})
    assert read_lines(path) == [{"epoch": 1}, {"epoch": 2}]
