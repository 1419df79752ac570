"""Heat maps that show which parts of an image a decision depends on: CAMs and occlusion.

All are pure functions of variables and images, jitted and batched. A heat map shows what
influenced the network; it does not show disease.
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

    The heat map is the weighted sum of the last feature maps. The weight of a feature map is the
    gradient of the logit by this map, averaged over all positions. Negative values are set to
    zero. For a network that ends in global average pooling and one dense layer, the result is the
    class activation map of Zhou et al. (CVPR 2016) up to a constant factor.

    Args:
        model: a network of `cnnjax.networks`.

    Returns:
        A function (variables, images, classes=None) -> heat. `variables` are Flax variables;
        `images` are uint8 [batch, height, width]. `classes` is int32 [batch], the label that the
        heat map of each image explains: by default the positive class of two, or the class of the
        highest logit of more. `heat` is float32 [batch, height, width], resized bilinearly from the
        size of the feature maps: evidence for the class against the rest, in log-odds. Images of a
        batch can be compared; `normalized` scales each map to a maximum of 1.
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

    The heat map is the elementwise product of the feature maps and the gradient of the logit,
    summed over channels (Draelos and Carin, arXiv:2011.08891). Grad-CAM averages the gradient over
    positions first; HiResCAM does not. It can therefore use the earlier feature maps `FINE`, which
    have twice the resolution of the last ones. Smoothing over neighbouring positions removes
    artifacts of the grid of the feature maps.

    On 200 phantoms, the maximum lay on the opacity, or within a sixteenth of the image side of it,
    in 192 images; for Grad-CAM in 191, for `make_occlusion` in 93 (`experiments/pointing.py` on a
    run of `make train` on 2 CPU cores; docs/results/pointing.json).

    Args:
        model: a network of `cnnjax.networks`.

    Returns:
        A function with the signature described in `make_grad_cam`.
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
    """Averages neighbours along an axis with the weights 1 2 1; padding repeats the edge."""
    ends = [(1, 1) if i == axis else (0, 0) for i in range(heat.ndim)]
    wide = jnp.pad(heat, ends, mode="edge")
    before, here, after = (
        jax.lax.slice_in_dim(wide, k, k + heat.shape[axis], axis=axis) for k in range(3)
    )
    return (before + 2 * here + after) / 4


def evidence(logits: jax.Array, classes: jax.Array | None = None) -> jax.Array:
    """Returns float [batch], the log-odds of a class against the rest.

    Args:
        logits: [batch] for two classes, or [batch, K] for K classes.
        classes: int32 [batch], the label of each image's class. By default label 1 for two classes,
            or the label of the highest logit for K classes.
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
    """Returns the feature maps and the gradient of `evidence` by them, [batch, h, w, channels]."""
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
    """Returns the logits and the feature maps [batch, height', width', channels] by name.

    Args:
        model: a network of `cnnjax.networks`, or another that passes its feature maps to `sow`
            (collection `intermediates`) and `perturb` under the names `FINAL` and `FINE`.
        variables: its Flax variables.
        images: float32 [batch, height, width, 1] in [0, 1].
        perturbations: arrays by name, added to the feature maps (`flax.linen.Module.perturb`). The
            gradient by a perturbation equals the gradient by the feature maps.
    """
    if perturbations is not None:
        variables = variables | {"perturbations": perturbations}
    logits, kept = model.apply(variables, images, train=False, mutable=["intermediates"])
    return logits, {name: maps for name, (maps,) in kept.get("intermediates", {}).items()}


def make_occlusion(model: Any, *, patch: float = 0.2, steps: int = 12) -> Explain:
    """Returns the jitted (variables, images) -> heat of occlusion (Zeiler and Fergus, ECCV 2014).

    A square with the mean gray level of the image covers each position of a grid in turn, and the
    network is evaluated again. This takes steps * steps forward passes. It uses no gradient, so it
    is an independent check of Grad-CAM.

    Args:
        model: a network of `cnnjax.networks`.
        patch: side of the square, as a fraction of the image side.
        steps: number of positions along each axis.

    Returns:
        A function with the signature described in `make_grad_cam`. The heat of a pixel is the mean
        decrease of the log-odds over the squares that cover the pixel; it is negative if they
        increase the log-odds.
    """

    def occlusion(
        variables: PyTree, images: jax.Array, classes: jax.Array | None = None
    ) -> jax.Array:
        pixels = to_float(images)
        batch, height, width, _ = pixels.shape
        gray = pixels.mean((1, 2, 3), keepdims=True)
        logits = model.apply(variables, pixels, train=False)
        if classes is None and logits.ndim == 2:
            classes = logits.argmax(-1)  # the same class for all positions of the square
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
    """Scales each map of float [batch, height, width] to a maximum of 1; clips negatives to 0."""
    heat = np.maximum(heat, 0)
    highest = heat.max((1, 2), keepdims=True)
    return np.divide(heat, highest, out=np.zeros_like(heat), where=highest > 0)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Returns an image with its heat map as an overlay.

    High values are yellow and low values purple (matplotlib's `plasma`, whose lightness increases
    with the value). Where the heat is zero, the image is unchanged.

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
    """Draws the outline of a box into an RGB picture, unless the box is the whole picture.

    Args:
        picture: changed in place.
        box: float [4], left, top, right and bottom, as fractions of the sides.
    """
    if np.array_equal(box, (0, 0, 1, 1)):
        return
    corners = np.asarray(box).reshape(2, 2) * picture.size
    left, top = np.floor(corners[0]).tolist()
    right, bottom = (np.ceil(corners[1]) - 1).tolist()
    ImageDraw.Draw(picture).rectangle((left, top, right, bottom), outline=(120, 200, 255))
