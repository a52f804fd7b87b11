"""Where a gang listens: on loopback, unless another host must reach it."""

from __future__ import annotations

import pytest

from tensorweave.cluster.hosts import LOOPBACK, Hosts
from tensorweave.cluster.ranks import RankPlace

IPS = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}


@pytest.mark.parametrize(
    ("nodes", "cluster", "peers", "reached"),
    [
        ("aa", "a", [LOOPBACK] * 2, [LOOPBACK] * 2),
        ("bb", "ab", [LOOPBACK] * 2, ["10.0.0.2"] * 2),
        ("ba", "abc", ["10.0.0.2", "10.0.0.1"], ["10.0.0.2", "10.0.0.1"]),
    ],
    ids=["one host is all there is", "one host of several", "ranks on two hosts"],
)
def test_nothing_listens_beyond_loopback_unless_another_host_must_reach_it(
    nodes: str, cluster: str, peers: list[str], reached: list[str]
) -> None:
    places = [RankPlace(node, pid, 0.0) for pid, node in enumerate(nodes)]
    hosts = Hosts.choose(places, {node: IPS[node] for node in cluster})
    assert (hosts.peers, hosts.reached, hosts.listen) == (peers, reached, reached[0])
