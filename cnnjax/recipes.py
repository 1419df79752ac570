"""The recipes: one `Config` for each NAME of `cnnjax train NAME`.

A recipe sets the defaults. Change them with flags, `cnnjax train pneumonia --train.epochs 40`, or
in Python, `dataclasses.replace(cnnjax.recipes.pneumonia, seed=1)`.
"""

from __future__ import annotations

from pathlib import Path

from cnnjax.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig

# The other settings of the blog post are the defaults of cnnjax.config.
baseline = Config(workdir=Path("runs/baseline"), model=ModelConfig("baseline", channels=3))
"""The setup of the blog post: its network, augmentation, optimizer and batch size of 32."""

pneumonia = Config(
    workdir=Path("runs/pneumonia"),
    data=DataConfig(size=96, frame="lungs"),
    model=ModelConfig(
        "resnet", width=32, depth=1, stages=3, stem=4, standardize=True, local_contrast=True
    ),
    augment=AugmentConfig(
        shear=0,
        zoom=0,
        flip=False,
        crop=0.35,
        contrast=0.2,
        brightness=0.1,
        gamma=0.25,
        sharpness=0.5,
    ),
    train=TrainConfig(
        epochs=72,
        batch=32,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.02,
        schedule="cosine",
        class_weights=False,
        auxiliary=0.3,
    ),
)
"""The project's own recipe: a small residual network on images cropped to the lungs."""
