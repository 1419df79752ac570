"""Shared by the benchmarks: alternating timing, measurement conditions, JSON files and tables."""

from __future__ import annotations

import json
import os
import platform
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.cli import guarded
from cnnjax.config import Config, DeviceConfig
from cnnjax.errors import InputError
from cnnjax.machine import devices
from cnnjax.machine.host import cache_folder

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = cache_folder() / "peers"  # made by `python -m benchmarks.peers --setup`

# CPU flags, the widest vectors first.
_VECTORS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}

Run = Callable[[], None]


def recipe_of(name: str) -> Config:
    """Returns the config of a script in `experiments/`."""
    config: Config = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["CONFIG"]
    return config


def in_turn(
    runs: Mapping[str, Run], rounds: int, *, settled: bool = False
) -> dict[str, list[float]]:
    """Times the runs in turn: A B C, A B C. Other load on the machine then affects all of them.

    Args:
        runs: functions to time, by name.
        rounds: number of rounds after the first, which warms up and is not counted.
        settled: whether each turn starts with a call that is not counted. It fills the caches and
            the allocator with the data of this run, as in a process that does nothing else.

    Returns:
        Seconds of each run in each counted round, by name.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            if settled:
                run()
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in took.items()}


def python_of(peer: str, environments: Path, on: str = "cpu") -> Path:
    """Returns the path of Python in a peer's environment for a platform; it may not exist."""
    folder = peer if on == "cpu" else f"{peer}-{on}"
    return environments / folder / "bin" / "python"


def call(what: str, command: Sequence[object], **environment: str) -> str:
    """Runs a process in the root of the checkout; returns its standard output.

    Raises:
        InputError: the process failed; the message contains `what` and its last line of errors.
    """
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,  # `-m benchmarks.NAME` is found here with any Python
        env=os.environ | environment,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no error message"]
        raise InputError(f"{what} failed: {said[-1].removeprefix('error: ')}")
    return done.stdout


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Returns median, quartiles and 95th percentile, in milliseconds."""
    low, median, high, tail = np.percentile(seconds, (25, 50, 75, 95)) * 1e3
    return {
        "median_ms": float(median),
        "quartile1_ms": float(low),
        "quartile3_ms": float(high),
        "p95_ms": float(tail),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the name of the CPU and its widest vectors; the name alone is ambiguous in a VM.

    Args:
        cpuinfo: Linux's description of the CPU. Without this file, only the machine type is known.
    """
    found: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    has = found.get("flags", "").split()
    widest = [name for flag, name in _VECTORS.items() if flag in has][:1]
    return ", ".join([found["model name"], *widest])


def circumstances(device: DeviceConfig) -> dict[str, Any]:
    """Returns the conditions of a measurement: machine, devices, versions, load and commit."""
    mesh = devices.make_mesh(device)
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
    return {
        "device": devices.describe(mesh),
        "device_kind": mesh.devices.flat[0].device_kind,
        "platform": devices.platform(mesh),
        "devices": mesh.size,
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "commit": commit(),
    }


def circumstances_apart(platform: str) -> dict[str, Any]:
    """Returns `circumstances` from a separate process.

    Use it if child processes compute: the first process that asks JAX for its devices reserves most
    of the memory of a GPU, or the whole TPU.
    """
    return json.loads(call("measure", [sys.executable, "-m", "benchmarks.measure", platform]))


def commit() -> str | None:
    """Returns the commit, with a plus if files differ from it; None outside of a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # git is not installed
            return ""
        return done.stdout.strip()

    name = git("rev-parse", "--short", "HEAD")
    return (name + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) or None


def headline(found: Mapping[str, Any]) -> str:
    """Returns a line with the conditions of a measurement, to print above a table."""
    load = found["load_average"]
    busy = f", load {load[0]:.1f}" if load else ""
    return (
        f"{found['device']}, {found['processor']}; jax {found['versions']['jax']},"
        f" commit {found['commit']}{busy}"
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; columns of numbers are right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [
        all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))
    ]

    def line(values: Sequence[str]) -> str:
        aligned = (
            v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    print(line(columns))
    for row in cells:
        print(line(row))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a result as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(document, indent=1, default=str) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"--json {path}: {error.strerror or error}") from None


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> int:
    """Prints the circumstances of the platform in the first argument, for `circumstances_apart`."""
    print(json.dumps(circumstances(DeviceConfig(sys.argv[1]))))  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
