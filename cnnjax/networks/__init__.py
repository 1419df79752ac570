"""The networks. This is the only package that imports Flax's layers.

A network is any Linen module that is called as `apply(variables, images, train=..., rngs=...)` with
float32 images [batch, height, width, 1] in [0, 1]. It returns the outputs that its objective
expects: logits [batch] for `cnnjax.objectives.Binary`, logits [batch, K] for `Softmax`, maps of
logits for `Segmentation`. In training `rngs` has a key for dropout. Batch statistics are in the
collection `batch_stats`. The feature maps for heat maps are exposed under the names `FINAL` and
`FINE`, with `sow` into `intermediates` and with `perturb`.
"""

from cnnjax.networks.classifiers import (
    AUXILIARY,
    FINAL,
    FINE,
    SMALLEST,
    BaselineCNN,
    ResNet,
    make_model,
    model_of,
    second_head,
)
from cnnjax.networks.lung_finder import LungFinder
from cnnjax.networks.modules import ConvPool, local_contrast, standardized

__all__ = [
    "AUXILIARY",
    "FINAL",
    "FINE",
    "SMALLEST",
    "BaselineCNN",
    "ConvPool",
    "LungFinder",
    "ResNet",
    "local_contrast",
    "make_model",
    "model_of",
    "second_head",
    "standardized",
]
