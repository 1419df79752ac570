"""Where in an image a network sees what it decides by: CAMs, and occlusion to check them by.

All are pure functions of variables and images, jitted and batched. A heat map says what moved the
network, not what is wrong with a lung.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from cnnjax.networks import FINAL, FINE
from cnnjax.objectives import to_float
from cnnjax.steps import PyTree

Explain = Callable[..., jax.Array]
"""(variables, images, classes=None) -> heat; see `make_grad_cam`."""


def make_grad_cam(model: Any) -> Explain:
    """Returns the jitted (variables, images) -> heat of Grad-CAM (Selvaraju et al., ICCV 2017).

    The last feature maps are summed, each weighted by the mean over its places of the logit's
    gradient there; what is negative becomes zero. For a network that ends in a global average and
    one dense layer that is the class activation map of Zhou et al., CVPR 2016, up to a factor.

    Args:
        model: a network of `cnnjax.networks`.

    Returns:
        A function of the Flax variables, uint8 [batch, height, width] and, optionally, int32
        [batch], the label that each image's heat is to be about. It gives float32 of the images'
        shape, bilinearly enlarged from the maps' size: evidence in log-odds, so that the images of
        a batch can be compared; see `normalized`. It is evidence for the given class against the
        rest; without one, for the positive class of two, or else for the class of the highest
        logit.
    """

    def grad_cam(
        variables: PyTree, images: jax.Array, classes: jax.Array | None = None
    ) -> jax.Array:
        maps, gradient = _maps_and_gradient(model, variables, to_float(images), FINAL, classes)
        weights = gradient.mean((1, 2), keepdims=True)
        heat = jnp.maximum((weights * maps).sum(3), 0)
        return jax.image.resize(heat, images.shape, "bilinear")

    return jax.jit(grad_cam)


def make_hires_cam(model: Any) -> Explain:
    """Returns the jitted (variables, images) -> heat of HiResCAM, at the maps `FINE`.

    Feature maps times the logit's gradient, place by place (Draelos and Carin, arXiv:2011.08891):
    unlike Grad-CAM's, the gradient is not averaged over places first, so that maps before the last,
    which tell a place twice as well, can serve. The mean over neighbouring places takes out what
    hangs on the maps' grid.

    On 200 phantoms its hottest place was on the opacity, or within a sixteenth of the side of it,
    in 192; Grad-CAM's in 191, that of the occlusion below in 93 (`experiments/pointing.py` on a
    run of `make train` on 2 CPU cores; docs/results/pointing.json).

    Args:
        model: a network of `cnnjax.networks`.

    Returns:
        A function as that of `make_grad_cam`.
    """

    def hires_cam(
        variables: PyTree, images: jax.Array, classes: jax.Array | None = None
    ) -> jax.Array:
        maps, gradient = _maps_and_gradient(model, variables, to_float(images), FINE, classes)
        heat = jnp.maximum((maps * gradient).sum(3), 0)
        for axis in (1, 2):
            heat = _smoothed(heat, axis)
        return jax.image.resize(heat, images.shape, "bilinear")

    return jax.jit(hires_cam)


def _smoothed(heat: jax.Array, axis: int) -> jax.Array:
    """Averages neighbours along an axis with the weights 1 2 1; the edge goes on beyond itself."""
    ends = [(1, 1) if i == axis else (0, 0) for i in range(heat.ndim)]
    wide = jnp.pad(heat, ends, mode="edge")
    before, here, after = (
        jax.lax.slice_in_dim(wide, k, k + heat.shape[axis], axis=axis) for k in range(3)
    )
    return (before + 2 * here + after) / 4


def evidence(logits: jax.Array, classes: jax.Array | None = None) -> jax.Array:
    """Returns float [batch], the log-odds of a class against the rest.

    Args:
        logits: [batch] of two classes, or [batch, K].
        classes: int32 [batch], the labels; by default 1, or that of the highest logit.
    """
    if logits.ndim == 1:
        return logits if classes is None else jnp.where(classes == 1, logits, -logits)
    if classes is None:
        classes = logits.argmax(-1)
    own = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    rest = jax.scipy.special.logsumexp(jnp.where(own, -jnp.inf, logits), -1)
    return jnp.where(own, logits, 0).sum(-1) - rest


def _maps_and_gradient(
    model: Any, variables: PyTree, images: jax.Array, name: str, classes: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns feature maps, and the gradient of `evidence` by them, [batch, h, w, channels]."""
    shapes = jax.eval_shape(lambda v, x: features_of(model, v, x)[1], variables, images)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def told(perturbation: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, maps = features_of(model, variables, images, nothing | {name: perturbation})
        return evidence(logits, classes).sum(), maps[name]

    gradient, maps = jax.grad(told, has_aux=True)(nothing[name])
    return maps.astype(jnp.float32), gradient.astype(jnp.float32)


def features_of(
    model: Any,
    variables: PyTree,
    images: jax.Array,
    perturbations: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns logits and feature maps [batch, height', width', channels] by name.

    Args:
        model: a network of `cnnjax.networks`, or one that names its maps `FINAL` and `FINE`
            likewise, with `sow` into the collection `intermediates` and with `perturb`.
        variables: its variables.
        images: float32 [batch, height, width, 1] in [0, 1].
        perturbations: added to the maps of all names (`flax.linen.Module.perturb`); the logits'
            gradient by one is that by the maps.
    """
    if perturbations is not None:
        variables = variables | {"perturbations": perturbations}
    logits, kept = model.apply(variables, images, train=False, mutable=["intermediates"])
    return logits, {name: maps for name, (maps,) in kept.get("intermediates", {}).items()}


def make_occlusion(model: Any, *, patch: float = 0.2, steps: int = 12) -> Explain:
    """Returns the jitted (variables, images) -> heat of occlusion (Zeiler and Fergus, ECCV 2014).

    A square with the image's mean gray level is put in each place of a grid, and the logit asked
    for again: it takes steps * steps passes and no gradient, and so checks Grad-CAM.

    Args:
        model: a network of `cnnjax.networks`.
        patch: side of the square, as a part of the image's.
        steps: places of the square along each direction.

    Returns:
        A function as that of `make_grad_cam`. The heat of a pixel is by how much the squares that
        cover it lower the log-odds, on average; negative where they raise them.
    """

    def occlusion(
        variables: PyTree, images: jax.Array, classes: jax.Array | None = None
    ) -> jax.Array:
        pixels = to_float(images)
        batch, height, width, _ = pixels.shape
        gray = pixels.mean((1, 2, 3), keepdims=True)
        logits = model.apply(variables, pixels, train=False)
        if classes is None and logits.ndim == 2:
            classes = logits.argmax(-1)  # of the whole image, wherever the square is
        whole = evidence(logits, classes)
        sides = max(1, round(patch * height)), max(1, round(patch * width))

        def cover(heat: tuple[jax.Array, jax.Array], place: jax.Array) -> tuple[Any, None]:
            total, times = heat
            row = (jnp.arange(height) >= place[0]) & (jnp.arange(height) < place[0] + sides[0])
            column = (jnp.arange(width) >= place[1]) & (jnp.arange(width) < place[1] + sides[1])
            covered = row[:, None] & column[None, :]
            changed = jnp.where(covered[None, :, :, None], gray, pixels)
            less = whole - evidence(model.apply(variables, changed, train=False), classes)
            total = total + jnp.where(covered, less[:, None, None], 0)
            return (total, times + covered.astype(times.dtype)), None

        rows = jnp.linspace(0, height - sides[0], steps).round().astype(jnp.int32)
        columns = jnp.linspace(0, width - sides[1], steps).round().astype(jnp.int32)
        places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
        start = jnp.zeros((batch, height, width)), jnp.zeros((height, width))
        (total, times), _ = jax.lax.scan(cover, start, places)
        return total / jnp.maximum(times, 1)

    return jax.jit(occlusion)


def normalized(heat: np.ndarray) -> np.ndarray:
    """Brings each map of float [batch, height, width] to a maximum of 1; what is negative to 0."""
    heat = np.maximum(heat, 0)
    highest = heat.max((1, 2), keepdims=True)
    return np.divide(heat, highest, out=np.zeros_like(heat), where=highest > 0)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lays a heat map over an image.

    The hottest places are yellow and the warm ones purple (matplotlib's plasma, whose lightness
    alone tells the order); where there is no heat, the image is as it was.

    Args:
        image: uint8 [height, width].
        heat: float [height, width] in [0, 1].

    Returns:
        uint8 [height, width, 3].
    """
    from matplotlib import colormaps

    color = colormaps["plasma"](heat)[..., :3]
    share = 0.6 * np.clip(heat, 0, 1)[..., None] ** 0.7
    gray = image[..., None] / 255
    return np.rint(255 * (gray * (1 - share) + color * share)).astype(np.uint8)


def draw_box(picture: Image.Image, box: np.ndarray) -> None:
    """Draws the edge of a box into an RGB picture, unless it is the whole of it.

    Args:
        picture: is changed.
        box: float [4], left, top, right and bottom, as parts of the sides.
    """
    if np.array_equal(box, (0, 0, 1, 1)):
        return
    corners = np.asarray(box).reshape(2, 2) * picture.size
    left, top = np.floor(corners[0]).tolist()
    right, bottom = (np.ceil(corners[1]) - 1).tolist()
    ImageDraw.Draw(picture).rectangle((left, top, right, bottom), outline=(120, 200, 255))
