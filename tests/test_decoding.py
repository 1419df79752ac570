"""Many small files are decoded in worker processes, with the results of one process."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnnjax.data import decoding
from cnnjax.data.decoding import Outcome, decode_all
from cnnjax.data.sources import Source, Tree, Zip

NAMES = [f"{i:03}.jpeg" for i in range(100)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Returns a folder of 98 images, a broken and a missing one."""
    root = tmp_path / "films"
    root.mkdir()
    for i, name in enumerate(NAMES[:-1]):
        out = io.BytesIO()
        Image.fromarray(np.full((20, 30), 2 * i, np.uint8)).save(out, "JPEG")
        (root / name).write_bytes(out.getvalue() if i != 40 else b"no image")
    return root


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes 100 images worth one worker, on any machine; returns the process IDs of workers."""
    monkeypatch.setattr(decoding, "_SHARE", 50)
    monkeypatch.setattr(decoding, "cpu_cores", lambda: 2)
    found: list[int] = []

    class Watched(decoding._Worker):
        def __init__(self, source: Source, size: int) -> None:
            super().__init__(source, size)
            found.append(self._process.pid)

    monkeypatch.setattr(decoding, "_Worker", Watched)
    return found


class OneThread(ThreadPoolExecutor):
    """Leaves all images to the first worker."""

    def __init__(self, cores: int, **options: Any) -> None:
        super().__init__(1, **options)


def alone(source: Source) -> list[Outcome]:
    return [decoding._decoded(source, name, 16) for name in NAMES]


def expect_equal(found: list[Outcome], expected: list[Outcome]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_a_worker_gives_what_one_process_gives(
    packed: bool, tree: Path, workers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Source = Tree(tree)
    if packed:
        with zipfile.ZipFile(tree.with_suffix(".zip"), "w") as archive:
            for name in NAMES:
                archive.writestr(name, (tree / name).read_bytes() if name != NAMES[-1] else b"")
        source = Zip(tree.with_suffix(".zip"))
    expected = alone(source)
    monkeypatch.setattr(decoding, "_decoded", lambda *_: pytest.fail("not in the worker"))
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", OneThread)
    expect_equal(list(decode_all(source, NAMES, 16)), expected)
    assert len(workers) == 1
    with pytest.raises(ChildProcessError):  # it has ended, and its status was collected
        os.waitpid(workers[0], 0)


def test_the_images_of_a_killed_worker_are_decoded_without_it(
    tree: Path,
    workers: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source, asked = Tree(tree), []
    ask = decoding._Worker.ask

    def killed(worker: decoding._Worker, names: list[str]) -> list[Outcome] | None:
        asked.extend(names)
        if len(asked) > 30:
            os.kill(workers[0], signal.SIGKILL)
        return ask(worker, names)

    monkeypatch.setattr(decoding._Worker, "ask", killed)
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", OneThread)
    expect_equal(list(decode_all(source, NAMES, 16)), alone(source))
    assert asked == NAMES[:31]
    assert "ended with status -9 (-9: perhaps memory ran out)" in capfd.readouterr().err


def test_few_images_and_large_ones_start_no_worker(tree: Path, workers: list[int]) -> None:
    source = Tree(tree)
    list(decode_all(source, NAMES[:60], 16))
    for name in NAMES[:-1]:
        (tree / name).write_bytes(bytes(2**17))
    list(decode_all(source, NAMES, 16))
    assert workers == []


def test_a_worker_imports_no_jax() -> None:
    code = "import sys, cnnjax.data.decoding; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
