"""What the program asks of the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FAULTS = """
import ctypes
import resource
import statistics

import jax
import jax.numpy as jnp

from cnnjax import devices
from cnnjax.config import DeviceConfig

ctypes.CDLL("libc.so.6").gnu_get_libc_version
devices.make_mesh(DeviceConfig("cpu"))
x = jnp.ones((6000, 8))
total = jax.jit(lambda x: jnp.sin(x @ x.T @ x).sum())  # by way of 137 MiB


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(total(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# The first few calls each find the heap too small, or that something small lies in the way.
print(statistics.median(faults() for _ in range(15)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's memory")
def test_temporary_memory_is_taken_from_the_kernel_once() -> None:
    """Each page that comes from the kernel is a fault: here 35,000 for each call."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=False
    )
    if "gnu_get_libc_version" in done.stderr or "libc.so.6" in done.stderr:
        pytest.skip("another C library")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000
