"""By which addresses a gang's ranks listen and are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from tensorweave.cluster.ranks import RankPlace

LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Hosts:
    """Addresses, a rank each, by which the ranks reach each other, and by which front ends and other gangs reach them.
    Nothing listens beyond loopback unless another host must reach it."""

    peers: Sequence[str]
    reached: Sequence[str]

    @classmethod
    def choose(cls, places: Sequence[RankPlace], node_ips: Mapping[str, str]) -> Self:
        """`node_ips` has every node of the cluster, those without a rank too."""
        is_one_host = len({place.node_id for place in places}) == 1
        own = [node_ips[place.node_id] for place in places]
        loopback = [LOOPBACK] * len(places)
        return cls(loopback if is_one_host else own, loopback if len(node_ips) == 1 else own)

    @property
    def listen(self) -> str:
        """The leader's."""
        return self.reached[0]
