"""Reads the initial weights of `--train.init`, and copies the layers that fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np

from cnnjax.config import Config, DataConfig, flags
from cnnjax.errors import InputError
from cnnjax.machine import processes
from cnnjax.networks.variables import flatten, unflatten
from cnnjax.optimizers import expect_trainable
from cnnjax.run import release
from cnnjax.run.parts import fingerprint
from cnnjax.run.workdir import Workdir

PyTree = Any

_SHOWN = 6  # layers listed by name
_UNSEEN = ("--model.standardize", "--model.local-contrast", "--data.frame")


class Weights(NamedTuple):
    """Trained arrays."""

    arrays: Mapping[str, np.ndarray]
    """By collection, layer and name: `params/stem/kernel`, `batch_stats/stem_norm/mean`."""
    about: str
    """A phrase that describes their source."""
    config: Config | None
    """The model, the size and the frame with which they were trained, if known."""


def read(source: str, fold: int) -> Weights:
    """Returns the weights that `--train.init` names.

    Args:
        source: `released`; the folder of a run, for its best checkpoint, or of a release; or a
            .safetensors or .npz file, whose arrays are named as in `Weights.arrays`, with an
            optional prefix `MEMBER/` as in files of `cnnjax export --format safetensors`.
        fold: the run's fold; of an ensemble, the network of this number is used. In a release by
            `experiments/crossval.py` that network was not trained on the fold.

    Raises:
        InputError: the source holds no weights.
    """
    path = Path(source)
    if source == "released" or release.is_release(path):
        released = release.read() if source == "released" else release.read(path)
        member = fold % len(released.members)
        about = "the package's release" if source == "released" else str(path)
        data = DataConfig(size=released.size, frame=released.frame)
        return Weights(
            flatten(released.members[member]),
            f"network {member} of {about}",
            Config(data=data, model=released.model),
        )
    if path.is_dir():
        from cnnjax.run.checkpoint import Checkpoints  # importing Orbax takes half a second

        workdir = Workdir(path)
        config = workdir.read_config()
        with processes.alone():  # each process reads all weights
            checkpoints = Checkpoints(workdir.checkpoints)
            try:
                arrays = flatten(checkpoints.variables("best"))
            finally:
                checkpoints.close()
        return Weights(arrays, f"the best checkpoint of {path}", config)
    return _one_network(_read_file(path), path, fold)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a .safetensors or .npz file by name."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.numpy import load

            try:
                return dict(load(path.read_bytes()))
            except SafetensorError as error:
                raise ValueError(error) from None
    except ImportError:
        raise InputError(
            f"--train.init {path} needs safetensors; install it with: pip install 'cnnjax[export]'"
        ) from None
    except (OSError, ValueError, BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--train.init {path} cannot be read ({reason})") from None
    raise InputError(
        f"--train.init {path} is not a run, a release, a .safetensors or an .npz file; give one of"
        " these, `released` or `random`"
    )


def _one_network(arrays: dict[str, np.ndarray], path: Path, fold: int) -> Weights:
    """Returns the arrays of one network, if a file holds several networks."""
    members = sorted({int(m) for name in arrays if (m := name.partition("/")[0]).isdigit()})
    if not members:
        return Weights(arrays, str(path), None)
    member = members[fold % len(members)]
    prefix = f"{member}/"
    one = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    return Weights(one, f"network {member} of {path}", None)


def expect_fit(network: Any, config: Config, weights: Weights | None) -> None:
    """Raises InputError if a network does not fit `--train.freeze` or `--train.init`.

    Args:
        network: a Linen module.
        config: the run's config.
        weights: the weights of `--train.init`, if any.
    """
    if not config.train.freeze and weights is None:
        return
    side = config.data.size
    images = jax.ShapeDtypeStruct((1, side, side, 1), np.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), images)
    if config.train.freeze:
        expect_trainable(shapes["params"], config.train.freeze)
    if weights is not None:
        _copied(shapes, weights, config)


def expect_shapes(given: PyTree, wanted: PyTree) -> None:
    """Raises InputError if the initial variables differ from the network's in names or shapes."""
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, wanted))
    ]
    ours, theirs = shapes
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"init does not fit the network: {name} has shape"
                f" {ours.get(name, 'none')} in init and {theirs.get(name, 'none')} in the network"
            )


def started(drawn: PyTree, weights: Weights, config: Config) -> tuple[PyTree, dict[str, Any]]:
    """Replaces the layers of drawn variables that fit with the layers of the weights.

    A layer (the arrays of one module) is copied as a whole or not at all.

    Args:
        drawn: nested dicts of arrays, `params` and `batch_stats`.
        weights: the weights to copy.
        config: the run's config; `train.init_without` names layers that are not copied.

    Returns:
        The variables; and the content of `init.json`: the source, its SHA-256, and the layers that
        were copied, drawn, and left out.

    Raises:
        InputError: no layer fits.
    """
    copied = _copied(drawn, weights, config)
    ours, theirs, whole = _by_layer(flatten(drawn)), _by_layer(weights.arrays), flatten(drawn)
    for layer in copied:
        for name, value in theirs[layer].items():
            whole[name] = np.asarray(value, whole[name].dtype)
    told = {
        "source": weights.about,
        "sha256": fingerprint(dict(weights.arrays)),
        "copied": sorted(copied),
        "drawn": sorted(ours.keys() - copied),
        "left_out": sorted(theirs.keys() - copied),
    }
    return {"params": {}, "batch_stats": {}} | unflatten(whole), told


def _copied(wanted: PyTree, weights: Weights, config: Config) -> set[str]:
    """Returns the layers to copy: those with the same names and shapes in both."""
    ours, theirs = _by_layer(flatten(wanted)), _by_layer(weights.arrays)
    without = config.train.init_without
    copied = {
        layer
        for layer, arrays in ours.items()
        if _shapes(arrays) == _shapes(theirs.get(layer, {}))
        and not (without and re.search(without, layer))
    }
    if not copied:
        raise InputError(
            f"--train.init {config.train.init}: no layer of {weights.about} has the name and the"
            f" shapes of a layer of the network ({_named(theirs)} there, {_named(ours)} here)"
            + _other_flags(config, weights)
        )
    return copied


def describe(told: dict[str, Any], weights: Weights, config: Config) -> str:
    """Returns lines that say which layers were copied, for the screen."""
    lines = [f"init      {len(told['copied'])} layers of {weights.about}"]
    for name, label in (("drawn", "initialized randomly"), ("left_out", "left out")):
        if told[name]:
            lines.append(f"  {label}: {_named(told[name])}")
    if weights.config is not None:
        before, now = flags(weights.config), flags(config)
        other = [_given(flag, before[flag]) for flag in _UNSEEN if before[flag] != now[flag]]
        if other:
            lines.append(f"  note: these weights were trained with {', '.join(other)}")
    return "\n".join(lines)


def _by_layer(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Groups arrays by their module, such as `stage1_block1/conv1`."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        layer = name.partition("/")[2].rpartition("/")[0]
        layers.setdefault(layer, {})[name] = value
    return layers


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in arrays.items()}


def _named(layers: Any) -> str:
    names = [layer or "(top)" for layer in sorted(layers)]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _other_flags(config: Config, weights: Weights) -> str:
    """Returns a hint that lists the network flags in which the two differ."""
    if weights.config is None:
        return ""
    before, now = flags(weights.config), flags(config)
    other = [
        _given(flag, before[flag])
        for flag in before
        if flag.startswith("--model.") and before[flag] != now[flag]
    ]
    return f"; those were trained with {', '.join(other)}" if other else ""


def _given(flag: str, value: Any) -> str:
    """Returns a flag in command-line form, such as `--model.no-standardize` for a false value."""
    if not isinstance(value, bool):
        return f"{flag} {value}"
    part, _, name = flag.rpartition(".")
    return flag if value else f"{part}.no-{name}"
