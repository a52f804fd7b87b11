"""Two network namespaces joined by a cable of a limited rate, for benchmarks of ranks on two hosts. Needs root and
iproute2."""

from __future__ import annotations

import json
import subprocess
from typing import Final

SPACES: Final = ("twpl0", "twpl1")
ADDRESSES: Final = ("10.78.0.1", "10.78.0.2")
DEVICE: Final = "eth0"


def command(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=30)


class ThrottledLink:
    """Two namespaces whose devices are the ends of one cable."""

    def __init__(self, rate: str) -> None:
        self._shape = ("tbf", "rate", rate, "burst", "1mbit", "latency", "400ms")

    def __enter__(self) -> ThrottledLink:
        self._remove()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def _make(self) -> None:
        for space in SPACES:
            command("ip", "netns", "add", space)
        ends = [("name", DEVICE, "netns", space) for space in SPACES]
        command("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for space, address in zip(SPACES, ADDRESSES, strict=True):
            command("ip", "-n", space, "addr", "add", f"{address}/24", "dev", DEVICE)
            for device in (DEVICE, "lo"):
                command("ip", "-n", space, "link", "set", device, "up")
            command("tc", "-n", space, "qdisc", "add", "dev", DEVICE, "root", *self._shape)

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=30)


def link_bytes() -> int:
    """Sent by both ends so far."""
    total = 0
    for space in SPACES:
        told = subprocess.run(
            ["ip", "-n", space, "-json", "-statistics", "link", "show", DEVICE],
            check=True,
            capture_output=True,
            timeout=30,
        )
        total += json.loads(told.stdout)[0]["stats64"]["tx"]["bytes"]
    return total
