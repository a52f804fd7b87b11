"""The address of this host in a network that is given by the name of an interface or by its range."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

_KINDS = (socket.AF_INET, socket.AF_INET6)


def interface_addresses() -> dict[str, list[str]]:
    """The IP addresses of this host, by interface."""
    return {
        name: [address.address.partition("%")[0] for address in addresses if address.family in _KINDS]
        for name, addresses in psutil.net_if_addrs().items()
    }


def address_in(network: str, interfaces: Mapping[str, Sequence[str]]) -> str:
    """The first address of the interface `network`, or the first one in the range `network` ('10.80.0.0/16').

    Raises:
        ValueError: There is none; the message has the interfaces.
    """
    addresses = interfaces.get(network) or _in_range(network, interfaces)
    if not addresses:
        known = ", ".join(f"{name} {' '.join(found)}" for name, found in interfaces.items() if found)
        raise ValueError(f"network.transfer is {network!r}, and this host has no address there (it has: {known})")
    return addresses[0]


def _in_range(network: str, interfaces: Mapping[str, Sequence[str]]) -> list[str]:
    try:
        wanted = ipaddress.ip_network(network, strict=False)
    except ValueError:
        return []
    return [address for found in interfaces.values() for address in found if ipaddress.ip_address(address) in wanted]
