"""The post's own Keras program: from folders of JPEG files to a trained and evaluated network.

    python -m benchmarks.peers.keras_job FOLDER EPOCHS cpu|gpu

FOLDER contains train/ and val/, each with one folder per class. Runs without cnnjax in the Keras
environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras import Sequential, layers
from keras.src.legacy.preprocessing.image import ImageDataGenerator

from benchmarks.peers.keras import use


def main(folder: Path, epochs: int, device: str) -> None:
    """Trains like the post, and evaluates after each epoch."""
    use(device)
    changed = ImageDataGenerator(
        rescale=1 / 255, shear_range=0.2, zoom_range=0.2, horizontal_flip=True
    )
    settings = {"target_size": (64, 64), "batch_size": 32, "class_mode": "binary"}
    train = changed.flow_from_directory(str(folder / "train"), **settings)
    held_out = ImageDataGenerator(rescale=1 / 255).flow_from_directory(
        str(folder / "val"), **settings, shuffle=False
    )
    model = Sequential(
        [
            layers.Input((64, 64, 3)),
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])
    counts = [sum(train.classes == label) for label in (0, 1)]
    weights = {label: len(train.classes) / (2 * count) for label, count in enumerate(counts)}
    model.fit(train, epochs=epochs, validation_data=held_out, class_weight=weights, verbose=0)
    print(model.evaluate(held_out, verbose=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
