"""Protocol between `__main__` and a network in another process; imports only NumPy.

Requests are lines of JSON on standard input, answers are lines of JSON on standard output. The
first line of output, without a request, contains `version`. The requests are `logits` (of the first
batch), `losses` (of steps from the initial weights) and `time` (the seconds of some steps).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

import numpy as np


class Network(Protocol):
    """A network with its optimizer and its batches in a library."""

    version: str
    """Version of the library, and the device."""

    def logits(self) -> np.ndarray:
        """Returns float [batch]: the logits of the first batch, in evaluation mode.

        `logits` and `losses` are used to compare libraries, so they use full float32 precision,
        also on a GPU. `train` may use TF32 there.
        """

    def losses(self, steps: int) -> list[float]:
        """Returns the mean loss of each of `steps` steps from the initial weights."""

    def train(self, steps: int) -> None:
        """Takes `steps` steps, and returns when the device is idle."""


class Problem:
    """The task of every process, read from the file that `__main__` wrote.

    Attributes:
        network: `baseline` or `resnet`.
        precision: `float32` or `bfloat16`.
        form: variant of the library, such as `compiled`.
        device: `cpu` or `gpu`.
        images: uint8 [batches, batch, height, width].
        labels: int32 [batches, batch].
        channels: number of input channels (the gray image is repeated).
        width: channels of the ResNet's first stage.
        stages: number of stages of the ResNet, each with one block.
        stem: stride of the ResNet's first convolution, which is 3x3 for 2 and 7x7 for 4.
        standardize: whether the network standardizes each image to mean 0 and standard deviation 1.
        local_contrast: whether the ResNet has a second input channel: each pixel minus the mean
            around it, divided by the standard deviation around it.
        params: parameters by their path in Flax, such as `conv1/kernel`.
        rate: learning rate.
        decay: decoupled weight decay of kernels; 0 means plain Adam.
        epsilon: epsilon of Adam.
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
        """Returns float32 [size, size]: row i has the weights of the pixels around pixel i; sum 1.

        The weights are Gaussian, with a standard deviation of a twelfth of the side. They are used
        for `local_contrast`.
        """
        side = self.images.shape[2]
        at = np.arange(side)
        weights = np.exp(-0.5 * ((at[:, None] - at) / (side / 12)) ** 2)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    def tree(self) -> dict[str, Any]:
        """Returns the parameters as nested dicts, as in Flax."""
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
    # Libraries print to standard output; keep the answers separate from that.
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
