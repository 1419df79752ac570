"""The configuration of a run: frozen dataclasses, one per concern.

A run is a function of (config, data, seed). Every field is a command-line flag of every recipe
(`--train.epochs 40`), stands in the run's `config.json`, and is compared when a run is resumed,
unless it only says where the run takes place.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from cnnjax.errors import InputError

Precision = Literal["auto", "float32", "bfloat16"]
Frame = Literal["whole", "lungs"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are split."""

    root: str = "phantom"
    """A folder or zip of class folders, with or without `train`, `val` and `test` above them, a
    MedMNIST .npz, a --data.table, or the word `phantom`. With a table, where its paths begin; by
    default its own folder."""
    size: int = 64
    """Side of the square that every image is reduced to, in pixels."""
    frame: Frame = "whole"
    """What the network sees of an image: `whole`, all of it, stretched to the square; `lungs`, the
    part around the lungs, as a small network finds them (`cnnjax.lungs`)."""
    positive: str = "PNEUMONIA"
    """Of two classes, the name of the one that counts as positive (label 1)."""
    classes: str = ""
    """The classes to tell apart, in the order of their labels: `normal,bacteria,virus`. By default
    all that are found, sorted by name, of two the positive one last. An image is of the class of
    its folder or label, or else of the cause that its published file name tells, or left out."""
    table: Path | None = None
    """A CSV file with a row for each image: `path`, `label` and, if known, `patient`, `split`, and
    `weight`, by which the image's loss is multiplied (see `cnnjax.data.table`)."""
    columns: str = ""
    """Names of the table's columns where they are others: `path=file,label=finding`. An empty one,
    `weight=`, leaves the column out."""
    patient_pattern: str = ""
    """Regular expression that finds the patient in an image's path: its group, or all of the match.
    By default DICOM tags and the published file names tell."""
    validation: Literal["patients", "blocks", "official"] = "patients"
    """What validates: `patients`, a fold of all patients of train and val; `blocks`, a run of the
    file numbering, which is further from the rest; `official`, the val folder."""
    folds: int = 5
    """Number of folds; no patient is in two."""
    fold: int = 0
    """Which fold is held out for validation, counted from 0."""
    strict: bool = False
    """Stop at a file that cannot be decoded, or is in two classes, instead of leaving it out."""
    cache: Path | None = None
    """Folder of the decoded images; by default the user's cache folder."""
    resident_mib: int = 1024
    """Data sets up to this size, in MiB, live on the device; larger ones are streamed. Several
    processes (--distributed) divide the data set among all devices, and this limits each part."""

    def __post_init__(self) -> None:
        _settle(self, "data.")
        _require(8 <= self.size <= 4096, "--data.size", "be between 8 and 4096 pixels", self.size)
        _require(self.folds >= 2, "--data.folds", "be at least 2", self.folds)
        _require(
            0 <= self.fold < self.folds,
            "--data.fold",
            f"be between 0 and {self.folds - 1} for {self.folds} folds",
            self.fold,
        )
        self._settle_table()
        names = [name.casefold() for name in self.class_names]
        if self.classes and (len(names) < 2 or len(set(names)) < len(names)):
            raise InputError(
                f"--data.classes must name two or more classes, as normal,bacteria,virus; got"
                f" {self.classes}"
            )
        positive = self.positive.casefold()
        said = positive in names or self.positive != DataConfig.positive
        if len(names) == 2 and said and positive != names[1]:
            raise InputError(
                f"--data.positive {self.positive} must be the last of --data.classes {self.classes}"
            )

    def _settle_table(self) -> None:
        """Lets a root in .csv be the table, and the table's folder the root where there is none."""
        table = self.table
        if self.root.lower().endswith(".csv"):
            table = Path(os.path.expanduser(self.root))  # noqa: PTH111
            if self.table not in (None, table):
                raise InputError(
                    f"--data.root {self.root} and --data.table {self.table} are two; give one table"
                )
        if table is not None and (self.root == "phantom" or self.root.lower().endswith(".csv")):
            object.__setattr__(self, "root", str(table.parent))
        object.__setattr__(self, "table", table)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in `classes`; none where all that are found count."""
        return tuple(name.strip() for name in self.classes.split(",") if name.strip())


_NETWORKS = ("baseline", "resnet")
_IMPORT_PATH = re.compile(r"[\w.]+:[\w.]+(\(.*\))?", re.DOTALL)


@dataclass(frozen=True)
class OtherData:
    """How a trained run reads other data, where not as it read its own."""

    table: Path | None = None
    """A table of the images, as --data.table of a training; their paths begin at --data, or at the
    table's own folder."""
    columns: str | None = None
    """As --data.columns of a training; by default as the run's."""
    patient_pattern: str | None = None
    """As --data.patient-pattern of a training; by default as the run's, and '' for none."""

    def read_like(self, trained: DataConfig, root: str, classes: tuple[str, ...]) -> DataConfig:
        """Returns the config of other data.

        Args:
            trained: the run's own.
            root: of the other data.
            classes: names of the labels that the run tells apart.
        """
        pattern = trained.patient_pattern if self.patient_pattern is None else self.patient_pattern
        like = dataclasses.replace(
            trained,
            root=root,
            table=self.table,
            columns=trained.columns if self.columns is None else self.columns,
            patient_pattern=pattern,
            strict=False,
        )
        if self.columns and like.table is None:
            raise InputError("--columns needs --table")
        if len(classes) == 2:
            return dataclasses.replace(like, positive=classes[1])
        # In the run's order, though the data lack a class.
        return dataclasses.replace(like, classes=",".join(classes))


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and its size."""

    name: str = "baseline"
    """`baseline` is the blog post's network, `resnet` a small residual one. Or the import path of a
    Linen module, `package.module:Name` or `package.module:Name(width=64)`; the flags below do not
    concern it."""
    channels: int = 1
    """How often the network sees the gray image: 1, or 3 as the post did."""
    width: int = 32
    """ResNet: channels of the first stage; each later stage doubles them."""
    depth: int = 1
    """ResNet: residual blocks per stage."""
    stages: int = 4
    """ResNet: how many stages."""
    stem: Literal[2, 4] = 2
    """ResNet: stride of the first convolution, which is 3x3 with 2 and 7x7 with 4."""
    standardize: bool = False
    """Bring each image to mean 0 and standard deviation 1 before the network sees it."""
    local_contrast: bool = False
    """Beside the image, give the network its local contrast: each pixel less the mean around it,
    over the deviation there (Pinto et al., PLoS Comput Biol 2008; Jarrett et al., ICCV 2009). It
    needs --model.standardize."""

    def __post_init__(self) -> None:
        _settle(self, "model.")
        if self.name not in _NETWORKS and not _IMPORT_PATH.fullmatch(self.name):
            raise InputError(
                "--model.name must be baseline, resnet or the import path of a module,"
                f" package.module:Name or package.module:Name(width=64), got {self.name!r}"
            )
        if self.local_contrast and not self.standardize:
            raise InputError(
                "--model.local-contrast needs --model.standardize;"
                " give --model.no-local-contrast too, or neither"
            )
        _require(self.channels in (1, 3), "--model.channels", "be 1 or 3", self.channels)
        _require(self.width >= 1, "--model.width", "be at least 1", self.width)
        _require(self.depth >= 1, "--model.depth", "be at least 1", self.depth)
        _require(self.stages >= 1, "--model.stages", "be at least 1", self.stages)


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are changed at random, on the device."""

    shear: float = 0.2
    """Largest shear angle, in degrees either way (as Keras's `shear_range`)."""
    zoom: float = 0.2
    """Height and width that are seen, independently, are [1 - zoom, 1 + zoom] times the image's (as
    Keras's `zoom_range`)."""
    flip: bool = True
    """Mirror left and right with probability one half."""
    rotate: float = 0.0
    """Largest rotation, in degrees either way."""
    shift: float = 0.0
    """Largest shift, as a fraction of the side, in each direction."""
    black: float = 0.0
    """Share of images in which what shear, zoom, rotation or shift bring in from beyond the edge is
    black; in the others the edge goes on."""
    contrast: float = 0.0
    """Contrast about the image's mean is scaled by a factor in [1 - contrast, 1 + contrast]."""
    brightness: float = 0.0
    """Largest amount added to every pixel of an image, in units of the full range."""
    crop: float = 1.0
    """Smallest part of the area that a random crop keeps; it is then resized to the whole, with
    an aspect ratio in [3/4, 4/3] (Szegedy et al., arXiv:1409.4842). 1 crops nothing."""
    gamma: float = 0.0
    """Pixels are raised to a power in [exp(-gamma), exp(gamma)]."""
    sharpness: float = 0.0
    """What a small blur takes away is scaled by a factor in [1 - sharpness, 1 + sharpness]."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, in units of the full range."""
    erase: float = 0.0
    """Largest part of the area of a rectangle that is filled with the image's mean, in one image of
    two (Zhong et al., arXiv:1708.04896)."""
    views: int = 1
    """A trained network's logits are averaged over so many draws of these changes, the same for
    every image; 1 judges images as they are. (Validation during training always takes one view.)"""

    def __post_init__(self) -> None:
        _settle(self, "augment.")
        _require(0 <= self.shear < 90, "--augment.shear", "be in [0, 90) degrees", self.shear)
        _require(0 <= self.zoom < 1, "--augment.zoom", "be in [0, 1)", self.zoom)
        _require(0 <= self.rotate <= 180, "--augment.rotate", "be in [0, 180]", self.rotate)
        _require(0 <= self.shift <= 1, "--augment.shift", "be in [0, 1]", self.shift)
        _require(0 <= self.black <= 1, "--augment.black", "be in [0, 1]", self.black)
        _require(0 <= self.contrast <= 1, "--augment.contrast", "be in [0, 1]", self.contrast)
        _require(0 <= self.brightness <= 1, "--augment.brightness", "be in [0, 1]", self.brightness)
        _require(0 < self.crop <= 1, "--augment.crop", "be in (0, 1]", self.crop)
        _require(0 <= self.gamma <= 2, "--augment.gamma", "be in [0, 2]", self.gamma)
        _require(0 <= self.sharpness <= 1, "--augment.sharpness", "be in [0, 1]", self.sharpness)
        _require(0 <= self.noise <= 1, "--augment.noise", "be in [0, 1]", self.noise)
        _require(0 <= self.erase <= 1, "--augment.erase", "be in [0, 1]", self.erase)
        _require(self.views >= 1, "--augment.views", "be at least 1", self.views)

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of views that a trained network gets an operating point for, 1 among them."""
        return tuple(sorted({1, self.views}))


@dataclass(frozen=True)
class TrainConfig:
    """How the weights are fitted."""

    epochs: int = 15
    """Passes over the training images."""
    accumulate: int = 1
    """Compute each batch in so many parts, one after the other, to save memory; their mean gradient
    makes one update. Batch norm normalizes each part by its own statistics."""
    remat: bool = False
    """Compute activations inside residual blocks again in the backward pass instead of keeping
    them (`jax.checkpoint`): less memory, more time, the same result."""
    shard_optimizer: bool = False
    """Keep a part of the optimizer's state on each device, instead of all of it on every one (ZeRO
    stage 1, Rajbhandari et al., arXiv:1910.02054)."""
    extend: int = 0
    """Epochs after those, by which a finished run can be extended: give its command again with this
    flag. A constant learning rate goes on, and the flag may grow later; `cosine` begins anew, with
    its warm-up (a warm restart: Loshchilov and Hutter, arXiv:1608.03983)."""
    batch: int = 32
    """Images per step, over all devices."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """`sgd` is with Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` warms up linearly from 0, the rate of the first step, and falls to 0, which the step
    after the last one would have."""
    warmup: float = 1.0
    """Epochs of linear warm-up of the cosine schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw, on kernels only."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 leaves it as it is."""
    ema: float = 0.0
    """Decay per step of the moving average of the weights that is evaluated; 0 for none."""
    init: str = "random"
    """Weights to start from: `random`, drawn from the seed; `released`, those of the package; or a
    run's workdir (its best checkpoint), a release's folder, or a .safetensors or .npz file. A layer
    is copied if the network has one of the same name and shapes; the others are drawn."""
    init_without: str = ""
    """Regular expression: layers of --train.init that are not copied, such as `head`."""
    freeze: str = ""
    """Regular expression: parameters that are not trained, such as `stem|stage1`. Batch norm among
    them goes on normalizing by the batch in training, and its running statistics go on."""
    layer_decay: float = 1.0
    """The learning rate of each layer is that of the layer above times this; the last layer has the
    whole (Howard and Ruder, arXiv:1801.06146). A layer is an entry at the top of the parameters."""
    class_weights: bool = True
    """Weight each class by n / (2 n_c), counted on the training images."""
    mixup: float = 0.0
    """Each image is mixed with another, and so are their labels; the shares are drawn from
    Beta(mixup, mixup) (Zhang et al., arXiv:1710.09412). 0 mixes nothing."""
    label_smoothing: float = 0.0
    """Smoothing s: labels become s / 2 and 1 - s / 2."""
    auxiliary: float = 0.0
    """Weight of the loss of a second head, which learns to tell viral from bacterial pneumonia on
    the images whose file names say which; it has no part in the answer. 0 for no such head."""
    best: Literal["auc", "accuracy", "loss"] = "auc"
    """The validation metric that chooses the best checkpoint."""
    patience: int = 0
    """Stop after this many epochs without a better checkpoint; 0 never stops early."""
    save_every: float = 15.0
    """Minutes between checkpoints within an epoch; 0 saves at the end of epochs alone."""
    precision: Precision = "auto"
    """What the network computes in; weights and batch statistics are float32 in any case. `auto`
    is bfloat16 on GPU and TPU, float32 on CPU, and what the run began with on a resume. (On GPU and
    TPU, training multiplies float32 with fewer bits unless JAX_DEFAULT_MATMUL_PRECISION=highest is
    set; validation never does.)"""

    def __post_init__(self) -> None:
        _settle(self, "train.")
        _require(self.epochs >= 1, "--train.epochs", "be at least 1", self.epochs)
        _require(self.accumulate >= 1, "--train.accumulate", "be at least 1", self.accumulate)
        if self.batch % self.accumulate:
            raise InputError(
                f"--train.batch {self.batch} must be a multiple of --train.accumulate"
                f" {self.accumulate}"
            )
        _require(self.extend >= 0, "--train.extend", "be at least 0", self.extend)
        _require(self.batch >= 1, "--train.batch", "be at least 1", self.batch)
        _require(self.learning_rate > 0, "--train.learning-rate", "be positive", self.learning_rate)
        _require(self.warmup >= 0, "--train.warmup", "be at least 0", self.warmup)
        _require(self.weight_decay >= 0, "--train.weight-decay", "be at least 0", self.weight_decay)
        if self.weight_decay and self.optimizer != "adamw":
            raise InputError(
                f"--train.weight-decay needs --train.optimizer adamw, not {self.optimizer}"
            )
        _require(self.clip_norm >= 0, "--train.clip-norm", "be at least 0", self.clip_norm)
        for flag, pattern in (
            ("--train.init-without", self.init_without),
            ("--train.freeze", self.freeze),
        ):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{flag} {pattern!r} is no regular expression ({error})") from None
        _require(0 < self.layer_decay <= 1, "--train.layer-decay", "be in (0, 1]", self.layer_decay)
        _require(self.mixup >= 0, "--train.mixup", "be at least 0", self.mixup)
        _require(0 <= self.ema < 1, "--train.ema", "be in [0, 1)", self.ema)
        _require(
            0 <= self.label_smoothing < 1,
            "--train.label-smoothing",
            "be in [0, 1)",
            self.label_smoothing,
        )
        _require(self.auxiliary >= 0, "--train.auxiliary", "be at least 0", self.auxiliary)
        _require(self.patience >= 0, "--train.patience", "be at least 0", self.patience)
        _require(self.save_every >= 0, "--train.save-every", "be at least 0", self.save_every)

    @property
    def all_epochs(self) -> int:
        """The number of epochs of the whole run."""
        return self.epochs + self.extend


@dataclass(frozen=True)
class OperatingConfig:
    """By what the threshold is chosen on the held-out images, once training has ended."""

    criterion: Literal["youden", "sensitivity", "cost"] = "youden"
    """`youden`, the highest sensitivity + specificity; `sensitivity`, the highest threshold that
    reaches a wanted one; `cost`, where the errors cost least."""
    sensitivity: float = 0.95
    """What `sensitivity` is to reach."""
    cost: float = 1.0
    """For `cost`: what a missed positive costs, in false alarms."""
    prevalence: float | None = None
    """For `cost`: share of positives where the network is to be used; by default the data's."""

    def __post_init__(self) -> None:
        _settle(self, "operating.")
        flag = "--operating."
        _require(0 < self.sensitivity <= 1, f"{flag}sensitivity", "be in (0, 1]", self.sensitivity)
        _require(self.cost > 0, f"{flag}cost", "be positive", self.cost)
        if self.prevalence is not None:
            _require(0 < self.prevalence < 1, f"{flag}prevalence", "be in (0, 1)", self.prevalence)


@dataclass(frozen=True)
class DeviceConfig:
    """What the run computes on."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """`auto` takes the fastest that is there."""
    count: int = 0
    """How many devices share each batch, over all processes; 0 for all. A CPU can be divided into
    any number, to try what several do; it gets no faster."""

    def __post_init__(self) -> None:
        _settle(self, "device.")
        _require(self.count >= 0, "--device.count", "be at least 0", self.count)


@dataclass(frozen=True)
class DistributedConfig:
    """Processes that compute together (docs/scaling.md)."""

    mode: Annotated[Literal["auto", "off"], tyro.conf.arg(name="")] = "auto"
    """`auto` joins the processes that Slurm, Open MPI, a TPU pod slice or Kubernetes started, as
    JAX detects them, and computes alone where there are none; `off` always computes alone."""
    coordinator: str = ""
    """HOST:PORT of process 0, a free port there; the same for all processes. It needs the two flags
    below, and is not needed where JAX detects the cluster."""
    processes: int = 0
    """Number of processes."""
    process: int = -1
    """Number of this process, counted from 0."""

    def __post_init__(self) -> None:
        _settle(self, "distributed.")
        flag = "--distributed."
        if not self.coordinator:
            if self.processes or self.process >= 0:
                raise InputError(
                    f"{flag}processes and {flag}process need {flag}coordinator HOST:PORT"
                )
            return
        if self.mode == "off":
            raise InputError(f"give {flag}coordinator or --distributed off, not both")
        host, _, port = self.coordinator.rpartition(":")
        proper = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
        _require(proper, f"{flag}coordinator", "be HOST:PORT", self.coordinator)
        _require(self.processes >= 1, f"{flag}processes", "be at least 1", self.processes)
        _require(
            0 <= self.process < self.processes,
            f"{flag}process",
            f"be between 0 and {self.processes - 1} for {self.processes} processes",
            self.process,
        )


@dataclass(frozen=True)
class Config:
    """All that decides a training run."""

    workdir: Path = Path("runs/run")
    """Folder that the run writes to, and resumes from."""
    seed: int = 0
    """Seed of the split, the initial weights, the order of images and their augmentation."""
    profile: Path | None = None
    """Write a trace of the second epoch to this folder, for Perfetto or XProf."""
    tensorboard: bool = False
    """Also write TensorBoard's event files to the workdir's `tensorboard`."""
    other_versions: bool = False
    """Resume a run that was begun with other versions of cnnjax or jax."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    operating: OperatingConfig = field(default_factory=OperatingConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        _settle(self, "")
        _require(0 <= self.seed < 2**32, "--seed", "be between 0 and 2**32 - 1", self.seed)
        if self.model.name == "baseline" and self.data.size < 10:
            raise InputError(
                f"--data.size must be at least 10 for --model.name baseline, got {self.data.size}"
            )


# These do not decide what the network becomes, so they may change on a resume. (The data are
# compared by content and by names under the root, not by where that lies.)
_INCIDENTAL = {
    "--workdir",
    "--profile",
    "--tensorboard",
    "--other-versions",
    "--data.root",
    "--data.table",
    "--data.cache",
    "--data.strict",
    "--data.resident-mib",
    "--train.save-every",
    "--train.remat",
    "--train.shard-optimizer",
    "--device.platform",
    "--device.count",
    "--distributed.mode",
    "--distributed.coordinator",
    "--distributed.processes",
    "--distributed.process",
    # What is made of the logits once training has ended; it is made anew by each start.
    "--operating.criterion",
    "--operating.sensitivity",
    "--operating.cost",
    "--operating.prevalence",
}


def expect_effect(config: Config, *, resumed: bool = False) -> None:
    """Raises InputError where a flag of a run has no effect without another.

    Of one that is `resumed`, only those are looked at that may change.
    """
    default = Config()
    given, usual = config.operating, default.operating
    for name, criterion in (
        ("sensitivity", "sensitivity"),
        ("cost", "cost"),
        ("prevalence", "cost"),
    ):
        if getattr(given, name) != getattr(usual, name) and given.criterion != criterion:
            raise InputError(f"--operating.{name} needs --operating.criterion {criterion}")
    if resumed:
        return
    if config.data.columns and config.data.table is None:
        raise InputError("--data.columns needs --data.table")
    if config.train.warmup != default.train.warmup and config.train.schedule != "cosine":
        raise InputError("--train.warmup needs --train.schedule cosine")
    if config.train.remat and config.model.name != "resnet":
        raise InputError("--train.remat needs --model.name resnet, whose blocks it concerns")
    if config.train.init_without and config.train.init == "random":
        raise InputError("--train.init-without needs --train.init")


def to_json(config: Config) -> str:
    """Returns `config` as the text of a `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, source: str) -> Config:
    """Returns the config that `to_json` wrote.

    Args:
        text: what stands in the file.
        source: the file's name, for the message.

    Raises:
        InputError: the text is no JSON, or holds an unknown key or a missing one.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source} is not valid JSON ({error}); restore it") from None
    return from_dict(Config, values, source)


def flags(config: Config) -> dict[str, Any]:
    """Returns every flag of the command line, `--train.learning-rate`, with its value."""
    flat = _flatten(dataclasses.asdict(config))
    return {f"--{name.replace('_', '-')}": value for name, value in flat.items()}


def differences(ours: Config, theirs: Config) -> list[str]:
    """Returns a line `--flag ours (was theirs)` for each difference that changes the outcome.

    More epochs by `--train.extend` do not change those before them, but where a cosine schedule has
    begun anew for another number of them.
    """
    before, allowed = flags(theirs), set(_INCIDENTAL)
    if ours.train.extend > theirs.train.extend and (
        not theirs.train.extend or ours.train.schedule == "constant"
    ):
        allowed.add("--train.extend")
    return [
        f"{flag} {value} (was {before[flag]})"
        for flag, value in flags(ours).items()
        if flag not in allowed and value != before[flag]
    ]


# Version 0.2 did not have these; its runs are read with their defaults, which are what it did.
_ADDED = {
    *("data.table", "data.columns", "data.patient_pattern", "data.classes"),
    *("train.extend", "train.init", "train.init_without", "train.freeze", "train.layer_decay"),
    *("train.accumulate", "train.remat", "train.shard_optimizer", "distributed"),
}

_T = TypeVar("_T")


def from_dict(cls: type[_T], values: Any, source: str, prefix: str = "") -> _T:
    """Returns a config dataclass of what `dataclasses.asdict` and JSON made of one.

    Args:
        cls: which of them.
        values: what JSON gave.
        source: the file's name, for the message.
        prefix: where in the file the values stand, for the message.

    Raises:
        InputError: a key is unknown or missing, or a value does not fit.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: {prefix or 'the file'} must be an object, got {values!r}")
    hints = get_type_hints(cls)
    unknown = sorted(values.keys() - hints.keys())
    absent = hints.keys() - values.keys()
    added = {name for name in absent if prefix + name in _ADDED}
    missing = sorted(absent - added)
    if unknown or missing:
        problem = f"unknown key {prefix}{unknown[0]}" if unknown else f"no {prefix}{missing[0]}"
        raise InputError(f"{source} has {problem}; was it written by another version of cnnjax?")
    parsed: dict[str, Any] = {}
    for name, hint in hints.items():
        if name in added:
            continue
        value = values[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, source, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif not _fits(value, hint):
            raise InputError(f"{source}: {prefix}{name} must be {_wanted(hint)}, got {value!r}")
        elif hint in (Path, Path | None) and value is not None:
            value = Path(value)
        parsed[name] = value
    return cls(**parsed)


def _settle(config: Any, prefix: str) -> None:
    """Brings scalars of NumPy and JAX, and paths, to the types that fields have in JSON.

    Raises:
        InputError: a value is of another type, none of the words that there are, not finite, or a
            path below a ~ that no shell has expanded.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if getattr(value, "ndim", None) == 0:
            value = value.item()  # a scalar of NumPy or JAX
        if hint in (str, Path, Path | None) and isinstance(value, str | os.PathLike):
            value = os.fspath(value) if hint is str else Path(value)
        object.__setattr__(config, name, value)
        plain = str(value) if isinstance(value, Path) else value
        flag = f"--{prefix}{name}".replace("_", "-")
        if not (type(value) is hint or _fits(plain, hint)):
            raise InputError(f"{flag} must be {_wanted(hint)}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag} must be a finite number, got {value}")
        if isinstance(value, Path) and value.parts[:1] == ("~",):
            raise InputError(f"{flag} {value} is not expanded by all shells; write the ~ out")


def _wanted(hint: Any) -> str:
    return " | ".join(getattr(arg, "__name__", str(arg)) for arg in get_args(hint) or (hint,))


def _fits(value: object, hint: Any) -> bool:
    """Tells whether a value out of JSON can stand in a field of this type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (float, float | None):
        return type(value) in (int, float) or (value is None and hint is not float)
    if hint in (Path, Path | None):
        return isinstance(value, str) or (value is None and hint is not Path)
    return type(value) is hint


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _require(holds: bool, flag: str, rule: str, value: object) -> None:
    if not holds:
        raise InputError(f"{flag} must {rule}, got {value}")
