"""Prediction with trained networks: `Predictor`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from cnnjax import lungs
from cnnjax.config import AugmentConfig, DeviceConfig, Frame
from cnnjax.data.batches import Feeder, in_batches
from cnnjax.data.index import Index
from cnnjax.errors import InputError
from cnnjax.evaluation.explain import features_of, make_hires_cam
from cnnjax.logits import make_logits
from cnnjax.lungs import Framed, Framer
from cnnjax.machine import processes
from cnnjax.machine.devices import divided, full_float32, make_mesh, replicated, traits
from cnnjax.networks import FINE, make_model, model_of
from cnnjax.operating import Point, SoftmaxPoint, at_views
from cnnjax.run import parts, release
from cnnjax.run.workdir import BINARY, SOFTMAX, Workdir
from cnnjax.steps import TrainState, variables_of

if TYPE_CHECKING:
    from cnnjax.run.checkpoint import Kind

# Up to FEW images use a smaller batch. Heat maps use batches of at most MANY images.
FEW, MANY = 8, 64


class Predictor:
    """One or more trained networks for prediction; the logits of several networks are averaged.

    Create one with `Predictor.of_run`, `Predictor.of_release` or `Predictor.open`.

    Attributes:
        size: side of the images that the predictor takes, in pixels: `cnnjax.lungs.FILM` if it
            crops them to the lungs, otherwise `side`.
        side: side of the networks' input, in pixels.
        framing: part of an image that the networks see, `whole` or `lungs`.
        framed: whether images are cropped to the lungs.
        classes: names of the labels 0, 1, ...
        has_softmax: whether the networks have one logit for each class; otherwise they have one
            logit for two classes.
        operating: calibration and decision rule: a `SoftmaxPoint` if `has_softmax`, otherwise an
            `OperatingPoint`.
        about: a phrase that names the weights.
        model: the Flax module of all networks.
        members: the state of each network.
        views: number of views (augmented copies) of an image for test-time augmentation; 1 means
            the original image. The views are distributed over the members. Each member draws its
            own, at least two, because a single view would be the original image.
    """

    def __init__(
        self,
        model: Any,
        members: Sequence[TrainState],
        mesh: Mesh,
        *,
        side: int,
        frame: Frame,
        classes: tuple[str, ...],
        operating: Point,
        about: str,
        views: int,
        augment: AugmentConfig,
    ) -> None:
        self.classes, self.operating, self.about = classes, operating, about
        self.has_softmax = isinstance(operating, SoftmaxPoint)
        self.side, self.framing, self.framed = side, frame, frame == "lungs"
        self.size = lungs.FILM if self.framed else side
        self.model, self.members, self.views = model, tuple(members), views
        self._mesh = mesh
        each = max(2, -(-views // len(self.members))) if views > 1 else 1
        self._logits = make_logits(model, mesh, each, augment)
        self._few_logits = make_logits(model, mesh, each, augment, FEW)
        self._cam = make_hires_cam(model)

    @classmethod
    def open(
        cls,
        folder: Path | None = None,
        mesh: Mesh | None = None,
        kind: Kind = "best",
        views: int | None = None,
    ) -> Predictor:
        """Returns the predictor of a run or a release.

        Args:
            folder: the workdir of a run, or the folder of a release; the weights in the package if
                None.
            mesh: the devices to use; all of the fastest kind if None.
            kind: checkpoint of a run: `best` by validation, or `latest`.
            views: number of views of each image for test-time augmentation: 1 (the original image)
                or, by default, the number in the run's or release's config (`--augment.views`).

        Raises:
            InputError: the folder holds neither a run nor a release, or there is no operating point
                for this number of views.
        """
        mesh = make_mesh(DeviceConfig()) if mesh is None else mesh
        if folder is None:
            return cls.of_release(release.read(), mesh, views=views)
        if release.is_release(folder):
            return cls.of_release(release.read(folder), mesh, str(folder), views)
        return cls.of_run(folder, mesh, kind, views)

    @classmethod
    def of_run(
        cls,
        run: Path,
        mesh: Mesh,
        kind: Kind = "best",
        views: int | None = None,
        network: Any = None,
    ) -> Predictor:
        """Returns the predictor of the network that a run trained.

        Args:
            run: the workdir of the run.
            mesh: the devices to use.
            kind: checkpoint: `best` by validation, or `latest`.
            views: see `open`.
            network: the network that was passed to `cnnjax.fit`; needed only if it cannot be
                imported by the name recorded in the run.

        Raises:
            InputError: the run does not exist, has no checkpoint, was trained with an objective
                other than `Binary` and `Softmax`, or has no operating point for this number of
                views.
        """
        from cnnjax.run.checkpoint import Checkpoints  # Orbax takes half a second

        workdir = Workdir(run)
        config = workdir.read_config()
        views = config.augment.views if views is None else views
        given = workdir.read_parts()
        objective = given["objective"]
        if objective is not None and objective["part"] not in (BINARY, SOFTMAX):
            raise InputError(
                f"{run} was trained with {objective['part']}; only runs of the objectives Binary"
                " and Softmax can be used for prediction"
            )
        if network is None and given["network"] is not None:
            network = parts.rebuilt_network(given["network"], run)
        operating = at_views(workdir.read_operating(kind), views, str(run))
        classes = workdir.read_classes()
        model = model_of(config, classes) if network is None else network
        with processes.alone():  # each process reads the whole checkpoint
            checkpoints = Checkpoints(workdir.checkpoints)
            state = _state_of(checkpoints.variables(kind), mesh)
            checkpoints.close()
        return cls(
            model,
            [state],
            mesh,
            side=config.data.size,
            frame=config.data.frame,
            classes=classes,
            operating=operating,
            about=f"{kind} checkpoint of {run}",
            views=views,
            augment=config.augment,
        )

    @classmethod
    def of_release(
        cls,
        released: release.Release,
        mesh: Mesh,
        about: str = "the package's release",
        views: int | None = None,
    ) -> Predictor:
        """Returns the predictor of a release, in float32; for `views` see `open`."""
        views = released.augment.views if views is None else views

        return cls(
            make_model(released.model, classes=len(released.classes)),
            [_state_of(member, mesh) for member in released.members],
            mesh,
            side=released.size,
            frame=released.frame,
            classes=released.classes,
            operating=at_views(released.operating, views, about),
            about=about,
            views=views,
            augment=released.augment,
        )

    def expect_classes(self, index: Index) -> None:
        """Raises InputError if the classes of a data set are not those of the networks."""
        if index.classes != self.classes:
            raise InputError(
                f"{index.root} has the classes {' and '.join(index.classes)},"
                f" but the network was trained on {' and '.join(self.classes)}"
            )

    def frame(self, images: np.ndarray) -> Framed:
        """Returns the inputs of the networks and the boxes in the images that they were taken from.

        The boxes are the whole images unless `framed`.

        Args:
            images: uint8 [n, size, size].

        Raises:
            ValueError: the images have another shape or dtype.
        """
        shape = (len(images), self.size, self.size)
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(
                f"images must be uint8 [n, {self.size}, {self.size}],"
                f" got {images.dtype} {list(images.shape)}"
            )
        if self.framed:
            return Framer(self.side, self._mesh)(images)
        return lungs.as_framed(images)

    def lungs(self, images: np.ndarray) -> np.ndarray:
        """Returns masks of the lungs, bool [n, size, size], of uint8 images of this shape."""
        return Framer(self.side, self._mesh).maps(images) > 0.5

    def logits(self, images: np.ndarray | Framed) -> np.ndarray:
        """Returns the logits of images, float32 [n], or [n, K] if `has_softmax`.

        They are averaged over networks and views, and not calibrated; see `operating`.

        Args:
            images: uint8 [n, size, size], or the result of `frame`.

        Raises:
            InputError: a logit is not finite.
            ValueError: see `frame`.
        """
        return self.member_logits(images).mean(0)

    def member_logits(self, images: np.ndarray | Framed) -> np.ndarray:
        """Returns the logits of each network, float32 [members, n] or [members, n, K].

        They are averaged over the views of the network; see `logits`.

        Raises:
            InputError: a logit is not finite.
        """
        seen = self._seen(images).images
        if self.has_softmax and not len(seen):
            return np.zeros((len(self.members), 0, len(self.classes)), np.float32)
        rows = np.arange(len(seen))
        logits = self._few_logits if len(seen) <= FEW else self._logits
        # Streamed from the host: the compiled program is the same for any number of images.
        feeder = Feeder(seen, np.zeros(len(seen), np.int32), self._mesh, resident_mib=-1)
        found = np.stack([logits(state, feeder, rows, i) for i, state in enumerate(self.members)])
        if not np.isfinite(found).all():
            raise InputError(
                f"{self.about} gives outputs that are not finite; its weights cannot be used, train"
                " it again"
            )
        return found

    @functools.cached_property  # it traces the network
    def explains(self) -> bool:
        """Whether the network provides the feature maps that `heat` needs."""
        shape = (1, self.side, self.side, 1)
        variables, pixels = variables_of(self.members[0]), jax.ShapeDtypeStruct(shape, np.float32)
        _, maps = jax.eval_shape(lambda v, x: features_of(self.model, v, x), variables, pixels)
        return FINE in maps

    def heat(self, images: np.ndarray | Framed, classes: np.ndarray | None = None) -> np.ndarray:
        """Returns HiResCAM heat maps of images, float32 [n, size, size].

        A heat map is evidence for a class against the rest, in log-odds, averaged over the
        networks; see `cnnjax.evaluation.explain`. It is never negative, and zero outside the crop
        to the lungs.

        Args:
            images: uint8 [n, size, size], or the result of `frame`.
            classes: int [n], the label that the heat map of each image explains. By default the
                positive class, or the predicted class if `has_softmax`.

        Raises:
            InputError: `explains` is false.
        """
        if not self.explains:
            raise InputError(
                f"{self.about} names no feature maps for heat maps; call sow and perturb on the"
                f" maps `{FINE}` in {type(self.model).__name__}, as described in `cnnjax.networks`"
            )
        seen = self._seen(images)
        images = seen.images
        if classes is None and self.has_softmax:
            classes = self.operating.decide(self.logits(seen))
        most = traits(self._mesh).evaluated_at(self.side)
        batch = min(most, FEW if len(images) <= FEW else MANY)
        batch = -(-batch // self._mesh.size) * self._mesh.size
        chunks = [np.zeros((0, self.side, self.side), np.float32)]
        for rows in in_batches(np.arange(len(images), dtype=np.int32), batch):
            taken = jax.device_put(images[np.maximum(rows, 0)], divided(self._mesh))
            about = None
            if classes is not None:
                chosen = np.asarray(classes, np.int32)[np.maximum(rows, 0)]
                about = jax.device_put(chosen, divided(self._mesh))
            with full_float32(self._mesh):
                maps = [self._cam(variables_of(state), taken, about) for state in self.members]
            chunks.append(np.mean(jax.device_get(maps), axis=0)[rows >= 0])
        heat = np.concatenate(chunks)
        return lungs.put_back(heat, seen.boxes, self.size) if self.framed else heat

    def _seen(self, images: np.ndarray | Framed) -> Framed:
        return images if isinstance(images, Framed) else self.frame(images)


def _state_of(variables: Any, mesh: Mesh) -> TrainState:
    """Returns a state for evaluation, in float32 and replicated on the devices."""
    full = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    stats = full.get("batch_stats", {})
    state = TrainState(np.zeros((), np.int32), full["params"], stats, opt_state=(), ema=None)
    return jax.device_put(state, replicated(mesh))
