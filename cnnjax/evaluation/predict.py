"""From images to logits with a trained network."""

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
from cnnjax.evaluation import release
from cnnjax.evaluation.explain import features_of, make_hires_cam
from cnnjax.logits import make_logits
from cnnjax.lungs import Framed, Framer
from cnnjax.machine import processes
from cnnjax.machine.devices import divided, full_float32, make_mesh, replicated, traits
from cnnjax.networks import FINE, make_model, model_of
from cnnjax.operating import Point, SoftmaxPoint, at_views
from cnnjax.run import parts
from cnnjax.run.workdir import BINARY, SOFTMAX, Workdir
from cnnjax.steps import TrainState, variables_of

if TYPE_CHECKING:
    from cnnjax.run.checkpoint import Kind

FEW, MANY = 8, 64  # up to so many images take a smaller step; heat maps take so many at most


class Predictor:
    """Trained networks, ready to judge images; the logits of several are averaged.

    Make one with `Predictor.of_run`, `Predictor.of_release` or `Predictor.open`.

    Attributes:
        size: side of the images that it takes, in pixels: `cnnjax.lungs.FILM` where it cuts them to
            the lungs, and else that of the network's input.
        side: side of the network's input, in pixels.
        framing: what of an image the networks see, `whole` or `lungs`.
        framed: whether that is the lungs.
        classes: names of the labels, 0 and up.
        has_softmax: whether the networks have a logit for each class, and not one for two.
        operating: what probability a logit means, and how it decides: a `SoftmaxPoint` of networks
            with a logit for each class, else an `OperatingPoint`.
        about: a phrase that names the weights.
        model: the network.
        members: the states of each.
        views: how many views of an image are judged. Members share them: each draws its own, at
            least two, as one would be the image as it is.
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
        """Returns what a folder holds, a run or a release, or the package's own weights for None.

        Args:
            folder: the workdir of a run, or a folder with a release.
            mesh: the devices to use; all of the fastest kind when None.
            kind: of a run, `best` by validation, or `latest`.
            views: judge so many views of each image, as their augmentation changes it: as many as
                the recipe says (`--augment.views`, the default), or 1, the image as it is.

        Raises:
            InputError: it holds neither, or has no operating point for so many views.
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
        """Returns the network that a run trained.

        Args:
            run: the workdir of a run.
            mesh: the devices to use.
            kind: `best` by validation, or `latest`.
            views: see `open`.
            network: the one that `cnnjax.fit` was given, where it cannot be imported by the name
                that the run has written down.

        Raises:
            InputError: the run is not there, has no checkpoint, or no operating point for so many
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
        with processes.alone():  # each reads all
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
        """Returns the networks of a release, in float32; for `views` see `open`."""
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
        """Raises InputError if a data set has other classes than the networks tell apart."""
        if index.classes != self.classes:
            raise InputError(
                f"{index.root} has the classes {' and '.join(index.classes)},"
                f" but the network was trained on {' and '.join(self.classes)}"
            )

    def frame(self, images: np.ndarray) -> Framed:
        """Returns what the networks see of images, and where in them; all, if it is not `framed`.

        Args:
            images: uint8 [n, size, size].

        Raises:
            ValueError: they are of another shape or dtype.
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
        """Returns bool [n, size, size], where the lungs are in uint8 images of that shape."""
        return Framer(self.side, self._mesh).maps(images) > 0.5

    def logits(self, images: np.ndarray | Framed) -> np.ndarray:
        """Returns float32 [n], or [n, K] where `has_softmax`, the logits of images.

        Args:
            images: uint8 [n, size, size], or what `frame` made of them.
        """
        return self.member_logits(images).mean(0)

    def member_logits(self, images: np.ndarray | Framed) -> np.ndarray:
        """Returns float32 [members, n(, K)], those of each network on its views; see `logits`.

        Raises:
            InputError: one is not finite.
        """
        seen = self._seen(images).images
        if self.has_softmax and not len(seen):
            return np.zeros((len(self.members), 0, len(self.classes)), np.float32)
        rows = np.arange(len(seen))
        logits = self._few_logits if len(seen) <= FEW else self._logits
        # Streamed: the program is the same for any number of images.
        feeder = Feeder(seen, np.zeros(len(seen), np.int32), self._mesh, resident_mib=-1)
        found = np.stack([logits(state, feeder, rows, i) for i, state in enumerate(self.members)])
        if not np.isfinite(found).all():
            raise InputError(
                f"{self.about} gives outputs that are not finite; its weights are of no use, train"
                " it anew"
            )
        return found

    @functools.cached_property  # it traces the network
    def explains(self) -> bool:
        """Whether the network names the feature maps that heat maps are made of."""
        shape = (1, self.side, self.side, 1)
        variables, pixels = variables_of(self.members[0]), jax.ShapeDtypeStruct(shape, np.float32)
        _, maps = jax.eval_shape(lambda v, x: features_of(self.model, v, x), variables, pixels)
        return FINE in maps

    def heat(self, images: np.ndarray | Framed, classes: np.ndarray | None = None) -> np.ndarray:
        """Returns float32 [n, size, size]: HiResCAM of images, zero outside what the networks see.

        It is evidence for a class against the rest, in log-odds, averaged over the networks; see
        `cnnjax.evaluation.explain`.

        Args:
            images: uint8 [n, size, size], or what `frame` made of them.
            classes: int [n], the label that each image's heat is about; by default the positive one
                or, where `has_softmax`, the one that the image is called.

        Raises:
            InputError: the network names no feature maps.
        """
        if not self.explains:
            raise InputError(
                f"{self.about} names no feature maps for heat maps; sow and perturb the maps"
                f" `{FINE}` in {type(self.model).__name__}, as `cnnjax.networks` says"
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
    """Returns a state to evaluate with, in float32 and on the devices."""
    full = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    stats = full.get("batch_stats", {})
    state = TrainState(np.zeros((), np.int32), full["params"], stats, opt_state=(), ema=None)
    return jax.device_put(state, replicated(mesh))
