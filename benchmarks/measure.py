"""What the benchmarks share: timing in turn, the circumstances, JSON files and tables."""

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

# Flags of a CPU, the widest vectors first.
_VECTORS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}

Run = Callable[[], None]


def recipe_of(name: str) -> Config:
    """Returns the config of a script of `experiments/`."""
    config: Config = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["CONFIG"]
    return config


def in_turn(
    runs: Mapping[str, Run], rounds: int, *, settled: bool = False
) -> dict[str, list[float]]:
    """Times each run once a round: A B C, A B C. A busy machine slows all of them alike.

    Args:
        runs: what to time, by name.
        rounds: how often.
        settled: each turn starts with a run that is not counted, after which the caches and the
            memory at hand are the run's own again, as in a process that does nothing else.

    Returns:
        Seconds of each run in each round; a first round warms up and is not counted.
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
    """Returns the Python of a peer's environment for a platform, which need not be there."""
    folder = peer if on == "cpu" else f"{peer}-{on}"
    return environments / folder / "bin" / "python"


def call(what: str, command: Sequence[object], **environment: str) -> str:
    """Runs a process in the root of the checkout, and returns what it printed.

    Raises:
        InputError: it failed; the message names `what` and holds the last line of its errors.
    """
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,  # where `-m benchmarks.NAME` is found, whoever's Python it is
        env=os.environ | environment,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
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
    """Returns the CPU's name and its widest vectors: virtual machines call many alike.

    Args:
        cpuinfo: where Linux tells of it; elsewhere there is no such file, nor so much to say.
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
    """Returns what else one must know to compare with another run: machine, versions, load."""
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
    """Returns the circumstances as a process of its own finds them.

    For a process whose children compute: whichever first asks JAX for its devices gets most of a
    GPU's memory, or the whole TPU.
    """
    return json.loads(call("measure", [sys.executable, "-m", "benchmarks.measure", platform]))


def commit() -> str | None:
    """Returns the checkout's commit, with a plus if files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # none here
            return ""
        return done.stdout.strip()

    name = git("rev-parse", "--short", "HEAD")
    return (name + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) or None


def headline(found: Mapping[str, Any]) -> str:
    """Returns the line about the circumstances that stands above a table."""
    load = found["load_average"]
    busy = f", load {load[0]:.1f}" if load else ""
    return (
        f"{found['device']}, {found['processor']}; jax {found['versions']['jax']},"
        f" commit {found['commit']}{busy}"
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under their columns; numbers to the right."""
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
    """Writes a result.

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
    """Prints the circumstances of the platform that the first argument names; see above."""
    print(json.dumps(circumstances(DeviceConfig(sys.argv[1]))))  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
