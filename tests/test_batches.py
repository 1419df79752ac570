"""Which image stands where is a function of key and step; how it gets there changes nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cnnjax.config import DeviceConfig
from cnnjax.data.batches import Feeder, in_batches, load, step_rows
from cnnjax.machine.devices import make_mesh
from cnnjax.objectives import Batch

KEY = jax.random.key(3)


def test_the_stream_is_one_permutation_after_another() -> None:
    images = np.arange(100, 150)
    rows = step_rows(KEY, range(25), images, 8)
    assert rows.shape == (25, 8)
    each = rows.reshape(4, 50)
    for permutation in each:
        assert sorted(permutation) == list(images)
    assert (each[0] != each[1]).any()


def test_the_rows_of_a_step_are_a_function_of_key_and_number() -> None:
    whole = step_rows(KEY, range(20), np.arange(50), 8)
    for start, stop in ((0, 7), (6, 7), (13, 20), (5, 5)):
        part = step_rows(KEY, range(start, stop), np.arange(50), 8)
        np.testing.assert_array_equal(part, whole[start:stop])
    assert (whole != step_rows(jax.random.key(4), range(20), np.arange(50), 8)).any()


def test_a_batch_may_be_larger_than_the_data() -> None:
    rows = step_rows(KEY, range(2), np.arange(3), 8)
    assert np.bincount(rows.ravel()).tolist() in ([6, 5, 5], [5, 6, 5], [5, 5, 6])


@pytest.mark.parametrize("devices", [1, 3, 4])
@pytest.mark.parametrize("resident_mib", [0, 100])
def test_batches_hold_the_images_of_their_rows(devices: int, resident_mib: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, 4, 4), dtype=np.uint8)
    labels = rng.integers(0, 2, 20).astype(np.int32)
    auxiliary = rng.integers(-1, 2, 20).astype(np.int32)
    weights = rng.random(20, np.float32)
    mesh = make_mesh(DeviceConfig(count=devices))
    feeder = Feeder(images, labels, mesh, resident_mib, auxiliary, weights)
    assert (feeder.data is None) == (resident_mib == 0)
    rows = in_batches(np.arange(20, dtype=np.int32)[::-1], 8)
    fetch = jax.jit(load)
    batches = [fetch(feeder.data, feed) for feed in feeder.feed(rows)]
    assert len(batches) == 3
    for batch, step in zip(batches, rows, strict=True):
        assert isinstance(batch, Batch)
        assert len(batch.images) == (9 if devices == 3 else 8)
        assert len(batch.images.sharding.device_set) == devices
        valid = step[step >= 0]
        np.testing.assert_array_equal(batch.images[: len(valid)], images[valid])
        np.testing.assert_array_equal(batch.labels[: len(valid)], labels[valid])
        np.testing.assert_array_equal(batch.auxiliary[: len(valid)], auxiliary[valid])
        np.testing.assert_array_equal(batch.weights[: len(valid)], weights[valid])


def test_a_failure_while_reading_ahead_is_raised() -> None:
    images = np.zeros((4, 2, 2), np.uint8)
    feeder = Feeder(images, np.zeros(4, np.int32), make_mesh(DeviceConfig()), 0)
    with pytest.raises(IndexError):
        list(feeder.feed(np.array([[0, 1, 2, 9]])))
