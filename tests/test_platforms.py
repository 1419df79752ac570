"""The train step is lowered for GPUs and TPUs too, in the forms that they are to have.

No such device is needed for that. `benchmarks/ahead.py` goes on to compile it, with their compiler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax import logits, steps, train
from cnnjax.augment import make_augment
from cnnjax.config import AugmentConfig, ModelConfig, TrainConfig
from cnnjax.data.batches import Feeder, Resident
from cnnjax.machine import devices
from cnnjax.networks import make_model
from cnnjax.objectives import Binary
from cnnjax.optimizers import make_optimizer

ALL = AugmentConfig(10, 0.1, True, 5, 0.1, 0.5, 0.5, 0.2, 0.1, 0.2, 0.5, 0.1, 0.2)
SIZE, MANY, BATCH = 16, 2, 4


def lowered(network: str, platform: str) -> str:
    """Returns StableHLO of two train steps in one call, each batch divided among four devices."""
    mesh = Mesh(np.array(jax.devices()), (devices.AXIS,))
    both = network == "resnet"
    config = ModelConfig(network, width=4, stages=2, standardize=both, local_contrast=both)
    model = make_model(config, jnp.dtype("bfloat16"), auxiliary=True)
    optimizer, _ = make_optimizer(TrainConfig(optimizer="adamw", schedule="cosine"), 4)
    step = steps.make_train_step(
        model, optimizer, make_augment(ALL), Binary(mixup=0.2, auxiliary=0.3), ema_decay=0.9
    )
    key = jax.random.key(0)
    state = jax.eval_shape(lambda k: steps.init_state(model, optimizer, k, SIZE, ema=True), key)
    numbers = jax.ShapeDtypeStruct((8,), jnp.int32)
    data = Resident(jax.ShapeDtypeStruct((8, SIZE, SIZE), jnp.uint8), numbers, numbers)
    by_row = NamedSharding(mesh, PartitionSpec(None, devices.AXIS))
    feeds = jax.ShapeDtypeStruct((MANY, BATCH), jnp.int32, sharding=by_row)
    traced = train.compile_steps(mesh, step).many.trace(state, data, feeds, key)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("network", ["baseline", "resnet"])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_train_step_is_lowered(network: str, platform: str) -> None:
    text = lowered(network, platform)
    assert "stablehlo.while" in text  # both steps in one call
    reads_pairs = "complex<f32>" in text
    assert reads_pairs == (platform == "cuda")
    pools = "select_and_scatter" in text
    assert pools == (platform == "tpu" and network == "baseline")


@pytest.mark.parametrize(("platform", "expected"), [("cpu", None), ("gpu", "highest")])
def test_accelerators_judge_in_full_float32(
    monkeypatch: pytest.MonkeyPatch, platform: str, expected: str | None
) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), (devices.AXIS,))
    monkeypatch.setattr(devices, "platform", lambda mesh: platform)
    seen = []

    class Probe:
        def apply(self, variables: object, images: jax.Array, *, train: bool) -> jax.Array:
            seen.append(jax.config.jax_default_matmul_precision)
            return images.mean((1, 2, 3))

    state = steps.TrainState(jnp.zeros((), jnp.int32), {}, {}, (), None)
    feeder = Feeder(np.full((3, 4, 4), 255, np.uint8), np.zeros(3, np.int32), mesh, 1)
    found = logits.make_logits(Probe(), mesh)(state, feeder, np.arange(3))
    np.testing.assert_allclose(found, 1)
    assert seen == [expected]
