"""The Keras side of the comparison, on TensorFlow. Runs without cnnjax in its own environment.

Forms: `graph` (a TensorFlow graph without XLA) and `default` (Keras chooses whether to use XLA).
For bfloat16 the policy is `mixed_bfloat16`.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.peers.worker import Problem, serve


def baseline(size: int, channels: int) -> Any:
    """Returns the post's network."""
    return keras.Sequential(
        [
            layers.Input((size, size, channels)),
            layers.Conv2D(32, 3, activation="relu", name="conv1"),
            layers.MaxPooling2D(2),
            layers.Conv2D(32, 3, activation="relu", name="conv2"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu", name="dense1"),
            layers.Dense(1, name="dense2", dtype="float32"),
        ]
    )


def standardized(x: Any) -> Any:
    """Returns each image standardized to mean 0 and standard deviation 1."""
    x = x - keras.ops.mean(x, (1, 2, 3), keepdims=True)
    return x * keras.ops.rsqrt(keras.ops.mean(x * x, (1, 2, 3), keepdims=True) + 1e-6)


def with_local_contrast(x: Any, gaussian: np.ndarray) -> Any:
    """Returns [batch, height, width, 2]: the one channel of x and its local contrast."""

    def around(x: Any) -> Any:
        # TensorFlow 2.21 ends by a signal in a product of stacks of matrices on some processors
        # with AVX-512; tensordot is one product of two matrices.
        x = keras.ops.tensordot(x, gaussian, [[1], [1]])  # [batch, width, 1, height]
        x = keras.ops.tensordot(x, gaussian, [[1], [1]])  # [batch, 1, height, width]
        return keras.ops.transpose(x, (0, 2, 3, 1))

    centred = x - around(x)
    local = centred * keras.ops.rsqrt(around(centred * centred) + 0.01)
    return keras.ops.concatenate([x, local], -1)


def resnet(size: int, problem: Problem) -> Any:
    """Returns the residual network with one block per stage."""
    width = problem.width

    def norm(x: Any, name: str) -> Any:
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)

    def conv(x: Any, filters: int, window: int, stride: int, name: str) -> Any:
        return layers.Conv2D(filters, window, stride, padding="same", use_bias=False, name=name)(x)

    images = layers.Input((size, size, problem.channels))
    x = layers.Lambda(standardized, dtype="float32")(images) if problem.standardize else images
    if problem.local_contrast:
        arguments = {"gaussian": problem.gaussian()}
        x = layers.Lambda(with_local_contrast, arguments=arguments, dtype="float32")(x)
    window = {2: 3, 4: 7}[problem.stem]
    x = layers.ReLU()(norm(conv(x, width, window, problem.stem, "stem"), "stem_norm"))
    for stage in range(problem.stages):
        filters, stride = width * 2**stage, 1 if stage == 0 else 2
        at = f"stage{stage + 1}_block1-"
        y = layers.ReLU()(norm(conv(x, filters, 3, stride, at + "conv1"), at + "norm1"))
        y = norm(conv(y, filters, 3, 1, at + "conv2"), at + "norm2")
        if stride > 1:
            x = norm(conv(x, filters, 1, stride, at + "conv3"), at + "norm3")
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(images, layers.Dense(1, name="head", dtype="float32")(x))


def use(device: str) -> str:
    """Makes TensorFlow compute on `cpu` or `gpu`; returns the name of the device.

    Raises:
        RuntimeError: TensorFlow finds no GPU.
    """
    found = tf.config.list_physical_devices("GPU")
    if device == "cpu":
        tf.config.set_visible_devices([], "GPU")
        return "cpu"
    if not found:
        raise RuntimeError("TensorFlow finds no GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"]


class Keras:
    """See `benchmarks.peers.worker.Network`."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        name = use(problem.device)
        self.version = f"keras {keras.__version__}, tensorflow {tf.__version__} on {name}"
        if problem.precision == "bfloat16":
            keras.mixed_precision.set_global_policy("mixed_bfloat16")
        self._images = problem.floats()
        self._labels = problem.labels.astype(np.float32)
        self._reset()

    def logits(self) -> np.ndarray:
        """See `benchmarks.peers.worker.Network`."""
        tf.config.experimental.enable_tensor_float_32_execution(False)
        found = self._model(self._images[0], training=False).numpy()[:, 0]
        tf.config.experimental.enable_tensor_float_32_execution(True)
        return found

    def losses(self, steps: int) -> list[float]:
        """See `benchmarks.peers.worker.Network`."""
        self._reset()
        found = []
        tf.config.experimental.enable_tensor_float_32_execution(False)
        for images, labels in zip(self._images[:steps], self._labels[:steps], strict=True):
            # Without a reset, the result is the mean over the steps so far.
            self._model.reset_metrics()
            found.append(float(self._model.train_on_batch(images, labels)))
        tf.config.experimental.enable_tensor_float_32_execution(True)
        self._reset()
        return found

    def train(self, steps: int) -> None:
        """See `benchmarks.peers.worker.Network`."""
        for _ in range(steps):
            logs = self._function(self._iterator)
        logs["loss"].numpy() if isinstance(logs, dict) else np.asarray(logs)

    def _reset(self) -> None:
        problem = self._problem
        size = problem.images.shape[2]
        if problem.network == "baseline":
            self._model = baseline(size, problem.channels)
        else:
            self._model = resnet(size, problem)
        names = {"scale": "gamma", "bias": "beta"}
        for path, value in problem.params.items():
            *inside, leaf = path.split("/")
            layer = self._model.get_layer("-".join(inside))
            if isinstance(layer, layers.BatchNormalization):
                leaf = names[leaf]
            getattr(layer, leaf).assign(value)
        settings: dict[str, Any] = {"learning_rate": problem.rate, "epsilon": problem.epsilon}
        if problem.decay:
            optimizer = keras.optimizers.AdamW(weight_decay=problem.decay, **settings)
            optimizer.exclude_from_weight_decay(
                var_list=[v for v in self._model.trainable_variables if len(v.shape) < 2]
            )
        else:
            optimizer = keras.optimizers.Adam(**settings)
        self._model.compile(
            optimizer,
            keras.losses.BinaryCrossentropy(from_logits=True),
            jit_compile="auto" if problem.form == "default" else False,
        )
        self._model.make_train_function()
        self._function = self._model.train_function
        data = tf.data.Dataset.from_tensor_slices((self._images, self._labels)).repeat()
        if problem.device == "gpu":  # copies a batch while the previous step is computed
            ahead = tf.data.experimental.prefetch_to_device("/GPU:0", 2)
            self._iterator = iter(data.apply(ahead))
        else:
            self._iterator = iter(data.prefetch(2))


if __name__ == "__main__":
    serve(Keras)
