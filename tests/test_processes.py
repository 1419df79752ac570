"""Several processes over loopback, each with devices of its own, against one with all of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import radiograph
from PIL import Image
from several import batches, config_of

from cnnjax import InputError, fit
from cnnjax.cli.evaluate import Evaluate
from cnnjax.config import DeviceConfig, DistributedConfig
from cnnjax.machine import devices, processes

DEVICES = 4  # as `conftest` says, and in all processes together


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def start(count: int, code: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """Starts processes that run code; `DISTRIBUTED` in it are the flags of each."""
    address = f"127.0.0.1:{port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    started = []
    for process in range(count):
        given = {"coordinator": address, "processes": count, "process": process}
        program = f"GIVEN = {given}\n{textwrap.dedent(code)}"
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, arguments)],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return started


def ended(started: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Returns exit status, output and errors of each process."""
    try:
        found = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, found, strict=True)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 40 train, 4 val and 20 test images, one of them broken."""
    root = tmp_path_factory.mktemp("processes") / "tree"
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 20), ("val", 2), ("test", 10)):
        for name in ("NORMAL", "PNEUMONIA"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = Image.fromarray(radiograph(rng, name == "PNEUMONIA"))
                file = f"person{i}_virus_{i}" if name == "PNEUMONIA" else f"IM-{i:04}-{i}"
                image.save(folder / f"{file}.png")
    (root / "test" / "NORMAL" / "IM-0100-0001.png").write_bytes(b"no image")
    return root


# What each of several processes does: three batches, a run that a signal to the last one of them
# ends in its second epoch, an evaluation and predictions with a run that has ended.
WORKER = """
    import contextlib, io, json, os, signal, sys
    from pathlib import Path

    from several import batches, config_of
    from cnnjax import fit
    from cnnjax.cli import guarded
    from cnnjax.cli.evaluate import Evaluate
    from cnnjax.cli.predict import Predict
    from cnnjax.config import DeviceConfig, DistributedConfig
    from cnnjax.machine import devices, processes
    from cnnjax.run.signals import Ended
    from cnnjax.run.training import Saver

    folder, root = map(Path, sys.argv[1:])
    cache, distributed = folder / "cache", DistributedConfig(**GIVEN)
    mesh = devices.make_mesh(DeviceConfig(), distributed)
    found = {"batches": [batches(mesh, mib) for mib in (1024, -1)], "devices": mesh.size}

    is_due, asked = Saver.is_due, []
    def with_a_signal(saver):
        asked.append(saver)
        last = GIVEN["process"] == GIVEN["processes"] - 1
        if last and saver.run.done == 1 and asked.count(saver) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return is_due(saver)
    Saver.is_due = with_a_signal
    try:
        fit(config_of(folder / "several", root, cache, **GIVEN))
    except Ended as end:
        found["signal"] = end.number

    evaluate = Evaluate(
        run=folder / "one", data=str(root), cache=cache, json=folder / "several.json",
        csv=folder / "several.csv", distributed=distributed,
    )
    predict = Predict(
        (root / "test",), run=folder / "one", csv=folder / "predicted.csv", distributed=distributed,
    )
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        found["evaluate"] = guarded(evaluate)
    found["told"] = told.getvalue()
    with contextlib.redirect_stdout(io.StringIO()):
        found["predict"] = guarded(predict)
    print(json.dumps(found))
"""


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def expect_alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compares epochs: losses within 1e-5, counts to the last one."""
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], rel=1e-5)
        assert a["train"]["accuracy"] == b["train"]["accuracy"]
        assert a["validation"] == pytest.approx(b["validation"], rel=1e-5)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_one_program(
    tmp_path: Path, images: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "one", images, tmp_path / "own")
    fit(config)

    each = ended(start(count, WORKER, tmp_path, images))
    assert [status for status, _, _ in each] == [0] * count, each
    found = [json.loads(output.splitlines()[-1]) for _, output, _ in each]

    # The same images, to the bit.
    mesh = devices.make_mesh(DeviceConfig())
    alone = batches(mesh, 1024)
    for one in found:
        assert one["devices"] == mesh.size == DEVICES
        assert one["batches"] == [alone, alone]

    # Stopped by the signal of one, and resumed by a single process as if nothing had been.
    assert [one["signal"] for one in found] == [signal.SIGTERM] * count
    resumed = config_of(tmp_path / "several", images, tmp_path / "own")
    assert (tmp_path / "several" / "checkpoints" / "within").is_dir()
    expect_alike(lines(tmp_path / "several"), lines(tmp_path / "one")[:1])
    capsys.readouterr()
    fit(resumed)
    told = capsys.readouterr().out
    assert "resuming after epoch 1 and" in told
    expect_alike(lines(tmp_path / "several"), lines(tmp_path / "one"))

    # The same evaluation, which the main process alone tells.
    ours = tmp_path / "one.json"
    Evaluate(run=tmp_path / "one", data=str(images), cache=tmp_path / "own", json=ours)()
    a, b = (json.loads(path.read_text()) for path in (ours, tmp_path / "several.json"))
    assert a["confusion"] == b["confusion"]
    assert a["auc"] == b["auc"]
    assert [bool(one["told"]) for one in found] == [True] + [False] * (count - 1)
    # Rows of all, in order; one image cannot be read.
    rows = (tmp_path / "predicted.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == sorted(row.split(",")[0] for row in rows[1:])
    assert len(rows) == 22
    assert [one["predict"] for one in found] == [2] * count


def test_each_process_decodes_its_share(tmp_path: Path, images: Path) -> None:
    code = """
        import json, sys
        from pathlib import Path
        import numpy as np
        from cnnjax.config import DeviceConfig, DistributedConfig
        from cnnjax.data import cache
        from cnnjax.data.batches import Feeder
        from cnnjax.data.index import read_index
        from cnnjax.machine import devices

        folder, root = map(Path, sys.argv[1:])
        mesh = devices.make_mesh(DeviceConfig(), DistributedConfig(**GIVEN))
        index, names = read_index(root, "PNEUMONIA"), []
        class Source:
            signature = index.source.signature
            def read(self, name):
                names.append(name)
                return index.source.read(name)
        decoded = cache.load(index.split("test"), Source(), 16, folder=folder)
        found = [sorted(names), decoded.fingerprint, len(decoded.quarantine)]
        names.clear()
        again = cache.load(index.split("test"), Source(), 16, folder=folder, limit_mib=0)
        assert (sorted(names), again.fingerprint) == (found[0], decoded.fingerprint)
        names.clear()
        feeder = Feeder(again.images, again.labels, mesh, -1)
        (batch,) = feeder.feed(np.arange(8)[None])
        mine = np.concatenate([part.data for part in batch.images.addressable_shards])
        first = 4 * GIVEN["process"]
        np.testing.assert_array_equal(mine, decoded.images[first : first + 4])
        assert sorted(names) == sorted(e.name for e in decoded.examples[first : first + 4])
        print(json.dumps(found))
    """
    each = ended(start(2, code, tmp_path / "cache", images))
    assert [status for status, _, _ in each] == [0, 0], each
    (first, *a), (second, *b) = (json.loads(output.splitlines()[-1]) for _, output, _ in each)
    assert (len(first), len(second)) == (10, 11)
    assert not set(first) & set(second)

    from cnnjax.data import cache
    from cnnjax.data.index import read_index

    index = read_index(images, "PNEUMONIA")
    own = cache.load(index.split("test"), index.source, 16, folder=tmp_path / "own")
    assert a == b == [own.fingerprint, 1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_others_end_with_a_sentence(
    tmp_path: Path, images: Path, killed: int
) -> None:
    code = """
        import os, sys
        from dataclasses import replace
        from pathlib import Path

        from several import config_of
        from cnnjax import fit
        from cnnjax.cli import guarded

        folder, root = map(Path, sys.argv[1:])
        config = config_of(folder / "several", root, folder / "cache", **GIVEN)
        config = replace(config, train=replace(config.train, epochs=25))
        sys.exit(guarded(lambda: fit(config) and 0))
    """
    started = start(2, code, tmp_path, images)
    metrics = tmp_path / "several" / "metrics.jsonl"
    until = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[killed].kill()
    since = time.monotonic()
    each = ended(started, 60)
    assert time.monotonic() - since < 60
    status, _, told = each[1 - killed]
    assert status == 1
    assert told.endswith(
        "error: another process of this run has ended or cannot be reached; its own message says"
        " why. Give the same command again to resume from the last checkpoint\n"
    )

    from dataclasses import replace

    for name in ("several", "one"):
        config = config_of(tmp_path / name, images, tmp_path / "own")
        fit(replace(config, train=replace(config.train, epochs=25)))  # 100 steps
    expect_alike(lines(tmp_path / "several"), lines(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_nobody_joins_ends_with_a_sentence(process: int) -> None:
    code = """
        import sys
        from dataclasses import replace
        from cnnjax.cli import guarded
        from cnnjax.config import DeviceConfig, DistributedConfig
        from cnnjax.machine import devices, processes

        processes._CONNECT = 1
        given = replace(DistributedConfig(**GIVEN), processes=2, process=int(sys.argv[1]))
        sys.exit(guarded(lambda: devices.make_mesh(DeviceConfig(), given) and 0))
    """
    ((status, _, errors),) = ended(start(1, code, process))
    assert status == 2
    last = errors.splitlines()[-1]
    assert last.startswith("error: --distributed.coordinator 127.0.0.1:")
    assert "this process cannot join the others; start all of them" in last


def test_a_lone_process_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import jax
        from cnnjax.config import DeviceConfig, DistributedConfig
        from cnnjax.machine import devices
        devices.make_mesh(DeviceConfig(), DistributedConfig())
        print(jax.distributed.is_initialized())
    """
    # A pod of Kubernetes, or a shell on a machine of a Slurm cluster, is no run of several.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    ((status, output, errors),) = ended(start(1, code), 60)
    assert (status, output, errors) == (0, "False\n", "")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"processes": 2}, "--distributed.processes and --distributed.process need"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "must be HOST:PORT, got host"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "must be between 0 and 1 for 2"),
        ({"mode": "off", "coordinator": "a:1", "processes": 1, "process": 0}, "not both"),
    ],
)
def test_flags_that_do_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        DistributedConfig(**given)


def test_alone_everything_is_main() -> None:
    assert processes.is_main()
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.on_main(lambda: 3) == 3
    assert list(processes.share(5)) == [0, 1, 2, 3, 4]
    assert processes.rounds(["a", "b"], "") == [(0, "a"), (1, "b")]
