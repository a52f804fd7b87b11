"""Which gang takes a request: round robin, the less loaded of two, or the least loaded.

The dispatcher asks once a request, with the open links in a stable order. Load is what this router has in flight there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, Protocol

from tensorweave.cluster.link import GangLink
from tensorweave.cluster.protocol import GenerateRequest

PolicyName = Literal["least_loaded", "power_of_two", "round_robin"]


class RoutingPolicy(Protocol):
    def choose(self, links: Sequence[GangLink], request: GenerateRequest) -> GangLink:
        """One of `links`, which is never empty."""


class RoundRobin:
    def __init__(self) -> None:
        self._turn = 0

    def choose(self, links: Sequence[GangLink], request: GenerateRequest) -> GangLink:
        self._turn += 1
        return links[self._turn % len(links)]


class PowerOfTwo:
    """The less loaded of two drawn at random: near the best where many routers share the gangs (Mitzenmacher 2001)."""

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random.Random()

    def choose(self, links: Sequence[GangLink], request: GenerateRequest) -> GangLink:
        if len(links) == 1:
            return links[0]
        first, second = self._draw.sample(range(len(links)), 2)
        return min(links[first], links[second], key=lambda link: link.num_inflight)


class LeastLoaded:
    """Ties go to the next in turn, so that an idle fleet is used evenly."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, links: Sequence[GangLink], request: GenerateRequest) -> GangLink:
        self._turn += 1
        start = self._turn % len(links)
        return min([*links[start:], *links[:start]], key=lambda link: link.num_inflight)


def build_policy(name: PolicyName) -> RoutingPolicy:
    match name:
        case "least_loaded":
            return LeastLoaded()
        case "power_of_two":
            return PowerOfTwo()
        case "round_robin":
            return RoundRobin()
