"""The networks. The only package that imports Flax's layers.

A network is any Linen module that is called as `apply(variables, images, train=..., rngs=...)` with
float32 images [batch, height, width, 1] in [0, 1]. It returns what its objective takes: logits
[batch] for `cnnjax.objectives.Binary`, [batch, K] for `Softmax`, maps for `Segmentation`. `rngs`
has a key for dropout in training. Batch statistics stand in the collection `batch_stats`. Feature
maps that heat maps are made of are named `FINAL` and `FINE`, by `sow` into `intermediates` and by
`perturb`.
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
