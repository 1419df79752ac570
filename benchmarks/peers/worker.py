"""The conversation of `__main__` with a network in another process; imports NumPy only.

Each line of standard input is a request, each line of standard output its answer, in JSON: first
`ready` with the name of what computes, then `logits` of the first batch, `losses` of ten steps
from the initial weights, and `time`, the seconds that some steps take.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

import numpy as np


class Network(Protocol):
    """A network with its optimizer and its batches, in some library."""

    version: str
    """The library's, and what it computes on."""

    def logits(self) -> np.ndarray:
        """Returns float [batch] of the first batch, as an eval step gives them.

        They prove something, as do `losses`: products of float32 are those of float32 then, also on
        a GPU, which in `train` may take TF32.
        """

    def losses(self, steps: int) -> list[float]:
        """Returns the mean loss of each of so many steps from the initial weights."""

    def train(self, steps: int) -> None:
        """Takes so many steps, and returns when the device is idle."""


class Problem:
    """What every process trains: read from the file that `__main__` wrote.

    Attributes:
        network: `baseline` or `resnet`.
        precision: `float32` or `bfloat16`.
        form: of the library, such as `compiled`.
        device: `cpu` or `gpu`.
        images: uint8 [batches, batch, height, width].
        labels: int32 [batches, batch].
        channels: how often the network repeats the gray image.
        width: channels of the ResNet's first stage.
        stages: of the ResNet, each of one block.
        stem: stride of the ResNet's first convolution, which is 3x3 with 2 and 7x7 with 4.
        standardize: whether the network brings each image to mean 0 and deviation 1 first.
        local_contrast: whether the ResNet, of one channel, sees each pixel less the mean around it,
            over the deviation there, as a second one.
        params: parameters by their path in Flax, such as `conv1/kernel`.
        rate: learning rate.
        decay: decoupled weight decay of kernels; 0 means plain Adam.
        epsilon: of Adam.
    """

    def __init__(self, path: str, form: str, precision: str) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        self.form, self.precision = form, precision
        settings = json.loads(str(arrays.pop("settings")))
        self.network: str = settings["network"]
        self.device: str = settings["device"]
        self.channels: int = settings["channels"]
        self.width: int = settings["width"]
        self.stages: int = settings["stages"]
        self.stem: int = settings["stem"]
        self.standardize: bool = settings["standardize"]
        self.local_contrast: bool = settings["local_contrast"]
        self.rate: float = settings["rate"]
        self.decay: float = settings["decay"]
        self.epsilon: float = settings["epsilon"]
        self.images, self.labels = arrays.pop("images"), arrays.pop("labels")
        self.params: dict[str, np.ndarray] = arrays

    def floats(self) -> np.ndarray:
        """Returns the images as float32 [batches, batch, height, width, channels] in [0, 1]."""
        images = self.images[..., None].astype(np.float32) / 255
        return np.repeat(images, self.channels, -1)

    def gaussian(self) -> np.ndarray:
        """Returns float32 [size, size]: row i weighs the pixels around pixel i, and sums to 1.

        The Gaussian's deviation is a twelfth of the side; `local_contrast` is taken under it.
        """
        side = self.images.shape[2]
        at = np.arange(side)
        weights = np.exp(-0.5 * ((at[:, None] - at) / (side / 12)) ** 2)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    def tree(self) -> dict[str, Any]:
        """Returns the parameters as Flax nests them."""
        tree: dict[str, Any] = {}
        for path, value in self.params.items():
            *folders, leaf = path.split("/")
            inner = tree
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[leaf] = value
        return tree


def serve(make: Any) -> None:
    """Answers requests about `make(problem)` until standard input ends."""
    # Libraries print; keep the answers apart from it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    network: Network = make(Problem(*sys.argv[1:4]))
    answers.write(json.dumps({"version": network.version}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "logits":
            answer: Any = [float(x) for x in network.logits()]
        elif request["do"] == "losses":
            answer = network.losses(request["steps"])
        else:
            start = time.perf_counter()
            network.train(request["steps"])
            answer = time.perf_counter() - start
        answers.write(json.dumps(answer) + "\n")
