"""A `DeviceMemory` of numbers: an allocator that keeps what is released until it settles."""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20


class MemoryOfNumbers:
    def __init__(self, free: int, reserved: int) -> None:
        self.free = free
        self.reserved = self.peak_reserved = reserved
        self._used = reserved

    def allocate(self, size: int) -> None:
        self._used += size
        grown = max(0, self._used - self.reserved)
        self.take(grown)
        self.reserved += grown
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def release(self, size: int) -> None:
        self._used -= size

    def take(self, size: int) -> None:
        """What the driver takes, without the allocator."""
        self.free -= size

    def restart_peak(self) -> None:
        self.peak_reserved = self.reserved

    def settle(self) -> None:
        self.free += self.reserved - self._used
        self.reserved = self._used
