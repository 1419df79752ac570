"""Measures how fast a peer reads a folder of images. Runs without cnnjax in the peer's environment.

    python -m benchmarks.peers.reading keras|torch FOLDER SIZE WORKERS

Prints the seconds of one pass, without imports, listing of files and start of PyTorch's workers.
PyTorch reads gray images, as the Pillow loop does; Keras reads as in the post's program. The folder
contains one folder per class.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def keras_pass(folder: str, size: int) -> float:
    """Returns the seconds of a pass of `flow_from_directory`, as in the post's program."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    flow = ImageDataGenerator(rescale=1 / 255).flow_from_directory(
        folder, target_size=(size, size), batch_size=32, class_mode="binary", shuffle=False
    )
    start = time.perf_counter()
    for i in range(len(flow)):
        flow[i]
    return time.perf_counter() - start


def torch_pass(folder: str, size: int, workers: int) -> float:
    """Returns the seconds of the second pass of a `DataLoader` that opens files with Pillow."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())

    class Folder(Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> torch.Tensor:
            with Image.open(files[i]) as image:
                gray = image.convert("L").resize((size, size), Image.Resampling.BOX)
            return torch.from_numpy(np.array(gray)[None]).float() / 255

    loader = DataLoader(Folder(), batch_size=32, num_workers=workers, persistent_workers=True)
    for _ in range(2):
        start = time.perf_counter()
        for _ in loader:
            pass
        took = time.perf_counter() - start
    return took


if __name__ == "__main__":
    peer, root, side, cores = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    took = (
        keras_pass(root, int(side)) if peer == "keras" else torch_pass(root, int(side), int(cores))
    )
    print(took, file=answers)
