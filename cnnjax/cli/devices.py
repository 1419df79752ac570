"""`cnnjax devices`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cnnjax.config import DeviceConfig

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Devices:
    """List the devices that JAX can use on this machine."""

    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __call__(self) -> int:
        """Prints one line for each device; returns the exit status."""
        from cnnjax.machine import devices

        mesh = devices.make_mesh(self.device)
        print(devices.describe(mesh))
        for device in mesh.devices.flat:
            print(f"  {device.id}  {device.platform}  {device.device_kind}")
        return 0
