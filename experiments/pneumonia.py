"""Our own recipe: a small residual network; what `make train` runs.

python experiments/pneumonia.py --data.root DIR --workdir RUN

Hardware: 2 cores of an AMD EPYC (Zen 3, AVX2). On the phantoms, fold 0 of 5, seed 0: 2 min 40 s,
drawing and compiling included; AUC 1.000 on the 243 held-out images, which also
chose the epoch. On chest_xray a fold of five takes seven to eight minutes. Figures:
MODEL_CARD.md.
"""

from pathlib import Path

from cnnjax.cli import train
from cnnjax.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig

CONFIG = Config(
    workdir=Path("runs/pneumonia"),
    data=DataConfig(size=96, frame="lungs"),
    model=ModelConfig(
        "resnet", width=32, depth=1, stages=3, stem=4, standardize=True, local_contrast=True
    ),
    augment=AugmentConfig(
        shear=0,
        zoom=0.1,
        rotate=5,
        shift=0.04,
        flip=False,
        black=0.5,
        crop=0.5,
        contrast=0.2,
        brightness=0.1,
        gamma=0.25,
        sharpness=0.5,
    ),
    train=TrainConfig(
        epochs=36,
        batch=32,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.02,
        schedule="cosine",
        ema=0.98,
        label_smoothing=0.05,
        auxiliary=0.3,
    ),
)

if __name__ == "__main__":
    train(CONFIG, __doc__ or "")
