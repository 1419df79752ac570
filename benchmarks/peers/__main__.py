"""Compares a train step of the same network in cnnjax, PyTorch, Keras and NumPy.

    python -m benchmarks.peers --setup          # creates an environment for each peer, once
    python -m benchmarks.peers --json peers.json
    python -m benchmarks.peers --peers numpy    # needs no environment of its own

All libraries start from the same weights and use the same batches, without augmentation. The
batches are on the device; Keras gets them through `tf.data` from host memory, as in its `fit`.
First, the logits (within 1e-4) and the losses of ten steps (within 1e-3) must be the same as ours,
in float32. Then all libraries take steps in turn, in rounds A B C A B C. The ratio in a round is
our throughput divided by theirs; its median, minimum and maximum are printed. A form that fails is
left out, and the JSON file says why. The file is written after each combination. The networks are
those of `experiments/baseline.py`, with Adam, and `experiments/pneumonia.py`, with AdamW, at the
image sizes of these recipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from benchmarks.measure import (
    ENVIRONMENTS,
    ROOT,
    call,
    circumstances,
    headline,
    print_table,
    python_of,
    recipe_of,
    write_json,
)
from cnnjax.cli import guarded
from cnnjax.config import DeviceConfig
from cnnjax.errors import InputError
from cnnjax.machine import devices
from cnnjax.networks import make_model

# Packages in each peer's environment, on a machine without and with a GPU.
PACKAGES: dict[str, dict[str, list[str]]] = {
    "torch": {"cpu": ["torch==2.13.0", "numpy", "pillow"]},
    "keras": {
        "cpu": ["tensorflow-cpu==2.21.0", "keras==3.15.1", "scipy", "pillow"],
        "gpu": ["tensorflow[and-cuda]==2.21.0", "keras==3.15.1", "scipy", "pillow"],
    },
}
FORMS = {
    "torch": ("eager", "eager channels_last", "compiled"),
    "keras": ("default", "graph"),
    "numpy": ("",),
}
# Keras adds Adam's epsilon before the bias correction of the second moment, the others after it.
# With a negligible epsilon the steps are the same.
RATE, EPSILON = 1e-3, 1e-10
RECIPES = {"baseline": "baseline", "resnet": "pneumonia"}
# By default both JAX and TensorFlow reserve nearly all memory of a GPU when they start.
_SHARE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
OURS = "cnnjax"
LeftOut = dict[str, str]  # reason by name of the peer
_PROOF = 10  # number of steps whose losses must agree
_REST = 0.3  # seconds between turns, until the threads of the previous turn stop spinning
_WARM = 4  # steps at the start of a turn that are not counted, while the threads wake up


@dataclass(frozen=True)
class Options:
    """What is compared."""

    setup: bool = False
    """Create the environments of the peers and exit."""
    environments: Path = ENVIRONMENTS
    """Folder of the peers' environments, `torch` and `keras` (on a GPU `torch-gpu` and
    `keras-gpu`); missing ones are left out."""
    networks: tuple[Literal["baseline", "resnet"], ...] = ("baseline", "resnet")
    """Networks to compare."""
    precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Dtypes of the computation."""
    batches: tuple[int, ...] = (32,)
    """Images per step."""
    size: int | None = None
    """Side of the images, in pixels; by default that of the recipe."""
    width: int | None = None
    """Channels of the ResNet's first stage; by default those of the recipe."""
    rounds: int = 9
    """Number of rounds after the first, which is not counted."""
    steps: int | None = None
    """Steps per turn; by default 16 on a CPU and 160 on a GPU."""
    peers: tuple[Literal["torch", "keras", "numpy"], ...] = ("torch", "keras")
    """Peers to compare with; `numpy`: the networks of `cnnjax.scratch`, on the CPU in float32."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Platform of all sides; `auto` is a GPU if JAX finds one."""
    json: Path | None = None
    """Write the rows and the circumstances to this file."""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        if min(self.batches, default=0) < 1:
            raise InputError("--batches must be numbers of at least 1")


class Worker:
    """A process that runs a network; see `worker.py`."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by close()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=ROOT,
                env=os.environ | _SHARE,
            )
        except OSError as error:
            raise InputError(f"{name} cannot be started: {command[0]}: {error.strerror}") from None
        try:
            self.version: str = self._read()["version"]
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> Any:
        """Sends a request and returns the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _read reports the reason
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["no error message"]
            status = self._process.wait()
            reason = f"by signal {-status}" if status < 0 else said[-1]
            raise InputError(f"{self.name} stopped: {reason}")
        return json.loads(line)


def set_up(options: Options) -> None:
    """Creates the environments of the peers with venv and pip.

    Raises:
        InputError: venv or pip failed.
    """
    for peer in filter(PACKAGES.get, options.peers):  # the others use our environment
        python = python_of(peer, options.environments, options.device)
        folder = python.parents[1]
        packages = PACKAGES[peer].get(options.device, PACKAGES[peer]["cpu"])
        print(f"{folder}: {' '.join(packages)}")
        call(f"making {folder}", [sys.executable, "-m", "venv", folder])
        call(f"pip for {folder}", [python, "-m", "pip", "install", "--quiet", *packages])


def write_problem(path: Path, options: Options, network: str, batch: int) -> int:
    """Writes the common weights and batches to a file; returns the side of the images."""
    recipe = recipe_of(RECIPES[network])
    config, size = recipe.model, options.size or recipe.data.size
    if options.width is not None:
        config = replace(config, width=options.width)
    settings = asdict(config) | {
        "network": network,
        "device": options.device,
        "rate": RATE,
        "decay": recipe.train.weight_decay,
        "epsilon": EPSILON,
    }
    images = np.zeros((1, size, size, 1), np.float32)
    variables = jax.jit(make_model(config).init)(jax.random.key(0), images)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    rng = np.random.default_rng(0)
    # The labels can be learned: they depend on the mean of a patch.
    pixels = rng.integers(0, 256, (_PROOF, batch, size, size), dtype=np.uint8)
    labels = (pixels[..., :8, :8].mean((2, 3)) > 127.5).astype(np.int32)
    arrays: dict[str, Any] = {
        "/".join(key.key for key in where): np.asarray(leaf) for where, leaf in leaves
    }
    for name, value in arrays.items():
        if name.endswith("/scale"):  # a scale of zero would hide the layers before it
            arrays[name] = rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
    np.savez(path, settings=json.dumps(settings), images=pixels, labels=labels, **arrays)
    return size


def started(
    options: Options, problem: Path, precision: str, left_out: LeftOut, stack: ExitStack
) -> list[Worker]:
    """Starts our worker and every available form of every peer; `stack` ends the processes."""

    def start(name: str, python: str, module: str, *arguments: str) -> Worker:
        worker = Worker(name, [python, "-m", f"benchmarks.peers.{module}", *arguments, precision])
        stack.callback(worker.close)
        return worker

    workers = [start(OURS, sys.executable, "ours", str(problem), "")]
    for peer in options.peers:
        python = sys.executable
        if peer == "numpy" and precision != "float32":
            continue
        if peer in PACKAGES:
            python = str(python_of(peer, options.environments, options.device))
            if not Path(python).exists():
                left_out[peer] = f"{peer} has no {python}; make it with --setup"
                continue
        for form in FORMS[peer]:
            name = f"{peer} {form}".strip()
            if name in left_out:
                continue
            with leaving_out(name, left_out):
                workers.append(start(name, python, peer, str(problem), form))
    return workers


@contextlib.contextmanager
def leaving_out(name: str, left_out: LeftOut) -> Iterator[None]:
    """Records the error of a peer in the block; an error of our worker is raised."""
    try:
        yield
    except InputError as error:
        if name == OURS:
            raise
        left_out[name] = str(error)


def prove(workers: list[Worker], left_out: LeftOut, others: LeftOut) -> list[dict[str, Any]]:
    """Returns the largest differences between each peer's logits and losses and ours.

    A peer whose difference is too large for rounding has another network. It is added to `left_out`
    and `others`.
    """
    found = []
    ours, *peers = workers
    logits = np.array(ours.ask(do="logits"))
    losses = np.array(ours.ask(do="losses", steps=_PROOF))
    for peer in peers:
        with leaving_out(peer.name, left_out):
            apart = float(np.abs(np.array(peer.ask(do="logits")) - logits).max())
            lost = float(np.abs(np.array(peer.ask(do="losses", steps=_PROOF)) - losses).max())
            if apart > 1e-4 or lost > 1e-3:
                others[peer.name] = (
                    f"{peer.name} is another network than ours: logits differ by {apart:.2g},"
                    f" losses by {lost:.2g}"
                )
                raise InputError(others[peer.name])
            found.append({"peer": peer.name, "logits": apart, "losses": lost})
    return found


def measure(options: Options, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Proves and times every combination; returns the document.

    Args:
        options: what is compared, with `device` and `steps` resolved.
        keep: called with the document so far after each combination.

    Raises:
        InputError: our worker failed, or all peers did.
    """
    rows: list[dict[str, Any]] = []
    proofs: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    versions: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for network, batch in product(options.networks, options.batches):
            problem = Path(folder) / f"{network}-{batch}.npz"
            size = write_problem(problem, options, network, batch)
            others: LeftOut = {}  # peers whose networks differ, as found in float32
            for precision in options.precisions:
                named = {"network": network, "precision": precision, "batch": batch}
                left_out = dict(others)
                with ExitStack() as stack:
                    workers = started(options, problem, precision, left_out, stack)
                    if precision == "float32":
                        found = prove(workers, left_out, others)
                        proofs += [{"network": network, "batch": batch} | proof for proof in found]
                    took = _in_turn(workers, options, left_out)
                for worker in workers:
                    if worker.name in took:
                        versions.add(worker.version)
                ours = took.pop(OURS)
                rows += [
                    named | {"pixels": size, "peer": peer} | _compare(ours, theirs)
                    for peer, theirs in took.items()
                ]
                for peer, why in left_out.items():
                    print(f"left out: {why}", file=sys.stderr)
                    failed.append(named | {"peer": peer, "why": why})
                document = {"rows": rows, "proofs": proofs, "versions": sorted(versions)}
                if rows:
                    keep(document | {"left_out": failed})
    if not rows:
        raise InputError("no peer could be measured; see above")
    return document


def _in_turn(workers: list[Worker], options: Options, left_out: LeftOut) -> dict[str, np.ndarray]:
    """Returns the seconds per step of each worker in each round, except those left out."""
    took: dict[str, list[float]] = {worker.name: [] for worker in workers}
    # On a GPU, the steps of a call are one program; another number of steps is another program.
    warm = _WARM if options.device == "cpu" else options.steps
    for _ in range(options.rounds + 1):
        for worker in workers:
            if worker.name not in left_out:
                with leaving_out(worker.name, left_out):
                    time.sleep(_REST)
                    worker.ask(do="time", steps=warm)
                    seconds = worker.ask(do="time", steps=options.steps)
                    took[worker.name].append(seconds / options.steps)
    return {name: np.array(times[1:]) for name, times in took.items() if name not in left_out}


def _compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    ratios = theirs / ours
    return {
        "ours_ms": float(np.median(ours) * 1e3),
        "theirs_ms": float(np.median(theirs) * 1e3),
        "ratio": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
    }


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    os.environ |= _SHARE  # also for this process, before JAX initializes the GPU
    on = devices.platform(devices.make_mesh(DeviceConfig(options.device)))
    if on == "tpu":
        raise InputError("--device auto: the peers do not run on a TPU; give --device cpu")
    steps = options.steps or (16 if on == "cpu" else 160)
    options = replace(options, device=on, steps=steps)  # type: ignore[arg-type]
    if options.setup:
        set_up(options)
        return 0
    found = circumstances(DeviceConfig(options.device, 0 if on == "cpu" else 1))
    asked = asdict(options)
    del asked["environments"], asked["json"]

    def keep(document: dict[str, Any]) -> None:
        if options.json is not None:
            write_json(options.json, {"circumstances": found, "options": asked, **document})

    measured = measure(options, keep)
    print(headline(found))
    print(*measured["versions"], sep="\n")
    keys = ["network", "peer", "precision", "batch", "pixels", "ours_ms", "theirs_ms"]
    keys += ["ratio", "ratio_min", "ratio_max"]
    print_table(keys, [[row[key] for key in keys] for row in measured["rows"]])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
