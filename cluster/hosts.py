"""`Hosts`: the addresses at which a gang's ranks listen and are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from tensorweave.cluster.ranks import RankPlace

LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Hosts:
    """One address per rank: in `peers` the one by which the other ranks reach it, in `reached` the one for front ends
    and other gangs. Nothing listens beyond loopback unless another host must reach it."""

    peers: Sequence[str]
    reached: Sequence[str]

    @classmethod
    def choose(cls, places: Sequence[RankPlace], node_ips: Mapping[str, str]) -> Self:
        """`node_ips` has every node of the cluster, including those without a rank."""
        is_one_host = len({place.node_id for place in places}) == 1
        own = [node_ips[place.node_id] for place in places]
        loopback = [LOOPBACK] * len(places)
        return cls(loopback if is_one_host else own, loopback if len(node_ips) == 1 else own)

    @property
    def listen(self) -> str:
        """Where the leader listens."""
        return self.reached[0]
