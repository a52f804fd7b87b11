"""Which address of a host is in a network."""

from __future__ import annotations

import pytest

from tensorweave.cluster.host_networks import address_in, interface_addresses

HOST = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5"], "ib0": ["10.80.3.5", "fe80::1"], "eth1": []}


def test_an_interface_or_a_range_chooses_the_address() -> None:
    assert address_in("ib0", HOST) == "10.80.3.5"
    assert address_in("10.80.0.0/16", HOST) == "10.80.3.5"
    assert address_in("10.0.0.5", HOST) == "10.0.0.5"
    assert address_in("fe80::/10", HOST) == "fe80::1"


@pytest.mark.parametrize("network", ["10.90.0.0/16", "ib1", "eth1", "10.0.0.0/99"])
def test_a_host_without_an_address_there_is_described(network: str) -> None:
    with pytest.raises(ValueError, match=r"has no address there \(it has: lo 127\.0\.0\.1 ::1, eth0 10\.0\.0\.5, ib0"):
        address_in(network, HOST)


def test_this_host_has_loopback() -> None:
    assert address_in("127.0.0.0/8", interface_addresses()).startswith("127.")
