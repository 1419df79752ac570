"""The PyTorch side of the comparison. Runs without cnnjax in its own environment.

Forms: `eager`, `eager channels_last`, `compiled` (channels_last, torch.compile). For bfloat16,
autocast is used with float32 weights. On a GPU, float32 products may use TF32, as in JAX.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers.worker import Problem, serve


class Baseline(nn.Module):
    """The post's network."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        side = ((size - 2) // 2 - 2) // 2
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 32, 3)
        self.dense1 = nn.Linear(32 * side * side, 128)
        self.dense2 = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [batch]."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.dense1(x.flatten(1)))
        return self.dense2(x)[:, 0]


class Same(nn.Conv2d):
    """A convolution without bias, padded to ceil(size / stride).

    With a stride, TensorFlow and Flax can pad the end more than the start. If `exact` is set, this
    class does the same, which costs a copy. PyTorch is timed with its usual `padding=size // 2`.
    """

    exact = False

    def __init__(self, into: int, out: int, size: int, stride: int) -> None:
        super().__init__(into, out, size, stride, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, out, height', width']."""
        size, stride = self.kernel_size[0], self.stride[0]
        if Same.exact and stride > 1 and size > 1:
            side = x.shape[-1]
            pad = max(0, (-(-side // stride) - 1) * stride + size - side)
            x = functional.pad(x, (pad // 2, pad - pad // 2) * 2)
            return functional.conv2d(x, self.weight, stride=self.stride)
        return super().forward(x)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = Same(into, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = Same(out, out, 3, 1), nn.BatchNorm2d(out)
        self.shortcut = stride > 1 or into != out
        if self.shortcut:
            self.conv3, self.norm3 = Same(into, out, 1, stride), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, out, height', width']."""
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu((self.norm3(self.conv3(x)) if self.shortcut else x) + y)


class ResNet(nn.Module):
    """The residual network with one block per stage."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        width = problem.width
        self._standardize, self._local_contrast = problem.standardize, problem.local_contrast
        self.register_buffer("_gaussian", torch.from_numpy(problem.gaussian()), persistent=False)
        channels = 2 if problem.local_contrast else problem.channels
        self.stem = Same(channels, width, {2: 3, 4: 7}[problem.stem], problem.stem)
        self.stem_norm = nn.BatchNorm2d(width)
        self._blocks = []
        for stage in range(problem.stages):
            into, stride = (width, 1) if stage == 0 else (width * 2 ** (stage - 1), 2)
            block = Block(into, width * 2**stage, stride)
            self.add_module(f"stage{stage + 1}_block1", block)
            self._blocks.append(block)
        self.head = nn.Linear(width * 2 ** (problem.stages - 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [batch]."""
        if self._standardize:
            x = x - x.mean((1, 2, 3), keepdim=True)
            x = x * torch.rsqrt(x.square().mean((1, 2, 3), keepdim=True) + 1e-6)
        if self._local_contrast:
            with torch.autocast(x.device.type, enabled=False):
                centred = x - self._around(x)
                local = centred * torch.rsqrt(self._around(centred.square()) + 0.01)
            x = torch.cat([x, local], 1)
        x = functional.relu(self.stem_norm(self.stem(x)))
        for block in self._blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))[:, 0]

    def _around(self, x: Tensor) -> Tensor:
        """Returns the weighted mean around each pixel of [batch, channels, height, width]."""
        return self._gaussian @ x @ self._gaussian.T


class Torch:
    """See `benchmarks.peers.worker.Network`."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._device = torch.device("cuda" if problem.device == "gpu" else "cpu")
        name = torch.cuda.get_device_name() if problem.device == "gpu" else "cpu"
        self.version = f"torch {torch.__version__} on {name}"
        torch.backends.cudnn.benchmark = True
        last = problem.form != "eager"
        self._format = torch.channels_last if last else torch.contiguous_format
        images = torch.from_numpy(problem.floats()).to(self._device).permute(0, 1, 4, 2, 3)
        torch.set_float32_matmul_precision("high")
        self._images = [x.contiguous(memory_format=self._format) for x in images]
        self._labels = list(torch.from_numpy(problem.labels).to(self._device).float())
        self._reset()
        compiled = problem.form == "compiled"
        self._step: Callable[[Tensor, Tensor], Tensor] = self._backward
        if compiled:
            mode = "max-autotune" if problem.device == "gpu" else "default"
            self._step = torch.compile(self._backward, mode=mode)
        self._taken = 0

    def logits(self) -> np.ndarray:
        """See `benchmarks.peers.worker.Network`."""
        with self._proving():
            self._model.eval()
            with torch.no_grad():
                return self._model(self._images[0]).float().cpu().numpy()

    def losses(self, steps: int) -> list[float]:
        """See `benchmarks.peers.worker.Network`."""
        found = []
        with self._proving():
            for image, label in zip(self._images[:steps], self._labels[:steps], strict=True):
                found.append(float(self._step(image, label)))
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
        return found

    def train(self, steps: int) -> None:
        """See `benchmarks.peers.worker.Network`."""
        for _ in range(steps):
            i = self._taken % len(self._images)
            self._step(self._images[i], self._labels[i])
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._taken += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _proving(self) -> Iterator[None]:
        """Resets, and uses TensorFlow's padding and full float32 precision; resets at the end."""
        Same.exact = True
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        self._reset()
        yield
        self._reset()
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        Same.exact = False

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        low = self._problem.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=low):
            logits = self._model(images)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), labels)
        loss.backward()
        return loss.detach()

    def _reset(self) -> None:
        problem = self._problem
        self._model: nn.Module = (
            Baseline(problem.channels, problem.images.shape[2])
            if problem.network == "baseline"
            else ResNet(problem)
        )
        names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
        state = self._model.state_dict()
        for path, value in problem.params.items():
            *layers, leaf = path.split("/")
            if leaf == "kernel" and value.ndim == 4:
                value = value.transpose(3, 2, 0, 1)
            elif leaf == "kernel":
                if layers[-1] == "dense1":  # rows: pixel, then channel; in PyTorch the reverse
                    side = int((value.shape[0] // 32) ** 0.5)
                    value = value.reshape(side, side, 32, -1).transpose(2, 0, 1, 3)
                    value = value.reshape(-1, value.shape[-1])
                value = value.T
            state[".".join([*layers, names[leaf]])] = torch.from_numpy(value.copy())
        self._model.load_state_dict(state)
        self._model.to(self._device, memory_format=self._format).train()
        kernels = [p for p in self._model.parameters() if p.ndim > 1]
        others = [p for p in self._model.parameters() if p.ndim <= 1]
        settings = {"lr": problem.rate, "eps": problem.epsilon, "fused": True}
        groups = [
            {"params": kernels, "weight_decay": problem.decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, **settings)
            if problem.decay
            else torch.optim.Adam(self._model.parameters(), **settings)
        )


if __name__ == "__main__":
    serve(Torch)
