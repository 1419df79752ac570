"""The configuration of a run: frozen dataclasses, one per concern.

A run is a function of (config, data, seed). Every field is a command-line flag of every recipe
(`--train.epochs 40`) and is written to the run's `config.json`. When a run is resumed, the fields
that affect its result must be the same as before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
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
    """The data set: a folder or zip file of class folders, with or without `train`, `val` and
    `test` folders above them; a MedMNIST .npz file; a CSV table (see --data.table); or the word
    `phantom` for synthetic images that the program draws. If --data.table is given, the root is the
    folder that the table's paths are relative to; its default is then the table's own folder."""
    size: int = 64
    """Side length in pixels of the square that every image is resized to."""
    frame: Frame = "whole"
    """Part of the image that the network sees. `whole`: the whole image, stretched to a square.
    `lungs`: a crop to the lungs, which a small network finds (`cnnjax.lungs`)."""
    positive: str = "PNEUMONIA"
    """Name of the positive class (label 1) if there are two classes."""
    classes: str = ""
    """Names of the classes, in the order of their labels, such as `normal,bacteria,virus`. Default:
    all classes found, sorted by name; of two classes, the positive one is last. An image belongs to
    the class of its folder or label. If that class is not in the list, the image belongs to the
    class `bacteria` or `virus` if its file name states this cause, as in the Kermany data set. All
    other images are left out."""
    table: Path | None = None
    """CSV file with one row per image. Columns: `path`, `label` and optionally `patient`, `split`
    and `weight`. The image's loss is multiplied by its weight (see `cnnjax.data.table`)."""
    columns: str = ""
    """Names of the table's columns if they differ from the default: `path=file,label=finding`. An
    empty name, `weight=`, ignores the column."""
    patient_pattern: str = ""
    """Regular expression that finds the patient ID in an image's path: the first group, or the
    whole match if there is no group. Default: the DICOM tag PatientID, or the patient in a file
    name of the Kermany data set; otherwise each file is a patient of its own."""
    validation: Literal["patients", "blocks", "official"] = "patients"
    """How the held-out images are chosen. `patients`: train and val are pooled, their patients are
    split into random folds, and one fold is held out. `blocks`: the same, but a fold is a block of
    consecutive file numbers in each class, which differs more from the other images. `official`:
    the images of val."""
    folds: int = 5
    """Number of folds. No patient is in two folds. No effect with --data.validation official."""
    fold: int = 0
    """The fold that is held out for validation, counted from 0. No effect with --data.validation
    official."""
    strict: bool = False
    """Stop with an error if a file cannot be decoded or is in two classes, instead of leaving the
    file out."""
    cache: Path | None = None
    """Folder for the cache of decoded images. Default: the user's cache folder."""
    cache_mib: int = 65536
    """Largest array of decoded images in MiB that is written to the cache. The images of a larger
    data set are decoded each time that they are needed, in training by worker processes; this needs
    `pip install "cnnjax[stream]"`."""
    workers: int = 0
    """Number of worker processes that decode the images of a data set larger than --data.cache-mib
    during training. 0 starts one for each CPU core. With several processes (--distributed), each
    starts so many."""
    resident_mib: int = 1024
    """Largest data set in MiB that is kept in device memory; a larger one is streamed from the
    cache, or decoded during training (--data.cache-mib). Each device holds the whole data set; with
    several processes (--distributed) it holds one shard, and the limit is for one shard."""

    def __post_init__(self) -> None:
        _settle(self, "data.")
        _require(self, "data.", "be between 8 and 4096 pixels", lambda x: 8 <= x <= 4096, "size")
        _require(self, "data.", "be at least 0", lambda x: x >= 0, "cache_mib", "workers")
        _require(self, "data.", "be at least 2", lambda x: x >= 2, "folds")
        rule = f"be between 0 and {self.folds - 1} for {self.folds} folds"
        _require(self, "data.", rule, lambda x: 0 <= x < self.folds, "fold")
        self._settle_table()
        names = [name.casefold() for name in self.class_names]
        if self.classes and (len(names) < 2 or len(set(names)) < len(names)):
            raise InputError(
                f"--data.classes must name two or more different classes, such as"
                f" normal,bacteria,virus; got {self.classes}"
            )
        positive = self.positive.casefold()
        said = positive in names or self.positive != DataConfig.positive
        if len(names) == 2 and said and positive != names[1]:
            raise InputError(
                f"--data.positive {self.positive} must be the last of --data.classes {self.classes}"
            )

    def _settle_table(self) -> None:
        """Uses a root that ends in .csv as the table, and the table's folder as the default root.

        Raises:
            InputError: root and table name two different tables.
        """
        table = self.table
        if self.root.lower().endswith(".csv"):
            table = Path(os.path.expanduser(self.root))  # noqa: PTH111
            if self.table not in (None, table):
                raise InputError(
                    f"--data.root {self.root} and --data.table {self.table} are two different"
                    " tables; give only one"
                )
        if table is not None and (self.root == "phantom" or self.root.lower().endswith(".csv")):
            object.__setattr__(self, "root", str(table.parent))
        object.__setattr__(self, "table", table)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in `classes`; empty if all classes found are used."""
        return tuple(name.strip() for name in self.classes.split(",") if name.strip())


_NETWORKS = ("baseline", "resnet")
_IMPORT_PATH = re.compile(r"[\w.]+:[\w.]+(\(.*\))?", re.DOTALL)


@dataclass(frozen=True)
class OtherData:
    """How to read other data with a trained run, where that differs from the run's own data."""

    table: Path | None = None
    """CSV table of the images, like --data.table in training. Its paths are relative to --data, by
    default the table's own folder."""
    columns: str | None = None
    """Names of the table's columns, like --data.columns in training. Default: the run's value."""
    patient_pattern: str | None = None
    """Regular expression for the patient ID, like --data.patient-pattern in training. Default: the
    run's value. '' uses none."""

    def read_like(self, trained: DataConfig, root: str, classes: tuple[str, ...]) -> DataConfig:
        """Returns the `DataConfig` for other data.

        Args:
            trained: the run's own data config.
            root: root of the other data.
            classes: names of the run's classes, in the order of their labels.

        Raises:
            InputError: `columns` is given without a table.
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
        # In the run's order, even if the data lack a class.
        return dataclasses.replace(like, classes=",".join(classes))


@dataclass(frozen=True)
class ModelConfig:
    """The network and its size."""

    name: str = "baseline"
    """Network. `baseline`: the network of the blog post. `resnet`: a small residual network.
    Otherwise the import path of a Flax Linen module, `package.module:Name` or
    `package.module:Name(width=64)`; the other flags of the model have no effect on it."""
    channels: int = 1
    """Number of input channels: 1, or 3 as in the blog post (the gray image is repeated)."""
    width: int = 32
    """ResNet: number of channels of the first stage. Each later stage has twice as many."""
    depth: int = 1
    """ResNet: number of residual blocks per stage."""
    stages: int = 4
    """ResNet: number of stages."""
    stem: Literal[2, 4] = 2
    """ResNet: stride of the first convolution. Its kernel is 3x3 with stride 2, 7x7 with stride
    4."""
    standardize: bool = False
    """Standardize each image to mean 0 and standard deviation 1."""
    local_contrast: bool = False
    """Add the local contrast of the image as another input channel: each pixel minus the local
    mean, divided by the local standard deviation (Pinto et al., PLoS Comput Biol 2008; Jarrett et
    al., ICCV 2009). Needs --model.standardize."""

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
                " also give --model.no-local-contrast, or give neither"
            )
        _require(self, "model.", "be 1 or 3", lambda x: x in (1, 3), "channels")
        _require(self, "model.", "be at least 1", lambda x: x >= 1, "width", "depth", "stages")


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of the training images, computed on the device."""

    shear: float = 0.2
    """Largest shear angle, in degrees in both directions (like Keras's `shear_range`)."""
    zoom: float = 0.2
    """Random zoom, independent for height and width: the visible part is [1 - zoom, 1 + zoom] times
    the image's side (like Keras's `zoom_range`)."""
    flip: bool = True
    """Mirror left and right with probability 1/2."""
    rotate: float = 0.0
    """Largest rotation, in degrees in both directions."""
    shift: float = 0.0
    """Largest shift in each direction, as a fraction of the side length."""
    black: float = 0.0
    """Probability that the padding after shear, zoom, rotation or shift is black. Otherwise the
    padding repeats the edge pixels."""
    contrast: float = 0.0
    """Random contrast: differences from the image's mean are multiplied by a factor in
    [1 - contrast, 1 + contrast]."""
    brightness: float = 0.0
    """Random brightness: largest amount that is added to all pixels of an image or subtracted from
    them, as a fraction of the full range."""
    crop: float = 1.0
    """Random crop: smallest fraction of the area that is kept. The crop has an aspect ratio in
    [3/4, 4/3] and is resized to the full size (Szegedy et al., arXiv:1409.4842). 1 disables it."""
    gamma: float = 0.0
    """Random gamma correction with an exponent in [exp(-gamma), exp(gamma)]."""
    sharpness: float = 0.0
    """Strength of a random unsharp mask: the difference between the image and its blurred copy is
    multiplied by a factor in [1 - sharpness, 1 + sharpness]. Factors below 1 blur."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, as a fraction of the full range."""
    erase: float = 0.0
    """Random erasing, with probability 1/2: largest area of a rectangle that is filled with the
    image's mean, as a fraction of the image (Zhong et al., arXiv:1708.04896)."""
    views: int = 1
    """Test-time augmentation: number of augmented copies of each image over which a trained
    network's logits are averaged. The random draws are the same for all images. 1 uses the
    unchanged image. Validation during training always uses one view."""

    def __post_init__(self) -> None:
        _settle(self, "augment.")
        _require(self, "augment.", "be in [0, 90) degrees", lambda x: 0 <= x < 90, "shear")
        _require(self, "augment.", "be in [0, 1)", lambda x: 0 <= x < 1, "zoom")
        _require(self, "augment.", "be in [0, 180]", lambda x: 0 <= x <= 180, "rotate")
        shares = "shift", "black", "contrast", "brightness", "sharpness", "noise", "erase"
        _require(self, "augment.", "be in [0, 1]", lambda x: 0 <= x <= 1, *shares)
        _require(self, "augment.", "be in (0, 1]", lambda x: 0 < x <= 1, "crop")
        _require(self, "augment.", "be in [0, 2]", lambda x: 0 <= x <= 2, "gamma")
        _require(self, "augment.", "be at least 1", lambda x: x >= 1, "views")

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of views for which a trained network gets an operating point: 1 and views."""
        return tuple(sorted({1, self.views}))


@dataclass(frozen=True)
class TrainConfig:
    """How the weights are trained."""

    epochs: int = 15
    """Number of epochs (passes over the training images)."""
    accumulate: int = 1
    """Gradient accumulation: number of parts that each batch is split into. The parts are computed
    one after the other, which saves memory; their mean gradient makes one update. Batch norm uses
    the statistics of each part."""
    remat: bool = False
    """Recompute the activations inside residual blocks in the backward pass instead of storing them
    (`jax.checkpoint`). This needs less memory and more time; the result is the same."""
    shard_optimizer: bool = False
    """Shard the optimizer state over the devices instead of copying it to each of them (ZeRO stage
    1, Rajbhandari et al., arXiv:1910.02054)."""
    extend: int = 0
    """Number of epochs to train after --train.epochs. To extend a finished run, repeat its command
    with this flag. With the `constant` schedule, a run can be extended several times. The `cosine`
    schedule restarts with its warm-up (warm restart, Loshchilov and Hutter, arXiv:1608.03983) and
    can be extended once."""
    batch: int = 32
    """Batch size: images per step, summed over all devices."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer. `sgd` uses Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule. `cosine`: linear warm-up from 0 at the first step, then cosine decay,
    which reaches 0 one step after the last."""
    warmup: float = 1.0
    """Length of the linear warm-up of the cosine schedule, in epochs."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw, applied to kernels only."""
    clip_norm: float = 0.0
    """Gradient clipping: largest global norm of the gradient. 0 disables it."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights. If set, validation and
    prediction use the averaged weights. 0 disables it."""
    init: str = "random"
    """Initial weights. `random`: drawn from the seed. `released`: the weights in the package.
    Otherwise a run's workdir (its best checkpoint is used), the folder of a release, or a
    .safetensors or .npz file. A layer is copied if the network has a layer of the same name and
    shapes; the other layers are drawn."""
    init_without: str = ""
    """Regular expression for the layers of --train.init that are not copied, such as `head`."""
    freeze: str = ""
    """Regular expression for the parameters that are not trained, such as `stem|stage1`. Frozen
    batch norm layers still normalize by the batch in training and still update their running
    statistics."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: each layer's learning rate is this factor times that of the
    next layer towards the output. The last layer has the full rate (Howard and Ruder,
    arXiv:1801.06146). A layer is a top-level entry of the parameters."""
    class_weights: bool = True
    """Weight the loss of each class by n / (K n_c), for n training images, K classes and n_c images
    of the class."""
    mixup: float = 0.0
    """Mixup: mix each image and its label with another one, in proportions drawn from
    Beta(mixup, mixup) (Zhang et al., arXiv:1710.09412). 0 disables it."""
    label_smoothing: float = 0.0
    """Label smoothing s: the labels 0 and 1 of two classes become s / 2 and 1 - s / 2; one-hot
    labels y of K classes become (1 - s) y + s / K."""
    auxiliary: float = 0.0
    """Weight of the loss of an auxiliary head. The head learns to tell viral from bacterial
    pneumonia on the images whose file names state the cause. It is used in training only. 0
    disables it."""
    best: Literal["auc", "accuracy", "loss"] = "auc"
    """Validation metric that selects the best checkpoint: highest `auc`, highest `accuracy` (at
    probability 0.5, or of the most probable class), or lowest `loss` (unweighted cross-entropy)."""
    patience: int = 0
    """Early stopping: stop after this many epochs without a better checkpoint. 0 disables it."""
    save_every: float = 15.0
    """Minutes between checkpoints within an epoch. 0 saves only at the end of each epoch."""
    precision: Precision = "auto"
    """Dtype that the network computes in. Weights and batch statistics are always float32. `auto`
    is bfloat16 on GPU and TPU and float32 on CPU; a resumed run keeps its precision. (On GPU and
    TPU, training with float32 uses reduced precision in matrix products unless
    JAX_DEFAULT_MATMUL_PRECISION=highest is set. Validation uses full float32 precision.)"""

    def __post_init__(self) -> None:
        _settle(self, "train.")
        counts = "epochs", "accumulate", "batch"
        _require(self, "train.", "be at least 1", lambda x: x >= 1, *counts)
        if self.batch % self.accumulate:
            raise InputError(
                f"--train.batch {self.batch} must be a multiple of --train.accumulate"
                f" {self.accumulate}"
            )
        amounts = "extend", "warmup", "weight_decay", "clip_norm", "mixup", "auxiliary", "patience"
        _require(self, "train.", "be at least 0", lambda x: x >= 0, *amounts, "save_every")
        _require(self, "train.", "be positive", lambda x: x > 0, "learning_rate")
        _require(self, "train.", "be in (0, 1]", lambda x: 0 < x <= 1, "layer_decay")
        _require(self, "train.", "be in [0, 1)", lambda x: 0 <= x < 1, "ema", "label_smoothing")
        if self.weight_decay and self.optimizer != "adamw":
            raise InputError(
                f"--train.weight-decay needs --train.optimizer adamw, not {self.optimizer}"
            )
        for flag, pattern in (
            ("--train.init-without", self.init_without),
            ("--train.freeze", self.freeze),
        ):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"{flag} {pattern!r} is not a valid regular expression ({error})"
                ) from None

    @property
    def all_epochs(self) -> int:
        """The number of epochs of the whole run, `epochs` + `extend`."""
        return self.epochs + self.extend


@dataclass(frozen=True)
class OperatingConfig:
    """How the decision threshold is chosen on the held-out images after training."""

    criterion: Literal["youden", "sensitivity", "cost"] = "youden"
    """Criterion for the decision threshold. `youden`: highest sensitivity + specificity.
    `sensitivity`: highest threshold with at least the sensitivity of --operating.sensitivity.
    `cost`: lowest expected cost of the errors."""
    sensitivity: float = 0.95
    """For the criterion `sensitivity`: the smallest sensitivity to reach."""
    cost: float = 1.0
    """For the criterion `cost`: cost of a false negative relative to that of a false positive."""
    prevalence: float | None = None
    """For the criterion `cost`: proportion of positives where the network will be used. Default:
    the proportion in the held-out images."""

    def __post_init__(self) -> None:
        _settle(self, "operating.")
        _require(self, "operating.", "be in (0, 1]", lambda x: 0 < x <= 1, "sensitivity")
        _require(self, "operating.", "be positive", lambda x: x > 0, "cost")
        if self.prevalence is not None:
            _require(self, "operating.", "be in (0, 1)", lambda x: 0 < x < 1, "prevalence")


@dataclass(frozen=True)
class DeviceConfig:
    """The devices that the run computes on."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Type of the devices. `auto` uses the fastest type that is available."""
    count: int = 0
    """Number of devices over which each batch is sharded, summed over all processes. 0 uses all. A
    CPU can be split into any number of devices, for tests of several devices; this is not
    faster."""

    def __post_init__(self) -> None:
        _settle(self, "device.")
        _require(self, "device.", "be at least 0", lambda x: x >= 0, "count")


@dataclass(frozen=True)
class DistributedConfig:
    """Training on several processes (docs/scaling.md)."""

    mode: Annotated[Literal["auto", "off"], tyro.conf.arg(name="")] = "auto"
    """`auto`: join the processes started by Slurm, Open MPI, a TPU pod slice or Kubernetes, if JAX
    detects them; otherwise use this process alone. `off`: always use this process alone."""
    coordinator: str = ""
    """HOST:PORT of process 0, with a free port on that host; the same for all processes. Needs
    --distributed.processes and --distributed.process. Not needed if JAX detects the cluster."""
    processes: int = 0
    """Number of processes."""
    process: int = -1
    """Index of this process, counted from 0."""

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
        _require(self, "distributed.", "be HOST:PORT", lambda _: proper, "coordinator")
        _require(self, "distributed.", "be at least 1", lambda x: x >= 1, "processes")
        rule = f"be between 0 and {self.processes - 1} for {self.processes} processes"
        _require(self, "distributed.", rule, lambda x: 0 <= x < self.processes, "process")


@dataclass(frozen=True)
class Config:
    """The complete configuration of a training run."""

    workdir: Path = Path("runs/run")
    """Folder for all files of the run. If it holds a run, that run is resumed."""
    seed: int = 0
    """Random seed of the split, the initial weights, the order of the images and the
    augmentation."""
    profile: Path | None = None
    """Write a profiler trace of the second epoch to this folder, for Perfetto or XProf."""
    tensorboard: bool = False
    """Also write TensorBoard event files, to the folder `tensorboard` of the workdir."""
    other_versions: bool = False
    """Allow resuming a run that was started with other versions of cnnjax or jax."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    operating: OperatingConfig = field(default_factory=OperatingConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        _settle(self, "")
        _require(self, "", "be between 0 and 2**32 - 1", lambda x: 0 <= x < 2**32, "seed")
        if self.model.name == "baseline" and self.data.size < 10:
            raise InputError(
                f"--data.size must be at least 10 for --model.name baseline, got {self.data.size}"
            )


# These flags do not affect the trained weights, so they may change when a run is resumed. (The data
# are compared by content and by file names relative to the root, not by the path of the root.)
_INCIDENTAL = {
    "--workdir",
    "--profile",
    "--tensorboard",
    "--other-versions",
    "--data.root",
    "--data.table",
    "--data.cache",
    "--data.cache-mib",
    "--data.workers",
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
    # The operating point is computed from the logits after training, again at each start.
    "--operating.criterion",
    "--operating.sensitivity",
    "--operating.cost",
    "--operating.prevalence",
}


def expect_effect(config: Config, *, resumed: bool = False) -> None:
    """Raises InputError if a flag has no effect because another flag is missing.

    Args:
        config: the config of a run.
        resumed: whether the run is resumed; then only flags that may change are checked.
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
        raise InputError("--train.remat needs --model.name resnet: it applies to residual blocks")
    if config.train.init_without and config.train.init == "random":
        raise InputError("--train.init-without needs --train.init")


def to_json(config: Config) -> str:
    """Returns `config` as the text of a `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, source: str) -> Config:
    """Returns the config from the text that `to_json` wrote.

    Args:
        text: content of the file.
        source: name of the file, for error messages.

    Raises:
        InputError: the text is not valid JSON, a key is unknown or missing, or a value is invalid.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source} is not valid JSON ({error}); restore it") from None
    return from_dict(Config, values, source)


def flags(config: Config) -> dict[str, Any]:
    """Returns all command-line flags, such as `--train.learning-rate`, with their values."""
    flat = _flatten(dataclasses.asdict(config))
    return {_flag(name): value for name, value in flat.items()}


def differences(ours: Config, theirs: Config) -> list[str]:
    """Returns a line `--flag ours (was theirs)` for each difference that affects the result.

    A larger `--train.extend` does not affect the epochs before it, so it is no difference. The
    exception is a cosine schedule that already restarted for another number of epochs.
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


# Version 0.2 did not have these fields. Their defaults are the behaviour of that version.
_ADDED = {
    *("data.table", "data.columns", "data.patient_pattern", "data.classes"),
    *("data.cache_mib", "data.workers"),
    *("train.extend", "train.init", "train.init_without", "train.freeze", "train.layer_decay"),
    *("train.accumulate", "train.remat", "train.shard_optimizer", "distributed"),
}

_T = TypeVar("_T")


def from_dict(cls: type[_T], values: Any, source: str, prefix: str = "") -> _T:
    """Returns a config dataclass from its JSON object, the inverse of `dataclasses.asdict`.

    Args:
        cls: the config dataclass.
        values: the parsed JSON object.
        source: name of the file, for error messages.
        prefix: path of the values in the file, such as `train.`, for error messages.

    Raises:
        InputError: a key is unknown or missing, or a value has the wrong type.
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
    """Converts scalars of NumPy and JAX, and paths, in place to the types of the fields.

    Raises:
        InputError: a value has the wrong type, is not one of the choices, is not finite, or is a
            path that begins with ~.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if getattr(value, "ndim", None) == 0:
            value = value.item()  # a scalar of NumPy or JAX
        if hint in (str, Path, Path | None) and isinstance(value, str | os.PathLike):
            value = os.fspath(value) if hint is str else Path(value)
        object.__setattr__(config, name, value)
        plain = str(value) if isinstance(value, Path) else value
        flag = _flag(prefix + name)
        if not (type(value) is hint or _fits(plain, hint)):
            raise InputError(f"{flag} must be {_wanted(hint)}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag} must be a finite number, got {value}")
        if isinstance(value, Path) and value.parts[:1] == ("~",):
            raise InputError(
                f"{flag} {value} begins with ~, which the shell did not expand; write the full path"
            )


def _wanted(hint: Any) -> str:
    return " | ".join(getattr(arg, "__name__", str(arg)) for arg in get_args(hint) or (hint,))


def _fits(value: object, hint: Any) -> bool:
    """Returns whether a value from JSON is valid for a field of this type."""
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


def _require(
    config: Any, prefix: str, rule: str, holds: Callable[[Any], bool], *names: str
) -> None:
    """Raises InputError for the first of some fields whose value breaks a rule.

    Args:
        config: a config dataclass.
        prefix: of its flags, such as `train.`.
        rule: the rule in words, after "must", such as `be positive`.
        holds: whether a value obeys the rule.
        names: names of the fields.
    """
    for name in names:
        if not holds(value := getattr(config, name)):
            raise InputError(f"{_flag(prefix + name)} must {rule}, got {value}")


def _flag(path: str) -> str:
    """Returns the flag of a field, such as `--train.learning-rate` of `train.learning_rate`."""
    return f"--{path.replace('_', '-')}"
