"""Which image stands where is a function of key and epoch; how it gets there changes nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cnnjax.config import DeviceConfig
from cnnjax.data.batches import Feeder, epoch_rows, in_batches, load
from cnnjax.devices import make_mesh
from cnnjax.objectives import Batch

KEY = jax.random.key(3)


def test_an_epoch_shows_each_image_once() -> None:
    rows = epoch_rows(KEY, 1, np.arange(100, 150), 8)
    assert rows.shape == (7, 8)
    assert sorted(rows[rows >= 0]) == list(range(100, 150))
    assert (rows[:6] >= 0).all()
    assert list(rows[6, 2:]) == [-1] * 6


def test_order_is_a_function_of_key_and_epoch() -> None:
    first = epoch_rows(KEY, 1, np.arange(50), 8)
    np.testing.assert_array_equal(first, epoch_rows(KEY, 1, np.arange(50), 8))
    assert (first != epoch_rows(KEY, 2, np.arange(50), 8)).any()
    assert (first != epoch_rows(jax.random.key(4), 1, np.arange(50), 8)).any()


@pytest.mark.parametrize("devices", [1, 3, 4])
@pytest.mark.parametrize("resident_mib", [0, 100])
def test_batches_hold_the_images_of_their_rows(devices: int, resident_mib: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, 4, 4), dtype=np.uint8)
    labels = rng.integers(0, 2, 20).astype(np.int32)
    viral = rng.integers(-1, 2, 20).astype(np.int32)
    feeder = Feeder(images, labels, make_mesh(DeviceConfig(count=devices)), resident_mib, viral)
    assert (feeder.data is None) == (resident_mib == 0)
    rows = in_batches(np.arange(20, dtype=np.int32)[::-1], 8)
    fetch = jax.jit(load)
    batches = [fetch(feeder.data, feed) for feed in feeder.feed(rows)]
    assert len(batches) == 3
    for batch, step in zip(batches, rows, strict=True):
        assert isinstance(batch, Batch)
        assert len(batch.mask) == (9 if devices == 3 else 8)
        assert len(batch.images.sharding.device_set) == devices
        valid = step[step >= 0]
        np.testing.assert_array_equal(batch.mask[: len(valid)], True)
        np.testing.assert_array_equal(batch.mask[len(valid) :], False)
        np.testing.assert_array_equal(batch.images[: len(valid)], images[valid])
        np.testing.assert_array_equal(batch.labels[: len(valid)], labels[valid])
        np.testing.assert_array_equal(batch.viral[: len(valid)], viral[valid])


def test_a_failure_while_reading_ahead_is_raised() -> None:
    images = np.zeros((4, 2, 2), np.uint8)
    feeder = Feeder(images, np.zeros(4, np.int32), make_mesh(DeviceConfig()), 0)
    with pytest.raises(IndexError):
        list(feeder.feed(np.array([[0, 1, 2, 9]])))
