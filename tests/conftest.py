"""Strict promotion, several devices, and small data trees for every test."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from faults.classes import CLASSES, class_of
from PIL import Image

from cnnjax.machine.devices import keep_compiled_programs

# Keeps the tests, and the processes that they start, out of the user's cache folder. Those that
# pytest-xdist starts share the one of the process that started them, and what is compiled in it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="cnnjax-tests-")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
# Most of the tests' programs take longer to compile well than to run.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)

# Before JAX is first used: more devices than this machine may have cores, so that every test of a
# step is also a test of dividing a batch.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Many tests compile the same few programs.
keep_compiled_programs()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that `tests/faults/classes.py` lists."""
    for item in items:
        if class_of(item.nodeid) is not None:
            item.add_marker("faults")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints what was tried of each class of faults, and what passed, for `-m faults`."""
    if "faults" not in config.option.markexpr:
        return
    counts = {kind: dict.fromkeys(("passed", "failed", "skipped"), 0) for kind in CLASSES}
    tried: dict[str, set[str]] = {kind: set() for kind in CLASSES}
    for outcome, reports in terminalreporter.stats.items():
        column = "failed" if outcome == "error" else outcome
        for report in reports if column in ("passed", "failed", "skipped") else ():
            kind = class_of(report.nodeid)
            if kind is not None and (report.when == "call" or outcome != "passed"):
                counts[kind][column] += 1
                test = report.nodeid.partition("::test_")[2].partition("[")[0]
                tried[kind].add(test.replace("_", " "))
    terminalreporter.section("faults")
    width = max(map(len, CLASSES))
    terminalreporter.line(f"{'class':<{width}}  passed  failed  skipped")
    for kind, found in counts.items():
        passed, failed, skipped = found.values()
        terminalreporter.line(f"{kind:<{width}}  {passed:6}  {failed:6}  {skipped:7}")
        for test in sorted(tried[kind]):
            terminalreporter.line(f"    {test}")


def radiograph(rng: np.random.Generator, positive: bool, size: int = 32) -> np.ndarray:
    """Returns uint8 [size, size]: noise, with a bright patch somewhere if positive."""
    image = rng.integers(0, 120, (size, size))
    if positive:
        row, column = rng.integers(0, size // 2, 2)
        image[row : row + size // 3, column : column + size // 3] += 120
    return image.astype(np.uint8)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kaggle-like tree: 96 train, 8 val and 32 test images, half of each class."""
    root = tmp_path_factory.mktemp("chest_xray")
    rng = np.random.default_rng(0)
    patient = 0
    for split, per_class in (("train", 48), ("val", 4), ("test", 16)):
        for name, positive in (("NORMAL", False), ("PNEUMONIA", True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                patient += i % 2 == 0  # two images a patient
                cause = ("bacteria", "virus")[patient % 2]
                file = f"person{patient}_{cause}_{i}" if positive else f"IM-{patient:04}-{i}"
                Image.fromarray(radiograph(rng, positive)).save(folder / f"{file}.jpeg", quality=95)
    return root


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that a shell started in the background may have been told to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes empty files under a new root: enough for what looks at names only."""

    def make(*names: str, root: str = "tree") -> Path:
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / root

    return make
